"""Runs for real: small kernels, each case as a user would meet it."""
import ast
import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from hypothesis import given, settings, strategies as st
from nbformat.v4 import new_code_cell, new_notebook

from zerolab.jobs.run import (JobError, RunResult, _inject, artifact, check_parameters, claim_folder, commit_of, find_notebook,
                              notebook_parameters, read_notebook, record, run_notebook)

CLI = [sys.executable, "-c", "import sys; from zerolab.jobs.cli import main; sys.exit(main())"]
REPOSITORY = Path(__file__).resolve().parents[1]


def write_notebook(path, *sources, parameters=None, kernel="python3"):
    cells = [new_code_cell(source) for source in sources]
    if parameters is not None: cells.insert(0, new_code_cell(parameters, metadata={"tags": ["parameters"]}))
    path.write_text(json.dumps(new_notebook(cells=cells, metadata={"kernelspec": {"name": kernel, "display_name": kernel}})))
    return path


def command(*arguments, **kwargs):
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)} | kwargs.pop("env", {})
    return subprocess.Popen([*CLI, *map(str, arguments)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment, **kwargs)


def wait_for(path, process=None, seconds=40):
    deadline = time.monotonic() + seconds
    while not path.exists():
        assert time.monotonic() < deadline, f"{path} never came"
        assert process is None or process.poll() is None, process.communicate()
        time.sleep(0.05)


def gone(pid, seconds=10):
    deadline = time.monotonic() + seconds
    while psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
        if time.monotonic() > deadline: return False
        time.sleep(0.05)
    return True


def whole_files(folder):
    "Every JSON file of a run parses and no temporary file is left."
    for path in folder.iterdir():
        assert ".tmp" not in path.name, path
        if path.suffix in (".json", ".ipynb"): json.loads(path.read_text())


def printed(folder):
    cells = json.loads((folder / "out.ipynb").read_text())["cells"]
    return "".join("".join(output.get("text", "")) for cell in cells for output in cell.get("outputs", []))


def test_a_run_leaves_the_truth(tmp_path):
    """Parameters are data, streams are live and complete, interpreter and folder are the caller's, no kernelspec is needed."""
    hostile = "__import__('os').system('touch PWNED')\n\"\"\" + '\\' #é"
    notebook = write_notebook(
        tmp_path / "job.ipynb",
        "import os, sys, time\nprint(sys.executable)\nprint(os.getcwd())\nprint(repr(name))",
        "for i in range(3):\n    print(f'\\r{i}/2', end='', file=sys.stderr, flush=True)\n    time.sleep(0.3)\nprint(file=sys.stderr)",
        "from zerolab.jobs.run import record, artifact\nrecord(psnr=20)\nrecord(psnr=21.5, worst=float('inf'))\n"
        "artifact('splat/a.txt').write_text('x')",
        parameters="name = 'x'\nsteps = 3  # how many\nrate: float = 1", kernel="not-installed-anywhere")
    run = command("run", notebook, "-p", "name", hostile, "-p", "rate", "1e-3", "--out", tmp_path / "run", cwd=tmp_path,
                  env={"JUPYTER_PATH": "", "JUPYTER_DATA_DIR": str(tmp_path / "none"), "JUPYTER_PREFER_ENV_PATH": "0"})
    out, err = run.communicate(timeout=60)
    folder = tmp_path / "run"
    assert run.returncode == 0, err
    assert b"\r0/2\r1/2\r2/2\n" in err, "the bar must reach the terminal as it was drawn"
    assert out.decode().splitlines()[:3] == [sys.executable, str(tmp_path), repr(hostile)]
    assert out.decode().splitlines()[-1].endswith("run/report.html")
    assert not (tmp_path / "PWNED").exists()
    assert sorted(path.name for path in folder.iterdir()) == [
        "artifacts", "attempts", "heartbeat", "in.ipynb", "log.txt", "metrics.json", "out.ipynb", "report.html", "run.json", "spec.json"]
    assert json.loads((folder / "spec.json").read_text())["params"] == {"name": hostile, "steps": 3, "rate": 0.001}
    metrics = json.loads((folder / "metrics.json").read_text())
    assert (metrics["psnr"], metrics["worst"]) == (21.5, None) and metrics["seconds"] > 0
    spec = json.loads((folder / "run.json").read_text())
    assert spec["status"] == "done" and spec["notebook"] == str(notebook) and spec["ended"] >= spec["started"]
    assert set(spec["versions"]) == {"zerolab", "torch", "python"} and spec["machine"]["cores"] >= 1
    assert {"commit", "dirty"} <= set(spec)
    assert "2/2" in (folder / "log.txt").read_text() and repr(hostile) in (folder / "log.txt").read_text()
    assert "2/2\n" in printed(folder) and "1/2" not in printed(folder), "a stored bar shows its last state only"
    whole_files(folder)


def test_a_failing_cell_is_named(tmp_path, capsys):
    notebook = write_notebook(tmp_path / "bad.ipynb", "print('before')", "# why\nratio = 1 / 0\nprint('no')", "print('after')",
                              parameters="steps = 1")
    result = run_notebook(notebook, {"steps": 2}, out=tmp_path / "run")
    assert isinstance(result, RunResult) and not result.ok
    assert (result.status, result.cell) == ("failed", 4)
    assert result.error == "failed in cell [4] `ratio = 1 / 0`: ZeroDivisionError: division by zero"
    assert capsys.readouterr().out == "before\n"
    assert printed(tmp_path / "run") == "before\n"
    states = [cell["metadata"]["papermill"]["status"] for cell in json.loads((tmp_path / "run/out.ipynb").read_text())["cells"]]
    assert states == ["completed", "completed", "completed", "failed", "pending"]
    assert json.loads((tmp_path / "run/run.json").read_text())["error"] == result.error
    whole_files(tmp_path / "run")


def test_a_dead_kernel_is_no_failing_cell_and_takes_its_children_along(tmp_path):
    notebook = write_notebook(
        tmp_path / "dies.ipynb",
        "import os, signal, subprocess\nchild = subprocess.Popen(['sleep', '600'])\nopen(os.environ['ZEROLAB_RUN_DIR'] + '/child', 'w')"
        ".write(str(child.pid))", "os.kill(os.getpid(), signal.SIGKILL)")
    result = run_notebook(notebook, out=tmp_path / "run", echo=False)
    assert (result.status, result.cell) == ("died", 2)
    assert "SIGKILL" in result.error and "os.kill" in result.error
    assert gone(int((tmp_path / "run/child").read_text())), "the child outlived its kernel"
    whole_files(tmp_path / "run")


def test_a_notebook_that_leaves_its_kernel_has_died(tmp_path):
    """`exit()` ends IPython's loop from within a cell: no later cell has a kernel for long, and nothing waits for one. The cell after it may still be begun."""
    result = run_notebook(write_notebook(tmp_path / "leaves.ipynb", "exit()", "import time; time.sleep(1)", "print('never')"), out=tmp_path / "run", echo=False)
    assert result.status == "died" and result.cell in (2, 3) and result.seconds < 60


@pytest.mark.parametrize("number, code, status", [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "preempted")])
def test_an_interrupted_run_lets_the_cell_save_and_leaves_no_kernel(tmp_path, number, code, status):
    notebook = write_notebook(
        tmp_path / "long.ipynb", "import os, time\nfolder = os.environ['ZEROLAB_RUN_DIR']\nprint('started')",
        "open(folder + '/pid', 'w').write(str(os.getpid()))\ntry: time.sleep(60)\nfinally: open(folder + '/saved', 'w').write('x')",
        "print('never')")
    def deaf():   # as Ray starts its workers, and a shell in the background; all children inherit it
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    run = command("run", notebook, "--out", tmp_path / "run", preexec_fn=deaf if number == signal.SIGTERM else None)
    wait_for(tmp_path / "run/pid", run)
    time.sleep(0.2)
    run.send_signal(number)
    out, err = run.communicate(timeout=30)
    assert run.returncode == code, err
    assert (tmp_path / "run/saved").exists()
    assert printed(tmp_path / "run") == "started\n"
    assert f"{status} in cell [2]".encode() in err and b"Traceback" not in err
    assert gone(int((tmp_path / "run/pid").read_text()))
    assert json.loads((tmp_path / "run/run.json").read_text())["status"] == status
    whole_files(tmp_path / "run")


def test_a_timeout_ends_the_run(tmp_path):
    notebook = write_notebook(tmp_path / "slow.ipynb", "print('started', flush=True)", "import time\ntime.sleep(60)")
    result = run_notebook(notebook, out=tmp_path / "run", timeout=4, echo=False)
    assert result.status == "timeout" and result.seconds < 30
    assert "stopped after 4 s" in result.error


def test_a_killed_driver_leaves_a_readable_notebook_and_no_kernel(tmp_path):
    notebook = write_notebook(
        tmp_path / "long.ipynb", "import os, time\nprint('x' * 100)\ntime.sleep(2.1)",
        "open(os.environ['ZEROLAB_RUN_DIR'] + '/pid', 'w').write(str(os.getpid()))\ntime.sleep(60)")
    run = command("run", notebook, "--out", tmp_path / "run")
    wait_for(tmp_path / "run/pid", run)
    run.kill()
    run.communicate()
    assert gone(int((tmp_path / "run/pid").read_text()))
    assert "x" * 100 in printed(tmp_path / "run")


def test_a_full_disk_is_one_line_and_no_half_file(tmp_path):
    """The limit on file sizes stands for a disk that takes no more: writing beyond it fails in mid-file."""
    notebook = write_notebook(tmp_path / "big.ipynb", "print('y' * 200_000)", "print('done')")
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))
    run = command("run", notebook, "--out", tmp_path / "run", "--quiet", preexec_fn=limit)
    out, err = run.communicate(timeout=60)
    assert run.returncode == 1
    assert err.decode().splitlines()[0].startswith("zerolab: failed") and "cannot write into" in err.decode()
    assert "File too large" in err.decode() and "Traceback" not in err.decode()
    assert json.loads((tmp_path / "run/run.json").read_text())["status"] == "failed"
    whole_files(tmp_path / "run")


values = st.recursive(st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
                      lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3), max_leaves=6)


@settings(max_examples=60, deadline=None)
@given(values)
def test_any_value_arrives_as_itself(value):
    """What papermill writes for a value is a literal and means that value: nothing in it is ever executed."""
    book = new_notebook(cells=[new_code_cell("x = None", metadata={"tags": ["parameters"]})], metadata={"papermill": {}})
    checked = check_parameters({"x": value}, notebook_parameters(book))
    (assignment,) = ast.parse(_inject(book, checked).cells[1].source).body
    assert assignment.targets[0].id == "x" and ast.literal_eval(assignment.value) == value


def test_bad_requests_are_refused_before_anything_starts(tmp_path, monkeypatch):
    monkeypatch.setenv("ZEROLAB_ROOT", str(tmp_path))
    (tmp_path / "nbs/experiments").mkdir(parents=True)
    write_notebook(tmp_path / "nbs/experiments/train.ipynb", parameters="steps = 3\nfast = False")
    assert find_notebook("train") == find_notebook("train.ipynb")
    (tmp_path / "text.ipynb").write_text("no json")
    (tmp_path / "list.ipynb").write_text("[]")
    (tmp_path / "text.txt").write_text("")
    write_notebook(tmp_path / "broken.ipynb", parameters="steps = = 3")
    for name, params, said in [
        ("trian", {}, "did you mean train?"), (tmp_path / "text.txt", {}, "must end in .ipynb"), (tmp_path / "text.ipynb", {}, "no notebook"),
        (tmp_path / "list.ipynb", {}, "no notebook"), (tmp_path / "broken.ipynb", {}, "no Python"), ("train", {"stepz": 1}, "did you mean steps"),
        ("train", {"steps": "many"}, "whole number"), ("train", {"steps": True}, "whole number"), ("train", {"fast": 1}, "True or False"),
        ("train", {"steps": object()}, "is a object"), ("train", {"x" * 1000: 1}, "unknown parameter"),
    ]:
        with pytest.raises(JobError, match=said) as caught: run_notebook(name, params)
        assert len(str(caught.value)) < 300 and "\n" not in str(caught.value)
    with pytest.raises(JobError, match="positive"): run_notebook("train", timeout=0)
    with pytest.raises(JobError, match="not empty"): run_notebook("train", out=tmp_path)
    assert not (tmp_path / "runs").exists(), "a refused request leaves nothing"


def test_two_runs_of_one_second_get_two_folders(tmp_path, monkeypatch):
    monkeypatch.setenv("ZEROLAB_ROOT", str(tmp_path))
    folders = [claim_folder("job") for _ in range(3)]
    assert len(set(folders)) == 3 and all(folder.is_dir() and folder.parent.name == "job" for folder in folders)


def test_record_and_artifact_stay_inside_the_run(tmp_path, monkeypatch):
    import numpy as np
    monkeypatch.setenv("ZEROLAB_RUN_DIR", str(tmp_path))
    record(a=np.float32(1.5), b=[np.int64(2)], c=float("nan"))
    assert record(a=2) == {"a": 2, "b": [2], "c": None} == json.loads((tmp_path / "metrics.json").read_text())
    with pytest.raises(JobError): record(model=object())
    assert artifact("x/y.ply") == tmp_path / "artifacts/x/y.ply"
    for name in ["../x", "/etc/passwd", "", "a/../../b"]:
        with pytest.raises(JobError): artifact(name)


def test_the_commit_and_its_dirt(tmp_path):
    assert commit_of(tmp_path / "nowhere") == {"commit": None, "dirty": None}
    git = lambda *words: subprocess.run(["git", "-C", tmp_path, "-c", "user.name=t", "-c", "user.email=t@t", *words], check=True, capture_output=True)
    git("init")
    (tmp_path / "a").write_text("1")
    git("add", "a")
    git("commit", "-m", "first")
    assert len(commit_of(tmp_path)["commit"]) == 40 and commit_of(tmp_path)["dirty"] is False
    (tmp_path / "a").write_text("2")
    assert commit_of(tmp_path)["dirty"] is True


def test_a_read_notebook_is_ready_for_papermill(tmp_path):
    book = read_notebook(write_notebook(tmp_path / "a.ipynb", "1"))
    assert book.cells[0].metadata.tags == [] and book.metadata.papermill == {}
