"""Memory: the bytes a cache really holds, and the peak of a call above a baseline."""

from __future__ import annotations

import ctypes
import gc
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


def cache_bytes(cache: Any) -> int:
    """Bytes of the storage behind a cache's keys, values and states, every storage counted once.

    Asks the storages, not the shapes: a static cache counts what it allocated, a quantised one its
    packed numbers, scales and shifts (``element_size`` of a quantised tensor would be wrong), an
    offloaded one its layers wherever they are. None counts as nothing.
    """
    if cache is None:
        return 0
    if hasattr(cache, "held_bytes"):
        # An engine of another process has counted its own storage.
        return cache.held_bytes
    sizes: dict[tuple[str, int], int] = {}
    for tensor in _stored_tensors(cache):
        storage = tensor.untyped_storage()
        if storage.nbytes():
            sizes[(str(tensor.device), storage.data_ptr())] = storage.nbytes()
    return sum(sizes.values())


def _stored_tensors(cache: Any) -> Iterator[torch.Tensor]:
    for layer in getattr(cache, "layers", None) or [cache]:
        for name, value in vars(layer).items():
            # A paged cache of transformers 5.23 is one tensor, which holds keys and values alike; a
            # state-space or linear-attention layer keeps its states instead.
            if "key" in name or "value" in name or "states" in name or name == "cache_tensor":
                yield from _tensors(value)


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    """Plain tensors inside a tensor subclass, tuple, list or mapping."""
    import torch

    if isinstance(value, torch.Tensor):
        if type(value) is not torch.Tensor and hasattr(value, "__tensor_flatten__"):
            for name in value.__tensor_flatten__()[0]:
                yield from _tensors(getattr(value, name))
        else:
            yield value
    elif isinstance(value, Mapping):
        for part in value.values():
            yield from _tensors(part)
    elif isinstance(value, (tuple, list)):
        for part in value:
            yield from _tensors(part)


class CpuMemory:
    """Peak resident memory on Linux, from the kernel's own high-water mark.

    Freed memory is handed back first (``malloc_trim``), then the mark is reset (writing 5 to
    ``clear_refs``), so the mark is that of the call alone. See proc(5).
    """

    _FOLDER = Path("/proc/self")

    def __init__(self) -> None:
        self.baseline = 0

    @property
    def supported(self) -> bool:
        """Whether this system has a high-water mark that can be reset."""
        return (self._FOLDER / "clear_refs").exists()

    def settle(self) -> None:
        """Hand back freed memory and take the present size as the baseline."""
        self._trim()
        self.baseline = self._field("VmRSS")

    def start(self) -> None:
        """Reset the high-water mark."""
        self._trim()
        (self._FOLDER / "clear_refs").write_text("5")

    def peak(self) -> tuple[int, int | None]:
        """Peak bytes above the baseline since :meth:`start`; reserved bytes do not exist here."""
        return max(0, self._field("VmHWM") - self.baseline), None

    @staticmethod
    def _trim() -> None:
        gc.collect()
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)

    def _field(self, name: str) -> int:
        status = (self._FOLDER / "status").read_text()
        return int(re.search(rf"^{name}:\s+(\d+) kB", status, re.MULTILINE)[1]) * 1024


class CudaMemory:
    """Peak memory of PyTorch's allocator; the baseline is the loaded model alone.

    ``reserved`` also counts the private pools of captured graphs, which ``allocated`` does not show
    between replays.
    """

    supported = True

    def __init__(self) -> None:
        import torch

        self._cuda = torch.cuda
        self.baseline = self._cuda.memory_allocated()
        self._reserved = self._cuda.memory_reserved()

    def settle(self) -> None:
        """Free what nobody uses; the baseline stays that of the loaded model."""
        gc.collect()
        self._cuda.empty_cache()

    def start(self) -> None:
        """Reset the peaks."""
        self._cuda.synchronize()
        self._cuda.reset_peak_memory_stats()

    def peak(self) -> tuple[int, int | None]:
        """Peak allocated and reserved bytes above the loaded model, since :meth:`start`."""
        self._cuda.synchronize()
        allocated = self._cuda.max_memory_allocated() - self.baseline
        return max(0, allocated), max(0, self._cuda.max_memory_reserved() - self._reserved)


class ElsewhereMemory:
    """The memory of an engine in another process: this one's marks say nothing of it."""

    supported = False


def meter_for(device: str) -> CpuMemory | CudaMemory:
    """The meter of a device; make it right after the model was loaded."""
    return CudaMemory() if device == "cuda" else CpuMemory()
