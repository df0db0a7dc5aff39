"""Reading and writing the project's YAML and JSON files: checked, atomic, with one-line errors."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import fastjsonschema
import jsonschema
import yaml

from kvbench import layout
from kvbench.errors import InputError

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


def read_yaml(path: Path) -> Any:
    """Parse a YAML file; a missing or malformed one is an InputError naming file and line."""
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except UnicodeDecodeError:
        raise InputError(f"{path}: not UTF-8 text; save it as UTF-8") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f" at line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or "cannot be parsed"
        raise InputError(f"{path}: not valid YAML{line}: {problem}") from None


def read_json(path: Path) -> Any:
    """Parse a JSON file; a missing, truncated or malformed one is an InputError."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise InputError(
            f"{path}: not valid JSON ({error}); delete the file and run again to make it anew"
        ) from None


def write_text_atomic(path: Path, text: str) -> None:
    """Write ``text`` whole or not at all: a temporary file beside ``path``, then a rename.

    Raises
    ------
    InputError
        For example when the disk is full; ``path`` is then as it was before, and the temporary
        file is gone.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as stream:
            stream.write(text)
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
        Path(temporary).unlink(missing_ok=True)


def write_json(path: Path, document: Any) -> None:
    """Write JSON with sorted keys and a final newline, atomically; NaN is refused."""
    write_text_atomic(path, json.dumps(document, indent=1, sort_keys=True, allow_nan=False) + "\n")


def location(parts: Iterable[str | int]) -> str:
    """Spell a JSON path the way a reader of the YAML would: ``turns[3].user``."""
    spelled = ""
    for part in parts:
        spelled += f"[{part}]" if isinstance(part, int) else f".{part}" if spelled else str(part)
    return spelled


def explain(error: jsonschema.ValidationError) -> str:
    """Turn a schema violation into ``key: what is wrong; what would be right``."""
    deepest = jsonschema.exceptions.best_match([error])
    where = location(deepest.absolute_path) or "top level"
    kind, expected = deepest.validator, deepest.validator_value
    value = deepest.instance
    hint = (deepest.schema or {}).get("description", "") if isinstance(deepest.schema, dict) else ""
    hint = f" ({hint.rstrip('.')})" if hint else ""
    if kind == "additionalProperties":
        known = sorted(deepest.schema.get("properties", {}))
        unknown = sorted(set(value) - set(known))
        return (
            f"{where}: unknown key {', '.join(map(repr, unknown))}; known keys: {', '.join(known)}"
        )
    if kind == "required":
        missing = [key for key in expected if key not in value]
        return f"{where}: missing key {', '.join(map(repr, missing))}"
    if kind == "enum":
        return f"{where} is {value!r}; use one of {', '.join(map(str, expected))}{hint}"
    if kind == "type":
        wanted = " or ".join(expected) if isinstance(expected, list) else expected
        return f"{where} is {value!r}; it must be of type {wanted}{hint}"
    if kind in {"minimum", "exclusiveMinimum", "maximum", "exclusiveMaximum"}:
        sign = {
            "minimum": "at least",
            "exclusiveMinimum": "more than",
            "maximum": "at most",
            "exclusiveMaximum": "less than",
        }[kind]
        return f"{where} is {value!r}; it must be {sign} {expected}{hint}"
    if kind == "pattern":
        return f"{where} is {str(value)[:60]!r}; it does not look right{hint or f' (pattern {expected})'}"
    return f"{where}: {deepest.message}{hint}"


def check(document: Any, schema_name: str | Mapping[str, Any], source: str) -> None:
    """Check ``document`` against a schema.

    Raises
    ------
    InputError
        One line: ``source``, the key, what is wrong.
    """
    if isinstance(schema_name, str):
        try:
            _compiled(schema_name)(document)
            return
        except fastjsonschema.JsonSchemaValueException:
            rules: Mapping[str, Any] = schema(schema_name)
    else:
        rules = schema_name
    validator = jsonschema.validators.validator_for(rules)(rules)
    errors = sorted(validator.iter_errors(document), key=lambda error: list(map(str, error.path)))
    if errors:
        raise InputError(f"{source}: {explain(jsonschema.exceptions.best_match(errors))}")


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
