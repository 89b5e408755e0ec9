"""Evaluates a model on a held-out split of the emoji: what it draws from captions, and how it describes pictures.

    python recipes/evaluate/emoji.py --config recipes/evaluate/emoji.yaml

For every setting of the YAML, each held-out caption is drawn once and each held-out picture is described. The Fréchet
distance, precision and recall compare the drawn pictures with the artists'; CLIPScore and R@1 compare them with their
captions, as the row `real` does the artists' own; CIDEr compares the descriptions with the captions. The folder gets
the pictures, `results.json`, `results.md`, `model_index.yml` and plots; the last line printed is JSON. A run that was
stopped goes on where it was. Several GPUs: `accelerate launch` in place of `python`.
"""

from dataclasses import dataclass, field, replace

import numpy as np
from datasets import Dataset, load_dataset
from trl import TrlParser

from cm3leon_hf import default_bank, default_clip, default_model
from cm3leon_hf.evaluation.captions import check_caption_metrics
from cm3leon_hf.evaluation.files import readable_rows
from cm3leon_hf.evaluation.text_to_image import TextToImageArguments, TextToImageEvaluation


@dataclass
class EmojiArguments(TextToImageArguments):
    clip_model: str = field(default="", metadata={"help": "CLIP of open_clip; the shipped one, and its bank, if any."})
    dataset: str = field(default="data/emoji", metadata={"help": "Folder of the emoji data set."})
    model: str = field(default="", metadata={"help": "Model folder; the shipped one by default."})
    split: str = field(default="heldout_pairs", metadata={"help": "Split to evaluate on."})
    count: int = field(default=0, metadata={"help": "Rows drawn from the split by the seed; all by default."})
    instruction: str = field(default="Describe the given picture.", metadata={"help": "Asks for a description."})
    caption_tokenizer: str = field(default="words", metadata={"help": "words, or ptb, which needs Java."})


def with_shipped_clip(args: EmojiArguments) -> EmojiArguments:
    """Where no CLIP is named, the shipped one with the shipped bank, as far as they are there."""
    if args.clip_model:
        return args
    try:
        bank = args.bank or default_bank()
    except FileNotFoundError:
        bank = ""
    return replace(args, clip_model=default_clip(), bank=bank)


def held_out_rows(args: EmojiArguments) -> Dataset:
    """
    The rows that are drawn from the split.

    Raises:
        ValueError: for a picture that cannot be read, or a row without captions.
    """
    rows = load_dataset(args.dataset, split=args.split)
    for number, captions in enumerate(rows["captions"]):
        if not captions or not all(caption.strip() for caption in captions):
            raise ValueError(f"expected captions, got {captions} in row {number} of {args.dataset}; leave the row out")
    rows = readable_rows(rows, "image", args.skip_broken)
    drawn = np.random.default_rng(args.seed).permutation(len(rows))[: args.count or len(rows)]
    return rows.select(drawn)


def main(args: EmojiArguments) -> None:
    args = with_shipped_clip(args)
    check_caption_metrics(("cider",), args.caption_tokenizer)
    rows = held_out_rows(args)
    captions = rows["captions"][:]
    facts = {"split": args.split, "rows": len(rows), "instruction": args.instruction}
    evaluation = TextToImageEvaluation(args, args.model or default_model(), [one[0] for one in captions], facts)
    evaluation.draw()
    evaluation.describe(rows["image"], args.instruction)
    if evaluation.is_reporting():
        judges = evaluation.judges(rows["image"])
        measured = evaluation.measure(judges, rows["image"], "fd")
        for setting in evaluation.settings:
            texts = evaluation.run.described(setting.description, len(rows))
            measured[setting.name] |= judges.measure_described(texts, captions, args.caption_tokenizer)
        dataset = {"dataset_type": "emoji", "dataset_name": "Emoji", "dataset_split": args.split}
        evaluation.report(measured, judges, "fd", {"caption_tokenizer": args.caption_tokenizer}, dataset)


if __name__ == "__main__":
    main(*TrlParser(EmojiArguments).parse_args_and_config())
