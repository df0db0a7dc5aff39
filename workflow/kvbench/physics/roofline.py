"""The least time a machine can take: weights, FLOPs and bytes of a forward pass against its ceilings."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from kvbench.errors import InputError, one_of
from kvbench.physics import traffic as cached
from kvbench.physics.architecture import Architecture, Layer
from kvbench.physics.traffic import Traffic, kv_bytes, new_bytes

#: Bytes of one element, by the dtype's name in torch.
BYTES_PER_ELEMENT = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}


def bytes_per_element(dtype: str) -> int:
    """Bytes of one element of ``dtype``, for example ``float32`` or ``torch.bfloat16``.

    Raises
    ------
    InputError
        If the dtype is not one of :data:`BYTES_PER_ELEMENT`.
    """
    name = dtype.removeprefix("torch.")
    one_of("dtype", name, BYTES_PER_ELEMENT)
    return BYTES_PER_ELEMENT[name]


# ---------------------------------------------------------------------------- weights


def _head(arch: Architecture) -> int:
    """Weights of the output projection."""
    return arch.vocab_size * arch.hidden_size


def parameters(arch: Architecture) -> int:
    """Count all parameters: tables (twice ``V·h`` if untied), learned positions, layers, last norm."""
    tables = _head(arch) * (1 if arch.tied_embeddings else 2)
    tables += arch.learned_positions * arch.hidden_size + arch.vocab_size * arch.output_bias
    layers = sum(count * layer.parameters for layer, count in arch.kinds)
    return tables + layers + arch.other_matrices + arch.other_vectors


def weight_bytes(arch: Architecture, bytes_per_element: float) -> int:
    """Bytes of all weights at ``bytes_per_element``."""
    return int(parameters(arch) * bytes_per_element)


def weight_bytes_read(
    arch: Architecture, bytes_per_element: float, batch: int = 1, tokens: int | None = None
) -> int:
    """Bytes of weights that one forward pass must read.

    All of them, except that of an untied embedding table only the rows of the ``batch`` new
    tokens are read (a tied table is read whole as the output projection), of a table of positions one
    row, and of a mixture the experts that the pass's tokens are sent to.

    Parameters
    ----------
    tokens:
        Tokens of the pass, over all sequences; default one for each of ``batch``.
    """
    total: float = parameters(arch)
    if not arch.tied_embeddings:
        total -= (arch.vocab_size - min(batch, arch.vocab_size)) * arch.hidden_size
    total -= max(arch.learned_positions - 1, 0) * arch.hidden_size
    for layer, count in arch.kinds:
        idle = layer.experts - layer.experts_read(tokens or batch)
        total -= count * idle * layer.expert_size
    return int(total * bytes_per_element)


# ---------------------------------------------------------------------------- FLOPs


def forward_flops(
    arch: Architecture,
    new_tokens: int,
    past_tokens: int = 0,
    logits_kept: int = 1,
    batch: int = 1,
    attended_tokens: int | Callable[[Layer], int] | None = None,
) -> int:
    """FLOPs of one forward pass, two per multiply-add, with dense (unmasked-out) attention.

    ``batch·(2q·(projections + chosen experts) + 2kVh + 2H(d + d')q·a) + angles·q`` for ``q`` new
    tokens, ``k`` kept logits and ``a`` attended tokens, plus ``2a`` times what latent attention unpacks;
    the last term is the table of rotary angles. After Kaplan et al. (2020), "Scaling laws", table 1,
    with both attention products, gated MLPs and grouped heads. Equals torch's FlopCounterMode with
    eager attention.

    Parameters
    ----------
    attended_tokens:
        Keys each query is multiplied with, in all layers or as a function of the layer; default
        ``past + new``, within the window of a layer that has one. A static cache multiplies with its
        whole length, since the mask is applied afterwards.
    """
    q = new_tokens
    if attended_tokens is None:
        growing = cached.Dynamic()

        def attended(layer: Layer) -> int:
            return growing.attended(layer, q, past_tokens)
    elif isinstance(attended_tokens, int):

        def attended(layer: Layer) -> int:
            return attended_tokens
    else:
        attended = attended_tokens
    total = 2 * logits_kept * _head(arch) + 2 * q * arch.other_matrices
    for layer, count in arch.kinds:
        keys = attended(layer)
        weights = layer.matrices + layer.scan + layer.experts_per_token * layer.expert_size
        scores = layer.heads * (layer.score_size + layer.mixed_size)
        total += count * 2 * (q * weights + keys * layer.expansion + scores * q * keys)
    return batch * total + arch.angles * q


def masked_flops(arch: Architecture, new_tokens: int, batch: int = 1, past_tokens: int = 0) -> int:
    """FLOPs of attention from ``q`` new tokens to later ones, ``2LHd·q(q - 1)``, or beyond a window.

    :func:`forward_flops` counts them, as FlopCounterMode does; a causal kernel (FlashAttention-2,
    Dao 2023, section 3.1) skips whole blocks of them, and so does the least time a machine could take.
    """
    q, growing, total = new_tokens, cached.Dynamic(), 0
    for layer, count in arch.kinds:
        counted = q * growing.attended(layer, q, past_tokens)
        total += (
            count
            * 2
            * (counted - _visible(layer, q, past_tokens))
            * layer.heads
            * (layer.score_size + layer.mixed_size)
        )
    return batch * total


def _visible(layer: Layer, new: int, past: int) -> int:
    """Pairs of a query and a key that it may see: ``sum of reach(past + i), i = 1 .. new``."""
    window = past + new if layer.window is None else layer.window
    growing = min(max(window - past, 0), new)
    return growing * past + growing * (growing + 1) // 2 + (new - growing) * window


def prefill_flops(arch: Architecture, prompt_tokens: int, batch: int = 1) -> int:
    """FLOPs of reading the prompt: ``forward_flops(prompt, 0)`` with one row of logits kept."""
    return forward_flops(arch, prompt_tokens, 0, 1, batch)


def generation_flops(
    arch: Architecture, prompt_tokens: int, new_tokens: int, cached: bool = True, batch: int = 1
) -> int:
    """FLOPs of generating ``new_tokens`` tokens after ``prompt_tokens``.

    With a cache ``F(s, 0) + sum of F(1, s + i), i = 0 .. n-2``; without one every token reads the
    whole sequence again: ``sum of F(t, 0), t = s .. s+n-1``.
    """
    lengths = range(prompt_tokens, prompt_tokens + new_tokens)
    if not cached:
        return sum(forward_flops(arch, t, 0, 1, batch) for t in lengths)
    if new_tokens == 0:
        return 0
    decode = sum(forward_flops(arch, 1, past, 1, batch) for past in lengths[:-1])
    return prefill_flops(arch, prompt_tokens, batch) + decode


# ---------------------------------------------------------------------------- bytes


def predicted_kv_bytes(
    arch: Architecture,
    traffic: Traffic | Mapping[str, Any],
    prompt_tokens: int,
    new_tokens: int,
    bytes_per_element: float,
    batch: int = 1,
    updates: Sequence[int] | None = None,
) -> int:
    """Bytes the cache holds after a generation: it has ``prompt + new - 1`` tokens in it.

    The last token is returned without being fed back, so its keys and values never exist.

    Parameters
    ----------
    traffic:
        The strategy's own description, or its plain form.
    updates:
        Tokens of each forward pass, if the cache served earlier turns too; replaces the two counts.

    Raises
    ------
    InputError
        If the kind is unknown or lacks one of its options.
    """
    if updates is None:
        updates = [prompt_tokens] + [1] * max(new_tokens - 1, 0)
    return cached.read(traffic).held_bytes(arch, updates, bytes_per_element, batch)


def decode_bytes(
    arch: Architecture,
    context: int,
    traffic: Traffic | Mapping[str, Any],
    bytes_per_element: float,
    batch: int = 1,
    decoded: int = 1,
) -> int:
    """Bytes moved between memory and processor to decode one token (for each of ``batch``).

    The weights once, plus what the strategy's own code does with keys and values
    (:meth:`kvbench.physics.traffic.Traffic.read_bytes`). Without a cache the pass is over ``context``
    tokens.
    """
    found = cached.read(traffic)
    tokens = batch * context if found.recomputes else batch
    weights = weight_bytes_read(arch, bytes_per_element, batch, tokens)
    return weights + found.read_bytes(arch, context, bytes_per_element, batch, decoded)


def link_bytes(
    arch: Architecture,
    context: int,
    traffic: Traffic | Mapping[str, Any],
    bytes_per_element: float,
    batch: int = 1,
) -> int:
    """Bytes that cross between host and device to decode one token; see :class:`traffic.Offloaded`."""
    return cached.read(traffic).link_bytes(arch, context, bytes_per_element, batch)


# ---------------------------------------------------------------------------- the roof


@dataclass(frozen=True)
class Ceilings:
    """What a machine can do at best, as measured on it; None is a ceiling that was not measured.

    Attributes
    ----------
    read_bytes_per_s, copy_bytes_per_s:
        Rate of reading a large array; bytes read plus written per second of copying one.
    prefill_flops_per_s, decode_flops_per_s:
        Rate of a large matrix product, and of a matrix-vector product whose matrix lies in cache,
        so that it says what the kernel and not what the memory can do. On a GPU both are the former:
        what one product takes there is mostly its start, which fused kernels spare.
    call_overhead_s:
        Time of one operation on a handful of numbers.
    link_bytes_per_s:
        Rate of copies between host and accelerator.
    machine:
        Where they were measured.
    reasons:
        Pairs of a ceiling and the reason why it is None.
    """

    read_bytes_per_s: float | None = None
    copy_bytes_per_s: float | None = None
    prefill_flops_per_s: float | None = None
    decode_flops_per_s: float | None = None
    call_overhead_s: float | None = None
    link_bytes_per_s: float | None = None
    machine: str = ""
    reasons: tuple[tuple[str, str], ...] = ()

    @classmethod
    def from_record(cls, record: Mapping[str, Any], dtype: str | None = None) -> Ceilings:
        """Read what :func:`kvbench.measurement.ceilings.measure` returned.

        Raises
        ------
        InputError
            If the record is not of that form, or was measured at another dtype than ``dtype``.
        """
        try:
            found = record["ceilings"]
            values = {name: found[name]["median"] for name in _CEILINGS if name in found}
            reasons = tuple(
                (name, found[name]["reason"]) for name, value in values.items() if value is None
            )
            measured_at, machine = record["dtype"], record["machine"]
            if record.get("device") == "cuda" and values.get("prefill_flops_per_s"):
                values["decode_flops_per_s"] = values["prefill_flops_per_s"]
        except (KeyError, TypeError) as error:
            raise InputError(f"ceilings: {error} is missing; measure them again") from None
        if dtype is not None and measured_at != dtype.removeprefix("torch."):
            raise InputError(f"ceilings were measured at {measured_at}, not at {dtype}")
        return cls(**values, machine=machine, reasons=reasons)

    def need(self, name: str) -> float:
        """Return the ceiling called ``name``.

        Raises
        ------
        InputError
            If it was not measured, or is not positive; the message says why.
        """
        value = getattr(self, name)
        if value is None:
            reason = dict(self.reasons).get(name, "no value was given")
            raise InputError(
                f"ceilings of {self.machine or 'this machine'}: {name} was not measured ({reason})"
            )
        if not (value > 0 and math.isfinite(value)):
            raise InputError(
                f"ceilings of {self.machine or 'this machine'}: {name} is {value}; "
                "it must be positive"
            )
        return float(value)


_CEILINGS = (
    "read_bytes_per_s",
    "copy_bytes_per_s",
    "prefill_flops_per_s",
    "decode_flops_per_s",
    "call_overhead_s",
    "link_bytes_per_s",
)


@dataclass(frozen=True)
class Prediction:
    """The least time a generation can take on a machine.

    Attributes
    ----------
    ttft_s, tpot_s, e2e_s:
        As measured times are: ``e2e = ttft + tpot·(new - 1)``; ``tpot_s`` is None for one token.
    bound:
        ``memory`` or ``compute``: which of the two most of ``e2e_s`` waits for. Copies between
        host and device count as memory.
    """

    ttft_s: float
    tpot_s: float | None
    e2e_s: float
    bound: str


def _step(
    ceilings: Ceilings, moved: float, over_link: float, flops: float, rate: str
) -> tuple[float, bool]:
    """Seconds of one forward pass at the roof, and whether memory sets them."""
    memory = moved / ceilings.need("read_bytes_per_s")
    if over_link:
        memory = max(memory, over_link / ceilings.need("link_bytes_per_s"))
    compute = flops / ceilings.need(rate)
    return max(memory, compute), memory >= compute


def predicted_generation(
    arch: Architecture,
    traffic: Traffic | Mapping[str, Any],
    prompt_tokens: int,
    new_tokens: int,
    bytes_per_element: float,
    ceilings: Ceilings,
    reused_tokens: int = 0,
    batch: int = 1,
) -> Prediction:
    """Predict the least time of a generation: each forward takes max(bytes/bandwidth, FLOPs/rate).

    Williams, Waterman and Patterson (2009), "Roofline", applied to each forward pass and summed.
    Bytes are those of :func:`decode_bytes` over the read bandwidth; a pass over several tokens, of one
    sequence or of several, is held against the rate of a matrix product, a pass over one token against
    that of a matrix-vector product. A batch reads the weights once a pass, and the keys and values of
    all its rows. Attention to later tokens is not counted, except where it runs over a
    preallocated cache under an explicit mask.

    Parameters
    ----------
    prompt_tokens:
        All tokens of the prompt, the reused ones included.
    reused_tokens:
        Tokens of the prompt that a cache from an earlier turn already holds.
    batch:
        Sequences of these lengths that are generated at once; the times are those of all together.

    Raises
    ------
    InputError
        If the kind is unknown, a needed ceiling is missing, nothing is to be generated, or more
        tokens are said to be reused than a cache can hold.
    """
    # Tables ask for the same prediction once per replicate and iteration.
    sizes = (prompt_tokens, new_tokens, bytes_per_element)
    return _predicted_generation(arch, cached.read(traffic), *sizes, ceilings, reused_tokens, batch)


@lru_cache(maxsize=65536)
def _predicted_generation(
    arch: Architecture,
    traffic: Traffic,
    prompt_tokens: int,
    new_tokens: int,
    bytes_per_element: float,
    ceilings: Ceilings,
    reused_tokens: int,
    batch: int,
) -> Prediction:
    if prompt_tokens < 1 or new_tokens < 1:
        raise InputError("a prediction needs at least one prompt token and one new token")
    if not 0 <= reused_tokens < prompt_tokens or (traffic.recomputes and reused_tokens):
        most = 0 if traffic.recomputes else prompt_tokens - 1
        raise InputError(
            f"reused_tokens is {reused_tokens}; with {prompt_tokens} prompt tokens and cache kind "
            f"{traffic.kind!r} it must be from 0 to {most}"
        )
    b = bytes_per_element

    def prefill(length: int, reused: int) -> tuple[float, bool]:
        fresh = length - reused
        # Each layer writes the new keys and values once and reads those it attends to once.
        moved = weight_bytes_read(arch, b, batch, batch * fresh)
        moved += new_bytes(arch, fresh, b, batch) + kv_bytes(arch, length, b, batch)
        # Over an allocation too: the library reads a prompt over its own tokens before it is filled.
        flops = forward_flops(arch, fresh, reused, 1, batch)
        flops -= masked_flops(arch, fresh, batch, reused)
        link = traffic.link_bytes(arch, length, b, batch) if reused else 0
        rate = "prefill_flops_per_s" if batch * fresh > 1 else "decode_flops_per_s"
        return _step(ceilings, moved, link, flops, rate)

    def decode(index: int) -> tuple[float, bool]:
        context = traffic.kept_tokens(prompt_tokens) + index
        if traffic.recomputes:
            return prefill(context, 0)
        return _step(
            ceilings,
            decode_bytes(arch, context, traffic, b, batch, decoded=index),
            traffic.link_bytes(arch, context, b, batch),
            forward_flops(
                arch,
                1,
                context - 1,
                1,
                batch,
                lambda layer: traffic.attended(layer, 1, context - 1),
            ),
            "prefill_flops_per_s" if batch > 1 else "decode_flops_per_s",
        )

    # A prompt in chunks is read in passes of which each waits for the one before.
    first, held = [], reused_tokens
    for tokens in traffic.passes([prompt_tokens - reused_tokens]):
        first.append(prefill(traffic.met(held) + tokens, traffic.met(held)))
        held += tokens
    ttft = sum(seconds for seconds, _ in first)
    rest = [decode(index) for index in range(1, new_tokens)]
    waiting = sum(seconds for seconds, on_memory in [*first, *rest] if on_memory)
    decoding = sum(seconds for seconds, _ in rest)
    e2e = ttft + decoding
    return Prediction(
        ttft_s=ttft,
        tpot_s=decoding / len(rest) if rest else None,
        e2e_s=e2e,
        bound="memory" if waiting >= e2e / 2 else "compute",
    )
