"""The retrieval recipes one after the other on drawn pictures: CLIP, bank, training and drawing with documents."""

import io
import json
import math
import tarfile
from functools import partial
from pathlib import Path

import datasets
import numpy as np
import pytest
import tokenize_images
import torch
import torch.nn.functional as F
import train_tokenizer
from conftest import COLOURS, SHAPES, TEXT_SIZE, draw, load_recipe, small_config, small_vqgan
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, TrainingArguments
from typer.testing import CliRunner

from cm3leon_hf.cli import app
from cm3leon_hf.data.cm3 import restore
from cm3leon_hf.data.transform import CM3Transform
from cm3leon_hf.images import default_image_processor
from cm3leon_hf.retrieval.encoder import CLIPEncoder
from cm3leon_hf.retrieval.memory_bank import MemoryBank
from cm3leon_hf.training.clip import CLIPObjective, alike_batches, clip_tokenizer

CLIP = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "layers": [1, 1, 1, 1], "width": 8},
    "text_cfg": {
        "hf_tokenizer_name": "this folder",
        "context_length": 12,
        "vocab_size": TEXT_SIZE,
        "width": 16,
        "heads": 2,
        "layers": 1,
        "pool_type": "eos",
        "eos_id": 1,
    },
}


def training(folder, **changes) -> TrainingArguments:
    fixed = {"use_cpu": True, "remove_unused_columns": False, "disable_tqdm": True, "report_to": "none"}
    return TrainingArguments(str(folder), per_device_train_batch_size=8, logging_steps=1, **fixed, **changes)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with a data set of drawn pictures, a tokenizer, a VQGAN and codes."""
    home = tmp_path_factory.mktemp("retrieval")
    rows = [
        {"image": draw(colour, shape, size), "captions": [f"a {colour} {shape}", f"{shape}, {colour}"], "name": f"{at}"}
        | {"concept": f"{colour} {shape}", "skin_tone": ""}
        for at, (colour, shape, size) in enumerate((c, s, n) for n in (20, 24) for c in COLOURS for s in SHAPES)
    ]
    text = datasets.Value("string")
    features = datasets.Features({"image": datasets.Image(), "captions": datasets.List(text)})
    features |= {name: text for name in ("name", "concept", "skin_tone")}
    (home / "drawn" / "data").mkdir(parents=True)
    for split, part in {"train": rows, "heldout_pairs": rows[::5]}.items():
        datasets.Dataset.from_list(part, features=features).to_parquet(
            home / "drawn" / "data" / f"{split}-00000-of-00001.parquet"
        )
    drawn, tokenizer, vqgan, codes = (str(home / name) for name in ("drawn", "tokenizer", "vqgan", "codes"))
    train_tokenizer.main(train_tokenizer.TokenizerArguments(drawn, tokenizer, text_vocab_size=TEXT_SIZE))
    small_vqgan().save_pretrained(vqgan)
    default_image_processor(small_vqgan().config).save_pretrained(vqgan)
    tokenize_images.main(tokenize_images.CodesArguments(drawn, vqgan, codes, keep_images=True))
    return home


@pytest.fixture(scope="module")
def clip(home) -> str:
    recipe = load_recipe("retrieval/train_clip.py")
    (home / "clip_config").mkdir()
    (home / "clip_config" / "open_clip_config.json").write_text(json.dumps({"model_cfg": CLIP, "preprocess_cfg": {}}))
    drawn, joined = str(home / "drawn"), {"alike": "skin_tone", "near": "concept", "jitter": 0.1, "shift": 1}
    joined |= {"classify": ["concept"]}
    arguments = recipe.CLIPArguments(drawn, str(home / "tokenizer"), str(home / "clip_config"), more=[drawn], **joined)
    recipe.main(arguments, training(home / "clip", max_steps=12, learning_rate=5e-3))
    return f"local-dir:{home / 'clip'}"


@pytest.fixture(scope="module")
def bank(home, clip) -> str:
    recipe = load_recipe("retrieval/build_bank.py")
    columns = {"id": "name", "text": "captions"}
    recipe.main(
        recipe.BankArguments(str(home / "codes"), str(home / "bank"), columns=columns, clip_model=clip, max_score=2.0)
    )
    return str(home / "bank")


@pytest.fixture(scope="module")
def retrieved(home, bank, clip) -> str:
    """The data set with documents for each row; the tiny CLIP's scores are all alike, so any score is taken."""
    recipe, folder = load_recipe("retrieval/retrieve.py"), str(home / "retrieved")
    recipe.main(recipe.RetrieveArguments(str(home / "codes"), folder, bank=bank, clip_model=clip))
    return folder


def test_the_clip_learns_and_is_what_open_clip_loads(home, clip):
    state = json.loads((home / "clip" / "checkpoint-12" / "trainer_state.json").read_text("utf-8"))
    losses = [log["loss"] for log in state["log_history"] if "loss" in log]
    assert losses[-1] < losses[0]
    rows = len(datasets.load_dataset(str(home / "drawn"), split="train"))
    assert state["epoch"] == pytest.approx(12 / math.ceil(2 * rows / 8))  # the data set and `more`, which is the same
    encoder = CLIPEncoder(clip, device="cpu")
    assert encoder.dimension == 16
    tokens = encoder.tokenizer(["a red circle", "red " * 20])
    assert tokens.shape == (2, 12) and (tokens == 1).sum(1).tolist() == [1, 1]  # each text ends with one <eos>


def test_pictures_that_it_learns_from_are_moved_by_some_pixels(clip):
    recipe, begin = load_recipe("retrieval/train_clip.py"), {"init_from": clip.removeprefix("local-dir:")}
    arguments = [recipe.CLIPArguments("", "", **begin, shift=shift) for shift in (1, 0)]
    moved, kept = (recipe.load_clip(one)[1].transforms[-1] for one in arguments)
    picture = torch.rand(3, 32, 32)
    wide = F.pad(picture, [1] * 4, mode="replicate")
    places = [wide[:, top : top + 32, left : left + 32] for top in range(3) for left in range(3)]
    seen = [[torch.equal(one, place) for place in places] for one in (moved(picture) for _ in range(90))]
    assert all(map(any, seen)) and all(map(any, zip(*seen)))  # each is one of the nine, and each of the nine is seen
    assert torch.equal(kept(picture), picture)


def test_pictures_are_mirrored_unless_their_text_names_a_side():
    recipe, captions = load_recipe("retrieval/train_clip.py"), ["a bright apple", "an arrow to the left"] * 40
    picture = Image.fromarray(np.random.default_rng(0).integers(256, size=(8, 8, 3), dtype=np.uint8))
    rows = {"image": [picture] * 80, "captions": [[caption] for caption in captions]}

    def seen(share: float, rng) -> list[bool]:
        args = recipe.CLIPArguments("", "", "config", flip=share)
        found = recipe.prepare(rows, args, lambda image: torch.from_numpy(np.array(image)), list, rng)
        there, mirrored = torch.from_numpy(np.array(picture)), torch.from_numpy(np.array(picture)[:, ::-1].copy())
        assert all(one.equal(there) or one.equal(mirrored) for one in found["pixel_values"])
        return [one.equal(mirrored) for one in found["pixel_values"]]

    assert seen(1.0, np.random.default_rng(0)) == [True, False] * 40
    assert 10 <= sum(seen(0.5, np.random.default_rng(0))) <= 30
    assert not any(seen(0.0, np.random.default_rng(0)) + seen(1.0, None))  # nor are those that it is measured on


def test_some_pictures_are_seen_as_the_vqgan_decodes_their_codes(home, clip, folder, processor):
    recipe = load_recipe("retrieval/train_clip.py")
    plain = {"dataset": str(home / "drawn"), "tokenizer": str(home / "tokenizer"), "init_from": str(home / "clip")}
    args = recipe.CLIPArguments(**plain, codes=str(home / "codes"), decoded=5, model=folder)
    features = datasets.load_dataset(args.dataset, split="train").features
    rows = recipe.decoded_rows(args, features, np.random.default_rng(0))
    assert rows.features == features and len(set(rows["name"][:])) == 5
    codes = datasets.load_dataset(args.codes, split="train")
    codes = dict(zip(codes["name"][:], codes["codes"][:]))
    wanted = processor.decode_images(torch.tensor([codes[name] for name in rows["name"][:]]))
    assert [one.tobytes() for one in rows["image"][:]] == [one.tobytes() for one in wanted]
    recipe.main(args, training(home / "decoded", max_steps=1))
    state = json.loads((home / "decoded" / "checkpoint-1" / "trainer_state.json").read_text("utf-8"))
    assert state["epoch"] == pytest.approx(1 / math.ceil((len(codes) + 5) / 8))


def test_a_second_stage_begins_with_the_firsts_weights(home, clip):
    recipe, first = load_recipe("retrieval/train_clip.py"), clip.removeprefix("local-dir:")
    arguments = recipe.CLIPArguments(str(home / "drawn"), str(home / "tokenizer"), init_from=first)
    recipe.main(arguments, training(home / "second", max_steps=1, learning_rate=0.0))
    weights, second = (load_file(Path(folder, "open_clip_model.safetensors")) for folder in (first, home / "second"))
    torch.testing.assert_close(second["text_projection"], weights["text_projection"], rtol=0, atol=0)
    torch.testing.assert_close(second["visual.conv1.weight"], weights["visual.conv1.weight"], rtol=0, atol=0)


def test_a_clip_begins_with_a_configuration_or_with_weights():
    with pytest.raises(ValueError, match="expected model_config, init_from or both, got neither"):
        load_recipe("retrieval/train_clip.py").CLIPArguments("data", "tokenizer")


def test_the_contrastive_loss_is_clips(home):
    """Radford et al. 2021, figure 3, with the scale held at 100."""
    objective = CLIPObjective(load_recipe("retrieval/train_clip.py").open_clip.CLIP(**CLIP))
    objective.clip.logit_scale.data.fill_(9)
    tokens = clip_tokenizer(str(home / "tokenizer"), 12)(["a red circle", "blue square", "green"])
    outputs = objective(torch.rand(3, 3, 32, 32), tokens)
    image, text = outputs["image_features"], outputs["text_features"]
    logits, own = 100 * image @ text.T, torch.arange(3)
    torch.testing.assert_close(outputs["loss"], (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2)


def test_classes_of_pictures_are_taught_beside_the_texts(home):
    objective = CLIPObjective(load_recipe("retrieval/train_clip.py").open_clip.CLIP(**CLIP), [2, 3], 0.1)
    tokens, pixels = (
        clip_tokenizer(str(home / "tokenizer"), 12)(["a red circle", "blue square"]),
        torch.rand(2, 3, 32, 32),
    )
    kinds = torch.tensor([[0, 2], [1, -100]])
    outputs = objective.eval()(pixels, tokens, kinds)
    vectors, scale = outputs["image_features"], objective.clip.logit_scale.exp()
    loss = CLIPObjective(objective.clip)(pixels, tokens)["loss"]
    first, second = (scale * head(vectors) for head in objective.heads)
    told = partial(F.cross_entropy, label_smoothing=0.05)
    loss = 0.1 * loss + told(first, kinds[:, 0]) + told(second[:1], kinds[:1, 1])
    torch.testing.assert_close(outputs["loss"], loss)


def test_rows_know_the_classes_of_the_columns_that_are_told_apart():
    recipe = load_recipe("retrieval/train_clip.py")
    rows = {"captions": [["a"], ["b"]], "style": ["noto", "flat"], "image": [draw("red", "circle")] * 2}
    given = [recipe.CLIPArguments("", "", "new"), lambda image: torch.zeros(1), lambda texts: texts, None]
    assert recipe.prepare(rows, *given, {"style": ["flat", "noto"]})["kinds"].tolist() == [[1], [0]]
    assert "kinds" not in recipe.prepare(rows, *given)


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_batches_alike_hold_one_value_and_every_row_once(share):
    values = ["a", "b", "b", "c"] * 25
    order = alike_batches(values, 5, share, np.random.default_rng(0))
    assert sorted(order) == list(range(100))
    kinds = [len({values[row] for row in order[at : at + 5]}) for at in range(0, 100, 5)]
    alike = sum(kind == 1 for kind in kinds) / len(kinds)
    assert alike <= 0.3 if share == 0 else share - 0.2 <= alike


def test_batches_alike_see_no_row_of_two_passes():
    values = ["a", "b", "b", "c"] * 8
    order = alike_batches(values * 3, 5, 0.6, np.random.default_rng(0), passes=3)
    assert len(order) == len(set(order)) == 2 * 30 + 32  # less than a batch of two passes is left out
    passes = [{row // 32 for row in order[at : at + 5]} for at in range(0, len(order), 5)]
    assert [min(one) for one in passes] == [0] * 6 + [1] * 6 + [2] * 7 and all(len(one) == 1 for one in passes)


def test_near_rows_share_some_of_the_batches_alike():
    values, near = ["a", "b"] * 60, [f"{row // 2 % 12}" for row in range(120)]
    order = alike_batches(values, 10, 0.8, np.random.default_rng(0), near=near)
    assert sorted(order) == list(range(120))
    batches = [order[at : at + 10] for at in range(0, 120, 10)]
    alike = [batch for batch in batches if len({values[row] for row in batch}) == 1]
    hard = [batch for batch in alike if len({near[row] for row in batch}) <= 3]  # five rows have the same two values
    assert len(alike) >= 8 and 3 <= len(hard) <= 6
    everything = alike_batches(values, 10, 1.0, np.random.default_rng(0), near=near, near_share=1.0)
    assert all(len({near[row] for row in everything[at : at + 10]}) <= 3 for at in range(0, 120, 10))


def test_names_stand_in_place_of_a_share_of_the_captions():
    recipe = load_recipe("retrieval/train_clip.py")
    rows = {"captions": [["a red pig"]] * 40, "thing": ["pig"] * 40, "image": [draw("red", "circle")] * 40}
    args = recipe.CLIPArguments("", "", "new", name="thing", name_share=0.5)
    given = [args, lambda image: torch.zeros(1), lambda texts: texts]
    texts = recipe.prepare(rows, *given, np.random.default_rng(0))["input_ids"]
    assert set(texts) == {"pig", "a red pig"} and 10 < texts.count("pig") < 30
    assert recipe.prepare(rows, *given, None)["input_ids"] == ["a red pig"] * 40


def test_the_bank_holds_the_training_split(home, bank, clip):
    encoder, rows = CLIPEncoder(clip), datasets.load_dataset(str(home / "codes"), split="train")
    loaded = MemoryBank.load(bank, encoder.name, verify=True)
    assert loaded.ids.to_pylist() == rows["name"][:]
    assert loaded.documents["text"][:] == [captions[0] for captions in rows["captions"]]
    assert loaded.documents["codes"][:] == rows["codes"][:]
    np.testing.assert_allclose(
        loaded.vectors(np.arange(3)), encoder.encode(loaded.documents["text"][:3], rows["image"][:3]), atol=1e-5
    )


def write_tar(path, samples: list[dict[str, bytes]], start: int) -> None:
    """A shard of webdataset: the files of a sample lie next to each other and share a name."""
    with tarfile.open(path, "w") as tar:
        for number, sample in enumerate(samples, start):
            for suffix, data in sample.items():
                info = tarfile.TarInfo(f"{number:04d}.{suffix}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))


@pytest.mark.parametrize("streaming", [False, True])
def test_webdataset_and_streams_build_the_same_bank(home, bank, clip, streaming, tmp_path, capsys):
    rows = datasets.load_dataset(str(home / "codes"), split="train").cast_column("image", datasets.Image(decode=False))
    samples = [
        {
            "png": row["image"]["bytes"],
            "txt": row["captions"][0].encode(),
            "codes.json": json.dumps(row["codes"]).encode(),
        }
        for row in rows
    ]
    samples[9]["png"] = b"no picture"
    (tmp_path / "tars").mkdir()
    write_tar(tmp_path / "tars" / "train-000.tar", samples[:7], 0)
    write_tar(tmp_path / "tars" / "train-001.tar", samples[7:], 7)
    recipe = load_recipe("retrieval/build_bank.py")
    arguments = recipe.BankArguments(
        str(tmp_path / "tars"),
        str(tmp_path / "bank"),
        streaming=streaming,
        columns={"id": "__key__", "text": "txt", "image": "png", "codes": "codes.json"},
        clip_model=clip,
        shard_size=4,
    )
    recipe.main(arguments)
    output = capsys.readouterr()
    assert f"{len(samples) - 1} documents at" in output.out and "1 rows skipped" in output.out
    assert "encoding" in output.err and f"{len(samples)}.0" in output.err and " rows/s" in output.err
    loaded, whole = MemoryBank.load(tmp_path / "bank"), MemoryBank.load(bank)
    kept = [row for row in range(len(samples)) if row != 9]
    assert loaded.ids.to_pylist() == [f"{row:04d}" for row in kept]
    assert [one["id"] for one in loaded.skipped] == ["0009"]
    assert loaded.documents["text"][:] == whole.documents[kept]["text"]
    assert loaded.documents["codes"][:] == whole.documents[kept]["codes"]
    np.testing.assert_allclose(loaded.vectors(range(len(kept))), whole.vectors(kept), atol=1e-5)


def test_a_bank_names_the_columns_that_it_misses(home, clip):
    recipe = load_recipe("retrieval/build_bank.py")
    with pytest.raises(ValueError, match=r"expected the columns \['text'\], got"):
        recipe.main(recipe.BankArguments(str(home / "codes"), str(home / "none"), clip_model=clip))


def test_training_documents_stand_behind_what_is_retrieved(home, retrieved, processor, vocabulary):
    rows = datasets.load_dataset(retrieved, split="train")
    originals = datasets.load_dataset(str(home / "codes"), split="train")
    assert all(caption in wordings for [caption], wordings in zip(rows["captions"], originals["captions"]))
    assert {len(documents) for documents in rows["retrieved"]} == {3}
    transform = CM3Transform(processor.tokenizer, vocabulary, 10_000)
    _, documents = transform(rows.with_format("arrow")[:], np.random.default_rng(0))
    for ids, row in zip(documents.tolist(), rows):
        assert row["codes"] not in [one["codes"] for one in row["retrieved"]]
        prompt = processor.for_text_to_image(row["captions"][0], [row["retrieved"]], max_length=10_000)
        expected = prompt["input_ids"][0].tolist() + [code + vocabulary.text_size for code in row["codes"]]
        assert restore(ids, vocabulary) == [*expected, vocabulary.eos_id]


def test_some_rows_get_some_documents_and_the_others_keep_their_captions(home, bank, clip, tmp_path):
    recipe = load_recipe("retrieval/retrieve.py")
    common = {"bank": bank, "clip_model": clip, "id_column": "name"}
    recipe.main(recipe.RetrieveArguments(str(home / "codes"), str(tmp_path), share=0.6, min_count=1, count=2, **common))
    rows = datasets.load_dataset(str(tmp_path), split="train")
    assert {len(row["retrieved"]) for row in rows} == {0, 1, 2}
    assert all(len(row["captions"]) == (1 if row["retrieved"] else 2) for row in rows)
    assert not any(row["name"] in [one["id"] for one in row["retrieved"]] for row in rows)
    for wrong in ({"share": 1.5}, {"min_count": 4}):
        with pytest.raises(ValueError, match="a share from 0 to 1 and counts in order"):
            recipe.RetrieveArguments("codes", "out", **wrong)


def test_held_out_rows_get_what_their_prompts_would(home, bank, clip, tmp_path):
    recipe = load_recipe("retrieval/retrieve.py")
    arguments = {"bank": bank, "clip_model": clip, "split": "heldout_pairs", "training": False, "count": 2}
    recipe.main(recipe.RetrieveArguments(str(home / "codes"), str(tmp_path), **arguments))
    encoder = CLIPEncoder(clip, device="cpu")
    loaded = MemoryBank.load(bank, encoder.name)
    for row in datasets.load_dataset(str(tmp_path), split="heldout_pairs"):
        ranked = loaded.search(encoder.embed_texts(row["captions"][:1]).numpy(), len(loaded))[1][0].tolist()
        others = [one["id"] for one in loaded.fetch(ranked) if one["codes"] != row["codes"]]
        assert [one["id"] for one in row["retrieved"]] == others[:2]


def test_a_model_trains_with_retrieval_and_draws_with_it(home, bank, retrieved, clip, tmp_path, monkeypatch):
    monkeypatch.setattr("cm3leon_hf.training.throughput.matmul_tflops", lambda dtype, device: 1.0)
    small_config(initializer_range=0.02, zero_init="residual").save_pretrained(home / "config")
    recipe = load_recipe("pretrain/train.py")
    arguments = recipe.PretrainArguments(
        dataset=retrieved,
        model_config=str(home / "config"),
        tokenizer=str(home / "tokenizer"),
        vqgan=str(home / "vqgan"),
        eval_split="",
    )
    objective = recipe.ObjectiveArguments()
    recipe.main(arguments, objective, training(home / "model", max_steps=4, learning_rate=5e-3))
    assert AutoModelForCausalLM.from_pretrained(home / "model").dtype == torch.bfloat16

    common = ["--model", str(home / "model"), "--num-images", "2", "--out", str(tmp_path / "out")]
    common += ["--bank", bank, "--clip-model", clip, "--retrieve", "1", "--show-retrieved"]
    result = CliRunner().invoke(app, ["generate", "a red circle", "a blue square", *common])
    assert result.exit_code == 0, result.output
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == ["00.png", "01.png", "02.png", "03.png", "grid.png"]
    assert Image.open(tmp_path / "out" / "grid.png").width == 3 * 168 + 8  # what was retrieved, and two drawn

    samples = load_recipe("pretrain/samples.py")
    places = {"model": str(home / "model"), "bank": bank, "clip_model": clip}
    samples.main(samples.SampleArguments(str(home / "drawn"), str(tmp_path / "ten.png"), count=3, retrieve=1, **places))
    width, height = Image.open(tmp_path / "ten.png").size
    # two prompts a row: the artist's, what was retrieved, drawn without and with it
    assert width == 2 * 4 * 168 + 8 and height > 2 * 160
