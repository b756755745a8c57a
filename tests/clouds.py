"""What tests of views and renderers share: a cloud to draw, what the loss sees of it, and how alike two pictures are."""
import numpy as np
import torch

from zerolab.render.splats import render_splats
from zerolab.scene.gaussians import Gaussians, rgb_to_sh


def cloud(count=1500, degree=0, seed=0):
    make = torch.Generator().manual_seed(seed)
    normal, uniform = lambda *size: torch.randn(size, generator=make), lambda *size: torch.rand(size, generator=make)
    sh = torch.cat([rgb_to_sh(uniform(count, 3))[:, None], 0.15 * normal(count, (degree + 1)**2 - 1, 3)], 1)
    return Gaussians(0.4 * normal(count, 3), normal(count, 4), torch.exp(-4.5 + 1.5 * uniform(count, 3)), 0.05 + 0.9 * uniform(count), sh)


def psnr(a, b): return -10 * np.log10(max(np.mean((np.asarray(a, float) - np.asarray(b, float))**2) / 255**2, 1e-12))


def truth(gaussians, camera, background=(1., 1., 1.)):
    rgb = render_splats(gaussians, camera, torch.tensor(background), backend="cpu").rgb[0]
    return (rgb.clamp(0, 1) * 255).round().byte().numpy()
