"""Perplexity of text and of image tokens on held-out rows, each with its interval.

    python recipes/evaluate/perplexity.py --config recipes/evaluate/perplexity.yaml --model MODEL

The data set is a hub name or a local folder, with `captions` and `codes`, or any other columns that training reads;
pictures are encoded first where there are no codes. Each setting of the YAML makes documents of the rows with fields of
`cm3leon_hf.data.transform.CM3Transform`, without moved spans unless it says so. The folder gets `results.json`,
`results.md` and `model_index.yml`; the last line printed is JSON. A run that was stopped goes on where it was. Several
GPUs: `accelerate launch` in place of `python`.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from accelerate import PartialState
from datasets import Dataset, load_dataset
from transformers import AutoModelForCausalLM, AutoProcessor
from trl import TrlParser

from cm3leon_hf import default_model
from cm3leon_hf.data.pretraining import CausalCollator, CM3Rows, fitting_rows
from cm3leon_hf.data.transform import CM3Transform
from cm3leon_hf.evaluation.files import read_pictures, readable_rows
from cm3leon_hf.evaluation.perplexity import MODALITIES, TokenLosses, measure_perplexities, modality_losses
from cm3leon_hf.evaluation.processes import start_processes
from cm3leon_hf.evaluation.results import markdown_table, summary, write_results
from cm3leon_hf.evaluation.runs import Run
from cm3leon_hf.retrieval.encoder import fingerprint

CODES = "codes"


@dataclass
class PerplexityArguments:
    model: str = field(default="", metadata={"help": "Model folder or hub name; the shipped one by default."})
    dataset: str = field(default="data/emoji", metadata={"help": "Hub name or local folder."})
    split: str = field(default="heldout_pairs", metadata={"help": "Split to measure on."})
    image_column: str = field(default="image", metadata={"help": "Column with pictures, where there are no codes."})
    count: int = field(default=0, metadata={"help": "First rows of the split; all by default."})
    settings: list[dict] = field(default_factory=list, metadata={"help": "Kinds of documents (in the YAML)."})
    out: str = field(default="runs/evaluate-perplexity", metadata={"help": "Folder of the run."})
    skip_broken: bool = field(default=False, metadata={"help": "Leave out pictures that cannot be read."})
    batch_size: int = field(default=16, metadata={"help": "Documents at a time."})
    resamples: int = field(default=200, metadata={"help": "Of the bootstrap."})
    seed: int = field(default=0, metadata={"help": "Of the wordings that are drawn, and of the bootstrap."})


def transforms(settings: list[dict], processor, length: int) -> dict[str, CM3Transform]:
    """
    What makes the documents of each setting.

    Raises:
        ValueError: for no settings, a name that occurs twice, or a field that there is not.
    """
    names = [one.get("name") for one in settings]
    if not names or None in names or len(set(names)) < len(names):
        raise ValueError(f"expected settings with different names, got {names}; name them")
    made = {}
    for name, one in zip(names, settings):
        fields = {"span_rate": 0.0} | {key: value for key, value in one.items() if key != "name"}
        try:
            made[name] = CM3Transform(processor.tokenizer, processor.vocabulary, length, **fields)
        except TypeError as error:
            raise ValueError(f"expected fields of CM3Transform in the setting {name}, got {one}: {error}") from error
    return made


def load_rows(args: PerplexityArguments) -> Dataset:
    rows = load_dataset(args.dataset, split=args.split)
    rows = rows.select(range(min(args.count or len(rows), len(rows))))
    if CODES in rows.column_names or args.image_column not in rows.column_names:
        return rows
    return readable_rows(rows, args.image_column, args.skip_broken)


def encoded(rows: Dataset, args: PerplexityArguments, run: Run, processor, state: PartialState) -> Dataset:
    """The rows with codes in place of pictures."""
    if CODES in rows.column_names or args.image_column not in rows.column_names:
        return rows
    run.answer(
        CODES, rows[args.image_column], lambda cells: processor.encode_images(list(read_pictures(cells))).tolist()
    )
    state.wait_for_everyone()
    codes = run.answered(CODES, len(rows))
    return rows.remove_columns(args.image_column).add_column(CODES, codes)


def losses_of(documents: CM3Rows, model, vocabulary):
    """Numbers of rows to what the model pays for each: `[total, tokens]` by modality."""
    collate = CausalCollator(pad_token_id=vocabulary.pad_id)

    def losses(numbers: Sequence[int]) -> list[dict]:
        found = modality_losses(model, [collate([documents[number] for number in numbers])], vocabulary)
        return [{name: [one.total[at], one.tokens[at]] for name, one in found.items()} for at in range(len(numbers))]

    return losses


def read_losses(answers: list[dict]) -> dict[str, TokenLosses]:
    return {name: TokenLosses(*np.array([one[name] for one in answers]).T) for name in MODALITIES}


def main(args: PerplexityArguments) -> None:
    state, path = start_processes(), args.model or default_model()
    rows = load_rows(args)
    model = AutoModelForCausalLM.from_pretrained(path).to(state.device)
    processor = AutoProcessor.from_pretrained(path, device=state.device)
    kinds = transforms(args.settings, processor, model.config.max_position_embeddings)
    name = Path(path).name
    facts = {"model": f"{name}@{fingerprint(model)}", "dataset": args.dataset, "split": args.split, "rows": len(rows)}
    run = Run(Path(args.out), args.batch_size, args.seed, state.process_index, state.num_processes)
    run.start(facts, {one["name"]: one for one in args.settings})
    rows = encoded(rows, args, run, processor, state)
    documents = {name: CM3Rows(fitting_rows(rows, kind), kind, args.seed) for name, kind in kinds.items()}
    for kind, made in documents.items():
        run.answer(kind, range(len(made)), losses_of(made, model, processor.vocabulary))
    state.wait_for_everyone()
    if state.is_main_process:
        measured = {
            kind: measure_perplexities(read_losses(run.answered(kind, len(made))), args.resamples, args.seed)
            for kind, made in documents.items()
        }
        card = {
            "model_name": name,
            "task_type": "any-to-any",
            "dataset_type": args.dataset,
            "dataset_name": args.dataset,
        }
        facts |= {"seed": args.seed, "resamples": args.resamples}
        write_results(Path(args.out), measured, facts, card | {"dataset_split": args.split})
        print(markdown_table(measured))
        print(json.dumps(summary(measured)))


if __name__ == "__main__":
    main(*TrlParser(PerplexityArguments).parse_args_and_config())
