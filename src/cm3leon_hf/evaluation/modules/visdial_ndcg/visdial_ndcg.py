"""NDCG of the Visual Dialog challenge, for `evaluate.load`."""

import datasets
import evaluate

from cm3leon_hf.evaluation.visdial import visdial_ndcg

DESCRIPTION = "NDCG of ranked answer options, at as many places as a question has relevant options."
INPUTS = """
Args:
    predictions (list of lists of `float`): The model's score of each option.
    references (list of lists of `float`): The relevance of each option.
Returns:
    `{"ndcg": float}`, in [0, 1]
"""


class VisdialNdcg(evaluate.Metric):
    """Wraps [`~cm3leon_hf.evaluation.visdial.visdial_ndcg`]."""

    def _info(self) -> evaluate.MetricInfo:
        row = datasets.Sequence(datasets.Value("float64"))
        return evaluate.MetricInfo(
            description=DESCRIPTION,
            citation="Das et al. 2017, arXiv 1611.08669",
            inputs_description=INPUTS,
            features=datasets.Features({"predictions": row, "references": row}),
        )

    def _compute(self, predictions, references) -> dict:
        return {"ndcg": float(visdial_ndcg(list(predictions), list(references)).mean())}
