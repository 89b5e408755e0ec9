"""How decode.py measures: the time and memory of a row, and the time it takes to read the weights once."""

import resource
import time

import torch
from decode_models import build, our_config
from decode_rows import STRATEGIES, DecodeArguments, Row

from cm3leon_hf import CM3LeonConfig

RUNS = {}  # the functions that draw, by their row, of the rows that this process has prepared
SAMPLING = {"do_sample": True, "top_k": 0, "top_p": 0.9}


def prompts(row: Row, config: CM3LeonConfig, length: int) -> torch.LongTensor:
    ids = torch.randint(300, config.text_vocab_size, (row.batch, length), generator=torch.Generator().manual_seed(0))
    ids[:, 0] = config.vocabulary.eos_id
    if row.strategy == "image+text":  # something to edit
        ids[:, 1] = config.vocabulary.break_id
        ids[:, 2] = config.text_vocab_size
        ids[:, 3] = config.vocabulary.break_id
    ids[:, -1] = config.vocabulary.break_id
    return ids


def runner(row: Row, args: DecodeArguments):
    """A function that draws one batch."""
    config, model = our_config(args), build(row, args)
    ids, tokens = prompts(row, config, args.prompt).to(model.device), config.vocabulary.image_length
    arguments = dict(SAMPLING)
    if row.model == "Janus":
        arguments |= {"generation_mode": "image", "guidance_scale": 3.0, "attention_mask": torch.ones_like(ids)}
    elif row.model == "stock":
        arguments |= {"min_new_tokens": tokens, "max_new_tokens": tokens, "attention_mask": torch.ones_like(ids)}
        if row.strategy == "CFG":
            arguments |= {"guidance_scale": 3.0, "negative_prompt_ids": ids[:, [0, 1, -1]]}
    else:
        arguments |= {"generation_mode": "image"} | STRATEGIES[row.strategy]
        if "compiled" in row.options:
            arguments |= {"cache_implementation": "static"}  # generate() itself compiles then, on an accelerator
        if "Jacobi" in row.options:
            arguments |= {"jacobi_window": 16}
    return lambda: model.generate(ids, **arguments)


def prepare(row: Row, args: DecodeArguments) -> float:
    """Builds the model of a row and draws a first batch; its seconds."""
    RUNS[row] = runner(row, args)
    return draw(row)


def draw(row: Row) -> float:
    """Seconds that a batch takes."""
    start = time.perf_counter()
    RUNS[row]()
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
    return time.perf_counter() - start


def peak_bytes() -> int:
    """The most memory that this process has held: of the GPU, if there is one."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def read_bandwidth(size: int = 2**30) -> float:
    """Bytes a second at which memory is read: the best of seven searches of a tensor far beyond the caches."""
    device = torch.accelerator.current_accelerator(check_available=True) or "cpu"
    numbers = torch.ones(size // 4, device=device)
    best = 0.0
    for _ in range(7):
        start = time.perf_counter()
        numbers.amax()
        if torch.accelerator.is_available():
            torch.accelerator.synchronize()
        best = max(best, size / (time.perf_counter() - start))
    return best


def bytes_per_step(config: CM3LeonConfig) -> int:
    """Bytes of bf16 weights that one step for an image token needs: the layers, and the head's image rows."""
    layers = config.num_hidden_layers * (4 * config.hidden_size**2 + 2 * config.hidden_size * config.intermediate_size)
    return 2 * (layers + config.image_vocab_size * config.hidden_size)
