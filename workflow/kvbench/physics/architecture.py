"""Sizes of a decoder, layer by layer, read from its configuration: weights, cached numbers, products.

Symbols: ``h`` hidden size, ``H`` query heads, ``K`` heads of the cache, ``d`` head size, ``f`` size of
the feed-forward part, ``V`` vocabulary. What a family's layers look like stands in one function each
at the end; a family that is not there can be measured, but nothing is predicted for it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from itertools import groupby
from typing import Any

from kvbench.errors import InputError


class UnknownFamily(InputError):
    """The configuration's model type is none of those whose layers are described here."""


@dataclass(frozen=True)
class Layer:
    """One decoder layer; a size of zero says that the layer has no such part.

    Attributes
    ----------
    heads:
        Query heads, ``H``.
    kv_heads, key_size, value_size:
        What the cache keeps per token: ``kv_heads`` keys of ``key_size`` numbers and as many values of
        ``value_size``. Latent attention keeps one "key" (the latent) and one "value" (the rotary part).
    score_size, mixed_size:
        Numbers in the product of a query with a key, and in the value that a head takes.
    window:
        Tokens that a token attends to, itself included; None for all.
    state, float_state:
        Numbers kept whatever the length, by a state-space or linear-attention part: in the model's dtype
        (what the convolution needs), and always in float32 (the recurrent state).
    scan:
        Multiply-adds per new token that read the state. The convolution before it is not counted: it
        is below a hundredth of the layer, and depends on the kernel that runs it.
    matrices:
        Weights that multiply every new token once.
    vectors:
        Other weights: biases, normalisations, convolutions.
    expansion:
        Weights that multiply every *attended* token at every step (latent attention unpacks its cache).
    experts, experts_per_token, expert_size:
        Experts of a mixture, those that one token is sent to, and the weights of one.
    """

    heads: int = 0
    kv_heads: int = 0
    key_size: int = 0
    value_size: int = 0
    score_size: int = 0
    mixed_size: int = 0
    window: int | None = None
    state: int = 0
    float_state: int = 0
    scan: int = 0
    matrices: int = 0
    vectors: int = 0
    expansion: int = 0
    experts: int = 0
    experts_per_token: int = 0
    expert_size: int = 0

    @property
    def stored(self) -> int:
        """Numbers that the cache keeps for one token."""
        return self.kv_heads * (self.key_size + self.value_size)

    @property
    def parameters(self) -> int:
        """All weights."""
        return self.matrices + self.vectors + self.expansion + self.experts * self.expert_size

    def held_bytes(self, tokens: int, bytes_per_element: float) -> float:
        """Bytes of the keys and values of ``tokens`` tokens, and of the states."""
        numbers = self.stored * tokens + self.state
        return numbers * bytes_per_element + 4 * self.float_state

    def reach(self, tokens: int) -> int:
        """Tokens of ``tokens`` that the newest one attends to."""
        return tokens if self.window is None else min(tokens, self.window)

    def experts_read(self, tokens: int) -> float:
        """Experts that ``tokens`` tokens are sent to, if each is as likely as the others."""
        if not self.experts:
            return 0.0
        return self.experts * (1 - (1 - self.experts_per_token / self.experts) ** tokens)


@dataclass(frozen=True)
class Architecture:
    """The sizes of a decoder.

    Attributes
    ----------
    layers:
        One :class:`Layer` per decoder layer, in order.
    hidden_size, vocab_size:
        ``h, V``.
    tied_embeddings:
        Whether the output projection is the embedding table itself.
    max_positions:
        Longest sequence the model was made for, in tokens; None without a limit.
    learned_positions:
        Rows of a table of learned positions; 0 when positions are computed. Nothing longer can be read.
    angles:
        Rotary angles computed per new token, all tables together.
    other_matrices, other_vectors:
        Weights outside layers and tables that multiply each token, and those that do not (the last
        normalisation).
    output_bias:
        Whether the output projection has a bias.
    alibi:
        Whether positions are a bias on the scores that grows with distance.
    family:
        The ``model_type``.
    """

    layers: tuple[Layer, ...]
    hidden_size: int
    vocab_size: int
    tied_embeddings: bool
    max_positions: int | None
    learned_positions: int = 0
    angles: int = 0
    other_matrices: int = 0
    other_vectors: int = 0
    output_bias: bool = False
    alibi: bool = False
    family: str = "llama"
    _hash: int = field(default=0, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        sizes = (self.layers, self.hidden_size, self.vocab_size, self.max_positions, self.family)
        # Predictions are looked up by architecture thousands of times.
        object.__setattr__(self, "_hash", hash(sizes))

    def __hash__(self) -> int:
        return self._hash

    @cached_property
    def kinds(self) -> tuple[tuple[Layer, int], ...]:
        """The different layers, and how many there are of each."""
        return tuple(Counter(self.layers).items())

    @classmethod
    def from_config(cls, config: Mapping[str, Any], source: str = "config.json") -> Architecture:
        """Read a configuration in Hugging Face form.

        Parameters
        ----------
        config:
            The mapping of a ``config.json``. Sizes under ``text_config`` count; a missing
            ``model_type`` means ``llama``.
        source:
            Name of the file the mapping came from, for the error message.

        Raises
        ------
        UnknownFamily
            Nothing is known of that model type.
        InputError
            A size is missing or not a positive whole number.
        """
        reader = _Sizes(text_part(config), source)
        family = reader.config.get("model_type", "llama")
        if family not in FAMILIES:
            raise UnknownFamily(
                f"{source}: model_type {family!r} is not modelled; known: {', '.join(FAMILIES)}"
            )
        return replace(FAMILIES[family](reader), family=family)

    def as_dict(self) -> dict[str, Any]:
        """The fields as plain values; equal layers in a row are one entry with a ``count``."""
        fields = asdict(self)
        del fields["_hash"]
        layers = []
        for layer, equal in groupby(self.layers):
            sizes = {key: value for key, value in asdict(layer).items() if value not in (0, None)}
            layers.append({"count": len(list(equal)), **sizes})
        return {**fields, "layers": layers}

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Architecture:
        """Read what :meth:`as_dict` wrote, or the flat sizes that older records have."""
        if isinstance(fields["layers"], int):
            return _from_flat(fields)
        layers = []
        for entry in fields["layers"]:
            sizes = dict(entry)
            count = sizes.pop("count")
            layers += [Layer(**sizes)] * count
        return cls(**{**fields, "layers": tuple(layers)})


def text_part(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The decoder's own sizes: those under ``text_config`` where a configuration has such a part."""
    nested = config.get("text_config")
    if not isinstance(nested, Mapping):
        return config
    # What is said outside holds unless the part says otherwise.
    outside = {key: config[key] for key in ("tie_word_embeddings",) if key in config}
    return {**outside, **nested}


class _Sizes:
    """Reads sizes from a configuration, under any of the names that families give them."""

    def __init__(self, config: Mapping[str, Any], source: str) -> None:
        self.config, self.source = config, source

    def __call__(self, *names: str, default: int | None = None) -> int:
        name = next((name for name in names if self.config.get(name) is not None), names[0])
        value = self.config.get(name)
        value = default if value is None else value
        if value is None:
            raise InputError(
                f"{self.source}: {name} is missing; it must be a positive whole number"
            )
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise InputError(
                f"{self.source}: {name} is {value!r}; it must be a positive whole number"
            )
        return value

    def flag(self, name: str, default: bool = False) -> bool:
        value = self.config.get(name)
        return default if value is None else bool(value)

    def get(self, name: str, default: Any = None) -> Any:
        value = self.config.get(name)
        return default if value is None else value

    def heads(self) -> tuple[int, int, int]:
        """Query heads, heads of the cache, head size."""
        heads = self("num_attention_heads", "n_head")
        kv_heads = self("num_key_value_heads", default=heads)
        if heads % kv_heads:
            raise InputError(
                f"{self.source}: num_key_value_heads is {kv_heads}; it must divide "
                f"num_attention_heads ({heads})"
            )
        hidden = self("hidden_size", "n_embd")
        return heads, kv_heads, self("head_dim", default=max(hidden // heads, 1))

    def windows(self, count: int) -> list[int | None]:
        """The window of each layer: those of ``layer_types``, or the same for all."""
        kinds = self.get("layer_types")
        window = self.get("sliding_window")
        if self.config.get("use_sliding_window") is False:
            window = None
        if kinds is None:
            return [window] * count
        if len(kinds) != count:
            raise InputError(
                f"{self.source}: layer_types has {len(kinds)} entries, num_hidden_layers is {count}"
            )
        return [window if kind == "sliding_attention" else None for kind in kinds]

    def rotary(self, head_size: int) -> int:
        """Numbers of a head that are turned by rotary angles."""
        scaling = self.get("rope_parameters", {}) or {}
        if not isinstance(scaling, Mapping):
            raise InputError(f"{self.source}: rope_parameters is {scaling!r}; it must be an object")
        share = scaling.get("partial_rotary_factor") or self.get(
            "partial_rotary_factor", self.get("rotary_pct", 1.0)
        )
        return int(head_size * share)


def _attention(
    hidden: int, heads: int, kv_heads: int, size: int, bias: bool = False, output_bias: bool = False
) -> dict[str, int]:
    """Grouped-query attention (Ainslie et al. 2023, "GQA"): ``hHd + 2hKd + Hdh`` weights."""
    queries, keys = heads * size, kv_heads * size
    return {
        "heads": heads,
        "kv_heads": kv_heads,
        "key_size": size,
        "value_size": size,
        "score_size": size,
        "mixed_size": size,
        "matrices": hidden * queries + 2 * hidden * keys + queries * hidden,
        "vectors": (queries + 2 * keys) * bias + hidden * output_bias,
    }


def _layer(parts: Mapping[str, int], matrices: int, vectors: int, **more: Any) -> Layer:
    """An attention with a feed-forward part and normalisations beside it."""
    sizes = dict(parts)
    sizes["matrices"] += matrices
    sizes["vectors"] += vectors
    return Layer(**sizes, **more)


def _llama_like(
    sizes: _Sizes,
    *,
    bias: bool = False,
    output_bias: bool = False,
    mlp_bias: bool = False,
    head_norms: bool = False,
    norms: int = 2,
    tied: bool = False,
    tables_of_angles: int = 1,
) -> Architecture:
    """Root-mean-square norms, gated feed-forward (``3hf``), rotary angles: most of today's decoders."""
    hidden, count = sizes("hidden_size"), sizes("num_hidden_layers")
    (heads, kv_heads, size), inner = sizes.heads(), sizes("intermediate_size")
    parts = _attention(hidden, heads, kv_heads, size, bias, output_bias)
    vectors = norms * hidden + (2 * inner + hidden) * mlp_bias + 2 * size * head_norms
    layer = _layer(parts, 3 * hidden * inner, vectors)
    return Architecture(
        layers=tuple(replace(layer, window=window) for window in sizes.windows(count)),
        hidden_size=hidden,
        vocab_size=sizes("vocab_size"),
        tied_embeddings=sizes.flag("tie_word_embeddings", tied),
        max_positions=sizes("max_position_embeddings", default=2048),
        angles=tables_of_angles * sizes.rotary(size),
        other_vectors=hidden,
    )


def _llama(sizes: _Sizes) -> Architecture:
    bias = sizes.flag("attention_bias")
    # Nothing in this family reads a window, and converted checkpoints may carry one.
    config = {**sizes.config, "sliding_window": None, "layer_types": None}
    sizes = _Sizes(config, sizes.source)
    return _llama_like(sizes, bias=bias, output_bias=bias, mlp_bias=sizes.flag("mlp_bias"))


def _mistral(sizes: _Sizes) -> Architecture:
    return _llama_like(sizes)


def _qwen2(sizes: _Sizes) -> Architecture:
    # These biases exist whatever the configuration says.
    return _llama_like(_qwen_windows(sizes), bias=True)


def _qwen3(sizes: _Sizes) -> Architecture:
    bias = sizes.flag("attention_bias")
    return _llama_like(_qwen_windows(sizes), bias=bias, output_bias=bias, head_norms=True)


def _qwen_windows(sizes: _Sizes) -> _Sizes:
    """Qwen says from which layer on windows apply, unless it names the layers."""
    config = dict(sizes.config)
    if not config.get("use_sliding_window"):
        config["sliding_window"] = None
    elif config.get("layer_types") is None:
        first = config.get("max_window_layers", 28)
        config["layer_types"] = [
            "sliding_attention" if index >= first else "full_attention"
            for index in range(sizes("num_hidden_layers"))
        ]
    return _Sizes(config, sizes.source)


def _gemma2(sizes: _Sizes) -> Architecture:
    config = dict(sizes.config)
    config.setdefault("head_dim", 256)
    if config.get("layer_types") is None:
        config["layer_types"] = [
            "full_attention" if index % 2 else "sliding_attention"
            for index in range(sizes("num_hidden_layers"))
        ]
    bias = sizes.flag("attention_bias")
    return _llama_like(
        _Sizes(config, sizes.source), bias=bias, output_bias=bias, norms=4, tied=True
    )


def _gemma3(sizes: _Sizes) -> Architecture:
    config = dict(sizes.config)
    config.setdefault("head_dim", 256)
    if config.get("layer_types") is None:
        every = config.get("sliding_window_pattern") or 6
        config["layer_types"] = [
            "sliding_attention" if (index + 1) % every else "full_attention"
            for index in range(sizes("num_hidden_layers"))
        ]
    bias = sizes.flag("attention_bias")
    kinds = len(set(config["layer_types"]))
    return _llama_like(
        _Sizes(config, sizes.source),
        bias=bias,
        output_bias=bias,
        head_norms=True,
        norms=4,
        tied=True,
        tables_of_angles=kinds,
    )


def _phi3(sizes: _Sizes) -> Architecture:
    return _llama_like(sizes)


def _plain(
    sizes: _Sizes,
    parts: Mapping[str, int],
    inner: int,
    *,
    feed_forward_bias: bool = True,
    norms: int = 2,
    norm_bias: bool = True,
    **more: Any,
) -> Architecture:
    """Two-matrix feed-forward (``2hf``) and layer normalisations: the generation before."""
    hidden = sizes("hidden_size", "n_embd")
    norm = hidden * (1 + norm_bias)
    vectors = norms * norm + (inner + hidden) * feed_forward_bias
    layer = _layer(parts, 2 * hidden * inner, vectors)
    fields = {"other_vectors": norm, "tied_embeddings": sizes.flag("tie_word_embeddings", True)}
    return Architecture(
        layers=(layer,) * sizes("num_hidden_layers", "n_layer"),
        hidden_size=hidden,
        vocab_size=sizes("vocab_size"),
        **{**fields, **more},
    )


def _gpt2(sizes: _Sizes) -> Architecture:
    hidden, heads = sizes("n_embd", "hidden_size"), sizes("n_head", "num_attention_heads")
    positions = sizes("n_positions", "max_position_embeddings", default=1024)
    return _plain(
        sizes,
        _attention(hidden, heads, heads, hidden // heads, True, True),
        sizes("n_inner", default=4 * hidden),
        max_positions=positions,
        learned_positions=positions,
    )


def _opt(sizes: _Sizes) -> Architecture:
    hidden, heads = sizes("hidden_size"), sizes("num_attention_heads")
    positions = sizes("max_position_embeddings", default=2048)
    bias = sizes.flag("enable_bias", True)
    narrow = sizes("word_embed_proj_dim", default=hidden)
    affine = sizes.flag("layer_norm_elementwise_affine", True)
    if narrow != hidden or sizes.flag("_remove_final_layer_norm") or not affine:
        raise UnknownFamily(f"{sizes.source}: OPT with narrow embeddings is not modelled")
    return _plain(
        sizes,
        _attention(hidden, heads, heads, hidden // heads, bias, bias),
        sizes("ffn_dim"),
        feed_forward_bias=bias,
        other_vectors=2 * hidden if sizes.flag("do_layer_norm_before", True) else 0,
        max_positions=positions,
        # Two rows of the table come before the first position.
        learned_positions=positions + 2,
    )


def _gpt_neox(sizes: _Sizes) -> Architecture:
    hidden, heads = sizes("hidden_size"), sizes("num_attention_heads")
    bias = sizes.flag("attention_bias", True)
    config = {"rotary_pct": 0.25, **sizes.config}
    return _plain(
        sizes,
        _attention(hidden, heads, heads, hidden // heads, bias, bias),
        sizes("intermediate_size"),
        max_positions=sizes("max_position_embeddings", default=2048),
        tied_embeddings=sizes.flag("tie_word_embeddings", False),
        angles=_Sizes(config, sizes.source).rotary(hidden // heads),
    )


def _falcon(sizes: _Sizes) -> Architecture:
    hidden, heads = sizes("hidden_size"), sizes("num_attention_heads", "n_head")
    bias, new = sizes.flag("bias"), sizes.flag("new_decoder_architecture")
    parallel = sizes.flag("parallel_attn", True)
    multi_query = sizes.flag("multi_query", True)
    kv_heads = sizes("num_kv_heads", default=heads) if new else 1 if multi_query else heads
    norms = sizes("num_ln_in_parallel_attn", default=2) if new else 1 if parallel else 2
    if sizes.flag("alibi"):
        # A static cache fails there in the library; such a model is tried before it is measured.
        raise UnknownFamily(f"{sizes.source}: Falcon with alibi is not modelled")
    parts = _attention(hidden, heads, kv_heads, hidden // heads, bias, bias)
    if new:
        # The library repeats grouped keys and values for every query head before it caches them.
        parts["kv_heads"] = heads
    return _plain(
        sizes,
        parts,
        sizes("ffn_hidden_size", default=4 * hidden),
        feed_forward_bias=bias,
        norms=norms,
        max_positions=sizes("max_position_embeddings", default=2048),
        angles=hidden // heads,
    )


def _bloom(sizes: _Sizes) -> Architecture:
    hidden, heads = sizes("hidden_size", "n_embed"), sizes("n_head", "num_attention_heads")
    return _plain(
        sizes,
        _attention(hidden, heads, heads, hidden // heads, True, True),
        4 * hidden,
        # The embedding is normalised too; positions are a bias on the scores (alibi).
        other_vectors=4 * hidden,
        max_positions=None,
        alibi=True,
    )


def _experts(sizes: _Sizes, hidden: int, count: int, inner: int) -> dict[str, int]:
    return {
        "experts": count,
        "experts_per_token": sizes("num_experts_per_tok"),
        "expert_size": 3 * hidden * inner,
    }


def _mixtral(sizes: _Sizes) -> Architecture:
    arch = _llama_like(sizes)
    hidden, inner = arch.hidden_size, sizes("intermediate_size")
    count = sizes("num_local_experts")
    mixture = _experts(sizes, hidden, count, inner)

    def routed(layer: Layer) -> Layer:
        dense = layer.matrices - 3 * hidden * inner
        return replace(layer, matrices=dense + hidden * count, **mixture)

    return replace(arch, layers=tuple(map(routed, arch.layers)))


def _qwen3_moe(sizes: _Sizes) -> Architecture:
    bias = sizes.flag("attention_bias")
    arch = _llama_like(_qwen_windows(sizes), bias=bias, output_bias=bias, head_norms=True)
    hidden, inner = arch.hidden_size, sizes("intermediate_size")
    count = sizes("num_experts", "num_local_experts")
    mixture = _experts(sizes, hidden, count, sizes("moe_intermediate_size"))
    step, dense = sizes("decoder_sparse_step", default=1), sizes.get("mlp_only_layers", [])

    def routed(index: int, layer: Layer) -> Layer:
        if index in dense or (index + 1) % step:
            return layer
        matrices = layer.matrices - 3 * hidden * inner + hidden * count
        return replace(layer, matrices=matrices, **mixture)

    layers = tuple(routed(index, layer) for index, layer in enumerate(arch.layers))
    return replace(arch, layers=layers)


def _deepseek(sizes: _Sizes) -> Architecture:
    """Multi-head latent attention (DeepSeek-AI 2024, arXiv 2405.04434, section 2.1).

    The library caches the latent and the rotary part of the key, and unpacks all of it at each step.
    """
    hidden, heads = sizes("hidden_size"), sizes("num_attention_heads")
    latent, rotary = sizes("kv_lora_rank"), sizes("qk_rope_head_dim")
    plain, value = sizes("qk_nope_head_dim"), sizes("v_head_dim")
    bias = sizes.flag("attention_bias")
    query_rank = sizes.get("q_lora_rank")
    queries = heads * (plain + rotary)
    if query_rank:
        query = hidden * query_rank + query_rank * queries
        query_vectors = query_rank + query_rank * bias
    else:
        query, query_vectors = hidden * queries, 0
    down = hidden * (latent + rotary)
    attention = {
        "heads": heads,
        "kv_heads": 1,
        "key_size": latent,
        "value_size": rotary,
        "score_size": plain + rotary,
        "mixed_size": value,
        "matrices": query + down + heads * value * hidden,
        "vectors": query_vectors + latent + (latent + rotary + hidden) * bias,
        "expansion": latent * heads * (plain + value),
    }
    inner, expert_inner = sizes("intermediate_size"), sizes("moe_intermediate_size")
    count = sizes("n_routed_experts", "num_local_experts")
    shared = 3 * hidden * expert_inner * sizes("n_shared_experts", default=1)
    dense = _layer(attention, 3 * hidden * inner, 2 * hidden)
    routed = _layer(
        attention,
        shared + hidden * count,
        2 * hidden,
        **_experts(sizes, hidden, count, expert_inner),
    )
    first = sizes.get("first_k_dense_replace", 0)
    layers = sizes("num_hidden_layers")
    return Architecture(
        layers=tuple(dense if index < first else routed for index in range(layers)),
        hidden_size=hidden,
        vocab_size=sizes("vocab_size"),
        tied_embeddings=sizes.flag("tie_word_embeddings"),
        max_positions=sizes("max_position_embeddings", default=2048),
        angles=rotary,
        other_vectors=hidden,
    )


def _selective_scan(
    hidden: int, inner: int, state: int, kernel: int, rank: Any, conv_bias: bool, bias: bool
) -> dict[str, int]:
    """Selective state spaces (Gu and Dao 2023, arXiv 2312.00752): a state instead of keys and values.

    The state is updated number by number; its projections and its readout are matrix products.
    """
    rank = -(-hidden // 16) if rank == "auto" else int(rank)
    return {
        "state": inner * kernel,
        "float_state": inner * state,
        "scan": inner * state,
        "matrices": 3 * hidden * inner + inner * (rank + 2 * state) + rank * inner,
        "vectors": inner * (kernel + conv_bias) + (2 * inner + hidden) * bias + inner * (state + 2),
    }


def _mamba(sizes: _Sizes) -> Architecture:
    hidden = sizes("hidden_size")
    parts = _selective_scan(
        hidden,
        sizes("intermediate_size", default=sizes("expand", default=2) * hidden),
        sizes("state_size"),
        sizes("conv_kernel", default=4),
        sizes.get("time_step_rank", "auto"),
        sizes.flag("use_conv_bias", True),
        sizes.flag("use_bias"),
    )
    return Architecture(
        layers=(_layer(parts, 0, hidden),) * sizes("num_hidden_layers"),
        hidden_size=hidden,
        vocab_size=sizes("vocab_size"),
        tied_embeddings=sizes.flag("tie_word_embeddings", True),
        max_positions=None,
        other_vectors=hidden,
    )


def _jamba(sizes: _Sizes) -> Architecture:
    """A hybrid (Lieber et al. 2024, arXiv 2403.19887): most layers keep a state, a few keys and values.

    Attention has no rotary angles there; every other feed-forward part is a mixture.
    """
    hidden, inner = sizes("hidden_size"), sizes("intermediate_size")
    heads, kv_heads, size = sizes.heads()
    state = sizes("mamba_d_state", default=16)
    rank = sizes.get("mamba_dt_rank", "auto")
    scan = _selective_scan(
        hidden,
        sizes("mamba_expand", default=2) * hidden,
        state,
        sizes("mamba_d_conv", default=4),
        rank,
        sizes.flag("mamba_conv_bias", True),
        sizes.flag("mamba_proj_bias"),
    )
    # Time step and both state projections are normalised.
    scan["vectors"] += (-(-hidden // 16) if rank == "auto" else int(rank)) + 2 * state
    attention = _attention(hidden, heads, kv_heads, size)
    count, number = sizes("num_experts", "num_local_experts", default=1), sizes("num_hidden_layers")

    def layer(index: int) -> Layer:
        period = sizes("attn_layer_period", default=8)
        attends = index % period == sizes.get("attn_layer_offset", 4)
        routed = index % sizes("expert_layer_period", default=2) == sizes.get(
            "expert_layer_offset", 1
        )
        parts = attention if attends else scan
        if routed and count > 1:
            mixture = _experts(sizes, hidden, count, inner)
            return _layer(parts, hidden * count, 2 * hidden, **mixture)
        return _layer(parts, 3 * hidden * inner, 2 * hidden)

    return Architecture(
        layers=tuple(map(layer, range(number))),
        hidden_size=hidden,
        vocab_size=sizes("vocab_size"),
        tied_embeddings=sizes.flag("tie_word_embeddings"),
        max_positions=sizes("max_position_embeddings", default=262144),
        other_vectors=hidden,
    )


#: How the layers of a family follow from its configuration, by ``model_type``.
FAMILIES: dict[str, Callable[[_Sizes], Architecture]] = {
    "llama": _llama,
    "mistral": _mistral,
    "qwen2": _qwen2,
    "qwen3": _qwen3,
    "gemma2": _gemma2,
    "gemma3_text": _gemma3,
    "phi3": _phi3,
    "gpt2": _gpt2,
    "opt": _opt,
    "gpt_neox": _gpt_neox,
    "falcon": _falcon,
    "bloom": _bloom,
    "mixtral": _mixtral,
    "qwen3_moe": _qwen3_moe,
    "deepseek_v2": _deepseek,
    "deepseek_v3": _deepseek,
    "mamba": _mamba,
    "jamba": _jamba,
}


def _from_flat(fields: Mapping[str, Any]) -> Architecture:
    """The Llama family as records wrote it before layers were told apart."""
    parts = _attention(
        fields["hidden_size"],
        fields["heads"],
        fields["kv_heads"],
        fields["head_dim"],
        fields.get("attention_bias", False),
        fields.get("output_bias", False),
    )
    hidden, inner = fields["hidden_size"], fields["intermediate_size"]
    vectors = 2 * hidden + (2 * inner + hidden) * fields.get("mlp_bias", False)
    vectors += 2 * fields["head_dim"] * fields.get("query_key_norm", False)
    return Architecture(
        layers=(_layer(parts, 3 * hidden * inner, vectors),) * fields["layers"],
        hidden_size=hidden,
        vocab_size=fields["vocab_size"],
        tied_embeddings=fields["tied_embeddings"],
        max_positions=fields["max_positions"],
        angles=fields["head_dim"],
        other_vectors=hidden,
    )
