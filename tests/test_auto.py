"""transformers' own front doors: Auto classes, saving and loading, the any-to-any pipeline."""

import subprocess
import sys

import pytest
import torch
import transformers
from conftest import small_model
from packaging.version import Version
from PIL import Image
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    AutoProcessor,
    AutoTokenizer,
    pipeline,
)

from cm3leon_hf import CM3LeonConfig, CM3LeonForCausalLM, CM3LeonModel, CM3LeonProcessor, CM3LeonVQGAN

PROMPT, QUESTION = "a red circle on white", "Describe the given picture."


@pytest.fixture(scope="module")
def pipe(folder):
    return pipeline("any-to-any", model=folder)


@pytest.fixture(scope="module")
def drawn(model, processor):
    """What `generate` draws, greedily and guided as the folder's defaults say."""

    def draw(*prompts: str) -> list[Image.Image]:
        inputs = processor.for_text_to_image(list(prompts))
        ids = model.generate(**inputs, generation_mode="image", guidance_scale=3.0)
        return processor.post_process_multimodal_output(ids, generation_mode="image")

    return draw


@pytest.fixture(scope="module")
def described(model, processor):
    """What `generate` says about a picture."""

    def describe(picture: Image.Image) -> str:
        inputs = processor.for_image_to_text(picture, QUESTION)
        ids = model.generate(**inputs, max_new_tokens=8)[:, inputs["input_ids"].shape[1] :]
        return processor.post_process_multimodal_output(ids)[0]

    return describe


def same(first: Image.Image, second: Image.Image) -> bool:
    return first.tobytes() == second.tobytes()


def test_configs_come_back(folder, model):
    config = AutoConfig.from_pretrained(folder)
    assert type(config) is CM3LeonConfig
    assert config.to_diff_dict() == model.config.to_diff_dict() and config.vocab_size == 632
    assert AutoConfig.for_model("cm3leon_vqgan").grid_size == 32


@pytest.mark.parametrize("auto_class", [AutoModelForCausalLM, AutoModelForImageTextToText, AutoModelForMultimodalLM])
@torch.no_grad()
def test_models_come_back(folder, model, processor, auto_class):
    loaded = auto_class.from_pretrained(folder, device_map="cpu")
    assert type(loaded) is CM3LeonForCausalLM
    inputs = processor.for_text_to_image([PROMPT, "blue"])
    torch.testing.assert_close(loaded(**inputs).logits, model(**inputs).logits, rtol=0, atol=0)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert loaded.generation_config.guidance_scale == 3.0


@torch.no_grad()
def test_parts_come_back(folder, model, processor, vqgan):
    ids = processor.for_text_to_image(PROMPT)["input_ids"]
    bare = AutoModel.from_pretrained(folder)
    assert type(bare) is CM3LeonModel
    torch.testing.assert_close(bare(ids).last_hidden_state, model.model(ids).last_hidden_state)
    assert type(AutoModel.from_pretrained(folder, subfolder="vqgan")) is CM3LeonVQGAN
    assert type(AutoProcessor.from_pretrained(folder)) is CM3LeonProcessor
    assert AutoTokenizer.from_pretrained(folder)(PROMPT)["input_ids"] == processor.tokenizer(PROMPT)["input_ids"]
    assert AutoImageProcessor.from_pretrained(folder).crop_size == processor.image_processor.crop_size
    assert AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).dtype == torch.bfloat16


def test_an_untied_head_comes_back(model, tmp_path):
    untied = small_model(tie_word_embeddings=False)
    untied.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(loaded.lm_head.weight, untied.lm_head.weight)
    assert not torch.equal(loaded.lm_head.weight, loaded.model.embed_tokens.weight)


@pytest.mark.parametrize("broken", ["missing", "no model", "no vqgan"])
def test_broken_folders_are_named(folder, tmp_path, broken):
    if broken == "missing":
        with pytest.raises(OSError, match="nowhere"):
            AutoModelForCausalLM.from_pretrained(str(tmp_path / "nowhere"))
        return
    (tmp_path / "config.json").write_text('{"model_type": "cm3leon"}')
    with pytest.raises(OSError, match="model.safetensors"):
        AutoModelForCausalLM.from_pretrained(tmp_path)
    with pytest.raises((OSError, ValueError)):
        AutoProcessor.from_pretrained(tmp_path)


def test_the_pipeline_draws(pipe, drawn):
    assert same(pipe(PROMPT, generation_mode="image")[0]["generated_image"], drawn(PROMPT)[0])
    named = pipe(text=PROMPT, generation_mode="image")[0]
    assert named["input_text"] == PROMPT and same(named["generated_image"], drawn(PROMPT)[0])


@pytest.mark.parametrize("batch_size", [1, 2])
def test_the_pipeline_draws_batches(pipe, drawn, batch_size):
    outputs = pipe([PROMPT, "blue"], generation_mode="image", batch_size=batch_size)
    for output, picture in zip(outputs, drawn(PROMPT, "blue")):
        assert same(output["generated_image"], picture)


@pytest.mark.skipif(
    Version(transformers.__version__) < Version("5.23"), reason="its pipeline returns one sample for each prompt"
)
def test_the_pipeline_draws_several_samples(pipe):
    options = {"do_sample": True, "num_return_sequences": 3}
    torch.manual_seed(0)
    outputs = pipe([PROMPT, "blue"], generation_mode="image", generate_kwargs=dict(options))
    assert [output["input_text"] for output in outputs] == [PROMPT] * 3 + ["blue"] * 3
    assert len({output["generated_image"].tobytes() for output in outputs}) == 6
    assert len(pipe(PROMPT, generation_mode="image", generate_kwargs=dict(options))) == 3


def test_the_pipeline_draws_behind_retrieved_documents(pipe, model, processor):
    document = {"text": "a blue square", "codes": list(range(processor.vocabulary.image_length))}
    inputs = processor.for_text_to_image([PROMPT], [[document]])
    ids = model.generate(**inputs, generation_mode="image", guidance_scale=3.0)
    (wanted,) = processor.post_process_multimodal_output(ids, generation_mode="image")
    found = pipe(PROMPT, generation_mode="image", retrieved=[[document]])[0]["generated_image"]
    assert same(found, wanted) and not same(found, pipe(PROMPT, generation_mode="image")[0]["generated_image"])
    with pytest.raises(ValueError, match="each of 1 prompts, got 2"):
        pipe(PROMPT, generation_mode="image", retrieved=[[document]] * 2)


def test_the_pipeline_describes(pipe, described, pictures, tmp_path):
    path = tmp_path / "picture.png"
    pictures[0].save(path)
    expected = QUESTION + described(pictures[0])
    for picture in (pictures[0], str(path)):
        assert pipe({"images": picture, "text": QUESTION})[0]["generated_text"] == expected
        assert pipe(images=picture, text=QUESTION)[0]["generated_text"] == expected
    new = pipe(images=pictures[0], text=QUESTION, return_full_text=False)[0]["generated_text"]
    assert new == described(pictures[0])
    both = pipe(text=[QUESTION] * 2, images=pictures[:2])
    assert [output["generated_text"] for output in both] == [QUESTION + described(p) for p in pictures[:2]]
    each = pipe([{"images": picture, "text": QUESTION} for picture in pictures[:2]])
    assert [output[0]["generated_text"] for output in each] == [QUESTION + described(p) for p in pictures[:2]]


def test_the_pipeline_chats(pipe, drawn, described, pictures, tmp_path):
    path = tmp_path / "picture.png"
    pictures[0].save(path)
    for part in ({"image": pictures[0]}, {"path": str(path)}, {"url": str(path)}):
        chat = [{"role": "user", "content": [{"type": "image"} | part, {"type": "text", "text": QUESTION}]}]
        answer = pipe(chat)[0]["generated_text"][-1]
        assert answer == {"role": "assistant", "content": described(pictures[0])}
    assert [outputs[0]["generated_text"][-1] for outputs in pipe([chat, chat])] == [answer, answer]
    for content in (PROMPT, [{"type": "text", "text": PROMPT}]):
        wish = [{"role": "user", "content": content}]
        assert same(pipe(wish, generation_mode="image")[0]["generated_image"], drawn(PROMPT)[0])


def test_the_pipeline_refuses_nothing(pipe):
    with pytest.raises(ValueError, match="not empty"):
        pipe("", generation_mode="image")


def run(script: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)


def test_importing_the_package_imports_no_torch():
    script = "import sys, cm3leon_hf; dir(cm3leon_hf); assert not {'torch', 'transformers', 'PIL'} & set(sys.modules)"
    result = run(script)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize(
    "imports",
    [
        "from transformers import AutoModel; import cm3leon_hf",
        "from transformers import Trainer; import cm3leon_hf",
        "import cm3leon_hf; from transformers import Trainer",
        "import cm3leon_hf; from transformers import GenerationMixin",
        "from cm3leon_hf import CM3LeonForCausalLM",
    ],
)
def test_registration_works_whatever_is_imported_first(imports):
    result = run(
        f"""
{imports}
from transformers import AutoConfig, AutoModel, AutoModelForMultimodalLM, AutoProcessor
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING
from cm3leon_hf import CM3LeonConfig, CM3LeonForCausalLM, CM3LeonModel, CM3LeonProcessor, CM3LeonVQGAN
assert type(AutoConfig.for_model("cm3leon")) is CM3LeonConfig
assert AutoModel._model_mapping[CM3LeonConfig] is CM3LeonModel
assert AutoModel._model_mapping[type(AutoConfig.for_model("cm3leon_vqgan"))] is CM3LeonVQGAN
assert AutoModelForMultimodalLM._model_mapping[CM3LeonConfig] is CM3LeonForCausalLM
assert PROCESSOR_MAPPING[CM3LeonConfig] is CM3LeonProcessor
"""
    )
    assert result.returncode == 0, result.stderr
