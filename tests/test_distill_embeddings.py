"Stores of embeddings: what comes back is what the encoder said, whatever happened in between."
import fcntl
import pickle
import shutil
from collections import namedtuple

import numpy as np
import pytest
import torch

from zerolab.diffusion.hub import load_prior, save_random_checkpoint
from zerolab.distill import embeddings as module
from zerolab.distill.embeddings import VIEW_SUFFIXES, Embeddings, encode_corpus, load_text_encoder, text_hashes, with_views

TEXTS = [f"a {colour} {shape}" for colour in ("red", "green", "blue") for shape in ("cube", "ball", "cone")]


def numbers(texts, shift=0.):
    "An encoder that can be checked by eye."
    values = torch.tensor([[float(sum(map(ord, text)) % 97), len(text)] for text in texts]) + shift
    return {"text": values[:, None].expand(-1, 3, -1), "mask": (values > 20).long(), "pooled": values}


def encode(texts, folder, encoder=numbers, **options): return encode_corpus(texts, folder, encoder, progress=False, **options)


def holds(store, texts):
    said, true = store.condition(texts), numbers(texts)
    return set(said) == set(true) and all(torch.equal(said[name], true[name]) for name in true)


@pytest.mark.parametrize("kind", ["unet", "pixart"])
def test_a_store_says_what_the_prior_says(tmp_path, kind):
    "CLIP with its pooled output and T5 with its mask, from a pipeline's folder."
    prior = load_prior(save_random_checkpoint(tmp_path / kind, kind))
    encoder = load_text_encoder(tmp_path / kind, limit=prior.max_tokens)
    store, direct = encode(TEXTS, tmp_path / "store", encoder, batch_size=4), prior.condition(TEXTS)
    assert store.outputs["text"].dtype == np.float16 and set(store.outputs) == set(direct)
    for name, value in store.condition(TEXTS).items():
        assert value.dtype == direct[name].dtype and (value - direct[name]).abs().max() <= 1e-3 * direct[name].abs().max()
    assert len(encode(TEXTS, tmp_path / "store", prior.condition)) == 9, "the same encoder by another name"
    x, t = torch.randn(9, *prior.shape), torch.full((9,), 500)
    assert (prior.eps(x, t, store.condition(TEXTS)) - prior.eps(x, t, direct)).abs().max() < 1e-2


def test_an_encoder_without_a_limit_wants_one(tmp_path):
    save_random_checkpoint(tmp_path, "pixart")
    settings = module.read_json(tmp_path / "tokenizer/tokenizer_config.json")
    module.write_json(tmp_path / "tokenizer/tokenizer_config.json", settings | dict(model_max_length=int(1e30)))
    with pytest.raises(ValueError, match="names no limit: give one"): load_text_encoder(tmp_path)
    assert load_text_encoder(tmp_path, limit=9)(["a cube"])["text"].shape[1] == 9


def test_rows_are_found_in_any_order_and_any_number(tmp_path):
    store = encode(with_views(TEXTS) + TEXTS, tmp_path, batch_size=7, commit=10)
    assert len(store) == len(TEXTS) * len(VIEW_SUFFIXES)
    asked = [text + VIEW_SUFFIXES[i % 5] for i, text in enumerate(TEXTS[::-1] * 3)]
    assert holds(store, asked) and store.condition([])["text"].shape == (0, 3, 2)
    assert store.rows(["nobody", TEXTS[0]]).tolist() == [-1, 0]


def test_hashes_end_in_any_byte():
    "Fixed-length bytes lose trailing zeros when read; those of a hash must not matter."
    hashes = text_hashes([f"text {i}" for i in range(3000)])
    assert any(len(value) < 16 for value in hashes.tolist()) and len(np.unique(hashes)) == 3000
    assert (np.sort(hashes)[np.searchsorted(np.sort(hashes), hashes)] == hashes).all()


def test_a_failure_keeps_what_was_stored(tmp_path):
    def failing(texts):
        if "a blue ball" in texts: raise RuntimeError("out of memory")
        return numbers(texts)
    with pytest.raises(RuntimeError, match="out of memory"): encode(TEXTS, tmp_path, failing, batch_size=1, commit=3)
    assert len(Embeddings(tmp_path)) == 6 and holds(Embeddings(tmp_path), TEXTS[:6])
    assert holds(encode(TEXTS, tmp_path), TEXTS)


def test_a_failure_before_anything_was_stored(tmp_path):
    "The first piece fails half way: what it left is not there the next time."
    def failing(texts):
        if TEXTS[4] in texts: raise RuntimeError("no")
        return numbers(texts)
    with pytest.raises(RuntimeError): encode(TEXTS, tmp_path, failing, batch_size=1)
    assert not (tmp_path / "store.json").exists()
    store = encode(TEXTS[::-1], tmp_path)
    assert holds(store, TEXTS) and (tmp_path / "pooled.bin").stat().st_size == 9 * 4


def test_what_a_killed_process_left_is_cut_off(tmp_path):
    encode(TEXTS[:4], tmp_path)
    for name, left in (("text", 999), ("pooled", 5), ("hashes", 160)):
        with open(tmp_path / f"{name}.bin", "ab") as file: file.write(b"?" * left)
    assert holds(Embeddings(tmp_path), TEXTS[:4]) and Embeddings(tmp_path).rows(["?" * 16]).tolist() == [-1]
    assert holds(encode(TEXTS, tmp_path), TEXTS)


def test_a_full_disk_is_told_beforehand_and_loses_nothing(tmp_path, monkeypatch):
    encode(TEXTS[:4], tmp_path)
    usage = namedtuple("usage", "free")(10)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage)
    with pytest.raises(OSError, match=r"5 texts take 0.0 GB .* make room, or store less"): encode(TEXTS, tmp_path)
    monkeypatch.undo()
    assert len(Embeddings(tmp_path)) == 4 and holds(encode(TEXTS, tmp_path), TEXTS)


def test_a_store_that_is_being_written_is_left_alone(tmp_path):
    encode(TEXTS[:4], tmp_path)
    with open(tmp_path / "lock", "w") as lock:
        lock.write("process 12 on cup")
        lock.flush()
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(RuntimeError, match="process 12 on cup is writing"): encode(TEXTS, tmp_path)
    assert holds(Embeddings(tmp_path), TEXTS[:4])


def test_another_encoder_is_refused(tmp_path):
    encode(TEXTS[:4], tmp_path)
    for other in (lambda texts: numbers(texts, 1.), lambda texts: {name: value[..., :1] for name, value in numbers(texts).items()}):
        with pytest.raises(ValueError, match="was written by another encoder"): encode(TEXTS, tmp_path, other)
    with pytest.raises(ValueError, match="does not say 'mask'"): encode(TEXTS, tmp_path, lambda texts: {"text": numbers(texts)["text"]})
    assert len(Embeddings(tmp_path)) == 4


def test_only_what_is_kept_is_stored(tmp_path):
    store = encode(TEXTS, tmp_path, keep=("pooled",))
    assert set(store.condition(TEXTS)) == {"pooled"} and not (tmp_path / "text.bin").exists()
    assert len(encode([*TEXTS, "new"], tmp_path)) == 10, "a store remembers what it keeps"
    assert not (tmp_path / "text.bin").exists()


def test_another_process_gets_the_name_not_the_data(tmp_path):
    store = encode(TEXTS, tmp_path)
    sent = pickle.dumps(store)
    assert len(sent) < 300 + len(str(tmp_path)) and holds(pickle.loads(sent), TEXTS)


def test_numbers_that_do_not_fit_are_refused(tmp_path):
    with pytest.raises(ValueError, match="whole numbers beyond 0 to 255"): encode(TEXTS, tmp_path, lambda texts: {"ids": torch.full((len(texts), 2), 300)})
    with pytest.raises(ValueError, match="'pooled' of 'a red ball' is not finite"):
        encode(TEXTS, tmp_path, lambda texts: {"pooled": torch.tensor([[1e9 if text == "a red ball" else 0.] for text in texts])})


def test_reading_rows_does_not_read_the_store(tmp_path):
    "Rows of a file with 2 GB in it, nearly all of them holes: no memory is taken for it."
    encode(TEXTS, tmp_path, lambda texts: {"text": torch.ones(len(texts), 77, 1024)})
    rows = 13_000
    module.write_json(tmp_path / "store.json", Embeddings(tmp_path).about | dict(rows=rows))
    for name, size in (("text", 77 * 1024 * 2), ("hashes", 16)):
        with open(tmp_path / f"{name}.bin", "ab") as file: file.truncate(rows * size)

    def anonymous():
        return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("RssAnon"))
    before = anonymous()
    store = Embeddings(tmp_path)
    assert torch.equal(store.condition(TEXTS[:2])["text"], torch.ones(2, 77, 1024))
    assert anonymous() - before < 20_000, "kB"
