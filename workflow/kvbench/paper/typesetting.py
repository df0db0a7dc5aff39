"""LaTeX to PDF, with whatever engine is installed, without shell escape, byte for byte the same."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

from kvbench import documents, layout
from kvbench.errors import InputError

#: A fixed moment for the engine's clock (2025-01-01 UTC), so that a PDF says nothing of its making.
_EPOCH = "1735689600"
_TIMEOUT_S = 600


def compile_pdf(main: Path, target: Path, log: Path) -> None:
    """Build ``target`` from ``main``, which lies beside everything it reads.

    The engine works in a temporary copy of the sources' folder, so that its many small files are
    never left behind and a failed build leaves no half-made PDF.

    Parameters
    ----------
    main:
        The document; files it inputs lie in its folder, figures in ``../figures``, the bibliography
        in the folder ``paper`` of the repository (found through ``BIBINPUTS``).
    target:
        PDF to make.
    log:
        The engine's own log goes here.

    Raises
    ------
    InputError
        No engine is installed, or LaTeX found an error; one line naming it.
    """
    engine = shutil.which("latexmk") or shutil.which("tectonic")
    if engine is None:
        raise InputError(f"{target}: {layout.NO_LATEX}")
    target.parent.mkdir(parents=True, exist_ok=True)
    # Beside the target, where the next run finds what a kill left.
    place = target.parent.absolute()
    with tempfile.TemporaryDirectory(dir=place, prefix=".", suffix=".part") as temporary:
        work = Path(temporary) / "paper"
        # The sources lie beside the target, and so beside this very folder.
        shutil.copytree(main.parent, work, ignore=shutil.ignore_patterns("*.pdf", ".*"))
        for folder, name in ((main.parent.parent / "figures", "figures"),):
            (Path(temporary) / name).symlink_to(folder.resolve())
        shutil.copyfile(Path("paper/references.bib"), work / "references.bib")
        done = subprocess.run(
            _command(engine, main.name),
            cwd=work,
            env={**os.environ, "SOURCE_DATE_EPOCH": _EPOCH, "FORCE_SOURCE_DATE": "1"},
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_TIMEOUT_S,
            check=False,
        )
        log.write_text(done.stdout + done.stderr, encoding="utf-8")
        made = work / f"{main.stem}.pdf"
        if done.returncode or not made.exists():
            raise InputError(f"{main}: LaTeX failed: {_first_error(done.stdout)} (see {log})")
        documents.write_bytes_atomic(target, made.read_bytes())


def _command(engine: str, document: str) -> Sequence[str]:
    if Path(engine).name == "tectonic":
        return [engine, "--untrusted", document]
    return [
        engine,
        "-pdf",
        "-interaction=nonstopmode",
        "-halt-on-error",
        "-no-shell-escape",
        "-norc",
        document,
    ]


def _first_error(output: str) -> str:
    lines = [line for line in output.splitlines() if line.startswith("!")]
    return lines[0][2:] if lines else "no error line found"
