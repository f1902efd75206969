"""Train a network to add k numbers modulo p and report the Fourier circuit that it became.

    python train.py --k 3 --p 23                    the circuit, 10 seconds on two cores
    python train.py --k 3 --p 23 --max-margin       the largest normalized margin, 30 seconds
    python train.py --figure 1                      Figures 1, 5, 7 at full size: 2, 1, 9 minutes
    python train.py --model transformer             one layer of attention, k = 3, p = 31: 2 minutes
    python train.py --figure 3                      Figures 3, 9, 10, attention: 3 to 5 minutes
    python train.py --model transformer --layers 2 --k 2 --p 97     grokking, 1 to 2 minutes
    python train.py --figure 4 --k 3                its published size, 20 minutes
    python train.py --k 3 --p 23 --benchmark        milliseconds a step
    python train.py --resume FILE                   go on where a stopped run was saved
"""

import argparse
import math
import os
import shlex
import shutil
import signal
import statistics
import sys
import time

import numpy as np

import fourier_circuits as fc
from analyze import Parser, print_report, run_main


# The published sizes, the MLP's widths by default; 2, 6 and 8 show the runs of 1, 5, 7 again.
FIGURES = {1: {"k": 4, "p": 47}, 5: {"k": 3, "p": 97}, 7: {"k": 5, "p": 23, "steps": 4000}}
FIGURES |= {2: FIGURES[1], 6: FIGURES[5], 8: FIGURES[7]}
FIGURES |= {figure: {"model": "transformer", "k": k, "p": p}
            for figure, k, p in ((3, 4, 31), (9, 3, 61), (10, 5, 17))}
FIGURES[4] = {"model": "transformer", "layers": 2, "k": 2, "heads": 160, "d_head": 32,
              "d_model": 128, "d_ff": 512, "lr": 1e-3, "weight_decay": 1e-3}
FIGURE_4_P = {2: 97, 3: 31, 4: 11, 5: 5}


def parse(argv):
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                    epilog="--max-margin and --activation relu have defaults of their own: see "
                    "DEFAULTS in fourier_circuits.py",
                    argument_default=argparse.SUPPRESS)
    add, rules = parser.add_argument, [fc.COMMON | fc.DEFAULTS[x] for x in ("mlp", "transformer")]

    def default(name):
        mlp, transformer = (rule.get(name) for rule in rules)
        return f"default {mlp}" + (f"; transformer {transformer}"
                                   if transformer not in (None, mlp) else "")

    add("--model", choices=("mlp", "transformer"), help="default mlp, that of Eq. 2")
    add("--k", type=int, help=f"numbers to add ({default('k')})")
    add("--p", type=int, help=f"modulus ({default('p')})")
    add("--figure", type=int, choices=sorted(FIGURES), help="the published settings of "
        "that figure; other flags override")
    add("--train-fraction", type=float, help=f"share of D_p ({default('train_fraction')})")
    add("--steps", type=int, help=f"{default('steps')}; transformer 3000 k, 2 layers "
        f"{fc.DEFAULTS['deep']['steps']}")
    add("--batch", type=int, help=f"inputs a step, all of them at most ({default('batch')}; "
        f"transformer 256 (k-1), 2 layers {fc.DEFAULTS['deep']['batch']})")
    add("--lr", type=float, help="AdamW's learning rate (default: set from k, p and m; "
        f"transformer {rules[1]['lr']}, 2 layers {fc.DEFAULTS['deep']['lr']})")
    add("--weight-decay", type=float, help="AdamW's weight decay (default: set from k, p and m; "
        f"transformer {rules[1]['weight_decay']}, 2 layers {fc.DEFAULTS['deep']['weight_decay']})")
    add("--init-std", type=float, help="of the initial weights, the transformer's in units of "
        "1/sqrt(fan-in) (default: set from the sizes)")
    add("--seed", type=int, help=default("seed"))
    add("--dtype", choices=("float32", "float64"), help=default("dtype"))
    group = parser.add_argument_group("of the MLP").add_argument
    group("--m", type=int, help="neurons (default: the paper's 2^(2k-2) (p-1))")
    group("--activation", choices=("power", "relu"), help=f"{default('activation')}: z^k")
    group("--max-margin", action="store_true",
          help="train on all inputs for the largest normalized margin")
    group("--penalty", type=float, help="strength of the penalty (default: from k, p and m)")
    group("--penalty-power", type=float, help="penalty ||theta||_{2,k+1}^power: 1 is the paper's, "
          "Def. 3.1 (default k+1, which makes it sum_i ||theta_i||^(k+1))")
    group("--alone", type=float,
          help=f"share of the steps in which each neuron learns by itself ({default('alone')})")
    group("--equal", type=float,
          help=f"share of the steps in which all neurons have one norm ({default('equal')})")
    group = parser.add_argument_group("of the transformer").add_argument
    deep = fc.DEFAULTS["deep"]
    group("--layers", type=int, help="1: attention alone (default); 2 and more: positions, causal "
          "mask, MLPs, and other defaults")
    for name in ("heads", "d_head", "d_model", "d_ff"):
        of = f"default {rules[1][name]}; " if name in rules[1] else ""
        group("--" + name.replace("_", "-"), type=int, help=f"{of}2 layers {deep[name]}")
    group = parser.add_argument_group("of this command").add_argument
    group("--device", choices=("auto", "cpu", "gpu"), default="auto", help="default auto")
    group("--out", metavar="FILE", help="run file (default: named after model, k, p, seed)")
    group("--save-every", type=int, default=0, metavar="STEPS", help="default: at the end only")
    group("--resume", metavar="FILE", help="go on with a saved run, to FILE unless --out is given")
    group("--benchmark", action="store_true",
          help="time the step and its matrix products, then stop")
    return vars(parser.parse_args(argv))


class Progress:
    """One line that is written over on a terminal; plain lines, rarely, elsewhere."""

    def __init__(self, run):
        self.run, self.began, self.first = run, time.monotonic(), run.step
        self.live = sys.stdout.isatty()

    def show(self, line, every):
        steps = self.run.config["steps"]
        last = line["step"] == steps
        if not (self.live or last or line["step"] // every % (steps // every // 10 or 1) == 0):
            return
        share = lambda x: "    -" if x is None else f"{x:5.3f}"
        done = max(1, line["step"] - self.first)
        left = (time.monotonic() - self.began) / done * (self.run.config["steps"] - line["step"])
        text = (f"step {line['step']:6d}  {left:4.0f} s left  loss {line['train_loss']:8.2e}"
                f"  train {share(line['train_accuracy'])}  test {share(line['test_accuracy'])}")
        for key, form in (("max_normalized_power", "power {:5.3f}"),
                          ("single_frequency_fraction", "single {:5.3f}"),
                          ("top_two_share", "top two {:5.3f}"), ("live_heads", "live {:3d}"),
                          ("embedding_share", "embedding {:5.3f}"),
                          ("frequencies_used", "freqs {:3d}"),
                          ("margin_ratio", "margin/gamma* {:6.4f}")):
            if key in line:
                text += "  " + form.format(line[key])
        if self.live:
            text = "\r" + text[:shutil.get_terminal_size().columns - 1]
        print(text, end="\n" if last or not self.live else "", flush=True)


def claim(path, config):
    """Refuse an --out that cannot be written or that holds something else than this very run."""
    if os.path.exists(path):
        try:
            old = fc.load_run(path)
        except fc.BadInput:
            raise fc.BadInput(f"{path} exists and is not a run that we can read; "
                              "choose another --out") from None
        if old.config != config:
            raise fc.BadInput(f"{path} holds a run with other settings; choose another --out")
        if old.step < config["steps"]:
            raise fc.BadInput(f"{path} holds this run, stopped at step {old.step}; go on with "
                              f"--resume {path}, or choose another --out")
    fc.check_writable(path)


def train(run, out, save_every, resume_command):
    """Train to the last step, saving at the end, every save_every steps, and when stopped."""
    stopped = []
    handlers = {number: signal.signal(number, lambda number, frame: stopped.append(number))
                for number in (signal.SIGINT, signal.SIGTERM)}
    steps = run.config["steps"]
    every = max(1, steps // (100 if run.config.get("layers", 1) > 1 else 50))
    progress = Progress(run)
    began = time.monotonic() - run.seconds
    last = run.step == steps
    while not last:
        fc.train_step(run)
        last, stop = run.step == steps, bool(stopped)
        log = last or run.step % every == 0
        save = last or stop or save_every and run.step % save_every == 0
        if (log or save) and not fc.finite(run.params):
            raise fc.BadInput(f"the weights overflowed by step {run.step}; try a smaller --lr")
        if log:
            line = fc.progress(run)
            if not math.isfinite(line["train_loss"]):
                raise fc.BadInput(f"the loss overflowed by step {run.step}; try a smaller --lr")
            run.history.append(line)
            progress.show(line, every)
        run.seconds = time.monotonic() - began
        if save:
            fc.save_run(out, run)
        if stop and not last:
            print(f"\nstopped at step {run.step} and saved; go on with\n  {resume_command}")
            sys.exit(128 + stopped[0])
    for number, usual in handlers.items():
        signal.signal(number, usual)


def benchmark(run):
    """Time whole steps and, in turn with them, the five matrix products of the MLP's step alone."""
    import resource  # here, as Windows has none
    if run.config.get("max_margin"):
        raise fc.BadInput("--benchmark times a step on a random batch; leave --max-margin out")
    c = run.config
    n = min(c["batch"], len(run.inputs))

    def step():
        run.step = math.ceil(c.get("equal", 0) * c["steps"])  # the network as a whole
        fc.train_step(run)
        float(next(iter(run.params.values())).ravel()[0])  # waits for a GPU

    times = {step: []}
    if c["model"] == "mlp":
        times[products(c, n)] = []
    end = time.monotonic() + 10
    while len(times[step]) < 20 or time.monotonic() < end and len(times[step]) < 200:
        for f, taken in times.items():
            began = time.perf_counter()
            f()
            taken.append(1000 * (time.perf_counter() - began))
    whole, *alone = (statistics.median(taken[3:]) for taken in times.values())
    unit = 2**20 if sys.platform == "darwin" else 2**10  # of ru_maxrss, a MiB
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit
    sizes = ", ".join(f"{x} = {c[x]}" for x in ("k", "p", "m", "layers", "heads", "d_head",
                                                "d_model", "d_ff") if x in c)
    print(f"{sizes}, batch {n}, {c['dtype']}, "
          f"{len(times[step]) - 3} steps on the {'CPU' if fc.xp is np else 'GPU'}\n"
          f"  step             {whole:8.2f} ms (median)")
    if alone:
        print(f"  matrix products  {alone[0]:8.2f} ms (its five products alone)\n"
              f"  ratio            {whole / alone[0]:8.2f}")
    print(f"  peak memory      {peak:8.0f} MiB")
    if fc.xp is not np:
        pool = fc.xp.get_default_memory_pool().total_bytes() / 2**20
        print(f"  GPU memory       {pool:8.0f} MiB")


def products(config, n):
    """A function that does the five matrix products of the MLP's step on n inputs, nothing else."""
    k, p, m, dtype = (config[name] for name in ("k", "p", "m", "dtype"))
    rng = np.random.default_rng(0)
    draw = lambda *shape: fc.xp.asarray(rng.standard_normal(shape, dtype))
    x, u, h, w, logits = draw(n, k * p), draw(k * p, m), draw(n, m), draw(m, p), draw(n, p)
    du, dw, dh, z = (fc.xp.empty_like(a) for a in (u, w, h, h))

    def run():
        for a, b, out in ((x, u, z), (h, w, logits), (h.T, logits, dw), (logits, w.T, dh),
                          (x.T, dh, du)):
            fc.xp.matmul(a, b, out=out)
        float(du[0, 0])

    return run


def main(argv):
    flags = parse(argv)
    figure = flags.pop("figure", None)
    flags = {**FIGURES.get(figure, {}), **flags}
    if figure == 4 and "p" not in flags:
        if flags["k"] not in FIGURE_4_P:
            raise fc.BadInput(f"Figure 4 has k = 2, 3, 4 and 5, not {flags['k']}; give --p too")
        flags["p"] = FIGURE_4_P[flags["k"]]
    own = {name: flags.pop(name, None)
           for name in ("device", "out", "save_every", "resume", "benchmark")}
    if own["save_every"] < 0:
        raise fc.BadInput(f"--save-every {own['save_every']} must be at least 0")
    fc.use_device(own["device"])
    out = own["out"] or own["resume"]
    if own["resume"]:
        run = fc.load_run(own["resume"])
        for name, value in flags.items():
            if value != run.config.get(name):
                raise fc.BadInput(f"--{name.replace('_', '-')} {value} disagrees with the run in "
                                  f"{own['resume']}: {run.config.get(name)}; leave it out to go on")
        if out != own["resume"]:
            if os.path.exists(out):
                raise fc.BadInput(f"{out} exists; choose another --out")
            fc.check_writable(out)
            fc.save_run(out, run)
    else:
        config = fc.complete(flags)
        kind = "max-margin" if config.get("max_margin") else config["model"]
        kind += str(config["layers"]) if config.get("layers", 1) > 1 else ""
        out = out or f"{kind}-k{config['k']}-p{config['p']}-seed{config['seed']}.npz"
        if not own["benchmark"]:
            claim(out, config)
        run = fc.new_run(config)
    if own["benchmark"]:
        return benchmark(run)
    again = ["python", "train.py", "--resume", out]
    if own["save_every"]:
        again += ["--save-every", str(own["save_every"])]
    if own["device"] != "auto":
        again += ["--device", own["device"]]
    train(run, out, own["save_every"], shlex.join(again))
    print_report(fc.report(run))
    print(f"  saved to {out}")
    return 0


if __name__ == "__main__":
    run_main(main)
