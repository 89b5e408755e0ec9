"""The metrics as modules of `evaluate`, from a local path and from the package, against the plain functions."""

import importlib
import shutil

import evaluate
import numpy as np
import pytest
import torch
from conftest import COLOURS, draw

from cm3leon_hf.evaluation.captions import caption_scores
from cm3leon_hf.evaluation.clip_score import CLIPScorer, clip_score
from cm3leon_hf.evaluation.features import load_network
from cm3leon_hf.evaluation.fid import feature_statistics, frechet_distance
from cm3leon_hf.evaluation.modules import MODULES, module_path
from cm3leon_hf.evaluation.precision_recall import precision_and_recall
from cm3leon_hf.evaluation.reconstruction import reconstruction_scores
from cm3leon_hf.evaluation.visdial import visdial_ndcg
from cm3leon_hf.evaluation.vqa import vqa_accuracy

CLASSES = {"caption_scores": "CaptionScores", "clip_fit": "ClipFit", "frechet_distance": "FrechetDistance"}
CLASSES |= {"modality_perplexity": "ModalityPerplexity", "reconstruction_quality": "ReconstructionQuality"}
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
    drawn, real = network(DRAWN), network(REAL)
    expected = frechet_distance(*(feature_statistics([features]) for features in (drawn, real)))
    asked = {"network": f"open_clip:{small_clip}", "precision_recall": True, "resamples": 20}
    found = load("frechet_distance").compute(predictions=DRAWN, real=REAL, **asked)
    assert found["frechet_distance"] == pytest.approx(expected, rel=1e-5)
    low, high = found["interval"]
    assert low < found["frechet_distance"] < high
    shares = precision_and_recall(drawn, real)
    assert (found["precision"], found["recall"]) == (shares.precision.mean(), shares.recall.mean())


def test_clip_fit(load, small_clip):
    scores = CLIPScorer(small_clip, None)(DRAWN, TEXTS)
    found = load("clip_fit").compute(
        predictions=DRAWN, references=TEXTS, model=small_clip, pretrained=None, ks=(1, len(TEXTS))
    )
    assert found["clip_score"] == pytest.approx(clip_score(scores).mean(), abs=1e-5)
    assert 0 <= found["r_at_1"] <= found["r_at_4"] == 1


@pytest.mark.filterwarnings("ignore:.*unreliable")
def test_reconstruction_quality(load, small_clip):
    asked = {"network": f"open_clip:{small_clip}"}
    found = load("reconstruction_quality").compute(predictions=DRAWN, references=REAL[:4], **asked)
    expected = reconstruction_scores(REAL[:4], DRAWN)
    assert found["psnr"] == pytest.approx(expected.psnr.mean()) and found["ssim"] == pytest.approx(expected.ssim.mean())
    assert found["rfid"] > 0


@torch.no_grad()
def test_modality_perplexity(load, folder, model, processor):
    found = load("modality_perplexity").compute(predictions=TEXTS, references=DRAWN, model=folder, batch_size=3)
    losses = {True: [], False: []}
    for text, image in zip(TEXTS, DRAWN):
        ids = torch.tensor([processor.document_ids({"text": text, "image": image}) + [processor.vocabulary.eos_id]])
        paid = -model(ids).logits.log_softmax(-1)[0, :-1].gather(-1, ids[0, 1:, None])[:, 0]
        for one, id in zip(paid, ids[0, 1:]):
            losses[bool(processor.vocabulary.is_image(id))].append(one.item())
    assert found["image_perplexity"] == pytest.approx(np.exp(np.mean(losses[True])), rel=1e-4)
    assert found["text_perplexity"] == pytest.approx(np.exp(np.mean(losses[False])), rel=1e-4)
    assert found["perplexity"] == pytest.approx(np.exp(np.mean(losses[True] + losses[False])), rel=1e-4)


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
