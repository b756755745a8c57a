"Shards under fault: cut, flipped, killed, full disk; and the same bytes from any number of processes."
import io, os, subprocess, sys, tarfile, time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from faults import file_size_limit
from zerolab.data.shards import (DEPTH_STEP, PASSES, ShardDataset, ShardError, decode_view, encode_sample, encode_view, index_path, index_shard, write_shard,
                                 write_shards)
from zerolab.scene.cameras import random_views
from zerolab.scene.views import Views


def noise(seed, views=3, size=(12, 10), dtype=torch.float32):
    "Pictures of pure noise, soft alpha too: the hardest thing to store."
    rng = np.random.default_rng(seed)
    rgba = rng.integers(0, 256, (views, *size, 4), dtype=np.uint8)
    rgba[rgba[..., 3] == 0] = 0
    cameras = random_views(rng, views, size=size, dtype=dtype)
    return Views(torch.from_numpy(rgba), cameras, caption=f"n\u00f6ise \u96ea \"{seed}\"\n", source="noise", seed=seed, quality=seed / 7 % 1)


def same(a, b):
    return (torch.equal(a.rgba, b.rgba) and torch.equal(a.cameras.K, b.cameras.K) and torch.equal(a.cameras.w2c, b.cameras.w2c)
            and (a.caption, a.source, a.seed, a.quality, a.cameras.size) == (b.caption, b.source, b.seed, b.quality, b.cameras.size))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_lossless_round_trip(tmp_path, dtype):
    objects = [noise(seed, views=1 + seed % 4, dtype=dtype) for seed in range(7)]
    dataset = ShardDataset(write_shards(objects, tmp_path, samples_per_shard=3))
    assert len(dataset) == 7 and len(dataset.paths) == 3
    assert all(same(got, wanted) for got, wanted in zip(dataset, objects))
    assert same(dataset[-1], objects[-1]) and same(dataset.views(3, [2, 0]), objects[3][[2, 0]])
    assert dataset[0].cameras.K.dtype == dtype


def test_jpeg_keeps_alpha_to_the_byte_and_the_composite_closely(tmp_path):
    y, x = np.mgrid[:64, :64] / 63
    alpha = np.rint(255 * np.clip(3 - 8 * np.hypot(x - 0.5, y - 0.5), 0, 1))
    rgba = np.rint(np.stack([255 * x, 255 * y, 255 * (1 - x), alpha], -1)).astype(np.uint8)
    rgba[rgba[..., 3] == 0] = 0
    got = decode_view(encode_view(rgba, "jpeg"), (64, 64))
    assert (got[..., 3] == rgba[..., 3]).all() and (got[got[..., 3] == 0] == 0).all()
    over_white = [(p[..., :3] * (p[..., 3:] / 255.0) + 255 - p[..., 3:]) for p in (rgba, got)]
    assert 10 * np.log10(255**2 / np.square(over_white[0] - over_white[1]).mean()) > 38


def plainly(rgba):
    "A view as jpeg, written down plainly: every pixel blended in floating point, both files left to Pillow's own settings."
    alpha = rgba[..., 3:].astype(np.float32) / 255
    over_white, files = np.rint(rgba[..., :3] * alpha + 255 * (1 - alpha)).astype(np.uint8), {}
    for extension, kind, pixels, options in (("jpg", "JPEG", over_white, dict(quality=95, subsampling=0)), ("png", "PNG", rgba[..., 3], {})):
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, kind, **options)
        files[extension] = buffer.getvalue()
    return files


def plainly_back(files):
    colour, alpha = (np.array(Image.open(io.BytesIO(files[extension]))) for extension in ("jpg", "png"))
    cover = alpha[..., None].astype(np.float32) / 255
    straight = np.rint(((colour - 255 * (1 - cover)) / np.maximum(cover, 1e-9)).clip(0, 255)).astype(np.uint8)
    return np.where(alpha[..., None] > 0, np.concatenate([straight, alpha[..., None]], -1), 0)


def disc(size=256):
    "A textured disc: like a rendered object, a few half-covered pixels between full and empty ones."
    y, x = np.mgrid[:size, :size] + 0.5
    alpha = np.rint(255 * np.clip(0.4 * size - np.hypot(x - size / 2, y - size / 2) + 0.5, 0, 1)).astype(np.uint8)
    rgb = np.stack([128 + 100 * np.sin(x / 9), 128 + 100 * np.cos(y / 7), 128 + 100 * np.sin((x + y) / 11)], -1).astype(np.uint8)
    return np.concatenate([rgb * (alpha[..., None] > 0), alpha[..., None]], -1)


@pytest.mark.parametrize("picture", [noise(0, size=(37, 50)).rgba[0].numpy(), disc()])
def test_jpeg_files_are_those_written_plainly(picture):
    "Same JPEG, a mask that any reader reads, no larger; decoded to the same pixels; layouts in memory do not matter."
    plain, ours = plainly(picture), encode_view(picture, "jpeg")
    assert ours["jpg"] == plain["jpg"] and (np.array(Image.open(io.BytesIO(ours["png"]))) == picture[..., 3]).all()
    assert (decode_view(ours, picture.shape[:2]) == plainly_back(plain)).all() and (decode_view(plain, picture.shape[:2]) == plainly_back(plain)).all()
    assert encode_view(np.asfortranarray(picture), "jpeg") == ours == encode_view(np.concatenate([picture, picture], 1)[:, picture.shape[1]:], "jpeg")
    Image.open(io.BytesIO(ours["png"])).verify()


def cpu_seconds(function, *args, times=7):
    "The least CPU time of several runs."
    taken = []
    for _ in range(times):
        start = time.process_time()
        function(*args)
        taken.append(time.process_time() - start)
    return min(taken)


def test_jpeg_is_quicker_than_plainly_and_masks_are_smaller():
    picture = disc(512)
    plain = plainly(picture)
    assert len(encode_view(picture, "jpeg")["png"]) < len(plain["png"])
    assert cpu_seconds(encode_view, picture, "jpeg") < 0.7 * cpu_seconds(plainly, picture)
    assert cpu_seconds(decode_view, plain, (512, 512)) < 0.7 * cpu_seconds(plainly_back, plain)


def passes_of(views, seed=0):
    "Depth and normals for views, 0 where they are empty."
    rng, hit = np.random.default_rng(seed), views.rgba[..., 3].numpy() > 0
    normals = rng.normal(size=(*hit.shape, 3))
    normals /= np.linalg.norm(normals, axis=-1, keepdims=True)
    return dict(depth=rng.uniform(1, 6, hit.shape) * hit, normals=normals * hit[..., None])


@pytest.mark.parametrize("image_format", ["webp", "jpeg"])
@pytest.mark.parametrize("names", [("depth",), ("normals",), ("depth", "normals")])
def test_passes_come_back(tmp_path, image_format, names):
    objects = [noise(seed, views=2 + seed) for seed in range(3)]
    passes = [{name: values for name, values in passes_of(views).items() if name in names} for views in objects]
    write_shard(tmp_path / "000000.tar", [encode_sample(views, key, image_format, known) for key, (views, known) in enumerate(zip(objects, passes))])
    index_path(tmp_path / "000000.tar").unlink()  # made again from the tar
    dataset = ShardDataset(tmp_path)
    assert dataset.indexes[0].passes == names and ShardDataset(tmp_path).indexes[0].passes == names
    for i, (views, known) in enumerate(zip(objects, passes)):
        got = dataset.passes(i, [1, 0])
        assert set(got) == set(names) and (dataset[i].rgba[..., 3] == views.rgba[..., 3]).all()
        if "depth" in names: assert np.abs(got["depth"] - known["depth"][[1, 0]]).max() <= DEPTH_STEP / 2 + 1e-6
        if "normals" in names: assert np.abs(got["normals"] - known["normals"][[1, 0]]).max() < 0.01
        for name in names: assert ((got[name] == 0) == (known[name][[1, 0]] == 0)).mean() > 0.99 and not got[name][known[name][[1, 0]] == 0].any()
    with pytest.raises(IndexError, match="has 2 views"): dataset.passes(0, [2])


def test_a_damaged_or_missing_pass_is_named(tmp_path):
    views, path = noise(0), tmp_path / "000000.tar"
    files = encode_sample(views, 0, "jpeg", passes_of(views))
    write_shard(path, [files])
    index = index_shard(path)
    offset = int(index.images[1, index.extensions.index("depth.png"), 0])
    data = bytearray(path.read_bytes())
    data[offset + 50] ^= 1
    path.write_bytes(data)
    dataset = ShardDataset(tmp_path)
    assert len(dataset[0]) == 3  # the pictures are whole
    with pytest.raises(ShardError, match=f"member 00000000.01.depth.png at byte {offset} is not what was indexed"): dataset.passes(0, [1])
    short = {name: data for name, data in files.items() if name != "00000000.01.normals.webp"}
    with pytest.raises(ShardError, match="sample 00000000 is not whole .lacks .*1, 'normals.webp'"): write_shard(tmp_path / "000001.tar", [short])
    with pytest.raises(ValueError, match="no pass 'flow'"): encode_sample(views, 0, "jpeg", {"flow": views.rgba.numpy()})


@pytest.mark.parametrize("image_format", ["webp", "jpeg"])
def test_shards_from_before_there_were_passes(tmp_path, image_format):
    "Their masks are Pillow's, and their index files know nothing of passes; ours have the same fields where there are none."
    views = noise(5)
    members = encode_sample(views, 0, image_format)
    if image_format == "jpeg":
        for number, picture in enumerate(views.rgba.numpy()): members[f"00000000.{number:02d}.png"] = plainly(picture)["png"]
    write_shard(tmp_path / "000000.tar", [members])
    with np.load(index_path(tmp_path / "000000.tar")) as file: assert set(file) == {"keys", "first", "metadata", "images", "image_format", "tar_bytes"}
    dataset = ShardDataset(tmp_path)
    assert dataset.passes(0, [0]) == {} and (dataset[0].rgba[..., 3] == views.rgba[..., 3]).all() and set(PASSES) == {"depth", "normals"}


@pytest.mark.parametrize("image_format", ["webp", "jpeg"])
def test_webdataset_reads_them(tmp_path, image_format):
    import webdataset
    write_shards([noise(seed) for seed in range(5)], tmp_path, samples_per_shard=2, image_format=image_format)
    dataset = ShardDataset(tmp_path)
    samples = list(webdataset.WebDataset([str(path) for path in dataset.paths], shardshuffle=False))
    assert [sample["__key__"] for sample in samples] == [f"{i:08d}" for i in range(5)]
    for sample, views in zip(samples, dataset):
        for view in range(3):
            files = {name.split(".")[1]: data for name, data in sample.items() if name.startswith(f"{view:02d}.")}
            assert (decode_view(files, (12, 10)) == views.rgba[view].numpy()).all()


def test_tar_headers_name_nobody(tmp_path):
    write_shards([noise(0)], tmp_path)
    with tarfile.open(tmp_path / "000000.tar") as tar: members = tar.getmembers()
    for member in members:
        assert (member.mtime, member.uid, member.gid, member.uname, member.mode) == (0, 0, 0, "", 0o644)


def test_every_cut_is_noticed(tmp_path):
    path = tmp_path / "000000.tar"
    write_shard(path, [encode_sample(noise(seed, views=1), seed) for seed in range(2)])
    whole = path.read_bytes()
    used = len(whole.rstrip(b"\0"))
    for size in [0, 1, 511, 512, *range(513, used, 197), used - 1, used + 600]:
        path.write_bytes(whole[:size])
        with pytest.raises(ShardError, match="000000.tar") as error: ShardDataset(tmp_path)
        assert str(size) in str(error.value) and "\n" not in str(error.value)
        if size < used:
            with pytest.raises(ShardError, match="000000.tar"): index_shard(path)


def test_no_flipped_byte_gives_a_wrong_picture(tmp_path):
    path = tmp_path / "000000.tar"
    wanted = noise(1, views=2)
    write_shard(path, [encode_sample(wanted, 0)])
    whole, noticed = path.read_bytes(), 0
    for place in np.random.default_rng(0).integers(0, len(whole.rstrip(b"\0")), 150):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0x10]) + whole[place + 1:])
        try: assert same(ShardDataset(tmp_path)[0], wanted)  # the flip hit a header or padding, which the index does without
        except ShardError as error:
            noticed += 1
            assert "000000.tar" in str(error) and "byte" in str(error) and "00000000" in str(error)
    assert noticed > 30


def test_damaged_index(tmp_path):
    path = tmp_path / "000000.tar"
    wanted = noise(1)
    write_shard(path, [encode_sample(wanted, 0)])
    index = index_path(path).read_bytes()
    for place in np.random.default_rng(0).integers(0, len(index), 60):
        index_path(path).write_bytes(index[:place] + bytes([index[place] ^ 0x10]) + index[place + 1:])
        try: assert same(ShardDataset(tmp_path)[0], wanted)
        except ShardError: pass
    index_path(path).write_bytes(index[:100])
    with pytest.raises(ShardError, match="no shard index"): ShardDataset(tmp_path)
    index_path(path).unlink()  # it is made again
    assert same(ShardDataset(tmp_path)[0], wanted) and index_path(path).read_bytes() == index


def tar_of(path, members):
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            header = tarfile.TarInfo(name)
            header.size = len(data)
            tar.addfile(header, io.BytesIO(data))


@pytest.mark.parametrize("change, message", [
    (lambda members: members | {"readme.txt": b"hello"}, "member readme.txt at byte"),
    (lambda members: {name: data for name, data in members.items() if not name.endswith("json")}, "is not whole"),
    (lambda members: {name: data for name, data in members.items() if ".01." not in name}, "is not whole"),
    (lambda members: {name: data for name, data in members.items() if name.endswith("json")}, "holds pictures of kinds"),
    (lambda members: members | {"00000000.json": b"{}"}, "member 00000000.json at byte 512 is no description"),
    (lambda members: members | {"00000000.json": b"[" * 100_000}, "is no description"),
    (lambda members: members | {"00000000.json": members["00000000.json"].replace(b'"size":[12,10]', b'"size":[10,12]')}, "is 12 x 10 pixels"),
    (lambda members: members | {"00000000.01.webp": b"\x89PNG"}, "member 00000000.01.webp at byte"),
    (lambda members: members | {"00000000.01.webp": members["00000000.01.webp"][:-9]}, "member 00000000.01.webp at byte"),
])
def test_foreign_tars(tmp_path, change, message):
    tar_of(tmp_path / "000000.tar", change(encode_sample(noise(0), 0)).items())
    with pytest.raises(ShardError, match=message): ShardDataset(tmp_path)[0]


def test_shards_are_written_once(tmp_path):
    objects = [noise(seed) for seed in range(6)]
    write_shards(objects, tmp_path, samples_per_shard=4)
    before = {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in tmp_path.iterdir()}
    write_shards(objects, tmp_path, samples_per_shard=4)
    assert before == {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in tmp_path.iterdir()}
    for other in ([noise(9), *objects[1:]], objects[:3]):
        with pytest.raises(ShardError, match="holds other samples"): write_shards(other, tmp_path, samples_per_shard=4)
    with pytest.raises(ShardError, match="holds other samples"): write_shards(objects, tmp_path, samples_per_shard=4, image_format="jpeg")


@pytest.mark.parametrize("limit", [600, 4000])
def test_full_disk_leaves_nothing_half_written(tmp_path, limit):
    objects = [noise(seed) for seed in range(4)]
    with file_size_limit(limit), pytest.raises(OSError): write_shards(objects, tmp_path)
    assert list(tmp_path.iterdir()) == []
    write_shards(objects, tmp_path)
    assert len(ShardDataset(tmp_path)) == 4 and len(list(tmp_path.iterdir())) == 2


def test_a_crash_between_shard_and_index_heals(tmp_path):
    objects = [noise(seed) for seed in range(4)]
    write_shards(objects, tmp_path, samples_per_shard=2)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    (tmp_path / "000001.index.npz").rename(tmp_path / ".tmp-0123456789ab-000001.index.npz")
    (tmp_path / ".tmp-0123456789ab-000001.tar").write_bytes(b"half")
    write_shards(objects, tmp_path, samples_per_shard=2)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def alive(pid):
    "Whether a process runs, zombies not counted."
    try: return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError: return False


SETTINGS = dict(views=2, size=16, supersample=1, samples_per_shard=3, progress=False)
STALLED = """
import sys, time
from zerolab.data import make

written = []
write_shard = make.write_shard

def stalling(path, samples):
    "The second shard stops half way, and waits there to be killed."
    def first_then_nothing():
        yield next(samples)
        print("half way", flush=True)
        time.sleep(3600)
    written.append(path)
    return write_shard(path, samples if len(written) == 1 else first_then_nothing())

if __name__ == "__main__":
    make.write_shard = stalling
    make.make_zeroverse(sys.argv[1], range(12), workers=2, views=2, size=16, supersample=1, samples_per_shard=3, progress=False)
"""


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="looks for orphans in /proc")
def test_make_zeroverse_survives_kill_and_any_number_of_workers(tmp_path):
    from zerolab.data.make import make_zeroverse
    whole = make_zeroverse(tmp_path / "whole", range(12), **SETTINGS)
    cut, script = tmp_path / "cut", tmp_path / "stalled.py"
    script.write_text(STALLED)
    with subprocess.Popen([sys.executable, script, cut], env={**os.environ, "PYTHONPATH": os.getcwd()}, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout.readline() == "half way\n"
            children = [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]
        finally: process.kill()
    assert len(list(cut.glob("0*.tar"))) == 1 and list(cut.glob(".tmp*")) and children
    make_zeroverse(cut, range(12), **SETTINGS)
    expected = {path.name: path.read_bytes() for path in whole.iterdir()}
    assert {path.name: path.read_bytes() for path in cut.iterdir()} == expected
    deadline = time.time() + 60
    while any(map(alive, children)) and time.time() < deadline: time.sleep(0.1)
    assert not any(map(alive, children)), "workers outlived their killed parent"


def broken_cameras(rng, size): raise ArithmeticError("nowhere to stand")


def test_make_zeroverse_says_which_seed_failed(tmp_path):
    from zerolab.data.make import half_structured, make_zeroverse
    with pytest.raises(RuntimeError, match="seed 5 failed .*nowhere to stand"): make_zeroverse(tmp_path, range(5, 7), cameras=broken_cameras, **SETTINGS)
    assert not list(tmp_path.glob("*.tar")) and not list(tmp_path.glob(".tmp*"))
    with pytest.raises(ValueError, match="cameras = .*broken_cameras"):
        make_zeroverse(tmp_path, range(5, 7), cameras=partial(half_structured, views=9), **SETTINGS)
