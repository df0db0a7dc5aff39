"""Quantised caches: fewer bits per key and value, bought with work at every step."""

from __future__ import annotations

import importlib.util
import os
import sys
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any, ClassVar

from kvbench import physics
from kvbench.inputs.models import LoadedModel
from kvbench.physics import Traffic
from kvbench.strategies import shape
from kvbench.strategies.base import GenerateSession, Session, Strategy, text_config


@dataclass(frozen=True)
class Quantized(Strategy):
    """A ``transformers.QuantizedCache``: old tokens in few bits, the newest in full precision.

    After KIVI (Liu et al. 2024, arXiv 2402.02750), but per token, in groups of channels, for
    keys and values alike, where KIVI takes its keys per channel.
    The whole history is quantised again whenever the full-precision rest is full, and
    dequantised at every step.

    Parameters
    ----------
    bits:
        Bits per stored number.
    group_size:
        Numbers that share one scale.
    residual_length:
        Newest tokens kept in full precision, at most.
    """

    bits: int = 4
    group_size: int = 64
    residual_length: int = 128

    exact: ClassVar[bool] = False
    layers: ClassVar[frozenset[str]] = frozenset({"full"})
    backend: ClassVar[str]
    package: ClassVar[str]
    axis: ClassVar[int]

    def needs(self) -> tuple[str, ...]:
        """Optional packages that transformers must see while this strategy runs."""
        return (self.backend,)

    def available(self, model: LoadedModel | None, device: str) -> str | None:
        """The backend is an optional package."""
        module = {"quanto": "optimum.quanto", "hqq": "hqq"}[self.backend]
        try:
            found = importlib.util.find_spec(module) is not None
        except ModuleNotFoundError:
            found = False
        if not found:
            return (
                f"{type(self).name} needs the package {self.package} (pip install {self.package})"
            )
        return super().available(model, device)

    def misfit(self, model: LoadedModel) -> str | None:
        """Groups must divide what a head keeps of a token."""
        reason = super().misfit(model)
        if reason:
            return reason
        for size in _head_sizes(model):
            if size % self.group_size:
                return (
                    f"{type(self).name} groups {self.group_size} numbers under one scale, which does "
                    f"not divide the model's head size of {size}"
                )
        return None

    def small(self) -> Strategy:
        """A rest of few tokens, so that a short conversation packs it."""
        return replace(self, residual_length=4)

    def traffic(self, max_length: int) -> Traffic:
        """Bits, groups and the full-precision rest decide both size and traffic."""
        # When the full-precision rest counts as full; see kvbench.physics.residual_tokens.
        counts_new = "key_states.shape[-2] >= self.residual_length" in _cache_source()
        return physics.Quantized(
            self.bits, self.backend, self.group_size, self.residual_length, counts_new or None
        )

    def session(self, model: LoadedModel, max_length: int) -> Session:
        """Open a conversation; see :meth:`Strategy.session`."""
        use_own_ninja()
        return GenerateSession(model, lambda: self.cache(model))

    def cache(self, model: LoadedModel) -> Any:
        """A new, empty cache of this kind."""
        from transformers import QuantizedCache

        return QuantizedCache(
            backend=self.backend,
            config=text_config(model),
            nbits=self.bits,
            axis_key=self.axis,
            axis_value=self.axis,
            q_group_size=self.group_size,
            residual_length=self.residual_length,
        )


def _cache_source() -> str:
    """Source of the installed library's caches: what it can do, without importing it."""
    package = importlib.util.find_spec("transformers")
    if package is None:
        # Capacity is planned where there is no transformers.
        return ""
    return Path(package.origin).with_name("cache_utils.py").read_text(encoding="utf-8")


def use_own_ninja() -> None:
    """Put this interpreter's programs first on PATH.

    quanto's extension is built by whichever ninja is found, and another version builds it anew, which
    takes a minute; the installed environment brings the one it was built with.
    """
    own = str(Path(sys.executable).parent)
    paths = os.environ.get("PATH", "").split(os.pathsep)
    if paths[0] != own:
        os.environ["PATH"] = os.pathsep.join([own, *paths])


def _head_sizes(model: LoadedModel) -> list[int]:
    """Numbers that a head keeps of a token, different ones once."""
    arch = shape.architecture(model)
    if arch is None:
        # What most families call it; where that is wrong, the trial finds out.
        config = text_config(model)
        size = getattr(config, "head_dim", None)
        heads = getattr(config, "num_attention_heads", None)
        return [size or config.hidden_size // heads] if size or heads else []
    return sorted({size for layer in arch.layers for size in (layer.key_size, layer.value_size)})


@dataclass(frozen=True)
class QuantizedInt4(Quantized):
    """Four bits through optimum-quanto."""

    name: ClassVar[str] = "quantized_int4"
    backend: ClassVar[str] = "quanto"
    package: ClassVar[str] = "optimum-quanto"
    axis: ClassVar[int] = 0


@dataclass(frozen=True)
class QuantizedInt2(QuantizedInt4):
    """Two bits through optimum-quanto."""

    name: ClassVar[str] = "quantized_int2"
    bits: int = 2


@dataclass(frozen=True)
class QuantizedHqqInt8(Quantized):
    """Eight bits through HQQ (half-quadratic quantisation)."""

    name: ClassVar[str] = "quantized_hqq_int8"
    backend: ClassVar[str] = "hqq"
    package: ClassVar[str] = "hqq"
    axis: ClassVar[int] = 1
    bits: int = 8


@dataclass(frozen=True)
class QuantizedHqqInt4(QuantizedHqqInt8):
    """Four bits through HQQ."""

    name: ClassVar[str] = "quantized_hqq_int4"
    bits: int = 4


@dataclass(frozen=True)
class QuantizedFp8(Strategy):
    """Eight-bit floating point (E4M3) with the library's own ``fp8`` backend."""

    name: ClassVar[str] = "quantized_fp8"
    exact: ClassVar[bool] = False
    layers: ClassVar[frozenset[str]] = frozenset({"full"})

    def available(self, model: LoadedModel | None, device: str) -> str | None:
        """The backend came with a later transformers; its source says whether it is there."""
        if "fp8" not in _cache_source().lower():
            return (
                "quantized_fp8 needs a transformers with the fp8 cache backend (5.23 has it); "
                f"installed is {metadata.version('transformers')}"
            )
        return super().available(model, device)

    def traffic(self, max_length: int) -> Traffic:
        """One byte per number, and two scales per layer."""
        return physics.Quantized(8, "fp8")

    def session(self, model: LoadedModel, max_length: int) -> Session:
        """Open a conversation; see :meth:`Strategy.session`."""
        from transformers import QuantizedCache

        config = text_config(model)
        return GenerateSession(model, lambda: QuantizedCache(backend="fp8", config=config))
