"""The VQGAN's training objective as one module with one loss, so that the stock Trainer trains it."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call
from transformers import Trainer

from ..modeling_vqgan import CM3LeonVQGAN
from .codebook import CodebookLearner
from .discriminator import PatchDiscriminator, adaptive_weight, hinge_loss
from .perceptual import PerceptualLoss


@dataclass
class VQGANLossConfig:
    """Weights of the VQGAN's losses (Esser et al. 2021, section 3.1) and of its codes' entropy; zero leaves one out."""

    entropy_weight: float = 0.0
    l1_weight: float = 1.0
    l2_weight: float = 0.0
    adversarial_weight: float = 0.8
    adversarial_start: int = 10_000
    discriminator_channels: int = 64
    discriminator_layers: int = 3
    perceptual_backbone: str | None = None
    perceptual_weight: float = 1.0


class VQGANObjective(nn.Module):
    """
    A VQGAN with its codebook learner, discriminator and losses: `forward` returns one loss for all parameters.

    The generator's adversarial loss passes through a detached copy of the discriminator's weights, and the
    discriminator sees detached images, so one backward pass gives both players their own gradients.
    """

    def __init__(self, vqgan: CM3LeonVQGAN, loss_config: VQGANLossConfig):
        super().__init__()
        if vqgan.config.gumbel:
            raise ValueError(
                "expected a VQGAN whose codes are the nearest, got one with gumbel=True; it is not trained"
            )
        self.vqgan, self.loss_config = vqgan, loss_config
        vqgan.quantize.embedding.requires_grad_(False)  # moving averages, not gradients, move the codebook
        self.codebook = CodebookLearner(
            vqgan.config.num_embeddings, vqgan.config.embed_dim, entropy_weight=loss_config.entropy_weight
        )
        self.discriminator = PatchDiscriminator(
            vqgan.config.in_channels, loss_config.discriminator_channels, loss_config.discriminator_layers
        )
        self.perceptual = PerceptualLoss(loss_config.perceptual_backbone) if loss_config.perceptual_backbone else None
        self.register_buffer("step", torch.tensor(0))

    def forward(self, pixel_values: torch.Tensor) -> dict[str, torch.Tensor]:
        """
        Args:
            pixel_values (`torch.Tensor` of shape `(batch, channels, height, width)`): Pixels in [-1, 1].

        Returns:
            `dict`: `loss`; `psnr` in dB for each image; and each loss by name.
        """
        pixel_values = pixel_values.contiguous(memory_format=torch.channels_last)  # a third faster on a CPU
        latents = self.vqgan.latents(pixel_values)
        if self.training:
            self.codebook.start(self.vqgan.quantize, latents)
        quantized, codes, commitment = self.vqgan.quantize(latents)
        drawn = self.vqgan.decoder(self.vqgan.post_quant_conv(quantized)).float()
        losses = {"commitment": commitment, "reconstruction": self.reconstruction(pixel_values, drawn)}
        if self.training and self.step >= self.loss_config.adversarial_start:
            losses |= self.adversarial(pixel_values, drawn, losses["reconstruction"])
        if self.training:
            self.codebook.update(self.vqgan.quantize, latents, codes)
            self.step += 1
        return {"loss": sum(losses.values()), "psnr": psnr(pixel_values, drawn.detach())} | losses

    def reconstruction(self, real: torch.Tensor, drawn: torch.Tensor) -> torch.Tensor:
        config = self.loss_config
        loss = config.l1_weight * F.l1_loss(drawn, real) + config.l2_weight * F.mse_loss(drawn, real)
        return loss if self.perceptual is None else loss + config.perceptual_weight * self.perceptual(drawn, real)

    def adversarial(self, real: torch.Tensor, drawn: torch.Tensor, reconstruction: torch.Tensor) -> dict:
        frozen = {name: weight.detach() for name, weight in self.discriminator.named_parameters()}
        generator = -functional_call(self.discriminator, frozen, (drawn,)).float().mean()
        weight = adaptive_weight(reconstruction, generator, self.vqgan.decoder.conv_out.weight)
        real_logits, fake_logits = self.discriminator(torch.cat([real, drawn.detach()])).float().chunk(2)
        return {
            "generator": self.loss_config.adversarial_weight * weight * generator,
            "discriminator": hinge_loss(real_logits, fake_logits),
        }


def psnr(real: torch.Tensor, drawn: torch.Tensor) -> torch.Tensor:
    """Peak signal-to-noise ratio in dB of `(batch, channels, height, width)` images in [-1, 1], one for each image."""
    error = (real.float() - drawn.float().clamp(-1, 1)).square().flatten(1).mean(1)
    return 10 * torch.log10(4 / error.clamp_min(1e-10))  # the range -1 to 1 has a peak of 2, squared 4


class VQGANTrainer(Trainer):
    """The stock Trainer, logging each loss and PSNR besides the sum, and the codebook's use."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.parts: dict[str, list[torch.Tensor]] = {}

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs = model(**inputs)
        if model.training:
            for name in outputs.keys() - {"loss"}:
                self.parts.setdefault(name, []).append(outputs[name].detach().mean())
        return (outputs["loss"], outputs) if return_outputs else outputs["loss"]

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            logs |= {name: round(torch.stack(values).mean().item(), 4) for name, values in self.parts.items()}
            self.parts.clear()
        super().log(logs, start_time)

    def evaluate(self, *args, **kwargs) -> dict[str, float]:
        """Also says how the codebook was used since the last evaluation: an epoch ago, if the recipe says so."""
        codebook = self.accelerator.unwrap_model(self.model).codebook
        self.log(codebook.statistics())
        codebook.reset_counts()
        return super().evaluate(*args, **kwargs)

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        with torch.no_grad(), self.compute_loss_context_manager():
            outputs = model(**self._prepare_inputs(inputs))
        return outputs["loss"].detach(), outputs["psnr"].detach(), outputs["psnr"].detach()
