import re

import pytest
import torch
import torch.nn.functional as F
from conftest import GRID_SIZE, IMAGE_SIZE, RESOLUTION, small_vqgan, small_vqgan_config
from safetensors.torch import save_file
from transformers import JanusVQVAE, JanusVQVAEConfig

from cm3leon_hf import CM3LeonVQGAN, CM3LeonVQGANConfig
from cm3leon_hf.training.codebook import keep_codes

LENGTH = GRID_SIZE**2


@pytest.fixture
def pixels() -> torch.Tensor:
    return torch.rand(2, 3, RESOLUTION, RESOLUTION, generator=torch.Generator().manual_seed(0)) * 2 - 1


@torch.no_grad()
def test_it_has_tamings_layers_under_tamings_names(pixels):
    """Janus has taming's encoder and decoder too, but counts the decoder's levels from the other end."""
    shape = {"base_channels": 32, "channel_multiplier": [1, 2, 2], "num_res_blocks": 1, "latent_channels": 8}
    ours = small_vqgan(norm_num_groups=32, **shape)
    janus = JanusVQVAE(JanusVQVAEConfig(embed_dim=4, num_embeddings=IMAGE_SIZE, **shape)).eval()
    weights = {re.sub(r"\.up\.(\d)", lambda m: f".up.{2 - int(m[1])}", k): v for k, v in ours.state_dict().items()}
    assert not weights.pop("quantize.rates").any()  # plain VQ; theirs has no such thing
    janus.load_state_dict(weights)
    torch.testing.assert_close(ours.latents(pixels), janus.quant_conv(janus.encoder(pixels)))
    latents = torch.randn(2, 8, GRID_SIZE, GRID_SIZE)
    torch.testing.assert_close(ours.decoder(latents), janus.decoder(latents))


def test_a_checkpoint_without_rates_is_plain_vq(pixels, tmp_path):
    vqgan = small_vqgan()
    vqgan.save_pretrained(tmp_path)
    weights = {name: weight for name, weight in vqgan.state_dict().items() if name != "quantize.rates"}
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    loaded = CM3LeonVQGAN.from_pretrained(tmp_path)
    assert not loaded.quantize.rates.any()
    assert torch.equal(loaded.encode(pixels), vqgan.encode(pixels))


def test_codes_that_draw_nothing_can_be_dropped(pixels, tmp_path):
    vqgan = small_vqgan()
    vqgan.quantize.rates.uniform_(0, 0.1)
    codes = vqgan.encode(pixels)
    drawn, kept = vqgan.decode(codes), codes.unique()
    keep_codes(vqgan, kept)
    vqgan.save_pretrained(tmp_path)
    fewer = CM3LeonVQGAN.from_pretrained(tmp_path)
    assert fewer.config.num_embeddings == len(kept) < IMAGE_SIZE
    assert torch.equal(kept[fewer.encode(pixels)], codes)
    torch.testing.assert_close(fewer.decode(fewer.encode(pixels)), drawn)
    for wrong in ([], [1, 1], [0, IMAGE_SIZE]):
        with pytest.raises(ValueError, match="ascending codes"):
            keep_codes(small_vqgan(), torch.tensor(wrong, dtype=torch.long))


@torch.no_grad()
def test_encode_finds_the_nearest_codebook_vectors_in_raster_order(pixels):
    vqgan = small_vqgan()
    latents = vqgan.quant_conv(vqgan.encoder(pixels))
    spread = 0.5 * latents.std() * vqgan.quantize.embedding.weight
    vectors = vqgan.quantize.embedding.weight.copy_(latents.permute(0, 2, 3, 1).reshape(-1, 4).flip(0) + spread)
    nearest = [
        (vectors - latents[image, :, row, column]).square().sum(1).argmin().item()
        for image in range(2)
        for row in range(GRID_SIZE)
        for column in range(GRID_SIZE)
    ]
    assert len(set(nearest)) > 5
    assert vqgan.encode(pixels).flatten().tolist() == nearest


def test_decode_is_the_decoder_on_codebook_vectors(vqgan, pixels):
    codes = vqgan.encode(pixels)
    vectors = vqgan.quantize.embedding.weight[codes].view(2, GRID_SIZE, GRID_SIZE, -1).permute(0, 3, 1, 2)
    expected = vqgan.decoder(vqgan.post_quant_conv(vectors)).clamp(-1, 1)
    torch.testing.assert_close(vqgan.decode(codes), expected)
    torch.testing.assert_close(vqgan(pixels).pixel_values.clamp(-1, 1), expected)


def test_a_batch_is_its_images(vqgan, pixels):
    codes = vqgan.encode(pixels)
    assert torch.equal(torch.cat([vqgan.encode(image[None]) for image in pixels]), codes)
    torch.testing.assert_close(torch.cat([vqgan.decode(row[None]) for row in codes]), vqgan.decode(codes))


def test_gradients_pass_the_quantiser_straight_through(vqgan, pixels):
    latents = torch.randn(1, 4, 2, 2, requires_grad=True)
    quantized, codes, _ = vqgan.quantize(latents)
    torch.testing.assert_close(quantized, vqgan.quantize.lookup(codes, (2, 2)))
    weights = torch.randn_like(quantized)
    (gradient,) = torch.autograd.grad((quantized * weights).sum(), latents)
    torch.testing.assert_close(gradient, weights)


def test_the_loss_is_codebook_and_commitment_loss(vqgan, pixels):
    output = vqgan(pixels)
    quantized = vqgan.quantize.lookup(output.codes, (GRID_SIZE, GRID_SIZE))
    error = F.mse_loss(quantized, output.latents)
    torch.testing.assert_close(output.loss, 1.25 * error)
    codebook, latents = torch.autograd.grad(output.loss, [vqgan.quantize.embedding.weight, output.latents])
    used = output.codes.unique()
    assert codebook[used].abs().sum() > 0
    expected = 0.25 * 2 * (output.latents - quantized) / quantized.numel()  # commitment alone moves the latents
    torch.testing.assert_close(latents, expected)


def test_saved_and_loaded_makes_the_same_codes(vqgan, pixels, tmp_path):
    vqgan.save_pretrained(tmp_path)
    loaded = CM3LeonVQGAN.from_pretrained(tmp_path)
    assert torch.equal(loaded.encode(pixels), vqgan.encode(pixels))
    assert loaded.config.grid_size == GRID_SIZE


def test_half_precision_decodes_nearly_the_same(vqgan, pixels):
    codes = vqgan.encode(pixels)
    half = small_vqgan().bfloat16()
    half.load_state_dict(vqgan.state_dict())
    assert half.encode(pixels).shape == codes.shape
    assert F.mse_loss(half.decode(codes).float(), vqgan.decode(codes)) < 1e-3


def test_the_papers_grid():
    config = CM3LeonVQGANConfig()
    assert (config.downsampling, config.grid_size, config.num_embeddings) == (8, 32, 8192)


@pytest.mark.parametrize("shape", [(3, 16, 16), (1, 3, 16, 8), (1, 1, 16, 16), (1, 3, 32, 32)])
def test_pixels_of_another_shape_are_refused(vqgan, shape):
    with pytest.raises(ValueError, match="resize the images"):
        vqgan.encode(torch.zeros(shape))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_pixels_that_are_no_numbers_are_refused(vqgan, pixels, value):
    pixels[0, 0, 3, 3] = value
    with pytest.raises(ValueError, match="finite"):
        vqgan.encode(pixels)


@pytest.mark.parametrize("shape", [(LENGTH,), (1, LENGTH - 1), (1, 25), (1, GRID_SIZE, GRID_SIZE)])
def test_codes_of_another_grid_are_refused(vqgan, shape):
    with pytest.raises(ValueError, match="grid of 4×4"):
        vqgan.decode(torch.zeros(shape, dtype=torch.long))


@pytest.mark.parametrize("code", [-1, IMAGE_SIZE])
def test_codes_outside_the_codebook_are_refused(vqgan, code):
    with pytest.raises(ValueError, match=r"codes in \[0, 32\)"):
        vqgan.decode(torch.full((1, LENGTH), code))


@pytest.mark.parametrize(
    "changes, remedy", [({"resolution": 18}, "multiple of 4"), ({"norm_num_groups": 3}, "divisor")]
)
def test_configurations_that_cannot_be_built_are_refused(changes, remedy):
    with pytest.raises(ValueError, match=remedy):
        small_vqgan_config(**changes)
