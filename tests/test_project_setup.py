"""`make setup` on a machine that cannot: one clear line, a failure, and no half-made environment."""
import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def folder(tmp_path):
    for name in ("Makefile", "constraints.txt", "pyproject.toml"): shutil.copy(ROOT / name, tmp_path)
    return tmp_path


def make(folder, *arguments):
    if shutil.which("make") is None: pytest.skip("no make")
    outer = {"MAKEFLAGS", "MAKELEVEL", "MFLAGS"}   # of the `make test` that may be running this: an inner make says where it enters and leaves
    environment = {name: value for name, value in os.environ.items() if name not in outer}
    return subprocess.run(["make", *arguments], cwd=folder, capture_output=True, text=True, env=environment)


def interpreter(folder, body):
    """A stand-in for a Python: a shell script."""
    path = folder / "some-python"
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)
    return f"PYTHON={path}"


MACHINES = {
    "too old": ('case "$1" in -V) echo Python 3.9.2;; *) exit 1;; esac', "needs Python 3.11 or newer; "),
    "without venv": ('case "$2" in *ensurepip*) exit 1;; esac', "sudo apt install python3-venv"),
}


@pytest.mark.parametrize("body, says", MACHINES.values(), ids=MACHINES)
def test_a_python_that_will_not_do_is_named(folder, body, says):
    result = make(folder, "setup", interpreter(folder, body))
    assert result.returncode and says in result.stdout and not (folder / ".venv").exists()
    assert len(result.stdout.strip().splitlines()) == 1


def test_no_python_at_all(folder):
    result = make(folder, "setup", "PYTHON=no-such-python")
    assert result.returncode and "'no-such-python' was not found" in result.stdout


def test_setup_is_done_once_and_again_when_the_pins_change(folder):
    "By the files' times, given here: a clock that ticks coarsely must not decide."
    stamp, pins = folder / ".venv/.zerolab-installed", folder / "constraints.txt"
    stamp.parent.mkdir()
    stamp.touch()
    for age, path in enumerate((folder / "pyproject.toml", pins, stamp)): os.utime(path, (1_000_000 + age,)*2)
    assert make(folder, "setup", "--question").returncode == 0
    os.utime(pins, (1_000_100,)*2)
    assert make(folder, "setup", "--question").returncode == 1


def test_make_alone_lists_every_target(folder):
    listed = make(folder).stdout
    for target in ("setup", "quickstart", "test", "docs", "lab", "notebooks", "clean"): assert f"make {target} " in listed
