"""The drawings of a report, each as the bytes of a PNG."""

import io
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import numpy as np

MOST_NAMED = 50
"""Classes up to which the drawing of the confusion matrix has names and numbers."""
MOST_DOTS = 5_000
"""Examples up to which each is a dot; more are drawn as how many lie in a place."""
SHEET_COLUMNS = 5
LONGEST_NAME = 30


@contextmanager
def figure(content: io.BytesIO, *, size: tuple[float, float], axes: tuple[int, int] = (1, 1)) -> Iterator:
    """Give axes to draw on (inches of the whole, rows and columns), and write them as a PNG at the end."""
    import matplotlib

    # Without a screen; and not through pyplot, which would keep the figure and the user's own backend.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with matplotlib.rc_context(matplotlib.rcParamsDefault), warnings.catch_warnings():
        # Names in a script that the font lacks are drawn as boxes; a line for each sign would be said otherwise.
        warnings.filterwarnings("ignore", "Glyph .* missing from font")
        drawing = Figure(figsize=size, layout="constrained")
        FigureCanvasAgg(drawing)
        yield drawing.subplots(*axes)
        drawing.savefig(content, dpi=120, bbox_inches="tight", format="png")


def plain(name: str, longest: int = LONGEST_NAME) -> str:
    """Return a stranger's name as it can be drawn: no formula (a dollar sign begins one), and not longer than that."""
    return (name if len(name) <= longest else name[:longest - 3] + "...").replace("$", r"\$")


def confusion(matrix: Sequence[Sequence[int]], class_names: Sequence[str]) -> bytes:
    """Draw the confusion matrix: rows are the true classes, columns the predicted ones."""
    from sklearn.metrics import ConfusionMatrixDisplay

    # Beyond MOST_NAMED the numbers would be too small to read, and take minutes.
    written = len(class_names) <= MOST_NAMED
    side = max(4.0, 0.6 * min(len(class_names), MOST_NAMED) + 1.5)
    content = io.BytesIO()
    with figure(content, size=(side, side)) as axes:
        ConfusionMatrixDisplay(np.array(matrix), display_labels=[plain(name) for name in class_names] if written
                               else None).plot(ax=axes, colorbar=False, cmap="Blues", xticks_rotation="vertical",
                                               values_format="d", include_values=written)
        if not written:
            axes.set(xticks=[], yticks=[])
    return content.getvalue()


def curves(kept: Sequence[Mapping]) -> bytes:
    """Draw the ROC and the precision-recall curves of some classes side by side, with their areas."""
    content = io.BytesIO()
    with figure(content, size=(11, 4.8), axes=(1, 2)) as (left, right):
        for curve in kept:
            name = plain(curve["class"])
            left.plot(*np.transpose(curve["roc"]), label=f"{name}, area {curve['roc_auc']:.4f}")
            right.plot(*np.transpose(curve["precision_recall"]), drawstyle="steps-pre",
                       label=f"{name}, average precision {curve['average_precision']:.4f}")
        left.plot([0, 1], [0, 1], linestyle=":", color="gray", linewidth=1)
        left.set(title="ROC", xlabel="false positive rate", ylabel="true positive rate")
        right.set(title="Precision and recall", xlabel="recall", ylabel="precision")
        for axes in (left, right):
            axes.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02))
            axes.grid(alpha=0.3)
            axes.legend(fontsize="small", loc="lower right" if axes is left else "lower left")
    return content.getvalue()


def reliability(found: Mapping) -> bytes:
    """Draw the reliability diagram: how often the model is right, by how sure it is; below, how many are so sure."""
    content, bins = io.BytesIO(), found["bins"]
    centres = [(row["low"] + row["high"]) / 2 for row in bins]
    width = bins[0]["high"] - bins[0]["low"]
    with figure(content, size=(5, 5.6), axes=(2, 1)) as (upper, lower):
        upper.bar(centres, [row["accuracy"] for row in bins], width, edgecolor="white", label="accuracy")
        upper.plot([row["confidence"] for row in bins], [row["accuracy"] for row in bins], "o", color="black",
                   markersize=3, label="at its mean confidence")
        upper.plot([0, 1], [0, 1], linestyle=":", color="gray", label="perfectly calibrated")
        upper.set(title=f"Calibration error {found['error']:.4f}", ylabel="accuracy", xlim=(0, 1), ylim=(0, 1))
        upper.legend(fontsize="small", loc="upper left")
        lower.bar(centres, [row["count"] for row in bins], width, edgecolor="white", color="gray")
        lower.set(xlabel="confidence", ylabel="examples", xlim=(0, 1), yscale="log")
        lower.yaxis.set_major_formatter("{x:g}")
        lower.yaxis.set_minor_formatter("")
    return content.getvalue()


def residuals(predicted: np.ndarray, labels: np.ndarray, histogram: Mapping) -> bytes:
    """Draw predicted against true values, float (n,) both, and the histogram of the errors."""
    content = io.BytesIO()
    with figure(content, size=(11, 4.8), axes=(1, 2)) as (left, right):
        if len(labels) > MOST_DOTS:
            left.hexbin(labels, predicted, gridsize=60, bins="log", cmap="Blues", mincnt=1)
        else:
            left.plot(labels, predicted, "o", markersize=3, alpha=0.4, markeredgewidth=0)
        ends = [min(labels.min(), predicted.min()), max(labels.max(), predicted.max())]
        left.plot(ends, ends, linestyle=":", color="gray")
        left.set(title="Predicted against true", xlabel="true", ylabel="predicted")
        right.stairs(histogram["counts"], histogram["edges"], fill=True)
        right.axvline(0, color="gray", linestyle=":")
        right.set(title="Errors", xlabel="predicted - true", ylabel="examples")
    return content.getvalue()


def contact_sheet(images: np.ndarray, captions: Sequence[str]) -> bytes:
    """Draw pictures, uint8 (n, height, width, channels), n at least 1, with a caption (of a few lines) below each."""
    rows = -(-len(images) // SHEET_COLUMNS)
    content = io.BytesIO()
    with figure(content, size=(1.9 * SHEET_COLUMNS, 2.5 * rows), axes=(rows, SHEET_COLUMNS)) as axes:
        for axis in axes.flat:
            axis.axis("off")
        for axis, image, caption in zip(axes.flat, images, captions, strict=False):
            # Three channels are colours; of any other number the first is shown as gray.
            shown = image if image.shape[-1] == 3 else image[..., 0]
            axis.imshow(shown, cmap="gray", vmin=0, vmax=255, interpolation="nearest")
            axis.set_title("\n".join(plain(line, 20) for line in caption.split("\n")), fontsize=8)
    return content.getvalue()


def robustness(found: Mapping) -> bytes:
    """Draw the main metric by severity, a line per corruption."""
    content, rows, metric = io.BytesIO(), found["rows"], found["metric"]
    with figure(content, size=(6, 4)) as axes:
        for name in dict.fromkeys(row["corruption"] for row in rows):
            own = [row for row in rows if row["corruption"] == name]
            axes.plot([0, *(row["severity"] for row in own)], [found["clean"], *(row[metric] for row in own)], "o-",
                      label=name)
        axes.set(xlabel="severity", ylabel=metric.replace("_", " "),
                 xticks=sorted({0, *(row["severity"] for row in rows)}))
        axes.grid(alpha=0.3)
        axes.legend()
    return content.getvalue()
