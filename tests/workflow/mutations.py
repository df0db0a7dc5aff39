"""Inputs as people and disks spoil them, drawn from a seed: what the loading functions must refuse well."""

from __future__ import annotations

import copy
import json
import random
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from kvbench import documents, records
from kvbench.analysis.claims import reading
from kvbench.caching import paraphrases
from kvbench.inputs import configuration, models, scenarios
from kvbench.records import machines

ROOT = Path(__file__).resolve().parents[2]
RECORDED = ROOT / "results" / "recorded"


@dataclass(frozen=True)
class Input:
    """One kind of input: an example that is right, and what reads it."""

    name: str
    #: The folder that is copied, and the file in it that is spoilt.
    folder: Path
    file: str
    #: Reads the spoilt file as the product does.
    read: Callable[[Path], Any]


def _read_configuration(path: Path) -> None:
    document = configuration.fill(documents.read_yaml(path), str(path))
    known, models = configuration.load_scenarios_and_models(ROOT / "config")
    configuration.plan_kv(document, known, models, str(path))
    configuration.plan_app(document, models, str(path))
    configuration.plan_aa(document, models, str(path))


def _read_checkpoint(path: Path) -> None:
    models.check_checkpoint(path.parent, "config/models/mine.yaml")


def _verify(path: Path) -> None:
    machines.verify(next(p for p in path.parents if p.parent.name == "recorded"))


def inputs() -> Iterator[Input]:
    """Every kind of input, each by its example in the repository."""
    config, machine = ROOT / "config", next(p for p in RECORDED.iterdir() if p.is_dir())
    record = sorted(machine.glob("cells/kv/**/dynamic/r1.json"))[0]
    environment = sorted(machine.glob("environment/*.json"))[0]
    yield Input("configuration", config, "config.yaml", _read_configuration)
    yield Input("scenario", config / "scenarios", "context_growth.yaml", scenarios.load)
    yield Input("conversation", config / "scenarios", "banking_open_account.yaml", scenarios.load)
    yield Input(
        "model",
        config / "models",
        "llama-3.2-1b-geometry.yaml",
        lambda path: configuration.read_models(path.parent),
    )
    yield Input("claims", config, "claims.yaml", reading.load)
    yield Input("record", record.parent, record.name, records.read)
    yield Input(
        "recorded machine",
        machine,
        str(environment.relative_to(machine)),
        _verify,
    )
    yield Input("paraphrases", ROOT / "resources/paraphrases", "intents.pt.jsonl", paraphrases.load)
    yield Input("checkpoint", ROOT / "resources/embedded-llama", "config.json", _read_checkpoint)


# ------------------------------------------------------------------ ways in which a file is spoilt


def _places(document: Any, at: tuple = ()) -> Iterator[tuple]:
    """Every place below the top of a document."""
    parts = (
        document.items()
        if isinstance(document, dict)
        else enumerate(document)
        if isinstance(document, list)
        else ()
    )
    for key, part in parts:
        yield (*at, key)
        yield from _places(part, (*at, key))


_VALUES = {
    "nothing": None,
    "NaN": float("nan"),
    "infinity": float("inf"),
    "minus one": -1,
    "a huge number": 10**40,
    "half": 0.5,
    "a word": "dynmic",
    "an empty text": "",
    "a list": [[]],
    "an object": {"x": 1},
    "a switch": True,
}


def _value(document: Any, draw: random.Random) -> str:
    """Put a value of another type or out of range in some place."""
    *above, key = draw.choice(list(_places(document)))
    name = draw.choice(list(_VALUES))
    part = document
    for step in above:
        part = part[step]
    part[key] = copy.deepcopy(_VALUES[name])
    return f"{name} at {documents.location([*map(_step, above), _step(key)])}"


def _step(key: Any) -> Any:
    return key if isinstance(key, int) else str(key)


def _key(document: Any, draw: random.Random) -> str:
    """Misspell a key, or leave it out."""
    places = [place for place in _places(document) if isinstance(place[-1], str)]
    *above, key = draw.choice(places)
    part = document
    for step in above:
        part = part[step]
    kept = part.pop(key)
    if draw.random() < 0.5:
        part[key + "_"] = kept
        return f"misspelt {documents.location([*map(_step, above), key])}"
    return f"without {documents.location([*map(_step, above), key])}"


def _write(path: Path, document: Any) -> None:
    if path.suffix == ".yaml":
        path.write_text(yaml.safe_dump(document, allow_unicode=True, sort_keys=False))
    elif path.suffix == ".jsonl":
        path.write_text("\n".join(json.dumps(line) for line in document) + "\n")
    else:
        path.write_text(json.dumps(document))


def _parse(path: Path) -> Any:
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".yaml":
        return yaml.safe_load(text)
    if path.suffix == ".jsonl":
        return [json.loads(line) for line in text.splitlines()]
    return json.loads(text)


def _bytes(path: Path, draw: random.Random) -> str:
    """Spoil the file as bytes: cut, encoded otherwise, nested too deeply, gone."""
    content = path.read_bytes()
    ways: dict[str, Callable[[], Any]] = {
        "cut short": lambda: path.write_bytes(content[: len(content) * 2 // 3]),
        "empty": lambda: path.write_bytes(b""),
        "UTF-16": lambda: path.write_bytes(content.decode().encode("utf-16")),
        "latin-1": lambda: path.write_bytes("# não\n".encode("latin-1") + content),
        "NUL bytes": lambda: path.write_bytes(content[:100] + b"\0\0\0" + content[100:]),
        "10,000 levels deep": lambda: path.write_bytes(b"[" * 10_000 + b"]" * 10_000),
        "a list": lambda: path.write_bytes(b"[]"),
        "a number": lambda: path.write_bytes(b"7"),
        "an empty object": lambda: path.write_bytes(b"{}"),
        "missing": path.unlink,
        "a folder": lambda: (path.unlink(), path.mkdir()),
    }
    name = draw.choice(list(ways))
    ways[name]()
    return name


@dataclass(frozen=True)
class Mutation:
    """One spoilt input: what was done, and the file that reads as it does."""

    number: int
    input: Input
    what: str
    file: Path


def mutations(folder: Path, seed: int, count: int) -> Iterator[Mutation]:
    """Spoil ``count`` inputs one after another; each is put back when the next is asked for."""
    draw, kinds = random.Random(seed), list(inputs())
    for kind in kinds:
        place = folder / kind.name.replace(" ", "-") / "recorded" / "machine"
        shutil.copytree(kind.folder, place, ignore=shutil.ignore_patterns("training"))
    for number in range(count):
        kind = kinds[number % len(kinds)]
        path = folder / kind.name.replace(" ", "-") / "recorded" / "machine" / kind.file
        content = path.read_bytes()
        if draw.random() < 0.3:
            what = _bytes(path, draw)
        else:
            document = _parse(path)
            what = draw.choice([_value, _key])(document, draw)
            _write(path, document)
        yield Mutation(number, kind, what, path)
        if path.is_dir():
            path.rmdir()
        path.write_bytes(content)
