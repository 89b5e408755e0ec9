"""Derives instruction data from the emoji corpus: editing, control images, boxes, words, captions and questions.

    python recipes/data/emoji_tasks.py --config recipes/data/emoji_tasks.yaml

Each split's rows are made of that split's pictures; what edits begin with, and wrong options, may be training ones. So
no training row shows a held-out pair or names a held-out concept. Pictures that the corpus does not have are drawn, and
encoded in files beside the output that a stopped run goes on with. Rows that ask about a picture stand behind the
training document that it retrieves from the memory bank, as far as `retrieved` says.
"""

import re
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import torch
import yaml
from datasets import Dataset
from emoji_corpus import Picture, load_corpus
from emoji_documents import FEATURES, builders
from emoji_drawn import (
    CANVAS,
    PAIR,
    SINGLE,
    WORD,
    Drawer,
    Plan,
    encode_drawn,
    generator,
    plan_canvases,
    plan_controls,
    plan_words,
)
from emoji_instructions import (
    Split,
    asked,
    captioned,
    controlled,
    described,
    edits,
    grounded,
    no_edits,
    reasoned,
    written,
)
from emoji_pictures import CONTROLS
from emoji_preview import draw_rows
from emoji_retrieved import retrieve_for, with_documents
from transformers import AutoImageProcessor
from trl import TrlParser

from cm3leon_hf import CM3LeonVQGAN
from cm3leon_hf.data.tokenization import ImageTokenizer
from cm3leon_hf.retrieval.augmenter import RetrievalAugmenter
from cm3leon_hf.retrieval.encoder import CLIPEncoder
from cm3leon_hf.retrieval.memory_bank import MemoryBank
from cm3leon_hf.shipped import default_bank, default_clip
from cm3leon_hf.vocabulary import Vocabulary

TRAIN = "train"
SHOWN_ROWS = 3  # of each task, on the preview
TASKS = {
    "edit": edits,
    "no_edit": no_edits,
    "grounded": grounded,
    "write": written,
    "captioning": captioned,
    "long_caption": described,
    "vqa": asked,
    "reasoning": reasoned,
} | {control: partial(controlled, control=control) for control in CONTROLS}


@dataclass
class EmojiTasksConfig:
    """The keys of emoji_tasks.yaml."""

    corpus: str = field(metadata={"help": "Folder of the emoji data set."})
    codes: str = field(metadata={"help": "Folder of its codes."})
    vqgan: str = field(metadata={"help": "Folder of the VQGAN that made them."})
    out: str = field(metadata={"help": "Folder to write; its pictures' codes lie in a folder beside it."})
    rows: dict = field(metadata={"help": "Number of rows by split and task (in the YAML)."})
    wordings: dict = field(metadata={"help": "What is asked for, by task (in the YAML)."})
    groups: dict = field(metadata={"help": "How groups are called (in the YAML)."})
    written: dict = field(metadata={"help": "What is written on emoji, by concept (in the YAML)."})
    context: str = field(metadata={"help": "Of questions with options."})
    no_skin_tone: str = field(metadata={"help": "How edits call emoji without one."})
    pairs: dict = field(default_factory=dict, metadata={"help": "Canvases of two emoji, by split (in the YAML)."})
    moved: float = field(default=0.2, metadata={"help": "Share of pictures that are read moved, if they have copies."})
    retrieved: dict = field(default_factory=dict, metadata={"help": "Share of rows with documents (in the YAML)."})
    misled: float = field(default=0.0, metadata={"help": "Share of training documents that show another concept."})
    bank: str = field(default="", metadata={"help": "Folder of the memory bank; the shipped one by default."})
    clip: str = field(default="", metadata={"help": "Folder of the CLIP that made it; the shipped one by default."})
    longest_word: int = field(default=5, metadata={"help": "Letters of a word that is drawn."})
    heldout_words: float = field(default=0.1, metadata={"help": "Share of words that only held-out rows write."})
    colour_share: float = field(default=0.1, metadata={"help": "Of a picture, that a colour must cover to be named."})
    most_colours: int = field(default=3, metadata={"help": "Colours that are named."})
    most_tags: int = field(default=5, metadata={"help": "Tags that are named."})
    seed: int = field(default=0, metadata={"help": "Seed of all draws."})

    def __post_init__(self):
        for split, rows in self.rows.items():
            if unknown := sorted({task.partition("/")[0] for task in rows} - set(TASKS)):
                raise ValueError(
                    f"expected tasks among {sorted(TASKS)} in rows of {split}, got {unknown}; correct them"
                )
        if unknown := sorted(set(self.pairs) - set(self.rows)):
            raise ValueError(f"expected splits among {sorted(self.rows)} in pairs, got {unknown}; correct them")
        if unknown := sorted(set(self.retrieved) - set(self.rows[TRAIN])):
            raise ValueError(f"expected tasks of the training rows in retrieved, got {unknown}; correct them")


def words_by_split(pictures: dict[str, list[Picture]], config: EmojiTasksConfig) -> dict[str, list[str]]:
    """Short words of the concepts' names; held-out splits have some that training has not."""
    found = {
        name: {word for one in split for word in re.findall("[a-z]+", one.concept)} for name, split in pictures.items()
    }
    heldout_names = {one.concept for one in pictures.get("heldout_concepts", [])}
    words = sorted(word for word in found[TRAIN] - heldout_names if 3 <= len(word) <= config.longest_word)
    kept = {word for word in words if generator(config.seed, word).random() < config.heldout_words}
    return {name: sorted(set(words) - kept if name == TRAIN else kept) for name in pictures}


def plans(split: str, pictures: dict[str, list[Picture]], config: EmojiTasksConfig) -> dict[str, list[Plan]]:
    """What has to be drawn for a split, by kind."""
    wanted, seeded = config.rows[split], partial(generator, config.seed, split)
    found = {
        kind: plan_controls(pictures[split], kind, wanted[kind], seeded(kind)) for kind in CONTROLS if kind in wanted
    }
    for task, kind in (("grounded", CANVAS), (f"grounded/{SINGLE}", SINGLE)):
        if task in wanted:
            found[kind] = plan_canvases(pictures[split], kind, wanted[task], seeded(kind))
    if count := config.pairs.get(split, 0):
        found[PAIR] = plan_canvases(pictures[split], PAIR, count, seeded(PAIR))
    if f"write/{WORD}" in wanted:
        words = words_by_split(pictures, config)[split]
        found[WORD] = plan_words(words, wanted[f"write/{WORD}"], seeded(WORD))
    return found


def read_split(
    name: str, pictures: dict[str, list[Picture]], images: Dataset, tokenizer: ImageTokenizer, config: EmojiTasksConfig
) -> Split:
    """What rows of a split are made of; draws and encodes what is not there yet."""
    drawer = Drawer(images, images[0]["image"].width, config.seed)
    folder = Path(config.out).with_name(f"{Path(config.out).name}-pictures")
    drawn = {
        kind: encode_drawn(planned, drawer, tokenizer, folder, f"{name}-{kind}")
        for kind, planned in plans(name, pictures, config).items()
    }
    grid = tokenizer.vqgan.config
    vocabulary = Vocabulary(image_size=grid.num_embeddings, grid_size=grid.grid_size)
    made = builders(vocabulary, config.seed)
    return Split(pictures[name], pictures[TRAIN], images, drawn, made, config, drawer.size, generator(config.seed))


def rows_of(split: Split, task: str, count: int) -> list[dict]:
    """
    Rows of one task.

    Raises:
        ValueError: if there are none.
    """
    name, _, kind = task.partition("/")
    rows = list(TASKS[name](split, **{"kind": kind} if kind else {}, count=count))
    if not rows:
        raise ValueError(f"expected rows of {task}, found no pictures for any; leave it out of `rows`")
    return rows


def load_augmenter(config: EmojiTasksConfig) -> RetrievalAugmenter:
    encoder = CLIPEncoder(config.clip or default_clip())
    return RetrievalAugmenter(MemoryBank.load(config.bank or default_bank(), encoder.name), encoder, training=False)


def write_rows(rows: list[dict], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Dataset.from_list(rows, features=FEATURES).to_parquet(path.with_suffix(".part"))
    path.with_suffix(".part").rename(path)


def write_card(folder: Path) -> None:
    """README.md without `configs`: those make `load_dataset` miss that a folder was rebuilt."""
    front = yaml.safe_dump({"license": "cc-by-4.0"})
    text = "Instruction rows derived from the emoji data set; its card names the artists and their licences."
    card = f"---\n{front}---\n\n# Emoji tasks\n\n{text}\n\n![rows of each task](preview.png)\n"
    (folder / "README.md").write_text(card, encoding="utf-8")


def main(config: EmojiTasksConfig) -> None:
    out = Path(config.out)
    if (out / "data").exists():
        raise ValueError(f"expected {out} to be new, found data; remove it, or choose another --out")
    pictures, images = load_corpus(config.codes, config.corpus)
    if unknown := sorted({TRAIN, *config.rows} - set(pictures)):
        raise ValueError(
            f"expected {config.corpus} to have the splits of `rows`, got {sorted(pictures)}; drop {unknown}"
        )
    vqgan = CM3LeonVQGAN.from_pretrained(config.vqgan).eval()
    vqgan.to(torch.accelerator.current_accelerator(check_available=True) or "cpu")
    tokenizer, shown = ImageTokenizer(vqgan, AutoImageProcessor.from_pretrained(config.vqgan)), []
    nearest, described = {}, {}
    augmenter = load_augmenter(config) if config.retrieved else None
    for name in pictures if augmenter else ():  # of all splits, since held-out edits may begin with a training picture
        found = retrieve_for(pictures[name], images[name], pictures[TRAIN], augmenter)
        nearest, described = nearest | found[0], described | found[1]
    for name, wanted in config.rows.items():
        split = read_split(name, pictures, images[name], tokenizer, config)
        for number, (task, count) in enumerate(wanted.items()):
            rows = rows_of(replace(split, rng=generator(config.seed, name, task)), task, count)
            if share := config.retrieved.get(task):  # held-out rows all have one; an evaluation may leave it out
                shares = (share, config.misled) if name == TRAIN else (1.0, 0.0)
                found = described if task.startswith("edit") else nearest
                rows = with_documents(rows, found, *shares, generator(config.seed, name, task, "retrieved"))
            write_rows(rows, out / f"data/{name}-{number:05d}-of-{len(wanted):05d}.parquet")
            print(f"{name}: {len(rows)} rows of {task}")
            shown += rows[: SHOWN_ROWS if name == TRAIN else 0]
    draw_rows(shown, vqgan).save(out / "preview.png")
    write_card(out)


if __name__ == "__main__":
    main(*TrlParser(EmojiTasksConfig).parse_args_and_config())
