"""PSNR, SSIM and rFID of what an image tokenizer keeps of pictures, for `evaluate.load`."""

import datasets
import evaluate

from cm3leon_hf.evaluation.features import load_network
from cm3leon_hf.evaluation.files import read_pictures
from cm3leon_hf.evaluation.reconstruction import measure_reconstruction

DESCRIPTION = "How much of pictures an image tokenizer keeps: PSNR and SSIM by scikit-image, and rFID."
INPUTS = """
Args:
    predictions (list of pictures): Reconstructions.
    references (list of pictures): Originals, of the same size.
    network, weights, clean: See `cm3leon_hf.evaluation.features.load_network`; pytorch-fid's Inception by default.
Returns:
    `{"psnr": float, "ssim": float, "rfid": float}`
"""


class ReconstructionQuality(evaluate.Metric):
    """Wraps [`~cm3leon_hf.evaluation.reconstruction.measure_reconstruction`]."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=DESCRIPTION,
            citation="Wang et al. 2004, doi 10.1109/TIP.2003.819861; Heusel et al. 2017, arXiv 1706.08500",
            inputs_description=INPUTS,
            features=datasets.Features({"predictions": datasets.Image(), "references": datasets.Image()}),
        )

    def _compute(self, predictions, references, network="inception", weights=None, clean=False) -> dict:
        originals, drawn = (list(read_pictures(images)) for images in (references, predictions))
        measured = measure_reconstruction(originals, drawn, load_network(network, weights, clean=clean), resamples=1)
        return {name: one.value for name, one in measured.items()}
