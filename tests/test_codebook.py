"""The codebook: moving averages against a loop, codes that die and are revived, replicas that agree."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from conftest import noise, small_vqgan_config

from cm3leon_hf.modeling_vqgan import VectorQuantizer
from cm3leon_hf.training.codebook import CodebookLearner


def small_quantizer() -> VectorQuantizer:
    return VectorQuantizer(small_vqgan_config(num_embeddings=5, embed_dim=3))


@pytest.fixture
def learner():
    quantizer = small_quantizer()
    learner = CodebookLearner(5, 3, decay=0.9, revive_below=0.03)
    learner.start(quantizer, noise(2, 3, 4, 4))
    return learner, quantizer


def test_the_codebook_starts_on_latents_once(learner):
    learner, quantizer = learner
    codebook = quantizer.embedding
    latents = noise(2, 3, 4, 4).permute(0, 2, 3, 1).reshape(-1, 3)
    assert all((latents == vector).all(1).any() for vector in codebook.weight)
    before = codebook.weight.clone()
    learner.start(quantizer, noise(2, 3, 4, 4, seed=1))
    assert torch.equal(codebook.weight, before)


def test_moving_averages_equal_a_loop(learner):
    learner, quantizer = learner
    codebook = quantizer.embedding
    usage, sums = [1.0] * 5, [vector.clone() for vector in codebook.weight.detach()]
    for step in range(4):
        latents, codes = noise(2, 3, 4, 4, seed=step), torch.arange(32).view(2, 16) % 5
        learner.update(quantizer, latents, codes)
        flat = [latents[image, :, row, column] for image in range(2) for row in range(4) for column in range(4)]
        for code in range(5):
            chosen = [vector for vector, used in zip(flat, codes.flatten().tolist()) if used == code]
            usage[code] = 0.9 * usage[code] + 0.1 * len(chosen)
            sums[code] = 0.9 * sums[code] + 0.1 * sum(chosen)
            torch.testing.assert_close(codebook.weight[code].detach(), sums[code] / usage[code])
    assert learner.statistics() == {"dead_codes": 0, "codebook_perplexity": pytest.approx(5.0, abs=0.1)}


def test_dead_codes_are_revived_and_the_living_left_alone(learner):
    learner, quantizer = learner
    codebook = quantizer.embedding
    codes = torch.zeros(2, 16, dtype=torch.long)  # only the first code is ever used
    revived = []
    for step in range(80):
        latents = noise(2, 3, 4, 4, seed=1 + step)
        before = codebook.weight.detach().clone()
        learner.update(quantizer, latents, codes)
        flat = latents.permute(0, 2, 3, 1).reshape(-1, 3)
        moved = (codebook.weight != before).any(1)
        on_latents = torch.stack([(flat == vector).all(1).any() for vector in codebook.weight])
        assert not on_latents[0]
        if on_latents[1:].any():
            assert on_latents[1:].all() and moved[1:].all()
            revived.append(step)
    # 0.9 ** 34 is the first power below 0.03; a revived code counts as used once
    assert revived == [33, 67]
    assert learner.statistics()["dead_codes"] == 4
    learner.reset_counts()
    assert learner.statistics() == {"dead_codes": 5, "codebook_perplexity": 1.0}


def test_revived_codes_land_where_a_code_is_missing():
    """A background that is common and well served, and a few latents far from every code."""
    quantizer, learner = small_quantizer(), CodebookLearner(5, 3, decay=0.1, revive_below=0.5)
    background, rare = torch.zeros(1, 3, 4, 4), 9 + noise(1, 3, 4, 4)
    learner.start(quantizer, background)
    latents = torch.where(torch.arange(16).view(4, 4) < 14, background, rare)
    for _ in range(4):
        learner.update(quantizer, latents, quantizer.nearest(latents))
    assert (quantizer.embedding.weight.norm(dim=1) > 8).sum() >= 2
    assert len(quantizer.nearest(latents).unique()) == 3  # the background and each of the two


def test_an_entropy_weight_makes_rare_codes_cost_their_bits():
    quantizer, learner = small_quantizer(), CodebookLearner(5, 3, decay=0.5, entropy_weight=0.7)
    learner.start(quantizer, noise(2, 3, 4, 4))
    codes = torch.tensor([[0] * 8 + [1] * 4 + [2] * 2 + [3, 4]] * 2)
    for _ in range(20):
        learner.update(quantizer, noise(2, 3, 4, 4), codes)
    shares = torch.tensor([8, 4, 2, 1, 1]) / 16
    torch.testing.assert_close(quantizer.rates, -0.7 * shares.log(), rtol=1e-3, atol=1e-3)
    latents = noise(1, 3, 4, 4, seed=5)
    flat = latents.permute(0, 2, 3, 1).reshape(-1, 3)
    costs = torch.cdist(flat, quantizer.embedding.weight).square() + quantizer.rates
    assert torch.equal(quantizer.nearest(latents)[0], costs.argmin(1))
    assert not torch.equal(costs.argmin(1), torch.cdist(flat, quantizer.embedding.weight).argmin(1))


class Replicas(threading.local):
    """Two threads in the place of two processes, with the two collective operations that the codebook needs."""

    barrier, values = threading.Barrier(2, timeout=60), [None, None]

    def gather(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        self.barrier.wait()
        self.values[self.rank] = tensor.clone()
        self.barrier.wait()
        return list(self.values)

    def reduce(self, tensor: torch.Tensor, reduction: str) -> torch.Tensor:
        assert reduction == "sum"
        return sum(self.gather(tensor))

    def broadcast(self, tensor: torch.Tensor) -> torch.Tensor:
        return self.gather(tensor)[0]


def test_replicas_keep_the_same_codebook(monkeypatch):
    world = Replicas()
    for name in ("reduce", "broadcast"):
        monkeypatch.setattr(f"cm3leon_hf.training.codebook.{name}", getattr(world, name))

    def learn(rank: int) -> tuple[torch.Tensor, CodebookLearner]:
        world.rank = rank
        quantizer, learner = small_quantizer(), CodebookLearner(5, 3, decay=0.5)
        for step in range(8):  # few enough uses for codes to die and to be revived
            latents = noise(2, 3, 4, 4, seed=2 * step + rank)
            learner.start(quantizer, latents)
            learner.update(quantizer, latents, torch.full((2, 16), rank))
        return quantizer.embedding.weight.detach(), learner

    with ThreadPoolExecutor(2) as pool:
        (first, learner), (second, _) = pool.map(learn, range(2))
    assert torch.equal(first, second)
    assert learner.counts.tolist() == [8 * 32, 8 * 32, 0, 0, 0]
