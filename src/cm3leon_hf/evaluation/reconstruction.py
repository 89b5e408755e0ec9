"""How much of a picture the image tokenizer keeps: PSNR, SSIM and rFID."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image

from .features import FeatureNetwork
from .fid import feature_statistics, measure_frechet
from .files import batched, check_as_many
from .intervals import Measured, measure_mean

BATCH = 64


class ReconstructionScores(NamedTuple):
    """PSNR in dB and SSIM of each picture, `(pictures,)`."""

    psnr: np.ndarray
    ssim: np.ndarray


def reconstruction_scores(
    originals: Sequence[Image.Image], reconstructions: Sequence[Image.Image]
) -> ReconstructionScores:
    """
    PSNR and SSIM by torchmetrics, of each picture, over its 8-bit RGB values.

    SSIM has the Gaussian window of Wang et al. (2004): 11×11 with a standard deviation of 1.5.

    Args:
        originals, reconstructions (`Sequence[PIL.Image.Image]`): In RGB, all of one size.

    Raises:
        ValueError: for numbers or sizes that differ.
        ImportError: naming what to install.
    """
    try:
        from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure
    except ImportError as error:
        raise ImportError("PSNR and SSIM need torchmetrics; pip install 'cm3leon_hf[eval]'") from error

    check_as_many("reconstructions", reconstructions, "originals", originals)
    sizes = {image.size for image in (*originals, *reconstructions)}
    if len(sizes) > 1:
        raise ValueError(f"expected pictures of one size, got {sorted(sizes)}; scale the originals as the model does")
    psnr, ssim = [], []
    for pairs in batched(zip(reconstructions, originals), BATCH):
        drawn, real = (torch.stack([_pixels(image) for image in images]) for images in zip(*pairs))
        psnr.append(peak_signal_noise_ratio(drawn, real, data_range=255.0, reduction="none", dim=(1, 2, 3)))
        ssim.append(structural_similarity_index_measure(drawn, real, data_range=255.0, reduction="none"))
    return ReconstructionScores(torch.cat(psnr).numpy(), torch.cat(ssim).numpy())


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


def _pixels(image: Image.Image) -> torch.Tensor:
    """`(3, height, width)` with values from 0 to 255, in float64."""
    return torch.from_numpy(np.array(image.convert("RGB"), np.float64)).permute(2, 0, 1)


__all__ = ["ReconstructionScores", "measure_reconstruction", "reconstruction_scores"]
