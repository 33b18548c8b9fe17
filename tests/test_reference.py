"""The pages of docs/reference say what the code says."""

import runpy
from pathlib import Path

import pytest

from limbeck.experiment.loading import OPEN_PARTS, schema
from limbeck.export.base import exporters

DOCS = Path(__file__).parent.parent / "docs"
REGISTRIES = {**OPEN_PARTS, "exporters": exporters}


@pytest.mark.parametrize("place", REGISTRIES)
def test_a_component_explains_itself_and_each_option(place):
    registry = REGISTRIES[place]
    for name in registry.names():
        explained = registry.explain(name)
        assert explained.summary
        assert set(registry.options(name)) <= set(explained.options), name


def test_an_editor_shows_what_an_option_means():
    choices = schema()["properties"]["teacher"]["anyOf"]
    online = next(c for c in choices if c.get("properties", {}).get("type") == {"const": "online"})
    assert online["properties"]["path"]["description"].startswith("Folder, GGUF file or Hub name")


def test_the_reference_pages_are_those_of_the_code(monkeypatch):
    monkeypatch.syspath_prepend(str(DOCS))
    pages = runpy.run_path(str(DOCS / "reference.py"))["pages"]()
    shown = {path.name: path.read_text() for path in (DOCS / "reference").glob("*.md")}
    stale = [name for name in pages | shown if pages.get(name) != shown.get(name)]
    assert stale == [], "run `python docs/reference.py`"
