"""Starting fast: what a job does not import, and what the collector does not look at."""

from __future__ import annotations

import gc
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
