"""Batches of so many tokens, on however many GPUs."""

from transformers import TrainingArguments


def set_accumulation(training: TrainingArguments, batch_tokens: int, length: int) -> None:
    """
    Lets a step accumulate gradients over as many batches as `batch_tokens` asks for; 0 leaves it as it is.

    Args:
        training (`TrainingArguments`): Says how many sequences each of how many processes reads at once.
        batch_tokens (`int`): Tokens of one optimizer step.
        length (`int`): Tokens of a sequence.

    Raises:
        ValueError: if the batch cannot be shared among the processes.
    """
    if not batch_tokens:
        return
    once = length * training.per_device_train_batch_size * training.world_size
    if batch_tokens % once:
        raise ValueError(
            f"expected batch_tokens to be a multiple of the {once} tokens that {training.world_size} processes read at "
            f"once, got {batch_tokens}; change per_device_train_batch_size"
        )
    training.gradient_accumulation_steps = batch_tokens // once
