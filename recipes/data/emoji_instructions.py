"""Instruction rows from the emoji corpus and from the pictures drawn for it, a function for each task."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import chain

import numpy as np
from datasets import Dataset
from emoji_corpus import Picture, by, spread
from emoji_documents import described_row
from emoji_drawn import CANVAS, PAIR, WORD
from emoji_pictures import dominant_colours

from cm3leon_hf.data.instructions import InstructionBuilder

OPTIONS = 4
SIDES = {"left": "left", "right": "right", "on_left": "left", "on_right": "right"}  # that questions are about, by kind
# What edits of a kind keep.
KEPT = {
    "style": lambda one: (one.concept, one.skin_tone),
    "skin_tone": lambda one: (one.concept, one.style),
    "gender": lambda one: (one.kin, one.style, one.skin_tone),
    "colour": lambda one: (one.kin, one.style),
}


@dataclass(frozen=True)
class Split:
    """
    What rows of a split are made of.

    Args:
        pictures (`list[Picture]`): The split's.
        training (`list[Picture]`): Those of the training split, for what an edit begins with and wrong options.
        images (`Dataset`): The split's pictures as pixels.
        drawn (`dict[str, Dataset]`): By kind, pictures drawn for the split, as `emoji_drawn` encodes them.
        builders (`dict[str, InstructionBuilder]`): By task.
        config: The keys of emoji_tasks.yaml.
        size (`int`): Side of the pictures, in pixels.
        rng (`np.random.Generator`): Source of all draws.
    """

    pictures: list[Picture]
    training: list[Picture]
    images: Dataset = field(repr=False)
    drawn: dict[str, Dataset] = field(repr=False)
    builders: dict[str, InstructionBuilder] = field(repr=False)
    config: object = field(repr=False)
    size: int
    rng: np.random.Generator

    def row(self, task: str, shown: Picture | None, fields: dict, **known) -> dict:
        """A row of a task: its document, by one of the templates, and what an evaluation must know."""
        document = self.builders[task].row(fields, int(self.rng.integers(2**31)))
        return described_row(document, shown, **known)

    def wording(self, task: str, **words: str) -> str:
        return str(self.rng.choice(self.config.wordings[task])).format(**words)

    def group(self, one: Picture) -> str:
        return self.config.groups[one.group]

    def evenly(self, count: int) -> list[Picture]:
        """Pictures, as evenly from all concepts and styles as can be."""
        return spread(self.pictures, pair, count, self.rng)

    def seen(self, one: Picture) -> list[int]:
        """Codes of a picture that is read, or kept as it is: its own or, so often as `moved` says, a moved copy's."""
        if one.moved and self.rng.random() < self.config.moved:
            return one.moved[self.rng.integers(len(one.moved))]
        return one.codes


def pair(one: Picture) -> tuple[str, str]:
    return one.concept, one.style


def edits(split: Split, kind: str, count: int) -> Iterator[dict]:
    """From a picture of the training split, or of this one, to one of this split that differs in one attribute."""
    is_known = {"skin_tone": lambda one: " and " not in one.skin_tone, "style": lambda one: True}
    fits = is_known.get(kind, lambda one: getattr(one, kind))
    begun = {one.source: one for one in [*split.training, *split.pictures] if fits(one)}
    partners = by(begun.values(), KEPT[kind])
    changes = [
        (one, other)
        for one in split.pictures
        if fits(one)
        for other in partners[KEPT[kind](one)]
        if getattr(one, kind) != getattr(other, kind)
    ]
    for target, start in spread(changes, lambda change: (pair(change[0]), getattr(change[0], kind)), count, split.rng):
        value = getattr(target, kind)
        text = split.wording(f"edit/{kind}", value=value or split.config.no_skin_tone)
        fields = {"input": start.codes, "text": text, "image": target.codes}
        yield split.row("edit", target, fields, kind=kind, value=value, read=start)


def no_edits(split: Split, count: int) -> Iterator[dict]:
    for one in split.evenly(count):
        codes = split.seen(one)
        yield split.row("no_edit", one, {"input": codes, "text": split.wording("no_edit"), "image": codes})


def controlled(split: Split, control: str, count: int) -> Iterator[dict]:
    """A picture from what controls it."""
    for drawn in first(split.drawn[control], count):
        one = split.pictures[drawn["members"][0]]
        text = str(split.rng.choice(one.captions))
        yield split.row(control, one, {"input": drawn["codes"], "text": text, "image": one.codes})


def first(rows: Dataset, count: int) -> Dataset:
    return rows.select(range(min(count, len(rows))))


def grounded(split: Split, count: int, kind: str = CANVAS) -> Iterator[dict]:
    """One emoji or several, each in its box."""
    for drawn in first(split.drawn[kind], count):
        shown = [split.pictures[index] for index in drawn["members"]]
        names, style = [one.concept for one in shown], shown[0].style
        boxes = [[side / split.size for side in box] for box in drawn["boxes"]]
        caption = f"{listed(names)}, {style} style"
        fields = {"caption": caption, "objects": boxes, "names": names, "image": drawn["codes"]}
        yield split.row("grounded", None, fields, objects=names, boxes=boxes) | {"style": style}


def written(split: Split, kind: str, count: int) -> Iterator[dict]:
    """Words in a font, or emoji that carry text."""
    if kind == WORD:
        found = [(None, one["text"], one["codes"]) for one in first(split.drawn[WORD], count)]
    else:
        texts = split.config.written
        shown = spread([one for one in split.pictures if one.concept in texts], pair, count, split.rng)
        found = [(one, texts[one.concept], one.codes) for one in shown]
    for one, text, codes in found:
        yield split.row("write", one, {"ocr_content": text, "image": codes}, kind=kind, value=text)


def captioned(split: Split, count: int) -> Iterator[dict]:
    for one in split.evenly(count):
        caption = one.captions[0]
        yield split.row("captioning", one, {"caption": caption, "image": split.seen(one)}, value=caption)


def described(split: Split, count: int) -> Iterator[dict]:
    """Long captions: name and style, group, colours, tags."""
    for one in split.evenly(count):
        config, picture = split.config, split.images[one.index]["image"]
        colours = dominant_colours(picture, config.colour_share, config.most_colours)
        said = [f"a {one.style} emoji of {one.subject}.", f"It belongs to {split.group(one)}."]
        said += [f"Its colours are {listed(colours)}." if len(colours) > 1 else f"It is {''.join(colours)}."]
        said += [f"It goes with {listed(one.tags[: config.most_tags])}."] if one.tags else []
        caption = " ".join(said)
        yield split.row("long_caption", one, {"caption": caption, "image": split.seen(one)}, value=caption)


def listed(words: list[str]) -> str:
    return " and ".join([", ".join(words[:-1]), words[-1]]) if len(words) > 1 else words[0]


def asked(split: Split, kind: str, count: int) -> Iterator[dict]:
    """Questions about one emoji, or about what stands on a side: which of two that they name, or anything."""
    found = sides(split, SIDES[kind]) if kind in SIDES else answers(split, kind)
    for one, codes, answer, *other in spread(found, lambda found: pair(found[0]), count, split.rng):
        named = dict(zip(("one", "other"), map(str, split.rng.permutation([answer, *other]))))
        fields = {"question": split.wording(f"vqa/{kind}", **named), "answer": answer, "image": codes}
        yield split.row("vqa", one, fields, kind=kind, value=answer)


def answers(split: Split, kind: str) -> Iterator[tuple[Picture, list[int], str]]:
    read = {
        "style": lambda one: one.style,
        "skin_tone": lambda one: "" if " and " in one.skin_tone else one.skin_tone,
        "group": split.group,
        "name": lambda one: one.concept,
    }
    return ((one, split.seen(one), read[kind](one)) for one in split.pictures if read[kind](one))


def sides(split: Split, side: str) -> Iterator[tuple[Picture, list[int], str, str]]:
    """Canvases of two emoji of which one ends where the other one has not begun; what is on the side comes first."""
    for drawn in chain(*(split.drawn.get(kind, ()) for kind in (CANVAS, PAIR))):
        if len(drawn["members"]) == 2:
            order = sorted(range(2), key=lambda index: drawn["boxes"][index][0])
            left, right = (drawn["boxes"][index] for index in order)
            shown = [split.pictures[drawn["members"][index]] for index in order]
            one, other = shown if side == "left" else shown[::-1]
            if left[2] <= right[0]:
                yield one, drawn["codes"], one.concept, other.concept


def reasoned(split: Split, kind: str, count: int) -> Iterator[dict]:
    """Multiple choice in the form of ScienceQA: which group a picture belongs to, or which emoji shares its group."""
    names = {group: sorted({one.concept for one in found}) for group, found in by(split.training, split.group).items()}
    for one in split.evenly(count):
        right = split.group(one)
        if kind == "relative" and set(names.get(right, [])) <= {one.concept}:
            continue  # nothing else is of its group
        others = split.rng.choice(sorted(set(names) - {right}), OPTIONS - 1, replace=False)
        options = [right, *map(str, others)]
        why = f"The picture shows {one.concept}, which belongs to {right}."
        if kind == "relative":
            options = [other_than(one.concept, names[group], split.rng) for group in options]
            why += f" Of the options, {options[0]} belongs to {right}."
        order = split.rng.permutation(OPTIONS)
        choices, answer = [options[index] for index in order], int(order.argmin())
        fields = {
            "question": split.wording(f"reasoning/{kind}"),
            "context": split.config.context,
            "choices": choices,
            "explanation": why,
            "answer": answer,
            "image": split.seen(one),
        }
        yield split.row("reasoning", one, fields, kind=kind, value=choices[answer])


def other_than(name: str, names: list[str], rng: np.random.Generator) -> str:
    while (drawn := str(rng.choice(names))) == name:
        pass
    return drawn
