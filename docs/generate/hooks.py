"""Hooks of mkdocs: pages that are made from the program, and links that lead out of docs/.

A page of docs/ is read on a forge as well, where its links to the sources work. On the site these
go to the repository, and a link to a file that is not there ends the build.
"""

import sys
from pathlib import Path
from typing import Any

from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "docs"))

from generate import api, links, options


def on_config(config: Any) -> Any:
    """The rest of the navigation: a page a rule, a page a package, and pages not named there."""
    sections = {title: pages for entry in config.nav for title, pages in entry.items()}
    docs = ROOT / "docs"
    rules = [path for path in sorted((docs / "strategies").glob("*.md")) if path.stem != "README"]
    sections["Rules"] += [{path.stem: f"strategies/{path.name}"} for path in rules]
    pages = [{name: f"reference/python/{name}.md"} for name, _ in api.packages()]
    sections["Reference"].append({"Python": pages})
    named = str(config.nav)
    rest = [path.name for path in sorted(docs.glob("*.md")) if f"'{path.name}'" not in named]
    sections["How to"] += rest
    return config


def on_files(files: Files, config: Any) -> Files:
    """Add the pages that are made, and those that lie elsewhere."""
    made = {
        "reference/options.md": options.page(),
        "reference/commands.md": api.commands_page(),
        **{f"reference/python/{n}.md": api.python_page(n, m) for n, m in api.packages()},
        **{page: (ROOT / path).read_text("utf-8") for page, path in links.ELSEWHERE.items()},
    }
    for page, text in made.items():
        files.append(File.generated(config, page, content=text))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Links as the site has them."""
    here = page.file.src_uri
    if here.startswith("reference/"):
        return markdown
    try:
        return links.moved(markdown, here, config.repo_url)
    except FileNotFoundError as error:
        raise PluginError(str(error)) from error
