"""Fourier circuits in networks that add modulo p: one module, numpy on a CPU or cupy on a GPU.

After "Fourier Circuits in Neural Networks and Transformers: A Case Study of Modular Arithmetic with
Multiple Inputs" (Li, Liang, Shi, Song, Zhou; arXiv 2402.09469v4, "the paper" below). A network sees
k numbers a_1 .. a_k modulo p and must name their sum modulo p. The paper proves that the best such
network (largest normalized margin) consists of neurons that are cosines of a single frequency each,
and observes that training finds just these; and that attention matrices become 2-D cosines.

    arrays       use_device, to_host, slices
    data         all_inputs, labels, split                                         Eq. 1
    network      embed_sum, power, cross_entropy; init_mlp, mlp                    Eq. 2
    norm         norm, penalty, max_margin; margins, evaluate   Defs B.2, 3.1, 3.6, Theorem 4.1.1
    Fourier      power_spectrum, neuron_spectra, ablate, network_dft   Section 4, Lemma F.2
    weights      diagonal_dft, margin_bound, efficiency                            Lemma 4.2
    theory       paper_network, rotated_network, theory_check         Theorem 4.1, Lemma 4.3
    learning     product_term, loss_and_gradients, adamw, mlp_settings, timetable  Lemma 3.7
    attention    circuits, attend, attention; head_spectra, ablate_heads  Figures 3, 9, 10
    transformer  layernorm, self_attention, feed_forward, transformer              Figure 4
    runs         complete, new_run, train_step, progress, save_run, load_run

Letters
    p, k     modulus, how many numbers; >= 2      a, y     inputs [n, k], labels [n]
    m, n     neurons, inputs in a batch           u, w     a neuron's u_1..u_k and w, each p numbers
    D_p      all p^k inputs                       z, h     before and after the activation [n, m]
    c        a class; the control variate's c     zeta     a frequency, 1 .. p // 2
    H, e     heads and their width                gamma*   the largest normalized margin
    d, f     width of a state, of a block's MLP   S, OV    what heads attend to, what they write
A layer is a function y, backward = layer(x, ..): backward takes dy, the gradient of the loss by y,
and returns those by the layer's inputs. A gradient is d + the name.
"""

import contextlib
import ctypes
import functools
import hashlib
import itertools
import json
import math
import os
from dataclasses import dataclass, field

import numpy as np

# ---- Arrays: every array of a network lives in xp, which is numpy or cupy ------------------------

xp = np
CACHE_BYTES = 2**18  # elementwise work on large arrays goes in slices of this size; on a GPU larger
SLICE_BYTES = 2**25  # of the MLP's hidden layer: larger batches go in slices; D_p: 16 CACHE_BYTES
MAX_BYTES = 2**31  # of the largest array
TINY = 1e-30  # in a denominator, where all-zero weights have power 0, not 0/0


class BadInput(ValueError):
    """What the user asked for cannot be done; the message says why and what to do, in one line."""


def use_device(device):
    """Choose numpy ("cpu") or cupy ("gpu"); "auto" takes a GPU if there is one. -> "cpu" or "gpu".
    Raises BadInput if a GPU is asked for and cannot be used."""
    global xp, CACHE_BYTES
    xp, CACHE_BYTES = np, 2**18
    keep_freed_memory()
    if device != "cpu":
        with contextlib.suppress(ImportError):
            import cupy
            if cupy.is_available():
                xp, CACHE_BYTES = cupy, 2**27
    if device == "gpu" and xp is np:
        raise BadInput("no GPU can be used: CuPy is not installed or sees no CUDA device; "
                       "use --device cpu")
    return "cpu" if xp is np else "gpu"


def keep_freed_memory():
    """Ask glibc, where there is one, to keep large freed arrays for the next ones of their size.
    Fresh memory costs more than the sums that fill it; so y = x + 1 is as fast as reusing y."""
    with contextlib.suppress(AttributeError, OSError, TypeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-3, 2**25)  # M_MMAP_THRESHOLD: smaller arrays come from the heap
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: the heap keeps what is freed


def to_host(x):
    """A numpy array with the same numbers."""
    return x if isinstance(x, np.ndarray) else xp.asnumpy(x)


def slices(count, row_bytes, most=None):
    """Slices that cover range(count), each of at most `most` bytes (CACHE_BYTES), or of one row."""
    step = max(1, int((most or CACHE_BYTES) // row_bytes))
    return [slice(start, min(start + step, count)) for start in range(0, count, step)]

# ---- Data: D_p, all p^k inputs with their sums modulo p (Eq. 1) ----------------------------------


def check_size(k, p, m=1):
    """Raise BadInput unless k >= 2, p >= 2, m >= 1, and D_p and m neurons fit in memory."""
    for name, value, least in (("k", k, 2), ("p", p, 2), ("m", m, 1)):
        if value < least:
            raise BadInput(f"{name} = {value} is too small: it must be at least {least}")
    if k * math.log2(p) > 200 or max(8 * k * p**k, 16 * (k + 1) * p * m) > MAX_BYTES:
        raise BadInput(f"too large: {p}^{k} inputs, or {m} neurons of (k+1) p weights, exceed "
                       f"{MAX_BYTES // 2**30} GiB; take a smaller k, p or m")


def digits(index, k, p):  # [n] -> [n, k]
    """Inputs by their number in all_inputs: digits(0 .. p^k - 1) counts up, a_k fastest."""
    return index[:, None] // p ** xp.arange(k - 1, -1, -1) % p


def all_inputs(k, p):
    """All of D_p (Eq. 1), int [p^k, k], a_k running fastest. Raises BadInput if it is too large.
    all_inputs(2, 3) -> [[0, 0], [0, 1], [0, 2], [1, 0], .. [2, 2]]"""
    check_size(k, p)
    return digits(xp.arange(p**k), k, p)


def labels(a, p):  # [n, k] -> [n]
    """a_1 + .. + a_k mod p."""
    return a.sum(axis=1) % p


def split(k, p, fraction, rng, orbit=None):
    """A random part of D_p to train on: bool [p^k] on the host, True on round(fraction p^k) inputs.
    orbit: int [p^k], each input's group; this fraction of the groups is drawn then, whole. rng: a
    numpy Generator. Raises BadInput if the fraction is outside (0, 1] or selects nothing."""
    check_size(k, p)
    orbit = np.arange(p**k) if orbit is None else orbit
    groups = np.unique(orbit)
    count = round(fraction * len(groups)) if 0 < fraction <= 1 else 0
    if count == 0:
        raise BadInput(f"train fraction {fraction} must lie in (0, 1] and give at least one of the "
                       f"{len(groups)} inputs or orbits of inputs")
    chosen = np.zeros(p**k, bool)
    chosen[rng.permutation(groups)[:count]] = True
    return chosen[orbit]

# ---- The network: f(theta, a)[c] = sum_i (u_{i,1}(a_1) + .. + u_{i,k}(a_k))^k w_i(c)  (Eq. 2) ----


def embed_sum(u, a):  # [k, p, m], [n, k] -> [n, m]
    """z = u_1[a_1] + .. + u_k[a_k], as one product of one-hot rows with a [k p, m] table."""
    k, p, m = u.shape
    onehot = xp.eye(p, dtype=u.dtype)[a].reshape(len(a), k * p)

    def backward(dz):
        return (onehot.T @ dz).reshape(k, p, m)  # adds in a fixed order, as a scatter may not
    return onehot @ u.reshape(k * p, m), backward


def embed_grid(u, prefix):  # [k, p, m], [n, k-1] -> [n p, m]
    """embed_sum for the beginnings a_1 .. a_{k-1}, each with all p numbers a_k: a broadcast sum."""
    k, p, m = u.shape
    n = len(prefix)
    begun, begun_backward = embed_sum(u[:-1], prefix)
    z = begun[:, None] + u[-1]  # [n, p, m]

    def backward(dz):
        dz = dz.reshape(n, p, m)
        return xp.concatenate([begun_backward(dz.sum(axis=1)), dz.sum(axis=0)[None]])
    return z.reshape(n * p, m), backward


def power(z, k):  # [n, m] -> [n, m]
    """h = z^k; below = z^(k-1), made of squares, gives the slope k z^(k-1)."""
    h, slope = xp.empty_like(z), xp.empty_like(z)
    for rows in slices(len(z), z[0].nbytes):
        x = z[rows]
        below = functools.reduce(xp.multiply, [x * x] * ((k - 1) // 2) + [x] * ((k - 1) % 2))
        xp.multiply(below, x, out=h[rows])
        xp.multiply(below, k, out=slope[rows])

    def backward(dh):
        return dh * slope
    return h, backward


def relu(z):  # [n, m] -> [n, m]
    """h = max(z, 0): the other activation of Morwani et al. 2024 (arXiv 2311.07568)."""
    def backward(dh):
        return dh * (z > 0)
    return xp.maximum(z, 0), backward


def cross_entropy(logits, y):  # [n, p], [n] -> scalar
    """Mean of -log softmax(logits)[y]; backward() -> (softmax - onehot) / n."""
    n, each = len(y), xp.arange(len(y))
    x = logits - logits.max(axis=1, keepdims=True)
    exp = xp.exp(x)
    total = exp.sum(axis=1, keepdims=True)

    def backward():
        dlogits = exp / (n * total)
        dlogits[each, y] -= 1 / n
        return dlogits
    return (xp.log(total)[:, 0] - x[each, y]).mean(), backward


def gaussian(weights, rng, dtype):
    """{name: N(0, std^2)} for weights {name: (shape, std)}; drawn on the host, for any device."""
    return {name: xp.asarray((std * rng.standard_normal(shape)).astype(dtype))
            for name, (shape, std) in weights.items()}


def init_mlp(rng, k, p, m, init_std, dtype="float32", **_):
    """{"u": [k, p, m], "w": [m, p]}, entries N(0, init_std^2)."""
    return gaussian({"u": ((k, p, m), init_std), "w": ((m, p), init_std)}, rng, dtype)


def mlp(params, a, activation="power", embed=embed_sum):  # [n, k] -> [n, p]
    """The network of Eq. 2 on inputs a; activation "power" (z^k) or "relu".
    -> logits, backward(dlogits) -> {"u": du, "w": dw}. With embed_grid, a holds beginnings."""
    u, w = params["u"], params["w"]
    z, embed_backward = embed(u, a)
    h, activation_backward = power(z, len(u)) if activation == "power" else relu(z)

    def backward(dlogits):  # logits = h w
        dz = activation_backward(dlogits @ w.T)
        return {"u": embed_backward(dz), "w": h.T @ dlogits}
    return h @ w, backward


def mlp_pieces(params, a=None, activation="power"):
    """mlp, a slice of the inputs at a time: yields (inputs, logits, backward). a: [n, k]; None: all
    of D_p in order, where p inputs that differ only in a_k share the sum of all before it."""
    k, p, _ = params["u"].shape
    row_bytes = params["w"][:, 0].nbytes
    if a is not None:
        for rows in slices(len(a), row_bytes, SLICE_BYTES):
            yield a[rows], *mlp(params, a[rows], activation)
        return
    for rows in slices(p ** (k - 1), p * row_bytes, 16 * CACHE_BYTES):
        inputs = digits(xp.arange(rows.start * p, rows.stop * p), k, p)
        yield inputs, *mlp(params, inputs[::p, :-1], activation, embed_grid)

# ---- Norm (Def. B.2), penalty (Def. 3.1), margins, the largest of them (Theorem 4.1) -------------


def neuron_norms(params):  # -> [m]
    """||theta_i||_2 over the (k+1) p numbers of each neuron."""
    u, w = params["u"], params["w"]
    return xp.sqrt(xp.einsum("kpm,kpm->m", u, u) + xp.einsum("mp,mp->m", w, w))


def degree(k, activation="power"):
    """nu, the degree in which f is homogeneous: k + 1 for the power activation, 2 for ReLU."""
    return k + 1 if activation == "power" else 2


def norm(params, nu=None):
    """||theta||_{2,nu} = (sum_i ||theta_i||_2^nu)^(1/nu), nu = k + 1 by default (Def. B.2)."""
    nu = nu or len(params["u"]) + 1
    norms = neuron_norms(params)
    largest = norms.max()  # taken out first, so that no power overflows
    return float(largest * ((norms / largest) ** nu).sum() ** (1 / nu)) if largest != 0 else 0.0


def penalty(params, strength, nu, exponent):
    """strength ||theta||_{2,nu}^exponent (Def. 3.1) -> value, gradients. exponent 1 is the paper's
    regularizer; exponent nu makes it sum_i ||theta_i||^nu, smooth at 0. By theta_i the gradient is
    strength exponent ||theta||^(exponent - nu) ||theta_i||^(nu - 2) theta_i."""
    norms = neuron_norms(params)
    total = (norms**nu).sum() ** (1 / nu)
    pull = strength * exponent * (total + (total == 0)) ** (exponent - nu) * norms ** (nu - 2)
    return strength * total**exponent, {"u": pull * params["u"], "w": pull[:, None] * params["w"]}


def max_margin(k, p):
    """gamma*, the largest normalized margin of any network (Theorem 4.1, part 1).

        gamma* = 2 k! / ( (2k+2)^((k+1)/2) (p-1) p^((k-1)/2) )

    for odd p; for even p (p-1)/(p-2+r) times that, r = 2^(-(k-1)/2), by the Nyquist frequency."""
    gamma = 2 * math.factorial(k) / ((2*k + 2) ** ((k + 1) / 2) * (p - 1) * p ** ((k - 1) / 2))
    return gamma if p % 2 else gamma * (p - 1) / (p - 2 + 2 ** (-(k - 1) / 2))


def margins(logits, y):  # [n, p], [n] -> [n], [n]
    """Margin f[y] - max_{y' != y} f[y'] and class-weighted margin f[y] - mean_{y' != y} f[y'].
    The second has uniform weights (Def. 3.6). Right means a margin above 0: a tie is wrong."""
    each, p, wrong = xp.arange(len(y)), logits.shape[1], logits.copy()
    right = logits[each, y]
    wrong[each, y] = -xp.inf
    return right - wrong.max(axis=1), (p * right - logits.sum(axis=1)) / (p - 1)


def evaluate(pieces):
    """What a network does on inputs in pieces (inputs, logits, ..), see mlp_pieces -> dict: right,
    bool [n] on the host; accuracy; loss, the mean; margin, the smallest, and largest_margin."""
    margin, loss = [], 0.0
    for a, logits, *_ in pieces:
        y = labels(a, logits.shape[1])
        margin.append(to_host(margins(logits, y)[0]))
        loss += float(cross_entropy(logits, y)[0]) * len(y)
    margin = np.concatenate(margin)
    right = margin > 0
    return {"right": right, "accuracy": float(right.mean()), "loss": loss / len(right),
            "margin": float(margin.min()), "largest_margin": float(margin.max())}


def normalized_margin(params, activation="power"):
    """h(theta) / ||theta||^nu, the margin of theta / ||theta|| over D_p; for z^k at most gamma*."""
    nu = degree(len(params["u"]), activation)
    return evaluate(mlp_pieces(params, None, activation))["margin"] / (norm(params, nu) ** nu or 1)

# ---- Fourier analysis of the weights (Section 4), on the host ------------------------------------
# numpy's sign: x^(j) = sum_a x(a) e^(-2 pi i j a/p), so that A cos(theta + 2 pi zeta a/p) has
# theta = arg x^(zeta).


def power_spectrum(x, axis=-1):  # [.., p, ..] -> [.., p // 2 + 1, ..]
    """|x^(j)|^2 for j = 0 .. p // 2, conjugate pairs folded, so that the sum is that of all p."""
    x = np.moveaxis(to_host(x), axis, -1)
    j, p = np.arange(x.shape[-1] // 2 + 1), x.shape[-1]
    fold = 2 - ((j == 0) | (2 * j == p)).astype(x.dtype)  # the mean and Nyquist have no partner
    return np.moveaxis(fold * np.abs(np.fft.rfft(x)) ** 2, -1, axis)


def max_normalized_power(x, axis=-1):
    """The largest share of power at a zeta >= 1, the mean included in the whole; 1 = a cosine."""
    spectrum = np.moveaxis(power_spectrum(x, axis), axis, 0)
    return spectrum[1:].max(axis=0) / np.maximum(spectrum.sum(axis=0), TINY)


def expected_max_power(p):
    """Mean of max_normalized_power over Gaussian vectors: 2 H_n/p, n = (p-1)/2 (harmonic number),
    for odd p, else None. expected_max_power(23) -> 0.263"""
    return sum(2 / i for i in range(1, (p + 1) // 2)) / p if p % 2 else None


def neurons(params):  # -> [k+1, p, m]
    """All vectors of all neurons: u_1 .. u_k and then w."""
    return xp.concatenate([params["u"], params["w"].T[None]])


def neuron_spectra(params):
    """Each neuron's Fourier measures (Section 4), as a dict of arrays on the host.
    frequency [m]       zeta with most power in u_1..u_k and w together
    concentration [m]   share of the neuron's power at zeta, the means included in the whole
    shares [k+1, m]     maximum normalized power of each vector by itself
    phases [k+1, m]     theta_1 .. theta_k, theta_w at zeta
    phase_error [m]     |theta_1 + .. + theta_k - theta_w|, modulo 2 pi in [0, pi] (Theorem 4.1.2)
    live [m]            norm above a tenth of the largest
    summary             of the live neurons, for a line of progress"""
    vectors, norms = to_host(neurons(params)), to_host(neuron_norms(params))
    spectrum = power_spectrum(vectors, axis=1).sum(axis=0)  # [p // 2 + 1, m]
    zeta, each = 1 + spectrum[1:].argmax(axis=0), np.arange(len(norms))
    concentration = spectrum[zeta, each] / np.maximum(spectrum.sum(axis=0), TINY)
    shares = max_normalized_power(vectors, axis=1)
    phases = np.angle(np.fft.rfft(vectors, axis=1)[:, zeta, each])
    error = (phases[:-1].sum(axis=0) - phases[-1] + math.pi) % (2 * math.pi) - math.pi
    live = norms > 0.1 * norms.max()
    return {"frequency": zeta, "concentration": concentration, "shares": shares, "phases": phases,
            "phase_error": abs(error), "live": live, "summary": {
                "max_normalized_power": float(shares[:, live].mean()),
                "single_frequency_fraction": float((concentration[live] > 0.95).mean()),
                "frequencies_used": len(np.unique(zeta[live]))}}


def ablate(params):
    """The causal check: the network restricted to each neuron's own frequency, and the rest.
    -> restricted, excluded, which add up to params (after Nanda et al. 2023, arXiv 2301.05217)."""
    vectors, zeta = to_host(neurons(params)), neuron_spectra(params)["frequency"]
    k, p, _ = params["u"].shape
    transform = np.fft.rfft(vectors, axis=1) * (np.arange(p // 2 + 1)[:, None] == zeta)
    kept = np.fft.irfft(transform, n=p, axis=1).astype(vectors.dtype)
    return [{"u": xp.asarray(v[:k]), "w": xp.asarray(v[k].T.copy())}
            for v in (kept, vectors - kept)]


def network_dft(params):
    """f^(j_1, .., j_k, j_c), the (k+1)-dimensional DFT of f of Eq. 2 (Lemma F.2), complex [p, ..].
    Raises BadInput if its p^(k+1) numbers are too many."""
    k, p, _ = params["u"].shape
    if 16 * p ** (k + 1) > MAX_BYTES // 4:
        raise BadInput(f"too large: the DFT of f has {p}^{k + 1} numbers; take a smaller p")
    f = xp.concatenate([logits for _, logits, _ in mlp_pieces(params)])
    return xp.fft.fftn(f.reshape((p,) * (k + 1)))

# ---- From the weights alone, without the p^k inputs; power activation only -----------------------
# Why a neuron of the best network is a cosine (Lemma 4.2): a margin is at most the class-weighted
# one, whose mean over D_p is, but for a factor, the sum over neurons and frequencies of
# |u^_1(j)| .. |u^_k(j)| |w^(j)| cos(phase error). At a given norm, as k+1 >= 3, a neuron gives most
# with all power at one frequency, shared equally by u_1 .. u_k and w, and phase error 0.


def neuron_dft(params):  # -> complex [p, m]
    """Each neuron's f^(j,..,j,-j): k! w^(-j) u^_1(j) .. u^_k(j) (Lemma D.8), set to 0 at j = 0."""
    u, w = params["u"], params["w"]
    dft = xp.conj(xp.fft.fft(w, axis=1).T) * xp.fft.fft(u, axis=1).prod(axis=0)
    dft[0] = 0
    return math.factorial(len(u)) * dft


def diagonal_dft(params):  # -> [p]
    """S_j = f^(j, .., j, -j) for j = 1 .. p-1, real if all phase errors are 0; S_0 = 0.
    A max-margin network has S_j > 0 (Lemma F.2), on the unit ball S_j = gamma* p^k."""
    return neuron_dft(params).sum(axis=1)


def margin_bound(params):
    """An upper bound on the margin h: the least mean over D_p of f[y] - f[y + Delta], Delta != 0.
    That mean is p^-(k+1) sum_j S_j (1 - e^(-2 pi i j Delta/p))."""
    k, p, _ = params["u"].shape
    diagonal = diagonal_dft(params)
    means = (diagonal.sum() - xp.fft.fft(diagonal)).real[1:] / float(p) ** (k + 1)
    return float(means.min())


def efficiency(params):  # -> [m]
    """Each neuron's class-weighted margin at unit norm, sum_{j != 0} f^(j,..,j,-j) / ((p-1) p^k),
    over gamma* (Lemmas 4.2, D.8). Odd p: in [-1, 1], 1 for cosines of one size, phases in order;
    for even p a cosine reaches (p-2+r)/(p-1), r = 2^(-(k-1)/2), a Nyquist neuron 1/r of that."""
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
    For each zeta, cos(x_1 + .. + x_k - y) is a sum of 2^k products of cosines and sines, where
    x_j = 2 pi zeta a_j/p and y = 2 pi zeta c/p; each product is a sum of 2^(k-1) k-th powers:

        2^k k! d_1 .. d_k = sum over signs s of s_1 .. s_k (s_1 d_1 + .. + s_k d_k)^k   (Lemma E.1)

    where s and -s give the same. Raises BadInput for even p, which the paper leaves out."""
    check_size(k, p, 2 ** (2*k - 2) * (p - 1))
    if p % 2 == 0:
        raise BadInput(f"the paper's network is for odd p, not {p}; rotated_network takes any p")
    # A sine is a cosine a quarter turn late: late_j = 1 makes d_j = cos(x_j - pi/2) = sin x_j. If
    # q, the number of sines, is odd, y takes one too; (-1)^(q // 2) is the product's sign.
    late = np.array(list(itertools.product((0, 1), repeat=k)))  # [2^k, k]
    q = late.sum(axis=1)
    signs = half_of_all_signs(k)
    last = (-1) ** (q // 2)[:, None] * signs.prod(axis=1)  # [2^k, 2^(k-1)]
    amplitudes = np.column_stack([np.tile(signs, (len(late), 1)), last.reshape(-1)])
    phases = -np.pi / 2 * np.column_stack([late, q % 2]).repeat(len(signs), axis=0)
    return cosine_network(k, p, amplitudes, phases)


def rotated_network(k, p):
    """A smaller max-margin network, beyond the paper: (k+1) 2^(k-2) (p-1) neurons for odd p.
    All phases turn together, by psi_s = pi s/(k+1) for s = 0 .. k, those of w by k psi_s. The signs
    of Lemma E.1 leave 2^(k-1) k! prod_j cos(x_j + psi_s) cos(y + k psi_s). In exponentials the last
    cosine is half e^(-i (y + k psi_s)) and half its conjugate; times that, the x_j's term with q
    minus signs has e^(-2 i q psi_s), whose sum over s is k+1 for q = 0 and else 0: only
    cos(x_1 + .. + x_k - y) is left. Even p (2, parity, is one) has (k+1) 2^(k-2) (p-2) of these and
    2^(k-1) for the Nyquist frequency, where cos(x_j) = (-1)^a_j needs no turning."""
    check_size(k, p, (k + 1) * 2 ** (k - 1) * (p // 2))
    signs = half_of_all_signs(k)
    amplitudes = np.tile(np.column_stack([signs, signs.prod(axis=1)]), (k + 1, 1))
    turns = np.repeat(np.arange(k + 1), len(signs))[:, None] * np.array([1] * k + [k])
    return cosine_network(k, p, amplitudes, np.pi / (k + 1) * turns)


def cosine_network(k, p, amplitudes, phases):
    """-> {"u", "w"} of norm 1: neurons amplitude cos(phase + 2 pi zeta a/p), [rows, k+1] of each,
    for every zeta. For odd p all have one norm. For even p the Nyquist ones, the first 2^(k-1) rows
    alone, have the share r / (p-2+r), r = 2^(-(k-1)/2), of sum_i ||theta_i||^(k+1)."""
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
    """Compare a network of norm 1 with Theorem 4.1 (G.2) on all p^k inputs, by brute force.
    For odd p it is max-margin if and only if f(a)[c] = gamma* (1{c = sum a} - 1/p), so that all
    wrong classes are alike (Condition 3.8); for even p ours has this f too. For odd p also the
    dual: the mean class-weighted margin's gradient is gamma* that of sum_i ||theta_i||^(k+1).
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
    diagonal = diagonal_dft(params)[1:]
    rows = [("norm ||theta||_{2,k+1}", norm(params), 1, 1),
            ("margin, smallest over inputs", whole["margin"], gamma, gamma),
            ("margin, largest over inputs", whole["largest_margin"], gamma, gamma),
            ("spread over wrong classes (Cond. 3.8)", spread, 0, gamma),
            ("|f - gamma* (1{c = sum a} - 1/p)|", deviation, 0, gamma),
            ("margin bound from the weights", margin_bound(params), gamma, gamma),
            ("S_j from the weights, smallest", float(diagonal.real.min()), size, size),
            ("S_j from the weights, largest", float(diagonal.real.max()), size, size),
            ("S_j imaginary part", float(xp.abs(diagonal.imag).max()), 0, size)]
    if 16 * p ** (k + 1) <= MAX_BYTES // 4:  # else network_dft would refuse
        f, j = xp.abs(network_dft(params)), xp.arange(1, p)
        places = (j,) * k + (p - j,)
        rows += [("f^(j,..,j,-j), smallest (Lemma F.2)", float(f[places].min()), size, size)]
        f[places] = 0
        rows += [("f^ elsewhere, largest (Lemma F.2)", float(f.max()), 0, size)]
    if p % 2:
        _, ideal = penalty(params, gamma, k + 1, k + 1)
        residual = max(float(xp.abs(dual[name] - ideal[name]).max()) for name in dual)
        largest = max(float(xp.abs(x).max()) for x in ideal.values())
        rows += [("dual condition, residual", residual, 0, largest)]
    return [(what, got, wanted, abs(got - wanted) / unit) for what, got, wanted, unit in rows]

# ---- Learning: one loss, cross-entropy; a control variate that quiets its gradient; AdamW --------


def product_term(params, a):  # [n, k] -> scalar, {"u": du, "w": dw}
    """A quiet estimate of the linear part of cross-entropy, and its gradients.

    To first order in the logits, cross-entropy is log p plus

        L(theta) = mean_a ( mean_c f(a)[c] - f(a)[y] ),                         y = a_1 + .. + a_k,
                 = -k! mean_a sum_i u_{i,1}(a_1) .. u_{i,k}(a_k) w~_i(y),     w~ = w - mean_c w.

    The lines are equal over all of D_p, for any weights: expand z^k; a monomial that lacks some u_j
    leaves a_j free, and over a_j alone w~_i(y) averages to 0; in degree k only the product of all k
    lacks none (Lemma 4.2's form). On a batch both estimate L, but the first has all the monomials'
    noise: at Gaussian weights the mean square of z^k is 3, 11, 47, 205 times that of the product
    term at k = 2, 3, 4, 5. -> the second line on the batch a, its gradients."""
    u, w = params["u"], params["w"]
    k, p, m = u.shape
    n, y, eye = len(a), labels(a, p), xp.eye(p, dtype=u.dtype)
    scale = -math.factorial(k) / n
    centred = xp.ascontiguousarray((w - w.mean(axis=1, keepdims=True)).T)  # w~, [p, m]
    product, *dx = (xp.empty((n, m), u.dtype) for _ in range(k + 1))
    value = 0
    for rows in slices(n, product[0].nbytes):
        x = [u[j, a[rows, j]] for j in range(k)]
        before = list(itertools.accumulate(x, xp.multiply))  # before[j] = x_0 .. x_j
        product[rows] = before[-1]
        after = scale * centred[y[rows]]  # dx_j = scale w~(y) times all x but x_j
        value = value + (before[-1] * after).sum()
        for j in range(k - 1, 0, -1):
            xp.multiply(before[j - 1], after, out=dx[j][rows])
            after *= x[j]
        dx[0][rows] = after
    du = xp.stack([eye[a[:, j]].T @ dx[j] for j in range(k)])  # x_j = u_j[a_j]
    dw = product.T @ (scale * (eye[y] - 1 / p))  # w~ = w - mean_c w
    return value, {"u": du, "w": dw}


def loss_and_gradients(pieces, n, quiet=None, c=0):
    """Mean cross-entropy over n inputs in pieces (inputs, logits, backward), and its gradients.
    quiet: an MLP's parameters, for the control variate. A multiple c of L's gradient is taken out
    of what cross-entropy sends back through the logits, and put back by product_term:

        backward( (softmax - onehot + c (onehot - 1/p)) / n )  +  c grad product_term.

    For every c its mean over D_p is cross-entropy's gradient, as there both estimates of L agree.
    On a training half it is not: the half's product term replaces c times its own linear part.
    -> loss, gradients, and the c with which c (onehot - 1/p) comes closest to onehot - softmax,
    p/(p-1) (1 - mean softmax[y]): 1 at softmax = 1/p, 0 where all is known. It is for the next
    batch: a c that depends on the batch that it serves could add a bias."""
    loss, best, grads = 0, 0, {}
    for a, logits, backward in pieces:
        p, share = logits.shape[1], len(a) / n
        y = labels(a, p)
        part, loss_backward = cross_entropy(logits, y)
        loss = loss + share * part
        dlogits = share * loss_backward()
        if quiet is not None:
            toward = (xp.eye(p, dtype=logits.dtype)[y] - 1 / p) / n
            best = best - (dlogits * toward).sum() * (n * p / (p - 1))
            dlogits = dlogits + c * toward
            put_back = product_term(quiet, a)[1]
        for name, d in backward(dlogits).items():
            d = d if quiet is None else d + share * (c * put_back[name])
            grads[name] = grads[name] + d if name in grads else d
    return loss, grads, best


def natural_scale(k, p, m):
    """The entry size (rms) at which m ideal neurons of equal norm have margin 10 on every input,
    gamma* m norm^(k+1) (Theorem 4.1); a neuron has (k+1) p entries."""
    return (10 / (max_margin(k, p) * m)) ** (1 / (k + 1)) / math.sqrt((k + 1) * p)


def mlp_settings(k=3, p=23, m=None, activation="power", **given):
    """The settings of the MLP, a dict: one rule for all k and p, in units of natural_scale.
    1. Up to the share equal of the steps all vectors of all neurons have mean 0 and one size, which
       grows (timetable), without penalty and decay: none can win by size, so each has time to
       settle on one frequency.
    2. Then all is free: penalty sum_i ||theta_i||^(k+1), decay times 1 - loss/log p, lr going to 0.
    max_margin: phase 2 only, on all of D_p, without decay: as the penalty tends to 0 the optimum's
    normalized margin tends to gamma* (Lemma 3.7); here it is small and fixed."""
    check_size(k, p)
    m = 2 ** (2*k - 2) * (p - 1) if m is None else m
    check_size(k, p, m)
    scale, gamma, nu = natural_scale(k, p, m), max_margin(k, p), degree(k, activation)
    # At Gaussian weights the mean square of z^k is (2k-1)!! (k std^2)^k; logits start with rms 0.1.
    start = (0.1 / math.sqrt(m * math.prod(range(1, 2*k, 2)) * k**k)) ** (1 / (k + 1))
    rule = {"k": k, "p": p, "m": m, "activation": activation, "max_margin": False, "equal": 0.6,
            "train_fraction": 0.5, "steps": round(350 + k * p ** (k / 2) / 10), "batch": 1024,
            "init_std": start, "control_variate": "on", "lr": 0.3 / k * scale, "betas": [0.9, 0.98],
            "weight_decay": 1.2 / (scale * nu), "penalty": 0.05 * gamma, "penalty_power": nu}
    if activation == "relu":
        rule |= {"steps": 1500, "init_std": 0.2 * scale, "equal": 0, "control_variate": "off",
                 "lr": 0.05 * scale, "weight_decay": 1.4 / (scale * nu), "penalty": 0}
    if given.get("max_margin"):
        rule |= {"train_fraction": 1, "steps": 500 * k, "batch": 2**30, "init_std": 0.03 * scale,
                 "equal": 0, "control_variate": "off", "lr": 0.06 * scale, "betas": [0.95, 0.98],
                 "weight_decay": 0, "penalty": 0.1 * gamma}
    return rule


def timetable(config, step):
    """-> lr of this step, rms: the size to give all vectors after it (None: they are free).
    While the size is given it grows, slowly at first, from init_std to where the ideal network has
    margin 10, and lr is in units of it. Then lr goes to 0."""
    done, equal = step / config["steps"], config.get("equal", 0)
    lr = config["lr"] * min(1, (step + 1) / 10)  # ten steps to warm up
    if done >= equal:
        held = config.get("hold", equal)
        return lr * min(1, (1 - done) / (1 - held)), None
    full = natural_scale(config["k"], config["p"], config["m"])
    grown = (done / equal) ** 2
    rms = config["init_std"] ** (1 - grown) * full**grown
    return lr * rms / full, rms


def standardize(params, rms):
    """Give each u_j and w of each neuron mean 0 and this root mean square, in place."""
    for x in (params["u"], params["w"]):
        x -= x.mean(axis=1, keepdims=True)
        x *= rms / xp.sqrt((x * x).mean(axis=1, keepdims=True))


def adamw(params, grads, first, second, step, lr, weight_decay, betas, eps=1e-30):
    """One step of AdamW, in place (Loshchilov and Hutter 2019, Algorithm 2 with decay lr * wd).
    first, second: means of the gradient and of its square, running at betas; step counts from 1.
    eps is tiny as a small network's gradients are below 1e-8. Biases, of one axis, do not decay."""
    beta1, beta2 = betas
    root = math.sqrt(1 - beta2**step)  # the bias corrections, taken out of the arrays
    size = lr * root / (1 - beta1**step)
    for name in params:
        x, g, mean, square = (group[name].reshape(-1) for group in (params, grads, first, second))
        kept = 1 - lr * weight_decay if params[name].ndim > 1 else 1
        for part in slices(len(x), 2 * x.itemsize):
            mean[part] += (1 - beta1) * (g[part] - mean[part])
            square[part] += (1 - beta2) * (g[part] * g[part] - square[part])
            x[part] *= kept
            x[part] -= size * mean[part] / (xp.sqrt(square[part]) + eps * root)

# ---- One layer of attention alone, without positions (Figures 3, 9, 10) --------------------------
# The last number is the query.
#     E [p, d]             token embedding          W_Q, W_K, W_V [d, H, e]   H heads of width e
#     b [H]                own score's bias         W_P [H, e, p]             projection to logits


HEADS = "W_Q", "W_K", "W_V", "W_P"


def orbits(k, p):  # -> int [p^k], on the host
    """For each input the number of its orbit's first member, a_1 <= .. <= a_{k-1}. To attention
    without positions an input with a permuted copy in training is no test; see split."""
    a = np.stack(np.unravel_index(np.arange(p**k), (p,) * k), axis=1)
    a[:, :-1].sort(axis=1)
    return a @ p ** np.arange(k - 1, -1, -1)


def collisions(k, p):  # -> bool [p^k], on the host
    """Inputs with two equal numbers among a_1 .. a_{k-1} (see attention)."""
    ordered = np.stack(np.unravel_index(orbits(k, p), (p,) * k))[:-1]
    return (np.diff(ordered, axis=0) == 0).any(axis=0)


def init_attention(rng, p, heads, d_head, d_model, init_std, dtype="float32", **_):
    """Embedding N(0, init_std^2 / 4), weights N(0, init_std^2 / fan-in), b ~ N(0, 1)."""
    read = (d_model, heads, d_head), init_std / math.sqrt(d_model)
    write = (heads, d_head, p), init_std / math.sqrt(heads * d_head)
    return gaussian({"E": ((p, d_model), init_std / 2), **dict.fromkeys(HEADS[:3], read),
                     "W_P": write, "b": ((heads,), 1)}, rng, dtype)


def circuits(x, weights):  # [v, d], 3 [d, H, e] and [H, e, c] -> S [H, v, v], OV [H, v, c]
    """What heads attend to and what they then write, for the v vectors that a first layer can see.

        S_h[q, a] = (x W_Q^h)_q . (x W_K^h)_a / sqrt(e),     OV_h[a] = (x W_V^h W_P^h)_a

    For x = E, the tokens, S is the attention matrix E^T W^{KQ} E of the paper's figures, rows and
    columns exchanged, over sqrt(e). Both are computed once per token, however often a batch has it.
    weights: W_Q, W_K, W_V, W_P. -> S, OV, backward(dS, dOV) -> dx, [dW_Q, dW_K, dW_V, dW_P]."""
    *read, write = weights
    scale = 1 / math.sqrt(write.shape[1])
    query, key, value = (xp.tensordot(x, w, 1).transpose(1, 0, 2) for w in read)  # [H, v, e]
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
        dx, dread = 0, []
        for w, dy in zip(read, (dquery, dkey, dvalue)):
            dy = dy.transpose(1, 0, 2).reshape(len(x), -1)  # [v, H e]
            dx = dx + dy @ w.reshape(x.shape[1], -1).T
            dread.append((x.T @ dy).reshape(w.shape))
        return dx, [*dread, dwrite]
    return s, ov, backward


def attend(s, ov, b, key, query):  # [H, q, v], [H, v, c], [H], [n, j], [n] -> [n, c]
    """Each input's query attends to its j keys, by the tables of circuits.

        A_hj = softmax over j of S_h[query, key_j] + b_h [j last],  y = sum_h sum_j A_hj OV_h[key_j]

    The n j pairs (input, place) are sorted by key: those of one token make a small product. query
    counts rows of S_h, key its columns and OV_h's rows. -> y, backward(dy) -> dS, dOV, db."""
    n, j = key.shape
    heads, v, c = ov.shape
    queries = s.shape[1]
    token, asks = key.T.reshape(-1), xp.tile(query, j)  # [j n], place by place
    order = xp.argsort(token)
    back = xp.argsort(order)
    ends = np.cumsum(to_host(xp.bincount(token, minlength=v))).tolist()
    pairs = [slice(start, end) for start, end in zip([0, *ends], ends)]  # of each token, sorted
    write = xp.ascontiguousarray(ov.transpose(1, 0, 2))  # [v, H, c]
    table = s.transpose(2, 1, 0).reshape(v * queries, heads)
    score = table[token * queries + asks].reshape(j, n, heads)
    score[-1] += b
    A = xp.exp(score - score.max(axis=0))
    A /= A.sum(axis=0)
    weight = A.reshape(j * n, heads)[order]
    y = xp.empty((j * n, c), s.dtype)
    for t, pair in enumerate(pairs):
        xp.matmul(weight[pair], write[t], out=y[pair])

    def backward(dy):
        # y[pair] = weight[pair] write[t]; y = the sum of an input's places
        dy = dy[order % n]  # [j n, c], sorted
        dweight, dwrite = xp.empty_like(weight), xp.empty_like(write)
        for t, pair in enumerate(pairs):
            xp.matmul(weight[pair].T, dy[pair], out=dwrite[t])
            xp.matmul(dy[pair], write[t].T, out=dweight[pair])
        # weight = A, sorted; A = softmax(score)
        dA = dweight[back].reshape(j, n, heads)
        dscore = A * (dA - (A * dA).sum(axis=0))
        # score[-1] += b
        db = dscore[-1].sum(axis=0)
        # score = table[token, asks]: one-hot products add up what each query gave to each key
        dscore = dscore.reshape(j * n, heads)[order]
        onehot = xp.eye(queries, dtype=s.dtype)[asks[order]]
        dtable = xp.empty((v, queries, heads), s.dtype)
        for t, pair in enumerate(pairs):
            xp.matmul(onehot[pair].T, dscore[pair], out=dtable[t])
        return dtable.transpose(2, 1, 0), dwrite.transpose(1, 0, 2), db
    return y[back].reshape(j, n, c).sum(axis=0), backward


def attention(params, a):  # [n, k] -> [n, p]
    """logits[c] = sum_h sum_j A_hj OV_h[a_j, c], softmax over the k numbers, queried by the last.

    b_h, the bias of the query's own score, is ours. -> logits, backward(dlogits) -> a dict like
    params. Attention can add only thanks to the softmax's denominator: without it the logits of a
    query would be sums of one term per number. For small scores, b = 0 and one head,
    A_j = 1/k (1 + s_j - 1/k (s_1 + .. + s_k) + ..), and the answer is made by the products of one
    number's score and another's OV, of sign -. At a collision, a_i = a_j among a_1 .. a_{k-1},
    s_j OV[a_j] gives the same with the sign +: it needs other heads, and is counted apart."""
    s, ov, circuits_backward = circuits(params["E"], [params[name] for name in HEADS])
    logits, attend_backward = attend(s, ov, params["b"], a, a[:, -1])

    def backward(dlogits):
        ds, dov, db = attend_backward(dlogits)
        de, dweights = circuits_backward(ds, dov)
        return {"E": de, **dict(zip(HEADS, dweights)), "b": db}
    return logits, backward


def head_tables(params):
    """S_h without the mean of each query's row, which no softmax can see; OV_h without its mean
    token, a bias, and each token's mean over classes, which changes no answer; float64, on host."""
    tables = circuits(params["E"], [params[name] for name in HEADS])[:2]
    s, ov = (to_host(x).astype("float64") for x in tables)
    ov = ov - ov.mean(axis=1, keepdims=True)
    return s - s.mean(axis=2, keepdims=True), ov - ov.mean(axis=2, keepdims=True)


def head_spectrum(s):  # [H, p, p] -> [H, p, p // 2 + 1]
    """2-D DFT power, of rows of mean 0 (none at v = 0). [u, v]: query, key frequency; (-u, -v), its
    equal in a real matrix, is counted in. (Of an even p, the pairs at v = p/2 stay apart.)"""
    v, p = np.arange(s.shape[1] // 2 + 1), s.shape[1]
    return np.abs(np.fft.rfft2(s)) ** 2 * (2 - (2 * v == p))


def head_spectra(params):
    """Each head's Fourier measures (Figures 3, 9, 10) by head_tables, as a dict of host arrays.
    shares [H, 3]    of the power of S_h in its top one, two and three frequency pairs +-(u, v);
                     cos(2 pi u q/p) cos(2 pi v a/p) is two of them, (u, v) and (-u, v)
    top [H, 3, 2]    those pairs, -p/2 <= u < p/2 (query) and 0 <= v <= p/2 (key)
    rank [H]         singular values above a hundredth of the largest; at most d_head
    size [H]         rms(S_h) rms(OV_h) over the largest
    live [H]         size at least a twentieth
    summary          of the live heads, for a line of progress; frequencies_used: of keys"""
    s, ov = head_tables(params)
    p = s.shape[1]
    spectrum = head_spectrum(s).reshape(len(s), -1)
    order = np.argsort(-spectrum, axis=1)[:, :3]
    shares = np.cumsum(np.take_along_axis(spectrum, order, axis=1), axis=1)
    shares /= np.maximum(spectrum.sum(axis=1, keepdims=True), TINY)
    u, v = order // (p // 2 + 1), order % (p // 2 + 1)
    top = np.stack([(u + p // 2) % p - p // 2, v], axis=2)
    values = np.linalg.svd(s, compute_uv=False)
    size = np.sqrt((s**2).mean(axis=(1, 2)) * (ov**2).mean(axis=(1, 2)))
    size /= np.maximum(size.max(), TINY)
    live = size >= 0.05
    return {"shares": shares, "top": top, "rank": (values > 0.01 * values[:, :1]).sum(axis=1),
            "size": size, "live": live, "summary": {
                "top_two_share": float(np.median(shares[live, 1])), "live_heads": int(live.sum()),
                "frequencies_used": len(np.unique(top[live, 0, 1]))}}


def ablate_heads(params, keep=2):
    """The causal check: each S_h with its top frequency pairs only, and with all the others only.
    -> restricted, excluded: functions of inputs a [n, k] that give logits [n, p]."""
    s, ov, _ = circuits(params["E"], [params[name] for name in HEADS])
    centred, _ = head_tables(params)
    spectrum = head_spectrum(centred)
    least = np.sort(spectrum.reshape(len(spectrum), -1), axis=1)[:, -keep, None, None]
    kept = np.fft.irfft2(np.fft.rfft2(centred) * (spectrum >= least), s=s.shape[1:])
    tables = [xp.asarray(x.astype(s.dtype)) for x in (kept, centred - kept)]
    return [lambda a, table=table: attend(table, ov, params["b"], a, a[:, -1])[0]
            for table in tables]

# ---- Transformers of several layers (Figure 4), after Power et al. 2022 --------------------------
# Blocks, with a causal mask: x += attention(layernorm(x)), x += relu(layernorm(x) W_1) W_2.
#     E [p, d]   token embedding                     W_Q, W_K, W_V [d, H, e]   of layer 1: "W_Q 1"
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
    for l in range(1, layers + 1):
        weights |= {f"{name} {l}": size for name, size in zip(ATTENTION + FORWARD, block)}
    return gaussian(weights | {"W_U": ((d, p), std)}, rng, dtype)


def layernorm(x, eps=1e-5):  # [.., d] -> [.., d]
    """Mean 0 and variance 1, without gain or bias: the weights that read it can hold a gain."""
    mean = lambda x: x.mean(axis=-1, keepdims=True)
    centred = x - mean(x)
    r = 1 / xp.sqrt(mean(centred * centred) + eps)
    z = centred * r

    def backward(dz):
        return r * (dz - mean(dz) - z * mean(z * dz))  # z = centred r; r falls as x spreads
    return z, backward


def first_attention(table, weights, a, p):  # [k p, d], .., [n, k] -> [n, k, d]
    """x + attention(layernorm(x)) in layer 1, by tables, for speed: it sees but k p vectors. Row
    j p + t of the table is token t at j, which asks about 0 .. j. backward -> dtable, dweights."""
    n, k = a.shape
    z, norm_backward = layernorm(table)
    s, ov, circuits_backward = circuits(z, weights)
    position = xp.arange(k * p) // p
    later = position[:, None] < position  # [query, key]
    row = a + p * xp.arange(k)  # [n, k], of the table
    y, attend_backward = attend(xp.where(later, -xp.inf, s), ov, xp.zeros(len(s), s.dtype),
                                row.repeat(k, axis=0), row.reshape(-1))

    def backward(dx):
        dx = dx.reshape(n * k, -1)
        ds, dov, _ = attend_backward(dx)
        dz, dweights = circuits_backward(ds, dov)
        # x = table[row] + ..
        onehot = xp.eye(k * p, dtype=table.dtype)[row.reshape(-1)]
        return norm_backward(dz) + onehot.T @ dx, dweights
    return table[row] + y.reshape(n, k, -1), backward


def self_attention(x, w_q, w_k, w_v, w_o, last):  # [n, k, d] -> [n, k, d], or [n, 1, d] if last
    """Causal attention past layer 1, where states differ from input to input and tables are no use.
    last: only the last position asks. -> y, backward(dy) -> dx, [dW_Q, dW_K, dW_V, dW_O].

        A_hij = softmax over j <= i of q_hi . k_hj / sqrt(e),  y_i = sum_h sum_j A_hij v_hj W_O^h"""
    k, scale = x.shape[1], 1 / math.sqrt(w_o.shape[1])
    asks = x[:, -1:] if last else x  # [n, i, d]
    q, key, v = xp.tensordot(asks, w_q, 1), xp.tensordot(x, w_k, 1), xp.tensordot(x, w_v, 1)
    score = scale * xp.einsum("nihe,njhe->nijh", q, key)
    if not last:
        position = xp.arange(k)
        later = position[:, None] < position  # [i, j]
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
        # q, key, v = asks w_q, x w_k, x w_v
        dx, dweights = xp.zeros_like(x), []
        for seen, w, dz in ((asks, w_q, dq), (x, w_k, dkey), (x, w_v, dv)):
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


def transformer(params, a):  # [n, k] -> [n, p]
    """The network, of 2 layers or more, on inputs a -> logits, backward(dlogits) -> dparams."""
    embedding, place, project = params["E"], params["P"], params["W_U"]
    (p, d), k, layers = embedding.shape, len(place), (len(params) - 3) // len(ATTENTION + FORWARD)
    table = (place[:, None] + embedding).reshape(k * p, d)
    tape = []
    for l in range(1, layers + 1):
        read, think = ([f"{name} {l}" for name in part] for part in (ATTENTION, FORWARD))
        weights = [params[name] for name in read]
        if l == 1:
            x, backward = first_attention(table, weights, a, p)
        else:  # the last layer asks only at the last position
            x, backward = residual(x, lambda z: self_attention(z, *weights, l == layers))
        tape.append((read, backward))
        x, backward = residual(x, lambda z: feed_forward(z, *(params[name] for name in think)))
        tape.append((think, backward))
    z, norm_backward = layernorm(x[:, -1])

    def backward(dlogits):
        # logits = z project
        grads = {"W_U": z.T @ dlogits}
        dx = norm_backward(dlogits @ project.T)[:, None]
        for names, layer_backward in reversed(tape):
            dx, dweights = layer_backward(dx)
            grads |= zip(names, dweights)
        # table = place + embedding
        dtable = dx.reshape(k, p, d)
        return grads | {"E": dtable.sum(axis=0), "P": dtable.sum(axis=1)}
    return z @ project, backward


def transformer_settings(k=3, p=31, layers=1, **_):
    """The settings of transformers, a dict. Up to the share hold of the steps lr is held; then it
    goes to 0. One layer: the smaller k, the smaller a start its collisions need to generalize; late
    decay is times late_decay. Several layers: our Figure 4's light model; its long momentum and the
    gradient, clipped to norm clip, keep accuracy from falling after 99% at k = 2 and 3."""
    check_size(k, p)
    rule = {"k": k, "p": p, "layers": layers, "train_fraction": 0.5, "hold": 0.5}
    if layers != 1:
        return rule | {"heads": 4, "d_head": 16, "d_model": 64, "d_ff": 256, "steps": 2500,
                       "batch": 512, "init_std": 0.5, "lr": 1e-3, "betas": [0.98, 0.98],
                       "weight_decay": 3, "clip": 0.3}
    distinct = math.prod(max(0, 1 - i / p) for i in range(k - 1))  # the share without collisions
    return rule | {"heads": 160, "d_head": 4, "d_model": 128, "batch": 1024, "weight_decay": 4,
                   "steps": 3000 * (k - 1), "init_std": 0.3 ** (max(0, 5 - k) / 2), "lr": 3e-3,
                   "betas": [0.9, 0.98], "late_decay": max(0, 1 - 1.5 * math.sqrt(1 - distinct))}


def embedding_spectra(params):
    """The token embedding's power by frequency, over all its columns, on the host: shares [p // 2],
    of the frequencies 1 .. p // 2; summary: that of the strongest tenth of them, rounded up."""
    spectrum = power_spectrum(params["E"], axis=0).sum(axis=1)[1:]
    shares = spectrum / spectrum.sum()
    top = np.sort(shares)[-math.ceil(len(shares) / 10):]
    return {"shares": shares, "summary": {"embedding_share": float(top.sum())}}

# ---- Runs: settings, one step, progress, and one .npz file each ----------------------------------


FORMAT = "fourier-circuits run, format 4"
GROUPS = "params", "first", "second"


def complete(given):
    """All settings of a run: those given, the others by its model's rule. Raises BadInput for a
    setting that does not apply to the model or to the others, and for sizes that do not fit."""
    model = given.get("model", "mlp")
    settings = {"mlp": mlp_settings, "transformer": transformer_settings}[model]
    rule = settings(**given) | {"model": model, "seed": 0, "dtype": "float32"}
    for name in given:
        if name not in rule:
            raise BadInput(f"{name.replace('_', '-')} does not apply to this --model and --layers "
                           f"({model}, {rule.get('layers', '-')}); leave it out")
    config = rule | given
    if config.get("activation") == "relu" and (config["max_margin"]
                                               or config["control_variate"] == "on"):
        raise BadInput("max-margin and control-variate are for the power activation, the one with "
                       "a known gamma* and product term; leave them out")
    if model == "transformer":
        k, p, layers, heads, e, d, f = (config.get(x, 0) for x in (
            "k", "p", "layers", "heads", "d_head", "d_model", "d_ff"))
        if 16 * (layers * d * f + heads * (e + k * p) * (layers * d + k * p)) > MAX_BYTES:
            raise BadInput("too large: weights and attention matrices of all heads exceed "
                           f"{MAX_BYTES // 2**30} GiB; take fewer or smaller heads or layers")
    return config


def model_of(config):
    """What tells the models apart: functions for the first weights, the network, its spectra."""
    models = ((init_mlp, mlp, neuron_spectra), (init_attention, attention, head_spectra),
              (init_transformer, transformer, embedding_spectra))
    return models[min(config.get("layers", 0), 2)]  # an MLP has no layers


def network_pieces(config, params, a=None):
    """mlp_pieces for every model: the network on inputs a, or (None) on all of D_p in order."""
    if config["model"] == "mlp":
        return mlp_pieces(params, a, config["activation"])
    a = all_inputs(config["k"], config["p"]) if a is None else a
    _, network, _ = model_of(config)
    return ((a[rows], *network(params, a[rows])) for rows in slices(len(a), 1, most=1024))


@dataclass
class Run:
    """A training run: all that its file holds, and so all that its next step depends on."""
    config: dict
    params: dict
    first: dict  # AdamW's moments
    second: dict
    train: np.ndarray  # bool [p^k], see split
    c: float = 1.0  # of the control variate, for the next batch; see loss_and_gradients
    step: int = 0
    seconds: float = 0.0
    history: list = field(default_factory=list)  # one dict per line of progress

    def __post_init__(self):
        train, k, p = self.train, self.config["k"], self.config["p"]
        if self.config.get("layers") == 1:  # one input per orbit
            train = train & (orbits(k, p) == np.arange(p**k))
        self.index = np.flatnonzero(train)  # numbers of the inputs to train on, see digits


def sample_inputs(index, k, p, rng, most=2**17):
    """The inputs [n, k] of these numbers (see digits); of more than `most`, `most` random draws."""
    if len(index) > most:
        index = index[rng.integers(0, len(index), most)]
    return digits(xp.asarray(index), k, p)


def stream(config, *use):
    """Random numbers apart for each use: 0 split, 1 weights, (2, step) a batch, 3 progress."""
    return np.random.default_rng([config["seed"], *use])


def new_run(config):
    """A run at step 0."""
    orbit = orbits(config["k"], config["p"]) if config.get("layers") == 1 else None
    train = split(config["k"], config["p"], config["train_fraction"], stream(config, 0), orbit)
    params = model_of(config)[0](stream(config, 1), **config)
    moments = [{name: xp.zeros_like(x) for name, x in params.items()} for _ in range(2)]
    return Run(config, params, *moments, train)


def train_step(run):
    """One step on a random batch: its gradient, penalty and decay where sizes are free, AdamW."""
    config, params = run.config, run.params
    k, p, n = config["k"], config["p"], min(config["batch"], len(run.index))
    lr, rms = timetable(config, run.step)
    a = sample_inputs(run.index, k, p, stream(config, 2, run.step), n) if n < p**k else None
    quiet = params if config.get("control_variate") == "on" else None
    loss, grads, c = loss_and_gradients(network_pieces(config, params, a), n, quiet, run.c)
    if quiet is not None:
        run.c = c.clip(0, 1)
    decay = 0
    if rms is None:
        if config.get("penalty"):
            nu = degree(k, config["activation"])
            pull = penalty(params, config["penalty"], nu, config["penalty_power"])[1]
            grads = {name: d + pull[name] for name, d in grads.items()}
        decay = config["weight_decay"] * (1 - loss / math.log(p)).clip(0)  # none before learning
        if "late_decay" in config and run.step >= config["hold"] * config["steps"]:
            decay *= config["late_decay"]
    if "clip" in config:
        size = xp.sqrt(sum((d * d).sum() for d in grads.values())) + TINY
        grads = {name: d * (config["clip"] / size).clip(None, 1) for name, d in grads.items()}
    run.step += 1
    adamw(params, grads, run.first, run.second, run.step, lr, decay, config["betas"])
    if rms is not None:
        standardize(params, rms)


def progress(run):
    """A line of history: cross-entropies and accuracies on up to 4096 fixed inputs of each part;
    in a max-margin run also the normalized margin over gamma*, on all of D_p."""
    config, params = run.config, run.params
    k, p = config["k"], config["p"]
    line, rng = {"step": run.step}, stream(config, 3)
    for name, part in (("train", run.train), ("test", ~run.train)):
        a = sample_inputs(np.flatnonzero(part), k, p, rng, 4096)
        seen = evaluate(network_pieces(config, params, a)) if len(a) else {}
        line[f"{name}_loss"], line[f"{name}_accuracy"] = seen.get("loss"), seen.get("accuracy")
    line |= model_of(config)[2](params)["summary"]
    if config.get("max_margin"):
        line["margin_ratio"] = normalized_margin(params) / max_margin(k, p)
    return line


def fingerprint(arrays):
    """A hash of arrays by name. A run file holds its own, so that damage shows."""
    parts = [(name, str(x.dtype), x.shape, hashlib.sha256(x.tobytes()).hexdigest())
             for name, x in sorted(arrays.items())]
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def save_run(path, run):
    """Write a run to an .npz file, whole or not at all, by path.part. Raises BadInput if not."""
    meta = {"format": FORMAT, "config": run.config, "step": run.step, "c": float(run.c),
            "seconds": run.seconds, "history": run.history}
    arrays = {f"{group} {name}": to_host(x) for group in GROUPS
              for name, x in getattr(run, group).items()}
    arrays |= {"train": run.train, "meta": np.array(json.dumps(meta))}
    part = f"{path}.part"
    try:
        with open(part, "wb") as file:
            np.savez(file, **arrays, fingerprint=fingerprint(arrays))
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except OSError as error:
        if os.path.exists(part):
            os.unlink(part)
        raise BadInput(f"cannot write {path}: {error.strerror}; choose another --out") from None


def load_run(path):
    """The run in a file. Raises BadInput for a file that is not a whole run of this version."""
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
        meta = json.loads(str(arrays["meta"]))
        if str(arrays.pop("fingerprint")) != fingerprint(arrays) or meta.pop("format") != FORMAT:
            raise ValueError
    except OSError as error:
        raise BadInput(f"cannot read {path}: {error.strerror or 'not a run file'}") from None
    except Exception:  # a damaged or foreign file fails in many ways
        raise BadInput(f"{path} is not a run file of this version, or it is damaged; "
                       "give another file") from None
    groups = {group: {name.removeprefix(f"{group} "): xp.asarray(x) for name, x in arrays.items()
                      if name.startswith(f"{group} ")} for group in GROUPS}
    return Run(**meta, **groups, train=arrays["train"])
