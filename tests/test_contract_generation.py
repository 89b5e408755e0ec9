"""
generate() as transformers' own GenerationTesterMixin checks it, which its source distribution leaves out.

transformers' OPT with the same weights is the reference. Left padding, the static cache and going on from a cache are
in test_generation.py, assistants in test_contract.py.
"""

import pytest
import torch
from conftest import small_model
from test_modeling import as_opt
from transformers import DynamicCache, LogitsProcessorList, QuantizedCache, cache_utils

from cm3leon_hf import ModalityLogitsProcessor

SEARCHES = {
    "greedy": {},
    "sampling": {"do_sample": True, "top_k": 10, "top_p": 0.7, "temperature": 0.7, "num_return_sequences": 2},
    "beams": {"num_beams": 2, "length_penalty": 2.0, "num_return_sequences": 2},
    "sampled beams": {"num_beams": 2, "do_sample": True, "top_k": 10, "early_stopping": True},
}
GUIDED_IMAGE = {"generation_mode": "image", "guidance_scale": 3.0}
GROUPS = {"q_group_size": 8, "residual_length": 4}  # small enough for what is generated here
QUANTISED = {
    "fp8": {"backend": "fp8"},
    "hqq": {"backend": "hqq", "nbits": 8, "axis_key": 1, "axis_value": 1} | GROUPS,
    "quanto": {"backend": "quanto", "nbits": 4} | GROUPS,
}
PROCESSED = {"bad_words_ids": [[400]], "repetition_penalty": 1.2, "min_new_tokens": 4, "no_repeat_ngram_size": 3}


@pytest.fixture(scope="module")
def ids(vocabulary) -> torch.Tensor:
    return torch.randint(vocabulary.image_id + 1, 600, (2, 9), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("cache", [{}, {"use_cache": False}], ids=["cached", "uncached"])
@pytest.mark.parametrize("search", SEARCHES)
def test_text_is_what_opt_writes(model, ids, search, cache):
    arguments = SEARCHES[search] | PROCESSED | cache | {"max_new_tokens": 8}
    arguments |= {"return_dict_in_generate": True, "output_scores": True}
    opt, modality = as_opt(model), LogitsProcessorList([ModalityLogitsProcessor(model.config.vocabulary, "text")])
    torch.manual_seed(0)
    ours = model.generate(ids, **arguments)
    torch.manual_seed(0)
    theirs = opt.generate(ids, logits_processor=modality, **arguments)
    assert torch.equal(ours.sequences, theirs.sequences)
    assert type(ours) is type(theirs) and len(ours.scores) == len(theirs.scores)
    for own, other in zip(ours.scores, theirs.scores):
        torch.testing.assert_close(own, other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("cached", [True, False], ids=["cached", "uncached"])
@pytest.mark.parametrize(
    "arguments, rows",
    [
        ({"max_new_tokens": 3}, 2),
        ({"max_new_tokens": 3, "do_sample": True, "num_return_sequences": 2}, 4),
        ({"max_new_tokens": 3, "num_beams": 2}, 4),
        (GUIDED_IMAGE, 4),
    ],
    ids=["greedy", "sampling", "beams", "guided image"],
)
def test_what_is_watched_has_the_stock_shapes(ids, arguments, rows, cached):
    model = small_model()
    model.set_attn_implementation("eager")
    watch = dict.fromkeys(("output_attentions", "output_hidden_states", "return_dict_in_generate"), True)
    output = model.generate(ids, min_new_tokens=3, use_cache=cached, **arguments, **watch)
    length, config = output.sequences.shape[1], model.config
    prompt = length - len(output.attentions)
    assert prompt == (10 if "generation_mode" in arguments else 9)  # an image's prompt gets its <break>
    for step, (weights, states) in enumerate(zip(output.attentions, output.hidden_states)):
        seen, read = prompt + step, 1 if cached and step else prompt + step
        assert {weight.shape for weight in weights} == {(rows, config.num_attention_heads, read, seen)}
        assert {state.shape for state in states} == {(rows, read, config.hidden_size)}
        assert (len(weights), len(states)) == (config.num_hidden_layers, config.num_hidden_layers + 1)
    if not cached:
        assert output.cache is None
        return
    assert type(output.cache) is DynamicCache
    held = {tensor.shape for layer in output.cache.layers for tensor in (layer.keys, layer.values)}
    assert held == {(rows, config.num_attention_heads, length - 1, config.hidden_size // config.num_attention_heads)}


@pytest.mark.parametrize("mode", [{"max_new_tokens": 12}, GUIDED_IMAGE], ids=["text", "image"])
def test_attention_backends_generate_the_same(model, ids, mode):
    eager = small_model()
    eager.set_attn_implementation("eager")
    assert model.config._attn_implementation == "sdpa"
    assert torch.equal(eager.generate(ids, **mode), model.generate(ids, **mode))


def test_a_given_cache_is_filled(model, ids):
    cache = DynamicCache(config=model.config)
    drawn = model.generate(ids, **GUIDED_IMAGE, cache=cache)
    assert cache.get_seq_length() == drawn.shape[1] - 1 and cache.layers[0].keys.shape[0] == 4
    assert torch.equal(drawn, model.generate(ids, **GUIDED_IMAGE))


def quantised(backend: str) -> dict:
    """The arguments of generate() for a quantised cache, or a skip where its backend is missing."""
    if backend == "fp8" and not hasattr(cache_utils, "Fp8QuantizedLayer"):
        pytest.skip("this version of transformers has no cache in fp8")
    if backend == "hqq":
        pytest.importorskip("hqq")
    if backend == "quanto":
        pytest.importorskip("optimum.quanto", reason="optimum-quanto is no extra: it compiles C++ when first used")
    return {"cache_implementation": "quantized", "cache_config": dict(QUANTISED[backend])}


@pytest.mark.parametrize("backend", QUANTISED)
def test_a_quantised_cache_writes_what_opt_writes_with_it(model, ids, backend):
    arguments = quantised(backend) | {"max_new_tokens": 12, "return_dict_in_generate": True}
    modality = LogitsProcessorList([ModalityLogitsProcessor(model.config.vocabulary, "text")])
    ours, theirs = model.generate(ids, **arguments), as_opt(model).generate(ids, **arguments, logits_processor=modality)
    assert type(ours.cache) is QuantizedCache
    assert torch.equal(ours.sequences, theirs.sequences)


@pytest.mark.parametrize("backend", QUANTISED)
def test_a_quantised_cache_draws_with_guidance(model, ids, vocabulary, backend):
    watch = {"return_dict_in_generate": True, "output_scores": True}
    drawn = model.generate(ids, **GUIDED_IMAGE, **quantised(backend), **watch)
    exact = model.generate(ids, **GUIDED_IMAGE, **watch)
    assert type(drawn.cache) is QuantizedCache
    assert vocabulary.is_image(drawn.sequences[:, -16:]).all() and drawn.cache.get_seq_length() == 25
    assert torch.equal(drawn.scores[0], exact.scores[0])  # nothing is read from the cache yet
    images = vocabulary.image_ids
    error = (drawn.scores[1] - exact.scores[1])[:, images].std() / exact.scores[1][:, images].std()
    assert 0 < error < 0.2


@pytest.mark.skipif(not torch.cuda.is_available(), reason="transformers moves an offloaded cache over CUDA's streams")
@pytest.mark.parametrize("mode", [{"max_new_tokens": 12}, GUIDED_IMAGE], ids=["text", "image"])
@pytest.mark.parametrize("implementation", ["offloaded", "offloaded_static"])
def test_an_offloaded_cache_generates_the_same(ids, implementation, mode):
    model = small_model().to("cuda")
    offloaded = model.generate(ids, **mode, cache_implementation=implementation, disable_compile=True)
    assert torch.equal(offloaded, model.generate(ids, **mode))


@pytest.mark.parametrize("given", ["embeddings alone", "ids and embeddings"])
def test_embeddings_in_place_of_ids_are_refused(model, ids, given):
    inputs = {"inputs_embeds": model.get_input_embeddings()(ids)}
    with pytest.raises(ValueError, match="expected ids, got inputs_embeds"):
        model.generate(**inputs if given == "embeddings alone" else inputs | {"input_ids": ids}, max_new_tokens=2)


@pytest.mark.parametrize(
    "search",
    [
        {"num_beams": 2},
        {"num_beams": 2, "do_sample": True},
        {"penalty_alpha": 0.6, "top_k": 4},
        {"num_beams": 2, "num_beam_groups": 2, "diversity_penalty": 1.0},
        {"force_words_ids": [[400]], "num_beams": 2},
        {"dola_layers": "low"},
    ],
    ids=["beams", "sampled beams", "contrastive search", "beam groups", "constrained beams", "DoLa"],
)
def test_searches_of_several_rows_do_not_go_with_guidance(model, ids, search):
    with pytest.raises(ValueError, match="greedy search or sampling with guidance"):
        model.generate(ids, **GUIDED_IMAGE, **search)
