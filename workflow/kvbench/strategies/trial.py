"""A short conversation that shows whether a strategy runs on a model of a family nobody has tried."""

from __future__ import annotations

from importlib import metadata
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kvbench.inputs.models import LoadedModel
    from kvbench.strategies.base import Strategy

#: Tokens of the first prompt and of the second question, and new tokens of both turns: odd lengths, so
#: that groups of numbers do not come out even by luck.
_PROMPT, _QUESTION, _NEW = 23, 5, 6
#: Longest window of the model that the conversation is made to outgrow.
_LONGEST_WINDOW = 256


def outcome(strategy: Strategy, model: LoadedModel) -> str | None:
    """Return why the strategy cannot be used, in one sentence, or None when it can.

    An exact strategy must give the tokens of recomputation in float32; in other dtypes and for lossy
    strategies only errors count. The outcome is remembered with the model.
    """
    name = strategy.id
    if name not in model.trials:
        model.trials[name] = _tried(strategy, model)
    return model.trials[name]


def _tried(strategy: Strategy, model: LoadedModel) -> str | None:
    from kvbench.strategies.recompute import NoCache

    name, kind = strategy.id, model.model.config.model_type
    try:
        found = _talk(strategy.small(), model)
    except Exception as error:
        # Whatever a library of many families raises, it means the same here.
        words = " ".join(str(error).split())[:160] or "no message"
        return (
            f"transformers {metadata.version('transformers')} cannot run {name} on {kind}: "
            f"{type(error).__name__}: {words}"
        )
    if strategy.exact and str(model.model.dtype) == "torch.float32" and strategy.id != NoCache.name:
        try:
            expected = _talk(NoCache(), model)
        except Exception:
            # There is nothing to compare with; the control itself will say why.
            return None
        if found != expected:
            return (
                f"transformers {metadata.version('transformers')} gives other tokens with {name} on "
                f"{kind} than without a cache"
            )
    return None


def _talk(strategy: Strategy, model: LoadedModel) -> list[list[int]]:
    """Two turns whose tokens depend on nothing but the model."""
    import torch

    vocabulary = model.model.config.get_text_config(decoder=True).vocab_size
    window = _window(model)
    length = max(_PROMPT, window + 9 if window <= _LONGEST_WINDOW else 0)
    asked = [(7 * i + 3) % vocabulary for i in range(length)]
    more = [(11 * i + 5) % vocabulary for i in range(_QUESTION)]
    with torch.inference_mode():
        session = strategy.session(model, length + _QUESTION + 2 * _NEW)
        try:
            session.restart()
            first = session.generate(asked, _NEW, lambda: None).tokens
            second = session.generate([*asked, *first, *more], _NEW, lambda: None).tokens
        finally:
            session.close()
    return [first, second]


def _window(model: LoadedModel) -> int:
    config = model.model.config.get_text_config(decoder=True)
    found = [getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size")]
    return max((size for size in found if isinstance(size, int)), default=0)
