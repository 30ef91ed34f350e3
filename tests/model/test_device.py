import pytest
import torch

from mr1_fast.config import ModelConfig
from mr1_fast.errors import UserError
from mr1_fast.model import device
from mr1_fast.model.attention import attention_kernel, uses_varlen
from mr1_fast.model.device import device_name, dtype_name, resolve_device, resolve_dtype


def test_auto_is_cuda_in_bfloat16_where_there_is_cuda_and_else_a_cpu_in_float32():
    auto = ModelConfig()
    assert [device_name(auto, has_cuda) for has_cuda in (True, False)] == ["cuda", "cpu"]
    assert [dtype_name(auto, device) for device in ("cuda", "cpu")] == ["bfloat16", "float32"]


def test_a_setting_is_taken_as_it_is():
    chosen = ModelConfig(device="cuda:1", dtype="float32")
    assert device_name(chosen, has_cuda=False) == "cuda:1"
    assert dtype_name(chosen, "cuda") == "float32"
    chosen = ModelConfig(device="cpu", dtype="bfloat16")
    assert resolve_device(chosen) == torch.device("cpu")
    assert resolve_dtype(chosen) == torch.bfloat16


@pytest.mark.parametrize(
    ("capability", "dtype"),
    [((7, 0), torch.float16), ((7, 5), torch.float16), ((8, 0), torch.bfloat16)],
    ids=["V100", "T4", "A100"],
)
def test_auto_is_float16_on_a_card_without_bfloat16(capability, dtype, monkeypatch):
    monkeypatch.setattr(device, "resolve_device", lambda config: torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert resolve_dtype(ModelConfig()) == dtype
    assert resolve_dtype(ModelConfig(dtype="float32")) == torch.float32


@pytest.mark.parametrize("name", ["nowhere", "cuda:999", "xla", "hip", "hpu", "privateuseone"])
def test_a_device_that_is_not_here_is_an_error_that_names_the_way_out(name):
    with pytest.raises(
        UserError, match=rf"device is {name}, which torch cannot use .*--device cpu"
    ):
        resolve_device(ModelConfig(device=name))


def test_variable_lengths_need_cuda_and_16_bits():
    assert uses_varlen("cuda", torch.bfloat16) and uses_varlen("cuda", torch.float16)
    assert not uses_varlen("cuda", torch.float32) and not uses_varlen("cpu", torch.bfloat16)
    assert attention_kernel("cpu", torch.bfloat16) == "sdpa"
