"""hpcai deploy: export a trained model, prove the export, bundle it, serve it, watch it."""

from pathlib import Path
from typing import Annotated

import typer

from hpcai_cli import catalog, console, options
from hpcai_cli.errors import UsageError

deploy = typer.Typer(help="Export a model with proof, bundle it, serve it, watch it.", no_args_is_help=True)

Force = Annotated[bool, typer.Option("--force", help="Replace what is there.")]
Name = Annotated[str, typer.Option(help="Name of the model in addresses; by default the recipe's.")]
Into = Annotated[Path | None, typer.Option(metavar="FOLDER", help="Add it to a folder of models, as the next version "
                                           "FOLDER/NAME/1, 2, ..., which answers from then on.")]
Format = Annotated[str, typer.Option("--format", help="tflite, onnx, saved_model or keras; auto takes the one that "
                                     "answers soonest here.")]
Tolerance = Annotated[float, typer.Option(min=0.0, help="Largest difference of a probability (of a number: in standard "
                                          "deviations) with which an export is delivered.")]


@deploy.command()
def export(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder, trained or compressed.")],
    format: Format = "auto",
    data: options.Data = None,
    output: Annotated[Path | None, typer.Option(metavar="FOLDER", help="Folder of the export; by default "
                                                "RUN/exports/FORMAT.")] = None,
    into: Into = None,
    name: Name = "",
    tolerance: Tolerance = 1e-3,
    force: Force = False,
    trust_model: options.TrustModel = False,
    json: options.Json = False,
    verbose: options.Verbose = False,
) -> None:
    """Write a model for deployment, and prove on real examples that it answers as before.

    The exported file answers the test split in a process like a server's; where an answer differs, nothing is
    delivered (exit code 5). Beside it stand parity.json, MODEL_CARD.md, statistics of the training's inputs, and
    artefact.json with everything's SHA-256.

    Examples:
        $ hpcai deploy export runs/mnist-1 --format tflite
        $ hpcai deploy export runs/mnist-1/compressed/int8 --into models
        $ hpcai deploy export runs/shoppers-1 --json

    Next: hpcai deploy serve runs/mnist-1/exports/tflite
    """
    if output and into:
        raise UsageError("an export has one place", expected="--output or --into")
    with console.quiet():
        from hpcai_cli.engine.deployment import export as exporting
    document = exporting.export(exporting.Order(run, format, output, into, data, name, tolerance, force, trust_model,
                                                catalog.find))
    if json:
        console.result_json(document)
        return
    parity = document["parity"]
    console.table(f"{document['run']} as {document['format']}, on {parity['examples']:,} examples",
                  ("figure", "before", "after"), [(name, values["before"], values["after"])
                                                  for name, values in parity["metrics"].items()])
    for kind, cost in document["serving"]["measured"].items():
        console.result(f"{kind}: {cost['milliseconds']['1']:.3g} ms for one, "
                       f"{cost['milliseconds']['32']:.3g} ms for 32")
    console.result(f"the same answer for {parity['agreement']:.2%}, largest difference "
                   f"{parity['largest_difference']:.2g}")
    console.result(f"written: {document['folder']}")


@deploy.command()
def serve(
    models: Annotated[list[str], typer.Argument(metavar="MODEL...", help="An export, a run that was exported, a "
                                                "bundle, or a folder of versions or of models; NAME=MODEL to call it "
                                                "otherwise.")],
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 for all, which a token should "
                                           "guard.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = 8000,
    workers: Annotated[int, typer.Option(min=1, max=256, help="Processes that answer.")] = 1,
    threads: Annotated[int, typer.Option(min=0, max=1024, help="Of a model in each worker; 0 shares the cores "
                                         "out.")] = 0,
    max_batch: Annotated[int, typer.Option(min=1, max=4096, help="Examples that a model gets at once, at most; "
                                           "fewer where that is quicker.")] = 32,
    max_delay_ms: Annotated[float, typer.Option(min=0, max=10_000, help="For which a free model waits for more.")] = 0,
    timeout: Annotated[float, typer.Option(min=0.1, max=3600, help="Seconds in which a request must have come, and "
                                           "then be answered.")] = 30,
    body_limit: Annotated[int, typer.Option(min=1024, max=1 << 30, help="Bytes of a request's body.")] = 16 << 20,
    token_file: Annotated[Path | None, typer.Option(metavar="FILE", help="With what requests must bear.")] = None,
    tls_cert: Annotated[Path | None, typer.Option(metavar="FILE", help="Certificates as PEM, for HTTPS.")] = None,
    tls_key: Annotated[Path | None, typer.Option(metavar="FILE", help="Their private key.")] = None,
    log_file: Annotated[Path | None, typer.Option(metavar="FILE", help="Where a JSON line per request goes; stderr by "
                                                  "default.")] = None,
    state: Annotated[Path | None, typer.Option(metavar="FOLDER", help="Where metrics and statistics are kept; a "
                                               "temporary one by default.")] = None,
    trust_model: options.TrustModel = False,
) -> None:
    """Answer over HTTP by the Open Inference Protocol v2, for plain images and rows, and on a page.

    SIGHUP loads what has changed on disk without losing a request; SIGTERM ends it after what was taken is answered.

    Examples:
        $ hpcai deploy serve runs/mnist-1 --port 8000
        $ hpcai deploy serve models --workers 2 --state state --log-file requests.jsonl

    Then: curl -F image=@digit.png http://127.0.0.1:8000/predict

    Next: hpcai deploy monitor MODEL http://127.0.0.1:8000
    """
    from hpcai_cli.engine.deployment import places
    from hpcai_cli.engine.serving import server

    given = {"--host": host, "--port": port, "--workers": workers, "--threads": threads, "--max-batch": max_batch,
             "--max-delay-ms": max_delay_ms, "--timeout": timeout, "--body-limit": body_limit,
             "--token-file": token_file, "--tls-cert": tls_cert, "--tls-key": tls_key, "--log-file": log_file,
             "--state": state, "--trust-model": trust_model}
    found = []
    for model in models:
        name, equals, path = model.rpartition("=")
        found.append(f"{name}{equals}{places.servable(Path(path))}")
    raise typer.Exit(server.main([*options.words(given), "--", *found]))


@deploy.command()
def bundle(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="An export, a run that was exported, or a folder of "
                                          "versions.")],
    output: Annotated[Path, typer.Option("--output", metavar="FOLDER", help="The new folder.")],
    edge: Annotated[bool, typer.Option("--edge", help="For small devices: a program that answers for files with "
                                       "TFLite's small runtime, in place of the server.")] = False,
    json: options.Json = False,
) -> None:
    """Write a folder that serves a model on a machine without hpcai.

    In it are the model, the server, pinned requirements, a start script, and what Docker, systemd and Kubernetes need.

    Examples:
        $ hpcai deploy bundle runs/mnist-1 --output mnist-server
        $ hpcai deploy bundle runs/mnist-1/exports/tflite --edge --output mnist-edge

    Then: FOLDER/start.sh, as its README.md says
    """
    from hpcai_cli.engine.deployment import places
    from hpcai_cli.engine.deployment.bundle import write_bundle

    artefact = places.artefact_at(model)
    folder = write_bundle(artefact, output, edge=edge)
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    if json:
        console.result_json({"schema": "hpcai.bundle/1", "command": "deploy bundle", "model": artefact.name,
                             "format": artefact.kind, "edge": edge, "folder": str(folder), "bytes": size})
    else:
        console.result(f"written: {folder}, {size / 1e6:.1f} MB; its README.md says how to start it")


@deploy.command()
def monitor(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="What is served: an export, a run, a bundle, or a "
                                          "folder of versions.")],
    source: Annotated[str, typer.Argument(metavar="SERVER", help="Its address, as in http://127.0.0.1:8000, or the "
                                          "folder given to `serve --state`.")],
    name: Annotated[str, typer.Option(help="Of the model in the server's addresses, where it is called "
                                           "otherwise.")] = "",
    hours: Annotated[float | None, typer.Option(min=0.01, help="How far to look back; by default as far as "
                                                "possible.")] = None,
    psi: Annotated[float, typer.Option(min=0, help="Largest population stability index.")] = 0.2,
    ks: Annotated[float | None, typer.Option(min=0, max=1, help="Largest Kolmogorov-Smirnov statistic.")] = None,
    low_confidence: Annotated[float, typer.Option(min=0, max=1, help="By how much the share of answers with a "
                                                  "confidence below 0.5 may grow.")] = 0.1,
    error_rate: Annotated[float, typer.Option(min=0, max=1, help="Largest share of answers with 5xx.")] = 0.01,
    p99_ms: Annotated[float | None, typer.Option(min=0, help="Milliseconds within which 99 of 100 requests must be "
                                                 "answered.")] = None,
    labels: Annotated[Path | None, typer.Option(metavar="FILE.csv", help="Labels that came later, `id,label`; the ids "
                                                "are those of the answers.")] = None,
    log: Annotated[list[Path] | None, typer.Option(metavar="FILE", help="The server's log, in which the labels' "
                                                   "requests are. Repeatable.")] = None,
    accuracy: Annotated[float | None, typer.Option(min=0, max=1, help="Least accuracy by these labels.")] = None,
    token_file: Annotated[Path | None, typer.Option(metavar="FILE", help="With the server's token.")] = None,
    output: Annotated[Path | None, typer.Option(metavar="FOLDER", help="For report.html, monitor.json and "
                                                "statistics.json.")] = None,
    metrics: Annotated[bool, typer.Option("--metrics", help="Print Prometheus' text format.")] = False,
    json: options.Json = False,
) -> None:
    """Compare what a server sees with what its model was trained on; exit code 5 past a threshold.

    Examples:
        $ hpcai deploy monitor runs/mnist-1 http://127.0.0.1:8000 --output watch
        $ hpcai deploy monitor models/mnist state --hours 24 --psi 0.1 --json
        $ hpcai deploy monitor runs/shoppers-1 state --labels bought.csv --log requests.jsonl --accuracy 0.85
    """
    if (labels is None) != (not log):
        raise UsageError("labels and the log of their requests belong together", expected="--labels and --log")
    if accuracy is not None and labels is None:
        raise UsageError("an accuracy needs labels", expected="--labels FILE.csv --log FILE")
    if json and metrics:
        raise UsageError("there is one result", expected="--json or --metrics")
    with console.quiet():
        from hpcai_cli.engine.deployment import monitoring, places
        from hpcai_cli.engine.deployment.monitor_page import CHECK_COLUMNS, check_rows
        from hpcai_cli.engine.serving import settings
    asked = monitoring.Thresholds(psi=psi, ks=ks, low_confidence=low_confidence, error_rate=error_rate, p99_ms=p99_ms,
                                  accuracy=accuracy)
    artefact = places.artefact_at(model)
    token = settings.token_of(token_file) if token_file else ""
    where = monitoring.Server(source, token) if "://" in source else Path(source)
    report, statistics = monitoring.monitor(artefact, where, asked, name=name, hours=hours,
                                            labels=monitoring.Labels(labels, log) if labels else None)
    if output:
        monitoring.write(output, artefact, report, statistics)
    if json:
        console.result_json(report)
    elif metrics:
        console.result(monitoring.prometheus_text(report).rstrip())
    else:
        console.table(f"{report['model']}: {report['answers']:,} answers", CHECK_COLUMNS, check_rows(report))
    monitoring.require(report)


@deploy.command()
def rollback(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="A model's folder of versions.")],
    to: Annotated[int | None, typer.Option(metavar="VERSION", help="The version that is to answer; by default the one "
                                           "before the current.")] = None,
    json: options.Json = False,
) -> None:
    """Let an earlier version of a model answer; a server of the folder takes it when it reloads.

    Examples:
        $ hpcai deploy rollback models/mnist
        $ hpcai deploy rollback models/mnist --to 1

    Then: kill -HUP SERVER
    """
    from hpcai_cli.engine.deployment import repository

    document = repository.roll_back(folder, to)
    if json:
        console.result_json(document)
    else:
        console.result(f"{folder}: version {document['before']} answered, from the next reload "
                       f"{document['after']} does")
