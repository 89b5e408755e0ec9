"""Control signals that a network sees: soft edges, depth, normals, segments and poses."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from typing import ClassVar

import numpy as np
import torch
from huggingface_hub import hf_hub_download
from PIL import Image
from safetensors.torch import load_file
from torch.nn import functional as F
from transformers import (
    MODEL_FOR_UNIVERSAL_SEGMENTATION_MAPPING,
    AutoConfig,
    AutoImageProcessor,
    AutoModelForDepthEstimation,
    AutoModelForObjectDetection,
    AutoModelForSemanticSegmentation,
    AutoModelForUniversalSegmentation,
    VitPoseForPoseEstimation,
)

from .controls_drawing import HEDNetwork, class_colours, draw_skeletons, unit_normals
from .controls_rows import Control

CROPS = 64  # persons in one forward pass


@dataclass(eq=False)
class ModelControl(Control):
    """
    A control signal from a network. Pictures of one size go through it together, so that none is padded.

    Args:
        checkpoint (`str`): Folder or name on the hub. Weights are read as safetensors only.
        device (`str` or `torch.device`, *optional*): The accelerator when there is one, by default.
        dtype (`torch.dtype`, *optional*): By default bfloat16 on an accelerator and float32 on the CPU.

    Raises:
        OSError: by transformers, if the checkpoint is not there or has no safetensors.
    """

    checkpoint: str = ""
    device: str | torch.device | None = None
    dtype: torch.dtype | None = None

    def draw(self, pictures: list[Image.Image]) -> list[Image.Image]:
        sizes = [picture.size for picture in pictures]
        drawn = {}
        for _, group in groupby(sorted(range(len(sizes)), key=sizes.__getitem__), key=sizes.__getitem__):
            numbers = list(group)
            drawn |= zip(numbers, self.draw_alike([pictures[number] for number in numbers]))
        return [drawn[number] for number in range(len(pictures))]

    def draw_alike(self, pictures: list[Image.Image]) -> list[Image.Image]:
        """Control pictures of pictures of the same size."""
        raise NotImplementedError

    @cached_property
    def place(self) -> tuple[torch.device, torch.dtype]:
        device = torch.device(self.device or torch.accelerator.current_accelerator(check_available=True) or "cpu")
        return device, self.dtype or (torch.float32 if device.type == "cpu" else torch.bfloat16)

    @cached_property
    def processor(self):
        return AutoImageProcessor.from_pretrained(self.checkpoint)

    @cached_property
    def model(self) -> torch.nn.Module:
        return self.load(self.model_class, self.checkpoint)

    @property
    def model_class(self):
        """The class, or Auto class, of the network."""
        raise NotImplementedError

    def load(self, kind, checkpoint: str) -> torch.nn.Module:
        """A checkpoint's network, where it is to run."""
        device, dtype = self.place
        return kind.from_pretrained(checkpoint, dtype=dtype, use_safetensors=True).to(device).eval()

    @torch.inference_mode()
    def run(self, processor: Callable, model: torch.nn.Module, pictures: list[Image.Image], **kwargs):
        """A network's outputs for pictures of the same size."""
        return model(**processor(pictures, return_tensors="pt", **kwargs).to(*self.place))


@dataclass(eq=False)
class HED(ModelControl):
    """
    Soft edges by holistically-nested edge detection (Xie and Tu, 2015), white on black.

    Args:
        checkpoint (`str`): File, or `owner/name/file` on the hub, with the weights of ControlNet's HED: safetensors, or
            a `.pth` of tensors only, as the default is (29 MB, Apache-2.0 by its code); nothing else is unpickled.
        resolution (`int`): Shorter side of the picture that the network sees, whatever the size of the result.

    Raises:
        ValueError: if the checkpoint is no file and names none on the hub.
    """

    name: ClassVar[str] = "hed"
    checkpoint: str = "lllyasviel/Annotators/ControlNetHED.pth"
    resolution: int = 512

    @cached_property
    def model(self) -> HEDNetwork:
        network = HEDNetwork()
        network.load_state_dict(_state_dict(self.checkpoint))
        return network.to(*self.place).eval()

    @torch.inference_mode()
    def draw_alike(self, pictures: list[Image.Image]) -> list[Image.Image]:
        pixels = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).to(*self.place)
        height, width = pixels.shape[-2:]
        scale = self.resolution / min(height, width)
        seen = (round(height * scale), round(width * scale))
        edges = self.model(F.interpolate(pixels, seen, mode="bilinear", antialias=True))
        edges = F.interpolate(edges.float(), (height, width), mode="bilinear", antialias=True)
        return _grey(edges.squeeze(1))


def _state_dict(checkpoint: str) -> dict[str, torch.Tensor]:
    if not os.path.isfile(checkpoint):
        if checkpoint.count("/") != 2:
            raise ValueError(f"expected a file, or owner/name/file on the hub, got {checkpoint!r}; check the path")
        checkpoint = hf_hub_download(*checkpoint.rsplit("/", 1))
    if checkpoint.endswith(".safetensors"):
        return load_file(checkpoint)
    return torch.load(checkpoint, map_location="cpu", weights_only=True)


@dataclass(eq=False)
class Depth(ModelControl):
    """Depth, from white for the picture's nearest point to black for its farthest (Depth Anything V2, Apache-2.0)."""

    name: ClassVar[str] = "depth"
    checkpoint: str = "depth-anything/Depth-Anything-V2-Small-hf"
    model_class = AutoModelForDepthEstimation

    def nearness(self, pictures: list[Image.Image]) -> torch.Tensor:
        """Of pictures of one size, how near each point is: 0 to 1 in each picture, `(pictures, height, width)`."""
        width, height = pictures[0].size
        outputs = self.run(self.processor, self.model, pictures)
        inverse = F.interpolate(
            outputs.predicted_depth.float().unsqueeze(1), (height, width), mode="bicubic", align_corners=False
        ).squeeze(1)
        low, high = inverse.amin((1, 2), keepdim=True), inverse.amax((1, 2), keepdim=True)
        return (inverse - low) / (high - low).clamp(min=1e-6)

    def draw_alike(self, pictures: list[Image.Image]) -> list[Image.Image]:
        return _grey(self.nearness(pictures))


@dataclass(eq=False)
class Normal(Depth):
    """
    Surface normals, from depth: red to the right, green upwards, blue towards the viewer, -1 to 1 as 0 to 255.

    Args:
        relief (`float`): How far the nearest point stands in front of the farthest, in the picture's shorter sides.
            Networks see depth up to a scale only; at 0.5 a half sphere that fills the picture is one.
    """

    name: ClassVar[str] = "normal"
    relief: float = 0.5

    def draw_alike(self, pictures: list[Image.Image]) -> list[Image.Image]:
        normals = unit_normals(self.nearness(pictures) * self.relief * min(pictures[0].size))
        return [Image.fromarray(normal) for normal in _bytes((normals + 1) / 2).transpose(0, 2, 3, 1)]


@dataclass(eq=False)
class Segmentation(ModelControl):
    """
    A segmentation map: each class in its own colour, that of PASCAL VOC's palette for its number.

    By default the 150 classes of ADE20K (UPerNet on ConvNeXt, MIT), those of ControlNet's segmentation; any model for
    semantic or universal segmentation does whose image processor needs nothing but pictures.
    """

    name: ClassVar[str] = "segmentation"
    checkpoint: str = "openmmlab/upernet-convnext-tiny"

    @property
    def model_class(self):
        is_universal = type(AutoConfig.from_pretrained(self.checkpoint)) in MODEL_FOR_UNIVERSAL_SEGMENTATION_MAPPING
        return AutoModelForUniversalSegmentation if is_universal else AutoModelForSemanticSegmentation

    def draw_alike(self, pictures: list[Image.Image]) -> list[Image.Image]:
        outputs = self.run(self.processor, self.model, pictures)
        sizes = [(picture.height, picture.width) for picture in pictures]
        maps = self.processor.post_process_semantic_segmentation(outputs, target_sizes=sizes)
        colours = class_colours(self.model.config.num_labels)
        return [Image.fromarray(colours[classes.cpu().numpy()]) for classes in maps]


@dataclass(eq=False)
class Pose(ModelControl):
    """
    Skeletons of persons in the manner of OpenPose, on black.

    By default ViTPose on the persons that RT-DETR finds (Apache-2.0 both): OpenPose itself is not free for all uses.

    Args:
        detector (`str`): Folder or name on the hub of an object detector that knows the class `person`.
        min_score (`float`): Persons and joints that the networks are less sure of are left out.

    Raises:
        ValueError: if the detector has no class `person`.
    """

    name: ClassVar[str] = "pose"
    checkpoint: str = "usyd-community/vitpose-base-simple"
    detector: str = "PekingU/rtdetr_r50vd_coco_o365"
    min_score: float = 0.3
    model_class = VitPoseForPoseEstimation

    @cached_property
    def detection(self) -> tuple:
        processor = AutoImageProcessor.from_pretrained(self.detector)
        model = self.load(AutoModelForObjectDetection, self.detector)
        classes = list(model.config.id2label.values())
        if "person" not in classes:
            raise ValueError(f"expected a detector with the class 'person', got {classes[:5]}; name another")
        return processor, model

    def draw_alike(self, pictures: list[Image.Image]) -> list[Image.Image]:
        boxes = self.persons(pictures)
        seen = [number for number, found in enumerate(boxes) if len(found)]
        joints = [np.zeros((0, 17, 3))] * len(pictures)
        if seen:
            for number, found in zip(seen, self.joints([pictures[n] for n in seen], [boxes[n] for n in seen])):
                joints[number] = found
        return [draw_skeletons(found, picture.size, self.min_score) for found, picture in zip(joints, pictures)]

    def persons(self, pictures: list[Image.Image]) -> list[np.ndarray]:
        """Of each picture the boxes `(persons, 4)` of persons: left, top, width and height in pixels."""
        processor, model = self.detection
        outputs = self.run(processor, model, pictures)
        sizes = [(picture.height, picture.width) for picture in pictures]
        found = processor.post_process_object_detection(outputs, threshold=self.min_score, target_sizes=sizes)
        person = next(number for number, label in model.config.id2label.items() if label == "person")
        boxes = [result["boxes"][result["labels"] == person].float().cpu().numpy() for result in found]
        return [np.concatenate([box[:, :2], box[:, 2:] - box[:, :2]], axis=1) for box in boxes]

    @torch.inference_mode()
    def joints(self, pictures: list[Image.Image], boxes: list[np.ndarray]) -> list[np.ndarray]:
        """Of each picture the joints `(persons, 17, 3)` of the persons in its boxes: x and y in pixels, and a score."""
        crops = self.processor(pictures, boxes=boxes, return_tensors="pt")["pixel_values"].to(*self.place)
        outputs = [self.model(pixel_values=part) for part in crops.split(CROPS)]
        outputs[0].heatmaps = torch.cat([output.heatmaps for output in outputs]).float()
        found = self.processor.post_process_pose_estimation(outputs[0], boxes=boxes)
        return [np.stack([np.c_[one["keypoints"], one["scores"]] for one in persons]) for persons in found]


def _bytes(values: torch.Tensor) -> np.ndarray:
    """Values in [0, 1] as 0 to 255."""
    return (values.clamp(0, 1) * 255).round().to(torch.uint8).cpu().numpy()


def _grey(values: torch.Tensor) -> list[Image.Image]:
    """Pictures `(pictures, height, width)` in [0, 1], in mode L."""
    return [Image.fromarray(picture) for picture in _bytes(values)]
