"""Caches that live on from turn to turn, so that a turn reads only what is new in its prompt."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from kvbench.inputs.models import LoadedModel
from kvbench.physics import Architecture
from kvbench.strategies.base import (
    GenerateSession,
    Generation,
    Preset,
    Session,
    allocated_static_cache,
    common_prefix,
    paddings,
    text_config,
)
from kvbench.strategies.dynamic import Dynamic
from kvbench.strategies.quantized import Quantized
from kvbench.strategies.static import Static

if TYPE_CHECKING:
    from transformers import Cache


#: What stands for a padded position among held tokens: no token's id.
_PADDED = -1


class ReusingSession(GenerateSession):
    """A session that keeps its cache and the ids of the tokens in it.

    ``generate`` compares nothing but lengths: a cache of another conversation is taken without an
    error and gives another text. So the ids are compared here, before the library sees the cache.

    Parameters
    ----------
    model:
        The loaded model.
    make_cache:
        Returns an empty cache; called when a conversation starts over.
    crops:
        Whether the cache's class can forget its newest tokens. ``StaticLayer`` has no such method, and
        that of ``QuantizedLayer`` (transformers 5.15.1) cuts the full-precision rest without correcting
        the length; those start over where a history leaves what they hold. So does a cache one of whose
        layers has already dropped tokens to keep its window.
    prefill_chunk:
        Tokens per forward pass of what is new in a prompt; None for all in one.
    settings:
        Further fields of the generation configuration.
    """

    def __init__(
        self,
        model: LoadedModel,
        make_cache: Callable[[], Cache],
        crops: bool,
        prefill_chunk: int | None = None,
        **settings: Any,
    ) -> None:
        # The library's own chunks begin at the first token, whatever the cache holds (5.15.1).
        super().__init__(model, make_cache, **settings)
        self._crops = crops
        self._chunk = prefill_chunk
        self._cache: Cache | None = None
        self._held: list[list[int]] = []

    def generate(
        self, token_ids: Sequence[int], max_new_tokens: int, on_token: Callable[[], None]
    ) -> Generation:
        """Generate one turn; only tokens after the longest common prefix are read."""
        (tokens,), cache, reused = self._continued([token_ids], max_new_tokens, on_token)
        return Generation(tokens, cache, reused_tokens=reused)

    def generate_batch(
        self, rows: Sequence[Sequence[int]], max_new_tokens: int, on_token: Callable[[], None]
    ) -> Generation:
        """Generate one turn of all rows; what every row shares with its own past is not read again."""
        found, cache, reused = self._continued(rows, max_new_tokens, on_token)
        return Generation(found[0], cache, reused, rows=found, padding=paddings(rows))

    def _continued(
        self, rows: Sequence[Sequence[int]], max_new_tokens: int, on_token: Callable[[], None]
    ) -> tuple[list[list[int]], Cache | None, int]:
        """New tokens of each row, the cache, and the positions that were there already."""
        # A cache has columns: what stands before a shorter row is part of them.
        ids = [[_PADDED] * pad + list(row) for pad, row in zip(paddings(rows), rows, strict=True)]
        cache, held = self._cache, self._held
        # A turn that fails leaves a cache of unknown content behind: nothing of it is kept.
        self.restart()
        reused = self._keep(cache, held, ids)
        if not reused or cache is None:
            cache, reused = self._make_cache(), 0
        found, cache = self.run(rows, max_new_tokens, on_token, cache)
        # The last token was returned and never fed back, so it is not in the cache.
        self._cache = cache
        self._held = [[*row, *tokens[:-1]] for row, tokens in zip(ids, found, strict=True)]
        return found, cache, reused

    def run(
        self,
        rows: Sequence[Sequence[int]],
        max_new_tokens: int,
        on_token: Callable[[], None],
        cache: Cache | None,
    ) -> tuple[list[list[int]], Cache | None]:
        """Call ``model.generate``; chunks but the last are read by calls of their own before it.

        Each of those predicts one token, which nobody is told of and which never enters the cache.
        """
        if self._chunk is not None and cache is not None:
            ids, mask = self._padded(rows)
            start = int(cache.get_seq_length()) + self._chunk
            for end in range(start, ids.shape[1], self._chunk):
                self._generated(ids[:, :end], mask[:, :end], 1, lambda: None, cache)
        return super().run(rows, max_new_tokens, on_token, cache)

    def _keep(self, cache: Cache | None, held: list[list[int]], ids: list[list[int]]) -> int:
        """Cut the cache to the prefix it shares with ``ids``; return its tokens, 0 to start over."""
        # Somebody else may have fed the cache; int() because a static one returns its live counter.
        if cache is None or len(held) != len(ids):
            return 0
        length = len(held[0])
        if int(cache.get_seq_length()) != length:
            return 0
        # At least one token has to be read, or there is nothing to predict the next one from.
        shared = min(*map(common_prefix, held, ids), len(ids[0]) - 1)
        if shared == length:
            return shared
        if not self._crops or not shared or not _can_go_back(cache):
            return 0
        cache.crop(shared - length)
        return shared

    def restart(self) -> None:
        """Forget the conversation and its tokens."""
        self._cache, self._held = None, []


def _can_go_back(cache: Cache) -> bool:
    """Whether no layer has dropped a token that going back would need."""
    return all(
        not getattr(layer, "is_sliding", False) or layer.get_seq_length() < layer.sliding_window
        for layer in cache.layers
    )


class _Reuses:
    """What caches need that live on from turn to turn."""

    def unfit(self, kinds: Sequence[str], arch: Architecture | None) -> str | None:
        """A state has no length that could be held against a history."""
        if {"state", "hybrid"} & set(kinds):
            return f"{self.id}: the state of this model's layers cannot say which tokens are in it"
        return super().unfit(kinds, arch)


@dataclass(frozen=True)
class DynamicReuse(_Reuses, Dynamic):
    """The dynamic cache, kept from turn to turn and cut back where a history differs."""

    name: ClassVar[str] = "dynamic_reuse"
    reuses_turns: ClassVar[bool] = True
    without_reuse: ClassVar[str] = "dynamic"

    def session(self, model: LoadedModel, max_length: int, batch: int = 1) -> Session:
        """Open a conversation; see :meth:`Strategy.session`."""
        from transformers import DynamicCache

        config = text_config(model)
        return ReusingSession(
            model, lambda: DynamicCache(config=config), crops=True, prefill_chunk=self.chunk
        )


@dataclass(frozen=True)
class StaticReuse(_Reuses, Static):
    """The static cache, sized for the whole conversation and kept from turn to turn."""

    name: ClassVar[str] = "static_reuse"
    reuses_turns: ClassVar[bool] = True
    without_reuse: ClassVar[str] = "static"

    def session(self, model: LoadedModel, max_length: int, batch: int = 1) -> Session:
        """Open a conversation; see :meth:`Strategy.session`."""
        cache = allocated_static_cache(model, max_length, batch)

        def emptied() -> Cache:
            cache.reset()
            return cache

        compiled = self.compiled(model.model.device.type)
        return ReusingSession(
            model, emptied, crops=False, prefill_chunk=self.chunk, disable_compile=not compiled
        )


@dataclass(frozen=True)
class QuantizedReuse(_Reuses, Quantized):
    """A quantised cache kept from turn to turn.

    The first prompt is attended to in full precision by every quantised cache, and later prompts
    are so without reuse. With it they attend to what was stored, so the replies may differ from
    those of the same cache without it. Several tokens at once join the full-precision rest, which then may
    be longer than ``residual`` until the next token arrives; the sizes follow
    :func:`kvbench.physics.residual_tokens`.
    """

    name: ClassVar[str] = "quantized_reuse"
    reuses_turns: ClassVar[bool] = True
    without_reuse: ClassVar[str] = "quantized"
    presets: ClassVar[Mapping[str, Preset]] = {
        "quantized_int4_reuse": Preset("Four bits through optimum-quanto, kept from turn to turn."),
    }

    def session(self, model: LoadedModel, max_length: int, batch: int = 1) -> Session:
        """Open a conversation; see :meth:`Strategy.session`."""
        return ReusingSession(
            model, lambda: self.cache(model), crops=False, prefill_chunk=self.chunk
        )
