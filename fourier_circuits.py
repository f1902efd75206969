"""Fourier circuits in networks that add modulo p: one module, numpy on a CPU or cupy on a GPU.

After "Fourier Circuits in Neural Networks and Transformers: A Case Study of Modular Arithmetic with
Multiple Inputs" (Li, Liang, Shi, Song, Zhou; arXiv 2402.09469v4, "the paper" below). A network is
given k numbers a_1 .. a_k modulo p and must name their sum modulo p. The paper proves that the best
such network, the one of largest normalized margin, consists of neurons that are cosines of a single
frequency each. It observes that training finds just these neurons, and that the attention matrices
of transformers become two-dimensional cosines.

The file is one thread, from the network to its training, to what training finds and why:

Part 1, the paper
    arrays                numpy or cupy, inputs in pieces
    data                  D_p, its labels, a split                                      Eq. 1
    the network           mlp, its first weights, cross-entropy                         Eq. 2
    learning              adamw, Run, plain_step: the whole training algorithm
    what training finds   neuron_spectra, ablate, evaluate, circuit    Section 4; Figures 1, 2, 5-8
    the best network      norm, max_margin, why neurons are cosines    Theorem 4.1, Lemmas 4.2, F.2
    the constructions     paper_network, rotated_network, theory_check       Lemmas 4.3, E.1, E.3
    the maximum margin by training                                                      Lemma 3.7
Part 2, the paper's transformers
    one layer of attention                                                       Figures 3, 9, 10
    whole blocks                                                                        Figure 4
Part 3, beyond the paper
    the control variate, even p
Part 4, without mathematics
    settings, the machine, run files

Letters that run through the file
    p, k      the modulus; how many numbers are added
    D_p       all p^k inputs
    a, y      inputs [n, k] and their right classes [n]
    c         a class
    m         neurons
    theta     all weights, in code the dict params; theta_i are those of neuron i
    u, w      a neuron's vectors u_1 .. u_k and w, of p numbers each
    f         the network; f(a)[c] is a logit, and f~ is f less its mean over the classes
    zeta      a frequency, 1 .. (p-1)/2
    phi       the phase of a cosine, for which the paper writes theta, too
    gamma*    the largest normalized margin that a network can have
A capital U_1, W or F is the DFT of u_1, w or f, over all their arguments:

    F(j_1, .., j_k, j_c) = sum over a, c of f(a)[c] e^(-2 pi i (j_1 a_1 + .. + j_k a_k + j_c c)/p).

x^k is a power. Other letters belong to a section or a function, which explains them: in part 2, for
example, W_1 and W_Q are weights, H is a number of heads and q a query.

A layer is a function y, backward = layer(x, ..). Its backward takes the gradient of the loss with
respect to y, which is called dy, and returns the gradients with respect to the layer's arguments,
in their order. The backward of a whole network returns a dict like params.
"""

import collections
import contextlib
import contextvars
import copy
import itertools
import json
import math
import numbers
import os
import secrets
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

# ==================================================================================================
# Part 1: the paper
# ==================================================================================================


# ---- Arrays: every array of a network lives in xp, which is numpy, or cupy on a GPU --------------

xp = np
PIECE = 256  # inputs that a network sees at a time: what it computes of them stays in the cache
map_pieces = map  # how a function is applied to pieces, see use_threads
MAX_BYTES = 2**31  # the most for all inputs, or for all weights, gradients and AdamW's moments


class BadInput(ValueError):
    """What the user asked for cannot be done. The message says why and what to do, in one line."""


def to_host(x):
    """A numpy array with the same numbers."""
    return x if isinstance(x, np.ndarray) else xp.asnumpy(x)


def over_pieces(function, a, most=None):
    """function(piece) for the inputs a [n, k] in pieces of `most` inputs, in their order: an
    iterator, which is map(function, pieces) or the same on threads (use_threads in part 4).

    The default is PIECE: the logits of k=4 p=47 take a quarter less time with 256 inputs at a time
    than with 1024, because what is computed of a piece stays in a CPU's cache."""
    most = most or PIECE
    return map_pieces(function, (a[start:start + most] for start in range(0, len(a), most)))


# ---- Data: D_p, all p^k inputs with their sums modulo p (Eq. 1) ----------------------------------
# Inputs and labels are always on the host: they only serve as indices, and cupy takes numpy's.


def check_size(k, p, m=1):
    """Raise BadInput unless k >= 2, p >= 2, m >= 1, and D_p and m neurons fit in memory."""
    if k < 2 or p < 2 or m < 1:
        raise BadInput(f"k = {k} and p = {p} must be at least 2, m = {m} at least 1")
    # A number of an input takes 8 bytes. A weight takes 16: itself, its gradient and two moments,
    # in float32. p^k is not computed where it is above 2^200: that could take long.
    if k * math.log2(p) > 200 or max(8 * k * p**k, 16 * (k + 1) * p * m) > MAX_BYTES:
        raise BadInput(f"too large: k = {k}, p = {p} have p^k inputs, m neurons (k+1) p weights; "
                       f"they exceed {MAX_BYTES // 2**30} GiB; take a smaller k, p or m")


def digits(index, k, p):  # [n] -> [n, k]
    """The inputs with these indices in all_inputs: their digits in base p, a_k the last."""
    a = index[:, None] // p ** np.arange(k - 1, -1, -1)
    a %= p
    return a


def all_inputs(k, p):
    """All of D_p (Eq. 1), int [p^k, k], a_k running fastest. Raises BadInput if it is too large.

    >>> all_inputs(2, 3).tolist()
    [[0, 0], [0, 1], [0, 2], [1, 0], [1, 1], [1, 2], [2, 0], [2, 1], [2, 2]]
    """
    check_size(k, p)
    return digits(np.arange(p**k), k, p)


def labels(a, p):  # [n, k] -> [n]
    """The right classes, a_1 + .. + a_k mod p."""
    return a.sum(axis=1) % p


def orbits(k, p, count):  # -> int [p^k], on the host
    """The orbit of each input of D_p: the inputs that differ from it only in the order of their
    first `count` numbers. An orbit is named by the index of its member whose numbers are sorted.

    >>> orbits(2, 3, 2).tolist()  # [1, 0], at index 3, is in the orbit of [0, 1], at index 1
    [0, 1, 2, 1, 4, 5, 2, 5, 8]
    """
    a = all_inputs(k, p)
    a[:, :count].sort(axis=1)
    return a @ p ** np.arange(k - 1, -1, -1)


def split(k, p, fraction, rng, orbit=None):
    """A random part of D_p to train on: bool [p^k] on the host, True for this fraction of D_p.

    orbit: int [p^k], a group for each input, such as orbits gives; then this fraction of the groups
    is drawn, each as a whole. rng: a numpy Generator. Raises BadInput if the fraction is outside
    (0, 1] or selects nothing."""
    check_size(k, p)
    orbit = np.arange(p**k) if orbit is None else orbit
    groups = np.unique(orbit)
    count = round(fraction * len(groups)) if 0 < fraction <= 1 else 0
    if count == 0:
        raise BadInput(f"train fraction {fraction} must lie in (0, 1] and give at least one of the "
                       f"{len(groups)} inputs or orbits of inputs")
    return np.isin(orbit, rng.permutation(groups)[:count])


# ---- The network: f(a)[c] = sum_i (u_{i,1}(a_1) + .. + u_{i,k}(a_k))^k w_i(c)  (Eq. 2) -----------
# A neuron gives the number a_j the value u_j(a_j), and the class c the weight w(c).


def modulo(a, p, k=None):  # [n, k] -> [n, k]
    """The inputs modulo p. Raises BadInput unless they are an array of whole numbers, with k for
    each input (None: any number of them)."""
    try:
        a = np.asarray(a)
    except ValueError:  # lists of different lengths
        a = np.asarray(None)
    if a.ndim != 2 or a.dtype.kind not in "iu" or k not in (None, a.shape[1]):
        raise BadInput(f"inputs must be whole numbers, an array [n, {k or 'k'}], not {a.dtype} "
                       f"{list(a.shape)}")
    if a.dtype.itemsize < 8:  # p may not fit in such a number
        a = a.astype("int64")
    return a % p


def kth_power(z, k):  # [n, m] -> [n, m]
    """h = z^k, by products: numpy's z**k takes about ten times as long for k > 2."""
    below = z
    for _ in range(k - 2):
        below = below * z  # in the end z^(k-1)

    def backward(dh):
        return k * below * dh

    return z * below, backward


def relu(z):  # [n, m] -> [n, m]
    """h = max(z, 0)."""
    def backward(dh):
        return dh * (z > 0)

    return xp.maximum(z, 0), backward


def mlp(params, a, activation="power"):  # [n, k] -> [n, p]
    """The logits of the network of Eq. 2 for inputs a. params: u [k, p, m] and w [m, p].

    activation: "power" is z^k; "relu" is the other one that Morwani et al. 2024 study (arXiv
    2311.07568). -> logits, backward(dlogits) -> {"u": du, "w": dw}."""
    u, w = params["u"], params["w"]
    k, p, m = u.shape
    a = modulo(a, p, k)
    z = sum(u[j][a[:, j]] for j in range(k))
    h, activation_backward = kth_power(z, k) if activation == "power" else relu(z)

    def backward(dlogits):
        # logits = h w
        dw = h.T @ dlogits
        dz = activation_backward(dlogits @ w.T)
        # z = u_1[a_1] + .. + u_k[a_k]: picking rows of u is a product with one-hot rows, so the
        # gradient is their transpose times dz
        onehot = xp.eye(p, dtype=u.dtype)[a].reshape(len(a), k * p)
        return {"u": (onehot.T @ dz).reshape(k, p, m), "w": dw}

    return h @ w, backward


def relu_mlp(params, a):  # [n, k] -> [n, p]
    """mlp with the activation max(z, 0)."""
    return mlp(params, a, "relu")


def gaussian(sizes, rng, dtype):
    """First weights {name: N(0, std^2)} for sizes {name: (shape, std)}; drawn on the host, so that
    they are the same on any device."""
    return {name: xp.asarray((std * rng.standard_normal(shape)).astype(dtype))
            for name, (shape, std) in sizes.items()}


def init_mlp(rng, k, p, m, init_std, dtype="float32", **_):
    """{"u": [k, p, m], "w": [m, p]}, entries N(0, init_std^2). Other settings (**_) are ignored."""
    return gaussian({"u": ((k, p, m), init_std), "w": ((m, p), init_std)}, rng, dtype)


def cross_entropy(logits, y):  # [n, p], [n] -> scalar
    """Mean of -log softmax(logits)[y]; backward() -> dlogits = (softmax - onehot) / n."""
    n, each = len(y), np.arange(len(y))
    x = logits - logits.max(axis=1, keepdims=True)
    exp = xp.exp(x)
    total = exp.sum(axis=1, keepdims=True)

    def backward():
        dlogits = exp / (n * total)
        dlogits[each, y] -= 1 / n
        return dlogits

    return (xp.log(total)[:, 0] - x[each, y]).mean(), backward


# ---- Learning: cross-entropy and textbook AdamW --------------------------------------------------


def mlp_settings(k=3, p=23, m=None, activation="power", **_):
    """The settings by which an MLP trains, a dict: the same for all k and p, but for the width m.

    Learning rate, betas, batch and warm-up are the paper's. The others are ours. init_std: with
    first weights a few times larger the network memorizes. weight_decay: it makes each neuron drop
    all frequencies but one; without it most neurons stay mixed. hold: the share of the steps before
    the learning rate begins to fall; while it falls, a neuron loses what is left of other
    frequencies. These settings are enough at k=3 p=23; larger sizes need more steps, and k = 4 and
    5 also a larger batch."""
    m = 2 ** (2 * k - 2) * (p - 1) if m is None else m  # the width of paper_network
    check_size(k, p, m)
    return {"k": k, "p": p, "m": m, "activation": activation, "split": "random",
            "train_fraction": 0.5, "steps": 2000, "batch": 1024, "lr": 0.005, "init_std": 0.1,
            "hold": 0.5, "betas": [0.9, 0.98], "eps": 1e-8, "weight_decay": 1}


def learning_rate(config, step):
    """The learning rate at this step, counted from 0. It rises to lr in ten steps and stays there;
    from the share "hold" of all steps on it falls linearly to 0."""
    warm, done = min(1, (step + 1) / 10), step / config["steps"]
    return config["lr"] * warm * min(1, max(0, 1 - done) / (1 - config["hold"]))


def adamw(params, grads, first, second, step, lr, weight_decay, betas, eps=1e-8):
    """One step of AdamW, in place (Loshchilov and Hutter 2019, Algorithm 2 with decay lr * wd).

    params, grads: {name: array}. first, second: exponential means of the gradient and of its
    square, with decay rates betas. They start at 0, so they are too small at first; dividing by
    1 - beta^step corrects this. step counts from 1. Biases, arrays of one axis, do not decay."""
    beta1, beta2 = betas
    for name, x in params.items():
        g, mean, square = grads[name], first[name], second[name]
        mean += (1 - beta1) * (g - mean)
        square += (1 - beta2) * (g * g - square)
        if x.ndim > 1:
            x *= 1 - lr * weight_decay
        root = xp.sqrt(square / (1 - beta2**step))
        x -= lr / (1 - beta1**step) * mean / (root + eps)


class Model(NamedTuple):
    """What is trained, and how. MODELS holds one for each kind of training."""
    settings: Callable  # some settings -> all settings, a dict
    init: Callable  # rng, settings -> first weights
    network: Callable  # params, a -> logits, backward
    measures: Callable  # params -> Fourier measures of the weights, a dict with a "summary"
    step: Callable  # run -> None: one step of training, see train_step
    symmetric: bool = False  # whether the network cannot see the order of a_1 .. a_{k-1} (part 2)
    pieces: int = 1  # how many PIECEs it should see at a time


MODELS = {}  # each is entered at the end of its section


def model_of(config):
    """The Model that these settings train."""
    for kind in ("max_margin", "control_variate"):
        if config.get(kind):
            return MODELS[kind]
    return MODELS["relu" if config.get("activation") == "relu" else config["model"]]


@dataclass(eq=False)
class Run:
    """A training run: everything that its next step depends on. save_run writes it all, but for
    index, the indices of the inputs to train on (see digits), which follows from train. A run has
    its own copy of the settings."""
    config: dict
    params: dict
    first: dict  # AdamW's moments
    second: dict
    train: np.ndarray  # bool [p^k], see split
    loss: np.ndarray  # of the batch before, one number; infinite before the first step
    step: int = 0
    seconds: float = 0.0
    history: list = field(default_factory=list)  # one dict per line of progress

    def __post_init__(self):
        self.config = copy.deepcopy(self.config)
        k, p, train = self.config["k"], self.config["p"], self.train
        if model_of(self.config).symmetric:  # one input of each orbit is enough
            train = train & (orbits(k, p, k - 1) == np.arange(p**k))
        self.index = np.flatnonzero(train)


def stream(config, *use):
    """The random generator for one use of the seed. stream(config, 0) is for the split, 1 for the
    first weights, 3 for the inputs of a line of progress; stream(config, 2, step) is for the batch
    of that step, so that a resumed run draws the same batches."""
    return np.random.default_rng(np.random.SeedSequence(config["seed"], spawn_key=use))


def new_run(config):
    """A run at step 0, with the settings of complete."""
    k, p, model, orbit = config["k"], config["p"], model_of(config), None
    if config["split"] == "orbits":
        orbit = orbits(k, p, k - 1 if model.symmetric else k)
    train = split(k, p, config["train_fraction"], stream(config, 0), orbit)
    params = model.init(stream(config, 1), **config)
    moments = [{name: xp.zeros_like(x) for name, x in params.items()} for _ in range(2)]
    return Run(config, params, *moments, train, xp.asarray(np.array(math.inf, config["dtype"])))


def network_of(config, params):
    """The network with these weights as a function: inputs a -> logits, backward."""
    network = model_of(config).network
    return lambda a: network(params, a)


def sample_inputs(index, k, p, rng, most=2**17):
    """The inputs [n, k] with these indices (see digits); of more than `most` indices, `most` that
    are drawn at random, with replacement."""
    if len(index) > most:
        index = index[rng.integers(0, len(index), most)]
    return digits(index, k, p)


def next_batch(run):
    """The inputs of the next step: random ones of the training part, or all of them if they are no
    more than the batch."""
    config = run.config
    return sample_inputs(run.index, config["k"], config["p"], stream(config, 2, run.step),
                         config["batch"])


def loss_and_gradients(network, a, most=None):
    """Mean cross-entropy on inputs a and its gradients, in pieces of `most` inputs (over_pieces).

    network: a function of inputs, see network_of. -> loss, {name: gradient}."""
    def of_piece(piece):
        logits, backward = network(piece)
        loss, loss_backward = cross_entropy(logits, labels(piece, logits.shape[1]))
        share = len(piece) / len(a)
        return share * loss, backward(share * loss_backward())

    loss, grads = 0, {}
    for piece_loss, piece_grads in over_pieces(of_piece, a, most):
        loss = loss + piece_loss
        for name, d in piece_grads.items():
            grads[name] = grads[name] + d if name in grads else d
    return loss, grads


def update(run, loss, grads, weight_decay):
    """Let AdamW take a run one step on, with these gradients."""
    config, lr = run.config, learning_rate(run.config, run.step)
    run.step += 1
    run.loss = xp.asarray(loss)
    adamw(run.params, grads, run.first, run.second, run.step, lr, weight_decay, config["betas"],
          config["eps"])


def plain_step(run):
    """One step of textbook training: a random batch, the gradient of its mean cross-entropy, AdamW.

    This is the whole algorithm; README.md has it in one piece. The loop over the steps, which only
    calls train_step, and prints and saves now and then, is in train.py."""
    a = next_batch(run)
    loss, grads = loss_and_gradients(network_of(run.config, run.params), a)
    update(run, loss, grads, run.config["weight_decay"])


def train_step(run):
    """One step of training, in place, as the run's model and settings ask: plain_step for the MLP
    by itself."""
    model_of(run.config).step(run)


# ---- What training finds: Fourier analysis of the weights (Section 4), on the host ---------------
# numpy's sign: X(j) = sum_a x(a) e^(-2 pi i j a/p), so that A cos(phi + 2 pi zeta a/p) has
# phi = arg X(zeta). What is measured does not depend on the scale of the weights.


def power_spectrum(x):  # [.., p] -> [.., p // 2 + 1]
    """|X(j)|^2 for j = 0 .. p // 2, with the equal power of -j counted in.

    >>> power_spectrum(np.array([3.0, 0.0, 0.0])).round(9).tolist()
    [9.0, 18.0]
    """
    x, p = to_host(x), x.shape[-1]
    j = np.arange(p // 2 + 1)
    fold = 2 - ((j == 0) | (2 * j == p)).astype(x.dtype)  # these two are their own partners
    return fold * np.abs(np.fft.rfft(x)) ** 2


def scaled_to_one(x, axis=-1):
    """x divided by its largest size along these axes; zeros stay zeros. So the sum of its squares
    is at least 1, or 0, and no square overflows."""
    size = np.abs(x).max(axis=axis, keepdims=True)
    return x / np.where(size > 0, size, 1)


def max_normalized_power(x):  # [.., p] -> [..]
    """The share of all power, that of the mean included, which the strongest frequency zeta >= 1
    has; 0 for a vector of zeros.

    >>> cosine = np.cos(2 * np.pi * 3 * np.arange(11) / 11 + 0.5)
    >>> max_normalized_power(np.array([cosine, cosine + 1])).round(6).tolist()
    [1.0, 0.333333]
    """
    spectrum = power_spectrum(scaled_to_one(to_host(x).astype("float64")))
    return spectrum[..., 1:].max(axis=-1) / np.maximum(spectrum.sum(axis=-1), 1)


def at_frequency(x, zeta):  # [.., p], int [..] -> [.., p]
    """x, on the host, with only the frequency zeta kept along its last axis."""
    p = x.shape[-1]
    transform = np.fft.rfft(x) * (np.arange(p // 2 + 1) == zeta[..., None])
    return np.fft.irfft(transform, n=p).astype(x.dtype)


def neurons(params):  # -> [k+1, m, p], on the host
    """All vectors of all neurons: u_1 .. u_k and then w."""
    u, w = to_host(params["u"]), to_host(params["w"])
    return np.concatenate([u.transpose(0, 2, 1), w[None]])


def neuron_norms(params):  # -> [m]
    """||theta_i||_2 over the (k+1) p numbers of each neuron."""
    u, w = params["u"], params["w"]
    largest = xp.maximum(xp.abs(u).max(), xp.abs(w).max())
    largest = largest + (largest == 0)
    u, w = u / largest, w / largest  # so that no square overflows or vanishes
    return largest * xp.sqrt(xp.einsum("kpm,kpm->m", u, u) + xp.einsum("mp,mp->m", w, w))


def neuron_spectra(params):
    """Each neuron's Fourier measures (Section 4), as a dict of arrays on the host.

    frequency [m]       zeta with most power in u_1 .. u_k and w together
    concentration [m]   share of the neuron's power at zeta, the means included in the whole
    shares [k+1, m]     maximum normalized power of each vector by itself
    phases [k+1, m]     phi_1 .. phi_k, phi_w at zeta
    phase_error [m]     |phi_1 + .. + phi_k - phi_w|, modulo 2 pi in [0, pi] (Theorem 4.1, part 2)
    live [m]            norm above a tenth of the largest
    single [m]          live, and over 95% of the power at zeta
    summary             live_neurons; max_normalized_power, the mean of shares over live neurons;
                        single_frequency_fraction, of the live ones; frequencies_used, by the single
                        ones"""
    vectors, norms = neurons(params).astype("float64"), to_host(neuron_norms(params))
    vectors = scaled_to_one(vectors, axis=(0, 2))  # each neuron by itself
    spectrum = power_spectrum(vectors).sum(axis=0)  # [m, p // 2 + 1]
    zeta, each = 1 + spectrum[:, 1:].argmax(axis=1), np.arange(len(norms))
    concentration = spectrum[each, zeta] / np.maximum(spectrum.sum(axis=1), 1)
    shares = max_normalized_power(vectors)
    phases = np.angle(np.fft.rfft(vectors)[:, each, zeta])
    error = (phases[:-1].sum(axis=0) - phases[-1] + math.pi) % (2 * math.pi) - math.pi
    live = norms > 0.1 * norms.max()
    single = live & (concentration > 0.95)
    return {"frequency": zeta, "concentration": concentration, "shares": shares, "phases": phases,
            "phase_error": abs(error), "live": live, "single": single, "summary": {
                "live_neurons": int(live.sum()),
                "max_normalized_power": float(shares[:, live].mean()) if live.any() else 0.0,
                "single_frequency_fraction": float(single.sum() / max(1, live.sum())),
                "frequencies_used": len(np.unique(zeta[single]))}}


def ablate(params):
    """The causal check: the network restricted to each neuron's own frequency, and the rest.

    -> restricted, excluded: weights that add up to params; their logits do not add up (after Nanda
    et al. 2023, arXiv 2301.05217)."""
    vectors = neurons(params)
    kept = at_frequency(vectors, neuron_spectra(params)["frequency"])
    return [{"u": xp.asarray(x[:-1].transpose(0, 2, 1)), "w": xp.asarray(x[-1])}
            for x in (kept, vectors - kept)]


def margins(logits, y):  # [n, p], [n] -> [n], [n]
    """Margin f[y] - max_{y' != y} f[y'] and class-weighted margin f[y] - mean_{y' != y} f[y'].

    Definition 3.6 weighs the wrong classes; here all weights are 1/(p-1). An input is answered
    right if its margin is above 0: a tie is wrong.

    >>> margin, weighted = margins(np.array([[5.0, 3.0, 1.0]]), np.array([0]))
    >>> margin.tolist(), weighted.tolist()
    ([2.0], [3.0])
    """
    each, p, wrong = np.arange(len(y)), logits.shape[1], logits.copy()
    right = logits[each, y]
    wrong[each, y] = -xp.inf
    return right - wrong.max(axis=1), (p * right - logits.sum(axis=1)) / (p - 1)


class Seen(NamedTuple):
    """What is measured of the logits of a piece of inputs."""
    margin: np.ndarray  # [n], on the host
    loss: float  # the sum of the inputs' cross-entropies
    scale: float  # the largest size in f~; the next two are in units of it, so as not to overflow
    aligned: np.ndarray  # [p], the sum over the inputs of f~(a)[a_1 + .. + a_k + Delta mod p]
    squares: float  # the sum of the squares of all f~(a)[c]


def look(network, a, most=None):
    """One pass of a network over inputs a, in pieces of `most` (over_pieces) -> [Seen, ..], from
    which evaluate and circuit compute their numbers. network: see network_of."""
    def of_piece(piece):
        logits = network(piece)[0]
        p = logits.shape[1]
        y = labels(piece, p)
        centred = logits.astype("float64")
        centred -= centred.mean(axis=1, keepdims=True)
        scale = float(xp.abs(centred).max())
        centred /= scale or 1
        column = xp.asarray((y[:, None] + np.arange(p)) % p)
        aligned = xp.take_along_axis(centred, column, axis=1).sum(axis=0)
        return Seen(to_host(margins(logits, y)[0]), float(cross_entropy(logits, y)[0]) * len(y),
                    scale, to_host(aligned), float((centred * centred).sum()))
    return list(over_pieces(of_piece, a, most))


def evaluate(seen):
    """What a network answers, from what look saw. A dict:

    right            bool [n], on the host; accuracy: their share
    loss             the mean cross-entropy
    margin           the smallest"""
    margin = np.concatenate([piece.margin for piece in seen])
    right = margin > 0
    return {"right": right, "accuracy": float(right.mean()), "margin": float(margin.min()),
            "loss": sum(piece.loss for piece in seen) / len(margin)}


def circuit(seen):
    """The circuit: what of the logits depends on c - a_1 - .. - a_k alone, from what look saw.

    -> g [p], on the host, and its share of the power of the logits, a float:

        g(Delta) = mean over a of f~(a)[a_1 + .. + a_k + Delta],
        share = n sum_Delta g(Delta)^2 / sum_{a,c} f~(a)[c]^2.

    So g(c - a_1 - .. - a_k) is the best approximation of f~(a)[c] by a function of this difference.
    Over D_p it is the part of f~ whose DFT lies on the frequencies (j, .., j, -j), the diagonal of
    Lemma F.2:

        sum over Delta of g(Delta) e^(2 pi i j Delta/p) = F(j, .., j, -j) / p^k     for j != 0.

    The share is 1 for a max-margin network, and 1/n on average for random logits.

    >>> params = rotated_network(2, 5)
    >>> g, share = circuit(look(lambda a: mlp(params, a), all_inputs(2, 5)))
    >>> (g / max_margin(2, 5)).round(6).tolist(), round(share, 6)
    ([0.8, -0.2, -0.2, -0.2, -0.2], 1.0)
    """
    n, top = sum(len(piece.margin) for piece in seen), max(piece.scale for piece in seen) or 1
    g = sum(piece.scale / top * piece.aligned for piece in seen) / n
    squares = sum((piece.scale / top) ** 2 * piece.squares for piece in seen)
    return top * g, float(n * (g @ g) / (squares or 1))


def circuit_frequencies(g):
    """How many frequencies hold 99% of the power of a circuit g [p]."""
    spectrum = power_spectrum(scaled_to_one(g))[1:]
    held = np.cumsum(np.sort(spectrum)[::-1])  # by the 1, 2, .. strongest
    return 1 + int(np.searchsorted(held, 0.99 * held[-1])) if held[-1] > 0 else 0


def without_circuit(network, g):
    """The network without the circuit g, f(a)[c] - g(c - a_1 - .. - a_k): a function of inputs that
    returns logits and, as it cannot be trained, None for backward."""
    def rest(a):
        logits = network(a)[0]
        shift = (np.arange(len(g)) - labels(a, len(g))[:, None]) % len(g)
        return logits - xp.asarray(g.astype(logits.dtype))[shift], None
    return rest


def progress(run):
    """A line of history: loss and accuracy on up to 4096 fixed inputs of the training part and of
    the test part; circuit_share, on the test inputs (if there are none, on the training inputs);
    and the summary of the weights' measures. -> a dict"""
    config, model, network = run.config, model_of(run.config), network_of(run.config, run.params)
    line, rng = {"step": run.step}, stream(config, 3)
    for name, part in (("train", run.train), ("test", ~run.train)):
        a = sample_inputs(np.flatnonzero(part), config["k"], config["p"], rng, 4096)
        line |= {f"{name}_loss": None, f"{name}_accuracy": None}
        if len(a):
            seen = look(network, a, model.pieces * PIECE)
            answers, (_, share) = evaluate(seen), circuit(seen)
            line |= {f"{name}_loss": answers["loss"], f"{name}_accuracy": answers["accuracy"],
                     "circuit_share": share}
    return line | model.measures(run.params)["summary"]


MODELS["mlp"] = Model(mlp_settings, init_mlp, mlp, neuron_spectra, plain_step)
MODELS["relu"] = MODELS["mlp"]._replace(network=relu_mlp)


# ---- The best network there is: norm, margin, gamma* (Def. B.2, Theorem 4.1) ---------------------
#
# Why no network has a larger normalized margin than gamma*, and why the neurons of one that has it
# are cosines (Theorem 4.1 and Lemma 4.2). p is odd.
#
# 1. The smallest margin of a network is at most the mean over D_p of its class-weighted margin, the
#    right logit less the mean of the others, because the largest of these is at least their mean.
# 2. On an input, a neuron has the class-weighted margin p/(p-1) z^k w~(y), where z = u_1(a_1) + ..
#    + u_k(a_k), y is the right class, and w~ is w less its mean.
# 3. Expand z^k. A monomial that lacks some u_j(a_j) averages to 0: if a_j alone varies, y takes
#    each class once, and the mean of w~ is 0. Only the term k! u_1(a_1) .. u_k(a_k) is left.
# 4. Written with DFTs, its mean over D_p is a sum over j = 1 .. p-1 of
#
#        k! / ((p-1) p^k)  U_1(j) .. U_k(j) W(-j)                                     (Lemma D.8).
#
#    The terms of j and p-j are conjugates. So only their real parts count, which are
#
#        k! / ((p-1) p^k)  |U_1(j)| .. |U_k(j)| |W(j)|  cos(phi_1(j) + .. + phi_k(j) - phi_w(j)).
#
# 5. The cosine is at most 1, which it is where the phases add up.
# 6. Let P(j) = |U_1(j)|^2 + .. + |U_k(j)|^2 + |W(j)|^2. The geometric mean of these k+1 numbers is
#    at most their arithmetic mean, and equal to it only if they are all the same:
#
#        |U_1(j)| .. |U_k(j)| |W(j)|  <=  (P(j) / (k+1))^((k+1)/2).
#
# 7. The sum of P(j) over all j is p ||theta_i||^2 (Parseval), and P(j) = P(p-j). The power P(0) of
#    the means counts in this sum, but not in 4.
# 8. The bound of 6 is strictly convex in P(j), as (k+1)/2 > 1. So its sum over j is largest if all
#    power is at one pair: P(zeta) = P(p-zeta) = p ||theta_i||^2 / 2.
# 9. The two terms of this pair add up to
#
#        2 k! / ((p-1) p^k)  (p ||theta_i||^2 / (2k+2))^((k+1)/2)  =  gamma* ||theta_i||^(k+1).
#
# 10. So all neurons together have at most gamma* sum_i ||theta_i||^(k+1). At norm 1 this is gamma*.
# 11. In a network that reaches gamma* there is equality everywhere. In 5, 6 and 8: each nonzero
#     neuron has phases that add up, vectors of one size and mean 0, and a single frequency.
# 12. And in 1: on each input the right logit is larger than each other one by just gamma*. So
#     F(j, .., j, -j) = gamma* p^k for each j != 0 (Lemma F.2). By 3 it is the sum over neurons of
#     k! U_1(j) .. U_k(j) W(-j), in which a frequency that no neuron has would be missing. So all
#     frequencies are used.


def norm(params):
    """||theta||_{2,k+1} = (sum_i ||theta_i||_2^(k+1))^(1/(k+1)) (Def. B.2)."""
    norms, k = neuron_norms(params), len(params["u"])
    largest = norms.max()  # taken out first, so that no power overflows
    if largest == 0:
        return 0.0
    return float(largest * ((norms / largest) ** (k + 1)).sum() ** (1 / (k + 1)))


def max_margin(k, p):
    """gamma*, the largest normalized margin of any network (Theorem 4.1, part 1):

        gamma* = 2 k! / ( (2k+2)^((k+1)/2) (p-1) p^((k-1)/2) ).

    For even p it is larger, see part 3 of this file.

    >>> round(max_margin(2, 3), 6)  # sqrt(2/27) / (sqrt(3) 2)
    0.078567
    """
    gamma = 2 * math.factorial(k) / ((2 * k + 2) ** ((k + 1) / 2) * (p - 1) * p ** ((k - 1) / 2))
    return gamma if p % 2 else gamma * even_factor(k, p)


def normalized_margin(params):
    """The normalized margin of the mlp: the smallest margin over D_p divided by ||theta||^(k+1),
    which is the smallest margin of theta / ||theta||. A float, at most gamma*; 0 if all weights
    are 0."""
    k, p, _ = params["u"].shape
    size = norm(params) or 1
    unit = {name: x / size for name, x in params.items()}
    return evaluate(look(lambda a: mlp(unit, a), all_inputs(k, p)))["margin"]


def neuron_dft(params):  # -> complex [p, m]
    """Each neuron's part of F(j, .., j, -j), from its weights alone (Lemma D.8):

        k! W(-j) U_1(j) .. U_k(j)     for j = 1 .. p-1, and 0 for j = 0.

    Summed over all neurons of a max-margin network of norm 1 this is gamma* p^k at each j != 0
    (Lemma F.2). For any network the sum is p^k times the DFT of its circuit at -j."""
    u, w = params["u"], params["w"]
    dft = xp.conj(xp.fft.fft(w, axis=1).T) * xp.fft.fft(u, axis=1).prod(axis=0)
    dft[0] = 0
    return math.factorial(len(u)) * dft


# ---- The constructions: networks of norm 1 whose margin is gamma* on every input (Theorem 4.1) ---


def half_of_all_signs(k):  # -> [2^(k-1), k]
    """All of {-1, 1}^k with first sign +1."""
    return np.array(list(itertools.product((1,), *[(1, -1)] * (k - 1))))


def cosine_network(k, p, amplitudes, phases):
    """The network of norm 1 with the neurons amplitude cos(phase + 2 pi zeta a/p), for every zeta =
    1 .. (p-1)/2, all of one norm. -> {"u", "w"}, float64. amplitudes, phases: [rows, k+1], of the
    neurons at each zeta, those of w last."""
    zeta = np.arange(1, (p - 1) // 2 + 1)[:, None, None, None]
    angle = phases[:, :, None] + 2 * np.pi * zeta * np.arange(p) / p
    x = (amplitudes[:, :, None] * np.cos(angle)).reshape(-1, k + 1, p)  # [m, k+1, p]
    # Each neuron's norm becomes m^(-1/(k+1)), so that the sum of their powers k+1 is 1.
    x *= max(1, len(x)) ** (-1 / (k + 1)) / np.sqrt((x**2).sum(axis=(1, 2), keepdims=True))
    return {"u": xp.asarray(x[:, :k].transpose(1, 2, 0).copy()), "w": xp.asarray(x[:, k].copy())}


def paper_network(k, p):
    """The paper's max-margin network (Lemmas 4.3, E.3): 2^(2k-2) (p-1) neurons, float64, norm 1.

    For each zeta let x_j = 2 pi zeta a_j/p and x_c = 2 pi zeta c/p. Then cos(x_1 + .. + x_k - x_c)
    is a sum of 2^k products of cosines and sines. Each product is a sum of 2^(k-1) k-th powers,
    because for any numbers d_1 .. d_k

        2^k k! d_1 .. d_k = sum over signs s of s_1 .. s_k (s_1 d_1 + .. + s_k d_k)^k   (Lemma E.1)

    where s and -s give the same. The factor of x_c becomes w, with the signs' product. Raises
    BadInput for even p, which the paper leaves out, and if it is too large."""
    check_size(k, p)  # before 2^k is computed
    check_size(k, p, 2 ** (2 * k - 2) * (p - 1))
    if p % 2 == 0:
        raise BadInput(f"the paper's network is for odd p, not {p}; rotated_network takes any p")
    # A sine is a cosine turned by pi/2: sine_j = 1 makes d_j = cos(x_j - pi/2) = sin x_j. As
    # cos(x - x_c) = cos x cos x_c + sin x sin x_c for x = x_1 + .. + x_k, x_c takes a sine, too,
    # where q, the number of sines, is odd. (-1)^(q // 2) is the sign of the product in cos x or
    # sin x, as in cos(x_1 + x_2) = cos x_1 cos x_2 - sin x_1 sin x_2.
    sine = np.array(list(itertools.product((0, 1), repeat=k)))  # [2^k, k]
    q = sine.sum(axis=1)
    signs = half_of_all_signs(k)
    of_w = (-1) ** (q // 2)[:, None] * signs.prod(axis=1)  # [2^k, 2^(k-1)]
    amplitudes = np.column_stack([np.tile(signs, (len(sine), 1)), of_w.reshape(-1)])
    phases = -np.pi / 2 * np.column_stack([sine, q % 2]).repeat(len(signs), axis=0)
    return cosine_network(k, p, amplitudes, phases)


# Why at k = 2 each of the (p-1)/2 frequencies of a max-margin network needs six neurons, which
# rotated_network has (beyond the paper; p odd). Take the nonzero neurons of one frequency. For each
# let alpha and beta be the phases of u_1 and u_2, so that alpha + beta is that of w (Theorem 4.1),
# and let size be its norm^3.
#
# 1. A neuron, (cos(x_1 + alpha) + cos(x_2 + beta))^2 cos(x_c + alpha + beta) times a number, is a
#    sum of characters e^(i (n_1 x_1 + n_2 x_2 + n_c x_c)), where n_c is 1 or -1, and (n_1, n_2) is
#    (0, 0), (2, 0), (0, 2), (1, 1), (1, -1) or the negative of one of these.
# 2. Let chi = (n_1 + n_c, n_2 + n_c). The coefficient of this character has the phase
#    chi . (alpha, beta). Its absolute value is size times a number that all neurons share.
# 3. By steps 11 and 12 above f(a)[c] is gamma* less gamma*/p at the right class and -gamma*/p at
#    the others, which is 2 gamma*/p times the sum over zeta of cos(x_1 + x_2 - x_c). Its characters
#    have chi = 0. All others cancel: for each chi != 0
#
#        sum over neurons of size e^(i chi . (alpha, beta)) = 0.
#
#    (Neurons of other frequencies cannot help: they have other characters of x_c.)
# 4. These chi are +- (1, 1), (2, 2), (2, 0), (0, 2), (1, -1), (3, 1) and (1, 3). Let
#
#        H = {(0, 0), (1, 1), (2, 2), (1, -1), (2, 0), (3, 1)}.
#
#    The difference of any two of its elements is such a chi; (3, 1) - (2, 2) = (1, -1), say.
# 5. For each neuron let v be the vector of the six numbers e^(i h . (alpha, beta)), h in H. By 3
#    and 4 the matrix sum of size v v^* is the identity times the sum of the sizes: its rank is six.
# 6. It is a sum of as many matrices of rank one as there are neurons. So there are at least six.


def rotated_neurons(k):
    """rotated_network's neurons at each zeta, for cosine_network: amplitudes and phases, both
    [(k+1) 2^(k-1), k+1]."""
    signs = half_of_all_signs(k)
    amplitudes = np.tile(np.column_stack([signs, signs.prod(axis=1)]), (k + 1, 1))
    turns = np.repeat(np.arange(k + 1), len(signs))[:, None] * np.array([1] * k + [k])
    return amplitudes, np.pi / (k + 1) * turns


def rotated_network(k, p):
    """A smaller max-margin network, beyond the paper: (k+1) 2^(k-2) (p-1) neurons.

    It takes only the product of cosines, without sines, and turns it by k + 1 angles psi =
    pi t/(k+1), t = 0 .. k: the phases of u_1 .. u_k by psi, the phase of w by k psi. Over the signs
    of Lemma E.1 the neurons of one psi add up to

        2^(k-1) k! cos(x_1 + psi) .. cos(x_k + psi) cos(x_c + k psi).

    Write each cosine as (e^(i ..) + e^(-i ..)) / 2. In the product of the x's take the term in
    which q of the k exponents have a minus sign; times e^(-i (x_c + k psi)) it has the factor
    e^(-2 i q psi), and

        sum over t = 0 .. k of e^(-2 pi i q t/(k+1)) = k+1 for q = 0, and 0 for q = 1 .. k.

    So only q = 0 is left, with its conjugate: (k+1) 2^-k cos(x_1 + .. + x_k - x_c) in place of the
    product of cosines. For even p, which has a few other neurons, see part 3 of this file. Raises
    BadInput if it is too large. -> {"u", "w"}, float64, of norm 1

    >>> params = rotated_network(3, 5)
    >>> params["w"].shape  # 32 neurons, where the paper's network has 64
    (32, 5)
    >>> round(normalized_margin(params) / max_margin(3, 5), 9)
    1.0

    At k = 2 no max-margin network is narrower than this one, with 3 (p-1) neurons: see above. The
    same argument gives 15 neurons a frequency at k = 3 (p > 6), where this network has 16, and 36
    at k = 4 (p > 8), where it has 40. Of 400 searches for an exact network with 15 at k = 3 none
    found one."""
    check_size(k, p)
    check_size(k, p, (k + 1) * 2 ** (k - 1) * (p // 2))
    if p % 2 == 0:
        return even_rotated_network(k, p)
    return cosine_network(k, p, *rotated_neurons(k))


def theory_check(params):
    """Compare a network of norm 1 with Theorem 4.1 (in full: G.2) on all inputs, by brute force.

    For odd p a network is max-margin if and only if

        f(a)[c] = gamma* (1{c = a_1 + .. + a_k} - 1/p),

    so that all wrong classes are alike (Condition 3.8). There is also a first-order (dual)
    condition, which is necessary: the mean class-weighted margin less the sum of all
    gamma* ||theta_i||^(k+1) is at most 0 for all weights and 0 here, so that its gradient is 0
    here. For even p it is left out.

    -> [(what, measured, expected, error relative to gamma* or to the expected size), ..]"""
    k, p, _ = params["u"].shape
    gamma, onehot, a = max_margin(k, p), xp.eye(p), all_inputs(k, p)

    def of_piece(piece):
        logits, backward = mlp(params, piece)
        target = onehot[labels(piece, p)]
        deviation = xp.abs(logits - gamma * (target - 1 / p)).max()
        wrong = logits[target == 0].reshape(len(piece), p - 1)
        spread = (wrong.max(axis=1) - wrong.min(axis=1)).max()
        dual = backward((target - (1 - target) / (p - 1)) / p**k)
        return float(deviation), float(spread), dual

    deviation, spread, dual = 0.0, 0.0, {name: xp.zeros_like(x) for name, x in params.items()}
    for piece_deviation, piece_spread, grads in over_pieces(of_piece, a):
        deviation, spread = max(deviation, piece_deviation), max(spread, piece_spread)
        dual = {name: dual[name] + d for name, d in grads.items()}
    seen = look(lambda a: mlp(params, a), a)
    diagonal, size = neuron_dft(params).sum(axis=1).real[1:], gamma * p**k
    rows = [("norm ||theta||_{2,k+1}", norm(params), 1, 1),
            ("margin, smallest over inputs", evaluate(seen)["margin"], gamma, gamma),
            ("spread over wrong classes (Cond. 3.8)", spread, 0, gamma),
            ("|f - gamma* (1{c = sum a} - 1/p)|", deviation, 0, gamma),
            ("circuit share of the logits", circuit(seen)[1], 1, 1),
            ("F(j,..,j,-j) by weights, smallest", float(diagonal.min()), size, size),
            ("F(j,..,j,-j) by weights, largest", float(diagonal.max()), size, size)]
    if p % 2:
        _, ideal = penalty(params, gamma)
        residual = max(float(xp.abs(dual[name] - ideal[name]).max()) for name in dual)
        largest = max(float(xp.abs(x).max()) for x in ideal.values())
        rows += [("dual condition, residual", residual, 0, largest)]
    return [(what, got, wanted, abs(got - wanted) / unit) for what, got, wanted, unit in rows]


# ---- The maximum margin, by training (Lemma 3.7) -------------------------------------------------
#
# The paper adds a penalty to cross-entropy (Def. 3.1). As its strength tends to 0, the normalized
# margin of the optimum tends to gamma* (Lemma 3.7). With the penalty
#
#     strength N,   N = sum_i ||theta_i||^(k+1),
#
# odd p, and a network wide enough to be max-margin, more is true: at each strength below
# gamma* (p-1)/p the optimum is a max-margin network.
#
# 1. Let M be the mean over D_p of the class-weighted margin. By Jensen's inequality
#
#        mean cross-entropy  >=  log(1 + (p-1) e^(-M)),
#
#    applied first to the wrong classes of each input and then to the inputs.
# 2. By step 10 of the proof above ("the best network"), M <= gamma* N.
# 3. Any positive multiple of a max-margin network has equality in 1 and 2, and no other network
#    has, but for the one whose weights are all 0.
# 4. What is left to find is the best size. With x = gamma* N and the strength lambda gamma*,
#
#        log(1 + (p-1) e^(-x)) + lambda x
#
#    is least where x = log((p-1) (1-lambda) / lambda), which is above 0.
#
# So at the strength 0.1 gamma* the optimum has the margin log(9 (p-1)) on every input.


def penalty(params, strength):
    """strength * sum_i ||theta_i||^(k+1) -> its value, its gradients."""
    norms, k = neuron_norms(params), len(params["u"])
    pull = strength * (k + 1) * norms ** (k - 1)  # times theta_i this is the gradient by theta_i
    value = strength * (norms ** (k + 1)).sum()
    return value, {"u": pull * params["u"], "w": pull[:, None] * params["w"]}


def max_margin_settings(**given):
    """The settings of --max-margin, a dict: those of the plain rule, but all of D_p at each step, a
    penalty instead of weight decay, and a learning rate that falls from the first step on.

    First weights of a tenth of the plain size, a longer momentum and a smaller eps (the gradients
    of small weights are far below 1e-8) matter at k = 4: without them the margin is 0.994 of gamma*
    there."""
    rule = mlp_settings(**given)
    k, p = rule["k"], rule["p"]
    return rule | {"train_fraction": 1, "batch": p**k, "steps": 750 * k, "lr": 0.015, "hold": 0,
                   "init_std": 0.01, "betas": [0.95, 0.98], "eps": 1e-20, "weight_decay": 0,
                   "penalty": 0.1 * max_margin(k, p)}


def max_margin_step(run):
    """plain_step with the gradient of the penalty added."""
    config, a = run.config, next_batch(run)
    loss, grads = loss_and_gradients(network_of(config, run.params), a)
    _, pull = penalty(run.params, config["penalty"])
    update(run, loss, {name: d + pull[name] for name, d in grads.items()}, config["weight_decay"])


def max_margin_measures(params):
    """neuron_spectra; its summary also has margin_ratio, the normalized margin over gamma*."""
    k, p, _ = params["u"].shape
    measures = neuron_spectra(params)
    measures["summary"]["margin_ratio"] = normalized_margin(params) / max_margin(k, p)
    return measures


MODELS["max_margin"] = MODELS["mlp"]._replace(
    settings=max_margin_settings, measures=max_margin_measures, step=max_margin_step)


# ==================================================================================================
# Part 2: the paper's transformers
# ==================================================================================================


# ---- One layer of attention alone, without positions (Figures 3, 9, 10) --------------------------
# The last number is the query.
#     E [p, d]             token embedding          W_Q, W_K, W_V [d, H, e]   H heads of width e
#     b [H]                own score's bias         W_P [H, e, p]             projection to logits

HEADS = "W_Q", "W_K", "W_V", "W_P"


def init_attention(rng, p, heads, d_head, d_model, init_std, dtype="float32", **_):
    """Embedding N(0, init_std^2 / 4), weights N(0, init_std^2 / fan-in), b ~ N(0, 1), so that heads
    begin with different weights of the query."""
    read = (d_model, heads, d_head), init_std / math.sqrt(d_model)
    write = (heads, d_head, p), init_std / math.sqrt(heads * d_head)
    return gaussian({"E": ((p, d_model), init_std / 2), **dict.fromkeys(HEADS[:3], read),
                     "W_P": write, "b": ((heads,), 1)}, rng, dtype)


def head_circuits(x, weights):  # [p, d], 3 [d, H, e] and [H, e, c] -> S [H, p, p], OV [H, p, c]
    """What heads attend to and what they then write, for the tokens x.

        S_h[q, a] = (x W_Q)_q . (x W_K)_a / sqrt(e),     OV_h[a] = (x W_V W_P)_a

    with the weights of head h. S is the transpose of the paper's attention matrix, divided by
    sqrt(e). S and OV are computed once for each token, not for each input. weights: W_Q, W_K, W_V,
    W_P.
    -> S, OV, backward(dS, dOV) -> dx, [dW_Q, dW_K, dW_V, dW_P]."""
    *read, write = weights
    scale = 1 / math.sqrt(write.shape[1])
    query, key, value = (xp.tensordot(x, w, 1).transpose(1, 0, 2) for w in read)  # [H, p, e]
    s = scale * (query @ key.transpose(0, 2, 1))
    ov = value @ write

    def backward(ds, dov):
        # ov = value write
        dvalue = dov @ write.transpose(0, 2, 1)
        dwrite = value.transpose(0, 2, 1) @ dov
        # s = scale query key^T
        dquery = scale * (ds @ key)
        dkey = scale * (ds.transpose(0, 2, 1) @ query)
        # query, key, value = x w
        dx = sum(xp.tensordot(dy, w, ([0, 2], [1, 2]))
                 for dy, w in zip((dquery, dkey, dvalue), read))
        return dx, [*(xp.tensordot(x, dy, (0, 1)) for dy in (dquery, dkey, dvalue)), dwrite]

    return s, ov, backward


def attend(s, ov, b, a):  # [H, p, p], [H, p, c], [H], [n, k] -> [n, c]
    """The last number of each input, the query, attends to all k numbers, by head_circuits' tables.

        A_hj = softmax over j of S_h[a_k, a_j], for j = k with b_h added
        y = sum over h and j of A_hj OV_h[a_j]

    The pairs (input, place) that hold the same token t all need the row t of OV: they make one
    small product. A dense product with one-hot rows would take several times as long.
    -> y, backward(dy) -> dS, dOV, db."""
    heads, p, classes = ov.shape
    a = modulo(a, p)
    (n, k), query = a.shape, a[:, -1]
    pairs = [xp.asarray(np.flatnonzero(a == t)) for t in range(p)]
    score = s.transpose(1, 2, 0)[query[:, None], a]  # [n, k, H]
    score[:, -1] += b
    A = xp.exp(score - score.max(axis=1, keepdims=True))
    A /= A.sum(axis=1, keepdims=True)
    weight = A.reshape(n * k, heads)
    y = xp.empty((n * k, classes), s.dtype)
    for t, pair in enumerate(pairs):
        y[pair] = weight[pair] @ ov[:, t]

    def backward(dy):
        # y[pair] = weight[pair] ov[t], summed over the places of an input
        dweight, dov = xp.empty_like(weight), xp.empty_like(ov)
        for t, pair in enumerate(pairs):
            d = dy[pair // k]
            dweight[pair] = d @ ov[:, t].T
            dov[:, t] = weight[pair].T @ d
        # A = softmax(score)
        dA = dweight.reshape(n, k, heads)
        dscore = A * (dA - (A * dA).sum(axis=1, keepdims=True))
        # score[:, -1] += b
        db = dscore[:, -1].sum(axis=0)
        # score = s[query, a]
        dscore, ds = dscore.reshape(n * k, heads), xp.empty_like(s)
        onehot = xp.eye(p, dtype=s.dtype)[query]
        for t, pair in enumerate(pairs):
            ds[:, :, t] = dscore[pair].T @ onehot[pair // k]
        return ds, dov, db

    return y.reshape(n, k, classes).sum(axis=1), backward


def attention(params, a):  # [n, k] -> [n, p]
    """logits[c] = sum_h sum_j A_hj OV_h[a_j, c] (attend): each head attends to the k numbers, the
    last of which is the query; b_h is a bias of the query's own score.
    -> logits, backward(dlogits) -> a dict like params.

    How can it add? Take k = 3, numbers a_1, a_2 and the query q, and a head whose b_h is so low
    that the query gives no weight to itself. With s_j = S[q, a_j] the softmax of two scores is

        2 logits = OV[a_1] + OV[a_2] + tanh((s_1 - s_2) / 2) (OV[a_1] - OV[a_2]).

    For small scores tanh x is about x, so that twice the last term is

        s_1 OV[a_1] + s_2 OV[a_2] - s_1 OV[a_2] - s_2 OV[a_1].

    Its last two terms know all three numbers. With x_a = 2 pi zeta a/p, x_c = 2 pi zeta c/p and a
    phase psi of the head take

        S[q, a] = -cos(x_q + x_a + psi),     OV[a, c] = cos(x_a - x_c - psi).

    On average over heads of different psi all is lost that still depends on psi. What is left of
    the logits is, to first order and with C(s) = cos(2 pi zeta (s - c)/p),

        4 logits = C(a_1 + a_2 + q) - C(2 a_1 + q) / 2 - C(2 a_2 + q) / 2.

    Summed over zeta, the right class wins. At a collision, a_1 = a_2, the three terms cancel: such
    a head writes OV[a_1], whatever the query is. So collisions are counted apart.

    The bias b_h is ours: the network has no positions, so that without b_h a head cannot tell the
    query from the other numbers. With B = e^(b_h) the query's own score adds terms,

        (2 + B)^2 logits = C(a_1 + a_2 + q) - (1 + B) / 2 (C(2 a_1 + q) + C(2 a_2 + q))
                           + B (C(2 q + a_1) + C(2 q + a_2) - C(3 q)),

    and at b_h = 0 the classes 2 q + a_1 and 2 q + a_2 are as strong as the right one. Training
    makes b_h negative in most heads. (This is a sketch: the scores that training finds are not
    small, and for k >= 4 terms of higher order in the scores are needed.)"""
    s, ov, circuits_backward = head_circuits(params["E"], [params[name] for name in HEADS])
    logits, attend_backward = attend(s, ov, params["b"], a)

    def backward(dlogits):
        ds, dov, db = attend_backward(dlogits)
        de, dweights = circuits_backward(ds, dov)
        return {"E": de, **dict(zip(HEADS, dweights)), "b": db}

    return logits, backward


def collisions(k, p):  # -> bool [p^k], on the host
    """The inputs with two equal numbers among a_1 .. a_{k-1} (see attention)."""
    others = digits(orbits(k, p, k - 1), k, p)[:, :-1]  # in order
    return (np.diff(others, axis=1) == 0).any(axis=1)


def attention_settings(k=3, p=31, **_):
    """The settings of one layer of attention, a dict. The 160 heads and the width of 128 are the
    paper's; the other numbers are ours.

    init_std: with larger first weights, collisions (see attention) that were not trained on are
    answered wrongly at small k; with smaller ones a few frequencies win before the others have
    grown. weight_decay: without the gate (gated_decay) it ends the learning at k >= 4 before it
    begins. final_decay multiplies it in the second half of the steps, because decay also makes the
    network forget its collisions: it is 1 without any, and 0 where they are 4/9 of the inputs."""
    check_size(k, p)
    distinct = math.prod(max(0, 1 - i / p) for i in range(k - 1))  # the share without collisions
    return {"k": k, "p": p, "heads": 160, "d_head": 4, "d_model": 128, "split": "orbits",
            "train_fraction": 0.5, "steps": 3000 * (k - 1), "batch": 1024, "lr": 3e-3, "hold": 0.5,
            "init_std": 0.6 if k < 5 else 1, "betas": [0.9, 0.98], "eps": 1e-8,
            "weight_decay": 4, "final_decay": max(0, 1 - 1.5 * math.sqrt(1 - distinct))}


def gated_decay(config, step, loss):
    """The weight decay of a step of attention. Its gate, 1 - loss / log p, is 0 at the loss of a
    network that guesses and 1 at loss 0: decay cannot end the learning before it has begun. Once
    the learning rate falls it is multiplied by final_decay."""
    gate = (1 - loss / math.log(config["p"])).clip(0)
    falling = step >= config["hold"] * config["steps"]
    return config["weight_decay"] * (gate * (config["final_decay"] if falling else 1))


def attention_step(run):
    """plain_step with a weight decay that depends on the loss; in larger pieces, because attend
    takes the tokens of a piece one by one in Python."""
    config, a = run.config, next_batch(run)
    most = model_of(config).pieces * PIECE
    loss, grads = loss_and_gradients(network_of(config, run.params), a, most)
    update(run, loss, grads, gated_decay(config, run.step, loss))


def head_tables(params):
    """S_h without the mean of each query's row, which no softmax can see; OV_h without its mean
    token, a bias, and each token's mean over classes, which changes no answer; float64, on host."""
    tables = head_circuits(params["E"], [params[name] for name in HEADS])[:2]
    s, ov = (to_host(x).astype("float64") for x in tables)
    ov = ov - ov.mean(axis=1, keepdims=True)
    return s - s.mean(axis=2, keepdims=True), ov - ov.mean(axis=2, keepdims=True)


def head_spectrum(s):  # [H, p, p] -> [H, p, p // 2 + 1]
    """The power of the 2-D DFT of S_h, whose rows have mean 0: [u, v] is that of query frequency u
    and key frequency v, with the equal power of (-u, -v) counted in. (For an even p the pairs at
    v = p/2 stay apart.)"""
    v, p = np.arange(s.shape[1] // 2 + 1), s.shape[1]
    return np.abs(np.fft.rfft2(s)) ** 2 * (2 - (2 * v == p))


def head_spectra(params):
    """Each head's Fourier measures (Figures 3, 9, 10), see table_spectra."""
    return table_spectra(*head_tables(params))


def table_spectra(s, ov):  # [H, p, p], [H, p, c]
    """The Fourier measures of heads by their head_tables, as a dict of arrays [H] on the host.

    frequency        zeta with most power along the keys of S_h
    token_frequency  that with most power along the tokens of OV_h
    key_share        share of the power of S_h that lies at zeta, along its keys
    token_share      share of the power of OV_h that lies at zeta, along its tokens
    class_share      the same along its classes
    same             the strongest frequencies of keys, tokens and classes are the same
    block_share      share of the power of S_h in its two strongest query frequencies times its two
                     strongest key frequencies: the paper's "two cosines in each dimension"
    size             rms(S_h) rms(OV_h)
    live             a size of at least a twentieth of the largest
    single           live, and key, token and class share are each over 95%
    used             live, and key, token and class share are each over half
    summary          live_heads; key_share, the median of live heads; frequencies_used, by the used
                     ones"""
    each, u = np.arange(len(s)), np.arange(s.shape[1] // 2 + 1)
    largest = np.abs(s).max(axis=(1, 2)) * np.abs(ov).max(axis=(1, 2))
    s, ov = scaled_to_one(s, axis=(1, 2)), scaled_to_one(ov, axis=(1, 2))
    size = largest * np.sqrt((s**2).mean(axis=(1, 2)) * (ov**2).mean(axis=(1, 2)))
    spectrum = head_spectrum(s)
    # Add the query frequency -u to u; 0 and p/2 have no partner.
    folded = spectrum[:, u] + spectrum[:, -u] * (u != -u % s.shape[1])[:, None]
    spectra = (folded.sum(axis=1), power_spectrum(ov.transpose(0, 2, 1)).sum(axis=1),
               power_spectrum(ov).sum(axis=1))  # [H, p // 2 + 1] of keys, tokens, classes
    zeta, token, by_class = (x.argmax(axis=1) for x in spectra)
    shares = [x[each, zeta] / np.maximum(x.sum(axis=1), 1) for x in spectra]
    keys = np.argsort(folded.sum(axis=1), axis=1)[:, -2:]  # the two strongest frequencies
    queries = np.argsort(folded.sum(axis=2), axis=1)[:, -2:]
    block = folded[each[:, None, None], queries[:, :, None], keys[:, None]].sum(axis=(1, 2))
    live, least = size >= 0.05 * size.max(), np.min(shares, axis=0)
    used = live & (least > 0.5)
    measures = {"key_share": shares[0], "token_share": shares[1], "class_share": shares[2],
                "block_share": block / np.maximum(folded.sum(axis=(1, 2)), 1)}
    return {"frequency": zeta, "token_frequency": token, "size": size, "live": live, **measures,
            "same": (zeta == token) & (zeta == by_class), "single": live & (least > 0.95),
            "used": used, "summary": {
                "live_heads": int(live.sum()), "key_share": float(np.median(shares[0][live])),
                "frequencies_used": len(np.unique(zeta[used]))}}


def ablate_heads(params):
    """The causal check: each head with S_h at its key frequency and OV_h at its token frequency
    alone, and each without them. Both keep the mean token of OV_h, which adds a constant.

    -> restricted, excluded: networks, functions of inputs like those of network_of."""
    measures = head_spectra(params)
    s, ov = map(to_host, head_circuits(params["E"], [params[name] for name in HEADS])[:2])
    keys = at_frequency(s, measures["frequency"][:, None])
    tokens = at_frequency(ov.transpose(0, 2, 1), measures["token_frequency"][:, None])
    tokens = tokens.transpose(0, 2, 1)

    def network(s, ov):
        s, ov = xp.asarray(s), xp.asarray(ov)
        return lambda a: attend(s, ov, params["b"], a)

    return network(keys, tokens + ov.mean(axis=1, keepdims=True)), network(s - keys, ov - tokens)


MODELS["attention"] = Model(attention_settings, init_attention, attention, head_spectra,
                            attention_step, symmetric=True, pieces=4)


# ---- Transformers of whole blocks (Figure 4), after Power et al. 2022 ----------------------------
# Blocks, with a causal mask: x += attention(layernorm(x)), x += relu(layernorm(x) W_1) W_2; after
# the last block logits = layernorm(x) W_U.
#     E [p, d]   token embedding                     W_Q, W_K, W_V [d, H, e]   of block 1: "W_Q 1"
#     P [k, d]   position embedding                  W_O [H, e, d]
#     W_U [d, p] logits at the last position         W_1 [d, d_ff], W_2 [d_ff, d]


ATTENTION, FORWARD = ("W_Q", "W_K", "W_V", "W_O"), ("W_1", "W_2")


def init_transformer(rng, k, p, layers, heads, d_head, d_model, d_ff, init_std, dtype="float32",
                     **_):
    """Entries N(0, init_std^2 / fan-in); of the embeddings N(0, init_std^2 / d_model)."""
    d, std = d_model, init_std / math.sqrt(d_model)
    read, write = (d, heads, d_head), (heads, d_head, d)
    block = [*[(read, std)] * 3, (write, init_std / math.sqrt(heads * d_head)),
             ((d, d_ff), std), ((d_ff, d), init_std / math.sqrt(d_ff))]
    weights = {"E": ((p, d), std), "P": ((k, d), std)}
    for i in range(1, layers + 1):
        weights |= {f"{name} {i}": size for name, size in zip(ATTENTION + FORWARD, block)}
    return gaussian(weights | {"W_U": ((d, p), std)}, rng, dtype)


def layernorm(x, eps=1e-5):  # [.., d] -> [.., d]
    """Mean 0 and variance 1, without gain or bias: the weights that read it can hold a gain."""
    last = {"axis": -1, "keepdims": True}
    centred = x - x.mean(**last)
    scale = 1 / xp.sqrt((centred * centred).mean(**last) + eps)
    z = centred * scale

    def backward(dz):  # a change e of x changes scale by -scale^2 mean(z e)
        return scale * (dz - dz.mean(**last) - z * (z * dz).mean(**last))

    return z, backward


def self_attention(x, w_q, w_k, w_v, w_o, last):  # [n, k, d] -> [n, k, d], or [n, 1, d] if last
    """Causal attention: each position is a query for itself and those before it.

        A_hij = softmax over j <= i of q_hi . k_hj / sqrt(e),  y_i = sum_h sum_j A_hij v_hj W_O[h]

    last: only the last position is a query, as in the last block, where no other is needed.
    -> y, backward(dy) -> dx, [dW_Q, dW_K, dW_V, dW_O]."""
    k, scale = x.shape[1], 1 / math.sqrt(w_o.shape[1])
    source = x[:, -1:] if last else x  # [n, i, d]
    q, key, v = xp.tensordot(source, w_q, 1), xp.tensordot(x, w_k, 1), xp.tensordot(x, w_v, 1)
    score = scale * xp.einsum("nihe,njhe->nijh", q, key)
    position = xp.arange(k)
    later = position[k - source.shape[1]:, None] < position  # [i, j]
    score = xp.where(later[:, :, None], -xp.inf, score)
    A = xp.exp(score - score.max(axis=2, keepdims=True))
    A /= A.sum(axis=2, keepdims=True)
    mix = xp.einsum("nijh,njhe->nihe", A, v)
    y = xp.tensordot(mix, w_o, 2)

    def backward(dy):
        # y = mix w_o
        dw_o = xp.tensordot(mix, dy, ([0, 1], [0, 1]))
        dmix = xp.tensordot(dy, w_o, (2, 2))
        # mix = sum_j A v
        dA = xp.einsum("nihe,njhe->nijh", dmix, v)
        dv = xp.einsum("nijh,nihe->njhe", A, dmix)
        # A = softmax(score)
        dscore = A * (dA - (A * dA).sum(axis=2, keepdims=True))
        # score = scale q . key
        dq = scale * xp.einsum("nijh,njhe->nihe", dscore, key)
        dkey = scale * xp.einsum("nijh,nihe->njhe", dscore, q)
        # q, key, v = source w_q, x w_k, x w_v
        dx, dweights = xp.zeros_like(x), []
        for seen, w, dz in ((source, w_q, dq), (x, w_k, dkey), (x, w_v, dv)):
            dweights.append(xp.tensordot(seen, dz, ([0, 1], [0, 1])))
            dx[:, k - seen.shape[1]:] += xp.tensordot(dz, w, ([2, 3], [1, 2]))
        return dx, [*dweights, dw_o]

    return y, backward


def feed_forward(x, w1, w2):  # [n, j, d], [d, d_ff], [d_ff, d] -> [n, j, d]
    """relu(x W_1) W_2."""
    h, relu_backward = relu(xp.tensordot(x, w1, 1))

    def backward(dy):
        dz = relu_backward(xp.tensordot(dy, w2, (2, 1)))
        dw1 = xp.tensordot(x, dz, ([0, 1], [0, 1]))  # h = relu(x w1)
        dw2 = xp.tensordot(h, dy, ([0, 1], [0, 1]))  # y = h w2
        return xp.tensordot(dz, w1, (2, 1)), [dw1, dw2]

    return xp.tensordot(h, w2, 1), backward


def residual(x, layer):  # [n, k, d] -> [n, k, d], or the last positions if the layer answers these
    """x + layer(layernorm(x))."""
    z, norm_backward = layernorm(x)
    y, layer_backward = layer(z)
    last = slice(x.shape[1] - y.shape[1], None)

    def backward(dy):
        dz, dweights = layer_backward(dy)
        dx = norm_backward(dz)
        dx[:, last] += dy
        return dx, dweights

    return x[:, last] + y, backward


def transformer(params, a, hidden=False):  # [n, k] -> [n, p]
    """The network, of one block or more, on inputs a -> logits, backward(dlogits) -> dparams.

    hidden=True: -> [n, d_ff], the activations of the last block's MLP at the last position."""
    token, unembed = params["E"], params["W_U"]
    layers = sum(name.startswith("W_Q ") for name in params)
    a = modulo(a, len(token), len(params["P"]))
    x, tape = token[a] + params["P"], []
    for i in range(1, layers + 1):
        read, forward = ([f"{name} {i}" for name in part] for part in (ATTENTION, FORWARD))
        weights, last = [params[name] for name in read], i == layers
        x, layer_backward = residual(x, lambda z: self_attention(z, *weights, last))
        tape.append((read, layer_backward))
        if hidden and last:
            return relu(layernorm(x[:, -1])[0] @ params[forward[0]])[0]
        weights = [params[name] for name in forward]
        x, layer_backward = residual(x, lambda z: feed_forward(z, *weights))
        tape.append((forward, layer_backward))
    z, norm_backward = layernorm(x[:, -1])

    def backward(dlogits):
        # logits = z unembed
        grads = {"W_U": z.T @ dlogits}
        dx = norm_backward(dlogits @ unembed.T)[:, None]
        for names, layer_backward in reversed(tape):
            dx, dweights = layer_backward(dx)
            grads |= zip(names, dweights)
        # x = token[a] + params["P"]
        onehot = xp.eye(len(token), dtype=token.dtype)[a]
        dtoken = xp.tensordot(onehot, dx, ([0, 1], [0, 1]))
        return grads | {"E": dtoken, "P": dx.sum(axis=0)}

    return z @ unembed, backward


def transformer_settings(k=2, p=97, layers=2, **_):
    """The settings of a transformer, a dict: a light model. (--figure 4 takes the published size,
    the paper's betas and no clipping instead.)

    weight_decay: with half of it some seeds of k=2 p=97 do not reach a test accuracy of 99% within
    these steps. A long momentum, and the gradient clipped to norm clip, keep the accuracy at k=2
    and 3 from falling after it has reached 99%."""
    check_size(k, p)
    return {"k": k, "p": p, "layers": layers, "heads": 4, "d_head": 16, "d_model": 64, "d_ff": 256,
            "split": "random", "train_fraction": 0.5, "steps": 2500, "batch": 512, "lr": 1e-3,
            "hold": 0.5, "init_std": 0.5, "betas": [0.98, 0.98], "eps": 1e-8, "weight_decay": 2,
            "clip": 0.3}


def clipped(grads, most):
    """The gradients; if the norm of all of them together exceeds most, scaled down to that."""
    total = xp.sqrt(sum((d * d).sum() for d in grads.values()))
    scale = (most / (total + (total == 0))).clip(None, 1)
    return {name: scale * d for name, d in grads.items()}


def transformer_step(run):
    """plain_step with clipped gradients."""
    config, a = run.config, next_batch(run)
    loss, grads = loss_and_gradients(network_of(config, run.params), a)
    update(run, loss, clipped(grads, config["clip"]), config["weight_decay"])


def neuron_shares(layer, k, p):
    """The share of a neuron's variance over D_p that one frequency holds, for each neuron of a
    layer: 1 for cos(2 pi zeta a_1/p) cos(2 pi zeta a_2/p), 0 for a constant.

    layer: a function of inputs [n, k] -> activations, a column for each neuron. -> share, active,
    a number for each neuron, on the host; active: whether it is ever different from 0.

    One frequency zeta means all products of functions of a_1 to a_k, each of them 1 or the cosine
    or the sine of frequency zeta, but not the constant. The share is that of the projection onto
    the space of these, for the zeta for which it is largest. At k = 2 this is the measure of Nanda
    et al. 2023 (arXiv 2301.05217). It is taken by a product with these functions, piece by piece,
    because a DFT needs the activations on all of D_p at once, several GiB at k=3 p=97."""
    def of_piece(a):
        x = to_host(layer(a)).astype("float64")
        bases = [single_frequency_basis(a, zeta, p) for zeta in range(1, p // 2 + 1)]
        return np.stack([basis.T @ x for basis in bases]), (x**2).sum(axis=0)

    coefficients = total = 0.0
    for piece_coefficients, piece_total in over_pieces(of_piece, all_inputs(k, p)):
        coefficients, total = coefficients + piece_coefficients, total + piece_total
    power = coefficients**2  # [p // 2, 3^k, d_ff]; entry 0 of the 3^k is the constant
    variance = total - power[0, 0]
    constant = variance <= 1e-12 * total  # but for rounding
    share = power[:, 1:].sum(axis=1).max(axis=0) / np.where(constant, 1, variance)
    return np.where(constant, 0, share), total > 0


def single_frequency_basis(a, zeta, p):  # [n, k] -> [n, 3^k]
    """All products of k functions, of a_1 to a_k, out of 1, cos(2 pi zeta a_j/p), sin(..), scaled
    so that over D_p they are orthonormal; the constant first."""
    angle = 2 * np.pi * zeta * a / p
    scale = 1 if 2 * zeta == p else math.sqrt(2)  # at p/2 the cosine is +-1, the sine 0
    one = np.stack([np.ones(a.shape), scale * np.cos(angle), scale * np.sin(angle)], axis=2)
    one /= math.sqrt(p)  # [n, k, 3]
    basis = one[:, 0]
    for j in range(1, a.shape[1]):
        basis = (basis[:, :, None] * one[:, j, None]).reshape(len(a), -1)
    return basis


def transformer_measures(params):
    """Nothing: the measures of a transformer are of its activations, see neuron_shares."""
    return {"summary": {}}


MODELS["transformer"] = Model(transformer_settings, init_transformer, transformer,
                              transformer_measures, transformer_step)


# ==================================================================================================
# Part 3: beyond the paper
# ==================================================================================================


# ---- A control variate for the gradient ----------------------------------------------------------
#
# At a large k most of a batch's gradient is noise, so that plain training needs a large batch. The
# inputs are a whole group, and this gives another estimate, with less noise, of the gradient over
# all of D_p.
#
# Let v_j = u_j(a_j), y = a_1 + .. + a_k, and w~_i(y) = w_i(y) - mean over c of w_i(c). Then over
# all of D_p, for any weights,
#
#     R = mean over a of sum_i rest_i(a) w~_i(y) = 0,     rest = (v_1 + .. + v_k)^k - k! v_1 .. v_k.
#
# by step 3 of the proof in "the best network": of the monomials of the power only v_1 .. v_k does
# not average to 0, and it is subtracted. On a batch R is not 0, but only noise: R is a control
# variate. While the logits are small,
#
#     cross-entropy      =  log p - mean over a of sum_i (v_1 + .. + v_k)^k w~_i(y)
#     cross-entropy + R  =  log p - mean over a of sum_i k! v_1 .. v_k w~_i(y)
#
# to first order. The second has less noise: at Gaussian weights the mean square of the power is 3,
# 11, 47, 205 times that of the product term at k = 2, 3, 4, 5. So the gradient of coefficient * R
# is added to that of the cross-entropy, where the coefficient is 1 at first and falls to 0 as the
# network learns and its logits grow.
#
# On a training half the mean of R is not 0, so that this is not the gradient of that half's
# cross-entropy: training is told that the inputs are a whole group.


def mlp_with_control_variate(params, a, coefficient, n):  # [n', k] -> [n', p]
    """mlp (z^k), with a backward that adds the gradient of coefficient * R; n: inputs in the whole
    batch, of which a is a piece."""
    u, w = params["u"], params["w"]
    k, p, _ = u.shape
    a = modulo(a, p, k)
    v = [u[j][a[:, j]] for j in range(k)]
    h, power_backward = kth_power(sum(v), k)

    def backward(dlogits):
        eye = xp.eye(p, dtype=u.dtype)
        onehot, right = eye[a], eye[labels(a, p)]
        # R = mean of z^k w~(y): w~(y) = sum_c (1{c = y} - 1/p) w(c)
        toward_right = coefficient / n * (right - 1 / p)
        dlogits = dlogits + toward_right
        dz = power_backward(dlogits @ w.T)
        # R = .. - mean of k! v_1 .. v_k w~(y)
        dproduct = -math.factorial(k) * toward_right  # by the logits of the product term alone
        # The gradient by v_j needs the product of the other v: v_1 .. v_{j-1}, kept in begun, times
        # v_{j+1} .. v_k, gathered in dbegun from j = k down. Multiplying them anew for each j would
        # take 1.7 times as long at k=5.
        begun = list(itertools.accumulate(v, xp.multiply))  # v_1, v_1 v_2, .., v_1 .. v_k
        dw = h.T @ dlogits + begun[-1].T @ dproduct
        dbegun = dproduct @ w.T  # by v_1 .. v_k; then by v_1 .. v_j, for j = k-1 .. 1
        du = xp.empty_like(u)
        for j in range(k - 1, 0, -1):
            du[j] = onehot[:, j].T @ (dz + begun[j - 1] * dbegun)
            dbegun *= v[j]
        du[0] = onehot[:, 0].T @ (dz + dbegun)
        return {"u": du, "w": dw}

    return h @ w, backward


def control_variate_settings(equal=0, **given):
    """The settings of --control-variate, a dict: those of the plain rule, and equal, the share of
    the steps, from the first on, in which all vectors are held at one size (standardize).

    At the published sizes of k = 4 and 5 many neurons die or stay mixed without equal sizes. At
    small sizes more neurons are single without them."""
    return mlp_settings(**given) | {"equal": equal}


def standardize(params, rms):
    """Give each u_j and w of each neuron mean 0 and this root mean square, in place."""
    for x in (params["u"], params["w"]):  # [k, p, m], [m, p]: axis 1 is a vector's
        x -= x.mean(axis=1, keepdims=True)
        x *= rms / xp.sqrt((x * x).mean(axis=1, keepdims=True))


def control_variate_step(run):
    """plain_step with the control variate; for the first steps of a run also with equal sizes.

    The coefficient follows the loss of the step before, because one that depends on the batch that
    it serves could add a bias."""
    config, params, a = run.config, run.params, next_batch(run)
    coefficient = (run.loss / math.log(config["p"])).clip(None, 1)
    loss, grads = loss_and_gradients(
        lambda piece: mlp_with_control_variate(params, piece, coefficient, len(a)), a)
    update(run, loss, grads, config["weight_decay"])
    if run.step <= config["equal"] * config["steps"]:
        standardize(params, config["init_std"])


MODELS["control_variate"] = MODELS["mlp"]._replace(settings=control_variate_settings,
                                                   step=control_variate_step)


# ---- Even p, which the paper leaves out; p = 2 is parity -----------------------------------------
#
# Why the largest normalized margin of an even p is (p-1)/(p-2+r) times the formula for odd p, with
# r = 2^(-(k-1)/2). The proof of "the best network" changes as follows.
#
# 1. A neuron of the Nyquist frequency p/2 has the vectors +-(-1)^a. In step 8 its power is not
#    split between j and p-j, so that for its norm it has 1/r times the class-weighted margin of a
#    cosine.
# 2. In step 1, instead of weighing all wrong classes alike, give the class y + Delta the weight
#    (2-r)/(p-2+r) if Delta is even and r/(p-2+r) if it is odd. These add up to 1, and the margin
#    that is weighted so is at least the smallest, too.
# 3. In this margin each frequency j < p/2 has the factor p/(p-2+r), where it had p/(p-1), and p/2
#    has r times that. So all frequencies give the same for their norm, and none gives more than
#    (p-1)/(p-2+r) times the formula.
# 4. even_rotated_network reaches it.


def even_factor(k, p):
    """What gamma* of an even p is of the formula for odd p.

    >>> even_factor(3, 2)  # parity: 1 / r
    2.0
    """
    return (p - 1) / (p - 2 + 2 ** (-(k - 1) / 2))


def even_rotated_network(k, p):
    """rotated_network for even p: (k+1) 2^(k-2) (p-2) neurons of the frequencies 1 .. p/2 - 1, and
    2^(k-1) of p/2, where cos(x_j) = (-1)^a_j and nothing needs to be turned.

    Of sum_i ||theta_i||^(k+1) = 1 the neurons of a pair j, p-j have 2/(p-2+r), those of p/2 have
    r/(p-2+r), so that F(j, .., j, -j) is the same for every j != 0."""
    r, signs = 2 ** (-(k - 1) / 2), half_of_all_signs(k)
    pairs = cosine_network(k, p, *rotated_neurons(k))  # of norm 1
    size = ((p - 2) / (p - 2 + r)) ** (1 / (k + 1))
    wave = (-1.0) ** np.arange(p) / math.sqrt((k + 1) * p)
    wave *= (r / (p - 2 + r) / len(signs)) ** (1 / (k + 1))
    u = signs.T[:, None] * wave[:, None]  # [k, p, 2^(k-1)]
    w = signs.prod(axis=1)[:, None] * wave
    return {"u": xp.concatenate([size * pairs["u"], xp.asarray(u)], axis=2),
            "w": xp.concatenate([size * pairs["w"], xp.asarray(w)])}


# ==================================================================================================
# Part 4: settings and run files
# ==================================================================================================


# ---- Settings from outside -----------------------------------------------------------------------


SETTINGS = {  # name: type, smallest and largest value or the choices, meaning
    "model": (str, ("mlp", "attention", "transformer"), "mlp is the network of Eq. 2"),
    "k": (int, (2, 200), "how many numbers to add"),
    "p": (int, (2, 10**9), "the modulus"),
    "m": (int, (1, 10**9), "neurons; the paper's network has 2^(2k-2) (p-1)"),
    "activation": (str, ("power", "relu"), "of the mlp: z^k or max(z, 0)"),
    "max_margin": (bool, (False, True), "train the mlp for the largest normalized margin, on all "
                   "inputs, with a penalty"),
    "control_variate": (bool, (False, True), "train the mlp by a gradient estimate with less "
                        "noise, which uses that the data are a whole group"),
    "equal": (float, (0, 0.99), "share of the steps, from the first on, in which all vectors are "
              "held at one size; with --control-variate"),
    "penalty": (float, (0, 1e6), "strength of sum_i ||theta_i||^(k+1); with --max-margin"),
    "seed": (int, (0, 2**63), "of the split, the first weights and the batches"),
    "split": (str, ("random", "orbits"), "orbits: inputs are drawn with all their permutations, so "
              "that no permuted copy of a test input is trained on; attention's is always that, "
              "with permutations of all numbers but the last"),
    "train_fraction": (float, (0, 1), "share of all inputs to train on; of all orbits with --split "
                       "orbits"),
    "steps": (int, (1, 10**9), "training steps"),
    "batch": (int, (1, 2**30), "inputs a step; all that are trained on if there are no more"),
    "lr": (float, (0, 1e3), "AdamW's learning rate"),
    "hold": (float, (0, 0.99), "share of the steps before the learning rate begins to fall"),
    "betas": (float, (0, 0.999999), "AdamW's two decay rates"),
    "eps": (float, (0, 1), "AdamW's smallest denominator"),
    "weight_decay": (float, (0, 1e6), "AdamW's weight decay"),
    "final_decay": (float, (0, 1), "factor on attention's weight decay once lr falls"),
    "clip": (float, (1e-9, 1e9), "largest norm of a transformer's gradient"),
    "init_std": (float, (1e-9, 1e6), "of the first weights; of attention and transformers in units "
                 "of 1/sqrt(fan-in)"),
    "layers": (int, (1, 100), "blocks of the transformer"),
    "heads": (int, (1, 10**6), "attention heads of a layer"),
    "d_head": (int, (1, 10**6), "width of a head"),
    "d_model": (int, (1, 10**6), "width of a state"),
    "d_ff": (int, (1, 10**6), "width of a block's MLP"),
    "dtype": (str, ("float32", "float64"), "of the weights and all that is computed of them")}


def checked(name, value):
    """The value of a setting. Raises BadInput if there is no such setting or no such value."""
    flag = str(name).replace("_", "-")
    if name not in SETTINGS:
        raise BadInput(f"{flag} = {value!r}: there is no such setting")
    kind, allowed, _ = SETTINGS[name]
    if kind in (str, bool):
        if type(value) is not kind or value not in allowed:  # 1 is not True
            raise BadInput(f"{flag} must be one of {', '.join(map(str, allowed))}, not {value!r}")
        return value
    low, high = allowed
    if name == "betas":
        if not isinstance(value, (list, tuple)) or len(value) != 2:
            raise BadInput(f"{flag} must be two numbers, not {value!r}")
        return [checked_number(flag, x, kind, low, high) for x in value]
    return checked_number(flag, value, kind, low, high)


def checked_number(flag, value, kind, low, high):
    """value as a kind, int or float. Raises BadInput unless it is a number from low to high."""
    number = numbers.Integral if kind is int else numbers.Real
    if not isinstance(value, number) or isinstance(value, bool) or not low <= value <= high:
        raise BadInput(f"{flag} must be a{' whole' if kind is int else ''} number from {low} to "
                       f"{high}, not {value!r}")
    return kind(value)


def complete(given):
    """All settings of a run, a dict: those given, the others by the rule of its model.

    complete({"k": 3, "p": 23, "control_variate": True}) is train.py --k 3 --p 23 --control-variate.
    Raises BadInput for a setting out of range, or one that does not apply to the model or to the
    others, and for sizes that do not fit in memory."""
    given = {name: checked(name, value) for name, value in given.items()}
    model = given.get("model", "mlp")
    kinds = [kind for kind in ("max_margin", "control_variate") if given.get(kind)]
    kinds += ["relu"] if given.get("activation") == "relu" else []
    if len(kinds) > 1:
        raise BadInput("max-margin, control-variate and activation relu exclude each other; choose "
                       "one of them, or none")
    config = {"model": model}
    if model == "mlp":
        config |= {"max_margin": False, "control_variate": False}
    rule = MODELS[kinds[0] if kinds and model == "mlp" else model].settings
    config |= {**rule(**given), "seed": 0, "dtype": "float32"}
    for name in sorted(set(given) - set(config)):
        raise BadInput(f"{name.replace('_', '-')} does not apply to this model and rule of "
                       "training (see --help); leave it out")
    config |= given
    if model == "attention" and config["split"] != "orbits":
        raise BadInput("attention cannot see the order of its inputs: its split is always orbits")
    check_memory(config)
    return config


def check_memory(config):
    """Raise BadInput unless D_p, the weights, and what is computed of a piece fit in memory."""
    k, p, m, layers, heads, e, d, f = (config.get(x, 0) for x in (
        "k", "p", "m", "layers", "heads", "d_head", "d_model", "d_ff"))
    check_size(k, p, m or 1)
    weights = max(layers, 1) * (4 * heads * e * d + 2 * d * f) + (p + k) * d
    if heads and not layers:
        weights += 2 * heads * p**2  # attention's S and OV of all heads
    # What the backward of one input keeps: u_j(a_j) and about as many more for each neuron; of each
    # block queries, keys, values, what is read, and attention between all places.
    input_numbers = 2 * k * m + max(layers, 1) * k * (4 * heads * e + 2 * f + k * heads) + 4 * k * p
    piece = MODELS[config["model"]].pieces * PIECE
    if max(16 * weights, 4 * piece * input_numbers) > MAX_BYTES:
        raise BadInput("too large: the weights, attention matrices, or what is computed of "
                       f"{piece} inputs exceed {MAX_BYTES // 2**30} GiB; take a smaller m or p, "
                       "or fewer or smaller heads or layers")


# ---- The machine: a CPU with threads, or a GPU ---------------------------------------------------


def use_device(device):
    """Let all arrays live on the "cpu" (numpy) or on the "gpu" (cupy). Returns the device.

    Raises BadInput for another device, or if there is no GPU that can be used, with the reason."""
    global xp, PIECE
    if device not in ("cpu", "gpu"):
        raise BadInput(f"device must be cpu or gpu, not {device!r}")
    xp, PIECE = np, 256
    if device == "gpu":
        try:
            import cupy
            cupy.zeros(1)  # fails without a driver or a device
        except Exception as error:
            reason = " ".join(str(error).split())
            raise BadInput(f"no GPU can be used: {reason}; use --device cpu") from None
        xp, PIECE = cupy, 2**14  # a GPU is busy only with large pieces
    return device


THREADS = 1  # how many pieces are computed at the same time
pool = None  # of that many threads


def use_threads(n):
    """Let n threads take the pieces of inputs (over_pieces); it is 1 unless asked. Returns n.

    numpy lets go of Python's lock while it computes, so that n cores can work. Give BLAS one thread
    then: two of our threads with two BLAS threads each take twice as long as without ours. BLAS
    reads OPENBLAS_NUM_THREADS and the like when numpy is imported, so this is for whoever starts
    Python; train.py does it. The pieces are the same for any n, and so is every bit of what is
    computed of them. On a GPU there is always one. Raises BadInput unless n is a whole number from
    1 to 1024.

    What limits a step now: of a piece of k=3 p=23, half a millisecond of one core, the matrix
    products take 60%, the passes of z^k and of picking rows of u through memory 26%, cross-entropy
    and the rest, much of it Python's, 14%."""
    global THREADS, map_pieces
    if not isinstance(n, numbers.Integral) or isinstance(n, bool) or not 1 <= n <= 1024:
        raise BadInput(f"threads must be a whole number from 1 to 1024, not {n!r}")
    if pool:
        pool.shutdown()
    THREADS = int(n)
    map_pieces = map if THREADS == 1 else map_on_threads
    new_pool()
    return THREADS


def new_pool():
    """Make the pool of threads: it stays, as starting threads takes as long as a small step."""
    global pool
    pool = ThreadPoolExecutor(THREADS) if THREADS > 1 else None


if hasattr(os, "register_at_fork"):  # a forked process does not have the threads of its parent
    os.register_at_fork(after_in_child=new_pool)


def map_on_threads(function, pieces):
    """map(function, pieces) by the threads of the pool."""
    if xp is not np:
        yield from map(function, pieces)
        return
    waiting = collections.deque()  # not all pieces at once, as their results need memory
    for piece in pieces:
        if len(waiting) == 2 * THREADS:
            yield waiting.popleft().result()
        context = contextvars.copy_context()  # np.errstate holds in the threads, too
        waiting.append(pool.submit(context.run, function, piece))
    while waiting:
        yield waiting.popleft().result()


# ---- Run files: one .npz file each ---------------------------------------------------------------


FORMAT = "fourier-circuits run, format 6"
GROUPS = "params", "first", "second"


@contextlib.contextmanager
def whole_file(path, keep=True):
    """A new file to write in, which then takes the place of path: whole, or not at all.

    keep=False: it is deleted instead; this shows whether writing would work. Raises BadInput if it
    does not."""
    part = None
    try:
        real = os.path.realpath(path)  # a link stays a link
        part = os.path.join(os.path.dirname(real), f".{os.getpid()}-{secrets.token_hex(4)}.part")
        with contextlib.suppress(FileNotFoundError):
            # Opened only to see whether we may write; a pipe would wait but for O_NONBLOCK, which
            # Windows does not have.
            os.close(os.open(real, os.O_WRONLY | getattr(os, "O_NONBLOCK", 0)))
        with open(part, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        if keep:
            os.replace(part, real)
    except OSError as error:
        raise BadInput(f"cannot write {path}: {error.strerror or error}; choose another place"
                       ) from None
    finally:
        with contextlib.suppress(OSError, TypeError):
            os.unlink(part)


def save_run(path, run, keep=True):
    """Write a run to an .npz file, whole or not at all. keep=False: only try whether it would work.

    Raises BadInput if it does not, or if the file holds another run, or more of this one."""
    meta = {"format": FORMAT, "config": run.config, "step": run.step, "seconds": run.seconds,
            "history": run.history}
    arrays = {f"{group} {name}": to_host(x) for group in GROUPS
              for name, x in getattr(run, group).items()}
    arrays |= {"train": run.train, "loss": to_host(run.loss), "meta": np.array(json.dumps(meta))}
    with whole_file(path, keep) as file:
        np.savez(file, **arrays)
        if keep and os.path.exists(path):  # the last look before it is replaced
            there = load_run(path)
            if there.config != run.config or there.step > run.step:
                raise BadInput(f"{path} holds another run, or more of this one; take another --out")


def load_run(path):
    """The run in a file. Raises BadInput for a file that is not a whole run of this version."""
    if os.path.exists(path) and not os.path.isfile(path):
        raise BadInput(f"{path} is not a file; give another one")
    try:
        with open(path, "rb") as file, np.load(file, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}  # checks their CRC
        return run_of_arrays(arrays)
    except OSError as error:
        raise BadInput(f"cannot read {path}: {error.strerror or 'not a run file'}; give another "
                       "file") from None
    except Exception:  # a damaged or foreign file fails in many ways
        raise BadInput(f"{path} is not a run file of this version, or it is damaged; "
                       "give another file") from None


def run_of_arrays(arrays):
    """The run in the arrays of a file. Raises ValueError, or another error that load_run turns into
    BadInput, unless they are those of save_run."""
    meta = json.loads(str(arrays.pop("meta")))
    require(meta.pop("format") == FORMAT)
    require(set(meta) == {"config", "step", "seconds", "history"})
    config = meta["config"]
    require(complete(config) == config)
    require(type(meta["step"]) is int and 0 <= meta["step"] <= config["steps"])
    require(type(meta["seconds"]) in (int, float) and 0 <= meta["seconds"] < math.inf)
    require(type(meta["history"]) is list)
    steps = [0] + [checked_step(line) for line in meta["history"]] + [meta["step"]]
    require(steps == sorted(steps))
    fresh, train, loss = new_run(config), arrays.pop("train"), arrays.pop("loss")
    require(train.dtype == bool and np.array_equal(train, fresh.train))
    require((loss.shape, loss.dtype) == ((), config["dtype"]))
    groups = {group: {} for group in GROUPS}
    for name, x in arrays.items():
        group, _, weight = name.partition(" ")
        groups[group][weight] = x
    for weights in groups.values():
        require(set(weights) == set(fresh.params))
        for name, x in weights.items():
            require((x.shape, x.dtype) == (fresh.params[name].shape, fresh.params[name].dtype))
            require(np.isfinite(x).all())
    require(all((x >= 0).all() for x in groups["second"].values()))
    groups = {group: {name: xp.asarray(x) for name, x in weights.items()}
              for group, weights in groups.items()}
    return Run(**meta, **groups, train=train, loss=xp.asarray(loss))


def require(condition):
    """Raise ValueError unless this is so."""
    if not condition:
        raise ValueError


def checked_step(line):
    """The step of a line of a history (see progress). Raises ValueError if it cannot be one."""
    known = {"step", "train_loss", "train_accuracy", "circuit_share"}
    require(known | {"test_loss", "test_accuracy"} <= set(line) and type(line["step"]) is int)
    for name, x in line.items():
        number = type(x) in (int, float) and math.isfinite(x)
        require(number or x is None and name not in known)
    return line["step"]
