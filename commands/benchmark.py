"""hpcai benchmark: how fast, how near the limit of the machine, where the time goes, and whether it got worse."""

import dataclasses
import re
from collections.abc import Callable, Iterable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Annotated

import typer

from hpcai_cli import catalog, console, launch, launchers, options
from hpcai_cli.benchmark_options import InRanks, with_common
from hpcai_cli.errors import DataError, UsageError

benchmark = typer.Typer(help="Measure how fast it is, how near the limit of the machine, and whether it got worse.",
                        no_args_is_help=True)

PEERS = ("litserve", "mlserver", "flask")
"""Other servers that serve can be measured beside."""

Data = Annotated[Path, typer.Option("--data", metavar="FILE.h5", help="MNIST's dataset file.")]
MNIST = Path("data/mnist.h5")
PETIMAGES = Path("data/petimages.zip")
Photographs = Annotated[Path | None, typer.Option(
    metavar="PATH", help="Photographs of dogs and cats, a folder or an archive; made up where none are given.",
    show_default=False)]


def _benchmark(function: Callable[..., Iterable]) -> Callable:
    """Make a command of a function that returns what it measures."""
    benchmark.command()(with_common(function, lambda *given: _module("session").run(*given)))
    return function


# ---- What can be measured ------------------------------------------------------------------------------------------

@_benchmark
def start() -> Iterable:
    """How long a person waits for --help.

    Examples:
        $ hpcai benchmark start
    """
    return _module("start").measure()


@_benchmark
def input(
    data: Data = MNIST,
    batch_size: Annotated[int, typer.Option(min=1, help="Examples of a batch.")] = 64,
    emulate_step_ms: Annotated[list[float] | None, typer.Option(
        min=0.001, metavar="MS", help="Feed an accelerator that takes so many milliseconds for a step; repeatable. "
        "By default one that is as fast as this machine with the mnist network.")] = None,
    cold: Annotated[bool, typer.Option("--cold", help="Read the file from its disk too.")] = False,
) -> Iterable:
    """Batches from a dataset file: how near to memcpy, and what accelerator they could feed.

    Examples:
        $ hpcai benchmark input
        $ hpcai benchmark input --data data/cifar10.h5 --emulate-step-ms 20 --emulate-step-ms 5 --cold
    """
    path, network = _dataset(data), _recipes("mnist")["mnist"]
    return _module("input").measure(path, batch_size=batch_size, emulated=tuple(emulate_step_ms or ()), cold=cold,
                                    network=None if emulate_step_ms else network)


@_benchmark
def train(
    recipe: Annotated[list[str] | None, typer.Argument(metavar="[RECIPE]...", help="mnist and mnist-mlp by "
                                                       "default.")] = None,
    data: Data = MNIST,
    precision: Annotated[list[str] | None, typer.Option(
        help="float32, mixed_bfloat16 or mixed_float16; repeatable. By default float32, and what `auto` takes "
        "here.")] = None,
    np: options.Processes = None,
    where: options.Where = options.HERE,
) -> Iterable:
    """The training loop: where its time goes, how near to its limits, and Keras' fit beside it.

    Examples:
        $ hpcai benchmark train
        $ hpcai benchmark train cifar10 --data data/cifar10.h5 --precision mixed_bfloat16
        $ hpcai benchmark train --np 2
    """
    precisions, recipes, path = _precisions(precision), _recipes(*(recipe or ("mnist", "mnist-mlp"))), _dataset(data)
    if ranks := where.ranks(np):
        return InRanks(ranks)
    return _module("train").measure(path, recipes, precisions, _started_ranks())


@_benchmark
def checkpoint(
    recipe: Annotated[str, typer.Argument(metavar="[RECIPE]", help="What is trained.")] = "mnist",
    data: Data = MNIST,
    np: options.Processes = None,
    where: options.Where = options.HERE,
) -> Iterable:
    """Checkpoints beside the training: what one costs its throughput; what proofs and heartbeats of ranks take.

    Examples:
        $ hpcai benchmark checkpoint
        $ hpcai benchmark checkpoint mnist-mlp --np 2
    """
    chosen, build_model = _recipes(recipe)[recipe]
    path = _dataset(data)
    if ranks := where.ranks(np):
        return InRanks(ranks)
    return _module("checkpoint").measure(path, chosen, build_model, _started_ranks())


@_benchmark
def tune(
    recipe: Annotated[str, typer.Argument(metavar="[RECIPE]", help="Whose settings are searched.")] = "mnist-mlp",
    data: Data = MNIST,
    seeds: Annotated[int, typer.Option(min=1, metavar="N", help="Searches of each kind.")] = 10,
    trials: Annotated[int, typer.Option(min=1, metavar="N", help="Trials of a search.")] = 20,
    search: Annotated[list[str] | None, typer.Option(metavar="NAME=VALUES", help="The space; by default the "
                                                     "recipe's.")] = None,
    workers: Annotated[int, typer.Option(min=1, metavar="N", help="Trials at a time.")] = 2,
) -> Iterable:
    """Searches for better settings: against random trials, with pruning, with two workers. Takes long.

    Examples:
        $ hpcai benchmark tune
        $ hpcai benchmark tune shoppers --data data/shoppers.h5 --seeds 10
    """
    objective = "roc_auc" if catalog.find(recipe).recipe.best_by == "roc_auc" else "accuracy"
    return _module("tuning").measure(recipe, _dataset(data), seeds=seeds, trials=trials, search=search or [],
                                     objective=objective, workers=workers)


@_benchmark
def accuracy(data: Data = MNIST) -> Iterable:
    """Seconds from the command line to 99 % on MNIST, against the tutorials' script.

    Examples:
        $ hpcai benchmark accuracy
    """
    return _module("accuracy").measure(_dataset(data))


@_benchmark
def scaling(
    np: Annotated[str | None, typer.Option("--np", metavar="1,2,4", help="Numbers of ranks; by default the powers of "
                                           "two up to the cores, or the hosts.", show_default=False)] = None,
    where: options.Where = options.HERE,
    mode: Annotated[str, typer.Option(metavar="weak|strong|both", help="The same images for each rank, for the whole "
                                      "job, or both.")] = "both",
    recipe: Annotated[str, typer.Option(metavar="RECIPE", help="What is trained.")] = "mnist",
    data: Annotated[Path | None, typer.Option("--data", metavar="FILE.h5", help="Its dataset file; data/RECIPE.h5 by "
                                              "default.", show_default=False)] = None,
    project: Annotated[int, typer.Option(min=2, max=1_000_000, metavar="N", help="Draw the model of a step's time on "
                                         "to so many ranks.")] = 1024,
    total_images: Annotated[int | None, typer.Option(
        min=1, metavar="N", help="Images a step of the whole job, for strong scaling; 16 batches by default.",
        show_default=False)] = None,
    seconds: Annotated[float, typer.Option(min=0.001, max=600, help="How long each kind of step is measured at a "
                                           "time.")] = 0.2,
    here: Annotated[bool, typer.Option("--here", hidden=True, help="Measure the ranks of this job; it starts itself "
                                       "so.")] = False,
) -> Iterable:
    """More ranks: weak and strong scaling, the share of communication, and a model that is drawn on to 1,024 ranks.

    Under a launcher it measures the job that it is started in, against the same ranks without communication.

    Examples:
        $ hpcai benchmark scaling
        $ hpcai benchmark scaling --np 1,2,4 --mode weak --recipe mnist-mlp --data data/mnist.h5
        $ hpcai benchmark scaling --hosts a:4,b:4,c:4,d:4 --project 4096
        $ horovodrun -np 8 -H a:4,b:4 hpcai benchmark scaling
    """
    if mode not in ("weak", "strong", "both"):
        raise UsageError("no such --mode", expected="weak, strong or both", received=mode)
    entry = catalog.find(recipe)
    file = data or Path("data") / f"{entry.data_source().recipe.name}.h5"
    module = _module("scaling.scaling")
    subject = module.Subject(entry.recipe, entry.reference, entry.function("build_model"), entry.function("augment"),
                             _dataset(file))
    sizes = _ranks(np)
    # Under a launcher it measures the job that it is in, and whoever names hosts then is told so.
    is_in_job = here or launch.place().launcher and where == options.HERE
    on = None if is_in_job else where.ranks(max(sizes, default=None))
    return module.measure(subject, module.Request(sizes, mode, project, total_images or 0, seconds, here, on))


@_benchmark
def memory() -> Iterable:
    """Training on files of different sizes: what memory it takes.

    Examples:
        $ hpcai benchmark memory
    """
    return _module("memory").measure()


@_benchmark
def preprocess(photographs: Photographs = None) -> Iterable:
    """Photographs to a dataset file, against the decoders alone and a plain script.

    Examples:
        $ hpcai benchmark preprocess --photographs petimages.zip
    """
    recipes = _recipes("dogs-vs-cats")
    return _module("photographs.preprocess").measure(recipes["dogs-vs-cats"][0], _existing(photographs))


@_benchmark
def photographs(photographs: Photographs = None) -> Iterable:
    """Training on augmented photographs, against tf.data.

    Examples:
        $ hpcai benchmark photographs
    """
    entry = catalog.find("dogs-vs-cats")
    return _module("photographs.photographs").measure(
        *_recipes("dogs-vs-cats")["dogs-vs-cats"], entry.function("augment"), _existing(photographs))


@_benchmark
def tutorial(
    photographs: Annotated[Path, typer.Option(metavar="PATH", help="Real photographs of dogs and cats, a folder or an "
                                              "archive.")] = PETIMAGES,
    epochs: Annotated[int, typer.Option(min=1, help="Epochs, for both sides.")] = 15,
) -> Iterable:
    """Photographs to a trained network, against the tutorials' script.

    Examples:
        $ hpcai benchmark tutorial --photographs petimages.zip
    """
    recipes = _recipes("dogs-vs-cats")
    return _module("photographs.tutorial").measure(recipes["dogs-vs-cats"][0], _existing(photographs), epochs)


@_benchmark
def quantization() -> Iterable:
    """What int8 loses on a network that it spoils, and what training under quantization saves.

    Examples:
        $ hpcai benchmark quantization
    """
    return _module("quantization").measure()


@_benchmark
def inference(
    model: Annotated[str, typer.Argument(metavar="[RUN|RECIPE]", help="A trained run or model file, or a recipe, whose "
                                         "network is then untrained.")] = "mnist",
    data: options.Data = None,
    batch_sizes: Annotated[str, typer.Option(metavar="N,N,...", help="Examples in a call.")] = "1,8,32,128",
    formats: Annotated[str | None, typer.Option(metavar="NAME,...", help="keras-predict, keras, function, saved_model, "
                                                "tflite, tflite-float16, tflite-dynamic, tflite-int8, onnx, onnx-int8; "
                                                "by default all but two.", show_default=False)] = None,
    threads: Annotated[int, typer.Option(min=0, help="Threads and cores of each format; 0 takes all cores.")] = 0,
    trust_model: options.TrustModel = False,
) -> Iterable:
    """Latency, throughput, accuracy and size of one model in every format: what to deploy.

    Examples:
        $ hpcai benchmark inference runs/mnist-1
        $ hpcai benchmark inference runs/mnist-1 --formats function,tflite,tflite-int8 --threads 1 --json
        $ hpcai benchmark inference dogs-vs-cats --batch-sizes 1,16
    """
    named, subjects = _module("inference.inference_formats"), _module("inference.inference_subject")
    names, sizes = named.parse_formats(formats) if formats is not None else None, named.parse_batch_sizes(batch_sizes)
    threads = named.checked_threads(threads)
    if model.endswith(".py") or model.replace("_", "-") in catalog.names() or not (
            "/" in model or Path(model).exists()):
        entry = catalog.find(model)
        subject = subjects.of_recipe(entry.recipe, entry.function("build_model"), data, sizes[-1])
    else:
        subject = subjects.of_run(Path(model), data, sizes[-1], trust=trust_model, find_recipe=catalog.find)
    module = _module("inference.inference")
    return module.measure(subject, names=module.names_for(subject, names), batch_sizes=sizes, threads=threads)


@_benchmark
def serve(
    peer: Annotated[list[str] | None, typer.Option(
        metavar="NAME=PYTHON", help="Another server to measure beside ours, and the Python that has it: litserve, "
        "mlserver or flask. Repeatable.")] = None,
    url: Annotated[str | None, typer.Option(metavar="http://HOST:PORT", help="Measure this server of the Open "
                                            "Inference Protocol v2 instead.")] = None,
    model: Annotated[str, typer.Option(metavar="NAME", help="Of a model there.", show_default=False)] = "",
    rate: Annotated[list[float] | None, typer.Option(min=0.01, metavar="R", help="Requests per second, repeatable; by "
                                                     "default as many as it bears, and shares of them.")] = None,
    seconds: Annotated[float, typer.Option(min=0.1, max=3600, help="Of one rate in one round.")] = 3.0,
    connections: Annotated[int, typer.Option(min=1, max=4096, help="That are kept open.")] = 64,
    batch_size: Annotated[int, typer.Option(min=1, help="Examples in a request.")] = 1,
    tensors: Annotated[str, typer.Option(help="json or binary; auto takes what the server offers.")] = "auto",
    shape: Annotated[list[str] | None, typer.Option(metavar="NAME=N,N,...", help="Of an input whose shape the server "
                                                    "leaves open. Repeatable.")] = None,
    token_file: Annotated[Path | None, typer.Option(metavar="FILE", help="With the server's token.")] = None,
    certificate: Annotated[Path | None, typer.Option(metavar="FILE", help="Of the authority that signed the server's, "
                                                     "as PEM.")] = None,
) -> Iterable:
    """What a server adds to a model's own time and how much it bears, by clients at constant rates.

    By default our own, which is started for it; with --url any that speaks the Open Inference Protocol v2, with random
    inputs of the shape and type that it declares.

    Examples:
        $ hpcai benchmark serve
        $ hpcai benchmark serve --peer litserve=/opt/litserve/bin/python
        $ hpcai benchmark serve --url http://127.0.0.1:8000 --model mnist
        $ hpcai benchmark serve --url http://triton:8000 --model resnet --rate 100 --rate 400 --tensors binary
    """
    if url is None:
        given = {"--model": model, "--rate": rate, "--shape": shape, "--token-file": token_file,
                 "--certificate": certificate}
        if alone := [option for option, value in given.items() if value]:
            raise UsageError(f"{alone[0]} is for a server that runs already", expected="--url http://HOST:PORT with it")
        return _module("load.serve").measure(_recipes("dogs-vs-cats", "mnist"), _peers(peer or []))
    if peer or not model:
        raise UsageError("--url measures one model of one server", expected="--model NAME, and no --peer")
    from hpcai_cli.engine.serving.settings import token_of

    module = _module("load.serve_url")
    asked = module.Asked(model, seconds, connections, batch_size, tensors, tuple(shape or ()))
    return module.measure(asked.of(url, token_of(token_file) if token_file else "", certificate), rate or ())


@_benchmark
def allreduce(
    operation: Annotated[str | None, typer.Option(metavar="NAME", help="allreduce (the default), broadcast, allgather, "
                                                  "reduce-scatter, all-to-all, or all.", show_default=False)] = None,
    np: Annotated[int | None, typer.Option("--np", min=2, metavar="N", help="Ranks to start on this host; 2 without a "
                                           "launcher.", show_default=False)] = None,
    sizes: Annotated[str | None, typer.Option(metavar="SIZES", help="Bytes, as in 4,64KB,16MB.")] = None,
    largest: Annotated[str | None, typer.Option(metavar="SIZE", help="Take the powers of 4 from 4 B to this one; "
                                                "256MB by default.", show_default=False)] = None,
    tune: Annotated[bool, typer.Option("--tune", help="Find the fusion threshold and the cycle time for the gradients "
                                       "of mnist instead.")] = False,
) -> Iterable:
    """Latency and bandwidth between ranks, of each transport, against memcpy.

    Started by itself it starts ranks over Gloo, MPI and NCCL in turn; under a launcher it measures the one that those
    ranks have.

    Examples:
        $ hpcai benchmark allreduce
        $ hpcai benchmark allreduce --operation all --np 2 --largest 16MB --json
        $ hpcai benchmark allreduce --tune
        $ mpirun -np 4 hpcai benchmark allreduce --sizes 4,1MB
    """
    module = _module("collective.allreduce")
    if tune:
        return _tuned(module.check_ranks(np), operation or sizes or largest)
    operations = module.chosen_operations(operation or "allreduce")
    local_ranks = module.check_ranks(np)
    chosen = module.chosen_sizes(sizes, largest, local_ranks)
    if launch.place().size > 1:
        return _module("collective.collective_ranks").measure(_started_ranks(), operations, chosen)
    return module.measure(local_ranks, operations, chosen)


@_benchmark
def horovod(
    data: Data = MNIST,
    np: Annotated[int, typer.Option("--np", min=2, max=1024, metavar="N", help="Ranks on this host.")] = 2,
    launcher: Annotated[str, typer.Option(help="auto, horovodrun or mpirun.")] = "auto",
) -> Iterable:
    """Training in ranks against a plain Horovod script: images a second, and how soon the first step is done.

    Examples:
        $ hpcai benchmark horovod
        $ hpcai benchmark horovod --np 4 --launcher horovodrun
    """
    ranks = launchers.chosen(np, launcher=launcher)
    return _module("horovod_script").measure(_dataset(data), dataclasses.replace(ranks, hosts=()))


@_benchmark
def matmul(
    size: Annotated[int, typer.Option(min=1, metavar="N", help="Rows and columns of the matrices.")] = 4096,
    np: Annotated[int | None, typer.Option("--np", min=1, metavar="N", help="Ranks to start on this host; by default "
                                           "one for each of its cores.", show_default=False)] = None,
    dtype: Annotated[str, typer.Option(metavar="TYPE", help="float32, float64 or bfloat16.")] = "float32",
    algorithm: Annotated[str, typer.Option(metavar="rows|summa|both", help="Row blocks, SUMMA, or one after the "
                                           "other.")] = "both",
    block: Annotated[int | None, typer.Option(min=1, metavar="N", help="Width of SUMMA's panels; by default by the "
                                              "size.", show_default=False)] = None,
) -> Iterable:
    """The product of matrices that are spread over ranks, by row blocks and by SUMMA, against the local library.

    Each rank computes with one thread.

    Examples:
        $ hpcai benchmark matmul --np 2
        $ hpcai benchmark matmul --size 8192 --dtype bfloat16 --algorithm summa
        $ mpirun -np 4 hpcai benchmark matmul --dtype float64 --json
    """
    asked = _module("matrix.matmul_request")
    request, ranks = asked.checked_request(size, dtype, algorithm, block), asked.check_ranks(np)
    if launch.place().size == 1:
        asked.check_host(request, ranks)
    asked.check_fit(request, ranks)
    if ranks > launch.place().size:
        return InRanks(launchers.local(ranks))
    groups = _module("matrix.matrix_split").process_groups(ranks)
    return _module("matrix.matmul").measure(_started_ranks(groups), request)


# ---- What they need ------------------------------------------------------------------------------------------------

def _module(name: str):
    with console.quiet():
        return import_module(f"hpcai_cli.engine.benchmarks.{name}")


def _started_ranks(groups: Sequence[Sequence[int]] = ()):
    """Join the ranks that a launcher started together with this one; `groups` are as of `distributed.start`."""
    with console.quiet():
        from hpcai_cli.engine import distributed

        return distributed.start(groups)


def _tuned(ranks: int, other: str | None) -> Iterable:
    """Measure what Horovod's settings do to the gradients of mnist; options of other measurements have no meaning."""
    if other:
        raise UsageError("--tune measures the gradients of mnist", received=other,
                         expected="no --operation, --sizes or --largest")
    if launch.place().size > 1:
        raise UsageError("--tune starts ranks with each setting itself", expected="no launcher", received=ranks,
                         mend=f"run it without {launch.place().launcher}")
    module = _module("collective.fusion")
    return module.measure(ranks, module.shapes_of(*_recipes("mnist")["mnist"]))


def _precisions(given: list[str] | None) -> tuple[str, ...]:
    """Return Keras' policies, each once."""
    with console.quiet():
        from hpcai_cli.engine import hardware
    known = ("float32", "mixed_bfloat16", "mixed_float16")
    unknown = [name for name in given or [] if name not in known]
    if unknown:
        raise UsageError("no such precision", expected=f"one of {', '.join(known)}", received=unknown[0])
    return tuple(dict.fromkeys(given or ("float32", hardware.choose_precision("auto")[0])))


def _dataset(path: Path) -> Path:
    """Return the path of a dataset file that can be read."""
    with console.quiet():
        from hpcai_cli.engine.store import Dataset
    Dataset(path)
    return path


def _recipes(*names: str) -> dict[str, tuple]:
    """Return recipe and build_model by name."""
    entries = {name: catalog.find(name) for name in names}
    return {name: (entry.recipe, entry.function("build_model")) for name, entry in entries.items()}


def _ranks(text: str | None) -> tuple[int, ...]:
    """Read numbers of ranks such as 1,2,4; none where none are given."""
    words = [] if text is None else text.split(",")
    if not all(re.fullmatch(r"\s*[1-9]\d{0,6}\s*", word, re.ASCII) for word in words):
        raise UsageError("cannot read --np", expected="numbers of ranks such as 1,2,4", received=text)
    return tuple(sorted({int(word) for word in words}))


def _existing(photographs: Path | None) -> Path | None:
    if photographs is not None and not photographs.exists():
        raise DataError("the photographs do not exist", expected="a folder or an archive", received=str(photographs),
                        mend="give them as in `hpcai benchmark tutorial --photographs petimages.zip`")
    return photographs


def _peers(given: list[str]) -> dict[str, str]:
    """Return the other servers' Pythons by name."""
    found = {}
    for text in given:
        name, equals, python = text.partition("=")
        if name not in PEERS or not equals or not Path(python).is_file():
            raise UsageError("there is no such peer", received=text,
                             expected=f"NAME=PYTHON with a name of {', '.join(PEERS)} and a Python that exists")
        found[name] = python
    return found
