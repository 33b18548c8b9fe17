"""The recipe's JSON schema, for editors: completion, types and bounds of every option."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from pydantic import TypeAdapter

from limbeck.config.recipe import DataConfig, MixedConfig, RunConfig
from limbeck.registry import Component, Registry, registry_of


def recipe_schema(open_parts: Mapping[str, Registry[Any]]) -> dict[str, Any]:
    """JSON schema of a whole recipe.

    Args:
        open_parts: By path (`teacher`, `objective.divergence`, `objective.extra[]`), the registry
            whose components may stand there.
    """
    schema = TypeAdapter(RunConfig).json_schema()
    for section in (DataConfig, MixedConfig):
        properties = schema["$defs"][section.__name__]["properties"]
        properties |= properties_of(section)
    schema["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    schema["title"] = "limbeck recipe"
    for path, registry in open_parts.items():
        *parents, leaf = path.split(".")
        node = schema
        for parent in parents:
            node = follow(schema, node["properties"][parent])
        choice = component_schema(registry)
        if {"type": "null"} in node["properties"].get(leaf, {}).get("anyOf", []):
            choice["anyOf"].append({"type": "null"})
        if leaf.endswith("[]"):
            node["properties"][leaf.removesuffix("[]")]["items"] = choice
        else:
            node["properties"][leaf] = choice
    return schema


def properties_of(section: type) -> dict[str, Any]:
    """JSON schema of each option of a section, those it inherits with their descriptions too."""
    properties: dict[str, Any] = TypeAdapter(section).json_schema(by_alias=True)["properties"]
    for base in filter(dataclasses.is_dataclass, section.__mro__[1:]):
        for name, facts in properties_of(base).items():
            properties[name].setdefault("description", facts.get("description", ""))
    return properties


def follow(schema: dict[str, Any], node: dict[str, Any]) -> dict[str, Any]:
    """The definition a reference points to, in a union with null too."""
    reference = next(each["$ref"] for each in [node, *node.get("anyOf", [])] if "$ref" in each)
    found: dict[str, Any] = schema["$defs"][reference.rpartition("/")[2]]
    return found


def component_schema(registry: Registry[Any]) -> dict[str, Any]:
    """One of a registry's components: its name alone, or a mapping with its options."""
    names = registry.names()
    return {
        "anyOf": [{"enum": names}, *(mapping_schema(registry, name) for name in names)],
    }


def mapping_schema(registry: Registry[Any], name: str) -> dict[str, Any]:
    """`{type: name, **options}` with each option's own schema."""
    properties: dict[str, Any] = {"type": {"const": name}}
    meanings = registry.explain(name).options
    required = ["type"]
    for option, (hint, parameter) in registry.options(name).items():
        nested = registry_of(hint)
        if nested is not None:
            properties[option] = component_schema(nested)
        elif hint is Component:
            properties[option] = {"type": "object"}
        else:
            properties[option] = TypeAdapter(hint).json_schema()
        if option in meanings:
            properties[option]["description"] = meanings[option]
        if parameter.default is parameter.empty:
            required.append(option)
    return {
        "type": "object",
        "description": registry.explain(name).summary,
        "properties": properties,
        "required": required,
    }
