"""What `[training]` may say of local training, and how it travels."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers.trainer_utils import SchedulerType

from fedft.api import Run
from fedft.clients.policy import Policy, TrainFields, plan_of
from fedft.clients.resident import workbench
from fedft.core.errors import ConfigError, FedftError, Interrupted
from fedft.core.schedules import Schedule
from fedft.core.tasks.criterion import weights_of
from fedft.core.types import Adapter, Factors, LocalTraining, TrainPlan
from fedft.core.wire import codec
from fedft.server.config_file import parse_config, parse_toml
from fedft.server.local import forecast_training
from fedft.server.run import resume, simulate

EVERYTHING: dict[str, Any] = {
    "optimizer": {"name": "RMSprop", "alpha": 0.9},
    "schedule": {"name": "cosine-with-min-lr", "min-lr-rate": 0.1, "warmup-ratio": 0.2},
    "accumulate": 2,
    "label-smoothing": 0.1,
    "class-weights": "balanced",
    "neftune-alpha": 5.0,
}


ADAPTER = Adapter({"layer": Factors(torch.zeros(1, 2), torch.zeros(2, 1), 1.0)})


def local(table: dict[str, Any], rounds: int = 1) -> LocalTraining:
    return parse_config({"training": table}).training.local(rounds)


def told(training: LocalTraining) -> dict[str, Any]:
    content = codec.Encoder("{}").train(TrainPlan(ADAPTER, training=training, site="ann"))
    return codec.message_fields(content)


def test_a_plan_without_any_of_it_is_told_as_it_was() -> None:
    assert json.dumps(told(LocalTraining())["training"]) == (
        '{"epochs": 1, "steps": null, "batch_size": 8, "lr": 0.005, "optimizer": "adamw", '
        '"momentum": 0.0, "weight_decay": 0.0, "clip_norm": 1.0, "proximal_mu": 0.0, '
        '"tail_penalty": 0.0, "tail_keep": 1.0, "dp_noise": 0.0, "dp_clip": 1.0}'
    )


def test_all_of_it_travels_and_is_written_down() -> None:
    config = parse_config({"training": EVERYTHING})
    assert parse_toml(config.to_toml(), "x") == config
    training = config.training.local(7)
    assert training.options == {"alpha": 0.9}
    assert training.schedule == Schedule(
        "cosine_with_min_lr", warmup_ratio=0.2, options={"min_lr_rate": 0.1}, rounds=7
    )
    fields = told(training)
    assert LocalTraining.of_fields(fields["training"]) == training
    read = plan_of("train", json.dumps(fields))
    assert isinstance(read, TrainFields)
    assert read.training.local() == training
    Policy().check_training(training, 8, 100, 0)


@pytest.mark.parametrize(
    ("table", "said"),
    [
        ({"optimizer": "rmspop"}, "did you mean 'rmsprop'"),
        ({"optimizer": "LBFGS"}, "evaluates the loss several times"),
        ({"optimizer": "sparseadam"}, "sparse gradients"),
        ({"optimizer": "Optimizer"}, "torch.optim has no"),
        ({"optimizer": {"name": "adam", "alpha": 1}}, "no option 'alpha'; it has betas, eps"),
        ({"optimizer": {"name": "adamw", "lr": 1}}, "no option 'lr'"),
        ({"optimizer": {"name": "adamw", "fused": True}}, "no option 'fused'"),
        ({"optimizer": {"name": "adamw", "betas": [2, 0.9]}}, "Invalid beta parameter"),
        ({"optimizer": {"name": "adamw", "betas": 3}}, "optimizer adamw"),
        ({"optimizer": {"name": "sgd", "nesterov": True}}, "dampening; momentum is a key of"),
        ({"optimizer": {"alpha": 1}}, "needs its name"),
        ({"optimizer": {"name": "adam", "weight-decay": 0.1}, "weight-decay": 0.1}, "among the"),
        ({"optimizer": "rprop", "weight-decay": 0.1}, "rprop has none"),
        ({"optimizer": "adam", "momentum": 0.9}, "adam has none; leave it out"),
        ({"momentum": 0.9}, "momentum = 0.9: adamw has none"),
        ({"schedule": "cosin"}, "is none of linear, cosine"),
        ({"schedule": "reduce_lr_on_plateau"}, "is no function of the step"),
        ({"schedule": {"name": "cosine", "powr": 1}}, "no option 'powr'"),
        ({"schedule": {"name": "cosine", "warmup-step": 1}}, "did you mean 'warmup_steps'"),
        ({"schedule": {"name": "cosine", "over": "epoch"}}, "'run' or 'round' is expected"),
        ({"schedule": {"name": "linear", "warmup-steps": -1}}, "must be at least 0"),
        ({"schedule": {"name": "linear", "warmup-steps": 1, "warmup-ratio": 0.1}}, "say the same"),
        ({"schedule": {"name": "constant", "warmup-steps": 1}}, "constant_with_warmup"),
        ({"schedule": {"name": "cosine_with_min_lr"}}, "min_lr"),
        ({"schedule": {"name": "polynomial", "lr-end": 1.0}}, "lr_end"),
        ({"accumulate": 0}, "accumulate"),
        ({"label-smoothing": 1.0}, "less than 1"),
        ({"class-weights": "even"}, "class-weights"),
        ({"class-weights": {"a": 0.0}}, "a number above 0"),
        ({"neftune-alpha": -1}, "neftune-alpha"),
        ({"accumulate": 2, "dp": {}}, "draws every step's batch anew"),
        ({"class-weights": "balanced", "dp": {}}, "relative to others"),
    ],
)
def test_what_cannot_be_is_refused(table: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        local(table)


@pytest.mark.parametrize(
    ("task", "table", "said"),
    [
        ("causal-lm", {"class-weights": "balanced"}, "causal-lm has no classes to weigh"),
        ("regression", {"label-smoothing": 0.1}, "the loss of regression is no cross-entropy"),
        ("multi-label", {"class-weights": {"a": 2.0}}, "multi-label has no classes to weigh"),
        ("seq2seq", {"neftune-alpha": 5.0}, "an encoder and a decoder"),
        ("image-classification", {"neftune-alpha": 5.0}, "reads no text"),
    ],
)
def test_what_a_task_cannot_do_is_refused_by_name(
    task: str, table: dict[str, Any], said: str
) -> None:
    with pytest.raises(ConfigError, match=said):
        parse_config({"model": {"task": task}, "training": table})
    parse_config({"model": {"task": "causal-lm"}, "training": {"label-smoothing": 0.1}})


@pytest.mark.parametrize(
    "change",
    [
        {"optimizer": "LBFGS"},
        {"optimizer": "AdamW"},
        {"optimizer": "os.system"},
        {"options": {"foreach": True}},
        {"options": {"betas": [5.0, 0.9]}},
        {"accumulate": 0},
        {"class_weights": {"a": -1.0}},
        {"label_smoothing": 1.0},
        {"schedule": {"name": "greedy"}},
        {"unknown": 1},
    ],
)
def test_a_client_refuses_what_no_server_of_ours_asks(change: dict[str, Any]) -> None:
    fields = told(LocalTraining())
    fields["training"] |= change
    with pytest.raises(FedftError, match=r"plan cannot be used: training"):
        plan_of("train", json.dumps(fields))


def test_a_policy_counts_the_examples_of_a_step() -> None:
    own = LocalTraining(batch_size=64, accumulate=4, epochs=2)
    Policy(most_batch_size=256, most_steps=8).check_training(own, 8, 1000, 0)
    for policy in (Policy(most_batch_size=255), Policy(most_steps=7)):
        with pytest.raises(FedftError, match="does not allow"):
            policy.check_training(own, 8, 1000, 0)


def test_balanced_weights_are_scikit_learns() -> None:
    targets = np.array([0, 0, 0, 2, 2, 3, -100, -100])
    own = LocalTraining(class_weights="balanced")
    found = weights_of(own, ["a", "b", "c", "d"], targets)
    assert found == pytest.approx((6 / (3 * 3), 1.0, 6 / (3 * 2), 6 / (3 * 1)), rel=1e-12)
    named = replace(own, class_weights={"c": 2.5})
    assert weights_of(named, ["a", "b", "c"], targets) == (1.0, 1.0, 2.5)
    assert weights_of(own, ["a"], np.array([-100])) == (1.0,)


# ── runs ──────────────────────────────────────────────────────────────────────────────────────


def run_of(table: dict[str, Any], folder: Path, **options: Any) -> Run:
    return Run(simulate(parse_config(table), folder, **options).path)


def test_a_run_with_all_of_it_is_the_same_in_both_engines_and_after_a_stop(
    tiny_table: Any, tmp_path: Path
) -> None:
    def table(cohort: int) -> dict[str, Any]:
        made = tiny_table()
        made["training"] = {**EVERYTHING, "batch-size": 2, "lr": 5e-3}
        made["engine"] = {**made.get("engine", {}), "cohort": cohort}
        return made

    whole = run_of(table(2), tmp_path / "whole")
    loop = run_of(table(1), tmp_path / "loop")
    for key, tensor in loop.adapter("last").factors().tensors().items():
        other = whole.adapter("last").factors().tensors()[key]
        assert float((other - tensor).abs().max()) < 1e-4, key
    asked = iter([False] * 5)
    with pytest.raises(Interrupted):
        run_of(table(2), tmp_path / "cut", stop=lambda: next(asked, True))
    assert 0 < len(Run(tmp_path / "cut").rounds) < 4
    resume(tmp_path / "cut")
    cut = Run(tmp_path / "cut")
    assert cut.metrics["adapter_sha256"] == whole.metrics["adapter_sha256"]
    assert cut.metrics["history_sha256"] == whole.metrics["history_sha256"]


def test_plan_says_steps_and_rates(tiny_table: Any) -> None:
    made = tiny_table()
    made["training"] = {
        "batch-size": 2, "accumulate": 2, "steps": 5, "lr": 0.4,
        "schedule": {"name": "linear", "warmup-steps": 4},
    }  # fmt: skip
    made["rounds"] = {**made["rounds"], "count": 4}
    config = parse_config(made)
    found = forecast_training(config, 60)
    assert (found["steps"], found["steps_in_all"], found["step_rows"]) == (5, 20, 4)
    assert found["lr"] == {"start": 0.0, "peak": 0.4, "end": pytest.approx(0.4 / 16)}
    made["training"]["schedule"]["over"] = "round"
    found = forecast_training(parse_config(made), 60)
    assert found["lr"] == {"start": 0.0, "peak": 0.4, "end": 0.4}


@pytest.mark.parametrize(
    ("training", "said"),
    [
        ({"class-weights": {"nowhere": 2.0}}, "there is no class 'nowhere'"),
        ({"optimizer": "Muon"}, "only supports 2D parameters"),
    ],
)
def test_what_does_not_go_with_the_data_is_refused_before_the_first_round(
    training: dict[str, Any], said: str, tiny_table: Any, tmp_path: Path
) -> None:
    workbench.cache_clear()
    with pytest.raises(FedftError, match=said):
        run_of({**tiny_table(), "training": training}, tmp_path / "run")


def test_the_documentations_table_is_a_configuration() -> None:
    page = (Path(__file__).parents[2] / "docs" / "training.md").read_text(encoding="utf-8")
    (shown,) = re.findall(r"```toml\n(.*?)```", page, re.DOTALL)
    training = parse_toml(shown, "docs/training.md").training.local(3)
    assert (training.step_rows, training.optimizer) == (32, "rmsprop")
    names = [kind.value for kind in SchedulerType]
    told = [name for name in names if f"`{name}`" in page]
    assert {*names} - {*told} == {"reduce_lr_on_plateau", "greedy"}
