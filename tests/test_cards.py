"""The cards under model_cards/: metadata that the hub understands, and everything that a card shows lies beside it."""

import re
from pathlib import Path

import pytest
from conftest import REPOSITORY
from huggingface_hub import ModelCard, ModelCardData

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
