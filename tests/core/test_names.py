"""Near names are near."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedft.core.names import hint, near

COLUMNS = ["prompt", "answer", "text", "label", "sentence", "topic", "image"]


@pytest.mark.parametrize(
    ("given", "names", "found"),
    [
        ("anwser", COLUMNS, ["answer"]),
        ("Answer", COLUMNS, ["answer"]),
        ("sentense", COLUMNS, ["sentence"]),
        ("labels", COLUMNS, ["label"]),
        ("label", ["label_text", "id"], ["label_text"]),
        ("query", ["query_proj", "key_proj"], ["query_proj"]),
        ("per_round", ["per-round", "count"], ["per-round"]),
        ("cuont", ["count", "quorum", "spares"], ["count"]),
        # far
        ("answer", ["prompt", "response"], []),
        ("text", ["review", "stars"], []),
        ("label", ["y", "x"], []),
        ("query", ["dense", "out_proj"], []),
        ("a", ["b"], []),
        ("", COLUMNS, []),
    ],
)
def test_what_is_near(given: str, names: list[str], found: list[str]) -> None:
    assert near(given, names, 1) == found
    assert ("did you mean" in hint(given, names)) == bool(found)


def test_far_names_are_all_listed() -> None:
    assert hint("zzz", ["b", "a"]) == "known: a, b"
    assert hint("lable", ["label", "text"]) == "did you mean 'label'?"


@given(st.text(max_size=30), st.lists(st.text(max_size=30), max_size=8), st.integers(1, 4))
def test_any_names_are_ranked(given: str, names: list[str], most: int) -> None:
    found = near(given, names, most)
    assert (
        len(found) <= most and set(found) <= set(names) and found == near(given, names[::-1], most)
    )
    assert near(given, [*names, given], 1) == [given] or not given or given != given.strip()


def test_nobody_has_another_idea_of_near() -> None:
    """One helper for all hints."""
    from pathlib import Path

    root = Path(__file__).parents[2]
    files = [
        f for p in ("fedft", "server", "clients", "strategies") for f in (root / p).rglob("*.py")
    ]
    assert len(files) > 100
    users = [f.name for f in files if "difflib" in f.read_text(encoding="utf-8")]
    assert users == ["names.py"]
