"""Build an image–caption data set from permissively licensed emoji art: one concept, up to four styles.

python recipes/data/emoji.py --config recipes/data/emoji.yaml --out data/emoji
python recipes/data/emoji.py --config recipes/data/emoji_more.yaml    # four other styles, for the CLIP

Needs npm on the PATH and `pip install resvg-py`; then `datasets.load_dataset("data/emoji")` has three splits.
"""

import math
import shutil
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from functools import partial
from multiprocessing import Pool
from pathlib import Path

from datasets import Dataset, Features, Image, List, Value, disable_progress_bars
from emoji_card import draw_preview, make_card
from emoji_rows import SPLITS, HoldOut, make_row
from emoji_sources import Drawing, Source, fetch_package, read_drawings, read_emoji
from tqdm import tqdm
from trl import TrlParser

TEXT_COLUMNS = ["concept", "hexcode", "style", "group", "subgroup", "skin_tone", "licence", "source"]
LIST_COLUMNS = ["tags", "captions"]
FEATURES = Features(
    {"image": Image()}
    | {name: Value("string") for name in TEXT_COLUMNS}
    | {name: List(Value("string")) for name in LIST_COLUMNS}
)


@dataclass
class EmojiConfig:
    """The keys of emoji.yaml, and the flags that override them."""

    sources: list[dict] = field(metadata={"help": "Packages of pictures; each entry has the fields of `Source`."})
    names: str = field(metadata={"help": "The emojibase-data package that names the emoji, as name@version."})
    captions: list[str] = field(metadata={"help": "Templates with {subject}, {style} and {tag}, canonical first."})
    preview: list[str] = field(metadata={"help": "Subjects to show in preview.png."})
    out: str = field(metadata={"help": "Folder to write."})
    cache: str = field(metadata={"help": "Folder that keeps the fetched packages."})
    salt: str = field(metadata={"help": "Salt of the hold-out hash."})
    styles: list[str] = field(default_factory=list, metadata={"help": "Use only these styles of the sources."})
    size: int = field(default=96, metadata={"help": "Side of the square pictures, in pixels."})
    workers: int = field(default=2, metadata={"help": "Processes that render."})
    rows_per_shard: int = field(default=4000, metadata={"help": "Rows in one Parquet file."})
    heldout_concepts: float = field(default=0.02, metadata={"help": "Share of concepts held out whole."})
    heldout_pairs: float = field(default=0.05, metadata={"help": "Share of (concept, style) pairs held out."})
    tags_per_template: int = field(default=3, metadata={"help": "Captions made from one template with {tag}."})
    overwrite: bool = field(default=False, metadata={"help": "Replace the output folder."})

    def __post_init__(self):
        known = [source["style"] for source in self.sources]
        if len(set(known)) != len(known):
            raise ValueError(f"expected one source for each style, got the styles {known}; merge or rename them")
        if unknown := sorted(set(self.styles) - set(known)):
            raise ValueError(f"expected styles out of {known}, got {unknown}; correct --styles or add a source")


def parse_config(arguments: list[str]) -> EmojiConfig:
    """A YAML file after `--config`, then flags that override its keys."""
    (config,) = TrlParser(EmojiConfig).parse_args_and_config(arguments)
    return config


def chosen_sources(config: EmojiConfig) -> list[Source]:
    try:
        sources = [Source(**entry) for entry in config.sources]
    except TypeError as error:
        names = [field.name for field in fields(Source)]
        raise ValueError(f"expected `sources` entries with keys out of {names}, got one where {error}") from error
    return [source for source in sources if not config.styles or source.style in config.styles]


def collect_drawings(config: EmojiConfig, skipped: Counter) -> Iterator[Drawing]:
    sources, cache = chosen_sources(config), Path(config.cache).expanduser()
    emoji = read_emoji(fetch_package(config.names, cache))
    for source in sources:
        yield from read_drawings(source, fetch_package(source.package, cache), emoji, skipped)


def try_row(make, drawing: Drawing) -> dict | str:
    """The drawing's row, or the reason why it has none."""
    try:
        return make(drawing)
    except (ValueError, OSError) as error:
        return f"{drawing.source.style}: {drawing.name} cannot be rendered ({type(error).__name__})"


def render_rows(drawings: list[Drawing], config: EmojiConfig, skipped: Counter) -> Iterator[dict]:
    make = partial(make_row, size=config.size, templates=config.captions, tags_per_template=config.tags_per_template)
    with Pool(config.workers) as pool:
        results = pool.imap(partial(try_row, make), drawings, chunksize=32)
        for result in tqdm(results, total=len(drawings), desc="rendering", unit="picture"):
            if isinstance(result, str):
                skipped[result] += 1
            else:
                yield result


def split_rows(
    rows: list[dict], hold_out: HoldOut, like: Mapping[str, Iterable[str]] | None = None
) -> dict[str, list[dict]]:
    """Rows by split, in an order as good as shuffled that no run changes; `like` has what some styles resemble."""
    styles = defaultdict(set)
    for row in rows:
        styles[row["concept"]].add(row["style"])
    splits = {name: [] for name in SPLITS}
    for row in sorted(rows, key=lambda row: hold_out.draw("order", row["source"])):
        of_concept = styles[row["concept"]]
        splits[hold_out.split(row["concept"], row["style"], of_concept, (like or {}).get(row["style"], ()))].append(row)
    return {name: part for name, part in splits.items() if part}  # an empty Parquet split cannot be loaded


def write_parquet(rows: list[dict], split: str, folder: Path, rows_per_shard: int) -> dict:
    """Write the split's shards and return its entry in the card's front matter."""
    columns = {name: [row[name] for row in rows] for name in FEATURES}
    data = Dataset.from_dict(columns, features=FEATURES)
    count = math.ceil(len(rows) / rows_per_shard)
    for index in range(count):
        path = folder / f"{split}-{index:05d}-of-{count:05d}.parquet"
        data.shard(count, index, contiguous=True).to_parquet(path)
    return {"name": split, "num_examples": len(rows), "num_bytes": data.data.nbytes}


def write_dataset(splits: dict[str, list[dict]], config: EmojiConfig) -> None:
    """Everything into a folder beside the output, which takes the output's name once it is whole."""
    out = Path(config.out)
    building = out.with_name(out.name + ".building")
    shutil.rmtree(building, ignore_errors=True)
    (building / "data").mkdir(parents=True)
    entries = [write_parquet(rows, name, building / "data", config.rows_per_shard) for name, rows in splits.items()]
    card = make_card(splits, entries, chosen_sources(config), config)
    (building / "README.md").write_text(card, encoding="utf-8")
    everything = [row for rows in splits.values() for row in rows]
    draw_preview(everything, config.preview, config.size).save(building / "preview.png")
    if out.exists():
        shutil.rmtree(out)
    building.rename(out)


def check_output(config: EmojiConfig) -> None:
    out = Path(config.out)
    if out.exists() and any(out.iterdir()) and not config.overwrite:
        raise ValueError(f"expected {out} to be new or empty, found files; pass --overwrite or choose another --out")


def report(splits: dict[str, list[dict]], skipped: Counter) -> None:
    for name, rows in splits.items():
        styles = Counter(row["style"] for row in rows)
        print(f"{name}: {len(rows)} rows;", ", ".join(f"{style} {count}" for style, count in sorted(styles.items())))
    print(f"skipped {skipped.total()} pictures")
    for reason, count in skipped.most_common():
        print(f"  {count:5d}  {reason}")


def main(arguments: list[str]) -> None:
    config = parse_config(arguments)
    check_output(config)
    disable_progress_bars()  # of the Parquet shards; rendering shows its own
    skipped = Counter()
    drawings = list(collect_drawings(config, skipped))
    rows = list(render_rows(drawings, config, skipped))
    hold_out = HoldOut(config.salt, config.heldout_concepts, config.heldout_pairs)
    splits = split_rows(rows, hold_out, {source.style: source.like for source in chosen_sources(config)})
    write_dataset(splits, config)
    report(splits, skipped)


if __name__ == "__main__":
    main(sys.argv[1:])
