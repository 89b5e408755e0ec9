"""Perplexity of text and of image tokens under a CM3Leon, for `evaluate.load`."""

import datasets
import evaluate
import torch
from transformers import AutoModelForCausalLM, AutoProcessor

from cm3leon_hf.evaluation.files import batched, read_pictures
from cm3leon_hf.evaluation.perplexity import IGNORED, measure_perplexities, modality_losses

DESCRIPTION = "Perplexity of the text and of the image tokens of documents: a caption, and the picture behind it."
INPUTS = """
Args:
    predictions (list of `str`): Captions.
    references (list of pictures): A picture for each.
    model (`str`): Folder or hub name of the model and its processor.
    batch_size (`int`): Documents at a time; 8 by default.
Returns:
    `{"perplexity": float, "text_perplexity": float, "image_perplexity": float}`
"""


class ModalityPerplexity(evaluate.Metric):
    """Wraps [`~cm3leon_hf.evaluation.perplexity`]."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=DESCRIPTION,
            citation="Yu et al. 2023, arXiv 2309.02591",
            inputs_description=INPUTS,
            features=datasets.Features({"predictions": datasets.Value("string"), "references": datasets.Image()}),
        )

    def _compute(self, predictions, references, model, batch_size=8) -> dict:
        loaded, processor = AutoModelForCausalLM.from_pretrained(model), AutoProcessor.from_pretrained(model)
        loaded.to(torch.accelerator.current_accelerator(check_available=True) or "cpu")
        rows = zip(predictions, read_pictures(references))
        batches = (padded(batch, processor) for batch in batched(rows, batch_size))
        losses = modality_losses(loaded, batches, processor.vocabulary)
        return {name: one.value for name, one in measure_perplexities(losses, resamples=1).items()}


def padded(rows: list[tuple], processor) -> dict[str, torch.Tensor]:
    """Documents `<eos> text <break> image <eos>` of one batch, padded on the right, where no token of them looks."""
    end = [processor.vocabulary.eos_id]
    ids = [torch.tensor(processor.document_ids({"text": text, "image": image}) + end) for text, image in rows]
    pad = torch.nn.utils.rnn.pad_sequence
    return {
        "input_ids": pad(ids, batch_first=True, padding_value=processor.vocabulary.pad_id),
        "labels": pad(ids, batch_first=True, padding_value=IGNORED),
    }
