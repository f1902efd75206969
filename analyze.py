"""Look into trained runs, and check the theory's networks on all inputs.

    python analyze.py RUN.npz                       report, neurons and Lemma F.2, or heads
    python analyze.py RUN.npz --json                the report as JSON
    python analyze.py RUN.npz --figures DIR         only draw its figure (needs matplotlib)
    python analyze.py RUN RUN RUN ..                one line a run; --figures: margin against width
                                                    2 layers: one line a configuration; Figure 4
    python analyze.py --theory --k 3 --p 23         Theorem 4.1, number by number, 1 second
                                                    (k = 4, p = 23: half a minute)
"""

import argparse
import importlib
import json
import os
import sys

import numpy as np

import fourier_circuits as fc

class Parser(argparse.ArgumentParser):
    """argparse that says what is wrong in one line."""

    def error(self, message):
        self.exit(2, f"{self.prog}: {message}; see --help\n")

def run_main(main):
    """Run a script's main: what the user can mend is one line on stderr and exit code 2."""
    sys.stdout.reconfigure(errors="replace")  # the plots need more than a bare ASCII terminal has
    try:
        with np.errstate(over="ignore", invalid="ignore"):  # the scripts look for them themselves
            sys.exit(main(sys.argv[1:]))
    except fc.BadInput as error:
        problem = error
    except MemoryError:
        problem = "out of memory; take a smaller k, p, batch or network"
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:  # the reader of our output left, as `| head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    print(f"{os.path.basename(sys.argv[0])}: {problem}", file=sys.stderr)
    sys.exit(2)


# ------------------------------------------------------------------------------------------------
# The report: what a trained network is and does

def report(run):
    """All that is printed of a run, as a dict ready for JSON.

    Measured on all of D_p, but for the two ablated networks on at most 2^17 random inputs and for
    grokking, which reads the history.
    """
    config = run.config
    k, p = config["k"], config["p"]
    whole = fc.evaluate(fc.network_pieces(config, run.params))
    measures = fc.model_of(config)[2](run.params)
    sample = fc.sample_inputs(np.arange(p**k), k, p, np.random.default_rng(0))
    about = (report_neurons if config["model"] == "mlp" else report_heads if config["layers"] == 1
             else report_embedding)
    sizes = ("model", "k", "p", "m", "activation", "layers", "heads", "d_head", "d_model", "d_ff",
             "train_fraction", "seed")
    return {**{name: config[name] for name in sizes if name in config},
            "steps": run.step, "seconds": round(run.seconds, 2),
            "train_accuracy": mean(whole["right"], run.train),
            "test_accuracy": mean(whole["right"], ~run.train), "frequencies_total": p // 2,
            **measures["summary"], **about(run, whole, measures, sample)}

def mean(x, part):
    return float(x[part].mean()) if part.any() else None

def histogram(frequencies, p):  # how often each of 1 .. p // 2 is there
    return np.bincount(frequencies, minlength=p // 2 + 1)[1:].tolist()

def report_neurons(run, whole, measures, sample):
    """report's part on the MLP; margins are normalized."""
    params, activation, live = run.params, run.config["activation"], measures["live"]
    k, p, _ = params["u"].shape
    nu = fc.degree(k, activation)
    size = fc.norm(params, nu) ** nu or 1
    kept, rest = (fc.evaluate(fc.mlp_pieces(part, sample, activation))["accuracy"]
                  for part in fc.ablate(params))
    theory = dict.fromkeys(("max_margin", "margin_ratio", "margin_bound_ratio", "efficiency"))
    if activation == "power":
        gamma = fc.max_margin(k, p)
        theory = {"max_margin": gamma, "margin_ratio": whole["margin"] / size / gamma,
                  "margin_bound_ratio": fc.margin_bound(params) / size / gamma,
                  "efficiency": float(fc.to_host(fc.efficiency(params))[live].mean())}
    return {
        "live_neurons": int(live.sum()),
        "max_normalized_power_at_init": float(run.power_at_init.mean()),
        "max_normalized_power_expected": fc.expected_max_power(p),
        "phase_error": float(measures["phase_error"][live].mean()),
        "frequency_histogram": histogram(measures["frequency"][live], p),
        "margin": whole["margin"] / size, **theory,
        "restricted_accuracy": kept, "excluded_accuracy": rest}

def report_heads(run, whole, measures, sample):
    """report's part on attention. Shares are medians over live heads, at init over all.

    fresh_accuracy is on held-out orbits, distinct_accuracy and collision_accuracy on those of them
    where a_1 .. a_{k-1} are all different or not.
    """
    k, p, live, shares = run.config["k"], run.config["p"], measures["live"], measures["shares"]
    right, test, equal = whole["right"], ~run.train, fc.collisions(k, p)
    pieces = [sample[rows] for rows in fc.slices(len(sample), 1, 1024)]
    kept, rest = (fc.evaluate((a, logits(a)) for a in pieces)["accuracy"]
                  for logits in fc.ablate_heads(run.params))
    after, before = (np.median(x, axis=0).tolist() for x in (shares[live], run.power_at_init))
    return {
        "fresh_accuracy": mean(right, test), "distinct_accuracy": mean(right, test & ~equal),
        "collision_accuracy": mean(right, test & equal),
        "top_shares": after, "top_shares_at_init": before, "top_two_share_at_init": before[1],
        "top_two_share_deciles": np.quantile(shares[live, 1], (0.1, 0.5, 0.9)).tolist(),
        "rank": float(np.median(measures["rank"][live])),
        "frequency_histogram": histogram(measures["top"][live, 0, 1], p),
        "restricted_accuracy": kept, "excluded_accuracy": rest,
        "each_head": [{"live": bool(on), "top": top.tolist(), "shares": share.tolist(),
                       "shares_at_init": first.tolist(), "rank": int(rank)}
                      for on, top, share, first, rank in zip(
                          live, measures["top"], shares, run.power_at_init, measures["rank"])]}

def report_embedding(run, whole, measures, sample):
    """report's part on a transformer of several layers: its grokking, its embedding's spectrum."""
    tenth = -(-len(measures["shares"]) // 10)
    return {**grokking(run.history), "tenth": tenth,
            "embedding_share_at_init": float(np.sort(run.power_at_init)[-tenth:].sum()),
            "embedding_spectrum": measures["shares"].tolist()}

def grokking(history, level=0.99):
    """Of the lines of a history: when accuracy on each part first reached level (None: never), the
    largest train-test gap, and the gap's area in steps (Figure 4).
    """
    gap = [max(0, line["train_accuracy"] - line["test_accuracy"]) for line in history
           if line["test_accuracy"] is not None]
    reached = lambda part: next((line["step"] for line in history
                                 if (line[f"{part}_accuracy"] or 0) >= level), None)
    width = np.diff([0] + [line["step"] for line in history])
    return {"steps_to_train": reached("train"), "steps_to_test": reached("test"),
            "largest_gap": max(gap, default=None),
            "gap_area": float(np.dot(gap, width)) if gap else None}


# ------------------------------------------------------------------------------------------------
# Text

NEURONS = """
{k} numbers modulo {p}, {m} neurons, {activation} activation, seed {seed}
  accuracy             train {train_accuracy:.2%}, test {test_accuracy:.2%}
  live neurons         {live_neurons} of {m}
  single-frequency     {single_frequency_fraction:.2%} of them (> 95% of their power)
  max normalized power {max_normalized_power:.4f}, at init {max_normalized_power_at_init:.4f}, \
expected at random {max_normalized_power_expected:.4f}
  phase error          {phase_error:.4f} mean |theta_1 + .. + theta_k - theta_w|
  normalized margin    {margin:.6g}, {margin_ratio:.4f} of gamma*; by the weights at most \
{margin_bound_ratio:.4f}
  efficiency           {efficiency:.4f} a neuron, its class-weighted margin over gamma*
  restricted accuracy  {restricted_accuracy:.2%} keeping only each neuron's own frequency
  excluded accuracy    {excluded_accuracy:.2%} keeping only the rest; chance {chance:.2%}
  frequencies          {frequencies_used} of {frequencies_total} used; live neurons of each:"""
ATTENTION = """
{k} numbers modulo {p}, {heads} heads of {d_head}, d_model {d_model}, seed {seed}
  accuracy             train {train_accuracy:.2%}, held-out orbits {fresh_accuracy:.2%}
  of the held-out      keys distinct {distinct_accuracy:.2%}, collisions {collision_accuracy:.2%}
  live heads           {live_heads} of {heads}
  share of a head's 2-D spectrum, median over live heads:
    top 1, 2, 3 pairs  {top_shares}; at init {top_shares_at_init}
    top two, deciles   {top_two_share_deciles} (10, 50, 90%)
  rank of S_h          {rank:.0f} median (singular values above 1% of the largest)
  restricted accuracy  {restricted_accuracy:.2%} keeping only each head's top two pairs
  excluded accuracy    {excluded_accuracy:.2%} keeping only the rest; chance {chance:.2%}
  key frequencies      {frequencies_used} of {frequencies_total} used; live heads of each:"""
LAYERS = """
{k} numbers modulo {p}, {layers} layers of {heads} heads of {d_head}, d_model {d_model}, \
d_ff {d_ff}, seed {seed}
  accuracy             train {train_accuracy:.2%}, test {test_accuracy:.2%}
  99% of train         at step {steps_to_train} (-: not reached)
  99% of test          at step {steps_to_test}
  train - test gap     largest {largest_gap:.3f}, area {gap_area:.0f} steps
  embedding's power    {embedding_share:.3f} in the top {tenth} of {frequencies_total} \
frequencies; at init {embedding_share_at_init:.3f}
  its spectrum from 1  {bars}|"""

class Missing:
    """A number that there is not, in any format."""

    def __format__(self, form):
        return "-"

def shown(x):
    """A number or a list of numbers, for a text's {..}."""
    if isinstance(x, list):
        return ", ".join(f"{y:.3f}" for y in x if isinstance(y, float))
    return Missing() if x is None else x

def bars(x, low=None, high=None):
    """Numbers as a row of blocks. bars([0, 1, 2]) -> ' ▄█'."""
    low, high = np.min(x) if low is None else low, np.max(x) if high is None else high
    level = np.round(8 * (np.asarray(x) - low) / ((high - low) or 1)).astype(int)
    return "".join(" ▁▂▃▄▅▆▇█"[i] for i in level)

def print_report(r):
    """Print what report(run) measured."""
    text = NEURONS if r["model"] == "mlp" else ATTENTION if r["layers"] == 1 else LAYERS
    print(text.format(**{name: shown(x) for name, x in r.items()}, chance=1 / r["p"],
                      bars=bars(r.get("embedding_spectrum", [0]), low=0)))
    counts = r.get("frequency_histogram", [])
    for zeta, count in enumerate(counts, 1):
        print(f"  {zeta:5d} {count:6d} {'#' * -(-50 * count // max(max(counts), 1))}")
    print(f"  {r['steps']} steps, {r['seconds']:.1f} seconds")

def group_runs(runs):
    """Runs of one configuration but for the seed, together. -> [[run, ..], ..], by k and p.

    Raises BadInput where one run is given twice.
    """
    groups = {}
    for run in sorted(runs, key=lambda run: [run.config[x] for x in ("k", "p", "seed")]):
        group = groups.setdefault(json.dumps({**run.config, "seed": None}, sort_keys=True), [])
        if group and group[-1].config == run.config:
            raise fc.BadInput("two files hold the same run, {model} k = {k} p = {p} seed {seed}; "
                              "give one of them".format(**run.config))
        group.append(run)
    return list(groups.values())

def differences(groups):
    """The settings other than k and p that tell the groups apart, a text for each group."""
    configs = [runs[0].config for runs in groups]
    names = [x for x in configs[0] if x not in ("k", "p", "seed")
             and any(c[x] != configs[0][x] for c in configs)]
    return [", ".join(f"{x.replace('_', '-')} {c[x]}" for x in names) for c in configs]

def spread(values, form, none="-"):
    """Mean (smallest..largest) of the values that are known."""
    known = [x for x in values if x is not None]
    if not known:
        return none
    some = f", {len(known)} of {len(values)}" if len(known) < len(values) else ""
    return f"{np.mean(known):{form}} ({min(known):{form}}..{max(known):{form}}{some})"

def print_groups(groups):
    """Grokking, mean and range over the seeds of each group."""
    print(f"  k   p seeds  steps  {'99% train at':22s} {'99% test at':22s} "
          f"{'largest gap':18s} {'gap area, steps':20s} last test accuracy")
    for runs, apart in zip(groups, differences(groups)):
        c = runs[0].config
        each = [{**grokking(run.history), "last": run.history[-1]["test_accuracy"]
                 if run.history else None} for run in runs]
        cells = [spread([e[x] for e in each], *form) for x, *form in (
            ("steps_to_train", ".0f", "never"), ("steps_to_test", ".0f", "never"),
            ("largest_gap", ".2f"), ("gap_area", ".0f"), ("last", ".3f"))]
        print(f"{c['k']:3d} {c['p']:3d} {len(runs):5d} {min(run.step for run in runs):6d}  "
              "{:22s} {:22s} {:18s} {:20s} {:21s} {}".format(*cells, apart).rstrip())

MEASURES = {  # of a run's state, in a line of progress and in a table of runs
    "max_normalized_power": "power {:5.3f}", "single_frequency_fraction": "single {:5.3f}",
    "phase_error": "phase {:.4f}", "top_two_share": "top two {:5.3f}", "live_heads": "live {:3d}",
    "embedding_share": "embedding {:5.3f}", "frequencies_used": "freqs {:3d}",
    "margin_ratio": "margin/gamma* {:6.4f}"}

def print_table(reports):
    """One line a run."""
    print("  k   p     m  seed   steps    train     test  (m: neurons or heads)")
    for r in reports:
        start = "{k:3d} {p:3d} {:5d} {seed:5d} {steps:7d}  {train_accuracy:7.2%} {:>8s}"
        ends = [text.format(shown(r[name])) for name, text in MEASURES.items() if name in r]
        print(start.format(r.get("m", r.get("heads")), f"{shown(r['test_accuracy']):.2%}", **r),
              *ends, sep="  ")

def print_neurons(run, count=3):
    """Some live neurons of different frequencies: weights over 0..p-1 beside their spectra."""
    measures = fc.neuron_spectra(run.params)
    order = np.argsort(-fc.to_host(fc.neuron_norms(run.params)))[:measures["live"].sum()]
    _, first = np.unique(measures["frequency"][order], return_index=True)
    vectors = fc.to_host(fc.neurons(run.params))
    spectra = fc.power_spectrum(vectors, axis=1)
    for i in order[np.sort(first)[:count]]:
        print(f"\nneuron {i}: frequency {measures['frequency'][i]}, "
              f"{measures['concentration'][i]:.2%} of its power, phase error "
              f"{measures['phase_error'][i]:.4f}; weights | spectrum from 0")
        for j, name in enumerate([*(f"u_{j}" for j in range(1, len(vectors))), "w"]):
            print(f"  {name:4s} {bars(vectors[j, :, i])} | {bars(spectra[j, :, i], low=0)}")

def print_heads(run, lines=20, count=2):
    """The strongest live heads, a line each; some as S_h, a row a query, beside its spectrum."""
    measures, centred, spectrum, order, chosen = pictures(run, count)
    print("\n head  size   top three pairs (query, key frequency) and their shares         rank")
    for h in order[:lines]:
        alone = np.diff(measures["shares"][h], prepend=0)
        tops = " ".join(f"({u:3d},{v:3d}) {x:.3f} " for (u, v), x in zip(measures["top"][h], alone))
        print(f" {h:4d} {measures['size'][h]:5.3f}   {tops}        {measures['rank'][h]:3d}")
    if len(order) > lines:
        print(f"  .. and {len(order) - lines} more live heads, all in --json")
    for h in chosen:
        print(f"\nhead {h}: S_h (rows: query 0 .. p-1, columns: key) | its spectrum (rows: query "
              f"frequency from {-(len(spectrum[h]) // 2)}, columns: key frequency from 0)")
        low, high = centred[h].min(), centred[h].max()
        for row, power in zip(centred[h], spectrum[h]):
            print(f"  {bars(row, low, high)} | {bars(power, 0, spectrum[h].max())} |")

def pictures(run, count):
    """-> head_spectra; S_h without row means and its spectrum, query frequency 0 in the middle; the
    live heads, largest first; the first count of them that differ in key frequency.
    """
    measures, (centred, _) = fc.head_spectra(run.params), fc.head_tables(run.params)
    spectrum = fc.head_spectrum(centred)
    order = np.argsort(-measures["size"])[:measures["live"].sum()]
    _, first = np.unique(measures["top"][order, 0, 1], return_index=True)
    return (measures, centred, np.fft.fftshift(spectrum, axes=1), order,
            order[np.sort(first)[:count]])

def print_lemma(run):
    """Lemma F.2: S_j = f^(j,..,j,-j) is positive for every j of a max-margin network."""
    k, p, _ = run.params["u"].shape
    diagonal = fc.to_host(fc.diagonal_dft(run.params))[1:p // 2 + 1].real
    print(f"\nLemma F.2: f^(j,..,j,-j) > 0 at {(diagonal > 0).sum()} of {len(diagonal)} "
          f"frequencies; smallest over mean {diagonal.min() / diagonal.mean():.3f}")
    try:
        f = np.abs(fc.to_host(fc.network_dft(run.params))) ** 2
    except fc.BadInput:
        print("  the whole DFT of f is too large here")
        return
    j = np.arange(1, p)
    inside, constant = f[(j,) * k + (p - j,)].sum(), f[..., 0].sum()
    print(f"  share of f's power on (j,..,j,-j): {inside / (f.sum() - constant):.4f} "
          f"(what all classes share left out)")


# ------------------------------------------------------------------------------------------------
# Figures: one style, two colours

BEFORE, AFTER = "#b8a88a", "#1f5f99"
STYLE = {"axes.spines.top": False, "axes.spines.right": False, "font.size": 9,
         "axes.titlesize": 9, "xtick.labelsize": 7, "ytick.labelsize": 7,
         "legend.frameon": False, "figure.constrained_layout.use": True}

def pyplot():
    """matplotlib.pyplot. Raises BadInput where matplotlib is missing."""
    try:
        import matplotlib
        matplotlib.use("Agg")
        matplotlib.rcParams.update(STYLE)
        return importlib.import_module("matplotlib.pyplot")
    except ImportError:
        raise fc.BadInput("figures need matplotlib: pip install matplotlib") from None

def save_figure(figure, directory, name):
    """Write a PNG whole or not at all, and say so on stderr."""
    path = os.path.join(directory, name)
    try:
        os.makedirs(directory, exist_ok=True)
        figure.savefig(path + ".part", format="png", dpi=150)
        os.replace(path + ".part", path)
    except OSError as error:
        raise fc.BadInput(f"cannot write {path}: {error.strerror}") from None
    print(path, file=sys.stderr)

def draw(run, name, directory):
    """One figure of a run: what its weights were and became, and how it learned."""
    layers = run.config.get("layers", 1)
    if layers > 1:
        return draw_groups([[run]], directory, name)
    draw_model = draw_mlp if run.config["model"] == "mlp" else draw_attention
    figure, last = draw_model(run)
    for key, colour in (("train_accuracy", BEFORE), ("test_accuracy", AFTER),
                        ("margin_ratio", "black")):
        lines = [line for line in run.history if line.get(key) is not None]
        if lines:
            last.plot([line["step"] for line in lines], [line[key] for line in lines],
                      color=colour, label=key.replace("_", " ").replace("margin ratio",
                                                                      "margin / gamma*"))
    last.set(xlabel="step", ylim=(0, 1.03))
    if last.lines:
        last.legend()
    save_figure(figure, directory, f"{name}.png")

def draw_mlp(run):
    """The paper's Figures 1 and 2: a neuron and its spectra, frequencies, power; before, after."""
    measures, k, p = fc.neuron_spectra(run.params), run.config["k"], run.config["p"]
    live, purity = np.flatnonzero(measures["live"]), measures["concentration"]
    pure = live[purity[live] >= np.median(purity[live])]
    one = pure[np.argmin(np.abs(measures["frequency"][pure] - 2))]  # a wave that the eye can see
    figure = pyplot().figure(figsize=(10, 1.1 * (k + 1) + 0.6))
    left, right = figure.subfigures(1, 2, width_ratios=(2, 1))
    axes = left.subplots(k + 1, 2, sharex="col")
    first = fc.new_run(run.config).params  # of the same seed
    for params, colour, shift in ((first, BEFORE, -0.2), (run.params, AFTER, 0.2)):
        vectors = fc.to_host(fc.neurons(params)[:, :, one])
        vectors = vectors / abs(vectors).max(axis=1)[:, None]
        for x, (weights, power) in zip(vectors, axes):
            weights.plot(x, "o", ms=3, color=colour)
            spectrum = fc.power_spectrum(x)
            power.bar(np.arange(p // 2 + 1) + shift, spectrum / spectrum.sum(), 0.4, color=colour)
    for j, (x, (weights, power)) in enumerate(zip(vectors, axes)):
        wave = np.fft.rfft(x) * (np.arange(p // 2 + 1) == measures["frequency"][one])
        fine = np.fft.irfft(wave, 20 * p) * 20
        weights.plot(np.arange(20 * p) / 20, fine, lw=0.7, color=AFTER)
        weights.set(ylabel=f"$u_{j + 1}$" if j < k else "$w$", yticks=(-1, 0, 1))
        power.set(ylim=(0, 1), yticks=(0, 1))
    axes[0, 0].set_title(f"neuron {one}: each vector over its largest entry")
    axes[0, 1].set_title("its share of power by frequency")
    counts, power, last = right.subplots(3, 1)
    counts.bar(np.arange(1, p // 2 + 1), histogram(measures["frequency"][live], p), color=AFTER)
    counts.set_title("live neurons by frequency")
    histograms(power, run.power_at_init, measures["shares"][:, live],
               "maximum normalized power of all $u_1 .. u_k, w$")
    return figure, last

def histograms(axis, before, after, title):
    for x, colour, label in ((before, BEFORE, "before"), (after, AFTER, "after")):
        axis.hist(x.ravel(), np.linspace(0, 1, 51), color=colour, label=label, density=True)
    axis.set(title=title, yticks=())
    axis.legend()

def draw_attention(run, count=4):
    """The paper's Figures 3, 9 and 10: attention matrices S_h above their 2-D spectra."""
    measures, centred, spectrum, _, chosen = pictures(run, count)
    p = centred.shape[1]
    figure = pyplot().figure(figsize=(12, 5))
    left, right = figure.subfigures(1, 2, width_ratios=(3, 1))
    axes = left.subplots(2, len(chosen), squeeze=False)
    for h, (above, below) in zip(chosen, axes.T):
        above.imshow(centred[h], cmap="RdBu")
        above.set_title(f"head {h}: top two {measures['shares'][h, 1]:.2f}")
        below.imshow(spectrum[h], cmap="Blues", aspect="auto",
                     extent=(-0.5, p // 2 + 0.5, p - p // 2 - 0.5, -(p // 2) - 0.5))
    axes[0, 0].set(xlabel="key", ylabel="query: $S_h$")
    axes[1, 0].set(xlabel="key frequency", ylabel="query frequency: power")
    shares, last = right.subplots(2, 1)
    histograms(shares, run.power_at_init[:, 1], measures["shares"][measures["live"], 1],
               "power in a head's top two pairs")
    return figure, last

def draw_groups(groups, directory, name="grokking"):
    """Figure 4: accuracies over steps, a panel a group, mean and range over its seeds."""
    if not all(run.history for runs in groups for run in runs):
        raise fc.BadInput("a run was stopped before its first line of progress: nothing to draw")
    figure, axes = pyplot().subplots(2, len(groups), figsize=(2.6 * len(groups) + 0.6, 4),
                                     sharex="col", sharey=True, squeeze=False)
    for runs, apart, (above, below) in zip(groups, differences(groups), axes.T):
        lines = list(zip(*(run.history for run in runs)))  # up to the shortest run
        steps = [line[0]["step"] for line in lines]
        for axis, key, colour in ((above, "train_accuracy", BEFORE),
                                  (above, "test_accuracy", AFTER),
                                  (below, "embedding_share", AFTER)):
            y = np.array([[one.get(key) for one in line] for line in lines], float)
            axis.plot(steps, y.mean(axis=1), color=colour, label=key.split("_")[0])
            axis.fill_between(steps, y.min(axis=1), y.max(axis=1), alpha=0.3, lw=0, color=colour)
        c = runs[0].config
        above.set(title=f"k = {c['k']}, p = {c['p']}\n{apart}".rstrip(), ylim=(-0.02, 1.02))
        below.set_xlabel("step")
    axes[0, 0].set_ylabel("accuracy")
    axes[1, 0].set_ylabel("embedding's power in\nthe top tenth of frequencies")
    axes[0, 0].legend()
    save_figure(figure, directory, f"{name}.png")

def draw_widths(reports, directory):
    """margin / gamma* against the width, a dot a run and a line through the means."""
    reports = [r for r in reports if r.get("margin_ratio") is not None]
    if not reports:
        raise fc.BadInput("no run has a margin / gamma* to draw: it is for the MLP's z^k")
    figure, axis = pyplot().subplots(figsize=(6, 4))
    for (k, p), colour in zip(sorted({(r["k"], r["p"]) for r in reports}), (AFTER, BEFORE) * 9):
        dots = [(r["m"], r["margin_ratio"]) for r in reports if (r["k"], r["p"]) == (k, p)]
        widths = sorted({m for m, _ in dots})
        means = [np.mean([ratio for m, ratio in dots if m == width]) for width in widths]
        axis.plot(widths, means, color=colour, label=f"k = {k}, p = {p}")
        axis.plot(*zip(*dots), "o", ms=4, color=colour)
        axis.axvline(2 ** (2*k - 2) * (p - 1), color=colour, ls=":", lw=1)
    axis.set(xscale="log", xlabel="neurons (dotted: the theorem's width)", ylabel="margin / gamma*")
    axis.legend()
    save_figure(figure, directory, "widths.png")


# ------------------------------------------------------------------------------------------------
# Theory

def print_theory(k, p):
    """Both networks against Theorem 4.1 on all p^k inputs."""
    networks = {"the rotated": fc.rotated_network(k, p)}
    if p % 2:
        networks = {"the paper's": fc.paper_network(k, p), **networks}
    print(f"k = {k}, p = {p}: gamma* = {fc.max_margin(k, p):.6e}, {p**k} inputs, float64"
          f"{'' if p % 2 else '; the paper constructs a network for odd p only'}")
    for name, params in networks.items():
        print(f"\n{name} network, {params['w'].shape[0]} neurons\n"
              f"  {'':40s} {'measured':>22s} {'theorem':>22s}  relative error")
        for what, got, wanted, error in fc.theory_check(params):
            print(f"  {what:40s} {got:22.15e} {wanted:22.15e}  {error:.1e}")

def main(argv):
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("runs", nargs="*", metavar="RUN.npz", help="run files of train.py")
    add("--json", action="store_true", help="print the report as JSON, nothing else")
    add("--figures", metavar="DIR",
        help="draw PNG files into DIR; a single run's report is printed only with --json")
    add("--theory", action="store_true",
        help="check the max-margin networks of --k and --p on all p^k inputs")
    add("--k", type=int, help="of --theory, default 3")
    add("--p", type=int, help="of --theory, default 23")
    add("--device", choices=("auto", "cpu", "gpu"), default="auto", help="default auto")
    args = parser.parse_args(argv)
    if args.theory == bool(args.runs) or args.theory and (args.json or args.figures):
        parser.error("give either run files, with --json or --figures, or --theory alone")
    if args.runs and (args.k, args.p) != (None, None):
        parser.error("--k and --p are for --theory; a run has its own")
    fc.use_device(args.device)
    if args.theory:
        print_theory(3 if args.k is None else args.k, 23 if args.p is None else args.p)
        return 0
    if args.figures:
        pyplot()  # say so now if it is missing
    runs = [fc.load_run(path) for path in args.runs]
    if args.figures and len(runs) == 1:
        draw(runs[0], os.path.splitext(os.path.basename(args.runs[0]))[0], args.figures)
        if not args.json:
            return 0
    groups = group_runs(runs) if len(runs) > 1 and all(
        run.config.get("layers", 1) > 1 for run in runs) else []
    reports = [report(run) for run in runs] if args.json or not groups else []
    if args.json:
        print(json.dumps(reports if len(runs) > 1 else reports[0], indent=2))
    elif groups:
        print_groups(groups)
    elif len(runs) > 1:
        print_table(reports)
    else:
        print_report(reports[0])
        if runs[0].config.get("layers") == 1:
            print_heads(runs[0])
        elif runs[0].config["model"] == "mlp":
            print_neurons(runs[0])
            if runs[0].config["activation"] == "power":
                print_lemma(runs[0])
    if args.figures and groups:
        draw_groups(groups, args.figures)
    elif args.figures and len(runs) > 1:
        draw_widths(reports, args.figures)
    return 0

if __name__ == "__main__":
    run_main(main)
