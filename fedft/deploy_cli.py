"""The commands of a deployment: ``serve``, ``join``, those of its clients' register, and ``ca``."""

import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import typer

from fedft import policy_cli as own
from fedft.ca_cli import add_authority

Config = Annotated[Path, typer.Argument(help="TOML file of the run.", show_default=False)]
Json = Annotated[bool, typer.Option("--json", help="One JSON object on standard output.")]
Existing = Annotated[
    Path, typer.Option("--run-dir", help="The run directory of the server.", show_default=False)
]
Name = Annotated[str, typer.Argument(help="Of the client.", show_default=False)]
Ledgers = Annotated[
    Path | None,
    typer.Option(
        "--ledger", help="Folder of this user's privacy ledgers; by default under ~/.local/state."
    ),
]
Graceful = Callable[[], AbstractContextManager[Any]]


def add_commands(cli: typer.Typer, graceful: Graceful) -> None:
    """Mount the commands.

    Args:
        cli: the ``fedft`` command.
        graceful: gives a flag that the first SIGINT or SIGTERM sets.
    """
    add_authority(cli)

    @cli.command()
    def serve(
        config: Config,
        run_dir: Annotated[
            Path | None, typer.Option(help="A new folder, or one whose run goes on.")
        ] = None,
        host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
        port: Annotated[int, typer.Option(help="0 takes the port of before, or a free one.")] = 0,
        public: Annotated[
            str | None, typer.Option(help="Name or address under which clients reach this machine.")
        ] = None,
        insecure: Annotated[bool, typer.Option(help="Without TLS; on loopback only.")] = False,
        ca: Annotated[
            Path | None,
            typer.Option(help="Certificate of an authority elsewhere; see `fedft ca`."),
        ] = None,
        wait_for: Annotated[
            int | None, typer.Option(help="Clients to wait for before the first round.")
        ] = None,
        patience: Annotated[
            float, typer.Option(help="Seconds to wait for enough clients before pausing.")
        ] = 600.0,
        linger: Annotated[
            float, typer.Option(help="Seconds to wait at the end for clients that were away.")
        ] = 60.0,
        status_host: Annotated[
            str, typer.Option(help="Address of the status page; anybody who reaches it reads it.")
        ] = "127.0.0.1",
        status_port: Annotated[
            int, typer.Option(help="Of the status page and the metrics; 0 takes a free one.")
        ] = 0,
        settings: Annotated[
            list[str] | None,
            typer.Option("--set", help="Override a key: training.lr=1e-3", metavar="KEY=VALUE"),
        ] = None,
        json: Json = False,
    ) -> None:
        """Run a federation of real clients; goes on with a run that was left."""
        from fedft.api import Run
        from fedft.console import RunConsole
        from fedft.server import authority, identity
        from fedft.server import serve as server
        from fedft.server.config_file import load_config

        parsed = load_config(config, settings or [])
        address = identity.Address(host, port, public, insecure)
        authority.check_port("--status-port", status_port)
        hosting = server.Hosting(wait_for, patience, linger, status=(status_host, status_port))
        with graceful() as stop, RunConsole(json_output=json, real=True) as console:
            run = server.serve(
                parsed, run_dir, address, ca=ca, hosting=hosting, trackers=[console], stop=stop
            )
        console.result(Run(run.path))

    @cli.command()
    def invite(
        name: Name,
        run_dir: Existing,
        output: Annotated[
            Path | None, typer.Option("-o", "--output", help="Kit file to write.")
        ] = None,
        days: Annotated[float, typer.Option(help="Days until the kit expires.")] = 7.0,
        certificate: Annotated[
            Path | None,
            typer.Option(help="Of the client, where the authority is elsewhere (serve --ca)."),
        ] = None,
    ) -> None:
        """Write a join kit for one client. It works once; send it by a private way."""
        from fedft.server import identity

        if (output is None) == (certificate is None):
            raise typer.BadParameter("one of --output and --certificate", param_hint="--output")
        if certificate is not None:
            client = identity.take_in(run_dir, name, certificate)
            print(f"{client.name} may join, until {client.expires}")
            return
        assert output is not None
        kit = identity.invite(run_dir, name, output, days)
        print(f"{output}: {kit.name} may join {kit.server}, until {kit.expires}")
        print(f"there: fedft join {output.name} --data FILE")

    @cli.command()
    def join(
        kit: Annotated[Path, typer.Argument(help="Join kit.", show_default=False)],
        data: Annotated[
            Path, typer.Option(help="This client's examples; they stay here.", show_default=False)
        ],
        rank: Annotated[int | None, typer.Option(help="LoRA rank to train.")] = None,
        memory: Annotated[float | None, typer.Option(help="MiB to grant to training.")] = None,
        device: Annotated[str, typer.Option(help="cpu, cuda, …")] = "cpu",
        precision: Annotated[
            str | None, typer.Option(help="Of the frozen model here: fp32, bf16 or tf32.")
        ] = None,
        threads: Annotated[int | None, typer.Option(help="Threads to train with.")] = None,
        model: Annotated[
            str | None, typer.Option(help="The base model: a folder here, or an id of a hub.")
        ] = None,
        trust_remote_code: Annotated[
            bool, typer.Option(help="Let the base model bring code of its own.")
        ] = False,
        site_dir: Annotated[
            Path | None, typer.Option(help="This client's own folder: key, kept parts.")
        ] = None,
        ledger: Ledgers = None,
        give_up: Annotated[
            float, typer.Option(help="Seconds without a server after which to end.")
        ] = 86_400.0,
        text: own.Text = "text",
        label: own.Label = "label",
        prompt: own.Prompt = "prompt",
        answer: own.Answer = "answer",
        image: own.Image = "image",
        column: own.Columns = None,
        format: own.Format = "auto",
        map_label: own.MapLabel = None,
        max_rows: own.MaxRows = None,
        skip_bad: own.SkipBad = False,
        check: own.Check = False,
        send_details: own.SendDetails = False,
        policy: own.PolicyFile = None,
        least_noise: own.LeastNoise = None,
        most_epsilon: own.MostEpsilon = None,
        delta: own.Delta = None,
        most_rounds: own.MostRounds = None,
        most_epochs: own.MostEpochs = None,
        most_steps: own.MostSteps = None,
        most_seconds: own.MostSeconds = None,
        most_batch_size: own.MostBatchSize = None,
        least_clients: own.LeastClients = None,
        model_sha256: own.ModelHash = None,
        task: own.Task = None,
        trainer: own.Trainer = None,
        metrics: own.Metrics = None,
    ) -> None:
        """Take part in a federation with data of one's own, until it is over."""
        from fedft.clients import join as joining
        from fedft.clients.own import Own, mapping
        from fedft.clients.policy import Policy
        from fedft.clients.work import Timing
        from fedft.clients.worker import Site, checked_precision
        from fedft.console import safe
        from fedft.core.plugins import REMOTE, trust_process

        def tell(text: str) -> None:
            typer.echo(f"{datetime.now(UTC):%H:%M:%S} {safe(text)}", err=True)

        conditions = {
            "least_noise": least_noise,
            "most_epsilon": most_epsilon,
            "delta": delta,
            "most_rounds": most_rounds,
            "most_epochs": most_epochs,
            "most_steps": most_steps,
            "most_seconds": most_seconds,
            "most_batch_size": most_batch_size,
            "least_clients": least_clients,
            "models": model_sha256 or None,
            "tasks": task or None,
            "trainers": trainer or None,
            "metrics": metrics,
        }
        site = Site(
            data,
            rank,
            memory,
            device,
            threads,
            model,
            trust_remote_code,
            ledger,
            precision=checked_precision(precision),
            own=Own(
                *(text, label, prompt, answer, image),
                relabel=mapping(map_label),
                most_rows=max_rows,
                skip_bad=skip_bad,
                columns=mapping(column, "--column", "KEY=NAME"),
                format=format,
            ),
            policy=Policy.read(policy, conditions),
            send_details=send_details,
        )
        trust_process(REMOTE)  # from here on it is the server that names things
        tell("loading the libraries is done; connecting …")
        try:
            with graceful() as stop:
                last = joining.join(
                    kit,
                    site,
                    folder=site_dir,
                    tell=tell,
                    stop=stop,
                    timing=Timing(give_up=give_up),
                    check=check,
                )
        except KeyboardInterrupt:
            os._exit(130)  # a second signal: not even the training in hand is waited for
        tell(last)

    @cli.command("ledger")
    def print_ledger(
        ledger: Ledgers = None,
        delta: Annotated[
            float, typer.Option(help="δ to account at.", min=1e-300, max=0.999)
        ] = 1e-5,
        json: Json = False,
    ) -> None:
        """What this user's clients have given away about each data set, over all runs."""
        from fedft.clients.ledger import ADJACENCY, default_folder, ledgers
        from fedft.console import print_json, safe
        from fedft.core.record.jsonl import plain

        folder = ledger or default_folder()
        found = [(one, one.account()) for one in ledgers(folder)]
        if json:
            lines = [
                {
                    "data": one.name,
                    "path": str(one.path),
                    "epsilon": account.epsilon(delta),  # null is ∞
                    "delta": delta,
                    "adjacency": ADJACENCY,
                    "results": account.results,
                    "unprotected": account.unprotected,
                    "torn": account.torn,
                    "runs": sorted(account.runs),
                    "last": account.last,
                }
                for one, account in found
            ]
            print_json(plain(lines))
            return
        for one, account in found:
            print(f"data {one.name}: {account.text(delta)}; {ADJACENCY}")
            print(f"  runs: {safe(', '.join(sorted(account.runs)))}; last {safe(account.last)}")
            print(f"  {one.path}")
        if not found:
            print(f"nothing is entered in {folder}")

    @cli.command()
    def clients(run_dir: Existing, json: Json = False) -> None:
        """List who was invited, has joined, or was revoked."""
        from rich.console import Console
        from rich.table import Table

        from fedft.console import print_json, safe
        from fedft.core.record.rundir import RunDir
        from fedft.server import identity

        run = RunDir.open(run_dir)
        registered = sorted(
            identity.Registry(identity.folder_of(run.path)).clients().values(),
            key=lambda client: client.name,
        )
        if json:
            print_json([{**asdict(client), "state": client.state} for client in registered])
            return
        table = Table("client", "state", "examples", "rank", "MiB", "since", "expires", "why")
        for c in registered:
            since = (c.revoked or c.dismissed or c.joined or c.invited)[:16].replace("T", " ")
            numbers = (c.examples, c.rank or "", c.memory_mib or "")
            cells = (c.name, c.state, *numbers, since, c.expires[:10], c.why)
            table.add_row(*(safe(cell) for cell in cells))
        Console(highlight=False, emoji=False).print(table)

    @cli.command()
    def revoke(
        name: Name,
        run_dir: Existing,
        why: Annotated[str, typer.Option(help="For the record, and for the client.")] = "",
    ) -> None:
        """Shut a client out for good; a running server cuts its stream at once."""
        from fedft.server import identity

        identity.revoke(run_dir, name, why or "by the operator")
        print(f"{name} is revoked")
