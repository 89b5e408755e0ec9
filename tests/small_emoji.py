"""A small corpus of drawn emoji on disk, and the instruction rows that the recipe makes of it."""

from pathlib import Path

import emoji_tasks
import numpy as np
import yaml
from conftest import GRID_SIZE, IMAGE_SIZE, REPOSITORY, draw
from datasets import Dataset, concatenate_datasets
from small_banks import SeededEncoder

from cm3leon_hf.retrieval.augmenter import RetrievalAugmenter
from cm3leon_hf.retrieval.memory_bank import MemoryBank

STYLES = ("noto", "twemoji")
HELD_OUT_CONCEPT = "goat"
EMOJI = {  # concept: hexcode, group, subgroup, colour, shape, skin tones
    "red heart": ("2764", "smileys-emotion", "heart", "red", "circle", [""]),
    "blue heart": ("1F499", "smileys-emotion", "heart", "blue", "circle", [""]),
    "man artist": ("1F468-200D-1F3A8", "people-body", "person-role", "green", "circle", [""]),
    "woman artist": ("1F469-200D-1F3A8", "people-body", "person-role", "yellow", "circle", [""]),
    "waving hand": ("1F44B", "people-body", "hand-fingers-open", "brown", "square", ["", "light", "dark"]),
    "thumbs up": ("1F44D", "people-body", "hand-fingers-closed", "brown", "circle", ["", "light", "dark"]),
    "ok button": ("1F197", "symbols", "alphanum", "blue", "square", [""]),
    "pig": ("1F416", "animals-nature", "animal-mammal", "pink", "circle", [""]),
    "pizza": ("1F355", "food-drink", "food-prepared", "orange", "square", [""]),
    "rocket": ("1F680", "travel-places", "transport-air", "grey", "square", [""]),
    HELD_OUT_CONCEPT: ("1F410", "animals-nature", "animal-mammal", "black", "square", [""]),
}
HELD_OUT_PAIRS = {
    (concept, "noto") for concept in ("blue heart", "woman artist", "waving hand", "ok button", "pig", "pizza")
}
ROWS = {
    "train": dict.fromkeys(
        [f"edit/{kind}" for kind in ("style", "skin_tone", "gender", "colour")]
        + ["no_edit", "canny", "scribble", "segmentation", "write/word", "write/emoji", "captioning"]
        + ["grounded", "grounded/single"]
        + [f"vqa/{kind}" for kind in ("style", "skin_tone", "group", "name", "left", "right", "on_left", "on_right")]
        + ["long_caption", "reasoning/group", "reasoning/relative"],
        8,
    )
    | {"captioning": 40},
    "heldout_pairs": {"edit/style": 4, "edit/skin_tone": 4, "edit/gender": 2, "edit/colour": 2, "no_edit": 3}
    | {"canny": 2, "grounded": 3, "captioning": 8, "vqa/name": 3, "reasoning/group": 2, "write/emoji": 2}
    | {"scribble": 2, "segmentation": 2, "long_caption": 2},
    "heldout_concepts": {"edit/style": 2, "no_edit": 2},
}


def split_of(concept: str, style: str) -> str:
    if concept == HELD_OUT_CONCEPT:
        return "heldout_concepts"
    return "heldout_pairs" if (concept, style) in HELD_OUT_PAIRS else "train"


def emoji_rows() -> dict[str, list[dict]]:
    """Every picture with codes that no other has."""
    rng, splits = np.random.default_rng(0), {split: [] for split in ROWS}
    for concept, (hexcode, group, subgroup, colour, shape, tones) in EMOJI.items():
        for style in STYLES:
            for tone in tones:
                subject = f"{concept} with {tone} skin tone" if tone else concept
                row = {"image": draw(colour, shape), "concept": concept, "hexcode": hexcode, "style": style}
                row |= {"group": group, "subgroup": subgroup, "skin_tone": tone, "tags": ["nice", "small"]}
                row |= {"source": f"{style} {subject}", "captions": [f"{subject}, {style} style", f"{style} {subject}"]}
                row["codes"], row["moved"] = rng.integers(0, IMAGE_SIZE, (2, GRID_SIZE**2)).tolist()
                splits[split_of(concept, style)].append(row)
    return splits


def emoji_config(folder: Path, vqgan: str) -> emoji_tasks.EmojiTasksConfig:
    """Writes the corpus into `folder`; the recipe's arguments for it."""
    for split, rows in emoji_rows().items():
        data, name = Dataset.from_list(rows), f"{split}-00000-of-00001.parquet"
        data.remove_columns(["codes", "moved"]).to_parquet(folder / "emoji/data" / name)
        codes = data.remove_columns(["image", "moved"])
        if split == "train":
            moved = data.remove_columns(["image", "codes"]).rename_column("moved", "codes")
            codes = concatenate_datasets([codes, moved.select_columns(codes.column_names)])
        codes.to_parquet(folder / "codes/data" / name)
    values = yaml.safe_load((REPOSITORY / "recipes/data/emoji_tasks.yaml").read_text(encoding="utf-8"))
    paths = {"corpus": str(folder / "emoji"), "codes": str(folder / "codes"), "out": str(folder / "tasks")}
    return emoji_tasks.EmojiTasksConfig(**values | paths | {"vqgan": vqgan, "rows": ROWS, "retrieved": {}, "pairs": {}})


def emoji_augmenter() -> RetrievalAugmenter:
    """Over the training pictures."""
    rows, encoder = emoji_rows()["train"], SeededEncoder()
    documents = [{"id": row["source"], "text": row["captions"][0], "codes": row["codes"]} for row in rows]
    vectors = encoder.embed_images([row["image"] for row in rows]).numpy()
    return RetrievalAugmenter(MemoryBank.from_vectors(documents, vectors, encoder.name), encoder)


def of_task(rows: list[dict], task: str, kind: str = "") -> list[dict]:
    found = [row for row in rows if row["task"] == task and kind in ("", row["kind"])]
    assert found, f"no rows of {task} {kind}"
    return found


def key(codes) -> tuple[int, ...]:
    return tuple(codes)


def rows_by_codes() -> dict[tuple[int, ...], tuple[str, dict]]:
    """By codes, a picture's or its moved copy's, its split and row."""
    return {
        key(codes): (split, row)
        for split, rows in emoji_rows().items()
        for row in rows
        for codes in (row["codes"], row["moved"])
    }
