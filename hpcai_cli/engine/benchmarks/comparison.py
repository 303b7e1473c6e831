"""Compares two results of one machine: what got worse by more than chance explains."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass

from hpcai_cli.errors import DataError, UsageError


@dataclass(frozen=True)
class Change:
    """One figure then and now."""

    benchmark: str
    name: str
    unit: str
    before: float
    now: float
    worse: float
    """By which share it got worse; less than 0 where it got better."""
    is_noise: bool
    """Whether the intervals of the two medians overlap, or either was measured less than three times."""

    def to_json(self) -> dict:
        """Return the change as JSON values."""
        return asdict(self)

    def fails(self, share: float) -> bool:
        """Tell whether it got worse by more than such a share, and by more than chance."""
        return self.worse > share and not self.is_noise


def parse_share(text: str) -> float:
    """Read a share such as 5% or 0.05.

    Raises:
        UsageError: it is none.
    """
    try:
        share = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
        if not 0 <= share < 100:
            raise ValueError
        return share
    except ValueError:
        raise UsageError("cannot read --fail-on", expected="a share such as 5%", received=text) from None


def check_comparable(old: Mapping, machine: Mapping) -> None:
    """Refuse a result of another machine.

    Args:
        machine: `surroundings.this_machine()`.

    Raises:
        DataError: something of the machine differs; figures would tell of that, not of a change.
    """
    apart = [name for name in machine if old["machine"].get(name) != machine[name]]
    if apart:
        then = ", ".join(f"{name} {old['machine'].get(name)}" for name in apart)
        raise DataError("the results to compare with are of another machine", received=then,
                        expected=", ".join(f"{name} {machine[name]}" for name in apart))


def changes(old: Mapping, new: Mapping) -> list[Change]:
    """Return the figures that both results have and of which one way is better, those that got worse most first."""
    before = {(row["benchmark"], row["name"], row["unit"]): row for row in old["figures"]}
    found = []
    for row in new["figures"]:
        then = before.get((row["benchmark"], row["name"], row["unit"]))
        if then is None or row["less_is_better"] is None or min(then["value"], row["value"]) <= 0:
            continue
        ratio = row["value"] / then["value"]
        worse = ratio - 1 if row["less_is_better"] else 1 / ratio - 1
        found.append(Change(row["benchmark"], row["name"], row["unit"], then["value"], row["value"], worse,
                            _overlap(then, row)))
    return sorted(found, key=lambda change: -change.worse)


def _overlap(then: Mapping, now: Mapping) -> bool:
    if min(len(then["rounds"]), len(now["rounds"])) < 3:
        return True
    return then["interval"][0] <= now["interval"][1] and now["interval"][0] <= then["interval"][1]
