"""One architecture through whole runs, and what came of it: right, or refused in our words.

The logits of a run are read from its own engine by scoring each row under every label, which gives
their log-softmax; those of the export by stock transformers and peft, without fedft.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fedft.clients.resident import workbench
from fedft.core.adapters.files import WEIGHTS
from fedft.core.errors import ConfigError, FedftError, MismatchError
from fedft.core.record.rundir import RunDir
from fedft.core.tasks import task_of
from fedft.core.types import IGNORED, Batch
from fedft.server.checkpoints import Checkpoints
from fedft.server.config import RunConfig
from fedft.server.config_file import parse_config
from fedft.server.run import simulate
from fedft.server.setting import prepare_run
from tests.zoo.builders import KINDS, Kind, build, write_data

TARGETS = ("auto", "all-linear")
TOLERANCE = 2e-4
"""Largest difference of log-probabilities, in nats, in float32 and after two rounds of training."""

CLOSE = 5e-3
"""Largest difference of what two cohort sizes make of a tensor, of what training did to it."""


@dataclass(frozen=True)
class Outcome:
    """What came of one architecture with one choice of targets.

    Attributes:
        engine: ``cohort`` or ``loop``; None where it was refused.
        why: why not the cohort engine, or the words of the refusal.
        adapted: names of the adapted layers.
    """

    engine: str | None
    why: str = ""
    adapted: tuple[str, ...] = ()


def config_of(kind: Kind, model: Path, data: Path, targets: str, cohort: int) -> RunConfig:
    return parse_config(
        {
            "model": {"source": str(model), "task": kind.task},
            "lora": {"rank": 2, "alpha": 4, "target-modules": targets},
            "data": {
                "source": str(data),
                "max-length": 20,
                "partition": {"kind": "iid"},
                "test-fraction": 0.2,
            },
            "fleet": {"clients": 8},
            "rounds": {"count": 2, "per-round": 4, "evaluate-every": 2},
            "training": {"batch-size": 3, "lr": 2e-2, "optimizer": "sgd", "clip-norm": 0.0},
            "engine": {"backend": "inline", "cohort": cohort, "precision": "fp32"},
        }
    )


def outcome(kind: Kind, model: Path, data: Path, targets: str, scratch: Path) -> Outcome:
    """Run in cohorts of four and of one, and check what is promised.

    Raises:
        AssertionError: a run that was not refused is wrong.
    """
    runs: dict[int, RunDir] = {}
    refused: dict[int, str] = {}
    for cohort in (4, 1):
        config = config_of(kind, model, data, targets, cohort)
        folder = scratch / f"{kind}-{targets}-{cohort}"
        try:
            runs[cohort] = simulate(config, folder)
        except (MismatchError, ConfigError) as error:
            refused[cohort] = words(error)
            assert not (folder / "rounds.jsonl").exists(), f"refused after a round: {error}"
            assert error.fix, f"no remedy: {error}"
            assert "Error" not in error.what.split(":")[0], error.what
    if refused:
        assert refused.keys() == {1, 4}, f"only in cohorts of {list(refused)}: {refused}"
        return Outcome(None, refused[1])
    engine = runs[4].environment()["engine"]
    close(runs[4], runs[1])
    checked = promised(runs[4])
    assert checked > 0
    return Outcome(engine["engine"], plain(engine["why"]), _adapted(runs[4]))


def words(error: FedftError) -> str:
    """What is wrong, without what differs from machine to machine."""
    return plain(re.sub(r"'?/[^\s']*/([\w. -]+)'?", r"\1", error.what))


def plain(text: str) -> str:
    """Without figures: the last digits of a measurement are no promise."""
    return re.sub(r"\d+\.\d+(e[-+]?\d+)?", "…", text)


def _adapted(run: RunDir) -> tuple[str, ...]:
    from safetensors import safe_open

    with safe_open(run.adapter(2) / WEIGHTS, "pt") as file:
        found = [re.search(r"(\w+)\.lora_A", name) for name in file.keys()]  # noqa: SIM118
    return tuple(sorted({f[1] for f in found if f}))


# ------------------------------------------------------------------- run and stock peft agree


def promised(run: RunDir) -> int:
    """Compare the log-probabilities of a run with those of its export; gives how many there are."""
    config = parse_config(_toml(run.config), "run")
    state = Checkpoints(run.checkpoints).load()
    assert state is not None
    with RunDir.open(run.path, writing=True) as own_run:
        setting = prepare_run(config, own_run)
    rows = list(_rows(setting.data.test, 6))
    engine = workbench(setting.task.model_dump_json()).engine
    own = [_of_engine(engine, state.state, row, setting.data.classes) for row in rows]
    stock = _stock(run.adapter(state.state.round), config, len(setting.data.classes))
    theirs = [_of_stock(stock, row, setting.data.classes) for row in rows]
    for a, b in zip(own, theirs, strict=True):
        assert a.isfinite().all() and b.isfinite().all()
        torch.testing.assert_close(a, b, atol=TOLERANCE, rtol=TOLERANCE)
    flat = torch.cat([a.flatten() for a in own])
    if setting.data.classes:
        spread = torch.stack(own).std(0).max()
        assert spread > 1e-4, "the model gives every row the same: nothing was compared"
    return flat.numel()


def _toml(text: str) -> dict[str, Any]:
    import tomllib

    return tomllib.loads(text)


def _rows(test: Any, count: int) -> Iterator[Batch]:
    for i in range(min(count, len(test))):
        yield test.collate(np.array([i]))


def _of_engine(engine: Any, state: Any, row: Batch, classes: Sequence[str]) -> Tensor:
    """Log-probabilities of a row: of each class, or of each answered token."""
    if not classes:
        return torch.stack(
            [
                torch.tensor(-engine.evaluate(state.adapter, state.delta, [one]).loss_sum)
                for one in _tokens(row)
            ]
        ).float()
    labels = torch.arange(len(classes))[:, None]
    sums = [
        engine.evaluate(state.adapter, state.delta, [Batch(row.inputs, label)]).loss_sum
        for label in labels
    ]
    return -torch.tensor(sums).float()


def _tokens(row: Batch) -> Iterator[Batch]:
    """One batch an answered token, first five."""
    places = (row.labels[0] != IGNORED).nonzero().flatten().tolist()[:5]
    for place in places:
        labels = torch.full_like(row.labels, IGNORED)
        labels[0, place] = row.labels[0, place]
        yield Batch(row.inputs, labels)


def _of_stock(model: Any, row: Batch, classes: Sequence[str]) -> Tensor:
    with torch.inference_mode():
        logits = model(**row.inputs).logits.float()
    if classes:
        return F.log_softmax(logits[0], -1)
    each = F.log_softmax(logits[0], -1)
    return torch.stack(
        [
            each[int(place) - 1, int(one.labels[0, place])]
            for one in _tokens(row)
            for place in (one.labels[0] != IGNORED).nonzero().flatten()
        ]
    )


def _stock(export: Path, config: RunConfig, classes: int) -> Any:
    import transformers
    from peft import PeftModel

    auto: Any = getattr(transformers, task_of(config.model.task).auto)
    labels = {"num_labels": classes} if classes else {}
    base = auto.from_pretrained(config.model.source, dtype=torch.float32, **labels)
    return PeftModel.from_pretrained(base, export).eval()


# ----------------------------------------------------------------------- cohorts of any size


def close(run: RunDir, other: RunDir) -> None:
    """Two cohort sizes: the same losses, and tensors apart by rounding."""
    for a, b in zip(run.rounds(), other.rounds(), strict=True):
        assert a["train"]["loss"] == _near(b["train"]["loss"])
        if "eval" in a:
            assert a["eval"]["loss"] == _near(b["eval"]["loss"])
    ours, theirs = (_tensors(r) for r in (run, other))
    assert ours.keys() == theirs.keys()
    moved = max(float(t.norm()) for n, t in theirs.items() if "lora_B" in n)
    assert moved > 0, "nothing was trained"
    for name, tensor in theirs.items():
        gap = float((ours[name] - tensor).norm())
        assert gap <= CLOSE * max(float(tensor.norm()), 0.1 * moved), f"{name} is {gap:.2g} apart"


def _near(value: float) -> Any:
    import pytest

    return pytest.approx(value, rel=2e-4, abs=2e-4)


def _tensors(run: RunDir) -> Mapping[str, Tensor]:
    from safetensors.torch import load_file

    return load_file(run.adapter(2) / WEIGHTS)


# --------------------------------------------------------------------------------- the page

PAGE = Path(__file__).parents[2] / "docs" / "models.md"


def rows_of_page() -> list[str]:
    """The table's rows, in order."""
    lines = PAGE.read_text(encoding="utf-8").splitlines()
    return [row for row in lines if row.startswith("| `")]


def line(kind: Kind, found: Mapping[str, Outcome]) -> str:
    """The row of the table that an architecture comes to."""
    cells = [f"`{kind.type}`{kind.name[len(kind.type) :]}", kind.task]
    cells += [cell(found[targets]) for targets in TARGETS if targets in found]
    return f"| {' | '.join(cells)} |"


def cell(found: Outcome) -> str:
    """``cohort``, ``loop``, or the words of a refusal."""
    return found.engine or f"refused: {found.why}".replace("|", "/")


def main() -> None:
    """Print the rows of the page anew; takes minutes."""
    import tempfile

    with tempfile.TemporaryDirectory() as scratch:
        place = Path(scratch)
        data = write_data(place)
        for kind in KINDS:
            model = build(kind, place / "models" / str(kind))
            found = {t: outcome(kind, model, data[kind.task], t, place / "runs") for t in TARGETS}
            print(line(kind, found), flush=True)


if __name__ == "__main__":
    main()
