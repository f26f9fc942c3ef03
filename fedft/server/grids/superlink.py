"""Flower's own grid, as the rounds want it: in its simulation, or behind a SuperLink.

A site is a SuperNode whose node config has its ``partition-id``. Flower draws node ids at random,
so each node is asked who it is before the first round, and messages are addressed anew. Flower
serves every message alone, keeps the states of the sites on its side, and says nothing when a
reply arrives: replies are polled for.
"""

import time
from collections.abc import Iterable, Mapping, Sequence

from flwr.app import Message, MessageType, RecordDict
from flwr.serverapp import Grid

from fedft.core.errors import ConfigError, EnvironmentFailure
from fedft.server.grids.flower import NODE_UNAVAILABLE
from fedft.server.grids.serve import error_reply

REGISTRATION_S = 30.0
"""Within this time all SuperNodes must be registered."""

IDENTITY_S = 300.0
"""Within this time all of them must have said which site they are: Ray may have to start first."""

PAUSE_S = 0.2
"""Between two looks for replies."""


class SuperLinkGrid:
    """Takes the place of a :class:`~fedft.server.grids.base.JobGrid` in a run.

    Node ids of its caller are 1 … ``sites``: index of the site + 1.

    Args:
        grid: as Flower hands it to a ``ServerApp``.
        sites: how many there are; nodes with a larger partition id are left alone.
        registration_s: how long to wait for all nodes, in seconds.
        identity_s: how long to wait for them to say who they are, in seconds.

    Raises:
        EnvironmentFailure: too few nodes in time, or one that cannot say who it is.
        ConfigError: two nodes say they are the same site, or a site is missing.
    """

    def __init__(
        self,
        grid: Grid,
        sites: int,
        *,
        registration_s: float = REGISTRATION_S,
        identity_s: float = IDENTITY_S,
    ) -> None:
        self._grid = grid
        self._ready: dict[str, Message] = {}  # by the id of what they reply to
        self._given_up: set[str] = set()
        nodes = _registered(grid, sites, registration_s)
        self._nodes = self._by_site(nodes, sites, identity_s)

    def push_jobs(self, jobs: Iterable[Sequence[Message]]) -> list[str]:
        """Sends each message of each cohort on its own.

        A message that Flower does not take is answered with an error here.
        """
        return [self._push(self._addressed(message)) for job in jobs for message in job]

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        """The replies that are there, each once."""
        wanted = set(message_ids)
        self._fetch(wanted)
        return [self._ready.pop(id_) for id_ in wanted & self._ready.keys()]

    def wait(self, message_ids: Iterable[str], timeout: float | None = None) -> bool:
        """Blocks until there is a reply, or the time, in seconds, is over (False)."""
        wanted = set(message_ids)
        closes = time.monotonic() + (timeout if timeout is not None else float("inf"))
        while True:
            self._fetch(wanted)
            if wanted & self._ready.keys():
                return True
            left = closes - time.monotonic()
            if left <= 0:
                return False
            time.sleep(min(PAUSE_S, left))

    def cancel(self, message_ids: Iterable[str]) -> None:
        """Gives up on messages. Flower cannot recall them; late replies are taken and dropped."""
        ids = set(message_ids)
        self._given_up |= ids - self._ready.keys()
        for id_ in ids:
            self._ready.pop(id_, None)

    def refuse(self, message_id: str, reason: str) -> None:
        """Nothing to do: Flower's nodes keep no result to be told about."""

    def touched_states(self) -> dict[int, RecordDict | None]:
        """None: Flower keeps what its nodes leave behind."""
        return {}

    def states_committed(self, nodes: Iterable[int]) -> None:
        """Nothing to do: no state is handed out."""

    def load_states(self, states: Mapping[int, RecordDict]) -> None:
        """Flower starts the nodes of each of its runs anew.

        Raises:
            EnvironmentFailure: there are states, which cannot be put into Flower's nodes.
        """
        if states:
            raise EnvironmentFailure("states of clients cannot be put into Flower's nodes")

    def _addressed(self, message: Message) -> Message:
        about = message.metadata
        node = self._nodes[about.dst_node_id - 1]
        return Message(message.content, node, about.message_type, group_id=about.group_id)

    def _push(self, message: Message) -> str:
        # Alone, because Flower's grids differ in how a list says which message was not taken:
        # a shorter list, None in its place, or nothing at all.
        pushed = [id_ for id_ in self._grid.push_messages([message]) if id_]
        if pushed:
            return pushed[0]
        node = message.metadata.dst_node_id
        reply = error_reply(message, NODE_UNAVAILABLE, f"Flower took no message to node {node}")
        self._ready[message.metadata.message_id] = reply
        return message.metadata.message_id

    def _fetch(self, wanted: set[str]) -> None:
        missing = (wanted - self._ready.keys()) | self._given_up
        for reply in self._grid.pull_messages(missing) if missing else ():
            id_ = reply.metadata.reply_to_message_id
            if id_ in self._given_up:
                self._given_up.discard(id_)
            else:
                self._ready[id_] = reply

    def _by_site(self, nodes: Sequence[int], sites: int, seconds: float) -> list[int]:
        """Asks the nodes who they are; node ids in the order of the sites."""
        asked = {self._push(Message(RecordDict(), node, MessageType.QUERY)): node for node in nodes}
        known: dict[int, int] = {}
        closes = time.monotonic() + seconds
        while asked and self.wait(asked, closes - time.monotonic()):
            for reply in self.pull_messages(asked):
                node = asked.pop(reply.metadata.reply_to_message_id)
                index = _index(reply, node)
                if index in known:
                    raise ConfigError(
                        f"SuperNodes {known[index]} and {node} both have partition-id {index}",
                        fix="Start each SuperNode with a partition-id of its own.",
                    )
                known[index] = node
        if asked:
            raise EnvironmentFailure(
                f"{len(asked)} of {len(nodes)} SuperNodes did not say which client they are "
                f"within {seconds:.0f} s",
                fix="Look into the log of the SuperLink, or of the SuperNodes.",
            )
        missing = [index for index in range(sites) if index not in known]
        if missing:
            raise ConfigError(
                f"no SuperNode has partition-id {missing[0]}; {sites} clients need 0 to {sites - 1}",
                fix="Start the missing SuperNodes.",
            )
        return [known[index] for index in range(sites)]


def _registered(grid: Grid, sites: int, seconds: float) -> list[int]:
    closes = time.monotonic() + seconds
    while len(nodes := list(grid.get_node_ids())) < sites:
        if time.monotonic() >= closes:
            raise EnvironmentFailure(
                f"{len(nodes)} SuperNodes are registered, and [fleet] clients = {sites}",
                fix=f"In a simulation: flwr run . --federation-config 'num-supernodes={sites}'. "
                "In a deployment: start one SuperNode for each client.",
            )
        time.sleep(PAUSE_S)
    return nodes


def _index(reply: Message, node: int) -> int:
    if reply.has_error():
        raise EnvironmentFailure(
            f"SuperNode {node} cannot say which client it is: {reply.error.reason}",
            fix="Install fedft there, and start it with "
            "--node-config 'partition-id=I num-partitions=N'.",
        )
    return int(reply.content.config_records["config"]["index"])  # pyright: ignore[reportArgumentType]
