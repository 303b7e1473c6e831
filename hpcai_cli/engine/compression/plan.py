"""What a compression is asked for, and the forms that are tried for it, in their order; no framework in here."""

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace

from hpcai_cli.errors import UsageError

QUANTIZATIONS = ("float16", "dynamic", "int8")
CONVERSIONS = ("float32", *QUANTIZATIONS)
"""Steps that give a TFLite model; float32 is there to tell what the conversion alone gains."""
PATTERNS = ("unstructured", "2:4", "filters")
MILDER = (0.9, 0.8, 0.65, 0.5, 0.3)
"""Shares of the pruning that was asked for, which are tried where all of it costs too much."""
KEPT_FLOAT = (0.1, 0.25, 0.5)
"""Shares of the layers that int8 leaves in float, those first that it harms most, where all of it costs too much."""
STRONGER = (0.25, 0.5, 0.65, 0.8, 0.9)
"""Shares of the multiply-accumulates that are removed, one after the other, until a target is met."""
_UNITS = {"b": 1, "kb": 1e3, "mb": 1e6, "gb": 1e9, "us": 1e-3, "ms": 1.0, "s": 1e3, "%": 0.01, "": 1.0}


@dataclass(frozen=True)
class Step:
    """One step of a form."""

    kind: str
    """distil, prune, narrow, aware, or one of CONVERSIONS."""
    amount: float = 0.0
    """Of prune the sparsity, of narrow the share of multiply-accumulates that stays, of int8 the share of the layers
    with weights that stays in float."""
    detail: str = ""
    """Of distil the student, of prune the pattern; of int8 "float" where some layers stay so."""

    @property
    def name(self) -> str:
        """Return the step's part of the folder's name."""
        parts = (self.kind, f"{self.amount:.3g}" if self.amount else "", self.detail.replace(":", "of"))
        return re.sub(r"[^\w.=,-]", "_", "_".join(part for part in parts if part and part != "unstructured"))


Form = tuple[Step, ...]
"""What is done to a model, step after step."""


def name_of(form: Form) -> str:
    """Return the name of a form's folder."""
    return "-".join(step.name for step in form) or "original"


@dataclass(frozen=True)
class Target:
    """A goal to search for."""

    kind: str
    """size, in bytes; latency, in ms at batch 1; macs, as a share of the original's."""
    most: float


@dataclass(frozen=True)
class Asked:
    """What the user wants."""

    student: str = ""
    prune: float | None = None
    pattern: str = "unstructured"
    quantize: str = ""
    aware: bool = False
    max_drop: float | None = None
    target: Target | None = None

    @property
    def form(self) -> Form:
        """Return the steps in the order that works."""
        steps = [Step("distil", detail=self.student)] if self.student else []
        if self.prune:
            steps.append(Step("narrow", round(1 - self.prune, 6)) if self.pattern == "filters"
                         else Step("prune", self.prune, self.pattern))
        steps += [Step("aware")] if self.aware else []
        return (*steps, *([Step(self.quantize)] if self.quantize else []))


def parse_target(text: str | None) -> Target | None:
    """Read size=200KB, latency=1ms or macs=50%.

    Raises:
        UsageError: it is none of them.
    """
    if text is None:
        return None
    match = re.fullmatch(r"\s*(size|latency|macs)\s*=\s*([0-9.]+)\s*([a-z%]*)\s*", text, re.I)
    kind, units = (match[1].lower() if match else ""), {"size": ("b", "kb", "mb", "gb"),
                                                        "latency": ("us", "ms", "s"), "macs": ("%", "")}
    try:
        most = float(match[2]) * _UNITS[match[3].lower()]
        if match[3].lower() not in units[kind] or not most > 0 or kind == "macs" and most >= 1:
            raise ValueError
    except (TypeError, KeyError, ValueError):
        raise UsageError("cannot read --target", expected="size=200KB, latency=1ms or macs=50%",
                         received=text) from None
    return Target(kind, most)


def check(asked: Asked, *, epochs: int | None, learning_rate: float | None, temperature: float, alpha: float) -> None:
    """Say everything that is wrong with what was asked.

    Raises:
        UsageError: naming all of it.
    """
    problems = []
    if not asked.form and not asked.target:
        problems.append("nothing to do: give --distill, --prune, --quantize or --target")
    if asked.prune is not None and not 0 < asked.prune < 1:
        problems.append(f"--prune is a share between 0 and 1, and not {asked.prune:g}")
    if asked.pattern not in PATTERNS:
        problems.append(f"--pattern is {', '.join(PATTERNS)}, and not {asked.pattern!r}")
    elif asked.pattern != "unstructured" and asked.prune is None and not asked.target:
        problems.append(f"--pattern {asked.pattern} needs --prune")
    elif asked.pattern == "2:4" and asked.prune not in (None, 0.5):
        problems.append(f"--pattern 2:4 prunes half, and not {asked.prune:g}")
    if asked.quantize and asked.quantize not in QUANTIZATIONS:
        problems.append(f"--quantize is {', '.join(QUANTIZATIONS)}, and not {asked.quantize!r}")
    if asked.aware and asked.quantize != "int8":
        problems.append("--aware trains for --quantize int8")
    if asked.max_drop is not None and not 0 <= asked.max_drop < 1:
        problems.append(f"--max-drop is from 0 to 1, as 0.01 for one point, and not {asked.max_drop:g}")
    if epochs is not None and epochs < 1:
        problems.append(f"--epochs is 1 or more, and not {epochs}")
    if learning_rate is not None and not 0 < learning_rate < float("inf"):
        problems.append(f"--learning-rate is above 0, and not {learning_rate:g}")
    if not 0 < temperature < float("inf"):
        problems.append(f"--temperature is above 0, and not {temperature:g}")
    if not 0 <= alpha <= 1:
        problems.append(f"--alpha is from 0 to 1, and not {alpha:g}")
    if problems:
        raise UsageError("; ".join(problems))


def forms(asked: Asked) -> list[Form]:
    """Return the forms to try, in this order; the first that holds is taken."""
    found = _stronger(asked) if asked.target else _milder(asked) if asked.max_drop is not None else [asked.form]
    # A share can round to nothing, which leaves no steps.
    return [form for form in dict.fromkeys(found) if form]


def _milder(asked: Asked) -> Iterator[Form]:
    """What was asked for first, then what gives up less of the accuracy, the smallest models first."""
    aware = asked.quantize == "int8"
    yield asked.form
    yield replace(asked, aware=aware).form
    if asked.prune and asked.pattern != "2:4":
        for share in MILDER:
            yield replace(asked, prune=round(asked.prune * share, 3), aware=aware).form
    if asked.quantize:
        yield replace(asked, prune=None, aware=aware).form
    if asked.quantize == "int8":
        for share in KEPT_FLOAT:
            yield (*replace(asked, prune=None, aware=False).form[:-1], Step("int8", share, "float"))
    for quantize in QUANTIZATIONS[::-1]:
        if asked.quantize and QUANTIZATIONS.index(quantize) < QUANTIZATIONS.index(asked.quantize):
            yield replace(asked, prune=None, aware=False, quantize=quantize).form


def _stronger(asked: Asked) -> Iterator[Form]:
    """From the mildest form on, what was asked for besides the target always with it."""
    if asked.target.kind == "macs":
        yield replace(asked, prune=round(1 - asked.target.most, 6), pattern="filters").form
        return
    for quantize in [asked.quantize] if asked.quantize else QUANTIZATIONS:
        if form := replace(asked, quantize=quantize).form:
            yield form
    if asked.prune is None:
        for share in STRONGER:
            yield replace(asked, prune=share, pattern="filters", quantize="int8" if not asked.quantize
                          else asked.quantize).form
