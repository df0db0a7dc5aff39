"""The embedded model's own tokenizer and chat template, made from the project's scenarios."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from kvbench import documents
from kvbench.inputs.scenarios import Scenario

#: Size of the vocabulary, special tokens included.
VOCABULARY = 2560
#: Special tokens, in the order of their ids.
SPECIAL = ("<|pad|>", "<|begin|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>")
#: One message after the other, each between its role and an end mark.
CHAT_TEMPLATE = (
    "{{- '<|begin|>' -}}"
    "{%- for message in messages -%}"
    "{{- '<|' + message['role'] + '|>' + message['content'] | trim + '<|end|>' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}"
)


def corpus(scenarios: Mapping[str, Scenario], rewordings: Mapping[str, Any]) -> list[str]:
    """All sentences the tokenizer learns from, in a fixed order."""
    texts: list[str] = []
    for name in sorted(scenarios):
        scenario = scenarios[name]
        texts.append(scenario.system)
        for turn in scenario.turns:
            texts += [turn.user, turn.reference]
        for variants in rewordings.get(name, []):
            texts += variants
    return [text for text in texts if text]


def build_tokenizer(texts: Iterable[str], folder: Path) -> None:
    """Train a byte-level BPE tokenizer and write it in Hugging Face format.

    Writes ``tokenizer.json``, ``tokenizer_config.json``, ``chat_template.jinja`` and
    ``special_ids.json`` (the ids a model configuration needs).
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(SPECIAL),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    folder.mkdir(parents=True, exist_ok=True)
    documents.write_text_atomic(folder / "tokenizer.json", tokenizer.to_str(pretty=False) + "\n")
    documents.write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "pad_token": "<|pad|>",
            "bos_token": "<|begin|>",
            "eos_token": "<|end|>",
            "model_max_length": 65536,
            "clean_up_tokenization_spaces": False,
        },
    )
    documents.write_text_atomic(folder / "chat_template.jinja", CHAT_TEMPLATE)
    ids = {name: SPECIAL.index(f"<|{token}|>") for name, token in _ID_KEYS.items()}
    documents.write_json(folder / "special_ids.json", ids)


_ID_KEYS = {"pad_token_id": "pad", "bos_token_id": "begin", "eos_token_id": "end"}
