"""The recipes of docs/extending.md are run as they stand there."""

import re
import sys
from pathlib import Path

import pytest

from fedft import conformance

PAGE = Path(__file__).parents[1] / "docs" / "extending.md"


def code_of(section: str) -> str:
    """The first block of Python below a heading."""
    text = PAGE.read_text(encoding="utf-8").split(f"\n## {section}\n")[1].split("\n## ")[0]
    return re.findall(r"```python\n(.*?)```", text, re.DOTALL)[0]


@pytest.mark.parametrize(
    ("section", "module", "member", "laws"),
    [
        ("A new rule", "recipe_rules", "Tempered", 11),
        ("A new metric", "recipe_metrics", "Confident", 5),
    ],
)
def test_a_recipe_keeps_every_law(
    section: str,
    module: str,
    member: str,
    laws: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / f"{module}.py").write_text(code_of(section))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    findings = list(conformance.check(f"{module}:{member}"))
    sys.modules.pop(module)
    assert [f for f in findings if f.outcome == "broken"] == []
    assert sum(f.outcome == "held" for f in findings) >= laws
