"""What training scripts ask of their rows and of the CM3 transform, as flags."""

from dataclasses import dataclass, field

from datasets import Dataset, load_dataset

from .sources import Rows, Source, open_sources

STREAMED_ROWS = 1000  # to measure the loss on, of a source that has no end


@dataclass(kw_only=True)
class RowArguments:
    """
    Flags for the rows to train on, and those to measure the loss on, that pretraining and fine-tuning share, for
    `TrlParser`.

    Raises:
        ValueError: if there are both a data set and sources, or neither.
    """

    dataset: str = field(default="", metadata={"help": "Folder or hub name of a data set, of which one split is read."})
    sources: list[dict] = field(default_factory=list, metadata={"help": "Fields of each Source (in the YAML)."})
    train_split: str = field(default="train", metadata={"help": "Split of `dataset` to train on."})
    eval_split: str = field(default="", metadata={"help": "Split of `dataset` to measure the loss on."})
    eval_source: dict = field(default_factory=dict, metadata={"help": "Fields of the Source to measure the loss on."})
    eval_rows: int = field(default=0, metadata={"help": "Rows of it to use at most; 0 for all."})
    window: int = field(default=1024, metadata={"help": "Rows that are shuffled and packed together."})

    def __post_init__(self):
        if bool(self.dataset) == bool(self.sources):
            raise ValueError("expected either dataset or sources, got both or neither; name what to train on")

    def training_rows(self) -> Rows:
        """What to train on."""
        if self.sources:
            return open_sources([Source(**source) for source in self.sources])
        return load_dataset(self.dataset, split=self.train_split)

    def held_out_rows(self) -> Dataset | None:
        """What to measure the loss on; `None` where nothing is named."""
        if self.eval_source:
            rows = Source(**self.eval_source).open()
        elif self.dataset and self.eval_split:
            rows = load_dataset(self.dataset, split=self.eval_split)
        else:
            return None
        if not isinstance(rows, Dataset):
            rows = Dataset.from_list(list(rows.take(self.eval_rows or STREAMED_ROWS)), features=rows.features)
        return rows.select(range(min(self.eval_rows or len(rows), len(rows))))


@dataclass
class TransformArguments:
    """Flags of [`~cm3leon_hf.data.transform.CM3Transform`] that pretraining and fine-tuning share, for `TrlParser`."""

    span_rate: float = field(default=1.0, metadata={"help": "Mean number of moved spans, where they are random."})
    max_spans: int = field(default=1, metadata={"help": "Most spans of a document; the model needs as many masks."})
    whole_segment: float = field(default=0.0, metadata={"help": "Share of moved spans that are a whole text or image."})
    image_noise: float = field(default=0.0, metadata={"help": "Largest share of image tokens to read wrongly."})
    overflow: str = field(default="drop", metadata={"help": "Packing: drop keeps documents whole, stream cuts them."})


__all__ = ["RowArguments", "TransformArguments"]
