"""Mixtures of tasks: their proportions, and that what was stopped goes on exactly."""

import itertools
import json
from collections import Counter

import datasets
import numpy as np
import pytest

from cm3leon_hf.data.instructions import FEATURES
from cm3leon_hf.data.mixtures import mix, shares
from cm3leon_hf.data.packing import IGNORED
from cm3leon_hf.data.stream import PackedStream
from cm3leon_hf.data.transform import CM3Transform

SIZES = {"edit": 200, "coco": 40, "vqa2": 5}


def rows_of(task: str, count: int) -> datasets.Dataset:
    """Rows that one can tell apart by their texts."""
    codes = list(range(16))
    rows = [
        {"task": task, "texts": [f"{task} {index}", " red", None], "codes": [None, None, codes], "answer": 1}
        for index in range(count)
    ]
    return datasets.Dataset.from_list(rows, features=FEATURES)


@pytest.fixture(scope="module", params=[False, True], ids=["on disk", "streams"])
def mixed(request):
    parts = {task: rows_of(task, size) for task, size in SIZES.items()}
    if not request.param:
        return mix(parts, seed=1)
    return mix({task: rows.to_iterable_dataset() for task, rows in parts.items()}, SIZES, seed=1)


def said(rows) -> list[str]:
    return [row["texts"][0] for row in rows]


def test_shares_are_sizes_clipped_around_their_mean():
    np.testing.assert_allclose(shares([100, 100]), [0.5, 0.5])
    mean = (1000 + 10 + 10 + 180) / 4  # 300
    counted = np.array([3 * mean, 0.3 * mean, 0.3 * mean, 180])
    np.testing.assert_allclose(shares([1000, 10, 10, 180]), counted / counted.sum())
    np.testing.assert_allclose(shares([1000, 10, 10, 180], 0, 4), np.array([1000, 10, 10, 180]) / 1200)


def test_tasks_have_their_shares_and_every_row_is_there(mixed):
    rows = list(mixed)
    counts = Counter(row["task"] for row in rows)
    expected = dict(zip(SIZES, shares(list(SIZES.values()))))
    for task, share in expected.items():
        error = (share * (1 - share) / len(rows)) ** 0.5
        assert counts[task] / len(rows) == pytest.approx(share, abs=3 * error)
    assert {*said(rows)} == {f"{task} {index}" for task, size in SIZES.items() for index in range(size)}
    assert said(mixed) == said(rows)


def test_the_seed_decides_what_stands_where():
    first, again, other = (
        said(mix({task: rows_of(task, size) for task, size in SIZES.items()}, seed=seed)) for seed in (1, 1, 2)
    )
    assert first == again != other


@pytest.mark.parametrize("taken", [1, 30])
def test_a_stream_of_tasks_goes_on_exactly(taken):
    def build():
        return mix({task: rows_of(task, size).to_iterable_dataset() for task, size in SIZES.items()}, SIZES, seed=1)

    unbroken, stopped = said(build()), build()
    assert said(itertools.islice(stopped, taken)) == unbroken[:taken]
    resumed = build()
    resumed.load_state_dict(json.loads(json.dumps(stopped.state_dict())))
    assert said(resumed) == unbroken[taken:]


@pytest.fixture
def packed(mixed, processor, vocabulary):
    def build() -> PackedStream:
        transform = CM3Transform(
            processor.tokenizer, vocabulary, max_length=128, answer_share=0.5, completion_only_loss=True
        )
        return PackedStream(mixed, transform, window=16, seed=3)

    return build


def take(stream: PackedStream, count: int) -> list[str]:
    sequences = itertools.islice(iter(stream), count)
    return [json.dumps({name: values.tolist() for name, values in each.items()}) for each in sequences]


@pytest.mark.parametrize("taken", [3, 90])
def test_packed_tasks_go_on_exactly(packed, taken):
    first, unbroken = packed(), take(packed(), taken + 30)
    assert take(first, taken) == unbroken[:taken]
    second = packed()
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert take(second, 30) == unbroken[taken:]


def test_packed_tasks_are_predicted_by_their_answers(packed, processor):
    answer = {*processor.tokenizer(" red")["input_ids"], 1, IGNORED}
    for sequence in itertools.islice(iter(packed()), 5):
        assert {*sequence["labels"].tolist()} == answer and (sequence["input_ids"] >= 600).any()


def test_data_sets_without_rows_are_refused():
    with pytest.raises(ValueError, match=r"rows in each of \['a', 'b'\], got none or an unknown number in \['b'\]"):
        mix({"a": rows_of("a", 2), "b": rows_of("b", 2).select([])})
    with pytest.raises(ValueError, match=r"unknown number in \['a'\]; leave it out, or give the number of a stream"):
        mix({"a": rows_of("a", 2).to_iterable_dataset()})
    with pytest.raises(ValueError, match=r"expected rows in each of \[\]"):
        mix({})
