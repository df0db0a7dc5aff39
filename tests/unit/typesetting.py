"""Small drawings in place of figures, and a paper's LaTeX built to a PDF beside its log."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

PAPER = Path(__file__).resolve().parents[2] / "paper"


def any_figure(folder: Path, names, lang: str, height: float = 2) -> None:
    """One small drawing under every name: what a figure shows is not what is tested here."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    folder.mkdir()
    with plt.rc_context({"pdf.fonttype": 42}):
        figure = plt.figure(figsize=(7, height))
        figure.text(0.5, 0.5, "a figure")
        figure.savefig(folder / "any.pdf")
        plt.close(figure)
    for name in names:
        shutil.copy(folder / "any.pdf", folder / f"{name}.{lang}.pdf")


def pdf_of(parts: dict[str, str], folder: Path, lang: str) -> tuple[Path, str]:
    """Build the PDF as the rule does; returns it with LaTeX's log of the last run."""
    for part, text in parts.items():
        (folder / f"{part}.{lang}.tex").write_text(text, encoding="utf-8")
    shutil.copy(PAPER / "references.bib", folder)
    done = subprocess.run(
        ["latexmk", "-pdf", "-interaction=nonstopmode", "-norc", f"main.{lang}.tex"],
        cwd=folder,
        capture_output=True,
        text=True,
        errors="replace",
        check=False,
    )
    log = (folder / f"main.{lang}.log").read_text(encoding="utf-8", errors="replace")
    assert done.returncode == 0, log[-2000:]
    return folder / f"main.{lang}.pdf", log
