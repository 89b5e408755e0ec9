"""Fréchet distance of pictures, for `evaluate.load`; FID with the network `"inception"`."""

import datasets
import evaluate

from cm3leon_hf.evaluation.features import load_network
from cm3leon_hf.evaluation.fid import feature_statistics, frechet_distance
from cm3leon_hf.evaluation.files import read_pictures

DESCRIPTION = "Fréchet distance of two sets of pictures: FID as pytorch-fid computes it, or with any other network."
INPUTS = """
Args:
    predictions (list of pictures): Drawn ones.
    real (list of pictures): Real ones; as there may be more or fewer, they are no `references`.
    network, weights, clean: See `cm3leon_hf.evaluation.features.load_network`; pytorch-fid's Inception by default.
Returns:
    `{"frechet_distance": float}`
"""


class FrechetDistance(evaluate.Metric):
    """Wraps [`~cm3leon_hf.evaluation.fid.frechet_distance`]."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=DESCRIPTION,
            citation="Heusel et al. 2017, arXiv 1706.08500",
            inputs_description=INPUTS,
            features=datasets.Features({"predictions": datasets.Image()}),
        )

    def _compute(self, predictions, real, network="inception", weights=None, clean=False) -> dict:
        loaded = load_network(network, weights, clean=clean)
        statistics = [feature_statistics(loaded.batches(read_pictures(images))) for images in (predictions, real)]
        return {"frechet_distance": frechet_distance(*statistics)}
