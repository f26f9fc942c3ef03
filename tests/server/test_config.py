"""Rows 52-55 of the fault catalogue, and: every shipped configuration can be read."""

from pathlib import Path
from typing import Any

import pytest

from fedft.core.errors import ConfigError
from fedft.server.compare import read_arms
from fedft.server.config_file import configured, differences, load_config, parse_config, parse_toml
from fedft.server.serve import for_sites

ROOT = Path(__file__).parents[2]


SHIPPED = sorted(
    path for path in ROOT.glob("examples/**/*.toml") if not {"plugin", "trainer"} & {*path.parts}
)  # the tests of these two run them: one installed, one from the folder that its module lies in


@pytest.mark.parametrize("path", SHIPPED, ids=lambda p: f"{p.parent.name}/{p.stem}")
def test_shipped_configurations_are_valid(path: Path) -> None:
    """Also with each of the arms that an arms file lays over the configuration beside or above it."""
    if path.name != "arms.toml":
        load_config(path)
        return
    above = (folder / "config.toml" for folder in path.parents)
    config = next(beside for beside in above if beside.exists())
    for arm in read_arms(path):
        configured(config, arm.settings)


def test_what_is_written_reads_as_the_same_object() -> None:
    config = parse_config({"training": {"clip-norm": 0, "lr": 1e-4}, "fleet": {"clients": 12}})
    assert parse_toml(config.to_toml(), "x") == config
    assert config.training.local().clip_norm is None


@pytest.mark.parametrize(
    ("table", "words"),
    [
        ({"rounds": {"cuont": 3}}, ["[rounds] cuont", "did you mean 'count'"]),
        ({"rouns": {}}, ["rouns", "did you mean 'rounds'"]),
        ({"data": {"partition": {"alhpa": 1}}}, ["[data.partition] alhpa", "did you mean 'alpha'"]),
        ({"strategy": {"name": "fedavg"}}, ["no rule is called 'fedavg'", "'fedavg-lora'"]),
        ({"strategy": {"name": "ffa-lora", "mu": 1}}, ["[strategy] mu", "unknown key"]),
        ({"training": {"lr": -1}}, ["[training] lr = -1", "greater than 0"]),
        ({"training": {"lr": float("nan")}}, ["[training] lr = nan", "finite"]),
        ({"training": {"lr": "fast"}}, ["[training] lr = 'fast'"]),
        ({"training": {"epochs": 1.5}}, ["[training] epochs = 1.5"]),
        ({"data": {"partition": {"kind": "dirichlett"}}}, ["'dirichlet'"]),
        ({"rounds": {"per-round": 200}}, ["per-round = 200 is more than [fleet] clients = 100"]),
        ({"rounds": {"quorum": 11}}, ["quorum = 11 is more than per-round = 10"]),
        ({"fleet": {"ranks": [4, 8]}}, ["fedavg-lora cannot take", "flexlora"]),
        ({"seed": -1}, ["seed = -1"]),
        ({"model": {"trust-remote-code": True}}, ["pinned revision"]),
    ],
)
def test_a_bad_value_is_named_with_its_place_and_the_rule(
    table: dict[str, Any], words: list[str]
) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_config(table)
    for word in words:
        assert word in str(caught.value)
    assert caught.value.exit_code == 2


def test_all_faults_are_told_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        parse_config({"rounds": {"cuont": 3}, "training": {"lr": -1}})
    assert "cuont" in str(caught.value)
    assert "lr" in str(caught.value)


def test_overrides_are_toml_values_or_bare_words(tmp_path: Path) -> None:
    file = tmp_path / "c.toml"
    file.write_text("seed = 3\n[strategy]\nname = 'fedavg-lora'\n")
    config = load_config(
        file, ["training.lr=1e-3", "strategy.name=ffa-lora", 'lora.target-modules=["key"]']
    )
    assert config.seed == 3
    assert config.training.lr == 1e-3
    assert config.strategy.name == "ffa-lora"
    assert config.lora.target_modules == ("key",)
    for bad in ("training.lr", "=3", "seed.x=1"):
        with pytest.raises(ConfigError):
            load_config(file, [bad])


@pytest.mark.parametrize("text", ["seed = ", "\xff", "[rounds\n"])
def test_a_file_that_is_no_toml_is_refused(tmp_path: Path, text: str) -> None:
    file = tmp_path / "c.toml"
    file.write_bytes(text.encode("latin-1"))
    with pytest.raises(ConfigError, match=r"c\.toml"):
        load_config(file)
    with pytest.raises(ConfigError, match="cannot read"):
        load_config(tmp_path / "absent.toml")


def test_paths_are_relative_to_the_file(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text("{}\n")
    (tmp_path / "c.toml").write_text("[data]\nsource = 'rows.jsonl'\n")
    assert load_config(tmp_path / "c.toml").data.source == str(tmp_path / "rows.jsonl")


def test_differences_name_keys_and_values() -> None:
    old = parse_config({})
    new = configured(old, {"training.lr": 0.1, "strategy.name": "ffa-lora"})
    assert differences(old, new) == [
        "[strategy] name: fedavg-lora → ffa-lora",
        "[training] lr: 0.005 → 0.1",
    ]
    assert differences(old, old) == []


def test_real_sites_are_never_asked_to_lie() -> None:
    config = parse_config({"fleet": {"attack": {"kind": "sign-flip", "share": 0.2}}})
    assert config.task().attack == config.fleet.attack
    with pytest.raises(ConfigError, match="for simulations") as caught:
        for_sites(config)
    assert "fedft simulate" in caught.value.fix
    assert for_sites(parse_config({})).fleet.attack is None
