"""Instruction rows from drawn emoji."""

import re
import shutil
from collections import Counter
from dataclasses import replace

import emoji_corpus as corpus_of
import emoji_pictures
import emoji_retrieved
import emoji_tasks as recipe
import numpy as np
import pytest
from conftest import draw
from datasets import load_dataset
from emoji_instructions import SIDES, Split
from PIL import Image
from small_banks import SeededEncoder
from small_emoji import (
    HELD_OUT_CONCEPT,
    HELD_OUT_PAIRS,
    emoji_augmenter,
    emoji_config,
    emoji_rows,
    key,
    of_task,
    rows_by_codes,
)

from cm3leon_hf.evaluation.boxes import drawn_box_iou, drawn_boxes


@pytest.fixture(scope="module")
def config(tmp_path_factory, saved_vqgan):
    config = emoji_config(tmp_path_factory.mktemp("emoji"), saved_vqgan)
    return replace(config, retrieved={"captioning": 0.5, "vqa/name": 1.0, "edit/style": 1.0})


@pytest.fixture(scope="module", autouse=True)
def small_bank():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recipe, "load_augmenter", lambda config: emoji_augmenter())
        yield


@pytest.fixture(scope="module")
def built(config):
    recipe.main(config)
    return {name: list(split) for name, split in load_dataset(config.out).items()}


@pytest.fixture(scope="module")
def known():
    return rows_by_codes()


def test_training_rows_show_and_name_nothing_that_is_held_out(built, known):
    drawn = {"grounded", "canny", "scribble", "segmentation"}
    for row in built["train"]:
        said = " ".join(text for text in row["texts"] if text)
        assert HELD_OUT_CONCEPT not in said
        assert not any(f"{concept}, {style} style" in said for concept, style in HELD_OUT_PAIRS)
        shown = [codes for codes in row["codes"] if codes]
        if row["task"] in drawn:
            shown = shown[1:]  # the first one was drawn for the task
        elif row["kind"] in ("word", *SIDES):
            shown = []
        assert all(known[key(codes)][0] == "train" for codes in shown)


def test_edits_change_one_attribute_and_held_out_ones_end_with_a_held_out_picture(built, known):
    for split, rows in built.items():
        for row in of_task(rows, "edit"):
            (_, start), (place, end) = (known[key(codes)] for codes in row["codes"] if codes)
            assert place == split
            kept = {"style": ("concept", "skin_tone"), "skin_tone": ("concept", "style")}
            for name in kept.get(row["kind"], ("style", "skin_tone")):
                assert start[name] == end[name]
            assert start != end and row["concept"] == end["concept"]
            assert (row["value"] or "default yellow") in row["texts"][2]


def test_edits_name_the_gender_or_colour_that_comes_out(built):
    assert {row["value"] for row in of_task(built["heldout_pairs"], "edit", "gender")} == {"woman"}
    assert {row["concept"] for row in of_task(built["heldout_pairs"], "edit", "colour")} == {"blue heart"}
    assert {row["concept"] for row in of_task(built["train"], "edit", "colour")} == {"red heart", "blue heart"}


def test_moved_copies_are_read_in_training_and_never_drawn_from_words(built, known):
    moved = {key(row["moved"]) for _, row in known.values()}
    reads = ("captioning", "long_caption", "reasoning", "vqa", "no_edit")
    for split, rows in built.items():
        for row in rows:
            shown = {key(codes) for codes in row["codes"] if codes}
            assert not shown & moved or (split == "train" and row["task"] in reads)
    for task in reads:
        shown = {key(codes) for row in of_task(built["train"], task) for codes in row["codes"] if codes}
        assert shown & moved and shown & known.keys() - moved


def test_no_edit_keeps_the_codes(built):
    for rows in built.values():
        for row in of_task(rows, "no_edit"):
            assert row["codes"][1] == row["codes"][3] and row["answer"] == 3


def test_boxes_are_where_the_canvas_shows_something():
    pictures = [draw("red", "square", 48), draw("blue", "circle", 48), draw("green", "square", 48)]
    for count in (1, 2, 3):
        canvas, boxes = emoji_pictures.compose(pictures[:count], 96, np.random.default_rng(count))
        asked = np.array(boxes) / 96
        np.testing.assert_allclose(drawn_boxes(canvas, asked), asked, atol=1.01 / 96)
        assert drawn_box_iou(canvas, asked).min() > 0.9


def test_prompts_write_boxes_as_locations(built):
    for row in of_task(built["train"], "grounded"):
        written = [int(number) for number in re.findall(r"<loc_(\d+)>", row["texts"][0])]
        bins = [min(int(side * 256), 255) for box in row["boxes"] for side in box]
        assert written == bins and len(row["objects"]) == len(row["boxes"])
        assert all(f"{name} at <loc_" in row["texts"][0] for name in row["objects"])
    counts = Counter(len(row["boxes"]) for row in of_task(built["train"], "grounded"))
    assert counts[1] == counts[2] + counts[3] == 8


@pytest.mark.parametrize("kind", SIDES)
def test_questions_about_sides_have_the_canvas_answer(built, kind):
    canvases = {key(row["codes"][-1]): row for row in of_task(built["train"], "grounded")}
    for row in of_task(built["train"], "vqa", kind):
        canvas = canvases[key(row["codes"][-1])]
        left = int(canvas["boxes"][0][0] > canvas["boxes"][1][0])
        assert row["value"] == canvas["objects"][left if SIDES[kind] == "left" else 1 - left]
        assert row["texts"][row["answer"]].strip() == row["value"]
        asked = "".join(text for text in row["texts"][: row["answer"]] if text)
        assert SIDES[kind] in asked
        assert all((name in asked) == (kind == SIDES[kind]) for name in canvas["objects"])


def test_questions_about_sides_have_canvases_of_their_own(config):
    out, rows = f"{config.out}-pairs", {"train": {"vqa/on_left": 12}}
    recipe.main(replace(config, out=out, rows=rows, pairs={"train": 12}, retrieved={}))
    built, drawn = load_dataset(out, split="train"), load_dataset(f"{out}-pictures", split="train")
    assert set(drawn["kind"]) == {"pair"} and {len(members) for members in drawn["members"]} == {2}
    assert 0 < len(built) <= len(drawn) == 12
    assert {key(row["codes"][-1]) for row in built} <= {key(codes) for codes in drawn["codes"]}


def test_segmentation_fills_holes_that_the_border_does_not_reach():
    ring = Image.new("RGB", (9, 9), "white")
    ring.paste("black", (2, 2, 7, 7))
    ring.paste("white", (4, 4, 5, 5))
    (drawn,) = emoji_pictures.Foreground().draw([ring])
    assert np.array_equal(np.asarray(drawn) > 0, np.pad(np.ones((5, 5), bool), 2))


def test_reasoning_explains_and_chooses_the_group(built):
    row = of_task(built["heldout_pairs"], "reasoning", "group")[0]
    said = "".join(text for text in row["texts"] if text)
    assert "\nOptions: (A) " in said and row["texts"][row["answer"]].endswith(f") {row['value']}")


def test_rows_stand_behind_the_best_training_picture_of_another_pair(built, known):
    training, encoder = emoji_rows()["train"], SeededEncoder()
    vectors = encoder.embed_images([row["image"] for row in training]).numpy()
    words = encoder.embed_texts([row["captions"][0] for row in training]).numpy()
    at, limit = {row["captions"][0]: place for place, row in enumerate(training)}, emoji_augmenter().limit
    for rows in built.values():
        shown = [row for row in rows if row["retrieved"]]
        tasks = {("captioning", ""), ("vqa", "name"), ("edit", "style")}
        assert {(row["task"], row["kind"]) for row in shown} <= tasks
        for row in shown:
            _, picture = known[key(next(codes for codes in row["codes"] if codes))]
            assert row["read"] == picture["source"]
            query = encoder.embed_images([picture["image"]]).numpy()[0]
            scores = vectors @ query
            nearest = []
            for one in np.argsort(-scores, kind="stable"):
                if scores[one] <= limit and (vectors[nearest] @ vectors[one] <= limit).all():
                    nearest.append(one)
            nearest = nearest[: emoji_retrieved.CANDIDATES]
            pairs = {(one["concept"], one["style"]) for one in (picture, row)}  # what is read, and what is drawn
            others = np.array([(one["concept"], one["style"]) not in pairs for one in training])
            (document,) = row["retrieved"]
            place = at[document["text"]]
            assert others[place] and document["codes"] == training[place]["codes"]
            by_text = row["task"] == "edit"
            likeness = words @ query if by_text else scores
            assert place == max((one for one in nearest if others[one]), key=lambda one: likeness[one])


def test_a_share_of_the_training_rows_and_all_held_out_ones_stand_behind_documents(built):
    has = {task: [bool(row["retrieved"]) for row in of_task(built["train"], task)] for task in ("captioning", "vqa")}
    assert 0.2 < np.mean(has["captioning"]) < 0.8 and any(has["vqa"])
    for row in built["heldout_pairs"]:
        assert bool(row["retrieved"]) == (row["task"] in ("captioning", "vqa") or row["kind"] == "style")
    kept = emoji_retrieved.with_documents(built["train"], {}, 1.0, 0.0, np.random.default_rng(0))
    assert not any(row["retrieved"] for row in kept)  # nothing was found


def test_a_share_of_the_documents_shows_another_concept():
    concepts = ("sun", "sun", "moon", "moon")
    shown = [corpus_of.Picture(0, concept, "", "noto", "", "", "", [], [], "", []) for concept in concepts]
    found = {"read": [(one, {"text": str(at), "codes": []}) for at, one in enumerate(shown)]}
    rows = [{"read": "read", "concept": "sun", "style": "another", "retrieved": []}] * 200
    for misled, least, most in ((0.0, 0, 0), (0.3, 30, 90), (1.0, 200, 200)):
        kept = emoji_retrieved.with_documents(rows, found, 1.0, misled, np.random.default_rng(0))
        texts = [row["retrieved"][0]["text"] for row in kept]
        assert set(texts) <= {"0", "2"} and least <= texts.count("2") <= most


def test_a_bank_of_other_pictures_is_refused(config):
    pictures, images = corpus_of.load_corpus(config.codes, config.corpus)
    strangers = [replace(one, source=f"other {one.source}") for one in pictures["train"]]
    with pytest.raises(ValueError, match="build the bank of this corpus"):
        emoji_retrieved.retrieve_for(pictures["heldout_pairs"], images["heldout_pairs"], strangers, emoji_augmenter())
    with pytest.raises(ValueError, match="training rows in retrieved"):
        replace(config, retrieved={"singing": 0.5})


def test_a_share_of_the_pictures_is_read_moved(config):
    one = next(picture for picture in corpus_of.load_corpus(config.codes, config.corpus)[0]["train"] if picture.moved)
    for share, least, most in ((0.0, 0, 0), (0.3, 30, 90), (1.0, 200, 200)):
        rng = np.random.default_rng(0)
        split = Split([], [], None, {}, {}, replace(config, moved=share), 96, rng)
        read = [split.seen(one) for _ in range(200)]
        assert least <= read.count(one.moved[0]) <= most
        assert read.count(one.codes) == 200 - read.count(one.moved[0])
        assert split.seen(replace(one, moved=[])) == one.codes


def test_words_of_held_out_rows_are_not_written_in_training(config):
    config = recipe.EmojiTasksConfig(**vars(config) | {"heldout_words": 0.5})
    pictures, _ = corpus_of.load_corpus(config.codes, config.corpus)
    words = recipe.words_by_split(pictures, config)
    assert words["train"] and words["heldout_pairs"] and not {*words["train"]} & {*words["heldout_pairs"]}
    assert HELD_OUT_CONCEPT not in words["train"]


@pytest.mark.parametrize(
    "hexcode, subgroup, kin",
    [
        ("1F469-1F3FD-200D-1F3A8", "person-role", ("1F9D1-200D-1F3A8", "woman")),
        ("1F9D1-200D-1F3A8", "person-role", ("1F9D1-200D-1F3A8", "person")),
        ("1F3C3-200D-2642-FE0F", "person-activity", ("1F3C3", "man")),
        ("1F468-200D-1F469-200D-1F466", "family", ("", "")),
        ("1F468-200D-1F91D-200D-1F468", "person", ("", "")),
    ],
)
def test_genders_are_read_from_hexcodes(hexcode, subgroup, kin):
    assert corpus_of.gender_of(hexcode, subgroup) == kin


def test_colours_are_read_from_names():
    assert corpus_of.colour_of("light blue heart") == ("{} heart", "light blue")
    assert corpus_of.colour_of("pig") == ("", "")


def test_spread_takes_from_every_key_before_it_takes_twice():
    drawn = corpus_of.spread("aaaaabbc", str, 5, np.random.default_rng(0))
    assert sorted(drawn) == ["a", "a", "b", "b", "c"]


def test_a_stopped_build_encodes_only_what_is_not_there(config, built, monkeypatch):
    shutil.rmtree(config.out)
    monkeypatch.setattr(recipe.ImageTokenizer, "encode", None)
    recipe.main(config)
    again = {name: list(split) for name, split in load_dataset(config.out).items()}
    assert again == built
    with pytest.raises(ValueError, match="expected .* to be new"):
        recipe.main(config)


def test_errors_of_the_builder_name_the_remedy(config, built):
    with pytest.raises(ValueError, match=r"got \['sing'\]"):
        recipe.EmojiTasksConfig(**vars(config) | {"rows": {"train": {"sing": 1}}})
    with pytest.raises(ValueError, match=r"in pairs, got \['dev'\]"):
        replace(config, pairs={"dev": 1})
    with pytest.raises(ValueError, match="expected codes of the pictures"):
        corpus_of.load_corpus(config.out, config.corpus)


def test_other_rows_in_the_same_folder_are_loaded(config, built):
    shutil.rmtree(config.out)
    recipe.main(replace(config, seed=config.seed + 1))
    assert list(load_dataset(config.out, split="train")) != built["train"]
