"""What is missing of the extra `eval` is named; streamed statistics stay small; the VQGAN's recipe."""

import importlib
import json
import sys
import tracemalloc

import numpy as np
import pytest
from conftest import COLOURS, SHAPES, draw, load_recipe
from datasets import Dataset

from cm3leon_hf.evaluation.features import load_network
from cm3leon_hf.evaluation.fid import feature_statistics
from cm3leon_hf.evaluation.reconstruction import reconstruction_scores

PICTURES = [draw(colour, shape, 24) for colour in COLOURS for shape in SHAPES]


@pytest.mark.parametrize(
    ("missing", "module"), [("pycocoevalcap", "captions"), ("matplotlib", "plots"), ("accelerate", "processes")]
)
def test_a_missing_library_is_named_on_import(missing, module, monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] == missing]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, missing, None)
    monkeypatch.delitem(sys.modules, f"cm3leon_hf.evaluation.{module}", raising=False)
    with pytest.raises(ImportError, match=rf"need.? {missing}; pip install 'cm3leon_hf\[eval\]'"):
        importlib.import_module(f"cm3leon_hf.evaluation.{module}")


@pytest.mark.parametrize(
    ("missing", "call"),
    [
        ("pytorch_fid.inception", lambda: load_network("inception")),
        ("timm", lambda: load_network("timm:test_vit")),
        ("skimage.metrics", lambda: reconstruction_scores(PICTURES, PICTURES)),
    ],
)
def test_a_missing_library_is_named_on_use(missing, call, monkeypatch):
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(ImportError, match=r"pip install 'cm3leon_hf\[eval\]'"):
        call()


def peak(pictures: int) -> int:
    rng = np.random.default_rng(0)
    tracemalloc.start()
    feature_statistics(rng.random((32, 64)) for _ in range(pictures // 32))
    return (tracemalloc.get_traced_memory()[1], tracemalloc.stop())[0]


def test_memory_does_not_grow_with_the_pictures():
    assert peak(3200) < 1.1 * peak(320)


@pytest.mark.filterwarnings("ignore:.*unreliable")
def test_the_vqgan_recipe_measures(folder, processor, small_clip, tmp_path, capsys):
    (tmp_path / "data").mkdir()
    Dataset.from_dict({"image": PICTURES}).to_parquet(tmp_path / "data" / "train.parquet")
    recipe = load_recipe("evaluate/vqgan.py")
    options = {"split": "train", "model": folder, "features": f"open_clip:{small_clip}", "resamples": 10}
    recipe.main(recipe.VQGANArguments(str(tmp_path / "data"), batch_size=3, **options))
    (row,) = json.loads(capsys.readouterr().out.strip().splitlines()[-1]).values()
    seen = [picture.resize((16, 16), 3) for picture in PICTURES]
    expected = reconstruction_scores(seen, processor.decode_images(processor.encode_images(PICTURES)))
    assert set(row) == {"psnr", "ssim", "rfid"}
    assert row["psnr"]["value"] == pytest.approx(expected.psnr.mean(), abs=0.05)
    assert row["ssim"]["value"] == pytest.approx(expected.ssim.mean(), abs=0.01)
