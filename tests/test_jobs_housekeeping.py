"""`zerolab runs` and its verbs; what may be removed; copies for other trackers."""
import json
import sys
import types

import pytest

from test_jobs_runs import write_run
from zerolab.jobs import cli, exporters
from zerolab.jobs.exporters import TRACKERS, push
from zerolab.jobs.housekeeping import find_run, plan_pruning, prune
from zerolab.jobs.run import JobError
from zerolab.jobs.runs import find_runs


def going(root, where=None): return [run.folder for run in plan_pruning(root, where) if run.goes]


@pytest.mark.parametrize("named", ["{root}/train/aaaa11/ckpt/step-1.safetensors", "runs/train/aaaa11", "train/aaaa11/model", "hub:cache/aaaa11/x",
                                   "runs/train/", "./runs/../runs/train/aaaa11"])
def test_what_another_run_uses_stays(tmp_path, named):
    root = tmp_path/"runs"
    write_run(root/"train"/"aaaa11", {"recipe": "paper"}, status="failed")
    user = write_run(root/"evaluate"/"bbbb22", {"deep": [{"checkpoint": named.format(root=root)}]})
    assert going(root) == []
    assert going(root, "true") == ["evaluate/bbbb22", "train/aaaa11"], "both may go together"
    plan = plan_pruning(root, "true")
    assert prune(plan, root) == ["evaluate/bbbb22", "train/aaaa11"] and find_runs(root) == [] and not user.exists()


def test_what_is_not_used_goes_whole_and_the_rest_stays(tmp_path):
    root = tmp_path/"runs"
    for name in ("a1", "b2", "c3"): write_run(root/"train"/name, {"recipe": "train", "note": "a1"}, status="failed")
    (tmp_path/"elsewhere").mkdir()
    (tmp_path/"elsewhere/kept").write_text("x")
    (root/"train/a1/artifacts").symlink_to(tmp_path/"elsewhere")
    write_run(tmp_path/"far"/"x"/"d4", status="failed")
    (root/"train/d4").symlink_to(tmp_path/"far/x/d4")
    plan = plan_pruning(root)
    assert {run.folder: run.goes for run in plan} == {"train/a1": True, "train/b2": True, "train/c3": True, "train/d4": False}
    write_run(root/"train/b2", {"recipe": "train"}, status="done")       # made since the plan
    assert prune(plan, root) == ["train/a1", "train/c3"]
    assert (tmp_path/"elsewhere/kept").exists() and (tmp_path/"far/x/d4/run.json").exists()
    assert sorted(path.name for path in (root/"train").iterdir()) == ["b2", "d4"]
    assert plan_pruning(root, "true", older=1e5) == []


def zerolab_runs(root, *arguments): return cli.main(["runs", *arguments, "--runs", str(root)] if arguments and arguments[0][0] != "-"
                                                    else ["runs", "--runs", str(root), *arguments])


def test_the_commands(tmp_path, capsys):
    for k in range(3): write_run(tmp_path/"train"/f"ab{k}", {"rate": 0.1 * k, "recipe": "paper"}, {"psnr": 20. + k}, status="failed" if k == 2 else "done")
    def said(*arguments):
        assert zerolab_runs(tmp_path, *arguments) == 0
        return capsys.readouterr().out
    lines = said("--sort", "metrics.psnr").splitlines()
    assert lines[0].split() == ["id", "notebook", "status", "started", "took", "rate", "psnr"]
    assert [line.split()[0] for line in lines[1:]] == ["ab0", "ab1", "ab2"]
    assert [row["metrics"]["psnr"] for row in json.loads(said("--where", "status = 'done'", "--json", "--sort", "id"))] == [20, 21]
    assert said("--columns", "id, params.rate AS r", "--where", "params.rate > 0.05", "--sort", "id", "--limit", "1").split() == ["id", "r", "ab1", "0.1"]
    assert "psnr             21" in said("show", "ab1") and json.loads(said("show", "ab1", "--json"))["id"] == "ab1"
    assert [line.split()[1] for line in said("compare", "ab0", "train/ab2").splitlines()] == ["ab0", "status", "rate", "psnr"]
    assert json.loads(said("sql", "SELECT count(*) AS n FROM runs", "--json")) == [{"n": 3}]
    assert said("prune").startswith("goes ") and len(find_runs(tmp_path)) == 3
    said("compact")
    said("prune", "--yes")
    assert [row["id"] for row in json.loads(said("--json", "--sort", "id"))] == ["ab0", "ab1"]


@pytest.mark.parametrize("arguments, says", [
    (["show", "ab"], "2 runs begin with 'ab': t/ab0, t/ab1"), (["show", "zz"], "no run 'zz'"), (["show", ""], "no run ''"),
    (["show", "' OR true --"], "no run"),
    (["compare", "ab0", "ab0"], "not the same one"), (["sql", "DROP TABLE runs"], "one SELECT"), (["--where", "statu = 'done'"], "status"),
    (["--where", "true) ORDER BY 1; SELECT (1"], "one SELECT"), (["--sort", "nothing"], "nothing"), (["prune", "--where", "nothing"], "nothing")])
def test_bad_questions_are_one_line(tmp_path, capsys, arguments, says):
    for k in range(2): write_run(tmp_path/"t"/f"ab{k}")
    assert zerolab_runs(tmp_path, *arguments) == 2
    said = capsys.readouterr().err
    assert says in said and said.startswith("zerolab: ") and said.count("\n") == 1
    assert len(find_runs(tmp_path)) == 2


def two_runs(root):
    write_run(root/"train"/"a", {"rate": 0.1, "odd, näme!": "x" * 9000, "odd; näme!": [1]}, {"psnr": 20.5, "tab": {"cup": {"psnr": 3.}}}, [1., 0.5, 0.25])
    return write_run(root/"train"/"b", {"rate": 0.2}, {"psnr": 21.}, [1., 0.4], status="failed")


def test_mlflow_gets_each_point_once(tmp_path, monkeypatch):
    """For real, against its sqlite store: an outage in the middle, the same call again, and a run that was resumed."""
    pytest.importorskip("mlflow")
    pytest.importorskip("sqlalchemy")
    from mlflow import MlflowClient
    again = two_runs(tmp_path)
    log_batch, calls = MlflowClient.log_batch, []
    def failing(self, *arguments, **more):
        calls.append(1)
        if len(calls) == 5: raise ConnectionError("gone away")      # in the middle of the second run
        return log_batch(self, *arguments, **more)
    monkeypatch.setattr(MlflowClient, "log_batch", failing)
    with pytest.raises(JobError, match="gone away .runs copied: 1"): push("mlflow", tmp_path)
    assert [push("mlflow", tmp_path), push("mlflow", tmp_path)] == [1, 0]
    client = MlflowClient(tracking_uri=f"sqlite:///{tmp_path}/mlflow.db")
    def copies():
        experiment = client.get_experiment_by_name("zerolab/train")
        return {run.info.run_name: run for run in client.search_runs([experiment.experiment_id])}
    def history(run, name): return [(point.step, point.value) for point in client.get_metric_history(run.info.run_id, name)]
    found = copies()
    assert set(found) == {"a", "b"} and (found["a"].info.status, found["b"].info.status) == ("FINISHED", "FAILED")
    assert history(found["a"], "loss") == [(0, 1.), (1, 0.5), (2, 0.25)] and history(found["b"], "loss") == [(0, 1.), (1, 0.4)]
    assert found["a"].data.metrics == {"loss": 0.25, "psnr": 20.5, "tab/cup/psnr": 3.}
    assert found["a"].data.params == {"rate": "0.1", "odd_ n_me_": "x" * 6000, "odd_ n_me__2": "[1]"}
    assert found["a"].data.tags["mlflow.source.git.commit"] == "4" * 40
    write_run(again, {"rate": 0.2}, {"psnr": 22.}, [1., 0.3, 0.2], attempt=2)
    assert push("mlflow", tmp_path) == 1
    assert set(copies()) == {"a", "b"} and history(copies()["b"], "loss") == [(0, 1.), (1, 0.3), (2, 0.2)]


def stand_in(name, log):
    "What wandb and trackio have in common, as far as it is called."
    class Run:
        def __init__(self, **more): self.name, self.summary = more["name"], {}; log.append(("init", more))
        def log(self, values, step): log.append(("log", step, values))
        def finish(self, **more): log.append(("finish", more, dict(self.summary)))
        def delete(self): log.append(("delete", self.name))
    def init(**more):
        run = Run(**more)
        module.runs.append(run)
        return run
    module = types.SimpleNamespace(init=init, runs=[], Settings=dict, Api=lambda: types.SimpleNamespace(runs=lambda project: list(module.runs)))
    return module


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_calls_of_wandb_and_trackio(tmp_path, monkeypatch, name):
    "With a stand-in that records: what is sent, that it is sent once, and that a copy that was cut short is sent again under the same name."
    log = []
    monkeypatch.setitem(sys.modules, name, stand_in(name, log))
    two_runs(tmp_path)
    note = exporters.Noted.add
    monkeypatch.setattr(exporters.Noted, "add", lambda self, export: (_ for _ in ()).throw(OSError("full")))
    with pytest.raises(JobError, match="full .runs copied: 0"): push(name, tmp_path)
    monkeypatch.setattr(exporters.Noted, "add", note)
    first = log[0][1]
    log.clear()
    assert [push(name, tmp_path), push(name, tmp_path)] == [2, 0]
    begun = [entry[1] for entry in log if entry[0] == "init"]
    assert begun[0] == first and len(begun) == 2 and begun[0]["config"]["rate"] == 0.1
    assert [entry[1:] for entry in log if entry[0] == "log"][:3] == [(0, {"loss": 1.}), (1, {"loss": 0.5}), (2, {"loss": 0.25})]
    assert ("delete", "train-a") in log if name == "trackio" else log[4][1:][0] == {"exit_code": 0}


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_wandb_and_trackio_for_real(tmp_path, monkeypatch, name):
    pytest.importorskip(name)
    for variable, value in {"WANDB_MODE": "offline", "TRACKIO_DIR": str(tmp_path/"trackio")}.items(): monkeypatch.setenv(variable, value)
    two_runs(tmp_path/"runs")
    assert [push(name, tmp_path/"runs"), push(name, tmp_path/"runs")] == [2, 0]
    if name == "wandb": assert len(list((tmp_path/"runs/.pushed/wandb").glob("offline-run-*/*.wandb"))) == 2


@pytest.mark.parametrize("name", TRACKERS)
def test_a_missing_package_is_named(tmp_path, monkeypatch, name):
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(JobError, match=f"needs the package {name}: pip install {name}"): push(name, tmp_path)


def test_a_run_is_found_by_folder_name_and_id(tmp_path, monkeypatch):
    for name in ("train/ab", "train/abc", "other/x"): write_run(tmp_path/"runs"/name)
    monkeypatch.chdir(tmp_path)
    for name in ("ab", "train/ab", "runs/train/ab", str(tmp_path/"runs/train/ab")): assert find_run(name, "runs")["folder"] == "train/ab"
