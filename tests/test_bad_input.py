"""What can go wrong for a user, all in one place: one clear line that names the file or the value, and nothing half-written.

Each case is held in depth elsewhere; here each is met once, through the public call or the command line.

| case              | in depth                                                                                                     |
|-------------------|--------------------------------------------------------------------------------------------------------------|
| missing file      | test_jobs_cli (notebooks, lists of names), test_data_scans (scans), test_scene_views (pictures)              |
| NaN camera        | test_scene_cameras (JSON, batches)                                                                           |
| singular K        | test_scene_cameras (COLMAP)                                                                                  |
| zero-area image   | test_scene_cameras (sizes, JSON)                                                                             |
| truncated ply     | test_scene_gaussians (headers, bodies, fuzz)                                                                 |
| truncated glb     | test_data_scans (seven cuts, flipped bytes)                                                                  |
| truncated tar     | test_data_shards (every cut, flipped bytes, damaged index)                                                   |
| unknown parameter | test_jobs_cli, test_jobs_run                                                                                 |
| full disk         | test_scene_paths (every step of a write), test_data_shards, test_train_loop, test_jobs_run, test_lrm_model   |
| Ctrl-C            | test_scene_paths, test_train_loop, test_jobs_run; `zerolab make` here                                        |
"""
import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from nbformat.v4 import new_code_cell, new_notebook

from faults import file_size_limit
from zerolab.data.make import make_zeroverse
from zerolab.data.scans import load_mesh
from zerolab.data.shards import ShardDataset, write_shards
from zerolab.lrm.evaluate import scan_items
from zerolab.lrm.model import load_lrm
from zerolab.scene.cameras import Cameras, gso_inputs, load_cameras, save_cameras
from zerolab.scene.gaussians import Gaussians, load_ply, save_ply
from zerolab.scene.views import Views, load_views

CLI = [sys.executable, "-c", "import sys; from zerolab.jobs.cli import main; sys.exit(main())"]
REPOSITORY = Path(__file__).resolve().parents[1]


def some_gaussians(count=20):
    return Gaussians(torch.zeros(count, 3), torch.ones(count, 4), torch.ones(count, 3), torch.ones(count)/2, torch.zeros(count, 1, 3))


def camera_file(folder, **changes):
    "A camera file whose third camera is wrong."
    save_cameras(gso_inputs(4), folder/"opencv_cameras.json")
    content = json.loads((folder/"opencv_cameras.json").read_text())
    content["frames"][2] |= changes
    (folder/"opencv_cameras.json").write_text(json.dumps(content))
    return folder/"opencv_cameras.json"


def halved(path):
    path.write_bytes(path.read_bytes()[:path.stat().st_size//2])
    return path


def cut_ply(folder):
    save_ply(some_gaussians(), folder/"a.ply")
    return halved(folder/"a.ply")


def cut_glb(folder):
    import trimesh
    trimesh.creation.box().export(folder/"cup.glb")
    return halved(folder/"cup.glb")


def cut_tar(folder):
    views = Views(torch.randint(0, 256, (3, 16, 16, 4), dtype=torch.uint8), gso_inputs(4, size=(16, 16))[:3])
    write_shards([views], folder, samples_per_shard=1)
    halved(next(folder.glob("*.tar")))
    return folder


def singular():
    K = gso_inputs(4).K.clone()
    K[2, 1, 1] = 0
    return Cameras(K, gso_inputs(4).w2c, (64, 64))


# name -> (what the user does in a folder, what the line must name)
CASES = {
    "missing cameras": (lambda folder: load_cameras(folder/"gone.json"), "gone.json"),
    "missing splat": (lambda folder: load_ply(folder/"gone.ply"), "gone.ply"),
    "missing scan": (lambda folder: load_mesh(folder/"gone.glb"), "gone.glb"),
    "missing scans": (lambda folder: scan_items(folder/"gone"), "gone"),
    "missing views": (lambda folder: load_views(folder/"gone"), "gone"),
    "missing shards": (lambda folder: ShardDataset(folder/"gone"), "gone"),
    "missing model": (lambda folder: load_lrm(folder/"gone"), "gone"),
    "NaN camera": (lambda folder: load_cameras(camera_file(folder, cx=float("nan"))), "[2]"),
    "NaN pose": (lambda folder: Cameras(gso_inputs(4).K, gso_inputs(4).w2c*float("nan"), (64, 64)), "w2c"),
    "singular K in a file": (lambda folder: load_cameras(camera_file(folder, fx=0)), "opencv_cameras.json"),
    "singular K": (lambda folder: singular(), "K"),
    "zero-area image in a file": (lambda folder: load_cameras(camera_file(folder, w=0)), "opencv_cameras.json"),
    "zero-area image": (lambda folder: gso_inputs(4, size=(0, 64)), "(0, 64)"),
    "zero-area views": (lambda folder: Views(torch.zeros(4, 0, 64, 4, dtype=torch.uint8), gso_inputs(4)), "0"),
    "truncated ply": (lambda folder: load_ply(cut_ply(folder)), "a.ply"),
    "truncated glb": (lambda folder: load_mesh(cut_glb(folder)), "cup.glb"),
    "truncated glb among scans": (lambda folder: scan_items(cut_glb(folder).parent), "cup.glb"),
    "truncated tar": (lambda folder: ShardDataset(cut_tar(folder))[0], ".tar"),
}


@pytest.mark.parametrize("name", CASES)
def test_a_call_says_one_line_that_names_the_culprit(tmp_path, name):
    call, named = CASES[name]
    with pytest.raises((ValueError, OSError)) as caught: call(tmp_path)
    message = str(caught.value)
    assert named in message and "\n" not in message and 15 < len(message) < 400 + len(str(tmp_path)), message
    assert not [path for path in tmp_path.rglob("*") if "tmp-" in path.name]


# ---- the command line


def command(*arguments, **options):
    return subprocess.Popen([*CLI, *map(str, arguments)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
                            env=os.environ | {"PYTHONPATH": str(REPOSITORY)}, **options)


def said_by(process):
    "What a finished command said, without its progress bar."
    out, err = process.communicate(timeout=120)
    assert "Traceback" not in err, err
    return [line for line in err.replace("\r", "\n").splitlines() if line.startswith("zerolab: ")], out + err


def job(folder, *sources):
    cells = [new_code_cell("steps = 3", metadata={"tags": ["parameters"]}), *map(new_code_cell, sources)]
    (folder/"job.ipynb").write_text(json.dumps(new_notebook(cells=cells)))
    return folder/"job.ipynb"


@pytest.mark.parametrize("arguments, named", [(["run", "gone.ipynb"], "gone.ipynb"), (["run", "job.ipynb", "-p", "stepz", "3"], "stepz"),
                                              (["download-gso", ".", "--names", "gone.txt"], "gone.txt")])
def test_a_refused_command_is_one_line_and_leaves_nothing(tmp_path, arguments, named):
    job(tmp_path)
    process = command(*arguments, cwd=tmp_path)
    lines, everything = said_by(process)
    assert process.returncode == 2 and len(lines) == 1 and named in lines[0] and everything.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["job.ipynb"]


def test_a_job_that_meets_a_truncated_splat_names_cell_and_file(tmp_path):
    save_ply(some_gaussians(), tmp_path/"cup.ply")
    halved(tmp_path/"cup.ply")
    source = f"from zerolab.scene.gaussians import load_ply\nload_ply({str(tmp_path/'cup.ply')!r})"
    process = command("run", job(tmp_path, source), "--out", tmp_path/"run")
    lines, _ = said_by(process)
    assert process.returncode == 1 and len(lines) == 2, lines
    assert "cell [2]" in lines[0] and "cup.ply" in lines[0] and "truncated" in lines[0] and "run" in lines[1]
    assert not [path for path in (tmp_path/"run").iterdir() if "tmp-" in path.name]


MAKE = ("--views", 2, "--size", 16, "--workers", 1)


def test_a_full_disk_under_make_is_one_line_and_leaves_no_shard(tmp_path):
    whole = make_zeroverse(tmp_path/"whole", range(1), views=2, size=16, progress=False)   # compiles what is not compiled yet, too
    limit = next(whole.glob("*.tar")).stat().st_size - 100
    process = command("make", tmp_path/"full", "--objects", 1, *MAKE, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)))
    lines, everything = said_by(process)
    assert process.returncode == 2 and len(lines) == 1 and ".tar: " in lines[0] and "too large" in lines[0], everything
    assert [path.name for path in (tmp_path/"full").iterdir()] == ["dataset.json"]


def test_a_full_disk_names_the_file(tmp_path):
    views = Views(torch.randint(0, 256, (3, 16, 16, 4), dtype=torch.uint8), gso_inputs(4, size=(16, 16))[:3])
    with file_size_limit(600), pytest.raises(OSError) as caught: write_shards([views], tmp_path)
    assert str(tmp_path) in str(caught.value)


@pytest.mark.parametrize("workers", [1, 2])   # two are still importing when the signal comes
def test_ctrl_c_under_make_is_one_line_and_leaves_no_half_shard(tmp_path, workers):
    process = command("make", tmp_path/"d", "--objects", 256, *MAKE[:-1], workers)
    deadline = time.monotonic() + 60
    while not (tmp_path/"d/dataset.json").exists() and process.poll() is None and time.monotonic() < deadline: time.sleep(0.02)
    time.sleep(0.5)
    os.killpg(process.pid, signal.SIGINT)                 # a terminal sends it to the whole group
    lines, everything = said_by(process)
    assert process.returncode == 130 and lines == ["zerolab: stopped"], everything
    assert [path.name for path in (tmp_path/"d").iterdir()] == ["dataset.json"]


def test_make_refuses_a_file_in_place_of_a_folder(tmp_path):
    (tmp_path/"d").write_text("mine")
    process = command("make", tmp_path/"d", "--objects", 1, *MAKE)
    lines, everything = said_by(process)
    assert process.returncode == 2 and len(lines) == 1 and str(tmp_path/"d") in lines[0], everything
    assert (tmp_path/"d").read_text() == "mine"
