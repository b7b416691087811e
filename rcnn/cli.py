"""The `rcnn` command: a sub-command per stage, the whole pipeline, and what helps around it.

Errors that the user can fix are one line on standard error and exit code 2. Heavy imports wait until a sub-command needs
them, so that `rcnn --help` answers at once.
"""

import argparse
import atexit
import gc
import io
import json
import math
import os
import select
import shlex
import signal
import sys
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rcnn import __version__
from rcnn.completion import SHELLS
from rcnn.errors import ClusterError, ConfigError, DataError, LeaseLost, RcnnError
from rcnn.signals import EXIT_CODES, ending_in_order
from rcnn.stages import STAGES
from rcnn.text import printable

# What Prefect says, as a plain RuntimeError, of a server that does not answer.
PREFECT_IS_AWAY = "Failed to reach API at"
REGISTRY_ACTIONS = ("list", "explain", "promote", "rollback", "verify")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one sub-command; returns the exit code.

    0; 1 where some images could not be read, or a model was not reproduced; 2 for an error that the user can fix; 130 where the
    user stopped it, 143 where SIGTERM did, and 141 where the reader of its output did.
    """
    options = _parser().parse_args(arguments)
    atexit.register(_skip_last_collection)
    from rcnn.data.sources import looking_once
    from rcnn.progress import show_on_screen

    for stream in (sys.stdout, sys.stderr):  # a terminal may not know the characters of a class name
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    show_on_screen()
    try:
        run: Callable[[argparse.Namespace], int | None] = options.run
        with looking_once(), ending_in_order():
            exit_code = run(options) or 0
        sys.stdout.flush()
    except BrokenPipeError:
        if not _reader_is_gone():
            raise
        return 141
    except RcnnError as error:
        if options.debug:
            raise
        print(f"rcnn: {type(error).__name__}: {error}", file=sys.stderr)
        return 2
    except (KeyboardInterrupt, SystemExit) as error:
        number = signal.SIGINT if isinstance(error, KeyboardInterrupt) else signal.SIGTERM
        # Ray's own handler of SIGTERM, outside a training, exits with the signal's number.
        if isinstance(error, SystemExit) and error.code not in (signal.SIGTERM, EXIT_CODES[signal.SIGTERM]):
            raise
        exit_code = EXIT_CODES[number]
        print(f"rcnn: stopped{getattr(options, 'resumes', '')}", file=sys.stderr)
    return exit_code


def _skip_last_collection() -> None:
    """Saves the second at exit in which Python searches all that torch, Ray and MLflow loaded for garbage.

    Not where Triton was loaded: nanobind, below it, would report each of its uncollected objects as a leak, in 40 lines.
    """
    if "triton" not in sys.modules:
        gc.freeze()


def _reader_is_gone() -> bool:
    """Whether the reader of standard output has closed it, as `| head` does; the rest of the output is then discarded."""
    output = select.poll()
    output.register(sys.stdout, select.POLLOUT)
    is_gone = any(event & select.POLLERR for _, event in output.poll(0))
    if is_gone:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return is_gone


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="rcnn", description="Train, tune, compare and ship recurrent convolutional networks."
    )
    parser.add_argument("--version", action="version", version=f"rcnn {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    pipeline = _add(commands, "pipeline", _pipeline, "run all stages as one Prefect flow", config=True, fresh=True)
    pipeline.add_argument(
        "--stop-running", action="store_true", help="with --fresh: stop Ray jobs that are running for the same results"
    )
    for name, row in STAGES.items():
        stage = _add(commands, name, _stage, row.help, config=True, fresh=True)
        stage.set_defaults(stage=name)
        stage.add_argument(
            "--stop-running",
            action="store_true",
            help="with --fresh: stop the Ray job that is running for the same result",
        )
        stage.add_argument("--job", metavar="FOLDER", help="for Ray jobs: what to do, and where to leave the outcome")
    plan = _add(commands, "plan", _plan, "what each stage would do and cost, before it runs", config=True)
    plan.add_argument("--json", action="store_true", help="for machines: bytes, seconds, and counts in full")
    plan.add_argument("--fresh", action="store_true", help="time the training steps again")
    compare = _add(
        commands, "compare", _compare, "trained models side by side, or what differs between two", config=True
    )
    compare.add_argument(
        "models",
        nargs="*",
        metavar="MODEL",
        help="folder (train-...), NAME/VERSION, MLflow run id or SHA-256 of the weights, or the beginning of one; of two, the "
        "differences are shown and their answers on the same test rows compared (default: all models of the storage)",
    )
    compare.add_argument("--csv", metavar="FILE", help="write a row for each model, with all its settings")
    compare.add_argument("--parquet", metavar="FILE", help="the same as Parquet")
    _add_reproduce(commands)
    predict = _add(commands, "predict", _predict, "classify image files", config=True)
    predict.add_argument("images", nargs="+", metavar="IMAGE", help="files, folders, or quoted globs")
    _add_model(predict)
    predict.add_argument(
        "--top",
        type=int,
        metavar="N",
        help="show the N most probable classes with bars (default: 3 on a terminal, else 1)",
    )
    predict.add_argument(
        "--calibrated", action="store_true", help="divide logits by the model's temperature; answers stay the same"
    )
    predict.add_argument(
        "--num-steps",
        type=int,
        metavar="N",
        help="recurrent steps, of a model that was trained for any number of them (train.any_t; default: all)",
    )
    predict.add_argument(
        "--confidence",
        type=float,
        default=0.0,
        metavar="P",
        help="with --num-steps: answers hold early from this probability on, the other images take all steps (default: 0)",
    )
    predict.add_argument("--json", action="store_true", help="a line of JSON for each image")
    _add_batch_predict(commands)
    _add_export(commands)
    _add_registry(commands)
    _add_data(commands)
    show = _add(commands, "config", _config, "print the resolved config", config=True)
    show.add_argument("--json", action="store_true", help="as one line of JSON, e.g. for a flow's parameter")
    show.add_argument(
        "--explain",
        nargs="?",
        const="",
        metavar="SETTING",
        help="a setting, or those of a section (default: all), with meaning and bounds",
    )
    show.add_argument(
        "--diff",
        nargs=2,
        metavar=("A", "B"),
        help="what differs between two recipes, files, or runs (a folder, or its name in the storage)",
    )
    doctor = _add(
        commands, "doctor", _doctor, "check storage, Ray, MLflow, Prefect, and what killed runs left", config=True
    )
    doctor.add_argument("--mend", action="store_true", help="end what killed runs left: leases, MLflow runs")
    collect = _add(commands, "gc", _gc, "list what no result refers to, and delete it if asked to", config=True)
    collect.add_argument("--delete", action="store_true", help="delete what is listed")
    collect.add_argument("--days", type=float, default=7.0, help="keep what changed within this many days (default: 7)")
    _add(commands, "recipes", _recipes, "list the named configs, with what each costs and reaches")
    _add(commands, "sources", _sources, "list the data sets, with what each needs")
    completion = _add(commands, "completion", _completion, "print a script that makes the shell complete commands")
    completion.add_argument("shell", choices=SHELLS, help="the shell")
    return parser


def _add_reproduce(commands: Any) -> None:
    text = "train what a table of the paper compares, and set it beside the published figures"
    reproduce = _add(commands, "reproduce", _reproduce, text)
    reproduce.set_defaults(resumes="; the same command trains what is left")
    reproduce.add_argument("table", metavar="TABLE", nargs="?", help="which one (default: list them)")
    reproduce.add_argument(
        "--budget",
        choices=["full", "small"],
        default="small",
        help="full: trained as published, on GPUs; small (default): smaller networks or fewer epochs, on 2 CPU cores",
    )
    reproduce.add_argument(
        "--seeds",
        type=int,
        metavar="N",
        help="trainings of each experiment (default: 5 of the full budget, 3 of the small)",
    )
    reproduce.add_argument(
        "--only", action="append", default=[], metavar="NAME", help="an experiment, or a pattern: '*rcnn32'"
    )
    reproduce.add_argument("--parallel", type=int, metavar="N", help="trainings at a time (default: as many as fit)")
    reproduce.add_argument("--plan", action="store_true", help="print what is left to run, and how long that takes")
    reproduce.add_argument(
        "--set", action="append", default=[], metavar="SECTION.FIELD=VALUE", help="a setting of all trainings"
    )


def _add_model(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--model",
        metavar="MODEL",
        default="",
        help="NAME (its champion), NAME@ALIAS, NAME/VERSION, or a folder that `rcnn train` wrote "
        "(default: the only registered model)",
    )


def _add_batch_predict(commands: Any) -> None:
    text = "classify the images of Parquet files or folders on Ray, and write Parquet with their probabilities"
    batch = _add(commands, "batch-predict", _batch_predict, text, config=True, fresh=True)
    batch.add_argument(
        "input",
        metavar="INPUT",
        help="Parquet files or images: a file, a folder (one with Parquet files is read as Parquet) or a quoted glob; Parquet "
        "also as a URI",
    )
    batch.add_argument("--to", required=True, metavar="FOLDER", help="a new folder or URI, or one to resume")
    _add_model(batch)


def _add_export(commands: Any) -> None:
    export = _add(commands, "export", _export, "write a model for torch.export (pt2) or ONNX", config=True)
    _add_model(export)
    export.add_argument("--to", type=Path, required=True, metavar="FOLDER", help="for model.pt2 and model.onnx")
    export.add_argument("--format", choices=("pt2", "onnx", "all"), default="all", help="default: all")


def _add_registry(commands: Any) -> None:
    text = "list the versions of models, explain a verdict, promote, roll back, or verify"
    registry = _add(commands, "registry", _registry, text, config=True)
    registry.add_argument(
        "action",
        nargs="?",
        default="list",
        choices=REGISTRY_ACTIONS,
        metavar="ACTION",
        help="list (default); explain VERSION: why it is the champion, or why not; promote VERSION: make it the champion "
        "without a test; rollback: return to the champion before; verify VERSION: train it again and compare the weights",
    )
    registry.add_argument("version", nargs="?", type=int, metavar="VERSION", help="of the model")
    registry.add_argument("--model", metavar="NAME", default="", help="only this model")
    registry.add_argument("--reason", metavar="TEXT", help="for promote and rollback: why; it stays with the version")


def _add_data(commands: Any) -> None:
    text = "list, show, verify or export the ingested data sets"
    actions = commands.add_parser("data", help=text, description=text[0].upper() + text[1:] + ".").add_subparsers(
        title="actions", required=True, metavar="ACTION"
    )
    _add(actions, "list", _data_list, "a table of the data sets in the storage", config=True)
    for name, run, text in (
        ("show", _data_show, "rows of each class, and contact sheets (PNG)"),
        ("verify", _data_verify, "read all of a data set and compare it with its manifest"),
        ("export", _data_export, "write a data set in another layout"),
    ):
        action = _add(actions, name, run, text, config=True)
        action.add_argument(
            "name", nargs="?", metavar="NAME", help="folder, name or digest (default: what the settings name)"
        )
        if name == "show":
            action.add_argument(
                "--class", action="append", default=[], metavar="NAME", dest="classes", help="draw only this class"
            )
    action.add_argument("--format", choices=["huggingface"], default="huggingface", help="the layout")
    action.add_argument("--to", type=Path, required=True, metavar="FOLDER", help="a folder that does not exist yet")


def _add(
    commands: Any,
    name: str,
    run: Callable[[argparse.Namespace], int | None],
    text: str,
    *,
    config: bool = False,
    fresh: bool = False,
) -> argparse.ArgumentParser:
    command: argparse.ArgumentParser = commands.add_parser(
        name, help=text, description=text[0].upper() + text[1:] + "."
    )
    command.set_defaults(run=run)
    command.add_argument("--debug", action="store_true", help="show the traceback of an error")
    if config:
        command.add_argument("--recipe", metavar="NAME", help="named config to start from (default: demo)")
        command.add_argument("--config", metavar="FILE", help="TOML, YAML or JSON file on top of it")
        command.add_argument(
            "--set", action="append", default=[], metavar="SECTION.FIELD=VALUE", help="one setting on top of that"
        )
    if fresh:
        command.set_defaults(resumes="; the same command, without --fresh, resumes")
        command.add_argument("--fresh", action="store_true", help="do the work again although its result is there")
        command.add_argument(
            "--ray",
            metavar="ADDRESS",
            help="run on this cluster, as Ray jobs: http://head:8265; auto: join the one of this machine (the same as --set "
            "ray.address=ADDRESS)",
        )
    return command


def _resolve(options: argparse.Namespace) -> Any:
    from rcnn.recipes import resolve_config

    cluster = [f"ray.address={options.ray}"] if getattr(options, "ray", None) is not None else []
    overrides = [*options.set, *cluster]
    return resolve_config(options.recipe, file=options.config, environ=os.environ, overrides=overrides).rooted()


def _pipeline(options: argparse.Namespace) -> None:
    config = _resolve(options)
    from rcnn.progress import say
    from rcnn.registry.outbox import send_waiting
    from rcnn.stages import finished_pipeline, nothing_to_do, stage_folder
    from rcnn.summary import print_summary

    _require_fresh_to_stop(options)
    results = None if options.fresh else finished_pipeline(config)
    if results is None:
        print_summary(config, _run_flow(config, fresh=options.fresh, stop_running=options.stop_running))
        return
    for name in results:
        say(nothing_to_do(name, stage_folder(config, name, results)))
    say("pipeline: every stage is done, so no flow run was started")
    send_waiting(config)
    print_summary(config, {name: result.model_dump(mode="json") for name, result in results.items()})


def _require_fresh_to_stop(options: argparse.Namespace) -> None:
    if options.stop_running and not options.fresh:
        raise ConfigError(
            "needs --fresh", where="--stop-running", remedy="Without it, the command attaches to a running job"
        )


def _run_flow(config: Any, *, fresh: bool, stop_running: bool) -> Any:
    """Runs the Prefect flow; what the stages need is started while Prefect's server starts."""
    with _prefect() as server:
        from rcnn.stages import prepare_stages

        prepare_stages(config, fresh=fresh)
        from flows.full_pipeline import full_pipeline

        server.wait()
        return full_pipeline(config, fresh=fresh, stop_running=stop_running)


@contextmanager
def _prefect() -> Iterator[Any]:
    """Starts Prefect's server, unless one is set; what needs it calls `wait` first."""
    from rcnn.progress import say

    say("pipeline: starting Prefect (the first start takes half a minute) ...")
    # Read by Prefect when it is imported. Its default of 20 s is too short for the first start's database migration.
    os.environ.setdefault("PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS", "180")
    os.environ.setdefault("PREFECT_SERVER_ANALYTICS_ENABLED", "false")
    os.environ.setdefault("DO_NOT_TRACK", "1")
    os.environ.setdefault("PREFECT_LOGGING_LEVEL", "CRITICAL")  # our own lines and errors say it all
    from flows.server import prefect_server

    with prefect_server() as server, _prefect_answers():
        yield server


@contextmanager
def _prefect_answers() -> Iterator[None]:
    """Turns a Prefect server that does not answer into an error that the user can fix."""
    import httpx

    try:
        yield
    except (httpx.HTTPError, RuntimeError) as error:
        is_prefects = isinstance(error, httpx.HTTPError) or PREFECT_IS_AWAY in str(error)
        if not is_prefects:
            raise
        url = os.environ.get("PREFECT_API_URL", "")
        raise ClusterError(
            f"Prefect does not answer ({' '.join(str(error).split())[:200]})",
            where=f"PREFECT_API_URL = {url!r}",
            remedy="`make up` starts a server; `unset PREFECT_API_URL` does without one" if url else "Try once more",
        ) from error


def _plan(options: argparse.Namespace) -> None:
    config = _resolve(options)
    from rcnn.plan.bill import bill_of

    bill = bill_of(config, fresh=options.fresh)
    if options.json:
        print(json.dumps(bill.as_json(), indent=2))
        return
    _print_table(bill.table(), title=f"plan: {config.recipe}")
    for line in bill.lines():
        print(printable(f"  {line}"))
    print(f"\n{'Nothing is left to run. This shows the results:' if bill.is_done else 'Next:'}")
    print(f"  {shlex.join(['rcnn', 'pipeline', *_config_options(options)])}")


def _config_options(options: argparse.Namespace) -> list[str]:
    """The options of this call that say which config is meant."""
    pairs = [("--recipe", options.recipe), ("--config", options.config), *(("--set", text) for text in options.set)]
    return [word for name, value in pairs if value is not None for word in (name, value)]


def _stage(options: argparse.Namespace) -> None:
    from rcnn import stages

    if options.job is None:
        _require_fresh_to_stop(options)
        config = _resolve(options)
        results = _run_until(config, options.stage, fresh=options.fresh, stop_running=options.stop_running)
        print(json.dumps(results[options.stage].model_dump(mode="json"), indent=2))  # ASCII: safe on any terminal
        return
    from rcnn.storage import JOB_OUTCOME, Storage

    if options.config is not None or options.recipe is not None or options.set or options.ray is not None:
        raise ConfigError("has all settings", where="--job", remedy="Leave out --config, --recipe, --set and --ray")
    folder = Storage(options.job)
    config, results, parent, code = _job_inputs(folder)
    try:
        stages.require_same_code(config, options.stage, code)
        result = stages.run_stage(config, options.stage, results, fresh=options.fresh, parent=parent)
    except LeaseLost:
        raise  # the outcome is that of the job that took over
    except RcnnError as error:
        tree = {"kind": type(error).__name__, "what": error.what, "where": error.where, "remedy": error.remedy}
        folder.write_json(JOB_OUTCOME, {"error": tree | {"retryable": error.retryable}})
        raise
    folder.write_json(JOB_OUTCOME, {"result": result.model_dump(mode="json")})


def _run_until(config: Any, last: str, *, fresh: bool, stop_running: bool) -> Any:
    """Runs the stages up to `last`: from here, as Ray jobs, where the cluster has a job server."""
    from rcnn.stages import run_pipeline_until

    if not config.ray.address.startswith("http"):
        return run_pipeline_until(config, last, fresh=fresh)
    from flows.jobs import run_until
    from rcnn.registry.outbox import send_waiting

    follower = f"command-{uuid.uuid4().hex[:8]}"
    results = run_until(config, last, fresh=fresh, stop_running=stop_running, follower=follower)
    send_waiting(config)
    return results


def _job_inputs(folder: Any) -> Any:
    """What a Ray job gets: the exact config, the results before this stage, the MLflow run above it, the driver's code."""
    from rcnn.settings import config_from_json
    from rcnn.stages import Parent, results_from_json
    from rcnn.storage import JOB
    from rcnn.text import parse_json

    where, remedy = (
        folder.uri(JOB),
        "--job is for Ray jobs; leave it out to run the stage, and what it needs, from here",
    )
    try:
        inputs = parse_json(folder.read_text(JOB))
        parent = Parent(inputs["parent"]["run_id"], tuple(inputs["parent"]["tags"].items()))
        results, code, config = results_from_json(inputs["results"]), dict(inputs["code"]), json.dumps(inputs["config"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        fault = " ".join(str(error).split())
        raise ConfigError(f"cannot be read ({fault})", where=where, remedy=remedy) from error
    return config_from_json(config, origin=where), results, parent, code


def _compare(options: argparse.Namespace) -> None:
    config = _resolve(options)
    from rcnn.compare.models import models_of
    from rcnn.compare.pair import find_models
    from rcnn.compare.table import as_csv, as_parquet, as_rows, groups_of, records
    from rcnn.storage import Storage

    models = models_of(storage := Storage(config.storage))
    wanted = [_weights_of(config, name) for name in options.models]
    chosen = find_models(wanted, models) if wanted else models
    if not chosen:
        raise ConfigError("there is no trained model", where=config.storage, remedy="Run `rcnn pipeline` first")
    if len(options.models) == 2:
        _compare_two(storage, *chosen)
    else:
        groups = groups_of(chosen)
        _print_table(as_rows(groups), title=printable(f"models in {config.storage}"))
        print(
            "best by size, time: no model on the same test rows has fewer errors and is smaller, or was trained in less time"
        )
        if not options.models:
            print("what differs between two: rcnn compare MODEL MODEL")
    for file, content in ((options.csv, as_csv), (options.parquet, as_parquet)):
        if file:
            _write_file(file, content(records(groups_of(chosen))))


def _weights_of(config: Any, name: str) -> str:
    """The SHA-256 of the weights of a registered version, `NAME/3`; any other name as it is."""
    model, _, version = name.partition("/")
    if not version.isdecimal():
        return name
    from rcnn.registry.mlflow_store import tags_of_versions

    tags = tags_of_versions(config, model).get(int(version))
    if tags is None:
        raise ConfigError("there is no such version", where=f"compare {name}", remedy="`rcnn registry` lists them")
    return tags.get("weights_sha256", name)


def _compare_two(storage: Any, ours: Any, theirs: Any) -> None:
    from rcnn.compare.pair import differences, figures, in_words, paired_test

    found = differences(ours, theirs)
    if found:
        _print_table(found, title="what differs")
    else:
        print("settings, data, code and environment are the same")
    _print_table(figures(ours, theirs), title="figures")
    try:
        print(in_words(paired_test(storage, ours, theirs), ours, theirs))
    except DataError as error:
        print(printable(f"no paired test: {error}"))
        return
    print("this is for people: only `rcnn register` decides on the champion, and pays for each look at the test rows")


def _write_file(file: str, content: str | bytes) -> None:
    try:
        Path(file).write_bytes(content.encode() if isinstance(content, str) else content)
    except OSError as error:
        raise ConfigError(f"cannot be written ({error.strerror})", where=file, remedy="Choose another file") from error
    print(printable(f"written: {file}"))


def _reproduce(options: argparse.Namespace) -> int:
    from rcnn.reproduce.tables import PARAMETERS, TABLES, cells_of

    _check_reproduce(options)
    if options.table is None:
        rows = [
            {"table": name, "what": table.title, "experiments": str(len(table.names))} for name, table in TABLES.items()
        ]
        rows.append({"table": PARAMETERS, "what": "Numbers of parameters, published and exact", "experiments": ""})
        _print_table(rows, title="tables of the paper")
        print("what one costs: rcnn reproduce TABLE --plan")
        return 0
    if options.table == PARAMETERS:
        from rcnn.reproduce.cells import parameter_rows

        _print_table(parameter_rows(), title="Parameters")
        return 0
    num_seeds = options.seeds or (5 if options.budget == "full" else 3)
    chosen = {"budget": options.budget, "num_seeds": num_seeds, "only": options.only}
    cells = cells_of(options.table, **chosen, overrides=options.set, environ=os.environ)
    if options.plan:
        return _plan_table(options, cells)
    return _fill_table(options, cells, num_seeds)


def _check_reproduce(options: argparse.Namespace) -> None:
    from rcnn.reproduce.tables import TABLE_NAMES

    if options.table is not None and options.table not in TABLE_NAMES:
        raise ConfigError(
            f"there is no table {options.table!r}", where="reproduce", remedy=f"Choose one of {', '.join(TABLE_NAMES)}"
        )
    for name in ("seeds", "parallel"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise ConfigError(f"is {value}", where=f"--{name}", remedy="Use 1 or more")


def _plan_table(options: argparse.Namespace, cells: Any) -> int:
    from rcnn.reproduce.cells import bill_of_cells

    bill = bill_of_cells(cells, options.parallel or 0)
    _print_table(bill.rows, title=f"plan: {options.table}, budget {options.budget}")
    if not bill.num_left:
        print("Nothing is left to run.")
    elif bill.seconds is None:
        print("The size of the images is known after ingest: run `rcnn ingest` with the same data settings first.")
    else:
        print(f"{bill.num_left} trainings are left: about {bill.time} in all, as predicted from a few timed steps")
    return 0


def _fill_table(options: argparse.Namespace, cells: Any, num_seeds: int) -> int:
    """Runs what is left of a table, prints it, and returns the exit code: 1 where a training failed."""
    from rcnn.reproduce.cells import results_of
    from rcnn.reproduce.publish import Call, publish, table_of
    from rcnn.storage import Storage

    words = ["rcnn", "reproduce", options.table, "--budget", options.budget, "--seeds", str(num_seeds)]
    words += [word for pattern in options.only for word in ("--only", pattern)]
    words += [word for text in options.set for word in ("--set", text)]
    call, failures = Call(options.table, options.budget, shlex.join(words)), dict[str, str]()
    if any(results_of(cell.config) is None for cell in cells):
        folder, failures = _run_reproduce_flow(options, num_seeds, call.command)
    else:
        folder = publish(call, cells)
    finished = table_of(call, cells)
    _print_table(finished.cells(), title=finished.title)
    print(printable(f"as Markdown, HTML and Parquet: {Storage(cells[0].config.storage).uri(folder)}"))
    for name, error in failures.items():
        print(f"rcnn: {name} failed: {error}", file=sys.stderr)
    return 1 if failures else 0


def _run_reproduce_flow(options: argparse.Namespace, num_seeds: int, command: str) -> tuple[str, dict[str, str]]:
    """Runs the flow; returns the folder of the report, and the errors by cell."""
    with _prefect() as server:
        from flows.reproduce import reproduce

        server.wait()
        outcome = reproduce(
            options.table, options.budget, num_seeds, options.set, options.only, options.parallel or 0, command
        )
    return outcome["folder"], outcome["failures"]


def _predict(options: argparse.Namespace) -> int:
    config = _resolve(options)
    from rcnn.evaluate.image_files import find_images
    from rcnn.evaluate.predict import NUM_TOP, Predictor, Unreadable
    from rcnn.registry.answers import model_folder
    from rcnn.storage import Storage

    if Storage(config.storage).is_local and not config.tracking.uri:
        Storage(config.storage).require_readable()
    if options.top is not None and options.top < 1:
        raise ConfigError(f"is {options.top}", where="--top", remedy="Use 1 or more")
    files = find_images(options.images)
    num_top = options.top or (NUM_TOP if options.json else 3 if sys.stdout.isatty() else 1)
    with model_folder(config, options.model) as (name, folder):
        predictor = Predictor(
            folder,
            num_top=num_top,
            calibrated=options.calibrated,
            num_steps=options.num_steps,
            confidence=options.confidence,
        )
    if options.calibrated and not predictor.has_temperature:
        print("rcnn: this model has no temperature: probabilities are as they are", file=sys.stderr)
    if not options.json:
        print(f"model: {printable(name)}, trained on {printable(predictor.data_set)}")
    num_unreadable = 0
    for answer in _with_bar(predictor.predict(files), len(files), "image"):
        is_unreadable = isinstance(answer, Unreadable)
        num_unreadable += is_unreadable
        if options.json:
            print(json.dumps(answer.as_json()))
        elif is_unreadable:
            print(f"rcnn: {answer}", file=sys.stderr)
        else:
            print(answer if num_top == 1 else f"{answer}\n{answer.bars()}")
    if num_unreadable:
        print(f"rcnn: {num_unreadable:,} of {len(files):,} files could not be read", file=sys.stderr)
    return 1 if num_unreadable else 0


def _batch_predict(options: argparse.Namespace) -> int:
    config = _resolve(options)
    from rcnn.evaluate.batch_records import BAD_IMAGES

    done = _predicted(config, options)
    print(printable(f"model: {done.model}"))
    print(printable(f"predictions: {options.to}"))
    if done.bad:
        place = f"{options.to.rstrip('/')}/{BAD_IMAGES}"
        print(
            printable(f"rcnn: {done.bad:,} of {done.num_rows:,} images could not be read; {place} lists them"),
            file=sys.stderr,
        )
    return 1 if done.bad else 0


def _predicted(config: Any, options: argparse.Namespace) -> Any:
    """Predicts as a Ray job where the cluster has a job server, and elsewhere in this process."""
    if config.ray.address.startswith("http"):
        from flows.batch_predict import predict_as_job

        # A job has another working directory.
        source, to = (text if "://" in text else os.path.abspath(text) for text in (options.input, options.to))
        model = os.path.abspath(options.model) if os.path.lexists(options.model) else options.model
        return predict_as_job(config, source, to, model, fresh=options.fresh)
    from rcnn.evaluate.batch_predict import batch_predict
    from rcnn.registry.answers import model_folder

    with model_folder(config, options.model) as (name, folder):
        return batch_predict(
            config, options.input, options.to, model_name=name, model_folder=folder, fresh=options.fresh
        )


def _export(options: argparse.Namespace) -> None:
    config = _resolve(options)
    from rcnn.registry.answers import model_folder

    with model_folder(config, options.model) as (_, folder):
        from rcnn.registry.export import FORMATS, export_model

        for exported in export_model(folder, options.to, FORMATS if options.format == "all" else [options.format]):
            print(printable(f"{exported.file}: {exported.summary}"))


def _with_bar(items: Iterator[Any], num_items: int, unit: str) -> Iterator[Any]:
    """The items, with a bar where they go to a file and a person watches."""
    from tqdm import tqdm

    is_watched = sys.stderr.isatty() and not sys.stdout.isatty()
    return iter(tqdm(items, total=num_items, unit=unit, leave=False, disable=not is_watched))


def _registry(options: argparse.Namespace) -> int | None:
    config = _resolve(options)
    from rcnn.storage import Storage
    from rcnn.tracking import has_store

    if not config.tracking.uri:
        Storage(config.storage).require_readable()
    _check_action(options)
    wanted = options.model or config.tracking.model_name
    versions: dict[str, list[dict[str, str]]] = {}
    if has_store(config):
        from rcnn.registry.mlflow_store import list_models, list_versions

        found = {name: list_versions(config, name) for name in ([wanted] if wanted else list_models(config))}
        versions = {name: rows for name, rows in found.items() if rows}
    if not versions:
        what = f"there is no registered model {wanted!r}" if wanted else "there is no registered model"
        raise ConfigError(what, remedy="Run `rcnn pipeline` first")
    if options.action == "list":
        _show_versions(versions)
        return 0
    if len(versions) > 1:
        raise ConfigError(
            f"there are {len(versions)} registered models: {', '.join(versions)}",
            where=options.action,
            remedy=f"Choose one, e.g. --model {next(iter(versions))}",
        )
    [name] = versions
    return _act(config.with_settings({"tracking.model_name": name}), name, options)


def _check_action(options: argparse.Namespace) -> None:
    """Checks that an action has what it needs, and nothing that it ignores."""
    action, needs_version = options.action, options.action in ("explain", "promote", "verify")
    if needs_version != (options.version is not None):
        raise ConfigError(
            "needs a version" if needs_version else f"takes no version, and got {options.version}",
            where=action,
            remedy=f"e.g. `rcnn registry {action}{' 3' if needs_version else ''}`",
        )
    if action == "promote" and not (options.reason or "").strip():
        raise ConfigError("needs --reason", where=action, remedy='Say why, e.g. --reason "half the size, same error"')
    if options.reason is not None and action not in ("promote", "rollback"):
        raise ConfigError("is only for promote and rollback", where="--reason", remedy="Leave it out")


def _act(config: Any, name: str, options: argparse.Namespace) -> int:
    """Does what `rcnn registry ACTION` asks for; returns the exit code."""
    from rcnn.registry.answers import remember_model
    from rcnn.registry.champions import explain, promote, roll_back

    if options.action == "explain":
        for line in explain(config, options.version):
            print(printable(line))
    elif options.action == "promote":
        promote(config, options.version, options.reason.strip())
        print(f"{name} version {options.version} is now the champion")
    elif options.action == "rollback":
        old, new = roll_back(config, (options.reason or "no reason given").strip())
        print(f"{name} version {new} is the champion again, version {old} no longer")
    else:
        return _verify(config, name, options.version)
    remember_model(config, name)
    return 0


def _verify(config: Any, name: str, version: int) -> int:
    from rcnn.verify import verify

    found = verify(config, version)
    if found.is_same:
        print(f"{name} version {version} is reproduced: the same weights, SHA-256 {found.found_sha256}")
        return 0
    print(f"{name} version {version} is not reproduced:")
    print(f"  recorded {found.recorded_sha256}\n  found    {found.found_sha256}")
    unknown = "what the version records is as it was; was it trained here, with train.deterministic=true?"
    for difference in found.differences or (unknown,):
        print(printable(f"  {difference}"))
    return 1


def _percent(tag: str) -> str:
    """A test error from a tag; a version that was registered by hand may have another text there."""
    from rcnn.registry.mlflow_store import as_share

    share = as_share(tag)
    return tag if math.isnan(share) else f"{100 * share:.2f} %"


def _show_versions(versions: dict[str, list[dict[str, str]]]) -> None:
    """Prints the versions of each model."""
    from rcnn.registry.champions import standing_of

    for name, rows in versions.items():
        shown = [
            {
                "version": row["version"], "aliases": row["aliases"], "test error": _percent(row["test_error"]),
                "network": row.get("network", ""), "verdict": standing_of(row),
            }
            for row in rows
        ]  # fmt: skip
        _print_table(shown, title=name)
    print("why one is the champion: rcnn registry explain VERSION")


def _doctor(options: argparse.Namespace) -> int:
    config = _resolve(options)
    from rcnn.doctor import Check, examine

    more: dict[str, Check] = {}
    if config.ray.address.startswith("http"):
        from flows.jobs import left_jobs

        more["jobs"] = left_jobs
    if os.environ.get("PREFECT_API_URL"):
        more["flow runs"] = _left_flow_runs
    num_faults = 0
    for finding in examine(config, more):
        mended = ""
        if finding.mend and options.mend:
            finding.mend()
            mended = ": ended"
        is_fault = bool(finding.remedy and not mended)
        num_faults += is_fault
        remedy = f". {finding.remedy}" if is_fault else ""
        print(
            printable(f"{'FAULT' if is_fault else 'ok':6}{finding.part:10} {finding.text}{mended}{remedy}"), flush=True
        )
    print(f"{num_faults} {'fault' if num_faults == 1 else 'faults'}" if num_faults else "all is sound")
    return 2 if num_faults else 0


def _left_flow_runs(config: Any) -> Iterator[tuple[Any, ...]]:
    """Flow runs without a process; a server that does not answer is found by the check "Prefect"."""
    import httpx

    try:
        from flows.left_runs import left_flow_runs

        left = list(left_flow_runs(config))
    except (RuntimeError, httpx.HTTPError):
        return
    yield from left or [("no flow run lacks its process",)]


def _gc(options: argparse.Namespace) -> None:
    config = _resolve(options)
    from rcnn.gc import find_leftovers
    from rcnn.storage import Storage

    Storage(config.storage).require_readable()
    found = list(find_leftovers(config, days=options.days))
    if not found:
        print(printable(f"nothing in {config.storage} that is older than {options.days:g} days can be deleted"))
        return
    rows = [
        {"what": each.what, "where": each.place, "MB": f"{each.num_bytes / 1e6:,.1f}", "days": f"{each.days:.0f}"}
        for each in found
    ]
    _print_table(rows, title=printable(f"left over in {config.storage}"))
    for each in list(found) if options.delete else ():
        try:
            each.delete()
        except ClusterError as error:
            print(printable(f"{each.place} is left: {error}"), file=sys.stderr)
            found.remove(each)
    megabytes = sum(each.num_bytes for each in found) / 1e6
    print(f"{megabytes:,.1f} MB " + ("are deleted" if options.delete else "can be deleted: `rcnn gc --delete` does so"))


def _data_list(options: argparse.Namespace) -> None:
    config = _resolve(options)
    from rcnn.data.catalog import list_data_sets
    from rcnn.storage import Storage

    storage = Storage(config.storage)
    storage.require_readable()
    rows = list_data_sets(storage)
    if not rows:
        print(printable(f"there are no data sets in {config.storage}; `rcnn ingest` makes one"))
        return
    _print_table(rows, title=printable(f"data sets in {config.storage}"))


def _data_set(options: argparse.Namespace) -> Any:
    """The storage and the folder of the data set that an action is about."""
    config = _resolve(options)
    from rcnn.data.catalog import find_data_set
    from rcnn.stages import stage_folder
    from rcnn.storage import Storage

    storage = Storage(config.storage)
    storage.require_readable()
    if options.name is not None:
        return storage, find_data_set(storage, options.name)
    return storage, stage_folder(config, "ingest", {}).name


def _data_show(options: argparse.Namespace) -> None:
    storage, folder = _data_set(options)
    from rcnn.data.show import OVERVIEW, PAIRS, count_rows, describe_near_duplicates, write_sheets

    name = os.path.basename(folder)
    rows = count_rows(storage, folder)
    _print_table(rows, title=name)
    files = write_sheets(storage, folder, f"reports/data-{name}", classes=options.classes)
    num_drawn = sum(os.path.basename(file) not in (OVERVIEW, PAIRS) for file in files)
    some = (
        "" if num_drawn == len(rows) else f" of {num_drawn} of {len(rows):,} classes (choose others with --class NAME)"
    )
    place = storage.uri(f"reports/data-{name}")
    print(printable(f"contact sheets{some} in {place}; {OVERVIEW} has a row of each class drawn"))
    if found := describe_near_duplicates(storage, folder):
        print(printable(found))


def _data_verify(options: argparse.Namespace) -> None:
    storage, folder = _data_set(options)
    from rcnn.data.catalog import find_faults

    faults = list(find_faults(storage, folder))
    for fault in faults[1:]:
        print(printable(f"rcnn: {fault}"), file=sys.stderr)
    if faults:
        in_all = f" ({len(faults)} faults in all)" if len(faults) > 1 else ""
        raise DataError(f"{faults[0]}{in_all}", remedy="Ingest again with --fresh")
    print(printable(f"{storage.uri(folder)} is complete: every row matches the manifest"))


def _data_export(options: argparse.Namespace) -> None:
    storage, folder = _data_set(options)
    from rcnn.data.export import export_huggingface

    for file in export_huggingface(storage, folder, options.to):
        print(printable(file))


def _config(options: argparse.Namespace) -> None:
    if options.explain is not None:
        from rcnn.settings import explain_settings

        is_asked = options.recipe is not None or options.config is not None or options.set
        config = _resolve(options) if is_asked else None
        _print_table(explain_settings(options.explain, config), title="settings")
        return
    config = _resolve(options)
    if options.diff:
        _print_differences(config, *options.diff)
        return
    if options.json:
        print(config.model_dump_json())
        return
    import yaml

    print(yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False), end="")


def _print_differences(config: Any, ours: str, theirs: str) -> None:
    """Prints each setting that differs between two configs; `config` says where runs are."""
    from rcnn.config_diff import differences, find_config
    from rcnn.storage import Storage

    storage = Storage(config.storage)
    found = differences(find_config(ours, storage), find_config(theirs, storage))
    if not found:
        print("no differences")
        return
    _print_table([{"setting": name, ours: our, theirs: their} for name, our, their in found], title="differences")


def _recipes(options: argparse.Namespace) -> None:
    from rcnn.recipes import GROUPS, describe

    for group, recipes in GROUPS.items():
        _print_table([describe(recipe.__name__) for recipe in recipes], title=group)
        print()
    print("run one: rcnn pipeline --recipe NAME; its settings: rcnn config --recipe NAME")


def _completion(options: argparse.Namespace) -> None:
    from rcnn.completion import completion_script

    print(completion_script(_parser(), options.shell))


def _sources(options: argparse.Namespace) -> None:
    from rcnn.data.sources import SOURCES

    rows = [{"source": name, "what": source.summary, "needs": source.needs} for name, source in SOURCES.items()]
    _print_table(rows, title="sources")


def _print_table(rows: Sequence[dict[str, str]], *, title: str) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    for number, column in enumerate(rows[0]):
        table.add_column(column, overflow="fold", no_wrap=number == 0)  # a name is whole, so that it can be copied
    for row in rows:
        table.add_row(*(escape(printable(cell)) for cell in row.values()))
    Console(width=None if sys.stdout.isatty() else 140).print(table)


if __name__ == "__main__":
    sys.exit(main())
