"""VQGANs of others have the same codes and draw the same pictures after conversion; what is none is refused."""

import json
import pickle

import pytest
import torch
from reference_vqgans import ReferenceVQGAN, reference
from safetensors.torch import save_file
from torch import nn
from transformers import AutoImageProcessor, AutoModel, ChameleonVQVAE, ChameleonVQVAEConfig
from typer.testing import CliRunner

from cm3leon_hf import CM3LeonVQGAN
from cm3leon_hf.cli import app
from cm3leon_hf.conversion.convert import convert
from cm3leon_hf.training.codebook import keep_codes
from cm3leon_hf.training.vqgan import VQGANLossConfig, VQGANObjective

RESOLUTION = 16
SHAPES = {"taming": [1, 1, 2], "gumbel": [1, 2], "chameleon": [1, 2], "llamagen": [1, 1, 2]}
DISCRIMINATOR = {f"loss.discriminator.main.{i}.weight": torch.zeros(2) for i in range(3)}
LIGHTNING = {"epoch": 3, "optimizer_states": [{"state": {}}], "hparams": {"lr": 1e-4}}


@pytest.fixture(scope="module")
def pixels() -> torch.Tensor:
    return torch.rand(2, 3, RESOLUTION, RESOLUTION, generator=torch.Generator().manual_seed(0)) * 2 - 1


@pytest.fixture(scope="module")
def networks(pixels) -> dict[str, ReferenceVQGAN]:
    return {kind: reference(kind, shape, pixels) for kind, shape in SHAPES.items()}


def assert_same(vqgan: CM3LeonVQGAN, network: ReferenceVQGAN, pixels: torch.Tensor) -> None:
    codes = network.encode(pixels)
    assert len(codes.unique()) > 8
    assert torch.equal(vqgan.encode(pixels), codes)
    torch.testing.assert_close(vqgan.decode(codes), network.decode(codes).clamp(-1, 1), atol=1e-4, rtol=0)


@pytest.mark.parametrize("kind", SHAPES)
def test_codes_and_pictures_are_the_originals(kind, networks, pixels, tmp_path):
    weights = networks[kind].state_dict() | DISCRIMINATOR
    saved = {"model": weights, "steps": 7} if kind == "llamagen" else {"state_dict": weights} | LIGHTNING
    torch.save(saved, tmp_path / "last.ckpt")
    report = convert(tmp_path / "last.ckpt", tmp_path / "out", resolution=RESOLUTION)
    vqgan = AutoModel.from_pretrained(tmp_path / "out")
    assert type(vqgan) is CM3LeonVQGAN and vqgan.dtype == torch.float32
    assert_same(vqgan, networks[kind], pixels)
    statistics = {"quantize.codebook_used": 1} if kind == "llamagen" else {}
    assert (report.kind, report.missing) == (kind, [])
    assert report.unused == {"loss.discriminator": 3} | statistics
    assert report.read == len(weights) - 3 - len(statistics)
    assert json.loads((tmp_path / "out" / "conversion.json").read_text())["read"] == report.read


def test_a_vqgan_inside_another_model(networks, pixels, tmp_path):
    weights = {f"gen_vision_model.{name}": weight for name, weight in networks["llamagen"].state_dict().items()}
    torch.save(weights | {"language_model.lm_head.weight": torch.zeros(2)}, tmp_path / "pytorch_model.bin")
    report = convert(tmp_path, tmp_path / "out", resolution=RESOLUTION)
    assert report.unused == {"gen_vision_model.quantize": 1, "language_model.lm_head": 1}
    assert_same(CM3LeonVQGAN.from_pretrained(tmp_path / "out"), networks["llamagen"], pixels)


def test_a_llamagen_that_does_not_normalise_its_codebook(pixels, tmp_path):
    network = reference("llamagen", SHAPES["llamagen"], pixels, l2_norm=False)
    torch.save({"model": network.state_dict()}, tmp_path / "vq.pt")
    convert(tmp_path / "vq.pt", tmp_path / "plain", resolution=RESOLUTION, plain_codebook=True)
    assert_same(CM3LeonVQGAN.from_pretrained(tmp_path / "plain"), network, pixels)
    report = convert(tmp_path / "vq.pt", tmp_path / "normalised", resolution=RESOLUTION)
    assert "codebook normalised" in str(report)  # the weights do not tell, so the report says what was assumed
    assert not torch.equal(CM3LeonVQGAN.from_pretrained(tmp_path / "normalised").encode(pixels), network.encode(pixels))


@pytest.mark.parametrize(("kind", "side"), [("taming", 256), ("chameleon", 512)])
def test_the_published_resolutions(kind, side, networks, tmp_path):
    save_file(networks[kind].state_dict(), tmp_path / "vqgan.safetensors")
    convert(tmp_path, tmp_path / "out")
    config = CM3LeonVQGAN.from_pretrained(tmp_path / "out").config
    assert config.resolution == side
    assert config.attn_resolutions == ([side // 4] if kind == "taming" else [])


def test_pixels_are_scaled_as_metas(networks, tmp_path):
    save_file(networks["chameleon"].state_dict(), tmp_path / "vqgan.safetensors")
    convert(tmp_path, tmp_path / "out", resolution=RESOLUTION)
    values = torch.arange(256, dtype=torch.uint8).view(1, RESOLUTION, RESOLUTION).expand(3, -1, -1)
    pixels = AutoImageProcessor.from_pretrained(tmp_path / "out")(values, return_tensors="pt")["pixel_values"][0]
    torch.testing.assert_close(pixels, values.float() / 127.5 - 1)


@pytest.fixture(scope="module")
def chameleon(pixels) -> ChameleonVQVAE:
    torch.manual_seed(0)
    shape = {"base_channels": 32, "channel_multiplier": [1, 2], "latent_channels": 16, "embed_dim": 8}
    config = ChameleonVQVAEConfig(resolution=RESOLUTION, num_res_blocks=1, num_embeddings=64, **shape)
    vqvae = ChameleonVQVAE(config).eval()
    with torch.no_grad():
        for weight in vqvae.encoder.parameters():
            weight.add_(0.05 * torch.randn_like(weight))
        latents = vqvae.quant_conv(vqvae.encoder(pixels))
        vqvae.quantize.embedding.weight.normal_().mul_(latents.std()).add_(latents.mean((0, 2, 3)))
    return vqvae


def save_chameleon(vqvae: ChameleonVQVAE, decoder: dict, folder) -> None:
    """A Chameleon checkpoint as transformers saves it: in shards, the VQGAN between the language model's weights."""
    shards = {
        "model-00001-of-00002.safetensors": {
            "model.embed_tokens.weight": torch.zeros(4, 2),
            "lm_head.weight": torch.ones(4, 2),
        },
        "model-00002-of-00002.safetensors": {
            f"model.vqmodel.{k}": v for k, v in (vqvae.state_dict() | decoder).items()
        },
    }
    for name, weights in shards.items():
        save_file(weights, folder / name)
    homes = {weight: name for name, weights in shards.items() for weight in weights}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": homes}))


@torch.no_grad()
def test_transformers_chameleon(chameleon, pixels, tmp_path):
    save_chameleon(chameleon, {}, tmp_path)
    with pytest.raises(ValueError, match="--without-decoder"):
        convert(tmp_path, tmp_path / "out", resolution=RESOLUTION)
    report = convert(tmp_path, tmp_path / "out", resolution=RESOLUTION, without_decoder=True)
    vqgan = CM3LeonVQGAN.from_pretrained(tmp_path / "out")
    codes = chameleon.encode(pixels).image_tokens.view(2, -1)
    assert len(codes.unique()) > 8
    assert torch.equal(vqgan.encode(pixels), codes)
    assert not vqgan.decode(codes).any()
    assert report.unused == {"lm_head.weight": 1, "model.embed_tokens": 1}
    assert report.missing and all(name.startswith("decoder.") for name in report.missing)
    assert "missing  decoder.conv_in (2)" in str(report)


@pytest.mark.parametrize("counted_in_order_of_use", [False, True])
def test_transformers_chameleon_with_a_decoder(counted_in_order_of_use, chameleon, networks, pixels, tmp_path):
    decoder = networks["chameleon"].decoder
    decoder = {f"decoder.{name}": weight for name, weight in decoder.state_dict().items()}
    if counted_in_order_of_use:  # as ports of the decoder to transformers do
        swapped = {"decoder.up.0.": "decoder.up.1.", "decoder.up.1.": "decoder.up.0."}
        decoder = {swapped.get(name[:13], name[:13]) + name[13:]: weight for name, weight in decoder.items()}
    save_chameleon(chameleon, decoder, tmp_path)
    convert(tmp_path, tmp_path / "out", resolution=RESOLUTION)
    vqgan = CM3LeonVQGAN.from_pretrained(tmp_path / "out")
    latents = torch.randn(2, 16, 8, 8)
    torch.testing.assert_close(vqgan.decoder(latents), networks["chameleon"].decoder(latents), atol=1e-4, rtol=0)


def test_a_gumbel_vqgan_is_not_trained(networks, tmp_path):
    save_file(networks["gumbel"].state_dict(), tmp_path / "vqgan.safetensors")
    convert(tmp_path, tmp_path / "out", resolution=RESOLUTION)
    vqgan = CM3LeonVQGAN.from_pretrained(tmp_path / "out")
    with pytest.raises(ValueError, match="gumbel=True"):
        VQGANObjective(vqgan, VQGANLossConfig())
    with pytest.raises(ValueError, match="gumbel=True"):
        keep_codes(vqgan, torch.arange(3))


CHANGES = {
    "kl autoencoder": (lambda w: w.pop("quantize.embedding.weight"), "without a codebook"),
    "a missing weight": (lambda w: w.pop("encoder.mid.attn_1.q.weight"), "encoder.mid.attn_1.q.weight is missing"),
    "other shortcuts": (
        lambda w: w.update({"decoder.up.0.block.0.conv_shortcut.weight": torch.zeros(1)}),
        "conv_shortcut.weight is unknown",
    ),
    "codes used in part": (lambda w: w.update({"quantize.used": torch.zeros(3)}), "quantize.used is unknown"),
    "another shape": (
        lambda w: w.update({"decoder.conv_out.weight": torch.zeros(6, 32, 3, 3)}),
        r"decoder.conv_out.weight is \(6, 32, 3, 3\) instead of \(3, 32, 3, 3\)",
    ),
    "segmentations": (lambda w: w.update({"encoder.conv_in.weight": torch.zeros(32, 183, 3, 3)}), "183 channels"),
    "two tokenizers": (
        lambda w: w.update({"cond_stage_model.encoder.conv_in.weight": torch.zeros(1)}),
        "save the wanted one on its own",
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_other_architectures_are_named(change, networks, tmp_path):
    edit, message = CHANGES[change]
    weights = dict(networks["taming"].state_dict())
    edit(weights)
    save_file(weights, tmp_path / "vqgan.safetensors")
    with pytest.raises(ValueError, match=message):
        convert(tmp_path, tmp_path / "out", resolution=RESOLUTION)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kind": "gumbel"}, "expected the weights of gumbel, got those of taming"),
        ({"kind": "dalle"}, "a kind among taming, gumbel, chameleon, llamagen, opt, got 'dalle'"),
        ({"dtype": "float31"}, "a dtype among float32, bfloat16, float16, got 'float31'"),
        ({"dtype": "bfloat16"}, "no dtype for taming"),
        ({"vqgan": "folder"}, "no vqgan for taming"),
        ({"plain_codebook": True}, "no plain_codebook for taming"),
        ({"resolution": 18}, "multiple of 4"),
    ],
)
def test_arguments_that_do_not_fit(arguments, message, networks, tmp_path):
    save_file(networks["taming"].state_dict(), tmp_path / "vqgan.safetensors")
    with pytest.raises(ValueError, match=message):
        convert(tmp_path, tmp_path / "out", **arguments)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("")
    with pytest.raises(ValueError, match="new or empty folder"):
        convert(tmp_path, tmp_path / "out")


class Callback:
    """Stands for the trainer's objects in a lightning checkpoint."""


class Dangerous:
    def __init__(self, path: str):
        self.path = path

    def __reduce__(self):
        return open, (self.path, "w")


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("dangerous", [False, True])
def test_pickles_with_more_than_tensors_are_refused(legacy, dangerous, tmp_path):
    held = Dangerous(str(tmp_path / "written")) if dangerous else Callback()
    saved = {"state_dict": {"weight": torch.zeros(1)}, "callbacks": {"checkpoint": held}}
    torch.save(saved, tmp_path / "last.ckpt", _use_new_zipfile_serialization=not legacy)
    name = "open" if dangerous else "Callback"
    with pytest.raises(ValueError, match=rf"{name}: loading it would run code.*save the weights on their own"):
        convert(tmp_path, tmp_path / "out")
    assert not (tmp_path / "written").exists()


BROKEN = {
    "text.ckpt": (b"<html>not found</html>", "which is none"),
    "cut.safetensors": (b"\x40\x00\x00\x00\x00\x00\x00\x00{", "whole safetensors file"),
    "empty.pt": (b"", "whole checkpoint"),
    "list.pt": (pickle.dumps([1, 2], protocol=2), "whole checkpoint"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_files_are_named(name, tmp_path):
    content, message = BROKEN[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        convert(tmp_path, tmp_path / "out")
    assert name in str(error.value)


def test_cut_checkpoints_are_named(networks, tmp_path):
    torch.save(networks["gumbel"].state_dict(), tmp_path / "last.ckpt")
    (tmp_path / "last.ckpt").write_bytes((tmp_path / "last.ckpt").read_bytes()[:-5000])
    with pytest.raises(ValueError, match="last.ckpt"):
        convert(tmp_path, tmp_path / "out")


def test_shards_that_are_missing_are_named(chameleon, tmp_path):
    save_chameleon(chameleon, {}, tmp_path)
    (tmp_path / "model-00001-of-00002.safetensors").unlink()
    with pytest.raises(ValueError, match="missing: model-00001-of-00002.safetensors; download"):
        convert(tmp_path, tmp_path / "out")
    save_file({"lm_head.weight": torch.ones(4, 2)}, tmp_path / "model-00001-of-00002.safetensors")
    with pytest.raises(ValueError, match="expected model.embed_tokens.weight in model-00001-of-00002.safetensors"):
        convert(tmp_path, tmp_path / "out")
    (tmp_path / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(ValueError, match="an index of shards with a weight_map"):
        convert(tmp_path, tmp_path / "out")


def test_other_sources_are_named(tmp_path):
    with pytest.raises(ValueError, match="hf download"):
        convert(tmp_path / "nowhere", tmp_path / "out")
    with pytest.raises(ValueError, match="got none; name the file itself"):
        convert(tmp_path, tmp_path / "out")
    save_file(nn.Linear(2, 2).state_dict(), tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match=r"got others: bias \(1\), weight \(1\)"):
        convert(tmp_path, tmp_path / "out")
    torch.save({"epoch": 3}, tmp_path / "b.pt")
    with pytest.raises(ValueError, match="got a.safetensors, b.pt; name the file itself"):
        convert(tmp_path, tmp_path / "out")
    with pytest.raises(ValueError, match="weights by name.*with epoch"):
        convert(tmp_path / "b.pt", tmp_path / "out")


def test_the_command_line_reports(networks, tmp_path):
    torch.save({"state_dict": networks["gumbel"].state_dict() | DISCRIMINATOR}, tmp_path / "last.ckpt")
    command = ["convert", str(tmp_path / "last.ckpt"), str(tmp_path / "out"), "--resolution", str(RESOLUTION)]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    assert "kind     gumbel\n" in result.output and "unused   loss.discriminator (3)\n" in result.output
    again = CliRunner().invoke(app, command)
    assert again.exit_code == 1 and "new or empty folder" in again.stderr and "Traceback" not in again.stderr
