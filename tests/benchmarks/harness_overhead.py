"""What the harness adds to what it measures: a cell against a bare `model.generate`, in rounds.

Both generate the same tokens from the same prompt with the same model in one process, and take turns the
way the cells of a block do, in an order drawn anew every round; the ratio is paired within rounds. Its
interval should lie within [0.99, 1.01].

    PYTHONPATH=workflow python tests/benchmarks/harness_overhead.py [--rounds 100]
"""

from __future__ import annotations

import argparse
import gc
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from kvbench import documents
from kvbench.analysis import paired
from kvbench.inputs import configuration, models, scenarios, tokens
from kvbench.measurement import conversation, lock, noise, processes, rounds
from kvbench.measurement.cell import Cell, Job

ROOT = Path(__file__).resolve().parents[2]
BARE, HARNESS = "bare generate", "harness"
#: The cell that is measured, as far as it generates.
CELL = {
    "measured": "dynamic",
    "device": "cpu",
    "dtype": "float32",
    "turns": None,
    "max_new_tokens": 150,
    "max_prompt_tokens": None,
    "warmup": 1,
    "memory": "separate",
    "slowdown": 0.0,
}


class Bare:
    """`model.generate` between two readings of the clock, with the garbage collector as it comes."""

    cpu_s, involuntary = 0.0, 0

    def __init__(self, model: Any, request: conversation.Request) -> None:
        import torch
        from transformers import GenerationConfig

        self._model = model
        self._ids = torch.tensor([request.prompt])
        self._mask = torch.ones_like(self._ids)
        self._settings = GenerationConfig(
            max_new_tokens=request.new_tokens,
            do_sample=False,
            pad_token_id=0,
            eos_token_id=None,
            use_cache=True,
            disable_compile=True,
        )

    def ask(self, command: str, *_: Any) -> dict[str, Any] | None:
        """Take a turn; there is nothing else to do."""
        if command != "turn":
            return None
        gc.enable()
        begin = time.perf_counter()
        self._model.generate(self._ids, attention_mask=self._mask, generation_config=self._settings)
        seconds = time.perf_counter() - begin
        gc.disable()
        return {"e2e_s": seconds, "disturbed": False}


def main() -> None:
    """Measure and print."""
    import torch

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=100)
    wanted = parser.parse_args().rounds
    with tempfile.TemporaryDirectory() as temporary:
        folder, prompts = Path(temporary) / "model", Path(temporary) / "prompts.json"
        models.prepare(configuration.read_models(ROOT / "config/models")["embedded"], folder, ROOT)
        scenario = scenarios.load(ROOT / "config/scenarios/symposium_turn.yaml")
        document = tokens.prompts(folder, scenario)
        documents.write_json(prompts, document)
        loaded = models.load(folder, "cpu", "float32")
        cell = Cell(Job(CELL, folder, prompts, torch.get_num_threads()), loaded)
        bare = Bare(loaded.model, conversation.script(document, CELL).requests[0])
        takers = {HARNESS: processes.Inside(cell), BARE: bare}
        with lock.machine(), torch.inference_mode():
            cell.open()
            noise.wait_for_quiet(30)
            cell.warm_up()
            bare.ask("turn")
            watch = rounds.Watch(list(takers.values()))
            played = [
                rounds.play(takers, rounds.drawn(list(takers), number), 1, watch)
                for number in range(wanted)
            ]
            cell.close()
    seconds: dict[str, list[float]] = {name: [] for name in takers}
    for slots in played:
        for slot in slots:
            seconds[slot["strategy"]].append(slot["e2e_s"])
    for name in (BARE, HARNESS):
        print(
            f"{name:14s} median {statistics.median(seconds[name]):.4f} s over {wanted} rounds "
            "(152 prompt + 150 new tokens)"
        )
    ratio = paired.ratio(
        [
            [
                paired.log_ratio([own], [plain])
                for own, plain in zip(seconds[HARNESS], seconds[BARE], strict=True)
            ]
        ],
        # Both work in this process.
        one_process=True,
    ).interval
    print(
        f"harness / bare {ratio.value:.4f}  95 % interval [{ratio.low:.4f}, {ratio.high:.4f}]  "
        f"(bound [0.99, 1.01]; torch threads: {torch.get_num_threads()})"
    )


if __name__ == "__main__":
    main()
