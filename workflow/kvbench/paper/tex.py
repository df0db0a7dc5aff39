r"""LaTeX from numbers: the Jinja2 environment, its filters, and ``numbers.tex``.

Templates use ``\VAR{...}``, ``\BLOCK{...}`` and ``\COMMENT{...}``. A name that is not in the
context stops the build. Rounding happens here and nowhere else: siunitx only sets what it is given.

A template has no words of its own: ``\SAY{key}`` stands for the sentence (or the mapping of labels)
that ``words/<template>.<language>.yaml`` has under ``key``. It is put in before the template is
compiled, so a sentence may use whatever the template may, at the place where it stands.
"""

from __future__ import annotations

import json
import logging
import math
import numbers
import re
import traceback
import unicodedata
from collections.abc import Iterable, Mapping
from decimal import ROUND_HALF_EVEN, Decimal
from functools import cache
from pathlib import Path
from typing import Any

import jinja2
from jinja2 import pass_context

from kvbench import documents
from kvbench.errors import InputError
from kvbench.paper.values import Value

log = logging.getLogger(__name__)

#: What stands where a number is missing, the decimal sign, what separates the ends of an interval,
#: and how a list ends.
LANGUAGES = {
    "en": {
        "missing": "n/a",
        "decimal": ".",
        "between": ", ",
        "and": "and",
        "oxford": ",",
    },
    # With a decimal comma, the items of a list and the ends of an interval need a semicolon.
    "pt": {
        "missing": "n/d",
        "decimal": ",",
        "between": "; ",
        "and": "e",
        "oxford": "",
    },
}

#: Units as the reader sees them, in siunitx macros.
UNITS = {
    "s": r"\second",
    "ms": r"\milli\second",
    "us": r"\micro\second",
    "B": r"\byte",
    "KiB": r"\kibi\byte",
    "MiB": r"\mebi\byte",
    "GiB": r"\gibi\byte",
    "MB": r"\mega\byte",
    "GB": r"\giga\byte",
    "GB/s": r"\giga\byte\per\second",
    "GFLOP/s": "GFLOP/s",
    "tokens/s": "tokens/s",
    "req/s": "req/s",
    "nats": "nats",
    "bytes": r"\byte",
    "1/s": r"\per\second",
    "%": r"\percent",
}

#: Every macro of ``numbers.tex`` starts with this, so that none hides a LaTeX command.
MACRO_PREFIX = "kvb"

_DIGITS = ("Zero", "One", "Two", "Three", "Four", "Five", "Six", "Seven", "Eight", "Nine")

_SPECIAL = {
    "\\": r"\textbackslash{}",
    "{": r"\{",
    "}": r"\}",
    "&": r"\&",
    "%": r"\%",
    "$": r"\$",
    "#": r"\#",
    "_": r"\_",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    '"': r"\textquotedbl{}",
    "×": r"\texttimes{}",
    "·": r"\textperiodcentered{}",
    "µ": r"\textmu{}",
    "≤": r"$\le$",
    "≥": r"$\ge$",
    "→": r"$\rightarrow$",
    "←": r"$\leftarrow$",
    "−": "$-$",
    "±": r"$\pm$",
    "≈": r"$\approx$",
    "≠": r"$\neq$",
    "∞": r"$\infty$",
    "√": r"$\surd$",
    "…": r"\dots{}",
    "–": "--",
    "—": "---",
    "‑": "-",
    "“": "``",
    "”": "''",
    "‘": "`",
    "’": "'",
    "•": r"\textbullet{}",
    "€": r"\texteuro{}",
    "\u00a0": "~",
    "\u202f": r"\,",
    "\u2009": r"\,",
    "\u200b": "",
    "\u200d": "",
    "\ufe0f": "",
    "\ufeff": "",
}

#: Small Greek letters from alpha on; omicron is a Latin o.
_SMALL = (
    "alpha beta gamma delta varepsilon zeta eta theta iota kappa lambda mu nu xi o pi rho varsigma "
    "sigma tau upsilon varphi chi psi omega"
)
#: Greek letters by name; the capitals that LaTeX lacks look like Latin ones.
_GREEK = {
    **{chr(0x3B1 + n): rf"\ensuremath{{\{name}}}" for n, name in enumerate(_SMALL.split())},
    **{
        sign: rf"\ensuremath{{\{name}}}"
        for sign, name in zip(
            "ΓΔΘΛΞΠΣΥΦΨΩ",
            [
                "Gamma",
                "Delta",
                "Theta",
                "Lambda",
                "Xi",
                "Pi",
                "Sigma",
                "Upsilon",
                "Phi",
                "Psi",
                "Omega",
            ],
            strict=True,
        )
    },
    **dict(zip("ΑΒΕΖΗΙΚΜΝΟΡΤΧο", "ABEZHIKMNOPTXo", strict=True)),
}

#: The last sign of Latin Extended-A: what stands in the paper's font encoding or is composed in it.
_LAST_LATIN = 0x17F


def escape(text: object) -> str:
    """Text with every character that LaTeX would interpret written so that it prints.

    Accents are composed first. A sign that the fonts have no glyph for is printed by its number,
    ``[U+1F600]``, and named in the log, so that a statement from anywhere builds.
    """
    return "".join(map(_printed, unicodedata.normalize("NFC", str(text))))


def _printed(sign: str) -> str:
    for known in (_SPECIAL, _GREEK):
        if sign in known:
            return known[sign]
    if sign in "\t\n" or 0x20 <= ord(sign) < 0x7F or 0xA0 <= ord(sign) <= _LAST_LATIN:
        return sign
    if unicodedata.combining(sign) or unicodedata.category(sign) in ("Cc", "Cf"):
        return ""
    name = unicodedata.name(sign, "no name")
    log.warning("no glyph for U+%04X (%s): its number stands in the text", ord(sign), name)
    return f"[U+{ord(sign):04X}]"


def _language(context: Mapping[str, Any]) -> dict[str, str]:
    lang = context.get("lang", "en")
    if lang not in LANGUAGES:
        raise InputError(f"lang is {lang!r}; known languages: {', '.join(sorted(LANGUAGES))}")
    return LANGUAGES[lang]


def _present(entry: object) -> object:
    """The plain value inside a Value, None for NaN and infinities; an undefined name raises."""
    if isinstance(entry, jinja2.Undefined):
        str(entry)
    value = entry.value if isinstance(entry, Value) else entry
    if isinstance(value, numbers.Real) and not isinstance(value, bool):
        return value if math.isfinite(value) else None
    return value


def _rounded(value: float, digits: int) -> str:
    """A number with ``digits`` decimals, point as decimal sign, half to even on its shortest form.

    ``repr`` first, so that 2.675 rounds as the decimal the reader sees and not as its binary
    neighbour; a zero never carries a sign.
    """
    step = Decimal(1).scaleb(-digits)
    text = format(Decimal(repr(float(value))).quantize(step, rounding=ROUND_HALF_EVEN), "f")
    return text.lstrip("-") if not text.strip("-0.") else text


def _digits(entry: object, digits: int | None) -> int:
    if digits is not None:
        return digits
    if isinstance(entry, Value):
        return entry.digits
    return 0 if isinstance(entry, numbers.Integral) else 2


def _localised(text: str, language: Mapping[str, str]) -> str:
    """Decimal sign of the language, thin spaces from five digits on, a true minus sign."""
    sign, text = ("$-$", text[1:]) if text.startswith("-") else ("", text)
    whole, _, decimals = text.partition(".")
    if len(whole) > 4:
        whole = f"{int(whole):,}".replace(",", r"\,")
    return sign + whole + (language["decimal"] + decimals if decimals else "")


@pass_context
def num(context: Mapping[str, Any], entry: object, digits: int | None = None) -> str:
    """A Value or number, rounded to ``digits`` decimals (default: the Value's own).

    Text and booleans pass through escaped; a missing value prints "n/a" or its translation.
    """
    language, value = _language(context), _present(entry)
    if value is None:
        return language["missing"]
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        return escape(" ".join(str(value).split()))
    return _localised(_rounded(float(value), _digits(entry, digits)), language)


@pass_context
def ci(context: Mapping[str, Any], entry: object, digits: int | None = None) -> str:
    """The interval of a Value, or a pair of numbers, as "[a, b]"."""
    language = _language(context)
    if isinstance(entry, jinja2.Undefined):
        str(entry)
    ends = entry.ci if isinstance(entry, Value) else entry
    if ends is None or any(_present(end) is None for end in ends):
        return language["missing"]
    if digits is None:
        digits = entry.digits if isinstance(entry, Value) else 2
    low, high = (_localised(_rounded(float(end), digits), language) for end in ends)
    return f"[{low}{language['between']}{high}]"


@pass_context
def qty(
    context: Mapping[str, Any], entry: object, unit: str | None = None, digits: int | None = None
) -> str:
    r"""A number with its unit through siunitx: ``\qty{1.25}{\second}``.

    ``unit`` is a key of :data:`UNITS` or siunitx code; by default the Value's own unit.
    """
    language, value = _language(context), _present(entry)
    if value is None:
        return language["missing"]
    if unit is None:
        unit = entry.unit if isinstance(entry, Value) else ""
    text = _rounded(float(value), _digits(entry, digits))
    if unit in {"", "x"}:
        return _localised(text, language) + (r"$\times$" if unit else "")
    options = "" if language["decimal"] == "." else "[output-decimal-marker={,}]"
    return rf"\qty{options}{{{text}}}{{{UNITS.get(unit, unit)}}}"


@pass_context
def pct(context: Mapping[str, Any], entry: object, digits: int = 0) -> str:
    """A share between 0 and 1 as a percentage; a Value already in "%" is not multiplied again."""
    language, value = _language(context), _present(entry)
    if value is None:
        return language["missing"]
    scale = 1 if isinstance(entry, Value) and entry.unit == "%" else 100
    exact = float(Decimal(repr(float(value))) * scale)
    return _localised(_rounded(exact, digits), language) + r"\,\%"


@pass_context
def join_and(context: Mapping[str, Any], items: Iterable[object]) -> str:
    """Items as a list in a sentence: "a", "a and b", "a, b, and c". Items are not escaped.

    Items with commas of their own are parted by semicolons.
    """
    language, words = _language(context), [str(item) for item in items]
    if len(words) < 2:
        return "".join(words)
    if any(", " in word for word in words):
        return f"{'; '.join(words[:-1])}; {language['and']} {words[-1]}"
    comma = language["oxford"] if len(words) > 2 else ""
    return f"{', '.join(words[:-1])}{comma} {language['and']} {words[-1]}"


def lower_first(text: str) -> str:
    """A sentence's beginning within a sentence: "On this machine" as "on this machine"."""
    return text[:1].lower() + text[1:]


def direction(entry: Value | None) -> str:
    """What an interval says about a ratio: "above" 1, "below" 1, "same" when it includes 1.

    "single" is a ratio without an interval, which shows nothing, "missing" no ratio at all. Prose
    branches on this word, so that it cannot contradict the numbers.
    """
    value = _present(entry)
    if value is None:
        return "missing"
    if entry.ci is None:
        return "single"
    low, high = entry.ci
    return "above" if low > 1 else "below" if high < 1 else "same"


#: ``\SAY{key}`` in a template.
_SAY = re.compile(r"\\SAY\{(\w+)\}")


class _Worded(jinja2.FileSystemLoader):
    r"""Templates with the words of one language put in where they say ``\SAY{key}``."""

    def __init__(self, folder: Path, lang: str) -> None:
        super().__init__(str(folder))
        self.folder, self.lang = folder, lang

    def get_source(self, environment: jinja2.Environment, template: str) -> tuple[str, str, Any]:
        source, path, unchanged = super().get_source(environment, template)
        if not _SAY.search(source):
            return source, path, unchanged
        file = words_file(self.folder, template, self.lang)
        words = documents.read_yaml(file)

        def say(found: re.Match[str]) -> str:
            key = found.group(1)
            if key not in words:
                raise InputError(f"{file}: there is no {key!r}, which {template} says; add it")
            text = words[key]
            # A mapping becomes the literal of one. Line breaks go, so that errors keep their line.
            return (
                json.dumps(text, ensure_ascii=False)
                if isinstance(text, Mapping)
                else " ".join(str(text).split("\n"))
            )

        read = file.stat().st_mtime_ns

        def current() -> bool:
            same = file.is_file() and file.stat().st_mtime_ns == read
            return same and (unchanged is None or unchanged())

        return _SAY.sub(say, source), path, current


def words_file(folder: Path, template: str, lang: str) -> Path:
    """The file with a template's words in a language."""
    return folder / "words" / f"{Path(template).name.removesuffix('.tex.j2')}.{lang}.yaml"


@cache
def environment(folder: Path, lang: str = "en") -> jinja2.Environment:
    """The Jinja2 environment of all templates below ``folder``, with the words of a language.

    It is one and the same at every call, so that a template is compiled once and again when it or
    its words are edited.
    """
    env = jinja2.Environment(
        loader=_Worded(folder, lang),
        block_start_string=r"\BLOCK{",
        block_end_string="}",
        variable_start_string=r"\VAR{",
        variable_end_string="}",
        comment_start_string=r"\COMMENT{",
        comment_end_string="}",
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,
        undefined=jinja2.StrictUndefined,
    )
    env.filters.update(
        tex=escape,
        num=num,
        ci=ci,
        qty=qty,
        pct=pct,
        join_and=join_and,
        direction=direction,
        lower_first=lower_first,
    )
    return env


def render(template_path: Path, context: Mapping[str, Any]) -> str:
    """Render one template in the language of its context; others in its folder may be included.

    Raises
    ------
    InputError
        If the template is missing, has a syntax error, says what its words lack, or uses a name that
        is not in the context; one line with the template, its line and the name.
    """
    template_path = Path(template_path)
    env = environment(template_path.parent, context.get("lang", "en"))
    try:
        return env.get_template(template_path.name).render(context)
    except jinja2.TemplateNotFound as error:
        raise InputError(f"{template_path}: there is no template {error.name!r}") from error
    except jinja2.TemplateSyntaxError as error:
        name = error.name or template_path.name
        raise InputError(f"{name}, line {error.lineno}: {error.message}") from error
    except jinja2.UndefinedError as error:
        name, line = _where(error, template_path)
        raise InputError(
            f"{name}, line {line}: {_undefined_name(error)} has no value; "
            "correct the name or add it to values.json"
        ) from error


def _where(error: Exception, template_path: Path) -> tuple[str, int]:
    """Template and line of an error inside a rendered template."""
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if Path(frame.filename).is_relative_to(template_path.parent)
        and frame.filename.endswith(".j2")
    ]
    return (
        (Path(frames[-1].filename).name, frames[-1].lineno or 0)
        if frames
        else (
            template_path.name,
            0,
        )
    )


def _undefined_name(error: jinja2.UndefinedError) -> str:
    quoted = re.findall(r"'([^']*)'", error.message or "")
    return repr(quoted[-1]) if quoted else str(error.message)


def macro_name(name: str) -> str:
    r"""The LaTeX command of a value: ``headline_p95_s`` becomes ``kvbHeadlinePNineFiveS``.

    LaTeX commands consist of letters only, so digits are spelled out.
    """
    words = [word for word in re.split(r"[^A-Za-z0-9]+", name) if word]
    camel = "".join(word[0].upper() + word[1:] for word in words)
    return MACRO_PREFIX + re.sub(r"[0-9]", lambda digit: _DIGITS[int(digit.group())], camel)


def numbers_tex(values: Mapping[str, Value], lang: str = "en") -> str:
    r"""``numbers.tex``: one macro per value, and one with the ending ``Ci`` per interval.

    A co-author writes ``\kvbHeadlineDynamicSpeedupVsNone`` (no unit, already rounded).

    Raises
    ------
    InputError
        If two values would get the same macro.
    """
    context = {"lang": lang}
    lines = [
        "% Generated from values.json; do not edit. Each line: the macro, then the value's name",
        "% and unit. Load with \\input in the preamble.",
    ]
    owners: dict[str, str] = {}

    def define(macro: str, owner: str, text: str, remark: str) -> None:
        if macro in owners:
            raise InputError(
                f"values.json: {owner!r} and {owners[macro]!r} would both become \\{macro}; "
                "rename one of them"
            )
        owners[macro] = owner
        lines.append(rf"\newcommand{{\{macro}}}{{{text}}} % {remark}")

    for name in sorted(values):
        entry = values[name]
        remark = f"{name} [{entry.unit}]" if entry.unit else name
        define(macro_name(name), name, num(context, entry), remark)
        if entry.ci is not None:
            define(macro_name(f"{name}_ci"), name, ci(context, entry), f"{remark}, 95 % interval")
    return "\n".join(lines) + "\n"
