"""From the committed records to every figure and every page: nothing is drawn or written empty only."""

from __future__ import annotations

import contextlib
import importlib
import re
import shutil
import subprocess

import pandas as pd
import pytest
import recorded_tables
import typesetting
from kvbench import figures, strategies
from kvbench.analysis import claims, selection
from kvbench.analysis.claims import pages
from kvbench.errors import InputError
from kvbench.figures import _language, _scales, _traffic, style
from kvbench.paper import numbers, sections
from kvbench.records import gathering
from matplotlib import pyplot as plt
from test_figure_layout import boxes

STUDIES = recorded_tables.study_names()
DRAWABLE = figures.drawable(STUDIES, traffic=False)
#: What a figure says when it has nothing to show.
EMPTY = re.compile(r"not been measured|not measured here|no server was available")
#: What the paper may include: the symposium's figure is drawn for each scenario.
PRINTED = (*DRAWABLE, "symposium_symposium_turn")
PARTS = ("numbers", "section", "app_section", "appendix", "main")
#: Figures of what only cells that took turns can show; older records hold none.
FROM_ROUNDS = ("instrument", "kv_drift")
#: Figures of swept options, which a record need not have.
FROM_SWEEPS = ("kv_options",)
#: Figures of requests that were generated for at once, which a record need not have.
FROM_BATCHES = ("kv_batch",)
#: Figures of what an experiment has to ask for.
FROM_PROFILES = ("kv_profile",)


@pytest.fixture(scope="module")
def tables(tmp_path_factory):
    return recorded_tables.all_tables(tmp_path_factory.mktemp("tables"))


@pytest.fixture
def draw(tables):
    """Draw a figure from the recorded tables, or from changed ones."""
    style.apply()

    def draw(name: str, **changed):
        module = importlib.import_module(f"kvbench.figures.{name}")
        given = [(tables | changed)[table] for table in figures.tables_of(name, STUDIES)]
        return module.draw(*given)

    yield draw
    plt.close("all")


def words(figure) -> str:
    parts = [text.get_text() for text in figure.findobj(match=lambda a: hasattr(a, "get_text"))]
    return "\n".join(parts)


#: A strategy that was added by a file of its own, without a look or words in any list.
UNLISTED = "roomy_cache"
OF_STRATEGIES = [
    name
    for name in (*DRAWABLE, "symposium")
    if {"kv_summary", "kv_quality", "kv_profile", "kv_rounds"} & {*figures.tables_of(name, STUDIES)}
]
#: Figures of some strategies by name, or of those that reuse turns: another one is left out.
OF_SOME = ("kv_options", "kv_reuse", "kv_turns", "symposium")


@pytest.mark.parametrize("name", OF_STRATEGIES)
def test_a_strategy_without_a_look_of_its_own_is_drawn_under_its_name(tables, name):
    style.apply()
    module = importlib.import_module(f"kvbench.figures.{name}")
    given = [tables[table] for table in figures.tables_of(name, STUDIES)]
    if not getattr(module, "BATCHES", False):
        given = [selection.single(table) for table in given]
    given = [
        pd.concat([table, table[table["strategy"] == old].assign(strategy=UNLISTED)])
        for table in given
        # Quality is scored of lossy caches alone.
        for old in ["quantized_int4" if "kl_nats" in table else "static"]
    ]
    figure = module.draw(*given, *(["symposium_turn"] if name == "symposium" else []))
    for language in ("en", "pt"):
        _language.localise(figure, language)
        figure.draw_without_rendering()
    shown = UNLISTED.replace("_", " ") in words(figure)
    plt.close(figure)
    assert shown or name in OF_SOME


def test_there_is_a_record_to_draw_from(tables):
    assert len(STUDIES) > 5
    assert len(tables["kv_summary"]) > 10


@pytest.mark.parametrize("name", DRAWABLE)
def test_every_figure_is_drawn_with_rows(draw, tables, name):
    figure = draw(name)
    if name in FROM_ROUNDS and tables["kv_rounds"].empty:
        assert len(words(figure)) > 20, "an empty figure says why it is empty"
        return
    if name in FROM_PROFILES and tables["kv_profile"].empty:
        assert len(words(figure)) > 20, "an empty figure says why it is empty"
        return
    if name in FROM_SWEEPS and not tables["kv_summary"]["strategy"].str.contains("-").any():
        assert len(words(figure)) > 20, "an empty figure says why it is empty"
        return
    if name in FROM_BATCHES and (tables["kv_summary"]["batch"] == 1).all():
        assert "two batches" in words(figure)
        return
    assert not EMPTY.search(words(figure)), words(figure)
    marks = [
        artist for axes in figure.axes for artist in [*axes.lines, *axes.patches, *axes.images]
    ]
    assert marks


@pytest.mark.parametrize("name", DRAWABLE)
def test_every_figure_says_how_much_it_rests_on_or_that_it_is_computed(draw, name):
    figure = draw(name)
    if figure.axes:
        assert re.search(r"\bn = \d[\d,]*|computed, not measured", words(figure))


@pytest.mark.parametrize("name", DRAWABLE)
def test_no_text_of_a_figure_is_cut_off_in_the_language_of_the_longer_words(draw, name):
    figure = draw(name)
    _scales.explain(figure)
    _language.localise(figure, "pt")
    figure.draw_without_rendering()
    width, height = figure.canvas.get_width_height()
    out = [
        text.get_text()
        for text, box in boxes(figure)
        if box.x0 < -1 or box.y0 < -1 or box.x1 > width + 1 or box.y1 > height + 1
    ]
    assert out == []


def test_every_figure_of_a_log_is_given_what_counts_its_requests():
    logs = [name for name in figures.names() if name.startswith("traffic_")]
    assert logs
    assert all("traffic_summary" in figures.tables_of(name, ()) for name in logs)
    rows = pd.DataFrame({"log": ["example"], "requests": [1234]})
    assert _traffic.title("Why?", rows, rows) == "Why?\nexample · n = 1,234 requests"


@pytest.mark.parametrize(
    ("figure", "study", "column"),
    [
        ("app_eviction", "eviction", "policy"),
        ("app_http", "http", "client"),
        ("app_memoization", "memoization", "variant"),
        ("app_layered", "layered", "configuration"),
        ("app_stampede", "stampede", "protection"),
        ("app_write_policy", "write_policy", "policy"),
    ],
)
def test_a_variant_that_a_figure_does_not_know_is_drawn_under_its_name(
    draw, tables, figure, study, column
):
    table = tables[f"app_{study}"]
    known = table[column].dropna().iloc[0]
    renamed = table[table[column] == known].assign(**{column: "brand_new"})
    more = {f"app_{study}": pd.concat([table, renamed], ignore_index=True)}
    assert "brand new" in words(draw(figure, **more))


@pytest.fixture(scope="module")
def values(tables, tmp_path_factory):
    """Every value of the paper, written and read back."""
    found = sections.collect(
        tables["kv_summary"],
        tables["kv_samples"],
        tables["kv_quality"],
        tables["kv_profile"],
        {name: tables[f"app_{name}"] for name in STUDIES},
        tables["aa_test"],
        tables["claims"],
        gathering.environments([], recorded_tables.machines()),
    )
    path = tmp_path_factory.mktemp("values") / "values.json"
    numbers.write_values(path, found)
    return numbers.read_values(path)


def render(tables, values, folder, language) -> dict[str, str]:
    parts = {part: folder / f"{part}.tex" for part in PARTS}
    sections.render(
        values,
        tables["claims"],
        language,
        STUDIES,
        sections.drawn(f"results/figures/{name}.pdf" for name in PRINTED),
        recorded_tables.ROOT / "paper",
        parts,
        recorded_tables.ROOT / "config" / "claims.yaml",
        recorded_tables.ROOT / "CITATION.cff",
    )
    return {part: path.read_text(encoding="utf-8") for part, path in parts.items()}


@pytest.mark.parametrize("language", ["en", "pt"])
def test_every_template_is_rendered(tables, values, tmp_path, language):
    texts = render(tables, values, tmp_path, language)
    assert len(re.findall(r"\\subsection|\\section", texts["app_section"])) >= len(STUDIES)
    for name, text in texts.items():
        assert not re.search(r"\bnan\b|\{None\}|\\VAR|\\BLOCK", text), name


@pytest.mark.skipif(
    not all(map(shutil.which, ("latexmk", "pdftotext"))),
    reason="latexmk or poppler-utils is not installed",
)
@pytest.mark.parametrize("language", ["en", "pt"])
def test_the_recorded_paper_is_twelve_pages_none_of_them_floats_alone(
    tables, values, tmp_path, language
):
    typesetting.any_figure(tmp_path / "figures", PRINTED, language, height=6)
    (tmp_path / "made").mkdir()
    texts = render(tables, values, tmp_path, language)
    pdf, log = typesetting.pdf_of(texts, tmp_path / "made", language)
    assert "Overfull \\hbox" not in log
    done = subprocess.run(["pdftotext", pdf, "-"], capture_output=True, text=True, check=True)
    heading = {"en": "References", "pt": "Referências"}[language]
    # The list may begin a page.
    text, *_ = re.split(rf"[\n\f]{heading}\n", done.stdout, maxsplit=1)
    pages = text.split("\f")
    assert len(pages) <= 12
    # Captions, one table and a page number are fewer words than these.
    assert min(len(page.split()) for page in pages[:-1]) > 250


#: Parts of reasons and places that are names, or the same in both languages.
SAME = re.compile(
    r"[\w.]*(_\w+)+|[\w.-]*llama[\w.-]*|float\d+|bfloat16|cpu|cuda|embedded|kvpress|hqq|"
    r"(app|endpoint|http|expiry|memoization|prefix|semantic|stampede|resilience|eviction|layered)|"
    r"KV caching|TTL|https?:.*|R(\.|aushan) Turganbay|Unlocking Longer .*|\[.*|.*\]|"
    r"[\d., ]+ (s|ms|tokens/s|GiB|%|x)( \[.*)?|(AMD|NVIDIA|Intel).*|pip install \w+"
)


def test_every_reason_and_place_of_the_shipped_records_is_said_in_portuguese(tables):
    rows = claims.plain(tables["claims"])
    reasons = {one["reason"] for one in rows} | {one["place"] for one in rows}
    reasons |= {one["measured_on"] for one in rows} | set(tables["kv_summary"]["not_judged"])
    # What a library said when a cell failed is kept as it is; no prose quotes it.
    summary = tables["kv_summary"]
    reasons |= set(summary.loc[summary["status"] != "failed", "reason"])
    book = pages._book("pt")
    book.unknown.clear()
    for text in filter(None, (one for one in reasons if isinstance(one, str))):
        claims.say(text, "pt")
    left = {part for part in book.unknown if not SAME.fullmatch(part)}
    assert {part for part in left if not _is_strategy(part)} == set()


def _is_strategy(name: str) -> bool:
    with contextlib.suppress(InputError):
        return bool(strategies.get(name))
    return False
