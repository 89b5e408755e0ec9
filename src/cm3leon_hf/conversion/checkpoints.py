"""Reads other people's checkpoint files: tensors alone, never code."""

import json
import pickle
import re
import zipfile
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

STANDARD_NAMES = (  # safetensors first: they cannot hold code
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
ENDINGS = (".safetensors", ".bin", ".ckpt", ".pt", ".pth")
WRAPPERS = ("ema", "model", "state_dict")  # names under which training loops keep a model's weights


def read_weights(source: Path) -> dict[str, torch.Tensor]:
    """
    All tensors of a checkpoint by their names, on the CPU; files are mapped into memory where their format allows.

    Args:
        source (`Path`): A file (safetensors, or pickled tensors such as `.ckpt`), an index of shards
            (`….index.json`), or a folder with one of them. Weights under `state_dict`, `model` or `ema` are found.

    Raises:
        ValueError: if there is no such file, more than one, a shard is missing, or a file is broken, has no weights, or
            holds objects that loading would have to run as code.
    """
    file = find_file(source)
    return read_shards(file) if file.name.endswith(".index.json") else read_file(file)


def find_file(source: Path) -> Path:
    if source.is_file():
        return source
    if not source.is_dir():
        raise ValueError(
            f"expected a checkpoint's file or folder, got {source}, which does not exist; download it first, from the "
            f"Hub with `hf download NAME --local-dir FOLDER`"
        )
    standard = [source / name for name in STANDARD_NAMES if (source / name).is_file()]
    found = standard[:1] or sorted(file for file in source.iterdir() if file.suffix in ENDINGS)
    if len(found) != 1:
        names = ", ".join(file.name for file in found) or "none"
        raise ValueError(
            f"expected one file of weights ({', '.join(ENDINGS)}) in {source}, got {names}; name the file itself"
        )
    return found[0]


def read_shards(index: Path) -> dict[str, torch.Tensor]:
    try:
        homes = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"expected an index of shards with a weight_map, got {index}: {error!r}") from error
    shards = sorted(set(homes.values()))
    missing = [shard for shard in shards if not (index.parent / shard).is_file()]
    if missing:
        raise ValueError(
            f"expected {len(shards)} shards beside {index}, missing: {', '.join(missing)}; download them as well"
        )
    weights = {name: weight for shard in shards for name, weight in read_file(index.parent / shard).items()}
    lost = sorted(homes.keys() - weights.keys())
    if lost:
        raise ValueError(
            f"expected {lost[0]} in {homes[lost[0]]}, as {index.name} says, got a shard without it ({len(lost)} names "
            "in all); download index and shards of one version"
        )
    return weights


def read_file(file: Path) -> dict[str, torch.Tensor]:
    if file.suffix == ".safetensors":
        try:
            return load_file(file)
        except SafetensorError as error:
            raise ValueError(f"expected a whole safetensors file, got {file}: {error}; download it again") from error
    return tensors_of(unpickle(file), file)


def unpickle(file: Path):
    """What a pickled file holds, provided that it is made of tensors, numbers and texts alone."""
    try:
        return torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except pickle.UnpicklingError as error:
        code = re.search(r"GLOBAL (\S+)", str(error))
        if code is None:
            raise ValueError(
                f"expected a checkpoint of torch.save, got {file}, which is none; look whether it is an error page, or "
                "the pointer to a large file, and download it again"
            ) from error
        raise ValueError(
            f"expected tensors alone, got {file} with {code[1]}: loading it would run code from the file. If you trust "
            "its source, save the weights on their own, in an environment that may run it: "
            "torch.save(torch.load(file, weights_only=False)['state_dict'], 'weights.pt')"
        ) from error
    except (RuntimeError, EOFError) as error:
        reason = str(error).split(".")[0] or "it ends too early"
        raise ValueError(f"expected a whole checkpoint, got {file}: {reason}; download it again") from error


def tensors_of(loaded, file: Path) -> dict[str, torch.Tensor]:
    """The model's weights among what a training loop has saved."""
    if isinstance(loaded, dict):
        loaded = next((loaded[name] for name in WRAPPERS if isinstance(loaded.get(name), dict)), loaded)
        weights = {name: value for name, value in loaded.items() if isinstance(value, torch.Tensor)}
        if weights:
            return weights
    held = ", ".join(map(str, list(loaded)[:5])) if isinstance(loaded, dict) else type(loaded).__name__
    raise ValueError(f"expected weights by name, alone or under {', '.join(WRAPPERS)}, got {file} with {held}")
