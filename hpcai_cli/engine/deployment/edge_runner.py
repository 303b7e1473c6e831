"""Answers for files on a small device: a TFLite model, its runtime, and nothing that serves."""

import argparse
import csv
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from hpcai_cli.engine.raw.images import read_bytes
from hpcai_cli.engine.serving.artefact import Artefact
from hpcai_cli.engine.serving.examples import answers, check_encoding, image_example, row_examples
from hpcai_cli.engine.serving.runners import open_scores
from hpcai_cli.engine.serving.tensors import RequestError
from hpcai_cli.errors import DataError, HpcaiError

DELIMITERS = "\t;|,"
"""Of a CSV file; comma last, since commas may stand in the cells where another one fits as well."""
JSON_LINES = (".json", ".jsonl", ".ndjson")
"""Ends of the names of files with one row as JSON in each line; others are CSV files."""


def run(folder: Path, words: Sequence[str] | None = None) -> int:
    """Print for each file, or for each row of a file, one line of JSON as `hpcai predict --json` does.

    Args:
        folder: the exported model.
        words: the command line, by default this process's.

    Returns:
        The exit code: 0, or 3 where a file or row has no answer or the model cannot be used.
    """
    parser = argparse.ArgumentParser(description="Say for each image, or each row of a CSV file or of a file with "
                                     "JSON lines, its class and the probability, or its value, as one line of JSON.")
    parser.add_argument("files", nargs="+", metavar="FILE")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="how many cores the model may use")
    asked = parser.parse_args(words)
    try:
        artefact = Artefact.open(folder)
        artefact.verify()
        check_encoding(artefact)
        # Whoever made the bundle has tried it out, and its files are known by their SHA-256.
        scores = open_scores(artefact, threads=max(1, asked.threads), trust=True)
    except HpcaiError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    said = images_said if artefact.inputs == "images" else rows_said
    failed = False
    try:
        for name in asked.files:
            for answer in said(artefact, scores, name):
                failed |= "error" in answer
                print(json.dumps(answer), flush=True)
    except BrokenPipeError:
        # The reader has what it wanted; Python would complain at its end that it cannot write the rest.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    return 3 if failed else 0


def images_said(artefact: Artefact, scores: Callable, name: str) -> Iterator[dict]:
    """Yield `file` and the answer (`label` and `probability`, or `value`) or `error` of an image file."""
    try:
        yield {"file": name, **_answer(artefact, scores(image_example(artefact, read_bytes(name))))}
    except (DataError, RequestError) as error:
        yield {"file": name, "error": str(error)}
    except (OSError, ValueError) as error:
        yield {"file": name, "error": f"cannot be read: {getattr(error, 'strerror', None) or error}"}


def rows_said(artefact: Artefact, scores: Callable, name: str) -> Iterator[dict]:
    """Yield `file`, `row` (from 1) and the answer or `error` of each row of a file."""
    number = 0
    try:
        for number, row in enumerate(_rows(artefact, name), 1):
            try:
                answer = _answer(artefact, scores(row_examples(artefact, [row])))
            except (DataError, RequestError) as error:
                # It was given the row alone.
                answer = {"error": str(error).replace("row 1", f"row {number}", 1)}
            yield {"file": name, "row": number, **answer}
    except (OSError, ValueError, csv.Error, RecursionError) as error:
        why = getattr(error, "strerror", None) or error
        yield {"file": name, "error": f"cannot be read behind row {number}: {why}" if number else
               f"cannot be read: {why}"}


def _answer(artefact: Artefact, scores) -> dict:
    (answer,) = answers(artefact, scores)
    answer.pop("probabilities", None)
    return answer


def _rows(artefact: Artefact, name: str) -> Iterator[object]:
    """Yield the rows of a file as `row_examples` takes them."""
    with open(name, encoding="utf-8-sig", newline="") as file:
        if name.endswith(JSON_LINES):
            yield from (json.loads(line) for line in file if line.strip())
            return
        first = file.readline()
        file.seek(0)
        table = csv.reader(file, delimiter=next((sign for sign in DELIMITERS if sign in first), ","))
        if artefact.encoding is None:
            yield from ([_number(cell) for cell in cells] for cells in table if cells)
            return
        names = next(table, []) if artefact.encoding["header"] else artefact.encoding["names"]
        for cells in filter(None, table):
            if not artefact.encoding["header"] and len(cells) == len(names) - 1:
                # New rows need no label.
                names = [name for name in names if name != artefact.encoding["label"]["name"]]
            # A row with cells too many or too few is none, which `row_examples` tells.
            yield dict(zip(names, cells, strict=True)) if len(cells) == len(names) else cells


def _number(cell: str) -> float | str:
    try:
        return float(cell)
    except ValueError:
        return cell
