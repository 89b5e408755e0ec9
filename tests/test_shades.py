"""The trunk that sees shades, against timm's own and against its own words."""

import json
from pathlib import Path

import pytest
import timm
import torch
from conftest import load_recipe
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

from cm3leon_hf.retrieval.shades import ShadeFeatures


def shade(level: int) -> torch.Tensor:
    """A picture of one grey."""
    return torch.full((1, 3, 16, 16), 2 * level / 255 - 1)


def test_with_weights_of_timms_trunk_it_is_that_trunk_at_first():
    torch.manual_seed(0)
    plain, shades = (timm.create_model(name, num_classes=5).eval() for name in ("resnet10t", "resnet10t_shades"))
    missing, unexpected = shades.load_state_dict(plain.state_dict(), strict=False)
    assert not unexpected and all(name.startswith("shades.") for name in missing)
    pictures = 2 * torch.rand(2, 3, 64, 64) - 1
    torch.testing.assert_close(shades(pictures), plain(pictures), rtol=0, atol=0)
    shades.shades.out.bias.data += 1
    torch.testing.assert_close(shades(pictures), plain(pictures) + plain.fc.weight.sum(dim=1))


def test_what_is_seen_is_the_same_wherever_it_lies():
    torch.manual_seed(0)
    features, thing = ShadeFeatures(8).eval(), 2 * torch.rand(1, 3, 10, 10) - 1
    features.out.reset_parameters()
    here, there = (F.pad(thing, (left, 22 - left, top, 22 - top), value=1.0) for left, top in ((4, 6), (12, 8)))
    torch.testing.assert_close(features(here), features(there), rtol=0, atol=1e-4)
    assert (features(here) - features(2 * torch.rand(1, 3, 32, 32) - 1)).abs().max() > 1e-2


def test_a_pixel_is_seen_as_turns_of_its_colour_and_as_levels_to_the_next():
    features, levels = ShadeFeatures(8, octaves=2), torch.tensor([[0, 100, 101], [10, 100, 255]])
    seen = features.describe((2 * levels / 255 - 1).expand(1, 3, 2, 3))[0, ::3]  # of three channels that are alike
    colour = torch.pi * (2 * levels / 255 - 1)
    turns = torch.stack([colour.sin(), (2 * colour).sin(), colour.cos(), (2 * colour).cos()])
    torch.testing.assert_close(seen[:4], turns, rtol=0, atol=1e-5)
    right, below = [[100, 1, 0], [90, 155, 0]], [[10, 0, 154], [0, 0, 0]]  # 0 at the border
    torch.testing.assert_close(seen[4:].sign() * seen[4:].abs().expm1(), torch.tensor([right, below]).float())
    assert features.describe(shade(100))[0, 12:].count_nonzero() == 0  # of one shade throughout


def test_shades_one_level_apart_are_learned_in_few_steps():
    torch.manual_seed(0)
    features = ShadeFeatures(2).train()
    optimizer = torch.optim.AdamW(features.parameters(), lr=2e-3)
    pictures, own = torch.cat([shade(level) for level in (100, 101)] * 4), torch.tensor([0, 1] * 4)
    for _ in range(30):
        loss = F.cross_entropy(features(pictures), own)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert features.eval()(pictures).argmax(dim=1).equal(own)


def test_a_clip_with_more_parts_begins_with_the_weights_of_one_with_fewer(tmp_path):
    recipe, found = load_recipe("retrieval/train_clip.py"), []
    for name in ("resnet10t", "resnet10t_shades"):
        vision = {"timm_model_name": name, "timm_pool": "", "timm_proj": "linear", "image_size": 32}
        text = {"context_length": 12, "vocab_size": 99, "width": 16, "heads": 2, "layers": 1}
        config = {"model_cfg": {"embed_dim": 16, "vision_cfg": vision, "text_cfg": text}, "preprocess_cfg": {}}
        folder = tmp_path / name
        folder.mkdir()
        (folder / "open_clip_config.json").write_text(json.dumps(config))
        clip = recipe.load_clip(recipe.CLIPArguments("", "", str(folder)))[0]
        save_file(clip.state_dict(), folder / "open_clip_model.safetensors")
        found.append(str(folder))
    plain, shades = found
    clip = recipe.load_clip(recipe.CLIPArguments("", "", model_config=shades, init_from=plain))[0]
    weights, state = load_file(Path(plain, "open_clip_model.safetensors")), clip.state_dict()
    assert all(torch.equal(state.pop(name), value) for name, value in weights.items())
    assert state and all(".shades." in name for name in state)
    with pytest.raises(ValueError, match=r"a CLIP with all parts of .*, lacks visual.trunk.shades"):
        recipe.load_clip(recipe.CLIPArguments("", "", model_config=plain, init_from=shades))
