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


@pytest.fixture
def tuning(tokenizer, tmp_path) -> InstructionTrainer:
    return InstructionTrainer(
        model=small_model(),
        args=SFTConfig(
            str(tmp_path), bf16=False, use_cpu=True, report_to="none", dataset_kwargs={"skip_prepare_dataset": True}
        ),
        train_dataset=[],
        processing_class=tokenizer,
    )


def loss_in(trainer, batch: dict) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The loss that a Trainer computes without ever calling the head, and its gradients."""
    model, called = trainer.model.train(), []
    model.zero_grad()
    hook = model.lm_head.register_forward_hook(lambda *_: called.append(1))
    loss = trainer.compute_loss(model, dict(batch), num_items_in_batch=torch.tensor(1000))
    loss.backward()
    hook.remove()
    assert not called
    return loss.detach(), {name: weight.grad.clone() for name, weight in model.named_parameters()}


@needs_torch
def test_fine_tuning_and_pretraining_compute_the_same_loss_without_logits(batch, tuning, tmp_path, monkeypatch):
    monkeypatch.setattr("cm3leon_hf.training.throughput.matmul_tflops", lambda dtype, device: 1.0)
    args = TrainingArguments(str(tmp_path), use_cpu=True, report_to="none")
    pretraining = PretrainingTrainer(model=small_model(), args=args, vocabulary=small_model().config.vocabulary)
    torch.testing.assert_close(loss_in(tuning, batch), loss_in(pretraining, batch))


@needs_torch
@pytest.mark.skipif(not hasattr(trl.trainer.utils, "add_fused_lm_head"), reason="this TRL computes logits")
@pytest.mark.parametrize("extra", ["attention_mask", "position_ids"])
def test_fine_tuning_on_a_cpu_computes_the_loss_of_trl_and_counts_its_tokens(extra, batch, tuning):
    ids = batch["input_ids"] = batch["input_ids"][:1] if extra == "position_ids" else batch["input_ids"]
    batch["labels"] = batch["labels"][: len(ids)]
    batch[extra] = torch.arange(ids.shape[1])[None] if extra == "position_ids" else torch.ones_like(ids)
    if extra == "attention_mask":  # one is shorter
        batch[extra][0, -3:], batch["labels"][0, -3:] = 0, -100
    read = int(batch["attention_mask"].sum()) if extra == "attention_mask" else ids.numel()
    assert tuning.own_loss
    own, counted = loss_in(tuning, batch), tuning._total_train_tokens
    tuning.own_loss = False
    torch.testing.assert_close(own, loss_in(tuning, batch))
    assert counted == read == tuning._total_train_tokens - counted
