"""`limbeck check` on folders, from the command line's end."""

import json
from io import StringIO

import pytest
import typer
from rich.console import Console
from typer.testing import CliRunner

from limbeck.checks import prove
from limbeck.commands import check as module
from limbeck.commands.check import check, findings_table
from limbeck.errors import ConfigError
from limbeck.losses import Softcap
from tests.checks.cases import tiny_case
from tests.experiment.tiny_run import write_model, write_recipe
from tests.teachers.test_cross_tokenizer import write_pair
from tests.tokenizers.small import small

TEMPLATE = (
    "{% for m in messages %}<|turn|>{{ m['role'] }}: "
    "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}<|end|>"
    "{% endgeneration %}{% else %}{{ m['content'] }}<|end|>{% endif %}{% endfor %}"
)
EVALUATE = "evaluate.data=null"


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LIMBECK_CACHE", str(tmp_path / "cache"))


def run(*arguments, fails=False):
    app = typer.Typer()
    app.command()(check)
    result = CliRunner().invoke(app, [str(a) for a in arguments], env={"COLUMNS": "200"})
    if not fails:
        assert result.exit_code == 0, (result.output, result.exception)
        return result.stdout
    assert isinstance(result.exception, ConfigError), result.exception
    assert result.exception.exit_code == 2
    return result.stdout, str(result.exception)


def test_a_valid_recipe_is_checked_and_planned_and_nothing_is_written(tmp_path):
    told = run(write_recipe(tmp_path))
    for words in (
        "head of the teacher",
        "documents apart in the student",
        "student = teacher gives 0",
        "gradient equals finite differences",
        "fused equals plain logits",
        "micro-batches add up",
        "The plan (estimates)",
        "scored tokens a second",
        "trained tokens in green",
    ):
        assert words in told
    assert "FAILS" not in told
    assert not (tmp_path / "run").exists()


def test_json_holds_every_proof_and_only_json_goes_to_stdout(tmp_path):
    told = json.loads(run(write_recipe(tmp_path), "--json"))
    assert told["holds"] is True
    names = [proof["name"] for proof in told["proofs"]]
    assert len(names) == len(set(names)) == 15
    assert told["unproven"] == []
    assert told["plan"]["micro_batches_per_step"] == 2
    assert told["plan"]["students"] == 1
    assert "".join(s["text"] for s in told["example"])
    assert any(s["scored"] for s in told["example"])


def test_what_holds_is_told_in_few_lines_and_what_does_not_with_its_meaning():
    found = list(prove(tiny_case()))
    assert [f.name for f in found if not f.holds] == ["teacher reads the text better"]
    console = Console(width=80, file=StringIO())
    console.print(findings_table(found))
    text = console.file.getvalue()
    assert text.count("\n") <= 46, "with the meaning of all it would be 75"
    told = " ".join(text.split())
    assert "a better student may get worse" in told
    assert found[0].meaning not in told


def test_overrides_reach_the_proofs(tmp_path):
    told = json.loads(run(write_recipe(tmp_path), "objective.alpha=0", "--json"))
    assert [u["name"] for u in told["unproven"]] == ["student = teacher gives 0"]


def test_a_failed_check_is_named_and_exits_with_2(tmp_path, monkeypatch):
    from limbeck.experiment import run as recipe_run

    gather = recipe_run.gather_parts

    def corrupted(config, world):
        parts = gather(config, world)
        parts.student.model._transform = Softcap(0.5)
        return parts

    monkeypatch.setattr(recipe_run, "gather_parts", corrupted)
    told, error = run(write_recipe(tmp_path), "--json", fails=True)
    assert "head of the student" in error
    assert json.loads(told)["holds"] is False
    table, _ = run(write_recipe(tmp_path), fails=True)
    assert "FAILS" in table


def test_a_teachers_probability_on_padded_rows_is_refused(tmp_path):
    write_recipe(tmp_path)
    write_model(tmp_path / "padded", rows=len(small()) + 64, seed=3)
    recipe = write_recipe(tmp_path, teacher={"path": str(tmp_path / "padded")})
    _, error = run(recipe, fails=True)
    assert "padded rows of the teacher" in error


def test_a_student_equal_to_its_teacher_gets_a_note_and_may_run(tmp_path):
    recipe = write_recipe(tmp_path, student={"type": "depth", "layers": [0, 1, 2, 3]})
    told = json.loads(run(recipe, "--json"))
    same = next(p for p in told["proofs"] if p["name"] == "student differs from the teacher")
    assert same["holds"] is False
    assert "the same weights" in same["found"]


def test_a_chat_shows_which_tokens_are_scored(tmp_path):
    recipe = write_recipe(tmp_path)
    tokenizer = small(template=TEMPLATE)
    tokenizer.save_pretrained(tmp_path / "teacher")
    turns = [{"role": "user", "content": "a cat"}, {"role": "assistant", "content": "the mat"}]
    rows = [json.dumps({"messages": turns})] * 6
    (tmp_path / "chats.jsonl").write_text("\n".join(rows))
    told = json.loads(
        run(recipe, "data.type=chat", f"data.path={tmp_path / 'chats.jsonl'}", EVALUATE, "--json")
    )
    learnt = "".join(s["text"] for s in told["example"] if s["scored"])
    read = "".join(s["text"] for s in told["example"] if not s["scored"])
    assert "the mat" in learnt
    assert "a cat" not in learnt
    assert "a cat" in read
    assert any("chat template" in note for note in told["notes"])
    assert any("5 training documents are duplicates" in note for note in told["notes"])


def test_the_schema_needs_no_recipe():
    schema = json.loads(run("--schema"))
    assert "objective" in schema["properties"]


def test_no_recipe_is_a_mistake_of_usage():
    _, error = run(fails=True)
    assert "limbeck check recipe.yaml" in error


def test_a_wrong_recipe_is_listed_before_anything_loads(tmp_path):
    _, error = run(write_recipe(tmp_path), "objective.alpha=1.4", "optim.stepz=3", fails=True)
    assert "objective.alpha: must be between 0 and 1" in error
    assert "optim.stepz" in error


def test_the_module_exports_its_command():
    assert vars(module)["check"] is check


def test_adapters_are_checked_and_planned_as_they_are_trained(tmp_path):
    lora = "trainable.lora={rank: 2, targets: [q_proj, lm_head]}"
    told = json.loads(run(write_recipe(tmp_path), "--json", EVALUATE, lora))
    assert told["holds"]
    proofs = {proof["name"]: proof for proof in told["proofs"]}
    assert "gradient 0.0e+00" not in proofs["micro-batches add up"]["found"]
    plan = told["plan"]
    assert 0 < plan["trained_parameters"] < plan["parameters"]["student"] / 4
    assert plan["memory_bytes"]["gradients"] == 4 * plan["trained_parameters"]


def test_weights_that_are_shared_are_planned_once(tmp_path):
    overrides = ("student={type: shared}", "trainable.lora={rank: 2}", EVALUATE)
    told = json.loads(run(write_recipe(tmp_path), "--json", *overrides))
    assert told["holds"]
    plan = told["plan"]
    assert plan["memory_bytes"]["student"] == 4 * plan["trained_parameters"]
    assert plan["disk"]["checkpoint_bytes"] == 12 * plan["trained_parameters"]
    (same,) = [p for p in told["proofs"] if p["name"] == "student differs from the teacher"]
    assert same["found"].startswith("the same weights")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_pair_with_two_tokenizers_skips_the_checks_that_need_one(tmp_path, dtype):
    path = write_pair(tmp_path)
    compute = f"parallel.compute_dtype={dtype}"
    told = run(path, "objective.extra=[{type: alm, weight: 0.1}]", EVALUATE, compute)
    for words in (
        "head of the teacher",
        "documents apart in the student",
        "both tokenizers stand at one byte",
        "micro-batches add up",
        "Coverage of the student's tokens",
        "Coverage of the teacher's tokens",
        "The plan (estimates)",
    ):
        assert words in told
    assert "FAILS" not in told
    assert "not proven" in told
