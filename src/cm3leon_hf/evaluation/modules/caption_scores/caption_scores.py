"""BLEU, METEOR, ROUGE-L and CIDEr of captions, for `evaluate.load`."""

import datasets
import evaluate

from cm3leon_hf.evaluation.captions import METRICS, caption_scores

DESCRIPTION = "Captions against human ones, by pycocoevalcap: BLEU, METEOR, ROUGE-L and CIDEr."
INPUTS = """
Args:
    predictions (list of `str`): One caption for each picture.
    references (list of lists of `str`): Human captions of each picture.
    metrics, tokenizer: See `cm3leon_hf.evaluation.captions.caption_scores`.
Returns:
    `{"bleu_1": float, …, "cider": float}`
"""


class CaptionScores(evaluate.Metric):
    """Wraps [`~cm3leon_hf.evaluation.captions.caption_scores`]."""

    def _info(self) -> evaluate.MetricInfo:
        text = datasets.Value("string")
        return evaluate.MetricInfo(
            description=DESCRIPTION,
            citation="Chen et al. 2015, arXiv 1504.00325",
            inputs_description=INPUTS,
            features=datasets.Features({"predictions": text, "references": datasets.Sequence(text)}),
        )

    def _compute(self, predictions, references, metrics=METRICS, tokenizer="ptb") -> dict:
        scores = caption_scores(list(predictions), [list(group) for group in references], metrics, tokenizer)
        return {name: score.corpus for name, score in scores.items()}
