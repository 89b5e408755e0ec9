"""Configuration of the VQGAN image tokenizer."""

import logging

import torch
from transformers import PreTrainedConfig

logger = logging.getLogger(__name__)

EVERY_MODEL_HAS = {  # what transformers hands to a configuration besides its fields
    *("attn_implementation", "auto_map", "experts_implementation", "model_type", "name_or_path", "output_attentions"),
    *("quantization_config", "torch_dtype", "vocab_size"),
}


def check_fields(config: PreTrainedConfig, others: dict) -> None:
    """
    Checks what a configuration was given, before transformers makes its own of it.

    Args:
        config (`PreTrainedConfig`): With its fields.
        others (`dict`): What it got besides them; a warning names what transformers does not add itself.

    Raises:
        ValueError: for a dtype that torch does not have.
    """
    if unknown := sorted(key for key in others.keys() - EVERY_MODEL_HAS if not key.startswith("_")):
        logger.warning(
            f"expected the fields of {type(config).__name__}, got also {', '.join(unknown)}, which change nothing; "
            "if a newer version has written the configuration, update cm3leon_hf"
        )
    if isinstance(config.dtype, str) and not isinstance(getattr(torch, config.dtype, None), torch.dtype):
        raise ValueError(f"expected a dtype of torch, such as 'bfloat16', got {config.dtype!r}; write its full name")


class CM3LeonVQGANConfig(PreTrainedConfig):
    r"""
    Configuration of a [`CM3LeonVQGAN`], the image tokenizer of CM3Leon (paper, section 2.1; Gafni et al. 2022).

    The defaults are the paper's: a 256×256 image becomes 32×32 = 1024 codes out of 8192.

    Args:
        resolution (`int`): Height and width of the images in pixels.
        in_channels (`int`): Colour channels of the images.
        base_channels (`int`): Channels at full resolution.
        channel_multiplier (`tuple[int]`): Channels of each level, in units of `base_channels`. The resolution is
            halved between two levels, so that `n` levels give a downsampling of `2 ** (n - 1)`.
        num_res_blocks (`int`): Residual blocks of each encoder level; a decoder level has one more.
        attn_resolutions (`tuple[int]`): Resolutions, in pixels, whose levels have self-attention.
        latent_channels (`int`): Channels between the convolutions and the quantiser's projections.
        embed_dim (`int`): Size of a codebook vector.
        num_embeddings (`int`): Number of codebook vectors.
        gumbel (`bool`): Whether a code is the likeliest by learned logits instead of the nearest codebook vector, as in
            the Gumbel VQGAN of taming-transformers: for its weights (`cm3leon convert`), not for training.
        norm_num_groups (`int`): Groups of the group normalisation.
        commitment_cost (`float`): Weight of the commitment loss (beta of VQ-VAE).

    Raises:
        ValueError: if the levels do not divide the resolution, the groups do not divide the channels, or `dtype` is
            unknown.
    """

    model_type = "cm3leon_vqgan"

    resolution: int = 256
    in_channels: int = 3
    base_channels: int = 128
    channel_multiplier: list[int] | tuple[int, ...] = (1, 1, 2, 4)
    num_res_blocks: int = 2
    attn_resolutions: list[int] | tuple[int, ...] = (32,)
    latent_channels: int = 256
    embed_dim: int = 256
    num_embeddings: int = 8192
    gumbel: bool = False
    norm_num_groups: int = 32
    commitment_cost: float = 0.25

    def __post_init__(self, **kwargs):
        check_fields(self, kwargs)
        super().__post_init__(**kwargs)
        if self.resolution % self.downsampling:
            raise ValueError(
                f"expected a resolution that {len(self.channel_multiplier)} levels can halve down to whole pixels, "
                f"got {self.resolution}; use a multiple of {self.downsampling}"
            )
        uneven = [m for m in self.channel_multiplier if (m * self.base_channels) % self.norm_num_groups]
        if uneven:
            raise ValueError(
                f"expected norm_num_groups to divide the channels of every level, got {self.norm_num_groups} groups "
                f"for {uneven[0] * self.base_channels} channels; choose a divisor"
            )

    @property
    def downsampling(self) -> int:
        """Pixels along one side of a code's cell."""
        return 2 ** (len(self.channel_multiplier) - 1)

    @property
    def grid_size(self) -> int:
        """Codes along one side of an image."""
        return self.resolution // self.downsampling


__all__ = ["CM3LeonVQGANConfig"]
