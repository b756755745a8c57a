"""Files are whole or not there: faults injected at every step of a write, and a process killed in the middle of one."""
import errno
import os
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch

from zerolab.scene import paths
from zerolab.scene.paths import atomic_path, data_dir, read_json, root, run_dir, write_json


class Crash(Exception): pass


def disk_full(*args, **kwargs): raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("old", [None, "old"])
@pytest.mark.parametrize("fault", [Crash, KeyboardInterrupt, SystemExit, MemoryError])
@pytest.mark.parametrize("folder", [False, True])
def test_an_exception_leaves_no_trace(tmp_path, old, fault, folder):
    target = tmp_path/"a.txt"
    if old and not folder: target.write_text(old)
    with pytest.raises(fault):
        with atomic_path(target) as temporary:
            if folder: temporary.mkdir()
            (temporary/"part" if folder else temporary).write_text("half of what was")
            raise fault()
    assert [p.read_text() for p in tmp_path.iterdir()] == ([old] if old and not folder else [])


@pytest.mark.parametrize("step", ["fsync", "replace"])
@pytest.mark.parametrize("old", [None, "old"])
def test_a_full_disk_keeps_the_old_file(tmp_path, monkeypatch, step, old):
    if old: (tmp_path/"a.json").write_text(old)
    monkeypatch.setattr(os, step, disk_full)
    with pytest.raises(OSError, match="No space left.*a.json"): write_json(tmp_path/"a.json", {"new": 1})
    assert [p.read_text() for p in tmp_path.iterdir()] == ([old] if old else [])


def test_a_full_disk_during_the_write(tmp_path, monkeypatch):
    "The device that is always full: bytes arrive in the buffer and fail when they are flushed."
    if not os.path.exists("/dev/full"): pytest.skip("no /dev/full")
    (tmp_path/"a.txt").write_text("old")
    with pytest.raises(OSError, match="No space left.*a.txt"):
        with atomic_path(tmp_path/"a.txt") as temporary:
            temporary.symlink_to("/dev/full")
            with open(temporary, "w") as file: file.write("new")
    assert {p.name: p.read_text() for p in tmp_path.iterdir()} == {"a.txt": "old"}


def test_an_error_that_says_all_itself_is_left_alone(tmp_path):
    for error in (OSError("no number, and so no place for a name"), FileNotFoundError(errno.ENOENT, "No such file or directory", "other.txt")):
        said = str(error)
        with pytest.raises(OSError) as caught:
            with atomic_path(tmp_path/"a.txt"): raise error
        assert str(caught.value) == said


def test_bytes_reach_the_disk_before_the_name(tmp_path, monkeypatch):
    steps, fsync, replace = [], os.fsync, os.replace
    def record_fsync(descriptor): steps.append("folder" if os.path.isdir(f"/proc/self/fd/{descriptor}") else "file"); fsync(descriptor)
    def record_replace(*args): steps.append("rename"); replace(*args)
    monkeypatch.setattr(os, "fsync", record_fsync); monkeypatch.setattr(os, "replace", record_replace)
    with atomic_path(tmp_path/"a") as temporary: temporary.write_text("x")
    assert steps == ["file", "rename", "folder"]


def test_a_folder_that_cannot_be_synced_is_fine(tmp_path, monkeypatch):
    real = os.fsync
    def fsync(descriptor):
        if os.path.isdir(f"/proc/self/fd/{descriptor}"): raise OSError(errno.EINVAL, "Invalid argument")
        real(descriptor)
    monkeypatch.setattr(os, "fsync", fsync)
    write_json(tmp_path/"a.json", 1)
    assert read_json(tmp_path/"a.json") == 1


def test_kill_keeps_the_old_file(tmp_path):
    "SIGKILL in the middle of the block: nothing can clean up, and still the old file is whole."
    (tmp_path/"a.txt").write_text("old")
    code = ("from zerolab.scene.paths import atomic_path; import time\n"
            f"with atomic_path({str(tmp_path/'a.txt')!r}) as t: t.write_text('half'); print('ready', flush=True); time.sleep(60)")
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)})
    assert process.stdout.readline() == b"ready\n"
    process.send_signal(signal.SIGKILL); process.wait(); process.stdout.close()
    assert (tmp_path/"a.txt").read_text() == "old"


def test_links_and_parents_and_suffixes(tmp_path):
    (tmp_path/"real.txt").write_text("old"); (tmp_path/"link.txt").symlink_to("real.txt")
    with atomic_path(tmp_path/"link.txt") as temporary: temporary.write_text("new")
    assert (tmp_path/"link.txt").is_symlink() and (tmp_path/"real.txt").read_text() == "new"
    with atomic_path(tmp_path/"deep"/"er"/"a.npy") as temporary:
        assert temporary.suffix == ".npy" and temporary.parent == (tmp_path/"deep"/"er").resolve()
        np.save(temporary, np.arange(3))
    assert np.load(tmp_path/"deep"/"er"/"a.npy").tolist() == [0, 1, 2]


def test_two_writers_do_not_meet(tmp_path):
    with atomic_path(tmp_path/"a") as first, atomic_path(tmp_path/"a") as second:
        assert first != second
        first.write_text("first"); second.write_text("second")
    assert (tmp_path/"a").read_text() == "first" and len(list(tmp_path.iterdir())) == 1


def test_json_of_arrays(tmp_path):
    write_json(tmp_path/"a.json", dict(a=np.float32(0.5), b=np.arange(2), c=torch.ones(2, 1), d=tmp_path, e=np.int64(3)))
    assert read_json(tmp_path/"a.json") == dict(a=0.5, b=[0, 1], c=[[1.0], [1.0]], d=str(tmp_path), e=3)
    with pytest.raises(TypeError, match="a set has no JSON form"): write_json(tmp_path/"b.json", {"x": {1}})
    assert not (tmp_path/"b.json").exists()


@pytest.mark.parametrize("data", [b"", b"{", b"\xff\xfe", b"[" * 100000, b"{'a': 1}"])
def test_bad_json_is_named(tmp_path, data):
    (tmp_path/"a.json").write_bytes(data)
    with pytest.raises(ValueError, match="a.json is no JSON"): read_json(tmp_path/"a.json")


def test_huge_json_is_refused_unread(tmp_path, monkeypatch):
    monkeypatch.setattr(paths, "_JSON_LIMIT", 10)
    (tmp_path/"a.json").write_text("[" + "1, "*10 + "1]")
    with pytest.raises(ValueError, match="more than the 10"): read_json(tmp_path/"a.json")


def test_roots(tmp_path, monkeypatch):
    monkeypatch.delenv("ZEROLAB_ROOT", raising=False); monkeypatch.delenv("ZEROLAB_RUN_DIR", raising=False)
    (tmp_path/"project"/"nbs"/"deep").mkdir(parents=True)
    (tmp_path/"project"/"nbs"/"settings.ini").write_text("[DEFAULT]\nlib_name = other\n")
    (tmp_path/"project"/"settings.ini").write_text("[DEFAULT]\nlib_name = zerolab\n")
    monkeypatch.chdir(tmp_path/"project"/"nbs"/"deep")
    assert root() == tmp_path/"project" and data_dir() == tmp_path/"project"/"data"
    assert run_dir() == tmp_path/"project"/"runs"/"scratch" and run_dir().is_dir()
    monkeypatch.setenv("ZEROLAB_RUN_DIR", str(tmp_path/"r")); assert run_dir() == tmp_path/"r"
    monkeypatch.setenv("ZEROLAB_ROOT", str(tmp_path)); assert root() == tmp_path.resolve()
    monkeypatch.setenv("ZEROLAB_ROOT", str(tmp_path/"gone"))
    with pytest.raises(FileNotFoundError, match="ZEROLAB_ROOT=.*gone is no folder"): root()


def test_outside_a_project_the_package_knows_its_own(tmp_path, monkeypatch):
    monkeypatch.delenv("ZEROLAB_ROOT", raising=False); monkeypatch.chdir(tmp_path)
    assert (root()/"settings.ini").exists()
    monkeypatch.setattr(paths, "_is_root", lambda folder: False)
    with pytest.raises(FileNotFoundError, match="no zerolab project at or above"): root()


def test_importing_zerolab_is_light():
    code = "import sys, zerolab; import zerolab.scene.paths; print([m for m in ('torch', 'vtk', 'numpy', 'trimesh') if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)})
    assert out.stdout.strip() == "[]"
