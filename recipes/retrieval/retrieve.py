"""Adds what is retrieved for each row to a data set, so that a model learns to draw with documents in front.

    python recipes/retrieval/retrieve.py --dataset data/emoji-codes --output_dir data/emoji-retrieved
    python recipes/retrieval/retrieve.py --dataset data/emoji-codes --output_dir data/emoji-retrieved \
        --split heldout_pairs --training false

Each row is asked for with its picture and one of its captions, by the paper's strategy: `count` documents of four,
drawn by the seed. With `--training false` it is asked for with its first caption alone, as prompts are at generation.
The split becomes Parquet with the column `retrieved`, which the pretraining recipe puts in front; all splits that lie
in one folder need it.
"""

from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pyarrow.compute as pc
from datasets import Dataset, Features, load_dataset
from trl import TrlParser

from cm3leon_hf import default_bank, default_clip
from cm3leon_hf.retrieval.augmenter import RetrievalAugmenter
from cm3leon_hf.retrieval.building import undecoded
from cm3leon_hf.retrieval.documents import RETRIEVED
from cm3leon_hf.retrieval.encoder import CLIPEncoder
from cm3leon_hf.retrieval.memory_bank import MemoryBank


@dataclass
class RetrieveArguments:
    dataset: str = field(metadata={"help": "Folder of a data set with the columns image, captions and codes."})
    output_dir: str = field(metadata={"help": "Folder for the Parquet file."})
    split: str = field(default="train", metadata={"help": "Split to read and write."})
    id_column: str = field(default="", metadata={"help": "Column with the bank's ids, if rows lie there; not its own."})
    bank: str = field(default="", metadata={"help": "Memory bank; the shipped one by default."})
    clip_model: str = field(default="", metadata={"help": "The bank's CLIP; the shipped one by default."})
    clip_weights: str = field(default="", metadata={"help": "Name or file of its weights."})
    training: bool = field(default=True, metadata={"help": "Ask with picture, caption and query dropout, and draw."})
    share: float = field(default=1.0, metadata={"help": "Share of the rows that get documents; others keep captions."})
    count: int = field(default=3, metadata={"help": "Documents of such a row; at most 2 where training is false."})
    min_count: int | None = field(
        default=None, metadata={"help": "If given, how many documents is drawn for each row, from here to `count`."}
    )
    batch_size: int = field(default=256, metadata={"help": "Rows retrieved for at a time."})
    seed: int = field(default=0, metadata={"help": "Fixes the rows, the wordings and what is drawn."})

    def __post_init__(self):
        if self.min_count is None:
            self.min_count = self.count
        if not (0 <= self.share <= 1 and 0 <= self.min_count <= self.count):
            raise ValueError(
                f"expected a share from 0 to 1 and counts in order, got a share of {self.share} and "
                f"{self.min_count} to {self.count} documents; change them"
            )


def wanted(args: RetrieveArguments, rows: int) -> np.ndarray:
    """How many documents each row gets, `(rows,)`."""
    rng = np.random.default_rng(args.seed)
    counts = rng.integers(args.min_count, args.count, size=rows, endpoint=True)
    return np.where(rng.random(rows) < args.share, counts, 0)


def asking(row: dict, draw: float, args: RetrieveArguments) -> dict:
    """What the augmenter is asked with: one wording, and in training the picture."""
    text = row["captions"][int(draw * len(row["captions"]))]
    known = {"text": text, "codes": row["codes"]}
    if args.id_column:
        known["id"] = row[args.id_column]
    return known | {"image": row["image"]} if args.training else known


def with_documents(rows: Dataset, augmenter: RetrievalAugmenter, args: RetrieveArguments) -> Dataset:
    """The rows with the column `retrieved`; those with documents have the one caption that these were found with."""
    counts = wanted(args, len(rows))
    draws = np.random.default_rng([args.seed, 1]).random(len(rows)) * args.training

    def retrieve(batch: dict[str, list], numbers: list[int]) -> dict[str, list]:
        captions, retrieved = list(batch["captions"]), [[] for _ in numbers]
        for count in set(counts[numbers]) - {0}:
            places = np.flatnonzero(counts[numbers] == count)
            asked = [asking({key: batch[key][at] for key in batch}, draws[numbers[at]], args) for at in places]
            for at, one, found in zip(places, asked, replace(augmenter, count=int(count)).retrieve(asked)):
                captions[at], retrieved[at] = [one["text"]], found
        return {"captions": captions, "retrieved": retrieved}

    features = Features({**rows.features, "retrieved": RETRIEVED})
    return undecoded(rows).map(
        retrieve, batched=True, batch_size=args.batch_size, with_indices=True, features=features, desc="retrieving"
    )


def main(args: RetrieveArguments) -> None:
    encoder = CLIPEncoder(args.clip_model or default_clip(), args.clip_weights)
    bank = MemoryBank.load(args.bank or default_bank(), encoder.name)
    augmenter = RetrievalAugmenter(bank, encoder, training=args.training, count=args.count, seed=args.seed)
    rows = with_documents(load_dataset(args.dataset, split=args.split), augmenter, args)
    path = Path(args.output_dir) / "data" / f"{args.split}-00000-of-00001.parquet"
    path.parent.mkdir(parents=True, exist_ok=True)
    rows.remove_columns("image").to_parquet(path.with_suffix(".part"))
    path.with_suffix(".part").rename(path)
    found = pc.list_value_length(rows.data.column("retrieved")).to_numpy()
    print(f"{path}: {len(rows)} rows, {(found > 0).mean():.0%} with documents, {found.sum()} in all")


if __name__ == "__main__":
    main(*TrlParser(RetrieveArguments).parse_args_and_config())
