"""The judge of drawn pictures, and how far control pictures agree with those that were given."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import COLOURS, SHAPES, draw

from cm3leon_hf.evaluation.agreement import edge_f1, mask_iou
from cm3leon_hf.evaluation.judge import UNKNOWN, Judge, JudgeConfig, Views, ink, to_pixels, train_judge

CONFIG = JudgeConfig(size=32, views=1200, batch_size=24, lasting=["shape"])
MOVED = replace(CONFIG, recolouring=0.0, lasting=["shape", "colour"])  # whose changed views show colours too
PICTURES = [draw(colour, shape, 32) for colour in COLOURS for shape in SHAPES]
SHOWN = {
    "shape": [*SHAPES] * len(COLOURS),
    "colour": [colour for colour in COLOURS for _ in SHAPES],
    "size": ["small"] * len(PICTURES),
}


@pytest.fixture(scope="module")
def judge():
    return train_judge(PICTURES, SHOWN, MOVED)


def moved(picture, pixels: int):
    return picture.rotate(0, translate=(pixels, -pixels), fillcolor="white")


def test_a_judge_reads_pictures_that_it_never_saw(judge):
    found, features = judge.read([moved(picture, 1) for picture in PICTURES])
    assert found == {"shape": SHOWN["shape"], "colour": SHOWN["colour"]}  # there is but one size
    np.testing.assert_allclose(np.linalg.norm(features, axis=1), 1, rtol=1e-5)


def test_a_saved_judge_reads_the_same(judge, tmp_path):
    judge.save(tmp_path / "judge.safetensors")
    again = Judge.load(tmp_path / "judge.safetensors")
    assert again.settings == MOVED and again.read(PICTURES)[0] == judge.read(PICTURES)[0]
    np.testing.assert_allclose(again.read(PICTURES)[1], judge.read(PICTURES)[1], atol=1e-6)
    whole = (tmp_path / "judge.safetensors").read_bytes()
    (tmp_path / "judge.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="remove it"):
        Judge.load(tmp_path / "judge.safetensors")


def views(config: JudgeConfig) -> dict[str, torch.Tensor]:
    labels = torch.arange(2 * len(PICTURES)).reshape(-1, 2)
    generator = torch.Generator().manual_seed(0)
    return Views(ink(PICTURES, 32), labels, torch.tensor([True, False]), config, generator)([*range(len(PICTURES))])


def test_views_that_change_nothing_are_the_pictures():
    found = views(replace(CONFIG, changed=0))
    torch.testing.assert_close(found["pixels"], to_pixels(ink(PICTURES, 32)), atol=1e-5, rtol=0)
    assert found["labels"].flatten().tolist() == [*range(2 * len(PICTURES))]


def test_recoloured_views_keep_shapes_and_teach_no_colours():
    found = views(replace(CONFIG, scale=0, shift=0, turn=0, changed=1))
    plain = to_pixels(ink(PICTURES, 32))
    white = plain.amax(dim=1) == 0
    assert (found["pixels"].amax(dim=1)[white] == 0).all() and not torch.equal(found["pixels"], plain)
    assert (found["labels"][:, 1] == UNKNOWN).all() and (found["labels"][:, 0] != UNKNOWN).all()


def test_views_that_teach_all_kinds_are_the_pictures_themselves():
    """What tells two kinds apart may be a margin, which a moved view hides."""
    found, plain = views(CONFIG), to_pixels(ink(PICTURES, 32))
    taught = found["labels"][:, 1] != UNKNOWN
    assert 0 < taught.sum() < len(PICTURES)
    torch.testing.assert_close(found["pixels"][taught], plain[taught], rtol=0, atol=0)
    assert (found["pixels"][~taught] != plain[~taught]).flatten(1).any(dim=1).all()


def test_errors_of_judges_name_the_remedy():
    with pytest.raises(ValueError, match="labels of shape"):
        train_judge(PICTURES, {"shape": ["circle"]}, CONFIG)
    with pytest.raises(ValueError, match="two classes"):
        train_judge(PICTURES, {"size": SHOWN["size"]}, CONFIG)


def line(column: int) -> np.ndarray:
    picture = np.zeros((100, 100), np.uint8)
    picture[:, column] = 255
    return picture


def test_edges_agree_up_to_two_hundredths_of_the_side():
    assert edge_f1(line(50), line(50)) == edge_f1(line(52), line(50)) == 1
    assert edge_f1(line(53), line(50)) == edge_f1(np.zeros_like(line(0)), line(50)) == 0
    assert edge_f1(line(50) | line(20), line(50)) == pytest.approx(2 / 3)  # half of what is drawn was asked for
    assert edge_f1(np.zeros_like(line(0)), np.zeros_like(line(0))) == 1
    with pytest.raises(ValueError, match="one size"):
        edge_f1(line(50), line(50)[:50])


def test_masks_agree_as_far_as_they_overlap():
    left, upper = np.zeros((2, 10, 10), np.uint8)
    left[:, :5] = upper[:5] = 255
    assert mask_iou(left, upper) == pytest.approx(1 / 3) and mask_iou(left, left) == 1
    assert mask_iou(left, 255 - left) == 0 and mask_iou(left * 0, left * 0) == 1
