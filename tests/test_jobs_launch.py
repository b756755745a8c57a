"""Ranks that train together, started from a notebook: what they return, how they fail, and that they go when the kernel goes."""
import json
import os

import psutil
import pytest

from sweeping import Marked, wait_until, write_notebook
from zerolab.jobs.launch import launch

FOREVER = """import os, time
import torch.distributed as dist
def wait(folder):
    open(f"{folder}/{dist.get_rank()}", "w").write(str(os.getpid()))
    try: time.sleep(600)
    finally: open(f"{folder}/saved{dist.get_rank()}", "w").write("x")
def fail(rank):
    if dist.get_rank() == rank: raise ZeroDivisionError("on purpose")
    time.sleep(600)
"""


@pytest.fixture
def functions(tmp_path, monkeypatch):
    "A module that ranks can import."
    (tmp_path / "waiting.py").write_text(FOREVER)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


def test_a_rank_that_fails_ends_all_and_is_named(functions, monkeypatch, capsys):
    marked = Marked(monkeypatch)
    with pytest.raises(RuntimeError, match="rank 1 of 2: ZeroDivisionError: on purpose"): launch("waiting:fail", 2, {"rank": 1})
    assert not marked.gone()


def test_ranks_die_with_the_kernel_that_is_killed(functions, monkeypatch):
    """Under a run, whose guard would find them, and without it, where the chain of promises must do."""
    import subprocess
    import sys
    marked = Marked(monkeypatch)
    code = f"from zerolab.jobs.launch import launch\nlaunch('waiting:wait', 2, {{'folder': {str(functions)!r}}})"
    alone = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    ranks = wait_until(lambda: sorted(path for path in functions.iterdir() if path.name in ("0", "1"))[1:] and functions, 120)
    pids = wait_until(lambda: [int(text) for text in ((ranks / name).read_text() for name in ("0", "1")) if text][1:] and
                      [int((ranks / name).read_text()) for name in ("0", "1")])
    assert all(psutil.pid_exists(pid) for pid in pids)
    alone.kill()
    alone.wait()
    assert not marked.gone()
    assert not (functions / "saved0").exists(), "killed, not asked"


@pytest.mark.slow
def test_ranks_save_when_their_run_is_sent_away(functions, monkeypatch):
    from zerolab.jobs.fleet import Local
    from zerolab.jobs.folder import state_of
    from zerolab.jobs.sweep import plan_sweep, write_plan
    marked = Marked(monkeypatch)
    notebook = write_notebook(functions / "train.ipynb", "from zerolab.jobs.launch import launch",
                              f"launch('waiting:wait', 2, {{'folder': {str(functions)!r}}})", "print('never')")
    plan = plan_sweep(notebook, [{}], runs=functions / "runs")
    write_plan(plan)
    with Local(1) as launcher:
        launcher.submit(plan.folders[0], 1)
        wait_until(lambda: launcher.poll() or all((functions / name).exists() for name in ("0", "1")), 180)
    assert state_of(plan.folders[0])["status"] == "preempted"
    assert (functions / "saved0").exists() and (functions / "saved1").exists()
    assert json.loads((plan.folders[0] / "run.json").read_text())["cell"] == 2
    assert not marked.gone()
