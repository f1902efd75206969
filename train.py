"""Train a network to add k numbers modulo p and report the Fourier circuit that it became.

    python train.py --k 3 --p 23                    the circuit, by textbook AdamW: 10 seconds
    python train.py --k 3 --p 23 --fast             the same by our fast rule: 5 seconds
    python train.py --k 3 --p 23 --max-margin       the largest normalized margin: one minute
    python train.py --k 4 --p 47 --batch 16384      Figure 1 by textbook AdamW: up to an hour
    python train.py --figure 1                      Figures 1, 5, 7 by the fast rule: minutes
    python train.py --model attention               one layer of attention, k = 3, p = 31: 100 s
    python train.py --figure 3                      Figures 3, 9, 10: 2 to 5 minutes
    python train.py --model transformer             two blocks, k = 2, p = 97, grokking: 1 minute
    python train.py --figure 4 --k 3                its published size: half an hour
    python train.py --k 3 --p 23 --benchmark        milliseconds a step
    python train.py --resume FILE                   go on where a stopped run was saved
"""

import argparse
import contextlib
import math
import os
import shlex
import shutil
import signal
import statistics
import sys
import threading
import time

import numpy as np

import fourier_circuits as fc
from analyze import Parser, print_report, report, run_main, share

# The published sizes; Figures 2, 6, 8 show 1, 5, 7 again. How Figures 1 to 8 were trained is not
# published in full: here 1, 5, 7 train by --fast, and 4 has the paper's betas and clips nothing.
FIGURES = {1: {"k": 4, "p": 47, "fast": True}, 5: {"k": 3, "p": 97, "fast": True},
           7: {"k": 5, "p": 23, "fast": True}}
FIGURES |= {2: FIGURES[1], 6: FIGURES[5], 8: FIGURES[7]}
FIGURES |= {figure: {"model": "attention", "k": k, "p": p}
            for figure, k, p in ((3, 4, 31), (9, 3, 61), (10, 5, 17))}
FIGURES[4] = {"model": "transformer", "k": 2, "heads": 160, "d_head": 32, "d_model": 128,
              "d_ff": 512, "weight_decay": 1e-3, "betas": [0.9, 0.98], "clip": 1e9}
FIGURE_4_P = {2: 97, 3: 31, 4: 11, 5: 5}

NUMBERS = {  # the flags for numbers; their ranges stand in fc.NUMBERS
    "k": "numbers to add", "p": "modulus", "train_fraction": "share of all inputs to train on",
    "steps": "training steps", "batch": "inputs a step, all of them at most",
    "lr": "AdamW's learning rate", "weight_decay": "AdamW's weight decay",
    "init_std": "of the first weights; a transformer's in 1/sqrt(fan-in)",
    "seed": "of the split, the first weights and the batches",
    "m": "neurons, 2^(2k-2) (p-1) in the paper",
    "equal": "share of the steps in which all vectors have one size",
    "penalty": "strength of the penalty ||theta||^penalty-power (Def. 3.1)",
    "penalty_power": "1 is the paper's; k+1 makes it sum_i ||theta_i||^(k+1)",
    "layers": "blocks of the transformer", "heads": "attention heads of a layer",
    "d_head": "width of a head", "d_model": "width of a state", "d_ff": "width of a block's MLP"}


def parse(argv):
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                    argument_default=argparse.SUPPRESS)
    add = parser.add_argument
    add("--model", choices=fc.CHOICES["model"], help="default mlp, the network of Eq. 2")
    add("--figure", type=int, choices=sorted(FIGURES), help="the published sizes of that figure, "
        "not the published optimiser: 1, 2, 5-8 train by --fast; other numbers override")
    add("--fast", action="store_true", help="train the mlp by our fast rule: a control variate, "
        "which uses that the data are a group, equal sizes, a penalty")
    add("--max-margin", action="store_true",
        help="train the mlp on all inputs for the largest normalized margin")
    rules = {"mlp": {}, "fast": {"fast": True}, "max-margin": {"max_margin": True},
             "attention": {"model": "attention"}, "transformer": {"model": "transformer"}}
    rules = {name: fc.complete(given) for name, given in rules.items()}  # from k and p
    for name, meaning in NUMBERS.items():
        defaults = ", ".join(f"{model} {rule[name]:.4g}" for model, rule in rules.items()
                             if name in rule)
        add(f"--{name.replace('_', '-')}", type=fc.NUMBERS[name][0],
            help=f"{meaning} (default {defaults})")
    add("--split", choices=fc.CHOICES["split"], help="orbits: no permuted copy of a test input is "
        "trained on; attention's is always that; default random")
    add("--dtype", choices=fc.CHOICES["dtype"], help="default float32")
    add("--activation", choices=fc.CHOICES["activation"], help="of the mlp; default power: z^k")
    add("--control-variate", choices=fc.CHOICES["control_variate"], help="of --fast; default on")
    add("--device", choices=("cpu", "gpu"), default="cpu", help="default cpu")
    add("--out", metavar="FILE", help="run file (default: named after model, k, p, seed)")
    add("--save-every", type=int, default=0, metavar="STEPS", help="default: at the end only")
    add("--resume", metavar="FILE", help="go on with a saved run, to FILE unless --out is given")
    add("--benchmark", action="store_true", help="time the step, then stop")
    return vars(parser.parse_args(argv))


MEASURES = {  # of a run's state, in a line of progress
    "circuit_share": "circuit {:5.3f}", "live_neurons": "live {:4d}",
    "max_normalized_power": "power {:5.3f}", "live_heads": "live {:3d}",
    "single_frequency_fraction": "single {:5.3f}", "key_share": "keys {:5.3f}",
    "frequencies_used": "freqs {:3d}", "margin_ratio": "margin/gamma* {:6.4f}"}


class Progress:
    """One line that is written over on a terminal; plain lines, rarely, elsewhere."""

    def __init__(self, run):
        self.run, self.began, self.start = run, time.monotonic(), run.step
        self.live, self.open = getattr(sys.stdout, "isatty", bool)(), False

    def show(self, line, every):
        steps = self.run.config["steps"]
        last = line["step"] == steps
        rarely = line["step"] // every % max(1, steps // every // 10) == 0
        if not (self.live or last or rarely):
            return
        done = max(1, line["step"] - self.start)
        left = (time.monotonic() - self.began) / done * (steps - line["step"])
        text = f"step {line['step']:6d}  {left:4.0f} s left  loss {line['train_loss']:8.2e}"
        for part in ("train", "test"):
            accuracy = line[f"{part}_accuracy"]
            text += f"  {part} " + ("    -" if accuracy is None else share(accuracy, "5.3f"))
        for name, form in MEASURES.items():
            if name in line:
                text += "  " + form.format(line[name])
        if self.live:
            text = "\r" + text[:shutil.get_terminal_size().columns - 1]
        self.open = self.live and not last
        print(text, end="" if self.open else "\n", flush=True)

    def close(self):
        """What is printed next begins on a line of its own."""
        if self.open:
            self.open = False
            print(flush=True)


@contextlib.contextmanager
def stop_signals():
    """A list that receives SIGINT, SIGTERM, SIGHUP (a lost terminal), where they are not ignored;
    in the main thread, which alone has signals. Afterwards all is as before."""
    received, usual = [], {}
    if threading.current_thread() is threading.main_thread():
        for name in {"SIGINT", "SIGTERM", "SIGHUP"} & set(dir(signal)):
            number = getattr(signal, name)
            if signal.getsignal(number) not in (signal.SIG_IGN, None):
                usual[number] = signal.signal(number, lambda number, _: received.append(number))
    try:
        yield received
    finally:
        for number, handler in usual.items():
            signal.signal(number, handler)


def claim(out, run):
    """Refuse, before any work, an --out that holds something else than this very run, finished, or
    that cannot be written. -> whether the finished run is there."""
    finished = os.path.exists(out)
    if finished:
        there = fc.load_run(out)
        if there.config != run.config:
            raise fc.BadInput(f"{out} holds a run with other settings; choose another --out")
        if there.step < run.config["steps"]:
            raise fc.BadInput(f"{out} holds this run, stopped at step {there.step}; go on with "
                              f"--resume {out}, or choose another --out")
    fc.save_run(out, run, keep=False)
    return finished


def train(run, out, save_every, again, finished):
    """Train to the last step, saving at the end, every save_every steps, and when stopped; but if
    the finished run is there already, at the end only.

    Raises BadInput if the weights overflow, SystemExit if a signal stopped it."""
    steps, progress = run.config["steps"], Progress(run)
    every = max(1, steps // (100 if run.config["model"] == "transformer" else 50))
    began = time.monotonic() - run.seconds
    with stop_signals() as received, contextlib.closing(progress):
        while run.step < steps:
            fc.train_step(run)
            last, stop = run.step == steps, bool(received)
            log = last or run.step % every == 0
            save = last or not finished and (stop or save_every and run.step % save_every == 0)
            if (log or save) and not all(fc.xp.isfinite(x).all() for x in run.params.values()):
                raise fc.BadInput(f"the weights overflowed by step {run.step}; try a smaller --lr")
            if log:
                line = fc.progress(run)
                if not math.isfinite(line["train_loss"]):
                    raise fc.BadInput(f"the loss overflowed by step {run.step}; try a smaller --lr")
                run.history.append(line)
            run.seconds = time.monotonic() - began
            if save:
                try:
                    fc.save_run(out, run)
                except fc.BadInput as error:  # something came to be there meanwhile
                    fc.save_run(f"{out}.{os.getpid()}.npz", run)
                    raise fc.BadInput(f"{error}; saved to {out}.{os.getpid()}.npz") from None
            try:
                if log:
                    progress.show(line, every)
                if stop and not last:
                    progress.close()
                    print(f"stopped at step {run.step}; {out} keeps the finished run" if finished
                          else f"stopped at step {run.step} and saved; go on with\n  {again}")
            except OSError:  # nobody reads the output any more
                if not finished and not save:
                    fc.save_run(out, run)
                raise
            if stop and not last:
                sys.exit(128 + received[0])


def command(script, *words):
    """The command that runs one of our scripts, to be pasted where it is printed."""
    here = os.path.dirname(os.path.abspath(__file__))
    usual = shutil.which("python") == sys.executable
    python = "python" if usual else os.path.relpath(sys.executable)
    return " ".join(map(shell_word, (python, os.path.relpath(os.path.join(here, script)), *words)))


def shell_word(text):
    """A word for a shell; in bash's $'..' if the terminal cannot show it."""
    with contextlib.suppress(UnicodeEncodeError):
        text.encode(getattr(sys.stdout, "encoding", None) or "ascii")
        if text.isprintable():
            return shlex.quote(text)
    return "$'" + "".join(f"\\x{byte:02x}" for byte in os.fsencode(text)) + "'"


def benchmark(config):
    """Print the time of a step, and for the MLP that of a step with the control variate."""
    import resource  # here, as Windows has none
    gpu = fc.xp is not np
    runs = {"step": fc.new_run(config)}
    if config["model"] == "mlp" and config["activation"] == "power" and not config["max_margin"]:
        same = {name: config[name] for name in ("k", "p", "m", "batch", "seed", "dtype")}
        runs["control variate"] = fc.new_run(fc.complete({**same, "fast": True, "equal": 0}))
    times = {name: [] for name in runs}
    for name, run in runs.items():
        end = time.monotonic() + 10 / len(runs)
        while len(times[name]) < 20 or time.monotonic() < end and len(times[name]) < 200:
            run.step = math.ceil(config.get("equal", 0) * config["steps"])  # where all is free
            began = time.perf_counter()
            fc.train_step(run)
            if gpu:
                fc.xp.cuda.Device().synchronize()
            times[name].append(1000 * (time.perf_counter() - began))
    device = fc.xp.cuda.runtime.getDeviceProperties(0)["name"].decode() if gpu else "the CPU"
    sizes = ", ".join(f"{x} = {config[x]}" for x in ("k", "p", "m", "layers", "heads", "d_head",
                                                     "d_model", "d_ff") if x in config)
    n = min(config["batch"], len(runs["step"].index))
    print(f"{sizes}, batch {n}, {config['dtype']}, {len(times['step']) - 3} steps on {device}")
    for name, taken in times.items():
        print(f"  {name:18s} {statistics.median(taken[3:]):9.2f} ms (median)")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(f"  peak memory        {peak / 2**(20 if sys.platform == 'darwin' else 10):9.0f} MiB")
    if gpu:
        used = fc.xp.get_default_memory_pool().total_bytes()
        print(f"  GPU memory         {used / 2**20:9.0f} MiB")


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
    if save_every < 0:
        raise fc.BadInput(f"--save-every must be 0 or more steps, not {save_every}")
    fc.use_device(device)
    run = fc.load_run(resume) if resume else None
    if resume:
        for name, value in flags.items():
            if value != run.config.get(name):
                raise fc.BadInput(f"--{name.replace('_', '-')} {value} disagrees with the run in "
                                  f"{resume}: {run.config.get(name)}; leave it out to go on")
    config = run.config if resume else fc.complete(flags)
    if timing:
        return benchmark(config)
    kind = "fast" if config.get("fast") else "max-margin" if config.get("max_margin") else ""
    name = f"{kind or config['model']}-k{config['k']}-p{config['p']}-seed{config['seed']}.npz"
    out = out or resume or name
    out = os.path.join(".", out) if out.startswith("-") else out
    if not resume:
        run = fc.new_run(config)
        finished = claim(out, run)
    elif os.path.exists(out) and os.path.realpath(out) != os.path.realpath(resume):
        raise fc.BadInput(f"{out} exists; choose another --out")
    else:
        fc.save_run(out, run, keep=not os.path.exists(out))
        finished = False
    again = command("train.py", "--resume", out)
    again += f" --save-every {save_every}" * bool(save_every)
    again += f" --device {device}" * (device != "cpu")
    train(run, out, save_every, again, finished)
    print_report(report(run))
    print(f"  saved to {out}; look inside with\n  {command('analyze.py', out)}")
    return 0


if __name__ == "__main__":
    run_main(main)
