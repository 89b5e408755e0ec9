"""Teaches a CM3Leon your own way of editing, from a folder of pictures before and after, with instructions.

    python recipes/sft/own_pictures.py --config recipes/sft/own_pictures.yaml --pictures my-pictures

The folder holds pictures and `metadata.csv` or `metadata.jsonl` with the columns `before` and `after` (paths in the
folder) and `instruction` ("make it blue"). Pairs that cannot be read are skipped and counted. The pictures are encoded
once, LoRA adapters are trained on them by train.py, whose values the YAML has, and the output folder is one that
`pipeline("any-to-any")` loads.
"""

from dataclasses import dataclass, field, replace
from pathlib import Path

import train
from datasets import Dataset, DatasetDict, load_dataset
from transformers import AutoProcessor
from trl import ModelConfig, SFTConfig, TrlParser

from cm3leon_hf import default_model
from cm3leon_hf.data.instructions import InstructionBuilder
from cm3leon_hf.data.tasks import load_tasks

TASK = replace(load_tasks()["edit"], columns={"input": "before", "text": "instruction", "image": "after"})


@dataclass
class OwnPicturesArguments:
    pictures: str = field(metadata={"help": "Folder of the pictures and their metadata.csv or metadata.jsonl."})
    held_out: float = field(default=0.1, metadata={"help": "Share of the pairs to measure the loss on; 0 for none."})


def read_metadata(folder: Path) -> Dataset:
    """The rows of the folder's table, with whole paths."""
    builders = {"metadata.csv": "csv", "metadata.jsonl": "json"}
    found = [name for name in builders if (folder / name).is_file()]
    if not found:
        raise ValueError(f"expected metadata.csv or metadata.jsonl in {folder}, found neither; list the pictures there")
    rows = load_dataset(builders[found[0]], data_files=str(folder / found[0]), split="train")
    named = [name for name in ("before", "after") if name in rows.column_names]
    return rows.map(lambda row: {name: row[name] and f"{folder}/{row[name]}" for name in named})


def build_rows(folder: Path, processor) -> Dataset:
    """Instruction rows, of the form that `processor.for_editing` prompts, of all pairs that can be read."""
    length = processor.tokenizer.model_max_length
    return InstructionBuilder(TASK, processor.vocabulary, length, processor.encode_images).build(read_metadata(folder))


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
