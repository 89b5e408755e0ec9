"""Measures training against transformers' OPT in the same Trainer, and the data pipeline against a plain loop.

    python recipes/benchmark/train.py --out runs/benchmark

Both models have the same shape, random weights and the same packed sequences of made-up rows, and take turns: ours,
OPT, OPT, ours, so that a machine that gets slower or faster meanwhile is so for both. The share of the
machine's rate (MFU) counts the model's operations against a measured matrix product. The last line is JSON. Run it on
an otherwise idle machine; the pipeline runs on one core (`OMP_NUM_THREADS=1`).
"""

import json
import os
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from multiprocessing import get_context
from pathlib import Path

import datasets
import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, OPTConfig, OPTForCausalLM, PreTrainedTokenizerFast, TrainingArguments
from trl import TrlParser

from cm3leon_hf import CM3LeonForCausalLM
from cm3leon_hf.data.packing import IGNORED
from cm3leon_hf.data.sources import Source, open_sources
from cm3leon_hf.data.stream import PackedStream
from cm3leon_hf.data.transform import CM3Transform
from cm3leon_hf.training.pretraining import PretrainingTrainer
from cm3leon_hf.vocabulary import Vocabulary

RECIPES = Path(__file__).parents[1] / "pretrain"


@dataclass
class TrainBenchmarkArguments:
    out: str = field(default="runs/benchmark", metadata={"help": "Folder for the JSON line."})
    shapes: list[str] = field(
        default_factory=lambda: ["350m", "760m"] if torch.cuda.is_available() else ["tiny", "350m"],
        metadata={"help": "Folders of recipes/pretrain; an empty list measures the pipeline alone."},
    )
    length: int = field(default=4096, metadata={"help": "Tokens of a sequence."})
    sequences: int = field(default=1, metadata={"help": "Sequences of a step."})
    steps: int = field(default=3, metadata={"help": "Steps of a turn behind two first ones; the median of all counts."})
    rows: int = field(default=4096, metadata={"help": "Made-up rows."})
    rounds: int = field(default=5, metadata={"help": "Rounds of the pipeline; the fastest counts."})
    compile: bool = field(default=False, metadata={"help": "Whether to compile both models."})


def made_up_rows(count: int, vocabulary: Vocabulary, folder: Path) -> None:
    """Parquet with captions of 8 to 40 words, and codes."""
    rng = np.random.default_rng(0)
    captions = [" ".join(f"word{n}" for n in rng.integers(0, 999, rng.integers(8, 41))) for _ in range(count)]
    codes = rng.integers(0, vocabulary.image_size, (count, vocabulary.image_length), dtype=np.uint16)
    kinds = {"captions": datasets.Value("string"), "codes": datasets.List(datasets.Value("uint16"))}
    rows = datasets.Dataset.from_dict({"captions": captions, "codes": codes}, features=datasets.Features(kinds))
    rows.to_parquet(folder / "rows.parquet")


def word_tokenizer(vocabulary: Vocabulary) -> PreTrainedTokenizerFast:
    """Byte-level BPE of the words' letters, so that a word is several ids as in a trained tokenizer."""
    letters = [*vocabulary.special_tokens, *sorted(pre_tokenizers.ByteLevel.alphabet()), "wo", "rd", "word"]
    merges = [("w", "o"), ("r", "d"), ("wo", "rd")]
    tokenizer = Tokenizer(models.BPE({letter: index for index, letter in enumerate(letters)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def stream(folder: Path, vocabulary: Vocabulary, length: int) -> PackedStream:
    transform = CM3Transform(word_tokenizer(vocabulary), vocabulary, length, overflow="stream")
    return PackedStream(open_sources([Source("parquet", str(folder / "*.parquet"), streaming=True)]), transform)


def pipeline_rate(packed: PackedStream, rounds: int, tokens: int) -> float:
    """Tokens a second from Parquet to packed CM3 sequences, padding left out; the fastest of the rounds."""
    rates, sequences = [], iter(packed)
    for _ in range(rounds):
        begin, count = time.perf_counter(), 0
        while count < tokens:
            count += int((next(sequences)["labels"] != IGNORED).sum())
        rates.append(count / (time.perf_counter() - begin))
    return max(rates)


def loop_rate(folder: Path, packed: PackedStream, rounds: int, rows: int) -> float:
    """Tokens a second of the same rules in a loop over rows and lists."""
    data = open_sources([Source("parquet", str(folder / "*.parquet"), streaming=True)])
    return max(_loop_round(islice(data, rows), packed.transform) for _ in range(rounds))


def _loop_round(rows, transform: CM3Transform) -> float:
    begin, rng, vocab = time.perf_counter(), np.random.default_rng(0), transform.vocabulary
    stream, count, length = [], 0, transform.max_length
    for row in rows:
        text = transform.tokenizer(row["captions"], add_special_tokens=False)["input_ids"]
        image = [code + vocab.text_size for code in row["codes"]]
        ids = [vocab.eos_id, *text, vocab.break_id, *image, vocab.eos_id]
        if rng.poisson(1.0) and len(stream) % length + len(ids) + 2 <= length:
            places = [(1, 1 + len(text)), (2 + len(text), len(ids) - 1)]
            first, last = sorted(rng.integers(*places[rng.integers(2)], size=2))
            span = ids[first : last + 1]
            ids = [*ids[:first], vocab.mask_id, *ids[last + 1 : -1], vocab.infill_id, *span, vocab.eos_id]
        stream += ids
        while len(stream) >= length:
            torch.tensor(stream[:length])
            stream, count = stream[length:], count + length
    return count / (time.perf_counter() - begin)


def build(shape: str, kind: str, length: int):
    config = AutoConfig.from_pretrained(
        RECIPES / shape, max_position_embeddings=length, text_vocab_size=56320, image_vocab_size=8192,
        image_grid_size=32, use_cache=False,
    )  # fmt: skip
    if kind == "ours":
        return CM3LeonForCausalLM(config)
    sizes = {name: getattr(config, name) for name in ("hidden_size", "num_hidden_layers", "num_attention_heads")}
    return OPTForCausalLM(
        OPTConfig(
            vocab_size=config.vocab_size,
            ffn_dim=config.intermediate_size,
            word_embed_proj_dim=config.hidden_size,
            max_position_embeddings=length,
            use_cache=False,
            **sizes,
        )
    )


def logged_steps(
    args: TrainBenchmarkArguments, shape: str, kind: str, packed: PackedStream, vocabulary: Vocabulary
) -> list[dict]:
    """What the Trainer logs at each step of a new model, the first two left out."""
    with tempfile.TemporaryDirectory() as folder:
        training = TrainingArguments(
            folder,
            max_steps=args.steps + 2,
            per_device_train_batch_size=args.sequences,
            bf16=True,
            use_cpu=not torch.cuda.is_available(),
            optim="adamw_torch_fused",
            torch_compile=args.compile,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            remove_unused_columns=False,
            dataloader_num_workers=1,
        )
        model = build(shape, kind, args.length)
        trainer = PretrainingTrainer(model=model, args=training, train_dataset=packed, vocabulary=vocabulary)
        trainer.train()
    return [log for log in trainer.state.log_history if "tokens_per_second" in log][2:]


def in_new_process(function: Callable, *arguments):
    """What a function returns in a process that gives all its memory back."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
        return process.submit(function, *arguments).result()


def training_rates(
    args: TrainBenchmarkArguments, shape: str, packed: PackedStream, vocabulary: Vocabulary
) -> dict[str, dict[str, float]]:
    """What each model's Trainer logs at the median step of its turns."""
    logs = {kind: [] for kind in ("ours", "opt")}
    for kind in (*logs, *reversed(logs)):
        logs[kind] += in_new_process(logged_steps, args, shape, kind, packed, vocabulary)
    wanted = ("tokens_per_second", "fraction_of_matmul_rate", "data_wait_share")
    return {kind: {name: float(np.median([log[name] for log in logs[kind]])) for name in wanted} for kind in logs}


def main(args: TrainBenchmarkArguments) -> None:
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # as the recipe: the rate of one core
    vocabulary, results = Vocabulary(), {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        made_up_rows(args.rows, vocabulary, folder)
        packed = stream(folder, vocabulary, args.length)
        pipeline = pipeline_rate(packed, args.rounds, 1_000_000)
        loop = loop_rate(folder, packed, args.rounds, min(args.rows, 500))
        results |= {"pipeline_tokens_per_s_core": round(pipeline), "pipeline_over_loop": round(pipeline / loop, 1)}
        for shape in args.shapes:
            rates = training_rates(args, shape, packed, vocabulary)
            print(f"{shape}: {rates}")
            ours, opt = rates["ours"], rates["opt"]
            results |= {
                f"tokens_per_s_{shape}": ours["tokens_per_second"],
                f"over_opt_trainer_{shape}": round(ours["tokens_per_second"] / opt["tokens_per_second"], 3),
                f"mfu_{shape}": ours["fraction_of_matmul_rate"],
                "data_wait_share": max(ours["data_wait_share"], results.get("data_wait_share", 0.0)),
            }
    if args.shapes:
        largest = args.shapes[-1]
        results |= {"over_opt_trainer": results[f"over_opt_trainer_{largest}"], "mfu": results[f"mfu_{largest}"]}
    Path(args.out).mkdir(parents=True, exist_ok=True)
    (Path(args.out) / "train.json").write_text(json.dumps(results, indent=2), encoding="utf-8")
    print(json.dumps(results))


if __name__ == "__main__":
    main(*TrlParser(TrainBenchmarkArguments).parse_args_and_config())
