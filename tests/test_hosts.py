"""Lists of hosts: from the command line, from files of all kinds, from Slurm and from an MPIJob."""

import socket

import pytest

from hpcai_cli import hosts
from hpcai_cli.errors import DataError, UsageError
from hpcai_cli.hosts import Host


@pytest.mark.parametrize(("text", "found"), [
    ("a", [Host("a")]), ("a:4", [Host("a", 4)]), ("a:4,b:2", [Host("a", 4), Host("b", 2)]),
    (" a:1 , 10.0.0.2:3 ", [Host("a"), Host("10.0.0.2", 3)]), ("node-1.site_a.org", [Host("node-1.site_a.org")]),
    ("a,b,a:2", [Host("a", 3), Host("b")])])
def test_hosts_of_the_command_line(text, found):
    assert list(hosts.parse(text)) == found


@pytest.mark.parametrize("text", [
    "", ",", "a,", "a:0", "a:-1", "a:x", "a:", ":4", "-oProxyCommand=x", "a b", "me@a", "a;id", "$(id)", "a:1:2", "a:१",
    "a-", "a:100000"])
def test_what_names_no_hosts(text):
    with pytest.raises(UsageError, match="a:4,b:4"):
        hosts.parse(text)


@pytest.mark.parametrize(("content", "found"), [
    ("a slots=4\nb slots=2\n", [Host("a", 4), Host("b", 2)]), ("a:4\nb\n", [Host("a", 4), Host("b")]),
    ("# all\n\n a slots=4 max_slots=8 # new\nb max_slots=9 slots=3", [Host("a", 4), Host("b", 3)]),
    ("a\na\nb\n", [Host("a", 2), Host("b")])])
def test_hosts_of_a_file(tmp_path, content, found):
    (tmp_path / "hosts").write_text(content)
    assert list(hosts.read_file(tmp_path / "hosts")) == found


@pytest.mark.parametrize(("content", "message"), [
    (b"", "names no host"), (b"# none\n", "names no host"), (b"a slots=4\nb four\n", "line 2"), (b"-x\n", "line 1"),
    (b"a slots=x\n", "line 1"), (b"\xff\xfe", "cannot read the hostfile"), (b"a slots=0\n", "line 1")])
def test_what_is_no_file_of_hosts(tmp_path, content, message):
    (tmp_path / "hosts").write_bytes(content)
    with pytest.raises(DataError, match=message):
        hosts.read_file(tmp_path / "hosts")


def test_a_hostfile_that_is_not_there(tmp_path):
    with pytest.raises(DataError, match="No such file"):
        hosts.read_file(tmp_path / "none")


@pytest.mark.parametrize(("text", "names"), [
    ("gpu[01-03,7],login", ["gpu01", "gpu02", "gpu03", "gpu7", "login"]), ("node1", ["node1"]),
    ("a[1-2]b[3-4]", ["a1b3", "a1b4", "a2b3", "a2b4"]), ("r1-n[08-10]", ["r1-n08", "r1-n09", "r1-n10"]),
    ("", []), ("a[1-", []), ("a[1-2", []), ("a b", []), ("x[0-999999999]", [])])
def test_nodes_of_slurm(text, names):
    assert hosts.nodes(text) == names


@pytest.mark.parametrize(("text", "numbers"), [("4", [4]), ("2(x3),1", [2, 2, 2, 1]), ("1,2", [1, 2]), ("", []),
                                               ("x", []), ("2(x", []), ("2(x2)1", [])])
def test_tasks_of_each_node(text, numbers):
    assert hosts.per_node(text) == numbers


def test_a_job_of_slurm_allots_hosts():
    assert hosts.allotted({"SLURM_JOB_NODELIST": "n[1-3]", "SLURM_TASKS_PER_NODE": "4(x2),2"}) == (
        Host("n1", 4), Host("n2", 4), Host("n3", 2))
    assert hosts.allotted({"SLURM_JOB_NODELIST": "n[1-2]"}) == (Host("n1"), Host("n2"))
    assert hosts.allotted({"SLURM_JOB_NODELIST": "n[1-3]", "SLURM_TASKS_PER_NODE": "4"}) == ()
    assert hosts.allotted({}) == ()


def test_the_launcher_of_an_mpi_job_allots_hosts(tmp_path):
    (tmp_path / "hostfile").write_text("job-worker-0.job.default.svc slots=2\njob-worker-1.job.default.svc slots=2\n")
    variables = {"OMPI_MCA_orte_default_hostfile": str(tmp_path / "hostfile"), "K_MPI_JOB_ROLE": "launcher"}
    assert [host.slots for host in hosts.allotted(variables)] == [2, 2]
    assert hosts.allotted({**variables, "K_MPI_JOB_ROLE": "worker"}) == ()


def test_this_host_is_known_by_its_names_and_addresses():
    assert hosts.is_here("localhost") and hosts.is_here("127.0.0.1") and hosts.is_here(socket.gethostname())
    assert not hosts.is_here("203.0.113.77") and not hosts.is_here("no-such-host.invalid")
