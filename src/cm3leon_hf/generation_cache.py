"""A cache with room for what is to come: a step writes its keys and values, where DynamicCache copies all of them."""

import torch
from torch.nn.functional import pad
from transformers import Cache, DynamicCache
from transformers.cache_utils import DynamicLayer

POSITIONS = 128  # that room is made for at a time


class RoomyLayer(DynamicLayer):
    """
    A dynamic layer whose keys and values are the filled part of tensors with room behind it, which holds zeros.

    Args:
        capacity (`int`): Positions that will be needed.
    """

    def __init__(self, capacity: int):
        super().__init__()
        self.capacity = capacity
        self.rooms = self.filled = ()

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs):
        if torch.is_grad_enabled():  # which has to keep what stood there before
            return super().update(key_states, value_states, *args, **kwargs)
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        start = self.get_seq_length()
        stop = start + key_states.shape[-2]
        if not self._fits(stop):
            held = (self.keys, key_states), (self.values, value_states)
            self.rooms = tuple(self._room(old, new, stop) for old, new in held)
        for room, new in zip(self.rooms, (key_states, value_states)):
            room[..., start:stop, :] = new
        self._fill(stop)
        return self.keys, self.values

    def crop(self, tokens_to_remove: int) -> None:
        own = self._fits(0)
        super().crop(tokens_to_remove)
        if own:
            self._fill(self.get_seq_length())

    def _fits(self, stop: int) -> bool:
        """Whether keys and values lie in the rooms, where nobody has put others in their place, with room enough."""
        held = self.keys, self.values
        own = len(self.filled) == 2 and all(one is other for one, other in zip(held, self.filled))
        return own and stop <= self.rooms[0].shape[-2]

    def _room(self, old: torch.Tensor, new: torch.Tensor, stop: int) -> torch.Tensor:
        blocks = -(-stop // POSITIONS)
        room = new.new_zeros(*new.shape[:-2], max(stop, min(self.capacity, blocks * POSITIONS)), new.shape[-1])
        if old.numel():
            room[..., : old.shape[-2], :] = old
        return room

    def _fill(self, length: int) -> None:
        self.filled = self.keys, self.values = tuple(room[..., :length, :] for room in self.rooms)


def make_room(cache: Cache, capacity: int) -> Cache:
    """
    The same cache with room for so many positions, if it is transformers' plain dynamic one; any other as it is.

    Args:
        cache (`Cache`): Empty.
        capacity (`int`): Positions to make room for; it still grows beyond.
    """
    if (
        type(cache) is DynamicCache
        and not cache.offloading
        and {type(layer) for layer in cache.layers} <= {DynamicLayer}
    ):
        cache.layers = [RoomyLayer(capacity) for _ in cache.layers]
    return cache


def whole_rooms(
    cache: Cache | None, index: int, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """
    Keys and values together with the room behind them, which products read in place, where they copy a part of it.

    Args:
        cache (`Cache`, *optional*): Has been updated.
        index (`int`): Of the layer.
        key, value (`torch.Tensor` of shape `(batch, heads, length, head_dim)`): What the update gave.
        mask (`torch.Tensor` that broadcasts to `(batch, heads, queries, length)`, *optional*): True, or 0, where a
            query sees a key; `None` where all do.

    Returns:
        Keys, values and a mask that hides the room; as they were for any other cache.
    """
    layer = None if cache is None else cache.layers[index]
    if not isinstance(layer, RoomyLayer) or key is not layer.keys:
        return key, value, mask
    keys, values = layer.rooms
    seen, room = key.shape[-2], keys.shape[-2] - key.shape[-2]
    if mask is None:
        mask = torch.ones(1, 1, 1, seen, dtype=torch.bool, device=key.device)
    hidden = False if mask.dtype == torch.bool else torch.finfo(mask.dtype).min
    return keys, values, pad(mask, (0, room), value=hidden)
