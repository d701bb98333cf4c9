"""Facts about the machine, and the choice of a dtype."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import time

import pytest
import torch

from hf_minitron import hardware


@pytest.fixture
def measured_anew():
    hardware._cpu_bf16_is_fast.cache_clear()
    yield
    hardware._cpu_bf16_is_fast.cache_clear()


@pytest.mark.parametrize(("bf16_seconds", "dtype"), [(0.5, torch.bfloat16), (2.0, torch.float32)])
def test_fast_dtype_follows_the_measurement(monkeypatch, measured_anew, bf16_seconds, dtype):
    seconds = {torch.bfloat16: bf16_seconds, torch.float32: 1.0}
    monkeypatch.setattr(hardware, "_seconds_per_product", seconds.__getitem__)
    assert hardware.fast_dtype() is dtype
    assert hardware.fast_dtype(torch.device("cpu")) is dtype


def test_cpu_is_measured_once_and_quickly(monkeypatch, measured_anew):
    start = time.perf_counter()
    first = hardware.fast_dtype("cpu")
    assert time.perf_counter() - start < 1  # about 25 ms where bf16 is emulated; the rest is for a busy machine
    monkeypatch.setattr(hardware, "_seconds_per_product", lambda dtype: pytest.fail("measured twice"))
    assert hardware.fast_dtype("cpu") is first


@pytest.mark.parametrize(("supported", "dtype"), [(True, torch.bfloat16), (False, torch.float32)])
def test_cuda_is_asked_for_real_support(monkeypatch, supported, dtype):
    monkeypatch.setattr(
        torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation or supported
    )
    assert hardware.fast_dtype("cuda") is dtype
    assert hardware.fast_dtype(torch.device("cuda", 1)) is dtype


def test_hardware_is_described_for_json():
    facts = hardware.describe_hardware()
    assert json.loads(json.dumps(facts)) == facts
    assert facts["cpu"]
    assert 1 <= facts["cpu_cores"] <= os.cpu_count()
    assert 0.1 < facts["memory_gib"] < 1e5
    assert ("gpus" in facts) == torch.cuda.is_available()
    assert None not in facts.values()


def test_gpus_are_listed(monkeypatch):
    gpu = type("Properties", (), {"name": "NVIDIA H200", "total_memory": 140 * 2**30})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: gpu)
    assert hardware.describe_hardware()["gpus"] == [{"name": "NVIDIA H200", "memory_gib": 140.0}] * 2


def test_versions_are_those_installed():
    found = hardware.versions()
    assert found["python"] == platform.python_version()
    assert found["torch"] == importlib.metadata.version("torch")
    assert {"transformers", "trl", "peft", "accelerate", "datasets", "huggingface_hub"} <= found.keys()


def test_versions_leave_out_what_is_not_installed(monkeypatch):
    monkeypatch.setattr(hardware, "PACKAGES", ("torch", "no_such_package_at_all"))
    assert hardware.versions().keys() == {"python", "torch"}


def test_dtypes_are_read_by_name():
    assert hardware.parse_dtype("bfloat16") is hardware.parse_dtype(torch.bfloat16) is torch.bfloat16
    assert hardware.parse_dtype("auto") is None


@pytest.mark.parametrize("dtype", ["int8", "float8", "nn", torch.float64])
def test_other_dtypes_are_refused(dtype):
    with pytest.raises(ValueError, match="weights are float32, bfloat16 or float16"):
        hardware.parse_dtype(dtype)


@pytest.mark.parametrize(
    ("name", "teraflops"),
    [
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA GH200 480GB", 989),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA L40S", 362),
        ("NVIDIA L4", 121),
        ("NVIDIA L40", None),
        ("Tesla V100-SXM2-16GB", None),
        ("", None),
    ],
)
def test_peak_flops_of_known_gpus(name, teraflops):
    assert hardware.peak_flops(name) == (None if teraflops is None else teraflops * 1e12)
