"""Draws held-out prompts beside the artists' own pictures, to see what a model has learnt to compose.

    python recipes/pretrain/samples.py --dataset data/emoji --out runs/samples.png

The prompts are (concept, style) pairs of a held-out split, each concept once, without skin tones, in an order that a
hash decides: one sample each, none picked by hand.
"""

import hashlib
from dataclasses import dataclass, field

from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoProcessor, set_seed
from trl import TrlParser

from cm3leon_hf import default_model
from cm3leon_hf.grid import draw_grid
from cm3leon_hf.progress import TokenProgress


@dataclass
class SampleArguments:
    dataset: str = field(metadata={"help": "Folder of the emoji data set."})
    out: str = field(metadata={"help": "Picture to write."})
    model: str = field(default="", metadata={"help": "Model folder; the shipped one by default."})
    split: str = field(default="heldout_pairs", metadata={"help": "Split whose captions are the prompts."})
    count: int = field(default=24, metadata={"help": "Prompts."})
    guidance_scale: float = field(default=3.0, metadata={"help": "Classifier-free guidance."})
    top_p: float = field(default=0.9, metadata={"help": "Nucleus sampling."})
    temperature: float = field(default=1.0, metadata={"help": "Sampling temperature."})
    seed: int = field(default=0, metadata={"help": "Seed of the sampling."})


def held_out_rows(args: SampleArguments) -> list[dict]:
    rows = load_dataset(args.dataset, split=args.split).filter(lambda tone: not tone, input_columns="skin_tone")
    names = {row["concept"]: index for index, row in enumerate(rows.select_columns("concept"))}
    ordered = sorted(names, key=lambda name: hashlib.sha256(name.encode()).hexdigest())
    return [rows[names[name]] for name in ordered[: args.count]]


def main(args: SampleArguments) -> None:
    rows = held_out_rows(args)
    prompts = [row["captions"][0] for row in rows]
    path = args.model or default_model()
    model, processor = AutoModelForCausalLM.from_pretrained(path), AutoProcessor.from_pretrained(path)
    set_seed(args.seed)
    ids = model.generate(
        **processor.for_text_to_image(prompts),
        generation_mode="image",
        do_sample=True,
        guidance_scale=args.guidance_scale,
        top_p=args.top_p,
        temperature=args.temperature,
        streamer=TokenProgress(processor.vocabulary.image_length, "drawing"),
    )
    drawn = processor.post_process_multimodal_output(ids, generation_mode="image")
    images = [image for pair in zip(drawn, (row["image"] for row in rows)) for image in pair]
    labels = [label for prompt in prompts for label in (prompt, "the artist's")]
    draw_grid(images, labels, columns=8).save(args.out)
    print(args.out)


if __name__ == "__main__":
    main(*TrlParser(SampleArguments).parse_args_and_config())
