"""Where training of the location tokens begins."""

import torch
from transformers import PreTrainedModel

from ..modeling_cm3leon import sinusoids


@torch.no_grad()
def order_locations(model: PreTrainedModel) -> None:
    """
    Begins the embeddings of `<loc_0>`, `<loc_1>`, … anew, so that near bins are alike and far ones are not.

    They are sines and cosines of the bin around the mean of the text tokens' embeddings, as far from it as those are
    long on average. As tokens without an order, each bin would have to be learned by itself, and rarely comes up.

    Args:
        model ([`CM3LeonForCausalLM`]): Changed in place.
    """
    vocabulary, weight = model.config.vocabulary, model.get_input_embeddings().weight
    text = weight[len(vocabulary.special_tokens) : vocabulary.text_size].float()
    curve = sinusoids(vocabulary.num_locations, weight.shape[1]).to(text)
    curve -= curve.mean(dim=0)
    curve *= text.norm(dim=1).mean() / curve.norm(dim=1).mean()
    ids = [*vocabulary.location_ids.values()]
    weight[ids] = (text.mean(dim=0) + curve).to(weight.dtype)


__all__ = ["order_locations"]
