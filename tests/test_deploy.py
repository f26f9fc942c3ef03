"""What stands in deploy/ and in its runbook: nothing there names what is not, or lets its guard down."""

import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import click
import pytest
import typer
import yaml

from fedft.cli import cli

ROOT = Path(__file__).resolve().parents[1]
DEPLOY = ROOT / "deploy"
BIN = str(Path(sys.executable).parent)
UNITS = sorted(DEPLOY.glob("*.service"))
PAGES = [DEPLOY / "README.md", ROOT / "docs" / "deployment.md", ROOT / "README.md"]


def check_command(words: list[str]) -> None:
    """Raise where the command line has no such command, option or kind of value."""
    group: Any = typer.main.get_command(cli)
    with click.Context(group) as context:
        command = group.get_command(context, words[0])
        if isinstance(command, click.Group):
            command, words = command.get_command(context, words[1]), words[1:]
        assert command is not None, f"no command is called {words[0]!r}"
        command.make_context(words[0], words[1:])


def commands(page: Path) -> Iterator[list[str]]:
    """The ``fedft`` commands of a page's shell blocks."""
    for block in re.findall(r"```sh\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            for program, command in pairwise(words):
                ours = program in ("fedft", "/opt/fedft/bin/fedft") and words[0] != "tar"
                if ours and command.isalpha():
                    yield words[words.index(command, words.index(program)) :]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_command_of_the_runbook_is_one(page: Path) -> None:
    found = list(commands(page))
    assert len(found) >= 3
    for words in found:
        check_command(words)


def test_a_command_that_is_none_is_noticed() -> None:
    """Positive control."""
    check_command(["invite", "ann", "--run-dir", "run", "-o", "kit"])
    for words in (["invite", "ann", "--rundir", "run"], ["serve", "c.toml", "--port", "x"]):
        with pytest.raises(click.UsageError):
            check_command(words)
    with pytest.raises(AssertionError, match="no command"):
        check_command(["uninvite"])
    with pytest.raises(AssertionError, match="no command"):
        check_command(["ca", "resign", "ca", "x.csr"])
    with pytest.raises(click.UsageError):
        check_command(["ca", "sign", "ca"])


def settings(unit: Path) -> dict[str, str]:
    lines = (line for line in unit.read_text().splitlines() if "=" in line and line[0] != "#")
    return dict(line.split("=", 1) for line in lines)


def test_the_server_may_have_as_many_descriptors_as_it_asks_for() -> None:
    from fedft.server.grids.door import MOST, RESERVED, WANTED

    assert int(settings(ROOT / "deploy" / "fedft-server.service")["LimitNOFILE"]) == WANTED
    assert WANTED - RESERVED > MOST


@pytest.mark.parametrize("unit", UNITS, ids=lambda unit: unit.name)
class TestUnits:
    def test_what_is_started_is_a_command(self, unit: Path) -> None:
        program, *words = settings(unit)["ExecStart"].split()
        assert program == "/opt/fedft/bin/fedft"
        check_command([w for w in words if w != "$FEDFT_OPTIONS"])

    def test_it_is_restarted_only_where_that_can_help(self, unit: Path) -> None:
        from fedft.core import errors

        never = {int(code) for code in settings(unit)["RestartPreventExitStatus"].split()}
        hopeless = (errors.ConfigError, errors.MismatchError)
        hopeless += (errors.IntegrityError, errors.SecurityRefusal)
        assert never == {kind.exit_code for kind in hopeless}
        assert settings(unit)["SuccessExitStatus"] == str(errors.Interrupted.exit_code)

    @pytest.mark.deploy
    @pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="there is no systemd here")
    def test_systemd_understands_it_and_finds_it_guarded(self, unit: Path, tmp_path: Path) -> None:
        program = tmp_path / "fedft"
        program.write_text("#!/bin/sh\n")
        program.chmod(0o755)
        copy = tmp_path / unit.name
        copy.write_text(unit.read_text().replace("/opt/fedft/bin/fedft", str(program)))
        verify = ["systemd-analyze", "verify", "--man=no", str(copy)]
        said = subprocess.run(verify, capture_output=True, text=True, check=True)
        assert said.stderr == ""
        judge = ["systemd-analyze", "security", "--offline=true", "--threshold=20", str(copy)]
        subprocess.run(judge, capture_output=True, check=True)
        # Positive control: without its guard the same service is found wanting.
        copy.write_text(
            re.sub(r"(?m)^(Protect|Restrict|System|Private|Cap).*\n", "", copy.read_text())
        )
        assert subprocess.run(judge, capture_output=True, check=False).returncode != 0


class TestContainers:
    @pytest.fixture
    def services(self) -> dict[str, Any]:
        return yaml.safe_load((DEPLOY / "compose.yaml").read_text())["services"]

    def test_there_is_a_server_and_there_are_sites(self, services: dict[str, Any]) -> None:
        started = {name: service["command"][0] for name, service in services.items()}
        assert started.pop("server") == "serve"
        assert set(started.values()) == {"join"} and len(started) == 2
        for service in services.values():
            words = [re.sub(r"\$\{\w+:-(.*?)\}", r"\1", word) for word in service["command"]]
            check_command(words)

    def test_no_container_may_do_more_than_it_must(self, services: dict[str, Any]) -> None:
        for service in services.values():
            assert service["read_only"] is True and service["cap_drop"] == ["ALL"]
            assert "no-new-privileges:true" in service["security_opt"]
            assert not {"privileged", "network_mode", "pid", "cap_add", "user"} & service.keys()

    def test_only_the_port_for_sites_leaves_the_machine(self, services: dict[str, Any]) -> None:
        ports = [port for service in services.values() for port in service.get("ports", [])]
        assert [port for port in ports if not port.startswith("127.0.0.1:")] == ["8470:8470"]

    def test_the_image_runs_as_nobody_in_particular(self) -> None:
        lines = (DEPLOY / "Dockerfile").read_text().replace("\\\n", " ").splitlines()
        final = lines[max(i for i, line in enumerate(lines) if line.startswith("FROM")) :]
        [user] = [line.split()[1] for line in final if line.startswith("USER")]
        assert user == "10001:10001"
        assert 'ENTRYPOINT ["fedft"]' in final
        installs = [line for line in lines if "pip install" in line and "--no-deps" not in line]
        assert installs and all("--constraint constraints.txt" in line for line in installs)

    def test_the_image_has_the_constraints_torch_for_the_cpu_unless_asked(self) -> None:
        text = (DEPLOY / "Dockerfile").read_text().replace("\\\n", " ")
        assert re.findall(r"(?m)^ARG TORCH=(.*)$", text) == ["cpu"]
        [line] = [line for line in text.splitlines() if "--torch-backend" in line]
        assert '--torch-backend "$TORCH"' in line and line.rstrip().endswith(" torch")
        first = min(i for i, line in enumerate(text.splitlines()) if "pip install" in line)
        assert text.splitlines()[first] == line  # nothing brings another torch before it
        assert "TORCH: ${TORCH:-cpu}" in (DEPLOY / "compose.yaml").read_text()
        pinned = (ROOT / "constraints.txt").read_text()
        for package in ("torch", "uv", "opacus", "grpcio", "cryptography"):
            assert re.search(rf"(?m)^{package}==[0-9.]+$", pinned), package

    @pytest.mark.skipif(shutil.which("uv", path=BIN) is None, reason="uv is not installed here")
    def test_uv_knows_the_builds_that_are_spoken_of(self) -> None:
        said = subprocess.run(
            [shutil.which("uv", path=BIN) or "uv", "pip", "install", "--help"],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for build in ("cpu", "cu130"):
            assert re.search(rf"\b{build}\b", said[said.index("--torch-backend") :])

    def test_a_build_of_a_version_meets_the_constraint(self) -> None:
        """Why the second installation leaves the first one's torch alone."""
        from packaging.requirements import Requirement

        pins = (ROOT / "constraints.txt").read_text().splitlines()
        [pin] = [Requirement(line) for line in pins if line.startswith("torch==")]
        version = str(pin.specifier).removeprefix("==")
        assert pin.specifier.contains(f"{version}+cpu") and pin.specifier.contains(
            f"{version}+cu130"
        )
        assert not pin.specifier.contains("2.12.0+cpu")

    def test_the_build_sees_all_it_needs_and_no_secrets(self) -> None:
        lines = (ROOT / ".dockerignore").read_text().splitlines()
        seen = {line[1:] for line in lines if line.startswith("!")}
        assert "*" in lines
        assert {"fedft", "pyproject.toml"} <= seen
        assert all((ROOT / name).exists() for name in seen)
        assert not {"runs", ".git", "deploy"} & seen
