"""The loss in models as they are trained: compiled, checkpointed, adapted, tied, bfloat16."""

import copy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from limbeck.losses import DistillationLoss, Head
from tests.library.test_loss_library import plain_loss, texts, tiny, together

close = torch.testing.assert_close
ROOT = Path(__file__).parents[2]
DIVERGENCES = ["forward_kl", "alpha_beta"]  # in closed form, and by autograd in a chunk
over_divergences = pytest.mark.parametrize("divergence", DIVERGENCES)


def distilled(loss, student, teacher, batch):
    """Ours, as the page calls it."""
    with torch.no_grad():
        told = teacher.model(batch["input_ids"]).last_hidden_state
    return loss(
        student.model(batch["input_ids"]).last_hidden_state,
        student.lm_head.weight,
        batch["labels"],
        teacher_hidden=told,
        teacher_head_weight=teacher.lm_head.weight,
    )


def gradients(value, model):
    return torch.autograd.grad(value, [p for p in model.parameters() if p.requires_grad])


def case(divergence):
    loss = DistillationLoss(alpha=0.9, temperature=2.0, divergence=divergence)
    return loss, tiny(1, 2, 8), tiny(2, 2, 16), together(texts(3))


def assert_same(got, expected):
    for a, b in zip(got, expected, strict=True):
        close(a, b)


@over_divergences
def test_the_loss_is_the_same_with_a_compiled_student(divergence):
    torch.compiler.reset()
    loss, student, teacher, batch = case(divergence)
    value = distilled(loss, student, teacher, batch)
    expected = gradients(value, student)
    student.model.compile(backend="aot_eager")
    got = distilled(loss, student, teacher, batch)
    close(got, value)
    assert_same(gradients(got, student), expected)


COMPILED = """
import sys
from tests.library.test_loss_in_models import *

loss, student, teacher, batch = case(sys.argv[1])
value = distilled(loss, student, teacher, batch)
expected = gradients(value, student)
got = distilled(torch.compile(loss, backend="aot_eager"), student, teacher, batch)
close(got, value)
assert_same(gradients(got, student), expected)
"""


@over_divergences
def test_the_loss_is_the_same_when_compiled(divergence):
    """In a process without the tests' run-time shape checks, which no compiler can read."""
    command = [sys.executable, "-c", COMPILED, divergence]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@over_divergences
def test_the_loss_is_the_same_with_activation_checkpointing(divergence):
    loss, student, teacher, batch = case(divergence)
    student.train()
    expected = gradients(distilled(loss, student, teacher, batch), student)
    student.activation_checkpointing_enable()
    assert_same(gradients(distilled(loss, student, teacher, batch), student), expected)


@over_divergences
@pytest.mark.parametrize("reentrant", [True, False])
def test_the_loss_is_the_same_inside_a_checkpointed_region(divergence, reentrant):
    loss, student, teacher, batch = case(divergence)
    hidden = student.model(batch["input_ids"]).last_hidden_state.detach().requires_grad_()
    told = teacher.model(batch["input_ids"]).last_hidden_state.detach()

    def head_loss(hidden, weight):
        heads = {"teacher_hidden": told, "teacher_head_weight": teacher.lm_head.weight}
        return loss(hidden, weight, batch["labels"], **heads)

    leaves = [hidden, student.lm_head.weight]
    head_loss(*leaves).backward()
    expected = [leaf.grad.clone() for leaf in leaves]
    for leaf in leaves:
        leaf.grad = None
    checkpoint(head_loss, *leaves, use_reentrant=reentrant).backward()
    assert_same([leaf.grad for leaf in leaves], expected)


def test_an_adapted_head_trains_its_adapter_alone():
    """The head is frozen; two thin matrices are added to it (LoRA)."""
    loss, student, teacher, batch = case("forward_kl")
    weight = student.lm_head.weight.detach()
    down, up = torch.randn(2, 8, requires_grad=True), torch.randn(40, 2, requires_grad=True)
    hidden = student.model(batch["input_ids"]).last_hidden_state
    told = teacher.model(batch["input_ids"]).last_hidden_state.detach()
    heads = {"teacher_hidden": told, "teacher_head_weight": teacher.lm_head.weight}
    value = loss(hidden, Head(weight + up @ down), batch["labels"], **heads)
    logits, teacher_logits = hidden @ (weight + up @ down).t(), told @ teacher.lm_head.weight.t()
    expected = loss.from_logits(logits, batch["labels"], teacher_logits.detach())
    close(value, expected)
    assert_same(
        torch.autograd.grad(value, [down, up], retain_graph=True),
        torch.autograd.grad(expected, [down, up]),
    )


def test_a_weight_used_as_embedding_and_as_head_gets_both_gradients():
    student, teacher, batch = tiny(1, 1, 8), tiny(2, 2, 16), together(texts(3))
    student.config.tie_word_embeddings = True
    student.lm_head.weight = student.model.embed_tokens.weight
    loss = DistillationLoss(alpha=0.9, temperature=2.0)
    got = gradients(distilled(loss, student, teacher, batch), student)
    assert_same(got, gradients(plain_loss(student, teacher, batch), student))


@over_divergences
def test_bfloat16_models_get_nearly_the_float32_gradients(divergence):
    loss, student, teacher, batch = case(divergence)
    expected = gradients(distilled(loss, student, teacher, batch), student)
    small = copy.deepcopy(student).bfloat16()
    got = gradients(distilled(loss, small, teacher.bfloat16(), batch), small)
    for a, b in zip(got, expected, strict=True):
        assert a.dtype == torch.bfloat16
        assert (a.float() - b).norm() < 0.05 * b.norm()
