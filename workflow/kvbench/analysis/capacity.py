"""How many conversations fit a machine, and how fast: ``kvbench capacity``.

A conversation is one sequence of a given length. Beside the weights the memory holds the caches of
all open conversations and one layer's working copy of them; the roofline model gives the decode
rate. All of that is computed. Activations and work space are not: give what was measured
(``peak_memory_mib - kv_mib`` of ``kv_summary.csv``) as ``--workspace``.

A strategy whose cache cannot keep the model's layers has a reason instead of numbers, the same as when
it is measured. What this machine lacks (a package, a GPU) is no reason: another machine is planned.
An offloaded cache lies in the host's memory, which has room for so many conversations too.
"""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from kvbench import documents, layout, physics, strategies
from kvbench.arguments import Parser
from kvbench.errors import InputError
from kvbench.physics import Architecture, Ceilings, Traffic
from kvbench.strategies import shape

#: The option that plans nothing.
CHECK = "--check"
NOT_ALONE = "kvbench capacity --check has a model and memories of its own; leave other options out"

#: From a laptop to an eight-GPU server, in bytes: the sizes of the figure.
MEMORY_SIZES = tuple(size * 2**30 for size in (8, 16, 24, 48, 80, 141, 320, 640, 1128))

#: Columns of the table, with their meaning and unit.
COLUMNS: Mapping[str, str] = {
    "model": "model file",
    "dtype": "dtype of the weights and of the exact caches",
    "memory_bytes": "memory of one machine (bytes)",
    "host_memory_bytes": "memory of its host, where offloaded caches lie; as much as the machine's where"
    " nothing else is said (bytes)",
    "tokens": "length of each conversation (tokens)",
    "strategy": "KV-cache strategy",
    "weight_bytes": "weights (bytes)",
    "workspace_bytes": "activations and work space beside weights and caches, as measured; 0: not"
    " counted (bytes)",
    "kv_bytes": "cache of one conversation at its full length (bytes)",
    "device_bytes": "memory one conversation needs beside the weights while decoding (bytes)",
    "host_bytes": "memory one conversation needs on the host beside that (bytes)",
    "concurrent": "conversations that fit one machine at once",
    "tokens_per_s_single": "upper bound on the decode rate of a lone conversation (tokens/s)",
    "tokens_per_s_full": "upper bound on the decode rate of a full machine, all conversations"
    " together (tokens/s)",
    "conversations": "open conversations of the fleet",
    "machines": "machines that hold the fleet's conversations",
    "reason": "why there is no number",
}

_SUFFIXES = {"B": 1}
for _power, _letter in enumerate("KMGTP", start=1):
    _SUFFIXES[f"{_letter}B"] = 1000**_power
    _SUFFIXES[f"{_letter}IB"] = 1024**_power
_SIZE = re.compile(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]*)\s*")


def parse_bytes(text: str, name: str = "memory") -> int:
    """Read a size such as ``80GiB``, ``24 GB`` or ``1000000 B`` as bytes.

    A bare number is refused: people write it for gibibytes and for bytes, and either reading of the
    other's number gives a plan that looks right.

    Raises
    ------
    InputError
        If it is not a positive number with a known unit.
    """
    match = _SIZE.fullmatch(text)
    if match and not match[2] and float(match[1]):
        raise InputError(
            f"{name} {text!r} has no unit; write {match[1]}GiB for gibibytes, {match[1]}B for bytes"
        )
    unit = match[2].upper() if match else None
    size = float(match[1]) * _SUFFIXES[unit] if match and unit in _SUFFIXES else 0.0
    if not 1 <= size < 2**80:
        raise InputError(f"{name} {text!r} is not a size; write it like 80GiB or 24GB")
    return int(size)


def parse_bandwidth(text: str) -> float:
    """Read a rate such as ``2TB/s`` as bytes per second.

    Raises
    ------
    InputError
        If it is not a size followed by ``/s``.
    """
    size = text.strip().removesuffix("/s")
    match = _SIZE.fullmatch(size)
    if size == text.strip() or (match and not match[2]):
        raise InputError(f"bandwidth {text!r} is not a rate; write it like 2TB/s")
    return float(parse_bytes(size, "bandwidth"))


def architecture(model: str, root: Path | None = None) -> Architecture:
    """Read the sizes of a model.

    Parameters
    ----------
    model:
        Name of a file in ``config/models``, or the path of such a file, of a ``config.json`` or of
        a folder that holds one.
    root:
        Folder that has ``config/models``; default is the one this library lies in.

    Raises
    ------
    InputError
        If there is no such model, or its file gives no usable architecture.
    """
    path = Path(model)
    if path.is_dir():
        path = path / "config.json"
    if path.suffix == ".json":
        return Architecture.from_config(_mapping(documents.read_json(path), path), str(path))
    if path.suffix not in {".yaml", ".yml"}:
        folder = (root / "config" if root else layout.shipped("config")) / "models"
        path = folder / f"{model}.yaml"
        if not path.is_file():
            known = ", ".join(sorted(file.stem for file in folder.glob("*.yaml"))) or "none"
            raise InputError(
                f"model {model!r} is neither a folder with config.json nor one of config/models: "
                f"{known}"
            )
    document = _mapping(documents.read_yaml(path), path)
    if "architecture" not in document:
        raise InputError(
            f"{path.name}: architecture is missing; add it, or give the model's folder instead"
        )
    return Architecture.from_config(
        _mapping(document["architecture"], path), f"{path.name}: architecture"
    )


def _mapping(document: Any, path: Path) -> Mapping[str, Any]:
    if not isinstance(document, Mapping):
        raise InputError(f"{path}: not a mapping of names to values")
    return document


def _rates(
    arch: Architecture,
    traffic: Traffic,
    tokens: int,
    size: float,
    ceilings: Ceilings,
    batch: int,
    decoded: int,
) -> float | None:
    """Tokens per second of ``batch`` conversations that are ``tokens`` tokens long."""
    if ceilings.read_bytes_per_s is None or batch < 1:
        return None
    moved = physics.decode_bytes(arch, tokens, traffic, size, batch, max(decoded, 1))
    seconds = moved / ceilings.need("read_bytes_per_s")
    link = physics.link_bytes(arch, tokens, traffic, size, batch)
    if link:
        if ceilings.link_bytes_per_s is None:
            return None
        seconds = max(seconds, link / ceilings.need("link_bytes_per_s"))
    recompute = traffic.recomputes
    matrices = recompute or batch > 1
    name = "prefill_flops_per_s" if matrices else "decode_flops_per_s"
    rate = getattr(ceilings, name)
    if rate is None:
        # Recomputing waits for arithmetic; a bound from the bandwidth alone would mislead.
        return None if recompute else batch / seconds
    new, past = (tokens, 0) if recompute else (1, tokens - 1)
    flops = physics.forward_flops(arch, new, past, 1, batch)
    return batch / max(seconds, flops / ceilings.need(name))


def plan(
    arch: Architecture,
    memory_bytes: int,
    tokens: int,
    dtype: str = "bfloat16",
    ceilings: Ceilings | None = None,
    conversations: int = 1_000_000,
    names: Iterable[str] | None = None,
    model: str = "",
    workspace_bytes: int = 0,
    host_memory_bytes: int | None = None,
) -> list[dict[str, Any]]:
    """Plan one machine size: a row per strategy, with the columns of :data:`COLUMNS`.

    Parameters
    ----------
    memory_bytes:
        Memory of one machine; a server of several accelerators counts as their sum.
    tokens:
        Length of each conversation.
    ceilings:
        Rates of the machine. Without a read rate there are no decode rates; without rates of
        arithmetic the decode rates are bounds from the bandwidth alone.
    conversations:
        Open conversations of the fleet.
    names:
        Strategies; default all that are registered, the reusing variants excepted (their caches
        are those of the plain ones).
    workspace_bytes:
        Measured activations and work space, which all conversations share.
    host_memory_bytes:
        Memory of the host for offloaded caches; None for as much as ``memory_bytes``.

    Raises
    ------
    InputError
        If a size is not positive, or the conversation is longer than the model allows.
    """
    host = memory_bytes if host_memory_bytes is None else host_memory_bytes
    for name, value in (("memory", memory_bytes), ("host memory", host), ("tokens", tokens)):
        if value < 1:
            raise InputError(f"{name} is {value}; it must be positive")
    if conversations < 1:
        raise InputError(f"conversations is {conversations}; it must be positive")
    if arch.max_positions is not None and tokens > arch.max_positions:
        raise InputError(
            f"tokens is {tokens}; {model or 'the model'} handles at most {arch.max_positions}"
        )
    size = physics.bytes_per_element(dtype)
    ceilings = ceilings or Ceilings()
    weights = physics.weight_bytes(arch, size)
    every = [name for name in strategies.names() if not strategies.get(name).reuses_turns]
    chosen = every if names is None else names
    rows = []
    for name in chosen:
        strategy = strategies.get(name)
        traffic = strategy.traffic(tokens)
        row: dict[str, Any] = dict.fromkeys(COLUMNS)
        row |= {
            "model": model,
            "dtype": dtype,
            "memory_bytes": memory_bytes,
            "host_memory_bytes": host,
            "tokens": tokens,
            "strategy": name,
            "weight_bytes": weights,
            "workspace_bytes": workspace_bytes,
            "conversations": conversations,
            "reason": "",
        }
        rows.append(row)
        if reason := strategy.unfit(shape.planned_kinds(arch), arch):
            row["reason"] = reason
            continue
        try:
            prompt, decoded = traffic.fullest(tokens)
            kv = physics.predicted_kv_bytes(arch, traffic, prompt, decoded + 1, size)
            row["kv_bytes"] = kv
            row["device_bytes"] = traffic.working_bytes(arch, tokens, kv, size)
            free = max(0, memory_bytes - weights - workspace_bytes)
            row["host_bytes"] = traffic.host_bytes(arch, tokens, size)
            on_device = free // row["device_bytes"]
            on_host = host // row["host_bytes"] if row["host_bytes"] else on_device
            row["concurrent"] = min(on_device, on_host)
            rate = (arch, traffic, traffic.kept_tokens(tokens), size, ceilings)
            if weights < memory_bytes:
                row["tokens_per_s_single"] = _rates(*rate, min(row["concurrent"], 1), decoded)
                row["tokens_per_s_full"] = _rates(*rate, row["concurrent"], decoded)
        except InputError as error:
            row["reason"] = str(error)
            continue
        if row["concurrent"]:
            row["machines"] = math.ceil(conversations / row["concurrent"])
        else:
            row["reason"] = _why_none(weights >= memory_bytes, bool(on_device))
    return rows


def _why_none(heavy: bool, fits_device: bool) -> str:
    """Why a machine holds no conversation at all."""
    if heavy:
        return "the weights do not fit"
    if fits_device:
        return "no conversation's cache fits the host's memory"
    return "no conversation fits beside the weights"


def sweep(
    arch: Architecture, tokens: int, memory_sizes: Sequence[int] = MEMORY_SIZES, **options: Any
) -> list[dict[str, Any]]:
    """Plan every memory size, from a laptop to a server; options are those of :func:`plan`."""
    return [row for size in memory_sizes for row in plan(arch, size, tokens, **options)]


def grid(
    models: Sequence[str], ceilings: Ceilings | None = None, tokens: int = 8192
) -> list[dict[str, Any]]:
    """Sweep every model that says its shape, at ``tokens`` or the longest context it allows.

    Parameters
    ----------
    models:
        Names of files in ``config/models``; those without an architecture are left out.
    ceilings:
        Rates of one machine; of them only the bandwidths are used, since the arithmetic was
        measured at another dtype.
    tokens:
        Length of each conversation.
    """
    bandwidth = ceilings and Ceilings(
        read_bytes_per_s=ceilings.read_bytes_per_s,
        link_bytes_per_s=ceilings.link_bytes_per_s,
        machine=ceilings.machine,
    )
    rows: list[dict[str, Any]] = []
    for model in models:
        try:
            arch = architecture(model)
        except InputError:
            continue
        length = min(tokens, arch.max_positions or tokens)
        rows += sweep(arch, length, model=model, ceilings=bandwidth)
    return rows


#: Columns of a fleet's plan from measured traffic, with their meaning and unit.
FLEET_COLUMNS: Mapping[str, str] = {
    "prefix_caching": "whether blocks of equal prefixes are kept once and reused",
    "conversations": "open conversations of the fleet",
    "tokens": "mean length of a conversation in the log, prompt and answer (tokens)",
    "held_share": "blocks a full machine really holds per block its conversations ask for",
    "concurrent": "conversations that fit one machine at once",
    "machines": "machines (GPUs of the given memory) that hold the fleet's conversations",
    "fleet_memory_bytes": "memory of these machines together (bytes)",
    "prefill_tokens": "prompt tokens that must be computed for the fleet's conversations, once each",
    "prefill_saved_share": "prompt tokens that a cache of one machine's memory makes unnecessary",
    "prefill_machine_hours": "least time of that prefill on one machine (hours)",
    "reason": "why there is no number",
}


def fleet(
    arch: Architecture,
    memory_bytes: int,
    prompt_tokens: float,
    answer_tokens: float,
    *,
    reused_share: float | None,
    held_share: Callable[[int], float] | None,
    prefill_flops: float,
    prefill_flops_reusing: float | None,
    most_concurrent: int,
    dtype: str = "bfloat16",
    conversations: int = 1_000_000,
    ceilings: Ceilings | None = None,
) -> list[dict[str, Any]]:
    """Plan a fleet for conversations like those of a log: one row without prefix caching, one with.

    Parameters
    ----------
    memory_bytes:
        Memory of one machine.
    prompt_tokens, answer_tokens:
        Mean lengths in the log.
    reused_share:
        Measured share of prompt tokens found in a cache of one machine's memory; None where the
        log does not tell, and then there is only the row without.
    held_share:
        Measured share of distinct blocks among ``n`` requests in a row: what ``n`` conversations
        that are open at once hold when equal prefixes are kept once.
    prefill_flops, prefill_flops_reusing:
        Mean work of a conversation's prefill, without and with reuse.
    most_concurrent:
        Requests of the log: sharing among more conversations than these was never seen. A machine
        that holds more is taken to hold groups of so many, which share nothing with each other.

    Raises
    ------
    InputError
        If a length or the memory is not positive.
    """
    if memory_bytes < 1 or prompt_tokens <= 0 or answer_tokens < 0 or conversations < 1:
        raise InputError(
            f"fleet: memory {memory_bytes}, prompt {prompt_tokens:g}, answer {answer_tokens:g}, "
            f"conversations {conversations}; sizes must be positive"
        )
    size = physics.bytes_per_element(dtype)
    free = memory_bytes - physics.weight_bytes(arch, size)
    tokens = max(1, round(prompt_tokens + answer_tokens))
    whole = physics.kv_bytes(arch, tokens, size)
    prompt = min(whole, physics.kv_bytes(arch, max(1, round(prompt_tokens)), size))
    # A paged cache needs a working copy of one layer beside its blocks.
    working = physics.Paged().working_bytes(arch, tokens, whole, size) - whole

    def needed(count: int, share: float) -> float:
        return count * (prompt * share + (whole - prompt) + working)

    rate = ceilings.prefill_flops_per_s if ceilings else None
    rows = []
    for caching in (False, True):
        row: dict[str, Any] = dict.fromkeys(FLEET_COLUMNS)
        rows.append(row)
        row |= {
            "prefix_caching": caching,
            "conversations": conversations,
            "tokens": prompt_tokens + answer_tokens,
            "reason": "",
        }
        if caching and (reused_share is None or held_share is None):
            row["reason"] = "the log does not show which prompts begin alike"
            continue
        sharing = held_share if caching else None
        fitting, share = _fitting(free, needed, sharing, max(1, most_concurrent))
        work = prefill_flops_reusing if caching else prefill_flops
        saved = float(reused_share or 0.0) if caching else 0.0
        row |= {
            "held_share": share,
            "concurrent": fitting,
            "prefill_tokens": conversations * prompt_tokens * (1 - saved),
            "prefill_saved_share": saved,
        }
        if rate and work is not None:
            row["prefill_machine_hours"] = conversations * work / rate / 3600
        if fitting:
            row["machines"] = math.ceil(conversations / fitting)
            row["fleet_memory_bytes"] = row["machines"] * memory_bytes
        else:
            row["reason"] = (
                "the weights do not fit" if free <= 0 else "no conversation fits beside the weights"
            )
    return rows


def _fitting(
    free: float,
    needed: Callable[[int, float], float],
    held_share: Callable[[int], float] | None,
    most: int,
) -> tuple[int, float]:
    """How many conversations fit into ``free`` bytes, and the share of their prompts that is held.

    ``held_share`` is None where every conversation holds all of its own; else it was seen for up to
    ``most`` conversations.
    """
    alone = max(0, int(free // needed(1, 1.0)))
    if held_share is None or not alone:
        return alone, 1.0
    # More conversations share more, so more fit: the largest number that still does.
    if needed(most, held_share(most)) <= free:
        # As many as the log has fit. Of more, each group of that size shares what the log showed,
        # and nothing is assumed to be shared between the groups.
        share = held_share(most)
        return int(free // (needed(most, share) / most)), share
    low, high = alone, most
    while low < high:
        middle = (low + high + 1) // 2
        fits = needed(middle, held_share(middle)) <= free
        low, high = (middle, high) if fits else (low, middle - 1)
    return low, held_share(low)


def _quantity(size: float | None) -> str:
    """Write bytes with three significant digits and a binary unit."""
    if size is None:
        return "-"
    unit = "B"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if size < 1024:
            break
        size, unit = size / 1024, larger
    return f"{size:.0f} {unit}" if size >= 100 or unit == "B" else f"{size:.3g} {unit}"


def _count(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:,.0f}" if value >= 10 or value == int(value) else f"{value:.2g}"


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Lay the rows out as text."""
    first = rows[0]
    head = (
        "strategy",
        "KV/conv.",
        "needed/conv.",
        "on host/conv.",
        "concurrent",
        "tok/s one",
        "tok/s all",
    )
    fleet = f"machines for {first['conversations']:,}"
    lines = [
        (
            row["strategy"],
            _quantity(row["kv_bytes"]),
            _quantity(row["device_bytes"]),
            _quantity(row["host_bytes"] or None),
            _count(row["concurrent"]),
            _count(row["tokens_per_s_single"]),
            _count(row["tokens_per_s_full"]),
            row["reason"] or _count(row["machines"]),
        )
        for row in rows
    ]
    grid = [(*head, fleet), *lines]
    widths = [max(len(line[i]) for line in grid) for i in range(len(head))]
    body = []
    for line in grid:
        numbers = (line[i].rjust(widths[i]) for i in range(1, len(head)))
        body.append("  ".join((line[0].ljust(widths[0]), *numbers, line[-1])))
    title = (
        f"{first['model']} in {first['dtype']}: {_quantity(first['weight_bytes'])} of weights, "
        f"{_quantity(first['memory_bytes'])} of memory, {first['tokens']:,} tokens a conversation"
    )
    if any(row["host_bytes"] for row in rows):
        title += f"; {_quantity(first['host_memory_bytes'])} of host memory for offloaded caches"
    return "\n".join([title, "", *body])


def parser() -> Parser:
    """Return the parser of the planner's options."""
    found = Parser(
        prog="kvbench capacity",
        description="How many conversations fit a machine, and how fast. Caches and the bytes of a "
        "step are computed; activations and work space are not: give what was measured "
        "(peak_memory_mib - kv_mib of kv_summary.csv) as --workspace. A strategy whose cache cannot keep "
        "the model's layers has a reason instead of numbers, the same as when it is measured; what this "
        "machine lacks (a package, a GPU) is no reason, for another machine is planned. An offloaded "
        "cache lies in the host's memory, which bounds the conversations too.",
        epilog="Example: kvbench capacity --model llama-3.2-1b --memory 80GiB --tokens 8192 "
        "--bandwidth 2TB/s",
    )
    found.add_argument(
        "--model",
        required=True,
        help="name in config/models, a file like those, or a folder with config.json",
    )
    found.add_argument(
        "--memory", required=True, help="memory of one machine with its unit, such as 80GiB"
    )
    found.add_argument("--tokens", required=True, help="tokens of one conversation")
    found.add_argument(
        "--dtype", default="bfloat16", help="dtype of weights and exact caches (default: bfloat16)"
    )
    found.add_argument(
        "--host-memory",
        metavar="MEMORY",
        help="memory of the host for offloaded caches, such as 256GiB (default: as --memory)",
    )
    rates = found.add_mutually_exclusive_group()
    rates.add_argument(
        "--ceilings",
        metavar="FILE",
        help="rates measured on the machine at this dtype, results/inputs/ceilings/*.json of a run "
        "(default: none, and then no tokens per second)",
    )
    rates.add_argument(
        "--bandwidth",
        metavar="RATE",
        help="memory bandwidth, such as 2TB/s: the tokens per second that it alone allows",
    )
    found.add_argument(
        "--workspace", help="measured activations and work space, such as 300MiB (default: none)"
    )
    found.add_argument(
        "--conversations",
        default="1000000",
        help="open conversations of a fleet (default: 1000000)",
    )
    found.add_argument(
        CHECK,
        action="store_true",
        help="instead of planning, and without other options, hold the planner against reality: open "
        "conversations of a tiny model in processes of 128, 192 and 320 MiB until one fails, and print "
        "how many were predicted and how many ran (Linux; under a minute). Exit status 0: each "
        "prediction is within one of what ran; 1: one is not; 2: no process can be limited here",
    )
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns 0, or 2 after one line on standard error."""
    given = parser().parse_args(arguments)
    try:
        if given.check:
            raise InputError(NOT_ALONE)
        if given.ceilings:
            record = _mapping(documents.read_json(Path(given.ceilings)), Path(given.ceilings))
            ceilings = Ceilings.from_record(record, given.dtype)
        elif given.bandwidth:
            ceilings = Ceilings(read_bytes_per_s=parse_bandwidth(given.bandwidth))
        else:
            ceilings = Ceilings()
        rows = plan(
            architecture(given.model),
            parse_bytes(given.memory),
            _whole(given.tokens, "tokens"),
            given.dtype,
            ceilings,
            _whole(given.conversations, "conversations"),
            model=Path(given.model).name,
            workspace_bytes=parse_bytes(given.workspace, "workspace") if given.workspace else 0,
            host_memory_bytes=(
                parse_bytes(given.host_memory, "host memory") if given.host_memory else None
            ),
        )
    except InputError as error:
        print(f"kvbench: {error}", file=sys.stderr)
        return 2
    print(table(rows))
    return 0


def _whole(text: str, name: str) -> int:
    if not text.isdecimal():
        raise InputError(f"{name} {text!r} is not a positive whole number")
    return int(text)


if __name__ == "__main__":
    sys.exit(main())
