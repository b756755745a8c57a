"""The job that makes a data set: killed anywhere, on any number of workers, several at once, on a full disk, with failures and damage."""
import contextlib, hashlib, io, json, os, random, signal, subprocess, sys, time
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from faults import file_size_limit, forked, killed_before_file_operation
from zerolab.data import make
from zerolab.data.catalog import finalize, query, release_claim, shard_problem, take_claim
from zerolab.data.make import all_around, make_zeroverse, part_of
from zerolab.data.shards import ShardDataset
from zerolab.shapes import zeroverse

PLAIN = zeroverse.Recipe(count_weights=(1,), resolution=6, texture_size=16)     # what is made here is quick to make
SMALL = dict(recipe=PLAIN, views=2, size=16, supersample=1, light_resolution=16, samples_per_shard=3, progress=False)


def files(folder):
    "Name and hash of every file, hidden ones too."
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.rglob("*")) if path.is_file()}


def said(function, *arguments, **settings):
    "What a call wrote to stderr."
    with contextlib.redirect_stderr(io.StringIO()) as text: function(*arguments, **settings)
    return text.getvalue()


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    "What an undisturbed run of twelve objects leaves: four shards with index, rows and manifest, four tables with their stamp, the settings."
    folder = make_zeroverse(tmp_path_factory.mktemp("job")/"whole", range(12), **SMALL)
    assert len(files(folder)) == 4*4 + 5 + 1
    return folder


@pytest.mark.parametrize("kills", [6, pytest.param(20, marks=pytest.mark.slow)])
def test_kills_at_random_moments(whole, tmp_path, kills):
    "SIGKILL at random moments, each run going on where the one before it was killed."
    rng, killed, folder, expected, unfinished = random.Random(0), 0, tmp_path/"0", files(whole), 0
    job = partial(make_zeroverse, seeds=range(12), **SMALL)
    started = time.perf_counter()
    make_zeroverse(tmp_path/"timed", range(12), **SMALL)
    took = time.perf_counter() - started
    while killed < kills:
        process = forked(job, folder)
        time.sleep(rng.uniform(0, 0.7*took))
        os.kill(process, signal.SIGKILL)
        ended_before = not os.WIFSIGNALED(os.waitpid(process, 0)[1])
        killed += not ended_before
        unfinished += not (folder/"catalog/catalog.json").exists()
        if ended_before or rng.random() < 0.25:      # look at it, and begin a new one
            assert files(job(folder)) == expected
            folder = tmp_path/str(killed + 100*ended_before)
    assert files(job(folder)) == expected and unfinished >= kills//4


@pytest.mark.parametrize("every", [7, pytest.param(1, marks=pytest.mark.slow)])
def test_killed_before_any_file_operation(tmp_path, every):
    "Not by chance: before each (each seventh) rename, removal, sync and new folder of a run with a shard, a failure and the tables."
    job = partial(make_zeroverse, seeds=range(3), cameras=all_but_seed_1, **{**SMALL, "samples_per_shard": 2})
    said(job, tmp_path/"whole")
    expected, number, killed = files(tmp_path/"whole"), 0, True
    while killed:
        folder = tmp_path/str(number)
        killed = killed_before_file_operation(job, folder, number)
        said(job, folder)
        assert files(folder) == expected, f"killed before file operation {number}"
        assert not [path for path in folder.rglob("*") if path.name.startswith(".")]
        number += every
    assert number > 40


@pytest.mark.parametrize("workers", [2, pytest.param(8, marks=pytest.mark.slow)])
def test_the_number_of_workers_changes_no_byte(whole, tmp_path, workers):
    assert files(make_zeroverse(tmp_path/"d", range(12), workers=workers, **SMALL)) == files(whole)


def test_ranges_and_parts_make_what_one_run_makes(whole, tmp_path):
    folder = tmp_path/"d"
    for part in (2, 0, 1): make_zeroverse(folder, part_of(range(12), part, 3, SMALL["samples_per_shard"]), **SMALL)
    assert files(folder) == files(whole)
    apart = [files(make_zeroverse(tmp_path/f"part {part}", part_of(range(12), part, 2, 3), **SMALL)) for part in range(2)]
    shards = [{name: value for name, value in part.items() if name[0] == "0"} for part in apart]
    assert shards[0] | shards[1] == {name: value for name, value in files(whole).items() if name[0] == "0"} and not shards[0].keys() & shards[1].keys()


def test_two_jobs_on_one_folder_share_the_work(whole, tmp_path):
    "Both run at once; no block is written twice, each writes some, and together they leave what one leaves."
    folder, log = tmp_path/"d", tmp_path/"log"
    def job(folder):
        write = make.write_block
        def logged(directory, block, attempts):
            manifest = write(directory, block, attempts)
            with open(log, "a") as file: file.write(f"{os.getpid()} {manifest['shard']}\n")
            time.sleep(0.05)
            return manifest
        make.write_block = logged
        make_zeroverse(folder, range(12), **SMALL)
    processes = [forked(job, folder) for _ in range(2)]
    assert [os.waitpid(process, 0)[1] for process in processes] == [0, 0]
    written = [line.split() for line in log.read_text().splitlines()]
    assert sorted(name for _, name in written) == sorted(path.stem for path in whole.glob("*.tar"))
    assert len({process for process, _ in written}) == 2
    assert files(folder) == files(whole)


def test_a_job_waits_for_another_and_takes_over_when_that_dies(whole, tmp_path):
    folder = tmp_path/"d"
    def stalled(folder):
        make.write_block = lambda *arguments: (print("claimed", file=open(tmp_path/"sign", "w"), flush=True), time.sleep(3600))
        make_zeroverse(folder, range(12), **SMALL)
    other = forked(stalled, folder)
    while not (tmp_path/"sign").exists(): time.sleep(0.01)
    def kill_soon(told=[]):
        "The end of waiting: what is said first, then the other's death."
        told.append(1)
        if len(told) == 2: os.kill(other, signal.SIGKILL); os.waitpid(other, 0)
    sleep = time.sleep
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(make.time, "sleep", lambda seconds: (kill_soon(), sleep(0.01)))
        text = said(make_zeroverse, folder, range(12), **SMALL)
    assert f"3 objects are being made by process {other} on " in text and "waiting for them" in text
    assert files(folder) == files(whole)


def test_ragged_ranges_at_once_do_not_double_a_seed(tmp_path):
    folder = tmp_path/"d"
    processes = [forked(partial(make_zeroverse, seeds=seeds, **SMALL), folder) for seeds in (range(0, 8), range(1, 11), range(4, 7))]
    assert [os.waitpid(process, 0)[1] for process in processes] == [0]*3
    assert [int(key) for index in ShardDataset(folder).indexes for key in index.keys] == list(range(11))
    assert query(folder, "SELECT count(*) AS n, count(DISTINCT seed) AS seeds FROM objects") == [dict(n=11, seeds=11)]


def test_jobs_with_other_settings_are_refused_even_at_once(tmp_path):
    processes = [forked(partial(make_zeroverse, seeds=range(6), **{**SMALL, "size": size}), tmp_path/"d") for size in (16, 24)]
    assert sorted(os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) for process in processes) == [0, 1]
    assert len({views.size for views in ShardDataset(tmp_path/"d")}) == 1


def all_but_seed_1(rng, size):
    if rng.bit_generator.seed_seq.entropy[1] == 1: raise ArithmeticError("nowhere to stand")
    return all_around(rng, size, views=2)


BROKEN = {}      # seed -> error, for `moody`


def moody(rng, size):
    seed = rng.bit_generator.seed_seq.entropy[1]
    if seed in BROKEN: raise BROKEN[seed]
    return all_around(rng, size, views=2)


def test_failures_are_recorded_and_retried_by_query(tmp_path):
    job = partial(make_zeroverse, seeds=range(9), cameras=moody, **SMALL)
    BROKEN.clear()
    expected = files(job(tmp_path/"lucky"))
    BROKEN.update({1: MemoryError("no room"), 3: ArithmeticError("3"), 4: ArithmeticError("4"), 5: ArithmeticError("5")})   # 3 to 5: a whole block
    folder = tmp_path/"d"
    assert "4 of 9 objects failed, seed 1 with MemoryError: no room" in said(job, folder)
    before = files(folder)
    assert not (folder/"00000003-00000005.tar").exists() and [views.seed for views in ShardDataset(folder)] == [0, 2, 6, 7, 8]
    assert query(folder, "SELECT seed, kind, reason, shard FROM failures")[:2] == [
        dict(seed=1, kind="MemoryError", reason="no room", shard="00000000-00000002"),
        dict(seed=3, kind="ArithmeticError", reason="3", shard="00000003-00000005")]
    said(job, folder)
    assert files(folder) == before, "without being asked, nothing is tried again, and nothing changes"
    said(job, folder, retry="true")
    assert files(folder) == before, "the same failures again"
    BROKEN.clear()
    said(job, folder, retry="kind = 'MemoryError' OR seed = 4")
    assert [views.seed for views in ShardDataset(folder)] == [0, 1, 2, 4, 6, 7, 8] and [row["seed"] for row in query(folder, "FROM failures")] == [3, 5]
    assert said(job, folder, retry="reason IN ('3', '5')") == "" and files(folder) == expected


def test_a_shard_is_not_mended_from_damaged_samples(tmp_path):
    job = partial(make_zeroverse, seeds=range(3), cameras=moody, **SMALL)
    BROKEN.clear()
    expected = files(job(tmp_path/"lucky"))
    BROKEN[1] = ArithmeticError("1")
    said(job, tmp_path/"d")
    flip(tmp_path/"d/00000000-00000002.tar", 4000)
    BROKEN.clear()
    assert "SHA-256 differs" in said(job, tmp_path/"d", retry="true")
    assert files(tmp_path/"d") == expected


def test_when_everything_fails_the_job_stops(tmp_path):
    BROKEN.update({seed: ArithmeticError("nowhere") for seed in range(40)})
    with pytest.raises(ValueError, match="16 objects in a row failed, so it is not the objects; seed 15: ArithmeticError: nowhere"):
        make_zeroverse(tmp_path/"d", range(40), cameras=moody, **{**SMALL, "samples_per_shard": 40})
    BROKEN.clear()
    assert list(files(tmp_path/"d")) == ["dataset.json"]


def test_a_full_disk_stops_with_a_message_and_loses_nothing(whole, tmp_path):
    "No file may grow beyond a limit: of the settings, of rows, of a shard, of the tables."
    sizes = {path.suffix: path.stat().st_size for path in whole.rglob("*") if path.is_file()}
    limits = {"settings": 100, "rows": sizes[".gz"] - 1, "shard": sizes[".tar"] - 1}
    for what, limit in limits.items():
        folder = tmp_path/what
        with file_size_limit(limit), pytest.raises(OSError, match="too large; what is written is whole: make room and run the same again"):
            make_zeroverse(folder, range(12), **SMALL)
        assert not list(folder.glob("*.tar")) and not [path for path in folder.iterdir() if path.name.startswith(".")], what
        assert files(make_zeroverse(folder, range(12), **SMALL)) == files(whole), what
    folder = tmp_path/"rows"
    for path in (folder/"catalog").iterdir(): path.unlink()
    with file_size_limit(1000), pytest.raises(OSError, match="catalog: .*make room and run the same again"): make_zeroverse(folder, range(12), **SMALL)
    assert not list((folder/"catalog").glob("*.json"))
    assert files(make_zeroverse(folder, range(12), **SMALL)) == files(whole)


def flip(path, place):
    data = bytearray(path.read_bytes()); data[place] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("damage,says,deep", [
    (lambda shard: flip(shard, 4000), "is not what was written (SHA-256 differs from its manifest)", True),
    (lambda shard: shard.write_bytes(shard.read_bytes()[:3000]), "is cut short or damaged", False),
    (lambda shard: shard.write_bytes(shard.read_bytes() + bytes(512)), "its manifest says", False),
    (lambda shard: flip(shard.with_suffix(".rows.gz"), 40), "rows.gz is not what was written", False),
    (lambda shard: shard.with_suffix(".rows.gz").unlink(), "rows.gz is not what was written", False),
    (lambda shard: shard.with_suffix(".json").write_text("{"), "is no JSON that can be read", False),
    (lambda shard: shard.with_suffix(".index.npz").write_bytes(b"no index"), "", False),
    (lambda shard: shard.with_suffix(".index.npz").unlink(), "", False),
    (lambda shard: shard.unlink(), "", False)])
def test_damage_is_found_said_and_mended(whole, tmp_path, damage, says, deep):
    import shutil
    folder = tmp_path/"d"
    shutil.copytree(whole, folder)
    damage(folder/"00000003-00000005.tar")
    if deep: assert said(make_zeroverse, folder, range(12), **SMALL) == "", "every byte is only read when asked"
    text = said(make_zeroverse, folder, range(12), verify=deep, **SMALL)
    assert says in text and ("made again" in text) == bool(says) and "00000000-" not in text
    assert files(folder) == files(whole)


def test_a_data_set_from_before_the_catalog_goes_on(whole, tmp_path):
    "Shards and indexes alone, and settings without the newer names: nothing is made again, and new shards get rows."
    folder = tmp_path/"d"
    folder.mkdir()
    for path in sorted(whole.glob("*.tar"))[:2]: (folder/path.name).write_bytes(path.read_bytes())
    settings = {name: value for name, value in json.loads((whole/"dataset.json").read_text()).items() if name not in ("light", "passes", "samples_per_shard")}
    (folder/"dataset.json").write_text(json.dumps(settings))
    dates = {path.name: path.stat().st_mtime_ns for path in folder.glob("*.tar")}
    make_zeroverse(folder, range(12), **SMALL)
    assert {name: (folder/name).stat().st_mtime_ns for name in dates} == dates
    assert query(folder, "SELECT min(seed) AS first, count(*) AS n FROM objects") == [dict(first=6, n=6)]
    shards = [{name: value for name, value in files(each).items() if name.endswith(".tar")} for each in (folder, whole)]
    assert shards[0] == shards[1]


def test_light_and_facts_in_the_catalog(tmp_path):
    job = partial(make_zeroverse, seeds=range(4), **{**SMALL, "recipe": zeroverse.PAPER, "size": 48})
    dome, sky = job(tmp_path/"dome"), job(tmp_path/"sky", light="environment", passes=("normals", "depth"))
    assert set(ShardDataset(sky).passes(0, [1])) == {"depth", "normals"} and ShardDataset(dome).passes(0, [1]) == {}
    rows = query(sky, "SELECT * FROM objects JOIN checks USING (key, seed, triangles, materials)")
    for row, views in zip(rows, ShardDataset(sky)):
        shape = zeroverse.make_shape(row["seed"], zeroverse.PAPER)
        assert (row["caption"], row["dense_caption"], json.loads(row["description"])) == (
            shape.caption, shape.dense_caption, json.loads(json.dumps(shape.description)))
        assert (row["triangles"], row["materials"]) == (len(shape.mesh.faces), len(shape.mesh.albedo))
        assert (row["cut"], row["wire"], row["recipe"], row["light"]) == (shape.cut is not None, shape.wire is not None, "paper", "environment")
        assert row["parts"] == sum(part.removed < 1 for part in shape.parts) and 0 < row["exposure"] <= 1 and row["bright"] < 0.05
        assert row["bytes"] > 1000 and row["longest"] == pytest.approx(1.8, abs=1e-3)
    colours = [np.stack([views.rgba.numpy() for views in ShardDataset(folder)]).astype(float) for folder in (dome, sky)]
    assert (colours[0][..., 3] == colours[1][..., 3]).all() and np.abs(colours[0] - colours[1])[colours[0][..., 3] == 255].mean() > 3
    cameras = query(sky, "SELECT * FROM views ORDER BY key, view")
    centers = np.concatenate([views.cameras.centers.numpy() for views in ShardDataset(sky)])
    angles = np.radians([[row["azimuth"], row["elevation"]] for row in cameras])
    towards = np.stack([np.cos(angles[:, 1])*np.cos(angles[:, 0]), np.cos(angles[:, 1])*np.sin(angles[:, 0]), np.sin(angles[:, 1])], 1)
    assert np.abs(towards*np.array([[row["distance"]] for row in cameras]) - centers).max() < 1e-4


def dies_of_5(number):
    "An item that kills its process."
    if number == 5: os.kill(os.getpid(), signal.SIGKILL)
    return number


@pytest.mark.slow
def test_an_object_that_kills_its_process_is_told_from_the_others():
    assert list(make.parallel_map(dies_of_5, range(12), 2, lambda item: f"lost {item}")) == [0, 1, 2, 3, 4, "lost 5", *range(6, 12)]
    with pytest.raises(make.BrokenProcessPool): list(make.parallel_map(dies_of_5, range(7), 2))


@pytest.mark.slow
def test_the_command_makes_the_same_as_the_function(tmp_path):
    arguments = "--objects 12 --recipe primitives --views 2 --size 16 --supersample 1 --light-resolution 16 --samples-per-shard 3 --format webp --workers 1"
    command = [sys.executable, "-c", "import sys; from zerolab.jobs.cli import main; sys.exit(main())", "make", str(tmp_path/"d"), *arguments.split()]
    said = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[1])
    assert said.returncode == 0 and "12 objects with 2 views each" in said.stdout, said
    assert files(tmp_path/"d") == files(make_zeroverse(tmp_path/"e", range(12), **{**SMALL, "recipe": zeroverse.PRIMITIVES}))


def test_a_folder_of_materials_may_lie_elsewhere(tmp_path):
    "On another machine of a fleet; what it holds is what counts."
    from PIL import Image
    def photos(name, red):
        (tmp_path/name/"wood").mkdir(parents=True)
        Image.new("RGB", (8, 8), (red, 60, 30)).save(tmp_path/name/"wood/basecolor.png")
        return {**SMALL, "recipe": zeroverse.with_materials(PLAIN, tmp_path/name)}
    here, there, other = photos("here", 90), photos("there", 90), photos("other", 91)
    make_zeroverse(tmp_path/"d", range(3), **here)
    make_zeroverse(tmp_path/"d", range(6), **there)
    assert files(tmp_path/"d") == files(make_zeroverse(tmp_path/"e", range(6), **here))
    with pytest.raises(ValueError, match="was made with recipe"): make_zeroverse(tmp_path/"d", range(9), **other)


def test_claims(tmp_path):
    path = tmp_path/".claim"
    process = forked(lambda path: (take_claim(path), time.sleep(3600)), path)
    while not path.exists() or not path.read_text(): time.sleep(0.01)
    assert take_claim(path) is None
    os.kill(process, signal.SIGKILL); os.waitpid(process, 0)
    claim = take_claim(path)
    assert claim is not None, "the claim of a dead process is free"
    release_claim(path, claim)
    assert not path.exists()


def test_shard_problem_says_nothing_of_a_sound_shard(whole):
    assert [shard_problem(path, deep) for path in whole.glob("*.tar") for deep in (False, True)] == [None]*8
    before = files(whole)
    finalize(whole)
    assert files(whole) == before
