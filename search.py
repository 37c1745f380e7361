"""The search: bi-level training of the super-network, then the derivation. Sections 2.2 (Eq. 2), 4 and 5.1.

    python search.py --node_norm --larc --sqrt_beta                    the paper's: CIFAR-10, one CUDA GPU
    python search.py --node_norm --larc --sqrt_beta --dataset digits   a small one: no GPU, no download
    python search.py --dataset imagenet --data DIR --proxy FILE ...    ImageNet's proxy data, see proxy.py
    torchrun --nproc_per_node=4 search.py ...                          several GPUs, or several machines

Without the three switches it is DARTS (first order) with the paper's larger weight decay, as in Table 4.
Under torchrun --batch_size is that of all processes together; batch norm and node normalization see their own
process's images only, as with DataParallel in every published code.
Whatever the paper leaves to DARTS follows quark0/darts, cnn/train_search.py and cnn/architect.py at f276dd3.
"""
import json
import shlex
import sys
import time
from collections import Counter, namedtuple
from pathlib import Path

import torch
import torch.nn.functional as F

from data import DATASETS, Batches, ImageNet, imagenet_folder, load
from genotypes import SPACES, Genotype, darts_notation, describe, to_json
from larc import LARC
from model import SuperNet
from proxy import read_proxy
from run import Parser, Run, add_up, autocast, average_gradients, check_processes, device_name, find_device, \
    join, make_seed, means, metrics, number, one_first, parse_flags, place, save, share_buffers, start, write


# ---------------------------------------------------------------- derivation (section 2.2)

def derive(space, betas):
    """The genotype of beta: for each node two edges, on each the strongest operation but `none`.

    betas: {"normal" or "reduce": (edges, operations)}, in the space's order of edges and primitives. An edge
    is as strong as its strongest operation; the two strongest stay, the stronger first. Ties go to the first.
    """
    cells = {}
    for cell, edges in space.items():
        into = {}                                           # {target: [(beta, source, operation) by edge]}
        for ((i, j), primitives), beta in zip(edges.items(), betas[cell].tolist()):
            operations = [(b, i, name) for b, name in zip(beta, primitives) if name != "none"]
            into.setdefault(j, []).append(max(operations, key=lambda operation: operation[0]))
        nodes = [sorted(into[j], key=lambda edge: -edge[0])[:2] for j in sorted(into)]       # stable
        cells[cell] = tuple(tuple((name, i) for _, i, name in node) for node in nodes)
        cells[f"{cell}_concat"] = tuple(sorted(into))
    return Genotype(**cells)


# ---------------------------------------------------------------- one step (Eq. 2)

def loss_of(net, images, labels):
    with autocast(images.device, net.amp):
        logits = net(images)
        return F.cross_entropy(logits, labels), logits


def alpha_step(net, optimizer, images, labels):
    """min over alpha of L_val(w, alpha), Eq. 2 in first order: at the present w."""
    loss, logits = loss_of(net, images, labels)
    optimizer.zero_grad()
    loss.backward(inputs=list(net.alphas.values()))
    average_gradients(net.alphas.values())                  # under torchrun
    optimizer.step()
    return loss, logits


def weight_step(net, optimizer, images, labels, grad_clip):
    """min over w of L_train(w, alpha), the constraint of Eq. 2."""
    loss, logits = loss_of(net, images, labels)
    optimizer.zero_grad()
    loss.backward(inputs=net.weights)
    average_gradients(net.weights)
    torch.nn.utils.clip_grad_norm_(net.weights, grad_clip)
    optimizer.step()
    return loss, logits


# ---------------------------------------------------------------- the parts of a search

# What a search trains and sees. w_batches: the half for w. alpha_batches and validation: the half for alpha.
Parts = namedtuple("Parts", ["args", "net", "w_optimizer", "alpha_optimizer", "scheduler", "w_batches",
                             "alpha_batches", "validation"])


def make_parts(args, make_net=None):
    """The network's own constructor is make_net(args, number of classes), by default the paper's."""
    device = find_device(args.device)
    w_batches, alpha_batches, validation = make_batches(args, device)
    torch.manual_seed(args.seed)
    net = (make_net or make_supernet)(args, len(w_batches.classes))
    net = place(net, device, args.amp)
    return Parts(args, net, *make_optimizers(net, args), w_batches, alpha_batches, validation)


def make_batches(args, device):
    """Batches for w, for alpha and for the validation; under torchrun this process's share of them."""
    seeds = [make_seed(args.seed, purpose) for purpose in ("w", "alpha", "validation")]
    rank, world = join()
    with one_first():
        if args.dataset == "imagenet":
            folder = imagenet_folder(args, True, augmented=True)
            w, alpha = read_proxy(args, len(folder))
            return [ImageNet(args, True, seed, device, rank, world, folder, half)
                    for seed, half in zip(seeds, (w, alpha, alpha))]
        w, alpha = read_halves(args, device)
    return [Batches(half, args.batch_size, seed, rank=rank, world=world)
            for seed, half in zip(seeds, (w, alpha, alpha))]


def read_halves(args, device):
    """The training split's first part, for w, and the rest, for alpha. The test split is never read."""
    split = load(args.dataset, args.data, True, args.image_size, args.limit).to(device)
    if args.proxy is not None:
        return [split.take(half) for half in read_proxy(args, len(split.labels))]
    cut = int(args.train_portion * len(split.labels))
    return split.part(0, cut), split.part(cut, None)


def make_supernet(args, num_classes):
    return SuperNet(SPACES[args.space], args.init_channels, args.layers, num_classes, args.node_norm,
                    args.sqrt_beta, args.stem_multiplier, args.dataset == "imagenet")


def make_optimizers(net, args):
    """(optimizer of w, optimizer of alpha, schedule of w): SGD or LARC, Adam, a cosine over the epochs."""
    sgd = {"lr": args.learning_rate, "momentum": args.momentum, "weight_decay": args.weight_decay}
    if args.larc:
        w_optimizer = LARC(net.weights, **sgd, trust_coefficient=args.larc_trust, clip=args.larc_clip)
    else:
        w_optimizer = torch.optim.SGD(net.weights, **sgd)
    alpha_optimizer = torch.optim.Adam(net.alphas.values(), args.arch_learning_rate, betas=(0.5, 0.999),
                                       weight_decay=args.arch_weight_decay)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(w_optimizer, args.epochs, args.learning_rate_min)
    return w_optimizer, alpha_optimizer, scheduler


# ---------------------------------------------------------------- the loop

def search(args, run):
    """The whole search, or the rest of a resumed one."""
    parts = make_parts(args)
    begin(parts, run)
    for epoch in range(run.epoch, args.epochs):
        record = train_epoch(parts, epoch)                  # alpha step, weight step, over and over (Eq. 2)
        end_epoch(parts, run, record)                       # validate, log, save a checkpoint
    if run.main:
        finish(run, derive(parts.net.space, parts.net.betas()), sum(record["seconds"] for record in run.log))


def begin(parts, run):
    args, net = parts.args, parts.net
    states = {name: getattr(parts, name) for name in ("net", "w_optimizer", "alpha_optimizer", "scheduler")}
    run.begin(states, parts.w_batches.classes)
    run.say(f"{args.dataset}: {parts.w_batches.count} images for w, {parts.alpha_batches.count} for alpha; "
            f"{sum(p.numel() for p in net.weights):,} weights; {find_device(args.device)}; {run.folder}")
    if run.main and args.proxy is not None and args.resume is None:
        write(run.folder / "proxy.json", Path(args.proxy).read_bytes())
    if run.main and args.keep_nets and run.epoch == 0:
        save(net.state_dict(), run.folder / "net-0.pt")


def first_order(parts, alpha_batch, w_batch):               # w_batch: for second order
    alpha_step(parts.net, parts.alpha_optimizer, *alpha_batch)


def train_epoch(parts, epoch, take_alpha_step=first_order):
    """One pass over the half for w. Returns what to log about it."""
    args, net, totals = parts.args, parts.net, 0
    started, lr = time.time(), parts.w_optimizer.param_groups[0]["lr"]
    torch.manual_seed(make_seed(args.seed, "noise", epoch, parts.w_batches.rank))           # S4's
    net.train()
    alpha_batches = parts.alpha_batches.stream(epoch * parts.w_batches.steps)
    for w_batch, alpha_batch in zip(parts.w_batches.epoch(epoch), alpha_batches):
        take_alpha_step(parts, alpha_batch, w_batch)
        loss, logits = weight_step(net, parts.w_optimizer, *w_batch, args.grad_clip)
        totals = totals + metrics(loss, logits, w_batch[1])  # on the device: no step waits for it
    share_buffers(net)
    train_loss, train_acc, _ = means(add_up(totals))
    parts.scheduler.step()
    seconds = time.time() - started
    return {"epoch": epoch, "lr": lr, "train_loss": train_loss, "train_acc": train_acc, "seconds": seconds,
            "images/s": 2 * totals[3].item() / seconds, "device": device_name(totals.device)}


def end_epoch(parts, run, record):
    """Validates, then logs and saves the epoch."""
    validate(parts, record)
    record["genotype"] = derive(parts.net.space, parts.net.betas())._asdict()
    keep(parts, run, record)
    nodes = record["genotype"]["normal"] + record["genotype"]["reduce"]
    chosen = Counter(name for node in nodes for name, _ in node)
    run.say(epoch_line(record, ", ".join(f"{count} {name}" for name, count in sorted(chosen.items()))))


def validate(parts, record):
    """Adds loss and accuracy on the half for alpha to an epoch's record, the alphas, and mean betas."""
    started, net, space, betas = time.time(), parts.net, parts.net.space, parts.net.betas()
    valid_loss, valid_acc, _ = means(add_up(evaluate(net, parts.validation, record["epoch"])))
    record |= {"valid_loss": valid_loss, "valid_acc": valid_acc,
               "beta_none": mean_beta(space, betas, "none"),
               "beta_skip": mean_beta(space, betas, "skip_connect"),
               "alphas": {cell: alpha.tolist() for cell, alpha in net.alphas.items()}}
    record["seconds"] += time.time() - started


def keep(parts, run, record):
    """Logs and saves a validated epoch, with --keep_nets its network too."""
    if run.main and parts.args.keep_nets:                   # before the checkpoint: a resumed run lacks none
        save(parts.net.state_dict(), run.folder / f"net-{record['epoch'] + 1}.pt")
    run.end_epoch(record)


@torch.no_grad()
def evaluate(net, batches, epoch):
    """The summed metrics of the half for alpha, augmented as in DARTS, in eval mode (running statistics)."""
    net.eval()
    return sum(metrics(*loss_of(net, images, labels), labels) for images, labels in batches.epoch(epoch))


def mean_beta(space, betas, primitive):
    """Mean beta of a primitive over all edges of both cells that have it, or None if none has."""
    values = [row[primitives.index(primitive)].item() for cell in space
              for row, primitives in zip(betas[cell], space[cell].values()) if primitive in primitives]
    return sum(values) / len(values) if values else None


def epoch_line(record, cell):
    betas = [f"{key.replace('_', ' ')} {record[key]:.4f}" for key in ("beta_none", "beta_skip")
             if record[key] is not None]
    return " | ".join([f"epoch {record['epoch']} lr {record['lr']:.6f}",
                       f"train {record['train_loss']:.3f} {record['train_acc']:.1f}%",
                       f"valid {record['valid_loss']:.3f} {record['valid_acc']:.1f}%", *betas,
                       cell, f"{record['seconds']:.0f} s"])


def finish(run, genotype, seconds):
    """Writes the cell and, beside it, the search it came from, which retrain.py copies for the tables."""
    source = {**vars(run.args), "seconds": seconds, "device": run.log[-1]["device"],
              "genotype": genotype._asdict()}
    write(run.folder / "search.json", json.dumps(source, indent=1))
    write(run.result, to_json(genotype))
    run.say(f"{run.result}\n{describe(genotype)}\n  in DARTS's notation, for a fork's genotypes.py:\n"
            f"{darts_notation(genotype)}\n{retrain_command(run.args, run.result)}")


def retrain_command(args, genotype):
    words = ["python", "retrain.py", "--genotype", str(genotype), "--dataset", args.dataset]
    if args.data != "data":
        words += ["--data", args.data]
    if args.image_size is not None:
        words += ["--image_size", str(args.image_size)]
    return shlex.join(words)


# ---------------------------------------------------------------- the command

def make_parser(program="search.py", description=__doc__):
    parser = Parser(program, description=description)
    add = parser.add_argument_group("the paper's components (section 4)").add_argument
    add("--node_norm", action="store_true", help="normalize every intermediate node, Eq. 3 (section 4.1)")
    add("--larc", action="store_true", help="a learning rate for each tensor (section 4.2)")
    add("--sqrt_beta", action="store_true", help="weigh operations by the root of beta, Eq. 6 (section 4.3)")
    add("--larc_trust", type=number(float, 0, above=True), default=1.0,
        help="trust coefficient of --larc; section 4.2 has none")
    add("--larc_clip", action="store_true",
        help="clip form of --larc, at most the global rate (with --larc_trust 0.02: the authors' release)")

    add = parser.add_argument_group("the search (defaults: DARTS, but for the weight decay)").add_argument
    add("--epochs", type=number(int, 1), default=50, help="number of epochs")
    add("--batch_size", type=number(int, 2), default=64, help="images in each step's two; release: 96")
    add("--learning_rate", type=number(float, 0), default=0.025, help="SGD rate of the first epoch")
    add("--learning_rate_min", type=number(float, 0), default=0.001, help="SGD rate at the cosine's end")
    add("--momentum", type=number(float, 0, 1), default=0.9, help="SGD momentum")
    add("--weight_decay", type=number(float, 0), default=5e-3, help="section 3, DARTS-L2: 5e-3; DARTS: 3e-4")
    add("--grad_clip", type=number(float, 0, above=True), default=5.0, help="largest 2-norm of w's gradient")
    add("--arch_learning_rate", type=number(float, 0), default=3e-4, help="Adam rate of alpha")
    add("--arch_weight_decay", type=number(float, 0), default=1e-3, help="weight decay of alpha")
    add("--train_portion", type=number(float, 0, 1, above=True), default=0.5,
        help="part of the training split that trains w; the rest trains alpha")
    add("--seed", type=number(int, 0), default=2, help="random seed")

    add = parser.add_argument_group("the network (defaults: DARTS)").add_argument
    add("--space", default="darts", choices=SPACES, help="section 5.1: darts; section 5.2: s1 to s4")
    add("--init_channels", type=number(int, 1, 4096), default=16, help="channels of the first cell")
    add("--layers", type=number(int, 3, 1000), default=8, help="number of cells")
    add("--stem_multiplier", type=number(int, 1, 64), default=3,
        help="channels of the stem, in units of --init_channels; the release has 1")

    add = parser.add_argument_group("the data").add_argument
    add("--dataset", default="cifar10", choices=DATASETS, help="section 5.1: cifar10; Table 2: imagenet")
    add("--data", default="data", help="folder of the data sets; for imagenet and folder, of train/")
    add("--proxy", metavar="FILE", help="search on the images that proxy.py chose, in its two halves")
    add("--image_size", type=number(int, 8, 512),
        help="side to which images are resized (default: as they are; 32 for folder, 224 for imagenet)")
    add("--limit", type=number(int, 4), help="use the first LIMIT training images only")

    add = parser.add_argument_group("the run").add_argument
    add("--device", help="torch device (default: CUDA if there is any, else the CPU)")
    add("--amp", action="store_true", help="bfloat16 and TF32: other numbers, faster on some GPUs")
    add("--workers", type=number(int, 0), default=4, help="processes that read each half of ImageNet")
    add("--keep_nets", action="store_true", help="keep the super-network of every epoch, for the figures")
    add("--out", help="run folder (default: in runs/, named after all flags that are not at their defaults)")
    add("--resume", metavar="FOLDER", help="continue a run, with its flags; --data and --device may change")
    return parser


def parse(arguments, parser=None, method=None):
    """The flags, checked against each other, with the run folder's name filled in."""
    parser = parser or make_parser()
    args = parse_flags(parser, arguments)
    args.out = args.out or f"runs/{folder_name(args, parser, method)}"
    if args.dataset == "imagenet" and args.proxy is None:
        raise SystemExit("ImageNet would take weeks: --dataset imagenet needs --proxy FILE, from "
                         "`python proxy.py --dataset imagenet --data DIR --out FILE`")
    if args.proxy is not None and (args.limit, args.train_portion) != (None, 0.5):
        raise SystemExit("--proxy says which images train w and alpha: leave out --limit and --train_portion")
    if args.learning_rate_min > args.learning_rate:
        raise SystemExit(f"--learning_rate {args.learning_rate} is below --learning_rate_min "
                         f"{args.learning_rate_min}")
    if not args.larc and (args.larc_clip or args.larc_trust != 1):
        raise SystemExit("--larc_trust and --larc_clip change LARC: they need --larc")
    if args.sqrt_beta and not args.node_norm:
        print("warning: --sqrt_beta without --node_norm lets node variances grow with depth (about 2, 6, 15, "
              "32 at the nodes of the first cell, against 1 with it)", file=sys.stderr)
    return args


def folder_name(args, parser, method):
    """Data set, space, method, the flags that are not at their defaults, seed: every setting gets its own."""
    switches = [flag for flag in ("node_norm", "larc", "sqrt_beta") if getattr(args, flag)]
    name = "+".join([method, *switches] if method else switches) or "darts_l2"
    elsewhere = {*switches, "dataset", "space", "seed", "data", "device", "workers", "out", "resume"}
    others = [f"{flag}={value}".replace("/", "-") for flag, value in vars(args).items()
              if flag not in elsewhere and value != parser.get_default(flag)]
    return "-".join([args.dataset, args.space, name, *others, str(args.seed)])


def main(arguments):
    args, (rank, world) = parse(arguments), join()
    check_processes(args, world)
    with Run(args, "genotype.json", main=rank == 0) as run:
        search(args, run)


if __name__ == "__main__":
    start(main)
