"""A profile covers the steps that were asked for by whole blocks, changes no bit, and says where their time went."""

import json
import signal
from pathlib import Path

import numpy as np
import pytest

from hpcai_cli.engine import profile_files, training
from hpcai_cli.engine.distributed import Serial
from hpcai_cli.engine.profile_summary import KINDS, Job, complete, text
from hpcai_cli.engine.profiling import Profiler
from hpcai_cli.errors import StoppedEarly, UsageError
from hpcai_cli.signals import StopRequest

pytestmark = pytest.mark.alone


def profiled(tiny, first: int, last: int, run: str = "run", **settings) -> training.Job:
    job = tiny.job(run, **settings)
    job.profiler = Profiler((first, last), job.run.profile, Serial(), job.recipe, 1)
    return job


def traced_steps(folder: Path) -> list[int]:
    """Return the numbers of the steps at which a traced call of the compiled steps begins."""
    from tensorflow.tsl.profiler.protobuf import xplane_pb2

    (file,) = folder.glob("plugins/profile/*/*.xplane.pb")
    found = []
    for plane in xplane_pb2.XSpace.FromString(file.read_bytes()).planes:
        for line in plane.lines:
            for event in line.events:
                if plane.event_metadata[event.metadata_id].name == "train":
                    values = {plane.stat_metadata[stat.metadata_id].name: stat.int64_value for stat in event.stats}
                    found.append(values["step_num"])
    return sorted(found)


# ---- Which steps ---------------------------------------------------------------------------------------------------

# The first step comes alone, then two at a time; of an epoch's 13 the last is not whole and comes alone too.
@pytest.mark.parametrize(("asked", "steps", "begins"), [
    ((5, 8), [4, 9], [4, 6, 8]),
    ((4, 4), [4, 5], [4]),
    ((1, 3), [2, 3], [2]),
    ((12, 16), [12, 17], [12, 13, 14, 16]),
])
def test_whole_blocks_cover_what_was_asked_for(tiny, asked, steps, begins):
    job = profiled(tiny, *asked, epochs=2)
    found = training.train(job, resume=False)["profile"]
    assert (found["asked"], found["steps"], found["blocks"]) == (list(asked), steps, len(begins))
    assert traced_steps(job.run.profile) == begins
    assert json.loads((job.run.profile / "summary.json").read_text()) == found
    summary = (job.run.profile / "summary.md").read_text()
    assert summary == text(found)
    assert f"steps {steps[0]} to {steps[1]}" in summary


def test_the_shares_are_of_the_whole_and_the_operations_are_the_models(tiny):
    job = profiled(tiny, 5, 12)
    found = training.train(job, resume=False)["profile"]
    assert set(found["shares"]) == set(KINDS) and sum(found["shares"].values()) == pytest.approx(1)
    assert found["shares"]["communication"] == 0 and min(found["shares"].values()) >= 0
    assert sum(found["ranks_ms"][0]) == pytest.approx(found["step_ms"])
    assert any("MatMul" in name for name in found["operations_ms"])
    assert sum(found["operations_ms"].values()) < found["step_ms"] * 1.05
    assert found["transfer_ms"] is None and found["advice"]


def test_a_profile_changes_no_bit(tiny):
    plain = training.train(tiny.job("plain", dropout=0.2), resume=False)
    watched = training.train(profiled(tiny, 3, 20, "watched", dropout=0.2), resume=False)
    assert plain["metrics"]["loss"] == watched["metrics"]["loss"]
    assert all(np.array_equal(one, other) for one, other in
               zip(tiny.weights("plain"), tiny.weights("watched"), strict=True))


def test_a_training_that_ends_before_has_no_profile_and_one_that_ends_within_has_its_part(tiny):
    assert training.train(profiled(tiny, 500, 510, "before"), resume=False)["profile"] is None
    within = training.train(profiled(tiny, 50, 90, "within"), resume=False)["profile"]
    assert within["steps"][1] == 4 * tiny.steps


def test_a_signal_within_the_steps_keeps_the_profile(tiny):
    stop = StopRequest()
    job = profiled(tiny, 5, 50, stop=stop)
    watched = job.profiler.watched

    def stopped(steps, blocks, at, per_block):
        def until(blocks):
            for block in blocks:
                if at.step >= 8:
                    stop._receive(signal.SIGTERM, None)
                yield block
        return watched(steps, until(blocks), at, per_block)

    job.profiler.watched = stopped
    with pytest.raises(StoppedEarly):
        training.train(job, resume=False)
    (event,) = [event for event in tiny.events() if event["event"] == "stopped"]
    assert event["profile"]["steps"][0] == 4
    assert (job.run.profile / "summary.md").is_file()


def test_a_resumed_run_that_has_passed_the_steps_says_so(tiny):
    training.train(tiny.job(epochs=1), resume=False)
    with pytest.raises(UsageError, match=r"at step 13 already.*5-8"):
        training.train(profiled(tiny, 5, 8, epochs=2), resume=True)


# ---- What the files say --------------------------------------------------------------------------------------------

def timeline(path: Path, *events: tuple) -> Path:
    """Write a timeline; an event is a phase, a tensor, a microsecond and a name."""
    rows = [{"name": "process_name", "ph": "M", "pid": 0, "args": {"start_time_since_epoch_in_micros": 5}}]
    rows += [{"name": "process_name", "ph": "M", "pid": number, "args": {"name": name}} for number, name in
             enumerate(("HorovodAllreduce", "while/gradients.float32_1of2", "while/gradients.float32_2of2"),
                       1)]
    rows += [{"ph": phase, "pid": tensor, "ts": at, **({"name": name} if name else {})}
             for phase, tensor, at, name in events]
    path.write_text(json.dumps(rows))
    return path


def test_fused_tensors_travel_in_one_message_and_waiting_is_not_sending(tmp_path):
    begun = [("B", tensor, 100, "NEGOTIATE_ALLREDUCE") for tensor in (1, 2, 3)]
    sent = [event for tensor in (2, 3) for event in (
        ("E", tensor, 5_000, ""), ("B", tensor, 6_000, "ALLREDUCE"), ("B", tensor, 6_000, "WAIT_FOR_DATA"),
        ("E", tensor, 7_000, ""), ("B", tensor, 7_000, "MPI_ALLREDUCE"), ("E", tensor, 9_000, ""),
        ("E", tensor, 9_100, ""))]
    later = [("B", 2, 20_000, "ALLREDUCE"), ("B", 2, 20_000, "MPI_ALLREDUCE"), ("E", 2, 21_000, ""),
             ("E", 2, 21_000, ""), ("B", 3, 22_000, "NEGOTIATE_ALLREDUCE")]
    found = profile_files.messages(timeline(tmp_path / "timeline.json", *begun, *sent, *later))
    assert (found.seconds, found.count) == (pytest.approx(0.003), 2)


@pytest.mark.parametrize("content", [None, "", '[{"ph": "B"', "{}"])
def test_without_a_whole_timeline_nothing_is_said_of_messages(tmp_path, content):
    path = tmp_path / "timeline.json"
    if content is not None:
        path.write_text(content)
    found = profile_files.messages(path)
    assert found is None or found.count == 0


def test_without_a_trace_that_can_be_read_there_are_no_operations(tmp_path):
    assert profile_files.operations(tmp_path) == {}
    broken = tmp_path / "plugins/profile/now/host.xplane.pb"
    broken.parent.mkdir(parents=True)
    broken.write_bytes(b"\xff" * 100)
    assert profile_files.operations(tmp_path) == {}


# ---- What to change ------------------------------------------------------------------------------------------------

def advice(*ranks_ms: list[float], job: dict | None = None, **measured) -> str:
    found = {"asked": [5, 8], "steps": [4, 9], "blocks": 3, "per_call": 2.0, "step_ms": 10.0, "step_ms_before": None,
             "ranks_ms": list(ranks_ms), "gradient_bytes": 1_000_000, "busy_cores": 2.0, "starved_cores": 0.0,
             "folder": "run/profile", "transfer_ms": None, "messages": None, "operations_ms": {"MatMul": 9.0}}
    about = {"size": len(ranks_ms), "local_size": len(ranks_ms), "cores": 8, "threads": 2, "gpus": 0, "batch_size": 64,
             "accumulation_steps": 1, "precision": "float32", "instruction_sets": "x86_64 with avx2", "launcher": ""}
    whole = complete(found | measured, Job(**about | (job or {})))
    assert all(words in text(whole) for words in whole["advice"])
    return " ".join(whole["advice"])


@pytest.mark.parametrize(("ranks", "job", "measured", "said", "not_said"), [
    # The model's own arithmetic, and what would make it faster.
    ([[0, 10, 0, 0]], {}, {}, "Nothing stands out", "--np"),
    ([[0, 10, 0, 0]], {"instruction_sets": "amx_bf16"}, {}, "--precision mixed_bfloat16", "--np"),
    ([[0, 10, 0, 0]], {"gpus": 4, "precision": "mixed_bfloat16"}, {}, "--np 4", "--precision"),
    ([[0, 10, 0, 0]], {}, {"busy_cores": 1.0}, "`--np 2` gives each", "Nothing"),
    ([[0, 10, 0, 0]], {}, {"busy_cores": 1.0, "starved_cores": 0.9}, "Nothing", "--np"),
    ([[0, 10, 0, 0]], {}, {"operations_ms": {"Mul": 4.0}}, "60% of compute between operations", "Nothing"),
    # Input and Python.
    ([[4, 6, 0, 0]], {}, {}, "hpcai benchmark input", "fewer calls"),
    ([[0, 6, 0, 4]], {}, {}, "for 2 steps", "hpcai benchmark input"),
    # Communication: late ranks, data, too many processes, Gloo.
    ([[0, 2, 8, 0], [0, 9, 1, 0]], {}, {"transfer_ms": 0.5, "messages": 1.0}, "rank 1 needs 9.00 ms", "in turns"),
    ([[0, 6, 4, 0], [0, 6, 4, 0]], {}, {"transfer_ms": 0.5, "messages": 1.0}, "late in turns", "rank 1"),
    ([[0, 6, 4, 0], [0, 6, 4, 0]], {}, {"transfer_ms": 3.9, "messages": 1.0}, "--batch-size 128", "each other"),
    ([[0, 6, 4, 0], [0, 6, 4, 0]], {"accumulation_steps": 4}, {}, "accumulation_steps=8", "FUSION"),
    ([[0, 6, 4, 0], [0, 6, 4, 0]], {}, {"transfer_ms": 3.9, "messages": 3.0, "gradient_bytes": 300_000_000},
     "HOROVOD_FUSION_THRESHOLD=300000000", "each other"),
    ([[0, 6, 4, 0], [0, 6, 4, 0]], {"cores": 2}, {"transfer_ms": 0.5, "messages": 1.0}, "share 2 cores", "in turns"),
    ([[0, 6, 4, 0], [0, 6, 4, 0]], {"launcher": "horovodrun"}, {}, "--with-mpi", "FUSION"),
    # On GPUs the timeline tells what is communication.
    ([[0, 2, 8, 0], [0, 2, 8, 0]], {"gpus": 2, "precision": "mixed_float16"}, {"transfer_ms": 0.5, "messages": 1.0},
     "Nothing", "--batch-size"),
])
def test_advice_follows_from_the_figures(ranks, job, measured, said, not_said):
    found = advice(*ranks, job=job, **measured)
    assert said in found and not_said not in found


def test_the_largest_share_comes_first():
    found = advice([3, 5, 0, 2], job={"instruction_sets": "amx_bf16"})
    assert found.index("bfloat16") < found.index("benchmark input") < found.index("fewer calls")


@pytest.mark.parametrize(("measured", "said"), [
    ({"step_ms_before": 5.0}, "tracing made it 100% longer"),
    ({"step_ms_before": 9.0}, "Before the trace a step took 9.00 ms."),
    ({"starved_cores": 0.5}, "for 50% of the time"),
    ({"transfer_ms": 1.0, "messages": 1.0}, "1.00 MB in 1.0 messages"),
])
def test_the_summary_says_what_makes_it_doubtful(measured, said):
    found = {"asked": [4, 9], "steps": [4, 9], "blocks": 1, "per_call": 6.0, "step_ms": 10.0, "step_ms_before": None,
             "ranks_ms": [[1, 6, 2, 1]], "gradient_bytes": 1_000_000, "busy_cores": 1.0, "starved_cores": 0.0,
             "folder": "run/profile", "transfer_ms": None, "messages": None, "operations_ms": {},
             "shares": dict.fromkeys(KINDS, 0.25), "advice": []}
    assert said in text(found | measured)
    assert "asked for" not in text(found)
