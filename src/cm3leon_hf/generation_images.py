"""Draws images in transformers' loop among the image ids alone: an eighth of all to mask, sort and draw from."""

from collections.abc import Callable

import torch
from torch.nn.functional import pad
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, MaxLengthCriteria, StoppingCriteriaList
from transformers.generation import (
    EosTokenCriteria,
    EpsilonLogitsWarper,
    EtaLogitsWarper,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)
from transformers.generation.streamers import BaseStreamer

from .logits_processors import (
    BatchedGuidanceLogitsProcessor,
    ContrastiveLogitsProcessor,
    ImageTextGuidanceLogitsProcessor,
    ModalityLogitsProcessor,
)
from .vocabulary import Vocabulary

# What is the same for scores of image ids alone as for all with −inf for text.
OF_ANY_IDS = {
    BatchedGuidanceLogitsProcessor,
    ContrastiveLogitsProcessor,
    EpsilonLogitsWarper,
    EtaLogitsWarper,
    ImageTextGuidanceLogitsProcessor,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
}


class ImageLogitsProcessor(LogitsProcessor):
    """
    Processors over scores of the image ids alone, `(rows, image_vocab_size)` in and out; the ids are those of all.

    Args:
        processors (`LogitsProcessorList`): What stands before the draw. Those that may look at single ids get scores
            of all ids, with −inf for text.
        vocabulary ([`Vocabulary`]): Layout of the ids.
    """

    def __init__(self, processors: LogitsProcessorList, vocabulary: Vocabulary):
        self.processors = [one for one in processors if type(one) is not ModalityLogitsProcessor]
        self.images = vocabulary.image_ids

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        for one in self.processors:
            if type(one) in OF_ANY_IDS:
                scores = one(input_ids, scores)
            else:
                scores = one(input_ids, of_all_ids(scores, self.images))[:, self.images]
        return scores


class ImageStreamer(BaseStreamer):
    """Hands codes on as ids."""

    def __init__(self, streamer: BaseStreamer, vocabulary: Vocabulary):
        self.streamer, self.images = streamer, vocabulary.image_ids

    def put(self, value: torch.LongTensor) -> None:
        self.streamer.put(value + self.images.start)

    def end(self) -> None:
        self.streamer.end()


def may_draw_codes(stopping_criteria: StoppingCriteriaList, config: GenerationConfig) -> bool:
    """Whether nothing but an image's length ends it, and nobody looks at what the model gives for text."""
    by_length = {type(one) for one in stopping_criteria} <= {MaxLengthCriteria, EosTokenCriteria}
    return by_length and not config.output_logits


def draw_codes(
    sample: Callable,
    vocabulary: Vocabulary,
    input_ids: torch.LongTensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    streamer: BaseStreamer | None = None,
    **model_kwargs,
):
    """
    The stock loop over codes, which stand for image ids in what it draws, and are turned into them for all others.

    Args:
        sample (`Callable`): The stock `_sample`.
        vocabulary ([`Vocabulary`]): Layout of the ids.

    The other arguments are the loop's, and so is what is returned.
    """
    start, images = input_ids.shape[1], vocabulary.image_ids
    processor = ImageLogitsProcessor(logits_processor, vocabulary)
    output = sample(
        input_ids,
        lambda ids, scores: processor(ids_of_codes(ids, start, vocabulary), scores),
        StoppingCriteriaList([one for one in stopping_criteria if type(one) is MaxLengthCriteria]),
        generation_config,
        streamer=streamer and ImageStreamer(streamer, vocabulary),
        image_logits_only=True,
        codes_from=start,
        **model_kwargs,
    )
    if isinstance(output, torch.Tensor):
        return ids_of_codes(output, start, vocabulary)
    output.sequences = ids_of_codes(output.sequences, start, vocabulary)
    if output.scores is not None:
        output.scores = tuple(of_all_ids(one, images) for one in output.scores)
    return output


def ids_of_codes(ids: torch.LongTensor, start: int, vocabulary: Vocabulary) -> torch.LongTensor:
    """`(rows, length)`, where codes stand from column `start` on, with the ids of these."""
    return torch.cat([ids[:, :start], ids[:, start:] + vocabulary.image_ids.start], dim=1)


def of_all_ids(scores: torch.FloatTensor, images: slice) -> torch.FloatTensor:
    """Scores of the image ids, `(rows, image_vocab_size)`, to scores of all ids, with −inf for text."""
    return pad(scores, (images.start, 0), value=-torch.inf)  # image ids come last
