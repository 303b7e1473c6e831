"""The drawings of a monitor's report: training against live, each as the bytes of a PNG."""

import io
from collections.abc import Mapping, Sequence

import numpy as np

from hpcai_cli.engine.reports.plots import figure, plain
from hpcai_cli.engine.serving.quantities import CONFIDENCE_EDGES
from hpcai_cli.engine.serving.statistics_layout import LATENCY_EDGES

MOST_QUANTITIES = 24
"""Quantities that are drawn, those that changed most first."""
MOST_CLASSES = 50
_COLUMNS = 3


def quantities(pairs: Sequence[tuple[str, Mapping, Mapping]]) -> bytes:
    """Draw the shares of the bins of each quantity, by a title, its reference and its live counts; at least one."""
    content, rows = io.BytesIO(), -(-len(pairs) // _COLUMNS)
    with figure(content, size=(11, 2.6 * rows), axes=(rows, _COLUMNS)) as axes:
        for axis, (title, then, now) in zip(axes.flat, pairs, strict=False):
            _steps(axis, then["counts"], now["counts"])
            _ticks(axis, then["edges"])
            axis.set_title(plain(title, 45), fontsize=9)
        for axis in axes.flat[len(pairs):]:
            axis.axis("off")
        axes.flat[0].legend(fontsize="small")
    return content.getvalue()


def classes(names: Sequence[str], then: Sequence[int] | None, now: Sequence[int]) -> bytes:
    """Draw the share of each class among the answers; of many classes those whose shares differ most."""
    live = _shares(now)
    before = live if then is None else _shares(then)
    shown = np.sort(np.argsort(-np.abs(live - before), kind="stable")[:MOST_CLASSES])
    content, places = io.BytesIO(), np.arange(len(shown))
    with figure(content, size=(max(5.0, 0.35 * len(shown) + 2), 3.6)) as axes:
        if then is not None:
            axes.bar(places - 0.2, before[shown], 0.4, color="gray", label="training")
        axes.bar(places + 0.2, live[shown], 0.4, label="live")
        axes.set_xticks(places, [plain(names[place]) for place in shown], rotation=45 if len(shown) < 12 else 90)
        axes.set(ylabel="share of the answers")
        axes.legend(fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5))
    return content.getvalue()


def confidence(then: Sequence[int] | None, now: Sequence[int]) -> bytes:
    """Draw how sure the answers are."""
    content = io.BytesIO()
    with figure(content, size=(6, 3.2)) as axes:
        _steps(axes, then, now)
        _ticks(axes, CONFIDENCE_EDGES)
        axes.set(xlabel="probability of the answer", ylabel="share of the answers")
        axes.legend(fontsize="small")
    return content.getvalue()


def latency(counts: Sequence[int], marks: Mapping[str, float]) -> bytes:
    """Draw the time that requests took, with marks, milliseconds by name."""
    content, milliseconds = io.BytesIO(), 1000 * np.array(LATENCY_EDGES)
    with figure(content, size=(6, 3.2)) as axes:
        # What is faster or slower than the bins is added to the outermost ones.
        held = np.array(counts[1:-1])
        held[0] += counts[0]
        held[-1] += counts[-1]
        axes.stairs(held, milliseconds, fill=True)
        for style, (name, value) in zip(("--", ":", "-."), marks.items(), strict=False):
            axes.axvline(value, color="black", linestyle=style, linewidth=1, label=f"{name} {value:.3g} ms")
        used = np.flatnonzero(held)
        if len(used):
            axes.set_xlim(milliseconds[max(0, used[0] - 3)], milliseconds[min(len(held), used[-1] + 4)])
        axes.set(xscale="log", xlabel="milliseconds", ylabel="requests")
        axes.legend(fontsize="small")
    return content.getvalue()


def _steps(axis, then: Sequence[int] | None, now: Sequence[int]) -> None:
    """Draw shares bin by bin, each as wide as the others, since the bins of a reference hold about as much each."""
    places = np.arange(len(now) + 1)
    if then is not None:
        axis.stairs(_shares(then), places, fill=True, color="lightgray", label="training")
    axis.stairs(_shares(now), places, linewidth=1.5, label="live")


def _ticks(axis, edges: Sequence[float]) -> None:
    """Name some of the edges between bins."""
    shown = np.unique(np.linspace(0, len(edges) - 1, min(6, len(edges))).round().astype(int)) if edges else []
    axis.set_xticks([place + 1 for place in shown], [f"{edges[place]:.3g}" for place in shown])
    axis.tick_params(labelsize=7)


def _shares(counts: Sequence[int]) -> np.ndarray:
    return np.divide(counts, max(1, sum(counts)))
