"""The slow tests of jobs, by `make test-engines`: all fates on every engine that is installed, nodes that die, a preemption, greater numbers.
What was measured is kept in data/results/jobs_engines.json.

Real SLURM: Debian's packages slurmctld, slurmd, slurm-client and munge, and root, so that daemons can be started here on loopback.
Real Ray: pip install 'zerolab[ray]'."""
import importlib.util
import json
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from sweeping import FATES, FAULTS, REPOSITORY, FaultySweep, Marked, check_fates, command, plan_fates, wait_until, write_notebook
from zerolab.jobs.run import commit_of, surroundings
from zerolab.jobs.sweep import plan_sweep, run_sweep
from zerolab.scene.paths import read_json, write_json

pytestmark = pytest.mark.slow
RESULTS = REPOSITORY / "data/results/jobs_engines.json"
needs_ray = pytest.mark.skipif(not importlib.util.find_spec("ray"), reason="Ray is not installed: pip install 'zerolab[ray]'")
needs_slurm = pytest.mark.skipif(not all(map(shutil.which, ("slurmctld", "slurmd", "munged", "sbatch"))) or os.geteuid() != 0,
                                 reason="SLURM's daemons are not installed, or this is not root: apt install slurmctld slurmd slurm-client munge")


def keep(**measured):
    "Add to the results on disk, with what they were measured on."
    machine = {name: value for name, value in surroundings()["machine"].items() if name != "name"}
    about = {"when": time.strftime("%Y-%m-%d"), **commit_of(REPOSITORY), **machine, "load": round(os.getloadavg()[1], 1)}
    write_json(RESULTS, (read_json(RESULTS) if RESULTS.exists() else {}) | {name: about | values for name, values in measured.items()})


def fates_on(launcher, tmp_path, retries=1):
    plan, started = plan_fates(tmp_path, list(FATES)), time.monotonic()
    states = run_sweep(plan, launcher, retries=retries, pause=0.1, say=print)
    check_fates(plan, list(FATES), states)
    assert {state["engine"] for state in states} == {launcher.name}
    keep(**{f"fates_{launcher.name}": {"fates": len(states), "told_truly": len(states), "seconds": round(time.monotonic() - started, 1)}})


def test_fates_through_submitit_without_slurm(tmp_path, monkeypatch):
    pytest.importorskip("submitit")
    from zerolab.jobs.slurm import Slurm
    marked = Marked(monkeypatch)
    plan = plan_fates(tmp_path, list(FATES))
    with Slurm(4, folder=tmp_path / "slurm", cluster="local") as launcher: states = run_sweep(plan, launcher, retries=1, pause=0.1, say=print)
    check_fates(plan, list(FATES), states)
    assert not marked.gone()


# ---- Ray

@pytest.fixture
def ray_here(monkeypatch, tmp_path):
    "Environment of a Ray cluster that is nobody else's."
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN", "f" * 64)
    monkeypatch.setenv("RAY_TMPDIR", f"/tmp/zlray{os.getpid()}")
    yield
    import ray
    ray.shutdown()
    shutil.rmtree(f"/tmp/zlray{os.getpid()}", ignore_errors=True)


@needs_ray
def test_fates_on_ray(tmp_path, ray_here, monkeypatch):
    from zerolab.jobs.ray import RayCluster
    marked = Marked(monkeypatch)
    with RayCluster(4) as launcher: fates_on(launcher, tmp_path)
    assert not marked.gone(40)


def start_ray_node(log, *words):
    """A node of a cluster, once it is up. Ray gives a node 30 seconds, and its agent 15 of them, which a busy machine may need more often than once."""
    command = [sys.executable, "-c", "from ray.scripts.scripts import main; main()", "start", "--num-cpus=2", "--block", "--disable-usage-stats", *words]
    for _ in range(3):
        with open(log, "wb") as file: node = subprocess.Popen(command, stdout=file, stderr=file, start_new_session=True)
        wait_until(lambda: "Ray runtime started" in log.read_text() or node.poll() is not None, 240)
        if node.poll() is None: return node
    raise AssertionError(f"no node after three tries: {log.read_text()[-500:]}")


@needs_ray
def test_a_ray_node_that_dies_gives_its_runs_to_the_other(tmp_path, ray_here, monkeypatch):
    from zerolab.jobs.ray import RayCluster
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    nodes = []
    try:
        nodes.append(start_ray_node(tmp_path / "head.log", "--head", f"--port={port}", "--node-ip-address=127.0.0.1", "--include-dashboard=false"))
        nodes.append(start_ray_node(tmp_path / "second.log", f"--address=127.0.0.1:{port}", "--node-ip-address=127.0.0.2"))
        notebook = write_notebook(tmp_path / "nap.ipynb", "import time\ntime.sleep(4)", parameters="x = 0")
        plan = plan_sweep(notebook, [{"x": x} for x in range(10)], runs=tmp_path / "runs")
        with RayCluster(4, address=f"127.0.0.1:{port}") as launcher:
            wait_until(lambda: len([node for node in launcher.ray.nodes() if node["Alive"]]) == 2, 180)
            killed = []
            def say(line):
                print(line)
                if not killed:
                    killed.append(time.monotonic())
                    os.killpg(nodes[1].pid, signal.SIGKILL)
            states = run_sweep(plan, launcher, retries=3, pause=0.5, say=say)
        assert [state["status"] for state in states] == ["done"] * 10
        cut = [state for state in states if state["attempt"] > 1]
        assert cut and all(state["earlier"][0]["status"] in ("lost", "preempted") for state in cut)
        keep(ray_node_killed={"runs": 10, "done": 10, "made_again": len(cut)})
    finally:
        for node in nodes:
            try: os.killpg(node.pid, signal.SIGKILL)
            except ProcessLookupError: pass
            node.wait()


# ---- SLURM

CONF = """ClusterName=zerolab
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort=16817
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CredType=cred/munge
SlurmUser=root
StateSaveLocation={folder}/state
SlurmctldPidFile={folder}/slurmctld.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmdLogFile={folder}/slurmd.%n.log
SlurmdSpoolDir={folder}/spool.%n
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
MpiDefault=none
ReturnToService=2
JobRequeue=1
KillWait=20
SchedulerParameters=batch_sched_delay=1,sched_interval=5,bf_interval=5
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmdParameters=config_overrides
NodeName=one NodeHostname={host} NodeAddr=127.0.0.1 Port=16821 CPUs=4 RealMemory=16000 State=UNKNOWN
NodeName=two NodeHostname={host} NodeAddr=127.0.0.1 Port=16822 CPUs=4 RealMemory=16000 State=UNKNOWN
PartitionName=main Nodes=one,two Default=YES MaxTime=60 State=UP PriorityTier=1 PreemptMode=REQUEUE GraceTime=20
PartitionName=urgent Nodes=one,two MaxTime=60 State=UP PriorityTier=10 PreemptMode=OFF
"""


@pytest.fixture(scope="module")
def slurm():
    "A cluster of two nodes on loopback; both are this machine."
    folder, daemons = Path(f"/tmp/zlslurm{os.getpid()}"), []
    for name in ("state", "spool.one", "spool.two"): (folder / name).mkdir(parents=True)
    folder.chmod(0o755)
    (folder / "munge.key").write_bytes(os.urandom(128))
    (folder / "munge.key").chmod(0o600)
    host = socket.gethostname().split(".")[0]
    (folder / "slurm.conf").write_text(CONF.format(folder=folder, host=host))
    before = os.environ.get("SLURM_CONF")
    os.environ["SLURM_CONF"] = str(folder / "slurm.conf")
    def start(*words):
        log = open(folder / f"{words[0]}{len(daemons)}.out", "wb")
        daemons.append(subprocess.Popen(words, stdout=log, stderr=log, start_new_session=True))
    try:
        start("munged", "--foreground", "--force", f"--key-file={folder}/munge.key", f"--socket={folder}/munge.socket",
              f"--pid-file={folder}/munged.pid", f"--log-file={folder}/munged.log", f"--seed-file={folder}/munged.seed")
        wait_until(lambda: (folder / "munge.socket").exists(), 30)
        start("slurmctld", "-D", "-f", str(folder / "slurm.conf"))
        for node in ("one", "two"): start("slurmd", "-D", "-N", node, "-f", str(folder / "slurm.conf"))
        idle = lambda: subprocess.run(["sinfo", "-h", "-p", "main", "-o", "%T %D"], capture_output=True, text=True).stdout.strip()
        wait_until(lambda: idle() == "idle 2", 90)
        yield folder
    finally:
        subprocess.run(["scancel", "--user=root", "--full"], capture_output=True)
        time.sleep(1)
        for daemon in reversed(daemons):
            daemon.terminate()
            try: daemon.wait(20)
            except subprocess.TimeoutExpired: os.killpg(daemon.pid, signal.SIGKILL)
        if before is None: os.environ.pop("SLURM_CONF")
        else: os.environ["SLURM_CONF"] = before
        if "ZEROLAB_KEEP" not in os.environ: shutil.rmtree(folder, ignore_errors=True)


@needs_slurm
def test_fates_on_slurm(tmp_path, slurm, monkeypatch):
    from zerolab.jobs.slurm import Slurm
    marked = Marked(monkeypatch)
    with Slurm(6, folder=tmp_path / "slurm") as launcher: fates_on(launcher, tmp_path)
    assert not marked.gone(40)


@needs_slurm
def test_a_run_that_slurm_preempts_goes_on_from_its_checkpoint(tmp_path, slurm):
    """Somebody with a better right takes both nodes; SLURM sends SIGTERM to every process of ours, and starts us again later."""
    from zerolab.jobs.slurm import Slurm
    notebook = write_notebook(tmp_path / "train.ipynb", """import time
from zerolab.jobs.run import checkpoint_dir, record
place = checkpoint_dir()/"step"
start = int(place.read_text()) if place.exists() else 0
step = start
try:
    for step in range(start, 40):
        print(step, flush=True)
        time.sleep(0.5)
except KeyboardInterrupt:
    place.write_text(str(step))
    raise
_ = record(start=start, end=step)""", parameters="x = 0")
    plan, preempted = plan_sweep(notebook, [{"x": 0}], runs=tmp_path / "runs"), []
    with Slurm(1, folder=tmp_path / "slurm") as launcher:
        poll = launcher.poll
        def poll_and_preempt():
            if not preempted and (plan.folders[0] / "log.txt").exists() and (plan.folders[0] / "log.txt").read_text().count("\n") >= 5:
                urgent = ["sbatch", "-p", "urgent", "--exclusive", "-N1", "-o", "/dev/null", "--wrap", "sleep 5"]
                preempted.extend(subprocess.run(urgent).returncode for _ in range(2))
            return poll()
        launcher.poll = poll_and_preempt
        states = run_sweep(plan, launcher, retries=3, pause=1., say=print)
    assert preempted == [0, 0]
    assert states[0]["status"] == "done" and [earlier["status"] for earlier in states[0]["earlier"]] == ["preempted"], states[0]
    metrics = json.loads((plan.folders[0] / "metrics.json").read_text())
    assert metrics["start"] >= 4 and metrics["end"] == 39
    keep(slurm_preempted={"steps": 40, "went_on_at": metrics["start"], "attempts": states[0]["attempt"]})


# ---- Greater numbers

def test_two_hundred_notebooks_four_faults_five_killed_drivers(tmp_path, monkeypatch):
    """Four runs go wrong and say how, the others finish, and each runs to completion once, though the driver is killed five times half-way."""
    marked, count, started = Marked(monkeypatch), int(os.environ.get("ZEROLAB_TEST_RUNS", 200)), time.monotonic()
    with FaultySweep(tmp_path, count, seconds=2, hang=20) as sweep:
        states = sweep.run(kill_at=[count * k // 20 for k in (8, 9, 10, 11, 12)], patience=3600)
        again, mounted = sweep.check(states), sweep.mounted
    assert not marked.gone()
    keep(two_hundred={"notebooks": count, "seconds_each": 2, "workers": 2, "drivers_killed": 5, "cut_and_made_again": again,
                      "done_once": count - len(FAULTS), "faults_told_truly": len(FAULTS), "full_disk_was_real": mounted,
                      "seconds": round(time.monotonic() - started)})


PAPERMILL = """import sys, os
from concurrent.futures import ProcessPoolExecutor
import papermill
def one(k): papermill.execute_notebook(sys.argv[1], f"{sys.argv[2]}/{k}.ipynb", {"x": k}, progress_bar=False)
if __name__ == "__main__":
    with ProcessPoolExecutor(2) as pool: list(pool.map(one, range(int(sys.argv[3]))))"""


def test_overhead_is_no_more_than_papermills(tmp_path):
    """Two-second notebooks, ours with two workers and plain papermill's in two warm processes, by turns; start-up included. What each needs beyond
    the notebooks' own two seconds is compared, and the processor time of all its processes."""
    each, rounds = int(os.environ.get("ZEROLAB_TEST_RUNS", 24)) // 2, 2
    notebook = write_notebook(tmp_path / "two.ipynb", "import time\ntime.sleep(2)\nprint(x)", parameters="x = 0", language="python")
    (tmp_path / "plain.py").write_text(PAPERMILL)
    wall, work = {"zerolab": 0., "papermill": 0.}, {"zerolab": 0., "papermill": 0.}
    def timed(name, process):
        started, before = time.monotonic(), resource.getrusage(resource.RUSAGE_CHILDREN)
        said = process().communicate()[0]
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        wall[name] += time.monotonic() - started
        work[name] += after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        return said
    for turn in range(rounds):
        out = tmp_path / f"plain{turn}"
        out.mkdir()
        plain = [sys.executable, tmp_path / "plain.py", notebook, out, str(each)]
        timed("papermill", lambda: subprocess.Popen(plain, stdout=subprocess.PIPE, stderr=subprocess.STDOUT))
        assert len(list(out.iterdir())) == each
        sweep = ["sweep", notebook, "-g", f"x={turn * each}:{(turn + 1) * each}", "--runs", tmp_path / "runs", "--workers", "2"]
        said = timed("zerolab", lambda: command(*sweep))
        assert f"{each} done" in said.splitlines()[-1], said
    overhead = {name: 2 * value / (rounds * each) - 2 for name, value in wall.items()}   # worker seconds for each notebook beyond its own two
    busy = {name: value / (rounds * each) for name, value in work.items()}
    keep(overhead={"notebooks": rounds * each, "workers": 2, **{f"{name}_seconds_each": round(value, 2) for name, value in overhead.items()},
                   "ratio": round(overhead["zerolab"] / overhead["papermill"], 3),
                   **{f"{name}_processor_seconds_each": round(value, 2) for name, value in busy.items()}})
    assert overhead["zerolab"] <= overhead["papermill"] and busy["zerolab"] <= busy["papermill"], (overhead, busy)
