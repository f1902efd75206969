"""Every formula by brute force, every gradient along random directions, every way to go wrong.
    python -m pytest -q
"""

import copy
import doctest
import fractions
import io
import itertools
import json
import math
import os
import re
import signal
import subprocess
import sys
import threading
import types
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest

import analyze
import fourier_circuits as fc
import train

HERE = os.path.dirname(os.path.abspath(__file__))
ODD = [(2, 5), (2, 9), (2, 23), (3, 3), (3, 7), (4, 3), (4, 5), (5, 3), (5, 5)]  # p <= k too
EVEN = [(2, 2), (2, 6), (2, 10), (3, 2), (3, 8), (4, 4), (5, 2), (5, 4)]


@pytest.fixture(autouse=True)
def an_empty_directory_and_then_all_as_it_was(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    usual = {number: signal.signal(number, signal.default_int_handler)  # a parent may ignore them
             for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    fc.use_device("cpu")
    for number, handler in usual.items():
        signal.signal(number, handler)


def rng(seed=0):
    return np.random.default_rng(seed)


def normal(*shape, seed=0):
    return rng(seed).standard_normal(shape)


def gaussian(k, p, m, seed=0, init_std=1):
    return fc.init_mlp(rng(seed), k, p, m, init_std, "float64")


def plain_mlp(params, a, activation="power"):
    """Eq. 2 as it is printed."""
    u, w = params["u"], params["w"]
    z = sum(u[j][a[:, j]] for j in range(len(u)))
    return (z ** len(u) if activation == "power" else np.maximum(z, 0)) @ w


def network_of(params):
    """The mlp with these weights: inputs -> logits, backward."""
    return lambda a: fc.mlp(params, a)


def looked_up(f):
    """The network whose logits on all inputs, in order, are f [p^k, p]."""
    return lambda a: (f[a @ f.shape[1] ** np.arange(a.shape[1])[::-1]], None)


def softmax(x, axis):
    exp = np.exp(x - x.max(axis=axis, keepdims=True))
    return exp / exp.sum(axis=axis, keepdims=True)


def close(x, y, rel=1e-11, abs=1e-12):
    """Whether two dicts are the same, their floats and arrays to rounding."""
    def near(a, b):
        return a == (b if isinstance(b, (str, type(None))) else pytest.approx(b, rel=rel, abs=abs))
    return set(x) == set(y) and all(near(x[name], y[name]) for name in x)


def arrays(x):
    """All arrays in a nest of lists, tuples and dicts, in order."""
    if isinstance(x, np.ndarray):
        return [x]
    return [z for y in (x.values() if isinstance(x, dict) else x) for z in arrays(y)]


def check_gradient(layer, *inputs, h=1e-4, rel=1e-8):
    """layer(*inputs) -> y, backward. Its gradient by each input, along a random direction v,
    against a central difference of fourth order: <v, backward(dy)> = d <dy, y(x + h v)> / dh."""
    *y, backward = layer(*inputs)
    dy = [normal(*np.shape(x), seed=9 + i) for i, x in enumerate(y)]
    gradients = arrays(backward(*dy))
    assert [g.shape for g in gradients] == [x.shape for x in inputs]
    for i, g in enumerate(gradients):
        v = normal(*g.shape, seed=20 + i)

        def moved(size):
            y = layer(*[x + size * v if i == j else x for j, x in enumerate(inputs)])
            return sum((d * out).sum() for d, out in zip(dy, y))
        slope = (8 * (moved(h) - moved(-h)) - (moved(2 * h) - moved(-2 * h))) / (12 * h)
        assert (g * v).sum() == pytest.approx(slope, rel=rel, abs=1e-9)
        assert abs(slope) > 1e-3  # a direction that could have shown an error

# ---- Theorems and lemmas -------------------------------------------------------------------------


def test_examples_in_the_module():
    failed, attempted = doctest.testmod(fc)
    assert failed == 0 and attempted > 10


def test_cosine_network_has_the_amplitudes_and_phases_given():
    phases, signs = normal(3, 4, seed=1), np.array([[1, 1, 1, -1], [1, -1, 1, 1], [1, 1, 1, 1]])
    params = fc.cosine_network(3, 7, 5 * signs, phases)
    measures = fc.neuron_spectra(params)
    turn = np.tile(phases + np.pi * (signs < 0), (3, 1)).T
    assert abs(np.exp(1j * measures["phases"]) - np.exp(1j * turn)).max() < 1e-14
    assert measures["frequency"].tolist() == [1, 1, 1, 2, 2, 2, 3, 3, 3]
    assert fc.neuron_norms(params) == pytest.approx(np.full(9, 9 ** (-1 / 4)))


def test_gamma_star_of_the_paper():
    for p in (3, 23, 97):
        assert fc.gamma_star(2, p) == pytest.approx(math.sqrt(2 / 27) / (math.sqrt(p) * (p - 1)))
        assert fc.gamma_star(3, p) == pytest.approx(3 / 16 / (p * (p - 1)))


@pytest.mark.parametrize("k", [2, 3, 4, 5, 6])
def test_lemma_e1(k):
    """2^k k! prod d_j = sum over signs s of (prod s_j) (sum s_j d_j)^k; s and -s give the same."""
    d, s = normal(k), fc.half_of_all_signs(k)
    whole = 2 * (s.prod(axis=1) * (s @ d) ** k).sum()
    assert whole == pytest.approx(2**k * math.factorial(k) * d.prod(), rel=1e-11)


@pytest.mark.parametrize("build, k, p", [*((fc.paper_network, *size) for size in ODD),
                                         *((fc.rotated_network, *size) for size in ODD + EVEN)])
def test_network_is_max_margin(build, k, p):
    """Theorem 4.1, Lemmas 4.3 and F.2, Condition 3.8 and, for odd p, the dual, each to rounding."""
    params = build(k, p)
    m = 2 ** (2*k - 2) * (p - 1)
    if build is fc.rotated_network:
        m = (k + 1) * 2 ** (k - 1) * ((p - 1) // 2) + (1 - p % 2) * 2 ** (k - 1)
    assert params["u"].shape == (k, p, m) and params["w"].shape == (m, p)
    checks = fc.theory_check(params)
    assert len(checks) == 7 + p % 2 and max(error for *_, error in checks) < 1e-12
    f = abs(np.fft.fftn(plain_mlp(params, fc.all_inputs(k, p)).reshape((p,) * (k + 1))))
    size, j = fc.gamma_star(k, p) * p**k, np.arange(1, p)  # Lemma F.2, by brute force
    places = (j,) * k + (p - j,)
    assert f[places] == pytest.approx(size, rel=1e-12)
    f[places] = 0
    assert f.max() < 1e-12 * size


def test_theory_check_sees_a_wrong_network():
    """The phase of one vector off: nothing passes as a formality, but for the norm and largest."""
    params = fc.rotated_network(3, 7)
    params["u"][0, :, 0] = np.fft.irfft(np.fft.rfft(params["u"][0, :, 0]) * np.exp(1j), 7)
    errors = {what: error for what, *_, error in fc.theory_check(params)}
    assert errors.pop("norm ||theta||_{2,k+1}") < 1e-12
    assert errors.pop("F(j,..,j,-j) by weights, largest") < 1e-12 and min(errors.values()) > 1e-3


def test_why_k_2_needs_six_neurons_a_frequency():
    """rotated_network's proof. 1: the characters of a neuron. 2: their phases; their sizes are the
    same for all neurons. 3: in the whole network all but two vanish. 4: the differences of H.
    5: the matrix over H is six times the identity. And modulo an odd p no two characters meet."""
    half = [(0, 0), (2, 0), (0, 2), (1, 1), (1, -1)]
    characters = np.array(sorted({(i * n1, i * n2, nc) for n1, n2 in half for i in (1, -1)
                                  for nc in (1, -1)}))
    chi, at = characters[:, :2] + characters[:, 2:], (slice(None), *characters.T)
    x1, x2, xc = 2 * np.pi * np.indices((8, 8, 8)) / 8
    amplitudes, phases = fc.rotated_neurons(2)
    phases = (phases + np.pi * (amplitudes < 0))[:, :2]
    phases = np.concatenate([phases, rng().uniform(-3, 3, (10, 2))])  # s, t
    dft = np.fft.fftn([(np.cos(x1 + s) + np.cos(x2 + t)) ** 2 * np.cos(xc + s + t)
                       for s, t in phases], axes=(1, 2, 3)) / 512
    coefficients = dft[at]  # [16, 18]
    sizes = coefficients * np.exp(-1j * phases @ chi.T)
    assert sizes == pytest.approx(np.tile(sizes[0].real, (16, 1)), abs=1e-14)
    assert len(characters) == 18 and sizes[0].real.min() > 0.12
    dft[at] = 0
    assert abs(dft).max() < 1e-14
    right = (chi == 0).all(axis=1)
    assert sorted(map(tuple, characters[right])) == [(-1, -1, 1), (1, 1, -1)]
    assert abs(coefficients[:6].sum(axis=0)[~right]).max() < 1e-14
    H = np.array([(0, 0), (1, 1), (2, 2), (1, -1), (2, 0), (3, 1)])
    differences = {tuple(g - h) for g, h in itertools.permutations(H, 2)}
    assert differences <= {tuple(x) for x in chi[~right]} and (0, 0) not in differences
    v = np.exp(1j * phases[:6] @ H.T)  # a row for each neuron
    assert v.T @ v.conj() == pytest.approx(6 * np.eye(6), abs=1e-14)
    assert all(len({tuple(x % p) for x in characters}) == 18 for p in (3, 5, 7, 9))


@pytest.mark.parametrize("k, p", [(2, 7), (2, 6), (3, 5), (3, 8), (4, 4), (4, 5), (5, 3), (3, 2)])
@pytest.mark.parametrize("seed", range(3))
def test_formulas_from_the_weights(k, p, seed):
    """The circuit, the mean margins and the network's DFT from the weights, against all p^k inputs;
    and no network beats gamma*: smallest margin <= mean weighted one <= gamma* ||theta||^(k+1),
    with the same weight for all wrong classes, and for even p those of part 3."""
    params, a, j = gaussian(k, p, 5, seed), fc.all_inputs(k, p), np.arange(1, p)
    f, y, each = plain_mlp(params, a), fc.labels(a, p), np.arange(p**k)
    rounding = 1e-12 * abs(f).max()
    dft = np.fft.fftn(f.reshape((p,) * (k + 1)))
    diagonal = fc.neuron_dft(params).sum(axis=1)
    expected = [0, *dft[(j,) * k + (p - j,)]]
    assert diagonal == pytest.approx(np.array(expected), abs=1e-11 * abs(dft).max())
    means = [(f[each, y] - f[each, (y + delta) % p]).mean() for delta in range(1, p)]
    seen = fc.evaluate(network_of(params), a)
    g = seen["circuit"]
    assert g[0] - g[1:] == pytest.approx(np.array(means), rel=1e-9, abs=rounding)
    assert p * np.fft.ifft(g) == pytest.approx(diagonal / p**k, rel=1e-9, abs=rounding)
    r = 1 if p % 2 else 2 ** (-(k - 1) / 2)
    weights, gamma = np.where(j % 2, r, 2 - r) / (p - 2 + r), fc.gamma_star(k, p)
    weighted, factor = weights @ means, np.where(2 * j == p, r, 1) / ((p - 2 + r) * p**k)
    assert factor @ diagonal[1:] == pytest.approx(weighted, rel=1e-9, abs=rounding)
    assert weights.sum() == pytest.approx(1, rel=1e-14)
    assert seen["margin"] <= min(means) <= weighted + rounding
    assert weighted <= gamma * fc.norm(params) ** (k + 1)
    of_neurons = class_margins(params)
    assert of_neurons.sum() == pytest.approx(np.mean(means), rel=1e-9, abs=rounding)
    assert p % 2 == 0 or (abs(of_neurons) <= gamma * fc.neuron_norms(params) ** (k + 1)).all()
    assert seen["loss"] >= math.log(1 + (p - 1) * math.exp(-np.mean(means)))  # Jensen's inequality


def class_margins(params):  # -> [m]
    """Each neuron's mean over D_p of the class-weighted margin, from its weights (Lemma D.8)."""
    k, p, _ = params["u"].shape
    return fc.neuron_dft(params).real.sum(axis=0) / ((p - 1) * p**k)


@pytest.mark.parametrize("k, p", [(2, 7), (3, 11), (4, 9), (5, 5), (2, 8), (3, 10)])
def test_class_weighted_margin_of_a_cosine_neuron(k, p):
    """At norm 1 it is gamma* times (k+1)^((k+1)/2) prod A / (sum A^2)^((k+1)/2) cos(sum phi_j -
    phi_w) for odd p, (p-2+r)/(p-1) times that for even p; the Nyquist neurons' is that over r."""
    amplitude, phase = rng().uniform(0.5, 2, k + 1), rng(1).uniform(0, 6, k + 1)
    x = amplitude[:, None] * np.cos(phase[:, None] + 2 * np.pi * 2 * np.arange(p) / p)
    expected = ((k + 1) ** ((k + 1) / 2) * amplitude.prod() / (amplitude**2).sum() ** ((k + 1) / 2)
                * math.cos(phase[:k].sum() - phase[k]))
    r = 2 ** (-(k - 1) / 2)
    best, network = 1 if p % 2 else (p - 2 + r) / (p - 1), fc.rotated_network(k, p)
    for params, ratio in (({"u": x[:k, :, None], "w": x[k][None]}, best * expected),
                          (network, 1 if p % 2 else best / r)):  # the last neuron
        size = fc.gamma_star(k, p) * fc.neuron_norms(params) ** (k + 1)
        assert class_margins(params)[-1] == pytest.approx(ratio * size[-1], rel=1e-11)


def with_control_variate(params, a, coefficient):
    """-> loss, gradients on inputs a."""
    return fc.loss_and_gradients(
        lambda piece: fc.mlp_with_control_variate(params, piece, coefficient / len(a)), a)


@pytest.mark.parametrize("k, p", [(2, 7), (2, 6), (3, 5), (3, 2), (4, 3), (4, 4), (5, 3), (5, 2)])
def test_control_variate_is_zero_over_all_inputs(k, p, monkeypatch):
    """Over all of D_p, for any weights and every coefficient, the control variate leaves the
    gradient as it is: that of R is 0, and so is R, which is homogeneous in the weights."""
    monkeypatch.setattr(fc, "PIECE", 7)
    params = gaussian(k, p, 6)
    params["w"] += 0.5  # what all classes share falls out
    loss, gradients = fc.loss_and_gradients(network_of(params), fc.all_inputs(k, p))
    rounding = 1e-12 * max(abs(d).max() for d in gradients.values())
    for coefficient in (0, 0.3, 1):
        varied = with_control_variate(params, fc.all_inputs(k, p), coefficient)
        assert varied[0] == pytest.approx(loss, rel=1e-13)
        assert close(varied[1], gradients, rel=0, abs=rounding)


def lower_bound(k, p, strength, n):
    """phi(N): no network whose norm to the power k+1 is N has a smaller objective (Def. 3.1)."""
    return (np.log1p((p - 1) * np.exp(-fc.gamma_star(k, p) * n)) + strength * n ** (1 / (k + 1)))


def objective(params, strength):
    """Definition 3.1 on all of D_p. -> value, gradients"""
    k, p, _ = params["u"].shape
    loss, gradients = fc.loss_and_gradients(network_of(params), fc.all_inputs(k, p))
    value, pull = fc.penalty(params, strength)
    return loss + value, {name: d + pull[name] for name, d in gradients.items()}


@pytest.mark.parametrize("k, p, best, margin, lambda_0", [
    (2, 7, 0.04075, 8.238, 0.3024), (3, 5, 0.02825, 8.509, 0.3402), (2, 23, 0.0785, 8.960, 0.2424)])
def test_the_papers_objective_is_max_margin_at_every_small_lambda(k, p, best, margin, lambda_0):
    """At 0.005 the rotated network, scaled, reaches phi's least value, with the margin of step 5
    and no gradient; no network beats phi; below lambda_0 that value is below the network of
    zeros', log p, and above lambda_0 it is not."""
    n = np.geomspace(1e-3, 60, 200_001) / fc.gamma_star(k, p)
    x = margin_of_the_optimum(k, p, 0.005)
    size = (x / fc.gamma_star(k, p)) ** (1 / (k + 1))
    params = {name: size * x for name, x in fc.rotated_network(k, p).items()}
    value, gradients = objective(params, 0.005)
    assert x == pytest.approx(margin, abs=6e-4) and value == pytest.approx(best, abs=6e-5)
    assert value == pytest.approx(lower_bound(k, p, 0.005, n).min(), rel=1e-9)
    assert max(abs(d).max() for d in gradients.values()) < 1e-13
    for seed in range(20):
        other = {name: v + 0.1 * size * normal(*v.shape, seed=seed) for name, v in params.items()}
        bound = lower_bound(k, p, 0.005, fc.norm(other) ** (k + 1))
        assert value < bound <= objective(other, 0.005)[0]
    largest = ((math.log(p) - lower_bound(k, p, 0, n)) / n ** (1 / (k + 1))).max()
    assert largest == pytest.approx(lambda_0, abs=6e-5)
    for factor in (0.99, 1.01):
        least = lower_bound(k, p, factor * largest, n).min()
        assert (least < math.log(p)) == (factor < 1)


def margin_of_the_optimum(k, p, strength):
    """Step 5: the larger root x, by bisection between the largest value of the left side and 60."""
    def left(x):
        gamma = fc.gamma_star(k, p)
        return (k + 1) * gamma ** (1 / (k + 1)) * x ** (k / (k + 1)) * (p - 1) / (np.exp(x) + p - 1)

    x = np.linspace(0, 60, 60_001)
    low, high = x[left(x).argmax()], 60
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if left(middle) > strength else (low, middle)
    return low


C = [*(tuple(map(int, h)) for h in "000 110 101 112 121 011 200 211 220 222 231 321".split()),
     (1, 0, -1), (1, -1, 0)]


def test_why_k_3_needs_sixteen_neurons_a_frequency():
    """Steps 7, 8, 12 below rotated_network, in whole numbers, and that its neurons obey 7; the
    phase differences as multiples of pi/3, the sixth roots of unity as x + y e^(i pi/3)."""
    chi = {tuple(n + s * np.ones(3, int)) for n in itertools.product(range(-3, 4), repeat=3)
           if sum(map(abs, n)) in (1, 3) for s in (1, -1)} - {(0, 0, 0)}
    assert all(tuple(np.array(x)[list(order)]) in chi for x in chi
               for order in itertools.permutations(range(3)))  # step 10
    sets = [C + [(0, 1, -1)], C + [(3, 1, 2)]]
    for H in sets:
        assert len(H) == 15
        assert {tuple(np.subtract(g, h)) for g, h in itertools.permutations(H, 2)} <= chi
    amplitudes, phases = fc.rotated_neurons(3)
    t = (phases + np.pi * (amplitudes < 0))[:, :3]
    assert abs(np.exp(1j * t @ np.array(sorted(chi)).T).sum(axis=0)).max() < 1e-13
    root = np.array([(1, 0), (0, 1), (-1, 1), (-1, 0), (0, -1), (1, -1)])
    d = np.array(list(itertools.product(range(6), repeat=3)))
    assert len(d) == 216
    zero = [(root[d @ np.array(sets[0])[:, order].T % 6].sum(axis=1) == 0).all(axis=1)
            for order in map(list, itertools.permutations(range(3)))]  # of each order [216]
    assert zero[0].sum() == 8 and not np.all(zero, axis=0).any()


def test_why_k_4_needs_at_least_36_neurons_a_frequency():
    """Steps 4 to 6 below rotated_network with a set H that random search found: the difference of
    any two of its elements is a chi."""
    chi = {tuple(n + s * np.ones(4, int)) for n in itertools.product(range(-4, 5), repeat=4)
           if sum(map(abs, n)) in (0, 2, 4) for s in (1, -1)} - {(0, 0, 0, 0)}
    H = [(-1, -1, -1, -1), (-1, 0, -2, -1), (-1, 0, -1, -2), (0, -1, -2, -1), (0, -1, -1, -2),
         (0, -1, 0, -1), (0, 0, -2, -2), (0, 0, -1, -3), (0, 0, -1, -1), (0, 0, 0, -2),
         (0, 0, 0, 0), (0, 1, -1, -2), (0, 1, -1, 0), (0, 1, 0, -1), (1, -1, -1, -1),
         (1, 0, -2, -1), (1, 0, -1, -2), (1, 0, -1, 0), (1, 0, 0, -1), (1, 0, 1, 0),
         (1, 1, -1, -1), (1, 1, 0, -2), (1, 1, 0, 0), (1, 1, 1, -1), (1, 1, 1, 1), (1, 2, 0, -1),
         (1, 2, 0, 1), (1, 2, 1, 0), (2, 0, -1, -1), (2, 0, 0, 0), (2, 1, -1, 0), (2, 1, 0, -1),
         (2, 1, 0, 1), (2, 1, 1, 0), (2, 2, 0, 0), (3, 1, 0, 0)]
    assert len(set(H)) == 36
    assert {tuple(np.subtract(g, h)) for g, h in itertools.permutations(H, 2)} <= chi
    amplitudes, phases = fc.rotated_neurons(4)
    t = (phases + np.pi * (amplitudes < 0))[:, :4]
    assert len(t) == 40
    assert abs(np.exp(1j * t @ np.array(sorted(chi)).T).sum(axis=0)).max() < 1e-13


def test_a_narrower_network_where_3_divides_p():
    """k = 3, p = 9: frequency 3 needs only nine neurons, so 57 in all reach gamma*, where
    rotated_network has 64."""
    t = np.pi / 6 * np.array([(5, 1, 1), (9, 9, 5), (5, 5, 1), (7, 3, 3), (3, 11, 11), (5, 5, 5),
                              (7, 7, 3), (3, 3, 3), (1, 1, 1)])
    phases = np.column_stack([t, t.sum(axis=1)])
    nine = fc.cosine_network(3, 9, np.ones((9, 4)), phases)  # of all four frequencies
    nine = {"u": nine["u"][:, :, 18:27], "w": nine["w"][18:27]}  # of frequency 3
    most = fc.rotated_network(3, 9)
    keep = np.r_[0:32, 48:64]  # without frequency 3
    most = {"u": most["u"][:, :, keep], "w": most["w"][keep]}
    nine = {name: v * (1 / 4) ** (1 / 4) / fc.norm(nine) for name, v in nine.items()}
    most = {name: v * (3 / 4) ** (1 / 4) / fc.norm(most) for name, v in most.items()}
    network = {"u": np.concatenate([nine["u"], most["u"]], axis=2),
               "w": np.concatenate([nine["w"], most["w"]])}
    assert network["w"].shape == (57, 9) and fc.rotated_network(3, 9)["w"].shape == (64, 9)
    assert max(error for *_, error in fc.theory_check(network)) < 1e-12


@pytest.mark.parametrize("k, p", [(2, 7), (3, 5), (4, 3)])
def test_the_flow_of_small_weights(k, p):
    """Step 2: the gradient of cross-entropy over D_p at small weights, frequency by frequency. Step
    3: what is conserved, and what grows, along the flow in small steps."""
    params = gaussian(k, p, 4, init_std=1e-4)
    _, gradients = fc.loss_and_gradients(network_of(params), fc.all_inputs(k, p))

    def pairs(params):
        v = np.fft.fft(fc.neurons(params))[:, :, 1:(p - 1) // 2 + 1]
        return np.concatenate([v[:-1], v[-1:].conj()])
    v, kappa = pairs(params), math.factorial(k) / p**k
    slope = kappa * (v.prod(axis=0) / v).conj()
    assert -pairs(gradients) == pytest.approx(slope, rel=1e-6, abs=1e-6 * abs(slope).max())
    q, sizes = v.prod(axis=0), abs(v) ** 2
    for _ in range(3000):  # in steps of a thousandth of each pair's own time
        dt = 1e-3 * abs(v / slope).min(axis=0)
        v = v + dt * kappa * ((v + dt / 2 * slope).prod(axis=0) / (v + dt / 2 * slope)).conj()
        slope = kappa * (v.prod(axis=0) / v).conj()
    now, grown = v.prod(axis=0), abs(v) ** 2 - sizes
    assert now.imag == pytest.approx(q.imag, rel=1e-3, abs=1e-6 * abs(now).max())
    assert (now.real > q.real).all()
    assert grown == pytest.approx(np.tile(grown[:1], (k + 1, 1, 1)), rel=1e-2)


@pytest.mark.parametrize("k, p", [(2, 7), (3, 11), (4, 5)])
def test_winning_frequency(k, p):
    """The time by the closed form; the frequency that is planted as the largest, in each neuron."""
    j, frequencies = np.arange(p), (p - 1) // 2
    largest = 1 + np.arange(6) % frequencies
    radius = 1 + 0.2 * (largest[:, None] == 1 + np.arange(frequencies))  # [m, (p-1)/2]
    wave = np.cos(2 * np.pi * np.outer(1 + np.arange(frequencies), j) / p) * 2 / p
    x = radius @ wave  # U_l(j) = W(j) = radius
    zeta, time = fc.winning_frequency({"u": np.stack([x.T] * k), "w": x})
    assert zeta.tolist() == largest.tolist()
    expected = p**k / (math.factorial(k) * (k - 1) * radius ** (k - 1))
    assert time == pytest.approx(expected, rel=1e-3)
    u, shift = np.stack([np.roll(x.T, 1, axis=0), *[x.T] * (k - 1)]), np.roll(x, 1, axis=1)
    assert fc.winning_frequency({"u": u, "w": shift})[1] == pytest.approx(time, rel=1e-9)
    late = fc.winning_frequency({"u": u, "w": x})[1]  # the phases do not add up
    assert (late > 1.001 * time).all()


@pytest.mark.parametrize("b", [-50, -1, 0, 1])
def test_how_one_layer_of_attention_adds(b):
    """attention's sketch: k = 3, small scores, the mean over heads that differ in psi."""
    p, heads, scale, B = 7, 8, 1e-6, math.exp(b)
    terms = [1, 1, 1], [2, 0, 1], [0, 2, 1], [1, 0, 2], [0, 1, 2], [0, 0, 3]
    x = 2 * np.pi * 2 * np.arange(p) / p
    psi = 2 * np.pi * np.arange(heads)[:, None, None] / heads
    s, ov = -scale * np.cos(x[:, None] + x + psi), np.cos(x[:, None] - x - psi)
    a = fc.all_inputs(3, p)
    got = fc.attend(s, ov, np.full(heads, b), a)[0] / heads
    C = [np.cos(x[a @ term % p, None] - x) for term in terms]
    expected = C[0] - (1 + B) / 2 * (C[1] + C[2]) + B * (C[3] + C[4] - C[5])
    assert (2 + B) ** 2 * got / scale == pytest.approx(expected, abs=1e-8)


@pytest.mark.parametrize("k", [2, 3, 4, 5])
def test_control_variate_takes_the_noise_away(k):
    """At Gaussian weights the mean square of z^k, (2k-1)!! k^k, is 3, 11, 47, 205 times that of the
    product term, k!^2; and about so the variance of w's gradient over batches."""
    ratio = math.prod(range(1, 2 * k, 2)) * k**k / math.factorial(k) ** 2
    params = gaussian(k, 7, 150, init_std=0.05)  # softmax is 1/p
    batches = [rng(seed).integers(0, 7, (64, k)) for seed in range(30)]
    noise, less = (np.var([with_control_variate(params, a, coefficient)[1]["w"] for a in batches],
                          axis=0).sum() for coefficient in (0, 1))
    assert noise / less == pytest.approx(ratio, rel=0.4)


# ---- Layers, each as one writes it, and their gradients ------------------------------------------


def plain_norm(x):
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)


def plain_self_attention(z, w_q, w_k, w_v, w_o):  # [n, k, d] -> [n, k, d]
    """All positions of all inputs, keys after the query masked."""
    q, key, v = (np.einsum("njd,dhe->nhje", z, w) for w in (w_q, w_k, w_v))
    score = q @ key.swapaxes(2, 3) / math.sqrt(q.shape[-1])  # [n, H, query, key]
    score[:, :, np.triu(np.ones(score.shape[2:], bool), 1)] = -np.inf
    return np.einsum("nhje,hed->njd", softmax(score, 3) @ v, w_o)


def plain_block(x, *weights):
    return x + plain_self_attention(plain_norm(x), *weights)


def plain_tables(x, w_q, w_k, w_v, w_p):  # -> S [H, q, a], OV [H, a, c]
    q, key, v = (np.einsum("td,dhe->hte", x, w) for w in (w_q, w_k, w_v))
    return q @ key.swapaxes(1, 2) / math.sqrt(q.shape[-1]), v @ w_p


def plain_attend(s, ov, b, a):  # [H, q, a], [H, a, c], [H], [n, k] -> [n, c]
    """One layer of attention: the last number asks all of them."""
    score = s[:, a[:, -1:], a]  # [H, n, k]
    score[:, :, -1] += b[:, None]
    return np.einsum("hnj,hnjc->nc", softmax(score, 2), ov[:, a])


def number(value, gradients):
    """A number with its gradients, as a layer."""
    return value, lambda dy: [dy * d for d in gradients.values()]


def plain_penalty(u, w):
    norms = [math.sqrt((u[:, :, i] ** 2).sum() + (w[i] ** 2).sum()) for i in range(len(w))]
    return 0.3 * sum(x ** (len(u) + 1) for x in norms) ** (1 / (len(u) + 1))


def plain_control_variate(u, w, coefficient=0.7, n=50):
    """sum of f . DY over the inputs + coefficient R, without the backward: see the layer below."""
    x, right = np.stack([u[j][A[:, j]] for j in range(3)]), A.sum(axis=1) % 4
    h, centred = x.sum(axis=0) ** 3, w - w.mean(axis=1, keepdims=True)
    rest = ((h - 6 * x.prod(axis=0)) * centred.T[right]).sum()
    return (h @ w * DY).sum() + coefficient / n * rest


def control_variate(u, w):
    """The backward adds the gradient of coefficient R to that of dlogits = DY."""
    _, backward = fc.mlp_with_control_variate({"u": u, "w": w}, A, 0.7 / 50)
    return number(plain_control_variate(u, w), backward(DY))


def loss(logits):
    value, backward = fc.cross_entropy(logits, Y)
    return number(value, {"logits": backward()})


Y = np.arange(9) % 4
Z, X = normal(9, 4), normal(6, 4, 5, seed=4)
HEAD = [normal(*shape, seed=i) for i, shape in enumerate([(5, 3, 2)] * 3 + [(3, 2, 5)])]
A = fc.all_inputs(3, 4)[::3]
DY = normal(len(A), 4, seed=7)
LAYERS = {  # the layer; what it is; its inputs
    **{f"power {k}": (lambda z, k=k: fc.kth_power(z, k), lambda z, k=k: z**k, Z)
       for k in range(2, 8)},
    "relu": (fc.relu, lambda z: np.maximum(z, 0), Z),
    "layernorm": (fc.layernorm, plain_norm, 3 + 2 * Z),
    "head circuits": (lambda x, *w: fc.head_tables(x, w), plain_tables, X[0], *HEAD),
    "attend": (lambda s, ov, b: fc.attend(s, ov, b, A),
               lambda s, ov, b: plain_attend(s, ov, b, A),
               normal(3, 4, 4), normal(3, 4, 5, seed=1), normal(3, seed=2)),
    **{f"attention around {last}": (
        lambda x, *w, last=last: fc.residual(x, fc.self_attention, *w, last),
        lambda *x, last=last: plain_block(*x)[:, slice(-last, None)], X, *HEAD)
       for last in (False, True)},
    "control variate": (control_variate, plain_control_variate, normal(3, 4, 2),
                        normal(2, 4, seed=1)),
    **{f"penalty {k}": (lambda u, w: number(*fc.penalty({"u": u, "w": w}, 0.3)), plain_penalty,
                        normal(k, 4, 2), normal(2, 4, seed=1)) for k in (2, 3, 4)},
    "cross-entropy": (loss, lambda x: -np.log(softmax(x, 1)[range(9), Y]).mean(), 3 * Z),
    "feed forward": (fc.feed_forward, lambda x, w1, w2: np.maximum(x @ w1, 0) @ w2,
                     X, normal(5, 6, seed=1), normal(6, 5, seed=2))}


@pytest.mark.parametrize("name", LAYERS)
def test_layer_and_its_gradient(name):
    layer, plain, *inputs = LAYERS[name]
    expected = plain(*inputs)
    *y, _ = layer(*inputs)
    for got, wanted in zip(y, expected if isinstance(expected, tuple) else [expected], strict=True):
        assert got == pytest.approx(wanted, rel=1e-11, abs=1e-12)
    check_gradient(layer, *inputs)


def tables(params):
    return plain_tables(*(params[name] for name in ("E", *fc.HEADS)))


def plain_transformer(params, a):
    """[n, k] -> logits [n, k, p]."""
    x = params["E"][a] + params["P"][:a.shape[1]]  # [n, k, d]
    for i in range(1, 1 + sum(name.startswith("W_Q") for name in params)):
        x = plain_block(x, *(params[f"{name} {i}"] for name in ("W_Q", "W_K", "W_V", "W_O")))
        x = x + np.maximum(plain_norm(x) @ params[f"W_1 {i}"], 0) @ params[f"W_2 {i}"]
    return plain_norm(x) @ params["W_U"]


def small_network(name, k, p):
    """-> weights; the network of weights and inputs; what it is; 40 inputs, some of them equal."""
    a = rng(1).integers(0, p, (40, k))
    if name == "attention":
        return (fc.init_attention(rng(), p, 3, 2, 4, 2, "float64"), fc.attention,
                lambda params, a: plain_attend(*tables(params), params["b"], a), a)
    if "layers" in name:
        params = fc.init_transformer(rng(), k, p, int(name[0]), 3, 2, 5, 6, 1, "float64")
        return params, fc.transformer, lambda *x: plain_transformer(*x)[:, -1], a
    return (gaussian(k, p, 6), lambda params, a: fc.mlp(params, a, name),
            lambda params, a: plain_mlp(params, a, name), a)


@pytest.mark.parametrize("k, p", [(2, 5), (3, 4), (4, 3), (5, 2)])
@pytest.mark.parametrize("name", ["power", "relu", "attention", "1 layers", "2 layers", "3 layers"])
def test_network_and_its_gradient(name, k, p):
    params, network, plain, a = small_network(name, k, p)
    assert network(params, a)[0] == pytest.approx(plain(params, a), rel=1e-9, abs=1e-10)
    deep = {"h": 1e-5, "rel": 1e-6} if "layers" in name else {}

    def layer(*values):
        logits, backward = network(dict(zip(params, values)), a)
        return logits, lambda dlogits: [backward(dlogits)[name] for name in params]
    check_gradient(layer, *params.values(), **deep)
    for j in range(1, k) if deep else ():  # causal: a beginning is as it is in longer inputs
        logits, _ = network(params | {"P": params["P"][:j]}, a[:, :j])
        expected = plain_transformer(params, a)[:, j - 1]
        assert logits == pytest.approx(expected, rel=1e-9, abs=1e-10)


def test_the_gradient_of_a_sure_answer_is_exact():
    """In float32 softmax - 1 would be 0 here; the true gradient is -2 e^-20 / (1 + 2 e^-20)."""
    _, backward = fc.cross_entropy(np.array([[20, 0, 0]], "f4"), np.array([0]))
    small = math.exp(-20) / (1 + 2 * math.exp(-20))
    assert backward() == pytest.approx(np.array([[-2 * small, small, small]]), rel=1e-6)


def test_large_numbers_stay_finite():
    loss, backward = fc.cross_entropy(np.array([[1e4, 0.0], [0.0, 1e4]]), np.array([0, 0]))
    assert loss == 5e3 and loss.dtype == backward().dtype == np.float64
    s = 1e4 * normal(3, 4, 4)
    for y, gradient in (fc.attend(s, normal(3, 4, 5), np.zeros(3), A),
                        fc.self_attention(1e3 * X, *HEAD, False)):
        assert all(np.isfinite(x).all() for x in arrays([y, gradient(np.ones_like(y))]))


@pytest.mark.parametrize("init, variances", [
    (fc.init_mlp, {"u": 1/4, "w": 1/4}),
    (fc.init_attention, {"E": 1/16, "W_Q": 1/160, "W_K": 1/160, "W_V": 1/160, "W_P": 1/8000,
                         "b": 1}),
    (fc.init_transformer, {"E": 1/160, "P": 1/160, "W_Q 1": 1/160, "W_K 1": 1/160, "W_V 1": 1/160,
                           "W_O 1": 1/8000, "W_1 1": 1/160, "W_2 1": 1/320, "W_U": 1/160})])
def test_first_weights(init, variances):
    """Gaussian, float32, each with its variance."""
    params = init(rng(), k=3, p=50, m=200, layers=1, heads=400, d_head=5, d_model=40, d_ff=80,
                  init_std=0.5)
    assert set(params) == set(variances) and {x.dtype for x in params.values()} == {np.dtype("f4")}
    for name, x in params.items():
        assert abs(x.mean()) < 5 * math.sqrt(variances[name] / x.size)
        assert x.var() == pytest.approx(variances[name], rel=5 * math.sqrt(2 / x.size))

# ---- Data and margins ----------------------------------------------------------------------------


def test_all_inputs_and_their_split():
    a = fc.all_inputs(4, 5)
    assert a.tolist() == [list(x) for x in itertools.product(range(5), repeat=4)]
    assert fc.labels(a, 5).tolist() == [sum(x) % 5 for x in a.tolist()]
    for fraction in (0.01, 0.3, 0.5, 1):
        mask, again, other = (fc.split(3, 7, fraction, rng(seed)) for seed in (1, 1, 2))
        assert mask.shape == (343,) and mask.sum() == round(fraction * 343)
        assert (mask == again).all() and (fraction == 1 or (mask != other).any())


def test_the_largest_array_has_its_limit(monkeypatch):
    monkeypatch.setattr(fc, "MAX_BYTES", 8 * 2 * 25)
    assert fc.check_size(np.int8(2), 5) == (2, 5)
    for k, p in ((2, 6), (1, 5), (2, 1), (10**9, 10**9)):
        with pytest.raises(fc.BadInput):
            fc.check_size(k, p)
    monkeypatch.setattr(fc, "PIECE", 1)
    fc.init_mlp(rng(), 2, 2, 4, 1)  # 24 weights, with gradient and moments 384 bytes
    for wide in ({"m": 5}, {"m": 4, "dtype": "float64"}):
        with pytest.raises(fc.BadInput, match="weights"):
            fc.init_mlp(rng(), 2, 2, init_std=1, **wide)


@pytest.mark.parametrize("flags", [
    "--k 2 --p 2 --m 1000000", "--model attention --k 2 --p 5000",
    "--model transformer --k 12 --p 2 --d-ff 100000", "--model transformer --heads 1000000",
    "--m 100000000", "--k 30 --p 2"])
def test_sizes_that_exceed_memory_are_refused_before_training(flags, capsys, monkeypatch):
    assert "too large" in refused(capsys, monkeypatch, train, *flags.split())
    assert not os.listdir()


def test_pieces(monkeypatch):
    """Each input once and in order; the loss and its gradients are those of all together."""
    params, a = gaussian(3, 7, 6), fc.all_inputs(3, 7)
    whole, gradients = fc.loss_and_gradients(network_of(params), a)
    monkeypatch.setattr(fc, "PIECE", 50)
    assert [x.tolist() for x in fc.pieces(a)] == [a[i:i + 50].tolist() for i in range(0, 343, 50)]
    loss, sums = fc.loss_and_gradients(network_of(params), a)
    assert loss == pytest.approx(whole, rel=1e-12) and close(sums, gradients)


@pytest.mark.parametrize("activation", ["power", "relu"])
def test_margins_norm_and_what_is_right(activation, monkeypatch):
    """The network is homogeneous of degree k + 1; its normalized margin is that at norm 1."""
    monkeypatch.setattr(fc, "PIECE", 7)  # many pieces
    params, a, each = gaussian(3, 5, 6), fc.all_inputs(3, 5), np.arange(125)
    f, y = plain_mlp(params, a, activation), fc.labels(a, 5)
    wrong = np.array([np.delete(f[i], y[i]) for i in each])
    margin, weighted = f[each, y] - wrong.max(axis=1), f[each, y] - wrong.mean(axis=1)
    assert np.array(fc.margins(f, y)) == pytest.approx(np.array([margin, weighted]), rel=1e-9)
    right = f.argmax(axis=1) == y
    expected = {"right": right, "accuracy": right.mean(), "margin": margin.min(),
                "loss": -np.log(softmax(f, 1)[each, y]).mean()}
    seen = fc.evaluate(lambda a: fc.mlp(params, a, activation), a)
    assert close({name: seen[name] for name in expected}, expected)
    norm = plain_penalty(*params.values()) / 0.3
    assert fc.norm(params) == pytest.approx(norm, rel=1e-13)
    if activation == "power":
        ratio = fc.normalized_margin({name: 2 * x for name, x in params.items()})
        assert ratio == pytest.approx(margin.min() / norm**4, rel=1e-11)
    none = {name: 0 * x for name, x in params.items()}
    assert fc.evaluate(network_of(none), a)["accuracy"] == 0  # a tie is wrong
    assert fc.norm(none) == 0 == fc.normalized_margin(none)
    assert all((x == 0).all() for x in fc.penalty(none, 0.3)[1].values())


# ---- Learning ------------------------------------------------------------------------------------


def test_adamw_by_hand():
    """Algorithm 2 of Loshchilov and Hutter, lr 0.1, decay 0.5, betas (0.9, 0.98), eps 0.01.
    Step 1, gradient 2:  m = 0.2, v = 0.08; mhat = 0.2/0.1 = 2, vhat = 0.08/0.02 = 4;
                         theta = 1 (1 - 0.05) - 0.1 * 2/(2 + 0.01) = 0.85049751.
    Step 2, gradient -1: m = 0.08, v = 0.0984; mhat = m/0.19 = 0.42105263, vhat = v/0.0396, its
                         root 1.57634030; theta = 0.80797263 - 0.1 * 0.26542391 = 0.78143025."""
    x, m, v = ({"u": np.full((3, 3), value), "b": np.full(1, value)} for value in (1.0, 0.0, 0.0))
    for step, (g, expected, bias) in enumerate([(2.0, 0.85049751, 0.90049751),
                                                (-1.0, 0.78143025, 0.87395512)], 1):
        gradients = {"u": np.full((3, 3), g), "b": np.full(1, g)}
        x, m, v = fc.adamw(x, gradients, m, v, step, 0.1, 0.5, (0.9, 0.98), eps=0.01)
        assert x["u"] == pytest.approx(np.full((3, 3), expected), abs=1e-8)
        assert x["b"] == pytest.approx([bias], abs=1e-8)  # of one axis: no decay


def test_default_settings():
    """The MLP has the theorem's width; max-margin has all inputs and the paper's lambda."""
    assert fc.complete({"k": 4, "p": 5}) == fc.complete({}) | {"k": 4, "p": 5, "m": 256}
    config = fc.complete({"k": 4, "p": 5, "model": "max-margin", "lr": 0.125})
    assert config["penalty"] == 0.005 and config["batch"] == 5**4
    assert config["lr"] == 0.125 and fc.complete(config) == config


def test_learning_rate():
    """Ten steps of warm-up, a held rate, then linearly to 0, where it stays."""
    for given, held in (({}, 50), ({"model": "control-variate", "hold": 0.7}, 70),
                        ({"model": "attention"}, 50), ({"model": "max-margin", "hold": 0}, 0)):
        config = fc.complete({"steps": 100, **given})
        assert [fc.learning_rate(config, step) / config["lr"] for step in range(120)] == (
            pytest.approx([min(1, (step + 1) / 10) * min(1, max(0, 100 - step) / (100 - held))
                           for step in range(120)]))


# ---- Fourier analysis ----------------------------------------------------------------------------


@pytest.mark.parametrize("p", [2, 3, 8, 9, 23])
def test_power_spectrum_folds(p):
    x = normal(p, 4)
    full = abs(np.fft.fft(x, axis=0)) ** 2
    expected = np.array([full[j] + (full[-j] if 0 < 2 * j < p else 0) for j in range(p // 2 + 1)])
    assert fc.power_spectrum(x.T) == pytest.approx(expected.T, rel=1e-12)


@pytest.mark.parametrize("k, p", [(2, 7), (3, 9), (4, 8)])
def test_neuron_spectra(k, p):
    phase, zeta = rng().uniform(-3, 3, (k + 1, 20)), 1 + np.arange(20) % ((p - 1) // 2)
    mean = np.full((k + 1, 20), 0.1)
    mean[-1] = mean[:, -1] = 0.2  # of w, of the last neuron
    x = np.cos(phase[:, None] + 2 * np.pi * zeta * np.arange(p)[:, None] / p) + mean[:, None]
    x[:, :, -2:] *= 0.101, 0.097  # only the last is not live
    s, live = fc.neuron_spectra({"u": x[:k], "w": x[k].T}), np.arange(20) < 19
    power, seen = 0.5 + mean**2, 0.5 + mean**2
    seen[-1] = 0.5  # the mean of w counts in the share of w alone
    weight = (seen.sum(axis=0) * np.array([1] * 18 + [0.101**2, 0.097**2])) ** ((k + 1) / 2)
    error = (phase[:k].sum(axis=0) - phase[k] + np.pi) % (2 * np.pi) - np.pi
    assert close({**s, "phases": np.exp(1j * s["phases"])}, {
        "frequency": zeta, "concentration": 0.5 / seen.mean(axis=0), "shares": 0.5 / power,
        "phases": np.exp(1j * phase), "phase_error": abs(error), "live": live, "single": live,
        "summary": {"max_normalized_power": (0.5 / power)[:, live].mean(), "live_neurons": 19,
                    "single_frequency_fraction": 1, "frequencies_used": (p - 1) // 2,
                    "single_frequency_weight": weight[:19].sum() / weight.sum()}})
    x[k, :, 0] += 100  # a neuron that runs away in w, where no softmax sees it
    assert (fc.neuron_spectra({"u": x[:k], "w": x[k].T})["live"] == live).all()
    rough = x + np.where(zeta == 1, 0.3 * (-1) ** np.arange(p)[:, None], 0)  # single no more
    s = fc.neuron_spectra({"u": rough[:k], "w": rough[k].T})
    assert s["summary"]["frequencies_used"] == (p - 1) // 2 - 1
    assert (s["single"] == (zeta != 1) & s["live"]).all()
    none = fc.neuron_spectra({"u": 0 * x[:k], "w": 0 * x[k].T})["summary"]
    assert set(none.values()) == {0}


@pytest.mark.parametrize("p", [7, 8])
def test_ablate(p):
    """Restricted and excluded add up; a max-margin network is all restricted, nothing excluded."""
    params = gaussian(3, p, 5)
    (kept, rest), zeta = fc.ablate(params), fc.neuron_spectra(params)["frequency"]
    assert close({name: kept[name] + rest[name] for name in params}, params)
    assert fc.neuron_spectra(kept)["concentration"] == pytest.approx(1, rel=1e-12)
    assert fc.power_spectrum(fc.neurons(rest))[:, np.arange(5), zeta].max() < 1e-25
    best = fc.rotated_network(2, p)
    assert close(fc.ablate(best)[0], best, abs=1e-15)
    single = {name: x.astype("float32") for name, x in params.items()}
    assert all(x.dtype == "float32" for part in fc.ablate(single) for x in part.values())


# ---- The circuit, in every network ---------------------------------------------------------------


def circuit(network, a):
    """-> g and its share"""
    seen = fc.evaluate(network, a)
    return seen["circuit"], seen["circuit_share"]


@pytest.mark.parametrize("k, p", [(2, 7), (3, 5), (2, 8)])
def test_circuit_share(k, p, monkeypatch):
    """By the definition, by the whole DFT (Lemma F.2's diagonal); what is left is f without the
    circuit; a share that is planted there is found, and its two frequencies, of which one has 96%;
    all frequencies of a max-margin network."""
    monkeypatch.setattr(fc, "PIECE", 7)
    params, a, j = gaussian(k, p, 6), fc.all_inputs(k, p), np.arange(1, p)
    f, (seen, share) = plain_mlp(params, a), circuit(network_of(params), a)
    centred, y = f - f.mean(axis=1, keepdims=True), a.sum(axis=1)
    g = np.array([np.mean([row[(c + d) % p] for row, c in zip(centred, y)]) for d in range(p)])
    assert seen == pytest.approx(g, rel=1e-9, abs=1e-12)
    assert share == pytest.approx(p**k * g @ g / (centred**2).sum())
    power = abs(np.fft.fftn(f.reshape((p,) * (k + 1)))) ** 2
    diagonal = power[(j,) * k + (p - j,)].sum() / power[..., 1:].sum()
    assert share == pytest.approx(diagonal, rel=1e-9)
    shift = np.arange(p) - y[:, None]
    rest, _ = fc.without_circuit(network_of(params), seen)(a)
    assert rest == pytest.approx(f - g[shift % p], rel=1e-9, abs=1e-10)
    x, rest = 2 * np.pi * shift / p, rest - rest.mean(axis=1, keepdims=True)
    wave = np.cos(x) + 0.2 * np.cos(2 * x)
    logits = 7 + rest + wave * math.sqrt(3 * (rest**2).sum() / (wave**2).sum())
    seen, share = circuit(looked_up(logits), a)
    assert share == pytest.approx(0.75, rel=1e-10)
    assert circuit(looked_up((1e25 * logits).astype("f4")), a)[1] == pytest.approx(0.75, rel=1e-5)
    best, _ = circuit(network_of(fc.rotated_network(k, p)), a)
    assert [fc.circuit_frequencies(x) for x in (best, seen, np.zeros(p))] == [p // 2, 2, 0]
    assert circuit(looked_up(normal(p**k, p, seed=4)), a)[1] < 5 / p**k
    assert circuit(looked_up(np.zeros((p**k, p))), a)[1] == 0


# ---- Attention: its symmetry and its spectra -----------------------------------------------------


@pytest.mark.parametrize("k, p", [(2, 7), (3, 7), (4, 8), (5, 4)])
def test_attention_is_symmetric_and_orbits_leak_nothing(k, p):
    """All orders of a_1 .. a_{k-1}, which give the same logits, are trained on together or not; by
    --split orbits other models do so with all orders of an input. The share of collisions."""
    params, _, _, a = small_network("attention", k, p)
    logits, run = fc.attention(params, a)[0], small_run(**{**ATTENTION, "k": k, "p": p})
    for order in itertools.permutations(range(k - 1)):
        permuted, _ = fc.attention(params, a[:, [*order, k - 1]])
        assert permuted == pytest.approx(logits, rel=1e-11, abs=1e-13)
    for part, count in ((run, k - 1), (small_run(k=k, p=p, split="orbits"), k)):
        grid = part.train.reshape((p,) * k)
        assert all((grid.transpose(*order, *range(count, k)) == grid).all()
                   for order in itertools.permutations(range(count)))
    orbit, count = fc.orbits(k, p, k - 1), math.comb(p + k - 2, k - 1) * p
    assert len(set(orbit)) == count and (orbit <= np.arange(p**k)).all()
    trained = fc.all_inputs(k, p)[run.index]  # each orbit once, all of the training half
    assert (np.diff(trained[:, :-1], axis=1) >= 0).all() and run.train[run.index].all()
    assert len(set(orbit[run.train])) == len(run.index) == round(0.5 * count)
    equal = [len(set(x[:-1])) < k - 1 for x in itertools.product(range(p), repeat=k)]
    assert fc.collisions(k, p).tolist() == equal
    final = max(0, 1 - 1.5 * math.sqrt(np.mean(equal)))
    assert run.config["final_decay"] == pytest.approx(final, rel=1e-12)


@pytest.mark.parametrize("p", [11, 12])
def test_head_spectra_find_planted_cosines(p):
    """Keys 94.6% at frequency 2, the rest at 3; values at 2, at 1 or both; a dead head. Then three
    frequencies of the query, one of the keys. (Untrained heads: see the trained ones.)"""
    def wave(zeta, phase=0.3):
        return np.cos(2 * np.pi * zeta * np.arange(p) / p + phase)

    keys, one = np.outer(wave(1) + wave(4), 4.2 * wave(2) + wave(3)), np.outer(wave(2), wave(2, 1))
    other, most = np.outer(3 * wave(1) + 2 * wave(2), 2 * wave(2) + wave(1)), 17.64 / 18.64
    m = fc.table_spectra(np.stack([keys, keys, 1e-3 * keys]), np.stack([one, other, one]))
    del m["size"]  # see the next test
    assert close(m, {
        "frequency": [2, 2, 2], "token_frequency": [2, 1, 2], "same": [True, False, True],
        "key_share": [most] * 3, "token_share": [1, 4 / 13, 1], "class_share": [1, 0.8, 1],
        "block_share": [1, 1, 1], "live": [True, True, False], "single": [False] * 3,
        "used": [True, False, False],
        "summary": {"live_heads": 2, "frequencies_used": 1, "key_share": most}})
    m = fc.table_spectra(np.outer(wave(1) + wave(4) + wave(5), wave(2))[None], one[None])
    assert m["single"].all() and m["block_share"] == pytest.approx([2 / 3], rel=1e-10)


@pytest.mark.parametrize("p", [7, 8])
def test_spectra_size_life_and_ablation_of_heads(p):
    """The folded DFT of S_h without row means; restricted: S_h at its key frequency, OV_h at its
    token frequency; excluded: both without."""
    params, _, _, a = small_network("attention", 3, p)
    (s, whole), (centred, values) = tables(params), fc.centred_tables(params)
    assert centred == pytest.approx(s - s.mean(axis=2, keepdims=True), rel=1e-12)
    ov = whole - whole.mean(axis=2, keepdims=True)
    ov = ov - ov.mean(axis=1, keepdims=True)
    assert values == pytest.approx(ov, rel=1e-9, abs=1e-12)
    power, v = fc.head_spectrum(centred), np.arange(p // 2 + 1)
    expected = abs(np.fft.fft2(centred)[:, :, v]) ** 2 * np.where(2 * v == p, 1, 2)
    assert power == pytest.approx(expected, rel=1e-10, abs=1e-10)
    m = fc.head_spectra(params)
    assert m["frequency"].tolist() == power.sum(axis=1).argmax(axis=1).tolist()

    def project(zeta):  # of functions on Z_p onto those of frequency zeta
        angle = 2 * np.pi * np.subtract.outer(np.arange(p), np.arange(p)) / p
        return np.cos(zeta * angle) * (1 if 2 * zeta == p else 2) / p

    keys = np.stack([x @ project(z) for x, z in zip(centred, m["frequency"])])
    tokens = np.stack([project(z) @ x for x, z in zip(whole, m["token_frequency"])])
    pairs = (keys, tokens + whole.mean(axis=1, keepdims=True)), (s - keys, whole - tokens)
    for network, pair in zip(fc.ablate_heads(params), pairs):
        assert network(a)[0] == pytest.approx(plain_attend(*pair, params["b"], a), abs=1e-11)
    size = np.sqrt((centred**2).mean(axis=(1, 2)) * (ov**2).mean(axis=(1, 2)))
    assert m["size"] == pytest.approx(size, rel=1e-12)
    scale = np.array([1, 0.051, 0.049]) / size
    scaled = fc.head_spectra(params | {"W_P": scale[:, None, None] * params["W_P"]})
    assert scaled["live"].tolist() == [True, True, False]


# ---- Runs ----------------------------------------------------------------------------------------


ATTENTION = {"model": "attention", "k": 3, "p": 7, "heads": 6, "d_model": 12}
DEEP = {"model": "transformer", "k": 3, "p": 7, "d_model": 12, "d_ff": 20}
CONTROL, EQUAL = {"model": "control-variate"}, {"model": "control-variate", "equal": 0.5}
RUNS = [{}, {"model": "relu"}, {"penalty": 0.3}, CONTROL | {"penalty": 0.1},
        CONTROL | {"train_fraction": 1.0, "batch": 1000}, CONTROL | {"batch": 1000},
        EQUAL | {"p": 8, "weight_decay": 2},
        {"model": "max-margin"}, {"split": "orbits"},
        ATTENTION, DEEP, DEEP | {"layers": 1, "split": "orbits", "clip": 1e3}]


def small_run(**settings):
    return fc.new_run(fc.complete({"k": 2, "p": 11, "steps": 40, "batch": 32, **settings}))


def advance(run, steps=None):
    for _ in range(run.config["steps"] if steps is None else steps):
        run = fc.train_step(run)
        if run.step % 10 == 0:
            run.history = [*run.history, fc.progress(run)]
    return run


def assert_same(a, b):
    assert all(getattr(a, x) == getattr(b, x) for x in ("config", "step", "history", "loss"))
    assert (a.train == b.train).all() and a.loss.dtype == b.loss.dtype == a.config["dtype"]
    for group in fc.GROUPS:
        x, y = getattr(a, group), getattr(b, group)
        assert close(x, y, rel=0, abs=0) and all(x[name].dtype == y[name].dtype for name in x)


def save_runs(**runs):
    """Short runs with these settings, each in a file of that name."""
    for name, settings in runs.items():
        fc.save_run(name, advance(small_run(**settings)))


@pytest.mark.parametrize("steps", [0, 5, 19, 20, 35])
@pytest.mark.parametrize("settings", RUNS)
def test_a_step_is_what_is_written(settings, steps):
    """The control variate with the coefficient of the loss of the step before, and equal sizes; the
    penalty; attention's gate and final_decay; the clip; AdamW. The batch: see
    test_seeds_and_batches."""
    run = advance(small_run(dtype="float64", **settings), steps)
    config, p, before = run.config, run.config["p"], float(run.loss)
    if steps == 35 and "W_P" in run.params:
        run.params["W_P"] *= -1  # worse than guessing: the gate would be negative
    before_it, old = copy.deepcopy(run), run
    run = fc.train_step(run)
    assert_same(old, before_it)  # a step changes nothing of the run that it is given
    old = before_it
    params, a = old.params, fc.next_batch(old)
    loss, gradients = fc.loss_and_gradients(fc.network_of(config, params), a)
    assert (before == math.inf) == (steps == 0) and run.loss == pytest.approx(loss, rel=1e-12)
    if config["model"] == "control-variate":
        _, gradients = with_control_variate(params, a, min(1, before / math.log(p)))
    if config.get("penalty"):
        _, pull = fc.penalty(params, config["penalty"])
        gradients = {name: d + pull[name] for name, d in gradients.items()}
    lr, decay = fc.learning_rate(config, steps), config["weight_decay"]
    if "final_decay" in config:
        decay *= max(0, 1 - loss / math.log(p)) * (config["final_decay"] if steps >= 20 else 1)
    size = math.sqrt(sum((d**2).sum() for d in gradients.values()))
    scale = min(1, config.get("clip", size) / size)
    gradients = {name: scale * d for name, d in gradients.items()}
    betas = config["beta1"], config["beta2"]
    params, first, second = fc.adamw(
        params, gradients, old.first, old.second, steps + 1, lr, decay, betas, config["eps"])
    for x in params.values() if steps < 40 * config.get("equal", 0) else ():
        x -= x.mean(axis=1, keepdims=True)
        x *= config["init_std"] / np.sqrt((x**2).mean(axis=1, keepdims=True))
    assert run.step == steps + 1 and close(run.params, params, rel=1e-9)
    assert close(run.first, first, abs=1e-20) and close(run.second, second, abs=1e-30)


@pytest.mark.parametrize("settings", [*RUNS, {"dtype": "float64"}, CONTROL | {"batch": 33},
                                      EQUAL | {"batch": 33, "dtype": "float64"}])
def test_a_resumed_run_is_the_same_run(settings):
    whole = advance(small_run(**settings))
    for stop in (0, 15, 33):
        fc.save_run(f"{stop}", advance(small_run(**settings), stop))
        assert_same(advance(fc.load_run(f"{stop}"), 40 - stop), whole)


def test_seeds_and_batches():
    """Another seed is another split, other weights, other batches; each training input comes, and
    no other; no two uses of a seed share their random numbers; progress looks at the same inputs
    at each step. Two equal runs are two runs."""
    run, other, large = small_run(), small_run(seed=1), small_run(k=3, p=23, m=4)
    assert run == run != small_run()
    assert (run.train != other.train).any() and (run.params["w"] != other.params["w"]).all()
    uses = ("split",), ("weights",), ("progress",), *(("batch", i) for i in (0, 1, 2**31))
    draws = {fc.stream({"seed": seed}, *use).random() for seed in (0, 1, 2, 2**32, 2**33, 2**63)
             for use in uses}
    assert len(draws) == 36
    first = fc.init_mlp(fc.stream(run.config, "weights"), **run.config)
    assert close(run.params, first, rel=0, abs=0)
    drawn = []
    for run.step in range(19):
        drawn.append(fc.next_batch(run) @ [11, 1])
    assert {len(x) for x in drawn} == {32} and set(np.concatenate(drawn)) == set(run.index)
    run.config["batch"] = len(run.index)
    assert (fc.next_batch(run) @ [11, 1] == run.index).all()  # all of them, each once
    first, large.step = fc.progress(large), 10
    assert first | {"step": 10} == fc.progress(large)


@pytest.mark.parametrize("settings", [{}, {"model": "relu"}, {"model": "max-margin"},
                                      ATTENTION | {"p": 11}, DEEP])
def test_report_and_history(settings):
    """What the report says is what the network does and what its weights are; a line of history
    says the same, as its samples are all inputs here."""
    run = advance(small_run(**{"dtype": "float64", **settings}))
    line, r = run.history[-1], analyze.report(run)
    a = fc.all_inputs(run.config["k"], run.config["p"])
    network = fc.network_of(run.config, run.params)
    margin, _ = fc.margins(network(a)[0], a.sum(axis=1) % run.config["p"])
    for part, name in ((run.train, "train"), (~run.train, "test")):
        loss = line.pop(f"{name}_loss")
        if part.any():
            assert r[f"{name}_accuracy"] == (margin > 0)[part].mean()
            seen = fc.evaluate(network, a[part])
            assert loss == pytest.approx(seen["loss"], rel=1e-9)
    assert line.pop("step") == 40
    assert line.pop("circuit_share") == pytest.approx(seen["circuit_share"], rel=1e-9)
    assert close(line, {name: r[name] for name in line}, rel=1e-12)
    if r["model"] in ("mlp", "max-margin"):
        assert r["margin"] == pytest.approx(margin.min() / fc.norm(run.params) ** 3)
    if r["model"] != "transformer":
        m = (fc.head_spectra if "E" in run.params else fc.neuron_spectra)(run.params)
        counted = m["frequency"][m.get("used", m["single"])]
        assert r["frequency_histogram"] == [(counted == zeta).sum() for zeta in range(1, 6)]


def test_report_of_a_max_margin_network():
    """Twice the rotated network, whose neurons are all ideal, and a dead one."""
    run, best = small_run(k=3, p=7, m=49, dtype="float64"), fc.rotated_network(3, 7)
    run.params = {"u": np.pad(2 * best["u"], ((0, 0), (0, 0), (0, 1))),
                  "w": np.pad(2 * best["w"], ((0, 1), (0, 0)))}
    r = analyze.report(run)
    assert r["circuit_frequencies"] == r["frequencies_used"] == 3
    assert r["frequency_histogram"] == [16, 16, 16] and r["live_neurons"] == 48
    for name in ("train_accuracy", "test_accuracy", "restricted_accuracy", "circuit_share",
                 "margin_ratio"):
        assert r[name] == pytest.approx(1, rel=1e-11), name
    assert max(r["accuracy_without_circuit"], r["circuit_share_at_init"]) < 0.7


def test_grokking_numbers():
    """Train at 20, test at 40; gaps 0, 0.9, 0.5, 0 for 10, 10, 15, 5 steps: area 16.5."""
    curve = [(10, 0.5, 0.6), (20, 0.99, 0.09), (35, 1.0, 0.5), (40, 1.0, 1.0)]
    history = [{"step": s, "train_accuracy": x, "test_accuracy": y} for s, x, y in curve]
    assert analyze.grokking(history) == {"steps_to_train": 20, "steps_to_test": 40,
                                         "largest_gap": 0.9, "gap_area": pytest.approx(16.5)}
    assert analyze.grokking(history[:3])["steps_to_test"] is None
    assert analyze.grokking([])["largest_gap"] is None


@pytest.mark.parametrize("settings, ranges", [
    ({"p": 11, "model": "control-variate", "steps": 600}, {
        "train_accuracy": (1, 1), "test_accuracy": (0.95, 1), "restricted_accuracy": (0.99, 1),
        "excluded_accuracy": (0, 0.2), "phase_error": (0, 0.15), "circuit_share": (0.6, 1),
        "circuit_frequencies": (5, 5), "circuit_share_at_init": (0, 0.05)}),
    ({"p": 13, "steps": 1200}, {
        "train_accuracy": (1, 1), "test_accuracy": (0.99, 1), "frequencies_used": (6, 6),
        "single_frequency_fraction": (0.3, 0.7), "frequencies_used_at_init": (0, 0)}),
    ({"k": 2, "p": 7, "m": 96, "model": "max-margin", "steps": 1500},
     {"margin_ratio": (0.99, 1.0001)}),
    ({"model": "attention", "p": 23, "heads": 32, "steps": 800, "batch": 512, "init_std": 0.3}, {
        "distinct_accuracy": (0.9, 1), "collision_accuracy": (0, 0.95), "key_share": (0.8, 1),
        "key_share_at_init": (0, 0.4), "same_frequency": (0.7, 1), "circuit_share": (0.5, 1),
        "restricted_accuracy": (0.8, 1), "excluded_accuracy": (0, 0.3)}),
    ({"model": "transformer", "p": 7, "train_fraction": 1, "steps": 200, "lr": 3e-3},
     {"train_accuracy": (1, 1), "steps_to_train": (0, 200)})])
def test_training_finds_the_circuit(settings, ranges):
    """Half of 11^3 sums: the other half right, by each neuron's own frequency, with all
    frequencies, phases in order; by the plain rule single frequencies; gamma*; heads that are 2-D
    cosines; two layers without error."""
    r = analyze.report(advance(fc.new_run(fc.complete(settings))))
    for name, (low, high) in ranges.items():
        assert low <= r[name] <= high, name

# ---- Scripts, as a user runs them ----------------------------------------------------------------


def refused(capsys, monkeypatch, module, *argv, before=""):
    """Run a script's main here; it must exit with 2 and one line on stderr. -> that line

    before: what may be the beginning of all lines printed before."""
    monkeypatch.setattr(sys, "argv", [module.__name__ + ".py", *map(str, argv)])
    with pytest.raises(SystemExit) as stop:
        analyze.run_main(module.main)
    captured = capsys.readouterr()
    assert stop.value.code == 2
    assert captured.err.count("\n") == 1 and captured.err.endswith("\n")
    assert all(before and line.startswith(before) for line in captured.out.splitlines())
    return captured.err


TINY = "--k 2 --p 7 --steps 60 --batch 16"


@pytest.mark.parametrize("flags, name, words", [
    (TINY, "mlp-k2-p7-seed0-steps60-batch16",
     "circuit share|single-frequency|at init|phase error|u_2"),
    (f"{TINY} --model max-margin --m 9", "max-margin-k2-p7-seed0-m9-steps60-batch16",
     "of gamma*|test -"),
    (f"{TINY} --model control-variate --equal 0.5",
     "control-variate-k2-p7-seed0-steps60-batch16-equal0.5",
     "k = 2, p = 7, m = 24|control variate, equal sizes for 50% of the steps"),
    ("--model attention --k 3 --p 7 --heads 9 --steps 60 --seed 1",
     "attention-k3-p7-seed1-heads9-steps60",
     "of the held-out|collisions|circuit share|power of keys|same frequency|2 x 2"),
    (f"{TINY} --model transformer --layers 1", "transformer-k2-p7-seed0-layers1-steps60-batch16",
     "99% of test|gap|circuit share|clipped to norm 0.3,")])
def test_train_then_analyze(flags, name, words, capsys):
    """The report at the end of training, again, with more; and as JSON."""
    train.main(flags.split())
    progress, _, report = capsys.readouterr().out.partition("\n\n")
    report, _, end = report.partition("  saved to")
    assert end == f" {name}.npz; python analyze.py {name}.npz looks inside\n"
    assert progress.count("\n") == 11 and " s left  loss " in progress
    analyze.main([f"{name}.npz"])
    text = capsys.readouterr().out
    assert report in text and all(word in text for word in words.split("|"))
    analyze.main([f"{name}.npz", "--json"])
    assert json.loads(capsys.readouterr().out) == analyze.report(fc.load_run(f"{name}.npz"))


def test_theory_and_benchmark_print_their_numbers(capsys):
    analyze.main("--theory --k 3 --p 5".split())
    errors = [float(line.split()[-1]) for line in capsys.readouterr().out.splitlines()
              if line.startswith("  ") and "measured" not in line]
    assert len(errors) == 16 and max(errors) < 1e-11
    train.benchmark(fc.complete({"k": 2, "p": 23}), seconds=0.1)
    sizes, times, memory = capsys.readouterr().out.splitlines()
    assert sizes == "k = 2, p = 23, m = 88, batch 264" and "ms a step" in times and "MiB" in memory


def at_step(monkeypatch, number, happen):
    """Let something happen in this step of training."""
    step = fc.train_step

    def train_step(run):
        if run.step == number - 1:
            happen()
        return step(run)
    monkeypatch.setattr(fc, "train_step", train_step)


def run_script(monkeypatch, module, *argv):
    """Run a script's main as the script does. -> its exit code"""
    monkeypatch.setattr(sys, "argv", [module.__name__ + ".py", *argv])
    with pytest.raises(SystemExit) as stop:
        analyze.run_main(module.main)
    return stop.value.code


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_same_command_goes_on(number, monkeypatch, capsys):
    """A stopped run becomes the run that was never stopped; a finished one is reported again."""
    argv = [*TINY.split(), "--out", "run.npz"]
    with monkeypatch.context() as patch:
        at_step(patch, 26, lambda: os.kill(os.getpid(), number))
        assert run_script(patch, train, *argv) == 128 + number
        assert signal.getsignal(number) is signal.SIG_DFL  # a second signal ends at once
    assert capsys.readouterr().err == "\nstopped at step 25; the same command goes on\n"
    assert fc.load_run("run.npz").step == 25
    train.main(argv)
    report = capsys.readouterr().out.partition("\n\n")[2]
    train.main([*argv[:-1], "whole.npz"])
    assert_same(fc.load_run("run.npz"), fc.load_run("whole.npz"))
    before = Path("run.npz").read_bytes()
    monkeypatch.setattr(fc, "train_step", Mock(side_effect=AssertionError))
    capsys.readouterr()
    train.main(argv)
    assert capsys.readouterr().out == "\n" + report and Path("run.npz").read_bytes() == before


@pytest.mark.parametrize("error", [ZeroDivisionError, BrokenPipeError, KeyboardInterrupt])
def test_whatever_ends_a_run_it_is_saved(error, monkeypatch):
    at_step(monkeypatch, 30, Mock(side_effect=error))
    with pytest.raises(error):
        train.main([*TINY.split(), "--out", "run.npz"])
    assert fc.load_run("run.npz").step == 29


SHELL_RUNS = {  # what becomes of the command in a shell: its exit codes, and how far the run came
    "{} | true; echo ${{PIPESTATUS[0]}}": ("141", None), "{} >&-; echo $?": ("0", 60),
    "{} >/dev/full; echo $?": ("2", None),
    "{} >/dev/null & {} >/dev/null; wait; echo $?": ("0", 60),
    "{} >/dev/null & sleep 0.4; kill -9 $!; {} >/dev/null; echo $?": ("0", 60),
    "{} --steps 100000000 >/dev/null & sleep 1.5; kill -HUP $!; wait $!; echo $?": ("129", None)}


@pytest.mark.parametrize("line", SHELL_RUNS)
def test_in_a_shell(line):
    """Output that nobody reads, that is closed, that is full; two processes with one file; a
    signal. No traceback, and the run is saved."""
    command = f"{sys.executable} {HERE}/train.py {TINY} --out run.npz"
    done = subprocess.run(["bash", "-c", line.format(*[command] * 2)], text=True,
                          capture_output=True)
    code, step = SHELL_RUNS[line]
    assert done.stdout.endswith(f"{code}\n") and "Traceback" not in done.stderr
    run = fc.load_run("run.npz")
    assert (run.step < run.config["steps"]) if step is None else run.step == step
    assert code == "0" or done.stderr.startswith("\nstopped at step ")
    assert "kill -9" in line or os.listdir() == ["run.npz"]


def test_a_signal_that_is_ignored_stays_so(monkeypatch):
    """As of nohup, which ignores SIGHUP."""
    usual = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        monkeypatch.setattr(sys, "argv", ["script"])
        analyze.run_main(lambda argv: None)
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, usual)


def test_what_is_there_is_not_overwritten(capsys, monkeypatch):
    """Another run, something else: refused before any work. More of the same run stays."""
    fc.save_run("run.npz", advance(small_run(), 20))
    Path("text").write_text("not ours")
    monkeypatch.setattr(fc, "train_step", Mock(side_effect=AssertionError))
    same = "--k 2 --p 11 --steps 40 --batch 32".split()
    before = Path("run.npz").read_bytes()
    error = refused(capsys, monkeypatch, train, *same, "--seed", 1, "--out", "run.npz")
    assert "another run (seed 0)" in error
    assert "run file" in refused(capsys, monkeypatch, train, *same, "--out", "text")
    fc.save_run("run.npz", small_run())
    with pytest.raises(fc.BadInput, match="another run"):
        fc.save_run("run.npz", small_run(seed=1))
    assert Path("run.npz").read_bytes() == before and Path("text").read_text() == "not ours"


@pytest.mark.parametrize("changes", [
    {"meta": "{}"}, {"meta": json.dumps({"format": fc.FORMAT})},
    {"meta": json.dumps({"format": fc.FORMAT, "config": {}, "step": "x"})}, {"other": np.zeros(3)}])
def test_nothing_is_saved_over_what_is_no_run(changes):
    np.savez("run.npz", **changes)
    before = Path("run.npz").read_bytes()
    with pytest.raises(fc.BadInput, match="run.npz as a run file"):
        fc.save_run("run.npz", small_run())
    assert Path("run.npz").read_bytes() == before


def test_a_file_that_cannot_be_written_is_named():
    with pytest.raises(fc.BadInput, match="cannot write file: no reason"):
        with fc.whole_file("file"):
            raise OSError("no reason")
    assert os.listdir() == []


def test_a_save_that_fails_leaves_the_one_before(monkeypatch):
    """A full disk; weights that overflowed, where the flags to change are named."""
    fc.save_run("run.npz", small_run())
    run, before = advance(small_run(), 10), Path("run.npz").read_bytes()

    def full(file, **arrays):
        file.write(b"half of it")
        raise OSError(28, "No space left on device")
    with monkeypatch.context() as patch, pytest.raises(fc.BadInput, match="write run.npz: No sp"):
        patch.setattr(np, "savez", full)
        fc.save_run("run.npz", run)
    run.params["w"][0, 0] = np.inf
    with pytest.raises(fc.BadInput, match="overflowed by step 10; try a smaller .*--weight-decay"):
        fc.save_run("run.npz", run)
    assert os.listdir() == ["run.npz"] and Path("run.npz").read_bytes() == before


@pytest.mark.parametrize("flags", [
    "--k 6 --p 2 --m 8 --train-fraction 0.02 --init-std 1e5 --lr 0 --steps 1",
    "--k 4 --p 2 --m 14 --steps 40 --lr 8.885257216107824 --seed 87 --train-fraction 0.3 "
    "--model relu", "--k 2 --p 7 --steps 30 --lr 1000 --init-std 1e6"])
def test_an_overflow_ends_a_run_in_one_line(flags, capsys, monkeypatch):
    """Of logits or of weights: the last good save stays, and can be read."""
    error = refused(capsys, monkeypatch, train, *flags.split(), "--out", "run.npz", before="step ")
    assert "overflowed" in error and "--lr" in error
    assert fc.load_run("run.npz").step == 0 and os.listdir() == ["run.npz"]


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_on_a_terminal(monkeypatch):
    """Progress is one line, written over. It is ended before an overflow is told."""
    screen = io.StringIO()
    screen.isatty = lambda: True
    monkeypatch.setattr(sys, "stdout", screen)
    monkeypatch.setenv("COLUMNS", "300")
    flags = "--k 4 --p 2 --m 14 --seed 87 --train-fraction 0.3 --steps 40 --model relu".split()
    train.main(flags)
    lines = screen.getvalue().splitlines()[:40]
    assert screen.getvalue().startswith("\rstep      1  ") and {len(x) for x in lines[1:]} == {299}
    screen.truncate(0)
    with pytest.raises(fc.BadInput, match="overflowed"):
        train.main([*flags, "--lr", "8.885257216107824"])
    assert "step" in screen.getvalue() and screen.getvalue().endswith("\n")


def test_a_file_keeps_its_link_and_its_mode():
    os.mkdir("there")
    os.symlink("there/run.npz", "run.npz")
    fc.save_run("run.npz", small_run())
    os.chmod("there/run.npz", 0o640)
    fc.save_run("run.npz", advance(small_run(), 3))
    assert os.path.islink("run.npz") and fc.load_run("there/run.npz").step == 3
    assert os.stat("there/run.npz").st_mode & 0o777 == 0o640 and len(os.listdir("there")) == 1


@pytest.mark.parametrize("out", ["keep.npz/", "new/", "folder", ".", "missing/x.npz", "pipe",
                                 "/dev/null", "x" * 300, ""])
def test_places_where_no_run_can_be(out, capsys, monkeypatch):
    """Refused before any work, by the name that was given; nothing is touched."""
    fc.save_run("keep.npz", small_run())
    os.mkdir("folder")
    os.mkfifo("pipe")
    before, names = Path("keep.npz").read_bytes(), sorted(os.listdir())
    monkeypatch.setattr(fc, "train_step", Mock(side_effect=AssertionError))
    error = refused(capsys, monkeypatch, train, *TINY.split(), "--out", out)
    assert f" {out}: " in error or f"cannot read {out} as" in error
    assert sorted(os.listdir()) == names and Path("keep.npz").read_bytes() == before


def test_files_that_are_not_runs():
    """Cut, of another version, something else; and 60 files with a few bytes changed: read whole or
    refused, in one line."""
    path, random, refusals = Path("run.npz"), rng(), []
    fc.save_run(path, advance(small_run(), 20))
    run, whole = fc.load_run(path), path.read_bytes()
    np.savez("other.npz", x=np.zeros(3))
    cases = [b"", b"hello", whole[:100], whole[:len(whole) // 2], whole[:-1], whole[1:],
             Path("other.npz").read_bytes()]
    for _ in range(60):
        content = np.frombuffer(whole, "u1").copy()
        content[random.integers(0, len(whole), 5)] = random.integers(0, 256, 5)
        cases.append(content.tobytes())
    for content in cases:
        path.write_bytes(content)
        try:
            assert_same(fc.load_run(path), run)
        except fc.BadInput as error:
            refusals.append(str(error))
    assert len(refusals) > 46 and "\n" not in "".join(refusals)
    assert all("it is no .npz file" in text for text in refusals[:5])


def edited(path, **changes):
    """Write the run file at path anew, with other arrays (None: without them) or fields of meta."""
    with np.load(path) as file:
        arrays = dict(file)
    meta = json.loads(str(arrays.pop("meta")))
    for name, value in changes.items():
        fields = meta["config"] if name in meta["config"] else meta if name in meta else arrays
        fields[name.replace("_", " ") if fields is arrays else name] = value
    arrays = {name: x for name, x in arrays.items() if x is not None}
    np.savez(path, **arrays, meta=json.dumps(meta))


@pytest.mark.parametrize("words, changes", [
    ("another version", {"format": "format 7"}), ("no setting", {"config": {"steeps": 3}}),
    ("steps", {"steps": 40.5}), ("its step", {"step": 41}), ("its step", {"step": 20.5}),
    ("seconds", {"seconds": math.inf}), ("its step", {"step": -1}),
    ("not possible", {"k": 1}), ("not possible", {"lr": math.nan}), ("arrays", {"m": 45}),
    ("arrays", {"p": 13}), ("arrays", {"params_w": None}), ("arrays", {"more": np.zeros(1)}),
    ("arrays", {"first_u": np.zeros((2, 11, 40, 1), "f4")}),
    ("arrays", {"loss": np.zeros(2, "f4")}), ("arrays", {"params_u": np.array("x")}),
    ("settings", {"config": {"k": 2, "p": 11}}), ("train_accuracy", {"history": [{"step": 3}]}),
    ("int", {"history": [3]}), *(("history", {"history": [
        {"step": 3, "train_accuracy": 1, "test_accuracy": 1} | change]}) for change in (
            {"step": None}, {"train_accuracy": 2}, {"test_accuracy": math.inf},
            {"circuit_share": "x"})), ("its step", {"step": 20.0}),
    ("history", {"history": {}}), ("NoneType", {"history": [
        {"step": 3, "train_accuracy": 1.0, "test_accuracy": None}]}),
    ("arrays", {"second_w": np.zeros((40, 11))})])
def test_files_that_were_edited(words, changes):
    """Refused in one line, which says what is wrong."""
    fc.save_run("run.npz", advance(small_run(), 20))
    edited("run.npz", **changes)
    with pytest.raises(fc.BadInput, match=words) as error:
        fc.load_run("run.npz")
    assert "\n" not in str(error.value)


def test_the_setting_that_does_not_apply_is_named():
    with pytest.raises(fc.BadInput, match="^m does not apply to transformer "):
        fc.complete({"model": "transformer", "k": 2, "m": 9})


def test_different_runs_have_different_files():
    names = {train.file_name(fc.complete(given)) for given in (
        {}, {"seed": 1}, {"k": 2}, {"p": 7}, {"lr": 0.01}, {"lr": 0.02}, {"beta1": 0.5},
        {"seed": 1, "lr": 0.01}, {"model": "relu"}, {"dtype": "float64"})}
    assert len(names) == 10 and {"mlp-k3-p23-seed0.npz", "mlp-k3-p23-seed1-lr0.01.npz"} <= names


def test_tables_of_several_runs(capsys):
    """The reports; those of transformers together by all but the seed."""
    two = DEEP | {"k": 2}
    save_runs(mlp={}, heads=ATTENTION, deep=DEEP, two=two, again=two | {"seed": 1})

    def lines(*argv):
        analyze.main(list(argv))
        return capsys.readouterr().out.splitlines()
    assert sum("circuit share" in line for line in lines("mlp", "heads", "deep")) == 3
    assert [line.split()[:4] for line in lines("deep", "again", "two")[1:]] == [
        ["2", "7", "2", "40"], ["3", "7", "1", "40"]]
    assert [r["k"] for r in json.loads("".join(lines("deep", "two", "--json")))] == [3, 2]
    assert analyze.spread([10, 20, None], ".0f") == "15 (10..20, 2 of 3)"


def test_two_runs_do_not_draw_one_figure():
    for folder in "ab":
        os.mkdir(folder)
        fc.save_run(f"{folder}/run.npz", small_run())
    with pytest.raises(fc.BadInput, match="same name"):
        analyze.main(["a/run.npz", "b/run.npz", "--figures", "."])
    assert sorted(os.listdir()) == ["a", "b"]


# ---- Bad input: one line, exit code 2, and nothing written ---------------------------------------


BAD_TRAIN = """\
--p 1|--k 1|--m 0|--p 2.5|--p|--train-fraction 0|--train-fraction 1.5|--steps 0|--batch 0|--lr -1
--train-fraction 1e-9|--lr nan|--lr 1001|--equal 1|--seed -1|--init-std 0|--fast|--model rnn
--heads 3|--equal 0.3|--model max-margin --equal 0.3|--model transformer --m 9|--beta1 1
--model attention --d-ff 8|--model attention --split random|--split odd|--dtype float16
--k 6 --p 97|--k 200|--model max-margin --k 200|--k 1000000000|--p 1000000007|--m 10000000000
--k 7 --p 2 --m 9 --init-std 1e6|--device auto|--figure 11
--figure 4|--figure 4-k6|--betas 0.9|--resume x"""
BAD_ANALYZE = """|missing.npz|.|--theory run.npz|--theory --p 1|--theory --k 9 --p 97|--theory --p x
--theory --k 14300 --p 5|--theory --k 10000000000|--theory --json|--theory --figures x
--json --figures x run.npz"""


@pytest.mark.parametrize("module, argv", [
    *((train, argv) for argv in BAD_TRAIN.replace("\n", "|").split("|")),
    *((analyze, argv) for argv in BAD_ANALYZE.replace("\n", "|").split("|"))])
def test_bad_flags(module, argv, capsys, monkeypatch):
    refused(capsys, monkeypatch, module, *argv.split())
    assert [fc.load_run(path).step for path in os.listdir()] == [0] * ("1e6" in argv)


def test_without_a_gpu(capsys, monkeypatch):
    no_driver = RuntimeError("cudaErrorInsufficientDriver:\nCUDA driver version is insufficient")
    for cupy in (Mock(zeros=Mock(side_effect=no_driver)), None):  # None: not installed
        monkeypatch.setitem(sys.modules, "cupy", cupy)
        assert "no GPU" in refused(capsys, monkeypatch, train, "--device", "gpu")
        fc.use_device("cpu")


# ---- Numbers of other kinds ----------------------------------------------------------------------


def test_sizes_as_small_numpy_integers():
    """Nothing overflows: int8(11)^2 would be -7."""
    for k, p in ((np.uint8(2), np.uint8(23)), (np.int8(3), np.int8(11)), (np.int64(2), np.int8(8))):
        n, plain = int(p) ** int(k), (int(k), int(p))
        assert len(fc.all_inputs(k, p)) == len(fc.split(k, p, 1, rng())) == n
        assert (fc.orbits(k, p, int(k)) == fc.orbits(*plain, int(k))).all()
        assert fc.digits(np.array([n - 1]), k, p).tolist() == [[int(p) - 1] * int(k)]
        assert fc.gamma_star(k, p) == fc.gamma_star(*plain) > 0
        assert close(fc.rotated_network(k, p), fc.rotated_network(*plain), rel=0, abs=0)
        assert fc.new_run({"k": k, "p": p}).config == fc.complete({"k": plain[0], "p": plain[1]})
    with pytest.raises(fc.BadInput, match="too large"):
        fc.all_inputs(np.int64(64), np.int64(2))
    assert fc.labels(np.full((1, 9), 200, "u1"), np.uint8(251)).tolist() == [9 * 200 % 251]


@pytest.mark.parametrize("name", ["power", "relu", "attention", "2 layers"])
def test_tokens_are_taken_modulo_p(name):
    params, network, _, a = small_network(name, 3, 5)
    expected, _ = network(params, a)
    for shift in (5, -5, 50):
        logits, backward = network(params, a + shift)
        assert (logits == expected).all()
        assert all(np.isfinite(d).all() for d in backward(np.ones_like(logits)).values())
    assert (network(params, a.astype("u1") + np.uint8(250))[0] == expected).all()
    assert (network(params, a.tolist())[0] == expected).all()
    with pytest.raises(TypeError):
        network(params, a + 0.5)


def test_integers_and_lists_are_measured_as_floats():
    """Weights, logits, spectra; labels as a column; masks are refused."""
    whole = {name: np.rint(5 * x) for name, x in gaussian(3, 7, 4).items()}
    small = {name: x.astype("i1") for name, x in whole.items()}
    nested = {name: x.tolist() for name, x in whole.items()}
    for same in (small, nested):
        assert all(close(x, y, rel=1e-5, abs=1e-5)  # float32 of int8
                   for x, y in zip(fc.ablate(same), fc.ablate(whole)))
        assert fc.norm(same) == fc.norm(whole)
        assert (fc.neuron_norms(same) == fc.neuron_norms(whole)).all()
        assert fc.neuron_spectra(same)["summary"] == fc.neuron_spectra(whole)["summary"]
    assert fc.power_spectrum([3, 0, 0]).tolist() == pytest.approx([9, 18])
    f, y = [[5, 3, 1], [0, 0, 100]], [0, 2]
    for logits in (f, np.array(f, "i1"), np.array(f, "f4"), np.array(f, "u1")):
        margin, weighted = fc.margins(logits, y)
        assert margin.tolist() == [2, 100] and weighted.tolist() == [3, 100]
        loss, backward = fc.cross_entropy(logits, np.array([[0], [2]]))  # a column
        assert loss == pytest.approx(math.log(1 + math.exp(-2) + math.exp(-4)) / 2, rel=1e-6)
        assert backward().shape == (2, 3)
    assert fc.margins(f, np.array([[0], [2]]))[0].tolist() == [2, 100]
    for use in (fc.margins, fc.cross_entropy):
        with pytest.raises(ValueError):
            use(np.array(f), [0])
    mask = np.ma.masked_equal([[1, 2]], 1)
    for use in (lambda: fc.labels(mask, 3), lambda: fc.power_spectrum(mask),
                lambda: fc.margins(np.ma.masked_equal(f, 0), y), lambda: fc.tokens(mask, 3),
                lambda: fc.cross_entropy(np.ma.masked_equal(f, 0), y),
                lambda: fc.norm({"u": np.ma.masked_equal(small["u"], 1), "w": small["w"]})):
        with pytest.raises(TypeError, match="masked"):
            use()


def test_gamma_star_of_many_numbers():
    """No power or factorial overflows; the formula in whole numbers is 2 k! over the rest."""
    for k, p in ((171, 3), (40, 7)):
        square = (fractions.Fraction(2 * math.factorial(k)) ** 2
                  / ((2 * k + 2) ** (k + 1) * (p - 1) ** 2 * p ** (k - 1)))
        assert fc.gamma_star(k, p) == pytest.approx(math.sqrt(square), rel=1e-11)


# ---- Small things --------------------------------------------------------------------------------


def test_two_runs_in_two_threads(monkeypatch):
    """Both end and are saved; the caller's signals stay as they were; so does a notebook's output,
    which is no file."""
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    threads = [threading.Thread(target=train.main, args=(f"{TINY} --seed {seed}".split(),))
               for seed in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert before == [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    assert sorted(os.listdir()) == [f"mlp-k2-p7-seed{i}-steps60-batch16.npz" for i in (0, 1)]
    for name in os.listdir():
        run = fc.load_run(name)
        assert_same(run, advance_as(run))
    assert sys.stdout.getvalue().count("saved to") == 2


def advance_as(run):
    """The run with these settings, trained anew, with the lines of progress that train prints."""
    again = fc.new_run(run.config)
    steps = [line["step"] for line in run.history]
    for _ in range(run.step):
        again = fc.train_step(again)
        if again.step in steps:
            again.history = [*again.history, fc.progress(again)]
    return again


def test_logits_that_cannot_be_measured(capsys, monkeypatch):
    """The report of finite weights says so in one line, and so does --json."""
    run = small_run()
    run.params = {name: np.full_like(x, 1e30) for name, x in run.params.items()}
    fc.save_run("run.npz", run)
    for flags in ([], ["--json"]):
        error = refused(capsys, monkeypatch, analyze, "run.npz", *flags)
        assert "the logits overflowed" in error


def test_settings_from_python_are_checked_as_flags_are():
    for error, given in (("model", {"model": "tanh"}), ("k = 3.5", {"k": 3.5}),
                         ("lr = nan", {"lr": math.nan}), ("no setting", {"steeps": 3})):
        with pytest.raises(fc.BadInput, match=error):
            fc.complete(given)
    assert type(fc.complete({"lr": 1})["lr"]) is float


def test_no_share_is_rounded_up_to_all_or_down_to_nothing():
    rows, numbers = "{x:.2%}\n{y:.1%} {x}\n{none}\n{not_there}", {"x": 25325 / 25326, "y": 1e-9}
    assert list(analyze.fill(rows, numbers | {"none": None})) == [
        "99.99%", f"0.1% {25325 / 25326}", "-"]
    for x, text in ((1, "100.00%"), (0, "0.00%"), (0.5, "50.00%"), (1 - 1e-9, "99.99%")):
        assert list(analyze.fill("{x:.2%}", {"x": x})) == [text]


@pytest.mark.parametrize("p, zeta", [(2, 1), (4, 2), (8, 3), (8, 4), (9, 4)])
def test_the_cosine_that_is_drawn(p, zeta):
    """It goes through the points of a vector of one frequency, that of p/2 too."""
    x = 3 * np.cos(2 * np.pi * zeta * np.arange(p) / p + (0.3 if 2 * zeta != p else 0))
    drawn = analyze.cosine_at(x + 0.5, zeta, np.arange(2 * p))
    assert drawn == pytest.approx(np.tile(x, 2), abs=1e-12)


def test_the_strongest_of_different_frequencies():
    """Live ones only, even if one that is not live is larger; of each frequency the largest."""
    size, live = np.array([9, 5, 4, 3, 7]), np.array([False, True, True, True, True])
    frequency = np.array([4, 1, 2, 1, 2])
    assert analyze.strongest(size, live, frequency, 3).tolist() == [4, 1]
    assert analyze.strongest(size, live, frequency, 1).tolist() == [4]


def test_the_typical_neuron():
    """A live one, not of the less pure half, with the frequency nearest to 2."""
    measures = {"concentration": np.array([0.5, 0.9, 0.7, 1.0, 0.8]),
                "frequency": np.array([2, 4, 2, 3, 3])}
    assert analyze.typical(measures, np.array([0, 1, 2, 4])) == 4
    assert analyze.typical(measures, np.array([0, 2])) == 2


def test_each_row_can_be_printed():
    """Each name in a row of a report, or of progress, is one that some report, or line, has."""
    runs = [advance(small_run(**settings), 10) for settings in RUNS]
    known = {"chance", "left", *(name for run in runs for name in analyze.report(run)),
             *(name for run in runs for name in run.history[0])}
    for row in [*analyze.ROWS.splitlines(), *train.PROGRESS.splitlines()]:
        assert analyze.names_of(row) <= known, row


def test_names_with_control_characters_are_written_out(capsys, monkeypatch):
    assert analyze.printable("a\x1b[2Jb\tc") == "a\\x1b[2Jb\\tc"
    error = refused(capsys, monkeypatch, analyze, "no\x1b\n[2Jfile.npz")
    assert "no\\x1b" in error and "\x1b" not in error


def test_defaults_in_help():
    table = [line.split() for line in train.defaults().splitlines()[1:]]
    assert [row[0] for row in table] == list(fc.SETTINGS)
    assert ["steps", "2000", "2000", "2000", "2000", "6000", "2500"] in table


def test_what_a_report_says_at_its_end(capsys):
    """A bar for each frequency that is there, even if it is hardly used; a hint only at the end."""
    r = analyze.report(advance(small_run(), 40)) | {"test_accuracy": 0.5, "steps": 40}
    for step, hint in ((40, True), (39, False)):
        analyze.print_report(r | {"step": step, "frequency_histogram": [100, 1, 0]})
        text = capsys.readouterr().out
        assert f"\n      1    100 {'#' * 50}\n      2      1 #\n      3      0 \n" in text
        assert ("note: what may help" in text) == hint


def test_figures():
    """Of all models, of several transformers one."""
    pytest.importorskip("matplotlib")
    save_runs(mlp={}, heads=ATTENTION, deep=DEEP, deep2=DEEP | {"seed": 1})
    for runs in (["mlp", "heads"], ["deep"], ["deep", "deep2"]):
        analyze.main([*runs, "--figures", "new/drawn"])
    assert sorted(os.listdir("new/drawn")) == ["deep.png", "grokking.png", "heads.png", "mlp.png"]
    run = fc.load_run("mlp")
    measures = fc.neuron_spectra(run.params)
    one = analyze.typical(measures, np.flatnonzero(measures["live"]))
    before, after, _ = analyze.draw_mlp(run)[0].axes[0].lines  # of u_1; the third is the cosine
    for line, params in ((before, fc.new_run(run.config).params), (after, run.params)):
        x = fc.neurons(params)[0, one]
        assert line.get_ydata() == pytest.approx(x / abs(x).max())


def test_the_readme_s_python(capsys):
    """The whole algorithm, with fewer steps, and the six lines of theory, as they stand there."""
    readme = Path(HERE, "README.md").read_text()
    algorithm, theory = re.findall(r"```python\n(.*?)```", readme, re.DOTALL)
    exec(algorithm.replace("steps = 3, 23, 352, 2000", "steps = 3, 23, 352, 300"), {})
    text = capsys.readouterr().out
    assert float(re.search(r"test (\d+\.\d+)%", text)[1]) > 95 and "live 352" in text
    exec(theory, {})
    assert [float(x) for x in capsys.readouterr().out.split()] == pytest.approx([1, 1], rel=1e-12)


# ---- A stand-in for CuPy -------------------------------------------------------------------------
# Its own array class, without conversion to or from numpy behind one's back. Whether what runs on
# it runs on a GPU only a GPU can tell.


class Array(np.lib.mixins.NDArrayOperatorsMixin):
    """An array on a pretended GPU."""

    def __init__(self, x):
        self.hidden = np.asarray(x)

    def __array__(self, *args, **kwargs):
        raise TypeError("implicit conversion to a numpy array")

    def __array_ufunc__(self, ufunc, method, *inputs, out=()):  # x + y; out, in x += y, is x
        return Array(ufunc(*reveal(inputs), *reveal(out)))

    def __getattr__(self, name):
        x = getattr(self.hidden, name)
        return on_device(x) if callable(x) else Array(x) if isinstance(x, np.ndarray) else x

    def __getitem__(self, key):
        return Array(self.hidden[reveal(key, index=True)])

    def __setitem__(self, key, value):
        self.hidden[reveal(key, index=True)] = reveal(value)

    def __len__(self):
        return len(self.hidden)

    def __float__(self):
        return float(self.hidden)

    def __bool__(self):
        return bool(self.hidden)


def reveal(x, index=False):
    """The numpy array inside; a bare one where one on the GPU belongs is an error, but in an index,
    which CuPy takes from the host, too."""
    if isinstance(x, np.ndarray) and not index:
        raise TypeError("implicit conversion from a numpy array")
    if isinstance(x, (list, tuple)):
        return type(x)(reveal(y, index) for y in x)
    return x.hidden if isinstance(x, Array) else x


def on_device(f):
    return lambda *args, **kwargs: Array(f(*reveal(args), **kwargs))


class StandIn:
    """The module cupy."""
    __name__, inf = "cupy", np.inf
    fft = types.SimpleNamespace(fft=on_device(np.fft.fft))

    def __getattr__(self, name):
        return on_device(getattr(np, name))

    def asarray(self, x, dtype=None):
        return x if isinstance(x, Array) else Array(np.array(x, dtype))

    def asnumpy(self, x):
        return x if isinstance(x, np.ndarray) else x.hidden.copy()


@pytest.mark.parametrize("settings", [{}, EQUAL | {"k": 3, "p": 6}, {"model": "max-margin"},
                                      {"model": "relu"}, ATTENTION, DEEP])
@pytest.mark.parametrize("cupy, rel", [("stand-in", 1e-9), ("real", 1e-6)])
def test_a_gpu_gives_the_same_numbers(cupy, rel, settings, monkeypatch, capsys):
    """From the first random draw to the printed report."""
    if cupy == "stand-in":
        monkeypatch.setitem(sys.modules, "cupy", StandIn())
    elif subprocess.call([sys.executable, "-c", "import cupy; cupy.zeros(1)"]):
        pytest.skip("no CuPy, or no GPU that it can use")
    shown = []
    for device in ("cpu", "gpu"):
        fc.use_device(device)
        run = advance(small_run(dtype="float64", **settings), 20)
        assert {isinstance(x, np.ndarray) for x in run.params.values()} == {device == "cpu"}
        assert max(error for *_, error in fc.theory_check(fc.rotated_network(2, 6))) < 1e-11
        fc.save_run(device, run)
        analyze.main([device, "--device", device])
        shown.append(capsys.readouterr().out)
    fc.use_device("cpu")
    assert shown[0].replace("cpu", "gpu") == shown[1] or cupy == "real"
    assert close(fc.load_run("gpu").params, fc.load_run("cpu").params, rel=rel, abs=1e-3 * rel)
