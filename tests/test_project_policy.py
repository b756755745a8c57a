"""Every notebook keeps the rules, and every rule can be broken: each fault below is injected into a good project and found."""
import json

import pytest

from zerolab.dev import notebooks as policy
from zerolab.scene.paths import root

KERNEL = {"kernelspec": {"name": "python3", "display_name": "python3", "language": "python"}}
GOOD = ["#| default_exp scene.demo", "# Demo\n\n> What it is for", "#| export\nimport math",
        "#| export\ndef area(\n    radius: float, # metres\n) -> float: # square metres\n    'Of a disc.'\n    return math.pi * radius**2", "area(2)"]


def write(folder, sources, name="scene/00_demo.ipynb", outputs=(), metadata=KERNEL, stamp=True):
    cells = [{"cell_type": "markdown", "id": f"c{i}", "metadata": {}, "source": source} if source.startswith("# ") else
             {"cell_type": "code", "id": f"c{i}", "metadata": {}, "execution_count": None, "source": source,
              "outputs": list(outputs) if i == len(sources) - 1 else []}
             for i, source in enumerate(sources)]
    path = folder / "nbs" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    book = {"cells": cells, "metadata": dict(metadata), "nbformat": 4, "nbformat_minor": 5}
    path.write_text(json.dumps(book))
    if stamp:
        book["metadata"]["zerolab"] = {"src": policy.source_hash(policy.read_notebook(path, folder / "nbs"))}
        path.write_text(json.dumps(book))
    return path


@pytest.fixture
def project(tmp_path):
    (tmp_path / "settings.ini").write_text("[DEFAULT]\ntst_flags = slow cuda\n")
    write(tmp_path, GOOD)
    return tmp_path


def test_this_project_keeps_the_rules():
    assert policy.check_project(root()) == []


def test_a_good_notebook_passes(project):
    assert policy.check_project(project) == []


def replaced(index, source): return GOOD[:index] + [source] + GOOD[index + 1:]


SOURCES = {
    "no title": (replaced(1, "# "), "is not '# Title'"),
    "no subtitle": (replaced(1, "# Demo"), "is not '# Title'"),
    "wrong module": (replaced(0, "#| default_exp scene.dmo"), "default_exp scene.demo"),
    "no module": (GOOD[1:], "default_exp scene.demo"),
    "imports beside a call": (GOOD[:-1] + ["import time\ntime.sleep(9)"], "mixes imports"),
    "import inside a plain function": (GOOD[:-1] + ["def f():\n    import time"], "mixes imports"),
    "exported import beside code": (replaced(2, "#| export\nimport math\nlimit = 3"), "mixes imports"),
    "no docstring": (replaced(3, "#| export\ndef area(): return 1"), "area has no docstring"),
    "no docments": (replaced(3, "#| export\ndef area(radius): 'Of a disc.'"), "area says nothing about radius"),
    "two parameters a line": (replaced(3, "#| export\ndef area(\n    a, b, # both\n): 'Of something.'"), "area says nothing about a, b"),
    "vague annotation": (replaced(3, "#| export\ndef area(size: tuple): 'Of a picture.'"), "area says nothing about size"),
    "long cell": (replaced(3, "#| export\n" + "x = 1\n" * 61), "exports 61 lines"),
    "heavy import": (replaced(2, "#| export\nimport pyvista as pv"), "imports pyvista at once"),
    "import of nbdev": (replaced(2, "#| export\nfrom fastcore.test import test_eq"), "imports fastcore.test at once"),
    "later room": (replaced(2, "#| export\nfrom zerolab.render.mesh import render_mesh"), "room render comes after scene"),
    "later room, inside a function": (replaced(3, "#| export\ndef f():\n    'Draw.'\n    from zerolab import lrm"), "room lrm comes after scene"),
    "unknown neighbour": (replaced(2, "#| export\nfrom zerolab.scene.gone import x"), "which no notebook exports"),
    "itself": (replaced(2, "#| export\nfrom zerolab.scene.demo import x"), "later or here"),
    "machine path": (GOOD[:-1] + ["open('/" + "home/ann/a.ply')"], "outside the repository: /home/ann/a.ply"),
    "path beside the repository": (GOOD[:-1] + ["open('../sha" + "red/a.ply')"], "outside the repository"),
    "not Python": (GOOD[:-1] + ["x = ("], "a cell is not Python"),
}


@pytest.mark.parametrize("sources, says", SOURCES.values(), ids=SOURCES)
def test_a_fault_in_the_source_is_found(project, sources, says):
    write(project, sources)
    problems = policy.check_project(project)
    assert len(problems) == 1 and says in problems[0] and problems[0].startswith("scene/00_demo.ipynb: ")


def stream(text, name="stdout"): return {"output_type": "stream", "name": name, "text": [text]}
def data(kind, text): return {"output_type": "display_data", "metadata": {}, "data": {kind: text}}


OUTPUTS = {
    "error": ({"output_type": "error", "ename": "ValueError", "evalue": "no", "traceback": ["no"]}, "ended with ValueError"),
    "warning": (stream("UserWarning: old", "stderr"), "wrote to stderr"),
    "colours": (stream("\x1b[31mred\x1b[0m"), "terminal colours"),
    "path in text": (stream("saved /" + "tmp/tmpx1/a.ply"), "a path of one machine: /tmp/tmpx1/a.ply"),
    "path in HTML": (data("text/html", ["<b>/" + "root/zerolab</b>"]), "a path of one machine"),
    "large HTML": (data("text/html", "x" * 100_001), "kB of HTML"),
    "widget state": (data("application/vnd.jupyter.widget-state+json", "{}"), "state of a widget"),
    "heavy": (data("image/png", "A" * 400_000), "over 400"),
}


@pytest.mark.parametrize("output, says", OUTPUTS.values(), ids=OUTPUTS)
def test_a_fault_in_the_outputs_is_found(project, output, says):
    write(project, GOOD, outputs=[output])
    problems = policy.check_project(project)
    assert len(problems) == 1 and says in problems[0]


def test_metadata_faults_are_found(project):
    write(project, GOOD, metadata={})
    assert "no kernelspec" in policy.check_project(project)[0]
    write(project, GOOD, metadata=KERNEL | {"widgets": {"state": {}}})
    assert "keeps the state of widgets" in policy.check_project(project)[0]


def test_twins_are_found(project):
    write(project, GOOD, name="scene/01_demo.ipynb")
    assert [p.split(": ", 1)[1] for p in policy.check_project(project)] == [
        "it exports scene.demo, and so does scene/01_demo.ipynb", "it exports scene.demo, and so does scene/00_demo.ipynb"]


def test_a_later_notebook_of_the_room_is_out_of_reach(project):
    def importing(name): return [f"#| default_exp scene.{name}", "# T\n\n> s", f"#| export\nfrom zerolab.scene.{'b' if name == 'a' else 'a'} import x"]
    write(project, importing("a"), name="scene/01_a.ipynb")
    write(project, importing("b"), name="scene/02_b.ipynb")
    assert policy.check_project(project) == ["scene/01_a.ipynb: it imports zerolab.scene.b, which its own room exports later or here"]


def test_changed_code_makes_a_notebook_stale(project):
    path = project / "nbs/scene/00_demo.ipynb"
    assert policy.chosen_notebooks(project / "nbs", []) == []
    path.write_text(path.read_text().replace("area(2)", "area(3)"))
    assert policy.chosen_notebooks(project / "nbs", []) == [path]
    assert "changed since it last ran" in policy.check_project(project)[0]
    assert policy.check_project(project, stale=False) == []


def test_prose_does_not_make_a_notebook_stale(project):
    path = project / "nbs/scene/00_demo.ipynb"
    path.write_text(path.read_text().replace("What it is for", "What it is really for"))
    assert policy.check_project(project) == []


def test_a_bar_between_flags_is_found(project):
    (project / "settings.ini").write_text("[DEFAULT]\ntst_flags = slow|cuda\n")
    assert "separate flags by spaces" in policy.check_project(project)[0]


def test_scratch_and_checkpoints_are_no_notebooks(project):
    for name in ("_scratch.ipynb", "scene/.ipynb_checkpoints/00_demo-checkpoint.ipynb", "_drafts/00_x.ipynb"): write(project, ["x ="], name=name)
    assert policy.check_project(project) == []


def test_running_keeps_the_outputs_of_skipped_cells_and_stamps(project):
    path = write(project, ["# T\n\n> s", "print(6 * 7)", "#| slow\nprint('hours')"], name="lesson.ipynb", outputs=[stream("from last week")], stamp=False)
    assert policy.is_stale(policy.read_notebook(path, project / "nbs"))
    policy.execute_notebook(path)
    book = policy.read_notebook(path, project / "nbs")
    assert [policy.output_text(o).strip() for c in book.cells for o in c.outputs] == ["42", "from last week"]
    assert not policy.is_stale(book)
    assert all(not cell["metadata"] for cell in json.loads(path.read_text())["cells"] if cell["source"] != "print(6 * 7)")


def test_a_stored_widget_gives_way_to_its_picture_and_no_state_is_kept(project):
    live = "application/vnd.jupyter.widget-view+json"
    show = "from IPython.display import display\nimport ipywidgets\nslider = ipywidgets.IntSlider()\nview = slider._repr_mimebundle_()\n"
    path = write(project, ["# T\n\n> s", show + "display(view | {'image/png': 'iVBORw0KGgo='}, raw=True)\nslider"], name="lesson.ipynb", stamp=False)
    policy.execute_notebook(path)
    book = policy.read_notebook(path, project / "nbs")
    kinds = [live in output["data"] for output in book.cells[1].outputs]
    assert kinds == [False, True] and "widgets" not in book.metadata, "without a picture, the site says that a control stands there"


def test_slow_cells_are_run_when_asked_for(project):
    path = write(project, ["# T\n\n> s", "#| slow\n6*7"], name="lesson.ipynb", stamp=False)
    def outputs(): return json.loads(path.read_text())["cells"][-1]["outputs"]
    assert policy.run_notebooks(project, ["lesson"]) == 0 and outputs() == []
    assert policy.run_notebooks(project, ["lesson"], slow=True) == 0 and "42" in str(outputs())


def test_a_picture_is_stored_once():
    output = {"data": {"image/png": "a", "image/jpeg": "b", "text/plain": "c", "application/vnd.jupyter.widget-view+json": {}}}
    assert policy.lean(output)["data"] == {"image/png": "a", "text/plain": "c"}
    assert policy.lean({"data": {"image/jpeg": "b"}})["data"] == {"image/jpeg": "b"}


def test_a_notebook_that_fails_is_left_as_it_was(project, capsys):
    path = write(project, ["# T\n\n> s", "raise ValueError('no such camera')"], name="lesson.ipynb", stamp=False)
    before = path.read_bytes()
    assert policy.run_notebooks(project, ["lesson"]) == 1
    assert path.read_bytes() == before and [p.name for p in path.parent.glob("lesson*")] == ["lesson.ipynb"]
    assert "no such camera" in capsys.readouterr().out
