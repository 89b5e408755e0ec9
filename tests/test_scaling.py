"""Scaling laws: known laws come back, and the recipe's ladder goes on where it was stopped."""

import json
from pathlib import Path

import datasets
import numpy as np
import pytest
import yaml
from conftest import CAPTIONS, load_recipe, small_config, small_model
from transformers import AutoConfig, AutoModelForCausalLM, TrainingArguments
from trl import TrlParser

from cm3leon_hf.data.sources import Source
from cm3leon_hf.data.transform import CM3Transform
from cm3leon_hf.training.scaling import ScalingLaw, fit_law, measure_law

LAW = ScalingLaw(E=1.7, A=90.0, alpha=0.36, B=400.0, beta=0.48)
WEIGHTS, TOKENS = (
    column.flatten() for column in np.meshgrid(np.array([3e5, 7e5, 1.4e6, 4e6]), np.array([5e5, 1e6, 2e6, 4e6]))
)


def noisy(share: float) -> np.ndarray:
    return LAW.loss(WEIGHTS, TOKENS) * np.exp(share * np.random.default_rng(1).standard_normal(len(WEIGHTS)))


def test_a_law_is_found_again_and_reaches_beyond():
    found = fit_law(WEIGHTS, TOKENS, LAW.loss(WEIGHTS, TOKENS))
    assert [found.E, found.alpha, found.beta] == pytest.approx([LAW.E, LAW.alpha, LAW.beta], rel=1e-2)
    assert found.loss(4e7, 4e7) == pytest.approx(LAW.loss(4e7, 4e7), rel=1e-2)


def test_one_run_that_failed_moves_the_law_little():
    losses = LAW.loss(WEIGHTS, TOKENS)
    losses[5] *= 1.5
    found = fit_law(WEIGHTS, TOKENS, losses)
    kept = np.arange(len(losses)) != 5
    np.testing.assert_allclose(found.loss(WEIGHTS, TOKENS)[kept], losses[kept], rtol=0.01)


def test_intervals_hold_the_law_and_widen_with_noise():
    little, much = (measure_law(WEIGHTS, TOKENS, noisy(share), resamples=40) for share in (1e-3, 1e-2))
    assert little.keys() == {"E", "A", "alpha", "B", "beta"}
    for name in ("E", "alpha", "beta"):
        low, high = little[name].interval()
        assert low < getattr(LAW, name) < high
        assert much[name].replicates.std() > 2 * little[name].replicates.std()


def test_too_few_runs_are_refused():
    with pytest.raises(ValueError, match="at least 5 runs over 2 sizes and 2 numbers of tokens, got 4 over 4 and 1"):
        fit_law(WEIGHTS[:4], TOKENS[:4], np.ones(4))
    with pytest.raises(ValueError, match="more than 5 runs"):
        measure_law(WEIGHTS[:5], TOKENS[:5], np.ones(5))
    with pytest.raises(ValueError, match="losses above 0"):
        fit_law(WEIGHTS, TOKENS, -noisy(0))


@pytest.fixture
def ladder(tokenizer, saved_vqgan, tmp_path):
    """The recipe on made-up codes, the same rows with and without documents in front of them."""
    recipe, rng = load_recipe("scaling/ladder.py"), np.random.default_rng(0)
    rows = [{"captions": [CAPTIONS[i % 8]], "codes": rng.integers(0, 32, 16).tolist()} for i in range(24)]
    found = [[{"text": rows[i - 1]["captions"][0], "codes": rows[i - 1]["codes"]}] for i in range(24)]
    rows = [row | {"retrieved": documents} for row, documents in zip(rows, found)]
    for split, part in (("train", rows[:18]), ("heldout_pairs", rows[18:])):
        path = tmp_path / "rows" / "data" / f"{split}-00000-of-00001.parquet"
        datasets.Dataset.from_list(part).to_parquet(path)
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    small_config().save_pretrained(tmp_path / "config")
    shared = {"model_config": str(tmp_path / "config"), "tokenizer": str(tmp_path / "tokenizer"), "vqgan": saved_vqgan}
    shared |= {"packing": True, "overflow": "stream", "batch_tokens": 192, "per_device_train_batch_size": 2}
    shared |= {"remove_unused_columns": False, "report_to": "none", "disable_tqdm": True, "use_cpu": True}
    (tmp_path / "train.yaml").write_text(yaml.safe_dump(shared))
    sizes = [{"num_hidden_layers": layers, "learning_rate": 1e-2} for layers in (1, 2)]
    rows = {"path": str(tmp_path / "rows")}
    sources = {"without": rows | {"columns": {"retrieved": "left_out"}}, "with": rows}
    return recipe, recipe.LadderArguments(
        str(tmp_path / "train.yaml"), str(tmp_path / "out"), sources, sizes, [192, 384, 576], resamples=3
    )


def test_the_ladder_goes_on_and_ends_with_a_json_line(ladder, processor, monkeypatch, capsys):
    monkeypatch.setattr("cm3leon_hf.training.throughput.matmul_tflops", lambda dtype, device: 1.0)
    recipe, args = ladder
    train, ran = load_recipe("pretrain/train.py"), []

    def run(command, check):
        assert check and command[1] == str(recipe.TRAIN)
        rung = yaml.safe_load(Path(command[3]).read_text())
        ran.append(rung["max_steps"])
        if len(ran) == 2:
            raise KeyboardInterrupt
        if ran[-1] == 1:
            kinds = (train.PretrainArguments, train.ObjectiveArguments, TrainingArguments)
            train.main(*TrlParser(kinds).parse_args_and_config(command[2:]))
        else:  # not trained, to save time
            small_model(**AutoConfig.from_pretrained(rung["model_config"]).to_diff_dict()).save_pretrained(
                rung["output_dir"]
            )
            processor.save_pretrained(rung["output_dir"])

    monkeypatch.setattr(recipe.subprocess, "run", run)
    with pytest.raises(KeyboardInterrupt):
        recipe.main(args)
    recipe.main(args)
    assert ran == [1, 2, 2, 3, *[1, 2, 3] * 3]
    lines = capsys.readouterr().out.strip().splitlines()
    last = json.loads(lines[-1])
    assert (
        last["rungs"] == 12 and last.keys() == {"rungs", "mean_gain", "laws"} and last["mean_gain"].keys() == {"with"}
    )
    assert set(last["laws"]["with"]["image_loss"]) == {"E", "A", "alpha", "B", "beta"}
    assert sum(line.split()[0] == "with" for line in lines[:-1] if "[" not in line) == 6
    rung = recipe.climb(args, "with", 1, 576)
    assert rung.weights == AutoModelForCausalLM.from_pretrained(f"{args.out}/with-1-576").num_parameters()
    assert rung.text_loss != rung.image_loss and len(ran) == 13


def test_what_was_retrieved_is_read_and_not_counted(ladder, processor, vocabulary):
    recipe, args = ladder
    transform = CM3Transform(processor.tokenizer, vocabulary, 96, span_rate=0.0)
    plain, behind = (
        recipe.OwnDocuments(Source(**args.sources[name]).open(), transform, seed=0) for name in ("without", "with")
    )
    for index in range(len(plain)):
        labels, others = plain[index]["labels"], behind[index]["labels"]
        assert len(others) > len(labels) and (labels[1:] == plain[index]["input_ids"][1:]).all() and labels[0] == -100
        assert others[others != -100].tolist() == labels[1:].tolist()


def test_too_few_rungs_are_refused(ladder):
    recipe, args = ladder
    with pytest.raises(ValueError, match="2 token counts and 6 rungs for a law of five numbers, got 2 and 2"):
        recipe.LadderArguments(args.recipe, args.out, args.sources, args.sizes, args.tokens[:2])


def test_the_recipe_is_read_by_its_script():
    recipe, train = load_recipe("scaling/ladder.py"), load_recipe("pretrain/train.py")
    [args] = TrlParser(recipe.LadderArguments).parse_args_and_config(
        ["--config", str(recipe.TRAIN.parents[1] / "scaling/emoji.yaml")]
    )
    assert len(args.sources) == 2 and len(args.sizes) == 4
    shared = recipe.TRAIN.parents[2] / args.recipe
    kinds = (train.PretrainArguments, train.ObjectiveArguments, TrainingArguments)
    flags = ["--config", str(shared), "--dataset", "a", "--output_dir", "b", "--bf16", "false"]
    pretrain, _, training = TrlParser(kinds).parse_args_and_config(flags)
    assert training.per_device_train_batch_size * 512 == pretrain.batch_tokens
    assert all(tokens % pretrain.batch_tokens == 0 for tokens in args.tokens)
