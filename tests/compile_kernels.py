"""Compile every numba kernel once, before workers start: together they would each compile all of them, and numba's cache has no lock."""
import numpy as np
import torch

from zerolab.data.scans import crease_normals
from zerolab.lrm.hull import hull_span
from zerolab.render.mesh import render_views
from zerolab.render.splats import median_depth, render_splats
from zerolab.scene.cameras import orbit
from zerolab.scene.gaussians import Gaussians
from zerolab.shapes.zeroverse import make_shape

cameras = orbit([0., 90.], size=(16, 16))
mesh = make_shape(0).mesh
views = render_views(mesh, cameras)
crease_normals(mesh.positions.astype(np.float64), mesh.faces)
for dtype in (torch.float32, torch.float64):
    rng = np.random.default_rng(0)
    leaves = [torch.tensor(values, dtype=dtype, requires_grad=True) for values in
              (rng.normal(size=(4, 3)), rng.normal(size=(4, 4)), np.full((4, 3), 0.1), np.full(4, 0.5), rng.normal(size=(4, 1, 3)))]
    moved = cameras.to(dtype=dtype)
    render = render_splats(Gaussians(*leaves), moved, backend="cpu")
    (render.rgb.sum() + render.depth.sum()).backward()
    render_splats(Gaussians(*leaves), moved, backend="cpu", absgrad=torch.zeros(2, 4, 2, dtype=dtype)).rgb.sum().backward()
    median_depth(Gaussians(*leaves), moved, backend="cpu")
hull_span(views.alpha, cameras, *cameras.rays())
