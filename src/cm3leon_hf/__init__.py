"""CM3Leon for the Hugging Face ecosystem: one model that reads and writes text and images (arXiv 2309.02591)."""

from importlib import import_module

from .registration import register_when_transformers_is_ready

__version__ = "0.1.0"

_HOMES = {
    "CM3LeonConfig": "configuration_cm3leon",
    "CM3LeonForCausalLM": "modeling_cm3leon",
    "CM3LeonModel": "modeling_cm3leon",
    "CM3LeonProcessor": "processing_cm3leon",
    "CM3LeonVQGAN": "modeling_vqgan",
    "CM3LeonVQGANConfig": "configuration_vqgan",
    "BatchedGuidanceLogitsProcessor": "logits_processors",
    "ContrastiveLogitsProcessor": "logits_processors",
    "ImageTextGuidanceLogitsProcessor": "logits_processors",
    "KnownTokenLogitsProcessor": "logits_processors",
    "ModalityLogitsProcessor": "logits_processors",
    "TextHolesLogitsProcessor": "logits_processors",
    "Vocabulary": "vocabulary",
    "default_bank": "shipped",
    "default_clip": "shipped",
    "default_model": "shipped",
    "default_ranker": "shipped",
    "default_tuned_model": "shipped",
    "optimize_for_cpu": "cpu_inference",
}
__all__ = [*_HOMES]


def __getattr__(name: str):
    """Imports a public name when it is first used, so that importing the package costs next to nothing."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f".{_HOMES[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])


register_when_transformers_is_ready()
