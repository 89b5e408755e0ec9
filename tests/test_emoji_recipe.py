"""The emoji recipe over fake packages in the layout that npm unpacks to: no network, no npm."""

import io
import json
import tarfile
from collections import Counter
from pathlib import Path

import emoji as recipe
import emoji_rows as rows_of
import emoji_sources as sources
import pytest
import yaml
from datasets import load_dataset
from PIL import Image

RECIPES = Path(__file__).parents[1] / "recipes" / "data"
SALT = "salt"
HOLD_OUT = rows_of.HoldOut(SALT, concepts=0.02, pairs=0.05)
STYLES = ["fluent 3d", "fluent flat", "noto", "twemoji"]
RED_SVG = '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 36 36"><path fill="#f00" d="M9 9h18v18H9z"/></svg>'
NAMES = [
    {
        "label": "waving hand",
        "hexcode": "1F44B",
        "tags": ["hello", "hand"],
        "group": 1,
        "subgroup": 16,
        "skins": [
            {"label": "waving hand: medium skin tone", "hexcode": "1F44B-1F3FD", "tone": 3},
            {"label": "waving hand: light, dark", "hexcode": "1FAF1-1F3FB-200D-1FAF2-1F3FF", "tone": [1, 5]},
        ],
    },
    {"label": "keycap: 1", "hexcode": "0031-FE0F-20E3", "tags": [], "group": 8, "subgroup": 94},
    {"label": "flag: France", "hexcode": "1F1EB-1F1F7", "tags": ["FR"], "group": 9, "subgroup": 98},
    {"label": "regional indicator F", "hexcode": "1F1EB"},
    {"label": "light skin tone", "hexcode": "1F3FB", "group": 2, "subgroup": 32},
]
GROUPS = {
    "groups": {"1": "people-body", "2": "component", "8": "symbols", "9": "flags"},
    "subgroups": {"16": "hand-fingers-open", "32": "skin-tone", "94": "keycap", "98": "country-flag"},
}


def write(path: Path, content: str | bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())


def webp(colour: str, size: tuple[int, int]) -> bytes:
    file = io.BytesIO()
    Image.new("RGBA", size, colour).save(file, "WEBP", lossless=True)
    return file.getvalue()


def pixel(png: bytes, x: int, y: int) -> tuple[int, int, int]:
    return Image.open(io.BytesIO(png)).getpixel((x, y))


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    """A cache folder with all five packages, each as `fetch_package` leaves it."""
    home = tmp_path / "cache"
    write(home / "names@1/package/en/data.json", json.dumps(NAMES))
    write(home / "names@1/package/meta/groups.json", json.dumps(GROUPS))
    for file in ("1f44b.svg", "1f44b-1f3fd.svg", "31-20e3.svg", "1f1eb-1f1f7.svg", "e50a.svg"):
        write(home / "@art__files@1/package" / file, RED_SVG)
    write(home / "@art__files@1/package/1faf1-1f3fb-200d-1faf2-1f3ff.svg", "<svg broken")
    for file in ("1f44b.webp", "0031-fe0f-20e3.webp", "1f1eb-1f1f7.webp"):
        write(home / "@art__bitmaps@1/package/assets" / file, webp("blue", (20, 20)))
    body = '<path fill="#0f0" d="M0 0h16v33H0z"/>'
    icons = {"width": 32, "height": 32, "icons": {"waving-hand": {"body": body, "height": 33}}}
    write(home / "@art__icons@1/package/icons.json", json.dumps(icons))
    write(home / "@art__icons@1/package/chars.json", json.dumps({"1f44b": "waving-hand", "31-20e3": "lost"}))
    return home


@pytest.fixture
def config_file(cache: Path, tmp_path: Path) -> Path:
    """The recipe's own YAML with the packages exchanged for the fake ones."""
    values = yaml.safe_load((RECIPES / "emoji.yaml").read_text(encoding="utf-8"))
    values |= {"names": "names@1", "cache": str(cache), "size": 16, "workers": 1, "preview": ["waving hand"]}
    values |= {"salt": SALT, "heldout_concepts": 0.4, "heldout_pairs": 0.6}  # so that few rows fill every split
    common = {"licence": "MIT", "credit": "an artist"}
    values["sources"] = [
        {"style": "twemoji", "package": "@art/files@1", "layout": "hexcodes", **common},
        {"style": "noto", "package": "@art/icons@1", "layout": "iconify", **common},
        {
            "style": "fluent 3d",
            "package": "@art/bitmaps@1",
            "layout": "hexcodes",
            "folder": "assets",
            "skip_subgroups": ["country-flag"],
            **common,
        },
    ]
    path = tmp_path / "emoji.yaml"
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    return path


@pytest.fixture
def build(config_file: Path, tmp_path: Path):
    def run(*flags: str) -> Path:
        recipe.main(["--config", str(config_file), "--out", str(tmp_path / "out"), *flags])
        return tmp_path / "out"

    return run


def test_load_dataset_reads_what_main_writes(build, tmp_path, capsys):
    data = load_dataset(str(build()), cache_dir=str(tmp_path / "arrow"))
    assert set(data) == set(rows_of.SPLITS)
    everything = [row for split in data.values() for row in split]
    found = {(row["concept"], row["skin_tone"], row["style"]): row for row in everything}
    assert set(found) == {
        ("waving hand", "", "twemoji"),
        ("waving hand", "medium", "twemoji"),
        ("keycap 1", "", "twemoji"),
        ("flag of france", "", "twemoji"),
        ("waving hand", "", "noto"),
        ("waving hand", "", "fluent 3d"),
        ("keycap 1", "", "fluent 3d"),
    }
    row = found["waving hand", "medium", "twemoji"]
    assert row["image"].size == (16, 16) and row["image"].mode == "RGB"
    assert row["hexcode"] == "1F44B-1F3FD" and row["source"] == "@art/files@1 1f44b-1f3fd.svg"
    assert (row["group"], row["subgroup"], row["tags"]) == ("people-body", "hand-fingers-open", ["hello", "hand"])
    printed = capsys.readouterr().out
    assert "1faf1-1f3fb-200d-1faf2-1f3ff.svg cannot be rendered" in printed  # broken SVG
    assert "lost cannot be rendered" in printed  # no such icon in the set
    assert "twemoji: not a named emoji" in printed
    assert "subgroup country-flag skipped" in printed
    assert "skipped 4 pictures" in printed


def test_a_rebuilt_folder_is_not_read_from_a_stale_cache(build, tmp_path):
    sizes = []
    for size in ("16", "24"):
        data = load_dataset(str(build("--size", size, "--overwrite")), cache_dir=str(tmp_path / "arrow"))
        sizes.append(data["train"][0]["image"].width)
    assert sizes == [16, 24]


def test_the_folder_has_a_card_and_a_preview(build):
    out = build()
    front = yaml.safe_load((out / "README.md").read_text(encoding="utf-8").split("---\n")[1])
    assert [split["name"] for split in front["dataset_info"]["splits"]] == list(rows_of.SPLITS)
    assert "an artist" in (out / "README.md").read_text(encoding="utf-8")
    assert Image.open(out / "preview.png").getcolors(maxcolors=100_000)
    assert not out.with_name("out.building").exists()


def test_one_style_alone_leaves_no_pairs_to_hold_out(build, tmp_path):
    data = load_dataset(str(build("--styles", "twemoji")), cache_dir=str(tmp_path / "arrow"))
    assert set(data) == {rows_of.TRAIN, rows_of.HELDOUT_CONCEPTS}


def test_a_filled_output_folder_stops_the_build(build):
    build()
    with pytest.raises(ValueError, match="--overwrite"):
        build()
    build("--overwrite")


def test_errors_name_the_remedy(build, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"got \['oil painting'\]"):
        build("--styles", "oil painting")
    with pytest.raises(ValueError, match="expected a layout out of"):
        sources.Source("noto", "p@1", "zip", "MIT", "an artist")
    monkeypatch.setenv("PATH", "")
    with pytest.raises(ValueError, match="npm on the PATH"):
        sources.fetch_package("absent@1", tmp_path)


def test_flags_override_the_yaml():
    config = recipe.parse_config(["--config", str(RECIPES / "emoji.yaml"), "--size", "64"])
    assert (config.size, config.out) == (64, "data/emoji")
    assert [source.style for source in recipe.chosen_sources(config)] == STYLES


def test_a_package_is_packed_once(tmp_path, monkeypatch):
    calls = []

    def pack(package: str, folder: Path) -> Path:
        calls.append(package)
        with tarfile.open(folder / "art.tgz", "w:gz") as archive:
            member = tarfile.TarInfo("package/icon.svg")
            archive.addfile(member, io.BytesIO())
        return folder / "art.tgz"

    monkeypatch.setattr(sources, "npm_pack", pack)
    monkeypatch.setattr(sources.shutil, "which", lambda name: name)
    for _ in range(2):
        folder = sources.fetch_package("@art/icons@1", tmp_path)
    assert calls == ["@art/icons@1"] and (folder / "icon.svg").exists()


@pytest.mark.parametrize(
    "label, name",
    [
        ("red apple", "red apple"),
        ("flag: Côte d’Ivoire", "flag of côte d'ivoire"),
        ("man: red hair", "man with red hair"),
        ("woman: bald", "bald woman"),
        ("man running: facing right", "man running facing right"),
        ("kiss: woman, man", "kiss of woman and man"),
        ("family: man, woman, girl, boy", "family of man, woman, girl and boy"),
        ("couple with heart: man, man", "couple with heart, man and man"),
        ("Japanese “here” button", 'japanese "here" button'),
    ],
)
def test_names_read_naturally(label, name):
    assert sources.natural_name(label) == name


def test_hexcodes_have_one_spelling():
    assert sources.normal_hexcode("00A9-FE0F") == "a9"
    flags = "1F3F4-E0067-E0062-E007F", "1f3f4-e0067_e0062"
    assert len({sources.normal_hexcode(flag) for flag in flags}) == 1


def test_swaps_repair_only_the_hexcodes_they_match():
    swaps = [{"points": ["1f3fc", "1f3fd"], "where": "^1f44b"}]
    assert sources.swapped("1f44b-1f3fc", swaps) == "1f44b-1f3fd"
    assert sources.swapped("1f44b-1f3fd", swaps) == "1f44b-1f3fc"
    assert sources.swapped("1f44c-1f3fc", swaps) == "1f44c-1f3fc"


def test_icons_without_hexcodes_are_known_by_their_labels(tmp_path):
    labels = {
        "1f452": "woman’s hat",
        "1f44b-1f3fd": "waving hand: medium skin tone",
        "2a": "keycap: *",
        "23": "keycap: #",
    }
    emoji = {code: sources.Emoji(label, label, code, "", "", (), "") for code, label in labels.items()}
    names = ["womans-hat", "waving-hand-medium-skin-tone", "keycap", "spaceship"]
    icons = {"width": 16, "height": 16, "icons": {name: {"body": f"<!--{name}-->"} for name in names}}
    write(tmp_path / "icons.json", json.dumps(icons))
    source, skipped = sources.Source("old", "p@1", "iconify-names", "MIT", "an artist"), Counter()
    drawings = list(sources.read_drawings(source, tmp_path, emoji, skipped))
    assert [drawing.emoji.hexcode for drawing in drawings] == ["1f452", "1f44b-1f3fd"]
    assert b"<!--womans-hat-->" in drawings[0].data
    assert skipped == {"old: not a named emoji": 2}  # two keycaps have this name


def test_captions_name_the_skin_tone_and_begin_with_the_canonical_one():
    templates = ["{subject}, {style} style", "a {style} emoji of {subject}", "{subject}, {tag}, {style} style"]
    emoji = sources.Emoji("", "waving hand", "", "", "", ("bye", "hand", "hello", "wave"), "medium")
    assert rows_of.captions(emoji, "noto", templates, tags_per_template=2) == [
        "waving hand with medium skin tone, noto style",
        "a noto emoji of waving hand with medium skin tone",
        "waving hand with medium skin tone, bye, noto style",
        "waving hand with medium skin tone, hello, noto style",
    ]
    assert rows_of.subject("handshake", "light and dark") == "handshake with light and dark skin tones"


def test_svg_lies_over_white_unsheared():
    png = rows_of.render_png(RED_SVG.encode(), 36)
    assert pixel(png, 2, 2) == (255, 255, 255) and pixel(png, 18, 18) == (255, 0, 0)


def test_pictures_are_padded_to_a_square():
    png = rows_of.render_png(webp("blue", (40, 20)), 20)
    assert pixel(png, 10, 1) == (255, 255, 255) and pixel(png, 10, 10) == (0, 0, 255)


def pairs_by_split(concepts: list[str], hold_out=HOLD_OUT) -> dict[tuple[str, str], str]:
    return {(concept, style): hold_out.split(concept, style, STYLES) for concept in concepts for style in STYLES}


CONCEPTS = [f"concept {number}" for number in range(2000)]


def test_held_out_shares_are_near_the_wanted_ones():
    counts = Counter(pairs_by_split(CONCEPTS).values())
    assert counts[rows_of.HELDOUT_CONCEPTS] / counts.total() == pytest.approx(0.02, abs=0.007)
    rest = counts.total() - counts[rows_of.HELDOUT_CONCEPTS]
    assert counts[rows_of.HELDOUT_PAIRS] / rest == pytest.approx(0.05, abs=0.007)


@pytest.mark.parametrize("pairs", [0.05, 1.0])
def test_a_concept_is_held_out_whole_or_keeps_a_style_in_training(pairs):
    splits = pairs_by_split(CONCEPTS, rows_of.HoldOut(SALT, 0.02, pairs))
    for concept in CONCEPTS:
        of_concept = {splits[concept, style] for style in STYLES}
        assert of_concept == {rows_of.HELDOUT_CONCEPTS} or rows_of.TRAIN in of_concept
        assert HOLD_OUT.split(concept, "noto", ["noto"]) != rows_of.HELDOUT_PAIRS  # its only style


def test_what_resembles_a_held_out_pair_is_held_out():
    splits, styles = pairs_by_split(CONCEPTS), ["noto v1", "emojione"]
    like = {concept: HOLD_OUT.split(concept, "noto v1", styles, like=["noto"]) for concept in CONCEPTS}
    assert all(like[concept] != rows_of.TRAIN for concept in CONCEPTS if splits[concept, "noto"] != rows_of.TRAIN)
    assert Counter(like.values())[rows_of.TRAIN] > 0.8 * len(CONCEPTS)
    rows = [{"concept": concept, "style": "noto v1", "source": concept} for concept in CONCEPTS]
    found = recipe.split_rows(rows, HOLD_OUT, {"noto v1": ["noto"]})
    assert {row["concept"] for row in found[rows_of.TRAIN]} <= {
        one for one in CONCEPTS if splits[one, "noto"] == rows_of.TRAIN
    }


def test_both_data_sets_hold_out_by_the_same_hash():
    first, more = (recipe.parse_config(["--config", str(RECIPES / f"{name}.yaml")]) for name in ("emoji", "emoji_more"))
    for key in ("salt", "heldout_concepts", "heldout_pairs", "names", "size", "captions"):
        assert getattr(first, key) == getattr(more, key)
    resembled = {style for source in recipe.chosen_sources(more) for style in source.like}
    assert resembled < set(STYLES)


def test_adding_concepts_moves_no_other():
    before = pairs_by_split(CONCEPTS[:1000])
    after = pairs_by_split(CONCEPTS)
    assert before.items() <= after.items()


def test_the_hold_out_is_the_same_on_every_machine():
    assert HOLD_OUT.draw("red apple", "noto") == 0.7730321045694584


def test_all_skin_tones_of_a_pair_share_a_split():
    rows = [
        {"concept": concept, "style": style, "source": f"{concept} {style} {tone}"}
        for concept in CONCEPTS[:300]
        for style in STYLES
        for tone in ("", "light", "dark")
    ]
    splits = recipe.split_rows(rows, HOLD_OUT)
    assert sum(len(part) for part in splits.values()) == len(rows)
    pairs = [{(row["concept"], row["style"]) for row in part} for part in splits.values()]
    assert all(not first & second for first in pairs for second in pairs if first is not second)
    shuffled = recipe.split_rows(rows[::-1], HOLD_OUT)
    assert shuffled == splits
