"""Captions, pixels and splits of the emoji data set: from drawings to rows."""

import hashlib
import io
from collections.abc import Iterable
from dataclasses import dataclass

import resvg_py
from emoji_sources import Drawing, Emoji
from PIL import Image

TRAIN, HELDOUT_PAIRS, HELDOUT_CONCEPTS = SPLITS = ("train", "heldout_pairs", "heldout_concepts")
OVERSAMPLING = 2  # vector art is drawn this much larger, then scaled down: crisper than drawing at the final size


@dataclass(frozen=True)
class HoldOut:
    """Which shares of the concepts, and of the remaining (concept, style) pairs, training never sees."""

    salt: str
    concepts: float
    pairs: float

    def split(self, concept: str, style: str, styles: Iterable[str], like: Iterable[str] = ()) -> str:
        """
        The split of one pair, given all the concept's styles; other concepts have no say in it.

        With `like`, styles elsewhere whose pictures resemble these, a pair is also held out where one of those is.
        """
        if self.draw(concept) < self.concepts:
            return HELDOUT_CONCEPTS
        draws = {other: self.draw(concept, other) for other in styles}
        keeps_training = max(draws, key=draws.get)  # so that no concept loses every style
        held_out = style != keeps_training and draws[style] < self.pairs
        held_out |= any(self.draw(concept, other) < self.pairs for other in like)
        return HELDOUT_PAIRS if held_out else TRAIN

    def draw(self, *key: str) -> float:
        """A number in [0, 1) that depends on the key and the salt alone, on every machine."""
        digest = hashlib.sha256("\x1f".join((self.salt, *key)).encode()).digest()
        return int.from_bytes(digest[:8], "big") / 2**64


def subject(concept: str, skin_tone: str) -> str:
    """The concept with its skin tone: `waving hand with medium skin tone`."""
    if not skin_tone:
        return concept
    return f"{concept} with {skin_tone} skin tone{'s' if ' and ' in skin_tone else ''}"


def captions(emoji: Emoji, style: str, templates: list[str], tags_per_template: int) -> list[str]:
    """Fill every template; one with `{tag}` as often as there are tags, up to the limit, and maybe not at all."""
    name = subject(emoji.concept, emoji.skin_tone)
    tags = [tag for tag in emoji.tags if tag not in emoji.concept][:tags_per_template]
    filled = []
    for template in templates:
        for tag in tags if "{tag}" in template else [""]:
            filled.append(template.format(subject=name, style=style, tag=tag))
    return filled


def make_row(drawing: Drawing, size: int, templates: list[str], tags_per_template: int) -> dict:
    """One row of the data set, all but its split. Raises what the renderer raises when the picture is broken."""
    emoji, source = drawing.emoji, drawing.source
    return {
        "image": {"bytes": render_png(drawing.data, size), "path": None},
        "concept": emoji.concept,
        "hexcode": emoji.hexcode,
        "style": source.style,
        "group": emoji.group,
        "subgroup": emoji.subgroup,
        "tags": list(emoji.tags),
        "skin_tone": emoji.skin_tone,
        "licence": source.licence,
        "source": f"{source.package} {drawing.name}",
        "captions": captions(emoji, source.style, templates, tags_per_template),
    }


def render_png(data: bytes, size: int) -> bytes:
    """The picture over white, padded to a square of `size` pixels, as PNG."""
    picture = open_svg(data, OVERSAMPLING * size) if data.lstrip().startswith(b"<") else Image.open(io.BytesIO(data))
    square = on_white_square(picture.convert("RGBA")).resize((size, size), Image.Resampling.LANCZOS)
    png = io.BytesIO()
    square.save(png, "PNG")
    return png.getvalue()


def open_svg(data: bytes, width: int) -> Image.Image:
    png = resvg_py.svg_to_bytes(svg_string=data.decode(), width=width, skip_system_fonts=True)
    return Image.open(io.BytesIO(png))


def on_white_square(picture: Image.Image) -> Image.Image:
    side = max(picture.size)
    square = Image.new("RGBA", (side, side), "white")
    square.alpha_composite(picture, ((side - picture.width) // 2, (side - picture.height) // 2))
    return square.convert("RGB")
