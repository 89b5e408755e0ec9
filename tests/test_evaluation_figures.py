"""The recipe of the paper's curves: the points are those of the runs, and every figure is written."""

import json
import math

import pytest
from conftest import REPOSITORY, load_recipe
from PIL import Image
from transformers import TrainerState
from trl import TrlParser

from cm3leon_hf.evaluation.intervals import measure_mean
from cm3leon_hf.evaluation.results import write_results
from cm3leon_hf.evaluation.runs import Run

RECIPE = load_recipe("evaluate/figures.py")
CARD = {"model_name": "m", "task_type": "text-to-image", "dataset_type": "d", "dataset_name": "D"}
PLAIN = {"strategy": None, "documents": 0}
SETTINGS = {
    "cfg-1": {"arguments": {"guidance_scale": 1.0}, **PLAIN},
    "cfg-3": {"arguments": {"guidance_scale": 3.0}, **PLAIN},
    "cd-k": {"arguments": {"contrastive_k": 8}, **PLAIN},
    "both": {"arguments": {"guidance_scale": 3.0}, **PLAIN, "strategy": "both"},
    "documents": {"arguments": {"guidance_scale": 3.0}, **PLAIN, "documents": 1},
}
RATES = [0.1, 0.2, 0.2, 0.1, 0.05, 0.15, 0.1]


@pytest.fixture
def runs(tmp_path) -> dict[str, str]:
    """An evaluation, a training run with an earlier and a last checkpoint, and a benchmark."""
    evaluation = tmp_path / "evaluation"
    Run(evaluation).start({}, SETTINGS | {"unmeasured": SETTINGS["cfg-3"]})
    measured = {name: {"fd": measure_mean([at, at + 2.0], 20)} for at, name in enumerate(SETTINGS, 1)}
    write_results(evaluation, measured, {}, CARD)
    history = [{"step": 10 * at, "learning_rate": rate, "loss": 1.0} for at, rate in enumerate(RATES)]
    history += [{"step": 30, "eval_loss": 2.0}, {"step": 60, "eval_loss": 9.0, "eval_perplexity": 5.0}]
    for step, flos in ((30, 312e12 * 0.4 * 3600), (60, 312e12 * 0.4 * 7200)):
        (tmp_path / "training" / f"checkpoint-{step}").mkdir(parents=True)
        state = TrainerState(total_flos=flos, log_history=history)
        state.save_to_json(str(tmp_path / "training" / f"checkpoint-{step}" / "trainer_state.json"))
    rates = {"ours CFG bf16 batch 1": 5.0, "ours CFG bf16 batch 4": 12.0, "stock CFG bf16 batch 1": 2.0}
    (tmp_path / "benchmark").mkdir()
    rows = {name: {"tokens_per_second": rate} for name, rate in rates.items()}
    (tmp_path / "benchmark" / "decode.json").write_text(json.dumps({"rows": rows}))
    return {name: str(tmp_path / name) for name in ("evaluation", "training", "benchmark")}


def test_the_figures_show_the_runs(runs, tmp_path, capsys):
    evaluation, training = runs["evaluation"], runs["training"]
    ours = {"name": "12M", "evaluation": evaluation, "metric": "fd"}
    arguments = RECIPE.FigureArguments(
        out=str(tmp_path / "figures"),
        compute=[
            ours | {"setting": "cfg-3", "training": f"{training}/checkpoint-30"},
            ours | {"setting": "cfg-1", "training": training},
            {"name": "others", "hours": 50, "value": 7.0},
        ],
        perplexity=[{"name": "12M", "training": training}],
        guidance=[ours],
        throughput=[{"name": "CPU", "benchmark": runs["benchmark"]}],
    )
    RECIPE.main(arguments)
    drawn = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    assert [point[:2] for point in drawn["compute"]["12M"]] == [pytest.approx([1, 3]), pytest.approx([2, 2])]
    assert drawn["compute"]["others"] == [[50, 7, 7, 7]]
    assert drawn["perplexity"] == {"12M": [[30, pytest.approx(math.exp(2))], [60, 5]]}
    assert [point[:2] for point in drawn["guidance"]["12M"]] == [[1, 2], [3, 3]]
    assert all(low <= value <= high for _, value, low, high in drawn["guidance"]["12M"])
    assert drawn["throughput"] == {"CPU, ours CFG bf16": [[1, 5], [4, 12]]}
    for name in drawn:
        assert len(set(Image.open(tmp_path / "figures" / f"{name}.png").convert("L").tobytes())) > 10
    arguments.compute = arguments.guidance = arguments.throughput = []
    RECIPE.main(arguments)
    assert json.loads(capsys.readouterr().out.strip().splitlines()[-1]) == {"perplexity": drawn["perplexity"]}


def test_restarts_are_where_the_learning_rate_rises_again(runs):
    assert RECIPE.restarts(RECIPE.trainer_state(runs["training"]).log_history) == [50]
    assert (
        RECIPE.restarts([{"step": step, "learning_rate": rate} for step, rate in enumerate([1, 2, 3, 3, 2, 1])]) == []
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"setting": "cfg-9"}, "expected fd of the setting cfg-9 in"),
        ({"metric": "fid"}, "expected fid of the setting cfg-3 in"),
        ({"evaluation": "nowhere"}, "expected results in nowhere"),
        ({"training": "nowhere"}, "expected a training run in nowhere"),
    ],
)
def test_what_runs_lack_is_said(runs, changes, message):
    entry = {"name": "12M", "setting": "cfg-3", "metric": "fd"} | {key: runs[key] for key in ("evaluation", "training")}
    with pytest.raises(ValueError, match=message):
        RECIPE.compute_lines([entry | changes])


def test_an_evaluation_without_guidance_is_refused(runs):
    with pytest.raises(ValueError, match="expected fid of settings with guidance alone"):
        RECIPE.guidance_lines([{"name": "12M", "evaluation": runs["evaluation"], "metric": "fid"}])


def test_the_recipes_yaml_names_every_figure():
    config = str(REPOSITORY / "recipes/evaluate/figures.yaml")
    (arguments,) = TrlParser(RECIPE.FigureArguments).parse_args_and_config(["--config", config])
    assert arguments.compute and arguments.perplexity and arguments.guidance and arguments.throughput
