"""Accuracy of short answers by the protocol of VQA v2, which OKVQA shares, and of VizWiz with its unanswerable ones."""

import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from .files import check_as_many

ANNOTATORS = 10
AGREEING = 3  # so many other people's equal answers make an answer right
UNANSWERABLE = "unanswerable"
PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
DIGITS_AROUND_COMMA = re.compile(r"\d,\d")
PERIOD = re.compile(r"\.(?!\d)")
MOST_PERIODS = 32  # the official script passes re.UNICODE, which is 32, for the number of replacements
ARTICLES = {"a", "an", "the"}
NUMBERS = {"none": "0", "zero": "0", "one": "1", "two": "2", "three": "3", "four": "4", "five": "5", "six": "6"}
NUMBERS |= {"seven": "7", "eight": "8", "nine": "9", "ten": "10"}
CONTRACTED = """
    ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've
    he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've needn't not've
    o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's
    someone'd someone'd've someone'll someone's something'd something'd've something'll that's there'd there'd've
    there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's
    what've when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't would've
    wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're you've
"""


def _contractions() -> dict[str, str]:
    """Words that lack one of their apostrophes to the words; the official table turns one the other way round."""
    table = {"somebody'd": "somebodyd"}
    for word in CONTRACTED.split():
        table |= {word[:at] + word[at + 1 :]: word for at, letter in enumerate(word) if letter == "'"}
    return table


CONTRACTIONS = _contractions()


def normalize_answer(answer: str) -> str:
    """
    An answer as the official script compares it: without punctuation and articles, numbers as digits, apostrophes back
    in contractions, in lower case.
    """
    joined = DIGITS_AROUND_COMMA.search(answer) is not None
    text = answer
    for mark in PUNCTUATION:
        beside_space = f"{mark} " in answer or f" {mark}" in answer
        text = text.replace(mark, "" if beside_space or joined else " ")
    words = PERIOD.sub("", text, count=MOST_PERIODS).lower().split()
    words = [NUMBERS.get(word, word) for word in words]
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)


def vqa_accuracy(predictions: Sequence[str], answers: Sequence[Sequence[str]]) -> np.ndarray:
    """
    The accuracy of each prediction, in [0, 1]; their mean is the accuracy of VQA v2 and OKVQA.

    Of ten people's answers each is left out once; the prediction scores a third for every equal one among the other
    nine, up to 1, and the ten scores are averaged. As in the official script, answers are normalised only where people
    disagree: where all ten gave the same answer, the prediction must be equal to the letter.

    Args:
        predictions (`Sequence[str]`): One for each question.
        answers (`Sequence[Sequence[str]]`): Ten for each question.

    Returns:
        `np.ndarray` of shape `(questions,)`.

    Raises:
        ValueError: for numbers that differ, or a question without its ten answers.
    """
    check_as_many("predictions", predictions, "answers", answers)
    for row, group in enumerate(answers):
        if isinstance(group, str) or len(group) != ANNOTATORS:
            raise ValueError(f"expected {ANNOTATORS} answers to question {row}, got {group!r}; complete them")
    return np.array([_accuracy(*pair) for pair in zip(predictions, answers)])


def _accuracy(prediction: str, answers: Sequence[str]) -> float:
    prediction, *answers = (_on_one_line(text) for text in (prediction, *answers))
    if len(set(answers)) > 1:
        prediction, *answers = (normalize_answer(text) for text in (prediction, *answers))
    equal = answers.count(prediction)
    left_out = [min(1.0, (equal - (answer == prediction)) / AGREEING) for answer in answers]
    return sum(left_out) / len(left_out)


def _on_one_line(text: str) -> str:
    return text.replace("\n", " ").replace("\t", " ").strip()


class VizWizScores(NamedTuple):
    """
    Accuracy of each question, `(questions,)`, the mean accuracy of each type of answer, and how well unanswerable
    questions are told from others: F1 and average precision in [0, 1].
    """

    accuracy: np.ndarray
    by_type: dict[str, float]
    f1: float
    average_precision: float


def vizwiz_scores(
    predictions: Sequence[str],
    answers: Sequence[Sequence[str]],
    answer_types: Sequence[str],
    unanswerable_scores: Sequence[float] | None = None,
) -> VizWizScores:
    """
    Scores answers to VizWiz, where a question may be `"unanswerable"`, which then is the right answer.

    Args:
        predictions, answers: See [`vqa_accuracy`].
        answer_types (`Sequence[str]`): The data set's own: `"unanswerable"`, `"other"`, `"yes/no"`, `"number"`.
        unanswerable_scores (`Sequence[float]`, *optional*): In [0, 1], how sure the model is that a question has no
            answer; by default 1 for those it calls unanswerable, else 0. F1 takes those above 0.5.

    Raises:
        ValueError: as [`vqa_accuracy`].
    """
    from torchmetrics.functional.classification import binary_average_precision, binary_f1_score

    accuracy = vqa_accuracy(predictions, answers)
    check_as_many("answer types", answer_types, "predictions", predictions)
    if unanswerable_scores is None:
        unanswerable_scores = [float(normalize_answer(text) == UNANSWERABLE) for text in predictions]
    check_as_many("scores", unanswerable_scores, "predictions", predictions)
    scores = torch.as_tensor(unanswerable_scores, dtype=torch.float64)
    truth = torch.tensor([kind == UNANSWERABLE for kind in answer_types]).long()
    types = np.array(answer_types)
    by_type = {kind: float(accuracy[types == kind].mean()) for kind in sorted(set(answer_types))}
    f1, precision = binary_f1_score(scores, truth), binary_average_precision(scores, truth)
    return VizWizScores(accuracy, by_type, f1.item(), precision.item())


__all__ = ["VizWizScores", "normalize_answer", "vizwiz_scores", "vqa_accuracy"]
