"""A text-to-image evaluation from its arguments to its report; recipes say on which pictures."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
from transformers import AutoModelForCausalLM, AutoProcessor

from ..retrieval.encoder import fingerprint
from .clip_score import CLIPScorer
from .features import cached_statistics, load_network
from .measuring import Judges, SeenPictures
from .plots import plot_curve, plot_settings
from .processes import start_processes
from .results import REAL, Measurements, markdown_table, summary, write_results
from .runs import Run
from .settings import Setting, read_settings


@dataclass
class TextToImageArguments:
    """What every text-to-image evaluation is told; the recipes' arguments are its children."""

    out: str = field(default="runs/evaluate", metadata={"help": "Folder of the run."})
    settings: list[dict] = field(default_factory=list, metadata={"help": "Ways to decode (in the YAML)."})
    clip_model: str = field(default="ViT-B-32", metadata={"help": "CLIP of open_clip, or local-dir:FOLDER."})
    clip_weights: str = field(default="", metadata={"help": "Name or file of its weights."})
    features: str = field(default="", metadata={"help": "Network of the Fréchet distance; that CLIP by default."})
    feature_weights: str = field(default="", metadata={"help": "Name or file of its weights."})
    clean: bool = field(default=False, metadata={"help": "Antialiased resizing in front of Inception."})
    precision_recall: bool = field(default=True, metadata={"help": "Measure precision and recall."})
    bank: str = field(default="", metadata={"help": "Memory bank; settings with documents are left out without."})
    skip_broken: bool = field(default=False, metadata={"help": "Leave out pictures that cannot be read."})
    batch_size: int = field(default=32, metadata={"help": "Prompts at a time."})
    resamples: int = field(default=200, metadata={"help": "Of the bootstrap."})
    seed: int = field(default=0, metadata={"help": "Seed of all draws."})


class TextToImageEvaluation:
    """
    Loads what an evaluation needs, draws, measures and reports.

    Args:
        args ([`TextToImageArguments`]): How.
        model (`str`): The model's folder or hub name.
        prompts (`Sequence[str]`): What to draw.
        facts (`dict`): Of the data, for the plan and the report.

    Raises:
        ValueError: for wrong settings, and if the folder belongs to another evaluation.
    """

    def __init__(self, args: TextToImageArguments, model: str, prompts: Sequence[str], facts: dict):
        self.args, self.prompts = args, list(prompts)
        self.settings = with_bank(read_settings(args.settings), args.bank)
        self.state = start_processes()
        self.device = self.state.device
        self.scorer = CLIPScorer(args.clip_model, args.clip_weights or None, self.device)
        self.augmenter = load_augmenter(args.bank, self.scorer)
        self.model = AutoModelForCausalLM.from_pretrained(model)
        self.name = Path(model).name
        self.facts = {"model": f"{self.name}@{fingerprint(self.model)}"} | facts
        self.model.to(self.device)
        self.processor = AutoProcessor.from_pretrained(model, device=self.device)
        processes = (self.state.process_index, self.state.num_processes)
        self.run = Run(Path(args.out), args.batch_size, args.seed, *processes)
        self.run.start(self.facts | {"prompts": self.prompts}, {one.name: self.depends(one) for one in self.settings})

    def depends(self, setting: Setting) -> dict:
        """What a setting's pictures depend on."""
        needs_clip, bank = setting.candidates > 1 or setting.documents, {}
        if setting.documents:
            from ..retrieval.bank_files import MANIFEST, checksum

            bank = {"bank": checksum(Path(self.args.bank) / MANIFEST)}
        return asdict(setting) | ({"clip": self.scorer.name} if needs_clip else {}) | bank

    def draw(self) -> None:
        """Draws what is not there yet."""
        for setting in self.settings:
            self.run.draw(setting, self.prompts, self.model, self.processor, self.scorer, self.augmenter)

    def describe(self, pictures: Iterable, instruction: str) -> None:
        """Describes what is not described yet."""
        pictures = list(SeenPictures(pictures, self.processor.image_processor))
        prompts, tools = [instruction] * len(pictures), (self.model, self.processor)
        for one in self.settings:
            self.run.describe(one.description, pictures, prompts, *tools, one.text, one.documents, self.augmenter)

    def is_reporting(self) -> bool:
        """Waits for all processes, and tells one of them to go on."""
        self.state.wait_for_everyone()
        return self.state.is_main_process

    def judges(self, pictures: Iterable) -> Judges:
        """What measures drawn pictures against real ones, which can be read several times."""
        args, real = self.args, SeenPictures(pictures, self.processor.image_processor)
        name, weights = args.features, args.feature_weights
        if not name:
            name, weights = f"open_clip:{args.clip_model}", args.clip_weights
        network = load_network(name, weights or None, self.device, args.clean)
        reference = cached_statistics(real, network, self.run.folder / "statistics")
        features = np.concatenate(list(network.batches(real))) if args.precision_recall else None
        return Judges(network, reference, self.scorer, features, args.resamples, args.seed)

    def measure(self, judges: Judges, pictures: Iterable, distance: str) -> dict[str, dict]:
        """What [`Judges.measure_drawn`] finds at each setting, and how well the real pictures fit, as `real`."""
        measured = {
            setting.name: judges.measure_drawn(self.run.drawn(setting, len(self.prompts)), self.prompts, distance)
            for setting in self.settings
        }
        real = SeenPictures(pictures, self.processor.image_processor)
        return measured | {REAL: judges.measure_fit(real, self.prompts)}

    def report(self, measured: Measurements, judges: Judges, distance: str, facts: dict, dataset: dict) -> None:
        """
        Writes results and plots, and prints the table and, as the last line, JSON.

        Args:
            measured: By setting and metric.
            judges ([`Judges`]): Whose names belong to the protocol.
            distance (`str`): The metric of the curves.
            facts (`dict`): Further ones of the protocol.
            dataset (`dict`): `dataset_type`, `dataset_name` and `dataset_split` for the model card.
        """
        protocol = self.facts | {"clip": self.scorer.name, "features": judges.network.name} | facts
        protocol |= {"resamples": self.args.resamples, "seed": self.args.seed}
        protocol |= {"bank": f"{len(self.augmenter.bank)} documents"} if self.augmenter else {}
        card = {"model_name": self.name, "task_type": "text-to-image"} | dataset
        write_results(self.run.folder, measured, protocol, card)
        plot_settings(measured, self.run.folder / "results.png")
        self._plot_curves(measured, distance)
        print(markdown_table(measured))
        print(json.dumps(summary(measured)))

    def _plot_curves(self, measured: Measurements, distance: str) -> None:
        """Both sides of Figure 4, as far as there are settings for them."""
        plot_curve(
            measured,
            [setting for setting in self.settings if setting.strategy is None],
            distance,
            x=lambda one: one.arguments.get("guidance_scale"),
            line=lambda one: f"{one.documents} documents, {one.candidates} candidates",
            xlabel="guidance scale",
            path=self.run.folder / "guidance.png",
        )
        plot_curve(
            measured,
            [setting for setting in self.settings if setting.strategy is not None],
            distance,
            x=lambda one: one.candidates,
            line=lambda one: f"{one.strategy}, {one.documents} documents",
            xlabel="candidates",
            path=self.run.folder / "candidates.png",
        )


def with_bank(settings: list[Setting], bank: str) -> list[Setting]:
    """The settings that can be had: without a bank none that needs documents, which is said."""
    skipped = [setting.name for setting in settings if setting.documents and not bank]
    if skipped:
        print(f"left out without a memory bank: {', '.join(skipped)}")
    return [setting for setting in settings if setting.name not in skipped]


def load_augmenter(bank: str, encoder: CLIPScorer):
    """The augmenter of a bank, or `None` without one."""
    if not bank:
        return None
    from ..retrieval.augmenter import RetrievalAugmenter
    from ..retrieval.memory_bank import MemoryBank

    return RetrievalAugmenter(MemoryBank.load(bank, encoder.name), encoder, training=False)


__all__ = ["TextToImageArguments", "TextToImageEvaluation"]
