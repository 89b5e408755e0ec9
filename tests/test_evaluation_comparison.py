"""`cm3leon compare`: differences, their intervals and verdicts, and pictures side by side."""

import numpy as np
import pytest
from conftest import draw
from PIL import Image
from typer.testing import CliRunner

from cm3leon_hf.cli import app
from cm3leon_hf.evaluation.comparison import compare_runs, side_by_side
from cm3leon_hf.evaluation.intervals import measure_mean
from cm3leon_hf.evaluation.results import write_results
from cm3leon_hf.evaluation.runs import Run

CARD = {"model_name": "m", "task_type": "text-to-image", "dataset_type": "d", "dataset_name": "D"}
SCORES = np.random.default_rng(0).normal(1, 0.5, 40)


def make_run(folder, prompts, colour, resamples=50, settings=("cfg",), **values):
    run = Run(folder)
    run.start({"prompts": prompts}, {name: {} for name in settings})
    for name in settings:
        (folder / "drawn" / name).mkdir(parents=True)
        for row in range(len(prompts)):
            draw(colour, "circle", 32 + row).save(folder / "drawn" / name / f"{row:06d}.png")
    measured = {metric: measure_mean(scores, resamples) for metric, scores in values.items()}
    write_results(folder, {name: measured for name in (*settings, "real")}, {}, CARD)
    return folder


@pytest.fixture
def runs(tmp_path):
    values = {"clip_score": SCORES, "fd": SCORES, "cider": SCORES}
    first = make_run(tmp_path / "first", ["one", "two", "three"], "red", **values)
    values = {"clip_score": SCORES + 0.1, "fd": SCORES + 0.1, "cider": SCORES[::-1], "recall": SCORES}
    return first, make_run(tmp_path / "second", ["one", "two", "three"], "blue", settings=("cfg", "cd-k"), **values)


def test_differences_are_paired_and_judged(runs):
    found = {one.metric: one for one in compare_runs(*runs) if one.setting == "cfg"}
    assert set(found) == {"clip_score", "fd", "cider"}, "what both measured"
    assert found["clip_score"].change.value == pytest.approx(0.1)
    assert found["clip_score"].change.interval() == pytest.approx((0.1, 0.1))
    assert [found[metric].verdict for metric in ("clip_score", "fd", "cider")] == ["better", "worse", ""]
    low, high = found["cider"].change.interval()
    assert low < 0 < high


def test_the_command_prints_differences_and_shows_pictures(runs, tmp_path):
    arguments = ["compare", *map(str, runs), "--pictures", "2", "--out", str(tmp_path / "both.png")]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert "| cfg | clip_score |" in result.output and "| better |" in result.output
    assert "different prompts" not in result.output
    both = Image.open(tmp_path / "both.png").convert("RGB")
    middles = [both.getpixel((8 + 168 * column + 80, both.height - 90)) for column in range(2)]
    assert middles[0][0] > 200 > middles[0][2] and middles[1][2] > 200 > middles[1][0], "red, then blue"


def test_only_shared_prompts_are_shown(runs, tmp_path):
    other = make_run(tmp_path / "other", ["three", "four"], "green", clip_score=SCORES)
    pictures, labels, columns = side_by_side(runs[0], other, 9)
    assert columns == 2 and labels == ["three: cfg, first", "cfg, second"]
    assert [picture.width for picture in pictures] == [34, 32]
    result = CliRunner().invoke(app, ["compare", str(runs[0]), str(other), "--out", str(tmp_path / "o.png")])
    assert result.exit_code == 0 and "different prompts" in result.output


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"resamples": 7}, "as many resamples, got 7 and 50"),
        ({"settings": ("elsewhere",)}, "settings that both runs measured"),
        (None, "expected results in"),
    ],
)
def test_what_does_not_compare_is_said_in_one_line(runs, tmp_path, change, message):
    other = tmp_path / "other"
    if change is not None:
        make_run(
            other, ["one"], "green", **change, **({"clip_score": SCORES} if "resamples" in change else {"x": SCORES})
        )
    result = CliRunner().invoke(app, ["compare", str(runs[0]), str(other)])
    assert result.exit_code == 1 and message in result.stderr and "Traceback" not in result.stderr
