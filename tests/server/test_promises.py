"""What a run tries before its first round, and proves after its last: each guard notices its fault."""

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import fedft.server.verify
from fedft.api import Run
from fedft.clients import preflight as trial
from fedft.clients.engines import cohort as engine
from fedft.clients.engines.cohort import CohortEngine
from fedft.clients.engines.fallback import Fallback
from fedft.clients.engines.passes import Pass, RowsMismatch, segments_of
from fedft.clients.resident import workbench
from fedft.core.adapters.files import WEIGHTS
from fedft.core.card import FACTS
from fedft.core.errors import EnvironmentFailure, MismatchError
from fedft.core.record.rundir import RunDir
from fedft.server.check import check
from fedft.server.config import RunConfig
from fedft.server.config_file import parse_config
from fedft.server.run import resume, simulate
from fedft.trackers import Tracker

Table = Callable[..., dict[str, Any]]


@pytest.fixture(autouse=True)
def nothing_remembered() -> None:
    """A trial is made once in a process; here each test makes its own."""
    trial._known.clear()
    workbench.cache_clear()


def config_of(table: Table, **changes: Any) -> RunConfig:
    rounds = {"count": 2, "evaluate-every": 1}
    engine = {"cohort": 2, "precision": "fp32", **changes.pop("engine", {})}
    return parse_config(table(rounds=rounds, engine=engine, **changes))


class Notes(Tracker):
    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


# ------------------------------------------------------------------------ before the first round


def test_a_cohort_engine_that_mixes_clients_is_noticed_and_stands_aside(
    tiny_table: Table, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Row 2 gets the factors of row 1's client: what a transposed activation would come to."""
    config = config_of(tiny_table)
    plain = simulate(config_of(tiny_table, engine={"cohort": 1}), tmp_path / "plain")
    real = segments_of

    def shifted(now: Pass, x: torch.Tensor) -> tuple[int, ...]:
        found = real(now, x)
        if len(found) < 2:
            return found
        return (found[0] + 1, *found[1:-1], found[-1] - 1)

    monkeypatch.setattr("fedft.clients.engines.cohort.segments_of", shifted)
    notes = Notes()
    run = simulate(config, tmp_path / "run", trackers=[notes])
    known = run.environment()["engine"]
    assert known["engine"] == "loop"
    assert re.search("its (loss|update of).*(where the plain|off)", known["why"])
    assert any("one by one" in note for note in notes.notes)
    for a, b in zip(run.rounds(), plain.rounds(), strict=True):
        assert a["train"]["loss"] == b["train"]["loss"]
    monkeypatch.undo()
    trial._known.clear()
    workbench.cache_clear()
    control = simulate(config, tmp_path / "control")
    assert control.environment()["engine"] == {"engine": "cohort", "why": ""}


def test_a_cohort_engine_that_loses_the_last_bit_of_a_gradient_is_noticed(
    tiny_table: Table, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Right losses of the first step, wrong updates: a tenth of B's gradient is lost."""
    real = engine.AdaptedLinear.backward

    def weaker(ctx: Any, *grads: Any) -> Any:
        found = list(real(ctx, *grads))
        found[4] = None if found[4] is None else found[4] * 0.9
        return tuple(found)

    monkeypatch.setattr(engine.AdaptedLinear, "backward", staticmethod(weaker))
    verdict = check(config_of(tiny_table))
    assert verdict.engine == "loop" and "update of" in verdict.why


def test_an_engine_that_raises_is_set_aside(
    tiny_table: Table, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any) -> Any:
        raise RuntimeError("split_with_sizes expects split_sizes to sum exactly to 5")

    monkeypatch.setattr("fedft.clients.engines.cohort.segments_of", broken)
    verdict = check(config_of(tiny_table))
    assert verdict.engine == "loop" and "split_with_sizes" in verdict.why


def test_rows_that_do_not_lie_client_by_client_after_the_trial_fall_back(
    tiny_table: Table, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    """A batch that the trial had none of: the run goes on in the plain loop, with its numbers."""
    plain = simulate(config_of(tiny_table, engine={"cohort": 1}), tmp_path / "plain")
    real, calls = CohortEngine.train, []

    def later(self: CohortEngine, plans: Any, batches: Any) -> Any:
        calls.append(len(plans))
        if len(plans) == 2 and not plans[0].site.startswith("preflight") and len(calls) > 3:
            raise RowsMismatch("a linear layer gets [7, 32]", fix="-")
        return real(self, plans, batches)

    monkeypatch.setattr(CohortEngine, "train", later)
    run = simulate(config_of(tiny_table), tmp_path / "run")
    assert "one by one from here on" in caplog.text
    assert run.finished and not any(r["failures"] for r in run.rounds())
    for a, b in zip(run.rounds(), plain.rounds(), strict=True):
        assert a["train"]["loss"] == pytest.approx(b["train"]["loss"], rel=1e-5)


def test_only_the_engines_own_doubt_falls_back(
    tiny_table: Table, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another error of the model is not hidden behind a second attempt."""

    class Broken:
        base = None

        def train(self, *_: Any) -> Any:
            raise MismatchError("other", fix="-")

    with pytest.raises(MismatchError, match="other"):
        Fallback(Broken(), None).train([], [])  # pyright: ignore


@pytest.mark.parametrize("where", ["load", "train"])
def test_too_little_memory_is_told_in_one_attempt(
    where: str, tiny_table: Table, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none_left(*_: Any, **__: Any) -> Any:
        calls.append(1)
        raise RuntimeError(
            "[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory"
        )

    calls: list[int] = []
    import fedft.core.models
    from fedft.clients.engines.loop import LoopEngine

    if where == "load":
        monkeypatch.setattr(fedft.core.models.load, "_ready", none_left)
    else:
        monkeypatch.setattr(LoopEngine, "train", none_left)
    with pytest.raises(MismatchError, match="not enough memory") as caught:
        simulate(config_of(tiny_table, engine={"cohort": 1}), tmp_path / "run")
    assert caught.value.exit_code == 5 and len(calls) == 1
    assert "resume" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_a_missing_package_can_be_resumed_once_it_is_there(
    tiny_table: Table, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import fedft.core.models

    def absent(*_: Any, **__: Any) -> Any:
        raise ImportError("BertTokenizer requires the fancy library but it was not found")

    monkeypatch.setattr(fedft.core.models.source, "text_encoder", absent)
    with pytest.raises(EnvironmentFailure, match="fancy") as caught:
        simulate(config_of(tiny_table), tmp_path / "run")
    assert caught.value.exit_code == 3 and "fedft resume" in caught.value.fix
    monkeypatch.undo()
    assert resume(tmp_path / "run").finished


def test_the_trial_is_made_once_and_kept(
    tiny_table: Table, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop_after: Any
) -> None:
    """A resumed run trains as it began, whatever a trial would say now."""
    stop = stop_after(1)
    with pytest.raises(Exception, match="stop"):
        simulate(config_of(tiny_table), tmp_path / "run", trackers=[stop], stop=stop)

    def never(*_: Any) -> Any:
        raise AssertionError("tried again")

    monkeypatch.setattr("fedft.server.setting.preflight", never)
    assert resume(tmp_path / "run").finished


def test_short_rows_are_tried_too(tiny_table: Table, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some models take no row of two tokens; a batch of them would come in some round."""
    bench_train = trial.try_rows
    seen: list[int] = []

    def spy(bench: Any, size: int) -> None:
        real = bench.engine.train

        def train(plans: Any, batches: Any) -> Any:
            seen.extend(b.inputs["input_ids"].shape[1] for own in batches for b in own)
            return real(plans, batches)

        bench.engine.train = train
        bench_train(bench, size)
        del bench.engine.train
        lengths = bench.data.train.lengths
        assert min(seen) == lengths.min() and max(seen) == lengths.max()

    monkeypatch.setattr(trial, "try_rows", spy)
    assert check(config_of(tiny_table, engine={"cohort": 1})).engine == "loop"
    assert len(seen) == 2


# ----------------------------------------------------------------------------- after the last


def zeroed(tensors: dict[str, torch.Tensor]) -> str:
    name = next(n for n in tensors if "lora_B" in n)
    tensors[name] = torch.zeros_like(tensors[name])
    return name


def random_head(tensors: dict[str, torch.Tensor]) -> str:
    name = next(n for n in tensors if n.endswith("classifier.weight"))
    tensors[name] = torch.randn_like(tensors[name])
    return name


def lost(tensors: dict[str, torch.Tensor]) -> str:
    name = next(n for n in tensors if n.endswith("classifier.bias"))
    del tensors[name]
    return name


TAMPERED = {"zeroed": zeroed, "random head": random_head, "lost": lost}


@pytest.mark.parametrize("how", TAMPERED)
def test_an_export_that_is_not_the_run_is_noticed_by_name_and_the_run_is_kept(
    how: str, tiny_table: Table, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_of(tiny_table, engine={"cohort": 1})
    real, names = fedft.server.verify.verify, []

    def tampered(export: Path, *args: Any, **options: Any) -> Any:
        whole = load_file(export / WEIGHTS)
        own = dict(whole)
        names.append(TAMPERED[how](own))
        save_file(own, export / WEIGHTS, {"format": "pt"})
        try:
            return real(export, *args, **options)
        finally:
            save_file(whole, export / WEIGHTS, {"format": "pt"})

    monkeypatch.setattr(fedft.server.verify, "verify", tampered)
    with pytest.raises(MismatchError, match="stock peft") as caught:
        simulate(config, tmp_path / "run")
    told = caught.value.what
    if how == "lost":
        assert names[0] in told
    assert "differ by up to" in told or names[0] in told
    run = RunDir.open(tmp_path / "run")
    assert not run.finished and len(run.rounds()) == 2
    monkeypatch.undo()
    assert resume(tmp_path / "run").summary()["verified"]["difference"] < 1e-3


def test_scores_on_another_base_are_noticed(
    tiny_table: Table, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every tensor of the adapter is as exported, and the scores are not."""
    from fedft.core import stock

    other = tmp_path / "other"
    shutil.copytree(tiny_model, other)
    weights = load_file(other / "model.safetensors")
    name = next(n for n in weights if "layer.0.output.dense.weight" in n)
    save_file({**weights, name: weights[name] * 1.5}, other / "model.safetensors", {"format": "pt"})
    real = stock.stock_model

    def elsewhere(export: Path, spec: Any, folder: Path, *others: Any) -> Any:
        return real(export, spec, other, *others)

    monkeypatch.setattr(stock, "stock_model", elsewhere)
    with pytest.raises(MismatchError, match="every tensor is as exported"):
        simulate(config_of(tiny_table, engine={"cohort": 1}), tmp_path / "run")


def test_verify_false_ends_a_run_without_the_check(
    tiny_table: Table, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: Any, **__: Any) -> Any:
        raise AssertionError("verified")

    monkeypatch.setattr(fedft.server.verify, "verify", never)
    config = config_of(tiny_table, engine={"cohort": 1, "verify": False})
    assert simulate(config, tmp_path / "run").summary()["verified"] is None


# ----------------------------------------------------------------------------------- the card

SHOW = """
model.eval()
import json, sys, torch
rows = json.loads(sys.argv[1])
with torch.inference_mode():
    for ids in rows:
        logits = model(input_ids=torch.tensor([ids])).logits[0]
        print("LOGITS", json.dumps(torch.log_softmax(logits.float(), -1).tolist()))
print("NAMES", json.dumps(model.config.id2label))
"""


def test_the_snippet_on_the_card_gives_the_runs_logits_and_class_names(
    tiny_table: Table, tmp_path: Path
) -> None:
    """As it stands, in a process that imports nothing of fedft."""
    run = simulate(config_of(tiny_table), tmp_path / "run")
    export = Run(run.path).adapter(2).save_pretrained(tmp_path / "adapter")
    (snippet,) = re.findall(r"```python\n(.*?)```", (export / "README.md").read_text(), re.DOTALL)
    assert '"FOLDER"' in snippet
    ids = [[2, 5, 9, 14], [3, 20, 21], [4]]
    code = (
        snippet.replace('"FOLDER"', repr(str(export)))
        + SHOW
        + "assert 'fedft' not in sys.modules\n"
    )
    ran = subprocess.run(
        [sys.executable, "-c", code, json.dumps(ids)],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
    )
    assert ran.returncode == 0, ran.stderr[-2000:]
    theirs = [json.loads(row) for row in re.findall(r"LOGITS (.*)", ran.stdout)]
    names = json.loads(re.findall(r"NAMES (.*)", ran.stdout)[0])
    own = list(_log_probabilities(run, ids))
    torch.testing.assert_close(torch.tensor(theirs), torch.tensor(own), atol=1e-4, rtol=1e-4)
    assert torch.tensor(own).std(0).max() > 1e-3
    classes = run.environment()["classes"]
    assert names == {str(i): name for i, name in enumerate(classes)}
    facts = json.loads((export / FACTS).read_text())
    assert facts["id2label"] == names and facts["label2id"] == {n: i for i, n in enumerate(classes)}
    assert facts["base"]["sha256"] == run.environment()["hashes"]["base_model"]


def _log_probabilities(run: RunDir, rows: list[list[int]]) -> Any:
    import tomllib

    from fedft.core.types import Batch
    from fedft.server.checkpoints import Checkpoints
    from fedft.server.setting import prepare_run

    config = parse_config(tomllib.loads(run.config), "run")
    state: Any = Checkpoints(run.checkpoints).load()
    with RunDir.open(run.path, writing=True) as own_run:
        bench = workbench(prepare_run(config, own_run).task.model_dump_json())
    for ids in rows:
        inputs = {
            "input_ids": torch.tensor([ids]),
            "attention_mask": torch.ones(1, len(ids)).long(),
        }
        yield [
            -bench.engine.evaluate(
                state.state.adapter, state.state.delta, [Batch(inputs, torch.tensor([label]))]
            ).loss_sum
            for label in range(3)
        ]
