"""Measure, model and explain the caches of language-model applications.

The library knows nothing of Snakemake: rules call it through the thin adapters in
``workflow/scripts``, tests call it directly, and notebooks import it after ``pip install .``.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

__version__ = "0.1.0"
__all__ = [
    "KVCacheBenchmark",
    "Request",
    "SentenceEncoder",
    "__version__",
    "embedded_model",
    "paired_ratio",
    "request_key",
]

if TYPE_CHECKING:
    from kvbench.analysis.paired import ratio as paired_ratio
    from kvbench.caching.encoder import SentenceEncoder
    from kvbench.caching.keys import Request, request_key
    from kvbench.notebook import KVCacheBenchmark, embedded_model

#: What a notebook imports from here: its name, the module that has it, and its name there. Each is
#: imported when it is first asked for, since some need torch and every other stage goes without.
_PUBLIC = {
    "KVCacheBenchmark": ("kvbench.notebook", "KVCacheBenchmark"),
    "Request": ("kvbench.caching.keys", "Request"),
    "SentenceEncoder": ("kvbench.caching.encoder", "SentenceEncoder"),
    "embedded_model": ("kvbench.notebook", "embedded_model"),
    "paired_ratio": ("kvbench.analysis.paired", "ratio"),
    "request_key": ("kvbench.caching.keys", "request_key"),
}


def __getattr__(name: str):
    if name not in _PUBLIC:
        raise AttributeError(f"module 'kvbench' has no attribute {name!r}")
    module, there = _PUBLIC[name]
    return getattr(import_module(module), there)


def __dir__() -> list[str]:
    return sorted(__all__)
