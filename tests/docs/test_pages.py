"""The pages that are made from the program are whole, and no link of any page is dead."""

import importlib.util
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import BaseModel

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "docs"))
from generate import api, links, options, papers

sys.path.remove(str(ROOT / "docs"))

from fedft.server.config import RunConfig
from fedft.server.config_file import parse_config
from fedft.strategies import RULES, FedAvgLoRA

PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


# ------------------------------------------------------------------------------------- options


def keys(schema: dict[str, Any], at: str, table: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Table and key of everything that a JSON schema has below: another way to walk the models."""
    for key, value in table.get("properties", {}).items():
        below = list(tables(schema, value))
        if key != "inner" and not (at == "" and key == "strategy"):
            for inner in below:
                yield from keys(schema, f"{at}.{key}" if at else key, inner)
        if not (at == "" and below):
            yield at, key


def tables(schema: dict[str, Any], value: Any) -> Iterator[dict[str, Any]]:
    """The tables that a value may be."""
    if isinstance(value, list):
        for item in value:
            yield from tables(schema, item)
    elif isinstance(value, dict):
        if "$ref" in value:
            found = schema["$defs"][value["$ref"].rpartition("/")[2]]
            if "properties" in found:
                yield found
        for word in ("anyOf", "oneOf", "allOf", "items", "prefixItems"):
            yield from tables(schema, value.get(word))


def of_rules() -> Iterator[tuple[str, str]]:
    for rule in RULES:
        name = f"strategy: {rule.model_fields['name'].default}"
        schema = rule.model_json_schema(by_alias=True)
        own = schema if "properties" in schema else schema["$defs"][rule.__name__]
        for at, key in keys(schema, name, own):
            if (at, key) != (name, "name"):
                yield at, key


def test_every_key_of_the_configuration_is_in_the_reference() -> None:
    schema = RunConfig.model_json_schema(by_alias=True)
    wanted = {*keys(schema, "", schema), *of_rules()}
    found = {(option.table, option.key) for option in options.options()}
    assert found == wanted
    assert len(found) > 180


def test_every_key_that_fedft_plan_writes_out_is_there() -> None:
    """By a third way: the file of a whole configuration."""
    table = tomllib.loads(parse_config({}).to_toml())
    found = {(option.table, option.key) for option in options.options()}
    for name, values in table.items():
        if isinstance(values, dict):
            at = "strategy: fedavg-lora" if name == "strategy" else name
            rest = [
                key
                for key in values
                if (at, key) not in found and (name, key) != ("strategy", "name")
            ]
            assert not rest, (name, rest)
        else:
            assert ("", name) in found


def test_every_key_says_what_it_does_and_a_number_with_a_suffix_has_its_unit() -> None:
    for option in options.options():
        assert option.effect, f"{option.table} {option.key}: no line under Attributes:"
        assert option.kind and option.default and option.since, option
        if option.key.endswith(("-s", "-mib", "-mbps")):
            assert option.unit, option
    units = {option.key: option.unit for option in options.options()}
    assert (units["deadline-s"], units["up-mbps"], units["batch-size"]) == (
        "seconds",
        "Mbit/s",
        "examples",
    )


def test_defaults_are_those_of_the_program() -> None:
    shown = {(o.table, o.key): o.default for o in options.options()}
    assert shown["rounds", "count"] == f"`{RunConfig().rounds.count}`"
    assert shown["training", "lr"] == "`0.005`"
    assert shown["rounds", "quorum"] == "none"
    assert shown["strategy: lora-fair", "objective"] == '`"frobenius-ridge"`'


def test_a_key_without_a_line_is_noticed_and_a_new_one_says_since_when() -> None:
    """The control."""
    from pydantic import Field

    class Bad(BaseModel):
        """A table.

        Attributes:
            told: what it does,
                on two lines.
            one, two: both.
        """

        told: int = 1
        untold: int = 2
        late: float = Field(3.0, json_schema_extra={"since": "0.7", "unit": "GiB"})

    about = options.effects(Bad)
    assert options.plain(about["told"]) == "what it does, on two lines."
    assert about["one"] == about["two"]
    assert "untold" not in about
    late = options._option("t", "late", Bad.model_fields["late"], "x")
    assert (late.since, late.unit, late.kind) == ("0.7", "GiB", "number")


def test_the_page_is_a_table_a_section_in_valid_markdown() -> None:
    page = options.page()
    rows = [line for line in page.splitlines() if line.startswith("| `")]
    assert len(rows) == len(options.options())
    for row in rows:
        cells = row.replace("\\|", "").split("|")
        assert len(cells) == 8, row
    assert all(
        f"`{rule.model_fields['name'].default}`" in page
        or f'"{rule.model_fields["name"].default}"' in page
        for rule in RULES
    )


# -------------------------------------------------------------------------------------- papers


def test_the_papers_page_is_what_the_rules_say() -> None:
    assert papers.PAGE.read_text("utf-8") == papers.page(), "python docs/generate/papers.py"
    entries = [papers.entry(rule) for rule in RULES]
    for entry in entries:
        assert (ROOT / entry.file).exists()
        assert (ROOT / "docs" / "strategies" / f"{entry.name}.md").exists()
        assert entry.state.split(",")[0] in ("stable", "experimental"), entry
    assert {e.name for e in entries if e.state == "stable"} >= {"fedavg-lora", "fedbuff", "krum"}
    assert all(len(line) <= 120 for line in papers.page().splitlines())


@pytest.mark.parametrize(
    ("doc", "said"),
    [
        ("Title.\n\nNo paper.\n\nDepartures from the paper: none.", "cites no paper"),
        ("Title.\n\n    A, B, 2024.\n\nWhatever.", "no paragraph"),
    ],
)
def test_a_rule_that_does_not_say_is_refused(
    doc: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.modules[FedAvgLoRA.__module__], "__doc__", doc)
    with pytest.raises(ValueError, match=said):
        papers.entry(FedAvgLoRA)


# --------------------------------------------------------------------------------------- links


def pages() -> list[str]:
    inside = (path.relative_to(ROOT / "docs").as_posix() for path in (ROOT / "docs").rglob("*.md"))
    return [*sorted(inside), *links.ELSEWHERE]


@pytest.mark.parametrize("page", pages())
def test_every_link_leads_somewhere(page: str) -> None:
    path = ROOT / links.ELSEWHERE.get(page, f"docs/{page}")
    links.moved(path.read_text("utf-8"), page, "https://example.org/x")


def test_links_of_the_site() -> None:
    def to(link: str, source: str, here: str) -> str:
        return links.target(link, source, here, "https://example.org/x/")

    assert to("docs/data.md#kinds", "README.md", "index.md") == "data.md#kinds"
    assert to("../../README.md", "docs/strategies/flora.md", "strategies/flora.md") == "../index.md"
    assert to("../deploy/README.md", "docs/data.md", "data.md") == "runbook.md"
    assert to("docs/strategies", "README.md", "index.md") == "strategies/README.md"
    blob = "https://example.org/x/blob/main/fedft/cli.py"
    assert to("../fedft/cli.py", "docs/data.md", "data.md") == blob
    assert (
        to("examples/privacy", "README.md", "index.md")
        == "https://example.org/x/tree/main/examples/privacy"
    )
    for kept in ("https://example.org", "#here", "mailto:a@example.org"):
        assert to(kept, "README.md", "index.md") == kept
    for dead in ("docs/nowhere.md", "../outside", "docs/data.mdx"):
        with pytest.raises(FileNotFoundError, match="leads to no file"):
            to(dead, "README.md", "index.md")
    quoted = "`[a](nowhere)`\n```\n[b](nowhere)\n```\n[c](docs/data.md)"
    assert links.moved(quoted, "index.md", "x").endswith("[c](data.md)")


def test_every_command_and_every_module_has_its_place() -> None:
    text = api.commands_page()
    for command in ("fedft simulate", "fedft init", "fedft ca sign", "fedft join"):
        assert f"\n## {command}\n" in text
    assert "`--run-dir`" in text
    modules = {module for _, found in api.packages() for module in found}
    assert {"fedft.api", "fedft.strategies.base", "fedft.core.extras"} <= modules
    assert not any("_pb2" in module for module in modules)


@pytest.mark.deploy
@pytest.mark.timeout(900)
@pytest.mark.skipif(importlib.util.find_spec("mkdocs") is None, reason="mkdocs is not installed")
@pytest.mark.skipif(importlib.util.find_spec("mkdocstrings") is None, reason="no mkdocstrings")
def test_the_site_is_built_without_a_warning(tmp_path: Path) -> None:
    import os

    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    done = subprocess.run(
        command,
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        timeout=850,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    for page in ("index", "papers", "reference/options", "reference/commands"):
        assert (tmp_path / f"{page}.html").stat().st_size > 5_000
    api_page = (tmp_path / "reference" / "python" / "fedft.html").read_text("utf-8")
    assert "fedft.api.simulate" in api_page
    html = [path.read_text("utf-8") for path in tmp_path.rglob("*.html")]
    assert not any("fonts.googleapis" in text for text in html)


# -------------------------------------------------------------------------- what stands twice


def test_version_and_address_are_the_same_everywhere() -> None:
    cff = yaml.safe_load((ROOT / "CITATION.cff").read_text("utf-8"))
    assert cff["version"] == PROJECT["version"]
    assert cff["license"] == PROJECT["license"]
    site = (ROOT / "mkdocs.yml").read_text("utf-8")
    assert f"repo_url: {cff['repository-code']}\n" in site
    assert PROJECT["urls"]["Repository"] == cff["repository-code"]
    assert all(url.startswith(cff["repository-code"]) for url in PROJECT["urls"].values())
    assert PROJECT["version"].startswith(options.SINCE) or PROJECT["version"] > options.SINCE


def test_forms_and_hooks_are_valid() -> None:
    forms = sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml"))
    assert len(forms) == 3
    for form in forms:
        table = yaml.safe_load(form.read_text("utf-8"))
        for field in table.get("body", []):
            assert field["type"] in ("textarea", "input", "dropdown", "checkboxes"), form
            assert field["attributes"]["label"], form
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text("utf-8"))
    assert [repo["repo"] for repo in hooks["repos"]] == ["local"], "no other host is asked"
    commands = " ".join(hook["entry"] for hook in hooks["repos"][0]["hooks"])
    for tool in ("ruff check", "ruff format", "pyright", "lint-imports"):
        assert f".venv/bin/{tool}" in commands


def test_every_requirement_has_a_lower_bound_that_is_tested() -> None:
    spec = importlib.util.spec_from_file_location("lower", ROOT / ".ci" / "lower_bounds.py")
    assert spec is not None and spec.loader is not None
    lower = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(lower)
    pins = dict(line.split("==") for line in lower.bounds(PROJECT))
    assert pins["flwr"] == "1.41" and "torch" not in pins and "bitsandbytes" not in pins
    assert {"datasets", "matplotlib", "opacus", "gguf"} <= pins.keys()
    for loose in ("numpy", "numpy<3", "numpy[x]<3"):
        with pytest.raises(SystemExit, match="no lower bound"):
            list(lower.bounds({"dependencies": [loose], "optional-dependencies": {}}))
