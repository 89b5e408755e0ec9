"""Documents: in which order text and image ids stand."""

from ..vocabulary import Vocabulary


def text_to_image_document(text_ids: list[int], image_ids: list[int], vocabulary: Vocabulary) -> list[int]:
    """`<eos> text <break> image <eos>` (paper, section 2.2)."""
    return [vocabulary.eos_id, *text_ids, vocabulary.break_id, *image_ids, vocabulary.eos_id]
