"""Measures the memory that loading a sharded model takes, beside the size of its weights.

    python recipes/benchmark/load.py --layers 8 --hidden_size 2048

Writes a model of the configuration's shape, in bfloat16 and with nothing learnt, to a temporary folder, loads it in a
process of its own and prints the peak of that process's memory behind the imports. The figure is a ratio of bytes, so
other work on the machine does not change it.
"""

import json
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field

import torch
from transformers import AutoConfig
from trl import TrlParser

from cm3leon_hf import CM3LeonForCausalLM

LOAD = """
import json, resource, sys
import psutil, torch
from transformers import AutoModelForCausalLM
from cm3leon_hf import CM3LeonForCausalLM

before = psutil.Process().memory_info().rss
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
for weight in model.parameters():
    weight.view(torch.int16).amax()  # reads it: what is mapped from a file counts only then
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
print(json.dumps({"dtype": str(model.dtype), "weights": model.get_memory_footprint(), "peak": peak - before}))
"""


@dataclass
class LoadArguments:
    model_config: str = field(default="recipes/pretrain/7b", metadata={"help": "Folder with a model's config.json."})
    layers: int = field(default=0, metadata={"help": "Layers in place of the configuration's."})
    hidden_size: int = field(default=0, metadata={"help": "Width in place of the configuration's."})
    max_shard_size: str = field(default="200MB", metadata={"help": "Largest file of the weights."})


def shape(args: LoadArguments):
    width = {"hidden_size": args.hidden_size, "intermediate_size": 4 * args.hidden_size} if args.hidden_size else {}
    return AutoConfig.from_pretrained(
        args.model_config, **width, **({"num_hidden_layers": args.layers} if args.layers else {})
    )


def main(args: LoadArguments) -> dict:
    with torch.device("meta"):
        model = CM3LeonForCausalLM(shape(args)).to(torch.bfloat16)
    model.to_empty(device="cpu")
    model.tie_weights()
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder, max_shard_size=args.max_shard_size)
        del model
        result = subprocess.run([sys.executable, "-c", LOAD, folder], capture_output=True, text=True, check=True)
    found = json.loads(result.stdout.splitlines()[-1])
    found["ratio"] = round(found["peak"] / found["weights"], 3)
    print(json.dumps(found))
    return found


if __name__ == "__main__":
    main(*TrlParser(LoadArguments).parse_args_and_config())
