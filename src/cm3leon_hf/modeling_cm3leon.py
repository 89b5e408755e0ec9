"""The CM3Leon decoder: ids to logits."""

from collections.abc import Callable, Iterable

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache, DynamicCache
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, can_return_tuple
from transformers.utils.deprecation import deprecate_kwarg
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .configuration_cm3leon import CM3LeonConfig
from .generation_cache import whole_rooms
from .generation_cm3leon import CM3LeonGenerationMixin
from .modeling_attention import blocked_attention_forward, is_faster_in_blocks
from .modeling_loss import chunked_causal_loss

HAS_AMX = torch.cpu._is_amx_tile_supported()


def eager_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    **kwargs: Unpack[TransformersKwargs],
) -> tuple[torch.Tensor, torch.Tensor]:
    scores = query @ key.transpose(2, 3) * scaling
    if attention_mask is not None and attention_mask.dtype == torch.bool:
        scores = torch.where(attention_mask, scores, torch.finfo(scores.dtype).min)
    elif attention_mask is not None:
        scores = scores + attention_mask
    weights = nn.functional.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    return (weights @ value).transpose(1, 2).contiguous(), weights


def better_without_sdpa(query: torch.Tensor, attention_mask: torch.Tensor | None) -> bool:
    """
    Few queries in half precision on a CPU, where SDPA takes up to 16 times as long as two matrix products.

    With matrix units (AMX) it takes half as long as these for one query; what is compiled has its own products.
    """
    length = query.shape[2]
    if query.device.type != "cpu" or query.dtype == torch.float32 or isinstance(length, torch.SymInt):
        return False  # an exported program takes any number of queries
    if length == 1:
        return torch.compiler.is_compiling() or not HAS_AMX
    return length <= 32 and attention_mask is not None  # None is causal for several


def residual_projection(in_features: int, out_features: int, bias: bool) -> nn.Linear:
    """
    A projection that writes to the residual stream, marked because it is initialised apart.

    Not a class of its own: bitsandbytes quantises what is `nn.Linear` itself.
    """
    projection = nn.Linear(in_features, out_features, bias=bias)
    projection.writes_residual = True
    return projection


class HeadProjection(nn.Linear):
    """The projection to logits; a class of its own because it may be initialised apart, and evaluated in part."""

    def forward(self, hidden_states: torch.Tensor, rows: slice = slice(None)) -> torch.Tensor:
        return nn.functional.linear(hidden_states, self.weight[rows])


class PositionEmbedding(nn.Embedding):
    """Learned absolute positions; a class of its own because they are initialised apart."""


class CM3LeonAttention(nn.Module):
    """Multi-head causal self-attention, without biases unless the configuration says so."""

    def __init__(self, config: CM3LeonConfig, layer_idx: int):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.scaling = self.head_dim**-0.5
        self.is_causal = True
        self.q_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=config.use_bias)
        self.k_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=config.use_bias)
        self.v_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=config.use_bias)
        self.out_proj = residual_projection(config.hidden_size, config.hidden_size, bias=config.use_bias)

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None,
        cache: Cache | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        shape = (*hidden_states.shape[:-1], -1, self.head_dim)  # -1: a shard may hold some of the heads
        query, key, value = (states.view(shape).transpose(1, 2) for states in self.project(hidden_states))
        if cache is not None:
            key, value = cache.update(key, value, self.layer_idx, kwargs=kwargs)
        length = key.shape[2]
        attention: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        if self.config._attn_implementation == "sdpa" and better_without_sdpa(query, attention_mask):
            attention = eager_attention_forward
            key, value, attention_mask = whole_rooms(cache, self.layer_idx, key, value, attention_mask)
        elif self.config._attn_implementation == "sdpa" and is_faster_in_blocks(query, key, attention_mask):
            attention = blocked_attention_forward
        attended, weights = attention(
            self, query, key, value, attention_mask, dropout=0.0, scaling=self.scaling, **kwargs
        )
        if weights is not None and weights.shape[-1] > length:  # those of the room, which are 0
            weights = weights[..., :length]
        return self.out_proj(attended.flatten(2)), weights

    def project(self, hidden_states: torch.Tensor) -> Iterable[torch.Tensor]:
        """Queries, keys and values of `(batch, sequence_length, hidden_size)`, each as wide as the heads held here."""
        return (projection(hidden_states) for projection in (self.q_proj, self.k_proj, self.v_proj))


class CM3LeonDecoderLayer(GradientCheckpointingLayer):
    """Pre-norm layer, without dropout, learnable norm parameters or, by default, biases (section 3.2); else as OPT."""

    def __init__(self, config: CM3LeonConfig, layer_idx: int):
        super().__init__()
        self.self_attn_layer_norm = layer_norm(config, CastLayerNorm)
        self.self_attn = CM3LeonAttention(config, layer_idx)
        self.final_layer_norm = layer_norm(config, CastLayerNorm)
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.use_bias)
        self.activation_fn = ACT2FN[config.hidden_act]
        self.fc2 = residual_projection(config.intermediate_size, config.hidden_size, bias=config.use_bias)

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        cache: Cache | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> torch.Tensor:
        normed = self.self_attn_layer_norm(hidden_states)
        attended, _ = self.self_attn(normed, attention_mask, cache=cache, **kwargs)
        hidden_states = hidden_states + attended
        return hidden_states + self.fc2(self.activation_fn(self.fc1(self.final_layer_norm(hidden_states))))


class CastLayerNorm(nn.LayerNorm):
    """Layer norm whose output has autocast's dtype, so that the projections that read it share, and keep, one copy."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        normed, device = super().forward(hidden_states), hidden_states.device.type
        is_cast = device != "meta" and torch.is_autocast_enabled(device)  # which has no autocast
        return normed.to(torch.get_autocast_dtype(device)) if is_cast else normed


def layer_norm(config: CM3LeonConfig, kind: type[nn.LayerNorm] = nn.LayerNorm, affine: bool = False) -> nn.LayerNorm:
    return kind(config.hidden_size, eps=config.layer_norm_eps, elementwise_affine=affine)


def sinusoids(positions: int, width: int) -> torch.Tensor:
    """`(positions, width)` sines and cosines of the positions (Vaswani et al. 2017, section 3.5), in [-1, 1]."""
    rates = 10_000 ** (-torch.arange(0, width, 2) / width)
    angles = torch.arange(positions)[:, None] * rates
    return torch.cat([angles.sin(), angles.cos()], dim=1)[:, :width]


class CM3LeonPreTrainedModel(PreTrainedModel):
    config: CM3LeonConfig
    config_class = CM3LeonConfig
    base_model_prefix = "model"
    input_modalities = ("image", "text")
    output_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    _no_split_modules = ["CM3LeonDecoderLayer"]
    _skip_keys_device_placement = ["cache"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _can_record_outputs = {"hidden_states": CM3LeonDecoderLayer, "attentions": CM3LeonAttention}

    def __init__(self, config: CM3LeonConfig):
        super().__init__(config)
        self.__module__ = type(self).__module__  # where `save_pretrained` finds the code, also when FSDP2 is the class

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Truncated normal weights; zeros where `zero_init` says so (section 3.2)."""
        config, std = self.config, self.config.initializer_range
        zero = {
            "residual": getattr(module, "writes_residual", False),
            "lm_head": isinstance(module, HeadProjection),
        }.get(config.zero_init, False)
        if isinstance(module, PositionEmbedding):
            std = config.position_initializer_range
        if zero:
            init.zeros_(module.weight)
        elif isinstance(module, PositionEmbedding) and config.position_init == "sinusoidal":
            init.copy_(module.weight, sinusoids(*module.weight.shape) * 2**0.5 * config.initializer_range)
        elif isinstance(module, (nn.Linear, nn.Embedding)):
            init.trunc_normal_(module.weight, std=std, a=-3 * std, b=3 * std)
        elif isinstance(module, nn.LayerNorm) and module.elementwise_affine:
            init.ones_(module.weight)
        if getattr(module, "bias", None) is not None:
            init.zeros_(module.bias)

    def resize_token_embeddings(
        self, new_num_tokens: int | None = None, pad_to_multiple_of: int | None = None, mean_resizing: bool = True
    ) -> nn.Embedding:
        """Returns the embedding, or raises `ValueError` for another size: image ids stand behind the text ids."""
        size, multiple = self.config.vocab_size, pad_to_multiple_of or 1
        wanted = -(-(new_num_tokens or size) // multiple) * multiple
        if wanted != size:
            raise ValueError(
                f"expected {size} ids, {self.config.text_vocab_size} of text and then {self.config.image_vocab_size} "
                f"of images, got {wanted}, which would move or cut image ids; give new text tokens ids that the "
                "tokenizer has left free, or set a larger text_vocab_size before training"
            )
        return self.get_input_embeddings()


class CM3LeonModel(CM3LeonPreTrainedModel):
    """The decoder without its head: ids to hidden states."""

    def __init__(self, config: CM3LeonConfig):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.embed_positions = PositionEmbedding(config.max_position_embeddings, config.hidden_size)
        self.layers = nn.ModuleList(CM3LeonDecoderLayer(config, index) for index in range(config.num_hidden_layers))
        self.final_layer_norm = layer_norm(config, affine=config.layer_norm_affine)
        self.gradient_checkpointing = False
        self.post_init()

    @deprecate_kwarg("past_key_values", "5.40.0", new_name="cache")
    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithPast:
        r"""
        Args:
            input_ids (`torch.LongTensor` of shape `(batch, sequence_length)`): Vocabulary ids, images included.
            attention_mask (`torch.Tensor` of shape `(batch, total_length)`, *optional*): 1 for tokens, 0 for padding.
            position_ids (`torch.LongTensor` of shape `(batch, sequence_length)`, *optional*): Positions. Without
                them they are counted from the attention mask, so that padding on the left changes nothing. Where they
                begin anew, without an attention mask or a cache, packed documents do not see each other.
            cache (`Cache`, *optional*): Keys and values of earlier tokens.
            inputs_embeds (`torch.FloatTensor` of shape `(batch, sequence_length, hidden_size)`, *optional*):
                Embeddings in place of ids.
            use_cache (`bool`, *optional*): Whether to return a cache.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("expected exactly one of input_ids and inputs_embeds, got both or neither; pass one")
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        if use_cache and cache is None:
            cache = DynamicCache(config=self.config)
        causal_mask = create_causal_mask(
            config=self.config,
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            cache=cache,
            position_ids=position_ids,  # none are no packed documents; a compiled graph could not see that
        )
        given = {} if position_ids is None else {"position_ids": position_ids}  # flash attention finds packed documents
        if position_ids is None:
            position_ids = self._default_positions(inputs_embeds, attention_mask, cache)
        hidden_states = inputs_embeds + self.embed_positions(position_ids)
        for layer in self.layers:
            hidden_states = layer(hidden_states, causal_mask, cache=cache, **given, **kwargs)
        return BaseModelOutputWithPast(last_hidden_state=self.final_layer_norm(hidden_states), cache=cache)

    def _default_positions(
        self, inputs_embeds: torch.Tensor, attention_mask: torch.Tensor | None, cache: Cache | None
    ) -> torch.LongTensor:
        length = inputs_embeds.shape[1]
        if attention_mask is not None and attention_mask.ndim == 2:
            return (attention_mask.long().cumsum(1) - 1).clamp_min(0)[:, -length:]
        if length > self.config.max_position_embeddings:
            raise ValueError(
                f"expected at most {self.config.max_position_embeddings} tokens, one for each position, got {length}; "
                "cut the sequence"
            )
        past = cache.get_seq_length() if cache is not None else 0
        return (torch.arange(length, device=inputs_embeds.device) + past).unsqueeze(0)


class CM3LeonForCausalLM(CM3LeonPreTrainedModel, CM3LeonGenerationMixin):
    """
    The decoder with its head: reads and writes text and images.

    Example:

    ```python
    >>> import cm3leon_hf
    >>> from transformers import AutoModelForCausalLM, AutoProcessor

    >>> path = cm3leon_hf.default_model()
    >>> model, processor = AutoModelForCausalLM.from_pretrained(path), AutoProcessor.from_pretrained(path)
    >>> inputs = processor.for_text_to_image(["red apple, fluent 3d style"])
    >>> ids = model.generate(**inputs, generation_mode="image", guidance_scale=3.0, do_sample=True)
    >>> images = processor.post_process_multimodal_output(ids, generation_mode="image")
    ```
    """

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}
    _pp_plan = {"lm_head": (["hidden_states"], ["logits"])}

    def __init__(self, config: CM3LeonConfig):
        super().__init__(config)
        self.model = CM3LeonModel(config)
        self.lm_head = HeadProjection(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @deprecate_kwarg("past_key_values", "5.40.0", new_name="cache")
    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        image_logits_only: bool = False,
        loss_only: bool = False,
        **kwargs: Unpack[TransformersKwargs],
    ) -> CausalLMOutputWithPast:
        r"""
        Args:
            labels (`torch.LongTensor` of shape `(batch, sequence_length)`, *optional*): Ids to predict, shifted here;
                -100 is left out. `input_ids` are right as they stand, images included.
            logits_to_keep (`int` or `torch.Tensor`, *optional*): How many last positions to compute logits for, or
                which; 0 for all.
            image_logits_only (`bool`): Whether to evaluate the head for image ids alone, which is less to read where no
                text can follow.
            loss_only (`bool`): Whether to compute the loss without the logits, which are then `None`: for training, in
                less memory and time. Needs torch 2.13; an adapted or sharded head gives logits all the same.

        The other arguments are those of [`CM3LeonModel`].

        Returns:
            [`CausalLMOutputWithPast`]: logits `(batch, kept_length, vocab_size)` over text and image ids, none masked;
            `(batch, kept_length, image_vocab_size)` with `image_logits_only`.
        """
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=cache,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        logits = loss = None
        if loss_only and labels is not None and self._has_plain_head:
            loss = chunked_causal_loss(
                outputs.last_hidden_state, self.lm_head.weight, labels, kwargs.get("num_items_in_batch")
            )
        else:
            kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            logits = self._logits(outputs.last_hidden_state[:, kept], image_logits_only)
        if labels is not None and loss is None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            cache=outputs.cache,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    @property
    def _has_plain_head(self) -> bool:
        """Whether the head is neither adapted nor sharded, so that its weight says all."""
        return isinstance(self.lm_head, HeadProjection) and (self.tp_size or 1) == 1

    def _logits(self, hidden_states: torch.Tensor, image_logits_only: bool) -> torch.Tensor:
        if not image_logits_only:
            return self.lm_head(hidden_states)
        images = self.config.vocabulary.image_ids
        return self.lm_head(hidden_states, images) if self._has_plain_head else self.lm_head(hidden_states)[..., images]


__all__ = ["CM3LeonForCausalLM", "CM3LeonModel", "CM3LeonPreTrainedModel"]
