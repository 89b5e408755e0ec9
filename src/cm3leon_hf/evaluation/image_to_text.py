"""The tasks of Table 2: what a model writes about pictures, measured by each task's own protocol."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from .captions import caption_scores, check_caption_metrics
from .intervals import Measured, measure_mean
from .visdial import visdial_ndcg
from .vqa import vizwiz_scores, vqa_accuracy

KINDS = ("captions", "vqa", "vizwiz", "visdial")


@dataclass(frozen=True)
class Task:
    """
    A data set, how the model is asked, and how its answers are measured.

    Args:
        name (`str`): What the table calls it.
        kind (`str`): `"captions"` (CIDEr and ROUGE-L), `"vqa"` (accuracy; VQA2 and OKVQA), `"vizwiz"` (accuracy, for
            unanswerable questions apart too) or `"visdial"` (NDCG).
        dataset, split (`str`): What `load_dataset` reads: a hub name or a local folder.
        prompt (`str`): What stands in front of the picture, with columns in braces, and `<mask>` where the answer goes
            unless it comes last, as in `"Question: {question} Answer:<mask>."`.
        image (`str`): Column with the picture.
        references (`str`): Column with the captions, or the ten answers: texts, or `{"answer": text}`.
        answer_type (`str`): Column with VizWiz's type of answer.
        options, relevance (`str`): Columns with VisDial's options and their relevance.
        generate (`dict`): Arguments of `generate`.
        tokenizer (`str`): Of captions: `"ptb"`, the official one, which needs Java, or `"words"`.

    Raises:
        ValueError: for an unknown kind, or where Java is needed and not there.
    """

    name: str
    kind: str
    dataset: str
    split: str
    prompt: str
    image: str = "image"
    references: str = "answers"
    answer_type: str = "answer_type"
    options: str = "options"
    relevance: str = "relevance"
    generate: dict = field(default_factory=dict)
    tokenizer: str = "ptb"

    def __post_init__(self):
        if self.kind not in KINDS:
            raise ValueError(f"expected a kind among {KINDS}, got {self.kind!r} in the task {self.name}")
        if self.kind == "captions":
            check_caption_metrics(("cider", "rouge_l"), self.tokenizer)

    def check(self, rows) -> None:
        """
        Says before anything is written what the measuring would say behind it.

        Raises:
            ValueError: if a column is missing, or a row has no references as the metric wants them.
        """
        wanted = {"visdial": [self.options, self.relevance], "vizwiz": [self.references, self.answer_type]}
        missing = {self.image, *wanted.get(self.kind, [self.references])} - set(rows.column_names)
        if missing:
            raise ValueError(
                f"expected the columns {sorted(missing)} for {self.name}, got {rows.column_names}; name yours"
            )
        self.prompts(rows)
        silent = [[0.0] * len(one) for one in rows[self.options]] if self.kind == "visdial" else [""] * len(rows)
        self.measure(rows, silent, resamples=1)

    def prompts(self, rows) -> list[str]:
        """
        What the model is asked about each row.

        Raises:
            ValueError: if the prompt names a column that is not there.
        """
        try:
            return [self.prompt.format(**row) for row in rows.remove_columns(self.image)]
        except KeyError as error:
            raise ValueError(
                f"expected the columns of {self.prompt!r} for {self.name}, got {rows.column_names}, without {error}"
            ) from error

    def measure(self, rows, answers: Sequence, resamples: int = 200, seed: int = 0) -> dict[str, Measured]:
        """
        The task's metrics, in [0, 1] but for CIDEr; tables give them times 100.

        Args:
            rows (`datasets.Dataset`): With the references.
            answers (`Sequence`): The model's texts, or for VisDial its scores of each row's options.
            resamples, seed (`int`): See [`~cm3leon_hf.evaluation.intervals.bootstrap`].

        Raises:
            ValueError: as the metric.
        """
        values = {"captions": self._captions, "vqa": self._vqa, "vizwiz": self._vizwiz, "visdial": self._visdial}
        return {name: measure_mean(each, resamples, seed) for name, each in values[self.kind](rows, answers).items()}

    def _captions(self, rows, answers) -> dict[str, np.ndarray]:
        scores = caption_scores(answers, rows[self.references][:], ("cider", "rouge_l"), self.tokenizer)
        return {name: score.each for name, score in scores.items()}

    def _vqa(self, rows, answers) -> dict[str, np.ndarray]:
        return {"accuracy": vqa_accuracy([short(text) for text in answers], self._people(rows))}

    def _vizwiz(self, rows, answers) -> dict[str, np.ndarray]:
        types = rows[self.answer_type][:]
        accuracy = vizwiz_scores([short(text) for text in answers], self._people(rows), types).accuracy
        by_type = {f"accuracy_{kind}": accuracy[np.array(types) == kind] for kind in sorted(set(types))}
        return {"accuracy": accuracy} | by_type

    def _visdial(self, rows, answers) -> dict[str, np.ndarray]:
        return {"ndcg": visdial_ndcg(answers, rows[self.relevance][:])}

    def _people(self, rows) -> list[list[str]]:
        """Ten people's answers to each question."""
        return [[one["answer"] if isinstance(one, dict) else one for one in group] for group in rows[self.references]]


def short(text: str) -> str:
    """An answer without the full stop that the templates of Table 5 end with."""
    return text.strip().removesuffix(".")


__all__ = ["KINDS", "Task", "short"]
