"""Starting fast: what a job does not import, and what the collector does not look at."""

from __future__ import annotations

import gc
import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
from kvbench.measurement import startup

ROOT = Path(__file__).resolve().parents[2]

PROGRAM = """
import sys
from pathlib import Path
from kvbench.inputs import models
models.load(Path("resources/embedded-llama"), "cpu", "float32", keep={keep!r})
print(*sorted(name for name in ("scipy", "sklearn", "hqq") if name in sys.modules))
"""


def imported_by_loading(keep: tuple[str, ...]) -> list[str]:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM.format(keep=keep)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT / "workflow")},
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.split()


def test_loading_a_model_imports_no_package_that_it_does_not_need():
    assert imported_by_loading(()) == []


def test_a_strategy_still_gets_the_package_it_asks_for():
    pytest.importorskip("hqq")
    assert "hqq" in imported_by_loading(("hqq",))


@pytest.mark.parametrize("active", [True, False])
def test_the_collector_pauses_and_is_left_as_it_was(active):
    before = gc.isenabled()
    try:
        gc.enable() if active else gc.disable()
        with startup.collector_paused():
            assert not gc.isenabled()
        assert gc.isenabled() is active
    finally:
        gc.enable() if before else gc.disable()


def test_the_collector_comes_back_after_a_failure_too():
    with pytest.raises(ValueError, match="broken"), startup.collector_paused():
        raise ValueError("broken")
    assert gc.isenabled()


def test_what_came_in_is_frozen():
    before = gc.get_freeze_count()
    with startup.collector_paused():
        kept = [[] for _ in range(1000)]
    assert gc.get_freeze_count() >= before + len(kept)


@pytest.fixture
def heavy(tmp_path, monkeypatch) -> str:
    """A package with a module that says when it is imported."""
    package = tmp_path / "heavy_package"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "numbers.py").write_text("def double(x):\n    return 2 * x\n")
    (tmp_path / "asks_for_it.py").write_text("from heavy_package.numbers import double\n")
    monkeypatch.syspath_prepend(tmp_path)
    yield "heavy_package.numbers"
    for name in ("heavy_package", "heavy_package.numbers", "asks_for_it"):
        sys.modules.pop(name, None)


def test_a_function_of_an_unused_package_is_loaded_when_it_is_called(heavy):
    with startup.imported_when_called(heavy):
        import asks_for_it
    assert heavy not in sys.modules
    assert asks_for_it.double(21) == 42
    assert heavy in sys.modules


def test_what_is_imported_already_is_given_as_it_is(heavy):
    import heavy_package.numbers

    with startup.imported_when_called(heavy):
        import asks_for_it
    assert asks_for_it.double is heavy_package.numbers.double


def test_a_package_that_is_not_installed_stays_missing():
    with (
        pytest.raises(ModuleNotFoundError),
        startup.imported_when_called("no_such_package.numbers"),
    ):
        importlib.import_module("no_such_package.numbers")
