"""Write the report, one page per language."""

from pathlib import Path

from _job import job
from kvbench import documents
from kvbench.publication import columns, report
from kvbench.records import gathering


def main(snakemake):
    """Run the rule ``report``."""
    given, chosen = snakemake.input, snakemake.params
    tables = {Path(path).stem: gathering.read_csv(Path(path)) for path in given.tables}
    meanings = columns.described(chosen.studies, chosen.traffic)
    machines = gathering.machines(chosen.machines)
    for language, page in zip(chosen.languages, snakemake.output, strict=True):
        text = report.render(
            language,
            tables["kv_summary"],
            gathering.read_csv(Path(given.claims)),
            tables,
            meanings,
            [report.Picture(*picture) for picture in chosen.pictures],
            gathering.environments(given.get("environments", []), machines),
            chosen.studies,
            Path("results"),
            chosen.languages,
        )
        documents.write_text_atomic(Path(page), text)


if "snakemake" in globals():
    with job(snakemake):
        main(snakemake)
