"""Adds control signals of its pictures to a data set: edges, depth, poses and the like, and the texts in them.

    python recipes/data/controls.py --dataset data/emoji --output_dir data/emoji-controls --controls canny scribble \\
        --edges canny --size 96
    python recipes/data/controls.py --dataset data/emoji --show controls.png --controls canny scribble   # looks first
    torchrun --nproc-per-node 8 recipes/data/controls.py --config YAML           # or: srun, one process a GPU

Every split becomes `num_shards` Parquet files with a column for each control, named after it (`ocr` adds `ocr_texts`
and `ocr_boxes`). Rows with broken pictures are left out and counted. Processes share the files, and a stopped run goes
on with the first file that is not there yet. `--show` draws the first pictures beside their controls, which tells
whether thresholds and sizes suit before hours are spent. Canny, scribble with `--edges canny` and OCR need no
checkpoint; the others fetch theirs from the hub once.
"""

from dataclasses import dataclass, field, fields
from pathlib import Path

import yaml
from PIL import Image, ImageDraw
from trl import TrlParser

from cm3leon_hf.data.controls import CONTROLS, OCR, Annotator, annotated
from cm3leon_hf.data.shards import ShardArguments, in_shards, write_parquet
from cm3leon_hf.grid import draw_grid

KINDS = CONTROLS | {"ocr": OCR}
EDGES = ("canny", "hed")


@dataclass
class ControlsArguments(ShardArguments):
    controls: list[str] = field(metadata={"help": f"Columns to add, any of: {', '.join(KINDS)}."})
    output_dir: str | None = field(default=None, metadata={"help": "Folder for the Parquet files."})
    show: str | None = field(default=None, metadata={"help": "Picture to draw of the first rows and their controls."})
    show_rows: int = field(default=4, metadata={"help": "Rows on that picture."})
    size: int | None = field(
        default=None,
        metadata={
            "help": "Shorter side of the control pictures: the resolution of the image tokenizer that will read them, "
            "such as 256, since thin lines fade when they are scaled down later. By default that of the pictures."
        },
    )
    edges: str = field(default="hed", metadata={"help": "Edges that scribbles are made of: canny or hed."})
    options: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Options of controls, such as canny.low=50 scribble.thickness=0.03 depth.checkpoint=FOLDER; "
            "their docstrings in cm3leon_hf/data/controls*.py explain them."
        },
    )
    batch_size: int = field(default=16, metadata={"help": "Pictures in one forward pass."})

    def __post_init__(self):
        super().__post_init__()
        if unknown := sorted(set(self.controls) - KINDS.keys()):
            raise ValueError(f"expected controls among {list(KINDS)}, got {unknown[0]!r}")
        if self.edges not in EDGES:
            raise ValueError(f"expected edges among {list(EDGES)}, got {self.edges!r}")
        if self.output_dir is None and self.show is None:
            raise ValueError("expected output_dir or show, got neither; say where the controls should go")


def read_options(options: list[str]) -> dict[str, dict]:
    """Options `name.option=value` by control; values are read as YAML."""
    read = {name: {} for name in KINDS}
    for option in options:
        key, _, value = option.partition("=")
        name, _, key = key.partition(".")
        allowed = [known.name for known in fields(KINDS[name]) if known.init] if name in KINDS else []
        if key not in allowed or not value:
            raise ValueError(f"expected NAME.OPTION=VALUE, of {name!r} one of {allowed}, got {option!r}")
        read[name][key] = yaml.safe_load(value)
    return read


def build(args: ControlsArguments) -> list[Annotator]:
    """The wanted controls with their options, each on this process's device."""
    options = read_options(args.options)

    def one(name: str, **defaults) -> Annotator:
        if "checkpoint" in {known.name for known in fields(KINDS[name])}:
            defaults["device"] = args.device
        if name == "scribble":
            defaults["edges"] = one(args.edges)
        return KINDS[name](**{"image_column": args.image_column, "size": args.size} | defaults | options[name])

    return [one(name) for name in args.controls]


def contact_sheet(rows: list[dict], annotators: list[Annotator]) -> Image.Image:
    """The pictures of rows, each beside its controls; texts are shown in their boxes."""
    cells, labels = [], []
    for row in rows:
        picture = annotators[0].read(row[annotators[0].image_column])
        cells.append(picture)
        labels.append("picture")
        for annotator in annotators:
            is_text = isinstance(annotator, OCR)
            cells.append(boxed(picture, row["ocr_boxes"]) if is_text else row[annotator.name])
            labels.append(", ".join(row["ocr_texts"]) or "no text" if is_text else annotator.name)
    return draw_grid(cells, labels, columns=1 + len(annotators))


def boxed(picture: Image.Image, boxes: list[list[float]]) -> Image.Image:
    picture = picture.copy()
    width, height = picture.size
    for x0, y0, x1, y1 in boxes:
        ImageDraw.Draw(picture).rectangle((x0 * width, y0 * height, x1 * width, y1 * height), outline="red")
    return picture


def main(args: ControlsArguments) -> None:
    annotators = build(args)
    if args.show:
        first = in_shards(next(iter(args.splits().values())), 1)[0].take(args.show_rows)
        contact_sheet(list(annotated(first, annotators, args.show_rows)), annotators).save(args.show)
        print(f"{args.show}: {', '.join(args.controls)}")
    if args.output_dir is None:
        return
    for shard in args.missing_shards(Path(args.output_dir) / "data", "to draw its controls again"):
        write_parquet(annotated(shard.rows, annotators, args.batch_size), shard.path)
        skipped = sum(annotator.skipped for annotator in annotators)
        print(f"{shard.split}: {shard.path.name} written, {skipped} broken pictures skipped so far")


if __name__ == "__main__":
    main(*TrlParser(ControlsArguments).parse_args_and_config())
