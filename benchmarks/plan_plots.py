"""Figures of the plans benchmark, as SVG files for the documentation."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.figure import Figure

_COLORS = ("#2f6fed", "#e0a100", "#e4572e")


def accuracy_plot(
    measured_s: Sequence[float], predicted_s: Mapping[str, Sequence[float]], path: Path, title: str
) -> None:
    """Predicted over measured milliseconds, one colour for each set of constants."""
    figure = Figure(figsize=(5.4, 4.6), layout="constrained")
    axes = figure.add_subplot()
    measured = [1e3 * seconds for seconds in measured_s]
    low, high = min(measured) * 0.7, max(measured) * 1.4
    axes.plot([low, high], [low, high], color="#6b7280", linewidth=0.8, linestyle="--")
    axes.fill_between(
        [low, high], [0.85 * low, 0.85 * high], [1.15 * low, 1.15 * high], alpha=0.08, color="k"
    )
    for (name, seconds), color in zip(predicted_s.items(), _COLORS, strict=False):
        axes.scatter(measured, [1e3 * s for s in seconds], s=18, color=color, label=name, alpha=0.8)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("measured step, ms")
    axes.set_ylabel("predicted step, ms")
    axes.set_title(f"{title}: plans of unseen table sets", fontsize=10)
    axes.grid(alpha=0.15)
    axes.legend(frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None})
