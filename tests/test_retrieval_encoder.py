"""The bi-encoder against open_clip's own calls, its query dropout, and what a bank knows it by."""

import importlib
import pickle
import shutil
import sys

import numpy as np
import open_clip
import pytest
import torch
from conftest import CAPTIONS, draw
from safetensors.torch import load_file, save_file

from cm3leon_hf.retrieval.encoder import PATCHES, CLIPEncoder

PICTURES = [draw(colour, "circle", size=24) for colour in ("red", "green", "blue")]


@pytest.fixture(scope="module")
def encoder(small_clip) -> CLIPEncoder:
    return CLIPEncoder(small_clip, None, device="cpu", batch_size=2)


def generators(count: int, seed: int = 0) -> list[np.random.Generator]:
    return [np.random.default_rng([seed, row]) for row in range(count)]


@torch.no_grad()
def test_a_document_is_the_mean_of_its_parts_unit_vectors(encoder, small_clip):
    model, transform = open_clip.create_model_from_pretrained(small_clip)
    tokens = open_clip.get_tokenizer(small_clip)(CAPTIONS[:3])
    text = torch.nn.functional.normalize(model.eval().encode_text(tokens), dim=-1)
    image = torch.nn.functional.normalize(model.encode_image(torch.stack([transform(p) for p in PICTURES])), dim=-1)
    both = encoder.encode(CAPTIONS[:3], PICTURES)
    assert both.shape == (3, encoder.dimension) and both.dtype == np.float32
    np.testing.assert_allclose(both, (text + image) / 2, atol=1e-6)
    assert (np.linalg.norm(both, axis=1) < 0.999).all(), "the mean is not normalised again"
    mixed = encoder.encode([CAPTIONS[0], None, CAPTIONS[2]], [None, *PICTURES[1:]])
    np.testing.assert_allclose(mixed, torch.stack([text[0], image[1], (text[2] + image[2]) / 2]), atol=1e-6)


def test_documents_need_a_part_and_lists_of_one_length(encoder):
    with pytest.raises(ValueError, match="document 1 without either"):
        encoder.encode(["a", None], [None, None])
    with pytest.raises(ValueError, match="for each picture, got 1 for 2"):
        encoder.encode(["a"], PICTURES[:2])
    assert encoder.encode([], []).shape == (0, encoder.dimension)


def test_text_dropout_removes_a_fifth_of_the_tokens_in_their_order(encoder):
    texts = ["one two three four five six seven eight nine ten", "a red circle on white", "red", ""]
    tokens = encoder.tokenizer(texts)
    dropped = encoder._drop_tokens(tokens, generators(4), 0.2)
    frame = encoder.tokenizer([""])[0].unique()
    for before, after, count in zip(tokens, dropped, (2, 1, 0, 0)):
        left, words = [(~torch.isin(row, frame)).sum().item() for row in (after, before)]
        assert words - left == count
        rest = iter(before.tolist())
        assert all(token in rest for token in after[: left + 2].tolist()), "an ordered part of the text"
        assert after[0] == before[0] and (after[left + 1] == before.max()) and not after[left + 2 :].any()


def test_image_dropout_blanks_a_fifth_of_the_patches(encoder, monkeypatch):
    seen = []
    pixels = torch.ones(3, 4 * PATCHES, 4 * PATCHES)
    monkeypatch.setattr(encoder, "transform", lambda image: pixels)
    monkeypatch.setattr(encoder.model, "encode_image", lambda pixels: seen.append(pixels) or pixels.flatten(1)[:, :16])
    encoder.embed_images(PICTURES[:2], generators(2))
    patches = seen[0][:, :, ::4, ::4]
    assert (seen[0] == patches.repeat_interleave(4, 2).repeat_interleave(4, 3)).all(), "whole patches"
    assert (patches == 0).sum((1, 2, 3)).tolist() == [3 * round(0.2 * PATCHES**2)] * 2
    assert (patches[0] != patches[1]).any()


def test_dropout_depends_on_the_row_alone(encoder):
    for embed, values in ((encoder.embed_texts, CAPTIONS[:3]), (encoder.embed_images, PICTURES)):
        whole = embed(values, generators(3))
        alone = torch.cat([embed([value], [rng]) for value, rng in zip(values, generators(3))])
        torch.testing.assert_close(whole, alone)
        assert (whole - embed(values)).abs().max() > 1e-3
        torch.testing.assert_close(embed(values, generators(3), dropout=0.0), embed(values))


def test_bfloat16_points_the_same_way(encoder, small_clip):
    half = CLIPEncoder(small_clip, None, device="cpu", dtype=torch.bfloat16)
    assert half.name == encoder.name
    texts = half.embed_texts(CAPTIONS)
    assert texts.dtype == torch.float32 and (texts * encoder.embed_texts(CAPTIONS)).sum(-1).min() > 0.99
    assert (half.embed_images(PICTURES) * encoder.embed_images(PICTURES)).sum(-1).min() > 0.99


def test_it_pickles_as_its_arguments(encoder):
    pickled = pickle.dumps(encoder)
    again = pickle.loads(pickled)
    assert len(pickled) < 1000 and again.name == encoder.name and again.batch_size == 2
    torch.testing.assert_close(again.embed_texts(CAPTIONS), encoder.embed_texts(CAPTIONS))


def test_other_weights_have_another_name(encoder, small_clip, tmp_path):
    folder = tmp_path / "clip"
    folder.mkdir()
    origin = small_clip.removeprefix("local-dir:")
    shutil.copy(f"{origin}/open_clip_config.json", folder)
    weights = load_file(f"{origin}/open_clip_model.safetensors")
    save_file(weights, folder / "open_clip_model.safetensors")
    same = CLIPEncoder(f"local-dir:{folder}", None, device="cpu")
    save_file({name: weight * 1.01 for name, weight in weights.items()}, folder / "open_clip_model.safetensors")
    other = CLIPEncoder(f"local-dir:{folder}", None, device="cpu")
    assert same.name.startswith("local-dir@") and str(tmp_path) not in same.name
    assert same.name.split("@")[1] == encoder.name.split("@")[1] != other.name.split("@")[1]


@pytest.mark.parametrize("missing, module", [("open_clip", "encoder"), ("datasets", "extra"), ("faiss", "extra")])
def test_a_missing_extra_is_named(missing, module, monkeypatch):
    monkeypatch.setitem(sys.modules, missing, None)
    monkeypatch.delitem(sys.modules, f"cm3leon_hf.retrieval.{module}", raising=False)
    with pytest.raises(ImportError, match=rf"{missing}.*pip install 'cm3leon_hf\[retrieval\]'"):
        importlib.import_module(f"cm3leon_hf.retrieval.{module}")
