"""Reading a recipe: YAML, overrides, plugins, and every mistake at once."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cache
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple, get_args

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import TypeAdapter, ValidationError
from yaml import YAMLError

from limbeck.config.foreign_names import ours
from limbeck.config.paths import NamedModel, models_of, path_problems, texts_of
from limbeck.config.plugins import import_plugins
from limbeck.config.recipe import RunConfig
from limbeck.errors import ConfigError, LimbeckError
from limbeck.files import expanded, require_shallow
from limbeck.registry import Problem, hints_of, suggest

MAX_RECIPE_BYTES = 1 << 20

COUNTED = {
    "memory.micro_batch": "a whole number of rows or 'auto'",
    "memory.head_budget_mb": "a whole number of megabytes or 'auto'",
    "optim.warmup_steps": "a whole number of steps, or a share of all steps between 0 and 1",
}
"""What numbers that have another form too may be."""

adapter: Callable[[type], Any] = cache(TypeAdapter)
"""The validator of a section, made once: making that of a recipe takes 30 ms."""


class Checked(NamedTuple):
    """A recipe, checked outside components."""

    config: RunConfig | None
    """None if any section is wrong or missing."""
    sections: Mapping[str, Any]
    """Those that are right, by name; with `config`, its own."""
    problems: list[Problem]


Check = Callable[[Mapping[str, Any], RunConfig | None], Iterable[Problem]]
"""Further mistakes, of the sections and the configuration of `Checked`."""


class Needs(NamedTuple):
    """Paths of a recipe that a command reads."""

    models: bool = True
    """The teacher's, and the student's with `student`."""
    student: bool = True
    """The student's, and the held-out text's with `texts`."""
    texts: bool = True


NO_PATHS = Needs(models=False, texts=False)


def read(
    path: Path,
    overrides: Iterable[str] = (),
    check: Check = lambda *_: (),
    needs: Needs = NO_PATHS,
) -> RunConfig:
    """Read YAML, apply `a.b=value` overrides, check everything.

    Args:
        check: Further mistakes.
        needs: Paths of the recipe that must be there.

    Raises:
        ConfigError: With one line a mistake, each beginning with the path of the field.
        DataError: The only mistakes are empty files.
        TryLaterError: The only mistakes are models that the network is needed for.
    """
    tree = parse(path, overrides)
    if "stages" in tree:
        raise ConfigError(
            f"{path} has stages, and one run is asked for. `limbeck distill` runs them all, and "
            "with --print-config prints the recipe of each."
        )
    found = validated(tree, check)
    require_paths(path, *paths_of(found.sections, needs), found.problems)
    assert found.config is not None, "a recipe without a mistake has a configuration"
    return found.config


def require_options(path: Path, overrides: Iterable[str], needs: Needs) -> None:
    """Refuse a recipe with unknown options, wrong values or paths, before components are imported.

    Components' own options, plugins and stages are left to `read`.

    Args:
        needs: Paths of the recipe that must be there.

    Raises:
        LimbeckError: As `read`.
    """
    tree = parse(path, overrides)
    if "stages" not in tree:
        found = closed_parts(tree)
        require_paths(path, *paths_of(found.sections, needs), found.problems)


def paths_of(
    sections: Mapping[str, Any], needs: Needs
) -> tuple[list[NamedModel], list[tuple[str, str]]]:
    """Models and texts that a command reads."""
    return (
        models_of(sections, student=needs.student) if needs.models else [],
        list(texts_of(sections, held_out=needs.student)) if needs.texts else [],
    )


def require_paths(
    what: Path | str,
    models: Iterable[NamedModel],
    texts: Iterable[tuple[str, str]],
    problems: Iterable[Problem] = (),
) -> None:
    """Refuse models and texts that are not there, all in one message.

    Args:
        what: Subject of the message.
        problems: Other mistakes, named first.
    """
    found = path_problems(models, texts)
    found[ConfigError] = [*problems, *found[ConfigError]]
    for kind, mistakes in found.items():
        if mistakes:
            raise refusal(what, chain.from_iterable(found.values()), kind)


def refusal(
    what: Path | str, problems: Iterable[Problem], kind: type[LimbeckError] = ConfigError
) -> LimbeckError:
    """The error that names every mistake of a recipe or a command."""
    return kind("\n  ".join([f"{what} cannot be run:", *one_line_each(problems)]))


def closed_parts(tree: Mapping[str, Any]) -> Checked:
    """A tree, and the mistakes outside components."""
    problems = list(not_finite(tree))
    try:
        config = adapter(RunConfig).validate_python(tree)
    except ValidationError as error:
        errors = error.errors()
    else:
        return Checked(config, vars(config), problems)
    wrong, hints = {e["loc"][0] for e in errors}, hints_of(RunConfig)
    sections = {
        name: adapter(hints[name]).validate_python(value)
        for name, value in tree.items()
        if name in hints and name not in wrong
    }
    return Checked(None, sections, problems + [explain(dict(e)) for e in errors])


def validated(tree: Mapping[str, Any], check: Check) -> Checked:
    """A tree, and every mistake in it. Plugins are imported before `check` looks at components."""
    config, sections, problems = closed_parts(tree)
    if failed := list(import_plugins(sections.get("plugins", ()))):
        # The names they register would all be unknown.
        return Checked(config, sections, [*problems, *failed])
    return Checked(config, sections, [*problems, *check(sections, config)])


def one_line_each(problems: Iterable[Problem]) -> list[str]:
    """Problems as lines, a place's first only; a list's own is left out when an item has one."""
    first: dict[str, Problem] = {}
    for problem in problems:
        first.setdefault(problem.at, problem)
    return [str(p) for at, p in first.items() if not any(o.startswith(f"{at}[") for o in first)]


def parse(path: Path, overrides: Iterable[str]) -> dict[str, Any]:
    """The nested dictionary of a recipe with its overrides."""
    try:
        size = path.stat().st_size
        if size > MAX_RECIPE_BYTES:
            raise ConfigError(f"{path} has {size:,} bytes; a recipe has at most a million.")
        overrides = list(overrides)  # read twice, and an iterator can be read once
        wrong = [o for o in overrides if "=" not in o]
        if wrong:
            raise ConfigError(f"An override reads key.sub=value, got {wrong[0]!r}.")
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}.{run_folder(path)}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} cannot be read: {error}.") from None
    with blamed_on(str(path)):
        base = OmegaConf.create(text)
    if not OmegaConf.is_dict(base):
        raise ConfigError(f"{path} must hold a mapping of sections.")
    for override in overrides:
        override_in(base, override)
    with blamed_on(str(path)):
        tree = OmegaConf.to_container(base, resolve=False)
        assert isinstance(tree, dict), "OmegaConf keeps a mapping a mapping"
        require_shallow(tree)
    for at, value in leaves(tree):
        if isinstance(value, str) and "${" in value:
            raise ConfigError(
                f"{path}: {at} refers to something outside ({value!r}); recipes are plain values, "
                "so that the saved recipe is the whole truth and holds no secret."
            )
    if isinstance(tree.get("plugins"), list):
        folder = path.parent.resolve()
        tree["plugins"] = [str(folder / expanded(str(p))) for p in tree["plugins"]]
    return {str(key): value for key, value in tree.items()}


def override_in(tree: Any, override: str) -> None:
    """Apply `key.sub=value` to a configuration of OmegaConf, in place."""
    key = override.partition("=")[0]
    with blamed_on(f"The override {override!r}"):
        value = OmegaConf.select(OmegaConf.from_dotlist([override]), key)
        OmegaConf.update(tree, key, value, merge=False)


@contextlib.contextmanager
def blamed_on(source: str) -> Iterator[None]:
    """Report errors of the YAML parser and of OmegaConf as errors of a file or of an override."""
    try:
        yield
    except (OmegaConfBaseException, ValueError, LookupError) as error:
        raise ConfigError(f"{source} is not a recipe: {error}") from None
    except AssertionError:  # OmegaConf's, of YAML that is neither a mapping nor a list
        raise ConfigError(f"{source} must hold a mapping of sections.") from None
    except RecursionError:
        raise ConfigError(f"{source} is not a recipe: it is nested too deeply.") from None
    except YAMLError as error:
        text = str(error).replace('in "<unicode string>", ', "at ")
        raise ConfigError(f"{source} is not YAML: {text}") from None


def run_folder(path: Path) -> str:
    """A hint where a folder was passed in place of a recipe."""
    saved = path / "recipe.yaml"
    return f" It is a run directory; its recipe is {saved}." if saved.is_file() else ""


def leaves(tree: Any, at: tuple[int | str, ...] = ()) -> Iterator[tuple[str, Any]]:
    """Every value in nested mappings and lists, with its path."""
    children: Iterable[tuple[Any, Any]] = ()
    if isinstance(tree, Mapping):
        children = tree.items()
    elif isinstance(tree, list | tuple):
        children = enumerate(tree)
    else:
        yield dotted(at), tree
    for key, child in children:
        yield from leaves(child, (*at, key if isinstance(key, int) else str(key)))


def differences(before: Any, now: Any) -> dict[str, str]:
    """Each value that two trees of JSON do not share, by its path, as `was 1, is 2`."""
    old, new = (dict(leaves(json.loads(json.dumps(tree)))) for tree in (before, now))
    return {
        at: f"was {old.get(at, 'absent')!r}, is {new.get(at, 'absent')!r}"
        for at in sorted(old.keys() | new.keys())
        if old.get(at, ...) != new.get(at, ...)
    }


def refuse_differences(found: Mapping[str, str], rule: str) -> None:
    """Refuse to continue with other settings than before.

    Args:
        found: What `differences` gives.
        rule: What must hold, and what to do; ends with a colon.
    """
    if found:
        raise ConfigError("\n  ".join([rule, *(f"{at}: {change}" for at, change in found.items())]))


def not_finite(tree: Any) -> Iterator[Problem]:
    """A problem for every NaN and infinity."""
    for at, value in leaves(tree):
        if isinstance(value, float) and not math.isfinite(value):
            yield Problem(at, f"must be a finite number, got {value}.")


def explain(error: Mapping[str, Any]) -> Problem:
    """One of pydantic's errors, in our words."""
    where = tuple(part for part in error["loc"] if not is_branch(part))
    at, got = dotted(where), error["input"]
    match error["type"]:
        case "unexpected_keyword_argument" | "extra_forbidden":
            at = dotted(error["loc"])
            known = fields_at(error["loc"][:-1])
            name = str(error["loc"][-1])
            return Problem(at, f"no such option{elsewhere(name) or suggest(name, known)}.")
        case "missing" | "missing_keyword_only_argument" | "missing_argument":
            return Problem(at, "is missing, and a run needs it.")
        case "greater_than" | "greater_than_equal" | "less_than" | "less_than_equal":
            return Problem(at, f"must be {bounds(where, error)}, got {got}.")
        case "literal_error":
            return Problem(at, f"must be {error['ctx']['expected']}, got {got!r}.")
        case "int_parsing" | "int_from_float" if at in COUNTED:
            return Problem(at, f"must be {COUNTED[at]}, got {got!r}.")
    return Problem(at, f"{error['msg'][:1].lower()}{error['msg'][1:]}, got {got!r}.")


def elsewhere(name: str) -> str:
    """How a message continues for an option of another tool, or of another section of a recipe.

    Example:
        >>> elsewhere("learning_rate")
        ': here it is optim.learning_rate'
    """
    path = recipe_option(name)
    return ours(name) or (f": here it is {path}" if path else "")


def recipe_option(name: str) -> str | None:
    """The path in a recipe of the only option with this last part."""
    places = [name] if name in fields_at(()) else []
    places += [f"{section}.{name}" for section in fields_at(()) if name in fields_at((section,))]
    return places[0] if len(places) == 1 else None


def is_branch(part: int | str) -> bool:
    """Whether a part of pydantic's location names a branch of a union, not a field."""
    return isinstance(part, str) and (part in {"float", "int", "str"} or not part.isidentifier())


def bounds(where: tuple[int | str, ...], error: Mapping[str, Any]) -> str:
    """The allowed range of an option, as text."""
    if where == ("objective", "alpha"):
        return "between 0 and 1"
    words = {"gt": "greater than", "ge": "at least", "lt": "less than", "le": "at most"}
    return " and ".join(f"{words[k]} {v:g}" for k, v in error["ctx"].items() if k in words)


def fields_at(where: Iterable[int | str]) -> list[str]:
    """Names of the options a section of `RunConfig` takes; none for an open part."""
    section: Any = RunConfig
    for part in where:
        if not is_section(section):
            return []
        hint = hints_of(section).get(str(part))
        section = next(filter(is_section, (hint, *get_args(hint))), None)
    if section is None:
        return []
    return options_of(section)


def is_section(hint: Any) -> bool:
    """Whether an annotation, or a part of one, is a section of a recipe."""
    return isinstance(hint, type) and dataclasses.is_dataclass(hint)


@cache
def options_of(section: type) -> list[str]:
    """Names of the options of a section, as a recipe writes them."""
    return list(adapter(section).json_schema().get("properties", ()))


def dotted(location: Iterable[int | str]) -> str:
    """Write a path into nested data as it is written in Python.

    Example:
        >>> dotted(("objective", "extra", 1, "weight"))
        'objective.extra[1].weight'
    """
    parts = (f"[{part}]" if isinstance(part, int) else f".{part}" for part in location)
    return "".join(parts).lstrip(".")


def dump(config: RunConfig) -> str:
    """The resolved configuration as YAML; reading it back gives the same configuration."""
    return str(OmegaConf.to_yaml(OmegaConf.create(to_plain(config))))


def to_plain(config: RunConfig) -> dict[str, Any]:
    """The resolved configuration as what JSON can hold."""
    plain: dict[str, Any] = adapter(RunConfig).dump_python(config, mode="json", by_alias=True)
    return plain
