"""What the programs share: flags, device, messages and files, and the folder of a run.

A run's folder has config.json (every flag), checkpoint.pt (the state after the last finished epoch,
and the log), log.jsonl (that log, to read: a line per epoch) and, at the end, its result.
"""
import argparse
import datetime
import fcntl
import io
import json
import math
import os
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

RANK, WORLD, LOCAL_RANK = 0, 1, 0                           # a cluster's own RANK is ignored
if dist.is_torchelastic_launched():                         # by torchrun, which sets all of them
    RANK, WORLD, LOCAL_RANK = map(int, map(os.getenv, ("RANK", "WORLD_SIZE", "LOCAL_RANK")))


# ---------------------------------------------------------------- flags

class Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """The description as it is written, and each flag's default, if it has one."""
    def _get_help_string(self, action):
        return super()._get_help_string(action) if action.default else action.help


def Parser(program, **options):
    """argparse without abbreviations. Its errors are one line, as there is no usage text."""
    parser = argparse.ArgumentParser(
        program, argparse.SUPPRESS, allow_abbrev=False, formatter_class=Help, **options)
    parser.set_defaults(program=program, processes=WORLD)
    return parser


def number(kind, low, high=2**31 - 1):
    """A type for argparse: an int or float from `low` to `high`."""
    def read(text):
        value = kind(text)
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"it must be from {low} to {high}, not {text}")
        return value
    read.__name__ = kind.__name__                           # for argparse's "invalid int value"
    return read


natural, positive_int, fraction = number(int, 0), number(int, 1), number(float, 0, 1)
non_negative, positive = number(float, 0), number(float, 1e-9)


def parse_flags(parser, arguments, defaults):
    """The flags; with --resume FOLDER those in its config.json, of which few may be changed.

    defaults(args): {flag: default} where it depends on other flags. By default a run's folder is
    named after its program, the switches that are on, time and process: each run has its own.
    """
    args = parser.parse_args(arguments)
    if args.resume is None:
        parser.set_defaults(**defaults(args))
        args = parser.parse_args(arguments)
        program = parser.prog.removesuffix(".py").split()
        switches = [flag for flag, value in vars(args).items() if value is True]
        name = "-".join([*program, *switches, time.strftime("%m%d-%H%M%S"), str(os.getpid())])
        args.out = args.out or f"runs/{name}"
        return args
    folder = Path(args.resume)
    folder = folder.parent if folder.is_file() else folder
    saved = read_json(folder / "config.json") | {"out": str(folder), "resume": args.resume}
    now = saved | {"program": parser.prog, "processes": WORLD}
    args = parser.parse_args(arguments, argparse.Namespace(**now))
    for flag, value in vars(args).items():
        was = saved.get(flag, "unknown")
        if flag not in ("data", "device", "proxy", "workers") and value != was:
            raise SystemExit(f"{folder} is a run with {flag} {was}, not {value}: resume it as it "
                             f"was, or start a new one")
    return args


def add_run_flags(parser):
    add = parser.add_argument_group("the run").add_argument
    add("--device", help="torch device (default: CUDA if there is any, else the CPU)")
    add("--amp", action="store_true", help="bfloat16 and TF32: other numbers, faster on some GPUs")
    add("--workers", type=natural, default=4, help="processes that read ImageNet")
    add("--out", help="run folder (default: a new one in runs/)")
    add("--resume", metavar="FOLDER",
        help="continue a run; --data, --proxy, --device and --workers may change")


# ---------------------------------------------------------------- device

def find_device(name):
    """The torch.device `name`, by default CUDA if there is any; under torchrun one's own GPU."""
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        if device.type == "cuda" and WORLD > 1:
            device = torch.device("cuda", LOCAL_RANK)
            torch.cuda.set_device(device)                   # before anything touches GPU 0
        torch.zeros(1, device=device).item()
    except Exception as error:                              # each kind fails in its own way
        raise SystemExit(f"--device {name}: {reason(error)}; try --device cpu") from None
    return device


def device_name(device):
    """The name of the hardware, such as "Tesla V100-SXM2-16GB" or "x86_64 cpu"."""
    cuda = device.type == "cuda"
    return torch.cuda.get_device_name(device) if cuda else f"{os.uname().machine} {device.type}"


# ---------------------------------------------------------------- messages and files

def say(text, file=None):
    if RANK == 0:
        print(text, file=file, flush=True)


def reason(error):
    """What an error says, in one line."""
    text = getattr(error, "strerror", None) or str(error).strip() or type(error).__name__
    return text.splitlines()[0]


def write(path, content):
    """Rank 0 writes a text, bytes, or a dict as a .pt file, all or nothing: by a temporary file."""
    if RANK > 0:
        return
    temporary, buffer = Path(f"{path}.{os.getpid()}.tmp"), io.BytesIO()
    if isinstance(content, dict):
        torch.save(content, buffer)
    else:
        buffer.write(content if isinstance(content, bytes) else f"{content}\n".encode())
    try:
        with open(temporary, "wb") as file:
            file.write(buffer.getbuffer())
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        raise SystemExit(f"{path} cannot be written ({reason(error)})") from None
    finally:
        temporary.unlink(missing_ok=True)


def read_json(path):
    """The object in a JSON file that one of the programs wrote."""
    try:
        return dict(json.loads(Path(path).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise SystemExit(f"{path} cannot be read ({reason(error)})") from None


def load_checkpoint(path):
    """The dict of tensors and plain values in a .pt file."""
    try:
        return dict(torch.load(path, map_location="cpu", weights_only=True))
    except Exception as error:                              # torch has no one error for a bad file
        raise SystemExit(f"{path} is not a readable checkpoint ({type(error).__name__})") from None


# ---------------------------------------------------------------- the run

class Run:
    """A run's folder. epoch: how many are finished. log: a record of each. result: its last file.

    A lock on config.json keeps every other program out; the system takes it back from a program
    that ends, however it ends. What has no checkpoint yet may be taken by a new start.
    """

    def __init__(self, args, result):
        self.args, self.epoch, self.log, self.folder = args, 0, [], Path(args.out)
        self.result, self.checkpoint = self.folder / result, self.folder / "checkpoint.pt"

    def take(self, config):
        """Locks and writes config.json. SystemExit if the folder is not free or not writable."""
        if self.result.exists():
            raise SystemExit(f"{self.folder} holds a finished run; a new one needs another --out")
        new, used = self.args.resume is None, any(self.folder.glob("*"))
        begun = config.exists() and read_json(config).get("program") == self.args.program
        if new and used and (not begun or any(self.folder.rglob("checkpoint.pt"))):
            raise SystemExit(f"{self.folder} is in use: choose another --out, or --resume a run")
        try:
            self.folder.resolve().mkdir(parents=True, exist_ok=True)    # a link's may be missing
            self.lock = open(config, "a+")                  # locked as long as this file is open
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise SystemExit(f"{self.folder} is in use by a running program") from None
        except OSError as error:
            raise SystemExit(f"{self.folder} cannot be written ({reason(error)})") from None
        if new:
            self.lock.truncate(0)
            self.lock.write(json.dumps(vars(self.args), indent=1))
            self.lock.flush()

    def begin(self, parts, facts):
        """Makes the folder, now that all is read; loads the checkpoint, if there is one.

        parts: {name: what has a state_dict}. facts: plain values that a resumed run must share.
        """
        self.parts, self.facts = parts, facts
        if RANK == 0:
            self.take(self.folder / "config.json")
        if self.args.resume is not None and self.checkpoint.exists():
            self.load()

    def load(self):
        saved = load_checkpoint(self.checkpoint)
        try:
            check_facts(self.checkpoint, saved["facts"], self.facts)
            for name, part in self.parts.items():
                part.load_state_dict(saved[name])
            self.epoch, self.log = saved["epoch"], saved["log"]
        except Exception as error:                          # each part fails in its own way
            raise SystemExit(f"{self.checkpoint} does not fit this run ({reason(error)})") from None

    def end_epoch(self, record):
        """Logs an epoch, and saves what the next one starts from; with --keep_nets the network."""
        numbers = [value for value in record.values() if isinstance(value, float)]
        weights = self.parts["net"].parameters()
        if not (all(map(math.isfinite, numbers)) and all(w.isfinite().all() for w in weights)):
            raise SystemExit(f"a loss or a weight is not finite after epoch {self.epoch}: try a "
                             f"smaller --learning_rate, in a new run")
        self.log, self.epoch = [*self.log, record], self.epoch + 1
        states = {name: part.state_dict() for name, part in self.parts.items()}
        if vars(self.args).get("keep_nets"):
            write(self.folder / f"net-{self.epoch}.pt", states["net"])
        write(self.folder / "log.jsonl", "\n".join(map(json.dumps, self.log)))
        write(self.checkpoint,
              {"epoch": self.epoch, "log": self.log, "facts": self.facts, **states})


def check_facts(path, saved, facts):
    """SystemExit if the images of `path` are not those that there are now: its facts differ."""
    for name, now in facts.items():
        if saved[name] != now and name == "classes":
            names = ", ".join(sorted({*saved[name]} ^ {*now})) or "in their order"
            raise SystemExit(f"{path}: the classes differ ({names:.80})")
        if saved[name] != now:
            raise SystemExit(f"{path}: the {name} was {saved[name]}, and is {now}")


def start(main):
    """Runs main(arguments). What the user can mend ends in one line, and a status that is not 0."""
    try:
        if WORLD > 1:                                       # a day: one process may be downloading
            backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
            dist.init_process_group(backend, timeout=datetime.timedelta(days=1))
        main(sys.argv[1:])
        sys.stdout.flush()
        if WORLD > 1:
            dist.destroy_process_group()
    except BrokenPipeError:                                 # of `| head`: nobody reads on
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except OSError as error:
        raise SystemExit(str(error)) from None
    except KeyboardInterrupt:                               # Python then dies of the signal
        sys.tracebacklimit = 0
        raise KeyboardInterrupt("continue a run with --resume FOLDER") from None
    except torch.OutOfMemoryError as error:
        raise SystemExit(f"{reason(error)} Try a smaller --batch_size") from None
    except RuntimeError as error:
        if "by peer" not in str(error):                     # another process of torchrun has left,
            raise                                           # and has said why
        sys.exit(1)
