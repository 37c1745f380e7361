"""Cells as plain values: the genotype, the search spaces (section 5.2), the published cells.

    python genotypes.py                         the published cells, a line for each
    python genotypes.py VS_DARTS                one cell: nodes and edges, sizes, DARTS's notation
    python genotypes.py FILE --pt_darts         a cell in a file, and pt.darts's notation, too
    python genotypes.py FILE:NAME               one of the cells in a file
    python genotypes.py --random 0 > cell.json  a random cell of the DARTS space, of seed 0

FILE is a genotype.json or search.json of ours, or a text with a cell as DARTS, its forks or
pt.darts write it: an entry of their genotypes.py, a line of a log, lists in JSON. Such a text may
also stand in FILE's place. It is parsed, never evaluated.
"""
import ast
import json
import os
import random
import re
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple

import torch

from model import OPS, Network, count_macs, count_parameters


class Genotype(NamedTuple):
    """A normal and a reduction cell. Node 0 is the last cell but one, node 1 the last.

    normal, reduce: for each node from 2 on, its inputs, (operation, source node), one or more.
    normal_concat, reduce_concat: the nodes whose concatenation is the cell's output.
    """
    normal: tuple
    normal_concat: tuple
    reduce: tuple
    reduce_concat: tuple


# ---------------------------------------------------------------- search spaces

EDGES = [(i, j) for j in (2, 3, 4, 5) for i in range(j)]    # (source, target): 14 edges
DARTS_PRIMITIVES = ("none", "max_pool_3x3", "avg_pool_3x3", "skip_connect",
                    "sep_conv_3x3", "sep_conv_5x5", "dil_conv_3x3", "dil_conv_5x5")
SHORT = {  # as the cells below are written
    "skip": "skip_connect", "max": "max_pool_3x3", "avg": "avg_pool_3x3", "max2": "max_pool_2x2",
    "sep3": "sep_conv_3x3", "sep5": "sep_conv_5x5", "sep7": "sep_conv_7x7",
    "dil3": "dil_conv_3x3", "dil5": "dil_conv_5x5",
    "nor1": "nor_conv_1x1", "nor3": "nor_conv_3x3",
}


def everywhere(*primitives):
    return {cell_type: {edge: primitives for edge in EDGES} for cell_type in ("normal", "reduce")}


def edge_by_edge(text):
    pairs = [tuple(map(SHORT.get, words.split())) for words in text.split(",")]
    return dict(zip(EDGES, pairs))


SPACES = {  # {space: {"normal" or "reduce": {(source, target): primitives}}}
    "darts": everywhere(*DARTS_PRIMITIVES),
    "s1": {  # automl/RobustDARTS at 3dec3fe, src/spaces.py; a line for each node
        "normal": edge_by_edge("""skip dil3, skip dil5,
            skip dil5, skip sep3, skip dil3,
            max skip, skip sep3, skip sep3, skip dil3,
            skip sep3, max skip, skip dil3, dil3 dil5, dil3 dil5"""),
        "reduce": edge_by_edge("""max avg, max dil3,
            max avg, max avg, skip dil5,
            max avg, max sep3, skip dil3, skip dil5,
            max avg, max avg, skip dil5, skip dil5, skip dil5"""),
    },
    "s2": everywhere("skip_connect", "sep_conv_3x3"),
    "s3": everywhere("none", "skip_connect", "sep_conv_3x3"),
    "s4": everywhere("noise", "sep_conv_3x3"),
}


def random_genotype(seed):
    """A cell of the DARTS space: two inputs a node, all operations but `none` equally likely."""
    draw = random.Random(seed)

    def draw_node(j):
        return tuple((draw.choice(DARTS_PRIMITIVES[1:]), i) for i in draw.sample(range(j), 2))
    inner = 2, 3, 4, 5
    normal, reduce = (tuple(map(draw_node, inner)) for _ in range(2))
    return Genotype(normal, inner, reduce, inner)


# ---------------------------------------------------------------- published cells

# Name and source, then the normal and the reduction cell: the inputs of each node from 2 on, and
# after ";" the nodes of the output, if not 2 3 4 5. Their test errors: experiments/tables.py.
CELLS = """\
NASNet_A: quark0/darts f276dd3, cnn/genotypes.py
sep5 1, sep3 0 | sep5 0, sep3 0 | avg 1, skip 0 | avg 0, avg 0 | sep3 1, skip 1; 2 3 4 5 6
sep5 1, sep7 0 | max 1, sep7 0 | avg 1, sep5 0 | skip 3, avg 2 | sep3 2, max 1; 4 5 6

AmoebaNet_B: renqianluo/NAO, NAO/cnn/dag.py
sep3 0, skip 1 | max 1, nor1 1 | sep3 0, nor1 1 | skip 3, nor1 3 | avg 1, nor1 5; 2 4 6
max2 0, max 0 | dil5 2, max 2 | skip 2, nor3 1 | avg 3, nor1 4 | skip 4, sep3 1; 5 6

ENAS: renqianluo/NAO, NAO/cnn/dag.py
sep3 1, skip 1 | sep5 1, skip 0 | avg 0, sep3 1 | sep3 0, avg 1 | sep5 1, avg 0; 2 3 4 5 6
sep5 0, avg 1 | sep3 1, avg 1 | sep3 1, avg 1 | sep5 4, avg 1 | sep3 5, sep5 0; 2 3 6

DARTS_V1: quark0/darts f276dd3, cnn/genotypes.py
sep3 1, sep3 0 | skip 0, sep3 1 | skip 0, sep3 1 | sep3 0, skip 2
max 0, max 1 | skip 2, max 0 | max 0, skip 2 | skip 2, avg 0

DARTS_V2: quark0/darts f276dd3, cnn/genotypes.py
sep3 0, sep3 1 | sep3 0, sep3 1 | sep3 1, skip 0 | skip 0, dil3 2
max 0, max 1 | skip 2, max 1 | max 0, skip 2 | skip 2, max 1

SNAS_mild: SNAS-Series/SNAS-Series 9a43adb, genotypes.py
sep3 0, sep3 1 | skip 0, dil3 1 | skip 0, skip 1 | skip 0, sep3 1
max 0, max 1 | max 1, skip 2 | max 1, skip 2 | max 0, dil5 2

SNAS_moderate: SNAS-Series/SNAS-Series 9a43adb, genotypes.py
dil5 0, skip 1 | sep3 0, skip 1 | skip 0, skip 1 | sep3 0, dil5 1
max 0, max 1 | sep5 0, dil5 1 | sep5 0, sep5 1 | sep5 0, sep5 0

GDAS: D-X-Y/AutoDL-Projects, xautodl/nas_infer_model/DXYs/genotypes.py
skip 0, skip 1 | skip 0, sep5 2 | sep3 3, skip 0 | sep5 4, sep3 3
sep5 0, sep3 1 | sep5 2, sep5 1 | dil5 2, sep3 1 | sep5 0, sep5 1

P_DARTS: chenxin061/pdarts b880e87, genotypes.py
skip 0, dil3 1 | skip 0, sep3 1 | sep3 1, sep3 3 | sep3 0, dil5 4
avg 0, sep5 1 | sep3 0, dil5 2 | max 0, dil3 1 | dil3 1, dil5 3

PC_DARTS: yuhuixu1993/PC-DARTS b74702f, genotypes.py
sep3 1, skip 0 | sep3 0, dil3 1 | sep5 0, sep3 1 | avg 0, dil3 1
sep5 1, max 0 | sep5 1, sep5 2 | sep3 0, sep3 3 | sep3 1, sep3 2

FairDARTS_B: xiaomi-automl/FairDARTS 270cfc9, fairdarts/genotypes.py
sep3 0, sep3 1 | sep3 1 | dil3 0, sep5 1 | dil5 1
skip 0, dil3 1 | skip 0, dil3 1 | max 0, sep3 1 | skip 2, max 0

PR_DARTS: salesforce/PR-DARTS 732bf43, PRDARTS_eval/genotypes.py
skip 0, sep3 1 | dil3 2, sep3 0 | dil3 3, sep3 1 | dil3 4, dil3 1
avg 0, dil5 1 | sep3 0, dil5 2 | sep5 1, dil3 3 | dil5 4, dil5 1

DARTS_PT_0: ruocwang/darts-pt 4ec3149, sota/cnn/genotypes.py
sep3 0, sep3 1 | sep5 0, dil3 1 | skip 0, skip 2 | skip 0, max 4
sep3 0, avg 1 | dil5 1, dil3 2 | avg 0, max 2 | sep3 2, skip 4

DARTS_PT_1: ruocwang/darts-pt 4ec3149, sota/cnn/genotypes.py
sep3 0, sep3 1 | sep3 0, dil3 1 | max 0, skip 2 | skip 0, dil3 4
dil5 0, avg 1 | max 0, sep5 2 | max 1, dil3 3 | sep5 0, sep3 4

DARTS_PT_2: ruocwang/darts-pt 4ec3149, sota/cnn/genotypes.py
skip 0, sep3 1 | sep3 0, dil3 1 | skip 2, dil3 3 | max 1, skip 2
avg 0, max 1 | avg 0, sep3 1 | dil5 2, skip 3 | sep3 2, sep5 4

DARTS_PT_3: ruocwang/darts-pt 4ec3149, sota/cnn/genotypes.py
sep3 0, sep3 1 | sep3 0, sep3 1 | skip 0, skip 2 | sep3 1, skip 3
avg 0, sep5 1 | max 1, skip 2 | dil5 1, max 3 | sep5 2, skip 3

VS_DARTS: genesis1104/VS-DARTS 2325c4b, genotypes.py
sep3 1, skip 0 | sep3 1, sep3 2 | sep3 1, sep3 3 | sep3 1, max 0
max 0, max 1 | dil5 2, dil3 1 | dil5 2, max 0 | sep5 0, dil5 2

VS_DARTS_2nd: genesis1104/VS-DARTS 2325c4b, genotypes.py
skip 0, sep5 1 | sep3 1, skip 0 | sep3 1, skip 0 | sep3 1, sep5 3
max 0, dil3 1 | max 0, sep3 1 | max 0, dil5 2 | max 0, skip 2

VS_DARTS_3rd: genesis1104/VS-DARTS 2325c4b, genotypes.py
sep3 0, sep3 1 | skip 0, sep3 1 | sep3 1, skip 0 | skip 2, skip 0
max 0, dil3 1 | max 0, max 1 | dil5 3, max 0 | sep5 4, dil5 3

VS_DARTS_without_LARC: genesis1104/VS-DARTS 2325c4b, genotypes.py
sep3 1, skip 0 | sep3 1, skip 0 | sep3 1, skip 0 | sep5 1, max 0
max 0, sep5 1 | sep3 2, sep3 0 | dil5 1, dil5 3 | dil5 4, sep5 0
"""


def read_line(line):
    """(nodes, concat) of a line of CELLS."""
    line, _, concat = line.partition(";")
    nodes = [re.findall(r"(\w+) (\d)", node) for node in line.split("|")]
    nodes = tuple(tuple((SHORT[word], int(i)) for word, i in node) for node in nodes)
    return nodes, tuple(map(int, (concat or "2 3 4 5").split()))


ENTRIES = [entry.splitlines() for entry in CELLS.split("\n\n")]
SOURCES = dict(title.split(": ") for title, *_ in ENTRIES)
PUBLISHED = {name: Genotype(*read_line(normal), *read_line(reduce))
             for name, (_, normal, reduce) in zip(SOURCES, ENTRIES)}


# ---------------------------------------------------------------- reading

def load_genotype(name):
    """The genotype of a published cell, of FILE or of FILE:NAME, or in a text itself.

    Raises ValueError, one line that ends with an example, for anything else.
    """
    name = str(name)
    if name in PUBLISHED:
        return PUBLISHED[name]
    file, wanted = (name, None) if os.path.exists(name) else name.rpartition(":")[::2]
    try:
        if "," in name and not os.path.exists(file):
            return from_text(name)
        data = Path(file or name).read_bytes()
        return from_text(data.decode(json.detect_encoding(data), "replace"), wanted)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{' '.join(name.split()):.80} is no published cell (`python genotypes.py` lists them) "
            f"and no genotype: {error}. What is read: JSON as `python genotypes.py --random 0` "
            "prints it, or Genotype(normal=[('sep_conv_3x3', 0), ('skip_connect', 1), ...], "
            "normal_concat=range(2, 6), reduce=[...], reduce_concat=range(2, 6))") from None


def from_text(text, wanted=None):
    """The one Genotype in `text`, or that called `wanted` in it. Raises ValueError, one line."""
    cells = find_cells(text.replace("\\", ""))              # backslashes of shells and of JSON
    chosen = [words for name, words in cells if wanted in (None, name)]
    try:
        found = {*map(read_cell, chosen)}
    except ValueError:
        if len(chosen) == 1:
            raise
        found = ()                                          # it is one of several, and not wanted
    if len(found) != 1:
        names = ", ".join(dict.fromkeys(name for name, _ in cells))
        raise ValueError(f"of its genotypes ({names}) one is wanted: FILE:NAME, or its text alone")
    return found.pop()


def find_cells(text):
    """[(name, words)] of every `name = Genotype(...)` or `"genotype": {...}`, bracket to bracket.

    Without a name it is called by its number. Without any of these, the whole text is one.
    """
    pattern = r"(?:\b(\w+)\s*=\s*[\w.]*)?(?<!class )\bGenotype\s*(?=\()|\bgenotype\W{1,5}(?={)"
    _, *parts = re.split(pattern, text)
    cells = []
    for name, part in zip(parts[::2], parts[1::2]):
        part = re.sub("#.*", "", part)
        depths = [*accumulate((letter in "({") - (letter in ")}") for letter in part)]
        if 0 in depths:                                     # else it is cut off
            cells.append((name or str(len(cells) + 1), part[:depths.index(0) + 1]))
    return cells or [("", text.strip())]


def read_cell(words):
    """The Genotype in the words (normal=..., ...), or a JSON object or list. Raises ValueError."""
    words = re.sub(r"\brange\((\d),\s*(\d\d?)\)",
                   lambda ends: str([*range(int(ends[1]), int(ends[2]))]), words)
    words = re.sub(r",\s*\w+\s*=\s*None\b", "", words)      # two fields more in AutoDL-Projects
    try:
        if words.startswith("("):
            call = ast.parse(f"Genotype{words}", mode="eval").body
            fields = {word.arg: ast.literal_eval(word.value) for word in call.keywords}
            cell = Genotype(*map(ast.literal_eval, call.args), **fields)
        else:
            value = ast.literal_eval(words)
            cell = Genotype(**value) if isinstance(value, dict) else Genotype(*value)
    except (TypeError, ValueError, SyntaxError, RecursionError, MemoryError):
        raise ValueError("it is neither JSON nor Genotype(...) of four fields, normal, "
                         "normal_concat, reduce, reduce_concat, all plain lists") from None
    return Genotype(*checked_cell("normal", cell.normal, cell.normal_concat),
                    *checked_cell("reduce", cell.reduce, cell.reduce_concat))


def listed(value):
    """The value if it is a list or a tuple, else an empty one."""
    return value if isinstance(value, (list, tuple)) else ()


def checked_cell(cell_type, given, concat):
    """(nodes, concat) as tuples, without `none`, which adds nothing. Raises ValueError."""
    nodes = []
    for j, node in enumerate(divide(cell_type, given), start=2):
        place = f"{cell_type}, node {j}"
        inputs = [checked_input(place, j, pair) for pair in listed(node)]
        nodes.append(tuple(pair for pair in inputs if pair[0] != "none"))
        if not nodes[-1]:
            raise ValueError(f"{place} has no input")
    known = {i for i in listed(concat) if type(i) is int and i in range(2, j + 1)}
    if not known or len(known) < len(concat):
        raise ValueError(f"{cell_type}_concat must list nodes of the cell from 2 to {j}, each once")
    return tuple(nodes), tuple(concat)


def divide(cell_type, given):
    """Each node's inputs. DARTS lists two a node, FairDARTS lists (operation, node, source)."""
    if not listed(given):
        raise ValueError(f"{cell_type} must be a list of nodes")
    kinds = {tuple(map(type, listed(one))) for one in given}
    if kinds == {(str, int, int)}:
        nodes = {}
        for name, j, i in given:
            nodes.setdefault(j, []).append((name, i))
        return [nodes.get(j, []) for j in range(2, len(nodes) + 2)]
    if not any(str in kind for kind in kinds):
        return given
    if len(given) % 2:
        raise ValueError(f"{cell_type} is a flat list of {len(given)} inputs, not two a node")
    return [given[k:k + 2] for k in range(0, len(given), 2)]


def checked_input(place, j, given):
    """(operation, source) of an input of node j. Raises ValueError."""
    match given:
        case [str(name), i] if type(i) is int and i in range(j) and name in [*OPS, "none"]:
            return name, i
    raise ValueError(f"{place}: {given!r:.80} is not (operation of model.py, node before it)")


# ---------------------------------------------------------------- writing

def to_json(genotype):
    return json.dumps(genotype._asdict(), indent=1)


def pt_darts_notation(genotype):
    """As pt.darts (khanrc/pt.darts) prints it: a list for every node."""
    fields = []
    for nodes, concat in genotype[:2], genotype[2:]:
        run = range(concat[0], concat[-1] + 1)
        fields += [[[*node] for node in nodes], run if tuple(run) == concat else [*concat]]
    return str(Genotype(*fields))


def darts_notation(genotype):
    """As DARTS and its forks print it, a flat list. Raises ValueError: it has two inputs a node."""
    if any(len(node) != 2 for node in genotype.normal + genotype.reduce):
        raise ValueError("it cannot be written in DARTS's notation, which has two inputs a node")
    text = pt_darts_notation(genotype)
    return text.replace("[[", "[").replace("], [", ", ").replace("]]", "]")


def describe(genotype):
    """The nodes and edges of both cells, a line for each node."""
    lines = []
    for cell_type, nodes, concat in ("normal", *genotype[:2]), ("reduce", *genotype[2:]):
        lines.append(f"  {cell_type} cell (0: the cell before the last, 1: the last)")
        for j, node in enumerate(nodes, start=2):
            lines.append(f"    node {j} = " + " + ".join(f"{name}({i})" for name, i in node))
        lines.append(f"    output = concat({', '.join(map(str, concat))})")
    return "\n".join(lines)


# ---------------------------------------------------------------- the command

def network(genotype, C=36, imagenet=False):
    """The genotype's network of the published depth, without values. imagenet: usually C=48."""
    layers, classes = (14, 1000) if imagenet else (20, 10)
    with torch.device("meta"):
        return Network(genotype, C, layers, classes, imagenet=imagenet)


def print_cell(name, pt_darts):
    genotype = load_genotype(name)
    print(name)
    if name in PUBLISHED:
        print(f"  source: {SOURCES[name]}")
    print(describe(genotype))
    for form, C, size in ("CIFAR-10, 20", 36, 32), ("ImageNet, 14", 48, 224):
        net = network(genotype, C, imagenet=size == 224)
        print(f"  {form} cells, {C} channels: {count_parameters(net):,} parameters, "
              f"{count_macs(net, size):,} multiply-adds")
    try:
        print(f"  in DARTS's notation, for a fork's genotypes.py:\n{darts_notation(genotype)}")
    except ValueError as error:
        print(f"  {error}")
    if pt_darts:
        print(f"  in pt.darts's notation:\n{pt_darts_notation(genotype)}")


def main(arguments):
    from run import Parser, natural                         # the rest needs model.py alone
    parser = Parser("genotypes.py", description=__doc__)
    parser.add_argument("cell", nargs="?", help="the name of a published cell, a file, or a text")
    parser.add_argument("--random", type=natural, metavar="SEED", help="print a random cell")
    parser.add_argument("--pt_darts", action="store_true", help="print pt.darts's notation, too")
    args = parser.parse_args(arguments)
    if args.cell is not None:
        try:
            print_cell(args.cell, args.pt_darts)
        except ValueError as error:
            raise SystemExit(f"genotypes.py: {error}") from None
    elif args.random is not None:
        print(to_json(random_genotype(args.random)))
    else:
        for name, source in SOURCES.items():
            print(f"{name:<22} {source}")
        print("`python genotypes.py NAME` shows one of them.")


if __name__ == "__main__":
    from run import start
    start(main)
