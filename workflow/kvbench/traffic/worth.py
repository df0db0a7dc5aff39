"""What reuse is worth: prefill work, seconds on known ceilings, money at a price, bytes of memory."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from kvbench import documents, physics
from kvbench.errors import InputError
from kvbench.physics import Architecture, Ceilings

_FLOPS = re.compile(r"\s*([0-9]*\.?[0-9]+(?:e[0-9]+)?)\s*([kKMGTPE]?)\s*FLOPS?(?:/s)?\s*", re.ASCII)
_SCALE = {"": 1.0, "k": 1e3, "K": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "P": 1e15, "E": 1e18}


@dataclass(frozen=True)
class Price:
    """USD per million input and output tokens."""

    input_usd: float
    output_usd: float


def price(text: str) -> Price:
    """Read ``0.15`` or ``0.15/0.60``: USD per million input (and output) tokens.

    Raises
    ------
    InputError
        If it is not one or two numbers that are not negative.
    """
    parts = text.split("/")
    try:
        numbers = [float(part) for part in parts]
    except ValueError:
        numbers = []
    if len(numbers) not in (1, 2) or not all(0 <= n < 1e6 for n in numbers):
        raise InputError(
            f"price {text!r}: write USD per million tokens, input or input/output, such as 0.15/0.60"
        )
    return Price(numbers[0], numbers[-1] if len(numbers) == 2 else 0.0)


def ceilings(given: str | None, root: Path = Path()) -> Ceilings | None:
    """Find what a machine can do at best.

    Parameters
    ----------
    given:
        A file of measured ceilings; the name of a recorded machine; or numbers such as
        ``300TFLOP/s`` or ``300TFLOP/s,2TB/s`` (prefill arithmetic, memory bandwidth). None takes
        what the workflow measured here, if it has.
    root:
        Folder that ``results`` lies in.

    Raises
    ------
    InputError
        It is none of these.
    """
    from kvbench.analysis.capacity import parse_bandwidth

    if given is None:
        path = root / "results" / "inputs" / "ceilings" / "cpu.json"
        return _measured(path, "here") if path.is_file() else None
    if Path(given).is_file():
        here = "inputs" in Path(given).parts
        return _measured(Path(given), "here" if here else Path(given).stem)
    recorded = root / "results" / "recorded" / given / "ceilings"
    found = sorted(recorded.glob("*.json")) if re.fullmatch(r"[a-z0-9-]+", given) else []
    if found:
        return _measured(found[-1], given)
    numbers: dict[str, float] = {}
    for part in given.split(","):
        match = _FLOPS.fullmatch(part)
        if match:
            numbers["prefill_flops_per_s"] = float(match[1]) * _SCALE[match[2]]
        elif part.strip().endswith("B/s"):
            numbers["read_bytes_per_s"] = parse_bandwidth(part)
        else:
            raise InputError(
                f"ceilings {given!r}: neither a file, nor a machine of results/recorded, nor "
                "numbers; write them like 300TFLOP/s,2TB/s"
            )
    if not all(value > 0 for value in numbers.values()):
        raise InputError(f"ceilings {given!r}: rates must be positive")
    return Ceilings(**numbers, machine="as given")


def _measured(path: Path, machine: str) -> Ceilings:
    record = documents.read_json(path)
    found = Ceilings.from_record(record)
    values = {name: getattr(found, name) for name in Ceilings.__dataclass_fields__}
    return Ceilings(**values | {"machine": f"{machine}, {record['dtype']}"})


def prefill_flops(
    arch: Architecture, input_tokens: np.ndarray, reused: np.ndarray | int = 0
) -> float:
    """FLOPs of reading all prompts with a causal kernel, where ``reused`` tokens are in a cache.

    ``F(n - r, r)`` less the masked half of the new tokens' own square, see
    :func:`kvbench.physics.forward_flops` and :func:`kvbench.physics.masked_flops`.
    """
    past = np.broadcast_to(reused, np.shape(input_tokens))
    pairs, times = np.unique(np.stack([input_tokens, past], axis=1), axis=0, return_counts=True)
    # Whole numbers of any size: the sum over a million long prompts exceeds 64 bits.
    return float(
        sum(
            count
            * (
                physics.forward_flops(arch, length - known, known)
                - physics.masked_flops(arch, length - known, 1, known)
            )
            for (length, known), count in zip(pairs.tolist(), times.tolist(), strict=True)
        )
    )


def saved(
    arch: Architecture,
    input_tokens: np.ndarray,
    reused: np.ndarray,
    rates: Ceilings | None,
    cost: Price | None,
) -> dict[str, Any]:
    """What a prefix cache that reuses these tokens saves over the whole log.

    Returns
    -------
    ``tokens_saved``, ``flops_saved``, ``flops_share`` of all prefill work, ``prefill_s`` and
    ``prefill_s_saved`` (least time on the ceilings, or None), ``usd_saved`` (at the full price of
    an input token, or None).
    """
    whole = prefill_flops(arch, input_tokens)
    gain = whole - prefill_flops(arch, input_tokens, reused)
    rate = rates.prefill_flops_per_s if rates else None
    tokens = int(reused.sum())
    return {
        "tokens_saved": tokens,
        "flops_saved": gain,
        "flops_share": gain / whole if whole else 0.0,
        "prefill_s": whole / rate if rate else None,
        "prefill_s_saved": gain / rate if rate else None,
        "usd_saved": tokens * cost.input_usd / 1e6 if cost else None,
    }


def answers_saved(
    arch: Architecture,
    element_bytes: float,
    input_tokens: np.ndarray,
    output_tokens: np.ndarray | None,
    rates: Ceilings | None,
    cost: Price | None,
) -> dict[str, Any]:
    """What it saves not to generate these answers at all.

    Seconds are those of one request alone on the machine: prefill at the arithmetic's ceiling, and
    for every token all weights and the cache read once.
    """
    flops = prefill_flops(arch, input_tokens)
    rate = rates.prefill_flops_per_s if rates else None
    outputs = None if output_tokens is None else int(output_tokens.sum())
    decode = None
    if output_tokens is not None and rates and rates.read_bytes_per_s:
        weights = physics.weight_bytes_read(arch, element_bytes)
        # Every token of an answer reads the cache as it is half way through the answer, in the mean.
        contexts, place = np.unique(input_tokens + output_tokens // 2, return_inverse=True)
        held = np.array([physics.kv_bytes(arch, one, element_bytes) for one in contexts.tolist()])
        moved = weights + held.astype(float)[place]
        decode = float((output_tokens * moved).sum()) / rates.read_bytes_per_s
    usd = None
    if cost:
        usd = (int(input_tokens.sum()) * cost.input_usd + (outputs or 0) * cost.output_usd) / 1e6
    return {
        "input_tokens_saved": int(input_tokens.sum()),
        "output_tokens_saved": outputs,
        "flops_saved": flops,
        "prefill_s_saved": flops / rate if rate else None,
        "decode_s_saved": decode,
        "usd_saved": usd,
    }
