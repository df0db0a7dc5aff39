"""Where the time of a decoded token goes: operators as torch's profiler sees them, and what is outside.

A few decoding steps run without the profiler and a few with it, in turns within one generation, so that
what the profiler itself costs is a number of its own. An operator's time is its self time on the calling
thread: nested operators count once, and waiting for the other threads of a parallel one is part of it.
"""

from __future__ import annotations

import os
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from kvbench.strategies.base import Session

if TYPE_CHECKING:
    from transformers import PreTrainedModel

#: Where a token's time goes, in the order of the figure: products with weights; attention; writing,
#: concatenating, packing and unpacking keys and values; all other operators; Python and dispatch.
PARTS = ("weights", "attention", "cache", "other", "outside")

#: Decoding steps before the first window, steps of a window, and windows of each kind.
WARM, WINDOW, WINDOWS = 2, 3, 3
#: Tokens that a whole pass generates; the first comes from reading the prompt.
TOKENS = 1 + WARM + 2 * WINDOWS * WINDOW
#: Tokens that a pass needs: the first, and a step of each kind.
FEWEST = 3
#: Operators that the record names, the dearest first.
NAMED = 12

_CACHE, _ATTENTION = "kvbench::cache", "kvbench::attention"
#: Products with a matrix of weights, as the library and compiled graphs call them.
_PRODUCTS = frozenset(
    {"aten::linear", "aten::addmm", "aten::mm", "aten::addmv", "aten::mv", "mkl::_mkl_linear"}
)
#: Products and weightings that are attention where nothing marks it: eager attention.
_BATCHED = frozenset({"aten::bmm", "aten::baddbmm", "aten::softmax", "aten::_softmax"})
#: What a compiled graph calls writing into a static cache; its kernels are named after their operators.
_WRITES = ("index_copy", "index_put")


def profile(
    session: Session, prompt: Sequence[int], tokens: int, model: PreTrainedModel, compiled: bool
) -> dict[str, Any]:
    """Take the time of decoded tokens apart.

    Parameters
    ----------
    session:
        A session that has generated before: whatever is compiled is there.
    prompt:
        Token ids of the context.
    tokens:
        Tokens to generate, from :data:`FEWEST` to :data:`TOKENS`.
    model:
        Whose attention is marked.
    compiled:
        Whether a decoding step is a compiled graph, in which nothing can be marked: its fused kernels go
        by their names.

    Returns
    -------
    dict
        ``status`` and ``reason``; then ``context_tokens`` (mean over the steps), ``steps`` (with the
        profiler), and per token in seconds ``token_s`` (without the profiler), ``profiled_token_s``,
        ``parts_s`` (one number for each of :data:`PARTS`; ``outside`` is what ``token_s`` has beyond the
        operators) and ``operators`` (name, part, calls and seconds of the dearest).
    """
    window = min(WINDOW, (tokens - 1) // 2)
    warm = min(WARM, tokens - 1 - 2 * window)
    windows = _Windows(warm, window, (tokens - 1 - warm) // (2 * window))
    session.restart()
    with _marked(windows, model) if not compiled else _named_kernels(windows):
        session.generate(prompt, tokens, windows.on_token)
    if not windows.profiled_s:
        reason = "the engine generates outside of the thread that torch's profiler watches"
        return {"status": "unsupported", "reason": reason}
    token_s = statistics.median(windows.plain_s)
    marked = not compiled and model.config._attn_implementation != "eager"
    found = _typical([_by_operator(events, marked) for events in windows.events])
    parts = dict.fromkeys(PARTS, 0.0)
    for (_, part), (_, seconds) in found.items():
        parts[part] += seconds / window
    parts["outside"] = max(0.0, token_s - sum(parts.values()))
    dearest = sorted(found.items(), key=lambda item: -item[1][1])[:NAMED]
    return {
        "status": "ok",
        "reason": None,
        "context_tokens": len(prompt) + 1 + warm + window * len(windows.profiled_s),
        "steps": window * len(windows.profiled_s),
        "token_s": token_s,
        "profiled_token_s": statistics.median(windows.profiled_s),
        "parts_s": parts,
        "operators": [
            {"name": name, "part": part, "calls": calls / window, "seconds": seconds / window}
            for (name, part), (calls, seconds) in dearest
        ],
    }


class _Windows:
    """Steps without and with the profiler in turns; starting and stopping it is in none of them."""

    def __init__(self, warm: int, length: int, pairs: int) -> None:
        #: Seconds per token of each window.
        self.plain_s: list[float] = []
        self.profiled_s: list[float] = []
        self.events: list[list[Any]] = []
        self.active = False
        self._length = length
        self._borders = range(warm, warm + 2 * pairs * length + 1, length)
        self._token = -1
        self._profiler: Any = None
        self._begin = 0.0
        # The first profiler of a process loads its library; that is nobody's step.
        first = _profiler()
        first.start()
        first.stop()

    def on_token(self) -> None:
        """Take notice of a token; at a border, end a window and begin the next."""
        now = time.perf_counter()
        self._token += 1
        if self._token not in self._borders:
            return
        place = self._borders.index(self._token)
        if place:
            spent = (now - self._begin) / self._length
            if self._profiler is None:
                self.plain_s.append(spent)
            else:
                self.active = False
                self._profiler.stop()
                self.events.append(list(self._profiler.events()))
                self._profiler = None
                self.profiled_s.append(spent)
        if place < len(self._borders) - 1:
            if place % 2:
                self._profiler = _profiler()
                self._profiler.start()
                self.active = True
            self._begin = time.perf_counter()


def _profiler() -> Any:
    """Torch's profiler of operators on the processor."""
    # Its library writes a line about itself at every start otherwise.
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiler

    return profiler(activities=[ProfilerActivity.CPU])


def part_of(names: Sequence[str], marked: bool) -> str | None:
    """The part that an operator's self time belongs to; None for what is no operator.

    Parameters
    ----------
    names:
        The operator's name and those around it, from the inside out.
    marked:
        Whether attention is marked; then products of batches elsewhere are experts' weights.
    """
    own = names[0]
    if own.startswith("cpp_fused"):
        if {"mm", "addmm"}.intersection(own.split("_")):
            return "weights"
        return "cache" if any(word in own for word in _WRITES) else "other"
    if "::" not in own or own in (_CACHE, _ATTENTION):
        return None
    if _CACHE in names:
        return "cache"
    if _ATTENTION in names or any("scaled_dot_product" in name for name in names):
        return "attention"
    if _PRODUCTS.intersection(names):
        return "weights"
    if _BATCHED.intersection(names):
        return "weights" if marked else "attention"
    return "other"


def _by_operator(events: Iterable[Any], marked: bool) -> dict[tuple[str, str], tuple[int, float]]:
    """(name, part) to calls and seconds of self time."""
    calls: dict[tuple[str, str], int] = defaultdict(int)
    seconds: dict[tuple[str, str], float] = defaultdict(float)
    for event in events:
        names, around = [event.name], event.cpu_parent
        while around is not None:
            names.append(around.name)
            around = around.cpu_parent
        part = part_of(names, marked)
        if part is not None:
            calls[(event.name, part)] += 1
            seconds[(event.name, part)] += event.self_cpu_time_total / 1e6
    return {key: (calls[key], seconds[key]) for key in calls}


def _typical(
    windows: Sequence[dict[tuple[str, str], tuple[int, float]]],
) -> dict[tuple[str, str], tuple[float, float]]:
    """Calls and seconds of a window, each the median: where a program broke in counts once only."""
    return {
        key: (
            statistics.median(found.get(key, (0, 0.0))[0] for found in windows),
            statistics.median(found.get(key, (0, 0.0))[1] for found in windows),
        )
        for key in {key for found in windows for key in found}
    }


def _recorded(call: Callable, name: str, windows: _Windows) -> Callable:
    """The same function, recorded under a name while the profiler runs."""
    from torch.profiler import record_function

    def recorded(*args: Any, **kwargs: Any) -> Any:
        if not windows.active:
            return call(*args, **kwargs)
        with record_function(name):
            return call(*args, **kwargs)

    return recorded


@contextmanager
def _marked(windows: _Windows, model: PreTrainedModel) -> Iterator[None]:
    """Mark what the library calls to update any cache, and the attention of the model."""
    from transformers import Cache
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS as known

    update, name = Cache.update, model.config._attn_implementation
    attention = known.get(name)
    Cache.update = _recorded(update, _CACHE, windows)
    if attention is not None:
        known[name] = _recorded(attention, _ATTENTION, windows)
    try:
        yield
    finally:
        Cache.update = update
        if attention is not None:
            known[name] = attention


@contextmanager
def _named_kernels(windows: _Windows) -> Iterator[None]:
    """Record each fused kernel of the compiled graphs under its name.

    Inductor's generated modules look their kernels up by name at every call, and torch records only those
    that are operators.
    """
    from torch._inductor.codecache import PyCodeCache

    replaced = [
        (module, name, kernel)
        for module in list(PyCodeCache.modules)
        for name, kernel in list(vars(module).items())
        if name.startswith("cpp_fused") and callable(kernel)
    ]
    for module, name, kernel in replaced:
        setattr(module, name, _recorded(kernel, name, windows))
    try:
        yield
    finally:
        for module, name, kernel in replaced:
            setattr(module, name, kernel)
