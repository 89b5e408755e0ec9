"""The benchmark of training runs on a tiny shape, and its plain loop follows the pipeline's rules."""

import json

from conftest import load_recipe


def test_it_measures_and_prints_a_json_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("cm3leon_hf.training.throughput.matmul_tflops", lambda dtype, device: 1.0)
    recipe = load_recipe("benchmark/train.py")
    monkeypatch.setattr(recipe, "in_new_process", lambda function, *arguments: function(*arguments))  # which sees 1.0
    sizes = {"length": 256, "steps": 1, "rows": 64, "rounds": 1}
    recipe.main(recipe.TrainBenchmarkArguments(out=str(tmp_path), shapes=["tiny"], **sizes))
    line = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    assert {"over_opt_trainer", "mfu", "mfu_tiny", "pipeline_tokens_per_s_core", "data_wait_share"} <= set(line)
    assert line == json.loads((tmp_path / "train.json").read_text()) and line["over_opt_trainer"] > 0
