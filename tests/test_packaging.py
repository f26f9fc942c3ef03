"""What pip puts where: one name, whole, and the same from every kind of checkout."""

import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
LINKS = ("clients", "server", "strategies")
Files = dict[str, bytes]


def tracked() -> list[Path]:
    listed = subprocess.run(
        ["git", "-C", str(ROOT), "ls-files", "-co", "--exclude-standard"],
        capture_output=True,
        text=True,
        check=False,
    )
    if listed.returncode:
        pytest.skip("needs a git checkout")
    return [ROOT / line for line in listed.stdout.splitlines() if (ROOT / line).exists()]


def checkout(folder: Path, *, links: bool) -> Path:
    """A copy of the tracked files; without links, each is a file that holds its target's name."""
    for path in tracked():
        copy = folder / path.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        if not path.is_symlink():
            copy.write_bytes(path.read_bytes())
        elif links:
            copy.symlink_to(path.readlink())
        else:
            copy.write_text(path.readlink().as_posix())
    return folder


def built(source: Path, output: Path, *kind: str) -> list[Path]:
    command = [sys.executable, "-m", "build", "--no-isolation", *kind, "--outdir", str(output)]
    done = subprocess.run([*command, str(source)], capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return sorted(output.iterdir(), key=lambda path: path.suffix)


def in_wheel(path: Path) -> Files:
    with zipfile.ZipFile(path) as wheel:
        return {name: wheel.read(name) for name in wheel.namelist()}


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The sdist, and the wheel that is built from it."""
    folder = tmp_path_factory.mktemp("release")
    sdist, wheel = built(checkout(folder / "fedft", links=True), folder / "dist")
    return sdist, wheel


@pytest.fixture(scope="module")
def wheel(release: tuple[Path, Path]) -> Files:
    return in_wheel(release[1])


def test_links_of_the_repository_lead_into_the_package() -> None:
    for name in LINKS:
        link = ROOT / name
        assert not link.is_symlink() or link.readlink() == Path("fedft") / name
    assert not (ROOT / "server.py").exists()


TOP = "|".join(LINKS)
IMPORT = re.compile(
    rf"""^\s*(?:from|import)\s+(?:{TOP})\b|["'](?:{TOP})\.\w+(?::|\.\w+["'])""", re.MULTILINE
)


def test_nothing_imports_through_the_links() -> None:
    """Where git makes no links, as on Windows by default, they are files of a few letters."""
    ours = [path for path in tracked() if path.suffix in (".py", ".toml", ".md", ".sh", ".cfg")]
    assert len(ours) > 300
    own = ROOT / "tests" / "faults" / "test_own_names.py"
    for path in ours:
        if path not in (own, Path(__file__).resolve()) and not path.is_symlink():
            assert not (found := IMPORT.search(path.read_text(encoding="utf-8"))), (path, found)
    for text in (
        "import server",
        "from clients.app import x",
        "    import strategies",
        '"server.app:app"',
    ):
        assert IMPORT.search(text), text  # the control
    for text in ("from fedft.server import run", "import serverless", "from fedft import clients"):
        assert not IMPORT.search(text), text


@pytest.mark.deploy
def test_one_name_goes_into_site_packages(wheel: Files) -> None:
    tops = {name.split("/")[0] for name in wheel}
    assert tops == {"fedft", next(top for top in tops if top.endswith(".dist-info"))}
    (lists,) = (data for name, data in wheel.items() if name.endswith("top_level.txt"))
    assert lists.decode().split() == ["fedft"]


@pytest.mark.deploy
def test_a_wheel_has_every_file_of_the_package_and_no_test(wheel: Files) -> None:
    inside = [path.relative_to(ROOT).as_posix() for path in tracked() if not path.is_symlink()]
    # Neither the sources of what is generated, nor what generates it.
    wanted = {p for p in inside if p.startswith("fedft/") and not p.endswith(".proto")}
    assert not wanted - wheel.keys()
    extra = {name for name in wheel if "dist-info" not in name} - wanted
    assert all(name.startswith("fedft/examples/") for name in extra), extra
    for name in ("py.typed", "report/page.css", "server/status.css"):
        assert f"fedft/{name}" in wheel
    assert len(wheel["fedft/core/data/wordnet/definitions.jsonl.gz"]) > 100_000
    assert not any("test" in name for name in wheel)


@pytest.mark.deploy
def test_a_wheel_has_the_examples_that_fedft_init_hands_out(wheel: Files) -> None:
    from fedft.shipped import shipped

    wanted = {f"fedft/{path.relative_to(ROOT).as_posix()}" for path in shipped(ROOT / "examples")}
    assert {name for name in wheel if name.startswith("fedft/examples/")} == wanted
    assert "fedft/examples/quickstart/config.toml" in wanted
    assert not any("/results/" in name for name in wanted)


@pytest.mark.deploy
def test_an_sdist_builds_the_wheel_of_the_checkout_with_links_and_without(
    release: tuple[Path, Path], wheel: Files, tmp_path: Path
) -> None:
    for links in (True, False):
        folder = checkout(tmp_path / f"links-{links}", links=links)
        (path,) = built(folder, tmp_path / f"dist-{links}", "--wheel")
        assert in_wheel(path) == wheel
    with tarfile.open(release[0]) as sdist:
        inside = {name.partition("/")[2] for name in sdist.getnames()}
    assert {"LICENSE", "README.md", "constraints.txt", "fedft/cli.py", "setup.py"} <= inside
    # No second copy of a package by way of its link, and nothing of what only the checkout needs.
    assert not any(name.split("/")[0] in (*LINKS, "tests", "docs", "benchmarks") for name in inside)


@pytest.mark.deploy
def test_what_is_installed_hands_out_an_example_that_runs(
    release: tuple[Path, Path], tmp_path: Path
) -> None:
    site, work = tmp_path / "site", tmp_path / "work"
    work.mkdir()
    with zipfile.ZipFile(release[1]) as wheel:
        wheel.extractall(site)

    def fedft(*words: str) -> str:
        code = "import sys; sys.path.insert(0, sys.argv.pop(1)); from fedft.cli import main; main()"
        command = [sys.executable, "-c", code, str(site), *words]
        done = subprocess.run(command, cwd=work, capture_output=True, text=True, timeout=200)
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert len(fedft("init", "--list").splitlines()) >= 10
    said = fedft("init", "mine")
    assert (work / "mine" / "config.toml").exists()
    (command,) = re.findall(r"^  fedft (.*)$", said, re.M)
    small = ("fleet.clients=4", "rounds.count=1", "rounds.per-round=2", "rounds.quorum=2")
    small += ("training.steps=1", "engine.backend=inline", "data.partition.alpha=9")
    options = [word for setting in small for word in ("--set", setting)]
    fedft(*command.split(), *options)
    assert (work / "runs" / "mine" / "rounds.jsonl").exists()


def test_the_version_is_the_one_of_the_project() -> None:
    from typer.testing import CliRunner

    import fedft
    from fedft.cli import cli

    with (ROOT / "pyproject.toml").open("rb") as file:
        version = tomllib.load(file)["project"]["version"]
    assert CliRunner().invoke(cli, ["--version"]).output == f"fedft {version}\n"
    assert fedft.__version__ == version
