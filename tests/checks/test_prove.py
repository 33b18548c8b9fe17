"""Every proof holds on a sound pair, and fails by its name when one thing is broken."""

import dataclasses

import pytest
import torch

from limbeck.checks import Proof, prove
from limbeck.checks.case import view
from limbeck.checks.micro_batches import micro_batches_add_up
from limbeck.checks.models import documents_proof
from limbeck.checks.objective import (
    evaluate,
    finite_differences,
    fused_against_plain,
    zero_at_equality,
)
from limbeck.checks.proof import Unproven
from limbeck.losses import Head, Softcap
from limbeck.losses.divergences import divergences
from limbeck.losses.divergences.kl import forward_kl
from limbeck.losses.head import closed_form, fused
from tests.checks.cases import RandomRows, tiny_case, weights_of
from tests.models.tiny import tiny_model

FAMILIES = ("llama", "qwen3", "gemma2", "gpt2", "granite")
CONSTANT_WEIGHTS = {"adaptive_kl", "lk_kl", "todi"}


def failing(case):
    return {f.name for f in prove(case) if isinstance(f, Proof) and f.fails}


@pytest.mark.parametrize("family", FAMILIES)
def test_everything_holds_on_a_sound_pair(family):
    findings = list(prove(tiny_case(family=family)))
    assert len(findings) == 13
    assert [f for f in findings if isinstance(f, Unproven) or f.fails] == []


@pytest.mark.parametrize("name", divergences.names())
@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_every_divergence_is_zero_at_the_teacher_and_has_a_true_gradient(name, temperature):
    case = tiny_case(divergence=name, temperature=temperature)
    findings = {f.name: f for f in prove(case)}
    slope = findings.pop("gradient equals finite differences")
    assert isinstance(slope, Unproven) == (name in CONSTANT_WEIGHTS)
    held = [f for f in findings.values() if isinstance(f, Proof) and f.decides]
    assert all(f.holds for f in held), [f for f in held if not f.holds]


STATE_TERMS = (
    {"type": "hidden_state", "weight": 0.5},
    {"type": "relations", "weight": 0.5},
    {"type": "cka", "weight": 0.5},
    {"type": "attention_relations", "weight": 0.5, "heads": 2},
)


@pytest.mark.parametrize("term", STATE_TERMS, ids=lambda term: term["type"])
def test_terms_on_hidden_states_and_projectors_are_checked(term):
    student = tiny_model("llama", 2, seed=2, width=16)
    assert failing(tiny_case(student=student, extra=(term,))) == set()


def test_terms_on_the_likelihood_of_the_text_are_checked():
    assert failing(tiny_case(extra=({"type": "alm", "weight": 0.5},))) == set()
    sampled = {"type": "sampled_reverse_kl", "weight": 0.5}
    findings = list(prove(tiny_case(alpha=1.0, temperature=1.0, divergence=None, extra=(sampled,))))
    assert [f for f in findings if isinstance(f, Proof) and f.fails] == []
    assert {f.name for f in findings if isinstance(f, Unproven)} == {
        "student = teacher gives 0",
        "gradient equals finite differences",
    }


def test_token_weights_are_checked():
    case = dataclasses.replace(tiny_case(), data=RandomRows(weighted=True))
    batch = case.sample()
    views = view(case, batch)
    weights = views.student.token_weights
    assert weights is not None
    plain = dataclasses.replace(
        views, student=dataclasses.replace(views.student, token_weights=None)
    )
    objective = case.distiller.objective
    weighted, unweighted = (evaluate(objective, v.student, v.signal) for v in (views, plain))
    assert float(weighted.loss) != pytest.approx(float(unweighted.loss), rel=1e-3)
    assert failing(case) == set()
    for i in range(len(batch)):
        assert torch.equal(batch.part(slice(i, i + 1)).weights, batch.weights[i : i + 1])


def test_a_fused_path_that_ignores_token_weights_fails(monkeypatch):
    case = dataclasses.replace(tiny_case(), data=RandomRows(weighted=True))
    views = view(case, case.sample())
    monkeypatch.setattr(
        closed_form.ClosedForm, "_rows", without_weights(closed_form.ClosedForm._rows)
    )
    assert not fused_against_plain(case, views).holds


def without_weights(rows):
    def ignoring(self, logits, room, teacher, targets, weights, wants_gradient):
        return rows(self, logits, room, teacher, targets, None, wants_gradient)

    return ignoring


@pytest.mark.parametrize("chosen", ["teacher_entropy", "student_entropy"])
def test_a_recipe_with_chosen_positions_passes(chosen):
    findings = {f.name: f for f in prove(tiny_case(positions={"type": chosen, "share": 0.3}))}
    assert isinstance(findings.pop("micro-batches add up"), Unproven)
    assert [f for f in findings.values() if isinstance(f, Unproven) or f.fails] == []


def test_without_a_divergence_the_zero_check_is_skipped():
    findings = {f.name: f for f in prove(tiny_case(alpha=0.0))}
    assert isinstance(findings["student = teacher gives 0"], Unproven)
    assert findings["fused equals plain logits"].holds


@pytest.mark.parametrize("who", ["teacher", "student"])
def test_a_head_that_is_not_the_models_own_fails_by_name(who):
    case = tiny_case()
    dict(case.models)[who]._transform = Softcap(1.0)
    assert f"head of the {who}" in failing(case)


def test_a_head_with_one_row_scaled_fails_by_name(monkeypatch):
    case = tiny_case()
    own = case.student.head

    def scaled(model):
        weight = own.weight.clone()
        weight[3] *= 1.01
        return Head(weight, own.bias, own.transform)

    monkeypatch.setattr(type(case.student), "head", property(scaled))
    assert "head of the student" in failing(case)


def test_documents_that_see_each_other_fail():
    case = tiny_case()
    decoder = case.student.decoder

    def one_piece(module, args, options):
        length = options["input_ids"].shape[1]
        alone = {"position_ids": torch.arange(length)[None], "attention_mask": None}
        return args, {**options, **alone}

    decoder.register_forward_pre_hook(one_piece, with_kwargs=True)
    proof = documents_proof("student", case.student, case.sample())
    assert proof.fails
    assert "documents apart in the student" in proof.name


def test_a_divergence_that_is_not_zero_at_equality_fails_by_name():
    case = tiny_case()
    term = case.distiller.objective.logit_terms["divergence"]
    term.gradient = None
    term.divergence = lambda student, teacher: forward_kl(student, teacher) + 1e-3
    proof = zero_at_equality(case, view(case, case.sample()))
    assert proof.fails
    assert "student = teacher gives 0" in failing(case)


def test_a_divergence_with_a_gradient_at_equality_fails():
    case = tiny_case()
    term = case.distiller.objective.logit_terms["divergence"]
    term.gradient = None
    term.divergence = lambda student, teacher: (
        forward_kl(student, teacher) + (1e-3 * (student - student.detach())[:, 0])
    )
    assert zero_at_equality(case, view(case, case.sample())).fails


@pytest.mark.parametrize("what", ["hidden", "weight"])
def test_a_fused_path_with_a_wrong_gradient_fails_by_name(monkeypatch, what):
    case = tiny_case()
    right = fused.Gradients.add

    def wrong(self, gradient, rows, weight, window):
        right(self, gradient, rows, weight, window)
        if getattr(self, what) is not None and window.start == 0:
            getattr(self, what).mul_(1.001)

    monkeypatch.setattr(fused.Gradients, "add", wrong)
    found = failing(case)
    assert "fused equals plain logits" in found
    assert ("gradient equals finite differences" in found) == (what == "hidden")


def test_a_gradient_of_another_divergence_fails():
    case = tiny_case()
    term = case.distiller.objective.logit_terms["divergence"]
    right = term.gradient
    assert right is not None

    def wrong(outcomes):
        value = right(outcomes=outcomes)
        outcomes.teacher_prob[:, 0] *= 1.01
        return value

    term.gradient = wrong
    found = failing(case)
    assert {"fused equals plain logits", "gradient equals finite differences"} <= found


def test_a_forgotten_squared_temperature_fails():
    case = tiny_case(temperature=2.0)
    objective = case.distiller.objective
    objective.weights["divergence"] /= 4
    assert fused_against_plain(case, view(case, case.sample())).fails


def test_a_loss_whose_gradient_belongs_to_another_fails_finite_differences():
    case = tiny_case()
    views = view(case, case.sample())
    assert finite_differences(case, views).holds
    frozen = dataclasses.replace(case, recipe=dataclasses.replace(case.recipe, temperature=1.0))
    term = case.distiller.objective.logit_terms["divergence"]
    term.gradient = None
    right = term.divergence
    term.divergence = lambda student, teacher: (
        right(student, teacher) + (student - student.detach()).sum(-1)
    )
    assert finite_differences(frozen, views).fails


def test_a_mean_of_means_fails(monkeypatch):
    case = tiny_case()
    forward = type(case.distiller).forward

    def own_mean(self, batch, signal, step_tokens):
        return forward(self, batch, signal, 4 * batch.num_scored())

    monkeypatch.setattr(type(case.distiller), "forward", own_mean)
    proof = micro_batches_add_up(case, case.sample(), torch.float32)
    assert proof.fails
    assert proof.name == "micro-batches add up"


def test_with_one_row_the_micro_batch_check_is_skipped():
    case = tiny_case()
    case.data.num_rows = 1
    assert isinstance(micro_batches_add_up(case, case.sample(), torch.float32), Unproven)


def test_probability_on_padded_rows_refuses_a_teacher_and_warns_of_a_student():
    findings = {f.name: f for f in prove(tiny_case(vocabulary=80))}
    assert findings["padded rows of the teacher"].fails
    student = findings["padded rows of the student"]
    assert not student.holds
    assert not student.fails
    assert "16 padded" in findings["vocabulary"].found


def test_a_text_with_ids_beyond_the_vocabulary_fails():
    foreign = dataclasses.replace(tiny_case(vocabulary=80), largest_token_id=80)
    proof = next(iter(prove(foreign)))
    assert proof.name == "vocabulary"
    assert proof.fails


def test_a_student_with_the_teachers_weights_gets_a_warning_only():
    case = tiny_case(teacher=tiny_model("llama", 2, seed=5), student=tiny_model("llama", 2, seed=5))
    findings = {f.name: f for f in prove(case)}
    for name in ("student differs from the teacher", "teacher reads the text better"):
        assert not findings[name].holds
        assert not findings[name].fails


def test_proofs_change_no_weight_and_no_mode():
    case = tiny_case()
    case.distiller.train()
    before = weights_of(case.distiller)
    list(prove(case))
    assert all(map(torch.equal, before, weights_of(case.distiller)))
    assert case.distiller.training
    assert not any(p.grad is not None for p in case.distiller.parameters())


def test_half_precision_teachers_keep_their_tolerance():
    teacher = tiny_model("llama", 3, seed=1)
    teacher.to(torch.bfloat16)
    assert failing(tiny_case(teacher=teacher)) == set()
