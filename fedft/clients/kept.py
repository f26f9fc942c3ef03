"""The parts of a site's adapter that never leave it, on its disk."""

from dataclasses import dataclass
from pathlib import Path

from flwr.app import RecordDict

from fedft.core.files import Files, disk, place
from fedft.core.link.framing import Ticket
from fedft.core.record.rundir import child
from fedft.core.wire import codec

_VERSIONS = 3
"""Rounds of which the kept parts stay on disk: the server may go back to an older checkpoint."""


@dataclass(frozen=True)
class KeptParts:
    """A site's own parts on disk: one file a round, so that a round can be done again.

    A server that dies in round n asks for round n again, and the site must then start from what
    it had before: the newest version of an *earlier* round.

    Args:
        folder: made when it is needed.
    """

    folder: Path

    def before(self, ticket: Ticket) -> RecordDict:
        """The state to work on: of earlier rounds for training, up to the round's for judging."""
        last = ticket.round if ticket.kind == "evaluate" else ticket.round - 1
        rounds = [r for r in self._rounds(ticket.run) if r <= last]
        if not rounds:
            return RecordDict()
        from safetensors.torch import load_file

        tensors = load_file(self._file(ticket.run, rounds[-1]))
        return RecordDict({codec.KEPT: codec.arrays_from(tensors)})

    def store(self, ticket: Ticket, state: RecordDict) -> None:
        """Keep what a round of training left; on disk before its result is sent."""
        record = state.array_records.get(codec.KEPT)
        if ticket.kind != "train" or record is None:
            return
        from safetensors.torch import save

        path = self._file(ticket.run, ticket.round)
        with disk(f"create {path.parent}"):
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        place(Files(), path, save(codec.tensors_from(record)))
        with disk(f"write {path}"):
            Files().sync_folder(path.parent)

    def judged(self, ticket: Ticket, *, counted: bool) -> None:
        """Forget what a round left that did not count, and what is too old to be asked for."""
        if ticket.kind != "train":
            return
        if not counted:
            self._file(ticket.run, ticket.round).unlink(missing_ok=True)
        for round_ in self._rounds(ticket.run)[:-_VERSIONS]:
            self._file(ticket.run, round_).unlink(missing_ok=True)

    def _rounds(self, run: str) -> list[int]:
        return sorted(int(f.stem[6:]) for f in child(self.folder, run).glob("round-*.safetensors"))

    def _file(self, run: str, round_: int) -> Path:
        return child(self.folder, run) / f"round-{round_:08d}.safetensors"
