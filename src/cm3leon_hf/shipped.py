"""Where the models and the memory bank that ship with the package lie."""

from pathlib import Path

MODEL, TUNED = "cm3leon-emoji", "cm3leon-emoji-sft"
CLIP, BANK, RANKER = "cm3leon-emoji-clip", "cm3leon-emoji-bank", "cm3leon-emoji-ranker"


def default_model() -> str:
    """
    Folder of the shipped model, for `from_pretrained`.

    Raises:
        FileNotFoundError: if it is not there.
    """
    return _folder(MODEL, "config.json")


def default_tuned_model() -> str:
    """
    Folder of the shipped model that was fine-tuned on the emoji tasks: editing, control images, questions and more.

    Raises:
        FileNotFoundError: if it is not there.
    """
    return _folder(TUNED, "config.json")


def default_clip() -> str:
    """
    The shipped CLIP as open_clip names it, `local-dir:…`, for [`~cm3leon_hf.retrieval.encoder.CLIPEncoder`].

    Raises:
        FileNotFoundError: if it is not there.
    """
    return f"local-dir:{_folder(CLIP, 'open_clip_config.json')}"


def default_ranker() -> str:
    """
    The shipped CLIP that tells styles and skin tones, for captions and edits of which the best is kept.

    As open_clip names it, `local-dir:…`. [`default_clip`], which retrieves, takes no notice of styles.

    Raises:
        FileNotFoundError: if it is not there.
    """
    return f"local-dir:{_folder(RANKER, 'open_clip_config.json')}"


def default_bank() -> str:
    """
    Folder of the shipped memory bank, for `MemoryBank.load`; its encoder is [`default_clip`].

    Raises:
        FileNotFoundError: if it is not there.
    """
    return _folder(BANK, "manifest.json")


def _folder(name: str, file: str) -> str:
    """A wheel carries the folder inside the package; a checkout has it under `model_cards/`."""
    package = Path(__file__).parent
    folders = (package / "models" / name, package.parents[1] / "model_cards" / name)
    for folder in folders:
        if (folder / file).is_file():
            return str(folder)
    raise FileNotFoundError(
        f"expected {name} in one of {[str(f) for f in folders]}, found no {file} there; train one as the README says "
        "and pass its folder"
    )
