"""Bad models, tokenizers, templates and files: one sentence and an exit code, before anything starts."""

import contextlib
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fedft.core.errors import FedftError
from fedft.server.check import check
from fedft.server.config import RunConfig
from fedft.server.config_file import parse_config
from fedft.server.forecast import as_text, forecast
from fedft.server.run import simulate
from tests.conftest import CLASSES
from tests.faults.bad_models import BAD, Bad
from tests.zoo.builders import DECODERS, VISION, build

Table = Callable[..., dict[str, Any]]


@pytest.fixture(scope="session")
def sound(tiny_model: Path, tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with sound models and their data: ``encoder``, ``decoder``, ``vision``."""
    import numpy as np
    from PIL import Image

    place = tmp_path_factory.mktemp("sound")
    shutil.copytree(tiny_model, place / "encoder")
    decoder = next(kind for kind in DECODERS if kind.name == "gpt2")
    vision = next(kind for kind in VISION if kind.name == "vit")
    build(_with(decoder, n_positions=24), place / "decoder")
    build(vision, place / "vision")
    rows = [json.loads(line) for line in tiny_data.read_text().splitlines()]
    longest = {"text": "leaf " * 50, "label": CLASSES[0]}
    _lines(place / "encoder.jsonl", [*rows, longest])
    asked = [{"prompt": "the cat", "answer": "likes a " * (1 + i % 3)} for i in range(40)]
    _lines(place / "decoder.jsonl", [*asked, {"prompt": "a", "answer": "bird " * 50}])
    rng = np.random.default_rng(0)
    for label in "ab":
        (place / "vision-data" / label).mkdir(parents=True)
        for i in range(20):
            image = Image.fromarray((rng.random((32, 32, 3)) * 255).astype("uint8"))
            image.save(place / "vision-data" / label / f"{i}.png")
    return place


def _with(kind: Any, **sizes: Any) -> Any:
    from dataclasses import replace

    return replace(kind, sizes={**kind.sizes, **sizes})


def _lines(path: Path, rows: list[dict[str, str]]) -> None:
    path.write_text("\n".join(map(json.dumps, rows)) + "\n")


TASKS = {"encoder": "classification", "decoder": "causal-lm", "vision": "image-classification"}


def config_of(bad: Bad, model: Path, sound: Path, table: Table, cohort: int = 2) -> RunConfig:
    task = bad.changes.get("model", {}).get("task", TASKS[bad.model])
    data = next(name for name, known in TASKS.items() if known == task)
    source = sound / ("vision-data" if data == "vision" else f"{data}.jsonl")
    tables = {
        "model": {"source": bad.source or str(model), "task": task},
        "data": {"source": str(source), "max-length": 16, "partition": {"kind": "iid"}},
        "rounds": {"count": 1, "per-round": 2, "evaluate-every": 1},
        "engine": {"cohort": cohort, "precision": "fp32"},
        "fleet": {"clients": 4},
    }
    for name, own in bad.changes.items():
        tables[name] = {**tables.get(name, {}), **own}
    return parse_config(table(**tables))


def spoilt(bad: Bad, sound: Path, place: Path) -> Path:
    model = place / "model"
    shutil.copytree(sound / bad.model, model)
    bad.spoil(model)
    return model


def refusal(work: Callable[[], object]) -> FedftError:
    with pytest.raises(FedftError) as caught:
        work()
    return caught.value


def is_a_sentence(error: FedftError, bad: Bad) -> None:
    assert error.exit_code == bad.code
    assert error.what and "\n" not in error.what and "Traceback" not in str(error)
    assert len(error.what) < 500
    assert error.fix
    if error.exit_code != 3:
        assert "fedft resume" not in str(error)


@pytest.mark.parametrize("name", BAD)
def test_a_bad_model_is_refused_in_one_sentence_and_leaves_nothing_in_the_way(
    name: str, sound: Path, tiny_table: Table, tmp_path: Path
) -> None:
    """In one attempt: no cohort is burnt over it."""
    bad = BAD[name]
    model = spoilt(bad, sound, tmp_path)
    config = config_of(bad, model, sound, tiny_table)
    error = refusal(lambda: simulate(config, tmp_path / "run"))
    is_a_sentence(error, bad)
    assert re.search(bad.says, error.what), error.what
    assert not (tmp_path / "run").exists()
    if bad.planned:
        planned = refusal(lambda: forecast(config))
        assert (planned.what, planned.exit_code) == (error.what, error.exit_code)
    else:
        with contextlib.suppress(FedftError):  # of data that a plan reads
            forecast(config)
        checked = refusal(lambda: check(config))
        assert (checked.what, checked.exit_code) == (error.what, error.exit_code)


MENDED = (
    "torn config",
    "truncated weights",
    "not finite",
    "torn tokenizer",
    "template that raises",
)


@pytest.mark.parametrize("name", MENDED)
def test_the_same_command_works_once_the_model_is_mended(
    name: str, sound: Path, tiny_table: Table, tmp_path: Path
) -> None:
    bad = BAD[name]
    model = spoilt(bad, sound, tmp_path)
    config = config_of(bad, model, sound, tiny_table)
    for _ in range(2):
        refusal(lambda: simulate(config, tmp_path / "run"))
    shutil.rmtree(model)
    shutil.copytree(sound / bad.model, model)
    assert simulate(config, tmp_path / "run").finished


@pytest.mark.parametrize("name", ["torn config", "positions of an encoder"])
def test_the_command_line_says_it_without_a_traceback(
    name: str, sound: Path, tiny_table: Table, tmp_path: Path
) -> None:
    import subprocess
    import sys

    bad = BAD[name]
    config = config_of(bad, spoilt(bad, sound, tmp_path), sound, tiny_table)
    (tmp_path / "config.toml").write_text(config.to_toml())
    command = [sys.executable, "-m", "fedft", "plan", str(tmp_path / "config.toml"), "--check"]
    ran = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert ran.returncode == bad.code
    assert "Traceback" not in ran.stderr and re.search(bad.says, " ".join(ran.stderr.split()))


@pytest.mark.parametrize("cohort", [2, 1])
def test_plan_with_check_says_which_engine_trains(
    cohort: int, sound: Path, tiny_table: Table, tmp_path: Path, capsys: Any
) -> None:
    from fedft.cli import cli

    bad = Bad(lambda _: None, 0, "")
    config = config_of(bad, sound / "encoder", sound, tiny_table, cohort)
    (tmp_path / "config.toml").write_text(config.to_toml())
    cli(["plan", str(tmp_path / "config.toml"), "--check", "--json"], standalone_mode=False)
    told = json.loads(capsys.readouterr().out)
    assert told["engine"] == {"engine": "loop" if cohort == 1 else "cohort", "why": ""}
    cli(["plan", str(tmp_path / "config.toml"), "--check"], standalone_mode=False)
    words = "one client after the other" if cohort == 1 else "several clients in one pass"
    assert f"\ntrains                {words}\n" in capsys.readouterr().out
    cli(["plan", str(tmp_path / "config.toml")], standalone_mode=False)
    assert "\ntrains  " not in capsys.readouterr().out, "nothing was tried"
    assert not (tmp_path / "runs").exists()


def test_a_limit_above_the_positions_is_mentioned_where_no_row_is_that_long(
    sound: Path, tiny_table: Table, tiny_data: Path, tmp_path: Path
) -> None:
    """Short rows train under any limit; only the plan mentions it."""
    changes = {"data": {"max-length": 64, "source": str(tiny_data)}}
    config = config_of(
        Bad(lambda _: None, 0, "", changes=changes), sound / "encoder", sound, tiny_table
    )
    assert "the model has 32, and data.max-length is 64" in as_text(config, forecast(config))
    assert simulate(config, tmp_path / "run").finished
    lower = config.model_copy(update={"data": config.data.model_copy(update={"max_length": 32})})
    assert "the model has" not in as_text(lower, forecast(lower))


@pytest.mark.parametrize("model", TASKS)
@pytest.mark.parametrize("cohort", [1, 2])
def test_the_sound_models_train(
    model: str, cohort: int, sound: Path, tiny_table: Table, tmp_path: Path
) -> None:
    """The control: what is spoilt above trains as it is."""
    bad = Bad(lambda _: None, 0, "", model)
    config = config_of(bad, sound / model, sound, tiny_table, cohort)
    assert simulate(config, tmp_path / "run").finished
    assert check(config).engine == ("loop" if cohort == 1 else "cohort")


def test_there_are_enough() -> None:
    assert len(BAD) >= 40
