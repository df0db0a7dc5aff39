"""Dynamic caches: keys and values grow with the conversation, one concatenation per token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from kvbench import physics
from kvbench.inputs.models import LoadedModel
from kvbench.physics import Traffic
from kvbench.strategies.base import GenerateSession, Session, Strategy, text_config


@dataclass(frozen=True)
class Dynamic(Strategy):
    """Grows by one token per step (``transformers.DynamicCache``): the library's default."""

    name: ClassVar[str] = "dynamic"

    def traffic(self, max_length: int) -> Traffic:
        """Concatenation copies the cache at every step."""
        return physics.Dynamic(prefill_chunk=self.chunk)

    def session(self, model: LoadedModel, max_length: int, batch: int = 1) -> Session:
        """Open a conversation; see :meth:`Strategy.session`."""
        from transformers import DynamicCache

        config = text_config(model)
        return GenerateSession(model, lambda: DynamicCache(config=config), self.chunk)


@dataclass(frozen=True)
class Offloaded(Strategy):
    """Keeps all layers but two in host memory (``DynamicCache(offloading=True)``).

    The transfers overlap with the layers' computation on a CUDA stream of their own, so there is
    nothing to offload to on a CPU.
    """

    name: ClassVar[str] = "offloaded"
    devices: ClassVar[frozenset[str]] = frozenset({"cuda"})

    def traffic(self, max_length: int) -> Traffic:
        """The cache crosses the bus to the host in both directions at every step."""
        return physics.Offloaded(prefill_chunk=self.chunk)

    def session(self, model: LoadedModel, max_length: int, batch: int = 1) -> Session:
        """Open a conversation; see :meth:`Strategy.session`."""
        from transformers import DynamicCache

        config = text_config(model)
        return GenerateSession(
            model, lambda: DynamicCache(config=config, offloading=True), self.chunk
        )
