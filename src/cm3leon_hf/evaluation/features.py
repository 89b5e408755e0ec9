"""Feature networks by name: pytorch-fid's Inception, any CLIP of open_clip, any model of timm."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from os import PathLike
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from ..retrieval.encoder import CLIPEncoder, fingerprint
from .fid import FeatureStatistics, feature_statistics
from .files import batched, content_hash, read_pictures

INCEPTION, OPEN_CLIP, TIMM = "inception", "open_clip:", "timm:"
INCEPTION_SIZE = 299
BATCH = 64


class FeatureNetwork:
    """
    A frozen network that turns pictures into features.

    Args:
        name (`str`): What a report calls it: the network, its resizing and the fingerprint of its weights.
        forward (`Callable`): Pixels `(batch, 3, height, width)` to features `(batch, dimension)`.
        transform (`Callable`): A picture to pixels.
        device (`torch.device`): Where it runs.
    """

    def __init__(self, name: str, forward: Callable, transform: Callable, device: torch.device):
        self.name, self.forward, self.transform, self.device = name, forward, transform, device

    @torch.no_grad()
    def __call__(self, images: Sequence[Image.Image]) -> np.ndarray:
        """Features `(images, dimension)` in float32 of pictures that one batch can hold, all of one size."""
        pixels = torch.stack([self.transform(image) for image in images])
        return self.forward(pixels.to(self.device)).float().cpu().numpy()

    def batches(self, images: Iterable[Image.Image], batch_size: int = BATCH) -> Iterator[np.ndarray]:
        """Features of many pictures, a batch at a time."""
        return map(self, batched(images, batch_size))


def load_network(
    name: str = INCEPTION, weights: str | None = None, device: str | torch.device | None = None, clean: bool = False
) -> FeatureNetwork:
    """
    A feature network by name.

    - `"inception"`: pytorch-fid's, with its weights. The network scales pictures to 299×299 itself, without
      antialiasing, as in most published figures; with `clean`, Pillow's bicubic filter does it before, in floats and
      with antialiasing, as Parmar et al. (2022) recommend.
    - `"open_clip:NAME"`: a CLIP's image features, not normalised, with open_clip's own preprocessing.
    - `"timm:NAME"`: a model of timm without its head, with timm's own preprocessing.

    Args:
        name (`str`): As above; `open_clip:local-dir:FOLDER` and `timm:local-dir:FOLDER` take local folders.
        weights (`str`, *optional*): open_clip's name of the weights, or a file, for open_clip and timm.
        device (`str` or `torch.device`, *optional*): The accelerator when there is one, by default.
        clean (`bool`): See above.

    Raises:
        ValueError: for an unknown name, `clean` with another network than Inception, and weights that cannot be had.
        ImportError: naming what to install.
    """
    device = torch.device(device or torch.accelerator.current_accelerator(check_available=True) or "cpu")
    if name == INCEPTION:
        return _inception(device, clean)
    if clean:
        raise ValueError(f"expected clean resizing with {INCEPTION!r}, got {name!r}, which resizes its own way")
    if name.startswith(OPEN_CLIP):
        return _open_clip(name.removeprefix(OPEN_CLIP), weights, device)
    if name.startswith(TIMM):
        return _timm(name.removeprefix(TIMM), weights, device)
    raise ValueError(f"expected {INCEPTION!r}, '{OPEN_CLIP}NAME' or '{TIMM}NAME', got {name!r}")


def cached_statistics(
    images: Iterable, network: FeatureNetwork, folder: str | PathLike, skip_broken: bool = False
) -> FeatureStatistics:
    """
    Statistics of pictures, kept in a file named by the network and the pictures' content.

    Args:
        images (`Iterable`): What [`~cm3leon_hf.evaluation.files.read_pictures`] takes; it is read twice.
        network ([`FeatureNetwork`]): Makes the features.
        folder (path): Where the files lie.
        skip_broken (`bool`): Whether to leave out what cannot be read.

    Raises:
        ValueError: for a picture that cannot be read, fewer than two, or a damaged file.
    """
    path = Path(folder) / f"{content_hash(read_pictures(images, skip_broken), network.name)}.safetensors"
    if not path.exists():
        feature_statistics(network.batches(read_pictures(images, skip_broken))).save(path)
    return FeatureStatistics.load(path)


def clean_pixels(image: Image.Image) -> torch.Tensor:
    """A picture in [0, 1], `(3, 299, 299)`, scaled by Pillow's bicubic filter in floats."""
    size = (INCEPTION_SIZE, INCEPTION_SIZE)
    channels = [Image.fromarray(channel) for channel in np.asarray(image, np.float32).transpose(2, 0, 1)]
    scaled = np.stack([np.asarray(channel.resize(size, Image.Resampling.BICUBIC)) for channel in channels])
    return torch.from_numpy(scaled.clip(0, 255) / 255)


def _inception(device: torch.device, clean: bool) -> FeatureNetwork:
    try:
        from pytorch_fid.inception import FID_WEIGHTS_URL, InceptionV3
    except ImportError as error:
        raise ImportError("FID needs pytorch-fid; pip install 'cm3leon_hf[eval]'") from error
    from torchvision.transforms.functional import to_tensor

    try:
        model = InceptionV3([InceptionV3.BLOCK_INDEX_BY_DIM[2048]], resize_input=not clean).eval().to(device)
    except OSError as error:
        folder = Path(torch.hub.get_dir()) / "checkpoints"
        raise ValueError(
            f"expected pytorch-fid's weights, could not fetch them: {error}; put {Path(FID_WEIGHTS_URL).name} into "
            f"{folder}, or choose another feature network"
        ) from error
    resizing = "Pillow bicubic" if clean else "bilinear without antialiasing"
    name = f"pytorch-fid Inception, {resizing}@{fingerprint(model)}"
    return FeatureNetwork(
        name, lambda pixels: model(pixels)[0].flatten(1), clean_pixels if clean else to_tensor, device
    )


def _open_clip(name: str, weights: str | None, device: torch.device) -> FeatureNetwork:
    encoder = CLIPEncoder(name, weights, device, torch.float32)
    return FeatureNetwork(f"{OPEN_CLIP}{encoder.name}", encoder.model.encode_image, encoder.transform, device)


def _timm(name: str, weights: str | None, device: torch.device) -> FeatureNetwork:
    try:
        import timm
    except ImportError as error:
        raise ImportError("timm's features need timm; pip install 'cm3leon_hf[eval]'") from error

    overlay = {"file": weights} if weights else None
    model = timm.create_model(name, pretrained=True, num_classes=0, pretrained_cfg_overlay=overlay)
    model = model.eval().requires_grad_(False).to(device)
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
    return FeatureNetwork(f"{TIMM}{Path(name).name}@{fingerprint(model)}", model, transform, device)


__all__ = ["FeatureNetwork", "cached_statistics", "load_network"]
