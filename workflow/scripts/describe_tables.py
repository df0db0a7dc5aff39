"""Write results/tables/README.md: what each column means, and its unit."""

from pathlib import Path

from _job import job
from kvbench import documents, studies
from kvbench.analysis import capacity, claims, instrument, tables
from kvbench.traffic import columns


def main(snakemake):
    """Run the rule ``describe_tables``."""
    described = {
        "kv_samples.csv": tables.SAMPLE_COLUMNS,
        "kv_summary.csv": tables.SUMMARY_COLUMNS,
        "kv_rounds.csv": tables.ROUND_COLUMNS,
        "kv_replies.csv": tables.REPLY_COLUMNS,
        "kv_quality.csv": tables.QUALITY_COLUMNS,
        "aa_test.csv": instrument.COLUMNS,
        "capacity.csv": capacity.COLUMNS,
        "../claims/claims.csv": claims.COLUMNS,
    }
    for name in snakemake.params.studies:
        own = studies.get(name).columns
        described[f"app_{name}.csv"] = {**tables.APP_COLUMNS, **own}
    if snakemake.params.get("traffic"):
        described |= {f"{name}.csv": own for name, own in columns.described().items()}
    documents.write_text_atomic(Path(snakemake.output[0]), tables.columns_readme(described))


if "snakemake" in globals():
    with job(snakemake):
        main(snakemake)
