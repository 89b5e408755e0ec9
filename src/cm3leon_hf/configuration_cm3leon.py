"""Configuration of the CM3Leon decoder."""

import os

from transformers import PreTrainedConfig

from .configuration_vqgan import check_fields
from .vocabulary import CONTROL_TOKENS, EOS, PAD, Vocabulary

AUTO_MAP = {
    "AutoConfig": "configuration_cm3leon.CM3LeonConfig",
    "AutoModel": "modeling_cm3leon.CM3LeonModel",
    "AutoModelForCausalLM": "modeling_cm3leon.CM3LeonForCausalLM",
    "AutoModelForImageTextToText": "modeling_cm3leon.CM3LeonForCausalLM",
    "AutoModelForMultimodalLM": "modeling_cm3leon.CM3LeonForCausalLM",
    "AutoProcessor": "processing_cm3leon.CM3LeonProcessor",
}


class CM3LeonConfig(PreTrainedConfig):
    r"""
    Configuration of a [`CM3LeonModel`], a decoder-only language model over text and image tokens (paper, section 3.2).

    The defaults are the 350M model of the paper's table 3.

    Args:
        text_vocab_size (`int`): Text ids, special tokens included.
        image_vocab_size (`int`): Image ids, one for each code of the VQGAN.
        image_grid_size (`int`): Image tokens along one side of an image.
        num_locations (`int`): Box coordinate tokens among the text ids.
        num_masks (`int`): Spans of a document that the CM3 objective can mask at once, each with ids of its own.
        hidden_size (`int`): Width of the residual stream.
        intermediate_size (`int`): Width of the MLP.
        num_hidden_layers (`int`): Decoder layers.
        num_attention_heads (`int`): Attention heads, a divisor of `hidden_size`.
        hidden_act (`str`): Activation of the MLP. The paper does not say; OPT's ReLU is ours.
        max_position_embeddings (`int`): Longest sequence, in tokens.
        layer_norm_eps (`float`): Epsilon of the layer norms, which have no learnable parameters.
        use_bias (`bool`): Whether the projections have biases. The paper's have none; this is for a start from OPT's
            weights (`cm3leon convert`).
        layer_norm_affine (`bool`): Whether the final layer norm has a gain and a bias, for a start from OPT's weights
            as well: those of the layers can be folded into the projections behind them, the last ones cannot.
        initializer_range (`float`): Standard deviation of the weights, truncated at three of it.
        position_initializer_range (`float`): Standard deviation of the learned positions.
        position_init (`str`): `"normal"`, the paper's, or `"sinusoidal"` with the weights' standard deviation: ours,
            for small models, which then need not learn what a distance is before they learn what a picture is.
        zero_init (`str`): What "output layers are initialized as 0" means: `"residual"`, the projections that write
            to the residual stream (ours), `"lm_head"`, the untied head, or `"none"`.
        use_cache (`bool`): Whether the forward pass returns a cache.
        tie_word_embeddings (`bool`): Whether the head is the transposed embedding.

    Raises:
        ValueError: if the heads do not divide the width, `dtype`, `position_init` or `zero_init` is unknown, or
            `zero_init` needs an untied head.
    """

    model_type = "cm3leon"
    base_model_tp_plan = {
        "layers.*.self_attn.q_proj": "colwise",
        "layers.*.self_attn.k_proj": "colwise",
        "layers.*.self_attn.v_proj": "colwise",
        "layers.*.self_attn.out_proj": "rowwise",
        "layers.*.fc1": "colwise",
        "layers.*.fc2": "rowwise",
    }

    text_vocab_size: int = 56320
    image_vocab_size: int = 8192
    image_grid_size: int = 32
    num_locations: int = 256
    num_masks: int = 1
    hidden_size: int = 1024
    intermediate_size: int = 4096
    num_hidden_layers: int = 24
    num_attention_heads: int = 16
    hidden_act: str = "relu"
    max_position_embeddings: int = 4096
    layer_norm_eps: float = 1e-5
    use_bias: bool = False
    layer_norm_affine: bool = False
    initializer_range: float = 0.006
    position_initializer_range: float = 0.0002
    position_init: str = "normal"
    zero_init: str = "residual"
    use_cache: bool = True
    tie_word_embeddings: bool = True
    pad_token_id: int | None = CONTROL_TOKENS.index(PAD)
    bos_token_id: int | None = CONTROL_TOKENS.index(EOS)
    eos_token_id: int | list[int] | None = CONTROL_TOKENS.index(EOS)

    def __post_init__(self, **kwargs):
        kwargs.pop("vocab_size", None)  # derived
        check_fields(self, kwargs)
        super().__post_init__(**kwargs)
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"expected num_attention_heads to divide hidden_size, got {self.num_attention_heads} heads for "
                f"{self.hidden_size}; choose a divisor"
            )
        if self.position_init not in ("normal", "sinusoidal"):
            raise ValueError(f"expected position_init 'normal' or 'sinusoidal', got {self.position_init!r}; choose one")
        allowed = ("residual", "none") if self.tie_word_embeddings else ("residual", "lm_head", "none")
        if self.zero_init not in allowed:
            raise ValueError(
                f"expected zero_init among {allowed}, got {self.zero_init!r}; 'lm_head' needs untied heads"
            )

    def save_pretrained(self, save_directory: str | os.PathLike, push_to_hub: bool = False, **kwargs) -> None:
        """Saves the configuration; it names a class for each Auto class, where transformers would name one in all."""
        self.auto_map = dict(AUTO_MAP)
        super().save_pretrained(save_directory, push_to_hub=push_to_hub, **kwargs)

    @property
    def vocab_size(self) -> int:
        """Rows of the embedding: text ids, then image ids."""
        return self.vocabulary.size

    @property
    def vocabulary(self) -> Vocabulary:
        return Vocabulary(
            self.text_vocab_size, self.image_vocab_size, self.image_grid_size, self.num_locations, self.num_masks
        )


__all__ = ["CM3LeonConfig"]
