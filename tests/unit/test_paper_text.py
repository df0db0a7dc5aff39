"""The paper as a reader gets it: both languages, from synthetic tables with rounds and without."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import synthetic_kv
import typesetting
import yaml
from kvbench import studies
from kvbench.errors import InputError
from kvbench.figures import names as figure_names
from kvbench.paper import numbers, sections, tex
from kvbench.paper.values import Value

ROOT = Path(__file__).resolve().parents[2]
PAPER = ROOT / "paper"
LANGUAGES = ("en", "pt")
PARTS = ("numbers", "section", "app_section", "appendix", "main")
CLAIMS = [
    {
        "id": "dynamic_over_none",
        "document": "S1",
        "kind": "derived",
        "statement_en": "Dynamic is faster than none.",
        "statement_pt": "O dinâmico é mais rápido.",
        "figure": "5.36x",
        "machine": "here",
        "value": 5.9,
        "ci_low": 5.8,
        "ci_high": 6.0,
        "smallest_difference": 0.031,
        "verdict": "reproduced",
        "reason": np.nan,
    },
    {
        "id": "hits",
        "document": "S4",
        "kind": "target",
        "statement_en": "Hits are fast.",
        "statement_pt": "Acertos são rápidos.",
        "machine": "epyc",
        "verdict": "not tested",
        "reason": "KeyError: app_response_cache_v2 has no column",
    },
]
#: What a program says to its operator; a reader of the paper may not meet it.
PROGRAM_WORDS = (
    "app_response_cache_v2",
    "Traceback",
    "pip install",
    "Undefined",
    "NaN",
    "Value(",
    "needs the package",
    "needs a cuda device",
    "installed is",
    "0 and 0",
    "0 e 0",
    "needs a transformers",
    "was not measured with",
    "packs 4 groups",
    "Requests with the tokens",
    "Requisições com os tokens",
)


@pytest.fixture(scope="module")
def values():
    summary, samples = synthetic_kv.tables(("here", "epyc", "h200-gpu"))
    environment = {"here": {"commit": "0123456789ab", "date": "2026-01-02T03:04:05Z", "cores": 2}}
    found = numbers.kv_values(summary, samples, CLAIMS, environment)
    for name in studies.names():
        study = studies.get(name)
        found |= study.values(pd.DataFrame(columns=list(study.columns)))
    return found | {"app_machine": Value(None), "reuse_machine": Value(None)}


@pytest.fixture
def write(tmp_path):
    """Write the paper of one language; returns its parts by name."""

    def write(values, lang="en", claims=CLAIMS, figures=(), study_names=None) -> dict[str, str]:
        outputs = {part: tmp_path / "paper" / f"{part}.{lang}.tex" for part in PARTS}
        sections.render(
            values,
            pd.DataFrame(claims),
            lang,
            studies.names() if study_names is None else study_names,
            figures,
            PAPER,
            outputs,
            ROOT / "config" / "claims.yaml",
            ROOT / "CITATION.cff",
        )
        return {part: path.read_text(encoding="utf-8") for part, path in outputs.items()}

    return write


def flat(text: str) -> str:
    return re.sub(r"\s+", " ", text)


def words(name: str, lang: str) -> dict:
    return yaml.safe_load((PAPER / "words" / f"{name}.{lang}.yaml").read_text(encoding="utf-8"))


def worded() -> list[str]:
    return sorted({path.name.split(".")[0] for path in (PAPER / "words").glob("*.yaml")})


# ---------------------------------------------------------------------------------- both languages


@pytest.mark.parametrize("name", worded())
def test_both_languages_have_the_same_sentences_and_use_the_same_values(name):
    english, portuguese = words(name, "en"), words(name, "pt")
    assert list(english) == list(portuguese)
    for key, sentence in english.items():
        if isinstance(sentence, dict):
            assert list(sentence) == list(portuguese[key]), key
            continue
        for pattern in (r"v\[[^\]]+\]", r"\\cite\{[^}]*\}", r"\\ref\{[^}]*\}"):
            used = [sorted(re.findall(pattern, text)) for text in (sentence, portuguese[key])]
            assert used[0] == used[1], key


@pytest.mark.parametrize("name", worded())
def test_every_sentence_is_said_by_its_template(name):
    folder = PAPER if (PAPER / f"{name}.tex.j2").exists() else PAPER / "studies"
    said = set(re.findall(r"\\SAY\{(\w+)\}", (folder / f"{name}.tex.j2").read_text()))
    assert said == set(words(name, "en")) | (said & {"title"})


def test_a_sentence_that_the_words_lack_is_named(tmp_path):
    (tmp_path / "words").mkdir()
    (tmp_path / "words" / "page.en.yaml").write_text("a: A.\n")
    (tmp_path / "page.tex.j2").write_text("\\SAY{a} \\SAY{b}\n")
    with pytest.raises(InputError, match=r"page\.en\.yaml: there is no 'b', which page\.tex\.j2"):
        tex.render(tmp_path / "page.tex.j2", {"lang": "en"})


@pytest.mark.parametrize("lang", LANGUAGES)
def test_every_part_is_balanced_and_says_no_program_message(lang, values, write):
    for part, text in write(values, lang, figures=figure_names()).items():
        bare = re.sub(r"\\[{}%\\]", "", text)
        assert bare.count("{") == bare.count("}"), part
        assert sorted(re.findall(r"\\begin\{(\w+\*?)\}", text)) == sorted(
            re.findall(r"\\end\{(\w+\*?)\}", text)
        ), part
        if part != "numbers":
            for word in PROGRAM_WORDS:
                assert word not in text, (part, word)


def test_portuguese_contracts_its_prepositions_also_before_what_is_filled_in(values, write):
    parts = write(values, "pt", figures=figure_names())
    text = flat("\n".join(parts[part] for part in parts if part != "numbers"))
    assert "nesta máquina" in text
    assert re.findall(r"\b(?:em|de) (?:est[ae]s?|esse|essa|isso|isto)\b.{0,30}", text, re.I) == []


def ids(folder: str) -> set[str]:
    """The ids of what a folder of the configuration holds."""
    return {path.stem for path in (ROOT / "config" / folder).glob("*.yaml")}


@pytest.mark.parametrize("lang", LANGUAGES)
def test_prose_names_models_and_scenarios_and_no_ids(lang, values, write):
    named = {"reuse_scenario", "headline_model", "widest_model", "widest_scenario"} & set(values)
    assert {values[name].value for name in named} & (ids("models") | ids("scenarios"))
    parts = write(values, lang, figures=figure_names())
    text = flat("".join(parts[part] for part in ("main", "section", "app_section")))
    prose = re.sub(r"\\begin\{tabular\}.*?\\end\{tabular\}", "", text)
    code = {
        re.sub(r"\\allowbreak\{\}|\\", "", found)
        for found in re.findall(r"\\texttt\{((?:[^{}]|\{\})*)\}", prose)
    }
    assert code & (ids("models") | ids("scenarios")) == set()


@pytest.mark.parametrize("lang", LANGUAGES)
def test_every_scenario_and_every_model_that_is_no_downloads_name_has_one_for_readers(lang):
    names = words("macros", lang)
    assert set(names["scenarios"]) == ids("scenarios")
    assert {"embedded", "llama-3.2-1b-geometry"} <= set(names["models"]) <= ids("models")
    if lang == "pt":
        # The templates contract a preposition with the article: d + o modelo, n + a conversa.
        articles = re.compile(r"(o|a|os|as) ")
        assert all(map(articles.match, [*names["scenarios"].values(), *names["models"].values()]))


@pytest.mark.parametrize("lang", LANGUAGES)
def test_a_list_whose_items_hold_commas_is_parted_by_semicolons(lang):
    conjunction = {"en": "and", "pt": "e"}[lang]
    listed = tex.join_and({"lang": lang}, ["int4, rest of 32", "int2", "paged"])
    assert listed == f"int4, rest of 32; int2; {conjunction} paged"


@pytest.mark.parametrize("lang", LANGUAGES)
def test_every_work_that_is_cited_is_in_the_bibliography(lang, values, write):
    known = set(re.findall(r"@\w+\{(\w+),", (PAPER / "references.bib").read_text()))
    cited = {
        key.strip()
        for text in write(values, lang).values()
        for group in re.findall(r"\\cite\{([^}]*)\}", text)
        for key in group.split(",")
    }
    assert cited and cited <= known
    assert {"pettec2025notebook", "bang2023gptcache", "zhang2024sieve", "badri2023hqq"} <= cited


@pytest.mark.parametrize("lang", LANGUAGES)
def test_every_figure_and_table_in_the_paper_is_spoken_of(lang, values, write):
    parts = write(values, lang, figures=[*figure_names(), "symposium_symposium_turn"])
    text = "".join(parts.values())
    made = set(re.findall(r"\\label\{((?:fig|tab):[^}]+)\}", text))
    spoken = set(re.findall(r"\\ref\{((?:fig|tab):[^}]+)\}", text))
    assert made - spoken == set()
    # A study without rows has neither; its sentence does not point to them either.
    assert spoken - made == set()


def test_only_machines_with_a_model_of_the_sources_shape_stand_beside_its_numbers(values, write):
    parts = write(values | {"headline_model": Value("embedded")})
    table = parts["section"].partition("\\label{tab:headline}")[2].partition("\\end{table*}")[0]
    assert "epyc" in table and "this machine" not in table
    others = (
        parts["appendix"].partition("\\label{tab:headline_others}")[2].partition("\\end{table}")[0]
    )
    assert "this machine" in others and "epyc" not in others


def test_the_abstract_counts_every_claim_once(values, write):
    text = flat(write(values)["main"])
    assert "Of 2 claims, 1 held on every machine that could judge them, 0 on none" in text
    assert "for 1 nothing measured carries a verdict" in text


def test_this_machine_is_named_with_what_it_is(values, write):
    facts = {"machine_cpu": Value("AMD EPYC (family 26, model 2)"), "machine_cores": Value(2)}
    here = values | facts | {"app_machine": Value("here")}
    assert "this machine (AMD EPYC, family 26, model 2; 2 cores)" in flat(
        write(here)["app_section"]
    )
    portuguese = flat(write(here, "pt")["app_section"])
    assert "nesta máquina (AMD EPYC, família 26, modelo 2; 2 núcleos)" in portuguese


def test_a_share_of_few_pairs_does_not_meet_the_aims():
    few = aa_values(independent=3)
    assert few["aa_enough"].value is None and few["aa_shown"].value == 60


# ------------------------------------------------------------------------- prose follows intervals


def with_ratio(values, write, ratio: Value) -> str:
    return flat(write(values | {"headline_static_speedup_vs_dynamic": ratio})["section"])


def test_prose_follows_the_interval(values, write):
    assert "the static cache was 1.20 times as fast as the dynamic cache" in with_ratio(
        values, write, Value(1.2, (1.1, 1.3))
    )
    assert "the static cache was slower than the dynamic cache" in with_ratio(
        values, write, Value(0.8, (0.7, 0.9))
    )
    assert "no difference was found between the static cache and the dynamic cache" in with_ratio(
        values, write, Value(1.02, (0.95, 1.1))
    )
    unjudged = with_ratio(values, write, Value(1.23))
    assert "No verdict is drawn from ratios that rest on too few rounds" in unjudged
    assert "1.23 for the static cache over the dynamic cache" in unjudged
    assert "1.23 for" not in with_ratio(values, write, Value(None))


def test_no_difference_comes_with_the_difference_that_would_have_been_found(values, write):
    told = values | {"headline_static_smallest_difference": Value(0.034, digits=3)}
    text = with_ratio(told, write, Value(1.02, (0.95, 1.1)))
    assert "a difference of 3.4\\,\\% would have been found nine times out of ten" in text


def test_the_instruments_test_decides_the_answer_on_trust(values, write):
    held = flat("".join(write(values | aa_values()).values()))
    assert "are met from 60 rounds on" in held and "From 60 rounds on, yes" in held
    parts = write(values)
    assert "no machine of this edition holds that test whole" in flat(parts["section"])


def test_cells_that_were_not_measured_in_rounds_are_said_so(values, write):
    one_by_one = write(values | {"all_rounds": Value(0, digits=0)})["section"]
    assert "one after the other" in flat(one_by_one)
    in_rounds = write(values | {"all_rounds": Value(60, digits=0)})["section"]
    assert "in an order drawn anew in every round" in flat(in_rounds)


def test_a_share_of_the_roof_above_one_is_explained_on_the_page(values, write):
    explained = "Where a share exceeds one, the ceiling was measured lower"
    above = values | {"all_roofline_highest": Value(1.2)}
    assert explained in flat(write(above)["section"])
    assert explained not in flat(write(values | {"all_roofline_highest": Value(0.9)})["section"])


def test_the_answers_follow_the_intervals_too(values, write):
    names = [name for name in values if name.endswith("headline_static_speedup_vs_dynamic")]

    def answered(ratio: Value) -> str:
        return flat(write(values | dict.fromkeys(names, ratio))["main"])

    assert "take it where the length is known beforehand" in answered(Value(1.2, (1.1, 1.3)))
    assert "its fixed size buys nothing" in answered(Value(0.8, (0.7, 0.9)))
    assert "these records cannot decide" in answered(Value(1.1))


def test_claims_stand_in_the_appendix_with_document_interval_and_verdict(values, write):
    english, portuguese = (write(values, lang)["appendix"] for lang in LANGUAGES)
    assert "Dynamic is faster than none." in english and "[5.80, 6.00]" in english
    assert "O dinâmico é mais rápido." in portuguese and "reproduzida" in portuguese
    assert re.search(r"No machine tested the following.*Hits are fast\.", english, re.S)
    assert "has no column" not in english
    assert "[5,80; 6,00]" in portuguese and "5,36$\\times$" in portuguese
    assert "S1: KV-cache tutorial notebook" in english
    assert r"sees 3.1\,\%" in english and r"enxerga 3,1\,\%" in portuguese


@pytest.mark.parametrize(
    ("ends", "said"),
    [
        ((1.02, 1.06), "Paired within rounds, a request takes"),
        ((0.94, 0.98), "nevertheless takes only"),
        ((0.98, 1.06), "that gain is not visible"),
        (None, "The rounds behind that gain carry no verdict"),
    ],
)
def test_what_a_second_level_gains_is_said_by_its_paired_ratio(values, write, ends, said):
    """The intervals of two means overlap here, whatever the ratio within rounds shows."""
    named = [name for name in values if name.startswith("layered_")]
    told = values | {name: Value(1.0, (0.5, 1.5)) for name in named}
    told["layered_l1_gain_over_l2"] = Value(1.0, ends)
    assert said in flat(write(told)["app_section"])


def test_what_was_not_tested_is_listed_with_its_reason(values, write):
    rows = yaml.safe_load((ROOT / "config" / "claims.yaml").read_text(encoding="utf-8"))
    for lang in LANGUAGES:
        text = write(values, lang)["appendix"]
        for row in rows["not_tested"]:
            assert tex.escape(row["reason"][lang]) in text


def test_unsupported_strategies_are_listed_once_in_the_papers_own_words(values, write):
    text = write(values)["appendix"]
    assert "offloaded & not supported there & runs on CUDA only" in text
    assert text.count("offloaded & not supported") == 1


def test_no_memory_figure_is_called_the_sources(values, write):
    assert not [name for name in values if re.match(r"published_.*memory", name)]
    assert "31.7" not in write(values)["section"]


@pytest.mark.parametrize("lang", LANGUAGES)
def test_the_paper_is_written_when_nothing_was_measured_here(lang, write):
    tables = synthetic_kv.tables(("epyc",), scenarios=("banking_loan_application",))
    bare = numbers.kv_values(*tables)
    parts = write(bare, lang, claims=[], study_names=[])
    assert "\\input{app_section" not in parts["main"]
    assert {"en": "No machine of this edition", "pt": "Nenhuma máquina desta edição"}[lang] in flat(
        parts["section"]
    )


def test_title_authors_and_language_are_in_the_metadata(values, write):
    main = write(values, "pt")["main"]
    assert "pdflang={pt-BR}" in main and "pdfauthor={kvbench contributors}" in main
    assert "pdftitle={Qual cache deve usar" in main and "[brazilian]{babel}" in main


# ------------------------------------------------------------------------------------------- PDF


def aa_values(**more: object) -> dict[str, Value]:
    """An instrument's test with one number of rounds, which meets its aims."""
    shared = {"machine": "lab", "cells": 4, "blocks": 1, "rounds": 60, "comparisons": 100}
    shared |= {"measuring_s": 20.0, "smallest_slowdown": 0.03}
    same = {"arm": "same", "slowdown": 0.0, "share": 0.03}
    slowed = {"arm": "slowed", "slowdown": 0.05, "share": 0.95}
    ends = {"share_ci_low": 0.01, "share_ci_high": 0.99}
    return numbers.aa_values(pd.DataFrame([shared | arm | ends | more for arm in (same, slowed)]))


@pytest.mark.skipif(
    not all(map(shutil.which, ("latexmk", "pdffonts", "pdftotext"))),
    reason="latexmk or poppler-utils is not installed",
)
@pytest.mark.parametrize("lang", LANGUAGES)
def test_the_pdf_has_no_overfull_box_no_undefined_reference_and_no_bitmap_font(
    lang, values, write, tmp_path
):
    odd = "Um cora\u0063\u0327a\u0303o α\u202f→ 😀 100 % a_b R$ 1.000 & #1"
    claims = [*CLAIMS, CLAIMS[0] | {"id": "odd", "statement_pt": odd, "statement_en": odd}]
    drawn = [*figure_names(), "symposium_symposium_turn"]
    typesetting.any_figure(tmp_path / "figures", drawn, lang)
    (tmp_path / "made").mkdir()
    values = values | {"all_rounds": Value(60, digits=0)} | aa_values()
    pdf, log = typesetting.pdf_of(
        write(values, lang, claims=claims, figures=drawn), tmp_path / "made", lang
    )
    assert "Overfull \\hbox" not in log
    assert "undefined" not in log.lower()
    fonts = subprocess.run(["pdffonts", pdf], capture_output=True, text=True, check=True).stdout
    assert "Type 3" not in fonts
    text = subprocess.run(
        ["pdftotext", pdf, "-"], capture_output=True, text=True, check=True
    ).stdout
    assert "coração" in text and "[U+1F600]" in text and "R$ 1.000" in text


@pytest.mark.skipif(shutil.which("latexmk") is None, reason="latexmk is not installed")
def test_the_pdf_is_built_beside_its_sources_and_nothing_else_stays(tmp_path, monkeypatch):
    from kvbench.paper import typesetting

    monkeypatch.chdir(ROOT)
    paper = tmp_path / "paper"
    paper.mkdir()
    (tmp_path / "figures").mkdir()
    main = paper / "main.en.tex"
    main.write_text("\\documentclass{article}\\begin{document}Text.\\end{document}\n")
    typesetting.compile_pdf(main, paper / "paper.en.pdf", tmp_path / "log")
    assert sorted(path.name for path in paper.iterdir()) == ["main.en.tex", "paper.en.pdf"]


def test_a_sign_without_a_glyph_is_numbered_and_named_in_the_log(caplog):
    assert tex.escape("cafe\u0301 α 😀") == "café \\ensuremath{\\alpha} [U+1F600]"
    assert "GRINNING FACE" in caplog.text


def test_json_of_labels_survives_the_template(tmp_path):
    (tmp_path / "words").mkdir()
    labels = {"a": "\\texttt{x\\_y}", "b": "100\\,\\%"}
    (tmp_path / "words" / "page.en.yaml").write_text(json.dumps({"names": labels}))
    (tmp_path / "page.tex.j2").write_text(
        "\\BLOCK{ set names = \\SAY{names} }\\VAR{names.a} \\VAR{names['b']}\n"
    )
    assert tex.render(tmp_path / "page.tex.j2", {"lang": "en"}) == "\\texttt{x\\_y} 100\\,\\%\n"


def test_the_controls_of_the_application_studies_stand_beside_those_of_the_blocks(values, write):
    counted = {"": 12, "_holding": 11, "_off": 1}
    told = values | {f"all_app_controls{end}": Value(n, digits=0) for end, n in counted.items()}
    told |= {
        f"all_app_controls_{end}": Value(n) for end, n in (("lowest", 0.97), ("highest", 1.05))
    }
    text = flat(write(told)["section"])
    assert r"of their 12 controls (0.97 to 1.05$\times$) the intervals of 11 hold 1" in text


def test_without_controls_of_the_application_studies_the_paper_says_nothing_of_them(values, write):
    told = values | {"all_app_controls": Value(0)}
    assert "measure what they compare with twice" not in flat(write(told)["section"])
