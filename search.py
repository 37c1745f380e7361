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
from genotypes import SPACES, Genotype, describe, to_json
from larc import LARC
from model import SuperNet
from run import (Exit, Meter, Parser, Progress, Run, check_finite, clock, find_device, kept_settings, mix, number,
                 precision, restore, resumable, start, summary, write_text)

# flag: (kind, default, what it is, where the default comes from)
FLAGS = {
    "dataset": (tuple(name for name in DATASETS if name != "imagenet"), "cifar10", "data set", "section 5.1"),
    "data": (str, "data", "folder of the data sets", "ours"),
    "image_size": (number(int, 8, 512), 32, "side of the images of --dataset folder, in pixels", "ours"),
    "space": (tuple(SPACES), "darts", "search space", "sections 5.1 and 5.2"),
    "node_norm": (bool, False, "normalize every intermediate node, Eq. 3", "section 4.1"),
    "larc": (bool, False, "a learning rate per tensor", "section 4.2"),
    "sqrt_beta": (bool, False, "weigh operations by sqrt(beta), Eq. 6", "section 4.3"),
    "larc_trust": (number(float, 0, above=True), 1.0, "trust coefficient of --larc", "section 4.2 has none"),
    "larc_clip": (bool, False, "clip form of --larc: never above the global rate",
                  "apex, with --larc_trust 0.02: the release"),
    "batch_size": (number(int, 2), 64, "images of each of a step's two batches", "DARTS; the release: 96"),
    "learning_rate": (number(float, 0), 0.025, "weights: SGD learning rate of the first epoch", "DARTS"),
    "learning_rate_min": (number(float, 0), 0.001, "weights: where its cosine ends", "DARTS"),
    "momentum": (number(float, 0, 1), 0.9, "weights: momentum", "DARTS"),
    "weight_decay": (number(float, 0), 5e-3, "weights: weight decay", "section 3 (DARTS-L2); DARTS: 3e-4"),
    "grad_clip": (number(float, 0, above=True), 5.0, "weights: largest 2-norm of the whole gradient", "DARTS"),
    "arch_learning_rate": (number(float, 0), 3e-4, "alpha: Adam learning rate", "DARTS"),
    "arch_weight_decay": (number(float, 0), 1e-3, "alpha: weight decay", "DARTS"),
    "epochs": (number(int, 1), 50, "epochs", "DARTS"),
    "init_channels": (number(int, 1, 4096), 16, "channels of the first cell", "DARTS"),
    "layers": (number(int, 3, 1000), 8, "cells", "DARTS"),
    "stem_multiplier": (number(int, 1, 64), 3, "channels of the stem, in units of --init_channels", "DARTS; the release: 1"),
    "train_portion": (number(float, 0, 1, above=True), 0.5, "part of the training split for the weights", "DARTS"),
    "seed": (number(int, 0), 2, "seed", "DARTS"),
    "device": (str, None, "torch device; by default CUDA, else the CPU", "ours"),
    "amp": (bool, False, "bfloat16 autocast and TF32: faster, other numbers", "ours"),
    "out": (str, None, "run folder; by default runs/DATASET-SPACE-SWITCHES-SEED", "ours"),
}


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

def only(trained, frozen):
    """Gradients for `trained` alone: the backward pass then skips what `frozen` would have cost."""
    for p in frozen:
        p.requires_grad_(False)
        p.grad = None
    for p in trained:
        p.requires_grad_(True)


def loss_of(net, images, labels, autocast):
    with autocast():
        logits = net(images)
        return F.cross_entropy(logits, labels), logits


def alpha_step(net, optimizer, images, labels, autocast):
    """min over alpha of L_valid(w, alpha), Eq. 2 in first order: at today's w."""
    only(net.alphas(), net.weights())
    loss, logits = loss_of(net, images, labels, autocast)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss, logits


def weight_step(net, optimizer, images, labels, autocast, grad_clip):
    """min over w of L_train(w, alpha), the constraint of Eq. 2."""
    weights = net.weights()
    only(weights, net.alphas())
    loss, logits = loss_of(net, images, labels, autocast)
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(weights, grad_clip)
    optimizer.step()
    return loss, logits


# ---------------------------------------------------------------- the loop

def halves(config, device):
    """(batches for w, batches for alpha, classes): the training split's first part and the rest; never the test split."""
    data = load(config["dataset"], config["data"], train=True, image_size=config["image_size"])
    split = int(config["train_portion"] * len(data.labels))
    if min(split, len(data.labels) - split) < 2:
        raise Exit(f"--train_portion {config['train_portion']} of {len(data.labels)} images leaves a part without any two")
    data = data.to(device)
    return *(Batches(part, config["batch_size"], mix(config["seed"], k))
             for k, part in enumerate((data.part(0, split), data.part(split, None)))), data.classes


def make_optimizers(net, config):
    """(optimizer of w, optimizer of alpha, schedule of the first): SGD or LARC, Adam, and a cosine over the epochs."""
    sgd = {"lr": config["learning_rate"], "momentum": config["momentum"], "weight_decay": config["weight_decay"]}
    if config["larc"]:
        w_optimizer = LARC(net.weights(), **sgd, trust_coefficient=config["larc_trust"], clip=config["larc_clip"])
    else:
        w_optimizer = torch.optim.SGD(net.weights(), **sgd)
    alpha_optimizer = torch.optim.Adam(net.alphas(), lr=config["arch_learning_rate"], betas=(0.5, 0.999),
                                       weight_decay=config["arch_weight_decay"])
    return w_optimizer, alpha_optimizer, torch.optim.lr_scheduler.CosineAnnealingLR(
        w_optimizer, config["epochs"], config["learning_rate_min"])


def search(config, run):
    """The whole search, from the last checkpoint if there is one. Returns the trained super-network and its Progress."""
    device = find_device(config["device"])
    train, valid, classes = halves(config, device)
    torch.manual_seed(config["seed"])
    net = SuperNet(SPACES[config["space"]], config["init_channels"], config["layers"], classes,
                   config["node_norm"], config["sqrt_beta"], config["stem_multiplier"])
    net = net.to(device, memory_format=torch.channels_last)
    w_optimizer, alpha_optimizer, scheduler = make_optimizers(net, config)
    parts = {"net": net, "w_optimizer": w_optimizer, "alpha_optimizer": alpha_optimizer, "scheduler": scheduler}
    saved = run.load(parts)
    if saved:
        restore(parts, saved, run.checkpoint)

    autocast = precision(config["amp"], device)
    progress = Progress(config["epochs"], train.steps, 2 * config["batch_size"])
    progress.line(f"{config['dataset']}: {len(train.split.labels)} images for w, {len(valid.split.labels)} for alpha; "
                  f"{sum(p.numel() for p in net.weights()):,} weights; {device}; {run.folder}")
    for epoch in range(run.epoch, config["epochs"]):
        started, lr = time.time(), w_optimizer.param_groups[0]["lr"]
        torch.manual_seed(mix(config["seed"], 2, epoch))    # S4's noise: a function of seed and epoch alone
        net.train()
        meter = Meter(train.steps, device)
        valid_batches = valid.range(epoch * train.steps, (epoch + 1) * train.steps)
        for step, (train_batch, valid_batch) in enumerate(zip(train.epoch(epoch), valid_batches)):
            alpha_loss, _ = alpha_step(net, alpha_optimizer, *valid_batch, autocast)
            loss, logits = weight_step(net, w_optimizer, *train_batch, autocast, config["grad_clip"])
            meter.add(step, loss + 0 * alpha_loss.detach(), logits, train_batch[1])  # not finite if either is not
            progress.step(epoch, step, meter)
        meter.loss_so_far(epoch, train.steps - 1)
        scheduler.step()
        record = {"epoch": epoch, "lr": lr, **state_of(net, meter, evaluate(net, valid, epoch, autocast)),
                  "seconds": time.time() - started}
        check_finite(epoch, (record["train_loss"], record["valid_loss"]), net)
        run.end_epoch(record, {name: part.state_dict() for name, part in parts.items()})
        progress.line(epoch_line(record))
    return net, progress


@torch.no_grad()
def evaluate(net, batches, epoch, autocast):
    """Loss and accuracy on the half for alpha, augmented as DARTS does, in eval mode (running statistics)."""
    net.eval()
    meter = Meter(batches.steps, batches.split.labels.device)
    for step, (images, labels) in enumerate(batches.epoch(epoch)):
        with autocast():
            logits = net(images)
            meter.add(step, F.cross_entropy(logits, labels), logits, labels)
    return meter


def state_of(net, train, valid):
    """What log.jsonl keeps of an epoch beside its number, learning rate and duration. train, valid: Meters."""
    (train_loss, train_acc, _), (valid_loss, valid_acc, _) = summary(train.totals()), summary(valid.totals())
    betas = net.betas()
    return {"train_loss": train_loss, "train_acc": train_acc, "valid_loss": valid_loss, "valid_acc": valid_acc,
            "beta_none": mean_beta(net.space, betas, "none"), "beta_skip": mean_beta(net.space, betas, "skip_connect"),
            "genotype": derive(net.space, betas)._asdict(),
            "alpha_normal": net.alpha_normal.tolist(), "alpha_reduce": net.alpha_reduce.tolist()}


def epoch_line(record):
    cell = [name for kind in ("normal", "reduce") for node in record["genotype"][kind] for name, _ in node]
    counts = " ".join(f"{cell.count(name)} {name}" for name in sorted(set(cell)))
    betas = ", ".join(f"{key.replace('_', ' ')} {record[key]:.4f}" for key in ("beta_none", "beta_skip")
                      if record[key] is not None)
    return (f"epoch {record['epoch']} lr {record['lr']:.6f} | train {record['train_loss']:.3f} {record['train_acc']:.1f}% | "
            f"valid {record['valid_loss']:.3f} {record['valid_acc']:.1f}% | {betas or 'no beta'} | {counts} | "
            f"{clock(record['seconds'])}")


def mean_beta(space, betas, primitive):
    """Mean beta of a primitive over all edges of both cells that have it, or None if none has."""
    values = [row[primitives.index(primitive)].item() for cell in space
              for row, primitives in zip(betas[cell], space[cell].values()) if primitive in primitives]
    return sum(values) / len(values) if values else None


# ---------------------------------------------------------------- the command

def all_flags(given):
    config = {flag: default for flag, (_, default, _, _) in FLAGS.items()} | given
    switches = "+".join(flag for flag in ("node_norm", "larc", "sqrt_beta") if config[flag]) or "darts_l2"
    config["out"] = config["out"] or f"runs/{config['dataset']}-{config['space']}-{switches}-{config['seed']}"
    return config


def make_parser():
    parser = Parser(prog="search.py", description=__doc__)
    for flag, (kind, default, text, source) in FLAGS.items():
        shown = {None: "", False: ""}.get(default, f"default {default}; ")
        parser.setting(f"--{flag}", kind, f"{text} ({shown}{source})")
    parser.add_argument("--resume", metavar="FOLDER", help="go on with an interrupted run; its flags are kept")
    return parser


def main(arguments):
    parser = make_parser()
    given = vars(parser.parse_args(arguments))
    folder = given.pop("resume", None)
    config = all_flags(given) if folder is None else kept_settings(parser, Path(folder), given, all_flags)
    if config["learning_rate_min"] > config["learning_rate"]:
        raise Exit(f"--learning_rate_min {config['learning_rate_min']} is above --learning_rate {config['learning_rate']}")
    if config["sqrt_beta"] and not config["node_norm"]:
        print("search.py: warning: --sqrt_beta without --node_norm lets node variances grow with depth (about 2, 6, 15 "
              "and 32 at the four nodes of the first cell, against 1 each with it)", file=sys.stderr)
    run = Run("search.py", config, "genotype.json", resumed=folder is not None)
    with resumable(run):
        net, progress = search(config, run)
        genotype = derive(net.space, net.betas())
        write_text(run.result, to_json(genotype))
    data = "" if config["data"] == "data" else f" --data {shlex.quote(config['data'])}"
    size = "" if config["dataset"] != "folder" else f" --image_size {config['image_size']}"
    progress.line(f"{run.result}\n{describe(genotype)}\n"
                  f"python retrain.py --genotype {shlex.quote(str(run.result))} --dataset {config['dataset']}{data}{size}")


if __name__ == "__main__":
    start("search.py", main)
