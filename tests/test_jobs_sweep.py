"""Sweeps: every fate told truly, drivers killed, two at once, and nothing left behind. More engines and greater numbers: test_jobs_engines.py."""
import hashlib
import json
import os
import subprocess
import sys
from collections import Counter

import pytest
from hypothesis import given, settings, strategies as st

from sweeping import FATES, FaultySweep, Marked, check_fates, command, plan_fates, wait_until, write_notebook
from zerolab.jobs import cli
from zerolab.jobs.fleet import Local
from zerolab.jobs.folder import attempt_files, cancel, state_of, take_run
from zerolab.jobs.run import JobError, Limits, requests, write_request
from zerolab.jobs.sweep import Span, grid, missing, plan_sweep, random_points, read_points, run_sweep


@pytest.fixture(scope="module")
def launcher():
    "One nursery for all tests that do not kill it: its imports cost more than a run."
    with pytest.MonkeyPatch.context() as patch:
        marked = Marked(patch)
        with Local(4) as launcher: yield launcher
    assert not marked.gone(), "processes were left behind"


def test_every_fate_is_told_truly_on_this_machine(tmp_path, launcher):
    plan, said = plan_fates(tmp_path, list(FATES)), []
    states = run_sweep(plan, launcher, retries=1, pause=0.1, say=said.append)
    check_fates(plan, list(FATES), states)
    assert len([line for line in said if line.startswith("[")]) == len(FATES)
    assert [state["error"].count("SIGKILL") for state in states if state["cause"] == "killed"] == [1]


COUNTING = """import os, time
time.sleep(0.3)
with open(folder + "/finished", "a") as file: file.write(f"{x}\\n")"""


def sweep_of_six(tmp_path):
    notebook = write_notebook(tmp_path / "count.ipynb", COUNTING, parameters="x = 0\nfolder = '.'")
    return ["sweep", notebook, "-g", "x=0:6", "-p", "folder", tmp_path, "--runs", tmp_path / "runs", "--workers", "2"]


def done_runs(tmp_path): return [path for path in tmp_path.glob("runs/count/*/run.json") if json.loads(path.read_text())["status"] == "done"]


def check_counted(tmp_path, count):
    "Each point was run to its end exactly once: one attempt of each says `done`, and its earlier ones were cut."
    states = [json.loads(path.read_text()) for path in tmp_path.glob("runs/count/*/run.json")]
    assert Counter(state["status"] for state in states) == {"done": count}
    for state in states: assert all(earlier["status"] in ("lost", "preempted", "interrupted") for earlier in state["earlier"]), state
    lines = Counter((tmp_path / "finished").read_text().split())
    assert len(lines) == count
    again = sum(lines.values()) - count     # the side effect of a run that was cut between its last line and its last word
    assert again <= sum(len(state["earlier"]) for state in states)
    return states


def test_two_drivers_share_a_sweep_and_one_is_killed(tmp_path, monkeypatch):
    marked = Marked(monkeypatch)
    first, second = command(*sweep_of_six(tmp_path)), command(*sweep_of_six(tmp_path))
    wait_until(lambda: len(done_runs(tmp_path)) >= 2)
    first.kill()
    first.communicate()
    said = second.communicate(timeout=120)[0]
    assert second.returncode == 0, said
    check_counted(tmp_path, 6)
    third = command(*sweep_of_six(tmp_path))
    said = third.communicate(timeout=60)[0]
    assert third.returncode == 0 and said.count("6 done") == 2, said
    assert not marked.gone()


def test_four_of_twelve_go_wrong_and_the_driver_is_killed(tmp_path, monkeypatch):
    """Two hundred, and five kills: test_jobs_engines.py."""
    marked = Marked(monkeypatch)
    with FaultySweep(tmp_path, 12, seconds=0.2, hang=4) as sweep: sweep.check(sweep.run(kill_at=[4]))
    assert not marked.gone()


def test_ctrl_c_stops_a_sweep_and_leaves_nothing(tmp_path, monkeypatch):
    marked = Marked(monkeypatch)
    notebook = write_notebook(tmp_path / "long.ipynb", "import time\ntime.sleep(600)", parameters="x = 0")
    driver = command("sweep", notebook, "-g", "x=1,2,3", "--runs", tmp_path / "runs", "--workers", "2")
    folders = lambda: [path.parent for path in tmp_path.glob("runs/long/*/out.ipynb")]
    wait_until(lambda: len(folders()) == 2, 90)
    driver.send_signal(2)
    said = driver.communicate(timeout=60)[0]
    assert driver.returncode == 130 and "Traceback" not in said, said
    assert [state_of(folder)["status"] for folder in folders()] == ["preempted"] * 2
    assert not marked.gone()


def test_a_nursery_that_is_killed_is_replaced(tmp_path):
    notebook = write_notebook(tmp_path / "nap.ipynb", "import time\ntime.sleep(x)", parameters="x = 0.1")
    plan = plan_sweep(notebook, [{"x": 0.1 + 0.01 * k} for k in range(4)], runs=tmp_path / "runs")
    killed = []
    with Local(2) as launcher:
        def say(line):
            if not killed:
                killed.append(launcher.nursery.pid)
                os.kill(launcher.nursery.pid, 9)
        states = run_sweep(plan, launcher, pause=0.1, say=say)
    assert killed and [state["status"] for state in states] == ["done"] * 4


HOSTILE = ["__import__('os').system('touch PWNED')", "'; open('PWNED', 'w') #", '"""\n\\', "../../etc", "\0\x1b[31m", "{{x}} $(touch PWNED) `id`",
           "ä\u202e𝕏\ud7ff", "<script>alert(1)</script><img src=x onerror=alert(1)>", "\r\n]]>'\"; DROP TABLE runs; --", "/" * 300]
ECHO = ("import hashlib, json\nfrom zerolab.jobs.run import record\nprint(name[:1000])\n"
        "_ = record(digest=hashlib.sha256(json.dumps([name, names]).encode()).hexdigest())")


def check_echo(tmp_path, plan, points, stem):
    "Each value arrived as it was, nothing was executed, and every file lies where it belongs."
    for point, folder in zip(points, plan.folders):
        digest = hashlib.sha256(json.dumps([point["name"], point.get("names", [])]).encode()).hexdigest()
        assert json.loads((folder / "metrics.json").read_text())["digest"] == digest
        assert json.loads((folder / "spec.json").read_text())["params"]["name"] == point["name"]
        assert folder.parent == tmp_path / "runs" / stem and folder.name.isalnum()
        report = (folder / "report.html").read_text()
        assert "<script>alert" not in report and "<img src=x" not in report and len(report) < 200_000
        names = {"attempts", "heartbeat", "in.ipynb", "log.txt", "metrics.json", "out.ipynb", "report.html", "run.json", "spec.json"}
        assert {path.name for path in folder.iterdir()} == names
    assert {path.name for path in (tmp_path / "runs").iterdir()} == {stem}
    assert {path.name for path in (tmp_path / "runs" / stem).iterdir()} == {folder.name for folder in plan.folders} | {"sweeps"}
    assert [path.name for path in (tmp_path / "runs" / stem / "sweeps").iterdir()] == [f"{plan.id}.json"]
    assert not list(tmp_path.rglob("PWNED")) and not os.path.exists("PWNED")


def test_hostile_parameters_are_data(tmp_path, launcher):
    """In a sweep from Python, and in a notebook whose own name is hostile."""
    stem = "a b'; touch PWNED; $(touch PWNED) <script>"
    notebook = write_notebook(tmp_path / f"{stem}.ipynb", ECHO, parameters="name = ''\nnames = []")
    points = [{"name": "x" * 10_000_000}, {"name": HOSTILE[0], "names": HOSTILE}, {"name": HOSTILE[4], "names": HOSTILE}]
    plan, said = plan_sweep(notebook, points, runs=tmp_path / "runs"), []
    states = run_sweep(plan, launcher, say=said.append)
    assert [state["status"] for state in states] == ["done"] * 3
    check_echo(tmp_path, plan, points, stem)
    assert all(len(line) < 200 and line.isprintable() for line in said), "what a terminal shows is short and harmless"


def test_hostile_points_from_the_command_line_are_data(tmp_path, launcher, monkeypatch, capsys):
    """The same from a file of points and from the words of a command; names of parameters are checked before anything is made of them."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cli, "_launcher", lambda options: launcher)
    monkeypatch.setattr(launcher, "close", lambda: None)
    notebook = write_notebook(tmp_path / "echo.ipynb", ECHO, parameters="name = ''\nnames = []")
    points = [{"name": name, "names": []} for name in HOSTILE]
    (tmp_path / "points.json").write_text(json.dumps(points))
    sweep = ["sweep", str(notebook), "--points", str(tmp_path / "points.json"), "--runs", str(tmp_path / "runs")]
    assert cli.main([*sweep, "--dry-run"]) == 0 and cli.main(sweep) == 0
    said = capsys.readouterr().out
    assert all(line.isprintable() and len(line) < 300 for line in said.splitlines()) and f"{len(points)} done" in said
    check_echo(tmp_path, plan_sweep(notebook, points, runs=tmp_path / "runs"), points, "echo")
    for bad in ("__import__('os').system('touch PWNED')", "../../name", "name\n", "x" * 10_000):
        assert cli.main(["sweep", str(notebook), "-p", bad, "1", "--runs", str(tmp_path / "other")]) == 2
        assert cli.main(["sweep", str(notebook), "-g", f"{bad}=1,2", "--runs", str(tmp_path / "other")]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 2 and len(error) < 1000 and error.replace("\n", "").isprintable()
    assert not (tmp_path / "other").exists() and not list(tmp_path.rglob("PWNED"))


def test_fractions_of_cards_are_shared_and_come_back(tmp_path, monkeypatch):
    monkeypatch.setenv("ZEROLAB_GPUS", "0,1")
    monkeypatch.setenv("ZEROLAB_LEASES", str(tmp_path / "leases"))
    from zerolab.jobs.gpus import try_lease
    notebook = write_notebook(tmp_path / "card.ipynb", "import os, time\ntime.sleep(0.2)\nfrom zerolab.jobs.run import record\n"
                              "_ = record(card=os.environ['CUDA_VISIBLE_DEVICES'])\nif x == 1: os.kill(os.getppid(), 9); time.sleep(60)",
                              parameters="x = 0")
    plan = plan_sweep(notebook, [{"x": x} for x in range(4)], limits=Limits(gpus=0.5), runs=tmp_path / "runs")
    with Local(4) as launcher: states = run_sweep(plan, launcher, retries=0, say=lambda line: None)
    assert [state["status"] for state in states] == ["done", "lost", "done", "done"]
    cards = Counter(json.loads((folder / "metrics.json").read_text())["card"] for folder in plan.folders)
    assert cards == {"0": 2, "1": 2}, "four halves on two cards"
    lease = wait_until(lambda: try_lease(2), 20)   # the guard of the killed worker gives its half back
    lease.release()


def test_failing_runs_stop_a_sweep_that_says_so(tmp_path, launcher, monkeypatch):
    monkeypatch.setattr(launcher, "capacity", 1)
    notebook = write_notebook(tmp_path / "bad.ipynb", "1 / x", parameters="x = 0")
    sweep = ["sweep", str(notebook), "--runs", str(tmp_path / "runs"), "-g", "x=0,False,0.0,1"]
    notebook_2 = write_notebook(tmp_path / "bad2.ipynb", "1 / 0", parameters="y = 0")
    plan = plan_sweep(notebook_2, [{"y": y} for y in range(6)], runs=tmp_path / "runs")
    states = run_sweep(plan, launcher, max_fail=1, say=lambda line: None)
    assert Counter(state["status"] for state in states) == {"failed": 2, "queued": 4}
    states = run_sweep(plan, launcher, limit=1, say=lambda line: None)
    assert Counter(state["status"] for state in states) == {"failed": 3, "queued": 3}
    assert missing(states) == [3, 4, 5] and missing(states, only_failed=True) == [0, 1, 2]
    assert cli.main(sweep) == 2, "False and 0.0 are no whole numbers"


def test_a_run_is_taken_once(tmp_path):
    """Twelve processes want one attempt at the same moment: one gets it."""
    (tmp_path / "go").mkdir()
    script = ("import sys, time\nfrom pathlib import Path\nfrom zerolab.jobs.folder import take_run\n"
              "while time.time() < float(sys.argv[2]): pass\nsys.exit(0 if take_run(Path(sys.argv[1]), 1) else 3)")
    import time
    start = str(time.time() + 1.5)
    takers = [subprocess.Popen([sys.executable, "-c", script, str(tmp_path / "go"), start]) for _ in range(12)]
    assert sorted(taker.wait() for taker in takers) == [0] + [3] * 11


def test_a_worker_that_was_replaced_writes_nothing(tmp_path):
    """One that was suspended for an hour finds out, stops, and leaves the files to its successor."""
    notebook = write_notebook(tmp_path / "long.ipynb", "import time\ntime.sleep(600)")
    folder = tmp_path / "run"
    folder.mkdir()
    write_request(folder, requests(notebook, [{}])[0])
    worker = subprocess.Popen([sys.executable, "-m", "zerolab.jobs.worker", str(folder)])
    wait_until(lambda: (folder / "out.ipynb").exists())
    assert take_run(folder, 2) == 2
    (folder / "run.json").write_text('{"status": "running", "attempt": 2}')
    assert worker.wait(40) == 1
    assert json.loads((folder / "run.json").read_text()) == {"status": "running", "attempt": 2}
    assert len(attempt_files(folder)) == 2


def test_a_kernel_that_cannot_start_is_no_failing_cell(tmp_path, monkeypatch):
    from zerolab.jobs import kernel
    from zerolab.jobs.run import run_notebook
    monkeypatch.setattr(kernel, "START", "raise SystemExit('no ipykernel here')")
    result = run_notebook(write_notebook(tmp_path / "a.ipynb", "1"), out=tmp_path / "run", echo=False)
    assert (result.status, result.cause) == ("failed", "start") and "the kernel did not start" in result.error
    with pytest.raises(JobError, match="notebook in 'R'"): run_notebook(write_notebook(tmp_path / "r.ipynb", "1", language="R", name="ir"))


def test_cancel_and_dry_run(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("ZEROLAB_ROOT", str(tmp_path))
    notebook = write_notebook(tmp_path / "a.ipynb", "1", parameters="x = 0")
    assert cli.main(["sweep", str(notebook), "-g", "x=0:30", "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "30 runs of a: 30 queued" in said and "and 10 more" in said and not (tmp_path / "runs").exists(), "a dry run writes nothing"
    plan = plan_sweep(notebook, [{"x": 3}])
    plan.folders[0].mkdir(parents=True)
    write_request(plan.folders[0], plan.requests[0])
    assert cli.main(["cancel", plan.folders[0].name[:6]]) == 0 and "will not start" in capsys.readouterr().out
    assert state_of(plan.folders[0])["status"] == "cancelled"
    assert cli.main(["cancel", "no-such"]) == 2 and cli.main(["cancel", "../.."]) == 2
    cancel(plan.folders[0])


@pytest.mark.parametrize("arguments, said", [
    (["-g", "y=1"], "unknown parameter 'y'"), (["-g", "x"], "no axis"), (["-g", "x=a"], "whole number"), (["-g", "x=1..9"], "is a span"),
    (["-g", "x=1..0", "--random", "2"], "no values between"), (["-g", "x=1,2", "-z", "x=1", "-z", "s=1,2"], "equally long"),
    (["-g", "seed=1", "--seeds", "2"], "seeds are given twice"), (["--seeds", "2"], "unknown parameter 'seed'"), (["--gpus", "1.5"], "whole cards"),
    (["--points", "none.csv"], "No such file"), (["--points", "bad.json"], "need a list"), (["--timeout", "0"], "positive number of seconds"),
    (["-g", "x=0:4:0"], "step 0"), (["-g", "x=5:5"], "at least one point"),
])
def test_bad_sweeps_are_one_line(tmp_path, monkeypatch, capsys, arguments, said):
    monkeypatch.setenv("ZEROLAB_ROOT", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bad.json").write_text("3")
    notebook = write_notebook(tmp_path / "a.ipynb", "1", parameters="x = 0\ns = 't'")
    assert cli.main(["sweep", str(notebook), *arguments]) == 2
    err = capsys.readouterr().err
    assert said in err and err.startswith("zerolab: ") and err.count("\n") == 1
    assert not (tmp_path / "runs").exists()


def test_points_from_every_kind_of_file(tmp_path):
    import duckdb
    points = [{"x": 1, "name": "a,b\n\"c\""}, {"x": 2, "name": "ä"}]
    (tmp_path / "p.json").write_text(json.dumps(points))
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, points)) + "\n\n")
    (tmp_path / "p.csv").write_text('x,name\n1,"a,b\n""c"""\n2,ä\n', encoding="utf-8")
    duckdb.sql(f"COPY (SELECT * FROM read_json('{tmp_path}/p.json')) TO '{tmp_path}/p.parquet'")
    for kind in ("json", "jsonl", "parquet"): assert read_points(tmp_path / f"p.{kind}") == points
    assert read_points(tmp_path / "p.csv") == [{name: str(value) for name, value in point.items()} for point in points]
    for name, text in [("a.csv", "x,y\n1\n"), ("a.json", "{"), ("a.parquet", "no"), ("a.txt", "")]:
        (tmp_path / name).write_text(text)
        with pytest.raises(JobError, match=name): read_points(tmp_path / name)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.text(st.characters(exclude_characters="'\"[](){},", exclude_categories=["Cs"]), min_size=1), min_size=1))
def test_values_are_split_as_they_were_joined(values):
    assert cli.split_values(",".join(values)) == values
    assert cli.split_values(",".join(f"'{value},'" for value in values)) == [value + "," for value in values]


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 1000), st.integers(0, 1000), st.booleans(), st.integers(0, 99))
def test_draws_stay_within_their_span(low, width, log, seed):
    for point in random_points({"x": Span(low, low + width, log)}, 20, seed): assert low <= point["x"] <= low + width and isinstance(point["x"], int)
    span = Span(low / 7, (low + width) / 7, log)
    for point in random_points({"x": span}, 20, seed): assert span.low * 0.999 <= point["x"] <= span.high * 1.001


def test_a_run_cancelled_while_it_waits_is_not_started(tmp_path):
    class Busy:
        "Room for one; a run ends when the next look is taken, and by then somebody has cancelled the third."
        name, capacity = "busy", 1
        def __init__(self): self.started, self.out = [], []
        def submit(self, folder, number):
            self.started.append(folder.name)
            self.out.append(folder)
            (folder / "run.json").write_text(json.dumps({"status": "done", "attempt": 1, "cause": "", "error": "", "seconds": 1.}))
            (plan.folders[2] / "cancel").touch()
        def poll(self): return [self.out.pop()] if self.out else []
        def wait(self, seconds): pass
    plan = plan_sweep(write_notebook(tmp_path / "a.ipynb", "x", parameters="x = 1"), grid({"x": [1, 2, 3]}), runs=tmp_path / "runs")
    launcher, said = Busy(), []
    states = run_sweep(plan, launcher, say=said.append)
    assert [state["status"] for state in states] == ["done", "done", "cancelled"] and launcher.started == [folder.name for folder in plan.folders[:2]]
    assert len(said) == 3 and "cancelled" in said[2]
    (plan.folders[2] / "cancel").unlink()
    assert [state["status"] for state in run_sweep(plan, launcher, say=said.append)][:2] == ["done", "done"]
    assert launcher.started[2:] == [plan.folders[2].name], "a later sweep makes it"
