"""What a training tells while it runs: history.csv, a line for each epoch, TensorBoard's event files."""

import csv
import io
from pathlib import Path

import tensorflow as tf

from hpcai_cli.engine.task import task_of
from hpcai_cli.recipe import Recipe
from hpcai_cli.run import Run, write_bytes


def write_history(run: Run, history: list[dict]) -> None:
    """Write history.csv: a line for each complete epoch."""
    text = io.StringIO()
    if history:
        # Not of the first row alone: an older version may have written fewer figures.
        names = list(dict.fromkeys(name for row in history for name in row))
        writer = csv.DictWriter(text, fieldnames=names, lineterminator="\n")
        writer.writeheader()
        writer.writerows(history)
    write_bytes(run.history_file, text.getvalue().encode())


def status(recipe: Recipe, epoch: int, sums: list[float]) -> str:
    """Return what the progress bar shows; `sums` are of the epoch's loss, measure and examples so far."""
    loss, measure, examples = sums
    if not examples:
        return ""
    return (f"epoch {epoch + 1}/{recipe.epochs}  loss {loss / examples:.4f}  {_words(recipe)} "
            f"{measure / examples:.4f}")


def unit(recipe: Recipe) -> str:
    """Return what an example is called on a progress bar."""
    return "images" if recipe.inputs == "images" else "rows"


def _words(recipe: Recipe) -> str:
    return task_of(recipe).measure.replace("_", " ")


def sentence(recipe: Recipe, row: dict) -> str:
    """Return the line that tells of a complete epoch."""
    measure, words = task_of(recipe).measure, _words(recipe)
    text = f"epoch {row['epoch']}/{recipe.epochs}: loss {row['loss']:.4f}, {words} {row[measure]:.4f}"
    if "validation_loss" in row:
        text += f", validation loss {row['validation_loss']:.4f}, {words} {row[f'validation_{measure}']:.4f}"
    return f"{text}, {row['images_per_second']:,.0f} {unit(recipe)}/s"


class Board:
    """TensorBoard's event files, where the user asked for them."""

    def __init__(self, folder: Path | None):
        self._writer = tf.summary.create_file_writer(str(folder)) if folder else None

    def write(self, row: dict, step: int) -> None:
        """Write one epoch's numbers."""
        if self._writer is not None:
            with self._writer.as_default(step=step):
                for name in row.keys() - {"epoch", "seconds"}:
                    tf.summary.scalar(name, row[name])

    def close(self) -> None:
        """Write what is buffered."""
        if self._writer is not None:
            self._writer.close()
