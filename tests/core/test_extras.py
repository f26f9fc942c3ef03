"""What an extra installs is imported late, and its absence is one sentence with the extra's name."""

import ast
import importlib.metadata
import re
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tomli_w
import torch

from fedft.core import extras
from fedft.core.errors import EnvironmentFailure
from fedft.core.extras import EXTRAS, extra

ROOT = Path(__file__).resolve().parents[2]
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
OF = {module: name for name, modules in EXTRAS.items() for module in modules}
"""Module → the extra that has it."""
DRAGGED = ("pandas", "seaborn", "multiprocess", "dill")
"""What the packages of the extras bring along, and the slim base has not."""


def named(requirement: str) -> tuple[str, set[str]]:
    """The package of a requirement, normalised, and its extras."""
    match = re.match(r"([\w.-]+)\s*(?:\[([\w, -]*)\])?", requirement)
    assert match is not None
    extras = {part.strip() for part in (match[2] or "").split(",")} - {""}
    return re.sub(r"[-_.]+", "-", match[1]).lower(), extras


def closure(requirements: list[str]) -> set[str]:
    """The packages named by requirements, those of their extras with them."""
    found: set[str] = set()
    for name, wanted in map(named, requirements):
        if name == "fedft":
            for part in wanted:
                found |= closure(PROJECT["optional-dependencies"][part])
            continue
        found.add(name)
        for line in importlib.metadata.requires(name) or [] if wanted else []:
            if any(re.search(rf"extra\s*==\s*[\"']{part}[\"']", line) for part in wanted):
                found.add(named(line)[0])
    return found


def test_every_module_is_of_a_package_that_its_extra_installs_and_the_base_does_not() -> None:
    providers = importlib.metadata.packages_distributions()
    base = closure(PROJECT["dependencies"])
    for module, name in OF.items():
        assert name in PROJECT["optional-dependencies"], name
        installs = closure(PROJECT["optional-dependencies"][name])
        packages = {re.sub(r"[-_.]+", "-", p).lower() for p in providers.get(module, [module])}
        assert packages & installs, (module, name)
        assert not packages & base, (module, "is in the base, too")
    rest = PROJECT["optional-dependencies"].keys() - EXTRAS.keys()
    assert rest == {"all", "docs", "dev"}
    assert closure(["fedft[all]"]) >= closure(["fedft[simulation,report,privacy,gguf]"])


# ------------------------------------------------------------------------------- where they stand


def imported(tree: ast.Module) -> Iterator[tuple[str, list[ast.AST]]]:
    """Every imported module with the statements around it, the outermost first."""

    def walk(node: ast.AST, around: list[ast.AST]) -> Iterator[tuple[str, list[ast.AST]]]:
        if isinstance(node, ast.Import):
            yield from ((alias.name.split(".")[0], around) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module.split(".")[0], around
        for child in ast.iter_child_nodes(node):
            yield from walk(child, [*around, node])

    yield from walk(tree, [])


def misplaced(text: str) -> list[str]:
    """Imports of extras that stand where their absence would be a traceback."""
    wrong: list[str] = []
    for module, around in imported(ast.parse(text)):
        if module not in OF:
            continue
        if any(isinstance(n, ast.If) and "TYPE_CHECKING" in ast.dump(n.test) for n in around):
            continue
        doors = [
            item.context_expr
            for node in around
            if isinstance(node, ast.With)
            for item in node.items
            if isinstance(item.context_expr, ast.Call)
        ]
        late = any(isinstance(node, ast.FunctionDef) for node in around)
        if not late or not any(
            f"'{OF[module]}'" in ast.dump(d) or "_library" in ast.dump(d) for d in doors
        ):
            wrong.append(module)
    return wrong


def test_they_are_imported_inside_their_door() -> None:
    for path in sorted((ROOT / "fedft").rglob("*.py")):
        wrong = misplaced(path.read_text(encoding="utf-8"))
        if path.is_relative_to(ROOT / "fedft" / "report"):
            # One figure is made in one place, `charts.canvas`: what draws on it has matplotlib.
            wrong = [module for module in wrong if module != "matplotlib"]
        assert not wrong, (path, wrong)
    assert not misplaced("def f():\n with extra('data', 'x'):\n  import datasets")
    for text in (
        "import ray",
        "def f():\n import ray",
        "with extra('data', 'x'):\n import datasets",
        "def f():\n with extra('report', 'x'):\n  from datasets import config",
    ):
        assert misplaced(text), text  # the control


def test_nothing_else_is_imported_than_the_base_and_the_extras() -> None:
    base = closure(PROJECT["dependencies"])
    providers = importlib.metadata.packages_distributions()
    for path in sorted((ROOT / "fedft").rglob("*.py")):
        for module, _ in imported(ast.parse(path.read_text(encoding="utf-8"))):
            if module in sys.stdlib_module_names or module in OF or module == "fedft":
                continue
            packages = {re.sub(r"[-_.]+", "-", p).lower() for p in providers.get(module, [])}
            windows = module == "msvcrt"
            assert windows or packages & base, (path, module)


# ------------------------------------------------------------------------------- what they say


def hide(patch: pytest.MonkeyPatch, module: str) -> None:
    for name in list(sys.modules):
        if name == module or name.startswith(f"{module}."):
            patch.delitem(sys.modules, name)
    patch.setitem(sys.modules, module, None)


def simulated_on_ray() -> None:
    from fedft.server.grids.cluster import _connect

    _connect({})


def partitioned(kind: str) -> None:
    from fedft.core.data import partition
    from fedft.core.spec import PartitionSpec

    draw = {"dirichlet": partition._dirichlet, "shards": partition._shards}[kind]
    draw(PartitionSpec(kind=kind), np.arange(40) % 4, 4, 0)  # type: ignore[arg-type]


def data_read(source: str) -> None:
    from fedft.core.data.raw import BadRows
    from fedft.core.data.readers import read

    read(source, None, "train", BadRows(skip=False))


def parquet_read(folder: Path) -> None:
    path = folder / "rows.parquet"
    path.write_bytes(b"PAR1")
    data_read(str(path))


def report_written(folder: Path) -> None:
    from fedft.report import write_report

    write_report([folder], folder / "report.html")


def figure_drawn(_: Path) -> None:
    from fedft.report.charts import canvas

    with canvas():
        pass


def accounted(kind: str) -> None:
    from fedft.core.privacy import accounting

    accounting._opacus_orders() if kind == "opacus" else accounting.solved_noise(
        7.5, 0.01, 10, 1e-5
    )


def converted(folder: Path) -> None:
    from fedft.core.models.source import _converted

    _converted(folder / "model.gguf", "1")


def tracked(_: Path) -> None:
    from fedft.trackers.tensorboard import TensorBoard

    TensorBoard()


def quantized(_: Path) -> None:
    extras.need("quantized", "[model] load-in = '4bit' needs it")


def judged(name: str) -> None:
    from fedft.core.metrics import METRICS, Predictions, Tally, bleu, rouge

    bleu.library.cache_clear()
    rouge.scorer.cache_clear()
    two = torch.tensor([[0.0, 1.0], [1.0, 0.0]])
    labels = torch.tensor([1, 0])
    found = Predictions(torch.zeros(2), labels, labels, 2, two, texts=[("a b", "a b")])
    metric = METRICS[name]
    columns = {key: [column] for key, column in metric.gather(found).items()}
    metric.value(Tally(0.0, 2, metric.tally(found), columns))


TRIES: list[tuple[str, Callable[[Path], None]]] = [
    ("ray", lambda _: simulated_on_ray()),
    ("flwr_datasets", lambda _: partitioned("dirichlet")),
    ("flwr_datasets", lambda _: partitioned("shards")),
    ("datasets", lambda _: partitioned("dirichlet")),
    ("datasets", lambda _: data_read("some/where")),
    ("datasets", lambda folder: data_read(str(folder))),
    ("pyarrow", parquet_read),
    ("matplotlib", report_written),
    ("matplotlib", figure_drawn),
    ("dp_accounting", lambda _: accounted("pld")),
    ("opacus", lambda _: accounted("opacus")),
    ("gguf", converted),
    ("tensorboard", tracked),
    ("bitsandbytes", quantized),
    ("sklearn", lambda _: judged("auroc")),
    ("rouge_score", lambda _: judged("rouge-1")),
    ("sacrebleu", lambda _: judged("bleu")),
]


@pytest.mark.parametrize(
    ("module", "act"), TRIES, ids=[f"{i}-{m}" for i, (m, _) in enumerate(TRIES)]
)
def test_a_package_that_is_missing_is_one_sentence(
    module: str, act: Callable[[Path], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hide(monkeypatch, module)
    assert not extras.installed(OF[module])
    with pytest.raises(EnvironmentFailure) as caught:
        act(tmp_path)
    assert caught.value.what.startswith(f"{module} is not installed, and ")
    assert len(caught.value.what.splitlines()) == 1
    (name,) = re.findall(r"^pip install 'fedft\[(\w+)\]'$", caught.value.fix)
    assert name == OF[module] or f"fedft[{OF[module]}]" in PROJECT["optional-dependencies"][name]
    assert {m for m, _ in TRIES} == OF.keys()


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (
            ImportError("no libc\nmore", name="matplotlib.ft2font"),
            "matplotlib cannot be imported, and a report needs it: no libc",
        ),
        (
            ModuleNotFoundError("No module", name="kiwisolver.x"),
            "kiwisolver is not installed, and a report needs it",
        ),
    ],
)
def test_one_that_is_broken_says_how(error: ImportError, said: str) -> None:
    with pytest.raises(EnvironmentFailure) as caught, extra("report", "a report needs it"):
        raise error
    assert caught.value.what == said


# ------------------------------------------------------------------------------- the slim base


SLIM = f"""
import sys
for module in {(*OF, *DRAGGED)!r}:
    sys.modules[module] = None
from fedft.cli import main
main()
"""


def slim(folder: Path, *words: str | Path) -> subprocess.CompletedProcess[str]:
    """A command where nothing of any extra is installed."""
    command = [sys.executable, "-c", SLIM, *map(str, words)]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=200)


@pytest.mark.crash
def test_a_simulation_in_one_process_does_without_any(
    tiny_table: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    table = tiny_table(rounds={"count": 1}, data={"partition": {"kind": "iid"}})
    (tmp_path / "config.toml").write_text(tomli_w.dumps(table))
    for words in (
        ("plan", "config.toml", "--check"),
        ("simulate", "config.toml", "--run-dir", "run"),
        ("export", "run", "-o", "adapter", "--round", "last"),
        ("doctor",),
    ):
        done = slim(tmp_path, *words)
        assert done.returncode == 0, done.stderr
    assert "without simulation" in done.stdout
    # Refused at once, not after the last round.
    done = slim(tmp_path, "simulate", "config.toml", "--run-dir", "other", "--report")
    assert done.returncode == 3 and "fedft[report]" in done.stderr
    assert not (tmp_path / "other").exists()
