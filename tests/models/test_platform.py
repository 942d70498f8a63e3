"""What memory allows: how weights are held, and how much more fits on a device."""

from __future__ import annotations

import importlib
import sys
from dataclasses import replace

import pytest

from osaurus_grpc.models import platform
from osaurus_grpc.models.catalog import Catalog
from osaurus_grpc.models.platform import Device, mx, plan_weights
from osaurus_grpc.models.residency import estimated_bytes

GIB = 2**30


@pytest.fixture
def cpu_with_16_gib(monkeypatch):
    monkeypatch.setattr(platform, "device", lambda: Device.CPU)
    monkeypatch.setattr(platform, "memory_bytes", lambda: 16 * GIB)


@pytest.mark.usefixtures("cpu_with_16_gib")
@pytest.mark.parametrize(
    ("parameters", "is_quantized", "dtype", "is_dequantized"),
    [
        (10**9, True, mx.float32, True),
        (10**9, False, mx.float32, True),
        (7 * 10**9, True, mx.float32, False),
        (7 * 10**9, False, None, False),  # in float32 its 14 GB would be 28
    ],
)
def test_weights_are_float32_where_that_fits(parameters, is_quantized, dtype, is_dequantized):
    plan = plan_weights(parameters, "auto", is_quantized=is_quantized)
    assert (plan.dtype, plan.is_dequantized) == (dtype, is_dequantized)


@pytest.mark.usefixtures("cpu_with_16_gib")
def test_the_estimate_is_what_loading_takes(tiny_dir):
    entry = Catalog(tiny_dir).find("tiny-llama")
    assert estimated_bytes(entry, "auto") == entry.parameter_count * 4
    large = replace(entry, parameter_count=7 * 10**9, size_bytes=14 * 10**9, quantization="BF16")
    assert estimated_bytes(large, "auto") == 14 * 10**9
    assert estimated_bytes(large, "float32") == 28 * 10**9


def test_what_a_device_holds_already_is_not_offered_again(monkeypatch):
    monkeypatch.setattr(platform, "device", lambda: Device.METAL)
    monkeypatch.setattr(mx, "device_info", lambda: {"max_recommended_working_set_size": 24 * GIB})
    monkeypatch.setattr(mx, "get_active_memory", lambda: 20 * GIB)
    assert platform.memory_bytes() == 4 * GIB
    monkeypatch.setattr(mx, "get_active_memory", lambda: 25 * GIB)
    assert platform.memory_bytes() == 0


def test_transformers_finds_all_it_has_although_it_looks_once():
    names = importlib.import_module("transformers.utils.import_utils")
    package = sys.modules["transformers.models"]
    found = names.define_import_structure(package.__file__)

    assert names.create_import_structure_from_path.__module__ == names.__name__
    assert set(package.__all__) >= {name for part in found.values() for name in set().union(*part.values())}
