"""The paged cache: keys and values in fixed-size blocks, run by the continuous-batching engine."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from kvbench import physics
from kvbench.inputs.models import LoadedModel
from kvbench.physics import Architecture, Traffic
from kvbench.strategies import shape
from kvbench.strategies.base import AUTO, Generation, Session, Strategy
from kvbench.strategies.options import option

#: Blocks of the engine's own: one to read zeros from, one to write nothing to.
_OWN_BLOCKS = 2


@dataclass(frozen=True)
class Paged(Strategy):
    """Blocks from a common pool (PagedAttention: Kwon et al. 2023), through ``generate_batch``'s engine.

    All sizes are explicit: the engine's own choice is a share of the machine's memory, which would
    measure the machine.

    Parameters
    ----------
    block_size:
        Tokens per block.
    block_sharing:
        Whether requests with the same prefix share blocks.
    """

    block_size: int = option(16, "b", least=1, label="blocks of {}", label_pt="blocos de {}")
    block_sharing: bool = option(
        False, "sharing", label="shared blocks", label_pt="blocos partilhados"
    )

    name: ClassVar[str] = "paged"
    own_thread: ClassVar[bool] = True
    #: The engine reads windows from the configuration, but gave other tokens with them (5.15.1).
    layers: ClassVar[frozenset[str]] = frozenset({"full"})
    unchunked: ClassVar[str] = "has an engine that chooses its own passes over a prompt"

    def contradiction(self) -> str | None:
        """The attention is the engine's own."""
        if self.attention != AUTO:
            return f"{type(self).name} brings its own attention; leave attention out"
        return super().contradiction()

    def available(self, model: LoadedModel | None, device: str) -> str | None:
        """The engine came with transformers 4.53."""
        try:
            from transformers import ContinuousBatchingConfig  # noqa: F401
        except ImportError:
            return "paged needs a transformers with ContinuousBatchingConfig (5.0 or newer)"
        return super().available(model, device)

    def misfit(self, model: LoadedModel) -> str | None:
        """The engine puts its own attention in the model's place, where the model lets it."""
        if not getattr(model.model, "_supports_attention_backend", False):
            return _irreplaceable(model.model.config.model_type)
        return super().misfit(model)

    def unfit(self, kinds: Sequence[str], arch: Architecture | None) -> str | None:
        """Blocks are of one size, and read by an attention of the engine's own."""
        if arch is not None and shape.attention_can_be_replaced(arch.family) is False:
            return _irreplaceable(arch.family)
        if arch is not None and any(layer.expansion for layer in arch.layers):
            return "paged has blocks for keys and values of one size; this model keeps latents"
        return super().unfit(kinds, arch)

    def blocks(self, max_length: int, batch: int = 1) -> int:
        """Blocks that hold ``max_length`` tokens of each request, plus one each that is being filled.

        The engine adds :data:`_OWN_BLOCKS`; every request of a batch but one brings as many, so that the
        pool is that of one request times the batch.
        """
        return batch * (-(-max_length // self.block_size) + 1 + _OWN_BLOCKS) - _OWN_BLOCKS

    def traffic(self, max_length: int) -> Traffic:
        """The pool is allocated at once; a turn reads the pages it has filled."""
        pool = (self.blocks(max_length) + _OWN_BLOCKS) * self.block_size
        return physics.Paged(self.block_size, pool)

    def session(self, model: LoadedModel, max_length: int, batch: int = 1) -> Session:
        """Open a conversation; see :meth:`Strategy.session`."""
        return _PagedSession(self, model, max_length, batch)


def _irreplaceable(kind: str) -> str:
    return f"paged replaces the model's attention, and that of {kind} cannot be replaced"


_STOPPED = "the continuous-batching engine stopped before the turn was complete"


def _finished(result: Any) -> bool:
    """Whether a request has all its tokens; an error of the engine's is raised."""
    if result.error:
        raise RuntimeError(f"the continuous-batching engine failed: {result.error}")
    return result.is_finished()


class _PagedSession(Session):
    """Keeps the engine's thread alive from turn to turn."""

    def __init__(self, strategy: Paged, model: LoadedModel, max_length: int, batch: int) -> None:
        from transformers import ContinuousBatchingConfig, GenerationConfig

        self._model = model
        known = inspect.signature(ContinuousBatchingConfig).parameters
        # Newer releases call it page_size and warn about block_size, which they still take.
        size = "page_size" if "page_size" in known else "block_size"
        self._attention = model.model.config._attn_implementation
        self._manager = model.model.init_continuous_batching(
            generation_config=GenerationConfig(
                do_sample=False, eos_token_id=-1, pad_token_id=0, max_new_tokens=max_length
            ),
            continuous_batching_config=ContinuousBatchingConfig(
                **{size: strategy.block_size},
                num_blocks=strategy.blocks(max_length, batch),
                # Prompts of a batch are read one after the other, in passes of so many tokens.
                max_batch_tokens=max(256, max_length),
                allow_block_sharing=strategy.block_sharing,
            ),
        )
        self._manager.start()

    def generate(
        self, token_ids: Sequence[int], max_new_tokens: int, on_token: Callable[[], None]
    ) -> Generation:
        """Generate one turn; see :meth:`Session.generate`."""
        request = self._asked(token_ids, max_new_tokens)
        for result in self._manager.request_id_iter(request):
            if _finished(result):
                return Generation(
                    list(result.generated_tokens), self._cache(), stamps=list(result.timestamps)
                )
        raise RuntimeError(_STOPPED)

    def generate_batch(
        self, rows: Sequence[Sequence[int]], max_new_tokens: int, on_token: Callable[[], None]
    ) -> Generation:
        """Serve requests that arrive together; nothing is padded.

        The engine decides whose prompt is read when, so requests get their tokens at different moments:
        a step's stamp is that of the last request to have its token.
        """
        requests = [self._asked(row, max_new_tokens) for row in rows]
        found = {}
        for result in self._manager:
            if _finished(result):
                found[result.request_id] = result
                if len(found) == len(requests):
                    break
        if len(found) < len(requests):
            raise RuntimeError(_STOPPED)
        tokens = [list(found[request].generated_tokens) for request in requests]
        steps = zip(*(found[request].timestamps for request in requests), strict=True)
        return Generation(
            tokens[0],
            self._cache(),
            stamps=[max(step) for step in steps],
            rows=tokens,
            padding=(0,) * len(rows),
        )

    def _asked(self, token_ids: Sequence[int], max_new_tokens: int) -> str:
        return self._manager.add_request(
            list(token_ids),
            max_new_tokens=max_new_tokens,
            streaming=False,
            record_timestamps=True,
            eos_token_id=-1,
        )

    def _cache(self) -> Any:
        return getattr(self._manager.batch_processor, "cache", None)

    def close(self) -> None:
        """Stop the engine and give the model back its usual attention."""
        self._manager.stop(block=True, timeout=10)
        if hasattr(self._manager, "destroy"):
            self._manager.destroy()
        self._model.model.set_attn_implementation(self._attention)
