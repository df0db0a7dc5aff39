"""Caches of bounded length: the newest tokens, with or without the first ones of the context."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache as once
from typing import TYPE_CHECKING, Any, ClassVar

from kvbench import physics
from kvbench.inputs.models import LoadedModel
from kvbench.layout import MIXED
from kvbench.physics import Architecture, Traffic
from kvbench.strategies import shape
from kvbench.strategies.base import GenerateSession, Session, Strategy, text_config
from kvbench.strategies.options import option

if TYPE_CHECKING:
    from transformers import Cache


@dataclass(frozen=True)
class SlidingWindow(Strategy):
    """Keeps the newest ``window`` tokens and drops the rest.

    The prompt is read with attention to all of it; what falls out of the window is dropped after
    that, and every token decoded attends to the window, itself included. Of a prompt read in chunks each
    attends to itself and to what the window still holds, so that memory is bounded then too.
    Keys keep the rotary angle of the position at which they were computed, and new tokens count on from
    there: distances inside the window are the true ones, and no angle is computed twice.

    The library's own ``DynamicSlidingWindowLayer`` serves models trained with a window, whose masks
    say so; it keeps one token fewer and has no sinks. Layers of such a model keep whichever window is
    narrower, theirs or this one, and states stay as they are.

    Parameters
    ----------
    window:
        Newest tokens that are kept, the current one included.
    """

    window: int = option(256, "w", least=1, label="{}", label_pt="{}")

    name: ClassVar[str] = "sliding_window"
    exact: ClassVar[bool] = False
    sinks: ClassVar[int] = 0
    layers: ClassVar[frozenset[str]] = frozenset({"full", "sliding", "state"})

    def unfit(self, kinds: Sequence[str], arch: Architecture | None) -> str | None:
        """A window needs keys to drop, and positions that do not come from the mask's length."""
        name = self.id
        reason = super().unfit(kinds, arch)
        if reason:
            return reason
        if not {"full", "sliding"} & set(kinds):
            return f"{name} needs keys and values to drop; this model keeps a state of fixed size"
        if arch is not None and arch.alibi:
            return f"{name} drops keys, whose distance this model (alibi) takes from the mask"
        return None

    def small(self) -> Strategy:
        """A window that a short conversation outgrows."""
        return replace(super().small(), window=8)

    def lossless(self) -> Strategy:
        """A window that no short conversation fills."""
        return replace(self, window=1_000_000)

    def traffic(self, max_length: int) -> Traffic:
        """Sinks and window bound both size and traffic."""
        return physics.Window(self.window, self.sinks, prefill_chunk=self.chunk)

    def session(self, model: LoadedModel, max_length: int, batch: int = 1) -> Session:
        """Open a conversation; see :meth:`Strategy.session`."""
        return GenerateSession(model, lambda: self.cache(model), self.chunk)

    def cache(self, model: LoadedModel) -> Cache:
        """A new, empty cache of this kind."""
        from transformers import Cache, DynamicCache

        layer_class = _layer_class()

        def bounded(layer: Any, kind: str) -> Any:
            if kind == "full":
                return layer_class(self.sinks, self.window)
            if kind == "sliding" and layer.sliding_window > self.window:
                return layer_class(self.sinks, self.window, is_sliding=True)
            # The model's own window is no wider, or the layer keeps a state.
            return layer

        layers = DynamicCache(config=text_config(model)).layers
        kinds = shape.layer_kinds(model)
        return Cache(layers=[bounded(*pair) for pair in zip(layers, kinds, strict=True)])


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

    window: int = option(252, "w", least=1, label="{}", label_pt="{}")
    sinks: int = option(4, "s", least=0, label="{} sinks", label_pt="{} sumidouros")

    name: ClassVar[str] = "attention_sink"

    def misfit_batch(self, model: LoadedModel, lengths: str) -> str | None:
        """The first positions of a batch are its longest row's first tokens, and others' padding."""
        if lengths == MIXED and self.sinks:
            return f"{self.id} would keep padding as the first tokens of shorter prompts"
        return super().misfit_batch(model, lengths)


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

        def __init__(self, sinks: int, window: int, is_sliding: bool = False) -> None:
            super().__init__()
            self.sinks, self.window = sinks, window
            # The model then applies its own window's mask, which is wider than what is kept here.
            self.is_sliding = is_sliding
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
