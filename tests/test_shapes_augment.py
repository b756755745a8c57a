"""Holes and wires: closed, finite, in the right place, truly described, and no other shape's business."""
import hashlib
import json
import os
import subprocess
import sys
from dataclasses import asdict, replace
from itertools import product

import numpy as np
import pytest

from zerolab.data.make import _check_settings
from zerolab.shapes import zeroverse
from zerolab.shapes.augment import FINENESS, cutter_solid, difference, shrink, solid, wire_lines, wireframe
from zerolab.shapes.captions import VOCABULARY, Part, words
from zerolab.shapes.primitives import KINDS, join, move_patch, primitive, random_rotation, scale_patch, weld
from zerolab.shapes.zeroverse import (FRAME, HEIGHT_FIELD, MIXES, PAPER, PRIMITIVES, RELEASE, THINGS, augmentations, make_shape, mix,
                                      no_boolean, no_heightfield, no_wireframe, primitives_only, stream)

ARRAYS = ("positions", "normals", "uvs", "faces", "material_ids", "albedo", "roughness", "metallic")
SMALL = dict(texture_size=16, resolution=8)
CUTS = replace(PAPER, boolean_probability=1., wireframe_probability=0., **SMALL)
WIRES = replace(PAPER, boolean_probability=0., wireframe_probability=1., **SMALL)
BOTH = replace(CUTS, wireframe_probability=1., exclusive=False)
UNCUT = replace(CUTS, boolean_probability=0.)
ALL_RELEASED = replace(RELEASE, boolean_probability=1., wireframe_probability=.5, **SMALL)


def assert_balanced(positions, faces):
    "A closed surface, perhaps several that touch: no edge without length, and each as often forward as backward."
    corners = weld(positions)[faces].astype(np.int64)
    edges = np.concatenate([corners[:, [0, 1]], corners[:, [1, 2]], corners[:, [2, 0]]])
    assert (edges[:, 0] != edges[:, 1]).all()
    np.testing.assert_array_equal(np.sort(edges[:, 0] << 32 | edges[:, 1]), np.sort(edges[:, 1] << 32 | edges[:, 0]))


def posed(kind, rng, size=(.4, 1.), number=0):
    "A stretched, turned primitive near the origin whose patches are numbered from `number`, and its pose."
    pose = rng.uniform(*size, 3), random_rotation(rng), rng.uniform(-.5, .5, 3)
    geometry = join([move_patch(scale_patch(patch, pose[0]), *pose[1:]) for patch in primitive(kind, 10)])
    return geometry._replace(patch_ids=geometry.patch_ids + number), pose


def in_drawing(shape, number):
    "Vertices of one material, where they were before the shape was centred and scaled."
    mesh = shape.mesh
    return mesh.positions[np.unique(mesh.faces[mesh.material_ids == number])] / shape.scale + np.array(shape.middle)


def off_surface(kind, half_extents, points):
    "Distance, roughly, of points [P,3] in a primitive's own frame from its surface; in units of its half extents."
    x, y, z = (points / half_extents).T
    ring = np.hypot(x, y)
    if kind == "cube": return np.abs(np.abs(points / half_extents).max(1) - 1)
    if kind == "sphere": return np.abs(np.hypot(ring, z) - 1)
    if kind == "torus": return np.abs(np.hypot(ring - .65, z) - .35)
    side = np.abs(ring - (1 if kind == "cylinder" else (1 - z) / 2))
    caps = np.abs(np.abs(z) - 1) if kind == "cylinder" else np.abs(z + 1)
    return np.minimum(side, caps)


def own_frame(part, points): return (points - part.centre) @ np.array(part.rotation)


@pytest.mark.parametrize("kind,cutter", product(KINDS, KINDS))
def test_differences_are_closed_and_exact(kind, cutter):
    rng = np.random.default_rng([KINDS.index(kind), KINDS.index(cutter)])
    geometry, (half_extents, rotation, centre) = posed(kind, rng)
    tool, _ = posed(cutter, rng, (.3, .6), number=10)
    whole = solid(geometry).manifold
    left = whole - solid(tool).manifold
    inner = shrink(geometry, .03, kind, half_extents, rotation, 10)
    room_left = solid(inner).manifold - solid(tool).manifold
    for room in (None, inner):
        result = difference(geometry, cutter_solid(tool), room, crumb=0.)
        again = solid(result.geometry).manifold                # refuses what is not closed
        assert_balanced(result.geometry.positions, result.geometry.faces)
        np.testing.assert_allclose(np.linalg.norm(result.geometry.normals, axis=1), 1, atol=1e-9)
        assert set(np.unique(result.geometry.patch_ids)) <= set(range(20))
        if result.geometry is geometry: assert again.volume() == pytest.approx(whole.volume(), rel=1e-9)      # the cutter is a bubble inside, or apart
        else: assert again.volume() == pytest.approx(left.volume() - (room_left.volume() if result.hollow else 0), rel=1e-9)


def test_uvs_and_materials_come_from_where_they_were():
    "Every triangle of the result lies in a triangle of its source, and its corners have the source's texture coordinates there."
    rng = np.random.default_rng(4)
    geometry, _ = posed("sphere", rng)
    tool, _ = posed("torus", rng, (.5, .9), number=10)
    result = difference(geometry, cutter_solid(tool)).geometry
    checked = 0
    for source, number in ((geometry, 0), (tool, 10)):
        corners, uvs = source.positions[source.faces], source.uvs[source.faces]
        frame = np.stack([corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0]], 1)
        normal = np.cross(frame[:, 0], frame[:, 1])
        inverse = np.linalg.inv(np.concatenate([frame, normal[:, None]], 1))
        for triangle in result.faces[result.patch_ids == number][::3]:
            local = np.einsum("mk,mkj->mj", result.positions[triangle].mean(0) - corners[:, 0], inverse)
            outside = np.maximum.reduce([-local[:, 0], -local[:, 1], local[:, 0] + local[:, 1] - 1, np.abs(local[:, 2]) * 10])
            at = outside.argmin()
            assert outside[at] < 1e-6
            expected = uvs[at, 0] + local[at, 0] * (uvs[at, 1] - uvs[at, 0]) + local[at, 1] * (uvs[at, 2] - uvs[at, 0])
            np.testing.assert_allclose(result.uvs[triangle].mean(0), expected, atol=1e-6)
            checked += 1
    assert checked > 100


@pytest.mark.parametrize("kind,fineness", product(KINDS, range(FINENESS)))
def test_wireframes_are_closed_and_thin(kind, fineness):
    points, pairs = wire_lines(kind, fineness)
    frame = wireframe(points, pairs, .05)
    assert_balanced(frame.positions, frame.faces)
    np.testing.assert_allclose(np.linalg.norm(frame.normals, axis=1), 1, atol=1e-9)
    a, b, c = np.moveaxis(frame.positions[frame.faces], 1, 0)
    assert (np.einsum("fk,fk->f", frame.normals[frame.faces].mean(1), np.cross(b - a, c - a)) > 0).all()       # outward
    start, along = points[pairs[:, 0]], points[pairs[:, 1]] - points[pairs[:, 0]]
    at = np.clip(np.einsum("vek,ek->ve", frame.positions[:, None] - start, along) / (along**2).sum(1), 0, 1)
    away = np.linalg.norm(frame.positions[:, None] - (start + at[..., None] * along), axis=-1).min(1)
    assert away.max() < .05


def check_shape(shape):
    "What every augmented shape must be."
    mesh = shape.mesh                       # its constructor refuses NaN, wrong indices and normals that are not unit
    assert_balanced(mesh.positions, mesh.faces)
    assert np.isfinite(mesh.uvs).all()
    assert np.ptp(mesh.positions, axis=0).max() == pytest.approx(1.8, abs=1e-5)
    surfaces = [surface for part in shape.parts for surface in part.surfaces]
    tools = [tool for tool in (shape.cut and shape.cut.cutter, shape.wire and shape.wire.frame) if tool]
    surfaces += [tool.surfaces[0] for tool in tools]
    assert len(mesh.albedo) == len(surfaces)
    np.testing.assert_allclose(mesh.roughness, [surface.roughness for surface in surfaces], rtol=1e-6)
    np.testing.assert_allclose(mesh.metallic, [surface.metallic for surface in surfaces], rtol=1e-6)
    drawn, left = set(np.unique(mesh.material_ids).tolist()), {number for number, surface in enumerate(surfaces) if surface.left > 0}
    behind = [surface.left == 0 and part.hollow for part in shape.parts for surface in part.surfaces]       # its inner side may be there yet
    assert left <= drawn <= left | set(np.flatnonzero(behind).tolist())
    for sentence in (shape.caption, shape.dense_caption):
        assert set(words(sentence)) <= VOCABULARY
    assert 3 <= len(words(shape.caption)) <= 5 and 30 <= len(words(shape.dense_caption)) <= 50


@pytest.fixture
def every_part_is_manifold(monkeypatch):
    "Looks at each part that a cut leaves, before the parts are stacked and rounded; says how many it saw."
    seen = []

    def checked(geometry, cutter, room=None):
        result = difference(geometry, cutter, room)
        if result.geometry is not None:
            seen.append(solid(result.geometry).manifold.num_tri())         # refuses edges that have not two sides
            for values in result.geometry[:3]: assert np.isfinite(values).all()
        return result
    monkeypatch.setattr(zeroverse, "difference", checked)
    return seen


def test_cut_shapes_are_closed(every_part_is_manifold):
    for seed in range(40): check_shape(make_shape(seed, CUTS))
    for seed in range(40, 50): check_shape(make_shape(seed, BOTH))
    for seed in range(50, 60): check_shape(make_shape(seed, ALL_RELEASED))
    assert len(every_part_is_manifold) > 60


@pytest.mark.slow
def test_two_thousand_cut_shapes_are_closed(every_part_is_manifold):
    "At the recipes' own resolution; a quarter has wires too, and a quarter comes from the released program's recipe."
    for seed in range(2000):
        recipe = (CUTS, BOTH, CUTS, ALL_RELEASED)[seed % 4]
        check_shape(make_shape(seed, replace(recipe, resolution=24)))
    assert len(every_part_is_manifold) > 2000


def test_cuts_take_no_second_thread():
    "Half of the time went into threads that wait for each other; the process may use all its processors afterwards."
    script = ("import os\nfrom dataclasses import replace\nfrom zerolab.shapes.zeroverse import *\nbefore = os.sched_getaffinity(0)\n"
              "make_shape(0, mix(0, 1, 0, replace(PAPER, texture_size=16)))\nprint(len(os.listdir('/proc/self/task')), os.sched_getaffinity(0) == before)")
    if not hasattr(os, "sched_getaffinity"): pytest.skip("threads choose no processors here")
    alone = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert alone.stdout.split() == ["1", "True"]


@pytest.mark.parametrize("kind,cutter", product(KINDS, KINDS))
def test_the_share_that_is_taken_is_that_of_the_volume(kind, cutter):
    rng = np.random.default_rng([7, KINDS.index(kind), KINDS.index(cutter)])
    for _ in range(4):
        geometry, pose = posed(kind, rng)
        tool, tool_pose = posed(cutter, rng, (.3, .6), number=10)
        part, taker = (Part(name, tuple(half_extents), tuple(centre), tuple(map(tuple, rotation)), ())
                       for name, (half_extents, rotation, centre) in ((kind, pose), (cutter, tool_pose)))
        whole = solid(geometry).manifold
        exact = (whole ^ solid(tool).manifold).volume() / whole.volume()
        assert zeroverse._taken(part, taker) == pytest.approx(exact, abs=.015)       # polyhedra of ten cells are a little smaller than what they stand for


def test_no_bump_pierces_a_wall():
    "The room behind a wall lies inside its part, however steep the relief is. One that is scaled down towards the middle sticks out of flat cones."
    for seed in range(40):
        recipe = replace(UNCUT, height_field_probability=1., resolution=16, count_weights=(1,))
        part, patches, _ = zeroverse.make_part(seed, 0, recipe)
        outer = join(patches)
        thickness = (.05, .2)[seed % 2] * min(part.half_extents) * dict(cone=.5, torus=.35).get(part.kind, 1.)
        inner = shrink(outer, thickness, part.kind, part.half_extents, part.rotation, 16)
        whole, room = solid(outer).manifold, solid(inner).manifold
        assert (room - whole).volume() < 1e-6 * whole.volume(), (seed, part.kind)
        assert .2 * whole.volume() < room.volume() < whole.volume()


def test_other_recipes_give_what_they_gave():
    "Hashed at version 2; raise VERSION (or CAPTION_VERSION, if only words change) with these."
    before = dict(PRIMITIVES=("65fdd1c2c863", "75ea0605ef08", "9a09dc7f7c23"), HEIGHT_FIELD=("e6b17e758202", "e7e21060a789", "764cde1cb5d0"),
                  THINGS=("45cdaf916082", "3dec16673b17", "e2ef2a557950"))
    for name, recipe in dict(PRIMITIVES=PRIMITIVES, HEIGHT_FIELD=HEIGHT_FIELD, THINGS=THINGS).items():
        for seed, expected in zip((0, 52, 2024), before[name]):
            shape = make_shape(seed, recipe)
            digest = hashlib.sha256(b"".join(getattr(shape.mesh, field).tobytes() for field in ARRAYS))
            digest.update(f"{shape.caption}|{shape.dense_caption}".encode())
            assert digest.hexdigest()[:12] == expected, (name, seed)


def bare(part): return replace(part, removed=0., tunnels=0, hollow=False, surfaces=tuple(replace(surface, left=1.) for surface in part.surfaces))


def test_augmentations_shift_no_other_draw():
    for seed in range(8):
        plain, cut, wired, both = (make_shape(seed, recipe) for recipe in (UNCUT, CUTS, WIRES, BOTH))
        for other in (cut, wired, both):
            assert tuple(map(bare, other.parts)) == plain.parts
            np.testing.assert_array_equal(other.mesh.albedo[:len(plain.mesh.albedo)], plain.mesh.albedo)
        assert both.cut == cut.cut
        if all(part.removed < 1 for part in both.parts): assert both.wire == wired.wire
        flat = make_shape(seed, no_heightfield(WIRES))
        assert flat.wire == wired.wire                   # bumps do not move the wires
    assert stream(PAPER, 5, 4, FRAME).random() != stream(PAPER, 5, 4, FRAME - 1).random()


def test_ablations_keep_the_other_class():
    for seed in range(400):
        cut, wired = augmentations(seed, PAPER)
        assert augmentations(seed, no_wireframe()) == (cut, False)
        assert augmentations(seed, primitives_only()) == (False, False)
        assert not wired or augmentations(seed, no_boolean()) == (False, True)


def test_ablations_leave_out_what_they_name():
    small = replace(PAPER, boolean_probability=.5, wireframe_probability=.5, **SMALL)
    for seed in range(12):
        full, smooth, whole, bare_of_wires, plain = (make_shape(seed, change(small)) for change in (
            lambda recipe: recipe, no_heightfield, no_boolean, no_wireframe, primitives_only))
        assert bool(full.cut) != bool(full.wire)
        heights = {name: [surface.height for part in shape.parts for surface in part.surfaces] for name, shape in
                   dict(full=full, smooth=smooth, whole=whole, wires=bare_of_wires, plain=plain).items()}
        assert not any(heights["smooth"]) and not any(heights["plain"]) and heights["full"] == heights["whole"] == heights["wires"]
        assert (smooth.cut is None) == (full.cut is None) and smooth.wire == full.wire
        assert whole.cut is None and whole.wire is not None                       # 0/0/50 of 50: all of the rest
        assert bare_of_wires.wire is None and bare_of_wires.cut == full.cut
        assert plain.cut is None and plain.wire is None


def test_mixes_of_the_tables():
    drawn = {row: np.array([augmentations(seed, mix(*row)) for seed in range(2000)]).mean(0) for rows in MIXES.values() for row in rows}
    for row, shares in drawn.items():
        expected = np.array(row[1:]) / sum(row)
        assert (abs(shares - expected) <= 4 * np.sqrt(expected * (1 - expected) / 2000)).all(), row       # four standard deviations


def test_paper_recipe_has_the_papers_statistics():
    "Tolerances are four standard deviations of the count."
    drawn = np.array([augmentations(seed, PAPER) for seed in range(2000)])
    assert not drawn.all(1).any()
    assert abs(drawn[:, 0].mean() - .4) < .044 and abs(drawn[:, 1].mean() - .2) < .036
    independent = np.array([augmentations(seed, RELEASE) for seed in range(2000)])
    assert abs(independent.all(1).mean() - .08) < .025 and abs(independent.mean(0) - (.4, .2)).max() < .044
    shapes = [make_shape(seed, replace(PAPER, resolution=4, texture_size=16)) for seed in range(160)]
    assert all((shape.wire is not None) == drawn[seed, 1] for seed, shape in enumerate(shapes))
    assert all(drawn[seed, 0] for seed, shape in enumerate(shapes) if shape.cut)
    cuts = [shape.cut for shape in shapes if shape.cut]
    assert len(cuts) >= .97 * drawn[:160, 0].sum()                       # some heaps offer nothing to cut
    assert abs(np.mean([cut.thickness > 0 for cut in cuts]) - .5) < 2 / np.sqrt(len(cuts))
    assert {cut.cutter.kind for cut in cuts} == {"cube", "sphere", "cylinder", "cone"}       # LRM-Zero section 3.2: no torus
    bumps = [surface.height > 0 for shape in shapes for part in shape.parts for surface in part.surfaces]
    assert abs(np.mean(bumps) - .5) < 2 / np.sqrt(len(bumps))          # on by default, unlike in the release
    removed = [1 - sum(p.remaining for p in shape.parts) / sum(p.volume for p in shape.parts) for shape in shapes if shape.cut]
    assert max(removed) <= 2/3 + 1e-9 and min(removed) > 0


# ---- Defects of the released program, see also tests/test_shapes_zeroverse.py


def test_cutters_and_wires_are_where_they_are_said_to_be():
    """The release takes a vertex in the frame of the mesh for a point of the world, so cutters and wires end up two to three times too near to
    the middle; and it always notes a wire sphere, whatever it has built."""
    seen = set()
    for seed in range(30):
        shape = make_shape(seed, replace(BOTH, cutters=KINDS, hollow_probability=0.))
        number = sum(len(part.surfaces) for part in shape.parts)
        for tool, material, slack in ((shape.cut.cutter, number, 1e-5), (shape.wire.frame, number + 1, None)):
            least = min(off_surface(part.kind, part.half_extents, own_frame(part, np.array([tool.centre])))[0] for part in shape.parts)
            assert least < .09                                        # the centre is on a part; a mesh has chords instead of arcs
            vertices = own_frame(tool, in_drawing(shape, material))
            assert len(vertices)
            if slack is None: assert np.abs(vertices).max() < max(tool.half_extents) + 1.3 * shape.wire.thickness / 2
            else: assert np.quantile(off_surface(tool.kind, tool.half_extents, vertices), .5) < .06
            assert tool.surfaces[0].name in ("cut", "wire")
        seen.add(shape.wire.frame.kind)
        longest = np.abs(own_frame(shape.wire.frame, in_drawing(shape, number + 1))).max()
        assert longest > .9 * shape.wire.frame.half_extents[0]
    assert seen == set(KINDS)


def test_the_wire_that_is_noted_is_the_one_that_is_drawn():
    "The release always notes a wire sphere. Here kind and fineness give back the very struts and joints of the mesh."
    seen = set()
    for seed in range(60):
        shape = make_shape(seed, replace(WIRES, flat_probability=0.))
        frame, mesh = shape.wire.frame, shape.mesh
        points, pairs = wire_lines(frame.kind, shape.wire.fineness)
        drawn = wireframe(points * frame.half_extents[0] @ np.array(frame.rotation).T + frame.centre, pairs, shape.wire.thickness)
        corners = mesh.positions[mesh.faces[mesh.material_ids == len(mesh.albedo) - 1]]
        np.testing.assert_allclose(corners / shape.scale + np.array(shape.middle), drawn.positions[drawn.faces], atol=1e-5)
        seen.add((frame.kind, shape.wire.fineness))
    assert len(seen) == len(KINDS) * FINENESS


def test_what_was_drawn_is_never_lost():
    """The release deletes the file that says what it cut and added, by emptying its folder after writing it. Here the shape carries all of it,
    it survives JSON, and cutting again with what was noted takes away the same."""
    for seed in range(6):
        shape = make_shape(seed, replace(BOTH, hollow_probability=0.))
        assert json.loads(json.dumps(asdict(shape.cut)))["cutter"]["kind"] == shape.cut.cutter.kind
        assert json.loads(json.dumps(asdict(shape.wire)))["thickness"] == shape.wire.thickness
        number = sum(len(part.surfaces) for part in shape.parts)
        tool = cutter_solid(zeroverse._plain(shape.cut.cutter, round(shape.recipe.resolution * zeroverse.CUTTER_CELLS), number))
        again, start = [], 0
        for index, part in enumerate(shape.parts):
            piece = join(zeroverse.make_part(seed, index, shape.recipe)[1])
            piece = piece._replace(patch_ids=piece.patch_ids + np.int32(start))
            start += len(part.surfaces)
            if part.removed == 1: continue
            again.append(difference(piece, tool).geometry.positions)
        positions = np.concatenate(again)
        drawn = np.concatenate([in_drawing(shape, material) for material in np.unique(shape.mesh.material_ids) if material <= number])
        assert np.ptp(drawn, axis=0) == pytest.approx(np.ptp(positions, axis=0), abs=1e-5)


def test_walls_of_the_mesh_are_as_thick_as_the_recipe_says():
    """The release gives its walls in the units before the object is scaled, so they come out about 2.5 times as thick. Here the distance between
    the two sides of a box, measured in the mesh that was scaled to 1.8, is what the recipe says."""
    recipe = replace(no_heightfield(CUTS), kinds=("cube",), half_extents=(.8, 2.), hollow_probability=1., flat_probability=0., count_weights=(0, 1))
    measured = []
    for seed in range(20):
        shape = make_shape(seed, recipe)
        start, scale = 0, make_shape(seed, primitives_only(recipe)).scale
        for part in shape.parts:
            for number, surface in enumerate(part.surfaces):
                axis, sign = number // 2, (1, -1)[number % 2]
                if not part.hollow or surface.left < .05: continue
                depth = part.half_extents[axis] - sign * own_frame(part, in_drawing(shape, start + number))[:, axis]
                if (inner := depth[depth > 1e-4]).size: measured.append(np.median(inner) * scale)
            start += len(part.surfaces)
        assert BOTH.wall[0] * .999 < shape.cut.thickness * scale < BOTH.wall[1] * 1.001
    assert len(measured) > 40 and .0095 < min(measured) and max(measured) < .0205


def test_walls_and_struts_are_as_thick_as_the_recipe_says():
    "The release multiplies them by the scale of the object, about 2.5."
    for seed in range(12):
        shape, scale = make_shape(seed, replace(BOTH, hollow_probability=1.)), make_shape(seed, primitives_only(CUTS)).scale
        for thickness, (low, high) in ((shape.cut.thickness, BOTH.wall), (shape.wire.thickness, BOTH.wire_thickness)):
            assert low <= thickness * scale * 1.001 and thickness * scale <= high * 1.001


def test_captions_say_what_was_done():
    for seed in range(14):
        plain, shape = make_shape(seed, UNCUT), make_shape(seed, BOTH)
        said, dense = set(words(shape.caption)), set(words(shape.dense_caption))
        assert ("wire" in said) == ("wire" in dense) == shape.description["wire"]["shows"]
        assert not {"hole", "hollow", "pierced", "wire"} & set(words(f"{plain.caption} {plain.dense_caption}"))
        if {"pierced", "hole"} & (said | dense): assert any(part.tunnels > 0 for part in shape.parts)
        if "hollow" in said | dense: assert shape.cut.thickness > 0


DIGEST = """
import hashlib
import sys

from dataclasses import replace
from zerolab.shapes.zeroverse import PAPER, RELEASE, make_shape
digest, recipe = hashlib.sha256(), replace(PAPER, boolean_probability=1., wireframe_probability=.5, exclusive=False, texture_size=32)
recipes = recipe, replace(PAPER, texture_size=32), replace(RELEASE, texture_size=32)
for seed in range(int(sys.argv[1])):
    recipe = recipes[seed % 3]
    shape = make_shape(seed, recipe)
    for name in ("positions", "normals", "uvs", "faces", "material_ids", "albedo", "roughness", "metallic"): digest.update(getattr(shape.mesh, name).tobytes())
    digest.update(repr((shape.parts, shape.cut, shape.wire, shape.caption, shape.dense_caption)).encode())
print(digest.hexdigest())
"""


MANY_THREADS = """
import manifold3d
ball = manifold3d.Manifold.sphere(1., 200)
(ball - ball.translate((.5, 0, 0))).num_tri()       # from here on the library has a thread for each processor
from zerolab.shapes.zeroverse import *
make_shape(9, RELEASE); make_shape(3, PAPER)
"""


@pytest.mark.parametrize("count", [30, pytest.param(200, marks=pytest.mark.slow)])
def test_same_bytes_in_every_process(count):
    """Whatever the hash seed, the number of threads, and what was built before. The release picks the imported object from a set, in the order
    of its hashes, and numbers and paints objects without a seed."""
    digests = {subprocess.run([sys.executable, "-c", first + DIGEST, str(count)], capture_output=True, text=True, check=True,
                              env={**os.environ, "PYTHONHASHSEED": hash_seed, "OMP_NUM_THREADS": threads, "NUMBA_NUM_THREADS": threads}).stdout
               for hash_seed, threads, first in (("1", "1", ""), ("77", "2", MANY_THREADS))}
    assert len(digests) == 1 and len(digests.pop().strip()) == 64


@pytest.mark.parametrize("change,message", [(dict(boolean_probability=1.5), "is no probability"), (dict(cutters=()), "must be some of"),
                                            (dict(wire_size=(.5, .2)), "must be a range"), (dict(wireframe_probability=.9), "are more than 1")])
def test_bad_recipes_are_refused(change, message):
    with pytest.raises(ValueError, match=message): replace(PAPER, **change)


def test_data_sets_made_before_go_on(tmp_path):
    "Their dataset.json knows nothing of holes and wires."
    path = tmp_path / "dataset.json"
    _check_settings(path, dict(recipe=HEIGHT_FIELD))
    noted = json.loads(path.read_text())
    for name in ("kinds", "wall", "exclusive", "boolean_probability"): del noted["recipe"][name]
    path.write_text(json.dumps(noted))
    _check_settings(path, dict(recipe=HEIGHT_FIELD))
    with pytest.raises(ValueError, match="was made with recipe"): _check_settings(path, dict(recipe=PAPER))
