"""Whatever a recipe holds, it is read, or refused with a message; never a traceback."""

import copy
import json
import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from limbeck.errors import ConfigError, DataError
from limbeck.experiment import load
from limbeck.experiment.loading import OPEN_PARTS
from limbeck.experiment.stages import load_stages

EXAMPLES = int(os.environ.get("RANDOM_RECIPES", "150"))
GOOD = {
    "teacher": {"type": "online", "path": "some/teacher", "dtype": "float32"},
    "student": {"type": "depth", "keep": 12},
    "data": {
        "type": "text",
        "path": "data.jsonl",
        "sequence_length": 1024,
        "columns": {"text": "t"},
    },
    "optim": {"learning_rate": 3e-4, "steps": 1000, "schedule": "cosine", "warmup_steps": 5},
    "output": "runs/x",
    "objective": {
        "alpha": 1,
        "divergence": "reverse_kl",
        "extra": [{"type": "hidden_state", "weight": 1}],
    },
    "evaluate": {"data": "held.jsonl", "suites": [{"type": "generation"}]},
    "memory": {"micro_batch": "auto"},
    "checkpoint": {"every": 10, "asynchronous": True},
    "parallel": {"replicate": 1},
    "trainable": {"lora": {"rank": 4}},
    "record": {"output": "store", "form": {"type": "top_k", "k": 4}, "layers": [0, 1]},
    "write": {"output": "a.jsonl", "filters": ["length"]},
    "export": ["gguf", {"type": "onnx"}],
    "track": ["tensorboard"],
    "stages": [{"name": "a"}, {"name": "b", "teacher": {"path": "stage:a"}}],
}
MIXED = {
    **{key: value for key, value in GOOD.items() if key != "write"},
    "data": {"mix": [{"name": "a", "path": "a.jsonl", "weight": 1}, {"name": "b", "path": "b"}]},
}
ROLLOUTS = {**GOOD, "rollout": {"tokens": 16}, "data": {"type": "chat", "path": "c.jsonl"}}
NAMES = [name for registry in OPEN_PARTS.values() for name in registry.names()]
OPTIONS = sorted({o for r in OPEN_PARTS.values() for name in r.names() for o in r.options(name)})
FIELDS = sorted({name for part in GOOD.values() if isinstance(part, dict) for name in part})
KEYS = st.sampled_from([*GOOD, *FIELDS, *OPTIONS])
ODD = st.one_of(
    st.sampled_from(["", " ", "auto", "null", "~", "yes", "2e-5", "08", "\0", "é\u2028", "a.b"]),
    st.sampled_from(["${a}", "${oc.env:HOME}", "[", "]", "{type: x}", "[0]", "stage:a", "../.."]),
    st.sampled_from(["~nobody/x", "???", "1_000", "0x1f", "!!int 3", "-1", "1e400", "\ud7ff"]),
    st.sampled_from(["x" * 300, "type", "*a", "&a", "# no", "%", "@", "`", "a: b", "<<", "nan"]),
)
NUMBERS = st.one_of(
    st.integers(-3, 3), st.integers(-(10**30), 10**30), st.floats(), st.booleans(), st.none()
)
VALUES = st.recursive(
    st.one_of(NUMBERS, ODD, st.text(max_size=5)),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(st.one_of(KEYS, ODD, st.just("type")), inner, max_size=3),
    ),
    max_leaves=6,
)
TEXTS = st.sampled_from(
    (
        *("a: &x [1]\nb: *x\n", "seed: 1\nseed: 2\n", "? [1, 2]\n: 3\n", "<<: {seed: 1}\n"),
        *("1: 2\n", "---\na: 1\n---\nb: 2\n", "!!set {a}\n", "d: 2001-01-01\n", "null: 1\n"),
        *("true: 1\n", "\t", "b: !!binary aGk=\n", "[" * 3000, "{a: " * 400, "x: |\n  a\n"),
        *("o: !!omap [a: 1]\n", "\x07", "&a [*a]\n", "a: &a {b: *a}\n", "1.5: {2: 3}\n"),
        *("seed: 12:30:45\n", "%YAML 9.9\n---\na: 1"),
    )
)


def places(tree, at=()):
    """The path of every value in nested mappings and lists."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree)
    for key, value in items:
        yield (*at, key)
        if isinstance(value, dict | list):
            yield from places(value, (*at, key))


@st.composite
def components(draw):
    """A registered component with options of any component, and any values."""
    options = draw(st.dictionaries(st.sampled_from(OPTIONS), VALUES, max_size=3))
    return {"type": draw(st.sampled_from(NAMES))} | options


@st.composite
def trees(draw):
    """A valid recipe with some of its values dropped, replaced, added or nested."""
    tree = copy.deepcopy(draw(st.sampled_from([GOOD, MIXED, ROLLOUTS])))
    if draw(st.booleans()):
        del tree["stages"]
    for name in draw(st.lists(st.sampled_from(sorted(tree)), max_size=2)):
        tree.pop(name, None)
    for _ in range(draw(st.integers(0, 3))):
        *way, last = draw(st.sampled_from([*places(tree)]))
        parent = tree
        for part in way:
            parent = parent[part]
        match draw(st.sampled_from(["drop", "replace", "component", "add", "nest"])):
            case "drop" if way:
                del parent[last]
            case "replace":
                parent[last] = draw(VALUES)
            case "component":
                parent[last] = draw(components())
            case "add" if isinstance(parent, dict):
                parent[draw(st.one_of(KEYS, ODD))] = draw(VALUES)
            case "nest":
                for _ in range(draw(st.sampled_from([1, 5, 200]))):
                    parent[last] = [parent[last]]
    return tree


OVERRIDE = st.one_of(
    st.tuples(KEYS, KEYS, st.one_of(NUMBERS, ODD)).map(lambda e: f"{e[0]}.{e[1]}={e[2]}"),
    st.tuples(st.one_of(KEYS, ODD), ODD).map("=".join),
    ODD,
)


@st.composite
def recipes(draw):
    """The text of a recipe and its overrides; most are YAML, of which most have a mistake."""
    overrides = [draw(OVERRIDE)] if draw(st.integers(0, 4)) == 0 else []
    kind = draw(st.integers(0, 11))
    if kind == 0:
        return draw(st.text(max_size=30)), overrides
    if kind == 1:
        return draw(TEXTS), overrides
    tree = draw(trees())
    text = "".join(f"{json.dumps(key)}: {json.dumps(value)}\n" for key, value in tree.items())
    if kind == 2:
        return text + draw(TEXTS), overrides
    if kind == 3:
        place = draw(st.integers(0, len(text)))
        return text[:place] + draw(ODD) + text[place:], overrides
    return text, overrides


def answered(text: str, overrides: list[str], folder: Path) -> None:
    """Read a recipe as `limbeck distill` does before it opens a model."""
    path = folder / "recipe.yaml"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    try:
        load_stages(path, overrides) or load(path, overrides)
    except (ConfigError, DataError) as error:
        assert str(error).strip()  # noqa: PT017  (a recipe may be valid)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("recipes")


@pytest.mark.parametrize("recipe", [GOOD, MIXED, ROLLOUTS], ids=["one", "mixed", "rollouts"])
def test_the_recipes_that_are_changed_are_valid(recipe, tmp_path):
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    assert load_stages(tmp_path / "recipe.yaml")


@settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck))
@given(recipe=recipes())
def test_any_recipe_is_read_or_refused_with_a_message(recipe, folder):
    answered(*recipe, folder)
