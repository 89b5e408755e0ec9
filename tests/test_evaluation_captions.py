"""Caption metrics against pycocoevalcap called by hand; what needs Java is left out where there is none."""

import math
import shutil

import numpy as np
import pytest
from pycocoevalcap.bleu.bleu import Bleu
from pycocoevalcap.cider.cider import Cider
from pycocoevalcap.meteor.meteor import Meteor
from pycocoevalcap.rouge.rouge import Rouge
from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

from cm3leon_hf.evaluation.captions import caption_scores, tokenize

needs_java = pytest.mark.skipif(shutil.which("java") is None, reason="the PTB tokenizer and METEOR need Java")
PREDICTIONS = ["A man rides a horse.", "two dogs playing, outside!", "a red circle", "the sky"]
REFERENCES = [
    ["A man is riding a horse.", "Someone on a brown horse"],
    ["Two dogs play outside", "dogs (two) in the grass", "Playing dogs"],
    ["a red circle on white", "red circle"],
    ["a kitchen with a stove", "A stove\u2028in a kitchen"],
]


def by_hand(said: dict, known: dict) -> dict[str, tuple]:
    scores = {"rouge_l": Rouge().compute_score(known, said), "cider": Cider().compute_score(known, said)}
    corpus, each = Bleu(4).compute_score(known, said, verbose=0)
    return scores | {f"bleu_{n + 1}": (corpus[n], each[n]) for n in range(4)}


def assert_same(scores: dict, reference: dict) -> None:
    assert scores.keys() == reference.keys()
    for name, (corpus, each) in reference.items():
        assert scores[name].corpus == pytest.approx(corpus, abs=1e-12), name
        np.testing.assert_allclose(scores[name].each, each, atol=1e-12, err_msg=name)


def test_words_are_scored_as_by_hand():
    known = [["a man is riding a horse", "someone on a brown horse"], ["two dogs play", "dogs in the grass"]]
    said = ["a man rides a horse", "two dogs in the grass"]
    scores = caption_scores(said, known, ("bleu", "rouge_l", "cider"), tokenizer="words")
    assert_same(scores, by_hand({0: said[:1], 1: said[1:]}, dict(enumerate(known))))
    assert scores["cider"].corpus > 0


def test_words_lose_case_and_punctuation_only():
    captions = ["Mrs. Claus, Fluent 3D style!", "man’s hand -- medium-light skin", "-", "don't"]
    tokens = tokenize([[caption] for caption in captions], "words")
    assert tokens == {0: ["mrs claus fluent 3d style"], 1: ["man s hand medium-light skin"], 2: [""], 3: ["don't"]}


@needs_java
def test_the_official_tokenizer_is_the_packages_own():
    scores = caption_scores(PREDICTIONS, REFERENCES, ("bleu", "rouge_l", "cider"))
    rows = {row: [{"caption": caption} for caption in captions] for row, captions in enumerate(REFERENCES[:3])}
    rows[3] = [{"caption": caption.replace("\u2028", " ")} for caption in REFERENCES[3]]
    known = PTBTokenizer().tokenize(rows)
    said = PTBTokenizer().tokenize({row: [{"caption": caption}] for row, caption in enumerate(PREDICTIONS)})
    assert_same(scores, by_hand(said, known))


@needs_java
def test_line_ends_that_only_java_knows_do_not_move_captions():
    assert tokenize([["one\u2028two", "three\x85"], ["four\r"]], "ptb") == {0: ["one two", "three"], 1: ["four"]}


@needs_java
def test_meteor_is_the_packages_own():
    said, known = {0: ["a man on a horse"], 1: [""]}, {0: ["a man riding a horse"], 1: ["a dog"]}
    corpus, each = Meteor().compute_score(known, said)
    score = caption_scores([said[0][0], ""], [known[0], known[1]], ("meteor",), tokenizer="words")["meteor"]
    assert score.corpus == corpus and score.each.tolist() == each
    assert 0 < each[0] < 1 and each[1] == 0


def test_saying_nothing_scores_nothing():
    scores = caption_scores(["", "a dog"], [["a cat"], ["a dog"]], ("bleu", "rouge_l", "cider"), tokenizer="words")
    assert scores["rouge_l"].each[0] == scores["cider"].each[0] == 0
    assert all(math.isfinite(score.corpus) for score in scores.values())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"predictions": ["a"], "references": []}, "got 1 for 0"),
        ({"predictions": ["a"], "references": [[]]}, "got .* at 0"),
        ({"predictions": ["a", "b"], "references": [["c"], ["d", " "]]}, "at 1"),
        ({"predictions": ["a"], "references": ["a caption"]}, "a list of captions"),
        ({"predictions": ["a"], "references": [["b"]], "metrics": ("bleurt",)}, "metrics among"),
        ({"predictions": ["a"], "references": [["b"]], "tokenizer": "treebank"}, "a tokenizer among"),
    ],
)
def test_bad_captions_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        caption_scores(**{"metrics": ("bleu",), "tokenizer": "words"} | arguments)


@pytest.mark.parametrize("arguments", [{"metrics": ("cider",)}, {"metrics": ("meteor",), "tokenizer": "words"}])
def test_without_java_one_is_told_what_to_do(arguments, monkeypatch):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(ValueError, match="expected Java .*default-jre-headless, or pass tokenizer='words'"):
        caption_scores(["a"], [["a"]], **arguments)
