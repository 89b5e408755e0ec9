"""VQGAN image tokenizer: pixels to codes and back.

The architecture and the parameter names are those of taming-transformers (Esser et al. 2021), which Make-A-Scene
(Gafni et al. 2022) and so CM3Leon use: residual blocks, self-attention at the lowest resolution, and a
straight-through vector quantiser.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.utils import ModelOutput

from .configuration_vqgan import CM3LeonVQGANConfig


@dataclass
class CM3LeonVQGANOutput(ModelOutput):
    """
    Output of [`CM3LeonVQGAN.forward`].

    Args:
        loss (`torch.Tensor`): Codebook and commitment loss, a scalar.
        pixel_values (`torch.Tensor` of shape `(batch, channels, height, width)`): Reconstruction, about [-1, 1].
        codes (`torch.LongTensor` of shape `(batch, grid_height * grid_width)`): Chosen codes, in raster order.
        latents (`torch.Tensor` of shape `(batch, embed_dim, grid_height, grid_width)`): Encoder output before
            quantisation.
    """

    loss: torch.Tensor | None = None
    pixel_values: torch.Tensor | None = None
    codes: torch.LongTensor | None = None
    latents: torch.Tensor | None = None


def group_norm(config: CM3LeonVQGANConfig, channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(config.norm_num_groups, channels, eps=1e-6)


class ResnetBlock(nn.Module):
    def __init__(self, config: CM3LeonVQGANConfig, in_channels: int, out_channels: int):
        super().__init__()
        self.norm1 = group_norm(config, in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = group_norm(config, out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        if in_channels != out_channels:
            self.nin_shortcut = nn.Conv2d(in_channels, out_channels, 1)
        else:
            self.nin_shortcut = nn.Identity()

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        residual = self.nin_shortcut(hidden_states)
        hidden_states = self.conv1(F.silu(self.norm1(hidden_states)))
        hidden_states = self.conv2(F.silu(self.norm2(hidden_states)))
        return residual + hidden_states


class AttnBlock(nn.Module):
    """Single-head self-attention over all positions."""

    def __init__(self, config: CM3LeonVQGANConfig, channels: int):
        super().__init__()
        self.norm = group_norm(config, channels)
        self.q = nn.Conv2d(channels, channels, 1)
        self.k = nn.Conv2d(channels, channels, 1)
        self.v = nn.Conv2d(channels, channels, 1)
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        normed = self.norm(hidden_states)
        query, key, value = (proj(normed).flatten(2).transpose(1, 2) for proj in (self.q, self.k, self.v))
        attended = F.scaled_dot_product_attention(query, key, value)
        return hidden_states + self.proj_out(attended.transpose(1, 2).reshape(hidden_states.shape))


class Downsample(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.conv(F.pad(hidden_states, (0, 1, 0, 1)))  # asymmetric, as in taming


class Upsample(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.conv(F.interpolate(hidden_states, scale_factor=2.0, mode="nearest"))


class Level(nn.Module):
    """The blocks of one resolution; `attn` is empty without attention."""

    def __init__(self, config, in_channels: int, out_channels: int, num_blocks: int, resolution: int):
        super().__init__()
        widths = [in_channels] + [out_channels] * num_blocks
        self.block = nn.ModuleList(ResnetBlock(config, *pair) for pair in zip(widths, widths[1:]))
        has_attention = resolution in config.attn_resolutions
        self.attn = nn.ModuleList(AttnBlock(config, out_channels) for _ in range(num_blocks if has_attention else 0))

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        for index, block in enumerate(self.block):
            hidden_states = block(hidden_states)
            if len(self.attn):
                hidden_states = self.attn[index](hidden_states)
        return hidden_states


class Mid(nn.Module):
    def __init__(self, config: CM3LeonVQGANConfig, channels: int):
        super().__init__()
        self.block_1 = ResnetBlock(config, channels, channels)
        self.attn_1 = AttnBlock(config, channels)
        self.block_2 = ResnetBlock(config, channels, channels)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.block_2(self.attn_1(self.block_1(hidden_states)))


class Encoder(nn.Module):
    def __init__(self, config: CM3LeonVQGANConfig):
        super().__init__()
        widths = [config.base_channels * m for m in (1, *config.channel_multiplier)]
        self.conv_in = nn.Conv2d(config.in_channels, widths[0], 3, padding=1)
        self.down = nn.ModuleList()
        for i, pair in enumerate(zip(widths, widths[1:])):
            level = Level(config, *pair, config.num_res_blocks, config.resolution // 2**i)
            level.downsample = Downsample(pair[1]) if i < len(widths) - 2 else nn.Identity()
            self.down.append(level)
        self.mid = Mid(config, widths[-1])
        self.norm_out = group_norm(config, widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], config.latent_channels, 3, padding=1)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        hidden_states = self.conv_in(pixel_values)
        for level in self.down:
            hidden_states = level.downsample(level(hidden_states))
        return self.conv_out(F.silu(self.norm_out(self.mid(hidden_states))))


class Decoder(nn.Module):
    def __init__(self, config: CM3LeonVQGANConfig):
        super().__init__()
        widths = [config.base_channels * m for m in config.channel_multiplier]
        self.conv_in = nn.Conv2d(config.latent_channels, widths[-1], 3, padding=1)
        self.mid = Mid(config, widths[-1])
        self.up = nn.ModuleList()
        for i, width in enumerate(widths):
            in_channels = widths[min(i + 1, len(widths) - 1)]
            level = Level(config, in_channels, width, config.num_res_blocks + 1, config.resolution // 2**i)
            level.upsample = Upsample(width) if i > 0 else nn.Identity()
            self.up.append(level)
        self.norm_out = group_norm(config, widths[0])
        self.conv_out = nn.Conv2d(widths[0], config.in_channels, 3, padding=1)

    def forward(self, latents: torch.Tensor) -> torch.Tensor:
        hidden_states = self.mid(self.conv_in(latents))
        for level in reversed(self.up):  # `up` is indexed by resolution, highest first, as in taming
            hidden_states = level.upsample(level(hidden_states))
        return self.conv_out(F.silu(self.norm_out(hidden_states)))


class VectorQuantizer(nn.Module):
    """
    Nearest codebook vector, with a straight-through gradient (van den Oord et al. 2017).

    A code may cost something on top of its squared distance: training with an entropy weight sets `rates` so that rare
    codes must be worth their bits (entropy-constrained vector quantisation, Chou et al. 1989). Zeros are plain VQ. With
    `config.gumbel` the largest of learned logits decides instead of the distance.
    """

    def __init__(self, config: CM3LeonVQGANConfig):
        super().__init__()
        self.commitment_cost = config.commitment_cost
        self.embedding = nn.Embedding(config.num_embeddings, config.embed_dim)
        self.register_buffer("rates", torch.zeros(config.num_embeddings))
        self.proj = nn.Conv2d(config.embed_dim, config.num_embeddings, 1) if config.gumbel else None

    def nearest(self, latents: torch.Tensor) -> torch.LongTensor:
        """`(batch, embed_dim, h, w)` latents to `(batch, h * w)` codes, computed in float32, without noise."""
        if self.proj is not None:
            logits = F.conv2d(latents.float(), self.proj.weight.float(), self.proj.bias.float())
            return logits.flatten(2).argmax(1)
        flat = latents.flatten(2).transpose(1, 2).float()
        codebook = self.embedding.weight.float()
        # |z - e|² without |z|², which is the same for every e
        return (codebook.square().sum(1) + self.rates.float() - 2 * flat @ codebook.T).argmin(-1)

    def lookup(self, codes: torch.LongTensor, grid: tuple[int, int]) -> torch.Tensor:
        """`(batch, h * w)` codes to `(batch, embed_dim, h, w)` codebook vectors."""
        return self.embedding(codes).transpose(1, 2).unflatten(2, grid)

    def forward(self, latents: torch.Tensor) -> tuple[torch.Tensor, torch.LongTensor, torch.Tensor]:
        with torch.autocast(latents.device.type, enabled=False):
            latents = latents.float()
            codes = self.nearest(latents.detach())
            quantized = self.lookup(codes, latents.shape[2:]).float()
            commitment = F.mse_loss(latents, quantized.detach())
            loss = F.mse_loss(quantized, latents.detach()) + self.commitment_cost * commitment
            return latents + (quantized - latents).detach(), codes, loss


class CM3LeonVQGAN(PreTrainedModel):
    """
    VQGAN image tokenizer (paper, section 2.1): `encode` turns pixels into codes, `decode` codes into pixels.

    Example:

    ```python
    >>> vqgan = CM3LeonVQGAN(CM3LeonVQGANConfig(resolution=64, base_channels=32, attn_resolutions=[8]))
    >>> codes = vqgan.encode(torch.rand(2, 3, 64, 64) * 2 - 1)
    >>> codes.shape, vqgan.decode(codes).shape
    (torch.Size([2, 64]), torch.Size([2, 3, 64, 64]))
    ```
    """

    config: CM3LeonVQGANConfig
    config_class = CM3LeonVQGANConfig
    base_model_prefix = "vqgan"
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    _no_split_modules = ["ResnetBlock", "AttnBlock"]

    def __init__(self, config: CM3LeonVQGANConfig):
        super().__init__(config)
        self.encoder = Encoder(config)
        self.quant_conv = nn.Conv2d(config.latent_channels, config.embed_dim, 1)
        self.quantize = VectorQuantizer(config)
        self.post_quant_conv = nn.Conv2d(config.embed_dim, config.latent_channels, 1)
        self.decoder = Decoder(config)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Conv2d):  # PyTorch's default, which taming keeps
            init.kaiming_uniform_(module.weight, a=math.sqrt(5))
            bound = 1 / math.sqrt(module.weight[0].numel())
            init.uniform_(module.bias, -bound, bound)
        elif isinstance(module, nn.Embedding):
            bound = 1 / self.config.num_embeddings
            init.uniform_(module.weight, -bound, bound)
        elif isinstance(module, VectorQuantizer):
            init.zeros_(module.rates)  # checkpoints of others have none
        else:
            super()._init_weights(module)

    def latents(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Pixels `(batch, channels, height, width)` in [-1, 1] to latents `(batch, embed_dim, h, w)`."""
        return self.quant_conv(self.encoder(pixel_values))

    @torch.no_grad()
    def encode(self, pixel_values: torch.Tensor) -> torch.LongTensor:
        """
        Turns images into codes.

        Args:
            pixel_values (`torch.Tensor` of shape `(batch, channels, resolution, resolution)`): Pixels in [-1, 1].

        Returns:
            `torch.LongTensor` of shape `(batch, grid_size ** 2)`, in raster order, each in [0, num_embeddings).

        Raises:
            ValueError: if the shape is another, or a pixel is not finite.
        """
        expected = (self.config.in_channels, self.config.resolution, self.config.resolution)
        if pixel_values.ndim != 4 or tuple(pixel_values.shape[1:]) != expected:
            raise ValueError(
                f"expected pixel_values of shape (batch, {', '.join(map(str, expected))}), got "
                f"{tuple(pixel_values.shape)}; resize the images with the processor"
            )
        if not torch.isfinite(pixel_values).all():
            raise ValueError("expected finite pixel values in [-1, 1], got NaN or infinity; check the image's source")
        return self.quantize.nearest(self.latents(pixel_values.to(self.device, self.dtype)))

    @torch.no_grad()
    def decode(self, codes: torch.LongTensor) -> torch.Tensor:
        """
        Turns codes into images.

        Args:
            codes (`torch.LongTensor` of shape `(batch, grid_size ** 2)`): Codes, in raster order.

        Returns:
            `torch.Tensor` of shape `(batch, channels, resolution, resolution)`: pixels, clamped to [-1, 1].

        Raises:
            ValueError: if the number of codes is not one image's, or a code lies outside the codebook.
        """
        length = self.config.grid_size**2
        if codes.ndim != 2 or codes.shape[1] != length:
            raise ValueError(
                f"expected codes of shape (batch, {length}), a grid of {self.config.grid_size}×{self.config.grid_size}"
                f", got {tuple(codes.shape)}; encode the image with this VQGAN"
            )
        if codes.numel() and not (codes.min() >= 0 and codes.max() < self.config.num_embeddings):
            raise ValueError(
                f"expected codes in [0, {self.config.num_embeddings}), got {codes.min().item()} to "
                f"{codes.max().item()}; these codes come from another VQGAN, or are vocabulary ids"
            )
        grid = (self.config.grid_size, self.config.grid_size)
        quantized = self.quantize.lookup(codes.to(self.device), grid)
        return self.decoder(self.post_quant_conv(quantized)).clamp(-1, 1)

    def forward(self, pixel_values: torch.Tensor, return_dict: bool | None = None) -> CM3LeonVQGANOutput | tuple:
        """
        Reconstructs images, for training: gradients pass the quantiser straight through.

        Args:
            pixel_values (`torch.Tensor` of shape `(batch, channels, resolution, resolution)`): Pixels in [-1, 1].
        """
        latents = self.latents(pixel_values)
        quantized, codes, loss = self.quantize(latents)
        reconstruction = self.decoder(self.post_quant_conv(quantized))
        output = CM3LeonVQGANOutput(loss=loss, pixel_values=reconstruction, codes=codes, latents=latents)
        return output if return_dict is not False else output.to_tuple()


__all__ = ["CM3LeonVQGAN", "CM3LeonVQGANOutput"]
