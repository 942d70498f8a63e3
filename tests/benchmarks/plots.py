"""The plots of the benchmarks: lines over one axis, written as PNG."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

PLOTS = Path(__file__).parent / "plots"


def lines(
    path: Path,
    *,
    title: str,
    x: tuple[str, Sequence[float]],
    y: str,
    series: Mapping[str, Sequence[float | None]],
    reference: float | None = None,
) -> None:
    """Write a line plot.

    Args:
        path: The PNG file.
        title: Above it.
        x: The axis' name and values.
        y: The other axis' name.
        series: Name to values, one for each x; None leaves a point out.
        reference: Draws a dashed line at this height.
    """
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    for name, values in series.items():
        points = [(a, b) for a, b in zip(x[1], values, strict=True) if b is not None]
        axes.plot([a for a, _ in points], [b for _, b in points], marker="o", label=name)
    if reference is not None:
        axes.axhline(reference, color="grey", linestyle="--", linewidth=1)
    axes.set(title=title, xlabel=x[0], ylabel=y, ylim=(0, None))
    axes.grid(alpha=0.3)
    axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    # No date or version inside: the same figures give the same file.
    figure.savefig(path, dpi=100, metadata={"Software": None})
    plt.close(figure)


def bars(path: Path, *, title: str, y: str, groups: Mapping[str, Mapping[str, float]]) -> None:
    """Write a bar plot: a group of bars a name, a bar a series within it."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    names = list(groups)
    series = list(dict.fromkeys(key for group in groups.values() for key in group))
    width = 0.8 / len(series)
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    for i, key in enumerate(series):
        places = [n + (i - (len(series) - 1) / 2) * width for n in range(len(names))]
        axes.bar(places, [groups[name].get(key, 0.0) for name in names], width, label=key)
    axes.set(title=title, ylabel=y, xticks=range(len(names)), xticklabels=names)
    axes.grid(alpha=0.3, axis="y")
    axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100, metadata={"Software": None})
    plt.close(figure)
