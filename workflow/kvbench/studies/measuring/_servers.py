"""A store that insists: where a cache would fall back to the source, its study wants to know."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from kvbench.caching.response_cache import Backend, BackendError, Miss
from kvbench.caching.server import ServerRefused


class Insistent:
    """A backend whose failures end the cell.

    A cache that falls back to the source hides a server that refuses to write, and its times would
    be those of a cache that is not there.

    Raises
    ------
    ServerRefused
        By every method whose call of the backend fails; it carries the server's own words.
    """

    def __init__(self, backend: Backend) -> None:
        self._backend = backend

    def get(self, key: str) -> bytes | Miss:
        """Return the stored bytes, or ``MISS``."""
        return self._try(lambda: self._backend.get(key))

    def set(self, key: str, value: bytes, ttl_s: float | None = None) -> None:
        """Store bytes."""
        self._try(lambda: self._backend.set(key, value, ttl_s))

    def delete(self, key: str) -> None:
        """Forget an entry."""
        self._try(lambda: self._backend.delete(key))

    def footprint(self) -> tuple[int, int]:
        """Return entries and bytes."""
        return self._try(self._backend.footprint)

    def close(self) -> None:
        """Close the backend."""
        self._backend.close()

    @staticmethod
    def _try(action: Callable[[], Any]) -> Any:
        try:
            return action()
        except BackendError as error:
            raise ServerRefused(str(error)) from error
