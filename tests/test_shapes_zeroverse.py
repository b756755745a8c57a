"""What every shape must be: closed, outward, finite, described, and the same bytes every time."""
import hashlib
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import chi2, kstest

from zerolab.data.make import all_around
from zerolab.shapes.captions import VOCABULARY, words
from zerolab.shapes.heightfield import displace, height_field
from zerolab.shapes.primitives import KINDS, facet, join, move_patch, primitive, random_rotation, scale_patch, weld
from zerolab.shapes.textures import PATTERNS, make_texture
from zerolab.shapes.zeroverse import (HEIGHT_FIELD, PAPER, PRIMITIVES, RELEASE, THINGS, THINNEST, VERSION, _draw_amplitude, _draw_part, augmentations,
                                      make_part, make_shape, part_count, primitives_only, quarter_turns)

SMALL = replace(HEIGHT_FIELD, texture_size=16, resolution=8)


def random_part(kind, seed, resolution=12):
    "A stretched, bumpy, turned primitive."
    rng = np.random.default_rng(seed)
    half_extents, rotation, centre = rng.uniform(.25, 2, 3), random_rotation(rng), rng.uniform(-1, 1, 3)
    patches = [scale_patch(patch, half_extents) for patch in primitive(kind, resolution)]
    bumpy = [displace(patch, height_field(rng, patch.positions.shape[:2], .1 * half_extents.min(), patch.wraps)) for patch in patches]
    return [move_patch(patch, rotation, centre) for patch in bumpy]


def assert_closed(positions, faces):
    "Each edge once in either direction, and a positive volume."
    corners = weld(positions)[faces]
    edges = np.concatenate([corners[:, [0, 1]], corners[:, [1, 2]], corners[:, [2, 0]]]).astype(np.int64)
    forward, backward = edges[:, 0] << 32 | edges[:, 1], edges[:, 1] << 32 | edges[:, 0]
    assert (edges[:, 0] != edges[:, 1]).all()
    assert len(np.unique(forward)) == len(forward)
    np.testing.assert_array_equal(np.sort(forward), np.sort(backward))
    a, b, c = np.moveaxis(positions[faces].astype(float), 1, 0)
    assert np.einsum("fk,fk->", a, np.cross(b, c)) > 0


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("resolution", [3, 7, 24])
def test_primitives_are_closed(kind, resolution):
    geometry = join(primitive(kind, resolution))
    assert_closed(geometry.positions, geometry.faces)
    assert np.abs(geometry.positions).max() == pytest.approx(1)


@pytest.mark.parametrize("kind", KINDS)
def test_bumpy_parts_are_closed_in_float32(kind):
    for seed in range(5):
        geometry = join(random_part(kind, seed))
        assert_closed(geometry.positions.astype(np.float32), geometry.faces)


@pytest.mark.parametrize("kind", KINDS)
def test_manifold_library_agrees(kind):
    manifold3d = pytest.importorskip("manifold3d")
    geometry = join(random_part(kind, 3))
    ids = weld(geometry.positions)
    places = np.zeros((ids.max() + 1, 3), np.float32)
    places[ids] = geometry.positions
    solid = manifold3d.Manifold(manifold3d.Mesh(places, ids[geometry.faces].astype(np.uint32)))
    assert solid.status() == manifold3d.Error.NoError
    assert solid.volume() > 0
    assert solid.genus() == (1 if kind == "torus" else 0)


@pytest.mark.parametrize("kind", KINDS)
def test_normals_are_unit_and_outward(kind):
    for patches in (primitive(kind, 24), [scale_patch(patch, (.3, 1., 1.9)) for patch in primitive(kind, 24)], random_part(kind, 1, 24)):
        geometry = join(patches)
        np.testing.assert_allclose(np.linalg.norm(geometry.normals, axis=1), 1, atol=1e-9)
        a, b, c = np.moveaxis(geometry.positions[geometry.faces], 1, 0)
        cross = np.cross(b - a, c - a)
        agreement = np.einsum("fk,fk->f", geometry.normals[geometry.faces].mean(1), cross) / np.linalg.norm(cross, axis=1)
        assert (agreement > 0).mean() > .995 and agreement.mean() > .95     # a fold of a steep bump may be seen edge-on


def test_flat_surfaces_keep_their_shape():
    geometry = join(primitive("torus", 6))
    flat = facet(geometry, [0])
    np.testing.assert_array_equal(flat.positions[flat.faces], geometry.positions[geometry.faces])
    a, b, c = np.moveaxis(flat.positions[flat.faces], 1, 0)
    assert (np.einsum("fck,fk->fc", flat.normals[flat.faces], np.cross(b - a, c - a)) > 0).all()


def test_textures_tile():
    "A picture that tiles steps no more across the wrap than inside; its half does."
    def excess(albedo):
        lines = albedo.astype(float)
        return max(np.abs(side[0] - side[-1]).mean() / max(np.abs(np.diff(side, axis=0)).mean((1, 2)).max(), 1.) for side in (lines, lines.swapaxes(0, 1)))
    textures = [make_texture(np.random.default_rng(seed), 64) for seed in range(120)]
    assert {texture.pattern for texture in textures} == set(PATTERNS)
    by_pattern = {name: np.mean([excess(texture.albedo) for texture in textures if texture.pattern == name]) for name in PATTERNS}
    assert max(by_pattern.values()) < 1.2, by_pattern
    assert excess(next(texture.albedo for texture in textures if texture.pattern == "cloudy")[:32, :32]) > 1.5


def test_counts_follow_the_paper():
    counts = np.bincount([part_count(seed) for seed in range(100_000, 104_000)], minlength=10)[1:]
    weights = np.array([5, 5, 5, 5, 5, 4, 3, 2, 1])
    expected = weights / weights.sum() * counts.sum()
    assert ((counts - expected)**2 / expected).sum() < 26.1       # 8 degrees of freedom, p = 0.001


SURFACES = {kind: len(primitive(kind, 3)) for kind in KINDS}


def within_chance(counts, expected):
    "Chi-square as improbable as four standard deviations: once in 16,000."
    counts, expected = np.asarray(counts, float), np.asarray(expected, float)
    expected = expected / expected.sum() * counts.sum()
    return ((counts - expected)**2 / expected).sum() < chi2.isf(6.3e-5, len(counts) - 1)


def share_is(values, probability):
    "Four standard deviations of a count."
    return abs(np.mean(values) - probability) < 4 * np.sqrt(probability * (1 - probability) / len(values))


@pytest.mark.parametrize("recipe", [PAPER, RELEASE], ids=["PAPER", "RELEASE"])
def test_two_thousand_objects_are_drawn_as_the_recipe_says(recipe):
    "Without meshes; each tolerance is four standard deviations, and the seeds are fixed."
    counts = np.array([part_count(seed, recipe) for seed in range(2000)])
    assert within_chance(np.bincount(counts, minlength=10)[1:], recipe.count_weights)
    parts = [(seed, index, _draw_part(seed, index, recipe)) for seed in range(2000) for index in range(counts[seed])]
    assert within_chance([sum(part.kind == kind for *_, part in parts) for kind in recipe.kinds], np.ones(len(recipe.kinds)))
    extents = np.array([part.half_extents for *_, part in parts]).ravel()
    assert kstest(extents, "uniform", (.25, 1.75)).pvalue > 6.3e-5
    heights = [(_draw_amplitude(seed, index, number, part, recipe)[0], .4 * THINNEST[part.kind] * min(part.half_extents))
               for seed, index, part in parts for number in range(SURFACES[part.kind])]
    assert share_is([height > 0 for height, _ in heights], recipe.height_field_probability)
    assert kstest([height / most for height, most in heights if height], "uniform").pvalue > 6.3e-5
    cut, wired = np.array([augmentations(seed, recipe) for seed in range(2000)]).T
    assert share_is(cut, recipe.boolean_probability) and share_is(wired, recipe.wireframe_probability)
    if recipe.exclusive: assert not (cut & wired).any()
    else: assert share_is(cut & wired, recipe.boolean_probability * recipe.wireframe_probability)


@pytest.mark.parametrize("objects", [200, pytest.param(2000, marks=pytest.mark.slow)])
def test_cameras_are_where_the_paper_says(objects):
    distances = np.concatenate([np.linalg.norm(all_around(np.random.default_rng([0, seed]), (64, 64), views=32).c2w[:, :3, 3].numpy(), axis=1)
                                for seed in range(objects)])
    assert 2 <= distances.min() + 1e-6 and distances.max() <= 3 + 1e-6
    assert kstest(distances, "uniform", (2, 1)).pvalue > 6.3e-5


@pytest.mark.slow
def test_two_thousand_objects_are_what_was_drawn():
    "Built: what is in the shapes has the statistics of the recipe too. Tolerances as above; a few heaps offer nothing to cut."
    recipe = replace(PAPER, resolution=6, texture_size=16)
    shapes = [make_shape(seed, recipe) for seed in range(2000)]
    assert within_chance(np.bincount([len(shape.parts) for shape in shapes], minlength=10)[1:], PAPER.count_weights)
    surfaces = [surface for shape in shapes for part in shape.parts for surface in part.surfaces]
    assert share_is([surface.height > 0 for surface in surfaces], .5)
    assert share_is([surface.faceted for surface in surfaces], PAPER.flat_probability)
    assert share_is([shape.wire is not None for shape in shapes], .2)
    cuts = [shape.cut for shape in shapes if shape.cut]
    asked = sum(augmentations(seed, recipe)[0] for seed in range(2000))
    assert .99 * asked <= len(cuts) <= asked and share_is([augmentations(seed, recipe)[0] for seed in range(2000)], .4)
    assert share_is([cut.thickness > 0 for cut in cuts], .5)
    assert set(PAPER.cutters) == {cut.cutter.kind for cut in cuts}
    assert not any(shape.cut and shape.wire for shape in shapes)


def test_surfaces_and_kinds_are_all_drawn():
    parts = [part for seed in range(60) for part in make_shape(seed, replace(SMALL, resolution=4)).parts]
    surfaces = [surface for part in parts for surface in part.surfaces]
    assert {part.kind for part in parts} == set(KINDS)
    assert {surface.pattern for surface in surfaces} == set(PATTERNS)
    assert .4 < np.mean([surface.height > 0 for surface in surfaces]) < .6
    assert .05 < np.mean([surface.faceted for surface in surfaces]) < .15
    extents = np.array([part.half_extents for part in parts])
    assert .25 <= extents.min() < .35 and 1.9 < extents.max() <= 2 and np.abs([part.centre for part in parts]).max() <= 1


def test_part_zero_does_not_depend_on_the_number_of_parts():
    one, nine = replace(SMALL, count_weights=(1,)), replace(SMALL, count_weights=(0,) * 8 + (1,))
    for seed in range(10):
        alone, crowd = make_shape(seed, one), make_shape(seed, nine)
        assert alone.parts == crowd.parts[:1]
        np.testing.assert_array_equal(alone.mesh.albedo, crowd.mesh.albedo[:len(alone.mesh.albedo)])
        part, patches, _ = make_part(seed, 0, SMALL)
        assert part == alone.parts[0] and len(patches) == len(part.surfaces)


def test_every_seed_builds():
    for seed in range(201):
        shape = make_shape(seed, SMALL)
        mesh = shape.mesh                       # its constructor refuses NaN, wrong indices and normals that are not unit
        assert 1 <= len(shape.parts) <= 9
        assert np.isfinite(mesh.uvs).all()
        assert np.ptp(mesh.positions, axis=0).max() == pytest.approx(1.8, abs=1e-5)
        assert np.abs(mesh.bounds.sum(0)).max() < 1e-5
        assert set(np.unique(mesh.material_ids)) == set(range(len(mesh.albedo)))
        assert 3 <= len(shape.caption.split()) <= 5
        for sentence in (shape.caption, shape.dense_caption):
            assert set(words(sentence)) <= VOCABULARY


DIGEST = """
import hashlib
from zerolab.shapes.zeroverse import HEIGHT_FIELD, make_shape
digest = hashlib.sha256()
for seed in range(4):
    shape = make_shape(seed, HEIGHT_FIELD)
    for name in ("positions", "normals", "uvs", "faces", "material_ids", "albedo", "roughness", "metallic"): digest.update(getattr(shape.mesh, name).tobytes())
    digest.update(repr((shape.parts, shape.caption, shape.dense_caption)).encode())
print(digest.hexdigest())
"""


def test_same_bytes_in_every_process():
    digests = {subprocess.run([sys.executable, "-c", DIGEST], env={**os.environ, "PYTHONHASHSEED": hash_seed, "OMP_NUM_THREADS": threads},
                              capture_output=True, text=True, check=True).stdout for hash_seed, threads in (("1", "1"), ("77", "2"))}
    assert len(digests) == 1


def drawn_geometry(recipe):
    "A hash of parts and triangles, without their paint."
    digest = hashlib.sha256()
    for seed in (0, 52, 2024):
        shape = make_shape(seed, replace(recipe, texture_size=16))
        digest.update(repr([(part.kind, [round(x, 6) for x in part.half_extents + part.centre]) for part in shape.parts]).encode())
        digest.update(np.round(shape.mesh.positions[shape.mesh.faces].mean((0, 1)), 4).tobytes() + bytes(len(shape.mesh.faces) % 256))
    return digest.hexdigest()[:12]


def test_version_guards_the_shapes():
    "If this fails, the same seed gives another shape than before: raise VERSION, and say so where data sets are made."
    recipes = dict(PRIMITIVES=PRIMITIVES, HEIGHT_FIELD=HEIGHT_FIELD, THINGS=THINGS, PAPER=PAPER, RELEASE=RELEASE)
    assert (VERSION, {name: drawn_geometry(recipe) for name, recipe in recipes.items()}) == (2, dict(
        PRIMITIVES="9fec575fb97f", HEIGHT_FIELD="e981da347a24", THINGS="864d4454b442", PAPER="f478034e85ff", RELEASE="5acf93480af3"))


@pytest.mark.parametrize("seed", [-1, 2**32, 1.5, "7", None, True])
def test_bad_seeds_are_refused(seed):
    with pytest.raises(ValueError, match="must be a whole number"): make_shape(seed)


# ---- Defects of the released program, see also tests/test_shapes_augment.py


def test_height_fields_are_on():
    "The release draws whether a surface stays flat, and by default the odds are 1: no object has any relief unless one finds the flag."
    assert PAPER.height_field_probability == RELEASE.height_field_probability == .5 and primitives_only(RELEASE).height_field_probability == 0
    for recipe in (PAPER, RELEASE):
        bumps = [surface.height > 0 for seed in range(20) for part in make_shape(seed, replace(recipe, resolution=4, texture_size=16)).parts
                 for surface in part.surfaces]
        assert share_is(bumps, .5)
    for seed in range(10):                                                                                # and the relief is in the mesh
        (part, bumpy, _), (_, plain, _) = (make_part(seed, 0, recipe) for recipe in (replace(SMALL, height_field_probability=1.), primitives_only(SMALL)))
        lifted = np.linalg.norm(bumpy[0].positions - plain[0].positions, axis=-1).max()
        assert .1 * part.surfaces[0].height < lifted < 1.6 * part.surfaces[0].height


def test_each_surface_has_its_own_finish():
    """The release reads the number of the shape where the number of the material stands, so all surfaces of an object get the roughness of one.
    Here the triangles of each material lie on that surface of that part whose roughness and metal it has."""
    recipe = replace(primitives_only(PAPER), kinds=("cube", "cylinder"), texture_size=16, resolution=4, flat_probability=.5)
    for seed in range(20):
        shape, number = make_shape(seed, recipe), 0
        for index, part in enumerate(shape.parts):
            alone = make_part(seed, index, recipe)[0]
            for surface, own in zip(part.surfaces, alone.surfaces):
                mesh = shape.mesh
                assert mesh.roughness[number] == np.float32(own.roughness) and mesh.metallic[number] == np.float32(own.metallic)
                corners = mesh.positions[np.unique(mesh.faces[mesh.material_ids == number])] / shape.scale + np.array(shape.middle)
                x, y, z = ((corners - part.centre) @ np.array(part.rotation) / part.half_extents).T
                at = {"side": np.hypot(x, y), "bottom": -z, "top": z, **{f"{name}{sign}": value if sign == "+" else -value
                      for name, value in zip("xyz", (x, y, z)) for sign in "+-"}}[surface.name]
                np.testing.assert_allclose(at, 1, atol=1e-5)
                number += 1
        assert number == len(shape.mesh.albedo)
        assert number < 2 or len(np.unique(shape.mesh.roughness)) == number


@pytest.mark.parametrize("objects", [60, pytest.param(1000, marks=pytest.mark.slow)])
def test_one_process_makes_any_number_of_objects(objects):
    "The release makes one object in a process, and most of its time is the start. Here a process goes on, and does not grow."
    def resident(): return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    if not Path("/proc/self/statm").exists(): pytest.skip("no /proc: memory cannot be read")
    recipe = replace(PAPER, resolution=6, texture_size=16)
    for seed in range(60): make_shape(seed, recipe)
    before = resident()
    for seed in range(objects): make_shape(seed, recipe)
    assert resident() - before < 8 << 20


# ---- The released program's own way


def test_the_chain_carries_all_parts_but_the_last():
    recipe = replace(primitives_only(RELEASE), texture_size=16, resolution=4)
    for seed in range(30):
        shape = make_shape(seed, recipe)
        own = [_draw_part(seed, index, recipe) for index in range(len(shape.parts))]
        assert shape.parts[-1].centre == own[-1].centre and shape.parts[-1].rotation == own[-1].rotation
        for part, before in zip(shape.parts[:-1], own): assert part.centre != before.centre
        for part, before in zip(shape.parts, own):
            assert (part.kind, part.half_extents) == (before.kind, before.half_extents)
            assert (np.array(before.centre) >= 0).all() and max(before.centre) <= max(before.half_extents)
            np.testing.assert_allclose(np.array(part.rotation) @ np.array(part.rotation).T, np.eye(3), atol=1e-12)
        apart = [np.linalg.norm(np.subtract(a.centre, b.centre)) for a, b in zip(shape.parts, shape.parts[1:])]
        assert all(distance < 20 for distance in apart)
        for field in ("roughness", "metallic"): assert len(np.unique(getattr(shape.mesh, field))) == 1
        assert (shape.mesh.albedo == shape.mesh.albedo[0]).all()


# ---- things that stand upright


def test_quarter_turns_are_the_24_of_the_cube():
    rng, seen = np.random.default_rng(0), set()
    for _ in range(400):
        turned = quarter_turns(rng)
        assert set(np.abs(turned).ravel()) == {0., 1.} and np.linalg.det(turned) == pytest.approx(1) and np.array_equal(turned @ turned.T, np.eye(3))
        seen.add(turned.tobytes())
    assert len(seen) == 24


def test_a_shape_is_upright_as_a_whole_or_not_at_all():
    aligned = lambda part: np.allclose(np.abs(np.array(part.rotation)).max(0), 1)
    shares = [np.mean([aligned(_draw_part(seed, index, THINGS)) for index in range(4)]) for seed in range(400)]
    assert set(shares) == {0., 1.} and np.mean(shares) == pytest.approx(THINGS.upright_probability, abs=0.08)   # three standard errors
    assert not any(aligned(_draw_part(seed, 0, HEIGHT_FIELD)) for seed in range(50))


def test_standing_upright_changes_nothing_else():
    plain = replace(THINGS, upright_probability=0.)
    for seed in range(20):
        a, b = make_shape(seed, THINGS), make_shape(seed, plain)
        assert [(p.kind, p.half_extents, p.centre, p.surfaces) for p in a.parts] == [(p.kind, p.half_extents, p.centre, p.surfaces) for p in b.parts]
