"""Retraining: the network of a genotype, trained from scratch. Section 5.1, with DARTS's protocols.

    python retrain.py --genotype runs/.../genotype.json                       CIFAR-10, as in Table 1
    python retrain.py --genotype VS_DARTS --dataset imagenet --data DIR       ImageNet, as in Table 2
    torchrun --nproc_per_node=4 retrain.py --genotype VS_DARTS ...            several GPUs; also several machines
    python retrain.py --evaluate runs/.../weights.pt                          test error of a trained network

The result is the last epoch's test error. The best epoch's is logged too, under its name: best on test (optimistic).
Under torchrun --batch_size is that of all processes together, and batch norm sees its own process's share only, as in
every published recipe. Protocols: quark0/darts f276dd3, cnn/{train,train_imagenet}.py; yuhuixu1993/PC-DARTS b74702f.
"""
import os
import platform
import shlex
import statistics
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from torch.nn.parallel import DistributedDataParallel

from data import DATASETS, Batches, ImageNet, load, test_batches
from genotypes import load as load_genotype, to_json
from model import Network, count_macs, count_parameters
from run import (Exit, Meter, Parser, Progress, Run, check_finite, clock, find_device, flags_of, hits, kept_settings,
                 launcher, load_checkpoint, mix, number, precision, read_json, restore, resumable, start, summary,
                 write_file, write_json, write_text)

FLAGS = {  # flag: (kind, default, what it is); settings of the training are in PROTOCOLS
    "dataset": (tuple(DATASETS), "cifar10", "data set"),
    "data": (str, "data", "folder of the data sets; for imagenet and folder the one with train/ and val/"),
    "image_size": (number(int, 8, 512), 32, "side of the images of --dataset folder, in pixels"),
    "genotype": (str, None, "a genotype.json, or a name of `python genotypes.py`"),
    "device": (str, None, "torch device; by default CUDA, else the CPU"),
    "amp": (bool, False, "bfloat16 autocast and TF32: faster, other numbers"),
    "workers": (number(int, 0), 4, "processes that read ImageNet, for each training process"),
    "out": (str, None, "run folder; by default runs/retrain-DATASET-GENOTYPE"),
}
TRAINING = {  # flag: (kind, what it is); the defaults are in PROTOCOLS
    "epochs": (number(int, 1), "epochs"),
    "batch_size": (number(int, 2), "images of a step"),
    "layers": (number(int, 3, 1000), "cells"),
    "init_channels": (number(int, 2, 4096), "channels of the first cell"),
    "lr_scheduler": (("cosine", "exponential", "linear"), "cosine to 0; x --gamma an epoch; or linear with warmup"),
    "learning_rate": (number(float, 0), "SGD learning rate"),
    "gamma": (number(float, 0, 1, above=True), "factor an epoch of --lr_scheduler exponential"),
    "momentum": (number(float, 0, 1), "momentum"),
    "weight_decay": (number(float, 0), "weight decay"),
    "grad_clip": (number(float, 0, above=True), "largest 2-norm of the whole gradient"),
    "label_smooth": (number(float, 0, 1), "label smoothing, in training"),
    "auxiliary_weight": (number(float, 0), "weight of the auxiliary head's loss; 0: no head"),
    "drop_path_prob": (number(float, 0, 0.99), "drop-path probability after the last epoch, linear from 0"),
    "cutout_length": (number(int, 0), "side of the square cut out, in pixels; 0: none"),
}
CIFAR10 = {"epochs": 600, "batch_size": 96, "layers": 20, "init_channels": 36, "lr_scheduler": "cosine",
           "learning_rate": 0.025, "gamma": 0.97, "momentum": 0.9, "weight_decay": 3e-4, "grad_clip": 5.0,
           "label_smooth": 0.0, "auxiliary_weight": 0.4, "drop_path_prob": 0.2, "cutout_length": 16}
IMAGENET = {**CIFAR10, "epochs": 250, "batch_size": 128, "layers": 14, "init_channels": 48,
            "lr_scheduler": "exponential", "learning_rate": 0.1, "weight_decay": 3e-5, "label_smooth": 0.1,
            "drop_path_prob": 0.0, "cutout_length": 0}
PROTOCOLS = {
    "cifar10": (CIFAR10, "DARTS, cnn/train.py; section 5.1"),
    "cifar100": ({**CIFAR10, "layers": 8, "init_channels": 16}, "RobustDARTS; section 5.2 (8 cells)"),
    "svhn": ({**CIFAR10, "layers": 8, "init_channels": 16}, "RobustDARTS; section 5.2 (8 cells)"),
    "fashion_mnist": ({**CIFAR10, "auxiliary_weight": 0.0}, "ours: CIFAR-10's without the head, which needs 32x32"),
    "digits": ({**CIFAR10, "epochs": 30, "layers": 8, "init_channels": 16, "auxiliary_weight": 0.0, "cutout_length": 2},
               "ours"),
    "folder": (CIFAR10, "ours: CIFAR-10's; auxiliary_weight 0 for --image_size other than 32"),
    "imagenet": (IMAGENET, "DARTS, cnn/train_imagenet.py"),
    "imagenet, --lr_scheduler linear": ({**IMAGENET, "batch_size": 1024, "learning_rate": 0.5, "lr_scheduler": "linear"},
                                        "PC-DARTS, train_imagenet.py"),
}


# ---------------------------------------------------------------- schedules

def make_scheduler(config, optimizer):
    """The learning rate of each epoch. linear: PC-DARTS's, with five epochs of warmup for batches above 256."""
    epochs, warm = config["epochs"], config["batch_size"] > 256
    if config["lr_scheduler"] == "cosine":
        return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    if config["lr_scheduler"] == "exponential":
        return torch.optim.lr_scheduler.ExponentialLR(optimizer, config["gamma"])

    def linear(e):
        if warm and e < 5:
            return (e + 1) / 5
        return (epochs - 5 - e) / (epochs - 5) if e < epochs - 5 else (epochs - e) / (5 * (epochs - 5))
    return torch.optim.lr_scheduler.LambdaLR(optimizer, linear)


# ---------------------------------------------------------------- processes

class Processes:
    """This process among those of torchrun: rank 0 of 1 without it. In an epoch they share gradients; at its end metrics,
    and rank 0's running statistics, so that every process tests the network that is saved."""

    def __init__(self, device_name):
        self.device = find_device(device_name)
        self.rank, self.world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        if self.world > 1:
            if self.device.type == "cuda":
                self.device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
                torch.cuda.set_device(self.device)
            dist.init_process_group("nccl" if self.device.type == "cuda" else "gloo")

    def wrap(self, net):
        """Averages the gradients of all processes. static_graph: a genotype may have nodes that nothing uses."""
        return DistributedDataParallel(net, static_graph=True, broadcast_buffers=False) if self.world > 1 else net

    def in_turn(self, read):
        """read() in one process of the machine, then in the others: it may download or unpack files."""
        first = os.environ.get("LOCAL_RANK", "0") == "0"
        value = read() if first else None
        if self.world > 1:
            dist.barrier()
        return value if first else read()

    def total(self, values):
        if self.world > 1:
            dist.all_reduce(values)
        return values

    def same_buffers(self, net):
        if self.world > 1:
            for buffer in net.buffers():
                dist.broadcast(buffer, 0)

    def leave(self):
        if self.world > 1:
            dist.destroy_process_group()


# ---------------------------------------------------------------- data

def read_split(config, train, processes):
    split = processes.in_turn(lambda: load(config["dataset"], config["data"], train, config["image_size"]))
    return split.to(processes.device)


def training_data(config, seed, processes):
    """(batches, classes) of the training split; this process's share."""
    place = {"rank": processes.rank, "world": processes.world}
    if config["dataset"] == "imagenet":
        train = ImageNet(config["data"], True, config["batch_size"], seed, processes.device, config["workers"], **place)
        classes = train.classes
    else:
        split = read_split(config, True, processes)
        train = Batches(split, config["batch_size"], seed, config["cutout_length"], **place)
        classes = split.classes
    if train.steps == 0:
        raise Exit(f"--batch_size {config['batch_size']} or the data leave {processes.world} processes without a batch")
    return train, classes


def test_data(config, processes):
    """(function that goes once over this process's share of the test split, side of its images in pixels)."""
    place = processes.rank, processes.world
    if config["dataset"] == "imagenet":
        test = ImageNet(config["data"], False, config["batch_size"], 0, processes.device, config["workers"], *place)
        return lambda: test.epoch(0), 224
    split = read_split(config, False, processes)
    return lambda: test_batches(split, config["batch_size"], *place), split.images.shape[1]


# ---------------------------------------------------------------- training and testing

def make_network(genotype, config, classes):
    return Network(genotype, config["init_channels"], config["layers"], classes, config["auxiliary_weight"] > 0,
                   config["dataset"] == "imagenet")


def without_head(state):
    """A network's state without its auxiliary head, which only training needs."""
    return {name: value for name, value in state.items() if not name.startswith("auxiliary_head")}


def sizes(genotype, config, classes, side):
    """(parameters, multiply-adds) of the network. Raises Exit if its auxiliary head does not fit the images."""
    with torch.device("meta"):
        net = make_network(genotype, config, classes)
        try:
            net(torch.zeros(2, 3, side, side))
        except ValueError as error:
            raise Exit(f"{error} (--auxiliary_weight 0)") from None
        return count_parameters(net), count_macs(net, side)


def train_step(net, optimizer, images, labels, config, autocast):
    """One SGD step of loss + auxiliary_weight * auxiliary loss. Nothing here waits for the device."""
    with autocast():
        logits, logits_aux = net(images)
        loss = F.cross_entropy(logits, labels, label_smoothing=config["label_smooth"])
        total = loss
        if logits_aux is not None:
            total = loss + config["auxiliary_weight"] * F.cross_entropy(logits_aux, labels,
                                                                        label_smoothing=config["label_smooth"])
    optimizer.zero_grad()
    total.backward()
    torch.nn.utils.clip_grad_norm_(net.parameters(), config["grad_clip"])
    optimizer.step()
    return total, logits


@torch.no_grad()
def evaluate(net, batches, device, processes, autocast):
    """(loss, top-1, top-5 accuracy in percent) over the test split, every image of it once over all processes."""
    net.eval()
    totals = torch.zeros(4, dtype=torch.float64, device=device)  # loss, top-1 hits, top-5 hits, images
    for images, labels in batches():
        with autocast():
            logits, _ = net(images)
            loss = F.cross_entropy(logits, labels, reduction="sum")
        totals += torch.stack([loss, *hits(logits, labels), torch.full_like(loss, len(labels))])
    return summary(processes.total(totals))


def train(genotype, config, seed, run, processes):
    """Trains one network to the last epoch; writes weights.pt and result.json, and returns the result."""
    device, autocast = processes.device, precision(config["amp"], processes.device)
    batches, classes = training_data(config, seed, processes)
    test, side = test_data(config, processes)
    parameters, macs = sizes(genotype, config, classes, side)

    torch.manual_seed(seed)
    net = make_network(genotype, config, classes).to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(net.parameters(), config["learning_rate"], config["momentum"],
                                weight_decay=config["weight_decay"])
    scheduler = make_scheduler(config, optimizer)
    parts = {"net": net, "optimizer": optimizer, "scheduler": scheduler}
    saved = run.load((*parts, "processes", "last", "best"))
    if saved:
        if saved["processes"] != processes.world:
            raise Exit(f"{run.folder} is a run of {saved['processes']} processes, not {processes.world}: go on with as many")
        restore(parts, saved, run.checkpoint)
    last, best = (saved["last"], saved["best"]) if saved else (None, None)
    model = processes.wrap(net)

    progress = Progress(config["epochs"], batches.steps, config["batch_size"], shown=processes.rank == 0)
    progress.line(f"{config['genotype']} on {config['dataset']}: {parameters:,} parameters, {macs / 1e6:.1f}M multiply-adds; "
                  f"{processes.world} x {device.type}; seed {seed}; {run.folder}")
    for epoch in range(run.epoch, config["epochs"]):
        started, lr = time.time(), optimizer.param_groups[0]["lr"]
        torch.manual_seed(mix(seed, 2, epoch, processes.rank))  # drop-path: a function of seed, epoch and rank alone
        net.drop_path_prob = config["drop_path_prob"] * epoch / config["epochs"]
        net.train()
        meter = Meter(batches.steps, device)
        for step, (images, labels) in enumerate(batches.epoch(epoch)):
            loss, logits = train_step(model, optimizer, images, labels, config, autocast)
            meter.add(step, loss, logits, labels)
            progress.step(epoch, step, meter)
        meter.loss_so_far(epoch, batches.steps - 1)
        scheduler.step()
        processes.same_buffers(net)
        train_loss, train_acc, _ = summary(processes.total(meter.totals()))
        test_loss, test_top1, test_top5 = evaluate(net, test, device, processes, autocast)
        last = {"epoch": epoch, "error": 100 - test_top1, "error_top5": 100 - test_top5}
        best = last if best is None or last["error"] < best["error"] else best
        check_finite(epoch, (train_loss, test_loss), net)
        seconds = time.time() - started
        run.end_epoch({"epoch": epoch, "lr": lr, "train_loss": train_loss, "train_acc": train_acc, "test_loss": test_loss,
                       "test_error": last["error"], "test_error_top5": last["error_top5"],
                       "best on test (optimistic)": best["error"], "seconds": seconds},
                      {**{name: part.state_dict() for name, part in parts.items()}, "best": best, "last": last,
                       "processes": processes.world})
        progress.line(f"epoch {epoch} lr {lr:.6f} | train {train_loss:.3f} {train_acc:.1f}% | test {test_loss:.3f} "
                      f"error {last['error']:.2f}% | {clock(seconds)}")
    return finish(config, seed, run, net, {"parameters": parameters, "macs": macs}, last, best, processes, progress)


def finish(config, seed, run, net, counted, last, best, processes, progress):
    """Writes weights.pt, then result.json, which marks the run as finished; returns the result."""
    result = {"test_error": last["error"], "test_error_top5": last["error_top5"], "epoch": last["epoch"],
              "best on test (optimistic)": best["error"], "best_epoch": best["epoch"], **counted, "seed": seed,
              **circumstances(config, processes)}
    if processes.rank == 0:
        weights = {name: value.cpu().contiguous() for name, value in without_head(net.state_dict()).items()}
        write_file(run.folder / "weights.pt", lambda file: torch.save(weights, file))
        write_json(run.result, result)
    progress.line(f"test error {last['error']:.2f}% after the last epoch (best on test (optimistic) {best['error']:.2f}%, "
                  f"epoch {best['epoch']}); {run.folder / 'weights.pt'}")
    return result


def circumstances(config, processes):
    """Machine, versions, and the command line that starts this run again, every flag spelt out."""
    device = processes.device
    return {"processes": processes.world, "python": platform.python_version(), "torch": torch.__version__,
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else f"{platform.machine()} CPU",
            "torchvision": torchvision.__version__, "command": f"{launcher()} retrain.py {shlex.join(flags_of(config))}"}


# ---------------------------------------------------------------- the command

def all_flags(given):
    dataset = given.get("dataset", FLAGS["dataset"][1])
    linear = dataset == "imagenet" and given.get("lr_scheduler") == "linear"
    protocol, _ = PROTOCOLS["imagenet, --lr_scheduler linear" if linear else dataset]
    config = {flag: default for flag, (_, default, _) in FLAGS.items()} | {"seeds": [0]} | protocol | given
    if dataset == "folder" and config["image_size"] != 32 and "auxiliary_weight" not in given:
        config["auxiliary_weight"] = 0.0                    # the head fits no other size
    config["out"] = config["out"] or f"runs/retrain-{dataset}-{genotype_name(config['genotype'])}"
    return config


def genotype_name(genotype):
    """A published name as it is; of runs/NAME/genotype.json, NAME."""
    path = Path(genotype or "none")
    return path.parent.name if path.name == "genotype.json" and path.parent.name else path.stem


def make_parser():
    names = list(PROTOCOLS)
    heads = [name.split(", ")[-1].replace("--lr_scheduler ", "imagenet ") for name in names]
    rows = ["defaults".ljust(17) + "".join(head.rjust(16) for head in heads)]
    rows += [flag.ljust(17) + "".join(str(PROTOCOLS[name][0][flag]).rjust(16) for name in names) for flag in TRAINING]
    sources = [f"  {head}: {PROTOCOLS[name][1]}" for head, name in zip(heads, names)]
    parser = Parser(prog="retrain.py", description=__doc__, epilog="\n".join([*rows, "sources:", *sources]))
    for flag, (kind, default, text) in FLAGS.items():
        parser.setting(f"--{flag}", kind, text if default in (None, False) else f"{text} (default {default})")
    for flag, (kind, text) in TRAINING.items():
        parser.setting(f"--{flag}", kind, f"{text} (default: below)")
    parser.add_argument("--seeds", nargs="+", type=number(int, 0), metavar="N", help="one run for each (default 0)")
    parser.add_argument("--resume", metavar="FOLDER", help="go on with an interrupted run; its flags are kept")
    parser.add_argument("--evaluate", metavar="CHECKPOINT", help="test a run's weights.pt or checkpoint.pt, and end")
    return parser


def read_genotype(name_or_file):
    try:
        return load_genotype(str(name_or_file))
    except ValueError as error:
        raise Exit(f"--genotype: {error}") from None


def evaluate_checkpoint(path, config):
    """Prints the test error of a run's weights.pt or checkpoint.pt."""
    genotype = read_genotype(path.parent / "genotype.json")
    processes = Processes(config["device"])
    state = load_checkpoint(path)
    weights = state.get("net", state)                       # a checkpoint.pt has more than the network
    bias = weights.get("classifier.bias") if isinstance(weights, dict) else None
    if not isinstance(bias, torch.Tensor) or bias.dim() != 1:
        raise Exit(f"{path} holds no network of this program")
    weights = without_head(weights)
    net = make_network(genotype, {**config, "auxiliary_weight": 0}, len(bias))
    restore({"net": net}, {"net": weights}, path)
    net.to(processes.device, memory_format=torch.channels_last)
    test, _ = test_data(config, processes)
    loss, top1, top5 = evaluate(net, test, processes.device, processes, precision(config["amp"], processes.device))
    if processes.rank == 0:
        print(f"{path} on {config['dataset']}: test error {100 - top1:.2f}% (top-5 {100 - top5:.2f}%), loss {loss:.4f}")
    processes.leave()


def keep_genotype(run, genotype):
    """Writes the genotype into the run folder: the weights are of no use without it."""
    if run.writes:
        write_text(run.folder / "genotype.json", to_json(genotype))


def check(config):
    if config["genotype"] is None:
        raise Exit("--genotype is needed: a genotype.json, or a name of `python genotypes.py`")
    if len(set(config["seeds"])) < len(config["seeds"]):
        raise Exit(f"--seeds {' '.join(map(str, config['seeds']))}: each once")
    if config["lr_scheduler"] == "linear" and config["epochs"] < 6:
        raise Exit("--lr_scheduler linear needs --epochs 6 or more: its last five are a phase of their own")
    if config["batch_size"] < 2 * int(os.environ.get("WORLD_SIZE", 1)):
        raise Exit(f"--batch_size {config['batch_size']} is that of all processes: each needs two images of it")


def main(arguments):
    given = vars(make_parser().parse_args(arguments))
    checkpoint, folder = given.pop("evaluate", None), given.pop("resume", None)
    if checkpoint is not None and folder is not None:
        raise Exit("--evaluate and --resume are two different things: give one")
    if checkpoint is not None:
        checkpoint = Path(checkpoint)
        return evaluate_checkpoint(checkpoint, kept_settings(make_parser(), checkpoint.parent, given, all_flags))
    config = all_flags(given) if folder is None else kept_settings(make_parser(), Path(folder), given, all_flags)
    check(config)
    kept = Path(config["out"]) / "genotype.json"
    genotype = read_genotype(kept if folder is not None and kept.exists() else config["genotype"])
    processes = Processes(config["device"])
    run = Run("retrain.py", config, "result.json", folder is not None, writes=processes.rank == 0)
    keep_genotype(run, genotype)
    if len(config["seeds"]) == 1:
        with resumable(run):
            train(genotype, config, config["seeds"][0], run, processes)
    else:
        train_seeds(genotype, config, run, processes, resumed=folder is not None)
    processes.leave()


def train_seeds(genotype, config, run, processes, resumed):
    """One run folder for each seed inside that of the command; result.json has every run, the mean and the deviation."""
    results = []
    for seed in config["seeds"]:
        own = {**config, "seeds": [seed], "out": f"{config['out']}/seed-{seed}"}
        if resumed and (Path(own["out"]) / run.result.name).exists():
            results.append(read_json(Path(own["out"]) / run.result.name))
            continue
        seed_run = Run("retrain.py", own, run.result.name, resumed, writes=processes.rank == 0)
        seed_run.resume_command = run.resume_command
        keep_genotype(seed_run, genotype)
        with resumable(seed_run):
            results.append(train(genotype, own, seed, seed_run, processes))
    errors = [result["test_error"] for result in results]
    mean, deviation = statistics.mean(errors), statistics.stdev(errors)
    if processes.rank == 0:
        write_json(run.result, {"mean_test_error": mean, "std_test_error (sample)": deviation, "runs": results})
        print(f"test error {mean:.2f} +- {deviation:.2f}% over seeds {config['seeds']}: "
              f"{', '.join(f'{error:.2f}' for error in errors)}; {run.result}")


if __name__ == "__main__":
    start("retrain.py", main)
