"""
transformers' own common model tests on our classes: `pytest -m common`.

They come from the source distribution of the installed transformers, which the registry sends on the first run and
pytest's cache keeps. It carries the tests that lie in `tests/` itself: those of models and of training, none of
generation and of pipelines.
"""

import importlib.metadata
import subprocess
import sys
import tarfile
import types
import unittest
from importlib import import_module
from pathlib import Path

import pytest
import torch
from conftest import small_config
from transformers.models.auto import modeling_auto

from cm3leon_hf import CM3LeonForCausalLM, CM3LeonModel

pytestmark = pytest.mark.common
CACHE = Path(__file__).parents[1] / ".pytest_cache" / "d"
VERSION = importlib.metadata.version("transformers")
MISSING = {  # what the distribution leaves out, and its tests of models inherit
    "exporters.test_export": "ExportTesterMixin",
    "generation.test_utils": "GenerationTesterMixin",
}


def source_distribution() -> Path:
    """The unpacked source distribution of the installed transformers."""
    folder = CACHE / f"transformers-{VERSION}"
    if folder.exists():
        return folder
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", ":all:"]
    wanted = ["--no-build-isolation", "--dest", str(CACHE), f"transformers=={VERSION}"]  # setuptools comes with torch
    result = subprocess.run([*command, *wanted], capture_output=True, text=True)
    if result.returncode:
        pytest.skip(f"no source distribution of transformers: {result.stderr[-200:]}", allow_module_level=True)
    with tarfile.open(CACHE / f"transformers-{VERSION}.tar.gz") as archive:
        archive.extractall(CACHE, **{"filter": "data"} if hasattr(tarfile, "data_filter") else {})  # not in 3.11.3
    return folder


def import_tests(name: str):
    """A module of transformers' tests."""
    package = "transformers_tests"
    if package not in sys.modules:
        sys.modules[package] = types.ModuleType(package)
        sys.modules[package].__path__ = [str(source_distribution() / "tests")]
        for module, mixin in MISSING.items():
            stand_in = sys.modules[f"{package}.{module}"] = types.ModuleType(module)
            setattr(stand_in, mixin, type(mixin, (), {}))
    try:
        return import_module(f"{package}.{name}")
    except ModuleNotFoundError as error:
        pytest.skip(f"the distribution of transformers {VERSION} lacks a part: {error}", allow_module_level=True)


ModelTesterMixin = import_tests("test_modeling_common").ModelTesterMixin
TrainingTesterMixin = import_tests("test_training_mixin").TrainingTesterMixin
# the tests look up by name which labels a class takes
modeling_auto.MODEL_MAPPING_NAMES["cm3leon"] = "CM3LeonModel"
modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES["cm3leon"] = "CM3LeonForCausalLM"


class Tester:
    """A tiny configuration and inputs for it, as the common tests want them."""

    __test__ = False  # no test class of pytest's
    is_training = True
    batch_size, seq_length = 3, 7
    causal_lm_class, base_model_class = CM3LeonForCausalLM, CM3LeonModel

    def __init__(self):
        config = self.get_config()
        self.hidden_size, self.num_hidden_layers = config.hidden_size, config.num_hidden_layers
        self.num_attention_heads = config.num_attention_heads

    def get_config(self):
        return small_config()

    def prepare_config_and_inputs_for_common(self):
        config = self.get_config()
        shape = (self.batch_size, self.seq_length)
        ids = torch.randint(config.vocabulary.image_id + 1, config.vocab_size, shape)
        return config, {"input_ids": ids, "attention_mask": torch.ones(shape, dtype=torch.long)}


class CommonTest(ModelTesterMixin, TrainingTesterMixin, unittest.TestCase):
    model_tester = None
    all_model_classes = (CM3LeonModel, CM3LeonForCausalLM)

    def setUp(self):
        self.model_tester = Tester()

    def _create_text_training_batch(self, **shape) -> dict[str, torch.Tensor]:
        """The pattern to learn, of text: the control tokens that it begins with are none, and are never generated."""
        batch = super()._create_text_training_batch(**shape)
        return {name: ids + self.model_tester.get_config().vocabulary.image_id for name, ids in batch.items()}

    @unittest.skip("a resize would move image ids and is refused; test_contract.py tests that")
    def test_resize_tokens_embeddings(self):
        pass

    @unittest.skip("as above")
    def test_resize_embeddings_untied(self):
        pass

    @unittest.skip("as above")
    def test_resize_embeddings_untied_no_reinit_on_post_init(self):
        pass

    @unittest.skip("the distribution carries no GenerationTesterMixin; test_contract.py and test_generation.py test it")
    def test_generation_tester_mixin_inheritance(self):
        pass


del ModelTesterMixin, TrainingTesterMixin  # or pytest would collect them as well
