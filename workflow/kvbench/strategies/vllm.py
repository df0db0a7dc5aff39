"""vLLM's own cache: blocks of a pool, with and without keeping the prefixes it has seen."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from kvbench import checkout, physics
from kvbench.engines import vllm
from kvbench.inputs.models import LoadedModel
from kvbench.physics import Architecture, Traffic
from kvbench.strategies.base import AUTO, Generation, Session, Strategy
from kvbench.strategies.options import option


@dataclass(frozen=True)
class HeldBlocks:
    """What the engine holds for a turn.

    Attributes
    ----------
    held_bytes:
        Bytes of the blocks that the turn fills.
    reserved_bytes:
        Bytes of the pool, which the engine takes at its start.
    """

    held_bytes: int
    reserved_bytes: int


@dataclass(frozen=True)
class Vllm(Strategy):
    """vLLM's blocks (PagedAttention: Kwon et al. 2023), every prompt computed anew.

    Parameters
    ----------
    block_size:
        Tokens per block; attention on a CPU takes multiples of 32.
    """

    block_size: int = option(32, "b", least=1, label="blocks of {}", label_pt="blocos de {}")

    name: ClassVar[str] = "vllm"
    engine: ClassVar[str] = "vllm"
    prefix_caching: ClassVar[bool] = False
    unchunked: ClassVar[str] = "has an engine that chooses its own passes over a prompt"

    def contradiction(self) -> str | None:
        """The attention is the engine's own."""
        if self.attention != AUTO:
            return f"{type(self).name} brings its own attention; leave attention out"
        return super().contradiction()

    def available(self, model: LoadedModel | None, device: str) -> str | None:
        """VLLM has an environment of its own."""
        # The engine has caches of its own, whatever the library's layers are.
        return vllm.unavailable() or super().available(None, device)

    def unfit(self, kinds: Sequence[str], arch: Architecture | None) -> str | None:
        """The engine has caches of its own, whatever the library's layers are."""
        return None

    def traffic(self, max_length: int) -> Traffic:
        """Whole blocks are held for the tokens that a turn has."""
        return physics.Paged(self.block_size)

    def session(self, model: LoadedModel, max_length: int, batch: int = 1) -> Session:
        """Open a conversation; see :meth:`Strategy.session`."""
        return _VllmSession(self, model, max_length)


@dataclass(frozen=True)
class VllmPrefixCaching(Vllm):
    """vLLM with automatic prefix caching: blocks of an earlier prompt's beginning are used again."""

    name: ClassVar[str] = "vllm_prefix_caching"
    prefix_caching: ClassVar[bool] = True
    reuses_turns: ClassVar[bool] = True
    without_reuse: ClassVar[str] = "vllm"


class _VllmSession(Session):
    """Keeps the engine's process from turn to turn and from conversation to conversation."""

    def __init__(self, strategy: Vllm, model: LoadedModel, max_length: int) -> None:
        import torch

        self._block_size = strategy.block_size
        self._scratch = checkout.scratch()
        try:
            self._worker = vllm.Worker(
                model=str(_checkpoint(model, self._scratch)),
                dtype=str(model.model.dtype).removeprefix("torch."),
                device=str(model.model.device.type),
                # The engine wants room for one token more than it is asked for.
                max_length=max_length + 1,
                prefix_caching=strategy.prefix_caching,
                block_size=strategy.block_size,
                threads=torch.get_num_threads(),
                seed=0,
            )
        except BaseException:
            shutil.rmtree(self._scratch, ignore_errors=True)
            raise
        self.facts = self._worker.facts

    def generate(
        self, token_ids: Sequence[int], max_new_tokens: int, on_token: Callable[[], None]
    ) -> Generation:
        """Generate one turn; the engine stamps the tokens itself."""
        answer = self._worker.generate(list(token_ids), max_new_tokens)
        # The last token is returned and not kept: nothing follows it.
        kept = len(token_ids) + max_new_tokens - 1
        block = self.facts["block_bytes"]
        held = -(-kept // self._block_size) * block
        return Generation(
            answer["tokens"],
            HeldBlocks(held, self.reserved_bytes),
            reused_tokens=answer["reused"],
            stamps=answer["stamps"],
        )

    def held_together(self, prompts: Sequence[list[int]], new_tokens: int) -> int:
        """Bytes of the most blocks that requests have at a time, when they are served at once."""
        return self._worker.together(list(prompts), new_tokens) * self.facts["block_bytes"]

    @property
    def reserved_bytes(self) -> int:
        """Bytes of the pool that the engine takes at its start, whatever is in it."""
        return self.facts["blocks"] * self.facts["block_bytes"]

    def restart(self) -> None:
        """Forget the conversation, its blocks included."""
        self._worker.forget()

    def close(self) -> None:
        """End the engine's process and remove what was written for it."""
        self._worker.close()
        shutil.rmtree(self._scratch, ignore_errors=True)


def _checkpoint(model: LoadedModel, scratch: Path) -> Path:
    """A folder with the model's weights in a file: written here, so that it holds what is measured."""
    model.model.save_pretrained(scratch)
    return scratch
