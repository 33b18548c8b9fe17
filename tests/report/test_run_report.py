import io
import json
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from limbeck.commands.tables import outcome_table
from limbeck.errors import DataError
from limbeck.report import story
from limbeck.report.run_report import write_report
from limbeck.report.words import TRIALS
from tests.report.example_run import evaluation, write_run

HOSTILE = "<script>alert('x')</script><img src=http://evil.example/a.png onerror=alert(1)>"
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


class Tags(HTMLParser):
    """Every start tag of a page, and whether tags close in order."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in {"meta", "br", "img", "link", "input", "hr"}:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, f"</{tag}> closes something else"


def parsed(page: str) -> Tags:
    found = Tags()
    found.feed(page)
    assert not found.open
    return found


def assert_fetches_and_runs_nothing(page: str) -> None:
    tags = parsed(page).tags
    assert not {tag for tag, _ in tags} & {"script", "iframe", "object", "embed", "link", "base"}
    metas = [attributes for tag, attributes in tags if tag == "meta"]
    assert POLICY in [a.get("content") for a in metas if a.get("http-equiv")]
    for tag, attributes in tags:
        assert not any(name.startswith("on") for name in attributes), (tag, attributes)
        for name in ("src", "href", "xlink:href", "action", "data", "srcset"):
            address = attributes.get(name)
            assert address is None or address.startswith(("#", "data:")), (tag, attributes)
    style = re.sub(r"url\(#[^)]*\)", "", page)
    assert "url(" not in style
    assert "@import" not in style


def rewrite(path: Path, change: Any) -> None:
    tree = json.loads(path.read_text(encoding="utf-8"))
    change(tree)
    path.write_text(json.dumps(tree), encoding="utf-8")


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return write_run(tmp_path / "smollm2-20")


def read(run: Path) -> str:
    path = write_report(run)
    assert path == run / "report.html"
    return path.read_text(encoding="utf-8")


def test_the_page_is_one_file_that_fetches_and_runs_nothing(run: Path) -> None:
    page = read(run)
    assert_fetches_and_runs_nothing(page)
    assert "http://" not in page
    assert "https://" not in page


def test_the_headline_says_what_was_kept_in_plain_words(run: Path) -> None:
    heading = re.search(r"<h1>(.*?)</h1>", read(run), re.DOTALL)
    assert heading is not None
    plain = heading[1].replace("\u202f", " ")
    assert "closed 72 % [70 %, 74 %] of the gap" in plain
    assert "99.1 M parameters, 74 % of the teacher" in plain
    assert "1.36 times as fast" in plain


def test_every_part_of_the_run_is_shown(run: Path) -> None:
    page = read(run)
    for part in ("SmolLM2-135M-Instruct", "heldout.jsonl:88", "·phosphorus", "Rayleigh scattering",
                 "20 of the teacher", "0.774", "[0.747, 0.801]", "keep: 20", "b1c2b1c2",
                 "0.137 [", "19,847 held-out tokens"):  # fmt: skip
        assert part in page, part
    assert page.count("<svg") == 3
    assert page.count('class="kept"') == 20


def test_samples_tasks_and_groups_of_tokens_are_shown_on_page_and_terminal(run: Path) -> None:
    page = read(run).replace("\u202f", " ")
    for part in ("What they write", "Samples after 64", "3.370", "12.2 %", "held_out_choice",
                 "acc, 120 items", "67.5 %", "p &lt; 0.001", "manual.txt", "16-63",
                 "[0.861, 0.961]"):  # fmt: skip
        assert part in page, part
    assert "What to do next" not in page
    change = {"value": -0.2, "low": -0.3, "high": -0.1}
    rewrite(run / "evaluation.json", lambda tree: tree["difference"].update(cross_entropy=change))
    assert "lower objective.alpha" in read(run).partition("What to do next")[2]
    console = Console(width=160, file=io.StringIO(), record=True)
    console.print(outcome_table(evaluation()))
    text = console.export_text()
    for part in ("What they write", "3.370", "held_out_choice", "67.5 %", "p < 0.001"):
        assert part in text, part


def test_probabilities_too_small_to_be_shown_have_no_rows(run: Path) -> None:
    outcomes = [["likely", 0.5], ["tiny", 1e-5], [" fall", 1e-6], ["none", 0.0]]

    def change(tree: Any) -> None:
        tree["disagreements"] = tree["disagreements"][:1]
        tree["disagreements"][0] |= {"teacher": outcomes, "student": outcomes[1:]}

    rewrite(run / "evaluation.json", change)
    page = read(run)
    bars = re.findall(r'<ol class="bars">(.*?)</ol>', page, re.DOTALL)
    tokens = [re.findall(r'class="token">(.*?)<', each) for each in bars]
    assert tokens == [["likely", "·fall"], ["tiny", "·fall"]], "the first and the text's own stay"


def test_the_same_run_gives_the_same_page(run: Path) -> None:
    assert read(run) == read(run)


def hostile_places(tree: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Paths of every string in nested data."""
    if isinstance(tree, str):
        yield path
    children = (
        tree.items()
        if isinstance(tree, dict)
        else enumerate(tree)
        if isinstance(tree, list)
        else ()
    )
    for key, child in children:
        yield from hostile_places(child, (*path, key))


def poison(tree: Any) -> None:
    for *way, last in hostile_places(tree):
        place = tree
        for key in way:
            place = place[key]
        place[last] = HOSTILE


def test_names_samples_and_recipe_are_escaped_wherever_they_stand(run: Path) -> None:
    for name in ("evaluation.json", "provenance.json"):
        rewrite(run / name, poison)
    rewrite(run / "provenance.json", lambda tree: tree.update({HOSTILE: {HOSTILE: HOSTILE}}))
    rewrite(run / "provenance.json", lambda tree: tree["timing"].update({HOSTILE: 3.0}))
    rewrite(run / "evaluation.json", lambda tree: tree["trials"].update({HOSTILE: {}}))
    (run / "recipe.yaml").write_text(f'teacher: {{path: "{HOSTILE}"}}\n</pre>{HOSTILE}')
    page = read(run)
    assert_fetches_and_runs_nothing(page)
    assert "<script" not in page.lower()
    assert "&lt;script&gt;" in page


def test_characters_that_hide_or_reorder_text_are_spelled_out(run: Path) -> None:
    def change(tree: Any) -> None:
        tree["disagreements"][0]["context"] = "a\u202eb\x1bc"

    rewrite(run / "evaluation.json", change)
    page = read(run)
    assert "\u202e" not in page
    assert "a\\u202eb\\x1bc" in page


def test_the_baseline_of_a_grid_is_found_by_its_learning_rate(run: Path) -> None:
    whole = read(run)
    stage = run / "stages" / "cross_entropy"
    stage.rename(stage.with_name("cross_entropy-0.0005"))
    assert read(run).count("Cross-entropy only") < whole.count("Cross-entropy only")
    rewrite(
        run / "evaluation.json", lambda tree: tree.update(learning_rate={"cross_entropy": 5e-4})
    )
    assert read(run) == whole


def test_probability_on_padding_is_shown_where_there_is_any(run: Path) -> None:
    rewrite(run / "evaluation.json", lambda tree: tree.update(padded_mass={"distilled": 0.0}))
    assert "Padded mass" not in read(run)
    rewrite(run / "evaluation.json", lambda tree: tree.update(padded_mass={"distilled": 0.0123}))
    assert "1.2\u202f%" in read(run).partition("Padded mass")[2]


def test_a_run_without_held_out_text_says_so(run: Path) -> None:
    (run / "evaluation.json").unlink()
    page = read(run)
    assert "what it kept is not known" in page
    assert "Comparison with the baselines" not in page
    assert_fetches_and_runs_nothing(page)


def test_only_what_exists_is_shown(run: Path) -> None:
    (run / "evaluation.json").write_text("{}")
    (run / "metrics.jsonl").write_text("")
    (run / "provenance.json").write_text("{}")
    (run / "stages" / "cross_entropy" / "metrics.jsonl").unlink()
    page = read(run)
    for part in (
        "<table",
        "<svg viewBox",
        "How it got there",
        "Provenance",
        "continued",
        "layers,",
    ):
        assert part not in page, part
    assert_fetches_and_runs_nothing(page)


@pytest.mark.parametrize("part", sorted(evaluation()))
def test_every_part_of_the_evaluation_may_be_missing(part: str, run: Path) -> None:
    rewrite(run / "evaluation.json", lambda tree: tree.pop(part))
    assert_fetches_and_runs_nothing(read(run))


@pytest.mark.parametrize("name", ["recipe.yaml", "provenance.json", "metrics.jsonl"])
def test_a_missing_file_is_named(name: str, run: Path) -> None:
    (run / name).unlink()
    with pytest.raises(DataError, match=re.escape(name)):
        write_report(run)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("provenance.json", "{"),
        ("provenance.json", "[]"),
        ("evaluation.json", '{"trials": []}'),
        ("evaluation.json", '{"trials": {"distilled": {"forward_kl": {"value": "far"}}}}'),
        ("evaluation.json", "[" * 100_000),
        ("evaluation.json", '{"suites": {"tasks": {"rows": [{"task": "a"}]}}}'),
        ("evaluation.json", '{"groups": {"distilled": {"position": [{"group": 3}]}}}'),
        ("evaluation.json", '{"disagreements": [{"context": "a"}]}'),
        ("metrics.jsonl", '{"kind": "step"}\n{"kind": \n{"kind": "step"}\n'),
        ("metrics.jsonl", "3\n"),
        ("recipe.yaml", b"\xff\xfe"),
        ("metrics.jsonl", b"\xff\n"),
        ("evaluation.json", b"\xff"),
    ],
)
def test_a_damaged_file_is_named(name: str, text: str | bytes, run: Path) -> None:
    (run / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(DataError, match=re.escape(name)):
        write_report(run)
    assert not (run / "report.html").exists()


def test_an_incomplete_last_line_is_ignored(run: Path) -> None:
    whole = read(run)
    with (run / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"kind": "step", "st')
    assert read(run) == whole


def test_figures_that_are_not_finite_do_not_stop_the_page(run: Path) -> None:
    def change(tree: Any) -> None:
        tree["trials"]["initial"]["perplexity"] = {"value": float("inf"), "low": 1.0, "high": None}
        tree["gap_recovered_percent"]["distilled"]["value"] = float("nan")
        tree["models"]["student"]["tokens_per_second"] = 0.0

    rewrite(run / "evaluation.json", change)
    with (run / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"kind": "step", "step": 401, "loss": NaN}\n{"kind": "step", "step": "x"}\n')
    page = read(run)
    assert "∞" in page
    assert not re.search(r"\bnan\b", page, re.IGNORECASE)
    assert "distilled from its teacher" in page


def test_a_student_farther_from_its_teacher_than_before_is_called_worse(run: Path) -> None:
    def change(tree: Any) -> None:
        tree["gap_recovered_percent"]["distilled"] = {"value": -12.0, "low": -14.0, "high": -10.0}
        tree["difference"]["forward_kl"] = {"value": -0.2, "low": -0.3, "high": -0.1}
        tree["held_out"]["documents"] = 3

    rewrite(run / "evaluation.json", change)
    page = read(run).replace("\u202f", " ")
    assert "ended 12 % [10 %, 14 %] farther from its teacher" in page
    assert "made it worse, by 0.200 [0.100, 0.300] nats a token." in page
    assert "Only 3 held-out documents" in page


def test_a_difference_whose_interval_contains_zero_is_called_chance(run: Path) -> None:
    change = {"value": 0.01, "low": -0.02, "high": 0.03}
    rewrite(run / "evaluation.json", lambda tree: tree["difference"].update(forward_kl=change))
    assert "cannot tell the two apart" in read(run)


def test_a_small_difference_is_shown_with_its_digits(run: Path) -> None:
    change = {"value": 0.00003, "low": 0.00002, "high": 0.00004}
    rewrite(run / "evaluation.json", lambda tree: tree["difference"].update(forward_kl=change))
    assert "0.000030 [0.000020, 0.000040] nats a token nearer" in read(run)


def test_the_table_of_an_outcome_fits_eighty_columns() -> None:
    console = Console(width=80, file=io.StringIO(), record=True)
    console.print(outcome_table(evaluation()))
    table = console.export_text().partition("What they write")[0]
    assert "Before" in table
    assert "…" not in table


def test_the_terminal_has_the_names_and_the_sentences_of_the_report(run: Path) -> None:
    console = Console(width=120, file=io.StringIO(), record=True)
    console.print(outcome_table(evaluation()))
    text = " ".join(console.export_text().split())
    assert "<b>" not in text
    assert "closed 72 % [70 %, 74 %] of the gap between its start and its teacher" in text
    assert "on the same tokens, it closed 67 % [64 %, 69 %]." in text
    page = read(run)
    for trial in evaluation()["trials"]:
        assert TRIALS[trial] in text
        assert TRIALS[trial] in page


@pytest.mark.parametrize(
    ("facts", "is_bound"),
    [
        ({}, False),
        ({"recorded": {"form": {"type": "hidden"}}}, False),
        ({"recorded": {"form": {"type": "top_k", "k": 8}}}, True),
        ({"served": {"k": 64}}, True),
    ],
)
def test_a_page_says_that_divergences_from_a_top_k_are_bounds(
    facts: dict[str, Any], is_bound: bool
) -> None:
    assert [("lower bounds" in line) for line in story.bounds(facts)] == [True] * is_bound
