"""What stands around text and images: the wordings of the tasks (section 2.2 and Table 5), retrieved documents."""

import logging

from .vocabulary import BREAK, EOS, IMAGE, INFILL, MASK

logger = logging.getLogger(__name__)

IMAGE_TO_TEXT = f"{MASK}{BREAK}{IMAGE}{INFILL}"  # section 2.2: the text is masked, the image follows, then the infill
EDITING = f"Edit first image following the instruction{BREAK}{IMAGE}{BREAK}{{text}}{BREAK}"
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


def behind_retrieved(documents: list[list[int]], ids: list[int], max_length: float) -> list[int]:
    """
    Ids behind those of retrieved documents (sections 2.1 and 2.2).

    Args:
        documents (`list[list[int]]`): Documents, the best first; it will stand last, next to `ids`.
        ids (`list[int]`): What they were retrieved for.
        max_length (`float`): Ids that fit. Documents that do not are dropped whole from the front, and it is logged.
    """
    kept = list(documents)
    while kept and sum(map(len, kept)) + len(ids) > max_length:
        kept.pop()
    if len(kept) < len(documents):
        logger.warning(
            "dropped %d of %d retrieved documents, which do not fit into %d tokens",
            len(documents) - len(kept),
            len(documents),
            max_length,
        )
    return [id for document in reversed(kept) for id in document] + ids
