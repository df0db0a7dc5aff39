"""No cache: every token recomputes the keys and values of the whole history."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from kvbench.inputs.models import LoadedModel
from kvbench.strategies.base import GenerateSession, Session, Strategy


@dataclass(frozen=True)
class NoCache(Strategy):
    """Keeps nothing (``use_cache=False``): the control that every cache is compared with."""

    name: ClassVar[str] = "none"

    def traffic(self, max_length: int) -> dict[str, Any]:
        """Recomputation reads the weights and writes no cache."""
        return {"kind": "none"}

    def session(self, model: LoadedModel, max_length: int) -> Session:
        """Open a conversation; see :meth:`Strategy.session`."""
        return GenerateSession(model, lambda: None, use_cache=False)
