"""Starting fast: every job is a fresh process, so what it imports is paid for in every cell."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

#: Optional packages of transformers that nothing here needs unless it says so: scikit-learn and HQQ
#: serve other models, SciPy the losses of object detection. Together they take longer than torch.
UNUSED = frozenset({"scipy", "sklearn", "hqq"})


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


def _absent(*_: object) -> bool:
    return False
