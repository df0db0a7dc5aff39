"""Blocks: processes side by side, turn by turn, in rounds that are kept, resumed and never repeated."""

from __future__ import annotations

import fcntl
import json
import os
import select
import signal
import time
from collections.abc import Callable, Sequence
from itertools import pairwise
from multiprocessing import Pipe
from pathlib import Path

import pytest
from kvbench import records, strategies
from kvbench.analysis import paired
from kvbench.errors import InputError
from kvbench.inputs import configuration, models
from kvbench.measurement import blocks, clock, fitting, placement, processes
from kvbench.measurement.cell import Cell, Job
from kvbench.records.identity import CONTROL
from kvbench.strategies.base import Generation, Session
from talk import TALK, write_prompts

pytestmark = pytest.mark.usefixtures("private_lock", "undisturbed")

#: Rounds of a block that nothing ends before.
ROUNDS = 4


class Bench:
    """A small block on the tiny model: two turns of four tokens, four rounds unless said otherwise."""

    def __init__(self, folder: Path, model: Path, facts: dict) -> None:
        self.files = blocks.Files(
            model, folder / "prompts.json", folder / "cpu.json", folder / "journal.jsonl"
        )
        write_prompts(self.files.prompts, model)
        self.files.environment.write_text(json.dumps(facts))
        self.code = "0" * 16
        self.said: list[str] = []

    def plan(self, names: Sequence[str] = ("none", "dynamic", "static"), **fields: object) -> dict:
        experiment = {
            "name": "test",
            "models": ["tiny"],
            "scenarios": ["talk"],
            "strategies": list(names),
            "turns": 2,
            "max_new_tokens": 4,
            "max_rounds": ROUNDS,
        }
        config = configuration.fill(
            {"kv": {"experiments": [experiment | fields], "quiet_wait_s": 0}}, "test"
        )
        planned = configuration.plan_kv(config, {"talk": TALK}, {"tiny": {}}, "test")
        (block,) = planned.values()
        return block.as_dict()

    def measure(self, plan: dict, progress: Callable[[str], None] | None = None) -> dict[str, dict]:
        digests = dict.fromkeys(plan["cells"], self.code)
        return blocks.measure(plan, self.files, digests, 1, progress or self.said.append)


@pytest.fixture
def bench(tmp_path, tiny_folder, facts) -> Bench:
    return Bench(tmp_path, tiny_folder, facts)


def slots(found: dict[str, dict]) -> list[tuple[int, str, int, int]]:
    """Every slot of a block in the order it was taken: (slot, cell, turn, round)."""
    return sorted(
        (sample["slot"], name, turn["turn"], sample["round"])
        for name, record in found.items()
        for turn in record["turns"]
        for sample in turn["samples"]
    )


# Rounds ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def found(tmp_path_factory, tiny_folder):
    """The records of one undisturbed block."""
    from functools import partial

    from kvbench.measurement import lock, noise

    facts = {
        "digest": "0123456789abcdef",
        "cpu": "A processor",
        "cores": 2,
        "commit": "0123456789ab",
        "packages": {},
    }
    folder = tmp_path_factory.mktemp("block")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lock, "machine", partial(lock.machine, folder / "lock"))
        patch.setattr(noise, "busy", lambda others_s, wall_s: False)
        bench = Bench(folder, tiny_folder, facts)
        return bench.measure(bench.plan())


def test_every_cell_has_its_record_and_the_reference_has_a_control(found, tmp_path):
    assert list(found) == ["none", "dynamic", "static", "control"]
    for name, record in found.items():
        assert record["status"] == "ok"
        path = tmp_path / f"{name}.json"
        records.write(path, record)
        assert records.read(path) == record
    assert found["control"]["cell"]["strategy"] == "control"
    assert found["control"]["strategy_info"]["options"]["of"] == strategies.REFERENCE
    assert found["static"]["block"]["reference"] == strategies.REFERENCE
    assert found["static"]["block"]["control"] is True


def test_slots_alternate_turn_by_turn(found):
    taken = slots(found)
    assert [slot for slot, *_ in taken] == list(range(ROUNDS * 2 * 4))
    assert all(first[1] != second[1] for first, second in pairwise(taken[:4]))
    # In a round everybody takes turn 1 before anybody takes turn 2, in the same order.
    for number in range(ROUNDS):
        mine = [(turn, name) for _, name, turn, round in taken if round == number]
        assert [turn for turn, _ in mine] == [1] * 4 + [2] * 4
        assert [name for _, name in mine[:4]] == [name for _, name in mine[4:]]


def sliced(monkeypatch, seconds: float = 0.0) -> None:
    """Let a turn rest behind every token that comes so many seconds after it went on."""
    monkeypatch.setattr(clock, "SLICE_S", seconds)


def test_a_long_turn_hands_the_machine_over_and_its_slices_are_one_sample(
    bench, found, monkeypatch
):
    asked: list[tuple[int, str]] = []
    asking = processes.Worker.ask

    def ask(worker: processes.Worker, command: str, *arguments: object) -> object:
        asked.append((worker.pid, command))
        return asking(worker, command, *arguments)

    monkeypatch.setattr(processes.Worker, "ask", ask)
    sliced(monkeypatch)
    again = bench.measure(bench.plan(max_rounds=1))
    # Four tokens, and behind each of them a rest: no cell has two slices without all others between.
    taken = [pid for pid, command in asked if command in ("turn", "go_on")]
    rotation = taken[: len(again)]
    assert len(set(rotation)) == len(again)
    assert taken == rotation * (2 * 5)
    for name, record in again.items():
        samples = [sample for turn in record["turns"] for sample in turn["samples"]]
        assert [sample["slices"] for sample in samples] == [5, 5]
        assert [len(sample["itl_s"]) for sample in samples] == [3, 3]
        digests = [turn["token_digest"] for turn in record["turns"]]
        assert digests == [turn["token_digest"] for turn in found[name]["turns"]]
        assert "slices" not in found[name]["turns"][0]["samples"][0]


def test_a_record_of_slices_is_valid(bench, monkeypatch, tmp_path):
    sliced(monkeypatch)
    record = bench.measure(bench.plan(["dynamic"], max_rounds=1))["dynamic"]
    records.write(tmp_path / "r1.json", record)
    assert records.read(tmp_path / "r1.json") == record


def test_a_cell_killed_while_it_rests_is_failed_and_the_others_go_on(bench, monkeypatch):
    sliced(monkeypatch)
    asking = processes.Worker.ask
    resting: list[int] = []

    def ask(worker: processes.Worker, command: str, *arguments: object) -> object:
        answer = asking(worker, command, *arguments)
        if answer is processes.RESTING and not resting:
            resting.append(worker.pid)
            os.kill(worker.pid, signal.SIGKILL)
        return answer

    monkeypatch.setattr(processes.Worker, "ask", ask)
    found = bench.measure(bench.plan(["none", "static", "offloaded"], max_rounds=2))
    states = sorted(record["status"] for record in found.values())
    assert states.count("failed") == 1 and len(states) == len(set(found))
    (lost,) = [record for record in found.values() if record["status"] == "failed"]
    assert "ended from outside (SIGKILL) in round 1, turn 1" in lost["reason"]


def test_every_round_has_an_order_of_its_own_and_the_record_says_it(found):
    orders = found["dynamic"]["block"]["order"]
    assert len(orders) == ROUNDS
    assert all(sorted(order) == sorted(found) for order in orders)
    assert len({tuple(order) for order in orders}) > 1
    taken = slots(found)
    assert [name for _, name, turn, round in taken if (turn, round) == (1, 2)] == orders[2]


def test_the_probe_is_timed_in_every_round(found):
    block = found["none"]["block"]
    assert len(block["probe_s"]) == block["rounds"] == ROUNDS
    assert all(seconds > 0 for seconds in block["probe_s"])


def test_a_sample_says_its_round_as_iteration_too(found):
    for turn in found["static"]["turns"]:
        assert [sample["round"] for sample in turn["samples"]] == list(range(ROUNDS))
        assert [sample["iteration"] for sample in turn["samples"]] == list(range(ROUNDS))
        assert all("round" not in sample for sample in turn["cold"])


def test_exact_cells_answer_alike(found):
    digests = {
        name: [turn["token_digest"] for turn in record["turns"]] for name, record in found.items()
    }
    assert len({tuple(values) for values in digests.values()}) == 1
    assert len(set(digests["none"])) == 2


def test_the_record_names_block_and_the_way_its_process_came_about(found):
    assert found["none"]["cell"]["block"] == "test/cpu/tiny/talk/r1"
    assert found["none"]["block"]["id"] == "test/cpu/tiny/talk/r1"
    assert {record["block"]["processes"] for record in found.values()} == {"forked"}


def test_the_main_threads_of_all_cells_share_one_processor(found):
    allowed = placement.processors()
    place = allowed[0] if len(allowed) > 1 else None
    assert {record["block"]["main_cpu"] for record in found.values()} == {place}
    assert found["none"]["block"]["members"] == list(found)


def test_a_profile_is_made_where_the_experiment_asks_for_it_but_not_of_the_control(bench, found):
    asked = bench.measure(bench.plan(["dynamic", "static"], profile=True, max_rounds=1))
    assert {name for name, record in asked.items() if "profile" in record} == {"dynamic", "static"}
    assert {record["profile"]["status"] for record in asked.values() if "profile" in record} == {
        "ok"
    }
    assert not any("profile" in record for record in found.values())
    # The pass is not one of the turns.
    assert digests(asked["dynamic"]) == digests(found["dynamic"])


def digests(record: dict) -> list[str]:
    """What the tokens of each turn add up to."""
    return [turn["token_digest"] for turn in record["turns"]]


def test_the_same_seed_draws_the_same_orders(bench, found):
    again = bench.measure(bench.plan())
    assert again["none"]["block"]["order"] == found["none"]["block"]["order"]


def test_a_strategy_measured_once_takes_part_in_the_first_round_only(bench):
    found = bench.measure(bench.plan(once=["none"]))
    assert [len(turn["samples"]) for turn in found["none"]["turns"]] == [1, 1]
    assert [len(turn["samples"]) for turn in found["static"]["turns"]] == [ROUNDS] * 2
    assert [("none" in order) for order in found["none"]["block"]["order"]] == [
        True,
        *[False] * (ROUNDS - 1),
    ]


def test_a_strategy_of_few_rounds_has_them_and_the_others_go_on(bench):
    block = bench.measure(bench.plan(rounds={"none": 2}, budget_s=600000))["none"]["block"]
    assert sum("none" in order for order in block["order"]) == 2
    assert sum("static" in order for order in block["order"]) == ROUNDS


def test_a_slowed_cell_says_of_every_sample_how_long_it_idled(bench):
    plan = bench.plan(max_rounds=1)
    plan["cells"]["static"] |= {"slowdown": 0.5, "arm": "slowed"}
    found = bench.measure(plan)
    for turn in found["static"]["turns"]:
        (sample,) = turn["samples"]
        # How much of it is tested on a clock that nothing disturbs (test_conversation.py).
        assert 0 < sample["injected_s"] < sample["e2e_s"]
    assert "injected_s" not in found["none"]["turns"][0]["samples"][0]


# When rounds end ------------------------------------------------------------------------------


def test_most_rounds_end_a_block(found):
    assert found["none"]["block"]["stopped"] == "rounds"


def test_an_exhausted_budget_ends_with_one_round(bench):
    block = bench.measure(bench.plan(budget_s=1e-9))["dynamic"]["block"]
    assert (block["rounds"], block["stopped"]) == (1, "budget")


def play(monkeypatch, seconds: Callable[[str, int], float]) -> None:
    """Replace the clock: what a cell's turn takes is said by cell and round."""
    playing = blocks.rounds.play
    number = iter(range(10**6))

    def played(*arguments, **given):
        round = next(number)
        found = playing(*arguments, **given)
        for slot in found:
            slot["e2e_s"] = seconds(slot["strategy"], round)
        return found

    monkeypatch.setattr(blocks.rounds, "play", played)


def test_rounds_end_when_every_ratio_is_known_to_the_precision(bench, monkeypatch):
    # The ratios are the same in every round, whatever the machine does.
    play(monkeypatch, lambda name, round: (2.0 if name == "none" else 1.0) * (1 + round % 3))
    found = bench.measure(bench.plan(max_rounds=100, budget_s=600000))
    block = found["none"]["block"]
    assert block["stopped"] == "precision"
    assert block["rounds"] == paired.FEWEST_ROUNDS + paired.CONFIRMING_ROUNDS
    assert block["half_width"] == pytest.approx(0.0, abs=1e-9)
    assert block["control_ratio"] == pytest.approx(1.0)


def test_who_is_known_rests_and_the_record_and_the_log_say_so(bench, monkeypatch):
    # `static` goes up and down against the reference by too much to be known in 20 rounds.
    play(monkeypatch, lambda name, round: 1.0 + (name == "static") * 0.5 * (round % 2))
    found = bench.measure(bench.plan(max_rounds=20, budget_s=600000))
    soonest = paired.FEWEST_ROUNDS + paired.CONFIRMING_ROUNDS
    for record in found.values():
        assert record["block"]["rested"] == {"none": soonest}
    assert found["none"]["turns"][0]["samples"][-1]["round"] == soonest - 1
    assert "known well enough, and resting: none" in bench.said
    assert {"none"} == set(found) - set(found["none"]["block"]["order"][-1])


def test_a_block_taken_up_again_lets_the_same_cells_rest(bench, monkeypatch):
    play(monkeypatch, lambda name, round: 1.0 + (name == "static") * 0.5 * (round % 2))
    plan = bench.plan(max_rounds=20, budget_s=600000)
    whole = bench.measure(plan)["none"]["block"]
    lines = bench.files.journal.read_text().splitlines(keepends=True)
    # The conditions and seventeen rounds, two of which were without `none`.
    bench.files.journal.write_text("".join(lines[:18]))
    again = bench.measure(plan)["none"]["block"]
    assert again["resumed"] == [17]
    assert (again["order"], again["rested"]) == (whole["order"], whole["rested"])


def test_a_block_whose_control_differs_is_measured_until_its_budget_ends(bench, monkeypatch):
    play(monkeypatch, lambda name, round: 1.1 if name == "control" else 1.0)
    block = bench.measure(bench.plan(max_rounds=20, budget_s=600000))["static"]["block"]
    assert block["stopped"] == "rounds"
    assert block["rounds"] == 20
    assert block["control_ratio"] == pytest.approx(1.1)


def test_a_strategy_measured_once_keeps_no_block_from_ending(bench, monkeypatch):
    play(monkeypatch, lambda name, round: 1.0)
    block = bench.measure(bench.plan(max_rounds=100, budget_s=600000, once=["none"]))["none"][
        "block"
    ]
    assert block["stopped"] == "precision"


def test_without_the_reference_the_fewest_rounds_are_made(bench):
    found = bench.measure(bench.plan(["none", "static"], min_rounds=2))
    assert list(found) == ["none", "static"]
    block = found["none"]["block"]
    assert (block["reference"], block["control"]) == (None, False)
    assert (block["rounds"], block["stopped"]) == (2, "rounds")


# What fails inside a cell is data -------------------------------------------------------------


class Dying(Session):
    """Generates until its process ends in the turn that the test names."""

    def __init__(self, inner: Session, turns: int, end: Callable[[], None]) -> None:
        self._inner, self._left, self._end = inner, turns, end

    def generate(
        self, token_ids: Sequence[int], max_new_tokens: int, on_token: Callable[[], None]
    ) -> Generation:
        if not self._left:
            self._end()
        self._left -= 1
        return self._inner.generate(token_ids, max_new_tokens, on_token)

    def restart(self) -> None:
        self._inner.restart()


def dying(monkeypatch, name: str, turns: int, end: Callable[[], None]) -> None:
    """Have the sessions of a strategy end after some turns."""
    strategy = type(strategies.get(name))
    opening = strategy.session
    monkeypatch.setattr(
        strategy, "session", lambda self, *given: Dying(opening(self, *given), turns, end)
    )


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_cell_killed_from_outside_is_failed_and_the_others_go_on(bench, monkeypatch):
    # A warm-up of two turns, one round, and the first turn of the next.
    dying(monkeypatch, "static", 5, kill)
    found = bench.measure(bench.plan())
    assert found["static"]["status"] == "failed"
    assert "ended from outside (SIGKILL) in round 2, turn 2" in found["static"]["reason"]
    assert found["static"]["turns"] == []
    assert [len(turn["samples"]) for turn in found["none"]["turns"]] == [ROUNDS] * 2
    assert found["none"]["status"] == "ok"


def test_a_cell_that_the_kernel_ended_for_want_of_memory_is_out_of_memory(bench, monkeypatch):
    kills = iter([0] * 4)
    monkeypatch.setattr(processes, "_out_of_memory_kills", lambda: next(kills, 1))
    dying(monkeypatch, "static", 5, kill)
    assert bench.measure(bench.plan())["static"]["status"] == "out_of_memory"


def test_an_error_inside_a_cell_is_its_reason(bench, monkeypatch):
    def fail() -> None:
        raise RuntimeError("the kernel\n refused")

    dying(monkeypatch, "none", 3, fail)
    found = bench.measure(bench.plan())
    assert found["none"]["status"] == "failed"
    assert found["none"]["reason"].startswith("RuntimeError: the kernel refused")
    assert found["static"]["status"] == "ok"


def test_memory_that_torch_cannot_get_is_out_of_memory(bench, monkeypatch):
    import torch

    static = type(strategies.get("static"))
    monkeypatch.setattr(static, "session", lambda *_: torch.empty(2**60))
    assert bench.measure(bench.plan())["static"]["status"] == "out_of_memory"


def test_an_unsupported_strategy_says_why_and_costs_no_process(bench):
    found = bench.measure(bench.plan(["dynamic", "offloaded"]))
    assert found["offloaded"]["block"]["stopped"] is None
    assert found["offloaded"]["status"] == "unsupported"
    assert "cuda" in found["offloaded"]["reason"]
    assert found["dynamic"]["block"]["order"][0] != []
    assert all("offloaded" not in order for order in found["dynamic"]["block"]["order"])


def test_a_model_that_cannot_be_loaded_fails_every_cell(bench, monkeypatch):
    def load(*_: object) -> None:
        raise OSError("no such weights")

    monkeypatch.setattr(models, "load", load)
    found = bench.measure(bench.plan())
    assert {record["status"] for record in found.values()} == {"failed"}
    assert all("no such weights" in record["reason"] for record in found.values())


def test_wrong_inputs_end_the_block_without_records(bench, monkeypatch):
    def load(*_: object) -> None:
        raise InputError("models/x: no weights")

    monkeypatch.setattr(models, "load", load)
    with pytest.raises(InputError, match="no weights"):
        bench.measure(bench.plan())


# Interruptions --------------------------------------------------------------------------------


def gone(pid: int) -> bool:
    """Whether a process ends within ten seconds."""
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    try:
        return bool(select.select([descriptor], [], [], 10)[0])
    finally:
        os.close(descriptor)


def killed_after(bench: Bench, plan: dict, rounds: int, number: int = signal.SIGKILL) -> list[int]:
    """Measure in a child of this process that is killed after some rounds; the pids of its cells."""
    pids = bench.files.journal.with_name("pids")
    pids.write_text("")
    forking = processes.fork

    def fork(*given: object) -> processes.Worker:
        worker = forking(*given)
        with pids.open("a") as stream:
            stream.write(f"{worker.pid}\n")
        return worker

    def progress(line: str) -> None:
        if line.startswith(f"round {rounds} "):
            os.kill(os.getpid(), number)

    child = os.fork()
    if not child:
        try:
            processes.fork = fork
            bench.measure(plan, progress)
        finally:
            os._exit(7)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) in (-number, 7)
    return [int(line) for line in pids.read_text().split()]


def test_a_killed_block_goes_on_behind_its_finished_rounds(bench):
    plan = bench.plan()
    killed_after(bench, plan, 2)
    kept = [json.loads(line) for line in bench.files.journal.read_text().splitlines()]
    assert [piece["round"] for piece in kept[1:]] == [0, 1]
    found = bench.measure(plan)
    for record in found.values():
        for turn in record["turns"]:
            assert [sample["round"] for sample in turn["samples"]] == list(range(ROUNDS))
    first = {slot["slot"]: slot["e2e_s"] for piece in kept[1:] for slot in piece["slots"]}
    samples = [s for r in found.values() for turn in r["turns"] for s in turn["samples"]]
    assert {s["slot"]: s["e2e_s"] for s in samples if s["slot"] in first} == first
    assert found["none"]["block"]["resumed"] == [2]
    assert [slot for slot, *_ in slots(found)] == list(range(ROUNDS * 2 * 4))


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_no_process_of_a_block_outlives_it(bench, number):
    pids = killed_after(bench, bench.plan(), 1, number)
    assert len(pids) == 4
    assert all(gone(pid) for pid in pids)


def test_the_cells_processes_are_gone_when_a_block_is_finished(bench, monkeypatch):
    pids: list[int] = []
    forking = processes.fork

    def fork(*given: object) -> processes.Worker:
        worker = forking(*given)
        pids.append(worker.pid)
        return worker

    monkeypatch.setattr(processes, "fork", fork)
    bench.measure(bench.plan())
    assert len(pids) == 4
    assert all(gone(pid) for pid in pids)


def test_a_half_written_round_is_left_out(bench):
    plan = bench.plan()
    killed_after(bench, plan, 2)
    text = bench.files.journal.read_text()
    bench.files.journal.write_text(text[: -len(text) // 10])
    found = bench.measure(plan)
    assert found["none"]["block"]["resumed"] == [1]
    assert [slot for slot, *_ in slots(found)] == list(range(ROUNDS * 2 * 4))


@pytest.mark.parametrize("change", ["code", "machine", "prompts", "settings"])
def test_rounds_under_other_conditions_start_anew_and_say_so(bench, facts, change):
    plan = bench.plan()
    killed_after(bench, plan, 2)
    if change == "code":
        bench.code = "1" * 16
    elif change == "machine":
        bench.files.environment.write_text(json.dumps(facts | {"digest": "f" * 16}))
    elif change == "prompts":
        document = json.loads(bench.files.prompts.read_text())
        bench.files.prompts.write_text(json.dumps(document | {"first": document["first"][:-1]}))
    else:
        plan = bench.plan(max_new_tokens=5)
    found = bench.measure(plan)
    assert f"rounds of an earlier start are left out: other {change}" in bench.said
    assert found["none"]["block"]["resumed"] == []
    assert found["none"]["block"]["rounds"] == ROUNDS


def test_another_precision_goes_on_with_the_rounds_there_are(bench):
    killed_after(bench, bench.plan(), 2)
    found = bench.measure(bench.plan(precision=0.5, max_rounds=3))
    assert found["none"]["block"]["resumed"] == [2]
    assert found["none"]["block"]["rounds"] == 3


def test_a_block_that_was_whole_goes_on_when_more_rounds_are_asked_for(bench):
    bench.measure(bench.plan(precision=0.0001, min_rounds=2, max_rounds=2))
    found = bench.measure(bench.plan(precision=0.0001, min_rounds=2, max_rounds=3))
    assert found["none"]["block"]["resumed"] == [2]
    assert found["none"]["block"]["rounds"] == 3


def test_a_block_whose_last_record_was_not_written_measures_nothing_again(bench, monkeypatch):
    plan = bench.plan()
    first = bench.measure(plan)
    assert bench.files.journal.exists()

    def fork(*_: object) -> None:
        raise AssertionError("nothing has to be measured")

    monkeypatch.setattr(processes, "fork", fork)
    again = bench.measure(plan)
    assert {n: r["turns"] for n, r in again.items()} == {n: r["turns"] for n, r in first.items()}


def test_why_a_cell_failed_is_known_to_a_start_that_measures_nothing_again(bench, monkeypatch):
    dying(monkeypatch, "static", 5, kill)
    plan = bench.plan()
    reason = bench.measure(plan)["static"]["reason"]
    assert "SIGKILL" in reason
    again = bench.measure(plan)
    assert again["static"]["reason"] == reason
    assert again["static"]["status"] == "failed"


PHASES = ("open", "warm_up", "settle", "begin", "turn", "finish")


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("who", ["static", strategies.REFERENCE, CONTROL])
def test_a_cell_killed_in_any_phase_is_failed_and_the_others_go_on(bench, monkeypatch, phase, who):
    step = getattr(Cell, phase)

    def dying_step(cell: Cell, *given: object) -> object:
        if cell._job.cell["strategy"] == who:
            kill()
        return step(cell, *given)

    monkeypatch.setattr(Cell, phase, dying_step)
    found = bench.measure(bench.plan(max_rounds=2))
    assert found[who]["status"] == "failed"
    assert "SIGKILL" in found[who]["reason"]
    others = {name: record for name, record in found.items() if name != who}
    assert {record["status"] for record in others.values()} == {"ok"}
    assert {len(record["turns"][0]["samples"]) for record in others.values()} == {2}
    assert found["none"]["block"]["control"] is (who != CONTROL)


def test_a_full_disk_is_one_line_and_keeps_the_rounds_so_far(bench, monkeypatch):
    plan = bench.plan()
    written = iter(range(3))

    def fsync(descriptor: int) -> None:
        if next(written, None) is None:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(InputError, match="No space left on device") as error:
        bench.measure(plan)
    assert str(bench.files.journal) in str(error.value)
    monkeypatch.undo()
    assert len(bench.files.journal.read_text().splitlines()) >= 3


def test_a_second_checkout_waits_while_a_block_has_the_machine(bench, private_lock):
    playing, go_on = os.pipe(), os.pipe()

    def progress(line: str) -> None:
        if line.startswith("round 1 "):
            os.write(playing[1], b"x")
            os.read(go_on[0], 1)

    child = os.fork()
    if not child:
        try:
            bench.measure(bench.plan(["dynamic"], max_rounds=2), progress)
        finally:
            os._exit(0)
    os.read(playing[0], 1)
    # What another checkout's block would ask for, without waiting.
    with private_lock.open() as handle, pytest.raises(BlockingIOError):
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    os.write(go_on[1], b"x")
    os.waitpid(child, 0)
    with private_lock.open() as handle:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    assert len(bench.files.journal.read_text().splitlines()) == 1 + 2 + 2 + 1


# Processor time -------------------------------------------------------------------------------


def test_what_a_process_spins_after_its_answer_counts_as_its_own(monkeypatch):
    """Unseen until its next answer, it would look like somebody else's for a whole round."""
    ours, theirs = Pipe()
    child = os.fork()
    if not child:
        while time.process_time() < 0.05:
            pass
        theirs.send("spun")
        signal.pause()
        os._exit(0)
    worker = processes.Worker(child, ours, processes.FORKED)
    try:
        assert ours.recv() == "spun"
        assert worker.cpu_s >= 0.05
    finally:
        worker.end()
    # What is gone has not given its time back.
    assert worker.cpu_s >= 0.05


# Memory ---------------------------------------------------------------------------------------


def test_cells_that_do_not_fit_together_are_split_and_it_is_said_before(bench, monkeypatch):
    sizes = {"static": 60, "none": 60, "dynamic": 10, "control": 10}
    monkeypatch.setattr(fitting, "needs", lambda cell, *_: (sizes[cell["strategy"]], 0))
    monkeypatch.setattr(fitting, "free_bytes", lambda device: 100)
    found = bench.measure(bench.plan(max_rounds=2))
    (line,) = [line for line in bench.said if "do not fit" in line]
    assert bench.said.index(line) < bench.said.index("loading the model")
    block = found["dynamic"]["block"]
    assert block["parts"] == [["dynamic", "control", "none"], ["dynamic", "control", "static"]]
    assert [sorted(order) for order in block["order"]] == [
        ["control", "dynamic", "none"],
        ["control", "dynamic", "none"],
        ["control", "dynamic", "static"],
        ["control", "dynamic", "static"],
    ]
    assert [s["round"] for s in found["static"]["turns"][0]["samples"]] == [2, 3]
    assert [s["round"] for s in found["dynamic"]["turns"][0]["samples"]] == [0, 1, 2, 3]
    assert [slot for slot, *_ in slots(found)] == list(range(4 * 2 * 3))


@pytest.mark.parametrize(
    ("free", "rounds", "parts"),
    [
        # Another process has given its memory back: what was closed stays, what is left is measured.
        ((100, 1000), 3, [["dynamic", "control", "none"], ["dynamic", "control", "static"]]),
        # Another process has taken some: two rounds were all together, the rest is split.
        ((1000, 100), 2, [["dynamic", "control", "none"], ["dynamic", "control", "static"]]),
    ],
)
def test_a_split_block_taken_up_under_other_memory_loses_no_cell(
    bench, monkeypatch, free, rounds, parts
):
    sizes = {"static": 60, "none": 60, "dynamic": 10, "control": 10}
    monkeypatch.setattr(fitting, "needs", lambda cell, *_: (sizes[cell["strategy"]], 0))
    monkeypatch.setattr(fitting, "free_bytes", lambda device: free[0])
    plan = bench.plan(max_rounds=rounds - 1 if rounds == 3 else ROUNDS)
    killed_after(bench, plan, rounds)
    monkeypatch.setattr(fitting, "free_bytes", lambda device: free[1])
    found = bench.measure(plan)
    assert {name: record["reason"] for name, record in found.items()} == dict.fromkeys(found)
    assert found["dynamic"]["block"]["parts"] == parts
    assert found["dynamic"]["block"]["resumed"] == [rounds]
    taken = [slot for slot, *_ in slots(found)]
    assert taken == list(range(len(taken)))


def test_memory_is_asked_for_when_the_machine_is_ours(bench, private_lock, monkeypatch):
    """Another checkout's block would be counted as taken memory, and be disturbed by the loading."""
    locked = []
    for module, name in ((fitting, "free_bytes"), (models, "load")):
        original = getattr(module, name)

        def asked(*given: object, original: Callable = original) -> object:
            with private_lock.open() as handle, pytest.raises(BlockingIOError):
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            locked.append(original)
            return original(*given)

        monkeypatch.setattr(module, name, asked)
    bench.measure(bench.plan(["dynamic"], max_rounds=1))
    assert len(locked) == 2


@pytest.mark.parametrize(
    ("free", "expected"),
    [
        (None, [["r", "c", "a", "b", "d"]]),
        (1000, [["r", "c", "a", "b", "d"]]),
        (400, [["r", "c", "a"], ["r", "c", "b", "d"]]),
        (10, [["r", "c", "a"], ["r", "c", "b"], ["r", "c", "d"]]),
    ],
)
def test_parts_hold_what_all_are_compared_with(free, expected):
    own = {"r": 20, "c": 20, "a": 200, "b": 150, "d": 50}
    assert fitting.parts(own, ["r", "c"], 100, free) == expected


def test_a_fresh_process_needs_weights_of_its_own(bench, tiny_folder):
    cell = bench.plan()["cells"]["static"]
    turns = blocks.script(json.loads(bench.files.prompts.read_text()), cell)
    forked, weights = fitting.needs(cell, tiny_folder, turns, processes.FORKED)
    fresh, _ = fitting.needs(cell, tiny_folder, turns, processes.FRESH)
    assert fresh == forked + weights
    assert weights > 0


def test_a_limit_of_the_address_space_counts_as_memory(monkeypatch):
    monkeypatch.setattr(fitting.resource, "getrlimit", lambda _: (4096, 4096))
    assert fitting.free_bytes("cpu") == 4096


# Fresh processes ------------------------------------------------------------------------------


def test_a_process_started_afresh_measures_the_same_tokens(bench, found, monkeypatch):
    monkeypatch.setattr(blocks, "_kind", lambda cell: processes.FRESH)
    fresh = bench.measure(bench.plan(["dynamic"], max_rounds=2))
    assert {record["block"]["processes"] for record in fresh.values()} == {"fresh"}
    assert [turn["token_digest"] for turn in fresh["dynamic"]["turns"]] == [
        turn["token_digest"] for turn in found["dynamic"]["turns"]
    ]


@pytest.mark.skipif(len(placement.processors()) < 2, reason="one processor only")
@pytest.mark.parametrize("strategy", ["dynamic", "paged"])
def test_the_threads_that_work_have_their_places_also_without_a_warm_up(bench, strategy):
    cell = bench.plan(["dynamic", "paged"])["cells"][strategy]
    everywhere = placement.processors()
    first, *rest = everywhere
    worker = processes.start(Job(cell, bench.files.model, bench.files.prompts, 2))
    try:
        worker.ask("open")
        worker.ask("settle")
        threads = [int(entry.name) for entry in Path(f"/proc/{worker.pid}/task").iterdir()]
        found = {thread: sorted(os.sched_getaffinity(thread)) for thread in threads}
    finally:
        worker.end()
    main = found.pop(worker.pid)
    # The engine of `paged` works in a thread of its own, which nobody may crowd.
    assert main == (everywhere if strategy == "paged" else [first])
    assert found
    assert set(map(tuple, found.values())) == {tuple(everywhere if strategy == "paged" else rest)}


@pytest.mark.parametrize(
    ("cell", "platform", "kind"),
    [
        ({"measured": "dynamic", "device": "cpu"}, "linux", "forked"),
        ({"measured": "dynamic", "device": "cuda"}, "linux", "fresh"),
        ({"measured": "dynamic", "device": "cpu"}, "darwin", "fresh"),
        ({"measured": "quantized_hqq_int4", "device": "cpu"}, "linux", "fresh"),
        ({"measured": "quantized_int4", "device": "cpu"}, "linux", "forked"),
    ],
)
def test_a_process_is_forked_where_that_is_safe(monkeypatch, cell, platform, kind):
    monkeypatch.setattr(blocks.sys, "platform", platform)
    assert blocks._kind(cell) == kind
