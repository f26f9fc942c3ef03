"""A run that cannot start leaves nothing behind; one that did not start yet can be started again."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fedft.api import Run
from fedft.core.data.source import Data
from fedft.core.errors import ConfigError, FedftError, MismatchError, QuorumFailure
from fedft.core.record.rundir import RunDir
from fedft.server.compare import compare, rules
from fedft.server.config import RunConfig
from fedft.server.config_file import parse_config
from fedft.server.forecast import as_text, forecast
from fedft.server.identity import Address
from fedft.server.inputs import remarks
from fedft.server.resolve import resolved
from fedft.server.run import resume, simulate
from fedft.server.serve import Hosting, serve
from fedft.server.setting import prepare_run
from fedft.trackers import Tracker

Table = Callable[..., dict[str, Any]]

ROWS = [{"text": f"the old paw {'leaf ' * (i % 3)}", "label": "ab"[i % 2]} for i in range(60)]


def write(path: Path, rows: list[Any], bad: int = 0) -> None:
    path.write_text("\n".join([*map(json.dumps, rows), *["{"] * bad]) + "\n")


@pytest.fixture
def config(tiny_table: Table, tmp_path: Path) -> RunConfig:
    write(tmp_path / "d.jsonl", ROWS, bad=3)
    partition = {"kind": "iid"}
    data = {"source": str(tmp_path / "d.jsonl"), "partition": partition}
    return parse_config(tiny_table(data=data, rounds={"count": 2, "evaluate-every": 1}))


def started_by_simulate(config: RunConfig, run_dir: Path) -> None:
    simulate(config, run_dir)


def started_by_serve(config: RunConfig, run_dir: Path) -> None:
    """Without TLS, which a server could not start with in a new folder once."""
    hosting = Hosting(first=1, patience_s=0.1, linger_s=0)
    try:
        serve(config, run_dir, Address("127.0.0.1", 0, None, True), hosting=hosting)
    except QuorumFailure:  # nobody joins: it came to its rounds
        return


def started_by_compare(config: RunConfig, run_dir: Path) -> None:
    compare(config, rules(config, ["fedavg-lora", "ffa-lora"]), [0], run_dir)


STARTS = [
    started_by_simulate,
    started_by_compare,
    pytest.param(started_by_serve, marks=pytest.mark.grpc),
]


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("there", ["absent", "empty"])
def test_a_data_error_leaves_nothing_and_the_same_command_works_once_they_are_mended(
    start: Callable[..., None], there: str, config: RunConfig, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    if there == "empty":
        run_dir.mkdir()
    for _ in range(2):
        with pytest.raises(MismatchError, match="3 bad rows"):
            start(config, run_dir)
        assert run_dir.exists() == (there == "empty")
        assert there == "absent" or not any(run_dir.iterdir())
    write(tmp_path / "d.jsonl", ROWS)
    start(config, run_dir)
    assert any(run_dir.rglob("config.toml"))


@pytest.mark.parametrize("start", [started_by_simulate, started_by_compare])
def test_the_same_folder_takes_another_configuration_after_a_failed_start(
    start: Callable[..., None], config: RunConfig, tmp_path: Path
) -> None:
    with pytest.raises(MismatchError):
        start(config, tmp_path / "run")
    skipping = config.model_copy(update={"data": config.data.model_copy(update={"skip_bad": True})})
    start(skipping, tmp_path / "run")
    assert any((tmp_path / "run").rglob("summary.json"))


EMPTY: dict[str, tuple[dict[str, Any], type[FedftError]]] = {
    "none": ({"test_fraction": 0.0}, ConfigError),
    "hardly one": ({"test_fraction": 1e-9}, MismatchError),
    "all bad": ({"test_source": "bad.jsonl", "skip_bad": True}, MismatchError),
}


@pytest.mark.parametrize("start", [*STARTS, "plan"])
@pytest.mark.parametrize("kind", EMPTY)
def test_without_a_test_set_nothing_starts_on_any_path(
    start: Any, kind: str, config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It used to end a whole run in a KeyError."""
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "d.jsonl", ROWS)
    write(tmp_path / "bad.jsonl", [], bad=5)
    keys, error = EMPTY[kind]
    changed = config.model_copy(update={"data": config.data.model_copy(update=keys)})
    with pytest.raises(error, match=r"test|bad\.jsonl") as caught:
        if start == "plan":
            forecast(changed)
        else:
            start(changed, tmp_path / "run")
    assert caught.value.fix
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("rows", [1, 3, 9])
def test_a_test_set_smaller_than_its_slices_is_scored(
    rows: int, config: RunConfig, tmp_path: Path
) -> None:
    write(tmp_path / "d.jsonl", ROWS)
    write(tmp_path / "t.jsonl", ROWS[:rows])
    keys = {"test_source": str(tmp_path / "t.jsonl")}
    rounds = config.rounds.model_copy(update={"patience": 1})
    data = config.data.model_copy(update=keys)
    simulate(config.model_copy(update={"data": data, "rounds": rounds}), tmp_path / "run")
    run = Run(tmp_path / "run")
    assert {"loss", "accuracy"} <= run.metrics["final"].keys()
    assert run.adapter("best").path.exists()


def test_a_run_that_has_begun_is_never_taken_back(
    config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The control: the same error after a round leaves everything as it is."""
    write(tmp_path / "d.jsonl", ROWS)

    def late() -> bool:
        if (tmp_path / "run" / "rounds.jsonl").exists():
            raise MismatchError("late", fix="-")
        return False

    with pytest.raises(MismatchError, match="late"):
        simulate(config, tmp_path / "run", stop=late)
    run = RunDir.open(tmp_path / "run")
    assert run.begun and len(run.rounds()) == 1
    with pytest.raises(ConfigError, match="not empty"):
        simulate(config, tmp_path / "run")
    with pytest.raises(RuntimeError, match="has begun"), RunDir.open(run.path, writing=True) as own:
        own.discard()
    write(tmp_path / "d.jsonl", ROWS[:-4])
    with pytest.raises(MismatchError, match="data is not that of this run"):
        resume(tmp_path / "run")
    write(tmp_path / "d.jsonl", ROWS)
    resume(tmp_path / "run")
    assert Run(tmp_path / "run").metrics["rounds"] == 2


def killed_at_the_start(config: RunConfig, run_dir: Path) -> None:
    """As a kill between the freezing of the partition and the first round leaves it."""
    with RunDir.create(run_dir) as run:
        run.write_config(resolved(config).to_toml())
        prepare_run(resolved(config), run)


@pytest.mark.parametrize("way", ["the same command", "resume"])
def test_a_run_without_a_round_starts_from_mended_data(
    way: str, config: RunConfig, tmp_path: Path
) -> None:
    write(tmp_path / "d.jsonl", ROWS[:40])
    killed_at_the_start(config, tmp_path / "run")
    write(tmp_path / "d.jsonl", ROWS)
    if way == "resume":
        resume(tmp_path / "run")
    else:
        simulate(config, tmp_path / "run")
    simulate(config, tmp_path / "fresh")
    again, fresh = (Run(tmp_path / name) for name in ("run", "fresh"))
    assert again.metrics["adapter_sha256"] == fresh.metrics["adapter_sha256"]
    recorded = json.loads((tmp_path / "run" / "environment.json").read_text())
    assert recorded["examples"] == {"train": 51, "test": 9}


def test_nothing_of_anybody_elses_is_overwritten(config: RunConfig, tmp_path: Path) -> None:
    write(tmp_path / "d.jsonl", ROWS)
    text = resolved(config).to_toml()
    cases: dict[str, dict[str, str]] = {
        "another": {"config.toml": text + "\n"},
        "more": {"config.toml": text, "notes.txt": "mine"},
        "served": {"config.toml": text, "identity": ""},
        "no run": {"environment.json": "{}"},
    }
    for name, files in cases.items():
        folder = tmp_path / name
        folder.mkdir()
        for file, content in files.items():
            (folder / file).write_text(content)
        before = sorted(folder.iterdir())
        with pytest.raises(ConfigError, match="not empty"):
            simulate(config, folder)
        assert sorted(folder.iterdir()) == before
        assert all((folder / file).read_text() == content for file, content in files.items())


class Listening(Tracker):
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.told: list[str] = []

    def note(self, text: str) -> None:
        self.told.append(text)


def test_what_was_done_to_the_data_is_told_and_recorded(config: RunConfig, tmp_path: Path) -> None:
    write(tmp_path / "d.jsonl", [*ROWS, {"text": "the old", "label": "a "}], bad=2)
    data = config.data.model_copy(update={"skip_bad": True})
    skipping = config.model_copy(update={"data": data})
    watching = Listening()
    simulate(skipping, tmp_path / "run", trackers=[watching])
    assert any("'a' and 'a ' are taken for one class, 'a'" in text for text in watching.told)
    assert any(
        "2 bad rows of the data are left out (malformed 2)" in text for text in watching.told
    )
    recorded = json.loads((tmp_path / "run" / "environment.json").read_text())
    assert recorded["skipped"] == {"malformed": 2} and len(recorded["notes"]) == 1
    cost = forecast(skipping)
    assert cost["data"]["train"] + cost["data"]["test"] == 61
    assert "2 bad rows of the data" in as_text(skipping, cost)
    assert "examples              52 to train on, 9 to test on, in 2 classes" in as_text(
        skipping, cost
    )


def test_plan_reads_the_data_of_a_language_model(config: RunConfig, tmp_path: Path) -> None:
    write(tmp_path / "d.jsonl", [{"prompt": "x", "answer": "y"}] * 9 + [{"prompt": "x"}] * 2)
    model = config.model.model_copy(update={"task": "causal-lm"})
    with pytest.raises(MismatchError, match=r"2 bad rows \(answer 2\)"):
        forecast(config.model_copy(update={"model": model}))


def test_there_is_nothing_to_remark_on_good_data() -> None:
    made: Any = Data((), (), (), None, None, (), {}, "", {})  # type: ignore[arg-type]
    assert remarks(RunConfig(), made) == []
