"""Fine-tuning on a folder of pictures of one's own."""

from pathlib import Path

import datasets
import pytest
from conftest import REPOSITORY, load_recipe
from transformers import AutoProcessor
from trl import ModelConfig, SFTConfig, TrlParser

from cm3leon_hf.training.adapters import load_adapters

RECIPES = REPOSITORY / "recipes" / "sft"


@pytest.fixture(scope="module")
def own_recipe():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(RECIPES))
        yield load_recipe("sft/own_pictures.py")


@pytest.fixture
def own_pictures(tmp_path, pictures) -> Path:
    """Seven pairs, of which one lacks a picture, one is broken, and one says nothing."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for number, picture in enumerate(pictures):
        picture.save(folder / f"{number}.png")
    (folder / "broken.png").write_bytes((folder / "0.png").read_bytes()[:60])
    rows = [f"{number}.png,{number + 1}.png,make it number {number}" for number in range(4)]
    rows += ["0.png,nowhere.png,vanish", "broken.png,1.png,mend it", "0.png,1.png,"]
    (folder / "metadata.csv").write_text("\n".join(["before,after,instruction", *rows]), encoding="utf-8")
    return folder


def test_your_own_pictures_become_adapters(own_recipe, own_pictures, folder, pictures, tmp_path, caplog):
    kinds = (own_recipe.OwnPicturesArguments, own_recipe.train.SFTArguments, own_recipe.train.ObjectiveArguments)
    flags = {
        "pictures": own_pictures,
        "held_out": 0.25,
        "model_name_or_path": folder,
        "dataset": tmp_path / "rows",
        "output_dir": tmp_path / "adapters",
        "max_steps": 2,
        "save_steps": 2,
        "use_cpu": True,
        "bf16": False,
        "lora_r": 4,
        "per_device_train_batch_size": 2,
        "disable_tqdm": True,
    }
    words = [str(word) for name, value in flags.items() for word in (f"--{name}", value)]
    parser = TrlParser((*kinds, SFTConfig, ModelConfig))
    own_recipe.main(*parser.parse_args_and_config(["--config", str(RECIPES / "own_pictures.yaml"), *words]))
    assert "left out 3 of 7 rows" in caplog.text
    rows = datasets.load_dataset(str(tmp_path / "rows"))
    assert (len(rows["train"]), len(rows["test"])) == (3, 1)
    processor = AutoProcessor.from_pretrained(folder)
    for row in (*rows["train"], *rows["test"]):
        number = int(row["texts"][2].rsplit(" ", 1)[1])
        codes = processor.encode_images([pictures[number], pictures[number + 1]]).tolist()
        assert [row["codes"][1], row["codes"][3]] == codes and row["answer"] == 3
        prompt = processor.for_editing(pictures[number], row["texts"][2])["input_ids"]
        assert processor.decode(prompt[0], skip_special_tokens=True) == row["texts"][0] + row["texts"][2]
    edited = load_adapters(str(tmp_path / "adapters"))
    ids = edited.generate(**processor.for_editing(pictures[0], "make it blue"), generation_mode="image")
    assert processor.post_process_multimodal_output(ids, generation_mode="image")[0].size == (16, 16)


def test_a_folder_that_cannot_be_read(own_recipe, own_pictures, processor):
    table = own_pictures / "metadata.csv"
    table.rename(own_pictures / "table.csv")
    with pytest.raises(ValueError, match="expected metadata.csv or metadata.jsonl in"):
        own_recipe.build_rows(own_pictures, processor)
    (own_pictures / "metadata.jsonl").write_text('{"before": "0.png", "next": "1.png"}\n', encoding="utf-8")
    with pytest.raises(ValueError, match=r"expected the columns \['before', 'instruction', 'after'\].*without"):
        own_recipe.build_rows(own_pictures, processor)
    (own_pictures / "metadata.jsonl").write_text(
        '{"before": "x.png", "after": "1.png", "instruction": "a"}\n', encoding="utf-8"
    )
    with pytest.raises(ValueError, match="got none of 1"):
        own_recipe.build_rows(own_pictures, processor)
