"""The cards under model_cards/: metadata that the hub understands, and everything that a card shows lies beside it."""

import re
from pathlib import Path

import numpy as np
import pytest
from conftest import REPOSITORY
from huggingface_hub import ModelCard, ModelCardData

from cm3leon_hf.evaluation.intervals import Measured
from cm3leon_hf.evaluation.results import model_index
from cm3leon_hf.training.cards import add_results, check_results, write_card

CARDS = sorted((REPOSITORY / "model_cards").glob("*/README.md"))
LICENCES = {"apache-2.0", "mit", "cc-by-4.0"}  # the hub's names of what we and our sources use


def names(path: Path) -> str:
    return path.parent.name


def test_every_folder_has_a_card():
    assert {path.parent for path in CARDS} == {path for path in (REPOSITORY / "model_cards").iterdir() if path.is_dir()}


@pytest.mark.parametrize("path", CARDS, ids=names)
def test_the_metadata_is_the_hubs(path):
    data = ModelCard.load(path).data
    fields = ("license", "language", "library_name", "pipeline_tag", "tags", "eval_results", "model_name")
    assert set(data.to_dict()) - {"model-index"} <= {*fields}
    licences = {data.license} if isinstance(data.license, str) else set(data.license)
    assert licences and licences <= LICENCES and data.language and data.tags


@pytest.mark.parametrize("path", CARDS, ids=names)
def test_the_results_survive_a_round_trip(path):
    card = ModelCard.load(path)
    again = ModelCard(f"---\n{ModelCardData(**vars(card.data)).to_yaml()}\n---\n{card.text}")
    assert again.data.to_dict() == card.data.to_dict()
    for result in card.data.eval_results or []:
        low, high = result.metric_args["interval_95"]
        assert low <= result.metric_value <= high and result.dataset_type and result.task_type


@pytest.mark.parametrize("path", CARDS, ids=names)
def test_what_a_card_links_to_is_there(path):
    links = [link.split("#")[0] for link in re.findall(r"\]\(([^)]+)\)", path.read_text("utf-8"))]
    missing = [link for link in links if "://" not in link and link and not (path.parent / link).exists()]
    assert not missing


@pytest.fixture
def written(tmp_path) -> Path:
    (tmp_path / "model").mkdir()
    facts = {"data": "data/emoji", "steps": 3}
    write_card(tmp_path / "model", 1234, facts, {"eval_loss": 2.5}, license="mit", datasets=["me/emoji"])
    return tmp_path / "model"


def test_a_run_makes_a_card(written):
    card = ModelCard.load(written / "README.md")
    assert (card.data.license, card.data.pipeline_tag, card.data.model_name) == ("mit", "any-to-any", "model")
    (result,) = card.data.eval_results
    assert (result.metric_type, result.metric_value, result.dataset_type) == ("eval_loss", 2.5, "emoji")
    assert "| steps | 3 |" in card.text and "1,234 parameters" in card.text and 'from_pretrained("model"' in card.text
    with pytest.raises(ValueError, match="license"):
        write_card(written, 1234, {}, {})


def test_an_evaluations_results_join_the_card_once(written, tmp_path):
    for value in (3.0, 4.0):
        measured = {"cfg": {"fid": Measured(value, np.array([value - 1, value + 1]))}}
        text = model_index(
            measured, {}, model_name="other", task_type="text-to-image", dataset_type="coco", dataset_name="COCO"
        )
        (tmp_path / "model_index.yml").write_text(text)
        add_results(written, tmp_path)
    card = ModelCard.load(written / "README.md")
    assert [(one.metric_type, one.metric_value) for one in card.data.eval_results] == [("eval_loss", 2.5), ("fid", 4.0)]
    assert card.data.model_name == "model" and "| steps | 3 |" in card.text
    check_results(written, [tmp_path])
    with pytest.raises(ValueError, match="nowhere"):
        check_results(written, [tmp_path / "nowhere"])
