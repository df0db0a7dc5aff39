"""The same cell through optimum-benchmark 0.6.0, a bare `generate` loop, and ours, in rounds.

Four live processes, one for each and one to explain by, all loaded and warm, take turns call by call in
an order that is drawn anew every round; one of them works at a time. The times of one round are paired,
as those of a block's cells are, so that a drifting machine favours none. Their main threads share one
processor (:mod:`kvbench.measurement.placement`). Agreement within 3 % is asked for, or a difference to
explain. It runs on demand, without a network, in an environment of its own:

    python3 -m venv /tmp/others && /tmp/others/bin/pip install -r tests/benchmarks/others/requirements.txt
    PYTHONPATH=workflow /tmp/others/bin/python tests/benchmarks/others/compare.py [--rounds 100]

What two processes differ by stays with them however many rounds they have, so the rounds are shared
out to several generations of fresh processes; the ratio's interval knows what the generations
differ by. A round of a pair in which another program used the processor does not count for that pair.

What each clock spans, in one call of 152 prompt and 150 new tokens:

- E2E. Bare: from before `model.generate` until it has returned. optimum-benchmark: its own report of the
  call, from before its backend's `generate` until that has returned; it contains its stamps, one a token.
  Ours: from handing over the prompt's numbers until the reply's numbers are there, the tensors made and
  fetched in between, and one stamp a token.
- prefill. Ours is the time to first token: until the first token is chosen. optimum-benchmark begins at
  the same place and stops in a logits processor, before the choice. The bare loop has none.
- decode. E2E less prefill: 149 tokens, and the end of the call.

The fourth is the bare loop with a logits processor that looks at the clock once a token and hands the
scores on, as optimum-benchmark's does. If optimum-benchmark agrees with it, what that one takes beyond
ours is explained by the way it stamps.

Our own clock runs around optimum-benchmark's calls as well, inside its span; its report should be no
less, and not much more. Ours pauses Python's garbage collector in timed calls, the others leave it on;
what it took of the calls is printed. Ours and bare keep its hands off what the imports left behind
(:func:`kvbench.measurement.startup.collector_paused`). optimum-benchmark draws another prompt of the
same length. What else must be equal is compared, not assumed (:func:`_facts`): every process answers our
prompt once, untimed, and another answer stops the comparison. So random weights, sampling, another
cache, other threads or another processor cannot slip in.
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import importlib.metadata
import logging
import os
import socket
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[3]
sys.path[:0] = [str(ROOT / "workflow"), str(ROOT / "tests" / "benchmarks")]

import bounds  # noqa: E402
from kvbench.analysis import paired  # noqa: E402
from kvbench.measurement import lock, noise, placement, processes, rounds, startup  # noqa: E402
from kvbench.measurement.cell import Cell, Job  # noqa: E402

PROMPT, NEW = 152, 150
WARMUP = 2
THREADS = len(placement.processors()) or os.cpu_count() or 1
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
#: Generations of three processes, and the fewest rounds that each is worth starting for.
GENERATIONS, FEWEST_ROUNDS = 5, 10
OURS, BARE, OPTIMUM = "ours", "bare generate", "optimum-benchmark"
#: The bare loop with the stamps of another, and whose.
STAMPED = "bare, its stamps"
EXPLAINED = {OPTIMUM: STAMPED}

#: What is known of one call: seconds by the name of the time, and whether it was disturbed.
Times = Mapping[str, float | bool]


# ------------------------------------------------------------------ the subjects, in their processes


class Collector:
    """Adds up the seconds that Python's garbage collector takes."""

    def __init__(self) -> None:
        self.seconds = self._begin = 0.0
        gc.callbacks.append(self._told)

    def _told(self, phase: str, _: Mapping[str, int]) -> None:
        now = time.perf_counter()
        if phase == "start":
            self._begin = now
        else:
            self.seconds += now - self._begin


class Ours(Cell):
    """Our own cell, as a block measures it."""

    def __init__(self, folder: Path) -> None:
        super().__init__(Job(CELL, folder, folder / "prompts.json", THREADS))
        self._folder, self._collector = folder, Collector()

    def turn(self, index: int) -> dict[str, Any]:
        """Take one turn on our clock."""
        before = self._collector.seconds
        sample = super().turn(index)
        # The others cannot tell a turn that compiled, which the facts exclude.
        return {**_split(sample["e2e_s"], sample["ttft_s"], self._collector, before)}

    def facts(self) -> dict[str, Any]:
        """What must be equal in all processes."""
        assert self._model is not None
        session = self._strategy.session(self._model, PROMPT + NEW)
        answer = session.generate(_prompt(self._folder), NEW, lambda: None)
        return _facts(self._model.model, answer.tokens, answer.cache)

    def place(self) -> int | None:
        """The main thread's processor; None where nothing is bound."""
        assert self._places is not None
        self._places.check()
        return self._places.main


class _Other:
    """What the subjects that are not ours share: nothing to do at a round's beginning."""

    def begin(self, companions: int) -> None:
        """Leave the collector as it comes."""

    def settle(self) -> None:
        """Bind the threads as a cell's are bound; they exist, for the warm-up has been."""
        self._places = placement.Places(THREADS)

    def place(self) -> int | None:
        """The main thread's processor; None where nothing is bound, or no longer."""
        self._places.check()
        return self._places.main


class Bare(_Other):
    """`model.generate` between two readings of the clock."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._collector = folder, Collector()

    def open(self) -> None:
        """Load the model as a cell does."""
        with startup.collector_paused():
            import torch
            from kvbench.inputs import models

            torch.set_num_threads(THREADS)
            self._model = models.load(self._folder, "cpu", "float32").model
        self._ids = torch.tensor([_prompt(self._folder)])
        self._mask = torch.ones_like(self._ids)
        self._settings = self._configured()

    def warm_up(self) -> None:
        """Call it untimed."""
        for _ in range(WARMUP):
            self._generate(self._settings)

    def turn(self, _: int) -> dict[str, Any]:
        """Call it on the clock."""
        before, begin = self._collector.seconds, time.perf_counter()
        output = self._generate(self._settings)
        seconds = time.perf_counter() - begin
        assert output.shape[1] == PROMPT + NEW
        return {"e2e_s": seconds, **_disturbance(self._collector, before)}

    def facts(self) -> dict[str, Any]:
        """What must be equal in all processes."""
        answer = self._generate(self._configured(return_dict_in_generate=True))
        tokens = answer.sequences[0, PROMPT:].tolist()
        return _facts(self._model, tokens, answer.past_key_values)

    @staticmethod
    def _configured(**more: Any) -> Any:
        from transformers import GenerationConfig

        return GenerationConfig(
            max_new_tokens=NEW, do_sample=False, pad_token_id=0, eos_token_id=None, **more
        )

    def _generate(self, settings: Any, **more: Any) -> Any:
        return self._model.generate(
            self._ids, attention_mask=self._mask, generation_config=settings, **more
        )


class Look:
    """A logits processor that looks at the clock and hands the scores on.

    An object of a class, as optimum-benchmark's is: the library asks for the signature of a processor's
    call at every token, which takes several times as long of a function.
    """

    def __init__(self) -> None:
        self.stamps: list[float] = []

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        self.stamps.append(time.perf_counter())
        return scores


class Stamped(Bare):
    """The bare loop with a logits processor that looks at the clock."""

    def _generate(self, settings: Any, **more: Any) -> Any:
        from transformers import LogitsProcessorList

        look = Look()
        answer = super()._generate(settings, logits_processor=LogitsProcessorList([look]), **more)
        assert len(look.stamps) == NEW, f"{len(look.stamps)} tokens were stamped"
        return answer


class Optimum(_Other):
    """optimum-benchmark's inference scenario on its PyTorch backend; its tracker gives the times.

    Backend and scenario are run as ``Benchmark.launch`` runs them, but in this process. The scenario
    measures one call whenever it is asked to, and its own report of that call is what counts.
    """

    def __init__(self, folder: Path) -> None:
        self._folder, self._collector = folder, Collector()
        self._wall_s = 0.0

    def open(self) -> None:
        """Make backend and scenario; the model is loaded by the latter."""
        _let_optimum_import()
        from optimum_benchmark import InferenceConfig, PyTorchConfig
        from optimum_benchmark.backends.pytorch.backend import PyTorchBackend
        from optimum_benchmark.scenarios.inference.scenario import InferenceScenario

        self._backend = PyTorchBackend(
            PyTorchConfig(
                model=str(self._folder),
                task="text-generation",
                library="transformers",
                device="cpu",
                torch_dtype="float32",
                no_weights=False,
                # 0.6.0 takes one for the other: this sets torch.set_num_threads. The facts tell.
                inter_op_num_threads=THREADS,
            )
        )
        self._scenario = InferenceScenario(
            InferenceConfig(
                latency=True,
                memory=False,
                duration=0,
                iterations=1,
                warmup_runs=WARMUP,
                input_shapes={"batch_size": 1, "sequence_length": PROMPT},
                generate_kwargs={"max_new_tokens": NEW, "min_new_tokens": NEW},
            )
        )

    def warm_up(self) -> None:
        """Run the scenario as a whole: it loads, makes the prompt, warms up and times a first call."""
        self._scenario.run(self._backend)
        assert self._scenario.inputs["input_ids"].shape == (1, PROMPT)
        generate = self._backend.generate

        def clocked(*given: Any, **named: Any) -> Any:
            begin = time.perf_counter()
            answer = generate(*given, **named)
            self._wall_s = time.perf_counter() - begin
            return answer

        self._backend.generate = clocked

    def turn(self, _: int) -> dict[str, Any]:
        """Have it measure one call, and read its report."""
        before = self._collector.seconds
        self._scenario.run_per_token_text_generation_latency_tracking()
        report = self._scenario.report
        stamps = len(self._scenario.per_token_latency_tracker.per_token_events)
        assert stamps == NEW, f"{stamps} tokens were timed"
        (e2e_s,), (prefill_s,) = report.generate.latency.values, report.prefill.latency.values
        found = _split(e2e_s, prefill_s, self._collector, before)
        return {**found, "decode_s": report.decode.latency.values[0], "wall_s": self._wall_s}

    def facts(self) -> dict[str, Any]:
        """What must be equal in all processes."""
        import torch

        ids = torch.tensor([_prompt(self._folder)])
        answer = self._backend.generate(
            {"input_ids": ids, "attention_mask": torch.ones_like(ids)},
            {**self._scenario.config.generate_kwargs, "return_dict_in_generate": True},
        )
        tokens = answer.sequences[0, PROMPT:].tolist()
        return _facts(self._backend.pretrained_model, tokens, answer.past_key_values)


SUBJECTS: dict[str, Callable[[Path], Any]] = {
    OURS: Ours,
    BARE: Bare,
    OPTIMUM: Optimum,
    STAMPED: Stamped,
}


def _split(
    e2e_s: float, prefill_s: float, collector: Collector, before: float
) -> dict[str, float | bool]:
    """One call's times."""
    return {
        "e2e_s": e2e_s,
        "prefill_s": prefill_s,
        "decode_s": e2e_s - prefill_s,
        **_disturbance(collector, before),
    }


def _disturbance(collector: Collector, before: float) -> dict[str, float | bool]:
    """What the garbage collector took since; whether others disturbed is seen from outside."""
    return {"collector_s": collector.seconds - before, "disturbed": False}


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


def _let_optimum_import() -> None:
    """Give transformers 5 the one name that optimum-benchmark 0.6.0 wants from transformers 4.

    ``SpecialTokensMixin`` became part of the tokenizers' base class; it is used for a type only.
    ``transformers.processing_utils`` loads the package anew under its name, so it is imported first:
    what was set before it would be lost.
    """
    import transformers.processing_utils
    from transformers.utils import logging as told

    told.disable_progress_bar()
    transformers = sys.modules["transformers"]
    transformers.SpecialTokensMixin = transformers.PreTrainedTokenizerBase


def _serve(name: str, folder: Path, connection: int, parent: int) -> None:
    """What a subject's process runs: it answers as a cell's process does, until the parent ends."""
    processes._end_with(parent)
    processes._serve(Connection(connection), SUBJECTS[name](folder))


# -------------------------------------------------------------------------- the rounds, from outside


@dataclass(frozen=True)
class Played:
    """One generation.

    Attributes
    ----------
    facts:
        What was equal in all processes when they began.
    rounds:
        Of each round the times of every subject, and whether another program disturbed it.
    undone:
        Subjects whose threads were no longer bound at the end, because another one had come.
    """

    facts: Mapping[str, Any]
    rounds: Sequence[Mapping[str, Times]]
    undone: Sequence[str] = ()


@contextmanager
def _alive(folder: Path) -> Iterator[dict[str, processes.Worker]]:
    """One fresh process for each subject; all are gone at the end."""
    workers: dict[str, processes.Worker] = {}
    try:
        for name in SUBJECTS:
            here, there = socket.socketpair()
            os.set_inheritable(there.fileno(), True)
            child = (
                *("--child", name, "--folder", str(folder)),
                *("--connection", str(there.fileno()), "--parent", str(os.getpid())),
            )
            pid = os.posix_spawn(
                sys.executable,
                [sys.executable, __file__, *child],
                {**os.environ, "HF_HUB_OFFLINE": "1"},
            )
            there.close()
            workers[name] = processes.Worker(pid, Connection(here.detach()), processes.FRESH)
        yield workers
    finally:
        for worker in workers.values():
            worker.end()


def _each(workers: Mapping[str, processes.Worker], command: str) -> dict[str, Any]:
    """What each subject answers, one after the other."""
    found = {}
    for name, worker in workers.items():
        try:
            found[name] = worker.ask(command)
        except processes.Ended as ended:
            sys.exit(f"{name} failed: {ended.failure.reason}")
    return found


def _generation(folder: Path, number: int, count: int) -> Played:
    """Start all, see that they are about the same cell, and play."""
    with _alive(folder) as workers:
        _each(workers, "open")
        _each(workers, "warm_up")
        _each(workers, "settle")
        found = _each(workers, "facts")
        places = _each(workers, "place")
        facts = {name: {**found[name], "main thread on": places[name]} for name in workers}
        for name, theirs in facts.items():
            if theirs != facts[OURS]:
                sys.exit(f"not the same cell: {name} has {theirs}, ours {facts[OURS]}")
        noise.wait_for_quiet(30)
        watch = rounds.Watch(list(workers.values()))
        played = []
        for index in range(count):
            order = rounds.drawn(list(workers), number, index)
            slots = rounds.play(workers, order, 1, watch)
            played.append({slot["strategy"]: slot for slot in slots})
        undone = [name for name, now in _each(workers, "place").items() if now != places[name]]
    return Played(facts[OURS], played, undone)


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


# -------------------------------------------------------------------------------------- what is said


def compare(
    played: Sequence[Played], name: str, key: str, base: str = OURS
) -> paired.Paired | None:
    """One subject's time over another's, paired within rounds; None where each was disturbed."""
    logs = [
        [
            paired.log_ratio([entry[name][key]], [entry[base][key]])
            for entry in one.rounds
            if not entry[name]["disturbed"] and not entry[base]["disturbed"]
        ]
        for one in played
    ]
    return paired.ratio(logs) if any(logs) else None


def agreement(found: paired.Paired | None) -> str:
    """Whether a subject agrees with ours, as far as the rounds say."""
    if found is None or found.rounds < paired.FEWEST_ROUNDS:
        return bounds.CANNOT_TELL
    ends = found.interval
    return bounds.judge(ends.low, ends.high, 1 / (1 + AGREEMENT), 1 + AGREEMENT)


def _shown(found: paired.Paired | None, base: str = OURS) -> str:
    if found is None:
        return "every round was disturbed"
    ends = found.interval
    return (
        f"{found.value:.4f} [{ends.low:.4f}, {ends.high:.4f}] of {base}, smallest difference "
        f"{100 * found.smallest_difference:.1f} %, {found.rounds} rounds"
    )


_WORDS = {
    bounds.MET: f"agree within {100 * AGREEMENT:.0f} %",
    bounds.NOT_MET: "differ",
    bounds.CANNOT_TELL: "not enough",
}


def report(played: Sequence[Played]) -> list[str]:
    """The lines on all rounds; the last one is the verdict on the whole call."""
    entries = [entry for one in played for entry in one.rounds]
    clean = sum(not any(call["disturbed"] for call in entry.values()) for entry in entries)
    lines = [f"{clean} of {len(entries)} rounds were undisturbed; medians are those of all rounds"]
    verdicts: dict[str, tuple[str, str]] = {}
    for key, title in {"e2e_s": "E2E", "prefill_s": "prefill", "decode_s": "decode"}.items():
        for name in SUBJECTS:
            if key not in entries[0][name]:
                continue
            seconds = [entry[name][key] for entry in entries]
            text = f"{title:8s}{name:18s} median {statistics.median(seconds):.4f} s"
            if name != OURS:
                found = compare(played, name, key)
                verdict = agreement(found)
                text += f", {_shown(found)}: {_WORDS[verdict]}"
                if name not in EXPLAINED.values():
                    verdicts.setdefault(name, (verdict, _shown(found)))
            lines.append(text)
    for name, base in EXPLAINED.items():
        found = compare(played, name, "e2e_s", base)
        told = _WORDS[agreement(found)]
        lines.append(
            f"E2E of {name} over the bare loop with its stamps: {_shown(found, base)}: {told}"
        )
    for name in sorted({name for one in played for name in one.undone}):
        lines.append(f"not bound to the end, for another thread had come: {name}")
    shares = [entry[OPTIMUM]["wall_s"] / entry[OPTIMUM]["e2e_s"] for entry in entries]
    lines.append(
        f"our clock around optimum-benchmark's calls: {statistics.median(shares):.5f} of what it "
        f"reports (from {min(shares):.5f} to {max(shares):.5f})"
    )
    for name in SUBJECTS:
        took = sum(entry[name]["collector_s"] for entry in entries)
        share = took / sum(entry[name]["e2e_s"] for entry in entries)
        lines.append(f"the garbage collector took {100 * share:.2f} % of the calls: {name}")
    lines.append(verdict_line(verdicts))
    return lines


def verdict_line(verdicts: Mapping[str, tuple[str, str]]) -> str:
    """The last line: one subject that differs is enough, and all have to agree."""
    found = {verdict for verdict, _ in verdicts.values()}
    everybody = len(verdicts) == len(SUBJECTS) - 1 - len(EXPLAINED)
    if bounds.NOT_MET in found:
        verdict = bounds.NOT_MET
    else:
        verdict = bounds.MET if everybody and found == {bounds.MET} else bounds.CANNOT_TELL
    which = [f"{name} {text}" for name, (one, text) in verdicts.items() if one == verdict]
    told = _WORDS[verdict] + (": " if which else "") + "; ".join(which)
    return bounds.line(verdict, f"E2E within {100 * AGREEMENT:.0f} % of ours", told)


def main() -> None:
    """Prepare the checkpoint, let all play, and print them side by side."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=100, help="of all generations together")
    parser.add_argument(
        "--generations", type=int, default=GENERATIONS, help="of fresh processes, at most"
    )
    parser.add_argument("--child", choices=SUBJECTS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--connection", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--parent", type=int, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        _serve(given.child, given.folder, given.connection, given.parent)
        return
    if given.rounds < 1 or given.generations < 1:
        parser.error("--rounds and --generations have to be at least 1")
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        importlib.metadata.version("optimum-benchmark")
    except importlib.metadata.PackageNotFoundError:
        sys.exit(
            "compare: optimum-benchmark is not installed here; "
            "pip install -r tests/benchmarks/others/requirements.txt in an environment of its own"
        )
    generations = max(1, min(given.generations, given.rounds // FEWEST_ROUNDS))
    share, more = divmod(given.rounds, generations)
    played = []
    with tempfile.TemporaryDirectory() as temporary, processes.terminable(), lock.machine():
        folder = Path(temporary) / "model"
        _prepare(folder)
        for number in range(generations):
            played.append(_generation(folder, number, share + (number < more)))
            print(
                f"generation {number + 1} of {generations}: {len(played[-1].rounds)} rounds",
                file=sys.stderr,
            )
    print(
        f"{PROMPT} prompt + {NEW} new tokens, embedded model, {given.rounds} rounds of four live "
        f"processes, {generations} generation(s) of them"
    )
    print(
        "In all of them: " + ", ".join(f"{key} {value}" for key, value in played[0].facts.items())
    )
    print("\n".join(report(played)))


if __name__ == "__main__":
    main()
