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
if sys.argv[2] == "forked" and (child := os.fork()):
    sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
main = threading.get_native_id()
release = threading.Event()
helpers = [threading.Thread(target=release.wait, daemon=True) for _ in range(2)]
for helper in helpers:
    helper.start()
found = placement.Places(*json.loads(sys.argv[1]))
if sys.argv[3] == "another":
    helpers.append(threading.Thread(target=release.wait, daemon=True))
    helpers[-1].start()
found.check()
threads = [main, *(helper.native_id for helper in helpers)]
told = [found.main, [sorted(os.sched_getaffinity(thread)) for thread in threads]]
print(json.dumps(told), flush=True)
release.set()
"""

several = pytest.mark.skipif(
    len(placement.processors()) < 2, reason="this process may run on one processor only"
)


def places(
    *arguments: object, process: str = "fresh", then: str = "nothing"
) -> tuple[int | None, list[list[int]]]:
    """The main thread's place and where each of three threads may run, the main one first."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, json.dumps(arguments), process, then],
        env={**os.environ, "PYTHONPATH": str(WORKFLOW)},
        capture_output=True,
        text=True,
        check=True,
    )
    found, threads = json.loads(done.stdout)
    return found, threads


@several
@pytest.mark.parametrize("process", ["fresh", "forked"])
def test_the_main_thread_has_the_first_processor_and_the_others_have_the_rest(process: str) -> None:
    first, *rest = placement.processors()
    assert places(2, process=process) == (first, [[first], rest, rest])


@several
@pytest.mark.parametrize(("threads", "allowed"), [(3, [0, 1]), (1, [0]), (1, []), (4, None)])
def test_nothing_is_bound_where_there_are_too_few_processors_or_threads(
    threads: int, allowed: list[int] | None
) -> None:
    everywhere = placement.processors()
    assert places(threads, allowed) == (None, [everywhere] * 3)


@several
def test_a_processor_that_is_not_there_binds_nothing() -> None:
    assert places(2, [4094, 4095])[0] is None


@several
def test_a_thread_that_comes_later_undoes_the_binding_so_that_it_shares_no_processor() -> None:
    everywhere = placement.processors()
    assert places(2, then="another") == (None, [everywhere] * 4)
