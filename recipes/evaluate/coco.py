"""Zero-shot text-to-image on MS-COCO: FID of pictures drawn from 30,000 captions (section 3, Table 1 and Figure 4).

    python recipes/evaluate/coco.py --config recipes/evaluate/coco.yaml --model MODEL

The seed draws the captions among all captions of the split. Each setting of the YAML draws candidates for every
caption, CLIP picks one, and the FID compares the picks with the pictures that the captions belong to, scaled and
cropped as the model sees them; a picture whose captions are drawn twice counts twice. The data set is a hub name, or a
local folder that `load_dataset` reads, with a picture and its captions in each row. Files and resuming are as in
`emoji.py`; several GPUs: `accelerate launch` in place of `python`.
"""

from dataclasses import dataclass, field

import numpy as np
from datasets import Dataset, load_dataset
from trl import TrlParser

from cm3leon_hf.evaluation.files import readable_rows
from cm3leon_hf.evaluation.text_to_image import TextToImageArguments, TextToImageEvaluation


@dataclass
class CocoArguments(TextToImageArguments):
    model: str = field(default="", metadata={"help": "Model folder or hub name."})
    dataset: str = field(default="", metadata={"help": "Hub name or local folder."})
    split: str = field(default="validation", metadata={"help": "Split whose captions are drawn."})
    image_column: str = field(default="image", metadata={"help": "Column with the pictures."})
    caption_column: str = field(default="captions", metadata={"help": "Column with each picture's captions."})
    count: int = field(default=30_000, metadata={"help": "Captions to draw."})


def drawn_captions(rows: Dataset, args: CocoArguments) -> tuple[list[int], list[str]]:
    """
    The row and the text of each drawn caption.

    Raises:
        ValueError: if there are fewer captions than asked for, or an empty one is drawn.
    """
    groups = [[group] if isinstance(group, str) else group for group in rows[args.caption_column]]
    pairs = [(row, caption) for row, group in enumerate(groups) for caption in group]
    if len(pairs) < args.count:
        raise ValueError(f"expected {args.count} captions in {args.dataset}, got {len(pairs)}; lower count")
    chosen = [pairs[at] for at in np.random.default_rng(args.seed).permutation(len(pairs))[: args.count]]
    for row, caption in chosen:
        if not caption.strip():
            raise ValueError(f"expected captions, got an empty one in row {row} of {args.dataset}; leave the row out")
    return [row for row, _ in chosen], [" ".join(caption.split()) for _, caption in chosen]


def main(args: CocoArguments) -> None:
    if not args.model or not args.dataset:
        raise ValueError(f"expected a model and a data set, got {args.model!r} and {args.dataset!r}; name both")
    rows = readable_rows(load_dataset(args.dataset, split=args.split), args.image_column, args.skip_broken)
    numbers, captions = drawn_captions(rows, args)
    facts = {"dataset": args.dataset, "split": args.split, "captions": args.count}
    evaluation = TextToImageEvaluation(args, args.model, captions, facts)
    evaluation.draw()
    if evaluation.is_reporting():
        real = rows.select(numbers)[args.image_column]
        judges = evaluation.judges(real)
        measured = evaluation.measure(judges, real, "fid")
        dataset = {"dataset_type": args.dataset, "dataset_name": "MS-COCO", "dataset_split": args.split}
        evaluation.report(measured, judges, "fid", {"reference": "the pictures of the drawn captions"}, dataset)


if __name__ == "__main__":
    main(*TrlParser(CocoArguments).parse_args_and_config())
