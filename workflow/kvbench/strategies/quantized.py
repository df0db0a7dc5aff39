"""Quantised caches: fewer bits per key and value, bought with work at every step."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any, ClassVar

from kvbench import physics
from kvbench.inputs.models import LoadedModel
from kvbench.physics import Architecture, Traffic
from kvbench.strategies import options as _options
from kvbench.strategies import shape
from kvbench.strategies.base import GenerateSession, Preset, Session, Strategy, text_config
from kvbench.strategies.options import option

#: Of each backend: the package it needs, that package's module, the axis along which it groups (of those
#: it knows, the one the library takes), and the bits it stores.
_BACKENDS = {
    "quanto": ("optimum-quanto", "optimum.quanto", 0, (2, 4)),
    "hqq": ("hqq", "hqq", 1, (1, 2, 3, 4, 8)),
}

#: Rows of groups that HQQ packs into one byte, by bits: it loses the rest of a number of rows that this
#: does not divide.
_HQQ_ROWS = {1: 8, 2: 4, 4: 2}

#: The library's own backend, which has one format.
_FP8 = "fp8"


@dataclass(frozen=True)
class Quantized(Strategy):
    """A ``transformers.QuantizedCache``: old tokens in few bits, the newest in full precision.

    After KIVI (Liu et al. 2024, arXiv 2402.02750), but per token, in groups of channels, for
    keys and values alike, where KIVI takes its keys per channel.
    The whole history is quantised again whenever the full-precision rest is full, and
    dequantised at every step. Of a prompt read in chunks the first is packed at once, and later ones
    attend to what was packed and join the rest. The ``fp8`` backend keeps every token in
    eight-bit floating point (E4M3), without groups or rest.

    Parameters
    ----------
    backend:
        Who packs: optimum-quanto (2 or 4 bits), HQQ (1, 2, 3, 4 or 8), or the library's own fp8 (8).
    bits:
        Bits per stored number.
    group_size:
        Numbers that share one scale.
    residual:
        Newest tokens kept in full precision, at most.
    """

    backend: str = option("quanto", "", choices=(*_BACKENDS, _FP8), always=True, label="{}")
    bits: int = option(4, "b", choices=(1, 2, 3, 4, 8), always=True, label="{} bits")
    group_size: int = option(64, "g", least=8, label="groups of {}", label_pt="grupos de {}")
    residual: int = option(128, "r", least=1, label="rest of {}", label_pt="resto de {}")

    name: ClassVar[str] = "quantized"
    exact: ClassVar[bool] = False
    layers: ClassVar[frozenset[str]] = frozenset({"full"})
    presets: ClassVar[Mapping[str, Preset]] = {
        "quantized_int4": Preset("Four bits through optimum-quanto."),
        "quantized_int2": Preset("Two bits through optimum-quanto.", {"bits": 2}),
        "quantized_hqq_int8": Preset(
            "Eight bits through HQQ (half-quadratic quantisation).", {"backend": "hqq", "bits": 8}
        ),
        "quantized_hqq_int4": Preset("Four bits through HQQ.", {"backend": "hqq"}),
        "quantized_fp8": Preset(
            "Eight-bit floating point (E4M3) with the library's own ``fp8`` backend.",
            {"backend": _FP8, "bits": 8},
        ),
    }

    def contradiction(self) -> str | None:
        """Each backend has its own numbers of bits; fp8 has nothing else to choose."""
        bits = (8,) if self.backend == _FP8 else _BACKENDS[self.backend][3]
        if self.bits not in bits:
            known = " or ".join(map(str, bits))
            return (
                f"backend {self.backend} stores {known} bits, not {self.bits}; set bits to {known}"
            )
        usual = _options.of(type(self))
        for name in ("group_size", "residual"):
            if self.backend == _FP8 and getattr(self, name) != usual[name].default:
                return f"backend {_FP8} has no {name}; leave it out"
        return super().contradiction()

    def needs(self) -> tuple[str, ...]:
        """Optional packages that transformers must see while this strategy runs."""
        return () if self.backend == _FP8 else (self.backend,)

    def available(self, model: LoadedModel | None, device: str) -> str | None:
        """The backend is an optional package, or came with a later transformers."""
        if self.backend == _FP8:
            # Its source says whether it is there.
            if _FP8 not in _cache_source().lower():
                return (
                    f"{self.id} needs a transformers with the fp8 cache backend (5.23 has it); "
                    f"installed is {metadata.version('transformers')}"
                )
            return super().available(model, device)
        package, module = _BACKENDS[self.backend][:2]
        try:
            found = importlib.util.find_spec(module) is not None
        except ModuleNotFoundError:
            found = False
        if not found:
            return f"{self.id} needs the package {package} (pip install {package})"
        return super().available(model, device)

    def misfit(self, model: LoadedModel) -> str | None:
        """Of a family that nobody has described, the size of a head is what most call it."""
        reason = super().misfit(model)
        if reason or shape.architecture(model) is not None:
            return reason
        return self._indivisible(_named_head_size(model))

    def unfit(self, kinds: Sequence[str], arch: Architecture | None) -> str | None:
        """Groups must divide what a head keeps of a token."""
        reason = super().unfit(kinds, arch)
        if reason or arch is None or self.backend == _FP8:
            return reason
        sizes = {size for layer in arch.layers for size in (layer.key_size, layer.value_size)}
        reason = self._indivisible(sorted(sizes))
        if reason is None and self.backend == "hqq":
            return self._unpackable(arch)
        return reason

    def _indivisible(self, head_sizes: Sequence[int]) -> str | None:
        """Why one scale would stand for numbers of two tokens, or None."""
        for size in head_sizes if self.backend != _FP8 else ():
            if size % self.group_size:
                return (
                    f"{self.id} groups {self.group_size} numbers under one scale, which does "
                    f"not divide the model's head size of {size}"
                )
        return None

    def _unpackable(self, arch: Architecture) -> str | None:
        """What HQQ would not give back whole, whatever the length of the prompt."""
        rows = _HQQ_ROWS.get(self.bits, 1)
        for layer in arch.layers:
            for size in (layer.key_size, layer.value_size):
                groups = layer.kv_heads * size // self.group_size
                if groups % rows:
                    return (
                        f"{self.id}: HQQ packs {rows} groups of {self.bits} bits together, and a token of "
                        f"this model has {groups} of {self.group_size} numbers"
                    )
        return None

    def small(self) -> Strategy:
        """A rest of few tokens, so that a short conversation packs it."""
        found = super().small()
        return found if self.backend == _FP8 else replace(found, residual=4)

    def traffic(self, max_length: int) -> Traffic:
        """Bits, groups and the full-precision rest decide both size and traffic."""
        if self.backend == _FP8:
            # One byte per number, and two scales per layer.
            return physics.Quantized(8, _FP8, prefill_chunk=self.chunk)
        # When the full-precision rest counts as full; see kvbench.physics.residual_tokens.
        counts_new = "key_states.shape[-2] >= self.residual_length" in _cache_source()
        return physics.Quantized(
            self.bits,
            self.backend,
            self.group_size,
            self.residual,
            counts_new or None,
            prefill_chunk=self.chunk,
        )

    def session(self, model: LoadedModel, max_length: int, batch: int = 1) -> Session:
        """Open a conversation; see :meth:`Strategy.session`."""
        use_own_ninja()
        return GenerateSession(model, lambda: self.cache(model), self.chunk)

    def cache(self, model: LoadedModel) -> Any:
        """A new, empty cache of this kind."""
        from transformers import QuantizedCache

        if self.backend == _FP8:
            return QuantizedCache(backend=_FP8, config=text_config(model))
        axis = _BACKENDS[self.backend][2]
        return QuantizedCache(
            backend=self.backend,
            config=text_config(model),
            nbits=self.bits,
            axis_key=axis,
            axis_value=axis,
            q_group_size=self.group_size,
            residual_length=self.residual,
        )


def _cache_source() -> str:
    """Source of the installed library's caches: what it can do, without importing it."""
    # Capacity is planned where there is no transformers.
    return shape.library_source("cache_utils.py") or ""


def use_own_ninja() -> None:
    """Put this interpreter's programs first on PATH.

    quanto's extension is built by whichever ninja is found, and another version builds it anew, which
    takes a minute; the installed environment brings the one it was built with.
    """
    own = str(Path(sys.executable).parent)
    paths = os.environ.get("PATH", "").split(os.pathsep)
    if paths[0] != own:
        os.environ["PATH"] = os.pathsep.join([own, *paths])


def _named_head_size(model: LoadedModel) -> list[int]:
    """Numbers of a head by the names that most families have for it; where they lack, none.

    Where that is wrong, the trial finds out.
    """
    config = text_config(model)
    size = getattr(config, "head_dim", None)
    heads = getattr(config, "num_attention_heads", None)
    return [size or config.hidden_size // heads] if size or heads else []
