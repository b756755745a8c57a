"""The run table: ten thousand runs, many writers, files that lie, and the commands over it."""
import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings, strategies as st

from zerolab.jobs import runs as table
from zerolab.jobs.folder import take_run, this_process

from zerolab.jobs.run import JobError
from zerolab.jobs.runs import compact, curves, mean_curves, plot_metric, query, read_series, rows

START = "2026-01-05T10:00:00+00:00"


def write_run(folder, params=None, metrics=None, losses=(), status="done", attempt=1, **state):
    "The folder of a run, as a worker leaves it."
    (folder/"attempts").mkdir(parents=True, exist_ok=True)
    (folder/f"attempts/{attempt}.json").write_text("{}")
    spec = {"id": folder.name, "name": folder.parent.name, "notebook": f"{folder.parent.name}.ipynb", "params": params or {}, "chosen": params or {},
            "commit": "4" * 40, "dirty": False, "created": START, "cwd": str(folder.parents[2])}
    (folder/"spec.json").write_text(json.dumps(spec))
    (folder/"metrics.json").write_text(json.dumps(metrics or {}))
    lines = [f'{{"step": {step}, "time": {1.7e9 + step}, "attempt": 1, "loss": {loss}}}\n' for step, loss in enumerate(losses)]
    (folder/"metrics.jsonl").write_text("".join(lines))
    ended = {"status": status, "attempt": attempt, "cause": "", "error": "", "seconds": 9.5, "started": START, "ended": START, "peak_memory": 800.5}
    (folder/"run.json").write_text(json.dumps(ended | {"machine": {"name": "cup", "cores": 8}} | state))
    return folder


def many(root, count):
    for k in range(count):
        write_run(root/f"nb{k % 4}"/f"{k:016x}", {"rate": 10. ** -(k % 3), "recipe": "abc"[k % 3], "seed": k % 5, "depth": k % 7}, {"psnr": 20 + k % 13},
                  [1 / (step + 1) + k % 5 for step in range(10)])


def costs(root):
    "CPU seconds to list, filter and plot, and what came out."
    import matplotlib.pyplot as plt
    found = {}
    for name, ask in (("list", lambda: rows(root)), ("filter", lambda: rows(root, "params.rate = 0.1 AND metrics.psnr > 25", "metrics.psnr DESC, folder", 50)),
                      ("plot", lambda: plot_metric(root, "loss", by=["notebook", "params.recipe"]).lines[0].get_ydata())):
        start = time.process_time()
        found[name] = (ask(), time.process_time() - start)
    plt.close("all")
    return found


@pytest.mark.parametrize("count", [2000, pytest.param(10_000, marks=pytest.mark.slow)])
def test_thousands_of_runs(tmp_path, count):
    """Compaction changes no answer, and then each of the three questions costs under a second of CPU, even over 10,000 runs."""
    many(tmp_path, count)
    plot_metric(tmp_path, "loss", "notebook = 'nb0' AND params.seed = 0 AND params.rate = 1.0", by=[])    # imports are not measured
    before = costs(tmp_path)
    assert len(before["list"][0]) == count and 0 < len(before["filter"][0]) <= 50
    assert compact(tmp_path) == count and compact(tmp_path) == 0
    after = costs(tmp_path)
    for name in ("list", "filter"): assert before[name][0] == after[name][0]
    np.testing.assert_allclose(before["plot"][0], after["plot"][0])
    print({name: (round(before[name][1], 2), round(after[name][1], 2)) for name in before})
    assert all(seconds < 1 for _, seconds in after.values()), {name: seconds for name, (_, seconds) in after.items()}
    assert sum(after[name][1] for name in after) < 0.6 * sum(before[name][1] for name in before)


WRITER = """import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from test_jobs_runs import write_run
from zerolab.jobs.runs import compact, rows
root, me = Path(sys.argv[2]), int(sys.argv[3])
for k in range(12):
    write_run(root/"train"/f"{me}-{k}", {"me": me, "k": k}, {"y": 100 * me + k}, [k, k + 0.5])
    if k % 4 == 3: compact(root)
    if k == 7: assert sum(row["params"].get("me") == me for row in rows(root)) == 8, "a writer misses its own runs"
"""


def test_eight_writers_lose_nothing(tmp_path):
    writers = [subprocess.Popen([sys.executable, "-c", WRITER, str(Path(__file__).parent), str(tmp_path), str(me)]) for me in range(8)]
    looks = 0
    while any(writer.poll() is None for writer in writers):
        found = query(tmp_path, "SELECT count(*) AS n, count(DISTINCT folder) AS d FROM runs")[0] if list(tmp_path.iterdir()) else {"n": 0, "d": 0}
        assert found["n"] == found["d"]
        looks += 1
    assert [writer.returncode for writer in writers] == [0] * 8 and looks > 0
    compact(tmp_path)
    assert compact(tmp_path) == 0
    found = rows(tmp_path, "status = 'done'")
    assert sorted((row["params"]["me"], row["params"]["k"], row["metrics"]["y"]) for row in found) == [(m, k, 100 * m + k) for m in range(8) for k in range(12)]
    for name, (_, values) in curves(tmp_path, "loss").items(): assert list(values) == [int(name.split("-")[1]), int(name.split("-")[1]) + 0.5]
    assert len(curves(tmp_path, "loss")) == 96
    assert not list((tmp_path/".table").glob(".tmp-*"))


def reread(root):
    "The table and the series, from the folders alone."
    hidden, place = root/".away", root/".table"
    place.rename(hidden)
    try: return rows(root, order="folder"), {name: (list(s), list(v)) for name, (s, v) in curves(root, "loss").items()}
    finally: hidden.rename(place)


def test_parquet_never_hides_what_was_written_since(tmp_path, monkeypatch):
    for k in range(6): write_run(tmp_path/"train"/f"run{k}", {"k": k}, {"y": k}, [k, k / 2], status="failed" if k == 5 else "done")
    assert compact(tmp_path) == 6
    def agree():
        assert (rows(tmp_path, order="folder"), {name: (list(s), list(v)) for name, (s, v) in curves(tmp_path, "loss").items()}) == reread(tmp_path)
        return {row["folder"]: row for row in rows(tmp_path)}
    agree()
    write_run(tmp_path/"train/run0", {"k": 0}, {"y": 77}, [5, 6, 7])                   # made again
    with open(tmp_path/"train/run1/metrics.jsonl", "a") as file: file.write('{"step": 9, "loss": 3.5}\n')
    for path in sorted((tmp_path/"train/run2").rglob("*"), reverse=True): path.rmdir() if path.is_dir() else path.unlink()
    (tmp_path/"train/run2").rmdir()                                                    # gone
    take_run(tmp_path/"train/run5")                                                    # tried again, by this process, which has written nothing yet
    found = agree()
    assert found["train/run0"]["metrics"] == {"y": 77} and "train/run2" not in found and found["train/run5"]["status"] == "running"
    assert list(curves(tmp_path, "loss")["train/run1"][1]) == [1, 0.5, 3.5]
    assert (compact(tmp_path), compact(tmp_path)) == (2, 0)
    agree()
    part, *_ = (tmp_path/".table").glob("*.runs.parquet")
    for damage in (lambda: part.write_bytes(part.read_bytes()[:-20]), lambda: part.write_bytes(b""), lambda: table._sister(part).unlink(),
                   lambda: (tmp_path/".table/v1-0000.runs.parquet").write_bytes(b"PAR1 no")):
        damage()
        agree()
        compact(tmp_path)
        agree()
    monkeypatch.setattr(table, "MANY", 1)
    monkeypatch.setattr(table, "GRACE", -1.)
    write_run(tmp_path/"train/run7", {"k": 7})
    assert compact(tmp_path) == 1       # many small files become one
    compact(tmp_path)
    agree()
    assert sum(bool(count) for count in table._survey(tmp_path).count().values()) == 1


def test_what_a_run_is_now(tmp_path):
    running = write_run(tmp_path/"t/running", status="running")
    (running/"attempts/1.json").write_text(json.dumps(this_process()))
    lost = write_run(tmp_path/"t/lost", status="running")
    (lost/"attempts/1.json").write_text(json.dumps(this_process() | {"born": 1}))
    queued = write_run(tmp_path/"t/queued")
    for name in ("run.json", "attempts/1.json"): (queued/name).unlink()
    assert {row["id"]: row["status"] for row in rows(tmp_path)} == {"running": "running", "lost": "lost", "queued": "queued"}
    assert compact(tmp_path) == 0


HOSTILE = ["'; DROP TABLE records; --", 'a"b', "a.b", "", "Seed", "seed", "é\u2028", "\x00", "\ud800", "$.x", "~1/", "select", "x" * 300, "{}", "%s\n"]


def test_hostile_names_and_values_are_data(tmp_path):
    values = [*HOSTILE, 10**40, -1.5, math.inf, True, None, [1, {"a": []}], "y" * 50_000, list(range(60_000))]
    for k, name in enumerate(HOSTILE):
        folder = write_run(tmp_path/"t"/f"run {k}'\"; DROP", {name: values[k], "k": k} | {f"v{k}": value for k, value in enumerate(values)}, {name: k})
        line = json.dumps({"step": 0, name: 1.5, "loss": math.nan, "big": 10**400})
        (folder/"metrics.jsonl").write_text(f'{line}\nnonsense\n{{"step": ')
    raw = os.fsencode(tmp_path) + b"/t/\xff\xfe"
    os.mkdir(raw)
    with open(raw + b"/spec.json", "w") as file: file.write('{"params": {}, "name": "t"}')
    for _ in range(2):
        assert len(rows(tmp_path)) == len(HOSTILE) + 1 and query(tmp_path, "SELECT count(*) AS n FROM runs")[0]["n"] == len(HOSTILE) + 1
        assert query(tmp_path, "SELECT count(DISTINCT metric) AS n, min(value) AS low, max(value) AS high FROM series")[0] == {
            "n": len(HOSTILE), "low": 1.5, "high": 1.5}
        assert query(tmp_path, "SELECT params.\"a\"\"b\" AS x FROM runs WHERE params.k = 1") == [{"x": 'a"b'}]
        quoted = HOSTILE[0].replace("'", "''")
        assert [row["params"]["k"] for row in rows(tmp_path, f"params.\"{HOSTILE[0]}\" = '{quoted}'")] == [0]
        assert list(curves(tmp_path, HOSTILE[0])) == ["t/run 0'\"; DROP"]
        compact(tmp_path)


json_values = st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(), lambda inner: st.lists(inner, max_size=3) | st.dictionaries(
    st.sampled_from(["status", "attempt", "params", "a"]) | st.text(max_size=3), inner, max_size=4), max_leaves=8)
KNOWN = ("status", "attempt", "params", "metrics", "started", "seconds", "earlier", "machine", "id", "name", "error", "step", "loss")
documents = json_values | st.fixed_dictionaries({}, optional=dict.fromkeys(KNOWN, json_values))
contents = st.none() | st.binary(max_size=40) | documents.map(lambda value: json.dumps(value).encode())


@settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.lists(st.tuples(contents, contents, contents, contents), min_size=1, max_size=4))
def test_any_files_make_rows(tmp_path_factory, files):
    root = tmp_path_factory.mktemp("runs")
    for k, contents in enumerate(files):
        (root/"t"/str(k)).mkdir(parents=True)
        (root/"t"/str(k)/"in.ipynb").write_text("{}")
        for name, content in zip(("spec.json", "run.json", "metrics.json", "metrics.jsonl"), contents):
            if content is not None: (root/"t"/str(k)/name).write_bytes(content)
    found = rows(root, order="folder")
    assert [row["folder"] for row in found] == [f"t/{k}" for k in range(len(files))]
    assert all(row["status"] for row in found)
    query(root, "SELECT * FROM runs JOIN series USING (folder)")
    compact(root)
    assert json.dumps(rows(root, order="folder"), default=str) == json.dumps(found, default=str)


def test_folders_instead_of_files_and_links(tmp_path):
    for name in ("spec.json", "run.json"): (tmp_path/"t/a"/name).mkdir(parents=True)
    (tmp_path/"t/loop").symlink_to(tmp_path)
    (tmp_path/"t/b").mkdir()
    (tmp_path/"t/b/spec.json").symlink_to("nowhere")
    found = {row["folder"]: (row["status"], row["problem"]) for row in rows(tmp_path)}
    assert set(found) == {"t/a", "t/b"} and found["t/a"][0] == "broken" and "Is a directory" in found["t/a"][1] and "spec.json" in found["t/b"][1]


def test_a_resumed_run_shows_what_still_stands(tmp_path):
    lines = [(step, 1, step) for step in range(0, 60, 10)] + [(step, 2, -step) for step in (40, 50)] + [(50, 3, 0.5)]
    (tmp_path/"metrics.jsonl").write_text("".join(json.dumps({"step": s, "attempt": a, "loss": v, "flag": True, "text": "x"}) + "\n" for s, a, v in lines))
    assert {step: value for (name, step), (value, *_) in read_series(tmp_path).items()} == {0: 0, 10: 10, 20: 20, 30: 30, 40: -40, 50: 0.5}


def test_means_over_seeds_have_students_intervals(tmp_path):
    from scipy import stats
    generator = np.random.default_rng(0)
    curve = generator.normal(size=(2, 5, 3))
    for rate in range(2):
        for seed in range(5): write_run(tmp_path/"t"/f"{rate}{seed}", {"rate": rate, "seed": seed}, losses=curve[rate, seed])
    write_run(tmp_path/"t/one", {"rate": 7, "seed": 0}, losses=[1., 2.])
    found = mean_curves(tmp_path, "loss")
    assert list(found) == [(0,), (1,), (7,)]
    for rate in range(2):
        steps, mean, half, n = found[rate,]
        low, high = stats.t.interval(0.95, 4, curve[rate].mean(0), stats.sem(curve[rate]))
        np.testing.assert_allclose([mean - half, mean + half], [low, high])
        assert list(steps) == [0, 1, 2] and list(n) == [5, 5, 5]
    assert np.isnan(found[7,][2]).all() and len(plot_metric(tmp_path, "loss").get_legend().get_texts()) == 3


@pytest.mark.parametrize("sql, says", [
    ("DROP TABLE records", "one SELECT"), ("COPY (SELECT 1) TO 'x.csv'", "one SELECT"), ("SELECT 1; SELECT 2", "one SELECT"), ("", "one SELECT"),
    ("ATTACH 'x.db'", "one SELECT"), ("EXPLAIN ANALYZE COPY (SELECT 1) TO 'x.csv'", "one SELECT"), ("SET lock_configuration = false", "one SELECT"),
    ("SELECT * FROM read_text('/etc/hostname')", "disabled"), ("SELECT * FROM 'x.parquet'", "x.parquet"), ("SELECT * FROM rows", "rows"),
    ("SELECT params.rte FROM runs", "rate"), ("SELEC 1", "syntax error"), ("SELECT 1/0 FROM nothing", "nothing")])
def test_questions_change_nothing(tmp_path, monkeypatch, sql, says):
    write_run(tmp_path/"runs/t/a", {"rate": 1})
    monkeypatch.chdir(tmp_path)
    with pytest.raises(JobError) as said: query("runs", sql)
    assert says in str(said.value) and "\n" not in str(said.value)
    assert os.listdir(tmp_path) == ["runs"]


def test_a_data_frame_has_a_column_for_each_parameter(tmp_path):
    if not table.__dict__.get("pandas"):
        try: import pandas  # noqa: F401
        except ImportError:
            with pytest.raises(JobError, match="needs the package pandas"): table.table(tmp_path)
            return
    write_run(tmp_path/"t/a", {"rate": 1, "a\"b": "x"}, {"y": 2.}, [1., 2.])
    write_run(tmp_path/"u/b", {"depth": 3})
    frame = table.table(tmp_path, order="folder")
    assert list(frame["params.rate"].fillna(-1)) == [1, -1] and frame["metrics.y"][0] == 2 and 'params.a"b' in frame
    assert "params.depth" not in table.table(tmp_path, "notebook = 't'") and list(table.series(tmp_path, "loss")["value"]) == [1, 2]
