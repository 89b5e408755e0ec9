"""Mixtures of tasks: small data sets more often, large ones less often than by their sizes (appendix E.1)."""

import numpy as np
from datasets import Dataset, IterableDataset, interleave_datasets


def shares(sizes: list[int], least: float = 0.3, most: float = 3.0) -> np.ndarray:
    """
    Each data set's share `(sets,)` of a mixture; they sum to 1.

    The paper names an up- and down-sampling threshold of 3/0.3 and no rule. Ours: a data set counts as many rows as it
    has, but between `least` and `most` times the mean.

    Args:
        sizes (`list[int]`): Rows of each data set.
        least, most (`float`): Bounds, relative to the mean size.
    """
    mean = np.mean(sizes)
    counted = np.clip(np.asarray(sizes, np.float64), least * mean, most * mean)
    return counted / counted.sum()


def mix(
    parts: dict[str, Dataset | IterableDataset],
    sizes: dict[str, int] | None = None,
    seed: int = 0,
    least: float = 0.3,
    most: float = 3.0,
    stopping_strategy: str = "all_exhausted",
) -> Dataset | IterableDataset:
    """
    Interleaves the rows of tasks by their [`shares`].

    What stands where depends on the seed alone. Of data sets on disk the mixture is one as well, which is read by
    number; of streams it is a stream, whose `state_dict` tells where to go on.

    Args:
        parts (`dict[str, Dataset | IterableDataset]`): All on disk or all streams, with the same columns, as
            [`~cm3leon_hf.data.instructions.InstructionBuilder.build`] makes them.
        sizes (`dict[str, int]`, *optional*): Their rows, which those on disk know themselves.
        seed (`int`): Fixes all draws.
        least, most (`float`): Bounds of a share; the paper's threshold of 3/0.3.
        stopping_strategy (`str`): When an epoch ends: as the first data set does (`"first_exhausted"`), or when every
            row was there, those of the smaller ones several times (`"all_exhausted"`).

    Raises:
        ValueError: if there are no data sets, one has no rows, or the size of a stream is missing.
    """
    known = {name: len(rows) for name, rows in parts.items() if isinstance(rows, Dataset)} | (sizes or {})
    without = [name for name in parts if not known.get(name)]
    if without or not parts:
        raise ValueError(
            f"expected rows in each of {list(parts)}, got none or an unknown number in {without}; leave it out, or "
            "give the number of a stream in `sizes`"
        )
    probabilities = shares([known[name] for name in parts], least, most).tolist()
    return interleave_datasets(
        list(parts.values()), probabilities=probabilities, seed=seed, stopping_strategy=stopping_strategy
    )
