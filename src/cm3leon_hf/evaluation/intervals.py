"""A measured value with the spread that drawing the test items again would give it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np


class Interval(NamedTuple):
    """Bounds of a value."""

    low: float
    high: float


@dataclass(frozen=True, eq=False)
class Measured:
    """
    A value and its bootstrap replicates.

    The difference of two measurements is `one - other`. Replicates of one seed and one number of items draw the same
    items, so for two models on the same prompts the difference's interval is that of a paired bootstrap.

    Args:
        value (`float`): Over all items.
        replicates (`np.ndarray` of shape `(resamples,)`): The same over items drawn with replacement.
    """

    value: float
    replicates: np.ndarray

    def interval(self, level: float = 0.95) -> Interval:
        """Quantiles of the replicates: where the value lies at this level, as far as the choice of items goes."""
        tail = (1 - level) / 2
        return Interval(*np.quantile(self.replicates, [tail, 1 - tail]).tolist())

    def centred(self) -> "Measured":
        """The same with the value as the replicates' mean, for statistics that drawing items twice shifts."""
        return Measured(self.value, self.replicates - self.replicates.mean() + self.value)

    def __sub__(self, other: "Measured") -> "Measured":
        if len(self.replicates) != len(other.replicates):
            raise ValueError(
                f"expected measurements with as many resamples, got {len(self.replicates)} and "
                f"{len(other.replicates)}; measure both with the same number"
            )
        return Measured(self.value - other.value, self.replicates - other.replicates)


def bootstrap(statistic: Callable[[np.ndarray], float], items: int, resamples: int = 200, seed: int = 0) -> Measured:
    """
    Measures a statistic of weighted items.

    Args:
        statistic (`Callable`): Takes how often each item counts, integers `(items,)`.
        items (`int`): Number of items.
        resamples (`int`): Times that as many items are drawn with replacement.
        seed (`int`): Fixes the draws, for every statistic of as many items alike.

    Raises:
        ValueError: without items or resamples.
    """
    if items < 1 or resamples < 1:
        raise ValueError(f"expected items and resamples to measure with, got {items} and {resamples}")
    rng = np.random.default_rng(seed)
    draws = (np.bincount(rng.integers(items, size=items), minlength=items) for _ in range(resamples))
    return Measured(
        float(statistic(np.ones(items, np.int64))), np.array([statistic(weights) for weights in draws], np.float64)
    )


def measure_mean(values: Sequence[float], resamples: int = 200, seed: int = 0) -> Measured:
    """
    The mean of one value for each item.

    Raises:
        ValueError: for no values, or NaN among them.
    """
    values = np.asarray(values, np.float64)
    if not np.isfinite(values).all():
        raise ValueError(f"expected finite values, got NaN or infinity at item {int(np.argmin(np.isfinite(values)))}")
    return bootstrap(lambda weights: weights @ values / len(values), len(values), resamples, seed)


__all__ = ["Interval", "Measured", "bootstrap", "measure_mean"]
