"""The hosts of a job beside this one: whether they can take ranks, and what is otherwise there than here."""

import shlex
import sys
from collections.abc import Iterator, Mapping

from hpcai_cli import host_check
from hpcai_cli.engine.environment import host_facts
from hpcai_cli.engine.environment.finding import Finding
from hpcai_cli.engine.environment.own_process import json_lines
from hpcai_cli.errors import MissingError, printable
from hpcai_cli.host_check import Answer
from hpcai_cli.hosts import Host
from hpcai_cli.launchers import Ranks

CLOCK_SECONDS = 5
"""Apart, after which files seem to be older than what they were made from."""
_LEAST_MEMORY = 1e9
"""Bytes that a rank should find free."""


def findings(ranks: Ranks) -> list[Finding]:
    """Ask each host by ssh, as before a training, and compare it with this one."""
    if ranks.launcher == "srun":
        return [Finding("hosts", "ok", "not compared: srun reaches them without ssh")]
    try:
        problems = {problem.host: problem for problem in host_check.problems(ranks)}
    except MissingError as error:
        return [Finding("ssh", "missing", str(error), "apt-get install openssh-client", required=True)]
    others = [host for host in ranks.other_hosts if host not in problems]
    # From the user's own folder, where nothing shadows Python's modules.
    answers = host_check.ask(others, f"PYTHONSAFEPATH=1 exec {shlex.quote(sys.executable)} -m {host_facts.__name__}")
    here, found = host_facts.facts(), []
    for host in ranks.hosts:
        if host.name in problems:
            problem = problems[host.name]
            found.append(Finding(f"host {host.name}", "missing", problem.what, problem.mend, required=True))
        elif host.name in answers:
            found.append(_answered(host, answers[host.name], here))
        else:
            found.append(_finding(host, "this host", here, list(_shortages(host, here))))
    return found


def _answered(host: Host, answer: Answer, here: Mapping) -> Finding:
    there = next((entry for entry in json_lines("\n".join(answer.lines)) if "versions" in entry), None)
    if there is None:
        return Finding(f"host {host.name}", "warning", f"cannot be compared: {printable(answer.lines[-1])}",
                       f"mend what `ssh {host.name} {sys.executable} -m {host_facts.__name__}` says")
    # It looked at its clock between our question and the answer, so that what lies outside of these is its error.
    offset = min(0.0, there["time"] - answer.asked) + max(0.0, there["time"] - answer.answered)
    problems = [*_differences(host, there["versions"], here["versions"]), *_shortages(host, there)]
    if abs(offset) > CLOCK_SECONDS:
        problems.append((f"its clock is {abs(offset):.0f} s {'ahead' if offset > 0 else 'behind'}",
                         f"ssh {host.name} chronyc makestep"))
    return _finding(host, "versions as here" if there["versions"] == here["versions"] else "", there, problems,
                    {f"clock_offset_seconds_{host.name}": round(offset, 3)})


def _finding(host: Host, said: str, facts: Mapping, problems: list[tuple[str, str]],
             metrics: Mapping[str, float] | None = None) -> Finding:
    words = [said, f"{facts['cores']} cores for {host.slots} {'rank' if host.slots == 1 else 'ranks'}",
             f"{facts['memory'] / 1e9:.1f} GB, {facts['memory_free'] / 1e9:.1f} GB of it free",
             *(what for what, _ in problems)]
    return Finding(f"host {host.name}", "warning" if problems else "ok", "; ".join(word for word in words if word),
                   "; ".join(dict.fromkeys(mend for _, mend in problems)), metrics or {})


def _differences(host: Host, there: Mapping[str, str], here: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    """Yield each other version and what mends it: ranks of two releases may reduce other things in another order."""
    for name, version in here.items():
        if there[name] != version:
            package = host_facts.PACKAGES.get(name)
            yield (f"{name} {there[name] or 'is not there'}, here {version or 'none'}",
                   f"ssh {host.name} hpcai doctor --build-horovod" if name == "Horovod" else
                   f"ssh {host.name} {sys.executable} -m pip install {package}=={version}" if package and version else
                   f"install the environment of this host on {host.name}")


def _shortages(host: Host, facts: Mapping) -> Iterator[tuple[str, str]]:
    if facts["cores"] < host.slots:
        yield "fewer cores than ranks", f"--hosts {host.name}:{facts['cores']}"
    if facts["memory_free"] < host.slots * _LEAST_MEMORY:
        yield "little memory for so many ranks", f"end what else runs on {host.name}"
