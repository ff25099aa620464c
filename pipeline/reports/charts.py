"""The report's charts: figures in, inline SVG out, readable on light and dark pages."""

import io
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, LogLocator, NullLocator, StrMethodFormatter

# Matplotlib wants a colour; the page decides which one it is.
_INK = "#010203"
_COLORS = ("#2f6fed", "#e4572e", "#17a398", "#8f5bd6", "#e0a100", "#6b7280")
_STYLE = {
    "font.family": "sans-serif",
    "font.size": 9,
    "text.color": _INK,
    "axes.labelcolor": _INK,
    "axes.edgecolor": _INK,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.6,
    "axes.grid": True,
    "grid.alpha": 0.15,
    "grid.color": _INK,
    "legend.frameon": False,
    "svg.fonttype": "none",
    "svg.hashsalt": "braid",
}

_FEW_POINTS = 20
_LARGE = 1e4
"""Numbers from here on are written with k, M or G."""

Curve = tuple[Sequence[float], Sequence[float]]


def lines(
    curves: Mapping[str, Curve],
    *,
    x_label: str,
    y_label: str,
    reference: float | None = None,
    mark: float | None = None,
) -> str:
    """Line chart of named curves; `reference` draws a dashed level, `mark` a dashed place on x."""
    with _chart(5.2, 2.6) as (figure, axes):
        for (name, (x, y)), color in zip(curves.items(), _cycle(len(curves)), strict=True):
            # A curve of few points is seen by its points.
            marker = "o" if len(x) < _FEW_POINTS else None
            axes.plot(x, y, label=name, color=color, linewidth=1.6, marker=marker, markersize=3.5)
        if mark is not None:
            axes.axvline(mark, color=_INK, linewidth=0.8, linestyle="--", alpha=0.5)
        if reference is not None:
            axes.axhline(reference, color=_INK, linewidth=0.8, linestyle="--", alpha=0.5)
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)
        if axes.get_ylim()[1] >= _LARGE:
            axes.yaxis.set_major_formatter(EngFormatter(sep=""))
        if len(curves) > 1:
            axes.legend()
        return _svg(figure)


def bars(values: Mapping[str, float], *, x_label: str, value_format: str = "{:,.3g}") -> str:
    """Horizontal bars, first entry on top, each with its value."""
    with _chart(5.2, 0.32 * len(values) + 0.7) as (figure, axes):
        names = list(values)[::-1]
        drawn = axes.barh(names, [values[name] for name in names], color=_COLORS[0], height=0.62)
        axes.bar_label(drawn, fmt=value_format, padding=3, fontsize=8)
        axes.set_xlabel(x_label)
        axes.grid(axis="y", visible=False)
        axes.margins(x=0.12)
        return _svg(figure)


def intervals(values: Mapping[str, tuple[float, float]], *, x_label: str) -> str:
    """Means with half widths of their intervals, first entry on top; a line marks the first."""
    with _chart(5.2, 0.26 * len(values) + 0.8) as (figure, axes):
        names = list(values)[::-1]
        means = [values[name][0] for name in names]
        widths = [values[name][1] for name in names]
        axes.errorbar(means, names, xerr=widths, fmt="o", color=_COLORS[0], markersize=4, capsize=2)
        axes.axvline(means[-1], color=_INK, linewidth=0.8, linestyle="--", alpha=0.5)
        axes.set_xlabel(x_label)
        axes.grid(axis="y", visible=False)
        axes.margins(y=0.5 / max(len(values), 1))
        return _svg(figure)


def calibration(curves: Mapping[str, Curve]) -> str:
    """Observed rate over mean prediction; the diagonal is ideal."""
    with _chart(3.6, 3.2) as (figure, axes):
        top = max([0.05, *(v for x, y in curves.values() for v in (*x, *y))]) * 1.05
        axes.plot([0, top], [0, top], color=_INK, linewidth=0.8, linestyle="--", alpha=0.5)
        for (name, (x, y)), color in zip(curves.items(), _cycle(len(curves)), strict=True):
            axes.plot(x, y, marker="o", markersize=3.5, linewidth=1.2, label=name, color=color)
        axes.set_xlabel("mean predicted probability")
        axes.set_ylabel("observed rate")
        axes.set_xlim(0, top)
        axes.set_ylim(0, top)
        axes.legend()
        return _svg(figure)


def scatter(
    groups: Mapping[str, Sequence[tuple[float, float, str]]],
    *,
    front: Sequence[tuple[float, float]],
    marked: tuple[float, float] | None,
    x_label: str,
    y_label: str,
) -> str:
    """Named points (x, y, label) on logarithmic axes; `front` is joined, `marked` is ringed."""
    with _chart(5.2, 3.4) as (figure, axes):
        axes.plot(*zip(*front, strict=True), color=_INK, linewidth=0.8, alpha=0.5)
        for (name, points), color in zip(groups.items(), _cycle(len(groups)), strict=True):
            axes.scatter([p[0] for p in points], [p[1] for p in points], color=color, label=name)
            for x, y, label in points:
                axes.annotate(label, (x, y), xytext=(4, 4), textcoords="offset points", fontsize=7)
        if marked is not None:
            axes.scatter(*marked, s=140, facecolors="none", edgecolors=_INK, linewidths=1.2)
        axes.set_xscale("log")
        axes.set_yscale("log")
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axis.set_minor_locator(NullLocator())
            axis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)
        axes.legend()
        return _svg(figure)


def cloud(groups: Mapping[str, Sequence[tuple[float, float]]]) -> str:
    """Points of named groups on a plane whose axes mean nothing."""
    with _chart(3.6, 3.6) as (figure, axes):
        for (name, points), color in zip(groups.items(), _cycle(len(groups)), strict=True):
            x, y = ([point[axis] for point in points] for axis in (0, 1))
            axes.scatter(x, y, color=color, label=name, s=7, linewidths=0, alpha=0.8)
        axes.set_xticks([])
        axes.set_yticks([])
        axes.set_aspect("equal")
        if len(groups) > 1:
            axes.legend(
                fontsize=7, markerscale=2, loc="upper left", bbox_to_anchor=(0, -0.02), ncols=3
            )
        return _svg(figure)


def _cycle(count: int) -> list[str]:
    return [_COLORS[index % len(_COLORS)] for index in range(count)]


@contextmanager
def _chart(width: float, height: float) -> Iterator[tuple[Figure, Axes]]:
    with mpl.rc_context(_STYLE):  # type: ignore[arg-type] # its keys are literals
        figure = Figure(figsize=(width, height), layout="constrained")
        figure.patch.set_alpha(0)
        axes = figure.add_subplot()
        axes.patch.set_alpha(0)
        yield figure, axes


def _svg(figure: Figure) -> str:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :].replace(_INK, "currentColor")
