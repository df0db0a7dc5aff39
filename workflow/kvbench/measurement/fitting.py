"""Which cells of a block fit into memory together; a block that does not fit is split beforehand."""

from __future__ import annotations

import resource
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from kvbench import documents, physics, strategies
from kvbench.errors import InputError
from kvbench.measurement import limits
from kvbench.measurement.conversation import Script
from kvbench.measurement.processes import FRESH

#: What a process takes beside weights and cache: libraries that were written to, work space.
PROCESS_BYTES = 256 * 2**20
#: Vectors of a position that live at once while a prompt is read, at least.
_VECTORS = 4
#: Share of the free memory that a block may plan with; predictions know nothing of fragmentation.
USABLE = 0.9


def free_bytes(device: str) -> int | None:
    """Memory that a block may still take, or None where nothing says so.

    On a CPU the least of what the kernel can give, what the control group allows, and the limit of
    the address space. On a GPU what NVML says is free.
    """
    if device == "cuda":
        try:
            import pynvml

            pynvml.nvmlInit()
            return int(pynvml.nvmlDeviceGetMemoryInfo(pynvml.nvmlDeviceGetHandleByIndex(0)).free)
        except Exception:
            # Any failure means the same: there is no NVML to ask.
            return None
    known: list[int] = []
    with suppress(OSError, StopIteration):
        lines = Path("/proc/meminfo").read_text().splitlines()
        line = next(line for line in lines if line.startswith("MemAvailable"))
        known.append(int(line.split()[1]) * 1024)
    allowed = limits.of_this_process().memory_bytes
    if allowed is not None:
        known.append(allowed)
    address_space = resource.getrlimit(resource.RLIMIT_AS)[0]
    if address_space != resource.RLIM_INFINITY:
        known.append(address_space)
    return min(known, default=None)


def needs(cell: Mapping[str, Any], model_folder: Path, turns: Script, kind: str) -> tuple[int, int]:
    """Bytes that a cell's process needs for itself, and those of the model's weights.

    Parameters
    ----------
    cell:
        The fields of :class:`kvbench.inputs.configuration.KvCell`.
    model_folder, turns:
        Model and turns; the cache is counted at the longest context.
    kind:
        A fresh process has weights of its own, a forked one shares its parent's.
    """
    size = physics.bytes_per_element(cell["dtype"])
    try:
        architecture = physics.Architecture.from_config(
            documents.read_json(model_folder / "config.json")
        )
        weights = int(physics.parameters(architecture) * size)
        traffic = strategies.get(cell["measured"]).traffic(turns.max_length)
        cache = traffic.held_bytes(architecture, [turns.max_length], size, turns.batch)
        if turns.batch > 1:
            # A pass over all prompts keeps a few vectors of each position, and the logits of each row.
            vectors = _VECTORS * turns.max_length * architecture.hidden_size
            cache += turns.batch * (vectors + architecture.vocab_size) * size
    except InputError:
        # A kind of model or cache that nothing is predicted of: it is measured as it comes.
        return PROCESS_BYTES, 0
    return PROCESS_BYTES + cache + (weights if kind == FRESH else 0), weights


def too_large(
    own: Mapping[str, int], always: Sequence[str], shared: int, free: int | None
) -> dict[str, str]:
    """Cells that do not fit even alone beside those all are compared with, each with the numbers.

    The arguments are those of :func:`parts`.
    """
    if free is None:
        return {}
    found = {}
    for name, size in own.items():
        needed = shared + size + sum(own[other] for other in always if other != name)
        if needed > USABLE * free:
            beside = f" beside {' and '.join(always)}" if set(always) - {name} else ""
            found[name] = (
                f"about {needed / 2**30:.1f} GiB{beside}, and {free / 2**30:.1f} GiB are free"
            )
    return found


def parts(
    own: Mapping[str, int], always: Sequence[str], shared: int, free: int | None
) -> list[list[str]]:
    """Split a block's cells into parts that fit, each with the cells that all are compared with.

    Parameters
    ----------
    own:
        Cell to the bytes its process needs for itself, in the order of the configuration.
    always:
        Cells that belong to every part: the reference and its control.
    shared:
        Bytes that all need once.
    free:
        Bytes that there are; None for no limit.

    Returns
    -------
    list
        The parts. A cell that does not even fit alone beside ``always`` is a part of its own: its
        record then says how that ended.
    """
    room = float("inf") if free is None else USABLE * free - shared
    room -= sum(own[name] for name in always)
    found: list[list[str]] = [[]]
    taken = 0
    for name, size in own.items():
        if name in always:
            continue
        if found[-1] and taken + size > room:
            found.append([])
            taken = 0
        found[-1].append(name)
        taken += size
    return [[*always, *others] for others in found]
