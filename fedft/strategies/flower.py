"""Any rule as a Flower strategy, for a plain Flower app with its own ClientApp.

    model = get_peft_model(...)
    rule = FlowerStrategy(FedExLoRA(), get_peft_model_state_dict(model), scale=alpha / r)
    result = rule.start(grid, rule.arrays, num_rounds=10)

A ``train`` message carries, and the client app is to use,

    arrays   ArrayRecord   the adapter to start from, under the names of PEFT's state dict
    config   ConfigRecord  what the caller gave to ``start``, and:
                           server-round, rank, scale
                           train          parts that learn: "A", "B", "R", "router", "head"
                           send           parts to send back (sending more does no harm)
                           keep           parts to keep at the client from round to round
                           proximal-mu    FedProx's mu; 0 for other rules
                           tail-penalty, tail-keep   HetLoRA's lambda and gamma
    delta    ArrayRecord   only where a rule changes the base (FLoRA, FedEx-LoRA, FedMomentum): add
                           B @ A of each ``<module>.lora_A.weight``, ``.lora_B.weight`` to the weight

and it answers with ``arrays`` and ``metrics`` (with ``num-examples``), as for Flower's own
strategies. A client that ignores all of ``config`` trains FedAvg-LoRA, LoRA-FAIR, FlexLoRA, raFLoRA,
FedRot-LoRA and the server optimisers correctly. ``lora_R`` (Fed-SB) is the r x r core between B
and A, which stock PEFT does not have; nor does it have HydraLoRA's several B and its router.

This is the only module of the package that knows Flower. fedft's own server does not use it: it
adds what a long run needs (resume, commit, deadlines, seeds) in ``fedft.server.rounds``.
"""

import logging
import time
from collections.abc import Iterable, Mapping, Sequence

import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy as FlowerBase
from torch import Tensor

from fedft.core import seeds
from fedft.core.errors import ConfigError, UpdateRejected
from fedft.core.types import (
    Adapter,
    ClientUpdate,
    Factors,
    ServerState,
    Site,
    TrainPlan,
    factor_name,
    head_of,
    module_of,
    part_of,
)
from fedft.core.wire import codec
from fedft.strategies import CentralDP, check_method
from fedft.strategies.base import Strategy

log = logging.getLogger("flwr")  # where Flower's own strategies write


def peft_adapter(tensors: Mapping[str, Tensor], scale: float) -> Adapter:
    """The adapter behind a PEFT state dict (``get_peft_model_state_dict``).

    Args:
        tensors: PEFT name → tensor. What is not a LoRA factor is part of the head. HydraLoRA's
            names are those of :mod:`fedft.core.adapters.hydra`.
        scale: LoRA's s, alpha / r.
    """
    if any(head_of(name) is not None for name in tensors):
        return Adapter({}, tensors)  # HydraLoRA's are carried whole
    modules = [module_of(name) for name in tensors if part_of(name) == "A"]
    factors = {
        m: Factors(tensors[factor_name(m, "A")], tensors[factor_name(m, "B")], scale)
        for m in modules
    }
    return Adapter(factors, {n: t for n, t in tensors.items() if part_of(n) == "head"})


class FlowerStrategy(FlowerBase):
    """One of our rules behind Flower's interface.

    Args:
        rule: the aggregation rule.
        initial: the first adapter, as PEFT's state dict.
        scale: LoRA's s, alpha / r.
        fraction_train: share of the connected nodes that train in a round.
        fraction_evaluate: share that evaluates; 0 skips it.
        min_available_nodes: rounds wait for as many.
        seed: of the sampling.

    Raises:
        ConfigError: the rule cannot aggregate such an adapter, or is ``central-dp``, whose promise
            rests on Poisson cohorts and an account that Flower's loop does not keep.

    Attributes:
        state: everything that crosses a round boundary. ``state.delta`` is what a rule has merged
            into the base, for a server-side ``evaluate_fn``.
    """

    def __init__(
        self,
        rule: Strategy,
        initial: Mapping[str, Tensor],
        scale: float,
        *,
        fraction_train: float = 1.0,
        fraction_evaluate: float = 1.0,
        min_available_nodes: int = 2,
        seed: int = 0,
    ) -> None:
        if isinstance(rule, CentralDP):
            raise ConfigError(
                "central-dp promises nothing in Flower's loop: nobody draws Poisson cohorts there, "
                "and nobody keeps the account",
                fix="run it with: fedft simulate CONFIG",
            )
        adapter = peft_adapter(initial, scale)
        check_method(rule, "lora" if adapter.factors else "hydralora")
        self.rule = rule
        self.state: ServerState = rule.init(adapter)
        self.fraction_train = fraction_train
        self.fraction_evaluate = fraction_evaluate
        self.min_available_nodes = min_available_nodes
        self.seed = seed
        self._plans: dict[int, TrainPlan] = {}  # by node, of the round in hand

    @property
    def arrays(self) -> ArrayRecord:
        """The global adapter: what ``start`` takes, and hands on."""
        return codec.arrays_from(self.state.adapter.tensors())

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Messages to this round's sample. The state is this object's; ``arrays`` only mirror it."""
        nodes = self._sample(grid, "train", server_round, self.fraction_train)
        self._plans = {node: self.rule.plan(self.state, Site(str(node), 1)) for node in nodes}
        if any(plan.terms for plan in self._plans.values()):
            raise ConfigError(
                f"{self.rule.label} asks clients for terms of local training, and clients of Flower's "
                "own strategies are not told of any",
                fix="run it with: fedft simulate CONFIG",
            )
        return _messages(MessageType.TRAIN, self._plans, {**config, "server-round": server_round})

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """One step of the rule on every usable reply; nothing where there is none."""
        accepted: list[tuple[ClientUpdate, MetricRecord]] = []
        for reply in replies:
            if reply.has_error():
                log.warning("node %d: %s", reply.metadata.src_node_id, reply.error.reason)
                continue
            try:
                accepted.append(self._accept(reply))
            except UpdateRejected as rejected:
                log.warning("node %d: %s", reply.metadata.src_node_id, rejected.what)
        if not accepted:
            return None, None
        self.state = self.rule.aggregate(self.state, [update for update, _ in accepted])
        return self.arrays, _mean_metrics([metrics for _, metrics in accepted])

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """The global adapter to a sample of nodes."""
        nodes = self._sample(grid, "evaluate", server_round, self.fraction_evaluate)
        plan = TrainPlan(self.state.adapter, self.state.delta, keep=self.rule.personal)
        fields = {**config, "server-round": server_round}
        return _messages(MessageType.EVALUATE, dict.fromkeys(nodes, plan), fields)

    def aggregate_evaluate(
        self, server_round: int, replies: Iterable[Message]
    ) -> MetricRecord | None:
        """The mean of what the nodes measured, by examples."""
        records = [_metrics(reply) for reply in replies if not reply.has_error()]
        usable = [record for record in records if record is not None]
        return _mean_metrics(usable) if usable else None

    def summary(self) -> None:
        """Log the rule and its hyperparameters."""
        log.info("\t└──> %s", self.rule.model_dump_json(by_alias=True))

    def _sample(self, grid: Grid, purpose: str, server_round: int, fraction: float) -> list[int]:
        if fraction == 0:
            return []
        while len(nodes := sorted(grid.get_node_ids())) < self.min_available_nodes:
            log.info("%d of %d nodes connected", len(nodes), self.min_available_nodes)
            time.sleep(1)
        count = max(1, round(fraction * len(nodes)))
        generator = seeds.numpy_generator(self.seed, f"flower-{purpose}", server_round)
        chosen = generator.choice(len(nodes), size=count, replace=False)
        return [nodes[i] for i in sorted(chosen.tolist())]

    def _accept(self, reply: Message) -> tuple[ClientUpdate, MetricRecord]:
        """A reply as the rule reads it.

        Raises:
            UpdateRejected: it lacks a tensor, or has one of another shape, or not finite, or no
                sensible number of examples.
        """
        node = reply.metadata.src_node_id
        plan = self._plans.get(node)
        if plan is None:
            raise UpdateRejected("unknown", "answered without having been asked this round")
        metrics = _metrics(reply)
        if metrics is None:
            raise UpdateRejected("examples", "metrics need num-examples, a count of at least 0")
        record = reply.content.array_records.get("arrays")
        received = codec.tensors_from(record) if record is not None else {}
        tensors = {name: _checked(name, received, like) for name, like in plan.sent().items()}
        examples = int(float(str(metrics["num-examples"])))
        return ClientUpdate(str(node), examples, tensors, plan.start), metrics


def _messages(
    kind: str, plans: Mapping[int, TrainPlan], config: Mapping[str, object]
) -> list[Message]:
    """One message a node; tensors that several plans share are encoded once."""
    records: dict[int, ArrayRecord] = {}
    messages: list[Message] = []
    for node, plan in plans.items():
        start, delta = id(plan.start), id(plan.delta)
        if start not in records:
            records[start] = codec.arrays_from(plan.start.tensors())
        if plan.delta and delta not in records:
            records[delta] = codec.arrays_from(codec.delta_tensors(plan.delta))
        content = RecordDict({"arrays": records[start], "config": _instructions(plan, config)})
        if plan.delta:
            content["delta"] = records[delta]
        messages.append(Message(content=content, message_type=kind, dst_node_id=node))
    return messages


def _instructions(plan: TrainPlan, config: Mapping[str, object]) -> ConfigRecord:
    record = ConfigRecord()
    for name, value in config.items():
        record[name] = value  # pyright: ignore[reportArgumentType]  # checked by the record
    record["rank"] = plan.start.rank
    record["scale"] = next((f.scale for f in plan.start.factors.values()), 1.0)
    record["train"] = sorted(plan.train)
    record["send"] = sorted(plan.send)
    record["keep"] = sorted(plan.keep)
    record["proximal-mu"] = plan.training.proximal_mu
    record["tail-penalty"] = plan.training.tail_penalty
    record["tail-keep"] = plan.training.tail_keep
    return record


def _checked(name: str, received: Mapping[str, Tensor], like: Tensor) -> Tensor:
    tensor = received.get(name)
    if tensor is None:
        raise UpdateRejected("schema", f"the reply lacks {name}")
    if tensor.shape != like.shape:
        shapes = f"{list(tensor.shape)}, not {list(like.shape)}"
        raise UpdateRejected("shape", f"{name} has shape {shapes}")
    if not torch.isfinite(tensor).all():
        raise UpdateRejected("nan", f"{name} is not finite")
    return tensor.to(like.dtype)


def _metrics(reply: Message) -> MetricRecord | None:
    """The metrics of a reply; None where they have no usable number of examples."""
    record = next(iter(reply.content.metric_records.values()), MetricRecord())
    count = record.get("num-examples")
    usable = isinstance(count, int | float) and 0 <= count < float("inf")
    return record if usable else None


def _mean_metrics(records: Sequence[MetricRecord]) -> MetricRecord:
    """The mean over records, by examples, of every number that all of them have."""
    n = [float(str(record["num-examples"])) for record in records]
    mean = MetricRecord()
    for name in records[0]:
        values = [record.get(name) for record in records]
        numbers = [float(v) for v in values if isinstance(v, int | float)]
        if name != "num-examples" and len(numbers) == len(records) and sum(n) > 0:
            mean[name] = sum(w * v for w, v in zip(n, numbers, strict=True)) / sum(n)
    return mean
