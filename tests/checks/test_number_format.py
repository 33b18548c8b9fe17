"""When `limbeck check` recommends bfloat16 on a CPU."""

import pytest
import torch

from limbeck.checks import bfloat16_gain, number_format, number_format_notes


def test_a_cpu_without_a_unit_is_not_timed(monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True, "amx_bf16": False})
    monkeypatch.setattr(number_format, "product_seconds", lambda dtype: pytest.fail("timed"))
    assert bfloat16_gain() == 0
    assert number_format_notes(0.0) == []


def test_the_gain_is_the_ratio_of_the_times_of_one_product(monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": True})
    monkeypatch.setattr(number_format, "product_seconds", lambda d: 6.0 / torch.finfo(d).bits)
    assert bfloat16_gain() == 0.5
    monkeypatch.setattr(number_format, "product_seconds", lambda d: 1.0 * torch.finfo(d).bits)
    assert bfloat16_gain() == 2


def test_only_a_gain_that_pays_is_mentioned():
    assert number_format_notes(1.4) == []
    (note,) = number_format_notes(4.56)
    assert "4.6 times as fast in bfloat16" in note
    assert "parallel.compute_dtype=bfloat16 and teacher.dtype=bfloat16" in note
