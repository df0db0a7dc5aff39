"""The report: headline, verdicts, figures, tables and machines on one page that needs no network."""

from __future__ import annotations

import io
import itertools
import re
import shutil
import subprocess
from html.parser import HTMLParser

import pandas as pd
import pytest
import synthetic_kv
from kvbench.analysis import claims as claims_module
from kvbench.analysis import tables as analysis_tables
from kvbench.figures import _bitmap
from kvbench.publication import report
from PIL import Image

CHROMIUM = shutil.which("chromium")
DRAWING = (
    '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 9 5"><rect width="9" height="5"/></svg>'
)
FACTS = {
    "cpu": "Some processor",
    "cores": 2,
    "memory_bytes": 3 * 2**30,
    "gpu": None,
    "system": "Some system",
    "python": "3.11.7",
    "packages": {"torch": "2.13.0", "transformers": "5.15.1"},
}
#: Run in the page by the browser: its width, what sticks out of it, and boxes that overlap.
PROBE = """
<script>
const box = e => e.getBoundingClientRect();
const beside = (a, b) => a.right <= b.left + 1 || a.bottom <= b.top + 1;
const apart = (a, b) => beside(a, b) || beside(b, a);
let overlapping = 0;
for (const those of ["header, section", "details.figure", ".first > *", ".chip"]) {
  const boxes = [...document.querySelectorAll(those)].map(box).filter(b => b.width > 0);
  for (let i = 0; i < boxes.length; i++)
    for (let j = i + 1; j < boxes.length; j++) overlapping += apart(boxes[i], boxes[j]) ? 0 : 1;
}
for (const table of document.querySelectorAll(".cards"))
  overlapping += box(table).right > box(table.parentElement).right + 1;
const broken = [...document.images].filter(i => i.complete && !i.naturalWidth).length;
const bottom = id => Math.round(box(document.getElementById(id)).bottom);
parent.postMessage(`width ${innerWidth} content ${document.documentElement.scrollWidth} `
  + `overlapping ${overlapping} broken ${broken} headline ${bottom("headline")} `
  + `verdicts ${bottom("counts")}`, "*");
</script>
"""
#: A browser's window is no narrower than 500 pixels; a frame in it is.
FRAME = """<!doctype html><title>nothing heard</title>
<script>addEventListener("message", event => { document.title = event.data; });</script>
<iframe src="page.html" style="width: %dpx; height: 900px; border: 0"></iframe>
"""


def claim(**given) -> dict[str, object]:
    row = dict.fromkeys(claims_module.COLUMNS, None)
    return row | {
        "id": "one",
        "machine": "here",
        "source": "a source",
        "statement_en": "Caching <always> helps.",
        "statement_pt": "Usar cache <sempre> ajuda.",
        "figure_value": 1.5,
        "unit": "x",
        "value": 1.25,
        "ci_low": 1.125,
        "ci_high": 1.5,
        "verdict": "reproduced",
        **given,
    }


@pytest.fixture
def folder(tmp_path):
    """Results with one figure of each kind."""
    (tmp_path / "figures").mkdir()
    for name in ("kv_speedup", "claims", "traffic_time", "symposium_symposium_turn"):
        for language in ("en", "pt"):
            path = tmp_path / "figures" / f"{name}.{language}.png"
            Image.effect_noise((90, 50), 64).convert("RGBA").save(path)
    return tmp_path


def page(folder, language="en", rows=None) -> str:
    summary, samples = synthetic_kv.tables()
    return report.render(
        language,
        summary,
        pd.DataFrame(
            rows or [claim(), claim(id="two", verdict="not tested", reason="no such cell")]
        ),
        {"kv_summary": summary, "kv_samples": samples},
        {"kv_summary.csv": analysis_tables.SUMMARY_COLUMNS},
        [
            report.Picture("kv_speedup", "kv_speedup", ""),
            report.Picture("claims", "claims", ""),
            report.Picture("traffic_time", "traffic_time", ""),
            report.Picture("symposium_symposium_turn", "symposium", "symposium_turn"),
        ],
        {"here": FACTS, "old-machine": FACTS},
        [],
        folder,
        ["en", "pt"],
    )


class Balanced(HTMLParser):
    """Open elements, to see that every one is closed."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []

    def handle_starttag(self, tag, attrs):
        if tag not in {"meta", "link", "img", "br"}:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


@pytest.mark.parametrize("language", ["en", "pt"])
def test_every_element_is_closed(folder, language):
    parser = Balanced()
    parser.feed(page(folder, language))
    assert parser.open == []


@pytest.mark.parametrize("language", ["en", "pt"])
def test_the_page_loads_nothing_from_elsewhere(folder, language):
    text = page(folder, language)
    assert re.findall(r'src="(?!data:)[^"]*"|url\((?!data:)', text) == []
    assert "<script" not in text


def test_the_verdicts_stand_before_the_figures_and_what_failed_comes_first(folder):
    rows = [claim(), claim(id="two", verdict="refuted", statement_en="Wrong.")]
    text = page(folder, rows=rows)
    assert (
        text.index("Wrong.")
        < text.index("Caching &lt;always&gt; helps.")
        < text.index("<h2>Figures")
    )


def test_an_interval_has_commas_in_english_and_semicolons_in_portuguese(folder):
    assert "[1.125, 1.5]" in page(folder)
    assert "[1,125; 1,5]" in page(folder, "pt")


def test_what_is_times_something_is_written_in_one_way(folder):
    text = page(folder)
    assert "1.5x</td>" in text
    assert not re.search(r"\d x\b", text)


@pytest.mark.parametrize(
    ("figure", "value", "unit", "shown", "shown_pt"),
    [
        ("2 GB", 2, "GiB", "2 GB", "2 GB"),
        ("< 10 ms", 10, "ms", "&lt; 10 ms", "&lt; 10 ms"),
        ("10-100x", None, "x", "10-100x", "10-100x"),
        ("> 1.5x", 1.5, "x", "&gt; 1.5x", "&gt; 1,5x"),
        ("22 us (0.000022 s)", 22, "us", "22 µs", "22 µs"),
        ("9.122187 s", 9.122187, "s", "9.122 s", "9,122 s"),
    ],
)
def test_what_a_source_says_beyond_a_number_stands_in_its_own_words(
    figure, value, unit, shown, shown_pt, folder
):
    rows = [claim(figure=figure, figure_value=value, unit=unit)]
    assert re.search(rf">\s*{re.escape(shown)}\s*<", page(folder, rows=rows))
    assert re.search(rf">\s*{re.escape(shown_pt)}\s*<", page(folder, "pt", rows))


def test_a_page_leads_to_the_other_language(folder):
    assert re.search(r'<a href="report\.pt\.html"[^>]*>Português</a>', page(folder))
    assert re.search(r'<a href="report\.en\.html"[^>]*>English</a>', page(folder, "pt"))


def test_a_machine_leads_to_its_records_where_they_are(folder):
    (folder / "recorded" / "old-machine").mkdir(parents=True)
    machines = re.search(r'id="machines">.*?</table>', page(folder), re.S)[0]
    assert '<a href="recorded/old-machine/">old-machine</a>' in machines
    assert "<td>this machine</td>" in machines


@pytest.mark.parametrize("language", ["en", "pt"])
def test_headings_go_down_one_step_at_a_time(folder, language):
    levels = [int(level) for level in re.findall(r"<h(\d)", page(folder, language))]
    assert levels[0] == 1
    assert all(after - before <= 1 for before, after in itertools.pairwise(levels))


@pytest.mark.parametrize("language", ["en", "pt"])
def test_every_head_of_a_table_says_what_it_heads_and_every_picture_what_it_shows(folder, language):
    text = page(folder, language)
    assert "<th" in text
    assert not re.findall(r"<th(?![^>]*scope=)[ >]", text)
    assert not re.findall(r'<img(?![^>]*alt="[^"]+")', text)


def test_code_in_a_question_is_shown_as_code(folder, monkeypatch):
    monkeypatch.setattr(report.figures, "question", lambda module: "Is `a < b` true?")
    text = page(folder)
    assert "Is <code>a &lt; b</code> true?" in text
    assert 'alt="Is a &lt; b true?"' in text
    assert "`" not in text


def test_a_single_run_has_no_interval(folder):
    text = page(folder, rows=[claim(value=7.25, ci_low=float("nan"), ci_high=float("nan"))])
    assert re.search(r"7\.25x", text)


def test_a_claim_without_a_verdict_shows_its_reason(folder):
    assert "no such cell" in page(folder)


def test_the_headline_has_the_source_beside_what_was_measured(folder):
    table = re.search(r'<table class="data cards" id="headline">.*?</table>', page(folder), re.S)[0]
    assert "314.4" in table
    assert "5.36" in table


@pytest.mark.parametrize(
    ("language", "named"),
    [
        ("en", ("this machine", "Llama-3.2-1B geometry")),
        ("pt", ("esta máquina", "geometria do Llama-3.2-1B")),
    ],
)
def test_machines_models_and_scenarios_have_names_and_not_ids(folder, language, named):
    text = page(folder, language)
    shown = re.sub(r'<section id="tables">.*?</section>', "", text, flags=re.S)
    table = re.search(r'<table class="data cards" id="headline">.*?</table>', text, re.S)[0]
    assert all(name in table for name in named)
    assert "Some processor, 2" in table
    for identifier in ("here", "llama-3.2-1b", "symposium_turn"):
        assert not re.search(rf">\s*{identifier}\b", shown), identifier


def test_a_large_number_is_grouped_and_never_a_power_of_ten(folder):
    rows = [claim(value=113310.2, ci_low=90729.4, ci_high=141512.9)]
    assert "113,300x" in page(folder, rows=rows)
    assert "[90.730; 141.500]" in page(folder, "pt", rows=rows)


@pytest.mark.parametrize(("language", "word"), [("en", "measured: "), ("pt", "medidas: ")])
def test_how_cells_ended_is_said_in_the_language_of_the_page(folder, language, word):
    machines = re.search(r'id="machines">.*?</table>', page(folder, language), re.S)[0]
    assert word in machines


def test_a_question_is_asked_in_the_language_of_the_page(folder):
    assert "Your traffic: does a cache keep its worth?" in page(folder)
    assert "Seu tráfego: um cache conserva o seu valor?" in page(folder, "pt")


def test_a_long_table_says_how_much_of_it_is_shown(folder):
    _, samples = synthetic_kv.tables()
    assert len(samples) > report.MOST_ROWS
    assert f"the first {report.MOST_ROWS} of {len(samples)} rows" in page(folder)


def test_a_bitmap_keeps_its_size_and_few_colours(folder):
    path = folder / "figures" / "claims.en.png"
    with Image.open(io.BytesIO(_bitmap.bitmap(path))) as few, Image.open(path) as full:
        assert few.size == full.size
        assert len(few.convert("RGB").getcolors()) <= _bitmap.COLOURS


@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium (apt install chromium)")
@pytest.mark.parametrize("language", ["en", "pt"])
@pytest.mark.parametrize("width", [390, 1280])
def test_a_browser_shows_the_page_without_overlap_or_complaint(folder, language, width):
    probed = page(folder, language).replace("</body>", PROBE + "</body>")
    (folder / "page.html").write_text(probed, encoding="utf-8")
    (folder / "frame.html").write_text(FRAME % width, encoding="utf-8")
    done = subprocess.run(
        [
            CHROMIUM,
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--enable-logging=stderr",
            f"--user-data-dir={folder / 'profile'}",
            "--window-size=1400,1000",
            "--hide-scrollbars",
            "--virtual-time-budget=3000",
            "--dump-dom",
            (folder / "frame.html").as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert "CONSOLE" not in done.stderr
    found = re.search(r"<title>([^<]+)</title>", done.stdout)[1].split()
    told = dict(zip(found[::2], map(int, found[1::2]), strict=True))
    assert told["content"] <= told["width"] == width
    assert told["overlapping"] == told["broken"] == 0
    assert told["verdicts"] < 500, "the verdicts are not on the first screen"
    assert told["headline"] < 900, "the headline is not on the first screen"
