"""Threads have their places: the main one its own, the others the rest."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from kvbench.measurement import placement

WORKFLOW = Path(__file__).parents[2] / "workflow"

#: Two helping threads that live until the end; where each thread may run is printed, the main one first.
PROGRAM = """
import json, os, sys, threading
from kvbench.measurement import placement
release = threading.Event()
helpers = [threading.Thread(target=release.wait, daemon=True) for _ in range(2)]
for helper in helpers:
    helper.start()
found = placement.settle(*json.loads(sys.argv[1]))
threads = [threading.main_thread(), *helpers]
print(json.dumps([found, [sorted(os.sched_getaffinity(t.native_id)) for t in threads]]))
release.set()
"""

several = pytest.mark.skipif(
    len(placement.processors()) < 2, reason="this process may run on one processor only"
)


def places(*arguments: object) -> tuple[int | None, list[list[int]]]:
    """What a process of three threads finds after it has settled."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, json.dumps(arguments)],
        env={**os.environ, "PYTHONPATH": str(WORKFLOW)},
        capture_output=True,
        text=True,
        check=True,
    )
    found, threads = json.loads(done.stdout)
    return found, threads


@several
def test_the_main_thread_has_the_first_processor_and_the_others_have_the_rest() -> None:
    first, *rest = placement.processors()
    assert places(2) == (first, [[first], rest, rest])


@several
@pytest.mark.parametrize(("threads", "allowed"), [(3, [0, 1]), (1, [0]), (1, [])])
def test_nothing_is_bound_where_there_are_too_few_processors(
    threads: int, allowed: list[int]
) -> None:
    everywhere = placement.processors()
    assert places(threads, allowed) == (None, [everywhere] * 3)


@several
def test_a_processor_that_is_not_there_binds_nothing() -> None:
    assert places(2, [4094, 4095])[0] is None
