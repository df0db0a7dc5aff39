"""Where files lie: each path below ``results/`` is spelled here or in the rule that makes it."""

from __future__ import annotations

import re
from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent
#: The folder that the library lies in: ``workflow`` of a checkout.
WORKFLOW = _PACKAGE.parent

#: The machine that this run measures, where machines are named; recorded ones lie in ``RECORDED``.
HERE = "here"
RECORDED = "results/recorded"
#: Number format that a device is used with where the configuration says ``auto``.
DEFAULT_DTYPE = {"cpu": "float32", "cuda": "bfloat16"}
#: Whether the prompts of a batch have one length, or are shorter from row to row.
EQUAL, MIXED = "equal", "mixed"
VALUES = "results/paper/values.json"
MANIFEST = "results/manifest.json"

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


def place(device: str, dtype: str) -> str:
    """Name of a device and dtype in paths: ``cpu``, ``cuda``, ``cuda-float32``."""
    return device if dtype == DEFAULT_DTYPE[device] else f"{device}-{dtype}"


def workload(scenario: str, batch: int = 1, lengths: str = EQUAL) -> str:
    """Name of a scenario and a batch in paths and tables: ``symposium_turn``, ``symposium_turn-b4-mixed``.

    A batch is what is asked, not how it is answered: it is part of the scenario's name and not of the
    strategy's, so that what is compared in one scenario is compared at one batch. Ids of scenarios have no
    hyphen.
    """
    if batch == 1:
        return scenario
    return f"{scenario}-b{batch}" + ("" if lengths == EQUAL else f"-{lengths}")


def batch_of(workload: str) -> tuple[str, int, str | None]:
    """Scenario, batch and lengths of a name that :func:`workload` made; of one request no lengths."""
    found = re.fullmatch(r"([^-]+)-b(\d+)(?:-(\w+))?", workload)
    if found is None:
        return workload, 1, None
    return found[1], int(found[2]), found[3] or EQUAL


def root(machine: str = HERE) -> str:
    """Folder of a run's results, or of a recorded machine's."""
    return "results" if machine == HERE else f"{RECORDED}/{machine}"


def kv_record(key: str, machine: str = HERE) -> str:
    """Path of a kv cell's record by :attr:`kvbench.inputs.configuration.KvCell.key`."""
    return f"{root(machine)}/cells/kv/{key}.json"


def journal(block: str) -> str:
    """Where the rounds of a block are kept until its records are booked, by its id."""
    return f"results/journals/{block}.jsonl"


def app_record(study: str, cell: str, machine: str = HERE) -> str:
    """Path of an app cell's record."""
    return f"{root(machine)}/cells/app/{study}/{cell}.json"


def aa_record(key: str) -> str:
    """Path of a record of the instrument's test, by the key of its cell: ``<arm>/b<block>-<copy>``."""
    return f"results/cells/aa/{key}.json"


def traffic_record(key: str) -> str:
    """Path of a replay's record by :attr:`kvbench.traffic.cells.TrafficCell.key`."""
    return f"results/cells/traffic/{key}.json"


def environment(device: str) -> str:
    """Path of the facts about this machine."""
    return f"results/inputs/environment/{device}.json"


def ceilings(place: str) -> str:
    """Path of what this machine can do at best, by device and dtype."""
    return f"results/inputs/ceilings/{place}.json"


def model(name: str) -> str:
    """Folder of a prepared model."""
    return f"results/inputs/models/{name}"


def prompts(model_name: str, scenario: str) -> str:
    """Path of a scenario's token ids for a model."""
    return f"results/inputs/prompts/{model_name}/{scenario}.json"


def table(name: str) -> str:
    """Path of a table that a figure is drawn from; two of them lie elsewhere."""
    elsewhere = {
        "claims": claims("csv"),
        "training_loss": "resources/embedded-llama/training/loss.csv",
    }
    return elsewhere.get(name, f"results/tables/{name}.csv")


def claims(suffix: str) -> str:
    """Path of the verdicts: ``csv``, ``json`` or ``md``."""
    return f"results/claims/claims.{suffix}"


def figure(name: str, suffix: str) -> str:
    """Path of a figure: ``pdf``, ``svg`` or ``png``."""
    return f"results/figures/{name}.{suffix}"


def paper(part: str, language: str) -> str:
    """Path of a part of the paper in LaTeX."""
    return f"results/paper/{part}.{language}.tex"


def pdf(language: str) -> str:
    """Path of the paper."""
    return f"results/paper/paper.{language}.pdf"


def shipped(name: str) -> Path:
    """Folder ``config``, ``schemas`` or ``resources``: of the checkout, or inside an installed package."""
    checkout = _PACKAGE.parent / name if name == "schemas" else _PACKAGE.parent.parent / name
    installed = _PACKAGE / f"_{name}"
    return installed if installed.is_dir() else checkout
