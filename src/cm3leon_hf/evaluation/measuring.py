"""Everything that is measured of a set of drawn pictures, and of descriptions, with its spread."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from .captions import caption_scores
from .clip_score import CLIPScorer, clip_score
from .features import FeatureNetwork
from .fid import FeatureStatistics, measure_frechet
from .files import batched, check_as_many, read_pictures
from .intervals import Measured, measure_mean
from .precision_recall import precision_and_recall
from .recall import recall_at, text_ranks

BATCH = 64


class SeenPictures:
    """
    Pictures as the model sees them: scaled and cropped by its image processor, in RGB. They can be read again.

    Args:
        pictures (`Iterable`): What [`~cm3leon_hf.evaluation.files.read_pictures`] takes, as often as it is read.
        image_processor: The model's.
    """

    def __init__(self, pictures: Iterable, image_processor):
        self.pictures, self.image_processor = pictures, image_processor

    def __iter__(self) -> Iterator[Image.Image]:
        for picture in read_pictures(self.pictures):
            whole = self.image_processor(picture, do_rescale=False, do_normalize=False, return_tensors="np")
            yield Image.fromarray(whole["pixel_values"][0].transpose(1, 2, 0).round().clip(0, 255).astype(np.uint8))


@dataclass(frozen=True)
class Judges:
    """
    What drawn pictures are measured with.

    Args:
        network ([`FeatureNetwork`]): Makes the features of the Fréchet distance.
        reference ([`FeatureStatistics`]): Of the real pictures.
        scorer ([`CLIPScorer`], *optional*): Compares pictures with prompts.
        real (`np.ndarray` of shape `(pictures, dimension)`, *optional*): Features of the real pictures, for precision
            and recall.
        resamples, seed (`int`): See [`~cm3leon_hf.evaluation.intervals.bootstrap`].
    """

    network: FeatureNetwork
    reference: FeatureStatistics
    scorer: CLIPScorer | None = None
    real: np.ndarray | None = None
    resamples: int = 200
    seed: int = 0

    def measure_drawn(self, pictures: Iterable, prompts: Sequence[str], distance: str = "fd") -> dict[str, Measured]:
        """
        The Fréchet distance, and as far as their judges are there precision, recall, CLIPScore and R@1.

        R@1 is the share of pictures that are closer to their own prompt than to any other one of `prompts`.

        Args:
            pictures (`Iterable`): One for each prompt, as [`~cm3leon_hf.evaluation.files.read_pictures`] takes them;
                read twice.
            prompts (`Sequence[str]`): What was to be drawn.
            distance (`str`): What to call the distance.

        Raises:
            ValueError: for a picture that cannot be read, or another number of pictures than prompts.
        """
        features = np.concatenate(list(self.network.batches(read_pictures(pictures))))
        check_as_many("pictures", features, "prompts", prompts)
        measured = {distance: measure_frechet(features, self.reference, self.resamples, self.seed)}
        if self.real is not None:
            shares = precision_and_recall(features, self.real)
            measured |= {name: self._mean(values) for name, values in shares._asdict().items()}
        return measured | self.measure_fit(pictures, prompts)

    def measure_fit(self, pictures: Iterable, prompts: Sequence[str]) -> dict[str, Measured]:
        """CLIPScore and R@1 of any pictures, if there is a CLIP; see [`measure_drawn`]."""
        if self.scorer is None:
            return {}
        batches = batched(read_pictures(pictures), BATCH)
        shown = np.concatenate([self.scorer.embed_images(batch).cpu().numpy() for batch in batches])
        said = self.scorer.embed_texts(list(prompts)).cpu().numpy()
        check_as_many("pictures", shown, "prompts", prompts)
        ranks = text_ranks(shown, said, list(prompts))
        return {
            "clip_score": self._mean(clip_score((shown * said).sum(axis=1))),
            "r_at_1": self._mean(recall_at(ranks, 1)),
        }

    def measure_described(
        self, texts: Sequence[str], references: Sequence[Sequence[str]], tokenizer: str
    ) -> dict[str, Measured]:
        """CIDEr of descriptions; see [`~cm3leon_hf.evaluation.captions.caption_scores`]."""
        return {"cider": self._mean(caption_scores(texts, references, ("cider",), tokenizer)["cider"].each)}

    def _mean(self, values) -> Measured:
        return measure_mean(values, self.resamples, self.seed)


__all__ = ["Judges", "SeenPictures"]
