import math
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch

from limbeck.errors import ConfigError
from limbeck.evaluate import measure as room
from limbeck.evaluate.groups import by_source
from limbeck.evaluate.measure import measure
from limbeck.evaluate.scores import Scores, breakdown, summarise
from limbeck.losses import SignalNeeds
from limbeck.models import CausalLM
from limbeck.teachers.local import LocalTeacher
from tests.evaluate.held_out import Rows, packed_rows, reference, reference_tokens
from tests.models.tiny import tiny_llama

CPU = torch.device("cpu")


def measured(student: CausalLM, teacher: CausalLM, data: Rows, micro_batch: int = 2) -> Scores:
    return measure(
        student,
        LocalTeacher(teacher),
        data,
        range(data.num_rows),
        micro_batch=micro_batch,
        device=CPU,
    )


def pair() -> tuple[CausalLM, CausalLM]:
    return tiny_llama(2, 32, seed=1), tiny_llama(3, 32, seed=2)


def test_measured_sums_equal_a_slow_float64_loop() -> None:
    student, teacher = pair()
    data = packed_rows()
    scores, wanted = measured(student, teacher, data), reference(student, teacher, data)
    counts = wanted.pop("tokens")
    np.testing.assert_array_equal(scores.counts, counts)
    assert set(scores.metrics) == set(wanted)
    for name, sums in wanted.items():  # the models compute in float32
        np.testing.assert_allclose(scores.metrics[name], sums, rtol=2e-5, atol=2e-5, err_msg=name)


def grouped(tokens: list[dict[str, float]], metric: str) -> float:
    """Mean of a metric over some tokens."""
    return float(np.mean([token[metric] for token in tokens]))


def test_calibration_and_acceptance_are_those_of_a_list_of_tokens() -> None:
    student, teacher = pair()
    data = packed_rows()
    figures = summarise(measured(student, teacher, data))
    tokens = reference_tokens(student, teacher, data)
    confidence = np.array([token["student_confidence"] for token in tokens])
    gaps = np.array([token["student_hit"] for token in tokens]) - confidence
    bins = np.minimum((confidence * 15).astype(int), 14)
    ece = sum(abs(gaps[bins == b].sum()) for b in range(15)) / len(tokens)
    assert figures["ece"]["value"] == pytest.approx(ece, abs=1e-6)
    assert figures["over_confidence"]["value"] == pytest.approx(-gaps.mean(), abs=1e-6)
    accepted = 1 - grouped(tokens, "total_variation")
    assert figures["acceptance"]["value"] == pytest.approx(accepted, abs=1e-6)
    assert figures["acceptance"]["low"] <= accepted <= figures["acceptance"]["high"]


def test_a_breakdown_gives_the_means_over_the_tokens_of_each_group() -> None:
    student, teacher = pair()
    data = packed_rows(length=48)  # two windows of 24 positions a row
    found = breakdown(measured(student, teacher, data))
    tokens = reference_tokens(student, teacher, data)
    tokens.sort(key=lambda token: token["teacher_entropy"])
    tenth = [[t for i, t in enumerate(tokens) if 10 * i // len(tokens) == k] for k in range(10)]
    early = [token for token in tokens if token["position"] < 16]
    late = [token for token in tokens if token["position"] >= 16]
    even = [token for token in tokens if token["document"] % 2 == 0]
    odd = [token for token in tokens if token["document"] % 2]
    expected = {
        "position": {"0-15": early, "16-63": late},
        "teacher_entropy": {str(1 + k): group for k, group in enumerate(tenth)},
        "source": {"even.txt": even, "odd.txt": odd},
    }
    assert set(found) == set(expected)
    for kind, groups in expected.items():
        assert [row["group"] for row in found[kind]] == list(groups)
        for row, group in zip(found[kind], groups.values(), strict=True):
            assert row["tokens"] == len(group)
            for metric in ("forward_kl", "top1_agreement", "cross_entropy", "teacher_entropy"):
                assert row[metric]["value"] == pytest.approx(grouped(group, metric), abs=2e-5)
                assert row[metric]["low"] <= row[metric]["value"] + 1e-9


def test_of_many_sources_folders_and_the_largest_keep_their_names() -> None:
    tokens = {"tokens": np.array([1.0 + (7 * i) % 31 for i in range(30)])}
    flat = [f"f{i}" for i in range(30)]
    names, group = by_source(flat, tokens)
    small = np.argsort(tokens["tokens"])[:10]
    assert set(names) == {"others"} | set(flat) - {f"f{i}" for i in small}
    others = group["tokens"][:, names.index("others")]
    assert others.sum() == tokens["tokens"][small].sum()
    assert np.array_equal(group["tokens"].sum(axis=1), tokens["tokens"])
    folders = [f"{'a' if i < 10 else 'b'}/f{i}" for i in range(30)]
    names, _ = by_source([f"code/{name}" for name in flat[:1]] + list(flat[1:]), tokens)
    assert "." not in names
    names, group = by_source(folders, tokens)
    assert names == ["a", "b"]
    assert group["tokens"][:, 0].sum() == tokens["tokens"][:10].sum()


def test_the_order_of_the_rows_changes_no_figure() -> None:
    student, teacher = pair()
    data = packed_rows()
    forwards = measured(student, teacher, data)
    backwards = measure(
        student, LocalTeacher(teacher), data, range(5, -1, -1), micro_batch=4, device=CPU
    )
    for name, figure in summarise(forwards).items():
        assert summarise(backwards)[name] == pytest.approx(figure, abs=1e-6), name
    for kind, rows in breakdown(forwards).items():
        for a, b in zip(rows, breakdown(backwards)[kind], strict=True):
            assert a["forward_kl"] == pytest.approx(b["forward_kl"], abs=1e-6)


def test_a_student_equal_to_its_teacher_has_zero_kl_and_full_agreement() -> None:
    model = tiny_llama(2, 32, seed=1)
    told = summarise(measured(model, model, packed_rows()))
    assert told["forward_kl"] == {"value": 0.0, "low": 0.0, "high": 0.0}
    assert told["reverse_kl"]["value"] == 0.0
    assert told["total_variation"]["value"] == 0.0
    assert told["jensen_shannon"]["value"] == pytest.approx(0.0, abs=1e-6)
    assert told["acceptance"]["value"] == told["top5_agreement"]["value"] == 1.0
    assert told["top1_agreement"]["value"] == 1.0
    assert told["cross_entropy"] == told["teacher_cross_entropy"]


@pytest.mark.parametrize("micro_batch", [1, 4, 100])
@pytest.mark.parametrize("chunk", [1, 7, 1000])
def test_scores_do_not_depend_on_micro_batch_or_chunk(
    micro_batch: int, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    student, teacher = pair()
    data = packed_rows()
    wanted = measured(student, teacher, data)
    monkeypatch.setattr(room, "head_chunk", lambda *_: chunk)
    scores = measured(student, teacher, data, micro_batch)
    for name, sums in wanted.metrics.items():
        np.testing.assert_allclose(scores.metrics[name], sums, rtol=1e-4, atol=1e-4, err_msg=name)
    np.testing.assert_array_equal(scores.counts, wanted.counts)
    np.testing.assert_allclose(scores.calibration, wanted.calibration, atol=1e-4)
    for kind, group in wanted.groups.items():
        for name, sums in group.items():
            np.testing.assert_allclose(
                scores.groups[kind][name], sums, rtol=1e-4, atol=1e-4, err_msg=f"{kind} {name}"
            )


def test_the_budget_for_logits_sets_the_size_of_a_chunk(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    student, teacher = pair()
    asked, sizes, added = [], [], room.add

    def most(budget_mb: int, weight: torch.Tensor, copies: int) -> int:
        asked.append((budget_mb, len(weight), copies))
        return budget_mb

    def watch(totals: dict[str, torch.Tensor], values: dict[str, torch.Tensor], *rest: Any) -> None:
        sizes.append(len(values["tokens"]))
        added(totals, values, *rest)

    monkeypatch.setattr(room, "head_chunk", most)
    monkeypatch.setattr(room, "add", watch)
    data = packed_rows()
    measure(
        student, LocalTeacher(teacher), data, range(4), micro_batch=4, device=CPU, head_budget_mb=5
    )
    assert asked == [(5, len(student.whole_head.weight), room.COPIES)]
    assert max(sizes) == 5
    assert sum(sizes) == int(data.batch(range(4)).scored.sum())


def test_padded_rows_do_not_change_metrics_and_their_probability_is_reported() -> None:
    student, teacher = pair()
    data = packed_rows(vocabulary=90)
    student.vocabulary_size = teacher.vocabulary_size = 90
    scores, wanted = measured(student, teacher, data), reference(student, teacher, data)
    assert student.vocabulary_size == 90
    np.testing.assert_allclose(scores.metrics["forward_kl"], wanted["forward_kl"], rtol=2e-5)
    student.vocabulary_size = 96
    mass, count = 0.0, 0
    for row, t in data.whole.scored.nonzero().tolist():
        begin = t - int(data.whole.position_ids[row, t])
        piece = data.whole.input_ids[row, begin : t + 1][None]
        logits = student.logits(piece)[0, -1].detach()
        mass, count = mass + float(torch.softmax(logits.double(), -1)[90:].sum()), count + 1
    assert scores.padded_mass == pytest.approx(mass / count, rel=1e-5)
    assert scores.padded_mass > 0


def test_without_padding_there_is_no_padded_mass() -> None:
    assert measured(*pair(), packed_rows()).padded_mass == 0.0


def test_calibration_bins_add_up_to_hits_less_confidence() -> None:
    scores = measured(*pair(), packed_rows())
    gap = scores.metrics["student_hit"] - scores.metrics["student_confidence"]
    np.testing.assert_allclose(scores.calibration.sum(axis=1), gap, atol=1e-9)


def test_ranks_with_different_shares_give_the_sums_of_one() -> None:
    student, teacher = pair()
    data = packed_rows(rows=5, length=48)
    shares = [[0, 1, 2, 3], [4]]
    whole = measured(student.eval(), teacher, data, 1)
    barrier, parts = threading.Barrier(2, timeout=60), [torch.empty(0)] * 2

    def rank(number: int) -> Scores:
        def reduce(tensor: torch.Tensor) -> torch.Tensor:
            parts[number] = tensor
            barrier.wait()
            total = parts[0] + parts[1]
            barrier.wait()
            return total

        return measure(
            student,
            LocalTeacher(teacher),
            data,
            shares[number],
            micro_batch=1,
            device=CPU,
            reduce=reduce,
        )

    with ThreadPoolExecutor(2) as pool:
        for both in pool.map(rank, range(2)):
            np.testing.assert_array_equal(both.counts, whole.counts)
            for name, sums in whole.metrics.items():
                np.testing.assert_allclose(both.metrics[name], sums, rtol=1e-6, err_msg=name)
            np.testing.assert_allclose(both.bytes, whole.bytes)
            for kind, group in whole.groups.items():
                for name, sums in group.items():
                    found = both.groups[kind][name]
                    np.testing.assert_allclose(found, sums, rtol=1e-6, err_msg=f"{kind} {name}")


def test_bytes_are_the_share_of_the_document_that_was_measured() -> None:
    student, teacher = pair()
    data = packed_rows(rows=3)  # documents 0 | 0+1 | 1+2 | 3 over the rows' halves
    scored = data.whole.scored
    halves = {(r, h): int(scored[r, 8 * h : 8 * h + 8].sum()) for r in range(3) for h in (0, 1)}
    part = measure(student, LocalTeacher(teacher), data, [0], micro_batch=1, device=CPU)
    assert part.documents.tolist() == [0, 1]
    wanted = [10.0, 11 * halves[0, 1] / (halves[0, 1] + halves[1, 0])]
    np.testing.assert_allclose(part.bytes, wanted)
    np.testing.assert_allclose(measured(student, teacher, data).bytes, [10, 11, 12, 13])


def test_dropout_is_off_while_measuring_and_the_mode_is_restored() -> None:
    student, teacher = pair()
    data = packed_rows()
    student.train()
    first = measured(student, teacher, data)
    assert student.training
    np.testing.assert_array_equal(
        first.metrics["forward_kl"], measured(student.eval(), teacher, data).metrics["forward_kl"]
    )


def test_a_teacher_gives_the_scores_of_its_model() -> None:
    student, model = pair()
    data = packed_rows()
    teacher = LocalTeacher(model)
    scores = measure(student, teacher, data, range(6), micro_batch=2, device=CPU)
    wanted = measured(student, model, data)
    np.testing.assert_array_equal(scores.metrics["forward_kl"], wanted.metrics["forward_kl"])


def test_a_teacher_that_gives_no_distribution_is_refused() -> None:
    student, model = pair()
    teacher = LocalTeacher(model, SignalNeeds(layers=frozenset({0})))
    with pytest.raises(ConfigError, match="this teacher was not asked for them"):
        measure(student, teacher, packed_rows(), [0], micro_batch=1, device=CPU)


def test_a_student_that_diverged_is_measured_as_not_finite() -> None:
    student, teacher = pair()
    with torch.no_grad():
        student.hf_model.lm_head.weight.fill_(torch.nan)
    scores = measured(student, teacher, packed_rows())
    assert math.isnan(scores.mean("forward_kl"))
    assert scores.num_tokens == round(float(scores.counts.sum())) > 0
