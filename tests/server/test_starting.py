"""`[lora] start`: a run goes on from an adapter that fedft or peft wrote."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from fedft.core.errors import ConfigError, MismatchError, SecurityRefusal
from fedft.server.config_file import parse_config
from fedft.server.forecast import forecast
from fedft.server.run import resume, simulate
from tests.conftest import StopAfter

Table = Callable[..., dict[str, Any]]
SCORED: dict[str, Any] = {"before": True}


def first(tiny_table: Table, folder: Path, **changes: Any) -> Path:
    """The adapter of two rounds."""
    changes = {"rounds": {"count": 2}, **changes}
    run = simulate(parse_config(tiny_table(**changes)), folder).path
    (adapter,) = (run / "adapters").iterdir()
    return adapter


def going_on(tiny_table: Table, start: Path, **changes: Any) -> Any:
    lora = {"start": str(start), **changes.pop("lora", {})}
    rounds = {"count": 2, "evaluate-every": 1, **changes.pop("rounds", {})}
    return parse_config(tiny_table(lora=lora, rounds=rounds, evaluation=SCORED, **changes))


def lines_of(run: Path) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (run / "rounds.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "seconds"} for line in found]


def test_a_run_starts_with_the_scores_that_the_other_ended_with(
    tiny_table: Table, tmp_path: Path
) -> None:
    start = first(tiny_table, tmp_path / "first")
    ended = lines_of(tmp_path / "first")[-1]["eval"]
    again = lines_of(simulate(going_on(tiny_table, start), tmp_path / "second").path)
    assert again[0]["start"] == pytest.approx(ended, rel=1e-6)
    fresh = simulate(parse_config(tiny_table(evaluation=SCORED)), tmp_path / "fresh").path
    assert lines_of(fresh)[0]["start"]["loss"] != pytest.approx(ended["loss"], rel=1e-3)
    assert again[-1]["eval"]["loss"] != again[0]["start"]["loss"]
    hashes = json.loads((tmp_path / "second" / "environment.json").read_text())["hashes"]
    assert len(hashes["start"]) == 64
    (task,) = {parse_config(tiny_table()).task().model_dump_json()}
    assert going_on(tiny_table, start).task().model_dump_json() == task, "a folder of the server's"


def test_a_killed_run_goes_on_when_the_folder_is_gone(tiny_table: Table, tmp_path: Path) -> None:
    start = first(tiny_table, tmp_path / "first")
    kept = shutil.copytree(start, tmp_path / "adapter")
    config = going_on(tiny_table, kept)
    whole = simulate(config, tmp_path / "whole").path
    for rounds, name in ((1, "late"), (0, "early")):
        stop = StopAfter(rounds)
        with pytest.raises(Exception, match="stopped"):
            simulate(config, tmp_path / name, trackers=[stop], stop=stop)
    shutil.rmtree(kept)
    for name in ("late", "early"):
        assert lines_of(resume(tmp_path / name).path) == lines_of(whole)
    with pytest.raises(MismatchError, match="has no adapter_model"):
        simulate(config, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_a_run_refuses_a_start_that_was_changed(tiny_table: Table, tmp_path: Path) -> None:
    start = first(tiny_table, tmp_path / "first")
    stop = StopAfter(1)
    with pytest.raises(Exception, match="stopped"):
        simulate(going_on(tiny_table, start), tmp_path / "run", trackers=[stop], stop=stop)
    weights = tmp_path / "run" / "start" / "adapter_model.safetensors"
    save_file({n: t + 1 for n, t in load_file(weights).items()}, weights)
    with pytest.raises(MismatchError, match="the start is not that of this run"):
        resume(tmp_path / "run")


def test_clients_of_lower_rank_get_what_the_rule_makes_of_it(
    tiny_table: Table, tmp_path: Path
) -> None:
    start = first(tiny_table, tmp_path / "first")
    ended = lines_of(tmp_path / "first")[-1]["eval"]
    config = going_on(tiny_table, start, fleet={"ranks": [2, 4]}, strategy={"name": "flexlora"})
    lines = lines_of(simulate(config, tmp_path / "mixed").path)
    assert lines[0]["start"] == pytest.approx(ended, rel=1e-6)
    assert all(line["eval"]["loss"] > 0 for line in lines)


def test_an_adapter_that_peft_saved_in_half_precision(tiny_table: Table, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForSequenceClassification

    folder = tiny_table()["model"]["source"]
    base = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=3)
    modules = ["query", "value"]
    peft = get_peft_model(
        base, LoraConfig(task_type="SEQ_CLS", r=4, lora_alpha=8, target_modules=modules)
    )
    torch.manual_seed(1)
    for name, parameter in peft.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.1)
    peft.half().save_pretrained(tmp_path / "adapter")
    config = going_on(tiny_table, tmp_path / "adapter", lora={"target-modules": modules})
    lines = lines_of(simulate(config, tmp_path / "run").path)
    stranger = going_on(
        tiny_table,
        first(tiny_table, tmp_path / "x", lora={"target-modules": modules}),
        lora={"target-modules": modules},
    )
    other = lines_of(simulate(stranger, tmp_path / "other").path)
    assert lines[0]["start"]["loss"] != other[0]["start"]["loss"]


def changed(start: Path, target: Path, **config: Any) -> Path:
    """A copy with another configuration."""
    folder = shutil.copytree(start, target)
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **config}))
    return folder


def test_what_is_not_of_the_run_is_refused_before_round_1(
    tiny_table: Table, tmp_path: Path
) -> None:
    start = first(tiny_table, tmp_path / "first")
    forecast(going_on(tiny_table, start))
    tensors = load_file(start / "adapter_model.safetensors")
    one = next(name for name in tensors if "lora_A" in name)
    head = next(name for name in tensors if "lora_" not in name)

    def saved(name: str, found: dict[str, Any]) -> Path:
        folder = shutil.copytree(start, tmp_path / name)
        save_file(found, folder / "adapter_model.safetensors")
        return folder

    module = one.split(".lora_A")[0]
    layerless = {n: t for n, t in tensors.items() if not n.startswith(module)}
    tries = {
        "rank is 4, and the largest of the run is 8": going_on(
            tiny_table, start, lora={"rank": 8, "alpha": 16}
        ),
        "scale is 2, and that of the run is 4": going_on(tiny_table, start, lora={"alpha": 16}),
        "it has no .*query|it has no .*layer": going_on(tiny_table, saved("less", layerless)),
        "which the run does not": going_on(tiny_table, start, lora={"layers": [0]}),
        "holds NaN or Inf": going_on(
            tiny_table, saved("nan", {**tensors, one: tensors[one] * float("nan")})
        ),
        "which is of the head": going_on(
            tiny_table, saved("headless", {n: t for n, t in tensors.items() if n != head})
        ),
        "there and .* here": going_on(
            tiny_table, saved("classes", {**tensors, head: torch.cat([tensors[head]] * 2)})
        ),
        "its head is of peft's task type TOKEN_CLS": going_on(
            tiny_table, changed(start, tmp_path / "words", task_type="TOKEN_CLS")
        ),
        "only plain LoRA": going_on(tiny_table, changed(start, tmp_path / "dora", use_dora=True)),
    }
    for said, config in tries.items():
        for act in (forecast, lambda c: simulate(c, tmp_path / "run")):
            with pytest.raises(MismatchError, match=said):
                act(config)
        assert not (tmp_path / "run").exists()
    (tmp_path / "pickle").mkdir()
    (tmp_path / "pickle" / "adapter_model.bin").write_bytes(b"x")
    with pytest.raises(SecurityRefusal, match="is a pickle"):
        simulate(going_on(tiny_table, tmp_path / "pickle"), tmp_path / "run")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"strategy": {"name": "ffa-lora"}}, "does not send all"),
        ({"strategy": {"name": "flora"}}, "does not send all"),
        ({"strategy": {"name": "fedsa-lora"}}, "does not send all"),
        ({"lora": {"init": "pissa"}}, "has another start"),
        ({"lora": {"method": "dora"}}, "has another start"),
        ({"lora": {"head": "frozen"}}, "keeps the one of the seed"),
    ],
)
def test_what_cannot_go_on_from_an_adapter_is_refused(
    changes: dict[str, Any], said: str, tiny_table: Table
) -> None:
    with pytest.raises(ConfigError, match=said):
        going_on(tiny_table, Path("somewhere"), **changes)
    going_on(tiny_table, Path("somewhere"))


def test_every_rule_goes_on_from_it_or_says_why_not(tiny_table: Table) -> None:
    """No rule takes the key and starts from something else."""
    from fedft.core.types import Adapter, Factors
    from fedft.strategies import RULES

    generator = torch.Generator().manual_seed(0)
    made = [torch.randn(shape, generator=generator) for shape in ((2, 6), (5, 2))]
    start = Adapter({"layer": Factors(made[0], made[1], 0.5)})
    able = 0
    for rule in RULES:
        strategy = rule()
        if not strategy.supports("lora"):
            continue
        from fedft.strategies import check_start

        try:
            check_start(strategy)
        except ConfigError:
            continue
        able += 1
        state = strategy.init(start)
        moved = state.adapter.factors["layer"].product()
        if "layer" in state.delta:
            moved = moved + state.delta["layer"].product()
        assert torch.allclose(moved, start.factors["layer"].product(), atol=1e-5), strategy.name
    assert able > 10
