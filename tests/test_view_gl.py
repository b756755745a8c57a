"""OpenGL is found, or found missing, and the process lives on."""
import os
import shutil
import subprocess
import sys

import pytest

from zerolab.view import gl
from chromium import opengl
from zerolab.view.gl import egl_devices, ensure_gl, find_opengl, gl_info, load_library

DRAW = """
import sys, torch
from zerolab.scene.gaussians import Gaussians
from zerolab.view.gl import ensure_gl, gl_info
from zerolab.view.scene import Scene
from zerolab.view.widgets import view
window = ensure_gl()
gaussians = Gaussians(0.3 * torch.randn(60, 3), torch.randn(60, 4), torch.full((60, 3), 0.1), torch.ones(60), torch.zeros(60, 1, 3))
with Scene((40, 60)) as scene:
    scene.add_splats(gaussians)
    scene.add_bounds()
    picture = scene.screenshot()
assert picture.shape == (40, 60, 3) and picture.std() > 5 and view(gaussians, size=(40, 60), static=True).snapshot().shape == (40, 60, 3)
assert ("vtkmodules.vtkRenderingOpenGL2" in sys.modules) == (window is not None), "VTK is left alone where it cannot draw"
print("drawn with", window, gl_info()["window"])
"""
NO_CTYPES = """
from zerolab.view import gl
original = gl.ctypes.CDLL
def without_opengl(name, *arguments, **options):
    if any(name in files for files in gl.LIBRARIES.values()): raise OSError("no such library")
    return original(name, *arguments, **options)
gl.ctypes.CDLL = without_opengl
"""


def python(script, before=(), **variables):
    environment = {name: value for name, value in os.environ.items() if name not in ("DISPLAY", "VTK_DEFAULT_OPENGL_WINDOW")} | variables
    return subprocess.run([*before, sys.executable, "-c", script], env=environment, capture_output=True, text=True)


def hiding(*names):
    """A command that runs another one where these libraries are empty files."""
    listing = subprocess.run(["ldconfig", "-p"], capture_output=True, text=True).stdout
    paths = {os.path.realpath(line.split("=> ")[1]) for line in listing.splitlines() if "=> " in line and line.split()[0].startswith(tuple(names))}
    mounts = " && ".join(f"mount --bind /dev/null {path}" for path in sorted(paths)) or "true"
    return ["unshare", "-m", "sh", "-c", f'{mounts} && exec "$@"', "sh"]


def can_hide():
    if not shutil.which("unshare") or not shutil.which("ldconfig"): return False
    return subprocess.run(["unshare", "-m", "sh", "-c", "mount --bind /dev/null /etc/hostname"], capture_output=True).returncode == 0


@pytest.fixture
def nothing_set(monkeypatch):
    for name in ("DISPLAY", "VTK_DEFAULT_OPENGL_WINDOW"): monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(gl.sys, "platform", "linux")


def test_without_a_library_the_cpu_draws_and_the_process_lives():
    result = python(NO_CTYPES + DRAW)
    assert (result.returncode, result.stdout) == (0, "drawn with None None\n"), result.stderr


@pytest.mark.skipif(not can_hide(), reason="needs the right to mount (root, unshare)")
def test_with_libraries_truly_gone_the_process_lives():
    result = python(DRAW, hiding("libOSMesa", "libEGL", "libGL.so", "libGLX", "libX11.so"))
    assert (result.returncode, result.stdout) == (0, "drawn with None None\n"), result.stderr


@pytest.mark.skipif(not can_hide() or not load_library("OSMesa"), reason="needs the right to mount, and libosmesa6")
def test_osmesa_alone_is_enough():
    result = python(DRAW, hiding("libEGL", "libGL.so", "libGLX", "libX11.so"))
    assert (result.returncode, result.stdout, result.stderr) == (0, "drawn with vtkOSOpenGLRenderWindow vtkOSOpenGLRenderWindow\n", "")


@opengl
def test_a_display_that_is_gone_does_no_harm():
    result = python(DRAW, DISPLAY=":77")
    assert result.returncode == 0 and result.stdout.startswith("drawn with vtk") and "vtkX" not in result.stdout, result.stderr


@pytest.mark.parametrize("screen, card, egl, osmesa, expected", [
    (True, True, True, True, "vtkXOpenGLRenderWindow"), (False, True, True, True, "vtkEGLRenderWindow"), (False, False, True, True, "vtkOSOpenGLRenderWindow"),
    (False, False, True, False, "vtkEGLRenderWindow"), (False, True, False, True, "vtkOSOpenGLRenderWindow"), (False, True, False, False, None)])
def test_the_order_of_preference(monkeypatch, nothing_set, screen, card, egl, osmesa, expected):
    monkeypatch.setattr(gl, "screen_answers", lambda: screen)
    monkeypatch.setattr(gl, "has_graphics_card", lambda: card)
    monkeypatch.setattr(gl, "egl_devices", lambda: int(egl))
    monkeypatch.setattr(gl, "load_library", lambda name: object() if name == "OSMesa" and osmesa else None)
    assert ensure_gl() == expected
    assert os.environ.pop("VTK_DEFAULT_OPENGL_WINDOW", None) == (None if screen else expected), "a screen is VTK's own choice"


def test_a_choice_is_kept_if_it_works(monkeypatch, nothing_set):
    monkeypatch.setattr(gl, "egl_devices", lambda: 1)
    monkeypatch.setattr(gl, "load_library", lambda name: None)
    for chosen, found in (("vtkEGLRenderWindow", "vtkEGLRenderWindow"), ("vtkOSOpenGLRenderWindow", None), ("vtkWonderWindow", None)):
        monkeypatch.setenv("VTK_DEFAULT_OPENGL_WINDOW", chosen)
        assert ensure_gl() == found and os.environ["VTK_DEFAULT_OPENGL_WINDOW"] == chosen


@pytest.mark.parametrize("platform, window", [("darwin", "vtkCocoaRenderWindow"), ("win32", "vtkWin32OpenGLRenderWindow")])
def test_other_systems_bring_their_own(monkeypatch, nothing_set, platform, window):
    monkeypatch.setattr(gl.sys, "platform", platform)
    assert ensure_gl() == window and "VTK_DEFAULT_OPENGL_WINDOW" not in os.environ


def test_an_egl_without_drivers_has_no_device(monkeypatch):
    monkeypatch.setattr(gl, "load_library", lambda name: None)
    assert egl_devices() == 0


@opengl
def test_info_names_what_draws():
    info = gl_info()
    assert info["window"] == find_opengl() and info["renderer"] and info["opengl"][0].isdigit() and "advice" not in info
