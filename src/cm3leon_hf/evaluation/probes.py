"""A judge of drawn pictures: a linear classifier of a frozen network's features, trained on real pictures."""

from collections.abc import Sequence

import numpy as np

from .features import FeatureNetwork
from .files import check_as_many


class Probe:
    """
    Linear discriminant analysis of features: the class whose mean is nearest, under the covariance that all classes
    share. Every class is as likely as any other.

    Args:
        features (`np.ndarray` of shape `(pictures, dimension)`): Of real pictures.
        labels (`Sequence[str]`): Their classes.
        shrinkage (`float`): In [0, 1], how far the covariance is drawn to a multiple of the identity.

    Raises:
        ValueError: for other numbers of features and labels, fewer than two classes, or no more pictures than classes.
        ImportError: without scikit-learn.
    """

    def __init__(self, features: np.ndarray, labels: Sequence[str], shrinkage: float = 0.1):
        try:
            from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
        except ImportError as error:
            raise ImportError("probes need scikit-learn; pip install 'cm3leon_hf[eval]'") from error
        check_as_many("features", features, "labels", labels)
        classes = sorted(set(labels))
        if not 1 < len(classes) < len(labels):
            raise ValueError(
                f"expected two classes or more, and more pictures than classes, got {len(labels)} pictures of "
                f"{len(classes)} classes; add pictures"
            )
        priors = np.full(len(classes), 1 / len(classes))
        self.model = LinearDiscriminantAnalysis(solver="lsqr", shrinkage=shrinkage, priors=priors)
        self.model.fit(features, np.array(labels))

    def __call__(self, features: np.ndarray) -> list[str]:
        """The classes of features `(pictures, dimension)`."""
        return self.model.predict(features).tolist()


def features_of(pictures: Sequence, network: FeatureNetwork) -> np.ndarray:
    """Features `(pictures, dimension)` of pictures in RGB, of one size."""
    return np.concatenate(list(network.batches(pictures)))


__all__ = ["Probe", "features_of"]
