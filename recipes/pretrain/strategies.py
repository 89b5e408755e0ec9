"""Draws the same prompts with every decoding strategy, fills a hole, and edits, to see what they do.

    python recipes/pretrain/strategies.py --out strategies.png

Each row is a prompt: without guidance, with classifier-free guidance of growing strength, with CD-K, and the one that
CLIP picks from candidates of both. Behind them that picture with a hole, the hole filled, and the picture as a model
that was tuned for it edits it.
"""

from dataclasses import dataclass, field

import numpy as np
from PIL import Image
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoProcessor, set_seed
from trl import TrlParser

from cm3leon_hf import default_clip, default_model, default_tuned_model
from cm3leon_hf.evaluation.clip_score import CLIPScorer
from cm3leon_hf.evaluation.reranking import CD_K, draw_candidates, generate_best
from cm3leon_hf.grid import draw_grid


@dataclass
class StrategyArguments:
    out: str = field(metadata={"help": "Picture to write."})
    prompts: list[str] = field(
        default_factory=lambda: ["red apple, fluent 3d style", "green heart, noto style", "clock, fluent flat style"],
        metadata={"help": "What to draw."},
    )
    instructions: list[str] = field(
        default_factory=lambda: ["make it twemoji style", "make it red", "make it noto style"],
        metadata={"help": "How to edit each prompt's picture."},
    )
    model: str = field(default="", metadata={"help": "Model folder; the shipped one by default."})
    tuned_model: str = field(default="", metadata={"help": "Folder of one that edits; the shipped one by default."})
    clip_model: str = field(default="", metadata={"help": "CLIP of open_clip; the shipped one by default."})
    clip_weights: str = field(default="", metadata={"help": "Name or file of its weights."})
    scales: list[float] = field(default_factory=lambda: [1.0, 2.0, 3.0, 5.0], metadata={"help": "Guidance to show."})
    top_p: float = field(default=0.9, metadata={"help": "Nucleus sampling of guidance."})
    candidates: int = field(default=8, metadata={"help": "Pictures of both strategies that CLIP picks from."})
    seed: int = field(default=0, metadata={"help": "Seed of every strategy."})

    def __post_init__(self):
        if len(self.instructions) != len(self.prompts):
            raise ValueError(
                f"expected an instruction for each of {len(self.prompts)} prompts, got {len(self.instructions)}"
            )


def with_hole(picture: Image.Image) -> tuple[Image.Image, Image.Image]:
    """The picture with its middle right third grey, and the mask of it."""
    mask = np.zeros(picture.size[::-1], np.uint8)
    height, width = mask.shape
    mask[height // 3 : 2 * height // 3, width // 2 : 5 * width // 6] = 255
    mask = Image.fromarray(mask)
    return Image.composite(Image.new("RGB", picture.size, "gray"), picture, mask), mask


def fill(model, processor, picture: Image.Image, mask: Image.Image, text: str) -> Image.Image:
    inputs = processor.for_infilling(picture, mask, text)
    ids = model.generate(**inputs, generation_mode="image", do_sample=True, guidance_scale=3.0)
    return processor.post_process_multimodal_output(ids, generation_mode="image")[0]


def edit(model, processor, picture: Image.Image, instruction: str) -> Image.Image:
    inputs = processor.for_editing(picture, instruction)
    ids = model.generate(
        **inputs, generation_mode="image", do_sample=True, guidance_scale=3.0, image_guidance_scale=1.5
    )
    return processor.post_process_multimodal_output(ids, generation_mode="image")[0]


def main(args: StrategyArguments) -> None:
    path = args.model or default_model()
    model, processor = AutoModelForCausalLM.from_pretrained(path), AutoProcessor.from_pretrained(path)
    scorer = CLIPScorer(args.clip_model or default_clip(), args.clip_weights)
    strategies = {f"CFG {scale:g}": {"guidance_scale": scale, "top_p": args.top_p} for scale in args.scales}
    strategies["CD-K"] = CD_K
    columns = {}
    for name, strategy in tqdm(strategies.items(), desc="strategies"):
        set_seed(args.seed)
        pools = draw_candidates(model, processor, args.prompts, 1, [strategy])
        columns[name] = [pool[0].image for pool in pools]
    set_seed(args.seed)
    best = generate_best(model, processor, args.prompts, scorer, args.candidates)
    columns[f"the best of {args.candidates} of both"] = [pool[0].image for pool in best]
    holes = [with_hole(picture) for picture in columns[f"the best of {args.candidates} of both"]]
    columns["a hole"] = [picture for picture, _ in holes]
    columns["filled"] = [
        fill(model, processor, pool[0].image, mask, prompt)
        for pool, (_, mask), prompt in zip(best, holes, args.prompts)
    ]
    tuned = AutoModelForCausalLM.from_pretrained(args.tuned_model or default_tuned_model())
    edited = [edit(tuned, processor, pool[0].image, text) for pool, text in zip(best, args.instructions)]
    rows = [
        [(pictures[row], name if at else f"{prompt}: {name}") for at, (name, pictures) in enumerate(columns.items())]
        + [(edited[row], args.instructions[row])]
        for row, prompt in enumerate(args.prompts)
    ]
    draw_grid(*zip(*(cell for row in rows for cell in row)), columns=len(rows[0]), cell=128).save(args.out)
    print(args.out)


if __name__ == "__main__":
    main(*TrlParser(StrategyArguments).parse_args_and_config())
