"""`cm3leon export`: a model folder that loads where this package is not installed."""

import json
import shutil
from pathlib import Path
from typing import Annotated

import typer

PROCESSOR = "processor_config.json"


def export(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="A model with its processor.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder to write, which is not there yet.")],
    results: Annotated[
        list[Path] | None, typer.Option(help="Evaluation to put into the card; may be given again.", show_default=False)
    ] = None,
):
    """
    Copy a model folder and put the code beside the weights.

    The copy, with everything else that lies in the folder, loads without this package:
    `AutoModelForCausalLM.from_pretrained(OUT, trust_remote_code=True)`; `AutoProcessor` and `pipeline` alike. Folders
    that `save_pretrained` has written carry the code already.

    **Example**

    `cm3leon export model_cards/cm3leon-emoji export && hf upload USER/cm3leon-emoji export`
    """
    import torch
    from transformers import AutoConfig, AutoProcessor
    from transformers.dynamic_module_utils import custom_object_save

    from .modeling_cm3leon import CM3LeonForCausalLM
    from .training.cards import add_results, check_results

    check_results(folder, results or [])
    if out.exists():
        raise ValueError(f"expected a folder to write that is not there yet, got {out}; remove it or name another")
    config, processor = AutoConfig.from_pretrained(folder), AutoProcessor.from_pretrained(folder, device="cpu")
    with torch.device("meta"):
        model = CM3LeonForCausalLM(config)
    shutil.copytree(folder, out)
    custom_object_save(model, out, config)
    config.save_pretrained(out)
    settings = json.loads((folder / PROCESSOR).read_text("utf-8"))
    custom_object_save(processor, out, settings)
    (out / PROCESSOR).write_text(f"{json.dumps(settings, indent=2, sort_keys=True)}\n", "utf-8")
    for run in results or []:
        add_results(out, run)
    print(out)
