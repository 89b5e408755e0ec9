"""A decoder that starts from OPT's weights computes OPT's logits for the same text, and has image ids besides."""

import json
import shutil

import pytest
import torch
from conftest import CAPTIONS, IMAGE_SIZE, small_config, small_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoProcessor,
    AutoTokenizer,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedTokenizerFast,
)

from cm3leon_hf import CM3LeonForCausalLM, optimize_for_cpu
from cm3leon_hf.conversion.convert import convert
from cm3leon_hf.vocabulary import Vocabulary

TEXTS = ["a red circle on white", "Was für ein blue square?\n\n <b> 🙂", "a yellow"]
LENGTH = 1040  # an image and a little text
SHAPE = {"hidden_size": 32, "ffn_dim": 64, "num_hidden_layers": 2, "num_attention_heads": 4}


def opts_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE whose ids begin as OPT's do, and which puts `</s>` before each text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<s>", "<pad>", "</s>", "<unk>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        CAPTIONS, trainers.BpeTrainer(vocab_size=330, special_tokens=special, initial_alphabet=alphabet)
    )
    tokenizer.post_processor = processors.TemplateProcessing(single="</s> $A", special_tokens=[("</s>", 2)])
    names = {"bos_token": "</s>", "eos_token": "</s>", "unk_token": "</s>", "pad_token": "<pad>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)


def random_opt(vocab_size: int, **changes) -> OPTForCausalLM:
    torch.manual_seed(0)
    config = OPTConfig(vocab_size=vocab_size, max_position_embeddings=LENGTH, dropout=0.0, **SHAPE | changes)
    opt = OPTForCausalLM(config).eval()
    with torch.no_grad():
        for weight in opt.parameters():
            weight.add_(0.2 * torch.randn_like(weight))
    return opt


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """OPT's folder: more rows than tokens, as OPT has."""
    folder = tmp_path_factory.mktemp("opt")
    tokenizer = opts_tokenizer()
    tokenizer.save_pretrained(folder)
    random_opt(len(tokenizer) + 7).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def converted(source, tmp_path_factory):
    folder = tmp_path_factory.mktemp("converted") / "out"
    report = convert(source, folder)
    return folder, report


def our_ids(tokenizer, source_tokenizer) -> torch.Tensor:
    """For each of OPT's ids with a token, ours."""
    names = [source_tokenizer.convert_ids_to_tokens(i) for i in range(len(source_tokenizer))]
    return torch.tensor(tokenizer.convert_tokens_to_ids(["<eos>" if name == "</s>" else name for name in names]))


def both_logits(ours, opt, tokenizer, source_tokenizer, text: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Ours and OPT's for each token of the text, in the order of OPT's ids."""
    theirs = source_tokenizer(text, return_tensors="pt")["input_ids"]
    ids = torch.tensor([[1, *tokenizer(text)["input_ids"]]])
    order = our_ids(tokenizer, source_tokenizer)
    assert torch.equal(order[theirs], ids)
    return ours(ids).logits[..., order], opt(theirs).logits[..., : len(order)]


@torch.no_grad()
@pytest.mark.parametrize("text", TEXTS)
def test_text_has_opts_logits(text, source, converted):
    folder, _ = converted
    ours, opt = (AutoModelForCausalLM.from_pretrained(path) for path in (folder, source))
    tokenizers = [AutoTokenizer.from_pretrained(path) for path in (folder, source)]
    assert type(ours) is CM3LeonForCausalLM
    torch.testing.assert_close(*both_logits(ours, opt, *tokenizers, text), rtol=1e-4, atol=1e-4)
    optimized = optimize_for_cpu(AutoModelForCausalLM.from_pretrained(folder))
    torch.testing.assert_close(*both_logits(optimized, opt, *tokenizers, text), rtol=1e-4, atol=1e-4)


def test_ids_are_laid_out_as_the_vocabulary_says(source, converted):
    folder, report = converted
    config = CM3LeonForCausalLM.config_class.from_pretrained(folder)
    tokenizer, old = AutoTokenizer.from_pretrained(folder), AutoTokenizer.from_pretrained(source)
    special = Vocabulary().special_tokens
    assert tokenizer.convert_ids_to_tokens(list(range(len(special)))) == special
    assert len(tokenizer) == len(special) + len(old) - 2  # <pad> and </s> are among them
    assert 0 <= config.text_vocab_size - len(tokenizer) < 64 and config.text_vocab_size % 64 == 0
    assert (config.image_vocab_size, config.image_grid_size) == (8192, 32)
    assert tokenizer.decode(tokenizer(TEXTS[1])["input_ids"]) == TEXTS[1]
    assert tokenizer("a<break>b")["input_ids"][1] == 2
    assert (tokenizer.pad_token, tokenizer.eos_token, tokenizer.model_max_length) == ("<pad>", "<eos>", LENGTH)
    assert report.unused == {} and report.missing == [] and report.read == 2 + 2 + 2 * 16


@torch.no_grad()
def test_new_rows_look_like_opts(source, converted):
    rows = AutoModelForCausalLM.from_pretrained(converted[0]).model.embed_tokens.weight
    opts = AutoModelForCausalLM.from_pretrained(source).model.decoder.embed_tokens.weight
    images = rows[-8192:]
    torch.testing.assert_close(images.mean(0), opts.mean(0), rtol=0, atol=0.05)
    torch.testing.assert_close(images.std(0), opts.std(0), rtol=0.05, atol=0)
    assert len(images.unique(dim=0)) == 8192


def test_a_decoder_without_biases_and_norm_parameters_stays_one(tmp_path):
    """What ours would be as OPT comes back as it was, in its own type."""
    ours = small_model(text_vocab_size=320)
    tokenizer = opts_tokenizer()
    opt = random_opt(len(tokenizer), enable_bias=False, layer_norm_elementwise_affine=False)
    for name, weight in ours.model.state_dict().items():
        if "layers" in name:
            opt.model.decoder.get_parameter(name).data = weight
    opt.save_pretrained(tmp_path / "opt")
    tokenizer.save_pretrained(tmp_path / "opt")
    convert(tmp_path / "opt", tmp_path / "out", dtype="bfloat16")
    back = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert (back.config.use_bias, back.config.layer_norm_affine, back.dtype) == (False, False, torch.bfloat16)
    expected = {name: weight for name, weight in ours.model.state_dict().items() if "layers" in name}
    assert expected.keys() == {name for name in back.model.state_dict() if "layers" in name}
    for name, weight in expected.items():
        assert torch.equal(back.model.get_parameter(name), weight.bfloat16())


@torch.no_grad()
def test_an_untied_head_keeps_its_own_rows(tmp_path):
    tokenizer = opts_tokenizer()
    opt = random_opt(len(tokenizer), tie_word_embeddings=False, layer_norm_elementwise_affine=False)
    opt.save_pretrained(tmp_path / "opt")
    tokenizer.save_pretrained(tmp_path / "opt")
    convert(tmp_path / "opt", tmp_path / "out")
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert ours.config.use_bias and not ours.config.layer_norm_affine
    logits = both_logits(ours, opt, AutoTokenizer.from_pretrained(tmp_path / "out"), tokenizer, TEXTS[0])
    torch.testing.assert_close(*logits, rtol=1e-4, atol=1e-4)


def test_with_a_vqgan_it_has_a_processor_and_draws(source, saved_vqgan, tmp_path):
    convert(source, tmp_path / "out", vqgan=saved_vqgan)
    model, processor = (auto.from_pretrained(tmp_path / "out") for auto in (AutoModelForCausalLM, AutoProcessor))
    assert model.config.image_vocab_size == IMAGE_SIZE
    ids = model.generate(**processor.for_text_to_image("a red circle"), generation_mode="image", guidance_scale=2.0)
    (picture,) = processor.post_process_multimodal_output(ids, generation_mode="image")
    assert picture.size == (16, 16)


def test_biases_and_gains_start_as_zeros_and_ones():
    weights = small_model(use_bias=True, layer_norm_affine=True).state_dict()
    biases = {name for name in weights if name.endswith(".bias")}
    assert len(biases) == 2 * 6 + 1 and not any(weights[name].any() for name in biases)
    assert (weights["model.final_layer_norm.weight"] == 1).all()
    assert weights["model.layers.0.fc1.weight"].any()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"do_layer_norm_before": False}, "do_layer_norm_before=False, as OPT-350M"),
        ({"word_embed_proj_dim": 16}, "word_embed_proj_dim=16, as OPT-350M"),
        ({"_remove_final_layer_norm": True}, "_remove_final_layer_norm=True"),
        ({"model_type": "bart"}, "config.json of OPT, got one of 'bart'"),
        ({"ffn_dim": 60}, r"layers.0.fc1.weight is \(64, 32\) instead of \(60, 32\)"),
        ({"max_position_embeddings": LENGTH - 1}, "embed_positions.weight is"),
        ({"max_position_embeddings": 1024}, "fewer than 1024 tokens to an image, got 1024"),
        ({"num_hidden_layers": 3}, "16 are missing, such as model.decoder.layers.2"),
    ],
)
def test_variants_that_the_decoder_cannot_express_are_refused(changes, message, source, tmp_path):
    folder = tmp_path / "opt"
    shutil.copytree(source, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))
    with pytest.raises(ValueError, match=message):
        convert(folder, tmp_path / "out")


@pytest.mark.parametrize(
    ("names", "message"),
    [(["config.json"], "expected OPT's config.json"), (["tokenizer.json"], "expected OPT's tokenizer")],
)
def test_missing_files_are_named(names, message, source, tmp_path):
    shutil.copytree(source, tmp_path / "opt", ignore=shutil.ignore_patterns(*names))
    with pytest.raises(ValueError, match=message):
        convert(tmp_path / "opt", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_tokenizer_of_another_model_is_refused(source, tmp_path):
    shutil.copytree(source, tmp_path / "opt")
    tokenizer = AutoTokenizer.from_pretrained(source)
    tokenizer.add_tokens([f"token{i}" for i in range(20)])
    tokenizer.save_pretrained(tmp_path / "opt")
    with pytest.raises(ValueError, match="ids below 302, got 314"):
        convert(tmp_path / "opt", tmp_path / "out")


def test_options_of_vqgans_are_refused(source, tmp_path):
    with pytest.raises(ValueError, match="no resolution for opt"):
        convert(source, tmp_path / "out", resolution=16)


def test_a_configuration_written_before_biases_has_none():
    values = small_config().to_dict()
    del values["use_bias"], values["layer_norm_affine"]
    config = small_config().from_dict(values)
    assert not config.use_bias and not config.layer_norm_affine
