"""Movies that play, paths that meet their cameras, and error maps on one scale."""
import subprocess
import sys

import imageio.v3 as iio
import numpy as np
import pytest
import torch
from PIL import Image

from zerolab.scene.cameras import Cameras, orbit
from zerolab.scene.gaussians import Gaussians, rgb_to_sh
from zerolab.shapes.zeroverse import THINGS, make_shape
from zerolab.view.pictures import comparison, error_map, frames_of, picture_psnr, save_movie, save_turntable, spline_path, turn_path


def two_balls():
    means = torch.tensor([[0.7, 0, 0], [-0.7, 0, 0]])
    colors = torch.tensor([[0.9, 0.1, 0.1], [0.1, 0.1, 0.9]])
    return Gaussians(means, torch.tensor([[1., 0, 0, 0]]*2), torch.full((2, 3), 0.2), torch.full((2,), 0.95), rgb_to_sh(colors)[:, None])


def test_a_turn_has_no_frame_twice():
    path = turn_path(12, 30.)
    gaps = torch.cat([path.centers, path.centers[:1]]).diff(dim=0).norm(dim=-1)
    assert torch.allclose(gaps, gaps[:1].expand(12), atol=1e-5) and len(path) == 12


@pytest.mark.parametrize("suffix", ["mp4", "gif"])
def test_a_half_turn_changes_sides(tmp_path, suffix):
    path = save_turntable(two_balls(), tmp_path/f"turn.{suffix}", frames=8, size=64, progress=False, elevation=10., background=0.)
    frames = np.stack([np.asarray(frame)[..., :3].astype(float) for frame in iio.imiter(path)])
    assert frames.shape == (8, 64, 64, 3)
    red, blue = ([frame[..., channel].ravel() @ np.tile(np.arange(64), 64)/frame[..., channel].sum() for frame in frames] for channel in (0, 2))
    assert (red[2] - blue[2])*(red[6] - blue[6]) < 0 and abs(red[2] - blue[2]) > 15, "seen along y, they lie side by side, and after half a turn the other way"
    assert list(tmp_path.iterdir()) == [path]


def test_frames_are_shown_for_their_time(tmp_path):
    frames = [np.full((20, 31, 3), value, np.uint8) for value in np.arange(0, 250, 25)]
    gif = Image.open(save_movie(frames, tmp_path/"a.gif", fps=20))
    assert gif.info["duration"] == 50 and gif.info["loop"] == 0 and gif.n_frames == 10 and gif.size == (31, 20)
    mp4 = iio.immeta(save_movie(frames, tmp_path/"a.mp4", fps=20), plugin="FFMPEG")
    assert mp4["fps"] == 20 and mp4["size"] == (32, 20) and "yuv420p" in mp4["pix_fmt"] and mp4["codec"] == "h264"


def test_a_still_background_stays_still_in_a_gif(tmp_path):
    generator = np.random.default_rng(0)
    frames = np.repeat(generator.integers(0, 256, (1, 24, 24, 3), dtype=np.uint8), 12, axis=0)
    for k in range(12): frames[k, 8:16, 2*k:2*k + 2] = generator.integers(0, 256, 3)
    again = np.stack([np.asarray(frame)[..., :3] for frame in iio.imiter(save_movie(frames, tmp_path/"a.gif"))])
    assert (again[:, :8] == again[:1, :8]).all() and (again[:, 16:] == again[:1, 16:]).all()


@pytest.mark.parametrize("name", ["a.mp4", "a.gif"])
def test_a_movie_that_fails_leaves_nothing_and_keeps_the_old_one(tmp_path, name):
    (tmp_path/name).write_bytes(b"old")
    def failing(camera):
        if failing.left == 0: raise RuntimeError("out of paint")
        failing.left -= 1
        return np.zeros((8, 8, 3))
    failing.left = 3
    with pytest.raises(RuntimeError, match="out of paint"): save_turntable(failing, tmp_path/name, frames=6, size=8, progress=False)
    assert (tmp_path/name).read_bytes() == b"old" and len(list(tmp_path.iterdir())) == 1


def test_without_ffmpeg_a_gif_is_offered(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "imageio_ffmpeg", None)
    with pytest.raises(ImportError, match=r"pip install 'zerolab\[movie\]', or write a .gif"): save_movie([np.zeros((8, 8))], tmp_path/"a.mp4")
    assert not list(tmp_path.iterdir())


def test_the_bar_counts_frames(tmp_path, capfd):
    save_turntable(two_balls(), tmp_path/"a.gif", frames=5, size=16)
    assert "5/5" in capfd.readouterr().err
    save_turntable(two_balls(), tmp_path/"a.gif", frames=5, size=16, progress=False)
    assert capfd.readouterr().err == ""


def test_what_can_be_filmed():
    camera, mesh = orbit([30.], size=(24, 24)), make_shape(3, THINGS).mesh
    class Scene:
        def look_from(self, camera): self.camera = camera
        def screenshot(self): return np.full((*self.camera.size, 3), 7, np.uint8)
    for subject in (two_balls(), mesh, Scene(), lambda camera: torch.zeros(*camera.size, 3)):
        frame, = frames_of(subject, camera)
        assert frame.shape == (24, 24, 3) and frame.dtype == np.uint8
    dark, = frames_of(two_balls(), camera, background=0.)
    assert dark[0, 0].max() == 0 and dark.max() > 100


@pytest.mark.parametrize("closed", [False, True])
def test_a_spline_meets_its_keys_and_is_a_camera_everywhere(closed):
    generator = np.random.default_rng(0)
    keys = orbit(generator.uniform(0, 360, 5), generator.uniform(-60, 60, 5), generator.uniform(1, 4, 5), size=(30, 40))
    per = 7
    path = spline_path(keys, 5*per if closed else 4*per + 1, closed=closed)
    assert torch.allclose(path.w2c[::per][:5], keys.w2c, atol=1e-5) and torch.allclose(path.K[::per][:5], keys.K, atol=1e-4) and path.size == keys.size
    rotations = path.w2c[:, :3, :3]
    assert torch.allclose(rotations @ rotations.mT, torch.eye(3).expand_as(rotations), atol=1e-5) and (torch.linalg.det(rotations) > 0.99).all()


def test_a_closed_spline_is_smooth_at_its_seam():
    keys = orbit([0, 90, 180, 270], [10, 40, 10, -20], size=(30, 40))
    turned = spline_path(Cameras.cat([keys[2:], keys[:2]]), 80, closed=True)
    path = spline_path(keys, 80, closed=True)
    assert torch.allclose(path.centers, turned.centers.roll(40, 0), atol=0.02), "where it begins does not matter"
    loop = torch.cat([path.centers, path.centers[:2]])
    bends = loop.diff(dim=0).diff(dim=0).norm(dim=-1)
    assert bends[-1] < 2*bends.median()


def test_psnr_of_known_errors():
    truth = np.full((10, 10, 3), 100, np.uint8)
    assert picture_psnr(truth + np.uint8(10), truth) == pytest.approx(20*np.log10(255/10), abs=1e-3)
    assert picture_psnr(truth, truth) == float("inf")
    assert picture_psnr(np.stack([truth, truth + np.uint8(10)]), np.stack([truth, truth])) == pytest.approx(20*np.log10(255/10) + 10*np.log10(2), abs=1e-3)
    with pytest.raises(ValueError, match="different sizes"): picture_psnr(truth, truth[:5])


def test_all_maps_share_one_scale_with_a_labelled_bar():
    truth = np.full((3, 16, 16, 3), 0.4)
    figure = comparison(truth, dict(near=truth + 0.1, far=truth + 0.3), titles="abc")
    maps = [axes.images[0] for axes in figure.axes if axes.images and axes.images[0].get_array().ndim == 2]
    assert len(maps) == 6 and len({shown.get_clim() for shown in maps}) == 1 and maps[0].get_clim()[0] == 0
    assert maps[0].get_clim()[1] == pytest.approx(0.3, abs=1/255)
    bar = figure.axes[-1]
    assert "mean absolute error" in bar.get_ylabel() and len(figure.axes) == 3*5 + 1
    assert figure.axes[6].get_title().endswith(" dB") and figure.axes[0].get_title() == "a"
    alone = error_map(truth[0] + 0.1, truth[0], maximum=0.5)
    assert len(alone.axes) == 2 and alone.axes[0].images[0].get_clim() == (0, 0.5)
    alone.canvas.draw()


def test_importing_the_module_is_light():
    script = "import sys, zerolab.view.pictures; print({'vtk', 'vtkmodules', 'pyvista', 'imageio', 'matplotlib.pyplot'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.strip() == "set()"


@pytest.mark.parametrize("call, says", [
    (lambda: turn_path(0), "frames is 0"), (lambda: spline_path(orbit([0.]), 3), "1 cameras"), (lambda: spline_path(orbit([0., 9.]), 0), "frames is 0"),
    (lambda: save_movie([np.zeros((2, 2))], "a.webm"), "must end in .mp4 or .gif"), (lambda: save_movie([np.zeros((2, 2))], "a.gif", fps=0), "fps is 0"),
    (lambda: comparison([], []), "no pictures"), (lambda: comparison([np.zeros((2, 2))], {}), "no pictures")])
def test_bad_input_is_told(call, says):
    with pytest.raises(ValueError, match=says): call()
