"""Where each count of a model's statistics stands in the file of a worker."""

import hashlib
import json
from collections.abc import Mapping, Sequence

import numpy as np

from hpcai_cli.engine.serving.artefact import Artefact
from hpcai_cli.engine.serving.quantities import CONFIDENCE_EDGES, Bins
from hpcai_cli.engine.serving.reference import checked

STATUSES = ("other", "1xx", "2xx", "3xx", "4xx", "5xx")
FASTEST, PER_DECADE, DECADES = 1e-5, 30, 7
LATENCY_EDGES = tuple(FASTEST * 10 ** (step / PER_DECADE) for step in range(PER_DECADE * DECADES + 1))
"""Seconds between the bins of the latency, 8 % apart, from 10 microseconds to 100 seconds."""


class Layout:
    """Where the counts of an artefact's statistics stand in a slot of a file: `places`, a slice for each name.

    Raises:
        DataError: the artefact's reference is not what `reference_of` makes.
    """

    def __init__(self, artefact: Artefact):
        self.reference = reference = checked(artefact)
        self.inputs: Sequence[Mapping] = reference["inputs"] if reference else ()
        # Of values without a reference nothing is known, so that their mean is kept in millions.
        self.values: Sequence[Mapping] = (
            () if artefact.class_names else [reference["answers"]["values"]] if reference else
            [{"name": "value", "edges": [], "mean": 0.0, "std": 1e6}])
        self.input_bins, self.value_bins = (
            Bins([entry["edges"] for entry in entries]) for entries in (self.inputs, self.values))
        scale = [(entry["mean"], entry["std"] or 1.0) for entry in (*self.inputs, *self.values)]
        self.means, self.deviations = np.array(scale, np.float64).reshape(-1, 2).T
        classes = len(artefact.class_names)
        lengths = {"number": 1, "answers": 1, "broken": 1, "watched": 1, "statuses": len(STATUSES),
                   "latency": len(LATENCY_EDGES) + 1, "classes": classes,
                   "confidence": len(CONFIDENCE_EDGES) + 1 if classes else 0,
                   "values": int(self.value_bins.starts[-1]), "inputs": int(self.input_bins.starts[-1]),
                   "sums": 2 * len(scale)}
        ends = np.cumsum(list(lengths.values())).tolist()
        self.places = {name: slice(end - lengths[name], end) for name, end in zip(lengths, ends, strict=True)}
        self.words = ends[-1]
        # Not its name: a server may call the model otherwise. Two formats of one model have the same reference.
        file = artefact.document["file"]
        files = {name: said["sha256"] for name, said in artefact.document["files"].items()
                 if name == file or name.startswith(f"{file}/")}
        told = [artefact.class_names, artefact.inputs, artefact.input_shape, artefact.decision_threshold, reference,
                files]
        self.key = hashlib.sha256(json.dumps(told, sort_keys=True).encode()).digest()
