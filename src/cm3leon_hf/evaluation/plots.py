"""Plots of what an evaluation found."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

try:
    import matplotlib.pyplot as plt
    from matplotlib.ticker import LogFormatter
except ImportError as error:
    raise ImportError("plots need matplotlib; pip install 'cm3leon_hf[eval]'") from error

from .files import atomic
from .results import Measurements, heading
from .settings import Setting

MARKED = 20  # points of a line that are few enough to be shown one by one


def plot_settings(measurements: Measurements, path: Path) -> None:
    """A panel for each metric, a line for each setting with its bounds at 95 %."""
    metrics = list(dict.fromkeys(metric for row in measurements.values() for metric in row))
    size = (3.2 * len(metrics) + 1, 0.45 * len(measurements) + 1.2)
    figure, axes = plt.subplots(1, len(metrics), figsize=size, sharey=True, squeeze=False, layout="constrained")
    for axis, metric in zip(axes[0], metrics):
        for place, row in enumerate(measurements.values()):
            if metric in row:
                value, (low, high) = row[metric].value, row[metric].interval()
                axis.plot([low, high], [place, place], color="tab:blue")
                axis.plot(value, place, "o", color="tab:blue")
        axis.set(xlabel=heading(metric), yticks=range(len(measurements)), yticklabels=list(measurements))
        axis.grid(axis="x", alpha=0.3)
    axes[0][0].invert_yaxis()
    save_figure(figure, path)


def plot_curve(
    measurements: Measurements,
    settings: Sequence[Setting],
    metric: str,
    x: Callable[[Setting], float | None],
    line: Callable[[Setting], str],
    xlabel: str,
    path: Path,
) -> bool:
    """
    A metric against a number of the settings, as the paper's Figure 4 has FID against guidance and against samples.

    Args:
        measurements: By setting and metric.
        settings (`Sequence[Setting]`): Those that were measured.
        metric (`str`): What is plotted.
        x (`Callable`): A setting's place, or `None` to leave it out.
        line (`Callable`): The name of the line that a setting belongs to.
        xlabel (`str`): What `x` is.
        path (`Path`): The picture to write.

    Returns:
        `bool`: whether there was a line with two points or more, and so a picture.
    """
    lines: dict[str, list] = {}
    for setting in settings:
        if x(setting) is not None and metric in measurements[setting.name]:
            one = measurements[setting.name][metric]
            lines.setdefault(line(setting), []).append((x(setting), one.value, *one.interval()))
    lines = {name: points for name, points in lines.items() if len(points) > 1}
    if not lines:
        return False
    plot_lines(lines, xlabel, heading(metric), path)
    return True


def plot_lines(
    lines: Mapping[str, Sequence[Sequence[float]]],
    xlabel: str,
    ylabel: str,
    path: Path,
    scales: tuple[str, str] = ("linear", "linear"),
    marks: Iterable[float] = (),
) -> None:
    """
    Lines through points, with a band where there are bounds.

    Args:
        lines (`Mapping`): By name the points, `(x, y)` or `(x, y, low, high)`, in any order.
        xlabel, ylabel (`str`): What the axes are.
        path (`Path`): The picture to write.
        scales (`tuple[str, str]`): Of the axes: `"linear"` or `"log"`.
        marks (`Iterable[float]`): Where dashed lines stand across.
    """
    figure, axis = plt.subplots(figsize=(5, 3.6), layout="constrained")
    for name, points in lines.items():
        x, y, *bounds = np.array(sorted(points), np.float64).T
        axis.plot(x, y, "o-" if len(x) <= MARKED else "-", label=name)
        if bounds:
            axis.fill_between(x, *bounds, alpha=0.2)
    for mark in marks:
        axis.axvline(mark, color="tab:purple", linestyle="--")
    axis.set(xlabel=xlabel, ylabel=ylabel, xscale=scales[0], yscale=scales[1])
    for side, scale in zip((axis.xaxis, axis.yaxis), scales):
        if scale == "log":  # plain numbers in place of powers of ten
            side.set_major_formatter(LogFormatter())
            side.set_minor_formatter(LogFormatter(labelOnlyBase=False))
    axis.grid(alpha=0.3)
    axis.legend()
    save_figure(figure, path)


def save_figure(figure, path: Path) -> None:
    """Writes a figure and closes it."""
    with atomic(path) as part:
        figure.savefig(part, dpi=110, format="png")
    plt.close(figure)


__all__ = ["plot_curve", "plot_lines", "plot_settings"]
