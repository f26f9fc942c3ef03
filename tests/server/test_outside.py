"""Runs of rules from outside: recorded, resumed on the user's word, never imported on a directory's."""

import json
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import pytest

import fedft
from fedft import cli
from fedft.clients.given import task_of
from fedft.clients.policy import Policy
from fedft.core.errors import ConfigError, Interrupted, MismatchError, SecurityRefusal
from fedft.core.plugins import RECORD, REMOTE, USER, reference_of, trust_process
from fedft.core.tasks import REGISTRY as TASKS
from fedft.core.terms import REGISTRY as METHODS
from fedft.core.terms import terms_from
from fedft.core.types import Adapter, ClientUpdate, ServerState, Site, TrainPlan
from fedft.core.wire import compress
from fedft.report import write_report
from fedft.server.app import configuration
from fedft.server.config_file import parse_config, parse_toml
from fedft.server.run import fork, resume, simulate
from fedft.strategies import REGISTRY, FedAvgLoRA, FedProx
from fedft.trackers import REGISTRY as TRACKERS
from fedft.trackers import Tracker

Table = Callable[..., dict[str, Any]]
NAME = "outside_rules:Damped"
CODE = """
from pathlib import Path
from dataclasses import replace
from fedft.strategies import FedAvgLoRA
with Path(__file__).with_name("imports").open("a") as log:
    log.write("x")
class Damped(FedAvgLoRA):
    step: float = 0.5
    @property
    def uses_mean_only(self):
        return False
    def combine(self, state, updates):
        after = super().combine(state, updates).adapter.tensors()
        old = state.adapter.tensors()
        moved = {n: old[n].lerp(t, self.step) for n, t in after.items()}
        return replace(state, adapter=state.adapter.replaced(moved))
"""


class Halved(FedAvgLoRA):
    """Another name for FedAvg-LoRA, with a value of its own."""

    share: float = 0.5


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A module of somebody else's on the import path; it counts its imports."""
    folder = tmp_path / "code"
    folder.mkdir()
    (folder / "outside_rules.py").write_text(CODE)
    monkeypatch.syspath_prepend(folder)
    forget(monkeypatch)
    return folder


def forget(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a new process."""
    monkeypatch.delitem(sys.modules, "outside_rules", raising=False)
    monkeypatch.setattr(REGISTRY, "_known", {})


def imports(module: Path) -> int:
    log = module / "imports"
    return len(log.read_text()) if log.exists() else 0


@pytest.fixture
def paused(
    module: Path, tiny_table: Table, tmp_path: Path, stop_after: Any, monkeypatch: Any
) -> Iterator[tuple[Path, dict[str, Any]]]:
    """A run of a foreign rule, stopped after its first round, as another process finds it."""
    table = tiny_table(rounds={"count": 3}, strategy={"name": NAME, "step": 0.25})
    stop = stop_after(1)
    with pytest.raises(Interrupted):
        simulate(parse_config(table, trust=USER), tmp_path / "run", trackers=[stop], stop=stop)
    forget(monkeypatch)
    (module / "imports").unlink()
    yield tmp_path / "run", table


def command(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["fedft", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
        raise SystemExit(0)
    return int(ended.value.code or 0)


def test_the_run_records_where_its_rule_came_from(paused: Any, module: Path) -> None:
    run, _ = paused
    recorded = json.loads((run / "environment.json").read_text())["plugins"]
    assert recorded.keys() == {NAME}
    assert recorded[NAME]["class"] == NAME
    assert len(recorded[NAME]["sha256"]) == 64
    assert "step = 0.25" in (run / "config.toml").read_text()


def test_a_run_of_our_own_rules_records_nothing_more(tiny_table: Table, tmp_path: Path) -> None:
    run = simulate(parse_config(tiny_table(rounds={"count": 1})), tmp_path / "run")
    assert "plugins" not in run.environment()


def test_nothing_that_reads_a_run_directory_imports_what_it_names(
    paused: Any, module: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, table = paused
    with pytest.raises(SecurityRefusal, match=f"--allow {NAME}"):
        resume(run)
    with pytest.raises(SecurityRefusal):
        fork(run, tmp_path / "fork", None)
    assert command(monkeypatch, "resume", run) == 7
    assert command(monkeypatch, "resume", run, "--allow", "outside_rules:Other") == 7
    assert command(monkeypatch, "resume", run, "--set", "engine.workers=1") == 7
    assert command(monkeypatch, "export", run, "-o", tmp_path / "out", "--round", "last") in (0, 2)
    write_report([run], tmp_path / "report.html")
    other = simulate(parse_config({**table, "strategy": {"name": "fedavg-lora"}}), tmp_path / "b")
    older = (other.path / "config.toml").read_text().replace("spares = 0\n", "")
    (other.path / "config.toml").write_text(older)  # an older version wrote fewer keys
    write_report([run, other.path], tmp_path / "both.html")
    assert imports(module) == 0
    assert command(monkeypatch, "resume", run, "--allow", NAME) == 0
    assert imports(module) == 1, "the control: an import is counted"


@pytest.mark.parametrize("how", ["allow", "set", "python", "class"])
def test_the_users_word_resumes_it_to_the_same_bytes(
    paused: Any, module: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    run, table = paused
    if how == "allow":
        assert command(monkeypatch, "resume", run, "--allow", NAME) == 0
    elif how == "set":
        assert command(monkeypatch, "resume", run, "--set", f"strategy.name={NAME}") == 0
    elif how == "python":
        fedft.resume(run, allow=[NAME])
    else:
        import outside_rules  # type: ignore[import-not-found]

        fedft.resume(run, allow=[outside_rules.Damped])
    whole = simulate(parse_config(table, trust=USER), tmp_path / "whole")
    assert fedft.Run(run).metrics["adapter_sha256"] == whole.summary()["adapter_sha256"]
    assert fedft.Run(run).metrics["history_sha256"] == whole.summary()["history_sha256"]


def test_other_code_than_at_the_start_is_told(paused: Any, module: Path) -> None:
    run, _ = paused

    class Notes(Tracker):
        said: ClassVar[list[str]] = []

        def note(self, text: str) -> None:
            self.said.append(text)

    (module / "outside_rules.py").write_text(CODE + "# changed\n")
    resume(run, trust=RECORD.also([NAME]), trackers=[Notes()])
    (told,) = [text for text in Notes.said if NAME in text]
    assert told.endswith("the rest of this run is not bit-exact")


def test_a_fork_to_a_foreign_rule_records_it(
    module: Path, tiny_table: Table, tmp_path: Path
) -> None:
    old = simulate(parse_config(tiny_table(rounds={"count": 1})), tmp_path / "old")
    table = tiny_table(rounds={"count": 2}, strategy={"name": NAME})
    new = fork(old.path, tmp_path / "new", parse_config(table, trust=USER))
    assert json.loads((new / "environment.json").read_text())["plugins"].keys() == {NAME}
    assert resume(new).summary()["rounds"] == 2, "this process knows the class"


def test_objects_from_python(tiny_table: Table, tmp_path: Path) -> None:
    table = parse_config(tiny_table(rounds={"count": 2}))
    run = fedft.simulate(table, strategy=Halved(share=0.75), run_dir=tmp_path / "run")
    named = (run.directory / "config.toml").read_text()
    assert f'name = "{reference_of(Halved)}"' in named and "share = 0.75" in named
    default = fedft.simulate(table, strategy=FedProx(mu=0.5), run_dir=tmp_path / "prox")
    assert "mu = 0.5" in (default.directory / "config.toml").read_text()


def test_objects_are_compared_and_the_comparison_goes_on(tiny_table: Table, tmp_path: Path) -> None:
    table = parse_config(tiny_table(rounds={"count": 1}))

    def compared(seeds: list[int]) -> fedft.Comparison:
        rules = ["fedavg-lora", Halved(share=0.75)]
        return fedft.compare(table, strategies=rules, seeds=seeds, run_dir=tmp_path / "c")

    first = compared([0])
    assert [run.directory.name for run in first.runs] == ["fedavg-lora-seed0", "Halved-seed0"]
    a, b = (run.metrics["adapter_sha256"] for run in first.runs)
    assert a == b, "another name for the same rule"
    assert len(compared([0, 1]).runs) == 4
    assert {row.label for row in first.table().rows} == {"fedavg-lora", "Halved"}


def test_a_comparison_that_names_foreign_code_is_not_believed(
    module: Path, tiny_table: Table, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    foreign = parse_config(tiny_table(rounds={"count": 1}, strategy={"name": NAME}), trust=USER)
    fedft.compare(foreign, strategies=[NAME], seeds=[0], run_dir=tmp_path / "c")
    forget(monkeypatch)
    before = imports(module)
    own = parse_config(tiny_table(rounds={"count": 1}))
    with pytest.raises(SecurityRefusal):
        fedft.compare(own, strategies=["fedavg-lora"], seeds=[0], run_dir=tmp_path / "c")
    assert imports(module) == before
    with pytest.raises(ConfigError, match="compares another configuration"):
        fedft.compare(
            own, strategies=["fedavg-lora"], seeds=[0], run_dir=tmp_path / "c", allow=[NAME]
        )


def test_a_bundle_of_flowers_names_installed_rules_only(
    module: Path, tmp_path: Path, tiny_table: Table
) -> None:
    config = tmp_path / "config.toml"
    config.write_text(f'[strategy]\nname = "{NAME}"\n')
    with pytest.raises(SecurityRefusal):
        configuration({"config": str(config), "set": ""})
    config.write_text("")
    with pytest.raises(SecurityRefusal):
        configuration({"config": str(config), "set": f"strategy.name={NAME}"})
    assert imports(module) == 0
    assert configuration({"config": str(config), "set": "strategy.name=fedprox"})


def test_a_class_of_a_script_runs_and_says_how_it_is_resumed(tmp_path: Path) -> None:
    """In a process of its own: ``__main__`` is the script there."""
    script = tmp_path / "script.py"
    script.write_text(
        textwrap.dedent(
            """
            import sys
            from fedft.server.config import RunConfig
            from fedft.server.config_file import configured, parse_toml
            from fedft.core.plugins import RECORD
            from fedft.strategies import REGISTRY, FedAvgLoRA

            class Mine(FedAvgLoRA):
                step: float = 1.0

            config = RunConfig(strategy=Mine(step=2.0))
            assert config.strategy.name == "__main__:Mine"
            assert configured(config, {"seed": 1}).strategy == config.strategy
            REGISTRY._known.clear()
            assert parse_toml(config.to_toml(), "x", RECORD.also([Mine])).strategy.step == 2.0
            """
        )
    )
    subprocess.run([sys.executable, str(script)], check=True, timeout=120)


def test_a_compressor_from_outside_is_imported_by_workers_and_by_no_real_client(
    tiny_table: Table, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "tests.core.top_k:TopK"
    engine = {
        "backend": "processes",
        "workers": 1,
        "compressor": {"name": name, "share": 0.5},
        "verify": False,
    }
    table = tiny_table(rounds={"count": 1}, engine=engine)
    config = parse_config(table, trust=USER)
    assert parse_toml(config.to_toml(), "x") == config
    run = simulate(config, tmp_path / "run")
    assert run.environment()["plugins"].keys() == {name}
    assert run.rounds()[0]["failures"] == {}
    monkeypatch.setattr(compress.REGISTRY, "_known", {})
    with pytest.raises(SecurityRefusal, match=f"--allow {name}"):
        resume(run.path)
    asked = config.task(wire={"name": name}).model_dump_json()
    monkeypatch.setattr(compress.REGISTRY, "_known", {})
    with pytest.raises(MismatchError, match="in a way that this client does not know"):
        task_of(asked)
    assert task_of(config.task(wire="int8").model_dump_json()).wire == "int8"


STRANGERS = {kind: f"tests.strangers:{kind}" for kind in ("Softened", "Shrinking", "Lines")}


def as_in_a_new_process(monkeypatch: pytest.MonkeyPatch) -> None:
    for registry in (TASKS, METHODS, TRACKERS):
        monkeypatch.setattr(registry, "_known", {})


def test_a_task_a_method_and_a_tracker_from_outside_run_in_workers(
    tiny_table: Table, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = tiny_table(rounds={"count": 2})
    plain = simulate(parse_config(table), tmp_path / "plain").summary()
    table["model"] = {**table.get("model", {}), "task": STRANGERS["Softened"]}
    method = {"kind": STRANGERS["Shrinking"], "strength": 0.5}
    table["training"] = {**table.get("training", {}), "method": method}
    table["track"] = {"trackers": [STRANGERS["Lines"]]}
    table["engine"] = {**table.get("engine", {}), "backend": "processes", "workers": 1}
    config = parse_config(table, trust=USER)
    assert parse_toml(config.to_toml(), "x") == config
    run = simulate(config, tmp_path / "run")
    assert run.environment()["plugins"].keys() == set(STRANGERS.values())
    rounds = run.rounds()
    assert all(line["failures"] == {} for line in rounds)
    assert run.summary()["adapter_sha256"] != plain["adapter_sha256"]
    said = (run.path / "trackers" / "lines" / "losses.txt").read_text().splitlines()
    assert said == [f"{line['round']} {line['train']['loss']!r}" for line in rounds]
    as_in_a_new_process(monkeypatch)
    for left in [*STRANGERS.values()]:
        allowed = [name for name in STRANGERS.values() if name != left]
        as_in_a_new_process(monkeypatch)
        with pytest.raises(SecurityRefusal, match=f"--allow {left}"):
            resume(run.path, trust=RECORD.also(allowed))
    assert resume(run.path, trust=RECORD.also(STRANGERS.values())).summary() == run.summary()


def test_classes_from_python_are_written_by_the_names_that_find_them(
    tiny_table: Table, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tests.strangers import Shrink, Shrinking, Softened

    table = tiny_table()
    table["training"] = {**table.get("training", {}), "method": Shrinking}
    table["model"] = {**table.get("model", {}), "task": Softened}
    config = parse_config(table)
    assert config.model.task == STRANGERS["Softened"]
    assert config.training.method == Shrink(kind=STRANGERS["Shrinking"])
    as_in_a_new_process(monkeypatch)
    with pytest.raises(SecurityRefusal):
        parse_toml(config.to_toml(), "x")
    assert parse_toml(config.to_toml(), "x", USER) == config
    table["training"]["method"] = Shrink()
    with pytest.raises(ConfigError, match="name the method"):
        parse_config(table)


def test_a_real_client_imports_no_task_and_no_method_that_a_server_names(
    tiny_table: Table, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = tiny_table()
    table["model"] = {**table.get("model", {}), "task": STRANGERS["Softened"]}
    config = parse_config(table, trust=USER)
    asked = config.task().model_dump_json()
    as_in_a_new_process(monkeypatch)
    monkeypatch.delitem(sys.modules, "tests.strangers")
    with pytest.raises(MismatchError, match=r"not known to this client.*a message, names it"):
        task_of(asked)
    term = [{"kind": STRANGERS["Shrinking"], "strength": 0.1}]
    trust_process(REMOTE)
    with pytest.raises(MismatchError, match="not imported because a message names it"):
        terms_from(term)
    assert "tests.strangers" not in sys.modules
    # Its owner's own word is another matter.
    assert Policy.read(None, {"tasks": [STRANGERS["Softened"]]}).tasks == (STRANGERS["Softened"],)
    assert task_of(asked).model.task == STRANGERS["Softened"]
    trust_process(USER)
    assert terms_from(term)[0].kind == STRANGERS["Shrinking"]


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("tests.strangers:Shrink", "it has no gradient, correct, end"),
        ("fedft.clients.methods.proximal:Proximal", "fedft's own 'proximal'"),
        ("tests.strangers:Lines", "it has no gradient, correct, end"),
        ("tests.strangers:None_", "has no None_"),
    ],
)
def test_what_is_no_method_is_told_why(tiny_table: Table, name: str, why: str) -> None:
    table = tiny_table()
    table["training"] = {**table.get("training", {}), "method": name}
    with pytest.raises(ConfigError, match=why):
        parse_config(table, trust=USER)


# ── rules that fail ───────────────────────────────────────────────────────────────────────────


class Failing(FedAvgLoRA):
    """Goes wrong in one of the ways in which a rule that somebody has just written does."""

    how: str = "fine"

    @property
    def uses_mean_only(self) -> bool:
        return False

    def init(self, initial: Adapter) -> ServerState:
        if self.how == "init":
            raise KeyError("moments")
        return super().init(initial)

    def plan(self, state: ServerState, site: Site) -> TrainPlan:
        if self.how == "plan" and state.round:
            raise AttributeError("no such thing")
        return super().plan(state, site)

    def aggregate(self, state: ServerState, updates: Sequence[ClientUpdate]) -> ServerState:
        after: Any = super().aggregate(state, updates)
        if not state.round:
            return after
        if self.how == "raises":
            raise ZeroDivisionError("division by zero")
        wide = {n: t.double() for n, t in after.adapter.tensors().items()}
        return {
            "fine": after,
            "nothing": None,
            "adapter": after.adapter,
            "round": replace(after, round=state.round),
            "float64": replace(after, adapter=after.adapter.replaced(wide)),
        }.get(self.how, after)


@pytest.mark.parametrize(
    ("how", "told"),
    [
        ("init", r"Failing failed while starting: KeyError: 'moments' \(.*test_outside\.py:\d+\)"),
        ("plan", r"failed while planning round 2: AttributeError: no such thing \(.*:\d+\)"),
        ("raises", r"failed while aggregating round 2: ZeroDivisionError: .* \(.*:\d+\)"),
        ("nothing", "returned NoneType for round 2, and a ServerState is expected"),
        ("adapter", "returned Adapter for round 2"),
        ("round", "returned a state of round 1 for round 2"),
        ("float64", r"returned .* as torch\.float64 for round 2; it was torch\.float32"),
    ],
)
def test_a_rule_that_fails_is_named_with_its_own_line(
    how: str, told: str, tiny_table: Table, tmp_path: Path
) -> None:
    table = tiny_table(rounds={"count": 3, "per-round": 2})
    with pytest.raises(ConfigError, match=told):
        simulate(parse_config({**table, "strategy": Failing(how=how)}), tmp_path / "run")


def test_a_rule_like_it_that_does_not_fail_runs(tiny_table: Table, tmp_path: Path) -> None:
    config = parse_config(
        {**tiny_table(rounds={"count": 2, "per-round": 2}), "strategy": Failing()}
    )
    simulate(config, tmp_path / "run")
    assert len((tmp_path / "run" / "rounds.jsonl").read_text().splitlines()) == 2
