"""The search on NAS-Bench-201, where every cell's accuracy is known (Dong and Yang, ICLR 2020).

    python -m experiments.nasbench201 --node_norm --larc --sqrt_beta    CIFAR-10, one CUDA GPU
    python -m experiments.nasbench201 --cell "|nor_conv_3x3~0|+|..."    what is known of a cell

A cell has six edges with five operations each, 15,625 cells in all, and each of them was trained.
So the cell of every epoch is looked up, not retrained. Unlike in the paper's search, every edge is
kept, and `none` may be chosen. The flags are search.py's, without --space and --stem_multiplier;
--layers counts all three stages.

nasbench201.npz has the test accuracies after 200 epochs on CIFAR-10, CIFAR-100 and ImageNet16-120,
the mean of the trials, from NATS-Bench (MIT licence, hp=200) as tabulated in
v-tao/nats-bench-landscape.
"""
import functools
import itertools
import json
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

import search
from experiments.tables import method
from model import SearchCell, SuperNet, conv_bn, make_alphas, stem_conv
from run import Run, say, start, write

PRIMITIVES = ("none", "skip_connect", "nor_conv_1x1", "nor_conv_3x3", "avg_pool_3x3")
EDGES = [(0, 1), (0, 2), (1, 2), (0, 3), (1, 3), (2, 3)]    # (source, target); node 3 is the output
SPACE = {"cell": {edge: PRIMITIVES for edge in EDGES}}
METHODS = {  # tables.py's name of a search: its name in nasbench201.jsonl
    "DARTS-L2": "darts_l2", "VS-DARTS": "vs_darts_1", "VS-DARTS, trust 0.1": "vs_darts_0.1",
    "DARTS-L2 + node norm + sqrt(beta)": "norm_sqrt", "DARTS-L2 + node norm": "norm",
    "VS-DARTS, trust 0.3": "vs_darts_0.3", "DARTS": "darts",
    "VS-DARTS, trust 0.02, clip": "release", "DARTS-L2 + node norm + LARC": "norm_larc"}


# ---------------------------------------------------------------- cells and their accuracies

@functools.cache
def accuracies():
    """int (5, 5, 5, 5, 5, 5, 3): hundredths of a percent, by each edge's operation, by data set."""
    with np.load(Path(__file__).with_name("nasbench201.npz")) as file:
        return file["accuracy"].astype(int)


def look_up(operations):
    """({data set: test accuracy in percent}, rank on CIFAR-10, from 1) of a cell.

    operations: their six numbers, in the order of EDGES.
    """
    table = accuracies()
    names = ("CIFAR-10", "CIFAR-100", "ImageNet16-120")
    values = dict(zip(names, (table[tuple(operations)] / 100).tolist()))
    return values, 1 + int((table[..., 0] > table[tuple(operations)][0]).sum())


def to_text(operations):
    """A cell as NAS-Bench-201 writes it: |op~0|+|op~0|op~1|+|op~0|op~1|op~2|."""
    words = {j: "|" for _, j in EDGES}
    for (i, j), o in zip(EDGES, operations):
        words[j] += f"{PRIMITIVES[o]}~{i}|"
    return "+".join(words.values())


def from_text(text):
    """The numbers of a cell's six operations. Raises ValueError, one line."""
    words = [word.split("~") for node in text.split("+") for word in node.strip("|").split("|")]
    for name, *_ in words:
        if name not in PRIMITIVES:
            raise ValueError(f"{name!r} is none of {', '.join(PRIMITIVES)}")
    operations = [PRIMITIVES.index(name) for name, *_ in words]
    if len(words) != len(EDGES) or to_text(operations) != text:
        raise ValueError(f"a cell is |op~0|+|op~0|op~1|+|op~0|op~1|op~2|, not {text!r}")
    return operations


def describe(operations):
    values, rank = look_up(operations)
    return ", ".join(f"{name} {value:.2f}%" for name, value in values.items()) + f", rank {rank:,}"


# ---------------------------------------------------------------- the super-network

class Cell(SearchCell):
    """(B, C, H, W) -> the same: from node 0, the input, to node 3. All edges have stride 1."""

    def __init__(self, C, node_norm):
        nn.Module.__init__(self)
        self.make_edges(SPACE["cell"], C, False, node_norm)

    def forward(self, x, beta):                             # beta: (6, 5), in the order of EDGES
        return self.nodes([x], beta)[-1]


class Residual(nn.Module):
    """Between two stages: (B, C_in, H, W) -> (B, C, H/2, W/2)."""

    def __init__(self, C_in, C):
        super().__init__()
        self.convs = nn.Sequential(conv_bn(C_in, C, 3, 2, affine=True),
                                   conv_bn(C, C, 3, 1, affine=True))
        self.shortcut = nn.Sequential(nn.AvgPool2d(2), nn.Conv2d(C_in, C, 1, bias=False))

    def forward(self, x):
        return self.shortcut(x) + self.convs(x)


class SuperNet201(SuperNet):
    """(B, 3, H, W) -> logits (B, num_classes); H and W divisible by 4.

    layers: cells in all, in three stages of C, 2C and 4C channels.
    Source: D-X-Y/AutoDL-Projects, xautodl/models/cell_searchs/search_model_darts.py. As in our
    MixedOp, a batch norm follows the pool: every operation but the skip connection is normalized.
    """

    def __init__(self, C=16, layers=15, num_classes=10, node_norm=False, sqrt_beta=False):
        nn.Module.__init__(self)
        self.space, self.sqrt_beta = SPACE, sqrt_beta
        stages = [nn.Sequential(*stem_conv(3, C))]
        for stage in range(3):
            stages += [Residual(C // 2, C)] if stage else []
            stages += [Cell(C, node_norm) for _ in range(layers // 3)]
            C *= 2
        self.stages = nn.ModuleList(stages)
        self.norm = nn.BatchNorm2d(C // 2)
        self.classifier = nn.Linear(C // 2, num_classes)
        self.alphas = make_alphas(SPACE)

    def features(self, x, beta):                            # (B, 4C)
        for stage in self.stages:
            x = stage(x, beta["cell"]) if isinstance(stage, Cell) else stage(x)
        return F.relu(self.norm(x)).mean((2, 3))


def make_net(args, num_classes):
    return SuperNet201(args.init_channels, args.layers, num_classes, args.node_norm, args.sqrt_beta)


# ---------------------------------------------------------------- the search

def search201(args, run):
    parts = search.make_parts(args, make_net)
    search.begin(parts, run)
    for epoch in range(run.epoch, args.epochs):
        record = search.train_epoch(parts, epoch)
        search.validate(parts, record)
        operations = parts.net.betas()["cell"].argmax(1).tolist()           # ties: the first
        values, rank = look_up(operations)
        record |= {"cell": to_text(operations), "accuracies": values, "rank": rank}
        run.end_epoch(record)
        say(search.epoch_line(record, f"{record['cell']} {describe(operations)}"))
    summed = summary(args, run.log)
    write(run.result, json.dumps(summed))
    say(f"{run.result}: {run.log[-1]['cell']}, rank {run.log[-1]['rank']:,}")


def summary(args, log):
    """A run, finished or not, as a line of nasbench201.jsonl.

    flags: those that are not at their defaults. cells: one an epoch, None where it is that of the
    epoch before. accuracy: percent on CIFAR-10, one an epoch. betas: of the last epoch, (6, 5).
    """
    parser, cells = make_parser(), [record["cell"] for record in log]
    elsewhere = ("data", "out", "resume", "device")
    flags = {flag: value for flag, value in vars(args).items()
             if value != parser.get_default(flag) and flag not in elsewhere}
    changed = [cell if cell != before else None for cell, before in zip(cells, [None, *cells])]
    betas = torch.tensor(log[-1]["alphas"]["cell"]).softmax(1)
    name = method(vars(args))
    return {"method": METHODS.get(name, name), "seed": args.seed, "flags": flags, "cells": changed,
            "accuracy": [record["accuracies"]["CIFAR-10"] for record in log],
            "betas": [[round(beta, 4) for beta in row] for row in betas.tolist()]}


# ---------------------------------------------------------------- comparison of methods

def ranks(values):
    """From 1; equal values share the mean of their ranks."""
    return [(values < v).sum() + ((values == v).sum() + 1) / 2 for v in values]


def rank_sum_p(x, y):
    """Two-sided p of the rank-sum test, exact with ties.

    Of all ways to divide the values, the share in which x's ranks sum as far from their mean.
    """
    both = ranks(np.array([*x, *y]))
    sums = np.array([sum(part) for part in itertools.combinations(both, len(x))])
    return float((abs(sums - sums.mean()) >= abs(sum(both[:len(x)]) - sums.mean()) - 1e-9).mean())


def signed_rank_p(gaps):
    """Two-sided p of the signed-rank test, exact with ties; gaps of zero are left out.

    Of all ways to choose signs, the share in which the signed ranks sum as far from zero.
    """
    gaps = np.array([gap for gap in np.round(gaps, 6) if gap])              # equal gaps tie
    sizes = ranks(abs(gaps))
    sums = [np.dot(signs, sizes) for signs in itertools.product((-1, 1), repeat=len(sizes))]
    return float((np.abs(sums) >= abs(np.dot(np.sign(gaps), sizes)) - 1e-9).mean())


# ---------------------------------------------------------------- the command

def make_parser():
    parser = search.make_parser("experiments.nasbench201", __doc__)
    parser.set_defaults(space="nasbench201", layers=15)
    parser.add_argument("--cell", help="print a cell's accuracies and rank, and end")
    return parser


def parse(arguments):
    parser = make_parser()
    args = search.parse(arguments, parser)
    if args.space != "nasbench201" or args.stem_multiplier != 3:
        raise SystemExit("--space and --stem_multiplier belong to search.py: leave them out")
    if (args.image_size or 0) % 4:
        raise SystemExit(f"--image_size {args.image_size} is not a multiple of 4: stages halve it")
    if args.layers % 3:
        raise SystemExit(f"--layers {args.layers} is not a multiple of 3: the stages are three")
    return args


def main(arguments):
    args = parse(arguments)
    if args.cell is not None:
        try:
            return print(describe(from_text(args.cell)))
        except ValueError as error:
            raise SystemExit(f"--cell: {error}") from None
    search201(args, Run(args, "result.json"))


if __name__ == "__main__":
    start(main)
