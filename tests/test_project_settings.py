"""The project's own files agree with each other, and importing the library costs nothing."""
import ast
import importlib.metadata
import re
import subprocess
import sys
import tomllib
from configparser import ConfigParser
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PINS = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line)


def settings():
    parser = ConfigParser()
    parser.read(ROOT / "settings.ini")
    return parser["DEFAULT"]


def package_name(requirement):
    return re.match(r"[\w.-]+", requirement)[0].lower().replace("_", "-")


def dependencies(*extras):
    project = PYPROJECT["project"]
    return {package_name(r) for r in project["dependencies"] + [r for extra in extras for r in project["optional-dependencies"][extra]]}


def tracked_files():
    listing = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if listing.returncode: pytest.skip("not a git checkout")
    return [ROOT / name for name in listing.stdout.split("\0") if name and (ROOT / name).is_file()]


def test_settings_agree_with_pyproject():
    """nbdev 2 reads settings.ini, pip and nbdev 3 read pyproject.toml."""
    ini, project = settings(), PYPROJECT["project"]
    assert ini["lib_name"] == project["name"]
    assert ini["description"] == project["description"]
    assert ">=" + ini["min_python"] == project["requires-python"]
    assert ini["keywords"].split() == project["keywords"]
    assert [{"name": ini["author"], "email": ini["author_email"]}] == project["authors"]
    assert ini["git_url"] == project["urls"]["Repository"]
    assert ini["doc_host"] + ini["doc_baseurl"] + "/" == project["urls"]["Documentation"]
    assert PYPROJECT["tool"]["nbdev"] == {key: ini[key] for key in PYPROJECT["tool"]["nbdev"]}
    assert f'__version__ = "{ini["version"]}"' in (ROOT / "zerolab/__init__.py").read_text()


def test_slow_cells_are_skipped():
    assert settings()["tst_flags"].split() == ["slow", "cuda"]


def test_nbdev_and_its_companions_are_the_pinned_ones():
    """nbdev 2.4.14 works beside these versions only."""
    for requirement in PYPROJECT["project"]["optional-dependencies"]["dev"]:
        if "==" not in requirement: continue
        name, version = requirement.split("==")
        assert PINS[name] == version == importlib.metadata.version(name)


def test_what_people_come_for_is_an_ordinary_dependency():
    assert {"jupyterlab", "torch", "diffusers", "gsplat", "ipywidgets", "pyvista", "papermill"} <= dependencies()
    assert not {"nbdev", "fastcore", "execnb"} & dependencies()


def test_constraints_pin_every_dependency_from_any_index():
    pinned = {name.lower().replace("_", "-") for name in PINS}
    assert dependencies("dev", "docs") - pinned == set()
    assert PINS["torch"] == "2.13.0"
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    assert not [line for line in lines if "+" in line.split("#")[0] or "@" in line or "/" in line.split("#")[0]]


def test_constraints_pin_what_the_dependencies_depend_on():
    """The whole closure is pinned, at the versions that are installed here."""
    pins = {canonicalize_name(name): version for name, version in PINS.items()}
    waiting, seen, wrong = [Requirement("zerolab[dev,docs,gpu]")], set(), []
    while waiting:
        wanted = waiting.pop()
        name = canonicalize_name(wanted.name)
        for extra in {"", *wanted.extras}:
            if (name, extra) in seen: continue
            seen.add((name, extra))
            try: installed = importlib.metadata.distribution(name)
            except importlib.metadata.PackageNotFoundError: continue   # optional, or for another platform
            if name != "zerolab" and pins.get(name) != installed.version.split("+")[0]: wrong.append(f"{name}=={installed.version}")
            needs = map(Requirement, installed.requires or [])
            waiting += [need for need in needs if need.marker is None or need.marker.evaluate({"extra": extra})]
    assert sorted(set(wrong)) == []
    assert len(seen) > 100
    assert f"setuptools=={PINS['setuptools']}" in PYPROJECT["build-system"]["requires"]


def test_exported_code_imports_declared_packages_only():
    """Someone who installs zerolab without extras can import all of it, zerolab.dev excepted."""
    called = {"PIL": "pillow", "IPython": "ipython", "skimage": "scikit-image", "yaml": "pyyaml", "cv2": "opencv-python", "mlflow": "mlflow-skinny"}
    brought = {"IPython": "ipykernel", "vtkmodules": "pyvista", "jupyter_client": "nbclient", "traitlets": "ipykernel",
               "mpl_toolkits": "matplotlib", "llvmlite": "numba", "tokenizers": "transformers"}
    optional = {package_name(r) for extra in ("gpu", "movie", "ray", "slurm", "track") for r in PYPROJECT["project"]["optional-dependencies"][extra]}
    undeclared = set()
    for path in sorted((ROOT / "zerolab").rglob("*.py")):
        if path.is_relative_to(ROOT / "zerolab/dev"): continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import): names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and not node.level: names = [node.module]
            else: continue
            for name in {name.split(".")[0] for name in names} - sys.stdlib_module_names - {"zerolab"}:
                wanted = brought.get(name) or called.get(name, name.lower().replace("_", "-"))
                if wanted not in dependencies() | optional: undeclared.add(f"{path.relative_to(ROOT)}: {name}")
    assert sorted(undeclared) == []


def test_importing_zerolab_is_quick_and_light():
    code = ("import sys, time; start = time.perf_counter(); import zerolab; took = time.perf_counter() - start; "
            "print(took, *({'torch', 'vtk', 'vtkmodules', 'numba', 'numpy'} & set(sys.modules)))")
    runs = [subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split() for _ in range(3)]
    assert min(float(run[0]) for run in runs) < 0.3
    assert [run[1:] for run in runs] == [[]] * 3


def test_no_tracked_file_is_large():
    large = {str(path.relative_to(ROOT)): path.stat().st_size for path in tracked_files() if path.stat().st_size >= 10_000_000}
    assert large == {}
    assert sum(path.stat().st_size for path in tracked_files() if path.is_relative_to(ROOT / "data")) < 60_000_000


def test_tracked_text_names_no_place_outside_the_repository():
    from zerolab.dev.notebooks import MACHINE_PATH, OUTSIDE
    found = []
    for path in tracked_files():
        if path.suffix not in {".py", ".md", ".toml", ".ini", ".sh", ".cff", ".txt", ".css", ".js", ".yml", ""}: continue
        if path.is_relative_to(ROOT / "nbs/_assets/katex"): continue
        for number, line in enumerate(path.read_text(errors="replace").splitlines(), 1):
            match = OUTSIDE.search(line) or (None if path.is_relative_to(ROOT / "tests") else MACHINE_PATH.search(line))
            if match: found.append(f"{path.relative_to(ROOT)}:{number}: {match[0]}")
    assert found == []


def test_licence_is_apache_2():
    text = (ROOT / "LICENSE").read_text()
    assert "Apache License" in text and "Version 2.0, January 2004" in text and "Copyright 2026 The zerolab authors" in text
    assert PYPROJECT["project"]["license"] == "Apache-2.0" and settings()["license"] == "apache2"
