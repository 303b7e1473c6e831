"""Compares what a server sees with what its model was trained on: figures, thresholds, and what chance alone gives."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass

import numpy as np

from hpcai_cli.engine.deployment import divergence
from hpcai_cli.engine.serving.artefact import Artefact
from hpcai_cli.engine.serving.quantities import CONFIDENCE_EDGES
from hpcai_cli.engine.serving.reference import counts_fit
from hpcai_cli.engine.serving.statistics import SCHEMA as STATISTICS
from hpcai_cli.engine.serving.statistics_layout import LATENCY_EDGES, STATUSES, Layout
from hpcai_cli.errors import DataError, UsageError

SCHEMA = "hpcai.monitor/1"
HOLDS, FAILS, TOO_FEW, NOT_ASKED = "holds", "fails", "too few to tell", "no threshold"


@dataclass(frozen=True)
class Thresholds:
    """From which figure on a report fails; None asks nothing of it."""

    psi: float | None = 0.2
    """Population stability index of each quantity of the inputs, of the classes and of a regression's values; 0.1 to
    0.2 is a moderate change by the usual reading, more a large one."""
    ks: float | None = None
    """Kolmogorov-Smirnov statistic of the same but the classes."""
    total_variation: float | None = None
    """Total variation distance between the shares of the classes."""
    low_confidence: float | None = 0.1
    """By how much the share of answers with a low confidence may grow."""
    low_bound: float = 0.5
    """What counts as a low confidence; a multiple of 0.05."""
    error_rate: float | None = 0.01
    """Share of requests that were answered with 5xx."""
    client_error_rate: float | None = None
    """Share of requests that were answered with 4xx."""
    p99_ms: float | None = None
    """Milliseconds within which 99 of 100 requests are answered."""
    accuracy: float | None = None
    """Least accuracy, where delayed labels are given."""
    mean_absolute_error: float | None = None
    """Largest mean absolute error, where delayed labels of a regression are given."""
    min_examples: int = 100
    """A figure that rests on fewer is too few to tell."""


def examine(artefact: Artefact, statistics: Mapping, thresholds: Thresholds) -> dict:
    """Return a report as JSON values.

    It has `holds`, `checks` (each with `of`, `figure`, `value`, `threshold`, `limit`, `chance`, `examples` and
    `state`), `quantities` (means of the inputs then and now) and the counts that it rests on. A figure that chance
    alone can give, were nothing changed, does not fail: `chance` is what it exceeds in one of 1,000 reports, and
    `limit` the threshold with that taken into account.

    Args:
        statistics: what `merged` gave for this model.

    Raises:
        DataError: they are another model's, or broken.
        UsageError: a bound on the confidence lies between the bins.
    """
    if thresholds.low_bound not in CONFIDENCE_EDGES:
        raise UsageError("a low confidence is told by the bins of the statistics", expected="one of "
                         f"{', '.join(map(str, CONFIDENCE_EDGES))}", received=thresholds.low_bound)
    layout = Layout(artefact)
    check_statistics(layout, statistics)
    checks = [*_of_distributions(artefact, layout, statistics, thresholds),
              *_of_confidence(artefact, layout, statistics, thresholds), *_of_requests(statistics, thresholds)]
    quantities = [_quantity(then, now) for then, now in zip(
        layout.inputs, statistics["inputs"]["quantities"], strict=True)]
    return concluded({
        "schema": SCHEMA, "model": artefact.name, "from": statistics["from"], "to": statistics["to"],
        "answers": statistics["answers"]["examples"], "inputs": statistics["inputs"]["examples"],
        "broken": statistics["answers"]["broken"], "reference": layout.reference is not None,
        "thresholds": asdict(thresholds), "checks": checks, "quantities": quantities})


def concluded(report: dict) -> dict:
    """Return a report with what its checks come to: `holds`, and the names of those that fail."""
    failed = [f"{check['figure']} of {check['of']}" for check in report["checks"] if check["state"] == FAILS]
    return report | {"holds": not failed, "failed": failed}


def check(of: str, figure: str, value: float | None, *, threshold: float | None, examples: int, least: int,
          chance: float | None = None, excess: float | None = None, **more: object) -> dict:
    """Return one check of a report.

    Args:
        least: with fewer examples it is too few to tell.
        chance: a value below it does not fail.
        excess: what chance adds to the figure on average, and so to the threshold.
    """
    limit = None if threshold is None else max(threshold + (excess or 0.0), chance or 0.0)
    state = (TOO_FEW if examples < least or value is None else NOT_ASKED if limit is None else
             FAILS if value > limit else HOLDS)
    return {"of": of, "figure": figure, "value": value, "threshold": threshold, "limit": limit, "chance": chance,
            "examples": examples, "state": state, **more}


def check_statistics(layout: Layout, statistics: Mapping) -> None:
    """Refuse what is not the statistics of this model.

    Raises:
        DataError: what is wrong.
    """
    try:
        if statistics["schema"] != STATISTICS:
            raise ValueError(f"their schema is not {STATISTICS}")
        if statistics["reference"] != layout.key.hex():
            raise ValueError("they are of another model, or of another export of it")
        seen, answers, requests = statistics["inputs"], statistics["answers"], statistics["requests"]
        counts = [("latency", statistics["latency"], len(LATENCY_EDGES) + 1),
                  ("requests", [requests[name] for name in STATUSES], len(STATUSES)),
                  ("examples", [seen["examples"], answers["examples"], answers["broken"]], 3)]
        for name in ("classes", "confidence"):
            place = layout.places[name]
            if place.stop > place.start:
                counts.append((name, answers[name], place.stop - place.start))
        told = [*seen["quantities"], *([answers["values"]] if layout.values else [])]
        for then, now in zip((*layout.inputs, *layout.values), told, strict=True):
            counts.append((then["name"], [*now["counts"], now["missing"]], len(then["edges"]) + 2))
            if any(now[name] is not None and type(now[name]) not in (int, float) for name in ("mean", "std")):
                raise ValueError(f"mean and std of {then['name']} are no numbers")
        if any(statistics[name] is not None and type(statistics[name]) not in (int, float) for name in ("from", "to")):
            raise ValueError("their times are no numbers")
        if wrong := [name for name, found, length in counts if not counts_fit(found, length)]:
            raise ValueError(f"their {wrong[0]} cannot be")
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        text = str(error) if type(error) is ValueError else f"{type(error).__name__} {error}"
        raise DataError(f"the statistics cannot be used: {text}", expected="those that a server of this export of the "
                        "model keeps") from None


def _of_distributions(artefact: Artefact, layout: Layout, statistics: Mapping,
                      thresholds: Thresholds) -> Iterator[dict]:
    """Give the checks of each quantity, of the classes, and of a regression's values."""
    if layout.reference is None:
        return
    then, now = layout.reference["answers"], statistics["answers"]
    pairs = [(f"input {entry['name']}", entry, live) for entry, live in zip(
        layout.inputs, statistics["inputs"]["quantities"], strict=True)]
    if artefact.class_names:
        # Chance is shared out over all comparisons: of 200 features one would be off by it in each fifth report.
        level = divergence.LEVEL / (len(pairs) + 1)
        yield from _shift("the classes", then["classes"], now["classes"], thresholds, level)
        yield check("the classes", "total_variation", divergence.total_variation(then["classes"], now["classes"]),
                    threshold=thresholds.total_variation, examples=sum(now["classes"]), least=thresholds.min_examples,
                    chance=divergence.total_variation_by_chance(then["classes"], now["classes"], level))
    else:
        pairs.append(("the answers", layout.values[0], now["values"]))
        level = divergence.LEVEL / len(pairs)
    for of, entry, live in pairs:
        yield from _shift(of, [*entry["counts"], entry["missing"]], [*live["counts"], live["missing"]], thresholds,
                          level)
        distance, p_value = divergence.kolmogorov_smirnov(entry["counts"], live["counts"])
        yield check(of, "ks", distance, threshold=thresholds.ks, examples=sum(live["counts"]),
                    least=thresholds.min_examples, p_value=p_value,
                    chance=divergence.kolmogorov_smirnov_by_chance(entry["counts"], live["counts"], level))


def _shift(of: str, then: Sequence[int], now: Sequence[int], thresholds: Thresholds, level: float) -> Iterator[dict]:
    mean, chance = divergence.population_stability_index_by_chance(then, now, level) or (None, None)
    yield check(of, "psi", divergence.population_stability_index(then, now), threshold=thresholds.psi,
                examples=sum(now), least=thresholds.min_examples, chance=chance, excess=mean)


def _of_confidence(artefact: Artefact, layout: Layout, statistics: Mapping,
                   thresholds: Thresholds) -> Iterator[dict]:
    """Give the checks of how sure the answers are, and of answers that are no numbers."""
    answers = statistics["answers"]
    if artefact.class_names:
        now = answers["confidence"]
        share = divergence.share_below(CONFIDENCE_EDGES, now, thresholds.low_bound)
        then = layout.reference["answers"]["confidence"] if layout.reference else None
        common = {"examples": sum(now), "least": thresholds.min_examples}
        if then is None or not sum(then) or share is None:
            yield check("the confidence", "low_confidence", share, threshold=None, **common)
        else:
            before = divergence.share_below(CONFIDENCE_EDGES, then, thresholds.low_bound)
            yield check("the confidence", "low_confidence_increase", share - before,
                        threshold=thresholds.low_confidence, share=share, reference=before,
                        chance=divergence.share_by_chance((before, sum(then)), (share, sum(now))), **common)
            # A model is surer of what it was trained on than of anything new, so that this one has no threshold.
            yield check("the confidence", "psi", divergence.population_stability_index(then, now), threshold=None,
                        **common)
    total = answers["examples"]
    yield check("the answers", "broken_rate", answers["broken"] / total if total else None,
                threshold=thresholds.error_rate, examples=total, least=thresholds.min_examples)


def _of_requests(statistics: Mapping, thresholds: Thresholds) -> Iterator[dict]:
    """Give the checks of errors and of latency."""
    requests, latency, least = statistics["requests"], statistics["latency"], thresholds.min_examples
    total, timed = sum(requests.values()), sum(latency)
    for figure, name, threshold in (("error_rate", "5xx", thresholds.error_rate),
                                    ("client_error_rate", "4xx", thresholds.client_error_rate)):
        yield check("the requests", figure, requests[name] / total if total else None, threshold=threshold,
                    examples=total, least=least)
    for figure, share, threshold in (("p50_ms", 0.5, None), ("p99_ms", 0.99, thresholds.p99_ms)):
        seconds = divergence.quantile(LATENCY_EDGES, latency, share)
        yield check("the latency", figure, None if seconds is None else 1000 * seconds, threshold=threshold,
                    examples=timed, least=least)


def _quantity(then: Mapping, now: Mapping) -> dict:
    """Return means and deviations of one quantity, and the share of it outside of what the training split held."""
    live = np.array(now["counts"])
    outside = float(live[0] + live[-1]) / live.sum() if live.sum() and len(live) > 1 else None
    return {"name": then["name"], "mean": now["mean"], "std": now["std"], "reference_mean": then["mean"],
            "reference_std": then["std"], "missing": now["missing"], "outside": outside}
