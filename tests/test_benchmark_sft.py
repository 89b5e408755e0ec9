"""The benchmark of fine-tuning runs on a tiny shape."""

import json
from concurrent.futures import Future

from conftest import load_recipe


class Here:
    """In place of a process of its own."""

    def __init__(self, *arguments):
        self.future = Future()

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass

    def submit(self, function, *arguments) -> Future:
        self.future.set_result(function(*arguments))
        return self.future


def test_it_measures_both_and_prints_a_json_line(tmp_path, monkeypatch, capsys):
    recipe = load_recipe("benchmark/sft.py")
    held = iter([2**30, 5 * 2**30, 2**30, 2 * 2**30])  # before and after, of each run
    monkeypatch.setattr(recipe, "ProcessPoolExecutor", Here)
    monkeypatch.setattr(recipe, "bytes_held", lambda: next(held))
    recipe.main(recipe.SFTBenchmarkArguments(out=str(tmp_path), shape="tiny", length=64, steps=2))
    line = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    assert line == json.loads((tmp_path / "sft.json").read_text(encoding="utf-8"))
    assert line["lora_over_full_memory"] == 0.25 and line["full_gib"] == 4
    assert line["lora_over_full_time"] > 0 and line["lora_step_s"] > 0
