"The loader's order is a function: of the seed, and of nothing else."
import threading

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

from zerolab.data.loader import Loader, sample_at, views_at
from zerolab.scene.cameras import random_views
from zerolab.scene.views import Views


def tiny(seed, views=6):
    rgba = torch.full((views, 2, 2, 4), 255, dtype=torch.uint8)
    rgba[..., 0] = seed
    rgba[..., 1] = torch.arange(views, dtype=torch.uint8)[:, None, None]
    return Views(rgba, random_views(np.random.default_rng(seed), views, size=(2, 2)), seed=seed)


OBJECTS = [tiny(seed) for seed in range(23)]


def content(batch): return [*batch["index"].tolist(), *batch["rgba"][:, :, 0, 0, :2].flatten().tolist(), *batch["cameras"].w2c.flatten().tolist()]


@settings(deadline=None, max_examples=40)
@given(count=st.integers(1, 23), batch_size=st.integers(1, 5), world=st.integers(1, 4), workers=st.sampled_from([0, 1, 3]), seed=st.integers(0, 9))
def test_each_sample_once_an_epoch_over_all_ranks(count, batch_size, world, workers, seed):
    ranks = [Loader(OBJECTS[:count], batch_size, seed, views=2, rank=rank, world=world, workers=workers) for rank in range(world)]
    steps = -(-3 * count // (batch_size * world))
    seen = [i for _ in range(steps) for rank in ranks for i in next(rank)["index"].tolist()]
    for epoch in range(3): assert sorted(seen[epoch * count:(epoch + 1) * count]) == list(range(count))
    for rank in ranks: rank.close()


@settings(deadline=None, max_examples=30)
@given(before=st.integers(0, 9), workers=st.sampled_from([(0, 0), (2, 0), (0, 3), (1, 2)]), world=st.sampled_from([(1, 1), (1, 3), (3, 1), (2, 4)]))
def test_state_is_exact_whatever_was_read_ahead(before, workers, world):
    "Also when the number of ranks changes in the middle of an epoch."
    def ranks(world, workers, batch_size): return [Loader(OBJECTS, batch_size, 4, views=3, rank=rank, world=world, workers=workers) for rank in range(world)]
    def take(loaders, steps): return [i for _ in range(steps) for loader in loaders for i in next(loader)["index"].tolist()]
    first, second = ranks(world[0], workers[0], 12 // world[0]), ranks(world[1], workers[1], 12 // world[1])
    seen = take(first, before)
    for loader in second: loader.load_state_dict(first[0].state_dict())
    seen += take(second, 4)
    assert seen == take(ranks(1, 0, 12), before + 4)
    for loader in first + second: loader.close()


def test_loading_a_state_forgets_what_was_read_ahead():
    loader, plain = Loader(OBJECTS, 3, 0, views=2, workers=3), Loader(OBJECTS, 3, 0, views=2)
    start, first = loader.state_dict(), content(next(loader))
    for _ in range(5): next(loader)
    loader.load_state_dict(start)
    assert content(next(loader)) == first
    next(plain)
    for _ in range(9): assert content(next(loader)) == content(next(plain))
    loader.close()


def test_views_match_their_cameras_and_change_from_epoch_to_epoch():
    loader, chosen = Loader(OBJECTS[:4], 4, 1, views=3), {i: [] for i in range(4)}
    for _ in range(5):
        batch = next(loader)
        for row, i in enumerate(batch["index"].tolist()):
            views = batch["rgba"][row, :, 0, 0, 1].long()
            assert (batch["rgba"][row, ..., 0] == i).all() and len(set(views.tolist())) == 3
            assert torch.equal(batch["cameras"].w2c[row], OBJECTS[i].cameras.w2c[views])
            chosen[i].append(tuple(views.tolist()))
    assert all(len(set(sets)) > 1 for sets in chosen.values())


def test_every_view_is_as_likely_as_any_other():
    counts = np.bincount(np.concatenate([views_at(position, 0, 16, 4) for position in range(4000)]), minlength=16)
    assert abs(counts / 1000 - 1).max() < 0.15


def test_epochs_differ_and_seeds_differ():
    orders = [tuple(sample_at(place, seed, 20) for place in range(epoch * 20, epoch * 20 + 20)) for seed in range(3) for epoch in range(3)]
    assert len(set(orders)) == 9


def test_an_error_in_a_worker_reaches_the_caller_and_threads_end():
    loader = Loader([*OBJECTS[:2], tiny(2, views=1)], 3, 0, views=2, workers=2)
    with pytest.raises(ValueError, match="sample 2: .*2 views wanted of a sample that has 1"): next(loader)
    loader.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("loader")]
