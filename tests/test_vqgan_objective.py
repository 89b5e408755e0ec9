"""The VQGAN's losses: one backward pass against two, players that leave each other alone, and known values."""

import pytest
import torch
import torch.nn.functional as F
from conftest import noise, small_vqgan

from cm3leon_hf.training.discriminator import PatchDiscriminator, hinge_loss
from cm3leon_hf.training.perceptual import PerceptualLoss
from cm3leon_hf.training.vqgan import VQGANLossConfig, VQGANObjective, psnr

LOSSES = {"discriminator_channels": 8, "discriminator_layers": 1, "adversarial_weight": 0.5}


def objective(**changes) -> VQGANObjective:
    torch.manual_seed(0)
    return VQGANObjective(small_vqgan(), VQGANLossConfig(**LOSSES | {"adversarial_start": 0} | changes)).train()


def started(module: VQGANObjective, pixels: torch.Tensor) -> VQGANObjective:
    """Past its first step, which puts the codebook on latents, and with what the codebook was before the next."""
    module(pixels)
    return module


def test_one_backward_pass_gives_both_players_their_own_gradients():
    pixels = noise(2, 3, 16, 16)
    module = started(objective(), pixels)
    with torch.no_grad():  # what the player of the first pass saw, before the codebook moves
        drawn = module.vqgan(pixels).pixel_values
    module(pixels)["loss"].backward()
    got = {name: weight.grad.clone() for name, weight in module.discriminator.named_parameters()}
    module.zero_grad()
    hinge_loss(module.discriminator(pixels), module.discriminator(drawn)).backward()
    assert sum(gradient.abs().sum() for gradient in got.values()) > 0
    for name, weight in module.discriminator.named_parameters():  # the last bias's two halves cancel
        torch.testing.assert_close(got[name], weight.grad, msg=name)


def test_the_discriminators_loss_moves_no_weight_of_the_generator():
    pixels = noise(2, 3, 16, 16)
    module = objective()
    generator = [weight for weight in module.vqgan.parameters() if weight.requires_grad]
    outputs = module(pixels)
    assert torch.autograd.grad(outputs["discriminator"], generator, retain_graph=True, allow_unused=True) == (
        None,
    ) * len(generator)
    gradients = torch.autograd.grad(outputs["generator"], generator, retain_graph=True)
    assert all(gradient.abs().sum() > 0 for gradient in gradients)
    players = torch.autograd.grad(outputs["generator"], [*module.discriminator.parameters()], allow_unused=True)
    assert players == (None,) * len(players)


def test_the_adversarial_weight_balances_the_gradients_at_the_last_layer():
    module, pixels = objective(), noise(2, 3, 16, 16)
    last = module.vqgan.decoder.conv_out.weight
    outputs = module(pixels)
    norms = [
        torch.autograd.grad(outputs[name], last, retain_graph=True)[0].norm()
        for name in ("reconstruction", "generator")
    ]
    torch.testing.assert_close(norms[1], 0.5 * norms[0], rtol=1e-2, atol=0)  # adversarial_weight times


def test_losses_begin_when_they_should_and_add_up():
    module, pixels = objective(adversarial_start=1, l1_weight=2.0, l2_weight=3.0), noise(2, 3, 16, 16)
    first, second = module(pixels), module(pixels)
    assert set(second) - set(first) == {"generator", "discriminator"}
    for outputs in (first, second):
        parts = [value for name, value in outputs.items() if name not in ("loss", "psnr")]
        torch.testing.assert_close(outputs["loss"], sum(parts))
    module.eval()
    weights = {name: value.clone() for name, value in module.state_dict().items()}
    outputs = module(pixels)
    drawn = module.vqgan(pixels).pixel_values
    torch.testing.assert_close(outputs["reconstruction"], 2 * F.l1_loss(drawn, pixels) + 3 * F.mse_loss(drawn, pixels))
    torch.testing.assert_close(outputs["commitment"], module.vqgan(pixels).loss)
    assert set(outputs) == set(first)
    assert all(torch.equal(weights[name], value) for name, value in module.state_dict().items())  # nothing moves


def test_psnr_in_decibels():
    real = torch.zeros(2, 3, 4, 4)
    drawn = real.clone()
    drawn[1] += 0.2
    values = psnr(real, drawn)
    assert values[1].item() == pytest.approx(20.0, abs=1e-3)  # a tenth of the range 2 is 20 dB
    assert values[0] > 90


def test_the_discriminator_judges_each_picture_by_itself():
    discriminator, pixels = PatchDiscriminator(base_channels=8, num_layers=2), noise(3, 3, 32, 32)
    together = discriminator(pixels)
    assert together.shape[:2] == (3, 1)
    torch.testing.assert_close(torch.cat([discriminator(image[None]) for image in pixels]), together)
    real, fake = torch.tensor([2.0, 0.5]), torch.tensor([-2.0, 0.5])
    assert hinge_loss(real, fake) == 0.5 * (0.25 + 0.75)


def test_the_perceptual_distance_is_frozen_and_zero_for_the_same():
    loss = PerceptualLoss("test_resnet.r160_in1k", pretrained=False).train()
    first, second = noise(2, 3, 32, 32), noise(2, 3, 32, 32, seed=1).requires_grad_()
    assert not any(module.training for module in loss.modules())
    assert not any(weight.requires_grad for weight in loss.parameters())
    assert loss(first, first) == 0 and loss(first, second) > 0
    loss(first, second).backward()
    assert second.grad.abs().sum() > 0
    maps = zip(
        loss.features((first / 2 + 0.5 - loss.mean) / loss.std),
        loss.features((second / 2 + 0.5 - loss.mean) / loss.std),
    )
    layers = [(F.normalize(a, dim=1) - F.normalize(b, dim=1)).square().sum(1).mean() for a, b in maps]
    torch.testing.assert_close(loss(first, second), torch.stack(layers).mean())
