"""No cache: every token recomputes the keys and values of the whole history."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from kvbench import physics
from kvbench.inputs.models import LoadedModel
from kvbench.physics import Architecture, Traffic
from kvbench.strategies.base import GenerateSession, Session, Strategy


@dataclass(frozen=True)
class NoCache(Strategy):
    """Keeps nothing (``use_cache=False``): the control that every cache is compared with."""

    name: ClassVar[str] = "none"
    unchunked: ClassVar[str] = "keeps nothing from one chunk of a prompt to the next"

    def misfit(self, model: LoadedModel) -> str | None:
        """Every model can do without a cache."""
        return None

    def unfit(self, kinds: Sequence[str], arch: Architecture | None) -> str | None:
        """Nothing is kept, so that nothing can be missing."""
        return None

    def traffic(self, max_length: int) -> Traffic:
        """Recomputation reads the weights and writes no cache."""
        return physics.NoCache()

    def session(self, model: LoadedModel, max_length: int, batch: int = 1) -> Session:
        """Open a conversation; see :meth:`Strategy.session`."""
        return GenerateSession(model, lambda: None, use_cache=False)
