"""Draws the pictures that the emoji tasks need besides the corpus' own, and turns them into codes, file by file."""

import hashlib
import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from datasets import Dataset, Features, Image, List, Value, concatenate_datasets
from emoji_corpus import Picture, by, spread
from emoji_pictures import CONTROLS, compose
from PIL import Image as PILImage
from tqdm.auto import tqdm

from cm3leon_hf.data.tokenization import ImageTokenizer
from cm3leon_hf.data.words import FONTS, write_word

CANVAS, PAIR, SINGLE, WORD = "canvas", "pair", "single", "word"
SIZES = {CANVAS: (2, 3), PAIR: (2,), SINGLE: (1,)}  # pictures on a canvas
ROWS_PER_FILE, BATCH = 256, 32
FEATURES = Features(
    {
        "image": Image(),
        "kind": Value("string"),
        "members": List(Value("int32")),
        "boxes": List(List(Value("int32"))),
        "text": Value("string"),
    }
)


@dataclass(frozen=True)
class Plan:
    """
    What a picture is to show.

    Args:
        kind (`str`): `CANVAS` (several pictures), `PAIR` (two), `SINGLE` (one), `WORD`, or the name of a control.
        members (`tuple[int, ...]`): Pictures of the split that it shows, by index.
        text (`str`): The word it shows.
        font (`str`): Its font.
    """

    kind: str
    members: tuple[int, ...] = ()
    text: str = ""
    font: str = ""


def generator(*words) -> np.random.Generator:
    """A generator that depends on the words alone, on every machine."""
    return np.random.default_rng(list(hashlib.sha256("\x1f".join(map(str, words)).encode()).digest()))


def plan_canvases(pictures: list[Picture], kind: str, count: int, rng: np.random.Generator) -> list[Plan]:
    """Canvases of different concepts without skin tones, in one style, which all come up as often."""
    sizes = SIZES[kind]
    styles = by((one for one in pictures if not one.skin_tone), lambda one: one.style)
    styles = {style: shown for style, shown in styles.items() if len({one.concept for one in shown}) >= max(sizes)}
    plans = []
    for number in range(count if styles else 0):
        shown = styles[sorted(styles)[number % len(styles)]]
        chosen = rng.choice(len(shown), size=min(2 * max(sizes), len(shown)), replace=False)
        concepts = {shown[index].concept: shown[index].index for index in chosen}
        plans.append(Plan(kind, tuple(list(concepts.values())[: rng.choice(sizes)])))
    return plans


def plan_controls(pictures: list[Picture], kind: str, count: int, rng: np.random.Generator) -> list[Plan]:
    """Controls of pictures, as evenly from all concepts and styles as can be."""
    chosen = spread(pictures, lambda one: (one.concept, one.style), count, rng)
    return [Plan(kind, (one.index,)) for one in chosen]


def plan_words(words: list[str], count: int, rng: np.random.Generator) -> list[Plan]:
    """Words in fonts, each word in one font before any is in two."""
    written = [(word, font) for word in sorted(words) for font in FONTS]
    return [Plan(WORD, (), *one) for one in spread(written, lambda one: one[0], count, rng)]


@dataclass(frozen=True)
class Drawer:
    """
    Draws what plans say.

    Args:
        images (`Dataset`): The split's pictures, as pixels.
        size (`int`): Side of the pictures, in pixels.
        seed (`int`): Fixes all draws.
    """

    images: Dataset
    size: int = 96
    seed: int = 0

    def __call__(self, plan: Plan) -> dict:
        """A row of `FEATURES`."""
        shown, boxes = [self.images[index]["image"].convert("RGB") for index in plan.members], []
        if plan.kind in SIZES:
            picture, boxes = compose(shown, self.size, generator(self.seed, *plan.members))
        elif plan.kind == WORD:
            picture = write_word(plan.text, plan.font, self.size)
        else:
            picture = CONTROLS[plan.kind].draw(shown)[0].convert("RGB")
        row = {"kind": plan.kind, "members": list(plan.members), "boxes": boxes, "text": plan.text}
        return {"image": {"bytes": png(picture), "path": None}} | row


def png(picture: PILImage.Image) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()


def encode_drawn(plans: list[Plan], drawer: Drawer, tokenizer: ImageTokenizer, folder: Path, name: str) -> Dataset:
    """
    Rows of `FEATURES` with codes in place of the pictures, kept in files; those that are there are not made again.

    Args:
        plans (`list[Plan]`): What to draw.
        drawer ([`Drawer`]): Draws it.
        tokenizer ([`ImageTokenizer`]): Encodes it.
        folder (`Path`): Where the files lie.
        name (`str`): Of the files.
    """
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for start in tqdm(range(0, len(plans), ROWS_PER_FILE), desc=name, unit="file"):
        path = folder / f"{name}-{start:06d}.parquet"
        files.append(path)
        planned = plans[start : start + ROWS_PER_FILE]
        if path.exists() and shows(Dataset.from_parquet(str(path)), planned):
            continue
        rows = Dataset.from_list([drawer(plan) for plan in planned], features=FEATURES)
        tokenizer.encode(rows.to_iterable_dataset(), BATCH).to_parquet(path.with_suffix(".part"))
        path.with_suffix(".part").rename(path)
    return concatenate_datasets([Dataset.from_parquet(str(path)) for path in files])


def shows(rows: Dataset, plans: list[Plan]) -> bool:
    """Whether rows are those of these plans."""
    found = zip(rows["kind"], rows["members"], rows["text"])
    return [(kind, tuple(members), text) for kind, members, text in found] == [
        (plan.kind, plan.members, plan.text) for plan in plans
    ]
