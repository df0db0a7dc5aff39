"""What the harness adds to what it measures: a cell against a bare `model.generate`, in rounds.

Both generate the same tokens from the same prompt with the same model in one process, and take turns the
way the cells of a block do, in an order drawn anew every round; the ratio is paired within rounds, and a
round that another program disturbed does not count. Its interval should lie within [0.99, 1.01].

    PYTHONPATH=workflow python tests/benchmarks/harness_overhead.py [--rounds 600]
"""

from __future__ import annotations

import argparse
import gc
import logging
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import bounds
from kvbench import documents
from kvbench.analysis import paired
from kvbench.inputs import configuration, models, scenarios, tokens
from kvbench.measurement import conversation, lock, noise, processes, rounds
from kvbench.measurement.cell import Cell, Job

ROOT = Path(__file__).resolve().parents[2]
BARE, HARNESS = "bare generate", "harness"
LEAST, MOST = 0.99, 1.01
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

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=600)
    wanted = parser.parse_args().rounds
    if wanted < 1:
        parser.error("--rounds has to be at least 1")
    logging.basicConfig(level=logging.INFO, format="%(message)s")
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
    report(played, torch.get_num_threads())


def report(played: Sequence[Sequence[Mapping[str, Any]]], threads: int) -> None:
    """Print the times, the ratio and the verdict on the rounds, of which each is a list of slots."""
    whole = [
        {slot["strategy"]: slot["e2e_s"] for slot in slots}
        for slots in played
        if not any(slot["disturbed"] for slot in slots)
    ]
    asked = f"harness / bare within [{LEAST}, {MOST}]"
    print(
        f"{len(whole)} of {len(played)} rounds of 152 prompt + 150 new tokens were undisturbed; "
        f"torch threads: {threads}"
    )
    if not whole:
        print(bounds.line(bounds.CANNOT_TELL, asked, "no round was undisturbed"))
        return
    for name in (BARE, HARNESS):
        print(f"{name:14s} median {statistics.median(entry[name] for entry in whole):.4f} s")
    logs = [paired.log_ratio([entry[HARNESS]], [entry[BARE]]) for entry in whole]
    # Both work in this process.
    found = paired.ratio([logs], one_process=True)
    ends = found.interval
    enough = found.rounds >= paired.FEWEST_ROUNDS
    verdict = bounds.judge(ends.low, ends.high, LEAST, MOST) if enough else bounds.CANNOT_TELL
    told = (
        f"{ends.value:.4f} [{ends.low:.4f}, {ends.high:.4f}], smallest difference "
        f"{100 * found.smallest_difference:.1f} %"
    )
    print(bounds.line(verdict, asked, told))


if __name__ == "__main__":
    main()
