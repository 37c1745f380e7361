"""Retraining: the network of a genotype, trained from scratch. Section 5.1, with DARTS's protocols.

    python retrain.py --genotype runs/.../genotype.json                   CIFAR-10, as in Table 1
    python retrain.py --genotype VS_DARTS --dataset imagenet --data DIR   ImageNet, as in Table 2
    torchrun --nproc_per_node=4 retrain.py --genotype VS_DARTS ...        several GPUs, or machines
    python retrain.py --evaluate runs/.../weights.pt                      test error of a network

The result is the last epoch's test error; the best epoch's, chosen on the test split and so too
optimistic, is logged as best_test_error. Under torchrun --batch_size is that of all processes
together, and batch norm sees its own process's images only, as in every published recipe. Sources:
quark0/darts f276dd3, cnn/{train,train_imagenet}.py; yuhuixu1993/PC-DARTS b74702f,
train_imagenet.py.
"""
import argparse
import json
import time
from pathlib import Path

import torch
import torch.nn.functional as F
import torchvision
from torch.nn.parallel import DistributedDataParallel

from data import DATASETS, Spec, add_data_flags, make_batches, make_seed, open_split
from genotypes import load_genotype, to_json
from model import (Network, count_macs, count_parameters, evaluate, means, metrics, place,
                   share_buffers)
from run import (RANK, WORLD, Parser, Run, add_run_flags, check_facts, device_name, find_device,
                 fraction, load_checkpoint, natural, non_negative, number, parse_flags, positive,
                 positive_int, read_json, reason, say, start, write)

CIFAR10 = {"epochs": 600, "batch_size": 96, "layers": 20, "init_channels": 36,
           "lr_scheduler": "cosine", "learning_rate": 0.025, "gamma": 0.97, "momentum": 0.9,
           "weight_decay": 3e-4, "grad_clip": 5.0, "label_smooth": 0.0, "auxiliary_weight": 0.4,
           "drop_path_prob": 0.2, "cutout_length": 16}
IMAGENET = {**CIFAR10, "epochs": 250, "batch_size": 128, "layers": 14, "init_channels": 48,
            "lr_scheduler": "exponential", "learning_rate": 0.1, "weight_decay": 3e-5,
            "label_smooth": 0.1, "drop_path_prob": 0.0, "cutout_length": 0}
LINEAR = {**IMAGENET, "batch_size": 1024, "learning_rate": 0.5, "lr_scheduler": "linear"}
ROBUST_DARTS = {**CIFAR10, "layers": 8, "init_channels": 16}
DIGITS = {**ROBUST_DARTS, "epochs": 30, "auxiliary_weight": 0.0, "cutout_length": 2}
PROTOCOLS = {
    "cifar10": CIFAR10,                                     # DARTS, cnn/train.py; section 5.1
    "cifar100": ROBUST_DARTS,                               # RobustDARTS; section 5.2 (8 cells)
    "svhn": ROBUST_DARTS,
    "fashion_mnist": {**CIFAR10, "auxiliary_weight": 0.0},  # ours: the head needs 32x32
    "digits": DIGITS,                                       # ours
    "folder": CIFAR10,                                      # ours
    "imagenet": IMAGENET,                                   # DARTS, cnn/train_imagenet.py
    "linear": LINEAR,                                       # PC-DARTS, train_imagenet.py
}


# ---------------------------------------------------------------- data, network, schedule

def make_data(args, train, device, spec=None):
    """The batches of the train or test split."""
    split = open_split(args, train, device, spec)
    return make_batches(split, args.batch_size, make_seed(args.seed, "data"), args.cutout_length,
                        train)


def read_data(args, device):
    """(train, test). The smaller one is read first: its faults show early."""
    test = make_data(args, False, device)
    return make_data(args, True, device), test


def make_network(genotype, args, num_classes):
    return Network(genotype, args.init_channels, args.layers, num_classes,
                   args.auxiliary_weight > 0, args.dataset == "imagenet")


def make_scheduler(args, optimizer):
    """The learning rate by epoch. linear: PC-DARTS's, with five epochs' warmup of large batches."""
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
    """One SGD step on loss + auxiliary_weight * auxiliary loss. Returns (loss, logits)."""
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


def train_epoch(net, optimizer, batches, epoch, args):
    """The summed metrics of one pass over the training split. net: in torch's wrapper or not."""
    torch.manual_seed(make_seed(args.seed, "drop path", epoch, RANK))
    net.train()
    totals = 0
    for images, labels in batches.shown(epoch, f"epoch {epoch}"):
        totals += metrics(*train_step(net, optimizer, images, labels, args), labels)
    return totals


def train(genotype, args, run, read=read_data):
    """Trains a network to the last epoch; writes weights.pt and result.json.

    read(args, device): the Batches to train and to test on.
    """
    device = find_device(args.device)
    batches, test = read(args, device)
    classes, spec = test.split.classes, test.split.spec
    check_facts(f"{args.data}/train", {"classes": batches.split.classes}, {"classes": classes})
    torch.manual_seed(args.seed)
    net = place(make_network(genotype, args, len(classes)), device, args.amp)
    optimizer = torch.optim.SGD(net.parameters(), args.learning_rate, args.momentum,
                                weight_decay=args.weight_decay)
    scheduler = make_scheduler(args, optimizer)
    counts = {"parameters": count_parameters(net), "macs": count_macs(net, spec.size)}
    facts = {"classes": classes, "spec": list(spec),
             "train_split": batches.split.name, "test_split": test.split.name}
    run.begin({"net": net, "optimizer": optimizer, "scheduler": scheduler}, facts)
    write(run.folder / "genotype.json", to_json(genotype))  # --genotype may be moved
    say(f"{args.genotype} on {args.dataset}: {counts['parameters']:,} parameters, "
        f"{counts['macs']:,} multiply-adds; {WORLD} x {device.type}; seed {args.seed}; "
        f"{run.folder}")
    wrapped = DistributedDataParallel(net, static_graph=True) if WORLD > 1 else net

    for epoch in range(run.epoch, args.epochs):
        started, lr = time.monotonic(), optimizer.param_groups[0]["lr"]
        net.drop_path_prob = args.drop_path_prob * epoch / args.epochs
        totals = train_epoch(wrapped, optimizer, batches, epoch, args)
        scheduler.step()
        share_buffers(net)
        train_loss, train_acc, _, images = means(totals)
        seconds = time.monotonic() - started
        test_loss, top1, top5, _ = evaluate(net, test.shown(0, "test"))
        best = min([100 - top1, *(record["test_error"] for record in run.log)])
        record = {"epoch": epoch, "lr": lr, "train_loss": train_loss, "train_acc": train_acc,
                  "test_loss": test_loss, "test_error": 100 - top1, "test_error_top5": 100 - top5,
                  "best_test_error": best, "images_per_second": images / seconds,
                  "seconds": time.monotonic() - started}
        run.end_epoch(record)
        say(f"epoch {epoch} lr {lr:.6f} | train {train_loss:.3f} {train_acc:.1f}% | "
            f"test {test_loss:.3f} error {100 - top1:.2f}% | {record['seconds']:.0f} s")
    finish(run, net, counts | {"device": device_name(device)})


def finish(run, net, counts):
    """Writes weights.pt and then result.json, which marks the run as finished."""
    weights = {name: value.cpu() for name, value in without_head(net.state_dict())}
    source = run.log[-1] | run.facts
    names = "test_error test_error_top5 best_test_error epoch train_split test_split".split()
    versions = {"torch": torch.__version__, "torchvision": torchvision.__version__}
    result = {name: source[name] for name in names} | counts | versions
    write(run.folder / "weights.pt", {"net": weights, "facts": run.facts})
    write(run.result, json.dumps(result, indent=1))
    say("test error {test_error:.2f}% after the last epoch (the best on the test split, so "
        "optimistic: {best_test_error:.2f}%); ".format(**result) + f"{run.folder / 'weights.pt'}")


def without_head(state):
    """The (name, value) pairs of a network's state but the auxiliary head's, of training only."""
    return [pair for pair in state.items() if not pair[0].startswith("auxiliary_head")]


def load_network(path, device, amp=False):
    """(network, what it was trained on) of a run's weights.pt or checkpoint.pt.

    The second is a dict: "classes", names; "spec", see data.Spec.
    """
    flags = read_json(path.parent / "config.json") | {"auxiliary_weight": 0}
    args, saved = argparse.Namespace(**flags), load_checkpoint(path)
    try:
        facts = saved["facts"]
        genotype = read_genotype(path.parent / "genotype.json")
        net = make_network(genotype, args, len(facts["classes"]))
        net.load_state_dict(dict(without_head(saved["net"])))
        facts = {**facts, "spec": Spec(*facts["spec"])}
    except Exception as error:                              # each part fails in its own way
        raise SystemExit(f"{path} holds no network of this run ({reason(error)})") from None
    return place(net, device, amp), facts


def evaluate_file(path, args):
    """Prints the test error of a run's weights.pt or checkpoint.pt."""
    device = find_device(args.device)
    net, facts = load_network(path, device, args.amp)
    test = make_data(args, False, device, facts["spec"])
    check_facts(path, facts, {"classes": test.split.classes})
    torch.manual_seed(args.seed)                            # for S4's noise
    loss, top1, top5, _ = evaluate(net, test.shown(0, "test"))
    say(f"{path} on {args.dataset}: test error {100 - top1:.2f}% (top-5 {100 - top5:.2f}%), "
        f"loss {loss:.4f}")


# ---------------------------------------------------------------- the command

def make_parser():
    rows = [[flag, *(values[flag] for values in PROTOCOLS.values())] for flag in CIFAR10]
    table = "\n".join("".join(f"{str(cell):<17}" for cell in row)
                      for row in [["defaults", *PROTOCOLS], *rows])
    parser = Parser("retrain.py", description=__doc__, epilog=f"{table}\n{SOURCES}")
    parser.set_defaults(search=None)                        # of the cell, see source_of
    parser.add_argument("--genotype",
                        help="a genotype.json, or a name that `python genotypes.py` lists")
    parser.add_argument("--evaluate", metavar="FILE",
                        help="test a run's weights.pt or checkpoint.pt, and end")
    add_data_flags(parser)
    add = parser.add_argument_group("training (defaults: the table below)").add_argument
    add("--epochs", type=positive_int, help="number of epochs")
    add("--batch_size", type=number(int, 2), help="images in a step, all processes together")
    add("--layers", type=number(int, 3), help="number of cells")
    add("--init_channels", type=number(int, 2), help="channels of the first cell")
    add("--lr_scheduler", choices=("cosine", "exponential", "linear"),
        help="cosine to 0; times --gamma by epoch; linear to 0, batches above 256 with a warmup")
    add("--learning_rate", type=non_negative, help="SGD learning rate")
    add("--gamma", type=fraction, help="of --lr_scheduler exponential")
    add("--momentum", type=fraction, help="SGD momentum")
    add("--weight_decay", type=non_negative, help="SGD weight decay")
    add("--grad_clip", type=positive, help="largest 2-norm of the gradient")
    add("--label_smooth", type=fraction, help="label smoothing, in training")
    add("--auxiliary_weight", type=non_negative, help="of the auxiliary loss; 0: no head")
    add("--drop_path_prob", type=number(float, 0, 0.99), help="at the end; it grows from 0")
    add("--cutout_length", type=natural, help="side of the cut square in pixels; 0: none")
    add("--seed", type=natural, default=0, help="random seed; DARTS has 0")
    add_run_flags(parser)
    return parser


SOURCES = """sources: cifar10 is DARTS's cnn/train.py (section 5.1); cifar100 and svhn are
RobustDARTS's (5.2: 8 cells); fashion_mnist, digits and folder are ours, after CIFAR-10's;
imagenet is DARTS's train_imagenet.py; linear is --dataset imagenet --lr_scheduler linear:
PC-DARTS's train_imagenet.py. With --image_size, cutout_length scales with the images, and
auxiliary_weight is 0 unless they fit the head (32x32; 224x224)."""


def protocol(args):
    """The defaults of a data set's training, fitted to --image_size."""
    linear = args.dataset == "imagenet" and args.lr_scheduler == "linear"
    defaults = dict(PROTOCOLS["linear" if linear else args.dataset])
    size = DATASETS[args.dataset].size
    image_size = args.image_size or size
    defaults["cutout_length"] = defaults["cutout_length"] * image_size // size
    if image_size != head_size(args):
        defaults["auxiliary_weight"] = 0.0
    return defaults


def head_size(args):
    """The side of the images whose feature maps the auxiliary head fits."""
    return 224 if args.dataset == "imagenet" else 32


def parse(arguments):
    """The flags, checked against each other."""
    parser = make_parser()
    args = parser.parse_args(arguments)
    if args.evaluate is not None:
        return parse_evaluate(parser, arguments, Path(args.evaluate))
    if args.resume is None and not args.genotype:
        raise SystemExit("--genotype is needed: a genotype.json, or a name that `python "
                         "genotypes.py` lists")
    args = parse_flags(parser, arguments, protocol)
    size = args.image_size or DATASETS[args.dataset].size
    if args.auxiliary_weight > 0 and size != head_size(args):
        raise SystemExit(f"--auxiliary_weight {args.auxiliary_weight}: the head is for images of "
                         f"{head_size(args)}x{head_size(args)}, not {size}x{size}")
    if args.lr_scheduler == "linear" and args.epochs < 6:
        raise SystemExit("--lr_scheduler linear needs --epochs 6 or more: the last five have a "
                         "slope of their own")
    return args


def parse_evaluate(parser, arguments, path):
    """The flags of the run that holds the network, for --data, --dataset, --device and --amp."""
    path = path / "weights.pt" if path.is_dir() else path
    saved = read_json(path.parent / "config.json")
    args = parser.parse_args(arguments, argparse.Namespace(**saved))
    args.evaluate = path
    return args


def source_of(args, genotype):
    """The search that a cell is from, for the tables: its search.json, if about this cell."""
    path = Path(args.genotype).parent / "search.json"
    source = read_json(path) if path.exists() else {}
    return source if source.get("genotype") == json.loads(to_json(genotype)) else None


def read_genotype(name_or_file):
    try:
        return load_genotype(name_or_file)
    except ValueError as error:
        raise SystemExit(f"--genotype: {error}") from None


def main(arguments):
    args = parse(arguments)
    if args.evaluate is not None:
        return evaluate_file(args.evaluate, args)
    kept = Path(args.out) / "genotype.json"                 # a resumed run's
    genotype = read_genotype(kept if args.resume and kept.exists() else args.genotype)
    if args.resume is None:
        args.search = source_of(args, genotype)
    train(genotype, args, Run(args, "result.json"))


if __name__ == "__main__":
    start(main)
