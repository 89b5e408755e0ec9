"""The libraries of the extra `retrieval`, or one error that names it."""

try:
    import faiss
    import pyarrow as pa
    import pyarrow.compute as pc
    from datasets import Dataset, Features, Image, IterableDataset, List, Value, concatenate_datasets
    from faiss.contrib.ondisk import merge_ondisk
except ImportError as error:
    raise ImportError(f"retrieval needs {error.name}; pip install 'cm3leon_hf[retrieval]'") from error

__all__ = [
    "Dataset",
    "Features",
    "Image",
    "IterableDataset",
    "List",
    "Value",
    "concatenate_datasets",
    "faiss",
    "merge_ondisk",
    "pa",
    "pc",
]
