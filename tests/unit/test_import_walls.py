"""Who may import whom: each stage stays as light as it claims to be."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

WORKFLOW = Path(__file__).resolve().parents[2] / "workflow"
LIBRARY = WORKFLOW / "kvbench"
TORCH = ("torch", "transformers")
PLOTS = ("matplotlib", "seaborn")

_PROGRAM = """
import importlib, sys
for name in sys.argv[1].split():
    importlib.import_module(name)
print(*sorted(sys.modules))
"""


def modules_of(package: str) -> list[str]:
    """The package's modules, helpers included."""
    folder = LIBRARY / package.replace(".", "/")
    names = sorted(path.stem for path in folder.glob("*.py") if not path.stem.startswith("__"))
    return [f"kvbench.{package}", *(f"kvbench.{package}.{name}" for name in names)]


def loaded_by(modules: list[str]) -> set[str]:
    """Everything that importing some modules in a fresh process has imported."""
    done = subprocess.run(
        [sys.executable, "-c", _PROGRAM, " ".join(modules)],
        env={**os.environ, "PYTHONPATH": str(WORKFLOW)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return set(done.stdout.split())


@pytest.mark.parametrize(
    ("modules", "forbidden"),
    [
        pytest.param(
            [
                "kvbench.inputs.configuration",
                "kvbench.layout",
                "kvbench.figures",
                "kvbench.records.gathering",
                "kvbench.analysis.instrument",
            ],
            (*TORCH, *PLOTS, "pandas", "scipy.stats", "kvbench.caching.server", "redis"),
            id="planning",
        ),
        pytest.param(
            [
                *modules_of("physics"),
                *modules_of("analysis"),
                *modules_of("records"),
                "kvbench.inputs.scenarios",
            ],
            (*TORCH, *PLOTS),
            id="pure functions",
        ),
        pytest.param(
            [*modules_of("figures"), "kvbench.paper.tex"],
            TORCH,
            id="figures and LaTeX",
        ),
        pytest.param(
            modules_of("paper"),
            TORCH,
            id="paper",
        ),
        pytest.param(
            [
                *modules_of("caching"),
                *modules_of("caching.proxy"),
                *modules_of("studies"),
                *modules_of("studies.measuring"),
            ],
            (*TORCH, *PLOTS),
            id="caches",
        ),
        pytest.param(
            [*modules_of("traffic"), *modules_of("traffic.readers")],
            (*TORCH, *PLOTS, "libcachesim"),
            id="traffic",
        ),
        pytest.param(
            [*modules_of("strategies"), *modules_of("measurement")],
            (*TORCH, *PLOTS, "kvbench.caching"),
            id="measuring",
        ),
    ],
)
def test_importing(modules, forbidden):
    assert loaded_by(modules) & set(forbidden) == set()


LIGHT = [name for name in modules_of("studies") if name != "kvbench.studies"]
CACHES = ("redis", "cachetools", "requests", "requests_cache", "faiss", "openai", "sqlite3")


def test_the_light_parts_of_the_studies_load_no_cache_and_no_measuring_part():
    loaded = loaded_by(LIGHT)
    assert loaded & {*TORCH, *PLOTS, *CACHES} == set()
    assert not any(name.startswith("kvbench.studies.measuring") for name in loaded)


def test_measuring_parts_know_neither_their_light_part_nor_what_comes_after_the_measurement():
    later = ("kvbench.analysis", "kvbench.figures", "kvbench.paper")
    light = set(LIGHT) - {"kvbench.studies._estimates"}
    for path in (LIBRARY / "studies" / "measuring").glob("*.py"):
        found = imports(path)
        assert not any(name.startswith(later) for name in found), path.name
        assert not found & light, path.name


def imports(path: Path) -> set[str]:
    """Names of all modules that a file imports anywhere, also inside functions."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


@pytest.mark.parametrize("package", ["strategies", "measurement"])
def test_what_measures_generation_uses_nothing_of_the_application_caches(package):
    for path in (LIBRARY / package).glob("*.py"):
        forbidden = ("kvbench.caching", "kvbench.studies", "kvbench.paper", "kvbench.figures")
        assert not any(name.startswith(forbidden) for name in imports(path)), path.name


def test_the_half_width_of_a_running_block_needs_neither_pandas_nor_torch():
    loaded = loaded_by(["kvbench.analysis.paired", "kvbench.analysis.intervals"])
    assert loaded & {*TORCH, *PLOTS, "pandas", "scipy.stats"} == set()


def test_the_library_knows_nothing_of_snakemake():
    for path in LIBRARY.rglob("*.py"):
        assert not any(name.split(".")[0] == "snakemake" for name in imports(path)), path.name


def test_a_cell_imports_neither_scikit_learn_nor_hqq_unless_it_needs_them(tiny_folder):
    program = (
        "import sys; from pathlib import Path; from kvbench.inputs import models;"
        "models.load(Path(sys.argv[1]), 'cpu', 'float32');"
        "from transformers import DynamicCache, StaticCache, ContinuousBatchingConfig;"
        "print('sklearn' in sys.modules, 'hqq' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(tiny_folder)],
        env={**os.environ, "PYTHONPATH": str(WORKFLOW), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split() == ["False", "False"]
