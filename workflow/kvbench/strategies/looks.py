"""How strategies appear wherever they are shown: order, label in both languages, colour and marker.

The one table of this kind; it needs neither matplotlib nor torch. A strategy that is missing here comes
after the others and gets a look of its own, derived from its name.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from zlib import crc32


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


def look(strategy: str) -> Look:
    """The look of a strategy; an unknown one gets a stable one derived from its name."""
    if strategy in LOOKS:
        return LOOKS[strategy]
    number = crc32(strategy.encode())
    label = strategy.replace("_", " ")
    return Look(
        _SPARE_COLOURS[number % len(_SPARE_COLOURS)],
        _SPARE_MARKERS[number % len(_SPARE_MARKERS)],
        label,
        label,
    )


def labels(strategies: Iterable[str], language: str) -> dict[str, str]:
    """What the reader of ``en`` or ``pt`` sees for each strategy."""
    looks = {name: look(name) for name in strategies}
    return {name: one.label_pt if language == "pt" else one.label for name, one in looks.items()}


def in_order(strategies: Iterable[str]) -> list[str]:
    """Strategies without repeats, in the order of the table; unknown ones follow, sorted by name."""
    rank = {name: position for position, name in enumerate(LOOKS)}
    return sorted(set(strategies), key=lambda name: (rank.get(name, len(rank)), name))
