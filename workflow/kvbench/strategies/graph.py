"""A static cache with the whole decoding step captured as one CUDA graph."""

from __future__ import annotations

import importlib.util
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from kvbench import physics
from kvbench.inputs.models import LoadedModel
from kvbench.layout import MIXED
from kvbench.physics import Architecture, Traffic
from kvbench.strategies.base import Generation, Session, Strategy, allocated_static_cache
from kvbench.strategies.options import option
from kvbench.strategies.static import GENERATED, LIBRARY, name_the_compilers_cache

if TYPE_CHECKING:
    import torch

#: Settings of the compiler for a step on a GPU. Each was tried on an H100 with one conversation of the 1B
#: geometry: choosing among more shapes of a kernel, several small kernels in one launch, and a kernel that
#: starts before the one before it has ended (programmatic dependent launch).
_TRIED = {"max_autotune_pointwise": True, "combo_kernels": True, "triton.enable_pdl": True}

_NO_POSITIONS = "static_graph needs a model that takes the positions of its tokens"


def _settings(device: str) -> dict[str, Any]:
    """How torch.compile generates the step on a device; settings that this torch has not are left out."""
    from torch._inductor import config

    from kvbench.engines.inductor import generated_products

    known = config.get_config_copy() if device == "cuda" else {}
    tried = {name: value for name, value in _TRIED.items() if name in known}
    return {"post_grad_custom_pre_pass": generated_products(), **tried}


@dataclass(frozen=True)
class StaticGraph(Strategy):
    """Our own greedy loop: prefill once, then replay one captured forward pass per token.

    ``generate`` spends about a millisecond of Python per token; on a fast GPU that is more than
    reading the weights takes. Replaying a graph spends none, so this strategy shows how near the
    memory roof the kernels of a step come.

    Parameters
    ----------
    kernels:
        Whose kernels are captured: those that the library calls one after the other, or those that
        torch.compile generates for the step, fewer and each doing more.
    """

    kernels: str = option(
        LIBRARY,
        "",
        choices=(LIBRARY, GENERATED),
        label="generated kernels",
        label_pt="kernels gerados",
    )

    name: ClassVar[str] = "static_graph"
    devices: ClassVar[frozenset[str]] = frozenset({"cuda"})
    #: The loop's one mask says nothing of windows.
    layers: ClassVar[frozenset[str]] = frozenset({"full"})

    def available(self, model: LoadedModel | None, device: str) -> str | None:
        """Generating kernels for a GPU needs Triton."""
        name_the_compilers_cache()
        reason = super().available(model, device)
        if reason is None and self.kernels == GENERATED and not importlib.util.find_spec("triton"):
            return f"{self.id} needs the package triton (pip install triton)"
        return reason

    def misfit(self, model: LoadedModel) -> str | None:
        """The loop passes positions and a mask itself, which not every forward pass takes."""
        reason = super().misfit(model)
        if (
            reason is None
            and "position_ids" not in inspect.signature(model.model.forward).parameters
        ):
            return _NO_POSITIONS
        return reason

    def unfit(self, kinds: Sequence[str], arch: Architecture | None) -> str | None:
        """Alibi takes positions from the mask."""
        reason = super().unfit(kinds, arch)
        return _NO_POSITIONS if reason is None and arch is not None and arch.alibi else reason

    def misfit_batch(self, model: LoadedModel, lengths: str) -> str | None:
        """All rows stand at one position."""
        if lengths == MIXED:
            return f"{self.id}: the loop's one position and mask serve all rows of a batch"
        return super().misfit_batch(model, lengths)

    def compiled(self, device: str) -> bool:
        """Whether the decoding step runs as a captured graph on ``device``."""
        return True

    def traffic(self, max_length: int) -> Traffic:
        """Attention reads the whole allocation, whatever is in it."""
        return physics.Static(max_length, prefill_chunk=self.chunk)

    def session(self, model: LoadedModel, max_length: int, batch: int = 1) -> Session:
        """Open a conversation; see :meth:`Strategy.session`."""
        on_gpu = model.model.device.type == "cuda"
        return StaticLoopSession(
            model,
            max_length,
            capture=on_gpu,
            batch=batch,
            prefill_chunk=self.chunk,
            generated=self.kernels == GENERATED,
        )


class StaticLoopSession(Session):
    """Greedy decoding over one static cache, with a forward pass that reads no host value.

    Token, position and mask live in tensors that never move; a step writes its token into them and
    the next step reads it. That is what allows capturing the step, and the same code without
    capture runs on a CPU, where its tokens are checked.

    Parameters
    ----------
    model:
        The loaded model.
    max_length:
        Tokens of the longest conversation.
    capture:
        Whether to record the step as a CUDA graph.
    batch:
        Requests that it serves at once, of one length; all stand at the same position.
    prefill_chunk:
        Tokens of a prompt per forward pass; None for all in one.
    generated:
        Whether the step's kernels are generated by torch.compile.
    """

    def __init__(
        self,
        model: LoadedModel,
        max_length: int,
        capture: bool,
        batch: int = 1,
        prefill_chunk: int | None = None,
        generated: bool = False,
    ) -> None:
        import torch

        device = model.model.device
        self._model = model.model
        self._capture = capture
        self._chunk = prefill_chunk
        self._cache = allocated_static_cache(model, max_length, batch)
        self._token = torch.zeros((batch, 1), dtype=torch.long, device=device)
        self._position = torch.zeros((1, 1), dtype=torch.long, device=device)
        self._slots = torch.arange(max_length, device=device)
        self._graph: torch.cuda.CUDAGraph | None = None
        self._step: Callable[[], None] = self._decode
        if generated:
            self._step = torch.compile(
                self._decode, dynamic=False, fullgraph=True, options=_settings(device.type)
            )

    def _decode(self) -> None:
        """Decode one token in place: read token and position, write the next ones."""
        mask = (self._slots <= self._position)[None, None]
        logits = self._model(
            self._token,
            attention_mask=mask,
            position_ids=self._position,
            past_key_values=self._cache,
            use_cache=True,
        ).logits
        self._token.copy_(logits[:, -1:].argmax(-1))
        self._position.add_(1)

    def _prefill(self, ids: torch.Tensor) -> None:
        length = ids.shape[1]
        self._cache.reset()
        for start in range(0, length, self._chunk or length):
            positions = self._slots[start : min(start + (self._chunk or length), length)]
            logits = self._model(
                ids[:, start : start + len(positions)],
                attention_mask=(self._slots[None, :] <= positions[:, None])[None, None],
                position_ids=positions[None],
                past_key_values=self._cache,
                use_cache=True,
                logits_to_keep=1,
            ).logits
        self._token.copy_(logits[:, -1:].argmax(-1))
        self._position.fill_(length)

    def _record(self, ids: torch.Tensor) -> None:
        """Capture the step; three passes beforehand let the libraries allocate their workspaces."""
        import torch

        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                self._prefill(ids)
                self._step()
        torch.cuda.current_stream().wait_stream(side)
        self._prefill(ids)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._step()
        self._graph = graph

    def generate(
        self, token_ids: Sequence[int], max_new_tokens: int, on_token: Callable[[], None]
    ) -> Generation:
        """Generate one turn; see :meth:`Session.generate`."""
        return Generation(self._run([token_ids], max_new_tokens, on_token)[0], self._cache)

    def generate_batch(
        self, rows: Sequence[Sequence[int]], max_new_tokens: int, on_token: Callable[[], None]
    ) -> Generation:
        """Generate for rows of one length."""
        found = self._run(rows, max_new_tokens, on_token)
        return Generation(found[0], self._cache, rows=found, padding=(0,) * len(rows))

    def _run(
        self, rows: Sequence[Sequence[int]], max_new_tokens: int, on_token: Callable[[], None]
    ) -> list[list[int]]:
        import torch

        with torch.inference_mode():
            ids = torch.tensor([list(row) for row in rows], device=self._token.device)
            if self._capture and self._graph is None:
                self._record(ids)
            # One row a step, so that a step's tokens lie together.
            tokens = torch.empty(
                (max_new_tokens, len(rows)), dtype=torch.long, device=self._token.device
            )
            self._prefill(ids)
            tokens[0].copy_(self._token[:, 0])
            on_token()
            for number in range(1, max_new_tokens):
                if self._graph is not None:
                    self._graph.replay()
                else:
                    self._step()
                tokens[number].copy_(self._token[:, 0])
                on_token()
            return tokens.T.tolist()
