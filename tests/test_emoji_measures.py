"""The evaluation of what a model makes of held-out instruction rows."""

import json

import emoji_judge
import emoji_measures
import emoji_sheet
import emoji_tasks as recipe
import numpy as np
import pytest
import torch
import yaml
from conftest import GRID_SIZE, IMAGE_SIZE, REPOSITORY, draw, load_recipe, small_model
from datasets import load_dataset
from peft import LoraConfig, get_peft_model
from PIL import Image
from small_emoji import emoji_config, of_task, rows_by_codes
from trl import TrlParser

from cm3leon_hf import default_model, default_ranker, default_tuned_model
from cm3leon_hf.data.tasks import load_tasks
from cm3leon_hf.data.words import FONTS, write_word
from cm3leon_hf.evaluation.boxes import drawn_box_iou
from cm3leon_hf.evaluation.clip_score import CLIPScorer
from cm3leon_hf.evaluation.instructions import answer_instructions, best_edits, best_texts, instruction_prompt
from cm3leon_hf.evaluation.options import asking
from cm3leon_hf.evaluation.words import nearest_words
from cm3leon_hf.processing_prompts import CONTROLS
from cm3leon_hf.training.adapters import TARGETS, save_adapters


@pytest.fixture(scope="module")
def config(tmp_path_factory, saved_vqgan):
    return emoji_config(tmp_path_factory.mktemp("emoji"), saved_vqgan)


@pytest.fixture(scope="module")
def built(config):
    recipe.main(config)
    return {name: list(split) for name, split in load_dataset(config.out).items()}


@pytest.fixture(scope="module")
def known():
    return rows_by_codes()


@pytest.fixture(scope="module")
def judged():
    """The evaluation's recipe."""
    return load_recipe("evaluate/emoji_tasks.py")


def test_prompts_of_rows_are_those_of_the_processor(processor):
    codes = torch.arange(GRID_SIZE**2)[None]
    picture = draw("red", "circle")
    seen = processor.encode_images(picture)

    def ids(texts, answer, shown):
        return processor(text=instruction_prompt(texts, answer), image_codes=shown)["input_ids"].tolist()

    edit = ["Edit first image following the instruction", None, "make it blue", None]
    assert ids(edit, 3, seen) == processor.for_editing(picture, "make it blue")["input_ids"].tolist()
    control = [f"Make high quality image from {CONTROLS['canny']}", None, "a red circle", None]
    wanted = processor.for_image_to_image(picture, "canny", "a red circle")["input_ids"].tolist()
    assert ids(control, 3, seen) == wanted
    caption = ["Describe the given picture.", " a red circle", None]
    wanted = processor.for_image_to_text(text="Describe the given picture.", image_codes=codes)["input_ids"].tolist()
    assert ids(caption, 1, codes) == wanted
    assert ids(["a red circle", None], 1, None) == processor.for_text_to_image("a red circle")["input_ids"].tolist()
    assert instruction_prompt(["Answer:", " red", ".", None], 1) == "Answer:<mask>.<break><image><infill>"
    with pytest.raises(ValueError, match="last part"):
        instruction_prompt([None, "a red circle"], 0)


def test_rows_are_answered_behind_their_documents(model, processor):
    picture = {"text": "a red circle", "codes": list(range(GRID_SIZE**2))}
    ask = {"texts": ["Describe.", " x", None], "codes": [None, None, picture["codes"]], "answer": 1}
    prompt = processor(text=instruction_prompt(ask["texts"], 1), image_codes=torch.tensor([picture["codes"]]))
    inputs = processor.with_retrieved(prompt, [[picture]], model.config.max_position_embeddings - 4)
    assert inputs["input_ids"].shape[1] > prompt["input_ids"].shape[1]
    ids = model.generate(**inputs, generation_mode="text", do_sample=False, max_new_tokens=4)
    wanted = processor.post_process_multimodal_output(ids[:, inputs["input_ids"].shape[1] :], generation_mode="text")
    alone, behind = (
        answer_instructions([ask | {"retrieved": found}], model, processor, {"max_new_tokens": 4})
        for found in ([], [picture])
    )
    assert behind == [wanted[0].strip()]
    assert alone == answer_instructions([ask], model, processor, {"max_new_tokens": 4})


def test_documents_may_be_left_out(judged, monkeypatch):
    stored = {"task": "say", "retrieved": [{"text": "a pig", "codes": [1]}]}
    for wanted in (True, False):
        monkeypatch.setattr(judged, "load_dataset", lambda *args, **kwargs: [dict(stored)])
        (row,) = judged.rows_by_task(judged.EmojiTasksArguments(retrieved=wanted))["say"]
        assert row["retrieved"] == (stored["retrieved"] if wanted else [])


def test_the_tuned_model_is_measured_and_adapters_stand_on_the_untuned_one(judged):
    assert judged.EmojiTasksArguments().model == default_tuned_model()
    assert judged.EmojiTasksArguments(adapters="mine").model == default_model()
    assert judged.EmojiTasksArguments(model="other", adapters="mine").model == "other"


def test_questions_of_table_2_are_asked_as_in_training():
    tasks = yaml.safe_load((REPOSITORY / "recipes/evaluate/table2.yaml").read_text(encoding="utf-8"))["tasks"]
    template = load_tasks()["vqa2"].templates[0]
    front, behind = template.format(question="what is it?", answer="|", image="").split(" |")
    wanted = instruction_prompt([front, " a pig", behind.removesuffix(" <break> "), None], 1)
    for task in tasks:
        if task["kind"] in ("vqa", "vizwiz"):
            assert asking(task["prompt"].format(question="what is it?")) == wanted
    assert asking("Describe.") == instruction_prompt(["Describe.", " a pig", None], 1)


def test_answers_are_what_generate_continues_with(processor):
    model = small_model(max_position_embeddings=256)
    shown = list(range(GRID_SIZE**2))
    edit = {"texts": ["Edit", None, "make it blue", None], "codes": [None, shown, None, shown], "answer": 3}
    (codes,) = answer_instructions([edit], model, processor, {"do_sample": False, "guidance_scale": 1.0})
    inputs = processor(text="Edit<break><image><break>make it blue<break>", image_codes=torch.tensor([shown]))
    ids = model.generate(**inputs, generation_mode="image", do_sample=False, guidance_scale=1.0)
    assert codes == processor.vocabulary.ids_to_codes(ids[0, -(GRID_SIZE**2) :]).tolist()
    ask = {"texts": ["Describe.", " a circle", None], "codes": [None, None, shown], "answer": 1}
    (said,) = answer_instructions([ask], model, processor, {"max_new_tokens": 4})
    assert isinstance(said, str)
    with pytest.raises(ValueError, match="both kinds"):
        answer_instructions([edit, ask], model, processor)


def test_of_several_edits_the_best_are_kept(processor, small_clip):
    model, scorer = small_model(max_position_embeddings=256), CLIPScorer(small_clip, None, device="cpu")

    def ranker(pictures, texts):  # another one, that looks for red, and takes a text for its length
        return [np.asarray(one)[..., 0].mean() / 255 * len(text) for one, text in zip(pictures, texts)]

    given = [torch.randint(IMAGE_SIZE, (GRID_SIZE**2,)).tolist() for _ in range(3)]
    texts = [["Edit", None, f"make it {colour}", None] for colour in ("blue", "red", "green")]
    rows = [{"texts": text, "codes": [None, one, None, one], "answer": 3} for text, one in zip(texts, given)]
    drawing = {"do_sample": True, "guidance_scale": 1.0}
    torch.manual_seed(0)
    best = best_edits(rows, model, processor, ranker, scorer, 4, drawing)
    torch.manual_seed(0)
    for row, kept in zip(rows, best):  # three rows and four candidates: one row at a time
        drawn = answer_instructions([row], model, processor, drawing | {"num_return_sequences": 4})
        origin, *pictures = processor.decode_images(torch.tensor([row["codes"][1], *drawn]))
        vectors, asked = scorer.embed_images(pictures).numpy(), np.array(ranker(pictures, [row["texts"][2]] * 4))
        mean = vectors.mean(0) / np.linalg.norm(vectors.mean(0))
        scores = asked + vectors @ (scorer.embed_images([origin]).numpy()[0] + mean)
        assert len({round(score, 5) for score in scores}) > 1 and kept == drawn[scores.argmax()]
    say = {"texts": ["Describe.", " a circle", None], "codes": [None, None, given[0]], "answer": 1}
    for row in (say, {"texts": ["red", None], "codes": [None, given[0]], "answer": 1}):
        with pytest.raises(ValueError, match="expected edits"):
            best_edits([row], model, processor, ranker, scorer, 4)


def test_of_several_texts_the_one_that_model_and_clip_agree_on_is_kept(processor, small_clip):
    """CLIP sees the picture itself if a row has it, what its codes show otherwise."""
    model, scorer = small_model(max_position_embeddings=256), CLIPScorer(small_clip, None, device="cpu")
    shown = [torch.randint(IMAGE_SIZE, (GRID_SIZE**2,)).tolist() for _ in range(3)]
    rows = [{"texts": ["Describe.", " a circle", None], "codes": [None, None, one], "answer": 1} for one in shown]
    rows[0]["picture"] = draw("red", "circle")
    writing, beams = {"max_new_tokens": 6}, {"num_beams": 4, "num_return_sequences": 4, "length_penalty": 0.0}
    written = answer_instructions(rows, model, processor, writing | beams)
    pictures = [rows[0]["picture"], *processor.decode_images(torch.tensor(shown))[1:]]
    pools, firsts = [], [written[at] for at in (0, 4, 8)]
    for at, (row, picture) in enumerate(zip(rows, pictures)):
        texts = written[4 * at : 4 * at + 4]
        prompt = instruction_prompt(row["texts"], 1)
        inputs = processor(text=[prompt], image_codes=torch.tensor([shown[at]]))
        flags = {"return_dict_in_generate": True, "output_scores": True, "do_sample": False}
        found = model.generate(**inputs, generation_mode="text", **writing, **beams, **flags)
        likelihood = model.compute_transition_scores(
            found.sequences, found.scores, found.beam_indices, normalize_logits=False
        ).sum(dim=1)
        pools.append((texts, likelihood, scorer.embed_texts(texts) @ scorer.embed_images([picture])[0]))
    kept = []
    for scale in np.geomspace(1, 1000, 16):  # so close that any weight but 1 would keep another text at some
        scorer.scale = scale
        kept.append(best_texts(rows, model, processor, scorer, 4, writing))
        assert kept[-1] == [texts[(likely + scale * like).argmax()] for texts, likely, like in pools]
    assert firsts != kept[-1] != kept[0]
    for row in ({"texts": ["Edit", None], "codes": [None, shown[0]], "answer": 1}, {"texts": ["a"], "answer": 0}):
        with pytest.raises(ValueError, match="text about an image"):
            best_texts([row | {"codes": row.get("codes", [None])}], model, processor, scorer, 4)


def test_boxes_that_nothing_fills_have_no_overlap():
    assert drawn_box_iou(Image.new("RGB", (96, 96), "white"), [[0.1, 0.1, 0.5, 0.5]]).tolist() == [0]
    canvas = Image.new("RGB", (100, 100), "white")
    canvas.paste("red", (10, 10, 30, 30))
    asked = [[0.1, 0.1, 0.3, 0.3], [0.6, 0.6, 0.9, 0.9]]
    assert drawn_box_iou(canvas, asked).tolist() == [1, 0]
    assert drawn_box_iou(canvas, [[0.2, 0.1, 0.4, 0.3]]) == pytest.approx([1 / 3])
    with pytest.raises(ValueError, match="boxes"):
        drawn_box_iou(canvas, [])


class Oracle:
    """Sees what pictures, which are rows, say."""

    def right(self, kind, rows, pictures):
        return [one == row for one, row in zip(pictures, rows)]


@pytest.mark.parametrize("is_right", [True, False])
def test_right_answers_score_one_and_wrong_ones_nothing(built, judged, known, monkeypatch, is_right):
    real = {row["source"]: row["image"] for _, row in known.values()}
    for task in ("edit", "no_edit", "grounded", "captioning", "vqa", "reasoning", *emoji_measures.CONTROLS):
        rows = of_task(built["heldout_pairs"], task)
        answers = judged.right_answers(rows)
        if task in ("edit", "grounded", *emoji_measures.CONTROLS):
            shown = {"edit": lambda row: row, "grounded": canvas_of}.get(task, lambda row: real[row["source"]])
            wrong = None if task == "edit" else Image.new("RGB", (96, 96) if task == "grounded" else (16, 16), "white")
            drawn = [shown(row) if is_right else wrong for row in rows]
            monkeypatch.setattr(emoji_measures, "decoded", lambda answers, processor, drawn=drawn: drawn)
        elif not is_right:
            answers = [[code + 1 for code in one] if task == "no_edit" else f"not {one}, you" for one in answers]
        for name, values in judged.measure(task, rows, answers, judged.Means(Oracle(), None, real, [])).items():
            assert np.mean(values) == pytest.approx(float(is_right), abs=0.1 * is_right), name


def test_long_captions_are_measured_by_cider():
    rows = [{"value": "a noto emoji of pig. It is pink."}, {"value": "a noto emoji of rocket. It is grey."}]
    said = [rows[0]["value"], "nothing at all"]
    assert emoji_measures.described(rows, said, None)["long_caption_cider"] == pytest.approx([10, 0], abs=1e-6)


def test_words_are_right_if_no_other_is_more_alike(monkeypatch):
    rows = [{"kind": "word", "value": "fish"}, {"kind": "word", "value": "fish"}, {"kind": "emoji", "value": "OK"}]
    drawn = [write_word(word, FONTS[1], 96).resize((48, 48)).resize((96, 96)) for word in ("fish", "fist")]
    drawn[0] = drawn[0].rotate(0, translate=(2, -1), fillcolor="white")
    monkeypatch.setattr(emoji_measures, "decoded", lambda answers, processor: [*drawn, rows[2]])
    means = emoji_measures.Means(Oracle(), None, {}, ["road", "fist", "fish", "dish"])
    assert emoji_measures.written(rows, [], means) == {"write_word": [True, False], "write_emoji": [True]}
    with pytest.raises(ValueError, match="got none"):
        nearest_words(drawn, [])


def canvas_of(row: dict) -> Image.Image:
    """A canvas with a black rectangle in each box."""
    canvas = Image.new("RGB", (96, 96), "white")
    for box in row["boxes"]:
        canvas.paste("black", tuple(round(side * 96) for side in box))
    return canvas


def test_captions_are_read_word_by_word():
    assert emoji_measures.read_caption("waving hand with medium-dark skin tone, fluent 3d style") == (
        "waving hand",
        "fluent 3d",
    )
    both = "woman with headscarf with dark skin tone, noto style"
    assert emoji_measures.read_caption(both) == ("woman with headscarf", "noto")
    assert emoji_measures.read_caption("woman with red hair, noto style") == ("woman with red hair", "noto")
    assert emoji_measures.read_caption("a picture") == ("", "")


@pytest.mark.parametrize("name, kind", [("emoji_tasks", "EmojiTasksArguments"), ("emoji_judge", "EmojiJudgeArguments")])
def test_the_yaml_is_read_by_its_script(name, kind):
    parser = TrlParser(getattr(load_recipe(f"evaluate/{name}.py"), kind))
    (arguments,) = parser.parse_args_and_config(["--config", str(REPOSITORY / f"recipes/evaluate/{name}.yaml")])
    assert arguments.dataset == "data/emoji-tasks" and arguments.corpus == "data/emoji"


CONCEPTS = {"red heart": ("{} heart", "red"), "blue heart": ("{} heart", "blue"), "pig": ("", ""), "goat": ("", "")}
PLACES = {"red heart": [1, 0, 0], "blue heart": [0, 1, 0], "pig": [0, 0, 1], "goat": [0, 0.6, 0.8]}


class Reader:
    """Reads pictures that are concepts; a goat is nothing that it knows."""

    classes = {"concept": ["pig", "{} heart"], "colour": ["blue", "red"]}

    def read(self, pictures):
        shown = [CONCEPTS[one] for one in pictures]
        found = {"concept": [kin or "pig" for kin, _ in shown], "colour": [colour or "red" for _, colour in shown]}
        return found, np.array([PLACES[one] for one in pictures])


def shown_concepts(*concepts: str) -> list[dict]:
    return [
        {"concept": one, "kin": CONCEPTS[one][0], "style": "", "skin_tone": "", "gender": "", "source": str(number)}
        | {"colour": CONCEPTS[one][1]}
        for number, one in enumerate(concepts)
    ]


@pytest.fixture
def reader(monkeypatch):
    """A judge of two known concepts and, in four pictures, two unknown ones."""
    rows = shown_concepts("red heart", "goat", "goat", "goat")
    rows[3] |= {"concept": "sheep"}
    monkeypatch.setattr(emoji_judge.Shown, "pictures", lambda self: [one["cell"] for one in self.cells])
    cells = [{"cell": "red heart"}, {"cell": "goat"}, {"cell": "goat"}, {"cell": "blue heart"}]
    return emoji_judge.EmojiJudge(Reader(), set(), emoji_judge.Shown(rows, cells)), rows


def test_concepts_are_right_whatever_their_colour(reader):
    judge, asked = reader[0], shown_concepts("red heart", "red heart", "pig")
    assert judge.right("concept", asked, ["red heart", "blue heart", "red heart"]) == [True, True, False]
    assert judge.right("colour", asked[:2], ["red heart", "blue heart"]) == [True, False]
    assert judge.can_judge("colour", asked[0]) and not judge.can_judge("colour", asked[2])
    assert not judge.can_judge("style", asked[0])


def test_unseen_concepts_are_right_if_another_picture_of_them_is_nearest(reader):
    judge, (_, goat, *_, sheep) = reader
    assert judge.right("concept", [goat, goat], ["goat", "blue heart"]) == [True, False]
    assert judge.right("concept", [sheep, goat], ["goat", "goat"]) == [True] and not judge.right("colour", [], [])
    assert judge.can_judge("concept", goat) and not judge.can_judge("concept", sheep)  # of which there is but one


def test_skin_tones_are_told_apart_only_where_there_are_any():
    row = {"concept": "thumbs up", "skin_tone": ""}
    assert emoji_judge.label("skin_tone", row, {"thumbs up"}) and not emoji_judge.label("skin_tone", row, set())
    assert not emoji_judge.label("skin_tone", row | {"skin_tone": "light and dark"}, {"thumbs up"})


@pytest.fixture(scope="module")
def values(built, config, processor, small_clip, tmp_path_factory) -> dict:
    """Of the recipe, for a tiny model and judge."""
    folder = str(tmp_path_factory.mktemp("evaluation"))
    small_model(max_position_embeddings=512).save_pretrained(f"{folder}/model")
    processor.save_pretrained(f"{folder}/model")
    training = {"decoded": 4, "training": {"size": 32, "views": 64, "batch_size": 16}}
    generate = {"draw": {"guidance_scale": 1.0, "do_sample": True}, "write": {"max_new_tokens": 4}}
    generate |= {"no_edit": {"guidance_scale": 1.0, "do_sample": False}}
    found = {"model": f"{folder}/model", "dataset": config.out, "corpus": config.corpus, "judge": f"{folder}/judge"}
    generate |= {"captioning": {"max_new_tokens": 4, "num_beams": 3}}
    found |= {"candidates": {"edit": 2, "captioning": 3}, "clip": small_clip, "ranker": small_clip}
    return found | {"judge_training": training, "generate": generate, "batch_size": 4, "resamples": 5}


def run_recipe(judged, capsys, values: dict) -> dict:
    judged.main(judged.EmojiTasksArguments(**values))
    return json.loads(capsys.readouterr().out.strip().splitlines()[-1])


def test_the_recipe_prints_its_figures_and_goes_on_where_it_was(judged, values, tmp_path, capsys, monkeypatch):
    values = values | {"out": str(tmp_path / "run")}
    found = run_recipe(judged, capsys, values)
    assert Image.open(tmp_path / "run" / "sheet.png").width > 6 * 160
    wanted = {"edit_attribute", "edit_concept", "box_iou", "caption_concept", "caption_style", "vqa_accuracy"}
    wanted |= {"canny_edge_f1", "scribble_edge_f1", "segmentation_iou", "write_emoji"}
    for name in wanted | {"no_edit_codes_kept"}:
        assert 0 <= found[name]["low"] <= found[name]["value"] <= found[name]["high"] <= 1, name
    assert found["oracle"]["caption_concept"]["value"] == found["oracle"]["no_edit_codes_kept"]["value"] == 1
    assert found["oracle"]["long_caption_cider"]["value"] == pytest.approx(10)
    for row in ("real", "oracle"):
        assert {"judge_style", "judge_concept"} <= set(found[row])
    for name in ("answer_instructions", "best_edits", "best_texts"):
        monkeypatch.setattr(judged, name, print)  # which would answer nothing: everything is there
    monkeypatch.setattr(emoji_judge, "train_judge", print)  # so is the judge
    assert run_recipe(judged, capsys, values) == found
    with pytest.raises(ValueError, match="got another ranker"):
        judged.main(judged.EmojiTasksArguments(**values | {"ranker": default_ranker()}))
    with pytest.raises(ValueError, match=r"got \['sing'\]"):
        judged.main(judged.EmojiTasksArguments(**values | {"tasks": ["sing"]}))


def test_the_sheet_shows_what_was_given_what_was_answered_and_what_is_right(processor, monkeypatch):
    given, right, drawn = ([code] * processor.vocabulary.image_length for code in (1, 2, 3))
    edit = {"texts": ["make it", None, "blue", None], "codes": [None, given, None, right], "answer": 3}
    say = {"texts": ["Describe.", " apple", None], "codes": [None, None, given], "answer": 1}
    seen = []
    monkeypatch.setattr(emoji_sheet, "draw_grid", lambda images, labels, columns: seen.extend(zip(images, labels)))
    emoji_sheet.draw_sheet({"edit": [edit], "say": [say]}, {"edit": [drawn], "say": ["a pear"]}, processor, each=1)
    images, labels = zip(*seen)
    for image, codes in zip(images, (given, drawn, right, given)):
        assert np.array_equal(np.asarray(image), np.asarray(processor.decode_images(torch.tensor([codes]))[0]))
    assert labels[0] == "edit: make it [image] blue"
    assert images[4:] == (None, None) and labels[4:] == ("the model: a pear", "right: apple")


def test_edits_of_unseen_concepts_are_judged(judged, values, tmp_path, capsys):
    found = run_recipe(judged, capsys, values | {"out": str(tmp_path), "split": "heldout_concepts"})
    assert {"edit_attribute", "edit_concept", "no_edit_codes_kept"} <= set(found)
    assert {"judge_concept", "judge_style"} <= set(found["real"])


def test_adapters_answer_in_place_of_their_base(judged, values, processor, tmp_path, capsys):
    values = values | {"tasks": ["no_edit"]}
    torch.manual_seed(0)
    base = judged.AutoModelForCausalLM.from_pretrained(values["model"])
    tuned = get_peft_model(base, LoraConfig(r=4, target_modules=TARGETS, init_lora_weights=False))
    save_adapters(tuned, processor, str(tmp_path / "adapters"), {})
    tuned.merge_and_unload().save_pretrained(tmp_path / "merged")
    processor.save_pretrained(tmp_path / "merged")

    def answers(name: str, **changes) -> list:
        run_recipe(judged, capsys, values | {"out": str(tmp_path / name)} | changes)
        return [path.read_text() for path in sorted((tmp_path / name / "answered" / "no_edit").iterdir())]

    tuned = answers("with", adapters=str(tmp_path / "adapters"))
    assert tuned == answers("whole", model=str(tmp_path / "merged")) != answers("without")
    with pytest.raises(ValueError, match="load that base"):
        answers("other", model=str(tmp_path / "merged"), adapters=str(tmp_path / "adapters"))
