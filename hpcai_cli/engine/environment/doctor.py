"""Everything that a job needs, looked at and tried; each finding says what mends it."""

from hpcai_cli import console, launch
from hpcai_cli.engine.environment import limits, network, other_hosts, rank_checks, software, storage
from hpcai_cli.engine.environment.finding import Finding
from hpcai_cli.launchers import Ranks


def examine(ranks: Ranks | None = None) -> list[Finding]:
    """Look at this host, and at the others of a job; nothing is imported here, so that what is broken shows.

    Args:
        ranks: those that are to be tried over hosts.
    """
    console.note("importing TensorFlow and Horovod in a process of their own ...")
    probed = software.probe()
    findings = [*software.findings(probed), *limits.findings(), *storage.findings(), *network.findings()]
    if not launch.missing_package("horovod"):
        findings += rank_checks.here(probed)
    if ranks is not None:
        found = [network.way(ranks), *other_hosts.findings(ranks)]
        able = all(finding.status != "missing" for finding in found)
        findings += [*found, *(rank_checks.across(ranks) if able else
                               [Finding("allreduce, hosts", "missing", "not tried: a host cannot take ranks")])]
    return findings
