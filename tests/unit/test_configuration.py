"""From the configuration to cells: defaults, order, and one line for everything that is wrong."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from kvbench import documents, strategies
from kvbench.errors import InputError
from kvbench.inputs import configuration
from kvbench.strategies.looks import LOOKS

CONFIG = Path(__file__).resolve().parents[2] / "config"
SOURCE = "config/mine.yaml"
BLOCK = {
    "name": "first",
    "models": ["embedded"],
    "scenarios": ["banking_open_account"],
    "strategies": ["none", "dynamic"],
    "turns": 2,
    "max_new_tokens": 4,
}


@pytest.fixture(scope="module")
def known():
    return configuration.load_scenarios_and_models(CONFIG)


def config(*blocks: dict[str, Any], **kv: Any) -> dict[str, Any]:
    return {"kv": {**kv, "experiments": [copy.deepcopy(block) for block in blocks]}}


@pytest.fixture
def plan(known):
    def plan(*experiments: dict[str, Any], **kv: Any) -> dict[str, configuration.KvBlock]:
        filled = configuration.fill(config(*experiments, **kv), SOURCE)
        return configuration.plan_kv(filled, *known, SOURCE)

    return plan


@pytest.fixture
def cells(plan):
    def cells(*experiments: dict[str, Any], **kv: Any) -> dict[str, configuration.KvCell]:
        return configuration.cells_of(plan(*experiments, **kv).values())

    return cells


@pytest.fixture
def refused(plan):
    def refused(*blocks: dict[str, Any], **kv: Any) -> str:
        with pytest.raises(InputError) as error:
            plan(*blocks, **kv)
        return one_line(error)

    return refused


def one_line(error: pytest.ExceptionInfo) -> str:
    text = str(error.value)
    assert "\n" not in text
    assert text.startswith(f"{SOURCE}: ")
    return text


# What is planned ------------------------------------------------------------------------------


def test_an_experiment_is_the_full_cross_of_its_lists(cells):
    experiment = BLOCK | {
        "scenarios": ["banking_open_account", "ecommerce_support"],
        "strategies": ["none", "static"],
        "replicates": 2,
    }
    found = cells(experiment)
    assert len(found) == 2 * 2 * 2
    assert "cpu/embedded/ecommerce_support/none/r2" in found
    assert all(cell.key == key for key, cell in found.items())


def test_cells_that_share_model_scenario_and_replicate_are_a_block(plan):
    experiment = BLOCK | {
        "scenarios": ["banking_open_account", "ecommerce_support"],
        "replicates": 2,
    }
    blocks = plan(experiment)
    assert sorted(blocks) == [
        f"first/cpu/embedded/{scenario}/r{replicate}"
        for scenario in ("banking_open_account", "ecommerce_support")
        for replicate in (1, 2)
    ]
    for name, block in blocks.items():
        assert block.id == name
        assert [cell.strategy for cell in block.cells] == ["none", "dynamic", "control"]


def test_the_reference_runs_a_second_time_as_control(plan, cells):
    (block,) = plan(BLOCK).values()
    assert (block.reference, block.control) == ("dynamic", "control")
    control = cells(BLOCK)["cpu/embedded/banking_open_account/control/r1"]
    assert control.measured == "dynamic"


def test_a_block_without_the_reference_has_no_control(plan):
    (block,) = plan(BLOCK | {"strategies": ["none", "static"]}).values()
    assert (block.reference, block.control) == (None, None)
    assert [cell.strategy for cell in block.cells] == ["none", "static"]


def test_quality_is_scored_once_for_lossy_caches_and_for_the_reference_beside_them(cells):
    lossy = BLOCK | {
        "scenarios": ["banking_open_account"],
        "strategies": ["none", "dynamic", "quantized_int4"],
        "replicates": 2,
    }
    exact = BLOCK | {
        "name": "second",
        "scenarios": ["ecommerce_support"],
        "strategies": ["none", "dynamic"],
    }
    scored = {
        (c.scenario, c.strategy, c.replicate) for c in cells(lossy, exact).values() if c.quality
    }
    assert scored == {
        ("banking_open_account", "quantized_int4", 1),
        ("banking_open_account", "dynamic", 1),
    }


def test_an_experiment_overrides_the_sections_settings(plan):
    own = {"precision": 0.1, "min_rounds": 2, "max_rounds": 7, "budget_s": 1.5}
    (block,) = plan(BLOCK | own | {"warmup": 2}, precision=0.5, max_rounds=3, warmup=1).values()
    assert {key: getattr(block, key) for key in own} == own
    assert {cell.warmup for cell in block.cells} == {2}


def test_a_strategy_is_measured_once_or_in_some_rounds_but_not_both(plan):
    both = {"once": ["none"], "rounds": {"none": 10}}
    with pytest.raises(InputError, match=r"rounds.none: none stands in once too"):
        plan(BLOCK | both)


def test_a_plan_is_plain_data(plan):
    (block,) = plan(BLOCK | {"once": ["none"]}).values()
    document = block.as_dict()
    assert plan(BLOCK | {"rounds": {"none": 12}}).popitem()[1].as_dict()["rounds"] == {"none": 12}
    assert json.loads(json.dumps(document)) == document
    assert document["once"] == ["none"]
    assert list(document["cells"]) == ["none", "dynamic", "control"]


def test_turns_left_out_are_all_turns_and_fixed_scenarios_have_none(cells):
    experiment = {key: value for key, value in BLOCK.items() if key != "turns"}
    found = cells(experiment | {"scenarios": ["banking_open_account", "symposium_turn"]})
    turns = {cell.scenario: cell.turns for cell in found.values()}
    assert turns == {"banking_open_account": 15, "symposium_turn": None}


def test_two_experiments_may_share_a_scenario_but_no_record(cells):
    second = BLOCK | {"name": "second", "strategies": ["static"]}
    assert len(cells(BLOCK, second)) == 2 + 1 + 1


def test_the_shipped_configuration_plans_every_strategy_beside_the_reference(known):
    document = documents.read_yaml(CONFIG / "config.yaml")
    filled = configuration.fill(document, "config/config.yaml")
    blocks = configuration.plan_kv(filled, *known, "config/config.yaml")
    measured = {cell.measured for block in blocks.values() for cell in block.cells}
    # One that somebody added has no look and need not be measured by default.
    assert set(LOOKS) <= measured <= set(strategies.names())
    assert all(block.control for block in blocks.values())


@pytest.mark.parametrize(
    ("device", "dtype", "name"),
    [
        ("cpu", "float32", "cpu"),
        ("cpu", "bfloat16", "cpu-bfloat16"),
        ("cuda", "bfloat16", "cuda"),
        ("cuda", "float32", "cuda-float32"),
    ],
)
def test_a_place_is_the_device_unless_the_dtype_is_unusual(device, dtype, name):
    assert configuration.place(device, dtype) == name


def test_a_dtype_of_auto_is_the_devices_usual_one(cells):
    found = cells(BLOCK, BLOCK | {"name": "gpu", "device": "cuda"})
    assert {(c.device, c.dtype) for c in found.values()} == {
        ("cpu", "float32"),
        ("cuda", "bfloat16"),
    }


# Order ----------------------------------------------------------------------------------------


@pytest.fixture
def many(plan):
    scenarios = ["banking_open_account", "ecommerce_support", "insurance_claim_auto"]
    return plan(BLOCK | {"scenarios": scenarios, "replicates": 4})


def test_the_order_is_that_of_the_seed(many):
    first = configuration.measuring_order(many, 1)
    assert configuration.measuring_order(dict(reversed(many.items())), 1) == first
    assert configuration.measuring_order(many, 2) != first
    assert sorted(first.values()) == list(range(len(many)))


def test_each_replicate_ends_before_the_next_begins(many):
    order = configuration.measuring_order(many, 1)
    sequence = [many[key].first.replicate for key in sorted(order, key=order.get)]
    assert sequence == sorted(sequence)


def test_every_replicate_has_an_order_of_its_own(many):
    order = configuration.measuring_order(many, 1)
    sequence = [many[key].first for key in sorted(order, key=order.get)]
    runs = [[c.scenario for c in sequence if c.replicate == number] for number in (1, 2, 3, 4)]
    assert len({tuple(run) for run in runs}) > 1


# What is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("strategies", "dinamic", ["unknown strategy 'dinamic'", "dynamic"]),
        ("scenarios", "banking", ["unknown scenario", "ecommerce_support", "banking.yaml"]),
        ("models", "gpt", ["unknown model", "embedded", "config/models/gpt.yaml"]),
    ],
)
def test_an_unknown_name_is_refused_with_the_known_ones(refused, key, value, words):
    text = refused(BLOCK | {key: [BLOCK[key][0], value]})
    assert f"kv.experiments[0].{key}[1]" in text
    for word in words:
        assert word in text


def test_a_strategy_of_another_engine_is_refused_until_the_engine_is_named(refused, cells):
    strategies_of_two = ["dynamic", "vllm"]
    text = refused(BLOCK | {"strategies": strategies_of_two})
    assert "kv.experiments[0].strategies[1] is vllm" in text
    assert "kv.experiments[0].engine to vllm" in text
    planned = cells(BLOCK | {"strategies": strategies_of_two, "engine": "vllm"})
    assert {"dynamic", "vllm"} <= {cell.strategy for cell in planned.values()}


def test_an_unknown_device_is_refused_with_the_known_ones(refused):
    text = refused(BLOCK, device="gpu")
    assert "kv.device is 'gpu'; use one of cpu, cuda, auto" in text


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("max_new_tokens", 0, "at least 2"),
        ("max_new_tokens", -1, "at least 2"),
        ("max_new_tokens", "32", "integer"),
        ("max_new_tokens", 1.5, "integer"),
        ("turns", 0, "at least 1"),
        ("turns", -2, "at least 1"),
        ("min_rounds", 0, "at least 1"),
        ("max_rounds", 0, "at least 1"),
        ("max_rounds", 10**30, "at most"),
        ("precision", 0, "more than 0"),
        ("precision", -0.03, "more than 0"),
        ("precision", 1.5, "at most 1"),
        ("precision", float("nan"), "is nan; it must be a finite number"),
        ("budget_s", float("inf"), "is inf; it must be a finite number"),
        ("budget_s", float("nan"), "is nan; it must be a finite number"),
        ("once", ["static"], "unknown strategy of this experiment 'static'; known: dynamic, none"),
        ("once", ["dynamic"], "leave it out of once"),
        ("rounds", {"static": 9}, "unknown strategy of this experiment 'static'; known: dynamic"),
        ("rounds", {"dynamic": 9}, "leave it out of rounds"),
        ("rounds", {"none": 1}, "at least 2"),
        ("rounds", ["none"], "rounds"),
        ("replicates", 0, "at least 1"),
        ("warmup", -1, "at least 0"),
        ("budget_s", 0, "more than 0"),
        ("budget_s", "60", "number"),
        ("max_prompt_tokens", 0, "at least 1"),
        ("models", "embedded", "it must be of type list: write [embedded]"),
        ("strategies", [3], "text or mapping"),
        ("dtype", "fp32", "float32"),
        ("strategies", [], "is an empty list; name at least 1"),
        ("strategies", ["none", "none"], "holds 'none' twice"),
    ],
)
def test_a_wrong_value_of_a_block_is_named_with_its_remedy(refused, key, value, words):
    text = refused(BLOCK | {key: value})
    assert f"kv.experiments[0].{key}" in text
    assert words in text


def test_a_misspelt_key_is_refused_with_the_known_ones(refused):
    text = refused(BLOCK | {"max_tokens": 4})
    assert "kv.experiments[0]: unknown key 'max_tokens'" in text
    assert "max_new_tokens" in text


def test_a_misspelt_section_is_refused(known):
    with pytest.raises(InputError) as error:
        configuration.fill({"kvcache": {}}, SOURCE)
    assert "unknown key 'kvcache'" in one_line(error)


@pytest.mark.parametrize("document", [{"kv": None}, {"kv": []}, {"kv": {"experiments": {}}}])
def test_a_section_of_the_wrong_type_is_named(document):
    with pytest.raises(InputError) as error:
        configuration.fill(document, SOURCE)
    assert "kv" in one_line(error)


@pytest.mark.parametrize(
    ("key", "value", "told"),
    [
        ("budget_s", float("nan"), "kv.budget_s is nan; it must be a finite number"),
        ("quiet_wait_s", float("inf"), "kv.quiet_wait_s is inf; it must be a finite number"),
        ("max_rounds", 10**30, "kv.max_rounds is"),
        ("seed", 2**200, "kv.seed is"),
        ("replicates", 10**7, "kv.replicates is 10000000; it must be at most 1000"),
        ("replicates", 2.0, "kv.replicates is 2.0; it must be of type integer"),
    ],
)
def test_a_number_that_cannot_be_meant_is_refused_with_its_key(refused, key, value, told):
    assert told in refused(BLOCK, **{key: value})


def test_a_billion_new_tokens_are_refused(refused):
    text = refused(BLOCK | {"max_new_tokens": 10**9})
    assert "kv.experiments[0].max_new_tokens is 1000000000; it must be at most 1000000" in text


def test_no_experiment_in_a_suite_that_is_asked_for_is_refused(refused):
    assert "kv.experiments is empty; name an experiment" in refused()


@pytest.mark.parametrize("change", [{}, {"max_new_tokens": 8}, {"strategies": ["dynamic"]}])
def test_two_experiments_that_write_one_record_are_refused(refused, change):
    text = refused(BLOCK, BLOCK | {"name": "second"} | change)
    assert "kv.experiments[1] (second) and experiment first both measure" in text
    assert "keep one" in text


@pytest.mark.parametrize("names", [("same", "same"), ("a-b", "a_b")])
def test_two_experiments_of_one_name_are_refused(refused, names):
    first, second = (
        {"name": name, "strategies": [f]} for name, f in zip(names, ("none", "static"), strict=True)
    )
    text = refused(BLOCK | first, BLOCK | second)
    assert f"kv.experiments[1].name is {names[1]!r}" in text
    assert "give it a name of its own" in text


@pytest.mark.parametrize("section", [{"precision": float("nan")}, {"quiet_wait_s": float("inf")}])
def test_what_is_no_number_is_refused(section):
    with pytest.raises(InputError, match=r"it must be a finite number") as error:
        configuration.fill({"kv": section}, SOURCE)
    assert f"kv.{next(iter(section))}" in one_line(error)


def test_a_context_longer_than_the_model_allows_is_refused(known):
    all_scenarios, models = copy.deepcopy(known)
    models["embedded"]["architecture"]["max_position_embeddings"] = 300
    filled = configuration.fill(config(BLOCK | {"scenarios": ["symposium_turn"]}), SOURCE)
    with pytest.raises(InputError) as error:
        configuration.plan_kv(filled, all_scenarios, models, SOURCE)
    text = one_line(error)
    assert "symposium_turn needs 302 tokens" in text
    assert "embedded allows 300" in text


def test_steps_left_out_need_no_context(known):
    all_scenarios, models = copy.deepcopy(known)
    models["embedded"]["architecture"]["max_position_embeddings"] = 300
    block = BLOCK | {"scenarios": ["context_growth"], "max_prompt_tokens": 256}
    filled = configuration.fill(config(block), SOURCE)
    assert len(configuration.plan_kv(filled, all_scenarios, models, SOURCE)) == 1


def test_a_limit_below_every_step_is_refused(refused):
    text = refused(BLOCK | {"scenarios": ["context_growth"], "max_prompt_tokens": 16})
    assert "max_prompt_tokens is 16" in text
    assert "raise it" in text


def test_more_turns_than_the_scenario_has_are_refused(refused):
    text = refused(BLOCK | {"turns": 16})
    assert "turns is 16" in text
    assert "has 15" in text


@pytest.mark.parametrize("value", ["maybe", "ture", ""])
def test_a_misspelt_truth_value_is_refused(value):
    with pytest.raises(InputError) as error:
        configuration.fill({"claims_must_hold": value}, SOURCE)
    assert "claims_must_hold" in one_line(error)


@pytest.mark.parametrize(("given", "meant"), [(True, True), ("true", True), ("False", False)])
def test_a_truth_value_may_come_as_text_from_the_command_line(given, meant):
    assert configuration.fill({"claims_must_hold": given}, SOURCE)["claims_must_hold"] is meant


# Studies --------------------------------------------------------------------------------------


def app_refused(known, **section: Any) -> str:
    filled = configuration.fill({"app": section}, SOURCE)
    with pytest.raises(InputError) as error:
        configuration.plan_app(filled, known[1], SOURCE)
    return one_line(error)


def test_every_study_is_planned_with_its_defaults(known):
    planned = configuration.plan_app(configuration.fill({}, SOURCE), known[1], SOURCE)
    assert {"eviction", "memoization"} <= set(planned)
    assert all(planned.values())


def test_an_excluded_study_is_not_planned(known):
    filled = configuration.fill({"app": {"exclude": ["eviction"]}}, SOURCE)
    assert "eviction" not in configuration.plan_app(filled, known[1], SOURCE)


def test_an_unknown_study_is_refused_with_the_known_ones(known):
    text = app_refused(known, studies={"evicton": {}})
    assert "app.studies: unknown study 'evicton'" in text
    assert "eviction" in text


def test_studies_that_alone_are_asked_for_are_planned_whatever_is_excluded(known):
    asked = {"app": {"exclude": ["endpoint", "prefix"], "only": ["endpoint"]}}
    filled = configuration.fill(asked, SOURCE)
    assert set(configuration.plan_app(filled, known[1], SOURCE)) == {"endpoint"}


def test_a_wrong_option_of_an_excluded_study_is_told_too(known):
    told = app_refused(known, exclude=["endpoint"], studies={"endpoint": {"roundz": 3}})
    assert "app.studies.endpoint" in told and "rounds" in told


def test_an_unknown_study_to_exclude_is_reported_under_its_own_key(known):
    assert "app.exclude" in app_refused(known, exclude=["evicton"])


def test_an_unknown_option_of_a_study_is_named(known):
    text = app_refused(known, studies={"eviction": {"not_an_option": 1}})
    assert "app.studies.eviction" in text
    assert "'not_an_option'" in text


def test_an_unknown_model_behind_the_caches_is_refused(known):
    assert "app.model: unknown model 'gpt'" in app_refused(known, model="gpt")


# The instrument's test ------------------------------------------------------------------------


def test_the_instruments_test_is_blocks_of_equal_copies_with_slowed_ones_beside_them(known):
    section = {"blocks": 3, "same": 3, "slowed": 2, "slowdown": 0.1}
    filled = configuration.fill({"aa_test": section, "kv": {"precision": 0.2}}, SOURCE)
    blocks = configuration.plan_aa(filled, known[1], SOURCE)
    assert len(blocks) == 3
    for block in blocks.values():
        arms = {cell.member: (cell.arm, cell.slowdown) for cell in block.cells}
        assert arms == {
            "same-1": ("same", 0.0),
            "same-2": ("same", 0.0),
            "same-3": ("same", 0.0),
            "slowed-1": ("slowed", 0.1),
            "slowed-2": ("slowed", 0.1),
        }
        assert {cell.measured for cell in block.cells} == {"dynamic"}
        assert (block.reference, block.control) == ("same-1", "same-2")
    keys = configuration.cells_of(blocks.values())
    assert {"same/b1-1", "slowed/b3-2"} <= set(keys)
    assert len(keys) == 3 * 5


def test_the_instrument_is_tested_at_the_settings_of_the_comparisons_unless_it_has_its_own(known):
    kv = {"precision": 0.2, "budget_s": 7, "min_rounds": 3, "max_rounds": 4}
    for own, budget, precision in (
        ({}, 7, 0.2),
        ({"budget_s": 2}, 2, 0.2),
        ({"precision": 0.01}, 7, 0.01),
    ):
        filled = configuration.fill({"kv": kv, "aa_test": own}, SOURCE)
        block = next(iter(configuration.plan_aa(filled, known[1], SOURCE).values()))
        assert (block.precision, block.min_rounds, block.max_rounds) == (precision, 3, 4)
        assert block.budget_s == budget


@pytest.mark.parametrize(("key", "value"), [("model", "gpt"), ("strategy", "dinamic")])
def test_an_unknown_name_in_the_instruments_test_is_refused(known, key, value):
    filled = configuration.fill({"aa_test": {key: value}}, SOURCE)
    with pytest.raises(InputError) as error:
        configuration.plan_aa(filled, known[1], SOURCE)
    assert f"aa_test.{key}: unknown {key} {value!r}" in one_line(error)


# Models ---------------------------------------------------------------------------------------


def test_the_shipped_models_are_those_of_the_readme(known):
    assert {
        "embedded",
        "llama-3.2-1b-geometry",
        "llama-3.2-1b",
        "smollm2-135m-instruct",
        "qwen2.5-0.5b-instruct",
    } <= set(known[1])


def test_a_model_file_named_unlike_its_name_is_refused(tmp_path):
    (tmp_path / "a.yaml").write_text("name: b\ntitle: B\nsource: local\npath: b\n")
    with pytest.raises(InputError, match=r"a\.yaml: name is 'b'.*make them equal"):
        configuration.read_models(tmp_path)


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("name: a\ntitle: A\nsource: hub\nrepo: x/y\nrevision: main\ngated: false\n", "revision"),
        ("name: a\ntitle: A\nsource: hub\nrepo: x/y\ngated: false\n", "'revision'"),
        ("name: a\ntitle: A\nsource: web\n", "source"),
        ("name: a\ntitle: A\nsource: local\npath: p\nrevison: x\n", "'revison'"),
        ("name: a\ntitle: A\nsource: built\n", "architecture"),
        ("", "mapping"),
    ],
)
def test_a_wrong_model_file_is_one_line_that_names_the_key(tmp_path, text, word):
    (tmp_path / "a.yaml").write_text(text)
    with pytest.raises(InputError) as error:
        configuration.read_models(tmp_path)
    message = str(error.value)
    assert message.startswith(str(tmp_path / "a.yaml"))
    assert word in message
    assert "\n" not in message


# Documentation --------------------------------------------------------------------------------


def keys(rules: dict[str, Any], path: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    for key, sub in rules.get("properties", {}).items():
        yield f"{path}{key}", sub
        yield from keys(sub, f"{path}{key}.")
    if "items" in rules:
        yield from keys(rules["items"], path)


@pytest.mark.parametrize(("key", "rules"), list(keys(documents.schema("config"))))
def test_every_key_of_the_configuration_is_described(key, rules):
    assert rules.get("description", "").endswith("."), key


def test_an_empty_configuration_is_complete_after_filling():
    filled = configuration.fill({}, SOURCE)
    for key, rules in keys(documents.schema("config")):
        listed = {"experiments", "logs"} & set(key.split(".")[:-1])
        if "default" in rules and not listed:
            value: Any = filled
            for part in key.split("."):
                value = value[part]
