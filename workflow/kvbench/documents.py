"""Reading and writing the project's YAML and JSON files: checked, atomic, with one-line errors."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import sys
import tempfile
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import fastjsonschema
import jsonschema
import yaml

from kvbench import layout
from kvbench.errors import InputError
from kvbench.explaining import explain, location

SCHEMAS = layout.shipped("schemas")
#: Larger files, such as weights of some gigabytes, are told apart by size and time alone.
_READ_UP_TO = 32 * 2**20


@cache
def schema(name: str) -> dict[str, Any]:
    """Return the JSON Schema ``workflow/schemas/<name>.schema.json``."""
    return json.loads((SCHEMAS / f"{name}.schema.json").read_text(encoding="utf-8"))


@cache
def _compiled(name: str):
    return fastjsonschema.compile(schema(name))


class _UniqueKeys(yaml.SafeLoader):
    """YAML in which a key may stand only once in a mapping; the parser would keep the last one."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Refuse the second of two equal keys, with its line."""
        seen: set[Any] = set()
        for key_node, _ in node.value:
            # Merge keys are not keys of the mapping, and what cannot be hashed fails below.
            if key_node.tag == "tag:yaml.org,2002:merge" or key_node.id != "scalar":
                continue
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    problem=f"the key {key!r} stands twice; keep one of them",
                    problem_mark=key_node.start_mark,
                )
            seen.add(key)
        return super().construct_mapping(node, deep)

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        """Refuse what YAML reads as octal or in base sixty: nobody means 8 by ``010``."""
        value, plain = super().construct_yaml_int(node), node.value.lstrip("+-")
        if ":" in plain or (plain[:1] == "0" and plain.isdigit() and value):
            raise yaml.constructor.ConstructorError(
                problem=f"{node.value} is read as {value}; write {value}, or put it in quotes",
                problem_mark=node.start_mark,
            )
        return value


_UniqueKeys.add_constructor("tag:yaml.org,2002:int", _UniqueKeys.construct_yaml_int)
#: What the parser says of the usual slips, and what helps.
_REMEDIES = {
    "'\\t'": "indent with blanks, not with tabs",
    "mapping values are not allowed": "a colon is missing above, or a text that holds ': ' wants quotes",
    "found another document": "keep one document and no second line of three hyphens",
    "found undefined alias": "name the anchor (&name) first, or put a text that begins with * in quotes",
    "could not determine a constructor": "take the tag away, or put a text that begins with ! in quotes",
    "expected <block end>": "indent what belongs together by as many blanks",
    "but got '<stream end>'": "close the bracket",
    "cannot start any token": "put a text that begins with this character in quotes",
    "found unexpected end of stream": "close the quotes",
}


def _remedy(problem: str) -> str:
    """What helps against a problem of the parser, if that is known."""
    return next((f"; {told}" for words, told in _REMEDIES.items() if words in problem), "")


def read_text(path: Path, not_text: str = "save it as UTF-8") -> str:
    """Read a text file.

    Parameters
    ----------
    not_text:
        The remedy where the file is not UTF-8.

    Raises
    ------
    InputError
        One line: the file is missing, a folder, not UTF-8, or cannot be read.
    """
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; restore it or correct its name") from None
    except IsADirectoryError:
        raise InputError(f"{path}: a folder; name a file") from None
    except UnicodeDecodeError:
        raise InputError(f"{path}: not UTF-8 text; {not_text}") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); mend its rights") from None


def read_yaml(path: Path) -> Any:
    """Parse a YAML file written by a person.

    Raises
    ------
    InputError
        One line naming the file and, where there is one, line or key: the file is missing, a folder,
        not UTF-8, malformed or nested too deeply, a key stands twice, or a number is not finite.
    """
    text = read_text(path)
    try:
        document = yaml.load(text, _UniqueKeys)
        check_finite(document, str(path))
    except yaml.reader.ReaderError as error:
        raise InputError(
            f"{path}: not valid YAML: the character U+{error.character:04X} stands at {error.position}; "
            "remove it"
        ) from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f" at line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or "cannot be parsed"
        raise InputError(f"{path}: not valid YAML{line}: {problem}{_remedy(problem)}") from None
    except RecursionError:
        raise InputError(f"{path}: nested too deeply; write it flatter") from None
    except ValueError as error:
        # A date such as 2025-02-30, or a whole number of thousands of digits.
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path}: not valid YAML: {error}") from None
    return document


def yaml_files(folder: Path) -> list[Path]:
    """Every ``*.yaml`` file of a folder, sorted by name.

    Raises
    ------
    InputError
        A file ends in ``.yml``: the rules would not find it.
    """
    for path in sorted(folder.glob("*.yml")):
        raise InputError(f"{path}: ends in .yml; rename it to {path.stem}.yaml")
    return sorted(folder.glob("*.yaml"))


def read_json(
    path: Path,
    schema_name: str | None = None,
    remedy: str = "delete the file and run again to make it anew",
) -> Any:
    """Parse a JSON file, and check it against a schema if one is named.

    Parameters
    ----------
    remedy:
        What helps when the file is broken; by default that of a file that this program wrote.

    Raises
    ------
    InputError
        One line naming the file, what is wrong and the remedy: missing, truncated, malformed,
        nested too deeply, with a number that is not finite, or not what the schema says.
    """
    text = read_text(path, remedy)
    try:
        document = json.loads(text, parse_constant=_refuse_constant)
    except json.JSONDecodeError as error:
        raise InputError(f"{path}: not valid JSON ({error}); {remedy}") from None
    except RecursionError:
        raise InputError(f"{path}: nested too deeply; {remedy}") from None
    except ValueError:
        try:
            check_finite(json.loads(text), str(path))
        except InputError as error:
            raise InputError(f"{error}; {remedy}") from None
        raise InputError(f"{path}: a number is out of range; {remedy}") from None
    if schema_name is not None:
        try:
            check_record(document, schema_name, str(path))
        except InputError as error:
            raise InputError(f"{error}; {remedy}") from None
    return document


def _refuse_constant(name: str) -> float:
    raise ValueError(name)


def check_finite(document: Any, source: str) -> None:
    """Refuse NaN and infinity, which pass every bound of a schema, and whole numbers beyond any float.

    Raises
    ------
    InputError
        One line: ``source``, the key, the value.
    """
    for parts, value in _numbers(document):
        if isinstance(value, float) and not math.isfinite(value):
            raise InputError(f"{source}: {location(parts)} is {value}; it must be a finite number")
        if isinstance(value, int) and abs(value) > sys.float_info.max:
            raise InputError(
                f"{source}: {location(parts)} has {len(str(abs(value)))} digits; it must be a finite number"
            )


def _numbers(document: Any, at: tuple[str | int, ...] = ()) -> Iterator[tuple[tuple, Any]]:
    if isinstance(document, Mapping):
        for key, part in document.items():
            yield from _numbers(part, (*at, str(key)))
    elif isinstance(document, list | tuple):
        for number, part in enumerate(document):
            yield from _numbers(part, (*at, number))
    else:
        yield at, document


def write_bytes_atomic(path: Path, data: bytes) -> None:
    """Write ``data`` whole or not at all: a temporary file beside ``path``, then a rename.

    Raises
    ------
    InputError
        For example when the disk is full or the folder is read-only; ``path`` is then as it was
        before, and the temporary file is gone.
    """
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(
            dir=path.parent, prefix=f".{path.name}.", suffix=".part"
        )
        with os.fdopen(handle, "wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        Path(temporary).chmod(0o644)
        Path(temporary).replace(path)
    except OSError as error:
        raise InputError(
            f"{path}: cannot be written ({error.strerror}); free space or mend the folder's rights "
            "and run again"
        ) from None
    finally:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)


def write_text_atomic(path: Path, text: str) -> None:
    """Write ``text`` as UTF-8, whole or not at all; see :func:`write_bytes_atomic`."""
    write_bytes_atomic(path, text.encode())


def write_json(path: Path, document: Any) -> None:
    """Write JSON with sorted keys and a final newline, atomically.

    Raises
    ------
    InputError
        A number is not finite, which JSON cannot hold, or the file cannot be written.
    """
    check_finite(document, str(path))
    write_text_atomic(path, json.dumps(document, indent=1, sort_keys=True, allow_nan=False) + "\n")


def check(
    document: Any,
    schema_name: str | Mapping[str, Any],
    source: str,
    at: tuple[str | int, ...] = (),
) -> None:
    """Check what a person wrote against a schema; a count written as ``3.0`` is no whole number.

    Parameters
    ----------
    schema_name:
        Name of a file of :data:`SCHEMAS`, or the schema itself.
    source, at:
        The file, and the place of the document in it where it is a part of the file.

    Raises
    ------
    InputError
        One line: ``source``, the key, what is wrong.
    """
    if isinstance(schema_name, str):
        rules: Mapping[str, Any] = schema(schema_name)
        like_counts = any(
            isinstance(value, float) and value.is_integer() for _, value in _numbers(document)
        )
        if not like_counts and _passes(document, schema_name):
            return
    else:
        rules = schema_name
    _refuse(document, rules, source, at)


def check_record(document: Any, schema_name: str, source: str) -> None:
    """Check what a program wrote against a schema, as :func:`check` does (same InputErrors), but fast."""
    if not _passes(document, schema_name):
        _refuse(document, schema(schema_name), source, by_hand=False)


def _passes(document: Any, schema_name: str) -> bool:
    try:
        _compiled(schema_name)(document)
    except fastjsonschema.JsonSchemaValueException:
        return False
    return True


@cache
def _strict(kind: type) -> Any:
    """A validator for which 3.0 is no whole number."""
    whole = kind.TYPE_CHECKER.redefine(
        "integer", lambda _, value: isinstance(value, int) and not isinstance(value, bool)
    )
    return jsonschema.validators.extend(kind, {"pattern": _pattern}, type_checker=whole)


def _pattern(_: Any, pattern: str, text: Any, __: Any) -> Iterator[jsonschema.ValidationError]:
    """Match as JSON Schema's dialect does: for Python's ``$`` a line break may follow."""
    ended = f"{pattern[:-1]}\\Z" if pattern.endswith("$") else pattern
    if isinstance(text, str) and not re.search(ended, text):
        yield jsonschema.ValidationError(f"{text!r} does not match {pattern!r}")


def _refuse(
    document: Any,
    rules: Mapping[str, Any],
    source: str,
    at: tuple[str | int, ...] = (),
    by_hand: bool = True,
) -> None:
    validator = _strict(jsonschema.validators.validator_for(rules))(rules)
    errors = sorted(validator.iter_errors(document), key=lambda error: list(map(str, error.path)))
    if errors:
        told = explain(jsonschema.exceptions.best_match(errors), rules, at, by_hand)
        raise InputError(f"{source}: {told}")


def fill_defaults(document: Any, rules: Mapping[str, Any]) -> Any:
    """Return a copy of ``document`` with the ``default`` of every absent key of a schema."""
    if rules.get("type") == "array" and isinstance(document, list):
        return [fill_defaults(item, rules.get("items", {})) for item in document]
    if not isinstance(document, Mapping):
        return document
    filled = dict(document)
    for key, sub in rules.get("properties", {}).items():
        if key not in filled and "default" in sub:
            filled[key] = json.loads(json.dumps(sub["default"]))
        if key in filled:
            filled[key] = fill_defaults(filled[key], sub)
    return filled


def sha256_of_file(path: Path) -> str:
    """Hexadecimal SHA-256 of a file's bytes."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def fingerprint(path: Path) -> str:
    """Digest of a file, or of all files of a folder: of their bytes, or of size and time if large."""
    files = sorted(path.rglob("*")) if path.is_dir() else [path]
    state = hashlib.sha256()
    for file in files:
        if file.is_file():
            status = file.stat()
            small = status.st_size <= _READ_UP_TO
            state.update(
                f"{file.relative_to(path)} {status.st_size} "
                f"{sha256_of_file(file) if small else status.st_mtime_ns}\n".encode()
            )
    return state.hexdigest()[:16]


def digest(document: Any) -> str:
    """First 16 hexadecimal digits of the SHA-256 of a document's canonical JSON."""
    text = json.dumps(document, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
