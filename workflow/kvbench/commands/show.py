"""``kvbench show``: one record as a card that a person can read."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

NAME = "show"

#: How a block's cells lived, in words.
_PROCESSES = {
    "forked": "processes forked from one",
    "fresh": "fresh processes",
    "one": "one process",
}
_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")


def run(
    record: Annotated[
        Path, typer.Argument(help="A record: results/cells/**/*.json, or a recorded one.")
    ],
) -> None:
    """Show one record: what was measured, where, how it ended, and every turn's numbers."""
    from kvbench import commands, records

    found = commands.record(record)
    console = commands.console()
    if found["schema"] == records.KV_SCHEMA:
        _show_kv(console, record, found)
    else:
        _show_app(console, record, found)


def _show_kv(console: Any, path: Path, record: Mapping[str, Any]) -> None:
    from rich.table import Table

    cell = record["cell"]
    _facts(
        console,
        path,
        record,
        f"{cell['strategy']} in {cell['scenario']} with {cell['model']}",
        _kv_facts(path, record),
    )
    if not record["turns"]:
        return
    table = Table(
        title="turns (medians of what counts; bytes of the KV cache held and predicted, and the peak)",
        title_justify="left",
        box=None,
        pad_edge=False,
        # Ten columns on a line of eighty.
        padding=(0, 1, 0, 0),
    )
    titles = (
        "turn",
        "prompt",
        "new",
        "reused",
        "E2E (s)",
        "TTFT (s)",
        "tokens/s",
        "held",
        "predicted",
        "peak",
    )
    for title in titles:
        table.add_column(title, justify="right", no_wrap=True)
    for turn in record["turns"]:
        e2e, ttft = (_median(turn, name) for name in ("e2e_s", "ttft_s"))
        table.add_row(
            *(str(turn[name]) for name in ("turn", "prompt_tokens", "new_tokens", "reused_tokens")),
            _number(e2e),
            _number(ttft),
            _number(turn["new_tokens"] / e2e if e2e else math.nan),
            *(size(turn[name]) for name in ("kv_bytes", "kv_bytes_predicted", "peak_memory_bytes")),
        )
    console.print(table)
    console.print()
    for turn in record["turns"][:1]:
        console.print(f"first reply: {' '.join(turn['response'].split())[:300]}", markup=False)


def _kv_facts(path: Path, record: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    info, noise, block = record["strategy_info"], record["noise"], record.get("block")
    parts = ["exact" if info["exact"] else "lossy"]
    parts += ["compiled"] if info["compiled"] else []
    parts += [f"{key} {value}" for key, value in info["options"].items()]
    yield "strategy", ", ".join(parts)
    if noise.get("samples"):
        yield "disturbed", f"{noise['disturbed_samples']} of {noise['samples']} samples"
    if block is None:
        yield "compared", "measured alone, in its own time: it has no ratio that counts"
        return
    members = ", ".join(block["members"])
    how = _PROCESSES.get(block["processes"], block["processes"])
    ended = f"; ended by {block['stopped']}" if block["stopped"] else ""
    yield "block", f"{block['rounds']} rounds of {members}{ended}; {how}"
    if since := (block.get("rested") or {}).get(record["cell"]["strategy"]):
        yield "rested", f"from round {since + 1} on, known well enough"
    yield from _ratios(path, record)


def _ratios(path: Path, record: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Paired ratios to the reference, its control and the uncached cell, from records beside this."""
    from kvbench import commands
    from kvbench.analysis import comparing, metrics
    from kvbench.records.identity import CONTROL
    from kvbench.strategies import REFERENCE

    own = metrics.repeats(record)
    others = {}
    for name in (REFERENCE, CONTROL, "none"):
        found = record if name == record["cell"]["strategy"] else commands.beside(path, name)
        if found is not None and (found.get("block") or {}).get("id") == own.block:
            others[name] = found
    twice = [[others[name]] if name in others else [] for name in (REFERENCE, CONTROL)]
    for name, other in others.items():
        if other is record:
            continue
        compared = metrics.compare([own], [metrics.repeats(other)])
        low, high = compared.interval.low, compared.interval.high
        ends = "one run"
        if not math.isnan(low):
            ends = (
                f"[{low:.3f}, {high:.3f}] in {compared.rounds} rounds; would have found "
                f"{100 * compared.smallest_difference:.1f} %"
            )
        why = comparing.why_not(compared, *twice)
        yield (
            f"time over {name}",
            f"{compared.value:.3f} {ends}{f'; no verdict: {why}' if why else ''}",
        )


def _show_app(console: Any, path: Path, record: Mapping[str, Any]) -> None:
    from rich.table import Table
    from rich.text import Text

    cell = record["cell"]
    factors = ", ".join(f"{key} {value}" for key, value in sorted(cell["factors"].items()))
    _facts(
        console,
        path,
        record,
        f"{cell['id']} of the study {cell['study']}",
        iter([("factors", factors)]),
    )
    for number, row in enumerate(record["rows"], start=1):
        table = Table(
            title=f"row {number}", title_justify="left", box=None, show_header=False, pad_edge=False
        )
        for key, value in row.items():
            shown = _number(value) if isinstance(value, float) else str(value)
            table.add_row(Text(key), Text(shown))
        console.print(table)
        console.print()


def _facts(
    console: Any, path: Path, record: Mapping[str, Any], title: str, more: Iterator[tuple[str, str]]
) -> None:
    """The head of the card: what is known of every record."""
    from rich.table import Table
    from rich.text import Text

    environment, cell = record["environment"], record["cell"]
    gpu = environment.get("gpu")
    machine = gpu.get("name") if isinstance(gpu, Mapping) else gpu
    colours = {"ok": "green", "unsupported": "yellow"}
    table = Table(
        title=title,
        title_justify="left",
        title_style="bold",
        box=None,
        show_header=False,
        pad_edge=False,
    )
    table.add_column(no_wrap=True, style="dim")
    table.add_column(overflow="fold")
    table.add_row("status", Text(record["status"], style=colours.get(record["status"], "red")))
    if record["reason"]:
        table.add_row("reason", Text(record["reason"]))
    name = machine or environment.get("cpu", "unknown processor")
    where = f"{name}, {environment.get('cores', '?')} cores, {cell['threads']} threads"
    table.add_row("machine", Text(where))
    if "dtype" in cell:
        table.add_row("precision", Text(f"{cell['dtype']} on {cell['device']}"))
    for name, value in more:
        table.add_row(name, Text(value))
    table.add_row(
        "measured",
        Text(
            f"{record['started_at']}, {record['wall_s']:.1f} s, code {record['code_digest']}, "
            f"commit {environment.get('commit')}"
        ),
    )
    table.add_row("file", Text(str(path)))
    console.print(table)
    console.print()


def size(count: int | None) -> str:
    """Bytes with three significant digits and a binary unit; "-" when they are not known."""
    if count is None:
        return "-"
    amount, unit = float(count), 0
    while amount >= 1024 and unit < len(_UNITS) - 1:
        amount, unit = amount / 1024, unit + 1
    return f"{amount:.3g} {_UNITS[unit]}" if amount < 1000 else f"{amount:.0f} {_UNITS[unit]}"


def _median(turn: Mapping[str, Any], name: str) -> float:
    from statistics import median

    kept = [s[name] for s in turn["samples"] if not s["disturbed"]] or [
        s[name] for s in turn["samples"]
    ]
    return median(kept) if kept else math.nan


def _number(value: float | None) -> str:
    return "-" if value is None or math.isnan(value) else f"{value:.4g}"
