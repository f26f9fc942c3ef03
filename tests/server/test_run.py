"""The main job: runs end, repeat, resume and export as promised (laws 5, 6, 7, 8)."""

import json
import os
import random
import shutil
import signal
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from fedft.api import Run
from fedft.core import models
from fedft.core.errors import ConfigError, IntegrityError, Interrupted, MismatchError
from fedft.server.checkpoints import Checkpoints
from fedft.server.config import RunConfig
from fedft.server.config_file import parse_config
from fedft.server.run import fork, resume, simulate
from tests.core.tasks.cases import vit
from tests.forks import Forks

Table = Callable[..., dict[str, Any]]


def run_of(table: Mapping[str, Any], folder: Path, **options: Any) -> Run:
    return Run(simulate(parse_config(table), folder, **options).path)


def without_seconds(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{k: v for k, v in r.items() if k != "seconds"} for r in records]


def test_a_run_learns_and_leaves_the_whole_record(tiny_table: Table, tmp_path: Path) -> None:
    table = tiny_table(rounds={"count": 12}, training={"epochs": 3})
    run = run_of(table, tmp_path / "run")

    assert run.metrics["status"] == "finished"
    assert run.metrics["rounds"] == 12
    assert run.metrics["final"]["accuracy"] > 0.7  # three classes: chance is a third
    assert [r["round"] for r in run.rounds] == list(range(1, 13))
    for name in ("config.toml", "environment.json", "rounds.jsonl", "clients.jsonl"):
        assert (run.directory / name).stat().st_size > 0
    replies = [json.loads(x) for x in (run.directory / "clients.jsonl").read_text().splitlines()]
    assert len(replies) == 12 * 4
    assert {r["status"] for r in replies} == {"ok"}


def test_the_keys_that_others_read_are_there(tiny_table: Table, tmp_path: Path) -> None:
    run = run_of(tiny_table(), tmp_path / "run")
    last = run.rounds[-1]
    assert {
        "round",
        "cohort",
        "failures",
        "train",
        "eval",
        "bytes",
        "seconds",
        "bias",
        "lag",
        "drift",
    } <= set(last)
    assert {"plan", "train", "aggregate", "evaluate", "commit"} <= set(last["seconds"])
    assert {"loss", "accuracy"} == set(last["eval"])
    assert {"relative", "cosine", "norm_ratio"} <= set(last["bias"])
    assert {"function_jump", "dead_start", "displacement"} <= set(last["lag"])
    assert {"status", "rounds", "final", "best", "bytes", "seconds", "adapter_sha256"} <= set(
        run.metrics
    )


def test_the_spectrum_of_the_mean_update_is_recorded_on_request(
    tiny_table: Table, tmp_path: Path
) -> None:
    settings = {"count": 2, "evaluate-every": 2, "spectrum": True}
    run = run_of(tiny_table(rounds=settings), tmp_path / "run")
    assert "spectrum" not in run.rounds[0]
    spectrum = run.rounds[1]["spectrum"]
    assert spectrum.keys() == run.adapter("last").factors().factors.keys()
    for values in spectrum.values():
        assert values == sorted(values, reverse=True)
        assert values[0] > 0

    personal = tiny_table(rounds=settings, strategy={"name": "fedsa-lora"}, data={"holdout": 0.2})
    assert run_of(personal, tmp_path / "personal").rounds[1]["spectrum"] == {}
    assert "spectrum" not in run_of(tiny_table(), tmp_path / "silent").rounds[-1]


@pytest.mark.parametrize("rule", ["fedavg-lora", "lora-fair", "ffa-lora", "fedex-lora"])
def test_a_frozen_head_stays_as_the_seed_made_it(
    tiny_table: Table, tmp_path: Path, rule: str
) -> None:
    def head_and_bytes(head: str) -> tuple[dict[str, torch.Tensor], int]:
        lora = {**tiny_table()["lora"], "head": head}
        table = tiny_table(lora=lora, strategy={"name": rule}, rounds={"count": 2})
        run = run_of(table, tmp_path / head)
        return dict(run.adapter("last").factors().head), run.rounds[0]["bytes"]["up"]

    frozen, less = head_and_bytes("frozen")
    trained, more = head_and_bytes("trained")
    size = 4 * sum(t.numel() for t in frozen.values())
    assert more - less == 4 * size, "four clients send no head"
    one = parse_config(tiny_table())
    shapes = models.schema(one.model, one.lora, 3)
    initial = models.initial_adapter(shapes, one.lora, one.rank, one.seed)
    for name, tensor in frozen.items():
        assert torch.equal(tensor, initial.head[name])
        assert not torch.equal(trained[name], initial.head[name]), "positive control"


def test_the_written_configuration_runs_again_as_it_is(tiny_table: Table, tmp_path: Path) -> None:
    first = run_of(tiny_table(), tmp_path / "one")
    import fedft

    second = fedft.simulate(first.directory / "config.toml", run_dir=tmp_path / "two")
    assert second.metrics["adapter_sha256"] == first.metrics["adapter_sha256"]
    assert without_seconds(second.rounds) == without_seconds(first.rounds)


def test_another_seed_gives_another_adapter(tiny_table: Table, tmp_path: Path) -> None:
    """Positive control of the equality of hashes."""
    one = run_of(tiny_table(), tmp_path / "one")
    two = run_of(tiny_table() | {"seed": 1}, tmp_path / "two")
    assert one.metrics["adapter_sha256"] != two.metrics["adapter_sha256"]


def test_bytes_on_the_wire_are_the_formula(tiny_table: Table, tmp_path: Path) -> None:
    """FedAvg-LoRA: pi(r) + head both ways; FFA-LoRA: the B half only."""
    r, d, modules, head = 4, 32, 4, 3 * 32 + 3
    avg = run_of(tiny_table(), tmp_path / "avg").rounds[0]["bytes"]
    assert avg == dict.fromkeys(("up", "down"), 4 * 4 * (modules * r * 2 * d + head))
    ffa = run_of(tiny_table(strategy={"name": "ffa-lora"}), tmp_path / "ffa").rounds[0]["bytes"]
    assert ffa == dict.fromkeys(("up", "down"), 4 * 4 * (modules * r * d + head))


def test_plan_predicts_the_bytes_that_the_run_measures(tiny_table: Table, tmp_path: Path) -> None:
    from fedft.server.forecast import forecast

    table = tiny_table(strategy={"name": "ffa-lora"})
    assert (
        forecast(parse_config(table))["bytes_per_round"]
        == run_of(table, tmp_path / "r").rounds[0]["bytes"]
    )


@pytest.mark.parametrize(
    ("rule", "changes"),
    [
        ({"name": "fedavg-lora"}, False),
        ({"name": "flexlora"}, False),
        ({"name": "rolora"}, False),  # of square layers
        ({"name": "krum"}, False),
        ({"name": "fedprox", "inner": {"name": "ffa-lora"}}, False),
        ({"name": "fedasync"}, False),  # one reply is a round
        ({"name": "fedbuff", "size": 3}, False),
        ({"name": "flora"}, True),
        ({"name": "fedex-lora"}, True),
        ({"name": "fedmomentum"}, True),
        ({"name": "exact-mixed-rank"}, True),
        ({"name": "fed-sb"}, True),
        ({"name": "fedprox", "inner": {"name": "fedex-lora"}}, True),
    ],
    ids=str,
)
def test_plan_names_a_total_of_bytes_only_where_all_rounds_are_alike(
    tiny_table: Table, tmp_path: Path, rule: dict[str, Any], changes: bool
) -> None:
    """What it names is what the run measures; where rounds differ it says so in words."""
    from fedft.server.forecast import as_text, forecast

    clock = {"fleet": {"speeds": [1.0, 2.0]}} if rule["name"] in {"fedasync", "fedbuff"} else {}
    table = tiny_table(strategy=rule, **clock)
    run, said = run_of(table, tmp_path / "r"), forecast(parse_config(table))
    assert said["bytes_per_round"] == run.rounds[0]["bytes"]
    assert said["bytes"] == (None if changes else run.metrics["bytes"])
    text = as_text(parse_config(table), said)
    assert ("bytes later" in text, "bytes in all" in text) == (changes, not changes)
    assert any(line["bytes"] != run.rounds[0]["bytes"] for line in run.rounds) == changes


def test_plan_counts_what_is_sent_to_spares(tiny_table: Table, tmp_path: Path) -> None:
    from fedft.server.forecast import as_text, forecast

    table = tiny_table(
        fleet={"speeds": [1.0, 2.0]}, rounds={"count": 2, "per-round": 3, "spares": 2}
    )
    run, said = run_of(table, tmp_path / "r"), forecast(parse_config(table))
    assert said["bytes_per_round"] == run.rounds[0]["bytes"]
    assert said["bytes"] == run.metrics["bytes"]
    assert "(3 clients and 2 to spare)" in as_text(parse_config(table), said)


def test_plan_weighs_each_rank_by_the_clients_that_have_it(tiny_table: Table) -> None:
    """Three of four clients with rank 2, one with 8: 3.5 on average, not 5."""
    from fedft.server.forecast import as_text, forecast

    def said(ranks: list[int]) -> dict[str, Any]:
        table = tiny_table(strategy={"name": "flexlora"}, fleet={"ranks": ranks})
        return forecast(parse_config(table))

    mixed, alone = said([2, 2, 2, 8]), {rank: said([rank]) for rank in (2, 8)}
    for way in ("up", "down"):
        two, eight = (alone[rank]["bytes_per_round"][way] for rank in (2, 8))
        assert mixed["bytes_per_round"][way] == round((3 * two + eight) / 4)
    table = tiny_table(strategy={"name": "flexlora"}, fleet={"ranks": [2, 2, 2, 8]})
    assert "about" in as_text(parse_config(table), mixed)


def test_stock_peft_loads_the_exported_adapter(tiny_table: Table, tmp_path: Path) -> None:
    """Law 8, row 70: the run's own logits from PeftModel.from_pretrained."""
    from peft import PeftModel
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    from fedft.clients.engines.loop import PeftEngine
    from fedft.core.models import load_base

    config = parse_config(tiny_table())
    run = run_of(tiny_table(), tmp_path / "run")
    folder = run.adapter("last").save_pretrained(tmp_path / "adapter")
    base = AutoModelForSequenceClassification.from_pretrained(config.model.source, num_labels=3)
    stock = PeftModel.from_pretrained(base, folder).eval()
    inputs = AutoTokenizer.from_pretrained(config.model.source)(
        "the old blade", return_tensors="pt"
    )
    inputs.pop("token_type_ids", None)
    ours = PeftEngine(load_base(config.model, config.lora, 3), config.lora)
    adapter = run.adapter("last").factors()
    ours._load(adapter, None)
    with torch.inference_mode():
        expected = ours._model(**inputs).logits
        assert expected.abs().max() > 0.1
        assert torch.allclose(stock(**inputs).logits, expected, atol=1e-5)


def test_a_stopped_run_is_resumable_and_ends_with_the_same_bytes(
    tiny_table: Table, tmp_path: Path
) -> None:
    whole = run_of(tiny_table(), tmp_path / "whole")
    asked = iter([False] * 5)
    with pytest.raises(Interrupted):
        run_of(tiny_table(), tmp_path / "cut", stop=lambda: next(asked, True))
    assert 0 < len(Run(tmp_path / "cut").rounds) < 4
    resume(tmp_path / "cut")
    cut = Run(tmp_path / "cut")
    assert cut.metrics["adapter_sha256"] == whole.metrics["adapter_sha256"]
    assert cut.metrics["history_sha256"] == whole.metrics["history_sha256"]
    assert without_seconds(cut.rounds) == without_seconds(whole.rounds)


def simulated(config: RunConfig, folder: Path, commits: bool) -> None:
    with pytest.MonkeyPatch.context() as patch:
        if not commits:
            patch.setattr(Checkpoints, "commit", lambda *_: None)
        simulate(config, folder)


def committed(folder: Path) -> list[dict[str, Any]]:
    """The lines of the rounds that a dead run had committed."""
    checkpoint = Checkpoints(folder / "checkpoints").load()
    return [] if checkpoint is None else Run(folder).rounds[: checkpoint.state.round]


def killed_runs(
    table: Mapping[str, Any], tmp_path: Path, forks: Forks, kills: int, *, commits: bool = True
) -> None:
    """Kill runs at random instants of their length, each in a child, and go on with them here."""
    config = parse_config(table)
    forks.warmed(simulated, config, tmp_path / "first", True)
    start = time.monotonic()
    assert forks.run(simulated, config, tmp_path / "whole", True) == 0
    length = time.monotonic() - start
    whole = Run(tmp_path / "whole")
    rng = random.Random(0)
    struck = 0
    for i in range(kills):
        folder = tmp_path / f"killed-{i}"
        child = forks.start(simulated, config, folder, commits)
        end = os.waitstatus_to_exitcode(forks.wait(child, rng.uniform(0.0, length)))
        assert end in (0, -signal.SIGKILL), "the run failed by itself"
        struck += end != 0
        done = committed(folder)
        if (folder / "config.toml").exists():
            again = Run(resume(folder).path)
        else:  # killed before the directory was claimed: nothing to resume, nothing lost
            again = Run(simulate(config, tmp_path / f"again-{i}").path)
        assert again.metrics["adapter_sha256"] == whole.metrics["adapter_sha256"]
        assert again.metrics["history_sha256"] == whole.metrics["history_sha256"]
        assert without_seconds(again.rounds) == without_seconds(whole.rounds)
        assert again.rounds[: len(done)] == done  # seconds and all: no committed round was redone
    assert struck >= kills // 4  # the harness did kill runs in the middle


@pytest.mark.crash
def test_twenty_random_kills_lose_nothing(tiny_table: Table, tmp_path: Path, forks: Forks) -> None:
    killed_runs(tiny_table(rounds={"count": 6, "evaluate-every": 3}), tmp_path, forks, kills=20)


@pytest.mark.crash
def test_the_kills_are_noticed_where_nothing_is_committed(
    tiny_table: Table, tmp_path: Path, forks: Forks
) -> None:
    """Positive control."""
    table = tiny_table(rounds={"count": 6, "evaluate-every": 3})
    with pytest.raises((AssertionError, IntegrityError)):
        killed_runs(table, tmp_path, forks, kills=20, commits=False)


@pytest.mark.crash
def test_random_kills_lose_no_job_that_is_under_way(
    tiny_table: Table, tmp_path: Path, forks: Forks
) -> None:
    """Asynchronous aggregation: sites are at work on old versions when the process dies."""
    table = tiny_table(
        fleet={"speeds": [1.0, 2.0, 10.0]},
        rounds={"count": 8, "evaluate-every": 4},
        strategy={"name": "fedbuff", "size": 2},
    )
    killed_runs(table, tmp_path, forks, kills=8)


@pytest.mark.slow
def test_two_hundred_random_kills_lose_nothing(
    tiny_table: Table, tmp_path: Path, forks: Forks
) -> None:
    killed_runs(tiny_table(rounds={"count": 6, "evaluate-every": 3}), tmp_path, forks, kills=200)


def test_resume_with_a_changed_configuration_is_refused_with_the_difference(
    tiny_table: Table, tmp_path: Path
) -> None:
    run_of(tiny_table(rounds={"count": 2}), tmp_path / "run")
    changed = parse_config(tiny_table(rounds={"count": 2}, training={"lr": 0.5}))
    with pytest.raises(ConfigError, match=r"\[training\] lr: 0\.01 → 0\.5"):
        resume(tmp_path / "run", changed=changed)


@pytest.mark.parametrize("cohort", [1, 4])
def test_a_run_that_is_short_of_memory_goes_on_with_gradient_checkpointing(
    tiny_table: Table, tmp_path: Path, stop_after: Callable[[int], Any], cohort: int
) -> None:
    """It changes no number, and a run may change it where it is resumed."""

    def table(small: bool) -> dict[str, Any]:
        return tiny_table(engine={"cohort": cohort, "gradient-checkpointing": small})

    whole = run_of(table(False), tmp_path / "whole")
    stop = stop_after(2)
    with pytest.raises(Interrupted):
        run_of(table(False), tmp_path / "run", trackers=[stop], stop=stop)
    ended = Run(resume(tmp_path / "run", changed=parse_config(table(True))).path)
    assert ended.metrics["adapter_sha256"] == whole.metrics["adapter_sha256"]


def test_a_fork_goes_on_with_changes_in_a_directory_of_its_own(
    tiny_table: Table, tmp_path: Path
) -> None:
    before = run_of(tiny_table(rounds={"count": 2}), tmp_path / "run")
    changed = parse_config(tiny_table(rounds={"count": 4}, strategy={"name": "ffa-lora"}))
    forked = Run(resume(fork(tmp_path / "run", tmp_path / "fork", changed)).path)
    assert forked.metrics["rounds"] == 4
    assert without_seconds(forked.rounds[:2]) == without_seconds(before.rounds)
    assert Run(tmp_path / "run").metrics == before.metrics
    with pytest.raises(ConfigError, match=r"\[lora\] rank"):
        fork(tmp_path / "run", tmp_path / "no", parse_config(tiny_table(lora={"rank": 2})))


def test_other_inputs_are_noticed_on_resume(
    tiny_table: Table, tiny_model: Path, tmp_path: Path
) -> None:
    """Rows 48, 49 and 53: the base model, the tokenizer, the data and the partition."""
    data, model = tmp_path / "data.jsonl", tmp_path / "model"
    data.write_text(Path(tiny_table()["data"]["source"]).read_text())
    shutil.copytree(tiny_model, model)
    table = tiny_table(data={"source": str(data)}, model={"source": str(model)})
    asked = iter([False] * 5)
    with pytest.raises(Interrupted):
        run_of(table, tmp_path / "run", stop=lambda: next(asked, True))
    files = {
        "data": (data, b"steel", b"stem"),
        "tokenizer": (model / "tokenizer.json", b'"[UNK]"', b'"[UNX]"'),
        "base model": (model / "model.safetensors", b"\x00\x00", b"\x00\x01"),
    }
    for what, (path, old, new) in files.items():
        before = path.read_bytes()
        head, tail = before[:4000], before[4000:]
        damaged = (
            head + tail.replace(old, new, 1) if what == "base model" else before.replace(old, new)
        )
        path.write_bytes(damaged)
        with pytest.raises((MismatchError, ConfigError), match=what):
            resume(tmp_path / "run")
        path.write_bytes(before)
    rows = tmp_path / "run" / "partition" / "rows.npy"
    before = rows.read_bytes()
    rows.write_bytes(before[:-4] + b"\x01\x00\x00\x00")
    with pytest.raises(IntegrityError, match="fingerprint"):
        resume(tmp_path / "run")
    rows.write_bytes(before)
    resume(tmp_path / "run")  # control


def test_a_run_of_real_clients_is_not_resumed_as_a_simulation(
    tiny_table: Table, tmp_path: Path
) -> None:
    run_of(tiny_table(rounds={"count": 2}), tmp_path / "run")
    resume(tmp_path / "run")  # control
    (tmp_path / "run" / "identity").mkdir()
    with pytest.raises(ConfigError, match="fedft serve"):
        resume(tmp_path / "run")


def test_patience_ends_a_run_early(tiny_table: Table, tmp_path: Path) -> None:
    settings = {"count": 30, "evaluate-every": 1, "patience": 2}
    table = tiny_table(rounds=settings, training={"lr": 1e-9})
    run = run_of(table, tmp_path / "run")
    assert run.metrics["status"] == "stopped early"
    assert run.metrics["rounds"] == 3  # one evaluation to set the best, two that do not beat it


def test_only_the_best_and_the_last_adapter_are_kept(tiny_table: Table, tmp_path: Path) -> None:
    run = run_of(tiny_table(rounds={"count": 6, "evaluate-every": 1}), tmp_path / "run")
    kept = sorted(p.name for p in (run.directory / "adapters").iterdir())
    assert kept == sorted({f"round-{int(run.metrics['best']['round']):04d}", "round-0006"})
    with pytest.raises(ConfigError, match="not kept"):
        run.adapter(1 if int(run.metrics["best"]["round"]) != 1 else 2)


def test_sites_judge_their_own_models_on_their_own_examples(
    tiny_table: Table, tmp_path: Path
) -> None:
    run = run_of(tiny_table(data={"holdout": 0.25}), tmp_path / "run")
    evaluated = [r for r in run.rounds if "eval" in r]
    assert all(0 <= r["sites"]["accuracy"] <= 1 and r["sites"]["n"] == 4 for r in evaluated)


def test_bfloat16_on_the_wire_halves_the_bytes(tiny_table: Table, tmp_path: Path) -> None:
    full = run_of(tiny_table(), tmp_path / "full")
    half = run_of(tiny_table(engine={"wire": "bf16"}), tmp_path / "half")
    assert half.rounds[0]["bytes"]["up"] * 2 == full.rounds[0]["bytes"]["up"]
    assert half.metrics["final"]["loss"] == pytest.approx(full.metrics["final"]["loss"], abs=0.05)


def test_a_rank_larger_than_a_layer_is_refused_before_training(
    tiny_table: Table, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="at most 32"):
        run_of(tiny_table(lora={"rank": 33}), tmp_path / "run")


@pytest.mark.parametrize("cohort", [1, 2])
def test_images_are_classified_by_parties_with_styles_of_their_own(
    tmp_path: Path, cohort: int
) -> None:
    from PIL import Image

    rows: list[str] = []
    for i in range(48):
        label, style = i % 2, ("pale", "dark")[i // 2 % 2]
        shade = (40 if style == "dark" else 160) + 60 * label
        Image.new("RGB", (8, 8), (shade, 255 - shade, i)).save(tmp_path / f"{i}.png")
        rows.append(json.dumps({"image": f"{i}.png", "label": str(label), "style": style}))
    (tmp_path / "rows.jsonl").write_text("\n".join(rows) + "\n")
    table = {
        "model": {"source": str(vit(tmp_path / "vit")), "task": "image-classification"},
        "lora": {"rank": 2, "target-modules": ["q_proj", "v_proj"]},
        "data": {
            "source": str(tmp_path / "rows.jsonl"),
            "partition": {"kind": "natural", "column": "style"},
        },
        "fleet": {"clients": 2},
        "rounds": {"count": 2, "per-round": 2, "evaluate-every": 1},
        "training": {"batch-size": 4},
        "engine": {"backend": "inline", "cohort": cohort},
    }
    run = run_of(table, tmp_path / "run")
    assert run.rounds[0]["cohort"] == ["dark", "pale"]
    assert run.rounds[1]["train"]["loss"] < run.rounds[0]["train"]["loss"]
