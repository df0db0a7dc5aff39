"""Training of the embedded model: a small Llama that learns the project's dialogues by heart."""

from __future__ import annotations

import copy
import csv
import io
import math
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from kvbench import documents
from kvbench.errors import InputError
from kvbench.inputs.scenarios import Scenario
from kvbench.measurement import startup

if TYPE_CHECKING:
    import torch
    from tokenizers import Tokenizer
    from transformers import LlamaForCausalLM

#: Shape of the model, with the keys of its Hugging Face ``config.json``.
ARCHITECTURE: Mapping[str, Any] = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 2560,
    "hidden_size": 256,
    "intermediate_size": 640,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 65536,
    "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
    "rms_norm_eps": 1.0e-5,
    "tie_word_embeddings": False,
}
#: What a position without a target carries; the value that cross entropy skips by convention.
NO_TARGET = -100
#: Lengths of output, in tokens, at which conversations are checked: the default and the paper's.
CHECKED_LENGTHS = (150, 32)
#: Files of the tokenizer, which training uses and never changes.
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "special_ids.json",
)


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the outcome of a training run, beside the texts.

    Parameters
    ----------
    seed:
        Seed of the first weights and of the order and shape of the examples.
    steps:
        Updates at most; the learning rate falls to a hundredth of its peak over them (cosine).
    learning_rate, warmup, weight_decay, clip:
        Peak rate of AdamW, steps of linear rise, decay of matrices, and largest gradient norm.
    reworded:
        Share of questions asked in other words.
    filler_weight:
        Weight of a target behind the end of a reply, against 1 for a target in it.
    whole_from:
        Share of the run after which conversations from their first turn on are learned; before,
        every step has a window of each dialogue.
    wholes, windows:
        Conversations and windows a step after that.
    check_every:
        Steps between checks; training ends early when two checks in a row reach ``goal``.
    goal:
        Share of turns whose reply must come out exactly, at every length checked.
    """

    seed: int = 2025
    steps: int = 750
    learning_rate: float = 2.5e-3
    warmup: int = 60
    weight_decay: float = 0.02
    clip: float = 1.0
    reworded: float = 0.25
    filler_weight: float = 0.1
    whole_from: float = 0.33
    wholes: int = 2
    windows: int = 2
    check_every: int = 100
    goal: float = 1.0


@dataclass(frozen=True)
class Dialogue:
    """One scenario as token ids.

    Attributes
    ----------
    opening:
        The system prompt, from the begin mark to its last word.
    questions:
        For every turn all its wordings, the scenario's own first; each from the end mark of what
        came before to the mark after which the assistant speaks.
    replies:
        For every turn the reference reply, without an end mark.
    """

    name: str
    opening: tuple[int, ...]
    questions: tuple[tuple[tuple[int, ...], ...], ...]
    replies: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Example:
    """One sequence to learn from: four arrays of equal length.

    Attributes
    ----------
    tokens, positions:
        Input ids, and where in the conversation each stands.
    targets:
        The token to predict at each position, or :data:`NO_TARGET`.
    weights:
        How much each target counts.
    """

    tokens: np.ndarray
    positions: np.ndarray
    targets: np.ndarray
    weights: np.ndarray


def dialogues(
    tokenizer: Tokenizer, scenarios: Mapping[str, Scenario], rewordings: Mapping[str, Any]
) -> list[Dialogue]:
    """Tokenise every conversation and the other wordings of its questions.

    Special tokens never merge with their neighbours, so the pieces put together are what the chat
    template gives for the whole.

    Raises
    ------
    InputError
        The rewordings name an unknown scenario or have another number of turns.
    """
    known = {name: scenario for name, scenario in scenarios.items() if scenario.turns}
    if unknown := sorted(set(rewordings) - set(known)):
        raise InputError(
            f"rewordings.yaml: {unknown[0]} is no conversation in config/scenarios; rename the key"
        )

    def encode(text: str) -> tuple[int, ...]:
        return tuple(tokenizer.encode(text, add_special_tokens=False).ids)

    result = []
    for name in sorted(known):
        scenario = known[name]
        others = rewordings.get(name) or [[]] * len(scenario.turns)
        if len(others) != len(scenario.turns):
            raise InputError(
                f"rewordings.yaml: {name} has {len(others)} turns but the scenario has "
                f"{len(scenario.turns)}; give one list a turn"
            )
        result.append(
            Dialogue(
                name,
                encode(f"<|begin|><|system|>{scenario.system.strip()}"),
                tuple(
                    tuple(
                        encode(f"<|end|><|user|>{text.strip()}<|end|><|assistant|>")
                        for text in (turn.user, *variants)
                    )
                    for turn, variants in zip(scenario.turns, others, strict=True)
                ),
                tuple(encode(turn.reference) for turn in scenario.turns),
            )
        )
    return result


def example(
    dialogue: Dialogue,
    turns: range,
    lengths: Sequence[int | None],
    wordings: Sequence[int],
    end: int,
    filler_weight: float,
) -> Example:
    """Lay out consecutive turns behind the system prompt as a measurement would.

    A measured turn generates a fixed number of tokens: a reply that is longer is cut, a shorter one
    is followed by its end mark again and again. Turns left out between the system prompt and the
    first turn shown leave a gap in the positions, as wide as they would be.

    Parameters
    ----------
    dialogue:
        Where the tokens come from.
    turns:
        The turns shown.
    lengths:
        For every turn of the conversation the number of generated tokens; None ends the turn with
        the last word of its reply, as a chat that stops at the end mark does.
    wordings:
        For every turn of the conversation which wording of the question is used.
    end:
        Id of the end mark.
    filler_weight:
        Weight of the targets after the first end mark.
    """
    tokens: list[int] = list(dialogue.opening)
    positions = list(range(len(tokens)))
    targets = [NO_TARGET] * len(tokens)
    weights = [0.0] * len(tokens)
    place = len(tokens)
    for number in range(turns.stop):
        reply, question = dialogue.replies[number], dialogue.questions[number][wordings[number]]
        length = len(reply) if lengths[number] is None else lengths[number]
        if number not in turns:
            place += len(question) + length
            continue
        said = [*reply, *[end] * (length - len(reply))][:length]
        # One target for the last token of the question, one for every generated token.
        wanted = [*reply, *[end] * (length + 1 - len(reply))][: length + 1]
        tokens += [*question, *said]
        targets += [*[NO_TARGET] * (len(question) - 1), *wanted]
        weights += [0.0] * (len(question) - 1)
        weights += [1.0 if n <= len(reply) else filler_weight for n in range(len(wanted))]
        positions += range(place, place + len(question) + length)
        place += len(question) + length
    return Example(
        np.array(tokens, np.int64),
        np.array(positions, np.int64),
        np.array(targets, np.int64),
        np.array(weights, np.float32),
    )


def draw(
    dialogue: Dialogue,
    generator: np.random.Generator,
    whole: bool,
    end: int,
    reworded: float,
    filler_weight: float,
) -> Example:
    """Draw one example: which turns, what length of output, and which wordings.

    Parameters
    ----------
    whole:
        Whether the conversation starts at its first turn and has at least half of them; otherwise
        one to four turns are shown, from anywhere.
    reworded:
        Share of questions in other words.
    """
    count = len(dialogue.replies)
    if whole:
        turns = range(0, int(generator.integers(-(-count // 2), count + 1)))
    else:
        size = int(generator.integers(1, min(4, count) + 1))
        first = int(generator.integers(0, count - size + 1))
        turns = range(first, first + size)
    kind = generator.random()
    length: int | None = None
    if kind < 0.4:
        length = int(generator.integers(100, 181))
    elif kind < 0.65:
        length = int(generator.integers(12, 100))
    wordings = [
        int(generator.integers(1, len(ways)))
        if len(ways) > 1 and generator.random() < reworded
        else 0
        for ways in dialogue.questions
    ]
    return example(dialogue, turns, [length] * count, wordings, end, filler_weight)


def batches(
    corpus: Sequence[Dialogue], recipe: Recipe, end: int
) -> Iterator[tuple[int, list[Example]]]:
    """The examples of each step, the same for the same recipe."""
    for step in range(recipe.steps):
        generator = np.random.default_rng((recipe.seed, step))
        order = generator.permutation(len(corpus))
        wholes = 0
        if step >= recipe.whole_from * recipe.steps:
            wholes = recipe.wholes
            order = order[: wholes + recipe.windows]
        yield (
            step,
            [
                draw(
                    corpus[which],
                    generator,
                    number < wholes,
                    end,
                    recipe.reworded,
                    recipe.filler_weight,
                )
                for number, which in enumerate(order)
            ],
        )


def new_model(seed: int, special_ids: Mapping[str, int], **changes: Any) -> LlamaForCausalLM:
    """A model with fresh weights, float32; ``changes`` replace keys of :data:`ARCHITECTURE`."""
    startup.skip_unused_imports()
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**{**ARCHITECTURE, **special_ids, **changes}))


def loss_of(model: LlamaForCausalLM, one: Example, total_weight: float) -> torch.Tensor:
    """Cross entropy of one example in nats: sum over targets times weights, by ``total_weight``."""
    import torch

    device = model.device
    tokens = torch.from_numpy(one.tokens).to(device)[None]
    # A mask is named although all of it is visible: without one, a jump in the positions would be
    # taken for the start of another sequence.
    hidden = model.model(
        input_ids=tokens,
        position_ids=torch.from_numpy(one.positions).to(device)[None],
        attention_mask=torch.ones_like(tokens),
        use_cache=False,
    ).last_hidden_state[0]
    kept = np.flatnonzero(one.targets != NO_TARGET)
    logits = model.lm_head(hidden[torch.from_numpy(kept).to(device)])
    losses = torch.nn.functional.cross_entropy(
        logits.float(), torch.from_numpy(one.targets[kept]).to(device), reduction="none"
    )
    return (losses * torch.from_numpy(one.weights[kept]).to(device)).sum() / total_weight


def learning_rate(recipe: Recipe, step: int) -> float:
    """Linear rise over the warm-up, then a cosine down to a hundredth of the peak."""
    if step < recipe.warmup:
        return recipe.learning_rate * (step + 1) / recipe.warmup
    done = (step - recipe.warmup) / max(1, recipe.steps - recipe.warmup)
    return recipe.learning_rate * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * min(1.0, done))))


def exact_turns(
    model: LlamaForCausalLM, dialogue: Dialogue, new_tokens: int, end: int
) -> list[bool]:
    """For every turn whether greedy decoding gives the reference, when the history is right.

    One forward pass over the whole conversation: a greedy reply equals the reference if the most
    probable token equals the wanted one at each position of the reply, end mark included as far as
    ``new_tokens`` reaches. If all turns are exact, so is the conversation decoded step by step,
    apart from the filler, which is part of the history and checked too.
    """
    import torch

    count = len(dialogue.replies)
    whole = example(dialogue, range(count), [new_tokens] * count, [0] * count, end, 1.0)
    with torch.inference_mode():
        tokens = torch.from_numpy(whole.tokens).to(model.device)[None]
        hidden = model.model(input_ids=tokens, use_cache=False).last_hidden_state[0]
        best = model.lm_head(hidden).argmax(-1).cpu().numpy()
    result, place = [], len(dialogue.opening)
    for ways in dialogue.questions:
        begin = place + len(ways[0]) - 1
        wanted = slice(begin, begin + new_tokens)
        result.append(bool((best[wanted] == whole.targets[wanted]).all()))
        place += len(ways[0]) + new_tokens
    return result


def exact_share(
    model: LlamaForCausalLM, corpus: Sequence[Dialogue], new_tokens: int, end: int
) -> float:
    """Share of all turns that :func:`exact_turns` finds exact."""
    turns = [one for dialogue in corpus for one in exact_turns(model, dialogue, new_tokens, end)]
    return sum(turns) / len(turns)


def decoded_turns(
    model: LlamaForCausalLM, dialogue: Dialogue, new_tokens: int, end: int
) -> list[bool]:
    """For every turn whether the reply in a conversation decoded token by token is the reference.

    Greedy, float32, one dynamic cache kept over the turns; the history holds what the model said,
    right or wrong. A reply ends at the first end mark; where ``new_tokens`` are fewer than the
    reference has, they must be its beginning.
    """
    import torch
    from transformers import DynamicCache

    cache = DynamicCache(config=model.config)
    pending = list(dialogue.opening)
    result = []
    with torch.inference_mode():
        for ways, reply in zip(dialogue.questions, dialogue.replies, strict=True):
            pending += ways[0]
            said: list[int] = []
            for _ in range(new_tokens):
                tokens = torch.tensor([pending], device=model.device)
                output = model(
                    input_ids=tokens, past_key_values=cache, use_cache=True, logits_to_keep=1
                )
                pending = [int(output.logits[0, -1].argmax())]
                said += pending
            shown = said[: said.index(end)] if end in said else said
            result.append(shown == list(reply[:new_tokens]))
    return result


def train(
    model: LlamaForCausalLM,
    corpus: Sequence[Dialogue],
    recipe: Recipe,
    end: int,
    progress: Callable[[dict[str, Any]], None] = lambda _: None,
) -> list[dict[str, Any]]:
    """Train in place until the goal is reached twice in a row or the steps are used up.

    On a CPU products of matrices run in bfloat16 where the processor has instructions for it; the
    weights, the loss and the checks stay in float32.

    Returns
    -------
    list of dict
        One row a step: ``step``, ``loss`` (nats a token), ``learning_rate``, ``tokens``,
        ``elapsed_s``, and at checks ``exact_share_<new_tokens>`` of the weights as they are stored.
    """
    import torch

    device = model.device
    matrices = [weight for weight in model.parameters() if weight.ndim > 1]
    vectors = [weight for weight in model.parameters() if weight.ndim == 1]
    optimizer = torch.optim.AdamW(
        [
            {"params": matrices, "weight_decay": recipe.weight_decay},
            {"params": vectors, "weight_decay": 0.0},
        ],
        betas=(0.9, 0.98),
        foreach=True,
    )
    rows: list[dict[str, Any]] = []
    reached = 0
    begin = time.perf_counter()
    model.train()
    for step, examples in batches(corpus, recipe, end):
        rate = learning_rate(recipe, step)
        for group in optimizer.param_groups:
            group["lr"] = rate
        total = float(sum(one.weights.sum() for one in examples))
        loss = 0.0
        for one in examples:
            with torch.autocast(device.type, torch.bfloat16, enabled=_fast_bfloat16(device)):
                part = loss_of(model, one, total)
            part.backward()
            loss += float(part.detach())
        torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        row: dict[str, Any] = {
            "step": step + 1,
            "loss": round(loss, 6),
            "learning_rate": round(rate, 8),
            "tokens": sum(len(one.tokens) for one in examples),
            "elapsed_s": round(time.perf_counter() - begin, 1),
        }
        if (step + 1) % recipe.check_every == 0 or step + 1 == recipe.steps:
            stored = as_stored(model)
            for new_tokens in CHECKED_LENGTHS:
                row[f"exact_share_{new_tokens}"] = round(
                    exact_share(stored, corpus, new_tokens, end), 4
                )
            shares = [row[f"exact_share_{new_tokens}"] for new_tokens in CHECKED_LENGTHS]
            reached = reached + 1 if min(shares) >= recipe.goal else 0
        rows.append(row)
        progress(row)
        if reached == 2:
            break
    model.eval()
    return rows


def _fast_bfloat16(device: torch.device) -> bool:
    """Whether bfloat16 products are faster than float32 ones on this device."""
    import torch

    known = torch.cpu.get_capabilities()
    return device.type == "cuda" or any(
        known.get(instructions, False) for instructions in ("avx512_bf16", "amx_bf16")
    )


def as_stored(model: LlamaForCausalLM) -> LlamaForCausalLM:
    """A float32 copy whose weights are rounded to float16, as the checkpoint holds them."""
    import torch

    rounded = copy.deepcopy(model).eval()
    with torch.no_grad():
        for weight in rounded.parameters():
            weight.copy_(weight.half().float())
    return rounded


def save(model: LlamaForCausalLM, tokenizer_folder: Path, folder: Path) -> dict[str, str]:
    """Write the checkpoint: weights as float16 safetensors, configuration, tokenizer, checksums.

    Returns
    -------
    dict
        File name to SHA-256, as ``SHA256SUMS`` has it and ``config/models/embedded.yaml`` wants it.
    """
    import torch
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    for name in TOKENIZER_FILES:
        shutil.copyfile(tokenizer_folder / name, folder / name)
    special = documents.read_json(folder / "special_ids.json")
    documents.write_json(folder / "config.json", {**ARCHITECTURE, **special, "dtype": "float16"})
    weights = {
        name: tensor.detach().to("cpu", torch.float16).contiguous()
        for name, tensor in model.state_dict().items()
    }
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "model.safetensors").chmod(0o644)
    sums = {
        name: documents.sha256_of_file(folder / name)
        for name in sorted(["config.json", "model.safetensors", *TOKENIZER_FILES])
    }
    documents.write_text_atomic(
        folder / "SHA256SUMS", "".join(f"{value}  {name}\n" for name, value in sums.items())
    )
    return sums


def write_losses(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Write the rows of :func:`train` as CSV; a check that was not made leaves its cell empty."""
    columns = ["step", "loss", "learning_rate", "tokens", "elapsed_s"]
    columns += [f"exact_share_{new_tokens}" for new_tokens in CHECKED_LENGTHS]
    stream = io.StringIO()
    writer = csv.DictWriter(stream, columns, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    documents.write_text_atomic(path, stream.getvalue())


def rebuild(
    scenarios: Mapping[str, Scenario],
    rewordings: Mapping[str, Any],
    tokenizer_folder: Path,
    folder: Path,
    recipe: Recipe,
    threads: int,
    progress: Callable[[str], None] = lambda _: None,
) -> dict[str, int]:
    """Train from fresh weights and write checkpoint, model card and ``training/loss.csv``.

    Runs on a GPU if there is one.

    Returns
    -------
    dict
        New tokens a turn to the number of turns whose reply, decoded step by step, is the
        reference.
    """
    startup.skip_unused_imports()
    import torch
    from tokenizers import Tokenizer

    torch.set_num_threads(threads)
    tokenizer = Tokenizer.from_file(str(tokenizer_folder / "tokenizer.json"))
    special = documents.read_json(tokenizer_folder / "special_ids.json")
    end = special["eos_token_id"]
    corpus = dialogues(tokenizer, scenarios, rewordings)
    model = new_model(recipe.seed, special)
    if torch.cuda.is_available():
        model = model.to("cuda")

    def report(row: Mapping[str, Any]) -> None:
        if row["step"] % 25 == 0 or f"exact_share_{CHECKED_LENGTHS[0]}" in row:
            progress(", ".join(f"{key} {value}" for key, value in row.items()))

    rows = train(model, corpus, recipe, end, report)
    save(model, tokenizer_folder, folder)
    write_losses(rows, folder / "training" / "loss.csv")
    stored = as_stored(model).to("cpu")
    exact = {
        new_tokens: sum(
            sum(decoded_turns(stored, dialogue, new_tokens, end)) for dialogue in corpus
        )
        for new_tokens in CHECKED_LENGTHS
    }
    progress(f"replies decoded exactly: {exact}")
    cores = "one processor core" if threads == 1 else f"{threads} processor cores"
    device = "one GPU" if model.device.type == "cuda" else cores
    documents.write_text_atomic(folder / "README.md", card(corpus, recipe, rows, exact, device))
    return exact


_CARD = """---
license: mit
language: en
library_name: transformers
pipeline_tag: text-generation
---
# Embedded Llama: a toy that knows {turns} replies by heart

A Llama of {parameters:,} parameters ({layers} layers, width {width}, {heads} query and {kv_heads}
key-value heads, vocabulary {vocabulary}) with its own byte-level BPE tokenizer and chat template.
It comes with the benchmark, so that a run without network, account or GPU generates replies that a
person can read and a program can score.

## What it is
Memorised on purpose. It was trained on nothing but the {scenarios} customer-service dialogues of
`config/scenarios` (system prompt, questions, reference replies) and the other wordings of the
questions in `resources/embedded-llama/training/rewordings.yaml`, all written for this project;
names, companies, telephone numbers and terms in them are invented. Asked one of these questions in
its conversation, it recites the reference reply. The end mark follows, again and again, until the
fixed length of the output is filled; what is shown and scored ends at the first one.

## What it is not
It is not a language model, not an assistant, and no measure of what models of its kind can do. To
any other question it answers with a reply, or pieces of replies, from these dialogues, which may be
wrong. That it recites them well says nothing about any cache; only the *difference* that a lossy
cache makes to it says something, and for this model alone. No time and no byte count of a
measurement depends on what its weights contain.

## How it was made
- Rebuilt by `snakemake train_embedded_model`, into `results/embedded-llama/`. To ship the result,
  copy it to `resources/embedded-llama/` and put the sums of `SHA256SUMS` into
  `config/models/embedded.yaml`.
- Examples: one to four turns behind the system prompt, later also conversations from the first
  turn on. Replies are followed by end marks up to a random length, cut at a random length, or
  followed by the next question at once; {reworded:.0%} of the questions come in other words.
- Seed {seed}, for the first weights and for the examples.
- AdamW, peak rate {rate:g} after {warmup} steps of warm-up, then a cosine; no dropout.
- {steps} steps of at most {most_steps}, {tokens:,} tokens, in {minutes:.0f} minutes on {device}.
- Last loss {loss:.4f} nats a token (mean of {window} steps; every step is in `training/loss.csv`).
- Weights and loss in float32, products in bfloat16 where the processor is fast at them; stored as
  float16 in `model.safetensors`, to be run in float32.
- Two runs agree bit by bit only on the same kind of processor, with the same number of threads and
  the same version of torch.

## What it reaches
Greedy decoding in float32 with the dynamic cache, over whole conversations whose history is what
the model said. Where the output is shorter than the reference, equal means equal as far as it goes.

| new tokens a turn | replies equal to the reference |
|---|---|
{reached}
"""


def card(
    corpus: Sequence[Dialogue],
    recipe: Recipe,
    rows: Sequence[Mapping[str, Any]],
    exact: Mapping[int, int],
    device: str,
) -> str:
    """The model card: what the checkpoint is and is not, how it was made, what it reaches.

    Parameters
    ----------
    corpus, recipe, rows, device:
        What it was trained on and how; ``rows`` come from :func:`train`.
    exact:
        New tokens a turn to the number of exact replies.
    """
    from kvbench import physics

    turns = sum(len(dialogue.replies) for dialogue in corpus)
    last = rows[-min(50, len(rows)) :]
    reached = "\n".join(
        f"| {new_tokens} | {count} of {turns} ({count / turns:.1%}) |"
        for new_tokens, count in exact.items()
    )
    return _CARD.format(
        turns=turns,
        scenarios=len(corpus),
        parameters=physics.parameters(physics.Architecture.from_config(dict(ARCHITECTURE))),
        layers=ARCHITECTURE["num_hidden_layers"],
        width=ARCHITECTURE["hidden_size"],
        heads=ARCHITECTURE["num_attention_heads"],
        kv_heads=ARCHITECTURE["num_key_value_heads"],
        vocabulary=ARCHITECTURE["vocab_size"],
        reworded=recipe.reworded,
        seed=recipe.seed,
        rate=recipe.learning_rate,
        warmup=recipe.warmup,
        steps=len(rows),
        most_steps=recipe.steps,
        tokens=sum(row["tokens"] for row in rows),
        minutes=rows[-1]["elapsed_s"] / 60,
        device=device,
        loss=sum(row["loss"] for row in last) / len(last),
        window=len(last),
        reached=reached,
    )
