"""A client that keeps its history as text: how much of the cache its next prompt agrees with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from kvbench import layout
from kvbench.errors import InputError
from kvbench.inputs import models, scenarios, tokens
from kvbench.measurement import startup
from kvbench.studies import Context, Outcome

if TYPE_CHECKING:
    from kvbench.inputs.models import LoadedModel


def retokenise(factors: Mapping[str, Any], context: Context) -> Outcome:

    name = factors["scenario"]
    path = layout.shipped("config") / "scenarios" / f"{name}.yaml"
    if not path.exists():
        raise InputError(
            f"app.studies.prefix.scenarios: there is no scenario {name!r}; correct the name"
        )
    scenario = scenarios.load(path)
    if scenario.kind != "conversation":
        raise InputError(
            f"app.studies.prefix.scenarios: {name!r} has no dialogue; name a conversation"
        )
    startup.skip_unused_imports()
    tokenizer = tokens.load_tokenizer(context.model_dir)
    model = models.load(context.model_dir, "cpu", "float32")
    rows = []
    for temperature in factors["temperatures"]:
        rows += _hold(temperature, scenario, tokenizer, model, factors, context.seed)
    return Outcome(rows)


def _hold(
    temperature: float,
    scenario: scenarios.Scenario,
    tokenizer: Any,
    model: LoadedModel,
    factors: Mapping[str, Any],
    seed: int,
) -> list[dict[str, Any]]:
    """A client that keeps text: how much of the cache its next prompt still agrees with."""
    from kvbench.strategies.base import common_prefix

    messages = [{"role": "system", "content": scenario.system}]
    held: list[int] = []
    prompt_before = 0
    rows = []
    for number_of_turn, turn in enumerate(scenario.turns[: factors["turns"]], start=1):
        messages.append({"role": "user", "content": turn.user})
        prompt = tokens.prompt_ids(tokenizer, messages)
        if held:
            kept = common_prefix(held, prompt)
            rows.append(
                {
                    "part": "retokenise",
                    "scenario": scenario.id,
                    "temperature": temperature,
                    "turn": number_of_turn,
                    "held_tokens": len(held),
                    "surviving_tokens": kept,
                    "surviving": kept / len(held),
                    "reply_tokens": len(held) - prompt_before,
                    "reply_survives": max(0, kept - prompt_before)
                    / max(1, len(held) - prompt_before),
                }
            )
        reply = _reply(model, prompt, temperature, factors, seed + number_of_turn)
        held, prompt_before = [*prompt, *reply], len(prompt)
        messages.append({"role": "assistant", "content": model.decode(reply)})
    return rows


def _reply(
    model: LoadedModel, prompt: list[int], temperature: float, factors: Mapping[str, Any], seed: int
) -> list[int]:
    """Tokens of a reply up to its end, greedy or drawn."""
    import torch
    from transformers import GenerationConfig

    chosen: dict[str, Any] = {"do_sample": False}
    if temperature:
        chosen = {"do_sample": True, "temperature": float(temperature), "top_k": 0}
    ids = torch.tensor([prompt])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        output = model.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            generation_config=GenerationConfig(
                max_new_tokens=factors["reply_tokens"],
                eos_token_id=None,
                pad_token_id=0,
                **chosen,
            ),
        )
    return model.reply(output[0, len(prompt) :].tolist())
