"""Retraining: the network of a genotype, trained from scratch. Section 5.1, with DARTS's protocols.

    python retrain.py --genotype runs/.../genotype.json                   CIFAR-10, as in Table 1
    python retrain.py --genotype VS_DARTS --dataset imagenet --data DIR   ImageNet, as in Table 2
    torchrun --nproc_per_node=4 retrain.py --genotype VS_DARTS ...        several GPUs, or several machines
    python retrain.py --evaluate runs/.../weights.pt                      test error of a trained network

The result is the last epoch's test error; the best epoch's is logged as "best on test (optimistic)". Under
torchrun --batch_size is that of all processes together, and batch norm sees its own process's images only, as
in every published recipe. Sources: quark0/darts f276dd3, cnn/{train,train_imagenet}.py; yuhuixu1993/PC-DARTS
b74702f, train_imagenet.py.
"""
import argparse
import json
import platform
import time
from pathlib import Path

import torch
import torch.nn.functional as F
import torchvision
from torch.nn.parallel import DistributedDataParallel

from data import DATASETS, Batches, ImageNet, load
from genotypes import load_genotype, to_json
from model import Network, count_macs, count_parameters
from run import Parser, Run, add_up, autocast, check_processes, device_name, differing, find_device, join, \
    load_checkpoint, make_seed, means, metrics, number, one_first, parse_flags, place, read_json, reason, \
    save, share_buffers, start, write

CIFAR10 = {"epochs": 600, "batch_size": 96, "layers": 20, "init_channels": 36, "lr_scheduler": "cosine",
           "learning_rate": 0.025, "gamma": 0.97, "momentum": 0.9, "weight_decay": 3e-4, "grad_clip": 5.0,
           "label_smooth": 0.0, "auxiliary_weight": 0.4, "drop_path_prob": 0.2, "cutout_length": 16}
IMAGENET = {**CIFAR10, "epochs": 250, "batch_size": 128, "layers": 14, "init_channels": 48,
            "lr_scheduler": "exponential", "learning_rate": 0.1, "weight_decay": 3e-5, "label_smooth": 0.1,
            "drop_path_prob": 0.0, "cutout_length": 0}
ROBUST_DARTS = {**CIFAR10, "layers": 8, "init_channels": 16}
PROTOCOLS = {
    "cifar10": CIFAR10,                                     # DARTS, cnn/train.py; section 5.1
    "cifar100": ROBUST_DARTS,                               # RobustDARTS; section 5.2 (8 cells)
    "svhn": ROBUST_DARTS,
    "fashion_mnist": {**CIFAR10, "auxiliary_weight": 0.0},  # ours: without the head, which needs 32x32
    "digits": {**ROBUST_DARTS, "epochs": 30, "auxiliary_weight": 0.0, "cutout_length": 2},   # ours
    "folder": CIFAR10,                                      # ours
    "imagenet": IMAGENET,                                   # DARTS, cnn/train_imagenet.py
    "linear": {**IMAGENET, "batch_size": 1024, "learning_rate": 0.5, "lr_scheduler": "linear"},   # PC-DARTS
}


# ---------------------------------------------------------------- data, network, schedule

def read_split(args, train, device, rank=0, world=1):
    """The batches of the train or test split: this process's share."""
    seed = make_seed(args.seed, "data")
    if args.dataset == "imagenet":
        return ImageNet(args, train, seed, device, rank, world)
    split = load(args.dataset, args.data, train, args.image_size, args.limit).to(device)
    return Batches(split, args.batch_size, seed, args.cutout_length, train, rank, world)


def read_data(args, device, rank, world):
    """(train, test)."""
    with one_first():
        test = read_split(args, False, device, rank, world)     # the smaller one first: its faults show early
        train = read_split(args, True, device, rank, world)
    return train, test


def make_network(genotype, args, num_classes):
    return Network(genotype, args.init_channels, args.layers, num_classes, args.auxiliary_weight > 0,
                   args.dataset == "imagenet")


def count(genotype, args, num_classes, side):
    """Parameters and multiply-adds of a network. SystemExit if the images do not fit its auxiliary head."""
    with torch.device("meta"):
        net = make_network(genotype, args, num_classes)
        try:
            net(torch.zeros(2, 3, side, side))
        except ValueError as error:
            raise SystemExit(f"{error} (--auxiliary_weight 0)") from None
        return {"parameters": count_parameters(net), "macs": count_macs(net, side)}


def make_scheduler(args, optimizer):
    """The learning rate of each epoch. linear: PC-DARTS's, with a warmup of five epochs for large batches."""
    if args.lr_scheduler == "cosine":
        return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.epochs)
    if args.lr_scheduler == "exponential":
        return torch.optim.lr_scheduler.ExponentialLR(optimizer, args.gamma)

    def linear(epoch):                                      # a fraction of --learning_rate
        left = args.epochs - epoch
        if args.batch_size > 256 and epoch < 5:
            return (epoch + 1) / 5
        if left > 5:
            return (left - 5) / (args.epochs - 5)
        return left / (5 * (args.epochs - 5))
    return torch.optim.lr_scheduler.LambdaLR(optimizer, linear)


# ---------------------------------------------------------------- training and testing

def train_step(net, optimizer, images, labels, args):
    """One SGD step on loss + auxiliary_weight * auxiliary loss. Nothing here waits for the device."""
    with autocast(images.device, args.amp):
        logits, logits_aux = net(images)
        loss = F.cross_entropy(logits, labels, label_smoothing=args.label_smooth)
        if logits_aux is not None:
            loss_aux = F.cross_entropy(logits_aux, labels, label_smoothing=args.label_smooth)
            loss = loss + args.auxiliary_weight * loss_aux
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(net.parameters(), args.grad_clip)
    optimizer.step()
    return loss, logits


@torch.no_grad()
def evaluate(net, test):
    """The summed metrics of this process's share of the test split."""
    net.eval()
    totals = 0
    for images, labels in test.epoch(0):
        with autocast(images.device, net.amp):
            logits, _ = net(images)
            loss = F.cross_entropy(logits, labels)
        totals = totals + metrics(loss, logits, labels)
    return totals


def train(genotype, args, run, rank, world, read=read_data):
    """Trains a network to the last epoch; writes weights.pt and result.json. read: what loads the data."""
    device = find_device(args.device)
    batches, test = read(args, device, rank, world)
    counts = count(genotype, args, len(test.classes), test.size)
    torch.manual_seed(args.seed)
    net = place(make_network(genotype, args, len(test.classes)), device, args.amp)
    optimizer = torch.optim.SGD(net.parameters(), args.learning_rate, args.momentum,
                                weight_decay=args.weight_decay)
    scheduler = make_scheduler(args, optimizer)
    run.begin({"net": net, "optimizer": optimizer, "scheduler": scheduler}, test.classes)
    if run.main:
        write(run.folder / "genotype.json", to_json(genotype))
    model = net
    if world > 1:                                           # static_graph: a genotype may have unused nodes
        model = DistributedDataParallel(net, static_graph=True)
    run.say(f"{args.genotype} on {args.dataset}: {counts['parameters']:,} parameters, {counts['macs']:,} "
            f"multiply-adds; {world} x {device.type}; seed {args.seed}; {run.folder}")

    for epoch in range(run.epoch, args.epochs):
        started, lr, totals = time.time(), optimizer.param_groups[0]["lr"], 0
        torch.manual_seed(make_seed(args.seed, "drop path", epoch, rank))
        net.drop_path_prob = args.drop_path_prob * epoch / args.epochs
        net.train()
        for images, labels in batches.epoch(epoch):
            loss, logits = train_step(model, optimizer, images, labels, args)
            totals = totals + metrics(loss, logits, labels)
        scheduler.step()
        share_buffers(net)
        train_loss, train_acc, _ = means(add_up(totals))
        seconds = time.time() - started
        test_loss, top1, top5 = means(add_up(evaluate(net, test)))
        best = min([100 - top1, *(record["test_error"] for record in run.log)])
        record = {"epoch": epoch, "lr": lr, "train_loss": train_loss, "train_acc": train_acc,
                  "test_loss": test_loss, "test_error": 100 - top1, "test_error_top5": 100 - top5,
                  "best on test (optimistic)": best,
                  "images/s": totals[3].item() / seconds, "seconds": time.time() - started}
        run.end_epoch(record)
        run.say(f"epoch {epoch} lr {lr:.6f} | train {train_loss:.3f} {train_acc:.1f}% | test {test_loss:.3f} "
                f"error {100 - top1:.2f}% | {record['seconds']:.0f} s")
    if run.main:
        finish(run, net, {**counts, "device": device_name(device), "processes": world})


def finish(run, net, facts):
    """Writes weights.pt and then result.json, which marks the run as finished."""
    weights = {name: value.cpu().contiguous() for name, value in without_head(net.state_dict()).items()}
    save({"net": weights, "classes": run.classes}, run.folder / "weights.pt")
    last, best = run.log[-1], min(run.log, key=lambda record: record["test_error"])
    result = {**{key: last[key] for key in ("test_error", "test_error_top5", "epoch")},
              "best on test (optimistic)": best["test_error"], "best_epoch": best["epoch"],
              "seed": run.args.seed, **facts, "python": platform.python_version(), "torch": torch.__version__,
              "torchvision": torchvision.__version__}
    write(run.result, json.dumps(result, indent=1))
    run.say(f"test error {last['test_error']:.2f}% after the last epoch (best on test (optimistic) "
            f"{best['test_error']:.2f}%, epoch {best['epoch']}); {run.folder / 'weights.pt'}")


def without_head(state):
    """A network's state without its auxiliary head, which only training needs."""
    return {name: value for name, value in state.items() if not name.startswith("auxiliary_head")}


def load_network(path, args, device):
    """(network, names of its classes) of a run's weights.pt or checkpoint.pt. args: the run's flags."""
    saved, args.auxiliary_weight = load_checkpoint(path), 0
    try:
        net = make_network(read_genotype(path.parent / "genotype.json"), args, len(saved["classes"]))
        net.load_state_dict(without_head(saved["net"]))
    except (AttributeError, KeyError, TypeError, RuntimeError) as error:
        raise SystemExit(f"{path} holds no network of this run ({reason(error)})") from None
    return place(net, device, args.amp), saved["classes"]


def evaluate_file(path, args):
    """Prints the test error of a run's weights.pt or checkpoint.pt."""
    device = find_device(args.device)
    net, classes = load_network(path, args, device)
    test = read_split(args, False, device)
    if list(test.classes) != classes:
        raise SystemExit(f"{path} and {args.data}: {differing(classes, test.classes)}")
    loss, top1, top5 = means(evaluate(net, test))
    top5 = f" (top-5 {100 - top5:.2f}%)" if len(test.classes) > 5 else ""
    print(f"{path} on {args.dataset}: test error {100 - top1:.2f}%{top5}, loss {loss:.4f}")


# ---------------------------------------------------------------- the command

def make_parser():
    rows = ["defaults".ljust(17) + "".join(name.rjust(14) for name in PROTOCOLS)]
    rows += [flag.ljust(17) + "".join(str(protocol[flag]).rjust(14) for protocol in PROTOCOLS.values())
             for flag in CIFAR10]
    parser = Parser("retrain.py", description=__doc__, epilog="\n".join([*rows, SOURCES]))
    add = parser.add_argument_group("the network and the data").add_argument
    add("--genotype", help="a genotype.json, or a name that `python genotypes.py` lists")
    add("--dataset", default="cifar10", choices=DATASETS, help="section 5.1: cifar10 and imagenet")
    add("--data", default="data", help="folder of the data sets; for imagenet and folder, of train/ and val/")
    add("--image_size", type=number(int, 8, 512),
        help="side to which images are resized (default: as they are; 32 for folder, 224 for imagenet)")
    add("--limit", type=number(int, 2), help="use the first LIMIT training images only")

    add = parser.add_argument_group("training (defaults: the table below)").add_argument
    add("--epochs", type=number(int, 1), help="number of epochs")
    add("--batch_size", type=number(int, 2), help="images in a step, all processes together")
    add("--layers", type=number(int, 3, 1000), help="number of cells")
    add("--init_channels", type=number(int, 2, 4096), help="channels of the first cell")
    add("--lr_scheduler", choices=("cosine", "exponential", "linear"),
        help="cosine to 0; times --gamma each epoch; linear to 0, with a warmup for batches above 256")
    add("--learning_rate", type=number(float, 0), help="SGD learning rate")
    add("--gamma", type=number(float, 0, 1, above=True), help="factor of --lr_scheduler exponential")
    add("--momentum", type=number(float, 0, 1), help="SGD momentum")
    add("--weight_decay", type=number(float, 0), help="SGD weight decay")
    add("--grad_clip", type=number(float, 0, above=True), help="largest 2-norm of the whole gradient")
    add("--label_smooth", type=number(float, 0, 1), help="label smoothing, in training")
    add("--auxiliary_weight", type=number(float, 0), help="weight of the auxiliary head's loss; 0: no head")
    add("--drop_path_prob", type=number(float, 0, 0.99), help="drop-path probability at the end, from 0")
    add("--cutout_length", type=number(int, 0), help="side of the square that is cut out, in pixels; 0: none")
    add("--seed", type=number(int, 0), default=0, help="random seed; DARTS has 0")

    add = parser.add_argument_group("the run").add_argument
    add("--device", help="torch device (default: CUDA if there is any, else the CPU)")
    add("--amp", action="store_true", help="bfloat16 and TF32: other numbers, faster on some GPUs")
    add("--workers", type=number(int, 0), default=4, help="processes that read ImageNet for each GPU")
    add("--out", help="run folder (default: in runs/, named after all flags that are not at their defaults)")
    add("--resume", metavar="FOLDER", help="continue a run, with its flags; --data and --device may change")
    add("--evaluate", metavar="FILE", help="test a run's weights.pt or checkpoint.pt, and end")
    return parser


SOURCES = """sources: cifar10 is DARTS's cnn/train.py (section 5.1); cifar100 and svhn are RobustDARTS's (5.2:
8 cells); fashion_mnist, digits and folder are ours, after CIFAR-10's; imagenet is DARTS's train_imagenet.py;
linear is --dataset imagenet --lr_scheduler linear: PC-DARTS's train_imagenet.py. With --image_size,
cutout_length scales with the images, and auxiliary_weight is 0 unless they fit the head (32x32; 224x224)."""


def protocol(args):
    """The defaults of a data set's training, fitted to --image_size."""
    linear = args.dataset == "imagenet" and args.lr_scheduler == "linear"
    defaults, size = dict(PROTOCOLS["linear" if linear else args.dataset]), DATASETS[args.dataset].size
    image_size = args.image_size or size
    defaults["cutout_length"] = defaults["cutout_length"] * image_size // size
    if image_size != (224 if args.dataset == "imagenet" else 32):   # the auxiliary head fits no other
        defaults["auxiliary_weight"] = 0.0
    return defaults


def parse(arguments):
    """The flags, checked against each other, with the run folder's name filled in."""
    parser = make_parser()
    args = parse_flags(parser, arguments)
    if args.resume is not None:
        return args
    if args.evaluate is not None:
        saved = read_json(Path(args.evaluate).parent / "config.json")
        return parser.parse_args(arguments, argparse.Namespace(**saved))
    if not args.genotype:
        raise SystemExit("--genotype is needed: a genotype.json, or a name that `python genotypes.py` lists")
    given, usual = vars(args), {"image_size": None, "limit": None, "amp": False, **PROTOCOLS[args.dataset]}
    changed = [f"{flag}={given[flag]}" for flag in usual if given[flag] not in (None, usual[flag])]
    args = parser.parse_args(arguments, argparse.Namespace(**protocol(args)))
    if args.lr_scheduler == "linear" and args.epochs < 6:
        raise SystemExit("--lr_scheduler linear needs --epochs 6 or more: its last five are apart")
    name = Path(args.genotype).as_posix().removeprefix("runs/")
    name = name.removesuffix(".json").removesuffix("/genotype").replace("/", "-")
    name = "-".join(["retrain", args.dataset, name, *changed, str(args.seed)])
    args.out = args.out or f"runs/{name}"
    return args


def source_of(args, genotype):
    """The search that a cell is from, for the tables: its search.json, if that is about this very cell."""
    path = Path(args.genotype).parent / "search.json"
    source = read_json(path) if path.exists() else {}
    return source if source.get("genotype") == json.loads(to_json(genotype)) else None


def read_genotype(name_or_file):
    try:
        return load_genotype(str(name_or_file))
    except ValueError as error:
        raise SystemExit(f"--genotype: {error}") from None


def main(arguments):
    args = parse(arguments)
    if args.evaluate is not None:
        return evaluate_file(Path(args.evaluate), args)
    rank, world = join()
    check_processes(args, world)
    if args.resume is None:
        genotype = read_genotype(args.genotype)
        args.search = source_of(args, genotype)
    else:
        kept = Path(args.out) / "genotype.json"
        genotype = read_genotype(kept if kept.exists() else args.genotype)
    with Run(args, "result.json", main=rank == 0) as run:
        train(genotype, args, run, rank, world)


if __name__ == "__main__":
    start(main)
