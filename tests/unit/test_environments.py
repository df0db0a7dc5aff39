"""The conda specs, the pip lock and what the code imports agree with each other.

Whether the conda specs solve cannot be checked without a channel; README says so.
"""

from __future__ import annotations

import ast
import importlib.metadata
import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import rattler
import yaml
from kvbench.records import digests
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version
from rattler.explicit_environment import ExplicitEnvironmentSpec

ROOT = Path(__file__).resolve().parents[2]
ENVS = ROOT / "envs"
#: The engine vLLM brings its own versions; its spec is checked against a lock of its own.
SPECS = sorted(path for path in ENVS.glob("*.yaml") if path.stem != "vllm")
REQUIRED_SPECS = {"bench-cpu", "bench-gpu", "app", "analysis", "paper", "publish", "snakemake"}
PYTHONS = ("3.11", "3.12")
CONDA_PYTHON = "3.12"

# Conda's name for what the lock calls otherwise.
LOCK_NAME = {
    "pytorch-cpu": "torch",
    "pytorch-gpu": "torch",
    "matplotlib-base": "matplotlib",
    "python-fastjsonschema": "fastjsonschema",
    "redis-py": "redis",
    "snakemake-minimal": "snakemake",
}
CONDA_ONLY = {"python", "pip", "cxx-compiler", "tectonic"}
# Where conda and the lock differ on purpose: (conda, lock), and why stands in the spec.
KNOWN_DIFFERENCES = {
    "snakemake": ("9.27.0", "9.27.1"),
    "fastjsonschema": ("2.22.2", "2.22.3"),
    "setuptools": ("80.9.0", "84.2.1"),
}

EXACT_CONDA = re.compile(r"(?P<name>[a-z0-9][a-z0-9_.-]*)=(?P<version>\d[0-9a-z.]*)")


def read_requirements(path: Path) -> list[Requirement]:
    """Parse a requirements file, comments dropped; any option line is a parse error."""
    lines = (re.sub(r"(^|\s)#.*", "", line).strip() for line in path.read_text().splitlines())
    return [Requirement(line) for line in lines if line]


def pins(requirements: list[Requirement], python: str) -> dict[str, str]:
    """Map canonical name to pinned version for ``python`` on 64-bit Linux."""
    where = {
        "python_version": python,
        "python_full_version": f"{python}.9",
        "sys_platform": "linux",
        "platform_system": "Linux",
        "platform_machine": "x86_64",
    }
    found: dict[str, str] = {}
    for requirement in requirements:
        if requirement.marker is None or requirement.marker.evaluate(where):
            name = canonicalize_name(requirement.name)
            assert name not in found, f"{name} is pinned twice for Python {python}"
            found[name] = exact_version(requirement)
    return found


def exact_version(requirement: Requirement) -> str:
    """Return the version of a ``name==version`` requirement; anything looser fails."""
    specifiers = list(requirement.specifier)
    assert [s.operator for s in specifiers] == ["=="], f"{requirement} is not an exact pin"
    assert "*" not in specifiers[0].version, f"{requirement} is not an exact pin"
    return specifiers[0].version


def conda_pins(spec: Path) -> dict[str, str]:
    """Map conda package name to version for the conda part of a spec."""
    entries = [e for e in yaml.safe_load(spec.read_text())["dependencies"] if isinstance(e, str)]
    matches = [(entry, EXACT_CONDA.fullmatch(entry)) for entry in entries]
    loose = [entry for entry, match in matches if match is None]
    assert not loose, f"{spec.name}: not `name=version`: {loose}"
    return {match["name"]: match["version"] for _, match in matches}


def pip_pins(spec: Path) -> dict[str, str]:
    """Map canonical name to version for the ``pip:`` part of a spec."""
    entries = yaml.safe_load(spec.read_text())["dependencies"]
    nested = [entry["pip"] for entry in entries if isinstance(entry, dict)]
    return {
        canonicalize_name(r.name): exact_version(r)
        for r in (Requirement(line) for group in nested for line in group)
    }


def pin_file_problems(spec: Path, pin: Path) -> list[str]:
    """Say how an explicit pin file disagrees with its spec: version, absence, missing hash."""
    urls = [p.url for p in ExplicitEnvironmentSpec.from_path(pin).packages]
    solved = {}
    problems = []
    for url in urls:
        address, _, digest = str(url).partition("#")
        name, version, _ = address.rsplit("/", 1)[-1].rsplit("-", 2)
        solved[name] = version
        if not digest:
            problems.append(f"{name} carries no hash")
    for name, version in conda_pins(spec).items():
        if solved.get(name) != version:
            problems.append(f"{name}: spec {version}, pin {solved.get(name)}")
    return problems


DIRECT = read_requirements(ENVS / "requirements.in")
LOCK = read_requirements(ENVS / "requirements.lock")


def test_all_environments_are_there():
    assert {spec.stem for spec in SPECS} == REQUIRED_SPECS


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.stem)
def test_channels_exclude_the_defaults(spec):
    bioconda = ["bioconda"] if "snakemake-minimal" in conda_pins(spec) else []
    channels = yaml.safe_load(spec.read_text())["channels"]
    assert channels == ["conda-forge", *bioconda, "nodefaults"]


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.stem)
def test_conda_accepts_every_spec_strictly(spec):
    for name, version in conda_pins(spec).items():
        parsed = rattler.MatchSpec(f"{name}={version}", strict=True)
        assert parsed.name.normalized == name


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.stem)
def test_conda_versions_equal_the_lock(spec):
    locked = pins(LOCK, CONDA_PYTHON)
    versions = {
        canonicalize_name(LOCK_NAME.get(name, name)): version
        for name, version in conda_pins(spec).items()
        if name not in CONDA_ONLY
    } | pip_pins(spec)
    differing = {
        name: (version, locked.get(name))
        for name, version in versions.items()
        if version != locked.get(name)
    }
    assert differing == {n: v for n, v in KNOWN_DIFFERENCES.items() if n in versions}


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.stem)
def test_every_conda_environment_has_the_same_python(spec):
    assert conda_pins(spec)["python"] == "3.12.13"


def test_numpy_is_the_newest_each_python_can_have():
    assert pins(LOCK, "3.11")["numpy"] == "2.4.6"
    assert pins(LOCK, "3.12")["numpy"] == "2.5.1"


def test_analysis_and_paper_do_without_torch():
    for name in ("analysis", "paper"):
        assert not {"pytorch-cpu", "pytorch-gpu", "transformers"} & set(
            conda_pins(ENVS / f"{name}.yaml")
        )


def test_committed_pin_files_agree_with_their_specs():
    for pin in ENVS.glob("*.pin.txt"):
        spec = ENVS / f"{pin.name.split('.')[0]}.yaml"
        assert pin_file_problems(spec, pin) == [], pin.name


def test_a_wrong_pin_file_is_noticed(tmp_path):
    spec = tmp_path / "toy.yaml"
    spec.write_text("dependencies:\n  - jinja2=3.1.6\n  - pandas=3.0.5\n")
    pin = tmp_path / "toy.linux-64.pin.txt"
    pin.write_text(
        "@EXPLICIT\n"
        "https://example.org/conda-forge/noarch/jinja2-3.1.5-pyhd_0.conda#" + "0" * 32 + "\n"
        "https://example.org/conda-forge/linux-64/pandas-3.0.5-py312h_0.conda\n"
    )
    assert pin_file_problems(spec, pin) == [
        "pandas carries no hash",
        "jinja2: spec 3.1.6, pin 3.1.5",
    ]


@pytest.mark.parametrize("python", PYTHONS)
def test_lock_holds_every_direct_requirement(python):
    locked = pins(LOCK, python)
    direct = pins(DIRECT, python)
    assert {name: locked.get(name) for name in direct} == direct


def test_every_direct_requirement_says_what_it_is_for():
    lines = (ENVS / "requirements.in").read_text().splitlines()
    requirements = [line for line in lines if line and not line.startswith("#")]
    silent = [line for line in requirements if not re.search(r"\s#\s\w", line)]
    assert silent == []


def test_lock_names_no_index_and_no_local_build():
    # read_requirements has refused option lines; URLs and `+cpu` would still parse.
    for requirement in LOCK:
        assert requirement.url is None
        assert Version(exact_version(requirement)).local is None


def test_lock_leaves_hardware_libraries_to_the_torch_build():
    names = {canonicalize_name(r.name) for r in LOCK} - {"nvidia-ml-py"}
    assert [n for n in sorted(names) if n.startswith(("nvidia-", "cuda-", "triton"))] == []


@pytest.mark.parametrize("python", PYTHONS)
def test_lock_satisfies_pyproject(python):
    locked = pins(LOCK, python)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [Requirement(text) for text in project["dependencies"]]
    missing = [r.name for r in wanted if canonicalize_name(r.name) not in locked]
    assert missing == []
    unmet = [str(r) for r in wanted if locked[canonicalize_name(r.name)] not in r.specifier]
    assert unmet == []


def test_tests_run_on_the_pinned_versions():
    expected = pins(DIRECT, f"{sys.version_info.major}.{sys.version_info.minor}")
    installed = {name: Version(importlib.metadata.version(name)).public for name in expected}
    assert installed == expected


def imported_modules(folder: Path) -> dict[str, str]:
    """Map each top-level module imported below ``folder`` to one file that imports it."""
    found: dict[str, str] = {}
    for path in sorted(folder.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                names = [f"{node.module}.{alias.name}" for alias in node.names]
            else:
                continue
            for name in names:
                found.setdefault(name.split(".")[0], str(path.relative_to(folder)))
    return found


#: Imported only where somebody installed it: kvpress 0.5.5 does not fit the pinned transformers, and
#: vLLM lives in an environment of its own.
OPTIONAL = {"kvpress", "vllm"}


def test_every_imported_package_is_a_direct_requirement():
    direct = {canonicalize_name(r.name) for r in DIRECT}
    providers = importlib.metadata.packages_distributions()
    own = {"kvbench"} | {path.stem for path in (ROOT / "workflow" / "scripts").glob("*.py")}
    undeclared = {
        module: where
        for module, where in imported_modules(ROOT / "workflow").items()
        if module not in sys.stdlib_module_names
        and module not in own | OPTIONAL
        and not direct & {canonicalize_name(d) for d in providers.get(module, [])}
    }
    assert undeclared == {}


def test_vllm_has_a_lock_of_its_own_with_exact_pins():
    locked = pins(read_requirements(ENVS / "vllm.lock"), CONDA_PYTHON)
    assert {"torch", "transformers"} <= set(locked)
    assert any(name.startswith("vllm") for name in locked)
    # Their wheels do not fit this torch, and importing vLLM with them fails.
    assert not {"torchvision", "torchaudio", "torchcodec"} & set(locked)


def test_the_conda_spec_of_vllm_installs_its_lock():
    spec = yaml.safe_load((ENVS / "vllm.yaml").read_text())
    pip_part = next(entry["pip"] for entry in spec["dependencies"] if isinstance(entry, dict))
    assert "--requirement vllm.lock" in pip_part


# What runs in each environment ----------------------------------------------------------------

#: Imports given modules where only the modules of given distributions can be imported.
RESTRICTED = """
import importlib, importlib.metadata, json, sys
from importlib.abc import MetaPathFinder
asked = json.loads(sys.stdin.read())
providers = importlib.metadata.packages_distributions()
allowed = set(asked["distributions"])
class Absent(MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        top = name.partition(".")[0]
        given = {one.lower().replace("_", "-").replace(".", "-") for one in providers.get(top, [])}
        if given and not given & allowed:
            raise ModuleNotFoundError(f"No module named {top!r} in this environment", name=top)
        return None
sys.meta_path.insert(0, Absent())
sys.path[:0] = asked["paths"]
failed = {}
for name in asked["modules"]:
    try:
        importlib.import_module(name)
    except ModuleNotFoundError as error:
        failed[name] = str(error)
print(json.dumps(failed))
"""


def scripts_by_environment() -> dict[str, set[str]]:
    """Environment to the scripts of the rules that run in it, read from the rules."""
    found: dict[str, set[str]] = {}
    for path in (ROOT / "workflow" / "rules").glob("*.smk"):
        for rule in path.read_text().split("\nrule ")[1:]:
            script = re.search(r"scripts/(\w+)\.py", rule)
            if script is None:
                continue
            spec = re.search(r"envs/([\w-]+)\.yaml", rule)
            for name in [spec[1]] if spec else ["bench-cpu", "bench-gpu"]:
                found.setdefault(name, set()).add(script[1])
    return found


def with_dependencies(names: set[str]) -> set[str]:
    """The named distributions and what they require, as far as they are installed here."""
    found: set[str] = set()
    pending = {canonicalize_name(name) for name in names}
    while pending:
        name = pending.pop()
        found.add(name)
        try:
            required = importlib.metadata.requires(name) or []
        except importlib.metadata.PackageNotFoundError:
            continue
        for requirement in map(Requirement, required):
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                pending |= {canonicalize_name(requirement.name)} - found
    return found


def missing_where_only(distributions: set[str], modules: list[str]) -> dict[str, str]:
    """Module to what it could not import, with nothing but some distributions."""
    asked = {
        "distributions": sorted(with_dependencies(distributions)),
        "modules": modules,
        "paths": [str(ROOT / "workflow" / "scripts"), str(ROOT / "workflow")],
    }
    done = subprocess.run(
        [sys.executable, "-c", RESTRICTED],
        input=json.dumps(asked),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def modules_behind(script: str) -> list[str]:
    """The script, and every module of the library that it can come to import."""
    measures = script == "measure_app_cell"
    only = {} if measures else {"kvbench.studies.measuring": []}
    names = digests.library().closure(script=script, only=only)
    return [script, *(name for name in names if name.startswith("kvbench."))]


@pytest.mark.parametrize("name", sorted(scripts_by_environment()))
def test_an_environment_has_all_that_its_rules_import(name):
    spec = ENVS / f"{name}.yaml"
    conda = {LOCK_NAME.get(one, one) for one in conda_pins(spec)}
    modules = sorted({m for s in scripts_by_environment()[name] for m in modules_behind(s)})
    assert missing_where_only(conda | set(pip_pins(spec)), modules) == {}


def test_the_wheel_s_dependencies_let_every_module_be_imported():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    given = {Requirement(text).name for text in project["dependencies"]}
    modules = sorted(set(digests.library().paths) - {"kvbench.__main__"})
    assert missing_where_only(given, modules) == {}


def test_a_package_that_an_environment_lacks_is_noticed():
    assert set(missing_where_only({"numpy"}, ["numpy", "yaml"])) == {"yaml"}
