"""The texts in a bundle: scripts, container, unit, manifests and README, from the templates beside this file."""

import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from hpcai_cli import __version__
from hpcai_cli.engine.deployment.bundle_requirements import PYTHON
from hpcai_cli.engine.serving.artefact import DOCUMENT, Artefact
from hpcai_cli.errors import DataError, printable

TEMPLATES = Path(__file__).parent / "templates"
EXAMPLE = "example.json"
MOST_NAMES = 50
"""Classes or columns that the README lists."""
MOST_MEMORY = 1 << 20
"""MiB that an export may claim for its model."""
_SERVER_TEXTS = {"start.sh": "start.sh", "Dockerfile": "Dockerfile", ".dockerignore": "dockerignore",
                 "README.md": "README.md", "kubernetes/deployment.yaml": "kubernetes/deployment.yaml",
                 "kubernetes/service.yaml": "kubernetes/service.yaml",
                 "kubernetes/autoscaler.yaml": "kubernetes/autoscaler.yaml"}
"""Template by the path in the bundle."""
_WORKER = {"tflite": 65, "onnx": 95, "saved_model": 705, "keras": 705}
"""MiB of a worker with a model of a few kilobytes, measured after 200 requests."""
_PARENT = 45
"""MiB of the process that starts the workers."""


def server_texts(artefact: Artefact, *, tag: str) -> dict[str, str]:
    """Return the texts of a bundle with a server, by their path in it.

    Args:
        tag: names this content of the bundle, as the tag of its image.

    Raises:
        DataError: the export tells its columns in another way than an export does.
    """
    usual, most = _memory(artefact)
    values = _values(artefact) | {"label": dns_label(artefact.name), "tag": tag, "usual_memory": str(usual),
                                  "most_memory": str(most), "ask": _filled(f"ask_{artefact.inputs}.md", {})}
    texts = {name: _filled(template, values) for name, template in _SERVER_TEXTS.items()}
    texts[f"{artefact.name}.service"] = _filled("model.service", values)
    if artefact.inputs == "features":
        texts[EXAMPLE] = json.dumps({"rows": [_example_row(artefact)]}, indent=2) + "\n"
    return texts


def edge_texts(artefact: Artefact) -> dict[str, str]:
    """Return the texts of a bundle for small devices, by their path in it."""
    values = _values(artefact)
    values["ask"] = _filled(f"edge_{artefact.inputs}.md", {"layout": _layout(artefact)})
    return {"run.py": _filled("run.py.txt", values), "README.md": _filled("edge.md", values)}


def dns_label(name: str) -> str:
    """Return a model's name as Kubernetes takes one everywhere: lower-case letters, digits and hyphens, 63 at most,
    a letter first (RFC 1035)."""
    label = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    return (label if label[:1].isalpha() else f"model-{label}")[:63].rstrip("-")


def _filled(template: str, values: Mapping[str, str]) -> str:
    """Return a template with values in the places of their names, {{name}}."""
    return re.sub(r"\{\{(\w+)\}\}", lambda place: values[place[1]].strip("\n"), (TEMPLATES / template).read_text())


def _values(artefact: Artefact) -> dict[str, str]:
    return {"name": artefact.name, "version": __version__, "python": PYTHON, "about": _about(artefact),
            "inputs": artefact.inputs, "datatype": "UINT8" if artefact.inputs == "images" else "FP32",
            "shape": ", ".join(map(str, artefact.input_shape)), "size": str(math.prod(artefact.input_shape))}


def _about(artefact: Artefact) -> str:
    """Return what the model takes and answers, for people."""
    if artefact.inputs == "images":
        height, width, channels = artefact.input_shape
        colors = {1: "in gray", 3: "in color"}.get(channels, f"with {channels} channels")
        takes = f"an image, which is brought to {width}x{height} pixels {colors}"
    else:
        takes = f"a row of a table, which becomes {artefact.input_shape[0]} features"
    answers = f"one of {len(artefact.class_names)} classes and its probability" if artefact.class_names else "a number"
    parts = [f"It takes {takes}, and answers {answers}."]
    if artefact.decision_threshold is not None:
        parts.append(f"The second class is the answer from a probability of {artefact.decision_threshold:g} on.")
    if artefact.class_names:
        parts.append("Classes:")
        parts.append(_listed(artefact.class_names))
    if artefact.encoding:
        parts.append("Columns:")
        parts.append(_listed([f"{name} ({kind})" for name, kind, _ in _columns(artefact)]))
    if "MODEL_CARD.md" in artefact.document["files"]:
        parts.append("`model/MODEL_CARD.md` tells what it was made of, how good it is and where its limits are.")
    return "\n\n".join(parts)


def _listed(names: Sequence[str]) -> str:
    """Return names as a block of plain text, in which no sign of theirs has a meaning."""
    more = [f"... and {len(names) - MOST_NAMES} more, in model/artefact.json"] if len(names) > MOST_NAMES else []
    return "\n".join(f"    {line}" for line in [*map(printable, names[:MOST_NAMES]), *more])


def _columns(artefact: Artefact) -> list[tuple[str, str, object]]:
    """Return name, kind and a value of each column: what stands for missing numbers, or the first category."""
    try:
        return [(str(column["name"]), str(column["kind"]),
                 next(iter(column["categories"]), None) if "categories" in column else column["fill"])
                for column in artefact.encoding["columns"]]
    except (KeyError, TypeError) as error:
        raise DataError(f"the columns in {artefact.folder / DOCUMENT} cannot be used: {printable(str(error))}",
                        mend="export the model again") from None


def _example_row(artefact: Artefact) -> dict | list:
    if artefact.encoding is None:
        return [0] * artefact.input_shape[0]
    return {name: value for name, _, value in _columns(artefact)}


def _layout(artefact: Artefact) -> str:
    """Return how a CSV file for the model begins."""
    if artefact.encoding is None:
        return f"Each line of a CSV file holds {artefact.input_shape[0]} numbers"
    return "The first line of a CSV file names the columns" if artefact.encoding.get("header") else \
        "Each line of a CSV file holds the cells in the order of the training data"


def _memory(artefact: Artefact) -> tuple[int, int]:
    """Return how many MiB a server with one worker takes, and how many it may take for a while.

    The usual amount has room for the model's copies, one for each size of a batch. The other one has room for a second
    model, which a reload brings, and for the trial of a TFLite file, eight times as large a batch in a process of its
    own.
    """
    worker = _WORKER[artefact.kind]
    try:
        peak = float(artefact.document["serving"]["measured"][artefact.kind]["peak_memory_mb"]) * 1e6 / 2**20
        model = min(max(peak - worker, 0), MOST_MEMORY)
    except (KeyError, TypeError, ValueError):
        size = sum(path.stat().st_size for path in [artefact.file, *artefact.file.rglob("*")] if path.is_file())
        model = 4 * size / 2**20
    usual = 1.25 * (_PARENT + worker + 2 * model)
    trial = worker + 8 * model if artefact.kind == "tflite" else 0
    return tuple(64 * math.ceil(amount / 64) for amount in (usual, 1.25 * (usual + model + trial)))
