"""What the tests of sweeps share: notebooks that go wrong in every known way, drivers to kill, and a look for what was left behind."""
import json
import os
import secrets
import subprocess
import sys
import time
from pathlib import Path

import psutil
from nbformat.v4 import new_code_cell, new_notebook

CLI = [sys.executable, "-c", "import sys; from zerolab.jobs.cli import main; sys.exit(main())"]
REPOSITORY = Path(__file__).resolve().parents[1]


def write_notebook(path, *sources, parameters=None, **kernel):
    cells = [new_code_cell(source) for source in sources]
    if parameters is not None: cells.insert(0, new_code_cell(parameters, metadata={"tags": ["parameters"]}))
    path.write_text(json.dumps(new_notebook(cells=cells, metadata={"kernelspec": {"name": "python3", "display_name": "x"} | kernel})))
    return path


def command(*arguments, **options):
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)} | options.pop("env", {})
    return subprocess.Popen([*CLI, *map(str, arguments)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment, text=True, **options)


def wait_until(true, seconds=60, pause=0.05):
    deadline = time.monotonic() + seconds
    while not (value := true()):
        assert time.monotonic() < deadline, "it never came to that"
        time.sleep(pause)
    return value


class Marked:
    """An environment variable that everything started from now on inherits, so that nothing can hide."""
    def __init__(self, monkeypatch):
        self.mark = f"m{secrets.token_hex(8)}"
        monkeypatch.setenv("ZEROLAB_TEST_MARK", self.mark)

    def left(self):
        "Processes with the mark that live, this one apart."
        found = []
        for process in psutil.process_iter():
            try:
                if process.pid == os.getpid() or process.status() == psutil.STATUS_ZOMBIE: continue
                if process.environ().get("ZEROLAB_TEST_MARK") == self.mark: found.append(f"{process.pid} {' '.join(process.cmdline())[:120]}")
            except psutil.Error: pass
        return found

    def gone(self, seconds=20):
        deadline = time.monotonic() + seconds
        while (left := self.left()) and time.monotonic() < deadline: time.sleep(0.1)
        return left


# One notebook, many fates: each is what a cell does. `first` is true in a run's first attempt.
FATES = {
    "good": "pass",
    "raises": "1 / 0",
    "exits": "import sys; sys.exit(3)",
    "exits early": "import sys; sys.exit(0)",
    "memory": "import resource; resource.setrlimit(resource.RLIMIT_AS, (2 << 30, 2 << 30)); x = bytearray(4 << 30)",
    "too much": "x = bytearray(600 << 20)\nfor i in range(0, len(x), 4096): x[i] = 1\ntime.sleep(600)",
    "segfaults": "import ctypes; ctypes.string_at(0)",
    "killed": "os.kill(os.getpid(), 9)",
    "killed once": "if first: os.kill(os.getpid(), 9)",
    "worker killed once": "if first: os.kill(os.getppid(), 9); time.sleep(600)",
    "preempted once": ("""place = checkpoint_dir()/"step"
start = int(place.read_text()) if place.exists() else 0
try:
    for step in range(start, 20):
        if first and step == 7: os.kill(os.getppid(), 15); time.sleep(600)
        time.sleep(0.01)
finally: place.write_text(str(step))
_ = record(start=start, end=step + 1)"""),
    "hangs": "print('waiting'); time.sleep(600)",
    "deaf": "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN); signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT]); time.sleep(600)",
    "slow": "while True: print('.', end='', flush=True); time.sleep(0.2)",
    "disk": "import resource; resource.prlimit(os.getppid(), resource.RLIMIT_FSIZE, (60_000, 60_000)); print('y' * 200_000)",
    "unreadable": "pass",
    "cancelled": "(Path(os.environ['ZEROLAB_RUN_DIR'])/'cancel').touch(); time.sleep(600)",
    "leaves children": "import subprocess; [subprocess.Popen(['sleep', '600'], start_new_session=new) for new in (True, False)]; 1 / 0",
}
# How each has to end: status, cause, attempts. One retry is allowed. `limits` hold for these alone.
ENDS = {
    "good": ("done", "", 1), "raises": ("failed", "cell", 1), "exits": ("failed", "cell", 1), "exits early": ("done", "", 1),
    "memory": ("failed", "memory", 1), "too much": ("died", "memory", 1), "segfaults": ("died", "crash", 1), "killed": ("died", "killed", 2),
    "killed once": ("done", "", 2), "worker killed once": ("done", "", 2), "preempted once": ("done", "", 2), "hangs": ("hung", "", 1),
    "deaf": ("hung", "", 1), "slow": ("timeout", "", 1), "disk": ("failed", "disk", 1), "unreadable": ("failed", "cell", 1),
    "cancelled": ("cancelled", "", 1), "leaves children": ("failed", "cell", 1),
}
LIMITS = {"too much": {"memory": 0.4}, "hangs": {"hang": 3.}, "deaf": {"hang": 3.}, "slow": {"timeout": 8.}}


def plan_fates(folder, fates):
    "A sweep over fates, with its limits and its damage in place."
    from zerolab.jobs.run import Limits, write_request
    from zerolab.jobs.sweep import plan_sweep
    source = "".join(f"{'el' * (k > 0)}if fate == {fate!r}:\n" + "".join(f"    {line}\n" for line in code.splitlines())
                     for k, (fate, code) in enumerate(FATES.items()))
    imports = "import os, time\nfrom pathlib import Path\nfrom zerolab.jobs.run import checkpoint_dir, record\n"
    notebook = write_notebook(folder / "fates.ipynb", imports + "first = os.environ['ZEROLAB_ATTEMPT'] == '1'", source, "_ = record(finished=True)",
                              parameters="fate = 'good'")
    plan = plan_sweep(notebook, [{"fate": fate} for fate in fates], runs=folder / "runs")
    for fate, run, request in zip(fates, plan.folders, plan.requests):
        run.mkdir(parents=True)
        write_request(run, request, Limits(**LIMITS.get(fate, {})), plan.id, {"commit": None, "dirty": None, "diff": None, "environment": ""})
        if fate == "unreadable": (run / "in.ipynb").write_text("{ no json")
    return plan


def check_fates(plan, fates, states):
    "Each run says the truth, and its files are whole."
    told = {fate: (state["status"], state["cause"], state["attempt"]) for fate, state in zip(fates, states)}
    assert told == {fate: ENDS[fate] for fate in fates}
    for fate, folder, state in zip(fates, plan.folders, states):
        assert bool(state["error"]) == (state["status"] != "done"), (fate, state["error"])
        assert "\n" not in state["error"] and state["error"].startswith(state["status"] if state["status"] != "done" else "")
        for path in folder.rglob("*"):
            assert not path.name.startswith(".tmp"), path
            if path.suffix in (".json", ".ipynb") and (fate, path.name) != ("unreadable", "in.ipynb"): json.loads(path.read_text())
    metrics = {fate: json.loads((folder / "metrics.json").read_text()) for fate, folder in zip(fates, plan.folders)
               if (folder / "metrics.json").exists()}
    for fate in fates:
        if ENDS[fate][0] == "done" and fate != "exits early": assert metrics[fate]["finished"] is True, fate
    if "preempted once" in fates:
        assert (metrics["preempted once"]["start"], metrics["preempted once"]["end"]) == (7, 20), "it goes on from its checkpoint"


# Four notebooks among many go wrong, for good: how each has to end.
FAULTS = {"raises": ("failed", "cell"), "killed": ("died", "killed"), "hangs": ("hung", ""), "fills its disk": ("failed", "disk")}
FAULTY = """import os, resource, time
from zerolab.jobs.run import artifact
fault = faults.get(str(x))
if fault == "raises": 1 / 0
if fault == "killed": os.kill(os.getpid(), 9)
if fault == "hangs": time.sleep(3600)
if fault == "fills its disk":
    if not os.path.ismount(os.environ["ZEROLAB_RUN_DIR"]): resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))
    with open(artifact("big"), "wb", buffering=0) as file:
        while True: file.write(bytes(1 << 12))
time.sleep(seconds)
with open(folder + "/finished", "a") as file: file.write(f"{x}\\n")"""


class FaultySweep:
    """A sweep of `count` notebooks, four of which go wrong; the disk of one is a file system of 300 kB where this user may mount one."""
    def __init__(self, folder, count, seconds, hang):
        from zerolab.jobs.sweep import plan_sweep
        self.folder, self.count = folder, count
        faults = {str((2 * k + 1) * count // 8): fault for k, fault in enumerate(FAULTS)}
        notebook = write_notebook(folder / "many.ipynb", FAULTY, parameters="x = 0\nseconds = 0.0\nfolder = ''\nfaults = {}")
        common = {"seconds": float(seconds), "folder": str(folder), "faults": faults}
        self.plan = plan_sweep(notebook, [{"x": x, **common} for x in range(count)], runs=folder / "runs")
        self.places = {fault: int(x) for x, fault in faults.items()}
        (folder / "points.json").write_text(json.dumps([{"x": x} for x in range(count)]))
        self.command = ["sweep", notebook, "--points", folder / "points.json", "-p", "seconds", seconds, "-p", "folder", folder,
                        "-p", "faults", json.dumps(faults), "--runs", folder / "runs", "--workers", 2, "--retries", 1, "--hang", hang]
        self.small = self.plan.folders[self.places["fills its disk"]]
        self.small.mkdir(parents=True)
        self.mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", self.small], capture_output=True).returncode == 0

    def __enter__(self): return self

    def __exit__(self, *error):
        if self.mounted: subprocess.run(["umount", "--lazy", self.small], check=True)

    def ended(self): return sum(path.exists() and '"ended"' in path.read_text() for path in (run / "run.json" for run in self.plan.folders))

    def run(self, kill_at, patience=1200):
        "Start drivers and kill each with -9 when so many runs have ended; the last one has to finish. Returns how all runs stand."
        for number in kill_at:
            driver = command(*self.command)
            wait_until(lambda: self.ended() >= number, patience, 0.3)
            driver.kill()
            driver.communicate()
        driver = command(*self.command)
        said = driver.communicate(timeout=patience)[0]
        assert driver.returncode == 1 and f"{self.count - len(FAULTS)} done" in said.splitlines()[-1], said
        return self.plan.states()

    def check(self, states, kills=True):
        "The four say what happened, the others ran to their end exactly once. Returns how many were cut by a kill and made again."
        for fault, place in self.places.items(): assert (states[place]["status"], states[place]["cause"]) == FAULTS[fault], states[place]
        assert states[self.places["killed"]]["attempt"] >= (1 if kills else 2), "it may have been the machine: one more try, unless its driver is gone"
        others = [state for k, state in enumerate(states) if k not in self.places.values()]
        assert {state["status"] for state in others} == {"done"}
        cut = [earlier["status"] for state in others for earlier in state["earlier"]]
        assert set(cut) <= {"lost", "preempted"}, cut
        lines = (self.folder / "finished").read_text().split()
        assert set(map(int, lines)) == set(range(self.count)) - set(self.places.values())
        assert len(lines) - len(others) <= len(cut), "one that was cut may have been killed between its last line and its last word"
        return len(cut)
