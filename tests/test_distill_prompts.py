"Corpora, their report, grammars and the sampler, against slow and obvious versions of themselves."
import json
import math

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from zerolab.distill.prompts import (AT2520, PROCEDURAL, SPLITS, Corpus, Grammar, corpus_of, corpus_report, grammar_corpus, grammar_prompts, held_pairs,
                                     hold_out, load_corpus, near_duplicates, normalise, report_table, rows_at, shuffled_pairs)

WORDS = st.lists(st.sampled_from("ab c dé".split()), min_size=1, max_size=9)


@settings(deadline=None, max_examples=60)
@given(texts=st.lists(WORDS.map(tuple), min_size=1, max_size=25, unique=True), similarity=st.sampled_from([.2, .5, .8, 1.]), data=st.data())
def test_near_duplicates_are_those_of_all_pairs(texts, similarity, data):
    groups = np.array(data.draw(st.lists(st.sampled_from([1, 2, 4, 7]), min_size=len(texts), max_size=len(texts))), np.uint8)
    bags = [set(zip((None, *text), (*text, None))) for text in texts]
    true = np.array([[len(a & b) / len(a | b) for b in bags] for a in bags])
    np.fill_diagonal(true, 0)
    true[true < similarity - 1e-9] = 0
    nearest, near, groups_near = near_duplicates(texts, groups, similarity=similarity)
    assert np.allclose(near, true.max(1)) and ((nearest < 0) == (near == 0)).all()
    assert groups_near.tolist() == [int(np.bitwise_or.reduce(groups[row > 0], initial=0)) for row in true]


@settings(deadline=None, max_examples=40)
@given(splits=st.lists(st.lists(st.text(alphabet="aB é,.", min_size=1).filter(str.strip), max_size=8), min_size=3, max_size=3))
def test_the_report_counts_as_a_person_would(splits):
    corpus = Corpus(("a b", *splits[0]), *splits[1:])
    report = corpus_report(corpus)
    for split in SPLITS:
        prompts, row = getattr(corpus, split), report["splits"][split]
        assert row["prompts"] == len(prompts) and row["different"] == len(set(prompts))
        assert row["different_normalised"] == len(set(map(normalise, prompts)))
        assert row["vocabulary"] == len({word for prompt in prompts for word in normalise(prompt).split()})
    for pair, row in report["shared"].items():
        second, first = (getattr(corpus, split) for split in pair.split(" in "))
        assert row["exactly"] == sum(prompt in first for prompt in second)
        assert row["normalised"] == sum(normalise(prompt) in set(map(normalise, first)) for prompt in second) <= row["nearly"] <= row["prompts"]
    assert json.loads(json.dumps(report)) == report and report_table(report)


@settings(deadline=None, max_examples=80)
@given(count=st.integers(1, 40), batch_size=st.integers(1, 6), world=st.integers(1, 5), seed=st.integers(0, 9), epoch=st.integers(0, 3))
def test_a_step_has_no_prompt_twice_and_an_epoch_neither(count, batch_size, world, seed, epoch):
    together, steps = batch_size * world, max(1, count // (batch_size * world))
    seen = []
    for step in range(epoch * steps, (epoch + 1) * steps):
        ranks = [rows_at(step, count, batch_size, seed=seed, rank=rank, world=world) for rank in range(world)]
        assert np.concatenate(ranks).tolist() == rows_at(step, count, together, seed=seed).tolist(), "one process or many: the same step"
        seen += np.concatenate(ranks).tolist()
    times = np.bincount(seen, minlength=count)
    assert times.max() - times.min() <= 1 and (times.max() == 1 or together > count)


def test_every_rank_draws_from_the_whole_corpus():
    for rank in range(4):
        seen = {row for step in range(120) for row in rows_at(step, 24, 2, seed=1, rank=rank, world=4)}
        assert len(seen) == 24


def test_the_order_is_that_of_the_seed():
    def order(seed): return [rows_at(step, 50, 5, seed=seed).tolist() for step in range(30)]
    assert order(0) == order(0) != order(1)
    assert order(0)[:10] != order(0)[10:20], "each epoch has an order of its own"


@settings(deadline=None, max_examples=60)
@given(left=st.integers(1, 60), right=st.integers(1, 60), seed=st.integers(0, 99))
def test_shuffled_pairs_are_one_to_one(left, right, seed):
    l, r = shuffled_pairs(np.arange(left * right), left, right, seed)
    assert l.min() >= 0 and l.max() < left and r.min() >= 0 and r.max() < right
    assert len(set(zip(l.tolist(), r.tolist()))) == left * right


def test_shuffled_pairs_are_spread_evenly():
    "The first thousandth of thirty million: chi squared of each factor's digits, which for a fair draw is its freedom, give or take its deviation."
    for seed in range(3):
        for part, size in zip(shuffled_pairs(np.arange(30_000), 2100, 12_000, seed), (2100, 12_000)):
            counts = np.bincount(part, minlength=size)
            chi2 = ((counts - counts.mean())**2).sum() / counts.mean()
            assert abs(chi2 - size) < 5 * math.sqrt(2 * size)


@settings(deadline=None, max_examples=60)
@given(a=st.integers(2, 9), b=st.integers(2, 9), c=st.integers(1, 4), every=st.integers(2, 9), seed=st.integers(0, 99))
def test_unseen_prompts_have_unseen_pairs_of_seen_words(a, b, c, every, seed):
    grammar = Grammar("{x} {y} {z}", dict(zip("xyz", (tuple(f"{name}{i}" for i in range(size)) for name, size in zip("xyz", (a, b, c))))))
    held = held_pairs(grammar, seed, every)
    train = grammar_prompts(grammar, int((~held).sum()) * c, seed, every=every)
    unseen = grammar_prompts(grammar, int(held.sum()) * c, seed, unseen=True, every=every)
    assert sorted(train + unseen) == sorted(grammar.prompts()), "together they are all prompts, each once"
    assert not {tuple(p.split()[:2]) for p in train} & {tuple(p.split()[:2]) for p in unseen}
    assert {word for p in train for word in p.split()} == {word for words in grammar.slots.values() for word in words}
    with pytest.raises(ValueError, match="prompts wanted"): grammar_prompts(grammar, len(train) + 1, seed, every=every)


def test_a_smaller_corpus_is_the_beginning_of_a_larger_one():
    small, large = grammar_corpus(PROCEDURAL, 16, 4, seed=5), grammar_corpus(PROCEDURAL, 1024, 64, seed=5)
    assert large.train[:16] == small.train and large.test[:4] == small.test
    assert not any("\n" in prompt or "  " in prompt for prompt in large.train)


def test_words_of_the_grammars_are_whole():
    for grammar in (PROCEDURAL, AT2520):
        for words in grammar.slots.values(): assert all(word == " ".join(word.split()) and word for word in words)
    assert AT2520.slots["animal"][8] == "an orangutan"


def test_holding_out_keeps_spellings_together():
    corpus = corpus_of([spelling.format(i) for i in range(30) for spelling in ("Shape {}", "shape {}.", "a shape {}")])
    split = hold_out(corpus, 20, seed=3)
    assert not set(map(normalise, split.train)) & set(map(normalise, split.test))
    assert sorted(split.train + split.test) == sorted(corpus.train) and len(split.unseen()) == 20
    assert hold_out(corpus, 20, seed=3) == split != hold_out(corpus, 20, seed=4)


@pytest.mark.parametrize("content, says", [
    ("", "is no JSON"), ("[" * 100_000, "is no JSON"), ('{"train": null}', "NoneType 'None', need a list"), ('{"train": {"a": 1}}', "dict"),
    ('{"train": [["a"]]}', r"train\[0\] is .* prompts are strings"), ('{"train": ["a", null]}', r"train\[1\]"), ('{"train": ["a", "\\n\\t"]}', "is empty"),
    ('{"train": [NaN]}', "a float"), ("7", "holds a int"), ('"a cube"', "holds a str"), ('{}', "the keys none"), ('{"val": ["a"]}', "the keys 'val'"),
    (b"\xff\xfe{", "is no JSON"), ('{"train": ["a"], "test": "b"}', "test is str 'b'")])
def test_bad_files_get_one_clear_line(tmp_path, content, says):
    (tmp_path / "bad.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=says) as error: load_corpus(tmp_path / "bad.json")
    assert len(str(error.value).splitlines()) == 1 and len(str(error.value)) < 400


def test_an_unseen_split_is_named_where_there_is_one():
    corpus = Corpus(("a", "b"), val=("C", "c"), test=("A!", "b"))
    with pytest.raises(ValueError, match="none of its 2 test prompts is unseen, train has them all: split='val' has 1"): corpus.unseen()
    assert corpus.unseen("val") == ("C",)
    with pytest.raises(ValueError, match="hold_out"): Corpus(("a",)).unseen()


def test_single_prompts_and_empty_corpora():
    assert rows_at(7, 1, 4, seed=0, rank=1, world=2).tolist() == [0] * 4
    assert corpus_report(corpus_of(["a cube"]))["shared"] == {}
    with pytest.raises(ValueError, match="train has no prompts"): corpus_of([])
    with pytest.raises(ValueError, match="need a list of prompts"): corpus_of("a cube")
