"""The same cell through optimum-benchmark 0.6.0, a bare `generate` loop, and ours, taking turns.

Same checkpoint, lengths, dtype, threads and libraries; the three alternate in fresh processes, so that
a drifting machine favours none. Agreement within 3 % on an idle machine is expected, or a difference to
explain. It runs on demand, without a network, in an environment of its own:

    python3 -m venv /tmp/others && /tmp/others/bin/pip install -r tests/benchmarks/others/requirements.txt
    PYTHONPATH=workflow /tmp/others/bin/python tests/benchmarks/others/compare.py [--rounds 5]

All times are seconds; each process gives medians over 10 timed calls. What the three call

- E2E: the whole call. Ours also makes the prompt's tensor and fetches the tokens (microseconds).
- prefill: ours is the time to first token: from handing over the prompt until the first token is chosen,
  so `generate`'s preparations and the choice are in it. optimum-benchmark starts at the same place and
  stops in a logits processor, before the choice. The bare loop times a call for one token, its end too.
- decode: E2E less prefill, hence 149 tokens and the end of the call; for the bare loop the difference
  of two medians.

Ours pauses Python's garbage collector in timed calls; bare and optimum-benchmark leave it on. Ours and
bare keep its hands off what the imports left behind (:func:`kvbench.measurement.startup.collector_paused`).
optimum-benchmark draws another prompt of the same length. Its warm-up (two whole calls, two of two
tokens) is forgotten before it times. What else must be equal is compared, not assumed (:func:`_facts`):
every process answers our prompt once, untimed, and another answer stops the comparison. So random
weights, sampling, another cache, or other threads cannot slip in.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[3]
PROMPT, NEW = 152, 150
ITERATIONS, WARMUP = 10, 2
THREADS = os.cpu_count() or 1
#: Our cell, as far as it generates.
CELL = {
    "measured": "dynamic",
    "device": "cpu",
    "dtype": "float32",
    "turns": None,
    "max_new_tokens": NEW,
    "max_prompt_tokens": None,
    "warmup": WARMUP,
    "memory": "separate",
    "slowdown": 0.0,
}
#: Share by which the others may differ from ours.
AGREEMENT = 0.03
TIMES = {"prefill_s": "prefill", "decode_s": "decode", "e2e_s": "E2E"}


def _loaded(folder: Path) -> Any:
    import torch
    from kvbench.inputs import models

    torch.set_num_threads(THREADS)
    return models.load(folder, "cpu", "float32")


def _prompt(folder: Path) -> list[int]:
    from kvbench import documents

    return documents.read_json(folder / "prompts.json")["steps"][0]["prompt"]


def _facts(model: Any, tokens: Sequence[int], cache: Any) -> dict[str, Any]:
    """What must be equal in all processes; ``tokens`` is the answer to our prompt."""
    import torch
    from torch._dynamo.utils import counters

    return {
        "answer": hashlib.sha256(repr(list(tokens)).encode()).hexdigest()[:12],
        "tokens": len(tokens),
        "cache": type(cache).__name__,
        "compiled graphs": counters["stats"].get("unique_graphs", 0),
        "dtype": ", ".join(sorted({str(weight.dtype) for weight in model.parameters()})),
        "attention": model.config._attn_implementation,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": importlib.metadata.version("transformers"),
    }


def ours(folder: Path) -> dict[str, Any]:
    """Our measurement core on the dynamic cache."""
    import torch
    from kvbench.measurement.cell import Cell, Job

    loaded = _loaded(folder)
    cell = Cell(Job(CELL, folder, folder / "prompts.json", THREADS), loaded)
    with torch.inference_mode():
        cell.open()
        cell.warm_up()
        samples = []
        for _ in range(ITERATIONS):
            cell.begin(1)
            samples.append(cell.turn(0))
        cell.close()
        answer = _session(loaded).generate(_prompt(folder), NEW, lambda: None)
    # The others cannot tell a disturbed call, so ours keeps them too.
    return {
        "prefill_s": statistics.median(sample["ttft_s"] for sample in samples),
        "decode_s": statistics.median(sample["e2e_s"] - sample["ttft_s"] for sample in samples),
        "e2e_s": statistics.median(sample["e2e_s"] for sample in samples),
        "facts": _facts(loaded.model, answer.tokens, answer.cache),
    }


def _session(loaded: Any) -> Any:
    from kvbench import strategies

    return strategies.get("dynamic").session(loaded, PROMPT + NEW)


def bare(folder: Path) -> dict[str, Any]:
    """`model.generate` between two readings of the clock; prefill is a call for one token."""
    import time

    import torch
    from transformers import GenerationConfig

    loaded = _loaded(folder)
    ids = torch.tensor([_prompt(folder)])
    mask = torch.ones_like(ids)

    def call(tokens: int, **more: Any) -> Any:
        settings = GenerationConfig(
            max_new_tokens=tokens, do_sample=False, pad_token_id=0, eos_token_id=None, **more
        )
        return loaded.model.generate(ids, attention_mask=mask, generation_config=settings)

    def timed(tokens: int) -> float:
        begin = time.perf_counter()
        output = call(tokens)
        seconds = time.perf_counter() - begin
        assert output.shape[1] == PROMPT + tokens
        return seconds

    with torch.inference_mode():
        for _ in range(WARMUP):
            timed(NEW)
        prefill = statistics.median(timed(1) for _ in range(ITERATIONS))
        e2e = statistics.median(timed(NEW) for _ in range(ITERATIONS))
        answer = call(NEW, return_dict_in_generate=True)
    tokens = answer.sequences[0, PROMPT:].tolist()
    return {
        "prefill_s": prefill,
        "decode_s": e2e - prefill,
        "e2e_s": e2e,
        "facts": _facts(loaded.model, tokens, answer.past_key_values),
    }


def _let_optimum_import() -> None:
    """Give transformers 5 the one name that optimum-benchmark 0.6.0 wants from transformers 4.

    ``SpecialTokensMixin`` became part of the tokenizers' base class; it is used for a type only.
    ``transformers.processing_utils`` loads the package anew under its name, so it is imported first:
    what was set before it would be lost.
    """
    import transformers.processing_utils

    transformers = sys.modules["transformers"]
    transformers.SpecialTokensMixin = transformers.PreTrainedTokenizerBase


def optimum(folder: Path) -> dict[str, Any]:
    """optimum-benchmark's inference scenario, its per-token tracker giving prefill and decode.

    Backend and scenario are run as ``Benchmark.launch`` runs them, but in this process, which is
    fresh anyway, and so that both can be asked afterwards what they did.
    """
    _let_optimum_import()
    import torch
    from optimum_benchmark import InferenceConfig, PyTorchConfig
    from optimum_benchmark.backends.pytorch.backend import PyTorchBackend
    from optimum_benchmark.scenarios.inference.scenario import InferenceScenario

    backend = PyTorchBackend(
        PyTorchConfig(
            model=str(folder),
            task="text-generation",
            library="transformers",
            device="cpu",
            torch_dtype="float32",
            no_weights=False,
            # 0.6.0 takes one for the other: this sets torch.set_num_threads. The facts tell.
            inter_op_num_threads=THREADS,
        )
    )
    scenario = InferenceScenario(
        InferenceConfig(
            latency=True,
            memory=False,
            duration=0,
            iterations=ITERATIONS,
            warmup_runs=WARMUP,
            input_shapes={"batch_size": 1, "sequence_length": PROMPT},
            generate_kwargs={"max_new_tokens": NEW, "min_new_tokens": NEW},
        )
    )
    report = scenario.run(backend)
    stamps = len(scenario.per_token_latency_tracker.per_token_events)
    assert stamps == report.generate.latency.count * NEW, f"{stamps} tokens were timed"
    assert scenario.inputs["input_ids"].shape == (1, PROMPT)
    ids = torch.tensor([_prompt(folder)])
    answer = backend.generate(
        {"input_ids": ids, "attention_mask": torch.ones_like(ids)},
        {**scenario.config.generate_kwargs, "return_dict_in_generate": True},
    )
    tokens = answer.sequences[0, PROMPT:].tolist()
    return {
        "prefill_s": statistics.median(report.prefill.latency.values),
        "decode_s": statistics.median(report.decode.latency.values),
        "e2e_s": statistics.median(report.generate.latency.values),
        "facts": _facts(backend.pretrained_model, tokens, answer.past_key_values),
    }


SUBJECTS = {"ours": ours, "bare generate": bare, "optimum-benchmark": optimum}


def _prepare(folder: Path) -> None:
    """Make the checkpoint and the prompt."""
    from kvbench import documents
    from kvbench.inputs import configuration, models, scenarios, tokens

    document = configuration.read_models(ROOT / "config/models")["embedded"]
    models.prepare(document, folder, ROOT)
    scenario = scenarios.load(ROOT / "config/scenarios/symposium_turn.yaml")
    documents.write_json(folder / "prompts.json", tokens.prompts(folder, scenario))
    # No reply ends early in any of the three. With an end token, min_new_tokens would make
    # optimum-benchmark mask it, and look for it, at every step.
    documents.write_json(folder / "generation_config.json", {"eos_token_id": None})


def _run(name: str, folder: Path) -> dict[str, Any]:
    """One subject in a fresh process."""
    done = subprocess.run(
        [sys.executable, __file__, "--child", name, "--folder", str(folder)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    if done.returncode or not lines:
        sys.exit(f"{name} failed:\n{done.stdout}\n{done.stderr}")
    return json.loads(lines[-1].removeprefix("RESULT "))


def _ratios(
    rows: Sequence[dict[str, Any]], base: Sequence[dict[str, Any]], key: str
) -> list[float]:
    """Round by round, a time over ours in the same round."""
    return [row[key] / own[key] for row, own in zip(rows, base, strict=True)]


def _show(found: dict[str, list[dict[str, Any]]]) -> None:
    """Print medians over rounds, the median ratios to ours, and the verdict."""
    print(f"{'':18s}" + "".join(f"{title + ' (s)':>13s}{'/ ours':>8s}" for title in TIMES.values()))
    furthest = dict.fromkeys(TIMES, 1.0)
    for name, rows in found.items():
        line = f"{name:18s}"
        for key in TIMES:
            ratio = statistics.median(_ratios(rows, found["ours"], key))
            furthest[key] = max(furthest[key], ratio, key=lambda value: abs(value - 1))
            line += f"{statistics.median(row[key] for row in rows):13.4f}{ratio:8.3f}"
        print(line)
    for name, rows in found.items():
        if name != "ours" and len(rows) > 1:
            by_round = ", ".join(f"{ratio:.3f}" for ratio in _ratios(rows, found["ours"], "e2e_s"))
            print(f"E2E / ours by round, {name}: {by_round}")
    verdicts = [
        f"{title} {'yes' if abs(furthest[key] - 1) <= AGREEMENT else 'NO'} ({furthest[key]:.3f})"
        for key, title in TIMES.items()
    ]
    print(f"Agreement within {AGREEMENT * 100:.0f} % (furthest ratio): " + ", ".join(verdicts))


def main() -> None:
    """Prepare the checkpoint, run the three in turn, print them side by side."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--child", choices=SUBJECTS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        print("RESULT " + json.dumps(SUBJECTS[given.child](given.folder)))
        return
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in SUBJECTS}
    facts: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "model"
        _prepare(folder)
        for number in range(given.rounds):
            for name in list(SUBJECTS) if number % 2 else list(SUBJECTS)[::-1]:
                row = _run(name, folder)
                facts = facts or row["facts"]
                if row["facts"] != facts:
                    sys.exit(f"not the same cell: {name} has {row['facts']}, not {facts}")
                found[name].append(row)
    print(f"{PROMPT} prompt + {NEW} new tokens, embedded model, {given.rounds} round(s) in turn")
    print("In all three: " + ", ".join(f"{key} {value}" for key, value in facts.items()))
    _show(found)


if __name__ == "__main__":
    main()
