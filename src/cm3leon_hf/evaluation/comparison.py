"""Two evaluations beside each other: differences with their spread, and pictures of the same prompts."""

from pathlib import Path
from typing import NamedTuple

from PIL import Image

from .files import read_pictures
from .intervals import Measured
from .results import LOWER_IS_BETTER, REAL, cell, read_results
from .runs import read_plan

MOST_SETTINGS = 3  # side by side in one picture


class Difference(NamedTuple):
    """What two runs measured at one setting, and the second minus the first."""

    setting: str
    metric: str
    first: Measured
    second: Measured
    change: Measured

    @property
    def verdict(self) -> str:
        """Whether the second is better or worse, at 95 %; empty where the choice of items may explain the change."""
        low, high = self.change.interval()
        if low <= 0 <= high:
            return ""
        return "better" if (high < 0) == (self.metric in LOWER_IS_BETTER) else "worse"


def compare_runs(first: Path, second: Path) -> list[Difference]:
    """
    The differences of all settings and metrics that two runs share.

    Raises:
        ValueError: if a folder holds no results, nothing is shared, or they have different numbers of resamples.
    """
    one, other = read_results(first), read_results(second)
    shared = [
        Difference(name, metric, value, other[name][metric], other[name][metric] - value)
        for name, row in one.items()
        for metric, value in row.items()
        if metric in other.get(name, {})
    ]
    if not shared:
        raise ValueError(f"expected settings that both runs measured, got {sorted(one)} and {sorted(other)}")
    return shared


def are_paired(first: Path, second: Path) -> bool:
    """Whether both runs drew the same prompts, so that the intervals are those of a paired comparison."""
    return read_plan(first).get("prompts") == read_plan(second).get("prompts")


def comparison_table(differences: list[Difference]) -> str:
    """A row of Markdown for each difference, bounds at 95 % in brackets."""
    lines = ["| setting | metric | first | second | second - first | |", "|---|---|---|---|---|---|"]
    for one in differences:
        values = " | ".join(cell(value) for value in (one.first, one.second, one.change))
        lines.append(f"| {one.setting} | {one.metric} | {values} | {one.verdict} |")
    return "\n".join(lines)


def side_by_side(first: Path, second: Path, count: int) -> tuple[list[Image.Image], list[str], int]:
    """
    Pictures of both runs for prompts that they share, a row for each prompt.

    Args:
        first, second (`Path`): Folders of the runs.
        count (`int`): Prompts, if there are so many.

    Returns:
        The pictures, their labels, and how many stand in a row, for [`~cm3leon_hf.grid.draw_grid`]; none if there are
        no shared prompts or settings.

    Raises:
        ValueError: for a picture that cannot be read.
    """
    plans = [read_plan(folder) for folder in (first, second)]
    names = [name for name in plans[0]["settings"] if name in plans[1]["settings"] and name != REAL][:MOST_SETTINGS]
    places = [{prompt: row for row, prompt in enumerate(plan.get("prompts", ()))} for plan in plans]
    prompts = [prompt for prompt in places[0] if prompt in places[1]][:count]
    paths, labels = [], []
    for prompt in prompts:
        for column, name in enumerate(names):
            for run, (folder, place) in enumerate(zip((first, second), places)):
                paths.append(Path(folder) / "drawn" / name / f"{place[prompt]:06d}.png")
                labels.append(f"{name}, {('first', 'second')[run]}" if column or run else f"{prompt}: {name}, first")
    return list(read_pictures(paths)), labels, 2 * len(names)


__all__ = ["Difference", "are_paired", "compare_runs", "comparison_table", "side_by_side"]
