"""What the physics module says of a loaded model: its sizes, and the bytes each turn should hold."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from kvbench import physics
from kvbench.errors import InputError

if TYPE_CHECKING:
    from kvbench.inputs.models import LoadedModel
    from kvbench.measurement.cell import Known


def described(model: LoadedModel) -> dict[str, Any]:
    """The model's entry in a record.

    Returns
    -------
    dict
        ``parameter_bytes``, ``family``, ``attention`` (its implementation), ``architecture`` (plain form,
        None for a family that nothing is known of) and ``not_predicted`` (why nothing is predicted, or
        None).
    """
    sizes, reason = None, None
    try:
        sizes = physics.Architecture.from_config(model.architecture).as_dict()
    except InputError as error:
        reason = str(error)
    return {
        "parameter_bytes": model.parameter_bytes,
        "family": model.model.config.model_type,
        "attention": model.model.config._attn_implementation,
        "architecture": sizes,
        "not_predicted": reason,
    }


def kv_bytes(
    described: dict[str, Any],
    traffic: physics.Traffic,
    turns: Sequence[Known],
    bytes_per_element: int,
) -> list[int | None]:
    """Bytes that each turn should leave in the cache; None, and a reason in the entry, if unknown.

    Of a batch they are those of all rows, each as long as the longest: padded positions are stored.
    """
    return _of_each_turn(
        described,
        turns,
        lambda arch, passes, turn: traffic.held_bytes(
            arch, passes, bytes_per_element, len(turn.prompts) or 1
        ),
    )


def padding_bytes(
    described: dict[str, Any],
    traffic: physics.Traffic,
    turns: Sequence[Known],
    bytes_per_element: int,
) -> list[int | None]:
    """Bytes of each turn's cache that padded positions take; None if unknown."""
    return _of_each_turn(
        described,
        turns,
        lambda arch, passes, turn: traffic.padding_bytes(
            arch, passes, turn.padding, bytes_per_element
        ),
    )


def _of_each_turn(
    described: dict[str, Any],
    turns: Sequence[Known],
    size: Callable[[physics.Architecture, list[int], Known], int],
) -> list[int | None]:
    """A size of each turn's cache, told from the forward passes behind it."""
    if described["architecture"] is None:
        return [None] * len(turns)
    arch = physics.Architecture.from_dict(described["architecture"])
    # The forward passes behind each cache: reading what is new, then one token at a time.
    updates: list[list[int]] = []
    for turn in turns:
        earlier = updates[-1] if turn.reused_tokens else []
        if earlier and sum(earlier) > turn.reused_tokens:
            # Some tokens were given back: one update stands for those that stayed.
            earlier = [turn.reused_tokens]
        fresh = turn.prompt_tokens - turn.reused_tokens
        updates.append([*earlier, fresh, *[1] * (turn.new_tokens - 1)])
    try:
        return [size(arch, *pair) for pair in zip(updates, turns, strict=True)]
    except InputError as error:
        described["not_predicted"] = str(error)
        return [None] * len(turns)
