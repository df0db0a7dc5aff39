"""Several requests at once: tokens, bytes, padding, names, numbers, and what cannot be."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence

import families
import pandas as pd
import pytest
from kvbench import documents, layout, physics, strategies
from kvbench.analysis import batches, metrics, selection, tables
from kvbench.errors import InputError, Unsupported
from kvbench.figures import kv_batch, style
from kvbench.inputs import configuration
from kvbench.inputs.scenarios import Scenario, Step
from kvbench.layout import EQUAL, MIXED
from kvbench.measurement import blocks, fitting
from kvbench.measurement.conversation import Request, Script, Talk
from kvbench.measurement.memory import cache_bytes
from kvbench.strategies import shape
from kvbench.strategies.base import Generation, Session
from kvbench.strategies.graph import StaticLoopSession

MAX_LENGTH, BATCH, NEW = 160, 3, 10
#: Prompts of two turns: what each row begins with, and what is asked then.
BEGINNING, QUESTION = list(range(300, 360)), [7, 8, 9]


def here(name: str) -> bool:
    """Whether a strategy runs on this CPU; HQQ must be visible from transformers' first import."""
    strategy = strategies.get(name)
    able = strategy.available(None, "cpu") is None and not strategy.compiled("cpu")
    return able and not name.startswith("quantized_hqq")


RUNNING = [name for name in strategies.names() if here(name)]
#: With windows, rests and chunks that the conversation outgrows.
SMALL = ["sliding_window-w16", "attention_sink-w12", "quantized-quanto-b4-r8", "dynamic-chunk16"]


def script(lengths: str, batch: int = BATCH) -> Script:
    requests = [Request(BEGINNING, False, NEW), Request(QUESTION, True, NEW)]
    return Script(requests, "conversation", batch, lengths)


def together(session: Session, turns: Script) -> list:
    """Both turns of all rows at once."""
    talk = Talk(session, turns, "cpu")
    return [talk.turn(index) for index in range(len(turns.requests))]


def one_by_one(session: Session, turns: list) -> list[list[list[int]]]:
    """Each turn's replies, every row held by itself, with the batch's own history."""
    replies: list[list[list[int]]] = [[] for _ in turns]
    for row in range(len(turns[0].prompts)):
        session.restart()
        for index, turn in enumerate(turns):
            reply = session.generate(turn.prompts[row], NEW, lambda: None)
            replies[index].append(reply.tokens)
    return replies


@pytest.fixture
def opened(tiny):
    """Open a session; the one before it is closed, since some change the model while they are open."""
    sessions = []

    def opened(name: str, batch: int = 1) -> Session:
        while sessions:
            sessions.pop().close()
        sessions.append(strategies.get(name).session(tiny, MAX_LENGTH, batch))
        return sessions[-1]

    yield opened
    while sessions:
        sessions.pop().close()


#: Strategies with the lengths that they take together; what they refuse is tested below. The library's
#: fp8 cache has one scale for all rows, so that a row's tokens depend on its companions.
TAKEN = [
    (name, lengths)
    for lengths in (EQUAL, MIXED)
    for name in (*RUNNING, *SMALL)
    if name != "quantized_fp8" and strategies.get(name).misfit_batch(None, lengths) is None
]


# Tokens ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "lengths"), TAKEN)
def test_every_row_has_the_tokens_it_has_alone(opened, name, lengths):
    turns = together(opened(name, BATCH), script(lengths))
    assert [turn.replies for turn in turns] == one_by_one(opened(name), turns)


@pytest.mark.parametrize("lengths", [EQUAL, MIXED])
def test_rows_say_different_things_so_that_equality_means_something(opened, lengths):
    for turn in together(opened("dynamic", BATCH), script(lengths)):
        assert len(set(map(tuple, turn.replies))) == BATCH


def test_the_loop_that_is_captured_on_a_gpu_serves_rows_of_one_length(opened, tiny):
    session = StaticLoopSession(tiny, MAX_LENGTH, capture=False, batch=BATCH)
    turns = together(session, script(EQUAL))
    assert [turn.replies for turn in turns] == one_by_one(opened("dynamic"), turns)


@pytest.mark.parametrize("name", ["dynamic_reuse", "static_reuse"])
@pytest.mark.parametrize("lengths", [EQUAL, MIXED])
def test_a_kept_cache_is_reused_by_all_rows(opened, name, lengths):
    first, second = together(opened(name, BATCH), script(lengths))
    assert first.generation.reused_tokens == 0
    assert second.generation.reused_tokens == len(BEGINNING) + NEW - 1


@pytest.mark.parametrize("family", families.CONFIGS)
@pytest.mark.parametrize("name", ["none", "dynamic", "static"])
def test_padded_rows_of_all_known_families_have_the_tokens_they_have_alone(family, name):
    model = families.build(family)
    strategy = strategies.get(name)
    if reason := strategy.available(model, "cpu"):
        pytest.skip(reason)
    turns = together(strategy.session(model, MAX_LENGTH, BATCH), script(MIXED))
    alone = one_by_one(strategy.session(model, MAX_LENGTH), turns)
    assert [turn.replies for turn in turns] == alone


@pytest.mark.parametrize("name", ["attention_sink", "kvpress_knorm", "static_graph"])
def test_what_cannot_be_padded_says_so_in_one_sentence(tiny, name):
    strategy = strategies.get(name)
    reason = strategy.misfit_batch(tiny, MIXED)
    assert reason.startswith(name)
    assert "\n" not in reason
    assert strategy.misfit_batch(tiny, EQUAL) is None


def test_a_session_that_takes_one_request_is_unsupported():
    with pytest.raises(Unsupported, match="one request at a time"):
        Session().generate_batch([[1], [2]], 2, lambda: None)


# Rows -----------------------------------------------------------------------------------------


def test_rows_of_equal_lengths_begin_at_different_tokens():
    turns = script(EQUAL)
    assert turns.opening(0, [1, 2, 3, 4]) == [1, 2, 3, 4]
    assert turns.opening(1, [1, 2, 3, 4]) == [2, 3, 4, 1]


def test_rows_of_mixed_lengths_go_down_to_about_half():
    turns = script(MIXED, batch=4)
    lengths = [len(turns.opening(row, range(100, 180))) for row in range(4)]
    assert lengths == [80, 70, 60, 50]


class Steps(Session):
    """Answers every row, and says each step once."""

    def __init__(self, short: int = 0) -> None:
        self._short = short

    def generate_batch(
        self, rows: Sequence[Sequence[int]], max_new_tokens: int, on_token: Callable[[], None]
    ) -> Generation:
        for _ in range(max_new_tokens):
            on_token()
        found = [[row] * max_new_tokens for row in range(len(rows))]
        found[-1] = found[-1][self._short :]
        return Generation(found[0], None, rows=found, padding=(0,) * len(rows))


def test_a_row_that_came_back_short_is_an_error():
    with pytest.raises(RuntimeError, match="9 tokens came back, 10 were asked for"):
        together(Steps(short=1), script(EQUAL))


def test_a_step_of_all_rows_is_one_gap():
    (first, _) = together(Steps(), script(EQUAL))
    assert len(first.timing.itl_s) == NEW - 1


# Bytes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "lengths"), [pair for pair in TAKEN if not strategies.get(pair[0]).reuses_turns]
)
def test_the_batch_holds_the_predicted_bytes(opened, tiny, name, lengths):
    first = together(opened(name, BATCH), script(lengths))[0]
    arch = physics.Architecture.from_config(tiny.architecture)
    traffic = strategies.get(name).traffic(MAX_LENGTH)
    updates = [len(BEGINNING), *[1] * (NEW - 1)]
    held = traffic.held_bytes(arch, updates, 4, BATCH)
    # The second turn has used the same cache where one is kept; the pool and the slots do not grow.
    cache = opened(name, BATCH).generate_batch(first.prompts, NEW, lambda: None).cache
    assert cache_bytes(cache) == held


def of_one_row(traffic: physics.Traffic, length: int) -> int:
    return traffic.held_bytes(ARCH, [length, *[1] * (NEW - 1)], 4)


ARCH = families.llama(2, 64, 2, 1, 64, 128, 2560, False, 4096)


@pytest.mark.parametrize(
    "traffic", [physics.Dynamic(), physics.Window(512), physics.Offloaded(), physics.Static(80)]
)
def test_padding_is_what_shorter_rows_would_not_hold(traffic):
    per_token = physics.kv_bytes(ARCH, 1, 4)
    updates = [60, *[1] * (NEW - 1)]
    assert traffic.padding_bytes(ARCH, updates, (0, 10, 20), 4) == 30 * per_token


def test_a_window_has_let_padding_go():
    updates = [60, *[1] * (NEW - 1)]
    assert physics.Window(16).padding_bytes(ARCH, updates, (0, 10, 20), 4) == 0


@pytest.mark.parametrize("traffic", [physics.NoCache(), physics.Paged(16, 480)])
def test_who_does_not_pad_wastes_nothing(traffic):
    assert traffic.padding_bytes(ARCH, [60, 1, 1], (0, 10, 20), 4) == 0


def test_padding_of_a_quantised_cache_is_packed_too():
    traffic = physics.Quantized(4, "quanto", 64, 128)
    expected = of_one_row(traffic, 60) - of_one_row(traffic, 40)
    assert traffic.padding_bytes(ARCH, [60, *[1] * (NEW - 1)], (0, 20), 4) == expected
    assert 0 < expected < 20 * physics.kv_bytes(ARCH, 1, 4)


# The roof -------------------------------------------------------------------------------------

CEILINGS = physics.Ceilings(
    read_bytes_per_s=1e10, prefill_flops_per_s=1e12, decode_flops_per_s=1e12
)


def predicted(batch: int) -> physics.Prediction:
    return physics.predicted_generation(
        ARCH, physics.Static(200), 100, 11, 4, CEILINGS, batch=batch
    )


def test_a_step_reads_the_weights_once_and_the_cache_of_every_row():
    weights = physics.decode_bytes(ARCH, 101, physics.NoCache(), 4) - physics.NoCache().read_bytes(
        ARCH, 101, 4
    )
    one, four = (physics.decode_bytes(ARCH, 101, physics.Static(200), 4, n) for n in (1, 4))
    # Of an untied table a row for each new token is read.
    assert four - one == 3 * physics.Static(200).read_bytes(ARCH, 101, 4) + 3 * 64 * 4
    assert four < 4 * one
    assert weights < one


def test_a_batch_is_held_against_the_rate_of_a_matrix_product():
    slow_vector = physics.Ceilings(
        read_bytes_per_s=1e15, prefill_flops_per_s=1e12, decode_flops_per_s=1e6
    )
    one, two = (
        physics.predicted_generation(ARCH, physics.Dynamic(), 100, 11, 4, slow_vector, batch=n)
        for n in (1, 2)
    )
    assert two.tpot_s < one.tpot_s / 1000


def test_a_step_of_a_batch_takes_longer_and_gives_more():
    one, sixteen = predicted(1), predicted(16)
    assert one.tpot_s < sixteen.tpot_s < 16 * one.tpot_s


# Names ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "name"),
    [
        (("symposium_turn", 1, EQUAL), "symposium_turn"),
        (("symposium_turn", 4, EQUAL), "symposium_turn-b4"),
        (("symposium_turn", 16, MIXED), "symposium_turn-b16-mixed"),
    ],
)
def test_a_batch_is_part_of_the_scenarios_name_and_can_be_read_back(given, name):
    assert layout.workload(*given) == name
    scenario, batch, lengths = layout.batch_of(name)
    assert (scenario, batch) == given[:2]
    assert lengths == (None if batch == 1 else given[2])


EXPERIMENT = {
    "name": "batches",
    "models": ["tiny"],
    "scenarios": ["steps"],
    "strategies": ["dynamic", "static"],
}
STEPS = Scenario(id="steps", kind="fixed", title="Steps", seed=1, steps=(Step(24, 5), Step(12, 4)))


def planned(**fields: object) -> dict[str, configuration.KvBlock]:
    given = {"kv": {"experiments": [EXPERIMENT | fields], "quiet_wait_s": 0}}
    config = configuration.fill(given, "mine.yaml")
    return configuration.plan_kv(config, {"steps": STEPS}, {"tiny": {}}, "mine.yaml")


def test_each_batch_is_a_block_of_its_own():
    assert list(planned(batch=[1, 4])) == [
        "batches/cpu/tiny/steps/r1",
        "batches/cpu/tiny/steps-b4/r1",
    ]


def test_a_batch_of_one_is_what_it_always_was():
    (block,) = planned(batch=1).values()
    assert block.id == next(iter(planned()))
    assert [cell.key for cell in block.cells] == [
        f"cpu/tiny/steps/{name}/r1" for name in ("dynamic", "static", "control")
    ]


def test_a_batch_is_not_scored_for_quality():
    cells = configuration.cells_of(
        planned(batch=[1, 2], strategies=["dynamic", "sliding_window"]).values()
    )
    assert {cell.batch for cell in cells.values() if cell.quality} == {1}


@pytest.mark.parametrize("batch", [0, -4, 2.5, "four", [1, 0], [], [2, 2], True, None])
def test_what_is_no_batch_is_refused_in_one_line(batch):
    with pytest.raises(InputError, match=r"mine\.yaml: kv\.experiments\[0\]\.batch") as error:
        planned(batch=batch)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("batch", [1, [1, 4]])
def test_one_request_has_no_lengths(batch):
    with pytest.raises(InputError, match="lengths is mixed but batch has a 1") as error:
        planned(batch=batch, lengths=MIXED)
    assert "\n" not in str(error.value)


# Blocks ---------------------------------------------------------------------------------------


@pytest.fixture
def measure(tmp_path, tiny_folder, facts, private_lock, undisturbed):
    """Measure a batch of the steps; what was said on the way is in ``said``."""
    from kvbench.inputs import tokens

    files = blocks.Files(
        tiny_folder, tmp_path / "prompts.json", tmp_path / "cpu.json", tmp_path / "journal.jsonl"
    )
    files.prompts.write_text(json.dumps(tokens.prompts(tiny_folder, STEPS)))
    files.environment.write_text(json.dumps(facts))

    def measure(**fields: object) -> dict[str, dict]:
        (block,) = planned(max_rounds=2, **fields).values()
        plan = block.as_dict()
        digests = dict.fromkeys(plan["cells"], "0" * 16)
        return blocks.measure(plan, files, digests, 1, measure.said.append)

    measure.said = []
    return measure


def test_the_record_of_a_batch_says_each_row(measure):
    found = measure(batch=3, lengths=MIXED, strategies=["dynamic", "paged"])
    for record in found.values():
        documents.check(record, "kv-cell", "record")
        assert record["cell"]["scenario"] == "steps-b3-mixed"
        assert (record["cell"]["batch"], record["cell"]["lengths"]) == (3, MIXED)
        first = record["turns"][0]
        assert [row["prompt_tokens"] for row in first["rows"]] == [24, 20, 16]
        assert all(row["as_alone"] for turn in record["turns"] for row in turn["rows"])
        assert first["kv_bytes"] == first["kv_bytes_predicted"]
    padded, paged = (found[name]["turns"][0] for name in ("dynamic", "paged"))
    assert padded["padded_tokens"] == 12
    assert padded["kv_bytes_padding"] == 12 * padded["kv_bytes"] // (3 * 28)
    assert (paged["padded_tokens"], paged["kv_bytes_padding"]) == (0, 0)
    assert padded["token_digest"] == paged["token_digest"]


def test_wrong_tokens_of_a_row_stand_in_the_record(measure, monkeypatch):
    right = type(strategies.get("static")).session

    def wrong(strategy, model, max_length, batch=1):
        session = right(strategy, model, max_length, batch)
        generate = session.generate_batch

        def swapped(*given):
            found = generate(*given)
            found.rows.reverse()
            return found

        session.generate_batch = swapped
        return session

    monkeypatch.setattr(type(strategies.get("static")), "session", wrong)
    monkeypatch.setattr(shape, "known", lambda _: True)
    found = measure(batch=2)
    assert [row["as_alone"] for row in found["static"]["turns"][0]["rows"]] == [False, False]
    assert all(row["as_alone"] for row in found["dynamic"]["turns"][0]["rows"])


def test_what_cannot_be_padded_is_unsupported(measure):
    found = measure(batch=2, lengths=MIXED, strategies=["dynamic", "attention_sink"])
    assert found["attention_sink"]["status"] == "unsupported"
    assert "padding" in found["attention_sink"]["reason"]
    assert found["dynamic"]["status"] == "ok"


def test_a_batch_beyond_memory_is_said_before_anything_is_measured(measure, monkeypatch):
    monkeypatch.setattr(fitting, "free_bytes", lambda device: 2 * 2**30)
    found = measure(batch=65536)
    assert {record["status"] for record in found.values()} == {"out_of_memory"}
    assert not any("loading" in line for line in measure.said)
    assert "a batch of 65536 needs about" in measure.said[0]
    assert "2.0 GiB are free; lower batch" in measure.said[0]


def test_only_the_cells_that_do_not_fit_fall_out():
    own = {"dynamic": 10, "control": 10, "static": 70}
    found = fitting.too_large(own, ["dynamic", "control"], 5, 100)
    assert list(found) == ["static"]
    assert fitting.too_large(own, ["dynamic", "control"], 5, None) == {}


# Tables ---------------------------------------------------------------------------------------


@pytest.fixture
def batch_record(make_record):
    def batch_record(strategy: str = "dynamic", batch: int = 4, lengths: str = EQUAL, **fields):
        scenario = layout.workload("talk", batch, lengths)
        record = make_record(strategy, scenario=scenario, **fields)
        record["cell"] |= {"batch": batch, "lengths": lengths if batch > 1 else None}
        for turn in record["turns"]:
            if batch > 1:
                turn |= {"padded_tokens": 0, "kv_bytes_padding": 0}
                turn["rows"] = [
                    {"prompt_tokens": 100, "token_digest": "a" * 64, "as_alone": row > 0}
                    for row in range(batch)
                ]
        return record

    return batch_record


def test_throughput_is_that_of_all_requests_and_of_one(batch_record):
    samples, summary = tables.kv_tables({"here": [batch_record(e2e=[[2.0]], new_tokens=11)]})
    assert samples["output_tokens_per_s"].tolist() == [pytest.approx(4 * 11 / 2)]
    (row,) = summary.to_dict("records")
    assert (row["batch"], row["lengths"]) == (4, EQUAL)
    assert row["output_tokens_per_s_median"] == pytest.approx(4 * 11 / 2)
    assert row["tokens_per_second_per_request_median"] == pytest.approx(11 / 2)
    assert row["tpot_s_median"] == pytest.approx((2.0 - 0.2) / 10)
    assert row["rows_as_alone"] == pytest.approx(3 / 4)
    conversations = metrics.conversations(samples)
    assert conversations["output_tokens_per_s"].tolist() == [pytest.approx(4 * 11 / 2)]


def test_one_request_has_its_own_throughput_and_no_rows(make_record):
    _, summary = tables.kv_tables({"here": [make_record(e2e=[[2.0]], new_tokens=11)]})
    (row,) = summary.to_dict("records")
    assert row["batch"] == 1
    assert row["lengths"] is None
    assert row["tokens_per_second_per_request_median"] == row["output_tokens_per_s_median"]
    assert math.isnan(row["rows_as_alone"])


def test_the_roof_of_a_batch_is_below_that_of_its_requests_one_by_one(batch_record):
    records = [batch_record(batch=n) for n in (1, 4)]
    _, summary = tables.kv_tables({"here": records}, {("here", "cpu", "float32"): CEILINGS})
    rows = summary.set_index("batch")
    one, four = rows.loc[1], rows.loc[4]
    assert one["predicted_tpot_s"] < four["predicted_tpot_s"] < 4 * one["predicted_tpot_s"]
    assert four["predicted_output_tokens_per_s"] > one["predicted_output_tokens_per_s"]
    assert four["predicted_output_tokens_per_s"] == pytest.approx(4 * 11 / four["predicted_e2e_s"])


def test_other_results_see_one_request_only(batch_record):
    samples, summary = tables.kv_tables({"here": [batch_record(batch=n) for n in (1, 4)]})
    assert selection.single(summary)["scenario"].tolist() == ["talk"]
    assert set(selection.single(samples)["batch"]) == {1}


# Figure ---------------------------------------------------------------------------------------


@pytest.fixture
def summary(batch_record) -> pd.DataFrame:
    records = [
        batch_record(strategy, batch, e2e=[[1.0 + batch / 10, 1.1 + batch / 10]])
        for strategy in ("dynamic", "static")
        for batch in (1, 4, 16)
    ]
    records.append(batch_record("dynamic", 4, MIXED))
    return tables.kv_tables({"here": records}, {("here", "cpu", "float32"): CEILINGS})[1]


def test_a_sweep_begins_with_one_request(summary):
    equal, mixed = batches.sweeps(summary)
    assert (equal.lengths, equal.scenario) == (EQUAL, "talk")
    assert equal.rows["requests"].tolist() == [1, 1, 4, 4, 16, 16]
    assert (mixed.lengths, mixed.rows["requests"].tolist()) == (MIXED, [1, 4])


def test_one_request_of_other_turns_begins_no_sweep(summary):
    alone = summary["batch"] == 1
    summary.loc[alone, "turns"] = 7
    equal, *mixed = batches.sweeps(summary)
    assert set(equal.rows["requests"]) == {4, 16}
    assert mixed == []


def test_the_figure_has_a_line_per_strategy_and_the_roof(summary):
    style.apply()
    speed, time = kv_batch.draw(summary).subfigs[0].axes
    assert "tokens/s" in speed.get_ylabel()
    assert "(ms)" in time.get_ylabel()
    # Two strategies with their intervals, and the dashed roof.
    for ax in (speed, time):
        assert len(ax.containers) == 2
        assert [line.get_linestyle() for line in ax.lines].count("--") == 1


def test_without_two_batches_the_figure_says_so(summary):
    drawn = kv_batch.draw(selection.single(summary))
    assert "two batches" in " ".join(text.get_text() for text in drawn.texts)
    assert kv_batch.draw(summary.iloc[:0]).texts
