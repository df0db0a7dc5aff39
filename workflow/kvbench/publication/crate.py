"""A finished run as one RO-Crate: what was measured, by which workflow, from which commit.

The profile is Workflow RO-Crate (about.workflowhub.eu/Workflow-RO-Crate): a workflow with its main
entity, licence and creators, and the run's published files beside it.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from kvbench import documents
from kvbench.errors import InputError

_PROFILE = "https://w3id.org/workflowhub/workflow-ro-crate/1.0"


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
        Files and folders of the workflow, below ``root``.
    manifest:
        ``results/manifest.json``: the published files, with their checksums.
    environment:
        Facts about the machine, of the inputs stage.

    Raises
    ------
    InputError
        A published file is not what the manifest says.
    """
    from rocrate.model.person import Person
    from rocrate.rocrate import ROCrate

    citation = documents.read_yaml(root / "CITATION.cff")
    crate = ROCrate()
    crate.name = citation["title"]
    crate.description = " ".join(citation["abstract"].split())
    crate.license = "https://spdx.org/licenses/MIT"
    crate.root_dataset["conformsTo"] = {"@id": _PROFILE}
    crate.root_dataset["keywords"] = ", ".join(citation["keywords"])
    people = [
        crate.add(Person(crate, f"#author-{number}", {"name": _name(author)}))
        for number, author in enumerate(citation["authors"], start=1)
    ]
    crate.root_dataset["author"] = people
    workflow = crate.add_workflow(
        root / "Snakefile", "Snakefile", main=True, lang="snakemake", gen_cwl=False
    )
    workflow["name"] = "Snakefile"
    workflow["creator"] = people
    workflow["license"] = {"@id": "https://spdx.org/licenses/MIT"}
    workflow["version"] = environment.get("commit", "unknown")
    for name in sources:
        path = root / name
        if path.is_dir():
            crate.add_dataset(path, f"{name}/")
        else:
            crate.add_file(path, name)
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
                "contentSize": str(facts["bytes"]),
                "sha256": facts["sha256"],
                "description": f"made by the rule {facts['rule']}",
            },
        )
    crate.add_jsonld(
        {
            "@id": "#machine",
            "@type": "Thing",
            "name": environment["cpu"],
            "description": f"{environment['cores']} cores, {environment['system']}",
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


def _name(author: Mapping[str, str]) -> str:
    parts = [author.get("given-names", ""), author.get("family-names", "")]
    return " ".join(part for part in parts if part) or author["name"]


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
    if crate.mainEntity is None:
        raise InputError(f"{folder}: the crate has no main workflow")
    missing = [entity.id for entity in crate.data_entities if not (folder / entity.id).exists()]
    if missing:
        raise InputError(f"{folder}: {missing[0]} is named by the crate and not in it")
