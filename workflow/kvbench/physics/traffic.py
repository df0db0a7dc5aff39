"""What a cache holds and moves: one frozen class per way of keeping keys and values.

The bytes are models read from transformers 5.15.1, not measurements. Records keep a traffic as a plain
mapping with its ``kind``: :meth:`Traffic.as_dict` writes it and :func:`read` reads it back.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields
from typing import Any, ClassVar

from kvbench.errors import InputError, one_of
from kvbench.physics.architecture import Architecture, Layer

#: Values packed into one storage item by hqq, and bytes of that item (hqq/core/bitpack.py, 0.2.8).
_HQQ_PACKING = {8: (1, 1), 4: (2, 1), 3: (10, 4), 2: (4, 1), 1: (8, 1)}


# ---------------------------------------------------------------------------- numbers kept


def kv_elements(arch: Architecture, tokens: int, batch: int = 1) -> int:
    """Numbers kept for ``tokens`` tokens: ``2·K·d·tokens·batch`` a layer (a key and a value per head).

    A layer with a window keeps its window at most, one with a state keeps that too.
    """
    return batch * sum(
        count * (layer.stored * layer.reach(tokens) + layer.state + layer.float_state)
        for layer, count in arch.kinds
    )


def _bytes(arch: Architecture, tokens: Callable[[Layer], int], b: float, batch: int) -> int:
    """Bytes of ``tokens(layer)`` tokens in each layer, and of the states."""
    held = sum(count * layer.held_bytes(tokens(layer), b) for layer, count in arch.kinds)
    return int(held * batch)


def kv_bytes(arch: Architecture, tokens: int, bytes_per_element: float, batch: int = 1) -> int:
    """Bytes of an exact cache holding ``tokens`` tokens: ``2·L·K·d·b·tokens·batch``.

    A static cache holds its maximum length from the first step; pass that as ``tokens``. Ainslie
    et al. (2023), "GQA", section 2.2: only the ``K`` key/value heads are kept, not the ``H``
    query heads.
    """
    return _bytes(arch, lambda layer: layer.reach(tokens), bytes_per_element, batch)


def new_bytes(arch: Architecture, tokens: int, b: float, batch: int) -> int:
    """Bytes of the keys, values and states that ``tokens`` new tokens write, windows aside."""
    return _bytes(arch, lambda _: tokens, b, batch)


def _grown_bytes(arch: Architecture, updates: Sequence[int], b: float, batch: int) -> int:
    """Bytes behind a cache that grows by concatenation.

    A layer with a window keeps one token fewer than the window, as a view: what stays in memory is the
    last concatenation, those tokens and the newest update (``DynamicSlidingWindowLayer.update``).
    """
    total, last = sum(updates), updates[-1] if updates else 0

    def tokens(layer: Layer) -> int:
        if layer.window is None:
            return total
        return min(total - last, layer.window - 1) + last

    return _bytes(arch, tokens, b, batch)


# ---------------------------------------------------------------------------- traffic


@dataclass(frozen=True)
class Traffic:
    """How a strategy stores and moves its cache; one subclass per kind.

    Class attributes
    ----------------
    kind:
        Its name in records.
    recomputes:
        Whether every token reads the whole sequence again.

    Attributes
    ----------
    prefill_chunk:
        Tokens of a prompt per forward pass; None where all are read in one.
    """

    prefill_chunk: int | None = field(default=None, kw_only=True)

    kind: ClassVar[str]
    recomputes: ClassVar[bool] = False

    def passes(self, updates: Sequence[int]) -> list[int]:
        """Tokens of each forward pass, where every update is read in chunks."""
        size = self.prefill_chunk
        if size is None:
            return list(updates)
        found: list[int] = []
        for tokens in updates:
            whole, rest = divmod(tokens, size)
            found += [size] * whole + [rest] * bool(rest)
        return found

    def met(self, past: int) -> int:
        """Of ``past`` tokens those that a further pass over several tokens attends to."""
        return past

    def held_bytes(
        self, arch: Architecture, updates: Sequence[int], bytes_per_element: float, batch: int = 1
    ) -> int:
        """Bytes of storage after these forward passes.

        Parameters
        ----------
        updates:
            Tokens that were added, in order: the prompt, then 1 for each decoded token that was fed
            back (a generation of ``n`` tokens feeds back ``n - 1``). Each is a forward pass, or several
            where prompts are read in chunks.
        """
        raise NotImplementedError

    def padding_bytes(
        self,
        arch: Architecture,
        updates: Sequence[int],
        padding: Sequence[int],
        bytes_per_element: float,
    ) -> int:
        """Bytes of a batch's cache that padded positions before its shorter prompts take.

        What is held, less what each row would hold by itself.

        Parameters
        ----------
        updates:
            Tokens of each forward pass, as for :meth:`held_bytes`: those of the longest row.
        padding:
            Padded positions of each row, all of them in the first pass.
        """
        if not any(padding):
            return 0
        held = self.held_bytes(arch, updates, bytes_per_element)
        first, *later = updates
        return sum(
            held - self.held_bytes(arch, [first - pad, *later], bytes_per_element)
            for pad in padding
        )

    def read_bytes(
        self,
        arch: Architecture,
        context: int,
        bytes_per_element: float,
        batch: int = 1,
        decoded: int = 1,
    ) -> int:
        """Bytes moved beside the weights to decode one token.

        Parameters
        ----------
        context:
            Tokens the new token attends to, itself included.
        decoded:
            How many of them came after the prompt, 1 or more (only quantised caches care).
        """
        raise NotImplementedError

    def link_bytes(
        self, arch: Architecture, context: int, bytes_per_element: float, batch: int = 1
    ) -> int:
        """Bytes that cross between host and device to decode one token."""
        return 0

    def working_bytes(
        self, arch: Architecture, tokens: int, held: int, bytes_per_element: float
    ) -> int:
        """Bytes a conversation needs on the device while it decodes: the cache and a layer's copy of it.

        Parameters
        ----------
        held:
            What :meth:`held_bytes` says.
        """
        return held + layer_bytes(arch, tokens, bytes_per_element)

    def host_bytes(self, arch: Architecture, tokens: int, bytes_per_element: float) -> int:
        """Bytes of a conversation's cache that lie in the host's memory and not on the device."""
        return 0

    def fullest(self, tokens: int) -> tuple[int, int]:
        """Prompt and decoded tokens at which a cache of ``tokens`` tokens is largest while it decodes.

        A layer with a window holds its whole prompt until the first token is decoded, which is over before
        the next conversation's prompt is read.
        """
        return (tokens - 1, 1) if tokens > 1 else (tokens, 0)

    def kept_tokens(self, prompt: int) -> int:
        """Tokens of a prompt that are left after it was read."""
        return prompt

    def attended(self, layer: Layer, new: int, past: int) -> int:
        """Keys that each of ``new`` queries is multiplied with in a layer that has seen ``past``."""
        if layer.window is None:
            return past + new
        return min(past, layer.window - 1) + new

    def as_dict(self) -> dict[str, Any]:
        """The kind and the options, as records keep them; what is at its default None is left out."""
        return {"kind": self.kind} | {k: v for k, v in asdict(self).items() if v is not None}


def layer_bytes(arch: Architecture, tokens: int, b: float) -> int:
    """The exact cache of the largest layer."""
    return int(max(layer.held_bytes(layer.reach(tokens), b) for layer in arch.layers))


@dataclass(frozen=True)
class NoCache(Traffic):
    """Nothing is kept: the sequence is computed again, each layer writes and reads its keys once."""

    kind: ClassVar[str] = "none"
    recomputes: ClassVar[bool] = True

    def held_bytes(self, arch, updates, bytes_per_element, batch=1):
        """Nothing."""
        return 0

    def read_bytes(self, arch, context, bytes_per_element, batch=1, decoded=1):
        """One write and one read of all keys and values."""
        return 2 * new_bytes(arch, context, bytes_per_element, batch)

    def working_bytes(self, arch, tokens, held, bytes_per_element):
        """One layer's keys and values live at a time."""
        return layer_bytes(arch, tokens, bytes_per_element)

    def attended(self, layer, new, past):
        """The keys of the sequence itself, masked or not."""
        return past + new


@dataclass(frozen=True)
class Dynamic(Traffic):
    """``torch.cat`` reads the old cache and writes the new one, attention reads that: ``3 KV``."""

    kind: ClassVar[str] = "dynamic"

    def held_bytes(self, arch, updates, bytes_per_element, batch=1):
        """All tokens; in layers with a window, the window."""
        return _grown_bytes(arch, self.passes(updates), bytes_per_element, batch)

    def read_bytes(self, arch, context, bytes_per_element, batch=1, decoded=1):
        """See the class; the old cache is one token short of the new one, in a full window too."""
        new = kv_bytes(arch, context, bytes_per_element, batch)
        return 3 * new - new_bytes(arch, 1, bytes_per_element, batch)


@dataclass(frozen=True)
class Static(Traffic):
    """One token is written in place and all slots are read, for masking does not skip reads."""

    max_length: int

    kind: ClassVar[str] = "static"

    def held_bytes(self, arch, updates, bytes_per_element, batch=1):
        """All slots from the start; a layer with a window has no more than that many."""
        return kv_bytes(arch, self.max_length, bytes_per_element, batch)

    def read_bytes(self, arch, context, bytes_per_element, batch=1, decoded=1):
        """See the class."""
        held = kv_bytes(arch, self.max_length, bytes_per_element, batch)
        return held + new_bytes(arch, 1, bytes_per_element, batch)

    def padding_bytes(self, arch, updates, padding, bytes_per_element):
        """The slots they fill: a row by itself would need so many fewer."""
        held = kv_bytes(arch, self.max_length, bytes_per_element)
        return sum(
            held - kv_bytes(arch, self.max_length - pad, bytes_per_element) for pad in padding
        )

    def working_bytes(self, arch, tokens, held, bytes_per_element):
        """Nothing beside the allocation."""
        return held

    def attended(self, layer, new, past):
        """All slots; a window that overflows within a pass is concatenated first."""
        if layer.window is None or layer.window >= self.max_length:
            return self.max_length
        if past + new <= layer.window:
            return layer.window
        return min(past, layer.window - 1) + new


@dataclass(frozen=True)
class Offloaded(Traffic):
    """Layers come in before their attention and go out after it: ``2 KV`` cross the link a token.

    On the device it behaves as :class:`Dynamic`, or as :class:`Static` where it has a ``max_length``.
    States never leave the device, nor do the windows of a preallocated cache (``StaticCache`` offloads
    no sliding layer unless it is told to; transformers 5.15.1).
    """

    max_length: int | None = None

    kind: ClassVar[str] = "offloaded"

    @property
    def _inner(self) -> Traffic:
        if self.max_length is None:
            return Dynamic(prefill_chunk=self.prefill_chunk)
        return Static(self.max_length, prefill_chunk=self.prefill_chunk)

    def held_bytes(self, arch, updates, bytes_per_element, batch=1):
        """Wherever the layers are."""
        return self._inner.held_bytes(arch, updates, bytes_per_element, batch)

    def padding_bytes(self, arch, updates, padding, bytes_per_element):
        """As without offloading."""
        return self._inner.padding_bytes(arch, updates, padding, bytes_per_element)

    def read_bytes(self, arch, context, bytes_per_element, batch=1, decoded=1):
        """As without offloading."""
        return self._inner.read_bytes(arch, context, bytes_per_element, batch, decoded)

    def link_bytes(self, arch, context, bytes_per_element, batch=1):
        """Both ways (``Cache.update`` of transformers 5.15.1)."""
        return 2 * batch * self.host_bytes(arch, context, bytes_per_element)

    def host_bytes(self, arch, tokens, bytes_per_element):
        """All layers but those that stay: between two steps none of the others is on the device."""
        return int(sum(self._moving(arch, tokens, bytes_per_element)))

    def working_bytes(self, arch, tokens, held, bytes_per_element):
        """Two layers, and the copy that a concatenation makes, beside those that stay."""
        copies = 3 if self.max_length is None else 2
        moving = self._moving(arch, tokens, bytes_per_element)
        length = tokens if self.max_length is None else self.max_length
        staying = kv_bytes(arch, length, bytes_per_element) - sum(moving)
        return int(staying + min(copies, len(moving) + 1) * max(moving, default=0))

    def _moving(self, arch: Architecture, tokens: int, b: float) -> list[float]:
        """Bytes of each layer that goes out and comes in."""
        length = tokens if self.max_length is None else self.max_length
        return [
            layer.held_bytes(layer.reach(length), b)
            for layer in arch.layers
            if layer.stored and (self.max_length is None or layer.window is None)
        ]

    def attended(self, layer, new, past):
        """As without offloading."""
        return self._inner.attended(layer, new, past)


@dataclass(frozen=True)
class Paged(Traffic):
    """One token is written, ``index_select`` gathers a copy, attention reads it: ``3 KV``.

    Pages are whole; with a ``max_length`` they come from a pool that is allocated at once
    (``PagedAttentionCache.update``).
    """

    page_size: int | None = None
    max_length: int | None = None

    kind: ClassVar[str] = "paged"

    def held_bytes(self, arch, updates, bytes_per_element, batch=1):
        """The pool, or whole pages."""
        tokens = sum(updates)
        if self.max_length is not None:
            tokens = self.max_length
        elif self.page_size is not None:
            tokens = math.ceil(tokens / self.page_size) * self.page_size
        return kv_bytes(arch, tokens, bytes_per_element, batch)

    def read_bytes(self, arch, context, bytes_per_element, batch=1, decoded=1):
        """See the class."""
        gathered = 3 * kv_bytes(arch, context, bytes_per_element, batch)
        return gathered + new_bytes(arch, 1, bytes_per_element, batch)


@dataclass(frozen=True)
class Window(Traffic):
    """As :class:`Dynamic`, over the first ``sinks`` tokens and the newest ``window``.

    A layer whose own window is no wider keeps that one, with the library's class.
    """

    window: int
    sinks: int = 0

    kind: ClassVar[str] = "window"

    def _slots(self, layer: Layer, tokens: int) -> int:
        if layer.window is not None and layer.window <= self.window:
            return layer.reach(tokens)
        return min(tokens, self.sinks + self.window)

    def held_bytes(self, arch, updates, bytes_per_element, batch=1):
        """Sinks and window at most."""
        passes = self.passes(updates)
        total, last = sum(passes), passes[-1] if passes else 0

        def tokens(layer: Layer) -> int:
            if layer.window is not None and layer.window <= self.window:
                return min(total - last, layer.window - 1) + last
            return self._slots(layer, total)

        return _bytes(arch, tokens, bytes_per_element, batch)

    def read_bytes(self, arch, context, bytes_per_element, batch=1, decoded=1):
        """As a growing cache of that length."""
        new = _bytes(arch, lambda layer: self._slots(layer, context), bytes_per_element, batch)
        return 3 * new - new_bytes(arch, 1, bytes_per_element, batch)

    def met(self, past):
        """What is kept of them."""
        return min(past, self.sinks + self.window)

    def attended(self, layer, new, past):
        """What was kept and all that is new when several tokens are read, what is kept when one is."""
        if new > 1:
            return super().attended(layer, new, self.met(past))
        return self._slots(layer, past + new)


@dataclass(frozen=True)
class Pruned(Traffic):
    """As :class:`Dynamic`, over what is left of the prompt, and all new tokens.

    A share of the prompt is dropped once it is read, rounded towards dropping more; one token at least
    stays. A method that needs prompts ``longer_than`` some number of tokens leaves shorter ones whole.
    """

    compression_ratio: float
    longer_than: int | None = None

    kind: ClassVar[str] = "pruned"

    def kept_tokens(self, prompt):
        """Tokens of the prompt that are left."""
        if prompt <= (self.longer_than or 0):
            return prompt
        return max(1, int(prompt * (1 - self.compression_ratio)))

    def fullest(self, tokens):
        """All of it a prompt: what is decoded then comes on top of what is left."""
        return tokens, 0

    def held_bytes(self, arch, updates, bytes_per_element, batch=1):
        """What is left of the first update, and all later ones."""
        kept = [self.kept_tokens(updates[0]), *updates[1:]] if updates else []
        return _grown_bytes(arch, kept, bytes_per_element, batch)

    def read_bytes(self, arch, context, bytes_per_element, batch=1, decoded=1):
        """As a growing cache of that length."""
        return Dynamic().read_bytes(arch, context, bytes_per_element, batch)


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


@dataclass(frozen=True)
class Quantized(Traffic):
    """Packed numbers are read, their dequantised copy is written, joined to the residual and read.

    The residual is extended by a copy; when it is full the history is read and packed again
    (``QuantizedLayer.update``). Liu et al. (2024), "KIVI", section 3, for the idea (grouped low-bit
    storage beside a full-precision residual); the layout is that of transformers 5.15.1 with
    optimum-quanto 0.2.7 on axis 0 or hqq 0.2.8 on axis 1. The ``fp8`` backend (transformers 5.23) has no
    residual: every number, the newest too, is one float8 byte, with one float32 scale each for the keys
    and the values of a layer; a number is copied to append, read, written and read as float32, and
    written and read in the model's dtype.

    Attributes
    ----------
    bits, backend, group_size, residual_length:
        The cache's options; ``backend`` is ``quanto``, ``hqq`` or ``fp8``.
    counts_new:
        See :func:`residual_tokens`; None for the older rule.
    """

    bits: int
    backend: str
    group_size: int = 64
    residual_length: int = 128
    counts_new: bool | None = None

    kind: ClassVar[str] = "quantized"

    def held_bytes(self, arch, updates, bytes_per_element, batch=1):
        """Packed numbers, scales, shifts and the full-precision rest, to the byte.

        Raises
        ------
        InputError
            If the backend is unknown or cannot store such groups.
        """
        tokens = sum(updates)
        if self.backend == "fp8":
            if self.bits != 8:
                raise InputError(f"quantized cache: bits is {self.bits}; the fp8 backend has 8")
            return kv_elements(arch, tokens, batch) + 2 * len(arch.layers) * 4
        if self.backend not in ("quanto", "hqq"):
            raise InputError(f"quantized cache: backend {self.backend!r} is not quanto, hqq or fp8")
        passes = self.passes(updates)
        residual = residual_tokens(passes, self.residual_length, bool(self.counts_new))
        return self._bytes(arch, tokens, residual, bytes_per_element, batch)

    def _bytes(self, arch: Architecture, tokens: int, residual: int, b: float, batch: int) -> int:
        total = 0
        for layer, count in arch.kinds:
            if layer.window is not None or layer.state or layer.float_state:
                raise InputError(
                    "a quantised cache has neither windows nor states; this model's layers do"
                )
            for size in (layer.key_size, layer.value_size):
                elements = (tokens - residual) * layer.kv_heads * size * batch
                total += count * _packed_bytes(
                    elements, self.bits, self.backend, self.group_size, b
                )
        return total + kv_bytes(arch, residual, b, batch)

    def read_bytes(self, arch, context, bytes_per_element, batch=1, decoded=1):
        """See the class."""
        b = bytes_per_element
        if self.backend == "fp8":
            one = kv_elements(arch, context, batch)
            appended = one + kv_elements(arch, context - 1, batch)
            return appended + one + 8 * one + 2 * kv_bytes(arch, context, b, batch)

        def kv(tokens: int) -> int:
            return kv_bytes(arch, tokens, b, batch)

        prompt = context - decoded
        # One pass over the residual's cycle: 1, 2, ..., length - 1, then all is quantised.
        residual = (decoded - 1) % max(self.residual_length, 2)
        if self.prefill_chunk is not None:
            # Later chunks of the prompt joined the residual.
            passes = self.passes([prompt] + [1] * (decoded - 1))
            residual = residual_tokens(passes, self.residual_length, bool(self.counts_new))
        stored = self.held_bytes(arch, [prompt] + [1] * (decoded - 1), b, batch)
        packed = stored - kv(residual)
        moved = packed + kv(context - 1 - residual) + kv(context - 1) + 2 * kv(context)
        if residual + 1 >= self.residual_length and residual:
            # The packing reads the history and writes the packed form.
            return moved + kv(context) + self._bytes(arch, context, 0, b, batch)
        return moved + 2 * kv(residual) + kv(1)

    def fullest(self, tokens):
        """Most is stored just before the full-precision residual is packed."""
        if self.backend == "fp8":
            return tokens, 0
        if self.prefill_chunk is not None:
            # The last chunks of a prompt are in full precision too, as long as they find room.
            most = max(self.residual_length, 2) - 1 + self.prefill_chunk

            def residual(decoded: int) -> int:
                passes = self.passes([tokens - decoded] + [1] * decoded)
                return residual_tokens(passes, self.residual_length, bool(self.counts_new))

            decoded = max(range(min(most, tokens - 1) + 1), key=residual)
            return tokens - decoded, decoded
        decoded = min(max(self.residual_length, 2) - 1, tokens - 1)
        return tokens - decoded, decoded


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
    """Bytes a ``QuantizedCache`` of transformers really holds; see :class:`Quantized`.

    Parameters
    ----------
    prompt_tokens, new_tokens_in_cache:
        Tokens of the first forward pass, and those added one by one since.
    updates:
        Tokens of each forward pass when the cache served several turns; replaces the two counts.
    """
    if updates is None:
        updates = [prompt_tokens] + [1] * new_tokens_in_cache
    traffic = Quantized(bits, backend, group_size, residual_length, counts_new)
    return traffic.held_bytes(arch, updates, bytes_per_element, batch)


#: The kinds of traffic, by their name in records.
KINDS: dict[str, type[Traffic]] = {
    cls.kind: cls for cls in (NoCache, Dynamic, Static, Quantized, Offloaded, Paged, Window, Pruned)
}


def read(found: Mapping[str, Any] | Traffic) -> Traffic:
    """A traffic from its plain form, such as a record keeps it.

    Raises
    ------
    InputError
        If the kind is unknown or lacks one of its options.
    """
    if isinstance(found, Traffic):
        return found
    kind = found.get("kind")
    one_of("traffic kind", kind, KINDS)
    options = {}
    for option in fields(KINDS[kind]):
        if option.name in found:
            options[option.name] = found[option.name]
        elif option.default is MISSING:
            raise InputError(f"traffic of kind {kind!r} lacks {option.name!r}")
    return KINDS[kind](**options)
