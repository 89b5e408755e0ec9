"""Time and memory of a fine-tuning step: LoRA against all weights, by the same Trainer on the same documents.

    python recipes/benchmark/sft.py --out runs/benchmark

All weights are trained in float32 under bfloat16 autocast, adapters over a base in bfloat16, as the recipes do. Each
runs in a process of its own; on a CPU its memory is the most that the process held beyond what its imports took. The
last line is JSON.
"""

import json
import multiprocessing
import resource
import statistics
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import torch
from peft import LoraConfig
from tokenizers import Tokenizer, models
from transformers import AutoConfig, PreTrainedTokenizerFast, TrainerCallback
from trl import SFTConfig, TrlParser

from cm3leon_hf import CM3LeonForCausalLM
from cm3leon_hf.training.adapters import TARGETS
from cm3leon_hf.training.instruction import InstructionTrainer

RECIPES = Path(__file__).parents[1] / "pretrain"


@dataclass
class SFTBenchmarkArguments:
    out: str = field(default="runs/benchmark", metadata={"help": "Folder for the JSON."})
    shape: str = field(default="350m", metadata={"help": "Folder of recipes/pretrain."})
    length: int = field(default=2048, metadata={"help": "Tokens of a document."})
    documents: int = field(default=1, metadata={"help": "Documents of a step."})
    steps: int = field(default=5, metadata={"help": "Steps behind a first one; the median counts."})
    rank: int = field(default=16, metadata={"help": "Rank of the adapters."})


class StepTimes(TrainerCallback):
    def __init__(self):
        self.seconds, self.begin = [], 0.0

    def on_step_begin(self, args, state, control, **kwargs):
        self.begin = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.seconds.append(time.perf_counter() - self.begin)


class Documents(torch.utils.data.Dataset):
    """Documents of random ids."""

    def __init__(self, count: int, length: int, size: int):
        self.ids = torch.randint(size, (count, length), generator=torch.Generator().manual_seed(0)).numpy()

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict:
        return {"input_ids": self.ids[index], "labels": self.ids[index]}


def bytes_held() -> int:
    """The most memory so far: of the GPU where there is one, else of the process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def measure(args: SFTBenchmarkArguments, adapted: bool, folder: str) -> tuple[float, float]:
    """Seconds of the median step, and GiB."""
    before = bytes_held()
    sizes = {"max_position_embeddings": args.length, "use_cache": False}
    config = AutoConfig.from_pretrained(RECIPES / args.shape, **sizes)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = CM3LeonForCausalLM._from_config(config, dtype=torch.bfloat16 if adapted else torch.float32)
    training = SFTConfig(
        folder,
        max_steps=args.steps + 1,
        per_device_train_batch_size=args.documents,
        bf16=True,
        use_cpu=not torch.cuda.is_available(),
        optim="adamw_torch_fused",
        gradient_checkpointing=False,
        dataset_kwargs={"skip_prepare_dataset": True},
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    times = StepTimes()
    trainer = InstructionTrainer(
        model=model,
        args=training,
        train_dataset=Documents((args.steps + 1) * args.documents, args.length, config.vocab_size),
        processing_class=padding_tokenizer(),
        peft_config=LoraConfig(r=args.rank, lora_alpha=2 * args.rank, target_modules=TARGETS) if adapted else None,
        callbacks=[times],
    )
    trainer.train()
    return statistics.median(times.seconds[1:]), (bytes_held() - before) / 2**30


def padding_tokenizer() -> PreTrainedTokenizerFast:
    """TRL wants one to pad with."""
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({"<pad>": 0}, "<pad>")), pad_token="<pad>", eos_token="<pad>"
    )


def main(args: SFTBenchmarkArguments) -> None:
    found = {}
    for name, adapted in (("full", False), ("lora", True)):
        spawn = multiprocessing.get_context("spawn")
        with tempfile.TemporaryDirectory() as folder, ProcessPoolExecutor(1, spawn) as process:
            found[name] = process.submit(measure, args, adapted, folder).result()
        print(f"{name}: {found[name][0]:.2f} s a step, {found[name][1]:.2f} GiB")
    (full_seconds, full_memory), (seconds, memory) = found["full"], found["lora"]
    results = {
        "full_step_s": round(full_seconds, 3),
        "lora_step_s": round(seconds, 3),
        "lora_over_full_time": round(seconds / full_seconds, 3),
        "full_gib": round(full_memory, 2),
        "lora_gib": round(memory, 2),
        "lora_over_full_memory": round(memory / full_memory, 3),
    }
    Path(args.out).mkdir(parents=True, exist_ok=True)
    (Path(args.out) / "sft.json").write_text(json.dumps(results, indent=2), encoding="utf-8")
    print(json.dumps(results))


if __name__ == "__main__":
    main(*TrlParser(SFTBenchmarkArguments).parse_args_and_config())
