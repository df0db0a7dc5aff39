"""Compressed caches: after reading the prompt, the tokens that seem to matter least are dropped."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from importlib import metadata
from typing import Any, ClassVar

from kvbench import physics
from kvbench.inputs.models import LoadedModel
from kvbench.layout import MIXED
from kvbench.physics import Traffic
from kvbench.strategies.base import Generation, Session, Strategy, text_config
from kvbench.strategies.options import option

PACKAGE = "kvpress"


@dataclass(frozen=True)
class Pressed(Strategy):
    """A dynamic cache compressed once per turn, after the prompt, by a method of ``kvpress``.

    Parameters
    ----------
    compression_ratio:
        Share of the prompt's tokens that is dropped, in every layer and head.
    """

    compression_ratio: float = option(
        0.5, "c", least=0, most=0.99, label="{} dropped", label_pt="{} descartados"
    )

    exact: ClassVar[bool] = False
    #: The presses score the keys and values of all tokens.
    layers: ClassVar[frozenset[str]] = frozenset({"full"})
    press: ClassVar[str]
    unchunked: ClassVar[str] = "scores the tokens of a prompt that is read in one pass"
    #: Longest prompt, in tokens, that the method cannot compress; it stays whole.
    too_short: ClassVar[int] = 0

    def available(self, model: LoadedModel | None, device: str) -> str | None:
        """The package is optional and says which transformers it was written for."""
        if importlib.util.find_spec(PACKAGE) is None:
            return f"{self.id} needs the package {PACKAGE} (pip install {PACKAGE})"
        return _misfit(self.id) or super().available(model, device)

    def misfit_batch(self, model: LoadedModel, lengths: str) -> str | None:
        """A press scores every position, and knows of no padding."""
        if lengths == MIXED:
            return f"{self.id}: the press would score the padding before shorter prompts as tokens"
        return super().misfit_batch(model, lengths)

    def traffic(self, max_length: int) -> Traffic:
        """Decoding reads what is left of the prompt, and all new tokens."""
        return physics.Pruned(self.compression_ratio, self.too_short or None)

    def session(self, model: LoadedModel, max_length: int, batch: int = 1) -> Session:
        """Open a conversation; see :meth:`Strategy.session`."""
        import kvpress

        press = getattr(kvpress, self.press)(compression_ratio=self.compression_ratio)
        return PressedSession(model, press, self.too_short)


def _misfit(name: str) -> str | None:
    """Why the installed kvpress does not fit the installed transformers, or None if it does."""
    from packaging.requirements import Requirement

    installed = metadata.version("transformers")
    for line in metadata.requires(PACKAGE) or ():
        wanted = Requirement(line)
        if wanted.name == "transformers" and not wanted.specifier.contains(installed):
            return (
                f"{name}: {PACKAGE} {metadata.version(PACKAGE)} wants transformers"
                f"{wanted.specifier}; installed is {installed}"
            )
    return None


class PressedSession(Session):
    """A greedy loop of its own, because tokens keep their positions when others are dropped.

    ``generate`` would count positions from the length of the compressed cache.

    Parameters
    ----------
    model:
        The loaded model.
    press:
        A press of kvpress: a context manager that compresses the cache of a forward pass.
    too_short:
        Longest prompt that is left as it is.
    """

    def __init__(self, model: LoadedModel, press: Any, too_short: int = 0) -> None:
        self._model = model
        self._press = press
        self._too_short = too_short

    def generate(
        self, token_ids: Sequence[int], max_new_tokens: int, on_token: Callable[[], None]
    ) -> Generation:
        """Generate one turn; see :meth:`Session.generate`."""
        (tokens,), cache = self._run([token_ids], max_new_tokens, on_token)
        return Generation(tokens, cache)

    def generate_batch(
        self, rows: Sequence[Sequence[int]], max_new_tokens: int, on_token: Callable[[], None]
    ) -> Generation:
        """Generate for rows of one length; each is compressed by its own scores."""
        found, cache = self._run(rows, max_new_tokens, on_token)
        return Generation(found[0], cache, rows=found, padding=(0,) * len(rows))

    def _run(
        self, rows: Sequence[Sequence[int]], max_new_tokens: int, on_token: Callable[[], None]
    ) -> tuple[list[list[int]], Any]:
        import torch
        from transformers import DynamicCache

        model = self._model.model
        cache = DynamicCache(config=text_config(self._model))
        with torch.inference_mode():
            ids = torch.tensor([list(row) for row in rows], device=model.device)
            long_enough = ids.shape[1] > self._too_short
            with self._press(model) if long_enough else nullcontext():
                output = model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
            position = torch.tensor([[ids.shape[1]]], device=model.device)
            tokens = []
            for number in range(max_new_tokens):
                if number:
                    output = model(
                        tokens[-1], position_ids=position, past_key_values=cache, use_cache=True
                    )
                    position = position + 1
                tokens.append(output.logits[:, -1:].argmax(-1))
                on_token()
            return torch.cat(tokens, dim=-1).tolist(), cache


@dataclass(frozen=True)
class KvpressKnorm(Pressed):
    """Drops the half of the prompt whose keys have the largest norms (kvpress ``KnormPress``).

    Devoto et al. (2024), "A simple and effective L2 norm-based strategy for KV cache compression",
    arXiv 2406.11430.
    """

    name: ClassVar[str] = "kvpress_knorm"
    press: ClassVar[str] = "KnormPress"


@dataclass(frozen=True)
class KvpressSnapKV(Pressed):
    """Drops the half of the prompt that its last tokens attend to least (kvpress ``SnapKVPress``).

    Li et al. (2024), "SnapKV: LLM knows what you are looking for before generation", arXiv
    2404.14469. The method looks from a window of last tokens, 64 by kvpress' default,
    at those before them. A prompt
    that is no longer stays whole, where kvpress itself would stop; one of less than about twice the
    window keeps only tokens of the window, which all score the same.
    """

    name: ClassVar[str] = "kvpress_snapkv"
    press: ClassVar[str] = "SnapKVPress"
    too_short: ClassVar[int] = 64
