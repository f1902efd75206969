"""Fourier circuits in networks that add modulo p: one module, numpy on a CPU or cupy on a GPU.

After "Fourier Circuits in Neural Networks and Transformers: A Case Study of Modular Arithmetic with
Multiple Inputs" (Li, Liang, Shi, Song, Zhou; arXiv 2402.09469v4, "the paper" below).

A network sees k numbers a_1 .. a_k modulo p and must name their sum modulo p. The paper proves that
the best such network (largest normalized margin) consists of neurons that are cosines of a single
frequency each, and observes that training finds just these; and that the attention matrices of
transformers become 2-D cosines. In reading order:

    arrays      use_device, to_host, Buffers
    data        all_inputs, labels, split, orbits                                  Eq. 1
    layers      embed_sum, power, relu, linear, cross_entropy: y, backward = layer(..)
    network     init_mlp, mlp                                                      Eq. 2
    attention   circuits, attend, attention                            Figures 3, 9, 10
    several layers   prefixes, attend_rows, transformer                        Figure 4
    all alike   network, logit_blocks, loss_and_gradients
    norm        neuron_norms, norm, penalty, max_margin     Defs B.2, 3.1, Theorem 4.1.1
    AdamW       adamw
    margins     margins, evaluate, normalized_margin                               Def. 3.6
    Fourier     power_spectrum, neuron_spectra, ablate, network_dft    Section 4, Lemma F.2
                head_spectra, ablate_heads, embedding_spectrum
    weights     diagonal_dft, class_margin_from_weights, margin_bound, efficiency  Lemma 4.2
    theory      paper_network, rotated_network, theory_check        Theorem 4.1, Lemma 4.3
    training    interaction, complete, schedule, train_step                        Lemma 3.7
    runs        progress, report, grokking, save_run, load_run

Letters
    p        modulus, at least 2                  a, y     inputs [n, k], labels [n]
    k        numbers to add, at least 2           u, w     a neuron's u_1..u_k and w, each p numbers
    m        neurons                              z, h     before and after the activation [n, m]
    n        inputs in a batch                    zeta     a frequency, 1 .. p // 2
    D_p      all p^k inputs                       gamma*   the largest normalized margin
    H, e     heads and their width                d, f     width of a state, of a block's MLP
    S, OV    what heads attend to and write       A        attention, sum 1 over the keys
Gradients are d + the name: dz is the gradient of the loss with respect to z.
"""

import itertools
import json
import math
import os
import tempfile
from dataclasses import dataclass, field

import numpy as np

# ------------------------------------------------------------------------------------------------
# Arrays: every array of a network lives in xp, which is numpy or cupy.

xp = np
BLOCK_BYTES = 2**18  # work that can goes in blocks of this size: a CPU's cache; on a GPU larger
WHOLE_BYTES = 2**25  # a batch larger than this goes in several blocks


class BadInput(ValueError):
    """What the user asked for cannot be done; the message says why and what to do, in one line."""


def use_device(device):
    """Choose numpy ("cpu") or cupy ("gpu"); "auto" takes a GPU if there is one. -> "cpu" or "gpu".

    Raises BadInput if a GPU is asked for and cannot be used.
    """
    global xp, BLOCK_BYTES
    xp, BLOCK_BYTES = np, 2**18
    if device != "cpu":
        try:
            import cupy
            found = cupy.is_available()
        except ImportError:
            found = False
        if found:
            xp, BLOCK_BYTES = cupy, 2**28
        elif device == "gpu":
            raise BadInput("no GPU can be used: CuPy is not installed or sees no CUDA device; "
                           "use --device cpu")
    return "cpu" if xp is np else "gpu"


def to_host(x):
    """A numpy array with the same numbers."""
    return x if isinstance(x, np.ndarray) else xp.asnumpy(x)


def blocks(rows, row_bytes, limit=None):
    """Slices that cover range(rows), each of at most limit bytes (BLOCK_BYTES), or of one row."""
    step = max(1, int((limit or BLOCK_BYTES) // row_bytes))
    return [slice(start, min(start + step, rows)) for start in range(0, rows, step)]


class Buffers:
    """Named work arrays, made once: fresh batch-by-m arrays at each step cost more than the sums.

    What a layer returns in a buffer holds until the same layer runs again with the same Buffers.
    """

    def __init__(self):
        self.arrays = {}

    def __call__(self, name, shape, dtype):
        array, size = self.arrays.get(name), math.prod(shape)
        if array is None or array.size < size or array.dtype != dtype:
            array = self.arrays[name] = xp.empty(size, dtype)
        return array[:size].reshape(shape)


# ------------------------------------------------------------------------------------------------
# Data: D_p, all p^k inputs with their sums modulo p (Eq. 1)

MAX_BYTES = 2**31  # of the largest array


def check_size(k, p, m=1):
    """Raise BadInput unless k >= 2, p >= 2, m >= 1, and D_p and the weights fit in memory."""
    for name, value, least in (("k", k, 2), ("p", p, 2), ("m", m, 1)):
        if value < least:
            raise BadInput(f"{name} = {value} is too small: it must be at least {least}")
    if k * math.log2(p) > 200 or 8 * k * p**k > MAX_BYTES:
        raise BadInput(f"too large: the p^k = {p}^{k} inputs of {k} numbers need about "
                       f"{k * p**k * 8 / 2**30 if k * math.log2(p) < 200 else math.inf:.3g} GiB, "
                       f"the limit is {MAX_BYTES / 2**30:.0f} GiB; take a smaller k or p")
    if 16 * (k + 1) * p * m > MAX_BYTES:
        raise BadInput(f"too large: the (k+1) p m = {(k + 1) * p * m} weights of m = {m} neurons "
                       f"exceed the limit of {MAX_BYTES // 16}; take a smaller m, k or p")


def digits(index, k, p):  # [n] -> [n, k]
    """Inputs by their number in all_inputs: digits(0 .. p^k - 1) counts up, a_k fastest."""
    return index[:, None] // p ** xp.arange(k - 1, -1, -1) % p


def all_inputs(k, p):
    """All of D_p (Eq. 1), int [p^k, k], a_k running fastest. Raises BadInput if it is too large.

    all_inputs(2, 3) -> [[0, 0], [0, 1], [0, 2], [1, 0], .. [2, 2]]
    """
    check_size(k, p)
    return digits(xp.arange(p**k), k, p)


def labels(a, p):  # [n, k] -> [n]
    """a_1 + .. + a_k mod p."""
    return sum(a.T) % p


def split(k, p, fraction, rng, symmetric=False):
    """A random part of D_p to train on: bool [p^k] on the host, True on round(fraction p^k) inputs.

    symmetric: for a network that cannot tell a_1 .. a_{k-1} apart. This fraction of the orbits is
    drawn then, whole: to such a network an input whose permuted copy it knows is no test.
    rng: a numpy Generator. Raises BadInput if the fraction is outside (0, 1] or selects nothing.
    """
    check_size(k, p)
    total, orbit = p**k, slice(None)
    if symmetric:
        first, orbit = np.unique(orbits(k, p), return_inverse=True)
        total = len(first)
    count = round(fraction * total) if 0 < fraction <= 1 else 0
    if count == 0:
        raise BadInput(f"train fraction {fraction} must lie in (0, 1] and give at least one of the "
                       f"{total} {'orbits of ' if symmetric else ''}inputs")
    train = np.zeros(total, bool)
    train[rng.permutation(total)[:count]] = True
    return train[orbit]


def sorted_inputs(k, p):  # -> int [p^k, k], on the host
    """All inputs with a_1 .. a_{k-1} in order."""
    a = np.stack(np.unravel_index(np.arange(p**k), (p,) * k), axis=1)
    a[:, :-1].sort(axis=1)
    return a


def orbits(k, p):  # -> int [p^k], on the host
    """For each input the number of its orbit's first member, the one with a_1 <= .. <= a_{k-1}."""
    return sorted_inputs(k, p) @ p ** np.arange(k - 1, -1, -1)


def collisions(k, p):  # -> bool [p^k], on the host
    """Inputs with two equal numbers among a_1 .. a_{k-1} (see attention)."""
    return (np.diff(sorted_inputs(k, p)[:, :-1], axis=1) == 0).any(axis=1)


# ------------------------------------------------------------------------------------------------
# Layers and losses: y, backward = layer(x, ..); backward takes dy and returns the other gradients.


def embed_sum(u, a, buf):  # [k, p, m], [n, k] -> [n, m]
    """z = u_1[a_1] + .. + u_k[a_k], as one product of one-hot rows with a [k p, m] table.

    The product beats a gather forward and a scatter backward, and adds in a fixed order on a GPU.
    """
    k, p, m = u.shape
    x = xp.take(xp.eye(p, dtype=u.dtype), a, axis=0).reshape(len(a), k * p)
    z = xp.matmul(x, u.reshape(k * p, m), out=buf("z", (len(a), m), u.dtype))

    def backward(dz):
        return xp.matmul(x.T, dz, out=buf("du", (k * p, m), u.dtype)).reshape(k, p, m)

    return z, backward


def embed_grid(u, prefix, buf):  # [k, p, m], [n, k-1] -> [n p, m]
    """embed_sum for prefixes (a_1 .. a_{k-1}), each with all p values of a_k: a broadcast sum."""
    k, p, m = u.shape
    n = len(prefix)
    z = buf("z", (n, p, m), u.dtype)
    xp.add(sum(u[j][prefix[:, j]] for j in range(k - 1))[:, None], u[-1], out=z)

    def backward(dz):
        x = xp.take(xp.eye(p, dtype=u.dtype), prefix, axis=0).reshape(n, (k - 1) * p)
        dz = dz.reshape(n, p, m)
        du = buf("du", (k, p, m), u.dtype)
        du[:-1] = (x.T @ dz.sum(axis=1)).reshape(k - 1, p, m)
        du[-1] = dz.sum(axis=0)
        return du

    return z.reshape(n * p, m), backward


def power(z, k, buf):  # [n, m] -> [n, m]
    """h = z^k, in place of z."""
    slope = buf("slope", z.shape, z.dtype)  # z^(k-1)
    for rows in blocks(len(z), z[0].nbytes):
        x = s = z[rows]
        for bit in bin(k - 1)[3:]:  # powers by repeated squaring, highest bit first
            s = xp.multiply(s, s, out=slope[rows])
            if bit == "1":
                s *= x
        if s is x:
            slope[rows] = x
        x *= slope[rows]

    def backward(dh):  # dz = dh k z^(k-1), in place of dh
        for rows in blocks(len(dh), dh[0].nbytes):
            dh[rows] *= slope[rows]
            dh[rows] *= k
        return dh

    return z, backward


def relu(z, buf):  # [n, m] -> [n, m]
    """h = max(z, 0), in place of z: the other activation of Morwani et al. 2024."""
    h = xp.maximum(z, 0, out=z)

    def backward(dh):
        dh *= h > 0
        return dh

    return h, backward


def linear(x, w, buf):  # [n, m], [m, p] -> [n, p]
    """y = x w."""
    y = xp.matmul(x, w, out=buf("logits", (len(x), w.shape[1]), x.dtype))

    def backward(dy):
        dx = xp.matmul(dy, w.T, out=buf("dx", x.shape, x.dtype))
        dw = xp.matmul(x.T, dy, out=buf("dw", w.shape, x.dtype))
        return dx, dw

    return y, backward


def cross_entropy(logits, y):  # [n, p], [n] -> scalar
    """Mean of -log softmax(logits)[y]."""
    rows, n = xp.arange(len(y)), len(y)
    x = xp.ascontiguousarray(logits.T)  # [p, n]: numpy's sums are fast across the short axis
    top = x.max(axis=0)
    exp = xp.exp(x - top)
    total = exp.sum(axis=0)
    loss = (xp.log(total) + top - x[y, rows]).mean()

    def backward():  # (softmax - onehot) / n
        dx = exp / (n * total)
        dx[y, rows] -= 1 / n
        return dx.T

    return loss, backward


# ------------------------------------------------------------------------------------------------
# The network: f(theta, a)[c] = sum_i (u_{i,1}(a_1) + .. + u_{i,k}(a_k))^k w_i(c)  (Eq. 2)


def init_mlp(k, p, m, std, rng, dtype="float32"):
    """{"u": [k, p, m], "w": [m, p]}, entries N(0, std^2), drawn on the host so that CPU = GPU."""
    draw = lambda *shape: xp.asarray((std * rng.standard_normal(shape)).astype(dtype))
    return {"u": draw(k, p, m), "w": draw(m, p)}


def mlp(params, a, activation="power", buf=None):  # [n, k] -> [n, p], or [n, k-1] -> [n p, p]
    """The network of Eq. 2 on inputs a; activation "power" (z^k) or "relu".

    Rows of k-1 numbers are prefixes: each stands for its p inputs with a_k = 0 .. p-1.
    -> logits, backward(dlogits) -> {"u": du, "w": dw}, all in buf's arrays.
    """
    buf = buf or Buffers()
    k = len(params["u"])
    if len(a) == 0 or a.shape[1] not in (k, k - 1):
        raise BadInput(f"inputs of shape {a.shape}: rows of k = {k} or k-1 numbers are needed")
    embed = embed_sum if a.shape[1] == k else embed_grid
    z, embed_backward = embed(params["u"], a, buf)
    h, activation_backward = power(z, k, buf) if activation == "power" else relu(z, buf)
    logits, linear_backward = linear(h, params["w"], buf)

    def backward(dlogits):
        dh, dw = linear_backward(dlogits)
        du = embed_backward(activation_backward(dh))
        return {"u": du, "w": dw}

    return logits, backward


# ------------------------------------------------------------------------------------------------
# Attention: a transformer of one layer, without positions (Figures 3, 9, 10). The last number asks.
#
#     E [p, d]             token embedding          W_Q, W_K, W_V [d, H, e]   H heads of width e
#     b [H]                own score's bias         W_P [H, e, p]             projection to logits


HEADS = "W_Q", "W_K", "W_V", "W_P"


def init_attention(p, heads, d_head, d_model, std, rng, dtype="float32"):
    """Embedding entries N(0, std^2 / 4), weights N(0, std^2 / fan-in), b ~ N(0, 1)."""
    shapes = {"E": (p, d_model), **dict.fromkeys(HEADS[:3], (d_model, heads, d_head)),
              "W_P": (heads, d_head, p), "b": (heads,)}
    sizes = {"E": std / 2, "b": 1, "W_P": std / math.sqrt(heads * d_head)}
    return {name: xp.asarray((sizes.get(name, std / math.sqrt(d_model))
                              * rng.standard_normal(shape)).astype(dtype))
            for name, shape in shapes.items()}


def circuits(x, weights):  # [v, d], 3 [d, H, e] and [H, e, c] -> S [H, v, v], OV [H, v, c]
    """What heads attend to and what they then write, for the v vectors that a first layer can see.

    S_h[q, a] = (x W_Q^h)_q . (x W_K^h)_a / sqrt(e); for x = E, the tokens, it is the attention
    matrix W^{KQ} of the paper's figures. OV_h[a] = (x W_V^h W_P^h)_a. So Q, K and V are computed
    once a token, not once a number of the batch. weights: W_Q, W_K, W_V, W_P, in this order.
    """
    *read, write = weights
    v, d = x.shape
    heads, width, _ = write.shape
    flat = [w.reshape(d, -1) for w in read]
    query, key, value = [(x @ w).reshape(v, heads, width).transpose(1, 0, 2) for w in flat]
    scale = 1 / math.sqrt(width)
    s = scale * (query @ key.transpose(0, 2, 1))
    ov = value @ write

    def backward(ds, dov):  # -> dx, [dW_Q, dW_K, dW_V, dW_P]
        ds = scale * ds
        d3 = [ds @ key, ds.transpose(0, 2, 1) @ query, dov @ write.transpose(0, 2, 1)]
        d3 = [y.transpose(1, 0, 2).reshape(v, -1) for y in d3]
        dweights = [(x.T @ y).reshape(d, heads, width) for y in d3]
        return (sum(y @ w.T for y, w in zip(d3, flat)),
                [*dweights, value.transpose(0, 2, 1) @ dov])

    return s, ov, backward


def attend(s, ov, b, key, query, buf):  # [H, q, v], [H, v, c], [H], [n, k], [n] -> [n, c]
    """y = sum_h sum_j A_hj OV_h[key_j], A_h = softmax over j of S_h[query, key_j] + b_h [j last].

    The n k (input, key) pairs are visited token by token: each token is one small product. query
    counts rows of S_h, key its columns and OV_h's rows. -> y, backward(dy) -> dS, dOV, db.
    """
    n, k = key.shape
    heads, v, c = ov.shape
    queries = s.shape[1]
    token, query = key.T.reshape(-1), xp.tile(query, k)  # [k n], position by position
    order = xp.argsort(token)
    back = xp.argsort(order)
    ends = np.cumsum(to_host(xp.bincount(token, minlength=v))).tolist()
    parts = [slice(i, j) for i, j in zip([0, *ends], ends)]  # of each token, in that order
    write = xp.ascontiguousarray(ov.transpose(1, 0, 2))  # [v, H, c], by token
    table = s.transpose(2, 1, 0).reshape(v * queries, heads)
    A = table[token * queries + query].reshape(k, n, heads)
    A[-1] += b
    A -= A.max(axis=0)
    xp.exp(A, out=A)
    A /= A.sum(axis=0)
    weight = A.reshape(k * n, heads)[order]
    y = buf("y", (k * n, c), s.dtype)
    for t, i in enumerate(parts):
        xp.matmul(weight[i], write[t], out=y[i])

    def backward(dy):
        dy = dy[order % n]
        read = xp.ascontiguousarray(write.transpose(0, 2, 1))
        dwrite, ds = xp.empty_like(write), xp.empty((v, queries, heads), s.dtype)
        dA = buf("dA", weight.shape, s.dtype)
        for t, i in enumerate(parts):
            xp.matmul(weight[i].T, dy[i], out=dwrite[t])
            xp.matmul(dy[i], read[t], out=dA[i])
        dA = dA[back].reshape(k, n, heads)
        dA -= (A * dA).sum(axis=0)
        dA *= A  # softmax: dscore = A (dA - sum_j A dA)
        dscore = dA.reshape(k * n, heads)[order]
        onehot = xp.eye(queries, dtype=s.dtype)[query[order]]
        for t, i in enumerate(parts):
            xp.matmul(onehot[i].T, dscore[i], out=ds[t])
        return (xp.ascontiguousarray(ds.transpose(2, 1, 0)), dwrite.transpose(1, 0, 2),
                dA[-1].sum(axis=0))

    return y[back].reshape(k, n, c).sum(axis=0), backward


def attention(params, a, buf=None):  # [n, k] -> [n, p]
    """logits[c] = sum_h sum_j A_hj OV_h[a_j, c], softmax over the k numbers, queried by the last.

    b_h, the bias of the query's own score, is ours. -> logits, backward(dlogits) -> a dict like
    params. Why it can add, and where that is hard:
    - Without the softmax's denominator it could not for k >= 3: for a fixed query the logits are
      sums of one term a number. The denominator multiplies the numbers.
    - For scores s_j small beside 1 and b = 0, A_j = 1/k (1 + s_j - 1/k (s_1 + .. + s_k) + ..): what
      makes the sum are the products of one number's score and another's OV, of sign -. At a
      collision, a_i = a_j among a_1 .. a_{k-1}, the products s_j OV[a_j] hold the same with the
      sign +, so it needs other heads; the report counts collisions apart.
    """
    s, ov, circuits_backward = circuits(params["E"], [params[name] for name in HEADS])
    logits, attend_backward = attend(s, ov, params["b"], a, a[:, -1], buf or Buffers())

    def backward(dlogits):
        ds, dov, db = attend_backward(dlogits)
        de, dweights = circuits_backward(ds, dov)
        return {"E": de, **dict(zip(HEADS, dweights)), "b": db}

    return logits, backward


# ------------------------------------------------------------------------------------------------
# Transformers of several layers (Figure 4), after Power et al. 2022. Blocks, with a causal mask:
# x += attention(layernorm(x)), x += relu(layernorm(x) W_1) W_2. Logits at the last position.
#
#     E [p, d]   token embedding                     W_Q, W_K, W_V [d, H, e]   of layer 1: "W_Q 1"
#     P [k, d]   position embedding                  W_O [H, e, d]
#     W_U [d, p] logits                              W_1 [d, f], W_2 [f, d]
#
# State j of an input depends on a_1 .. a_j alone, so that a batch has one row of work for each
# different beginning: 23 + 330 + 512 rows for 512 inputs at k = 3, p = 23; R rows in all.

ATTENTION, FORWARD = ("W_Q", "W_K", "W_V", "W_O"), ("W_1", "W_2")


def init_transformer(k, p, layers, heads, d_head, d_model, d_ff, std, rng, dtype="float32"):
    """Entries N(0, std^2 / fan-in); of the embeddings N(0, std^2 / d_model)."""
    d, read = d_model, (d_model, heads, d_head)
    shapes = {"E": (p, d), "P": (k, d)}
    for l in range(1, layers + 1):
        sizes = (read, read, read, (heads, d_head, d), (d, d_ff), (d_ff, d))
        shapes |= {f"{name} {l}": size for name, size in zip(ATTENTION + FORWARD, sizes)}
    shapes["W_U"] = d, p
    fan_in = {"W_O": heads * d_head, "W_2": d_ff}
    return {name: xp.asarray((std / math.sqrt(fan_in.get(name[:3], d))
                              * rng.standard_normal(shape)).astype(dtype))
            for name, shape in shapes.items()}


def prefixes(a, p):  # [n, k] -> paths, keys: a list of k arrays [n_j, j] each, j = 1 .. k
    """The different beginnings of each length j: their paths and their keys.

    States are stacked in rows, all beginnings of length 1, then of length 2, ..: a path holds the
    rows of a_1, a_1 a_2, .. a_1 .. a_j. keys are (i-1) p + a_i, the rows of layer 1's table. The
    inputs themselves, the last n rows, are kept as they come, repeats and all.
    """
    x, numbers, paths, keys = 0, [], [], []
    for token in a.T:
        x = p * x + token
        numbers.append(xp.unique(x))
    numbers[-1] = x
    start = [0, *itertools.accumulate(len(x) for x in numbers)]
    for j, x in enumerate(numbers):
        before = [start[i] + xp.searchsorted(numbers[i], x // p ** (j - i)) for i in range(j)]
        paths.append(xp.stack([*before, start[j] + xp.arange(len(x))], axis=1))
        keys.append(digits(x, j + 1, p) + p * xp.arange(j + 1))
    return paths, keys


def gather(x, path):  # [R, d], [n, j] -> [n, j, d]
    """x[path]; backward adds by one-hot products, in a fixed order.

    Column i of path lies in one range of x's rows, the beginnings of length i + 1, each column in
    its own, so each range is set once; the last column counts up.
    """
    def backward(dy):
        dx = xp.zeros_like(x)
        for i, rows in enumerate(path.T[:-1]):
            start, stop = int(rows.min()), int(rows.max()) + 1
            dx[start:stop] = (rows == xp.arange(start, stop)[:, None]).astype(x.dtype) @ dy[:, i]
        dx[int(path[0, -1]):][:len(path)] = dy[:, -1]
        return dx

    return x[path], backward


def layernorm(x, eps=1e-5):  # [n, d] -> [n, d]
    """Mean 0 and variance 1, without gain or bias: the weights that read it can hold a gain."""
    z = x - x.mean(axis=1, keepdims=True)
    r = 1 / xp.sqrt((z * z).mean(axis=1, keepdims=True) + eps)
    z *= r

    def backward(dz):
        return r * (dz - dz.mean(axis=1, keepdims=True) - z * (z * dz).mean(axis=1, keepdims=True))

    return z, backward


def residual(x, layer):  # [R, d] -> [n, d]
    """x + layer(layernorm(x)), for the last n rows if the layer answers for these only."""
    z, norm_backward = layernorm(x)
    y, layer_backward = layer(z)
    last = slice(len(x) - len(y), None)

    def backward(dy):
        dz, dweights = layer_backward(dy)
        dx = norm_backward(dz)
        dx[last] += dy
        return dx, dweights

    return x[last] + y, backward


def feed_forward(x, w1, w2):  # [n, d], [d, f], [f, d] -> [n, d]
    """relu(x W_1) W_2."""
    h, relu_backward = relu(x @ w1, None)

    def backward(dy):
        dz = relu_backward(dy @ w2.T)
        return dz @ w1.T, [x.T @ dz, h.T @ dy]

    return h @ w2, backward


def first_attention(table, weights, keys, p, buf):  # [k p, d], .., [n_j, j] each -> [sum n_j, d]
    """residual of layer 1's attention, where all there is to see is k p vectors: a table lookup."""
    z, norm_backward = layernorm(table)
    s, ov, circuits_backward = circuits(z, weights)
    own = xp.concatenate([key[:, -1] for key in keys])
    ends = [p * key.shape[1] for key in keys]  # position j: queries (j-1)p .. jp see 0 .. jp
    parts = [attend(s[:, end - p:end, :end], ov[:, :end], 0, key, key[:, -1] - (end - p), buf)
             for end, key in zip(ends, keys)]

    def backward(dy):
        ds, dov, i = xp.zeros_like(s), xp.zeros_like(ov), 0
        for end, (y, attend_backward) in zip(ends, parts):
            ds[:, end - p:end, :end], d, _ = attend_backward(dy[i:i + len(y)])
            dov[:, :end] += d
            i += len(y)
        dz, dweights = circuits_backward(ds, dov)
        onehot = (own == xp.arange(len(table))[:, None]).astype(dy.dtype)
        return norm_backward(dz) + onehot @ dy, dweights

    return table[own] + xp.concatenate([y for y, _ in parts]), backward


def attend_rows(seen, wq, wk, wv, wo):  # [n, j, d], thrice [H, d, e], [H, e, d] -> [n, d]
    """Attention of each row's last state to all j.

    No key or value is computed: q . (x W_K) = (q W_K^T) . x and sum_j A_j (x_j W_V) =
    (sum_j A_j x_j) W_V, so there are four products a query, however many states it sees.
    """
    t = lambda y: y.swapaxes(1, 2)
    by_row = lambda y: y.swapaxes(0, 1)
    turned = lambda w: xp.ascontiguousarray(t(w))
    scale, own = 1 / math.sqrt(wq.shape[2]), seen[:, -1]
    q = scale * (own @ wq)  # [H, n, e]
    g = by_row(q @ turned(wk))  # [n, H, d]
    A = seen @ t(g)  # [n, j, H]
    A -= A.max(axis=1, keepdims=True)
    xp.exp(A, out=A)
    A /= A.sum(axis=1, keepdims=True)

    def mixed(A):  # sum_j A_hj seen_j: [n, j, H] -> [H, n, d], laid out for products by head
        y = xp.empty((len(wq), *own.shape), A.dtype)
        xp.matmul(t(A), seen, out=by_row(y))
        return y

    mix = mixed(A)
    v = mix @ wv  # [H, n, e]

    def backward(dy):  # -> dseen, the weights' gradients
        dv = dy @ t(wo)
        dmix = by_row(dv @ turned(wv))  # [n, H, d]
        dA = seen @ t(dmix)
        dA -= (A * dA).sum(axis=1, keepdims=True)
        dA *= A  # the score's gradient
        dg = mixed(dA)
        dq = scale * (dg @ wk)
        dseen = A @ dmix + dA @ g
        dseen[:, -1] += xp.tensordot(dq, wq, axes=((0, 2), (0, 2)))
        return dseen, [own.T @ dq, t(dg) @ q, t(mix) @ dv, t(v) @ dy]

    return xp.tensordot(v, wo, axes=((0, 2), (0, 1))), backward


def attend_paths(x, weights, paths):  # [R, d], .., [n_j, j] each -> [sum n_j, d]
    """attend_rows for the last row of each path, a few heads at a time: in a CPU's cache."""
    by_head = lambda weights: [*(w.swapaxes(0, 1) for w in weights[:3]), weights[3]]
    heads, _, d = weights[3].shape
    groups = blocks(heads, len(paths[-1]) * d * x.itemsize, 32 * BLOCK_BYTES)
    seen = [gather(x, path) for path in paths]  # [n_j, j, d] each
    parts = [[attend_rows(z, *(w[h] for w in by_head(weights))) for h in groups] for z, _ in seen]

    def backward(dy):
        dx, dweights, i = 0, [xp.zeros_like(w) for w in weights], 0
        for (z, gather_backward), part in zip(seen, parts):
            dz = 0
            for h, (_, attend_backward) in zip(groups, part):
                d, dgroup = attend_backward(dy[i:i + len(z)])
                dz = dz + d
                for dw, new in zip(by_head(dweights), dgroup):
                    dw[h] += new
            dx, i = dx + gather_backward(dz), i + len(z)
        return dx, dweights

    return xp.concatenate([sum(y for y, _ in part) for part in parts]), backward


def transformer(params, a, buf=None):  # [n, k] -> [n, p]
    """The network on inputs a -> logits, backward(dlogits) -> gradients, a dict like params."""
    e, place, project = params["E"], params["P"], params["W_U"]
    (p, d), k, layers = e.shape, len(place), sum(name[:3] == "W_1" for name in params)
    paths, keys = prefixes(a, p)
    x, tape = (place[:, None] + e).reshape(k * p, d), []
    feed_layer = lambda x, w, l: residual(x, lambda z: feed_forward(z, *w))

    def attend_layer(x, w, l):
        last = slice(-1 if l == layers else None, None)  # the last layer asks only at the end
        if l == 1:
            return first_attention(x, w, keys[last], p, buf or Buffers())
        return residual(x, lambda z: attend_paths(z, w, paths[last]))

    for l in range(1, layers + 1):
        for layer, names in ((attend_layer, ATTENTION), (feed_layer, FORWARD)):
            names = [f"{name} {l}" for name in names]
            x, backward = layer(x, [params[name] for name in names], l)
            tape.append((names, backward))
    z, norm_backward = layernorm(x)

    def backward(dlogits):
        grads = {"W_U": z.T @ dlogits}
        dx = norm_backward(dlogits @ project.T)
        for names, layer_backward in tape[::-1]:
            dx, dweights = layer_backward(dx)
            grads |= zip(names, dweights)
        dx = dx.reshape(k, p, d)
        return grads | {"E": dx.sum(axis=0), "P": dx.sum(axis=1)}

    return z @ project, backward


# ------------------------------------------------------------------------------------------------
# All networks alike


def network(params, a, activation="power", buf=None):
    """The network that has these parameters, on inputs a. {"S", "OV", "b"}, attention's tables, are
    for the logits alone.
    """
    if "u" in params:
        return mlp(params, a, activation, buf)
    if "S" in params:
        return attend(params["S"], params["OV"], params["b"], a, a[:, -1], buf or Buffers())
    return (attention if "b" in params else transformer)(params, a, buf)


def pieces(params, rows, width=1):
    """Slices of rows of inputs, or (width = p) of prefixes, which stand for p inputs each.

    By what an input takes in the MLP's widest layer; a transformer is given 1024 inputs a slice.
    """
    size = params["w"][:, 0].nbytes if "w" in params else WHOLE_BYTES / 1024
    return blocks(rows, width * size, WHOLE_BYTES if width == 1 else 8 * BLOCK_BYTES)


def logit_blocks(params, k, p, activation="power"):
    """The network on all of D_p in the order of all_inputs: yields (slice of inputs, logits)."""
    buf, width = Buffers(), p if "u" in params else 1  # prefixes do for the MLP
    for rows in pieces(params, p**k // width, width):
        a = digits(xp.arange(rows.start, rows.stop), k - (width > 1), p)
        yield (slice(rows.start * width, rows.stop * width),
               network(params, a, activation, buf)[0])


def loss_and_gradients(params, a, activation="power", buf=None):
    """Mean cross-entropy over inputs or prefixes a (see mlp), its gradients; in blocks of rows."""
    buf, loss, grads = buf or Buffers(), 0, None
    prefix = "u" in params and a.shape[1] < len(params["u"])
    width = params["u"].shape[1] if prefix else 1
    for rows in pieces(params, len(a), width):
        logits, backward = network(params, a[rows], activation, buf)
        p = logits.shape[1]
        y = labels(a[rows], p)
        if width > 1:
            y = ((y[:, None] + xp.arange(p)) % p).reshape(-1)
        part, loss_backward = cross_entropy(logits, y)
        share = len(y) / (len(a) * width)
        dparams = backward(share * loss_backward())
        if share == 1:
            return part, dparams
        loss = loss + share * part
        if grads is None:
            grads = {name: buf("sum " + name, d.shape, d.dtype) for name, d in dparams.items()}
            for d in grads.values():
                d[...] = 0
        for name, d in dparams.items():
            grads[name] += d
    return loss, grads


# ------------------------------------------------------------------------------------------------
# The norm (Def. B.2), its penalty (Def. 3.1), the largest normalized margin (Theorem 4.1)


def neuron_norms(params):
    """||theta_i||_2 over the (k+1) p numbers of each neuron, [m]."""
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


def max_margin(k, p):
    """gamma*, the largest normalized margin of any network (Theorem 4.1.1; even p: see below).

    2 k! / ((2k+2)^((k+1)/2) (p-1) p^((k-1)/2)) for odd p; (p-1)/(p-2+r) times that for even p, with
    r = 2^(-(k-1)/2), thanks to the Nyquist frequency p/2 (beyond the paper).
    max_margin(3, 23) -> 0.00037055
    """
    gamma = 2 * math.factorial(k) / ((2*k + 2) ** ((k + 1) / 2) * (p - 1) * p ** ((k - 1) / 2))
    return gamma if p % 2 else gamma * (p - 1) / (p - 2 + 2 ** (-(k - 1) / 2))


def penalty(params, strength, nu, power):
    """strength ||theta||_{2,nu}^power (Def. 3.1).

    power = 1 is the paper's regularizer; power = nu makes it the sum of ||theta_i||^nu, smooth at 0
    and one term a neuron. -> value, backward(grads), which adds the gradient to grads in place.
    """
    norms = neuron_norms(params)
    total = float((norms**nu).sum()) ** (1 / nu)

    def backward(grads):  # power ||theta||^(power-nu) ||theta_i||^(nu-2) theta_i
        c = strength * power * (total or 1) ** (power - nu) * norms ** (nu - 2)
        grads["u"] += c * params["u"]
        grads["w"] += c[:, None] * params["w"]

    return strength * total**power, backward


# ------------------------------------------------------------------------------------------------
# AdamW


def adamw(params, grads, first, second, step, lr, weight_decay, betas=(0.9, 0.98), eps=1e-30):
    """One step of AdamW, in place (Loshchilov and Hutter 2019, Algorithm 2 with decay lr * wd).

    first, second: running means of the gradient and of its square, dicts like params; step counts
    from 1. eps is tiny by default: the gradients of a small network are themselves below 1e-8.
    Biases, the arrays of one axis, do not decay.
    """
    beta1, beta2 = betas
    root = math.sqrt(1 - beta2**step)  # the bias corrections, taken out of the arrays
    size = lr * root / (1 - beta1**step)
    for name in params:
        x, g, m, v = (d[name].reshape(-1) for d in (params, grads, first, second))
        parts = blocks(len(x), 2 * x.itemsize)
        work = xp.empty(parts[0].stop, x.dtype)
        for part in parts:
            xi, gi, mi, vi = x[part], g[part], m[part], v[part]
            t = xp.subtract(gi, mi, out=work[:len(xi)])
            t *= 1 - beta1
            mi += t
            xp.multiply(gi, gi, out=t)
            t -= vi
            t *= 1 - beta2
            vi += t
            if params[name].ndim > 1:
                xi *= 1 - lr * weight_decay
            xp.sqrt(vi, out=t)
            t += eps * root
            xp.divide(mi, t, out=t)
            t *= size
            xi -= t


# ------------------------------------------------------------------------------------------------
# Margins on all of D_p


def margins(logits, y):  # [n, p], [n] -> [n], [n]
    """Margin f[y] - max_{y' != y} f[y'] and class-weighted margin f[y] - mean_{y' != y} f[y'].

    The weights of the second are uniform (Def. 3.6). A point is classified rightly if its margin is
    positive: a tie is an error.
    """
    rows, p = xp.arange(len(y)), logits.shape[1]
    right = logits[rows, y]
    weighted = (p * right - logits.sum(axis=1)) / (p - 1)
    wrong = logits.copy()
    wrong[rows, y] = -xp.inf
    return right - wrong.max(axis=1), weighted


def evaluate(logit_blocks, train, k, p):
    """One pass over D_p. logit_blocks yields (slice, logits); train: bool [p^k] on the host.

    -> dict: train_accuracy, test_accuracy (None without test inputs), margin (the smallest,
    h(theta)), largest_margin, class_margin (mean class-weighted margin), right: bool [p^k].
    """
    right, smallest, largest, total = np.zeros(p**k, bool), math.inf, -math.inf, 0.0
    for inputs, logits in logit_blocks:
        y = labels(digits(xp.arange(inputs.start, inputs.stop), k, p), p)
        margin, weighted = margins(logits, y)
        right[inputs] = to_host(margin > 0)
        smallest, largest = min(smallest, float(margin.min())), max(largest, float(margin.max()))
        total += float(weighted.sum(dtype="float64"))
    return {"train_accuracy": float(right[train].mean()),
            "test_accuracy": None if train.all() else float(right[~train].mean()),
            "margin": smallest, "largest_margin": largest, "class_margin": total / p**k,
            "right": right}


def sample_inputs(index, k, p, rng, most=2**17):
    """The inputs of these numbers (see digits), or `most` random ones if there are more; [n, k]."""
    return digits(xp.asarray(index if len(index) <= most
                             else index[rng.integers(0, len(index), most)]), k, p)


def accuracy(params, a, activation="power"):
    """Mean cross-entropy and accuracy on inputs a [n, k]."""
    loss, right, buf = 0.0, 0, Buffers()
    for rows in pieces(params, len(a)):
        logits, _ = network(params, a[rows], activation, buf)
        y = labels(a[rows], logits.shape[1])
        loss += float(cross_entropy(logits, y)[0]) * len(y)
        right += int((margins(logits, y)[0] > 0).sum())
    return loss / len(a), right / len(a)


def normalized_margin(params, activation="power"):
    """h(theta) / ||theta||^nu, the margin of theta / ||theta||, over all of D_p; at most gamma*."""
    k, p, _ = params["u"].shape
    nu = degree(k, activation)
    whole = evaluate(logit_blocks(params, k, p, activation), np.ones(p**k, bool), k, p)
    return whole["margin"] / (norm(params, nu) ** nu or 1)


# ------------------------------------------------------------------------------------------------
# Fourier analysis of the weights (Section 4). numpy's sign: x^(j) = sum_a x(a) e^(-2 pi i j a/p),
# so that the phase of A cos(theta + 2 pi zeta a/p) is theta = arg x^(zeta).


def power_spectrum(x, axis=-1):  # [.., p, ..] -> [.., p // 2 + 1, ..]
    """|x^(j)|^2 for j = 0 .. p // 2, conjugate pairs folded, so that the sum is that of all p."""
    p = x.shape[axis]
    power = xp.abs(xp.fft.rfft(x, axis=axis)) ** 2
    weight = xp.full(p // 2 + 1, 2, power.dtype)
    weight[0] = 1  # the mean has no partner, nor has the Nyquist frequency of an even p
    if p % 2 == 0:
        weight[-1] = 1
    shape = [1] * x.ndim
    shape[axis] = -1
    return power * weight.reshape(shape)


def max_normalized_power(x, axis=-1):
    """The largest share of power at a zeta >= 1, the mean included in the whole; 1 = a cosine."""
    power = power_spectrum(x, axis)
    return power.take(xp.arange(1, power.shape[axis]), axis).max(axis) / power.sum(axis)


def expected_max_power(p):
    """Mean of max_normalized_power over Gaussian vectors of p numbers; 2 H_n/p, n = (p-1)/2, odd p.

    H_n is the harmonic number. For even p, where the Nyquist power is half a squared normal, the
    maximum's mean is integrated from its distribution. expected_max_power(23) -> 0.263
    """
    pairs = (p - 1) // 2
    if p % 2:
        return sum(2 / i for i in range(1, pairs + 1)) / p
    x = np.linspace(0, 50 + math.log(p), 200_001)  # in units of a pair's mean power
    nyquist = np.array([math.erf(math.sqrt(t)) for t in x])
    return float(np.trapezoid(1 - (1 - np.exp(-x)) ** pairs * nyquist, x)) * 2 / p


def neurons(params):
    """All vectors of all neurons: [k+1, p, m], u_1 .. u_k and then w."""
    return xp.concatenate([params["u"], params["w"].T[None]])


def neuron_spectra(params):
    """Each neuron's Fourier measures (Section 4), as a dict of arrays on the host.

    frequency [m]       zeta with most power in u_1..u_k and w together
    concentration [m]   share of the neuron's power at zeta, the means included in the whole
    max_power [k+1, m]  maximum normalized power of each vector by itself
    phases [k+1, m]     theta_1 .. theta_k, theta_w at zeta
    phase_error [m]     |theta_1 + .. + theta_k - theta_w|, modulo 2 pi in [0, pi] (Theorem 4.1.2)
    live [m]            norm above a tenth of the largest
    """
    vectors, norms = neurons(params), neuron_norms(params)
    total = power_spectrum(vectors, axis=1).sum(axis=0)  # [p // 2 + 1, m]
    zeta = 1 + total[1:].argmax(axis=0)
    each = xp.arange(len(norms))
    phases = xp.angle(xp.fft.rfft(vectors, axis=1)[:, zeta, each])
    error = phases[:-1].sum(axis=0) - phases[-1]
    floor = xp.finfo(total.dtype).tiny  # an all-zero neuron has concentration 0, not 0/0
    return {name: to_host(value) for name, value in {
        "frequency": zeta,
        "concentration": total[zeta, each] / xp.maximum(total.sum(axis=0), floor),
        "max_power": max_normalized_power(vectors, axis=1),
        "phases": phases,
        "phase_error": xp.abs((error + math.pi) % (2 * math.pi) - math.pi),
        "live": norms > 0.1 * norms.max()}.items()}


def ablate(params):
    """The causal check: the network restricted to each neuron's own frequency, and the rest.

    -> restricted, excluded, which add up to params. After the restricted and the excluded loss of
    Nanda et al. 2023, for any k.
    """
    vectors = neurons(params)
    k, p, m = params["u"].shape
    zeta = xp.asarray(neuron_spectra(params)["frequency"])
    spectrum = xp.fft.rfft(vectors, axis=1)
    spectrum *= xp.arange(p // 2 + 1)[:, None] == zeta
    kept = xp.fft.irfft(spectrum, n=p, axis=1).astype(vectors.dtype)
    return [{"u": v[:k].copy(), "w": v[k].T.copy()} for v in (kept, vectors - kept)]


def network_dft(params):
    """f^(j_1, .., j_k, j_c), the (k+1)-dimensional DFT of f (Lemma F.2), complex [p, .., p].

    Raises BadInput if its p^(k+1) numbers are too many.
    """
    k, p, _ = params["u"].shape
    if 16 * p ** (k + 1) > MAX_BYTES // 4:
        raise BadInput(f"too large: the DFT of f has {p}^{k + 1} numbers; take a smaller p")
    f = xp.concatenate([logits.copy() for _, logits in logit_blocks(params, k, p)])
    return xp.fft.fftn(f.reshape((p,) * (k + 1)))


def head_tables(params):  # -> S [H, p, p], OV [H, p, p]
    """The QK and OV circuits of attention's heads, see circuits."""
    return circuits(params["E"], [params[name] for name in HEADS])[:2]


def head_spectrum(s):  # [H, p, p] -> s [H, p, p], power [H, p p], partner [p p]
    """2-D DFT power of S_h without the mean of each query's row, which no softmax can see.

    Entry u p + v: query frequency u, key frequency v. A real matrix has equal power at (u, v) and
    at (-u, -v), its partner; the first of the two holds both.
    """
    p = s.shape[1]
    s = s - s.mean(axis=2, keepdims=True)
    r = xp.arange(p * p)
    partner = -(r // p) % p * p + -r % p
    fold = (r <= partner).astype(s.dtype) + (r < partner)
    return s, xp.abs(xp.fft.fft2(s).reshape(len(s), -1)) ** 2 * fold, partner


def head_spectra(params):
    """Each head's Fourier measures (Figures 3, 9, 10), as a dict of arrays on the host.

    All are of S_h without the means of its rows, and of OV_h without those of its rows and columns,
    which change no answer.
    shares [H, 3]    of the power of S_h in its top one, two and three frequency pairs +-(u, v);
                     cos(2 pi u q/p) cos(2 pi v a/p) is two pairs, (u, v) and (-u, v), of half the
                     power each (one if u = 0)
    top [H, 3, 2]    those pairs, -p/2 <= u <= p/2 (query) and 0 <= v <= p/2 (key)
    rank [H]         singular values above a hundredth of the largest; at most d_head
    size [H]         rms(S_h) rms(OV_h) over the largest
    live [H]         size at least a twentieth
    """
    s, ov = (x.astype("float64") for x in head_tables(params))  # whose squares overflow float32
    p = s.shape[1]
    s, power, _ = head_spectrum(s)
    order = xp.argsort(-power, axis=1)[:, :3]
    shares = xp.cumsum(xp.take_along_axis(power, order, axis=1), axis=1)
    shares /= xp.maximum(power.sum(axis=1, keepdims=True), xp.finfo(power.dtype).tiny)
    u, v = order // p, order % p
    sign = xp.where(2 * v > p, -1, 1)
    u = (sign * u + (p - 1) // 2) % p - (p - 1) // 2
    ov = ov - ov.mean(axis=2, keepdims=True)
    ov = ov - ov.mean(axis=1, keepdims=True)
    size = xp.sqrt((s**2).mean(axis=(1, 2))) * xp.sqrt((ov**2).mean(axis=(1, 2)))
    size /= xp.maximum(size.max(), xp.finfo(size.dtype).tiny)
    values = xp.linalg.svd(s, compute_uv=False)
    return {name: to_host(x) for name, x in {
        "shares": shares, "top": xp.stack([u, sign * v % p], axis=2),
        "rank": (values > 0.01 * values[:, :1]).sum(axis=1),
        "size": size, "live": size >= 0.05 * size.max()}.items()}


def embedding_spectrum(params):  # -> [p // 2], on the host
    """Share of the token embedding's power in each frequency 1 .. p // 2, over all its columns."""
    power = power_spectrum(params["E"], axis=0).sum(axis=1)[1:]
    return to_host(power / power.sum())


def top_share(spectrum):
    """The power in the strongest tenth of the frequencies, their number rounded up."""
    return float(np.sort(spectrum)[-math.ceil(len(spectrum) / 10):].sum())


def ablate_heads(params, keep=2):
    """The causal check: each S_h with its top frequency pairs only, and with all the others only.

    -> restricted, excluded, each {"S", "OV", "b"} for network; the two S add up to all but the
    means of rows.
    """
    s, ov = head_tables(params)
    s, power, partner = head_spectrum(s)
    order = xp.argsort(-power, axis=1)[:, :keep]
    mask = (xp.arange(power.shape[1]) == order[:, :, None]).any(axis=1)
    mask |= mask[:, partner]
    kept = xp.fft.ifft2(xp.fft.fft2(s) * mask.reshape(s.shape)).real.astype(s.dtype)
    return [{"S": x, "OV": ov, "b": params["b"]} for x in (kept, s - kept)]


# ------------------------------------------------------------------------------------------------
# From the weights alone, for sizes at which nobody enumerates p^k inputs; power activation only


def neuron_dft(params):  # -> complex [p, m]
    """Each neuron's f^(j,..,j,-j): k! w^(-j) u^_1(j) .. u^_k(j) (Lemma D.8), 0 at j = 0."""
    u, w = params["u"], params["w"]
    s = xp.conj(xp.fft.fft(w, axis=1).T) * xp.fft.fft(u, axis=1).prod(axis=0)
    s[0] = 0
    return math.factorial(len(u)) * s


def diagonal_dft(params):  # -> [p]
    """S_j = f^(j, .., j, -j) for j = 1 .. p-1, real if all phase errors are 0; S_0 = 0.

    A max-margin network has S_j > 0 (Lemma F.2), on the unit ball S_j = gamma* p^k for all j != 0.
    """
    return neuron_dft(params).sum(axis=1)


def class_margin_from_weights(params):
    """Mean class-weighted margin of f over D_p: sum_{j != 0} S_j / ((p-1) p^k) (Lemma 4.2).

    For one neuron and odd p, folding j and p-j, this is the lemma's (D.8's)
    2 k!/((p-1) p^k) sum_{j=1}^{(p-1)/2} |u^_1(j)| .. |u^_k(j)| |w^(j)| cos(arg u^_1 + .. - arg w^).
    """
    k, p, _ = params["u"].shape
    return float(diagonal_dft(params).real.sum()) / ((p - 1) * p**k)


def margin_bound(params):
    """An upper bound on the margin h: the least mean over D_p of f[y] - f[y + Delta], Delta != 0.

    That mean is p^-(k+1) sum_j S_j (1 - e^(-2 pi i j Delta/p)).
    """
    k, p, _ = params["u"].shape
    s = diagonal_dft(params)
    means = (s.sum() - xp.fft.fft(s)).real[1:] / float(p) ** (k + 1)
    return float(means.min())


def efficiency(params):  # -> [m]
    """Each neuron's class-weighted margin at unit norm over gamma*, in [-1, 1] (Lemma 4.2).

    1: the neuron is as good as any can be, a cosine with its phases in order. That is for odd p;
    for even p a cosine reaches (p-2+r)/(p-1), r = 2^(-(k-1)/2), a Nyquist neuron 1/r times that.
    """
    k, p, _ = params["u"].shape
    mean = neuron_dft(params).real.sum(axis=0) / ((p - 1) * float(p) ** k)
    return mean / (neuron_norms(params) ** (k + 1) * max_margin(k, p))


# ------------------------------------------------------------------------------------------------
# Theory: networks of norm 1 whose margin is gamma* on every input (Theorem 4.1)


def paper_network(k, p):
    """The paper's max-margin network (Lemmas 4.3, E.3): 2^(2k-2) (p-1) neurons, float64, norm 1.

    For each zeta, cos(x_1 + .. + x_k - y) is a sum of 2^k products of cosines and sines, where
    x_j = 2 pi zeta a_j/p and y = 2 pi zeta c/p; each product is a sum of 2^(k-1) k-th powers:
        2^k k! d_1 .. d_k = sum over signs s of s_1 .. s_k (s_1 d_1 + .. + s_k d_k)^k    (Lemma E.1)
    where s and -s give the same. Raises BadInput for even p, which the paper leaves out.
    """
    check_size(k, p, 2 ** (2*k - 2) * (p - 1))
    if p % 2 == 0:
        raise BadInput(f"the paper's network is for odd p, not {p}; rotated_network takes any p")
    # A sine is a cosine a quarter turn late: q_j = 1 makes d_j = cos(x_j - pi/2) = sin x_j. Where
    # the number |q| of sines is odd, y takes a sine too; i^|q| (-i)^(|q| mod 2) is the term's sign.
    q = np.array(list(itertools.product((0, 1), repeat=k)))  # [2^k, k]
    late = np.column_stack([q, q.sum(axis=1) % 2])[:, None]  # [2^k, 1, k+1]
    s = signs(k)[None]  # [1, 2^(k-1), k]
    sign = s.prod(axis=2) * (-1) ** (q.sum(axis=1) // 2)[:, None]  # [2^k, 2^(k-1)]
    amplitudes = np.concatenate([s.repeat(len(q), axis=0), sign[:, :, None]], axis=2)
    phases = np.broadcast_to(-np.pi / 2 * late, amplitudes.shape)
    return cosine_network(k, p, amplitudes.reshape(-1, k + 1), phases.reshape(-1, k + 1))


def rotated_network(k, p):
    """A smaller max-margin network, beyond the paper: (k+1) 2^(k-2) (p-1) neurons for odd p.

    The signs of Lemma E.1 leave 2^(k-1) k! prod_j cos(x_j + psi_s); turning all phases together by
    psi_s = pi s/(k+1), s = 0 .. k, and w by k psi_s cancels every term but cos(x_1 + .. + x_k - y):
    flipping r of the k signs gives the phase e^(-2 i r psi_s), which sums to 0 over s unless r = 0.
    Even p (parity, p = 2, included) has (k+1) 2^(k-2) (p-2) such neurons and 2^(k-1) more for the
    Nyquist frequency, where cos(x_j) = (-1)^a_j needs no turning.
    """
    check_size(k, p, (k + 1) * 2 ** (k - 1) * (p // 2))
    s = signs(k)
    amplitudes = np.tile(np.column_stack([s, s.prod(axis=1)]), (k + 1, 1))
    turns = np.repeat(np.arange(k + 1), len(s))[:, None] * np.array([1] * k + [k])
    return cosine_network(k, p, amplitudes, np.pi / (k + 1) * turns)


def signs(k):  # -> [2^(k-1), k]
    """All of {-1, 1}^k with first sign +1."""
    return np.array(list(itertools.product((1,), *[(1, -1)] * (k - 1))))


def cosine_network(k, p, amplitudes, phases):
    """Neurons amplitude cos(phase + 2 pi zeta a/p), [r, k+1] of each, for every zeta, at norm 1.

    All neurons of odd p have the same norm. The Nyquist neurons of even p have the share
    r / (p-2+r), r = 2^(-(k-1)/2), of sum_i ||theta_i||^(k+1), and only the first 2^(k-1) rows.
    """
    half = 2 ** (k - 1)
    angle = 2 * np.pi * np.arange(p) / p
    r = 2 ** (-(k - 1) / 2)
    neurons = []
    for zeta in range(1, p // 2 + 1):
        nyquist = 2 * zeta == p
        rows = slice(half if nyquist else None)
        x = amplitudes[rows, :, None] * np.cos(phases[rows, :, None] + zeta * angle)  # [r, k+1, p]
        share = 1 if p == 2 else (r if nyquist else 2) / (p - 1 if p % 2 else p - 2 + r)
        size = (share / len(x)) ** (1 / (k + 1))
        neurons.append(size * x / np.sqrt((x**2).sum(axis=(1, 2), keepdims=True)))
    x = np.concatenate(neurons).transpose(1, 2, 0)  # [k+1, p, m]
    return {"u": xp.asarray(x[:k].copy()), "w": xp.asarray(x[k].T.copy())}


def class_weights(k, p):  # -> [p], by Delta = y' - y; sum 1
    """The wrong classes' weights under which every neuron of a max-margin network is optimal.

    Uniform, 1/(p-1), for odd p (Def. 3.6). For even p a Nyquist neuron makes 1/r times the margin
    of a cosine of its norm, r = 2^(-(k-1)/2); weights A + B (-1)^Delta bring it down by r.
    """
    r = 2 ** (-(k - 1) / 2) if p % 2 == 0 else 1
    slope = (1 - r) / (p - 1 + r)  # B = slope (1 + A), A (p-1) = 1 + B
    a = (1 + slope) / (p - 1 - slope)
    q = a + slope * (1 + a) * (-1.0) ** np.arange(p)
    q[0] = 0
    return xp.asarray(q)


def theory_check(params):
    """Compare a network of norm 1 with Theorem 4.1 (G.2) on all p^k inputs, by brute force.

    A network of norm 1 is max-margin if and only if f(a)[c] = gamma* (1{c = sum a} - 1/p), so that
    all wrong classes are alike (Condition 3.8). The dual: for every neuron the gradient of the mean
    weighted margin g' is grad_i E g' = (k+1) gamma* ||theta_i||^(k-1) theta_i.
    -> [(what, measured, expected, error relative to gamma* or to the expected size), ..]
    """
    k, p, m = params["u"].shape
    gamma, q, buf = max_margin(k, p), class_weights(k, p), Buffers()
    low, high, spread, deviation = math.inf, -math.inf, 0.0, 0.0
    dual = {name: xp.zeros_like(x) for name, x in params.items()}
    onehot = xp.eye(p)
    for rows in blocks(p ** (k - 1), p * m * 8):
        prefix = digits(xp.arange(rows.start, rows.stop), k - 1, p)
        y = ((labels(prefix, p)[:, None] + xp.arange(p)) % p).reshape(-1)
        logits, backward = mlp(params, prefix, buf=buf)
        margin, _ = margins(logits, y)
        wrong = logits[onehot[y] == 0].reshape(len(y), p - 1)
        low, high = min(low, float(margin.min())), max(high, float(margin.max()))
        spread = max(spread, float((wrong.max(axis=1) - wrong.min(axis=1)).max()))
        deviation = max(deviation, float(xp.abs(logits - gamma * (onehot[y] - 1 / p)).max()))
        weight = q[(xp.arange(p) - y[:, None]) % p]  # of each wrong class
        for name, d in backward((onehot[y] - weight) / p**k).items():
            dual[name] += d
    c = (k + 1) * gamma * neuron_norms(params) ** (k - 1)
    scaled = {"u": c * params["u"], "w": c[:, None] * params["w"]}
    residual = max(float(xp.abs(dual[name] - scaled[name]).max()) for name in dual)
    s = diagonal_dft(params)[1:]
    rows = [("norm ||theta||_{2,k+1}", norm(params), 1, 1),
            ("margin, smallest over inputs", low, gamma, gamma),
            ("margin, largest over inputs", high, gamma, gamma),
            ("spread over wrong classes (Cond. 3.8)", spread, 0, gamma),
            ("|f - gamma* (1{c = sum a} - 1/p)|", deviation, 0, gamma),
            ("margin bound from the weights", margin_bound(params), gamma, gamma),
            ("S_j from the weights, smallest", float(s.real.min()), gamma * p**k, gamma * p**k),
            ("S_j from the weights, largest", float(s.real.max()), gamma * p**k, gamma * p**k),
            ("S_j imaginary part", float(xp.abs(s.imag).max()), 0, gamma * p**k)]
    if 16 * p ** (k + 1) <= MAX_BYTES // 4:  # else network_dft would refuse
        f = xp.abs(network_dft(params))
        j = xp.arange(1, p)
        diagonal = (j,) * k + (p - j,)
        rows += [("f^(j,..,j,-j), smallest (Lemma F.2)", float(f[diagonal].min()), gamma * p**k,
                  gamma * p**k)]
        f[diagonal] = 0
        rows += [("f^ elsewhere, largest (Lemma F.2)", float(f.max()), 0, gamma * p**k)]
    largest = float(max(xp.abs(x).max() for x in scaled.values()))
    rows += [("dual condition, residual", residual, 0, largest)]
    return [(what, got, wanted, abs(got - wanted) / unit) for what, got, wanted, unit in rows]


# ------------------------------------------------------------------------------------------------
# Training: the rule is in complete, its timetable in schedule, its steps in train_step


def interaction(params, a, buf=None):  # [n, k] -> scalar, {"u": du, "w": dw}
    """-k! mean_a sum_i u_{i,1}(a_1) .. u_{i,k}(a_k) w_i(a_1 + .. + a_k), and its gradients in buf.

    Of all terms of z^k only this one, the product of all k numbers' parts, can tell one sum from
    another: where no u_j and w has a mean, all others average to 0 over D_p, and this one is, up to
    (p-1)/p, the mean class-weighted margin (Lemma 4.2). Each neuron here stands by itself.
    """
    u, w, buf = params["u"], params["w"], buf or Buffers()
    k, p, m = u.shape
    n, eye = len(a), xp.eye(p, dtype=u.dtype)
    onehot = [eye[a[:, j]] for j in range(k)] + [-math.factorial(k) / n * eye[labels(a, p)]]
    du, dw = buf("du alone", u.shape, u.dtype), buf("dw alone", w.shape, w.dtype)
    value = 0
    for part in blocks(m, (k + 1) * n * u.dtype.itemsize, 8 * BLOCK_BYTES):
        tables, grads = [[*x[:, :, part], y[part].T] for x, y in ((u, w), (du, dw))]  # k+1 [p, ..]
        new = lambda name: buf(name, (n, tables[0].shape[1]), u.dtype)
        x = [xp.matmul(onehot[j], tables[j], out=new(f"x{j}")) for j in range(k + 1)]
        before = [None, x[0]]  # before[j] = x[0] .. x[j-1]
        for j in range(1, k):
            before.append(xp.multiply(before[j], x[j], out=new(f"before{j}")))
        value = value + (before[k] * x[k]).sum()
        grads[k][...] = onehot[k].T @ before[k]
        after = x[k]  # x[j+1] .. x[k]
        for j in range(k - 1, -1, -1):
            dx = xp.multiply(before[j], after, out=new("dx alone")) if j else after
            grads[j][...] = onehot[j].T @ dx
            after = xp.multiply(after, x[j], out=new("after")) if j else None
    return value, {"u": du, "w": dw}


def natural_scale(k, p, m, margin=10):
    """The entry size (rms) at which m ideal neurons of equal norm have this margin on every input.

    At common norm r the best network has the margin gamma* m r^(k+1) (Theorem 4.1), and a neuron
    has (k+1) p entries. The settings below are in this unit, which makes them fit any k and p.
    """
    return (margin / (max_margin(k, p) * m)) ** (1 / (k + 1)) / math.sqrt((k + 1) * p)


@dataclass
class Run:
    """A training run: all that its file holds, and so all that its next step depends on."""
    config: dict
    params: dict
    first: dict  # AdamW's running means
    second: dict
    train: np.ndarray  # bool [p^k], see split
    rng: np.random.Generator  # draws the batches
    power_at_init: np.ndarray  # see spectra, before the first step
    step: int = 0
    seconds: float = 0.0
    history: list = field(default_factory=list)  # one dict a line of progress

    def __post_init__(self):
        self.buf = Buffers()
        c = self.config
        index, k = np.flatnonzero(self.train), c["k"]
        if c.get("layers") == 1:  # one input an orbit
            index = np.flatnonzero(self.train & (orbits(k, c["p"]) == np.arange(c["p"] ** k)))
        elif self.train.all() and c["batch"] >= len(index) and c.get("alone") == 0:
            index, k = np.arange(c["p"] ** (k - 1)), k - 1  # all of D_p at each step: prefixes do
        self.inputs = digits(xp.asarray(index), k, c["p"])
        rng = np.random.default_rng([c["seed"], 3])
        self.samples = [sample_inputs(np.flatnonzero(part), c["k"], c["p"], rng, 4096)
                        for part in (self.train, ~self.train)]


COMMON = {"model": "mlp", "k": 3, "p": 23, "train_fraction": 0.5, "steps": 1500, "batch": 1024,
          "seed": 0, "dtype": "float32", "init_std": 1, "beta2": 0.98}
DEFAULTS = {
    "mlp": {"m": None, "activation": "power", "max_margin": False, "alone": 0.5, "equal": 0.7,
            "lr": 0.05, "weight_decay": 1.2, "penalty": 0.05, "penalty_power": None},
    "max_margin": {"train_fraction": 1, "steps": 1000, "batch": 2**30, "alone": 0, "equal": 0,
                   "init_std": 0.1, "lr": 0.03, "weight_decay": 0, "penalty": 0.1, "beta2": 0.95},
    "relu": {"alone": 0, "equal": 0, "init_std": 0.2, "weight_decay": 1.4, "penalty": 0},
    "transformer": {"p": 31, "layers": 1, "heads": 160, "d_head": 4, "d_model": 128, "steps": None,
                    "batch": None, "init_std": None, "lr": 3e-3, "weight_decay": 4, "hold": 0.5,
                    "late_decay": None},
    "deep": {"heads": 4, "d_head": 16, "d_model": 64, "d_ff": 256, "steps": 2500, "batch": 512,
             "init_std": 0.5, "lr": 1e-3, "weight_decay": 2, "late_decay": 1}}
RANGES = {"train_fraction": (0, 1), "steps": (1, 10**9), "batch": (1, 2**30), "seed": (0, 2**63),
          "alone": (0, 0.99), "equal": (0, 0.99), "init_std": (1e-9, 1e6), "lr": (0, 1e3),
          "weight_decay": (0, 1e6), "penalty": (0, 1e6), "penalty_power": (1, 16),
          "layers": (1, 100), "heads": (1, 10**6), "d_head": (1, 10**6), "d_model": (1, 10**6),
          "d_ff": (1, 10**6), "hold": (0, 0.99), "late_decay": (0, 1)}


def complete(config):
    """Fill in the settings that are not given, and check them. Raises BadInput.

    The rule behind the defaults of the MLP is one for all k and p, in units of s = natural_scale(k,
    p, m): DEFAULTS holds init_std / s, lr / s, weight_decay s nu and penalty / gamma*.
    1. Up to the share alone of the steps each neuron by itself climbs its interaction. On all of
       D_p that is the gradient of the network's loss while its outputs are small; on a part of it
       the other terms of z^k are noise, and at Gaussian weights the mean square of z^k is 3, 11,
       47, 205 times that of the interaction at k = 2, 3, 4, 5.
    2. Up to the share equal the network learns as a whole, with cross-entropy.
       In 1 and 2 all vectors of all neurons are kept at mean 0 and at one norm (see schedule): none
       can win by size, so each settles on a frequency of its own.
    3. Then all is free: cross-entropy + penalty sum_i ||theta_i||^(k+1), and weight decay times
       1 - loss / log p, as decay that begins before anything is learned ends all learning.
    lr is held, in units of the growing norm, in 1 and 2, and goes linearly to 0 in 3.
    max_margin: 3 alone, on all of D_p and without decay, as Lemma 3.7 has it.
    The transformer is all free from the start: lr is held up to the share hold, with decay as in 3,
    and goes to 0 with late_decay of that.
    """
    model = config.get("model", COMMON["model"])
    if model not in ("mlp", "transformer"):
        raise BadInput(f"model {model!r} is not known: it must be mlp or transformer")
    kinds = [model] + [kind for kind in ("max_margin", "relu") if model == "mlp"
                       and (config.get(kind) or config.get("activation") == kind)]
    if model == "transformer" and config.get("layers", 1) > 1:
        kinds.append("deep")
    rule = COMMON | {name: x for kind in kinds for name, x in DEFAULTS[kind].items()}
    for name in config:
        if name not in rule:
            raise BadInput(f"{name.replace('_', '-')} does not apply to this model ({model}"
                           f"{', one layer' if kinds == ['transformer'] else ''}); give another "
                           f"--model or --layers, or leave it out")
    given, config = config, {**rule, **config}
    k, p = config["k"], config["p"]
    check_size(k, p)
    if model == "mlp":
        complete_mlp(config, given)
    else:
        complete_transformer(config)
    for name, (low, high) in RANGES.items():
        if name in config and not low <= config[name] <= high:
            raise BadInput(f"{name.replace('_', '-')} {config[name]} is out of range: it must lie "
                           f"between {low} and {high}")
    return config


def complete_mlp(config, given):
    """complete's settings in the units of natural_scale, in place."""
    k, p = config["k"], config["p"]
    m = config["m"] = 2 ** (2*k - 2) * (p - 1) if config["m"] is None else config["m"]
    check_size(k, p, m)
    s, nu = natural_scale(k, p, m), degree(k, config["activation"])
    for name, unit in (("init_std", s), ("lr", s), ("weight_decay", 1 / (s * nu)),
                       ("penalty", max_margin(k, p))):
        if name not in given:
            config[name] *= unit
    if config["penalty_power"] is None:
        config["penalty_power"] = nu
    if config["alone"] > config["equal"]:
        raise BadInput(f"alone {config['alone']} must not exceed equal {config['equal']}; "
                       "lower --alone or raise --equal")
    if config["alone"] and config["activation"] != "power":
        raise BadInput("alone must be 0 for ReLU: the interaction is that of the power activation")
    if config["max_margin"] and config["activation"] != "power":
        raise BadInput("max-margin is for the power activation, the one with a known gamma*")


def complete_transformer(config):
    """Settings of one layer, by k and the share of collisions, in place; the size of any number.

    One layer needs a small start and the noise of a small batch, the more so the smaller k is: only
    then do its collisions generalize. Late decay keeps heads clean and collisions unlearned: the
    more of these there are, the less of it.
    """
    k, p, heads, d = (config[name] for name in ("k", "p", "heads", "d_model"))
    distinct = math.prod(max(0, 1 - i / p) for i in range(k - 1))  # the share without collisions
    for name, value in (("steps", 3000 * k), ("batch", 256 * (k - 1)),
                        ("init_std", 0.3 ** (max(0, 5 - k) / 2)),
                        ("late_decay", max(0, 1 - 1.5 * math.sqrt(1 - distinct)))):
        if config[name] is None:
            config[name] = value
    tokens = p if config["layers"] == 1 else k * p
    weights = config["layers"] * d * (4 * heads * config["d_head"] + 2 * config.get("d_ff", 0))
    states = 1024 * heads * d * (config["layers"] - 1)  # what attend_rows keeps of a block
    if 16 * (weights + states + heads * tokens * (tokens + max(d, p))) > MAX_BYTES:
        raise BadInput("too large: the weights, states and attention matrices of all heads "
                       f"exceed {MAX_BYTES // 2**30} GiB; take fewer or smaller heads or layers")


def initial(config, rng):
    """The parameters before the first step."""
    c = config
    if c["model"] == "mlp":
        return init_mlp(c["k"], c["p"], c["m"], c["init_std"], rng, c["dtype"])
    sizes = c["heads"], c["d_head"], c["d_model"]
    if c["layers"] == 1:
        return init_attention(c["p"], *sizes, c["init_std"], rng, c["dtype"])
    return init_transformer(c["k"], c["p"], c["layers"], *sizes, c["d_ff"], c["init_std"], rng,
                            c["dtype"])


def new_run(config):
    """A run at step 0. Split, weights and batches have random streams of their own."""
    stream = lambda i: np.random.default_rng([config["seed"], i])
    train = split(config["k"], config["p"], config["train_fraction"], stream(0),
                  symmetric=config.get("layers") == 1)
    params = initial(config, stream(1))
    zeros = [{name: xp.zeros_like(x) for name, x in params.items()} for _ in range(2)]
    return Run(config, params, *zeros, train, stream(2), spectra(config, params))


def spectra(config, params):
    """What a run keeps of its first weights' Fourier measures, as an array on the host."""
    if config["model"] == "mlp":
        return neuron_spectra(params)["max_power"]
    return (head_spectra(params)["shares"].astype(config["dtype"]) if config["layers"] == 1
            else embedding_spectrum(params))


def standardize(params, rms):
    """Give each u_j and w of each neuron mean 0 and this root mean square, in place."""
    for x, axis in ((params["u"], 1), (params["w"], 1)):
        x -= x.mean(axis=axis, keepdims=True)
        x *= rms / xp.sqrt((x * x).mean(axis=axis, keepdims=True))


def schedule(config, step):
    """The timetable of complete: -> stage "alone", "equal" or "free", lr, rms of all weights.

    rms is for the first two stages: the size at which the ideal network has the margin 0.3 in the
    first and, growing, 10 at the end of the second.
    """
    done = step / config["steps"]
    alone, equal = config.get("alone", 0), config.get("equal", 0)
    stage = "alone" if done < alone else "equal" if done < equal else "free"
    held = config.get("hold", equal)
    lr = config["lr"] * min(1, (step + 1) / 10, (1 - done) / (1 - held))  # ten steps to warm up
    if stage == "free":
        return stage, lr, None
    k, p, m = (config[name] for name in ("k", "p", "m"))
    ahead = 1 if stage == "alone" else (equal - done) / (equal - alone)  # goes from 1 to 0
    grown = 0.03**ahead  # of the margin 10; weights go by its (k+1)-th root
    return stage, lr * grown ** (1 / (k + 1)), natural_scale(k, p, m, 10 * grown)


def train_step(run):
    """One step by the rule of complete."""
    c, params = run.config, run.params
    stage, lr, rms = schedule(c, run.step)
    a, decay = run.inputs, 0
    if c["batch"] < len(a):
        a = a[xp.asarray(run.rng.integers(0, len(a), c["batch"]))]
    if stage == "alone":
        _, grads = interaction(params, a, run.buf)
    else:
        loss, grads = loss_and_gradients(params, a, c.get("activation"), run.buf)
    if stage == "free":
        if c.get("penalty"):
            penalty(params, c["penalty"], degree(c["k"], c["activation"]),
                    c["penalty_power"])[1](grads)
        decay = c["weight_decay"] * (1 - loss / math.log(c["p"])).clip(0)
        if run.step >= c.get("hold", 1) * c["steps"]:
            decay *= c["late_decay"]
    run.step += 1
    adamw(params, grads, run.first, run.second, run.step, lr, decay, (0.9, c["beta2"]))
    if stage != "free":
        standardize(params, rms)


def finite(params):
    """Whether no number has overflowed."""
    return all(bool(xp.isfinite(x).all()) for x in params.values())


# ------------------------------------------------------------------------------------------------
# Runs: progress, report, and one .npz file each

FORMAT, VERSION = "fourier-circuits run", 1


def progress(run):
    """A line of history: cross-entropies and accuracies on up to 4096 fixed inputs of each part.

    In a max-margin run also the normalized margin over gamma*, on all of D_p.
    """
    c, params = run.config, run.params
    line = {"step": run.step}
    for name, a in zip(("train", "test"), run.samples):
        line[f"{name}_loss"] = line[f"{name}_accuracy"] = None
        if len(a):
            loss, right = accuracy(params, a, c.get("activation"))
            line[f"{name}_loss"], line[f"{name}_accuracy"] = loss, right
    line |= (neuron_measures(params)[0] if c["model"] == "mlp" else head_measures(params)[0]
             if c["layers"] == 1 else {"embedding_share": top_share(embedding_spectrum(params))})
    if c.get("max_margin"):
        line["margin_ratio"] = normalized_margin(params) / max_margin(c["k"], c["p"])
    return line


def neuron_measures(params):
    """-> the summary of neuron_spectra over live neurons, neuron_spectra"""
    s = neuron_spectra(params)
    live = s["live"]
    return {"max_normalized_power": float(s["max_power"][:, live].mean()),
            "single_frequency_fraction": float((s["concentration"][live] > 0.95).mean()),
            "frequencies_used": len(set(s["frequency"][live].tolist()))}, s


def head_measures(params):
    """-> the summary of head_spectra over live heads (frequencies_used: the key frequencies v of
    their top pairs), head_spectra
    """
    s = head_spectra(params)
    live = s["live"]
    return {"top_two_share": float(np.median(s["shares"][live, 1])), "live_heads": int(live.sum()),
            "frequencies_used": len(set(s["top"][live, 0, 1].tolist()))}, s


def report(run):
    """What the network is and does, as a dict ready for JSON.

    Measured on all of D_p, but for the two ablated networks on at most 2^17 random inputs and for
    grokking, which reads the history.
    """
    c, params = run.config, run.params
    k, p = c["k"], c["p"]
    whole = evaluate(logit_blocks(params, k, p, c.get("activation")), run.train, k, p)
    a = sample_inputs(np.arange(p**k), k, p, np.random.default_rng(0))
    about = (report_neurons if c["model"] == "mlp" else report_heads if c["layers"] == 1
             else report_embedding)
    sizes = ("model", "k", "p", "m", "activation", "layers", "heads", "d_head", "d_model", "d_ff",
             "train_fraction", "seed")
    return {**{name: c[name] for name in sizes if name in c},
            "steps": run.step, "seconds": round(run.seconds, 2),
            "train_accuracy": whole["train_accuracy"], "test_accuracy": whole["test_accuracy"],
            **about(run, whole, a)}


def report_neurons(run, whole, a):
    """report's part on the MLP; margin is the normalized one."""
    params, activation = run.params, run.config["activation"]
    k, p, m = params["u"].shape
    nu = degree(k, activation)
    measures, s = neuron_measures(params)
    live = s["live"]
    used = np.bincount(s["frequency"][live], minlength=p // 2 + 1)[1:]
    kept, rest = (accuracy(x, a, activation)[1] for x in ablate(params))
    margin = whole["margin"] / (norm(params, nu) ** nu or 1)
    theory = max_margin(k, p) if activation == "power" else None
    return {
        "live_neurons": int(live.sum()), **measures,
        "max_normalized_power_at_init": float(run.power_at_init.mean()),
        "max_normalized_power_expected": expected_max_power(p),
        "phase_error": float(s["phase_error"][live].mean()),
        "frequencies_total": p // 2,  # Theorem 4.1.3: all of them
        "frequency_histogram": used.tolist(),
        "margin": margin, "max_margin": theory,
        "margin_ratio": theory and margin / theory,
        "restricted_accuracy": kept, "excluded_accuracy": rest}


def report_heads(run, whole, a):
    """report's part on attention. Shares are medians over live heads, at init over all.

    fresh_accuracy is on held-out orbits, distinct_accuracy and collision_accuracy on those of them
    where a_1 .. a_{k-1} are all different or not.
    """
    k, p = run.config["k"], run.config["p"]
    measures, s = head_measures(run.params)
    live = s["live"]
    equal = collisions(k, p)
    mean = lambda part: float(whole["right"][part].mean()) if part.any() else None
    kept, rest = (accuracy(x, a)[1] for x in ablate_heads(run.params))
    shares, before = (np.median(x, axis=0).tolist() for x in (s["shares"][live], run.power_at_init))
    used = np.bincount(s["top"][live, 0, 1], minlength=p // 2 + 1)[1:]
    return {
        "fresh_accuracy": whole["test_accuracy"],
        "distinct_accuracy": mean(~run.train & ~equal),
        "collision_accuracy": mean(~run.train & equal), **measures,
        "top_two_share_at_init": before[1],
        "top_two_share_deciles": np.quantile(s["shares"][live, 1], (0.1, 0.5, 0.9)).tolist(),
        "top_shares": shares, "top_shares_at_init": before,
        "rank": float(np.median(s["rank"][live])),
        "frequencies_total": p // 2, "frequency_histogram": used.tolist(),
        "restricted_accuracy": kept, "excluded_accuracy": rest,
        "each_head": [{"live": bool(on), "top": top.tolist(), "shares": share.tolist(),
                       "shares_at_init": first.tolist(), "rank": int(rank)}
                      for on, top, share, first, rank in zip(
                          live, s["top"], s["shares"], run.power_at_init, s["rank"])]}


def report_embedding(run, whole, a):
    """report's part on a transformer of several layers: its grokking, its embedding's spectrum."""
    now, p = embedding_spectrum(run.params), run.config["p"]
    return {**grokking(run.history), "embedding_share": top_share(now),
            "embedding_share_at_init": top_share(run.power_at_init),
            "frequencies_total": p // 2, "embedding_spectrum": now.tolist()}


def grokking(history, level=0.99):
    """Of the lines of a history: when accuracy on each part first reached level (None: never), the
    largest train-test gap, and the gap's area in steps (Figure 4).
    """
    gap = [max(0, line["train_accuracy"] - line["test_accuracy"]) for line in history
           if line["test_accuracy"] is not None]
    first = lambda part: next((line["step"] for line in history
                               if (line[f"{part}_accuracy"] or 0) >= level), None)
    width = np.diff([0] + [line["step"] for line in history])
    return {"steps_to_train": first("train"), "steps_to_test": first("test"),
            "largest_gap": max(gap, default=None),
            "gap_area": float(np.dot(gap, width)) if gap else None}


def check_writable(path):
    """Raise BadInput, before any work, if a run cannot be saved at path. Leaves what is there."""
    if os.path.exists(path) and not os.path.isfile(path):
        raise BadInput(f"cannot write {path}: it is not a regular file")
    try:
        tempfile.TemporaryFile(dir=os.path.dirname(path) or ".").close()
    except OSError as error:
        raise BadInput(f"cannot write {path}: {error.strerror}; choose another --out") from None


def save_run(path, run):
    """Write a run to an .npz file, whole or not at all, by way of path.part. Raises BadInput."""
    arrays = {f"{group} {name}": to_host(x) for group in ("params", "first", "second")
              for name, x in getattr(run, group).items()}
    meta = {"format": FORMAT, "version": VERSION, "config": run.config, "step": run.step,
            "seconds": run.seconds, "history": run.history, "rng": run.rng.bit_generator.state}
    part = f"{path}.part"
    try:
        with open(part, "wb") as file:
            np.savez(file, meta=np.array(json.dumps(meta)), train=np.packbits(run.train),
                     power_at_init=run.power_at_init, **arrays)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except OSError as error:
        if os.path.exists(part):
            os.unlink(part)
        raise BadInput(f"cannot write {path}: {error.strerror}; choose another --out") from None


def load_run(path):
    """Read a run back, without pickle. Raises BadInput for a file that is not a whole run."""
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
        meta = json.loads(str(arrays["meta"]))
        if meta["format"] != FORMAT:
            raise ValueError
    except OSError as error:
        raise BadInput(f"cannot read {path}: {error.strerror or 'not a run file'}") from None
    except Exception:  # a broken zip fails in many ways
        raise BadInput(f"{path} is not a run file, or it is damaged") from None
    if meta.get("version") not in range(1, VERSION + 1):
        raise BadInput(f"{path} was written by a newer version of this program (format "
                       f"{meta.get('version')}, known: {VERSION}); update the program to read it")
    try:
        config, step = complete(meta["config"]), meta["step"]
        k, p = config["k"], config["p"]
        like = initial(config, np.random.default_rng(0))
        before, dtypes = arrays["power_at_init"], {x.dtype for x in arrays.values()}
        shape = spectra(config, like).shape
        if (not 0 <= step <= config["steps"]
                or arrays["train"].shape != (-(-p**k // 8),) or before.shape != shape
                or dtypes != {before.dtype, arrays["meta"].dtype, np.dtype("u1")}
                or before.dtype != config["dtype"]):
            raise ValueError
        grokking(meta["history"])  # these two read what the reports will read
        round(meta["seconds"])
        groups = [{name: xp.asarray(arrays[f"{group} {name}"].reshape(x.shape))
                   for name, x in like.items()} for group in ("params", "first", "second")]
        train = np.unpackbits(arrays["train"], count=p**k).astype(bool)
        rng = np.random.default_rng()
        rng.bit_generator.state = meta["rng"]
        return Run(config, *groups, train, rng, before, step, meta["seconds"], meta["history"])
    except (KeyError, ValueError, TypeError, AttributeError, OverflowError):
        raise BadInput(f"{path} is damaged: its parts do not fit together") from None
