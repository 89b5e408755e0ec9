"""Trains the judge of the emoji tasks, which tells what a drawn emoji shows.

    python recipes/evaluate/emoji_judge.py --config recipes/evaluate/emoji_judge.yaml

It learns from the pictures of the training split, and from some of them after coding and decoding, so that it reads
both. The folder gets one file, named by what it was trained on and how; what is there is not trained again. The last
line printed is JSON: the share of the pictures of another split, and of the same pictures coded and decoded, that it
reads right.
"""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from hashlib import blake2b
from pathlib import Path

import numpy as np
import torch
from datasets import Image, load_dataset
from tqdm.auto import tqdm
from transformers import AutoProcessor
from trl import TrlParser

from cm3leon_hf import default_model
from cm3leon_hf.evaluation.instructions import is_drawn
from cm3leon_hf.evaluation.judge import Judge, JudgeConfig, train_judge
from cm3leon_hf.evaluation.results import REAL
from cm3leon_hf.images import read_image
from cm3leon_hf.retrieval.encoder import fingerprint

TRAIN, CONCEPT = "train", "concept"
ORACLE = "oracle"  # what codes can show of the artists' pictures
NO_TONE = "none"
JUDGED = ("style", "skin_tone", "gender", "colour")
TASKS = ("captioning", "edit", "no_edit")  # whose answers are about one picture of the corpus


@dataclass
class EmojiJudgeArguments:
    dataset: str = field(default="data/emoji-tasks", metadata={"help": "Folder of the emoji tasks."})
    corpus: str = field(default="data/emoji", metadata={"help": "Folder of the emoji data set."})
    model: str = field(default="", metadata={"help": "Model folder whose VQGAN decodes; the shipped one by default."})
    split: str = field(default="heldout_pairs", metadata={"help": "Split to measure the judge on."})
    out: str = field(default="runs/emoji-judge", metadata={"help": "Folder of judges."})
    decoded: int = field(default=4000, metadata={"help": "Training pictures that are also seen decoded."})
    training: dict = field(default_factory=dict, metadata={"help": "Of JudgeConfig (in the YAML)."})


@dataclass(frozen=True)
class Shown:
    """
    Pictures of a split.

    Args:
        rows (`list[dict]`): What they show, and their `codes`.
        cells (`list[dict]`): The pictures, as the data set stores them.
    """

    rows: list[dict]
    cells: list[dict]

    def pictures(self) -> list:
        return [read_image(cell["bytes"] or cell["path"]) for cell in self.cells]

    def digest(self) -> str:
        found = blake2b(json.dumps(self.rows, sort_keys=True).encode(), digest_size=16)
        for cell in self.cells:
            found.update(cell["bytes"] or Path(cell["path"]).read_bytes())
        return found.hexdigest()


def shown_in(dataset: str, corpus: str, split: str) -> Shown:
    """Every picture of a split that rows of tasks are about, once."""
    tasks, first = load_dataset(dataset, split=split), {}
    for index, (task, source) in enumerate(zip(tasks["task"][:], tasks["source"][:])):
        if task in TASKS:
            first.setdefault(source, index)
    names = (CONCEPT, "kin", "source", *JUDGED)
    rows = [
        {name: row[name] for name in names} | {"codes": row["codes"][row["answer"] if is_drawn(row) else -1]}
        for row in tasks.select(first.values())
    ]
    pictures = load_dataset(corpus, split=split).cast_column("image", Image(decode=False))
    place = dict(zip(pictures["source"][:], range(len(pictures))))
    return Shown(rows, [*pictures.select([place[source] for source in first])["image"]])


class EmojiJudge:
    """
    Says whether pictures show what their rows say.

    A concept that the judge was not trained on is right if, of the pictures of unseen concepts, the one whose features
    are nearest shows it; the picture that the row itself names is left out.

    Args:
        judge ([`Judge`]): Reads pictures.
        toned (`set[str]`): Concepts that have skin tones.
        held_out ([`Shown`]): Where the unseen concepts are.
    """

    def __init__(self, judge: Judge, toned: set[str], held_out: Shown):
        self.judge, self.toned = judge, toned
        self.known = {*judge.classes.get(CONCEPT, ())}
        unseen = [index for index, row in enumerate(held_out.rows) if kin(row) not in self.known]
        self.unseen = [held_out.rows[index] for index in unseen]
        cells = [held_out.cells[index] for index in unseen]
        self.features = judge.read(Shown(self.unseen, cells).pictures())[1] if unseen else None

    def can_judge(self, kind: str, row: dict) -> bool:
        """Whether a row's picture has an attribute of this kind that the judge knows."""
        if kind == CONCEPT:
            return kin(row) in self.known or any(kin(row) == kin(one) for one in self._others(row))
        return label(kind, row, self.toned) in self.judge.classes.get(kind, ())

    def right(self, kind: str, rows: Sequence[dict], pictures: Sequence) -> list[bool]:
        """
        Which pictures, of those that can be judged, show what their rows say; of concepts, gender and colour do not
        count.
        """
        shown = [(row, picture) for row, picture in zip(rows, pictures) if self.can_judge(kind, row)]
        if not shown:
            return []
        found, features = self.judge.read([picture for _, picture in shown])
        if kind != CONCEPT:
            return [one == label(kind, row, self.toned) for one, (row, _) in zip(found[kind], shown)]
        return [
            kin(row) == (one if kin(row) in self.known else self._nearest(row, own))
            for (row, _), one, own in zip(shown, found[CONCEPT], features)
        ]

    def accuracy(self, rows: Sequence[dict], pictures: Sequence) -> dict[str, list[bool]]:
        """By kind, which of the pictures that can be judged are judged right."""
        found = {f"judge_{kind}": self.right(kind, rows, pictures) for kind in (CONCEPT, *JUDGED)}
        return {name: values for name, values in found.items() if values}

    def _others(self, row: dict) -> list[dict]:
        return [one for one in self.unseen if one["source"] != row["source"]]

    def _nearest(self, row: dict, features: np.ndarray) -> str:
        """The concept of the nearest picture of an unseen concept."""
        own = np.array([one["source"] == row["source"] for one in self.unseen])
        return kin(self.unseen[int(np.where(own, -1, self.features @ features).argmax())])


def kin(row: dict) -> str:
    """What a picture shows, whatever its gender and colour."""
    return row["kin"] or row[CONCEPT]


def toned_in(rows: Sequence[dict]) -> set[str]:
    """Concepts that have skin tones."""
    return {row[CONCEPT] for row in rows if row["skin_tone"]}


def label(kind: str, row: dict, toned: set[str]) -> str:
    """What the judge is to read; empty where a picture has nothing of the kind."""
    if kind == CONCEPT:
        return kin(row)
    if kind == "skin_tone":
        one_tone = row[CONCEPT] in toned and " and " not in row[kind]
        return (row[kind] or NO_TONE) if one_tone else ""
    return row[kind]


def evenly(rows: Sequence[dict], count: int, seed: int) -> list[int]:
    """Up to `count` rows at random, as evenly from all concepts as can be."""
    seen, ranked = Counter(), []
    for index in np.random.default_rng(seed).permutation(len(rows)).tolist():
        ranked.append((seen[kin(rows[index])], index))
        seen[kin(rows[index])] += 1
    return [index for _, index in sorted(ranked)[:count]]


def decoded(codes: Sequence[list[int]], processor, batch_size: int = 64) -> list:
    """Pictures of codes."""
    device, starts = processor.vqgan.device, range(0, len(codes), batch_size)
    batches = (torch.tensor(codes[start : start + batch_size], device=device) for start in tqdm(starts, "decoding"))
    return [picture for batch in batches for picture in processor.decode_images(batch)]


def judge_for(args: EmojiJudgeArguments, processor) -> tuple[EmojiJudge, Shown]:
    """The judge of these data, trained if that is not done, and the pictures that were held out."""
    training, held_out = (shown_in(args.dataset, args.corpus, split) for split in (TRAIN, args.split))
    config = JudgeConfig(**args.training)
    settings = [asdict(config), args.decoded, fingerprint(processor.vqgan), training.digest()]
    name = blake2b(json.dumps(settings).encode(), digest_size=8).hexdigest()
    path = Path(args.out) / f"{name}.safetensors"
    if not path.exists():
        train(training, args.decoded, config, processor).save(path)
    judge = Judge.load(path).to(processor.vqgan.device)
    return EmojiJudge(judge, toned_in(training.rows + held_out.rows), held_out), held_out


def train(training: Shown, count: int, config: JudgeConfig, processor) -> Judge:
    again = evenly(training.rows, count, config.seed)
    pictures = training.pictures() + decoded([training.rows[index]["codes"] for index in again], processor)
    rows, toned = training.rows + [training.rows[index] for index in again], toned_in(training.rows)
    shown = {kind: [label(kind, row, toned) for row in rows] for kind in (CONCEPT, *JUDGED)}
    return train_judge(pictures, shown, config)


def accuracies(judge: EmojiJudge, held_out: Shown, processor) -> dict[str, dict[str, list[bool]]]:
    """The judge's accuracy on real pictures, and on the same coded and decoded."""
    coded = decoded([row["codes"] for row in held_out.rows], processor)
    return {REAL: judge.accuracy(held_out.rows, held_out.pictures()), ORACLE: judge.accuracy(held_out.rows, coded)}


def main(args: EmojiJudgeArguments) -> None:
    device = torch.accelerator.current_accelerator(check_available=True) or "cpu"
    processor = AutoProcessor.from_pretrained(args.model or default_model(), device=device)
    judge, held_out = judge_for(args, processor)
    found = accuracies(judge, held_out, processor)
    means = {name: {kind: float(np.mean(each)) for kind, each in row.items()} for name, row in found.items()}
    print(json.dumps({"pictures": len(held_out.rows)} | means))


if __name__ == "__main__":
    main(*TrlParser(EmojiJudgeArguments).parse_args_and_config())
