"""Short conversations that show whether a strategy runs on a model of a family nobody has tried."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib import metadata
from typing import TYPE_CHECKING, Any, TypeAlias

from kvbench.errors import Unsupported
from kvbench.layout import MIXED

if TYPE_CHECKING:
    import torch

    from kvbench.inputs.models import LoadedModel
    from kvbench.strategies.base import Session, Strategy

#: New tokens of each turn or request, and the scores behind each of them.
Answers: TypeAlias = "tuple[list[list[int]], list[torch.Tensor]]"

#: Tokens of the first prompt and of the second question, and new tokens of both turns: odd lengths, so
#: that groups of numbers do not come out even by luck.
_PROMPT, _QUESTION, _NEW = 23, 5, 6
#: Prompts that are asked together, and by how many tokens each is shorter than the one before.
_ROWS, _SHORTER = 3, 5
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
    return _remembered(strategy.id, lambda: _tried(strategy, model), model)


def batch_outcome(strategy: Strategy, model: LoadedModel, lengths: str) -> str | None:
    """Return why the strategy cannot serve several requests at once, in one sentence, or None when it can.

    Every request must have the tokens and scores it has by itself, as :func:`outcome` says.

    Parameters
    ----------
    lengths:
        Whether the prompts are ``equal``ly long or ``mixed``, the shorter ones padded.
    """
    name = f"{strategy.id} on prompts of {lengths} lengths"
    return _remembered(name, lambda: _tried_together(strategy, model, lengths), model)


def _remembered(name: str, found: Callable[[], str | None], model: LoadedModel) -> str | None:
    if name not in model.trials:
        model.trials[name] = found()
    return model.trials[name]


def _tried(strategy: Strategy, model: LoadedModel) -> str | None:
    from kvbench.strategies.recompute import NoCache

    exactly = _without_loss(strategy)
    back = strategy.reuses_turns
    try:
        found = _talk(strategy.small(), model, back)
        if exactly is not None and not strategy.exact:
            found = _talk(exactly, model, back)
    except Exception as error:
        return _failed(strategy.id, model, error)
    if exactly is None or strategy.id == NoCache.name or not _in_float32(model):
        return None
    try:
        expected = _talk(NoCache(), model, back)
    except Exception:
        # There is nothing to compare with; the control itself will say why.
        return None
    if what := _difference(found, expected):
        return _differs(what, strategy.id, model, "without a cache")
    return None


def _tried_together(strategy: Strategy, model: LoadedModel, lengths: str) -> str | None:
    exactly = _without_loss(strategy)
    cut = _SHORTER if lengths == MIXED else 0
    asked = _ids(model, _PROMPT, 7)
    rows = [[*asked[row:], *asked[:row]][row * cut :] for row in range(_ROWS)]
    name = f"{strategy.id} for several prompts of {lengths} lengths"
    try:
        found = _reply(strategy.small() if exactly is None else exactly, model, rows)
        if exactly is None or not _in_float32(model):
            return None
        alone = [_reply(exactly, model, [row]) for row in rows]
    except Unsupported as error:
        return str(error)
    except Exception as error:
        return _failed(name, model, error)
    tokens = [reply for replies, _ in alone for reply in replies]
    scores = [scores for _, found_scores in alone for scores in found_scores]
    if what := _difference(found, (tokens, scores)):
        return _differs(what, name, model, "for each by itself")
    return None


def _without_loss(strategy: Strategy) -> Strategy | None:
    """The strategy with sizes that lose nothing of a short conversation, or None where it has no such."""
    return strategy.small() if strategy.exact else strategy.lossless()


def _in_float32(model: LoadedModel) -> bool:
    return str(model.model.dtype) == "torch.float32"


def _failed(name: str, model: LoadedModel, error: Exception) -> str:
    """The sentence for whatever a library of many families raises: it means the same here."""
    words = " ".join(str(error).split())[:160] or "no message"
    return (
        f"transformers {metadata.version('transformers')} cannot run {name} on "
        f"{model.model.config.model_type}: {type(error).__name__}: {words}"
    )


def _differs(what: str, name: str, model: LoadedModel, than: str) -> str:
    return (
        f"transformers {metadata.version('transformers')} gives other {what} with {name} on "
        f"{model.model.config.model_type} than {than}"
    )


def _difference(found: Answers, expected: Answers) -> str | None:
    """What differs by more than rounding, or None; engines give no scores to compare."""
    if found[0] != expected[0]:
        return "tokens"
    apart = any(
        float((one - other).abs().max()) > _APART * float(other.std())
        for one, other in zip(found[1], expected[1], strict=False)
    )
    return "scores" if apart else None


def _talk(strategy: Strategy, model: LoadedModel, back: bool) -> Answers:
    """Two turns whose tokens depend on nothing but the model, and the scores behind each new token.

    Parameters
    ----------
    back:
        Whether a third turn follows whose history differs from the second's in its last tokens.
    """
    import torch

    window = _window(model)
    asked = _ids(model, max(_PROMPT, window + 9 if window <= _LONGEST_WINDOW else 0), 7)
    more = _ids(model, _QUESTION, 11)
    replies: list[list[int]] = []
    scores: list[torch.Tensor] = []
    with torch.inference_mode():
        session = strategy.session(model, len(asked) + _QUESTION + 2 * _NEW)
        compiled = strategy.compiled(model.model.device.type)
        with _listening(session, model, compiled) as heard:
            session.restart()
            history = asked
            for turn in range(3 if back else 2):
                if turn == 1:
                    history = [*asked, *replies[0], *more]
                elif turn == 2:
                    history = [*history[:-_QUESTION], *reversed(more)]
                replies.append(session.generate(history, _NEW, lambda: None).tokens)
                # Of a prompt read in chunks the last pass alone predicts.
                scores += [one[0] for one in heard[-_NEW:]]
    return replies, scores


def _reply(strategy: Strategy, model: LoadedModel, rows: Sequence[Sequence[int]]) -> Answers:
    """What one turn gives to each of the prompts, and the scores behind it, row by row."""
    import torch

    length = max(map(len, rows)) + _NEW
    with torch.inference_mode():
        several = (len(rows),) if len(rows) > 1 else ()
        session = strategy.session(model, length, *several)
        compiled = strategy.compiled(model.model.device.type)
        with _listening(session, model, compiled) as heard:
            session.restart()
            if several:
                replies = session.generate_batch(rows, _NEW, lambda: None).rows
            else:
                replies = [session.generate(rows[0], _NEW, lambda: None).tokens]
            steps = heard[-_NEW:]
    return replies, [step[row] for row in range(len(rows)) for step in steps]


@contextmanager
def _listening(
    session: Session, model: LoadedModel, compiled: bool
) -> Iterator[list[torch.Tensor]]:
    """Keep the scores of each pass for its next tokens, rows x vocabulary; close the session at the end."""
    import torch

    from kvbench.strategies.base import GenerateSession

    heard: list[torch.Tensor] = []

    @torch.compiler.disable
    def hear(_module: Any, _given: Any, output: Any) -> None:
        heard.append(output.logits[:, -1].detach().float())

    # Engines call the model with several requests at once, in an order of their own.
    ours = isinstance(session, GenerateSession)
    hook = model.model.register_forward_hook(hear) if ours else None
    try:
        yield heard
    finally:
        if hook is not None:
            hook.remove()
        session.close()
        if compiled:
            # What was compiled here knows the hook, and counts towards the most that torch compiles anew.
            torch.compiler.reset()


def _ids(model: LoadedModel, length: int, step: int) -> list[int]:
    """Token ids of a prompt; ``step`` makes one prompt differ from another."""
    vocabulary = model.model.config.get_text_config(decoder=True).vocab_size
    return [(step * i + 3) % vocabulary for i in range(length)]


def _window(model: LoadedModel) -> int:
    config = model.model.config.get_text_config(decoder=True)
    found = [getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size")]
    return max((size for size in found if isinstance(size, int)), default=0)
