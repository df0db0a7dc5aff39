"""The source benchmark's Python interface for notebooks, on this project's measurement core."""

from __future__ import annotations

import gc
import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from statistics import mean, median
from typing import TYPE_CHECKING, Any

from kvbench import layout, strategies
from kvbench.analysis import paired
from kvbench.errors import InputError, one_of
from kvbench.inputs import models, scenarios, tokens
from kvbench.measurement import conversation, lock, processes, rounds
from kvbench.measurement.cell import Cell, Job

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

#: What a strategy's entry holds: lists with one item per turn.
FIELDS = (
    "generation_times",
    "memory_usage",
    "tokens_per_second",
    "responses",
    "conversation_history",
    "input_tokens",
    "output_tokens",
    "total_tokens",
    "context_lengths",
)


def embedded_model() -> Path:
    """Folder of the model that ships with the project, in Hugging Face format: weights and tokenizer."""
    return layout.shipped("resources") / "embedded-llama"


class KVCacheBenchmark:
    """Compare KV-cache strategies on a conversation, from a notebook.

    The interface is that of the symposium's notebooks; the numbers are not. Conversations are warmed
    up, history is kept as token ids, output length is fixed, memory is the peak above the loaded
    model in a pass of its own, and nothing else may be measured on the machine meanwhile.

    Parameters
    ----------
    model:
        A causal language model, on its device. Its stop tokens are switched off.
    tokenizer:
        Its (fast) tokenizer.
    device:
        ``cpu`` or ``cuda``; a ``torch.device`` will do.
    model_name:
        Name for plots and tables.
    language:
        ``en`` or ``pt``: of the plot.
    verbose:
        Print what the source's class printed.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        device: Any = "cpu",
        model_name: str = "model",
        language: str = "en",
        verbose: bool = True,
    ) -> None:
        self.device = str(device).partition(":")[0]
        self.model_name = model_name
        self.language = language
        self.verbose = verbose
        self.tokenizer = tokenizer
        self.scenarios = scenarios.load_all(layout.shipped("config") / "scenarios")
        self._model = models.adopt(model, tokens.backend(tokenizer))

    def run_conversational_benchmark(
        self,
        cache_strategies: Iterable[str | None] = ("none", "dynamic", "static"),
        scenario: str = "insurance_claim_auto",
        num_turns: int = 15,
        max_new_tokens: int = 150,
        iterations: int = 1,
    ) -> dict[str, dict[str, list[Any]]]:
        """Hold the same conversation under each strategy, in turns: what is compared is measured together.

        Parameters
        ----------
        cache_strategies:
            Names from ``kvbench.strategies.names()``; None stands for ``none``.
        scenario:
            Id of a conversation in ``config/scenarios``.
        num_turns:
            Turns of it.
        max_new_tokens:
            Tokens per reply, exactly.
        iterations:
            Timed rounds after the warm-up, each in an order drawn anew; times are their medians.

        Returns
        -------
        dict
            Strategy to :data:`FIELDS`, each a list with one item per turn: seconds, MB above the
            loaded model (10**6 bytes), tokens/s, replies, dictionaries of ``user`` and
            ``assistant``, and counts
            of tokens: prompt, reply, both, and the context when the reply was complete.

        Raises
        ------
        InputError
            An unknown scenario or strategy (the message names the known ones), or a bad count.
        Unsupported
            A strategy cannot run on this device or with these libraries.
        """
        script, questions = self._script(scenario, num_turns, max_new_tokens)
        if iterations < 1:
            raise InputError(f"iterations is {iterations}; it must be at least 1")
        import torch

        names = [_named(name) for name in cache_strategies]
        with lock.machine(), torch.inference_mode():
            seconds = self._take_turns(names, script, iterations)
            # Memory afterwards, when the sessions of the others are closed.
            cells = {name: self._cell(name, script) for name in names}
            for cell in cells.values():
                cell.prepare()
                cell.measure_memory()
        results = {name: self._lists(cells[name], seconds[name], questions) for name in names}
        for name, result in results.items():
            self._tell(f"\nTesting {name.upper()} cache:")
            for turn in range(len(questions)):
                self._tell(_metrics(result, turn))
        return results

    def generate_with_cache_strategy(
        self, prompt: str, cache_strategy: str | None = "dynamic", max_new_tokens: int = 150
    ) -> dict[str, Any]:
        """Continue one prompt, taken as it is, under one strategy.

        Returns
        -------
        dict
            ``response``, ``generation_time`` (s, after one warm-up), ``memory_usage`` (MB above the
            loaded model, the peak), ``tokens_per_second``, ``input_tokens`` and ``output_tokens``.

        Raises
        ------
        InputError
            An unknown strategy, an empty prompt, or fewer than two new tokens.
        Unsupported
            The strategy cannot run on this device or with these libraries.
        """
        if max_new_tokens < 2:
            raise InputError(f"max_new_tokens is {max_new_tokens}; it must be at least 2")
        ids = self.tokenizer(prompt)["input_ids"]
        if not ids:
            raise InputError("the prompt is empty; give it a text")
        document = {"kind": "conversation", "first": ids, "next": []}
        script = conversation.script(document, {"max_new_tokens": max_new_tokens, "turns": 1})
        import torch

        name = _named(cache_strategy)
        with lock.machine(), torch.inference_mode():
            seconds = self._take_turns([name], script, 1)[name]
            cell = self._cell(name, script)
            cell.prepare()
            cell.measure_memory()
        lists = self._lists(cell, seconds, [prompt])
        return {
            "response": lists["responses"][0],
            "generation_time": lists["generation_times"][0],
            "memory_usage": lists["memory_usage"][0],
            "tokens_per_second": lists["tokens_per_second"][0],
            "input_tokens": lists["input_tokens"][0],
            "output_tokens": lists["output_tokens"][0],
        }

    def get_memory_usage(self) -> float:
        """Memory in use now, in MB (10**6 bytes): allocated on the GPU, resident on the CPU.

        The source takes it after a call and before, and reports the difference: what is left over.
        What a call needed is the peak, which ``run_conversational_benchmark`` reports.
        """
        if self.device == "cuda":
            import torch

            return torch.cuda.memory_allocated() / 1e6
        import psutil

        return psutil.Process().memory_info().rss / 1e6

    def clear_memory(self) -> None:
        """Let go of what nothing refers to any more, and of the GPU allocator's spare blocks."""
        gc.collect()
        if self.device == "cuda":
            import torch

            torch.cuda.empty_cache()

    def _tell(self, line: str) -> None:
        if self.verbose:
            print(line)

    def _script(
        self, name: str, turns: int, new_tokens: int
    ) -> tuple[conversation.Script, list[str]]:
        known = {key: s for key, s in self.scenarios.items() if s.kind == "conversation"}
        one_of("scenario", name, sorted(known))
        chosen = known[name]
        if not 1 <= turns <= chosen.length:
            raise InputError(f"num_turns is {turns}; {name} has 1 to {chosen.length} turns")
        if new_tokens < 2:
            raise InputError(f"max_new_tokens is {new_tokens}; it must be at least 2")
        document = {
            "kind": "conversation",
            **tokens.conversation_prompts(self.tokenizer, chosen),
        }
        cell = {"max_new_tokens": new_tokens, "turns": turns}
        return conversation.script(document, cell), [turn.user for turn in chosen.turns[:turns]]

    def _cell(self, strategy: str, script: conversation.Script) -> Cell:
        cell = {
            "device": self.device,
            "measured": strategy,
            "memory": "separate",
            "slowdown": 0.0,
            "warmup": 1,
        }
        import torch

        job = Job(cell, Path(), Path(), torch.get_num_threads())
        return Cell(job, self._model, script)

    def _take_turns(
        self, names: list[str], script: conversation.Script, iterations: int
    ) -> dict[str, list[list[float]]]:
        """Have the strategies take turns in this process; for each, the seconds of its turns."""
        turns = len(script.requests)
        found: dict[str, list[list[float]]] = {name: [[] for _ in range(turns)] for name in names}
        cells = {name: self._cell(name, script) for name in names}
        try:
            for cell in cells.values():
                cell.open()
                cell.warm_up()
            takers = {name: processes.Inside(cell) for name, cell in cells.items()}
            watch = rounds.Watch(list(takers.values()))
            for number in range(iterations):
                for slot in rounds.play(takers, rounds.drawn(names, number), turns, watch):
                    found[slot["strategy"]][slot["turn"]].append(slot["e2e_s"])
        finally:
            for cell in cells.values():
                cell.close()
        return found

    def _lists(
        self, cell: Cell, seconds: list[list[float]], questions: list[str]
    ) -> dict[str, list[Any]]:
        result: dict[str, list[Any]] = {field: [] for field in FIELDS}
        for question, turn, times in zip(questions, cell.known, seconds, strict=True):
            reply = self._model.decode(turn.replies[0])
            peak = turn.peak_memory_bytes
            result["generation_times"].append(median(times))
            result["memory_usage"].append(float("nan") if peak is None else peak / 1e6)
            result["tokens_per_second"].append(turn.new_tokens / median(times))
            result["responses"].append(reply)
            result["conversation_history"].append({"user": question, "assistant": reply})
            result["input_tokens"].append(turn.prompt_tokens)
            result["output_tokens"].append(turn.new_tokens)
            result["total_tokens"].append(turn.prompt_tokens + turn.new_tokens)
            result["context_lengths"].append(turn.prompt_tokens + turn.new_tokens)
        return result

    def analyze_results(
        self, results: Mapping[str, Mapping[str, list[Any]]]
    ) -> dict[str, dict[str, float]]:
        """Averages and totals per strategy.

        Returns
        -------
        dict
            Strategy to ``avg_generation_time`` and ``total_time`` (s), ``avg_memory_usage`` and
            ``max_memory_usage`` (MB), ``avg_tokens_per_second`` (all tokens over all time, the mean
            that suits a rate), ``total_tokens_generated``, ``success_rate`` (share of turns with
            output), and ``speedup_vs_none`` where ``none`` was run: the geometric mean over turns,
            as in the tables. Without an interval it is no verdict.
        """
        summary = {}
        for name, result in results.items():
            total = sum(result["generation_times"])
            new = sum(result["output_tokens"])
            summary[name] = {
                "avg_generation_time": mean(result["generation_times"]),
                "total_time": total,
                "avg_memory_usage": mean(result["memory_usage"]),
                "max_memory_usage": max(result["memory_usage"]),
                "avg_tokens_per_second": new / total,
                "total_tokens_generated": new,
                "success_rate": mean(count > 0 for count in result["output_tokens"]),
            }
        self._tell("\nBENCHMARK RESULTS")
        for name, result in results.items():
            for line in _told(name, result, summary[name]):
                self._tell(line)
        if "none" in summary:
            for name, entry in summary.items():
                sides = (results[one]["generation_times"] for one in ("none", name))
                entry["speedup_vs_none"] = math.exp(paired.log_ratio(*sides))
        return summary

    def resumo_plot(self, results: Mapping[str, Mapping[str, list[Any]]]) -> Figure:
        """Draw the source's three panels, generation time, memory and tokens/s, in the language."""
        import matplotlib.pyplot as plt

        from kvbench.figures import _language, style, symposium

        style.apply()
        figure, axes = plt.subplots(1, 3, figsize=(14, 4))
        values = {
            "e2e_s_median": {n: mean(r["generation_times"]) for n, r in results.items()},
            "peak_memory_mib": {n: mean(r["memory_usage"]) for n, r in results.items()},
            "output_tokens_per_s_median": {
                n: sum(r["output_tokens"]) / sum(r["generation_times"]) for n, r in results.items()
            },
        }
        for ax, (column, title, _, _) in zip(axes, symposium.PANELS, strict=True):
            bars = {name: symposium.Bar(value) for name, value in values[column].items()}
            symposium.panel(ax, title, bars)
        # A name is printed as it is: a dollar sign in it begins no mathematics.
        figure.suptitle(self.model_name, parse_math=False)
        _language.localise(figure, self.language)
        return figure


def _metrics(result: Mapping[str, list[Any]], turn: int) -> str:
    """The source's line on one turn."""
    return (
        f"Metrics: {result['generation_times'][turn]:.2f}s | "
        f"{result['tokens_per_second'][turn]:.1f} tok/s | "
        f"Input: {result['input_tokens'][turn]} | Output: {result['output_tokens'][turn]}"
    )


def _told(
    name: str, result: Mapping[str, list[Any]], summary: Mapping[str, float]
) -> Iterator[str]:
    """The source's lines on one strategy."""
    times = result["generation_times"]
    done = sum(count > 0 for count in result["output_tokens"])
    yield f"\n{name.upper()}:"
    yield f"  Time: avg {mean(times):.2f}s, min {min(times):.2f}s, max {max(times):.2f}s"
    yield f"  Speed: {summary['avg_tokens_per_second']:.1f} tok/s"
    yield f"  Tokens: {summary['total_tokens_generated']}"
    yield f"  Success: {summary['success_rate']:.0%} ({done}/{len(times)})"


def _named(name: str | None) -> str:
    """The id of a strategy that can share a model with others."""
    strategy = strategies.get(name or "none")
    if strategy.attention != "auto":
        raise InputError(
            f"{strategy.id}: here all strategies share one model and its attention; "
            "measure it in an experiment of the workflow"
        )
    return strategy.id
