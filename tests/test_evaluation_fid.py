"""Fréchet distance against pytorch-fid, its streaming statistics against NumPy, its networks against their packages."""

import warnings
from urllib.error import URLError

import numpy as np
import open_clip
import pytest
import timm
import torch
from conftest import COLOURS, SHAPES, draw
from PIL import Image
from pytorch_fid import fid_score
from pytorch_fid.inception import InceptionV3

from cm3leon_hf.evaluation.features import cached_statistics, load_network
from cm3leon_hf.evaluation.fid import FeatureStatistics, feature_statistics, frechet_distance, measure_frechet

PICTURES = [draw(colour, shape, size) for colour in COLOURS for shape, size in zip(SHAPES, (40, 40))]


def features(count: int, dimension: int, seed: int) -> np.ndarray:
    """Correlated features with a mean far from zero, as networks give them."""
    rng = np.random.default_rng(seed)
    mixing = rng.normal(size=(dimension, dimension)) * np.geomspace(1, 1e-2, dimension)
    return (rng.normal(size=(count, dimension)) @ mixing + 100 * rng.random(dimension)).astype(np.float32)


@pytest.mark.parametrize("dimension", [3, 64])
def test_it_is_the_reference_distance(dimension):
    one, other = features(500, dimension, 0), features(400, dimension, 1)
    reference = fid_score.calculate_frechet_distance(
        *(moment for x in (one, other) for moment in (x.mean(0, np.float64), np.cov(x.astype(np.float64).T)))
    )
    ours = frechet_distance(feature_statistics(np.array_split(one, 7)), feature_statistics([other]))
    assert ours == pytest.approx(reference, rel=1e-6)


def test_streamed_statistics_are_those_of_all_features_at_once():
    x = features(1000, 16, 0)
    streamed = feature_statistics(np.array_split(x, 13))
    assert streamed.count == 1000
    np.testing.assert_allclose(streamed.mean, x.mean(0, np.float64), rtol=1e-12)
    np.testing.assert_allclose(streamed.covariance, np.cov(x.astype(np.float64).T), rtol=1e-9)
    np.testing.assert_allclose(streamed.root @ streamed.root.T, streamed.covariance, rtol=1e-9, atol=1e-12)


def test_weights_count_pictures_several_times():
    x, weights = features(30, 4, 0), np.random.default_rng(0).integers(0, 4, 30)
    weighted = feature_statistics(np.array_split(x, 4), weights)
    repeated = feature_statistics([np.repeat(x, weights, axis=0)])
    assert weighted.count == repeated.count
    np.testing.assert_allclose(weighted.mean, repeated.mean)
    np.testing.assert_allclose(weighted.covariance, repeated.covariance)


def test_singular_covariances_are_exact_and_said_to_be_unreliable():
    shift = np.arange(64.0)
    one = features(10, 64, 0).astype(np.float64)
    with pytest.warns(UserWarning, match="10 pictures for features of dimension 64"):
        distance = frechet_distance(feature_statistics([one]), feature_statistics([one + shift]))
    assert distance == pytest.approx(shift @ shift, rel=1e-9)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        enough = feature_statistics([features(65, 64, 0)])
        assert frechet_distance(enough, enough) == pytest.approx(0, abs=1e-6 * np.trace(enough.covariance))


def test_measuring_agrees_with_the_distance_and_its_interval_narrows():
    reference = feature_statistics([features(2000, 4, 0)])
    x = features(1600, 4, 1)
    few, many = (measure_frechet(x[:count], reference, resamples=60) for count in (100, 1600))
    assert many.value == pytest.approx(frechet_distance(feature_statistics([x]), reference), rel=1e-12)
    widths = [one.interval().high - one.interval().low for one in (few, many)]
    assert widths[1] < 0.5 * widths[0]
    low, high = few.interval()
    assert low < few.value < high


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        ([np.full((3, 2), np.nan)], "finite features"),
        ([np.ones((1, 2))], "at least two pictures, got 1"),
        ([], "at least two pictures, got 0"),
    ],
)
def test_bad_features_are_refused(batches, message):
    with pytest.raises(ValueError, match=message):
        feature_statistics(batches)


def test_other_networks_do_not_compare():
    with pytest.raises(ValueError, match="dimensions 3 and 4"):
        frechet_distance(feature_statistics([features(9, 3, 0)]), feature_statistics([features(9, 4, 0)]))


def test_statistics_are_saved_whole(tmp_path):
    statistics = feature_statistics([features(20, 3, 0)])
    path = tmp_path / "deep" / "one.safetensors"
    statistics.save(path)
    again = FeatureStatistics.load(path)
    assert again.count == 20 and (again.mean == statistics.mean).all() and (again.scatter == statistics.scatter).all()
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(ValueError, match="expected statistics in .*one.safetensors"):
        FeatureStatistics.load(path)


def test_inception_features_are_pytorch_fids(inception_weights, tmp_path):
    files = [tmp_path / f"{index}.png" for index in range(3)]
    for file, picture in zip(files, PICTURES):
        picture.save(file)
    network = load_network("inception", device="cpu")
    reference = fid_score.get_activations(files, InceptionV3([3]), batch_size=3, num_workers=0)
    np.testing.assert_array_equal(network(PICTURES[:3]), reference.astype(np.float32))
    assert "bilinear without antialiasing" in network.name


def test_clean_resizing_is_antialiased(inception_weights):
    clean, plain = (load_network("inception", device="cpu", clean=clean) for clean in (True, False))
    stripes = Image.fromarray(np.tile(np.array([[[0] * 3, [255] * 3]], np.uint8), (700, 350, 1)))
    pixels = clean.transform(stripes)
    assert pixels.shape == (3, 299, 299)
    assert pixels[:, 20:-20, 20:-20].std() < 0.5 * plain.transform(stripes)[:, 20:-20, 20:-20].std()
    flat = Image.new("RGB", (50, 80), (10, 100, 200))
    torch.testing.assert_close(clean.transform(flat)[:, 9, 9], torch.tensor([10, 100, 200]) / 255)
    assert clean.name != plain.name and clean([flat]).shape == (1, 2048)


def unreachable(*arguments, **options):
    raise URLError("no network")


def test_missing_inception_weights_are_named(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr("pytorch_fid.inception.load_state_dict_from_url", unreachable)
    with pytest.raises(ValueError, match=r"put pt_inception-2015-12-05-6726825d.pth into .*checkpoints"):
        load_network("inception")


@torch.no_grad()
def test_open_clip_features_are_its_own(small_clip):
    model, transform = open_clip.create_model_from_pretrained(small_clip)
    expected = model.eval().encode_image(torch.stack([transform(picture) for picture in PICTURES]))
    network = load_network(f"open_clip:{small_clip}", device="cpu")
    np.testing.assert_allclose(np.concatenate(list(network.batches(PICTURES, 3))), expected, atol=1e-5)


@torch.no_grad()
def test_timm_features_are_its_own(tmp_path):
    torch.manual_seed(0)
    model = timm.create_model("test_vit", num_classes=0).eval()
    torch.save(model.state_dict(), tmp_path / "weights.pth")
    network = load_network("timm:test_vit", str(tmp_path / "weights.pth"), device="cpu")
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
    np.testing.assert_allclose(network(PICTURES), model(torch.stack([transform(p) for p in PICTURES])), atol=1e-5)


@pytest.mark.parametrize(
    ("name", "clean", "message"), [("vgg", False, "expected 'inception'"), ("timm:vgg", True, "resizes its own way")]
)
def test_unknown_networks_are_refused(name, clean, message):
    with pytest.raises(ValueError, match=message):
        load_network(name, clean=clean)


def test_statistics_are_cached_by_content(small_clip, tmp_path):
    network = load_network(f"open_clip:{small_clip}", device="cpu")
    calls, forward = [], network.forward
    network.forward = lambda pixels: calls.append(1) or forward(pixels)
    first = cached_statistics(PICTURES, network, tmp_path)
    again = cached_statistics([picture.copy() for picture in PICTURES], network, tmp_path)
    assert len(calls) == 1 and (first.mean == again.mean).all()
    changed = PICTURES[0].copy()
    changed.putpixel((0, 0), (1, 2, 3))
    cached_statistics([changed, *PICTURES[1:]], network, tmp_path)
    network.name += " other"
    cached_statistics(PICTURES, network, tmp_path)
    assert len(calls) == 3 and len(list(tmp_path.iterdir())) == 3


def test_broken_pictures_are_named_or_skipped(small_clip, tmp_path, capsys):
    network = load_network(f"open_clip:{small_clip}", device="cpu")
    good, bad = tmp_path / "good.png", tmp_path / "bad.png"
    PICTURES[0].resize((200, 200)).save(good)
    bad.write_bytes(good.read_bytes()[:200])
    with pytest.raises(ValueError, match=r"picture .*bad.png: .*skip broken"):
        cached_statistics([good, bad, good], network, tmp_path / "cache")
    assert not (tmp_path / "cache").exists()
    assert cached_statistics([good, bad, good], network, tmp_path / "cache", skip_broken=True).count == 2
    assert f"skipped picture {bad}" in capsys.readouterr().out
