"""The loss of a sequence from its hidden states, without ever holding its logits."""

import torch
from torch.nn import functional
from transformers.utils import is_torch_greater_or_equal

CHUNK = 512  # tokens whose logits exist at a time


def has_chunked_loss() -> bool:
    """Whether this torch has a chunked `linear_cross_entropy`; it came with 2.13."""
    return is_torch_greater_or_equal("2.13")


def chunked_causal_loss(
    hidden_states: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.LongTensor,
    num_items_in_batch: torch.Tensor | int | None = None,
) -> torch.Tensor:
    """
    transformers' causal language model loss, computed some hundred tokens at a time.

    At a vocabulary of 64,512 ids, logits in float32 and their gradients take more memory and time than all layers of
    a small model.

    Args:
        hidden_states (`torch.Tensor` of shape `(batch, sequence_length, hidden_size)`): What the head reads.
        weight (`torch.Tensor` of shape `(vocab_size, hidden_size)`): The head.
        labels (`torch.LongTensor` of shape `(batch, sequence_length)`): Ids to predict, shifted here; -100 is left out.
        num_items_in_batch (`torch.Tensor` or `int`, *optional*): What to divide the sum by; by default the number of
            labels that are predicted.

    Returns:
        The loss, a float32 scalar in nats. Products are computed in autocast's dtype; each token's loss is rounded to
        it, and their sum is not.

    Raises:
        ImportError: if torch is older than 2.13.
    """
    if not has_chunked_loss():
        raise ImportError(
            f"expected torch 2.13 or newer for a loss without logits, got {torch.__version__}; update torch, or leave "
            "loss_only out"
        )
    kind = hidden_states.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden_states.dtype
    targets = labels[:, 1:].flatten()
    with torch.autocast(kind, enabled=False):
        losses = functional.linear_cross_entropy(
            hidden_states[:, :-1].flatten(0, 1).to(dtype),
            weight.to(dtype),
            targets,
            reduction="none",  # a mean would be rounded to the products' dtype
            options=torch.nn.LinearCrossEntropyOptions(batch_chunk_size=CHUNK, acc_policy="accurate"),
        )
    count = (targets != -100).sum() if num_items_in_batch is None else num_items_in_batch
    return losses.float().sum() / count
