"""The page on the loss, run as it stands, against plain full logits."""

import copy
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, TrainingArguments

from limbeck.errors import ConfigError
from limbeck.losses import DistillationLoss, Head
from limbeck.losses.divergences import divergences
from limbeck.losses.head.fused import multiply

PAGE = (Path(__file__).parents[2] / "docs" / "loss-library.md").read_text()
LOOP, HEAD, ACCUMULATION, TRAINER, TRL, OBJECTIVE = re.findall(
    r"```python\n(.*?)```", PAGE, re.DOTALL
)
VOCABULARY, LENGTH = 40, 12
close = torch.testing.assert_close


def tiny(seed: int, layers: int, width: int, vocabulary: int = VOCABULARY) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=2,
        max_position_embeddings=32,
        initializer_range=0.3,
    )
    return LlamaForCausalLM(config)


def texts(rows: int) -> list[dict[str, torch.Tensor]]:
    """Rows whose beginnings are not scored, each of another length."""
    made = []
    for row in range(rows):
        ids = torch.randint(VOCABULARY, (LENGTH,))
        labels = ids.clone()
        labels[: 2 + row] = -100
        made.append({"input_ids": ids, "labels": labels})
    return made


def together(rows: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    return {key: torch.stack([row[key] for row in rows]) for key in rows[0]}


def plain_loss(student, teacher, batch, alpha=0.9, temperature=2.0) -> torch.Tensor:
    """The formula on full logits, spelt out."""
    logits = student(batch["input_ids"]).logits[:, :-1]
    with torch.no_grad():
        teacher_logits = teacher(batch["input_ids"]).logits[:, :-1]
    targets = batch["labels"][:, 1:]
    scored = targets != -100
    logits, teacher_logits, targets = logits[scored], teacher_logits[scored], targets[scored]
    p, q = ((x / temperature).log_softmax(-1) for x in (teacher_logits, logits))
    kl = (p.exp() * (p - q)).sum(-1).mean()
    hard = torch.nn.functional.cross_entropy(logits, targets)
    return alpha * temperature**2 * kl + (1 - alpha) * hard


def train_plainly(student, teacher, steps, optimizer) -> None:
    for batch in steps:
        plain_loss(student, teacher, batch).backward()
        optimizer.step()
        optimizer.zero_grad()


def assert_same_weights(one, other) -> None:
    for (name, a), (_, b) in zip(one.named_parameters(), other.named_parameters(), strict=True):
        close(a, b, msg=lambda text, name=name: f"{name}: {text}")


def test_the_plain_loop_and_its_accumulation_train_as_full_logits_do():
    student, teacher = tiny(1, 1, 8), tiny(2, 2, 16)
    other, rows = copy.deepcopy(student), texts(6)
    first, second = together(rows[:3]), together(rows[3:])
    accumulated = [together(rows[:1]), together(rows[4:])]
    space = {"student": student, "teacher": teacher, "batches": [first, second]}
    space["more"] = iter(accumulated)
    exec(LOOP, space)
    exec(HEAD, space)
    exec(ACCUMULATION, space)
    optimizer = torch.optim.AdamW(other.parameters(), lr=1e-4)
    train_plainly(other, teacher, [first, second, together([rows[0], *rows[4:]])], optimizer)
    assert_same_weights(student, other)
    assert any(
        not torch.equal(a, b)
        for a, b in zip(tiny(1, 1, 8).parameters(), student.parameters(), strict=True)
    )


def test_the_pages_own_objective_trains_as_its_formula():
    """A recorded teacher, a weight that grows, token weights, half of the positions; two steps."""
    student, teacher, rows = tiny(1, 1, 8), tiny(2, 2, 16), texts(6)
    other, first_step = copy.deepcopy(student), 40
    batches = [together(rows[:3]), together(rows[3:])]
    for batch in batches:
        batch["weights"] = torch.rand(batch["labels"][:, 1:].shape)
    space = {"student": student, "teacher": teacher, "batches": batches, "first_step": first_step}
    exec(OBJECTIVE, space | {"optimizer": torch.optim.SGD(student.parameters(), lr=0.5)})
    optimizer = torch.optim.SGD(other.parameters(), lr=0.5)
    for step, batch in enumerate(batches, start=first_step):
        scored = batch["labels"][:, 1:] != -100
        targets, weights = batch["labels"][:, 1:][scored], batch["weights"][scored]
        logits = other(batch["input_ids"]).logits[:, :-1][scored]
        with torch.no_grad():
            teacher_logits = teacher(batch["input_ids"]).logits[:, :-1][scored]
        p = (teacher_logits / 2).softmax(-1)
        kept = p.topk(8).indices
        p, q = (
            torch.cat([each.gather(-1, kept), 1 - each.gather(-1, kept).sum(-1, True)], -1)
            for each in (p, (logits / 2).softmax(-1))
        )
        chosen = (-(p * p.log()).sum(-1)).topk(-(-len(targets) // 2)).indices
        soft = 4 * (q * (q / p).log()).sum(-1)
        hard = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
        loss = ((0.7 * soft + 0.3 * step / 100 * hard) * weights)[chosen].mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert_same_weights(student, other)


def trainer_of_the_page(student, teacher, rows, optimizer, tmp_path, **options):
    """Three steps of two micro-batches of unequal numbers of scored tokens."""
    space = {"torch": torch}
    exec(TRAINER, space)
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        max_steps=3,
        max_grad_norm=0.0,
        lr_scheduler_type="constant",
        report_to=[],
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
        remove_unused_columns=False,
        dataloader_pin_memory=False,
        **options,
    )
    constant = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)
    return space["DistillationTrainer"](
        model=student,
        args=arguments,
        train_dataset=rows,
        data_collator=together,
        optimizers=(optimizer, constant),
        teacher=teacher,
        distillation=DistillationLoss(alpha=0.9, temperature=2.0),
    )


def test_a_trainer_of_transformers_trains_as_full_logits_do(tmp_path):
    student, teacher, rows = tiny(1, 1, 8), tiny(2, 2, 16), texts(4)
    other = copy.deepcopy(student)
    optimizer = torch.optim.SGD(student.parameters(), lr=0.5)
    trainer_of_the_page(student, teacher, rows, optimizer, tmp_path).train()
    plain = torch.optim.SGD(other.parameters(), lr=0.5)
    train_plainly(other, teacher, [together(rows)] * 3, plain)
    for a, b in zip(student.parameters(), other.parameters(), strict=True):
        close(a, b, rtol=1e-4, atol=1e-5)  # float32 sums in another order, three steps long
    assert (student.lm_head.weight - tiny(1, 1, 8).lm_head.weight).abs().max() > 1e-2


@pytest.mark.parametrize(("bf16", "dtype"), [(True, torch.bfloat16), (False, torch.float32)])
def test_a_trainer_with_bf16_computes_in_bfloat16(tmp_path, monkeypatch, bf16, dtype):
    """Both models' layers and both heads; the weights stay float32."""
    student, teacher, rows = tiny(1, 1, 8), tiny(2, 2, 16), texts(4)
    layers, heads = set(), set()
    for model in (student, teacher):
        layer = model.model.layers[0].self_attn.q_proj
        layer.register_forward_hook(lambda _, __, output: layers.add(output.dtype))

    def watch(rows, weight, bias, out):
        heads.add((rows.dtype, weight.dtype, out.dtype))
        return multiply(rows, weight, bias, out)

    for module in ("blocks", "fused"):
        monkeypatch.setattr(f"limbeck.losses.head.{module}.multiply", watch)
    optimizer = torch.optim.SGD(student.parameters(), lr=0.5)
    trainer_of_the_page(student, teacher, rows, optimizer, tmp_path, bf16=bf16).train()
    assert layers == {dtype}
    assert heads == {(dtype, dtype, dtype)}
    assert student.lm_head.weight.dtype == torch.float32
    assert (student.lm_head.weight - tiny(1, 1, 8).lm_head.weight).abs().max() > 1e-2


def random_case(dtype=torch.float64, vocabulary=17, teacher_vocabulary=17):
    hidden = torch.randn(2, 6, 5, dtype=dtype, requires_grad=True)
    weight = torch.randn(vocabulary, 5, dtype=dtype, requires_grad=True)
    teacher_hidden = torch.randn(2, 6, 7, dtype=dtype)
    teacher_weight = torch.randn(teacher_vocabulary, 7, dtype=dtype)
    labels = torch.randint(min(vocabulary, teacher_vocabulary), (2, 6))
    labels[0, :3] = -100
    return hidden, weight, teacher_hidden, teacher_weight, labels


@pytest.mark.parametrize("name", divergences.names())
@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_hidden_states_logits_and_rows_give_the_same_loss_and_gradient(name, alpha):
    hidden, weight, teacher_hidden, teacher_weight, labels = random_case()
    loss = DistillationLoss(alpha=alpha, temperature=1.5, divergence=name)
    logits, teacher_logits = hidden @ weight.t(), teacher_hidden @ teacher_weight.t()
    teacher = {"teacher_hidden": teacher_hidden, "teacher_head_weight": teacher_weight}
    whole = loss(hidden, weight, labels, **teacher)
    scored = labels[:, 1:] != -100
    rows = {**teacher, "teacher_hidden": teacher_hidden[:, :-1][scored]}
    flat = loss(hidden[:, :-1][scored], weight, labels[:, 1:][scored], **rows)
    dense = loss.from_logits(logits, labels, teacher_logits)
    expected = torch.autograd.grad(dense, [hidden, weight])
    for value in (whole, flat):
        close(value, dense)
        for a, b in zip(torch.autograd.grad(value, [hidden, weight]), expected, strict=True):
            close(a, b)


def test_parts_are_the_means_the_loss_is_made_of():
    hidden, weight, teacher_hidden, teacher_weight, labels = random_case()
    teacher = {"teacher_hidden": teacher_hidden, "teacher_head_weight": teacher_weight}
    parts = DistillationLoss(alpha=0.3).parts(hidden, weight, labels, **teacher)
    close(parts.loss, 0.3 * parts.divergence + 0.7 * parts.cross_entropy)
    alone = DistillationLoss(alpha=0.0).parts(hidden, weight, labels)
    assert alone.divergence == 0
    targets = labels[:, 1:].flatten()
    logits = (hidden @ weight.t())[:, :-1].flatten(0, 1)
    close(alone.loss, torch.nn.functional.cross_entropy(logits, targets))


def test_padded_rows_of_either_head_change_nothing():
    hidden, weight, teacher_hidden, teacher_weight, labels = random_case(
        vocabulary=20, teacher_vocabulary=17
    )
    loss = DistillationLoss(alpha=0.5)

    def taken(student_rows, teacher_rows):
        return loss(
            hidden,
            weight[:student_rows],
            labels,
            teacher_hidden=teacher_hidden,
            teacher_head_weight=teacher_weight[:teacher_rows],
        )

    labels = labels.clamp_max(14)
    close(taken(20, 17), taken(17, 17))
    close(taken(15, 17), taken(15, 15))


def test_a_head_with_bias_and_cap_is_applied():
    hidden, weight, teacher_hidden, teacher_weight, labels = random_case()
    bias = torch.randn(17, dtype=torch.float64, requires_grad=True)
    head = Head(weight, bias, lambda product: 3 * torch.tanh(product / 3))
    loss = DistillationLoss(alpha=0.5, temperature=2.0)
    teacher_logits = teacher_hidden @ teacher_weight.t()
    expected = loss.from_logits(
        3 * torch.tanh((hidden @ weight.t() + bias) / 3), labels, teacher_logits
    )
    got = loss(
        hidden, head, labels, teacher_hidden=teacher_hidden, teacher_head_weight=teacher_weight
    )
    close(got, expected)
    slopes = (torch.autograd.grad(value, [hidden, weight, bias]) for value in (got, expected))
    for a, b in zip(*slopes, strict=True):
        close(a, b)


def test_calls_that_share_a_step_add_up_and_token_weights_are_aligned_with_labels():
    hidden, weight, teacher_hidden, teacher_weight, labels = random_case()
    loss = DistillationLoss(alpha=0.5)
    teacher = {"teacher_head_weight": teacher_weight}
    whole = loss(hidden, weight, labels, teacher_hidden=teacher_hidden, **teacher)
    count = int((labels[:, 1:] != -100).sum())
    parts = [
        loss(
            hidden[[row]],
            weight,
            labels[[row]],
            teacher_hidden=teacher_hidden[[row]],
            step_tokens=count,
            **teacher,
        )
        for row in (0, 1)
    ]
    close(parts[0] + parts[1], whole)
    weights = torch.ones(2, 6, dtype=torch.float64)
    weights[1] = 0
    only = loss(
        hidden, weight, labels, teacher_hidden=teacher_hidden, token_weights=weights, **teacher
    )
    close(only, parts[0])
    (gradient,) = torch.autograd.grad(only, hidden)
    assert (gradient[1] == 0).all()


@pytest.mark.filterwarnings("ignore:No label is scored")
def test_without_scored_labels_the_loss_is_zero_and_has_a_graph():
    hidden, weight, teacher_hidden, teacher_weight, labels = random_case()
    loss = DistillationLoss()
    nothing = torch.full_like(labels, -100)
    teacher_logits = teacher_hidden @ teacher_weight.t()
    for value in (
        loss(
            hidden,
            weight,
            nothing,
            teacher_hidden=teacher_hidden,
            teacher_head_weight=teacher_weight,
        ),
        loss.from_logits(hidden @ weight.t(), nothing, teacher_logits),
    ):
        assert value == 0
        value.backward()
        assert (weight.grad == 0).all()


def test_no_scored_labels_raise_a_warning_unless_step_tokens_is_given():
    hidden, weight, _, _, labels = random_case()
    nothing, loss = torch.full_like(labels, -100), DistillationLoss(alpha=0.0)
    with pytest.warns(UserWarning, match="No label is scored"):
        loss(hidden, weight, nothing)
    with pytest.warns(UserWarning, match="No label is scored"):
        loss.from_logits(hidden @ weight.t(), nothing)
    assert loss(hidden, weight, nothing, step_tokens=9) == 0


def test_nan_states_raise_a_warning():
    hidden, weight, _, _, labels = random_case()
    hidden = torch.where(torch.arange(6)[:, None] == 3, torch.nan, hidden)
    for call in (
        lambda: DistillationLoss(alpha=0.0)(hidden, weight, labels),
        lambda: DistillationLoss(alpha=0.0).from_logits(hidden @ weight.t(), labels),
    ):
        with pytest.warns(UserWarning, match="The loss is nan"):
            assert call().isnan()


WITHOUT_TYPE_CHECKS = """
import torch
from limbeck import DistillationLoss
from limbeck.errors import ConfigError

loss = DistillationLoss(alpha="0.5", temperature="2.0", head_budget_mb=256.0)
assert loss.objective.weights == {"divergence": 0.5, "cross_entropy": 0.5}
assert loss.objective.logit_terms["divergence"].temperature == 2.0
assert type(loss.objective.head_budget_mb) is int

h, w, labels = torch.zeros(2, 6, 5), torch.zeros(17, 5), torch.zeros(2, 6, dtype=torch.long)
both = {"teacher_hidden": h, "teacher_head_weight": w}
calls = {
    "student_hidden must have one entry": lambda: loss(h[:, 1:], w, labels, **both),
    "its shape is (17, 5)": lambda: loss(w, h, labels, **both),
    "student_hidden must be as wide": lambda: loss(h, w.t(), labels, **both),
    "token_weights must have": lambda: loss(h, w, labels, token_weights=h[:, 1:, 0], **both),
    "teacher_hidden must have": lambda: loss(h, w, labels, **both | {"teacher_hidden": h[:1]}),
    "teacher_hidden must be": lambda: loss(h, w, labels, **both | {"teacher_hidden": h[..., 1:]}),
    "student_logits must have": lambda: loss.from_logits(h[:, 1:], labels, h),
    "teacher_logits must have": lambda: loss.from_logits(h, labels, h[:, 1:]),
}
for told, call in calls.items():
    try:
        call()
    except ConfigError as error:
        assert told in str(error), error
    else:
        raise AssertionError(told)
"""


def test_options_are_used_as_converted_and_wrong_shapes_are_refused():
    """In a process of its own: the tests' type checks refuse them before the loss can see them."""
    command = [sys.executable, "-c", WITHOUT_TYPE_CHECKS]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("alpha", [0.0, 0.9])
def test_logits_whose_sum_overflows_or_that_are_minus_infinity_have_a_loss(alpha):
    loss = DistillationLoss(alpha=alpha)
    logits = torch.full((1, 8, 64), 250.0, dtype=torch.float16)
    logits[..., 5] = 251.0
    labels = torch.full((1, 8), 5)
    value = loss.from_logits(logits.requires_grad_(), labels, logits.detach())
    close(value, loss.from_logits(logits.float(), labels, logits.float().detach()))
    (gradient,) = torch.autograd.grad(value, logits)
    assert gradient.isfinite().all()
    logits = torch.randn(1, 8, 64)
    logits[..., 7] = -torch.inf
    assert loss.from_logits(logits, labels, logits).isfinite()


@pytest.mark.parametrize(
    ("options", "found"),
    [
        ({"alpha": 1.4}, r"alpha: .*less than or equal to 1, got 1\.4"),
        ({"temperature": 0.0}, r"temperature: .*greater than 0, got 0\.0"),
        ({"head_budget_mb": 0}, r"head_budget_mb: .*greater than 0"),
        ({"divergence": "kl"}, r"no divergence is called 'kl'"),
    ],
)
def test_options_out_of_bounds_are_refused(options, found):
    with pytest.raises(ConfigError, match=found):
        DistillationLoss(**options)


def test_a_missing_teacher_and_labels_that_are_no_tokens_are_refused():
    hidden, weight, teacher_hidden, teacher_weight, labels = random_case()
    loss = DistillationLoss()
    with pytest.raises(ConfigError, match="none was given"):
        loss(hidden, weight, labels)
    with pytest.raises(ConfigError, match="none was given"):
        loss.from_logits(hidden @ weight.t(), labels)
    labels[1, 4] = 17
    with pytest.raises(ConfigError, match=r"below 17.*reach .*to 17"):
        loss(
            hidden,
            weight,
            labels,
            teacher_hidden=teacher_hidden,
            teacher_head_weight=teacher_weight,
        )


def test_the_loss_has_no_parameters_and_needs_no_model_library():
    assert not DistillationLoss().state_dict()
    code = (
        "import sys; from limbeck.losses import DistillationLoss as D; D(); "
        "sys.exit('transformers' in sys.modules or 'omegaconf' not in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("name", divergences.names())
def test_the_page_names_every_divergence(name):
    assert f"`{name}`" in PAGE
