import pytest
import torch
from conftest import small_model

from cm3leon_hf.modeling_loss import CHUNK, chunked_causal_loss, has_chunked_loss

needs_torch = pytest.mark.skipif(not has_chunked_loss(), reason="torch has no chunked linear_cross_entropy before 2.13")


@pytest.fixture
def batch(vocabulary) -> dict[str, torch.Tensor]:
    """More tokens than a chunk, some of them left out."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(6, vocabulary.size, (CHUNK // 24 + 3, 33), generator=generator)
    labels = torch.where(torch.rand(ids.shape, generator=generator) < 0.2, -100, ids)
    return {"input_ids": ids, "labels": labels}


def loss_and_gradients(batch: dict, **kwargs) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    torch.manual_seed(0)
    model = small_model().train()
    output = model(**batch, **kwargs)
    output.loss.backward()
    assert (output.logits is None) == kwargs.get("loss_only", False)
    return output.loss.detach(), {name: weight.grad for name, weight in model.named_parameters()}


@needs_torch
@pytest.mark.parametrize("num_items_in_batch", [None, 1000])
def test_loss_without_logits_is_the_ordinary_one(batch, num_items_in_batch):
    expected = loss_and_gradients(batch, num_items_in_batch=num_items_in_batch)
    found = loss_and_gradients(batch, num_items_in_batch=num_items_in_batch, loss_only=True)
    torch.testing.assert_close(found, expected)


@needs_torch
def test_sum_is_not_rounded_to_the_dtype_of_autocast(batch):
    with torch.autocast("cpu", torch.bfloat16):
        expected, gradients = loss_and_gradients(batch)
        found, others = loss_and_gradients(batch, loss_only=True)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=5e-4, atol=0)  # bfloat16 has steps of 8e-3
    for name, gradient in gradients.items():
        assert torch.nn.functional.cosine_similarity(gradient.flatten(), others[name].flatten(), dim=0) > 0.999, name


@needs_torch
def test_labels_that_are_all_left_out_are_as_before():
    hidden, weight = torch.randn(1, 4, 8), torch.randn(16, 8)
    labels = torch.full((1, 4), -100)
    assert chunked_causal_loss(hidden, weight, labels).isnan()  # as transformers' mean over nothing
    assert chunked_causal_loss(hidden, weight, labels, num_items_in_batch=4) == 0
