"""Train a network to add k numbers modulo p and report the Fourier circuit that it became.

    python train.py --k 3 --p 23                    the circuit, 10 seconds on two cores
    python train.py --k 3 --p 23 --max-margin       the largest normalized margin, 30 seconds
    python train.py --figure 1                      Figures 1, 5, 7 at full size: 2, 1, 9 minutes
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


# The published sizes. The widths are the default's; each other figure shows the same run again.
FIGURES = {1: {"k": 4, "p": 47}, 5: {"k": 3, "p": 97}, 7: {"k": 5, "p": 23, "steps": 4000}}
FIGURES |= {2: FIGURES[1], 6: FIGURES[5], 8: FIGURES[7]}


def parse(argv):
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                    epilog="--max-margin and --activation relu have defaults of their own: see "
                    "OTHERWISE in fourier_circuits.py",
                    argument_default=argparse.SUPPRESS)
    add, d = parser.add_argument, fc.COMMON | fc.DEFAULTS["mlp"]
    add("--k", type=int, help=f"numbers to add (default {d['k']})")
    add("--p", type=int, help=f"modulus (default {d['p']})")
    add("--figure", type=int, choices=sorted(FIGURES), help="the k and p of that figure")
    add("--m", type=int, help="neurons (default: the paper's 2^(2k-2) (p-1))")
    add("--activation", choices=("power", "relu"), help=f"default {d['activation']}: z^k")
    add("--max-margin", action="store_true",
        help="train on all inputs for the largest normalized margin")
    add("--train-fraction", type=float, help=f"share of D_p (default {d['train_fraction']})")
    add("--steps", type=int, help=f"default {d['steps']}")
    add("--batch", type=int, help=f"inputs a step, all of them at most (default {d['batch']})")
    add("--lr", type=float, help="AdamW's learning rate (default: set from k, p and m)")
    add("--weight-decay", type=float, help="AdamW's weight decay (default: set from k, p and m)")
    add("--penalty", type=float, help="strength of the penalty (default: from k, p and m)")
    add("--penalty-power", type=float, help="penalty ||theta||_{2,k+1}^power: 1 is the paper's, "
        "Def. 3.1 (default k+1, which makes it sum_i ||theta_i||^(k+1))")
    add("--init-std", type=float, help="of the Gaussian initial weights (default: from k, p and m)")
    add("--alone", type=float,
        help=f"share of the steps in which each neuron learns by itself (default {d['alone']})")
    add("--equal", type=float,
        help=f"share of the steps in which all neurons have one norm (default {d['equal']})")
    add("--seed", type=int, help=f"default {d['seed']}")
    add("--dtype", choices=("float32", "float64"), help=f"default {d['dtype']}")
    add("--device", choices=("auto", "cpu", "gpu"), default="auto", help="default auto")
    add("--out", metavar="FILE", help="run file (default: named after k, p and seed)")
    add("--save-every", type=int, default=0, metavar="STEPS", help="default: at the end only")
    add("--resume", metavar="FILE", help="go on with a saved run, to FILE unless --out is given")
    add("--benchmark", action="store_true", help="time the step and its matrix products, then stop")
    return vars(parser.parse_args(argv))


class Progress:
    """One line that is written over on a terminal; plain lines, rarely, elsewhere."""

    def __init__(self, run):
        self.run, self.began, self.first = run, time.monotonic(), run.step
        self.live = sys.stdout.isatty()

    def show(self, line, every):
        last = line["step"] == self.run.config["steps"]
        if not (self.live or last or line["step"] // every % 5 == 0):
            return
        share = lambda x: "    -" if x is None else f"{x:5.3f}"
        done = max(1, line["step"] - self.first)
        left = (time.monotonic() - self.began) / done * (self.run.config["steps"] - line["step"])
        ratio = f"  margin/gamma* {line['margin_ratio']:6.4f}" if "margin_ratio" in line else ""
        text = (f"step {line['step']:6d}  {left:4.0f} s left  loss {line['train_loss']:8.2e}"
                f"  train {share(line['train_accuracy'])}  test {share(line['test_accuracy'])}"
                f"  power {line['max_normalized_power']:5.3f}"
                f"  single {line['single_frequency_fraction']:5.3f}"
                f"  freqs {line['frequencies_used']:3d}{ratio}")
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
    every = max(1, steps // 50)
    progress = Progress(run)
    began = time.monotonic() - run.seconds
    last = run.step == steps
    while not last:
        fc.train_step(run)
        last, stop = run.step == steps, bool(stopped)
        log = last or run.step % every == 0
        save = last or stop or save_every and run.step % save_every == 0
        if (log or save) and not math.isfinite(fc.norm(run.params)):
            raise fc.BadInput(f"the weights overflowed by step {run.step}; try a smaller --lr")
        if log:
            run.history.append(fc.progress(run))
            progress.show(run.history[-1], every)
        run.seconds = time.monotonic() - began
        if save:
            fc.save_run(out, run)
        if stop and not last:
            print(f"\nstopped at step {run.step} and saved; go on with\n  {resume_command}")
            sys.exit(128 + stopped[0])
    for number, usual in handlers.items():
        signal.signal(number, usual)


def benchmark(run):
    """Time whole steps and, in turn with them, the step's five matrix products alone."""
    import resource  # here, as Windows has none
    if run.config["max_margin"]:
        raise fc.BadInput("--benchmark times a step on a random batch; leave --max-margin out")
    k, p, m = run.params["u"].shape
    n = min(run.config["batch"], len(run.inputs))
    rng, dtype = np.random.default_rng(0), run.config["dtype"]
    draw = lambda *shape: fc.xp.asarray(rng.standard_normal(shape, dtype))
    x, u, h, w, logits = draw(n, k * p), draw(k * p, m), draw(n, m), draw(m, p), draw(n, p)
    du, dw, dh, z = (fc.xp.empty_like(a) for a in (u, w, h, h))

    def step():
        run.step = math.ceil(run.config["equal"] * run.config["steps"])  # the network as a whole
        fc.train_step(run)
        float(run.params["w"][0, 0])  # waits for a GPU

    def products():
        for a, b, out in ((x, u, z), (h, w, logits), (h.T, logits, dw), (logits, w.T, dh),
                          (x.T, dh, du)):
            fc.xp.matmul(a, b, out=out)
        float(du[0, 0])

    times = {step: [], products: []}
    end = time.monotonic() + 10
    while len(times[step]) < 20 or time.monotonic() < end and len(times[step]) < 200:
        for f, taken in times.items():
            began = time.perf_counter()
            f()
            taken.append(1000 * (time.perf_counter() - began))
    whole, alone = (statistics.median(times[f][3:]) for f in (step, products))
    unit = 2**20 if sys.platform == "darwin" else 2**10  # of ru_maxrss, a MiB
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit
    print(f"k = {k}, p = {p}, m = {m}, batch {n}, {dtype}, "
          f"{len(times[step]) - 3} steps on the {'CPU' if fc.xp is np else 'GPU'}\n"
          f"  step             {whole:8.2f} ms (median)\n"
          f"  matrix products  {alone:8.2f} ms (its five products alone)\n"
          f"  ratio            {whole / alone:8.2f}\n"
          f"  peak memory      {peak:8.0f} MiB")
    if fc.xp is not np:
        pool = fc.xp.get_default_memory_pool().total_bytes() / 2**20
        print(f"  GPU memory       {pool:8.0f} MiB")


def main(argv):
    flags = parse(argv)
    flags = {**FIGURES.get(flags.pop("figure", None), {}), **flags}
    own = {name: flags.pop(name, None)
           for name in ("device", "out", "save_every", "resume", "benchmark")}
    if own["save_every"] < 0:
        raise fc.BadInput(f"--save-every {own['save_every']} must be at least 0")
    fc.use_device(own["device"])
    out = own["out"] or own["resume"]
    if own["resume"]:
        run = fc.load_run(own["resume"])
        for name, value in flags.items():
            if value != run.config[name]:
                raise fc.BadInput(f"--{name.replace('_', '-')} {value} disagrees with the run in "
                                  f"{own['resume']}: {run.config[name]}; leave it out to go on")
        if out != own["resume"]:
            if os.path.exists(out):
                raise fc.BadInput(f"{out} exists; choose another --out")
            fc.check_writable(out)
            fc.save_run(out, run)
    else:
        config = fc.complete(flags)
        kind = "max-margin" if config["max_margin"] else "mlp"
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
    with np.errstate(over="ignore", invalid="ignore"):  # train looks for them in the loss
        train(run, out, own["save_every"], shlex.join(again))
    print_report(fc.report(run))
    print(f"  saved to {out}")
    return 0


if __name__ == "__main__":
    run_main(main)
