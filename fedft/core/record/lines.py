"""What a run writes down, line by line: the only place that spells the keys.

Everything that writes a line makes one of these types, and everything that reads one reads it as
such, so that the type checker finds a key that nobody writes. A key that is not required stands
where its docstring says. ``docs/run-directory.md`` lists them all; a test compares the two.

Lines may hold further keys: of meters, client methods and tasks that are not this project's, and
of later versions. :func:`with_figures` and :func:`with_reported` are how they get in; neither can
take the place of a key that is declared here for something else.
"""

from collections.abc import Mapping, Sequence
from typing import Literal, NotRequired, TypedDict, cast

from fedft.core.record.figures import Figures

Scores = dict[str, float]
"""Metric → value, of one evaluation: ``loss``, and what the task names beside it."""

Kind = Literal["train", "eval", "compare"]
"""What a client was asked for."""


# ── rounds.jsonl ──────────────────────────────────────────────────────────────────────────────


class Training(TypedDict):
    """How the clients of a round trained.

    Attributes:
        loss: mean training loss, weighted by examples; None where nobody reported one.
    """

    loss: float | None


class Traffic(TypedDict):
    """Bytes of tensors, of all clients together; no headers.

    Attributes:
        up: from the clients.
        down: to them.
    """

    up: int
    down: int


class Staleness(TypedDict):
    """How old the replies were, in server updates.

    Attributes:
        mean: over the replies.
        max: over the replies.
    """

    mean: float
    max: int


class Clock(TypedDict):
    """Simulated time.

    Attributes:
        seconds: of the round.
        elapsed: seconds since the beginning of the run.
        device_seconds: of all clients asked, summed.
    """

    seconds: float
    elapsed: float
    device_seconds: float


class Spent(TypedDict):
    """What a run has spent of one unit's privacy so far. None stands for what is not known.

    Attributes:
        epsilon: ε of all releases; None where it has no bound.
        delta: δ.
        noise_multiplier: the smallest of the releases.
        sampling: how clients or examples were drawn.
        adjacency: which data count as neighbours.
        sampling_rate: q, of clients in a round; for unit ``site``.
        releases: how many; for unit ``site``.
        median: ε of the client in the middle; for unit ``example``.
        sites: how many clients took part; for unit ``example``.
    """

    epsilon: float | None
    delta: float | None
    noise_multiplier: float | None
    sampling: str
    adjacency: str
    sampling_rate: NotRequired[float]
    releases: NotRequired[int]
    median: NotRequired[float | None]
    sites: NotRequired[int]


class Promise(TypedDict, total=False):
    """What is spent, by whom it protects.

    Attributes:
        site: whole clients.
        example: single examples.
    """

    site: Spent
    example: Spent


class Facts(TypedDict, total=False):
    """How a round went.

    Attributes:
        attempts: cohorts asked until one met the quorum; synchronous rules.
        staleness: asynchronous rules.
    """

    attempts: int
    staleness: Staleness


class Accounts(TypedDict, total=False):
    """What a round cost beside bytes and seconds.

    Attributes:
        privacy: spent so far; at evaluations of a private run.
        clock: under a fleet's simulated clock.
    """

    privacy: Promise
    clock: Clock


class ByClass(TypedDict):
    """Items of the test set by class, in the order of ``classes`` in ``environment.json``.

    Attributes:
        hits: of the class, and taken for it.
        support: of the class.
        predicted: taken for it.
        confusion: right class → predicted class → items; of up to 128 classes.
    """

    hits: list[int]
    support: list[int]
    predicted: list[int]
    confusion: NotRequired[list[list[int]]]


class Evaluated(TypedDict, total=False):
    """Scores of a round's model, where an evaluation was due.

    Attributes:
        start: of the model before the first round, on the central test set; in the line of round 1,
            with ``[evaluation] before``.
        eval: of the global model on the central test set; null where a score is not defined.
        by_class: the same, item by class; with ``[evaluation] per-class``.
        submodels: the same of submodels, by the number of their blocks; layer-pruned clients.
        sites: means over the clients, each judging its own model on its own held-out examples, and
            their number ``n``; with ``[data] holdout``.
    """

    start: Scores
    eval: Scores
    by_class: ByClass
    submodels: dict[str, Scores]
    sites: Scores


class RoundLine(Facts, Figures, Accounts, Evaluated):
    """One line of ``rounds.jsonl``: one committed round.

    Attributes:
        round: 1, 2, …
        cohort: names of the clients that were asked.
        failures: reason → clients without a usable reply.
        train: how they trained.
        bytes: on the wire.
        seconds: of the server's time, by phase: ``plan``, ``compare``, ``train``, ``aggregate``,
            ``evaluate``, ``commit``.
    """

    round: int
    cohort: list[str]
    failures: dict[str, list[str]]
    train: Training
    bytes: Traffic
    seconds: dict[str, float]


def with_figures(line: RoundLine, figures: Mapping[str, object]) -> RoundLine:
    """The line with what meters say, each under its key.

    Raises:
        ValueError: a meter has the key of something else in the line.
    """
    if (
        taken := (RoundLine.__annotations__.keys() - Figures.__annotations__.keys())
        & figures.keys()
    ):
        raise ValueError(f"a meter cannot have the key {min(taken)!r}: the line has it already")
    return cast(RoundLine, {**line, **figures})


# ── clients.jsonl ─────────────────────────────────────────────────────────────────────────────


class Timed(TypedDict, total=False):
    """What a line says of a device's time.

    Attributes:
        device_seconds: of the client's device, under a fleet's simulated clock.
    """

    device_seconds: float


class Reported(TypedDict, total=False):
    """What a client says itself; nobody vouches for it. It may say more, under keys of its own.

    Attributes:
        loss: mean of the batch losses weighted by examples, or of the model that it judges.
        accuracy: of the model that it judges; where the task has it.
        perplexity: of the model that it judges; where the task has it.
        steps: of the optimiser.
        seconds: of training, on its own clock.
        grad_A_norm: norm of the gradient of all A on the first batch, before clipping.
        grad_B_norm: norm of the gradient of all B on the first batch, before clipping.
        precision_bits: of the numbers it trained in; real clients.
    """

    loss: float
    accuracy: float
    perplexity: float
    steps: float
    seconds: float
    grad_A_norm: float
    grad_B_norm: float
    precision_bits: float


class ClientLine(Timed, Reported):
    """One line of ``clients.jsonl``: one reply, or why there was none.

    Attributes:
        kind: what it was asked for: ``train``, ``eval`` or ``compare``.
        round: that commits the line.
        site: name of the client.
        status: ``ok``, or the reason of the failure in a word; absent from ``eval`` lines.
        reason: of a failure, in words.
        code: of an error reply.
        examples: that it trained or was scored on.
        rank: of its adapter.
        bytes_up: of its reply's tensors.
        staleness: server updates since the version it started from; asynchronous rules.
        epsilon: ε of its own examples so far; with ``[training] dp``.
    """

    kind: Kind
    round: int
    site: str
    status: NotRequired[str]
    reason: NotRequired[str]
    code: NotRequired[int]
    examples: NotRequired[int]
    rank: NotRequired[int]
    bytes_up: NotRequired[int]
    staleness: NotRequired[int]
    epsilon: NotRequired[float | None]


_SERVERS = ClientLine.__annotations__.keys() - Reported.__annotations__.keys()
"""Keys of a client's line that are the server's to write."""


def with_reported(line: ClientLine, values: Mapping[str, float]) -> ClientLine:
    """The line with what its client reported, which never takes the place of what the server says."""
    kept = {key: value for key, value in values.items() if key not in _SERVERS}
    return cast(ClientLine, {**line, **kept})


# ── the other files ───────────────────────────────────────────────────────────────────────────


class Release(TypedDict):
    """One line of ``privacy.jsonl``: one attempt at a round.

    Attributes:
        round: that was attempted.
        site: noise multiplier z and sampling rate q of the Gaussian mechanism over whole clients.
        example: client → noise multiplier z, sampling rate q and number of its DP-SGD steps.
    """

    round: int
    site: NotRequired[Sequence[float]]
    example: NotRequired[dict[str, Sequence[float]]]


class Verified(TypedDict):
    """How the exported adapter compares with the run in stock PEFT.

    Attributes:
        rows: of the test set that were scored in both.
        difference: the largest of mean losses, relative to 1 + loss.
    """

    rows: int
    difference: float


class Summary(TypedDict):
    """``summary.json``: what a finished run came to.

    Attributes:
        status: ``finished``, or ``stopped early`` by ``[rounds] patience``.
        rounds: committed.
        final: scores of the newest evaluation.
        best: scores of the best one, with its ``round``.
        bytes: on the wire, of all rounds.
        seconds: spent in rounds.
        adapter_sha256: digest of the global adapter and base delta.
        history_sha256: digest over the states of all rounds; runs before it came have none.
        verified: None where it was not asked; runs before it came have none.
        privacy: what is spent; of a private run.
    """

    status: str
    rounds: int
    final: Scores | None
    best: Scores | None
    bytes: Traffic
    seconds: float
    adapter_sha256: str
    history_sha256: NotRequired[str]
    verified: NotRequired[Verified | None]
    privacy: NotRequired[Promise]
