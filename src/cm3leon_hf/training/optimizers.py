"""Optimizers that Trainer does not know by name."""

from timm.optim import Muon
from transformers import PreTrainedModel, TrainingArguments

from ..modeling_cm3leon import CM3LeonDecoderLayer


def muon(model: PreTrainedModel, args: TrainingArguments) -> Muon:
    """
    Muon for the matrices of the decoder's layers, NAdamW for embeddings and head.

    Updates are scaled to AdamW's size, so AdamW's learning rate and weight decay apply as they are (Liu et al. 2025,
    "Muon is Scalable for LLM Training", section 2.2).
    """
    layers = [module for module in model.modules() if isinstance(module, CM3LeonDecoderLayer)]
    matrices = [weight for layer in layers for weight in layer.parameters()]
    inner = {id(weight) for weight in matrices}
    outer = [weight for weight in model.parameters() if id(weight) not in inner]
    return Muon(
        [{"params": matrices}, {"params": outer, "use_fallback": True}],
        lr=args.learning_rate,
        weight_decay=args.weight_decay,
        betas=(args.adam_beta1, args.adam_beta2),
        nesterov=True,
        adjust_lr_fn="match_rms_adamw",
    )
