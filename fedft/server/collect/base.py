"""What stands between clients' replies and the aggregation rule."""

from typing import ClassVar, Literal, Protocol

from fedft.server.exchange import Sent
from fedft.server.federation import Federation, Ledger
from fedft.server.replies import Intake


class Collector(Protocol):
    """Takes in what a cohort answers.

    Attributes:
        sees: what the server learns of the replies: ``each``, or their ``sum`` alone. A rule, a meter
            or a guard that needs more than that cannot be used with it.
    """

    sees: ClassVar[Literal["each", "sum"]]

    def collect(self, federation: Federation, sent: Sent, ledger: Ledger) -> Intake:
        """Wait for a cohort that was sent its plans, in as many exchanges of messages as it takes.

        Args:
            federation: of which clients.
            sent: the cohort.
            ledger: of the round; who gave no usable reply is noted there, with the reason.

        Returns:
            What the rule and the meters read; its length is the number of usable replies.

        Raises:
            Interrupted: ``federation.stop`` said so.
        """
        ...
