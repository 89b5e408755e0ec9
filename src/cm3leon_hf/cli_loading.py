"""What the commands load: a model with its processor, a CLIP, retrieved documents."""

from pathlib import Path
from typing import Annotated

import typer

Model = Annotated[
    str | None,
    typer.Option(help="Model folder or hub name. The shipped emoji model when left out.", show_default=False),
]
Bank = Annotated[
    str | None, typer.Option(help="Memory bank to retrieve from. The shipped one when left out.", show_default=False)
]
ClipModel = Annotated[
    str | None,
    typer.Option(
        help="CLIP of open_clip that retrieves, and ranks candidates. The shipped ones when left out.",
        show_default=False,
    ),
]
ClipWeights = Annotated[
    str | None, typer.Option(help="Name or file of its weights, such as `openai`.", show_default=False)
]
TopP = Annotated[float, typer.Option(min=0, max=1, help="Sample among the likeliest tokens up to this sum.")]
Temperature = Annotated[float, typer.Option(min=0.01, help="Below 1 is safer, above 1 more varied.")]
Seed = Annotated[int | None, typer.Option(help="Seed; the same seed draws the same pictures.", show_default=False)]


def load_clip(model: str | None, weights: str | None):
    """The CLIP, the shipped one by default; it scores pictures and retrieves."""
    try:
        from .evaluation.clip_score import CLIPScorer
        from .shipped import default_clip

        return CLIPScorer(model or default_clip(), weights)
    except (ImportError, RuntimeError) as error:
        raise ValueError(f"expected a CLIP to rank candidates and retrieve, got {error}") from error


def load_ranker(model: str | None, weights: str | None):
    """The CLIP that ranks captions and edits, by default the shipped one that tells styles."""
    from .shipped import default_ranker

    return load_clip(model or default_ranker(), weights)


def load_augmenter(folder: str | None, encoder):
    """Finds documents in the bank, the shipped one by default, of this CLIP."""
    from .retrieval.augmenter import RetrievalAugmenter
    from .retrieval.memory_bank import MemoryBank
    from .shipped import default_bank

    bank = MemoryBank.load(folder or default_bank(), encoder.name)
    return RetrievalAugmenter(bank, encoder, training=False)


def load(path: str | None, seed: int | None):
    """The model, on the accelerator or optimized for the CPU, and its processor; seeds torch when asked to."""
    import torch
    from transformers import AutoModelForCausalLM, AutoProcessor, set_seed
    from transformers.utils import logging

    from .cpu_inference import optimize_for_cpu
    from .shipped import default_model

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    if seed is not None:
        set_seed(seed)
    path = path or default_model()
    processor = AutoProcessor.from_pretrained(path)
    model = (
        load_merged(path) if Path(path, "adapter_config.json").is_file() else AutoModelForCausalLM.from_pretrained(path)
    )
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    return model.to(accelerator) if accelerator else optimize_for_cpu(model), processor


def load_merged(folder: str):
    """The base of these adapters with the adapters in its weights."""
    try:
        from .training.adapters import load_adapters
    except ImportError as error:
        raise ValueError(f"expected what adapters need, got {error}; pip install 'cm3leon_hf[train]'") from error
    return load_adapters(folder).merge_and_unload()
