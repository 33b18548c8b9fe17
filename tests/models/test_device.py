import pytest
import torch

from limbeck.errors import ConfigError
from limbeck.models import choose_device, choose_dtype


def test_automatic_device_is_usable():
    assert torch.zeros(2, device=choose_device("auto")).sum() == 0


@pytest.mark.parametrize("name", ["gpu", "cuda:99", "meta", ""])
def test_device_that_is_not_there_is_refused(name):
    with pytest.raises(ConfigError, match=r"device .*must be"):
        choose_device(name)


def test_the_automatic_dtype_is_float32_without_cuda():
    assert choose_dtype("auto", torch.device("cpu")) == torch.float32
    assert choose_dtype("auto", torch.device("mps")) == torch.float32


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_automatic_dtype_is_bfloat16_on_cuda():
    assert choose_dtype("auto", torch.device("cuda")) == torch.bfloat16


def test_a_dtype_is_chosen_by_name():
    assert choose_dtype("bfloat16", torch.device("cpu")) == torch.bfloat16
    with pytest.raises(ConfigError, match="got 'int8'"):
        choose_dtype("int8", torch.device("cpu"))
