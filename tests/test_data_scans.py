"Scans: what foreign files hold, what broken ones get, and a downloader against a server that misbehaves."
import hashlib
import io
import json
import threading
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import trimesh
from PIL import Image

from zerolab.data import scans
from zerolab.data.scans import crease_normals, download_gso, list_scans, load_mesh, palette, scan_name, scan_views, scans_folder
from zerolab.render.mesh import render_mesh
from zerolab.scene.cameras import look_at, orbit

QUARTERS = np.zeros((8, 8, 3), np.uint8)
QUARTERS[:4, :4], QUARTERS[:4, 4:], QUARTERS[4:, :4], QUARTERS[4:, 4:] = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0)


def picture_plate():
    "A plate in the plane x=0, z up, seen from +x: its picture's first row is on top and its first column on the left."
    vertices = np.array([[0, -1, -1], [0, 1, -1], [0, 1, 1], [0, -1, 1]], float)
    uv = np.array([[0, 0], [1, 0], [1, 1], [0, 1]], float)  # trimesh: v from the last row
    material = trimesh.visual.material.PBRMaterial(baseColorTexture=Image.fromarray(QUARTERS), roughnessFactor=1., metallicFactor=0.)
    return trimesh.Trimesh(vertices, [[0, 1, 2], [0, 2, 3]], process=False, visual=trimesh.visual.TextureVisuals(uv=uv, material=material))


Y_UP = np.array([[1., 0, 0, 0], [0, 0, 1, 0], [0, -1, 0, 0], [0, 0, 0, 1]])  # z-up to glTF's y-up


def write_glb(path, *geometries, transforms=None):
    scene = trimesh.Scene()
    for i, geometry in enumerate(geometries):
        scene.add_geometry(geometry, node_name=f"n{i}", transform=Y_UP @ (np.eye(4) if transforms is None else transforms[i]))
    path.write_bytes(scene.export(file_type="glb"))
    return path


def corner_colours(mesh):
    picture = render_mesh(mesh, look_at([[3., 0, 0]], size=(64, 64)), supersample=1, light=np.ones((len(mesh.positions), 4), np.float32)).rgba[0]
    return [tuple(int(c) for c in (picture[i, j, :3] > 128) * 255) for i, j in ((24, 24), (24, 40), (40, 24), (40, 40))]


def test_picture_is_upright_and_not_mirrored(tmp_path):
    want = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0)]
    assert corner_colours(load_mesh(write_glb(tmp_path / "a.glb", picture_plate()))) == want
    picture_plate().export(tmp_path / "b.obj")  # obj: z up
    assert corner_colours(load_mesh(tmp_path / "b.obj")) == want


def test_node_transforms_and_several_geometries(tmp_path):
    move = np.eye(4); move[2, 3] = 3
    mesh = load_mesh(write_glb(tmp_path / "two.glb", picture_plate(), picture_plate(), transforms=[np.eye(4), move]))
    assert len(mesh.faces) == 4
    extent = np.ptp(mesh.positions, axis=0)
    assert extent == pytest.approx([0, 1.8 * 2 / 5, 1.8], abs=1e-6)  # 2 wide, 5 high before


def test_mirrored_node_keeps_faces_outward(tmp_path):
    box = trimesh.creation.box(); mirror = np.diag([-1., 1, 1, 1])
    mesh = load_mesh(write_glb(tmp_path / "m.glb", box, transforms=[mirror]))
    corners = mesh.positions[mesh.faces]
    facing = np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])
    assert ((facing * corners.mean(1)).sum(1) > 0).all()
    assert ((mesh.normals[mesh.faces].mean(1) * facing).sum(1) > 0).all()


def test_vertex_colours_stay_on_their_faces(tmp_path):
    box = trimesh.creation.box()
    box.unmerge_vertices()
    box.visual = trimesh.visual.ColorVisuals(box, vertex_colors=np.repeat(np.random.default_rng(0).integers(0, 256, (12, 3)), 3, axis=0).astype(np.uint8))
    mesh = load_mesh(write_glb(tmp_path / "c.glb", box))
    side = mesh.albedo.shape[1]
    texel = np.floor(mesh.uvs[mesh.faces].mean(1) * side).astype(int)
    got = mesh.albedo[mesh.material_ids, texel[:, 1], texel[:, 0]]
    assert sorted(map(tuple, got.tolist())) == sorted(map(tuple, box.visual.vertex_colors[::3, :3].tolist()))


def test_factor_is_linear(tmp_path):
    box = trimesh.creation.box()
    material = trimesh.visual.material.PBRMaterial(baseColorFactor=[128, 255, 0, 255], metallicFactor=0., roughnessFactor=.3)
    box.visual = trimesh.visual.TextureVisuals(uv=np.zeros((len(box.vertices), 2)), material=material)
    mesh = load_mesh(write_glb(tmp_path / "f.glb", box))
    assert mesh.albedo.reshape(-1, 3)[0].tolist() == [188, 255, 0]  # linear 0.502 is sRGB 188
    assert mesh.roughness[0] == pytest.approx(.3) and mesh.metallic[0] == 0


def test_crease_normals_are_flat_on_a_box_and_smooth_on_a_sphere():
    box = trimesh.creation.box()
    flat = crease_normals(box.vertices, box.faces)
    assert np.allclose(flat, box.face_normals[:, None], atol=1e-6)
    ball = trimesh.creation.icosphere(3)
    split = ball.vertices[ball.faces].reshape(-1, 3)  # no shared vertices at all
    smooth = crease_normals(split, np.arange(len(split)).reshape(-1, 3)).reshape(-1, 3)
    assert ((smooth * split).sum(1) > .995).all()


def test_palette_is_exact_until_it_is_full():
    colours = np.random.default_rng(0).integers(0, 256, (300, 3)).astype(np.uint8)
    picture, uv = palette(colours, 32)
    texel = np.floor(uv * len(picture)).astype(int)
    assert (picture[texel[:, 1], texel[:, 0]] == colours).all()
    small, uv = palette(colours, 4)
    assert len(small) <= 4
    texel = np.floor(uv * len(small)).astype(int)
    assert np.abs(small[texel[:, 1], texel[:, 0]].astype(int) - colours).max() <= 64


@pytest.fixture
def glb(tmp_path): return write_glb(tmp_path / "whole.glb", picture_plate())


@pytest.mark.parametrize("keep", [0, 3, 11, 30, .5, .9, -1])
def test_truncated_glb_is_one_clear_error(glb, keep):
    data = glb.read_bytes()
    glb.write_bytes(data[:int(keep * len(data)) if isinstance(keep, float) else keep])
    with pytest.raises(ValueError, match="whole.glb cannot be read: it"): load_mesh(glb)


def test_flipped_bytes_never_crash(glb):
    data, random = glb.read_bytes(), np.random.default_rng(0)
    for _ in range(60):
        damaged = bytearray(data)
        for place in random.integers(0, len(data), 8): damaged[place] = random.integers(256)
        glb.write_bytes(bytes(damaged))
        try: load_mesh(glb)
        except ValueError as error: assert "whole.glb" in str(error)


def test_undecodable_texture_is_an_error(glb):
    data = bytearray(glb.read_bytes())
    place = data.index(b"\x89PNG") if b"\x89PNG" in data else data.index(b"\xff\xd8\xff")
    data[place:place + 4] = b"\0\0\0\0"
    glb.write_bytes(bytes(data))
    with pytest.raises(ValueError, match="textures cannot be decoded"): load_mesh(glb)


def test_other_bad_files(tmp_path):
    for name, text, reason in [("a.obj", "hello\n", "cannot be read"), ("b.obj", "", "it is empty"), ("c.ply", "ply\n", "need .glb or .obj"),
                               ("d.obj", "v 0 0 0\nv 0 0 0\nv 0 0 0\nf 1 2 3\n", "degenerate"),
                               ("e.obj", "v nan 0 0\nv 1 0 0\nv 0 1 0\nf 1 2 3\n", "cannot be read"),
                               ("f.obj", "mtllib gone.mtl\nv 0 0 0\nv 1 0 0\nv 0 1 0\nusemtl m\nf 1 2 3\n", "names gone.mtl"),
                               ("g.obj", "v 0 0 0\nv 1 0 0\nv 0 1 0\nf 1 2 9\n", "cannot be read")]:
        (tmp_path / name).write_text(text)
        with pytest.raises(ValueError, match=reason) as caught: load_mesh(tmp_path / name)
        assert name in str(caught.value)
    with pytest.raises(FileNotFoundError, match="nothing.glb"): load_mesh(tmp_path / "nothing.glb")


def test_obj_cannot_reach_outside_its_folder(tmp_path):
    (tmp_path / "secret.mtl").write_text("newmtl m\nKd 1 0 0\n")
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.obj").write_text("mtllib ../secret.mtl\nv 0 0 0\nv 1 0 0\nv 0 1 0\nusemtl m\nf 1 2 3\n")
    with pytest.raises(ValueError, match="secret.mtl"): load_mesh(tmp_path / "in" / "a.obj")


def gso_archive():
    "A zip laid out as Fuel does: the picture is not beside the obj that names it."
    files = trimesh.exchange.obj.export_obj(picture_plate(), return_texture=True)
    text, companions = files
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as bundle:
        bundle.writestr("meshes/model.obj", text)
        for name, data in companions.items(): bundle.writestr(("meshes/" if name.endswith(".mtl") else "materials/textures/") + name, data)
        bundle.writestr("metadata.pbtxt", np.random.default_rng(0).bytes(300_000))  # more than one block
    return out.getvalue()


def test_list_and_names(tmp_path, monkeypatch):
    for name in ("b.glb", "a/meshes/model.obj", ".partial/x.glb", "c.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x")
    assert [scan_name(path) for path in list_scans(tmp_path)] == ["a", "b"]
    monkeypatch.delenv("ZEROLAB_SCANS", raising=False)
    assert scans_folder() is None
    monkeypatch.setenv("ZEROLAB_SCANS", str(tmp_path))
    assert scans_folder() == tmp_path.resolve()
    monkeypatch.setenv("ZEROLAB_SCANS", str(tmp_path / "gone"))
    with pytest.raises(FileNotFoundError, match="gone"): scans_folder()


class Server:
    "A local file server that can break off, answer errors and change its files."
    def __init__(self):
        self.files, self.cut_after, self.errors, self.requests, self.ranges = {}, None, [], [], True
        server = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *args): pass
            def do_GET(self): server.answer(self)
        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.http.serve_forever, args=(.01,), daemon=True).start()
        self.url = f"http://127.0.0.1:{self.http.server_port}"

    def answer(self, handler):
        wanted = handler.headers.get("Range")
        self.requests.append((handler.path, wanted))
        data = self.files.get(handler.path)
        if self.errors or data is None: return handler.send_error(self.errors.pop() if self.errors else 404)
        tag, start = hashlib.md5(data).hexdigest(), 0
        if wanted and self.ranges and handler.headers.get("If-Range") == tag: start = int(wanted.split("=")[1].rstrip("-"))
        handler.send_response(206 if start else 200)
        if start: handler.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        handler.send_header("Content-Length", str(len(data) - start))
        handler.send_header("ETag", tag)
        handler.end_headers()
        rest = data[start:]
        if self.cut_after is not None: rest, self.cut_after = rest[:self.cut_after], None
        handler.wfile.write(rest)


@pytest.fixture
def server():
    server = Server()
    yield server
    server.http.shutdown()
    server.http.server_close()


QUIET = dict(progress=False, pause=.01, tries=3, timeout=5)


def test_download_and_read(server, tmp_path):
    server.files["/plate.zip"] = data = gso_archive()
    assert download_gso(["plate"], tmp_path, server.url, **QUIET) == [tmp_path / "plate"]
    assert json.loads((tmp_path / "gso_sha256.json").read_text()) == {"plate": hashlib.sha256(data).hexdigest()}
    (scan,) = list_scans(tmp_path)
    assert corner_colours(load_mesh(scan)) == [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0)]
    views = scan_views(scan, orbit([0., 90], size=(32, 32)))
    assert (views.caption, views.source, len(views)) == ("plate", "scan:plate", 2)
    download_gso(["plate"], tmp_path, server.url, **QUIET)
    assert len(server.requests) == 1  # nothing is asked for twice
    assert not list((tmp_path / ".partial").iterdir())


def test_broken_connection_goes_on_where_it_stopped(server, tmp_path):
    server.files["/plate.zip"], server.cut_after = gso_archive(), 100_000
    download_gso(["plate"], tmp_path, server.url, **QUIET)
    assert [r for _, r in server.requests] == [None, "bytes=100000-"]


def test_interrupted_call_goes_on_in_the_next_one(server, tmp_path):
    server.files["/plate.zip"], server.cut_after = gso_archive(), 70_000
    with pytest.raises(ConnectionError, match="70000 of .* call again"): download_gso(["plate"], tmp_path, server.url, **{**QUIET, "tries": 1})
    assert not (tmp_path / "plate").exists() and not list_scans(tmp_path)
    download_gso(["plate"], tmp_path, server.url, **QUIET)
    assert server.requests[-1][1] == "bytes=70000-" and (tmp_path / "plate").is_dir()


@pytest.mark.parametrize("ranges", [True, False])
def test_changed_file_or_server_without_ranges_starts_over(server, tmp_path, ranges):
    server.files["/plate.zip"], server.cut_after, server.ranges = b"old" + gso_archive(), 70_000, ranges
    with pytest.raises(ConnectionError): download_gso(["plate"], tmp_path, server.url, **{**QUIET, "tries": 1})
    server.files["/plate.zip"] = data = gso_archive()
    download_gso(["plate"], tmp_path, server.url, **QUIET)
    assert json.loads((tmp_path / "gso_sha256.json").read_text())["plate"] == hashlib.sha256(data).hexdigest()


def test_wrong_checksum_removes_the_file(server, tmp_path):
    server.files["/plate.zip"] = gso_archive()
    with pytest.raises(ValueError, match="plate.zip has sha256 .* expected 00"):
        download_gso(["plate"], tmp_path, server.url, checksums={"plate": "00"}, **QUIET)
    assert not (tmp_path / "plate").exists() and not (tmp_path / ".partial" / "plate.zip").exists()


def test_missing_object_is_said_at_once_and_servers_get_several_tries(server, tmp_path):
    with pytest.raises(ValueError, match="nothing.zip: the server answers 404"): download_gso(["nothing"], tmp_path, server.url, **QUIET)
    assert len(server.requests) == 1
    server.files["/plate.zip"], server.errors = gso_archive(), [503, 500]
    download_gso(["plate"], tmp_path, server.url, **QUIET)
    server.errors = [503] * 3
    server.files["/other.zip"] = gso_archive()
    with pytest.raises(ConnectionError, match="503 .*3 tries"): download_gso(["other"], tmp_path, server.url, **QUIET)
    with pytest.raises(ConnectionError, match="127.0.0.1:9/"): download_gso(["other"], tmp_path, "http://127.0.0.1:9", **QUIET)


def archive_of(*entries):
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as bundle:
        for entry, data in entries: bundle.writestr(entry, data)
    return out.getvalue()


def test_hostile_archives(server, tmp_path, monkeypatch):
    link = zipfile.ZipInfo("link"); link.external_attr = 0o120777 << 16
    monkeypatch.setattr(scans, "MAX_UNPACKED", 1 << 20)
    monkeypatch.setattr(scans, "MAX_FILES", 5)
    for data, reason in [(archive_of(("../evil.txt", "x")), "outside"), (archive_of(("/tmp/evil.txt", "x")), "outside"),
                         (archive_of((link, "/etc/passwd")), "link"),
                         (archive_of(("big", b"\0" * (2 << 20))), "more than 1 MB"), (archive_of(*[(f"{i}", "x") for i in range(6)]), "6 files"),
                         (b"no zip at all", "zip"), (gso_archive()[:5000], "zip")]:
        server.files["/bad.zip"] = data
        with pytest.raises(ValueError, match=f"bad.zip .*{reason}"): download_gso(["bad"], tmp_path / "out", server.url, **QUIET)
        assert not (tmp_path / "out" / "bad").exists() and not (tmp_path / "evil.txt").exists()
        assert not list((tmp_path / "out" / ".partial").glob("*.zip"))
    for name in ("../x", "", ".hidden", "a/b", "a b"):
        with pytest.raises(ValueError, match="no object's name"): download_gso([name], tmp_path, server.url, **QUIET)
