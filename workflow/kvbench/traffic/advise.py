"""Advice from a replay: Markdown, one self-contained page, tables and figures; nothing leaves here."""

from __future__ import annotations

import base64
import importlib
import math
import re
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2

from kvbench import documents, figures
from kvbench.analysis import capacity
from kvbench.errors import InputError
from kvbench.traffic import log as logs
from kvbench.traffic import replay, semantic, tables, verdicts, worth

LANGUAGES = ("en", "pt")
_TEMPLATES = Path(__file__).parent / "templates"

#: Shares that the command prints, in the words of each language.
_SHARES = {
    "repeat_share": ("exact repeats, per request", "repetições exatas, por requisição"),
    "exact_hit_ratio": ("exact cache, LRU, hit ratio", "cache exato, LRU, taxa de acertos"),
    "prefix_unlimited_share": (
        "prefix cache, unlimited, input tokens",
        "cache de prefixos, sem limite, tokens de entrada",
    ),
    "prefix_token_share": (
        "prefix cache, LRU, in this memory, input tokens",
        "cache de prefixos, LRU, nesta memória, tokens de entrada",
    ),
    "prefix_client_share": (
        "prefix cache, unlimited, per client, input tokens",
        "cache de prefixos, sem limite, por cliente, tokens de entrada",
    ),
    "semantic_share": (
        "semantic cache, candidate hits with guards",
        "cache semântico, acertos candidatos com guardas",
    ),
    "left_share": (
        "left to compute, all caches, input tokens",
        "por computar, todos os caches, tokens de entrada",
    ),
}


def run(
    paths: Sequence[Path],
    model: str,
    memory: str,
    output: Path,
    *,
    language: str = "en",
    dtype: str = "bfloat16",
    keep_text: bool = False,
    skip_bad: bool = False,
    with_semantic: bool = True,
    rates: str | None = None,
    price: str | None = None,
    tokenizer: Path | None = None,
    marks: Path | None = None,
    conversations: int = 1_000_000,
) -> str:
    """Replay one log given in parts, write everything into ``output``, and return what to print.

    Raises
    ------
    InputError
        Anything the user gave is wrong: one line.
    """
    if language not in LANGUAGES:
        raise InputError(f"language {language!r}: choose one of {', '.join(LANGUAGES)}")
    if conversations < 1:
        raise InputError(f"conversations is {conversations}; it must be positive")
    folder = Path(model)
    setting = replay.Setting(
        name=_name(paths),
        model=folder.name if folder.exists() else model,
        architecture=capacity.architecture(model),
        memory_bytes=capacity.parse_bytes(memory),
        dtype=dtype,
        ceilings=worth.ceilings(rates),
        price=None if price is None else worth.price(price),
        conversations=conversations,
        keep_text=keep_text,
    )
    judged = None if marks is None else semantic.judged(marks, setting.name)
    if tokenizer is None and folder.is_dir() and (folder / "tokenizer.json").is_file():
        tokenizer = folder / "tokenizer.json"
    log = logs.read(paths, skip_bad=skip_bad, tokenizer=tokenizer)
    encoder = replay.sentence_encoder() if with_semantic and log.questions else None
    _folder(output)
    record = replay.run(log, setting, encoder, judged)
    tables.write(output, [record])
    draw(output / "figures", record, language)
    write_advice(output, record, language)
    return (
        shares(record, language)
        + f"\n\n{output / f'advice.{language}.md'}\n{_page(output, language)}"
    )


def _folder(output: Path) -> None:
    """Make the folder of the advice, before a long replay and not after it."""
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(
            f"{output}: no folder can be made there ({error.strerror}); choose another --output"
        ) from None


def _page(output: Path, language: str) -> Path:
    return output / f"advice.{language}.html"


def _name(paths: Sequence[Path]) -> str:
    """The first part's name without its endings, in characters that a path may have."""
    stem = paths[0].name.split(".")[0] if paths else ""
    return re.sub(r"[^A-Za-z0-9_-]+", "-", stem).strip("-") or "log"


def shares(record: Mapping[str, Any], language: str) -> str:
    """The main shares to four digits, one a line; a dash where the log cannot tell.

    Numbers are written as the language writes them.
    """
    place, local = LANGUAGES.index(language), _local(language)
    width = max(len(words[place]) for words in _SHARES.values())
    asked = local(f"{record['summary']['requests']:,}")
    asked += (" requests", " requisições")[place]
    lines = [f"{record['log']['name']}: {asked} ({record['log']['format']})"]
    skipped = record["summary"]["skipped"]
    if skipped:
        lines[0] += ("; malformed, left out: ", "; malformadas, deixadas de fora: ")[place]
        lines[0] += local(f"{skipped:,}")
    for name, words in _SHARES.items():
        value = record["summary"][name]
        lines.append(f"{words[place]:<{width}}  {'-' if value is None else local(f'{value:.4f}')}")
    heading = (
        f"{'prefix cache, LRU: blocks':>26}{'memory':>12}{'found':>10}{'reused':>10}",
        f"{'cache de prefixos, LRU: blocos':>30}{'memória':>12}{'achados':>10}{'reusados':>10}",
    )
    first = (26, 30)[place]
    rows = [
        row
        for row in record["tables"]["prefix"]
        if (row["policy"], row["sharing"]) == ("lru", "shared")
    ]
    if rows:
        lines.append(heading[place])
    lines += [
        f"{local(format(row['capacity_blocks'], ',')):>{first}}"
        f"{local(_size(2**30 * row['capacity_gib'])):>12}"
        f"{local(format(row['block_share'], '.4f')):>10}"
        f"{local(format(row['token_share'], '.4f')):>10}"
        for row in rows
    ]
    return "\n".join(lines)


# ------------------------------------------------------------------------------------- figures


def figure_names() -> list[str]:
    """Figures of the suite ``traffic``."""
    return [name for name in figures.names() if name.startswith("traffic_")]


def draw(folder: Path, record: Mapping[str, Any], *languages: str) -> list[Path]:
    """Draw every figure of one replay in each language; returns the paths."""
    from kvbench.figures import style

    style.apply()
    found = tables.frames([record])
    written = []
    for name in figure_names():
        module = importlib.import_module(f"kvbench.figures.{name}")
        figure = module.draw(*(found[table] for table in figures.tables_of(name, ())))
        written += style.save(figure, folder / name, *languages)
    return written


# ------------------------------------------------------------------------------------- advice


def write_advice(folder: Path, record: Mapping[str, Any], language: str) -> list[Path]:
    """Write ``advice.<language>.md`` and ``.html``; the page holds its figures, drawn before."""
    text = advice(record, language)
    markdown, page = folder / f"advice.{language}.md", _page(folder, language)
    documents.write_text_atomic(markdown, text)
    documents.write_text_atomic(page, html(text, folder, language))
    return [markdown, page]


def advice(record: Mapping[str, Any], language: str) -> str:
    """The advice in Markdown."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_TEMPLATES),
        undefined=jinja2.StrictUndefined,
        keep_trailing_newline=True,
        autoescape=False,
    )
    environment.filters |= _filters(language)
    text = environment.get_template(f"advice.{language}.md.j2").render(
        **{**record, "missing": defaultdict(str, record["missing"])},
        verdict=verdicts.decide(record),
        ttl=verdicts.ttl_enough(record),
        more=verdicts.more_memory(record),
        exact_decays=verdicts.decays(record, "exact_hit_ratio"),
        prefix_decays=verdicts.decays(record, "prefix_token_share"),
        pays=verdicts.PAYS,
        little=verdicts.LITTLE,
        few=verdicts.FEW,
        better=verdicts.BETTER_POLICY,
        false_hits=verdicts.FALSE_HITS,
        sheet_threshold=semantic.SHEET_THRESHOLD,
    )
    return re.sub(r"\n{3,}", "\n\n", text)


def html(markdown: str, folder: Path, language: str) -> str:
    """One self-contained page: the Markdown as HTML, its figures within it as bitmaps."""
    from markdown_it import MarkdownIt

    from kvbench.figures._bitmap import bitmap

    body = MarkdownIt("commonmark", {"html": False}).enable("table").render(markdown)

    def inline(match: re.Match[str]) -> str:
        path = folder / f"{match[1]}.png"
        if not path.is_file():
            return match[0]
        return 'src="data:image/png;base64,' + base64.b64encode(bitmap(path)).decode() + '"'

    body = re.sub(r'src="(figures/[a-z_]+\.[a-z]+)\.svg"', inline, body)
    # What is wider than a small screen is moved by itself, and the page stands still.
    body = body.replace("<table>", '<div class="scroll"><table>').replace(
        "</table>", "</table></div>"
    )
    body = re.sub(r"<p>(<img [^>]*>)</p>", r'<div class="scroll">\1</div>', body)
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_TEMPLATES), undefined=jinja2.StrictUndefined
    )
    title = markdown.partition("\n")[0].lstrip("# ")
    return environment.get_template("page.html.j2").render(
        language={"pt": "pt-BR"}.get(language, language), title=title, body=body
    )


def _local(language: str) -> Callable[[str], str]:
    """Marks of thousands and decimals as the language has them, from English ones."""
    marks = str.maketrans(",.", ".,") if language == "pt" else {}
    return lambda text: text.translate(marks)


def _digits(value: float) -> str:
    """Three significant digits, never in powers of ten; whole from a thousand on."""
    if value == 0 or abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.{max(0, 2 - math.floor(math.log10(abs(value))))}f}"


def _size(value: float) -> str:
    """Bytes in the unit in which they are a number from 1 to 1,023, to three digits."""
    unit = "B"
    for larger in ("KiB", "MiB", "GiB", "TiB", "PiB"):
        if value < 1023.5:
            break
        value, unit = value / 1024, larger
    return f"{value:.3g} {unit}" if value < 999.5 else f"{value:,.0f} {unit}"


def _filters(language: str) -> dict[str, Any]:
    """Numbers as a reader of the language writes them; a dash for what is not known."""
    local = _local(language)

    def number(value: float | None, digits: int = 2) -> str:
        return "–" if value is None else local(f"{value:,.{digits}f}")

    def count(value: float | None) -> str:
        if value is None:
            return "–"
        return number(value, 1 if 0 < abs(value) < 10 and value != int(value) else 0)

    def digits(value: float | None) -> str:
        return "–" if value is None else local(_digits(value))

    def money(value: float | None) -> str:
        # Cents, and what is less than a dollar to three digits.
        return digits(value) if value is not None and 0 < value < 1 else number(value, 2)

    def pct(value: float | None, digits: int = 2) -> str:
        return "–" if value is None else number(100 * value, digits) + " %"

    def size(value: float | None) -> str:
        return "–" if value is None else local(_size(value))

    days = {"en": "days", "pt": "dias"}[language]

    def seconds(value: float | None) -> str:
        if value is None:
            return "–"
        for unit, length in ((days, 86400.0), ("h", 3600.0), ("min", 60.0)):
            if value >= 2 * length:
                times = value / length
                return local(f"{times:.3g}" if times < 1000 else f"{times:,.0f}") + f" {unit}"
        for unit, length in (("s", 0.1), ("ms", 1e-4)):
            if value >= length or value == 0:
                return local(f"{value * (1 if unit == 's' else 1000):.3g}") + f" {unit}"
        return local(_digits(value * 1e6)) + " µs"

    def rates(source: str) -> str:
        given = {"en": "numbers as given", "pt": "números dados"}[language]
        here = {"en": "measured here", "pt": "medidos aqui"}[language]
        machine, comma, dtype = source.partition(", ")
        return (
            given
            if source == "as given"
            else ({"here": here}.get(machine, machine)) + comma + dtype
        )

    def policy(name: str) -> str:
        from kvbench.figures._traffic import POLICIES

        return POLICIES[name][2] if name in POLICIES else name.replace("_", " ")

    def capfirst(text: str) -> str:
        return text[:1].upper() + text[1:]

    return {
        "number": number,
        "count": count,
        "digits": digits,
        "money": money,
        "pct": pct,
        "bytes": size,
        "policy": policy,
        "rates": rates,
        "seconds": seconds,
        "capfirst": capfirst,
    }
