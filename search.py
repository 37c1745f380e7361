"""The search: bi-level training of the super-network, then the top-2 derivation. Sections 2.2 (Eq. 2), 4 and 5.1.

    python search.py --node_norm --larc --sqrt_beta                    the paper's search: CIFAR-10, one CUDA GPU
    python search.py --node_norm --larc --sqrt_beta --dataset digits   a small one without a GPU or a download

Without the three switches it is DARTS (first order) with the paper's larger weight decay: the rows of Table 4.
Whatever the paper leaves to DARTS follows quark0/darts, cnn/train_search.py and cnn/architect.py at f276dd3.
"""
import shlex
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F

from data import DATASETS, Batches, load
from genotypes import SPACES, Genotype, darts_notation, describe, to_json
from larc import LARC
from model import SuperNet
from run import Exit, Parser, Run, clock, device_name, find_device, keep_settings, make_seed, means, metrics, number, \
    precision, save, save_text, start


# ---------------------------------------------------------------- derivation (section 2.2)

def derive(space, betas):
    """The genotype of beta: for each node its two strongest edges, on each the strongest operation, `none` left out.

    betas: {"normal" or "reduce": (edges, operations)}, in the space's order of edges and primitives. An edge is as
    strong as its strongest operation. Ties go to the first edge and the first operation. A node's inputs come
    strongest first, as in DARTS.
    """
    cells = {}
    for cell, edges in space.items():
        candidates = {}                                     # {target: [(beta, source, operation)], one per edge}
        for (i, j), primitives, beta in zip(edges, edges.values(), betas[cell].tolist()):
            strongest = max(((b, name) for b, name in zip(beta, primitives) if name != "none"), key=lambda pair: pair[0])
            candidates.setdefault(j, []).append((strongest[0], i, strongest[1]))
        nodes = [sorted(candidates[j], key=lambda edge: (-edge[0], edge[1]))[:2] for j in sorted(candidates)]
        cells[cell] = tuple(tuple((name, i) for _, i, name in node) for node in nodes)
        cells[f"{cell}_concat"] = tuple(sorted(candidates))
    return Genotype(**cells)


# ---------------------------------------------------------------- one step (Eq. 2)

def loss_of(net, images, labels, autocast):
    with autocast():
        logits = net(images)
        return F.cross_entropy(logits, labels), logits


def alpha_step(net, optimizer, images, labels, autocast):
    """min over alpha of L_val(w, alpha), Eq. 2 in first order: at the present w."""
    loss, logits = loss_of(net, images, labels, autocast)
    optimizer.zero_grad()
    loss.backward(inputs=net.alphas)
    optimizer.step()
    return loss, logits


def weight_step(net, optimizer, images, labels, autocast, grad_clip):
    """min over w of L_train(w, alpha), the constraint of Eq. 2."""
    loss, logits = loss_of(net, images, labels, autocast)
    optimizer.zero_grad()
    loss.backward(inputs=net.weights)
    torch.nn.utils.clip_grad_norm_(net.weights, grad_clip)
    optimizer.step()
    return loss, logits


# ---------------------------------------------------------------- the loop

def read_halves(args, device, layout):
    """The training split's first part, for w, and the rest, for alpha. The test split is never read."""
    split = load(args.dataset, args.data, True, args.image_size, args.limit).to(device, layout)
    cut = int(args.train_portion * len(split.labels))
    if min(cut, len(split.labels) - cut) < 2:
        raise Exit(f"--train_portion {args.train_portion} of {len(split.labels)} images leaves one part with fewer than two images")
    return split.part(0, cut), split.part(cut, None)


def make_net(args, classes):
    return SuperNet(SPACES[args.space], args.init_channels, args.layers, classes, args.node_norm, args.sqrt_beta,
                    args.stem_multiplier)


def make_optimizers(net, args):
    """(optimizer of w, optimizer of alpha, schedule of the first): SGD or LARC, Adam, and a cosine over the epochs."""
    sgd = {"lr": args.learning_rate, "momentum": args.momentum, "weight_decay": args.weight_decay}
    if args.larc:
        w_optimizer = LARC(net.weights, **sgd, trust_coefficient=args.larc_trust, clip=args.larc_clip)
    else:
        w_optimizer = torch.optim.SGD(net.weights, **sgd)
    alpha_optimizer = torch.optim.Adam(net.alphas, args.arch_learning_rate, betas=(0.5, 0.999),
                                       weight_decay=args.arch_weight_decay)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(w_optimizer, args.epochs, args.learning_rate_min)
    return w_optimizer, alpha_optimizer, scheduler


def search(args, run, other_alpha_step=None, look=None, stop=None):
    """The whole search, or the rest of a resumed one. Returns the trained super-network.

    For baselines.py: another alpha step; look(net, w_optimizer, valid_batch), what more to log of an epoch; stop(), asked
    before every epoch.
    """
    device = find_device(args.device)
    autocast, layout = precision(args.amp, device)
    w_half, alpha_half = read_halves(args, device, layout)
    train = Batches(w_half, args.batch_size, make_seed(args.seed, "w"))
    valid = Batches(alpha_half, args.batch_size, make_seed(args.seed, "alpha"))
    held_out = Batches(alpha_half, args.batch_size, make_seed(args.seed, "validation"))

    torch.manual_seed(args.seed)
    net = make_net(args, w_half.classes).to(device, memory_format=layout)
    w_optimizer, alpha_optimizer, scheduler = make_optimizers(net, args)
    run.begin({"net": net, "w_optimizer": w_optimizer, "alpha_optimizer": alpha_optimizer, "scheduler": scheduler})
    run.say(f"{args.dataset}: {len(w_half.labels)} images for w, {len(alpha_half.labels)} for alpha; "
            f"{sum(p.numel() for p in net.weights):,} weights; {device}; {run.folder}")
    if args.keep_nets and run.epoch == 0:
        keep_net(net, run.folder, 0)
        megabytes = (args.epochs + 1) * (run.folder / "net-0.pt").stat().st_size / 1e6
        run.say(f"--keep_nets: {args.epochs + 1} super-networks will take {megabytes:.1f} MB in {run.folder}")

    for epoch in range(run.epoch, args.epochs):
        if stop and stop():
            break
        started, lr = time.time(), w_optimizer.param_groups[0]["lr"]
        torch.manual_seed(make_seed(args.seed, "noise", epoch))  # S4's: a function of seed and epoch alone
        net.train()
        totals = torch.zeros(4, device=device)
        valid_batches = valid.range(epoch * train.steps, (epoch + 1) * train.steps)
        for step, (train_batch, valid_batch) in enumerate(zip(train.epoch(epoch), valid_batches)):
            if other_alpha_step:
                other_alpha_step(net, alpha_optimizer, valid_batch, train_batch, w_optimizer, autocast)
            else:
                alpha_step(net, alpha_optimizer, *valid_batch, autocast)
            loss, logits = weight_step(net, w_optimizer, *train_batch, autocast, args.grad_clip)
            totals += metrics(loss, logits, train_batch[1])
            run.step(step, train.steps, totals)
            run.look()
        seconds = time.time() - started
        scheduler.step()
        described = describe_epoch(net, totals, evaluate(net, held_out, epoch, autocast, run))
        more = look(net, w_optimizer, valid_batch) if look else {}
        record = {"epoch": epoch, "lr": lr, **described,
                  "images/s": 2 * totals[3].item() / seconds, "seconds": time.time() - started, "device": device_name(device), **more}
        if args.keep_nets:                                  # before the checkpoint: a resumed run lacks none
            keep_net(net, run.folder, epoch + 1)
        run.end_epoch(record)
        run.say(epoch_line(record))
    return net


def keep_net(net, folder, epochs):
    """For figures.py: the super-network's state after so many epochs; 0: untrained."""
    save(folder / f"net-{epochs}.pt", lambda file: torch.save(net.state_dict(), file))


@torch.no_grad()
def evaluate(net, batches, epoch, autocast, run):
    """The metrics of the half for alpha, augmented as DARTS does, in eval mode (running statistics), summed."""
    net.eval()
    totals = torch.zeros(4, device=batches.split.labels.device)
    for images, labels in batches.epoch(epoch):
        loss, logits = loss_of(net, images, labels, autocast)
        totals += metrics(loss, logits, labels)
        run.look()
    return totals


def describe_epoch(net, train_totals, valid_totals):
    """What log.jsonl keeps of an epoch beside its number, learning rate and duration."""
    (train_loss, train_acc, _), (valid_loss, valid_acc, _) = means(train_totals), means(valid_totals)
    betas = net.betas()
    return {"train_loss": train_loss, "train_acc": train_acc, "valid_loss": valid_loss, "valid_acc": valid_acc,
            "beta_none": mean_beta(net.space, betas, "none"), "beta_skip": mean_beta(net.space, betas, "skip_connect"),
            "genotype": derive(net.space, betas)._asdict(),
            "alpha_normal": net.alpha_normal.tolist(), "alpha_reduce": net.alpha_reduce.tolist()}


def mean_beta(space, betas, primitive):
    """Mean beta of a primitive over all edges of both cells that have it, or None if none has."""
    values = [row[primitives.index(primitive)].item() for cell in space
              for row, primitives in zip(betas[cell], space[cell].values()) if primitive in primitives]
    return sum(values) / len(values) if values else None


def epoch_line(record):
    chosen = [name for cell in ("normal", "reduce") for node in record["genotype"][cell] for name, _ in node]
    counts = ", ".join(f"{chosen.count(name)} {name}" for name in sorted(set(chosen)))
    betas = [f"{key.replace('_', ' ')} {record[key]:.4f}" for key in ("beta_none", "beta_skip") if record[key] is not None]
    return " | ".join([f"epoch {record['epoch']} lr {record['lr']:.6f}",
                       f"train {record['train_loss']:.3f} {record['train_acc']:.1f}%",
                       f"valid {record['valid_loss']:.3f} {record['valid_acc']:.1f}%",
                       *betas, counts, clock(record["seconds"])])


# ---------------------------------------------------------------- the command

def make_parser(program="search.py", description=__doc__):
    parser = Parser(program, description=description)
    add = parser.add_argument
    add("--dataset", default="cifar10", choices=[name for name in DATASETS if name != "imagenet"],
        help="default %(default)s: section 5.1")
    add("--data", default="data", help="folder of the data sets (default %(default)s)")
    add("--image_size", type=number(int, 8, 512), help="resize the images to this side, in pixels (default: as they are; "
        "32 for --dataset folder)")
    add("--limit", type=number(int, 4), help="use the first LIMIT training images only (default: all)")
    add("--space", default="darts", choices=SPACES, help="search space (default %(default)s: section 5.1; s1-s4: section 5.2)")
    add("--node_norm", action="store_true", help="normalize every intermediate node, Eq. 3 (section 4.1)")
    add("--larc", action="store_true", help="a learning rate for each tensor (section 4.2)")
    add("--sqrt_beta", action="store_true", help="weigh operations by the root of beta, Eq. 6 (section 4.3)")
    add("--larc_trust", type=number(float, 0, above=True), default=1.0,
        help="trust coefficient of --larc (default %(default)s: the formula as printed in section 4.2, which has none; 0.3 "
        "and 0.1 gave no clearly lower error over three seeds, see the README)")
    add("--larc_clip", action="store_true", help="clip form of --larc, never above the global rate (with --larc_trust 0.02: "
        "apex, and so the authors' release)")
    add("--batch_size", type=number(int, 2), default=64, help="images in each of a step's two batches (default %(default)s: "
        "DARTS; the release: 96)")
    add("--learning_rate", type=number(float, 0), default=0.025, help="SGD rate of the first epoch (default %(default)s: DARTS)")
    add("--learning_rate_min", type=number(float, 0), default=0.001, help="where its cosine ends (default %(default)s: DARTS)")
    add("--momentum", type=number(float, 0, 1), default=0.9, help="SGD momentum (default %(default)s: DARTS)")
    add("--weight_decay", type=number(float, 0), default=5e-3,
        help="SGD weight decay (default %(default)s; section 3, DARTS-L2: 5e-3; DARTS and RobustDARTS: 3e-4)")
    add("--grad_clip", type=number(float, 0, above=True), default=5.0,
        help="largest 2-norm of the gradient of all weights (default %(default)s: DARTS)")
    add("--arch_learning_rate", type=number(float, 0), default=3e-4, help="Adam rate of alpha (default %(default)s: DARTS)")
    add("--arch_weight_decay", type=number(float, 0), default=1e-3, help="weight decay of alpha (default %(default)s: DARTS)")
    add("--epochs", type=number(int, 1), default=50, help="default %(default)s: DARTS")
    add("--init_channels", type=number(int, 1, 4096), default=16, help="channels of the first cell (default %(default)s: DARTS)")
    add("--layers", type=number(int, 3, 1000), default=8, help="number of cells (default %(default)s: DARTS)")
    add("--stem_multiplier", type=number(int, 1, 64), default=3,
        help="channels of the stem, in units of --init_channels (default %(default)s: DARTS; the release: 1)")
    add("--train_portion", type=number(float, 0, 1, above=True), default=0.5,
        help="part of the training split that trains w; the rest trains alpha (default %(default)s: DARTS)")
    add("--seed", type=number(int, 0), default=2, help="default %(default)s: DARTS")
    add("--device", help="torch device (default: CUDA if there is any, else the CPU)")
    add("--amp", action="store_true", help="bfloat16 autocast and TF32: other numbers, and faster on GPUs that have bfloat16")
    add("--keep_nets", action="store_true", help="keep the super-network of every epoch, for figures.py")
    add("--out", help="run folder (default runs/DATASET-SPACE-SWITCHES-SEED)")
    add("--resume", metavar="FOLDER", help="continue an interrupted run, with its settings")
    return parser


def parse(arguments, parser=None, method=None):
    """The flags, checked against each other, with the run folder's name filled in."""
    parser = parser or make_parser()
    args = parser.parse_args(arguments)
    if args.resume is not None:
        args = keep_settings(parser, Path(args.resume), arguments)
    switches = [flag for flag in ("node_norm", "larc", "sqrt_beta") if getattr(args, flag)]
    name = "+".join([method, *switches] if method else switches) or "darts_l2"
    args.out = args.out or f"runs/{args.dataset}-{args.space}-{name}-{args.seed}"
    if args.learning_rate_min > args.learning_rate:
        raise Exit(f"--learning_rate_min {args.learning_rate_min} is above --learning_rate {args.learning_rate}")
    if args.sqrt_beta and not args.node_norm:
        print(f"{parser.prog}: warning: --sqrt_beta without --node_norm lets node variances grow with depth (about 2, 6, 15 "
              "and 32 at the four nodes of the first cell, against 1 each with it)", file=sys.stderr)
    return args


def retrain_command(args, genotype):
    words = ["python", "retrain.py", "--genotype", str(genotype), "--dataset", args.dataset]
    if args.data != "data":
        words += ["--data", args.data]
    if args.image_size is not None:
        words += ["--image_size", str(args.image_size)]
    return shlex.join(words)


def main(arguments):
    args = parse(arguments)
    command = shlex.join(["python", "search.py", "--resume", args.out])
    run = Run("search.py", args, "genotype.json", f"`{command}`")
    net = search(args, run)
    finish(args, run, derive(net.space, net.betas()))


def finish(args, run, genotype):
    save_text(run.result, to_json(genotype))
    run.say(f"{run.result}\n{describe(genotype)}\n  in DARTS's notation, for a fork's genotypes.py:\n{darts_notation(genotype)}\n"
            f"{retrain_command(args, run.result)}")


if __name__ == "__main__":
    start("search.py", main)
