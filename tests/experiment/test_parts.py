"""The parts of a run: what is drawn at random, and in which numbers a teacher computes."""

import json
import math
from dataclasses import replace

import pytest
import torch

import limbeck
from limbeck.batch import Batch
from limbeck.config import ObjectiveConfig
from limbeck.distributed import World, full_weights, world
from limbeck.errors import ConfigError
from limbeck.experiment.controls import require_controls
from limbeck.experiment.parts import gather_parts
from limbeck.models import facts
from limbeck.models.facts import files_hash
from tests.distributed.processes import on_ranks
from tests.experiment.tiny_run import write_model, write_recipe, write_texts
from tests.tokenizers.small import BEGIN, CHATML, small


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LIMBECK_CACHE", str(tmp_path / "cache"))


def one_process():
    return World(0, 1, torch.device("cpu"))


def test_parameters_of_terms_depend_on_the_seed_only(tmp_path):
    """Else ranks that keep whole copies would each train projectors of their own."""
    parts = gather_parts(limbeck.load(write_recipe(tmp_path)), one_process())
    parts.shapes = replace(parts.shapes, teacher_width=48)
    projected = ObjectiveConfig(extra=({"type": "hidden_state", "weight": 1.0},))
    drawn = []
    for other in (1, 2):
        torch.manual_seed(other)
        objective = parts.distiller(parts.student.model, projected).objective
        drawn.append([p.clone() for p in objective.parameters()])
    assert drawn[0]
    for first, second in zip(*drawn, strict=True):
        assert torch.equal(first, second)


def test_a_sharded_teacher_computes_in_the_format_the_recipe_names(tmp_path):
    path = write_recipe(tmp_path, teacher={"dtype": "bfloat16"})
    with world(torch.device("cpu"), "always") as here:
        parts = gather_parts(limbeck.load(path), here)
        batch = Batch.from_tokens(torch.arange(9)[None])
        distribution = parts.teacher.signal(batch).distribution
        assert distribution.hidden.dtype == torch.bfloat16


def test_dropped_rows_are_reported_once(tmp_path):
    path = write_recipe(tmp_path)
    with (tmp_path / "train.jsonl").open("a") as file:
        file.write('{"text": "a still boils"}\n' * 2 + '{"text": "a"}\n')
    parts = gather_parts(limbeck.load(path, ["data.append_eos=false"]), one_process())
    assert parts.notes == [
        "Left out of 43 training documents: 1 less than two tokens.",
        "1 training document is a duplicate.",
    ]


def test_figures_come_from_documents_spread_over_the_whole_text(tmp_path):
    write_recipe(tmp_path)
    write_texts(tmp_path / "held.jsonl", 40, seed=5)
    limits = ["evaluate.max_tokens=160", "evaluate.max_tokens_during=96"]
    parts = gather_parts(limbeck.load(tmp_path / "recipe.yaml", limits), one_process())
    held_out = parts.held_out
    for rows in (held_out.validation_rows, held_out.test_rows):
        documents = held_out.data.row_documents[rows]
        assert documents.min() < 10
        assert documents.max() >= 30
    deciding, reporting = (
        set(held_out.data.row_documents[rows])
        for rows in (held_out.validation_rows, held_out.test_rows)
    )
    assert not deciding & reporting


STUDENTS = [
    {"type": "depth", "layers": [0, 3]},
    {"type": "copy"},
    {"type": "pretrained", "path": "teacher"},
]


def test_students_that_stay_in_files_until_they_are_sharded_have_the_weights_of_others(tmp_path):
    """The teacher computes in bfloat16: what is copied from it in memory is rounded."""
    path = write_recipe(tmp_path, teacher={"dtype": "bfloat16"})
    for spec in STUDENTS:
        student = {**spec, "path": str(tmp_path / "teacher")} if "path" in spec else spec
        config = limbeck.load(path, [f"student={json.dumps(student)}"])
        wanted = gather_parts(config, one_process()).student
        with world(torch.device("cpu"), "always") as here:
            parts = gather_parts(config, here)
            assert parts.student.layer_map == wanted.layer_map
            for _ in range(2):  # every trial begins with the same
                model = parts.take_student(tmp_path / "none")
                assert {p.device.type for p in model.parameters()} == {"meta"}
                parts.distiller(model, config.objective)
                weights = full_weights(model.hf_model, here)
                for name, value in wanted.model.hf_model.state_dict().items():
                    assert torch.equal(weights[name], value), name


def hashed_by_rank_0(world, path, student, noted):
    calls = []

    def counted(name, folder):
        calls.append(name)
        return files_hash(name, folder)

    facts.files_hash = counted  # of this process, which ends with the test
    parts = gather_parts(limbeck.load(path, [f"student={json.dumps(student)}"]), world)
    assert bool(calls) == world.is_main
    assert len(parts.teacher.info.weights_sha256) == 64
    notes = [note for note in parts.notes if note.startswith(("teacher: every", "student: every"))]
    assert len(notes) == noted
    assert not noted or "because a depth student is made from its weights" in notes[0]


@pytest.mark.parametrize(
    ("student", "noted"),
    [
        ({"type": "depth", "layers": [0, 3]}, 0),
        ({"type": "depth", "keep": 3, "by": "block_influence"}, 1),
    ],
)
def test_rank_0_hashes_for_all_and_a_whole_load_is_noted(student, noted, tmp_path):
    on_ranks(2, hashed_by_rank_0, write_recipe(tmp_path), student, noted)


def test_a_detected_type_and_skipped_rows_are_told(tmp_path):
    path = write_recipe(tmp_path)
    with (tmp_path / "train.jsonl").open("a") as file:
        file.write('{"text": ""}\n')
    options = ["data.type=auto", "data.bad_rows=skip"]
    parts = gather_parts(limbeck.load(path, options), one_process())
    train, held = tmp_path / "train.jsonl", tmp_path / "held.jsonl"
    assert parts.notes == [
        f"{train} is read as plain text.",
        f"{held} is read as plain text.",
        f"1 rows of {train} cannot be read and are left out, 40 are used; the first: "
        "train.jsonl:41: column 'text' must hold text, got ''.",
    ]
    assert parts.facts["data"]["bad_rows"]["skipped"] == 1


def test_epochs_become_the_steps_that_read_every_row(tmp_path):
    path = write_recipe(tmp_path)
    options = ["optim.steps=null", "optim.warmup_steps=0.1"]
    parts = {}
    for epochs in (0.01, 1, 2.5):
        config = limbeck.load(path, [*options, f"optim.epochs={epochs}"])
        parts[epochs] = gather_parts(config, one_process())
    rows = parts[1].data.num_rows
    steps = {epochs: each.config.optim.num_steps for epochs, each in parts.items()}
    assert steps == {0.01: 1, 1: math.ceil(rows / 4), 2.5: math.ceil(2.5 * rows / 4)}
    assert parts[2.5].config.optim.epochs is None
    assert parts[2.5].config.optim.num_warmup_steps == math.floor(0.1 * steps[2.5])
    assert parts[2.5].notes == [
        f"optim.epochs: 2.5 passes over {rows} rows, 4 a step, are {steps[2.5]} steps."
    ]
    one_step = ["optim.steps=null", "optim.epochs=.01", "optim.warmup_steps=1"]
    with pytest.raises(ConfigError, match=r"must be less than optim\.steps = 1, got 1"):
        gather_parts(limbeck.load(path, one_step), one_process())


def test_a_base_student_of_an_instruct_teacher_needs_the_teachers_tokenizer(tmp_path):
    path = write_recipe(tmp_path)
    small(template=CHATML).save_pretrained(tmp_path / "teacher")
    base = write_model(tmp_path / "base", rows=len(small()), layers=2, seed=1)
    small(end=BEGIN).save_pretrained(base)
    turns = [{"from": "human", "value": "What boils?"}, {"from": "gpt", "value": "A still."}]
    for name in ("train", "held"):
        line = json.dumps({"conversations": turns})
        (tmp_path / f"{name}.jsonl").write_text(f"{line}\n" * 8)
    options = ["data.type=auto", f"student={{type: pretrained, path: {base}}}"]
    with pytest.raises(ConfigError, match=r"must end a text .* tokenizer: teacher\}"):
        gather_parts(limbeck.load(path, options), one_process())
    parts = gather_parts(limbeck.load(path, [*options, "student.tokenizer=teacher"]), one_process())
    end = small().eos_token_id
    assert parts.student.model.config.eos_token_id == end
    targets = parts.data.batch([0])
    assert int(targets.target_ids[0][targets.scored[0]][-1]) == end
    assert parts.vocabulary.notes == ()


def test_a_shuffled_control_needs_two_rows_of_each_step_on_every_rank(tmp_path):
    path = write_recipe(
        tmp_path, evaluate={"controls": ["shuffled"]}, optim={"tokens_per_step": 96}
    )
    parts = gather_parts(limbeck.load(path), one_process())
    require_controls(parts)
    parts.world = World(1, 2, torch.device("cpu"))
    with pytest.raises(ConfigError, match=r"the 3 rows of a step .* leave a rank of 2 with fewer"):
        require_controls(parts)
