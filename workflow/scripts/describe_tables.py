"""Write results/tables/README.md: what each column means, and its unit."""

from pathlib import Path

from _job import job
from kvbench import documents, studies
from kvbench.analysis import capacity, claims, instrument, tables


def main(snakemake):
    """Run the rule ``describe_tables``."""
    described = {
        "kv_samples.csv": tables.SAMPLE_COLUMNS,
        "kv_summary.csv": tables.SUMMARY_COLUMNS,
        "kv_replies.csv": tables.REPLY_COLUMNS,
        "kv_quality.csv": tables.QUALITY_COLUMNS,
        "aa_test.csv": instrument.COLUMNS,
        "capacity.csv": capacity.COLUMNS,
        "../claims/claims.csv": claims.COLUMNS,
    }
    for name in snakemake.params.studies:
        columns = studies.get(name).columns
        described[f"app_{name}.csv"] = {**tables.APP_COLUMNS, **columns}
    documents.write_text_atomic(Path(snakemake.output[0]), tables.columns_readme(described))


if "snakemake" in globals():
    with job(snakemake):
        main(snakemake)
