"""HTTP clients against a real loopback origin: what reaches it, and who obeys RFC 9111."""

from __future__ import annotations

import pandas as pd
import pytest
import study_runs
from kvbench.caching import http as clients
from kvbench.errors import InputError
from kvbench.studies import http as study

RFC_CLIENTS = ("none", "session", "requests_cache_revalidating")
ENGLISH = {"Accept-Language": "en"}


def ask(source, name, behaviour, times):
    with clients.client(name) as fetch:
        return [fetch(f"{source.url}/{behaviour}", ENGLISH) for _ in range(times)]


@pytest.mark.parametrize("name", clients.CLIENTS)
def test_cached_requests_to_the_origin_do_not_grow_with_their_number(name):
    reached = []
    for times in (3, 12):
        with clients.origin(0.0) as source:
            ask(source, name, "max_age", times)
            reached.append(source.counts.requests)
    assert reached == ([3, 12] if name in ("none", "session") else [1, 1])


@pytest.mark.parametrize("behaviour", clients.BEHAVIOURS)
@pytest.mark.parametrize("name", RFC_CLIENTS)
def test_client_obeys_the_rfc(name, behaviour):
    assert clients.is_correct(name, behaviour)


@pytest.mark.parametrize("behaviour", ["no_cache", "no_store", "error", "vary"])
@pytest.mark.parametrize("name", ["dict", "lru_cache"])
def test_memoised_fetch_breaks_every_rule(name, behaviour):
    assert not clients.is_correct(name, behaviour)


@pytest.mark.parametrize("name", RFC_CLIENTS)
@pytest.mark.parametrize("behaviour", ["no_store", "error"])
def test_what_must_not_be_stored_reaches_the_origin_every_time(name, behaviour):
    with clients.origin(0.0) as source:
        ask(source, name, behaviour, 5)
        assert source.counts.requests == 5


def test_an_error_is_kept_as_an_answer_by_a_dict():
    with clients.origin(0.0) as source, clients.client("dict") as fetch:
        first = fetch(f"{source.url}/error", ENGLISH)
        source.change()
        assert first[0] == 500
        assert fetch(f"{source.url}/error", ENGLISH) == first


def test_requests_cache_as_it_comes_reuses_what_must_be_validated_or_not_be_stored():
    # Its default keeps answers for ever and leaves Cache-Control alone.
    assert not clients.is_correct("requests_cache", "no_cache")
    assert not clients.is_correct("requests_cache", "no_store")
    assert clients.is_correct("requests_cache", "error")


def test_validation_saves_bytes_and_no_requests():
    with clients.origin(0.0, body_bytes=1000) as source:
        answers = ask(source, "requests_cache_revalidating", "no_cache", 6)
        counts = source.counts
    assert (counts.requests, counts.not_modified, counts.body_bytes) == (6, 5, 1000)
    assert {status for status, _ in answers} == {200}


def test_origin_serves_the_size_it_was_told_and_counts_it():
    with clients.origin(0.0, body_bytes=300) as source:
        (_, text), _ = ask(source, "session", "max_age", 2)
        assert len(text.encode()) == 300
        assert source.counts == clients.Counts(requests=2, not_modified=0, body_bytes=600)
        source.reset()
        assert source.counts == clients.Counts()


def test_origin_does_not_know_other_paths():
    with clients.origin(0.0) as source:
        assert ask(source, "session", "elsewhere", 1)[0][0] == 404


def test_origin_closes_its_port():
    with clients.origin(0.0) as source:
        url = source.url
    with clients.client("none") as fetch, pytest.raises(OSError, match="refused"):
        fetch(f"{url}/max_age", ENGLISH)


def test_unknown_client_is_refused_and_the_known_ones_are_named():
    with pytest.raises(InputError, match=r"unknown client 'curl'.*session"), clients.client("curl"):
        pass


# --- the study ---


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    folder = tmp_path_factory.mktemp("http")
    return study_runs.table(
        "http",
        folder,
        requests=[1, 10],
        requests_others=[6],
        service_ms=0,
        repeats=10,
        # Every round, however long the machine takes.
        count_limit_s=3_600,
    )


def test_study_finds_who_is_right(table):
    values = study.values(table)
    right = {name: values[f"http_{name}_correct"].value for name in clients.CLIENTS}
    assert right == {
        "none": 5,
        "session": 5,
        "dict": 0,
        "lru_cache": 0,
        "requests_cache": 2,
        "requests_cache_revalidating": 5,
    }


def test_study_counts_forbidden_reuses(table):
    values = study.values(table)
    assert values["http_dict_no_store_reuses"].value == 5
    assert values["http_dict_vary_reuses"].value == 1
    assert values["http_dict_max_age_reuses"].value == 0
    assert values["http_requests_cache_revalidating_no_store_reuses"].value == 0


def test_no_client_needs_fewer_origin_requests_than_the_rfc_unless_it_reuses_wrongly(table):
    short = table["required_requests"] - table["origin_requests"]
    assert (short.clip(lower=0) == table["forbidden_reuses"]).all()
    assert not table.loc[table["forbidden_reuses"] > 0, "rfc_correct"].any()


def test_study_reports_wall_times_only_for_the_counts_it_ran(table):
    values = study.values(table)
    assert values["http_none_10_s"].value > 0
    assert values["http_none_500_s"].value is None


def test_a_page_in_two_languages_is_asked_once_per_language_by_who_keeps_both(table):
    """English, Portuguese, English, Portuguese ... on one address."""
    values = study.values(table)
    asked = {name: values[f"http_{name}_vary_requests"].value for name in clients.CLIENTS}
    assert asked["requests_cache_revalidating"] == 2
    assert asked["none"] == asked["session"] == 6
    assert asked["dict"] == asked["lru_cache"] == 1


def test_ten_rounds_give_the_gain_of_a_cache_its_interval(table):
    values = study.values(table)
    gain = values["http_dict_10_speedup"]
    assert gain.ci[0] < gain.value < gain.ci[1]
    assert gain.value > 1
    assert values["http_none_10_speedup"].ci is None


def test_the_limit_of_a_gain_is_requests_per_request_that_reached_the_origin(table):
    own = table[(table["behaviour"] == "max_age") & (table["requests"] == 10)]
    limits = own.set_index("client")["speedup_limit"]
    assert limits["dict"] == 10
    assert pd.isna(limits["session"])


def test_a_record_with_one_row_per_run_is_still_read():
    old = {"behaviour": "max_age", "client": "dict", "requests": 10, "repeat": 0, "wall_s": 0.1}
    old |= {"origin_requests": 1}
    (row,) = study.aggregate({"rows": [old], "samples": {}})
    assert row["runs"] == 1 and row["wall_s"] == 0.1 and "speedup" not in row
