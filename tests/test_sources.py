"""Sources and the packed stream: what is read, by whom, and what a stopped run reads next."""

import io
import itertools
import json
import tarfile

import datasets
import numpy as np
import pytest
from conftest import CAPTIONS
from torchdata.stateful_dataloader import StatefulDataLoader

from cm3leon_hf.data.packing import IGNORED
from cm3leon_hf.data.sources import Source, open_sources, windows
from cm3leon_hf.data.stream import PackedStream, stack
from cm3leon_hf.data.transform import CM3Transform

FEATURES = datasets.Features(
    {"captions": datasets.List(datasets.Value("string")), "codes": datasets.List(datasets.Value("uint16"))}
)
INT32 = datasets.List(datasets.Value("int32"))  # as tokenize_images.py writes codes; any integers are read


def rows_of(count: int, first: int = 0) -> datasets.Dataset:
    """Rows that one can tell apart by their codes."""
    rng = np.random.default_rng(first)
    rows = [
        {"captions": [CAPTIONS[i % 8]], "codes": [*rng.integers(0, 32, 14), i // 32, i % 32]}
        for i in range(first, first + count)
    ]
    return datasets.Dataset.from_list(rows, features=FEATURES)


def number(codes: list[int]) -> int:
    return codes[-2] * 32 + codes[-1]


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> str:
    """80 rows in four Parquet files."""
    folder = tmp_path_factory.mktemp("shards")
    for index in range(4):
        rows_of(20, 20 * index).to_parquet(folder / f"train-{index:05d}-of-00004.parquet")
    return str(folder)


@pytest.fixture(scope="module", params=[False, True], ids=["on disk", "streaming"])
def rows(request, shards):
    return open_sources([Source("parquet", f"{shards}/*.parquet", streaming=request.param)])


@pytest.fixture
def stream(rows, processor, vocabulary):
    def build(rows=rows, transform=None, **arguments) -> PackedStream:
        transform = transform or CM3Transform(processor.tokenizer, vocabulary, max_length=96, image_noise=0.2)
        return PackedStream(rows, transform, **{"window": 7, "seed": 3} | arguments)

    return build


def take(iterable, count: int) -> list:
    return [json.dumps({k: v.tolist() for k, v in each.items()}) for each in itertools.islice(iterable, count)]


def numbers(table) -> list[int]:
    return [number(codes) for codes in table["codes"].to_pylist()]


def test_readers_share_the_rows_of_an_epoch(rows):
    read = [numbers(table) for shard in range(3) for table, _ in windows(rows, 7, 0, 0, shard, 3)]
    assert sorted(itertools.chain(*read)) == list(range(80))
    assert max(map(len, read)) == 7


def test_windows_go_on_where_they_were_left(rows):
    whole = list(windows(rows, 7, 0, 1, 1, 2))
    for index, (_, state) in enumerate(whole):
        rest = windows(rows, 7, 0, 1, 1, 2, json.loads(json.dumps(state)))
        assert [numbers(table) for table, _ in rest] == [numbers(table) for table, _ in whole[index + 1 :]]


def test_rows_on_disk_are_shuffled_in_every_epoch(shards):
    rows = open_sources([Source("parquet", f"{shards}/*.parquet")])
    first, second = (
        [n for table, _ in windows(rows, 9, 0, epoch, 0, 1, None) for n in numbers(table)] for epoch in (0, 1)
    )
    assert first != second and sorted(first) == sorted(second) == list(range(80))


@pytest.mark.parametrize("streaming", [False, True])
def test_sources_are_mixed_by_weight_and_go_on(tmp_path, streaming):
    rows_of(90).to_parquet(tmp_path / "a.parquet")
    other = rows_of(30, 500).map(lambda row: {"captions": row["captions"][0]}).cast_column("codes", INT32)
    other.to_parquet(tmp_path / "b.parquet")  # one wording, not a list, and another type of codes
    files = [str(tmp_path / name) for name in ("a.parquet", "b.parquet")]
    mixed = open_sources([Source("parquet", files[0], weight=3), Source("parquet", files[1], streaming=streaming)])
    whole = [(numbers(table), state) for table, state in itertools.islice(windows(mixed, 16, 0, 0, 0, 1), 40)]
    assert [sum(number < 300 for number in read) for read, _ in whole[:6]] == [12] * 6
    assert {*itertools.chain(*(read for read, _ in whole))} == {*range(90), *range(500, 530)}
    rest = itertools.islice(windows(mixed, 16, 0, 0, 0, 1, json.loads(json.dumps(whole[5][1]))), 34)
    assert [numbers(table) for table, _ in rest] == [read for read, _ in whole[6:]]
    with pytest.raises(ValueError, match="got none for reader 30"):
        next(windows(mixed, 16, 0, 0, 30, 31))


def test_columns_are_renamed_and_missed(tmp_path):
    rows_of(3).rename_columns({"captions": "txt"}).to_parquet(tmp_path / "a.parquet")
    renamed = Source("parquet", str(tmp_path / "a.parquet"), columns={"txt": "captions"}).open()
    assert sorted(renamed.column_names) == ["captions", "codes"]
    with pytest.raises(ValueError, match="a column among .* got .*'txt', 'other'.*; name them in `columns`"):
        Source("parquet", str(tmp_path / "a.parquet"), columns={"codes": "other"}).open()


def test_webdataset_tars_are_read(tmp_path, stream, processor, vocabulary):
    with tarfile.open(tmp_path / "00.tar", "w") as tar:
        for index, row in enumerate(rows_of(5)):
            for kind, content in (("txt", row["captions"][0]), ("codes.json", json.dumps(row["codes"]))):
                info = tarfile.TarInfo(f"{index:03d}.{kind}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content.encode()))
    columns = {"txt": "captions", "codes.json": "codes"}
    rows = Source("webdataset", str(tmp_path / "*.tar"), streaming=True, columns=columns).open()
    (read,) = [numbers(table) for table, _ in windows(rows, 8, 0, 0, 0, 1)]
    assert read == list(range(5))


@pytest.mark.parametrize("taken", [1, 9, 40])
def test_a_stream_goes_on_exactly(stream, taken):
    unbroken = take(stream(), taken + 60)  # past the end of an epoch
    first = stream()
    iterator = iter(first)
    assert take(iterator, taken) == unbroken[:taken]
    second = stream()
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert take(second, 60) == unbroken[taken:]
    assert second.state_dict()["epoch"] > 0


def test_epochs_ranks_and_seeds_draw_anew(stream):
    first = take(stream(), 25)
    assert len(set(first)) == 25
    assert not set(first) & set(take(stream(seed=4), 25))
    assert not set(take(stream(rank=0, world_size=2), 25)) & set(take(stream(rank=1, world_size=2), 25))


@pytest.mark.parametrize("workers", [0, 2])
def test_the_loader_goes_on_exactly(stream, workers):
    def loader() -> StatefulDataLoader:
        return StatefulDataLoader(stream(), 2, num_workers=workers, collate_fn=stack)

    unbroken = take(loader(), 12)
    stopped = loader()
    iterator = iter(stopped)
    assert take(iterator, 5) == unbroken[:5]
    resumed = loader()
    resumed.load_state_dict(stopped.state_dict())
    assert take(resumed, 7) == unbroken[5:]


def test_broken_rows_are_skipped_and_counted(stream, caplog):
    rows = rows_of(10).to_list()
    rows[3]["codes"], rows[7]["codes"], rows[7]["captions"] = rows[3]["codes"][:5], None, []
    broken = stream(rows=datasets.Dataset.from_list(rows, features=FEATURES), window=5)
    sequences = itertools.takewhile(lambda _: not broken.state["epoch"], broken)
    images = sum((each["input_ids"] >= 600).sum() for each in sequences)
    assert images == 8 * 16 and "no text or image, or broken codes" in caplog.text
    assert broken.state_dict()["skipped_rows"] >= 2


def test_too_many_readers_are_refused(stream):
    few = stream(rows=rows_of(2), world_size=5, rank=4)
    with pytest.raises(ValueError, match="rows for each of 5 readers, got none for reader 4; use fewer workers"):
        next(iter(few))


def test_batches_hold_every_row_once_an_epoch(stream, processor, vocabulary):
    plain = CM3Transform(processor.tokenizer, vocabulary, max_length=96, overflow="stream", span_rate=0.0)
    packed = stream(transform=plain)
    tokens = []
    for sequence in packed:
        if packed.state["epoch"]:
            break
        tokens += sequence["labels"][sequence["labels"] != IGNORED].tolist()
    images = np.array([token - vocabulary.text_size for token in tokens if token >= vocabulary.text_size])
    assert sorted(number(codes.tolist()) for codes in images.reshape(-1, 16)) == list(range(80))
