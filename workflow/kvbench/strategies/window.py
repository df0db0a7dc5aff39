"""Caches of bounded length: the newest tokens, with or without the first ones of the context."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache as once
from typing import TYPE_CHECKING, Any, ClassVar

from kvbench.inputs.models import LoadedModel
from kvbench.strategies.base import GenerateSession, Session, Strategy, text_config

if TYPE_CHECKING:
    from transformers import Cache


@dataclass(frozen=True)
class SlidingWindow(Strategy):
    """Keeps the newest ``window`` tokens and drops the rest.

    The prompt is read with attention to all of it; what falls out of the window is dropped after
    that, and every token decoded attends to the window, itself included. Keys keep the rotary angle
    of the position at which they were computed, and new tokens count on from there: distances
    inside the window are the true ones, and no angle is computed twice.

    The library's own ``DynamicSlidingWindowLayer`` serves models trained with a window, whose masks
    say so; it keeps one token fewer and has no sinks.

    Parameters
    ----------
    window:
        Newest tokens that are kept, the current one included.
    """

    window: int = 256

    name: ClassVar[str] = "sliding_window"
    exact: ClassVar[bool] = False
    sinks: ClassVar[int] = 0

    def traffic(self, max_length: int) -> dict[str, Any]:
        """Sinks and window bound both size and traffic."""
        return {"kind": "window", "sinks": self.sinks, "window": self.window}

    def session(self, model: LoadedModel, max_length: int) -> Session:
        """Open a conversation; see :meth:`Strategy.session`."""
        return GenerateSession(model, lambda: self.cache(model))

    def cache(self, model: LoadedModel) -> Cache:
        """A new, empty cache of this kind."""
        from transformers import Cache

        layers = text_config(model).num_hidden_layers
        layer = _layer_class()
        return Cache(layers=[layer(self.sinks, self.window) for _ in range(layers)])


@dataclass(frozen=True)
class AttentionSink(SlidingWindow):
    """Keeps the first ``sinks`` tokens and the newest ``window`` (StreamingLLM).

    Xiao et al. (2024), "Efficient streaming language models with attention sinks", arXiv
    2309.17453: attention puts much weight on the first tokens whatever they say, and a window that
    loses them breaks. There, positions are counted inside the cache; here sinks stay at the distance
    they really have, which changes nothing as long as the context is no longer than the model's.

    Parameters
    ----------
    window:
        Newest tokens that are kept, the current one included.
    sinks:
        First tokens of the context that are never dropped.
    """

    window: int = 252
    sinks: int = 4

    name: ClassVar[str] = "attention_sink"


@once
def _layer_class() -> type:
    """The cache layer, defined on first use: this module is imported without transformers."""
    import torch
    from transformers.cache_utils import DynamicLayer

    class WindowLayer(DynamicLayer):
        """Keys and values of the first ``sinks`` and the newest ``window`` tokens.

        To the model it is a full-attention layer: the mask hides later tokens only, and what was
        dropped is not there to be hidden.
        """

        def __init__(self, sinks: int, window: int) -> None:
            super().__init__()
            self.sinks, self.window = sinks, window
            self.seen = 0

        def update(
            self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
        ) -> tuple[torch.Tensor, torch.Tensor]:
            """Append; a single token attends to what is kept, several to all that was there."""
            if not self.is_initialized:
                self.lazy_initialization(key_states, value_states)
            self.seen += key_states.shape[-2]
            keys, values = (
                self._joined(self.keys, key_states),
                self._joined(self.values, value_states),
            )
            self.keys, self.values = self._kept(keys), self._kept(values)
            if key_states.shape[-2] == 1:
                return self.keys, self.values
            return keys, values

        @staticmethod
        def _joined(old: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
            return torch.cat([old, new], dim=-2)

        def _kept(self, states: torch.Tensor) -> torch.Tensor:
            if states.shape[-2] <= self.sinks + self.window:
                return states
            # A copy, not a view: a view would keep what was dropped in memory.
            newest = states[..., states.shape[-2] - self.window :, :]
            return torch.cat([states[..., : self.sinks, :], newest], dim=-2)

        def get_seq_length(self) -> int:
            """Tokens seen, dropped ones included: the position of the next token."""
            return self.seen

        def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
            """Keys that a query of this length is multiplied with, and the position of the first.

            Positions are counted backwards from the query, so that new tokens see each other in
            order and everything kept lies before them.
            """
            stored = 0 if not self.seen else self.keys.shape[-2]
            length = stored + query_length
            if query_length == 1:
                length = min(length, self.sinks + self.window)
            return length, self.seen + query_length - length

        def get_max_length(self) -> int:
            """Tokens that are kept at most."""
            return self.sinks + self.window

        def reset(self) -> None:
            """Forget all tokens."""
            self.seen, self.is_initialized = 0, False
            self.keys = self.values = None

        def crop(self, tokens_to_remove: int) -> None:
            """Refused: tokens that were dropped to make room cannot come back."""
            raise NotImplementedError("a windowed cache cannot take back its newest tokens")

    return WindowLayer
