"""A vision trunk for CLIP that also sees shades: styles of drawing differ in palettes and in how areas are filled."""

import math

import torch
from timm.models import build_model_with_cfg, register_model
from timm.models.resnet import BasicBlock, ResNet
from torch import nn
from torch.nn import functional as F


class ShadeFeatures(nn.Module):
    """
    What shades a picture has and how they change, wherever they lie: a small network on each few pixels, and the mean.

    It sees Fourier features of colours (Tancik et al. 2020), which put shades one level of 255 apart far from each
    other, and how many levels the pixels to the right and below differ by, on a logarithmic scale. A network of plain
    colours learns both late, after it knows its pictures by heart.

    Args:
        dim (`int`): Width of the output.
        width (`int`): Of the network on pixels.
        octaves (`int`): Frequencies of each channel; with 6 the highest one turns by 45 degrees a level.
    """

    def __init__(self, dim: int, width: int = 64, octaves: int = 6):
        super().__init__()
        self.frequencies = [math.pi * 2**octave for octave in range(octaves)]
        self.pixels = nn.Sequential(
            nn.Conv2d(6 * octaves + 6, width, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(width, width, 1),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Conv2d(width, 2 * width, 1),
            nn.ReLU(),
        )
        self.whole = nn.Sequential(nn.LayerNorm(4 * width), nn.Linear(4 * width, 2 * width), nn.GELU())
        self.out = nn.Linear(2 * width, dim)
        nn.init.zeros_(self.out.weight)  # so that weights of the trunk without it begin where they were
        nn.init.zeros_(self.out.bias)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """
        Args:
            pixels (`torch.Tensor` of shape `(batch, 3, height, width)`): In [-1, 1], and in float32: bfloat16 has no
                room for all shades.

        Returns:
            `torch.Tensor` of shape `(batch, dim)`.
        """
        mean = self.pixels(self.describe(pixels)).mean(dim=(2, 3), dtype=torch.float32)
        found = torch.cat([mean, (mean + 1e-4).log()], dim=1)  # how much there is of something, and whether there is
        return self.out(self.whole(found))

    def describe(self, pixels: torch.Tensor) -> torch.Tensor:
        """What the network sees of each pixel, `(batch, 6 * octaves + 6, height, width)`."""
        turns = torch.cat([pixels * frequency for frequency in self.frequencies], dim=1)
        right, below = F.pad(pixels.diff(dim=3), (0, 1)), F.pad(pixels.diff(dim=2), (0, 0, 0, 1))
        levels = 255 / 2 * torch.cat([right, below], dim=1)
        return torch.cat([turns.sin(), turns.cos(), levels.sign() * levels.abs().log1p()], dim=1)


class ShadesResNet(ResNet):
    """timm's ResNet, to whose pooled features those of [`ShadeFeatures`] are added."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.shades = ShadeFeatures(self.num_features)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.forward_head(self.forward_features(x) + self.shades(x)[..., None, None])


@register_model
def resnet10t_shades(pretrained: bool = False, **kwargs) -> ShadesResNet:
    """timm's `resnet10t` with shades, for `timm_model_name` in an `open_clip_config.json`."""
    body = {"block": BasicBlock, "layers": (1, 1, 1, 1), "stem_width": 32, "stem_type": "deep_tiered", "avg_down": True}
    return build_model_with_cfg(ShadesResNet, "resnet10t", pretrained, **body | kwargs)
