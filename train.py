"""Train a network to add k numbers modulo p and report the Fourier circuit that it became.

    python train.py --k 3 --p 23                    the circuit, a few seconds
    python train.py --k 3 --p 23 --max-margin       the largest normalized margin, one minute
    python train.py --figure 1                      Figures 1, 5, 7 at full size: minutes
    python train.py --model transformer             one layer of attention, k = 3, p = 31: 80 s
                                                    --figure 3, 9, 10: 2 to 4 minutes
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
import tempfile
import time

import numpy as np

import fourier_circuits as fc
from analyze import MEASURES, Parser, print_report, report, run_main

# The published sizes, the MLP's widths by default; 2, 6, 8 show 1, 5, 7 again; 4 clips nothing.
FIGURES = {1: {"k": 4, "p": 47}, 5: {"k": 3, "p": 97}, 7: {"k": 5, "p": 23}}
FIGURES |= {2: FIGURES[1], 6: FIGURES[5], 8: FIGURES[7]}
FIGURES |= {figure: {"model": "transformer", "k": k, "p": p}
            for figure, k, p in ((3, 4, 31), (9, 3, 61), (10, 5, 17))}
FIGURES[4] = {"model": "transformer", "layers": 2, "k": 2, "heads": 160, "d_head": 32,
              "d_model": 128, "d_ff": 512, "weight_decay": 1e-3, "betas": [0.9, 0.98], "clip": 1e9}
FIGURE_4_P = {2: 97, 3: 31, 4: 11, 5: 5}

NUMBERS = (  # name, type, smallest, largest, meaning
    ("k", int, 2, 200, "numbers to add"),
    ("p", int, 2, 10**9, "modulus"),
    ("train_fraction", float, 0, 1, "share of all inputs to train on"),
    ("steps", int, 1, 10**9, "training steps"),
    ("batch", int, 1, 2**30, "inputs a step, all of them at most"),
    ("lr", float, 0, 1e3, "AdamW's learning rate"),
    ("weight_decay", float, 0, 1e6, "AdamW's weight decay"),
    ("init_std", float, 1e-9, 1e6, "of the first weights; a transformer's in 1/sqrt(fan-in)"),
    ("seed", int, 0, 2**63, "of the split, the first weights and the batches"),
    ("m", int, 1, 10**9, "neurons, 2^(2k-2) (p-1) in the paper"),
    ("equal", float, 0, 0.99, "share of the steps in which all vectors have one size"),
    ("penalty", float, 0, 1e6, "strength of the penalty ||theta||^penalty-power (Def. 3.1)"),
    ("penalty_power", float, 1, 16, "1 is the paper's; k+1 makes it sum_i ||theta_i||^(k+1)"),
    ("layers", int, 1, 100, "1: attention alone; more: positions, causal mask, MLPs"),
    ("heads", int, 1, 10**6, "attention heads of a layer"),
    ("d_head", int, 1, 10**6, "width of a head"),
    ("d_model", int, 1, 10**6, "width of a state"),
    ("d_ff", int, 1, 10**6, "width of a block's MLP"))


def within(kind, low, high):
    """A type of number for argparse, refused out of its range."""
    def number(text):
        value = kind(text)
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{text} must lie between {low} and {high}")
        return value
    return number


def parse(argv):
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                    argument_default=argparse.SUPPRESS)
    add = parser.add_argument
    add("--model", choices=("mlp", "transformer"), help="default mlp, the network of Eq. 2")
    add("--figure", type=int, choices=sorted(FIGURES), help="the published settings of "
        "that figure; other flags override")
    rules = {"mlp": fc.complete({}), "transformer": fc.complete({"model": "transformer"}),
             "2 layers": fc.complete({"model": "transformer", "layers": 2})}  # from k and p
    for name, kind, low, high, meaning in NUMBERS:
        defaults = ", ".join(f"{model} {rule[name]:.4g}" for model, rule in rules.items()
                             if name in rule)
        add(f"--{name.replace('_', '-')}", type=within(kind, low, high),
            help=f"{meaning} (default {defaults})")
    add("--dtype", choices=("float32", "float64"), help="default float32")
    add("--activation", choices=("power", "relu"), help="of the mlp; default power: z^k")
    add("--control-variate", choices=("on", "off"), help="of the mlp's gradient; default on")
    add("--max-margin", action="store_true",
        help="train the mlp on all inputs for the largest normalized margin")
    add("--device", choices=("auto", "cpu", "gpu"), default="auto", help="default auto")
    add("--out", metavar="FILE", help="run file (default: named after model, k, p, seed)")
    add("--save-every", type=within(int, 0, 10**9), default=0, metavar="STEPS",
        help="default: at the end only")
    add("--resume", metavar="FILE", help="go on with a saved run, to FILE unless --out is given")
    add("--benchmark", action="store_true", help="time the step, then stop")
    return vars(parser.parse_args(argv))


class Progress:
    """One line that is written over on a terminal; plain lines, rarely, elsewhere."""

    def __init__(self, run):
        self.run, self.began, self.start = run, time.monotonic(), run.step
        self.live = sys.stdout.isatty()

    def show(self, line, every):
        steps = self.run.config["steps"]
        last = line["step"] == steps
        rarely = line["step"] // every % max(1, steps // every // 10) == 0
        if not (self.live or last or rarely):
            return
        share = lambda x: "    -" if x is None else f"{x:5.3f}"
        done = max(1, line["step"] - self.start)
        left = (time.monotonic() - self.began) / done * (steps - line["step"])
        text = (f"step {line['step']:6d}  {left:4.0f} s left  loss {line['train_loss']:8.2e}"
                f"  train {share(line['train_accuracy'])}  test {share(line['test_accuracy'])}")
        for name, form in MEASURES.items():
            if name in line:
                text += "  " + form.format(line[name])
        if self.live:
            text = "\r" + text[:shutil.get_terminal_size().columns - 1]
        print(text, end="\n" if last or not self.live else "", flush=True)


def check_writable(path):
    """Raise BadInput, before any work, if a run cannot be saved at path. Leaves what is there."""
    try:
        tempfile.TemporaryFile(dir=os.path.dirname(path) or ".").close()
    except OSError as error:
        raise fc.BadInput(f"cannot write {path}: {error.strerror}; choose another --out") from None


def claim(path, config):
    """Refuse an --out that cannot be written or that holds something else than this very run."""
    if os.path.exists(path):
        old = fc.load_run(path)
        if old.config != config:
            raise fc.BadInput(f"{path} holds a run with other settings; choose another --out")
        if old.step < config["steps"]:
            raise fc.BadInput(f"{path} holds this run, stopped at step {old.step}; go on with "
                              f"--resume {path}, or choose another --out")
    check_writable(path)


def train(run, out, save_every, resume_command):
    """Train to the last step, saving at the end, every save_every steps, and when stopped."""
    stopped = []
    handlers = {number: signal.signal(number, lambda number, frame: stopped.append(number))
                for number in (signal.SIGINT, signal.SIGTERM)}
    steps = run.config["steps"]
    every = max(1, steps // (100 if run.config.get("layers", 1) > 1 else 50))
    progress = Progress(run)
    began = time.monotonic() - run.seconds
    while run.step < steps:
        fc.train_step(run)
        last, stop = run.step == steps, bool(stopped)
        log = last or run.step % every == 0
        save = last or stop or save_every and run.step % save_every == 0
        if (log or save) and not all(fc.xp.isfinite(x).all() for x in run.params.values()):
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


def benchmark(config):
    """Print the time of a step and, in turn with it, that of the MLP's five matrix products."""
    import resource  # here, as Windows has none
    gpu = fc.xp is not np
    run = fc.new_run({**config, "control_variate": "off"})
    n = min(config["batch"], len(run.index))

    def step(variate):
        run.step = math.ceil(config.get("equal", 0) * config["steps"])  # where all is free
        run.config["control_variate"] = variate
        fc.train_step(run)

    jobs = {"step": lambda: step("off")}
    if config["model"] == "mlp":
        if config["activation"] == "power":
            jobs["with product term"] = lambda: step("on")
        jobs["matrix products"] = products(config, n)
    times = {name: [] for name in jobs}
    for name, job in jobs.items():
        end = time.monotonic() + 10 / len(jobs)
        while len(times[name]) < 20 or time.monotonic() < end and len(times[name]) < 200:
            began = time.perf_counter()
            job()
            if gpu:
                fc.xp.cuda.Device().synchronize()
            times[name].append(1000 * (time.perf_counter() - began))
    device = fc.xp.cuda.runtime.getDeviceProperties(0)["name"].decode() if gpu else "the CPU"
    sizes = ", ".join(f"{x} = {config[x]}" for x in ("k", "p", "m", "layers", "heads", "d_head",
                                                     "d_model", "d_ff") if x in config)
    print(f"{sizes}, batch {n}, {config['dtype']}, {len(times['step']) - 3} steps on {device}")
    median = {name: statistics.median(taken[3:]) for name, taken in times.items()}
    for name, taken in median.items():
        print(f"  {name:18s} {taken:9.2f} ms (median)")
    if "matrix products" in median:
        print(f"  {'ratio':18s} {median['step'] / median['matrix products']:9.2f}")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(f"  peak memory        {peak / 2**(20 if sys.platform == 'darwin' else 10):9.0f} MiB")
    if gpu:
        pool = fc.xp.get_default_memory_pool()
        print(f"  GPU memory         {pool.total_bytes() / 2**20:9.0f} MiB")


def products(config, n):
    """A function that does the five matrix products of the MLP's step on n inputs, nothing else."""
    k, p, m, dtype = (config[name] for name in ("k", "p", "m", "dtype"))
    x, u, h, w, logits = (fc.xp.ones(shape, dtype) for shape in (
        (n, k * p), (k * p, m), (n, m), (m, p), (n, p)))
    return lambda: (x @ u, h @ w, h.T @ logits, logits @ w.T, x.T @ h)


def main(argv):
    flags = parse(argv)
    figure = flags.pop("figure", None)
    flags = {**FIGURES.get(figure, {}), **flags}
    if figure == 4 and "p" not in flags:
        if flags["k"] not in FIGURE_4_P:
            raise fc.BadInput(f"Figure 4 has k = 2, 3, 4 and 5, not {flags['k']}; give --p too")
        flags["p"] = FIGURE_4_P[flags["k"]]
    device, out, save_every, resume, timing = (
        flags.pop(name, None) for name in ("device", "out", "save_every", "resume", "benchmark"))
    fc.use_device(device)
    if resume:
        run = fc.load_run(resume)
        for name, value in flags.items():
            if value != run.config.get(name):
                raise fc.BadInput(f"--{name.replace('_', '-')} {value} disagrees with the run in "
                                  f"{resume}: {run.config.get(name)}; leave it out to go on")
        config = run.config
    else:
        config = fc.complete(flags)
    if timing:
        return benchmark(config)
    if resume and out not in (None, resume):
        if os.path.exists(out):
            raise fc.BadInput(f"{out} exists; choose another --out")
        check_writable(out)
        fc.save_run(out, run)
    elif not resume:
        kind = "max-margin" if config.get("max_margin") else config["model"]
        kind += str(config["layers"]) if config.get("layers", 1) > 1 else ""
        out = out or f"{kind}-k{config['k']}-p{config['p']}-seed{config['seed']}.npz"
        claim(out, config)
        run = fc.new_run(config)
    out = out or resume
    again = f"python train.py --resume {shlex.quote(out)}"
    again += f" --save-every {save_every}" if save_every else ""
    again += f" --device {device}" if device != "auto" else ""
    train(run, out, save_every, again)
    print_report(report(run))
    print(f"  saved to {out}; look inside with\n  python analyze.py {shlex.quote(out)}")
    return 0


if __name__ == "__main__":
    run_main(main)
