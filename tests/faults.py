"""Disturbs trainings in every way that they have to bear, and looks whether anything is lost.

    python tests/faults.py [--seed 0] [--scale 1.0] [--only NAME]...

Real processes train a recipe that counts what it is given (faults_recipe.py). Whatever was done to a training, in the
end its weights are, bit for bit, those of one that nobody has disturbed. Some parts need root.
"""

import argparse
import random
import shutil
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import faults_ranks
import faults_stops
import faults_surroundings
from faults_lab import Lab

FOLDER = Path("build/faults")
"""Kept where something failed."""

PARTS: dict[str, Callable[[Lab, float], tuple[str, list[str]]]] = {
    "kills-1": lambda lab, scale: faults_stops.kills(lab, _count(50, scale), 1),
    "kills-2": lambda lab, scale: faults_stops.kills(lab, _count(50, scale), 2),
    "terms-1": lambda lab, scale: faults_stops.terms(lab, _count(20, scale), 1),
    "terms-2": lambda lab, scale: faults_stops.terms(lab, _count(20, scale), 2),
    "rank-killed": lambda lab, scale: faults_ranks.killed(lab),
    "rank-stopped": lambda lab, scale: faults_ranks.stopped(lab),
    "elastic": lambda lab, scale: faults_ranks.elastic(lab),
    "driver": lambda lab, scale: faults_surroundings.driver(lab),
    "disk-full": lambda lab, scale: faults_surroundings.disk_full(lab),
    "read-only": lambda lab, scale: faults_surroundings.read_only(lab),
    "flipped": lambda lab, scale: faults_surroundings.flipped(lab),
    "clock": lambda lab, scale: faults_surroundings.clock(lab),
    "data-replaced": lambda lab, scale: faults_surroundings.data_replaced(lab),
    "two-trainings": lambda lab, scale: faults_surroundings.two_trainings(lab),
    "stale-lock": lambda lab, scale: faults_surroundings.stale_lock(lab),
}
"""Each returns what it has found, and what is wrong with it."""


def _count(number: int, scale: float) -> int:
    return max(1, round(number * scale))


def run_part(name: str, lab: Lab, scale: float) -> bool:
    """Run a part and print a line; return whether all of it holds."""
    started = time.monotonic()
    try:
        found, problems = PARTS[name](lab, scale)
    except Exception:
        found, problems = "came to no end", [traceback.format_exc()]
    seconds = time.monotonic() - started
    print(f"{'FAIL' if problems else 'PASS'}  {name}: {'; '.join([found, *problems])}  ({seconds:.0f} s)", flush=True)
    return not problems


def main() -> int:
    """Parse the command line; return 1 where a part fails."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seed", type=int, help="of what is left to chance; another one each time by default")
    parser.add_argument("--scale", type=float, default=1.0, help="of the number of kills and signals (%(default)g)")
    parser.add_argument("--only", action="append", choices=list(PARTS), metavar="NAME",
                        help=f"a part alone, repeatable: {', '.join(PARTS)}")
    parser.add_argument("--folder", type=Path, default=FOLDER, help="where it trains (%(default)s)")
    given = parser.parse_args()
    seed = random.SystemRandom().randrange(10**6) if given.seed is None else given.seed
    print(f"seed {seed}", flush=True)
    lab = Lab(given.folder, seed)
    failed = [name for name in given.only or PARTS if not run_part(name, lab, given.scale)]
    if failed:
        print(f"failed: {', '.join(failed)}; see {given.folder}", file=sys.stderr)
        return 1
    shutil.rmtree(given.folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
