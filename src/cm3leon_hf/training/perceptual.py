"""Perceptual distance over the features of any timm backbone."""

import torch
import torch.nn.functional as F
from torch import nn


class PerceptualLoss(nn.Module):
    """
    Mean squared distance between unit-normalised feature maps of a frozen backbone (as LPIPS, without its weights).

    Args:
        backbone (`str`): A timm model with `features_only`, such as `"vgg16.tv_in1k"`.
        pretrained (`bool`): Whether timm loads its published weights.

    Raises:
        ImportError: without timm.
    """

    def __init__(self, backbone: str, pretrained: bool = True):
        super().__init__()
        try:
            import timm
        except ImportError as error:
            raise ImportError("a perceptual loss needs timm: pip install 'cm3leon_hf[train]'") from error
        self.features = (
            timm.create_model(backbone, pretrained=pretrained, features_only=True).eval().requires_grad_(False)
        )
        mean, std = (torch.tensor(self.features.default_cfg[key]).view(1, 3, 1, 1) for key in ("mean", "std"))
        self.register_buffer("mean", mean)
        self.register_buffer("std", std)

    def train(self, mode: bool = True) -> "PerceptualLoss":
        return super().train(False)  # frozen: batch statistics must not move

    def forward(self, first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
        """Distance of two `(batch, 3, height, width)` images in [-1, 1], a scalar."""
        pairs = zip(self._maps(first), self._maps(second))
        return torch.stack([F.mse_loss(a, b) * a.shape[1] for a, b in pairs]).mean()

    def _maps(self, pixel_values: torch.Tensor) -> list[torch.Tensor]:
        return [F.normalize(m, dim=1) for m in self.features((pixel_values / 2 + 0.5 - self.mean) / self.std)]
