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


def test_the_recipe_of_a_rule_keeps_every_law(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "recipe_rules.py").write_text(code_of("A new rule"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    findings = list(conformance.check("recipe_rules:Tempered"))
    sys.modules.pop("recipe_rules")
    assert [f for f in findings if f.outcome == "broken"] == []
    assert sum(f.outcome == "held" for f in findings) > 10
