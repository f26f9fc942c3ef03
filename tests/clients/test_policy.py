"""A policy in a file and in options; a file in its owner's words; what a check shows."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from fedft.cli import cli
from fedft.clients.agreed import Agreement
from fedft.clients.join import KeptParts
from fedft.clients.own import Own, mapping
from fedft.clients.policy import Policy, TrainFields, plan_of
from fedft.clients.worker import Resident, Site
from fedft.core import models
from fedft.core.data.source import load
from fedft.core.errors import ConfigError, MismatchError, SecurityRefusal
from fedft.core.link import codes
from fedft.core.link import link_pb2 as pb
from fedft.core.link.framing import data_schema
from fedft.core.spec import DataSpec, LoraSpec, ModelSpec, TaskSpec
from fedft.core.sublayers import Sublayer
from fedft.core.tasks import TASKS
from fedft.core.training_table import DPSpec, TrainingSpec
from fedft.core.types import Adapter, EvalPlan, LocalTraining
from fedft.core.types import Site as Member
from fedft.core.wire import codec
from fedft.strategies import RULES, Strategy
from tests.clients.evil import Evil, meet

# ── the table ─────────────────────────────────────────────────────────────────────────────────


def test_a_file_with_options_over_it(tmp_path: Path) -> None:
    path = tmp_path / "policy.toml"
    path.write_text('least-noise = 1.0\nmost-epsilon = 8\ntasks = ["causal-lm"]\nmetrics = false\n')
    found = Policy.read(path, {"most_epsilon": 2.5, "least_noise": None, "metrics": None})
    assert found == Policy(least_noise=1.0, most_epsilon=2.5, tasks=("causal-lm",), metrics=False)
    assert Policy.read(None, {"least_noise": None}) == Policy()


@pytest.mark.parametrize(
    ("text", "options", "said"),
    [
        ("most-round = 3", {}, "most-round = 3: unknown key"),
        ("most-rounds = 0", {}, "most-rounds = 0: must be greater than 0"),
        ("most-rounds = true", {}, "a number is expected"),
        ("most-epsilon = nan", {}, "most-epsilon = nan: must be a finite number"),
        ("most-seconds = inf", {}, "must be a finite number"),
        ("most-epsilon = -1", {}, "must be greater than 0"),
        ("delta = 1.0", {}, "must be less than 1"),
        ('models = ["abc"]', {}, "models"),
        ('sources = ["/srv/*"]', {}, "wheel:*"),
        ('tasks = ["generation"]', {}, "tasks"),
        ("most-steps = " + "9" * 30, {}, "less than 19 digits"),
        ("a = [", {}, "is not valid TOML"),
        ("", {"most_epochs": 0}, "--most-epochs = 0: must be greater than 0"),
        ("", {"delta": float("nan")}, "--delta = nan"),
    ],
)
def test_what_is_no_policy_is_one_sentence(
    text: str, options: dict[str, Any], said: str, tmp_path: Path
) -> None:
    path = tmp_path / "policy.toml"
    path.write_text(text)
    with pytest.raises(ConfigError) as error:
        Policy.read(path, options)
    assert said in str(error.value) and "pydantic" not in str(error.value)
    assert error.value.what.count("\n") == 0


def test_every_condition_has_a_line_for_its_owner() -> None:
    shown = "\n".join(Policy().lines())
    changed: dict[str, Any] = {
        "least_noise": 1.25,
        "most_epsilon": 7.5,
        "delta": 3e-7,
        "models": ("0" * 64,),
        "classes": ("a", "b"),
        "metrics": False,
        "sources": ("my/model",),
        "tasks": ("causal-lm",),
        "trainers": ("their_module:make_trainer",),
    }
    for name, field in Policy.model_fields.items():
        value = changed.get(name, 4321)
        assert field.default != value
        other = "\n".join(Policy.model_construct(**{name: value}).lines())  # whoever may be named
        assert other != shown, f"{name} is not shown"


# ── words ─────────────────────────────────────────────────────────────────────────────────────


def test_only_words_of_the_list_leave() -> None:
    assert codes.reason("data", "row 3 is bad") == "data"
    assert codes.reason("/etc/passwd: row 3") == "failed"
    assert codes.reason("data", "x" * 9999, send_details=True) == f"data: {'x' * 494}"
    assert codes.told("data") == "its data do not fit the task (data)"
    assert codes.told("data: row 3") == "its data do not fit the task (data): row 3"
    assert codes.told("by hand") == "by hand", "what another client says is told as it came"
    assert len(codes.told("x" * 10**6)) == codes.LONGEST
    assert len(set(codes.NUMBERS.values())) == len(codes.SENTENCES)


def test_an_error_keeps_the_word_that_it_had_first() -> None:
    with pytest.raises(MismatchError) as error, codes.under("task"), codes.under("model"):
        raise MismatchError("x")
    assert codes.word_of(error.value) == "model"
    assert codes.word_of(KeyError("x")) == "failed"
    assert codes.word_of(MemoryError()) == "environment"


# ── a file in its owner's words ───────────────────────────────────────────────────────────────


def test_labels_have_other_names_in_the_run(tmp_path: Path) -> None:
    path = tmp_path / "d.csv"
    path.write_text("text,label\na,1\nb, beast \nc,2.0\nd,1\n")
    spec = Own().data(DataSpec(), str(path))
    relabel = mapping(["1=plant", "2=tool", "beast=animal"])
    raw = load(spec, "classification", classes=("animal", "plant", "tool"), relabel=relabel)
    assert raw.train.labels is not None and raw.train.labels.tolist() == [1, 0, 2, 1]
    with pytest.raises(ConfigError, match="no label '3'"):
        load(spec, "classification", classes=("animal", "plant"), relabel={"3": "plant"})
    with pytest.raises(MismatchError, match="is none of the 3 classes"):
        load(spec, "classification", classes=("animal", "plant", "tool"))
    few = load(spec, "classification", classes=("animal", "plant"), relabel=relabel, most_rows=2)
    assert len(few.train) == 2


@pytest.mark.parametrize("pairs", [["a"], ["=b"], ["a="], ["a=b", " a =c"], [" = "]])
def test_what_is_no_mapping(pairs: list[str]) -> None:
    with pytest.raises(ConfigError, match="--map-label"):
        mapping(pairs)
    assert mapping(["a=b=c", "x y = z"]) == {"a": "b=c", "x y": "z"}
    with pytest.raises(ConfigError, match="--max-rows"):
        Own(most_rows=0)


def test_of_a_servers_table_nothing_is_left_but_lengths() -> None:
    theirs = DataSpec(
        source="/etc/passwd",
        subset="x",
        split="secret",
        test_source="/etc/shadow",
        text="ssn",
        label="diagnosis",
        skip_bad=True,
        max_length=7,
        holdout=0.5,
        columns={"pair": "passport"},
    )
    own = Own().data(theirs, "mine.csv")
    assert own == DataSpec(
        source="mine.csv",
        max_length=7,
        holdout=0.5,
        test_fraction=0.0,
        partition=own.partition,
    )


def test_columns_without_an_option_of_their_own_go_by_key(tiny_model: Path) -> None:
    """The server's names are offered, never taken."""
    model = ModelSpec(source=str(tiny_model), task="text-pair")
    theirs = DataSpec(text="left", columns={"pair": "right"})
    task = TaskSpec(model=model, lora=LoraSpec(), data=theirs)
    assert "--text left --column pair=right" in Own().suggestion(task)
    mine = Own(text="left", columns={"pair": "right"})
    assert mine.suggestion(task) == ""
    assert mine.data(theirs, "mine.csv").column("pair") == "right"
    assert Own().data(theirs, "mine.csv").column("pair") == "pair"
    with pytest.raises(ConfigError, match="--column pair is no KEY=NAME"):
        mapping(["pair"], "--column", "KEY=NAME")


def test_a_policy_names_tasks_that_there_are() -> None:
    assert set(Policy().tasks) == set(TASKS)
    with pytest.raises(ConfigError, match=r"tasks.*did you mean 'text-pair'"):
        Policy.read(None, {"tasks": ["text-pairs"]})


# ── --check ───────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def task(tiny_model: Path) -> TaskSpec:
    return TaskSpec(
        model=ModelSpec(source=str(tiny_model)),
        lora=LoraSpec(rank=4, alpha=8),
        data=DataSpec(source="own", holdout=0.2, max_length=4),
        classes=("animal", "plant", "tool", "none such"),
    )


@pytest.fixture
def data(tiny_data: Path, tmp_path: Path) -> Path:
    path = tmp_path / "own.jsonl"
    path.write_text("\n".join([*tiny_data.read_text().splitlines()[:30], "{"]) + "\n")
    return path


def said_by(task: TaskSpec, model: Path) -> pb.Task:
    hashes = {**models.fingerprint(model), "data_schema": data_schema(task, task.classes)}
    return pb.Task(run="run", spec=task.model_dump_json(), hashes=pb.Hashes(**hashes))


@pytest.mark.grpc
def test_a_check_shows_what_would_be_trained_and_offers_nothing(
    task: TaskSpec, data: Path, tiny_model: Path, tmp_path: Path
) -> None:
    site = Site(data, model=str(tiny_model), ledger=tmp_path / "ledger", own=Own(skip_bad=True))
    evil = Evil([said_by(task, tiny_model)])
    said, error = meet(evil, site, tmp_path / "checked", check=True)
    assert error is None and evil.goodbyes == ["looked"] and not evil.offers
    shown = "\n".join(said)
    assert "24 rows to train on, 6 held out" in shown and "left out: malformed 1" in shown
    for line in ("  animal: 10", "  plant: 10", "  tool: 10", "  none such: 0"):
        assert line in said
    assert "rows are longer than 4 tokens and are cut" in shown
    assert [line for line in Policy().lines() if f"  {line}" not in said] == []
    assert said[-1].startswith("this was a check") and not list((tmp_path / "ledger").glob("*"))


def test_a_check_of_a_task_that_was_joined_needs_no_server(
    task: TaskSpec, data: Path, tiny_model: Path, tmp_path: Path
) -> None:
    agreed = Agreement(tmp_path / "task.json")
    agreed.check("run", task)
    said: list[str] = []
    site = Site(data, model=str(tiny_model), own=Own(skip_bad=True), ledger=tmp_path / "ledger")
    kept = KeptParts(tmp_path / "kept")
    known = agreed.task()
    assert known is not None
    Resident("ann", site, kept, said.append, agreed, True).looked(*known)
    assert any("24 rows to train on" in line for line in said)
    strict = replace(site, policy=Policy(most_rank=2))
    with pytest.raises(SecurityRefusal, match="most-rank"):
        Resident("ann", strict, kept, said.append, agreed, True).looked(*known)


_SINGULAR = {"models": "model-sha256", "tasks": "task", "trainers": "trainer"}


def test_the_options_of_the_command(tmp_path: Path, tiny_data: Path) -> None:
    """What a file can say that a command line would, has an option; a wrong one is a sentence."""

    def fedft(*arguments: object) -> Any:
        wide = {"COLUMNS": "200", "TERMINAL_WIDTH": "200", "NO_COLOR": "1"}
        return CliRunner().invoke(cli, [*map(str, arguments)], env=wide)

    shown = fedft("join", "--help").output
    for option in ("--policy", "--check", "--send-details", "--map-label", "--max-rows", "--text"):
        assert option in shown
    for name in Policy.model_fields:
        option = _SINGULAR.get(name, name.replace("_", "-"))
        in_file_only = name in ("most_rank", "most_parameters", "most_length", "sources", "classes")
        assert (f"--{option}" in shown) != in_file_only, name
    join = ("join", tmp_path / "a.kit", "--data", tiny_data)
    wrong = fedft(*join, "--most-rounds", 0).exception
    assert isinstance(wrong, ConfigError) and "--most-rounds = 0: must be" in str(wrong)
    policy = tmp_path / "policy.json"
    policy.write_text("{}")
    wrong = fedft(*join, "--policy", policy).exception
    assert isinstance(wrong, ConfigError) and "is not valid TOML" in str(wrong)
    wrong = fedft(*join, "--policy", policy.with_suffix(".none")).exception
    assert isinstance(wrong, ConfigError) and "cannot read" in str(wrong)


# ── honest plans ──────────────────────────────────────────────────────────────────────────────


def adapter(model: Path, rank: int = 3) -> Adapter:
    lora = LoraSpec(rank=rank)
    shapes = models.schema(ModelSpec(source=str(model)), lora, 3)
    return models.initial_adapter(shapes, lora, rank, 0)


@pytest.mark.parametrize("rule", [r for r in RULES if r().supports("lora")])
def test_the_plans_of_every_rule_pass(rule: type[Strategy], tiny_model: Path) -> None:
    """As strict as a client is with a plan, and as it is without options."""
    made = rule()
    state = made.init(adapter(tiny_model))
    for rank in (None, 2) if made.mixed_ranks else (None,):
        asked = TrainingSpec(dp=DPSpec(), clip_norm=0).local()
        plan = replace(made.plan(state, Member("ann", 9, rank=rank)), site="ann", round=3)
        for training in (asked.overlaid(plan.training), LocalTraining(steps=7)):
            content = codec.Encoder("{}").train(replace(plan, training=training))
            fields = plan_of("train", json.dumps(codec.message_fields(content)))
            assert isinstance(fields, TrainFields)
            assert fields.training.local() == replace(training, asked=())
            Policy().check_training(fields.training.local(), fields.rank, 1000, 0)


@pytest.mark.parametrize("layers", [None, (0, 2), (Sublayer(1, "attention"), 2)])
@pytest.mark.parametrize("probe", [None, "block-influence", "ablation"])
def test_plans_to_judge_pass(layers: Any, probe: Any, tiny_model: Path) -> None:
    for split in ("test", "holdout"):
        plan = EvalPlan(adapter(tiny_model), split=split, layers=layers, probe=probe, site="ann")
        content = codec.Encoder("{}").evaluate(plan)
        fields = plan_of("evaluate", json.dumps(codec.message_fields(content)))
        assert fields.layers is None or tuple(fields.layers) == layers
