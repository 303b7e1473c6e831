"""One thing that `hpcai doctor` has looked at."""

from collections.abc import Mapping
from dataclasses import dataclass, field

REBUILD = "hpcai doctor --build-horovod"


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at."""

    name: str
    status: str
    """`ok`, `warning` (works, but not as well as it could) or `missing` (absent or broken)."""
    value: str
    mend: str = ""
    """The command that mends it; empty when there is nothing to mend."""
    metrics: Mapping[str, float] = field(default_factory=dict)
    """Names and numbers for scripts, where the value holds numbers."""
    required: bool = False
    """Without it a training run cannot work here."""


def judged(name: str, value: str, mend: str, *, is_well: bool, metrics: Mapping[str, float] | None = None) -> Finding:
    """Return a finding that is ok, or a warning with what mends it."""
    return Finding(name, "ok" if is_well else "warning", value, "" if is_well else mend, metrics or {})
