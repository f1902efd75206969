"""Look into trained runs, and check the theory's networks on all inputs.

    python analyze.py RUN.npz                       report, neurons and Lemma F.2, or heads
    python analyze.py RUN.npz --json                the report as JSON
    python analyze.py RUN.npz --figures DIR         only draw its figures (needs matplotlib)
    python analyze.py RUN RUN RUN ..                one line a run; --figures: margin against width
                                                    2 layers: one line a configuration; Figure 4
    python analyze.py --theory --k 3 --p 23         Theorem 4.1, number by number, 1 second
                                                    (k = 4, p = 23: 40 seconds)
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
# Text


def percent(x):
    return "-" if x is None else f"{100 * x:.2f}%"


def bars(x, low=None, high=None):
    """Numbers as a row of blocks. bars([0, 1, 2]) -> ' ▄█'."""
    low, high = np.min(x) if low is None else low, np.max(x) if high is None else high
    level = np.round(8 * (np.asarray(x) - low) / ((high - low) or 1)).astype(int)
    return "".join(" ▁▂▃▄▅▆▇█"[i] for i in level)


def print_report(r):
    """Print what fc.report(run) measured."""
    (print_mlp_report if r["model"] == "mlp" else print_attention_report if r["layers"] == 1
     else print_deep_report)(r)
    counts = r.get("frequency_histogram", [])
    for zeta, count in enumerate(counts, 1):
        print(f"  {zeta:5d} {count:6d} {'#' * -(-50 * count // max(max(counts), 1))}")
    print(f"  {r['steps']} steps, {r['seconds']:.1f} seconds")


def print_mlp_report(r):
    ratio = "-" if r["margin_ratio"] is None else f"{r['margin_ratio']:.4f} of gamma*"
    print(f"""
{r['k']} numbers modulo {r['p']}, {r['m']} neurons, {r['activation']} activation, seed {r['seed']}
  accuracy             train {percent(r['train_accuracy'])}, test {percent(r['test_accuracy'])}
  live neurons         {r['live_neurons']} of {r['m']}
  single-frequency     {percent(r['single_frequency_fraction'])} of them (> 95% of their power)
  max normalized power {r['max_normalized_power']:.4f}, \
at init {r['max_normalized_power_at_init']:.4f}, \
expected at random {r['max_normalized_power_expected']:.4f}
  phase error          {r['phase_error']:.4f} mean |theta_1 + .. + theta_k - theta_w|
  normalized margin    {r['margin']:.6g}, {ratio}
  restricted accuracy  {percent(r['restricted_accuracy'])} keeping only each neuron's own frequency
  excluded accuracy    {percent(r['excluded_accuracy'])} keeping only the rest; \
chance {percent(1 / r['p'])}
  frequencies          {r['frequencies_used']} of {r['frequencies_total']} used; \
live neurons of each:""")


def print_attention_report(r):
    shares = lambda name: ", ".join(f"{x:.3f}" for x in r[name])
    print(f"""
{r['k']} numbers modulo {r['p']}, {r['heads']} heads of {r['d_head']}, d_model {r['d_model']}, \
seed {r['seed']}
  accuracy             train {percent(r['train_accuracy'])}, \
held-out orbits {percent(r['fresh_accuracy'])}
  of the held-out      keys distinct {percent(r['distinct_accuracy'])}, \
collisions {percent(r['collision_accuracy'])}
  live heads           {r['live_heads']} of {r['heads']}
  share of a head's 2-D spectrum, median over live heads:
    top 1, 2, 3 pairs  {shares('top_shares')}; at init {shares('top_shares_at_init')}
    top two, deciles   {shares('top_two_share_deciles')} (10, 50, 90%)
  rank of S_h          {r['rank']:.0f} median (singular values above 1% of the largest)
  restricted accuracy  {percent(r['restricted_accuracy'])} keeping only each head's top two pairs
  excluded accuracy    {percent(r['excluded_accuracy'])} keeping only the rest; \
chance {percent(1 / r['p'])}
  key frequencies      {r['frequencies_used']} of {r['frequencies_total']} used; \
live heads of each:""")


def print_deep_report(r):
    shown = lambda step: "not reached" if step is None else f"step {step}"
    tenth = -(-r["frequencies_total"] // 10)
    gap = "-" if r["gap_area"] is None else (f"largest {r['largest_gap']:.3f}, "
                                             f"area {r['gap_area']:.0f} steps")
    print(f"""
{r['k']} numbers modulo {r['p']}, {r['layers']} layers of {r['heads']} heads of {r['d_head']}, \
d_model {r['d_model']}, d_ff {r['d_ff']}, seed {r['seed']}
  accuracy             train {percent(r['train_accuracy'])}, test {percent(r['test_accuracy'])}
  99% of train         {shown(r['steps_to_train'])}
  99% of test          {shown(r['steps_to_test'])}
  train - test gap     {gap}
  embedding's power    {r['embedding_share']:.3f} in the top {tenth} of {r['frequencies_total']} \
frequencies; at init {r['embedding_share_at_init']:.3f}
  its spectrum from 1  {bars(r['embedding_spectrum'], low=0)}|""")


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


def print_groups(groups):
    """Mean (smallest .. largest) of the seeds of each group."""
    def spread(values, form, none="-"):
        known = [x for x in values if x is not None]
        if not known:
            return none
        some = f", {len(known)} of {len(values)}" if len(known) < len(values) else ""
        return f"{np.mean(known):{form}} ({min(known):{form}}..{max(known):{form}}{some})"

    print(f"  k   p seeds  steps  {'99% train at':22s} {'99% test at':22s} "
          f"{'largest gap':18s} {'gap area, steps':20s} last test accuracy")
    for runs, apart in zip(groups, differences(groups)):
        c = runs[0].config
        each = [{**fc.grokking(run.history), "last": run.history[-1]["test_accuracy"]
                 if run.history else None} for run in runs]
        cells = [spread([e[x] for e in each], *form) for x, *form in (
            ("steps_to_train", ".0f", "never"), ("steps_to_test", ".0f", "never"),
            ("largest_gap", ".2f"), ("gap_area", ".0f"), ("last", ".3f"))]
        print(f"{c['k']:3d} {c['p']:3d} {len(runs):5d} {min(run.step for run in runs):6d}  "
              "{:22s} {:22s} {:18s} {:20s} {:21s} {}".format(*cells, apart).rstrip())


def print_table(reports):
    """One line a run."""
    print("  k   p     m  seed   steps  train    test     single   phase   freqs    margin/gamma*"
          "  (m: neurons or heads)")
    for r in reports:
        if "top_two_share" in r:
            end = f"top two {r['top_two_share']:.3f}, {r['live_heads']} live heads"
        elif "embedding_share" in r:
            end = f"{r['layers']} layers, embedding {r['embedding_share']:.3f}"
        else:
            ratio = "-" if r["margin_ratio"] is None else f"{r['margin_ratio']:.4f}"
            end = (f"{percent(r['single_frequency_fraction']):8s} {r['phase_error']:.4f}  "
                   f"{r['frequencies_used']:3d}/{r['frequencies_total']:<3d}  {ratio}")
        print(f"{r['k']:3d} {r['p']:3d} {r.get('m', r.get('heads')):5d} {r['seed']:5d} "
              f"{r['steps']:7d}  {percent(r['train_accuracy']):8s} "
              f"{percent(r['test_accuracy']):8s} {end}")


def print_neurons(run, count=3):
    """Some live neurons of different frequencies: weights over 0..p-1 beside their spectra."""
    s = fc.neuron_spectra(run.params)
    order = np.argsort(-fc.to_host(fc.neuron_norms(run.params)))[:s["live"].sum()]
    _, first = np.unique(s["frequency"][order], return_index=True)
    vectors = fc.neurons(run.params)
    spectra = fc.to_host(fc.power_spectrum(vectors, axis=1))
    vectors = fc.to_host(vectors)
    k = len(vectors) - 1
    for i in order[np.sort(first)[:count]]:
        print(f"\nneuron {i}: frequency {s['frequency'][i]}, {percent(s['concentration'][i])} of "
              f"its power, phase error {s['phase_error'][i]:.4f}; weights | spectrum from 0")
        for j, name in enumerate([*(f"u_{j + 1}" for j in range(k)), "w"]):
            print(f"  {name:4s} {bars(vectors[j, :, i])} | {bars(spectra[j, :, i], low=0)}")


def print_heads(run, lines=20, count=2):
    """The strongest live heads, a line each; some as S_h, a row a query, beside its spectrum."""
    s = fc.head_spectra(run.params)
    order, chosen = strongest_heads(s, count)
    print("\n head  size   top three pairs (query, key frequency) and their shares         rank")
    for h in order[:lines]:
        alone = np.diff(s["shares"][h], prepend=0)
        tops = " ".join(f"({u:3d},{v:3d}) {x:.3f} " for (u, v), x in zip(s["top"][h], alone))
        print(f" {h:4d} {s['size'][h]:5.3f}   {tops}        {s['rank'][h]:3d}")
    if len(order) > lines:
        print(f"  .. and {len(order) - lines} more live heads, all in --json")
    centered, power = head_pictures(run)
    for h in chosen:
        print(f"\nhead {h}: S_h (rows: query 0 .. p-1, columns: key) | its spectrum (rows: query "
              f"frequency from {-((len(power[h]) - 1) // 2)}, columns: key frequency from 0)")
        low, high = centered[h].min(), centered[h].max()
        for row, spectrum in zip(centered[h], power[h]):
            print(f"  {bars(row, low, high)} | {bars(spectrum, 0, power[h].max())} |")


def strongest_heads(s, count):
    """-> the live heads, largest first; the first count of them that differ in key frequency."""
    order = np.argsort(-s["size"])[:s["live"].sum()]
    _, first = np.unique(s["top"][order, 0, 1], return_index=True)
    return order, order[np.sort(first)[:count]]


def head_pictures(run):
    """S_h without row means [H, p, p]; power [H, p, p // 2 + 1], query frequency 0 in the middle.
    """
    centered, power, partner = fc.head_spectrum(fc.head_tables(run.params)[0])
    p = centered.shape[1]
    power = power[:, fc.xp.minimum(partner, fc.xp.arange(p * p))]  # the pair's, at both places
    return fc.to_host(centered), np.roll(fc.to_host(power).reshape(-1, p, p), (p - 1) // 2,
                                         axis=1)[:, :, :p // 2 + 1]


def print_lemma(run):
    """Lemma F.2: S_j = f^(j,..,j,-j) is positive for every j of a max-margin network."""
    k, p, _ = run.params["u"].shape
    s = fc.to_host(fc.diagonal_dft(run.params))[1:p // 2 + 1].real
    print(f"\nLemma F.2: f^(j,..,j,-j) > 0 at {(s > 0).sum()} of {len(s)} frequencies; "
          f"smallest over mean {s.min() / s.mean():.3f}")
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
# Figures


def pyplot():
    """matplotlib.pyplot. Raises BadInput where matplotlib is missing."""
    try:
        import matplotlib
        matplotlib.use("Agg")
        return importlib.import_module("matplotlib.pyplot")
    except ImportError:
        raise fc.BadInput("figures need matplotlib: pip install matplotlib") from None


def save_figure(figure, directory, name):
    """Write a PNG whole or not at all, and say so on stderr."""
    path = os.path.join(directory, name)
    try:
        os.makedirs(directory, exist_ok=True)
        figure.savefig(path + ".part", format="png", dpi=80, bbox_inches="tight")
        os.replace(path + ".part", path)
    except OSError as error:
        raise fc.BadInput(f"cannot write {path}: {error.strerror}") from None
    print(path, file=sys.stderr)


def draw_neurons(run, name, directory):
    """The paper's Figures 1 and 2 for this run."""
    plt = pyplot()
    s = fc.neuron_spectra(run.params)
    vectors = fc.to_host(fc.neurons(run.params))
    k, p = len(vectors) - 1, vectors.shape[1]
    names = [*(f"$u_{j + 1}$" for j in range(k)), "$w$"]
    live = np.flatnonzero(s["live"])

    one = live[np.argmax(s["concentration"][live])]
    figure, axes = plt.subplots(k + 1, 2, figsize=(10, 1.7 * (k + 1)), squeeze=False)
    fine = np.linspace(0, p, 20 * p)
    for x, label, (left, right) in zip(vectors[:, :, one], names, axes):
        zeta = s["frequency"][one]
        wave = np.fft.rfft(x)[zeta] / p * (1 if 2 * zeta == p else 2)
        left.plot(fine, (wave * np.exp(2j * np.pi * zeta * fine / p)).real, lw=0.8)
        left.plot(x, "o", ms=3)
        left.set_ylabel(label)
        right.bar(np.arange(p // 2 + 1), fc.to_host(fc.power_spectrum(fc.xp.asarray(x))))
    axes[0, 0].set_title(f"neuron {one}: weights, and the cosine of frequency "
                         f"{s['frequency'][one]}")
    axes[0, 1].set_title("power spectrum")
    save_figure(figure, directory, f"{name}-neuron.png")

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3))
    left.bar(np.arange(1, p // 2 + 1), np.bincount(s["frequency"][live], minlength=p // 2 + 1)[1:])
    left.set(title="live neurons by frequency", xlabel="frequency")
    edges = np.linspace(0, 1, 51)
    right.hist(run.power_at_init.ravel(), edges, alpha=0.7, label="at init", density=True)
    right.hist(s["max_power"][:, live].ravel(), edges, alpha=0.7, label="trained", density=True)
    right.set(title="maximum normalized power of $u_1 .. u_k, w$", xlabel="power")
    right.legend()
    save_figure(figure, directory, f"{name}-frequencies.png")


def draw_heads(run, name, directory, count=4):
    """The paper's Figures 3, 9 and 10: attention matrices S_h beside their 2-D spectra."""
    plt = pyplot()
    s = fc.head_spectra(run.params)
    centered, power = head_pictures(run)
    p = centered.shape[1]
    _, chosen = strongest_heads(s, count)
    figure, axes = plt.subplots(2, len(chosen), figsize=(3.2 * len(chosen), 7), squeeze=False)
    low = -((p - 1) // 2)
    for h, (above, below) in zip(chosen, axes.T):
        above.imshow(centered[h], cmap="RdBu")
        above.set(title=f"head {h}: $S_h$, top two {s['shares'][h, 1]:.2f}", xlabel="key",
                  ylabel="query")
        below.imshow(power[h], extent=(-0.5, p // 2 + 0.5, low + p - 0.5, low - 0.5))
        below.set(title="power", xlabel="key frequency", ylabel="query frequency")
    figure.tight_layout()
    save_figure(figure, directory, f"{name}-heads.png")

    figure, axis = plt.subplots(figsize=(6, 3))
    edges = np.linspace(0, 1, 51)
    axis.hist(run.power_at_init[:, 1], edges, alpha=0.7, label="all heads at init", density=True)
    axis.hist(s["shares"][s["live"], 1], edges, alpha=0.7, label="live heads, trained",
              density=True)
    axis.set(title="share of a head's power in its top two frequency pairs", xlabel="share")
    axis.legend()
    save_figure(figure, directory, f"{name}-shares.png")


def draw_groups(groups, directory):
    """Figure 4: accuracies over steps, a panel a group, mean and range over its seeds."""
    if not all(run.history for runs in groups for run in runs):
        raise fc.BadInput("a run was stopped before its first line of progress: nothing to draw")
    plt = pyplot()
    figure, axes = plt.subplots(2, len(groups), figsize=(3.5 * len(groups), 5.5), squeeze=False)
    for runs, apart, (axis, below) in zip(groups, differences(groups), axes.T):
        lines = list(zip(*(run.history for run in runs)))  # up to the shortest run
        steps = [line[0]["step"] for line in lines]
        for panel, key in ((axis, "train_accuracy"), (axis, "test_accuracy"),
                           (below, "embedding_share")):
            y = np.array([[one[key] for one in line] for line in lines], float)
            drawn, = panel.plot(steps, y.mean(axis=1), label=key.split("_")[0])
            panel.fill_between(steps, y.min(axis=1), y.max(axis=1), alpha=0.3, lw=0,
                               color=drawn.get_color())
        c = runs[0].config
        axis.set_title(f"k = {c['k']}, p = {c['p']}, seeds: {len(runs)}\n{apart}".rstrip())
        axis.set_ylim(-0.02, 1.02)
        below.set(xlabel="step", ylim=(-0.02, 1.02))
    axes[0, 0].set_ylabel("accuracy")
    axes[1, 0].set_ylabel("embedding's power in\nthe top tenth of frequencies")
    axes[0, 0].legend()
    figure.tight_layout()
    save_figure(figure, directory, "grokking.png")


def draw(run, name, directory):
    """The paper's figures for this run, and its training curves, as PNG files."""
    if run.config.get("layers", 1) == 1:
        (draw_neurons if run.config["model"] == "mlp" else draw_heads)(run, name, directory)
    plt = pyplot()
    figure, axes = plt.subplots(1, 3, figsize=(13, 3))
    steps = [line["step"] for line in run.history]
    for axis, keys in zip(axes, (["train_loss", "test_loss"], ["train_accuracy", "test_accuracy"],
                                 ["max_normalized_power", "single_frequency_fraction",
                                  "margin_ratio", "top_two_share", "embedding_share"])):
        for key in keys:
            if run.history and run.history[0].get(key) is not None:
                axis.plot(steps, [line[key] for line in run.history], label=key.replace("_", " "))
        axis.set_xlabel("step")
        if axis.lines:
            axis.legend()
    axes[0].set_yscale("log")
    save_figure(figure, directory, f"{name}-training.png")


def draw_widths(reports, directory):
    """margin / gamma* against the width, a dot a run and a line through the means."""
    plt = pyplot()
    reports = [r for r in reports if r.get("margin_ratio") is not None]
    if not reports:
        raise fc.BadInput("no run has a margin / gamma* to draw: it is for the MLP's z^k")
    figure, axis = plt.subplots(figsize=(6, 4))
    for k, p in sorted({(r["k"], r["p"]) for r in reports}):
        dots = [(r["m"], r["margin_ratio"]) for r in reports if (r["k"], r["p"]) == (k, p)]
        widths = sorted({m for m, _ in dots})
        means = [np.mean([ratio for m, ratio in dots if m == width]) for width in widths]
        line, = axis.plot(widths, means, label=f"k = {k}, p = {p}")
        axis.plot(*zip(*dots), "o", ms=4, color=line.get_color())
        axis.axvline(2 ** (2*k - 2) * (p - 1), color=line.get_color(), ls=":", lw=1)
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
    reports = [fc.report(run) for run in runs] if args.json or not groups else []
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
