"""Pictures of a benchmark's curves."""

import io
import re
from collections.abc import Mapping

DASHED = ("ideal", "projected")
"""How the names of lines begin that were not measured."""


def pictures(document: Mapping) -> dict[str, bytes]:
    """Return a PNG for each of the curves in a result, by file name."""
    return {f"{_file_name(row['benchmark'] + ' ' + row['title'])}.png": draw(row) for row in document["curves"]}


def draw(curves: Mapping) -> bytes:
    """Return the PNG of one picture."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 4.5))
    for name, points in curves["lines"].items():
        dashed = name.startswith(DASHED)
        xs, ys = zip(*points, strict=True)
        # Dollar signs would be formulas.
        axes.plot(xs, ys, "--" if dashed else "o-", label=name.replace("$", r"\$"), markersize=4,
                  color="gray" if name.startswith("ideal") else None)
    axes.set(xlabel=curves["x"], ylabel=curves["y"], title=curves["title"].replace("$", r"\$"))
    if "x" in curves["logarithmic"]:
        axes.set_xscale("log", base=2)
    if "y" in curves["logarithmic"]:
        axes.set_yscale("log")
    else:
        axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    if len(curves["lines"]) > 1:
        axes.legend(fontsize=8)
    stream = io.BytesIO()
    figure.savefig(stream, dpi=120, bbox_inches="tight", format="png")
    pyplot.close(figure)
    return stream.getvalue()


def _file_name(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:80]
