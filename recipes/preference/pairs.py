"""Draws pictures for captions and keeps of each caption the best and the worst by CLIP, for dpo.py.

    python recipes/preference/pairs.py --dataset data/emoji-codes --out data/emoji-pairs

Every value is a flag, or a key of a YAML given with `--config`.
"""

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset
from grpo import RewardArguments, captions
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoProcessor, set_seed
from trl import TrlParser

from cm3leon_hf import default_clip, default_model
from cm3leon_hf.evaluation.clip_score import CLIPScorer
from cm3leon_hf.training.preference import PictureReward


@dataclass
class PairArguments(RewardArguments):
    out: str = field(default="data/pairs", metadata={"help": "Folder for the pairs."})
    model: str = field(default="", metadata={"help": "Model folder; the shipped one by default."})
    count: int = field(default=0, metadata={"help": "Captions to draw, chosen at random; 0 for all."})
    candidates: int = field(default=4, metadata={"help": "Pictures for each caption."})
    batch_size: int = field(default=8, metadata={"help": "Captions drawn at a time."})
    margin: float = field(default=0.02, metadata={"help": "Cosines that the best is better by, or there is no pair."})
    guidance_scale: float = field(default=1.0, metadata={"help": "Classifier-free guidance."})
    top_p: float = field(default=1.0, metadata={"help": "Nucleus sampling."})
    seed: int = field(default=0, metadata={"help": "Seed of the sampling."})

    def __post_init__(self):
        if self.candidates < 2:
            raise ValueError(f"expected at least 2 candidates, of which one is better, got {self.candidates}")


def draw_pairs(args: PairArguments, model, reward: PictureReward, wanted: list[str]) -> list[dict]:
    """Rows with `caption`, `prompt_ids`, `chosen_ids`, `rejected_ids`, and the two scores."""
    inputs = reward.processor.for_text_to_image(wanted).to(model.device)
    ids = model.generate(
        **inputs,
        generation_mode="image",
        do_sample=True,
        top_k=0,
        top_p=args.top_p,
        guidance_scale=args.guidance_scale,
        num_return_sequences=args.candidates,
    )
    drawn = ids[:, -reward.processor.vocabulary.image_length :].cpu()
    scores = np.reshape(reward(drawn.tolist(), np.repeat(wanted, args.candidates).tolist()), (len(wanted), -1))
    drawn = drawn.view(len(wanted), args.candidates, -1)
    rows = []
    for caption, prompt, mask, pictures, row in zip(
        wanted, inputs["input_ids"], inputs["attention_mask"], drawn, scores
    ):
        best, worst = row.argmax(), row.argmin()
        if row[best] - row[worst] >= args.margin:
            ids = {"prompt_ids": prompt[mask.bool()], "chosen_ids": pictures[best], "rejected_ids": pictures[worst]}
            ids = {name: value.tolist() for name, value in ids.items()}
            rows.append({"caption": caption, **ids, "chosen_score": row[best], "rejected_score": row[worst]})
    return rows


def main(args: PairArguments) -> None:
    set_seed(args.seed)
    wanted = captions(args.dataset, args.split)
    wanted = np.random.default_rng(args.seed).permutation(wanted)[: args.count or None].tolist()
    path, device = args.model or default_model(), torch.accelerator.current_accelerator(check_available=True) or "cpu"
    model, processor = AutoModelForCausalLM.from_pretrained(path).to(device), AutoProcessor.from_pretrained(path)
    reward = PictureReward(processor, CLIPScorer(args.clip_model or default_clip(), args.clip_weights))
    rows = []
    for start in tqdm(range(0, len(wanted), args.batch_size), desc="pairs"):
        rows += draw_pairs(args, model, reward, wanted[start : start + args.batch_size])
    if not rows:
        raise ValueError(
            f"expected pairs that differ by {args.margin}, got none of {len(wanted)} captions; lower margin"
        )
    Dataset.from_list(rows).to_parquet(Path(args.out) / "data" / "train-00000-of-00001.parquet")
    gain = np.mean([row["chosen_score"] - row["rejected_score"] for row in rows])
    print(f"{len(rows)} pairs of {len(wanted)} captions, {gain:.3f} apart: {args.out}")


if __name__ == "__main__":
    main(*TrlParser(PairArguments).parse_args_and_config())
