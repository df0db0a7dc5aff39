"""Static caches: room for the longest conversation is allocated once and filled in place."""

from __future__ import annotations

import getpass
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from kvbench import physics
from kvbench.inputs.models import LoadedModel
from kvbench.physics import Architecture, Traffic
from kvbench.strategies import shape
from kvbench.strategies.base import (
    PersistentCacheSession,
    Session,
    Strategy,
    allocated_static_cache,
)
from kvbench.strategies.options import option

if TYPE_CHECKING:
    from transformers import Cache

#: First version of transformers whose Bloom fails on a static cache, and the first that does not again,
#: of those that were tried: 5.17 runs it, 5.18 and 5.20 do not, 5.23 does.
_BLOOM_FAILS = ((5, 18), (5, 23))
#: Who multiplies one row with the weights.
LIBRARY, GENERATED = "library", "generated"


@dataclass(frozen=True)
class Static(Strategy):
    """Fills a preallocated ``transformers.StaticCache``; its size is the conversation's limit.

    The same name means different things on different devices, because ``generate`` compiles the
    decoding step by itself on CUDA and not on a CPU; the record's ``compiled`` says which.
    """

    name: ClassVar[str] = "static"

    def unfit(self, kinds: Sequence[str], arch: Architecture | None) -> str | None:
        """Some versions of the library give Bloom's alibi a mask that it cannot read."""
        if arch is not None and arch.family == "bloom":
            version = shape.library_version()
            if version is not None and _BLOOM_FAILS[0] <= version < _BLOOM_FAILS[1]:
                return (
                    f"{self.id}: transformers {version[0]}.{version[1]} cannot run Bloom on a static "
                    "cache"
                )
        return super().unfit(kinds, arch)

    def compiled(self, device: str) -> bool:
        """Whether the decoding step runs as a compiled graph on ``device``."""
        return device == "cuda"

    def traffic(self, max_length: int) -> Traffic:
        """Attention reads the whole allocation, whatever is in it."""
        return physics.Static(max_length, prefill_chunk=self.chunk)

    def session(self, model: LoadedModel, max_length: int, batch: int = 1) -> Session:
        """Open a conversation; see :meth:`Strategy.session`."""
        compiled = self.compiled(model.model.device.type)
        cache = allocated_static_cache(model, max_length, batch)
        return PersistentCacheSession(model, cache, self.chunk, disable_compile=not compiled)


@dataclass(frozen=True)
class StaticCompiled(Static):
    """The static cache with the decoding step compiled by torch.compile, on a CPU too.

    Parameters
    ----------
    products:
        Who multiplies one row with the weights on a CPU: the library that torch calls, or a loop that is
        generated for it and reads them faster.
    """

    products: str = option(
        LIBRARY,
        "",
        choices=(LIBRARY, GENERATED),
        label="generated products",
        label_pt="produtos gerados",
    )

    name: ClassVar[str] = "static_compiled"

    def compiled(self, device: str) -> bool:
        """Whether the decoding step runs as a compiled graph on ``device``."""
        return True

    def available(self, model: LoadedModel | None, device: str) -> str | None:
        """Compiling for a CPU needs a C++ compiler."""
        import shutil

        name_the_compilers_cache()

        if self.products == GENERATED and device != "cpu":
            return f"{self.id} needs a cpu device: elsewhere the library's products are generated already"
        if device == "cpu" and not (shutil.which("g++") or shutil.which("clang++")):
            return "static_compiled needs a C++ compiler on a CPU (Debian package g++)"
        return super().available(model, device)

    def session(self, model: LoadedModel, max_length: int, batch: int = 1) -> Session:
        """Open a conversation; see :meth:`Strategy.session`."""
        from transformers import CompileConfig

        device = model.model.device.type
        mode = "reduce-overhead" if device == "cuda" else "default"
        options = None
        if self.products == GENERATED:
            from kvbench.engines.inductor import generated_products

            mode, options = None, {"post_grad_custom_pre_pass": generated_products()}
        config = CompileConfig(mode=mode, options=options, dynamic=False)
        # generate() compiles by itself only on accelerators; this is its own switch for a CPU.
        config._compile_all_devices = True
        cache = allocated_static_cache(model, max_length, batch)
        return PersistentCacheSession(
            model, cache, self.chunk, disable_compile=False, compile_config=config
        )


def name_the_compilers_cache() -> None:
    """Give torch a folder for what it compiles where the user has no name to call it by."""
    try:
        getpass.getuser()
    except (KeyError, OSError, ImportError):
        folder = Path(tempfile.gettempdir()) / f"torchinductor_{os.getuid()}"
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(folder))


@dataclass(frozen=True)
class OffloadedStatic(Strategy):
    """The static cache with all layers but the working ones in host memory."""

    name: ClassVar[str] = "offloaded_static"
    devices: ClassVar[frozenset[str]] = frozenset({"cuda"})

    def traffic(self, max_length: int) -> Traffic:
        """The whole allocation crosses the bus at every step."""
        return physics.Offloaded(max_length, prefill_chunk=self.chunk)

    def session(self, model: LoadedModel, max_length: int, batch: int = 1) -> Session:
        """Open a conversation; see :meth:`Strategy.session`."""
        cache = allocated_static_cache(model, max_length, batch, offloading=True)
        fetch_in_order(cache)
        return PersistentCacheSession(model, cache, self.chunk)


def fetch_in_order(cache: Cache) -> None:
    """Let a layer be fetched only when what was asked of the GPU before has been done.

    Fetching has a stream of its own, and takes the memory of the layer that has just been given back,
    which attention may still be reading. Before version 5.23 the library did not wait for it there, and a
    busy GPU gave wrong tokens; with those that do, to wait twice costs nothing.
    """
    import torch

    fetch = cache.prefetch

    def in_order(*given: Any) -> None:
        cache.prefetch_stream.wait_stream(torch.cuda.current_stream())
        fetch(*given)

    cache.prefetch = in_order
