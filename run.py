"""What the programs share to keep a run: flags, device, metrics, files, signals.

A run folder holds config.json (every flag), log.jsonl (a line per epoch), checkpoint.pt (after every epoch) and, once the
run has ended, its result. A folder without a checkpoint is not a run yet: it may be started anew.
"""
import argparse
import hashlib
import json
import math
import os
import platform
import signal
import sys
import warnings
from datetime import timedelta
from pathlib import Path

import torch

LOOK_EVERY = 20                                             # steps between two looks at the loss: each waits for the device
stop = None                                                 # why to leave between two steps: a signal's number or an Exit


class Exit(Exception):
    """Ends the program with one line on stderr. Status 2: something to mend and start again; 1: the training failed."""

    def __init__(self, message, status=2):
        super().__init__(message)
        self.status = status


def start(program, main):
    """Runs main(arguments) and exits: mistakes, failures and Ctrl-C end in one line, without a traceback."""
    try:
        sys.exit(main(sys.argv[1:]))
    except Exit as error:
        status, message = error.status, str(error)
    except KeyboardInterrupt:                               # before or after the training, which only notes it
        status, message = 128 + signal.SIGINT, "interrupted"
    except BrokenPipeError:                                 # as in `python search.py | head`
        status, message = 128 + signal.SIGPIPE, "nobody reads stdout any more"
        sys.stdout = open(os.devnull, "w")
    if message:
        print(f"{program}: {message}", file=sys.stderr)
    sys.exit(status)


def reason(error):
    """The first line of what an error says."""
    return getattr(error, "strerror", None) or (str(error).splitlines() or [type(error).__name__])[0]


# ---------------------------------------------------------------- flags

class Parser(argparse.ArgumentParser):
    """argparse without abbreviations, and with its errors in one line."""

    def __init__(self, program, **options):
        super().__init__(program, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **options)

    def error(self, message):
        raise Exit(f"{message} (see --help)")


def number(kind, low, high=2**31 - 1, above=False):
    """A type for argparse: an int or float from `low` (with `above`: greater than it) to `high`."""
    limits = f"{'above' if above else 'from'} {low}" + (f" to {high}" if high < 2**31 - 1 else "")

    def read(text):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if low < value <= high or (value == low and not above):
            return value
        raise argparse.ArgumentTypeError(f"it must be a {'whole ' if kind is int else ''}number {limits}, not {text!r}")
    return read


def keep_settings(parser, folder, arguments):
    """The flags of the run in `folder`: its config.json gives the defaults, and only --data and --device may differ."""
    config = folder / "config.json"
    try:
        saved = json.loads(config.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise Exit(f"{config} cannot be read ({reason(error)})") from None
    if not isinstance(saved, dict) or saved.pop("program", None) != parser.prog:
        raise Exit(f"{folder} is not a run of {parser.prog}")
    saved["out"] = str(folder)
    words = [f"--{flag}={value}" for flag, value in saved.items() if value not in (None, True, False) and flag != "processes"]
    try:
        parser.parse_args(words)                            # argparse checks no defaults that are not text
    except Exit as error:
        raise Exit(f"{config}: {error}") from None
    parser.set_defaults(**saved)
    args = parser.parse_args(arguments)
    for flag, value in saved.items():
        if flag not in ("data", "device") and getattr(args, flag) != value:
            raise Exit(f"--{flag} {getattr(args, flag)} differs from {value} in {config}: a run keeps its settings; leave "
                       f"the flag out, or start a new run with another --out")
    return args


# ---------------------------------------------------------------- device and numbers

def find_device(name):
    """The torch.device `name`, by default CUDA if there is any; under torchrun the GPU of this process's LOCAL_RANK."""
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        if device.type == "cuda" and "LOCAL_RANK" in os.environ:
            device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
            torch.cuda.set_device(device)                   # before anything touches GPU 0
        torch.zeros(1, device=device).item()
    except Exception as error:                              # each kind of device fails in its own way
        raise Exit(f"--device {name} cannot be used here ({reason(error)}); try --device cpu") from None
    return device


def device_name(device):
    """What results say of where they were made, such as "Tesla V100-SXM2-16GB" or "x86_64 cpu"."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"{platform.machine()} {device.type}"


def precision(amp, device):
    """(context of the forward pass, memory format of images and weights): float32 or, with `amp`, bfloat16 and TF32.

    channels_last makes depthwise convolutions 4 to 5 times faster on the CPU. On CUDA it serves half precision only:
    in float32 cuDNN's are known to be slow (pytorch/pytorch #22302, #34977). We have not measured it on a GPU.
    """
    torch.backends.cudnn.benchmark = True
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = amp
    channels_last = device.type == "cpu" or (device.type == "cuda" and amp)
    return (lambda: torch.autocast(device.type, torch.bfloat16, enabled=amp),
            torch.channels_last if channels_last else torch.contiguous_format)


def make_seed(*parts):
    """One seed from numbers and words, such as (seed, "order", epoch). Other parts give another seed."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "big")


def metrics(loss, logits, labels):
    """(loss, top-1 correct, top-5 correct, images) summed over a batch, on the device. loss: the mean over the batch."""
    correct = logits.topk(min(5, logits.shape[1])).indices == labels[:, None]  # (B, 5); fewer where there are fewer classes
    images = torch.full_like(loss, len(labels), dtype=torch.float32)
    return torch.stack([loss.detach() * images, correct[:, 0].sum(), correct.sum(), images])


def means(totals):
    """Mean loss, and top-1 and top-5 accuracy in percent, of summed metrics(). Waits for the device."""
    loss, top1, top5, images = totals.tolist()
    return loss / images, 100 * top1 / images, 100 * top5 / images


# ---------------------------------------------------------------- files

def save(path, write):
    """Calls write(file) on a temporary file, then moves it to `path`. On any error the old file stays as it was."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:                # torch.save turns a full disk into a RuntimeError
        raise Exit(f"cannot write {path} ({reason(error)}): make room, or choose another --out") from None
    finally:
        if temporary.exists():
            temporary.unlink()


def save_text(path, text):
    save(path, lambda file: file.write(text.encode() + b"\n"))


def load_checkpoint(path):
    """The dict of tensors and plain values in a .pt file."""
    try:
        with warnings.catch_warnings(action="ignore"):      # torch's, of pickles that are no checkpoints
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:                              # whatever such a file makes torch raise
        raise Exit(f"{path} is no checkpoint that can be read ({getattr(error, 'strerror', type(error).__name__)})") from None
    if not isinstance(state, dict):
        raise Exit(f"{path} is no checkpoint of this program")
    return state


# ---------------------------------------------------------------- the run

def note_signal(signum, frame):
    """Only takes a note, so that nothing is cut short; a second signal ends the process at once."""
    global stop
    stop = signum
    for each in (signal.SIGINT, signal.SIGTERM):
        signal.signal(each, signal.SIG_DFL)
    if os.environ.get("RANK", "0") == "0":                  # under torchrun one process speaks
        os.write(2, b"\nstopping after this step; a second signal stops at once\n")


class Run:
    """A run folder. `epoch` counts its finished epochs; `result` is the file that marks the end.

    how_to_resume: the command, for messages. main: False in the processes of torchrun that neither write nor speak.
    unit: what messages call an epoch. part: of a larger run, which is resumed even before this one's first epoch.
    """

    def __init__(self, program, args, result, how_to_resume, main=True, unit="epoch", part=False):
        self.unit, self.part = unit, part
        self.program, self.args, self.how_to_resume, self.main, self.epoch = program, args, how_to_resume, main, 0
        self.folder, self.log = Path(args.out), []
        self.checkpoint, self.result = self.folder / "checkpoint.pt", self.folder / result
        self.check_folder()

    def check_folder(self):
        """Raises Exit for what this run must not overwrite, and for a run to resume that is not there."""
        if self.result.exists():
            raise Exit(f"{self.folder} holds a finished run ({self.result.name}): choose another --out, or delete the folder")
        if self.args.resume is None and self.checkpoint.exists():
            raise Exit(f"{self.folder} holds an unfinished run: resume with {self.how_to_resume}, or choose another --out")
        if self.args.resume is not None and not self.checkpoint.exists():
            raise Exit(f"{self.folder} has no finished {self.unit} to resume from: start the run again, without --resume")
        if self.args.resume is None and self.folder.is_dir() and not set(os.listdir(self.folder)) <= {"config.json.tmp"}:
            config = self.folder / "config.json"            # a start of this program that failed may be overwritten
            ours = config.is_file() and f'"program": "{self.program}"' in config.read_text(errors="replace")
            if not ours or any(path.is_dir() for path in self.folder.iterdir()):             # R-DARTS has runs within
                raise Exit(f"{self.folder} holds something else: choose another --out")

    def begin(self, parts):
        """Makes the folder or resumes. parts: {name: what has a state_dict}. Returns the checkpoint, empty for a new run."""
        self.parts, saved = parts, {}
        if self.args.resume is not None:
            saved = load_checkpoint(self.checkpoint)
            try:
                for name, part in parts.items():
                    part.load_state_dict(saved[name])
                self.epoch = saved["epoch"]
                self.log = (self.folder / "log.jsonl").read_text().splitlines()[:self.epoch]
            except (OSError, RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:
                raise Exit(f"{self.checkpoint} does not fit this run ({type(error).__name__}: {reason(error)})") from None
        elif self.main:
            flags = {flag: value for flag, value in vars(self.args).items() if flag not in ("resume", "evaluate")}
            save_text(self.folder / "config.json", json.dumps({"program": self.program, **flags}, indent=1))
        signal.signal(signal.SIGINT, note_signal)
        signal.signal(signal.SIGTERM, note_signal)
        return saved

    def reason_to_stop(self):
        """The Exit with which to leave between two steps, or None."""
        if not isinstance(stop, int):
            return stop
        go_on = f"resume with {self.how_to_resume}" if self.epoch or self.part else "start it again"
        return Exit(f"interrupted ({signal.Signals(stop).name}) after {self.epoch} finished {self.unit}(s); {go_on}", 128 + stop)

    def look(self):
        """Leaves if there is a reason to."""
        error = self.reason_to_stop()
        if error:
            raise error

    def step(self, step, steps, totals):
        """After a training step. Now and then: is the loss, totals[0], still finite? On a terminal, how far are we?"""
        global stop
        if (step + 1) % LOOK_EVERY == 0 or step + 1 == steps:
            loss, _, _ = means(totals)                      # waits for the device
            if not math.isfinite(loss):
                stop = self.diverged(f"the loss is not finite by step {step} of {self.unit} {self.epoch}")
            if self.main and sys.stdout.isatty():
                print(f"\r{self.unit} {self.epoch} step {step + 1}/{steps} loss {loss:.4f}\x1b[K\r", end="", flush=True)

    def diverged(self, what):
        return Exit(f"{what}; log and checkpoint end with the {self.unit} before. A smaller --learning_rate may help, in a new run "
                    f"with another --out", status=1)

    def end_epoch(self, record, **state):
        """Logs a finished epoch and saves what the next one starts from: the parts and `state`. Raises Exit if it diverged."""
        finite = torch.stack([p.isfinite().all() for p in self.parts["net"].parameters()]).all()
        if not (finite and all(math.isfinite(value) for value in record.values() if isinstance(value, float))):
            raise self.diverged(f"a loss or a parameter is not finite at the end of {self.unit} {self.epoch}")
        self.epoch += 1
        self.log.append(json.dumps(record, allow_nan=False))
        if self.main:
            save_text(self.folder / "log.jsonl", "\n".join(self.log))
            state |= {"epoch": self.epoch, **{name: part.state_dict() for name, part in self.parts.items()}}
            save(self.checkpoint, lambda file: torch.save(state, file))

    def say(self, text):
        if self.main:
            print(text, flush=True)


def clock(seconds):
    return str(timedelta(seconds=int(seconds)))
