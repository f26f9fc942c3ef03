"""Every architecture through whole runs: right, or refused before round 1 in our words; no third."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from fedft.core.errors import MismatchError
from fedft.server.run import simulate
from tests.zoo.builders import KINDS, Kind, build, write_data
from tests.zoo.conformance import TARGETS, config_of, line, outcome, promised, rows_of_page

pytestmark = pytest.mark.filterwarnings("default")  # of forty model classes, none of them ours

FAST = ("bert-classification", "llama-causal-lm", "convnext-image-classification", "t5-causal-lm")
"""One of each task and one that is refused: what the default tier tries."""


@pytest.fixture(scope="session")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("zoo")
    write_data(folder)
    return folder


def data_of(kind: Kind, place: Path) -> Path:
    names = {"classification": "labelled.jsonl", "causal-lm": "asked.jsonl"}
    return place / names.get(kind.task, "images")


def model_of(kind: Kind, place: Path) -> Path:
    folder = place / "models" / str(kind)
    return folder if folder.exists() else build(kind, folder)


def conforms(kind: Kind, place: Path, scratch: Path) -> None:
    """The line of the page is what came of it."""
    model = model_of(kind, place)
    found = {t: outcome(kind, model, data_of(kind, place), t, scratch) for t in TARGETS}
    assert line(kind, found) in rows_of_page()


@pytest.mark.parametrize("kind", [k for k in KINDS if str(k) in FAST], ids=str)
def test_a_few_architectures_are_what_the_page_says(
    kind: Kind, place: Path, tmp_path: Path
) -> None:
    conforms(kind, place, tmp_path)


@pytest.mark.zoo
@pytest.mark.parametrize("kind", [k for k in KINDS if str(k) not in FAST], ids=str)
def test_an_architecture_is_what_the_page_says(kind: Kind, place: Path, tmp_path: Path) -> None:
    conforms(kind, place, tmp_path)


def test_the_page_has_a_line_for_every_architecture_and_no_other() -> None:
    titles = [row.split("|")[1:3] for row in rows_of_page()]
    wanted = [line(kind, {}).split("|")[1:3] for kind in KINDS]
    assert titles == wanted
    assert len({kind.type for kind in KINDS}) >= 30
    assert all(
        "refused: " in cell or cell.strip() in ("cohort", "loop")
        for row in rows_of_page()
        for cell in row.strip("|").split("|")[2:]
    )


TWICE = """
import sys
from pathlib import Path
from fedft.core.quiet import quiet
quiet()
import torch
torch.set_num_threads(1)
from fedft.server.config_file import parse_config
from fedft.server.run import simulate
import json
run = simulate(parse_config(json.loads(sys.argv[1])), Path(sys.argv[2]))
print("SHA", run.summary()["history_sha256"])
"""

INVENTED = (
    "bert-classification",
    "deberta-classification",
    "distilbert-classification",
    "xlnet-classification",
    "albert-classification",
)
"""Models of which transformers makes up a layer in the middle, by a random draw of each process."""


REFUSED = {(f"{name}-classification", "bf16") for name in ("deberta", "xlnet", "swin-image")}
"""Models of which a frozen layer gets float32 in bf16: the trial refuses them."""


@pytest.mark.zoo
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", [*INVENTED, "mixtral-causal-lm", "swin-image-classification"])
def test_two_processes_give_the_same_bytes(
    name: str, precision: str, place: Path, tmp_path: Path
) -> None:
    kind = next(kind for kind in KINDS if str(kind) == name)
    config = config_of(kind, model_of(kind, place), data_of(kind, place), "auto", 4)
    table = json.loads(config.model_dump_json(by_alias=True, exclude_none=True))
    table["engine"]["precision"] = precision
    found: set[str] = set()
    for seed in ("1", "2"):
        command = [sys.executable, "-c", TWICE, json.dumps(table), str(tmp_path / seed)]
        environment = {**os.environ, "PYTHONHASHSEED": seed, "OMP_NUM_THREADS": "1"}
        ran = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=240, check=False
        )
        if (name, precision) in REFUSED:
            assert "MismatchError" in ran.stderr and 'precision = "fp32"' in ran.stderr
            continue
        assert ran.returncode == 0, ran.stderr[-2000:]
        found.add(ran.stdout.split("SHA")[1].strip())
    assert len(found) == ((name, precision) not in REFUSED)


def test_the_remedy_of_a_refusal_works(place: Path, tmp_path: Path) -> None:
    """PEFT passes over DeepSeek's dense layers; without them the rest trains and exports."""
    kind = next(kind for kind in KINDS if str(kind) == "deepseek_v3-causal-lm")
    config = config_of(kind, model_of(kind, place), data_of(kind, place), "auto", 4)
    with pytest.raises(MismatchError, match="peft does not adapt") as caught:
        simulate(config, tmp_path / "refused")
    (wanted,) = re.findall(r"exclude-modules = (\[.*\])", caught.value.fix)
    lora = config.lora.model_copy(update={"exclude_modules": tuple(json.loads(wanted))})
    run = simulate(config.model_copy(update={"lora": lora}), tmp_path / "run")
    assert run.finished and promised(run) > 0


def test_a_run_that_is_not_its_export_is_noticed(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The control: stock peft is given another adapter than the run's."""
    import tests.zoo.conformance as conformance

    kind = next(kind for kind in KINDS if str(kind) == "llama-causal-lm")
    real = conformance._stock

    def other(export: Path, config: object, classes: int) -> object:
        model = real(export, config, classes)  # pyright: ignore
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.data.zero_()
        return model

    monkeypatch.setattr(conformance, "_stock", other)
    with pytest.raises(AssertionError):
        outcome(kind, model_of(kind, place), data_of(kind, place), "auto", tmp_path)


def test_cohorts_that_differ_are_noticed(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The control: the plain loop of one cohort size learns faster."""
    import tests.zoo.conformance as conformance

    kind = next(kind for kind in KINDS if str(kind) == "llama-causal-lm")
    real = conformance.config_of

    def faster(kind: Kind, model: Path, data: Path, targets: str, cohort: int) -> object:
        config = real(kind, model, data, targets, cohort)
        if cohort > 1:
            return config
        training = config.training.model_copy(update={"lr": config.training.lr * 1.1})
        return config.model_copy(update={"training": training})

    monkeypatch.setattr(conformance, "config_of", faster)
    with pytest.raises(AssertionError):
        outcome(kind, model_of(kind, place), data_of(kind, place), "auto", tmp_path)
