from __future__ import annotations

import math
import os
from pathlib import Path

import pytest
from kvbench.errors import InputError
from kvbench.paper import tex
from kvbench.paper.values import Value

RATIO = Value(5.3553, (5.301, 5.4099), "x", 2)


def rendered(tmp_path: Path, text: str, **context) -> str:
    template = tmp_path / "page.tex.j2"
    template.write_text(text, encoding="utf-8")
    return tex.render(template, context)


def test_latex_delimiters_leave_braces_and_comments_of_latex_alone(tmp_path):
    text = "%% kept\n\\textbf{\\VAR{x}} \\# {a}\\COMMENT{ gone }.\n"
    assert rendered(tmp_path, text, x=1) == "%% kept\n\\textbf{1} \\# {a}.\n"


def test_block_lines_leave_no_empty_lines_behind(tmp_path):
    text = "a\n  \\BLOCK{ for i in xs }\n\\VAR{i}\n  \\BLOCK{ endfor }\nb\n"
    assert rendered(tmp_path, text, xs=[1, 2]) == "a\n1\n2\nb\n"


@pytest.mark.parametrize(
    "use", ["\\VAR{missing}", "\\VAR{missing|num}", "\\VAR{missing|ci}", "\\VAR{missing|qty('s')}"]
)
def test_undefined_name_stops_with_template_line_and_name(tmp_path, use):
    with pytest.raises(
        InputError, match=r"^page\.tex\.j2, line 2: 'missing' has no value"
    ) as error:
        rendered(tmp_path, f"first\n{use}\n")
    assert "\n" not in str(error.value)


def test_undefined_value_in_v_is_named(tmp_path):
    with pytest.raises(InputError, match="'headline_typo'"):
        rendered(tmp_path, "\\VAR{v['headline_typo']|num}", v={"headline": RATIO})


def test_syntax_error_names_template_and_line(tmp_path):
    with pytest.raises(InputError, match=r"page\.tex\.j2, line 2"):
        rendered(tmp_path, "ok\n\\BLOCK{ if }\n")


def test_missing_template_is_named(tmp_path):
    with pytest.raises(InputError, match=r"absent\.tex\.j2"):
        tex.render(tmp_path / "absent.tex.j2", {})


def test_escape_prints_every_special_character():
    assert tex.escape("a_b & 5% {x} #1 ~ ^ \\ $") == (
        "a\\_b \\& 5\\% \\{x\\} \\#1 \\textasciitilde{} \\textasciicircum{} \\textbackslash{} \\$"
    )


@pytest.mark.parametrize(
    ("value", "digits", "expected"),
    [
        (5.3553, 2, "5.36"),
        (2.675, 2, "2.68"),
        (-4.45, 1, "$-$4.4"),
        (-0.001, 2, "0.00"),
        (1e-9, 3, "0.000"),
        (1234567, 0, "1\\,234\\,567"),
        (1234.5, 1, "1234.5"),
        (RATIO, None, "5.36"),
        (True, None, "True"),
        ("llama_1", None, "llama\\_1"),
    ],
)
def test_num_rounds_once_and_prints_the_decimal_the_reader_expects(value, digits, expected):
    assert tex.num({}, value, digits) == expected


@pytest.mark.parametrize("value", [None, math.nan, math.inf, Value(None), Value(math.nan)])
def test_missing_number_prints_na_in_english_and_nd_in_portuguese(value):
    assert tex.num({"lang": "en"}, value) == "n/a"
    assert tex.num({"lang": "pt"}, value) == "n/d"
    assert tex.qty({"lang": "pt"}, value, "s") == "n/d"
    assert tex.pct({"lang": "en"}, value) == "n/a"


def test_interval_is_bracketed_with_the_separators_of_the_language():
    assert tex.ci({}, RATIO) == "[5.30, 5.41]"
    assert tex.ci({"lang": "pt"}, RATIO) == "[5,30; 5,41]"
    assert tex.ci({}, Value(1.0)) == "n/a"
    assert tex.ci({}, (1, 2), 1) == "[1.0, 2.0]"


def test_quantity_goes_through_siunitx_already_rounded():
    assert tex.qty({}, Value(58.7149, unit="s")) == r"\qty{58.71}{\second}"
    assert tex.qty({"lang": "pt"}, 9.416, "MiB", 1) == (
        r"\qty[output-decimal-marker={,}]{9.4}{\mebi\byte}"
    )
    assert tex.qty({}, RATIO) == r"5.36$\times$"


def test_share_becomes_a_percentage():
    assert tex.pct({}, 0.125) == r"12\,\%"
    assert tex.pct({"lang": "pt"}, 0.0556, 1) == r"5,6\,\%"
    assert tex.pct({}, Value(37.5, unit="%"), 1) == r"37.5\,\%"


@pytest.mark.parametrize(
    ("items", "english", "portuguese"),
    [
        ([], "", ""),
        (["a"], "a", "a"),
        (["a", "b"], "a and b", "a e b"),
        (["a", "b", "c"], "a, b, and c", "a, b e c"),
    ],
)
def test_list_in_a_sentence(items, english, portuguese):
    assert tex.join_and({"lang": "en"}, items) == english
    assert tex.join_and({"lang": "pt"}, items) == portuguese


@pytest.mark.parametrize(
    ("entry", "expected"),
    [
        (RATIO, "above"),
        (Value(0.9, (0.8, 0.99)), "below"),
        (Value(1.02, (0.99, 1.05)), "same"),
        (Value(1.02, (1.0, 1.05)), "same"),
        (Value(5.0), "single"),
        (Value(None), "missing"),
    ],
)
def test_direction_comes_from_the_interval_and_not_from_the_value(entry, expected):
    assert tex.direction(entry) == expected


def test_unknown_language_is_refused():
    with pytest.raises(InputError, match="'de'"):
        tex.num({"lang": "de"}, 1.0)


def test_macro_names_are_letters_only_with_digits_spelled_out():
    assert tex.macro_name("headline_p95_ttft") == "kvbHeadlinePNineFiveTtft"
    assert tex.macro_name("h200_gpu-x") == "kvbHTwoZeroZeroGpuX"


def test_numbers_tex_defines_value_and_interval_and_keeps_their_order():
    text = tex.numbers_tex({"b": Value(None), "a": RATIO})
    assert text.splitlines()[2:] == [
        r"\newcommand{\kvbA}{5.36} % a [x]",
        r"\newcommand{\kvbACi}{[5.30, 5.41]} % a [x], 95 % interval",
        r"\newcommand{\kvbB}{n/a} % b",
    ]


def test_numbers_tex_writes_portuguese_decimals():
    assert r"\newcommand{\kvbA}{5,36}" in tex.numbers_tex({"a": RATIO}, "pt")


def test_numbers_tex_refuses_two_values_with_one_macro():
    with pytest.raises(InputError, match="rename one"):
        tex.numbers_tex({"a_b": Value(1), "a__b": Value(2)})


def test_words_and_templates_that_are_edited_are_read_again(tmp_path):
    page, words = tmp_path / "page.tex.j2", tmp_path / "words" / "page.en.yaml"
    words.parent.mkdir()
    page.write_text("\\SAY{greeting}, \\VAR{name}")

    def rendered(said: str, moment: int) -> str:
        words.write_text(f"greeting: {said}\n")
        os.utime(words, (moment, moment))
        return tex.render(page, {"lang": "en", "name": "reader"})

    assert rendered("Good morning", 1_000) == "Good morning, reader"
    assert rendered("Good evening", 2_000) == "Good evening, reader"
    page.write_text("\\SAY{greeting}!")
    os.utime(page, (3_000, 3_000))
    assert tex.render(page, {"lang": "en"}) == "Good evening!"
