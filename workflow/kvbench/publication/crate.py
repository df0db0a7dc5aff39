"""A finished run as one RO-Crate: what was measured, by which workflow, from which commit.

The profile is Workflow RO-Crate (about.workflowhub.eu/Workflow-RO-Crate): a workflow with its main
entity, licence and creators, and the run's published files beside it.
"""

from __future__ import annotations

import mimetypes
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvbench import documents
from kvbench.errors import InputError

if TYPE_CHECKING:
    from rocrate.rocrate import ROCrate

_MAIN = "Snakefile"
_LICENSE = "https://spdx.org/licenses/MIT"
#: What a checkout may hold beside its files: caches of Python and of notebooks.
_PASSED_OVER = {"__pycache__", ".ipynb_checkpoints"}
#: Python's own media types; those of the system differ, and take a Snakemake file for a video.
_KNOWN = mimetypes.MimeTypes(filenames=())
#: Endings whose media type Python does not know, or not in every version.
_FORMATS = {
    ".cff": "application/yaml",
    ".csv": "text/csv",
    ".ipynb": "application/x-ipynb+json",
    ".md": "text/markdown",
    ".parquet": "application/vnd.apache.parquet",
    ".rst": "text/x-rst",
    ".smk": "text/plain",
    ".yaml": "application/yaml",
}
_LANGUAGES = {".en.": "en", ".pt.": "pt-BR", ".pt-BR.": "pt-BR"}


def write(
    target: Path,
    root: Path,
    sources: Iterable[str],
    manifest: Mapping[str, Any],
    environment: Mapping[str, Any],
) -> None:
    """Write the crate's folder anew; an earlier one of the same name is replaced when all is there.

    Parameters
    ----------
    target:
        Folder of the crate.
    root:
        The checkout.
    sources:
        Files and folders of the workflow and records, below ``root``; of a folder every file is listed.
    manifest:
        ``results/manifest.json``: the published files, with their checksums.
    environment:
        Facts about the machine that made the tables, of the inputs stage.

    Raises
    ------
    InputError
        A published file is not what the manifest says.
    """
    from rocrate.rocrate import ROCrate

    citation = documents.read_yaml(root / "CITATION.cff")
    crate = ROCrate()
    crate.name = citation["title"]
    crate.description = " ".join(citation["abstract"].split())
    # The day of the run: to pack it again makes no other publication.
    crate.root_dataset["datePublished"] = environment["date"]
    crate.root_dataset["version"] = citation["version"]
    crate.root_dataset["keywords"] = ", ".join(citation["keywords"])
    licence = crate.add_jsonld(
        {"@id": _LICENSE, "@type": "CreativeWork", "name": "MIT License", "identifier": "MIT"}
    )
    crate.license = licence
    authors = [
        crate.add_jsonld({"@id": f"#author-{number}", **_author(one)})
        for number, one in enumerate(citation["authors"], start=1)
    ]
    crate.root_dataset["author"] = authors
    # Names the profile too.
    workflow = crate.add_workflow(
        root / _MAIN,
        _MAIN,
        main=True,
        lang="snakemake",
        lang_version=environment["packages"].get("snakemake"),
        gen_cwl=False,
    )
    workflow["name"] = citation["title"]
    workflow["creator"] = authors
    workflow["license"] = licence
    workflow["version"] = environment.get("commit", "unknown")
    workflow["softwareRequirements"] = [
        crate.add_jsonld(
            {
                "@id": f"#software-{name}",
                "@type": "SoftwareApplication",
                "name": name,
                "softwareVersion": version,
            }
        )
        for name, version in {"python": environment["python"], **environment["packages"]}.items()
    ]
    for name in sources:
        _add(crate, root, name)
    for name, facts in sorted(manifest["files"].items()):
        path = root / name
        if not path.is_file() or documents.sha256_of_file(path) != facts["sha256"]:
            raise InputError(
                f"{path}: not the file of results/manifest.json; run `snakemake` first"
            )
        crate.add_file(
            path,
            name,
            properties={
                **_format(name),
                "contentSize": str(facts["bytes"]),
                "sha256": facts["sha256"],
                "description": f"made by the rule {facts['rule']}",
            },
        )
    crate.root_dataset["mentions"] = crate.add_jsonld(
        {
            "@id": "#machine",
            "@type": "Thing",
            "name": environment["cpu"],
            "description": "The machine that made the tables: "
            f"{environment['cores']} cores, {environment['system']}",
        }
    )
    part = target.with_name(f".{target.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    try:
        crate.write(part)
        shutil.rmtree(target, ignore_errors=True)
        part.replace(target)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _add(crate: ROCrate, root: Path, name: str) -> None:
    """Add a file, or a folder with every file in it."""
    path = root / name
    if path.is_file():
        if name != _MAIN:
            crate.add_file(path, name, properties=_format(name))
        return
    folder = crate.add_dataset(dest_path=f"{name}/", properties={"name": name})
    folder["hasPart"] = [
        crate.add_file(file, inside, properties=_format(inside))
        for file in sorted(path.rglob("*"))
        if file.is_file() and not _PASSED_OVER.intersection(file.parts)
        for inside in [file.relative_to(root).as_posix()]
    ]


def _format(name: str) -> dict[str, str]:
    """Media type and language of a file, as far as its name tells them."""
    kind = _FORMATS.get(Path(name).suffix) or _KNOWN.guess_type(name)[0]
    found = {"encodingFormat": kind or "text/plain", "name": name}
    for part, language in _LANGUAGES.items():
        if part in Path(name).name:
            found["inLanguage"] = language
    return found


def _author(author: Mapping[str, str]) -> dict[str, str]:
    """A person has a family name; what has a name alone is an organisation."""
    parts = [author.get("given-names", ""), author.get("family-names", "")]
    if any(parts):
        return {"@type": "Person", "name": " ".join(filter(None, parts))}
    return {"@type": "Organization", "name": author["name"]}


def check(folder: Path) -> None:
    """Read a crate back and see that every file it names is there.

    Raises
    ------
    InputError
        The crate cannot be read, has no main workflow, or a named file is missing.
    """
    from rocrate.rocrate import ROCrate

    try:
        crate = ROCrate(folder)
    except ValueError as error:
        raise InputError(f"{folder}: not an RO-Crate: {error}") from None
    main = crate.mainEntity
    if main is None or "ComputationalWorkflow" not in main.type:
        raise InputError(f"{folder}: the crate has no main workflow")
    missing = [entity.id for entity in crate.data_entities if not (folder / entity.id).exists()]
    if missing:
        raise InputError(f"{folder}: {missing[0]} is named by the crate and not in it")
