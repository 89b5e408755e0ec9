"""The recipe of perplexities: equal to what the Trainer logs, to the same from pictures, and to an unbroken run."""

import json
import logging

import numpy as np
import pytest
import torch
from conftest import CAPTIONS, COLOURS, REPOSITORY, SHAPES, draw, load_recipe
from datasets import Dataset
from transformers import EvalPrediction
from trl import TrlParser

from cm3leon_hf.data.pretraining import CM3Rows
from cm3leon_hf.data.transform import CM3Transform
from cm3leon_hf.training.pretraining import perplexities, token_losses

RECIPE = load_recipe("evaluate/perplexity.py")
PICTURES = [draw(colour, shape) for colour in COLOURS for shape in SHAPES]
SETTINGS = [{"name": "plain"}, {"name": "described", "instruction_share": 1.0, "completion_only_loss": True}]


@pytest.fixture
def arguments(folder, processor, tmp_path):
    """The same rows as pictures and as codes."""
    captions = [[text, f"there is {text}"] for text in CAPTIONS]
    codes = processor.encode_images(PICTURES).tolist()
    rows = {"pictures": {"captions": captions, "image": PICTURES}, "codes": {"captions": captions, "codes": codes}}
    for name, columns in rows.items():
        (tmp_path / name).mkdir()
        Dataset.from_dict(columns).to_parquet(tmp_path / name / "train.parquet")

    def arguments(data: str, out: str, **changes):
        own = {"settings": SETTINGS, "batch_size": 3, "resamples": 20, "split": "train", "model": folder}
        return RECIPE.PerplexityArguments(dataset=str(tmp_path / data), out=str(tmp_path / out), **own | changes)

    return arguments


def printed(capsys) -> dict:
    return json.loads(capsys.readouterr().out.strip().splitlines()[-1])


@torch.no_grad()
def test_it_is_what_the_trainer_logs(arguments, model, processor, vocabulary, tmp_path, capsys):
    RECIPE.main(arguments("codes", "out"))
    found = printed(capsys)
    transform = CM3Transform(processor.tokenizer, vocabulary, model.config.max_position_embeddings, span_rate=0.0)
    documents = CM3Rows(Dataset.from_parquet(str(tmp_path / "codes" / "train.parquet")), transform, seed=0)
    sums = []
    for document in documents:
        labels = torch.from_numpy(document["labels"])[None]
        sums.append(token_losses(vocabulary)(model(labels).logits, labels))
    logged = perplexities(EvalPrediction(torch.cat(sums).numpy(), None))
    assert {name: one["value"] for name, one in found["plain"].items()} == pytest.approx(logged, rel=1e-5)
    assert set(found["described"]) == {"perplexity", "text_perplexity"}, "of pictures that are read nothing counts"
    assert found["described"]["text_perplexity"]["value"] != pytest.approx(logged["text_perplexity"], rel=1e-3)
    assert all(one["low"] <= one["value"] <= one["high"] for row in found.values() for one in row.values())
    assert "text_perplexity ↓" in (tmp_path / "out" / "results.md").read_text("utf-8")


def test_pictures_are_as_good_as_their_codes_and_a_stopped_run_goes_on(arguments, tmp_path, monkeypatch, capsys):
    RECIPE.main(arguments("codes", "out"))
    expected, calls, losses = printed(capsys), [], RECIPE.modality_losses

    def stopping(*given):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return losses(*given)

    monkeypatch.setattr(RECIPE, "modality_losses", stopping)
    with pytest.raises(KeyboardInterrupt):
        RECIPE.main(arguments("pictures", "again"))
    assert len(list((tmp_path / "again" / "answered" / "plain").iterdir())) == 6, "two batches of three stay"
    RECIPE.main(arguments("pictures", "again"))
    assert len(calls) == 3 + 1 + 3, "one batch of the first setting was left, and the second setting"
    found = printed(capsys)
    assert found == expected


def test_broken_rows_are_left_out_and_said(arguments, tmp_path, caplog):
    rows = Dataset.from_parquet(str(tmp_path / "codes" / "train.parquet")).to_list()
    rows[1]["codes"] = rows[1]["codes"][:5]
    Dataset.from_list(rows).to_parquet(tmp_path / "codes" / "train.parquet")
    with caplog.at_level(logging.WARNING):
        RECIPE.main(arguments("codes", "out", settings=SETTINGS[:1]))
    assert "skipped 1 of 8 rows: broken codes" in caplog.text
    assert len(list((tmp_path / "out" / "answered" / "plain").iterdir())) == 7


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ([], "different names"),
        ([{"name": "a"}, {"name": "a"}], "different names"),
        ([{"name": "a", "spans": 1}], "fields of CM3Transform in the setting a"),
        ([{"name": "a", "overflow": "cut"}], "overflow 'drop' or 'stream'"),
    ],
)
def test_wrong_settings_are_refused(settings, message, arguments, tmp_path):
    with pytest.raises(ValueError, match=message):
        RECIPE.main(arguments("codes", "out", settings=settings))
    assert not (tmp_path / "out").exists()


def test_a_data_set_without_documents_is_refused(arguments, tmp_path):
    (tmp_path / "other").mkdir()
    Dataset.from_dict({"label": np.arange(3)}).to_parquet(tmp_path / "other" / "train.parquet")
    with pytest.raises(ValueError, match="expected columns among"):
        RECIPE.main(arguments("other", "out"))


def test_the_recipes_yaml_is_read(processor):
    config = str(REPOSITORY / "recipes/evaluate/perplexity.yaml")
    (arguments,) = TrlParser(RECIPE.PerplexityArguments).parse_args_and_config(["--config", config])
    assert list(RECIPE.transforms(arguments.settings, processor, 96)) == ["plain", "described"]
