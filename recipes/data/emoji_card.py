"""The emoji data set's README and contact sheet."""

import io
import textwrap
from collections import Counter

from emoji_rows import SPLITS, subject
from emoji_sources import Source
from huggingface_hub import DatasetCardData
from PIL import Image, ImageDraw

CARD = """---
{header}
---

# Emoji in several styles

Emoji pictures of {config.size}×{config.size} pixels over white with captions that name the subject, the skin tone and
the style. Names, groups and tags come from `{config.names}` (MIT).

![preview](preview.png)

## Splits

{counts}

- `heldout_concepts`: {config.heldout_concepts:.0%} of the concepts, with all their styles and skin tones.
- `heldout_pairs`: {config.heldout_pairs:.0%} of the other (concept, style) pairs, with all their skin tones; only \
pairs whose concept is in `train` in another style.
- `train`: everything else.

A hash of the names decides, so the split stays when emoji are added. A held-out concept may look like a trained one:
"man running facing right" and "man running" are two concepts, and some artists drew one picture for several names.

## Columns

`captions` lists several wordings, the canonical "subject, style style" first. `skin_tone` is empty for the yellow
default. `licence` (SPDX) and `source` (package@version and picture) hold for each row.

## Sources

{credits}

Keep these credits when you pass pictures on. The pictures were rasterised, laid over white and padded to a square.
"""

MARGIN = 12
LABEL_HEIGHT = 60
LABEL_WIDTH = 90


def draw_preview(rows: list[dict], subjects: list[str], size: int) -> Image.Image:
    """The pictures of the subjects in every style that has them; a missing one leaves its cell white."""
    styles = list(dict.fromkeys(sorted(row["style"] for row in rows)))
    found = {(subject(row["concept"], row["skin_tone"]), row["style"]): row["image"]["bytes"] for row in rows}
    cell = size + MARGIN
    sheet = Image.new("RGB", (LABEL_WIDTH + cell * len(subjects), LABEL_HEIGHT + cell * len(styles)), "white")
    pen = ImageDraw.Draw(sheet)
    for column, name in enumerate(subjects):
        pen.multiline_text((LABEL_WIDTH + column * cell, 4), textwrap.fill(name, 16), fill="black", font_size=11)
    for line, style in enumerate(styles):
        top = LABEL_HEIGHT + line * cell
        pen.multiline_text((4, top + size // 2), textwrap.fill(style, 12), fill="black", font_size=13)
        for column, name in enumerate(subjects):
            if (name, style) in found:
                picture = Image.open(io.BytesIO(found[name, style]))
                sheet.paste(picture, (LABEL_WIDTH + column * cell, top))
    return sheet


def make_card(splits: dict[str, list[dict]], entries: list[dict], sources: list[Source], config) -> str:
    """README.md: front matter, counts per style and split, sources and their credits."""
    counts = Counter((row["style"], name) for name, rows in splits.items() for row in rows)
    return CARD.format(
        header=card_header(entries, sources),
        counts=table(["style", *SPLITS], [[s.style, *(counts[s.style, name] for name in SPLITS)] for s in sources]),
        credits=table(
            ["style", "package", "licence", "credit"],
            [[s.style, f"`{s.package}`", s.licence, s.credit] for s in sources],
        ),
        config=config,
    )


def card_header(entries: list[dict], sources: list[Source]) -> str:
    """Front matter with the splits, but no `configs`: those make `load_dataset` miss that a folder was rebuilt."""
    return DatasetCardData(
        pretty_name="Emoji in several styles",
        license=sorted({source.licence.lower() for source in sources}),
        language=["en"],
        task_categories=["text-to-image", "image-to-text"],
        dataset_info={"splits": entries},
    ).to_yaml()


def table(header: list[str], body: list[list]) -> str:
    lines = [header, ["---"] * len(header), *body]
    return "\n".join(f"| {' | '.join(str(cell) for cell in line)} |" for line in lines)
