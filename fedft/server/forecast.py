"""What a run will cost, worked out from its configuration before anything runs.

Shapes come from the model's configuration; no weight is loaded and no worker is started.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

from fedft.core import model_folder, models
from fedft.core.data import partition
from fedft.core.data.packing import best_fit
from fedft.core.data.source import Data
from fedft.core.memory import MIB, Footprint, framework_bytes
from fedft.core.privacy import WORDS
from fedft.core.sublayers import Layer
from fedft.core.tasks import task_of
from fedft.core.types import Part, ServerState, Site
from fedft.core.wire import codec
from fedft.server import starting
from fedft.server.config import RunConfig
from fedft.server.deadline import Pace, pace_of
from fedft.server.inputs import check_rank, check_training, data_of, remarks
from fedft.server.local import TRAINS, forecast_training, training_lines
from fedft.server.privacy import forecast_privacy, promises
from fedft.server.pruning import granularity, narrowed, pruning_of, site_footprint
from fedft.server.resolve import resolved
from fedft.server.traffic import counted, shares, varies
from fedft.strategies.beside import check_beside
from fedft.strategies.blame import blamed


def forecast(config: RunConfig) -> dict[str, Any]:
    """Trainable parameters, bytes a round and memory a client.

    Returns:
        JSON data: ``parameters`` {base, trainable, share}, ``bytes_per_round`` {up, down} of the
        first round, on average over the ranks of the fleet where they are mixed, ``bytes`` the same
        of all rounds, None where later rounds send other numbers than the first (the base change of
        some rules grows), ``clients`` a list with one entry
        a rank, and a number of blocks (or sublayers) that sites hold: its share of bytes, of as
        many from the first on, its peak memory by part, and the total with gradient
        checkpointing and without, in MiB above ``framework_mib``, which this process takes without
        a model (None where it cannot be measured); no memory where the model's architecture is not
        known; ``data`` {train, test, classes, per_class, skipped, notes}, which are read and encoded as the run
        would, and ``cut`` {train, test}, how many rows of each are longer than ``data.max-length``;
        ``deadline``, when a round of real clients closes, see :mod:`fedft.server.deadline`;
        ``training``, see :func:`fedft.server.local.forecast_training`;
        ``positions`` that the model has, None where it names no limit; ``privacy`` where the run
        promises any, see
        :func:`fedft.server.privacy.forecast_privacy`; ``packing`` {clients, rows, sequences, steps, full},
        what an epoch of so many clients comes to, where rows are packed.

    Raises:
        FedftError: the run could not be started either, for example for want of memory.
    """
    config = resolved(config)
    folder = models.resolve(config.model)
    data = data_of(config, models.input_encoder(config.model, folder))
    shapes = models.schema(config.model, config.lora, len(data.classes))
    check_rank(config, shapes)
    check_training(config, data, shapes)
    if config.lora.start is not None:
        starting.read(config, shapes, Path(config.lora.start))
    initial = models.initial_adapter(shapes, config.lora, config.rank, config.seed)
    rule = config.rule(len(data.classes))
    with blamed(rule, "starting"):
        state = rule.init(initial)
    if config.lora.init != "default":  # of the shapes of what was taken out of the base
        state = replace(state, delta=initial.factors)
    ranks = shares(config)
    geometry = models.geometry(config.model, folder)
    pruning, _ = pruning_of(config, shapes, geometry)
    parts = [] if pruning is None else [pruning.named(range(k)) for k in pruning.sizes]

    def needs(rank: int) -> tuple[Footprint, Footprint] | None:
        if geometry is None:
            return None
        plain, small = (
            site_footprint(config, shapes, geometry, rank, checkpointing=checkpointing)
            for checkpointing in (False, True)
        )
        return plain, small

    clients = [
        _client(config, needs(rank), state, rank, layers)
        for rank in ranks
        for layers in (*parts, None)
    ]
    mean = {
        way: count * sum(ranks[c["rank"]] * c["bytes"][way] for c in clients) / (len(parts) + 1)
        for way, count in counted(config).items()
    }
    alike = not varies(config, initial, state.delta)
    trainable = max(c["trainable"] for c in clients)
    pace = pace_of(config, shapes, geometry)
    framework = framework_bytes()
    return {
        "parameters": {
            "base": shapes.parameters,
            "trainable": trainable,
            "share": trainable / (shapes.parameters + trainable),
        },
        "bytes_per_round": {way: round(value) for way, value in mean.items()},
        "rounds": config.rounds.count,
        "bytes": {way: round(value * config.rounds.count) for way, value in mean.items()}
        if alike
        else None,
        "clients": clients,
        "framework_mib": None if framework is None else framework / MIB,
        "deadline": {
            "given_s": config.rounds.deadline_s,
            "least_s": pace.least_s,
            "example_s": pace.example_s,
            "bytes_per_s": pace.bytes_per_s,
        },
        "positions": models.positions(model_folder.check(folder)),
        "cohort": config.engine.cohort,
        **({} if config.training.trainer is None else {"trainer": config.training.trainer}),
        "precision": config.engine.precision,
        "data": {
            "train": len(data.train),
            "test": len(data.test),
            "classes": list(data.classes),
            "per_class": list(data.per_class),
            "skipped": dict(data.skipped),
            "cut": dict(data.cut),
            "notes": remarks(config, data),
        },
        "training": forecast_training(config, len(data.train)),
        **_packing(config, data),
        **_privacy(config, len(data.train)),
    }


_PACKED_CLIENTS = 1000
"""Clients whose rows are packed for a forecast, at most; larger fleets are taken to be alike."""


def _packing(config: RunConfig, data: Data) -> dict[str, Any]:
    """How many sequences the clients' rows come to, where they are packed."""
    if not config.data.packing:
        return {}
    manifest = partition.divided(config.data.partition, data, config.fleet.clients, config.seed)
    lengths, capacity = data.train.lengths, config.data.max_length
    looked = range(min(len(manifest), _PACKED_CLIENTS))
    own = [
        lengths[partition.split_holdout(rows, config.data.holdout, config.seed, name)[0]]
        for k in looked
        for rows, name in [(manifest.rows_of(k), manifest.name_of(k))]
    ]
    bins = [len(best_fit(some, capacity)) for some in own]
    size = config.training.batch_size
    return {
        "packing": {
            "clients": len(own),
            "rows": sum(map(len, own)),
            "sequences": sum(bins),
            "steps": sum(-(-some // size) for some in bins),
            "full": sum(int(some.sum()) for some in own) / max(1, sum(bins) * capacity),
        }
    }


def _privacy(config: RunConfig, examples: int) -> dict[str, Any]:
    """What the run will spend on this many examples in all, where it promises privacy."""
    return {"privacy": forecast_privacy(config, examples)} if promises(config) else {}


def _client(
    config: RunConfig,
    both: tuple[Footprint, Footprint] | None,
    state: ServerState,
    rank: int,
    layers: tuple[Layer, ...] | None,
) -> dict[str, Any]:
    mixed = len({*config.fleet.rank_choices}) > 1
    site = Site("example", 1, rank if mixed else None)
    plan = config.rule().plan(state, site).without(config.frozen)
    plan = narrowed(plan, layers)
    trained: frozenset[Part] = plan.train | plan.keep  # what a site keeps learns in time
    check_beside(config.strategy, plan.terms, dp_sgd=config.training.dp is not None)
    down, up = codec.plan_bytes(plan, config.engine.compressor)
    trainable = sum(t.numel() for t in plan.start.tensors(trained).values())
    return {
        "rank": rank,
        "trainable": trainable,
        "bytes": {"up": up, "down": down},
        **({} if both is None else _memory(config, both, layers)),
    }


def _memory(
    config: RunConfig, both: tuple[Footprint, Footprint], layers: tuple[Layer, ...] | None
) -> dict[str, Any]:
    needs = both[config.engine.gradient_checkpointing]
    held = needs.layers if layers is None else len(layers)
    return {
        f"{granularity(config)}s": [held, needs.layers],
        "memory_mib": {name: value / MIB for name, value in needs.of(held).items()},
        "checkpointing_mib": {"off": both[0].mib(held), "on": both[1].mib(held)},
    }


def _packing_lines(config: RunConfig, cost: dict[str, Any]) -> list[str]:
    if (found := cost.get("packing")) is None:
        return []
    return [
        f"packing               {found['rows']:,} rows of {found['clients']:,} clients in "
        f"{found['sequences']:,} sequences of up to {config.data.max_length} tokens, {found['full']:.0%} full",
        f"                      {found['steps']:,} steps of {config.training.batch_size} sequences in an "
        "epoch of them all",
    ]


def as_text(config: RunConfig, cost: dict[str, Any]) -> str:
    """The forecast and the resolved configuration, for reading."""
    size = cost["parameters"]
    lines = [
        f"trainable parameters  {size['trainable']:,} of {size['base'] + size['trainable']:,} ({size['share']:.3%})",
        *_traffic_lines(config, cost),
        f"examples              {cost['data']['train']:,} to train on, {cost['data']['test']:,} to test on"
        + (f", in {len(classes)} classes" if (classes := cost["data"]["classes"]) else ""),
        *_class_lines(cost["data"]),
        *(f"note                  {note}" for note in cost["data"]["notes"]),
        *training_lines(cost["training"], tried="engine" in cost),
        *_packing_lines(config, cost),
    ]
    for client in cost["clients"]:
        if "memory_mib" not in client:
            lines.append(
                f"memory a client       not known at rank {client['rank']}: the memory model knows no "
                "models of this architecture"
            )
            continue
        parts = client["memory_mib"]
        detail = ", ".join(
            f"{name} {value:.1f}" for name, value in parts.items() if name != "total"
        )
        layers = f"{granularity(config)}s"
        held, count = client[layers]
        part = f" with {held} of {count} {layers}" if held < count else ""
        other = "off" if config.engine.gradient_checkpointing else "on"
        lines += [
            f"memory a client       {parts['total']:.0f} MiB at rank {client['rank']}{part} ({detail})",
            f"                      {client['checkpointing_mib'][other]:.0f} MiB with gradient "
            f"checkpointing {other}",
        ]
    if cost["framework_mib"] is not None:
        lines.append(
            f"above                 {cost['framework_mib']:.0f} MiB that this process takes with torch, "
            "transformers and peft, and no model"
        )
    if config.training.trainer is None and (engine := cost.get("engine")) is not None:
        why = f": {engine['why']}" if engine["why"] else ""
        lines.append(f"trains                {TRAINS[engine['engine']]}{why}")
    if (trainer := config.training.trainer) is not None:
        lines.append(
            f"trains                by {trainer}, a plain loop of your own: one client after the other; "
            "memory above is that of fedft's own loop"
        )
    limit = cost["positions"]
    if (
        limit is not None
        and config.data.max_length > limit
        and task_of(config.model.task).reads == "text"
    ):
        lines.append(
            f"positions             the model has {limit}, and data.max-length is {config.data.max_length}: "
            "a row that is really longer is refused before the first round"
        )
    if config.strategy.forgets and len({*config.fleet.rank_choices}) > 1:
        lines.append(
            f"forgets               {config.strategy.name} loses a part of what clients of low rank are "
            "not sent, in every round: see its page, and beyond-rank"
        )
    deadline = cost["deadline"]
    if deadline["given_s"] is None:
        example_s, bytes_per_s = deadline["example_s"], deadline["bytes_per_s"]
        shown = Pace(example_s, 1.0, bytes_per_s, deadline["least_s"]).sentence()
    else:
        shown = f"{deadline['given_s']:g} s"
    lines.append(f"with real clients     a round closes after {shown}")
    lines += [_privacy_line(unit, spent) for unit, spent in cost.get("privacy", {}).items()]
    return "\n".join([*lines, "", resolved(config).to_toml()])


_CLASSES_SHOWN = 20


def _class_lines(data: dict[str, Any]) -> list[str]:
    """How often each class is a label of the training rows, the most frequent ones first."""
    counted = sorted(zip(data["classes"], data["per_class"], strict=True), key=lambda own: -own[1])
    if not counted:
        return []
    shown = [f"{name[:40]} {n:,}" for name, n in counted[:_CLASSES_SHOWN]]
    more = len(counted) - len(shown)
    return [f"labels to learn       {', '.join(shown)}" + (f", and {more} more" if more else "")]


def _traffic_lines(config: RunConfig, cost: dict[str, Any]) -> list[str]:
    """What is sent: of every round where all are alike, else of the first, and where the rest is."""
    first, total = cost["bytes_per_round"], cost["bytes"]
    mixed = len({client["rank"] for client in cost["clients"]}) > 1
    count, spares = counted(config)["up"], config.rounds.spares
    whom = f"{count} client{'s' * (count != 1)}"
    whom += (f" and {spares} to spare" if spares else "") + (
        ", of the ranks on average" if mixed else ""
    )
    sent = f"{first['up']:,} up, {first['down']:,} down ({whom})"
    if total is None:
        return [
            f"bytes in round 1      {sent}",
            f"bytes later           other numbers under {config.strategy.name}: the formula is on its "
            "page",
        ]
    about = "about " if mixed else ""
    return [
        f"bytes a round         {sent}",
        f"bytes in all          {about}{sum(total.values()):,} in {cost['rounds']} rounds",
    ]


def _privacy_line(unit: str, spent: dict[str, Any]) -> str:
    whom = {
        "site": "one client more or less",
        "example": "one example more or less, at a client of mean size that is in every round",
    }
    return (
        f"privacy by {WORDS[unit]:<10} ε = {spent['epsilon']:.3f} at δ = {spent['delta']:g} "
        f"(noise multiplier {spent['noise_multiplier']:.4g}, Poisson sampling at rate "
        f"{spent['sampling_rate']:.4g}; {whom[unit]})"
    )
