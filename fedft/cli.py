"""The ``fedft`` command. Each subcommand is a few lines: parse, call, show."""

import io
import re
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Annotated, Any

import typer

from fedft.core.errors import FedftError
from fedft.core.extras import need
from fedft.core.quiet import quiet
from fedft.deploy_cli import add_commands
from fedft.plugin_cli import add_check

cli = typer.Typer(
    name="fedft",
    help="Federated fine-tuning of pretrained transformers.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

Config = Annotated[Path, typer.Argument(help="TOML file of the run.", show_default=False)]
RunPath = Annotated[Path, typer.Argument(help="A run directory.", show_default=False)]
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", help="Override a key: training.lr=1e-3", metavar="KEY=VALUE"),
]
Allow = Annotated[
    list[str] | None,
    typer.Option(
        "--allow",
        help="Code from outside of fedft that the run directory may use; repeat its name.",
        metavar="PACKAGE.MODULE:CLASS",
    ),
]
Json = Annotated[bool, typer.Option("--json", help="One JSON object on standard output.")]
Confidence = Annotated[
    float | None,
    typer.Option(help="Level of the intervals over seeds: 0.95 where two seeds or more are there."),
]
_debug = False


def _version(asked: bool) -> None:
    if asked:
        from fedft import __version__

        print(f"fedft {__version__}")
        raise typer.Exit


@cli.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_version, is_eager=True)
    ] = False,
    debug: Annotated[bool, typer.Option(help="Show tracebacks of expected errors.")] = False,
    verbose: Annotated[bool, typer.Option(help="Let the libraries below speak.")] = False,
) -> None:
    global _debug
    _debug = debug
    quiet(verbose)


@cli.command()
def simulate(
    config: Config,
    settings: Settings = None,
    run_dir: Annotated[Path | None, typer.Option(help="An absent or empty folder.")] = None,
    backend: Annotated[str | None, typer.Option(help="ray, processes or inline.")] = None,
    workers: Annotated[int | None, typer.Option(help="Worker processes.")] = None,
    report_too: Annotated[bool, typer.Option("--report", help="Draw the report, too.")] = False,
    json: Json = False,
) -> None:
    """Simulate a federation on this machine."""
    from fedft.api import Run
    from fedft.console import RunConsole
    from fedft.server.config_file import load_config
    from fedft.server.run import simulate

    parsed = load_config(config, _overrides(settings, backend, workers))
    if report_too:
        need("report", "--report needs it")
    with _graceful() as stop, RunConsole(json_output=json) as console:
        run = simulate(parsed, run_dir, trackers=[console], stop=stop)
    if report_too:
        from fedft.report import write_report

        write_report([run.path], run.report / "report.html")
    console.result(Run(run.path))


@cli.command()
def compare(
    config: Config,
    run_dir: Annotated[Path, typer.Option(help="Folder of the comparison.")],
    strategies: Annotated[str, typer.Option(help="Rules, separated by commas.")] = "fedavg-lora",
    arms: Annotated[
        Path | None, typer.Option(help="TOML file: a table of settings an arm, in place of rules.")
    ] = None,
    seeds: Annotated[str, typer.Option(help="Seeds, separated by commas.")] = "0,1,2",
    settings: Settings = None,
    backend: Annotated[str | None, typer.Option(help="ray, processes or inline.")] = None,
    workers: Annotated[int | None, typer.Option(help="Worker processes.")] = None,
    confidence: Confidence = None,
    allow: Allow = None,
    report_to: Annotated[Path | None, typer.Option("--report", help="HTML file to write.")] = None,
    json: Json = False,
) -> None:
    """Run several rules, or arms, over several seeds, on the same partitions, cohorts and batches."""
    from fedft.console import ComparisonConsole
    from fedft.report import write_report
    from fedft.report.statistics import check_seeds
    from fedft.report.tables import summarise
    from fedft.server import compare as comparison
    from fedft.server.config_file import load_config, repeated

    if report_to is not None:
        need("report", "--report needs it")
    names = [name.strip() for name in strategies.split(",")] if arms is None else []
    parsed = load_config(config, _overrides(settings, backend, workers), names)
    numbers = _numbers(seeds)
    if confidence is not None:
        check_seeds(len(numbers), confidence, "--confidence")
    sides = comparison.rules(parsed, names) if arms is None else comparison.read_arms(arms)
    with _graceful() as stop, ComparisonConsole(len(sides) * len(numbers), json) as console:
        paths = comparison.compare(
            parsed,
            sides,
            numbers,
            run_dir,
            trackers=lambda cell: [console.cell(cell)],
            stop=stop,
            trust=repeated((), allow or ()),
        )
    if report_to is not None:
        write_report(paths, report_to, confidence)
    console.result(summarise(paths, confidence), run_dir)


def _overrides(settings: list[str] | None, backend: str | None, workers: int | None) -> list[str]:
    """All overrides of a command line as ``KEY=VALUE``."""
    given = list(settings or [])
    given += [f"engine.backend={backend}"] if backend else []
    given += [f"engine.workers={workers}"] if workers is not None else []
    return given


def _numbers(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise typer.BadParameter(
            f"{text!r} is not a list of integers", param_hint="--seeds"
        ) from None


@cli.command()
def resume(
    run_dir: RunPath,
    settings: Settings = None,
    fork: Annotated[
        Path | None, typer.Option(help="Go on in a new run directory, with changes.")
    ] = None,
    allow: Allow = None,
    json: Json = False,
) -> None:
    """Go on with a run after its last committed round."""
    from fedft.api import Run
    from fedft.console import RunConsole
    from fedft.server import run as runs
    from fedft.server.config_file import load_config, repeated

    changed, trust = None, repeated(settings or (), allow or ())
    if settings:
        changed = load_config(run_dir / "config.toml", settings, trust=trust)
    with _graceful() as stop, RunConsole(json_output=json) as console:
        if fork is not None:
            run_dir, changed = runs.fork(run_dir, fork, changed, trust), None
        run = runs.resume(run_dir, changed=changed, trackers=[console], stop=stop, trust=trust)
    console.result(Run(run.path))


@cli.command()
def export(
    run_dir: RunPath,
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder to write.")],
    round_: Annotated[str, typer.Option("--round", help="best, last or a number.")] = "best",
    json: Json = False,
) -> None:
    """Write a round's adapter as PEFT reads it."""
    from fedft.api import Run
    from fedft.console import print_json

    which: Any = int(round_) if re.fullmatch("[0-9]{1,9}", round_) else round_
    if which not in ("best", "last") and not isinstance(which, int):
        raise typer.BadParameter("best, last or a number", param_hint="--round")
    adapter = Run(run_dir).adapter(which)
    target = adapter.save_pretrained(output)
    if json:
        print_json({"round": adapter.round, "path": str(target)})
    else:
        print(f"round {adapter.round} → {target}")
        print(f"load it with PeftModel.from_pretrained(base_model, {str(target)!r})")
        if adapter.tokenizer is not None:
            print("beside it is the tokenizer of the run: give the model its padding token by")
            print("base_model.config.pad_token_id = tokenizer.pad_token_id")


@cli.command()
def plan(
    config: Config,
    settings: Settings = None,
    check: Annotated[
        bool, typer.Option("--check", help="Load the model once and try it on the data.")
    ] = False,
    json: Json = False,
) -> None:
    """Say what a run will cost, without starting anything."""
    from fedft.console import print_json
    from fedft.server import forecast
    from fedft.server.check import check as tried
    from fedft.server.config_file import load_config

    parsed = load_config(config, settings or [])
    cost = forecast.forecast(parsed)
    if check:
        cost["engine"] = vars(tried(parsed))
    if json:
        print_json(cost)
    else:
        print(forecast.as_text(parsed, cost))


@cli.command()
def report(
    run_dirs: Annotated[list[Path], typer.Argument(help="Run directories.", show_default=False)],
    output: Annotated[Path | None, typer.Option("-o", "--output", help="HTML file.")] = None,
    confidence: Confidence = None,
) -> None:
    """Draw one self-contained HTML page of one run, or of several side by side."""
    from fedft.report import write_report

    target = output or run_dirs[0] / "report" / "report.html"
    write_report(run_dirs, target, confidence)
    print(target)


@cli.command()
def init(
    folder: Annotated[
        Path | None, typer.Argument(help="To make; by default called as the example is.")
    ] = None,
    example: Annotated[str, typer.Option(help="Which one; see --list.")] = "quickstart",
    list_: Annotated[bool, typer.Option("--list", help="List the examples.")] = False,
) -> None:
    """Copy an example, to be edited and run."""
    from fedft.init import copy_example, examples

    if list_:
        known = examples()
        width = max(len(one.name) for one in known)
        print("\n".join(f"{one.name:<{width}}  {one.about}" for one in known))
        return
    target = folder or Path(example)
    commands = copy_example(example, target)
    print(f"{example} → {target}. Next:")
    print("\n".join(f"  {command}" for command in commands))


@cli.command()
def doctor(json: Json = False) -> None:
    """Check that this machine can do what fedft needs."""
    from fedft.console import print_json
    from fedft.doctor import as_text, examine

    findings = examine()
    if json:
        print_json([vars(finding) for finding in findings])
    else:
        print(as_text(findings))
    if any(not finding.ok for finding in findings):
        raise SystemExit(3)


@contextmanager
def _graceful() -> Iterator[Any]:
    """A flag that the first SIGINT or SIGTERM sets; the second one ends the process at once.

    Everything committed is safe either way.
    """
    asked: list[int] = []

    def handle(number: int, _: FrameType | None) -> None:
        if asked:  # typer ends the process with 130, without a word
            print("stopped; committed rounds are safe: fedft resume RUN_DIR", file=sys.stderr)
            raise KeyboardInterrupt
        asked.append(number)
        print("\nstopping after what is under way; once more to stop at once", file=sys.stderr)

    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(number, handle) for number in numbers]
    try:
        yield lambda: bool(asked)
    finally:
        for number, handler in zip(numbers, before, strict=True):
            # One that comes late finds the process ending already: it shall do so in good order.
            signal.signal(number, signal.SIG_IGN if asked else handler)


add_commands(cli, _graceful)
add_check(cli)


def main() -> None:
    """Run the command line; expected errors become one message and an exit code."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # whose encoding may lack a sign that is printed
            stream.reconfigure(errors="replace")
    try:
        cli(standalone_mode=True)
    except FedftError as error:
        if _debug:
            raise
        from fedft.console import print_error

        print_error(error)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
