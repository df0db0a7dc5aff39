"""Dynamic caches: keys and values grow with the conversation, one concatenation per token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from kvbench import physics
from kvbench.inputs.models import LoadedModel
from kvbench.physics import Traffic
from kvbench.strategies import shape
from kvbench.strategies.base import GenerateSession, Session, Strategy, text_config
from kvbench.strategies.options import option


@dataclass(frozen=True)
class Dynamic(Strategy):
    """Grows by one token per step (``transformers.DynamicCache``): the library's default.

    Parameters
    ----------
    prefill_chunk:
        Prompt tokens per forward pass; 0 reads the whole prompt in one.
    """

    prefill_chunk: int = option(
        0, "chunk", least=0, label="prompt in chunks of {}", label_pt="prompt em pedaços de {}"
    )

    name: ClassVar[str] = "dynamic"

    def misfit(self, model: LoadedModel) -> str | None:
        """The library hands on keys and values from chunk to chunk, and no states."""
        if self.prefill_chunk and {"state", "hybrid"} & set(shape.layer_kinds(model)):
            return (
                f"{self.id}: the library reads prompts in chunks only where no layer keeps a state"
            )
        return super().misfit(model)

    def traffic(self, max_length: int) -> Traffic:
        """Concatenation copies the cache at every step."""
        return physics.Dynamic()

    def session(self, model: LoadedModel, max_length: int, batch: int = 1) -> Session:
        """Open a conversation; see :meth:`Strategy.session`."""
        from transformers import DynamicCache

        settings = {"prefill_chunk_size": self.prefill_chunk} if self.prefill_chunk else {}
        return GenerateSession(model, lambda: DynamicCache(config=text_config(model)), **settings)


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
        return physics.Offloaded()

    def session(self, model: LoadedModel, max_length: int, batch: int = 1) -> Session:
        """Open a conversation; see :meth:`Strategy.session`."""
        from transformers import DynamicCache

        config = text_config(model)
        return GenerateSession(model, lambda: DynamicCache(config=config, offloading=True))
