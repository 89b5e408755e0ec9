"""The benchmark of decoding runs on a tiny shape, beside its peers, and its ratios are those of the table."""

import json
from types import SimpleNamespace

import pytest
from conftest import REPOSITORY, load_recipe


@pytest.fixture(scope="module")
def recipe():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(REPOSITORY / "recipes" / "benchmark"))
        yield load_recipe("benchmark/decode.py")


class Here:
    """In place of a process of its own."""

    def __init__(self, *arguments, **keywords):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass

    def apply(self, function, arguments=()):
        return function(*arguments)


def test_it_measures_us_and_our_peers_and_prints_a_json_line(recipe, tmp_path, monkeypatch, capsys):
    here = SimpleNamespace(get_context=lambda kind: SimpleNamespace(Pool=Here))
    monkeypatch.setattr(recipe, "multiprocessing", here)
    readings = iter([3e9, 1e9, 2e9, 1e9, 1e9, 4e9, 2e9, 1e9])  # around two rows, two more, and the last one
    monkeypatch.setattr(recipe, "read_bandwidth", lambda: next(readings))
    recipe.main(recipe.DecodeArguments(out=str(tmp_path), shape="tiny", grid=2, repeats=1, only="CFG bf16", together=2))
    line = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    record = json.loads((tmp_path / "decode.json").read_text(encoding="utf-8"))
    assert record["failed"] == {} and record["figures"] == line and (tmp_path / "decode.png").is_file()
    batches = [f"ours CFG bf16 batch {batch}" for batch in (1, 4, 16)]
    assert [*record["rows"]] == ["stock CFG bf16 batch 1", "Janus CFG bf16 batch 1", *batches]
    weights = 2 * (4 * 128**2 + 2 * 128 * 256) + 8192 * 128  # two layers, and the head's image rows
    better = [3e9, 2e9, 1e9, 4e9, 2e9]
    floors = [row["floor_ms"] for row in record["rows"].values()]
    assert floors == pytest.approx([1e3 * 2 * weights / bandwidth for bandwidth in better])
    assert {name.removeprefix("gpu_") for name in line} == {
        "guided_over_floor",
        "speedup_over_stock_cfg",
        "batch16_over_batch1",
    }


def test_the_ratios_are_those_of_the_fastest_rows(recipe, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    times = {
        "stock CFG bf16 batch 1": 50.0,
        "ours plain bf16 batch 1": 8.0,
        "ours CFG bf16 batch 1": 12.0,
        "ours CFG compiled bf16 batch 1": 10.0,
        "ours CFG Jacobi bf16 batch 1": 1.0,  # several tokens a step
        "ours CFG bf16 batch 16": 16.0,
        "ours CFG int8 batch 1": 5.0,
    }
    others = {"tokens_per_second": 200.0, "peak_gb": 1.0}
    results = {name: {"ms_per_step": ms, "floor_ms": 0.4 * ms} | others for name, ms in times.items()}
    results["ours CFG bf16 batch 1"]["floor_ms"] = 1.0  # of another moment
    assert recipe.figures(results) == {
        "guided_over_floor": 2.5,
        "speedup_over_stock_cfg": 5.0,
        "guidance_cost": 1.25,
        "batch16_over_batch1": 10.0,
        "int8_over_bf16": 2.0,
    }
    assert "| ours CFG int8 batch 1 | 5.0 | 2.0 | 2.50 | 200.0 | 1.00 |" in recipe.table(results)


def test_a_row_that_there_is_not_is_refused(recipe, tmp_path):
    with pytest.raises(ValueError, match="got 'CFG fp64'"):
        recipe.main(recipe.DecodeArguments(out=str(tmp_path / "out"), only="CFG fp64"))
    assert not (tmp_path / "out").exists()
