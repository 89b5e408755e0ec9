"""Packing: nothing is lost or split, little is padded, and packed equals separate."""

import datasets
import numpy as np
import pyarrow as pa
import pytest
import torch
import trl
from conftest import POSITIONS, small_model
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

from cm3leon_hf.data.cm3 import restore
from cm3leon_hf.data.packing import IGNORED, Sequences, best_fit, pack
from cm3leon_hf.data.transform import CM3Transform

CODES = list(range(16))


@pytest.fixture(scope="session")
def transform(processor, vocabulary):
    def build(**arguments) -> CM3Transform:
        return CM3Transform(processor.tokenizer, vocabulary, **{"max_length": POSITIONS} | arguments)

    return build


def table(count: int, seed: int = 0) -> pa.Table:
    """Pairs, single texts of many lengths and single images."""
    rng = np.random.default_rng(seed)
    sizes = np.where(rng.random(count) < 0.3, 0, rng.integers(1, 30, count))
    texts = [" ".join(["red"] * size) or None for size in sizes.tolist()]
    codes = [None if text and rng.random() < 0.6 else rng.permutation(16) for text in texts]
    return pa.table({"captions": pa.array(texts, pa.string()), "codes": pa.array(codes, pa.list_(pa.uint16()))})


def documents_of(sequences: Sequences) -> list[list[int]]:
    """The documents of sequences that are packed apart."""
    found = []
    for labels, ids, positions in zip(*(values.tolist() for values in (sequences[1], *sequences[::2]))):
        for label, id, position in zip(labels, ids, positions):
            if position == 0:
                found.append([])
            found[-1].append(id)
            assert label == (IGNORED if position == 0 or id == 0 else id)
    return [document for document in found if document[0] != 0]


@settings(max_examples=100, deadline=None)
@given(lengths=st.lists(st.integers(1, 50), max_size=60))
def test_best_fit_fills_sequences_without_splitting(lengths):
    sequences = best_fit(np.array(lengths, np.int64), 50)
    assert sorted(document for sequence in sequences for document in sequence) == list(range(len(lengths)))
    assert all(sum(lengths[document] for document in sequence) <= 50 for sequence in sequences)


def test_best_fit_fills_sequences_as_trl_does():
    lengths = np.random.default_rng(0).integers(1, 4097, 300)
    packed = trl.pack_dataset(datasets.Dataset.from_dict({"input_ids": [[7] * n for n in lengths]}), 4096, "bfd")
    ours = [lengths[sequence].sum() for sequence in best_fit(lengths, 4096)]
    assert sorted(ours) == sorted(sum(sequence) for sequence in packed["seq_lengths"])


@pytest.mark.parametrize("masked", [0.0, 1.0])
def test_best_fit_packs_every_document_whole(transform, vocabulary, masked):
    build, rows = transform(span_rate=masked), table(60)
    sequences = pack(build, rows, np.random.default_rng(1), apart=True)
    assert all(values.shape[1] == POSITIONS for values in sequences)
    plain = build.documents(rows, np.random.default_rng(0))[0].tolist()
    got = sorted(restore(ids, vocabulary) for ids in documents_of(sequences))
    assert got == sorted(plain)
    joint = pack(build, rows, np.random.default_rng(1))
    assert joint.position_ids is None and np.array_equal(joint.input_ids, sequences.input_ids)
    assert (joint.labels == np.where(joint.input_ids == 0, IGNORED, joint.input_ids)).all()


@settings(max_examples=40, deadline=None)
@given(count=st.integers(0, 40), seed=st.integers(0, 99), length=st.integers(8, POSITIONS))
def test_a_stream_keeps_every_token_and_parts_no_mask_from_its_span(transform, vocabulary, count, seed, length):
    build, rows = transform(overflow="stream", span_rate=3.0, max_length=length), table(count, seed)
    sequences = pack(build, rows, np.random.default_rng(seed))
    padding = sequences.labels == IGNORED
    assert not padding[:-1].any() and padding.sum() < length
    for row in sequences.input_ids.tolist():
        assert row.count(vocabulary.mask_id) == row.count(vocabulary.infill_id)
    stream, documents = sequences.labels[~padding].tolist(), []
    while stream:  # a document ends at the `<eos>` in front of the next one's, or behind its moved span
        end = next(i for i in range(1, len(stream)) if stream[i] == 1 and stream[i + 1 : i + 2] in ([1], []))
        documents.append(stream[: end + 1])
        stream = stream[end + 1 :]
    plain = build.documents(rows, np.random.default_rng(0))[0].tolist()
    assert sorted(restore(ids, vocabulary) for ids in documents) == sorted(plain)


def test_little_is_padding(processor):
    """Pairs of the paper's lengths beside texts, in windows of the paper's sequence length."""
    lengths = np.random.default_rng(0)
    vocabulary = processor.vocabulary
    captions = [" ".join(["red"] * int(n)) for n in lengths.integers(2, 400, 1500)]
    rows = pa.table({"captions": captions, "codes": [None if i % 2 else CODES for i in range(1500)]})
    build = CM3Transform(processor.tokenizer, vocabulary, max_length=4096)
    assert (pack(build, rows, lengths).labels == IGNORED).mean() < 0.01
    stream = CM3Transform(processor.tokenizer, vocabulary, max_length=4096, overflow="stream")
    assert (pack(stream, rows, lengths).labels == IGNORED).mean() < 0.01


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_packed_equals_separate(transform, attention):
    model = small_model(attn_implementation=attention, use_cache=False)
    sequences = pack(transform(span_rate=1.0), table(12), np.random.default_rng(0), apart=True)
    batch = {name: torch.from_numpy(values) for name, values in sequences._asdict().items()}
    with torch.no_grad():
        packed = model(**batch)
        alone = [(ids, model(torch.tensor([ids])).logits[0]) for ids in documents_of(sequences)]
    logits = packed.logits[batch["input_ids"] != 0]
    torch.testing.assert_close(logits, torch.cat([each for _, each in alone]), atol=1e-5, rtol=1e-4)
    losses = [
        torch.nn.functional.cross_entropy(each[:-1], torch.tensor(ids[1:]), reduction="sum") for ids, each in alone
    ]
    expected = sum(losses) / sum(len(ids) - 1 for ids, _ in alone)
    torch.testing.assert_close(packed.loss, expected)


def test_attention_learns_of_packed_documents_and_of_nothing_else(monkeypatch):
    """Positions reach the attention, where flash attention looks for documents; a compiled model needs no mask."""
    seen = []

    def spy(module, query, key, value, attention_mask, **kwargs):
        seen.append((attention_mask is None, kwargs.get("position_ids")))
        return query.transpose(1, 2), None

    AttentionInterface.register("spy", spy)
    AttentionMaskInterface.register("spy", sdpa_mask)
    model = small_model(attn_implementation="spy", use_cache=False)
    ids, positions = torch.full((1, 6), 300), torch.tensor([[0, 1, 2, 0, 1, 2]])
    with torch.no_grad():
        model(ids)
        monkeypatch.setattr("transformers.masking_utils.is_tracing", lambda *_: True)
        model(ids)
        model(ids, position_ids=positions)
    assert [each[0] for each in seen[::2]] == [True, True, False]
    assert seen[0][1] is seen[2][1] is None and torch.equal(seen[4][1], positions)
