"""Trains a ladder of sizes and token counts with and without retrieval, and fits scaling laws to it.

    python recipes/scaling/ladder.py --config recipes/scaling/emoji.yaml

Each rung is a run of recipes/pretrain/train.py in a process of its own, with a learning rate schedule of its length.
What counts is the loss of held-out rows' own documents, captions in front of their pictures, behind whatever was
retrieved for them, which is read and not counted. A ladder that was stopped goes on: finished rungs are read, the one
that was stopped goes on from its checkpoint. The last line is JSON, where `mean_gain` says by how many nats a token
the loss of a source lies below that of the first, in the mean over all rungs.
"""

import itertools
import json
import shlex
import subprocess
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import yaml
from transformers import AutoConfig, AutoModelForCausalLM, AutoProcessor, TrainingArguments
from trl import TrlParser

from cm3leon_hf.data.pretraining import CausalCollator, CM3Rows
from cm3leon_hf.data.sources import Source
from cm3leon_hf.data.transform import CM3Transform
from cm3leon_hf.evaluation.files import atomic
from cm3leon_hf.training.pretraining import PretrainingTrainer
from cm3leon_hf.training.scaling import ScalingLaw, measure_law

TRAIN = Path(__file__).parents[1] / "pretrain" / "train.py"
LOSSES = ("loss", "text_loss", "image_loss")


@dataclass
class LadderArguments:
    recipe: str = field(metadata={"help": "YAML of pretrain/train.py with what all rungs share, and batch_tokens."})
    out: str = field(metadata={"help": "Folder with a folder for each rung, the table, the plot and the JSON."})
    sources: dict[str, dict] = field(metadata={"help": "Name and fields of each Source to compare (in the YAML)."})
    sizes: list[dict] = field(metadata={"help": "Of each size what differs in config.json, and its learning_rate."})
    tokens: list[int] = field(metadata={"help": "Tokens to train on."})
    eval_split: str = field(default="heldout_pairs", metadata={"help": "Split of each source to measure losses on."})
    eval_rows: int = field(default=256, metadata={"help": "Rows of it to use at most."})
    resamples: int = field(default=200, metadata={"help": "Bootstrap replicates of each law."})
    flags: str = field(default="", metadata={"help": "Further flags of train.py, for all rungs."})
    launcher: str = field(default="", metadata={"help": "Starts train.py, such as 'accelerate launch'; else Python."})

    def __post_init__(self):
        if len(self.sizes) * len(self.tokens) < 6 or len(self.sizes) < 2 or len(self.tokens) < 2:
            raise ValueError(
                f"expected at least 2 sizes, 2 token counts and 6 rungs for a law of five numbers, got "
                f"{len(self.sizes)} and {len(self.tokens)}; add some"
            )


@dataclass(frozen=True)
class Result:
    """What a rung came to; losses are nats a token."""

    source: str
    weights: int
    tokens: int
    loss: float
    text_loss: float
    image_loss: float


class OwnDocuments(CM3Rows):
    """Rows of which only their own document is predicted, not what was retrieved for them."""

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        row = super().__getitem__(index)
        begin = np.flatnonzero(row["labels"] == self.transform.vocabulary.eos_id)[-2]  # the last one closes it
        labels = row["labels"].copy()
        labels[: begin + 1] = -100
        return row | {"labels": labels}


def write_recipe(args: LadderArguments, name: str, size: dict, tokens: int, folder: Path) -> Path:
    """The YAML of train.py for a rung, beside the model's configuration."""
    shared = yaml.safe_load(Path(args.recipe).read_text(encoding="utf-8"))
    changes = {key: value for key, value in size.items() if key != "learning_rate"}
    AutoConfig.from_pretrained(shared["model_config"], **changes).save_pretrained(folder / "size")
    own = {
        "sources": [args.sources[name]],
        "model_config": str(folder / "size"),
        "learning_rate": size["learning_rate"],
        "max_steps": tokens // shared["batch_tokens"],
        "output_dir": str(folder),
    }
    path = folder / "train.yaml"
    path.write_text(yaml.safe_dump(shared | own), encoding="utf-8")
    return path


def held_out_losses(args: LadderArguments, name: str, folder: Path) -> tuple[int, dict[str, float]]:
    """Number of weights of a trained model, and its losses on the source's held-out rows."""
    model, processor = AutoModelForCausalLM.from_pretrained(folder), AutoProcessor.from_pretrained(folder, device="cpu")
    vocabulary, length = model.config.vocabulary, model.config.max_position_embeddings
    rows = Source(**args.sources[name] | {"split": args.eval_split}).open()
    rows = rows.select(range(min(args.eval_rows, len(rows))))
    transform = CM3Transform(processor.tokenizer, vocabulary, length, span_rate=0.0)
    settings = {"per_device_eval_batch_size": 8, "remove_unused_columns": False, "report_to": "none"}
    trainer = PretrainingTrainer(
        model=model.float(),
        args=TrainingArguments(str(folder), disable_tqdm=True, **settings),
        data_collator=CausalCollator(pad_token_id=model.config.pad_token_id),
        vocabulary=vocabulary,
    )
    measured = trainer.evaluate(OwnDocuments(rows, transform, seed=0))
    losses = {key: float(np.log(measured[f"eval_{key.replace('loss', 'perplexity')}"])) for key in LOSSES}
    return model.num_parameters(), losses


def climb(args: LadderArguments, name: str, number: int, tokens: int) -> Result:
    """The result of a rung, which is trained first if it is not yet."""
    folder = Path(args.out) / f"{name}-{number}-{tokens}"
    results = folder / "rung.json"
    if not results.is_file():
        recipe = write_recipe(args, name, args.sizes[number], tokens, folder)
        launcher = shlex.split(args.launcher) or [sys.executable]
        subprocess.run([*launcher, str(TRAIN), "--config", str(recipe), *shlex.split(args.flags)], check=True)
        if not (folder / "processor_config.json").is_file():  # what train.py writes last
            raise ValueError(
                f"expected a trained model in {folder}, got a run that was stopped; start the ladder again"
            )
        weights, losses = held_out_losses(args, name, folder)
        with atomic(results) as part:
            part.write_text(json.dumps(asdict(Result(name, weights, tokens, **losses))), encoding="utf-8")
    return Result(**json.loads(results.read_text(encoding="utf-8")))


def columns(results: list[Result], name: str, loss: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Weights, tokens and a loss of a source's rungs, each `(rungs,)`."""
    rungs = [(one.weights, one.tokens, getattr(one, loss)) for one in results if one.source == name]
    return tuple(np.array(column, np.float64) for column in zip(*rungs))


def fit(args: LadderArguments, results: list[Result]) -> dict[str, dict[str, dict]]:
    """For each source and loss the five numbers of its law, each with its value and bounds at 95 %."""
    laws = {}
    for name, loss in itertools.product(args.sources, LOSSES):
        measured = measure_law(*columns(results, name, loss), args.resamples)
        numbers = {key: [one.value, *one.interval()] for key, one in measured.items()}
        laws.setdefault(name, {})[loss] = numbers
    return laws


def law_of(numbers: dict[str, list[float]]) -> ScalingLaw:
    return ScalingLaw(**{key: value for key, (value, _, _) in numbers.items()})


def table(results: list[Result], laws: dict) -> str:
    """The rungs, then the laws with their bounds."""
    lines = [["source", "weights", "tokens", *LOSSES]]
    lines += [
        [one.source, f"{one.weights:,}", f"{one.tokens:,}", *(f"{getattr(one, loss):.4f}" for loss in LOSSES)]
        for one in results
    ]
    text = "\n".join("  ".join(f"{cell:>12}" for cell in line) for line in lines)
    for name, loss in itertools.product(laws, LOSSES):
        numbers = laws[name][loss].items()
        text += f"\n{name}, {loss}: " + ", ".join(
            f"{key} {v:.3g} [{low:.3g}, {high:.3g}]" for key, (v, low, high) in numbers
        )
    return text


def plot(results: list[Result], laws: dict, path: Path) -> None:
    """A row of panels for each loss, one panel a source: measured points on the laws' curves."""
    figure, axes = plt.subplots(
        len(LOSSES),
        len(laws),
        figsize=(4 * len(laws), 9),
        sharex=True,
        sharey="row",
        squeeze=False,
        layout="constrained",
    )
    for (row, loss), (column, name) in itertools.product(enumerate(LOSSES), enumerate(laws)):
        axis, (weights, tokens, losses) = axes[row][column], columns(results, name, loss)
        line = np.geomspace(tokens.min(), tokens.max(), 50)
        for size in np.unique(weights):
            curve = axis.plot(line, law_of(laws[name][loss]).loss(size, line), label=f"{size / 1e6:.2g}M")
            axis.plot(tokens[weights == size], losses[weights == size], "o", color=curve[0].get_color())
        axis.set(xscale="log", title=name if row == 0 else "", ylabel=loss.replace("_", " ") if column == 0 else "")
    axes[0][0].legend(title="weights")
    for axis in axes[-1]:
        axis.set_xlabel("tokens")
    with atomic(path) as part:
        figure.savefig(part, dpi=110, format="png")
    plt.close(figure)


def main(args: LadderArguments) -> None:
    rungs = itertools.product(args.sources, range(len(args.sizes)), args.tokens)
    results = [climb(args, *rung) for rung in rungs]
    laws, out = fit(args, results), Path(args.out)
    first = columns(results, next(iter(args.sources)), "loss")[2]
    gains = {name: float((first - columns(results, name, "loss")[2]).mean()) for name in list(args.sources)[1:]}
    plot(results, laws, out / "ladder.png")
    line = json.dumps({"rungs": len(results), "mean_gain": gains, "laws": laws})
    print(table(results, laws))
    print(line)
    (out / "ladder.json").write_text(line + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(*TrlParser(LadderArguments).parse_args_and_config())
