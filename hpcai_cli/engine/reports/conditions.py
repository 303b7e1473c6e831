"""Conditions on a report's figures, such as accuracy>=0.99."""

import difflib
import operator
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from hpcai_cli.errors import DataError, GateError, UsageError

_OPERATORS = {">=": operator.ge, "<=": operator.le, ">": operator.gt, "<": operator.lt, "==": operator.eq}


@dataclass(frozen=True)
class Condition:
    """A figure and the bound that it has to hold; the ends of NAME's interval are NAME_low and NAME_high."""

    name: str
    sign: str
    bound: float

    def __str__(self) -> str:
        return f"{self.name}{self.sign}{self.bound:g}"


def parse(text: str) -> Condition:
    """Read a condition.

    Raises:
        UsageError: it is none.
    """
    match = re.fullmatch(r"\s*(\w+)\s*(>=|<=|==|>|<)\s*(\S+)\s*", text)
    try:
        return Condition(match[1], match[2], float(match[3]))
    except (TypeError, ValueError):
        raise UsageError("cannot read --require", expected='a condition such as "accuracy>=0.99"',
                         received=text) from None


def check_names(conditions: Iterable[Condition], names: Sequence[str], bounded: Sequence[str],
                elsewhere: Mapping[str, str]) -> None:
    """Refuse conditions on figures that the report will not have.

    Args:
        names: the figures.
        bounded: those that have an interval, whose ends can be named too.
        elsewhere: figures that there would be with another option, and that option.

    Raises:
        UsageError: a name is none of them.
    """
    known = [*names, *(f"{name}_{end}" for name in bounded for end in ("low", "high"))]
    for condition in conditions:
        if condition.name not in known:
            option = elsewhere.get(condition.name)
            near = difflib.get_close_matches(condition.name, known, n=1)
            raise UsageError(f"--require knows no {condition.name!r}" + (
                f" without {option}" if option else f", perhaps {near[0]!r}" if near else ""),
                expected=f"one of {', '.join(names)}; or NAME_low, NAME_high for the ends of its interval",
                received=str(condition))


def check(conditions: Sequence[Condition], figures: Mapping[str, float], split: str) -> None:
    """Check the conditions against figures by name.

    Raises:
        DataError: a figure has no value on these data.
        GateError: a condition does not hold; all such are named.
    """
    absent = [condition for condition in conditions if condition.name not in figures]
    if absent:
        error = DataError(f"{', '.join(condition.name for condition in absent)} "
                          f"{'has' if len(absent) == 1 else 'have'} no value on the {split} split",
                          expected="labels that are not all the same", received=f"--require {absent[0]}")
        error.collective = True
        raise error
    failed = [f"{condition.name} is {figures[condition.name]:.6g} where {condition} is required"
              for condition in conditions
              if not _OPERATORS[condition.sign](figures[condition.name], condition.bound)]
    if failed:
        error = GateError("; ".join(failed))
        error.collective = True
        raise error
