"""The tasks of Table 2: options scored as one by one, each kind's metrics, and the recipe on tiny data."""

import json

import pytest
import torch
import yaml
from conftest import CAPTIONS, COLOURS, REPOSITORY, SHAPES, draw, load_recipe
from datasets import Dataset
from trl import TrlParser

from cm3leon_hf.evaluation.captions import caption_scores
from cm3leon_hf.evaluation.image_to_text import KINDS, Task, short
from cm3leon_hf.evaluation.options import score_options
from cm3leon_hf.evaluation.visdial import visdial_ndcg
from cm3leon_hf.processing_prompts import IMAGE_TO_TEXT

OPTIONS = ["yes", "a red circle on white", "no, it is blue", "two", "white"]
PICTURES = [draw(colour, shape, 24) for colour in COLOURS[:2] for shape in SHAPES]
WORDS = {"tokenizer": "words"}


@torch.no_grad()
def test_options_are_scored_as_one_by_one(model, processor, vocabulary):
    scores = score_options(PICTURES[0], "Is it red?", OPTIONS, model, processor, batch_size=2)
    front = processor(text=f"Is it red?{IMAGE_TO_TEXT}", images=PICTURES[0])["input_ids"]
    for option, score in zip(OPTIONS, scores):
        said = processor.tokenizer(f" {option}", add_special_tokens=False, return_tensors="pt")["input_ids"]
        said = torch.cat([said, torch.tensor([[vocabulary.eos_id]])], dim=1)
        ids = torch.cat([front, said], dim=1)
        labels = ids.clone()
        labels[:, : front.shape[1]] = -100
        assert score == pytest.approx(-model(ids, labels=labels).loss.item(), abs=1e-4)
    assert len({round(score, 3) for score in scores}) == len(OPTIONS)


def test_options_that_cannot_be_scored_are_refused(model, processor):
    with pytest.raises(ValueError, match="expected options"):
        score_options(PICTURES[0], "Is it red?", ["yes", " "], model, processor)
    with pytest.raises(ValueError, match="expected at most 96 tokens"):
        score_options(PICTURES[0], "Is it red?", ["yes " * 90], model, processor)


def rows() -> Dataset:
    return Dataset.from_list(
        [
            {
                "image": picture,
                "question": f"question {number}?",
                "captions": [CAPTIONS[number], "a thing"],
                "answers": [{"answer": "red"}] * 5 + [{"answer": f"blue {number}"}] * 5,
                "answer_type": ["other", "unanswerable"][number % 2],
                "options": OPTIONS,
                "relevance": [0.0, 1.0, 0.0, 0.4, 0.0],
            }
            for number, picture in enumerate(PICTURES)
        ]
    )


def task(kind: str, **changes) -> Task:
    return Task(kind, kind, "data", "train", "Question: {question} Answer:", **changes)


def test_each_kind_is_measured_by_its_own_protocol():
    data, answers = rows(), ["red.", "blue 1", "green", "red"]
    assert task("vqa").prompts(data)[1] == "Question: question 1? Answer:"
    assert task("vqa").measure(data, answers)["accuracy"].value == pytest.approx(0.75)
    found = task("vizwiz").measure(data, answers)
    assert [found[name].value for name in ("accuracy", "accuracy_other", "accuracy_unanswerable")] == [0.75, 0.5, 1]
    found = task("captions", references="captions", **WORDS).measure(data, CAPTIONS[:4])
    expected = caption_scores(CAPTIONS[:4], data["captions"][:], ("cider", "rouge_l"), **WORDS)
    assert {name: one.value for name, one in found.items()} == pytest.approx(
        {name: score.corpus for name, score in expected.items()}
    )
    scores = torch.rand(4, 5).tolist()
    expected = visdial_ndcg(scores, data["relevance"][:]).mean()
    assert task("visdial").measure(data, scores)["ndcg"].value == pytest.approx(expected)


def test_plain_answers_and_full_stops():
    assert [short(text) for text in (" red. ", "3.5", "U.S.", "")] == ["red", "3.5", "U.S", ""]
    data = rows().remove_columns("answers").add_column("answers", [["red"] * 9 + ["blue"]] * 4)
    assert task("vqa").measure(data, ["red"] * 4)["accuracy"].value == 1


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: task("retrieval"), "a kind among"),
        (lambda: task("captions", tokenizer="bpe"), "a tokenizer among"),
        (lambda: Task("a", "vqa", "d", "s", "{dialog}?").prompts(rows()), "without 'dialog'"),
    ],
)
def test_wrong_tasks_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("asked", "changes", "message"),
    [
        (task("vqa"), {"answers": None}, r"expected the columns \['answers'\] for vqa"),
        (task("vizwiz"), {"answer_type": None}, r"expected the columns \['answer_type'\]"),
        (task("vqa"), {"image": None}, r"expected the columns \['image'\]"),
        (task("vqa"), {"answers": [["red"] * 10] * 3 + [[]]}, "expected 10 answers to question 3"),
        (
            task("captions", references="captions", **WORDS),
            {"captions": [["a"]] * 3 + [[""]]},
            "not empty, got .* at 3",
        ),
        (task("captions", references="captions", **WORDS), {"captions": [["a"], [], ["b"], ["c"]]}, "at 1"),
        (task("visdial"), {"relevance": [[0.0] * 5] * 4}, "expected a relevant option"),
        (task("visdial"), {"options": [OPTIONS[:4]] * 4}, "expected scores and relevance"),
        (task("vqa"), {"question": None}, "without 'question'"),
    ],
)
def test_missing_references_are_said_before_anything_is_written(asked, changes, message):
    data = rows().remove_columns(list(changes))
    for name, column in changes.items():
        data = data if column is None else data.add_column(name, column)
    with pytest.raises(ValueError, match=message):
        asked.check(data)


def test_the_tasks_of_table_2_are_read(monkeypatch):
    monkeypatch.setattr("shutil.which", lambda name: name)  # the tasks want Java, the test does not
    parser = TrlParser(load_recipe("evaluate/image_to_text.py").ImageToTextArguments)
    config = str(REPOSITORY / "recipes/evaluate/table2.yaml")
    (arguments,) = parser.parse_args_and_config(["--config", config, "--model", "m"])
    tasks = [Task(**entry) for entry in arguments.tasks]
    assert [task.name for task in tasks] == ["coco", "vqa2", "vizwiz", "okvqa", "paragraph", "visdial"]
    assert {task.kind for task in tasks} == set(KINDS)


def test_the_recipe_measures_every_kind(folder, tmp_path, capsys):
    (tmp_path / "data").mkdir()
    rows().to_parquet(tmp_path / "data" / "train.parquet")
    ask = {"dataset": str(tmp_path / "data"), "split": "train", "prompt": "Question: {question} Answer:"}
    tasks = [{"name": f"my-{kind}", "kind": kind, **ask} for kind in ("vqa", "vizwiz", "visdial")]
    tasks.append({**tasks[0], "name": "coco", "kind": "captions", "references": "captions", **WORDS})
    recipe = load_recipe("evaluate/image_to_text.py")
    arguments = recipe.ImageToTextArguments(folder, str(tmp_path / "out"), tasks, batch_size=3, resamples=10)
    recipe.main(arguments)
    line = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    metrics = {name: sorted(row) for name, row in line.items()}
    assert metrics.pop("my-vizwiz") == ["accuracy", "accuracy_other", "accuracy_unanswerable"]
    assert metrics == {"my-vqa": ["accuracy"], "my-visdial": ["ndcg"], "coco": ["cider", "rouge_l"]}
    (entry,) = yaml.safe_load((tmp_path / "out" / "model_index.yml").read_text())["model-index"]
    assert entry["results"][0]["dataset"]["type"] == ask["dataset"]
    assert "ndcg (my-visdial)" in [one["name"] for one in entry["results"][0]["metrics"]]
    arguments.count = 2
    with pytest.raises(ValueError, match="another setting my-vqa"):
        recipe.main(arguments)
