"""Adds what is retrieved for each row to a data set, so that a model learns to draw with documents in front.

    python recipes/retrieval/retrieve.py --dataset data/emoji-codes --output_dir data/emoji-retrieved

Each row is asked for with its picture and one of its captions, by the paper's strategy: three documents of four, drawn
by the seed. The split becomes Parquet with the column `retrieved`, which the pretraining recipe puts in front.
"""

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from datasets import Dataset, Features, load_dataset
from trl import TrlParser

from cm3leon_hf import default_bank, default_clip
from cm3leon_hf.retrieval.augmenter import RetrievalAugmenter
from cm3leon_hf.retrieval.documents import RETRIEVED
from cm3leon_hf.retrieval.encoder import CLIPEncoder
from cm3leon_hf.retrieval.memory_bank import MemoryBank


@dataclass
class RetrieveArguments:
    dataset: str = field(metadata={"help": "Folder of a data set with the columns image, captions and codes."})
    output_dir: str = field(metadata={"help": "Folder for the Parquet file."})
    split: str = field(default="train", metadata={"help": "Split to read and write."})
    bank: str = field(default="", metadata={"help": "Memory bank; the shipped one by default."})
    clip_model: str = field(default="", metadata={"help": "The bank's CLIP; the shipped one by default."})
    clip_weights: str = field(default="", metadata={"help": "Name or file of its weights."})
    count: int = field(default=3, metadata={"help": "Documents for each row."})
    batch_size: int = field(default=256, metadata={"help": "Rows retrieved for at a time."})
    seed: int = field(default=0, metadata={"help": "Fixes the wordings and what is drawn."})


def with_documents(rows: Dataset, augmenter: RetrievalAugmenter, batch_size: int) -> Dataset:
    """The rows, with one of their captions each, and the column `retrieved`."""
    draws = np.random.default_rng(augmenter.seed).random(len(rows))

    def retrieve(batch: dict[str, list], numbers: list[int]) -> dict[str, list]:
        texts = [wordings[int(draws[at] * len(wordings))] for at, wordings in zip(numbers, batch["captions"])]
        found = augmenter({"text": texts, "image": batch["image"], "codes": batch["codes"]})
        return {"captions": [[text] for text in texts], "retrieved": found["retrieved"]}

    features = Features({**rows.features, "retrieved": RETRIEVED})
    return rows.map(
        retrieve, batched=True, batch_size=batch_size, with_indices=True, features=features, desc="retrieving"
    )


def main(args: RetrieveArguments) -> None:
    encoder = CLIPEncoder(args.clip_model or default_clip(), args.clip_weights)
    bank = MemoryBank.load(args.bank or default_bank(), encoder.name)
    augmenter = RetrievalAugmenter(bank, encoder, count=args.count, seed=args.seed)
    rows = with_documents(load_dataset(args.dataset, split=args.split), augmenter, args.batch_size)
    path = Path(args.output_dir) / "data" / f"{args.split}-00000-of-00001.parquet"
    path.parent.mkdir(parents=True, exist_ok=True)
    rows.remove_columns("image").to_parquet(path.with_suffix(".part"))
    path.with_suffix(".part").rename(path)
    found = sum(map(len, rows["retrieved"][:]))
    print(f"{path}: {len(rows)} rows with {found / len(rows):.2f} documents each")


if __name__ == "__main__":
    main(*TrlParser(RetrieveArguments).parse_args_and_config())
