"""Files from elsewhere: links, pipes, lying sizes, bombs, torn ones. One sentence each, and no hang.

As in :mod:`tests.test_traps`, every case is a command as it is typed.
"""

import gzip
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tomli_w

from tests.conftest import StopAfter
from tests.test_traps import BANNED, Said, check, fedft, start

__all__ = ["fedft"]

Table = Callable[..., dict[str, Any]]
Harm = Callable[[Path], object]

pytestmark = pytest.mark.timeout(60)

NESTED = b"[" * 200_000
DIGITS = b'{"n": ' + b"9" * 5000 + b"}"


def pipe(path: Path) -> None:
    path.unlink(missing_ok=True)
    os.mkfifo(path)


def link(path: Path, target: str = "/etc/hostname") -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    path.symlink_to(target)


def sparse(path: Path, size: int) -> None:
    with path.open("wb") as file:
        file.truncate(size)


def moved(path: Path) -> None:
    """A folder outside, and a link to it in its place."""
    outside = path.parents[1] / "outside"
    shutil.move(path, outside)
    path.symlink_to(outside)


def lying(path: Path) -> None:
    """A safetensors file whose header has 2^60 bytes."""
    path.write_bytes((2**60).to_bytes(8, "little") + b"{}")


# ── run directories ───────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="session")
def paused(
    tiny_model: Path, tiny_data: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[dict[str, Any], Path]:
    """A configuration, and the directory of a run that was stopped after two rounds of four."""
    from fedft.core.errors import Interrupted
    from fedft.server.config_file import parse_toml
    from fedft.server.run import simulate

    table = {
        "model": {"source": str(tiny_model)},
        "lora": {"rank": 4, "alpha": 8},
        "data": {"source": str(tiny_data)},
        "fleet": {"clients": 8},
        "rounds": {"count": 4, "per-round": 4, "evaluate-every": 2},
        "training": {"batch-size": 4},
        "engine": {"backend": "inline", "cohort": 1, "verify": False},
    }
    folder = tmp_path_factory.mktemp("paused") / "run"
    stop = StopAfter(2)
    with pytest.raises(Interrupted):
        simulate(parse_toml(tomli_w.dumps(table), "table"), folder, trackers=[stop], stop=stop)
    return table, folder


def manifests(run: Path) -> list[Path]:
    return sorted((run / "checkpoints").glob("round-*.json"))


def each_manifest(harm: Harm) -> Harm:
    return lambda run: [harm(path) for path in manifests(run)]


def each_blob(harm: Harm) -> Harm:
    return lambda run: [harm(path) for path in (run / "checkpoints").glob("*.safetensors")]


RUNS: dict[str, tuple[Harm, int, str]] = {
    "config is a link": (lambda run: link(run / "config.toml"), 7, "config.toml is a symbolic link"),
    "config is a pipe": (lambda run: pipe(run / "config.toml"), 7, "config.toml is no regular file"),
    "config is a folder": (lambda run: ((run / "config.toml").unlink(), (run / "config.toml").mkdir()), 7, "config.toml is no regular file"),
    "config is torn": (lambda run: os.truncate(run / "config.toml", 40), 2, "not valid TOML"),
    "config is empty": (lambda run: os.truncate(run / "config.toml", 0), 6, "is empty"),
    "config is not UTF-8": (lambda run: (run / "config.toml").write_bytes(b"\xff\xfe"), 6, "not UTF-8"),
    "config is nested": (lambda run: (run / "config.toml").write_bytes(b"a = " + NESTED), 2, "nested too deep|not valid TOML"),
    "config has a number": (lambda run: (run / "config.toml").write_bytes(b"seed = " + b"9" * 5000), 2, "too many digits"),
    "config is huge": (lambda run: sparse(run / "config.toml", 2**40), 3, "the most that can be meant"),
    "config is missing, its beginning is there": (lambda run: (run / "config.toml").rename(run / ".config.toml.tmp"), 2, "beginning of one, which a crash left"),
    "environment is a pipe": (lambda run: pipe(run / "environment.json"), 7, "no regular file"),
    "environment is a link": (lambda run: link(run / "environment.json"), 7, "symbolic link"),
    "environment is huge": (lambda run: sparse(run / "environment.json", 2**40), 3, "the most that can be meant"),
    "environment is nested": (lambda run: (run / "environment.json").write_bytes(NESTED), 6, "damaged"),
    "environment has a number": (lambda run: (run / "environment.json").write_bytes(DIGITS), 6, "damaged"),
    "environment is a list": (lambda run: (run / "environment.json").write_bytes(b"[]"), 6, "damaged"),
    "rounds are a pipe": (lambda run: pipe(run / "rounds.jsonl"), 7, "no regular file"),
    "rounds are a link": (lambda run: link(run / "rounds.jsonl"), 7, "symbolic link"),
    "rounds are a device": (lambda run: link(run / "rounds.jsonl", "/dev/zero"), 7, "symbolic link"),
    "clients are a pipe": (lambda run: pipe(run / "clients.jsonl"), 7, "no regular file"),
    "the ledger is a link": (lambda run: link(run / "privacy.jsonl"), 7, "symbolic link"),
    "the lock is a pipe": (lambda run: pipe(run / ".lock"), 7, "no regular file"),
    "the lock is a link": (lambda run: link(run / ".lock"), 7, "symbolic link"),
    "checkpoints lead out": (lambda run: moved(run / "checkpoints"), 7, "checkpoints is a symbolic link"),
    "the partition leads out": (lambda run: moved(run / "partition"), 7, "partition is a symbolic link"),
    "the tokenizer leads out": (lambda run: moved(run / "tokenizer"), 7, "tokenizer is a symbolic link"),
    "manifests are pipes": (each_manifest(pipe), 6, "."),
    "manifests are links": (each_manifest(link), 6, "."),
    "manifests are huge": (each_manifest(lambda path: sparse(path, 2**40)), 6, "."),
    "manifests are nested": (each_manifest(lambda path: path.write_bytes(NESTED)), 6, "."),
    "manifests have a number": (each_manifest(lambda path: path.write_bytes(DIGITS)), 6, "."),
    "blobs are pipes": (each_blob(pipe), 6, "."),
    "blobs are links": (each_blob(link), 6, "."),
    "blobs are huge": (each_blob(lambda path: sparse(path, 2**40)), 6, "."),
    "blobs lie": (each_blob(lying), 6, "."),
    "the partition's manifest is a pipe": (lambda run: pipe(run / "partition" / "manifest.json"), 6, "pipe or a device"),
    "the partition's manifest is huge": (lambda run: sparse(run / "partition" / "manifest.json", 2**40), 6, "most that can be meant"),
    "the partition's manifest is nested": (lambda run: (run / "partition" / "manifest.json").write_bytes(NESTED), 6, "cannot be read"),
    "the partition's rows are a pipe": (lambda run: pipe(run / "partition" / "rows.npy"), 6, "pipe or a device"),
    "the partition's rows lead out": (lambda run: link(run / "partition" / "rows.npy"), 6, "leads out"),
    "the partition's rows are none": (lambda run: (run / "partition" / "rows.npy").write_bytes(b"\x93NUMPY\x01\x00\xff\xff{"), 6, "cannot be read"),
}  # fmt: skip


@pytest.fixture
def harmed(paused: tuple[dict[str, Any], Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(paused[1], tmp_path / "run"))


@pytest.mark.parametrize("name", RUNS)
def test_a_run_directory_that_cannot_be_trusted(name: str, fedft: Any, harmed: Path) -> None:
    harm, code, words = RUNS[name]
    harm(harmed)
    check(fedft("resume", harmed), code, words)


def test_the_same_run_unharmed_goes_on(fedft: Any, harmed: Path) -> None:
    assert fedft("resume", harmed).code == 0


@pytest.mark.parametrize("name", [name for name in RUNS if RUNS[name][1] == 7 or "huge" in name])
def test_a_report_of_it_shows_no_traceback_either(name: str, fedft: Any, harmed: Path) -> None:
    RUNS[name][0](harmed)
    said: Said = fedft("report", harmed)
    assert not BANNED.search(said.err), said.err


def test_what_a_crash_left_before_the_first_line_is_taken_over(
    fedft: Any, tiny_table: Table, tmp_path: Path
) -> None:
    """A kill between the beginning and the end of the first write."""
    run = tmp_path / "run"
    run.mkdir()
    (run / ".lock").touch()
    (run / ".config.toml.tmp").write_text("[mod")
    table = tiny_table(rounds={"count": 1, "per-round": 2})
    assert start(fedft, tmp_path, table).code == 0
    assert not (run / ".config.toml.tmp").exists()


def test_a_comparison_whose_plan_is_torn(fedft: Any, tiny_table: Table, tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_text(tomli_w.dumps(tiny_table(rounds={"count": 1})))
    command = ("compare", tmp_path / "config.toml", "--run-dir", tmp_path / "cmp", "--seeds", "0")
    command = (*command, "--strategies", "ffa-lora")
    assert fedft(*command).code == 0
    [plan] = (tmp_path / "cmp").glob("*.json")
    for harm in (
        lambda: os.truncate(plan, 10),
        lambda: plan.write_bytes(NESTED),
        lambda: pipe(plan),
    ):
        harm()
        check(fedft(*command), 6, "damaged")


# ── models ────────────────────────────────────────────────────────────────────────────────────

WEIGHTS = "model.safetensors"

MODELS: dict[str, tuple[Harm, str]] = {
    "config is a pipe": (lambda m: pipe(m / "config.json"), "pipe or device"),
    "config is a device": (lambda m: link(m / "config.json", "/dev/zero"), "pipe or device"),
    "config is a folder": (lambda m: ((m / "config.json").unlink(), (m / "config.json").mkdir()), "a folder"),
    "config is empty": (lambda m: os.truncate(m / "config.json", 0), "not JSON"),
    "config is a list": (lambda m: (m / "config.json").write_bytes(b"[]"), "a list where a table"),
    "config is nested": (lambda m: (m / "config.json").write_bytes(NESTED), "nested too deep"),
    "config has a number": (lambda m: (m / "config.json").write_bytes(DIGITS), "too many digits"),
    "config is not UTF-8": (lambda m: (m / "config.json").write_bytes(b'{"a": "\xff"}'), "not JSON"),
    "config is huge": (lambda m: sparse(m / "config.json", 2**40), "1,099,511,627,776 bytes"),
    "weights are a pipe": (lambda m: pipe(m / WEIGHTS), "pipe or device"),
    "weights are a device": (lambda m: link(m / WEIGHTS, "/dev/zero"), "pipe or device"),
    "weights lie": (lambda m: lying(m / WEIGHTS), "cannot hold the header"),
    "weights are empty": (lambda m: os.truncate(m / WEIGHTS, 0), "."),
    "weights are cut": (lambda m: os.truncate(m / WEIGHTS, 100), "cannot hold the header|torn"),
    "weights' header is nested": (lambda m: (m / WEIGHTS).write_bytes(len(NESTED).to_bytes(8, "little") + NESTED), "nested too deep"),
    "weights' header is a list": (lambda m: (m / WEIGHTS).write_bytes((2).to_bytes(8, "little") + b"[]"), "no safetensors file"),
    "weights' header is text": (lambda m: (m / WEIGHTS).write_bytes((9).to_bytes(8, "little") + b'{"a": "b"}'), "no safetensors file"),
    "tokenizer is a pipe": (lambda m: pipe(m / "tokenizer.json"), "pipe or device"),
    "tokenizer is huge": (lambda m: sparse(m / "tokenizer.json", 2**40), "the most that can be meant"),
    "tokenizer's settings are a pipe": (lambda m: pipe(m / "tokenizer_config.json"), "pipe or device"),
    "template is a pipe": (lambda m: pipe(m / "chat_template.jinja"), "pipe or device"),
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("command", ["simulate", "plan"])
def test_a_model_that_cannot_be_trusted(
    name: str, command: str, fedft: Any, tiny_model: Path, tiny_table: Table, tmp_path: Path
) -> None:
    harm, words = MODELS[name]
    model = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    harm(model)
    table = tiny_table(model={"source": str(model)})
    if command == "simulate":
        check(start(fedft, tmp_path, table), 5, words, tmp_path / "run")
        return
    (tmp_path / "config.toml").write_text(tomli_w.dumps(table))
    check(fedft("plan", tmp_path / "config.toml"), 5, words)


def test_links_of_a_hub_cache_are_followed(
    fedft: Any, tiny_model: Path, tiny_table: Table, tmp_path: Path
) -> None:
    (tmp_path / "model").mkdir()
    for path in tiny_model.iterdir():
        (tmp_path / "model" / path.name).symlink_to(path)
    (tmp_path / "config.toml").write_text(
        tomli_w.dumps(tiny_table(model={"source": str(tmp_path / "model")}))
    )
    assert fedft("plan", tmp_path / "config.toml").code == 0


# ── data, kits, configurations ────────────────────────────────────────────────────────────────


def parquet_bomb(path: Path) -> None:
    """A kilobyte or two, and 2.4 GB of text."""
    import pyarrow as pa
    import pyarrow.parquet as parquet

    text = pa.DictionaryArray.from_arrays(pa.array([0] * 2400, pa.int32()), pa.array(["x" * 10**6]))
    labels = pa.DictionaryArray.from_arrays(
        pa.array([0, 1] * 1200, pa.int32()), pa.array(["a", "b"])
    )
    parquet.write_table(pa.table({"text": text, "label": labels}), path, compression="zstd")
    assert path.stat().st_size < 20_000


def parquet_of_numbers(path: Path) -> None:
    """A few kilobytes, and a hundred million equal numbers."""
    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as parquet

    with parquet.ParquetWriter(path, pa.schema([("text", pa.int8())])) as file:
        for _ in range(10):
            file.write_table(pa.table({"text": pa.array(np.zeros(10**7, np.int8))}))
    assert path.stat().st_size < 500_000


def gzip_bomb(path: Path) -> None:
    row = json.dumps({"text": "x" * 100_000, "label": "a"}).encode() + b"\n"
    with gzip.open(path, "wb") as file:
        for _ in range(3000):
            file.write(row)
    assert path.stat().st_size < 10**6


DATA: dict[str, tuple[str, Harm]] = {
    "texts in Parquet": ("d.parquet", parquet_bomb),
    "numbers in Parquet": ("d.parquet", parquet_of_numbers),
    "rows in gzip": ("d.jsonl.gz", gzip_bomb),
}


@pytest.mark.parametrize("name", DATA)
def test_data_that_unpack_into_gigabytes(
    name: str, fedft: Any, tiny_table: Table, tmp_path: Path
) -> None:
    import resource

    file, make = DATA[name]
    make(tmp_path / file)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    table = tiny_table(data={"source": str(tmp_path / file), "text": "text", "label": "label"})
    check(start(fedft, tmp_path, table), 5, "unpacks into more than", tmp_path / "run")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 800 * 1024  # KiB


def test_honest_parquet_with_repeated_and_nested_values_reads_as_before(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as parquet

    from fedft.core.bombs import read_parquet

    table = pa.table(
        {
            "text": ["a b", None, "a b", "é" * 100],
            "bytes": [b"\x00", b"", None, b"\xff"],
            "many": [["x", "y"], [], None, ["x"]],
            "inside": [{"t": "x", "n": 1}, None, {"t": None, "n": 2}, {"t": "y", "n": 3}],
            "number": [1.5, None, 2.0, 3.0],
            "kind": pa.array(["a", "b", "a", "b"]).dictionary_encode(),
        }
    )
    parquet.write_table(table, tmp_path / "d.parquet")
    found = read_parquet("d", (tmp_path / "d.parquet").read_bytes())
    for name in table.column_names:
        assert found.column(name).to_pylist() == table.column(name).to_pylist(), name


@pytest.mark.parametrize(
    ("harm", "code", "words"),
    [
        (pipe, 7, "pipe or a device"),
        (link, 7, "not a link"),
        (lambda kit: (sparse(kit, 2**40), kit.chmod(0o600)), 7, "more than 268,435,456 bytes"),
        (lambda kit: (kit.write_bytes(NESTED), kit.chmod(0o600)), 2, "not a join kit"),
        (lambda kit: (kit.write_bytes(DIGITS), kit.chmod(0o600)), 2, "not a join kit"),
        (lambda kit: (kit.write_bytes(b"\xff"), kit.chmod(0o600)), 2, "not a join kit"),
    ],
    ids=["pipe", "link", "huge", "nested", "digits", "bytes"],
)
def test_a_kit_that_cannot_be_trusted(
    harm: Harm, code: int, words: str, fedft: Any, tiny_data: Path, tmp_path: Path
) -> None:
    harm(tmp_path / "kit")
    check(fedft("join", tmp_path / "kit", "--data", tiny_data), code, words)


@pytest.mark.parametrize(
    ("harm", "words"),
    [
        (pipe, "pipe or a device"),
        (lambda path: link(path, "/dev/zero"), "pipe or a device"),
        (lambda path: sparse(path, 2**40), "the most that can be meant"),
        (lambda path: path.write_bytes(b"a = " + NESTED), "nested too deep|not valid TOML"),
        (lambda path: path.write_bytes(b"seed = " + b"9" * 5000), "too many digits"),
    ],
    ids=["pipe", "device", "huge", "nested", "digits"],
)
@pytest.mark.parametrize("command", ["plan", "simulate", "serve"])
def test_a_configuration_that_is_no_file_of_text(
    harm: Harm, words: str, command: str, fedft: Any, tmp_path: Path
) -> None:
    harm(tmp_path / "config.toml")
    check(fedft(command, tmp_path / "config.toml"), 2, words)


NUMBERS = {
    "engine.workers=100000": "workers = .*1024",
    "engine.workers=1e6": "workers",
    "engine.threads=1000000": "threads = 1000000: must be at most 1024",
    "strategy.target-epsilon=1e-9": "target-epsilon = .*0.001",
    "strategy.target-epsilon=1e9": "target-epsilon = .*50",
    "strategy.noise-multiplier=1e-6": "noise-multiplier = .*0.01",
    "training.dp.noise-multiplier=1e-6": "noise-multiplier = .*0.01",
}


@pytest.mark.parametrize("setting", NUMBERS)
@pytest.mark.parametrize("command", ["plan", "simulate"])
def test_a_number_out_of_all_proportion(
    setting: str, command: str, fedft: Any, tiny_table: Table, tmp_path: Path
) -> None:
    table = tiny_table(strategy={"name": "central-dp"}) if "strategy" in setting else tiny_table()
    (tmp_path / "config.toml").write_text(tomli_w.dumps(table))
    said = fedft(command, tmp_path / "config.toml", "--set", setting)
    check(said, 2, NUMBERS[setting])
