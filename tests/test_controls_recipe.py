"""The recipe that adds control signals to a data set, and the extra that it needs."""

import importlib
import io
import sys

import datasets
import numpy as np
import pytest
from conftest import COLOURS, SHAPES, draw, load_recipe
from PIL import Image
from trl import TrlParser

from cm3leon_hf.data.controls import Canny, Scribble

controls = load_recipe("data/controls.py")
PICTURES = [draw(colour, shape, 48) for colour in COLOURS for shape in SHAPES]
COLUMNS = ["image", "caption", "canny", "scribble"]


def png(picture: Image.Image) -> bytes:
    file = io.BytesIO()
    picture.save(file, "PNG")
    return file.getvalue()


@pytest.fixture
def dataset(tmp_path) -> str:
    cells = [{"bytes": png(picture), "path": None} for picture in PICTURES]
    cells[3]["bytes"] = b"broken"
    features = datasets.Features({"image": datasets.Image(), "caption": datasets.Value("string")})
    rows = datasets.Dataset.from_dict({"image": cells, "caption": [*"abcdefgh"]}, features=features)
    rows.to_parquet(tmp_path / "in" / "train.parquet")
    return str(tmp_path / "in")


def parsed(*words: str):
    (args,) = TrlParser(controls.ControlsArguments).parse_args_and_config([*map(str, words)])
    return args


def test_processes_share_the_files_and_go_on(dataset, tmp_path, capsys):
    out = tmp_path / "out"
    words = ["--dataset", dataset, "--output_dir", out, "--controls", "canny", "scribble", "--edges", "canny"]
    words += ["--options", "canny.low=20", "canny.high=60", "scribble.thickness=0.1", "--num_shards", 3]

    def run(rank: int) -> list[str]:
        controls.main(parsed(*words, "--rank", rank, "--world_size", 2, "--batch_size", 2))
        return sorted(path.name[:11] for path in (out / "data").iterdir())

    assert run(1) == ["train-00001"]
    assert "1 broken pictures skipped so far" in capsys.readouterr().out
    (out / "data" / "train-00000-of-00003.part").write_bytes(b"torn")  # as a process that dies leaves it
    assert run(0) == ["train-00000", "train-00001", "train-00002"]
    run(1)
    assert "is there; remove it to draw its controls again" in capsys.readouterr().out

    written = datasets.load_dataset(str(out), split="train")
    assert written.column_names == COLUMNS and written["caption"][:] == [*"abcefgh"]
    whole = PICTURES[:3] + PICTURES[4:]
    canny = Canny(low=20, high=60)
    for column, control in (("canny", canny), ("scribble", Scribble(edges=canny, thickness=0.1))):
        assert [picture.tobytes() for picture in written[column]] == [each.tobytes() for each in control.draw(whole)]
    stored = written.cast_column("image", datasets.Image(decode=False))["image"]
    assert [cell["bytes"] for cell in stored] == [png(picture) for picture in whole]  # as they were, not written anew


@pytest.mark.parametrize("streaming", [False, True])
def test_the_contact_sheet_shows_pictures_beside_their_controls(dataset, tmp_path, streaming):
    words = ["--dataset", dataset, "--controls", "canny", "--show", tmp_path / "sheet.png", "--show_rows", 3]
    controls.main(parsed(*words, "--size", 160, *(["--streaming", "true"] if streaming else [])))
    sheet = np.asarray(Image.open(tmp_path / "sheet.png"))
    rows, columns = sheet.shape[0] // (160 + 32), sheet.shape[1] // (160 + 8)
    assert (rows, columns) == (3, 2)
    picture = Image.fromarray(sheet[24 : 24 + 160, 8 : 8 + 160])
    drawn = sheet[24 : 24 + 160, 176 : 176 + 160, 0]
    assert np.asarray(picture)[80, 80].tolist() == [255, 0, 0]  # the red circle
    assert (drawn == np.asarray(Canny().draw([picture])[0])).all()
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == ["in"]  # nothing else is written


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--controls", "cany"], r"controls among \['canny', .*'ocr'\], got 'cany'"),
        (["--controls", "canny"], "expected output_dir or show, got neither"),
        (["--controls", "scribble", "--show", "a.png", "--edges", "sobel"], r"edges among .* got 'sobel'"),
        (["--controls", "canny", "--show", "a.png", "--rank", "2", "--world_size", "2"], "a rank from 0 to 1, got 2"),
    ],
)
def test_arguments_that_cannot_be(words, message):
    with pytest.raises(ValueError, match=message):
        parsed("--dataset", "anything", *words)


@pytest.mark.parametrize("option", ["canny.lo=3", "cany.low=3", "canny.low", "low=3", "canny.skipped=3"])
def test_options_that_no_control_has(option):
    with pytest.raises(ValueError, match=rf"expected NAME.OPTION=VALUE, .* got '{option}'"):
        controls.read_options([option])


@pytest.mark.parametrize("missing", ["cv2", "rapidocr", "skimage", "onnxruntime"])
def test_a_missing_library_is_named_on_import(missing, monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] == missing]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, missing, None)
    monkeypatch.delitem(sys.modules, "cm3leon_hf.data.controls_extra")
    with pytest.raises(ImportError, match=rf"need {missing}.*; pip install 'cm3leon_hf\[controls\]'"):
        importlib.import_module("cm3leon_hf.data.controls_extra")
