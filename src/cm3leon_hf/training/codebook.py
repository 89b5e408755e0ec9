"""Learning a codebook: moving averages of what each code stands for, usage statistics, revival of dead codes."""

import torch
from accelerate.utils import broadcast, reduce
from torch import nn


class CodebookLearner(nn.Module):
    """
    Learns codebook vectors as moving averages of the latents assigned to them (van den Oord et al. 2017, appendix).

    A code whose average use per step falls below `revive_below` is dead: it restarts at a random latent of the
    batch. Sums are taken over all processes and restarts from the first, so that every replica keeps the same codebook.

    Args:
        num_embeddings (`int`): Codes in the codebook.
        embed_dim (`int`): Size of a codebook vector.
        decay (`float`): Decay of the moving averages, in (0, 1).
        revive_below (`float`): Average number of latents per step below which a code is dead.
    """

    def __init__(self, num_embeddings: int, embed_dim: int, decay: float = 0.99, revive_below: float = 0.03):
        super().__init__()
        self.decay, self.revive_below = decay, revive_below
        self.register_buffer("usage", torch.zeros(num_embeddings))  # moving average of latents per step
        self.register_buffer("sums", torch.zeros(num_embeddings, embed_dim))  # moving average of their sums
        self.register_buffer("counts", torch.zeros(num_embeddings))  # since the last `reset_counts`
        self.register_buffer("started", torch.tensor(False))

    @torch.no_grad()
    def start(self, codebook: nn.Embedding, latents: torch.Tensor) -> None:
        """Puts every code on a random latent; `latents` is `(batch, embed_dim, h, w)`. Does so only once."""
        if not self.started:
            self._restart(codebook, latents, torch.ones_like(self.usage, dtype=torch.bool))
            self.started.fill_(True)

    @torch.no_grad()
    def update(self, codebook: nn.Embedding, latents: torch.Tensor, codes: torch.LongTensor) -> None:
        """Moves the codes to their latents; `codes` is `(batch, h * w)`."""
        flat, codes = self._flat(latents), codes.flatten()
        used = reduce(torch.zeros_like(self.usage).index_add_(0, codes, torch.ones_like(flat[:, 0])), "sum")
        sums = reduce(torch.zeros_like(self.sums).index_add_(0, codes, flat), "sum")
        self.counts += used
        self.usage.lerp_(used, 1 - self.decay)
        self.sums.lerp_(sums, 1 - self.decay)
        codebook.weight.copy_(self.sums / self.usage.clamp_min(1e-5)[:, None])
        self._restart(codebook, latents, self.usage < self.revive_below)

    def statistics(self) -> dict[str, float]:
        """Codes unused since the last `reset_counts`, and the perplexity of their use, in [1, num_embeddings]."""
        share = self.counts / self.counts.sum().clamp_min(1)
        entropy = torch.special.entr(share).sum()
        return {"dead_codes": int((self.counts == 0).sum()), "codebook_perplexity": round(entropy.exp().item(), 1)}

    def reset_counts(self) -> None:
        self.counts.zero_()

    def _restart(self, codebook: nn.Embedding, latents: torch.Tensor, dead: torch.Tensor) -> None:
        flat = self._flat(latents)
        chosen = broadcast(flat[torch.randint(len(flat), (len(dead),), device=flat.device)])
        # a restarted code counts as used once a step, so that it has time to win latents
        codebook.weight.copy_(torch.where(dead[:, None], chosen, codebook.weight))
        self.sums.copy_(torch.where(dead[:, None], chosen, self.sums))
        self.usage.copy_(torch.where(dead, 1.0, self.usage))

    @staticmethod
    def _flat(latents: torch.Tensor) -> torch.Tensor:
        return latents.detach().float().permute(0, 2, 3, 1).flatten(0, 2)
