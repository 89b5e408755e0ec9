"""One way to decode that an evaluation measures: strategies, candidates and retrieved documents."""

import re
from collections.abc import Iterable
from dataclasses import dataclass, field

from .reranking import STRATEGIES

NAME = re.compile(r"[\w.+-]+")


@dataclass(frozen=True)
class Setting:
    """
    How pictures are drawn, and described.

    Args:
        name (`str`): Of letters, digits and `.+-_`; a folder is called so.
        arguments (`dict`): Of `generate`, for all strategies.
        strategy (`str`, *optional*): `"cfg"`, `"cd-k"` or `"both"` of [`~cm3leon_hf.evaluation.reranking`]; without,
            the arguments alone are the strategy.
        candidates (`int`): Drawn for each prompt; above 1, CLIP picks one.
        documents (`int`): Retrieved for each prompt.
        text (`dict`): Arguments of `generate` for descriptions; greedy and unguided by default.

    Raises:
        ValueError: for a name or a strategy that cannot be, or numbers below their least.
    """

    name: str
    arguments: dict
    strategy: str | None = None
    candidates: int = 1
    documents: int = 0
    text: dict = field(default_factory=dict)

    def __post_init__(self):
        if not NAME.fullmatch(self.name):
            raise ValueError(f"expected a setting's name of letters, digits and '.+-_', got {self.name!r}; rename it")
        if self.strategy is not None and self.strategy not in STRATEGIES:
            raise ValueError(f"expected a strategy among {sorted(STRATEGIES)}, got {self.strategy!r} in {self.name}")
        if self.candidates < len(self.strategies) or self.documents < 0:
            raise ValueError(
                f"expected a candidate for each strategy and 0 documents or more in {self.name}, got {self.candidates} "
                f"and {self.documents}"
            )

    @property
    def strategies(self) -> list[dict]:
        """Arguments of `generate` for each strategy."""
        return [own | self.arguments for own in (STRATEGIES[self.strategy] if self.strategy else ({},))]

    @property
    def description(self) -> str:
        """A name that settings share when they describe pictures in the same way."""
        words = [f"{key}-{value}" for key, value in sorted(self.text.items())]
        return "_".join([*words, f"documents-{self.documents}"])


def read_settings(entries: Iterable[dict]) -> list[Setting]:
    """
    Settings from YAML: the keys of [`Setting`], and any other key is an argument of `generate`.

    Raises:
        ValueError: as [`Setting`], for a name that occurs twice, or no settings.
    """
    settings = []
    for entry in entries:
        own = {key: entry[key] for key in ("name", "strategy", "candidates", "documents", "text") if key in entry}
        settings.append(Setting(arguments={key: entry[key] for key in entry if key not in own}, **own))
    names = [setting.name for setting in settings]
    if not names or len(set(names)) < len(names):
        raise ValueError(f"expected settings with different names, got {names}; rename some")
    return settings


__all__ = ["Setting", "read_settings"]
