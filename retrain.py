"""Retraining: the network of a genotype, trained from scratch. Section 5.1, with DARTS's protocols.

    python retrain.py --genotype runs/.../genotype.json                       CIFAR-10, as in Table 1
    python retrain.py --genotype VS_DARTS --dataset imagenet --data DIR       ImageNet, as in Table 2
    torchrun --nproc_per_node=4 retrain.py --genotype VS_DARTS ...            several GPUs; also several machines
    python retrain.py --evaluate runs/.../weights.pt                          test error of a trained network

The result is the last epoch's test error. The best epoch's is logged too, under its name: best on test (optimistic).
Under torchrun --batch_size is that of all processes together, and batch norm sees its own process's share only, as in
every published recipe. Protocols: quark0/darts f276dd3, cnn/{train,train_imagenet}.py; yuhuixu1993/PC-DARTS b74702f.
"""
import functools
import json
import os
import platform
import shlex
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
from run import LOOK_EVERY, Exit, Parser, Run, clock, device_name, find_device, keep_settings, load_checkpoint, make_seed, \
    means, metrics, number, precision, save, save_text, start

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
    "fashion_mnist": {**CIFAR10, "auxiliary_weight": 0.0},  # ours: CIFAR-10's without the head, which needs 32x32
    "digits": {**CIFAR10, "epochs": 30, "layers": 8, "init_channels": 16, "auxiliary_weight": 0.0, "cutout_length": 2},
    "folder": CIFAR10,                                      # ours
    "imagenet": IMAGENET,                                   # DARTS, cnn/train_imagenet.py
    "linear": {**IMAGENET, "batch_size": 1024, "learning_rate": 0.5, "lr_scheduler": "linear"},  # PC-DARTS
}
SOURCES = """sources: cifar10 is DARTS's cnn/train.py (section 5.1); cifar100 and svhn RobustDARTS's (section 5.2: 8 cells);
fashion_mnist, digits and folder are ours, after CIFAR-10's; imagenet is DARTS's cnn/train_imagenet.py; linear is
--dataset imagenet --lr_scheduler linear: PC-DARTS's train_imagenet.py. With --image_size, cutout_length shrinks or grows
with the images, and auxiliary_weight is 0 unless the head fits them (32x32; imagenet: 224x224)."""


# ---------------------------------------------------------------- schedules

def make_scheduler(args, optimizer):
    """The learning rate of each epoch. linear: PC-DARTS's, with five epochs of warmup for batches above 256."""
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


# ---------------------------------------------------------------- several processes (torchrun)

def join():
    """(rank, world) of this process: (0, 1) without torchrun. Its processes exchange gradients, and errors by agree()."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if world > 1 and not dist.is_initialized():
        dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    return rank, world


def agree(error):
    """Raises `error`. Of several processes all leave if any has an error; whoever has one says it, the same words once."""
    if not dist.is_initialized():
        if error:
            raise error
        return
    errors = [None] * dist.get_world_size()
    dist.all_gather_object(errors, error)
    said = [str(other) for other in errors[:dist.get_rank()] if other]
    if error and str(error) not in said:
        raise error
    if any(errors):
        raise Exit("", max(other.status for other in errors if other))


def together(work):
    """What work() returns in this process. If it raises Exit in any, all leave."""
    result = error = None
    try:
        result = work()
    except Exit as failure:
        error = failure
    agree(error)
    return result


# ---------------------------------------------------------------- data and network

def download_first(args, world):
    """Several processes: one of each machine reads the data before the others, as it may download and unpack them."""
    if world > 1 and args.dataset != "imagenet":
        for train in (True, False):
            together(lambda: os.environ["LOCAL_RANK"] == "0" and load(args.dataset, args.data, train))


def read_data(args, train, device, layout, rank, world):
    """The batches of the training split, or a function that goes once over the test split; this process's share.

    Also the number of classes and the side of the images.
    """
    seed = make_seed(args.seed, "data")
    if args.dataset == "imagenet":
        data = ImageNet(args, train, seed, device, layout, rank, world)
        return (data if train else lambda: data.epoch(0)), data.classes, data.size
    split = load(args.dataset, args.data, train, args.image_size, args.limit).to(device, layout)
    if train:
        batches = Batches(split, args.batch_size, seed, args.cutout_length, rank, world)
    else:
        batches = functools.partial(test_batches, split, max(1, args.batch_size // world), rank, world)
    return batches, split.classes, split.images.shape[1]


def make_network(genotype, args, classes):
    return Network(genotype, args.init_channels, args.layers, classes, args.auxiliary_weight > 0,
                   args.dataset == "imagenet")


def without_head(state):
    """A network's state without its auxiliary head, which only training needs."""
    return {name: value for name, value in state.items() if not name.startswith("auxiliary_head")}


def count(genotype, args, classes, side):
    """Parameters and multiply-adds of the network. Raises Exit if its auxiliary head does not fit the images."""
    with torch.device("meta"):
        net = make_network(genotype, args, classes)
        try:
            net(torch.zeros(2, 3, side, side))
        except ValueError as error:
            raise Exit(f"{error} (--auxiliary_weight 0)") from None
        return {"parameters": count_parameters(net), "macs": count_macs(net, side)}


# ---------------------------------------------------------------- training and testing

def train_step(net, optimizer, images, labels, args, autocast):
    """One SGD step of loss + auxiliary_weight * auxiliary loss. Nothing here waits for the device."""
    with autocast():
        logits, logits_aux = net(images)
        loss = F.cross_entropy(logits, labels, label_smoothing=args.label_smooth)
        if logits_aux is not None:
            loss = loss + args.auxiliary_weight * F.cross_entropy(logits_aux, labels, label_smoothing=args.label_smooth)
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(net.parameters(), args.grad_clip)
    optimizer.step()
    return loss, logits


@torch.no_grad()
def evaluate(net, batches, device, autocast, look=lambda: None):
    """The metrics of this process's share of the test split, summed. look: called between steps."""
    net.eval()
    totals = torch.zeros(4, device=device)
    for images, labels in batches():
        with autocast():
            logits, _ = net(images)
            loss = F.cross_entropy(logits, labels)
        totals += metrics(loss, logits, labels)
        look()
    return totals


def train(genotype, args, run, rank, world, read=read_data):
    """Trains a network to the last epoch; writes weights.pt and result.json. read: what to train and test on, as read_data."""
    device = together(lambda: find_device(args.device))
    autocast, layout = precision(args.amp, device)
    download_first(args, world)
    batches, classes, side = together(lambda: read(args, True, device, layout, rank, world))
    test, _, _ = together(lambda: read(args, False, device, layout, rank, world))
    counts = together(lambda: count(genotype, args, classes, side))

    torch.manual_seed(args.seed)
    net = make_network(genotype, args, classes).to(device, memory_format=layout)
    optimizer = torch.optim.SGD(net.parameters(), args.learning_rate, args.momentum, weight_decay=args.weight_decay)
    scheduler = make_scheduler(args, optimizer)
    saved = together(lambda: run.begin({"net": net, "optimizer": optimizer, "scheduler": scheduler}))
    together(lambda: run.main and save_text(run.folder / "genotype.json", to_json(genotype)))
    last, best = saved.get("last"), saved.get("best")
    model = net
    if world > 1:                                           # static_graph: a genotype may have nodes that nothing uses
        model = DistributedDataParallel(net, static_graph=True)
    run.say(f"{args.genotype} on {args.dataset}: {counts['parameters']:,} parameters, {counts['macs'] / 1e6:.1f}M "
            f"multiply-adds; {world} x {device.type}; seed {args.seed}; {run.folder}")

    for epoch in range(run.epoch, args.epochs):
        started, lr = time.time(), optimizer.param_groups[0]["lr"]
        torch.manual_seed(make_seed(args.seed, "drop path", epoch, rank))
        net.drop_path_prob = args.drop_path_prob * epoch / args.epochs
        net.train()
        totals = torch.zeros(4, device=device)
        for step, (images, labels) in enumerate(batches.epoch(epoch)):
            loss, logits = train_step(model, optimizer, images, labels, args, autocast)
            totals += metrics(loss, logits, labels)
            run.step(step, batches.steps, totals)
            if world == 1 or (step + 1) % LOOK_EVERY == 0:  # several processes leave at the same step
                agree(run.reason_to_stop())
        seconds = time.time() - started
        scheduler.step()
        if world > 1:                                       # rank 0's running statistics are tested and saved
            for buffer in net.buffers():
                dist.broadcast(buffer, 0)
        look = run.look if world == 1 else lambda: None     # several processes look together, below
        test_totals = together(lambda: evaluate(net, test, device, autocast, look))
        agree(run.reason_to_stop())
        if world > 1:
            dist.all_reduce(totals)
            dist.all_reduce(test_totals)
        (train_loss, train_acc, _), (test_loss, top1, top5) = means(totals), means(test_totals)
        last = {"epoch": epoch, "error": 100 - top1, "error_top5": 100 - top5}
        if best is None or last["error"] < best["error"]:
            best = last
        record = {"epoch": epoch, "lr": lr, "train_loss": train_loss, "train_acc": train_acc, "test_loss": test_loss,
                  "test_error": last["error"], "test_error_top5": last["error_top5"],
                  "best on test (optimistic)": best["error"], "images/s": totals[3].item() / seconds,
                  "seconds": time.time() - started}
        together(lambda: run.end_epoch(record, last=last, best=best))
        run.say(f"epoch {epoch} lr {lr:.6f} | train {train_loss:.3f} {train_acc:.1f}% | test {test_loss:.3f} "
                f"error {last['error']:.2f}% | {clock(record['seconds'])}")
    together(lambda: finish(run, net, last, best, {**counts, **environment(device, world)}))


def environment(device, world):
    return {"device": device_name(device), "processes": world, "python": platform.python_version(), "torch": torch.__version__,
            "torchvision": torchvision.__version__}


def finish(run, net, last, best, facts):
    """Writes weights.pt and then result.json, which marks the run as finished."""
    if run.main:
        weights = {name: value.cpu().contiguous() for name, value in without_head(net.state_dict()).items()}
        save(run.folder / "weights.pt", lambda file: torch.save(weights, file))
        result = {"test_error": last["error"], "test_error_top5": last["error_top5"], "epoch": last["epoch"],
                  "best on test (optimistic)": best["error"], "best_epoch": best["epoch"], "seed": run.args.seed, **facts}
        save_text(run.result, json.dumps(result, indent=1))
    run.say(f"test error {last['error']:.2f}% after the last epoch (best on test (optimistic) {best['error']:.2f}%, "
            f"epoch {best['epoch']}); {run.folder / 'weights.pt'}")


def evaluate_file(path, args, rank, world):
    """Prints the test error of a run's weights.pt or checkpoint.pt."""
    def prepare_test():
        state = load_checkpoint(path)
        weights = state.get("net", state)                   # a checkpoint.pt has more than the network
        try:
            weights = without_head(weights)
            args.auxiliary_weight = 0
            net = make_network(read_genotype(path.parent / "genotype.json"), args, len(weights["classifier.bias"]))
            net.load_state_dict(weights)
        except (AttributeError, KeyError, TypeError, RuntimeError) as error:
            raise Exit(f"{path} holds no network of this run ({type(error).__name__})") from None
        test, classes, _ = read_data(args, False, device, layout, rank, world)
        if classes != net.classifier.out_features:
            raise Exit(f"{path} was trained on {net.classifier.out_features} classes, and the test data have {classes}")
        return net.to(device, memory_format=layout), test

    device = together(lambda: find_device(args.device))
    autocast, layout = precision(args.amp, device)
    download_first(args, world)
    net, test = together(prepare_test)
    totals = together(lambda: evaluate(net, test, device, autocast))
    if world > 1:
        dist.all_reduce(totals)
    loss, top1, top5 = means(totals)
    if rank == 0:
        print(f"{path} on {args.dataset}: test error {100 - top1:.2f}% (top-5 {100 - top5:.2f}%), loss {loss:.4f}")


# ---------------------------------------------------------------- the command

def make_parser():
    rows = ["defaults".ljust(17) + "".join(name.rjust(14) for name in PROTOCOLS)]
    rows += [flag.ljust(17) + "".join(str(protocol[flag]).rjust(14) for protocol in PROTOCOLS.values()) for flag in CIFAR10]
    parser = Parser("retrain.py", description=__doc__, epilog="\n".join([*rows, SOURCES]))
    add = parser.add_argument
    add("--dataset", default="cifar10", choices=DATASETS, help="default %(default)s")
    add("--data", default="data", help="folder of the data sets; for imagenet and folder the one with train/ and val/ "
        "(default %(default)s)")
    add("--image_size", type=number(int, 8, 512), help="resize the images to this side, in pixels (default: as they are; "
        "32 for folder, crops of 224 for imagenet)")
    add("--limit", type=number(int, 2), help="use the first LIMIT training images only (default: all)")
    add("--genotype", help="a genotype.json, or a name of `python genotypes.py`")
    add("--epochs", type=number(int, 1), help="number of epochs; the table below has the defaults of this flag and of "
        "all up to --cutout_length")
    add("--batch_size", type=number(int, 2), help="images in a step, all processes together")
    add("--layers", type=number(int, 3, 1000), help="number of cells")
    add("--init_channels", type=number(int, 2, 4096), help="channels of the first cell")
    add("--lr_scheduler", choices=("cosine", "exponential", "linear"), help="cosine to 0; times --gamma each epoch; linear "
        "to 0, with a warmup for batches above 256")
    add("--learning_rate", type=number(float, 0), help="SGD learning rate")
    add("--gamma", type=number(float, 0, 1, above=True), help="factor of --lr_scheduler exponential")
    add("--momentum", type=number(float, 0, 1), help="SGD momentum")
    add("--weight_decay", type=number(float, 0), help="SGD weight decay")
    add("--grad_clip", type=number(float, 0, above=True), help="largest 2-norm of the whole gradient")
    add("--label_smooth", type=number(float, 0, 1), help="label smoothing, in training")
    add("--auxiliary_weight", type=number(float, 0), help="weight of the auxiliary head's loss; 0: no head")
    add("--drop_path_prob", type=number(float, 0, 0.99), help="drop-path probability at the end, growing linearly from 0")
    add("--cutout_length", type=number(int, 0), help="side of the square that is cut out, in pixels; 0: none")
    add("--seed", type=number(int, 0), default=0, help="default %(default)s: DARTS")
    add("--device", help="torch device (default: CUDA if there is any, else the CPU)")
    add("--amp", action="store_true", help="bfloat16 autocast and TF32: other numbers, and faster on GPUs that have bfloat16")
    add("--workers", type=number(int, 0), default=4, help="processes that read ImageNet, for each training process "
        "(default %(default)s: DARTS)")
    add("--out", help="run folder (default runs/retrain-DATASET-GENOTYPE-SEED)")
    add("--resume", metavar="FOLDER", help="continue an interrupted run, with its settings")
    add("--evaluate", metavar="FILE", help="test a run's weights.pt or checkpoint.pt, and end")
    parser.set_defaults(**CIFAR10)
    return parser


def protocol(args):
    """The defaults of a data set's training, fitted to --image_size."""
    linear = args.dataset == "imagenet" and args.lr_scheduler == "linear"
    defaults = dict(PROTOCOLS["linear" if linear else args.dataset])
    size = args.image_size or DATASETS[args.dataset].size
    defaults["cutout_length"] = defaults["cutout_length"] * size // DATASETS[args.dataset].size
    if size != (224 if args.dataset == "imagenet" else 32):  # the auxiliary head fits no other
        defaults["auxiliary_weight"] = 0.0
    return defaults


def parse(arguments):
    """The flags, checked against each other, with the run folder's name filled in."""
    parser = make_parser()
    args = parser.parse_args(arguments)
    if args.evaluate is not None and args.resume is not None:
        raise Exit("--evaluate and --resume cannot be combined: give one")
    if args.evaluate is not None:
        return keep_settings(parser, Path(args.evaluate).parent, arguments)
    if args.resume is not None:
        return keep_settings(parser, Path(args.resume), arguments)
    parser.set_defaults(**protocol(args))
    args = parser.parse_args(arguments)
    if args.genotype is None:
        raise Exit("--genotype is needed: a genotype.json, or a name of `python genotypes.py`")
    if args.lr_scheduler == "linear" and args.epochs < 6:
        raise Exit("--lr_scheduler linear needs --epochs 6 or more: its last five are a phase of their own")
    path = Path(args.genotype)                              # a published name as it is; of runs/NAME/genotype.json, NAME
    name = path.parent.name if path.name == "genotype.json" and path.parent.name else path.stem
    args.out = args.out or f"runs/retrain-{args.dataset}-{name}-{args.seed}"
    return args


def read_genotype(name_or_file):
    try:
        return load_genotype(str(name_or_file))
    except ValueError as error:
        raise Exit(f"--genotype: {error}") from None


def how_to_resume(args, world):
    """In words: the command that goes on with this run."""
    here = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if world > here:
        return f"the command that started it, --resume {shlex.quote(args.out)} in place of its flags, on every machine"
    launcher = f"torchrun --nproc_per_node={here}" if world > 1 else "python"
    return f"`{launcher} retrain.py --resume {shlex.quote(args.out)}`"


def prepare_run(args, rank, world):
    """(genotype, Run): what can be wrong about them is known before any data are read."""
    if args.resume is None:
        args.processes = world                              # kept in config.json: a resumed run needs as many
    elif args.processes != world:
        raise Exit(f"{args.out} is a run of {args.processes} processes, not {world}: resume with as many")
    if args.batch_size < 2 * world:
        raise Exit(f"--batch_size {args.batch_size} is that of all {world} processes: each needs two images of it")
    kept = Path(args.out) / "genotype.json"
    genotype = read_genotype(kept if args.resume is not None else args.genotype)
    return genotype, Run("retrain.py", args, "result.json", how_to_resume(args, world), main=rank == 0)


def main(arguments):
    rank, world = join()
    args = together(lambda: parse(arguments))
    if args.evaluate is not None:
        evaluate_file(Path(args.evaluate), args, rank, world)
    else:
        genotype, run = together(lambda: prepare_run(args, rank, world))
        train(genotype, args, run, rank, world)
    if world > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    start("retrain.py", main)
