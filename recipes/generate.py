"""Draws a picture for each line of a file, on any number of processes; a stopped run goes on where it was.

    python recipes/generate.py --prompts prompts.txt --model model_cards/cm3leon-emoji --out runs/drawn
    accelerate launch --multi_gpu recipes/generate.py --config YAML

Each process draws every n-th batch. A batch's seed follows from `seed` and its number, so the pictures do not depend on
the number of processes. `metadata.jsonl` makes their folder a data set, `load_dataset("imagefolder", data_dir=…)`.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoProcessor
from trl import TrlParser

from cm3leon_hf import default_model
from cm3leon_hf.evaluation.files import atomic
from cm3leon_hf.evaluation.processes import start_processes
from cm3leon_hf.evaluation.runs import Run
from cm3leon_hf.evaluation.settings import Setting
from cm3leon_hf.retrieval.encoder import fingerprint

NAME = "pictures"


@dataclass
class GenerateArguments:
    prompts: str = field(metadata={"help": "File with a prompt a line; empty lines are left out."})
    out: str = field(metadata={"help": "Folder of the run; the pictures are in drawn/pictures."})
    model: str = field(default_factory=default_model, metadata={"help": "Model folder or hub name."})
    num_images: int = field(default=1, metadata={"help": "Pictures for each prompt."})
    batch_size: int = field(default=32, metadata={"help": "Prompts at a time."})
    strategy: str = field(default="cfg", metadata={"help": "cfg or cd-k."})
    generate: dict = field(default_factory=dict, metadata={"help": "Further arguments of generate (in the YAML)."})
    seed: int = field(default=0, metadata={"help": "Seed of all draws."})

    def __post_init__(self):
        if self.num_images < 1 or self.batch_size < 1:
            raise ValueError(f"expected num_images and batch_size >= 1, got {self.num_images} and {self.batch_size}")


def read_prompts(path: str, times: int) -> list[str]:
    """The lines of a file, each so many times."""
    lines = [line.strip() for line in Path(path).read_text("utf-8").splitlines() if line.strip()]
    if not lines:
        raise ValueError(f"expected prompts in {path}, a line each, got none; write what to draw")
    return [line for line in lines for _ in range(times)]


def main(args: GenerateArguments) -> None:
    prompts = read_prompts(args.prompts, args.num_images)
    setting = Setting(NAME, args.generate, args.strategy)
    state = start_processes()
    model = AutoModelForCausalLM.from_pretrained(args.model).eval()
    facts = {"model": f"{Path(args.model).name}@{fingerprint(model)}", "prompts": prompts}
    processor = AutoProcessor.from_pretrained(args.model, device=state.device)
    run = Run(Path(args.out), args.batch_size, args.seed, state.process_index, state.num_processes)
    run.start(facts, {NAME: {"arguments": setting.arguments, "strategy": args.strategy}})
    run.draw(setting, prompts, model.to(state.device), processor)
    state.wait_for_everyone()
    if state.is_main_process:
        drawn = run.drawn(setting, len(prompts))
        with atomic(drawn[0].with_name("metadata.jsonl")) as part:
            rows = ({"file_name": path.name, "text": prompt} for path, prompt in zip(drawn, prompts))
            part.write_text("".join(f"{json.dumps(row, ensure_ascii=False)}\n" for row in rows), "utf-8")
        print(f"{len(prompts)} pictures in {drawn[0].parent}")


if __name__ == "__main__":
    main(*TrlParser(GenerateArguments).parse_args_and_config())
