"""KV-cache strategies: one small class each, found by being a subclass with a name.

To add one, write a frozen dataclass that derives from :class:`kvbench.strategies.base.Strategy` in
any module of this package. The configuration, the DAG, the tables and the figures then know it.
Importing this package imports neither torch nor transformers: planning must stay fast.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Mapping
from functools import cache
from typing import Any

from kvbench.errors import InputError, one_of
from kvbench.strategies import options
from kvbench.strategies.base import Generation, Preset, Session, Strategy

__all__ = [
    "REFERENCE",
    "Generation",
    "Session",
    "Strategy",
    "classes",
    "description",
    "get",
    "names",
    "variants",
    "without_reuse",
]

#: The strategy that stands for exact attention: the others' tokens and quality are held against it.
REFERENCE = "dynamic"


@cache
def _registry() -> dict[str, type[Strategy]]:
    for module in pkgutil.iter_modules(__path__):
        importlib.import_module(f"{__name__}.{module.name}")
    found: dict[str, type[Strategy]] = {}
    pending = list(Strategy.__subclasses__())
    while pending:
        strategy = pending.pop()
        pending.extend(strategy.__subclasses__())
        if "name" in vars(strategy):
            other = found.setdefault(strategy.name, strategy)
            if other is not strategy:
                raise InputError(
                    f"{strategy.__module__}: the name {strategy.name!r} is taken by {other.__module__}"
                )
    return dict(sorted(found.items()))


@cache
def _presets() -> dict[str, tuple[type[Strategy], Preset]]:
    return {
        name: (cls, preset)
        for cls in _registry().values()
        for name, preset in vars(cls).get("presets", {}).items()
    }


def names() -> list[str]:
    """Names of all strategies, sorted: usual options, and of some classes several usual sets."""
    single = [name for name, cls in _registry().items() if "presets" not in vars(cls)]
    return sorted([*single, *_presets()])


def classes() -> dict[str, type[Strategy]]:
    """The classes by the name that a configuration sets options of, sorted."""
    return dict(_registry())


def get(name: str) -> Strategy:
    """Return the strategy that an id or a name stands for.

    ``sliding_window`` has its usual options, ``sliding_window-w512`` others; an earlier version's
    names, such as ``quantized_int4``, are names of certain options.

    Raises
    ------
    InputError
        If there is none; the message names the known ones, or the options there are.
    """
    if name in _presets():
        cls, preset = _presets()[name]
        return cls(**preset.options)
    start, *parts = name.split("-")
    if start in _registry():
        return options.parsed(_registry()[start], parts, name)
    one_of("strategy", name, names())
    raise AssertionError(name)


def variants(entry: str | Mapping[str, Any], where: str) -> list[Strategy]:
    """The strategies that an entry of a configuration stands for: one, or a sweep of options.

    Parameters
    ----------
    entry:
        A name or id, or a mapping of ``name`` and options, of which each may be a list.
    where:
        File and key, for messages.

    Raises
    ------
    InputError
        An unknown name or option, or a wrong value.
    """
    if isinstance(entry, str):
        one_of("strategy", entry.split("-")[0], [*names(), *_registry()], where)
        try:
            return [get(entry)]
        except InputError as error:
            raise InputError(f"{where}: {error}") from None
    given = dict(entry)
    name = given.pop("name")
    one_of("strategy", name, [*names(), *_registry()], f"{where}.name")
    if name in _presets():
        cls, preset = _presets()[name]
        given = {**preset.options, **given}
    else:
        cls = _registry()[name]
    return list(options.swept(cls, given, where))


def description(name: str) -> str:
    """What a named strategy is, in one sentence or paragraph of its documentation."""
    if name in _presets():
        return _presets()[name][1].about
    return inspect.getdoc(_registry()[name]) or ""


def without_reuse(name: str) -> str | None:
    """The same cache made anew for every turn, or None if the strategy does not reuse turns.

    A name that no module here knows, such as one of another version's records, counts as not reusing.
    """
    try:
        known = get(name)
    except InputError:
        return None
    if not known.reuses_turns:
        return None
    return _registry()[known.without_reuse](**known.options()).id
