"""Draws held-out prompts beside the artists' own pictures, to see what a model has learnt to compose.

    python recipes/pretrain/samples.py --dataset data/emoji --out runs/samples.png
    python recipes/pretrain/samples.py --dataset data/emoji --out runs/retrieval.png --count 10 --retrieve 2

The prompts are (concept, style) pairs of a held-out split, each concept once, without skin tones, in an order that a
hash decides: one sample each, or the one of several that CLIP picks, none picked by hand. With `--retrieve 2` each
prompt has the artist's picture, what was retrieved, and what was drawn without and with it.
"""

import hashlib
from dataclasses import dataclass, field

from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoProcessor, set_seed
from trl import TrlParser

from cm3leon_hf import default_model
from cm3leon_hf.cli_loading import load_augmenter, load_clip
from cm3leon_hf.evaluation.reranking import draw_candidates, rank
from cm3leon_hf.grid import draw_grid
from cm3leon_hf.progress import TokenProgress
from cm3leon_hf.retrieval.documents import document_cells


@dataclass
class SampleArguments:
    dataset: str = field(metadata={"help": "Folder of the emoji data set."})
    out: str = field(metadata={"help": "Picture to write."})
    model: str = field(default="", metadata={"help": "Model folder; the shipped one by default."})
    split: str = field(default="heldout_pairs", metadata={"help": "Split whose captions are the prompts."})
    count: int = field(default=24, metadata={"help": "Prompts."})
    candidates: int = field(default=1, metadata={"help": "Pictures drawn for each prompt, of which CLIP picks one."})
    retrieve: int = field(default=0, metadata={"help": "Retrieved documents in front of each prompt: 0, 1 or 2."})
    bank: str = field(default="", metadata={"help": "Memory bank; the shipped one by default."})
    clip_model: str = field(default="", metadata={"help": "The bank's CLIP; the shipped one by default."})
    clip_weights: str = field(default="", metadata={"help": "Name or file of its weights."})
    guidance_scale: float = field(default=3.0, metadata={"help": "Classifier-free guidance."})
    top_p: float = field(default=0.9, metadata={"help": "Nucleus sampling."})
    temperature: float = field(default=1.0, metadata={"help": "Sampling temperature."})
    seed: int = field(default=0, metadata={"help": "Seed of the sampling."})


def held_out_rows(args: SampleArguments) -> list[dict]:
    rows = load_dataset(args.dataset, split=args.split).filter(lambda tone: not tone, input_columns="skin_tone")
    names = {row["concept"]: index for index, row in enumerate(rows.select_columns("concept"))}
    ordered = sorted(names, key=lambda name: hashlib.sha256(name.encode()).hexdigest())
    return [rows[names[name]] for name in ordered[: args.count]]


def draw(args: SampleArguments, model, processor, prompts: list[str], retrieved: list[list[dict]] | None) -> list:
    """One picture for each prompt."""
    set_seed(args.seed)
    strategy = {"guidance_scale": args.guidance_scale, "top_p": args.top_p, "temperature": args.temperature}
    length = processor.vocabulary.image_length
    pools = draw_candidates(
        model,
        processor,
        prompts,
        args.candidates,
        [strategy],
        streamer=lambda: TokenProgress(length, "drawing"),
        retrieved=retrieved,
    )
    if args.candidates > 1:
        pools = rank(pools, prompts, load_clip(args.clip_model, args.clip_weights), keep=1)
    return [pool[0].image for pool in pools]


def main(args: SampleArguments) -> None:
    rows = held_out_rows(args)
    prompts = [row["captions"][0] for row in rows]
    path = args.model or default_model()
    model, processor = AutoModelForCausalLM.from_pretrained(path), AutoProcessor.from_pretrained(path)
    drawn = draw(args, model, processor, prompts, None)
    if args.retrieve:
        augmenter = load_augmenter(args.bank, load_clip(args.clip_model, args.clip_weights))
        retrieved = augmenter.for_prompts(prompts, args.retrieve)
        behind, shown = draw(args, model, processor, prompts, retrieved), document_cells(retrieved, processor)
        cells = [
            [(row["image"], f"{prompt}: the artist's"), *documents, (one, "drawn without"), (other, "drawn with")]
            for row, prompt, documents, one, other in zip(rows, prompts, shown, drawn, behind)
        ]
    else:
        cells = [[(image, prompt), (row["image"], "the artist's")] for row, prompt, image in zip(rows, prompts, drawn)]
    columns = len(cells[0]) * (2 if args.retrieve else 4)
    draw_grid(*zip(*(cell for row in cells for cell in row)), columns=columns).save(args.out)
    print(args.out)


if __name__ == "__main__":
    main(*TrlParser(SampleArguments).parse_args_and_config())
