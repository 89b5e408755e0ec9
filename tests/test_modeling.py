import copy

import pytest
import torch
import torch.nn.functional as F
from conftest import POSITIONS, small_config, small_model
from transformers import OPTConfig, OPTForCausalLM, StaticCache

from cm3leon_hf import CM3LeonConfig, CM3LeonForCausalLM


@pytest.fixture
def ids(vocabulary) -> torch.Tensor:
    return torch.randint(6, vocabulary.size, (2, 12), generator=torch.Generator().manual_seed(1))


def as_opt(model: CM3LeonForCausalLM) -> OPTForCausalLM:
    """transformers' own OPT with the same weights."""
    config = model.config
    opt = OPTForCausalLM(
        OPTConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            word_embed_proj_dim=config.hidden_size,
            ffn_dim=config.intermediate_size,
            num_hidden_layers=config.num_hidden_layers,
            num_attention_heads=config.num_attention_heads,
            max_position_embeddings=config.max_position_embeddings,
            activation_function=config.hidden_act,
            enable_bias=False,
            layer_norm_elementwise_affine=False,
            dropout=0.0,
            pad_token_id=config.pad_token_id,
            bos_token_id=config.bos_token_id,
            eos_token_id=config.eos_token_id,
        )
    )
    weights = {name.replace("model.", "model.decoder."): value for name, value in model.state_dict().items()}
    positions = "model.decoder.embed_positions.weight"
    weights[positions] = F.pad(weights[positions], (0, 0, 2, 0))  # OPT counts positions from 2
    opt.load_state_dict(weights)  # strict: every weight has its counterpart
    return opt.eval()


@torch.no_grad()
def test_it_is_opt_without_biases_and_norm_parameters(model, ids):
    opt = as_opt(model)
    torch.testing.assert_close(model(ids).logits, opt(ids).logits)
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    ours, theirs = (m(ids, attention_mask=mask).logits[mask.bool()] for m in (model, opt))
    torch.testing.assert_close(ours, theirs)


@torch.no_grad()
@pytest.mark.parametrize("static", [False, True])
def test_cached_token_by_token_equals_uncached(model, ids, static):
    expected = model(ids).logits
    cache = StaticCache(config=model.config, max_cache_len=ids.shape[1]) if static else None
    steps = []
    for token in ids.split(1, dim=1):
        output = model(token, cache=cache, use_cache=True)
        cache = output.cache
        steps.append(output.logits)
    torch.testing.assert_close(torch.cat(steps, dim=1), expected)


@torch.no_grad()
def test_cached_with_padding_counts_positions_from_the_mask(model, ids):
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    expected = model(ids, attention_mask=mask).logits[:, -4:]
    prefix = model(ids[:, :-4], attention_mask=mask[:, :-4], use_cache=True)
    rest = model(ids[:, -4:], attention_mask=mask, cache=prefix.cache)
    torch.testing.assert_close(rest.logits, expected)


@torch.no_grad()
def test_padding_on_the_left_changes_nothing(model, ids, vocabulary):
    alone = model(ids[:1, :7]).logits
    padded = ids.clone()
    padded[0] = torch.cat([torch.full((5,), vocabulary.pad_id), ids[0, :7]])
    mask = (padded != vocabulary.pad_id).long()
    batch = model(padded, attention_mask=mask).logits
    torch.testing.assert_close(batch[:1, 5:], alone)
    torch.testing.assert_close(batch[1:], model(ids[1:]).logits)


@torch.no_grad()
def test_positions_matter_and_can_be_given(model, ids):
    positions = torch.arange(12).repeat(2, 1)
    torch.testing.assert_close(model(ids, position_ids=positions).logits, model(ids).logits)
    assert not torch.allclose(model(ids, position_ids=positions + 3).logits, model(ids).logits, atol=1e-2)


@torch.no_grad()
def test_no_token_sees_a_later_one(model, ids):
    changed = ids.clone()
    changed[:, 8] = ids[:, 8] - 1
    before, after = model(ids).logits, model(changed).logits
    torch.testing.assert_close(before[:, :8], after[:, :8])
    assert not torch.allclose(before[:, 8:], after[:, 8:], atol=1e-2)


@torch.no_grad()
def test_eager_attention_equals_sdpa(model, ids):
    eager = small_model()
    eager.load_state_dict(model.state_dict())
    eager.set_attn_implementation("eager")
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    for arguments in ({}, {"attention_mask": mask}):
        kept = arguments.get("attention_mask", torch.ones_like(ids)).bool()
        torch.testing.assert_close(eager(ids, **arguments).logits[kept], model(ids, **arguments).logits[kept])
    output = eager(ids, output_attentions=True, output_hidden_states=True)
    assert len(output.attentions) == 2 and len(output.hidden_states) == 3
    torch.testing.assert_close(output.attentions[0].sum(-1), torch.ones(2, 4, 12))


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:`past_key_values` is deprecated")
def test_a_cache_is_taken_by_its_old_name_too(model, ids):
    for forward in (model, model.model):
        begun = forward(ids[:, :-1], use_cache=True)
        old = forward(ids[:, -1:], past_key_values=copy.deepcopy(begun.cache))[0]
        torch.testing.assert_close(old, forward(ids[:, -1:], cache=begun.cache)[0])
        assert not torch.allclose(old, forward(ids[:, -1:])[0])


@torch.no_grad()
def test_inputs_embeds_and_logits_to_keep(model, ids):
    expected = model(ids).logits
    torch.testing.assert_close(model(inputs_embeds=model.model.embed_tokens(ids)).logits, expected)
    torch.testing.assert_close(model(ids, logits_to_keep=3).logits, expected[:, -3:])
    torch.testing.assert_close(model(ids, logits_to_keep=torch.tensor([2, 5])).logits, expected[:, [2, 5]])


def test_the_loss_is_next_token_cross_entropy(model, ids):
    labels = ids.clone()
    labels[0, 4:7] = -100
    output = model(ids, labels=labels)
    wanted = [(row, i) for row in range(2) for i in range(11) if labels[row, i + 1] != -100]
    by_hand = [-output.logits[row, i].log_softmax(-1)[labels[row, i + 1]] for row, i in wanted]
    assert len(by_hand) == 19
    torch.testing.assert_close(output.loss, torch.stack(by_hand).mean())
    torch.testing.assert_close(model(ids, labels=labels, num_items_in_batch=38).loss, output.loss / 2)


def gradients(model: CM3LeonForCausalLM, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    model(ids, labels=ids).loss.backward()
    return {name: weight.grad.clone() for name, weight in model.named_parameters()}


def test_gradient_checkpointing_gives_the_same_gradients(ids):
    model = small_model().train()
    expected = gradients(model, ids)
    model.gradient_checkpointing_enable()
    calls = []
    model.model.layers[0].fc1.register_forward_hook(lambda *_: calls.append(1))
    checkpointed = gradients(model, ids)
    assert len(calls) == 2  # once forward, once again for the gradients
    assert expected.keys() == checkpointed.keys()
    for name, value in expected.items():
        assert value.abs().sum() > 0
        torch.testing.assert_close(checkpointed[name], value)


@torch.no_grad()
def test_it_compiles_and_exports_whole(model, ids):
    expected = model(ids, use_cache=False).logits
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(ids, use_cache=False).logits, expected)
    exported = torch.export.export(model, (ids,), {"use_cache": False}, strict=False)
    torch.testing.assert_close(exported.module()(ids, use_cache=False).logits, expected)


@pytest.mark.parametrize(
    "shape, parameters",
    [
        ({}, 372_244_480),
        ({"hidden_size": 1536, "intermediate_size": 6144}, 784_859_136),
        (
            {"hidden_size": 4096, "intermediate_size": 16384, "num_hidden_layers": 32, "num_attention_heads": 32},
            6_723_469_312,
        ),
    ],
    ids=["350M", "760M", "7B"],
)
def test_the_papers_sizes(shape, parameters):
    with torch.device("meta"):
        model = CM3LeonForCausalLM(CM3LeonConfig(**shape))
    assert sum(weight.numel() for weight in model.parameters()) == parameters
    assert model.lm_head.weight is model.model.embed_tokens.weight


def papers_initialisation(**changes) -> dict[str, torch.Tensor]:
    defaults = {"initializer_range": 0.006, "position_initializer_range": 0.0002, "zero_init": "residual"}
    return small_model(**{"hidden_size": 128, "intermediate_size": 512} | defaults | changes).state_dict()


def test_the_papers_initialisation():
    weights = papers_initialisation()
    for name, weight in weights.items():
        if name.endswith(("out_proj.weight", "fc2.weight")):
            assert not weight.any()
            continue
        std = 0.0002 if "embed_positions" in name else 0.006
        # a normal cut at 3 std has 0.9866 of its standard deviation
        assert weight.std() == pytest.approx(0.9866 * std, rel=0.03), name
        assert weight.mean().abs() < 0.05 * std, name
        assert 2.5 * std < weight.abs().max() <= 3 * std, name
    assert not any("bias" in name or "norm" in name for name in weights)


def test_zero_initialisation_of_the_untied_head():
    weights = papers_initialisation(zero_init="lm_head", tie_word_embeddings=False)
    assert not weights["lm_head.weight"].any()
    assert all(weight.any() for name, weight in weights.items() if name != "lm_head.weight")


def test_sinusoidal_positions():
    weights = papers_initialisation(position_init="sinusoidal", initializer_range=0.02)["model.embed_positions.weight"]
    assert weights.shape == (POSITIONS, 128)
    assert weights.square().mean().sqrt() == pytest.approx(0.02, rel=0.01)
    products = weights @ weights.T  # of two positions, only the distance counts
    for distance in (0, 1, 7):
        torch.testing.assert_close(products.diagonal(distance), products[0, distance].expand(POSITIONS - distance))
    assert products[0, 0] > products[0, 1] > products[0, 7]


@pytest.mark.parametrize(
    "changes, remedy",
    [
        ({"num_attention_heads": 5}, "divisor"),
        ({"position_init": "x"}, "position_init"),
        ({"zero_init": "lm_head"}, "untied"),
        ({"zero_init": "x"}, "zero_init"),
    ],
)
def test_configurations_that_make_no_sense_are_refused(changes, remedy):
    with pytest.raises(ValueError, match=remedy):
        small_config(**changes)


def test_ids_and_embeddings_exclude_each_other(model, ids):
    with pytest.raises(ValueError, match="exactly one"):
        model()
    with pytest.raises(ValueError, match="exactly one"):
        model(ids, inputs_embeds=model.model.embed_tokens(ids))


def test_more_tokens_than_positions_are_refused(model):
    with pytest.raises(ValueError, match=f"at most {POSITIONS} tokens"):
        model(torch.ones(1, POSITIONS + 1, dtype=torch.long))
