"""An evaluation on disk: what was asked, and pictures and descriptions that a stopped run need not make again."""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image
from tqdm.auto import tqdm
from transformers import BatchFeature, set_seed

from .files import atomic, check_as_many, read_pictures
from .options import asking, score_options
from .reranking import GREEDY, draw_candidates, rank
from .settings import Setting

PLAN = "plan.json"
DESCRIPTION = 32  # positions that documents leave for a description


@dataclass(frozen=True)
class Run:
    """
    A folder that an evaluation fills, batch by batch.

    A batch's draws depend on the seed, the setting and the batch alone, so a run that was stopped and goes on ends with
    the same pictures as an unbroken one on the same machine.

    Args:
        folder (`Path`): Where everything lies.
        batch_size (`int`): Prompts or pictures at a time: what a killed run may lose.
        seed (`int`): Fixes all draws.
        process, processes (`int`): Of `processes` processes, this one makes every batch whose number leaves `process`
            as a rest.
    """

    folder: Path
    batch_size: int = 16
    seed: int = 0
    process: int = 0
    processes: int = 1

    def start(self, facts: dict, settings: dict[str, dict]) -> None:
        """
        Writes down what is asked, or checks that it is what was asked before; further settings may be added.

        Args:
            facts (`dict`): Whatever all pictures depend on, as JSON.
            settings (`dict[str, dict]`): Whatever each setting's pictures depend on, by its name.

        Raises:
            ValueError: if the folder belongs to something else.
        """
        path = self.folder / PLAN
        plan = {"seed": self.seed, "batch_size": self.batch_size} | facts | {"settings": settings}
        plan = json.loads(json.dumps(plan))
        there = read_plan(self.folder) if path.exists() else plan | {"settings": {}}
        wanted, known = plan["settings"], there["settings"]
        changed = [name for name in plan if name != "settings" and plan[name] != there.get(name)]
        changed += [f"setting {name}" for name in wanted if name in known and wanted[name] != known[name]]
        if changed:
            raise ValueError(
                f"expected to go on with what {path} asks for, got another {', '.join(changed)}; choose a new folder"
            )
        with atomic(path) as part:
            part.write_text(json.dumps(plan | {"settings": known | wanted}, indent=1, ensure_ascii=False), "utf-8")

    def batches(self, folder: Path, count: int, suffix: str) -> Iterator[tuple[int, list[Path]]]:
        """Number and files of each batch of this process that is not whole."""
        files = [folder / f"{row:06d}{suffix}" for row in range(count)]
        starts = range(0, count, self.batch_size)
        for number, start in enumerate(tqdm(starts, desc=str(folder.relative_to(self.folder)), unit="batch")):
            batch = files[start : start + self.batch_size]
            if number % self.processes == self.process and not all(path.exists() for path in batch):
                yield number, batch

    def draw(self, setting: Setting, prompts: Sequence[str], model, processor, scorer=None, augmenter=None) -> None:
        """
        Draws a picture for each prompt.

        Args:
            setting ([`Setting`]): How.
            prompts (`Sequence[str]`): What to draw.
            model, processor: Draw.
            scorer ([`CLIPScorer`], *optional*): Picks one of several candidates.
            augmenter ([`RetrievalAugmenter`], *optional*): Retrieves documents.

        Raises:
            ValueError: if candidates or documents are wanted and what they need is not there.
        """
        check_clip(setting, scorer)
        check_bank(setting.name, setting.documents, augmenter)
        for number, paths in self.batches(self.folder / "drawn" / setting.name, len(prompts), ".png"):
            texts = list(prompts[number * self.batch_size :][: self.batch_size])
            self._seed(f"drawn\0{setting.name}", number)
            retrieved = augmenter.for_prompts(texts, setting.documents) if setting.documents else None
            pools = draw_candidates(
                model, processor, texts, setting.candidates, setting.strategies, retrieved=retrieved
            )
            if setting.candidates > 1:
                pools = rank(pools, texts, scorer, keep=1)
            for path, pool in zip(paths, pools):
                with atomic(path) as part:
                    pool[0].image.save(part, "PNG")

    def drawn(self, setting: Setting, count: int) -> list[Path]:
        """The pictures of a setting that is whole."""
        return [self.folder / "drawn" / setting.name / f"{row:06d}.png" for row in range(count)]

    def describe(
        self,
        name: str,
        pictures: Sequence,
        prompts: Sequence[str],
        model,
        processor,
        arguments: dict | None = None,
        documents: int = 0,
        augmenter=None,
    ) -> None:
        """
        Writes about each picture.

        Args:
            name (`str`): Of the folder; settings that describe in the same way share one.
            pictures (`Sequence`): What to write about, as [`~cm3leon_hf.evaluation.files.read_pictures`] takes them.
            prompts (`Sequence[str]`): What stands in front, one for each picture, as the model was trained with:
                "Describe the given picture.", or a question.
            model, processor: Write.
            arguments (`dict`, *optional*): Of `generate`; greedy and unguided by default.
            documents (`int`): Retrieved for each picture by `augmenter`.
            augmenter ([`RetrievalAugmenter`], *optional*): Retrieves documents.

        Raises:
            ValueError: if documents are wanted and there is no augmenter, or there are not as many prompts as pictures.
        """
        check_bank(name, documents, augmenter)
        check_as_many("prompts", prompts, "pictures", pictures)
        for number, paths in self.batches(self.folder / "described" / name, len(prompts), ".txt"):
            span = slice(number * self.batch_size, number * self.batch_size + len(paths))
            batch = list(read_pictures(pictures[span]))
            self._seed(f"described\0{name}", number)
            retrieved = [[] for _ in batch]
            if documents:
                retrieved = augmenter.for_pictures(batch, documents)
            length = model.config.max_position_embeddings - DESCRIPTION
            inputs = writing_prompts(batch, prompts[span], processor, retrieved, length).to(model.device)
            ids = model.generate(**inputs, generation_mode="text", **GREEDY | (arguments or {}))
            new = ids[:, inputs["input_ids"].shape[1] :]
            texts = processor.post_process_multimodal_output(new, generation_mode="text")
            for path, text in zip(paths, texts):
                with atomic(path) as part:
                    part.write_text(text.strip(), "utf-8")

    def described(self, name: str, count: int) -> list[str]:
        """The texts of a folder that is whole."""
        return [(self.folder / "described" / name / f"{row:06d}.txt").read_text("utf-8") for row in range(count)]

    def score(
        self,
        name: str,
        pictures: Sequence,
        prompts: Sequence[str],
        options: Sequence[Sequence[str]],
        model,
        processor,
    ) -> None:
        """
        Scores the options of answers to each prompt; see [`~cm3leon_hf.evaluation.options.score_options`].

        Args:
            name, pictures, prompts, model, processor: See [`describe`].
            options (`Sequence[Sequence[str]]`): For each prompt.

        Raises:
            ValueError: if the numbers differ.
        """
        check_as_many("prompts", prompts, "pictures", pictures)
        check_as_many("options", options, "prompts", prompts)
        for number, paths in self.batches(self.folder / "scored" / name, len(prompts), ".json"):
            for row, path in enumerate(paths, number * self.batch_size):
                (picture,) = read_pictures(pictures[row : row + 1])
                scores = score_options(picture, prompts[row], options[row], model, processor)
                with atomic(path) as part:
                    part.write_text(json.dumps(scores), "utf-8")

    def scored(self, name: str, count: int) -> list[list[float]]:
        """The scores of a folder that is whole."""
        return [json.loads((self.folder / "scored" / name / f"{row:06d}.json").read_text()) for row in range(count)]

    def answer(self, name: str, rows: Sequence, make: Callable[[Sequence], list]) -> None:
        """
        Answers rows of any kind.

        Args:
            name (`str`): Of the folder.
            rows (`Sequence`): What is asked.
            make (`Callable`): Rows to answers, which JSON can hold.
        """
        for number, paths in self.batches(self.folder / "answered" / name, len(rows), ".json"):
            self._seed(f"answered\0{name}", number)
            for path, one in zip(paths, make(rows[number * self.batch_size :][: self.batch_size])):
                with atomic(path) as part:
                    part.write_text(json.dumps(one, ensure_ascii=False), "utf-8")

    def answered(self, name: str, count: int) -> list:
        """The answers of a folder that is whole."""
        folder = self.folder / "answered" / name
        return [json.loads((folder / f"{row:06d}.json").read_text("utf-8")) for row in range(count)]

    def _seed(self, what: str, number: int) -> None:
        words = f"{self.seed}\0{what}\0{number}".encode()
        set_seed(int.from_bytes(hashlib.blake2b(words, digest_size=4).digest(), "little"))


def read_plan(folder: Path) -> dict:
    """
    What a run was asked for.

    Raises:
        ValueError: if there is no run in the folder.
    """
    try:
        return json.loads((Path(folder) / PLAN).read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"expected an evaluation in {folder}, could not read its {PLAN}: {error}") from error


def check_clip(setting: Setting, scorer) -> None:
    """
    Raises:
        ValueError: if a setting needs a CLIP that is not there.
    """
    if setting.candidates > 1 and scorer is None:
        raise ValueError(f"expected a CLIP to pick among the candidates of {setting.name}, got none; name one")


def check_bank(name: str, documents: int, augmenter) -> None:
    """
    Raises:
        ValueError: if documents are wanted and there is no memory bank.
    """
    if documents and augmenter is None:
        raise ValueError(f"expected a memory bank for the documents of {name}, got none; name one")


def writing_prompts(
    pictures: list[Image.Image], prompts: Sequence[str], processor, retrieved: list[list[dict]], max_length: int
) -> BatchFeature:
    """
    Prompts whose continuation is a text about a picture, behind documents, the best next to the picture.

    Args:
        pictures (`list[PIL.Image.Image]`): What to write about.
        prompts (`Sequence[str]`): See [`~cm3leon_hf.evaluation.options.asking`].
        processor ([`CM3LeonProcessor`]): Makes ids.
        retrieved (`list[list[dict]]`): Documents for each picture, the best first.
        max_length (`int`): Ids that fit; documents that do not are dropped whole.
    """
    plain = processor(text=[asking(prompt) for prompt in prompts], images=pictures)
    return processor.with_retrieved(plain, retrieved, max_length)


__all__ = ["Run", "check_bank", "check_clip", "read_plan", "writing_prompts"]
