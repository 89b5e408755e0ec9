"""Tiny models with ordinary random weights: the paper's zero initialisation would let wrong models pass."""

import importlib.util
import json
from pathlib import Path

import datasets
import open_clip
import pytest
import torch
import train_tokenizer
from PIL import Image, ImageDraw
from pytorch_fid.inception import FID_WEIGHTS_URL, _inception_v3
from safetensors.torch import save_file
from transformers import GenerationConfig

from cm3leon_hf import CM3LeonConfig, CM3LeonForCausalLM, CM3LeonProcessor, CM3LeonVQGAN, CM3LeonVQGANConfig
from cm3leon_hf.evaluation.clip_score import CLIPScorer
from cm3leon_hf.images import default_image_processor
from cm3leon_hf.retrieval.building import undecoded
from cm3leon_hf.retrieval.memory_bank import MemoryBank

REPOSITORY = Path(__file__).parents[1]
COLOURS = ("red", "green", "blue", "yellow")
SHAPES = ("circle", "square")
CAPTIONS = [f"a {colour} {shape} on white" for colour in COLOURS for shape in SHAPES]
TEXT_SIZE, IMAGE_SIZE, GRID_SIZE, RESOLUTION, POSITIONS = 600, 32, 4, 16, 96


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """transformers' common tests are fetched from the registry: they run when asked for."""
    return True if collection_path.name == "test_common.py" and config.option.markexpr != "common" else None


def load_recipe(path: str):
    """A recipe's script as a module; several of them are called train.py."""
    name = "recipe_" + path.removesuffix(".py").replace("/", "_")
    spec = importlib.util.spec_from_file_location(name, REPOSITORY / "recipes" / path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def draw(colour: str, shape: str, size: int = RESOLUTION) -> Image.Image:
    image = Image.new("RGB", (size, size), "white")
    box = (size // 4, size // 4, 3 * size // 4, 3 * size // 4)
    (ImageDraw.Draw(image).ellipse if shape == "circle" else ImageDraw.Draw(image).rectangle)(box, fill=colour)
    return image


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    """Uniform in [-1, 1], as pixels are."""
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def small_config(**changes) -> CM3LeonConfig:
    return CM3LeonConfig(
        **{
            "text_vocab_size": TEXT_SIZE,
            "image_vocab_size": IMAGE_SIZE,
            "image_grid_size": GRID_SIZE,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "max_position_embeddings": POSITIONS,
            "initializer_range": 0.2,
            "position_initializer_range": 0.2,
            "zero_init": "none",
        }
        | changes
    )


def small_model(**changes) -> CM3LeonForCausalLM:
    torch.manual_seed(0)
    return CM3LeonForCausalLM(small_config(**changes)).eval()


def small_vqgan_config(**changes) -> CM3LeonVQGANConfig:
    return CM3LeonVQGANConfig(
        **{
            "resolution": RESOLUTION,
            "base_channels": 8,
            "channel_multiplier": [1, 2, 2],
            "num_res_blocks": 1,
            "attn_resolutions": [GRID_SIZE],
            "latent_channels": 8,
            "embed_dim": 4,
            "num_embeddings": IMAGE_SIZE,
            "norm_num_groups": 4,
        }
        | changes
    )


def small_vqgan(**changes) -> CM3LeonVQGAN:
    torch.manual_seed(0)
    vqgan = CM3LeonVQGAN(small_vqgan_config(**changes)).eval()
    torch.nn.init.normal_(vqgan.quantize.embedding.weight)  # far apart, so that different codes draw differently
    return vqgan


@pytest.fixture(scope="session", autouse=True)
def caches(tmp_path_factory):
    """Keeps data set caches out of the home folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("datasets")))
        yield


@pytest.fixture(scope="session")
def tokenizer():
    return train_tokenizer.train([*CAPTIONS, "Describe the given picture."], TEXT_SIZE)


@pytest.fixture(scope="session")
def vqgan() -> CM3LeonVQGAN:
    return small_vqgan()


@pytest.fixture(scope="session")
def saved_vqgan(vqgan, tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("vqgan")
    vqgan.save_pretrained(folder)
    default_image_processor(vqgan.config).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def model() -> CM3LeonForCausalLM:
    return small_model()


@pytest.fixture(scope="session")
def vocabulary(model):
    return model.config.vocabulary


@pytest.fixture(scope="session")
def processor(tokenizer, vqgan) -> CM3LeonProcessor:
    return CM3LeonProcessor(
        default_image_processor(vqgan.config),
        tokenizer,
        vqgan,
        text_vocab_size=TEXT_SIZE,
        image_vocab_size=IMAGE_SIZE,
        image_grid_size=GRID_SIZE,
    )


@pytest.fixture(scope="session")
def pictures() -> list[Image.Image]:
    return [draw(colour, shape, size=24) for colour in COLOURS for shape in SHAPES]


@pytest.fixture(scope="session")
def folder(model, processor, tmp_path_factory) -> str:
    """A saved model with its processor, and guidance among its generation defaults."""
    path = tmp_path_factory.mktemp("model")
    model.save_pretrained(path)
    processor.save_pretrained(path)
    defaults = GenerationConfig.from_model_config(model.config)
    defaults.update(guidance_scale=3.0, max_new_tokens=8)
    defaults.save_pretrained(path)
    return str(path)


@pytest.fixture(scope="session")
def small_clip(tmp_path_factory) -> str:
    """A CLIP of a few random weights, in a folder as open_clip writes and reads them."""
    folder = tmp_path_factory.mktemp("clip")
    config = {
        "embed_dim": 16,
        "vision_cfg": {"image_size": 16, "layers": 1, "width": 32, "head_width": 16, "patch_size": 8},
        "text_cfg": {"context_length": 20, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
    }
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": {}}))
    torch.manual_seed(0)
    weights = open_clip.CLIP(**config).state_dict()
    save_file({name: weight.contiguous() for name, weight in weights.items()}, folder / "open_clip_model.safetensors")
    return f"local-dir:{folder}"


@pytest.fixture(scope="module")
def inception_weights(tmp_path_factory):
    """Random weights where pytorch-fid looks for its own."""
    home = tmp_path_factory.mktemp("torch")
    (home / "hub" / "checkpoints").mkdir(parents=True)
    torch.manual_seed(0)
    model = _inception_v3(num_classes=1008, aux_logits=False, weights=None)
    torch.save(model.state_dict(), home / "hub" / "checkpoints" / FID_WEIGHTS_URL.rsplit("/", 1)[1])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCH_HOME", str(home))
        yield


@pytest.fixture(scope="session")
def small_bank(small_clip, processor, tmp_path_factory) -> str:
    """A memory bank of the drawn pictures under the small CLIP, whose scores are all alike."""
    pictures = [draw(colour, shape, 20) for colour in COLOURS for shape in SHAPES]
    codes = processor.encode_images(pictures).tolist()
    rows = {"id": [f"{row}" for row in range(len(codes))], "text": CAPTIONS, "image": pictures, "codes": codes}
    rows = undecoded(datasets.Dataset.from_dict(rows), "image")
    folder = tmp_path_factory.mktemp("bank") / "bank"
    MemoryBank.build(rows, CLIPScorer(small_clip, None, device="cpu"), folder, max_score=2.0)
    return str(folder)
