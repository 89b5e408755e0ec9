import pytest
import torch
import trl.trainer.utils
from conftest import small_model
from transformers import TrainingArguments
from trl import SFTConfig

from cm3leon_hf.modeling_loss import CHUNK, chunked_causal_loss, has_chunked_loss
from cm3leon_hf.training.instruction import InstructionTrainer
from cm3leon_hf.training.pretraining import PretrainingTrainer

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


@needs_torch
@pytest.mark.skipif(not hasattr(trl.trainer.utils, "add_fused_lm_head"), reason="this TRL computes logits")
def test_fine_tuning_and_pretraining_compute_the_same_loss_without_logits(batch, tokenizer, tmp_path, monkeypatch):
    """TRL's own loss and ours: one value, the same gradients, and the head is never called."""
    monkeypatch.setattr("cm3leon_hf.training.throughput.matmul_tflops", lambda dtype, device: 1.0)
    batch |= {"attention_mask": torch.ones_like(batch["input_ids"])}
    quiet = {"use_cpu": True, "report_to": "none"}
    pretraining = PretrainingTrainer(
        model=small_model(), args=TrainingArguments(str(tmp_path), **quiet), vocabulary=small_model().config.vocabulary
    )
    dataset_kwargs = {"skip_prepare_dataset": True}
    tuning = InstructionTrainer(
        model=small_model(),
        args=SFTConfig(str(tmp_path), bf16=False, dataset_kwargs=dataset_kwargs, **quiet),
        train_dataset=[],
        processing_class=tokenizer,
    )
    found = []
    for trainer in (pretraining, tuning):
        model, called = trainer.model.train(), []
        model.lm_head.register_forward_hook(lambda *_, called=called: called.append(1))
        loss = trainer.compute_loss(model, dict(batch), num_items_in_batch=torch.tensor(1000))
        loss.backward()
        assert not called
        found.append((loss.detach(), {name: weight.grad for name, weight in model.named_parameters()}))
    torch.testing.assert_close(*found)
