"""What training scripts ask of the CM3 transform, as flags."""

from dataclasses import dataclass, field


@dataclass
class TransformArguments:
    """Flags of [`~cm3leon_hf.data.transform.CM3Transform`] that pretraining and fine-tuning share, for `TrlParser`."""

    span_rate: float = field(default=1.0, metadata={"help": "Mean number of moved spans, where they are random."})
    max_spans: int = field(default=1, metadata={"help": "Most spans of a document; the model needs as many masks."})
    whole_segment: float = field(default=0.0, metadata={"help": "Share of moved spans that are a whole text or image."})
    image_noise: float = field(default=0.0, metadata={"help": "Largest share of image tokens to read wrongly."})
    overflow: str = field(default="drop", metadata={"help": "Packing: drop keeps documents whole, stream cuts them."})


__all__ = ["TransformArguments"]
