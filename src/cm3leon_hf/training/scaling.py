"""Scaling laws: held-out loss as a power law of weights and tokens."""

from dataclasses import dataclass, fields
from itertools import product

import numpy as np
from scipy.optimize import least_squares
from scipy.special import logsumexp

from ..evaluation.intervals import Measured

HUBER = 1e-3  # errors of the log of the loss beyond which a run counts linearly, as in Hoffmann et al. 2022
STEEPEST = 3.0  # largest exponent
NOTHING = -20.0  # log of the smallest E, A and B


@dataclass(frozen=True)
class ScalingLaw:
    """
    `L(N, D) = E + A / N^alpha + B / D^beta` for `N` weights and `D` tokens, in nats a token.

    The form of Hoffmann et al. 2022 (section 3.3), which Aghajanyan et al. 2023 fit to each modality.

    Args:
        E (`float`): Loss of an unlimited model on unlimited data.
        A, alpha (`float`): What few weights cost.
        B, beta (`float`): What few tokens cost.
    """

    E: float
    A: float
    alpha: float
    B: float
    beta: float

    def loss(self, weights: np.ndarray, tokens: np.ndarray) -> np.ndarray:
        """The loss that the law predicts, of the arguments' shape."""
        return self.E + self.A / weights**self.alpha + self.B / tokens**self.beta


def fit_law(weights: np.ndarray, tokens: np.ndarray, losses: np.ndarray) -> ScalingLaw:
    """
    The law whose log is nearest to the losses' log by Huber's loss, the best from a grid of beginnings.

    Args:
        weights, tokens, losses (`np.ndarray` of shape `(runs,)`): One of each for a run; losses in nats.

    Raises:
        ValueError: for fewer runs than unknowns, fewer than two sizes or numbers of tokens, or a loss not above 0.
    """
    if len(losses) < 5 or len(np.unique(weights)) < 2 or len(np.unique(tokens)) < 2:
        raise ValueError(
            f"expected at least 5 runs over 2 sizes and 2 numbers of tokens, got {len(losses)} over "
            f"{len(np.unique(weights))} and {len(np.unique(tokens))}; train more"
        )
    if not (losses > 0).all():
        raise ValueError(f"expected losses above 0, got {losses.min()}; look at how they were measured")
    logs = np.log(weights), np.log(tokens)
    fits = [_minimise(*logs, np.log(losses), begin) for begin in _beginnings(*logs, losses)]
    return _law(min(fits, key=lambda fit: fit.cost).x)


def measure_law(
    weights: np.ndarray, tokens: np.ndarray, losses: np.ndarray, resamples: int = 200, seed: int = 0
) -> dict[str, Measured]:
    """
    The law's five numbers with bootstrap replicates.

    Residuals are drawn, not runs: among a dozen runs that are drawn with replacement there are often too few different
    ones for five unknowns. Each replicate is the law's loss times residuals of the log, widened by
    `sqrt(runs / (runs - 5))` for the five numbers that were fitted to them.

    Args:
        weights, tokens, losses (`np.ndarray` of shape `(runs,)`): See [`fit_law`]; more than 5 runs.
        resamples (`int`): Replicates.
        seed (`int`): Fixes the draws.

    Returns:
        `dict[str, Measured]`: `E`, `A`, `alpha`, `B` and `beta`.

    Raises:
        ValueError: for 5 runs, which a law of five numbers meets exactly; and see [`fit_law`].
    """
    law, runs = fit_law(weights, tokens, losses), len(losses)
    if runs < 6:
        raise ValueError(f"expected more than 5 runs for intervals, got {runs}; train more")
    logs, fitted = (np.log(weights), np.log(tokens)), np.log(law.loss(weights, tokens))
    residuals = (np.log(losses) - fitted) * np.sqrt(runs / (runs - 5))
    draws = np.random.default_rng(seed).integers(runs, size=(resamples, runs))
    begin = _numbers(law)
    laws = [_law(_minimise(*logs, fitted + residuals[drawn], begin).x) for drawn in draws]
    names = [field.name for field in fields(law)]
    return {name: Measured(getattr(law, name), np.array([getattr(one, name) for one in laws])) for name in names}


def _minimise(n: np.ndarray, d: np.ndarray, log_losses: np.ndarray, begin: np.ndarray):
    """Fits `log E, log A, alpha, log B, beta` from a beginning."""

    def terms(x: np.ndarray) -> np.ndarray:
        return np.stack([np.full_like(n, x[0]), x[1] - x[2] * n, x[3] - x[4] * d])

    def residuals(x: np.ndarray) -> np.ndarray:
        return logsumexp(terms(x), axis=0) - log_losses

    def jacobian(x: np.ndarray) -> np.ndarray:
        shares = np.exp(terms(x) - logsumexp(terms(x), axis=0))
        return np.stack([shares[0], shares[1], -n * shares[1], shares[2], -d * shares[2]], axis=1)

    low, high = np.array([[NOTHING, NOTHING, 0, NOTHING, 0], [np.inf, np.inf, STEEPEST, np.inf, STEEPEST]])
    inside = np.clip(begin, low + 1e-9, high - 1e-9)
    return least_squares(residuals, inside, jacobian, (low, high), x_scale="jac", loss="huber", f_scale=HUBER)


def _beginnings(n: np.ndarray, d: np.ndarray, losses: np.ndarray) -> list[np.ndarray]:
    """Laws in which weights and tokens share, half and half, what the mean loss has above `E`."""
    beginnings = []
    for share, alpha, beta in product((0.5, 0.9), (0.2, 0.5, 1.0), (0.2, 0.5, 1.0)):
        E = share * losses.min()
        half = np.log((losses.mean() - E) / 2)
        beginnings.append(np.array([np.log(E), half + alpha * n.mean(), alpha, half + beta * d.mean(), beta]))
    return beginnings


def _numbers(law: ScalingLaw) -> np.ndarray:
    return np.array([np.log(law.E), np.log(law.A), law.alpha, np.log(law.B), law.beta])


def _law(x: np.ndarray) -> ScalingLaw:
    return ScalingLaw(np.exp(x[0]), np.exp(x[1]), x[2], np.exp(x[3]), x[4])
