"""Evaluates a model on a held-out split of the emoji: what it draws from captions, and how it describes pictures.

    python recipes/evaluate/emoji.py --config recipes/evaluate/emoji.yaml

For every setting of the YAML, each held-out caption is drawn once and each held-out picture is described. The Fréchet
distance, precision and recall compare the drawn pictures with the artists'; CLIPScore and R@1 compare them with their
captions, as the row `real` does the artists' own; CIDEr compares the descriptions with the captions. The folder gets
the pictures, `results.json`, `results.md`, `model_index.yml` and plots; the last line printed is JSON. A run that was
stopped goes on where it was. Several GPUs: `accelerate launch` in place of `python`.
"""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
from accelerate import PartialState
from datasets import Dataset, load_dataset
from transformers import AutoModelForCausalLM, AutoProcessor
from trl import TrlParser

from cm3leon_hf import default_model
from cm3leon_hf.evaluation.captions import check_caption_metrics
from cm3leon_hf.evaluation.clip_score import CLIPScorer
from cm3leon_hf.evaluation.features import cached_statistics, load_network
from cm3leon_hf.evaluation.measuring import Judges, SeenPictures
from cm3leon_hf.evaluation.plots import plot_curve, plot_settings
from cm3leon_hf.evaluation.results import REAL, markdown_table, summary, write_results
from cm3leon_hf.evaluation.runs import Run
from cm3leon_hf.evaluation.settings import Setting, read_settings
from cm3leon_hf.retrieval.encoder import fingerprint


@dataclass
class EmojiArguments:
    dataset: str = field(metadata={"help": "Folder of the emoji data set."})
    out: str = field(metadata={"help": "Folder of the run."})
    settings: list[dict] = field(default_factory=list, metadata={"help": "Ways to decode (in the YAML)."})
    model: str = field(default="", metadata={"help": "Model folder; the shipped one by default."})
    split: str = field(default="heldout_pairs", metadata={"help": "Split to evaluate on."})
    count: int = field(default=0, metadata={"help": "Rows drawn from the split by the seed; all by default."})
    clip_model: str = field(default="ViT-B-32", metadata={"help": "CLIP of open_clip, or local-dir:FOLDER."})
    clip_weights: str = field(default="", metadata={"help": "Name or file of its weights."})
    features: str = field(default="", metadata={"help": "Feature network; that CLIP by default."})
    bank: str = field(default="", metadata={"help": "Memory bank; settings with documents are left out without."})
    instruction: str = field(default="Describe the given picture.", metadata={"help": "Asks for a description."})
    caption_tokenizer: str = field(default="words", metadata={"help": "words, or ptb, which needs Java."})
    batch_size: int = field(default=32, metadata={"help": "Prompts at a time."})
    resamples: int = field(default=200, metadata={"help": "Of the bootstrap."})
    seed: int = field(default=0, metadata={"help": "Seed of all draws."})


def held_out_rows(args: EmojiArguments) -> Dataset:
    rows = load_dataset(args.dataset, split=args.split)
    drawn = np.random.default_rng(args.seed).permutation(len(rows))[: args.count or len(rows)]
    return rows.select(drawn)


def load_augmenter(args: EmojiArguments, scorer: CLIPScorer):
    if not args.bank:
        return None
    from cm3leon_hf.retrieval.augmenter import RetrievalAugmenter
    from cm3leon_hf.retrieval.memory_bank import MemoryBank

    return RetrievalAugmenter(MemoryBank.load(args.bank), scorer, training=False)


def wanted_settings(args: EmojiArguments) -> list[Setting]:
    settings = read_settings(args.settings)
    skipped = [setting.name for setting in settings if setting.documents and not args.bank]
    if skipped:
        print(f"left out without a memory bank: {', '.join(skipped)}")
    return [setting for setting in settings if setting.name not in skipped]


def plan(settings: list[Setting], scorer: CLIPScorer, bank: str) -> dict[str, dict]:
    """What each setting's pictures depend on."""
    depends = {}
    for one in settings:
        clip = {"clip": scorer.name} if one.candidates > 1 or one.documents else {}
        depends[one.name] = asdict(one) | clip | ({"bank": bank_checksum(bank)} if one.documents else {})
    return depends


def bank_checksum(bank: str) -> str:
    from cm3leon_hf.retrieval.bank_files import MANIFEST, checksum

    return checksum(Path(bank) / MANIFEST)


def make(args, run: Run, settings: list[Setting], rows: Dataset, model, processor, scorer, augmenter) -> None:
    """Draws and describes what is not there yet."""
    prompts = [captions[0] for captions in rows["captions"]]
    for setting in settings:
        run.draw(setting, prompts, model, processor, scorer, augmenter)
        run.describe(setting, list(rows["image"]), args.instruction, model, processor, augmenter)


def judges(args: EmojiArguments, scorer: CLIPScorer, real: SeenPictures, device) -> Judges:
    name, weights = args.features or f"open_clip:{args.clip_model}", "" if args.features else args.clip_weights
    network = load_network(name, weights or None, device)
    reference = cached_statistics(real, network, Path(args.out) / "statistics")
    features = np.concatenate(list(network.batches(real)))
    return Judges(network, reference, scorer, features, args.resamples, args.seed)


def measure(args: EmojiArguments, run: Run, settings: list[Setting], rows: Dataset, judge: Judges, real) -> dict:
    prompts = [captions[0] for captions in rows["captions"]]
    measured = {}
    for setting in settings:
        texts = run.described(setting, len(rows))
        measured[setting.name] = judge.measure_drawn(run.drawn(setting, len(rows)), prompts)
        measured[setting.name] |= judge.measure_described(texts, rows["captions"], args.caption_tokenizer)
    return measured | {REAL: judge.measure_fit(real, prompts)}


def report(args: EmojiArguments, settings: list[Setting], measured: dict, facts: dict) -> None:
    out, name = Path(args.out), Path(args.model or default_model()).name
    card = {"model_name": name, "task_type": "text-to-image", "dataset_type": "emoji", "dataset_name": "Emoji"}
    write_results(out, measured, facts, card | {"dataset_split": args.split})
    plot_settings(measured, out / "results.png")
    plot_curve(
        measured,
        settings,
        "fd",
        x=lambda one: one.arguments.get("guidance_scale") if one.candidates == 1 else None,
        line=lambda one: f"{one.documents} documents",
        xlabel="guidance scale",
        path=out / "guidance.png",
    )
    print(markdown_table(measured))
    print(json.dumps(summary(measured)))


def main(args: EmojiArguments) -> None:
    state = PartialState()
    check_caption_metrics(("cider",), args.caption_tokenizer)
    settings, rows = wanted_settings(args), held_out_rows(args)
    scorer = CLIPScorer(args.clip_model, args.clip_weights or None, state.device)
    augmenter = load_augmenter(args, scorer)
    path = args.model or default_model()
    model = AutoModelForCausalLM.from_pretrained(path)
    processor = AutoProcessor.from_pretrained(path, device=state.device)
    run = Run(Path(args.out), args.batch_size, args.seed, state.process_index, state.num_processes)
    facts = {"model": f"{Path(path).name}@{fingerprint(model)}", "split": args.split, "rows": len(rows)}
    prompts = [captions[0] for captions in rows["captions"]]
    run.start(facts | {"prompts": prompts, "instruction": args.instruction}, plan(settings, scorer, args.bank))
    make(args, run, settings, rows, model.to(state.device), processor, scorer, augmenter)
    state.wait_for_everyone()
    if state.is_main_process:
        real = SeenPictures(rows["image"], processor.image_processor)
        judge = judges(args, scorer, real, state.device)
        facts |= {"clip": scorer.name, "features": judge.network.name, "caption_tokenizer": args.caption_tokenizer}
        facts |= {"resamples": args.resamples, "seed": args.seed}
        report(args, settings, measure(args, run, settings, rows, judge, real), facts)


if __name__ == "__main__":
    main(*TrlParser(EmojiArguments).parse_args_and_config())
