"""What the programs share to keep a run: flags, device, metrics, files.

A run's folder holds config.json (every flag), log.jsonl (a line per epoch), checkpoint.pt (the state after
the last epoch) and, at the end, its result.
"""
import argparse
import contextlib
import hashlib
import io
import json
import math
import multiprocessing
import os
import pickle
import platform
import signal
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist


# ---------------------------------------------------------------- flags

class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    def _get_help_string(self, action):                     # without "(default: None)" and "(default: False)"
        return super()._get_help_string(action) if action.default else action.help


class Parser(argparse.ArgumentParser):
    """argparse without abbreviations, with defaults in its help and errors in one line."""

    def __init__(self, program, **options):
        super().__init__(program, allow_abbrev=False, formatter_class=HelpFormatter, **options)
        self.set_defaults(program=program)

    def error(self, message):
        self.exit(2, f"{self.prog}: {message} (see --help)\n")


def number(kind, low, high=2**31 - 1, above=False):
    """A type for argparse: an int or float from `low` (with `above`: greater than it) to `high`."""
    def read(text):
        value = kind(text)
        if low < value <= high or (value == low and not above):
            return value
        limits = f"{'above' if above else 'from'} {low}" + (f" to {high}" if high < 2**31 - 1 else "")
        raise argparse.ArgumentTypeError(f"it must be {limits}, not {text}")
    read.__name__ = "whole number" if kind is int else "number"             # for argparse's own message
    return read


def parse_flags(parser, arguments):
    """The flags. With --resume FOLDER, those in its config.json, of which only a few may be changed."""
    args = parser.parse_args(arguments)
    if args.resume is None:
        return args
    config = Path(args.resume) / "config.json"
    saved = {**read_json(config), "out": args.resume, "resume": args.resume}
    if saved.get("program") != parser.prog:
        raise SystemExit(f"{args.resume} is not a run of {parser.prog}")
    args = parser.parse_args(arguments, argparse.Namespace(**saved))
    for flag, value in saved.items():
        if flag not in ("data", "device", "workers") and getattr(args, flag) != value:
            raise SystemExit(f"--{flag} {getattr(args, flag)} differs from {value} in {config}: leave it "
                             f"out, or start a new run")
    return args


# ---------------------------------------------------------------- device and numbers

def find_device(name):
    """The torch.device `name`, by default CUDA if there is any; under torchrun this process's own GPU."""
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        if device.type == "cuda" and "LOCAL_RANK" in os.environ:
            device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
            torch.cuda.set_device(device)                   # before anything touches GPU 0
        torch.zeros(1, device=device).item()
    except Exception as error:                              # each kind of device fails in its own way
        raise SystemExit(f"--device {name} cannot be used here ({reason(error)}); try --device cpu") from None
    return device


def device_name(device):
    """The name of the hardware, such as "Tesla V100-SXM2-16GB" or "x86_64 cpu"."""
    cpu = f"{platform.machine()} {device.type}"
    return torch.cuda.get_device_name(device) if device.type == "cuda" else cpu


def place(net, device, amp=False):
    """Moves a network to its device, in the fastest memory format. amp: bfloat16 and TF32, not float32.

    channels_last makes depthwise convolutions 4 to 5 times faster on the CPU. On CUDA it helps half precision
    only: in float32 it is known to be slow there (pytorch/pytorch #22302, #34977). We have not measured it.
    """
    torch.backends.cudnn.benchmark = True
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = amp
    channels_last = device.type == "cpu" or (device.type == "cuda" and amp)
    net.amp = amp
    return net.to(device, memory_format=torch.channels_last if channels_last else torch.contiguous_format)


def autocast(device, amp):
    """The context in which a loss is computed."""
    return torch.autocast(device.type, torch.bfloat16) if amp else contextlib.nullcontext()


def make_seed(*parts):
    """One seed from numbers and words, such as (seed, "order", epoch). Other parts give another seed."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "big")


def metrics(loss, logits, labels):
    """(loss, top-1 correct, top-5 correct, images), summed over a batch, on the device. loss: their mean."""
    correct = logits.topk(min(5, logits.shape[1])).indices == labels[:, None]               # (B, 5)
    images = torch.full_like(loss, len(labels), dtype=torch.float32)
    return torch.stack([loss.detach() * images, correct[:, 0].sum(), correct.sum(), images])


def means(totals):
    """Mean loss, and top-1 and top-5 accuracy in percent, of summed metrics(). Waits for the device."""
    loss, top1, top5, images = totals.tolist()
    return loss / images, 100 * top1 / images, 100 * top5 / images


# ---------------------------------------------------------------- several processes, by torchrun

def join():
    """(rank, world): this process's number, and how many there are. (0, 1) without torchrun."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if world > 1 and "RANK" not in os.environ:
        raise SystemExit("WORLD_SIZE is set without torchrun: unset it, or start with torchrun")
    if world > 1 and not dist.is_initialized():
        dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    return rank, world


def check_processes(args, world):
    """Notes the number of processes among a new run's flags. A resumed run has as many as it began with."""
    if args.batch_size < 2 * world:
        raise SystemExit(f"--batch_size {args.batch_size} is too small for {world} processes: each needs two")
    if args.resume is None:
        args.processes = world
    elif args.processes != world:
        raise SystemExit(f"{args.out} is a run of {args.processes} processes, not {world}: use as many")


@contextlib.contextmanager
def one_first():
    """On each machine one process goes first, as it may download data; the others wait."""
    first = os.environ.get("LOCAL_RANK", "0") == "0"
    if not first:
        dist.barrier()
    yield
    if first and dist.is_initialized():
        dist.barrier()


def add_up(totals):
    """The sum of all processes' `totals`, in place."""
    if dist.is_initialized():
        dist.all_reduce(totals)
    return totals


def average_gradients(params):
    """Replaces gradients by their mean over all processes, in one all-reduce of all of them.

    DistributedDataParallel would do so by hooks, for one fixed set of parameters; a search has two, in turn.
    """
    if dist.is_initialized():
        gradients = [p.grad for p in params if p.grad is not None]
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        dist.all_reduce(flat)
        means = (flat / dist.get_world_size()).split([gradient.numel() for gradient in gradients])
        for gradient, mean in zip(gradients, means):
            gradient.copy_(mean.view_as(gradient))


def share_buffers(net):
    """Gives all processes the first one's running statistics, which are tested and saved."""
    if dist.is_initialized():
        for buffer in net.buffers():
            dist.broadcast(buffer, 0)


# ---------------------------------------------------------------- files

def reason(error):
    """What an error says, in one line."""
    return getattr(error, "strerror", None) or (str(error).strip() or type(error).__name__).splitlines()[0]


def write(path, content):
    """Writes bytes or a text to a temporary file, then moves it to `path`: files are always whole."""
    temporary = Path(f"{path}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content.encode() + b"\n" if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise SystemExit(f"cannot write {path} ({reason(error)}): make room, or change --out") from None
    finally:
        temporary.unlink(missing_ok=True)


def save(state, path):
    buffer = io.BytesIO()
    torch.save(state, buffer)
    write(path, buffer.getbuffer())


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
    except (OSError, EOFError, RuntimeError, ValueError, LookupError, TypeError, AttributeError,
            pickle.PickleError) as error:
        raise SystemExit(f"{path} is not a readable checkpoint ({type(error).__name__})") from None


# ---------------------------------------------------------------- the run

class Run:
    """A run's folder. epoch: how many are finished. log: a record of each. result: its last file.

    main: False in processes of torchrun that neither write nor speak. In a `with` statement, Ctrl-C says how
    to go on, and an error in the first epoch removes the folder, so that the corrected command can use it.
    """

    def __init__(self, args, result, main=True):
        self.args, self.main, self.epoch, self.log, self.claimed = args, main, 0, [], False
        self.folder = folder = Path(args.out)
        self.result, self.checkpoint = folder / result, folder / "checkpoint.pt"
        if main and self.result.exists():
            raise SystemExit(f"{folder} holds a finished run ({result}): choose another --out, or delete it")
        free = not folder.exists() or (folder.is_dir() and not os.listdir(folder))
        if main and args.resume is None and not free:
            raise SystemExit(f"{folder} is in use: choose another --out, or --resume {folder} if it is a run")

    def begin(self, parts, classes):
        """Takes the folder, or loads its checkpoint. parts: {name: what has a state_dict}. classes: names."""
        self.parts, self.classes = parts, list(classes)
        if self.args.resume is not None and self.checkpoint.exists():
            self.load()
        elif self.args.resume is None and self.main:
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                with open(self.folder / "config.json", "x") as file:    # of two starts at once, one succeeds
                    self.claimed = True
                    json.dump(vars(self.args), file, indent=1)
            except OSError as error:
                config = self.folder / "config.json"
                raise SystemExit(f"cannot make {config} ({reason(error)}): choose another --out") from None

    def load(self):
        saved = load_checkpoint(self.checkpoint)
        try:
            for name, part in self.parts.items():
                part.load_state_dict(saved[name])
            self.epoch, classes = saved["epoch"], saved["classes"]
            lines = (self.folder / "log.jsonl").read_text().splitlines()
            self.log = [json.loads(line) for line in lines[:self.epoch]]
        except (OSError, RuntimeError, ValueError, LookupError, TypeError, AttributeError) as error:
            raise SystemExit(f"{self.checkpoint} does not fit this run ({reason(error)})") from None
        if classes != self.classes:
            raise SystemExit(f"{self.checkpoint}: {differing(classes, self.classes)}")

    def end_epoch(self, record):
        """Logs a finished epoch, and saves what the next one starts from."""
        numbers = [value for value in record.values() if isinstance(value, float)]
        weights = self.parts["net"].parameters()
        if not (all(map(math.isfinite, numbers)) and all(w.isfinite().all() for w in weights)):
            raise SystemExit(f"a loss or a weight is not finite after epoch {self.epoch}: try a smaller "
                             f"--learning_rate, in a new run")
        log, epoch = [*self.log, record], self.epoch + 1
        if self.main:
            write(self.folder / "log.jsonl", "\n".join(map(json.dumps, log)))
            states = {name: part.state_dict() for name, part in self.parts.items()}
            save({"epoch": epoch, "classes": self.classes, **states}, self.checkpoint)
        self.log, self.epoch = log, epoch                   # counted when it is saved

    def say(self, text):
        if self.main:
            print(text, flush=True)

    def __enter__(self):
        return self

    def __exit__(self, kind, error, traceback):
        if kind is not None and self.claimed and self.epoch == 0:
            for name in ("config.json", "genotype.json", "proxy.json", "net-0.pt", "net-1.pt", "log.jsonl"):
                (self.folder / name).unlink(missing_ok=True)
            with contextlib.suppress(OSError):              # the folder may be a link, a disk or "."
                self.folder.rmdir()
        if kind is KeyboardInterrupt:
            go_on = f"--resume {self.folder} goes on after epoch {self.epoch - 1}"
            raise KeyboardInterrupt(f"interrupted; {go_on if self.epoch else 'start again'}") from None


def differing(classes, others):
    """How two lists of classes differ, in words."""
    only = sorted(set(classes) ^ set(others))
    return f"the classes differ ({', '.join(only[:3]) or 'in their order'}{', ...' if len(only) > 3 else ''})"


def start(main):
    """Runs main(arguments). Ctrl-C ends it in one line, and by the signal itself, as shells' loops expect."""
    try:
        main(sys.argv[1:])
        if dist.is_initialized():
            dist.destroy_process_group()
    except KeyboardInterrupt as error:
        if os.environ.get("RANK", "0") == "0":
            print(*error.args or ["interrupted"], file=sys.stderr)
        for worker in multiprocessing.active_children():    # of a DataLoader: they would be left behind
            worker.terminate()
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    except BrokenPipeError:                                 # as in `python -m experiments.tables 2 | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except RuntimeError as error:
        if "by peer" not in str(error):                     # otherwise another process of torchrun has left,
            raise                                           # and has said why
        sys.exit(1)


def progress(items, what, total):
    """Yields the items, and says every ten seconds how many are done and how long the rest will take."""
    started = said = time.time()
    for done, item in enumerate(items, start=1):
        yield item
        if time.time() - said > 10 and done < total:
            said = time.time()
            left = (said - started) / done * (total - done)
            print(f"{what}: {done} of {total}, {left:.0f} s left", file=sys.stderr, flush=True)
