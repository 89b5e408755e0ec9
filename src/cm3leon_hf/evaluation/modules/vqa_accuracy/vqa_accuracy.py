"""Accuracy of VQA v2, OKVQA and VizWiz, for `evaluate.load`."""

import datasets
import evaluate

from cm3leon_hf.evaluation.vqa import vizwiz_scores, vqa_accuracy

DESCRIPTION = "Accuracy by the official protocol of VQA v2: ten answers, each left out once, official normalisation."
INPUTS = """
Args:
    predictions (list of `str`): One answer for each question.
    references (list of lists of `str`): Ten people's answers to each question.
    answer_types (list of `str`, optional): VizWiz's; with them the result has the accuracy of each type, and F1 and
        average precision of unanswerable questions.
Returns:
    `{"accuracy": float}`, in [0, 1]
"""


class VqaAccuracy(evaluate.Metric):
    """Wraps [`~cm3leon_hf.evaluation.vqa`]."""

    def _info(self) -> evaluate.MetricInfo:
        text = datasets.Value("string")
        return evaluate.MetricInfo(
            description=DESCRIPTION,
            citation="Antol et al. 2015, arXiv 1505.00468; Gurari et al. 2018, arXiv 1802.08218",
            inputs_description=INPUTS,
            features=datasets.Features({"predictions": text, "references": datasets.Sequence(text)}),
        )

    def _compute(self, predictions, references, answer_types=None) -> dict:
        predictions, references = list(predictions), [list(group) for group in references]
        if answer_types is None:
            return {"accuracy": float(vqa_accuracy(predictions, references).mean())}
        scores = vizwiz_scores(predictions, references, answer_types)
        return scores._asdict() | {"accuracy": float(scores.accuracy.mean())}
