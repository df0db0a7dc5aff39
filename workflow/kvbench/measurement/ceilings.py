"""The machine's ceilings: how fast it reads, copies and multiplies, and what a call costs.

Measured once per run and kept beside the records, so that each measured time can be held against
the least time this machine allows (:func:`kvbench.physics.predicted_generation`).
"""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from kvbench.errors import InputError, one_of
from kvbench.physics import bytes_per_element

if TYPE_CHECKING:
    import torch

SCHEMA = "kvbench/ceilings/1"

#: Repeats of each measurement after one that warms up.
REPEATS = 7
#: Bytes of the array that is read and copied: well above any last-level cache that it meets.
ARRAY_BYTES = {"cpu": 512 * 2**20, "cuda": 4 * 2**30}
#: Sizes of the matrix product that stands for reading a prompt: (tokens, inputs, outputs).
PREFILL_SHAPE = {"cpu": (256, 2048, 2048), "cuda": (8192, 8192, 8192)}
#: Sides of the matrix of the matrix-vector product: small enough to stay in the cache.
DECODE_SIDE = {"cpu": 512, "cuda": 2048}
#: Products per measurement, so that one measurement is long against the clock's resolution.
DECODE_CALLS = 200
#: Operations on eight numbers per measurement of the call overhead.
OVERHEAD_CALLS = 2000

_UNITS = {
    "read_bytes_per_s": "bytes/s",
    "copy_bytes_per_s": "bytes/s",
    "prefill_flops_per_s": "FLOP/s",
    "decode_flops_per_s": "FLOP/s",
    "call_overhead_s": "s",
    "link_bytes_per_s": "bytes/s",
}


def measure(
    device: str = "cpu",
    dtype: str = "float32",
    machine: str | None = None,
    repeats: int = REPEATS,
    array_bytes: int | None = None,
    prefill_shape: tuple[int, int, int] | None = None,
) -> dict[str, Any]:
    """Measure all ceilings of ``device`` at ``dtype``, with the threads torch is set to.

    Parameters
    ----------
    device:
        ``cpu`` or ``cuda``.
    dtype:
        The model's dtype; it decides the rates of the products, not those of the memory.
    machine:
        Name to keep with the figures; default is the processor's or the GPU's name.
    repeats:
        Measurements of each ceiling; all are kept, the median counts.
    array_bytes, prefill_shape:
        Sizes to use instead of :data:`ARRAY_BYTES` and :data:`PREFILL_SHAPE`.

    Returns
    -------
    dict
        ``schema, machine, device, dtype, threads, array_bytes, wall_s`` and ``ceilings``: by name
        ``median`` (None if it could not be measured), ``samples``, ``unit`` and ``reason`` (None
        unless it could not be measured). :meth:`kvbench.physics.Ceilings.from_record` reads it.

    Raises
    ------
    InputError
        If the device or dtype is unknown, or CUDA is asked for and torch sees no GPU.
    """
    import torch

    bytes_per_element(dtype)
    one_of("device", device, ARRAY_BYTES)
    if device == "cuda" and not torch.cuda.is_available():
        raise InputError("device cuda: torch sees no GPU; choose device cpu")
    started = time.perf_counter()
    kind = getattr(torch, dtype.removeprefix("torch."))
    size = array_bytes or ARRAY_BYTES[device]
    probes: dict[str, Callable[[], list[float]]] = {
        "read_bytes_per_s": lambda: _read(device, size, repeats),
        "copy_bytes_per_s": lambda: _copy(device, size, repeats),
        "prefill_flops_per_s": lambda: _prefill(
            device, kind, prefill_shape or PREFILL_SHAPE[device], repeats
        ),
        "decode_flops_per_s": lambda: _decode(device, kind, repeats),
        "call_overhead_s": lambda: _overhead(device, repeats),
        "link_bytes_per_s": lambda: _link(device, size, repeats),
    }
    with torch.inference_mode():
        found = {name: _attempt(name, probe) for name, probe in probes.items()}
    return {
        "schema": SCHEMA,
        "machine": machine or _machine(device),
        "device": device,
        "dtype": dtype.removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "array_bytes": size,
        "wall_s": round(time.perf_counter() - started, 3),
        "ceilings": found,
    }


def _attempt(name: str, probe: Callable[[], list[float]]) -> dict[str, Any]:
    """Run one probe; what this machine cannot do becomes a reason instead of an end."""
    entry: dict[str, Any] = {"unit": _UNITS[name], "median": None, "samples": [], "reason": None}
    try:
        samples = probe()
    except (RuntimeError, MemoryError) as error:
        # torch reports a missing kernel and exhausted memory both as RuntimeError.
        lines = str(error).strip().splitlines()
        entry["reason"] = lines[0] if lines else type(error).__name__
        return entry
    entry["samples"] = samples
    entry["median"] = statistics.median(samples)
    return entry


def _seconds(device: str, work: Callable[[], object], repeats: int) -> list[float]:
    """Time ``work`` after one run that warms up: CUDA events on a GPU, the clock elsewhere."""
    import torch

    work()
    times = []
    for _ in range(repeats):
        if device == "cuda":
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            work()
            end.record()
            end.synchronize()
            times.append(begin.elapsed_time(end) / 1e3)
        else:
            begin_s = time.perf_counter()
            work()
            times.append(time.perf_counter() - begin_s)
    return times


def _read(device: str, size: int, repeats: int) -> list[float]:
    """Bytes per second of summing an array, which reads each byte once and writes nothing."""
    import torch

    array = torch.ones(size // 4, dtype=torch.float32, device=device)
    if device == "cuda":
        return [size / s for s in _seconds(device, array.sum, repeats)]
    # Rows keep each core on a stretch of its own; the best of two kernels is the ceiling.
    rows = array.view(-1, 2**16)
    vector = torch.ones(2**16, dtype=torch.float32)
    candidates = [
        _seconds(device, work, repeats) for work in (array.sum, lambda: torch.mv(rows, vector))
    ]
    return [size / s for s in min(candidates, key=statistics.median)]


def _copy(device: str, size: int, repeats: int) -> list[float]:
    """Bytes read plus bytes written per second of copying half the array onto the other half."""
    import torch

    array = torch.ones(size // 4, dtype=torch.float32, device=device)
    half = array.numel() // 2
    source, target = array[:half], array[half : 2 * half]
    moved = 2 * half * 4
    return [moved / s for s in _seconds(device, lambda: target.copy_(source), repeats)]


def _prefill(
    device: str, kind: torch.dtype, shape: tuple[int, int, int], repeats: int
) -> list[float]:
    """FLOPs per second of a matrix product."""
    import torch

    tokens, inputs, outputs = shape
    left = torch.ones((tokens, inputs), dtype=kind, device=device)
    right = torch.ones((outputs, inputs), dtype=kind, device=device)
    flops = 2 * tokens * inputs * outputs
    return [flops / s for s in _seconds(device, lambda: left @ right.T, repeats)]


def _decode(device: str, kind: torch.dtype, repeats: int) -> list[float]:
    """FLOPs per second of a matrix-vector product whose matrix stays in the cache.

    On a GPU the products are captured in one graph, or launching them would be the ceiling.
    """
    import torch

    side = DECODE_SIDE[device]
    matrix = torch.ones((side, side), dtype=kind, device=device)
    vector = torch.ones((1, side), dtype=kind, device=device)

    def products() -> None:
        for _ in range(DECODE_CALLS):
            torch.nn.functional.linear(vector, matrix)

    work: Callable[[], object] = products
    if device == "cuda":
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            products()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            products()
        work = graph.replay
    flops = 2 * side * side * DECODE_CALLS
    return [flops / s for s in _seconds(device, work, repeats)]


def _overhead(device: str, repeats: int) -> list[float]:
    """Seconds of one operation on eight numbers: interpreter, dispatch and, on a GPU, launch."""
    import torch

    numbers = torch.zeros(8, device=device)

    def operations() -> None:
        for _ in range(OVERHEAD_CALLS):
            numbers.add_(1.0)

    return [s / OVERHEAD_CALLS for s in _seconds(device, operations, repeats)]


def _link(device: str, size: int, repeats: int) -> list[float]:
    """Bytes per second from page-locked host memory to the accelerator."""
    import torch

    if device != "cuda":
        raise RuntimeError("there is no accelerator, hence no link to it")
    size = min(size, 2**30)
    host = torch.ones(size // 4, dtype=torch.float32, pin_memory=True)
    target = torch.empty(size // 4, dtype=torch.float32, device=device)
    work = lambda: target.copy_(host, non_blocking=True)  # noqa: E731
    return [size / s for s in _seconds(device, work, repeats)]


def _machine(device: str) -> str:
    import torch

    if device == "cuda":
        return torch.cuda.get_device_name()
    return platform.processor() or platform.machine()
