"""Links from the pages to files of the repository: each file that is linked becomes a page that shows it.

So that the site is whole by itself: nothing leads to a server that hosts the repository, and the strict build checks
these links as it checks all others.
"""

import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parent.parent.parent
LINK = re.compile(r"\]\((\.\./[^)#\s]+)(#[^)\s]*)?\)")
UNSEARCHED = "---\nsearch:\n  exclude: true\n---\n"
LANGUAGES = {".py": "python", ".yaml": "yaml", ".yml": "yaml", ".md": "markdown", ".sh": "bash", ".jinja": "html+jinja"}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds a page for each file that a page of docs/ links to."""
    linked = set()
    for file in files.documentation_pages():
        if file.abs_src_path:
            for target, _ in LINK.findall(Path(file.abs_src_path).read_text()):
                linked.add(posixpath.normpath(posixpath.join("docs", posixpath.dirname(file.src_uri), target)))
    for name in sorted(linked):
        if (ROOT / name).is_file():
            files.append(File.generated(config, _page(name), content=_shown(name)))
        elif (ROOT / name).is_dir():
            files.append(File.generated(config, _page(name), content=_listed(name)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turns the links to files into links to their pages; one to a missing file stays and fails the build."""

    def to_page(match: re.Match[str]) -> str:
        here = posixpath.dirname(page.file.src_uri)
        name = posixpath.normpath(posixpath.join("docs", here, match[1]))
        known = name.startswith("..") or files.get_file_from_path(_page(name)) is None
        return match[0] if known else f"]({posixpath.relpath(_page(name), here or '.')})"

    return markdown if page.file.src_uri.startswith("source/") else LINK.sub(to_page, markdown)


def _page(name: str) -> str:
    return f"source/{name.rstrip('/')}.md"


def _shown(name: str) -> str:
    path = ROOT / name
    fence, language = "`" * 6, LANGUAGES.get(path.suffix, "text")
    return f"{UNSEARCHED}# {name}\n\n{fence}{language}\n{path.read_text()}\n{fence}\n"


def _listed(name: str) -> str:
    names = sorted(
        f"{p.name}/" if p.is_dir() else p.name for p in (ROOT / name).iterdir() if not p.name.startswith("__")
    )
    return f"{UNSEARCHED}# {name}/\n\n" + "\n".join(f"- `{one}`" for one in names)
