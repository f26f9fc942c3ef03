"""A name leads to its member, or to a sentence; what nobody trusted asked for is not imported."""

import importlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from fedft.core import plugins
from fedft.core.errors import ConfigError, SecurityRefusal
from fedft.core.foreign import source_of
from fedft.core.plugins import (
    RECORD,
    REMOTE,
    USER,
    Registry,
    Trust,
    Unfit,
    is_reference,
    reference_of,
    short_name,
    subclass_of,
    trust_process,
    trusted,
)


class Base:
    """What every member derives from."""


class Ours(Base):
    """A member of our own."""


def registry() -> Registry[type[Base]]:
    return Registry("things", "thing", {"ours": Ours}, subclass_of(Base, "tests.Base"))


MEMBER = """
from pathlib import Path
from tests.core.test_plugins import Base
Path(__file__).with_suffix(".imported").touch()
class Member(Base):
    pass
class Other(Base):
    class Inner(Base):
        pass
NUMBER = 3
"""


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder of modules and installed packages; what is imported from it is forgotten again."""
    monkeypatch.syspath_prepend(tmp_path)
    known = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - known:
        del sys.modules[name]
    importlib.invalidate_caches()


@pytest.fixture
def install(place: Path) -> Callable[..., Path]:
    """Writes an installed package: its metadata with entry points, and a module."""

    def write(name: str, entries: str, code: str = MEMBER, module: str | None = None) -> Path:
        info = place / f"{name}-1.2.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.2\n")
        (info / "entry_points.txt").write_text(f"[fedft.things]\n{entries}\n")
        (place / f"{module or name}.py").write_text(code)
        importlib.invalidate_caches()
        sys.path.append(str(place / f"no-such-{name}"))  # what is found depends on the path
        return place / f"{module or name}.imported"

    return write


def test_our_own_are_found_by_name_and_by_class() -> None:
    things = registry()
    assert things.find("ours").value is Ours
    assert things.find("ours", REMOTE).name == "ours"
    by_class = things.find(reference_of(Ours), REMOTE)
    assert (by_class.name, by_class.value) == ("ours", Ours), "under the name that they have"


def test_a_registered_member_is_imported_when_it_is_used_and_not_before(
    install: Callable[..., Path],
) -> None:
    mark = install("alpha", "new = alpha:Member")
    things = registry()
    assert things.names() == ["ours", "new"]
    assert things.find("ours").value is Ours
    assert not mark.exists()
    member = things.find("new")
    assert mark.exists()
    assert (member.name, member.distribution) == ("new", "alpha 1.2")
    assert member.value.__name__ == "Member"


def test_a_name_on_the_users_word_is_imported_and_on_a_run_directorys_is_not(
    place: Path, install: Callable[..., Path]
) -> None:
    mark = install("beta", "")
    things = registry()
    for trust in (RECORD, REMOTE, Trust(frozenset({"beta:Other", "gamma:Member"}))):
        with pytest.raises(SecurityRefusal, match=r"--allow beta:Member"):
            things.find("beta:Member", trust)
    assert not mark.exists()
    assert things.find("beta:Other.Inner", USER).value.__qualname__ == "Other.Inner"
    assert mark.exists(), "the control: the mark tells an import"
    assert things.find("beta:Member", RECORD.also(["beta:Member"])).name == "beta:Member"
    assert things.find("beta:Member", REMOTE).name == "beta:Member", "what was admitted is known"


def test_a_servers_word_imports_no_installed_package_either(install: Callable[..., Path]) -> None:
    mark = install("delta", "new = delta:Member")
    with pytest.raises(SecurityRefusal, match=r"delta 1\.2"):
        registry().find("new", REMOTE)
    assert not mark.exists()


def test_a_class_from_python_is_found_without_an_import() -> None:
    class Local(Base):
        pass

    name = reference_of(Local)
    assert "<locals>" in name and is_reference(name)
    assert registry().find(name, RECORD.also([Local])).value is Local
    assert registry().find(name, RECORD.also([Local()])).value is Local
    with pytest.raises(ConfigError, match="script or in a function"):
        registry().find(name, USER)
    things = registry()
    assert things.admit(Local).name == name
    assert things.find(name).value is Local


def test_a_class_of_the_script_is_told_to_move(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"Move it into a module, or hand the class over"):
        registry().find("__main__:NoSuchClass", USER)
    monkeypatch.setattr(sys.modules["__main__"], "Mine", Ours, raising=False)
    assert registry().find("__main__:Mine", USER).value is Ours


def test_an_object_from_python_is_called_as_its_package_registers_it(
    install: Callable[..., Path],
) -> None:
    install("epsilon", "new = epsilon:Member")
    module = importlib.import_module("epsilon")
    assert registry().admit(module.Member).name == "new"
    assert registry().admit(module.Other).name == "epsilon:Other"


def test_two_packages_with_one_name_are_refused_when_it_is_used(
    install: Callable[..., Path],
) -> None:
    install("zeta", "new = zeta:Member")
    install("eta", "new = eta:Member")
    things = registry()
    assert things.find("ours").value is Ours
    with pytest.raises(ConfigError, match=r"zeta 1\.2 \(zeta:Member\)") as caught:
        things.find("new")
    assert "eta 1.2 (eta:Member)" in caught.value.what
    assert things.find("zeta:Member", USER).value.__module__ == "zeta"


def test_a_package_that_takes_a_name_of_ours_is_refused_when_it_is_used(
    install: Callable[..., Path],
) -> None:
    mark = install("theta", "ours = theta:Member")
    things = registry()
    with pytest.raises(ConfigError, match=r"'ours' is a thing of fedft.*theta 1\.2"):
        things.find("ours")
    assert not mark.exists()
    assert things.find(reference_of(Ours)).value is Ours, "its class still names ours"
    assert things.find("theta:Member", USER).value.__module__ == "theta"


@pytest.mark.parametrize(
    ("entries", "code", "said"),
    [
        ("new = iota:Member", "raise RuntimeError('of its own')", "RuntimeError: of its own"),
        ("new = iota:Member", "import no_such_thing", "No module named 'no_such_thing'"),
        ("new = iota:Member", "def f(:\n", "SyntaxError"),
        ("new = iota:Member", "import sys; sys.exit(3)", "SystemExit: 3"),
        ("new = iota:Membre", MEMBER, "did you mean 'Member'"),
        ("new = iota:NUMBER", MEMBER, "it is a int, not a class derived from tests.Base"),
        ("new = iota", MEMBER, "it names a module"),
        ("new = no good!", MEMBER, "there is no module no good!"),
        ("new = ", MEMBER, "iota 1.2"),
        ("new = kappa:Member", MEMBER, "there is no module kappa"),
    ],
)
def test_a_broken_entry_point_is_told_when_it_is_used_and_harms_nobody_else(
    install: Callable[..., Path], entries: str, code: str, said: str
) -> None:
    install("iota", f"{entries}\nsound = lambda_:Member", code)
    (Path(sys.path[0]) / "lambda_.py").write_text(MEMBER)
    things = registry()
    assert things.find("ours").value is Ours
    assert things.find("sound").value.__name__ == "Member"
    with pytest.raises(ConfigError) as caught:
        things.find("new")
    assert said in str(caught.value)
    assert "iota 1.2" in caught.value.what
    assert "uninstall the package" in caught.value.fix


@pytest.mark.parametrize(
    "lists", ["[fedft.things]\nno equals sign\n", "[[[", "a = b\n", "\0", "[fedft.things]\n= x:Y"]
)
def test_a_list_of_entry_points_that_is_none_costs_only_its_own_package(
    place: Path, install: Callable[..., Path], lists: str
) -> None:
    install("mu", "new = mu:Member")
    bad = place / "bad-1.dist-info"
    bad.mkdir()
    (bad / "entry_points.txt").write_text(lists)
    (bad / "METADATA").write_text("Metadata-Version: 2.1\nName: bad\nVersion: 1\n")
    assert registry().find("ours").value is Ours
    assert registry().find("new").value.__module__ == "mu"


@pytest.mark.parametrize(
    ("name", "said", "fix"),
    [
        ("our", "no thing is called 'our'", "did you mean 'ours'"),
        ("nothing like it", "no thing is called", "known: new, ours"),
        ("nu:Membr", "the module nu has no Membr", "did you mean 'Member'"),
        ("nuu:Member", "there is no module nuu", "Did you mean nu"),
        ("nu.deep:Member", "there is no module nu.deep", "nu has: no modules"),
        ("nu:", "is no name of a thing", "package.module:Class"),
        (":Member", "is no name of a thing", "package.module:Class"),
        ("n u:Member", "is no name of a thing", "package.module:Class"),
        ("../nu:Member", "is no name of a thing", "package.module:Class"),
        ("nu:Member()", "is no name of a thing", "package.module:Class"),
        ("nu:Path", "it does not derive from tests.Base", "docs/extending.md"),
        ("x" * 5000, "no thing is called 'xxx", "known"),
    ],
)
def test_what_was_looked_for_and_what_there_is(
    install: Callable[..., Path], name: str, said: str, fix: str
) -> None:
    install("nu", "new = nu:Member")
    with pytest.raises(ConfigError) as caught:
        registry().find(name, USER)
    assert said in caught.value.what
    assert fix in caught.value.fix
    assert len(str(caught.value)) < 600


def test_a_module_beside_the_command_is_found_and_one_that_is_installed_goes_before(
    place: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = tmp_path_factory.mktemp("here")
    monkeypatch.chdir(here)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p])
    (here / "xi.py").write_text(MEMBER)
    (here / "json.py").write_text("raise RuntimeError('the wrong one')")
    assert registry().find("xi:Member", USER).value.__module__ == "xi"
    with pytest.raises(ConfigError, match="json has no Member"):
        registry().find("json:Member", USER)


def test_abstract_classes_are_refused_by_what_they_lack(place: Path) -> None:
    (place / "omicron.py").write_text(
        "from abc import abstractmethod, ABC\nfrom tests.core.test_plugins import Base\n"
        "class Half(Base, ABC):\n    @abstractmethod\n    def work(self): ...\n"
    )
    with pytest.raises(ConfigError, match="it does not define work"):
        registry().find("omicron:Half", USER)


def test_no_permission_is_needed_for_other_names() -> None:
    with pytest.raises(ConfigError, match="'ours' is no name of code from outside"):
        RECORD.also(["ours"])
    assert USER.also(["a.b:C"]).named is None, "any stays any"


def test_a_validation_without_a_word_has_that_of_the_process(
    install: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert trusted(None) is RECORD, "a run directory's, unless it is told"
    assert trusted({"trust": USER}) is RECORD
    assert trusted(REMOTE) is REMOTE
    monkeypatch.setattr(plugins, "_process", RECORD)  # to be put back
    install("sigma", "new = sigma:Member")
    trust_process(REMOTE)
    with pytest.raises(SecurityRefusal):
        registry().find("new")
    trust_process(USER)
    assert registry().find("sigma:Member").value.__module__ == "sigma"


def test_a_name_as_a_part_of_a_folders_name() -> None:
    names = {"fedprox": "fedprox", "a.b:C": "C", "a:f.<locals>.C": "C", "a:B.C": "C"}
    assert {name: short_name(name) for name in names} == names


def test_code_is_told_from_code_of_the_same_version(install: Callable[..., Path]) -> None:
    install("pi_", "new = pi_:Member")

    def seen() -> Any:
        sys.modules.pop("pi_", None)
        importlib.invalidate_caches()
        things = registry()
        return source_of(things.find("new").value, things.distribution("new"))

    first, again = seen(), seen()
    assert first == again
    assert (first["class"], first["package"]) == ("pi_:Member", "pi_ 1.2")
    path = Path(sys.path[0]) / "pi_.py"
    path.write_text(MEMBER + "# another line, which no cached bytecode may hide\n")
    assert seen()["sha256"] != first["sha256"]


def test_the_hash_of_a_package_is_over_all_of_its_modules(place: Path) -> None:
    folder = place / "rho"
    folder.mkdir()
    (folder / "__init__.py").write_text("")
    (folder / "helper.py").write_text("X = 1\n")
    (folder / "rules.py").write_text(MEMBER)
    member = registry().find("rho.rules:Member", USER).value
    first = source_of(member)["sha256"]
    (folder / "helper.py").write_text("X = 2\n")
    assert source_of(member)["sha256"] != first
    assert source_of(type("Made", (), {"__module__": "no_such_module"}))["sha256"] is None


def test_accept_may_make_a_member_of_what_is_found() -> None:
    def accept(found: object) -> int:
        if not isinstance(found, int):
            raise Unfit("it is no number")
        return 2 * found

    numbers = Registry("numbers", "number", {"one": 1}, accept)
    assert numbers.find("tests.core.test_plugins:SEVEN", USER).value == 14
    with pytest.raises(ConfigError, match="it is no number"):
        numbers.find("tests.core.test_plugins:Base", USER)


SEVEN = 7
