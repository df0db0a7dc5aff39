"""Fixtures of the workflow tests."""

from __future__ import annotations

from pathlib import Path

import pytest
from workflow_helpers import copy_repository, run_snakemake


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """A fresh copy of the repository."""
    target = tmp_path / "clone"
    copy_repository(target)
    return target


@pytest.fixture
def snakemake():
    """Run Snakemake in a folder; returns the finished process with all its output."""
    return run_snakemake
