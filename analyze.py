"""Look into trained runs, and check the theory's networks on all inputs.

    python analyze.py RUN.npz                       the report, and neurons as text
    python analyze.py RUN.npz --json                the report as JSON
    python analyze.py RUN.npz --figures DIR         draw its figure (needs matplotlib)
    python analyze.py RUN RUN RUN ..                the same of several runs; of transformers a line
                                                    for all with the same settings
    python analyze.py --theory --k 3 --p 23         Theorem 4.1, number by number, 1 second
"""

import argparse
import json
import math
import os
import signal
import string
import sys
import warnings

import numpy as np

import fourier_circuits as fc

# ---- The report: what a trained network is and does, as numbers ----------------------------------


def report(run):
    """What a run became, a dict ready for JSON. It is measured on all of D_p; the ablated networks
    and the untrained one on at most 2^17 random inputs; grokking reads the history."""
    config, k, p = run.config, run.config["k"], run.config["p"]
    network, first = fc.network_of(config, run.params), fc.new_run(config).params
    whole = fc.evaluate(network, fc.all_inputs(k, p))
    sample = fc.sample_inputs(np.arange(p**k), k, p, np.random.default_rng(0))
    without = fc.evaluate(fc.without_circuit(network, whole["circuit"]), sample)
    at_init = fc.evaluate(fc.network_of(config, first), sample)
    if config["model"] == "transformer":
        more = grokking(run.history)
    elif config["model"] == "attention":
        more = report_heads(run, whole["right"], first, sample)
    else:
        more = report_neurons(run, whole["margin"], first, sample)
    return {**config, "step": run.step, "seconds": round(run.seconds, 2),
            "train_inputs": len(run.index), "train_accuracy": mean(whole["right"], run.train),
            "test_accuracy": mean(whole["right"], ~run.train), "frequencies_total": p // 2,
            "circuit_share": whole["circuit_share"],
            "circuit_share_at_init": at_init["circuit_share"],
            "circuit_frequencies": fc.circuit_frequencies(whole["circuit"]),
            "accuracy_without_circuit": without["accuracy"], **more}


def mean(x, part):
    """The mean of the part of x, or None where there is none."""
    return float(x[part].mean()) if part.any() else None


def histogram(frequencies, p):  # -> [p // 2]
    """How often each of 1 .. p // 2 is there."""
    return np.bincount(frequencies, minlength=p // 2 + 1)[1:].tolist()


def report_neurons(run, smallest_margin, first, sample):
    """The part of a report on the MLP, which has this margin on all inputs and had these first
    weights. The margin that is reported is the normalized one."""
    config, params = run.config, run.params
    measures, before = fc.neuron_spectra(params), fc.neuron_spectra(first)["summary"]
    k, p, live = config["k"], config["p"], measures["live"]
    restricted, excluded = (fc.evaluate(fc.network_of(config, part), sample)["accuracy"]
                            for part in fc.ablate(params))
    names = ("max_normalized_power", "single_frequency_fraction", "single_frequency_weight",
             "frequencies_used")
    theory = dict.fromkeys(("gamma_star", "margin", "margin_ratio"))
    if config["model"] != "relu":
        gamma = fc.gamma_star(k, p)
        margin = smallest_margin / (fc.norm(params) or 1) ** (k + 1)  # 0 if all weights are 0
        theory = {"gamma_star": gamma, "margin": margin, "margin_ratio": margin / gamma}
    return {**measures["summary"], **{f"{name}_at_init": before[name] for name in names},
            "phase_error": mean(measures["phase_error"], live),
            "frequency_histogram": histogram(measures["frequency"][measures["single"]], p),
            **theory, "restricted_accuracy": restricted, "excluded_accuracy": excluded}


SHARES = "key_share", "token_share", "class_share", "block_share"


def report_heads(run, right, first, sample):
    """The part of a report on attention, which had these first weights. right: bool [p^k], which
    inputs it answers right.

    Of live heads, of all heads at init, and of Gaussian tables (at random): the medians of SHARES,
    and the shares of heads with the same frequency in all tables, or with a single one. Accuracies
    on held-out orbits (fresh), on those of them where a_1 .. a_{k-1} all differ (distinct), and on
    the others (collision)."""
    k, p, rng = run.config["k"], run.config["p"], np.random.default_rng(0)
    test, equal = ~run.train, fc.collisions(k, p)
    restricted, excluded = (fc.evaluate(network, sample)["accuracy"]
                            for network in fc.ablate_heads(run.params))
    measures, before = fc.head_spectra(run.params), fc.head_spectra(first)
    noise = fc.table_spectra(*fc.centred(*rng.standard_normal((2, 160, p, p))))
    averages, everywhere = {}, slice(None)
    for ending, x, part in (("", measures, measures["live"]), ("_at_init", before, everywhere),
                            ("_at_random", noise, everywhere)):
        averages |= {f"{name}{ending}": float(np.median(x[name][part])) for name in SHARES}
        averages |= {f"same_frequency{ending}": float(x["same"][part].mean()),
                     f"single_frequency_fraction{ending}": float(x["single"][part].mean())}
    columns = {name: measures[name].tolist() for name in ("live", "size", "frequency", *SHARES)}
    each_head = [dict(zip(columns, head)) for head in zip(*columns.values())]
    return {**measures["summary"], **averages, "fresh_accuracy": mean(right, test),
            "distinct_accuracy": mean(right, test & ~equal),
            "collision_accuracy": mean(right, test & equal),
            "frequency_histogram": histogram(measures["frequency"][measures["used"]], p),
            "restricted_accuracy": restricted, "excluded_accuracy": excluded,
            "each_head": each_head}


def grokking(history, level=0.99):
    """Of the lines of a history: when accuracy on each part first reached level (None: never), the
    largest train-test gap, and the gap's area in steps (Figure 4)."""
    gap = [max(0, line["train_accuracy"] - line["test_accuracy"]) for line in history
           if line["test_accuracy"] is not None]

    def reached(part):
        return next((line["step"] for line in history
                     if (line[f"{part}_accuracy"] or 0) >= level), None)

    width = np.diff([0] + [line["step"] for line in history])
    return {"steps_to_train": reached("train"), "steps_to_test": reached("test"),
            "largest_gap": max(gap, default=None),
            "gap_area": float(np.dot(gap, width)) if gap else None}


# ---- The report as text, and tables --------------------------------------------------------------
# A row of ROWS is printed if the report has all numbers that it names; one that is None is a "-".


ROWS = """\
accuracy             train {train_accuracy:.2%}, test {test_accuracy:.2%}
of the held-out      keys distinct {distinct_accuracy:.2%}, collisions {collision_accuracy:.2%}
circuit share        {circuit_share:.2%} of the logits' power, at init {circuit_share_at_init:.2%}
its frequencies      {circuit_frequencies} of {frequencies_total} have 99% of it
without the circuit  {accuracy_without_circuit:.2%} are right; chance {chance:.2%}
live neurons         {live_neurons} of {m}
live heads           {live_heads} of {heads}; their medians:
  power of keys      {key_share:.3f} at the head's frequency, at init {key_share_at_init:.3f}
  power of tokens    {token_share:.3f} there, in OV, at init {token_share_at_init:.3f}
  power of classes   {class_share:.3f} there, in OV, at init {class_share_at_init:.3f}
  2 x 2 frequencies  {block_share:.3f} of the power of S, at init {block_share_at_init:.3f}
same frequency       {same_frequency:.2%} in all three, at init {same_frequency_at_init:.2%}
single-frequency     {single_frequency_fraction:.2%} of them (> 95% of their power), at init \
{single_frequency_fraction_at_init:.2%}
  their weight       {single_frequency_weight:.2%} of sum_i ||theta_i||^(k+1)
max normalized power {max_normalized_power:.4f}, at init {max_normalized_power_at_init:.4f}
phase error          {phase_error:.4f} mean |phi_1 + .. + phi_k - phi_w|
normalized margin    {margin:.6g}, {margin_ratio:.4f} of gamma*
99% of train         at step {steps_to_train} (-: not reached)
99% of test          at step {steps_to_test}
train - test gap     largest {largest_gap:.3f}, area {gap_area:.0f} steps
restricted accuracy  {restricted_accuracy:.2%} keeping only the own frequency of each
excluded accuracy    {excluded_accuracy:.2%} keeping only the rest
frequencies          {frequencies_used} of {frequencies_total} used; how many have each:"""
TRAINED = {  # by what rule a run was trained
    "mlp": "textbook AdamW", "relu": "relu activation, textbook AdamW",
    "max-margin": "maximum-margin training", "attention": "AdamW with gated decay",
    "control-variate": "AdamW with a control variate, equal sizes for {equal:.0%} of the steps",
    "transformer": "AdamW, the gradient clipped to norm {clip:g}"}


class Text(string.Formatter):
    """str.format that shows a number that there is not as -, and never 0% or 100% for what is only
    nearly that."""

    def format_field(self, x, form):
        if x is None:
            return "-"
        if form.endswith("%") and 0 < x < 1:
            least = 10.0 ** -(2 + int(form[:-1].split(".")[1]))  # 0.0001 for ".2%"
            x = min(max(x, least), 1 - least)
        return format(x, form)


def names_of(row):
    """The names of the numbers in a row of a table."""
    return {name for _, name, _, _ in string.Formatter().parse(row) if name}


def fill(rows, numbers):
    """The rows of a table as text, those whose numbers are all there."""
    return [Text().format(row, **numbers) for row in rows.splitlines()
            if names_of(row) <= numbers.keys()]


def bars(x, low=None):
    """Numbers as a row of blocks. bars([0, 1, 2]) -> ' ▄█'."""
    x = np.asarray(x, "float64")
    low, high = x.min() if low is None else low, x.max()
    level = np.round(8 * (x - low) / ((high - low) or 1)).astype(int)
    return "".join(" ▁▂▃▄▅▆▇█"[i] for i in level)


def sizes(config):
    """What is computed, and how large it is, as text."""
    names = "k", "p", "m", "layers", "heads", "d_head", "d_model", "d_ff"
    return ", ".join(f"{name} = {config[name]}" for name in names if name in config)


def print_report(r):
    """Print what report(run) measured. (The empty line before it ends a line of progress.)"""
    print(f"\n{sizes(r)}, {TRAINED[r['model']].format(**r)}, seed {r['seed']}")
    for row in fill(ROWS, r | {"chance": 1 / r["p"]}):
        print(f"  {row}")
    counts = r.get("frequency_histogram", [])
    for zeta, count in enumerate(counts, 1):
        print(f"  {zeta:5d} {count:6d} {'#' * math.ceil(50 * count / max(1, *counts))}")
    print(f"  {r['step']} of {r['steps']} steps, {r['seconds']:.1f} seconds")
    known = [r[x] for x in ("train_accuracy", "test_accuracy") if r[x] is not None]
    done = r["step"] == r["steps"]
    if done and min(known) < 0.99 and r["model"] in ("mlp", "relu", "control-variate"):
        print("  note: what may help: more --steps, a larger --batch or --train-fraction, "
              "a smaller --weight-decay, --model control-variate")


def print_json(runs):
    """The report of a run {path: run}; of several a list, each with its file."""
    if len(runs) > 1:
        reports = [{"file": path, **report(run)} for path, run in runs.items()]
    else:
        reports = [report(run) for run in runs.values()][0]
    print(json.dumps(reports, indent=2, allow_nan=False))


def all_transformers(runs):
    """Whether these are several runs {path: run} and all of them transformers."""
    return len(runs) > 1 and all(run.config["model"] == "transformer" for run in runs.values())


def group_runs(runs):
    """Runs that differ only in the seed, together: {(k, p, other settings that tell the groups
    apart, as text): [run, ..]}, sorted."""
    runs, groups = sorted(runs, key=lambda run: [run.config[x] for x in ("k", "p", "seed")]), {}
    names = [name for name in runs[0].config if name not in ("k", "p", "seed")
             and len({run.config[name] for run in runs}) > 1]
    for run in runs:
        apart = ", ".join(f"{name.replace('_', '-')} {run.config[name]}" for name in names)
        groups.setdefault((run.config["k"], run.config["p"], apart), []).append(run)
    return groups


def spread(values, form, none="-"):
    """Mean (smallest..largest) of the values that are known."""
    known = [x for x in values if x is not None]
    if not known:
        return none
    some = f", {len(known)} of {len(values)}" if len(known) < len(values) else ""
    return f"{np.mean(known):{form}} ({min(known):{form}}..{max(known):{form}}{some})"


def print_groups(groups):
    """Grokking, mean and range over the seeds of each group."""
    line = "{:>3} {:>3} {:>5} {:>6}  {:22} {:22} {:18} {:20} {:21} {}"
    print(line.format("k", "p", "seeds", "steps", "99% train at", "99% test at", "largest gap",
                      "gap area, steps", "last test accuracy", "").rstrip())
    for (k, p, apart), runs in groups.items():
        each = [grokking(run.history) for run in runs]
        last = [run.history[-1]["test_accuracy"] if run.history else None for run in runs]
        print(line.format(
            k, p, len(runs), min(run.step for run in runs),
            spread([x["steps_to_train"] for x in each], ".0f", "never"),
            spread([x["steps_to_test"] for x in each], ".0f", "never"),
            spread([x["largest_gap"] for x in each], ".2f"),
            spread([x["gap_area"] for x in each], ".0f"), spread(last, ".3f"), apart).rstrip())


def strongest(size, live, frequency, count):
    """The largest live ones, count of them, that differ in frequency."""
    order = np.argsort(-size)
    order = order[live[order]]
    _, first = np.unique(frequency[order], return_index=True)
    return order[np.sort(first)[:count]]


def print_neurons(run, count=3):
    """Some live neurons of different frequencies: weights over 0..p-1 beside their spectra."""
    measures, vectors = fc.neuron_spectra(run.params), fc.neurons(run.params)
    spectra, norms = fc.power_spectrum(vectors), fc.to_host(fc.neuron_norms(run.params))
    for i in strongest(norms, measures["live"], measures["frequency"], count):
        print(f"\nneuron {i}: frequency {measures['frequency'][i]}, "
              f"{measures['concentration'][i]:.2%} of its power, phase error "
              f"{measures['phase_error'][i]:.4f}; weights | spectrum from 0")
        names = [*(f"u_{j}" for j in range(1, len(vectors))), "w"]
        for name, x, power in zip(names, vectors[:, i], spectra[:, i]):
            print(f"  {name:4s} {bars(x)} | {bars(power, low=0)}")


def print_theory(k, p):
    """The paper's network, for odd p, and ours against Theorem 4.1 on all p^k inputs."""
    networks = {"the paper's": fc.paper_network(k, p)} if p % 2 else {}
    networks["the rotated"] = fc.rotated_network(k, p)
    print(f"k = {k}, p = {p}: gamma* = {fc.gamma_star(k, p):.6e}, {p**k} inputs, float64"
          f"{'' if p % 2 else '; the paper constructs a network for odd p only'}")
    for name, params in networks.items():
        print(f"\n{name} network, {params['w'].shape[0]} neurons\n"
              f"  {'':40s} {'measured':>22s} {'theorem':>22s}  relative error")
        for what, got, wanted, error in fc.theory_check(params):
            print(f"  {what:40s} {got:22.15e} {wanted:22.15e}  {error:.1e}")


# ---- Figures: one style, two colours -------------------------------------------------------------


BEFORE, AFTER = "#b8a88a", "#1f5f99"
STYLE = {"axes.spines.top": False, "axes.spines.right": False, "font.size": 9,
         "axes.titlesize": 9, "xtick.labelsize": 7, "ytick.labelsize": 7,
         "legend.frameon": False, "figure.constrained_layout.use": True}


def new_figure(width, height):
    """An empty figure, in inches, in our style whatever the user's is. Raises BadInput without
    matplotlib."""
    try:
        import matplotlib.style
        from matplotlib.figure import Figure
    except Exception as error:  # it can be missing, or broken
        raise fc.BadInput(f"figures need matplotlib (pip install matplotlib): {error}") from None
    matplotlib.style.use(["default", STYLE])
    return Figure(figsize=(width, height))


def save_figure(figure, directory, name):
    """Write a PNG, whole or not at all, and say so."""
    os.makedirs(directory, exist_ok=True)
    path = os.path.join(directory, f"{name}.png")
    with fc.whole_file(path) as file:
        figure.savefig(file, format="png", dpi=150)
    print(printable(path))


def draw_curve(axis, runs, key, label, colour):
    """A number of the histories over steps: mean and range of the runs, to the shortest's end."""
    lines = list(zip(*(run.history for run in runs)))
    y = np.array([[one.get(key) for one in line] for line in lines], float)
    if np.isfinite(y).any():  # not so without a test set, or a margin
        steps = [line[0]["step"] for line in lines]
        axis.plot(steps, y.mean(axis=1), color=colour, label=label)
        axis.fill_between(steps, y.min(axis=1), y.max(axis=1), alpha=0.3, lw=0, color=colour)


def draw_shares(axis, before, after, title):
    """Histograms of shares of power before and after training."""
    for x, colour, label in ((before, BEFORE, "before"), (after, AFTER, "after")):
        axis.hist(x.ravel(), np.linspace(0, 1, 51), color=colour, label=label, density=True)
    axis.set(title=title, xlabel="share", ylabel="density", yticks=())
    axis.legend()


def draw(run, name, directory):
    """One figure of a run: what its weights were and became, and how it learned."""
    if run.config["model"] == "transformer":
        return draw_groups(group_runs([run]), name, directory)
    if run.config["model"] == "attention":
        figure, curves = draw_attention(run)
    else:
        figure, curves = draw_mlp(run)
    draw_curve(curves, [run], "train_accuracy", "train accuracy", BEFORE)
    draw_curve(curves, [run], "test_accuracy", "test accuracy", AFTER)
    draw_curve(curves, [run], "margin_ratio", "margin / gamma*", "black")
    curves.set(xlabel="step", ylabel="share", ylim=(0, 1.03))
    curves.legend(handles=curves.lines)
    save_figure(figure, directory, name)


def draw_mlp(run):
    """The paper's Figures 1 and 2: a neuron and its spectra, frequencies, power; before, after.
    -> the figure, and an axis in it for the curves of training"""
    measures, k, p = fc.neuron_spectra(run.params), run.config["k"], run.config["p"]
    live = np.flatnonzero(measures["live"])
    if len(live) == 0:
        live = np.arange(run.config["m"])  # a network of zeros
    one = typical(measures, live)
    figure, zeta = new_figure(10, 1.1 * (k + 1) + 0.6), np.arange(p // 2 + 1)
    left, right = figure.subfigures(1, 2, width_ratios=(2, 1))
    axes = left.subplots(k + 1, 2, sharex="col")
    first = fc.new_run(run.config).params
    t = np.arange(20 * p) / 20  # between the numbers 0 .. p-1, too
    for j, (before, after, (weights, spectrum)) in enumerate(zip(
            fc.neurons(first)[:, one], fc.neurons(run.params)[:, one], axes)):
        for x, colour, shift in ((before, BEFORE, -0.2), (after, AFTER, 0.2)):
            power = fc.power_spectrum(x)
            weights.plot(x / abs(x).max(), "o", ms=3, color=colour)
            spectrum.bar(zeta + shift, power / power.sum(), 0.4, color=colour)
        wave = cosine_at(after / abs(after).max(), measures["frequency"][one], t)
        weights.plot(t, wave, lw=0.7, color=AFTER)
        weights.set(ylabel=f"$u_{j + 1}$" if j < k else "$w$", yticks=(-1, 0, 1))
        spectrum.set(ylim=(0, 1), yticks=(0, 1))
    axes[-1, 0].set_xlabel("number a, or class")
    axes[-1, 1].set_xlabel("frequency")
    axes[0, 0].set_title(f"neuron {one}: each vector over its largest entry")
    axes[0, 1].set_title("its share of power by frequency")
    counts, shares, curves = right.subplots(3, 1)
    counts.bar(zeta[1:], histogram(measures["frequency"][measures["single"]], p), color=AFTER)
    counts.set(title="live single-frequency neurons", xlabel="frequency")
    draw_shares(shares, fc.neuron_spectra(first)["shares"], measures["shares"][:, live],
                "maximum normalized power of all $u_1 .. u_k, w$")
    return figure, curves


def typical(measures, live):
    """One of these neurons, with at least their median purity, whose frequency is nearest to 2: a
    wave that the eye can see."""
    purity = measures["concentration"][live]
    pure = live[purity >= np.median(purity)]
    return pure[np.argmin(np.abs(measures["frequency"][pure] - 2))]


def cosine_at(x, zeta, t):  # [p], a frequency, [..] -> [..]
    """The part of x with the frequency zeta, as a function of any real numbers t."""
    p = len(x)
    coefficient = np.fft.rfft(x)[zeta] * (1 if 2 * zeta == p else 2) / p
    return (coefficient * np.exp(2j * np.pi * zeta * t / p)).real


def draw_attention(run, count=4):
    """The paper's Figures 3, 9 and 10: attention matrices S_h and their 2-D spectra, and what the
    heads write: OV_h. -> as of draw_mlp"""
    measures, (s, ov) = fc.head_spectra(run.params), fc.centred_tables(run.params)
    spectrum = np.fft.fftshift(fc.head_spectrum(s), axes=1)  # query frequency 0 in the middle
    chosen = strongest(measures["size"], measures["live"], measures["frequency"], count)
    p = s.shape[1]
    figure = new_figure(12, 7)
    left, right = figure.subfigures(1, 2, width_ratios=(3, 1))
    axes = left.subplots(3, len(chosen), squeeze=False)
    for h, (above, middle, below) in zip(chosen, axes.T):
        zeta = measures["frequency"][h]
        for axis, x, title in ((above, s[h], f"S of head {h}: frequency {zeta}"),
                               (below, ov[h], f"OV of head {h}")):
            largest = abs(x).max()
            axis.imshow(x, cmap="RdBu", vmin=-largest, vmax=largest)  # white is 0
            axis.set_title(title)
        middle.imshow(spectrum[h], cmap="Blues", aspect="auto",  # frequencies are pixels' centres
                      extent=(-0.5, p // 2 + 0.5, p - p // 2 - 0.5, -(p // 2) - 0.5))
        middle.set_title("power of S")
        for axis in (above, middle, below):
            axis.yaxis.get_major_locator().set_params(integer=True)
    axes[0, 0].set(xlabel="key", ylabel="query")
    axes[1, 0].set(xlabel="key frequency", ylabel="query frequency")
    axes[2, 0].set(xlabel="class", ylabel="token")
    shares, curves = right.subplots(2, 1)
    draw_shares(shares, fc.head_spectra(fc.new_run(run.config).params)["key_share"],
                measures["key_share"][measures["live"]], "keys' power at a head's frequency")
    return figure, curves


def draw_groups(groups, name, directory):
    """Figure 4: accuracies and the circuit's share of the logits' power over steps, mean and range
    over the seeds of each group. A column for each k and p, a row for what else differs."""
    columns = sorted({(k, p) for k, p, _ in groups})
    rows = sorted({apart for *_, apart in groups}, reverse=True)  # random above orbits
    figure = new_figure(max(5, 1.6 * len(columns) + 0.8), 1.9 * len(rows) + 0.8)
    axes = figure.subplots(len(rows), len(columns), sharex=True, sharey=True, squeeze=False)
    for (k, p, apart), runs in groups.items():
        axis = axes[rows.index(apart), columns.index((k, p))]
        draw_curve(axis, runs, "train_accuracy", "train accuracy", BEFORE)
        draw_curve(axis, runs, "test_accuracy", "test accuracy", AFTER)
        draw_curve(axis, runs, "circuit_share", "circuit share", "black")
        handles = axis.lines
    for (k, p), above, below in zip(columns, axes[0], axes[-1]):
        above.set(title=f"k = {k}, p = {p}", ylim=(-0.02, 1.02))
        below.set_xlabel("step")
    for apart, axis in zip(rows, axes[:, 0]):
        axis.set_ylabel(f"{apart}\nshare".lstrip())
    figure.legend(handles=handles, loc="outside upper center", ncols=3)
    save_figure(figure, directory, name)


def draw_runs(runs, directory):
    """A figure of each run {path: run}, named after its file; of several transformers a single
    one."""
    if all_transformers(runs):
        return draw_groups(group_runs(runs.values()), "grokking", directory)
    names = [os.path.splitext(os.path.basename(path))[0] for path in runs]
    if len(set(names)) < len(names):
        raise fc.BadInput("files of the same name would have the same figure; draw them apart")
    for name, run in zip(names, runs.values()):
        draw(run, name, directory)


# ---- How scripts end, train.py as well -----------------------------------------------------------


class Parser(argparse.ArgumentParser):
    """argparse that says what is wrong in one line."""

    def error(self, message):
        self.exit(2, printable(f"{self.prog}: {message}; see --help") + "\n")


def printable(text):
    """Text in which a control character is written out, so that no terminal obeys it."""
    return "".join(x if x.isprintable() or x == "\n" else repr(x)[1:-1] for x in text)


def stop(number, _):
    """Answer a signal: end as after an error, so that a run is saved. The same one again ends at
    once."""
    signal.signal(number, signal.SIG_DFL)
    sys.exit(128 + number)


def run_main(main):
    """Run a script's main. What the user can mend is one line on stderr and exit code 2; after a
    signal the code is 128 + its number. Output that nobody reads counts as the signal SIGPIPE, 13,
    which Python itself ignores."""
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        number = getattr(signal, name, None)  # Windows has no SIGHUP
        if number and signal.getsignal(number) is not signal.SIG_IGN:  # nohup ignores SIGHUP
            signal.signal(number, stop)
    if sys.stdout is None:  # the shell closed it
        sys.stdout = open(os.devnull, "w")
    if hasattr(sys.stdout, "reconfigure"):  # that of a notebook has not
        sys.stdout.reconfigure(errors="replace")  # not all can show the bars of print_neurons
    warnings.simplefilter("ignore", RuntimeWarning)  # evaluate and save_run look for overflow
    try:
        main(sys.argv[1:])
        sys.stdout.flush()
    except BrokenPipeError:
        sys.exit(128 + 13)
    except (fc.BadInput, OSError, MemoryError) as error:
        problem = " ".join(str(error).split()) or "out of memory; take smaller sizes"
        print(printable(f"{os.path.basename(sys.argv[0])}: {problem}"), file=sys.stderr)
        sys.exit(2)


# ---- The command ---------------------------------------------------------------------------------


def main(argv):
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("runs", nargs="*", metavar="RUN.npz", help="run files of train.py")
    one = parser.add_mutually_exclusive_group().add_argument
    one("--json", action="store_true", help="print the reports as JSON, nothing else")
    one("--figures", metavar="DIR", help="draw PNG files into DIR instead of printing reports")
    one("--theory", action="store_true",
        help="check the max-margin networks of --k and --p on all p^k inputs")
    add("--k", type=int, default=3, help="of --theory, default 3")
    add("--p", type=int, default=23, help="of --theory, default 23")
    add("--device", choices=("cpu", "gpu"), default="cpu", help="default cpu")
    args = parser.parse_args(argv)
    if args.theory == bool(args.runs):
        parser.error("give either run files or --theory")
    fc.use_device(args.device)
    if args.theory:
        return print_theory(args.k, args.p)
    runs = {path: fc.load_run(path) for path in args.runs}
    if args.figures:
        draw_runs(runs, args.figures)
    elif args.json:
        print_json(runs)
    elif all_transformers(runs):
        print_groups(group_runs(runs.values()))
    else:
        for path, run in runs.items():
            if len(runs) > 1:
                print(printable(f"\n{path}"))
            print_report(report(run))
            if len(runs) == 1 and "u" in run.params:
                print_neurons(run)


if __name__ == "__main__":
    run_main(main)
