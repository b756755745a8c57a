"Object folders: files made by hand as each project's own code makes them, round trips, lists, and what strangers get wrong."
import json, shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from zerolab.data.folders import (DIALECTS, FACELIFT, LONG_LRM, SAVED, ZEROVERSE, folders_to_shards, guess_dialect, object_folders, read_folder,
                                  read_folders, white_added, white_removed, write_folder, write_list)
from zerolab.data.shards import ShardDataset
from zerolab.scene.cameras import gso_inputs
from zerolab.scene.views import Views, load_views, save_views


def noise(seed=0, views=3, size=(16, 16)):
    "Colours, rims of every alpha, and nothing."
    rng = np.random.default_rng(seed)
    rgba = rng.integers(0, 256, (views, *size, 4), dtype=np.uint8)
    rgba[:, :6, :, 3], rgba[:, -3:] = 255, 0
    rgba[rgba[..., 3] == 0] = 0
    return Views(torch.from_numpy(rgba), gso_inputs(8, size=size)[:views], "noise", "a test", seed, 0.5)


def cameras_json(folder, count, names, size=(16, 16), **besides):
    "An opencv_cameras.json as those projects write it: w2c of cameras that stand on +x, and what else is in their frames."
    w2c = [[0, 1, 0, 0], [0, 0, -1, 0], [-1, 0, 0, 2.7], [0, 0, 0, 1]]
    frames = [dict(w=size[1], h=size[0], fx=17.156, fy=17.156, cx=size[1]/2, cy=size[0]/2, w2c=w2c, file_path=names.format(i),
                   blender_camera_name=f"cam.{i}", blender_camera_location=[2.7, 0, 0]) for i in range(count)]
    folder.mkdir(parents=True, exist_ok=True)
    (folder/"opencv_cameras.json").write_text(json.dumps({**besides, "frames": frames}, indent=4))
    for i in range(count): (folder/names.format(i)).parent.mkdir(exist_ok=True)


def edit(folder, change):
    path = folder/"opencv_cameras.json"
    content = json.loads(path.read_text()); change(content); path.write_text(json.dumps(content))


def test_the_white_of_zeroverse_against_its_formula():
    "As its renderer does it, in floating point and cut to bytes; straight colours come back as well as bytes allow."
    rng = np.random.default_rng(0)
    linear, alpha = rng.uniform(size=(4000, 3)), rng.integers(0, 256, 4000)/255
    stored = np.floor(255*(linear*alpha[:, None] + 1 - alpha[:, None])**(1/2.2)).astype(np.uint8)
    rgba = np.concatenate([stored, np.round(255*alpha)[:, None].astype(np.uint8)], 1)
    straight = white_removed(torch.from_numpy(rgba)).numpy()
    mostly = alpha > 0.5
    wanted = 255*linear**(1/2.2)
    assert (straight[alpha == 0] == 0).all() and np.abs(straight[mostly, :3] - wanted[mostly])[wanted[mostly] > 60].max() < 12
    assert np.median(np.abs(straight[mostly, :3] - wanted[mostly])) < 1.5, "one rounding of a byte, magnified by at most two"
    again = white_added(torch.from_numpy(straight)).numpy().astype(int)
    covered = alpha > 0
    assert np.abs(again[covered] - rgba[covered]).max() <= 1 and (again[..., 3] == rgba[:, 3]).all()


def test_white_is_idle_where_all_is_covered():
    rgba = noise().rgba
    solid = rgba[..., 3] == 255
    assert torch.equal(white_added(rgba)[solid], rgba[solid]) and torch.equal(white_removed(rgba)[solid], rgba[solid])
    assert (white_added(rgba)[rgba[..., 3] == 0][:, :3] == 255).all()


@pytest.mark.parametrize("dialect", DIALECTS, ids=lambda dialect: dialect.name)
def test_round_trip(dialect, tmp_path):
    views = noise()
    folder = write_folder(views, tmp_path/"cup", dialect)
    assert guess_dialect(folder) == dialect
    again = read_folder(folder)
    assert torch.equal(again.cameras.K, views.cameras.K) and torch.equal(again.cameras.w2c, views.cameras.w2c)
    assert (again.caption, again.source, again.seed, again.quality) == ("noise", "a test", 0, 0.5)
    if dialect.colours == "straight": assert torch.equal(again.rgba, views.rgba)
    elif dialect.colours == "opaque":
        assert (again.rgba[..., 3] == 255).all()
        torch.testing.assert_close(again.rgba[..., :3].float()/255, views.composite(1.), atol=0.5/255 + 1e-6, rtol=0)
    else:
        assert torch.equal(again.rgba[..., 3], views.rgba[..., 3])
        mostly = views.rgba[..., 3] > 200
        assert (again.rgba.int() - views.rgba.int()).abs()[mostly].float().mean() < 1
    twice = read_folder(write_folder(again, tmp_path/"again"/"cup", dialect))
    assert (twice.rgba.int() - again.rgba.int()).abs()[again.rgba[..., 3] > 200].max() <= 2, "what went through once is stable"


def test_a_zeroverse_folder_and_its_depth(tmp_path):
    "As the renderer leaves it, MegaSynth's depth and the tone mapping's notes beside the pictures."
    folder = tmp_path/"f00d"/"000"
    cameras_json(folder, 2, "renderings/{:08d}_rgba.png")
    rgba = noise(views=2).rgba
    for i, picture in enumerate(white_added(rgba).numpy()):
        Image.fromarray(picture).save(folder/f"renderings/{i:08d}_rgba.png")
        (folder/f"renderings/{i:08d}_depth.exr").write_bytes(b"no picture for us")
    (folder/"minmax.txt").write_text("0.0 1.0")
    views = read_folder(folder)
    assert guess_dialect(folder) == ZEROVERSE and views.source == "zeroverse:000" and views.seed == -1
    solid = rgba[..., 3] == 255
    assert torch.equal(views.rgba[solid], rgba[solid]) and torch.equal(views.rgba[..., 3], rgba[..., 3])
    assert views.cameras.centers.tolist() == [pytest.approx([2.7, 0, 0])]*2
    as_straight = read_folder(folder, FACELIFT)
    soft = (rgba[..., 3] > 0) & (rgba[..., 3] < 128)
    assert (as_straight.rgba[soft][:, :3].float().mean() - views.rgba[soft][:, :3].float().mean()) > 50, "the dialect matters"


def test_a_facelift_folder(tmp_path):
    folder = tmp_path/"sample_000"
    cameras_json(folder, 2, "images/cam_{:03d}.png", id="sample_zero")
    rgba = noise(views=2).rgba
    for i, picture in enumerate(rgba.numpy()): Image.fromarray(picture).save(folder/f"images/cam_{i:03d}.png")
    (tmp_path/"data_train.txt").write_text("sample_000\n\n")
    (only,) = object_folders(tmp_path/"data_train.txt")
    assert torch.equal(read_folder(only).rgba, rgba) and read_folder(only).source == "facelift:sample_zero"


@pytest.mark.parametrize("kind", ["png", "jpg"])
def test_a_long_lrm_scene_at_another_size(tmp_path, kind):
    "Its reader scales the intrinsics by picture over camera size, in each direction; so do we."
    folder = tmp_path/"desk"
    cameras_json(folder, 2, "images_undistort/frame_{:05d}." + kind, size=(32, 64), scene_name="my desk", fold_8_kmeans_32_input=[0, 1])
    for i in range(2): Image.fromarray(np.full((16, 16, 3), 100 + i, np.uint8)).save(folder/f"images_undistort/frame_{i:05d}.{kind}")
    (tmp_path/"list.txt").write_text("desk/opencv_cameras.json\n")
    (views,) = read_folders(object_folders(tmp_path/"list.txt"))
    K = views.cameras.K[0]
    assert views.size == (16, 16) and views.source == "long-lrm:my desk" and (views.rgba[..., 3] == 255).all()
    assert [K[0, 0], K[1, 1], K[0, 2], K[1, 2]] == pytest.approx([17.156/4, 17.156/2, 8, 8])
    assert views.rgba[1, ..., :3].float().mean() == pytest.approx(101, abs=1)


def test_what_each_reader_asks_for(tmp_path):
    "The keys and names that the projects' own loaders look up."
    views = noise()
    folders = {dialect.name: write_folder(views, tmp_path/dialect.name/"cup", dialect) for dialect in DIALECTS}
    content = {name: json.loads((folder/"opencv_cameras.json").read_text()) for name, folder in folders.items()}
    assert content["long-lrm"]["scene_name"] == "cup" and content["facelift"]["id"] == "cup" and set(content["zeroverse"]) == {"frames"}
    assert content["zeroverse"]["frames"][2]["file_path"] == "renderings/00000002_rgba.png"
    assert content["zeroverse"]["frames"][2]["blender_camera_location"] == pytest.approx(views.cameras.centers[2].tolist(), abs=1e-6)
    for name, mode in (("zeroverse", "RGBA"), ("facelift", "RGBA"), ("long-lrm", "RGB")):
        for frame in content[name]["frames"]:
            with Image.open(tmp_path/name/"cup"/frame["file_path"]) as image: assert image.mode == mode and image.size == (frame["w"], frame["h"])
    write_list([tmp_path/"long-lrm"/"cup"], tmp_path/"l.txt", LONG_LRM)
    write_list([tmp_path/"facelift"/"cup"], tmp_path/"f.txt", FACELIFT)
    assert (tmp_path/"l.txt").read_text() == f"{tmp_path.resolve()}/long-lrm/cup/opencv_cameras.json\n"
    assert (tmp_path/"f.txt").read_text() == f"{tmp_path.resolve()}/facelift/cup\n"
    assert [object_folders(tmp_path/name)[0].name for name in ("l.txt", "f.txt")] == ["cup", "cup"]
    assert torch.equal(load_views(tmp_path/"zerolab"/"cup").rgba, views.rgba), "the plain dialect is that of save_views"


def test_folders_become_shards_lazily_and_go_on(tmp_path, monkeypatch):
    for seed in range(5): write_folder(noise(seed), tmp_path/"objects"/f"o{seed}", DIALECTS[seed % 2])
    wanted = [read_folder(folder) for folder in object_folders(tmp_path/"objects")]
    edit(tmp_path/"objects"/"o3", lambda content: content["frames"][1].pop("cx"))
    with pytest.raises(ValueError, match=r"read_folders: .*o3/opencv_cameras.json: frames\[1\] lacks cx"):
        folders_to_shards(tmp_path/"objects", tmp_path/"shards", samples_per_shard=2)
    done = ShardDataset(tmp_path/"shards")
    assert len(done) == 2, "what came before the broken folder is there"
    before = done.paths[0].read_bytes()
    edit(tmp_path/"objects"/"o3", lambda content: content["frames"][1].update(cx=8.0))
    dataset = ShardDataset(folders_to_shards(tmp_path/"objects", tmp_path/"shards", samples_per_shard=2))
    assert len(dataset) == 5 and dataset.paths[0].read_bytes() == before
    assert all(torch.equal(got.rgba, view.rgba) and torch.equal(got.cameras.w2c, view.cameras.w2c) and got.seed == view.seed
               for got, view in zip(dataset, wanted))
    stream = read_folders([tmp_path/"objects"/"o0", tmp_path/"nowhere"])
    assert next(stream).seed == 0, "the second folder is not looked at before it is asked for"
    with pytest.raises(ValueError, match="nowhere"): next(stream)


def test_broken_folders_can_be_left_out(tmp_path):
    for seed in range(4): write_folder(noise(seed), tmp_path/"objects"/f"o{seed}", FACELIFT)
    (tmp_path/"objects"/"o1"/"images"/"cam_002.png").write_bytes(b"\x89PNG and then nothing")
    edit(tmp_path/"objects"/"o2", lambda content: content.update(frames=[]))
    lost = []
    dataset = ShardDataset(folders_to_shards(tmp_path/"objects", tmp_path/"shards", FACELIFT, size=(8, 8), on_error=lost))
    assert [views.seed for views in dataset] == [0, 3] and dataset[0].size == (8, 8)
    assert [folder.name for folder, _ in lost] == ["o1", "o2"]
    assert "frames[2]: images/cam_002.png is no readable picture" in lost[0][1] and str(tmp_path/"objects"/"o1") in lost[0][1]
    assert "at least one frame" in lost[1][1]


@pytest.mark.parametrize("dialect", [ZEROVERSE, FACELIFT, LONG_LRM], ids=lambda dialect: dialect.name)
@pytest.mark.parametrize("change,message", [
    (lambda c: c["frames"][1].pop("w2c"), r"frames\[1\] lacks w2c"),
    (lambda c: c["frames"][1].update(w2c=[[1, 0, 0, 0]]*3), r"frames\[1\].w2c is 3x4, need 4x4"),
    (lambda c: c["frames"][1].update(fx="wide"), r"frames\[1\] is malformed"),
    (lambda c: c["frames"][1].update(fx=-1), "focal lengths"),
    (lambda c: c["frames"][1].update(w=8), "picture sizes differ"),
    (lambda c: c["frames"][0].update(file_path=""), r"frames\[0\].file_path is ''"),
    (lambda c: c["frames"][0].update(file_path="gone.png"), r"frames\[0\]: no picture"),
    (lambda c: c["frames"][2].update(file_path="../../secret.png"), "leads out of"),
    (lambda c: c.update(frames={}), "no cameras")])
def test_what_strangers_get_wrong(dialect, change, message, tmp_path):
    folder = write_folder(noise(), tmp_path/"deep"/"cup", dialect)
    edit(folder, change)
    with pytest.raises((ValueError, OSError), match=message) as caught: read_folder(folder, dialect)
    assert "cup/opencv_cameras.json" in str(caught.value)


def test_bad_input(tmp_path):
    views = noise()
    with pytest.raises(ValueError, match="holds no folder with an opencv_cameras.json"): object_folders(tmp_path)
    with pytest.raises(FileNotFoundError, match="no folder or list"): object_folders(tmp_path/"nowhere")
    (tmp_path/"list.txt").write_text("\n\n")
    with pytest.raises(ValueError, match="lists no objects"): object_folders(tmp_path/"list.txt")
    (tmp_path/"list.txt").write_text("\ncup\n")
    with pytest.raises(FileNotFoundError, match="list.txt line 2: no opencv_cameras.json in cup"): object_folders(tmp_path/"list.txt")
    with pytest.raises(ValueError, match="12x16 pixels, facelift needs square ones"): write_folder(noise(size=(12, 16)), tmp_path/"wide", FACELIFT)
    folder = write_folder(views, tmp_path/"cup", FACELIFT)
    with pytest.raises(FileExistsError, match="cup"): write_folder(views, folder, FACELIFT)
    edit(folder, lambda content: content.update(id=7))
    with pytest.raises(ValueError, match="id is 7, need the object's name as text"): read_folder(folder)
    (folder/"opencv_cameras.json").write_text("[]")
    with pytest.raises(ValueError, match="no cameras"): read_folder(folder)
    (folder/"opencv_cameras.json").write_text("{")
    with pytest.raises(ValueError, match="is no JSON that can be read"): read_folder(folder)


def test_a_half_written_object_is_not_found(tmp_path):
    "An object appears whole, so what a killed writer left is not an object."
    save_views(noise(), tmp_path/"whole")
    shutil.copytree(tmp_path/"whole", tmp_path/".tmp-0123-cup")
    assert [folder.name for folder in object_folders(tmp_path)] == ["whole"] and guess_dialect(tmp_path/"whole") == SAVED
    assert read_folder(tmp_path/"whole").source == "a test"
    nameless = write_folder(replace(noise(), source=""), tmp_path/"plain", SAVED)
    assert read_folder(nameless).source == "zerolab:plain"
