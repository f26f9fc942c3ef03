"""What users get wrong: one sentence with the place and the fix, the right exit code, nothing left behind.

Every case is a command as it is typed. None may show a traceback, a word of a library below, or
start anything.
"""

import codecs
import gzip
import json
import os
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import tomli_w

from fedft import cli

Table = Callable[..., dict[str, Any]]

BANNED = re.compile(
    r"Traceback|pydantic|validation error|Input should|Value error|\[type=|errors\.pydantic|"
    r"Error\(|site-packages|object at 0x|NoneType|errno|\.py\b|line \d+, in |sys\.set_int"
)


@dataclass(frozen=True)
class Said:
    """What a command came to: exit code, standard output, standard error."""

    code: int
    out: str
    err: str


@pytest.fixture
def fedft(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., Said]:
    def run(*arguments: object) -> Said:
        monkeypatch.setattr(sys, "argv", ["fedft", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
            raise SystemExit(0)
        captured = capsys.readouterr()
        code = ended.value.code
        return Said(code if isinstance(code, int) else 0, captured.out, captured.err)

    return run


def check(said: Said, code: int, words: str, run_dir: Path | None = None) -> None:
    """One error: its code, its words, one fix, and no run."""
    assert said.code == code, said
    assert said.out == ""
    assert re.search(words, said.err), said.err
    assert not BANNED.search(said.err), said.err
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", said.err)
    told = said.err[said.err.index("error ") :]
    assert len(re.findall(r"^  → \S", told, re.MULTILINE)) == 1, (
        "one error, and what to do about it"
    )
    assert len(told) < 3000
    if run_dir is not None:
        assert not run_dir.exists()


def start(fedft: Any, tmp_path: Path, table: dict[str, Any], *options: object) -> Said:
    (tmp_path / "config.toml").write_text(tomli_w.dumps(table))
    return fedft("simulate", tmp_path / "config.toml", "--run-dir", tmp_path / "run", *options)


# The file itself

FILES: dict[str, tuple[bytes, str]] = {
    "no TOML": (b"seed = ", "not valid TOML"),
    "JSON": (b'{"seed": 1}', "not valid TOML"),
    "YAML": (b"seed: 1\n", "not valid TOML"),
    "NUL": (b"seed = 1\0", "not valid TOML"),
    "zeros": (bytes(50), "not valid TOML"),
    "Latin-1": ("[data]\ntext = 'Größe'\n".encode("latin-1"), "not UTF-8 at byte 18"),
    "UTF-16": ("seed = 1".encode("utf-16"), "not UTF-8"),
    "twice": (b"seed = 1\nseed = 2\n", "not valid TOML: Cannot overwrite"),
    "nested": (b"seed = " + b"[" * 100_000, "nested too deep"),
    "digits": (b"seed = " + b"9" * 5000, "too many digits"),
    "digits within": (b"seed = " + b"9" * 4000, "19 digits"),
    "unknown table": (b"[dta]\n", "did you mean 'data'"),
    "table as value": (b"data = 3\n", "data = 3: a table is expected"),
    "value as list": (b"[[data]]\n", "data = .*a table is expected"),
    "date": (b"[training]\nlr = 2026-01-01\n", "lr = 2026-01-01: a number is expected"),
    "escape in a key": (b'"\\u001b[31m" = 1\n', "unknown key"),
    "long key": (b"x" * 50_000 + b" = 1\n", "x…: unknown key"),
}


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("command", ["simulate", "plan", "serve", "compare"])
def test_a_file_that_is_no_configuration(
    name: str, command: str, fedft: Any, tmp_path: Path
) -> None:
    content, words = FILES[name]
    (tmp_path / "config.toml").write_bytes(content)
    where = () if command == "plan" else ("--run-dir", tmp_path / "run")
    said = fedft(command, tmp_path / "config.toml", *where)
    check(said, 2, words, tmp_path / "run")


@pytest.mark.parametrize("kind", ["absent", "folder", "pipe", "long", "loop", "closed"])
def test_a_path_that_leads_to_no_configuration(kind: str, fedft: Any, tmp_path: Path) -> None:
    path = tmp_path / ("x" * 300 if kind == "long" else "config.toml")
    match kind:
        case "folder":
            path.mkdir()
        case "pipe":
            os.mkfifo(path)
        case "loop":
            path.symlink_to(path)
        case "closed":
            path = Path("/proc/self/mem")
    check(fedft("plan", path), 2, "cannot read")


def test_a_byte_order_mark_is_no_fault(fedft: Any, tiny_table: Table, tmp_path: Path) -> None:
    text = tomli_w.dumps(tiny_table(rounds={"count": 1}))
    (tmp_path / "config.toml").write_bytes(codecs.BOM_UTF8 + text.encode())
    assert fedft("plan", tmp_path / "config.toml").code == 0


# Tables, keys and values

TABLES: dict[str, tuple[dict[str, Any], int, str]] = {
    "misspelt key": ({"training": {"bath-size": 4}}, 2, r"\[training\] bath-size.*'batch-size'"),
    "far key": ({"training": {"zzz": 4}}, 2, "unknown key; known: accumulate"),
    "key of a table within": ({"training": {"dp": {"delat": 1}}}, 2, r"\[training.dp\] delat.*did you mean 'delta'"),
    "key of a device": ({"fleet": {"devices": [{"rnk": 1}]}}, 2, "rnk.*'rank'"),
    "word for a number": ({"training": {"lr": "fast"}}, 2, "lr = 'fast': a number is expected"),
    "true for a number": ({"rounds": {"count": True}}, 2, "count = true: a number is expected"),
    "true for a rule's number": ({"strategy": {"name": "lora-fair", "ridge": True}}, 2, "ridge = true"),
    "fraction of a round": ({"rounds": {"count": 1.5}}, 2, "count = 1.5: a whole number"),
    "no rounds": ({"rounds": {"count": 0}}, 2, "count = 0: must be greater than 0"),
    "endless": ({"training": {"lr": float("inf")}}, 2, "finite"),
    "number for a name": ({"model": {"source": 3}}, 2, "source = 3: text is expected"),
    "too many digits": ({"seed": 10**300}, 2, "19 digits"),
    "too many clients": ({"fleet": {"clients": 10**15}}, 2, "at most 100000000"),
    "too many rows": ({"data": {"partition": {"kind": "bootstrap", "rows-per-client": 10**9}}}, 2, "more than a manifest"),
    "longest row": ({"data": {"max-length": 10**12}}, 2, "at most 10000000"),
    "one of several types": ({"lora": {"target-modules": 5}}, 2, "a list or text is expected"),
    "wrong in a list": ({"lora": {"target-modules": ["query", 1]}}, 2, r"target-modules\[1\] = 1: text"),
    "nested options": ({"lora": {"method": "vera", "options": {"a": {"b": 1}}}}, 2, "vera has no 'a' in peft"),
    "layers": ({"lora": {"layers": [7]}}, 2, "no block"),
    "rule as text": ({"strategy": "ffa-lora"}, 2, r"write \[strategy\] name = 'ffa-lora'"),
    "rule without a name": ({"strategy": {}}, 2, "a table with the name of a rule"),
    "rule": ({"strategy": {"name": "fedavg-lara"}}, 2, "did you mean 'fedavg-lora'"),
    "inner rule": ({"strategy": {"name": "fedprox", "inner": {"name": "x"}}}, 2, r"\[strategy.inner\] name"),
    "kind": ({"data": {"partition": {"kind": "dirichle"}}}, 2, "'dirichlet'"),
    "method": ({"lora": {"method": "loraa"}}, 2, "peft has no such method"),
    "too large a rank": ({"lora": {"rank": 10**6}}, 2, "more than layer"),
    "distribution": ({"fleet": {"ranks": {"kind": "uniform", "low": 1}}}, 2, "high is missing"),
    "two clocks": ({"fleet": {"period-s": 3}}, 2, "there is none"),
    "NUL in a path": ({"data": {"source": "a\0.jsonl"}}, 2, "none of the known kinds"),
    "long path": ({"data": {"source": "x" * 5000 + ".csv"}}, 2, "none of the known kinds"),
    "nobody's home": ({"data": {"source": "~nobody-here/d.csv"}}, 2, "none of the known kinds"),
    "no kind": ({"data": {"source": "/etc/hostname"}}, 2, "none of the known kinds"),
    "package": ({"data": {"source": "wheel:os.path"}}, 2, "no reader"),
    "model package": ({"model": {"source": "wheel:os.path"}}, 5, "is not installed"),
    "empty package": ({"model": {"source": "wheel:"}}, 5, "is not installed"),
    "devices": ({"fleet": {"devices": "none.csv"}}, 2, "cannot read"),
    "devices with NUL": ({"fleet": {"devices": "a\0b"}}, 2, "cannot read"),
    "availability": ({"fleet": {"availability": "none.csv"}}, 2, "cannot read"),
    "no test set": ({"data": {"test-fraction": 0}}, 2, "test-fraction = 0 leaves the server no test set"),
    "hardly a test set": ({"data": {"test-fraction": 1e-6}}, 5, "leaves the server no test row"),
    "more clients than rows": ({"fleet": {"clients": 5000}, "data": {"partition": {"kind": "iid"}}}, 2, "5000 clients"),
    "owners": ({"data": {"partition": {"kind": "natural", "column": "lable"}}}, 2, 'column = "label"'),
    "no owner": ({"data": {"partition": {"kind": "natural"}}}, 2, "needs the column"),
    "markup": ({"model": {"source": "[/red][bold]\\"}}, 5, r"\[/red\]"),
}  # fmt: skip


@pytest.mark.parametrize("name", TABLES)
def test_a_value_that_cannot_be(name: str, fedft: Any, tiny_table: Table, tmp_path: Path) -> None:
    change, code, words = TABLES[name]
    check(start(fedft, tmp_path, tiny_table(**change)), code, words, tmp_path / "run")


SETTINGS: dict[str, str] = {
    "seed": "not KEY=VALUE",
    "=3": "not KEY=VALUE",
    "a..b=1": "not KEY=VALUE",
    ".=1": "not KEY=VALUE",
    "seed.x=1": "seed = a table: a whole number",
    "strategy=ffa-lora": "write .strategy. name",
    "strategy.name.x=1": "a table with the name of a rule",
    "training=3": "training = 3: a table",
    "training.lr=": "lr = '': a number",
    "training.lr=1\nseed=2": "lr = '1.nseed=2': a number",
    "rounds.count=" + "9" * 6000: "count = '9.*: must have fewer digits",
    "lora.layers=" + "[" * 50_000: r"layers = '\[",
    "data.source=\udcff.csv": "not UTF-8",
    "rounds.cuont=1": "did you mean 'count'",
    "data.text=": "no column ''",
}


@pytest.mark.parametrize("setting", SETTINGS, ids=lambda s: ascii(s[:20]))
def test_a_setting_that_cannot_be(
    setting: str, fedft: Any, tiny_table: Table, tmp_path: Path
) -> None:
    said = start(fedft, tmp_path, tiny_table(), "--set", setting)
    check(said, 5 if setting == "data.text=" else 2, SETTINGS[setting], tmp_path / "run")


# Data

GOOD = [{"text": f"the old paw {i}", "label": "ab"[i % 2]} for i in range(40)]
LINES = "\n".join(map(json.dumps, GOOD)).encode() + b"\n"


def lines(*rows: object) -> bytes:
    return LINES + b"".join(json.dumps(row).encode() + b"\n" for row in rows)


DATA: dict[str, tuple[str, bytes, str]] = {
    "empty": ("d.jsonl", b"", "it is empty"),
    "blank": ("d.jsonl", b"\n \n", "has no rows"),
    "header alone": ("d.csv", b"text,label\n", "has no rows"),
    "empty list": ("d.json", b"[]", "has no rows"),
    "Excel": ("d.csv", b"PK\x03\x04" + bytes(99), "ZIP archive, as Excel"),
    "Parquet": ("d.jsonl", b"PAR1" + bytes(99), "a Parquet file"),
    "text as Parquet": ("d.parquet", LINES, "not a readable Parquet file"),
    "CSV as JSON": ("d.jsonl", b"text,label\na,b\nc,d\n", "3 bad rows .malformed 3."),
    "JSON as CSV": ("d.csv", LINES, "no column 'text'|must name every column"),
    "UTF-16": ("d.csv", "text,label\na,b\n".encode("utf-16"), "UTF-16"),
    "Latin-1": ("d.csv", b"text,label\n" + b"gr\xfcn,a\nblau,b\n" * 20, "20 bad rows .encoding 20.*\n.*d.csv:2: not UTF-8"),
    "columns": ("d.csv", b"texts,labels\na,b\n", 'set data.text = "texts"'),
    "far columns": ("d.csv", b"review,stars\na,b\n", "to the column you mean"),
    "twice": ("d.csv", b"text,label,text\na,b,c\n", "'text' stands there 2 times"),
    "ragged": ("d.csv", b"text,label\na,b\nc\nd,e,f\ng,h\n", "2 bad rows"),
    "open quote": ("d.csv", b'text,label\na,b\n"c,d\ne,f\n', "is a quote left open"),
    "one class": ("d.jsonl", LINES.replace(b'"b"', b'"a"'), "has only the class .a.; classification needs two"),
    "no label": ("d.jsonl", lines({"text": "x"}), "d.jsonl:41: label: missing"),
    "NaN": ("d.jsonl", LINES + b'{"text": NaN, "label": NaN}\n', "d.jsonl:41: text: missing"),
    "numbers": ("d.jsonl", lines({"text": 3, "label": "a"}), "d.jsonl:41: text: text is expected, got int"),
    "lists": ("d.jsonl", lines({"text": ["x"], "label": ["a"]}), "text is expected, got list"),
    "nested": ("d.jsonl", LINES + b"[" * 50_000 + b"\n", "too deep"),
    "digits": ("d.jsonl", LINES + b'{"label": ' + b"9" * 9000 + b"}\n", "too long a number"),
    "surrogate": ("d.jsonl", LINES + b'{"text": "x", "label": "\\ud800"}\n', "not a valid Unicode"),
    "10 MB line": ("d.jsonl", LINES + b'{"text": "' + b"x" * 10**7 + b'"}\n', "longer than 1,000,000 bytes"),
    "one 10 MB line": ("d.csv", b"x" * 10**7, "longer than 1,000,000 bytes"),
    "half a list": ("d.json", b"[" + b",".join(LINES.splitlines()), "begins as a JSON list"),
    "columns as an object": ("d.json", b'{\n"text": ["a"],\n"label": ["b"]\n}', "one JSON object over several lines"),
    "cut gz": ("d.jsonl.gz", gzip.compress(LINES)[:-12], "cannot be decompressed"),
    "bad rows": ("d.jsonl", b"{\n" * 30 + LINES, r"30 bad rows[\s\S]*and 20 more"),
    "escape": ("d.csv", b"\x1b[31mtext,label\na,b\n", "no column 'text'"),
    "markup": ("d.csv", b"[/bold]text,label\na,b\n", r"\[/bold\]text"),
    "zeros": ("d.csv", bytes(500), "not text"),
    "null rows": ("d.jsonl", b"null\n" * 3, "3 bad rows"),
}  # fmt: skip


@pytest.mark.parametrize("name", DATA)
@pytest.mark.parametrize("command", ["simulate", "plan"])
def test_data_that_cannot_be_trained_on(
    name: str, command: str, fedft: Any, tiny_table: Table, tmp_path: Path
) -> None:
    file, content, words = DATA[name]
    (tmp_path / file).write_bytes(content)
    table = tiny_table(data={"source": file, "text": "text", "label": "label"})
    if command == "simulate":
        check(start(fedft, tmp_path, table), 5, words, tmp_path / "run")
        return
    (tmp_path / "config.toml").write_text(tomli_w.dumps(table))
    check(fedft("plan", tmp_path / "config.toml"), 5, words)


TESTS: dict[str, tuple[bytes, bool, str]] = {
    "empty": (b"", False, "it is empty"),
    "all bad": (b"{\n[\n", False, "2 bad rows"),
    "all bad, skipped": (b"{\n[\n", True, "t.jsonl has no rows left after skipping 2"),
    "other classes": (b'{"text": "x", "label": "z"}\n' * 3, False, "3 bad rows.*\n.*'z' is none of the 2 classes .a, b. of the training data"),
    "other classes, skipped": (b'{"text": "x", "label": "z"}\n', True, "no rows left after skipping"),
    "other columns": (b'{"txt": "x"}\n', False, "t.jsonl has no column 'text'"),
}  # fmt: skip


@pytest.mark.parametrize("name", TESTS)
def test_a_test_file_that_cannot_be_scored(
    name: str, fedft: Any, tiny_table: Table, tmp_path: Path
) -> None:
    content, skip, words = TESTS[name]
    (tmp_path / "d.jsonl").write_bytes(LINES)
    (tmp_path / "t.jsonl").write_bytes(content)
    data = {"source": "d.jsonl", "test-source": "t.jsonl", "skip-bad": skip}
    check(start(fedft, tmp_path, tiny_table(data=data)), 5, words, tmp_path / "run")


def test_data_that_are_no_file(fedft: Any, tiny_table: Table, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.jsonl")
    (tmp_path / "folder.csv").mkdir()
    (tmp_path / "empty").mkdir()
    cases = (("pipe.jsonl", "a pipe"), ("folder.csv", "Is a directory"), ("empty", "load_dataset"))
    for source, words in cases:
        said = start(fedft, tmp_path, tiny_table(data={"source": source}))
        check(said, 5, words, tmp_path / "run")


# Commands


def commands(tmp_path: Path, config: Path) -> dict[str, tuple[Sequence[object], int, str]]:
    """Each with files of its own; ``run`` is where nothing may be."""
    file, run = tmp_path / "file", tmp_path / "run"
    file.write_text("x")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("x")
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "config.toml").write_text("seed = ")
    (tmp_path / "arms.toml").write_text("x = 1\n")
    (tmp_path / "kit").write_text("{}")
    (tmp_path / "kit").chmod(0o600)
    full, damaged = tmp_path / "full", tmp_path / "damaged"
    return {
        "run dir is a file": (("simulate", config, "--run-dir", file), 2, "is a file"),
        "run dir is full": (("simulate", config, "--run-dir", full), 2, "not empty"),
        "run dir under a file": (("simulate", config, "--run-dir", file / "x"), 3, "cannot create"),
        "backend": (("simulate", config, "--run-dir", run, "--backend", "spark"), 2, "'spark': 'ray'"),
        "workers": (("simulate", config, "--run-dir", run, "--workers", "0"), 2, "workers = 0"),
        "compare in a file": (("compare", config, "--run-dir", file), 2, "is a file"),
        "no rule": (("compare", config, "--run-dir", run, "--strategies", ""), 2, "no rule is called"),
        "rule": (("compare", config, "--run-dir", run, "--strategies", "ffalora"), 2, "did you mean 'ffa-lora'"),
        "rule twice": (("compare", config, "--run-dir", run, "--strategies", "ffa-lora,ffa-lora"), 2, "named twice"),
        "seed twice": (("compare", config, "--run-dir", run, "--seeds", "1,1"), 2, "named twice"),
        "seed": (("compare", config, "--run-dir", run, "--seeds", "-1"), 2, "seed = -1"),
        "arm": (("compare", config, "--run-dir", run, "--arms", tmp_path / "arms.toml"), 2, "'x' is no arm"),
        "arms": (("compare", config, "--run-dir", run, "--arms", full), 2, "cannot read"),
        "confidence": (("compare", config, "--run-dir", run, "--confidence", "7"), 2, "7"),
        "resume nothing": (("resume", run), 2, "not a run directory"),
        "resume a file": (("resume", file), 2, "not a run directory"),
        "resume damage": (("resume", damaged), 2, "not valid TOML"),
        "fork nothing": (("resume", run, "--fork", tmp_path / "fork"), 2, "not a run directory"),
        "set on nothing": (("resume", run, "--set", "seed=1"), 2, "cannot read"),
        "report nothing": (("report", run), 2, "."),
        "report a file": (("report", file), 2, "."),
        "export nothing": (("export", run, "-o", tmp_path / "a"), 2, "not a run directory"),
        "clients of nothing": (("clients", "--run-dir", run), 2, "not a run directory"),
        "revoke": (("revoke", "ann", "--run-dir", run), 2, "."),
        "invite": (("invite", "ann", "--run-dir", run, "-o", tmp_path / "k"), 2, "."),
        "join without data": (("join", file, "--data", run), 2, "no data"),
        "join without a kit": (("join", run, "--data", file), 2, "."),
        "join by no kit": (("join", tmp_path / "kit", "--data", file), 2, "not a join kit"),
        "serve in a file": (("serve", config, "--run-dir", file), 2, "is a file"),
    }  # fmt: skip


NAMES = [
    *("run dir is a file", "run dir is full", "run dir under a file", "backend", "workers"),
    *("compare in a file", "no rule", "rule", "rule twice", "seed twice", "seed", "arm", "arms"),
    *("confidence", "resume nothing", "resume a file", "resume damage", "fork nothing"),
    *("set on nothing", "report nothing", "report a file", "export nothing", "clients of nothing"),
    *("revoke", "invite", "join without data", "join without a kit", "join by no kit"),
    "serve in a file",
]


@pytest.mark.parametrize("name", NAMES)
def test_a_command_that_cannot_be_run(
    name: str, fedft: Any, tiny_table: Table, tmp_path: Path
) -> None:
    config = tmp_path / "config.toml"
    config.write_text(tomli_w.dumps(tiny_table()))
    known = commands(tmp_path, config)
    assert [*known] == NAMES
    arguments, code, words = known[name]
    check(fedft(*arguments), code, words, tmp_path / "run")


@pytest.mark.parametrize("round_", ["²", "-1", "1e3", "first", "9" * 30, ""])
def test_a_round_that_is_none(round_: str, fedft: Any, tmp_path: Path) -> None:
    said = fedft("export", tmp_path, "-o", tmp_path / "a", "--round", round_)
    assert said.code == 2 and not BANNED.search(said.err)
