"""Every rule in a plain Flower app: Flower's own loop, and a client that has never heard of fedft."""

from typing import Any

import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from torch import nn

from fedft import strategies
from fedft.core.errors import ConfigError
from fedft.server.grids.inline import Fault, Faults, InlineGrid
from fedft.strategies import (
    FedAvgLoRA,
    FedAvgM,
    FedExLoRA,
    FedProx,
    FedSALoRA,
    FLoRA,
    HetLoRA,
    Strategy,
)
from fedft.strategies.flower import FlowerStrategy, peft_adapter

D_OUT, D_IN, RANK, SCALE = 6, 8, 2, 2.0
BASE = "base_model.model."
A, B, R, ROUTER = (f"{BASE}proj.lora_{x}.weight" for x in ("A", "B", "R", "router"))
HEADS = [f"{BASE}proj.lora_B.{i}.weight" for i in range(2)]
BIAS = f"{BASE}head.bias"


def initial() -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    return {
        A: torch.randn(RANK, D_IN, generator=g) / D_IN**0.5,
        B: torch.zeros(D_OUT, RANK),
        BIAS: torch.zeros(D_OUT),
    }


def examples(node: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A common linear map, seen by each node through its own inputs."""
    g = torch.Generator().manual_seed(99)
    target = torch.randn(D_OUT, 2, generator=g) @ torch.randn(2, D_IN, generator=g) / 4
    x = torch.randn(10 + node, D_IN, generator=torch.Generator().manual_seed(node))
    return x, x @ target.T + 0.5


# ── the client: LoRA on one linear map, with nothing but torch and Flower ─────────────────────

app = ClientApp()


def load(message: Message, context: Context) -> dict[str, torch.Tensor]:
    arrays = message.content.array_records["arrays"]
    tensors = {name: torch.tensor(array.numpy()) for name, array in arrays.items()}
    kept = context.state.array_records.get("kept")
    tensors |= {n: torch.tensor(a.numpy()) for n, a in (kept or {}).items()}
    return tensors


def part(name: str) -> str:
    parts = ("A", "B", "R", "router")
    return next((p for p in parts if f"lora_{p}." in name), "head")


def update_of(t: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """What the adapter adds to the output, before its scale. [n, d_out]"""
    inner = x @ (t[R] @ t[A] if R in t else t[A]).T
    if ROUTER not in t:
        return inner @ t[B].T
    gates = (x @ t[ROUTER].T).softmax(dim=1)
    return sum(gates[:, [i]] * (inner @ t[head].T) for i, head in enumerate(HEADS))


def loss_of(t: dict[str, torch.Tensor], message: Message, node: int) -> torch.Tensor:
    x, y = examples(node)
    s = message.content.config_records["config"]["scale"]
    predicted = s * update_of(t, x) + t[BIAS]
    delta = message.content.array_records.get("delta")
    if delta is not None:
        predicted = predicted + x @ torch.tensor(delta[B].numpy() @ delta[A].numpy()).T
    return (predicted - y).square().mean()


@app.train()
def train(message: Message, context: Context) -> Message:
    config = message.content.config_records["config"]
    tensors = load(message, context)
    learned = [t.requires_grad_() for n, t in tensors.items() if part(n) in config["train"]]
    start = [t.detach().clone() for t in learned]
    for _ in range(10):
        loss = loss_of(tensors, message, context.node_id)
        drift = sum((t - s).square().sum() for t, s in zip(learned, start, strict=True))
        gradients = torch.autograd.grad(
            loss + config["proximal-mu"] / 2 * drift, learned, allow_unused=True
        )
        with torch.no_grad():
            for t, g in zip(learned, gradients, strict=True):
                if g is not None:
                    t.sub_(0.2 * g)
    arrays = {n: t.detach().numpy() for n, t in tensors.items()}
    context.state["kept"] = ArrayRecord(
        {n: a for n, a in to_arrays(arrays).items() if part(n) in config["keep"]}
    )
    metrics = MetricRecord({"num-examples": 10 + context.node_id, "loss": float(loss)})
    content = RecordDict({"arrays": to_arrays(arrays), "metrics": metrics})  # all parts, always
    return Message(content, reply_to=message)


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    loss = float(loss_of(load(message, context), message, context.node_id))
    metrics = MetricRecord({"num-examples": 10 + context.node_id, "loss": loss})
    return Message(RecordDict({"metrics": metrics}), reply_to=message)


def to_arrays(arrays: dict[str, Any]) -> ArrayRecord:
    return ArrayRecord({n: torch.tensor(a) for n, a in arrays.items()})


def run(
    rule: Strategy, rounds: int = 4, nodes: int = 3, faults: Faults | None = None, **kwargs: Any
):
    start = initial()
    if rule.supports("hydralora"):
        g = torch.Generator().manual_seed(1)
        zeros = start.pop(B)
        start |= {head: zeros.clone() for head in HEADS}
        start[ROUTER] = torch.randn(len(HEADS), D_IN, generator=g)
    strategy = FlowerStrategy(rule, start, SCALE, **kwargs)
    with InlineGrid(app, nodes, faults=faults) as grid:
        result = strategy.start(grid, strategy.arrays, num_rounds=rounds)
    return strategy, result


# ── the tests ─────────────────────────────────────────────────────────────────────────────────


# Momentum of 0.9 at full steps overshoots on so small a problem.
RULES = [
    FedAvgM(lr=0.3) if cls is FedAvgM else cls()
    for cls in strategies.RULES
    if cls not in (strategies.CentralDP, strategies.Scaffold, strategies.FedDyn, strategies.FedNova)
]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.name)
def test_every_rule_learns(rule: Strategy) -> None:
    strategy, result = run(rule)
    losses = [float(m["loss"]) for _, m in sorted(result.evaluate_metrics_clientapp.items())]
    assert strategy.state.round == 4
    assert losses[-1] < 0.9 * losses[0]
    assert set(result.arrays) == set(strategy.state.adapter.tensors())
    assert {A, BIAS} <= set(result.arrays)


def test_what_cannot_be_kept_in_flowers_loop_is_refused() -> None:
    with pytest.raises(ConfigError, match="Poisson"):
        run(strategies.CentralDP())
    for rule in (strategies.Scaffold(), strategies.FedDyn(), strategies.FedNova()):
        with pytest.raises(ConfigError, match="terms of local training"):
            run(rule)
    with pytest.raises(ConfigError, match="hydralora"):
        FlowerStrategy(
            FedAvgLoRA(), {A: torch.ones(2, 8), **dict.fromkeys(HEADS, torch.ones(6, 2))}, 1.0
        )


def test_the_round_is_the_rules_own() -> None:
    """What the adapter computes is what the rule computes on the same updates."""
    seen: list[Any] = []

    class Spy(FedAvgLoRA):
        def combine(self, state, updates):
            seen.append((state, updates))
            return super().combine(state, updates)

    strategy, _ = run(Spy(), rounds=1)
    state, updates = seen[0]
    assert [(u.site, u.examples) for u in updates] == [("1", 11), ("2", 12), ("3", 13)]
    expected = FedAvgLoRA().combine(state, updates).adapter.tensors()
    assert all(torch.equal(strategy.state.adapter.tensors()[n], t) for n, t in expected.items())


def test_only_what_the_plan_asks_for_is_used() -> None:
    """The client sends everything; FedSA-LoRA takes A, and its clients keep the rest."""
    strategy, result = run(FedSALoRA())
    tensors = strategy.state.adapter.tensors()
    assert not tensors[B].any()
    assert not tensors[BIAS].any()
    assert not torch.equal(tensors[A], initial()[A])
    assert float(result.train_metrics_clientapp[4]["loss"]) < 0.5 * float(
        result.train_metrics_clientapp[1]["loss"]
    )


def test_penalties_are_handed_on() -> None:
    strategy = FlowerStrategy(FedProx(mu=0.7, inner=HetLoRA(gamma=0.5)), initial(), SCALE)
    with InlineGrid(app, 2) as grid:
        [message, _] = strategy.configure_train(3, strategy.arrays, ConfigRecord({"lr": 0.1}), grid)
    config = message.content.config_records["config"]
    assert (config["proximal-mu"], config["tail-keep"]) == (0.7, 0.5)
    assert (config["server-round"], config["lr"], config["rank"]) == (3, 0.1, RANK)


def test_messages_share_what_is_the_same() -> None:
    strategy, _ = run(FLoRA(), rounds=1)
    with InlineGrid(app, 3) as grid:
        messages = list(strategy.configure_train(2, strategy.arrays, ConfigRecord(), grid))
    for key in ("arrays", "delta"):
        assert len({id(m.content.array_records[key]) for m in messages}) == 1


@pytest.mark.parametrize("kind", ["nan", "raise", "drop"])
def test_a_bad_reply_costs_that_client_its_place(kind: Any) -> None:
    bad, _ = run(
        FedAvgLoRA(), rounds=1, faults=Faults((Fault(kind, node=2, message_type="train"),))
    )
    tensors = bad.state.adapter.tensors()
    assert bad.state.round == 1
    assert all(t.isfinite().all() for t in tensors.values())
    whole, _ = run(FedAvgLoRA(), rounds=1)
    assert not torch.equal(tensors[B], whole.state.adapter.tensors()[B])


def test_no_usable_reply_leaves_the_state() -> None:
    strategy, _ = run(FedAvgLoRA(), rounds=1, faults=Faults((Fault("nan", message_type="train"),)))
    assert strategy.state.round == 0
    assert torch.equal(strategy.state.adapter.tensors()[A], initial()[A])


def test_replies_of_another_shape_or_without_examples() -> None:
    strategy = FlowerStrategy(FedAvgLoRA(), initial(), SCALE)

    def broken(message: Message, context: Context) -> Message:
        reply = train_reply(message, context)
        if context.node_id == 1:
            reply["arrays"] = to_arrays({**reply["arrays"], A: torch.zeros(1, D_IN).numpy()})
        if context.node_id == 2:
            reply["metrics"] = MetricRecord({"num-examples": -5})
        if context.node_id == 3:
            del reply["arrays"]
        return Message(reply, reply_to=message)

    def train_reply(message: Message, context: Context) -> RecordDict:
        arrays = {n: t.numpy() for n, t in load(message, context).items()}
        metrics = MetricRecord({"num-examples": 4})
        return RecordDict({"arrays": to_arrays(arrays), "metrics": metrics})

    with InlineGrid(broken, 3) as grid:
        messages = strategy.configure_train(1, strategy.arrays, ConfigRecord(), grid)
        assert strategy.aggregate_train(1, grid.send_and_receive(messages)) == (None, None)


def test_sampling_is_seeded() -> None:
    def sampled(seed: int, round_: int) -> list[int]:
        strategy = FlowerStrategy(FedAvgLoRA(), initial(), SCALE, fraction_train=0.3, seed=seed)
        with InlineGrid(app, 20) as grid:
            messages = strategy.configure_train(round_, strategy.arrays, ConfigRecord(), grid)
        return [m.metadata.dst_node_id for m in messages]

    assert sampled(0, 1) == sampled(0, 1)
    assert len(set(sampled(0, 1))) == 6
    assert sampled(0, 1) != sampled(0, 2)
    assert sampled(0, 1) != sampled(1, 1)


@pytest.mark.parametrize("rule", [FedAvgLoRA(), FedExLoRA()], ids=lambda rule: rule.name)
def test_with_stock_peft(rule: Strategy) -> None:
    """The names on the wire are those that PEFT reads and writes."""

    def model() -> Any:
        torch.manual_seed(0)
        net = nn.Sequential()
        net.add_module("proj", nn.Linear(D_IN, D_OUT, bias=False))
        nn.init.zeros_(net.get_submodule("proj").weight)
        config = LoraConfig(r=RANK, lora_alpha=4, target_modules=["proj"], init_lora_weights=True)
        return get_peft_model(net, config)  # type: ignore[arg-type]

    client = ClientApp()

    @client.train()
    def _(message: Message, context: Context) -> Message:
        net = model()
        records = message.content.array_records
        set_peft_model_state_dict(
            net, {n: torch.tensor(a.numpy()) for n, a in records["arrays"].items()}
        )
        if "delta" in records:
            change = torch.tensor(records["delta"][B].numpy() @ records["delta"][A].numpy())
            net.base_model.model.proj.base_layer.weight.data += change
        optimizer = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], lr=0.2)
        x, y = examples(context.node_id)
        for _ in range(10):
            loss = (net(x) - y).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        metrics = MetricRecord({"num-examples": len(x), "loss": float(loss)})
        state = ArrayRecord(get_peft_model_state_dict(net))
        return Message(RecordDict({"arrays": state, "metrics": metrics}), reply_to=message)

    start = get_peft_model_state_dict(model())
    strategy = FlowerStrategy(rule, start, SCALE, fraction_evaluate=0.0)
    with InlineGrid(client, 3) as grid:
        result = strategy.start(grid, strategy.arrays, num_rounds=3)
    losses = [float(m["loss"]) for _, m in sorted(result.train_metrics_clientapp.items())]
    assert losses[-1] < 0.8 * losses[0]
    assert set(result.arrays) == set(start)


def test_peft_adapter_reads_a_state_dict() -> None:
    adapter = peft_adapter(initial(), SCALE)
    assert list(adapter.factors) == ["proj"]
    assert (adapter.rank, adapter.factors["proj"].scale, list(adapter.head)) == (
        RANK,
        SCALE,
        [BIAS],
    )
