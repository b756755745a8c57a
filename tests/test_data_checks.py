"Checks of data sets: measures against independent formulas, planted defects, damage on the disk, and what the page holds."
import base64, csv, io, json, re, time
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies
from PIL import Image
from scipy.spatial.transform import Rotation

from chromium import Browser, chromium
from zerolab.data.checks import (CHECKS, MESH_CHECKS, Check, angular_gap, border_contact, check_dataset, check_mesh, check_views, checks_page,
                                 complexity, coverage, edge_table, exposure, judge, mark_copies, picture_hash, save_rows, texture_variance)
from zerolab.data.shards import ShardDataset, ShardError, write_shards
from zerolab.scene.cameras import Cameras, look_at, orbit, random_views
from zerolab.scene.mesh import Mesh
from zerolab.scene.views import Views
from zerolab.shapes.zeroverse import HEIGHT_FIELD, make_shape


def blob(seed, views=4, size=(20, 24)):
    "A sound object: a speckled ellipse in the middle of each picture."
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:size[0], :size[1]]
    inside = ((y - size[0]/2)/7)**2 + ((x - size[1]/2)/8)**2 < 1
    rgba = rng.integers(40, 220, (views, *size, 4), dtype=np.uint8)
    rgba[..., 3] = 255
    rgba[:, ~inside] = 0
    return Views(torch.from_numpy(rgba), random_views(np.random.default_rng(7), views, size=size), f"blob {seed}", "test", seed)


def edited(views, change, view=2):
    rgba = views.rgba.clone()
    rgba[view] = change(rgba[view])
    return replace(views, rgba=rgba)


def grey(value):
    "Paint a picture [H,W,4] in one grey."
    return lambda rgba: torch.where(rgba[..., 3:] > 0, torch.tensor([value, value, value, 255], dtype=torch.uint8), torch.zeros_like(rgba))


def reasons(views, checks=CHECKS): return {reason.split(":")[0] for reason in judge([check_views(views)], checks)[0]["reasons"]}


def box(faces=None):
    corners = np.array([[x, y, z] for z in (-1, 1) for y in (-1, 1) for x in (-1, 1)], np.float32)
    quads = [(0, 2, 3, 1), (4, 5, 7, 6), (0, 1, 5, 4), (2, 6, 7, 3), (0, 4, 6, 2), (1, 3, 7, 5)]
    return triangles(corners, np.array([t for a, b, c, d in quads for t in ((a, b, c), (a, c, d))]) if faces is None else faces)


def triangles(positions, faces):
    count = len(positions)
    return Mesh(positions, np.tile([0., 0, 1], (count, 1)), np.zeros((count, 2)), np.asarray(faces, np.int32), np.zeros(len(faces), np.int32),
                np.zeros((1, 1, 1, 3), np.uint8), np.ones(1), np.zeros(1))


def test_measures_against_loops():
    "Every pixel looked at by itself."
    rng = np.random.default_rng(0)
    rgba = rng.integers(0, 256, (3, 7, 5, 4), dtype=np.uint8)
    for column, value in enumerate((2, 3, 252, 253, 255)): rgba[:2, :, column, :3] = value
    rgba[rgba[..., 3] == 0] = 0
    views = Views(torch.from_numpy(rgba), orbit([0., 10, 20], size=(7, 5)))
    light = exposure(views)
    for view, picture in enumerate(rgba):
        covered = [tuple(map(int, p)) for p in picture.reshape(-1, 4) if p[3] >= 128]
        decode = lambda c: c/255/12.92 if c/255 <= 0.04045 else ((c/255 + 0.055)/1.055)**2.4
        border = [picture[y, x, 3] >= 128 for y in range(7) for x in range(5) if y in (0, 6) or x in (0, 4)]
        assert coverage(views)[view] == pytest.approx(picture[..., 3].mean()/255)
        assert border_contact(views)[view] == pytest.approx(sum(border)/len(border))
        assert light["dark"][view] == pytest.approx(sum(max(p[:3]) <= 2 for p in covered)/len(covered))
        assert light["bright"][view] == pytest.approx(sum(min(p[:3]) >= 253 for p in covered)/len(covered))
        luminance = [0.2126*decode(r) + 0.7152*decode(g) + 0.0722*decode(b) for r, g, b, _ in covered]
        assert light["luminance"][view] == pytest.approx(sum(luminance)/len(covered))
        assert texture_variance(views)[view] == pytest.approx(np.mean([np.var([p[c]/255 for p in covered]) for c in range(3)]))


@settings(max_examples=60, deadline=None)
@given(strategies.integers(0, 10**6), strategies.integers(1, 12), strategies.sampled_from(["sphere", "cap", "plane", "cone"]))
def test_the_gap_is_that_of_a_search_and_turns_with_the_cameras(seed, count, kind):
    rng = np.random.default_rng(seed)
    points = rng.normal(size=(count, 3))
    if kind == "cap": points = points*0.2 + [0, 0, 1]
    if kind == "plane": points[:, 2] = 0
    if kind == "cone": points[:, 2] = 0.5*np.linalg.norm(points[:, :2], axis=1)
    points /= np.linalg.norm(points, axis=1, keepdims=True)
    gap = angular_gap(look_at(points*rng.uniform(1, 3, (count, 1)), dtype=torch.float64))
    tried = rng.normal(size=(20_000, 3))
    tried = np.concatenate([tried/np.linalg.norm(tried, axis=1, keepdims=True), -points])
    found = np.degrees(np.arccos((tried @ points.T).max(1).clip(-1, 1).min()))
    assert found - 1e-3 <= gap <= found + 4
    turned = points @ Rotation.random(random_state=seed).as_matrix().T
    assert angular_gap(look_at(turned*2, dtype=torch.float64)) == pytest.approx(gap, abs=1e-3)


def test_sound_objects_are_not_flagged():
    assert [reasons(blob(seed)) for seed in range(20)] == [set()]*20


@pytest.mark.parametrize("change,expected", [
    (torch.zeros_like, {"a view is empty (view 2)"}),
    (grey(0), {"a view is black (view 2)", "a view is too dark (view 2)"}),
    (grey(255), {"a view is burnt out (view 2)"}),
    (lambda rgba: rgba[10:11, 12:13].expand(20, 24, 4), {"a view is filled (view 2)", "a view is cropped (view 2)"})])
def test_a_defect_of_one_view_is_found_where_it_is(change, expected):
    assert reasons(edited(blob(3), change)) == expected


def test_defects_of_the_object():
    plain = blob(1)
    assert reasons(replace(plain, rgba=torch.stack([grey(128)(picture) for picture in plain.rgba]))) == {"there is no texture (view 0)"}
    assert reasons(replace(plain, cameras=orbit([0, 5, 10, 15], size=plain.size))) == {"a side is never seen (degrees)"}
    nothing = replace(plain, rgba=torch.zeros_like(plain.rgba))
    row = check_views(nothing)
    assert row["dimmest"] is None and row["texture"] is None and reasons(nothing) == {"a view is empty (view 0)"}
    json.dumps(row, allow_nan=False)


def test_limits_can_be_changed_and_a_value_on_the_limit_is_sound():
    row = dict(size=0.5)
    assert not judge([row], [Check("size", "too small", low=0.5), Check("size", "too large", high=0.5)])[0]["bad"]
    assert judge([row], [Check("size", "too small", low=0.500001, percent=True)])[0]["reasons"] == ["too small: size is 50 %, need at least 50 %"]
    strict = tuple(replace(check, low=0.9) if check.name == "smallest" else check for check in CHECKS)
    assert reasons(blob(1), strict) == {f"a view is empty (view {check_views(blob(1))['smallest_view']})"}


def test_copies_through_a_chain():
    "0 and 1 share pictures, 1 and 2 a seed: all three are one object; rows that were not read take no part."
    names = [("a", 1), ("a", 2), ("b", 2), ("c", -1), ("d", -1)]
    rows = [dict(sample=10 + i, pictures=pictures, source="s", seed=seed) for i, (pictures, seed) in enumerate(names)]
    rows.insert(1, dict(sample=99, error="lost"))
    mark_copies(rows)
    assert [(row.get("copies"), row.get("copy_of")) for row in rows] == [(3, 10), (None, None), (3, 10), (3, 10), (1, 13), (1, 14)]
    mark_copies([])


def test_the_hash_ignores_order_and_nothing_else():
    views = blob(5)
    assert picture_hash(views[[3, 1, 0, 2]]) == picture_hash(views) == picture_hash(replace(views, caption="x", seed=9))
    one = views.rgba.clone(); one[1, 10, 12, 0] ^= 1
    assert len({picture_hash(v) for v in (views, views[[0, 1, 2]], views[[0, 0, 1, 2, 3]], replace(views, rgba=one))}) == 4


@pytest.fixture
def mixed(tmp_path):
    objects = [blob(seed) for seed in range(9)]
    objects[2], objects[4] = edited(objects[2], torch.zeros_like), edited(objects[4], grey(0))
    objects[7] = replace(objects[5], seed=70, caption="<b>again</b> & \"again\"")
    return write_shards(objects, tmp_path/"shards", samples_per_shard=4)


def test_a_data_set_and_its_catalogue(mixed, tmp_path):
    rows = check_dataset(mixed, catalogue=tmp_path/"rows.json")
    assert [row["sample"] for row in rows] == list(range(9)) and [row["sample"] for row in rows if row["bad"]] == [2, 4, 5, 7]
    assert json.loads((tmp_path/"rows.json").read_text()) == rows
    assert check_dataset(mixed, workers=3) == rows
    save_rows(rows, tmp_path/"rows.csv")
    with open(tmp_path/"rows.csv", newline="") as file: table = list(csv.DictReader(file))
    assert [row["bad"] for row in table] == [str(row["bad"]) for row in rows] and table[7]["caption"] == "<b>again</b> & \"again\""
    assert float(table[3]["gap"]) == rows[3]["gap"] and table[2]["reasons"] == "; ".join(rows[2]["reasons"])


def test_memory_is_bounded(mixed, monkeypatch):
    "While the first sample takes its time, only a few others are read."
    read, started, seen = ShardDataset.__getitem__, [], []
    def slow_first(self, i):
        started.append(i)
        if i == 0:
            time.sleep(0.5)
            seen.append(len(started))
        return read(self, i)
    monkeypatch.setattr(ShardDataset, "__getitem__", slow_first)
    assert len(check_dataset(mixed, workers=2)) == 9 and 2 <= seen[0] <= 5


class Outline(HTMLParser):
    "What opens and closes, and what is loaded."
    def __init__(self): super().__init__(); self.open, self.sources, self.text, self.figures = [], [], "", 0
    def handle_starttag(self, tag, attributes):
        if tag not in ("meta", "img", "br", "rect"): self.open.append(tag)
        self.figures += tag == "figure"
        assert tag not in ("script", "link", "iframe", "object", "a")
        self.sources += [value for name, value in attributes if name in ("src", "href", "srcset")]
    def handle_endtag(self, tag):
        if tag != "rect": assert self.open.pop() == tag
    def handle_data(self, data): self.text += data


def test_the_page_is_whole_and_asks_for_nothing(mixed, tmp_path):
    page = checks_page(check_dataset(mixed), mixed, tmp_path/"page.html", examples=3, title="<shards>").read_text()
    outline = Outline(); outline.feed(page.partition("\n")[2])
    assert not outline.open and outline.figures == 3*len(CHECKS) and "default-src 'none'" in page and "<b>again" not in page
    assert "<shards>" in outline.text and '<b>again</b> & "again"' in outline.text and "4 bad" in outline.text
    assert len(outline.sources) == 3*len(CHECKS) and all(source.startswith("data:image/png;base64,") for source in outline.sources)
    first = Image.open(io.BytesIO(base64.b64decode(outline.sources[0].partition(",")[2])))
    assert np.ptp(np.asarray(first).reshape(-1, 3), axis=0).max() == 0 and first.size == (24, 20), "the worst of the first check is the empty view"
    assert "url(" not in page and not re.search(r"https?:", page)


@chromium
def test_the_page_fits_a_phone(mixed, tmp_path):
    page, browser = checks_page(check_dataset(mixed), mixed, tmp_path/"page.html"), Browser()
    try:
        for width in (390, 1280):
            browser.open(page, width=width, dark=width == 390)
            assert browser.evaluate("document.documentElement.scrollWidth") <= width
            assert browser.evaluate("[...document.images].every(i => i.naturalWidth > 0)")
        assert not browser.outside() and not browser.messages
    finally: browser.close()


def test_what_rots_on_the_disk_is_a_bad_row(mixed, tmp_path):
    index = ShardDataset(mixed).indexes[1]
    path = sorted(mixed.glob("*.tar"))[1]
    data = bytearray(path.read_bytes()); data[int(index.images[5, 0, 0]) + 20] ^= 1
    path.write_bytes(data)
    rows = check_dataset(mixed)
    assert rows[5]["bad"] and "000001.tar: member 00000005.01.webp" in rows[5]["reasons"][0] and [row["bad"] for row in rows].count(True) == 3
    page = checks_page(rows, mixed, tmp_path/"page.html").read_text()
    assert "1 cannot be read" in page and "00000005.01.webp" in page
    save_rows(rows, tmp_path/"rows.csv")


def test_bad_input(tmp_path, mixed):
    with pytest.raises(ShardError, match="holds no shards"): check_dataset(tmp_path)
    with pytest.raises(ValueError, match="workers is 0"): check_dataset(mixed, workers=0)
    with pytest.raises(ValueError, match=r"ends in '.parquet', need .json or .csv"): check_dataset(mixed, catalogue=tmp_path/"rows.parquet")
    with pytest.raises(ValueError, match="no rows"): checks_page([], mixed, tmp_path/"page.html")
    with pytest.raises(ValueError, match="camera 1 stands in the target"):
        angular_gap(Cameras(torch.eye(3).repeat(2, 1, 1), torch.stack([orbit([0.]).w2c[0], torch.eye(4)]), (8, 8)))
    with pytest.raises(ValueError, match="no triangle with an area"): complexity(triangles(np.array([[0, 0, 0], [1, 0, 0], [2, 0, 0.]]), [[0, 1, 2]]))


@settings(max_examples=15, deadline=None)
@given(strategies.integers(0, 10**6))
def test_complexity_does_not_know_size_place_turn_or_tessellation(seed):
    rng = np.random.default_rng(seed)
    mesh = make_shape(seed % 20).mesh if seed % 3 else box()
    moved = mesh.positions @ Rotation.random(random_state=seed).as_matrix().T*rng.uniform(0.2, 5) + rng.normal(size=3)
    assert complexity(replace(mesh, positions=moved)) == pytest.approx(complexity(mesh), rel=0.01)
    a, b, c = mesh.positions[mesh.faces].transpose(1, 0, 2)
    middle = (a + b + c)/3                                    # every triangle cut in three
    count = len(a)
    corners, i = np.concatenate([a, b, c, middle]), np.arange(count)
    faces = np.concatenate([np.stack([i + first*count, i + second*count, i + 3*count], 1) for first, second in ((0, 1), (1, 2), (2, 0))])
    assert complexity(triangles(corners, faces)) == pytest.approx(complexity(mesh), rel=0.02)


def test_convex_hulls_have_complexity_one_and_everything_else_more():
    from scipy.spatial import ConvexHull
    rng = np.random.default_rng(0)
    for _ in range(5):
        hull = ConvexHull(rng.normal(size=(30, 3)))
        faces = hull.simplices.copy()
        a, b, c = hull.points[faces].transpose(1, 0, 2)
        turned = (np.cross(b - a, c - a)*hull.equations[:, :3]).sum(1) < 0
        faces[turned] = faces[turned][:, ::-1]
        assert complexity(triangles(hull.points, faces)) == pytest.approx(1, abs=1e-4)
    plate = triangles(np.array([[0, 0, 1], [2, 0, 1], [2, 1, 1], [0, 1, 1.]]), [[0, 1, 2], [0, 2, 3]])
    assert complexity(plate) == pytest.approx(1, abs=1e-6), "an open edge turns by pi"
    assert all(complexity(make_shape(seed, HEIGHT_FIELD).mesh) > 1 for seed in range(4))


def test_faults_of_meshes():
    faces = box().faces
    assert edge_table(faces)[1].tolist() == [2]*18
    def found(faces): return {name for name in ("open_edges", "crowded_edges", "flipped_edges") if check_mesh(box(faces))[name]}
    assert found(faces) == set() and found(faces[2:]) == {"open_edges"} and found(np.concatenate([faces, faces[:1]])) == {"crowded_edges"}
    beside = triangles(np.concatenate([box().positions, box().positions + [2, 2, 0]]), np.concatenate([faces, faces + 8]))
    row = check_mesh(beside)
    assert (row["touching_edges"], row["crowded_edges"], row["open_edges"], row["flipped_edges"]) == (1, 0, 0, 0), "two solids that share an edge"
    assert found(np.concatenate([faces[:1, ::-1], faces[1:]])) == {"flipped_edges"} and found(faces[:, ::-1]) == set()
    row = check_mesh(box())
    assert (row["triangles"], row["places"], row["longest"], row["off_centre"]) == (12, 8, 2, 0) and row["radius"] == pytest.approx(3**0.5)
    assert {reason.split(":")[0] for reason in judge([row], MESH_CHECKS)[0]["reasons"]} == {"it is not scaled to Zeroverse's 1.8"}
    assert not judge([check_mesh(make_shape(4))], MESH_CHECKS)[0]["bad"], "a Shape is as good as its mesh"
