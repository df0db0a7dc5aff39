"""``kvbench advise``: which cache pays on your own request log."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

NAME = "advise"


def run(
    logs: Annotated[
        list[Path],
        typer.Argument(metavar="LOG...", help="Parts of one request log, oldest first."),
    ],
    model: Annotated[str, typer.Option(help="Name in config/models, or a model's folder.")],
    memory: Annotated[str, typer.Option(help="Memory of one machine, such as 24GiB.")],
    output: Annotated[Path, typer.Option(help="Folder for advice, tables and figures.")],
    language: Annotated[str, typer.Option(help="Language of the advice: en or pt.")] = "en",
    dtype: Annotated[str, typer.Option(help="Precision of weights and cache.")] = "bfloat16",
    skip_bad: Annotated[
        bool, typer.Option("--skip-bad", help="Leave malformed records out and count them.")
    ] = False,
    keep_text: Annotated[
        bool, typer.Option("--keep-text", help="Write texts of the log instead of digests.")
    ] = False,
    semantic: Annotated[
        bool, typer.Option(help="Replay a semantic cache where the log has texts.")
    ] = True,
    ceilings: Annotated[
        str | None,
        typer.Option(help="Ceilings: a file, a recorded machine, or such as 300TFLOP/s,2TB/s."),
    ] = None,
    price: Annotated[
        str | None, typer.Option(help="USD per million tokens: input, or input/output.")
    ] = None,
    tokenizer: Annotated[
        Path | None, typer.Option(help="tokenizer.json by which texts become tokens.")
    ] = None,
    marks: Annotated[
        Path | None, typer.Option(help="Sheet of pairs (traffic_pairs.csv) with your marks.")
    ] = None,
    conversations: Annotated[
        int, typer.Option(help="Open conversations of the fleet to plan.")
    ] = 1_000_000,
) -> None:
    """Replay a request log and say which cache pays, what it saves and what it costs.

    Formats are recognised: Mooncake JSONL, BurstGPT and Azure CSV, ShareGPT JSON, OpenAI request
    bodies as JSONL or in a JSON list, libCacheSim text and CSV; .gz and .zst are unpacked. Nothing
    leaves the machine.
    """
    from kvbench.traffic import advise

    typer.echo(
        advise.run(
            logs,
            model,
            memory,
            output,
            language=language,
            dtype=dtype,
            keep_text=keep_text,
            skip_bad=skip_bad,
            with_semantic=semantic,
            rates=ceilings,
            price=price,
            tokenizer=tokenizer,
            marks=marks,
            conversations=conversations,
        )
    )
