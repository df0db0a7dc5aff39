"""A short conversation that shows whether a strategy runs on a model of a family nobody has tried."""

from __future__ import annotations

from importlib import metadata
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from kvbench.inputs.models import LoadedModel
    from kvbench.strategies.base import Strategy

#: Tokens of the first prompt and of the second question, and new tokens of both turns: odd lengths, so
#: that groups of numbers do not come out even by luck.
_PROMPT, _QUESTION, _NEW = 23, 5, 6
#: Longest window of the model that the conversation is made to outgrow.
_LONGEST_WINDOW = 256
#: Differences of scores that rounding alone does not make, as a share of the scores' own spread.
_APART = 0.02


def outcome(strategy: Strategy, model: LoadedModel) -> str | None:
    """Return why the strategy cannot be used, in one sentence, or None when it can.

    An exact strategy must give the tokens of recomputation in float32, and its scores, since tokens may
    be equal by luck; so must a lossy one with sizes that lose nothing, where it has such. In other dtypes
    only errors count. The outcome is remembered with the model.
    """
    name = strategy.id
    if name not in model.trials:
        model.trials[name] = _tried(strategy, model)
    return model.trials[name]


def _tried(strategy: Strategy, model: LoadedModel) -> str | None:
    from kvbench.strategies.recompute import NoCache

    name, kind = strategy.id, model.model.config.model_type
    exactly = strategy.small() if strategy.exact else strategy.lossless()
    try:
        found = _talk(strategy.small(), model)
        if exactly is not None and not strategy.exact:
            found = _talk(exactly, model)
    except Exception as error:
        # Whatever a library of many families raises, it means the same here.
        words = " ".join(str(error).split())[:160] or "no message"
        return (
            f"transformers {metadata.version('transformers')} cannot run {name} on {kind}: "
            f"{type(error).__name__}: {words}"
        )
    in_float32 = str(model.model.dtype) == "torch.float32"
    if exactly is not None and in_float32 and strategy.id != NoCache.name:
        try:
            expected = _talk(NoCache(), model)
        except Exception:
            # There is nothing to compare with; the control itself will say why.
            return None
        what = "tokens" if found[0] != expected[0] else "scores"
        if what == "tokens" or _apart(found[1], expected[1]):
            return (
                f"transformers {metadata.version('transformers')} gives other {what} with {name} on "
                f"{kind} than without a cache"
            )
    return None


def _apart(found: list[torch.Tensor], expected: list[torch.Tensor]) -> bool:
    """Whether the scores of any token differ by more than rounding; engines give none to compare."""
    return any(
        float((one - other).abs().max()) > _APART * float(other.std())
        for one, other in zip(found, expected, strict=False)
    )


def _talk(strategy: Strategy, model: LoadedModel) -> tuple[list[list[int]], list[torch.Tensor]]:
    """Two turns whose tokens depend on nothing but the model, and the scores behind each new token."""
    import torch

    from kvbench.strategies.base import GenerateSession

    vocabulary = model.model.config.get_text_config(decoder=True).vocab_size
    window = _window(model)
    length = max(_PROMPT, window + 9 if window <= _LONGEST_WINDOW else 0)
    asked = [(7 * i + 3) % vocabulary for i in range(length)]
    more = [(11 * i + 5) % vocabulary for i in range(_QUESTION)]
    heard: list[torch.Tensor] = []

    def hear(_module: Any, _given: Any, output: Any) -> None:
        heard.append(output.logits[0, -1].detach().float())

    scores: list[torch.Tensor] = []
    with torch.inference_mode():
        session = strategy.session(model, length + _QUESTION + 2 * _NEW)
        # Engines call the model with several requests at once, in an order of their own.
        ours = isinstance(session, GenerateSession)
        hook = model.model.register_forward_hook(hear) if ours else None
        try:
            session.restart()
            first = session.generate(asked, _NEW, lambda: None).tokens
            # Of a prompt read in chunks the last pass alone predicts.
            scores += heard[-_NEW:]
            second = session.generate([*asked, *first, *more], _NEW, lambda: None).tokens
            scores += heard[-_NEW:]
        finally:
            if hook is not None:
                hook.remove()
            session.close()
    return [first, second], scores


def _window(model: LoadedModel) -> int:
    config = model.model.config.get_text_config(decoder=True)
    found = [getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size")]
    return max((size for size in found if isinstance(size, int)), default=0)
