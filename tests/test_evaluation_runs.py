"""Evaluations that are stopped and go on; what they ask for and what they write."""

import json

import numpy as np
import pytest
import yaml
from conftest import CAPTIONS, COLOURS, SHAPES, draw
from PIL import Image

from cm3leon_hf.evaluation.clip_score import CLIPScorer
from cm3leon_hf.evaluation.intervals import Measured
from cm3leon_hf.evaluation.measuring import SeenPictures
from cm3leon_hf.evaluation.results import markdown_table, model_index, read_results, write_results
from cm3leon_hf.evaluation.runs import Run, writing_prompts
from cm3leon_hf.evaluation.settings import Setting, read_settings

CFG = Setting("cfg-3", {"guidance_scale": 3.0, "top_p": 0.9})
BEST = Setting("best", {}, strategy="both", candidates=3)
PICTURES = [draw(colour, shape) for colour in COLOURS for shape in SHAPES]


@pytest.fixture(scope="module")
def scorer(small_clip) -> CLIPScorer:
    return CLIPScorer(small_clip, None, device="cpu")


class Stopped(Exception):
    pass


def stop_after(model, monkeypatch, calls: int) -> list:
    """Stops the run in the call of `generate` behind `calls`; returns the list of calls."""
    made, generate = [], model.generate

    def counted(*arguments, **options):
        if len(made) == calls:
            raise Stopped
        made.append(1)
        return generate(*arguments, **options)

    monkeypatch.setattr(model, "generate", counted)
    return made


def pixels(run: Run, setting: Setting) -> list[bytes]:
    return [Image.open(path).tobytes() for path in run.drawn(setting, len(CAPTIONS))]


@pytest.mark.parametrize("setting", [CFG, BEST], ids=lambda setting: setting.name)
def test_a_stopped_run_goes_on_and_ends_as_an_unbroken_one(setting, model, processor, scorer, tmp_path, monkeypatch):
    whole, broken = Run(tmp_path / "whole", 3), Run(tmp_path / "broken", 3)
    whole.draw(setting, CAPTIONS, model, processor, scorer)
    passes = len(setting.strategies)
    with monkeypatch.context() as patch:
        stop_after(model, patch, 2 * passes)
        with pytest.raises(Stopped):
            broken.draw(setting, CAPTIONS, model, processor, scorer)
    assert sum(path.exists() for path in broken.drawn(setting, len(CAPTIONS))) == 6, "two batches of three stay"
    made = stop_after(model, monkeypatch, 99)
    broken.draw(setting, CAPTIONS, model, processor, scorer)
    assert len(made) == passes, "one batch was left"
    assert pixels(broken, setting) == pixels(whole, setting)
    assert len(set(pixels(whole, setting))) > 4
    broken.draw(setting, CAPTIONS, model, processor, scorer)
    assert len(made) == passes


def test_processes_share_the_batches(model, processor, tmp_path):
    alone = Run(tmp_path / "alone", 3)
    alone.draw(CFG, CAPTIONS, model, processor)
    for process in range(2):
        Run(tmp_path / "shared", 3, process=process, processes=2).draw(CFG, CAPTIONS, model, processor)
        drawn = sum(path.exists() for path in Run(tmp_path / "shared").drawn(CFG, len(CAPTIONS)))
        assert drawn == (5, 8)[process]
    assert pixels(Run(tmp_path / "shared"), CFG) == pixels(alone, CFG)


def test_descriptions_are_those_of_generate(model, processor, tmp_path, monkeypatch):
    run, prompts = Run(tmp_path, 4), ["Describe the given picture.", "What is it?"] * 4
    run.describe("greedy", PICTURES, prompts, model, processor)
    for picture, prompt, found in zip(PICTURES, prompts, run.described("greedy", 8)):
        inputs = processor.for_image_to_text(picture, text=prompt)
        ids = model.generate(**inputs, generation_mode="text", do_sample=False)[:, inputs["input_ids"].shape[1] :]
        assert found == processor.post_process_multimodal_output(ids, generation_mode="text")[0].strip()
    made = stop_after(model, monkeypatch, 1)
    with pytest.raises(Stopped):
        run.describe("guided", PICTURES, prompts, model, processor, {"guidance_scale": 2.0})
    made.clear()
    run.describe("greedy", PICTURES, prompts, model, processor)
    run.describe("guided", PICTURES, prompts, model, processor, {"guidance_scale": 2.0})
    assert len(made) == 1 and len(run.described("guided", 8)) == 8
    with pytest.raises(ValueError, match="got 7 for 8"):
        run.describe("short", PICTURES, prompts[1:], model, processor)


def test_settings_that_describe_alike_share_their_texts():
    guided = Setting("other", {}, text={"guidance_scale": 2.0}, documents=1)
    assert CFG.description == BEST.description == "documents-0"
    assert guided.description == "guidance_scale-2.0_documents-1"


class FakeAugmenter:
    """Stands in for a bank: the same two documents for everything, the best first."""

    documents = ({"text": "blue", "codes": [1] * 16}, {"text": "red", "codes": [2] * 16})

    def for_prompts(self, prompts, count):
        return [list(self.documents[:count]) for _ in prompts]


def test_descriptions_stand_behind_documents(processor, vocabulary):
    documents = list(FakeAugmenter.documents)
    inputs = writing_prompts(PICTURES[:3], ["Describe."] * 3, processor, [documents, documents[:1], []], 96)
    plain = processor.for_image_to_text(PICTURES[:3], text="Describe.")["input_ids"]
    for shown, ids, mask, alone in zip(([2, 1], [1], []), inputs["input_ids"], inputs["attention_mask"], plain):
        ids, alone = ids[mask.bool()].tolist(), alone.tolist()
        front, query = ids[: -len(alone)], ids[-len(alone) :]
        assert query == alone
        codes = [id - vocabulary.text_size for id in front if id >= vocabulary.text_size]
        assert codes == [code for code in shown for _ in range(16)], "the best stands next to the picture"


def test_documents_are_retrieved_by_the_picture(model, processor, tmp_path):
    asked = []

    class Augmenter(FakeAugmenter):
        def for_pictures(self, pictures, count):
            asked.append((count, [picture.tobytes() for picture in pictures]))
            return self.for_prompts(pictures, count)

    run = Run(tmp_path, 5)
    run.describe("one", PICTURES, ["Describe."] * 8, model, processor, documents=1, augmenter=Augmenter())
    pictures = [picture.tobytes() for picture in PICTURES]
    assert asked == [(1, pictures[:5]), (1, pictures[5:])]
    assert len(run.described("one", 8)) == 8
    with pytest.raises(ValueError, match="expected a memory bank for the documents of one"):
        run.describe("one", PICTURES, ["Describe."] * 8, model, processor, documents=1)


def test_documents_reach_the_prompts(model, processor, tmp_path, monkeypatch):
    seen = []
    plain = type(processor).for_text_to_image

    def recorded(self, prompts, retrieved, **options):
        seen.append((prompts, retrieved))
        return plain(self, prompts, retrieved, **options)

    monkeypatch.setattr(type(processor), "for_text_to_image", recorded)
    setting = Setting("documents", {}, documents=1)
    run = Run(tmp_path, 8)
    run.draw(setting, CAPTIONS, model, processor, augmenter=FakeAugmenter())
    assert seen == [(CAPTIONS, [[FakeAugmenter.documents[0]]] * 8)]
    assert all(path.exists() for path in run.drawn(setting, 8))


def test_what_is_missing_is_said_before_anything_is_drawn(model, processor, tmp_path):
    for setting, missing in ((BEST, "a CLIP"), (Setting("two", {}, documents=2), "a memory bank")):
        with pytest.raises(ValueError, match=f"expected {missing} .*{setting.name}"):
            Run(tmp_path).draw(setting, CAPTIONS, model, processor)
    assert not list(tmp_path.iterdir())


def test_another_plan_is_refused_and_further_settings_are_not(tmp_path):
    run = Run(tmp_path, 4, seed=1)
    run.start({"model": "a"}, {"cfg": {"guidance_scale": 3.0}})
    run.start({"model": "a"}, {"cd-k": {}})
    assert json.loads((tmp_path / "plan.json").read_text())["settings"] == {"cfg": {"guidance_scale": 3.0}, "cd-k": {}}
    with pytest.raises(ValueError, match="another model; choose"):
        run.start({"model": "b"}, {})
    with pytest.raises(ValueError, match="another seed, setting cfg"):
        Run(tmp_path, 4, seed=2).start({"model": "a"}, {"cfg": {"guidance_scale": 2.0}})


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ([], "different names"),
        ([{"name": "a"}, {"name": "a"}], "different names"),
        ([{"name": "a/b"}], "of letters"),
        ([{"name": "a", "strategy": "beam"}], "a strategy among"),
        ([{"name": "a", "strategy": "both"}], "a candidate for each strategy"),
        ([{"name": "a", "documents": -1}], "0 documents or more"),
    ],
)
def test_wrong_settings_are_refused(entries, message):
    with pytest.raises(ValueError, match=message):
        read_settings(entries)


def test_pictures_are_measured_as_the_model_sees_them(processor):
    wide = Image.fromarray(np.random.default_rng(0).integers(0, 255, (30, 50, 3), np.uint8))
    (seen,) = SeenPictures([wide], processor.image_processor)
    pixels = processor.image_processor(wide, return_tensors="np")["pixel_values"][0]
    np.testing.assert_allclose(np.asarray(seen).transpose(2, 0, 1) / 127.5 - 1, pixels, atol=1e-5)


def test_results_are_read_as_they_were_written(tmp_path):
    measured = {
        name: {"fd": Measured(1.5 + at, np.arange(5.0)), "r_at_1": Measured(0.5, np.full(5, 0.5))}
        for at, name in enumerate(("cfg", "real"))
    }
    card = {"model_name": "m", "task_type": "text-to-image", "dataset_type": "emoji", "dataset_name": "Emoji"}
    write_results(tmp_path, measured, {"model": "m"}, card)
    again = read_results(tmp_path)
    assert {name: list(row) for name, row in again.items()} == {name: ["fd", "r_at_1"] for name in measured}
    assert again["real"]["fd"].value == 2.5 and (again["cfg"]["fd"].replicates == np.arange(5.0)).all()
    table = (tmp_path / "results.md").read_text()
    assert markdown_table(measured) in table and "| setting | fd ↓ | r_at_1 ↑ |" in table and "- model: m" in table
    (entry,) = yaml.safe_load(model_index(measured, {}, **card))["model-index"]
    assert [one["args"]["setting"] for one in entry["results"][0]["metrics"]] == ["cfg", "cfg"]
    with pytest.raises(ValueError, match="expected results in"):
        read_results(tmp_path / "nowhere")
