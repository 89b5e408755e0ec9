"""Offline generation: whole, the same when it was stopped, and a data set at the end."""

import datasets
import pytest
from conftest import load_recipe

generate = load_recipe("generate.py")
PROMPTS = ["a red circle", "a blue square", "a green circle"]


@pytest.fixture
def arguments(folder, tmp_path) -> dict:
    (tmp_path / "prompts.txt").write_text("\n".join([*PROMPTS, ""]))
    return {"prompts": str(tmp_path / "prompts.txt"), "model": folder, "num_images": 2, "batch_size": 4}


def draw(arguments: dict, out, **changes) -> dict:
    generate.main(generate.GenerateArguments(**arguments | {"out": str(out)} | changes))
    return {path.name: path.read_bytes() for path in (out / "drawn" / "pictures").glob("*.png")}


def test_every_prompt_is_drawn_and_the_pictures_are_a_data_set(arguments, tmp_path):
    drawn = draw(arguments, tmp_path / "out")
    assert len(drawn) == 6 and len(set(drawn.values())) == 6
    rows = datasets.load_dataset("imagefolder", data_dir=str(tmp_path / "out/drawn/pictures"), split="train")
    assert rows["text"][:] == [prompt for prompt in PROMPTS for _ in range(2)]
    assert rows[0]["image"].size == (16, 16)


def test_a_stopped_run_goes_on_and_draws_the_same(arguments, tmp_path):
    whole = draw(arguments, tmp_path / "out")
    lost = sorted((tmp_path / "out" / "drawn" / "pictures").glob("*.png"))[-1]
    kept = lost.with_name("000000.png")
    lost.unlink()
    before = kept.stat().st_mtime_ns
    assert draw(arguments, tmp_path / "out") == whole
    assert kept.stat().st_mtime_ns == before  # its batch was not drawn again
    with pytest.raises(ValueError, match="choose a new folder"):
        draw(arguments, tmp_path / "out", seed=1)


def test_arguments_that_cannot_be(arguments, tmp_path):
    (tmp_path / "empty.txt").write_text("\n \n")
    with pytest.raises(ValueError, match=r"prompts in .*empty\.txt"):
        draw(arguments, tmp_path / "out", prompts=str(tmp_path / "empty.txt"))
    for changes in ({"num_images": 0}, {"batch_size": 0}, {"strategy": "beam"}):
        with pytest.raises(ValueError, match="expected"):
            draw(arguments, tmp_path / "out", **changes)
    assert not (tmp_path / "out").exists()
