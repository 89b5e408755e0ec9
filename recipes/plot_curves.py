"""Plots what a training run logged: the training loss, and whatever was measured on held-out data.

python recipes/plot_curves.py --run runs/cm3leon-emoji --out curves.png
"""

import json
from dataclasses import dataclass, field
from pathlib import Path

import matplotlib.pyplot as plt
from trl import TrlParser

from cm3leon_hf.training.checkpoints import last_whole_checkpoint

LABELS = {"loss": "loss", "psnr": "PSNR in dB", "perplexity": "perplexity"}


@dataclass
class CurveArguments:
    run: str = field(metadata={"help": "Output folder of a training run; its last checkpoint is read."})
    out: str = field(metadata={"help": "Picture to write."})
    metrics: list[str] = field(
        default_factory=lambda: [
            "loss",
            "eval_loss",
            "eval_psnr",
            "psnr",
            "eval_text_perplexity",
            "eval_image_perplexity",
        ],
        metadata={"help": "What to plot, if logged."},
    )


def main(args: CurveArguments) -> None:
    history = json.loads((Path(last_whole_checkpoint(args.run)) / "trainer_state.json").read_text())["log_history"]
    curves = {name: [(entry["step"], entry[name]) for entry in history if name in entry] for name in args.metrics}
    panels = {kind: [n for n in curves if curves[n] and n.endswith(kind)] for kind in LABELS}
    panels = {kind: names for kind, names in panels.items() if names}
    figure, axes = plt.subplots(1, len(panels), figsize=(5 * len(panels), 3.5), squeeze=False, layout="constrained")
    for axis, (kind, names) in zip(axes[0], panels.items()):
        for name in names:
            modality = name.removeprefix("eval_").removesuffix(kind).strip("_")
            label = f"{'held out' if 'eval_' in name else 'training'} {modality}".strip()
            axis.plot(*zip(*curves[name]), label=label)
        axis.set(xlabel="step", ylabel=LABELS[kind], yscale="log" if kind == "perplexity" else "linear")
        axis.yaxis.set_major_formatter("{x:g}")
        axis.yaxis.set_minor_formatter("{x:g}")
        axis.legend()
    figure.savefig(args.out, dpi=100)
    print(args.out)


if __name__ == "__main__":
    main(*TrlParser(CurveArguments).parse_args_and_config())
