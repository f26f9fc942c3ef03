"""``fedft check-plugin``: the laws of every kind, over what somebody else's package adds."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from fedft.conformance.laws import Finding

Package = Annotated[
    str,
    typer.Argument(
        help="An installed package, or one class as package.module:Class.", show_default=False
    ),
]
Json = Annotated[bool, typer.Option("--json", help="One JSON object on standard output.")]


def add_check(cli: typer.Typer) -> None:
    """Mount the command.

    Args:
        cli: the ``fedft`` command.
    """

    @cli.command("check-plugin")
    def check_plugin(package: Package, json: Json = False) -> None:
        """Hold everything that a package adds to fedft to the laws of its kind. Runs its code."""
        from fedft import conformance
        from fedft.console import print_json

        findings = list(conformance.check(package))
        if json:
            print_json([vars(finding) for finding in findings])
        else:
            _show(findings)
        if any(finding.outcome == "broken" for finding in findings):
            raise SystemExit(1)


def _show(findings: "Sequence[Finding]") -> None:
    """A table a member, and one line in the end."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from fedft.console import clean, safe

    console = Console(highlight=False, emoji=False)
    styles = {"held": "green", "broken": "bold red", "not asked": "dim"}
    for member in dict.fromkeys((finding.kind, finding.name) for finding in findings):
        table = Table(
            "law", "outcome", title=safe(f"{member[1]} ({member[0]})"), title_justify="left"
        )
        for finding in findings:
            if (finding.kind, finding.name) == member:
                said = Text(finding.outcome, style=styles[finding.outcome])
                table.add_row(safe(finding.law), said)
                if finding.why:
                    table.add_row(Text(f"  {clean(finding.why)}", style="red"), "")
        console.print(table)
    broken = sum(finding.outcome == "broken" for finding in findings)
    held = sum(finding.outcome == "held" for finding in findings)
    console.print(f"{held} held, {broken} broken")
