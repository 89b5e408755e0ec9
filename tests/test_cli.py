"""The command line, on a tiny model."""

import subprocess
import sys

import numpy as np
import pytest
from conftest import GRID_SIZE, draw
from PIL import Image
from typer.testing import CliRunner

from cm3leon_hf import CM3LeonForCausalLM
from cm3leon_hf.cli import app
from cm3leon_hf.cli_loading import load, load_augmenter, load_clip
from cm3leon_hf.evaluation.reranking import EditScorer, best_texts_of


def test_it_draws_the_same_pictures_for_the_same_seed(folder, tmp_path):
    arguments = [
        "generate",
        "a red circle",
        "a blue square",
        "--model",
        folder,
        "--num-images",
        "2",
        "--seed",
        "7",
        "--out",
    ]
    outputs = []
    for name in ("first", "second"):
        result = CliRunner().invoke(app, [*arguments, str(tmp_path / name)])
        assert result.exit_code == 0, result.output
        outputs.append([Image.open(tmp_path / name / f"{index:02d}.png").tobytes() for index in range(4)])
    assert outputs[0] == outputs[1]
    assert len(set(outputs[0])) == 4
    assert f"{tmp_path / 'second' / 'grid.png'}" in result.output.replace("\n", "")
    assert Image.open(tmp_path / "first" / "grid.png").width > 2 * 160


def test_it_draws_without_any_extra(folder, tmp_path):
    """Runs in an interpreter that finds none of the extras' packages."""
    extras = [
        "accelerate",
        "bitsandbytes",
        "datasets",
        "evaluate",
        "faiss",
        "open_clip",
        "peft",
        "timm",
        "torchao",
        "trl",
    ]
    script = f"import sys; sys.modules |= dict.fromkeys({extras}); from cm3leon_hf.cli import app; app(sys.argv[1:])"
    arguments = ["generate", "a red circle", "--model", folder, "--num-images", "1", "--out", str(tmp_path / "out")]
    done = subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "00.png").is_file()


def test_it_keeps_the_best_candidates(folder, tmp_path, small_clip):
    arguments = ["generate", "a red circle", "--candidates", "5", "--strategy", "both", "--num-images", "2"]
    clip = ["--clip-model", small_clip]
    result = CliRunner().invoke(app, [*arguments, "--model", folder, *clip, "--out", str(tmp_path / "out")])
    assert result.exit_code == 0, result.output
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["00.png", "01.png", "grid.png"]


def test_it_describes(folder, tmp_path):
    Image.new("RGBA", (300, 200), (200, 30, 30, 128)).save(tmp_path / "red.png")
    result = CliRunner().invoke(
        app, ["describe", str(tmp_path / "red.png"), "--model", folder, "--max-new-tokens", "8"]
    )
    assert result.exit_code == 0 and result.output.strip()


def test_it_describes_behind_instructions_and_documents(folder, tmp_path, small_clip, small_bank, monkeypatch):
    asked = []
    monkeypatch.setattr(
        CM3LeonForCausalLM, "generate", lambda self, input_ids, **_: asked.append(input_ids.shape[1]) or input_ids
    )
    draw("red", "circle").save(tmp_path / "red.png")
    plain = ["describe", str(tmp_path / "red.png"), "--model", folder, "--max-new-tokens", "8"]
    retrieve = ["--retrieve", "1", "--bank", small_bank, "--clip-model", small_clip]
    for options in ([], ["--text", "Describe the given picture."], retrieve):
        result = CliRunner().invoke(app, [*plain, *options])
        assert result.exit_code == 0, result.output
    alone, instructed, behind = asked
    assert alone < instructed < alone + GRID_SIZE**2 < behind


def test_it_keeps_the_best_description(folder, tmp_path, small_clip):
    picture = draw("red", "circle")
    picture.save(tmp_path / "red.png")
    arguments = ["describe", str(tmp_path / "red.png"), "--model", folder, "--max-new-tokens", "8"]
    arguments += ["--candidates", "4", "--clip-model", small_clip]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    model, processor = load(folder, 3)
    inputs, clip = processor.for_image_to_text(picture), load_clip(small_clip, None)
    (best,) = best_texts_of(inputs, [picture], model, processor, clip, 4, max_new_tokens=8)
    assert best and result.output.strip() == best
    refused = CliRunner().invoke(app, [*arguments, "--sample"])
    assert refused.exit_code == 1 and "--sample or --candidates" in refused.output


def test_it_keeps_the_best_edits(folder, tmp_path, small_clip):
    picture, clip = draw("red", "circle"), load_clip(small_clip, None)
    picture.save(tmp_path / "red.png")
    plain = ["edit", str(tmp_path / "red.png"), "blue", "--seed", "3", "--model", folder, "--clip-model", small_clip]

    def drawn(*options):
        out = tmp_path / "-".join(options)
        result = CliRunner().invoke(app, [*plain, *options, "--out", str(out)])
        assert result.exit_code == 0, result.output
        return [Image.open(path).convert("RGB") for path in sorted(out.glob("[0-9]*.png"))]

    every, kept = drawn("--num-images", "5"), drawn("--candidates", "5", "--num-images", "2")
    order = np.argsort(EditScorer(picture, clip, clip)(every, ["blue"] * 5))[::-1]
    best = [every[at] for at in order[:2]]
    assert [one.tobytes() for one in kept] == [one.tobytes() for one in best]


@pytest.mark.parametrize("retrieve", [0, 1])
def test_it_edits(retrieve, folder, tmp_path, small_clip, small_bank):
    """The command's pictures are those of `generate` behind the processor's prompt."""
    picture = draw("red", "circle")
    picture.save(tmp_path / "red.png")
    out = tmp_path / "out"
    arguments = ["edit", str(tmp_path / "red.png"), "blue", "--num-images", "2", "--seed", "3"]
    arguments += ["--retrieve", str(retrieve), "--bank", small_bank, "--clip-model", small_clip]
    result = CliRunner().invoke(app, [*arguments, "--model", folder, "--out", str(out)])
    assert result.exit_code == 0, result.output
    assert sorted(path.name for path in out.iterdir()) == ["00.png", "01.png", "grid.png"]
    augmenter = load_augmenter(small_bank, load_clip(small_clip, None))
    model, processor = load(folder, 3)
    inputs = processor.for_editing(picture, "blue")
    if retrieve:
        found = augmenter.for_pictures([picture], by_text=True)
        shown = processor.with_retrieved(inputs, found, model.config.max_position_embeddings - GRID_SIZE**2)
        assert shown["input_ids"].shape[1] > inputs["input_ids"].shape[1] + GRID_SIZE**2
        inputs = shown
    inputs = inputs.to(model.device)
    scales = {"guidance_scale": 2.0, "image_guidance_scale": 1.5}
    sampling = {"do_sample": True, "top_p": 0.9, "top_k": 0, "temperature": 1.0, "num_return_sequences": 2}
    ids = model.generate(**inputs, generation_mode="image", **scales, **sampling)
    wanted = processor.post_process_multimodal_output(ids, generation_mode="image")
    assert [Image.open(out / name).tobytes() for name in ("00.png", "01.png")] == [one.tobytes() for one in wanted]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["generate", " "], "expected prompts that are not empty"),
        (["generate", "apple", "--model", "no/such/folder"], "error: "),
        (["describe", "no-such-file.png"], "which is no file"),
        (["edit", "no-such-file.png", "make it blue"], "which is no file"),
        (["generate", "very " * 600], "expected a prompt of at most"),
        (["generate", "apple", "--num-images", "4", "--candidates", "2"], "at least 4 candidates"),
        (["edit", "apple.png", "make it blue", "--candidates", "2"], "at least 4 candidates"),
        (["generate", "apple", "--candidates", "4", "--clip-model", "nobody"], "a CLIP to rank candidates"),
        (["generate", "apple", "--strategy", "cd-k", "--contrastive-alpha", "2"], "contrastive_alpha in (0, 1]"),
    ],
)
def test_it_says_what_is_wrong_in_one_line(arguments, message, folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    model = [] if "--model" in arguments else ["--model", folder]
    result = CliRunner().invoke(app, [*arguments, *model])
    assert result.exit_code == 1
    assert message in result.stderr and "Traceback" not in result.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("command", [[], ["generate"], ["describe"], ["edit"], ["compare"], ["convert"], ["serve"]])
def test_help_teaches(command):
    result = CliRunner().invoke(app, [*command, "--help"])
    assert result.exit_code == 0 and "cm3leon" in result.output.lower()
