"""VQA accuracy against the formula written out, the official normalisation case by case, and VizWiz."""

import itertools
import random

import numpy as np
import pytest

from cm3leon_hf.evaluation.vqa import CONTRACTIONS, normalize_answer, vizwiz_scores, vqa_accuracy

POOL = ["yes", "Yes.", "no", "2", "two", "a dog", "dog", "the dog", "unanswerable", "didnt", "didn't", "red, blue"]


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("The Dog", "dog"),
        ("a dog.", "dog"),
        ("none", "0"),
        ("Ten", "10"),
        ("eleven", "eleven"),
        ("3.5", "3.5"),
        ("U.S.A.", "usa"),
        ("1,000", "1000"),
        ("1,000-2", "10002"),
        ("red,blue", "red blue"),
        ("red, blue", "red blue"),
        ("half-full", "half full"),
        ("half -full", "half full"),
        ("yes!", "yes"),
        ("dont", "don't"),
        ("couldntve", "couldntve"),
        ("couldnt've", "couldn't've"),
        ("couldn'tve", "couldn't've"),
        ("ow's'at", "'ow's'at"),
        ("somebody'd", "somebodyd"),
        ("Im", "im"),
        ("what's   that", "what's that"),
        ("the", ""),
        ("." * 40 + "x", "." * 8 + "x"),
    ],
)
def test_answers_are_normalised_as_officially(answer, expected):
    assert normalize_answer(answer) == expected


def test_the_table_of_contractions_is_whole():
    assert len(CONTRACTIONS) == 114
    assert all(key.replace("'", "") == word.replace("'", "") for key, word in CONTRACTIONS.items())


def written_out(prediction: str, answers: list[str]) -> float:
    """The mean over all ways to choose nine of ten people of min(agreeing / 3, 1)."""
    if len(set(answers)) > 1:
        prediction, answers = normalize_answer(prediction), [normalize_answer(answer) for answer in answers]
    chosen = list(itertools.combinations(answers, 9))
    return np.mean([min(1, nine.count(prediction) / 3) for nine in chosen])


def test_accuracy_leaves_each_person_out_once():
    rng = random.Random(0)
    predictions = [rng.choice(POOL) for _ in range(300)]
    answers = [[rng.choice(POOL[: rng.randint(1, 12)]) for _ in range(10)] for _ in predictions]
    expected = [written_out(*pair) for pair in zip(predictions, answers)]
    np.testing.assert_allclose(vqa_accuracy(predictions, answers), expected, rtol=0, atol=1e-15)
    assert len({round(value, 3) for value in expected}) > 3


def test_accuracy_of_known_counts():
    answers = [["cat"] * count + ["dog"] * (10 - count) for count in range(10)]
    got = vqa_accuracy(["Cat."] * 10, answers)
    np.testing.assert_allclose(got[:5], [0, 0.3, 0.6, 0.9, 1.0])
    assert (got[4:] == 1).all()
    assert vqa_accuracy(["Cat.", "cat"], [["cat"] * 10] * 2).tolist() == [0, 1], "unanimous answers stay as they are"


@pytest.mark.parametrize(
    ("predictions", "answers", "message"),
    [
        (["a"], [["a"] * 9], "expected 10 answers to question 0"),
        (["a"], ["aaaaaaaaaa"], "expected 10 answers to question 0"),
        (["a"], [], "got 1 for 0"),
        ([], [], "got 0 for 0"),
    ],
)
def test_missing_answers_are_refused(predictions, answers, message):
    with pytest.raises(ValueError, match=message):
        vqa_accuracy(predictions, answers)


def test_vizwiz_tells_unanswerable_questions_from_others():
    predictions = ["unanswerable", "Unanswerable.", "cat", "cat", "unanswerable"]
    types = ["unanswerable", "unanswerable", "unanswerable", "other", "other"]
    answers = [["unanswerable"] * 6 + ["cat"] * 4] * 3 + [["cat"] * 9 + ["dog"]] * 2
    scores = vizwiz_scores(predictions, answers, types)
    np.testing.assert_allclose(scores.accuracy, [1, 1, 1, 1, 0])
    assert scores.by_type == pytest.approx({"unanswerable": 1.0, "other": 0.5})
    assert scores.f1 == pytest.approx(2 / 3)  # two of three are found, and two of three found are right
    assert scores.average_precision == pytest.approx(2 / 3 * 2 / 3 + 1 / 3 * 3 / 5)
    sure = vizwiz_scores(predictions, answers, types, [0.9, 0.8, 0.7, 0.2, 0.1])
    assert sure.f1 == sure.average_precision == 1
    with pytest.raises(ValueError, match="answer types"):
        vizwiz_scores(predictions, answers, types[:2])
