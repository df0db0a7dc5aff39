"""Every family the physics module describes, strategy by strategy: right tokens and bytes, or a reason."""

from __future__ import annotations

import dataclasses
from functools import cache
from importlib import metadata

import families
import pytest
from kvbench import physics, strategies
from kvbench.layout import EQUAL, MIXED
from kvbench.measurement.memory import cache_bytes
from kvbench.physics import Architecture
from kvbench.strategies import shape

#: The strategies of a CPU that compile nothing; hqq needs a process of its own (test_strategies).
STRATEGIES = (
    "dynamic",
    "static",
    "dynamic_reuse",
    "static_reuse",
    "quantized_int4",
    "quantized_int4_reuse",
    "paged",
    "sliding_window",
    "attention_sink",
)
#: Prompt, question and new tokens: longer than the models' windows of 64.
PROMPT, QUESTION, NEW = 70, 9, 6
LENGTH = PROMPT + QUESTION + 2 * NEW

_WINDOWS = {"mistral", "qwen2", "gemma2", "gemma3_text"}
_STATES = {"mamba", "jamba"}
_LATENTS = {"deepseek_v2", "deepseek_v3"}
#: Versions of the library that do not read their own mask there.
_BLOOM_FAILS = "5.18" <= metadata.version("transformers")[:4] < "5.23"
#: Whether the tests of known families were run with this release, so that nothing is tried again.
_CHECKED = not families.library_at_least(5, 24)
_REUSING = {"dynamic_reuse", "static_reuse", "quantized_int4_reuse"}
_QUANTISED = {"quantized_int4", "quantized_int4_reuse"}


def expected_refusal(family: str, strategy: str) -> str | None:
    """Words of the reason for which a pair is unsupported, or None where it must work."""
    if strategy in _QUANTISED | {"paged"} and family in _WINDOWS:
        return "keep a sliding window"
    if strategy in _REUSING and family in _STATES:
        return "cannot say which tokens"
    if strategy in _QUANTISED and family in _STATES:
        return "keep a state of fixed size"
    if strategy in {"sliding_window", "attention_sink"} and family == "mamba":
        return "state of fixed size"
    if strategy in {"sliding_window", "attention_sink"} and family == "bloom":
        return "alibi"
    if strategy in _QUANTISED and family in {"qwen3", *_LATENTS}:
        return "head size of 32"
    if strategy == "paged" and family in {"falcon", "bloom", *_STATES}:
        return "cannot be replaced"
    if strategy in {"static", "static_reuse"} and family == "bloom" and _BLOOM_FAILS:
        return "cannot run Bloom on a static cache"
    if strategy == "paged" and family in _LATENTS:
        return "latents"
    if strategy == "paged" and family in {"opt", "gpt_neox"} and not _CHECKED:
        return f"cannot run paged on {family}"
    return None


PAIRS = [(family, strategy) for family in families.CONFIGS for strategy in STRATEGIES]
REFUSED = [pair for pair in PAIRS if expected_refusal(*pair)]
WORKING = [pair for pair in PAIRS if not expected_refusal(*pair)]

model_of = cache(families.build)


def ids(seed: int, length: int) -> list[int]:
    """Token ids that depend on nothing but their seed."""
    return [16 + (seed * 977 + 131 * i * i + 17 * i) % 2500 for i in range(length)]


def talk(family: str, strategy: strategies.Strategy):
    """Two turns, then a third whose history differs in its last five tokens."""
    import torch

    with torch.inference_mode():
        session = strategy.session(model_of(family), LENGTH)
        try:
            session.restart()
            asked = ids(1, PROMPT)
            first = session.generate(asked, NEW, lambda: None)
            sizes = [(cache_bytes(first.cache), len(asked), 0)]
            history = [*asked, *first.tokens, *ids(2, QUESTION)]
            second = session.generate(history, NEW, lambda: None)
            sizes.append((cache_bytes(second.cache), len(history), second.reused_tokens))
            changed = [*history[:-5], *ids(3, 5)]
            third = session.generate(changed, NEW, lambda: None)
        finally:
            session.close()
    return [first.tokens, second.tokens, third.tokens], sizes


@cache
def recomputed(family: str):
    """The tokens of recomputation, which every exact strategy must give."""
    return talk(family, strategies.get("none"))[0]


@pytest.mark.parametrize("family", families.CONFIGS)
def test_the_tokens_vary_so_that_equality_means_something(family):
    first, second, third = recomputed(family)
    assert len(set(first) | set(second) | set(third)) > 5
    assert second != third


@pytest.mark.parametrize(("family", "name"), WORKING)
def test_a_family_works_with_right_tokens_and_the_predicted_bytes(family, name):
    strategy, model = strategies.get(name), model_of(family)
    assert strategy.available(model, "cpu") is None
    tokens, sizes = talk(family, strategy)
    if strategy.exact:
        assert tokens == recomputed(family)
    arch = Architecture.from_config(model.architecture)
    passes: list[int] = []
    for held, length, reused in sizes:
        passes = [*(passes if reused else []), length - reused, *[1] * (NEW - 1)]
        assert strategy.traffic(LENGTH).held_bytes(arch, passes, 4) == held


@pytest.mark.parametrize(("family", "name"), REFUSED)
def test_what_a_family_cannot_do_is_said_in_one_sentence(family, name):
    reason = strategies.get(name).available(model_of(family), "cpu")
    assert reason is not None and expected_refusal(family, name) in reason
    assert name in reason and "\n" not in reason


@pytest.mark.parametrize("family", sorted(_WINDOWS))
@pytest.mark.parametrize("name", ["sliding_window", "attention_sink"])
def test_a_window_wider_than_the_conversation_changes_no_token(family, name):
    wide = dataclasses.replace(strategies.get(name), window=500)
    assert talk(family, wide)[0] == recomputed(family)


@pytest.mark.parametrize("name", ["sliding_window", "attention_sink"])
def test_the_narrower_of_two_windows_is_kept(name):
    """A model's window of 64 hides nothing from 40 tokens: what counts is the strategy's window."""
    import torch

    narrow = dataclasses.replace(strategies.get(name), window=16)
    replies = []
    for window in (64, None):
        config = families.CONFIGS["mistral"] | {"sliding_window": window}
        model = families.build("mistral", config)
        with torch.inference_mode():
            generation = narrow.session(model, 60).generate(ids(1, 40), 12, lambda: None)
        replies.append(generation.tokens)
        kept = narrow.window + narrow.sinks
        assert cache_bytes(generation.cache) == kept * 2 * 2 * 2 * 64 * 4
    assert replies[0] == replies[1]


# The sizes of each family --------------------------------------------------------------------


@pytest.mark.parametrize("family", families.CONFIGS)
def test_parameters_are_those_of_the_model(family):
    model = model_of(family)
    counted = sum(weight.numel() for weight in model.model.parameters())
    assert physics.parameters(Architecture.from_config(model.architecture)) == counted


@pytest.mark.parametrize("family", families.CONFIGS)
def test_an_architecture_survives_its_plain_form(family):
    arch = Architecture.from_config(model_of(family).architecture)
    assert Architecture.from_dict(arch.as_dict()) == arch


@cache
def eager_model(family: str):
    """The same family with matrix products that torch's counter sees one by one."""
    return families.build(family, attn_implementation="eager", experts_implementation="eager").model


@pytest.mark.parametrize("family", families.CONFIGS)
@pytest.mark.parametrize(
    ("new", "past", "static"), [(50, 0, 0), (90, 0, 0), (1, 90, 0), (20, 70, 0), (1, 0, 100)]
)
def test_flops_are_those_torch_counts(family, new, past, static):
    import torch
    from torch.utils.flop_counter import FlopCounterMode
    from transformers import DynamicCache, StaticCache

    model, config = eager_model(family), eager_model(family).config
    cached = (
        StaticCache(config=config, max_cache_len=static) if static else DynamicCache(config=config)
    )
    argument = {"cache_params" if family == "mamba" else "past_key_values": cached}
    with torch.no_grad():
        if past:
            model(torch.tensor([ids(1, past)]), **argument)
        with FlopCounterMode(display=False) as counter:
            model(torch.tensor([ids(2, new)]), **argument, logits_to_keep=1)
    # How many products a convolution takes depends on the kernel, so that it is not modelled.
    convolutions = counter.get_flop_counts()["Global"].get(torch.ops.aten.convolution, 0)
    traffic = physics.Static(static) if static else physics.Dynamic()
    arch = Architecture.from_config(config.to_dict())
    modelled = physics.forward_flops(
        arch, new, past, attended_tokens=lambda layer: traffic.attended(layer, new, past)
    )
    # From transformers 5.19 on angles are multiplied without a matrix product, which nobody counts.
    angles = arch.angles * new if families.library_at_least(5, 19) else 0
    assert modelled - angles == counter.get_total_flops() - convolutions


@pytest.mark.parametrize(("family", "changes"), families.VARIANTS)
def test_settings_that_change_sizes_are_followed(family, changes):
    import torch

    model = families.build(family, families.CONFIGS[family] | changes)
    arch = Architecture.from_config(model.architecture)
    assert physics.parameters(arch) == sum(w.numel() for w in model.model.parameters())
    for name in ("dynamic", "static"):
        strategy = strategies.get(name)
        with torch.inference_mode():
            generation = strategy.session(model, 60).generate(ids(1, 40), 6, lambda: None)
        held = physics.predicted_kv_bytes(arch, strategy.traffic(60), 40, 6, 4)
        assert cache_bytes(generation.cache) == held


@pytest.mark.parametrize(
    ("family", "changes"), [("opt", {"word_embed_proj_dim": 128}), ("falcon", {"alibi": True})]
)
def test_a_variant_that_is_not_modelled_is_tried_like_an_unknown_family(family, changes):
    model = families.build(family, families.CONFIGS[family] | changes)
    assert not shape.known(model)
    assert strategies.get("dynamic").available(model, "cpu") is None


def test_a_token_reads_the_experts_it_is_sent_to():
    arch = Architecture.from_config(model_of("mixtral").architecture)
    one = physics.weight_bytes_read(arch, 4)
    expert = 3 * 256 * 128
    idle = len(arch.layers) * 2 * expert
    row = (arch.vocab_size - 1) * arch.hidden_size
    assert one == 4 * (physics.parameters(arch) - idle - row)
    assert physics.weight_bytes_read(arch, 4, batch=1, tokens=1000) == one + 4 * idle


def test_sizes_under_text_config_count():
    nested = {"model_type": "gemma3", "text_config": families.CONFIGS["gemma3_text"]}
    nested["text_config"] = {"model_type": "gemma3_text", **nested["text_config"]}
    arch = Architecture.from_config(nested)
    assert [layer.window for layer in arch.layers] == [64, None]
    llama = {"text_config": {"model_type": "llama", **families.CONFIGS["llama"]}}
    assert len(Architecture.from_config(llama).layers) == 2


def test_a_size_missing_under_text_config_is_named_with_its_file():
    from kvbench.errors import InputError

    with pytest.raises(InputError, match=r"^a/config.json: hidden_size is missing"):
        Architecture.from_config({"text_config": {"num_attention_heads": 4}}, "a/config.json")


# Exact bytes of small models -----------------------------------------------------------------

#: Bytes held after 152 prompt and 150 new tokens, and those of a static cache of 302.
HELD = {
    "llama": (616_448, 618_496),
    "bloom": (1_232_896, 1_236_992),
    "gemma2": (373_760, 374_784),
    "mistral": (131_072, 131_072),
    "qwen2": (373_760, 374_784),
    "gpt2": (1_232_896, 1_236_992),
    "falcon": (308_224, 309_248),
    "gemma3_text": (373_760, 374_784),
    "deepseek_v2": (231_168, 231_936),
    "deepseek_v3": (231_168, 231_936),
    "mamba": (24_576, 24_576),
}


@pytest.mark.parametrize("family", HELD)
def test_the_headline_cell_holds_these_bytes(family):
    arch = Architecture.from_config(model_of(family).architecture)
    held = [
        physics.predicted_kv_bytes(arch, traffic, 152, 150, 4)
        for traffic in (physics.Dynamic(), physics.Static(302))
    ]
    assert tuple(held) == HELD[family]


#: What each strategy says of the families above that it does not serve, over the headline lengths.
HEADLINE_REFUSALS = {
    ("mistral", "quantized_int4"): "2 of 2 layers of this model, which keep a sliding window",
    ("mistral", "quantized_hqq_int4"): "2 of 2 layers of this model, which keep a sliding window",
    ("mistral", "quantized_int4_reuse"): "2 of 2 layers of this model, which keep a sliding window",
    ("mistral", "paged"): "2 of 2 layers of this model, which keep a sliding window",
    ("qwen2", "quantized_int4"): "1 of 2 layers of this model, which keep a sliding window",
    ("qwen2", "paged"): "1 of 2 layers of this model, which keep a sliding window",
    ("mamba", "quantized_int4"): "2 of 2 layers of this model, which keep a state of fixed size",
    (
        "mamba",
        "dynamic_reuse",
    ): "the state of this model's layers cannot say which tokens are in it",
}


@cache
def headline(family: str, name: str) -> tuple[list[int], int]:
    """Tokens and bytes in storage after 152 prompt and 150 new tokens."""
    import torch

    with torch.inference_mode():
        session = strategies.get(name).session(model_of(family), 302)
        try:
            generation = session.generate(ids(1, 152), 150, lambda: None)
            return generation.tokens, cache_bytes(generation.cache)
        finally:
            session.close()


@pytest.mark.parametrize(
    ("family", "name"),
    [
        (family, name)
        for family in HELD
        for name in ("dynamic", "static", "dynamic_reuse", "static_reuse")
        if not expected_refusal(family, name)
    ],
)
def test_the_headline_cell_holds_them_in_storage_and_gives_the_tokens_of_recomputation(
    family, name
):
    tokens, held = headline(family, name)
    assert held == HELD[family][name.startswith("static")]
    assert tokens == headline(family, "none")[0]


@pytest.mark.parametrize("family", ["mistral", "qwen2"])
def test_of_a_models_window_and_a_wider_one_of_a_strategy_the_models_is_kept(family):
    """512 is wider than 64: what the library's own cache holds, not 524,288 bytes, and its tokens."""
    assert headline(family, "sliding_window-w512") == headline(family, "dynamic")


@pytest.mark.parametrize(("family", "name"), HEADLINE_REFUSALS)
def test_what_cannot_serve_the_headline_cell_is_refused_in_one_sentence(family, name):
    reason = strategies.get(name).misfit(model_of(family))
    assert reason is not None and reason.endswith(HEADLINE_REFUSALS[family, name])
    assert "\n" not in reason


def test_a_decoder_beside_a_picture_tower_is_measured_as_the_decoder_alone():
    """Gemma 3 with its sizes under ``text_config``: one layer of two has a window of 64 tokens."""
    import torch

    tower = {
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 28,
        "patch_size": 14,
    }
    config = {
        "text_config": families.CONFIGS["gemma3_text"],
        "vision_config": tower,
        "tie_word_embeddings": False,
        "initializer_range": 0.1,
    }
    model = families.build("gemma3", config)
    found = {}
    with torch.inference_mode():
        for name in ("none", "dynamic", "static"):
            session = strategies.get(name).session(model, 302)
            generation = session.generate(ids(1, 152), 150, lambda: None)
            found[name] = (generation.tokens, cache_bytes(generation.cache))
    assert len(set(found["none"][0])) > 20
    assert found["none"][0] == found["dynamic"][0] == found["static"][0]
    assert (found["dynamic"][1], found["static"][1]) == HELD["gemma3_text"]
    assert "1 of 2 layers" in strategies.get("quantized_int4").misfit(model)


@pytest.mark.parametrize("family", ["llama", "mamba", "jamba"])
@pytest.mark.parametrize("name", ["dynamic", "static"])
def test_bytes_in_bfloat16_are_predicted_where_states_stay_in_float32(family, name):
    import torch

    model, strategy = families.build(family), strategies.get(name)
    model.model.to(torch.bfloat16)
    arch = Architecture.from_config(model.architecture)
    with torch.inference_mode():
        generation = strategy.session(model, 40).generate(ids(1, 30), 6, lambda: None)
    held = physics.predicted_kv_bytes(arch, strategy.traffic(40), 30, 6, 2)
    assert cache_bytes(generation.cache) == held


def test_gpt2_at_the_headline_lengths():
    import torch

    model = model_of("gpt2")
    found = {}
    with torch.inference_mode():
        for name in ("none", "dynamic", "static", "quantized_int4"):
            session = strategies.get(name).session(model, 302)
            generation = session.generate(ids(1, 152), 150, lambda: None)
            found[name] = (generation.tokens, cache_bytes(generation.cache))
    assert found["none"][0] == found["dynamic"][0] == found["static"][0]
    sizes = {name: size for name, (_, size) in found.items()}
    assert sizes == {
        "none": 0,
        "dynamic": 1_232_896,
        "static": 1_236_992,
        "quantized_int4": 265_216,
    }


# Going back ----------------------------------------------------------------------------------


@pytest.mark.parametrize("family", sorted(_WINDOWS))
def test_a_full_window_that_cannot_go_back_starts_over(family):
    import torch

    model = model_of(family)
    asked = ids(1, 120)
    changed = [*asked[:-5], *ids(2, 5)]
    with torch.inference_mode():
        reusing = strategies.get("dynamic_reuse").session(model, 140)
        reusing.generate(asked, 2, lambda: None)
        again = reusing.generate(changed, 8, lambda: None)
        fresh = strategies.get("dynamic").session(model, 140).generate(changed, 8, lambda: None)
    assert again.tokens == fresh.tokens
    assert again.reused_tokens == 0


def test_a_window_that_is_not_full_yet_goes_back():
    import torch

    asked = ids(1, 40)
    with torch.inference_mode():
        reusing = strategies.get("dynamic_reuse").session(model_of("mistral"), 140)
        reusing.generate(asked, 2, lambda: None)
        again = reusing.generate([*asked[:-5], *ids(2, 5)], 4, lambda: None)
    assert again.reused_tokens == 35


@pytest.mark.parametrize(("bits", "rows"), [(1, 8), (2, 4)])
def test_hqq_is_refused_where_a_token_does_not_fill_what_it_packs(bits, rows):
    """Two heads of 64 numbers are two groups; HQQ would lose the rest of a prompt of odd length."""
    config = families.CONFIGS["llama"] | {"num_key_value_heads": 2, "head_dim": 64}
    model = families.build("llama", config)
    reason = strategies.get(f"quantized-hqq-b{bits}").misfit(model)
    assert f"packs {rows} groups of {bits} bits together" in reason
    assert "a token of this model has 2 of 64 numbers" in reason
    assert strategies.get("quantized_hqq_int4").misfit(model) is None


# Families that nothing is known of -------------------------------------------------------------


_NOT_QUANTISED = (
    "head size of 16",
    "sliding window",
    "a cache of their own kind",
    "a state beside keys and values",
    "a state of fixed size",
    "chunked attention",
)


@pytest.mark.parametrize("family", families.UNKNOWN)
def test_a_family_drawn_at_random_gives_the_tokens_of_recomputation_or_a_reason(family):
    model = families.build(family, families.UNKNOWN[family])
    with pytest.raises(physics.UnknownFamily):
        Architecture.from_config(model.architecture)
    assert strategies.get("none").available(model, "cpu") is None
    takes_none = family in {"rwkv", "xlm", "reformer"}
    for name in ("dynamic", "static", "dynamic_reuse", "quantized_int4"):
        reason = strategies.get(name).available(model, "cpu")
        if takes_none:
            assert f"{family} takes none" in reason
        elif name == "quantized_int4":
            assert any(words in reason for words in _NOT_QUANTISED)
        elif name == "dynamic_reuse" and family in {
            "inkling_text",
            "zaya",
            "qwen3_5_moe_text",
            "falcon_mamba",
        }:
            assert "cannot say which tokens" in reason
        elif name == "static" and family == "inkling_text":
            assert "with static on inkling_text than without a cache" in reason
        elif name == "static" and family == "llama4_text" and reason:
            # Later versions of the library may build its mask.
            assert "cannot run static on llama4_text: TypeError" in reason
        else:
            assert reason is None


@pytest.mark.parametrize("lengths", [EQUAL, MIXED])
@pytest.mark.parametrize("name", ["none", "dynamic", "dynamic_reuse"])
def test_several_prompts_of_an_unknown_family_are_tried_too(name, lengths):
    model, strategy = families.build("glm", families.UNKNOWN["glm"]), strategies.get(name)
    assert strategy.available_batch(model, lengths) is None
    assert list(model.trials) == [f"{name} on prompts of {lengths} lengths"]


def test_a_family_that_does_not_mask_padding_is_unsupported_for_mixed_lengths():
    """Reformer attends within chunks counted from the first position, the padding included."""
    model = families.build("reformer", families.UNKNOWN["reformer"])
    recomputing = strategies.get("none")
    assert recomputing.available_batch(model, EQUAL) is None
    assert recomputing.available_batch(model, MIXED).endswith(
        "gives other tokens with none for several prompts of mixed lengths on reformer than for each "
        "by itself"
    )


def test_a_known_family_is_not_tried_again():
    model = families.build("llama")
    assert strategies.get("dynamic").available(model, "cpu") is None
    assert strategies.get("dynamic").available_batch(model, MIXED) is None
    assert bool(model.trials) is not _CHECKED


def test_with_a_release_nobody_checked_every_family_is_tried(monkeypatch):
    model = families.build("llama")
    monkeypatch.setattr(shape, "library_version", lambda: (99, 0))
    assert strategies.get("dynamic").available(model, "cpu") is None
    assert set(model.trials) == {"dynamic"}


def test_what_a_trial_compiled_is_forgotten_before_anything_is_timed(monkeypatch):
    """It knows the trial's hook, and torch compiles one function anew eight times at most."""
    import torch
    from kvbench.strategies.static import Static

    forgotten = []
    monkeypatch.setattr(torch.compiler, "reset", lambda: forgotten.append(True))
    model = families.build("olmo", families.CONFIGS["llama"])
    assert strategies.get("static").available(model, "cpu") is None
    assert not forgotten
    monkeypatch.setattr(Static, "compiled", lambda *_: True)
    assert strategies.get("static").available_batch(model, EQUAL) is None
    assert forgotten


def test_a_kept_cache_that_goes_back_wrongly_is_found_by_the_trial(monkeypatch):
    """A layer that stays as long as it was: the first two turns only append and do not show it."""
    from transformers import DynamicCache

    model = families.build("olmo", families.CONFIGS["llama"])
    monkeypatch.setattr(DynamicCache, "crop", lambda *_: None)
    reason = strategies.get("dynamic_reuse").available(model, "cpu")
    assert "dynamic_reuse on olmo" in reason


def test_an_unknown_family_is_tried_and_works_or_says_why():
    config = families.CONFIGS["llama"] | {"head_dim": 64}
    model = families.build("olmo", config)
    with pytest.raises(physics.UnknownFamily):
        Architecture.from_config(model.architecture)
    assert strategies.get("dynamic").available(model, "cpu") is None
    assert strategies.get("static").available(model, "cpu") is None
    assert set(model.trials) == {"dynamic", "static"}


def test_a_family_whose_cache_fails_is_unsupported_in_one_sentence(monkeypatch):
    from kvbench.strategies import dynamic

    def broken(*_):
        raise IndexError("no such\nlayer")

    model = families.build("olmo", families.CONFIGS["llama"])
    monkeypatch.setattr(dynamic.Dynamic, "session", broken)
    reason = strategies.get("dynamic").available(model, "cpu")
    assert reason.endswith("cannot run dynamic on olmo: IndexError: no such layer")


def test_an_unknown_family_with_other_tokens_is_unsupported(monkeypatch):
    from kvbench.strategies import trial

    model = families.build("olmo", families.CONFIGS["llama"])
    replies = iter([([[1], [2]], []), ([[1], [3]], [])])
    monkeypatch.setattr(trial, "_talk", lambda *_: next(replies))
    reason = strategies.get("static").available(model, "cpu")
    assert "other tokens with static on olmo than without a cache" in reason


def test_a_model_without_a_cache_runs_without_one_only():
    config = {
        "vocab_size": 2560,
        "n_embd": 64,
        "n_layer": 2,
        "n_head": 2,
        "n_positions": 128,
        "initializer_range": 0.1,
    }
    model = families.build("openai-gpt", config)
    assert strategies.get("none").available(model, "cpu") is None
    assert "takes none" in strategies.get("dynamic").available(model, "cpu")


#: From transformers 5.18 on the two decoders below are what they should be.
_MENDED = families.library_at_least(5, 18)


@pytest.mark.parametrize("name", ["dynamic", "static", "dynamic_reuse"])
def test_a_family_that_reads_later_tokens_too_is_unsupported_with_a_cache(name):
    """Megatron-BERT's mask hides nothing without a cache, so that recomputation gives other tokens."""
    config = families.UNKNOWN["xlm-roberta"]
    reason = strategies.get(name).available(families.build("megatron-bert", config), "cpu")
    if _MENDED:
        assert reason is None
    else:
        assert f"other tokens with {name} on megatron-bert than without a cache" in reason


@pytest.mark.parametrize("name", ["dynamic", "static", "sliding_window"])
def test_a_family_whose_cache_forgets_positions_is_unsupported_though_its_tokens_repeat(name):
    """RoFormer counts positions from zero again; both ways it repeats one token for ever."""
    config = families.UNKNOWN["roberta"] | {"num_hidden_layers": 4}
    reason = strategies.get(name).available(families.build("roformer", config), "cpu")
    if _MENDED:
        assert reason is None
    else:
        assert f"with {name} on roformer than without a cache" in reason


# Windows that nobody reads -----------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
@pytest.mark.parametrize("name", ["dynamic", "static", "dynamic_reuse"])
def test_a_window_that_the_family_does_not_read_drops_no_key(family, name):
    model = families.build(family, families.CONFIGS[family] | {"sliding_window": 16})
    with_window = strategies.get(name).session(model, LENGTH)
    plain = strategies.get(name).session(model_of(family), LENGTH)
    found = [one.generate(ids(1, PROMPT), NEW, lambda: None) for one in (with_window, plain)]
    assert found[0].tokens == found[1].tokens
    assert cache_bytes(found[0].cache) == cache_bytes(found[1].cache)


@pytest.mark.parametrize("family", ["mistral", "gemma2", "qwen2"])
def test_a_window_that_the_family_reads_stays(family):
    from kvbench.strategies import shape

    assert "sliding" in shape.layer_kinds(model_of(family))


def test_the_sizes_of_a_llama_have_no_window_whatever_its_configuration_carries():
    config = {"model_type": "llama", **families.CONFIGS["llama"]}
    assert Architecture.from_config({**config, "sliding_window": 16}) == Architecture.from_config(
        config
    )
