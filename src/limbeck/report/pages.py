"""Templates into pages: escaped, self-contained, without scripts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from limbeck.report import words


def page(template: str, values: Mapping[str, Any]) -> str:
    """A whole HTML page.

    Args:
        values: What the template names. Strings are escaped where they are shown.
    """
    environment = Environment(
        loader=PackageLoader("limbeck.report", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    for name in ("visible", "harmless", "number", "percent", "count", "size", "duration"):
        environment.filters[name] = vars(words)[name]
    return environment.get_template(template).render(values)
