"""hpcai benchmark as a user meets it: names, data and photographs, and the benchmarks themselves on very little."""

import csv
import importlib
import inspect
import json
import os
import signal
import subprocess
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from hpcai_cli import catalog, launchers
from hpcai_cli.engine.benchmarks import measure
from hpcai_cli.engine.benchmarks.photographs import sample_photographs, tutorial
from hpcai_cli.recipe import Recipe

RECIPE = Recipe(name="pets", summary="", input_shape=(32, 32, 3), num_classes=2, class_names=("cat", "dog"),
                test_fraction=0.25, validation_fraction=0.1)


@pytest.fixture
def pets() -> Path:
    """A folder of 40 photographs and, as real ones have them, a broken file, a copy, and one under both labels."""
    folder = Path("pets")
    sample_photographs.make_photographs(folder, 40, ("cat", "dog"))
    (folder / "cat/broken.jpg").write_bytes(b"not an image")
    (folder / "cat/copy.jpg").write_bytes((folder / "cat/00000.jpg").read_bytes())
    (folder / "dog/other.jpg").write_bytes((folder / "cat/00002.jpg").read_bytes())
    return folder


def figures_of(done) -> dict[str, dict]:
    assert done.exit_code == 0, done.stderr
    return {figure["name"]: figure for figure in json.loads(done.stdout)["figures"]}


# ---- What is asked for is checked before anything starts -----------------------------------------------------------

@pytest.mark.parametrize("words", [("speed",), ("all", "speed"), ("input", "--batch-size", "0"),
                                   ("input", "--emulate-step-ms", "0"), ("train", "--precision", "float8"),
                                   ("start", "--fail-on", "much")])
def test_what_is_no_benchmark_is_said(hpcai, words):
    assert hpcai("benchmark", *words).exit_code == 2
    assert not Path("benchmarks").exists()


def test_data_are_checked(hpcai):
    missing = hpcai("benchmark", "input")
    assert missing.exit_code == 3
    assert "hpcai preprocess" in missing.stderr


@pytest.mark.parametrize("words", [("all", "start"), ("preprocess",), ("tutorial",)])
def test_photographs_that_are_not_there_are_said_before_the_start(hpcai, words):
    done = hpcai("benchmark", *words, "--photographs", "none.zip")
    assert done.exit_code == 3
    assert "none.zip" in done.stderr and "benchmark start" not in done.stderr


def test_the_tutorial_by_name_needs_real_photographs(hpcai):
    done = hpcai("benchmark", "tutorial")
    assert done.exit_code == 3
    assert "--photographs" in done.stderr


def test_the_folder_for_the_result_is_a_new_one(hpcai):
    Path("taken").mkdir()
    Path("taken/mine.txt").write_text("mine")
    done = hpcai("benchmark", "start", "--output", "taken")
    assert done.exit_code == 3 and "not empty" in done.stderr
    assert [path.name for path in Path("taken").iterdir()] == ["mine.txt"]


# ---- What is kept, shown and compared ------------------------------------------------------------------------------

@pytest.fixture
def digits(hpcai) -> str:
    assert hpcai("preprocess", "mnist", "--source", "sample", "--output", "digits.h5").exit_code == 0
    return "digits.h5"


@pytest.fixture
def quick(monkeypatch) -> None:
    monkeypatch.setattr("hpcai_cli.engine.benchmarks.start.ROUNDS", 3)


def test_a_result_is_kept_with_all_that_it_depends_on(hpcai, quick):
    done = hpcai("benchmark", "start", "--output", "first", "--json")
    document = json.loads(Path("first/result.json").read_text())
    shown = json.loads(done.stdout)
    assert shown.pop("folder") == "first" and shown.pop("changes") == [] and shown == document
    assert document["complete"] is True and document["machine"]["cores"] >= 1
    assert document["before"]["fixed_work_ms"] > 0 and document["after"]["fixed_work_ms"] > 0
    assert document["versions"]["tensorflow"] and document["energy"] is None
    rows = list(csv.DictReader(Path("first/figures.csv").read_text().splitlines()))
    assert [row["figure"] for row in rows] == [row["name"] for row in document["figures"]]
    for row in document["figures"][:3]:
        low, high = row["interval"]
        assert low <= row["value"] <= high and len(row["rounds"]) == 3


def test_worse_figures_end_in_exit_code_5_and_are_named(hpcai, quick):
    assert hpcai("benchmark", "start", "--output", "first").exit_code == 0
    old = json.loads(Path("first/result.json").read_text())
    for row in old["figures"]:
        row["value"], row["rounds"] = row["value"] / 1000, [value / 1000 for value in row["rounds"]]
        row["interval"] = row["interval"] and [value / 1000 for value in row["interval"]]
    Path("fast.json").write_text(json.dumps(old))
    done = hpcai("benchmark", "start", "--output", "second", "--compare", "fast.json")
    assert done.exit_code == 5 and "hpcai --help is " in done.stderr and "worse" in done.stderr
    assert json.loads(Path("second/result.json").read_text())["complete"] is True
    # A thousand times slower is more than 5 %, and less than ten thousand times.
    assert hpcai("benchmark", "start", "--compare", "fast.json", "--fail-on", "9900%").exit_code == 5
    old["machine"]["cores"] += 1
    Path("other.json").write_text(json.dumps(old))
    broken = {"other.json": "another machine", "first/figures.csv": "cannot read", "none": "cannot read"}
    for name, said in broken.items():
        done = hpcai("benchmark", "start", "--output", "third", "--compare", name)
        assert done.exit_code == 3 and said in done.stderr and not Path("third").exists()


@pytest.mark.parametrize("damage", [{"schema": "hpcai.benchmark/1"}, {"figures": None}, {"figures": [{}]},
                                    {"machine": []}])
def test_a_result_that_cannot_be_read_is_said(hpcai, quick, damage):
    assert hpcai("benchmark", "start", "--output", "first").exit_code == 0
    document = json.loads(Path("first/result.json").read_text()) | damage
    Path("first/result.json").write_text(json.dumps(document))
    done = hpcai("benchmark", "start", "--compare", "first")
    assert done.exit_code == 3 and "result.json" in done.stderr
    assert "0 results" in hpcai("benchmark", "list", ".").stdout


@pytest.mark.parametrize(("words", "send"), [
    (["input"], lambda process: os.killpg(process.pid, signal.SIGINT)),
    (["input"], lambda process: process.send_signal(signal.SIGTERM)),
    (["all", "input"], lambda process: process.send_signal(signal.SIGTERM))], ids=["ctrl-c", "sigterm", "all"])
def test_what_was_measured_before_the_end_is_kept(digits, words, send):
    process = subprocess.Popen([measure.PROGRAM, "benchmark", *words, "--data", digits, "--output", "kept"],
                               stderr=subprocess.PIPE, text=True, start_new_session=True,
                               preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler))
    for line in process.stderr:
        if "mnist: shuffled batches" in line:
            send(process)
            break
    said = process.stderr.read()
    process.stderr.close()
    assert process.wait(timeout=60) == 130 and "is kept in kept" in said
    document = json.loads(next(Path("kept").rglob("result.json")).read_text())
    assert document["complete"] is False and len(document["figures"]) >= 1 and document["after"]


def test_under_a_launcher_rank_0_alone_measures_what_is_of_one_process(tmp_path):
    pytest.importorskip("horovod")
    words = [*launchers.local(2).words(), measure.PROGRAM, "benchmark", "start", "--output", "kept"]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False,
                          env=os.environ | {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"})
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("kept in kept") == 1
    assert json.loads((tmp_path / "kept/result.json").read_text())["complete"] is True


def test_several_make_a_page_and_a_table(hpcai):
    done = hpcai("benchmark", "all", "start", "--output", "kept")
    assert done.exit_code == 0, done.stderr
    page = Path("kept/report.html").read_text()
    assert "hpcai train --help" in page and "<script" not in page
    listed = json.loads(hpcai("benchmark", "list", "kept", "--json").stdout)["results"]
    assert [row["benchmark"] for row in listed] == ["start"] and listed[0]["figures"] == 4
    Path("README.md").write_text("before\n<!-- figures by hpcai benchmark -->\nstale\n<!-- end of figures -->\nafter\n",
                                 encoding="utf-8")
    assert hpcai("benchmark", "report", "kept", "--readme", "README.md").exit_code == 0
    text = Path("README.md").read_text()
    assert text.startswith("before\n<!--") and text.endswith("-->\nafter\n") and "stale" not in text
    assert "| start | hpcai --help |" in text
    Path("plain.md").write_text("nothing")
    done = hpcai("benchmark", "report", "kept", "--readme", "plain.md")
    assert done.exit_code == 3 and Path("plain.md").read_text() == "nothing"
    assert hpcai("benchmark", "report", "empty").exit_code == 3


# ---- What they measure ---------------------------------------------------------------------------------------------

def test_start_measures_without_any_data(hpcai):
    figures = figures_of(hpcai("benchmark", "start", "--json"))
    assert figures["frameworks loaded by train --help"]["holds"] is True
    assert figures["hpcai --help"]["value"] > 0 and figures["python -c pass"]["value"] > 0


@pytest.mark.long
def test_input_measures_on_the_given_file(hpcai, digits, monkeypatch):
    from hpcai_cli.engine.benchmarks import input

    for name, value in {"ROUNDS": 3, "SECONDS": 0.2, "SEARCH_ROUNDS": 2, "PHOTOGRAPHS": 500}.items():
        monkeypatch.setattr(input, name, value)
    figures = figures_of(hpcai("benchmark", "input", "--data", digits, "--emulate-step-ms", "50", "--emulate-step-ms",
                               "0.001", "--cold", "--json"))
    assert figures["mnist: shuffled batches of 64"]["value"] > 0
    assert figures["mnist: bytes of them"]["value"] == pytest.approx(
        figures["mnist: shuffled batches of 64"]["value"] * 784 / 1e6)
    # Fifty milliseconds are enough for any batch; a microsecond is for none.
    assert figures["mnist: utilization of an accelerator of 50 ms"]["value"] > 0.9
    assert figures["mnist: utilization of an accelerator of 0.001 ms"]["value"] < 0.5
    assert figures["mnist: an epoch from the disk"]["value"] > 0


def test_train_says_where_the_time_goes(hpcai, digits, monkeypatch):
    from hpcai_cli.engine.benchmarks import train

    for name, value in {"ROUNDS": 2, "SECONDS": 0.2, "FIT_ROUNDS": 1}.items():
        monkeypatch.setattr(train, name, value)
    document = json.loads(hpcai("benchmark", "train", "mnist-mlp", "--data", digits, "--precision", "float32",
                                "--precision", "mixed_bfloat16", "--json").stdout)
    assert {row["title"] for row in document["tables"]} == {
        "mnist-mlp: where the time of a step goes", "mnist-mlp, mixed_bfloat16: where the time of a step goes"}
    for table in document["tables"]:
        parts = {name: share for name, _, share in table["rows"]}
        assert list(parts) == ["input", "compute", "communication", "Python"]
        assert sum(parts.values()) == pytest.approx(1, abs=0.2) and parts["communication"] == 0
    figures = {row["name"]: row["value"] for row in document["figures"]}
    assert 0 < figures["mnist-mlp: model FLOP utilization, against a matrix product in float32"] < 1
    assert figures["mnist-mlp: time of a step, p50"] <= figures["mnist-mlp: time of a step, p99"]


def test_checkpoint_says_what_one_costs(hpcai, digits, monkeypatch):
    from hpcai_cli.engine.benchmarks import checkpoint

    for name, value in {"ROUNDS": 2, "SECONDS": 0.3, "CHECKPOINTS": 2}.items():
        monkeypatch.setattr(checkpoint, name, value)
    figures = figures_of(hpcai("benchmark", "checkpoint", "mnist-mlp", "--data", digits, "--json"))
    proof = figures["mnist-mlp: the proof at each, that the ranks are in step"]["value"]
    share = figures["mnist-mlp: share of the time in proofs and heartbeats"]
    # Alone there are no heartbeats, only what would mark them.
    assert proof / 30_000 <= share["value"] < 0.05 and share["at_most"] and share["limit"] == 0.005
    assert 0 < proof < figures["mnist-mlp: of it in the loop, proof, snapshot and waiting"]["value"]
    costs = figures["mnist-mlp: what one costs the training"]["rounds"]
    against = figures["mnist-mlp: throughput with one every 30 s, against none"]
    assert against["rounds"] == pytest.approx([30_000 / (30_000 + cost) for cost in costs])
    assert against["limit"] == 0.965
    # Weights and two slots of Adam, of the newest two checkpoints.
    assert figures["mnist-mlp: those that stay"]["value"] > 1
    assert not [path for path in Path().iterdir() if path.name.startswith(".checkpoint-")]


@pytest.mark.long
def test_preprocess_measures_the_photographs_that_can_be_used(hpcai, pets):
    figures = figures_of(hpcai("benchmark", "preprocess", "--photographs", pets, "--json"))
    assert "39 photographs to 150x150x3, 2 processes" in figures, list(figures)
    against = figures["against the Pillow loop"]
    assert (against["limit"], against["at_most"]) == (3, False) and against["value"] > 0
    assert figures["against decoding and resizing alone, 2 processes"]["limit"] == 0.9
    memory = figures["peak memory of all processes, 39 photographs"]
    # Three processes with numpy and Pillow each take more than one, and less than any with TensorFlow.
    assert 60 < memory["value"] < 600 and memory["holds"] is True


@pytest.mark.long
def test_photographs_measures_input_and_augmentation_and_leaves_the_precision_as_it_was(hpcai, monkeypatch):
    import keras

    from hpcai_cli.engine.benchmarks.photographs import photographs

    for name, value in {"COUNT": 66, "ROUNDS": 1, "EPOCHS": 1, "STEPS": 1}.items():
        monkeypatch.setattr(photographs, name, value)
    policy, crop = keras.config.dtype_policy().name, catalog.find("dogs-vs-cats").recipe.options["crop"]
    figures = figures_of(hpcai("benchmark", "photographs", "--json"))
    assert keras.config.dtype_policy().name == policy
    limits = {name: figure["limit"] for name, figure in figures.items() if figure["limit"]}
    assert limits == {"against ImageDataGenerator.flow_from_directory": 20, "against image_dataset_from_directory": 10,
                      "preprocessing, in epochs of ImageDataGenerator's input": 2,
                      f"against one constant batch of {crop}x{crop}": 0.95}
    assert all(figure["value"] > 0 for figure in figures.values())


def test_memory_trains_on_files_that_take_no_room(hpcai, monkeypatch):
    from hpcai_cli.engine.benchmarks import memory

    monkeypatch.setattr(memory, "SIZES", (8 << 20, 16 << 20))
    figures = figures_of(hpcai("benchmark", "memory", "--json"))
    peaks = [figures[f"peak resident memory, file of {size} GiB"]["value"] for size in ("0.01", "0.02")]
    assert all(200 < peak < 2048 for peak in peaks) and max(peaks) / min(peaks) < 1.2


@pytest.mark.parametrize("module", [
    "start", "input", "train", "checkpoint", "accuracy", "memory", "quantization", "photographs.photographs",
    "photographs.preprocess", "photographs.tutorial", "inference.inference", "load.serve",
    "load.serve_url", "matrix.matmul", "collective.allreduce", "collective.collective_ranks", "collective.fusion"])
def test_nothing_is_measured_before_the_machine_is_watched(module):
    """What a command gives back is measured while it is taken, when the watch and the energy meter have begun."""
    found = importlib.import_module(f"hpcai_cli.engine.benchmarks.{module}")
    assert inspect.isgeneratorfunction(found.measure)


@pytest.mark.long
def test_serve_measures_our_server_and_leaves_others_out_with_a_note(hpcai, monkeypatch):
    from hpcai_cli.engine.benchmarks.load import serve

    for name, value in {"ROUNDS": 1, "SECONDS": 0.2, "STEP": 4.0}.items():
        monkeypatch.setattr(serve, name, value)
    done = hpcai("benchmark", "serve", "--json")
    assert "--peer litserve=" in done.stderr
    figures = figures_of(done)
    for name in ("mnist", "dogs-vs-cats"):
        answers, calls = (next(figure["value"] for said, figure in figures.items() if said.startswith(name)
                               and said.endswith(end)) for end in (": answers", "model alone at batch 1"))
        assert answers > 0 and calls > 0
    assert 0 < figures["start of a server to its first answer, TFLite"]["value"] < 30


@pytest.mark.parametrize("given", ["nginx=/bin/sh", "litserve", "litserve=missing"])
def test_a_peer_is_one_that_is_known_and_there(hpcai, given):
    done = hpcai("benchmark", "serve", "--peer", given)
    assert done.exit_code == 2 and "there is no such peer" in done.stderr


@pytest.mark.long
def test_the_tutorial_runs_both_sides_on_the_same_split(hpcai, pets, monkeypatch):
    monkeypatch.setattr(tutorial, "ROUNDS", 1)
    figures = figures_of(hpcai("benchmark", "tutorial", "--photographs", pets, "--epochs", "1", "--json"))
    ours, script = (figures[f"{name}, 1 epochs of 31 photographs"]["value"]
                    for name in ("hpcai preprocess and train", "the tutorials' script"))
    over = figures["the script's time over ours"]
    assert over["value"] == pytest.approx(script / ours) and over["limit"] == 2
    accuracy = figures["our accuracy on 8 test photographs"]["value"]
    difference = figures["our accuracy minus the script's, mean"]
    assert difference["value"] == pytest.approx(accuracy - figures["the script's accuracy on them"]["value"])
    assert difference["limit"] == 0


# ---- What they measure with ----------------------------------------------------------------------------------------

def test_made_photographs_differ_and_are_the_same_each_time():
    for folder in (Path("one"), Path("two")):
        sample_photographs.make_photographs(folder, 12, ("cat", "dog"))
    contents = [[path.read_bytes() for path in sorted(folder.glob("*/*.jpg"))] for folder in (Path("one"), Path("two"))]
    assert contents[0] == contents[1] and len(set(contents[0])) == 12
    with Image.open("one/cat/00000.jpg") as image:
        assert image.size == pytest.approx((500, 375), rel=0.11)


def test_of_many_photographs_an_even_choice_is_measured(pets):
    with sample_photographs.photograph_folder(pets, RECIPE, 30) as folder:
        counts = {name: len(list((folder / name).iterdir())) for name in ("cat", "dog")}
    assert sum(counts.values()) == 30 and min(counts.values()) >= 14


@pytest.mark.parametrize("brought", [False, True])
def test_the_split_is_the_sources_own_or_the_recipes(pets, brought):
    source = Path("brought") if brought else pets
    if brought:
        for name, count in (("train", 20), ("test", 6)):
            make_noise(source / name, count)
    counts = tutorial.split_photographs(source, RECIPE, Path("split"))
    assert counts == ({"train": 20, "test": 6} if brought else {"train": 29, "test": 10})
    contents = {name: {path.read_bytes() for path in Path("split", name).glob("*/*")} for name in counts}
    assert {name: len(found) for name, found in contents.items()} == counts
    assert not contents["train"] & contents["test"]
    if brought:
        assert contents["test"] == {path.read_bytes() for path in (source / "test").glob("*/*")}


def make_noise(folder: Path, count: int) -> None:
    """Photographs that are unlike those of any other folder."""
    source = np.random.default_rng(count)
    for number in range(count):
        path = folder / ("cat", "dog")[number % 2] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(source.integers(0, 256, (40, 40, 3), dtype=np.uint8)).save(path)


def test_a_program_that_fails_is_named_with_what_it_said():
    with pytest.raises(measure.HpcaiError, match=r"exit code 2.*no such recipe"):
        measure.run_json([measure.PROGRAM, "train", "nothing", "--json"])
