"""The documentation names what exists: keys, defaults, options, strategies, studies, targets, links.

Tables between ``<!-- table: name -->`` and ``<!-- end of table -->`` are written from the code. After
a change there, ``PYTHONPATH=workflow python tests/unit/test_docs.py`` writes them anew.
"""

from __future__ import annotations

import functools
import gc
import inspect
import json
import re
import shlex
import shutil
import sys
import types
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest
import yaml
from kvbench import documents, physics, strategies, studies
from kvbench.analysis import claims
from kvbench.inputs import configuration, scenarios
from kvbench.strategies import options
from kvbench.traffic import columns as traffic_columns

ROOT = Path(__file__).resolve().parents[2]
CONFIG, CONFIG_PT = "config/README.md", "config/README.pt-BR.md"
#: Where the strategies and studies are listed, and where the examples of additions stand.
STRATEGIES, STRATEGIES_PT = "docs/strategies.md", "docs/strategies.pt-BR.md"
EXAMPLES = "docs/adding.md"
#: Every page that there is in English and in Portuguese, found by its name.
TRANSLATED = (
    "README.md",
    "config/README.md",
    *(f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md"))),
)
TRANSLATED = tuple(name for name in TRANSLATED if not name.endswith(".pt-BR.md"))
DOCUMENTS = (
    *TRANSLATED,
    *(name.replace(".md", ".pt-BR.md") for name in TRANSLATED),
    "workflow/README.md",
    "profiles/README.md",
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    *(str(path.relative_to(ROOT)) for path in sorted(ROOT.glob("resources/*/README.md"))),
)
#: Options of Snakemake in the examples that are followed by a value.
WITH_VALUE = {"--cores", "--configfile", "--config", "--profile", "--report", "--sdm", "-c"}
_TABLE = re.compile(r"(<!-- table: ([a-z_ ]+) -->\n).*?(<!-- end of table -->)", re.DOTALL)
_FENCE = re.compile(r"^```(\w+)(?: ([^\n]+))?\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def text_of(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


# ------------------------------------------------------------------ tables written from the code


def bounds(rules: Mapping[str, Any]) -> str:
    """The limits of a number as a reader sees them."""
    signs = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
    return ", ".join(f"{sign} {rules[key]}" for key, sign in signs.items() if key in rules)


def kind(rules: Mapping[str, Any]) -> str:
    """What a key takes, in words."""
    if "const" in rules:
        return f"`{rules['const']}`"
    if "enum" in rules:
        if {str(name).lower() for name in rules["enum"]} == {"true", "false"}:
            # Snakemake's command line hands a switch on as text, in any case.
            return "`true` or `false`"
        return " or ".join(f"`{name}`" for name in rules["enum"])
    named = rules.get("type", "any")
    named = [named] if isinstance(named, str) else named
    words = {"integer": "whole number", "number": "number", "string": "text", "object": "mapping"}
    told = []
    for name in named:
        if name == "array":
            told.append(f"list of {kind(rules['items'])}")
        elif name in {"integer", "number"}:
            told.append(f"{words[name]} {bounds(rules)}".strip())
        else:
            told.append(words.get(name, name))
    return " or ".join(told)


def default(rules: Mapping[str, Any], required: bool) -> str:
    """The default as YAML would spell it."""
    if required:
        return "required"
    if "default" not in rules:
        return "-"
    if "items" in rules and rules["default"] == rules["items"].get("enum"):
        return "all of them"
    return f"`{json.dumps(rules['default'], ensure_ascii=False)}`"


def key_table(properties: Mapping[str, Any], required: list[str], leave_out: tuple = ()) -> str:
    """One row per key of an object's schema."""
    lines = ["| key | takes | default | meaning |", "|---|---|---|---|"]
    for key, rules in properties.items():
        if key in leave_out:
            continue
        cells = (
            f"`{key}`",
            kind(rules),
            default(rules, key in required),
            rules.get("description", ""),
        )
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines)


#: Words of a table of keys, in Portuguese; a key's description is said by the phrase book.
PORTUGUESE = {
    "whole number": "número inteiro",
    "number": "número",
    "text": "texto",
    "mapping": "mapeamento",
    "boolean": "booleano",
    "list of": "lista de",
    "or": "ou",
    "all of them": "todos",
    "required": "obrigatória",
    "every one of the library's": "toda estratégia da biblioteca",
    "at least": "de no mínimo",
    "at most": "no máximo",
    "and": "e",
    "a": "um",
}
_ENGLISH = re.compile(r"(?<![\w`])(" + "|".join(PORTUGUESE) + r")(?![\w`])")
#: Heads of the tables, in Portuguese.
HEADS_PT = {
    "key": "chave",
    "strategy": "estratégia",
    "option": "opção",
    "in ids": "nos ids",
    "takes": "aceita",
    "default": "padrão",
    "meaning": "significado",
}


def in_portuguese(table: str) -> str:
    """A table of keys or options for readers of Portuguese; the last column is its meaning."""
    book = yaml.safe_load(text_of("docs/keys.pt.yaml"))
    head, rule, *rows = table.splitlines()
    lines = [" | ".join(HEADS_PT.get(cell, cell) for cell in cells_of(head)), rule]
    for row in rows:
        *cells, meaning = cells_of(row)
        cells = [_ENGLISH.sub(lambda m: PORTUGUESE[m[0]], cell) for cell in cells]
        assert meaning in book, (
            f"docs/keys.pt.yaml says nothing of {cells[0]}; add the line {json.dumps(meaning)}: "
            "with its Portuguese"
        )
        lines.append(" | ".join([*cells, book[meaning]]))
    return "\n".join(line if line == rule else f"| {line} |" for line in lines)


def cells_of(row: str) -> list[str]:
    """The cells of a line of a Markdown table."""
    return re.split(r" (?<!\\)\| ", row.removeprefix("| ").removesuffix(" |"))


def key_table_pt(properties: Mapping[str, Any], required: list[str], leave_out: tuple = ()) -> str:
    """The same table for readers of Portuguese."""
    return in_portuguese(key_table(properties, required, leave_out))


def first_sentence(text: str) -> str:
    """The first paragraph of a docstring, as Markdown."""
    paragraph = text.split("\n\n")[0].replace("\n", " ")
    return paragraph.replace("``", "`")


def places(strategy: strategies.Strategy) -> str:
    return ", ".join(device.upper() for device in sorted(strategy.devices))


def strategy_table() -> str:
    lines = ["| strategy | what it keeps | exact | runs on |", "|---|---|---|---|"]
    for name in strategies.names():
        strategy = strategies.get(name)
        exact = "yes" if strategy.exact else "no"
        told = first_sentence(strategies.description(name))
        lines.append(f"| `{name}` | {told} | {exact} | {places(strategy)} |")
    return "\n".join(lines)


def option_table() -> str:
    """One row per option of a strategy, with its meaning from the class's docstring."""
    lines = [
        "| strategy | option | in ids | takes | default | meaning |",
        "|---|---|---|---|---|---|",
    ]
    shared = options.of(strategies.Strategy)
    rows = [("every one of the library's", strategies.Strategy)]
    rows += [(f"`{name}`", cls) for name, cls in strategies.classes().items()]
    for name, cls in rows:
        for one in options.of(cls).values():
            if one.name in shared and cls is not strategies.Strategy:
                continue
            spelled = one.spell(True if one.default is False else one.default)
            lines.append(
                f"| {name} | `{one.name}` | `{spelled}` | {one.takes} | "
                f"`{json.dumps(one.default)}` | {parameter(cls, one.name)} |"
            )
    return "\n".join(lines)


def parameter(cls: type, name: str) -> str:
    """What a class, or one that it derives from, says of a parameter in its docstring."""
    for base in cls.__mro__:
        found = re.search(
            rf"^{name}:\n((?: {{4}}.+\n?)+)", inspect.cleandoc(base.__doc__ or ""), re.MULTILINE
        )
        if found:
            return " ".join(found[1].split())
    raise AssertionError(f"{cls.__name__} does not say what {name} is")


def study_table() -> str:
    lines = ["| study | question |", "|---|---|"]
    lines += [f"| `{name}` | {studies.get(name).question} |" for name in studies.names()]
    return "\n".join(lines)


def study_options(
    questions: Mapping[str, str] | None = None, write: Callable[..., str] = key_table
) -> str:
    """One section per study; questions in another language may be given."""
    parts = []
    for name in studies.names():
        study = studies.get(name)
        assert questions is None or name in questions, (
            f"{STRATEGIES_PT} has no row for the study {name}; write one with its question in Portuguese"
        )
        question = questions[name] if questions else study.question
        required = study.options.get("required", [])
        parts.append(
            f"### {name}\n\n{question}\n\n{write(study.options['properties'], required)}\n"
        )
    return "\n".join(parts).rstrip()


def questions_pt() -> dict[str, str]:
    """Study to its question, as the Portuguese list of studies asks it."""
    return dict(re.findall(r"^\| `(\w+)` \| ([^|]+\?) \|$", text_of(STRATEGIES_PT), re.M))


def object_table(
    schema: str, *path: str, leave_out: tuple = (), write: Callable[..., str] = key_table
) -> str:
    rules = documents.schema(schema)
    for step in path:
        rules = rules[step] if step in rules else rules["properties"][step]
    return write(rules["properties"], rules.get("required", []), leave_out)


def scenario_table(which: str, write: Callable[..., str] = key_table) -> str:
    rules = documents.schema("scenario")
    variant = next(
        one["then"] for one in rules["allOf"] if one["if"]["properties"]["kind"]["const"] == which
    )
    properties = {
        key: {**rules["properties"].get(key, {}), **own}
        for key, own in variant["properties"].items()
    }
    for key, inner in (("turns", "user"), ("turns", "reference"), ("steps", "prompt_tokens")):
        items = variant["properties"].get(key, {}).get("items", {}).get("properties", {})
        if inner in items:
            properties |= {f"{key}[].{name}": own for name, own in items.items()}
    needed = [*rules["required"], *variant["required"]]
    needed += [key for key in properties if "[]." in key]
    return write(properties, needed)


TABLES = {
    "strategies": strategy_table,
    "strategy options": option_table,
    "strategy options pt": lambda: in_portuguese(option_table()),
    "studies": study_table,
    "study options": study_options,
    "study options pt": lambda: study_options(questions_pt(), key_table_pt),
}
#: Tables of keys: name to schema, path in it, and keys that have a table of their own.
KEYS = {
    "config": (("config",), ("kv", "app", "traffic", "aa_test")),
    "kv": (("config", "kv"), ("experiments",)),
    "experiments": (("config", "kv", "experiments", "items"), ()),
    "app": (("config", "app"), ()),
    "traffic": (("config", "traffic"), ("logs",)),
    "logs": (("config", "traffic", "logs", "items"), ()),
    "aa_test": (("config", "aa_test"), ()),
    "model": (("model",), ()),
}
for end, write in (("", key_table), (" pt", key_table_pt)):
    for name, (where, leave_out) in KEYS.items():
        TABLES[name + end] = functools.partial(
            object_table, *where, leave_out=leave_out, write=write
        )
    for name in ("conversation", "fixed"):
        TABLES[name + end] = functools.partial(scenario_table, name, write)


def with_tables(text: str) -> str:
    """The text with every marked table as the code has it now."""

    def fresh(match: re.Match) -> str:
        return f"{match[1]}{TABLES[match[2]]()}\n{match[3]}"

    return _TABLE.sub(fresh, text)


@pytest.mark.parametrize("name", [STRATEGIES, CONFIG, CONFIG_PT])
def test_tables_of_keys_options_strategies_and_studies_equal_the_code(name):
    written, expected = text_of(name).splitlines(), with_tables(text_of(name)).splitlines()
    differing = [line for line in expected if line not in written]
    assert written == expected, (
        "run PYTHONPATH=workflow python tests/unit/test_docs.py; new or changed: "
        + "\n".join(differing[:5])
    )


def test_every_table_stands_in_a_document():
    marked = {match[2] for name in DOCUMENTS for match in _TABLE.finditer(text_of(name))}
    assert marked == set(TABLES)


def test_the_portuguese_page_of_configuration_has_every_table_of_the_english_one():
    english, portuguese = ([m[2] for m in _TABLE.finditer(text_of(n))] for n in (CONFIG, CONFIG_PT))
    assert [f"{name} pt" for name in english] == portuguese


def test_what_a_key_takes_is_said_in_portuguese():
    rows = [line for line in text_of(CONFIG_PT).splitlines() if line.startswith("| `")]
    cells = [re.sub("`[^`]+`", "", cell) for row in rows for cell in cells_of(row)[:-1]]
    assert not [cell for cell in cells if _ENGLISH.search(cell)]


def test_a_key_without_portuguese_is_named():
    table = key_table({"new": {"type": "integer", "description": "Not told yet."}}, [])
    with pytest.raises(AssertionError, match=r"`new`.*Not told yet"):
        in_portuguese(table)


def test_the_portuguese_of_a_key_that_is_gone_is_gone():
    said = {cells_of(line)[-1] for line in text_of(CONFIG_PT).splitlines() if line.startswith("|")}
    book = yaml.safe_load(text_of("docs/keys.pt.yaml"))
    assert {meaning for meaning in book.values() if meaning not in said} == set()


@pytest.mark.parametrize("strategy", strategies.names())
def test_the_portuguese_page_lists_every_strategy_with_exactness_and_devices(strategy):
    found = strategies.get(strategy)
    exact = "sim" if found.exact else "não"
    row = rf"^\| `{strategy}` \| [^|]+ \| {exact} \| {places(found)} \|$"
    assert re.search(row, text_of(STRATEGIES_PT), re.MULTILINE), row


def test_the_portuguese_page_lists_no_strategy_or_study_that_does_not_exist():
    listed = set(
        re.findall(r"^\| `(\w+)` \| [^|]+ \| (?:sim|não) \|", text_of(STRATEGIES_PT), re.M)
    )
    assert listed == set(strategies.names())
    asked = set(re.findall(r"^\| `(\w+)` \| [^|]+\? \|$", text_of(STRATEGIES_PT), re.M))
    assert asked == set(studies.names())


# --------------------------------------------------------------------------- commands and links


def rules() -> set[str]:
    files = [ROOT / "Snakefile", *(ROOT / "workflow" / "rules").glob("*.smk")]
    return {name for file in files for name in re.findall(r"^rule (\w+):", file.read_text(), re.M)}


def commands(text: str, program: str) -> Iterator[list[str]]:
    """Words after ``program`` in code blocks and in inline code."""
    blocks = [line for _, _, block in _FENCE.findall(text) for line in block.splitlines()]
    inline = re.findall(r"(?<!`)`([^`\n]+)`(?!`)", _FENCE.sub("", text))
    for line in (*blocks, *inline):
        words = shlex.split(line.strip(), comments=True) if line.strip().startswith(program) else []
        if words[:1] == [program]:
            yield words[1:]


@pytest.mark.parametrize("name", DOCUMENTS)
def test_every_snakemake_target_and_configuration_in_the_documents_exists(name):
    keys = documents.schema("config")["properties"]
    examples = {label for _, label, _ in _FENCE.findall(text_of(name)) if label}
    for words in commands(text_of(name), "snakemake"):
        option = None
        for word in words:
            if word.startswith("-"):
                option = word if word in WITH_VALUE else None
            elif option == "--config":
                assert word.partition("=")[0] in keys, word
            elif option is not None:
                if option == "--configfile":
                    assert word in examples or (ROOT / word).is_file(), word
                option = None
            else:
                assert word in rules(), f"{name}: no rule {word}"


@pytest.mark.parametrize("name", DOCUMENTS)
def test_every_make_target_in_the_documents_exists(name):
    known = set(re.findall(r"^([a-z-]+):", text_of("Makefile"), re.M))
    for words in commands(text_of(name), "make"):
        assert {word for word in words if "=" not in word} <= known, words


def test_the_pages_in_english_tell_of_every_target_a_user_may_ask_for():
    asked = {
        word
        for name in TRANSLATED
        for words in commands(text_of(name), "snakemake")
        for word in words
    }
    targets = set(re.findall(r"^rule (\w+):", text_of("Snakefile"), re.M)) - {"all"}
    targets |= {"claims", "record", "aa_test", "train_embedded_model", "report"}
    assert targets | {"symposium", "spreadsheets", "crate"} <= asked


def slugs(text: str) -> set[str]:
    """Anchors that a page's headings have."""
    titles = re.findall(r"^#+ (.+)$", _FENCE.sub("", text), re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("name", DOCUMENTS)
def test_every_relative_link_leads_somewhere(name):
    for link in re.findall(r"\]\(([^)\s]+)\)", _FENCE.sub("", text_of(name))):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = unquote(link).partition("#")
        target = (ROOT / name).parent / path if path else ROOT / name
        assert target.exists(), f"{name}: {link}"
        if anchor and target.suffix == ".md":
            assert anchor in slugs(target.read_text(encoding="utf-8")), f"{name}: {link}"


#: Files that a reader will make.
OTHERS = {
    "docs/adding.md": {"paper/studies/dict_lookup.tex.j2", "paper/words/dict_lookup.en.yaml"},
    "docs/adding.pt-BR.md": {"paper/studies/dict_lookup.tex.j2", "paper/words/dict_lookup.en.yaml"},
}


@cache
def sources() -> str:
    """Everything in which a file that a run makes is named."""
    files = [ROOT / "Snakefile", ROOT / "Makefile"]
    for suffix in ("py", "smk", "j2"):
        files += sorted((ROOT / "workflow").rglob(f"*.{suffix}"))
    return "\n".join(file.read_text(encoding="utf-8") for file in files)


def stands(name: str, path: str) -> bool:
    """Whether a path that a page names is in the repository, or is made by a run."""
    bases = (ROOT, (ROOT / name).parent, ROOT / "workflow", ROOT / "workflow" / "kvbench")
    if any((base / path).exists() for base in bases):
        return True
    if path.startswith("results/"):
        made = sources()
        return path.rstrip("/") in made or re.sub(r"\.(en|pt)\.", ".{language}.", path) in made
    # A file that is named alone is somewhere, or a table that the code names.
    stem = re.sub(r"\.(en|pt)$", "", Path(path).stem)
    known = stem in sources() or stem in traffic_columns.described()
    return "/" not in path and (known or any(ROOT.glob(f"config/*/{path}")))


@pytest.mark.parametrize("name", DOCUMENTS)
def test_every_path_in_the_documents_is_in_the_repository_or_made_by_a_run(name):
    inline = re.findall(r"(?<!`)`([\w./-]+)`(?!`)", _FENCE.sub("", text_of(name)))
    suffixes = r"(md|yaml|py|smk|csv|json|html|txt|lock|in|cff|toml|tex|j2)"
    paths = {
        path
        for path in inline
        if re.match(r"(results|config|docs|envs|paper|profiles|resources|tests|workflow)/", path)
        or re.fullmatch(rf"\w[\w.-]*\.{suffixes}", path)
    }
    assert [
        path for path in sorted(paths - OTHERS.get(name, set())) if not stands(name, path)
    ] == []


@pytest.mark.parametrize("name", DOCUMENTS)
def test_no_number_is_left_to_be_filled_in(name):
    assert not re.findall(r"\{\{.*?\}\}", text_of(name))


@pytest.mark.parametrize("name", ["README.md", "README.pt-BR.md"])
def test_a_readme_is_short_and_keeps_its_measured_blocks(name):
    text = text_of(name)
    assert len(text.splitlines()) <= 250
    assert re.findall(r"<!-- measured: (\w+) -->", text) == ["headline", "answers", "costs"]
    assert text.count("<!-- end of measured -->") == 3


@pytest.mark.parametrize("path", sorted((ROOT / "docs" / "images").iterdir()), ids=lambda p: p.name)
def test_a_picture_is_light_and_shown_by_a_readme(path):
    assert path.stat().st_size < 60_000
    assert any(
        f"](docs/images/{path.name})" in text_of(f"README{end}") for end in (".md", ".pt-BR.md")
    )


@pytest.mark.parametrize("name", TRANSLATED)
def test_both_languages_show_the_same_commands_and_examples(name):
    def code(name: str) -> list[str]:
        blocks = [block for language, _, block in _FENCE.findall(text_of(name)) if language]
        # Comments are translated, and a page shows the output in its own language.
        return [re.sub(r"\s*# .*| --language pt$", "", block, flags=re.M) for block in blocks]

    assert code(name) == code(name.replace(".md", ".pt-BR.md"))


def numbers_of(text: str, thousands: str, decimal: str) -> list[Counter[str]]:
    """Numbers in the prose of each section, as a program writes them."""
    prose = re.sub(r"`[^`\n]*`|\]\([^)]*\)", "", _FENCE.sub("", text))
    grouped = re.compile(rf"\d{{1,3}}(?:\{thousands}\d{{3}})+(?:\{decimal}\d+)?")
    found = []
    for section in re.split(r"^(?=#+ )", prose, flags=re.M):
        words = re.findall(r"(?<![\w.])\d(?:[\d.,]*\d|(?!\w))", section)
        plain = [word.replace(thousands, "") if grouped.fullmatch(word) else word for word in words]
        found.append(Counter(word.replace(decimal, ".") for word in plain))
    return found


@pytest.mark.parametrize("name", TRANSLATED)
def test_both_languages_say_the_same_numbers_in_every_section(name):
    english = numbers_of(text_of(name), ",", ".")
    portuguese = numbers_of(text_of(name.replace(".md", ".pt-BR.md")), ".", ",")
    for here, there in zip(english, portuguese, strict=True):
        assert here == there, f"only here: {here - there}; only there: {there - here}"


@pytest.mark.parametrize("name", TRANSLATED)
def test_both_languages_have_the_same_sections(name):
    def levels(name: str) -> list[str]:
        return re.findall(r"^(#+) ", _FENCE.sub("", text_of(name)), re.M)

    assert levels(name) == levels(name.replace(".md", ".pt-BR.md"))


# ------------------------------------------------------------- the examples of how to add something


def example(path: str) -> str:
    """The code block of the page on additions that is labelled with a path."""
    found = [block for _, label, block in _FENCE.findall(text_of(EXAMPLES)) if label == path]
    assert len(found) == 1, path
    return found[0]


@pytest.fixture
def run_example() -> Iterator[Callable[[str], dict[str, Any]]]:
    """Run the example of a module; give what it defines."""
    made: list[str] = []

    def run(path: str) -> dict[str, Any]:
        module = types.ModuleType(f"example_{Path(path).stem}")
        # Dataclasses look their module up by name.
        sys.modules[module.__name__] = module
        made.append(module.__name__)
        exec(compile(example(path), path, "exec", dont_inherit=True), module.__dict__)
        return module.__dict__

    yield run
    for name in made:
        sys.modules.pop(name, None)
    # A strategy is found by being a subclass; the example must not outlive its test.
    gc.collect()


def test_the_example_of_a_scenario_is_a_scenario(tmp_path):
    name = "config/scenarios/parcel_delivery.yaml"
    (tmp_path / Path(name).name).write_text(example(name), encoding="utf-8")
    assert scenarios.load(tmp_path / Path(name).name).length == 2


def test_the_example_of_a_model_is_a_model(tmp_path):
    name = "config/models/my-model.yaml"
    (tmp_path / Path(name).name).write_text(example(name), encoding="utf-8")
    assert list(configuration.read_models(tmp_path)) == ["my-model"]


def test_the_example_of_a_claim_is_a_claim(tmp_path):
    shutil.copytree(ROOT / "config", tmp_path / "config")
    path = tmp_path / "config" / "claims.yaml"
    path.write_text(path.read_text() + "\n" + example("config/claims.yaml"), encoding="utf-8")
    assert claims.load(path)[-1].id == "static_first_token"


def test_the_example_of_an_experiment_is_a_configuration():
    document = yaml.safe_load(example("my-experiment.yaml"))
    filled = configuration.fill(document, "my-experiment.yaml")
    found = configuration.load_scenarios_and_models(ROOT / "config")
    assert configuration.plan_kv(filled, *found, "my-experiment.yaml")
    assert configuration.plan_app(filled, found[1], "my-experiment.yaml")


def test_the_example_of_a_strategy_gives_the_tokens_and_bytes_it_promises(tiny, run_example):
    from kvbench.measurement.memory import cache_bytes

    # Asked first, so that the registry does not see the example.
    dynamic = strategies.get("dynamic")
    strategy = run_example("workflow/kvbench/strategies/roomy.py")["StaticRoomy"]()
    prompt = list(range(300, 340))

    def generate(found: strategies.Strategy):
        session = found.session(tiny, 64)
        try:
            return session.generate(prompt, 8, lambda: None)
        finally:
            session.close()

    expected, roomy = generate(dynamic), generate(strategy)
    arch = physics.Architecture.from_config(tiny.architecture)
    assert roomy.tokens == expected.tokens
    assert cache_bytes(roomy.cache) == physics.predicted_kv_bytes(
        arch, strategy.traffic(64), len(prompt), 8, physics.bytes_per_element("float32")
    )


def test_the_example_of_a_study_plans_and_measures(tmp_path, run_example, monkeypatch):
    import pandas as pd

    measuring = run_example("workflow/kvbench/studies/measuring/dict_lookup.py")
    part = types.SimpleNamespace(**measuring)
    monkeypatch.setitem(sys.modules, "kvbench.studies.measuring.dict_lookup", part)
    study = run_example("workflow/kvbench/studies/dict_lookup.py")["STUDY"]
    options = documents.fill_defaults({}, study.options)
    context = studies.Context(tmp_path, seed=1)
    rows = [
        row
        for cell in study.plan(options).values()
        for row in study.measure(cell.factors, context).rows
    ]
    assert [set(row) for row in rows] == [set(study.columns)] * len(rows)
    assert study.values(pd.DataFrame(rows))["dict_lookup_ns"].value > 0
    assert study.values(pd.DataFrame(columns=list(study.columns)))["dict_lookup_ns"].value is None


def test_the_example_of_a_figure_draws(tmp_path, run_example):
    import synthetic_kv
    from kvbench.figures import style

    module = run_example("workflow/kvbench/figures/kv_throughput.py")
    summary, samples = synthetic_kv.tables()
    written = style.save(module["draw"](summary, samples), tmp_path / "figure")
    assert all(path.stat().st_size > 1000 for path in written)
    assert module["QUESTION"].endswith("?")


if __name__ == "__main__":
    for document in (STRATEGIES, CONFIG, CONFIG_PT):
        try:
            (ROOT / document).write_text(with_tables(text_of(document)), encoding="utf-8")
        except AssertionError as lacking:
            sys.exit(f"{document} is not written yet: {lacking}")
