"""PatchGAN discriminator and its losses, for training a VQGAN."""

import torch
import torch.nn.functional as F
from torch import nn


class PatchDiscriminator(nn.Module):
    """
    Judges overlapping patches of an image (PatchGAN, Isola et al. 2017).

    Group normalisation takes the place of batch normalisation, so that real and drawn images, which pass apart, and
    replicas do not share statistics.

    Args:
        in_channels (`int`): Colour channels.
        base_channels (`int`): Channels of the first layer, a multiple of 8.
        num_layers (`int`): Layers of stride two; the patch grows with them.
    """

    def __init__(self, in_channels: int = 3, base_channels: int = 64, num_layers: int = 3):
        super().__init__()
        layers = [nn.Conv2d(in_channels, base_channels, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        width = base_channels
        for index in range(1, num_layers + 1):
            wider = min(2 * width, 8 * base_channels)
            stride = 2 if index < num_layers else 1
            layers += [nn.Conv2d(width, wider, 4, stride, 1, bias=False), nn.GroupNorm(8, wider), nn.LeakyReLU(0.2)]
            width = wider
        self.layers = nn.Sequential(*layers, nn.Conv2d(width, 1, 4, padding=1))

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """`(batch, channels, height, width)` pixels to `(batch, 1, h, w)` logits, high for real patches."""
        return self.layers(pixel_values)


def hinge_loss(real_logits: torch.Tensor, fake_logits: torch.Tensor) -> torch.Tensor:
    """The discriminator's hinge loss (taming's default), a scalar."""
    return 0.5 * (F.relu(1 - real_logits).mean() + F.relu(1 + fake_logits).mean())


def adaptive_weight(reconstruction: torch.Tensor, adversarial: torch.Tensor, last_layer: nn.Parameter) -> torch.Tensor:
    """
    Weight of the adversarial loss that balances both losses' gradients at the last layer (Esser et al. 2021, eq. 7).
    """
    wanted = torch.autograd.grad(reconstruction, last_layer, retain_graph=True)[0].norm()
    got = torch.autograd.grad(adversarial, last_layer, retain_graph=True)[0].norm()
    return (wanted / (got + 1e-4)).clamp(0, 1e4).detach()
