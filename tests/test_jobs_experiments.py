"""The contract of a notebook under nbs/experiments: whatever is there, now or later, can be swept."""
import ast
import io
import subprocess
import tokenize

import pytest

from sweeping import REPOSITORY
from zerolab.jobs import cli
from zerolab.jobs.run import notebook_parameters, read_notebook, run_notebook

EXPERIMENTS = sorted((REPOSITORY / "nbs/experiments").glob("*.ipynb"))
# What puts something on the disk; its first argument says where, or the object before the dot does.
WRITES = {"write_json", "write_text", "write_bytes", "write_shard", "save_lrm", "save_ply", "save_gaussians", "atomic_path", "make_zeroverse", "train_lrm",
          "savefig", "imsave", "save", "savez", "mkdir", "touch", "unlink", "rmtree", "to_csv", "to_parquet", "splat_html"}
MOVES = {"rename", "replace", "copy", "copyfile", "copytree", "move"}   # the second argument, too
RECORDS = {"write_record", "add_to_record"}   # write under data/results
PROJECT = {"data_dir", "root", "Path", "home", "cwd", "getcwd"}   # what leads out of the run's folder


def parameters_cells(book): return [cell for cell in book.cells if "parameters" in cell.metadata.get("tags", [])]


def code_of(book): return [cell.source for cell in book.cells if cell.cell_type == "code" and not cell.source.lstrip().startswith(("%", "!"))]


def names_in(node): return {part.id for part in ast.walk(node) if isinstance(part, ast.Name)} | {
    part.attr for part in ast.walk(node) if isinstance(part, ast.Attribute)}


def leads_out(node, aliases):
    "Whether an expression names a place outside of the run's folder; data that runs share lie under runs/ of the project."
    if "run_dir" in names_in(node) or "artifact" in names_in(node): return False
    if any(isinstance(part, ast.Constant) and str(part.value).startswith("runs/") for part in ast.walk(node)): return False
    return bool(names_in(node) & PROJECT) or any(aliases.get(name) for name in names_in(node))


def opens_to_write(call):
    modes = [str(word.value) for word in [*call.args, *(word.value for word in call.keywords)] if isinstance(word, ast.Constant)]
    return any(len(mode) <= 3 and set(mode) & set("wax+") for mode in modes)


def outside_writes(sources, defaults):
    "Calls that write to a place outside of the run's folder, unless a parameter that is empty by default asks for it."
    off, aliases, found = {name for name, value in defaults.items() if not value}, {}, []
    trees = [ast.parse(source) for source in sources]
    for node in (node for tree in trees for node in ast.walk(tree) if isinstance(node, ast.Assign)):
        value = node.value   # `where = root()/folder if folder else run_dir()/...`: what happens by default counts
        if isinstance(value, ast.IfExp) and names_in(value.test) & off: value = value.orelse
        for target in node.targets:
            if isinstance(target, ast.Name): aliases[target.id] = leads_out(value, aliases)
    def visit(node, asked):
        if isinstance(node, ast.If):
            for child in node.body: visit(child, asked or bool(names_in(node.test) & off))
            for child in node.orelse: visit(child, asked)
            return
        if isinstance(node, ast.Call) and not asked:
            method = isinstance(node.func, ast.Attribute)
            name = node.func.attr if method else getattr(node.func, "id", "")
            places = [*node.args[:2 if name in MOVES else 1], *([node.func.value] if method else [])]
            if name in RECORDS: found.append(ast.unparse(node)[:80])
            if name in WRITES | MOVES and any(leads_out(place, aliases) for place in places): found.append(ast.unparse(node)[:80])
            if name == "open" and opens_to_write(node) and any(leads_out(place, aliases) or isinstance(place, ast.Constant) for place in places[:1]):
                found.append(ast.unparse(node)[:80])
        for child in ast.iter_child_nodes(node): visit(child, asked)
    for tree in trees: visit(tree, False)
    return found


def test_the_check_of_writes_finds_some():
    defaults = {"publish": "", "folder": "", "size": 3}
    bad = ["write_json(data_dir()/'results'/'a.json', {})", "where = root()/'x'\nwhere.mkdir()", "open(root()/'a', 'w')",
           "(Path.home()/'a').write_text('')", "if size: write_json(root()/'a', 1)", "open('a.txt', 'w')",
           "where = root()/'a' if size else 3\nwrite_json(where/'a', 1)", "if publish: pass\nelse: write_json(root()/'a', 1)",
           "write_record('a', score=1)"]
    good = ["if publish: write_json(data_dir()/'a.json', {})", "if publish: write_record(publish, score=1)",
            "where = root()/folder if folder else run_dir()/'b'\nwhere.mkdir()",
            "artifact('a').write_text('')", "read_json(data_dir()/'a.json')", "text = (root()/'a').read_text()", "open(root()/'a')",
            "write_json(run_dir()/'a.json', 1)", "where = root()/f'runs/data/{size}'\nmake_zeroverse(where)"]
    assert [len(outside_writes([source], defaults)) for source in bad] == [1] * len(bad)
    assert [outside_writes([source], defaults) for source in good] == [[]] * len(good)


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda path: path.stem)
def test_an_experiment_keeps_the_contract(path, tmp_path, capsys, monkeypatch):
    book = read_notebook(path)
    (cell,), known = parameters_cells(book), notebook_parameters(book)
    assert known and all(parameter.kind for parameter in known.values()), "every default is a literal, so that its type is known"
    assert all(isinstance(node, (ast.Assign, ast.AnnAssign)) for node in ast.parse(cell.source).body), "the cell declares parameters and does nothing else"
    lines = cell.source.splitlines()
    whole = [token for token in tokenize.generate_tokens(io.StringIO(cell.source).readline)
             if token.type == tokenize.COMMENT and lines[token.start[0] - 1].strip().startswith("#")]
    assert not [token.string for token in whole if "=" in token.string], "nothing is commented out"
    sources = code_of(book)
    calls = {call.func.id for source in sources for call in ast.walk(ast.parse(source)) if isinstance(call, ast.Call) and isinstance(call.func, ast.Name)}
    imports = {alias.name for source in sources for node in ast.walk(ast.parse(source))
               if isinstance(node, ast.ImportFrom) and node.module == "zerolab.jobs.run" for alias in node.names}
    assert {"record", "log_metrics"} & calls & imports, "metrics are reported by `record` or `log_metrics` of zerolab.jobs.run"
    assert outside_writes(sources, {name: parameter.default for name, parameter in known.items()}) == []
    monkeypatch.setenv("ZEROLAB_ROOT", str(REPOSITORY))
    assert cli.main(["run", str(path), "--list"]) == 0
    listed = capsys.readouterr().out
    assert all(f"-p {name} {parameter.default!r}" in listed for name, parameter in known.items())
    assert cli.main(["sweep", path.stem, "--dry-run", "--runs", str(tmp_path / "runs")]) == 0
    assert f"1 runs of {path.stem}: 1 queued" in capsys.readouterr().out and not (tmp_path / "runs").exists()


def test_an_experiment_writes_below_its_run_only(tmp_path):
    """The cheapest of them for real: afterwards the project has nothing that it had not before, and the run has its metrics."""
    def everything():
        done = subprocess.run(["git", "-C", REPOSITORY, "status", "--porcelain", "--untracked-files=all"], capture_output=True, text=True)
        return done.stdout if done.returncode == 0 else ""
    before = everything()
    params = dict(objects=1, fewer=1, captions=1, size=32, recipes=["primitives"], first="primitives")
    result = run_notebook("zeroverse_gallery", params, out=tmp_path / "run", echo=False)
    assert result.ok, result.error
    assert result.metrics["objects"] == 1 and (tmp_path / "run/report.html").exists()
    assert everything() == before and [path.name for path in tmp_path.iterdir()] == ["run"]
