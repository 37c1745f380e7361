"""What search.py and retrain.py share: flags, run folder, checkpoints, resuming, progress and signals.

A run folder holds config.json (every flag), log.jsonl (one line an epoch), checkpoint.pt (after every epoch) and, once
the run has ended, its result. Every file but the log, which grows by whole lines, is written beside its place and then
moved there, so none is ever half written.
"""
import argparse
import json
import math
import os
import shlex
import signal
import sys
import time
from pathlib import Path

import numpy as np
import torch

MAY_CHANGE = {"device", "data"}                             # flags that a resumed run may be given anew
CHECK_EVERY = 50                                            # steps between two looks at the losses (a host sync each)


class Exit(Exception):
    """Ends the program with one line on stderr. Status 2: the user's mistake; 1: the run failed.

    alone: only this process of torchrun's knows of it, so it speaks whatever its rank.
    """

    def __init__(self, message, status=2, alone=False):
        super().__init__(message)
        self.status, self.alone = status, alone or status == 1


class Interrupted(BaseException):
    """A signal; no `except Exception` swallows it. Exit status: 128 + its number."""
    alone = False                                           # every process gets it

    def __init__(self, message, status):
        super().__init__(message)
        self.status = status


# ---------------------------------------------------------------- flags

class Parser(argparse.ArgumentParser):
    """Flags without their defaults, so that the program can tell which were given; errors in one line."""

    def __init__(self, **options):
        super().__init__(allow_abbrev=False, argument_default=argparse.SUPPRESS,
                         formatter_class=argparse.RawDescriptionHelpFormatter, **options)

    def error(self, message):
        raise Exit(f"{message} (see --help)")

    def setting(self, flag, kind, help):
        """kind: bool for a switch, a tuple of choices, or a function of the text such as `number(int, 1)`."""
        if kind is bool:
            self.add_argument(flag, action="store_true", help=help)
        elif isinstance(kind, tuple):
            self.add_argument(flag, choices=kind, help=help)
        else:
            self.add_argument(flag, type=kind, metavar=getattr(kind, "metavar", "NAME"), help=help)


def number(kind, low, high=2**31 - 1, above=False):
    """A function that reads an int or float from `low` (or, with `above`, from above it) to `high`."""
    def read(text):
        try:
            value = kind(text)
            if low <= value <= high and math.isfinite(value) and not (above and value == low):
                return value
        except ValueError:
            pass
        limits = (f"above {low}" if above else f"from {low}") + (f" to {high}" if high < 2**31 - 1 else "")
        raise argparse.ArgumentTypeError(f"it must be {'a whole' if kind is int else 'a'} number {limits}, not {text!r}")
    read.metavar = "N" if kind is int else "X"
    return read


def kept_settings(parser, folder, given, defaults):
    """The flags of the run in `folder`. One given anew must say the same, except those of MAY_CHANGE.

    defaults: function from the given flags to all flags, as in the programs.
    """
    config = read_json(folder / "config.json")
    if not isinstance(config, dict) or config.pop("program", None) != parser.prog:
        raise Exit(f"{folder} is not a run of {parser.prog}")
    try:
        config = defaults(vars(parser.parse_args(flags_of(config))))
    except Exit as error:
        raise Exit(f"{folder / 'config.json'}: {error}") from None
    for flag, value in given.items():
        if flag not in MAY_CHANGE and config.get(flag) != value:
            raise Exit(f"--{flag} {value} differs from {config.get(flag)} in {folder / 'config.json'}: a run that goes on "
                       f"keeps its settings; leave the flag out, or start another run with --out")
    return {**config, **given, "out": str(folder)}


def flags_of(config):
    """The command line that gives these flags, as a list of words."""
    words = []
    for flag, value in config.items():
        if value is not None and value is not False:
            words += [f"--{flag}", *([] if value is True else map(str, value if isinstance(value, list) else [value]))]
    return words


def launcher():
    """How this program was started: `python`, or torchrun with its number of processes."""
    if "LOCAL_WORLD_SIZE" not in os.environ:
        return "python"
    machines = int(os.environ["WORLD_SIZE"]) // int(os.environ["LOCAL_WORLD_SIZE"])
    nodes = f"--nnodes={machines} " if machines > 1 else ""
    return f"torchrun {nodes}--nproc_per_node={os.environ['LOCAL_WORLD_SIZE']}"


def find_device(name):
    """The torch.device called `name`, or, without a name, CUDA if there is any."""
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.zeros(1, device=device).item()
    except Exception as error:                              # each kind of device fails in its own way
        raise Exit(f"--device {name} cannot be used here ({first_line(error)}); try --device cpu") from None
    torch.backends.cudnn.benchmark = True
    return device


def precision(amp, device):
    """A context for the forward pass: float32 throughout or, with `amp`, bfloat16 autocast and TF32."""
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = amp
    return lambda: torch.autocast(device.type, torch.bfloat16, enabled=amp)


def first_line(error):
    """An error's message without what follows its first line."""
    return (str(error).splitlines() or [type(error).__name__])[0]


def mix(*numbers):
    """One seed from several whole numbers, such as (seed, epoch, rank)."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0])


# ---------------------------------------------------------------- files

def write_file(path, write):
    """Calls write(file) on a temporary file and moves it to `path`; on any error the old file stays, the new goes.

    A signal waits for the end of it: torch.save would turn it into an error of its own.
    """
    path = Path(path)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    Signals.held += 1
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
        Signals.held -= 1
    Signals.deliver()


def write_text(path, text):
    write_file(path, lambda file: file.write(text.encode() + b"\n"))


def write_json(path, value):
    write_text(path, json.dumps(value, indent=1, allow_nan=False))


def read_json(path):
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise Exit(f"{path} cannot be read ({getattr(error, 'strerror', None) or error})") from None


def save_checkpoint(path, state):
    """Writes tensors and plain values. Raises ValueError for anything that `weights_only=True` would refuse to load."""
    def write(file):
        torch.save(state, file)
        file.flush()
        unsafe = torch.serialization.get_unsafe_globals_in_checkpoint(file.name)
        if unsafe:
            raise ValueError(f"{path}: a checkpoint may hold tensors and plain values only, not {', '.join(unsafe)}")
    write_file(path, write)


def load_checkpoint(path, keys=()):
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:                              # whatever a file that is no checkpoint makes torch raise
        reason = getattr(error, "strerror", None) or type(error).__name__
        raise Exit(f"{path} is no checkpoint that can be read ({reason})") from None
    if not isinstance(state, dict) or not all(isinstance(key, str) for key in state):
        raise Exit(f"{path} is no checkpoint of this program")
    missing = [key for key in keys if key not in state]
    if missing:
        raise Exit(f"{path} is no checkpoint of this program: it lacks {', '.join(missing)}")
    return state


def restore(parts, saved, path):
    """Loads every part (network, optimizers, schedule) from a checkpoint's state."""
    try:
        for name, part in parts.items():
            part.load_state_dict(saved[name])
    except (RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise Exit(f"{path} does not fit this network ({type(error).__name__})") from None


class Run:
    """A run folder. `resumed` goes on with what is there; otherwise a run that is already there is left alone.

    result: the file name that marks a finished run. writes: False for the processes that only compute.
    """

    def __init__(self, program, config, result, resumed, writes=True):
        self.folder, self.writes, self.epoch = Path(config["out"]), writes, 0
        self.checkpoint, self.result = self.folder / "checkpoint.pt", self.folder / result
        self.resume_command = f"{launcher()} {program} --resume {shlex.quote(config['out'])}"
        try:
            self.refuse_what_is_there({"program": program, **config}, resumed)
            if writes:
                self.folder.mkdir(parents=True, exist_ok=True)
                write_json(self.folder / "config.json", {"program": program, **config})
        except OSError as error:
            raise Exit(f"cannot write in {self.folder} ({error.strerror}): choose another --out") from None

    def refuse_what_is_there(self, config, resumed):
        """Raises Exit for a finished run and, unless resumed, for whatever is not a run of these flags without an epoch."""
        if self.result.exists():
            raise Exit(f"{self.folder} holds a finished run ({self.result.name}): choose another --out")
        if not resumed and self.checkpoint.exists():
            raise Exit(f"{self.folder} holds an unfinished run: go on with `{self.resume_command}`, "
                       f"or choose another --out")
        there = self.folder / "config.json"
        if not resumed and (there.exists() and read_json(there) != config or
                            not there.exists() and (self.folder / "log.jsonl").exists()):
            raise Exit(f"{self.folder} holds something else (config.json or log.jsonl): choose another --out")

    def load(self, keys):
        """The last checkpoint, or None if there is none yet. Drops log lines that are younger than it."""
        state = load_checkpoint(self.checkpoint, ("epoch", *keys)) if self.checkpoint.exists() else None
        self.epoch = state["epoch"] if state else 0
        if self.writes:
            log = self.folder / "log.jsonl"
            lines = log.read_bytes().splitlines(keepends=True)[:self.epoch] if log.exists() else []
            write_file(log, lambda file: file.writelines(lines))
        return state

    def end_epoch(self, record, state):
        """Logs a finished epoch and saves the state from which the next one starts."""
        if self.writes:
            try:
                with open(self.folder / "log.jsonl", "a", encoding="utf-8") as log:
                    log.write(json.dumps(record, allow_nan=False) + "\n")
                save_checkpoint(self.checkpoint, {"epoch": self.epoch + 1, **state})
            except (OSError, RuntimeError) as error:        # torch.save turns a full disk into a RuntimeError
                reason = getattr(error, "strerror", None) or first_line(error)
                raise Exit(f"cannot write in {self.folder} ({reason}); with room there, go on with: {self.resume_command}",
                           status=1) from None
        self.epoch += 1


# ---------------------------------------------------------------- progress

class Progress:
    """The line that is rewritten within an epoch, if stdout is a terminal. `steps` is the length of an epoch."""

    def __init__(self, epochs, steps, batch_size, shown=True):
        self.epochs, self.steps, self.batch_size, self.shown = epochs, steps, batch_size, shown
        self.start, self.drawn, self.done = time.time(), 0.0, 0
        self.terminal = shown and sys.stdout.isatty()

    def step(self, epoch, step, meter):
        """Called after every step. Looks at the losses now and then, so that a diverged run ends early."""
        self.done += 1
        now = time.time()
        draw = self.terminal and now - self.drawn > 1
        if draw or step % CHECK_EVERY == CHECK_EVERY - 1:
            loss = meter.loss_so_far(epoch, step)
        if draw:
            per_step, self.drawn = (now - self.start) / self.done, now
            left = per_step * ((self.epochs - epoch) * self.steps - step - 1)
            print(f"\repoch {epoch} step {step + 1}/{self.steps} loss {loss:.4f} {self.batch_size / per_step:.0f} "
                  f"images/s, {clock(left)} left\x1b[K", end="", flush=True)

    def line(self, text):
        if self.shown:
            print(("\r\x1b[K" if self.terminal else "") + text, flush=True)


def clock(seconds):
    hours, rest = divmod(int(seconds), 3600)
    return f"{hours}:{rest // 60:02d}:{rest % 60:02d}"


class Meter:
    """Losses and right answers of an epoch, kept on the device: nothing waits for it until they are read."""

    def __init__(self, steps, device):
        self.losses, self.sizes = torch.zeros(steps, device=device), torch.zeros(steps, device=device)
        self.hits = torch.zeros(steps, 2, device=device)    # top-1, top-5

    def add(self, step, loss, logits, labels):
        """loss: mean over the batch, of logits (B, classes) and labels (B,)."""
        self.losses[step] = loss.detach()
        self.hits[step] = hits(logits.detach(), labels)
        self.sizes[step] = len(labels)

    def loss_so_far(self, epoch, step):
        losses = self.losses[:step + 1]
        if not bool(losses.isfinite().all()):               # host sync
            bad = int((~losses.isfinite()).nonzero()[0])
            raise Exit(f"the loss is not finite in epoch {epoch}, step {bad}: the checkpoint of the epoch before stays; "
                       f"a smaller --learning_rate or --larc_trust may help", status=1)
        return losses.mean().item()

    def totals(self):
        """(sum of the losses over images, top-1 hits, top-5 hits, images), in float64."""
        sizes = self.sizes.double()
        return torch.stack([(self.losses.double() * sizes).sum(), *self.hits.double().sum(0), sizes.sum()])


def check_finite(epoch, losses, net):
    """Raises Exit if a loss of this epoch, or a parameter after it, is not finite: nothing is saved then."""
    if not all(map(math.isfinite, losses)) or not all(bool(p.isfinite().all()) for p in net.parameters()):
        raise Exit(f"a loss or a parameter is not finite after the last step of epoch {epoch}: the checkpoint of the epoch "
                   f"before stays; a smaller --learning_rate may help", status=1)


def hits(logits, labels):
    """How many labels are the first, and among the first five, of their logits; tensor (2,). Top-k stops at all classes."""
    ranked = logits.topk(min(5, logits.shape[1]), dim=1).indices
    right = ranked == labels[:, None]
    return torch.stack([right[:, 0].sum(), right.any(1).sum()]).to(torch.float32)


def summary(totals):
    """The mean loss, and the top-1 and top-5 accuracy in percent, of Meter.totals()."""
    loss, top1, top5, images = totals.tolist()
    return loss / images, 100 * top1 / images, 100 * top5 / images


# ---------------------------------------------------------------- signals

class Signals:
    """SIGINT and SIGTERM as the exception Interrupted; while `held`, they wait."""
    held, waiting = 0, None

    @classmethod
    def catch(cls, number, frame):
        cls.waiting = number
        cls.deliver()

    @classmethod
    def deliver(cls):
        if cls.waiting and not cls.held:
            number, cls.waiting = cls.waiting, None
            raise Interrupted(f"interrupted ({signal.Signals(number).name})", 128 + number)


def start(program, main):
    """Runs main(arguments) and exits: user mistakes, failures and signals end in one line, without a traceback."""
    signal.signal(signal.SIGINT, Signals.catch)
    signal.signal(signal.SIGTERM, Signals.catch)
    first = os.environ.get("RANK", "0") == "0"              # under torchrun the others say what only they know
    try:
        sys.exit(main(sys.argv[1:]))
    except (Exit, Interrupted) as error:
        signal.signal(signal.SIGINT, signal.SIG_IGN)        # a second one would cut the line short
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        if first or error.alone:
            new_line = "\n" if isinstance(error, Interrupted) and sys.stdout.isatty() else ""
            print(f"{new_line}{program}: {error}", file=sys.stderr)
        sys.exit(error.status)


class resumable:
    """`with resumable(run):` adds how the run goes on to a signal's line; a reader that left stdout is a signal too."""

    def __init__(self, run):
        self.run = run

    def __enter__(self):
        return self.run

    def __exit__(self, kind, error, traceback):
        if kind is BrokenPipeError:
            sys.stdout = open(os.devnull, "w")
            error = Interrupted("interrupted (nobody reads stdout)", 128 + signal.SIGPIPE)
        if isinstance(error, Interrupted):
            raise Interrupted(f"{error} after {self.run.epoch} finished epochs; go on with: {self.run.resume_command}",
                              error.status) from None
