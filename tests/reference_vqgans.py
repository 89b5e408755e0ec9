"""The networks that conversions are tested against, written from their papers and under their weights' names.

Esser et al. 2021 (taming-transformers, and so Chameleon) and Sun et al. 2024 (LlamaGen) share the layers and differ in
names, in the order of the decoder's levels, in where attention stands, and in how codes are chosen.
"""

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import nn


class Block(nn.Module):
    def __init__(self, width: int, out: int):
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(32, width, 1e-6), nn.GroupNorm(32, out, 1e-6)
        self.conv1, self.conv2 = nn.Conv2d(width, out, 3, padding=1), nn.Conv2d(out, out, 3, padding=1)
        if width != out:
            self.nin_shortcut = nn.Conv2d(width, out, 1)

    def forward(self, x):
        h = self.norm1(x)
        h = self.norm2(self.conv1(h * h.sigmoid()))
        return (self.nin_shortcut(x) if "nin_shortcut" in self._modules else x) + self.conv2(h * h.sigmoid())


class Attention(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.norm = nn.GroupNorm(32, width, 1e-6)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(width, width, 1) for _ in range(4))

    def forward(self, x):
        h = self.norm(x)
        q, k, v = self.q(h).flatten(2), self.k(h).flatten(2), self.v(h).flatten(2)
        weights = (q.transpose(1, 2) @ k / q.shape[1] ** 0.5).softmax(2)
        return x + self.proj_out((v @ weights.transpose(1, 2)).view_as(x))


class Resampling(nn.Module):
    def __init__(self, width: int, up: bool):
        super().__init__()
        self.up, self.conv = up, nn.Conv2d(width, width, 3, stride=1 if up else 2, padding=1 if up else 0)

    def forward(self, x):
        return self.conv(x.repeat_interleave(2, 2).repeat_interleave(2, 3) if self.up else F.pad(x, (0, 1, 0, 1)))


class Level(nn.Module):
    def __init__(self, widths: list[int], attended: bool, resampling: str | None, llamagen: bool):
        super().__init__()
        self.names = ["res" if llamagen else "block", resampling]
        setattr(self, self.names[0], nn.ModuleList(Block(*pair) for pair in pairwise(widths)))
        self.attn = nn.ModuleList(Attention(widths[-1]) for _ in widths[1:] if attended)
        if resampling:
            setattr(self, resampling, Resampling(widths[-1], up=resampling == "upsample"))

    def forward(self, x):
        for index, block in enumerate(getattr(self, self.names[0])):
            x = self.attn[index](block(x)) if len(self.attn) else block(x)
        return getattr(self, self.names[1])(x) if self.names[1] else x


class Coder(nn.Module):
    """Encoder or decoder, its levels in the order of their use in `levels`."""

    def __init__(self, first: int, widths: list[int], last: int, encodes: bool, attended: list[bool], llamagen: bool):
        super().__init__()
        inner = widths[-1]
        self.conv_in = nn.Conv2d(first, widths[0] if encodes else inner, 3, padding=1)
        down, count = len(widths) - 1, 1 if encodes else 2
        befores = [widths[0], *widths[:-1]] if encodes else [*widths[1:], inner]
        chains = [[before] + [width] * count for before, width in zip(befores, widths)]
        names = [
            None if i == (down if encodes else 0) else ("downsample" if encodes else "upsample")
            for i in range(down + 1)
        ]
        levels = [Level(chain, a, name, llamagen) for chain, a, name in zip(chains, attended, names)]
        self.home = "conv_blocks" if llamagen else ("down" if encodes else "up")
        setattr(self, self.home, nn.ModuleList(reversed(levels) if llamagen and not encodes else levels))
        self.encodes, self.llamagen = encodes, llamagen
        middle = [Block(inner, inner), Attention(inner), Block(inner, inner)]
        named = dict(zip(("block_1", "attn_1", "block_2"), middle))
        self.mid = nn.ModuleList(middle) if llamagen else nn.ModuleDict(named)
        self.norm_out = nn.GroupNorm(32, inner if encodes else widths[0], 1e-6)
        self.conv_out = nn.Conv2d(inner if encodes else widths[0], last, 3, padding=1)

    def forward(self, x):
        levels = list(getattr(self, self.home))
        levels = levels if self.encodes or self.llamagen else levels[::-1]
        middle = list(self.mid) if self.llamagen else list(self.mid.values())
        x = self.conv_in(x)
        for layer in [*levels, *middle] if self.encodes else [*middle, *levels]:
            x = layer(x)
        x = self.norm_out(x)
        return self.conv_out(x * x.sigmoid())


class ReferenceVQGAN(nn.Module):
    """A tiny network of a kind, with random weights spread so that many codes are used."""

    def __init__(self, kind: str, multipliers: list[int], l2_norm: bool, codes: int = 64, latent: int = 16):
        super().__init__()
        self.kind, self.l2_norm, embed = kind, l2_norm, 8
        embed = latent if kind == "gumbel" else embed
        widths, llamagen = [32 * m for m in multipliers], kind == "llamagen"
        attended = [kind != "chameleon" and i == len(widths) - 1 for i in range(len(widths))]
        self.encoder = Coder(3, widths, latent, True, attended, llamagen)
        self.decoder = Coder(latent, widths, 3, False, attended, llamagen)
        self.quant_conv, self.post_quant_conv = nn.Conv2d(latent, embed, 1), nn.Conv2d(embed, latent, 1)
        self.quantize = nn.Module()
        table = "embed" if kind == "gumbel" else "embedding"
        setattr(self.quantize, table, nn.Embedding(codes, embed))
        if kind == "gumbel":
            self.quantize.proj = nn.Conv2d(embed, codes, 1)
        if llamagen:
            self.quantize.register_buffer("codebook_used", torch.zeros(100))

    @torch.no_grad()
    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        latents = self.quant_conv(self.encoder(pixels))
        if self.kind == "gumbel":
            return self.quantize.proj(latents).flatten(2).argmax(1)
        flat = latents.flatten(2).transpose(1, 2)
        flat = F.normalize(flat, dim=-1) if self.l2_norm else flat
        return (flat[:, :, None] - self.codebook()).square().sum(-1).argmin(-1)

    @torch.no_grad()
    def decode(self, codes: torch.Tensor) -> torch.Tensor:
        vectors = self.codebook()[codes]
        side = int(codes.shape[1] ** 0.5)
        return self.decoder(self.post_quant_conv(vectors.transpose(1, 2).unflatten(2, (side, side))))

    def codebook(self) -> torch.Tensor:
        weight = next(module for module in self.quantize.children() if isinstance(module, nn.Embedding)).weight
        return F.normalize(weight, dim=-1) if self.l2_norm else weight


@torch.no_grad()
def reference(kind: str, multipliers: list[int], pixels: torch.Tensor, l2_norm: bool | None = None) -> ReferenceVQGAN:
    """A network whose latents have a codebook's scale; LlamaGen normalises its codebook by default."""
    torch.manual_seed(0)
    network = ReferenceVQGAN(kind, multipliers, kind == "llamagen" if l2_norm is None else l2_norm).eval()
    for name, weight in network.named_parameters():
        if "norm" in name:
            weight.add_(0.3 * torch.randn_like(weight))
    latents = network.quant_conv(network.encoder(pixels))
    mean, deviation = latents.mean((0, 2, 3)), latents.std((0, 2, 3))
    network.quant_conv.weight.div_(deviation[:, None, None, None])  # latents of a codebook's scale
    network.quant_conv.bias.sub_(mean).div_(deviation)
    return network
