"""The shipped CLIP and memory bank: they fit each other and the shipped model, and find what is asked for."""

import re
from pathlib import Path

import pytest
import torch
from transformers import AutoProcessor

from cm3leon_hf import default_bank, default_clip, default_model, default_ranker
from cm3leon_hf.evaluation.clip_score import CLIPScorer
from cm3leon_hf.retrieval.augmenter import RetrievalAugmenter
from cm3leon_hf.retrieval.documents import document_picture
from cm3leon_hf.retrieval.memory_bank import MemoryBank


@pytest.fixture(scope="module")
def scorer() -> CLIPScorer:
    return CLIPScorer(default_clip(), None, device="cpu")


@pytest.fixture(scope="module")
def bank(scorer) -> MemoryBank:
    return MemoryBank.load(default_bank(), scorer.name, verify=True)


def test_the_bank_is_small_and_every_document_names_its_licence(bank):
    assert sum(file.stat().st_size for file in Path(default_bank()).iterdir()) <= 12e6
    assert set(bank.documents["licence"]) == {"MIT", "Apache-2.0", "CC-BY-4.0"}


def test_the_same_thing_in_other_styles_is_found(bank, scorer):
    prompts = ["red apple, fluent 3d style", "pizza, noto style", "soccer ball, twemoji style"]
    found = RetrievalAugmenter(bank, scorer, training=False).for_prompts(prompts)
    for prompt, documents in zip(prompts, found):
        assert len(documents) == 2
        assert any(document["text"].startswith(prompt.split(",")[0]) for document in documents)


def test_the_recipes_python_runs_as_printed():
    text = (Path(__file__).parents[1] / "recipes" / "retrieval" / "README.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    names = {}
    exec(code, names)
    assert names["sloth"].size == (96, 96) and len(names["found"]) == len(names["found"][0]) == 1


def test_documents_fit_the_shipped_model_and_clip_knows_their_pictures(bank, scorer):
    processor = AutoProcessor.from_pretrained(default_model())
    documents = bank.fetch([0, len(bank) // 2, len(bank) - 1])
    pictures = [document_picture(document, processor) for document in documents]
    similarity = torch.stack(
        [
            torch.tensor(scorer([picture] * len(documents), [document["text"] for document in documents]))
            for picture in pictures
        ]
    )
    assert similarity.argmax(1).tolist() == [0, 1, 2]
    inputs = processor.for_text_to_image("pizza, noto style", [documents[:2]], max_length=512)
    assert int(processor.vocabulary.is_image(inputs["input_ids"]).sum()) == 2 * processor.vocabulary.image_length


def test_the_ranker_tells_the_styles_that_retrieval_takes_no_notice_of(bank, scorer):
    processor, styles = AutoProcessor.from_pretrained(default_model()), ("fluent 3d", "fluent flat", "noto", "twemoji")
    documents = [bank.fetch([at])[0] for at in range(0, len(bank), len(bank) // 40)]
    pictures = [document_picture(document, processor) for document in documents]
    texts = [document["text"].removesuffix(" style").rpartition(", ") for document in documents]

    def told(clip: CLIPScorer) -> float:
        """Share of the pictures whose style is the one of four that fits best."""
        found = [
            clip([picture] * len(styles), [f"{subject}, {style} style" for style in styles])
            for picture, (subject, *_) in zip(pictures, texts)
        ]
        return sum(styles[one.index(max(one))] == style for one, (*_, style) in zip(found, texts)) / len(texts)

    assert told(CLIPScorer(default_ranker(), None, device="cpu")) > 0.8 > 0.5 > told(scorer)
