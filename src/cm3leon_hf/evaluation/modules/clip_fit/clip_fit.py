"""CLIPScore and R@k of pictures drawn from texts, for `evaluate.load`."""

import datasets
import evaluate

from cm3leon_hf.evaluation.clip_score import CLIPScorer, clip_score
from cm3leon_hf.evaluation.files import read_pictures
from cm3leon_hf.evaluation.recall import recall_at, text_ranks

DESCRIPTION = "How well pictures fit texts under CLIP: CLIPScore, and how often a picture finds its own text."
INPUTS = """
Args:
    predictions (list of pictures): Drawn ones.
    references (list of `str`): Their texts.
    model, pretrained: See `cm3leon_hf.evaluation.clip_score.CLIPScorer`; OpenAI's ViT-B-32 by default.
    ks (list of `int`): k of R@k; 1, 5 and 10 by default.
Returns:
    `{"clip_score": float, "r_at_1": float, …}`
"""


class ClipFit(evaluate.Metric):
    """Wraps [`~cm3leon_hf.evaluation.clip_score`] and [`~cm3leon_hf.evaluation.recall`]."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=DESCRIPTION,
            citation="Hessel et al. 2021, arXiv 2104.08718",
            inputs_description=INPUTS,
            features=datasets.Features({"predictions": datasets.Image(), "references": datasets.Value("string")}),
        )

    def _compute(self, predictions, references, model="ViT-B-32", pretrained="openai", ks=(1, 5, 10)) -> dict:
        scorer = CLIPScorer(model, pretrained)
        shown = scorer.embed_images(list(read_pictures(predictions))).cpu().numpy()
        said = scorer.embed_texts(list(references)).cpu().numpy()
        ranks = text_ranks(shown, said, list(references))
        score = float(clip_score((shown * said).sum(axis=1)).mean())
        return {"clip_score": score} | {f"r_at_{k}": float(recall_at(ranks, k).mean()) for k in ks}
