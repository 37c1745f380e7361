"""Cells as plain values: the genotype, the search spaces, the published cells of the paper's Tables 1 and 2.

    python genotypes.py                         the published cells, a line for each
    python genotypes.py VS_DARTS                one cell: nodes and edges, sizes, DARTS's notation
    python genotypes.py FILE --pt_darts         a cell in a file, and pt.darts's notation, too
    python genotypes.py --random 0 > cell.json  a random cell of the DARTS space, of seed 0

FILE is a genotype.json of ours, or a text with one cell as DARTS, its forks or pt.darts write it:
an entry of their genotypes.py, a line of a log, or lists in JSON. It is parsed, never evaluated.
"""
import argparse
import ast
import json
import os
import random
import re
import sys
from typing import NamedTuple

import torch

from model import OPS, Network, count_macs, count_parameters


class Genotype(NamedTuple):
    """A normal and a reduction cell. Node 0 is the last cell but one, node 1 the last; 2, 3, ... are its own.
    normal, reduce: for each node from 2 on, its inputs as pairs (operation, source node), one or more.
    normal_concat, reduce_concat: the nodes whose concatenation is the cell's output.
    """
    normal: tuple
    normal_concat: tuple
    reduce: tuple
    reduce_concat: tuple


def load_genotype(name_or_file):
    """The genotype of a published cell's name, or in a file. Otherwise a ValueError of one line."""
    if name_or_file in PUBLISHED:
        return PUBLISHED[name_or_file].genotype
    try:
        with open(name_or_file, encoding="utf-8-sig") as file:
            return from_text(file.read())
    except (OSError, ValueError) as error:
        raise ValueError(f"{name_or_file} is no published cell (`python genotypes.py` lists them) "
                         f"and no genotype: {error}") from None


INSIDE = r"[^()]*"
for _ in "cell", "node", "input":                           # brackets in brackets, as deep as they can be
    INSIDE = rf"[^()]*(?:\({INSIDE}\)[^()]*)*"
CALL = re.compile(rf"\b(?:(\w+)\s*=\s*(?:[\w.]{{1,99}}\.)?)?(?<!class )(Genotype\s*\({INSIDE}\))")


def from_text(text):
    """The one Genotype in `text`: in JSON, or as DARTS, its forks and pt.darts print it, amid other text.
    Raises ValueError, one line that ends with an example, for anything else."""
    text = text.replace("\\", "")                           # of shells and of strings in JSON
    try:
        genotype = parse(find_call(text) or text.strip())
        return Genotype(*checked_cell("normal", genotype.normal, genotype.normal_concat),
                        *checked_cell("reduce", genotype.reduce, genotype.reduce_concat))
    except ValueError as error:
        raise ValueError(f"{error}. What is read: JSON as `python genotypes.py --random 0` prints it, or "
                         "Genotype(normal=[('sep_conv_3x3', 0), ('skip_connect', 1), ...], "
                         "normal_concat=range(2, 6), reduce=[...], reduce_concat=range(2, 6))") from None


def find_call(text):
    """Genotype(...) out of `text`, None without one. Raises ValueError if there are several cells."""
    calls, names = {}, {}
    for name, call in CALL.findall(text):
        calls[re.sub(r"\W+", " ", call)] = call             # the same words: one cell, in whatever notation
        names[name or "one without a name"] = True
    if len(calls) > 1:
        raise ValueError(f"there are {len(calls)} genotypes ({', '.join(names)}) where one is wanted")
    return calls.popitem()[1] if calls else None


def parse(text):
    """The Genotype in the words Genotype(...), a JSON object or a JSON list; its fields are not checked."""
    text = re.sub(r"\brange\((\d),\s*(\d\d?)\)", lambda ends: str([*range(int(ends[1]), int(ends[2]))]), text)
    try:
        tree = ast.parse(text, mode="eval").body
        if isinstance(tree, ast.Call) and ast.unparse(tree.func) == "Genotype":
            fields = {word.arg: ast.literal_eval(word.value) for word in tree.keywords}
            return Genotype(*map(ast.literal_eval, tree.args), **fields)
        value = ast.literal_eval(tree)
        return Genotype(**value) if isinstance(value, dict) else Genotype(*value)
    except TypeError:
        raise ValueError(f"it must have four fields, {', '.join(Genotype._fields)}") from None
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        raise ValueError("it is neither JSON nor Genotype(...) of plain lists, strings and numbers") from None


def checked_cell(cell, nodes, concat):
    """nodes, concat as tuples; DARTS's flat list is divided, two inputs a node. Raises ValueError."""
    def is_list(value):
        return isinstance(value, (list, tuple)) and len(value) > 0
    if not is_list(nodes):
        raise ValueError(f"{cell} must be a list of nodes")
    if is_list(nodes[0]) and isinstance(nodes[0][0], str):
        if len(nodes) % 2:
            raise ValueError(f"{cell} is a flat list of {len(nodes)} inputs, not two for each node")
        nodes = [nodes[i:i + 2] for i in range(0, len(nodes), 2)]
    for j, node in enumerate(nodes, start=2):
        for pair in node if is_list(node) else [node]:
            if not is_list(pair) or len(pair) != 2 or str(pair[0]) not in OPS:
                raise ValueError(f"{cell}, node {j}: {pair!r} is not (operation of model.py, source)")
            if type(pair[1]) is not int or pair[1] not in range(j):
                raise ValueError(f"{cell}, node {j}: the source {pair[1]!r} is not a node before it")
    inner = range(2, len(nodes) + 2)
    if (not is_list(concat) or any(type(i) is not int or i not in inner for i in concat)
            or len(set(concat)) < len(concat)):
        raise ValueError(f"{cell}_concat must list nodes of the cell from 2 to {inner[-1]}, each once")
    return tuple(tuple(map(tuple, node)) for node in nodes), tuple(concat)


def to_json(genotype):
    return json.dumps(genotype._asdict(), indent=1)


def pt_darts_notation(genotype):
    """As pt.darts (khanrc/pt.darts) prints it. A second line names what DARTS's code lacks."""
    fields, names = [], set()
    for cell in ("normal", "reduce"):
        nodes, concat = getattr(genotype, cell), list(getattr(genotype, f"{cell}_concat"))
        run = range(concat[0], concat[-1] + 1)
        concat = run if list(run) == concat else concat
        fields += [f"{cell}={[list(node) for node in nodes]}", f"{cell}_concat={concat}"]
        names |= {name for node in nodes for name, _ in node}
    absent = ", ".join(sorted(names - {*DARTS_PRIMITIVES, "sep_conv_7x7"}))
    return f"Genotype({', '.join(fields)})" + (f"\n# warning: DARTS's code has no {absent}" if absent else "")


def darts_notation(genotype):
    """As DARTS and its forks print it, a flat list. Raises ValueError if a node has not two inputs."""
    if any(len(node) != 2 for node in genotype.normal + genotype.reduce):
        raise ValueError("it cannot be written in DARTS's notation, which has two inputs a node")
    return pt_darts_notation(genotype).replace("[[", "[").replace("], [", ", ").replace("]]", "]")


def describe(genotype):
    """The nodes and edges of both cells, a line for each node."""
    lines = []
    for cell in ("normal", "reduce"):
        lines.append(f"  {cell} cell (0: the cell before the last, 1: the last)")
        for j, node in enumerate(getattr(genotype, cell), start=2):
            lines.append(f"    node {j} = " + " + ".join(f"{name}({i})" for name, i in node))
        lines.append(f"    output = concat({', '.join(map(str, getattr(genotype, f'{cell}_concat')))})")
    return "\n".join(lines)


# ---------------------------------------------------------------- search spaces

EDGES = [(i, j) for j in (2, 3, 4, 5) for i in range(j)]    # (source, target): 14 edges, four nodes
DARTS_PRIMITIVES = ("none", "max_pool_3x3", "avg_pool_3x3", "skip_connect",
                    "sep_conv_3x3", "sep_conv_5x5", "dil_conv_3x3", "dil_conv_5x5")
SHORT = {"skip": "skip_connect", "max": "max_pool_3x3", "avg": "avg_pool_3x3", "max2": "max_pool_2x2",
         "sep3": "sep_conv_3x3", "sep5": "sep_conv_5x5", "sep7": "sep_conv_7x7",
         "dil3": "dil_conv_3x3", "dil5": "dil_conv_5x5", "nor1": "nor_conv_1x1", "nor3": "nor_conv_3x3"}
S1 = {  # automl/RobustDARTS at 3dec3fe, src/spaces.py: two candidates an edge, in the order of EDGES
    "normal": "skip dil3, skip dil5,  skip dil5, skip sep3, skip dil3,  max skip, skip sep3, skip sep3, "
              "skip dil3,  skip sep3, max skip, skip dil3, dil3 dil5, dil3 dil5",
    "reduce": "max avg, max dil3,  max avg, max avg, skip dil5,  max avg, max sep3, skip dil3, "
              "skip dil5,  max avg, max avg, skip dil5, skip dil5, skip dil5",
}


def everywhere(*primitives):
    return {cell: {edge: primitives for edge in EDGES} for cell in ("normal", "reduce")}


SPACES = {  # {space: {"normal" or "reduce": {(source, target): primitives}}}
    "darts": everywhere(*DARTS_PRIMITIVES),
    "s1": {cell: {edge: tuple(map(SHORT.get, words.split())) for edge, words in zip(EDGES, text.split(","))}
           for cell, text in S1.items()},
    "s2": everywhere("skip_connect", "sep_conv_3x3"),
    "s3": everywhere("none", "skip_connect", "sep_conv_3x3"),
    "s4": everywhere("noise", "sep_conv_3x3"),
}


def random_genotype(seed):
    """A cell of the DARTS space: two inputs a node, on each an operation but `none`, all equally likely."""
    if seed < 0:
        raise ValueError("a seed is a whole number from 0 on")
    draw, cells = random.Random(seed), []
    for _ in "normal", "reduce":
        cells.append(tuple(tuple((draw.choice(DARTS_PRIMITIVES[1:]), i) for i in draw.sample(range(j), 2))
                           for j in (2, 3, 4, 5)))
    return Genotype(cells[0], (2, 3, 4, 5), cells[1], (2, 3, 4, 5))


class Published(NamedTuple):
    """A cell, where it is published, and its published figures (None: not published).
    cifar10: (parameters in M, test error in %). imagenet: (parameters in M, multiply-adds in M, top-1 error).
    counted_as: how the multiply-adds were counted. C_imagenet: channels of that network.
    """
    genotype: Genotype
    source: str
    cifar10: tuple = (None, None)
    imagenet: tuple = (None, None, None)
    counted_as: str = ""
    note: str = ""
    C_imagenet: int = 48


def published(*figures, normal, reduce, **more):
    """normal, reduce: "operation source, ... | ...; concat": operations as in SHORT, nodes divided by "|"."""
    def cell(text):
        text, _, concat = text.partition(";")
        nodes = [[pair.split() for pair in node.split(",")] for node in text.split("|")]
        nodes = tuple(tuple((SHORT[word], int(i)) for word, i in node) for node in nodes)
        return nodes, tuple(map(int, (concat or "2 3 4 5").split()))
    return Published(Genotype(*cell(normal), *cell(reduce)), *figures, **more)


PUBLISHED = {
    "NASNet_A": published("quark0/darts f276dd3, cnn/genotypes.py", (3.3, 2.65), (5.3, 564, 26.0),
        normal="sep5 1, sep3 0 | sep5 0, sep3 0 | avg 1, skip 0 | avg 0, avg 0 | sep3 1, skip 1; 2 3 4 5 6",
        reduce="sep5 1, sep7 0 | max 1, sep7 0 | avg 1, sep5 0 | skip 3, avg 2 | sep3 2, max 1; 4 5 6",
        note="published figures are of NASNet's own networks, not of this cell in DARTS's"),
    "AmoebaNet_B": published("renqianluo/NAO, NAO/cnn/dag.py", (2.8, 2.55), (5.3, 555, 26.0),
        normal="sep3 0, skip 1 | max 1, nor1 1 | sep3 0, nor1 1 | skip 3, nor1 3 | avg 1, nor1 5; 2 4 6",
        reduce="max2 0, max 0 | dil5 2, max 2 | skip 2, nor3 1 | avg 3, nor1 4 | skip 4, sep3 1; 5 6",
        note="published figures are of its own networks; the ImageNet ones from DARTS's table"),
    "ENAS": published("renqianluo/NAO, NAO/cnn/dag.py", (4.6, 2.89),
        normal="sep3 1, skip 1 | sep5 1, skip 0 | avg 0, sep3 1 | sep3 0, avg 1 | sep5 1, avg 0; 2 3 4 5 6",
        reduce="sep5 0, avg 1 | sep3 1, avg 1 | sep3 1, avg 1 | sep5 4, avg 1 | sep3 5, sep5 0; 2 3 6",
        note="the cell drawn in the ENAS paper, in DARTS's network; 4.6M is of ENAS's own"),
    "DARTS_V1": published("quark0/darts f276dd3, cnn/genotypes.py", (3.3, 3.00),
        normal="sep3 1, sep3 0 | skip 0, sep3 1 | skip 0, sep3 1 | sep3 0, skip 2",
        reduce="max 0, max 1 | skip 2, max 0 | max 0, skip 2 | skip 2, avg 0", note="first order"),
    "DARTS_V2": published("quark0/darts f276dd3, cnn/genotypes.py", (3.3, 2.76), (4.7, 574, 26.7),
        normal="sep3 0, sep3 1 | sep3 0, sep3 1 | sep3 1, skip 0 | skip 0, dil3 2", note="second order",
        reduce="max 0, max 1 | skip 2, max 1 | max 0, skip 2 | skip 2, max 1", counted_as="not reproduced"),
    "SNAS_mild": published("SNAS-Series/SNAS-Series 9a43adb, genotypes.py", imagenet=(4.3, 522, 27.3),
        normal="sep3 0, sep3 1 | skip 0, dil3 1 | skip 0, skip 1 | skip 0, sep3 1",
        reduce="max 0, max 1 | max 1, skip 2 | max 1, skip 2 | max 0, dil5 2", counted_as="not reproduced",
        note="4.3M is SNAS_moderate's count, not this cell's"),
    "SNAS_moderate": published("SNAS-Series/SNAS-Series 9a43adb, genotypes.py", (2.8, 2.85),
        normal="dil5 0, skip 1 | sep3 0, skip 1 | skip 0, skip 1 | sep3 0, dil5 1",
        reduce="max 0, max 1 | sep5 0, dil5 1 | sep5 0, sep5 1 | sep5 0, sep5 0", note="Table 1's SNAS row"),
    "GDAS": published("D-X-Y/AutoDL-Projects, xautodl/nas_infer_model/DXYs/genotypes.py", (3.4, 2.93),
        normal="skip 0, skip 1 | skip 0, sep5 2 | sep3 3, skip 0 | sep5 4, sep3 3",
        reduce="sep5 0, sep3 1 | sep5 2, sep5 1 | dil5 2, sep3 1 | sep5 0, sep5 1",
        imagenet=(5.3, 581, 26.0), counted_as="conv+fc", C_imagenet=50),
    "P_DARTS": published("chenxin061/pdarts b880e87, genotypes.py", (3.4, 2.50), (4.9, 557, 24.4),
        normal="skip 0, dil3 1 | skip 0, sep3 1 | sep3 1, sep3 3 | sep3 0, dil5 4",
        reduce="avg 0, sep5 1 | sep3 0, dil5 2 | max 0, dil3 1 | dil3 1, dil5 3", counted_as="ptflops"),
    "PC_DARTS": published("yuhuixu1993/PC-DARTS b74702f, genotypes.py", (3.6, 2.57), (5.3, 586, 25.1),
        normal="sep3 1, skip 0 | sep3 0, dil3 1 | sep5 0, sep3 1 | avg 0, dil3 1", note="found on CIFAR-10",
        reduce="sep5 1, max 0 | sep5 1, sep5 2 | sep3 0, sep3 3 | sep3 1, sep3 2", counted_as="ptflops"),
    "FairDARTS_B": published("xiaomi-automl/FairDARTS 270cfc9, fairdarts/genotypes.py", (3.88, 2.51),
        normal="sep3 0, sep3 1 | sep3 1 | dil3 0, sep5 1 | dil5 1", imagenet=(4.8, 541, 24.9),
        reduce="skip 0, dil3 1 | skip 0, dil3 1 | max 0, sep3 1 | skip 2, max 0", counted_as="conv+fc",
        note="3.88M counts the auxiliary head; Table 1's row, 3.3 +- 0.5M, 2.54 %, is a mean of seven cells"),
    "PR_DARTS": published("salesforce/PR-DARTS 732bf43, PRDARTS_eval/genotypes.py", (3.4, 2.32),
        normal="skip 0, sep3 1 | dil3 2, sep3 0 | dil3 3, sep3 1 | dil3 4, dil3 1",
        reduce="avg 0, dil5 1 | sep3 0, dil5 2 | sep5 1, dil3 3 | dil5 4, dil5 1",
        imagenet=(5.0, 543, 24.1), counted_as="conv+fc"),
    "DARTS_PT_0": published("ruocwang/darts-pt 4ec3149, sota/cnn/genotypes.py", (2.85, None),
        normal="sep3 0, sep3 1 | sep5 0, dil3 1 | skip 0, skip 2 | skip 0, max 4",
        reduce="sep3 0, avg 1 | dil5 1, dil3 2 | avg 0, max 2 | sep3 2, skip 4",
        note="Table 1's 3.0M and 2.61 +- 0.08 % are means of 0 to 3; its ImageNet cell is not published"),
    "DARTS_PT_1": published("ruocwang/darts-pt 4ec3149, sota/cnn/genotypes.py", (3.05, None),
        normal="sep3 0, sep3 1 | sep3 0, dil3 1 | max 0, skip 2 | skip 0, dil3 4",
        reduce="dil5 0, avg 1 | max 0, sep5 2 | max 1, dil3 3 | sep5 0, sep3 4"),
    "DARTS_PT_2": published("ruocwang/darts-pt 4ec3149, sota/cnn/genotypes.py", (2.66, None),
        normal="skip 0, sep3 1 | sep3 0, dil3 1 | skip 2, dil3 3 | max 1, skip 2",
        reduce="avg 0, max 1 | avg 0, sep3 1 | dil5 2, skip 3 | sep3 2, sep5 4"),
    "DARTS_PT_3": published("ruocwang/darts-pt 4ec3149, sota/cnn/genotypes.py", (3.33, None),
        normal="sep3 0, sep3 1 | sep3 0, sep3 1 | skip 0, skip 2 | sep3 1, skip 3",
        reduce="avg 0, sep5 1 | max 1, skip 2 | dil5 1, max 3 | sep5 2, skip 3"),
    "VS_DARTS": published("genesis1104/VS-DARTS 2325c4b, genotypes.py", (3.38, 2.43), (5.3, 589, 24.8),
        normal="sep3 1, skip 0 | sep3 1, sep3 2 | sep3 1, sep3 3 | sep3 1, max 0",
        reduce="max 0, max 1 | dil5 2, dil3 1 | dil5 2, max 0 | sep5 0, dil5 2", counted_as="thop",
        note="the release's best cell, 3.72M; but Table 1's best row says 3.38M, which is VS_DARTS_2nd"),
    "VS_DARTS_2nd": published("genesis1104/VS-DARTS 2325c4b, genotypes.py",
        normal="skip 0, sep5 1 | sep3 1, skip 0 | sep3 1, skip 0 | sep3 1, sep5 3",
        reduce="max 0, dil3 1 | max 0, sep3 1 | max 0, dil5 2 | max 0, skip 2",
        note="3.38M as in Table 1's best row; the three cells' mean, 3.36M, is its 3.4M (2.50 +- 0.05 %)"),
    "VS_DARTS_3rd": published("genesis1104/VS-DARTS 2325c4b, genotypes.py",
        normal="sep3 0, sep3 1 | skip 0, sep3 1 | sep3 1, skip 0 | skip 2, skip 0",
        reduce="max 0, dil3 1 | max 0, max 1 | dil5 3, max 0 | sep5 4, dil5 3"),
    "VS_DARTS_without_LARC": published("genesis1104/VS-DARTS 2325c4b, genotypes.py",
        normal="sep3 1, skip 0 | sep3 1, skip 0 | sep3 1, skip 0 | sep5 1, max 0",
        reduce="max 0, sep5 1 | sep3 2, sep3 0 | dil5 1, dil5 3 | dil5 4, sep5 0",
        note="no figure is published for it; Table 4 has no row of sqrt(beta) without LARC"),
}


def network(genotype, imagenet=False, C=None):
    """The genotype's network in the published size, CIFAR-10 or ImageNet form, without values (on "meta")."""
    C, layers, classes = (C or 48, 14, 1000) if imagenet else (C or 36, 20, 10)
    with torch.device("meta"):
        return Network(genotype, C, layers, classes, imagenet=imagenet)


def print_cell(name_or_file, pt_darts):
    genotype = load_genotype(name_or_file)
    cell = PUBLISHED.get(name_or_file, Published(genotype, "a file"))
    print(f"{name_or_file}\n  source: {cell.source}" + (f"\n  note: {cell.note}" if cell.note else ""))
    print(describe(genotype))
    imagenet = network(genotype, True, cell.C_imagenet)
    for form, net, size in (("CIFAR-10, 20 cells, 36 channels", network(genotype), 32),
                            (f"ImageNet, 14 cells, {cell.C_imagenet} channels", imagenet, 224)):
        print(f"  {form}: {count_parameters(net):,} parameters, {count_macs(net, size):,} multiply-adds")
    try:
        print(f"  in DARTS's notation, for a fork's genotypes.py:\n{darts_notation(genotype)}")
    except ValueError as error:
        print(f"  {error}")
    if pt_darts:
        print(f"  in pt.darts's notation:\n{pt_darts_notation(genotype)}")


def main(arguments):
    parser = argparse.ArgumentParser("genotypes.py", description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: parser.exit(2, f"genotypes.py: {message} (see --help)\n")
    one_of = parser.add_mutually_exclusive_group()
    one_of.add_argument("cell", nargs="?", help="the name of a published cell, or a file")
    one_of.add_argument("--random", type=int, metavar="SEED", help="print a random cell, as JSON")
    parser.add_argument("--pt_darts", action="store_true", help="print the cell in pt.darts's notation, too")
    args = parser.parse_args(arguments)
    if args.pt_darts and args.cell is None:
        parser.error("--pt_darts is for a named cell, or one in a file")
    try:
        if args.cell is not None:
            print_cell(args.cell, args.pt_darts)
        elif args.random is not None:
            print(to_json(random_genotype(args.random)))
        else:
            for name, cell in PUBLISHED.items():
                print(f"{name:<22} {cell.source}")
            print("`python genotypes.py NAME` shows one of them.")
        sys.stdout.flush()
    except ValueError as error:
        raise SystemExit(f"genotypes.py: {error}") from None
    except BrokenPipeError:                                 # `python genotypes.py | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


if __name__ == "__main__":
    main(sys.argv[1:])
