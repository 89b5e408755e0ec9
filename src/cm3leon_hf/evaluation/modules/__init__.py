"""The metrics as modules of the `evaluate` library: `evaluate.load(module_path("vqa_accuracy"))`."""

from pathlib import Path

MODULES = (
    "caption_scores",
    "clip_fit",
    "frechet_distance",
    "modality_perplexity",
    "reconstruction_quality",
    "visdial_ndcg",
    "vqa_accuracy",
)


def module_path(name: str) -> str:
    """
    The folder of a metric, for `evaluate.load`, wherever the package is installed.

    Args:
        name (`str`): `"frechet_distance"`, `"clip_fit"`, `"caption_scores"`, `"vqa_accuracy"`, `"visdial_ndcg"`,
            `"modality_perplexity"` or `"reconstruction_quality"`.

    Raises:
        ValueError: for another name.
    """
    if name not in MODULES:
        raise ValueError(f"expected a metric among {MODULES}, got {name!r}")
    return str(Path(__file__).parent / name)


__all__ = ["MODULES", "module_path"]
