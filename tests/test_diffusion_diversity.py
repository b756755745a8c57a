"""Diversity: against brute force, laws that hold for any features, and what bad features get."""
import math

import numpy as np
import pytest
import torch

from zerolab.diffusion.diversity import expected_coverage, measure_spread, prompt_diversity, vendi_score


def draws(seed, *shape): return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("n, d", [(1, 3), (7, 3), (5, 40), (30, 30)])
def test_vendi_score_is_the_entropy_of_the_kernel(n, d):
    x = draws(n, n, d).numpy()
    unit = x/np.linalg.norm(x, axis=1, keepdims=True)
    shares = np.linalg.eigvalsh(unit @ unit.T/n)
    shares = shares[shares > 1e-12]
    assert vendi_score(torch.from_numpy(x)) == pytest.approx(math.exp(-(shares*np.log(shares)).sum()), rel=1e-9)


def test_vendi_score_sees_neither_order_nor_length_nor_copies_of_all():
    x = draws(0, 12, 5)
    for same in (x.flip(0), 3*x, x*torch.arange(1, 13)[:, None], x.repeat(3, 1)): assert vendi_score(same) == pytest.approx(vendi_score(x), rel=1e-9)
    assert 1 <= vendi_score(x) <= 5 and vendi_score(x.half()) == pytest.approx(vendi_score(x), rel=1e-2)


@pytest.mark.parametrize("seed, m, n, k", [(0, 9, 14, 3), (1, 20, 8, 1), (2, 6, 6, 5)])
def test_spread_by_loops(seed, m, n, k):
    y, x = draws(seed, m, 3), draws(seed + 10, n, 3) + 0.3
    def ball(of, i): return sorted(float((of[i] - other).norm()) for other in of)[k]
    inside = [[float((x[i] - y[j]).norm()) <= ball(x, i) for j in range(m)] for i in range(n)]
    found = measure_spread(y, x, k)
    assert found.precision.value == pytest.approx(sum(any(row[j] for row in inside) for j in range(m))/m)
    assert found.coverage.value == pytest.approx(sum(any(row) for row in inside)/n)
    assert found.density.value == pytest.approx(sum(map(sum, inside))/(k*m))
    assert found.recall.value == pytest.approx(sum(any(float((x[i] - y[j]).norm()) <= ball(y, j) for j in range(m)) for i in range(n))/n)
    assert (found.precision.n, found.recall.n, found.density.n, found.coverage.n) == (m, n, m, n)


def test_expected_coverage_by_counting_all_orders():
    from itertools import permutations
    n, m, k = 4, 3, 2                                        # seen from one reference: 3 others and 3 pictures, in any order
    orders = list(permutations("rrryyy"))
    assert expected_coverage(n, m, k) == pytest.approx(sum("y" in order[:k] for order in orders)/len(orders))
    assert expected_coverage(5, 3, 5) == 1                   # the fifth of four other references does not exist


def test_one_outlier_moves_recall_and_not_coverage():
    reference, narrow = draws(3, 60, 2), 0.1*draws(4, 40, 2) - 2
    wild = torch.cat([narrow, torch.full((1, 2), 30., dtype=torch.float64)])
    before, after = measure_spread(narrow, reference), measure_spread(wild, reference)
    assert after.recall.value > 0.9 > 0.5 > before.recall.value and after.coverage.value == before.coverage.value


def test_prompt_diversity_is_a_ratio_of_means_whatever_the_number_of_seeds():
    means, spread = 20*draws(5, 400, 1, 3), draws(6, 400, 20, 3)
    assert prompt_diversity(means + spread[:, :3], means + spread[:, 3:]).value == pytest.approx(1, abs=0.1)
    few = prompt_diversity(means + spread[:, :2]/2, means + spread)
    assert few.low < 0.5 < few.high and few.n == 400
    one = torch.tensor([[[0.], [1.]], [[0.], [3.]]])
    assert prompt_diversity(one, 2*one).value == 0.5 and prompt_diversity(one, torch.tensor([[[0.], [0.]], [[0.], [1.]]])).value == 4


@pytest.mark.parametrize("call, says", [
    (lambda: vendi_score(torch.tensor([1., 2.])), r"need \[n,d\]"),
    (lambda: vendi_score(torch.tensor([[1., 2.], [0., 0.]])), "all zeros"),
    (lambda: measure_spread(torch.full((9, 2), torch.inf), torch.zeros(9, 2)), "picture features hold NaN or infinity"),
    (lambda: measure_spread(torch.zeros(9, 2), torch.zeros(9, 3)), "features of 2 numbers against a reference of 3"),
    (lambda: measure_spread(torch.zeros(9, 2), torch.zeros(4, 2)), "k is 5.*less than the 4 pictures"),
    (lambda: prompt_diversity(torch.zeros(4, 2), torch.zeros(4, 2, 3)), "picture features have shape"),
    (lambda: prompt_diversity(torch.zeros(4, 2, 3), torch.zeros(4, 2, 3)), "all the same"),
    (lambda: prompt_diversity(torch.zeros(4, 2, 3), torch.rand(5, 2, 3)), "4 prompts and a reference of 5")])
def test_bad_features(call, says):
    with pytest.raises(ValueError, match=says): call()
