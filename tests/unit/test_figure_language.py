"""Figures in another language: every phrase is translated, names and numbers are left in their form."""

from __future__ import annotations

import importlib
import re

import pytest
import synthetic_kv
import yaml
from kvbench.figures import _language, _scales, style
from kvbench.strategies.looks import LOOKS

#: Names that are the same in every language: models, machines, scenarios, backends, formats.
NAMES = re.compile(
    r"(here|epyc|h200-gpu|embedded|llama[\w.-]*|[a-z]+(_[a-z0-9]+)+|float32|bfloat16|quanto|HQQ|SnapKV|"
    r"kvpress|int\d|fp8|TTFT|TPOT|tokens?|vLLM)( \(?(HQQ|quanto)\)?)?( \*)?"
)


def book() -> _language.Phrases:
    return _language.Phrases(
        {
            "time of a turn (s)": "tempo de um turno (s)",
            "dynamic": "dinâmico",
            "reused": "reaproveitado",
            "n = {n} to {n}": "n = {n} a {n}",
            "machines for {}": "máquinas para {}",
            "95 % interval": "intervalo de 95 %",
        }
    )


@pytest.mark.parametrize(
    ("english", "portuguese"),
    [
        ("time of a turn (s)", "tempo de um turno (s)"),
        ("dynamic (reused)", "dinâmico (reaproveitado)"),
        ("here · dynamic", "here · dinâmico"),
        ("n = 3 to 9", "n = 3 a 9"),
        ("machines for 1,000,000", "máquinas para 1.000.000"),
        ("0.305 s", "0,305 s"),
        ("95 % interval", "intervalo de 95 %"),
        ("llama-3.2-1b", "llama-3.2-1b"),
        ("5.36×", "5,36×"),
        ("1,234.5", "1.234,5"),
    ],
)
def test_phrases_are_looked_up_and_numbers_written_as_the_language_does(english, portuguese):
    assert book().say(english) == portuguese


def test_what_no_phrase_covers_is_remembered():
    phrases = book()
    phrases.say("dynamic · unheard of")
    assert phrases.unknown == {"unheard of"}


def test_tick_labels_are_translated_when_they_are_drawn():
    import matplotlib.pyplot as plt

    figure, ax = plt.subplots()
    ax.set_xticks([0, 1], ["static", "0.5"])
    ax.set_ylim(0, 0.5)
    _language.localise(figure, "pt")
    figure.canvas.draw()
    assert [label.get_text() for label in ax.get_xticklabels()] == ["estático", "0,5"]
    assert "0,2" in [label.get_text() for label in ax.get_yticklabels()]
    plt.close(figure)


def test_a_figure_is_saved_in_each_language_as_if_in_that_one_alone(tmp_path):
    draw = importlib.import_module("kvbench.figures.kv_turns").draw
    style.apply()
    both = style.save(draw(*synthetic_kv.tables()), tmp_path / "both", "pt", "en")
    for path in both:
        language = path.name.split(".")[1]
        style.save(draw(*synthetic_kv.tables()), tmp_path / "alone", language)
        if path.suffix == ".svg":
            alone = tmp_path / path.name.replace("both", "alone")
            assert _texts(path) == _texts(alone)
    assert "turno" in " ".join(_texts(both[1]))
    assert "turno" not in " ".join(_texts(both[4]))


def _texts(svg):
    return re.findall(r"<text[^>]*>([^<]*)</text>", svg.read_text(encoding="utf-8"))


def test_english_is_what_figures_are_drawn_in():
    import matplotlib.pyplot as plt

    figure, ax = plt.subplots()
    ax.set_title("no cache 0.5")
    assert list(_language.localise(figure, "en")) == []
    assert ax.get_title() == "no cache 0.5"
    plt.close(figure)


@pytest.mark.parametrize(
    "name", ["kv_overview", "kv_turns", "kv_latency", "kv_memory", "kv_speedup"]
)
def test_nothing_but_names_stays_english_in_a_figure(name):
    import matplotlib.pyplot as plt

    style.apply()
    figure = importlib.import_module(f"kvbench.figures.{name}").draw(*synthetic_kv.tables())
    _scales.explain(figure)
    left = set(_language.localise(figure, "pt"))
    figure.draw_without_rendering()
    left |= _language.phrases("pt").unknown
    plt.close(figure)
    assert {text for text in left if not NAMES.fullmatch(text)} == set()


def test_the_labels_of_strategies_agree_with_those_of_the_prose():
    said = _language.phrases("pt")
    for name, look in LOOKS.items():
        assert said.say(look.label) == look.label_pt, name


def test_every_question_has_a_translation():
    from kvbench import figures

    words = yaml.safe_load((_language._FOLDER / "words.pt.yaml").read_text(encoding="utf-8"))
    missing = [name for name in figures.names() if figures.question(name) not in words]
    assert missing == []
