"""The same cell through optimum-benchmark 0.6.0, a bare `generate` loop, and ours, taking turns.

Same checkpoint, lengths, dtype and threads; the three alternate in fresh processes, so that a drifting
machine favours none. Agreement within 3 % on an idle machine is expected, or a difference to explain.
It runs on demand, in an environment of its own:

    python -m venv /tmp/others && /tmp/others/bin/pip install -r tests/benchmarks/others/requirements.txt
    PYTHONPATH=workflow /tmp/others/bin/python tests/benchmarks/others/compare.py [--rounds 5]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
PROMPT, NEW = 152, 150
ITERATIONS = 10


def _loaded(folder: Path):
    import torch
    from kvbench import models

    torch.set_num_threads(os.cpu_count() or 1)
    return models.load(folder, "cpu", "float32")


def ours(folder: Path) -> dict[str, float]:
    """Our measurement core on the dynamic cache."""
    import torch
    from kvbench import documents, strategies
    from kvbench.measurement import conversation

    loaded = _loaded(folder)
    cell = {"max_prompt_tokens": None, "turns": None, "max_new_tokens": NEW}
    script = conversation.script(documents.read_json(folder / "prompts.json"), cell)
    session = strategies.get("dynamic").session(loaded, script.max_length)
    with torch.inference_mode():
        turns, _, _ = conversation.measure(
            session, script, "cpu", warmup=2, iterations=ITERATIONS, budget_s=1e9
        )
    samples = turns[0].samples
    return {
        "prefill_s": statistics.median(sample["ttft_s"] for sample in samples),
        "e2e_s": statistics.median(sample["e2e_s"] for sample in samples),
    }


def bare(folder: Path) -> dict[str, float]:
    """`model.generate` between two readings of the clock; prefill is a call for one token."""
    import time

    import torch
    from kvbench import documents
    from transformers import GenerationConfig

    loaded = _loaded(folder)
    ids = torch.tensor([documents.read_json(folder / "prompts.json")["steps"][0]["prompt"]])
    mask = torch.ones_like(ids)

    def timed(tokens: int) -> float:
        settings = GenerationConfig(
            max_new_tokens=tokens, do_sample=False, pad_token_id=0, eos_token_id=None
        )
        begin = time.perf_counter()
        loaded.model.generate(ids, attention_mask=mask, generation_config=settings)
        return time.perf_counter() - begin

    with torch.inference_mode():
        timed(NEW), timed(NEW)
        return {
            "prefill_s": statistics.median(timed(1) for _ in range(ITERATIONS)),
            "e2e_s": statistics.median(timed(NEW) for _ in range(ITERATIONS)),
        }


def optimum(folder: Path) -> dict[str, float]:
    """optimum-benchmark's inference scenario, its per-token tracker giving prefill and decode."""
    import transformers

    # 0.6.0 was written for transformers 4 and imports a class that is now part of another.
    transformers.SpecialTokensMixin = transformers.PreTrainedTokenizerBase
    from optimum_benchmark import Benchmark, BenchmarkConfig, InferenceConfig, PyTorchConfig
    from optimum_benchmark.launchers.inline.config import InlineConfig

    report = Benchmark.launch(
        BenchmarkConfig(
            name="comparison",
            launcher=InlineConfig(),
            scenario=InferenceConfig(
                latency=True,
                memory=False,
                duration=0,
                iterations=ITERATIONS,
                warmup_runs=2,
                input_shapes={"batch_size": 1, "sequence_length": PROMPT},
                generate_kwargs={"max_new_tokens": NEW, "min_new_tokens": NEW},
            ),
            backend=PyTorchConfig(
                model=str(folder),
                processor=str(folder),
                task="text-generation",
                library="transformers",
                device="cpu",
                torch_dtype="float32",
                inter_op_num_threads=1,
                intra_op_num_threads=os.cpu_count(),
            ),
        )
    )
    prefill = statistics.median(report.prefill.latency.values)
    return {
        "prefill_s": prefill,
        "e2e_s": prefill + statistics.median(report.decode.latency.values),
    }


SUBJECTS = {"ours": ours, "bare generate": bare, "optimum-benchmark": optimum}


def main() -> None:
    """Prepare the checkpoint, run the three in turn, print them side by side."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--child", choices=SUBJECTS)
    parser.add_argument("--folder", type=Path)
    given = parser.parse_args()
    if given.child:
        print("RESULT " + json.dumps(SUBJECTS[given.child](given.folder)))
        return
    from kvbench import configuration, documents, models, scenarios

    found: dict[str, list[dict[str, float]]] = {name: [] for name in SUBJECTS}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "model"
        document = configuration.read_models(ROOT / "config/models")["embedded"]
        models.prepare(document, folder, ROOT)
        scenario = scenarios.load(ROOT / "config/scenarios/symposium_turn.yaml")
        documents.write_json(folder / "prompts.json", models.prompts(folder, scenario))
        for number in range(given.rounds):
            for name in list(SUBJECTS) if number % 2 else list(SUBJECTS)[::-1]:
                done = subprocess.run(
                    [sys.executable, __file__, "--child", name, "--folder", str(folder)],
                    capture_output=True,
                    text=True,
                    check=False,
                )
                lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
                if not lines:
                    sys.exit(f"{name} failed:\n{done.stdout}\n{done.stderr}")
                found[name].append(json.loads(lines[0].removeprefix("RESULT ")))
    print(f"{PROMPT} prompt + {NEW} new tokens, embedded model, float32, {given.rounds} rounds")
    print(f"{'':20s}{'prefill':>12s}{'decode':>12s}{'E2E':>12s}{'E2E / ours':>12s}")
    base = statistics.median(row["e2e_s"] for row in found["ours"])
    for name, rows in found.items():
        prefill = statistics.median(row["prefill_s"] for row in rows)
        e2e = statistics.median(row["e2e_s"] for row in rows)
        print(f"{name:20s}{prefill:10.4f} s{e2e - prefill:10.4f} s{e2e:10.4f} s{e2e / base:12.3f}")


if __name__ == "__main__":
    main()
