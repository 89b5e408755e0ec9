"""What decode.py measures: the rows of its table, all of one shape."""

from dataclasses import dataclass, field

STRATEGIES = {
    "plain": {},
    "CFG": {"guidance_scale": 3.0},
    "CD-K": {"contrastive_alpha": 0.1, "contrastive_k": 8},
    "image+text": {"image_guidance_scale": 1.5, "guidance_scale": 7.5},
}


@dataclass
class DecodeArguments:
    out: str = field(default="runs/benchmark", metadata={"help": "Folder for the table and the plot."})
    shape: str = field(default="350M", metadata={"help": "350M or 7B of the paper, or tiny to try the script."})
    grid: int = field(default=16, metadata={"help": "Tokens along one side of the picture that is drawn."})
    prompt: int = field(default=16, metadata={"help": "Tokens of the prompt."})
    repeats: int = field(default=3, metadata={"help": "Runs of each row behind a first one; the middle one counts."})
    together: int = field(
        default=8, metadata={"help": "Rows that are held in memory and take turns, so that their moments are the same."}
    )
    only: str = field(
        default="", metadata={"help": "Measure only rows whose name holds this, and no figures of the shipped model."}
    )


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    model: str  # ours, stock or Janus
    strategy: str
    batch: int = 1
    weights: str = "bf16"
    options: tuple = ()

    @property
    def name(self) -> str:
        return " ".join([self.model, self.strategy, *self.options, self.weights, f"batch {self.batch}"])


ROWS = [  # those that the figures compare first
    Row("stock", "plain"),
    Row("stock", "CFG"),
    Row("Janus", "CFG"),
    *(Row("ours", strategy, options=("compiled",)) for strategy in ("plain", "CFG")),
    Row("ours", "CFG", 16, options=("compiled",)),
    *(Row("ours", "CFG", weights=weights, options=("compiled",)) for weights in ("int8", "int4")),
    Row("ours", "CFG", options=("as loaded",)),
    *(Row("ours", strategy) for strategy in STRATEGIES),
    Row("ours", "CFG", options=("Jacobi",)),
    *(Row("ours", "CFG", batch) for batch in (4, 16)),
    *(Row("ours", strategy, weights=weights) for weights in ("int8", "int4") for strategy in ("plain", "CFG")),
    *(Row("ours", "CFG", batch, "int8") for batch in (4, 16)),
    *(Row("ours", "CFG", 4, weights, ("compiled",)) for weights in ("bf16", "int8")),
    Row("ours", "CFG", 16, "int8", ("compiled",)),
]
