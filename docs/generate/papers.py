"""docs/papers.md: every rule and its paper, from the docstrings of the rules.

    python docs/generate/papers.py      # writes the page anew

A rule's module has its citation as the indented paragraph after the title, a paragraph that begins
with "Departures from the paper", and, where it is not what the paper's own text or code could be
held against, one that begins with "State: experimental".
"""

import re
import sys
from dataclasses import dataclass
from pathlib import Path

from fedft.strategies import RULES, Strategy

PAGE = Path(__file__).resolve().parents[1] / "papers.md"


@dataclass(frozen=True)
class Entry:
    """What the page says of one rule.

    Attributes:
        name: as `[strategy] name` has it.
        paper: authors, title, where it appeared.
        file: of the rule, in the repository.
        state: stable or experimental, and then why.
        departs: from the paper.
    """

    name: str
    paper: str
    file: str
    state: str
    departs: str


def entry(rule: type[Strategy]) -> Entry:
    """A rule's, from the docstring of its module.

    Raises:
        ValueError: it names no paper, or does not say where it departs from it.
    """
    text = sys.modules[rule.__module__].__doc__ or ""
    name = str(rule.model_fields["name"].default)
    paragraphs = [p for p in text.split("\n\n")[1:] if p.strip()]
    cited = [p for p in paragraphs[:2] if p.startswith("    ") and re.search(r"\b(19|20)\d\d\b", p)]
    own = next((p for p in paragraphs if p.startswith("This project's own rule")), None)
    departs = [p for p in paragraphs if re.match(r"Departures? from (the|its|both) papers?", p)]
    state = next((p for p in paragraphs if p.startswith("State: ")), "State: stable.")
    if not (cited or own):
        raise ValueError(f"{name}: its docstring cites no paper in an indented paragraph")
    if not (departs or own):
        raise ValueError(f'{name}: its docstring has no paragraph "Departures from the paper: …"')
    return Entry(
        name,
        linked(_line(cited[0])) if cited else _line(own or ""),
        f"{rule.__module__.replace('.', '/')}.py",
        _line(state).removeprefix("State: ").rstrip("."),
        _line(
            re.sub(r"^Departures? from (the|its|both) papers?(?:,[^.:]*)?[.:]\s*", "", departs[0])
        )
        if departs
        else "",
    )


def _line(text: str) -> str:
    return " ".join(text.replace("``", "`").split())


def linked(text: str) -> str:
    """A citation with its arXiv numbers as links."""
    return re.sub(r"arXiv:(\d{4}\.\d{4,5})", r"[arXiv:\1](https://arxiv.org/abs/\1)", text)


HEAD = """# Papers

Every aggregation rule, the paper that it is from, and where it departs from it.
`docs/generate/papers.py` makes this page from the docstrings of the rules.

*Stable*: what defines the rule could be read in the paper or its code; it holds the laws and the golden rounds.
*Experimental*: it holds these too, but more of the paper would have to be read to be sure, or the rule is in no paper.

"""


def page() -> str:
    """The page as Markdown: a section a rule, one sentence a line."""
    parts = [HEAD, "| rule | state | file |\n|---|---|---|\n"]
    entries = [entry(rule) for rule in RULES]
    for one in entries:
        state = one.state.partition(",")[0].partition(":")[0]
        parts.append(f"| [{one.name}](strategies/{one.name}.md) | {state} | `{one.file}` |\n")
    for one in entries:
        parts.append(f"\n## {one.name}\n\n{_wrapped(one.paper)}\n")
        if one.state != "stable":
            parts.append(f"\n**State.**\n{_wrapped(_capital(one.state))}.\n")
        if one.departs:
            parts.append(f"\n**Departures from the paper.**\n{_wrapped(_capital(one.departs))}\n")
    return "".join(parts)


def _capital(text: str) -> str:
    symbol = re.match(r"\w\b|`", text)
    return text if symbol else text[0].upper() + text[1:]


def _wrapped(text: str) -> str:
    """One sentence a line, and no line above 120 characters."""
    sentences = re.split(r"(?<=[a-z)`\d]\.) (?=[A-Z`*])", text)
    return "\n".join(line for sentence in sentences for line in _broken(sentence))


def _broken(sentence: str) -> list[str]:
    lines, line = [], ""
    for word in sentence.split(" "):
        if line and len(line) + 1 + len(word) > 100:
            lines.append(line)
            line = word
        else:
            line = f"{line} {word}".strip()
    # A line that begins with a sign of Markdown would be read as one.
    return [re.sub(r"^([-+*#>]|\d+\.)(?= )", r"\\\1", part) for part in (*lines, line)]


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    print(PAGE)
