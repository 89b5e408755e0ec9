"""A VQGAN's decoder learns to draw from redrawn codes: which codes are redrawn, what moves, and the recipe."""

import io

import datasets
import pytest
import torch
from conftest import COLOURS, GRID_SIZE, IMAGE_SIZE, draw, load_recipe, noise, small_vqgan
from safetensors.torch import load_file
from test_training import training
from test_vqgan_objective import LOSSES

from cm3leon_hf import CM3LeonVQGAN
from cm3leon_hf.data.redrawing import RedrawnCodes
from cm3leon_hf.training.vqgan import VQGANDecoderObjective, VQGANLossConfig

CAPTIONS = [[f"a {colour} circle", "a circle"] for colour in COLOURS]


def stored(picture) -> dict:
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return {"bytes": buffer.getvalue(), "path": None}


@pytest.fixture(scope="module")
def rows() -> dict[str, list]:
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(IMAGE_SIZE, (len(CAPTIONS), GRID_SIZE**2), generator=generator).tolist()
    return {"image": [draw(colour, "circle") for colour in COLOURS], "captions": CAPTIONS, "codes": codes}


def test_redrawn_codes_are_what_the_model_says_behind_the_pictures_own(model, processor, rows):
    greedy = RedrawnCodes(model, processor, share=1.0, top_p=1e-6)
    codes = torch.tensor(rows["codes"])
    likeliest = []
    for captions, own in zip(rows["captions"], codes):  # one picture at a time, without padding
        prompt = processor.for_text_to_image(captions[:1])["input_ids"]
        ids = torch.cat([prompt, processor.vocabulary.codes_to_ids(own[None])], dim=1)
        logits = model(ids).logits[0, prompt.shape[1] - 1 : -1, processor.vocabulary.image_ids]
        likeliest.append(logits.argmax(-1))
    likeliest = torch.stack(likeliest)
    torch.manual_seed(0)
    redrawn = greedy.redraw([captions[0] for captions in rows["captions"]], codes)
    assert ((redrawn == codes) | (redrawn == likeliest)).all()
    assert (redrawn == likeliest).any() and (redrawn == codes).any()


def test_rows_become_pixels_and_codes(model, processor, rows):
    outputs = RedrawnCodes(model, processor, share=0.0)(rows)
    assert outputs["codes"].tolist() == rows["codes"]
    expected = processor.image_processor(rows["image"], return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(outputs["pixel_values"], expected)
    with pytest.raises(ValueError, match=r"share in \[0, 1\], got 1.5"):
        RedrawnCodes(model, processor, share=1.5)


def test_only_the_decoder_learns_and_draws_the_codes_that_it_is_given():
    torch.manual_seed(0)
    vqgan, pixels = small_vqgan(), noise(2, 3, 16, 16)
    codes = torch.randint(IMAGE_SIZE, (2, GRID_SIZE**2))
    module = VQGANDecoderObjective(vqgan, VQGANLossConfig(**LOSSES | {"adversarial_start": 0})).train()
    outputs = module(pixels, codes)
    outputs["loss"].backward()
    learnt = {name.split(".")[0] for name, weight in vqgan.named_parameters() if weight.grad is not None}
    assert learnt == {"decoder", "post_quant_conv"}
    assert all(weight.grad.abs().sum() > 0 for name, weight in vqgan.decoder.named_parameters())
    drawn = module.vqgan.decoder(vqgan.post_quant_conv(vqgan.quantize.lookup(codes, (GRID_SIZE, GRID_SIZE))))
    torch.testing.assert_close(outputs["reconstruction"], (drawn - pixels).abs().mean())
    assert set(outputs) == {"loss", "psnr", "reconstruction", "generator", "discriminator"}
    assert module.codebook.counts.sum() == codes.numel()


def test_the_recipe_moves_the_decoder_and_leaves_every_code_as_it_was(folder, saved_vqgan, rows, tmp_path):
    features = datasets.Features(
        {"image": datasets.Image()}
        | {"captions": datasets.List(datasets.Value("string")), "codes": datasets.List(datasets.Value("int32"))}
    )
    data = datasets.Dataset.from_dict(rows | {"image": [stored(one) for one in rows["image"]]}, features=features)
    for split in ("train", "heldout_pairs"):
        data.to_parquet(tmp_path / "data" / f"{split}-00000-of-00001.parquet")
    recipe = load_recipe("vqgan/tune_decoder.py")
    arguments = recipe.DecoderArguments(dataset=str(tmp_path), vqgan=saved_vqgan, model=folder)
    out = tmp_path / "tuned"
    losses = VQGANLossConfig(**LOSSES | {"adversarial_start": 1})
    recipe.main(arguments, losses, training(out, max_steps=2, learning_rate=0.05, eval_strategy="steps", eval_steps=2))
    before = CM3LeonVQGAN.from_pretrained(saved_vqgan).to(torch.bfloat16).state_dict()
    after = load_file(out / "model.safetensors")
    moved = {name for name, weight in after.items() if not torch.equal(weight, before[name])}
    assert moved and all(name.split(".")[0] in ("decoder", "post_quant_conv") for name in moved)
    assert {name for name in after if name.startswith("decoder") and "weight" in name} <= moved
