"""Preference tuning of text to image with TRL: rewards for what a model draws, and pairs of better and worse."""

from collections.abc import Callable

import torch
from datasets import Dataset
from PIL import Image
from trl import DPOTrainer

from ..processing_cm3leon import CM3LeonProcessor
from ..vocabulary import BREAK, EOS

ON_POLICY = {"generation_mode": "image", "guidance_scale": 1.0}  # the model's own distribution, which is trained


def prompt_rows(captions: list[str]) -> Dataset:
    """Rows with the columns `caption` and `prompt`, the prompts those of `processor.for_text_to_image`."""
    return Dataset.from_dict({"caption": captions, "prompt": [f"{EOS}{caption}{BREAK}" for caption in captions]})


class PictureReward:
    """
    Scores drawn pictures by how well they fit their captions: a reward function of TRL's online trainers.

    Args:
        processor ([`CM3LeonProcessor`]): Decodes pictures.
        scorer (`Callable`): Pictures and captions to scores, such as [`~cm3leon_hf.evaluation.clip_score.CLIPScorer`].
    """

    __name__ = "picture_reward"  # TRL logs it by name

    def __init__(self, processor: CM3LeonProcessor, scorer: Callable[[list[Image.Image], list[str]], list[float]]):
        self.processor, self.scorer = processor, scorer

    def __call__(self, completion_ids: list[list[int]], caption: list[str], **kwargs) -> list[float]:
        """The score of each picture, whose image ids `completion_ids` are, under its caption."""
        codes = self.processor.vocabulary.ids_to_codes(torch.tensor(completion_ids))
        return self.scorer(self.processor.decode_images(codes), caption)


class PicturePairsTrainer(DPOTrainer):
    """TRL's DPOTrainer for rows with `prompt_ids`, `chosen_ids` and `rejected_ids`, which a text cannot hold."""

    def _prepare_dataset(self, dataset: Dataset, *args) -> Dataset:
        return dataset  # there is nothing to tokenize
