"""The cache with room, against transformers' dynamic one."""

import copy

import pytest
import torch
from conftest import small_config, small_model
from transformers import DynamicCache, StaticCache

from cm3leon_hf.generation_cache import RoomyLayer, make_room, whole_rooms
from cm3leon_hf.modeling_cm3leon import eager_attention_forward

BATCH, HEADS, DIM, CAPACITY = 2, 3, 4, 8


@pytest.fixture
def pair():
    config = small_config(num_hidden_layers=1)
    return DynamicCache(config=config), make_room(DynamicCache(config=config), CAPACITY)


def states(length: int, batch: int = BATCH) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(batch, HEADS, length, DIM), torch.randn(batch, HEADS, length, DIM)


def add(pair, length: int, batch: int = BATCH) -> None:
    new = states(length, batch)
    for one, other in zip(*(cache.update(*new, 0) for cache in pair)):
        assert torch.equal(one, other)
    assert pair[0].get_seq_length() == pair[1].get_seq_length()
    assert pair[0].get_mask_sizes(1, 0) == pair[1].get_mask_sizes(1, 0)


CHANGES = {
    "crop": lambda cache: cache.crop(-2),
    "crop nothing": lambda cache: cache.crop(0),
    "reorder": lambda cache: cache.reorder_cache(torch.tensor([1, 1])),
    "select": lambda cache: cache.batch_select_indices(torch.tensor([1, 0])),
    "reset": lambda cache: cache.reset(),
}


@torch.no_grad()
@pytest.mark.parametrize("change", CHANGES)
def test_it_holds_what_the_dynamic_cache_holds(pair, change):
    add(pair, 5)
    add(pair, 1)
    for cache in pair:
        CHANGES[change](cache)
    add(pair, 1)
    add(pair, 1)
    add(pair, CAPACITY)  # more than there is room for
    add(pair, 1)


@torch.no_grad()
def test_rows_may_be_repeated(pair):
    add(pair, 3)
    for cache in pair:
        cache.batch_repeat_interleave(2)
    add(pair, 1, batch=2 * BATCH)


@torch.no_grad()
def test_steps_write_in_place_and_crops_make_room_again(pair):
    _, roomy = pair
    roomy.update(*states(4), 0)
    place = roomy.layers[0].keys.data_ptr()
    for _ in range(3):
        roomy.update(*states(1), 0)
    roomy.crop(-3)
    roomy.update(*states(2), 0)
    assert roomy.layers[0].keys.data_ptr() == place


@torch.no_grad()
def test_copies_share_nothing(pair):
    add(pair, 4)
    copies = copy.deepcopy(pair)
    before = pair[1].layers[0].keys.clone()
    add(copies, 1)
    assert torch.equal(pair[1].layers[0].keys, before)
    add(pair, 1)
    add(copies, 1)


def test_gradients_are_those_of_the_dynamic_cache(pair):
    """A step that is differentiated through does not overwrite what the one before has saved."""
    gradients = []
    for cache in pair:
        torch.manual_seed(0)
        first, second = (torch.randn(BATCH, HEADS, 1, DIM, requires_grad=True) for _ in range(2))
        total = sum((cache.update(new, new, 0)[0] ** 2).sum() for new in (first, second))
        total.backward()
        gradients.append((first.grad, second.grad))
    for one, other in zip(*gradients):
        torch.testing.assert_close(one, other)


@torch.no_grad()
@pytest.mark.parametrize(
    "mask", [None, torch.tensor([True, False, True, True, True]), torch.tensor([0, -9.0, 0, 0, 0])]
)
def test_room_is_not_attended_to(pair, mask):
    cache, query = pair[1], torch.randn(BATCH, HEADS, 1, DIM)
    key, value = cache.update(*states(5), 0)
    mask = mask if mask is None else mask.view(1, 1, 1, 5)
    keys, values, wider = whole_rooms(cache, 0, key, value, mask)
    assert keys.shape[2] == values.shape[2] == wider.shape[3] == CAPACITY
    exact, _ = eager_attention_forward(None, query, key, value, mask, 1.0)
    torch.testing.assert_close(eager_attention_forward(None, query, keys, values, wider, 1.0)[0], exact)


def test_other_caches_stay_as_they_are():
    offloaded = DynamicCache(config=small_config())
    offloaded.offloading = True
    for cache in (StaticCache(config=small_config(), max_cache_len=4), offloaded):
        layers = list(cache.layers)
        assert make_room(cache, CAPACITY) is cache and cache.layers == layers


@pytest.mark.parametrize("arguments", [{}, {"num_beams": 2}, {"do_sample": True, "num_return_sequences": 3}], ids=str)
def test_generate_makes_room_and_writes_the_same(arguments):
    model, ids = small_model(), torch.tensor([[1, 300, 301, 302], [1, 303, 304, 305]])
    watch = {"return_dict_in_generate": True, "max_new_tokens": 8, "eos_token_id": -1}
    torch.manual_seed(0)
    roomy = model.generate(ids, **arguments, **watch)
    assert {type(layer) for layer in roomy.cache.layers} == {RoomyLayer}
    assert {layer.capacity for layer in roomy.cache.layers} <= {11, 12}
    torch.manual_seed(0)
    given = model.generate(ids, **arguments, **watch, cache=DynamicCache(config=model.config))
    assert torch.equal(roomy.sequences, given.sequences)
