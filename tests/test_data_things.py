"""The pictures of a set of things do not depend on who makes them."""
import torch

from zerolab.data.things import draw_things, four_cameras, render_things


def test_any_number_of_workers_makes_the_same_set():
    things = draw_things(6, 4)
    alone, together = render_things(things, 16), render_things(things, 16, workers=2)
    assert torch.equal(alone.pictures, together.pictures)
    assert alone.prompts == together.prompts


def test_orthographic_cameras_keep_rows():
    cameras = four_cameras(64, "orthographic")
    points = torch.rand(50, 3)*1.8 - 0.9
    uv, _ = cameras.project(points)
    assert (uv[..., 1] - uv[:1, :, 1]).abs().max() < 0.2
    assert ((uv[0, :, 0] + uv[2, :, 0]) - 64).abs().max() < 0.2          # opposite views mirror each other
