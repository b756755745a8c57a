"""The catalog: its tables against the pictures themselves, the same bytes in any order, and what damage and bad questions get."""
import json, shutil
from dataclasses import replace

import numpy as np
import pytest
import torch

from zerolab.data.catalog import (MESH_COLUMNS, TABLES, VIEW_COLUMNS, checked_rows, finalize, manifest_path, manifests, measure_shards, object_row,
                                  query, read_rows, rows_path, sha256, shard_problem, verify, write_manifest)
from zerolab.data.checks import CHECKS, MESH_CHECKS, check_dataset, checks_page, judge, measure_views
from zerolab.data.shards import ShardDataset, ShardError, write_shards
from zerolab.scene.cameras import random_views
from zerolab.scene.views import Views


V = 12


def speckled(seed, size=16, views=V, **more):
    "A speckled square in the middle of each picture; its cameras are those of its seed."
    rng = np.random.default_rng(seed)
    rgba = rng.integers(40, 220, (views, size, size, 4), dtype=np.uint8)
    rgba[..., 3] = 255
    rgba[:, :3] = rgba[:, -3:] = rgba[:, :, :3] = rgba[:, :, -3:] = 0
    about = dict(caption=f"speckles '{seed}'", source="test", seed=seed) | more
    return Views(torch.from_numpy(rgba), random_views(rng, views, size=(size, size)), **about)


@pytest.fixture
def folder(tmp_path):
    "Five objects in three shards: 3 is a copy of 1 under another seed, 4 has an empty view."
    objects = [speckled(seed) for seed in range(5)]
    objects[3] = replace(objects[1], seed=30)
    rgba = objects[4].rgba.clone(); rgba[2] = 0
    objects[4] = replace(objects[4], rgba=rgba)
    write_shards(objects, tmp_path/"d", samples_per_shard=2)
    measure_shards(tmp_path/"d")
    return tmp_path/"d"


def contents(folder): return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.is_file()}


def test_the_tables_are_what_the_pictures_say(folder):
    dataset = ShardDataset(folder)
    views = query(folder, "FROM views ORDER BY key, view")
    assert [(row["key"], row["seed"], row["view"]) for row in views] == [(key, views_.seed, view) for key, views_ in enumerate(dataset) for view in range(V)]
    for key, stored in enumerate(dataset):
        rows, measured = views[V*key:V*key + V], measure_views(stored)
        for name, values in measured.items():
            told = np.array([np.nan if row[name] is None else row[name] for row in rows])
            assert told == pytest.approx(values, rel=6e-6, nan_ok=True), name
        assert [row["touching"] for row in rows] == (measured["border"] > 0).tolist()
        assert [row["distance"] for row in rows] == pytest.approx(np.linalg.norm(stored.cameras.centers.numpy(), axis=1), rel=6e-6)
    objects = query(folder, "FROM objects")
    assert [row["shard"] for row in objects] == ["000000", "000000", "000001", "000001", "000002"]
    assert [(row["caption"], row["views"], row["height"]) for row in objects] == [(views.caption, V, 16) for views in dataset]
    lengths = [index.images[index.first[i]:index.first[i + 1], :, 1] for index in dataset.indexes for i in range(len(index))]
    assert [row["bytes"] for row in objects] == [int(each.sum()) for each in lengths]
    assert [row["copies"] for row in query(folder, "FROM checks")] == [1, 2, 1, 2, 1] and query(folder, "FROM checks")[3]["copy_of"] == 1
    assert query(folder, "FROM failures") == [] and objects[0]["triangles"] is None


def test_bad_is_what_judge_says(folder):
    rows, measured = query(folder, "FROM checks"), check_dataset(folder)
    assert [row["bad"] for row in rows] == [[], ["copies"], [], ["copies"], ["smallest"]]
    for row, other in zip(rows, measured): assert bool(row["bad"]) == other["bad"]
    random = np.random.default_rng(0)
    for name in [check.name for check in (*CHECKS, *MESH_CHECKS)]: assert name in rows[0], name
    def drawn(check):
        "A value beyond, on or within the limits of a check."
        value = float(random.choice([check.low, check.high, 1, 0]).clip(-9, 9e5))
        return int(value) if MESH_COLUMNS.get(check.name) == "INTEGER" else value
    limited = [check for check in (*CHECKS, *MESH_CHECKS) if check.name != "copies"]
    faults = [dict(seed=k, source="s", key=k, checks={check.name: drawn(check) for check in limited} | dict(pictures=str(k)), pictures=[]) for k in range(30)]
    (folder/"9.tar").write_bytes(b"x")
    write_manifest(folder/"9.tar", folder/"9.tar", faults)
    finalize(folder)
    told = judge([dict(row["checks"], copies=1) for row in faults], (*CHECKS, *MESH_CHECKS))
    asked = query(folder, "SELECT bad FROM checks WHERE source = 's' ORDER BY key")
    for row, other in zip(told, asked): assert [reason.split(": ")[1].split(" is ")[0] for reason in row["reasons"]] == other["bad"]


def test_any_order_of_work_gives_the_same_tables(folder, tmp_path):
    before = contents(folder/"catalog")
    assert sorted(before) == ["catalog.json", *sorted(f"{name}.parquet" for name in TABLES)]
    stamp = json.loads(before["catalog.json"])
    assert stamp["tables"] == {name: sha256(folder/"catalog"/f"{name}.parquet") for name in TABLES}
    assert (stamp["shards"], stamp["objects"], stamp["failures"]) == (3, 5, 0)
    for order in ([2, 0, 1], [1, 2, 0]):
        other = tmp_path/str(order)
        other.mkdir()
        for number in order:
            for path in folder.glob(f"00000{number}.*"): shutil.copy(path, other)
            finalize(other)
        assert contents(other/"catalog") == before
    for lost in TABLES:
        (folder/"catalog"/f"{lost}.parquet").write_bytes(b"no parquet")
        (folder/"catalog/.tmp-0123-views.parquet").write_bytes(b"left over")
        finalize(folder)
        assert contents(folder/"catalog") == before
    dates = {path: path.stat().st_mtime_ns for path in (folder/"catalog").iterdir()}
    finalize(folder)
    assert {path: path.stat().st_mtime_ns for path in (folder/"catalog").iterdir()} == dates, "up to date: nothing is written"


def test_a_set_in_which_everything_failed_has_empty_tables(tmp_path):
    write_manifest(tmp_path/"00000000-00000001.tar", None, [], [dict(seed=seed, kind="E", reason="it's 'so'; DROP TABLE rows") for seed in (1, 0)])
    finalize(tmp_path)
    assert query(tmp_path, "SELECT seed, shard, kind FROM failures") == [dict(seed=seed, shard="00000000-00000001", kind="E") for seed in (0, 1)]
    assert [query(tmp_path, f"SELECT count(*) AS n FROM {name}")[0]["n"] for name in ("objects", "views", "checks")] == [0]*3


def test_names_with_quotes_and_strange_captions(tmp_path):
    place = tmp_path/"it's \"here\" ü [1]*"
    write_shards([speckled(0, caption="a 'red' \"ball\"\n\u00fc, \u2603; -- {}", views=1)], place)
    measure_shards(place)
    assert query(place, "SELECT caption FROM objects") == [dict(caption="a 'red' \"ball\"\n\u00fc, \u2603; -- {}")]


def test_rows_survive_the_way_to_the_table(tmp_path):
    mesh, description = dict(triangles=12, complexity=np.float64(1.23456789)), dict(parts=[dict(kind="cube")], note="it's")
    row = object_row(speckled(7), [(10, 1), (20, 2)], mesh, key=7, cut=True, parts=np.int64(3), exposure=float("nan"), description=description)
    json.dumps(row, allow_nan=False)
    assert row["exposure"] is None and row["bytes"] == 30 and row["checks"]["complexity"] == 1.23457 and list(row["pictures"][0]) == list(VIEW_COLUMNS)
    (tmp_path/"0.tar").write_bytes(b"x")
    write_manifest(tmp_path/"0.tar", tmp_path/"0.tar", [row])
    assert read_rows(tmp_path/"0.tar") == [row]
    finalize(tmp_path)
    stored = query(tmp_path, "SELECT *, json_extract_string(description, '$.parts[0].kind') AS kind FROM objects")[0]
    assert (stored["cut"], stored["parts"], stored["triangles"], stored["kind"], stored["exposure"]) == (True, 3, 12, "cube", None)
    def name(files): return object_row(speckled(7), files, key=7)["checks"]["pictures"]
    assert name([(20, 2), (10, 1)]) == row["checks"]["pictures"] != name([(20, 2)])


def test_large_pictures_are_sampled_closely_enough():
    y, x = np.mgrid[:256, :256] + 0.5
    rgba = np.zeros((2, 256, 256, 4), np.uint8)
    rgba[..., :3] = np.random.default_rng(0).integers(0, 256, (256, 256, 3)) // 32 * 32
    rgba[:, np.hypot(x - 120, y - 140) < 60, 3] = 255
    rgba[..., :3][rgba[..., 3] == 0] = 0
    views = Views(torch.from_numpy(rgba), random_views(np.random.default_rng(0), 2, size=(256, 256)))
    row, exact = object_row(views, [], key=0), measure_views(views)
    assert row["pictures"][0]["coverage"] == pytest.approx(exact["coverage"][0], rel=0.02)
    assert row["pictures"][1]["texture"] == pytest.approx(exact["texture"][1], rel=0.1)


def test_the_page_comes_from_the_catalog(folder, tmp_path):
    rows = checked_rows(folder)
    assert [row["sample"] for row in rows] == list(range(5)) and [row["bad"] for row in rows] == [False, True, False, True, True]
    page = checks_page(rows, folder, tmp_path/"page.html", checks=(*CHECKS, *MESH_CHECKS)).read_text()
    assert "5 objects" in page and "3 bad" in page and "same as sample 1" in page
    assert [row["sample"] for row in checked_rows(folder, "len(checks.bad) > 0")] == [1, 3, 4]


def test_damage_is_found_without_being_made_worse(folder):
    assert verify(folder) == {}
    shard = folder/"000001.tar"
    whole, before = shard.read_bytes(), contents(folder)
    for place in (600, len(whole)//2, len(whole) - 1):       # a header, a picture, the padding at the end
        shard.write_bytes(whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1:])
        assert list(verify(folder)) == ["000001"]
        assert shard_problem(shard) is None
    shard.write_bytes(whole)
    for path in (manifest_path(shard), rows_path(shard)): path.unlink()          # as without a catalog: checksums of the index
    assert verify(folder) == {}
    shard.write_bytes(whole[:2000] + bytes([whole[2000] ^ 4]) + whole[2001:])
    assert "is not what was indexed" in verify(folder)["000001"]
    shard.write_bytes(whole)
    assert measure_shards(folder) == ["000001"] and contents(folder) == before
    shard.unlink()
    assert "000001.tar is missing" in verify(folder)["000001"] and shard not in manifests(folder)


def test_bad_input(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match="has no whole catalog: call finalize"): query(tmp_path, "SELECT 1")
    with pytest.raises(ValueError, match="query: .*tables: objects, views, checks, failures"): query(folder, "SELECT * FROM nothing")
    with pytest.raises(ValueError, match="query: "): query(folder, "SELEC")
    with pytest.raises(ShardError, match="holds no shards"): measure_shards(tmp_path/"none")
    rows_path(folder/"000000.tar").write_bytes(b"no gzip")
    shutil.rmtree(folder/"catalog")
    with pytest.raises(ValueError, match="catalog: "): finalize(folder)
    assert not (folder/"catalog/catalog.json").exists() and not list((folder/"catalog").glob(".*"))
