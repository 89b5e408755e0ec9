"""Learning a codebook: moving averages of what each code stands for, usage statistics, revival of dead codes."""

import torch
from accelerate.utils import broadcast, reduce
from torch import nn

from ..modeling_vqgan import CM3LeonVQGAN, VectorQuantizer


class CodebookLearner(nn.Module):
    """
    Learns codebook vectors as moving averages of the latents assigned to them (van den Oord et al. 2017, appendix).

    A code whose average use per step falls below `revive_below` is dead: it restarts at a latent of the batch, drawn in
    proportion to its squared distance from the codebook, as k-means++ seeds. So it lands where a code is missing, and
    does not split what is common, such as a white background, into ever more codes of the same meaning, which a
    language model could not predict. Sums are taken over all processes and restarts from the first, so that every
    replica keeps the same codebook.

    Args:
        num_embeddings (`int`): Codes in the codebook.
        embed_dim (`int`): Size of a codebook vector.
        decay (`float`): Decay of the moving averages, in (0, 1).
        revive_below (`float`): Average number of latents per step below which a code is dead.
        entropy_weight (`float`): λ of entropy-constrained quantisation (Chou et al. 1989): the squared distance that a
            nat is worth. A code costs −λ log of its share; 0 is plain VQ.
    """

    def __init__(
        self,
        num_embeddings: int,
        embed_dim: int,
        decay: float = 0.99,
        revive_below: float = 0.03,
        entropy_weight: float = 0.0,
    ):
        super().__init__()
        self.decay, self.revive_below, self.entropy_weight = decay, revive_below, entropy_weight
        self.register_buffer("usage", torch.zeros(num_embeddings))  # moving average of latents per step
        self.register_buffer("sums", torch.zeros(num_embeddings, embed_dim))  # moving average of their sums
        self.register_buffer("counts", torch.zeros(num_embeddings))  # since the last `reset_counts`
        self.register_buffer("started", torch.tensor(False))

    @torch.no_grad()
    def start(self, quantizer: VectorQuantizer, latents: torch.Tensor) -> None:
        """Puts every code on a random latent; `latents` is `(batch, embed_dim, h, w)`. Does so only once."""
        if not self.started:
            flat = self._flat(latents)
            chosen = flat[torch.randint(len(flat), (len(self.usage),), device=flat.device)]
            self._restart(quantizer, chosen, torch.ones_like(self.usage, dtype=torch.bool))
            self.started.fill_(True)

    @torch.no_grad()
    def update(self, quantizer: VectorQuantizer, latents: torch.Tensor, codes: torch.LongTensor) -> None:
        """Moves the codes to their latents and sets what they cost; `codes` is `(batch, h * w)`."""
        flat, codes = self._flat(latents), codes.flatten()
        used = reduce(torch.zeros_like(self.usage).index_add_(0, codes, torch.ones_like(flat[:, 0])), "sum")
        sums = reduce(torch.zeros_like(self.sums).index_add_(0, codes, flat), "sum")
        self.counts += used
        self.usage.lerp_(used, 1 - self.decay)
        self.sums.lerp_(sums, 1 - self.decay)
        quantizer.embedding.weight.copy_(self.sums / self.usage.clamp_min(1e-5)[:, None])
        dead = self.usage < self.revive_below
        if dead.any():
            distances = torch.cdist(flat, quantizer.embedding.weight.float()).min(1).values.square()
            self._restart(quantizer, flat[torch.multinomial(distances + 1e-9, len(dead), replacement=True)], dead)
        quantizer.rates.copy_(-self.entropy_weight * (self.usage / self.usage.sum()).log())

    def statistics(self) -> dict[str, float]:
        """Codes unused since the last `reset_counts`, and the perplexity of their use, in [1, num_embeddings]."""
        share = self.counts / self.counts.sum().clamp_min(1)
        entropy = torch.special.entr(share).sum()
        return {"dead_codes": int((self.counts == 0).sum()), "codebook_perplexity": round(entropy.exp().item(), 1)}

    def reset_counts(self) -> None:
        self.counts.zero_()

    def _restart(self, quantizer: VectorQuantizer, chosen: torch.Tensor, dead: torch.Tensor) -> None:
        """Puts the dead among the codes on their row of `chosen`, `(num_embeddings, embed_dim)`."""
        chosen, weight = broadcast(chosen), quantizer.embedding.weight
        # a restarted code counts as used once a step, so that it has time to win latents
        weight.copy_(torch.where(dead[:, None], chosen, weight))
        self.sums.copy_(torch.where(dead[:, None], chosen, self.sums))
        self.usage.copy_(torch.where(dead, 1.0, self.usage))

    @staticmethod
    def _flat(latents: torch.Tensor) -> torch.Tensor:
        return latents.detach().float().permute(0, 2, 3, 1).flatten(0, 2)


@torch.no_grad()
def keep_codes(vqgan: CM3LeonVQGAN, kept: torch.LongTensor) -> None:
    """
    Drops all codes but those in `kept`, which get the ids 0, 1, … in their order.

    Pictures that used none of the others keep their quantised latents, and so what they decode to.

    Raises:
        ValueError: if `kept` is empty, not ascending, or outside the codebook, or the VQGAN is a Gumbel VQGAN.
    """
    if vqgan.config.gumbel:
        raise ValueError("expected a VQGAN whose codes are the nearest, got one with gumbel=True; keep all its codes")
    size = vqgan.config.num_embeddings
    if not len(kept) or (kept.diff() <= 0).any() or kept[0] < 0 or kept[-1] >= size:
        raise ValueError(f"expected ascending codes in [0, {size}) to keep, got {kept.tolist()}")
    quantizer = vqgan.quantize
    quantizer.embedding = nn.Embedding.from_pretrained(quantizer.embedding.weight[kept])
    quantizer.rates = quantizer.rates[kept]
    vqgan.config.num_embeddings = len(kept)
