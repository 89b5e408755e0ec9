"""The metrics as modules of `evaluate`, from a local path and from the package, against the plain functions."""

import importlib
import shutil

import evaluate
import numpy as np
import pytest
from conftest import COLOURS, draw

from cm3leon_hf.evaluation.captions import caption_scores
from cm3leon_hf.evaluation.clip_score import CLIPScorer, clip_score
from cm3leon_hf.evaluation.features import load_network
from cm3leon_hf.evaluation.fid import feature_statistics, frechet_distance
from cm3leon_hf.evaluation.modules import MODULES, module_path
from cm3leon_hf.evaluation.visdial import visdial_ndcg
from cm3leon_hf.evaluation.vqa import vqa_accuracy

CLASSES = {"caption_scores": "CaptionScores", "clip_fit": "ClipFit", "frechet_distance": "FrechetDistance"}
CLASSES |= {"visdial_ndcg": "VisdialNdcg", "vqa_accuracy": "VqaAccuracy"}
DRAWN, REAL = [draw(c, "circle", 32) for c in COLOURS], [draw(c, "square", 32) for c in (*COLOURS, "white")]
TEXTS = [f"a {colour} circle" for colour in COLOURS]
ANSWERS = [["dog"] * 2 + ["a cat"] * 8, ["red"] * 5 + ["Blue."] * 5]


@pytest.fixture(scope="module")
def modules_cache(tmp_path_factory):
    """One folder for all tests: Python imports the package of dynamic modules once."""
    folder = tmp_path_factory.mktemp("modules")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("evaluate.config.HF_MODULES_CACHE", folder)
        patch.setattr("evaluate.config.HF_METRICS_CACHE", folder)
        yield folder


@pytest.fixture(params=["local path", "package", "class"])
def load(request, tmp_path, modules_cache):
    """Loads a module from a copy in another folder, from the package's folder, or as a class."""

    def load(name: str):
        if request.param == "class":
            module = importlib.import_module(f"cm3leon_hf.evaluation.modules.{name}.{name}")
            return getattr(module, CLASSES[name])()
        if request.param == "package":
            return evaluate.load(module_path(name))
        return evaluate.load(str(shutil.copytree(module_path(name), tmp_path / name, dirs_exist_ok=True)))

    return load


def test_every_module_is_a_folder():
    assert set(MODULES) == set(CLASSES)
    with pytest.raises(ValueError, match="a metric among"):
        module_path("fid")


@pytest.mark.filterwarnings("ignore:.*unreliable")
def test_frechet_distance(load, small_clip):
    network = load_network(f"open_clip:{small_clip}")
    expected = frechet_distance(*(feature_statistics([network(images)]) for images in (DRAWN, REAL)))
    found = load("frechet_distance").compute(predictions=DRAWN, real=REAL, network=f"open_clip:{small_clip}")
    assert found["frechet_distance"] == pytest.approx(expected, rel=1e-5)


def test_clip_fit(load, small_clip):
    scores = CLIPScorer(small_clip, None)(DRAWN, TEXTS)
    found = load("clip_fit").compute(
        predictions=DRAWN, references=TEXTS, model=small_clip, pretrained=None, ks=(1, len(TEXTS))
    )
    assert found["clip_score"] == pytest.approx(clip_score(scores).mean(), abs=1e-5)
    assert 0 <= found["r_at_1"] <= found["r_at_4"] == 1


def test_caption_scores(load):
    references = [["a red ring", "red"], ["a green circle"], ["blue"], ["a yellow circle"]]
    expected = caption_scores(TEXTS, references, ("bleu", "cider"), "words")
    metric = load("caption_scores")
    for text, group in zip(TEXTS, references):
        metric.add(prediction=text, reference=group)
    found = metric.compute(metrics=("bleu", "cider"), tokenizer="words")
    assert found == pytest.approx({name: score.corpus for name, score in expected.items()})


def test_vqa_accuracy(load):
    predictions = ["cat", "blue"]
    found = load("vqa_accuracy").compute(predictions=predictions, references=ANSWERS)
    assert found == {"accuracy": vqa_accuracy(predictions, ANSWERS).mean()}
    typed = load("vqa_accuracy").compute(
        predictions=["dog", "unanswerable"], references=ANSWERS, answer_types=["other", "unanswerable"]
    )
    assert typed["f1"] == 1 and typed["by_type"] == pytest.approx({"other": 0.6, "unanswerable": 0})


def test_visdial_ndcg(load):
    rng = np.random.default_rng(0)
    scores, relevance = rng.random((5, 10)), rng.random((5, 10)) * (rng.random((5, 10)) < 0.7)
    found = load("visdial_ndcg").compute(predictions=scores.tolist(), references=relevance.tolist())
    assert found["ndcg"] == pytest.approx(visdial_ndcg(scores, relevance).mean())
