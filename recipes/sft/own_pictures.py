"""Teaches a CM3Leon your own way of editing, from a folder of pictures before and after, with instructions.

    python recipes/sft/own_pictures.py --config recipes/sft/own_pictures.yaml --pictures my-pictures

The folder holds pictures and `metadata.csv` or `metadata.jsonl` with the columns `before` and `after` (paths in the
folder) and `instruction` ("make it blue"). Pairs that cannot be read are skipped and counted. The pictures are encoded
once, LoRA adapters are trained on them by train.py, whose values the YAML has, and the output folder is one that
`pipeline("any-to-any")` loads.
"""

from dataclasses import dataclass, field
from pathlib import Path

import train
from datasets import Dataset, DatasetDict, Features, List, Value, load_dataset
from transformers import AutoProcessor
from trl import ModelConfig, SFTConfig, TrlParser

from cm3leon_hf import default_model
from cm3leon_hf.images import read_image
from cm3leon_hf.processing_prompts import EDITING
from cm3leon_hf.vocabulary import BREAK

COLUMNS = ("before", "after", "instruction")
KINDS = Features(
    {
        "task": Value("string"),
        "texts": List(Value("string")),
        "codes": List(List(Value("int32"))),
        "answer": Value("int32"),
    }
)


@dataclass
class OwnPicturesArguments:
    pictures: str = field(metadata={"help": "Folder of the pictures and their metadata.csv or metadata.jsonl."})
    held_out: float = field(default=0.1, metadata={"help": "Share of the pairs to measure the loss on; 0 for none."})


def read_metadata(folder: Path) -> Dataset:
    """The rows of the folder's table."""
    builders = {"metadata.csv": "csv", "metadata.jsonl": "json"}
    found = [name for name in builders if (folder / name).is_file()]
    if not found:
        raise ValueError(f"expected metadata.csv or metadata.jsonl in {folder}, found neither; list the pictures there")
    rows = load_dataset(builders[found[0]], data_files=str(folder / found[0]), split="train")
    if not set(COLUMNS) <= set(rows.column_names):
        raise ValueError(
            f"expected the columns {', '.join(COLUMNS)} in {found[0]}, found {rows.column_names}; rename them"
        )
    return rows


def read_pair(folder: Path, row: dict) -> tuple | None:
    """The two pictures and the instruction of a row; `None` if there is something wrong with it, which is printed."""
    try:
        if not (row["instruction"] or "").strip():
            raise ValueError(f"expected an instruction for {row['before']}, got an empty one")
        paths = [folder / (row[name] or "") for name in ("before", "after")]
        return *(read_image(str(path)) for path in paths), row["instruction"].strip()
    except (ValueError, OSError) as error:
        print(f"skipped: {error}")
        return None


def editing_row(before: list[int], after: list[int], instruction: str) -> dict:
    """An instruction row, of the form that `processor.for_editing` prompts."""
    wording = EDITING.split(BREAK)[0]
    return {
        "task": "edit",
        "texts": [wording, None, instruction, None],
        "codes": [None, before, None, after],
        "answer": 3,
    }


def build_rows(folder: Path, processor) -> Dataset:
    """Instruction rows of all pairs that can be read."""
    metadata = read_metadata(folder)
    pairs = [pair for row in metadata if (pair := read_pair(folder, row))]
    print(f"{len(pairs)} pairs, {len(metadata) - len(pairs)} skipped")
    if not pairs:
        raise ValueError(
            f"expected pairs of pictures in {folder}, got none that can be read; see what was skipped above"
        )
    rows = []
    for before, after, instruction in pairs:
        codes = processor.encode_images([before, after]).tolist()
        rows.append(editing_row(*codes, instruction))
    return Dataset.from_list(rows, features=KINDS)


def main(
    args: OwnPicturesArguments,
    sft: train.SFTArguments,
    objective: train.ObjectiveArguments,
    training: SFTConfig,
    model_args: ModelConfig,
) -> None:
    processor = AutoProcessor.from_pretrained(model_args.model_name_or_path or default_model())
    rows = build_rows(Path(args.pictures), processor)
    splits = DatasetDict({"train": rows})
    if args.held_out and len(rows) > 1:
        splits = rows.train_test_split(args.held_out, seed=training.seed)
        sft.eval_split = "test"
    for split, part in splits.items():
        part.to_parquet(Path(sft.dataset) / "data" / f"{split}-00000-of-00001.parquet")
    train.main(sft, objective, training, model_args)


if __name__ == "__main__":
    kinds = (OwnPicturesArguments, train.SFTArguments, train.ObjectiveArguments, SFTConfig, ModelConfig)
    main(*TrlParser(kinds).parse_args_and_config())
