"""Adapters that are not plain LoRA, from the configuration to the exported file."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForSequenceClassification

import fedft
from fedft.core import models
from fedft.core.adapters import peft
from fedft.core.errors import ConfigError, EnvironmentFailure, Interrupted
from fedft.core.link import link_pb2 as pb
from fedft.core.link.shapes import of_adapter, of_work
from fedft.core.record.rundir import RunDir
from fedft.core.types import part_of
from fedft.server.checkpoints import Checkpoints
from fedft.server.config_file import parse_config
from fedft.server.forecast import forecast
from fedft.server.run import resume, simulate
from fedft.server.setting import first_state
from fedft.strategies.hydralora import cluster_of
from fedft.trackers import Tracker

Table = Callable[..., dict[str, Any]]
IDS = torch.arange(2, 14).reshape(2, 6)


def hydra_lora(**more: Any) -> dict[str, Any]:
    return {"method": "hydralora", "heads": 2, **more}


def short(count: int = 2) -> dict[str, Any]:
    return {"count": count, "per-round": 3, "evaluate-every": count}


def stock_logits(base: str, folder: Path) -> torch.Tensor:
    """What plain transformers and peft make of an exported adapter."""
    plain = AutoModelForSequenceClassification.from_pretrained(base)
    with torch.inference_mode():
        return PeftModel.from_pretrained(plain, str(folder)).eval()(input_ids=IDS).logits


def own_logits(run: RunDir) -> torch.Tensor:
    """What the run's own engine makes of its last state."""
    from fedft.clients.resident import workbench
    from fedft.server.run import parse_toml
    from fedft.server.setting import prepare_run

    config = parse_toml(run.config, "run")
    with RunDir.open(run.path, writing=True) as open_run:
        task = prepare_run(config, open_run).task
    engine = workbench(task.model_dump_json()).engine
    checkpoint = Checkpoints(run.checkpoints, keep=2).load()
    assert checkpoint is not None
    engine.evaluate(checkpoint.state.adapter, checkpoint.state.delta, [])
    model: Any = engine._model  # type: ignore[attr-defined]
    with torch.inference_mode():
        return model(input_ids=IDS).logits


OPTIONS: dict[str, dict[str, Any]] = {"unilora": {"theta_d_length": 64}}

METHODS: dict[str, dict[str, Any]] = {
    "rslora": {"method": "rslora"},
    "dora": {"method": "dora"},
    "pissa": {"method": "pissa"},
    "olora": {"method": "olora"},
    "vera": {"method": "vera"},
    "ia3": {"method": "ia3"},
    "loha": {"method": "loha"},
    "lokr": {"method": "lokr", "options": {"decompose_factor": 4}},
    "one hydra head": {"method": "hydralora", "heads": 1},
}


@pytest.mark.parametrize("name", METHODS)
def test_a_run_of_every_method_loads_in_stock_peft(
    name: str, tiny_table: Table, tmp_path: Path
) -> None:
    """Law 8, after rounds in which the adapter really moved."""
    rule = {"name": "hydralora"} if "hydra" in name else {"name": "fedavg-lora"}
    config = parse_config(tiny_table(lora=METHODS[name], rounds=short(), strategy=rule))
    run = simulate(config, tmp_path / "run")
    base = config.model.source
    exported = stock_logits(base, run.adapter(2))
    assert torch.allclose(exported, own_logits(run), atol=1e-5)
    with torch.inference_mode():
        untrained = AutoModelForSequenceClassification.from_pretrained(base)(input_ids=IDS).logits
    assert not torch.allclose(exported, untrained, atol=1e-3)
    assert run.rounds()[-1]["bytes"]["up"] > 0


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_a_start_in_the_base_weights_changes_no_logit(init: str, tiny_table: Table) -> None:
    """What is taken out of the frozen weight is what A and B put in, and they are not zero."""
    config = parse_config(tiny_table(lora={"init": init}))
    state = first_state(config, models.schema(config.model, config.lora, 3))
    for module, f in state.adapter.factors.items():
        assert f.product().norm() > 0.1
        assert torch.allclose(f.product(), -state.delta[module].product(), atol=1e-6)
        assert state.delta[module].scale == 1.0


def test_pissa_starts_at_the_leading_singular_vectors(tiny_table: Table) -> None:
    config = parse_config(tiny_table(lora={"init": "pissa"}))
    state = first_state(config, models.schema(config.model, config.lora, 3))
    base = models.load_base(config.model, config.lora, 3)
    for module, f in state.adapter.factors.items():
        weight = base.adapted[module].weight
        assert isinstance(weight, torch.Tensor)
        U, S, Vt = torch.linalg.svd(weight)
        best = U[:, :4] @ torch.diag(S[:4]) @ Vt[:4]
        assert torch.allclose(f.product(), best, atol=1e-5)


def test_dora_starts_from_the_norms_of_the_weights(tiny_table: Table) -> None:
    config = parse_config(tiny_table(lora={"method": "dora"}))
    state = first_state(config, models.schema(config.model, config.lora, 3))
    base = models.load_base(config.model, config.lora, 3)
    for module, linear in base.adapted.items():
        magnitude = state.adapter.head[f"base_model.model.{module}.lora_magnitude_vector"]
        assert isinstance(linear.weight, torch.Tensor)
        assert torch.allclose(magnitude, linear.weight.norm(dim=1), rtol=1e-5)


# ── HydraLoRA ─────────────────────────────────────────────────────────────────────────────────


def hydra_table(tiny_table: Table, mode: str, **rounds: Any) -> dict[str, Any]:
    return tiny_table(
        lora=hydra_lora(),
        data={"holdout": 0.3},
        strategy={"name": "hydralora", "mode": mode, "recluster-every": 2},
        rounds={"count": 4, "per-round": 5, "evaluate-every": 2, **rounds},
    )


@pytest.mark.parametrize("mode", ["clustered", "global", "private"])
def test_a_stopped_run_goes_on_to_the_same_bytes(
    mode: str, tiny_table: Table, tmp_path: Path
) -> None:
    """Private heads, local routers and who belongs where survive the pause."""
    config = parse_config(hydra_table(tiny_table, mode))
    whole = simulate(config, tmp_path / "whole")
    seen = 0

    class Watch(Tracker):
        def round(self, line: Any, replies: Any) -> None:
            nonlocal seen
            seen += 1

    with pytest.raises(Interrupted):
        simulate(config, tmp_path / "cut", trackers=[Watch()], stop=lambda: seen >= 2)
    cut = resume(tmp_path / "cut")
    keys = ("adapter_sha256", "history_sha256", "bytes", "final")
    assert [cut.summary()[k] for k in keys] == [whole.summary()[k] for k in keys]
    sites = [Checkpoints(run.checkpoints, keep=2) for run in (whole, cut)]
    kept = [{s: dict(c.sites[s]) for s in c.sites} if c.load() else {} for c in sites]
    parts = {"clustered": {"router"}, "global": set(), "private": {"B", "router"}}[mode]
    assert {n.split(".lora_")[1].split(".")[0] for s in kept[0].values() for n in s} == parts
    assert kept[0].keys() == kept[1].keys()
    for site, tensors in kept[0].items():
        assert all(torch.equal(t, kept[1][site][n]) for n, t in tensors.items())


def test_members_are_in_the_checkpoint(tiny_table: Table, tmp_path: Path) -> None:
    run = simulate(parse_config(hydra_table(tiny_table, "clustered")), tmp_path / "run")
    checkpoint = Checkpoints(run.checkpoints, keep=2).load()
    assert checkpoint is not None
    asked = {site for line in run.rounds() for site in line["cohort"]}
    assert all(cluster_of(checkpoint.state, site) in (0, 1) for site in asked)
    assert cluster_of(checkpoint.state, "nobody") is None
    heads = [line["heads"] for line in run.rounds()]
    assert all(1 <= h["used"] <= 2 for h in heads)


def test_the_mixture_comes_back_and_its_heads_load_in_stock_peft(
    tiny_table: Table, tmp_path: Path
) -> None:
    table = hydra_table(tiny_table, "global", count=2)
    run = simulate(parse_config(table), tmp_path / "run")
    folder = run.adapter(2)
    model = fedft.load_mixture(folder)
    with torch.inference_mode():
        logits = model(input_ids=IDS).logits
    assert torch.equal(logits, own_logits(run))
    base = table["model"]["source"]
    merged = stock_logits(base, folder)
    heads = [stock_logits(base, folder / f"head-{i}") for i in range(2)]
    assert not torch.allclose(heads[0], heads[1], atol=1e-4)
    assert not torch.allclose(merged, heads[0], atol=1e-4)


def test_the_forecast_counts_the_router(tiny_table: Table) -> None:
    """a + N b + g, and the head, for two modules in each of two blocks of width 32."""
    cost = forecast(parse_config(hydra_table(tiny_table, "global")))
    modules, r, n, N, head = 4, 4, 32, 2, 3 * 32 + 3
    assert cost["parameters"]["trainable"] == modules * (r * n + N * r * n + N * n) + head
    clustered = forecast(parse_config(hydra_table(tiny_table, "clustered")))
    assert clustered["parameters"] == cost["parameters"]
    assert clustered["clients"][0]["bytes"]["up"] == 4 * (modules * 2 * r * n + head)


# ── what is refused ───────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lora": {"method": "hydralora", "heads": 0}}, "heads = 0"),
        ({"lora": {"method": "hydralora"}}, "needs the number of its heads"),
        ({"lora": {"heads": 2}}, "belongs to method = 'hydralora'"),
        ({"lora": hydra_lora()}, "hydralora"),
        ({"strategy": {"name": "hydralora"}}, "fedavg-lora"),
        ({"lora": {"method": "adalora"}}, "cannot be averaged: every client prunes"),
        ({"lora": {"method": "prompt-tuning"}}, "cannot be averaged: it trains tokens"),
        ({"lora": {"method": "lorra"}}, "peft has no such method"),
        ({"lora": {"method": "dora"}, "strategy": {"name": "flexlora"}}, "fedavg-lora"),
        ({"lora": {"method": "ia3", "dropout": 0.1}}, "ia3 has none in peft"),
        ({"lora": {"method": "ia3", "options": {"alhpa": 1}}}, "ia3 has no 'alhpa'"),
        ({"lora": {"options": {"lora_alpha": 1}}}, "lora_alpha is [lora] alpha here"),
        ({"lora": {"options": {"alpha": 1}}}, "lora has no 'alpha'"),
        ({"lora": hydra_lora(options={"use_dora": True})}, "those of a peft method"),
        ({"lora": {"options": {"use_dora": True}, "init": "pissa"}}, "'lora with options'"),
        (
            {"lora": {"options": {"use_dora": True}}, "strategy": {"name": "flexlora"}},
            "'lora with options'",
        ),
        ({"lora": {"options": {"use_dora": True}}, "fleet": {"ranks": [2, 4]}}, "ranks"),
        ({"lora": {"method": "adamss"}}, "clusters the rows"),
        ({"lora": {"method": "trainable_tokens"}}, "rows of the word table"),
        ({"lora": {"method": "supertuning", "dropout": 0.1}}, "supertuning has none in peft"),
        ({"lora": {"method": "frod"}, "engine": {"precision": "bf16"}}, "precision = 'fp32'"),
        ({"lora": {"method": "psoft"}, "engine": {"precision": "auto"}}, "precision = 'fp32'"),
        ({"lora": {"target-modules": "*query"}}, "is no regular expression"),
        ({"lora": {"method": "dora", "init": "pissa"}}, "belongs to method = 'lora'"),
        ({"lora": {"init": "pissa"}, "strategy": {"name": "ffa-lora"}}, "does not send both"),
        ({"lora": {"init": "pissa"}, "fleet": {"ranks": [2, 2]}}, "one rank from"),
        ({"lora": {"method": "vera"}, "engine": {"cohort": 2}}, "one by one"),
        ({"model": {"load-in": "4bit"}, "engine": {"cohort": 2}}, "one by one"),
        ({"model": {"load-in": "8bit"}, "lora": {"init": "olora"}}, "few bits"),
    ],
)
def test_what_cannot_be_run(changes: dict[str, Any], message: str, tiny_table: Table) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_config(tiny_table(**changes))
    assert message in f"{caught.value.what} {caught.value.fix}"


@pytest.mark.parametrize(
    "lora", [hydra_lora(), {"method": "dora"}, {"method": "ia3"}], ids=["hydralora", "dora", "ia3"]
)
def test_both_ends_of_a_stream_know_what_may_come(lora: dict[str, Any], tiny_table: Table) -> None:
    """The names and shapes of the whole adapter, at whatever rank it says it has."""
    rule = {"name": "hydralora" if "heads" in lora else "fedavg-lora"}
    config = parse_config(tiny_table(lora=lora, strategy=rule))
    schema = models.schema(config.model, config.lora, 3)
    adapter = models.initial_adapter(schema, config.lora, config.rank, 0)
    everything = {n: tuple(t.shape) for n, t in adapter.tensors().items()}
    assert of_adapter(schema, adapter.rank) == everything
    assert of_work(schema, adapter.rank, pb.Content()) == {"arrays": everything, "delta": {}}
    sent = {n: shape for n, shape in everything.items() if part_of(n) in ("A", "head")}
    assert of_adapter(schema, adapter.rank, ("A", "head")) == sent


@pytest.mark.parametrize(
    ("lora", "message"),
    [
        ({"target-modules": "query"}, "no linear layer's whole path matches"),
        ({"target-modules": ["querry"]}, "no linear layer of this model is called 'querry'"),
        ({"exclude-modules": ["key"]}, "exclude-modules: no linear layer"),
        ({"exclude-modules": ["query", "value"]}, "leaves no layer to adapt"),
        (
            {"method": "ln-tuning", "target-modules": ["query"]},
            "no norm layer of this model is called 'query'",
        ),
        ({"method": "ln-tuning", "target-modules": "all-linear"}, "no norm layer's whole path"),
        ({"options": {"rank_pattern": {"key": 2}}}, "rank_pattern names 'key'"),
        ({"method": "ia3", "options": {"feedforward_modules": ["key"]}}, "names 'key'"),
        ({"method": "c3a", "options": {"block_size": 7}}, "peft says: The block size"),
    ],
)
def test_what_this_model_does_not_have(
    lora: dict[str, Any], message: str, tiny_table: Table
) -> None:
    config = parse_config(tiny_table(lora=lora))
    with pytest.raises(ConfigError, match=re.escape(message)):
        models.schema(config.model, config.lora, 3)


@pytest.mark.parametrize(
    ("lora", "adapted"),
    [
        ({"target-modules": r".*\.0\..*self\.(query|key)"}, ["0 query", "0 key"]),
        ({"exclude-modules": r".*\.1\..*"}, ["0 query", "0 value"]),
        ({"exclude-modules": ["value"]}, ["0 query", "1 query"]),
        (
            {"target-modules": "all-linear", "exclude-modules": ["dense", "value"]},
            ["0 query", "0 key", "1 query", "1 key"],
        ),
    ],
)
@pytest.mark.parametrize("method", ["lora", "ia3"])
def test_layers_by_expression_and_by_exception(
    method: str, lora: dict[str, Any], adapted: list[str], tiny_table: Table
) -> None:
    config = parse_config(tiny_table(lora={"method": method, **lora}))
    shapes = models.schema(config.model, config.lora, 3)
    found = [f"{path.split('.')[3]} {path.rsplit('.', 1)[1]}" for path in shapes.modules]
    assert sorted(found) == sorted(adapted)
    named = {name for name in shapes.tensors if not name.endswith("dense")}
    assert len(named) == (0 if method == "lora" else len(adapted))


def test_a_missing_package_is_named_with_the_command(
    monkeypatch: pytest.MonkeyPatch, tiny_table: Table
) -> None:
    from peft import IA3Config

    def lacking(_: Any) -> None:
        raise ImportError("nothing is required. Please install it with: pip install nothing-at-all")

    monkeypatch.setattr(IA3Config, "__post_init__", lacking)
    with pytest.raises(EnvironmentFailure, match="needs a package") as caught:
        parse_config(tiny_table(lora={"method": "ia3"}))
    assert caught.value.fix == "pip install nothing-at-all"


def test_an_option_that_peft_does_not_follow_is_refused(
    monkeypatch: pytest.MonkeyPatch, tiny_table: Table
) -> None:
    """peft makes block sizes fit by itself, and says so in a warning."""
    lora = {"method": "oft", "options": {"oft_block_size": 7}}
    config = parse_config(tiny_table(lora=lora))
    with pytest.raises(ConfigError, match="oft_block_size is not followed"):
        models.schema(config.model, config.lora, 3)


@pytest.mark.parametrize("method", ["boft", "shira", "frod", "unilora", "osf"])
def test_shapes_need_no_weight_of_the_model_outside_the_adapted_layers(
    method: str, tiny_table: Table
) -> None:
    """What looks at weights as it starts gets the adapted layers; the word table stays nothing."""
    config = parse_config(tiny_table(lora={"method": method, "options": OPTIONS.get(method, {})}))
    made: list[torch.nn.Module] = []
    kept = peft.injected

    def seen(model: torch.nn.Module, *rest: Any, **more: Any) -> torch.nn.Module:
        made.append(kept(model, *rest, **more))
        return made[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(peft, "injected", seen)
        shapes = models.schema(config.model, config.lora, 3)
    real = {n.rsplit(".", 1)[0] for n, p in made[-1].named_parameters() if not p.is_meta}
    assert not any("embeddings" in name for name in real)
    state = first_state(config, shapes)
    assert {n: tuple(t.shape) for n, t in state.adapter.tensors().items()} == {
        **shapes.tensors,
        **shapes.head,
    }


@pytest.mark.parametrize(
    "lora",
    [
        {"method": "boft", "dropout": 0.9},
        {"method": "loha", "options": {"rank_dropout": 0.9}},
        {"method": "miss", "dropout": 0.9},
    ],
    ids=["boft", "loha", "miss"],
)
def test_what_a_method_drops_in_training_it_keeps_in_scoring(
    lora: dict[str, Any], tiny_table: Table
) -> None:
    """Also where it is no module of torch that drops; the base's own dropout stays off."""
    from fedft.clients.engines.peft_engine import WholeEngine

    config = parse_config(tiny_table(lora=lora))
    shapes = models.schema(config.model, config.lora, 3)
    start = first_state(config, shapes).adapter
    numbers = torch.Generator().manual_seed(0)
    moved = start.replaced(
        {n: t + 0.3 * torch.randn(t.shape, generator=numbers) for n, t in start.tensors().items()}
    )
    base = models.load_base(config.model, config.lora, 3)
    engine = WholeEngine(base, config.lora, 0)
    engine.evaluate(moved, {}, [])
    model: Any = engine._model  # type: ignore[attr-defined]

    def scored() -> torch.Tensor:
        with torch.inference_mode():
            return model(input_ids=IDS).logits

    before = scored()
    engine._dropout(True)  # type: ignore[attr-defined]
    assert not torch.allclose(scored(), before, atol=1e-4)
    assert not base.model.get_submodule("bert.embeddings.dropout").training
    engine._dropout(False)  # type: ignore[attr-defined]
    assert torch.equal(scored(), before)


def test_short_names_are_plain_lora(tiny_table: Table) -> None:
    rslora = parse_config(tiny_table(lora={"method": "rslora"})).lora
    assert (rslora.method, rslora.rslora) == ("lora", True)
    pissa = parse_config(tiny_table(lora={"method": "pissa"})).lora
    assert (pissa.method, pissa.init) == ("lora", "pissa")


@pytest.mark.parametrize("bits", ["4bit", "8bit"])
def test_few_bits_need_a_cuda_device(bits: str, tiny_table: Table, tmp_path: Path) -> None:
    """The other half, bitsandbytes on a GPU, no machine without one can test."""
    config = parse_config(tiny_table(model={"load-in": bits}))
    with pytest.raises(EnvironmentFailure, match="needs a CUDA device") as caught:
        simulate(config, tmp_path / "run")
    assert "gpus-per-worker" in caught.value.fix
    with pytest.raises(EnvironmentFailure, match="needs a CUDA device"):
        models.load_base(config.model, config.lora, 3)


def test_few_bits_need_bitsandbytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr("fedft.core.extras.find_spec", lambda _: None)
    with pytest.raises(EnvironmentFailure, match="bitsandbytes is not installed"):
        models.check_quantized("4bit", "cuda")
