"""Cells as plain values: the genotype, the search spaces, and the published cells of the paper's Tables 1 and 2.

    python genotypes.py                      the table of all published cells, counted and as published
    python genotypes.py VS_DARTS             one cell: its nodes and edges, its sizes, its retrain.py command
    python genotypes.py runs/.../genotype.json
    python genotypes.py --random 0 > cell.json   a random cell of the DARTS space, of seed 0

A genotype is a value that JSON can hold; files are read with json and checked, never evaluated.
"""
import json
import os
import random
import shlex
import sys
from typing import NamedTuple

import torch

from model import OPS, Network, count_macs, count_parameters


class Genotype(NamedTuple):
    """A normal and a reduction cell. Node 0 is the cell before the last, node 1 the last, nodes 2, 3, ... are here.

    normal, reduce: for each node from 2 on, its inputs as pairs (operation, source node), one or more of them.
    normal_concat, reduce_concat: the nodes whose concatenation is the cell's output.
    """
    normal: tuple
    normal_concat: tuple
    reduce: tuple
    reduce_concat: tuple


def from_json(text):
    """The Genotype written in `text`. Raises ValueError, saying what is wrong, for anything else."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"it is not JSON ({error})") from None
    if not isinstance(value, dict) or set(value) != set(Genotype._fields):
        raise ValueError(f"it must be one object with the keys {', '.join(Genotype._fields)}")
    for cell in ("normal", "reduce"):
        check_cell(cell, value[cell], value[f"{cell}_concat"])
    return Genotype(*(tuple(tuple(map(tuple, node)) for node in value[cell]) if "concat" not in cell
                      else tuple(value[cell]) for cell in Genotype._fields))


def check_cell(cell, nodes, concat):
    def is_node(i, below):
        return type(i) is int and 0 <= i < below

    if not isinstance(nodes, list) or not nodes:
        raise ValueError(f"{cell} must be a list of nodes")
    for j, node in enumerate(nodes, start=2):
        if not isinstance(node, list) or not node:
            raise ValueError(f"{cell}, node {j}: it must be a list of [operation, source]")
        for pair in node:
            if not isinstance(pair, list) or len(pair) != 2 or not isinstance(pair[0], str) or pair[0] not in OPS:
                raise ValueError(f"{cell}, node {j}: {pair} is not [operation, source] with a known operation")
            if not is_node(pair[1], j):
                raise ValueError(f"{cell}, node {j}: the source {pair[1]} is not a node before it")
    if not isinstance(concat, list) or not concat or not all(is_node(i, len(nodes) + 2) and i >= 2 for i in concat) or \
            len(set(concat)) < len(concat):
        raise ValueError(f"{cell}_concat must list nodes of the cell from 2 to {len(nodes) + 1}, each once")


def to_json(genotype):
    return json.dumps(genotype._asdict(), indent=1)


def load(name_or_file):
    """The genotype of a published cell's name, or of a JSON file. Raises ValueError if it is neither."""
    if name_or_file in PUBLISHED:
        return PUBLISHED[name_or_file].genotype
    try:
        with open(name_or_file, encoding="utf-8") as file:
            text = file.read()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{name_or_file} is no published cell ({', '.join(PUBLISHED)}) and no readable file "
                         f"({getattr(error, 'strerror', None) or error})") from None
    try:
        return from_json(text)
    except ValueError as error:
        raise ValueError(f"{name_or_file} is no genotype: {error}") from None


# ---------------------------------------------------------------- search spaces

EDGES = [(i, j) for j in (2, 3, 4, 5) for i in range(j)]    # (source, target): the 14 edges of a cell of four nodes
DARTS_PRIMITIVES = ("none", "max_pool_3x3", "avg_pool_3x3", "skip_connect",
                    "sep_conv_3x3", "sep_conv_5x5", "dil_conv_3x3", "dil_conv_5x5")

SHORT = {"max": "max_pool_3x3", "avg": "avg_pool_3x3", "skip": "skip_connect",
         "sep3": "sep_conv_3x3", "dil3": "dil_conv_3x3", "dil5": "dil_conv_5x5"}
S1 = {  # RobustDARTS (automl/RobustDARTS at 3dec3fe), src/spaces.py: two candidates an edge, in the order of EDGES
    "normal": "skip dil3, skip dil5,  skip dil5, skip sep3, skip dil3,  max skip, skip sep3, skip sep3, skip dil3,  "
              "skip sep3, max skip, skip dil3, dil3 dil5, dil3 dil5",
    "reduce": "max avg, max dil3,  max avg, max avg, skip dil5,  max avg, max sep3, skip dil3, skip dil5,  "
              "max avg, max avg, skip dil5, skip dil5, skip dil5",
}


def everywhere(*primitives):
    return {cell: {edge: primitives for edge in EDGES} for cell in ("normal", "reduce")}


# {space: {"normal" or "reduce": {(source, target): primitives}}}
SPACES = {
    "darts": everywhere(*DARTS_PRIMITIVES),
    "s1": {cell: {edge: tuple(SHORT[name] for name in names.split()) for edge, names in zip(EDGES, text.split(","))}
           for cell, text in S1.items()},
    "s2": everywhere("skip_connect", "sep_conv_3x3"),
    "s3": everywhere("none", "skip_connect", "sep_conv_3x3"),
    "s4": everywhere("noise", "sep_conv_3x3"),
}


def random_genotype(seed):
    """A cell of the DARTS space: for each node two different inputs, on each an operation but `none`, all equally likely."""
    draw = random.Random(seed)
    cells = {}
    for cell in ("normal", "reduce"):
        cells[cell] = tuple(tuple((draw.choice(DARTS_PRIMITIVES[1:]), i) for i in draw.sample(range(j), 2))
                            for j in (2, 3, 4, 5))
        cells[f"{cell}_concat"] = (2, 3, 4, 5)
    return Genotype(**cells)


# ---------------------------------------------------------------- published cells

class Published(NamedTuple):
    """A cell, where it is published, and its published figures (None: not published).

    cifar10: (parameters in M, test error in %). imagenet: (parameters in M, multiply-adds in M, top-1 error in %).
    macs: how its multiply-adds were counted. note: what a reader should know. C_imagenet: channels of that network.
    """
    genotype: Genotype
    source: str
    cifar10: tuple
    imagenet: tuple
    macs: str
    note: str
    C_imagenet: int


def published(normal, reduce, source, cifar10=(None, None), imagenet=(None, None, None), macs="", note="",
              normal_concat=(2, 3, 4, 5), reduce_concat=(2, 3, 4, 5), C_imagenet=48):
    """normal, reduce: the nodes' inputs as "operation source, ...", nodes divided by "|"."""
    def nodes(cell):
        return tuple(tuple((name, int(i)) for name, i in (pair.split() for pair in node.split(",")))
                     for node in cell.split("|"))
    genotype = Genotype(nodes(normal), normal_concat, nodes(reduce), reduce_concat)
    return Published(genotype, source, cifar10, imagenet, macs, note, C_imagenet)


PUBLISHED = {
    "NASNet_A": published(
        normal="sep_conv_5x5 1, sep_conv_3x3 0 | sep_conv_5x5 0, sep_conv_3x3 0 | avg_pool_3x3 1, skip_connect 0"
               "| avg_pool_3x3 0, avg_pool_3x3 0 | sep_conv_3x3 1, skip_connect 1",
        reduce="sep_conv_5x5 1, sep_conv_7x7 0 | max_pool_3x3 1, sep_conv_7x7 0 | avg_pool_3x3 1, sep_conv_5x5 0"
               "| skip_connect 3, avg_pool_3x3 2 | sep_conv_3x3 2, max_pool_3x3 1",
        normal_concat=(2, 3, 4, 5, 6), reduce_concat=(4, 5, 6),
        source="quark0/darts f276dd3, cnn/genotypes.py", cifar10=(3.3, 2.65), imagenet=(5.3, 564, 26.0),
        note="published figures are of NASNet's own networks, not of this cell in DARTS's"),
    "AmoebaNet_A": published(
        normal="avg_pool_3x3 0, max_pool_3x3 1 | sep_conv_3x3 0, sep_conv_5x5 2 | sep_conv_3x3 0, avg_pool_3x3 3"
               "| sep_conv_3x3 1, skip_connect 1 | skip_connect 0, avg_pool_3x3 1",
        reduce="avg_pool_3x3 0, sep_conv_3x3 1 | max_pool_3x3 0, sep_conv_7x7 2 | sep_conv_7x7 0, avg_pool_3x3 1"
               "| max_pool_3x3 0, max_pool_3x3 1 | conv_7x1_1x7 0, sep_conv_3x3 5",
        normal_concat=(4, 5, 6), reduce_concat=(3, 4, 6),
        source="quark0/darts f276dd3, cnn/genotypes.py", cifar10=(3.2, 3.34), imagenet=(5.1, 555, 25.5),
        note="not the paper's AmoebaNet row, which is B; figures from DARTS's tables"),
    "AmoebaNet_B": published(
        normal="sep_conv_3x3 0, skip_connect 1 | max_pool_3x3 1, nor_conv_1x1 1 | sep_conv_3x3 0, nor_conv_1x1 1"
               "| skip_connect 3, nor_conv_1x1 3 | avg_pool_3x3 1, nor_conv_1x1 5",
        reduce="max_pool_2x2 0, max_pool_3x3 0 | dil_conv_5x5 2, max_pool_3x3 2 | skip_connect 2, nor_conv_3x3 1"
               "| avg_pool_3x3 3, nor_conv_1x1 4 | skip_connect 4, sep_conv_3x3 1",
        normal_concat=(2, 4, 6), reduce_concat=(5, 6),
        source="renqianluo/NAO, NAO/cnn/dag.py", cifar10=(2.8, 2.55), imagenet=(5.3, 555, 26.0),
        note="published figures are of its own networks; the ImageNet ones from DARTS's table"),
    "ENAS": published(
        normal="sep_conv_3x3 1, skip_connect 1 | sep_conv_5x5 1, skip_connect 0 | avg_pool_3x3 0, sep_conv_3x3 1"
               "| sep_conv_3x3 0, avg_pool_3x3 1 | sep_conv_5x5 1, avg_pool_3x3 0",
        reduce="sep_conv_5x5 0, avg_pool_3x3 1 | sep_conv_3x3 1, avg_pool_3x3 1 | sep_conv_3x3 1, avg_pool_3x3 1"
               "| sep_conv_5x5 4, avg_pool_3x3 1 | sep_conv_3x3 5, sep_conv_5x5 0",
        normal_concat=(2, 3, 4, 5, 6), reduce_concat=(2, 3, 6),
        source="renqianluo/NAO, NAO/cnn/dag.py", cifar10=(4.6, 2.89),
        note="the cell drawn in the ENAS paper, in DARTS's network; 4.6M is of ENAS's own"),
    "ENAS_repository": published(
        normal="avg_pool_3x3 0, sep_conv_3x3 0 | skip_connect 0, sep_conv_5x5 0 | skip_connect 0, sep_conv_5x5 1"
               "| sep_conv_3x3 1, sep_conv_5x5 0 | avg_pool_3x3 0, sep_conv_5x5 1",
        reduce="sep_conv_3x3 1, sep_conv_3x3 1 | max_pool_3x3 0, avg_pool_3x3 0 | sep_conv_5x5 1, sep_conv_5x5 3"
               "| sep_conv_3x3 1, skip_connect 0 | max_pool_3x3 0, sep_conv_5x5 1",
        normal_concat=(2, 3, 4, 5, 6), reduce_concat=(2, 4, 5, 6),
        source="melodyguan/enas, scripts/cifar10_micro_final.sh",
        note="the cell that ENAS's repository trains; no figure is published for it"),
    "DARTS_V1": published(
        normal="sep_conv_3x3 1, sep_conv_3x3 0 | skip_connect 0, sep_conv_3x3 1 | skip_connect 0, sep_conv_3x3 1"
               "| sep_conv_3x3 0, skip_connect 2",
        reduce="max_pool_3x3 0, max_pool_3x3 1 | skip_connect 2, max_pool_3x3 0 | max_pool_3x3 0, skip_connect 2"
               "| skip_connect 2, avg_pool_3x3 0",
        source="quark0/darts f276dd3, cnn/genotypes.py", cifar10=(3.3, 3.00), note="first order"),
    "DARTS_V2": published(
        normal="sep_conv_3x3 0, sep_conv_3x3 1 | sep_conv_3x3 0, sep_conv_3x3 1 | sep_conv_3x3 1, skip_connect 0"
               "| skip_connect 0, dil_conv_3x3 2",
        reduce="max_pool_3x3 0, max_pool_3x3 1 | skip_connect 2, max_pool_3x3 1 | max_pool_3x3 0, skip_connect 2"
               "| skip_connect 2, max_pool_3x3 1",
        source="quark0/darts f276dd3, cnn/genotypes.py", cifar10=(3.3, 2.76), imagenet=(4.7, 574, 26.7),
        macs="not reproduced", note="second order"),
    "SNAS_mild": published(
        normal="sep_conv_3x3 0, sep_conv_3x3 1 | skip_connect 0, dil_conv_3x3 1 | skip_connect 0, skip_connect 1"
               "| skip_connect 0, sep_conv_3x3 1",
        reduce="max_pool_3x3 0, max_pool_3x3 1 | max_pool_3x3 1, skip_connect 2 | max_pool_3x3 1, skip_connect 2"
               "| max_pool_3x3 0, dil_conv_5x5 2",
        source="SNAS-Series/SNAS-Series 9a43adb, genotypes.py", imagenet=(4.3, 522, 27.3), macs="not reproduced",
        note="4.3M is SNAS_moderate's count, not this cell's"),
    "SNAS_moderate": published(
        normal="dil_conv_5x5 0, skip_connect 1 | sep_conv_3x3 0, skip_connect 1 | skip_connect 0, skip_connect 1"
               "| sep_conv_3x3 0, dil_conv_5x5 1",
        reduce="max_pool_3x3 0, max_pool_3x3 1 | sep_conv_5x5 0, dil_conv_5x5 1 | sep_conv_5x5 0, sep_conv_5x5 1"
               "| sep_conv_5x5 0, sep_conv_5x5 0",
        source="SNAS-Series/SNAS-Series 9a43adb, genotypes.py", cifar10=(2.8, 2.85),
        note="Table 1's SNAS row"),
    "GDAS": published(
        normal="skip_connect 0, skip_connect 1 | skip_connect 0, sep_conv_5x5 2 | sep_conv_3x3 3, skip_connect 0"
               "| sep_conv_5x5 4, sep_conv_3x3 3",
        reduce="sep_conv_5x5 0, sep_conv_3x3 1 | sep_conv_5x5 2, sep_conv_5x5 1 | dil_conv_5x5 2, sep_conv_3x3 1"
               "| sep_conv_5x5 0, sep_conv_5x5 1",
        source="D-X-Y/AutoDL-Projects, xautodl/nas_infer_model/DXYs/genotypes.py",
        cifar10=(3.4, 2.93), imagenet=(5.3, 581, 26.0), macs="conv+fc", note="ImageNet network with 50 channels",
        C_imagenet=50),
    "P_DARTS": published(
        normal="skip_connect 0, dil_conv_3x3 1 | skip_connect 0, sep_conv_3x3 1 | sep_conv_3x3 1, sep_conv_3x3 3"
               "| sep_conv_3x3 0, dil_conv_5x5 4",
        reduce="avg_pool_3x3 0, sep_conv_5x5 1 | sep_conv_3x3 0, dil_conv_5x5 2 | max_pool_3x3 0, dil_conv_3x3 1"
               "| dil_conv_3x3 1, dil_conv_5x5 3",
        source="chenxin061/pdarts b880e87, genotypes.py", cifar10=(3.4, 2.50), imagenet=(4.9, 557, 24.4),
        macs="ptflops"),
    "PC_DARTS": published(
        normal="sep_conv_3x3 1, skip_connect 0 | sep_conv_3x3 0, dil_conv_3x3 1 | sep_conv_5x5 0, sep_conv_3x3 1"
               "| avg_pool_3x3 0, dil_conv_3x3 1",
        reduce="sep_conv_5x5 1, max_pool_3x3 0 | sep_conv_5x5 1, sep_conv_5x5 2 | sep_conv_3x3 0, sep_conv_3x3 3"
               "| sep_conv_3x3 1, sep_conv_3x3 2",
        source="yuhuixu1993/PC-DARTS b74702f, genotypes.py", cifar10=(3.6, 2.57), imagenet=(5.3, 586, 25.1),
        macs="ptflops", note="searched on CIFAR-10"),
    "PC_DARTS_imagenet": published(
        normal="skip_connect 1, sep_conv_3x3 0 | sep_conv_3x3 0, skip_connect 1 | sep_conv_3x3 1, sep_conv_3x3 3"
               "| sep_conv_3x3 1, dil_conv_5x5 4",
        reduce="sep_conv_3x3 0, skip_connect 1 | dil_conv_5x5 2, max_pool_3x3 1 | sep_conv_3x3 2, sep_conv_3x3 1"
               "| sep_conv_5x5 0, sep_conv_3x3 3",
        source="yuhuixu1993/PC-DARTS b74702f, genotypes.py", imagenet=(5.3, 597, 24.2), macs="ptflops",
        note="searched on ImageNet; not in the paper's tables"),
    "FairDARTS_B": published(
        normal="sep_conv_3x3 0, sep_conv_3x3 1 | sep_conv_3x3 1 | dil_conv_3x3 0, sep_conv_5x5 1 | dil_conv_5x5 1",
        reduce="skip_connect 0, dil_conv_3x3 1 | skip_connect 0, dil_conv_3x3 1 | max_pool_3x3 0, sep_conv_3x3 1"
               "| skip_connect 2, max_pool_3x3 0",
        source="xiaomi-automl/FairDARTS 270cfc9, fairdarts/genotypes.py", cifar10=(3.88, 2.51),
        imagenet=(4.8, 541, 24.9), macs="conv+fc",
        note="3.88M counts the auxiliary head (476,426); Table 1's row, 3.3 +- 0.5M and 2.54 %, is a mean of seven cells"),
    "PR_DARTS": published(
        normal="skip_connect 0, sep_conv_3x3 1 | dil_conv_3x3 2, sep_conv_3x3 0 | dil_conv_3x3 3, sep_conv_3x3 1"
               "| dil_conv_3x3 4, dil_conv_3x3 1",
        reduce="avg_pool_3x3 0, dil_conv_5x5 1 | sep_conv_3x3 0, dil_conv_5x5 2 | sep_conv_5x5 1, dil_conv_3x3 3"
               "| dil_conv_5x5 4, dil_conv_5x5 1",
        source="salesforce/PR-DARTS 732bf43, PRDARTS_eval/genotypes.py", cifar10=(3.4, 2.32),
        imagenet=(5.0, 543, 24.1), macs="conv+fc"),
    "DARTS_PT_0": published(
        normal="sep_conv_3x3 0, sep_conv_3x3 1 | sep_conv_5x5 0, dil_conv_3x3 1 | skip_connect 0, skip_connect 2"
               "| skip_connect 0, max_pool_3x3 4",
        reduce="sep_conv_3x3 0, avg_pool_3x3 1 | dil_conv_5x5 1, dil_conv_3x3 2 | avg_pool_3x3 0, max_pool_3x3 2"
               "| sep_conv_3x3 2, skip_connect 4",
        source="ruocwang/darts-pt 4ec3149, sota/cnn/genotypes.py", cifar10=(2.85, None),
        note="Table 1's DARTS+PT, 3.0M and 2.61 +- 0.08 %, is the mean of 0 to 3; its ImageNet cell is not published"),
    "DARTS_PT_1": published(
        normal="sep_conv_3x3 0, sep_conv_3x3 1 | sep_conv_3x3 0, dil_conv_3x3 1 | max_pool_3x3 0, skip_connect 2"
               "| skip_connect 0, dil_conv_3x3 4",
        reduce="dil_conv_5x5 0, avg_pool_3x3 1 | max_pool_3x3 0, sep_conv_5x5 2 | max_pool_3x3 1, dil_conv_3x3 3"
               "| sep_conv_5x5 0, sep_conv_3x3 4",
        source="ruocwang/darts-pt 4ec3149, sota/cnn/genotypes.py", cifar10=(3.05, None)),
    "DARTS_PT_2": published(
        normal="skip_connect 0, sep_conv_3x3 1 | sep_conv_3x3 0, dil_conv_3x3 1 | skip_connect 2, dil_conv_3x3 3"
               "| max_pool_3x3 1, skip_connect 2",
        reduce="avg_pool_3x3 0, max_pool_3x3 1 | avg_pool_3x3 0, sep_conv_3x3 1 | dil_conv_5x5 2, skip_connect 3"
               "| sep_conv_3x3 2, sep_conv_5x5 4",
        source="ruocwang/darts-pt 4ec3149, sota/cnn/genotypes.py", cifar10=(2.66, None)),
    "DARTS_PT_3": published(
        normal="sep_conv_3x3 0, sep_conv_3x3 1 | sep_conv_3x3 0, sep_conv_3x3 1 | skip_connect 0, skip_connect 2"
               "| sep_conv_3x3 1, skip_connect 3",
        reduce="avg_pool_3x3 0, sep_conv_5x5 1 | max_pool_3x3 1, skip_connect 2 | dil_conv_5x5 1, max_pool_3x3 3"
               "| sep_conv_5x5 2, skip_connect 3",
        source="ruocwang/darts-pt 4ec3149, sota/cnn/genotypes.py", cifar10=(3.33, None)),
    "VS_DARTS": published(
        normal="sep_conv_3x3 1, skip_connect 0 | sep_conv_3x3 1, sep_conv_3x3 2 | sep_conv_3x3 1, sep_conv_3x3 3"
               "| sep_conv_3x3 1, max_pool_3x3 0",
        reduce="max_pool_3x3 0, max_pool_3x3 1 | dil_conv_5x5 2, dil_conv_3x3 1 | dil_conv_5x5 2, max_pool_3x3 0"
               "| sep_conv_5x5 0, dil_conv_5x5 2",
        source="genesis1104/VS-DARTS 2325c4b, genotypes.py", cifar10=(3.38, 2.43), imagenet=(5.3, 589, 24.8),
        macs="thop", note="the release's best cell, 3.72M; but Table 1's best row says 3.38M, which is VS_DARTS_2nd"),
    "VS_DARTS_2nd": published(
        normal="skip_connect 0, sep_conv_5x5 1 | sep_conv_3x3 1, skip_connect 0 | sep_conv_3x3 1, skip_connect 0"
               "| sep_conv_3x3 1, sep_conv_5x5 3",
        reduce="max_pool_3x3 0, dil_conv_3x3 1 | max_pool_3x3 0, sep_conv_3x3 1 | max_pool_3x3 0, dil_conv_5x5 2"
               "| max_pool_3x3 0, skip_connect 2",
        source="genesis1104/VS-DARTS 2325c4b, genotypes.py",
        note="3.38M as in Table 1's best row; the mean of the three, 3.36M, is Table 1's average 3.4M (2.50 +- 0.05 %)"),
    "VS_DARTS_3rd": published(
        normal="sep_conv_3x3 0, sep_conv_3x3 1 | skip_connect 0, sep_conv_3x3 1 | sep_conv_3x3 1, skip_connect 0"
               "| skip_connect 2, skip_connect 0",
        reduce="max_pool_3x3 0, dil_conv_3x3 1 | max_pool_3x3 0, max_pool_3x3 1 | dil_conv_5x5 3, max_pool_3x3 0"
               "| sep_conv_5x5 4, dil_conv_5x5 3",
        source="genesis1104/VS-DARTS 2325c4b, genotypes.py"),
    "VS_DARTS_without_LARC": published(
        normal="sep_conv_3x3 1, skip_connect 0 | sep_conv_3x3 1, skip_connect 0 | sep_conv_3x3 1, skip_connect 0"
               "| sep_conv_5x5 1, max_pool_3x3 0",
        reduce="max_pool_3x3 0, sep_conv_5x5 1 | sep_conv_3x3 2, sep_conv_3x3 0 | dil_conv_5x5 1, dil_conv_5x5 3"
               "| dil_conv_5x5 4, sep_conv_5x5 0",
        source="genesis1104/VS-DARTS 2325c4b, genotypes.py",
        note="no figure is published for it; Table 4 has no row of sqrt(beta) without LARC"),
}


# ---------------------------------------------------------------- the command

def network(genotype, imagenet=False, C=None):
    """The genotype's network in the published size, CIFAR-10 or ImageNet form; shapes only, no memory, no arithmetic."""
    with torch.device("meta"):
        return Network(genotype, C or 48, 14, 1000, imagenet=True) if imagenet else Network(genotype, C or 36, 20, 10)


def print_table():
    def number(value, digits):
        return "-" if value is None else f"{value:.{digits}f}"

    print(f"{'':<22}{'CIFAR-10, 20 cells, 36 channels':<36}{'ImageNet, 14 cells, 48 channels (GDAS: 50)':<60}")
    print(f"{'cell':<22}{'params, published':>18}{'error':>7}  | {'params, published':>18}{'MACs, published':>16}"
          f"{'counted as':>16}{'top-1':>7}  source")
    for name, cell in PUBLISHED.items():
        params, net = count_parameters(network(cell.genotype)), network(cell.genotype, True, cell.C_imagenet)
        print(f"{name:<22}{params:>10,}{number(cell.cifar10[0], 2):>8}{number(cell.cifar10[1], 2):>7}  | "
              f"{count_parameters(net):>10,}{number(cell.imagenet[0], 1):>8}"
              f"{count_macs(net, 224) / 1e6:>10.1f}{number(cell.imagenet[1], 0):>6}"
              f"{cell.macs or '-':>16}{number(cell.imagenet[2], 1):>7}  {cell.source}")
    print("""
Parameters: counted here, and published in millions; auxiliary heads excluded. MACs: multiply-adds of one 224x224 image
in millions, convolutions and classifier, counted here; then the number published. Table 2's FLOPs column mixes three
conventions (counted as): conv+fc, as here; thop, which adds batch norms and average pools; ptflops, which adds batch
norms, ReLUs and pools. Errors (%) are the published ones. Not published as cells: R-DARTS, PNAS and VS-DARTS + Proxy.
""")
    for name, cell in PUBLISHED.items():
        if cell.note:
            print(f"  {name}: {cell.note}")


def describe(genotype):
    """The nodes and edges of both cells, a line for each node."""
    lines = []
    for cell in ("normal", "reduce"):
        lines.append(f"  {cell} cell (0: the cell before the last, 1: the last)")
        for j, node in enumerate(getattr(genotype, cell), start=2):
            lines.append(f"    node {j} = " + " + ".join(f"{name}({i})" for name, i in node))
        lines.append("    output = concat(" + ", ".join(map(str, getattr(genotype, f"{cell}_concat"))) + ")")
    return "\n".join(lines)


def darts_notation(genotype):
    """The genotype as DARTS and its forks write it, to be pasted into their genotypes.py; they want two inputs a node."""
    nodes = genotype.normal + genotype.reduce
    if any(len(node) != 2 for node in nodes):
        return "(cannot be written in DARTS's notation: a node has one input, or more than two)"
    normal, reduce = ([pair for node in cell for pair in node] for cell in (genotype.normal, genotype.reduce))
    return (f"Genotype(normal={normal}, normal_concat={list(genotype.normal_concat)}, "
            f"reduce={reduce}, reduce_concat={list(genotype.reduce_concat)})")


def print_cell(name_or_file):
    genotype = load(name_or_file)
    published_cell = PUBLISHED.get(name_or_file)
    print(name_or_file)
    if published_cell:
        print(f"  source: {published_cell.source}" + (f"\n  note: {published_cell.note}" if published_cell.note else ""))
    print(describe(genotype))
    C = published_cell.C_imagenet if published_cell else 48
    for title, net, size in (("CIFAR-10, 20 cells, 36 channels", network(genotype), 32),
                             (f"ImageNet, 14 cells, {C} channels", network(genotype, True, C), 224)):
        print(f"  {title}: {count_parameters(net):,} parameters, {count_macs(net, size):,} multiply-adds")
    print(f"  in DARTS's notation, for a fork's genotypes.py:\n{darts_notation(genotype)}")
    print(f"  python retrain.py --genotype {shlex.quote(name_or_file)}")


def main(arguments):
    if arguments in (["-h"], ["--help"]):
        print(__doc__)
        return 0
    try:
        if arguments[:1] == ["--random"]:
            if len(arguments) != 2 or not arguments[1].isdecimal():
                raise ValueError("--random takes one seed, a whole number from 0 (see --help)")
            print(to_json(random_genotype(int(arguments[1]))))
        elif len(arguments) > 1:
            raise ValueError(f"one cell at most, not {len(arguments)} (see --help)")
        else:
            print_cell(arguments[0]) if arguments else print_table()
        sys.stdout.flush()
    except ValueError as error:
        print(f"genotypes.py: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:                                 # `python genotypes.py | head`
        sys.stdout = open(os.devnull, "w")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
