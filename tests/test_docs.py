"""The pages: every message that they quote is one of the code, every command and file that they name is there."""

import ast
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

from flow_runs import ROOT

DOCS = ROOT / "docs"
SOURCES = [p for folder in ("alignment", "models", "infra", "flows") for p in sorted((ROOT / folder).rglob("*.py"))]
VARIES = "…"
PAGES = sorted([*DOCS.glob("*.md"), ROOT / "README.md", ROOT / "CONTRIBUTING.md"])


def literals() -> Iterator[str]:
    """Every text of the code, with … for what an f-string fills in; of the Makefile the lines."""
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                yield "".join(str(v.value) if isinstance(v, ast.Constant) else VARIES for v in node.values)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield node.value
    yield from (ROOT / "Makefile").read_text().splitlines()


def quoted_messages() -> list[str]:
    return re.findall(r"^### `(.+)`$", (DOCS / "troubleshooting.md").read_text(), re.MULTILINE)


@pytest.fixture(scope="module")
def texts() -> list[str]:
    return [" ".join(text.split()) for text in literals()]


@pytest.mark.parametrize("message", quoted_messages())
def test_each_message_of_the_troubleshooting_is_one_of_the_code(message: str, texts: list[str]) -> None:
    parts = [part.strip() for part in message.split(VARIES) if part.strip()]
    assert sum(len(part) for part in parts) >= 10, "too little to tell a message by"
    pattern = re.compile(".*".join(re.escape(part) for part in parts))
    assert any(pattern.search(text) for text in texts)


def test_there_are_messages_to_look_for() -> None:
    assert len(quoted_messages()) > 15


def commands() -> set[str]:
    """Modules and flows that the pages tell people to run."""
    text = "\n".join(page.read_text() for page in PAGES)
    modules = re.findall(r"python3? -m ((?:alignment|models|infra|benchmarks)\.[\w.]+)", text)
    flows = re.findall(r"python3? (flows/\w+\.py)", text)
    return {module.rstrip(".").replace(".", "/") + ".py" for module in modules} | set(flows)


def test_each_command_that_a_page_names_is_there() -> None:
    places = {name: (ROOT / name, ROOT / name.removesuffix(".py") / "__main__.py") for name in commands()}
    assert [name for name, files in places.items() if not any(file.is_file() for file in files)] == []
    assert "alignment/compare.py" in commands()


def test_each_preset_and_make_target_that_a_page_names_is_there() -> None:
    text = "\n".join(page.read_text() for page in PAGES)
    presets = set(re.findall(r"\bconfigs/[\w-]+\.yaml\b", text))
    assert [name for name in sorted(presets) if not (ROOT / name).is_file()] == []
    targets = set(re.findall(r"(?:^|`)make ([a-z][\w-]*)", text, re.MULTILINE))
    known = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert targets <= known


def test_each_field_that_a_command_sets_is_one() -> None:
    from test_nemo_keys import known_keys

    text = "\n".join(page.read_text() for page in PAGES if page.name != "scaling.md")  # its command has its own
    fields = set(re.findall(r"--set ([a-z_]+\.[a-z_0-9]+)=", text)) - {"section.field"}
    assert fields - known_keys() == set()
    assert len(fields) > 10


@pytest.mark.parametrize("page", [ROOT / "README.md", ROOT / "CONTRIBUTING.md"], ids=lambda p: p.name)
def test_each_link_of_the_pages_outside_the_site_leads_to_a_file(page: Path) -> None:
    """Those of docs/ are checked where the site is built: `make docs`."""
    targets = re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text())
    assert [t for t in targets if "://" not in t and not (page.parent / t).exists()] == []


def test_the_site_asks_nobody_else() -> None:
    config = (ROOT / "mkdocs.yml").read_text()
    assert "font: false" in config
    pages = [*DOCS.glob("*.md"), *(DOCS / "hooks").glob("*.py")]
    assert not [p.name for p in pages if "```mermaid" in p.read_text()]  # its script would come from a CDN
    used = re.findall(r"!\[[^\]]*\]\((\S+)\)", "\n".join(p.read_text() for p in DOCS.glob("*.md")))
    assert used and not [name for name in used if "://" in name]


def test_the_words_of_shell_blocks_can_be_read_by_a_shell() -> None:
    for page in PAGES:
        for block in re.findall(r"```bash\n(.*?)```", page.read_text(), re.DOTALL):
            lines = block.replace("\\\n", " ").splitlines()
            if "<<" not in block and not block.startswith("#!"):
                for line in lines:
                    shlex.split(line, comments=True)


def test_the_site_is_built_strictly() -> None:
    """mkdocs counts warnings as it prints them: under --quiet --strict a dead link passes."""
    (command,) = re.findall(r"mkdocs build.*", (ROOT / "Makefile").read_text())
    assert "--strict" in command and "quiet" not in command and "-q" not in command
