"""Textures: natural colours, coordinates without seams, pictures from folders, and the same bytes every time."""
import hashlib
import os
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from zerolab.scene.paths import data_dir, read_json
from zerolab.shapes import textures
from zerolab.shapes.materials import draw_material, fingerprint, list_materials, load_material, read_name, shrink_materials, tileable
from zerolab.shapes.primitives import KINDS, primitive
from zerolab.shapes.textures import COLOURS, PATTERNS, make_texture, seams, srgb_to_oklab, uv_matrix
from zerolab.shapes.zeroverse import HEIGHT_FIELD, PAPER, PRIMITIVES, Recipe, make_part, make_shape, with_materials

SMALL = replace(HEIGHT_FIELD, texture_size=32, resolution=8)


def sample(picture, uvs):
    "Bilinear lookup as the renderer does it: texel centres at (k + 0.5) / S, repeated."
    size = len(picture)
    place = np.asarray(uvs) * size - .5
    cell = np.floor(place)
    u, v = np.moveaxis(place - cell, -1, 0)[..., None]
    column, row = (np.moveaxis(cell.astype(int), -1, 0))
    at = lambda down, across: picture[(row + down) % size, (column + across) % size].astype(float)
    return (1 - v) * ((1 - u) * at(0, 0) + u * at(0, 1)) + v * ((1 - u) * at(1, 0) + u * at(1, 1))


# ---- coordinates


def test_colours_are_continuous_across_every_wrap():
    "The last row or column of points lies on the first, and must show the same colour, however a texture is scaled and turned."
    closed = set()
    for seed in range(60):
        part, patches, albedo = make_part(seed, 0, SMALL)
        for number, (patch, picture) in enumerate(zip(patches, albedo)):
            for axis in range(2):
                if not patch.wraps[axis]: continue
                first, last = (patch.uvs.take(index, axis) for index in (0, -1))
                assert np.abs(sample(picture, first) - sample(picture, last)).max() < 1e-3
                points = [patch.positions.take(index, axis) for index in (0, -1)]
                np.testing.assert_array_equal(*points)
                closed.add((part.kind, number, axis))
    assert len(closed) == 8       # sphere 1, cylinder 3, cone 2, torus 2


def test_a_seam_is_found_where_there_is_one():
    "The same test fails for a rotation that does not know of the seam."
    patch = primitive("sphere")[0]
    picture = make_texture(np.random.default_rng(3), 32).albedo
    uvs = np.einsum("jk,...k->...j", uv_matrix(1.3, .4), patch.uvs)
    assert np.abs(sample(picture, uvs[:, 0]) - sample(picture, uvs[:, -1])).max() > 5


def test_float32_leaves_no_seam():
    "Mesh coordinates are float32; a cut's surface is closed as well."
    for seed in range(30):
        shape = make_shape(seed, replace(SMALL, kinds=("sphere", "torus"), count_weights=(1,)))
        mesh = shape.mesh
        order = np.lexsort(np.round(mesh.positions, 6).T)
        same = (np.diff(np.round(mesh.positions[order], 6), axis=0) == 0).all(1)
        colours = sample(mesh.albedo[0], mesh.uvs.astype(float))
        if shape.parts[0].kind == "torus":               # a sphere's poles show many colours
            assert np.abs(colours[order[1:]] - colours[order[:-1]])[same].max() < .05


@pytest.mark.parametrize("kind", KINDS)
def test_matrices_are_near_what_was_asked_for(kind):
    rng = np.random.default_rng(0)
    for patch in primitive(kind):
        closed = seams(patch)
        for _ in range(100):
            scale, angle = rng.uniform(1.5, 4), rng.uniform(0, 2*np.pi)
            matrix = uv_matrix(scale, angle, closed)
            wanted = scale * np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
            assert np.abs(matrix - wanted).max() <= (1.01 if len(closed) == 2 else .8 if closed else 1e-12)
            assert np.linalg.det(matrix) > 0
            for seam in closed: np.testing.assert_allclose(matrix @ seam, np.round(matrix @ seam), atol=1e-9)


# ---- colours


def test_natural_pictures_are_nearer_to_scans_than_vivid_ones():
    "Against the stored histograms of sixteen scans; textures themselves instead of pictures, so the margin is coarse."
    stored = read_json(data_dir() / "results" / "texture-statistics.json")
    edges = stored["edges"]["chroma"]
    scans = (np.array(stored["scans"]["chosen"]["chroma"]) + np.array(stored["scans"]["judge"]["chroma"])) / 2
    def distance(natural):
        drawn = np.concatenate([make_texture(np.random.default_rng(seed), 32, natural).albedo[::4, ::4].reshape(-1, 3) for seed in range(400)])
        chroma = np.linalg.norm(srgb_to_oklab(drawn / 255)[:, 1:], axis=1)
        found = np.histogram(np.clip(chroma, 0, edges[-1] - 1e-9), edges)[0] / len(chroma)
        return np.abs(np.cumsum(found - scans)).sum() / len(scans)
    assert distance(1.) < .06 < .15 < distance(0.)


def test_stored_result_says_that_held_out_scans_are_matched_better_than_before():
    distances = read_json(data_dir() / "results" / "texture-statistics.json")["distances"]
    js = {kind: np.mean(list(found["JS"].values())) for kind, found in distances.items()}
    assert js["natural"] < .7 * js["before"] and js["natural, PAPER"] < .7 * js["before, PAPER"] and js["before"] < js["vivid"]


def test_words_of_a_texture():
    for seed in range(200):
        texture = make_texture(np.random.default_rng(seed), 64)
        assert texture.pattern in PATTERNS and set(texture.colours) <= set(COLOURS) and 1 <= len(texture.colours) <= 2
        if texture.pattern != "plain": assert textures.contrast(texture.albedo) > .008       # grain comes on top, and changes little


# ---- bytes and time

DIGEST = """
import hashlib
import numpy as np
from zerolab.shapes.textures import make_texture
digest = hashlib.sha256()
for seed in range(120):
    for size in (32, 128): digest.update(make_texture(np.random.default_rng(seed), size).albedo.tobytes())
print(digest.hexdigest())
"""


def test_same_bytes_whatever_the_threads():
    outputs = {subprocess.run([sys.executable, "-c", DIGEST], capture_output=True, text=True, check=True,
                              env={**os.environ, "OMP_NUM_THREADS": threads, "PYTHONHASHSEED": threads}).stdout for threads in ("1", "3")}
    assert len(outputs) == 1


def test_a_texture_costs_few_transforms():
    "As a ratio within one run: the mean texture of 256 texels costs less than six FFTs of its size."
    def seconds(function, repeats):
        start = time.process_time()
        for k in range(repeats): function(k)
        return (time.process_time() - start) / repeats
    field = np.random.default_rng(0).random((256, 256), dtype=np.float32)
    make = lambda k: make_texture(np.random.default_rng(k), 256)
    make(0)
    transform = min(seconds(lambda k: np.fft.rfft2(field), 40) for _ in range(3))
    assert min(seconds(make, 60) for _ in range(3)) < 6 * transform


# ---- folders of pictures


@pytest.fixture
def folder(tmp_path):
    for seed in range(4): Image.fromarray(make_texture(np.random.default_rng(seed), 64, 1.).albedo).save(tmp_path / f"m{seed}_basecolor.png")
    Image.new("L", (16, 16), 128).save(tmp_path / "m0_roughness.png")
    Image.fromarray(np.full((16, 16), 65535, np.uint16)).save(tmp_path / "m0_metallic.png")
    return tmp_path


def test_shapes_from_a_folder(folder):
    recipe = with_materials(replace(SMALL, texture_size=64), folder, .5)
    shapes = [make_shape(seed, recipe) for seed in range(20)]
    surfaces = [surface for shape in shapes for part in shape.parts for surface in part.surfaces]
    assert np.mean([surface.pattern == "textured" for surface in surfaces]) == pytest.approx(.5, abs=.12)
    for shape, again in zip(shapes[:4], [make_shape(seed, recipe) for seed in range(4)]): np.testing.assert_array_equal(shape.mesh.albedo, again.mesh.albedo)
    plain = make_shape(3, replace(SMALL, texture_size=64))
    untouched = [surface.pattern != "textured" for part in shapes[3].parts for surface in part.surfaces]
    np.testing.assert_array_equal(shapes[3].mesh.albedo[untouched], plain.mesh.albedo[untouched])       # photographs move nothing else
    assert Recipe(**{name: getattr(recipe, name) for name in vars(recipe)}) == recipe and hash(recipe)


def test_means_of_maps(folder):
    maps = list_materials(folder)["m0"]
    material = load_material(maps, "m0", 64)
    assert material.roughness == pytest.approx(128 / 255) and material.metallic == pytest.approx(1.)      # 8 and 16 bits
    np.testing.assert_array_equal(material.albedo, np.asarray(Image.open(maps["basecolor"])))


def test_the_place_of_a_folder_does_not_matter_but_its_content_does(folder, tmp_path_factory):
    before = fingerprint(folder)
    moved = tmp_path_factory.mktemp("elsewhere") / "copy"
    folder.rename(moved)
    assert fingerprint(moved) == before
    one = draw_material(np.random.default_rng(1), str(moved), before, 64)
    moved.rename(folder)
    np.testing.assert_array_equal(draw_material(np.random.default_rng(1), str(folder), before, 64).albedo, one.albedo)
    Image.new("RGB", (64, 64), "red").save(folder / "m1_basecolor.png")
    assert fingerprint(folder) != before
    recipe = replace(SMALL, materials=str(folder), materials_fingerprint="0" * 16, materials_probability=1.)
    with pytest.raises(ValueError, match="the folder has changed"): make_shape(0, recipe)


def test_any_shape_and_mode_of_picture(tmp_path):
    rng = np.random.default_rng(0)
    for number, (mode, size) in enumerate([("RGB", (90, 40)), ("RGBA", (33, 57)), ("L", (8, 8)), ("P", (64, 64)), ("CMYK", (40, 40))]):
        ending = "jpg" if mode == "CMYK" else "png"
        Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), np.uint8)).convert(mode).save(tmp_path / f"picture{number}.{ending}")
    for name, maps in list_materials(tmp_path).items():
        material = load_material(maps, name, 32)
        assert material.albedo.shape == (32, 32, 3) and material.albedo.dtype == np.uint8
    copy = shrink_materials(tmp_path, tmp_path / "small", 32)
    assert list(list_materials(copy)) == [f"picture{number}" for number in range(5)]


def test_what_does_not_tile_is_mirrored():
    for seed in range(40):
        texture = make_texture(np.random.default_rng(seed), 128).albedo
        np.testing.assert_array_equal(tileable(texture), texture)
    slope = np.broadcast_to(np.linspace(0, 255, 64).astype(np.uint8)[:, None, None], (64, 64, 3))
    mirrored = tileable(slope)
    np.testing.assert_array_equal(mirrored[0], mirrored[-1])
    np.testing.assert_array_equal(mirrored, mirrored[::-1])


@pytest.mark.parametrize("stem, kind, name", [("rust_BaseColor", "basecolor", "rust"), ("rust_Base_Color", "basecolor", "rust"),
                                              ("rust-albedo", "basecolor", "rust"),
                                              ("Metal012_2K-JPG_Metalness", "metallic", "Metal012_2K_JPG"), ("rust_AmbientOcclusion", "other", "rust"),
                                              ("coast_sand_rough_1k", "roughness", "coast_sand_1k"), ("colorado", "basecolor", "colorado")])
def test_names(stem, kind, name):
    assert read_name(stem) == (kind, name)


def test_the_recipe_says_which_materials(tmp_path, folder):
    assert (PRIMITIVES.materials, PRIMITIVES.materials_probability, PAPER.materials_fingerprint) == ("", 0., "")
    recipe = with_materials(PAPER, folder, .25)
    assert recipe.materials_fingerprint == fingerprint(folder) and len(recipe.materials_fingerprint) == 16
    assert hashlib.sha256(repr(recipe).encode()).hexdigest() != hashlib.sha256(repr(PAPER).encode()).hexdigest()
