"""Visual hulls: never smaller than the object, and equal to a slow reference that shares no code with them."""
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.spatial import ConvexHull

from zerolab.lrm.hull import hull_span
from zerolab.scene.cameras import Cameras, gso_inputs, look_at, random_views

REACH = 1.3


# ---- convex bodies that know where a ray meets them


class Ball:
    def __init__(self, rng): self.centre, self.radius = torch.from_numpy(rng.uniform(-0.3, 0.3, 3)), rng.uniform(0.3, 0.6)

    def chord(self, origins, directions, margin=0.):
        "Where rays enter and leave the ball made smaller by a margin: distances from the origin, NaN for those that miss."
        offset = self.centre - origins
        middle = (offset*directions).sum(-1)
        half = ((self.radius - margin)**2 - offset.square().sum(-1) + middle.square()).sqrt()
        return middle - half, middle + half


class Polytope:
    "Where a point's products with all outward normals stay below the offsets."
    def chord(self, origins, directions, margin=0.):
        speed = directions @ self.normals.T
        crossing = (self.offsets - margin - origins @ self.normals.T)/speed
        entry = crossing.where(speed < 0, -torch.inf).amax(-1)
        leave = crossing.where(speed > 0, torch.inf).amin(-1)
        missed = entry > leave
        return entry.masked_fill(missed, torch.nan), leave.masked_fill(missed, torch.nan)


class Box(Polytope):
    def __init__(self, rng):
        turn = torch.from_numpy(np.linalg.qr(rng.normal(size=(3, 3)))[0])
        self.normals, half = torch.cat([turn, -turn]), torch.from_numpy(rng.uniform(0.25, 0.5, 3))
        self.offsets = torch.cat([half, half]) + self.normals @ torch.from_numpy(rng.uniform(-0.2, 0.2, 3))


class Crystal(Polytope):
    def __init__(self, rng):
        points = rng.normal(size=(12, 3))
        planes = ConvexHull(0.7*points/np.linalg.norm(points, axis=1, keepdims=True)*rng.uniform(0.7, 1, (12, 1))).equations
        self.normals, self.offsets = torch.from_numpy(planes[:, :3]), torch.from_numpy(-planes[:, 3])


def silhouettes(body, cameras): return (~body.chord(*cameras.rays())[0].isnan()).double()


def from_middle(origins, directions, distances): return distances + (origins*directions).sum(-1)


def cameras_around(rng, count, size=96): return random_views(rng, count, (2.2, 3.0), size=(size, size), dtype=torch.float64)


@pytest.mark.parametrize("body", [Ball, Box, Crystal])
@pytest.mark.parametrize("samples", [48, 400])
@pytest.mark.parametrize("seed", range(4))
def test_never_smaller_than_the_object(body, samples, seed):
    """What lies deeper in the body than one and a half pixels is in the hull, for every camera's silhouette is full there.
    Between two samples the crossing is interpolated, so that half a step may be lost at an end."""
    rng = np.random.default_rng(seed)
    shape, rig, other = body(rng), cameras_around(rng, 6), cameras_around(rng, 1)
    origins, directions = other.rays()
    step, margin = 2*REACH/samples, 1.5*3.6/rig.K[0, 0, 0].item()
    entry, leave = (from_middle(origins, directions, x) for x in shape.chord(origins, directions, margin))
    sure = leave - entry > step                                        # a shorter chord may fall between two samples
    span = hull_span(silhouettes(shape, rig), rig, origins, directions, reach=REACH, samples=samples)
    assert sure.sum() > 200 and span[sure].isfinite().all()
    assert (span[..., 0] - entry)[sure].max() <= step/2 + 1e-9 and (leave - span[..., 1])[sure].max() <= step/2 + 1e-9


def test_many_views_close_in_on_a_convex_body():
    rng = np.random.default_rng(0)
    ball = Ball(rng)
    rig, other = cameras_around(rng, 40), cameras_around(rng, 1)
    origins, directions = other.rays()
    span = hull_span(silhouettes(ball, rig), rig, origins, directions, samples=400)
    entry, leave = (from_middle(origins, directions, x) for x in ball.chord(origins, directions))
    assert ((leave - entry) - (span[..., 1] - span[..., 0])).abs().nanmedian() < 0.03
    assert (span[..., 0].isfinite() ^ entry.isfinite()).float().mean() < 0.01


def test_another_view_can_only_cut():
    rng = np.random.default_rng(1)
    rig, masks = cameras_around(rng, 5), torch.from_numpy(rng.random((5, 96, 96))).round()
    origins, directions = cameras_around(rng, 1).rays()
    few, more = (hull_span(masks[:n], rig[:n], origins, directions) for n in (3, 5))
    met, step = more[..., 0].isfinite(), 2*REACH/48
    assert 0 < met.sum() < few[..., 0].isfinite().sum() and few[met].isfinite().all()
    assert ((more - few)[met][:, 0] >= -step).all() and ((more - few)[met][:, 1] <= step).all()


# ---- any masks at all, against a reference


def seen_by(masks, cameras, points):
    "The least opacity with which cameras see points [N,3]: `grid_sample` in place of the kernel's own interpolation."
    uv, depth = cameras.project(points)
    size = torch.tensor(cameras.size[::-1])
    grid = (2*uv/size - 1).nan_to_num(9)[:, None]
    return F.grid_sample(masks[:, None], grid, mode="bilinear", padding_mode="zeros", align_corners=False)[:, 0, 0].where(depth > 1e-6, 0).amin(0)


def smooth_masks(rng, count, size):
    noise = torch.from_numpy(rng.random((count, 1, size, size)))
    return F.interpolate(F.avg_pool2d(noise, 4), (size, size), mode="bilinear")[:, 0].mul(5).sub(2.1).clamp(0, 1)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("graze", [False, True])
def test_equals_a_walk_written_down_in_torch(seed, graze):
    rng, samples = np.random.default_rng(seed), 24
    rig, masks = cameras_around(rng, 3, 40), smooth_masks(rng, 3, 40)
    origins, directions = cameras_around(rng, 1, 16).rays()
    span = hull_span(masks, rig, origins, directions, samples=samples, graze=graze).reshape(-1, 2)
    middles = (origins - (origins*directions).sum(-1, keepdim=True)*directions).reshape(-1, 3)
    place = torch.linspace(-REACH, REACH, samples + 1, dtype=torch.float64)
    opacity = seen_by(masks, rig, (middles[:, None] + place[:, None]*directions.reshape(-1, 1, 3)).reshape(-1, 3)).unflatten(0, (-1, samples + 1))

    def crossing(now, place):
        first = (now >= 0.5).double().argmax(-1)
        at = lambda x, i: x.gather(-1, i[:, None])[:, 0]
        t, previous = place[first], (first - 1).clamp_min(0)
        share = (at(now, first) - 0.5)/(at(now, first) - at(now, previous))
        return torch.where(first > 0, t - share*(t - place[previous]), t)

    hit = (opacity >= 0.5).any(-1)
    expected = torch.stack([crossing(opacity, place), crossing(opacity.flip(-1), place.flip(0))], -1)
    assert 5 < hit.sum() < len(hit) - 5
    torch.testing.assert_close(span[hit], expected[hit], atol=1e-9, rtol=0)
    if not graze: assert span[~hit].isnan().all()
    else:
        closest = place[opacity.argmax(-1)]
        touched = ~hit & (opacity > 0).any(-1)
        assert touched.any() and (span[touched, 0] == span[touched, 1]).all()
        torch.testing.assert_close(span[touched, 0], closest[touched], atol=1e-9, rtol=0)
        assert span[~hit & ~touched].isnan().all()


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_entry_before_exit_whatever_the_masks(seed, dtype):
    rng = np.random.default_rng(seed)
    rig, masks = gso_inputs(4, size=(32, 32), dtype=dtype), torch.from_numpy(rng.random((4, 32, 32)) < rng.uniform(0.3, 0.9)).to(dtype)
    span = hull_span(masks, rig, *rig.rays(), samples=int(rng.integers(1, 60)))
    assert span.dtype == dtype and span.shape == (4, 32, 32, 2)
    assert torch.equal(*span.isnan().unbind(-1)) and (span[..., 0] <= span[..., 1])[span[..., 0].isfinite()].all()


def test_grazing_changes_no_ray_that_hits():
    rng = np.random.default_rng(3)
    rig, masks = cameras_around(rng, 4, 48), silhouettes(Box(rng), cameras_around(np.random.default_rng(3), 4, 48))
    rays = rig.rays()
    plain, grazing = (hull_span(masks, rig, *rays, graze=graze) for graze in (False, True))
    hit = plain.isfinite()
    assert hit.any() and torch.equal(plain[hit], grazing[hit]) and grazing.isfinite().sum() >= hit.sum()


def test_only_wanted_rays_are_walked():
    rig = gso_inputs(4, size=(32, 32))
    wanted = torch.rand(4, 32, 32, generator=torch.Generator().manual_seed(0)) < 0.4
    span = hull_span(torch.ones(4, 32, 32), rig, *rig.rays(), wanted=wanted)
    assert span[~wanted].isnan().all() and torch.equal(span[wanted], hull_span(torch.ones(4, 32, 32), rig, *rig.rays())[wanted])


def test_a_camera_that_looks_away_rules_everything_out():
    rig = Cameras.cat([gso_inputs(4, size=(32, 32)), look_at(torch.tensor([[2., 0, 0]]), (4., 0, 0), size=(32, 32))])
    assert hull_span(torch.ones(5, 32, 32), rig, *rig[0].rays()).isnan().all()
    assert hull_span(torch.ones(4, 32, 32), rig[:4], *rig[0].rays()).isfinite().any()


def test_the_hull_turns_with_the_scene():
    "The same numbers for cameras and rays turned together."
    rng = np.random.default_rng(5)
    rig, masks = cameras_around(rng, 4, 40), smooth_masks(rng, 4, 40)
    turn = torch.from_numpy(np.linalg.qr(rng.normal(size=(3, 3)))[0])
    turn = turn*torch.linalg.det(turn)
    w2c = rig.w2c.clone()
    w2c[:, :3, :3] = w2c[:, :3, :3] @ turn.T
    turned = Cameras(rig.K, w2c, rig.size)
    torch.testing.assert_close(hull_span(masks, turned, *turned.rays()), hull_span(masks, rig, *rig.rays()), atol=1e-6, rtol=0, equal_nan=True)


@pytest.mark.parametrize("origins, directions, wanted", [((9, 3), (3,), None), ((9, 3), (9, 3), (4,)), ((3,), (9, 3), None)])
def test_rays_that_do_not_match_are_refused(origins, directions, wanted):
    rig = gso_inputs(4, size=(16, 16))
    with pytest.raises(ValueError, match="hull_span"):
        hull_span(torch.ones(4, 16, 16), rig, torch.ones(origins), torch.ones(directions), wanted=torch.ones(wanted, dtype=torch.bool) if wanted else None)
