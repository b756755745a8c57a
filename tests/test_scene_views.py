"""Views and Mesh: resizing against an exact integral, folders against strangers' files, meshes that do not add up."""
import json

import numpy as np
import pytest
import torch
from PIL import Image

from zerolab.scene.cameras import gso_inputs
from zerolab.scene.mesh import Mesh
from zerolab.scene.views import Views, composite, load_views, resize_rgba, save_views


def noise_views(count=3, size=(12, 16), seed=0) -> Views:
    rgba = torch.randint(0, 256, (count, *size, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    rgba[..., 3] = torch.where(rgba[..., 3] < 80, 0, rgba[..., 3])
    rgba[rgba[..., 3] == 0] = 0
    return Views(rgba, gso_inputs(8, size=size)[:count], "noise", "a test", seed, 0.25)


@pytest.mark.parametrize("size", [(6, 8), (5, 7), (1, 1), (12, 16), (24, 48), (13, 3)])
def test_resize_is_the_area_integral(size):
    "Both sizes divide a fine grid: enlarge to it by repetition, then average its blocks."
    rgba = noise_views().rgba.double()
    height, width = 12*size[0], 16*size[1]
    premultiplied = torch.cat([rgba[..., :3]*rgba[..., 3:], rgba[..., 3:]], -1)
    fine = premultiplied.repeat_interleave(height//12, 1).repeat_interleave(width//16, 2)
    exact = fine.reshape(3, size[0], height//size[0], size[1], width//size[1], 4).mean((2, 4))
    resized = resize_rgba(noise_views().rgba, size).double()
    assert (resized[..., 3] - exact[..., 3]).abs().max() <= 0.5001
    visible = exact[..., 3] > 0.51
    assert (resized[..., :3] - exact[..., :3]/exact[..., 3:].clamp(min=1e-9))[visible].abs().max() <= 0.5001
    assert (resized[..., :3][resized[..., 3] == 0] == 0).all()


def test_composite():
    views = noise_views()
    rgba = views.rgba.double().numpy()/255
    for background in (0., 1., (0.1, 0.5, 0.9)):
        np.testing.assert_allclose(views.composite(background), rgba[..., :3]*rgba[..., 3:] + (1 - rgba[..., 3:])*background, atol=1e-6)
    assert torch.allclose(views.composite(torch.tensor([0.1, 0.5, 0.9])), views.composite((0.1, 0.5, 0.9)))


def test_on_white():
    rgb, alpha = composite(torch.tensor([[255, 0, 51, 255], [255, 0, 51, 0], [0, 0, 255, 51]], dtype=torch.uint8))
    torch.testing.assert_close(rgb, torch.tensor([[1., 0, 0.2], [1, 1, 1], [0.8, 0.8, 1]])); assert alpha.flatten().tolist() == pytest.approx([1, 0, 0.2])


def test_picking_keeps_what_is_known():
    views = noise_views()
    picked = views[[2, 0]]
    assert torch.equal(picked.rgba, views.rgba[[2, 0]]) and torch.equal(picked.cameras.w2c, views.cameras.w2c[[2, 0]])
    assert (picked.caption, picked.source, picked.seed, picked.quality) == ("noise", "a test", 0, 0.25)
    assert len(views[1]) == 1 and len(views[torch.tensor([1, 1])]) == 2 and torch.equal(views.alpha, views.rgba[..., 3]/255)


def test_folder_round_trip(tmp_path):
    again = load_views(save_views(noise_views(), tmp_path/"a"))
    assert torch.equal(again.rgba, noise_views().rgba) and torch.equal(again.cameras.K, noise_views().cameras.K)
    assert (again.caption, again.source, again.seed, again.quality) == ("noise", "a test", 0, 0.25)


def test_a_failed_save_leaves_no_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(Image.Image, "save", lambda *args: (_ for _ in ()).throw(OSError("No space left on device")))
    with pytest.raises(OSError, match="No space"): save_views(noise_views(), tmp_path/"a")
    assert not list(tmp_path.iterdir())


def test_zeroverse_layout(tmp_path):
    "Pictures in a folder of their own, no about.json, a picture without alpha, extra keys."
    save_views(noise_views(), tmp_path/"a")
    content = json.loads((tmp_path/"a"/"opencv_cameras.json").read_text())
    (tmp_path/"a"/"renderings").mkdir(); (tmp_path/"a"/"about.json").unlink()
    for i, frame in enumerate(content["frames"]):
        frame |= dict(file_path=f"renderings/{i:08d}_rgba.png", blender_camera_location=[0, 0, 0])
        (tmp_path/"a"/f"{i:03d}.png").rename(tmp_path/"a"/frame["file_path"])
    (tmp_path/"a"/"opencv_cameras.json").write_text(json.dumps(content))
    Image.new("RGB", (16, 12), (1, 2, 3)).save(tmp_path/"a"/"renderings"/"00000001_rgba.png")
    views = load_views(tmp_path/"a")
    assert torch.equal(views.rgba[0], noise_views().rgba[0]) and views.rgba[1, 0, 0].tolist() == [1, 2, 3, 255] and views.caption == ""


@pytest.mark.parametrize("change, message", [
    (lambda folder: (folder/"001.png").write_bytes(b"no picture"), r"frames\[1\]: 001.png is no readable picture"),
    (lambda folder: (folder/"001.png").write_bytes((folder/"000.png").read_bytes()[:-300]), r"frames\[1\]: 001.png is no readable picture"),
    (lambda folder: Image.new("RGBA", (16, 13)).save(folder/"001.png"), r"frames\[1\]: 001.png has 13x16 pixels, its camera 12x16"),
    (lambda folder: (folder/"about.json").write_text('{"seed": "x"}'), "about.json"),
    (lambda folder: (folder/"opencv_cameras.json").write_text((folder/"opencv_cameras.json").read_text().replace("001.png", "/etc/hostname")), "leads out of"),
    (lambda folder: (folder/"opencv_cameras.json").write_text((folder/"opencv_cameras.json").read_text().replace('"001.png"', "7")), "file_path is 7")])
def test_bad_folders_are_named(tmp_path, change, message):
    change(save_views(noise_views(), tmp_path/"a"))
    with pytest.raises(ValueError, match=message): load_views(tmp_path/"a")


# ---- mesh


def triangle(**changes) -> Mesh:
    return Mesh(**dict(positions=np.array([[0, 0, 0], [2, 0, 0], [0, 1, 1]], np.float32), normals=np.tile([0, 0, 1.], (3, 1)), uvs=np.zeros((3, 2)),
                       faces=np.array([[0, 1, 2]]), material_ids=np.array([0]), albedo=np.zeros((1, 4, 4, 3), np.uint8),
                       roughness=np.ones(1), metallic=np.zeros(1)) | changes)


def test_mesh_types_and_measures():
    mesh = triangle()
    assert mesh.positions.dtype == mesh.normals.dtype == mesh.roughness.dtype == np.float32 and mesh.faces.dtype == mesh.material_ids.dtype == np.int32
    assert mesh.bounds.tolist() == [[0, 0, 0], [2, 1, 1]] and mesh.radius == 2
    normalized = mesh.normalized()
    np.testing.assert_allclose(normalized.bounds, [[-0.9, -0.45, -0.45], [0.9, 0.45, 0.45]], atol=1e-6)
    np.testing.assert_allclose(normalized.normalized().positions, normalized.positions, atol=1e-6)


@pytest.mark.parametrize("changes, message", [
    (dict(positions=np.zeros((3, 2))), "positions has shape"), (dict(normals=np.tile([0, 0, 1.], (2, 1))), "2 normals, need 3"),
    (dict(normals=np.zeros((3, 3))), r"normals\[0\] has length 0"), (dict(faces=np.array([[0, 1, 3]])), "faces go from 0 to 3, need 0 to 2"),
    (dict(faces=np.array([[0., 1, 2]])), "faces is float64, need int32"), (dict(faces=np.array([[0, -1, 2]])), "faces go from -1"),
    (dict(faces=np.zeros((0, 3), int), material_ids=np.zeros(0, int)), "no triangles"), (dict(material_ids=np.array([1])), "material_ids go from 1 to 1"),
    (dict(albedo=np.zeros((1, 5, 5, 3), np.uint8)), "power of two"), (dict(albedo=np.zeros((1, 4, 4, 3))), "uint8"),
    (dict(roughness=np.ones(2)), "2 roughness, need 1"), (dict(positions=np.full((3, 3), np.nan)), r"positions\[0\] holds NaN"),
    (dict(metallic=np.array([np.inf])), r"metallic\[0\] holds NaN or infinity")])
def test_meshes_that_do_not_add_up(changes, message):
    with pytest.raises(ValueError, match=message): triangle(**changes)


def test_a_point_has_no_size():
    with pytest.raises(ValueError, match="no size"): triangle(positions=np.zeros((3, 3))).normalized()
