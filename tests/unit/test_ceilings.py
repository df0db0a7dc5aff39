"""Ceilings: every probe gives raw samples and a median, or one reason why there is none."""

from __future__ import annotations

import json
import statistics

import pytest
from families import llama
from kvbench import physics
from kvbench.errors import InputError
from kvbench.measurement import ceilings
from kvbench.physics import Ceilings

SMALL = {"repeats": 3, "array_bytes": 8 * 2**20, "prefill_shape": (32, 256, 256)}
TINY = llama(2, 64, 4, 2, 16, 96, 101, False, 512)


@pytest.fixture(scope="module")
def record():
    return ceilings.measure("cpu", "float32", machine="lab", **SMALL)


def test_every_ceiling_of_a_cpu_but_the_link_is_positive(record):
    for name, entry in record["ceilings"].items():
        if name != "link_bytes_per_s":
            assert entry["reason"] is None and entry["median"] > 0, name


def test_raw_samples_are_kept_and_the_median_counts(record):
    entry = record["ceilings"]["read_bytes_per_s"]
    assert len(entry["samples"]) == SMALL["repeats"]
    assert entry["median"] == statistics.median(entry["samples"])


def test_the_record_survives_json(record):
    assert json.loads(json.dumps(record)) == record


def test_a_ceiling_that_cannot_be_measured_has_a_reason(record):
    entry = record["ceilings"]["link_bytes_per_s"]
    assert entry["median"] is None and entry["samples"] == []
    assert "no accelerator" in entry["reason"]


def test_physics_predicts_with_the_record(record):
    found = Ceilings.from_record(json.loads(json.dumps(record)), "float32")
    prediction = physics.predicted_generation(TINY, {"kind": "dynamic"}, 8, 4, 4, found)
    assert prediction.e2e_s > 0


def test_physics_refuses_a_missing_ceiling_with_its_reason(record):
    found = Ceilings.from_record(record)
    with pytest.raises(
        InputError, match=r"lab: link_bytes_per_s was not measured \(.*no accelerator"
    ):
        physics.predicted_generation(TINY, {"kind": "offloaded"}, 8, 4, 4, found)


def test_a_failing_probe_leaves_the_others_measured(monkeypatch):
    def broken(*_):
        raise RuntimeError("no kernel for this dtype\nstack ...")

    monkeypatch.setattr(ceilings, "_prefill", broken)
    found = ceilings.measure("cpu", "float32", **SMALL)["ceilings"]
    assert found["prefill_flops_per_s"]["reason"] == "no kernel for this dtype"
    assert found["prefill_flops_per_s"]["median"] is None
    assert found["decode_flops_per_s"]["median"] > 0


def test_rates_follow_from_bytes_and_seconds(monkeypatch):
    monkeypatch.setattr(ceilings, "_seconds", lambda device, work, repeats: [0.5] * repeats)
    found = ceilings.measure("cpu", "bfloat16", **SMALL)["ceilings"]
    assert found["read_bytes_per_s"]["median"] == 8 * 2**20 / 0.5
    assert found["copy_bytes_per_s"]["median"] == 8 * 2**20 / 0.5
    assert found["prefill_flops_per_s"]["median"] == 2 * 32 * 256 * 256 / 0.5
    side, calls = ceilings.DECODE_SIDE["cpu"], ceilings.DECODE_CALLS
    assert found["decode_flops_per_s"]["median"] == 2 * side * side * calls / 0.5
    assert found["call_overhead_s"]["median"] == 0.5 / ceilings.OVERHEAD_CALLS


def test_work_runs_once_to_warm_up_and_then_once_per_repeat():
    calls = []
    assert len(ceilings._seconds("cpu", lambda: calls.append(1), 4)) == 4
    assert len(calls) == 5


@pytest.mark.parametrize(
    ("device", "dtype", "words"),
    [("tpu", "float32", "unknown device 'tpu'"), ("cpu", "int4", "int4")],
)
def test_unknown_devices_and_dtypes_are_refused(device, dtype, words):
    with pytest.raises(InputError, match=words):
        ceilings.measure(device, dtype)


def test_cuda_without_a_gpu_is_refused_in_one_line(monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(InputError, match="torch sees no GPU"):
        ceilings.measure("cuda")
