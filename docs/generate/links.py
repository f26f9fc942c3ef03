"""Links of the pages: on a forge they lead to files of the repository, on the site to its pages."""

import posixpath
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

ELSEWHERE = {
    "index.md": "README.md",
    "changelog.md": "CHANGELOG.md",
    "contributing.md": "CONTRIBUTING.md",
    "security.md": "SECURITY.md",
    "runbook.md": "deploy/README.md",
}
"""Pages of the site that lie elsewhere in the repository."""

_LINK = re.compile(r"(\]\()([^)\s]+)((?:\s+\"[^\"]*\")?\))")
_CODE = re.compile(r"^(```|~~~).*?^\1|`[^`\n]+`", re.DOTALL | re.MULTILINE)


def moved(markdown: str, here: str, repository: str) -> str:
    """A page's text with its links as the site has them.

    Args:
        markdown: of the page.
        here: its path on the site.
        repository: address of the repository.

    Raises:
        FileNotFoundError: a link leads to no file of the repository.
    """
    source = ELSEWHERE.get(here, f"docs/{here}")
    code = [match.span() for match in _CODE.finditer(markdown)]

    def one(link: re.Match[str]) -> str:
        if any(start <= link.start() < end for start, end in code):
            return link[0]
        return link[1] + target(link[2], source, here, repository) + link[3]

    return _LINK.sub(one, markdown)


def target(link: str, source: str, here: str, repository: str) -> str:
    """Where a link of a page leads on the site.

    Args:
        link: as it stands in the page.
        source: the page's own path in the repository.
        here: its path on the site.
        repository: address of the repository.

    Raises:
        FileNotFoundError: it leads to no file of the repository.
    """
    if re.match(r"[a-z]+:|#", link):
        return link
    path, hash_, anchor = link.partition("#")
    found = posixpath.normpath(posixpath.join(posixpath.dirname(source), path))
    if found.startswith("..") or not (ROOT / found).exists():
        raise FileNotFoundError(f"{source}: {link} leads to no file of the repository")
    back = {path: page for page, path in ELSEWHERE.items()}
    if found in back:
        inside = back[found]
    elif found.startswith("docs/") and (ROOT / found).is_file():
        inside = found.removeprefix("docs/")
    elif found.startswith("docs/") and (ROOT / found / "README.md").exists():
        inside = f"{found.removeprefix('docs/')}/README.md"
    else:
        kind = "tree" if (ROOT / found).is_dir() else "blob"
        return f"{repository.rstrip('/')}/{kind}/main/{found}{hash_}{anchor}"
    return posixpath.relpath(inside, posixpath.dirname(here) or ".") + hash_ + anchor
