"""Packages of the wheel: all that are found, and the folders that travel inside (pyproject.toml)."""

from setuptools import find_packages, setup

setup(
    packages=[
        *find_packages("workflow", include=["kvbench", "kvbench.*"]),
        "kvbench._config",
        "kvbench._resources",
        "kvbench._schemas",
    ]
)
