"""The commands of an authority that is kept apart from the server: ``fedft ca …``."""

from pathlib import Path
from typing import Annotated

import typer

Authority = Annotated[Path, typer.Argument(help="Folder of the authority.", show_default=False)]
Name = Annotated[str, typer.Argument(help="Of the client.", show_default=False)]
Output = Annotated[Path, typer.Option("-o", "--output", help="File to write.", show_default=False)]


def add_authority(cli: typer.Typer) -> None:
    """Mount the commands as ``ca``.

    Args:
        cli: the ``fedft`` command.
    """
    ca = typer.Typer(
        name="ca",
        help="A certificate authority that no server holds the key of.",
        no_args_is_help=True,
        add_completion=False,
    )
    cli.add_typer(ca)

    @ca.command()
    def init(authority: Authority) -> None:
        """Make an authority in a new folder. Keep its key offline."""
        from fedft.server import ca

        certificate = ca.init(authority)
        print(f"{certificate}: give it to the server: fedft serve CONFIG --ca {certificate.name}")
        print(f"{authority / 'ca.key'}: the key that signs; keep it here, and a copy locked away")

    @ca.command()
    def request(
        name: Name,
        output: Output,
        site_dir: Annotated[
            Path | None, typer.Option(help="This client's own folder, for the key.")
        ] = None,
    ) -> None:
        """At a client: draw its key, and write the request to certify it."""
        from fedft.clients.request import request as make

        made = make(name, output, site_dir)
        print(f"{made.path}: send it to whoever keeps the authority; nothing in it is secret")
        print(f"tell them by another way that its fingerprint is {made.fingerprint}")
        print(f"the key is in {made.folder}: fedft join KIT --data FILE --site-dir {made.folder}")

    @ca.command()
    def sign(
        authority: Authority,
        request_file: Annotated[
            Path, typer.Argument(metavar="REQUEST", help="Its request.", show_default=False)
        ],
        server: Annotated[bool, typer.Option(help="It is a server, not a client.")] = False,
        days: Annotated[
            float | None, typer.Option(help="That the certificate lasts; a year without.")
        ] = None,
        fingerprint: Annotated[
            str | None, typer.Option(help="Of its key, as its owner says it.")
        ] = None,
        replace: Annotated[
            bool, typer.Option(help="The client lost its key, and has a new one.")
        ] = False,
    ) -> None:
        """Sign the request of a client, or of a server."""
        from fedft.server import ca

        made = ca.sign(
            authority,
            request_file,
            server=server,
            days=days,
            fingerprint=fingerprint,
            replace=replace,
        )
        print(f"{made.path}: {made.who}, until {made.until}")
        print(f"the key's fingerprint is {made.fingerprint}")
        if server:
            print("copy it to identity/server.pem in the server's run directory")
        else:
            print(f"at the server: fedft invite {made.who} --certificate {made.path.name}")

    @ca.command()
    def roster(
        authority: Authority,
        output: Output,
        names: Annotated[
            list[str] | None, typer.Argument(help="Clients; all that were signed without.")
        ] = None,
    ) -> None:
        """Sign the list of the clients' public keys, for kits that pin them."""
        from fedft.server import ca

        made = ca.roster(authority, names or [], output)
        print(f"{output}: the keys of {len(made.keys)} clients: {', '.join(made.keys)}")

    @ca.command()
    def kit(
        authority: Authority,
        name: Name,
        server: Annotated[
            str, typer.Option(help="HOST:PORT, as the server prints it.", show_default=False)
        ],
        output: Output,
        roster_file: Annotated[
            Path | None, typer.Option("--roster", help="The clients' keys, to be pinned.")
        ] = None,
    ) -> None:
        """Write a join kit for a client that was signed. Nothing in it is secret."""
        from fedft.server import ca

        made = ca.kit(authority, name, server, output, roster_file)
        print(f"{output}: {made.name} may join {made.server}, until {made.expires}")
        print(f"there: fedft join {output.name} --data FILE")
