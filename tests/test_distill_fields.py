"""Volume rendering beyond what its notebooks show: batches, far cameras, bounded work, and what bad input gets."""
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from zerolab.distill.fields import FAST, Field, MarchConfig, keep_rays, ray_weights, render_field, resample, spread
from zerolab.distill.occupancy import OccupancyGrid, skip_empty
from zerolab.distill.regularisers import eikonal
from zerolab.distill.surface import field_meshes
from zerolab.scene.cameras import Cameras, orbit

CAMERAS = orbit([0, 90, 200], 20, 2.7, size=(16, 16))


def balls(radii, **kw):
    """One ball a scene, of these radii."""
    radii = torch.as_tensor(radii)
    distance = lambda points: points.norm(dim=-1) - radii[:, None]
    colour = lambda points: (points + 1).clamp(0, 2)/2*radii[:, None, None]
    return Field(lambda points: (distance(points), colour(points)), distance, batch=len(radii), **kw)


@pytest.mark.parametrize("skip_below", [0., 1e-3])
def test_scenes_drawn_together_are_the_scenes_drawn_alone(skip_below):
    march = replace(FAST, skip_below=skip_below, normals="finite_difference")
    together = render_field(balls([0.2, 0.5, 0.7]), CAMERAS, torch.ones(3), march)
    for i, radius in enumerate([0.2, 0.5, 0.7]):
        alone = render_field(balls([radius]), CAMERAS, torch.ones(3), march)
        for name in ("rgb", "alpha", "depth", "z_variance", "normals"):
            assert torch.allclose(getattr(together, name)[i], getattr(alone, name)[0], atol=1e-5), name


def test_each_scene_has_its_own_cameras_and_backgrounds():
    rigs = [orbit([a], 20, 2.7, size=(16, 16)) for a in (0, 120)]
    colours = torch.tensor([[[1., 0, 0]], [[0, 0, 1.]]])
    both = render_field(balls([0.4, 0.6]), Cameras.stack(rigs), colours)
    for i, radius in enumerate([0.4, 0.6]):
        alone = render_field(balls([radius]), rigs[i], colours[i, 0])
        assert torch.allclose(both.rgb[i], alone.rgb[0], atol=1e-5)
    per_view = render_field(balls([0.4]), CAMERAS, torch.eye(3)[None])
    assert torch.allclose(per_view.rgb[0, :, 0, 0], torch.eye(3), atol=1e-3)


def test_the_fields_own_background_is_seen_where_nothing_hides_it():
    field = balls([0.3], background=lambda directions: directions.abs())
    picture = render_field(field, CAMERAS)
    directions = CAMERAS.rays()[1]
    empty = picture.alpha[0, ..., 0] == 0
    assert empty.float().mean() > 0.5
    assert torch.allclose(picture.rgb[0][empty], directions.abs()[empty])
    assert torch.allclose(render_field(field, CAMERAS, torch.zeros(3)).rgb[0][empty], torch.zeros(3))


def test_a_camera_as_good_as_orthographic_sees_the_ball_at_its_distance():
    rig = orbit([0, 90], 0, 400., fov=2*np.degrees(np.arctan(1/400)), size=(33, 33))
    picture = render_field(balls([0.5], beta=0.005), rig, None, replace(FAST, coarse=64, fine=64))
    assert abs(picture.depth[0, 0, 16, 16, 0].item() - 399.5) < 0.02
    area = picture.alpha.mean().item()*4     # the picture shows a square of side 2
    assert np.pi*0.5**2 < area < np.pi*0.52**2     # a soft surface takes half of the light of rays that pass by at up to 4 beta


@given(st.lists(st.floats(0, 50), min_size=1, max_size=12), st.floats(1e-3, 0.5))
@settings(max_examples=50, deadline=None)
def test_weights_share_out_what_is_hidden(density, length):
    density = torch.tensor(density, dtype=torch.float64)
    lengths = torch.full_like(density, length)
    weights = ray_weights(density, lengths)
    assert (weights >= 0).all() and torch.isclose(weights.sum(), 1 - torch.exp(-(density*lengths).sum()))
    first = ray_weights(density, lengths, "first_order")
    assert (first >= 0).all() and first.sum() <= 1 + 1e-9


def test_the_first_order_is_scaledreamers_product_where_it_holds():
    density, lengths = torch.rand(5, 20)*5, torch.full((5, 20), 0.02)
    alpha = density*lengths
    slow = [alpha[:, i]*torch.prod(1 - alpha[:, :i], 1) for i in range(20)]
    assert torch.allclose(ray_weights(density, lengths, "first_order"), torch.stack(slow, 1), atol=1e-6)


@given(st.integers(1, 9), st.integers(1, 30), st.integers(0, 1000))
@settings(max_examples=50, deadline=None)
def test_quantiles_rise_and_share_the_weights_evenly(pieces, count, seed):
    numbers = torch.Generator().manual_seed(seed)
    edges = torch.rand(pieces + 1, generator=numbers, dtype=torch.float64).sort().values.cumsum(0)
    weights = torch.rand(pieces, generator=numbers, dtype=torch.float64) + 0.01
    found = resample(edges, weights, spread(count).double())
    assert torch.isclose(found[0], edges[0]) and torch.isclose(found[-1], edges[-1]) and (found.diff() >= -1e-12).all()
    total = torch.cat([torch.zeros(1), weights.cumsum(0)]).double()
    share = np.interp(found, edges, total/total[-1])
    assert np.allclose(np.diff(share), 1/count, atol=1e-6)


def test_rays_that_are_kept_keep_their_order():
    keep = torch.tensor([[0, 1, 0, 1, 1], [1, 0, 0, 0, 0]]).bool()
    first, hit = keep_rays(keep, (torch.arange(5.).expand(2, 5), keep))
    assert first.tolist() == [[1, 3, 4], [0, 1, 2]] and hit.tolist() == [[True]*3, [True, False, False]]
    assert keep_rays(keep & False, (torch.zeros(2, 5),))[0].shape == (2, 1)     # never none at all


@pytest.mark.parametrize("normals", ["finite_difference", "autograd"])
@pytest.mark.parametrize("merge", [False, True])
def test_groups_bound_the_points_of_a_lookup_and_change_no_gradient(normals, merge):
    seen, results = [], []
    for limit in (2**21, 3000):
        weight = torch.full((1,), 0.6, requires_grad=True)
        def distance(points):
            seen.append(points.shape[1])
            return points.norm(dim=-1) - weight + 0.05*torch.sin(5*points[..., 0])
        field = Field(lambda points: (distance(points), torch.sigmoid(points*weight)), distance)
        picture = render_field(field, CAMERAS, torch.ones(3), replace(FAST, normals=normals, merge=merge, max_points=limit))
        (picture.rgb.mean() + picture.normals[..., 0].mean() + eikonal(picture.samples)).backward()
        results.append((picture.rgb.detach(), weight.grad.clone()))
        if limit == 2**21: seen.clear()
    assert max(seen) <= 3*3000      # three shifted points for a finite difference
    assert torch.allclose(results[0][0], results[1][0], atol=1e-6) and torch.allclose(results[0][1], results[1][1], rtol=1e-4)


def test_no_gradient_is_kept_where_none_is_wanted():
    with torch.no_grad(): picture = render_field(balls([0.5]), CAMERAS, None, replace(FAST, normals="autograd"))
    assert not picture.rgb.requires_grad and not picture.normals.requires_grad
    inside = picture.alpha[..., 0] > 0.99
    assert inside.any() and (picture.normals[inside].norm(dim=-1) > 0.9).all()


def test_nothing_to_see_is_background_and_still_has_a_gradient_path():
    size = torch.tensor([0.01], requires_grad=True)
    distance = lambda points: points.norm(dim=-1) + 0.8 + size
    field = Field(lambda points: (distance(points), points.abs().clamp(0, 1)), distance)
    picture = render_field(field, CAMERAS, torch.ones(3))
    picture.rgb.mean().backward()
    assert torch.allclose(picture.rgb, torch.ones(1), atol=1e-6) and torch.isfinite(size.grad).all()


def test_a_scene_that_shrank_to_nothing_can_come_back_beside_one_that_is_seen():
    sizes = torch.tensor([-0.1, 0.5], requires_grad=True)
    distance = lambda points: points.norm(dim=-1) - sizes[:, None]
    field = Field(lambda points: (distance(points), torch.zeros_like(points)), distance, batch=2)
    picture = render_field(field, CAMERAS, torch.ones(3), replace(FAST, skip_below=0.5))
    assert picture.alpha[0].max() < 0.1
    picture.rgb.mean().backward()
    assert (sizes.grad < 0).all()      # larger is darker, for both


def test_a_field_that_skips_is_differentiable_and_the_same():
    radius = torch.tensor([0.4], requires_grad=True)
    distance = lambda points: points.norm(dim=-1) - radius
    field = Field(lambda points: (distance(points), (points + 1)/2), distance)
    grid = OccupancyGrid(resolution=24)
    share = grid.update(field)
    assert 0.02 < share < 0.5
    grads = []
    for scene in (field, skip_empty(field, grid)):
        radius.grad = None
        render_field(scene, CAMERAS, torch.ones(3)).rgb.square().mean().backward()
        grads.append(radius.grad.clone())
    assert torch.allclose(*grads, rtol=0.02)


def test_meshes_of_a_batch_are_the_meshes_of_each():
    together = field_meshes(balls([0.4, 0.6]), 24)
    for mesh, radius in zip(together, [0.4, 0.6]):
        lengths = np.linalg.norm(mesh.positions, axis=1)
        assert np.allclose(lengths, radius, atol=0.01)
        assert (np.einsum("nc,nc->n", mesh.normals, mesh.positions)/lengths > 0.95).all()
        corners = mesh.positions[mesh.faces]
        outward = np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])
        assert (np.einsum("nc,nc->n", outward, corners.mean(1)) >= 0).all()


@pytest.mark.parametrize("change, says", [(dict(near=-1.), "0 <= near < far"), (dict(fine=-1), "fine is -1"), (dict(max_points=0), "max_points is 0"),
                                          (dict(alpha="linear"), "alpha is 'linear'"), (dict(skip_below=1.), "skip_below is 1.0")])
def test_settings_that_make_no_sense_are_named(change, says):
    with pytest.raises(ValueError, match=says): MarchConfig(**change)


def test_bad_fields_and_cameras_are_named():
    with pytest.raises(ValueError, match="radius is 0"): balls([0.5], radius=0)
    with pytest.raises(ValueError, match=r"leading dimensions \(3,\), the field holds 1"): render_field(balls([0.5]), Cameras.stack([CAMERAS]*3))
    with pytest.raises(ValueError, match="no ray of any camera"): render_field(balls([0.5]), CAMERAS, None, replace(FAST, far=0.5))
    with pytest.raises(ValueError, match="set normals="): eikonal(render_field(balls([0.5]), CAMERAS).samples)
    grid = OccupancyGrid()
    with pytest.raises(ValueError, match="every scene would need its own grid"): grid.update(balls([0.3, 0.4]))


def test_normals_point_out_of_densities_too():
    density = lambda points: 40*torch.sigmoid(20*(0.5 - points.norm(dim=-1)))
    field = Field(lambda points: (density(points), points.abs().clamp(0, 1)), density, "density")
    picture = render_field(field, CAMERAS, None, replace(FAST, coarse=64, fine=64, normals="autograd"))
    forward = CAMERAS.forward[:, None, None]
    seen = picture.alpha[0, ..., 0] > 0.95
    facing = -(F.normalize(picture.normals[0], dim=-1)*forward).sum(-1)
    assert seen.any() and facing[seen].min() > 0
