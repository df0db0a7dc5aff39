"""What every KV-cache strategy is: options, where it runs, and a session per conversation."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from kvbench.errors import Unsupported
from kvbench.physics import Architecture, Traffic
from kvbench.strategies import options as _options
from kvbench.strategies import shape

if TYPE_CHECKING:
    import torch
    from transformers import Cache, GenerationConfig, PreTrainedModel

from kvbench.inputs.models import LoadedModel


@dataclass(frozen=True)
class Generation:
    """What one turn gave.

    Attributes
    ----------
    tokens:
        New token ids, exactly as many as were asked for.
    cache:
        Whatever holds keys and values after the turn; None when nothing is kept.
    reused_tokens:
        Prompt tokens whose keys and values were already there.
    stamps:
        ``time.perf_counter`` at each token, from engines that stamp tokens themselves; None when
        ``on_token`` was called.
    rows:
        Of a batch the new tokens of every row, the first of which ``tokens`` repeats; None for one request.
    padding:
        Of a batch the padded positions that stand before each row's prompt.
    """

    tokens: list[int]
    cache: Any
    reused_tokens: int = 0
    stamps: list[float] | None = None
    rows: list[list[int]] | None = None
    padding: tuple[int, ...] = ()


class Session:
    """One conversation under a strategy. :meth:`restart` begins the next one.

    Attributes
    ----------
    facts:
        What an engine of its own says of its start: version, seconds, blocks. Empty for the library.
    """

    facts: Mapping[str, Any] = MappingProxyType({})

    def generate(
        self, token_ids: Sequence[int], max_new_tokens: int, on_token: Callable[[], None]
    ) -> Generation:
        """Generate greedily from the whole history.

        Parameters
        ----------
        token_ids:
            All tokens so far: prompt, earlier replies and questions, in order.
        max_new_tokens:
            Exact number of tokens to generate.
        on_token:
            Called once per new token, at the moment it exists.
        """
        raise NotImplementedError

    def generate_batch(
        self, rows: Sequence[Sequence[int]], max_new_tokens: int, on_token: Callable[[], None]
    ) -> Generation:
        """Generate greedily for several requests at once.

        Parameters
        ----------
        rows:
            The whole history of each request; lengths may differ.
        max_new_tokens:
            Exact number of tokens to generate for each.
        on_token:
            Called once per step, at the moment every request has that token.

        Raises
        ------
        Unsupported
            The session takes one request at a time, which is so unless a class says otherwise.
        """
        raise Unsupported("this strategy generates for one request at a time")

    def restart(self) -> None:
        """Forget the conversation; what was allocated or compiled may stay."""

    def close(self) -> None:
        """Give back threads and memory. The session is not used afterwards."""


#: What stands before shorter prompts; masked, so that any token would do.
_PAD = 0

#: A chunk that even a short prompt is longer than.
_SMALL_CHUNK = 8

#: The attention that the library chooses for a model, and the one that needs a package.
AUTO, FLASH = "auto", "flash_attention_2"


@dataclass(frozen=True)
class Preset:
    """A name of its own for certain options of a strategy.

    Attributes
    ----------
    about:
        What it is, in one sentence.
    options:
        The options that differ from the usual ones.
    """

    about: str
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Strategy:
    """A way to keep keys and values during generation. Fields are options.

    Parameters
    ----------
    attention:
        Implementation of attention in the library's models; auto is the model's own choice.
    prefill_chunk:
        Tokens of a prompt per forward pass; 0 reads all that is new in one.

    A field declared with :func:`kvbench.strategies.options.option` has a letter in ids and bounds.

    Class attributes
    ----------------
    name:
        Name in configuration, records, tables and figures.
    exact:
        Whether greedy tokens equal those of recomputation, in float32.
    devices:
        Where the strategy runs.
    reuses_turns:
        Whether the cache lives on from one turn to the next.
    without_reuse:
        Of a strategy that does: the name of the same cache made anew for every turn.
    layers:
        Kinds of decoder layers that the strategy's cache has (:data:`kvbench.strategies.shape.KINDS`).
    presets:
        Names of their own for certain options, the usual ones among them.
    unchunked:
        Why the strategy cannot read a prompt in chunks, in words that follow its name; None where it can.
    """

    attention: str = _options.option(
        AUTO,
        "",
        kw_only=True,
        choices=(AUTO, "sdpa", "eager", FLASH),
        label="{} attention",
        label_pt="atenção {}",
    )
    prefill_chunk: int = _options.option(
        0,
        "chunk",
        kw_only=True,
        least=0,
        label="prompt in chunks of {}",
        label_pt="prompt em pedaços de {}",
    )

    name: ClassVar[str]
    presets: ClassVar[Mapping[str, Preset]] = {}

    exact: ClassVar[bool] = True
    #: Who generates: the library, or an engine with a process of its own.
    engine: ClassVar[str] = "transformers"
    #: Whether it generates in a thread of its own, and not in the one that asks for a turn.
    own_thread: ClassVar[bool] = False
    devices: ClassVar[frozenset[str]] = frozenset({"cpu", "cuda"})
    reuses_turns: ClassVar[bool] = False
    without_reuse: ClassVar[str | None] = None
    layers: ClassVar[frozenset[str]] = frozenset(shape.KINDS)
    unchunked: ClassVar[str | None] = None

    @property
    def chunk(self) -> int | None:
        """Tokens of a prompt per forward pass, as the physics module takes it; None for all in one."""
        return self.prefill_chunk or None

    @property
    def id(self) -> str:
        """What the strategy with these options is called everywhere."""
        return _options.id_of(self)

    def contradiction(self) -> str | None:
        """Return why these options do not go together, with a remedy, or None when they do."""
        if self.prefill_chunk and self.unchunked:
            return f"{type(self).name} {self.unchunked}; leave prefill_chunk out"
        return None

    def available(self, model: LoadedModel | None, device: str) -> str | None:
        """Return why this strategy cannot run here, in one sentence, or None when it can.

        With a model, its layers are held against what the strategy's cache has. A model of a family that
        nobody has tried is tried here, on a short conversation (:mod:`kvbench.strategies.trial`).
        """
        if device not in self.devices:
            return f"{self.id} needs a {' or '.join(sorted(self.devices))} device"
        if self.attention == FLASH:
            if device != "cuda":
                return f"{self.id} needs a cuda device: {FLASH} has no other kernels"
            if importlib.util.find_spec("flash_attn") is None:
                return f"{self.id} needs the package flash-attn (pip install flash-attn)"
        if model is None:
            return None
        reason = self.misfit(model)
        if reason is None and not shape.known(model):
            from kvbench.strategies import trial

            reason = trial.outcome(self, model)
        return reason

    def adapt(self, model: LoadedModel) -> str | None:
        """Give a model of the process's own this attention; return why that cannot be, or None.

        Whatever runs on the model afterwards has it too: the exact cache that quality is held against.
        """
        if self.attention == AUTO:
            return None
        kind = model.model.config.model_type
        try:
            model.model.set_attn_implementation(self.attention)
        except (ImportError, ValueError) as error:
            words = " ".join(str(error).split())[:160]
            return f"{self.id}: {kind} does not take {self.attention} attention: {words}"
        if model.model.config._attn_implementation != self.attention:
            return f"{self.id}: the attention of {kind} cannot be set"
        return None

    def misfit(self, model: LoadedModel) -> str | None:
        """Return why this cache cannot keep what the model's layers need, or None."""
        reason = shape.cacheless(self.id, model)
        return reason or self.unfit(shape.layer_kinds(model), shape.architecture(model))

    def unfit(self, kinds: Sequence[str], arch: Architecture | None) -> str | None:
        """Return why this cache cannot keep such layers, or None: what is known without the model.

        The capacity planner asks it too, so that it plans nothing that the measuring would refuse.

        Parameters
        ----------
        kinds:
            The kind of each layer (:data:`kvbench.strategies.shape.KINDS`).
        arch:
            The sizes of the layers; None for a family that nobody has described.
        """
        if self.prefill_chunk and {"state", "hybrid"} & set(kinds):
            # The library hands on keys and values from chunk to chunk, and no states.
            return (
                f"{self.id}: the library reads prompts in chunks only where no layer keeps a state"
            )
        return shape.refusal(self.id, kinds, self.layers)

    def misfit_batch(self, model: LoadedModel, lengths: str) -> str | None:
        """Return why prompts of ``equal`` or ``mixed`` lengths cannot go together here, or None."""
        return None

    def available_batch(self, model: LoadedModel, lengths: str) -> str | None:
        """Return why several requests cannot go together here, in one sentence, or None when they can.

        A model of a family that nobody has tried is tried here too: what it makes of padding is its own.
        """
        reason = self.misfit_batch(model, lengths)
        if reason is None and not shape.known(model):
            from kvbench.strategies import trial

            reason = trial.batch_outcome(self, model, lengths)
        return reason

    def small(self) -> Strategy:
        """The same strategy with sizes so small that a short conversation reaches them."""
        return replace(self, prefill_chunk=min(self.prefill_chunk, _SMALL_CHUNK))

    def lossless(self) -> Strategy | None:
        """Of a lossy strategy the same with sizes that lose nothing of a short conversation, if it has."""
        return None

    def compiled(self, device: str) -> bool:
        """Whether the decoding step runs as a compiled graph on ``device``."""
        return False

    def needs(self) -> tuple[str, ...]:
        """Optional packages that transformers must see while this strategy runs."""
        return ()

    def traffic(self, max_length: int) -> Traffic:
        """What the physics module needs to know: the kind of cache and its sizes."""
        raise NotImplementedError

    def session(self, model: LoadedModel, max_length: int, batch: int = 1) -> Session:
        """Open a conversation that will never be longer than ``max_length`` tokens, or a batch of them."""
        raise NotImplementedError

    def options(self) -> dict[str, Any]:
        """The options as plain values, for the record."""
        return asdict(self)


class _OnToken:
    """Stopping criterion that never stops: it only says that a token now exists."""

    def __init__(self, on_token: Callable[[], None]) -> None:
        self._on_token = on_token
        self._go_on = None

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        self._on_token()
        if self._go_on is None:
            import torch

            self._go_on = torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)
        return self._go_on


class GenerateSession(Session):
    """A session on ``model.generate``, with a cache made anew for every turn.

    Parameters
    ----------
    model:
        The loaded model.
    make_cache:
        Returns the cache of a turn, or None for the library's own.
    prefill_chunk:
        Tokens of a prompt per forward pass; None for all in one.
    settings:
        Further fields of the generation configuration, such as ``use_cache``.
    """

    def __init__(
        self,
        model: LoadedModel,
        make_cache: Callable[[], Cache | None],
        prefill_chunk: int | None = None,
        **settings: Any,
    ) -> None:
        self._model = model
        self._make_cache = make_cache
        if prefill_chunk is not None:
            settings["prefill_chunk_size"] = prefill_chunk
        self._settings = {"use_cache": True, "disable_compile": True, **settings}

    def generate(
        self, token_ids: Sequence[int], max_new_tokens: int, on_token: Callable[[], None]
    ) -> Generation:
        """Generate one turn; see :meth:`Session.generate`."""
        cache = self._make_cache()
        (tokens,), cache = self.run([token_ids], max_new_tokens, on_token, cache)
        return Generation(tokens, cache)

    def generate_batch(
        self, rows: Sequence[Sequence[int]], max_new_tokens: int, on_token: Callable[[], None]
    ) -> Generation:
        """Generate for all rows, the shorter ones padded on the left and masked there."""
        cache = self._make_cache()
        found, cache = self.run(rows, max_new_tokens, on_token, cache)
        return Generation(found[0], cache, rows=found, padding=paddings(rows))

    def run(
        self,
        rows: Sequence[Sequence[int]],
        max_new_tokens: int,
        on_token: Callable[[], None],
        cache: Cache | None,
    ) -> tuple[list[list[int]], Cache | None]:
        """Call ``model.generate`` with a given cache; return the new tokens of each row and the cache."""
        ids, mask = self._padded(rows)
        output = self._generated(ids, mask, max_new_tokens, on_token, cache)
        return output.sequences[:, ids.shape[1] :].tolist(), output.past_key_values

    def _padded(self, rows: Sequence[Sequence[int]]) -> tuple[torch.Tensor, torch.Tensor]:
        """Ids of all rows, the shorter ones padded on the left, and their mask; both rows x positions."""
        import torch

        padding = paddings(rows)
        ids = torch.tensor(
            [[_PAD] * pad + list(row) for pad, row in zip(padding, rows, strict=True)],
            device=self._model.model.device,
        )
        mask = torch.ones_like(ids)
        for number, pad in enumerate(padding):
            mask[number, :pad] = 0
        return ids, mask

    def _generated(
        self,
        ids: torch.Tensor,
        mask: torch.Tensor,
        max_new_tokens: int,
        on_token: Callable[[], None],
        cache: Cache | None,
    ) -> Any:
        model: PreTrainedModel = self._model.model
        # Passed only where there is one: some models take none.
        given = {} if cache is None else {shape.cache_argument(self._model): cache}
        return model.generate(
            ids,
            attention_mask=mask,
            **given,
            generation_config=self._generation_config(max_new_tokens),
            stopping_criteria=[_OnToken(on_token)],
        )

    def _generation_config(self, max_new_tokens: int) -> GenerationConfig:
        from transformers import GenerationConfig

        return GenerationConfig(
            max_new_tokens=max_new_tokens,
            do_sample=False,
            pad_token_id=_PAD,
            eos_token_id=None,
            return_dict_in_generate=True,
            **self._settings,
        )


class PersistentCacheSession(GenerateSession):
    """A session whose one cache is allocated at the start and emptied before every turn."""

    def __init__(
        self, model: LoadedModel, cache: Cache, prefill_chunk: int | None = None, **settings: Any
    ) -> None:
        super().__init__(model, self._emptied, prefill_chunk, **settings)
        self._cache = cache

    def _emptied(self) -> Cache:
        self._cache.reset()
        return self._cache


def paddings(rows: Sequence[Sequence[int]]) -> tuple[int, ...]:
    """Positions that have to stand before each row to make all as long as the longest."""
    longest = max(map(len, rows))
    return tuple(longest - len(row) for row in rows)


def common_prefix(left: Sequence[int], right: Sequence[int]) -> int:
    """Number of leading tokens that two sequences share."""
    length = min(len(left), len(right))
    differing = np.nonzero(np.asarray(left[:length]) != np.asarray(right[:length]))[0]
    return int(differing[0]) if len(differing) else length


def text_config(model: LoadedModel) -> Any:
    """The configuration of the decoder, also of models that have more parts."""
    return model.model.config.get_text_config(decoder=True)


def allocated_static_cache(
    model: LoadedModel, max_length: int, batch: int = 1, **options: Any
) -> Cache:
    """A StaticCache whose tensors exist before the first turn, so that no turn pays for them.

    The sizes of each layer are those of its family; of a family that is not known, one pass over one
    token shows them.

    Parameters
    ----------
    model:
        The loaded model.
    max_length:
        Tokens it can hold.
    batch:
        Requests that it serves at once.
    options:
        Passed on to ``transformers.StaticCache``.
    """
    import torch
    from transformers import StaticCache

    cache = StaticCache(config=text_config(model), max_cache_len=max_length, **options)
    arch, weights = shape.architecture(model), model.model
    if arch is None:
        token = torch.zeros((batch, 1), dtype=torch.long, device=weights.device)
        with torch.no_grad():
            weights(token, **{shape.cache_argument(model): cache}, use_cache=True)
        cache.reset()
        return cache
    for layer, sizes in zip(cache.layers, arch.layers, strict=True):
        if sizes.kv_heads:
            empty = [
                torch.zeros(
                    (batch, sizes.kv_heads, 0, size), dtype=weights.dtype, device=weights.device
                )
                for size in (sizes.key_size, sizes.value_size)
            ]
            layer.lazy_initialization(*empty)
    return cache
