"""What a conversion did with each weight of a checkpoint."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field


@dataclass
class ConversionReport:
    """
    What was done with a checkpoint's weights.

    Args:
        kind (`str`): Kind of the checkpoint.
        read (`int`): Weights of the checkpoint that the model has.
        unused (`dict[str, int]`): Numbers of other weights, by the beginning of their names.
        missing (`list[str]`): Weights of the model that the checkpoint does not have.
        notes (`list[str]`): What differs from the original, and how it was made up for.
    """

    kind: str
    read: int
    unused: dict[str, int]
    missing: list[str]
    notes: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        lines = [("kind", self.kind), ("read", f"{self.read} weights")]
        lines += [("unused", in_words(self.unused)), ("missing", in_words(by_prefix(self.missing)))]
        lines += [("note", note) for note in self.notes]
        return "\n".join(f"{name:<8} {value}" for name, value in lines)


def in_words(numbers: dict[str, int]) -> str:
    return ", ".join(f"{prefix} ({number})" for prefix, number in numbers.items()) or "none"


def by_prefix(names: Iterable[str]) -> dict[str, int]:
    """Numbers of names by their first two parts, `loss.discriminator` of `loss.discriminator.main.0.weight`."""
    return dict(sorted(Counter(".".join(name.split(".")[:2]) for name in names).items()))
