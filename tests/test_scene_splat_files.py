"""Files of Gaussians: against writers and readers that are not ours, with the errors that each format states, and thousands of damaged files."""
import gzip
import json
import math
import re
import struct
import threading
import tracemalloc
import zlib

import numpy as np
import pytest
import torch

from zerolab.jobs import cli
from zerolab.scene.gaussians import Gaussians, check_values, covariances, eval_sh, rotation_matrices, save_ply
from zerolab.scene.splat_files import (FORMATS, format_of, load_compressed_ply, load_gaussians, load_khr, load_ply, load_spz, load_splat, morton_order,
                                       save_compressed_ply, save_gaussians, save_khr, save_spz)
from zerolab.scene.transforms import transform, with_sh_degree

SUFFIXES = [known.suffix for known in FORMATS]
SH_C0 = 0.28209479177387814


def cloud(count=300, degree=3, seed=0) -> Gaussians:
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=generator)
    sh = torch.cat([0.8*draw(count, 1, 3), 0.2*draw(count, (degree + 1)**2 - 1, 3)], 1)
    return Gaussians(draw(count, 3), draw(count, 4), draw(count, 3).sub(3).exp(), draw(count).sigmoid(), sh)


def degrees_between(a, b):
    unit = lambda q: torch.nn.functional.normalize(q.double(), dim=-1)
    return torch.rad2deg(2*torch.asin(((unit(a) - unit(b)).norm(dim=-1).minimum((unit(a) + unit(b)).norm(dim=-1))/2).clamp(max=1)))


def turned(g, way=1.):
    "From z up to y up, or back."
    return transform(g, torch.tensor([[1., 0, 0, 0], [0, 0, way, 0], [0, -way, 0, 0], [0, 0, 0, 1]]))


# ---- what each format keeps


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("degree", range(5))
@pytest.mark.parametrize("count", [0, 1, 256, 300])
def test_there_and_back(tmp_path, suffix, degree, count):
    "The stated errors, each half a step of its quantisation."
    before = cloud(count, degree)
    if suffix == ".glb" and not count:
        with pytest.raises(ValueError, match="no empty arrays"): save_gaussians(before, tmp_path/"a.glb")
        return
    lost = save_gaussians(before, tmp_path/f"a{suffix}")
    after = load_gaussians(tmp_path/f"a{suffix}")
    kept = min(degree, format_of(f"a{suffix}").sh_degree)
    assert len(after) == count and after.sh_degree == kept and any("SH degree" in text for text in lost) == (degree > kept)
    if suffix == ".compressed.ply": before = before[torch.from_numpy(morton_order(before.means.numpy()))]
    before = with_sh_degree(before, kept)
    size = {c: t.split(256) for c, t in (("means", before.means), ("scales", before.scales.log()), ("sh", before.sh[:, 0]))}
    chunk = {c: torch.cat([(t.amax(0) - t.amin(0)).expand(len(t), 3) for t in parts]) if count else torch.zeros(0, 3) for c, parts in size.items()}
    exact = suffix in (".ply", ".glb")
    means = {".compressed.ply": chunk["means"]/1023*0.501, ".spz": 0.501/2**16}.get(suffix, 0)
    scales = {".compressed.ply": chunk["scales"]/1023*0.501, ".spz": 0.501/16}.get(suffix, 0)
    base = {".compressed.ply": chunk["sh"]/255*0.501, ".spz": 0.501/(255*0.15), ".splat": 0.501/255/SH_C0}.get(suffix, 0)
    rest = {".compressed.ply": 0.501/32, ".spz": 0.51/128}.get(suffix, 0)
    inside = ((0.5 + SH_C0*before.sh[:, 0]).clamp(0, 1) - 0.5)/SH_C0 if suffix == ".splat" else before.sh[:, 0]  # what 8 bits from 0 to 1 can say
    assert ((after.means - before.means).abs() <= means + 1e-6).all()
    assert ((after.scales.log() - before.scales.log()).abs() <= scales + 2e-6).all()
    assert ((after.opacities - before.opacities).abs() <= (0 if exact else 0.501/255) + 1e-6).all()
    assert ((after.sh[:, 0] - inside).abs() <= base + 2e-6).all()
    if suffix == ".spz": after, before = turned(after), turned(before)  # harmonics are rounded with y up, and turning them mixes the errors
    assert kept == 0 or ((after.sh - before.sh).abs()[:, 1:] <= rest + 2e-6).all()
    if suffix == ".spz": assert kept*count == 0 or (turned(after, -1).sh - turned(before, -1).sh).abs().max() < 0.02
    angle = {".splat": 1.0, ".spz": 0.3, ".compressed.ply": 0.25}.get(suffix, 1e-4)
    assert count == 0 or degrees_between(after.quats, before.quats).max() < angle


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_harmonics_end_in_the_right_place(tmp_path, suffix):
    "One coefficient is set for each Gaussian, so that any exchange of channels or orders shows."
    degree = min(3, format_of(f"a{suffix}").sh_degree)
    count = 3*(degree + 1)**2
    sh = (0.8*torch.eye(count)).reshape(count, (degree + 1)**2, 3)
    before = Gaussians(torch.arange(count)[:, None]/count*torch.ones(3), torch.tensor([1., 0, 0, 0]).expand(count, 4), torch.full((count, 3), 0.1),
                       torch.full((count,), 0.5), sh)
    save_gaussians(before, tmp_path/f"a{suffix}")
    assert (load_gaussians(tmp_path/f"a{suffix}").sh - sh).abs().max() < 0.02  # all lie on a diagonal: Morton's order is their own


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_extremes(tmp_path, suffix):
    "Flat, transparent, opaque and far Gaussians are written and read, and what is clipped is said."
    before = cloud(6)
    scales = before.scales.clone(); scales[0] = 0; scales[1] = torch.tensor([0, 1e-3, 1e3])
    before = Gaussians(before.means*1e4, before.quats*torch.tensor([1e-6, 1e6, 1, 1, 1, 1])[:, None], scales, torch.tensor([0., 1, 0.5, 0.5, 0, 1]), 30*before.sh)
    lost = save_gaussians(before, tmp_path/f"a{suffix}")
    after = load_gaussians(tmp_path/f"a{suffix}")
    check_values(after, "after")
    if suffix == ".spz": assert [text.split(" (")[0] for text in lost] == ["colours beyond -0.44 to 1.44", "harmonics beyond -1 to 1", "scales beyond 4.5e-5 to 379"]
    if suffix == ".splat": assert "colours beyond 0 to 1 (6 Gaussians, clipped)" in lost
    if suffix != ".compressed.ply": assert torch.allclose(after.opacities, before.opacities, atol=0.003)


def test_positions_that_no_spz_holds(tmp_path):
    with pytest.raises(ValueError, match="reaches to 4e6"): save_spz(Gaussians(cloud(2).means*1e8, *cloud(2).tensors()[1:]), tmp_path/"a.spz")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("field, value, says", [("means", math.nan, "finite"), ("scales", -1., "need 0"), ("opacities", 1.5, "need 0 to 1"), ("quats", 0., "no rotation"),
                                                ("sh", math.inf, "finite"), ("scales", math.inf, "finite")])
def test_what_no_file_should_hold_is_not_written(tmp_path, suffix, field, value, says):
    bad = cloud(5)
    tensors = dict(zip(("means", "quats", "scales", "opacities", "sh"), (t.clone() for t in bad.tensors())))
    tensors[field][3, ...] = value
    with pytest.raises(ValueError, match=f"{field}.* of Gaussian 3 is .*{says}"): save_gaussians(Gaussians(**tensors), tmp_path/f"a{suffix}")
    assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match="unstack"): save_gaussians(Gaussians.stack([bad, bad]), tmp_path/f"a{suffix}")


def test_doubles_gradients_and_upper_case(tmp_path):
    before = cloud(3).to(dtype=torch.float64)
    leaf = Gaussians(before.means.requires_grad_(), *before.tensors()[1:])
    for suffix in SUFFIXES:
        save_gaussians(leaf, tmp_path/f"A{suffix.upper()}")
        assert len(load_gaussians(tmp_path/f"A{suffix.upper()}")) == 3


def test_morton_keeps_neighbours():
    grid = np.stack(np.meshgrid(*[np.arange(8.)]*3, indexing="ij"), -1).reshape(-1, 3)
    shuffled = grid[np.random.default_rng(0).permutation(512)]
    walked = shuffled[morton_order(shuffled)]
    for cube in walked.reshape(64, 8, 3): assert (np.ptp(cube, axis=0) == 1).all()  # each eight are a cube of two
    for cube in walked.reshape(8, 64, 3): assert (np.ptp(cube, axis=0) == 3).all()
    assert len(morton_order(np.zeros((0, 3)))) == 0 and morton_order(np.ones((5, 3))).tolist() == [0, 1, 2, 3, 4]


# ---- .ply files as other tools write them


def table_of(g: Gaussians) -> dict[str, list[float]]:
    means, quats, scales, opacities, sh = (t.double().numpy() for t in g.tensors())
    rest = sh.shape[1] - 1
    return ({axis: means[:, i] for i, axis in enumerate("xyz")} | {f"n{axis}": 0*means[:, i] for i, axis in enumerate("xyz")} | {f"f_dc_{c}": sh[:, 0, c] for c in range(3)} |
            {f"f_rest_{c*rest + k}": sh[:, 1 + k, c] for c in range(3) for k in range(rest)} | {"opacity": np.log(opacities/(1 - opacities))} |
            {f"scale_{i}": np.log(scales[:, i]) for i in range(3)} | {f"rot_{i}": quats[:, i] for i in range(4)})


def write_rows(path, lines, columns, kinds="", end="\n", mark="<"):
    "A .ply row by row with struct; `kinds` has a letter for each column, f by default."
    kinds = kinds or "f"*len(columns)
    rows = zip(*columns.values())
    if mark: body = b"".join(struct.pack(mark + kinds, *(int(v) if k in "BiH" else v for k, v in zip(kinds, row))) for row in rows)
    else: body = "".join(" ".join(f"{v:.9g}" for v in row) + end for row in rows).encode()
    path.write_bytes((end.join([*lines, "end_header"]) + end).encode() + body)
    return path


def properties(columns, kinds=""):
    words = {"f": "float", "d": "double", "B": "uchar", "i": "int", "H": "ushort"}
    return [f"property {words[k]} {name}" for k, name in zip(kinds or "f"*len(columns), columns)]


LITTLE = ["ply", "format binary_little_endian 1.0"]


def graphdeco(path, g):
    columns = table_of(g)
    return write_rows(path, [*LITTLE, f"element vertex {len(g)}", *properties(columns)], columns)


def nerfstudio(path, g):
    columns = table_of(g)
    return write_rows(path, [*LITTLE, "comment Generated by Nerfstudio 1.1.5", "comment Vertical Axis: z", f"element vertex {len(g)}", *properties(columns)], columns)


def nerfstudio_rgb(path, g):
    "`--ply-color-mode rgb`: bytes in place of harmonics."
    columns = table_of(with_sh_degree(g, 0))
    colors = {name: (0.5 + SH_C0*columns.pop(f"f_dc_{c}")).clip(0, 1)*255//1 for c, name in enumerate(("red", "green", "blue"))}
    columns = {k: columns[k] for k in ("x", "y", "z", "nx", "ny", "nz")} | colors | {k: v for k, v in columns.items() if k[0] in "osr"}
    kinds = "".join("B" if name in colors else "f" for name in columns)
    return write_rows(path, [*LITTLE, "comment Generated by Nerfstudio 1.1.5", f"element vertex {len(g)}", *properties(columns, kinds)], columns, kinds)


def supersplat(path, g):
    "No normals, harmonics last, and its own state of each splat."
    columns = table_of(g)
    columns = {k: v for k, v in columns.items() if not k.startswith(("n", "f_rest"))} | {k: v for k, v in columns.items() if k.startswith("f_rest")} | {"state": np.zeros(len(g))}
    kinds = "f"*(len(columns) - 1) + "B"
    return write_rows(path, [*LITTLE, "comment Generated by SuperSplat 2.24.0", f"element vertex {len(g)}", *properties(columns, kinds)], columns, kinds)


def gsplat_export(path, g):
    columns = {k: v for k, v in table_of(g).items() if not k.startswith("n")}
    return write_rows(path, [*LITTLE, f"element vertex {len(g)}", *properties(columns)], columns)


def extras(path, g):
    "Doubles, labels, a camera table before and faces after, comments between."
    columns = {"segment": np.arange(len(g)) % 60000, "confidence": np.ones(len(g))} | dict(reversed(table_of(g).items())) | {"red": np.arange(len(g)) % 256}
    kinds = "".join({"segment": "H", "red": "B", "x": "d", "scale_1": "d"}.get(name, "f") for name in columns)
    lines = [*LITTLE, "obj_info num_cols 640", "comment", "element camera 2", "property double fx", "property int id", "comment a b c", f"element vertex {len(g)}",
             *properties(columns, kinds), "element face 1", "property list uchar int vertex_indices"]
    write_rows(path, lines, columns, kinds)
    data = path.read_bytes(); at = data.index(b"end_header\n") + 11
    path.write_bytes(data[:at] + struct.pack("<didi", 1, 2, 3, 4) + data[at:] + struct.pack("<Biii", 3, 0, 1, 2))
    return path


def windows_binary(path, g):
    columns = table_of(g)
    return write_rows(path, [*LITTLE, "comment made on Windows", f"element vertex {len(g)}", *properties(columns)], columns, end="\r\n")


def big_endian(path, g):
    columns = table_of(g)
    return write_rows(path, ["ply", "format binary_big_endian 1.0", f"element   vertex  {len(g)} ", *(f"  {line}\t" for line in properties(columns))], columns, mark=">")


def text(path, g):
    columns = table_of(g)
    return write_rows(path, ["ply", "format ascii 1.0", "comment VCGLIB generated", "obj_info x", "", f"element vertex {len(g)}", *properties(columns)], columns, mark="")


def windows_text(path, g):
    columns = table_of(g)
    return write_rows(path, ["ply", "comment first", "format ascii 1.0", f"element vertex {len(g)}", *properties(columns, "d"*len(columns))], columns, end="\r\n", mark="")


@pytest.mark.parametrize("degree", range(4))
@pytest.mark.parametrize("tool", [graphdeco, nerfstudio, supersplat, gsplat_export, extras, windows_binary, big_endian, text, windows_text])
def test_plys_of_other_tools(tmp_path, tool, degree):
    before = cloud(40, degree, seed=degree)
    after = load_gaussians(tool(tmp_path/"point_cloud.ply", before))
    assert torch.allclose(after.means, before.means, rtol=1e-6) and torch.allclose(after.quats, before.quats, rtol=1e-6) and after.sh_degree == degree
    assert torch.allclose(after.sh, before.sh, rtol=1e-6, atol=1e-7) and torch.allclose(after.scales, before.scales, rtol=5e-6) and torch.allclose(after.opacities, before.opacities, atol=1e-6)


def test_colours_as_bytes(tmp_path):
    before = cloud(40)
    after = load_gaussians(nerfstudio_rgb(tmp_path/"a.ply", before))
    rgb = (0.5 + SH_C0*before.sh[:, 0]).clamp(0, 1)
    assert after.sh_degree == 0 and ((0.5 + SH_C0*after.sh[:, 0]) - rgb).abs().max() < 1.01/255


def test_neighbouring_kinds_are_named(tmp_path):
    columns = table_of(cloud(4, 0)); del columns["scale_2"]
    with pytest.raises(ValueError, match="surfels"): load_gaussians(write_rows(tmp_path/"a.ply", [*LITTLE, "element vertex 4", *properties(columns)], columns))
    columns = {k: v for k, v in columns.items() if k in "xyz"}
    with pytest.raises(ValueError, match="point cloud without Gaussians"): load_gaussians(write_rows(tmp_path/"a.ply", [*LITTLE, "element vertex 4", *properties(columns)], columns))
    save_compressed_ply(cloud(4), tmp_path/"a.ply")
    with pytest.raises(ValueError, match="load_gaussians reads"): load_ply(tmp_path/"a.ply")
    assert len(load_gaussians(tmp_path/"a.ply")) == 4  # told apart by the header, whatever the name
    save_ply(cloud(4), tmp_path/"b.compressed.ply"); assert torch.equal(load_gaussians(tmp_path/"b.compressed.ply").means, cloud(4).means)


def test_long_text_needs_little_memory(tmp_path):
    "A megabyte of one word, and numbers across the borders of blocks."
    path = text(tmp_path/"a.ply", cloud(9000, 0))
    assert path.stat().st_size > 1.2e6
    tracemalloc.start()
    after = load_ply(path); peak = tracemalloc.get_traced_memory()[1]; tracemalloc.stop()
    assert torch.allclose(after.means, cloud(9000, 0).means, rtol=1e-6) and peak < 4e7
    path.write_bytes(path.read_bytes() + b"\n"); data = path.read_bytes(); at = data.index(b"end_header\n") + 11
    path.write_bytes(data[:at] + b"9"*1_000_000 + b" " + data[at:])
    tracemalloc.start()
    with pytest.raises(ValueError, match="property x of vertex 0"): load_ply(path)
    peak = tracemalloc.get_traced_memory()[1]; tracemalloc.stop()
    assert peak < 4e7


# ---- compressed.ply and .spz against gsply


@pytest.fixture(scope="module")
def gsply(): return pytest.importorskip("gsply", reason="gsply, an independent reader and writer, is not installed: pip install gsply")


def as_gsply(gsply, g):
    means, quats, scales, opacities, sh = (t.numpy() for t in g.tensors())
    unit = quats/np.linalg.norm(quats, axis=1, keepdims=True)
    return gsply.GSData.from_arrays(means, np.log(scales), unit, np.log(opacities/(1 - opacities)), sh[:, 0].copy(), sh[:, 1:].copy(), format="ply")


def compare(ours: Gaussians, theirs, means, logs, sh):
    assert np.abs(ours.means.numpy() - theirs.means).max() <= means and np.abs(np.log(ours.scales.numpy()) - theirs.scales).max() <= logs
    assert np.abs(ours.opacities.numpy() - 1/(1 + np.exp(-theirs.opacities))).max() <= 1.01/255
    assert np.abs(ours.sh[:, 0].numpy() - theirs.sh0).max() <= 0.06 and np.abs(ours.sh[:, 1:].numpy() - theirs.shN).max() <= sh
    assert degrees_between(ours.quats, torch.from_numpy(np.array(theirs.quats))).max() < 0.3


def test_gsply_reads_our_compressed_ply(tmp_path, gsply):
    save_compressed_ply(cloud(), tmp_path/"a.compressed.ply")
    compare(load_compressed_ply(tmp_path/"a.compressed.ply"), gsply.plyread(tmp_path/"a.compressed.ply"), 1e-5, 1e-5, 1e-5)


def test_we_read_gsplys_compressed_ply(tmp_path, gsply):
    gsply.plywrite(tmp_path/"a.compressed.ply", as_gsply(gsply, cloud()))
    compare(load_compressed_ply(tmp_path/"a.compressed.ply"), gsply.plyread(tmp_path/"a.compressed.ply"), 1e-5, 1e-5, 1e-5)
    assert torch.allclose(load_compressed_ply(tmp_path/"a.compressed.ply").means, cloud().means, atol=0.005)


def test_gsply_reads_our_spz(tmp_path, gsply):
    save_spz(cloud(), tmp_path/"a.spz")
    compare(turned(load_spz(tmp_path/"a.spz")), gsply.read_spz(tmp_path/"a.spz"), 1e-6, 1e-5, 1e-5)


def test_we_read_gsplys_spz(tmp_path, gsply):
    gsply.write_spz(tmp_path/"a.spz", as_gsply(gsply, turned(cloud())))
    ours = load_spz(tmp_path/"a.spz")
    compare(turned(ours), gsply.read_spz(tmp_path/"a.spz"), 1e-6, 1e-5, 1e-5)
    assert torch.allclose(ours.means, cloud().means, atol=0.51/2**12)


def spz(count=2, version=3, degree=0, bits=12, body=None, magic=b"NGSP"):
    width = 16 + (4 if version == 3 else 3) + 3*((degree + 1)**2 - 1)
    return gzip.compress(struct.pack("<4sIIBBBB", magic, version, count, degree, bits, 0, 0) + (bytes(count*width) if body is None else body))


def test_spz_of_version_2_by_hand(tmp_path):
    "One Gaussian at (1, 2, -3) in y-up axes, turned by 180 degrees about x, log scales 0, 1/16 and -10."
    position = b"".join((int(v*4096) & 0xFFFFFF).to_bytes(3, "little") for v in (1, 2, -3))
    body = position + bytes([255]) + bytes([128, 0, 255]) + bytes([160, 161, 0]) + bytes([255, 128, 128])
    (tmp_path/"a.spz").write_bytes(spz(1, 2, body=body))
    after = load_spz(tmp_path/"a.spz")
    assert torch.allclose(after.means, torch.tensor([[1., 3, 2]])) and after.opacities.tolist() == [1]
    assert torch.allclose(after.scales, torch.tensor([[1., math.exp(1/16), math.exp(-10)]]))
    assert torch.allclose(after.sh[0, 0], (torch.tensor([128., 0, 255])/255 - 0.5)/0.15)
    turn = torch.tensor([[1., 0, 0], [0, 0, -1], [0, 1, 0]]) @ torch.diag(torch.tensor([1., -1, -1]))
    assert (rotation_matrices(after.quats)[0] - turn).abs().max() < 0.02


@pytest.mark.parametrize("data, says", [
    (b"", "not an .spz"), (b"ply\n", "not an .spz"), (b"NGSP" + bytes(30), "version 4"), (b"\x1f\x8b", "damaged|no .spz"), (gzip.compress(b"hello"), "no .spz inside"),
    (spz(magic=b"NGPS"), "no .spz inside"), (spz(version=1), "version 1"), (spz(degree=4), "SH degree 4"), (spz(bits=0), "0 fractional"), (spz(bits=25), "25 fractional"),
    (spz(count=4_000_000_000, body=b""), "too many for"), (spz(count=3, body=bytes(50)), "50 bytes unzipped of 60"), (spz()[:-1], "check sum"), (spz()[:-9], "unzipped|damaged|check sum"),
    (spz()[:-8] + bytes(8), "damaged")])
def test_damaged_spz(tmp_path, data, says):
    (tmp_path/"a.spz").write_bytes(data)
    with pytest.raises(ValueError, match=f"a.spz: .*({says})"): load_gaussians(tmp_path/"a.spz")


def test_a_zip_bomb_is_not_unpacked(tmp_path):
    "A gigabyte of zeros behind a header that asks for two Gaussians, and one that asks for what is not there."
    packer = zlib.compressobj(9, 8, 31)
    data = packer.compress(struct.pack("<4sIIBBBB", b"NGSP", 3, 2, 0, 12, 0, 0)) + b"".join(packer.compress(bytes(1 << 20)) for _ in range(64)) + packer.flush()
    (tmp_path/"a.spz").write_bytes(data)
    (tmp_path/"b.spz").write_bytes(spz(count=4_000, body=bytes(100)) + bytes(200))
    tracemalloc.start()
    assert len(load_spz(tmp_path/"a.spz")) == 2  # more may stand behind: the format has extensions there
    with pytest.raises(ValueError, match="100 bytes unzipped"): load_spz(tmp_path/"b.spz")
    peak = tracemalloc.get_traced_memory()[1]; tracemalloc.stop()
    assert peak < 2e6
    (tmp_path/"c.spz").write_bytes(spz(count=100_000))  # all alike, and honest: zipped a thousandfold
    assert len(load_spz(tmp_path/"c.spz")) == 100_000 and (tmp_path/"c.spz").stat().st_size < 3000


# ---- glTF


def test_vtk_reads_every_attribute(tmp_path):
    io = pytest.importorskip("vtkmodules.vtkIOGeometry", reason="VTK, an independent reader of glTF, is not installed: pip install vtk")
    from vtkmodules.util.numpy_support import vtk_to_numpy
    g = cloud(50)
    save_khr(g, tmp_path/"a.glb")
    reader = io.vtkGLTFReader(); reader.SetFileName(str(tmp_path/"a.glb")); reader.Update()
    block = reader.GetOutputDataObject(0)
    while block.IsA("vtkMultiBlockDataSet"): block = block.GetBlock(0)
    arrays = {block.GetPointData().GetArrayName(i): vtk_to_numpy(block.GetPointData().GetArray(i)) for i in range(block.GetPointData().GetNumberOfArrays())}
    expected, name = turned(g), "KHR_gaussian_splatting:"
    np.testing.assert_array_equal(vtk_to_numpy(block.GetPoints().GetData()), expected.means)
    unit = torch.nn.functional.normalize(expected.quats, dim=-1)
    np.testing.assert_allclose(arrays[name + "ROTATION"], unit[:, [1, 2, 3, 0]], atol=1e-6)
    np.testing.assert_allclose(arrays[name + "SCALE"], expected.scales, rtol=1e-6); np.testing.assert_allclose(arrays[name + "OPACITY"].ravel(), g.opacities, rtol=1e-6)
    for degree in range(4):
        for order in range(2*degree + 1): np.testing.assert_allclose(arrays[f"{name}SH_DEGREE_{degree}_COEF_{order}"], expected.sh[:, degree**2 + order], atol=1e-6)
    assert any(key.upper().startswith("COLOR") for key in arrays) and len([key for key in arrays if key.startswith(name)]) == 19


def glb(document, data=b"", *, text=None):
    text = json.dumps(document).encode() if text is None else text
    text += b" "*(-len(text) % 4)
    return struct.pack("<4sIII4s", b"glTF", 2, 28 + len(text) + len(data), len(text), b"JSON") + text + struct.pack("<I4s", len(data), b"BIN\0") + data


K = "KHR_gaussian_splatting"


def interleaved(count=3):
    "A document as another exporter may write it: one view with rows of 60 bytes, quantised turns, scales, opacities, two nodes."
    rng = np.random.default_rng(0)
    kinds = np.dtype([("p", "<f4", 3), ("r", "<i2", 4), ("s", "u1", 4), ("o", "<u2", 2), ("h", "<f4", (4, 3)), ("pad", "<f4")], align=False)
    rows = np.zeros(count, kinds)
    rows["p"] = rng.normal(size=(count, 3)); rows["s"] = rng.integers(1, 255, (count, 4)); rows["o"] = rng.integers(0, 65536, (count, 2)); rows["h"] = rng.normal(size=(count, 4, 3))
    quats = rng.normal(size=(count, 4)); rows["r"] = np.rint(quats/np.linalg.norm(quats, axis=1, keepdims=True)*32767)
    accessor = lambda offset, kind, component, **more: dict(bufferView=0, byteOffset=offset, count=count, type=kind, componentType=component, **more)
    accessors = [accessor(0, "VEC3", 5126), accessor(12, "VEC4", 5122, normalized=True), accessor(20, "VEC3", 5121, normalized=True), accessor(24, "SCALAR", 5123, normalized=True),
                 *(accessor(28 + 12*i, "VEC3", 5126) for i in range(4))]
    names = ["POSITION", f"{K}:ROTATION", f"{K}:SCALE", f"{K}:OPACITY", f"{K}:SH_DEGREE_0_COEF_0", *(f"{K}:SH_DEGREE_1_COEF_{i}" for i in range(3))]
    primitive = dict(attributes={name: i for i, name in enumerate(names)}, mode=0, extensions={K: dict(kernel="ellipse", colorSpace="srgb_rec709_display")})
    nodes = [dict(children=[1], translation=[1, 2, 3]), dict(mesh=0, rotation=[0, 0, math.sqrt(0.5), math.sqrt(0.5)], scale=[2, 2, 2])]
    return dict(asset=dict(version="2.0"), extensionsUsed=[K], scenes=[dict(nodes=[0])], nodes=nodes, meshes=[dict(primitives=[primitive])], accessors=accessors,
                bufferViews=[dict(buffer=0, byteLength=rows.nbytes, byteStride=kinds.itemsize)], buffers=[dict(byteLength=rows.nbytes)]), rows


def test_glb_of_another_exporter(tmp_path):
    document, rows = interleaved()
    (tmp_path/"a.glb").write_bytes(glb(document, rows.tobytes()))
    after = load_khr(tmp_path/"a.glb")
    turn = np.array([[0., -1, 0], [1, 0, 0], [0, 0, 1]])  # 90 degrees about z
    z_up = np.array([[1., 0, 0], [0, 0, -1], [0, 1, 0]])
    np.testing.assert_allclose(after.means, (2*rows["p"] @ turn.T + [1, 2, 3]) @ z_up.T, atol=1e-5)
    np.testing.assert_allclose(after.opacities, rows["o"][:, 0]/65535, rtol=1e-6)
    x, y, z, w = (rows["r"]/32767).T
    local = rotation_matrices(torch.tensor(np.stack([w, x, y, z], 1)))
    R = torch.tensor(z_up @ turn)
    axes = R @ local*torch.tensor(rows["s"][:, None, :3]/255*2)
    np.testing.assert_allclose(covariances(after), axes @ axes.mT, atol=1e-5)
    d = torch.nn.functional.normalize(torch.randn(3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0)), dim=-1)
    np.testing.assert_allclose(eval_sh(after.sh.double(), d @ R.T), eval_sh(torch.tensor(rows["h"]).double(), d), atol=1e-5)


def test_glb_with_two_clouds_and_a_mesh(tmp_path):
    document, rows = interleaved()
    document["meshes"] += [dict(primitives=[dict(attributes=dict(POSITION=0))]), document["meshes"][0]]
    document["nodes"] = [dict(mesh=0), dict(mesh=1), dict(mesh=2, matrix=[1, 0, 0, 0, 0, 1, 0, 0, 0, 0, 1, 0, 5, 0, 0, 1])]
    document["scenes"] = [dict(nodes=[0, 1, 2])]
    (tmp_path/"a.glb").write_bytes(glb(document, rows.tobytes()))
    after = load_khr(tmp_path/"a.glb")
    assert len(after) == 6 and torch.allclose(after.means[3:] - after.means[:3], torch.tensor([5., 0, 0]))
    for name in ("scenes", "nodes"): del document[name]
    (tmp_path/"a.glb").write_bytes(glb(document, rows.tobytes())); assert len(load_khr(tmp_path/"a.glb")) == 6


def put(*path_and_value):
    *path, last, value = path_and_value
    def change(document):
        for step in path: document = document[step]
        if value is None: del document[last]
        else: document[last] = value
    return change


ATTRIBUTES = ("meshes", 0, "primitives", 0, "attributes")
GLB_FAULTS = [
    (put("accessors", 0, "count", 10**9), "do not fit"), (put("accessors", 0, "count", 10**30), "count is"), (put("accessors", 0, "count", -1), "count is"),
    (put("accessors", 0, "count", 2.5), "count is"), (put("accessors", 0, "count", True), "count is"), (put("accessors", 0, "count", 0), "do not fit"), (put("accessors", 0, "count", "3"), "count is"),
    (put("accessors", 0, "count", 2), "values for 2 positions"), (put("accessors", 0, "byteOffset", 2**40), "do not fit"), (put("accessors", 1, "byteOffset", -4), "byteOffset is"),
    (put("accessors", 0, "bufferView", 7), "no bufferViews"), (put("accessors", 0, "bufferView", -1), "no bufferViews"), (put("accessors", 0, "bufferView", None), "sparse or without"),
    (put("accessors", 0, "sparse", {}), "sparse"), (put("accessors", 0, "type", "VEC4"), "need VEC3"), (put("accessors", 0, "type", []), "need VEC3"),
    (put("accessors", 0, "componentType", 5130), "component type"), (put("accessors", 0, "componentType", [1]), "componentType is"), (put("accessors", 0, 3), "no accessors"),
    (put("accessors", {}), "no accessors"), (put("accessors", None), "no accessors"), (put("bufferViews", 0, "byteLength", 10**12), "do not fit|ok"),
    (put("bufferViews", 0, "byteLength", 20), "do not fit"), (put("bufferViews", 0, "byteLength", None), "byteLength is"), (put("bufferViews", 0, "byteOffset", 10**9), "do not fit"),
    (put("bufferViews", 0, "byteStride", 1), "do not fit"), (put("bufferViews", 0, "byteStride", 0), "do not fit"), (put("bufferViews", 0, "byteStride", 10**9), "do not fit"),
    (put("bufferViews", 0, "buffer", 1), "second buffer"), (put("bufferViews", 0, "buffer", None), "buffer is"), (put(*ATTRIBUTES, "POSITION", 99), "no accessors"),
    (put(*ATTRIBUTES, "POSITION", None), "no accessors"), (put(*ATTRIBUTES, "POSITION", "x"*9999), "no accessors"), (put(*ATTRIBUTES, f"{K}:SCALE", None), "lacks"),
    (put(*ATTRIBUTES, f"{K}:SH_DEGREE_1_COEF_1", None), "lacks"), (put(*ATTRIBUTES, f"{K}:SH_DEGREE_3_COEF_6", 4), "lacks"), (put(*ATTRIBUTES[:-1], "attributes", []), "no attributes"),
    (put(*ATTRIBUTES[:-1], "extensions", K, "kernel", "box"), "kernel"), (put(*ATTRIBUTES[:-1], "extensions", K, "kernel", []), "kernel"),
    (put(*ATTRIBUTES[:-1], "extensions", K, "colorSpace", None), "colorSpace"), (put(*ATTRIBUTES[:-1], "extensions", K, 5), "no attributes"),
    (put(*ATTRIBUTES[:-1], "extensions", None), "without KHR"), (put("meshes", 0, "primitives", 3), "without KHR"), (put("meshes", None), "no meshes"), (put("nodes", 1, "mesh", 5), "no meshes"),
    (put("nodes", 1, "children", [0]), "twice"), (put("nodes", 0, "children", [1, 1]), "twice"), (put("nodes", 0, "children", 1), "without KHR"), (put("nodes", 0, "children", [9]), "no nodes"),
    (put("nodes", 1, "scale", [1, 2, 3]), "stretches"), (put("nodes", 1, "scale", [0, 0, 0]), "flattens"), (put("nodes", 1, "scale", [1, "1", 1]), "scale of a node"),
    (put("nodes", 1, "rotation", [0, 0, 0]), "rotation of a node"), (put("nodes", 1, "translation", [1e30, 0, 0]), "translation of a node"), (put("nodes", 1, "matrix", [0]*16), "last row|flattens"),
    (put("nodes", 1, "matrix", [1]*15), "matrix of a node"), (put("scenes", [5]), "no scenes"), (put("scene", 3), "no scenes"), (put("scenes", 0, "nodes", 7), "without KHR"),
    (put("extensionsRequired", ["KHR_gaussian_splatting_compression_spz_2"]), "needs the glTF extension KHR_gaussian_splatting_compression_spz_2"), (put("extensionsRequired", 5), "needs the glTF")]


@pytest.mark.parametrize("change, says", GLB_FAULTS)
def test_faults_of_a_document(tmp_path, change, says):
    document, rows = interleaved(); change(document)
    (tmp_path/"a.glb").write_bytes(glb(document, rows.tobytes()))
    tracemalloc.start()
    try: load_khr(tmp_path/"a.glb")
    except ValueError as error: assert re.search(says, str(error)) and "a.glb" in str(error) and len(str(error)) < 400 and "\n" not in str(error)
    else: assert says.endswith("ok")
    peak = tracemalloc.get_traced_memory()[1]; tracemalloc.stop()
    assert peak < 1e6


@pytest.mark.parametrize("text, says", [(b"[" * 100_000 + b"]" * 100_000, "no JSON"), (b"[1]", "need an object"), (b"\xff\xfe\x00", "no JSON"), (b"", "no JSON"), (b'{"a":' + b"9"*5000 + b"}", "no JSON"),
                                        (b'{"meshes":[' + b"{},"*5000 + b"{}]}", "without KHR"), (b"{}", "without KHR"), (b'{"scenes":[{"nodes":[0]}]}', "no nodes")])
def test_documents_that_are_none(tmp_path, text, says):
    (tmp_path/"a.glb").write_bytes(glb(None, bytes(4), text=text))
    with pytest.raises(ValueError, match=f"a.glb: .*{says}"): load_khr(tmp_path/"a.glb")


def test_one_array_a_thousand_times(tmp_path):
    document, rows = interleaved(100)
    document["meshes"][0]["primitives"] *= 1000
    (tmp_path/"a.glb").write_bytes(glb(document, rows.tobytes()))
    with pytest.raises(ValueError, match="used too often"): load_khr(tmp_path/"a.glb")
    document["nodes"] = [dict(children=[i + 1]) for i in range(5_000)]  # a tree as deep as it is long
    document["scenes"], document["meshes"] = [dict(nodes=[0])], []
    (tmp_path/"a.glb").write_bytes(glb(document, rows.tobytes()))
    with pytest.raises(ValueError, match=r"no nodes\[5000\]"): load_khr(tmp_path/"a.glb")


# ---- damage of every kind


def files_of(tmp_path, count=5):
    for suffix in SUFFIXES: save_gaussians(cloud(count, 1), tmp_path/f"a{suffix}")
    return {suffix: (tmp_path/f"a{suffix}").read_bytes() for suffix in SUFFIXES}


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_cut_off_anywhere(tmp_path, suffix):
    data, path = files_of(tmp_path)[suffix], tmp_path/f"cut{suffix}"
    for length in sorted({*range(0, len(data), max(1, len(data)//400)), *range(len(data) - 40, len(data))}):
        path.write_bytes(data[:length])
        try: after = load_gaussians(path)
        except ValueError as error: assert "cut." in str(error) and "\n" not in str(error)
        else: assert suffix == ".splat" and len(after) == length//32 and length % 32 == 0  # shorter, and nothing in it says so


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_fuzz_only_value_errors(tmp_path, suffix):
    "Bytes changed, cut out, doubled and cut off, and whole words overwritten: finite Gaussians, or one line that names the file."
    data, path, rng, outcomes = files_of(tmp_path, 80)[suffix], tmp_path/f"fuzz{suffix}", np.random.default_rng(len(suffix)), {"loaded": 0, "refused": 0}
    words = [b"\xff\xff\xff\xff", b"\0\0\0\0", b"\0\0\xc0\x7f", b"\0\0\x80\xff", b"9999", b"-1", b"[[[[", b"null", b"1e99", struct.pack("<f", -1.)]
    for trial in range(400):
        changed = bytearray(gzip.decompress(data) if suffix == ".spz" and trial % 3 else data)
        for _ in range(rng.integers(1, 4)):
            at, length = int(rng.integers(len(changed))), int(rng.integers(1, 12))
            match rng.integers(9):
                case 0: del changed[at:at + length]
                case 1: changed[at:at] = changed[at:at + length]
                case 2: changed = changed[:max(at, 1)]
                case 3 | 4 | 5: changed[at:at + 4] = words[rng.integers(len(words))]
                case _: changed[at] = rng.integers(256)
        path.write_bytes(gzip.compress(bytes(changed), 1) if suffix == ".spz" and trial % 3 else bytes(changed))
        tracemalloc.start()
        try: after = load_gaussians(path)
        except ValueError as error: outcomes["refused"] += 1; assert "fuzz." in str(error) and "\n" not in str(error) and len(str(error)) < 500
        else: outcomes["loaded"] += 1; check_values(after, "fuzz")
        peak = tracemalloc.get_traced_memory()[1]; tracemalloc.stop()
        assert peak < 3e6
    assert min(outcomes.values()) > 20, outcomes  # the fuzz reaches both


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("other", [*SUFFIXES, "png", "zeros", "text"])
def test_files_of_another_kind(tmp_path, suffix, other):
    if {suffix, other} <= {".ply", ".compressed.ply"} or suffix == other: pytest.skip("the same kind")
    strange = {"png": b"\x89PNG\r\n\x1a\n" + bytes(120), "zeros": bytes(128), "text": b"hello, this is a text. "*64}
    (tmp_path/f"x{suffix}").write_bytes(strange[other] if other in strange else files_of(tmp_path)[other])
    with pytest.raises(ValueError, match="x"): load_gaussians(tmp_path/f"x{suffix}")


@pytest.mark.parametrize("old, new, says", [
    (b"element chunk 2", b"element chunk 1", "1 chunks for 300 Gaussians"), (b"element chunk 2", b"element chunk 9999999999", "truncated"),
    (b"element vertex 300", b"element vertex 4000000000", "truncated"), (b"element vertex 300", b"element vertex 299", "element sh has 300 rows"), (b"property float max_x", b"property float maxxx", "no property max_x"),
    (b"property uint packed_scale", b"property int packed_scale", "no property packed_scale"), (b"property uchar f_rest_44\n", b"", "44 properties"), (b"uchar f_rest_3\n", b"uchar g_rest_3\n", "no property f_rest_3"),
    (b"property uchar f_rest_0", b"property list uchar uchar f_rest_0", "has a list"), (b"binary_little_endian", b"ascii", "as text"), (b"element chunk", b"element chonk", "no property min_x")])
def test_faults_of_a_compressed_ply(tmp_path, old, new, says):
    save_compressed_ply(cloud(), tmp_path/"a.compressed.ply")
    data = (tmp_path/"a.compressed.ply").read_bytes(); assert data.count(old) == 1
    (tmp_path/"a.compressed.ply").write_bytes(data.replace(old, new))
    tracemalloc.start()
    with pytest.raises(ValueError, match=f"a.compressed.ply: .*{says}"): load_gaussians(tmp_path/"a.compressed.ply")
    peak = tracemalloc.get_traced_memory()[1]; tracemalloc.stop()
    assert peak < 2e6


def test_early_compressed_ply_without_bounds_of_colours(tmp_path):
    save_compressed_ply(cloud(5, 0), tmp_path/"a.ply")
    data = (tmp_path/"a.ply").read_bytes(); at = data.index(b"end_header\n") + 11
    head = b"".join(line + b"\n" for line in data[:at].splitlines() if line.split()[-1] not in (b"min_r", b"min_g", b"min_b", b"max_r", b"max_g", b"max_b"))
    (tmp_path/"a.ply").write_bytes(head + data[at:at + 48] + data[at + 72:])
    color = np.frombuffer(data[at + 72:], "<u4").reshape(5, 4)[:, 3]
    expected = np.stack([color >> 24, color >> 16 & 255, color >> 8 & 255], 1)/255
    np.testing.assert_allclose(0.5 + SH_C0*load_gaussians(tmp_path/"a.ply").sh[:, 0], expected, atol=1e-6)


def test_threads_do_not_meet(tmp_path):
    files_of(tmp_path); faults = []
    def work(suffix):
        try:
            for _ in range(10): save_gaussians(cloud(50), tmp_path/f"{threading.get_ident()}{suffix}"); load_gaussians(tmp_path/f"a{suffix}")
        except Exception as error: faults.append(error)
    threads = [threading.Thread(target=work, args=(suffix,)) for suffix in SUFFIXES]
    for thread in threads: thread.start()
    for thread in threads: thread.join()
    assert not faults


# ---- zerolab convert


def test_convert_through_every_format(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    graphdeco(tmp_path/"a.ply", cloud(1000))
    previous = "a.ply"
    for suffix in SUFFIXES:
        assert cli.main(["convert", previous, f"b{suffix}"]) == 0
        said = capsys.readouterr().out.splitlines()
        assert said[0].startswith(f"zerolab: read {previous}: 1000 Gaussians, SH degree ") and said[1].startswith(f"zerolab: wrote b{suffix}: 1000 Gaussians, SH degree ")
        assert said[2] == f"zerolab: precision: {format_of(suffix).precision}" and said[3].startswith("zerolab: lost: ") and len(said) == 4
        if suffix == ".splat": assert said[3].startswith("zerolab: lost: SH degree 3 (now 0); colours beyond 0 to 1 (")
        previous = f"b{suffix}"
    assert load_splat("b.splat").means.shape == (1000, 3)


def test_convert_picks_cuts_and_turns(tmp_path, capsys):
    graphdeco(tmp_path/"a.ply", cloud(1000))
    assert cli.main(["convert", str(tmp_path/"a.ply"), str(tmp_path/"b.ply"), "--where", "opacity > 0.5 and x < 0", "--sh-degree", "1", "--axes", "y-down"]) == 0
    after, before = load_gaussians(tmp_path/"b.ply"), cloud(1000)
    turned_means = before.means @ torch.tensor([[1., 0, 0], [0, 0, 1], [0, -1, 0]]).T  # -y becomes z
    keep = (before.opacities > 0.5) & (turned_means[:, 0] < 0)
    assert torch.allclose(after.means, turned_means[keep]) and after.sh_degree == 1


@pytest.mark.parametrize("arguments, says", [
    (["a.ply", "b.obj"], "b.obj: no suffix"), (["a.obj", "b.ply"], "a.obj: no suffix"), (["missing.ply", "b.ply"], "missing.ply: No such file"), (["bad.ply", "b.splat"], "bad.ply: byte 0"),
    (["a.ply", "b.ply", "--where", "opacity > 2"], "no Gaussian meets"), (["a.ply", "b.ply", "--where", "import os"], "cannot be read"), (["a.ply", "a.ply/b.splat"], "a.ply")])
def test_convert_says_what_is_wrong_in_one_line(tmp_path, capsys, monkeypatch, arguments, says):
    monkeypatch.chdir(tmp_path)
    graphdeco(tmp_path/"a.ply", cloud(4)); (tmp_path/"bad.ply").write_bytes(b"nothing")
    assert cli.main(["convert", *arguments]) == 2
    said = capsys.readouterr().err
    assert says in said and said.count("\n") == 1 and not (tmp_path/"b.ply").exists()
