"""Recorded machines: a run's records kept in ``results/recorded/<slug>``, checked when read again.

A recorded folder has the layout of a run's own (``cells/kv``, ``cells/app``, ``environment``,
``ceilings``), a README for people and ``SHA256SUMS`` for ``sha256sum --check``. The README is not
part of the checksums, so that notes may be added to it.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from kvbench import documents, layout, records
from kvbench.errors import InputError
from kvbench.layout import HERE

SUMS = "SHA256SUMS"
README = "README.md"
CEILINGS_SCHEMA = "kvbench/ceilings/1"

_SLUG = re.compile(r"[a-z0-9][a-z0-9-]*")
_LINE = re.compile(r"([0-9a-f]{64})  (\S.*)")
#: Where the files of a recorded machine may stand.
_PLACES = re.compile(r"cells/(kv|aa)/.+|cells/app/[^/]+/[^/]+|(environment|ceilings)/[^/]+")
#: Words that already mean something where a machine is named.
_RESERVED = (HERE, "all")
#: Folder of a run to the folder of a recorded machine.
_PARTS = {
    "cells/kv": "cells/kv",
    "cells/app": "cells/app",
    "cells/aa": "cells/aa",
    "inputs/environment": "environment",
    "inputs/ceilings": "ceilings",
}


def check_slug(slug: str | None) -> str:
    """Return ``slug`` if it can name a machine.

    Raises
    ------
    InputError
        It is missing, reserved, or not made of lower-case letters, digits and hyphens.
    """
    if not slug:
        raise InputError("machine: no name given; add --config machine=<name>")
    if not isinstance(slug, str) or not _SLUG.fullmatch(slug) or slug in _RESERVED:
        raise InputError(
            f"machine: {slug!r} cannot name a machine; use lower-case letters, digits and hyphens, "
            f"not {' or '.join(_RESERVED)}"
        )
    return slug


def record(run_folder: Path, target: Path, slug: str, files: Iterable[Path] | None = None) -> Path:
    """Copy the validated records of a run to ``target/slug``.

    Parameters
    ----------
    run_folder:
        The ``results`` folder of the run.
    target:
        The folder of all recorded machines, ``results/recorded``.
    slug:
        Name of the machine.
    files:
        Only these files of the run (its present cells, without those of earlier configurations);
        by default all that are there.

    Returns
    -------
    Path
        The folder ``target/slug``, also when the same records were already there.

    Raises
    ------
    InputError
        The name is bad or taken by other records, a record is invalid or lies at another place
        than its cell says, or there is no record that succeeded.
    """
    check_slug(slug)
    chosen = _chosen(run_folder, files)
    texts: dict[str, str] = {}
    kv, aa, app, environments = [], [], [], {}
    for name, path in chosen.items():
        document = _read(path, name)
        texts[name] = json.dumps(document, sort_keys=True, separators=(",", ":")) + "\n"
        if name.startswith("cells/kv/"):
            kv.append(document)
        elif name.startswith("cells/aa/"):
            aa.append(document)
        elif name.startswith("cells/app/"):
            app.append(document)
        elif name.startswith("environment/"):
            environments[Path(name).stem] = document
    if not any(document["status"] == "ok" for document in (*kv, *aa, *app)):
        raise InputError(
            f"{run_folder}/cells: no record with status ok; run snakemake before snakemake record"
        )
    sums = _sums_text({name: _sha256(text) for name, text in texts.items()})
    folder = target / slug
    taken = [path for path in _folders(target) if path.name.lower() == slug]
    if taken:
        old = taken[0] / SUMS
        if taken[0].name == slug and old.is_file() and old.read_text(encoding="utf-8") == sums:
            return folder
        raise InputError(
            f"{taken[0]}: other records are kept under this name; remove the folder, or choose "
            "another name with --config machine=<name>"
        )
    target.mkdir(parents=True, exist_ok=True)
    # Written beside its place and renamed, so that an interrupted copy never looks complete.
    temporary = Path(tempfile.mkdtemp(dir=target, prefix=f".{slug}."))
    try:
        for name, text in texts.items():
            path = temporary / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
        (temporary / README).write_text(readme(slug, kv, app, environments, aa), encoding="utf-8")
        (temporary / SUMS).write_text(sums, encoding="utf-8")
        temporary.chmod(0o755)
        temporary.rename(folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return folder


def _chosen(run_folder: Path, files: Iterable[Path] | None) -> dict[str, Path]:
    """Name in the recorded folder to file of the run."""
    wanted = None if files is None else {Path(path).resolve() for path in files}
    chosen = {}
    for source, place in _PARTS.items():
        for path in sorted((run_folder / source).rglob("*.json")):
            if path.name.startswith(".") or (wanted is not None and path.resolve() not in wanted):
                continue
            chosen[f"{place}/{path.relative_to(run_folder / source).as_posix()}"] = path
    return chosen


def _read(path: Path, name: str) -> dict[str, Any]:
    """Read a file and check that it is what its place ``name`` in a recorded folder says."""
    if name.startswith("cells/"):
        document = records.read(path)
        if name.startswith("cells/aa/"):
            # The two names of one strategy are the arms' folders, not part of the cell.
            return document
        expected = _place(document)
        if name != expected:
            raise InputError(f"{path}: its cell belongs to {expected}; move or delete the file")
        return document
    document = documents.read_json(path)
    if name.startswith("ceilings/"):
        found = document.get("schema") if isinstance(document, dict) else None
        if found != CEILINGS_SCHEMA:
            raise InputError(
                f"{path}: schema is {found!r}; expected {CEILINGS_SCHEMA}; "
                "the file is not a record of this version"
            )
    elif not isinstance(document, dict) or "digest" not in document:
        raise InputError(f"{path}: no digest; it does not describe a machine")
    return document


def _place(document: Mapping[str, Any]) -> str:
    """Path of a record below a recorded folder, from its own cell."""
    cell = document["cell"]
    if cell["suite"] == "app":
        return f"cells/app/{cell['study']}/{cell['id']}.json"
    place = layout.place(cell["device"], cell["dtype"])
    key = f"{place}/{cell['model']}/{cell['scenario']}/{cell['strategy']}/r{cell['replicate']}"
    return f"cells/kv/{key}.json"


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _sums_text(sums: Mapping[str, str]) -> str:
    return "".join(f"{sums[name]}  {name}\n" for name in sorted(sums))


# ---------------------------------------------------------------------------- the README


def readme(
    slug: str,
    kv: Sequence[Mapping[str, Any]],
    app: Sequence[Mapping[str, Any]],
    environments: Mapping[str, Mapping[str, Any]],
    aa: Sequence[Mapping[str, Any]] = (),
) -> str:
    """Markdown that says what was measured, on what, when, and for how long."""
    everything = [*kv, *app, *aa]
    moments = sorted(document["started_at"] for document in everything)
    lines = [
        f"# {slug}",
        "",
        "Records of a real run, made by `snakemake record`; they are inputs of the tables. Check them",
        f"with `sha256sum --check {SUMS}`. Notes may be added here; the other files must stay as",
        "they are.",
        "",
        "## Hardware and software",
        "",
    ]
    for name, facts in sorted(environments.items()):
        lines += [f"### {name}", "", *_facts(facts), ""]
    if not environments:
        lines += ["Not described.", ""]
    lines += [
        "## Measurement",
        "",
        f"- measured from {moments[0]} to {moments[-1]} (start of the first and the last cell)",
        f"- {_duration(sum(document['wall_s'] for document in everything))} of measuring in "
        f"{len(everything)} cells",
    ]
    for suite, found in (("suite kv", kv), ("suite app", app), ("A/A test", aa)):
        if found:
            counts = Counter(document["status"] for document in found)
            told = ", ".join(f"{count} {status}" for status, count in sorted(counts.items()))
            lines.append(f"- {suite}: {told}")
    threads = sorted({document["cell"]["threads"] for document in everything})
    lines.append(f"- threads: {', '.join(map(str, threads))}")
    commits = sorted({str(facts["commit"]) for facts in environments.values() if "commit" in facts})
    lines.append(f"- commit: {', '.join(commits) or 'unknown'}")
    lines += ["", "## Digest of the measuring code", ""]
    for part, found in _digests(everything).items():
        mixed = " (mixed: measured with different code)" if len(found) > 1 else ""
        lines.append(f"- {part}: {', '.join(f'`{digest}`' for digest in found)}{mixed}")
    return "\n".join(lines) + "\n"


def _facts(facts: Mapping[str, Any]) -> list[str]:
    gpu = facts.get("gpu") or {}
    told = {
        "processor": facts.get("cpu"),
        "cores": facts.get("cores"),
        "memory": _gib(facts.get("memory_bytes")),
        "GPU": gpu.get("name"),
        "GPU memory": _gib(gpu.get("memory_bytes")),
        "CUDA": gpu.get("cuda"),
        "GPU driver": gpu.get("driver"),
        "system": facts.get("system"),
        "kernel": facts.get("kernel"),
        "frequency governor": facts.get("governor"),
        "Python": facts.get("python"),
        **(facts.get("packages") or {}),
        "digest": facts.get("digest"),
    }
    return [f"- {name}: {value}" for name, value in told.items() if value is not None]


def _gib(size: int | None) -> str | None:
    return None if size is None else f"{size / 2**30:.1f} GiB"


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def _digests(found: Iterable[Mapping[str, Any]]) -> dict[str, list[str]]:
    parts: dict[str, set[str]] = {}
    for document in found:
        cell = document["cell"]
        # Every strategy and every study has code of its own, so a digest of its own.
        part = f"kv/{cell['strategy']}" if cell["suite"] == "kv" else f"app/{cell['study']}"
        parts.setdefault(part, set()).add(document["code_digest"])
    return {part: sorted(parts[part]) for part in sorted(parts, key=_kv_first)}


def _kv_first(part: str) -> tuple[bool, str]:
    return not part.startswith("kv/"), part


# ---------------------------------------------------------------------------- reading


def verify(folder: Path) -> None:
    """Check a recorded folder whole: its name, its list of files, their checksums, schemas and places.

    Raises
    ------
    InputError
        The folder's name cannot name a machine; the checksums are missing or malformed; a file is
        missing, altered, not listed, of another schema, or at another place than its cell says.
    """
    if not _SLUG.fullmatch(folder.name) or folder.name in _RESERVED:
        raise InputError(
            f"{folder}: its name cannot name a machine; rename it with lower-case letters, digits "
            "and hyphens"
        )
    listed = _read_sums(folder)
    present = {
        path.relative_to(folder).as_posix()
        for path in folder.rglob("*")
        if path.is_file() and path.relative_to(folder).as_posix() not in (README, SUMS)
    }
    if missing := sorted(set(listed) - present):
        raise InputError(
            f"{folder / missing[0]}: missing though {SUMS} lists it{_more(missing)}; restore it "
            f"(git checkout) or remove the folder"
        )
    if extra := sorted(present - set(listed)):
        raise InputError(
            f"{folder / extra[0]}: {SUMS} does not list it{_more(extra)}; remove the file or "
            "record the run anew"
        )
    for name, expected in listed.items():
        if documents.sha256_of_file(folder / name) != expected:
            raise InputError(
                f"{folder / name}: altered, its checksum differs from {SUMS}; restore it "
                "(git checkout) or record the run anew"
            )
        _read(folder / name, name)
        if not _PLACES.fullmatch(name):
            raise InputError(f"{folder / name}: has no place in a recorded machine; remove it")


def _folders(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    return sorted(
        path for path in folder.iterdir() if path.is_dir() and not path.name.startswith(".")
    )


def _more(names: Sequence[str]) -> str:
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""


def _read_sums(folder: Path) -> dict[str, str]:
    path = folder / SUMS
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise InputError(
            f"{path}: no such file; restore it (git checkout) or remove the folder"
        ) from None
    except UnicodeDecodeError:
        raise InputError(f"{path}: not UTF-8 text; restore it (git checkout)") from None
    sums: dict[str, str] = {}
    for number, line in enumerate(text.splitlines(), start=1):
        match = _LINE.fullmatch(line)
        inside = match and not Path(match[2]).is_absolute() and ".." not in Path(match[2]).parts
        if not inside or match[2] in sums:
            raise InputError(
                f"{path}: line {number} is not a checksum and a file of this folder, listed once; "
                "restore it (git checkout)"
            )
        sums[match[2]] = match[1]
    if not sums:
        raise InputError(f"{path}: lists no file; restore it (git checkout) or remove the folder")
    return sums
