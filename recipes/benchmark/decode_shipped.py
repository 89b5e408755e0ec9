"""What decode.py measures of the shipped model: the figures that need trained weights."""

import torch
from decode_measure import SAMPLING
from decode_models import quantization
from transformers import AutoProcessor

from cm3leon_hf import CM3LeonForCausalLM, default_model

SUBJECTS = ("red apple", "cat face", "rocket", "green heart", "pizza", "soccer ball", "key", "sun")
STYLES = ("fluent 3d", "fluent flat", "noto", "twemoji")


def shipped_model_figures() -> dict:
    """
    What needs trained weights: passes that Jacobi decoding saves, and greedy tokens that INT8 leaves as they are.

    The tokens are those of all styles: in one style's, a thousand, the share that stays is off by half a percent.
    """
    path = default_model()
    processor = AutoProcessor.from_pretrained(path)
    length = processor.vocabulary.image_length
    prompts = [f"{subject}, {style} style" for style in STYLES for subject in SUBJECTS]
    model = CM3LeonForCausalLM.from_pretrained(path, dtype=torch.bfloat16)
    int8 = CM3LeonForCausalLM.from_pretrained(path, dtype=torch.bfloat16, quantization_config=quantization("int8"))
    return {
        "jacobi_pass_ratio": length * len(SUBJECTS) / jacobi_passes(model, processor, prompts[: len(SUBJECTS)]),
        "int8_agreement": greedy_agreement(model, int8, processor.for_text_to_image(prompts), length),
    }


def jacobi_passes(model, processor, prompts: list[str]) -> int:
    """Forward passes that the pictures of the prompts take together, each drawn by itself."""
    torch.manual_seed(0)
    passes = []
    hook = model.model.register_forward_hook(lambda *_: passes.append(1))
    for prompt in prompts:
        model.generate(**processor.for_text_to_image(prompt), generation_mode="image", jacobi_window=16, **SAMPLING)
    hook.remove()
    return len(passes)


@torch.no_grad()
def greedy_agreement(model, other, inputs, length: int) -> float:
    """Fraction of the greedy tokens of `model` that `other` finds likeliest, too, behind the same tokens."""
    ids = model.generate(**inputs, generation_mode="image", guidance_scale=1.0, do_sample=False)
    mask = (ids != model.config.pad_token_id).long()
    first, second = (m(ids, attention_mask=mask, image_logits_only=True).logits.argmax(-1) for m in (model, other))
    return (first == second)[:, -length - 1 : -1].float().mean().item()
