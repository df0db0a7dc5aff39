"""Starting fast: what a process imports is paid for wherever one begins afresh."""

from __future__ import annotations

import gc
import importlib.util
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

#: Optional packages of transformers that nothing here needs unless it says so: scikit-learn and HQQ
#: serve other models, SciPy the losses of object detection. Together they take longer than torch.
UNUSED = frozenset({"scipy", "sklearn", "hqq"})


def import_libraries(name: str) -> None:
    """Import what a job imports of others before it measures, in this order.

    Parameters
    ----------
    name:
        ``models`` for what measures with torch and transformers; ``caches`` for what measures without.
        No operation of torch is done, for its threads would not survive a fork. Nor is a GPU asked for
        anything.
    """
    with collector_paused():
        import fastjsonschema  # noqa: F401
        import jsonschema  # noqa: F401

        LIBRARIES[name]()


def _import_for_caches() -> None:
    import numpy  # noqa: F401
    import redis  # noqa: F401
    import yaml  # noqa: F401


def _import_for_models() -> None:
    import torch  # noqa: F401
    import yaml  # noqa: F401

    skip_unused_imports()
    import accelerate  # noqa: F401
    import safetensors.torch  # noqa: F401
    import tokenizers  # noqa: F401
    import transformers.generation.utils
    import transformers.models.auto.modeling_auto
    import transformers.models.llama.modeling_llama  # noqa: F401


#: Names of what :func:`import_libraries` imports.
LIBRARIES = {"caches": _import_for_caches, "models": _import_for_models}


@contextmanager
def collector_paused() -> Iterator[None]:
    """Import libraries or load a model without looking for garbage meanwhile.

    What comes in lives as long as the process. The collector would go through all of it again and
    again while it comes in, before every reading of memory, and once more when the process ends: a
    third of a cell's starting time. Afterwards it is frozen (:func:`gc.freeze`) and never looked at.
    """
    active = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if active:
            gc.enable()


def skip_unused_imports(keep: Sequence[str] = (), also: Sequence[str] = ()) -> None:
    """Keep transformers from importing the packages in :data:`UNUSED` and ``also``, but for ``keep``.

    A process that turns texts into tokens and loads no model needs no torch, for example. What was
    left out is left out for the life of the process; of ``also``, what is imported already stays.
    """
    import transformers.utils
    from transformers.utils import import_utils, logging

    logging.disable_progress_bar()

    unused = UNUSED.union(package for package in also if package not in sys.modules)
    for package in unused - set(keep):
        for module in (import_utils, transformers.utils):
            setattr(module, f"is_{package}_available", _absent)


@contextmanager
def imported_when_called(module: str) -> Iterator[None]:
    """While the block imports something, let it take functions of ``module`` that load it when called.

    sentence-transformers asks scikit-learn for one function, which nothing here calls; to import it
    takes as long as torch. A module that is loaded already, and one that is not installed, is left alone.
    """
    package = module.partition(".")[0]
    installed = package in sys.modules or importlib.util.find_spec(package)
    names = [name for name in (package, module) if name not in sys.modules]
    if not installed or module not in names:
        yield
        return
    for name in names:
        stand_in = ModuleType(name)
        # Some look for it, to see whether the package is installed.
        stand_in.__spec__ = ModuleSpec(name, None, is_package=True)
        stand_in.__getattr__ = partial(_later, name)
        sys.modules[name] = stand_in
    try:
        yield
    finally:
        for name in names:
            del sys.modules[name]


def _later(module: str, name: str) -> Callable[..., Any]:
    if name.startswith("__"):
        raise AttributeError(name)

    def function(*given: Any, **named: Any) -> Any:
        # Packages of others only: what of the library is imported by name, digests have to know.
        __import__(module)
        return getattr(sys.modules[module], name)(*given, **named)

    return function


def _absent(*_: object) -> bool:
    return False
