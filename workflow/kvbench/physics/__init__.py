"""What a decoder of the Llama family stores, computes and moves: bytes, FLOPs, a roof on speed.

Symbols used below: ``L`` layers, ``h`` hidden size, ``H`` query heads, ``K`` key/value heads,
``d`` head size, ``f`` size of the feed-forward layer, ``V`` vocabulary, ``b`` bytes per element.
Everything is a pure function of integers; nothing here touches a model, a file or a clock.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any

from kvbench.errors import InputError

#: Bytes of one element, by the dtype's name in torch.
BYTES_PER_ELEMENT = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}

#: Values packed into one storage item by hqq, and bytes of that item (hqq/core/bitpack.py, 0.2.8).
_HQQ_PACKING = {8: (1, 1), 4: (2, 1), 3: (10, 4), 2: (4, 1), 1: (8, 1)}

#: Configuration keys without which nothing can be computed.
_REQUIRED = (
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "vocab_size",
)

#: Where this library's model types put biases: ``(q, k, v by default, follows the output too)``.
_MODEL_TYPES = {
    "llama": (False, True),
    "mistral": (False, False),
    "qwen2": (True, False),
    "qwen3": (False, True),
}


@dataclass(frozen=True)
class Architecture:
    """The sizes of a decoder-only transformer of the Llama family.

    Attributes
    ----------
    layers, hidden_size, heads, kv_heads, head_dim, intermediate_size, vocab_size:
        ``L, h, H, K, d, f, V``.
    tied_embeddings:
        Whether the output projection is the embedding table itself.
    max_positions:
        Longest sequence the model was made for, in tokens.
    attention_bias, output_bias, mlp_bias:
        Biases on the query, key and value projections; on the attention's output projection; on
        the three feed-forward projections.
    query_key_norm:
        Whether queries and keys are normalised per head (two weights of ``d`` a layer).
    """

    layers: int
    hidden_size: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    tied_embeddings: bool
    max_positions: int
    attention_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    query_key_norm: bool = False

    @classmethod
    def from_config(cls, config: Mapping[str, Any], source: str = "config.json") -> Architecture:
        """Read a configuration in Hugging Face form.

        Parameters
        ----------
        config:
            Mapping with ``hidden_size``, ``num_hidden_layers``, ``num_attention_heads``,
            ``intermediate_size``, ``vocab_size`` and, optionally, ``num_key_value_heads`` (default:
            as many as query heads), ``head_dim`` (default: hidden size / heads),
            ``tie_word_embeddings`` (default False), ``max_position_embeddings`` (default 2048),
            ``attention_bias``, ``mlp_bias`` and ``model_type`` (default ``llama``).
        source:
            Name of the file the mapping came from, for the error message.

        Raises
        ------
        InputError
            If a size is missing or not a positive whole number, or the model type is unknown.
        """
        kind = config.get("model_type", "llama")
        if kind not in _MODEL_TYPES:
            raise InputError(
                f"{source}: model_type {kind!r} is not modelled; known: {', '.join(_MODEL_TYPES)}"
            )
        for key in _REQUIRED:
            if key not in config:
                raise InputError(f"{source}: {key} is missing; it must be a positive whole number")

        def size(key: str, default: int | None = None) -> int:
            value = config.get(key)
            value = default if value is None else value
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise InputError(
                    f"{source}: {key} is {value!r}; it must be a positive whole number"
                )
            return value

        hidden, heads = size("hidden_size"), size("num_attention_heads")
        kv_heads = size("num_key_value_heads", heads)
        if heads % kv_heads:
            raise InputError(
                f"{source}: num_key_value_heads is {kv_heads}; it must divide "
                f"num_attention_heads ({heads})"
            )
        default_bias, bias_on_output = _MODEL_TYPES[kind]
        bias = bool(config.get("attention_bias", default_bias))
        return cls(
            layers=size("num_hidden_layers"),
            hidden_size=hidden,
            heads=heads,
            kv_heads=kv_heads,
            head_dim=size("head_dim", hidden // heads),
            intermediate_size=size("intermediate_size"),
            vocab_size=size("vocab_size"),
            tied_embeddings=bool(config.get("tie_word_embeddings", False)),
            max_positions=size("max_position_embeddings", 2048),
            # Qwen2 has these biases whatever the configuration says; the key is absent there.
            attention_bias=bias or default_bias,
            output_bias=bias and bias_on_output,
            mlp_bias=bool(config.get("mlp_bias", False)) and kind == "llama",
            query_key_norm=kind == "qwen3",
        )

    def as_dict(self) -> dict[str, int | bool]:
        """Return the fields; ``Architecture(**arch.as_dict())`` is the same architecture."""
        return asdict(self)


def bytes_per_element(dtype: str) -> int:
    """Bytes of one element of ``dtype``, for example ``float32`` or ``torch.bfloat16``.

    Raises
    ------
    InputError
        If the dtype is not one of :data:`BYTES_PER_ELEMENT`.
    """
    name = dtype.removeprefix("torch.")
    if name not in BYTES_PER_ELEMENT:
        raise InputError(
            f"dtype {dtype!r} is unknown; choose one of {', '.join(BYTES_PER_ELEMENT)}"
        )
    return BYTES_PER_ELEMENT[name]


# ---------------------------------------------------------------------------- parameters


def _matrix_parameters_per_layer(arch: Architecture) -> int:
    """Weights of the seven projections of one layer: ``hHd + 2hKd + Hdh + 3hf``."""
    h, queries, keys = arch.hidden_size, arch.heads * arch.head_dim, arch.kv_heads * arch.head_dim
    return h * queries + 2 * h * keys + queries * h + 3 * h * arch.intermediate_size


def parameters(arch: Architecture) -> int:
    """Count all parameters: ``V·h (twice if untied) + L·(projections + biases + 2h) + h``.

    The two ``h`` of a layer and the last one are the RMS normalisations.
    """
    h = arch.hidden_size
    queries, keys = arch.heads * arch.head_dim, arch.kv_heads * arch.head_dim
    layer = _matrix_parameters_per_layer(arch) + 2 * h
    layer += (queries + 2 * keys) * arch.attention_bias + h * arch.output_bias
    layer += (2 * arch.intermediate_size + h) * arch.mlp_bias
    layer += 2 * arch.head_dim * arch.query_key_norm
    tables = arch.vocab_size * h * (1 if arch.tied_embeddings else 2)
    return tables + arch.layers * layer + h


def weight_bytes(arch: Architecture, bytes_per_element: float) -> int:
    """Bytes of all weights at ``bytes_per_element``."""
    return int(parameters(arch) * bytes_per_element)


def weight_bytes_read(arch: Architecture, bytes_per_element: float, batch: int = 1) -> int:
    """Bytes of weights that one forward pass must read.

    All of them, except that of an untied embedding table only the rows of the ``batch`` new
    tokens are read (a tied table is read whole as the output projection).
    """
    total = parameters(arch)
    if not arch.tied_embeddings:
        total -= (arch.vocab_size - min(batch, arch.vocab_size)) * arch.hidden_size
    return int(total * bytes_per_element)


# ---------------------------------------------------------------------------- cache storage


def kv_elements(arch: Architecture, tokens: int, batch: int = 1) -> int:
    """Numbers kept for ``tokens`` tokens: ``2·L·K·d·tokens·batch`` (a key and a value per head)."""
    return 2 * arch.layers * arch.kv_heads * arch.head_dim * tokens * batch


def kv_bytes(arch: Architecture, tokens: int, bytes_per_element: float, batch: int = 1) -> int:
    """Bytes of an exact cache holding ``tokens`` tokens: ``2·L·K·d·b·tokens·batch``.

    A static cache holds its maximum length from the first step; pass that as ``tokens``. Ainslie
    et al. (2023), "GQA", section 2.2: only the ``K`` key/value heads are kept, not the ``H``
    query heads.
    """
    return int(kv_elements(arch, tokens, batch) * bytes_per_element)


def residual_tokens(updates: Sequence[int], residual_length: int, counts_new: bool = False) -> int:
    """Tokens a ``QuantizedCache`` of transformers keeps unquantised after these updates.

    ``QuantizedLayer.update`` (transformers 5.15.1, cache_utils.py) quantises the whole first
    update; later ones join the residual, until a residual of at least ``residual_length - 1``
    tokens meets a further update: then the whole history is quantised again. An empty residual
    is never tested, so lengths of 0 and 1 act as 2. Newer releases (5.23) count the tokens of the
    update itself: the history is quantised as soon as the residual would reach the length.

    Parameters
    ----------
    updates:
        Tokens added by each forward pass, in order: the prompt, then 1 for each decoded token.
    residual_length:
        The option of that name.
    counts_new:
        Whether the rule is that of the newer releases.
    """
    residual = 0
    for tokens in updates[1:]:
        full = residual + tokens if counts_new else residual and residual + 1
        if full and full >= residual_length:
            residual = 0
        else:
            residual += tokens
    return residual


def _packed_bytes(
    elements: int, bits: int, backend: str, group_size: int, bytes_per_element: float
) -> int:
    """Bytes of one quantised key or value tensor: packed numbers, scales and shifts."""
    if elements % group_size:
        raise InputError(
            f"group_size {group_size} does not divide the {elements} numbers of a layer; "
            "choose a divisor of kv_heads x head_dim"
        )
    groups = elements // group_size
    # One scale and one shift (quanto) or zero (hqq) per group, both in the model's dtype.
    scales = 2 * groups * bytes_per_element
    if backend == "quanto":
        if bits not in (2, 4):
            raise InputError(f"quantized cache: bits is {bits}; the quanto backend has 2 and 4")
        if groups == 1:
            # quanto then reduces over the other axis and keeps a scale for each number.
            scales = 2 * group_size * bytes_per_element
        # Rows of groups are stacked into the bits of one byte; the last row is padded with zeros
        # (optimum/quanto/tensor/packed.py, 0.2.7).
        data = math.ceil(groups * bits / 8) * group_size
    else:
        if bits not in _HQQ_PACKING:
            raise InputError(
                f"quantized cache: bits is {bits}; the hqq backend has 1, 2, 3, 4 and 8"
            )
        values, item = _HQQ_PACKING[bits]
        if item == 1 and groups % values:
            raise InputError(
                f"quantized cache: {groups} groups a layer; hqq packs {bits} bits only "
                f"when their number is a multiple of {values}"
            )
        data = math.ceil(groups / values) * group_size * item
    return int(data + scales)


def quantized_kv_bytes(
    arch: Architecture,
    prompt_tokens: int,
    new_tokens_in_cache: int,
    bits: int,
    backend: str,
    group_size: int = 64,
    residual_length: int = 128,
    bytes_per_element: float = 2,
    batch: int = 1,
    updates: Sequence[int] | None = None,
    counts_new: bool = False,
) -> int:
    """Bytes a ``QuantizedCache`` of transformers really holds, to the byte.

    ``2·L·(packed + scales + shifts) + 2·L·K·d·residual·b``: Liu et al. (2024), "KIVI", section 3,
    for the idea (grouped low-bit storage beside a full-precision residual); the layout is that of
    transformers 5.15.1 with optimum-quanto 0.2.7 on axis 0 or hqq 0.2.8 on axis 1.

    Parameters
    ----------
    prompt_tokens, new_tokens_in_cache:
        Tokens of the first forward pass, and those added one by one since (a generation of ``n``
        tokens leaves ``n - 1``).
    bits, backend, group_size, residual_length:
        The cache's options; ``backend`` is ``quanto``, ``hqq`` or ``fp8``. For ``fp8``
        (transformers 5.23) every number, the newest too, is one float8 byte, and the keys and the
        values of a layer have one float32 scale each; ``bits`` must be 8.
    updates:
        Tokens of each forward pass when the cache served several turns; replaces the two counts.
    counts_new:
        See :func:`residual_tokens`.

    Raises
    ------
    InputError
        If the backend is unknown or cannot store such groups.
    """
    if updates is None:
        updates = [prompt_tokens] + [1] * new_tokens_in_cache
    tokens = sum(updates)
    if backend == "fp8":
        if bits != 8:
            raise InputError(f"quantized cache: bits is {bits}; the fp8 backend has 8")
        return kv_elements(arch, tokens, batch) + 2 * arch.layers * 4
    if backend not in ("quanto", "hqq"):
        raise InputError(f"quantized cache: backend {backend!r} is not quanto, hqq or fp8")
    residual = residual_tokens(updates, residual_length, counts_new)
    elements = (tokens - residual) * arch.kv_heads * arch.head_dim * batch
    packed = _packed_bytes(elements, bits, backend, group_size, bytes_per_element)
    return 2 * arch.layers * packed + kv_bytes(arch, residual, bytes_per_element, batch)


def _option(traffic: Mapping[str, Any], key: str) -> Any:
    try:
        return traffic[key]
    except KeyError:
        raise InputError(f"traffic of kind {traffic['kind']!r} lacks {key!r}") from None


def _kind(traffic: Mapping[str, Any]) -> str:
    kind = traffic.get("kind")
    if kind not in TRAFFIC_KINDS:
        raise InputError(
            f"traffic kind {kind!r} is unknown; known kinds: {', '.join(TRAFFIC_KINDS)}"
        )
    return kind


#: The traffic kinds: how a strategy stores and moves its cache.
TRAFFIC_KINDS = ("none", "dynamic", "static", "quantized", "offloaded", "paged", "window", "pruned")


def _preallocated(traffic: Mapping[str, Any]) -> bool:
    """Whether attention runs over a whole allocation of ``max_length`` slots."""
    return traffic["kind"] == "static" or (
        traffic["kind"] == "offloaded" and "max_length" in traffic
    )


def _cached(traffic: Mapping[str, Any], tokens: int) -> int:
    """Token slots that a cache of this kind allocates when ``tokens`` have passed through it."""
    kind = traffic["kind"]
    if kind == "static" or "max_length" in traffic:
        return int(_option(traffic, "max_length"))
    if kind == "window":
        return min(tokens, int(traffic.get("sinks", 0)) + int(_option(traffic, "window")))
    if kind == "paged" and "page_size" in traffic:
        page = int(traffic["page_size"])
        return math.ceil(tokens / page) * page
    return tokens


def kept_tokens(traffic: Mapping[str, Any], prompt: int) -> int:
    """Tokens of a prompt that are left after it was read; all of them unless they are pruned.

    A share of them is dropped once, rounded towards dropping more; one at least stays. A method that
    needs prompts ``longer_than`` some number of tokens leaves shorter ones whole.
    """
    if traffic["kind"] != "pruned" or prompt <= traffic.get("longer_than", 0):
        return prompt
    return max(1, int(prompt * (1 - float(_option(traffic, "compression_ratio")))))


def _quantized(
    arch: Architecture, traffic: Mapping[str, Any], prompt: int, decoded: int, b: float, batch: int
) -> int:
    return quantized_kv_bytes(
        arch,
        prompt,
        decoded,
        bits=int(_option(traffic, "bits")),
        backend=str(_option(traffic, "backend")),
        group_size=int(traffic.get("group_size", 64)),
        residual_length=int(traffic.get("residual_length", 128)),
        bytes_per_element=b,
        batch=batch,
        updates=traffic.get("updates"),
        counts_new=bool(traffic.get("counts_new", False)),
    )


def predicted_kv_bytes(
    arch: Architecture,
    traffic: Mapping[str, Any],
    prompt_tokens: int,
    new_tokens: int,
    bytes_per_element: float,
    batch: int = 1,
) -> int:
    """Bytes the cache holds after a generation: it has ``prompt + new - 1`` tokens in it.

    The last token is returned without being fed back, so its keys and values never exist.

    Parameters
    ----------
    traffic:
        The strategy's own description: ``{"kind": "none" | "dynamic" | "offloaded"}``,
        ``{"kind": "static", "max_length"}``, ``{"kind": "quantized", "bits", "backend",
        "group_size", "residual_length"}`` (with ``"updates"``, the tokens of each forward pass, if
        the cache served earlier turns too, and ``"counts_new"`` for newer releases),
        ``{"kind": "paged", "page_size"}`` (pages are whole; with a ``max_length`` it is a pool
        allocated at once), ``{"kind": "window", "sinks", "window"}`` (the first ``sinks`` and the
        last ``window`` tokens are kept) or ``{"kind": "pruned", "compression_ratio"}`` (that share
        of the prompt is dropped once it is read; with ``"longer_than"`` only from prompts of more
        tokens). ``offloaded`` may have a ``max_length`` too.

    Raises
    ------
    InputError
        If the kind is unknown or lacks one of its options.
    """
    kind = _kind(traffic)
    tokens = kept_tokens(traffic, prompt_tokens) + max(new_tokens - 1, 0)
    if kind == "none":
        return 0
    if kind == "quantized":
        return _quantized(
            arch, traffic, prompt_tokens, tokens - prompt_tokens, bytes_per_element, batch
        )
    return kv_bytes(arch, _cached(traffic, tokens), bytes_per_element, batch)


# ---------------------------------------------------------------------------- FLOPs


def forward_flops(
    arch: Architecture,
    new_tokens: int,
    past_tokens: int = 0,
    logits_kept: int = 1,
    batch: int = 1,
    attended_tokens: int | None = None,
) -> int:
    """FLOPs of one forward pass, two per multiply-add, with dense (unmasked-out) attention.

    ``batch·(2qL(hHd + 2hKd + Hdh + 3hf) + 2kVh + 4LHdq·a) + dq`` for ``q`` new tokens, ``k`` kept
    logits and ``a`` attended tokens; the last term is the table of rotary angles. Kaplan et al.
    (2020), "Scaling laws", table 1, without their simplifications. Equals torch's FlopCounterMode
    with eager attention.

    Parameters
    ----------
    attended_tokens:
        Keys each query is multiplied with; default ``past + new``. A static cache multiplies with
        its whole length, since the mask is applied afterwards.
    """
    attended = past_tokens + new_tokens if attended_tokens is None else attended_tokens
    q = new_tokens
    projections = 2 * q * arch.layers * _matrix_parameters_per_layer(arch)
    logits = 2 * logits_kept * arch.vocab_size * arch.hidden_size
    attention = 4 * arch.layers * arch.heads * arch.head_dim * q * attended
    return batch * (projections + logits + attention) + arch.head_dim * q


def masked_flops(arch: Architecture, new_tokens: int, batch: int = 1) -> int:
    """FLOPs of attention from ``q`` new tokens to later ones, ``2LHd·q(q - 1)``.

    :func:`forward_flops` counts them, as FlopCounterMode does; a causal kernel (FlashAttention: Dao
    et al. 2022) skips them, and so does the least time a machine could take.
    """
    return 2 * batch * arch.layers * arch.heads * arch.head_dim * new_tokens * (new_tokens - 1)


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


# ---------------------------------------------------------------------------- bytes moved


def decode_bytes(
    arch: Architecture,
    context: int,
    traffic: Mapping[str, Any],
    bytes_per_element: float,
    batch: int = 1,
    decoded: int = 1,
) -> int:
    """Bytes moved between memory and processor to decode one token (for each of ``batch``).

    The weights once, plus what the strategy's own code does with the keys and values ``KV(n)`` of
    ``n`` tokens per sequence. These are models read from transformers 5.15.1, not measurements:

    - ``none``: the sequence is computed again; each layer writes and reads ``KV(context)`` once.
    - ``dynamic``: ``torch.cat`` reads the old cache and writes the new one, attention reads it:
      ``3 KV`` (``DynamicLayer.update``). ``offloaded`` is the same on the device, see
      :func:`link_bytes`; with a ``max_length`` it behaves as ``static``.
    - ``static``: one token is written in place and all ``max_length`` slots are read, for masking
      does not skip reads.
    - ``quantized``: packed numbers are read, their dequantised copy written, copied together with
      the residual into one tensor, which attention reads; the residual is extended by a copy; when
      it is full the history is read and packed again (``QuantizedLayer.update``). The ``fp8``
      backend (transformers 5.23) has no residual: one byte a number is copied to append, read,
      written and read as float32, and written and read in the model's dtype.
    - ``paged``: one token is written; ``index_select`` gathers a copy, attention reads it: ``3 KV``
      (``PagedAttentionCache.update``).
    - ``window``: as ``dynamic``, over at most ``sinks + window`` tokens.
    - ``pruned``: as ``dynamic``, over the tokens that were left.

    Parameters
    ----------
    context:
        Tokens the new token attends to, itself included.
    decoded:
        How many of them came after the prompt, 1 or more (only quantised caches care).
    """
    kind = _kind(traffic)
    b = bytes_per_element
    weights = weight_bytes_read(arch, b, batch)

    def kv(tokens: int) -> int:
        return kv_bytes(arch, tokens, b, batch)

    if kind == "none":
        return weights + 2 * kv(context)
    if _preallocated(traffic):
        return weights + kv(_cached(traffic, context)) + kv(1)
    if kind == "paged":
        return weights + 3 * kv(context) + kv(1)
    if kind in ("dynamic", "offloaded", "window", "pruned"):
        kept = _cached(traffic, context)
        return weights + kv(kept - 1) + 2 * kv(kept)
    if traffic.get("backend") == "fp8":
        one = kv_elements(arch, context, batch)
        appended = one + kv_elements(arch, context - 1, batch)
        return weights + appended + one + 8 * one + 2 * kv(context)
    residual_length = int(traffic.get("residual_length", 128))
    prompt = context - decoded
    # One pass over the residual's cycle: 1, 2, ..., length - 1, then all is quantised.
    residual = (decoded - 1) % max(residual_length, 2)
    single_turn = {**traffic, "updates": None}
    stored = _quantized(arch, single_turn, prompt, decoded - 1, b, batch)
    packed = stored - kv(residual)
    moved = packed + kv(context - 1 - residual) + kv(context - 1) + 2 * kv(context)
    if residual + 1 >= residual_length and residual:
        # The packing reads the history and writes the packed form.
        return weights + moved + kv(context) + _quantized(arch, single_turn, context, 0, b, batch)
    return weights + moved + 2 * kv(residual) + kv(1)


def link_bytes(
    arch: Architecture,
    context: int,
    traffic: Mapping[str, Any],
    bytes_per_element: float,
    batch: int = 1,
) -> int:
    """Bytes that cross between host and device to decode one token.

    ``2 KV(context)`` for an offloaded cache (each layer comes in before its attention and goes out
    after it: ``Cache.update`` of transformers 5.15.1), nothing for the others.
    """
    if _kind(traffic) != "offloaded":
        return 0
    return 2 * kv_bytes(arch, _cached(traffic, context), bytes_per_element, batch)


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
        so that it says what the kernel and not what the memory can do.
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
    traffic: Mapping[str, Any],
    prompt_tokens: int,
    new_tokens: int,
    bytes_per_element: float,
    ceilings: Ceilings,
    reused_tokens: int = 0,
    batch: int = 1,
) -> Prediction:
    """Predict the least time of a generation: each forward takes max(bytes/bandwidth, FLOPs/rate).

    Williams, Waterman and Patterson (2009), "Roofline", applied to each forward pass and summed.
    Bytes are those of :func:`decode_bytes` over the read bandwidth; a pass over several tokens is
    held against the rate of a matrix product, a pass over one token against that of a
    matrix-vector product. Attention to later tokens is not counted, except where it runs over a
    preallocated cache under an explicit mask.

    Parameters
    ----------
    prompt_tokens:
        All tokens of the prompt, the reused ones included.
    reused_tokens:
        Tokens of the prompt that a cache from an earlier turn already holds.

    Raises
    ------
    InputError
        If the kind is unknown, a needed ceiling is missing, nothing is to be generated, or more
        tokens are said to be reused than a cache can hold.
    """
    # Tables ask for the same prediction once per replicate and iteration.
    described = tuple(
        (key, tuple(value) if isinstance(value, list) else value)
        for key, value in sorted(traffic.items())
    )
    sizes = (prompt_tokens, new_tokens, bytes_per_element)
    return _predicted_generation(arch, described, *sizes, ceilings, reused_tokens, batch)


@lru_cache(maxsize=65536)
def _predicted_generation(
    arch: Architecture,
    described: tuple[tuple[str, Any], ...],
    prompt_tokens: int,
    new_tokens: int,
    bytes_per_element: float,
    ceilings: Ceilings,
    reused_tokens: int,
    batch: int,
) -> Prediction:
    traffic = dict(described)
    kind = _kind(traffic)
    if prompt_tokens < 1 or new_tokens < 1:
        raise InputError("a prediction needs at least one prompt token and one new token")
    if not 0 <= reused_tokens < prompt_tokens or (kind == "none" and reused_tokens):
        raise InputError(
            f"reused_tokens is {reused_tokens}; with {prompt_tokens} prompt tokens and cache kind "
            f"{kind!r} it must be from 0 to {0 if kind == 'none' else prompt_tokens - 1}"
        )
    b = bytes_per_element
    weights = weight_bytes_read(arch, b, batch)

    def attended(tokens: int) -> int:
        return _cached(traffic, tokens) if _preallocated(traffic) or kind == "window" else tokens

    def prefill(length: int, reused: int) -> tuple[float, bool]:
        fresh = length - reused
        # Each layer writes the new keys and values once and reads those it attends to once.
        moved = weights + kv_bytes(arch, fresh + length, b, batch)
        keys = _cached(traffic, length) if _preallocated(traffic) else length
        flops = forward_flops(arch, fresh, reused, 1, batch, keys)
        if not _preallocated(traffic):
            flops -= masked_flops(arch, fresh, batch)
        link = link_bytes(arch, length, traffic, b, batch) if reused else 0
        rate = "prefill_flops_per_s" if fresh > 1 else "decode_flops_per_s"
        return _step(ceilings, moved, link, flops, rate)

    def decode(index: int) -> tuple[float, bool]:
        context = kept_tokens(traffic, prompt_tokens) + index
        if kind == "none":
            return prefill(context, 0)
        return _step(
            ceilings,
            decode_bytes(arch, context, traffic, b, batch, decoded=index),
            link_bytes(arch, context, traffic, b, batch),
            forward_flops(arch, 1, context - 1, 1, batch, attended(context)),
            "decode_flops_per_s",
        )

    first = prefill(prompt_tokens, reused_tokens)
    rest = [decode(index) for index in range(1, new_tokens)]
    waiting = sum(seconds for seconds, on_memory in [first, *rest] if on_memory)
    decoding = sum(seconds for seconds, _ in rest)
    e2e = first[0] + decoding
    return Prediction(
        ttft_s=first[0],
        tpot_s=decoding / len(rest) if rest else None,
        e2e_s=e2e,
        bound="memory" if waiting >= e2e / 2 else "compute",
    )
