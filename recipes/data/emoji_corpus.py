"""The emoji corpus as the tasks see it: pictures with codes, gender and colour, and drawn evenly from concepts."""

import re
from collections import Counter
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass, field

import numpy as np
from datasets import Dataset, load_dataset

PERSON, MAN, WOMAN = "1F9D1", "1F468", "1F469"
GENDERS = {PERSON: "person", MAN: "man", WOMAN: "woman"}
SIGNS = {"-200D-2640": "woman", "-200D-2642": "man"}
TONES = re.compile("-1F3F[B-F]")
PEOPLE = "people-body"
SEVERAL_PEOPLE = ("family", "person-symbol")
COLOUR = re.compile(r"\b(red|orange|yellow|green|light blue|blue|purple|brown|black|white|pink|grey)\b")


@dataclass(frozen=True)
class Picture:
    """
    A row of the corpus.

    Args:
        index (`int`): Its place in the split.
        codes (`list[int]`): Of the VQGAN.
        moved (`list[list[int]]`): Codes of its moved copies, if the data set of codes has any.
        kin (`str`): What pictures of another gender or colour have in common with it; empty if there can be none.
        gender (`str`): Out of `GENDERS`, empty unless it shows one person.
        colour (`str`): In the concept's name.
    """

    index: int
    concept: str
    hexcode: str
    style: str
    group: str
    subgroup: str
    skin_tone: str
    tags: list[str]
    captions: list[str]
    source: str
    codes: list[int] = field(repr=False)
    moved: list[list[int]] = field(default_factory=list, repr=False)
    kin: str = ""
    gender: str = ""
    colour: str = ""

    @classmethod
    def of(cls, index: int, row: dict, moved: list[list[int]]) -> "Picture":
        shown = {name: row[name] for name in cls.__dataclass_fields__ if name in row} | {"moved": moved}
        if row["group"] == PEOPLE:
            kin, gender = gender_of(row["hexcode"], row["subgroup"])
            return cls(index, kin=kin, gender=gender, **shown)
        kin, colour = colour_of(row["concept"])
        return cls(index, kin=kin, colour=colour, **shown)

    @property
    def subject(self) -> str:
        """The concept with its skin tone, as the captions name it."""
        return self.captions[0].removesuffix(f", {self.style} style")


def gender_of(hexcode: str, subgroup: str) -> tuple[str, str]:
    """The hexcode without gender and skin tone, and the gender: `woman artist` is `artist` and `woman`."""
    plain = TONES.sub("", hexcode).replace("-FE0F", "")
    points = plain.split("-")
    if subgroup in SEVERAL_PEOPLE or sum(point in GENDERS for point in points) > 1:
        return "", ""
    for sign, gender in SIGNS.items():
        if sign in plain:
            return plain.replace(sign, ""), gender
    if points[0] in GENDERS:
        return "-".join([PERSON, *points[1:]]), GENDERS[points[0]]
    return plain, "person"


def colour_of(concept: str) -> tuple[str, str]:
    """The concept with its colour blanked, and the colour: `blue heart` is `{} heart` and `blue`."""
    found = COLOUR.search(concept)
    return (COLOUR.sub("{}", concept, count=1), found[0]) if found else ("", "")


def without_lone_kin(pictures: list[Picture]) -> list[Picture]:
    """The same with neither kin, gender nor colour where all pictures of a kin share them."""
    kinds = Counter(kin for kin, _ in {(one.kin, one.gender + one.colour) for one in pictures})
    plain = {"kin": "", "gender": "", "colour": ""}
    return [Picture(**vars(one) | plain) if kinds[one.kin] < 2 else one for one in pictures]


def load_corpus(codes: str, images: str) -> tuple[dict[str, list[Picture]], dict[str, Dataset]]:
    """
    The splits' pictures, and the data sets that hold them as pixels, in the same order.

    Args:
        codes (`str`): Folder of the codes: of each picture, and behind it of any number of moved copies.
        images (`str`): Folder of the pictures.

    Raises:
        ValueError: if the codes are those of other pictures.
    """
    coded, drawn = load_dataset(codes), load_dataset(images)
    pictures = {}
    for name, split in drawn.items():
        rows = by(coded[name], lambda row: row["source"]) if name in coded else {}
        if list(rows) != split["source"][:]:
            raise ValueError(
                f"expected codes of the pictures of {images}, got other ones in {codes}; encode them again"
            )
        pictures[name] = [
            Picture.of(index, row, [copy["codes"] for copy in copies])
            for index, (row, *copies) in enumerate(rows.values())
        ]
    kept = iter(without_lone_kin([one for split in pictures.values() for one in split]))
    return {name: [next(kept) for _ in split] for name, split in pictures.items()}, dict(drawn)


def spread(items: Iterable, key: Callable[[object], Hashable], count: int, rng: np.random.Generator) -> list:
    """Up to `count` random items, as evenly from all keys as can be."""
    items = list(items)
    seen, ranked = Counter(), []
    for index in rng.permutation(len(items)):
        of_key = key(items[index])
        ranked.append((seen[of_key], items[index]))
        seen[of_key] += 1
    return [item for _, item in sorted(ranked, key=lambda pair: pair[0])[:count]]


def by(items: Iterable, key: Callable[[object], Hashable]) -> dict[Hashable, list]:
    """Items by a key."""
    groups = {}
    for one in items:
        groups.setdefault(key(one), []).append(one)
    return groups
