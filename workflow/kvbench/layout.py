"""Where files lie: every path below ``results/`` is spelled here and in the rules' outputs only."""

from __future__ import annotations

from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent
#: The folder that the library lies in: ``workflow`` of a checkout.
WORKFLOW = _PACKAGE.parent

#: Debian's packages that build the PDF.
LATEX_PACKAGES = (
    "latexmk texlive-latex-extra texlive-science texlive-fonts-recommended "
    "texlive-lang-portuguese lmodern"
)
#: What to do when the PDF cannot be built.
NO_LATEX = (
    "neither latexmk nor tectonic is installed; "
    f"on Debian or Ubuntu: sudo apt install {LATEX_PACKAGES}"
)


def kv_record(key: str) -> str:
    """Path of a kv cell's record by :attr:`kvbench.inputs.configuration.KvCell.key`."""
    return f"results/cells/kv/{key}.json"


def app_record(study: str, cell: str) -> str:
    """Path of an app cell's record."""
    return f"results/cells/app/{study}/{cell}.json"


def traffic_record(key: str) -> str:
    """Path of a replay's record by :attr:`kvbench.traffic.cells.TrafficCell.key`."""
    return f"results/cells/traffic/{key}.json"


def table(name: str) -> str:
    """Path of a table that a figure is drawn from; two of them lie elsewhere."""
    elsewhere = {
        "claims": "results/claims/claims.csv",
        "training_loss": "resources/embedded-llama/training/loss.csv",
    }
    return elsewhere.get(name, f"results/tables/{name}.csv")


def shipped(name: str) -> Path:
    """Folder ``config``, ``schemas`` or ``resources``: of the checkout, or inside an installed package."""
    checkout = _PACKAGE.parent / name if name == "schemas" else _PACKAGE.parent.parent / name
    installed = _PACKAGE / f"_{name}"
    return installed if installed.is_dir() else checkout
