"""What a person writes wrong in a configuration is one line with file, key and what would be right."""

from __future__ import annotations

from pathlib import Path

import pytest
from kvbench import documents
from kvbench.analysis import claims
from kvbench.errors import InputError
from kvbench.inputs import configuration, readable, scenarios
from kvbench.records import gathering
from kvbench.traffic import cells as traffic

ROOT = Path(__file__).resolve().parents[2]
EXPERIMENT = {
    "name": "mine",
    "models": "[embedded]",
    "scenarios": "[ecommerce_support]",
    "strategies": "[dynamic, static]",
}


def experiment(**keys: str) -> str:
    """A configuration of one experiment, with some of its values spelled otherwise."""
    lines = [f"{key}: {text}" for key, text in (EXPERIMENT | keys).items()]
    return "kv:\n  experiments:\n    - " + "\n      ".join(lines) + "\n"


@pytest.fixture(scope="module")
def known():
    return configuration.load_scenarios_and_models(ROOT / "config")


@pytest.fixture
def planned(tmp_path, known):
    def planned(text: str) -> str | None:
        """Read and plan as the Snakefile does; the message behind the file's name, or None."""
        path = tmp_path / "my folder" / "my.yaml"
        path.parent.mkdir(exist_ok=True)
        path.write_text(text, encoding="utf-8")
        source = str(path)
        try:
            if told := readable.problem(path):
                raise InputError(told)
            filled = configuration.fill(documents.read_yaml(path), source)
            configuration.plan_kv(filled, *known, source)
            configuration.plan_app(filled, known[1], source)
            configuration.plan_aa(filled, known[1], source)
            traffic.plan(filled, known[1], source, files=True)
            gathering.list_machines(ROOT / "results" / "recorded", filled["recorded"], source)
        except InputError as error:
            message = str(error)
            assert message.startswith(f"{source}: ")
            assert "\n" not in message
            return message.removeprefix(f"{source}: ")
        return None

    return planned


def test_the_experiment_that_is_spoilt_below_is_right(planned):
    assert planned(experiment()) is None


@pytest.mark.parametrize(
    ("text", "told"),
    [
        # Slips of names.
        (experiment(max_new_token="4"), "unknown key 'max_new_token' (did you mean 'max_new_to"),
        ("kvs: {}\n", "top level: unknown key 'kvs' (did you mean 'kv'?)"),
        ("KV: {}\n", "unknown key 'KV' (did you mean 'kv'?)"),
        ("kv\u00a0: {}\n", "(did you mean 'kv'?)"),
        ("strategies: [none]\n", "unknown key 'strategies' (it is a key of kv.experiments[])"),
        (experiment(seed="3"), "unknown key 'seed' (it is a key of kv and of app)"),
        ("kv: {seed:3}\n", "kv: unknown key 'seed:3' (put a blank after the colon: 'seed: 3')"),
        ("on: 3\nx: 4\n", "unknown key true; put it in quotes to have it read as text, 'x'"),
        ("1: 3\na: 3\n", "unknown key 1; put it in quotes"),
        ("suites: [KV]\n", "suites[0] is 'KV'; use one of kv, app, traffic (did you mean 'kv'?)"),
        ("kv: {dtype: floot32}\n", "(did you mean 'float32'?)"),
        (experiment(memory="seperate"), "(did you mean 'separate'?)"),
        (experiment(models="[Embedded.yaml]"), "(did you mean 'embedded'?)"),
        (experiment(scenarios="[ecommerce-support]"), "(did you mean 'ecommerce_support'?)"),
        (experiment(strategies="[{name: static, prefil_chunk: 3}]"), "(did you mean 'prefill_chunk'"),
        (experiment(strategies="[{name: quantized, backend: quantos}]"), "(did you mean 'quanto'?)"),
        ("app: {only: [evictoin]}\n", "app.only: unknown study 'evictoin' (did you mean 'eviction"),
        (
            "app: {studies: {eviction: {polices: [lru]}}}\n",
            "app.studies.eviction: unknown key 'polices' (did you mean 'policies'?)",
        ),
        (
            "app: {studies: {eviction: {policies: [seive]}}}\n",
            "app.studies.eviction.policies[0] is 'seive'; use one of",
        ),
        ("recorded: [h200-16cor]\n", "recorded: unknown machine 'h200-16cor' (did you mean 'h200-"),
        # What YAML makes of words and numbers.
        (experiment(name="on"), ".name is true; it must be of type text: put it in quotes"),
        (experiment(name="2025-01-01"), ".name is 2025-01-01; it must be of type text: put it in"),
        ("languages: [no]\n", "languages[0] is false; use one of en, pt; YAML reads yes, no, on"),
        (experiment(profile='"yes"'), "of type boolean: write true or false, without quotes"),
        ("claims_must_hold: sim\n", "claims_must_hold is 'sim'; use one of true, false"),
        (experiment(turns="010"), "line 7: 010 is read as 8; write 8, or put it in quotes"),
        (experiment(turns="1:30"), "line 7: 1:30 is read as 90; write 90, or put it in quotes"),
        (experiment(turns="1e1"), "turns is '1e1'; it must be of type integer or null: write 10,"),
        (experiment(turns="2.0"), "turns is 2.0; it must be of type integer or null: write 2"),
        (experiment(turns='"5"'), "write 5, without quotes"),
        (experiment(precision="0,03"), "precision is '0,03'; it must be of type number: write 0.03"),
        (experiment(precision="3%"), "write it as a share, 0.03"),
        (experiment(budget_s="5min"), "write a number without a unit"),
        (experiment(precision=".nan"), "precision is nan; it must be a finite number"),
        ("kv: {seed: 2025-01-02}\n", "kv.seed is 2025-01-02; it must be of type integer"),
        ("kv:\n", "kv is empty (null); it must be of type mapping; fill it in, or take the key out"),
        # Lists, sizes and names.
        (experiment(models="embedded"), "it must be of type list: write [embedded]"),
        (experiment(batch='"4"'), ".batch is '4'; it must be of type integer or list: write 4, without"),
        (experiment(batch="yes"), ".batch is true; it must be of type integer or list (Requests"),
        (experiment(models="[]"), ".models is an empty list; name at least 1"),
        (experiment(strategies="[static, static]"), ".strategies holds 'static' twice; keep one"),
        (experiment(strategies="All"), ".strategies is 'All'; it does not look right; write all,"),
        (experiment(turns="0"), ".turns is 0; it must be at least 1"),
        (experiment(turns="-3"), ".turns is -3; it must be at least 1"),
        (experiment(max_new_tokens="90000"), "lower turns or max_new_tokens or take another model"),
        (experiment(min_rounds="50", max_rounds="20"), "].min_rounds is 50 but kv.experiments[0].max"),
        ("kv: {min_rounds: 50, max_rounds: 20}\n", "kv.min_rounds is 50 but kv.max_rounds is 20"),
        (experiment(name="a" * 61), ".name has 61 characters; write at most 60"),
        (experiment(name="medição"), "write small letters a to z, digits, _ and -, a letter first"),
        (experiment(name='"mine\\n"'), "is 'mine\\n'; it does not look right; write small letters"),
        ("machine: here\n", "machine is 'here'; it does not look right; write small letters"),
        ("app: {server_url: localhost}\n", "write an address such as redis://127.0.0.1:6379"),
        # Marks of YAML.
        ("kv:\n\tseed: 3\n", "not valid YAML at line 2: found character '\\t' that cannot start any "
         "token; indent with blanks, not with tabs"),
        ("kv: *base\n", "found undefined alias 'base'; name the anchor (&name) first"),
        ("kv: &kv {experiments: [*kv]}\n", "nested too deeply; write it flatter"),
        ("kv: !mine {}\n", "take the tag away"),
        ("kv: {}\n---\nkv: {}\n", "keep one document"),
        ("kv\n  seed: 3\n", "a colon is missing above"),
        ("kv: {seed: 3\n", "close the bracket"),
    ],
)  # fmt: skip
def test_a_slip_is_one_line_with_file_key_and_remedy(planned, text, told):
    message = planned(text)
    assert message is not None
    assert told in message


def test_a_name_that_is_far_from_all_gets_no_guess(planned):
    message = planned("kv: {device: gpu}\n")
    assert "use one of cpu, cuda, auto" in message
    assert "did you mean" not in message


def test_a_long_value_is_cut(planned):
    assert len(planned(f"kv: {{device: {'x' * 5000}}}\n")) < 300


def test_a_misspelt_key_of_a_scenario_gets_the_nearest(tmp_path):
    path = tmp_path / "talk.yaml"
    path.write_text(
        "id: talk\nkind: fixed\ntitle: x\nstep:\n  - {prompt_tokens: 8, new_tokens: 4}\n"
    )
    with pytest.raises(InputError, match=r"unknown key 'step' .did you mean 'steps'"):
        scenarios.load(path)


def test_a_misspelt_key_of_a_claim_gets_the_nearest(tmp_path):
    path = tmp_path / "claims.yaml"
    text = (ROOT / "config" / "claims.yaml").read_text(encoding="utf-8")
    path.write_text(text.replace("\n    holds_if:", "\n    hold_if:", 1), encoding="utf-8")
    with pytest.raises(InputError, match=r"'hold_if' .did you mean 'holds_if'") as error:
        claims.load(path)
    assert "\n" not in str(error.value)


def test_a_record_of_the_program_gets_no_advice_on_writing_it():
    with pytest.raises(InputError) as error:
        documents.check_record({"schema": None}, "kv-cell", "r1.json")
    assert "quotes" not in str(error.value)
    assert "take the key out" not in str(error.value)
