"""The libraries of the extra `controls`, or one error that names it."""

try:
    import cv2
    import onnxruntime
    from datasets import Dataset, Features, Image, IterableDataset, List, Value
    from rapidocr import RapidOCR
    from skimage.morphology import skeletonize
except ImportError as error:
    raise ImportError(f"control signals need {error.name}; pip install 'cm3leon_hf[controls]'") from error

__all__ = [
    "Dataset",
    "Features",
    "Image",
    "IterableDataset",
    "List",
    "RapidOCR",
    "Value",
    "cv2",
    "onnxruntime",
    "skeletonize",
]
