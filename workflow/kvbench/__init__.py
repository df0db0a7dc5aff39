"""Measure, model and explain the caches of language-model applications.

The library knows nothing of Snakemake: rules call it through the thin adapters in
``workflow/scripts``, tests call it directly, and notebooks import it after ``pip install .``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

__version__ = "0.1.0"
__all__ = ["KVCacheBenchmark", "__version__"]

if TYPE_CHECKING:
    from kvbench.notebook import KVCacheBenchmark


def __getattr__(name: str):
    # The notebook interface needs torch; importing it lazily keeps every other stage light.
    if name == "KVCacheBenchmark":
        from kvbench.notebook import KVCacheBenchmark

        return KVCacheBenchmark
    raise AttributeError(f"module 'kvbench' has no attribute {name!r}")
