"""Runs train.py with each learning rate and batch of the paper's search grid (appendix E.1), and prints what came.

    python recipes/sft/grid.py --config recipes/sft/grid.yaml

Each run is a process of its own, started by `launcher`. A search that was stopped goes on: finished runs are read, the
one that was stopped goes on from its checkpoint.
"""

import itertools
import json
import shlex
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

from trl import TrlParser

TRAIN = Path(__file__).with_name("train.py")


@dataclass
class GridArguments:
    recipe: str = field(metadata={"help": "YAML of train.py, with something to measure the loss on."})
    out: str = field(metadata={"help": "Folder with a folder for each run."})
    learning_rates: list[float] = field(default_factory=lambda: [1e-5, 3e-5, 5e-5, 1e-4], metadata={"help": "Rates."})
    batch_sizes: list[int] = field(default_factory=lambda: [4, 8, 16], metadata={"help": "Batches on each device."})
    flags: str = field(default="", metadata={"help": "Further flags of train.py, for all runs."})
    launcher: str = field(default="", metadata={"help": "Starts train.py, such as 'accelerate launch'; else Python."})


def command(args: GridArguments, rate: float, batch: int, folder: Path) -> list[str]:
    values = {"config": args.recipe, "learning_rate": rate, "per_device_train_batch_size": batch, "output_dir": folder}
    flags = [word for name, value in values.items() for word in (f"--{name}", str(value))]
    return [*(shlex.split(args.launcher) or [sys.executable]), str(TRAIN), *flags, *shlex.split(args.flags)]


def held_out_loss(args: GridArguments, rate: float, batch: int) -> float:
    """The loss of a run, which is done first if it is not yet."""
    folder = Path(args.out) / f"rate-{rate:g}-batch-{batch}"
    results = folder / "eval_results.json"
    if not results.is_file():
        subprocess.run(command(args, rate, batch, folder), check=True)
    if not results.is_file():
        raise ValueError(f"expected {results} from train.py, found none; name an eval_split in {args.recipe}, or go on")
    return json.loads(results.read_text(encoding="utf-8"))["eval_loss"]


def table(losses: dict[tuple[float, int], float], args: GridArguments) -> str:
    """Held-out losses, a row for each rate and a column for each batch, the least marked."""
    best = min(losses.values())
    lines = [["rate / batch", *map(str, args.batch_sizes)]]
    for rate in args.learning_rates:
        row = [losses[rate, batch] for batch in args.batch_sizes]
        lines.append([f"{rate:g}", *(f"{loss:.4f}{'*' if loss == best else ''}" for loss in row)])
    return "\n".join("  ".join(f"{cell:>12}" for cell in line) for line in lines)


def main(args: GridArguments) -> None:
    grid = itertools.product(args.learning_rates, args.batch_sizes)
    print(table({(rate, batch): held_out_loss(args, rate, batch) for rate, batch in grid}, args))


if __name__ == "__main__":
    main(*TrlParser(GridArguments).parse_args_and_config())
