"""Trains a small CLIP with open_clip's models and loss, for retrieval, re-ranking and scores without any hub.

    python recipes/retrieval/train_clip.py --config recipes/retrieval/clip_emoji.yaml
    python recipes/retrieval/train_clip.py --config recipes/retrieval/clip_emoji_more.yaml
    python recipes/retrieval/train_clip.py --config recipes/retrieval/ranker_emoji.yaml

Every value of the YAML is a flag as well. A run that was stopped goes on from its last checkpoint. The folder it
writes is what `CLIPEncoder("local-dir:FOLDER")` and open_clip load.
"""

import json
import re
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import open_clip
import torch
from datasets import Dataset, Features, concatenate_datasets, load_dataset
from open_clip.push_to_hf_hub import save_for_hf
from PIL import ImageOps
from torchvision.transforms import Compose, RandomCrop
from transformers import AutoProcessor, Trainer, TrainingArguments
from trl import TrlParser

from cm3leon_hf import default_model
from cm3leon_hf.data.pretraining import balanced_rows
from cm3leon_hf.images import read_image
from cm3leon_hf.training.checkpoints import last_whole_checkpoint
from cm3leon_hf.training.clip import CLIPObjective, alike_batches, clip_tokenizer, recall_at_1

SIDE = re.compile(r"\b(left|right|clockwise|counterclockwise)")  # in a text that a mirrored picture would belie


@dataclass
class CLIPArguments:
    dataset: str = field(metadata={"help": "Folder or hub name of a data set with the columns image and captions."})
    tokenizer: str = field(metadata={"help": "Folder of the text tokenizer."})
    model_config: str = field(default="", metadata={"help": "Folder with an open_clip_config.json of a new CLIP."})
    init_from: str = field(
        default="",
        metadata={
            "help": "Folder of a CLIP that this script wrote, to start from; with model_config, one with fewer parts."
        },
    )
    more: list[str] = field(default_factory=list, metadata={"help": "Data sets that the training split is joined by."})
    codes: str = field(default="", metadata={"help": "Data set with codes of pictures that are seen decoded as well."})
    decoded: int = field(default=4000, metadata={"help": "How many of `codes`."})
    model: str = field(default="", metadata={"help": "Model folder whose VQGAN decodes; the shipped one by default."})
    balance: list[str] = field(default_factory=list, metadata={"help": "Columns; their groups are seen equally often."})
    passes: int = field(default=1, metadata={"help": "How often an epoch sees each group of `balance`."})
    name: str = field(default="", metadata={"help": "Column that may be the text in place of a caption."})
    name_share: float = field(default=0.5, metadata={"help": "Share of the texts that are `name`, if there is one."})
    alike: str = field(default="", metadata={"help": "Column that is the same within batches, such as the style."})
    alike_share: float = field(default=0.7, metadata={"help": "Share of the rows in batches of one value of `alike`."})
    near: str = field(default="", metadata={"help": "Column that some of these are sorted by: hard negatives."})
    near_share: float = field(default=0.5, metadata={"help": "Share of these batches that are sorted so."})
    crop: float = field(default=0.9, metadata={"help": "Smallest share of a picture that a training crop keeps."})
    jitter: float = field(default=0.0, metadata={"help": "How much every second picture's colours change, in [0, 1]."})
    classify: list[str] = field(
        default_factory=list, metadata={"help": "Columns whose values vectors of pictures are taught to tell apart."}
    )
    contrastive_weight: float = field(default=1.0, metadata={"help": "Of the contrastive loss beside `classify`."})
    flip: float = field(
        default=0.0, metadata={"help": "Share of training pictures that are mirrored, but if their text names a side."}
    )
    shift: int = field(default=0, metadata={"help": "Pixels that training pictures are moved by at most."})
    train_split: str = field(default="train", metadata={"help": "Split to train on."})
    eval_split: str = field(default="heldout_pairs", metadata={"help": "Split to measure recall on."})

    def __post_init__(self):
        if not self.model_config and not self.init_from:
            raise ValueError("expected model_config, init_from or both, got neither; say where to begin")

    @property
    def architecture(self) -> str:
        """Folder of the CLIP's configuration."""
        return self.model_config or self.init_from


def prepare(
    rows: dict,
    args: CLIPArguments,
    transform,
    tokenizer,
    rng: np.random.Generator | None,
    classes: dict[str, list[str]] | None = None,
) -> dict:
    """Pictures, one of their texts, the first caption without `rng`, and numbers of their classes, as tensors."""
    captions = [texts[rng.integers(len(texts)) if rng else 0] for texts in rows["captions"]]
    if rng and args.name:
        named = rng.random(len(captions)) < args.name_share
        captions = [name if use else caption for use, name, caption in zip(named, rows[args.name], captions)]
    images = [read_image(image) for image in rows["image"]]
    if rng and args.flip:
        flipped = rng.random(len(images)) < args.flip
        flipped = [flip and not SIDE.search(caption) for flip, caption in zip(flipped, captions)]
        images = [ImageOps.mirror(image) if flip else image for flip, image in zip(flipped, images)]
    found = {"pixel_values": torch.stack([transform(image) for image in images]), "input_ids": tokenizer(captions)}
    if classes:
        numbers = [[names.index(name) for name in rows[column]] for column, names in classes.items()]
        found["kinds"] = torch.tensor(numbers).T
    return found


def decoded_rows(args: CLIPArguments, features: Features, rng: np.random.Generator) -> Dataset:
    """Random rows of `codes`, with the pictures that the VQGAN makes of them: what a model's own ones look like."""
    device = torch.accelerator.current_accelerator(check_available=True) or "cpu"
    processor = AutoProcessor.from_pretrained(args.model or default_model(), device=device)
    rows = load_dataset(args.codes, split=args.train_split)
    rows = rows.select(np.sort(rng.permutation(len(rows))[: args.decoded]))
    images = rows.map(
        lambda batch: {"image": processor.decode_images(torch.tensor(batch["codes"]))},
        batched=True,
        batch_size=64,
        remove_columns=[name for name in rows.column_names if name not in features],
        features=features,
        desc="decoding",
    )
    return images.select_columns(list(features))


def load_clip(args: CLIPArguments) -> tuple:
    """The CLIP to begin with, and what makes its input of a picture that it learns from, and of any other."""
    augmentation = {"scale": (args.crop, 1.0)}
    if args.jitter:
        augmentation |= {"color_jitter": (args.jitter, args.jitter, args.jitter, 0.0), "color_jitter_prob": 0.5}
    clip, augmented, plain = open_clip.create_model_and_transforms(
        f"local-dir:{args.architecture}", aug_cfg=augmentation, load_weights=not args.model_config
    )
    if args.model_config and args.init_from:
        weights = Path(args.init_from, "open_clip_model.safetensors")
        left_out = open_clip.load_checkpoint(clip, str(weights), strict=False)
        if left_out.unexpected_keys:
            raise ValueError(f"expected a CLIP with all parts of {weights}, lacks {left_out.unexpected_keys[0]}")
        print(f"weights that begin anew: {len(left_out.missing_keys)}")
    moved = RandomCrop(clip.visual.image_size, padding=args.shift, padding_mode="edge")
    return clip, Compose([augmented, moved]), plain


def main(args: CLIPArguments, training: TrainingArguments) -> None:
    torch.manual_seed(training.seed)
    config = json.loads(Path(args.architecture, "open_clip_config.json").read_text("utf-8"))["model_cfg"]
    clip, augmented, plain = load_clip(args)
    tokenizer = clip_tokenizer(args.tokenizer, config["text_cfg"]["context_length"])
    splits = load_dataset(args.dataset)
    train, held_out = splits[args.train_split], splits[args.eval_split]
    rng, features = np.random.default_rng(training.seed), train.features
    train = concatenate_datasets([train, *(load_dataset(more, split=args.train_split) for more in args.more)])
    if args.codes:
        train = concatenate_datasets([train, decoded_rows(args, features, rng)])
    if args.balance:
        train = train.select(balanced_rows(zip(*(train[column] for column in args.balance)), args.passes))
    if args.alike:
        size, passes = training.train_batch_size * training.world_size, args.passes if args.balance else 1
        near = train[args.near][:] if args.near else None
        order = alike_batches(train[args.alike][:], size, args.alike_share, rng, passes, near, args.near_share)
        train = train.select(order)
    classes = {column: sorted({*train[column], *held_out[column]}) for column in args.classify}
    trainer = Trainer(
        model=CLIPObjective(clip, [len(names) for names in classes.values()], args.contrastive_weight),
        args=training,
        train_dataset=train.with_transform(lambda rows: prepare(rows, args, augmented, tokenizer, rng, classes)),
        eval_dataset=held_out.with_transform(lambda rows: prepare(rows, args, plain, tokenizer, None, classes)),
        compute_metrics=recall_at_1,
    )
    trainer.train(resume_from_checkpoint=last_whole_checkpoint(training.output_dir))
    print(f"held out: {trainer.evaluate()}")
    save_for_hf(clip.half(), tokenizer, config, training.output_dir, safe_serialization=True)
    trainer.accelerator.end_training()


if __name__ == "__main__":
    main(*TrlParser((CLIPArguments, TrainingArguments)).parse_args_and_config())
