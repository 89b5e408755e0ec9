"""Emoji art and emoji names out of npm packages: fetch, unpack, read."""

import json
import re
import shutil
import subprocess
import tarfile
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

SKIN_TONES = ["light", "medium-light", "medium", "medium-dark", "dark"]  # emojibase counts them from 1
COMPONENTS = "component"  # emojibase's group of bare skin tones and hair styles
IGNORED_CODE_POINTS = {0xFE0F, 0xE007F}  # variation selector and tag terminator: some packages drop them


@dataclass(frozen=True)
class Source:
    """One npm package of pictures, all in one style.

    Pairs that are held out in one of the styles `like`, whose pictures resemble these, are held out here as well. Each
    of `swaps` repairs names that the package mixed up: where the normal hexcode matches the regular expression `where`,
    its two code points `points` change places.
    """

    style: str
    package: str
    layout: str
    licence: str
    credit: str
    folder: str = ""
    skip_subgroups: tuple[str, ...] = ()
    like: tuple[str, ...] = ()
    swaps: tuple[dict, ...] = ()

    def __post_init__(self):
        if self.layout not in READERS:
            raise ValueError(
                f"source {self.style!r}: expected a layout out of {sorted(READERS)}, got {self.layout!r}; "
                "correct it in the YAML"
            )


@dataclass(frozen=True)
class Emoji:
    """What one hexcode shows: Unicode's label, the base emoji's name, and the skin tone apart from it."""

    label: str
    concept: str
    hexcode: str
    group: str
    subgroup: str
    tags: tuple[str, ...]
    skin_tone: str


@dataclass(frozen=True)
class Drawing:
    """One picture of one emoji, not yet rendered: `data` is SVG or bitmap bytes."""

    emoji: Emoji
    source: Source
    name: str
    data: bytes


def fetch_package(package: str, cache: Path) -> Path:
    """Download `name@version` with `npm pack`, unless the cache has it, and return the unpacked package's folder."""
    home = cache / package.replace("/", "__")
    if not home.exists():
        if shutil.which("npm") is None:
            raise ValueError(f"expected npm on the PATH to fetch {package}, found none; install Node.js")
        home.parent.mkdir(parents=True, exist_ok=True)
        partial = home.with_name(home.name + ".partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        unpack(npm_pack(package, partial), partial)
        partial.rename(home)
    return home / "package"


def npm_pack(package: str, folder: Path) -> Path:
    """Let npm put the package's tarball into the folder."""
    command = ["npm", "pack", package, "--json", "--pack-destination", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise ValueError(f"expected `{' '.join(command)}` to fetch the package, got:\n{done.stderr.strip()}")
    (tarball,) = folder.glob("*.tgz")
    return tarball


def unpack(tarball: Path, folder: Path) -> None:
    with tarfile.open(tarball) as archive:
        if hasattr(tarfile, "data_filter"):  # the first releases of Python 3.10 and 3.11 lack it
            archive.extraction_filter = tarfile.data_filter
        archive.extractall(folder)


def normal_hexcode(text: str) -> str:
    """One spelling for all packages: lower case, dashes, no leading zeros, no variation selectors.

    >>> normal_hexcode("0031-FE0F-20E3")
    '31-20e3'
    """
    points = [int(part, 16) for part in text.replace("_", "-").split("-")]
    return "-".join(f"{point:x}" for point in points if point not in IGNORED_CODE_POINTS)


def swapped(code: str, swaps: Iterable[dict]) -> str:
    """The normal hexcode with the source's mix-ups undone."""
    for swap in swaps:
        if re.search(swap["where"], code):
            first, second = swap["points"]
            other = {first: second, second: first}
            code = "-".join(other.get(point, point) for point in code.split("-"))
    return code


def read_emoji(folder: Path) -> dict[str, Emoji]:
    """Every emoji of emojibase-data with its skin variants, by normal hexcode; no components, no lone letters."""
    meta = json.loads((folder / "meta/groups.json").read_text(encoding="utf-8"))
    emoji = {}
    for base in json.loads((folder / "en/data.json").read_text(encoding="utf-8")):
        group = meta["groups"].get(str(base.get("group")), COMPONENTS)  # regional indicators have no group
        if group == COMPONENTS:
            continue
        for variant in [base, *base.get("skins", [])]:
            code = normal_hexcode(variant["hexcode"])
            emoji[code] = Emoji(
                label=variant["label"],
                concept=natural_name(base["label"]),
                hexcode=variant["hexcode"],
                group=group,
                subgroup=meta["subgroups"][str(base["subgroup"])],
                tags=tuple(base.get("tags", ())),
                skin_tone=skin_tone_name(variant.get("tone", [])),
            )
    return emoji


def skin_tone_name(tone: int | list[int]) -> str:
    """`""`, `"medium"`, or for two people `"light and dark"`."""
    tones = tone if isinstance(tone, list) else [tone]
    return " and ".join(SKIN_TONES[number - 1] for number in tones)


def natural_name(label: str) -> str:
    """A label as one would say it: `flag: France` is the flag of france, `man: red hair` a man with red hair."""
    label = label.lower().replace("’", "'").replace("“", '"').replace("”", '"')
    head, colon, detail = label.partition(": ")
    if not colon:
        return label
    parts = detail.split(", ")
    listing = ", ".join(parts[:-1]) + " and " + parts[-1] if len(parts) > 1 else detail
    if head in ("flag", "family", "kiss"):
        return f"{head} of {listing}"
    if head == "couple with heart":
        return f"{head}, {listing}"
    if detail == "bald":
        return f"bald {head}"
    if head in ("man", "woman", "person"):
        return f"{head} with {detail}"
    return f"{head} {detail}"  # "keycap 5", "man walking facing right"


def read_drawings(source: Source, folder: Path, emoji: dict[str, Emoji], skipped: Counter) -> Iterator[Drawing]:
    """The source's pictures of known emoji, one for each; what is left out is counted by reason."""
    seen = set()
    labels = Counter(slug(one.label) for one in emoji.values())  # the keycaps * and # have the same
    codes = {slug(one.label): code for code, one in emoji.items() if labels[slug(one.label)] == 1}
    for key, name, data in READERS[source.layout](folder / source.folder):
        code = codes.get(key) if source.layout == NAMED else swapped(normal_hexcode(key), source.swaps)
        if code not in emoji:
            skipped[f"{source.style}: not a named emoji"] += 1
        elif emoji[code].subgroup in source.skip_subgroups:
            skipped[f"{source.style}: subgroup {emoji[code].subgroup} skipped"] += 1
        elif code in seen:
            skipped[f"{source.style}: second picture of an emoji"] += 1
        else:
            seen.add(code)
            yield Drawing(emoji[code], source, name, data)


def read_hexcode_files(folder: Path) -> Iterator[tuple[str, str, bytes]]:
    for path in sorted(folder.iterdir()):
        if path.suffix in (".svg", ".webp", ".png"):
            yield path.stem, path.name, path.read_bytes()


def read_iconify(folder: Path) -> Iterator[tuple[str, str, bytes]]:
    """An Iconify set: `chars.json` maps hexcodes to icon names, `icons.json` holds the icons."""
    icons = json.loads((folder / "icons.json").read_text(encoding="utf-8"))
    names = json.loads((folder / "chars.json").read_text(encoding="utf-8"))
    for hexcode, name in names.items():
        known = name in icons["icons"]
        yield hexcode, name, iconify_svg(icons, name).encode() if known else b""  # the renderer counts it as broken


def read_named_iconify(folder: Path) -> Iterator[tuple[str, str, bytes]]:
    """An Iconify set without hexcodes, whose icons are called like the emoji's labels."""
    icons = json.loads((folder / "icons.json").read_text(encoding="utf-8"))
    for name in icons["icons"]:
        yield name, name, iconify_svg(icons, name).encode()


def slug(label: str) -> str:
    """A label as Iconify writes it.

    >>> slug("woman’s hat: medium skin tone")
    'womans-hat-medium-skin-tone'
    """
    return re.sub("[^a-z0-9]+", "-", re.sub("['’]", "", label.lower())).strip("-")


def iconify_svg(icons: dict, name: str) -> str:
    """A whole SVG document out of an icon's body; an icon names its size only where it differs from the set's."""
    icon = {"left": 0, "top": 0, "width": icons["width"], "height": icons["height"]} | icons["icons"][name]
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        'viewBox="{left} {top} {width} {height}">{body}</svg>'
    ).format_map(icon)


NAMED = "iconify-names"
READERS = {"hexcodes": read_hexcode_files, "iconify": read_iconify, NAMED: read_named_iconify}
