"""Every formula by brute force, every gradient along random directions, every way to go wrong.

    python -m pytest -q
"""

import importlib.util
import inspect
import itertools
import json
import math
import os
import signal
import subprocess
import sys
import time
import types
from unittest.mock import Mock

import numpy as np
import pytest

import analyze
import fourier_circuits as fc
import train

HERE = os.path.dirname(os.path.abspath(__file__))
SIZES = [(2, 5), (2, 9), (2, 23), (3, 3), (3, 7), (4, 3), (4, 5), (5, 3), (5, 5)]  # odd, p <= k too
EVEN = [(2, 2), (2, 6), (2, 10), (3, 2), (3, 8), (4, 4), (5, 2), (5, 4)]


@pytest.fixture(autouse=True)
def on_the_cpu():
    yield
    fc.use_device("cpu")


def rng(seed=0):
    return np.random.default_rng(seed)


def gaussian(k, p, m, seed=0):
    return fc.init_mlp(k, p, m, 1, rng(seed), "float64")


def plain_mlp(params, a, activation="power"):
    """Eq. 2 as it is printed."""
    u, w = params["u"], params["w"]
    z = sum(u[j][a[:, j]] for j in range(len(u)))
    return (z ** len(u) if activation == "power" else np.maximum(z, 0)) @ w


def check_gradient(f, gradients, inputs, seed=0, h=1e-5, rel=1e-7):
    """<gradient, v> against a central difference of the scalar f along a random direction v."""
    v = [rng(seed + i).standard_normal(x.shape) for i, x in enumerate(inputs)]
    plus, minus = (f(*[x + s * h * d for x, d in zip(inputs, v)]) for s in (1, -1))
    exact = sum((g * d).sum() for g, d in zip(gradients, v))
    assert exact == pytest.approx((plus - minus) / (2 * h), rel=rel, abs=1e-9)
    assert abs(exact) > 1e-3  # a direction that could have shown an error


# ------------------------------------------------------------------------------------------------
# Data


def test_all_inputs_count_up():
    assert fc.all_inputs(2, 3).tolist() == [[i, j] for i in range(3) for j in range(3)]
    a = fc.all_inputs(4, 5)
    assert a.tolist() == [list(x) for x in itertools.product(range(5), repeat=4)]
    assert fc.labels(a, 5).tolist() == [sum(x) % 5 for x in a.tolist()]


@pytest.mark.parametrize("fraction", [0.01, 0.3, 0.5, 1.0])
def test_split_is_seeded_and_of_the_right_size(fraction):
    mask = fc.split(3, 7, fraction, rng(1))
    assert mask.shape == (343,) and mask.dtype == bool and mask.sum() == round(fraction * 343)
    assert (mask == fc.split(3, 7, fraction, rng(1))).all()
    assert fraction == 1 or (mask != fc.split(3, 7, fraction, rng(2))).any()


def test_split_is_even():
    """Each class gets its share, within five standard deviations of a fair draw."""
    mask = fc.split(4, 11, 0.5, rng())
    counts = np.bincount(fc.labels(fc.all_inputs(4, 11), 11)[mask], minlength=11)
    assert abs(counts - 11**3 / 2).max() < 5 * math.sqrt(11**3) / 2


def test_samples_come_from_their_part():
    a = fc.sample_inputs(np.arange(50, 60), 2, 11, rng(), 5)
    assert len(a) == 5 and set(a @ [11, 1]) <= set(range(50, 60))


@pytest.mark.parametrize("k, p, m", [(1, 5, 1), (2, 1, 1), (2, 5, 0), (6, 97, 1), (10**9, 10**9, 1),
                                     (2, 5, 10**12)])
def test_impossible_sizes_are_refused(k, p, m):
    with pytest.raises(fc.BadInput):
        fc.check_size(k, p, m)


# ------------------------------------------------------------------------------------------------
# Gradients


def test_embed_sum_gradient():
    u, a = rng().standard_normal((3, 5, 4)), fc.all_inputs(3, 5)[::7]
    weight = rng(1).standard_normal((len(a), 4))
    z, backward = fc.embed_sum(u, a, fc.Buffers())
    assert z == pytest.approx(sum(u[j][a[:, j]] for j in range(3)), rel=1e-14)
    f = lambda u: (fc.embed_sum(u, a, fc.Buffers())[0] * weight).sum()
    check_gradient(f, [backward(weight)], [u])


def test_embed_grid_gradient():
    u, prefix = rng().standard_normal((3, 5, 4)), fc.all_inputs(2, 5)[::3]
    weight = rng(1).standard_normal((len(prefix) * 5, 4))
    z, backward = fc.embed_grid(u, prefix, fc.Buffers())
    whole = np.array([[*x, c] for x in prefix for c in range(5)])
    assert z == pytest.approx(fc.embed_sum(u, whole, fc.Buffers())[0], rel=1e-13)
    f = lambda u: (fc.embed_grid(u, prefix, fc.Buffers())[0] * weight).sum()
    check_gradient(f, [backward(weight)], [u])


@pytest.mark.parametrize("k", [2, 3, 4, 5, 6, 7])
def test_power_gradient(k):
    x, weight = rng().standard_normal((9, 4)), rng(1).standard_normal((9, 4))
    h, backward = fc.power(x.copy(), k, fc.Buffers())
    assert h == pytest.approx(x**k, rel=1e-13)
    f = lambda x: (fc.power(x.copy(), k, fc.Buffers())[0] * weight).sum()
    check_gradient(f, [backward(weight.copy())], [x])


def test_relu_gradient():
    x, weight = rng().standard_normal((9, 4)), rng(1).standard_normal((9, 4))
    h, backward = fc.relu(x.copy(), fc.Buffers())
    assert (h == np.maximum(x, 0)).all()
    f = lambda x: (fc.relu(x.copy(), fc.Buffers())[0] * weight).sum()
    check_gradient(f, [backward(weight.copy())], [x])


def test_linear_gradient():
    x, w, weight = (rng(i).standard_normal(n) for i, n in enumerate([(7, 4), (4, 5), (7, 5)]))
    y, backward = fc.linear(x, w, fc.Buffers())
    assert y == pytest.approx(x @ w, rel=1e-13)
    f = lambda x, w: (fc.linear(x, w, fc.Buffers())[0] * weight).sum()
    check_gradient(f, backward(weight), [x, w])


def test_cross_entropy_gradient():
    logits, y = 3 * rng().standard_normal((9, 5)), np.arange(9) % 5
    loss, backward = fc.cross_entropy(logits, y)
    soft = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    assert loss == pytest.approx(-np.log(soft[np.arange(9), y]).mean(), rel=1e-14)
    check_gradient(lambda x: fc.cross_entropy(x, y)[0], [backward()], [logits])


def test_cross_entropy_of_large_logits_is_finite_and_float64_stays_float64():
    logits = np.array([[1e4, 0.0], [0.0, 1e4]])
    loss, backward = fc.cross_entropy(logits, np.array([0, 0]))
    assert loss == 5e3 and loss.dtype == backward().dtype == np.float64


@pytest.mark.parametrize("activation", ["power", "relu"])
@pytest.mark.parametrize("k, p", [(2, 5), (3, 4), (4, 3), (5, 3)])
def test_network_gradient(k, p, activation):
    """The whole network with its loss; on all inputs, the one-hot and the grid way agree."""
    params, a = gaussian(k, p, 6), fc.all_inputs(k, p)
    logits, _ = fc.mlp(params, a, activation)
    assert logits == pytest.approx(plain_mlp(params, a, activation), rel=1e-11, abs=1e-11)
    for name in params:
        params[name] *= 0.5
    f = lambda u, w: fc.loss_and_gradients({"u": u, "w": w}, a, activation)[0]
    loss, grads = fc.loss_and_gradients(params, a, activation)
    check_gradient(f, [grads["u"], grads["w"]], [params["u"], params["w"]])
    for limit in (2**18, 200):  # in one block and in many
        fc.BLOCK_BYTES = limit
        loss_on_grid, on_grid = fc.loss_and_gradients(params, fc.all_inputs(k - 1, p) if k > 2
                                                      else np.arange(p)[:, None], activation)
        assert loss_on_grid == pytest.approx(loss, rel=1e-13)
        for name in grads:
            assert on_grid[name] == pytest.approx(grads[name], rel=1e-11, abs=1e-13)


@pytest.mark.parametrize("k, p", [(2, 7), (3, 5), (4, 3), (5, 4)])
def test_interaction(k, p, monkeypatch):
    """Its gradient; over D_p and zero-mean neurons it is the class-weighted margin (Lemma 4.2)."""
    params, a = gaussian(k, p, 6), fc.all_inputs(k, p)
    monkeypatch.setattr(fc, "BLOCK_BYTES", 4 * len(a) * 8)  # several blocks of neurons
    f = lambda u, w: fc.interaction({"u": u, "w": w}, a[::2])[0]
    check_gradient(f, fc.interaction(params, a[::2])[1].values(), params.values())
    params = {name: x - x.mean(axis=1, keepdims=True) for name, x in params.items()}
    margin = fc.margins(plain_mlp(params, a), fc.labels(a, p))[1].mean()
    assert -fc.interaction(params, a)[0] * p / (p - 1) == pytest.approx(margin, rel=1e-9)


def test_blocks_of_a_large_batch_add_up(monkeypatch):
    params, a = gaussian(3, 5, 6), fc.all_inputs(3, 5)[:101]
    loss, grads = fc.loss_and_gradients(params, a)
    monkeypatch.setattr(fc, "WHOLE_BYTES", 1000)
    parts, in_parts = fc.loss_and_gradients(params, a)
    assert parts == pytest.approx(loss, rel=1e-13)
    for name in grads:
        assert in_parts[name] == pytest.approx(grads[name], rel=1e-11, abs=1e-13)


def test_accuracy_in_blocks_and_ties(monkeypatch):
    params, a = gaussian(3, 5, 6), fc.all_inputs(3, 5)[:101]
    whole = fc.accuracy(params, a)
    monkeypatch.setattr(fc, "WHOLE_BYTES", 1000)
    assert fc.accuracy(params, a) == pytest.approx(whole, rel=1e-13)
    zero = {name: 0 * x for name, x in params.items()}  # all classes equal: all wrong
    assert fc.accuracy(zero, a)[1] == 0
    assert not fc.evaluate(fc.logit_blocks(zero, 3, 5), np.ones(125, bool), 3, 5)["right"].any()


@pytest.mark.parametrize("degree, power", [(4, 4), (4, 1), (2, 1), (2, 2), (3, 2)])
def test_penalty_gradient(degree, power):
    """Def. 3.1 (power 1) and its power-nu form; Def. B.2's norm written out."""
    params = gaussian(3, 5, 6)
    size = [math.sqrt((params["u"][:, :, i] ** 2).sum() + (params["w"][i] ** 2).sum())
            for i in range(6)]
    assert fc.neuron_norms(params) == pytest.approx(size, rel=1e-14)
    norm = sum(s**degree for s in size) ** (1 / degree)
    assert fc.norm(params, degree) == pytest.approx(norm, rel=1e-14)
    assert fc.penalty(params, 0.3, degree, power)[0] == pytest.approx(0.3 * norm**power, rel=1e-14)
    grads = {name: np.ones_like(x) for name, x in params.items()}
    fc.penalty(params, 0.3, degree, power)[1](grads)
    f = lambda u, w: fc.penalty({"u": u, "w": w}, 0.3, degree, power)[0]
    check_gradient(f, [grads["u"] - 1, grads["w"] - 1], [params["u"], params["w"]])


# ------------------------------------------------------------------------------------------------
# AdamW


def test_adamw_by_hand():
    """Two steps of one number, each line worked out from Algorithm 2 of Loshchilov and Hutter.

    theta 1, lr 0.1, decay 0.5, betas (0.9, 0.98), eps 0.01; gradients 2, then -1.
    Step 1: m = 0.2, v = 0.08; mhat = 0.2/0.1 = 2, vhat = 0.08/0.02 = 4; 2/(2 + 0.01) = 0.9950249;
            theta = 1 (1 - 0.05) - 0.09950249 = 0.85049751.
    Step 2: m = 0.18 - 0.1 = 0.08, v = 0.0784 + 0.02 = 0.0984; mhat = 0.08/0.19 = 0.42105263,
            vhat = 0.0984/0.0396 = 2.48484848, root 1.57634030; 0.42105263/1.58634030 = 0.26542391;
            theta = 0.85049751 * 0.95 - 0.026542391 = 0.78143025.
    """
    x, m, v = ({"u": np.full((1, 1), value), "b": np.full(1, value)} for value in (1.0, 0.0, 0.0))
    for step, (g, expected, bias) in enumerate([(2.0, 0.85049751, 0.90049751),
                                                (-1.0, 0.78143025, 0.87395512)], 1):
        fc.adamw(x, {"u": np.full((1, 1), g), "b": np.full(1, g)}, m, v, step, 0.1, 0.5,
                 (0.9, 0.98), 0.01)
        assert x["u"][0, 0] == pytest.approx(expected, abs=1e-8)
        assert x["b"][0] == pytest.approx(bias, abs=1e-8)  # of one axis: no decay
    x, m, v = ({"u": np.zeros((1, 1))} for _ in range(3))
    fc.adamw(x, {"u": np.full((1, 1), 1e-12)}, m, v, 1, 0.1, 0)
    assert x["u"][0, 0] == pytest.approx(-0.1)  # the default eps is far below such a gradient


def test_adamw_in_blocks_is_adamw(monkeypatch):
    results = []
    for limit in (2**18, 64):
        monkeypatch.setattr(fc, "BLOCK_BYTES", limit)
        params = gaussian(2, 5, 7)
        first, second = ({name: np.zeros_like(x) for name, x in params.items()} for _ in range(2))
        for step in range(1, 4):
            fc.adamw(params, gaussian(2, 5, 7, step), first, second, step, 0.1, 0.2)
        results.append(params)
    assert all((results[0][name] == results[1][name]).all() for name in params)


# ------------------------------------------------------------------------------------------------
# Theory


def test_gamma_star_of_the_paper():
    for p in (3, 23, 97):
        assert fc.max_margin(2, p) == pytest.approx(math.sqrt(2 / 27) / (math.sqrt(p) * (p - 1)))
        assert fc.max_margin(3, p) == pytest.approx(3 / 16 / (p * (p - 1)))


@pytest.mark.parametrize("k", [2, 3, 4, 5, 6])
def test_lemma_e1(k):
    """2^k k! prod d_j = sum over signs of (prod s_j) (sum s_j d_j)^k."""
    d = rng().standard_normal(k)
    s = np.array(list(itertools.product((1, -1), repeat=k)))
    whole = (s.prod(axis=1) * (s @ d) ** k).sum()
    assert whole == pytest.approx(2**k * math.factorial(k) * d.prod(), rel=1e-11)
    half = fc.signs(k)
    assert half.shape == (2 ** (k - 1), k)
    assert 2 * (half.prod(axis=1) * (half @ d) ** k).sum() == pytest.approx(whole, rel=1e-11)


@pytest.mark.parametrize("k, p", SIZES)
def test_paper_network_is_max_margin(k, p):
    """Theorem 4.1, Lemmas 4.3 and F.2, Condition 3.8 and the dual, each to rounding."""
    params = fc.paper_network(k, p)
    assert params["u"].shape == (k, p, 2 ** (2*k - 2) * (p - 1))
    assert max(error for _, _, _, error in fc.theory_check(params)) < 1e-12


@pytest.mark.parametrize("k, p", SIZES + EVEN)
def test_rotated_network_is_max_margin(k, p):
    params = fc.rotated_network(k, p)
    pairs, nyquist = (p - 1) // 2, 1 - p % 2
    width = (k + 1) * 2 ** (k - 1) * pairs + 2 ** (k - 1) * nyquist
    assert params["u"].shape == (k, p, width)
    assert p % 2 == 0 or width == (k + 1) * 2**k * (p - 1) // 4
    checks = fc.theory_check(params)
    assert any("dual" in what for what, *_ in checks) and any("Lemma F.2" in w for w, *_ in checks)
    assert max(error for _, _, _, error in checks) < 1e-12


def test_max_margin_function_written_out():
    """f(a)[c] = gamma* (1{c = sum a} - 1/p), from Eq. 2 as printed."""
    for k, p, build in ((3, 5, fc.paper_network), (3, 5, fc.rotated_network),
                        (2, 6, fc.rotated_network)):
        a = fc.all_inputs(k, p)
        f = fc.max_margin(k, p) * (np.eye(p)[fc.labels(a, p)] - 1 / p)
        assert abs(plain_mlp(build(k, p), a) - f).max() < 1e-13 * fc.max_margin(k, p)


def test_theory_check_sees_a_wrong_network():
    """One vector a step off, or its phase off by 1e-6: the checks are no formality."""
    params = fc.rotated_network(3, 7)
    params["u"][0, :, 0] = np.roll(params["u"][0, :, 0], 1)
    errors = {what: error for what, _, _, error in fc.theory_check(params)}
    assert min(errors[what] for what in errors if "inputs" in what or "Lemma" in what
               or "dual" in what or "wrong" in what) > 1e-3
    params = fc.rotated_network(3, 7)
    x = np.fft.rfft(params["u"][0, :, 0])
    params["u"][0, :, 0] = np.fft.irfft(x * np.exp(1e-6j), 7)
    errors = {what: error for what, _, _, error in fc.theory_check(params)}
    assert min(errors[what] for what in errors if "inputs" in what or "elsewhere" in what
               or "dual" in what or "wrong" in what or "1{c" in what) > 1e-8


@pytest.mark.parametrize("k, p", [(2, 7), (3, 7), (3, 8), (4, 5)])
def test_no_gaussian_network_beats_gamma_star(k, p):
    """h <= both upper bounds from the weights; for odd p, E g' <= gamma* ||theta||^(k+1)."""
    for seed in range(5):
        params = gaussian(k, p, 5, seed)
        h = fc.evaluate(fc.logit_blocks(params, k, p), np.ones(p**k, bool), k, p)["margin"]
        mean, bound = fc.class_margin_from_weights(params), fc.margin_bound(params)
        assert h <= bound <= mean + 1e-12
        size = fc.norm(params) ** (k + 1)
        assert fc.normalized_margin(params) == pytest.approx(h / size)
        if p % 2:
            assert mean <= fc.max_margin(k, p) * size and abs(fc.efficiency(params)).max() <= 1


def test_frequency_subsets():
    """Frequencies Z only: (p-1)/(p|Z|) min over Delta of sum_Z (1 - cos 2 pi zeta Delta/p)."""
    k, p = 3, 11
    params = fc.rotated_network(k, p)
    frequency = fc.neuron_spectra(params)["frequency"]
    for chosen in ([1], [2, 5], [1, 3, 4], [1, 2, 3, 4, 5]):
        keep = np.isin(frequency, chosen)
        part = {"u": params["u"][:, :, keep], "w": params["w"][keep]}
        delta = np.arange(1, p)
        expected = (p - 1) / (p * len(chosen)) * min(
            sum(1 - math.cos(2 * math.pi * z * d / p) for z in chosen) for d in delta)
        got = fc.normalized_margin(part) / fc.max_margin(k, p)
        assert got == pytest.approx(expected, rel=1e-11) and got > 0  # one frequency is enough


# ------------------------------------------------------------------------------------------------
# Margins and weights-only formulas


@pytest.mark.parametrize("k, p", [(2, 7), (2, 6), (3, 5), (4, 4), (5, 3)])
def test_formulas_from_the_weights(k, p):
    """S_j, E g', the mean margins and the network's DFT, against all p^k inputs."""
    params, a = gaussian(k, p, 5), fc.all_inputs(k, p)
    f, y = plain_mlp(params, a), fc.labels(a, p)
    margin, weighted = fc.margins(f, y)
    rows = np.arange(len(a))
    wrong = np.array([np.delete(f[i], y[i]) for i in rows])
    assert margin == pytest.approx(f[rows, y] - wrong.max(axis=1), rel=1e-12)
    assert weighted == pytest.approx(f[rows, y] - wrong.mean(axis=1), rel=1e-9, abs=1e-9)
    train_mask = fc.split(k, p, 0.5, rng())
    whole = fc.evaluate(fc.logit_blocks(params, k, p), train_mask, k, p)
    right = f.argmax(axis=1) == y
    assert whole["train_accuracy"] == right[train_mask].mean()
    assert whole["test_accuracy"] == right[~train_mask].mean()
    assert whole["margin"] == pytest.approx(margin.min(), rel=1e-12)
    scale = abs(f).max()
    assert whole["class_margin"] == pytest.approx(weighted.mean(), rel=1e-10, abs=1e-12 * scale)
    assert fc.class_margin_from_weights(params) == pytest.approx(weighted.mean(), rel=1e-9,
                                                                 abs=1e-12 * scale)
    means = [(f[rows, y] - f[rows, (y + d) % p]).mean() for d in range(1, p)]
    assert fc.margin_bound(params) == pytest.approx(min(means), rel=1e-9, abs=1e-12 * scale)
    dft = np.fft.fftn(f.reshape((p,) * (k + 1)))
    assert abs(fc.network_dft(params) - dft).max() < 1e-12 * abs(dft).max()
    diagonal = [dft[(j,) * k + (-j % p,)] for j in range(1, p)]
    assert abs(fc.diagonal_dft(params)[1:] - diagonal).max() < 1e-11 * abs(dft).max()


@pytest.mark.parametrize("k, p", [(2, 7), (3, 11), (4, 9), (5, 5)])
def test_efficiency_of_one_cosine_neuron(k, p):
    """(k+1)^((k+1)/2) prod A / (sum A^2)^((k+1)/2) cos(sum theta_j - theta_w)."""
    amplitude, phase = rng().uniform(0.5, 2, k + 1), rng(1).uniform(0, 6, k + 1)
    x = amplitude[:, None] * np.cos(phase[:, None] + 2 * np.pi * 2 * np.arange(p) / p)
    params = {"u": x[:k, :, None], "w": x[k][None]}
    expected = ((k + 1) ** ((k + 1) / 2) * amplitude.prod() / (amplitude**2).sum() ** ((k + 1) / 2)
                * math.cos(phase[:k].sum() - phase[k]))
    assert fc.efficiency(params)[0] == pytest.approx(expected, rel=1e-11)
    assert fc.efficiency(fc.rotated_network(k, p)) == pytest.approx(1, rel=1e-12)


def test_natural_scale():
    """The ideal network with entries of that size has margin 10 on every input."""
    for k, p in ((2, 7), (3, 5), (4, 5)):
        params = fc.paper_network(k, p)
        m = params["w"].shape[0]
        size = math.sqrt(sum((x**2).sum() for x in params.values()) / ((k + 1) * p * m))
        scale = fc.natural_scale(k, p, m) / size
        params = {name: scale * x for name, x in params.items()}
        whole = fc.evaluate(fc.logit_blocks(params, k, p), np.ones(p**k, bool), k, p)
        assert whole["margin"] == pytest.approx(10, rel=1e-11) == whole["largest_margin"]


def test_schedule():
    """Half alone, a fifth equal, the rest free; the margin grows 0.3 -> 10; lr warms up, ends."""
    c = fc.complete({"steps": 100})
    stage, lr, rms = zip(*(fc.schedule(c, step) for step in range(100)))
    assert [stage.count(x) for x in ("alone", "equal", "free")] == [50, 20, 30]
    scale = [fc.natural_scale(3, 23, 352, margin) for margin in (0.3, 10)]
    assert rms[:50] == (rms[0],) * 50 and rms[0] == pytest.approx(scale[0], rel=1e-12)
    assert list(rms[50:70]) == sorted(rms[50:70]) and rms[69] < scale[1]
    assert rms[60] == pytest.approx(fc.natural_scale(3, 23, 352, math.sqrt(3)), rel=1e-12)
    assert rms[70:] == (None,) * 30
    assert lr[0] == pytest.approx(lr[9] / 10) and lr[10:50] == (lr[9],) * 40
    assert lr[69] / lr[9] == pytest.approx(rms[69] / rms[9])
    assert lr[70] == pytest.approx(c["lr"]) and lr[99] == pytest.approx(c["lr"] / 30)


@pytest.mark.parametrize("k, p", [(2, 7), (3, 31), (4, 11), (5, 5), (6, 3)])
def test_settings_of_attention(k, p):
    """lr held for half of the steps, then down to 0; late decay by the share of collisions."""
    c = fc.complete({"model": "transformer", "k": k, "p": p})
    assert (c["steps"], c["batch"]) == (3000 * k, 256 * (k - 1))
    assert c["init_std"] == pytest.approx(0.3 ** (max(0, 5 - k) / 2), rel=1e-12)
    late = 1 - 1.5 * math.sqrt(fc.collisions(k, p).mean())
    assert c["late_decay"] == pytest.approx(max(0, late), rel=1e-12)
    stage, lr, rms = zip(*(fc.schedule(c, step) for step in range(c["steps"])))
    half = c["steps"] // 2
    assert set(stage) == {"free"} and set(rms) == {None}
    assert lr[9:half + 1] == (c["lr"],) * (half - 8)
    assert lr[0] == pytest.approx(c["lr"] / 10) and lr[-1] == pytest.approx(c["lr"] / half)


def test_decay_goes_by_the_loss_and_is_less_late(monkeypatch):
    """At half of log p half of the decay; from the share hold on, late_decay of that."""
    decays = []
    run = small_run(**ATTENTION, hold=0.5, late_decay=0.25, weight_decay=4)
    half = np.float64(math.log(7) / 2)
    monkeypatch.setattr(fc, "loss_and_gradients", lambda *args: (half, {}))
    monkeypatch.setattr(fc, "adamw", lambda *args: decays.append(args[6]))
    advance(run, 9)
    run.step = 19
    fc.train_step(run)
    fc.train_step(run)
    assert decays == pytest.approx([2] * 10 + [0.5], rel=1e-12)
    monkeypatch.setattr(fc, "loss_and_gradients", lambda *args: (np.float64(9), {}))
    fc.train_step(run)
    assert decays[-1] == 0  # worse than chance: no decay, and no growth


def test_a_step_is_the_gradient_with_the_penalty(monkeypatch):
    run, seen = small_run(max_margin=True, penalty_power=1, penalty=0.7, dtype="float64",
                          batch=121), []
    expected = fc.loss_and_gradients(run.params, run.inputs)[1]
    fc.penalty(run.params, 0.7, 3, 1)[1](expected)
    expected = {name: x.copy() for name, x in expected.items()}
    monkeypatch.setattr(fc, "adamw", lambda *args: seen.append(args))
    fc.train_step(run)
    _, grads, *_, betas = seen[0]
    assert betas == (0.9, 0.95)
    for name in grads:
        assert grads[name] == pytest.approx(expected[name], rel=1e-10)


def test_batches_and_seeds(monkeypatch):
    """Each training input comes; another seed is another split, other weights, other batches."""
    run, other, drawn = small_run(), small_run(seed=1), []
    assert (run.train != other.train).any() and (run.params["w"] != other.params["w"]).all()
    assert run.rng.random() != other.rng.random()
    monkeypatch.setattr(fc, "interaction",
                        lambda params, a, buf: (drawn.append(a), params))
    advance(run, 19)
    assert len(np.unique(np.concatenate(drawn), axis=0)) == len(run.inputs) == 60


def test_standardize():
    params = gaussian(3, 7, 5)
    fc.standardize(params, 0.2)
    x = fc.neurons(params)
    assert abs(x.mean(axis=1)).max() < 1e-15
    assert np.sqrt((x * x).mean(axis=1)) == pytest.approx(0.2, rel=1e-13)


# ------------------------------------------------------------------------------------------------
# Fourier analysis


@pytest.mark.parametrize("p", [2, 3, 8, 9, 23])
def test_power_spectrum_folds(p):
    x = rng().standard_normal((4, p))
    full = abs(np.fft.fft(x)) ** 2
    folded = fc.power_spectrum(x)
    assert folded.shape == (4, p // 2 + 1)
    for j in range(p // 2 + 1):
        expected = full[:, j] + (full[:, -j] if 0 < 2 * j < p or 2 * j > p else 0)
        assert folded[:, j] == pytest.approx(expected, rel=1e-12)
    for zeta in range(1, p // 2 + 1):  # the last one too
        assert fc.max_normalized_power(np.cos(2 * np.pi * zeta * np.arange(p) / p)) \
            == pytest.approx(1)


@pytest.mark.parametrize("p", [2, 3, 4, 8, 23, 47])
def test_expected_max_power(p):
    x = rng().standard_normal((40000, p))
    power = fc.max_normalized_power(x)
    error = power.std() / 200
    assert fc.expected_max_power(p) == pytest.approx(power.mean(), abs=5 * error)
    if p in (23, 47):
        assert round(fc.expected_max_power(p), 3) == {23: 0.263, 47: 0.159}[p]


@pytest.mark.parametrize("k, p", [(2, 7), (3, 9), (4, 8)])
def test_neuron_spectra(k, p):
    phase = rng().uniform(-3, 3, (k + 1, 20))
    zeta = 1 + np.arange(20) % ((p - 1) // 2)
    x = np.cos(phase[:, None] + 2 * np.pi * zeta * np.arange(p)[:, None] / p) + 0.1
    x[..., -1] *= 0.01  # not live
    s = fc.neuron_spectra({"u": x[:k], "w": x[k].T})
    assert (s["frequency"] == zeta).all()
    assert s["concentration"] == pytest.approx(0.5 / 0.51, rel=1e-12)
    assert s["max_power"] == pytest.approx(0.5 / 0.51, rel=1e-12)
    assert np.exp(1j * s["phases"]) == pytest.approx(np.exp(1j * phase), rel=1e-12)
    error = np.exp(1j * (phase[:k].sum(axis=0) - phase[k]))
    assert np.cos(s["phase_error"]) == pytest.approx(error.real, abs=1e-12)
    assert s["phase_error"].min() >= 0
    assert s["live"].sum() == 19 and not s["live"][-1]


def test_measures_are_of_live_neurons():
    params = gaussian(3, 7, 40)
    params["u"][:, :, :9] *= 1e-3
    params["w"][:9] *= 1e-3
    r, s = fc.neuron_measures(params)
    assert r["max_normalized_power"] == pytest.approx(s["max_power"][:, 9:].mean(), rel=1e-12)
    assert r["single_frequency_fraction"] == 0 < (s["concentration"][9:] > 0.5).mean()


def test_ablate():
    """Restricted and excluded add up; a max-margin network is all restricted, nothing excluded."""
    params = gaussian(3, 8, 5)
    kept, rest = fc.ablate(params)
    for name in params:
        assert kept[name] + rest[name] == pytest.approx(params[name], abs=1e-14)
    assert fc.neuron_spectra(kept)["concentration"] == pytest.approx(1, rel=1e-12)
    s, left = fc.neuron_spectra(params), fc.power_spectrum(fc.neurons(rest), axis=1)
    assert left[:, s["frequency"], np.arange(5)].max() < 1e-25
    for p in (7, 8):
        params = fc.rotated_network(2, p)
        kept, rest = fc.ablate(params)
        assert max(abs(kept[name] - params[name]).max() for name in params) < 1e-15
        assert max(abs(x).max() for x in rest.values()) < 1e-15


# ------------------------------------------------------------------------------------------------
# Attention


def small_attention(k, p, seed=0):
    """A small network and 40 inputs, some of them collisions."""
    return (fc.init_attention(p, 3, 2, 4, 2, rng(seed), "float64"),
            rng(seed + 1).integers(0, p, (40, k)))


def plain_attention(params, a):
    """One layer of attention as one writes it: embed, project, score, softmax, mix, project."""
    x = params["E"][a]  # [n, k, d]
    q, k, v = (np.einsum("njd,dhe->nhje", x, params[name]) for name in ("W_Q", "W_K", "W_V"))
    score = np.einsum("nhe,nhje->nhj", q[:, :, -1], k) / math.sqrt(q.shape[-1])
    score[:, :, -1] += params["b"]
    weight = np.exp(score) / np.exp(score).sum(axis=2, keepdims=True)
    return np.einsum("nhj,nhje,hec->nc", weight, v, params["W_P"])


def tables(params):
    return fc.circuits(params["E"], [params[name] for name in fc.HEADS])


@pytest.mark.parametrize("k, p", [(2, 5), (3, 5), (4, 3), (5, 2)])
def test_attention_is_plain_attention(k, p):
    """On a batch, on the grid in blocks, and from the tables S and OV alone."""
    params, a = small_attention(k, p)
    expected = plain_attention(params, a)
    assert fc.attention(params, a)[0] == pytest.approx(expected, rel=1e-11, abs=1e-13)
    s, ov, _ = tables(params)
    bare, _ = fc.network({"S": s, "OV": ov, "b": params["b"]}, a)
    assert bare == pytest.approx(expected, rel=1e-11, abs=1e-13)
    grid = np.concatenate([x for _, x in fc.logit_blocks(params, k, p)])
    assert grid == pytest.approx(plain_attention(params, fc.all_inputs(k, p)), rel=1e-11, abs=1e-13)


def test_circuits_gradient():
    params, _ = small_attention(3, 5)
    x, *weights = list(params.values())[:5]
    s, ov, backward = fc.circuits(x, weights)
    ds, dov = rng(5).standard_normal((2, *s.shape))
    f = lambda x, *w: sum((t * d).sum() for t, d in zip(fc.circuits(x, w), (ds, dov)))
    dx, dweights = backward(ds, dov)
    check_gradient(f, [dx, *dweights], [x, *weights])


@pytest.mark.parametrize("k, p", [(2, 5), (3, 5), (4, 3)])
def test_attend_gradient(k, p):
    params, a = small_attention(k, p)
    s, ov, _ = tables(params)
    y, backward = fc.attend(s, ov, params["b"], a, a[:, -1], fc.Buffers())
    dy = rng(6).standard_normal(y.shape)
    f = lambda *x: (fc.attend(*x, a, a[:, -1], fc.Buffers())[0] * dy).sum()
    check_gradient(f, backward(dy), [s, ov, params["b"]])


@pytest.mark.parametrize("grid", [False, True])
@pytest.mark.parametrize("k, p", [(2, 5), (3, 5), (4, 3), (5, 2)])
def test_attention_gradient(k, p, grid, monkeypatch):
    """The whole network with its loss, on a batch and on all of D_p; in one block and in many."""
    params, a = small_attention(k, p)
    a = fc.all_inputs(k, p) if grid else a
    f = lambda *x: fc.cross_entropy(plain_attention(dict(zip(params, x)), a), fc.labels(a, p))[0]
    for rows in (1024, 7):
        monkeypatch.setattr(fc, "pieces", lambda params, n, width: fc.blocks(n, 1, rows))
        loss, grads = fc.loss_and_gradients(params, a)
        assert loss == pytest.approx(f(*params.values()), rel=1e-12)
        check_gradient(f, [grads[name] for name in params], list(params.values()))


@pytest.mark.parametrize("sign", [1, -1])
def test_large_scores_are_finite(sign):
    params, a = small_attention(3, 5)
    s = sign * 1e4 * np.arange(5.0) + np.zeros((3, 5, 1))
    y, backward = fc.attend(s, tables(params)[1], params["b"], a, a[:, -1], fc.Buffers())
    assert np.isfinite(y).all() and all(np.isfinite(x).all() for x in backward(np.ones_like(y)))


@pytest.mark.parametrize("k", [3, 4])
def test_attention_is_symmetric_in_the_keys(k):
    params, a = small_attention(k, 7)
    expected, _ = fc.attention(params, a)
    for order in itertools.permutations(range(k - 1)):
        permuted = fc.attention(params, a[:, [*order, k - 1]])[0]
        assert permuted == pytest.approx(expected, rel=1e-11, abs=1e-13)
    swapped = a[:, [*range(k - 2), k - 1, k - 2]]  # the query is not one of them
    assert abs(fc.attention(params, swapped)[0] - expected).max() > 0.1


@pytest.mark.parametrize("k, p", [(2, 7), (3, 7), (4, 5), (5, 4)])
def test_split_by_orbit_leaks_nothing(k, p):
    mask = fc.split(k, p, 0.5, rng(), symmetric=True)
    grid = mask.reshape((p,) * k)
    for order in itertools.permutations(range(k - 1)):
        assert (grid.transpose(*order, k - 1) == grid).all()
    orbit, count = fc.orbits(k, p), math.comb(p + k - 2, k - 1) * p
    assert len(set(orbit)) == count and (orbit <= np.arange(p**k)).all()
    assert len(set(orbit[mask])) == round(0.5 * count)
    run = small_run(model="transformer", k=k, p=p, steps=1, heads=2)
    canonical = fc.to_host(run.inputs)  # each orbit once, all of the training half
    assert len(canonical) == len(set(fc.orbits(k, p)[run.train]))
    assert (np.diff(canonical[:, :-1], axis=1) >= 0).all()


@pytest.mark.parametrize("k, p", [(2, 5), (3, 5), (4, 4)])
def test_collisions(k, p):
    expected = [len(set(a[:-1])) < k - 1 for a in itertools.product(range(p), repeat=k)]
    assert fc.collisions(k, p).tolist() == expected


@pytest.mark.parametrize("k, p", [(3, 5), (3, 8), (4, 3)])
def test_without_the_denominator_no_sum_can_be_learned(k, p):
    """Attention without it adds up terms of one key: the mean class margin on the grid is 0."""
    params, _ = small_attention(k, p)
    s, ov, _ = tables(params)
    a = fc.all_inputs(k, p)
    each, y = np.arange(len(a)), fc.labels(a, p)
    weight = np.exp(s[:, a[:, -1:], a])  # [H, n, k]
    logits = np.einsum("hnj,hnjc->nc", weight, ov[:, a])
    margin = logits[each, y] - logits.mean(axis=1)
    assert abs(margin.mean()) < 1e-12 * abs(logits).max()
    logits, _ = fc.attention(params, a)  # with it, it is not
    assert abs((logits[each, y] - logits.mean(axis=1)).mean()) > 1e-4


@pytest.mark.parametrize("b", [0.0, -2.0, 3.0])
def test_the_sum_changes_sign_at_a_collision(b):
    """k = 3, small scores: with pi = 1 / (2 + e^b) the attention to each key, softmax gives

        A_j = pi (1 + s_j - pi (s_1 + s_2) - ..),  so  A_1 OV[a_1] + A_2 OV[a_2] has
        cross terms -pi^2 (s_1 OV[a_2] + s_2 OV[a_1]) and own terms pi (1 - pi) s_j OV[a_j].

    The cross terms of a pair of heads hold cos(q + a_1 + a_2 - c), the sum. At a_1 = a_2 the own
    terms hold it too, with the other sign and more of it: -2 pi^2 becomes 2 pi (1 - 2 pi).
    """
    p, zeta, size = 11, 3, 1e-4
    x = 2 * np.pi * zeta * np.arange(p) / p
    plus, minus = x[:, None] + x, x[:, None] - x
    s = size * np.array([np.cos(plus), -np.sin(plus)])  # [q, a]
    ov = np.array([np.cos(minus), np.sin(minus)])  # [a, c]
    a = fc.all_inputs(3, p)
    logits, _ = fc.attend(s, ov, np.full(2, b), a, a[:, -1], fc.Buffers())
    right = np.cos(x[fc.labels(a, p)][:, None] - x)
    sum_term = 2 / p * (logits * right).sum(axis=1) / size  # of cos(y - c), for each input
    apart = (a[:, 1] - a[:, 0]) % p
    measured = np.array([sum_term[apart == delta].mean() for delta in range(p)])
    pi = 1 / (2 + math.exp(b))
    expected = -2 * pi**2 + 2 * pi * (1 - pi) * np.cos(x)
    assert measured == pytest.approx(expected, abs=1e-3)
    assert measured.mean() < 0 < measured[0]


@pytest.mark.parametrize("p", [7, 8])
def test_head_spectrum_is_the_dft_folded(p):
    s = rng().standard_normal((2, p, p)) + rng(1).standard_normal((2, p, 1))  # row means: unseen
    centered, power, partner = fc.head_spectrum(s)
    assert abs(centered.sum(axis=2)).max() < 1e-12
    assert power.sum(axis=1) == pytest.approx(p**2 * (centered**2).sum(axis=(1, 2)), rel=1e-12)
    for u, v in [(0, 1), (1, 1), (2, p - 1), (p - 1, p // 2)]:
        both = (u * p + v, -u % p * p + -v % p)
        assert partner[both[0]] == both[1]
        x = 2 * np.pi / p * (u * np.arange(p)[:, None] + v * np.arange(p))
        c = (centered * np.exp(-1j * x)).sum(axis=(1, 2))
        expected = abs(c) ** 2 * (1 if both[0] == both[1] else 2)
        assert power[:, min(both)] == pytest.approx(expected, rel=1e-10, abs=1e-10)


def test_head_spectra_find_planted_cosines():
    """cos(3q) cos(2a) is two pairs, 2 cos(q - 4a) is one; the third head is dead."""
    p = 11
    params = fc.init_attention(p, 3, 2, 9, 1, rng(), "float64")
    x = 2 * np.pi * np.arange(p) / p
    waves = [f(zeta * x) for zeta in (1, 2, 3, 4) for f in (np.cos, np.sin)]
    params["E"] = np.stack([*waves, np.ones(p)], axis=1)  # columns: cos x, sin x, cos 2x, ..
    params["W_Q"], params["W_K"] = np.zeros((2, 9, 3, 2))
    params["W_Q"][4, 0, 0] = params["W_K"][2, 0, 0] = 1
    params["W_Q"][0, 1, 0] = params["W_Q"][1, 1, 1] = 2
    params["W_K"][6, 1, 0] = params["W_K"][7, 1, 1] = 1
    params["W_K"][8, 1, 0] = 5  # the same for all keys: invisible
    s = fc.head_spectra(params)
    assert s["shares"][:2] == pytest.approx(np.array([[0.5, 1, 1], [1, 1, 1]]), rel=1e-12)
    assert sorted(s["top"][0, :2].tolist()) == [[-3, 2], [3, 2]]
    assert s["top"][1, 0].tolist() == [-1, 4]
    assert s["live"].tolist() == [True, True, False] and s["rank"][:2].tolist() == [1, 2]
    _, picture = analyze.head_pictures(types.SimpleNamespace(params=params))
    strong = np.argwhere(picture[0] > picture[0].max() / 2)  # query frequency 0 in the middle
    assert strong.tolist() == [[5 - 3, 2], [5 + 3, 2]]
    kept, rest = fc.ablate_heads(params)
    whole = tables(params)[0]
    assert abs(kept["S"] - (whole - whole.mean(axis=2, keepdims=True))).max() < 1e-12
    assert abs(rest["S"]).max() < 1e-12


def test_size_and_rank_of_heads():
    params, _ = small_attention(3, 7)
    s, ov, _ = tables(params)
    s, ov = s - s.mean(axis=2, keepdims=True), ov - ov.mean(axis=2, keepdims=True)
    ov -= ov.mean(axis=1, keepdims=True)
    size = np.sqrt((s**2).mean(axis=(1, 2)) * (ov**2).mean(axis=(1, 2)))
    assert fc.head_spectra(params)["size"] == pytest.approx(size / size.max(), rel=1e-12)
    params["W_Q"][:, :, 1] *= 1e-4  # a second dimension far below a hundredth of the first
    assert fc.head_spectra(params)["rank"].tolist() == [1, 1, 1]


def test_strongest_heads():
    """By size, the live ones; then the first of each key frequency."""
    s = {"size": np.array([0.2, 1, 0.01, 0.5]), "live": np.array([True, True, False, True]),
         "top": np.array([[[0, 3]], [[0, 3]], [[0, 1]], [[0, 2]]])}
    assert [x.tolist() for x in analyze.strongest_heads(s, 2)] == [[1, 3, 0], [1, 3]]


def test_ablate_heads():
    """Kept and rest add up to what softmax sees; the rest has nothing at the top frequencies."""
    params, a = small_attention(3, 7)
    kept, rest = fc.ablate_heads(params)
    whole, power, _ = fc.head_spectrum(tables(params)[0])
    assert kept["S"] + rest["S"] == pytest.approx(whole, abs=1e-12)
    left = fc.head_spectrum(rest["S"])[1]
    for h, order in enumerate(power.argsort(axis=1)[:, ::-1]):
        assert abs(left[h, order[:2]]).max() < 1e-20
        assert left[h, order[2:]] == pytest.approx(power[h, order[2:]], abs=1e-10)
    again, _ = fc.network({**kept, "S": kept["S"] + rest["S"]}, a)
    assert again == pytest.approx(plain_attention(params, a), rel=1e-9, abs=1e-12)


# ------------------------------------------------------------------------------------------------
# Transformers of several layers


def small_transformer(k, p, layers=2, n=30):
    """A small network and n inputs, some of them equal."""
    params = fc.init_transformer(k, p, layers, 3, 2, 5, 6, 1, rng(), "float64")
    a = rng(1).integers(0, p, (n, k))
    a[-3:] = a[:3]
    return params, a


def plain_transformer(params, a):  # [n, k] -> [n, k, p]
    """As one writes it: all positions of all inputs, keys after the query masked."""
    def norm(x):
        return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)

    k = a.shape[1]
    x = params["E"][a] + params["P"][:k]  # [n, k, d]
    for l in range(1, 1 + sum(name.startswith("W_Q") for name in params)):
        z = norm(x)
        q, key, v = (np.einsum("njd,dhe->nhje", z, params[f"{w} {l}"])
                     for w in ("W_Q", "W_K", "W_V"))
        score = q @ key.swapaxes(2, 3) / math.sqrt(q.shape[-1])  # [n, H, query, key]
        score[:, :, np.triu(np.ones((k, k), bool), 1)] = -np.inf
        weight = np.exp(score - score.max(-1, keepdims=True))
        weight /= weight.sum(-1, keepdims=True)
        x = x + np.einsum("nhje,hed->njd", weight @ v, params[f"W_O {l}"])
        x = x + np.maximum(norm(x) @ params[f"W_1 {l}"], 0) @ params[f"W_2 {l}"]
    return norm(x) @ params["W_U"]


def check_layer(layer, x, weights):
    """layer(x, weights) -> y, backward; backward(dy) -> dx, dweights."""
    y, backward = layer(x, weights)
    dy = rng(9).standard_normal(y.shape)
    dx, dweights = backward(dy)
    check_gradient(lambda x, *w: (layer(x, w)[0] * dy).sum(), [dx, *dweights], [x, *weights])


def four_weights(d=5, heads=3, width=2):
    return [rng(i).standard_normal(shape)
            for i, shape in enumerate([(d, heads, width)] * 3 + [(heads, width, d)])]


DEEP_SIZES = [(2, 5), (3, 4), (4, 3), (5, 2)]


def test_prefixes():
    a = np.array([[1, 2, 0], [0, 2, 1], [1, 2, 0], [1, 0, 0]])
    paths, keys = fc.prefixes(a, 3)
    assert keys[0].tolist() == [[0], [1]]  # the beginnings 0 and 1
    assert keys[1].tolist() == [[0, 5], [1, 3], [1, 5]]  # 02, 10, 12
    assert keys[2].tolist() == [[1, 5, 6], [0, 5, 7], [1, 5, 6], [1, 3, 6]]
    assert paths[1].tolist() == [[0, 2], [1, 3], [1, 4]]
    assert paths[2].tolist() == [[1, 4, 5], [0, 2, 6], [1, 4, 7], [1, 3, 8]]


@pytest.mark.parametrize("k, p", DEEP_SIZES)
def test_gather_gradient(k, p):
    for path in fc.prefixes(small_transformer(k, p)[1], p)[0]:
        x = rng().standard_normal((path.max() + 2, 3))
        y, backward = fc.gather(x, path)
        dy = rng(9).standard_normal(y.shape)
        check_gradient(lambda x: (fc.gather(x, path)[0] * dy).sum(), [backward(dy)], [x])


def test_layernorm():
    x = 3 + 2 * rng(8).standard_normal((4, 7))
    z, backward = fc.layernorm(x)
    assert abs(z.mean(axis=1)).max() < 1e-12 and z.var(axis=1) == pytest.approx(1, abs=1e-4)
    dz = rng(9).standard_normal(x.shape)
    check_gradient(lambda x: (fc.layernorm(x)[0] * dz).sum(), [backward(dz)], [x])


@pytest.mark.parametrize("n", [7, 2])
def test_feed_forward_and_residual_gradient(n):
    """For all rows, and for a layer that answers for the last two only."""
    def layer(x, w):
        def last(z):
            y, backward = fc.feed_forward(z[-n:], *w)

            def padded(dy):
                dz, dweights = backward(dy)
                return np.concatenate([np.zeros((len(x) - n, 5)), dz]), dweights

            return y, padded

        return fc.residual(x, last)

    w = [rng(1).standard_normal((5, 6)), rng(2).standard_normal((6, 5))]
    check_layer(layer, rng(4).standard_normal((7, 5)), w)


@pytest.mark.parametrize("last", [0, -1])
@pytest.mark.parametrize("k, p", DEEP_SIZES)
def test_deep_attention_gradients(k, p, last, monkeypatch):
    """Of layer 1 from tables and of the others, asked everywhere or at the last position only."""
    paths, keys = fc.prefixes(small_transformer(k, p)[1], p)
    check_layer(lambda x, w: fc.first_attention(x, w, keys[last:], p, fc.Buffers()),
                rng(3).standard_normal((k * p, 5)), four_weights())
    for limit in (fc.BLOCK_BYTES, 1):  # all heads together, each by itself
        monkeypatch.setattr(fc, "BLOCK_BYTES", limit)
        check_layer(lambda x, w: fc.attend_paths(x, w, paths[last:]),
                    rng(3).standard_normal((paths[-1].max() + 1, 5)), four_weights())


def test_large_scores_of_rows_are_finite():
    paths, _ = fc.prefixes(small_transformer(3, 4)[1], 4)
    x = 1e3 * rng(3).standard_normal((paths[-1].max() + 1, 5))
    y, backward = fc.attend_paths(x, four_weights(), paths)
    assert np.isfinite(y).all() and np.isfinite(backward(np.ones_like(y))[0]).all()


def test_initial_sizes_of_a_transformer():
    params = fc.init_transformer(2, 50, 1, 5, 10, 40, 80, 0.5, rng())
    for name, x in params.items():
        fan_in = {"W_O": 50, "W_2": 80}.get(name[:3], 40)
        assert x.std() == pytest.approx(0.5 / math.sqrt(fan_in), rel=5 / math.sqrt(2 * x.size))


@pytest.mark.parametrize("k, p", DEEP_SIZES)
def test_both_ways_to_attend_agree(k, p, monkeypatch):
    """Layer 1 could attend like the others, were its rows written out; in few groups or many."""
    monkeypatch.setattr(fc, "BLOCK_BYTES", 40)
    paths, keys = fc.prefixes(small_transformer(k, p)[1], p)
    x = rng(3).standard_normal((k * p, 5))
    rows = x[np.concatenate([key[:, -1] for key in keys])]
    y, _ = fc.residual(rows, lambda z: fc.attend_paths(z, four_weights(), paths))
    first, _ = fc.first_attention(x, four_weights(), keys, p, fc.Buffers())
    assert first == pytest.approx(y, rel=1e-11, abs=1e-12)


@pytest.mark.parametrize("layers", [2, 3])
@pytest.mark.parametrize("k, p", DEEP_SIZES)
def test_transformer_is_the_plain_one_and_causal(k, p, layers):
    """A beginning alone gives what it gives in longer inputs; the same on the whole grid."""
    params, a = small_transformer(k, p, layers)
    expected = plain_transformer(params, a)
    for j in range(1, k + 1):
        shorter = params | {"P": params["P"][:j]}
        logits, _ = fc.transformer(shorter, a[:, :j])
        assert logits == pytest.approx(expected[:, j - 1], rel=1e-9, abs=1e-10)
    grid = np.concatenate([x for _, x in fc.logit_blocks(params, k, p)])
    whole = plain_transformer(params, fc.all_inputs(k, p))[:, -1]
    assert grid == pytest.approx(whole, rel=1e-9, abs=1e-10)


def test_later_tokens_change_no_earlier_state():
    """Of the plain one, whose every position the test above compares."""
    params, a = small_transformer(4, 5)
    changed = a.copy()
    changed[:, 2:] = (a[:, 2:] + 1 + rng().integers(0, 4, (len(a), 2))) % 5
    before, after = (plain_transformer(params, x) for x in (a, changed))
    assert (before[:, :2] == after[:, :2]).all()
    assert (abs(before - after)[:, 2:].max(axis=(1, 2)) > 1e-3).all()


@pytest.mark.parametrize("layers", [2, 3])
@pytest.mark.parametrize("k, p", DEEP_SIZES)
def test_transformer_gradient(k, p, layers):
    """Of the whole network with its loss; inputs that repeat count as often as they come."""
    params, a = small_transformer(k, p, layers)

    def f(*x):
        logits = plain_transformer(dict(zip(params, x)), a)[:, -1]
        return fc.cross_entropy(logits, fc.labels(a, p))[0]

    loss, grads = fc.loss_and_gradients(params, a)
    assert loss == pytest.approx(f(*params.values()), rel=1e-10) and set(grads) == set(params)
    check_gradient(f, [grads[name] for name in params], list(params.values()), h=1e-6, rel=1e-6)
    for name in params:  # each array by itself, as some are much larger than others
        g = lambda x: f(*{**params, name: x}.values())
        check_gradient(g, [grads[name]], [params[name]], seed=3, h=1e-6, rel=1e-5)


@pytest.mark.parametrize("p", [5, 8, 23])
def test_embedding_spectrum(p):
    """A mean and three cosines of power 4, 1, 1, in columns; noise has a tenth in its top tenth."""
    x, e = 2 * np.pi * np.arange(p) / p, np.zeros((p, 4))
    e[:, 0], e[:, 1], e[:, 2] = 7, 2 * np.cos(x + 1), np.cos(2 * x)
    e[:, 3] = np.sin(x)
    expected = np.zeros(p // 2)
    expected[:2] = 5 / 6, 1 / 6
    spectrum = fc.embedding_spectrum({"E": e})
    assert spectrum == pytest.approx(expected, abs=1e-12)
    assert fc.top_share(spectrum) == pytest.approx(1 if p == 23 else 5 / 6)
    flat = fc.embedding_spectrum({"E": rng().standard_normal((401, 3000))})
    assert fc.top_share(flat) == pytest.approx(0.1, abs=0.01)


def test_grokking_numbers():
    """Train at 20, test at 40; gaps 0, 0.9, 0.5, 0 for 10, 10, 15, 5 steps: area 16.5."""
    curve = [(10, 0.5, 0.6), (20, 0.99, 0.09), (35, 1.0, 0.5), (40, 1.0, 1.0)]
    history = [{"step": s, "train_accuracy": x, "test_accuracy": y} for s, x, y in curve]
    assert fc.grokking(history) == {"steps_to_train": 20, "steps_to_test": 40,
                                    "largest_gap": 0.9, "gap_area": pytest.approx(16.5)}
    assert fc.grokking(history[:3])["steps_to_test"] is None
    assert fc.grokking([])["largest_gap"] is None


# ------------------------------------------------------------------------------------------------
# Runs


ATTENTION = {"model": "transformer", "k": 3, "p": 7, "heads": 6, "d_model": 12}

DEEP = {"model": "transformer", "layers": 2, "k": 3, "p": 7, "d_model": 12, "d_ff": 20}


def small_run(**settings):
    return fc.new_run(fc.complete({"k": 2, "p": 11, "steps": 40, "batch": 32, **settings}))


def advance(run, steps):
    for _ in range(steps):
        fc.train_step(run)
        if run.step % 10 == 0:
            run.history.append(fc.progress(run))
    return run


def assert_same(a, b):
    assert a.config == b.config and a.step == b.step and a.history == b.history
    assert (a.train == b.train).all() and (a.power_at_init == b.power_at_init).all()
    assert a.rng.bit_generator.state == b.rng.bit_generator.state
    for group in ("params", "first", "second"):
        for name, x in getattr(a, group).items():
            y = getattr(b, group)[name]
            assert x.dtype == y.dtype and (x == y).all()


@pytest.mark.parametrize("settings", [{}, {"activation": "relu"}, {"dtype": "float64"},
                                      {"max_margin": True}, {"p": 8}, {"k": 3, "p": 2},
                                      {"train_fraction": 1.0, "batch": 1000}, ATTENTION, DEEP])
def test_a_resumed_run_is_the_same_run(tmp_path, settings):
    whole = advance(small_run(**settings), 40)
    for stop in (0, 15, 33):
        fc.save_run(tmp_path / "run.npz", advance(small_run(**settings), stop))
        assert_same(advance(fc.load_run(tmp_path / "run.npz"), 40 - stop), whole)
    assert os.listdir(tmp_path) == ["run.npz"]


@pytest.mark.parametrize("settings", [{}, {"activation": "relu"}, ATTENTION, DEEP])
def test_a_line_of_history_is_what_the_report_says(settings):
    run = advance(small_run(**settings, dtype="float64"), 40)
    r, line = fc.report(run), run.history[-1]  # few inputs: the samples are all of them
    for name in set(line) & set(r) - {"train_accuracy"}:
        assert line[name] == pytest.approx(r[name], rel=1e-12)
    if settings is not ATTENTION:  # whose samples are of inputs, as the report, its batches not
        assert line["train_accuracy"] == r["train_accuracy"]


def test_report_of_a_relu_network():
    run, a = advance(small_run(activation="relu", dtype="float64"), 40), fc.all_inputs(2, 11)
    r, y = fc.report(run), fc.labels(a, 11)
    margin = fc.margins(plain_mlp(run.params, a, "relu"), y)[0]
    kept = fc.margins(plain_mlp(fc.ablate(run.params)[0], a, "relu"), y)[0]
    assert r["test_accuracy"] == (margin > 0)[~run.train].mean() and r["margin_ratio"] is None
    assert r["margin"] == pytest.approx(margin.min() / (fc.neuron_norms(run.params) ** 2).sum())
    assert r["restricted_accuracy"] == (kept > 0).mean()
    s = fc.neuron_spectra(run.params)
    assert r["phase_error"] == pytest.approx(s["phase_error"][s["live"]].mean(), rel=1e-12)


def test_report_of_heads():
    run = advance(small_run(**ATTENTION), 40)
    r, s = fc.report(run), fc.head_spectra(run.params)
    now = np.median(s["shares"][s["live"]], axis=0).tolist()
    before = np.median(run.power_at_init, axis=0).tolist()
    assert (r["top_shares"], r["top_shares_at_init"]) == (now, before)
    assert (r["top_two_share"], r["top_two_share_at_init"]) == (now[1], before[1])
    assert r["frequencies_used"] == np.count_nonzero(r["frequency_histogram"])
    assert [head["shares"] for head in r["each_head"]] == s["shares"].tolist()


def test_training_finds_the_circuit():
    """Half of 17^3 sums: the other half right, single frequencies, all of them, phases in order."""
    run = advance(fc.new_run(fc.complete({"k": 3, "p": 17, "steps": 500})), 500)
    r = fc.report(run)
    assert r["train_accuracy"] == r["test_accuracy"] == r["restricted_accuracy"] == 1
    assert r["single_frequency_fraction"] > 0.98 and r["frequencies_used"] == 8
    assert r["phase_error"] < 0.05 and r["excluded_accuracy"] < 0.2
    assert r["max_normalized_power"] > 0.95 > 0.6 > r["max_normalized_power_at_init"]
    assert 0.2 < r["margin_ratio"] < 1
    assert sum(r["frequency_histogram"]) == r["live_neurons"]


def test_training_finds_the_attention_circuit():
    """A small one, half of the orbits of 23^3: other orbits right, the scores are 2-D cosines."""
    run = advance(fc.new_run(fc.complete({"model": "transformer", "k": 3, "p": 23, "heads": 32,
                                          "steps": 800, "batch": 512, "init_std": 0.3,
                                          "weight_decay": 4})), 800)
    r = fc.report(run)
    assert r["distinct_accuracy"] > 0.9 and r["top_two_share"] > 0.8 > 0.2 > \
        r["top_two_share_at_init"]
    assert r["restricted_accuracy"] > 0.8 and r["excluded_accuracy"] < 0.2
    assert r["distinct_accuracy"] > r["collision_accuracy"]
    assert 1 < r["frequencies_used"] < 11 and sum(r["frequency_histogram"]) == r["live_heads"]


def test_training_two_layers():
    """All of 7^2, a few hundred steps: no error left, and a history to measure."""
    run = advance(fc.new_run(fc.complete({"model": "transformer", "layers": 2, "k": 2, "p": 7,
                                          "train_fraction": 1, "steps": 200, "lr": 3e-3})), 200)
    r = fc.report(run)
    assert r["train_accuracy"] == 1 and r["test_accuracy"] is None
    assert run.history[-1]["train_loss"] < 0.1 and r["steps_to_train"] <= 200
    assert r["embedding_share"] > r["embedding_share_at_init"]
    assert sum(r["embedding_spectrum"]) == pytest.approx(1)


def test_training_reaches_the_maximum_margin():
    run = fc.new_run(fc.complete({"k": 2, "p": 7, "m": 96, "max_margin": True, "steps": 600}))
    advance(run, 600)
    ratio = fc.report(run)["margin_ratio"]
    assert 0.99 < ratio < 1 + 1e-5 and run.history[-1]["margin_ratio"] == ratio


# ------------------------------------------------------------------------------------------------
# Scripts, as a user runs them


def script(name, *argv, cwd, **settings):
    """-> exit code, stdout, stderr"""
    done = subprocess.run([sys.executable, os.path.join(HERE, name), *map(str, argv)], cwd=cwd,
                          capture_output=True, text=True, **settings)
    return done.returncode, done.stdout, done.stderr


def refused(capsys, monkeypatch, module, *argv):
    """Run a script's main here; it must exit with 2 and one line on stderr. -> that line"""
    monkeypatch.setattr(sys, "argv", [module.__name__ + ".py", *map(str, argv)])
    with pytest.raises(SystemExit) as stop:
        analyze.run_main(module.main)
    captured = capsys.readouterr()
    assert stop.value.code == 2
    assert captured.err.count("\n") == 1 and captured.err.endswith("\n") and not captured.out
    return captured.err


TINY = ("--k", 2, "--p", 7, "--steps", 60, "--batch", 16)
KEYS = """k p m steps seconds seed train_accuracy test_accuracy live_neurons
    single_frequency_fraction max_normalized_power max_normalized_power_at_init phase_error
    frequencies_used frequencies_total
    margin margin_ratio restricted_accuracy excluded_accuracy""".split()


def test_train_then_analyze(tmp_path):
    code, out, err = script("train.py", *TINY, cwd=tmp_path)
    assert code == 0 and not err
    assert "mlp-k2-p7-seed0.npz" in out and "\r" not in out
    for words in ("accuracy", "live neurons", "single-frequency", "expected at random",
                  "phase error", "of gamma*", "restricted", "excluded", "3 used", "seconds"):
        assert words in out
    code, text, err = script("analyze.py", "mlp-k2-p7-seed0.npz", cwd=tmp_path)
    assert code == 0 and not err and "u_2" in text and "Lemma F.2" in text
    report = out[out.index("2 numbers modulo 7"):out.index("  saved to")]
    assert report in text  # the same report again
    code, text, err = script("analyze.py", "mlp-k2-p7-seed0.npz", "--json", cwd=tmp_path)
    r = json.loads(text)
    assert code == 0 and set(KEYS) <= set(r)
    assert (r["k"], r["p"], r["m"], r["steps"], r["frequencies_total"]) == (2, 7, 24, 60, 3)
    code, again, _ = script("train.py", *TINY, cwd=tmp_path)  # the same settings: the same numbers
    same = lambda text: [line.split(" s left")[-1] for line in text.splitlines()
                         if "seconds" not in line]
    assert code == 0 and same(again) == same(out)


ATTENTION_KEYS = """fresh_accuracy distinct_accuracy collision_accuracy top_two_share live_heads
    top_two_share_at_init frequencies_used restricted_accuracy excluded_accuracy
    each_head""".split()


def test_train_then_analyze_attention(tmp_path):
    flags = ("--model", "transformer", "--k", 3, "--p", 7, "--heads", 9, "--steps", 60)
    code, out, err = script("train.py", *flags, cwd=tmp_path)
    assert code == 0 and not err and "transformer-k3-p7-seed0.npz" in out
    for words in ("held-out orbits", "keys distinct", "collisions", "live heads", "top 1, 2, 3",
                  "rank of S_h", "restricted", "excluded", "key frequencies", "top two"):
        assert words in out
    code, text, err = script("analyze.py", "transformer-k3-p7-seed0.npz", cwd=tmp_path)
    assert code == 0 and not err and "S_h (rows: query" in text
    report = out[out.index("3 numbers modulo 7"):out.index("  saved to")]
    assert report in text  # the same report again
    code, text, err = script("analyze.py", "transformer-k3-p7-seed0.npz", "--json", cwd=tmp_path)
    r = json.loads(text)
    assert code == 0 and set(ATTENTION_KEYS) <= set(r) and len(r["each_head"]) == 9
    assert len(r["each_head"][0]["top"]) == 3
    code, out, _ = script("train.py", *flags, "--benchmark", cwd=tmp_path)
    assert code == 0 and "step" in out and "peak memory" in out


def test_held_out_accuracies_add_up():
    """Distinct keys and collisions together are the held-out inputs, and no orbit is in both."""
    run = advance(small_run(**ATTENTION), 40)
    r, equal = fc.report(run), fc.collisions(3, 7)
    right = np.concatenate([fc.margins(f, fc.labels(fc.all_inputs(3, 7)[rows], 7))[0] > 0
                            for rows, f in fc.logit_blocks(run.params, 3, 7)])
    held = ~run.train
    assert r["fresh_accuracy"] == r["test_accuracy"] == right[held].mean()
    assert r["distinct_accuracy"] == right[held & ~equal].mean()
    assert r["collision_accuracy"] == right[held & equal].mean()


def test_a_run_that_learns_nothing_and_runs_of_all_kinds(tmp_path, monkeypatch, capsys):
    """Heads of any size have their measures; one table holds every kind of network."""
    monkeypatch.chdir(tmp_path)
    reports = []
    for size in (1, 1e-6, 1e4):
        run = small_run(**ATTENTION, init_std=size)
        reports.append(fc.report(run))
        assert reports[-1]["live_heads"] == reports[0]["live_heads"] > 0
        assert reports[-1]["top_two_share"] == pytest.approx(reports[0]["top_two_share"], rel=1e-3)
    fc.save_run("attention.npz", run)
    for name, settings in (("mlp", {}), ("deep", DEEP)):
        fc.save_run(f"{name}.npz", advance(small_run(**settings), 10))
    assert analyze.main(["mlp.npz", "attention.npz", "deep.npz"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 4


def test_theory_prints_small_errors(tmp_path):
    code, out, _ = script("analyze.py", "--theory", "--k", 3, "--p", 5, cwd=tmp_path)
    errors = [float(line.split()[-1]) for line in out.splitlines() if line.startswith("  ")
              and "measured" not in line]
    assert code == 0 and len(errors) == 24 and max(errors) < 1e-11


def test_benchmark_prints_its_four_numbers(tmp_path):
    code, out, _ = script("train.py", "--k", 2, "--p", 23, "--benchmark", cwd=tmp_path)
    assert code == 0 and not os.listdir(tmp_path)
    step, products, ratio, memory = [float(line[19:].split()[0]) for line in out.splitlines()[1:]]
    assert ratio == pytest.approx(step / products, abs=0.01 + 0.02 * ratio / products)
    assert memory > 1


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_run_says_how_to_go_on_and_ends_the_same(tmp_path, number):
    settings = ("--k", 3, "--p", 7, "--steps", 600, "--batch", 64)
    code, _, _ = script("train.py", *settings, "--out", "whole.npz", cwd=tmp_path)
    assert code == 0
    process = subprocess.Popen([sys.executable, os.path.join(HERE, "train.py"),
                                *map(str, settings), "--out", "part run.npz"], cwd=tmp_path,
                               stdout=subprocess.PIPE, text=True)
    process.stdout.readline()  # the first line of progress
    process.send_signal(number)
    rest, _ = process.communicate(timeout=60)
    assert process.returncode == 128 + number and "stopped at step" in rest
    command = rest.splitlines()[-1].strip()
    assert command == "python train.py --resume 'part run.npz'"
    assert 0 < fc.load_run(tmp_path / "part run.npz").step < 600
    assert script("train.py", "--resume", "part run.npz", cwd=tmp_path)[0] == 0
    assert_same(fc.load_run(tmp_path / "part run.npz"), fc.load_run(tmp_path / "whole.npz"))


def test_resumed_to_another_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = advance(small_run(), 10)
    run.seconds = 1000
    fc.save_run("a.npz", run)
    before = (tmp_path / "a.npz").read_bytes()
    assert train.main(["--resume", "a.npz", "--out", "b.npz"]) == 0
    assert (tmp_path / "a.npz").read_bytes() == before
    assert fc.load_run("b.npz").step == 40 and fc.load_run("b.npz").seconds > 1000
    with pytest.raises(fc.BadInput, match="exists"):
        train.main(["--resume", "a.npz", "--out", "b.npz"])
    monkeypatch.setattr(fc, "train_step", None)  # of a finished run nothing is left to do
    assert train.main(["--resume", "b.npz", "--out", "c.npz"]) == 0 and os.path.exists("c.npz")


def test_stopped_in_the_last_step_and_before(tmp_path, monkeypatch, capsys):
    """The command that goes on has the flags of this one; a whole run is not called stopped."""
    step, stops = fc.train_step, [25]

    def stopped(run):
        step(run)
        if run.step in stops:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(fc, "train_step", stopped)
    monkeypatch.chdir(tmp_path)
    usual = signal.getsignal(signal.SIGTERM)
    try:
        with pytest.raises(SystemExit):
            train.main("--k 2 --p 5 --m 4 --steps 40 --save-every 10 --device cpu "
                       "--out r.npz".split())
        assert capsys.readouterr().out.splitlines()[-1].strip() == \
            "python train.py --resume r.npz --save-every 10 --device cpu"
        signal.signal(signal.SIGTERM, usual)
        stops[0] = 40
        assert train.main(["--resume", "r.npz"]) == 0
        assert signal.getsignal(signal.SIGTERM) == usual
    finally:
        signal.signal(signal.SIGTERM, usual)


def test_names_of_runs_and_lines_of_history(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    train.main("--k 2 --p 5 --m 4 --steps 200".split())
    train.main("--model transformer --layers 2 --k 2 --p 5 --heads 1 --d-head 1 --d-model 4 "
               "--d-ff 4 --steps 200".split())
    names = sorted(os.listdir())
    assert names == ["mlp-k2-p5-seed0.npz", "transformer2-k2-p5-seed0.npz"]
    assert [len(fc.load_run(name).history) for name in names] == [50, 100]


@pytest.mark.parametrize("flags, expected", [
    ("1", "mlp 4 47"), ("2", "mlp 4 47"), ("5", "mlp 3 97"), ("6", "mlp 3 97"), ("7", "mlp 5 23"),
    ("8", "mlp 5 23"), ("3", "transformer 4 31"), ("9", "transformer 3 61"),
    ("10", "transformer 5 17"), ("4", "transformer 2 97"), ("4 --k 3", "transformer 3 31"),
    ("4 --k 4", "transformer 4 11"), ("4 --k 5", "transformer 5 5"), ("1 --p 5", "mlp 4 5")])
def test_published_settings(flags, expected, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    configs = []
    monkeypatch.setattr(fc, "new_run", lambda config: configs.append(config) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        train.main(["--figure", *flags.split()])
    c = configs[0]
    assert f"{c['model']} {c['k']} {c['p']}" == expected
    if flags[0] == "4":
        assert [c[x] for x in ("layers", "heads", "d_head", "d_model", "d_ff", "lr",
                               "weight_decay")] == [2, 160, 32, 128, 512, 1e-3, 1e-3]


def test_a_killed_run_goes_on_from_its_last_save(tmp_path):
    settings = ("--k", 3, "--p", 7, "--steps", 400, "--batch", 64)
    script("train.py", *settings, "--out", "whole.npz", cwd=tmp_path)
    process = subprocess.Popen([sys.executable, os.path.join(HERE, "train.py"), *map(str, settings),
                                "--save-every", "50", "--out", "part.npz"], cwd=tmp_path,
                               stdout=subprocess.DEVNULL)
    while not os.path.exists(tmp_path / "part.npz"):
        time.sleep(0.001)
    process.kill()
    process.wait()
    assert fc.load_run(tmp_path / "part.npz").step % 50 == 0
    script("train.py", "--resume", "part.npz", cwd=tmp_path)
    assert_same(fc.load_run(tmp_path / "part.npz"), fc.load_run(tmp_path / "whole.npz"))


def test_runs_of_several_layers_are_grouped_by_all_but_the_seed(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for k, seed in ((3, 0), (2, 1), (2, 0)):
        run = small_run(**{**DEEP, "k": k, "seed": seed})
        fc.save_run(f"{k}-{seed}.npz", advance(run, 40))
    runs = ["3-0.npz", "2-1.npz", "2-0.npz"]
    assert analyze.main(runs) == 0
    head, *lines = capsys.readouterr().out.splitlines()
    assert "99% train at" in head and [line.split()[:4] for line in lines] == [
        ["2", "7", "2", "40"], ["3", "7", "1", "40"]]
    fc.save_run("stopped.npz", advance(small_run(**{**DEEP, "k": 3, "lr": 0.01, "steps": 50}), 20))
    assert analyze.main(["3-0.npz", "stopped.npz"]) == 0
    lines = capsys.readouterr().out.splitlines()[1:]
    assert lines[1].split()[3] == "20" and [line.split("  ")[-1].strip() for line in lines] == [
        "steps 40, lr 0.001", "steps 50, lr 0.01"]
    with pytest.raises(fc.BadInput, match="same run"):
        analyze.main([*runs, "2-1.npz"])
    assert "for --theory" in refused(capsys, monkeypatch, analyze, "3-0.npz", "--k", 3)
    assert analyze.main([runs[0]]) == 0 and "99% of test" in capsys.readouterr().out
    assert analyze.main([*runs, "--json"]) == 0
    assert [r["k"] for r in json.loads(capsys.readouterr().out)] == [3, 2, 2]
    if importlib.util.find_spec("matplotlib"):
        assert analyze.main([*runs, "--figures", "drawn"]) == 0
        assert os.listdir("drawn") == ["grokking.png"]
    fc.save_run("new.npz", small_run(**DEEP, seed=1))  # stopped before its first line of history
    assert analyze.main(["new.npz", "3-0.npz"]) == 0 and "never" in capsys.readouterr().out
    monkeypatch.setattr(analyze, "pyplot", lambda: None)
    with pytest.raises(fc.BadInput, match="first line"):
        analyze.main(["new.npz", "3-0.npz", "--figures", "drawn"])


def test_numbers_of_groups_and_tables(capsys):
    runs = [small_run(**DEEP, seed=seed) for seed in (0, 1)]
    for run, curve in zip(runs, ([(10, 1, 0.2), (30, 1, 1)], [(10, 0.5, 0.1), (20, 1, 0.6)])):
        run.step, run.history = curve[-1][0], [
            {"step": s, "train_accuracy": x, "test_accuracy": y} for s, x, y in curve]
    analyze.print_groups([runs])
    line = capsys.readouterr().out.splitlines()[1]
    assert " ".join(line.split()) == ("3 7 2 20 15 (10..20) 30 (30..30, 1 of 2) 0.60 (0.40..0.80) "
                                      "8 (8..8) 0.800 (0.600..1.000)")
    analyze.print_table([fc.report(small_run()) | {"train_accuracy": 0.25, "test_accuracy": 0.125}])
    row = capsys.readouterr().out.splitlines()[1].split()
    assert row[:7] == ["2", "11", "40", "0", "0", "25.00%", "12.50%"]
    params = fc.rotated_network(2, 7)
    params["w"] += 0.01  # what all classes share
    analyze.print_lemma(types.SimpleNamespace(params=params))
    out = capsys.readouterr().out
    assert "at 3 of 3" in out and "mean 1.000" in out and "1.0000 (" in out


def test_curves_of_groups(monkeypatch):
    """Mean of the seeds, each measure by its name."""
    runs = [small_run(**DEEP, seed=seed) for seed in (0, 1)]
    for run, y in zip(runs, (0.2, 0.6)):
        run.history = [{"step": 10, "train_accuracy": 1, "test_accuracy": y,
                        "embedding_share": 0.5}]
    axes = np.array([[Mock(**{"plot.return_value": [Mock()]})] for _ in range(2)])
    figure = Mock(**{"subplots.return_value": (Mock(), axes)})
    monkeypatch.setattr(analyze, "pyplot", lambda: figure)
    monkeypatch.setattr(analyze, "save_figure", lambda *args: None)
    analyze.draw_groups([runs], "")
    drawn = [(*map(list, call.args), call.kwargs["label"])
             for axis in axes[:, 0] for call in axis.plot.call_args_list]
    assert drawn == [([10], [1], "train"), ([10], [pytest.approx(0.4)], "test"),
                     ([10], [0.5], "embedding")]


@pytest.mark.parametrize("model", [("mlp",), ("transformer",), ("transformer", "--layers", "2")])
def test_figures(tmp_path, model):
    pytest.importorskip("matplotlib")
    script("train.py", *TINY, "--model", *model, "--out", "run.npz", cwd=tmp_path)
    code, _, err = script("analyze.py", "run.npz", "--figures", "new/figures", cwd=tmp_path)
    drawn = os.listdir(tmp_path / "new" / "figures")
    assert code == 0 and len(drawn) == len(err.splitlines()) == (1 if "2" in model else 3)


def test_without_matplotlib(tmp_path, capsys, monkeypatch):
    fc.save_run(tmp_path / "run.npz", small_run())
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    line = refused(capsys, monkeypatch, analyze, tmp_path / "run.npz", "--json", "--figures",
                   tmp_path)
    assert "pip install matplotlib" in line


# ------------------------------------------------------------------------------------------------
# Bad input


@pytest.mark.parametrize("argv", [
    "--p 1", "--p 0", "--p -7", "--k 1", "--m 0", "--k two", "--p 2.5", "--p nan", "--p",
    "--train-fraction 0", "--train-fraction 1.5", "--train-fraction nan", "--train-fraction -1",
    "--train-fraction 1e-9", "--steps 0", "--steps -1", "--batch 0", "--lr -1", "--lr nan",
    "--lr inf", "--alone 0.9", "--equal 1", "--benchmark --max-margin", "--weight-decay -1",
    "--max-margin --activation relu", "--weight-decay nan", "--seed -1", "--save-every -1",
    "--k 6 --p 97", "--k 1000000000",
    "--p 1000000007", "--k 99999999 --p 99999999", "--m 10000000000", "--activation tanh",
    "--init-std 0", "--penalty-power 1000", "--activation relu --alone 0.1",
    "--equal 0",
    "--model rnn", "--model transformer --m 9", "--model transformer --max-margin", "--heads 3",
    "--model transformer --heads 0", "--model transformer --d-head -1",
    "--model transformer --d-model 0", "--model transformer --heads 10000000",
    "--model transformer --heads 900000 --p 5", "--model transformer --train-fraction 1e-9",
    "--figure 4 --k 1", "--figure 4 --k 6", "--figure 3 --alone 0.1",
    "--model transformer --d-ff 8",
    "--model transformer --layers 0", "--model transformer --layers 2 --d-ff 0",
    "--model transformer --layers 100 --d-model 100000",
    "--model transformer --layers 2 --p 5 --heads 2000 --d-head 1 --steps 1 --batch 1",
    "--device tpu", "--dtype float16", "--nonsense", "--k 12 --p 2 --m 100000000",
    "--resume missing.npz", "--out missing/run.npz", "--out .", "--out /dev/null"])
def test_bad_flags_of_train(argv, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    refused(capsys, monkeypatch, train, *argv.split())
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize("argv", ["", "missing.npz", ".", "--theory run.npz", "--theory --p 1",
                                  "--theory --k 1", "--theory --k 9 --p 97", "--theory --p x",
                                  "--theory --json"])
def test_bad_flags_of_analyze(argv, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    refused(capsys, monkeypatch, analyze, *argv.split())


def test_no_gpu(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "cupy", types.SimpleNamespace(is_available=lambda: False))
    assert "no GPU" in refused(capsys, monkeypatch, train, "--device", "gpu")
    monkeypatch.setitem(sys.modules, "cupy", None)  # not installed
    assert "no GPU" in refused(capsys, monkeypatch, train, "--device", "gpu")
    assert fc.use_device("auto") == "cpu"


def test_broken_files(tmp_path, capsys, monkeypatch):
    fc.save_run(tmp_path / "run.npz", small_run())
    whole = (tmp_path / "run.npz").read_bytes()
    bad = tmp_path / "bad.npz"
    for content in (b"", b"hello", whole[:100], whole[:len(whole) // 2], whole[:-1], whole[1:],
                    whole[:len(whole) // 2] + b"X" * 64 + whole[len(whole) // 2 + 64:]):
        bad.write_bytes(content)
        refused(capsys, monkeypatch, analyze, bad)
        refused(capsys, monkeypatch, train, "--resume", bad)
        assert bad.read_bytes() == content
        refused(capsys, monkeypatch, train, "--out", bad)  # not ours: left alone
        assert bad.read_bytes() == content
    np.savez(bad, u=np.zeros(3))  # a foreign file
    assert "not a run file" in refused(capsys, monkeypatch, analyze, bad)
    np.save(tmp_path / "array.npy", np.zeros(3))
    refused(capsys, monkeypatch, analyze, tmp_path / "array.npy")
    np.savez(bad, meta=np.array([object()]))  # pickled
    refused(capsys, monkeypatch, analyze, bad)
    arrays = dict(np.load(tmp_path / "run.npz"))
    for change in ({"params u": np.zeros(3)}, {"params w": np.array(["x"] * 440)}, {"meta": None},
                   {"train": np.zeros(3, np.uint8)}, {"power_at_init": np.zeros(3)}):
        np.savez(bad, **{**arrays, **change} if change != {"meta": None}
                 else {x: y for x, y in arrays.items() if x != "meta"})
        refused(capsys, monkeypatch, analyze, bad)
    meta = json.loads(str(arrays["meta"]))
    other = {**meta["config"], "p": 13}
    for change in ({"version": fc.VERSION + 1}, {"version": "new"}, {"config": {}}, {"config": 3},
                   {"step": 41}, {"config": {**meta["config"], "dtype": "float64"}},
                   {"step": "x"}, {"rng": {}}, {"history": 3},
                   {"rng": {**meta["rng"], "state": {"state": -1, "inc": 1}}},
                   {"history": [{"step": 1}]}, {"seconds": None}, {"config": other}):
        np.savez(bad, **{**arrays, "meta": np.array(json.dumps({**meta, **change}))})
        line = refused(capsys, monkeypatch, analyze, bad)
        assert ("newer version" in line) == ("version" in change)


def test_resume_with_other_flags(tmp_path, capsys, monkeypatch):
    path = tmp_path / "run.npz"
    fc.save_run(path, advance(small_run(), 10))
    before = path.read_bytes()
    for argv in (("--p", 13), ("--steps", 50), ("--lr", 0.1), ("--max-margin",), ("--seed", 1)):
        assert "disagrees" in refused(capsys, monkeypatch, train, "--resume", path, *argv)
    assert path.read_bytes() == before
    monkeypatch.setattr(sys, "argv", ["train.py", "--resume", str(path), "--p", "11"])
    with pytest.raises(SystemExit) as stop:
        analyze.run_main(train.main)
    assert stop.value.code == 0 and fc.load_run(path).step == 40


def test_another_run_is_not_overwritten(tmp_path, capsys, monkeypatch):
    path = tmp_path / "run.npz"
    fc.save_run(path, advance(small_run(), 10))
    before = path.read_bytes()
    same = ("--k", 2, "--p", 11, "--steps", 40, "--batch", 32, "--out", path)
    assert "--resume" in refused(capsys, monkeypatch, train, *same)
    assert "other settings" in refused(capsys, monkeypatch, train, *same, "--seed", 1)
    assert path.read_bytes() == before


def test_a_full_disk_leaves_what_was_there(tmp_path, monkeypatch):
    path, run = tmp_path / "run.npz", small_run()
    fc.save_run(path, run)
    before = path.read_bytes()

    def full(file, **arrays):
        file.write(b"half of it")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez", full)
    with pytest.raises(fc.BadInput, match="No space left"):
        fc.save_run(path, run)
    assert os.listdir(tmp_path) == ["run.npz"] and path.read_bytes() == before


def test_a_run_that_overflows_says_so(tmp_path):
    code, _, err = script("train.py", "--k", 7, "--p", 2, "--steps", 50, "--init-std", 1e6,
                          "--alone", 0, "--equal", 0, cwd=tmp_path)
    assert code == 2 and err.count("\n") == 1 and "--lr" in err and not os.listdir(tmp_path)


# ------------------------------------------------------------------------------------------------
# A stand-in for CuPy: its own array class, no conversion to or from numpy behind one's back, only
# functions and keywords that CuPy has. What runs on it keeps to CuPy's subset of numpy; whether it
# runs on a GPU only a GPU can tell (the last test).

CUPY = {name: set(words.split()) for name, words in {
    "eye": "dtype", "matmul": "out", "arange": "dtype", "add": "out", "subtract": "out",
    "multiply": "out",
    "divide": "out", "maximum": "out", "exp": "out", "log": "out", "sqrt": "out", "abs": "out",
    "einsum": "", "empty": "dtype", "empty_like": "dtype", "zeros_like": "dtype", "full": "dtype",
    "concatenate": "axis", "angle": "", "conj": "", "ascontiguousarray": "", "take": "axis",
    "argsort": "axis", "cumsum": "axis", "take_along_axis": "axis", "where": "", "stack": "axis",
    "bincount": "minlength", "tile": "", "zeros": "dtype", "isfinite": "", "minimum": "out",
    "unique": "", "searchsorted": "", "tensordot": "axes", "linalg.svd": "compute_uv",
    "fft.fft": "axis", "fft.rfft": "axis", "fft.fft2": "axes", "fft.ifft2": "axes",
    "fft.irfft": "n axis", "fft.fftn": "axes"}.items()}
METHODS = {name: set(words.split()) for name, words in {
    "sum": "axis dtype keepdims", "mean": "axis keepdims", "max": "axis keepdims", "min": "axis",
    "prod": "axis", "argmax": "axis", "take": "axis", "reshape": "", "copy": "", "astype": "",
    "transpose": "", "clip": "", "any": "axis", "all": "axis", "ravel": "", "swapaxes": ""}.items()}
ATTRIBUTES = {"shape", "ndim", "dtype", "itemsize", "nbytes", "size"}
OPERATORS = """add sub mul truediv floordiv mod pow matmul and or lt le gt ge eq ne""".split()


class Array:
    """An array on a pretended GPU."""

    __array_ufunc__ = None

    def __init__(self, x):
        self.hidden = np.asarray(x)

    def __array__(self, *args, **kwargs):
        raise TypeError("implicit conversion to a numpy array")

    def __getattr__(self, name):
        if name in ATTRIBUTES:
            return getattr(self.hidden, name)
        if name in ("T", "real", "imag"):
            return Array(getattr(self.hidden, name))
        if name in METHODS:
            return on_device(getattr(self.hidden, name), METHODS[name])
        raise AttributeError(name)

    def __len__(self):
        return len(self.hidden)

    def __iter__(self):
        return map(Array, self.hidden)

    def __getitem__(self, key):
        return Array(self.hidden[reveal(key)])

    def __setitem__(self, key, value):
        self.hidden[reveal(key)] = reveal(value)

    def __neg__(self):
        return Array(-self.hidden)

    def __float__(self):
        return float(self.hidden)

    def __int__(self):
        return int(self.hidden)

    def __bool__(self):
        return bool(self.hidden)


def reveal(x):
    """The numpy array inside; a bare numpy array where one on the GPU belongs is an error."""
    if isinstance(x, Array):
        return x.hidden
    if isinstance(x, np.ndarray):
        raise TypeError("implicit conversion from a numpy array")
    return type(x)(map(reveal, x)) if isinstance(x, (list, tuple)) else x


def on_device(f, keywords):
    def call(*args, **kwargs):
        assert set(kwargs) <= keywords, f"CuPy's {f} does not take {set(kwargs) - keywords}"
        result = f(*map(reveal, args), **{name: reveal(x) for name, x in kwargs.items()})
        return kwargs["out"] if "out" in kwargs else Array(result)
    return call


def operator(name):
    def call(self, other):
        return Array(getattr(self.hidden, name)(reveal(other)))
    return call


def in_place(name):
    def call(self, other):
        getattr(self.hidden, name)(reveal(other))
        return self
    return call


for each in OPERATORS:
    setattr(Array, f"__{each}__", operator(f"__{each}__"))
    if each not in ("lt", "le", "gt", "ge", "eq", "ne"):
        setattr(Array, f"__r{each}__", operator(f"__r{each}__"))
        setattr(Array, f"__i{each}__", in_place(f"__i{each}__"))


def stand_in():
    module = types.SimpleNamespace(
        is_available=lambda: True, inf=np.inf, finfo=np.finfo, asarray=lambda x: Array(x.copy()),
        asnumpy=lambda x: x.hidden.copy(), fft=types.SimpleNamespace(),
        linalg=types.SimpleNamespace())
    for name, keywords in CUPY.items():
        f = np
        for part in name.split("."):
            f = getattr(f, part)
        where = getattr(module, name.split(".")[0]) if "." in name else module
        setattr(where, name.split(".")[-1], on_device(f, keywords))
    return module


def test_the_stand_in_is_strict():
    cupy = stand_in()
    x = cupy.asarray(np.ones(3))
    for wrong in (lambda: x + np.ones(3), lambda: np.ones(3) + x, lambda: np.sqrt(x),
                  lambda: cupy.sqrt(np.ones(3)), lambda: x[np.arange(2)], lambda: np.asarray(x)):
        with pytest.raises(TypeError):
            wrong()
    with pytest.raises(AttributeError):
        cupy.apply_along_axis
    with pytest.raises(AssertionError):
        cupy.sqrt(x, where=True)


def flat(x):
    """All that is in a report, names too, in order."""
    if isinstance(x, dict):
        return [y for name, z in x.items() for y in (name, *flat(z))]
    return [y for z in x for y in flat(z)] if isinstance(x, list) else [x]


@pytest.mark.parametrize("settings", [{}, {"k": 3, "p": 6}, {"activation": "relu"},
                                      {"max_margin": True}, ATTENTION, DEEP])
def test_training_and_analysis_on_the_stand_in(settings, tmp_path, monkeypatch, capsys):
    """The same numbers as on the CPU, from the first random draw to the printed report."""
    expected = advance(small_run(**settings), 20)
    report = fc.report(expected)
    monkeypatch.setitem(sys.modules, "cupy", stand_in())
    assert fc.use_device("gpu") == "gpu"
    run = advance(small_run(**settings), 20)
    assert all(isinstance(x, Array) for x in run.params.values())
    got = fc.report(run)
    for x, y in zip(flat(got), flat(report), strict=True):
        assert x == (pytest.approx(y, rel=1e-6) if isinstance(y, float) else y)
    fc.save_run(tmp_path / "run.npz", run)
    assert analyze.main([str(tmp_path / "run.npz"), "--device", "gpu"]) == 0
    shown = "Lemma F.2" in capsys.readouterr().out
    assert shown == (run.config.get("activation") == "power")  # S_j is of z^k
    fc.use_device("cpu")
    for name, x in fc.load_run(tmp_path / "run.npz").params.items():
        assert x == pytest.approx(expected.params[name], rel=1e-3, abs=1e-6)


def test_theory_on_the_stand_in(monkeypatch):
    monkeypatch.setitem(sys.modules, "cupy", stand_in())
    fc.use_device("gpu")
    for build, k, p in ((fc.paper_network, 3, 5), (fc.rotated_network, 2, 6)):
        assert max(error for *_, error in fc.theory_check(build(k, p))) < 1e-12
        assert float(fc.efficiency(build(k, p)).max()) > 0


def test_real_cupy_has_what_the_stand_in_has():
    cupy = pytest.importorskip("cupy")
    for name, keywords in CUPY.items():
        f = cupy
        for part in name.split("."):
            f = getattr(f, part)
        try:
            signature = inspect.signature(f).parameters
        except (TypeError, ValueError):
            continue  # a ufunc, which takes out
        assert keywords <= set(signature), name
    for name in [*METHODS, *ATTRIBUTES, "T", "real", "imag"]:
        assert hasattr(cupy.ndarray, name)


def test_real_cupy_on_a_gpu():
    cupy = pytest.importorskip("cupy")
    if not cupy.is_available():
        pytest.skip("no GPU here")
    expected = advance(small_run(dtype="float64"), 20)
    fc.use_device("gpu")
    run = advance(small_run(dtype="float64"), 20)
    for name, x in run.params.items():
        assert fc.to_host(x) == pytest.approx(expected.params[name], rel=1e-6, abs=1e-9)
    assert max(error for *_, error in fc.theory_check(fc.paper_network(3, 5))) < 1e-11
