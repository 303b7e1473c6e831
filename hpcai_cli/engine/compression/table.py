"""What the forms of a compression gain and cost, measured side by side."""

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from hpcai_cli.engine import machine, model_file
from hpcai_cli.engine.compression import inference_cost
from hpcai_cli.engine.compression.model_cost import Cost, cost_of
from hpcai_cli.engine.compression.plan import CONVERSIONS, Form, name_of
from hpcai_cli.engine.inference import Opened, open_model
from hpcai_cli.recipe import Recipe
from hpcai_cli.run import Run


def open_form(form: Form, folder: Path, *, trust: bool) -> Opened:
    """Open a form's model."""
    return open_model(folder, trust=is_trusted(form, trust))


def is_trusted(form: Form, trust: bool) -> bool:
    """Tell whether a form's model may be opened unseen: a conversion was made here, and needs no trial."""
    return trust or bool(form) and form[-1].kind in CONVERSIONS


def rows(folders: Mapping[Form, Path], recipe: Recipe, examples: np.ndarray, *, trust: bool) -> list[dict]:
    """Return for each form its name and folder, bytes, parameters, multiply-accumulates, sparsity, latency and peak
    memory.

    Args:
        examples: inputs as stored, at least one.
    """
    opened = {name_of(form): open_form(form, folder, trust=trust) for form, folder in folders.items()}
    latency = inference_cost.latencies({name: each.forward for name, each in opened.items()}, examples)
    with ThreadPoolExecutor(machine.cores()) as pool:
        peaks = list(pool.map(lambda form: inference_cost.peak_memory(
            folders[form], trust=is_trusted(form, trust)), folders))
    found = []
    for peak, (form, folder) in zip(peaks, folders.items(), strict=True):
        name, network = name_of(form), cost(folder, recipe, trust=trust)
        found.append({
            "name": name, "folder": str(folder), **inference_cost.file_sizes(opened[name].file),
            "parameters": network.parameters, "macs": network.macs, "sparsity": network.sparsity,
            "layers": {layer.name: layer.sparsity for layer in network.layers if layer.sparsity is not None},
            "left_alone": Run(folder).manifest().get("left_alone", []), "latency_ms": latency[name],
            "peak_memory_mb": peak})
    return found


def cost(folder: Path, recipe: Recipe, *, trust: bool) -> Cost:
    """Return the cost of a form's network; a conversion has that of the step before."""
    run = Run(folder)
    while (manifest := run.manifest()).get("compression_step", {}).get("kind") in CONVERSIONS:
        run = Run(run.folder / manifest["compressed_from"])
    return cost_of(model_file.load(run.model_file, trust=trust), recipe.input_shape)


def draw(report: Mapping, path: Path) -> None:
    """Write a PNG of the measure of quality against the latency at batch 1, a point for each form that was tried."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 5))
    for row in report["forms"]:
        latency, value = row["latency_ms"]["1"], row["metrics"][report["measure"]]
        low, high = row["interval"]
        axes.errorbar(latency, value, yerr=[[max(0.0, value - low)], [max(0.0, high - value)]], fmt="o", capsize=3,
                      color="tab:green" if row["folder"] == report["chosen"] else "tab:blue")
        axes.annotate(f"{row['name']}\n{row['bytes'] / 1e3:,.0f} KB", (latency, value), textcoords="offset points",
                      xytext=(6, 6), fontsize=8)
    axes.set(xscale="log", xlabel="milliseconds for one example", title=report["run"].replace("$", r"\$"),
             ylabel=f"{report['measure']}, {report['split']} split")
    axes.margins(0.2)
    figure.savefig(path, dpi=120, bbox_inches="tight")
    pyplot.close(figure)
