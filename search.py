"""The search: bi-level training of the super-network, then the derivation. Sections 2.2, 4 and 5.1.

    python search.py --node_norm --larc --sqrt_beta                    the paper's: CIFAR-10, a GPU
    python search.py --node_norm --larc --sqrt_beta --dataset digits   a small one: a minute, no GPU
    python search.py --dataset imagenet --data DIR --proxy FILE ...    ImageNet's, see proxy.py
    torchrun --nproc_per_node=4 search.py ...                          several GPUs, or machines

Without the three switches it is DARTS (first order) with the paper's larger weight decay, as in
Table 4. Under torchrun --batch_size is that of all processes together; batch norm and node
normalization see their own process's images only, as with DataParallel in every published code.
Whatever the paper leaves to DARTS follows quark0/darts f276dd3, cnn/{train_search,architect}.py.
"""
import json
import shlex
import sys
import time
from collections import Counter
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F

from data import (Batches, add_data_flags, make_batches, make_seed, open_split, progress,
                  read_proxy)
from genotypes import SPACES, Genotype, darts_notation, describe, to_json
from larc import LARC
from model import SuperNet, evaluate, means, metrics, place, share_buffers
from run import (RANK, WORLD, Parser, Run, add_run_flags, device_name, find_device, fraction,
                 natural, non_negative, number, parse_flags, positive, positive_int, say, start,
                 write)

DEFAULTS = {"digits": {"layers": 3, "init_channels": 8, "epochs": 6, "batch_size": 128,
                       "arch_learning_rate": 0.03}}         # ours; DARTS's for all other data sets


# ---------------------------------------------------------------- derivation (section 2.2)

def derive(space, betas):
    """The genotype of beta: for each node two edges, on each the strongest operation but `none`.

    betas: {"normal" or "reduce": (edges, operations)}, in the space's order of edges and
    primitives. An edge is as strong as its strongest operation; the two strongest stay, the
    stronger first. Ties go to the first.
    """
    cells = {}
    for cell_type, edges in space.items():
        into = {}                                           # {target: [(beta, source, operation)]}
        for ((i, j), primitives), beta in zip(edges.items(), betas[cell_type].tolist()):
            operations = [(b, i, name) for b, name in zip(beta, primitives) if name != "none"]
            into.setdefault(j, []).append(max(operations, key=lambda operation: operation[0]))
        nodes = [sorted(into[j], key=lambda edge: -edge[0])[:2] for j in sorted(into)]  # stable
        cells[cell_type] = tuple(tuple((name, i) for _, i, name in node) for node in nodes)
        cells[f"{cell_type}_concat"] = tuple(sorted(into))
    return Genotype(**cells)


# ---------------------------------------------------------------- one step (Eq. 2)

def alpha_step(net, optimizer, images, labels):
    """One step of min over alpha of L_val(w, alpha), Eq. 2 in first order: at the present w.

    images: (B, 3, H, W), labels: (B,), of the half for alpha.
    """
    loss = F.cross_entropy(net(images), labels)
    optimizer.zero_grad()
    loss.backward(inputs=list(net.alphas.values()))
    optimizer.step()


def weight_step(net, optimizer, images, labels, grad_clip):
    """One step of min over w of L_train(w, alpha), Eq. 2's constraint. Returns (loss, logits)."""
    logits, weights = net(images), net.weights
    loss = F.cross_entropy(logits, labels)
    optimizer.zero_grad()
    loss.backward(inputs=weights)
    torch.nn.utils.clip_grad_norm_(weights, grad_clip)
    optimizer.step()
    return loss, logits


def average_gradients(net):
    """Under torchrun every gradient, once made, becomes its mean over all processes: an all-reduce
    for each. (DistributedDataParallel has one fixed set of parameters; a search has two, in turn.)
    """
    def average(p):
        dist.all_reduce(p.grad)
        p.grad /= WORLD
    for p in net.parameters() if WORLD > 1 else ():
        p.register_post_accumulate_grad_hook(average)


# ---------------------------------------------------------------- the parts of a search

class Parts(NamedTuple):
    """What a search trains, and the batches that it sees; validation: of the half for alpha."""
    args: object
    net: SuperNet
    w_optimizer: torch.optim.Optimizer
    alpha_optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LRScheduler
    w_batches: Batches
    alpha_batches: Batches
    validation: Batches


def read_halves(args, device):
    """The training split's first part, for w, and its rest, for alpha; never the test split."""
    split = open_split(args, True, device)
    if args.proxy is not None:
        return read_proxy(args, split)
    count = len(split.labels)
    if args.dataset == "imagenet" and count > 200_000:
        say(f"warning: {count:,} images may take weeks; proxy.py chooses some of them", sys.stderr)
    cut = int(args.train_portion * count)
    return split.take(slice(0, cut)), split.take(slice(cut, None))


def make_supernet(args, num_classes):
    return SuperNet(SPACES[args.space], args.init_channels, args.layers, num_classes,
                    args.node_norm, args.sqrt_beta, args.stem_multiplier,
                    args.dataset == "imagenet")


def make_optimizers(net, args):
    """(optimizer of w, optimizer of alpha, schedule of w): SGD or LARC, Adam, a cosine."""
    sgd = args.learning_rate, args.momentum
    if args.larc:
        w_optimizer = LARC(net.weights, *sgd, args.weight_decay, args.larc_trust, args.larc_clip)
    else:
        w_optimizer = torch.optim.SGD(net.weights, *sgd, weight_decay=args.weight_decay)
    alpha_optimizer = torch.optim.Adam(net.alphas.values(), args.arch_learning_rate,
                                       betas=(0.5, 0.999), weight_decay=args.arch_weight_decay)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(w_optimizer, args.epochs,
                                                           args.learning_rate_min)
    return w_optimizer, alpha_optimizer, scheduler


def make_parts(args, make_net=make_supernet):
    device = find_device(args.device)
    w_half, alpha_half = read_halves(args, device)
    halves = {"w": w_half, "alpha": alpha_half, "validation": alpha_half}
    batches = [make_batches(half, args.batch_size, make_seed(args.seed, purpose))
               for purpose, half in halves.items()]
    torch.manual_seed(args.seed)
    net = place(make_net(args, len(w_half.classes)), device, args.amp)
    average_gradients(net)
    return Parts(args, net, *make_optimizers(net, args), *batches)


# ---------------------------------------------------------------- the loop

def search(args, run):
    """The whole search, or the rest of a resumed one."""
    parts = make_parts(args)
    begin(parts, run)
    for epoch in range(run.epoch, args.epochs):
        record = train_epoch(parts, epoch)                  # alpha, w, alpha, w, ... (Eq. 2)
        end_epoch(parts, run, record)                       # validate, log, save a checkpoint
    genotype = derive(parts.net.space, parts.net.betas())
    finish(run, genotype, sum(record["seconds"] for record in run.log))


def begin(parts, run):
    """Loads what a resumed run has done, and says what is searched on what."""
    split, names = parts.w_batches.split, ("net", "w_optimizer", "alpha_optimizer", "scheduler")
    run.begin({name: getattr(parts, name) for name in names},
              {"classes": split.classes, "train_split": split.name})
    say(f"{parts.args.dataset}: {parts.w_batches.count} images for w, {parts.alpha_batches.count} "
        f"for alpha; {sum(w.numel() for w in parts.net.weights):,} weights; {run.folder}")


def first_order(parts, alpha_batch, w_batch):               # w_batch: for second order
    alpha_step(parts.net, parts.alpha_optimizer, *alpha_batch)


def train_epoch(parts, epoch, take_alpha_step=first_order):
    """One pass over the half for w. Returns its record.

    lr: of w; train_loss: mean; train_acc: top-1 in percent; seconds; images_per_second: of both
    halves together; device: its name.
    """
    args, net = parts.args, parts.net
    started, lr, totals = time.monotonic(), parts.w_optimizer.param_groups[0]["lr"], 0
    torch.manual_seed(make_seed(args.seed, "noise", epoch, RANK))               # S4's
    net.train()
    batches = zip(parts.w_batches.epoch(epoch), parts.alpha_batches.stream(epoch))
    for w_batch, alpha_batch in progress(batches, f"epoch {epoch}", parts.w_batches.steps,
                                         2 * args.batch_size):
        take_alpha_step(parts, alpha_batch, w_batch)
        loss, logits = weight_step(net, parts.w_optimizer, *w_batch, args.grad_clip)
        totals += metrics(loss, logits, w_batch[1])         # on the device: no step waits for it
    share_buffers(net)
    train_loss, train_acc, _, images = means(totals)
    parts.scheduler.step()
    seconds = time.monotonic() - started
    return {"epoch": epoch, "lr": lr, "train_loss": train_loss, "train_acc": train_acc,
            "seconds": seconds, "images_per_second": 2 * images / seconds,
            "device": device_name(totals.device)}


def end_epoch(parts, run, record):
    """Validates, then logs and saves the epoch."""
    genotype = derive(parts.net.space, parts.net.betas())
    validate(parts, record)
    run.end_epoch(record | {"genotype": genotype._asdict()})
    chosen = Counter(name for node in genotype.normal + genotype.reduce for name, _ in node)
    say(epoch_line(record, ", ".join(f"{count} {name}" for name, count in sorted(chosen.items()))))


def validate(parts, record):
    """Adds valid_loss and valid_acc on the half for alpha, mean betas, and alphas to the record."""
    started, net, space, betas = time.monotonic(), parts.net, parts.net.space, parts.net.betas()
    batches = parts.validation.shown(record["epoch"], "validation")         # augmented, as in DARTS
    valid_loss, valid_acc, *_ = evaluate(net, batches)
    record |= {"valid_loss": valid_loss, "valid_acc": valid_acc,
               "beta_none": mean_beta(space, betas, "none"),
               "beta_skip": mean_beta(space, betas, "skip_connect"),
               "alphas": {cell_type: alpha.tolist() for cell_type, alpha in net.alphas.items()}}
    record["seconds"] += time.monotonic() - started


def mean_beta(space, betas, primitive):
    """Mean beta of a primitive over all edges that have it, or None if none has."""
    values = [row[primitives.index(primitive)].item() for cell_type in space
              for row, primitives in zip(betas[cell_type], space[cell_type].values())
              if primitive in primitives]
    return sum(values) / len(values) if values else None


def epoch_line(record, cell):
    betas = [f"beta {name} {record[f'beta_{name}']:.4f}" for name in ("none", "skip")
             if record[f"beta_{name}"] is not None]
    return " | ".join(["epoch {epoch} lr {lr:.6f}", "train {train_loss:.3f} {train_acc:.1f}%",
                       "valid {valid_loss:.3f} {valid_acc:.1f}%", *betas, cell,
                       "{seconds:.0f} s"]).format(**record)


def finish(run, genotype, seconds):
    """Writes the cell and the search it came from, which retrain.py copies for the tables."""
    source = {**vars(run.args), "train_split": run.facts["train_split"], "seconds": seconds,
              "device": run.log[-1]["device"], "genotype": genotype._asdict()}
    write(run.folder / "search.json", json.dumps(source, indent=1))
    write(run.result, to_json(genotype))
    say(f"{run.result}\n{describe(genotype)}\n  in DARTS's notation, for a fork's genotypes.py:\n"
        f"{darts_notation(genotype)}")
    words = ["python", "retrain.py", "--genotype", str(run.result), "--dataset", run.args.dataset]
    for flag in ("data", "image_size"):
        if getattr(run.args, flag) not in ("data", None):
            words += [f"--{flag}", str(getattr(run.args, flag))]
    say(f"{shlex.join(words)}\npython -m experiments.figures 1 {shlex.quote(str(run.folder))}")


# ---------------------------------------------------------------- the command

def make_parser(program="search.py", description=__doc__):
    small = [f"with --dataset {name} the defaults are {flags}" for name, flags in DEFAULTS.items()]
    parser = Parser(program, description=description, epilog="\n".join(small))
    add = parser.add_argument_group("the paper's components (section 4)").add_argument
    add("--node_norm", action="store_true", help="normalize every node, Eq. 3 (section 4.1)")
    add("--larc", action="store_true", help="a learning rate for each tensor (section 4.2)")
    add("--sqrt_beta", action="store_true", help="weigh by sqrt(beta), Eq. 6 (section 4.3)")
    add("--larc_trust", type=positive, default=1.0, help="trust coefficient, t in larc.py")
    add("--larc_clip", action="store_true",
        help="clip form of --larc, at most the global rate; the release, with --larc_trust 0.02")

    add = parser.add_argument_group("the search (defaults: DARTS, but weight decay)").add_argument
    add("--epochs", type=positive_int, default=50, help="number of epochs")
    add("--batch_size", type=number(int, 2), default=64,
        help="images in each step's two batches; the release: 96")
    add("--learning_rate", type=non_negative, default=0.025, help="SGD rate of the first epoch")
    add("--learning_rate_min", type=non_negative, default=0.001, help="at the cosine's end")
    add("--momentum", type=fraction, default=0.9, help="SGD momentum")
    add("--weight_decay", type=non_negative, default=5e-3, help="section 3; DARTS: 3e-4")
    add("--grad_clip", type=positive, default=5.0, help="largest 2-norm of w's gradient")
    add("--arch_learning_rate", type=non_negative, default=3e-4, help="Adam rate of alpha")
    add("--arch_weight_decay", type=non_negative, default=1e-3, help="weight decay of alpha")
    add("--train_portion", type=fraction, default=0.5,
        help="part of the training split that trains w; the rest trains alpha")
    add("--seed", type=natural, default=2, help="random seed")

    add = parser.add_argument_group("the network (defaults: DARTS)").add_argument
    add("--space", default="darts", choices=SPACES, help="section 5.1: darts; 5.2: s1 to s4")
    add("--init_channels", type=positive_int, default=16, help="channels of the first cell")
    add("--layers", type=number(int, 3), default=8, help="number of cells")
    add("--stem_multiplier", type=positive_int, default=3,
        help="channels of the stem, in units of --init_channels; the release: 1")

    add_data_flags(parser)
    add_run_flags(parser)
    add = parser.add_argument
    add("--proxy", metavar="FILE", help="search on the images that proxy.py chose, in two halves")
    add("--keep_nets", action="store_true", help="keep every epoch's network, for the figures")
    return parser


def parse(arguments, parser=None):
    """The flags, checked against each other."""
    args = parse_flags(parser or make_parser(), arguments,
                       lambda args: DEFAULTS.get(args.dataset, {}))
    if args.proxy is not None and (args.limit, args.train_portion) != (None, 0.5):
        raise SystemExit("--proxy chooses the images: leave out --limit and --train_portion")
    if args.learning_rate_min > args.learning_rate:
        raise SystemExit(f"--learning_rate is below --learning_rate_min {args.learning_rate_min}")
    if not args.larc and (args.larc_clip or args.larc_trust != 1):
        raise SystemExit("--larc_trust and --larc_clip change LARC: they need --larc")
    if args.sqrt_beta and not args.node_norm:
        say("warning: --sqrt_beta without --node_norm lets node variances grow with depth, about "
            "2, 6, 15, 32 in the first cell", sys.stderr)
    return args


def main(arguments):
    args = parse(arguments)
    search(args, Run(args, "genotype.json"))


if __name__ == "__main__":
    start(main)
