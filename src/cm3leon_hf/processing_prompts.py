"""The wordings around text and images that tell the tasks apart (section 2.2 and Table 5)."""

from .vocabulary import BREAK, EOS, IMAGE, INFILL, MASK

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
