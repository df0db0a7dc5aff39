"""Write results/manifest.json: bytes, SHA-256 and source rule of every published file."""

from pathlib import Path

from _job import job
from kvbench import documents


def main(snakemake):
    """Run the rule ``write_manifest``."""
    files = {
        path: {
            "bytes": Path(path).stat().st_size,
            "sha256": documents.sha256_of_file(Path(path)),
            "rule": snakemake.params.rules[path],
        }
        for path in sorted(map(str, snakemake.input))
    }
    documents.write_json(
        Path(snakemake.output[0]), {"schema": "kvbench/manifest/1", "files": files}
    )


if "snakemake" in globals():
    with job(snakemake):
        main(snakemake)
