"""Low-rank adapters (LoRA, Hu et al. 2021): which matrices get them, and on which base they may be put."""

import hashlib
import json
from pathlib import Path

import torch
from peft import PeftConfig, PeftModel
from torch import nn
from transformers import AutoModelForCausalLM, GenerationConfig

from ..modeling_cm3leon import CM3LeonForCausalLM
from ..processing_cm3leon import CM3LeonProcessor

TARGETS = ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"]  # all matrices of the layers
BASE_FILE = "base.json"


def digests(model: nn.Module) -> dict[str, str]:
    """
    A digest of each weight of the base, by its name in the base, the same in float32 and bfloat16.

    Adapters are left out, and so are quantised weights, which no longer are what they were.
    """
    found = {}
    for name, weight in model.named_parameters():
        own = name.replace(".base_layer", "").replace(".original_module", "")
        if weight.is_floating_point() and not any(part in name for part in ("lora_", "modules_to_save")):
            bits = weight.detach().to(torch.bfloat16).cpu().contiguous().view(torch.uint8).numpy()
            found[own] = hashlib.sha256(bits).hexdigest()[:16]
    return found


def save_adapters(model: PeftModel, processor: CM3LeonProcessor, folder: str, generation: dict) -> None:
    """
    Saves adapters with what they need: their base's name and digests, generation defaults, and the processor.

    The folder is one that `AutoPeftModelForCausalLM`, `AutoModelForCausalLM` and `pipeline("any-to-any")` load, as long
    as the base lies where it was.
    """
    model.save_pretrained(folder)
    GenerationConfig.from_dict(generation).save_pretrained(folder)
    processor.save_pretrained(folder)
    Path(folder, BASE_FILE).write_text(json.dumps(digests(model.get_base_model()), indent=2), encoding="utf-8")


def load_adapters(folder: str, base: str | CM3LeonForCausalLM | None = None, **kwargs) -> PeftModel:
    """
    Puts adapters on their base; `merge_and_unload()` of what is returned is a plain model.

    Args:
        folder (`str`): What [`save_adapters`] wrote.
        base (`str` or [`CM3LeonForCausalLM`], *optional*): The base, or its folder; where it lay in training by
            default.
        kwargs: Arguments of `AutoModelForCausalLM.from_pretrained` for the base.

    Raises:
        ValueError: if the folder holds no adapters, or the base is not the one that they were trained on.
    """
    if not Path(folder, "adapter_config.json").is_file():
        raise ValueError(f"expected adapters in {folder}, found no adapter_config.json there; name a LoRA run's output")
    base = base or PeftConfig.from_pretrained(folder).base_model_name_or_path
    model = AutoModelForCausalLM.from_pretrained(base, **kwargs) if isinstance(base, str) else base
    check_base(folder, model)
    model.generation_config = GenerationConfig.from_pretrained(folder)
    return PeftModel.from_pretrained(model, folder)


def check_base(folder: str, model: CM3LeonForCausalLM) -> None:
    """
    Makes sure that a model is the base of these adapters.

    Raises:
        ValueError: if a weight has another shape or other values than it had in training.
    """
    path = Path(folder, BASE_FILE)
    if not path.is_file():
        raise ValueError(f"expected {path}, which says what base the adapters belong to, found none; train them again")
    trained_on, here = json.loads(path.read_text(encoding="utf-8")), digests(model)
    common = trained_on.keys() & here.keys()
    other = sorted(name for name in common if trained_on[name] != here[name])
    if other or not common:
        wanted = PeftConfig.from_pretrained(folder).base_model_name_or_path
        raise ValueError(
            f"expected {wanted}, which the adapters in {folder} were trained on, got {model.name_or_path or 'a model'} "
            f"with other values in {(other or sorted(here))[0]}; load that base, or train adapters on this one"
        )
