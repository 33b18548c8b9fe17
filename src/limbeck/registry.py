"""Registries: a name in a recipe selects a callable in Python."""

from __future__ import annotations

import difflib
import functools
import importlib
import inspect
import pkgutil
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import (
    Annotated,
    Any,
    Generic,
    NamedTuple,
    TypeVar,
    get_args,
    get_origin,
    get_type_hints,
)

from pydantic import TypeAdapter, ValidationError

from limbeck.errors import ConfigError

T = TypeVar("T")
F = TypeVar("F", bound=Callable[..., Any])

SECTION = re.compile(r"^(Args|Attributes|Example|Raises|Returns|Yields):\n", re.MULTILINE)
"""Start of a docstring's section."""

ENTRY = re.compile(r"^    (\w+): (.*(?:\n {8,}.*)*)", re.MULTILINE)
"""A name and its text in a section."""

Component = Mapping[str, Any]
"""A component in a recipe: `{type: name, **options}`."""


class Problem(NamedTuple):
    """One mistake in a configuration."""

    at: str
    """Path of the value, as `objective.extra[0].weight`."""
    text: str
    """What must hold, the value, what to do."""

    def __str__(self) -> str:
        return f"{self.at}: {self.text}"


class Explanation(NamedTuple):
    """What a component's docstring says."""

    summary: str
    """Its first line."""
    details: str
    """The paragraphs after it."""
    options: Mapping[str, str]
    """Meaning of each option, from the section `Args`."""


class Registry(Generic[T]):
    """Components of one kind, each under the short name used in YAML.

    A component is a callable. Its keyword-only parameters are its configuration: names, types,
    bounds and defaults are read from the signature, so there is no second place to declare them.
    A parameter annotated `Annotated[Component, registry]` is itself a component of that registry.
    """

    def __init__(self, kind: str, package: str) -> None:
        """
        Args:
            kind: What the components are, as it should read in an error ("divergence").
            package: Package whose modules are imported on first use; a file dropped into it is a
                new component, and no list needs editing.
        """
        self.kind = kind
        self._package = package
        self._components: dict[str, Callable[..., T]] = {}

    def register(self, name: str) -> Callable[[F], F]:
        """Decorator: make a callable available as `type: name`."""

        def add(component: F) -> F:
            if not component.__module__.startswith("limbeck."):
                self._import_package()  # so that a plugin cannot take a built-in name
            if name in self._components:
                raise ValueError(f"a {self.kind} {name!r} is already registered")
            self._components[name] = component
            return component

        return add

    def names(self) -> list[str]:
        """Every registered name, sorted."""
        self._import_package()
        return sorted(self._components)

    def _import_package(self) -> None:
        package = importlib.import_module(self._package)
        for module in pkgutil.iter_modules(package.__path__):
            importlib.import_module(f"{self._package}.{module.name}")

    def options(self, name: str) -> dict[str, tuple[Any, inspect.Parameter]]:
        """The options of a registered component: type with its bounds, and the parameter."""
        self._import_package()
        component = self._components[name]
        target = component.__init__ if inspect.isclass(component) else component
        hints = hints_of(target)
        return {
            parameter.name: (hints[parameter.name], parameter)
            for parameter in inspect.signature(component).parameters.values()
            if parameter.kind is parameter.KEYWORD_ONLY
        }

    def explain(self, name: str) -> Explanation:
        """A component's docstring in its parts; a class documents options at its constructor."""
        component = self._components[name]
        body, arguments = sections(inspect.getdoc(component) or "")
        if inspect.isclass(component):
            arguments = sections(inspect.cleandoc(component.__init__.__doc__ or ""))[1]
        summary, _, details = body.partition("\n")
        meanings = {word: " ".join(text.split()) for word, text in ENTRY.findall(arguments)}
        return Explanation(summary, details.strip(), meanings)

    def bind(self, spec: Component | str, at: str) -> Callable[..., T]:
        """The component of a recipe with its options filled in.

        Args:
            spec: `{"type": name, **options}`, or the name alone.
            at: Its path in the recipe, for the error message.
        """
        options, problems = self._validate(spec, at)
        if problems:
            raise ConfigError("\n".join(map(str, problems)))
        return functools.partial(self._components[type_of(spec)], **options)

    def values(self, spec: Component | str) -> dict[str, Any]:
        """Every option of a valid component of a recipe, defaults included."""
        declared = self.options(type_of(spec))
        defaults = {name: parameter.default for name, (_, parameter) in declared.items()}
        return {**defaults, **self._validate(spec, "")[0]}

    def problems(self, spec: Component | str, at: str) -> list[Problem]:
        """Every mistake in a component of a recipe; empty when `bind` would accept it."""
        return self._validate(spec, at)[1]

    def list_problems(self, specs: Iterable[Component | str], at: str) -> Iterator[Problem]:
        """Every mistake in a list of components."""
        for index, spec in enumerate(specs):
            yield from self.problems(spec, f"{at}[{index}]")

    def _validate(self, spec: Component | str, at: str) -> tuple[dict[str, Any], list[Problem]]:
        name = type_of(spec)
        if name not in self.names():
            known = f"Known: {', '.join(self.names())}."
            if not name:
                return {}, [Problem(f"{at}.type", f"which {self.kind}? {known}")]
            text = f"no {self.kind} is called {name!r}{suggest(name, self.names())}. {known}"
            return {}, [Problem(f"{at}.type", text)]
        accepted = self.options(name)
        given = {} if isinstance(spec, str) else {k: v for k, v in spec.items() if k != "type"}
        problems, options = [], {}
        for option, value in given.items():
            if option not in accepted:
                takes = ", ".join(accepted) or "none"
                text = (
                    f"{name!r} takes no such option{suggest(option, accepted)}. It takes: {takes}."
                )
                problems.append(Problem(f"{at}.{option}", text))
                continue
            hint = accepted[option][0]
            if nested := registry_of(hint):
                problems += nested.problems(value, f"{at}.{option}")
                options[option] = value
                continue
            try:
                options[option] = TypeAdapter(hint).validate_python(value)
            except ValidationError as error:
                message = error.errors()[0]["msg"]
                problems.append(Problem(f"{at}.{option}", f"{message}, got {value!r}."))
        required = [n for n, (_, p) in accepted.items() if p.default is p.empty and n not in given]
        problems += [
            Problem(f"{at}.{n}", f"{name!r} needs this option, and it is missing.")
            for n in required
        ]
        return options, problems


@functools.cache
def hints_of(target: Callable[..., Any]) -> dict[str, Any]:
    """The annotations of a callable or a class, evaluated once: each costs a compilation."""
    return get_type_hints(target, include_extras=True)


def sections(docstring: str) -> tuple[str, str]:
    """A docstring's text before its first section, and the contents of its section `Args`."""
    body, *titled = SECTION.split(docstring)
    return body.strip(), dict(zip(titled[::2], titled[1::2], strict=True)).get("Args", "")


def type_of(spec: Component | str) -> str:
    """The name of a component; empty when it has none."""
    return spec if isinstance(spec, str) else str(spec.get("type", ""))


def registry_of(hint: Any) -> Registry[Any] | None:
    """The registry a parameter's annotation names, if it stands for a component."""
    if get_origin(hint) is not Annotated:
        return None
    return next((extra for extra in get_args(hint)[1:] if isinstance(extra, Registry)), None)


def suggest(wrong: str, known: Iterable[str]) -> str:
    """The nearest right name as ` (did you mean ...?)`, or nothing.

    Example:
        >>> suggest("stepz", ["steps", "seed"])
        " (did you mean 'steps'?)"
    """
    close = difflib.get_close_matches(wrong, list(known), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""
