"""Tokenizing pictures in shards by several processes, and training the text tokenizer on a stream."""

import io
import tarfile
from pathlib import Path

import datasets
import pytest
import tokenize_images
import train_tokenizer
from conftest import COLOURS, SHAPES, TEXT_SIZE, draw
from huggingface_hub import DatasetCard
from PIL import Image

from cm3leon_hf.data.tokenization import ImageTokenizer
from cm3leon_hf.images import default_image_processor
from cm3leon_hf.vocabulary import Vocabulary


def png(colour: str, shape: str) -> bytes:
    file = io.BytesIO()
    draw(colour, shape).save(file, "PNG")
    return file.getvalue()


PICTURES = [png(colour, shape) for colour in COLOURS for shape in SHAPES]


def test_processes_share_the_files_and_go_on(saved_vqgan, vqgan, tmp_path, capsys):
    rows = [{"image": {"bytes": picture, "path": None}, "captions": [str(i)]} for i, picture in enumerate(PICTURES)]
    rows[3]["image"]["bytes"] = b"broken"
    features = datasets.Features({"image": datasets.Image(), "captions": datasets.List(datasets.Value("string"))})
    datasets.Dataset.from_list(rows, features=features).to_parquet(tmp_path / "in" / "train.parquet")
    arguments = {"dataset": str(tmp_path / "in"), "vqgan": saved_vqgan, "output_dir": str(tmp_path / "out")}

    def run(rank: int) -> list[str]:
        tokenize_images.main(
            tokenize_images.CodesArguments(**arguments, num_shards=3, rank=rank, world_size=2, batch_size=2)
        )
        return sorted(path.name[:11] for path in Path(arguments["output_dir"], "data").iterdir())

    assert run(1) == ["train-00001"]
    assert "2 pictures, 1 skipped" in capsys.readouterr().out
    (tmp_path / "out" / "data" / "train-00000-of-00003.part").write_bytes(b"torn")  # as a process that dies leaves it
    assert run(0) == ["train-00000", "train-00001", "train-00002"]
    run(1)
    assert "is there; remove it to encode again" in capsys.readouterr().out

    written = datasets.load_dataset(arguments["output_dir"], split="train")
    assert [row["captions"] for row in written] == [[str(i)] for i in range(8) if i != 3]
    processor = default_image_processor(vqgan.config)
    pixels = processor([Image.open(io.BytesIO(picture)) for picture in PICTURES], return_tensors="pt")["pixel_values"]
    expected = vqgan.encode(pixels).tolist()
    assert [row["codes"] for row in written] == expected[:3] + expected[4:]


def test_moved_copies_stand_beside_their_pictures_in_the_training_split_only(saved_vqgan, vqgan, tmp_path):
    rows = [{"image": {"bytes": picture, "path": None}, "captions": [str(i)]} for i, picture in enumerate(PICTURES)]
    features = datasets.Features({"image": datasets.Image(), "captions": datasets.List(datasets.Value("string"))})
    for split in ("train", "test"):
        datasets.Dataset.from_list(rows, features=features).to_parquet(tmp_path / "in" / f"{split}.parquet")
    arguments = {"dataset": str(tmp_path / "in"), "vqgan": saved_vqgan, "output_dir": str(tmp_path / "out")}
    tokenize_images.main(tokenize_images.CodesArguments(**arguments, moved_copies=2, keep_images=True))
    written = datasets.load_dataset(arguments["output_dir"])
    train, test = written["train"], written["test"]
    assert train["captions"][:] == [[str(i)] for _ in range(3) for i in range(8)]
    assert test["captions"][:] == train["captions"][:8] and test["codes"][:] == train["codes"][:8]
    assert [image.tobytes() for image in train["image"][8:16]] == [image.tobytes() for image in test["image"][:]]
    assert sum(train["codes"][i] != train["codes"][i % 8] for i in range(8, 24)) > 8
    tokenizer = ImageTokenizer(vqgan, default_image_processor(vqgan.config), moved_copies=1)
    assert len(tokenizer({"image": [{"bytes": b"broken", "path": None}]})["codes"]) == 0


def test_tars_become_codes(saved_vqgan, tmp_path):
    for name, pictures in (("00", PICTURES[:3]), ("01", PICTURES[3:])):
        with tarfile.open(tmp_path / f"{name}.tar", "w") as tar:
            for index, picture in enumerate(pictures):
                for kind, content in (("png", picture), ("txt", f"{name} {index}".encode())):
                    info = tarfile.TarInfo(f"{index:03d}.{kind}")
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
    out = tmp_path / "out"
    arguments = {"files": str(tmp_path / "*.tar"), "streaming": True, "image_column": "png", "output_dir": str(out)}
    tokenize_images.main(tokenize_images.CodesArguments("webdataset", saved_vqgan, **arguments))
    written = datasets.load_dataset(str(out), split="train")
    assert len(list((out / "data").iterdir())) == 2  # a file for each tar
    assert written["txt"][:] == [f"00 {i}" for i in range(3)] + [f"01 {i}" for i in range(5)]
    assert all(len(codes) == 16 for codes in written["codes"])


def test_codes_can_be_published(saved_vqgan, tmp_path):
    rows = [{"captions": ["a"], "image": {"bytes": picture, "path": None}} for picture in PICTURES[:2]]
    features = datasets.Features({"captions": datasets.List(datasets.Value("string")), "image": datasets.Image()})
    datasets.Dataset.from_list(rows, features=features).to_parquet(tmp_path / "in" / "train.parquet")
    arguments = {"dataset": str(tmp_path / "in"), "vqgan": saved_vqgan, "output_dir": str(tmp_path / "out")}
    card = {"license": ["mit", "cc-by-4.0"], "pretty_name": "Two shapes"}
    tokenize_images.main(tokenize_images.CodesArguments(**arguments, keep_images=True, card=card))
    written = datasets.load_dataset(str(tmp_path / "out"), split="train")
    assert written.features == features | {"codes": datasets.List(datasets.Value("int32"))}
    found = DatasetCard.load(tmp_path / "out" / "README.md")
    assert found.data.license == ["mit", "cc-by-4.0"] and "# Two shapes" in found.text
    assert "4×4 codes" in found.text and all(f"| `{name}` |" in found.text for name in written.column_names)
    with pytest.raises(ValueError, match="license in card"):
        tokenize_images.CodesArguments(**arguments, card={"language": "en"})


def test_arguments_that_cannot_be(saved_vqgan, tmp_path):
    with pytest.raises(ValueError, match="rank from 0 to 1, got 2"):
        tokenize_images.CodesArguments("a", "b", "c", rank=2, world_size=2)
    datasets.Dataset.from_list([{"photo": "a"}]).to_parquet(tmp_path / "in" / "train.parquet")
    arguments = tokenize_images.CodesArguments(str(tmp_path / "in"), saved_vqgan, str(tmp_path / "out"))
    with pytest.raises(ValueError, match=r"expected the column 'image' .* got \['photo'\]"):
        tokenize_images.main(arguments)


def test_a_tokenizer_from_a_stream(tmp_path, capsys):
    texts = ["a red circle", None, "", "blue squares"]
    datasets.Dataset.from_dict({"txt": texts * 5}).to_parquet(tmp_path / "in.parquet")
    arguments = {"files": str(tmp_path / "*.parquet"), "streaming": True, "text_column": "txt", "max_rows": 8}
    arguments = train_tokenizer.TokenizerArguments(
        "parquet", str(tmp_path / "out"), text_vocab_size=TEXT_SIZE, num_masks=3, **arguments
    )
    train_tokenizer.main(arguments)
    assert "4 rows without text skipped" in capsys.readouterr().out
    tokenizer = train_tokenizer.PreTrainedTokenizerFast.from_pretrained(tmp_path / "out")
    special = Vocabulary(text_size=TEXT_SIZE, num_masks=3).special_tokens
    assert tokenizer.convert_tokens_to_ids(special) == list(range(len(special)))
    assert special[-4:] == ["<mask:1>", "<mask:2>", "<infill:1>", "<infill:2>"]
    assert tokenizer.decode(tokenizer("blue circle")["input_ids"]) == "blue circle"
    arguments.text_column = "text"
    with pytest.raises(ValueError, match=r"expected the column 'text', got \['txt'\]"):
        train_tokenizer.main(arguments)
