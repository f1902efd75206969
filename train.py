"""Train a network to add k numbers modulo p and report the Fourier circuit that it became.

    python train.py --k 3 --p 23                    the circuit, by textbook AdamW: 10 seconds
    python train.py --k 3 --p 23 --max-margin       the largest normalized margin: one minute
    python train.py --k 4 --p 47 --batch 16384      Figure 1 by textbook AdamW: up to an hour
    python train.py --figure 1                      Figures 1, 5, 7 with a control variate: minutes
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

if __name__ == "__main__":  # before numpy is imported: see machine
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, lambda *_: os._exit(130))  # while we import; see run_main
    for name in ("OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "VECLIB_MAXIMUM_THREADS"):
        os.environ.setdefault(name, "1")

import numpy as np

import fourier_circuits as fc
from analyze import (Parser, add_machine, complain, machine, print_report, report, run_main,
                     share)

# The published sizes; Figures 2, 6, 8 show 1, 5, 7 again. How Figures 1 to 8 were trained is not
# published in full: here 1, 5, 7 train with a control variate and equal sizes, and 4 has the
# paper's betas and clips nothing.
EQUAL = {"control_variate": True, "equal": 0.6}
FIGURES = {1: {"k": 4, "p": 47, **EQUAL}, 5: {"k": 3, "p": 97, **EQUAL},
           7: {"k": 5, "p": 23, **EQUAL}}
FIGURES |= {2: FIGURES[1], 6: FIGURES[5], 8: FIGURES[7]}
FIGURES |= {figure: {"model": "attention", "k": k, "p": p}
            for figure, k, p in ((3, 4, 31), (9, 3, 61), (10, 5, 17))}
FIGURES[4] = {"model": "transformer", "k": 2, "heads": 160, "d_head": 32, "d_model": 128,
              "d_ff": 512, "weight_decay": 1e-3, "betas": [0.9, 0.98], "clip": 1e9}
FIGURE_4_P = {2: 97, 3: 31, 4: 11, 5: 5}

# ---- Training ------------------------------------------------------------------------------------


def train(run, guard):
    """Train to the last step. What can happen on the way is guard's to handle."""
    config = run.config
    every = max(1, config["steps"] // (100 if config["model"] == "transformer" else 50))
    while run.step < config["steps"]:
        fc.train_step(run)
        if run.step % every == 0 or run.step == config["steps"]:
            line = fc.progress(run)
            run.history.append(line)
            guard.show(line, every)
        guard.after_step()


class Guard:
    """What is around the loop, in a with statement: it shows progress, looks for overflow, saves,
    and stops the run where a signal asks for it or nobody reads the output any more.

    saving: whether to save on the way; not so where the finished run is there already."""

    def __init__(self, run, out, save_every, again, saving):
        self.run, self.out, self.save_every = run, out, save_every
        self.again, self.saving = again, saving
        self.saved = fc.load_run(out).step if os.path.exists(out) else None  # the step of the file
        self.output_error = None
        self.progress = Progress(run)

    def __enter__(self):
        self.signals = stop_signals()
        self.received = self.signals.__enter__()
        self.began = time.monotonic() - self.run.seconds
        return self

    def __exit__(self, *error):
        self.progress.close()
        self.signals.__exit__(*error)

    def check(self, loss=0):
        """Raise BadInput if the loss or the weights overflowed."""
        finite = all(fc.xp.isfinite(x).all() for group in fc.GROUPS
                     for x in getattr(self.run, group).values())
        if not finite or not math.isfinite(loss):
            raise fc.BadInput(f"the {'loss' if finite else 'weights'} overflowed by step "
                              f"{self.run.step}; try {smaller(self.run.config)}")

    def show(self, line, every):
        """Show a line of progress. Raises BadInput as check does."""
        self.check(line["train_loss"])
        try:
            self.progress.show(line, every)
        except OSError as error:
            self.output_error = error

    def after_step(self):
        """Save if that is due; leave if that is asked for."""
        run = self.run
        run.seconds = time.monotonic() - self.began
        if run.step == run.config["steps"]:
            return
        if self.received or self.output_error:
            self.stop()
        elif self.saving and self.save_every and run.step % self.save_every == 0:
            self.check()
            try:
                fc.save_run(self.out, run)
                self.saved = run.step
            except fc.BadInput as error:
                self.progress.close()
                complain(f"warning: {error}; the run goes on, {self.kept()}")

    def stop(self):
        """Save and leave. Raises SystemExit, or BadInput if it cannot be saved, or OSError if it
        was the output that failed."""
        text = f"stopped at step {self.run.step}; {self.out} keeps the finished run"
        if self.saving:
            self.save_or_say()
            text = f"stopped at step {self.run.step} and saved; go on with\n  {self.again}"
        if self.output_error:
            raise self.output_error
        self.progress.close()
        print(text)
        sys.exit(128 + self.received[0])

    def finish(self):
        """Save the finished run. -> None, or the BadInput that says why it could not be saved."""
        try:
            self.save_or_say()
        except fc.BadInput as error:
            return error

    def save_or_say(self):
        """Save the run, or beside its place if something else came to be there. Raises BadInput
        that says what is there, if it could not be saved in its place."""
        self.check()
        try:
            return fc.save_run(self.out, self.run)
        except fc.BadInput as error:
            problem = error
        try:
            beside = f"{self.out}.{os.getpid()}.npz"
            fc.save_run(beside, self.run)
        except fc.BadInput:
            raise fc.BadInput(f"{problem}; {self.kept()}") from None
        raise fc.BadInput(f"{problem}; saved to {beside}")

    def kept(self):
        """What of the run is in its file."""
        if self.saved is None:
            return "nothing of it is saved"
        return (f"its save of step {self.saved} is kept; once that works again, go on with "
                f"{self.again}")


def smaller(config):
    """What to make smaller where a run overflows: what is above its default, or else lr."""
    given = {name: config[name] for name in ("model", "k", "p", "activation", "max_margin",
                                             "control_variate") if name in config}
    usual = fc.complete(given)
    names = [name for name in ("lr", "weight_decay", "init_std", "penalty")
             if name in config and config[name] > usual[name]]
    return "a smaller " + " or ".join(f"--{name.replace('_', '-')}" for name in names or ["lr"])


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
        if self.live:  # to the end of the line, so that nothing is left of a longer one
            width = shutil.get_terminal_size().columns - 1
            text = "\r" + text[:width].ljust(width)
        self.open = self.live and not last
        print(text, end="" if self.open else "\n", flush=True)

    def close(self):
        """What is printed next begins on a line of its own."""
        if self.open:
            self.open = False
            with contextlib.suppress(OSError):
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


# ---- The benchmark -------------------------------------------------------------------------------


def benchmark(config):
    """Print the time of a step, and for the plain MLP that of a step with the control variate."""
    gpu = fc.xp is not np
    runs = {"step": fc.new_run(config)}
    if fc.model_of(config) is fc.MODELS["mlp"]:
        runs["control variate"] = fc.new_run(config | {"control_variate": True, "equal": 0})
    times = {name: [] for name in runs}
    for name, run in runs.items():
        end = time.monotonic() + 10 / len(runs)
        while len(times[name]) < 20 or time.monotonic() < end and len(times[name]) < 200:
            run.step = config["steps"] // 2
            began = time.perf_counter()
            fc.train_step(run)
            if gpu:
                fc.xp.cuda.Device().synchronize()
            times[name].append(1000 * (time.perf_counter() - began))
    device = f"the CPU, threads: {fc.THREADS}"
    if gpu:
        device = fc.xp.cuda.runtime.getDeviceProperties(0)["name"].decode()
    sizes = ", ".join(f"{x} = {config[x]}" for x in ("k", "p", "m", "layers", "heads", "d_head",
                                                     "d_model", "d_ff") if x in config)
    n = min(config["batch"], len(runs["step"].index))
    print(f"{sizes}, batch {n}, {config['dtype']}, {len(times['step']) - 3} steps on {device}")
    for name, taken in times.items():
        print(f"  {name:18s} {statistics.median(taken[3:]):9.2f} ms (median)")
    with contextlib.suppress(ImportError):  # Windows has none
        import resource
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        print(f"  peak memory        {peak / 2**(20 if sys.platform == 'darwin' else 10):9.0f} MiB")
    if gpu:
        used = fc.xp.get_default_memory_pool().total_bytes()
        print(f"  GPU memory         {used / 2**20:9.0f} MiB")


# ---- The command ---------------------------------------------------------------------------------


def parse(argv):
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                    argument_default=argparse.SUPPRESS)
    add = parser.add_argument
    add("--figure", type=int, choices=sorted(FIGURES), help="the published sizes of that figure, "
        "not the published optimiser; other flags override")
    for name, (kind, allowed, meaning) in fc.SETTINGS.items():
        flag = f"--{name.replace('_', '-')}"
        if kind is bool:
            add(flag, action="store_true", help=meaning)
        else:
            add(flag, type=kind, choices=allowed if kind is str else None,
                nargs=2 if name == "betas" else None, help=f"{meaning}; default {defaults(name)}")
    add_machine(parser)
    add("--out", metavar="FILE", help="run file (default: named after model, k, p, seed)")
    add("--save-every", type=int, default=0, metavar="STEPS", help="default: at the end only")
    add("--resume", metavar="FILE", help="go on with a saved run, to FILE unless --out is given")
    add("--benchmark", action="store_true", help="time the step, then stop")
    return vars(parser.parse_args(argv))


RULES = {"mlp": {}, "control-variate": {"control_variate": True}, "max-margin": {
    "max_margin": True}, "attention": {"model": "attention"}, "transformer": {
    "model": "transformer"}}


def defaults(name):
    """The default values of a setting, in words: of each rule of training that has it, and for
    which k and p if it depends on them."""
    if name == "model":
        return "mlp"
    rules_of = {}
    for rule, given in RULES.items():
        config, other = fc.complete(given), fc.complete(given | {"k": 5, "p": 7})
        if name in config:
            value = config[name]
            text = f"{value:.6g}" if isinstance(value, float) else f"{value}"
            if other[name] != value and name not in ("k", "p"):
                text += f" at k={config['k']} p={config['p']}"
            rules_of.setdefault(text, []).append(rule)
    if len(rules_of) == 1:
        return next(iter(rules_of))
    return ", ".join(f"{text} ({', '.join(rules)})" for text, rules in rules_of.items())


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


def command(script, *words):
    """The command that runs one of our scripts, to be pasted where it is printed."""
    here = os.path.dirname(os.path.abspath(__file__))
    usual = shutil.which("python") == sys.executable
    python = "python" if usual else relative(sys.executable)
    return " ".join(map(shell_word, (python, relative(os.path.join(here, script)), *words)))


def relative(path):
    """The path from here; the whole path where there is none, as between two drives of Windows, or
    in a directory that is gone."""
    try:
        return os.path.relpath(path)
    except (OSError, ValueError):
        return path


def shell_word(text):
    """A word for a shell; in bash's $'..' if the terminal cannot show it."""
    with contextlib.suppress(UnicodeEncodeError):
        text.encode(getattr(sys.stdout, "encoding", None) or "ascii")
        if text.isprintable():
            return shlex.quote(text)
    return "$'" + "".join(f"\\x{byte:02x}" for byte in os.fsencode(text)) + "'"


def settings(flags):
    """The settings that the flags ask for, with those of --figure."""
    figure = flags.pop("figure", None)
    flags = {**FIGURES.get(figure, {}), **flags}
    if figure == 4 and "p" not in flags:
        if flags["k"] not in FIGURE_4_P:
            raise fc.BadInput(f"Figure 4 has k = 2, 3, 4 and 5, not {flags['k']}; give --p too")
        flags["p"] = FIGURE_4_P[flags["k"]]
    return flags


def resumed(path, flags):
    """The run in a file. Raises BadInput if the flags ask for another one."""
    run = fc.load_run(path)
    for name, value in flags.items():
        if value != run.config.get(name):
            raise fc.BadInput(f"--{name.replace('_', '-')} {value} disagrees with the run in "
                              f"{path}: {run.config.get(name)}; leave it out to go on")
    return run


def main(argv):
    flags = parse(argv)
    device, threads, out, save_every, resume, timing = (flags.pop(name, None) for name in (
        "device", "threads", "out", "save_every", "resume", "benchmark"))
    if save_every < 0:
        raise fc.BadInput(f"--save-every must be 0 or more steps, not {save_every}")
    flags = settings(flags)
    again = f" --save-every {save_every}" * bool(save_every)
    again += f" --device {device}" * (device != "cpu") + f" --threads {threads}" * bool(threads)
    with machine(device, threads):
        run = resumed(resume, flags) if resume else fc.new_run(fc.complete(flags))
        if timing:
            benchmark(run.config)
        else:
            train_and_report(run, out, resume, save_every, again)
    return 0


def train_and_report(run, out, resume, save_every, again):
    """Train a run, which came from the file `resume` if it is one, save it in the file `out` and
    print its report. again: the flags with which to go on after a stop."""
    out = out or resume or default_name(run.config)
    out = os.path.join(".", out) if out.startswith("-") else out
    finished = False
    if not resume:
        finished = claim(out, run)
    elif os.path.exists(out) and os.path.realpath(out) != os.path.realpath(resume):
        raise fc.BadInput(f"{out} exists; choose another --out")
    else:
        fc.save_run(out, run, keep=not os.path.exists(out))
    again = command("train.py", "--resume", out) + again
    with Guard(run, out, save_every, again, not finished) as guard:
        train(run, guard)
        problem = guard.finish()
    print_report(report(run))
    if problem:
        raise problem
    print(f"  saved to {out}; look inside with\n  {command('analyze.py', out)}")


def default_name(config):
    """The name of a run's file."""
    kind = [rule for rule in ("control-variate", "max-margin")
            if config.get(rule.replace("-", "_"))] or [config["model"]]
    return f"{kind[0]}-k{config['k']}-p{config['p']}-seed{config['seed']}.npz"


if __name__ == "__main__":
    run_main(main)
