"""Evaluates an instruction-tuned model on the held-out rows of the emoji tasks.

    python recipes/evaluate/emoji_tasks.py --config recipes/evaluate/emoji_tasks.yaml --model MODEL [--adapters FOLDER]

Edits are judged by probes of a CLIP's features, trained on the real pictures of the training split: whether the picture
has the style, skin tone, gender or colour that was asked for, and still shows the same thing, whatever its gender and
colour. Boxes are those of what is drawn; captions must name concept and style exactly. The row `oracle` has the right
answers in place of the model's, as far as codes can show them, and `real` is the probes' accuracy on the artists' own
pictures. The folder gets the answers, `results.json` and `results.md`; the last line printed is JSON. A run that was
stopped goes on where it was. Several GPUs: `accelerate launch` in place of `python`.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import torch
from accelerate import PartialState
from datasets import Dataset, load_dataset
from transformers import AutoModelForCausalLM, AutoProcessor
from trl import TrlParser

from cm3leon_hf import default_clip, default_model
from cm3leon_hf.evaluation.boxes import drawn_box_iou
from cm3leon_hf.evaluation.features import load_network
from cm3leon_hf.evaluation.image_to_text import short
from cm3leon_hf.evaluation.instructions import answer_instructions, is_drawn
from cm3leon_hf.evaluation.intervals import measure_mean
from cm3leon_hf.evaluation.probes import Probe, features_of
from cm3leon_hf.evaluation.results import REAL, entry, markdown_table, write_results
from cm3leon_hf.evaluation.runs import Run
from cm3leon_hf.retrieval.encoder import fingerprint

MODEL, ORACLE = "model", "oracle"
CAPTION = re.compile(r"(?P<subject>.*), (?P<style>.*) style")
SKIN_TONE = re.compile(r" with [a-z -]+ skin tones?$")
JUDGED = ("style", "skin_tone", "gender", "colour")
CONCEPT = "concept"


@dataclass
class EmojiTasksArguments:
    model: str = field(default="", metadata={"help": "Model folder; the shipped one by default."})
    adapters: str = field(default="", metadata={"help": "Folder of adapters on that model."})
    dataset: str = field(default="data/emoji-tasks", metadata={"help": "Folder of the emoji tasks."})
    corpus: str = field(default="data/emoji", metadata={"help": "Folder of the emoji data set."})
    split: str = field(default="heldout_pairs", metadata={"help": "Split to evaluate on."})
    out: str = field(default="runs/evaluate-emoji-tasks", metadata={"help": "Folder of the run."})
    clip_model: str = field(default="", metadata={"help": "CLIP whose features are judged; the shipped one."})
    generate: dict = field(default_factory=dict, metadata={"help": "Arguments of `generate` by task (in the YAML)."})
    tasks: list[str] = field(default_factory=list, metadata={"help": "Tasks to evaluate; all by default."})
    count: int = field(default=0, metadata={"help": "First rows of each task; all by default."})
    guidance_scale: float | None = field(default=None, metadata={"help": "Of all pictures but unedited ones."})
    image_guidance_scale: float | None = field(default=None, metadata={"help": "Of edits."})
    batch_size: int = field(default=32, metadata={"help": "Rows at a time."})
    resamples: int = field(default=200, metadata={"help": "Of the bootstrap."})
    seed: int = field(default=0, metadata={"help": "Seed of all draws."})

    def arguments(self, task: str, drawn: bool) -> dict:
        """Arguments of `generate` for a task."""
        found = dict(self.generate.get(task, self.generate.get("draw" if drawn else "write", {})))
        if self.guidance_scale is not None and drawn and task != "no_edit":
            found["guidance_scale"] = self.guidance_scale
        if self.image_guidance_scale is not None and task == "edit":
            found["image_guidance_scale"] = self.image_guidance_scale
        return found


class Judge:
    """
    Probes of pictures.

    Args:
        rows (`Sequence[dict]`): What the real pictures show.
        features (`np.ndarray` of shape `(rows, dimension)`): Theirs.
        network ([`FeatureNetwork`]): Made them.
    """

    def __init__(self, rows: Sequence[dict], features: np.ndarray, network):
        self.network = network
        self.kin = {row[CONCEPT]: row["kin"] or row[CONCEPT] for row in rows}
        self.toned = {row[CONCEPT] for row in rows if row["skin_tone"]}
        self.probes = {}
        for kind in (CONCEPT, *JUDGED):
            shown = [index for index, row in enumerate(rows) if self.can_judge(kind, row)]
            if len({rows[index][kind] for index in shown}) > 1:
                self.probes[kind] = Probe(features[shown], [rows[index][kind] for index in shown])

    def can_judge(self, kind: str, row: dict) -> bool:
        """Whether a row's picture has an attribute of this kind: only some have skin tones, genders or colours."""
        if kind == "skin_tone":
            return row[CONCEPT] in self.toned and " and " not in row[kind]
        return bool(row[kind])

    def right(self, kind: str, rows: Sequence[dict], features: np.ndarray) -> list[bool]:
        """Which pictures show what their rows say; of concepts, gender and colour do not count."""
        found = self.probes[kind](features)
        if kind != CONCEPT:
            return [one == row[kind] for one, row in zip(found, rows)]
        return [self.kin[one] == (row["kin"] or row[CONCEPT]) for one, row in zip(found, rows)]

    def accuracy(self, rows: Sequence[dict], features: np.ndarray) -> dict[str, list[bool]]:
        """By kind, which of the pictures that can be judged are judged right."""
        found = {}
        for kind in self.probes:
            shown = [index for index, row in enumerate(rows) if self.can_judge(kind, row)]
            if shown:
                found[f"judge_{kind}"] = self.right(kind, [rows[index] for index in shown], features[shown])
        return found


def measure(task: str, rows: list[dict], answers: list, processor, judge: Judge) -> dict[str, list[float]]:
    """The task's metrics, a value for each row."""
    if task == "edit":
        return measure_edits(rows, decoded(answers, processor), judge)
    if task == "no_edit":
        kept = np.array(answers) == np.array([row["codes"][row["answer"]] for row in rows])
        return {"no_edit_codes_kept": kept.mean(axis=1).tolist()}
    if task == "grounded":
        drawn = decoded(answers, processor)
        return {"box_iou": [drawn_box_iou(one, row["boxes"]).mean() for one, row in zip(drawn, rows)]}
    if task == "captioning":
        said = [read_caption(text) for text in answers]
        return {
            "caption_concept": [one == row[CONCEPT] for (one, _), row in zip(said, rows)],
            "caption_style": [style == row["style"] for (_, style), row in zip(said, rows)],
        }
    if task == "vqa":
        right = [short(text).casefold() == row["value"].casefold() for text, row in zip(answers, rows)]
        return {"vqa_accuracy": right} | by_kind("vqa", rows, right)
    if task == "reasoning":
        return {"reasoning_accuracy": [short(text).endswith(row["value"]) for text, row in zip(answers, rows)]}
    return {}


def measure_edits(rows: list[dict], pictures: list, judge: Judge) -> dict[str, list[float]]:
    features = features_of(pictures, judge.network)
    reached = [False] * len(rows)
    for kind in {row["kind"] for row in rows}:
        shown = [index for index, row in enumerate(rows) if row["kind"] == kind]
        for index, right in zip(shown, judge.right(kind, [rows[index] for index in shown], features[shown])):
            reached[index] = right
    found = {"edit_attribute": reached, "edit_concept": judge.right(CONCEPT, rows, features)}
    return found | by_kind("edit", rows, reached)


def by_kind(name: str, rows: list[dict], values: list) -> dict[str, list]:
    kinds = sorted({row["kind"] for row in rows})
    return {f"{name}_{kind}": [one for one, row in zip(values, rows) if row["kind"] == kind] for kind in kinds}


def read_caption(text: str) -> tuple[str, str]:
    """Concept and style of a caption; empty if it is not worded as the canonical one."""
    found = CAPTION.fullmatch(text)
    return (SKIN_TONE.sub("", found["subject"]), found["style"]) if found else ("", "")


def decoded(answers: list[list[int]], processor, batch_size: int = 64) -> list:
    """Pictures of codes."""
    device = processor.vqgan.device
    batches = torch.tensor(answers).split(batch_size)
    return [picture for batch in batches for picture in processor.decode_images(batch.to(device))]


def right_answers(rows: list[dict]) -> list:
    return [row["codes"][row["answer"]] if is_drawn(row) else row["texts"][row["answer"]].strip() for row in rows]


def rows_by_task(args: EmojiTasksArguments) -> dict[str, list[dict]]:
    rows = {}
    for row in load_dataset(args.dataset, split=args.split):
        rows.setdefault(row["task"], []).append(row)
    if unknown := sorted(set(args.tasks) - set(rows)):
        raise ValueError(f"expected tasks among {sorted(rows)}, got {unknown}; correct --tasks")
    return {task: rows[task][: args.count or None] for task in args.tasks or sorted(rows)}


def real_pictures(args: EmojiTasksArguments, split: str) -> tuple[list[dict], Dataset]:
    """What the captioning rows of a split say of pictures, and these pictures."""
    columns = (CONCEPT, "kin", "source", *JUDGED)
    rows = load_dataset(args.dataset, split=split).select_columns(["task", *columns])
    rows = [row for row in rows if row["task"] == "captioning"]
    pictures = load_dataset(args.corpus, split=split)
    place = {source: index for index, source in enumerate(pictures["source"])}
    return rows, pictures.select([place[row["source"]] for row in rows])


def load_model(args: EmojiTasksArguments):
    if not args.adapters:
        return AutoModelForCausalLM.from_pretrained(args.model)
    from cm3leon_hf.training.adapters import load_adapters

    return load_adapters(args.adapters, args.model).merge_and_unload()


def judge_of(args: EmojiTasksArguments, device) -> tuple[Judge, dict[str, list[bool]]]:
    """The judge, and which real pictures of the split it judges right."""
    network = load_network(f"open_clip:{args.clip_model or default_clip()}", device=device)
    (rows, real), (held_out, unseen) = real_pictures(args, "train"), real_pictures(args, args.split)
    judge = Judge(rows, features_of(real["image"], network), network)
    return judge, judge.accuracy(held_out, features_of(unseen["image"], network))


def report(args: EmojiTasksArguments, measured: dict[str, dict], facts: dict) -> None:
    mean = partial(measure_mean, resamples=args.resamples, seed=args.seed)
    measured = {name: {metric: mean(each) for metric, each in row.items()} for name, row in measured.items()}
    dataset = {"dataset_type": "emoji-tasks", "dataset_name": "Emoji tasks", "dataset_split": args.split}
    write_results(
        Path(args.out), measured, facts, {"model_name": Path(args.model).name, "task_type": "any-to-any"} | dataset
    )
    print(markdown_table(measured))
    found = {name: {metric: entry(one) for metric, one in row.items()} for name, row in measured.items()}
    print(json.dumps(found.pop(MODEL) | found))


def main(args: EmojiTasksArguments) -> None:
    args.model = args.model or default_model()
    state, rows = PartialState(), rows_by_task(args)
    model = load_model(args).eval()
    asked = {task: args.arguments(task, is_drawn(part[0])) for task, part in rows.items()}
    facts = {"model": f"{Path(args.model).name}@{fingerprint(model)}", "adapters": args.adapters, "split": args.split}
    run = Run(Path(args.out), args.batch_size, args.seed, state.process_index, state.num_processes)
    run.start(facts, {task: {"rows": len(part), "generate": asked[task]} for task, part in rows.items()})
    processor = AutoProcessor.from_pretrained(args.model, device=state.device)
    model.to(state.device)
    for task, part in rows.items():
        make = partial(answer_instructions, model=model, processor=processor, arguments=asked[task])
        run.answer(task, part, make)
    state.wait_for_everyone()
    if state.is_main_process:
        judge, real = judge_of(args, state.device)
        measured = {MODEL: {}, ORACLE: {}, REAL: real}
        for task, part in rows.items():
            measured[MODEL] |= measure(task, part, run.answered(task, len(part)), processor, judge)
            measured[ORACLE] |= measure(task, part, right_answers(part), processor, judge)
        report(args, measured, facts | {f"rows of {task}": len(part) for task, part in rows.items()})


if __name__ == "__main__":
    main(*TrlParser(EmojiTasksArguments).parse_args_and_config())
