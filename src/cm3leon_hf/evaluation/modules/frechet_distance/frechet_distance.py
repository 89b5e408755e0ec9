"""Fréchet distance, precision and recall of pictures, for `evaluate.load`; FID with the network `"inception"`."""

import datasets
import evaluate
import numpy as np

from cm3leon_hf.evaluation.features import load_network
from cm3leon_hf.evaluation.fid import feature_statistics, measure_frechet
from cm3leon_hf.evaluation.files import read_pictures
from cm3leon_hf.evaluation.precision_recall import precision_and_recall

DESCRIPTION = "Fréchet distance of two sets of pictures: FID as pytorch-fid computes it, or with any other network."
INPUTS = """
Args:
    predictions (list of pictures): Drawn ones.
    real (list of pictures): Real ones; as there may be more or fewer, they are no `references`.
    network, weights, clean: See `cm3leon_hf.evaluation.features.load_network`; pytorch-fid's Inception by default.
    precision_recall (`bool`): Whether to measure precision and recall, too.
    resamples (`int`): Of the bootstrap over the drawn pictures; 1 by default, which gives no useful interval.
Returns:
    `{"frechet_distance": float, "interval": (low, high)}`, the interval at 95 %; and `precision` and `recall`
"""


class FrechetDistance(evaluate.Metric):
    """Wraps [`~cm3leon_hf.evaluation.fid`] and [`~cm3leon_hf.evaluation.precision_recall`]."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=DESCRIPTION,
            citation="Heusel et al. 2017, arXiv 1706.08500",
            inputs_description=INPUTS,
            features=datasets.Features({"predictions": datasets.Image()}),
        )

    def _compute(
        self, predictions, real, network="inception", weights=None, clean=False, precision_recall=False, resamples=1
    ) -> dict:
        loaded = load_network(network, weights, clean=clean)
        drawn, shown = (np.concatenate(list(loaded.batches(read_pictures(images)))) for images in (predictions, real))
        measured = measure_frechet(drawn, feature_statistics([shown]), resamples)
        found = {"frechet_distance": measured.value, "interval": tuple(measured.interval())}
        if precision_recall:
            shares = precision_and_recall(drawn, shown)._asdict()
            found |= {name: float(values.mean()) for name, values in shares.items()}
        return found
