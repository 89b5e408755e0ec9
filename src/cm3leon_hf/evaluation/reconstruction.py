"""How much of a picture the image tokenizer keeps: PSNR, SSIM and rFID."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image

from .features import FeatureNetwork
from .fid import feature_statistics, measure_frechet
from .files import check_as_many
from .intervals import Measured, measure_mean

WANG = {"data_range": 255, "channel_axis": 2, "gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}


class ReconstructionScores(NamedTuple):
    """PSNR in dB and SSIM of each picture, `(pictures,)`."""

    psnr: np.ndarray
    ssim: np.ndarray


def reconstruction_scores(
    originals: Sequence[Image.Image], reconstructions: Sequence[Image.Image]
) -> ReconstructionScores:
    """
    PSNR and SSIM by scikit-image, of each picture, over its 8-bit RGB values.

    SSIM is that of Wang et al. (2004): a Gaussian window with a standard deviation of 1.5, cut at 11×11, without the
    pictures' borders, averaged over the three colours.

    Args:
        originals, reconstructions (`Sequence[PIL.Image.Image]`): In RGB, all of one size.

    Raises:
        ValueError: for numbers or sizes that differ.
        ImportError: naming what to install.
    """
    try:
        from skimage.metrics import peak_signal_noise_ratio, structural_similarity
    except ImportError as error:
        raise ImportError("PSNR and SSIM need scikit-image; pip install 'cm3leon_hf[eval]'") from error

    check_as_many("reconstructions", reconstructions, "originals", originals)
    sizes = {image.size for image in (*originals, *reconstructions)}
    if len(sizes) > 1:
        raise ValueError(f"expected pictures of one size, got {sorted(sizes)}; scale the originals as the model does")
    pairs = [tuple(np.asarray(image.convert("RGB")) for image in pair) for pair in zip(originals, reconstructions)]
    return ReconstructionScores(
        np.array([peak_signal_noise_ratio(*pair, data_range=255) for pair in pairs]),
        np.array([structural_similarity(*pair, **WANG) for pair in pairs]),
    )


def measure_reconstruction(
    originals: Sequence[Image.Image],
    reconstructions: Sequence[Image.Image],
    network: FeatureNetwork,
    resamples: int = 200,
    seed: int = 0,
) -> dict[str, Measured]:
    """
    `psnr`, `ssim` and `rfid`, each with its replicates.

    Args:
        originals, reconstructions: See [`reconstruction_scores`].
        network ([`~cm3leon_hf.evaluation.features.FeatureNetwork`]): Makes rFID's features.
        resamples, seed (`int`): See [`~cm3leon_hf.evaluation.intervals.bootstrap`].
    """
    scores = reconstruction_scores(originals, reconstructions)
    features = np.concatenate(list(network.batches(reconstructions)))
    reference = feature_statistics(network.batches(originals))
    measured = {name: measure_mean(values, resamples, seed) for name, values in scores._asdict().items()}
    return measured | {"rfid": measure_frechet(features, reference, resamples, seed)}


__all__ = ["ReconstructionScores", "measure_reconstruction", "reconstruction_scores"]
