"""Links between pages lead somewhere, every page is on the site, every command shown is one."""

import re
import shlex
from functools import cache
from pathlib import Path

import pytest
import yaml
from typer.core import TyperGroup

from limbeck.commands import VERBS, load_verb
from limbeck.commands.short_form import is_short
from limbeck.config.reading import fields_at

ROOT = Path(__file__).parent.parent
DOCS = sorted((ROOT / "docs").rglob("*.md"))
RESULTS = sorted((ROOT / "benchmarks" / "results").glob("*.md"))
PAGES = [*sorted(ROOT.glob("*.md")), *DOCS, *RESULTS]
CODE = re.compile(r"^(?: {4}[^\n]*|```.*?^```)$", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"\]\(([^)\s]+)\)")
COMMAND = re.compile(
    rf"^ *(?:\$ )?((?:torchrun .* -m )?limbeck (?:{'|'.join(VERBS)})\b.*)$", re.MULTILINE
)


def name_of(path):
    return path.relative_to(ROOT).as_posix()


@cache
def anchors(page):
    """Anchors of a page's headings, as a forge and the site make them, and its own `<a id>`."""
    text = CODE.sub("", page.read_text())
    # Right below a table, the site makes no heading of a line.
    headings = re.findall(r"(?<![^\n]\n)^#+ (.*)$", text, re.MULTILINE)
    titles = [re.sub(r"\]\([^)]*\)", "", title) for title in headings]
    slugs = [re.sub(r"[^\w\- ]", "", t.strip().lower()).replace(" ", "-") for t in titles]
    numbered = {f"{slug}-{n}" for slug in slugs for n in range(1, slugs.count(slug))}
    return {*slugs, *numbered, *re.findall(r'<a id="([^"]+)"', text)}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_link_points_to_an_existing_file_and_heading(page):
    for link in LINK.findall(CODE.sub("", page.read_text())):
        if re.match(r"\w+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.is_file(), f"{name_of(page)}: {link} is no file"
        if anchor:
            assert anchor in anchors(target), f"{name_of(page)}: {link} is no heading there"


def leaves(tree):
    if isinstance(tree, str):
        yield tree
    else:
        for each in tree.values() if isinstance(tree, dict) else tree:
            yield from leaves(each)


def test_the_site_has_every_page_once():
    class Loader(yaml.SafeLoader):
        """Reads the file without the Python objects that mkdocs makes of its tags."""

    Loader.add_multi_constructor("", lambda loader, suffix, node: None)
    nav = list(leaves(yaml.load((ROOT / "mkdocs.yml").read_text(), Loader)["nav"]))
    shown = [page for page in PAGES if page not in RESULTS]
    assert sorted(page for page in nav if "results/" not in page) == sorted(map(name_of, shown))


def test_the_readme_links_to_every_page():
    text = (ROOT / "README.md").read_text()
    pages = [name_of(page) for page in DOCS if page.parent.name == "docs"]
    assert [page for page in pages if page not in text] == []


def test_every_test_that_a_page_names_exists():
    text = (ROOT / "docs" / "reliability.md").read_text()
    named = re.findall(r"`([\w/]+\.py)::(\w+)`", text)
    assert len(named) > 80
    missing = [
        f"{path}::{name}"
        for path, name in named
        if f"def {name}(" not in (ROOT / "tests" / path).read_text()
    ]
    assert missing == []


def command_lines():
    for page in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]:
        text = page.read_text().replace("\\\n", " ")
        for line in dict.fromkeys(COMMAND.findall(text)):
            yield pytest.param(page, line, id=f"{page.name}: {line[:60]}")


@pytest.mark.parametrize(("page", "line"), [*command_lines()])
def test_every_command_shown_has_its_verb_options_and_overrides(page, line):
    """The command line's own parser reads it; nothing runs."""
    words = shlex.split(line, comments=True)
    words = words[words.index("limbeck") + 1 :]
    command, context = load_verb(words[0]), None
    while isinstance(command, TyperGroup):
        context, words = command.make_context(words[0], words[1:2], parent=context), words[1:]
        command = command.get_command(context, words[0])
        assert command is not None, f"no verb {words[0]}"
    values = command.make_context(words[0], words[1:], parent=context).params
    if page.name == "troubleshooting.md":
        return  # its overrides are wrong on purpose, and tests/test_docs.py compares the answers
    overrides = values.get("overrides") or values.get("words") or []
    for override in overrides[3 if is_short(overrides) else 0 :]:
        section, _, option = override.partition("=")[0].partition(".")
        if "=" in override:
            assert section in fields_at(()), override
            assert not fields_at((section,)) or not option or option in fields_at((section,))
