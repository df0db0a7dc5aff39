"""Options of a strategy: what a field declares, how values are checked, and the id of a variant."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any

from kvbench.errors import InputError, did_you_mean, one_of
from kvbench.explaining import shown

if TYPE_CHECKING:
    from kvbench.strategies.base import Strategy

_WORDS = {bool: "true or false", int: "a whole number", float: "a number", str: "a word"}


@dataclass(frozen=True)
class Option:
    """One option of a strategy's class.

    Attributes
    ----------
    name, default:
        The field and its usual value, whose type is the option's.
    letter:
        What stands before the value in an id; empty where the value speaks for itself.
    least, most:
        Bounds of a number, both allowed; None where there is none.
    choices:
        The values there are; empty when the bounds say all.
    always:
        Whether an id names the value even where it is the usual one.
    label, label_pt:
        How a figure's label names a value that is not the usual one, with ``{}`` in its place.
    """

    name: str
    default: Any
    letter: str
    least: float | None = None
    most: float | None = None
    choices: tuple[Any, ...] = ()
    always: bool = False
    label: str = ""
    label_pt: str = ""

    @property
    def takes(self) -> str:
        """The values it takes, in words."""
        if self.choices:
            return " or ".join(str(choice) for choice in self.choices)
        bounds = [
            f"{word} {bound:g}"
            for word, bound in (("at least", self.least), ("at most", self.most))
            if bound is not None
        ]
        return " ".join([_WORDS[type(self.default)], " and ".join(bounds)]).strip()

    def value(self, given: object, where: str) -> Any:
        """The value of what a configuration gives.

        Raises
        ------
        InputError
            Another type, or outside the bounds; one line that begins with ``where``.
        """
        kind = type(self.default)
        number = isinstance(given, int | float) and not isinstance(given, bool)
        right = number if kind is float else type(given) is kind
        if right and self.choices:
            right = given in self.choices
        if right and kind in (int, float):
            right = (self.least is None or given >= self.least) and (
                self.most is None or given <= self.most
            )
        if not right:
            near = did_you_mean(given, map(str, self.choices))
            raise InputError(f"{where} is {shown(given)}; it takes {self.takes}{near}")
        return kind(given)

    def spell(self, value: Any) -> str:
        """The part of an id that says the value."""
        if isinstance(value, bool):
            return self.letter if value else f"no{self.letter}"
        return f"{self.letter}{value}"

    def read(self, part: str) -> Any:
        """The value that a part of an id spells, or None if it is not of this option."""
        kind = type(self.default)
        if kind is bool:
            return {self.letter: True, f"no{self.letter}": False}.get(part)
        if kind is str:
            return part if part in self.choices else None
        pattern = r"\d+" if kind is int else r"\d+(?:\.\d+)?"
        found = re.fullmatch(re.escape(self.letter) + f"({pattern})", part)
        return kind(found[1]) if found else None


def option(default: Any, letter: str, **more: Any) -> Any:
    """A dataclass field that is an option; ``more`` are ``kw_only`` and fields of :class:`Option`."""
    keyword_only = more.pop("kw_only", False)
    return field(default=default, kw_only=keyword_only, metadata={"letter": letter, **more})


def of(cls: type[Strategy]) -> dict[str, Option]:
    """The options of a strategy's class by name, in the order of ids."""
    return {
        one.name: Option(one.name, one.default, **{"letter": one.name, **one.metadata})
        for one in fields(cls)
    }


def made(cls: type[Strategy], given: Mapping[str, Any], where: str) -> Strategy:
    """The strategy with some options set, all checked.

    Raises
    ------
    InputError
        An unknown option, a wrong value, or values that do not go together.
    """
    known = of(cls)
    for name in given:
        one_of(f"option of {cls.name}", name, known, f"{where}.{name}", "or leave it out")
    values = {name: known[name].value(value, f"{where}.{name}") for name, value in given.items()}
    strategy = cls(**values)
    if reason := strategy.contradiction():
        raise InputError(f"{where}: {reason}")
    return strategy


def swept(cls: type[Strategy], given: Mapping[str, Any], where: str) -> Iterator[Strategy]:
    """The strategies of a full cross of options, of which each may be a list of values."""
    for name, value in given.items():
        if isinstance(value, list) and not value:
            raise InputError(f"{where}.{name} is an empty list; name a value, or leave it out")
    lists = [value if isinstance(value, list) else [value] for value in given.values()]
    for values in itertools.product(*lists):
        yield made(cls, dict(zip(given, values, strict=True)), where)


def id_of(strategy: Strategy) -> str:
    """What a strategy with its options is called: in paths, records, tables, figures and claims.

    The plain name for the usual options, a name of :attr:`Strategy.presets` where there is one, else
    the name and what differs: ``sliding_window-w512``.
    """
    cls = type(strategy)
    known = of(cls)
    values = {name: getattr(strategy, name) for name in known}
    for name, preset in cls.presets.items():
        if values == {key: one.default for key, one in known.items()} | dict(preset.options):
            return name
    changed = [name for name, one in known.items() if values[name] != one.default]
    if not changed:
        return cls.name
    parts = [
        one.spell(values[name]) for name, one in known.items() if one.always or name in changed
    ]
    return "-".join([cls.name, *parts])


def parsed(cls: type[Strategy], parts: Sequence[str], strategy: str) -> Strategy:
    """The strategy that the parts of an id after the name stand for.

    Raises
    ------
    InputError
        A part that is no option's, or a wrong value.
    """
    known = of(cls)
    given: dict[str, Any] = {}
    for part in parts:
        for name, one in known.items():
            value = one.read(part)
            if value is not None and name not in given:
                given[name] = value
                break
        else:
            spelled = ", ".join(f"{one.spell(one.default)} ({name})" for name, one in known.items())
            raise InputError(
                f"strategy {strategy!r}: {part!r} is no option of {cls.name}; "
                f"its options look like {spelled}"
            )
    return made(cls, given, f"strategy {strategy!r}")
