"""What the harness adds to what it measures: our loop against a bare `model.generate`, alternating.

Both generate the same tokens from the same prompt with the same model in one process and take turns, so
that a drifting machine cannot favour one; each round gives one ratio, and the interval is over rounds. The
bound is 1 %.

    PYTHONPATH=workflow python tests/benchmarks/harness_overhead.py [--rounds 100]
"""

from __future__ import annotations

import argparse
import statistics as stdlib
import tempfile
import time
from pathlib import Path

from kvbench import strategies
from kvbench.analysis import statistics
from kvbench.inputs import configuration, models, scenarios, tokens
from kvbench.measurement import conversation, lock, noise

ROOT = Path(__file__).resolve().parents[2]


def main() -> None:
    """Measure and print."""
    import torch
    from transformers import GenerationConfig

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=100)
    rounds = parser.parse_args().rounds
    model_document = configuration.read_models(ROOT / "config/models")["embedded"]
    scenario = scenarios.load(ROOT / "config/scenarios/symposium_turn.yaml")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "model"
        models.prepare(model_document, folder, ROOT)
        loaded = models.load(folder, "cpu", "float32")
        document = tokens.prompts(folder, scenario)
    cell = {"max_prompt_tokens": None, "turns": None, "max_new_tokens": 150}
    script = conversation.script(document, cell)
    request = script.requests[0]
    ids = torch.tensor([request.prompt])
    mask = torch.ones_like(ids)
    settings = GenerationConfig(
        max_new_tokens=request.new_tokens,
        do_sample=False,
        pad_token_id=0,
        eos_token_id=None,
        use_cache=True,
        disable_compile=True,
    )
    session = strategies.get("dynamic").session(loaded, script.max_length)

    def bare() -> float:
        begin = time.perf_counter()
        loaded.model.generate(ids, attention_mask=mask, generation_config=settings)
        return time.perf_counter() - begin

    def ours() -> float:
        turns, _, _ = conversation.measure(
            session, script, "cpu", warmup=0, iterations=1, budget_s=1e9
        )
        return turns[0].samples[-1]["e2e_s"]

    with lock.machine(), torch.inference_mode():
        noise.wait_for_quiet(30)
        bare(), ours()
        pairs = [(bare(), ours()) if n % 2 else (ours(), bare())[::-1] for n in range(rounds)]
    ratio = statistics.median_interval([[own / plain for plain, own in pairs]])
    for name, column in (("bare generate", 0), ("harness", 1)):
        median = stdlib.median(pair[column] for pair in pairs)
        print(
            f"{name:14s} median {median:.4f} s over {rounds} rounds (152 prompt + 150 new tokens)"
        )
    print(
        f"harness / bare {ratio.value:.4f}  95 % interval [{ratio.low:.4f}, {ratio.high:.4f}]  "
        f"(bound 1.01; torch threads: {torch.get_num_threads()})"
    )


if __name__ == "__main__":
    main()
