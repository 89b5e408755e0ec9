"""Intervals, precision and recall, R@k, NDCG, perplexity and reconstruction, each against a reference."""

import numpy as np
import pytest
import scipy.stats
import torch
from conftest import COLOURS, draw
from PIL import Image
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure
from torchmetrics.functional.retrieval import retrieval_normalized_dcg

from cm3leon_hf.evaluation.clip_score import clip_score
from cm3leon_hf.evaluation.features import load_network
from cm3leon_hf.evaluation.intervals import bootstrap, measure_mean
from cm3leon_hf.evaluation.perplexity import modality_losses
from cm3leon_hf.evaluation.precision_recall import precision_and_recall
from cm3leon_hf.evaluation.recall import recall_at, text_ranks
from cm3leon_hf.evaluation.reconstruction import measure_reconstruction, reconstruction_scores
from cm3leon_hf.evaluation.visdial import visdial_ndcg


def test_the_interval_of_a_mean_is_scipys():
    values = np.random.default_rng(0).exponential(size=200)
    measured = measure_mean(values, resamples=4000)
    reference = scipy.stats.bootstrap((values,), np.mean, method="percentile", n_resamples=4000, rng=1)
    low, high = reference.confidence_interval
    assert measured.value == pytest.approx(values.mean())
    assert measured.interval() == pytest.approx((low, high), abs=0.1 * (high - low))
    assert measured.interval(0.5).high < measured.interval(0.9).high


def test_differences_are_paired():
    rng = np.random.default_rng(0)
    hard = rng.normal(size=100)
    one, other = measure_mean(hard + 0.1), measure_mean(hard)
    low, high = (one - other).interval()
    assert low == pytest.approx(0.1) and high == pytest.approx(0.1)
    assert one.interval().high - one.interval().low > 0.1
    with pytest.raises(ValueError, match="200 and 10"):
        one - measure_mean(hard, resamples=10)


def test_intervals_of_shares_stay_in_range_and_centred_ones_hold_the_value():
    nearly_all = measure_mean([1.0] * 30 + [0.0])
    assert 0.85 < nearly_all.interval().low < 1 == nearly_all.interval().high
    shifted = bootstrap(lambda weights: (weights > 0).sum(), 50)
    assert shifted.interval().high < shifted.value
    low, high = shifted.centred().interval()
    assert low < shifted.value < high and high - low == pytest.approx(np.subtract(*shifted.interval()[::-1]))


def test_draws_are_fixed_by_the_seed_and_items_alone():
    seen = [bootstrap(lambda weights: weights[0], 9, 50, seed).replicates for seed in (0, 0, 1)]
    assert (seen[0] == seen[1]).all() and (seen[0] != seen[2]).any() and seen[0].max() > 1
    with pytest.raises(ValueError, match="items and resamples"):
        measure_mean([])
    with pytest.raises(ValueError, match="NaN or infinity at item 1"):
        measure_mean([1.0, float("nan")])


def brute_force(points, centres, k):
    """Kynkäänniemi et al., equations 1 and 2, one pair at a time."""
    radii = [sorted(np.linalg.norm(centres - centre, axis=1))[k] for centre in centres]
    return [any(np.linalg.norm(p - c) <= r for c, r in zip(centres, radii)) for p in points]


def test_precision_and_recall_by_brute_force():
    rng = np.random.default_rng(0)
    real, drawn = rng.normal(size=(60, 3)), rng.normal(size=(40, 3)) * 0.5 + 0.9
    for k in (1, 3):
        precision, recall = precision_and_recall(drawn, real, k)
        assert precision.tolist() == brute_force(drawn, real, k) and recall.tolist() == brute_force(real, drawn, k)
        assert 0 < recall.mean() < precision.mean()
    assert all(share.all() for share in precision_and_recall(real, real))
    assert not any(share.any() for share in precision_and_recall(real, real + 100))
    with pytest.raises(ValueError, match="more than 3 pictures"):
        precision_and_recall(real[:3], real)
    with pytest.raises(ValueError, match="dimensions 2 and 3"):
        precision_and_recall(real[:, :2], real)


def test_ranks_count_the_other_texts_that_fit_as_well():
    texts = ["red", "green", "red", "blue"]
    words = np.eye(3)[[0, 1, 0, 2]]
    pictures = np.array([[0.9, 0.1, 0.3], [0.5, 0.4, 0.2], [0.1, 0.2, 0.3], [0, 0, 1]])
    ranks = text_ranks(pictures, words, texts)
    assert ranks.tolist() == [1, 2, 3, 1]
    assert recall_at(ranks, 1).mean() == 0.5 and recall_at(ranks, 2).mean() == 0.75
    assert text_ranks(np.ones((4, 3)), words, texts).tolist() == [3] * 4, "pictures that say nothing rank last"
    with pytest.raises(ValueError, match="got 2 for 4"):
        text_ranks(pictures[:2], words, texts)


def test_clip_scores_are_not_negative():
    assert clip_score([0.3, -0.1, 0.0]).tolist() == pytest.approx([0.75, 0, 0])


def test_ndcg_is_torchmetrics_at_the_number_of_relevant_options():
    rng = np.random.default_rng(0)
    relevance = rng.integers(0, 6, (50, 20)) * (rng.random((50, 20)) < 0.3)
    relevance[:, 0] += 1
    scores = rng.normal(size=(50, 20))
    expected = [
        retrieval_normalized_dcg(torch.from_numpy(s).float(), torch.from_numpy(r), top_k=int((r > 0).sum())).item()
        for s, r in zip(scores, relevance)
    ]
    np.testing.assert_allclose(visdial_ndcg(scores, relevance / 6), expected, atol=1e-6)
    np.testing.assert_allclose(visdial_ndcg(relevance, relevance / 6), 1)


@pytest.mark.parametrize(
    ("scores", "relevance", "message"),
    [
        ([[1.0, 2.0]], [[1.0]], "got .1, 2., .1, 1."),
        ([[1.0, float("nan")]], [[1.0, 0]], "NaN in question 0"),
        ([[1.0, 2.0], [1.0, 2.0]], [[1.0, 0], [0, 0]], "none in 1"),
    ],
)
def test_bad_relevance_is_refused(scores, relevance, message):
    with pytest.raises(ValueError, match=message):
        visdial_ndcg(scores, relevance)


@torch.no_grad()
def test_perplexity_tells_modalities_apart(model, vocabulary):
    torch.manual_seed(0)
    text = torch.randint(vocabulary.text_size, (3, 5))
    image = torch.randint(vocabulary.text_size, vocabulary.size, (3, 7))
    ids = torch.cat([text, image], dim=1)
    labels = ids.clone()
    labels[0, 8:] = -100
    batches = [{"input_ids": ids[rows], "labels": labels[rows]} for rows in (slice(0, 2), slice(2, 3))]
    losses = modality_losses(model, batches, vocabulary)
    log_p = model(ids).logits.double().log_softmax(-1)
    paid = -log_p[:, :-1].gather(-1, ids[:, 1:, None])[..., 0]
    np.testing.assert_allclose(losses["text"].total, paid[:, :4].sum(1), rtol=1e-5)
    assert losses["text"].tokens.tolist() == [4, 4, 4] and losses["image"].tokens.tolist() == [3, 7, 7]
    expected = (paid[0, 4:7].sum() + paid[1:, 4:].sum()) / 17
    assert losses["image"].perplexity().value == pytest.approx(expected.exp().item(), rel=1e-5)
    both = sum(part.total.sum() for part in losses.values()) / 29
    assert model(ids, labels=labels).loss.item() == pytest.approx(both, rel=1e-5)
    nothing = modality_losses(model, [{"input_ids": text, "labels": text}], vocabulary)["image"]
    with pytest.raises(ValueError, match="expected tokens of this modality"):
        nothing.perplexity()


def test_reconstruction_is_torchmetrics_without_borders(small_clip):
    originals = [draw(colour, "circle", 32) for colour in COLOURS]
    rng = np.random.default_rng(0)
    noise = [rng.normal(0, 8 + 8 * at, (32, 32, 3)) for at in range(4)]
    noisy = [np.clip(np.array(image) + added, 0, 255).astype(np.uint8) for image, added in zip(originals, noise)]
    drawn = [Image.fromarray(array) for array in noisy]
    scores = reconstruction_scores(originals, drawn)
    pixels = [torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).double() for images in (noisy, originals)]
    psnr = peak_signal_noise_ratio(*pixels, data_range=255.0, reduction="none", dim=(1, 2, 3))
    np.testing.assert_allclose(scores.psnr, psnr, atol=1e-5)
    ssim = structural_similarity_index_measure(*pixels, data_range=255.0, return_full_image=True)[1]
    np.testing.assert_allclose(scores.ssim, ssim[..., 5:-5, 5:-5].mean((1, 2, 3)), atol=1e-6)
    network = load_network(f"open_clip:{small_clip}", device="cpu")
    with pytest.warns(UserWarning, match="unreliable"):
        measured = measure_reconstruction(originals, drawn, network, resamples=5)
    assert measured["psnr"].value == pytest.approx(scores.psnr.mean()) and measured["rfid"].value > 0
    with pytest.raises(ValueError, match="one size"):
        reconstruction_scores(originals, [*drawn[1:], draw("red", "circle", 16)])
    with pytest.raises(ValueError, match="got 3 for 4"):
        reconstruction_scores(originals, drawn[1:])
