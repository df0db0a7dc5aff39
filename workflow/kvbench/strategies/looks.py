"""How strategies appear wherever they are shown: order, label in both languages, colour and marker.

The one table of this kind; it needs neither matplotlib nor torch. A strategy that is missing here comes
after the others and gets a look of its own, derived from its name.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from zlib import crc32

from kvbench.errors import InputError
from kvbench.strategies import Strategy, get, names, options


@dataclass(frozen=True)
class Look:
    """Colour, marker and labels by which a strategy is known in every figure and table.

    Attributes
    ----------
    colour:
        Hex colour, of Okabe and Ito (2008), "Color Universal Design", where they have one. Hue names the
        family (static caches are orange, quantised ones green ...).
    marker:
        A matplotlib marker; no two strategies share one, so that colour is never the only sign.
    label, label_pt:
        What the reader sees, in English and in Portuguese.
    """

    colour: str
    marker: str | tuple[int, int, int]
    label: str
    label_pt: str

    @property
    def size(self) -> float:
        """Factor on the marker size: thin shapes are drawn larger to weigh the same."""
        return 1.4 if self.marker in {"*", "P", "X"} or isinstance(self.marker, tuple) else 1.0


#: Every strategy the artifact ships, in the order of all tables and figures.
LOOKS = {
    "none": Look("#000000", "X", "no cache", "sem cache"),
    "dynamic": Look("#0072B2", "o", "dynamic", "dinâmico"),
    "dynamic_reuse": Look("#003F66", ">", "dynamic (reused)", "dinâmico (reaproveitado)"),
    "static": Look("#D55E00", "s", "static", "estático"),
    "static_compiled": Look(
        "#E69F00", "D", "static (forced compile)", "estático (compil. forçada)"
    ),
    "static_graph": Look("#7A3300", "d", "static (own graph)", "estático (grafo próprio)"),
    "static_reuse": Look("#F0A070", "8", "static (reused)", "estático (reaproveitado)"),
    "offloaded": Look("#56B4E9", "^", "offloaded", "descarregado"),
    "offloaded_static": Look("#8ACFEF", "v", "offloaded static", "estático descarregado"),
    "quantized_int4": Look("#009E73", "P", "int4 (quanto)", "int4 (quanto)"),
    "quantized_int4_reuse": Look(
        "#00573F", (4, 1, 0), "int4 (quanto, reused)", "int4 (quanto, reaproveitado)"
    ),
    "quantized_int2": Look("#66C2A5", "p", "int2 (quanto)", "int2 (quanto)"),
    "quantized_hqq_int8": Look("#4B7A2B", "h", "int8 (HQQ)", "int8 (HQQ)"),
    "quantized_hqq_int4": Look("#93B55A", "H", "int4 (HQQ)", "int4 (HQQ)"),
    "quantized_fp8": Look("#B3A600", "*", "fp8", "fp8"),
    "paged": Look("#CC79A7", "<", "paged", "paginado"),
    "vllm": Look("#8A3A68", (6, 1, 0), "vLLM", "vLLM"),
    "vllm_prefix_caching": Look(
        "#5E2750", (6, 1, 30), "vLLM (prefixes kept)", "vLLM (prefixos mantidos)"
    ),
    "sliding_window": Look("#7F7F7F", (5, 0, 180), "sliding window", "janela deslizante"),
    "attention_sink": Look("#505050", (3, 1, 0), "attention sinks", "sumidouros de atenção"),
    "kvpress_knorm": Look(
        "#A6611A", (5, 1, 0), "key norms (kvpress)", "normas das chaves (kvpress)"
    ),
    "kvpress_snapkv": Look("#6B3E0A", (5, 1, 36), "SnapKV (kvpress)", "SnapKV (kvpress)"),
}

#: Markers and colours for strategies that are not in the table, all different from those above.
_SPARE_MARKERS = ((7, 1, 0), (8, 1, 0), (4, 0, 20), (7, 0, 0), (9, 1, 0), (3, 0, 20))
_SPARE_COLOURS = ("#5B5EA6", "#9B6A3C", "#B05A5A", "#3E8E8E")


#: What classes with several named sets of options are called when a variant is none of them.
_CLASSES = {
    "quantized": ("quantised", "quantizado"),
    "quantized_reuse": ("quantised (reused)", "quantizado (reaproveitado)"),
}


def look(strategy: str) -> Look:
    """The look of a strategy.

    One with options has the hue of its name's plain strategy, in another shade and with a marker of
    its own, both derived from its id, and says the options in its label. An unknown one gets a stable
    look derived from its name.
    """
    if strategy in LOOKS:
        return LOOKS[strategy]
    number = crc32(strategy.encode())
    plain = _plain(strategy)
    if plain is None or plain == strategy:
        # Nobody's variant: an id of an old record, or a strategy that was added without a look.
        label = strategy.replace("_", " ")
        return Look(
            _SPARE_COLOURS[number % len(_SPARE_COLOURS)],
            _SPARE_MARKERS[number % len(_SPARE_MARKERS)],
            label,
            label,
        )
    base = LOOKS.get(plain) or look(plain)
    sides, turn = 3 + number % 5, number // 5 % 90
    label, label_pt = _labels_of(strategy, plain)
    return Look(
        _shade(base.colour, (number // 450 % 101 - 50) / 100),
        (sides, number // 45450 % 2, turn),
        label,
        label_pt,
    )


def _plain(strategy: str) -> str | None:
    """The named strategy that one with options is a variant of, or None for what nobody knows.

    Of several named sets of options it is the one that shares most values with it.
    """
    known = _known(strategy)
    if known is None:
        return None
    values = known.options()
    named = [one for one in map(get, names()) if type(one) is type(known)]
    shared = [sum(value == values[key] for key, value in one.options().items()) for one in named]
    return named[shared.index(max(shared))].id


def _known(strategy: str) -> Strategy | None:
    try:
        return get(strategy)
    except InputError:
        return None


def _labels_of(strategy: str, plain: str) -> tuple[str, str]:
    """The labels of a variant in both languages: those of its plain strategy and what differs.

    Where no named set of options shares what an id always says, the words of the class stand first.
    """
    one, other = get(strategy), get(plain)
    values, usual = one.options(), other.options()
    known = options.of(type(one))
    label, label_pt = look(plain).label, look(plain).label_pt
    changed = [name for name in known if values[name] != usual[name]]
    if any(known[name].always for name in changed):
        label, label_pt = _CLASSES.get(type(one).name, (type(one).name,) * 2)
        changed = [name for name in known if known[name].always or name in changed]
    for name in changed:
        word = known[name].label or f"{name.replace('_', ' ')} {{}}"
        told = word.format(values[name])
        told_pt = (known[name].label_pt or word).format(_decimal_comma(values[name]))
        # A bare value belongs to the name: "sliding window 512".
        comma = "" if word == "{}" else ","
        label, label_pt = f"{label}{comma} {told}", f"{label_pt}{comma} {told_pt}"
    return label, label_pt


def _decimal_comma(value: object) -> str:
    return str(value).replace(".", ",") if isinstance(value, float) else str(value)


def _shade(colour: str, amount: float) -> str:
    """The colour mixed with white (a positive amount) or black (a negative one)."""
    target = 255 if amount > 0 else 0
    parts = (int(colour[start : start + 2], 16) for start in (1, 3, 5))
    mixed = (round(part + (target - part) * abs(amount)) for part in parts)
    return "#" + "".join(f"{part:02X}" for part in mixed)


def words_of_options() -> dict[str, str]:
    """What labels say of options, English to Portuguese; ``{n}`` stands for a value, ``{}`` for words."""
    found = {f"{english} {{}}": portuguese + " {}" for english, portuguese in _CLASSES.values()}
    for name in names():
        for option in options.of(type(get(name))).values():
            if option.label == "{}":
                base = look(name)
                found[f"{base.label} {{n}}"] = f"{base.label_pt} {{n}}"
            elif option.label:
                english = option.label.replace("{}", "{n}")
                found[english] = (option.label_pt or option.label).replace("{}", "{n}")
    return found


class _Labels(dict[str, str]):
    """Labels in one language, also of strategies that were not listed."""

    def __init__(self, strategies: Iterable[str], language: str) -> None:
        self._language = language
        super().__init__({name: self[name] for name in strategies})

    def __missing__(self, name: str) -> str:
        found = look(name)
        return found.label_pt if self._language == "pt" else found.label


def labels(strategies: Iterable[str], language: str) -> dict[str, str]:
    """What the reader of ``en`` or ``pt`` sees for each strategy; asked for another, it knows that too."""
    return _Labels(strategies, language)


def in_order(strategies: Iterable[str]) -> list[str]:
    """Strategies without repeats, in the order of the table.

    Those with options follow their plain strategy by the values of their options; unknown ones are
    last, sorted by name.
    """
    rank = {name: position for position, name in enumerate(LOOKS)}

    def place(name: str) -> tuple:
        if name in rank:
            return rank[name], (), name
        plain = _plain(name)
        if plain not in rank:
            return len(rank), (), name
        return rank[plain], tuple(get(name).options().values()), name

    return sorted(set(strategies), key=place)
