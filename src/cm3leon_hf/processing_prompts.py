"""What stands around text and images: the wordings of the tasks (section 2.2 and Table 5), retrieved documents."""

import logging

import numpy as np

from .vocabulary import BREAK, EOS, IMAGE, INFILL, MASK, Vocabulary

logger = logging.getLogger(__name__)

IMAGE_TO_TEXT = f"{MASK}{BREAK}{IMAGE}{INFILL}"  # section 2.2: the text is masked, the image follows, then the infill
EDITING = f"Edit first image following the instruction{BREAK}{IMAGE}{BREAK}{{text}}{BREAK}"
GROUNDED = f"Generate high quality image of {{text}} with segmentations {{objects}}{BREAK}"
IMAGE_TO_IMAGE = f"Make high quality image from {{control}}{BREAK}{IMAGE}{BREAK}{{text}}{BREAK}"
CONTROLS = {
    "canny": "canny edge features",
    "segmentation": "a segmentation map",
    "hed": "hed features",
    "pose": "openpose features",
    "depth": "depth features",
    "normal": "3D norm features",
    "scribble": "children’s scribbles",
}

CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{%- set parts = [{'type': 'text', 'text': message.content}] if message.content is string else message.content -%}"
    "{%- if message.role != 'assistant' -%}" + EOS + "{%- endif -%}"
    "{%- for part in parts if part.type == 'text' -%}{{ part.text }}{%- endfor -%}"
    "{%- for part in parts if part.type == 'image' -%}"
    "{{ '" + BREAK + IMAGE + "' if message.role == 'assistant' else '" + IMAGE_TO_TEXT + "' }}"
    "{%- endfor -%}"
    "{%- endfor -%}"
)


def object_at(name: str, box, vocabulary: Vocabulary) -> str:
    """A name at a box `x0, y0, x1, y1` in [0, 1], as Table 5 writes it: in four tokens `<loc_i>` (256 bins: ours)."""
    bins = np.minimum(np.asarray(box) * vocabulary.num_locations, vocabulary.num_locations - 1).astype(int)
    tokens = list(vocabulary.location_ids)
    return f"{name.strip()} at {''.join(tokens[index] for index in bins)}"


def behind_retrieved(documents: list[list[int]], ids: list[int], max_length: float) -> list[int]:
    """
    Ids behind those of retrieved documents (sections 2.1 and 2.2).

    Args:
        documents (`list[list[int]]`): Documents, the best first; it will stand last, next to `ids`.
        ids (`list[int]`): What they were retrieved for.
        max_length (`float`): Ids that fit. Documents that do not are dropped whole from the front, and it is logged.
    """
    sections = [*reversed(documents), ids]
    kept = fitting_sections(np.array([*map(len, sections)]), np.zeros(len(sections), np.int64), max_length)
    if not kept.all():
        logger.warning(
            "dropped %d of %d retrieved documents, which do not fit into %d tokens",
            (~kept).sum(),
            len(documents),
            max_length,
        )
    return [id for section, fits in zip(sections, kept) if fits for id in section]


def fitting_sections(lengths: np.ndarray, document: np.ndarray, max_length: float) -> np.ndarray:
    """
    Which sections stay when whole ones are dropped from the front until each document fits (ours).

    Args:
        lengths (`np.ndarray` of shape `(sections,)`): Tokens of each: retrieved documents, then what they are for.
        document (`np.ndarray` of shape `(sections,)`): The document that each belongs to, ascending.
        max_length (`float`): Tokens that fit.

    Returns:
        `np.ndarray` of bool, `(sections,)`; a document's last section always stays.
    """
    ends = np.cumsum(lengths)
    last = np.searchsorted(document, document, side="right") - 1
    rest = ends[last] - ends + lengths  # from a section's beginning to its document's end
    return (rest <= max_length) | (last == np.arange(len(lengths)))
