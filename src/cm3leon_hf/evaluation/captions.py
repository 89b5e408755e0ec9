"""Captions against human ones: BLEU, METEOR, ROUGE-L and CIDEr by pycocoevalcap, as the COCO server computes them."""

import re
import shutil
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

try:
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.meteor.meteor import Meteor
    from pycocoevalcap.rouge.rouge import Rouge
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer
except ImportError as error:
    raise ImportError("caption metrics need pycocoevalcap; pip install 'cm3leon_hf[eval]'") from error

from .files import check_as_many

METRICS = ("bleu", "meteor", "rouge_l", "cider")
TOKENIZERS = ("ptb", "words")
WORD = re.compile(r"[\w'-]*\w[\w'-]*")


class CaptionScore(NamedTuple):
    """A metric over all captions, and for each of them, `(captions,)`."""

    corpus: float
    each: np.ndarray


def caption_scores(
    predictions: Sequence[str],
    references: Sequence[Sequence[str]],
    metrics: Sequence[str] = METRICS,
    tokenizer: str = "ptb",
) -> dict[str, CaptionScore]:
    """
    Scores captions against references.

    BLEU and METEOR of the corpus are not the mean of the captions'; ROUGE-L and CIDEr are. CIDEr weighs words by how
    rare they are among the references passed, so it depends on the whole set.

    Args:
        predictions (`Sequence[str]`): One caption for each picture; an empty one counts as nothing said.
        references (`Sequence[Sequence[str]]`): Human captions of each picture.
        metrics (`Sequence[str]`): Among `"bleu"`, `"meteor"`, `"rouge_l"` and `"cider"`.
        tokenizer (`str`): `"ptb"`, the official one, needs Java, as does METEOR. `"words"` lowers the case and drops
            punctuation; its figures must not be compared with official ones.

    Returns:
        `dict` with `bleu_1` to `bleu_4`, `meteor`, `rouge_l` and `cider` as far as asked for. Official tables give
        them times 100.

    Raises:
        ValueError: for numbers that differ, a picture without references, an empty reference, an unknown metric or
            tokenizer, and where Java is needed and not there.
    """
    check_caption_metrics(metrics, tokenizer)
    check_as_many("predictions", predictions, "references", references)
    for row, captions in enumerate(references):
        if isinstance(captions, str) or not captions or not all(caption.strip() for caption in captions):
            raise ValueError(f"expected a list of captions that are not empty, got {captions!r} at {row}; mend it")
    said = tokenize([[caption] for caption in predictions], tokenizer)
    known = tokenize(references, tokenizer)
    scores = {}
    for metric in metrics:
        scores |= SCORERS[metric](known, said)
    return scores


def check_caption_metrics(metrics: Sequence[str], tokenizer: str) -> None:
    """
    Raises:
        ValueError: if a metric or the tokenizer is unknown, or needs Java and there is none.
    """
    if unknown := set(metrics) - set(METRICS):
        raise ValueError(f"expected metrics among {METRICS}, got {sorted(unknown)}")
    if tokenizer not in TOKENIZERS:
        raise ValueError(f"expected a tokenizer among {TOKENIZERS}, got {tokenizer!r}")
    if (tokenizer == "ptb" or "meteor" in metrics) and shutil.which("java") is None:
        raise ValueError(
            "expected Java for the PTB tokenizer and METEOR, found no java; install a runtime, such as Debian's "
            "default-jre-headless, or pass tokenizer='words' and leave METEOR out"
        )


def tokenize(captions: Sequence[Sequence[str]], tokenizer: str) -> dict[int, list[str]]:
    """Captions of each picture as words with single spaces, by the number of the picture."""
    if tokenizer == "words":
        return {row: [" ".join(WORD.findall(one.lower())) for one in group] for row, group in enumerate(captions)}
    # the tokenizer tells captions apart by lines, and Java knows more kinds of line ends than Python's "\n"
    lines = {row: [{"caption": " ".join(one.split())} for one in group] for row, group in enumerate(captions)}
    return PTBTokenizer().tokenize(lines)


def _bleu(known: dict, said: dict) -> dict[str, CaptionScore]:
    corpus, each = Bleu(4).compute_score(known, said, verbose=0)
    return {f"bleu_{n}": CaptionScore(float(corpus[n - 1]), np.array(each[n - 1])) for n in range(1, 5)}


def _meteor(known: dict, said: dict) -> dict[str, CaptionScore]:
    corpus, each = Meteor().compute_score(known, said)
    return {"meteor": CaptionScore(float(corpus), np.array(each))}


def _rouge(known: dict, said: dict) -> dict[str, CaptionScore]:
    corpus, each = Rouge().compute_score(known, said)
    return {"rouge_l": CaptionScore(float(corpus), np.array(each))}


def _cider(known: dict, said: dict) -> dict[str, CaptionScore]:
    corpus, each = Cider().compute_score(known, said)
    return {"cider": CaptionScore(float(corpus), np.array(each))}


SCORERS = {"bleu": _bleu, "meteor": _meteor, "rouge_l": _rouge, "cider": _cider}

__all__ = ["METRICS", "TOKENIZERS", "CaptionScore", "caption_scores", "check_caption_metrics", "tokenize"]
