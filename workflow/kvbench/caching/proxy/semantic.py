"""The semantic cache beside the event loop: one thread encodes and searches, the loop goes on."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from kvbench.caching.proxy.settings import Settings
from kvbench.caching.proxy.stores import Asked
from kvbench.caching.semantic_cache import Lookup, SemanticCache

Guard = Callable[[str, str], bool]

#: What the encoder raises for a text without a direction (no words at all), and where it fails.
_INCOMPARABLE = (ValueError, RuntimeError)


class Encoder(Protocol):
    """What the proxy needs of :class:`kvbench.caching.encoder.SentenceEncoder`."""

    dimension: int

    def __call__(self, text: str) -> np.ndarray:
        """Return the vector of a text."""

    def fits(self, text: str) -> bool:
        """Whether the whole text is read."""


@dataclass(frozen=True)
class Found:
    """Key of an answer to a question alike and that question, or None and why not."""

    key: str | None
    similarity: float
    reason: str = ""
    text: str = ""


class Semantic:
    """Keys of stored answers by question; the answers themselves are in the store.

    Parameters
    ----------
    settings:
        Threshold, life and bounds.
    encoder:
        Text to vector.
    guards:
        By name; each may refuse a hit.
    """

    def __init__(
        self, settings: Settings, encoder: Encoder, guards: Mapping[str, Guard] | None
    ) -> None:
        assert settings.threshold is not None
        self._cache = SemanticCache(
            encoder,
            encoder.dimension,
            threshold=settings.threshold,
            capacity=settings.capacity,
            max_bytes=settings.max_bytes,
            ttl_s=settings.max_ttl_s,
            guards=guards,
            fits=encoder.fits,
        )
        self._fits = encoder.fits
        self._most = settings.max_encoding
        self._waiting = 0
        #: Keys deleted while the index is built again, or None when it is not.
        self._restoring: set[str] | None = None
        # One thread: the encoder and the index take one at a time anyway, and a long text that is
        # encoded must not hold up anything but other questions that need the encoder.
        self._thread = ThreadPoolExecutor(1, "proxy-semantic")

    async def find(self, text: str, context: str) -> Found:
        """Return the key of an answer to a question that counts as the same."""
        found: Lookup | None = await self._run(self._get, text, context)
        if found is None:
            return Found(None, math.nan, "encoder busy")
        if found.hit:
            return Found(found.value, found.similarity, text=found.text)
        if found.refused:
            return Found(None, found.similarity, f"guard {found.refused}")
        return Found(None, found.similarity)

    async def add(self, text: str, context: str, key: str, ttl_s: float) -> None:
        """Note that the answer to a question is stored under ``key``."""
        await self._run(self._put, text, key, context, ttl_s)

    async def forget(self, text: str, context: str) -> None:
        """Drop a question whose answer is gone."""
        await self._run(self._cache.invalidate, text, context)

    async def discard(self, keys: Collection[str]) -> None:
        """Drop every question whose answer was stored under one of these keys.

        A deletion is asked for so that nothing of it stays: it waits for its turn, however many
        questions wait for the encoder.
        """
        if self._restoring is not None:
            self._restoring.update(keys)
        loop = asyncio.get_running_loop()
        await loop.run_in_executor(self._thread, self._cache.discard, frozenset(keys))

    async def restore(self, asked: Sequence[Asked]) -> None:
        """Build the index from the questions of a store, while others are answered between.

        What is deleted meanwhile does not come back.
        """
        self._restoring = set()
        loop = asyncio.get_running_loop()
        try:
            for one in asked:
                life_s = one.expires - time.time()
                if life_s <= 0 or one.key in self._restoring:
                    continue
                arguments = one.text, one.key, one.context, life_s
                await loop.run_in_executor(self._thread, self._put, *arguments)
                if one.key in self._restoring:
                    forget = self._cache.invalidate, one.text, one.context
                    await loop.run_in_executor(self._thread, *forget)
        finally:
            self._restoring = None

    def refused(self) -> Mapping[str, int]:
        """Return how often each guard refused."""
        return self._cache.stats.refused

    def footprint(self) -> tuple[int, int]:
        """Return entries and bytes of the index."""
        return self._cache.footprint()

    def close(self) -> None:
        """Let the thread end."""
        self._thread.shutdown(wait=False, cancel_futures=True)

    def _get(self, text: str, context: str) -> Lookup:
        """Look a question up; one without a direction is like nothing."""
        try:
            return self._cache.get(text, context)
        except _INCOMPARABLE:
            return Lookup()

    def _put(self, text: str, key: str, context: str, ttl_s: float) -> None:
        """Index a question, unless the encoder does not read all of it.

        The store already answers its exact repeat; here it would only take the place of others.
        """
        if self._fits(text):
            with suppress(*_INCOMPARABLE):
                self._cache.put(text, key, context, ttl_s)

    async def _run(self, action: Callable[..., Any], *arguments: Any) -> Any:
        """Run in the thread; None if too many wait for it."""
        if self._waiting >= self._most:
            return None
        self._waiting += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(
                self._thread, action, *arguments
            )
        finally:
            self._waiting -= 1
