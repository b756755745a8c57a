"""The evaluator of prompt-amortised drawings: against hand-made embeddings and brute force; no model is loaded, nothing is rendered."""
import csv
import itertools
import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from zerolab.diffusion.alignment import DualEncoder, write_rows
from zerolab.diffusion.intervals import Estimate, wilson
from zerolab.distill.evaluate import (KINDS, MEASURES, Judges, chroma, drawings_of, judge, judgement_table, load_drawings, object_vectors,
                                      prompt_distance, read_picture, retrieve, same_nearest, save_drawings, score_split, seed_distance, word_bias)

COLOURS = dict(red=(1., 0, 0), green=(0, 1., 0), blue=(0, 0, 1.), yellow=(1., 1, 0), cyan=(0, 1., 1), grey=(.5, .5, .5))


class Words:
    "A tokenizer that knows the words of COLOURS and reads `limit` of them."
    unk_token_id, eos_token_id, pad_token_id = 0, 98, 99
    def __call__(self, prompts, truncation=False, max_length=None, **_):
        numbers = [[list(COLOURS).index(word) + 1 if word in COLOURS else 0 for word in prompt.lower().strip(".").split()] for prompt in prompts]
        return {"input_ids": [ids[:max_length] if truncation else ids for ids in numbers]}


class ByColour(DualEncoder):
    "A picture is its mean colour; a prompt that of its last known word."
    def text(self, prompts, batch=256):
        ids = self.tokenizer(prompts, truncation=True, max_length=self.limit)["input_ids"]
        last = [next((number for number in reversed(row) if number), 6) for row in ids]
        return F.normalize(torch.tensor(list(COLOURS.values()))[torch.tensor(last) - 1], dim=-1)

    def pictures(self, pictures, batch=256): return F.normalize(pictures.mean((2, 3)) + 1e-6, dim=-1)


ENCODER = ByColour("by colour", None, Words(), None, 3)
JUDGES = Judges(ENCODER)


def paint(*objects):
    "Pictures [N,V,3,8,8] of plain colours."
    return torch.tensor([[COLOURS[name] for name in views] for views in objects])[..., None, None].expand(-1, -1, -1, 8, 8).clone()


def test_recall_of_views_and_of_objects_as_counted_by_hand():
    objects = [("red", "red", "red"), ("green", "green", "blue"), ("blue", "red", "red"), ("yellow", "yellow", "cyan")]
    found = judge(JUDGES, drawings_of(paint(*objects), ["red", "green", "blue", "yellow"])).splits["train"].numbers
    assert found["r1_view"].value == pytest.approx((3 + 2 + 1 + 2)/12)
    # the third, red twice and blue once, has its mean at cosine 2/3 of red, and .47 of yellow
    assert found["r1_object"].value == pytest.approx(3/4)
    half = math.sqrt(.5)
    assert found["sim"].value == pytest.approx((3 + 2 + 1 + (1 + 1 + .5))/12, abs=1e-4)
    wrong = (0 + 0 + 0 + half*3)/3 + (2*0 + 1 + half*2)/3 + (0 + 2 + half*2)/3 + (half*2*2 + half + half)/3
    assert found["wrong"] == pytest.approx(wrong/12, abs=1e-4)


def test_one_picture_for_all_is_chance_whatever_the_ties():
    for prompts in (["red", "green", "blue"], ["blue", "red", "green"]):
        found = judge(JUDGES, drawings_of(paint(*[("grey", "grey")]*3), prompts))
        assert found.splits["train"].numbers["r1_object"].value == pytest.approx(found.chance) == pytest.approx(1/3)
        assert found.splits["train"].numbers["same"] == 1 and found.splits["train"].numbers["vendi"] == pytest.approx(1)


def test_retrieval_against_a_loop():
    generator = torch.Generator().manual_seed(0)
    views, texts = (F.normalize(torch.randn(*shape, generator=generator), dim=-1) for shape in ((30, 3, 5), (11, 5)))
    truth = torch.randint(0, 11, (30,), generator=generator)
    views[4, 1] = views[9] = 0
    found = retrieve(views, texts, truth, cells=100)
    for i in range(30):
        cosines = views[i] @ texts.T
        hits = [float(row.argmax() == truth[i]) if row.abs().sum() > 0 else 0. for row in cosines]
        assert float(found["r1_view"][i]) == pytest.approx(sum(hits)/3)
        assert float(found["r1_object"][i]) == float(i != 9 and cosines.mean(0).argmax() == truth[i])
        assert float(found["sim"][i]) == pytest.approx(float(cosines[:, truth[i]].mean()), abs=1e-6)
        others = [float(cosines[:, j].mean()) for j in range(11) if j != truth[i]]
        assert float(found["wrong"][i]) == pytest.approx(sum(others)/10, abs=1e-6)


def test_spread_and_its_bootstrap_against_pairs():
    generator = torch.Generator().manual_seed(1)
    objects, texts = (F.normalize(torch.randn(n, 6, generator=generator) + 1, dim=-1) for n in (13, 5))
    truth = torch.tensor([0, 0, 0, 1, 1, 2, 2, 2, 2, 2, 4, 4, 4])             # prompt 3 has no objects
    def mean(vectors, groups, weights):
        total = mass = 0.
        for i, j in itertools.permutations(range(len(vectors)), 2):
            if groups[i] == groups[j]: continue
            weight = weights[groups[i]]*weights[groups[j]]
            total, mass = total + weight*float(1 - vectors[i] @ vectors[j]), mass + weight
        return total/mass
    asked, ones = torch.tensor([0, 1, 2, 4]), [1.]*5
    found = prompt_distance(objects, texts, truth, resamples=400)
    assert found.n == 4 and found.value == pytest.approx(mean(objects, truth.tolist(), ones)/mean(texts[asked], asked.tolist(), ones), abs=1e-6)
    drawn = torch.randint(4, (400, 4), generator=torch.Generator().manual_seed(0))
    slow = []
    for row in drawn.tolist():
        if len(set(row)) == 1: continue
        weights = {int(prompt): float(row.count(i)) for i, prompt in enumerate(asked)}
        slow.append(mean(objects, truth.tolist(), weights)/mean(texts[asked], asked.tolist(), weights))
    low, high = torch.tensor(slow, dtype=torch.float64).quantile(torch.tensor([.025, .975], dtype=torch.float64)).tolist()
    assert (found.low, found.high) == (pytest.approx(low, abs=1e-6), pytest.approx(high, abs=1e-6))
    for place, prompt in enumerate(asked):
        mine = objects[truth == prompt]
        pairs = [float(1 - a @ b) for a, b in itertools.combinations(mine, 2)]
        assert float(seed_distance(objects, truth)[place]) == pytest.approx(sum(pairs)/len(pairs), abs=1e-5)


def test_an_interval_of_the_spread_covers_what_it_should():
    "Of 150 sets of 12 prompts about 95 % of the intervals hold the true distance of 1; over each prompt's mean distance it would be about two thirds."
    hits, texts = 0, torch.eye(400)[:12]
    for seed in range(150):
        generator = torch.Generator().manual_seed(seed)
        objects = F.normalize(torch.randn(12, 3, generator=generator), dim=-1)
        found = prompt_distance(objects, texts, torch.arange(12), resamples=300, seed=seed)
        hits += found.low <= 1 <= found.high
    assert hits/150 > .85


def test_few_prompts_have_an_interval_too():
    "Of two prompts every second draw has no pair, of which nothing may be left in the quantiles."
    generator = torch.Generator().manual_seed(2)
    for P in (2, 3, 4):
        objects, texts = (F.normalize(torch.randn(n, 7, generator=generator), dim=-1) for n in (3*P, P))
        found = prompt_distance(objects, texts, torch.arange(3*P) % P)
        assert math.isfinite(found.low) and found.low <= found.value + 1e-9 and found.value <= found.high + 1e-9


def test_what_has_no_spread_has_no_number():
    objects = F.normalize(torch.randn(3, 4, generator=torch.Generator().manual_seed(0)), dim=-1)
    assert prompt_distance(objects, torch.eye(4), torch.zeros(3, dtype=torch.int64)) is None       # one prompt
    assert prompt_distance(objects, torch.eye(4)[[0, 0]], torch.tensor([0, 1, 1])) is None         # an encoder that hears nothing


def test_a_collapsed_model_has_no_distance_across_seeds_and_no_doubt_about_it():
    "A distance of 0 for each prompt is no rate: it gets no interval of Wilson's, which R@1 gets."
    six = torch.eye(6)[:, None]
    found = score_split(torch.arange(12), torch.arange(6).repeat(2), torch.eye(6), retrieve(six.repeat(2, 1, 1), torch.eye(6), torch.arange(6).repeat(2)),
                        dict(views=six.repeat(2, 2, 1)), None, {}).numbers
    assert found["seeds"] == found["across"] == Estimate(0., 0., 0., 6) and found["r1_object"] == wilson(6, 6)


def test_one_picture_nearest_to_all():
    for cells in (1, 10**6):
        assert same_nearest(torch.eye(4)[[0, 0, 2, 3]], torch.eye(4), cells=cells) == pytest.approx(.5)   # the text without a picture ties with all
        assert same_nearest(torch.eye(4), torch.eye(4), cells=cells) == pytest.approx(.25)


def test_an_object_is_the_direction_of_its_views():
    views = torch.tensor([[[1., 0], [0, 1]], [[0, 0], [0, 1]], [[0, 0], [0, 0]]])
    assert object_vectors(views).tolist() == [[pytest.approx(math.sqrt(.5))]*2, [0, 1], [0, 0]]


def test_missing_pictures_are_failures_in_every_number(tmp_path):
    pictures, prompts = paint(*[(name, name) for name in ("red", "green", "blue", "yellow")]), ["red", "green", "blue", "yellow"]
    pictures[1, 0, 0, 0, 0], pictures[3] = math.nan, math.inf
    whole = judge(JUDGES, drawings_of(paint(*[(name, name) for name in prompts]), prompts)).splits["train"]
    memory = judge(JUDGES, drawings_of(pictures, prompts))
    files = judge(JUDGES, load_drawings(save_drawings(tmp_path/"m.jsonl", drawings_of(pictures, prompts))))
    for found in (memory, files):
        scores = found.splits["train"]
        assert (found.corpus, scores.objects, scores.failed, len(found.failures)) == (4, 4, 2, 3)
        assert scores.numbers["r1_view"].value == pytest.approx((1 + .5 + 1 + 0)/4) and scores.numbers["r1_view"].n == 4
        assert scores.numbers["r1_object"].value == pytest.approx(3/4)
        assert scores.numbers["sim"].value == pytest.approx(whole.numbers["sim"].value*(1 + .5 + 1 + 0)/4, abs=1e-4)
        assert [row["failed"] for row in found.rows] == [0, 1, 0, 1] and found.rows[3]["taken for"] == ""
        assert "3 PICTURES MISSING" in str(found)
    assert "NaN" in memory.failures[0] and "no such file" in files.failures[0]


def test_duplicates_and_twins_are_merged_and_told():
    found = judge(Judges(ENCODER, distractors=["blue", "RED!"]), drawings_of(paint(*[("red",)]*3, ("green",)), ["red", "Red.", "red", "green"]))
    assert (found.corpus, found.merged, found.splits["train"].prompts, found.splits["train"].seeds) == (3, 2, 2, (1, 3))
    assert "2 other spellings merged" in str(found) and "N = 3" in str(found)
    long = judge(JUDGES, drawings_of(paint(("red",), ("red",), ("blue",)), ["red red red red", "red red red blue", "shiny blue"]))
    assert (long.twins, long.cut, long.unknown) == (1, 2, 1)
    assert long.splits["train"].numbers["r1_view"].value == pytest.approx((.5 + .5 + 1)/3)         # neither of the twins can be told


def test_splits_share_a_corpus_and_the_prefix_is_read():
    prompts, pictures = ["red", "green", "blue", "cyan"], paint(("red",), ("blue",), ("blue",), ("cyan",))
    found = judge(Judges(ENCODER, prefix="grey "), drawings_of(pictures, prompts, splits=["train", "train", "unseen", "unseen"]))
    assert {name: scores.numbers["r1_view"].value for name, scores in found.splits.items()} == dict(train=.5, unseen=1, all=.75)
    assert found.chance == .25 and "prefix 'grey '" in str(found) and "by colour" in str(found)
    cut = judge(Judges(ENCODER, prefix="red red red "), drawings_of(pictures, prompts))
    assert cut.twins == 3 and cut.splits["train"].numbers["r1_view"].value == .25                  # nothing is left of the prompts


@pytest.mark.parametrize("name", ["m.csv", "m.jsonl"])
def test_a_manifest_round_trip(tmp_path, name):
    prompts = ["red, and more; \"quoted\"", "green", "green", "blau-grün ü"]
    generator = torch.Generator().manual_seed(3)
    pictures = (torch.rand(4, 2, 3, 9, 7, generator=generator)*255).round()/255
    before = drawings_of(pictures, prompts, splits=["train", "unseen", "unseen", "train"], seeds=[0, 5, 7, 1])
    after = load_drawings(save_drawings(tmp_path/name, before))
    assert (after.prompts, after.splits, after.seeds, after.views) == (before.prompts, before.splits, before.seeds, 2)
    read = torch.stack([torch.stack([read_picture(path) for path in paths]) for paths in after.pictures])
    assert torch.equal((read*255).round(), (pictures*255).round())
    (tmp_path/name).rename(tmp_path/f"moved{name}")                                                # paths are relative to the file
    assert str(judge(JUDGES, load_drawings(tmp_path/f"moved{name}"))) == str(judge(JUDGES, before))


def test_the_table_of_prompts_says_what_the_summary_says(tmp_path):
    objects = [("red", "blue"), ("green", "green"), ("red", "red"), ("blue", "blue")]
    found = judge(JUDGES, drawings_of(paint(*objects), ["red", "green", "green", "a blue, cyan"]))
    with open(write_rows(found.rows, tmp_path/"rows.csv"), newline="") as file: rows = list(csv.DictReader(file))
    assert [row["prompt"] for row in rows] == ["red", "green", "a blue, cyan"] and [row["objects"] for row in rows] == ["1", "2", "1"]
    for name in ("sim", "r1_view", "r1_object"):
        mean = sum(float(row[name])*int(row["objects"]) for row in rows)/4
        assert mean == pytest.approx(found.splits["train"].numbers[name].value, abs=1e-5)
    assert rows[1]["taken for"] in ("green", "red") and rows[0]["distance across seeds"] == ""
    assert float(rows[1]["distance across seeds"]) == pytest.approx(1, abs=1e-4)


def test_the_numbers_do_not_depend_on_the_order_of_the_drawings():
    prompts, objects = ["red", "green", "green", "cyan", "blue"], [("red",), ("green",), ("cyan",), ("cyan",), ("grey",)]
    straight = judge(JUDGES, drawings_of(paint(*objects), prompts, seeds=range(5))).splits["train"].numbers
    order = [3, 0, 4, 2, 1]
    turned = judge(JUDGES, drawings_of(paint(*[objects[i] for i in order]), [prompts[i] for i in order], seeds=order)).splits["train"].numbers
    for name, value in straight.items(): assert getattr(turned[name], "value", turned[name]) == pytest.approx(getattr(value, "value", value), abs=1e-6), name


def test_words_and_their_bias_with_failures(monkeypatch):
    def read(classifier, pictures): return {"colour": F.one_hot((pictures[:, 0, 2, 0, 0] > .5).long(), 2).float()}, None
    monkeypatch.setattr("zerolab.distill.evaluate.read_attributes", read)
    classifier = SimpleNamespace(config=SimpleNamespace(words={"colour": ("red", "blue")}))
    judges = Judges(ENCODER, classifier=classifier, asked=lambda prompt: (int("blue" in prompt),))
    pictures = paint(("red", "red"), ("red", "red"), ("red", "red"), ("blue", "blue"))
    pictures[3, 1] = math.nan
    scores = judge(judges, drawings_of(pictures, ["red", "blue", "cyan blue", "grey blue"])).splits["train"]
    assert scores.attributes["colour"].value == scores.numbers["words"].value == .25
    assert (scores.bias["colour"].off, scores.bias["colour"].word, scores.bias["colour"].drawn) == (.75, "red", 1)
    with pytest.raises(ValueError, match="gives 2 words"):
        judge(replace(judges, asked=lambda prompt: (0, 0)), drawings_of(pictures, ["red", "blue", "cyan blue", "grey blue"]))


def test_bias_is_a_distance():
    numbers = torch.tensor([0, 0, 1, 2, 2, 2])
    assert word_bias(numbers, numbers.flip(0), "abc").off == 0
    assert word_bias(torch.tensor([0, 0]), torch.tensor([1, 2]), "abc").off == 1


def test_chroma():
    pictures = torch.ones(4, 1, 3, 4, 4)
    pictures[0, 0, 1:, 0] = 0                                                       # a pure red row on white
    pictures[1, 0, :, 0] = .3                                                       # grey
    pictures[2, 0, 1:, 0] = .5                                                      # pink is pure red and white
    values = chroma(pictures)
    assert values[:3].tolist() == [1, 0, 1] and values[3].isnan()


def test_strips_and_mixed_sizes_are_refused(tmp_path):
    from PIL import Image
    for name, size in {"a": (8, 8), "b": (16, 16), "strip": (32, 8)}.items(): Image.new("RGB", size).save(tmp_path/f"{name}.png")
    def load(*names):
        (tmp_path/"m.csv").write_text("prompt,images\n" + "".join(f"{colour},{name}.png\n" for colour, name in zip(COLOURS, names)))
        return judge(JUDGES, load_drawings(tmp_path/"m.csv"))
    with pytest.raises(ValueError, match="several pictures in one"): load("a", "strip")
    with pytest.raises(ValueError, match="8x8 and 16x16"): load("a", "b")
    transparent = Image.new("RGBA", (8, 8), (255, 0, 0, 0))
    transparent.save(tmp_path/"t.png")
    assert read_picture(tmp_path/"t.png").eq(1).all()


@pytest.mark.parametrize("make, says", [
    (lambda: drawings_of(paint(("red",)), ["red", "green"]), "2 prompts for 1 objects"),
    (lambda: drawings_of([1, 2], ["red", "green"]), "need a tensor"),
    (lambda: drawings_of(paint(("red",))[:0], []), "the set is empty"),
    (lambda: drawings_of(2*paint(("red",)), ["red"]), r"need \[0,1\]"),
    (lambda: drawings_of(paint(("red",)).byte(), ["red"]), "divide bytes by 255"),
    (lambda: drawings_of(paint(("red",)), [""]), "is empty"),
    (lambda: drawings_of(paint(("red",)), ["red"], splits=["test"]), "need one of train, unseen"),
    (lambda: drawings_of(paint(("red",), ("red",)), ["red", "RED"], splits=KINDS), "in both splits"),
    (lambda: drawings_of(paint(("red",), ("red",)), ["red", "RED"], seeds=[1, 1]), "there twice"),
    (lambda: drawings_of(paint(("red",), ("red",)), ["red", "RED"], seeds=[1]), "1 seeds for 2 prompts"),
    (lambda: judge(JUDGES, drawings_of(paint(("red",)), ["red"])), "needs two different ones"),
    (lambda: judge(Judges(ENCODER, distractors=[" "]), drawings_of(paint(("red",)), ["red"])), "distractors"),
    (lambda: judge(JUDGES, drawings_of(paint(("red",), ("red",))*math.nan, ["red", "blue"])), "not one of 2 pictures"),
    (lambda: judge(Judges(ENCODER, reference=torch.ones(1, 1, 3, 16, 16)), drawings_of(paint(("red",)), ["red"])), "needs two|reference of"),
    (lambda: Judges(ENCODER, asked=lambda prompt: ()), "needs `asked`"),
    (lambda: Judges("openai/clip-vit-base-patch32"), "need a DualEncoder: load_dual_encoder"),
])
def test_bad_input_is_one_clear_line(make, says):
    with pytest.raises((ValueError, FileNotFoundError), match=says) as error: make()
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name, text, says", [
    ("m.jsonl", "{", ":1 is no JSON"), ("m.jsonl", "[]", ":1 has no prompt"), ("m.jsonl", '{"prompt": "a", "images": []}', "without pictures"),
    ("m.jsonl", '{"prompt": "a", "images": [3]}', "need a list of paths"), ("m.jsonl", "", "no objects"), ("m.json", "", "need a manifest"),
    ("m.jsonl", '{"prompt": "a", "images": ["x"], "seed": "b"}', "need a whole number"),
    ("m.jsonl", '{"prompt": "a", "images": ["x"], "seed": 0}\n{"prompt": "b", "images": ["x"]}', "some objects have a seed"),
    ("m.jsonl", '{"prompt": "a", "images": ["x"]}\n{"prompt": "b", "images": ["x", "y"]}', ":2 has 2 images and the first object 1"),
    ("m.csv", "prompt\na\n", "without pictures"), ("m.csv", "text,images\na,b.png\n", "has no prompt"),
    ("m.csv", "prompt,images\na,b.png;\n", "need a list of paths")])
def test_bad_manifests(tmp_path, name, text, says):
    (tmp_path/name).write_text(text)
    with pytest.raises(ValueError, match=says) as error: load_drawings(tmp_path/name)
    assert "\n" not in str(error.value)
    with pytest.raises(FileNotFoundError, match="no file"): load_drawings(tmp_path/"nowhere.csv")


def test_only_like_is_put_beside_like():
    few = judge(JUDGES, drawings_of(paint(("red",), ("blue",)), ["red", "blue"]))
    more = judge(Judges(ENCODER, distractors=["green"]), drawings_of(paint(("red",), ("blue",)), ["red", "blue"]))
    with pytest.raises(ValueError, match="2 different set-ups"): judgement_table({"a": few, "b": more})
    with pytest.raises(ValueError, match="no split 'all'"): judgement_table({"a": few}, split="all")
    with pytest.raises(ValueError, match="unknown measure 'fid'"): judgement_table({"a": few}, ["fid"])
    table = judgement_table({"a": few, "b": few}, list(MEASURES))
    assert "N = 2, chance R@1 = 0.5000" in table and len(table.splitlines()) == 4
