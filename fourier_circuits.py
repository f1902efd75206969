"""Fourier circuits in networks that add modulo p: one module, numpy on a CPU or cupy on a GPU.

After "Fourier Circuits in Neural Networks and Transformers: A Case Study of Modular Arithmetic with
Multiple Inputs" (Li, Liang, Shi, Song, Zhou; arXiv 2402.09469v4, "the paper" below). A network is
given k numbers a_1 .. a_k modulo p and must name their sum modulo p. The paper proves that the best
such network, the one of largest normalized margin, consists of neurons that are cosines of a single
frequency each. It observes that training finds just these neurons, and that the attention matrices
of transformers become two-dimensional cosines.

The sections. Each uses what stands above it; only the class Run, a training run with its settings,
weights and moments, is defined in the last. To go from Eq. 2 to a trained neuron to the theorem
read from "data" to "the best"; the training step itself is train_step in "runs", and the loop over
the steps is in train.py. "attention" and "transformer" can be read without "the best" and "faster".
Functions that nothing here calls serve train.py and analyze.py.

    arrays         use_device, to_host
    data           all_inputs, labels, split                                           Eq. 1
    network        power, relu, cross_entropy; init_mlp, mlp, mlp_pieces               Eq. 2
    learning       adamw, learning_rate, mlp_settings; loss_and_gradients
    what is found  neuron_spectra, ablate; evaluate               Section 4; Figures 1, 2, 5-8
    the best       norm, max_margin, margin_bound, efficiency     Theorem 4.1, Lemmas 4.2, F.2
    theory         paper_network, rotated_network, theory_check   Lemmas 4.3, E.1, E.3
    faster         mlp_with_control_variate, fast_settings        beyond the paper
    max. margin    max_margin_settings                            Lemma 3.7
    attention      head_circuits, attend, attention; head_spectra      Figures 3, 9, 10
    transformer    layernorm, self_attention, transformer         Figure 4
    runs           complete, new_run, train_step, progress, save_run, load_run

Letters
    p, k     the modulus; how many numbers        a, y     inputs [n, k], labels [n]
    m, n     neurons, inputs in a batch           u, w     a neuron's u_1 .. u_k, w, p numbers each
    D_p      all p^k inputs                       z, h     before and after the activation [n, m]
    c        a class                              zeta     a frequency, 1 .. p // 2
    H, e     heads and their width                gamma*   the largest normalized margin
    d, f     width of a state, of a block's MLP   S, OV    what heads attend to, what they write
             (f(a)[c] with arguments: a logit)
    theta    all weights; theta_i those of neuron i; in a cosine its phase, as in the paper
    f^, u^_1 the DFT, where ^ stands directly after f, f~, u, w or x; elsewhere it is a power
    f~, w~   f and w less their means over the classes
    h, j, s, t, v, x mean different things in different functions, which say what.

A layer is a function out, backward = layer(x, ..). Its backward(dout) takes the gradient of the
loss with respect to out and returns those with respect to the layer's weights and states; the
backward of the loss itself takes nothing. A gradient is called d + the name.
"""

import contextlib
import itertools
import json
import math
import numbers
import os
import secrets
from dataclasses import dataclass, field

import numpy as np

# ---- Arrays: every array of a network lives in xp, which is numpy or cupy ------------------------

xp = np
PIECE = 256  # inputs that a network sees at a time, see pieces; use_device sets it
MAX_BYTES = 2**31  # of all inputs, and of the weights with their gradients and AdamW's moments
TINY = 1e-30  # the smallest denominator: all-zero weights have a share of 0, not of 0/0


class BadInput(ValueError):
    """What the user asked for cannot be done. The message says why and what to do, in one line."""


def use_device(device):
    """Let all arrays live on the "cpu" (numpy) or on the "gpu" (cupy). Returns the device.

    Raises BadInput if a GPU is asked for and cannot be used, with the reason."""
    global xp, PIECE
    xp, PIECE = np, 256
    if device != "cpu":
        try:
            import cupy
            cupy.zeros(1)  # fails without a driver or a device
        except Exception as error:
            reason = " ".join(str(error).split())
            raise BadInput(f"no GPU can be used: {reason}; use --device cpu") from None
        xp, PIECE = cupy, 2**14  # a GPU is busy only with large pieces
    return device


def to_host(x):
    """A numpy array with the same numbers."""
    return x if isinstance(x, np.ndarray) else xp.asnumpy(x)


# ---- Data: D_p, all p^k inputs with their sums modulo p (Eq. 1) ----------------------------------
# Inputs and labels are always on the host: they only serve as indices, and cupy takes numpy's.


def check_size(k, p, m=1):
    """Raise BadInput unless k >= 2, p >= 2, m >= 1, and D_p and m neurons fit in memory."""
    if k < 2 or p < 2 or m < 1:
        raise BadInput(f"k = {k} and p = {p} must be at least 2, m = {m} at least 1")
    # 2^200 is too large in any case, and computing p^k for k = 10^6 would take long. 8 bytes for a
    # number of an input, 16 for a weight: itself, its gradient and two moments in float32 (float64
    # takes twice that).
    if k * math.log2(p) > 200 or max(8 * k * p**k, 16 * (k + 1) * p * m) > MAX_BYTES:
        raise BadInput(f"too large: k = {k}, p = {p} have p^k inputs, m neurons (k+1) p weights; "
                       f"they exceed {MAX_BYTES // 2**30} GiB; take a smaller k, p or m")


def digits(index, k, p):  # [n] -> [n, k]
    """The inputs with these indices in all_inputs: their digits in base p, a_k the last."""
    return index[:, None] // p ** np.arange(k - 1, -1, -1) % p


def all_inputs(k, p):
    """All of D_p (Eq. 1), int [p^k, k], a_k running fastest. Raises BadInput if it is too large.

    all_inputs(2, 3) -> [[0, 0], [0, 1], [0, 2], [1, 0], .. [2, 2]]"""
    check_size(k, p)
    return digits(np.arange(p**k), k, p)


def labels(a, p):  # [n, k] -> [n]
    """The right classes, a_1 + .. + a_k mod p."""
    return a.sum(axis=1) % p


def split(k, p, fraction, rng, orbit=None):
    """A random part of D_p to train on: bool [p^k] on the host, True for this fraction of D_p.

    orbit: int [p^k], a group for each input, such as orbits gives; then it is this fraction of the
    groups that is drawn, each as a whole. rng: a numpy Generator. Raises BadInput if the fraction
    is outside (0, 1] or selects nothing."""
    check_size(k, p)
    orbit = np.arange(p**k) if orbit is None else orbit
    groups = np.unique(orbit)
    count = round(fraction * len(groups)) if 0 < fraction <= 1 else 0
    if count == 0:
        raise BadInput(f"train fraction {fraction} must lie in (0, 1] and give at least one of the "
                       f"{len(groups)} inputs or orbits of inputs")
    return np.isin(orbit, rng.permutation(groups)[:count])


def orbits(k, p, count):  # -> int [p^k], on the host
    """The orbit of each input. Two inputs are in one orbit if they differ only in the order of
    their first `count` numbers. It is named by the index of its member in which these are sorted.

    orbits(2, 3, 2) -> [0, 1, 2, 1, 4, 5, 2, 5, 8]: [1, 0] is in the orbit of [0, 1], which is 1."""
    a = digits(np.arange(p**k), k, p)
    a[:, :count].sort(axis=1)
    return a @ p ** np.arange(k - 1, -1, -1)


def pieces(a, most):  # [n, k] -> [[n', k], ..]
    """The inputs in pieces of at most n' = most: what a network computes of a piece should stay in
    a CPU's cache; but each piece costs Python's time. The logits of k=4 p=47 take a quarter less
    time with 256 than with 1024."""
    return [a[start:start + most] for start in range(0, len(a), most)]


# ---- The network: f(theta, a)[c] = sum_i (u_{i,1}(a_1) + .. + u_{i,k}(a_k))^k w_i(c)  (Eq. 2) ----


def power(z, k):  # [n, m] -> [n, m]
    """h = z^k, by products: numpy's z**k takes about ten times as long for k > 2."""
    below = z
    for _ in range(k - 2):
        below = below * z  # in the end z^(k-1)

    def backward(dh):
        return k * below * dh

    return z * below, backward


def relu(z):  # [n, m] -> [n, m]
    """h = max(z, 0), the other activation of Morwani et al. 2024 (arXiv 2311.07568)."""
    def backward(dh):
        return dh * (z > 0)

    return xp.maximum(z, 0), backward


def mlp(params, a, activation="power"):  # [n, k] -> [n, p]
    """The network of Eq. 2 on inputs a: params are u [k, p, m] and w [m, p]; activation "power"
    (z^k) or "relu".

    -> logits, backward(dlogits) -> {"u": du, "w": dw}."""
    u, w = params["u"], params["w"]
    k, p, m = u.shape
    z = sum(u[j][a[:, j]] for j in range(k))
    h, activation_backward = power(z, k) if activation == "power" else relu(z)

    def backward(dlogits):
        # logits = h w
        dw = h.T @ dlogits
        dz = activation_backward(dlogits @ w.T)
        # z = u_1[a_1] + .. + u_k[a_k]: picking rows of u is a product with one-hot rows, so the
        # gradient is their transpose times dz
        onehot = xp.eye(p, dtype=u.dtype)[a].reshape(len(a), k * p)
        return {"u": (onehot.T @ dz).reshape(k, p, m), "w": dw}

    return h @ w, backward


def mlp_pieces(params, a=None, activation="power"):
    """mlp on inputs a [n, k], or on all of D_p in order (None), in pieces.

    Yields (inputs, logits, backward) of each piece."""
    k, p, _ = params["u"].shape
    for piece in pieces(all_inputs(k, p) if a is None else a, PIECE):
        yield piece, *mlp(params, piece, activation)


def gaussian(sizes, rng, dtype):
    """First weights {name: N(0, std^2)} for sizes {name: (shape, std)}; drawn on the host, so that
    they are the same on any device."""
    return {name: xp.asarray((std * rng.standard_normal(shape)).astype(dtype))
            for name, (shape, std) in sizes.items()}


def init_mlp(rng, k, p, m, init_std, dtype="float32", **_):
    """{"u": [k, p, m], "w": [m, p]}, entries N(0, init_std^2). Other settings (**_) are ignored."""
    return gaussian({"u": ((k, p, m), init_std), "w": ((m, p), init_std)}, rng, dtype)


def cross_entropy(logits, y):  # [n, p], [n] -> scalar
    """Mean of -log softmax(logits)[y]; backward() -> (softmax - onehot) / n."""
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
    They are enough at k=3 p=23; larger sizes need more steps, k=4 and 5 also a larger batch.

    Learning rate, betas, batch and warm-up are the paper's. The others were chosen on seeds from
    100 up, so that none was fitted to the reported seeds 0, 1, 2 ..: init_std; weight_decay, which
    makes each neuron drop all frequencies but one (with 0.3 most stay mixed at k=3 p=97); hold, the
    share of the steps before the learning rate begins to fall. While it falls, a neuron loses what
    is left of its other frequencies."""
    m = 2 ** (2 * k - 2) * (p - 1) if m is None else m  # the width of paper_network
    check_size(k, p, m)
    return {"k": k, "p": p, "m": m, "activation": activation, "fast": False, "max_margin": False,
            "split": "random", "train_fraction": 0.5, "steps": 2000, "batch": 1024, "lr": 0.005,
            "init_std": 0.1, "hold": 0.5, "betas": [0.9, 0.98], "eps": 1e-8, "weight_decay": 1}


def learning_rate(config, step):
    """The learning rate at this step, counted from 0. It rises to lr in ten steps and stays there;
    from the share "hold" of all steps on it falls linearly to 0."""
    warm, done = min(1, (step + 1) / 10), step / config["steps"]
    return config["lr"] * warm * min(1, max(0, 1 - done) / (1 - config["hold"]))


def loss_and_gradients(parts, n):
    """Mean cross-entropy over n inputs, which come in pieces (inputs, logits, backward), and its
    gradients. -> loss, {name: gradient}, doubt.

    doubt is the mean probability of all wrong classes together, 1 - softmax[y]; only fast_step
    uses it."""
    loss, doubt, grads = 0, 0, {}
    for a, logits, backward in parts:
        y, share = labels(a, logits.shape[1]), len(a) / n
        piece_loss, loss_backward = cross_entropy(logits, y)
        dlogits = share * loss_backward()
        loss = loss + share * piece_loss
        doubt = doubt - dlogits[np.arange(len(a)), y].sum()  # there it is (softmax - 1) / n
        for name, d in backward(dlogits).items():
            grads[name] = grads.get(name, 0) + d
    return loss, grads, doubt


def adamw(params, grads, first, second, step, lr, weight_decay, betas, eps=1e-8):
    """One step of AdamW, in place (Loshchilov and Hutter 2019, Algorithm 2 with decay lr * wd).

    first, second: exponential means of the gradient and of its square, with decay rates betas; step
    counts from 1. Biases, arrays of one axis, do not decay."""
    beta1, beta2 = betas
    for name, x in params.items():
        g, mean, square = grads[name], first[name], second[name]
        mean += (1 - beta1) * (g - mean)
        square += (1 - beta2) * (g * g - square)
        if x.ndim > 1:
            x *= 1 - lr * weight_decay
        root = xp.sqrt(square / (1 - beta2**step))
        x -= lr / (1 - beta1**step) * mean / (root + eps)


def stream(config, *use):
    """A random generator of its own for each use: 0 is the split; 1 the first weights; 2, step the
    batch of a step; 3 the inputs of a line of progress."""
    return np.random.default_rng(np.random.SeedSequence(config["seed"], spawn_key=use))


def sample_inputs(index, k, p, rng, most=2**17):
    """The inputs [n, k] with these indices (see digits); of more than `most` indices, `most` that
    are drawn at random, with replacement."""
    if len(index) > most:
        index = index[rng.integers(0, len(index), most)]
    return digits(index, k, p)


def next_batch(run):
    """The inputs of the next step of a run (see Run): random ones of its training part, whose
    indices are run.index, or all if they are no more than the batch."""
    config = run.config
    return sample_inputs(run.index, config["k"], config["p"], stream(config, 2, run.step),
                         config["batch"])


def update(run, grads, lr, weight_decay):
    """Let AdamW take a run one step on, with these gradients."""
    run.step += 1
    adamw(run.params, grads, run.first, run.second, run.step, lr, weight_decay,
          run.config["betas"], run.config["eps"])


# ---- What training finds: Fourier analysis of the weights (Section 4), on the host ---------------
# numpy's sign: x^(j) = sum_a x(a) e^(-2 pi i j a/p), so that A cos(theta + 2 pi zeta a/p) has
# theta = arg x^(zeta).


def power_spectrum(x):  # [.., p] -> [.., p // 2 + 1]
    """|x^(j)|^2 for j = 0 .. p // 2, conjugate pairs folded, so that the sum is that of all p."""
    x, p = to_host(x), x.shape[-1]
    j = np.arange(p // 2 + 1)
    fold = 2 - ((j == 0) | (2 * j == p)).astype(x.dtype)  # the mean and Nyquist have no partner
    return fold * np.abs(np.fft.rfft(x)) ** 2


def max_normalized_power(x):  # [.., p] -> [..]
    """The share of all power, that of the mean included, which the strongest frequency zeta >= 1
    has; 1 for a cosine."""
    spectrum = power_spectrum(x)
    return spectrum[..., 1:].max(axis=-1) / np.maximum(spectrum.sum(axis=-1), TINY)


def at_frequency(x, zeta):  # [.., p], int [..] -> [.., p]
    """x, on the host, with only the frequency zeta kept along its last axis."""
    p = x.shape[-1]
    transform = np.fft.rfft(x) * (np.arange(p // 2 + 1) == zeta[..., None])
    return np.fft.irfft(transform, n=p).astype(x.dtype)


def neurons(params):  # -> [k+1, m, p]
    """All vectors of all neurons: u_1 .. u_k and then w."""
    return xp.concatenate([params["u"].transpose(0, 2, 1), params["w"][None]])


def neuron_norms(params):  # -> [m]
    """||theta_i||_2 over the (k+1) p numbers of each neuron."""
    u, w = params["u"], params["w"]
    return xp.sqrt(xp.einsum("kpm,kpm->m", u, u) + xp.einsum("mp,mp->m", w, w))


def neuron_spectra(params):
    """Each neuron's Fourier measures (Section 4), as a dict of arrays on the host. (By the theorem
    u_1 .. u_k and w also have one size; efficiency sees that.)

    frequency [m]       zeta with most power in u_1..u_k and w together
    concentration [m]   share of the neuron's power at zeta, the means included in the whole
    shares [k+1, m]     maximum normalized power of each vector by itself
    phases [k+1, m]     theta_1 .. theta_k, theta_w at zeta
    phase_error [m]     |theta_1 + .. + theta_k - theta_w|, modulo 2 pi in [0, pi] (Theorem 4.1.2)
    live [m]            norm above a tenth of the largest
    single [m]          live, and over 95% of the power at zeta
    summary             live_neurons; max_normalized_power, the mean of shares over live neurons;
                        single_frequency_fraction, of the live ones; frequencies_used, by the single
                        ones"""
    vectors, norms = to_host(neurons(params)), to_host(neuron_norms(params))
    spectrum = power_spectrum(vectors).sum(axis=0)  # [m, p // 2 + 1]
    zeta, each = 1 + spectrum[:, 1:].argmax(axis=1), np.arange(len(norms))
    concentration = spectrum[each, zeta] / np.maximum(spectrum.sum(axis=1), TINY)
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
    vectors = to_host(neurons(params))
    kept = at_frequency(vectors, neuron_spectra(params)["frequency"])
    return [{"u": xp.asarray(x[:-1].transpose(0, 2, 1)), "w": xp.asarray(x[-1])}
            for x in (kept, vectors - kept)]


def margins(logits, y):  # [n, p], [n] -> [n], [n]
    """Margin f[y] - max_{y' != y} f[y'] and class-weighted margin f[y] - mean_{y' != y} f[y'].

    The second has uniform weights (Def. 3.6). Right means a margin above 0: a tie is wrong."""
    each, p, wrong = np.arange(len(y)), logits.shape[1], logits.copy()
    right = logits[each, y]
    wrong[each, y] = -xp.inf
    return right - wrong.max(axis=1), (p * right - logits.sum(axis=1)) / (p - 1)


def evaluate(parts):
    """What a network does on inputs in pieces (inputs, logits, ..), see mlp_pieces. A dict:

    right            bool [n], on the host; accuracy: their share
    loss             the mean cross-entropy
    margin           the smallest
    circuit          g [p], what of the logits depends on c - a_1 - .. - a_k alone
    circuit_share    the circuit's share of the power of the logits

    With f~ = f less its mean over the classes,

        g(Delta) = mean over a of f~(a)[a_1 + .. + a_k + Delta],
        circuit_share = n sum_Delta g(Delta)^2 / sum_{a,c} f~(a)[c]^2.

    So g(c - a_1 - .. - a_k) is the best approximation of f~(a)[c] by a function of this difference.
    Over D_p it is the part of f~ whose DFT lies on the frequencies (j, .., j, -j), the diagonal of
    Lemma F.2:

        sum over Delta of g(Delta) e^(2 pi i j Delta / p) = f~^(j, .., j, -j) / p^k.

    circuit_share is 1 for a max-margin network, 1/n on average for random logits."""
    margin, loss, g, total = [], 0.0, 0.0, 0.0
    for a, logits, *_ in parts:
        y = labels(a, logits.shape[1])
        margin.append(to_host(margins(logits, y)[0]))
        loss += float(cross_entropy(logits, y)[0]) * len(y)
        column = xp.asarray((y[:, None] + np.arange(logits.shape[1])) % logits.shape[1])
        shifted = xp.take_along_axis(logits - logits.mean(axis=1, keepdims=True), column, axis=1)
        g = g + to_host(shifted.sum(axis=0, dtype="float64"))
        total += float((shifted * shifted).sum(dtype="float64"))
    margin = np.concatenate(margin)
    right, n, g = margin > 0, len(margin), g / len(margin)
    return {"right": right, "accuracy": float(right.mean()), "loss": loss / n,
            "margin": float(margin.min()), "circuit": g,
            "circuit_share": float(n * (g @ g) / (total or 1))}


def circuit_frequencies(g):
    """How many frequencies hold 99% of the power of a circuit g [p]."""
    held = np.cumsum(np.sort(power_spectrum(g)[1:])[::-1])  # by the 1, 2, .. strongest
    return 1 + int(np.searchsorted(held, 0.99 * held[-1])) if held[-1] > 0 else 0


def without_circuit(parts, g):
    """The same pieces (inputs, logits) without the circuit: f(a)[c] - g(c - a_1 - .. - a_k)."""
    for a, logits, *_ in parts:
        shift = (np.arange(len(g)) - labels(a, len(g))[:, None]) % len(g)
        yield a, logits - xp.asarray(g.astype(logits.dtype))[shift]


# ---- The best network there is: norm, margin, gamma* (Def. B.2, Theorem 4.1) ---------------------

# Why a neuron of the best network is a cosine (Lemma 4.2, odd p): a margin is at most the
# class-weighted one, whose mean over D_p is the sum over neurons and over j = 1 .. p-1 of
#
#     k! / ((p-1) p^k)  |u^_1(j)| .. |u^_k(j)| |w^(j)| cos(phase error).
#
# With P_j = |u^_1(j)|^2 + .. + |w^(j)|^2 the product is at most (P_j / (k+1))^((k+1)/2) by the
# inequality of arithmetic and geometric means. This is convex in P_j, and the sum of all P_j is at
# most p ||theta_i||^2: so it is best to have all power at one pair j, p-j, shared equally by u_1 ..
# u_k and w; and the phase error must be 0. Then P_j = P_{p-j} = p ||theta_i||^2 / 2 (Parseval), and
# the neuron adds gamma* ||theta_i||^(k+1); all neurons add gamma* ||theta||^(k+1). The smallest
# margin equals the mean only if all margins do; then f^(j,..,j,-j) is the same for every j != 0,
# and so every frequency is used (Lemma F.2).


def norm(params):
    """||theta||_{2,k+1} = (sum_i ||theta_i||_2^(k+1))^(1/(k+1)) (Def. B.2)."""
    norms, nu = neuron_norms(params), len(params["u"]) + 1
    largest = norms.max()  # taken out first, so that no power overflows
    if largest == 0:
        return 0.0
    return float(largest * ((norms / largest) ** nu).sum() ** (1 / nu))


def penalty(params, strength, exponent):
    """strength ||theta||_{2,nu}^exponent, nu = k + 1 (Def. 3.1) -> its value, its gradients.

    With exponent 1 this is the paper's regularizer; with exponent nu it is sum_i ||theta_i||^nu,
    which is differentiable at 0, too. The gradient by theta_i is

        strength exponent ||theta||^(exponent - nu) ||theta_i||^(nu - 2) theta_i,

    and 0 for weights that are all 0."""
    norms, nu = neuron_norms(params), len(params["u"]) + 1
    total = (norms**nu).sum() ** (1 / nu)
    scale = total + (total == 0)  # 1 where all weights are 0
    pull = strength * exponent * scale ** (exponent - nu) * norms ** (nu - 2)
    return strength * total**exponent, {"u": pull * params["u"], "w": pull[:, None] * params["w"]}


def max_margin(k, p):
    """gamma*, the largest normalized margin of any network (Theorem 4.1, part 1).

        gamma* = 2 k! / ( (2k+2)^((k+1)/2) (p-1) p^((k-1)/2) )

    This is for odd p. For even p, which the paper leaves out, a neuron of the Nyquist frequency p/2
    gives 1/r times as much class-weighted margin for its norm, r = 2^(-(k-1)/2), as its power is
    not split between j and p - j, and gamma* is (p-1)/(p-2+r) times as large.

    rotated_network reaches it. No network has more: in the proof of Lemma 4.2, instead of weighing
    all wrong classes alike, give y + Delta the weight (2-r)/(p-2+r) if Delta is even and r/(p-2+r)
    if it is odd (these add up to 1). In the margin that is weighted so, each frequency j has the
    factor p/(p-2+r), and p/2 has r times that; then all frequencies give the same."""
    gamma = 2 * math.factorial(k) / ((2 * k + 2) ** ((k + 1) / 2) * (p - 1) * p ** ((k - 1) / 2))
    return gamma if p % 2 else gamma * (p - 1) / (p - 2 + 2 ** (-(k - 1) / 2))


def normalized_margin(params):
    """The smallest margin over D_p (of z^k) divided by ||theta||^(k+1), which is the margin of
    theta / ||theta||. It is at most gamma*."""
    return evaluate(mlp_pieces(params))["margin"] / (norm(params) ** (len(params["u"]) + 1) or 1)


def neuron_dft(params):  # -> complex [p, m]
    """Each neuron's part of f~^(j, .., j, -j), from its weights alone (Lemma D.8); z^k only:

        k! w^(-j) u^_1(j) .. u^_k(j) for j = 1 .. p-1, and 0 for j = 0.

    f~ is f less its mean over the classes. Summed over all neurons of a max-margin network this is
    positive for j != 0 (Lemma F.2), and at norm 1 it is gamma* p^k. For any network the sum is p^k
    times the DFT of its circuit (evaluate) at -j."""
    u, w = params["u"], params["w"]
    dft = xp.conj(xp.fft.fft(w, axis=1).T) * xp.fft.fft(u, axis=1).prod(axis=0)
    dft[0] = 0
    return math.factorial(len(u)) * dft


def margin_bound(g):
    """An upper bound on the smallest margin over D_p, from the circuit g (evaluate).

    For each Delta != 0 no margin exceeds f[y] - f[y + Delta], whose mean over D_p is
    g(0) - g(Delta). The bound is the smallest of these means."""
    return float((g[0] - g[1:]).min())


def efficiency(params):  # -> [m]
    """Each neuron's mean class-weighted margin over gamma* (Lemmas 4.2, D.8), where f is that of
    the neuron alone, scaled to norm 1:

        sum_{j != 0} f^(j,..,j,-j) / ((p-1) p^k gamma*).

    For odd p it lies in [-1, 1], and is 1 for cosines of one frequency and one size whose phases
    add up. For even p such a neuron reaches (p-2+r)/(p-1), where r = 2^(-(k-1)/2), and a neuron of
    the Nyquist frequency reaches that divided by r."""
    k, p, _ = params["u"].shape
    norms = xp.maximum(neuron_norms(params), TINY)
    unit = {"u": params["u"] / norms, "w": params["w"] / norms[:, None]}
    return neuron_dft(unit).real.sum(axis=0) / ((p - 1) * float(p) ** k * max_margin(k, p))


# ---- Theory: networks of norm 1 whose margin is gamma* on every input (Theorem 4.1) --------------


def half_of_all_signs(k):  # -> [2^(k-1), k]
    """All of {-1, 1}^k with first sign +1."""
    return np.array(list(itertools.product((1,), *[(1, -1)] * (k - 1))))


def paper_network(k, p):
    """The paper's max-margin network (Lemmas 4.3, E.3): 2^(2k-2) (p-1) neurons, float64, norm 1.

    For each zeta, cos(x_1 + .. + x_k - x_c) is a sum of 2^k products of cosines and sines, where
    x_j = 2 pi zeta a_j/p and x_c = 2 pi zeta c/p; each product is a sum of 2^(k-1) k-th powers: for
    any numbers t_1 .. t_k,

        2^k k! t_1 .. t_k = sum over signs s of s_1 .. s_k (s_1 t_1 + .. + s_k t_k)^k   (Lemma E.1)

    where s and -s give the same. The factor of x_c becomes w, with the signs' product. Raises
    BadInput for even p, which the paper leaves out."""
    check_size(k, p)  # before 2^k is computed
    check_size(k, p, 2 ** (2 * k - 2) * (p - 1))
    if p % 2 == 0:
        raise BadInput(f"the paper's network is for odd p, not {p}; rotated_network takes any p")
    # A sine is a cosine turned by pi/2: sine_j = 1 makes t_j = cos(x_j - pi/2) = sin x_j. As
    # cos(x - x_c) = cos x cos x_c + sin x sin x_c for x = x_1 + .. + x_k, x_c takes a sine, too,
    # where q, the number of sines, is odd. (-1)^(q // 2) is the product's sign in cos x or sin x.
    sine = np.array(list(itertools.product((0, 1), repeat=k)))  # [2^k, k]
    q = sine.sum(axis=1)
    signs = half_of_all_signs(k)
    of_w = (-1) ** (q // 2)[:, None] * signs.prod(axis=1)  # [2^k, 2^(k-1)]
    amplitudes = np.column_stack([np.tile(signs, (len(sine), 1)), of_w.reshape(-1)])
    phases = -np.pi / 2 * np.column_stack([sine, q % 2]).repeat(len(signs), axis=0)
    return cosine_network(k, p, amplitudes, phases)


def rotated_network(k, p):
    """A smaller max-margin network, beyond the paper: (k+1) 2^(k-2) (p-1) neurons for odd p.

    It takes only the product of cosines, no sines, and turns it by k + 1 angles psi = pi t/(k+1),
    t = 0 .. k: the phases of u_1 .. u_k by psi, the phase of w by k psi. Over the signs of Lemma
    E.1 the neurons of one psi add up to

        2^(k-1) k! cos(x_1 + psi) .. cos(x_k + psi) cos(x_c + k psi).

    Write each cosine as (e^(i ..) + e^(-i ..)) / 2. In the product of the x's take the term in
    which l of the k exponents have a minus sign; times e^(-i (x_c + k psi)) it has the factor
    e^(-2 i l psi), and

        sum over t = 0 .. k of e^(-2 pi i l t/(k+1)) = k+1 for l = 0, and 0 for l = 1 .. k.

    So only l = 0 is left, with its conjugate: (k+1) 2^-k cos(x_1 + .. + x_k - x_c) in place of the
    product of cosines. p may be even (p = 2 is parity). Then there are (k+1) 2^(k-2) (p-2) such
    neurons and 2^(k-1) of the Nyquist frequency p/2, where cos(x_j) = (-1)^a_j and nothing needs to
    be turned."""
    check_size(k, p)
    check_size(k, p, (k + 1) * 2 ** (k - 1) * (p // 2))
    signs = half_of_all_signs(k)
    amplitudes = np.tile(np.column_stack([signs, signs.prod(axis=1)]), (k + 1, 1))
    turns = np.repeat(np.arange(k + 1), len(signs))[:, None] * np.array([1] * k + [k])
    return cosine_network(k, p, amplitudes, np.pi / (k + 1) * turns)


def cosine_network(k, p, amplitudes, phases):
    """-> {"u", "w"} of norm 1: the neurons amplitude cos(phase + 2 pi zeta a/p), for every zeta.

    amplitudes, phases: [rows, k+1], of the neurons at each zeta. For odd p all neurons have the
    same norm. For even p those of the Nyquist frequency are the first 2^(k-1) rows alone (t = 0);
    they have the share r / (p-2+r), r = 2^(-(k-1)/2), of sum_i ||theta_i||^(k+1), so that
    f^(j, .., j, -j) is the same for every j: a pair j, p-j has 2 of p-2+r, and p/2 has r."""
    angle = 2 * np.pi * np.arange(p) / p
    r = 2 ** (-(k - 1) / 2)
    parts = []
    for zeta in range(1, p // 2 + 1):
        nyquist = 2 * zeta == p
        used = slice(2 ** (k - 1) if nyquist else None)
        x = amplitudes[used, :, None] * np.cos(phases[used, :, None] + zeta * angle)  # [.., k+1, p]
        share = (r if nyquist else 2) / (p - 1 if p % 2 else p - 2 + r)
        size = (share / len(x)) ** (1 / (k + 1))
        parts.append(size * x / np.sqrt((x**2).sum(axis=(1, 2), keepdims=True)))
    x = np.concatenate(parts).transpose(1, 2, 0)  # [k+1, p, m]
    return {"u": xp.asarray(x[:k].copy()), "w": xp.asarray(x[k].T.copy())}


def theory_check(params):
    """Compare a network of norm 1 with Theorem 4.1 (in full: G.2) on all inputs, by brute force.

    For odd p a network is max-margin if and only if

        f(a)[c] = gamma* (1{c = a_1 + .. + a_k} - 1/p),

    so that all wrong classes are alike (Condition 3.8); for even p rotated_network has this f, too.
    For odd p also the first-order (dual) condition, which is necessary: the gradient of the mean
    class-weighted margin is gamma* times that of sum_i ||theta_i||^(k+1). (Both are homogeneous of
    degree k+1, and the margin is gamma* at norm 1; so by Euler's identity the factor is gamma*.)
    -> [(what, measured, expected, error relative to gamma* or to the expected size), ..]"""
    k, p, _ = params["u"].shape
    gamma, onehot, spread, deviation = max_margin(k, p), xp.eye(p), 0.0, 0.0
    dual = {name: xp.zeros_like(x) for name, x in params.items()}
    for a, logits, backward in mlp_pieces(params):
        target = onehot[labels(a, p)]
        deviation = max(deviation, float(xp.abs(logits - gamma * (target - 1 / p)).max()))
        wrong = logits[target == 0].reshape(len(a), p - 1)
        spread = max(spread, float((wrong.max(axis=1) - wrong.min(axis=1)).max()))
        for name, d in backward((target - (1 - target) / (p - 1)) / p**k).items():
            dual[name] += d
    whole, size = evaluate(mlp_pieces(params)), gamma * p**k
    diagonal = neuron_dft(params).sum(axis=1).real[1:]
    rows = [("norm ||theta||_{2,k+1}", norm(params), 1, 1),
            ("margin, smallest over inputs", whole["margin"], gamma, gamma),
            ("spread over wrong classes (Cond. 3.8)", spread, 0, gamma),
            ("|f - gamma* (1{c = sum a} - 1/p)|", deviation, 0, gamma),
            ("circuit share of the logits", whole["circuit_share"], 1, 1),
            ("f^(j,..,j,-j) by weights, smallest", float(diagonal.min()), size, size),
            ("f^(j,..,j,-j) by weights, largest", float(diagonal.max()), size, size)]
    if p % 2:
        _, ideal = penalty(params, gamma, k + 1)
        residual = max(float(xp.abs(dual[name] - ideal[name]).max()) for name in dual)
        largest = max(float(xp.abs(x).max()) for x in ideal.values())
        rows += [("dual condition, residual", residual, 0, largest)]
    return [(what, got, wanted, abs(got - wanted) / unit) for what, got, wanted, unit in rows]


# ---- Learning faster, beyond the paper: a control variate, equal sizes ---------------------------


def mlp_with_control_variate(params, a, coefficient, n):  # [n', k] -> [n', p]
    """mlp (z^k), with a backward whose gradients have less noise; n: inputs in the whole batch.

    Write v_j = u_j(a_j) and y = a_1 + .. + a_k. Then over all of D_p, for any weights,

        R = mean over a of sum_i rest_i(a) w~_i(y) = 0,     rest = z^k - k! v_1 .. v_k,

    where w~_i(y) = w_i(y) - mean over c of w_i(c). Expand z^k. If a monomial lacks some v_j,
    average over a_j first: only w~_i(y) depends on it, and its average is 0. The only monomial of
    degree k that has every v_j is v_1 .. v_k, which is subtracted. On a batch R is not 0, but only
    noise: R is a control variate. While the logits are small, cross-entropy is to first order

        log p - mean_a sum_i z_i^k w~_i(y),

    so that the noise of R is in the gradient, too. It is most of the noise: at Gaussian weights the
    mean square of z^k is 3, 11, 47, 205 times that of the product term k! v_1 .. v_k at k = 2, 3,
    4, 5. So this backward, given the gradient of cross-entropy by the logits, adds the gradient of

        coefficient * R.

    With coefficient 1 only the gradient of the product term is left, to first order. As the network
    learns, fast_step lets the coefficient fall to 0.

    What it is not: R assumes all p^k inputs. On a training half its mean is not 0, so this is not
    the gradient of that half's cross-entropy: it is told that the data are a whole group.
    (The gradient by v_j needs the product of the other v: v_1 .. v_{j-1}, kept in begun, times
    v_{j+1} .. v_k, gathered in dbegun from j = k down. That is 3 (k-1) products of arrays, not
    k (k-1), which at k=5 would take 1.7 times as long.)"""
    u, w = params["u"], params["w"]
    k, p, _ = u.shape
    v = [u[j][a[:, j]] for j in range(k)]
    h, power_backward = power(sum(v), k)

    def backward(dlogits):
        eye = xp.eye(p, dtype=u.dtype)
        onehot, right = eye[a], eye[labels(a, p)]
        # R = mean of z^k w~(y): w~(y) = sum_c (1{c = y} - 1/p) w(c)
        toward_right = coefficient / n * (right - 1 / p)
        dlogits = dlogits + toward_right
        dz = power_backward(dlogits @ w.T)
        # R = .. - mean of k! v_1 .. v_k w~(y)
        dproduct = -math.factorial(k) * toward_right  # by the logits of the product term alone
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


def natural_scale(k, p, m):
    """m ideal neurons of equal norm have the margin gamma* m norm^(k+1) on every input (Theorem
    4.1). Returns the root mean square of a neuron's (k+1) p entries at which this margin is 10, and
    the loss about p e^-10."""
    return (10 / (max_margin(k, p) * m)) ** (1 / (k + 1)) / math.sqrt((k + 1) * p)


def fast_settings(**given):
    """The settings of --fast, a dict: one rule for all k and p, in units of natural_scale and of
    gamma*, which the theorem gives.

    Up to the share "equal" of the steps all vectors of all neurons are held at mean 0 and one size,
    which grows (held_rms), without penalty and decay. No neuron can win by being large, so each
    has the time to settle on one frequency; without it only 45% stay alive at k=4 p=23. After that
    the sizes are free, and three things remove what is left of other frequencies: a penalty
    sum_i ||theta_i||^(k+1), a weight decay that sets in as the loss falls (gate), and a learning
    rate that falls to 0.

    The numbers were chosen on seeds from 100 up, so that few steps are enough at the paper's sizes;
    lr and 1 / weight_decay are in units of the weights' size, natural_scale.
    At a higher learning rate the neurons of k >= 4 do not settle; at a lower one many live on with
    mixed frequencies. The number of steps was found by trial at six sizes: the larger D_p is, the
    longer it takes to leave the noise."""
    rule, equal = mlp_settings(**given), given.get("equal", 0.6)
    k, p, m = rule["k"], rule["p"], rule["m"]
    scale = natural_scale(k, p, m)
    # At Gaussian weights the mean square of z^k is (2k-1)!! (k std^2)^k; logits start with rms 0.1.
    start = (0.1 / math.sqrt(m * math.prod(range(1, 2 * k, 2)) * k**k)) ** (1 / (k + 1))
    return rule | {"control_variate": "on", "equal": equal, "hold": equal, "init_std": start,
                   "steps": round(350 + k * p ** (k / 2) / 10), "lr": 0.3 / k * scale,
                   "eps": 1e-20,  # at k >= 4 the gradients of small weights are far below 1e-8
                   "weight_decay": 1.2 / (scale * (k + 1)), "penalty_power": k + 1,
                   "penalty": 0.05 * max_margin(k, p)}


def held_rms(config, step):
    """The root mean square at which all vectors are held after this step; None: they are free.

    It grows from init_std to natural_scale, where the ideal network has margin 10. It grows slowly
    at first: its logarithm rises with the square of the time."""
    equal = config["equal"]
    if step >= equal * config["steps"]:
        return None
    grown = (step / config["steps"] / equal) ** 2
    full = natural_scale(config["k"], config["p"], config["m"])
    return config["init_std"] ** (1 - grown) * full**grown


def standardize(params, rms):
    """Give each u_j and w of each neuron mean 0 and this root mean square, in place."""
    for x in (params["u"], params["w"]):  # [k, p, m], [m, p]: axis 1 is a vector's
        x -= x.mean(axis=1, keepdims=True)
        x *= rms / xp.sqrt((x * x).mean(axis=1, keepdims=True))


def gate(loss, p):
    """1 - loss / log p: 0 for a network that guesses, 1 for one that knows. Decay times the gate
    cannot end the learning before it has begun."""
    return (1 - loss / math.log(p)).clip(0)


def penalized(params, grads, config):
    """The gradients with those of the penalty added."""
    pull = penalty(params, config["penalty"], config["penalty_power"])[1]
    return {name: d + pull[name] for name, d in grads.items()}


def fast_step(run):
    """train_step for --fast: the control variate; first held sizes, then penalty, gated decay."""
    config, params, p, a = run.config, run.params, run.config["p"], next_batch(run)
    coefficient = run.coefficient if config["control_variate"] == "on" else 0
    parts = ((piece, *mlp_with_control_variate(params, piece, coefficient, len(a)))
             for piece in pieces(a, PIECE))
    loss, grads, doubt = loss_and_gradients(parts, len(a))
    # The coefficient that makes |softmax - onehot + coefficient (onehot - 1/p)|^2 least is p/(p-1)
    # times doubt: 1 for a network that guesses, 0 for one that knows, more than 1 for a wrong one.
    # It is for the next batch: one that depends on the batch that it serves could add a bias.
    run.coefficient = (p / (p - 1) * doubt).clip(0, 1)
    rms, lr = held_rms(config, run.step), learning_rate(config, run.step)
    if rms is None:
        update(run, penalized(params, grads, config), lr, config["weight_decay"] * gate(loss, p))
    else:  # the learning rate is in units of the size
        update(run, grads, lr * rms / natural_scale(config["k"], p, config["m"]), 0)
        standardize(params, rms)


# ---- The maximum margin, by training (Lemma 3.7): train_step adds the penalty --------------------


def max_margin_settings(**given):
    """The settings of --max-margin, a dict: all of D_p at each step (a batch of 2^30 is more than
    any D_p that fits), small first weights, a penalty, no decay; chosen on seeds from 100 up.

    As the strength of the penalty tends to 0, the normalized margin of the optimum tends to gamma*
    (Lemma 3.7). With the penalty strength * N, N = sum_i ||theta_i||^(k+1), and odd p more is true:
    at every strength below gamma* (p-1)/p the optimum is a max-margin network. For logits whose
    mean class-weighted margin (margins) is M, Jensen's inequality gives

        mean cross-entropy >= log(1 + (p-1) e^(-M)),     and M <= gamma* N (Lemma 4.2).

    A max-margin network of any size has equality in both, and only such a network has. What is left
    is the best size: with x = gamma* N and the strength l gamma*, log(1 + (p-1) e^(-x)) + l x is
    least where its margin x is log((p-1) (1-l) / l). So at the strength of 0.1 gamma* the optimum
    has the margin log(9 (p-1)), and a network that is wide enough lacks something of gamma* only
    because it was not trained to the optimum."""
    rule = mlp_settings(**given)
    k, p, m = rule["k"], rule["p"], rule["m"]
    scale = natural_scale(k, p, m)
    return rule | {"train_fraction": 1, "batch": 2**30, "steps": 500 * k, "hold": 0, "eps": 1e-20,
                   "init_std": 0.03 * scale, "lr": 0.06 * scale, "betas": [0.95, 0.98],
                   "weight_decay": 0, "penalty_power": k + 1, "penalty": 0.1 * max_margin(k, p)}


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
    (n, k), (heads, p, classes), query = a.shape, ov.shape, a[:, -1]
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

    This is why b_h is there. It is ours: the network has no positions, so that otherwise a head
    cannot tell the query from the other numbers. With B = e^(b_h) the query's own score adds terms,

        (2 + B)^2 logits = C(a_1 + a_2 + q) - (1 + B) / 2 (C(2 a_1 + q) + C(2 a_2 + q))
                           + B (C(2 q + a_1) + C(2 q + a_2) - C(3 q)),

    and at b_h = 0 the classes 2 q + a_1 and 2 q + a_2 are as strong as the right one. Training
    makes b_h negative in most heads. (This is a sketch: the scores that it finds are not small.)
    For k >= 4 terms of higher order in the scores are needed. At k = 4 it is s_1 s_2 OV[a_3], which
    holds the query twice: S[q, a] = cos(x_q / 2 + x_a + psi), where 1/2 is modulo p, and
    OV[a, c] = cos(x_a - x_c - 2 psi) have the right class there."""
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
    paper's; the other numbers were chosen on seeds from 100 up.

    At small k, collisions (see attention) that were not trained on are answered correctly only if
    the first weights are small; but if they are too small (0.3), one or two frequencies win before
    the others have grown, and some seeds of k=3 p=61 never learn all sums. The decay is gated
    (gate): decay from the first step on ends the learning at k >= 4 before it begins. Decay also
    makes the network forget its collisions, so in the second half of the steps it is multiplied by
    final_decay, which is smaller where collisions are common: it is 1 without any, and 0 where they
    are 4/9 of the inputs."""
    distinct = math.prod(max(0, 1 - i / p) for i in range(k - 1))  # the share without collisions
    return {"k": k, "p": p, "heads": 160, "d_head": 4, "d_model": 128, "split": "orbits",
            "train_fraction": 0.5, "steps": 3000 * (k - 1), "batch": 1024, "lr": 3e-3, "hold": 0.5,
            "init_std": 0.6 if k < 5 else 1, "betas": [0.9, 0.98], "eps": 1e-8,
            "weight_decay": 4, "final_decay": max(0, 1 - 1.5 * math.sqrt(1 - distinct))}


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
    spectrum = head_spectrum(s)
    # Add the query frequency -u to u; 0 and p/2 have no partner.
    folded = spectrum[:, u] + spectrum[:, -u] * (u != -u % s.shape[1])[:, None]
    spectra = (folded.sum(axis=1), power_spectrum(ov.transpose(0, 2, 1)).sum(axis=1),
               power_spectrum(ov).sum(axis=1))  # [H, p // 2 + 1] of keys, tokens, classes
    zeta, token, by_class = (x.argmax(axis=1) for x in spectra)
    shares = [x[each, zeta] / np.maximum(x.sum(axis=1), TINY) for x in spectra]
    keys = np.argsort(folded.sum(axis=1), axis=1)[:, -2:]  # the two strongest frequencies
    queries = np.argsort(folded.sum(axis=2), axis=1)[:, -2:]
    block = folded[each[:, None, None], queries[:, :, None], keys[:, None]].sum(axis=(1, 2))
    size = np.sqrt((s**2).mean(axis=(1, 2)) * (ov**2).mean(axis=(1, 2)))
    live, least = size >= 0.05 * size.max(), np.min(shares, axis=0)
    used = live & (least > 0.5)
    measures = {"key_share": shares[0], "token_share": shares[1], "class_share": shares[2],
                "block_share": block / np.maximum(folded.sum(axis=(1, 2)), TINY)}
    return {"frequency": zeta, "token_frequency": token, "size": size, "live": live, **measures,
            "same": (zeta == token) & (zeta == by_class), "single": live & (least > 0.95),
            "used": used, "summary": {
                "live_heads": int(live.sum()), "key_share": float(np.median(shares[0][live])),
                "frequencies_used": len(np.unique(zeta[used]))}}


def ablate_heads(params):
    """The causal check: each head with S_h at its key frequency and OV_h at its token frequency
    alone, and each without them. Both keep the mean token of OV_h, which adds a constant.

    -> restricted, excluded: functions of inputs a [n, k] that give logits [n, p]."""
    measures = head_spectra(params)
    s, ov = map(to_host, head_circuits(params["E"], [params[name] for name in HEADS])[:2])
    keys = at_frequency(s, measures["frequency"][:, None])
    tokens = at_frequency(ov.transpose(0, 2, 1), measures["token_frequency"][:, None])
    tokens = tokens.transpose(0, 2, 1)

    def network(s, ov):
        s, ov = xp.asarray(s), xp.asarray(ov)
        return lambda a: attend(s, ov, params["b"], a)[0]

    return network(keys, tokens + ov.mean(axis=1, keepdims=True)), network(s - keys, ov - tokens)


# ---- Transformers of whole blocks (Figure 4), after Power et al. 2022 ----------------------------
# Blocks, with a causal mask: x += attention(layernorm(x)), x += relu(layernorm(x) W_1) W_2; after
# the last block logits = layernorm(x) W_U.
#     E [p, d]   token embedding                     W_Q, W_K, W_V [d, H, e]   of block 1: "W_Q 1"
#     P [k, d]   position embedding                  W_O [H, e, d]
#     W_U [d, p] logits at the last position         W_1 [d, f], W_2 [f, d]


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


def feed_forward(x, w1, w2):  # [n, j, d], [d, f], [f, d] -> [n, j, d]
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

    hidden=True: -> [n, f], the activations of the last block's MLP at the last position."""
    token, unembed = params["E"], params["W_U"]
    layers = sum(name.startswith("W_Q ") for name in params)
    x, tape = token[a] + params["P"], []
    for i in range(1, layers + 1):
        read, forward = ([f"{name} {i}" for name in part] for part in (ATTENTION, FORWARD))
        weights, last = [params[name] for name in read], i == layers
        x, layer_backward = residual(x, lambda z: self_attention(z, *weights, last))
        tape.append((read, layer_backward))
        if hidden and last:  # for transformer_neurons
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
    """The settings of a transformer, a dict: a light model, by AdamW with clipping. (--figure 4
    takes the published size, the paper's betas and no clipping instead.)

    With decay 1 some seeds do not reach a test accuracy of 99% at k=2 p=97 within these steps. A
    long momentum, and the gradient clipped to norm clip, keep the accuracy at k=2 and 3 from
    falling after it has reached 99%."""
    return {"k": k, "p": p, "layers": layers, "heads": 4, "d_head": 16, "d_model": 64, "d_ff": 256,
            "split": "random", "train_fraction": 0.5, "steps": 2500, "batch": 512, "lr": 1e-3,
            "hold": 0.5, "init_std": 0.5, "betas": [0.98, 0.98], "eps": 1e-8, "weight_decay": 2,
            "clip": 0.3}


def clipped(grads, most):
    """The gradients; if the norm of all of them together exceeds most, scaled down to that."""
    total = xp.sqrt(sum((d * d).sum() for d in grads.values())) + TINY
    return {name: d * (most / total).clip(None, 1) for name, d in grads.items()}


def neuron_shares(x):  # [p, .., p, f] -> [f]
    """The share of a function's variance that one frequency holds; x: f functions on Z_p^k. It is 1
    for cos(2 pi zeta a_1/p) cos(2 pi zeta a_2/p).

    For each zeta, add the power of all entries of the DFT whose k indices are each 0, zeta or -zeta
    (not all 0). The largest of these sums over zeta, divided by that of all entries; 0 for a
    constant.

    At k = 2 this is the measure of Nanda et al. 2023 (arXiv 2301.05217)."""
    p, axes = len(x), tuple(range(x.ndim - 1))
    spectrum = np.abs(np.fft.fftn(x, axes=axes)) ** 2
    rounding = 1e-24 * spectrum[(0,) * len(axes)]  # what it leaves of a constant
    spectrum[(0,) * len(axes)] = 0
    at = [spectrum[np.ix_(*[sorted({0, zeta, p - zeta})] * len(axes))].sum(axis=axes)
          for zeta in range(1, p // 2 + 1)]
    return np.max(at, axis=0) / np.maximum(spectrum.sum(axis=axes), rounding + TINY)


def transformer_neurons(params):  # -> [p, .., p, f]
    """The activations of the last block's MLP at the last position, on all of D_p, on the host."""
    p, k = len(params["E"]), len(params["P"])
    parts = [to_host(transformer(params, a, hidden=True))
             for a in pieces(all_inputs(k, p), 4 * PIECE)]
    return np.concatenate(parts).reshape((p,) * k + (-1,))


# ---- Runs: settings, one step, progress, and one .npz file each ----------------------------------

FORMAT = "fourier-circuits run, format 5"
GROUPS = "params", "first", "second"

MODELS = {  # settings, first weights, network, what is measured of the weights
    "mlp": (mlp_settings, init_mlp, mlp, neuron_spectra),
    "attention": (attention_settings, init_attention, attention, head_spectra),
    "transformer": (transformer_settings, init_transformer, transformer, None)}

CHOICES = {"model": tuple(MODELS), "activation": ("power", "relu"), "fast": (False, True),
           "max_margin": (False, True), "control_variate": ("on", "off"),
           "split": ("random", "orbits"), "dtype": ("float32", "float64")}

NUMBERS = {  # the kind of number, the smallest, the largest
    "k": (int, 2, 200), "p": (int, 2, 10**9), "seed": (int, 0, 2**63),
    "train_fraction": (float, 0, 1), "steps": (int, 1, 10**9), "batch": (int, 1, 2**30),
    "lr": (float, 0, 1e3), "weight_decay": (float, 0, 1e6), "eps": (float, 0, 1),
    "init_std": (float, 1e-9, 1e6), "hold": (float, 0, 0.99), "m": (int, 1, 10**9),
    "equal": (float, 0, 0.99), "penalty": (float, 0, 1e6), "penalty_power": (float, 1, 16),
    "layers": (int, 1, 100), "heads": (int, 1, 10**6), "d_head": (int, 1, 10**6),
    "d_model": (int, 1, 10**6), "d_ff": (int, 1, 10**6), "final_decay": (float, 0, 1),
    "clip": (float, 1e-9, 1e9), "beta": (float, 0, 0.999999)}


def checked(name, value):
    """The value of a setting. Raises BadInput if there is no such setting or no such value."""
    flag = name.replace("_", "-")
    if name in CHOICES:
        if not any(type(value) is type(x) and value == x for x in CHOICES[name]):  # 1 is not True
            raise BadInput(f"{flag} must be one of {', '.join(map(str, CHOICES[name]))}, "
                           f"not {value!r}")
        return value
    if name == "betas" and isinstance(value, (list, tuple)) and len(value) == 2:
        return [checked("beta", x) for x in value]
    if name not in NUMBERS:
        raise BadInput(f"{flag} = {value!r}: there is no such setting, or it takes no such value")
    kind, low, high = NUMBERS[name]
    number = numbers.Integral if kind is int else numbers.Real
    if not isinstance(value, number) or isinstance(value, bool) or not low <= value <= high:
        raise BadInput(f"{flag} must be a{' whole' if kind is int else ''} number from {low:g} to "
                       f"{high:g}, not {value!r}")
    return kind(value)


def complete(given):
    """All settings of a run, a dict: those given, the others by the rule of its model.

    complete({"k": 3, "p": 23, "fast": True}) is train.py --k 3 --p 23 --fast. Raises BadInput for a
    setting out of range, or one that does not apply to the model or to the others, and for sizes
    that do not fit in memory."""
    given = {name: checked(name, value) for name, value in given.items()}
    model, fast, by_margin = (given.get(name) for name in ("model", "fast", "max_margin"))
    if bool(fast) + bool(by_margin) + (given.get("activation") == "relu") > 1:
        raise BadInput("fast, max-margin and activation relu exclude each other; choose one of "
                       "them, or none")
    rule = MODELS[model or "mlp"][0]
    if rule is mlp_settings and (fast or by_margin):
        rule = fast_settings if fast else max_margin_settings
    config = {"model": "mlp", **rule(**given), "seed": 0, "dtype": "float32"}
    for name in set(given) - set(config):
        raise BadInput(f"{name.replace('_', '-')} does not apply to this model and rule of "
                       "training (see --help); leave it out")
    config |= given
    if model == "attention" and config["split"] != "orbits":
        raise BadInput("attention cannot see the order of its inputs: its split is always orbits")
    check_size(config["k"], config["p"], config.get("m", 1))
    # Weights with gradient and moments, and attention's S and OV of all heads: see check_size.
    p, layers, heads, e, d, f = (config.get(x, 0) for x in (
        "p", "layers", "heads", "d_head", "d_model", "d_ff"))
    weights = max(layers, 1) * (4 * heads * e * d + 2 * d * f)
    tables = 0 if layers else 2 * heads * p**2
    if 16 * (weights + tables) > MAX_BYTES:
        raise BadInput("too large: weights and attention matrices of all heads exceed "
                       f"{MAX_BYTES // 2**30} GiB; take fewer or smaller heads or layers")
    return config


def network_pieces(config, params, a=None):
    """The network on inputs a [n, k], or on all of D_p in order (None), in pieces: larger ones for
    attention and transformers, whose arrays are small at their usual sizes.

    -> an iterator of (inputs, logits, backward) of each piece."""
    if config["model"] == "mlp":
        return mlp_pieces(params, a, config["activation"])
    _, _, network, _ = MODELS[config["model"]]
    a = all_inputs(config["k"], config["p"]) if a is None else a
    return ((piece, *network(params, piece)) for piece in pieces(a, 4 * PIECE))


@dataclass(eq=False)
class Run:
    """A training run: all that its file holds, and so all that its next step depends on. index, the
    indices of the inputs to train on (see digits), follows from train."""
    config: dict
    params: dict
    first: dict  # AdamW's moments
    second: dict
    train: np.ndarray  # bool [p^k], see split
    coefficient: float = 1.0  # of the control variate, for the next batch
    step: int = 0
    seconds: float = 0.0
    history: list = field(default_factory=list)  # one dict per line of progress

    def __post_init__(self):
        train, k, p = self.train, self.config["k"], self.config["p"]
        if self.config["model"] == "attention":  # one input of each orbit
            train = train & (orbits(k, p, k - 1) == np.arange(p**k))
        self.index = np.flatnonzero(train)


def new_run(config):
    """A run at step 0."""
    k, p, orbit = config["k"], config["p"], None
    if config["split"] == "orbits":  # attention's last number, the query, has its own place
        orbit = orbits(k, p, k - 1 if config["model"] == "attention" else k)
    train = split(k, p, config["train_fraction"], stream(config, 0), orbit)
    _, init, _, _ = MODELS[config["model"]]
    params = init(stream(config, 1), **config)
    moments = [{name: xp.zeros_like(x) for name, x in params.items()} for _ in range(2)]
    return Run(config, params, *moments, train)


def train_step(run):
    """One step: a random batch, the gradient of its cross-entropy, AdamW. That is all for a plain
    MLP; by a run's settings also the penalty of --max-margin, clipping (transformers), or a decay
    that depends on the loss (attention)."""
    config, params = run.config, run.params
    if config.get("fast"):
        return fast_step(run)
    a = next_batch(run)
    loss, grads, _ = loss_and_gradients(network_pieces(config, params, a), len(a))
    decay = config["weight_decay"]
    if config.get("max_margin"):
        grads = penalized(params, grads, config)
    if "clip" in config:
        grads = clipped(grads, config["clip"])
    if "final_decay" in config:  # attention's decay, see attention_settings
        falling = run.step >= config["hold"] * config["steps"]
        decay *= gate(loss, config["p"]) * (config["final_decay"] if falling else 1)
    update(run, grads, learning_rate(config, run.step), decay)


def progress(run):
    """A line of history: loss and accuracy on up to 4096 fixed inputs of the training part and of
    the test part (attention's training part has all orders of what it trains on); circuit_share, on
    the test inputs (if there are none, on the training inputs); the measures of the weights. In a
    max-margin run also the normalized margin over gamma*, on all of D_p."""
    config, params = run.config, run.params
    k, p = config["k"], config["p"]
    line, rng = {"step": run.step}, stream(config, 3)
    for name, part in (("train", run.train), ("test", ~run.train)):
        a = sample_inputs(np.flatnonzero(part), k, p, rng, 4096)
        seen = evaluate(network_pieces(config, params, a)) if len(a) else {}
        line |= {f"{name}_loss": seen.get("loss"), f"{name}_accuracy": seen.get("accuracy"),
                 "circuit_share": seen.get("circuit_share", line.get("circuit_share"))}
    _, _, _, spectra = MODELS[config["model"]]
    line |= spectra(params)["summary"] if spectra else {}
    if config.get("max_margin"):
        line["margin_ratio"] = normalized_margin(params) / max_margin(k, p)
    return line


@contextlib.contextmanager
def whole_file(path, keep=True):
    """A new file to write in, which then takes the place of path: whole, or not at all.

    keep=False: it is deleted instead; this shows whether writing would work. Raises BadInput if it
    does not."""
    path = os.path.realpath(path)  # a link stays a link
    part = os.path.join(os.path.dirname(path), f".{os.getpid()}-{secrets.token_hex(4)}.part")
    try:
        with contextlib.suppress(FileNotFoundError):
            # Opened only to see whether we may write; a pipe would wait but for NONBLOCK.
            os.close(os.open(path, os.O_WRONLY | os.O_NONBLOCK))
        with open(part, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        if keep:
            os.replace(part, path)
    except OSError as error:
        raise BadInput(f"cannot write {path}: {error.strerror}; choose another place") from None
    finally:
        with contextlib.suppress(OSError):
            os.unlink(part)


def save_run(path, run, keep=True):
    """Write a run to an .npz file, whole or not at all. keep=False: only try whether it would work.

    Raises BadInput if it does not, or if the file holds another run, or more of this one."""
    meta = {"format": FORMAT, "config": run.config, "step": run.step, "seconds": run.seconds,
            "coefficient": float(run.coefficient), "history": run.history}
    arrays = {f"{group} {name}": to_host(x) for group in GROUPS
              for name, x in getattr(run, group).items()}
    arrays |= {"train": run.train, "meta": np.array(json.dumps(meta))}
    with whole_file(path, keep) as file:
        np.savez(file, **arrays)
        if keep and os.path.exists(path):  # the last look before it is replaced
            there = load_run(path)
            if there.config != run.config or there.step > run.step:
                raise BadInput(f"{path} holds another run, or more of this one; take another --out")


def load_run(path):
    """The run in a file. Raises BadInput for a file that is not a whole run of this version."""
    if os.path.exists(path) and not os.path.isfile(path):
        raise BadInput(f"{path} is not a file")
    try:
        with open(path, "rb") as file, np.load(file, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}  # checks their CRC
        meta = json.loads(str(arrays["meta"]))
        if meta.pop("format") != FORMAT:
            raise ValueError
        groups = {group: {name.removeprefix(f"{group} "): xp.asarray(x) for name, x in
                          arrays.items() if name.startswith(f"{group} ")} for group in GROUPS}
        run = Run(**meta, **groups, train=arrays["train"])
        config, train = run.config, run.train
        _, init, _, _ = MODELS[config["model"]]
        shapes = [{name: x.shape for name, x in weights.items()} for weights in (
            init(stream(config, 1), **config), run.params, run.first, run.second)]
        if shapes != shapes[:1] * 4 or train.shape != (config["p"] ** config["k"],):
            raise ValueError
        return run
    except OSError as error:
        raise BadInput(f"cannot read {path}: {error.strerror or 'not a run file'}") from None
    except Exception:  # a damaged or foreign file fails in many ways
        raise BadInput(f"{path} is not a run file of this version, or it is damaged; "
                       "give another file") from None
