"""Where the model that ships with the package lies."""

from pathlib import Path

NAME = "cm3leon-emoji"


def default_model() -> str:
    """
    Folder of the shipped model, for `from_pretrained`.

    A wheel carries it inside the package; a checkout has it under `model_cards/`.

    Raises:
        FileNotFoundError: if neither is there.
    """
    package = Path(__file__).parent
    folders = (package / "models" / NAME, package.parents[1] / "model_cards" / NAME)
    for folder in folders:
        if (folder / "config.json").is_file():
            return str(folder)
    raise FileNotFoundError(
        f"expected the shipped model in one of {[str(f) for f in folders]}, found no config.json there; train one as "
        "the README says and pass its folder"
    )
