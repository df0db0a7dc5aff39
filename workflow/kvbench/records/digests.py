"""Digests of the code behind a job, from what that code imports: nobody keeps a list.

Snakemake sees edits to a rule's script but not to the modules that the script imports. As a
parameter of the rule, a digest of them makes it work again when they change, and only then.

The modules behind a job are found by reading, not by importing: every ``import`` in a file counts,
also one inside a function or named in a text (``python -m kvbench.caching.proxy``), but for those
under ``if TYPE_CHECKING``. A package's own page counts
where something is taken from it, not where one of its modules is. Modules of other distributions
are not followed; their versions are facts about the machine. A package whose modules are imported
by name at run time (strategies, studies, figures) stands for all of them, unless the job says which
one it uses. The digest is that of the parsed code without docstrings, so that comments, docstrings
and line breaks change nothing. Schemas that a module checks against, and files that it names below
``resources`` or ``config``, count as its code.
"""

from __future__ import annotations

import ast
import hashlib
import json
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path
from typing import Any

from kvbench import layout

_PACKAGE = "kvbench"
#: Calls of :mod:`kvbench.documents` whose text argument names a schema.
_SCHEMA_CALLS = ("check", "check_record", "read_json", "schema")
#: Words of a schema that explain it and decide nothing.
_WORDS = ("$comment", "description", "title")


@dataclass(frozen=True)
class Module:
    """What one file holds, as far as digests need it.

    Attributes
    ----------
    digest:
        Of its code without docstrings.
    imports:
        Names of the library that it imports, as written: a module, a package, or a name in one.
    by_name:
        Packages whose modules it imports by name at run time.
    schemas:
        Texts that may name the schema that a document is checked against.
    files:
        Files and folders that it names below a shipped folder, as parts:
        ``("resources", "a", "b.json")``.
    """

    digest: str
    imports: frozenset[str]
    by_name: frozenset[str]
    schemas: frozenset[str]
    files: frozenset[tuple[str, ...]]


@dataclass(frozen=True)
class Library:
    """The folder ``workflow``, with ``kvbench``, ``scripts`` and ``schemas``; each file is read once."""

    root: Path
    _modules: dict[Path, Module] = field(default_factory=dict, repr=False)

    @cached_property
    def paths(self) -> dict[str, Path]:
        """Name of every module of the library to its file."""
        found = {}
        for path in sorted((self.root / _PACKAGE).rglob("*.py")):
            parts = path.relative_to(self.root).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
        return found

    def digest(
        self,
        *entries: str,
        script: str | None = None,
        only: Mapping[str, Collection[str]] | None = None,
        no_schema: Collection[str] = (),
    ) -> str:
        """First 16 hexadecimal digits of the SHA-256 of all code that a job runs.

        Parameters
        ----------
        entries:
            Modules of the library that the job starts from.
        script:
            Name of the rule's script, if it starts from one.
        only:
            Package to those of its modules that this job imports by name; the other modules of
            that package count only where something else imports them.
        no_schema:
            Schemas of documents that this job never sees.
        """
        state = hashlib.sha256()
        data: dict[str, str] = {}
        for name, module in self.closure(*entries, script=script, only=only).items():
            state.update(f"{name} {module.digest}\n".encode())
            data |= {name: self._schema(name) for name in module.schemas - set(no_schema)}
            data |= {"/".join(parts): self._file(parts) for parts in module.files}
        for name, digest in sorted(data.items()):
            if digest:
                state.update(f"{name} {digest}\n".encode())
        return state.hexdigest()[:16]

    def closure(
        self,
        *entries: str,
        script: str | None = None,
        only: Mapping[str, Collection[str]] | None = None,
    ) -> dict[str, Module]:
        """The modules behind a job by name, sorted; see :meth:`digest`."""
        only = {} if only is None else only
        found: dict[str, Module] = {}
        pending = list(entries)
        if script is not None:
            path = self.root / "scripts" / f"{script}.py"
            for part in (path, path.with_name("_job.py")):
                found[f"scripts/{part.name}"] = module = self._read(part, "")
                pending += self._followed(module, only)
        while pending:
            name = pending.pop()
            if name not in found:
                path = self.paths[name]
                package = name if path.name == "__init__.py" else name.rpartition(".")[0]
                found[name] = module = self._read(path, package)
                pending += self._followed(module, only)
        return dict(sorted(found.items()))

    def _followed(self, module: Module, only: Mapping[str, Collection[str]]) -> Iterator[str]:
        """Modules whose code runs because ``module`` is used."""
        for imported in module.imports:
            name = imported if imported in self.paths else imported.rpartition(".")[0]
            # The library's own page holds its version and the way to the notebook.
            if name not in self.paths or name == _PACKAGE:
                continue
            yield name
            # A package that is started as a program begins there.
            if imported == name and f"{name}.__main__" in self.paths:
                yield f"{name}.__main__"
        for package in module.by_name:
            inside = (name for name in self.paths if name.rpartition(".")[0] == package)
            yield from only.get(package, inside)

    def _read(self, path: Path, package: str) -> Module:
        if path not in self._modules:
            self._modules[path] = _parse(path.read_bytes(), package)
        return self._modules[path]

    def _schema(self, name: str) -> str:
        """Digest of a schema without its words; nothing when the text names none."""
        path = self._shipped("schemas") / f"{name}.schema.json"
        if not path.is_file():
            return ""
        rules = _without_words(json.loads(path.read_text(encoding="utf-8")))
        return hashlib.sha256(json.dumps(rules, sort_keys=True).encode()).hexdigest()

    def _file(self, parts: tuple[str, ...]) -> str:
        """Digest of a shipped file, or of the files of a folder of resources but their prose.

        A folder of ``config`` does not count: a job reads the files that it was given of it.
        """
        path = self._shipped(parts[0]).joinpath(*parts[1:])
        if parts[0] != "resources" or not path.is_dir():
            return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""
        state = hashlib.sha256()
        for file in sorted(path.iterdir()):
            if file.is_file() and file.suffix != ".md":
                state.update(f"{file.name} ".encode())
                state.update(hashlib.sha256(file.read_bytes()).digest())
        return state.hexdigest()

    def _shipped(self, name: str) -> Path:
        installed = self.root / _PACKAGE / f"_{name}"
        if installed.is_dir():
            return installed
        return self.root / name if name == "schemas" else self.root.parent / name


def _without_words(schema: Any) -> Any:
    if isinstance(schema, list):
        return [_without_words(part) for part in schema]
    if not isinstance(schema, Mapping):
        return schema
    return {
        key: _without_words(part)
        for key, part in schema.items()
        if not (key in _WORDS and isinstance(part, str))
    }


# ------------------------------------------------------------------------------ reading one file


def _parse(source: bytes, package: str) -> Module:
    """Read one file; its relative imports start at ``package``."""
    imports: set[str] = set()
    by_name: set[str] = set()
    schemas: set[str] = set()
    files: set[tuple[str, ...]] = set()

    def look(node: ast.AST) -> None:
        if isinstance(node, ast.Import):
            imports.update(alias.name for alias in node.names if _ours(alias.name))
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package.split(".")
                above = above[: len(above) - node.level + 1]
                base = ".".join([*above, base] if base else above)
            if _ours(base):
                imports.update(f"{base}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and node.args:
            called = getattr(node.func, "attr", getattr(node.func, "id", ""))
            if called == "import_module":
                name, whole = _beginning(node.args[0], package)
                if _ours(name) and whole:
                    imports.add(name)
                elif _ours(name):
                    by_name.add(name.rpartition(".")[0])
            elif called in _SCHEMA_CALLS:
                schemas.update(
                    part.value
                    for argument in node.args[:2]
                    for part in ast.walk(argument)
                    if isinstance(part, ast.Constant) and isinstance(part.value, str)
                )
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            # Such as the module of a program that is started: python -m kvbench.caching.proxy.
            if node.value.startswith(f"{_PACKAGE}.") and node.value.replace(".", "").isidentifier():
                imports.add(node.value)
        elif parts := _shipped_parts(node):
            files.add(parts)

    code = _canonical(ast.parse(source), look)
    return Module(
        hashlib.sha256(code.encode()).hexdigest(),
        frozenset(imports),
        frozenset(by_name),
        frozenset(schemas),
        frozenset(files),
    )


def _canonical(node: Any, look: Any) -> str:
    """Code as text without docstrings, positions and what only type checkers run.

    Unlike :func:`ast.dump` it is the same under every version of Python: empty fields are left out.
    """
    if isinstance(node, list):
        return ",".join(_canonical(part, look) for part in node if not _idle(part))
    if not isinstance(node, ast.AST):
        return repr(node)
    look(node)
    fields = [
        f"{name}={_canonical(value, look)}"
        for name, value in ast.iter_fields(node)
        if value is not None and value != []
    ]
    return f"{type(node).__name__}({';'.join(fields)})"


def _idle(node: Any) -> bool:
    """Whether a statement does nothing: a docstring, or imports for type checkers."""
    if isinstance(node, ast.Expr):
        return isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
    return (
        isinstance(node, ast.If)
        and getattr(node.test, "attr", getattr(node.test, "id", "")) == "TYPE_CHECKING"
    )


def _ours(name: str) -> bool:
    return name.partition(".")[0] == _PACKAGE


def _beginning(node: ast.expr, package: str) -> tuple[str, bool]:
    """The text that an expression begins with, as far as it stands there, and whether that is all."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value, True
    if isinstance(node, ast.Name) and node.id == "__name__":
        return package, True
    if isinstance(node, ast.FormattedValue):
        return _beginning(node.value, package)
    if isinstance(node, ast.JoinedStr):
        text = ""
        for part in node.values:
            more, whole = _beginning(part, package)
            text += more
            if not whole:
                return text, False
        return text, True
    return "", False


def _shipped_parts(node: ast.AST) -> tuple[str, ...]:
    """``shipped("resources") / "a" / "b"`` as its parts; nothing for anything else."""
    parts: list[str] = []
    while isinstance(node, ast.BinOp) and isinstance(node.right, ast.Constant):
        parts.append(str(node.right.value))
        node = node.left
    if parts and isinstance(node, ast.Call) and node.args:
        called = getattr(node.func, "attr", getattr(node.func, "id", ""))
        if called == "shipped" and isinstance(node.args[0], ast.Constant):
            return (str(node.args[0].value), *reversed(parts))
    return ()


# ------------------------------------------------------------------------------- the jobs' digests


@cache
def library() -> Library:
    """The library of this checkout."""
    return Library(layout.WORKFLOW)


#: Packages that import their modules by name.
_STRATEGIES = f"{_PACKAGE}.strategies"
_STUDIES = f"{_PACKAGE}.studies"
_MEASURING = f"{_PACKAGE}.studies.measuring"
_FIGURES = f"{_PACKAGE}.figures"


#: Scripts whose jobs come before every cell, and the contracts of cells, which they never see.
_BEFORE_CELLS = ("measure_ceilings", "prepare_model", "prepare_prompts", "record_environment")
_CELL_SCHEMAS = ("app-cell", "kv-cell", "traffic-cell")


@cache
def of_script(script: str, *studies: str) -> str:
    """Digest of a rule's script that measures nothing.

    Parameters
    ----------
    script:
        Its file name without suffix.
    studies:
        The studies that it reads, where that is not all of them.
    """
    # One figure is one job of its own; the advice on a log draws those of its suite by name.
    advised = [name for name in library().paths if name.startswith(f"{_FIGURES}.traffic_")]
    only: dict[str, list[str]] = {_MEASURING: [], _FIGURES: advised}
    if studies:
        only[_STUDIES] = [f"{_STUDIES}.{name}" for name in studies]
    unseen = _CELL_SCHEMAS if script in _BEFORE_CELLS else ()
    return library().digest(script=script, only=only, no_schema=unseen)


@cache
def of_figure(name: str) -> str:
    """Digest of the code that draws one figure."""
    return library().digest(
        script="draw_figures", only={_FIGURES: [f"{_FIGURES}.{name}"], _MEASURING: []}
    )


@cache
def of_strategy(name: str) -> str:
    """Digest of the code that can change what is measured of one strategy.

    Raises
    ------
    InputError
        There is no such strategy.
    """
    from kvbench import strategies

    only = {_STRATEGIES: [type(strategies.get(name)).__module__]}
    return library().digest(script="measure_kv_block", only=only, no_schema=["app-cell"])


@cache
def of_study(name: str) -> str:
    """Digest of the code that can change what is measured in one study; its words are not part of it."""
    return library().digest(script="measure_app_cell", only=_measuring(name), no_schema=["kv-cell"])


@cache
def study_imports(name: str, imported: str) -> bool:
    """Whether a study's measuring half, or what it shares with others, takes a name of the library."""
    found = library().closure(script="measure_app_cell", only=_measuring(name))
    return any(
        imported in part.imports for name, part in found.items() if name.startswith(_MEASURING)
    )


def _measuring(study: str) -> dict[str, list[str]]:
    return {_STUDIES: [], _MEASURING: [f"{_MEASURING}.{study}"]}
