"""The command `zerolab`, mostly without a kernel."""
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
from nbformat.v4 import new_code_cell, new_notebook

from zerolab.jobs import cli
from zerolab.jobs.run import RunInterrupted, RunResult


@pytest.fixture
def project(tmp_path, monkeypatch):
    "A project folder with one experiment, as the working folder; runs are recorded instead of run."
    cell = new_code_cell("steps = 3  # how many\nname = 'x'\nrates = [1.0]", metadata={"tags": ["parameters"]})
    (tmp_path / "nbs/experiments").mkdir(parents=True)
    (tmp_path / "nbs/experiments/train.ipynb").write_text(json.dumps(new_notebook(cells=[cell])))
    monkeypatch.setenv("ZEROLAB_ROOT", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def asked(monkeypatch):
    "What `run_notebook` was asked; its answer can be set as `asked['result']`."
    asked = {"result": RunResult(Path("runs/train/1"), "done", seconds=2.)}
    def run_notebook(path, params, **options):
        asked.update(path=path, params=params, **options)
        if isinstance(asked["result"], BaseException): raise asked["result"]
        return asked["result"]
    monkeypatch.setattr("zerolab.jobs.run.run_notebook", run_notebook)
    return asked


def test_values_are_read_by_the_parameters_type(project, asked, capsys):
    assert cli.main(["run", "train", "-p", "steps", "1_000", "-p", "name", "None", "--param", "rates", "[1e-3, 2]", "--timeout", "5", "--quiet"]) == 0
    assert asked["params"] == {"steps": 1000, "name": "None", "rates": [1e-3, 2]}
    assert asked["timeout"] == 5 and asked["echo"] is False and asked["out"] is None
    assert capsys.readouterr().out == "zerolab: done in 2 s: runs/train/1/report.html\n"


def test_endings_have_exit_codes(project, asked, capsys):
    failed = RunResult(project / "runs/train/1", "failed", 4, "failed in cell [4] `1 / 0`: ZeroDivisionError: division by zero")
    asked["result"] = failed
    assert cli.main(["run", "train"]) == 1
    assert capsys.readouterr().err.splitlines() == [f"zerolab: {failed.error}", "zerolab: what it had so far is in runs/train/1"]
    asked["result"] = RunInterrupted(failed)
    assert cli.main(["run", "train"]) == 130
    asked["result"] = KeyboardInterrupt()
    assert cli.main(["run", "train"]) == 130
    asked["result"] = RuntimeError("a mistake of ours")
    with pytest.raises(RuntimeError): cli.main(["run", "train"])


@pytest.mark.parametrize("arguments, said", [
    (["run", "trian"], "did you mean train?"),
    (["run", "no/such.ipynb"], "no notebook"),
    (["run", "train", "-p", "step", "3"], "unknown parameter 'step', did you mean steps?"),
    (["run", "train", "-p", "steps", "many"], "steps must be a whole number"),
    (["run", "train", "-p", "rates", "__import__('os')"], "rates must be a list"),
    (["run", "train", "--timeout", "-1"], "timeout is -1.0"),
    (["run", "train", "--out", "/proc/nothing/here"], "cannot make a run folder"),
])
def test_bad_input_is_one_line(project, capsys, arguments, said):
    assert cli.main(arguments) == 2
    err = capsys.readouterr().err
    assert said in err and err.startswith("zerolab: ") and err.count("\n") == 1


@pytest.mark.parametrize("arguments", [[], ["rnu"], ["run"], ["run", "train", "-p", "steps"], ["make", "d", "--objects", "0"], ["make", "d"], ["data"],
                                       ["make", "d", "--objects", "1", "--part", "4/3"]])
def test_bad_grammar_exits_with_2(arguments, capsys):
    with pytest.raises(SystemExit) as stopped: cli.main(arguments)
    assert stopped.value.code == 2 and "zerolab" in capsys.readouterr().err


def test_list_shows_what_a_notebook_takes(project, capsys):
    assert cli.main(["run", "train", "--list"]) == 0
    assert "-p steps 3   how many" in capsys.readouterr().out


def test_make_and_download_pass_on_what_they_were_told(monkeypatch, tmp_path, capsys):
    calls = []
    monkeypatch.setattr("zerolab.data.make.make_zeroverse", lambda *args, **kwargs: calls.append((args, kwargs)))
    monkeypatch.setattr("zerolab.data.scans.download_gso", lambda *args: calls.append(args))
    from zerolab.shapes.zeroverse import PAPER, PRIMITIVES
    failures = [0]
    monkeypatch.setattr("zerolab.data.catalog.query", lambda *args: [dict(n=failures[0])])
    make = ["make", str(tmp_path / "z"), "--objects", "3", "--seed", "10", "--views", "4", "--size", "32", "--workers", "1"]
    defaults = dict(views=32, size=512, workers=1, image_format="jpeg", light="dome", light_resolution=256, passes=(), renderer="cpu", supersample=2,
                    camera_seed=0, samples_per_shard=256, retry=None, verify=False)
    assert cli.main(make) == 0
    assert calls.pop() == ((tmp_path / "z", range(10, 13), PAPER), defaults | dict(views=4, size=32))
    flags = ["--recipe", "primitives", "--format", "webp", "--light", "environment", "--light-resolution", "64", "--renderer", "gl", "--supersample", "3",
             "--camera-seed", "7",
             "--passes", "depth", "normals", "--samples-per-shard", "1", "--part", "2/3", "--retry", "seed < 9", "--verify"]
    failures[0] = 1
    assert cli.main([*make, *flags]) == 1, "an object failed"
    assert "0 objects with 4 views" in capsys.readouterr().out
    assert calls.pop() == ((tmp_path / "z", range(11, 12), PRIMITIVES), dict(
        views=4, size=32, workers=1, image_format="webp", light="environment", light_resolution=64, supersample=3, camera_seed=7, samples_per_shard=1,
        passes=("depth", "normals"), renderer="gl",
        retry="seed < 9", verify=True))
    assert cli.main([*make, "--retry"]) == 1 and calls.pop()[1]["retry"] == "true"
    (tmp_path / "photos/wood").mkdir(parents=True)
    from PIL import Image
    Image.new("RGB", (8, 8), (90, 60, 30)).save(tmp_path / "photos/wood/basecolor.png")
    assert cli.main([*make, "--materials", str(tmp_path / "photos"), "--materials-probability", "0.5"]) == 1
    recipe = calls.pop()[0][2]
    assert (recipe.materials, recipe.materials_probability, recipe.boolean_probability) == (str(tmp_path / "photos"), 0.5, PAPER.boolean_probability)
    assert cli.main([*make, "--part", "2/3"]) == 2 and "there is nothing in that part" in capsys.readouterr().err
    assert cli.main([*make, "--recipe", "nothing"]) == 2 and "choose one of " in capsys.readouterr().err
    (tmp_path / "names").write_text("cup\nplate\n")
    assert cli.main(["download-gso", str(tmp_path), "--names", str(tmp_path / "names")]) == 0
    assert calls.pop() == (["cup", "plate"], tmp_path)
    assert cli.main(["download-gso", str(tmp_path), "--names", str(tmp_path / "none")]) == 2
    assert capsys.readouterr().err == f"zerolab: {tmp_path}/none: No such file or directory\n"


def test_a_data_set_is_asked(tmp_path, capsys):
    "Summary, question, mistake, damage, page; and a folder of shards that has no rows yet."
    import torch
    from zerolab.data.shards import write_shards
    from zerolab.scene.cameras import gso_inputs
    from zerolab.scene.views import Views
    def says(*arguments):
        code, said = cli.main(["data", str(tmp_path / "d"), *map(str, arguments)]), capsys.readouterr()
        return code, said.out, said.err
    assert says()[0] == 2
    pictures = [torch.full((4, 16, 16, 4), 255, dtype=torch.uint8) for _ in range(2)]
    for seed in range(2): pictures[seed][..., :3] = 60 + 60 * seed       # filled, without texture: bad
    objects = [Views(pictures[seed], gso_inputs(4, size=(16, 16)), f"grey {seed}", "test", seed) for seed in range(2)]
    write_shards(objects, tmp_path / "d", samples_per_shard=1)
    assert says("--measure")[1].splitlines()[:2] == ["zerolab: measured 2 shards that had no rows", "objects  views  shards  gigabytes  bad  failures"]
    assert says()[1].splitlines()[1].split() == ["2", "8", "2", "0.0", "2", "0"]
    assert says("SELECT seed, caption FROM objects") == (0, "seed  caption\n0     grey 0\n1     grey 1\n", "2 rows\n")
    assert says("SELECT seed FROM object")[0] == 2
    assert says("--verify")[:2] == (0, "zerolab: 0 damaged shards\n")
    assert says("--page", tmp_path / "page.html")[0] == 0 and "2 bad" in (tmp_path / "page.html").read_text()
    (tmp_path / "d/000001.tar").write_bytes(b"")
    code, out, err = says("--verify")
    assert code == 1 and "1 damaged shards; `zerolab make` with --verify" in out and "000001.tar" in err


def test_help_is_light_and_version_speaks():
    script = ("import sys\nfrom zerolab.jobs.cli import main\ncode = main(['version'])\n"
              "print({'torch', 'numpy', 'papermill', 'nbformat', 'vtk'} & set(sys.modules), code)")
    def seconds():
        start = time.perf_counter()
        said = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=Path(__file__).parents[1]).stdout
        assert said.startswith("zerolab 0.") and said.endswith("set() 0\n")
        return time.perf_counter() - start
    assert min(seconds() for _ in range(3)) < 0.3
