"""From rows with captions and codes to padded batches under the CM3 objective."""

from collections import defaultdict
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from ..processing_prompts import behind_retrieved
from ..vocabulary import Vocabulary
from .cm3 import draw_span, move_span
from .documents import text_to_image_document


@dataclass
class CM3Transform:
    """
    Turns rows into training documents; for `datasets.Dataset.set_transform`.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): Text tokenizer.
        vocabulary ([`Vocabulary`]): Layout of the ids.
        rng (`np.random.Generator`): Source of all draws.
        whole_segment, span_rate (`float`): See [`~cm3leon_hf.data.cm3.draw_span`].
        instruction (`str`): Stands in front of a caption that is masked whole, as a captioning prompt has it.
        instruction_share (`float`): Share of documents with the instruction.
        image_noise (`float`): Replaces image tokens that the model reads, not those that it predicts, by random ones:
            of each document a share drawn from [0, `image_noise`]. Ours, for small corpora: exact image tokens name
            the training picture that they come from, so without noise a model learns pictures by heart from their own
            beginnings and hardly looks at the caption.
        max_length (`int`, *optional*): Longest document with what is retrieved for it; retrieved documents that do not
            fit are left out.
    """

    tokenizer: PreTrainedTokenizerBase
    vocabulary: Vocabulary
    rng: np.random.Generator = field(default_factory=np.random.default_rng)
    whole_segment: float = 0.0
    span_rate: float = 1.0
    instruction: str = "Describe the given picture."
    instruction_share: float = 0.0
    image_noise: float = 0.0
    max_length: float = float("inf")

    def __call__(self, rows: dict[str, list]) -> dict[str, list[list[int]]]:
        """Rows with `captions` (lists of wordings), `codes` and perhaps `retrieved` to `input_ids` and `labels`."""
        retrieved = rows.get("retrieved") or [()] * len(rows["codes"])
        documents = [self.document(*row) for row in zip(rows["captions"], rows["codes"], retrieved)]
        return {"input_ids": [self.noisy(ids) for ids in documents], "labels": documents}

    def noisy(self, ids: list[int]) -> list[int]:
        """A document with some of its image tokens replaced."""
        if not self.image_noise:
            return ids
        noisy = np.array(ids)
        hit = self.rng.random(len(ids)) < self.rng.uniform(0, self.image_noise)
        hit &= noisy >= self.vocabulary.text_size
        noisy[hit] = self.rng.integers(self.vocabulary.text_size, self.vocabulary.size, hit.sum())
        return noisy.tolist()

    def document(self, captions: list[str], codes: list[int], retrieved: Sequence[dict] = ()) -> list[int]:
        """One row's document; with an instruction, what was retrieved is left out."""
        caption = captions[self.rng.integers(len(captions))]
        image_ids = self._image_ids(codes)
        if self.rng.random() < self.instruction_share:
            instruction, answer = self._ids(self.instruction), self._ids(f" {caption}")
            ids = text_to_image_document(instruction + answer, image_ids, self.vocabulary)
            start = 1 + len(instruction)
            return move_span(ids, (start, start + len(answer)), self.vocabulary)
        ids = text_to_image_document(self._ids(caption), image_ids, self.vocabulary)
        found = [
            text_to_image_document(self._ids(one["text"]), self._image_ids(one["codes"]), self.vocabulary)[:-1]
            for one in retrieved
        ]
        ids = behind_retrieved(found, ids, self.max_length)
        span = draw_span(ids, self.vocabulary, self.rng, self.whole_segment, self.span_rate)
        return move_span(ids, span, self.vocabulary)

    def _image_ids(self, codes: list[int]) -> list[int]:
        return self.vocabulary.codes_to_ids(torch.as_tensor(codes, dtype=torch.long)).tolist()

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]


def balanced_rows(groups: Iterable[Hashable], passes: int) -> list[int]:
    """
    Row numbers in which every group stands equally often, however many rows it has.

    Args:
        groups (`Iterable[Hashable]`): The group of each row, such as its (concept, style).
        passes (`int`): How often a group stands there; its rows take turns.

    Returns:
        `list[int]` of length `number of groups * passes`, for `datasets.Dataset.select`.
    """
    members = defaultdict(list)
    for row, group in enumerate(groups):
        members[group].append(row)
    return [rows[turn % len(rows)] for turn in range(passes) for rows in members.values()]


class CausalCollator(DataCollatorForLanguageModeling):
    """
    TRL's collator without its attention mask.

    Padding is on the right, where no token of a causal model looks, and its labels are -100. Without a mask,
    attention takes its causal fast path.
    """

    def torch_call(self, examples: list[dict]) -> dict[str, torch.Tensor]:
        batch = super().torch_call(examples)
        return {name: batch[name] for name in ("input_ids", "labels")}
