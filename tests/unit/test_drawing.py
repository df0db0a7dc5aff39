"""One job draws the figures of its tables: each anew only when it would be another one."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
from kvbench import documents, figures, studies
from kvbench.errors import InputError
from kvbench.figures import _drawing
from kvbench.records import gathering
from matplotlib import pyplot as plt

WORDS = Path("words.pt.yaml")


def bars(table: pd.DataFrame, *arguments: str) -> plt.Figure:
    figure, ax = plt.subplots(figsize=(2, 1))
    ax.bar(table["name"], table["value"])
    table["value"] = 0.0
    return figure


def refused(table: pd.DataFrame, *arguments: str) -> plt.Figure:
    raise InputError("no row of this machine")


def broken(table: pd.DataFrame, *arguments: str) -> plt.Figure:
    return 1 / 0


class Job:
    """Two figures of two tables, in a folder of their own."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.monkeypatch = monkeypatch
        self.plans = {}
        for name in ("left", "right"):
            gathering.write_csv(pd.DataFrame({"name": ["a"], "value": [1.0]}), Path(f"{name}.csv"))
            self.module(name, bars)
            self.plans[name] = _drawing.Plan(name, [f"{name}.csv"], [], "1")
        WORDS.write_text("{}")

    def module(self, name: str, draw) -> None:
        module = SimpleNamespace(draw=draw, BATCHES=True)
        self.monkeypatch.setitem(sys.modules, f"kvbench.figures.{name}", module)

    def draw(self) -> list[str]:
        """Draw as a process of its own would, in a folder that Snakemake has emptied."""
        for path in Path("figures").glob("*"):
            path.unlink()
        for remembered in (_drawing._table, _drawing._contents):
            remembered.cache_clear()
        return _drawing.draw(self.plans, Path("figures"), ["en"], [WORDS])

    def files(self) -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in sorted(Path("figures").iterdir())}


@pytest.fixture
def job(tmp_path, monkeypatch) -> Job:
    monkeypatch.chdir(tmp_path)
    return Job(monkeypatch)


def test_what_has_not_changed_comes_back_without_being_drawn(job):
    assert job.draw() == ["left", "right"]
    first = job.files()
    assert set(first) == {f"{name}.en.{s}" for name in job.plans for s in ("pdf", "svg", "png")}
    assert job.draw() == []
    assert job.files() == first


def test_a_changed_table_draws_the_figures_that_take_it(job):
    job.draw()
    first = job.files()
    gathering.write_csv(pd.DataFrame({"name": ["a", "b"], "value": [1.0, 2.0]}), Path("left.csv"))
    assert job.draw() == ["left"]
    changed = {name for name, drawn in job.files().items() if drawn != first[name]}
    assert changed == {"left.en.pdf", "left.en.svg", "left.en.png"}


def test_changed_code_draws_its_figure_only(job):
    job.draw()
    job.plans["right"] = _drawing.Plan("right", ["right.csv"], [], "2")
    assert job.draw() == ["right"]


def test_changed_words_draw_everything(job):
    job.draw()
    WORDS.write_text("{Time: Tempo}")
    assert job.draw() == ["left", "right"]


def test_another_version_of_a_library_draws_everything(job, monkeypatch):
    job.draw()
    monkeypatch.setattr(_drawing, "_software", lambda: {"matplotlib": "0"})
    assert job.draw() == ["left", "right"]


@pytest.mark.parametrize("harm", [lambda path: path.unlink(), lambda path: path.write_bytes(b"")])
def test_what_was_kept_and_is_not_whole_is_drawn_again(job, harm):
    job.draw()
    harm(_drawing.KEPT / "left" / "left.en.png")
    assert job.draw() == ["left"]


def test_a_note_that_cannot_be_read_draws_the_figure_again(job):
    job.draw()
    (_drawing.KEPT / "left" / "origin.json").write_text("[")
    assert job.draw() == ["left"]


def test_a_figure_that_is_edited_by_hand_is_drawn_again(job):
    """It shares its bytes with what is kept, where the file system allows two names."""
    job.draw()
    first = job.files()
    with Path("figures/left.en.svg").open("ab") as file:
        file.write(b"<!-- mine -->")
    job.draw()
    assert job.files() == first


def test_figures_of_one_job_do_not_see_what_another_does_to_their_table(job):
    job.plans["again"] = _drawing.Plan("left", ["left.csv"], [], "1")
    job.draw()
    assert Path("figures/again.en.png").read_bytes() == Path("figures/left.en.png").read_bytes()


def test_a_figure_that_breaks_is_named_and_keeps_no_other_from_being_drawn(job):
    job.module("left", broken)
    with pytest.raises(ExceptionGroup, match="cannot be drawn: left") as caught:
        job.draw()
    assert "while drawing the figure left" in caught.value.exceptions[0].__notes__
    assert Path("figures/right.en.pdf").exists()
    job.module("left", bars)
    assert job.draw() == ["left"]


def test_a_table_that_a_figure_refuses_ends_in_one_line_with_its_name(job):
    job.module("right", refused)
    with pytest.raises(InputError, match=r"^figure right: no row of this machine$"):
        job.draw()


def test_a_full_disk_ends_the_job_as_what_it_is(job, monkeypatch):
    def full(path: Path, data: bytes) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(documents, "write_bytes_atomic", full)
    with pytest.raises(OSError, match="No space left"):
        job.draw()


def test_seaborn_comes_in_without_scipy_and_scipy_can_be_had_afterwards():
    program = (
        "import sys\n"
        "from kvbench.figures import _drawing\n"
        "with _drawing.without('scipy'):\n"
        "    from kvbench.figures import style\n"
        "assert 'seaborn' in sys.modules and 'scipy' not in sys.modules\n"
        "import scipy.special\n"
    )
    env = os.environ | {"PYTHONPATH": str(Path(_drawing.__file__).parents[2])}
    subprocess.run([sys.executable, "-c", program], env=env, check=True)


# Which figures share a job --------------------------------------------------------------------------

MODULES = {name: name for name in figures.names()} | {"symposium_turn": "symposium"}
STUDIES = studies.names()


def test_every_figure_is_drawn_by_one_job():
    groups = figures.together(MODULES, STUDIES)
    assert sorted(name for members in groups.values() for name in members) == sorted(MODULES)


def test_the_figures_of_the_suite_kv_share_a_job_and_those_of_each_scenario_another():
    groups = figures.together(MODULES, STUDIES)
    assert {"kv_latency", "kv_memory", "kv_quality", "roofline"} <= set(groups["kv"])
    assert groups["symposium"] == ["symposium_turn"]


def test_a_figure_of_a_study_waits_for_no_other_study():
    groups = figures.together({n: n for n in ("app_eviction", "app_semantic")}, STUDIES)
    assert groups == {"app_eviction": ["app_eviction"], "app_semantic": ["app_semantic"]}
