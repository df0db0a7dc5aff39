"""What a model's cache looks like, asked of the library's own layers: no list of model types."""

from __future__ import annotations

import importlib.util
import inspect
from collections.abc import Collection, Sequence
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvbench.physics import Architecture, UnknownFamily
from kvbench.physics.architecture import FAMILIES, Layer

if TYPE_CHECKING:
    from kvbench.inputs.models import LoadedModel

#: Kinds of decoder layers by what they keep, with the words for them: all keys and values; those of a
#: window; those of a chunk; a state of fixed size; a state beside keys and values; something else.
KINDS = {
    "full": "attention to all tokens",
    "sliding": "a sliding window",
    "chunked": "chunked attention",
    "state": "a state of fixed size",
    "hybrid": "a state beside keys and values",
    "other": "a cache of their own kind",
}

#: Oldest and newest release of transformers with which the tests of all known families were run.
CHECKED_VERSIONS = ((5, 15), (5, 23))


def cache_argument(model: LoadedModel) -> str | None:
    """Name under which the model's forward pass takes a cache, or None if it takes none.

    From transformers 5.24 on it is ``cache`` everywhere. Earlier, and in XLM still, that is the name of a
    mapping of a family's own, which the annotation tells apart.
    """
    taken = inspect.signature(model.model.forward).parameters
    for name in ("past_key_values", "cache_params"):
        if name in taken:
            return name
    if "cache" in taken and "dict" not in str(taken["cache"].annotation):
        return "cache"
    return None


def architecture(model: LoadedModel) -> Architecture | None:
    """The sizes of each layer, or None for a family that :mod:`kvbench.physics` does not describe."""
    try:
        return Architecture.from_config(model.architecture)
    except UnknownFamily:
        return None


def known(model: LoadedModel) -> bool:
    """Whether the family is one whose tokens and bytes are checked in the tests, strategy by strategy.

    A decoder of a known family inside a model with more parts is not: the parts around it may matter. Nor
    is any family with a transformers outside :data:`CHECKED_VERSIONS`: a release may break one strategy of
    one family, as 5.24 did the paged cache of OPT.
    """
    version = library_version()
    checked = version is not None and CHECKED_VERSIONS[0] <= version <= CHECKED_VERSIONS[1]
    return checked and model.model.config.model_type in FAMILIES and architecture(model) is not None


def library_version() -> tuple[int, ...] | None:
    """The first two numbers of the version of transformers; None where it is not installed."""
    try:
        return tuple(map(int, metadata.version("transformers").split(".")[:2]))
    except metadata.PackageNotFoundError:
        return None


def layer_kinds(model: LoadedModel) -> tuple[str, ...]:
    """The kind of each layer that has a cache, in order, as the library would make them by default."""
    from transformers import DynamicCache
    from transformers.cache_utils import DynamicLayer

    config = model.model.config.get_text_config(decoder=True)
    types = getattr(config, "layer_types", None) or []
    chunked = getattr(config, "attention_chunk_size", None) is not None

    def kind(index: int, layer: Any) -> str:
        if hasattr(layer, "recurrent_states"):
            return "hybrid" if hasattr(layer, "keys") else "state"
        if getattr(layer, "is_sliding", False):
            named = types[index] if index < len(types) else ""
            return "chunked" if named == "chunked_attention" or chunked else "sliding"
        return "full" if type(layer) is DynamicLayer else "other"

    return tuple(kind(*found) for found in enumerate(DynamicCache(config=config).layers))


def planned_kinds(arch: Architecture) -> tuple[str, ...]:
    """The kind of each layer of a known family, as :func:`layer_kinds` finds it, from the sizes alone."""

    def kind(layer: Layer) -> str:
        if layer.state or layer.float_state:
            return "hybrid" if layer.stored else "state"
        return "full" if layer.window is None else "sliding"

    return tuple(map(kind, arch.layers))


def library_source(*parts: str) -> str | None:
    """A source file of the installed transformers, which is not imported; None where it is not there."""
    package = importlib.util.find_spec("transformers")
    path = Path(package.origin).parent.joinpath(*parts) if package and package.origin else None
    return path.read_text(encoding="utf-8") if path and path.is_file() else None


@cache
def attention_can_be_replaced(family: str) -> bool | None:
    """Whether the library lets an engine replace a family's attention; None where no library is."""
    name = family.removesuffix("_text")
    source = library_source("models", name, f"modeling_{name}.py")
    return None if source is None else "_supports_attention_backend = True" in source


def cacheless(name: str, model: LoadedModel) -> str | None:
    """Why no cache of the library's can serve the model, whatever its layers keep, or None.

    Parameters
    ----------
    name:
        The strategy, as the sentence shall call it.
    """
    kind = model.model.config.model_type
    if cache_argument(model) is None:
        return (
            f"{name} needs a model whose forward pass takes a cache of transformers; that of {kind} "
            "takes none"
        )
    try:
        layer_kinds(model)
    except (AttributeError, KeyError, TypeError):
        return f"{name}: this transformers has no cache for the layers of {kind}"
    return None


def refusal(name: str, kinds: Sequence[str], allowed: Collection[str]) -> str | None:
    """Why a cache that has only the ``allowed`` kinds of layers cannot serve layers of these, or None.

    Parameters
    ----------
    name:
        The strategy, as the sentence shall call it.
    """
    wrong = [kind for kind in kinds if kind not in allowed]
    if not wrong:
        return None
    return (
        f"{name} has no cache for {len(wrong)} of {len(kinds)} layers of this model, which keep "
        f"{KINDS[wrong[0]]}"
    )
