"""The paper's figures, drawn from searches of your own. Sections 2.3, 3 and 4.

    python -m experiments.figures 1 VS_DARTS             a published cell, a file's, a search's
    python -m experiments.figures 3 RUN ...              also 2, 4, 5, 6, overview: side by side
    python -m experiments.figures 2 RUN --edge normal:1-3 --tune 2
    python -m experiments.figures nasbench201 RUN ...    true accuracies, method by method

A search that is not finished is drawn as far as it is. A figure is a PNG, with its numbers
beside it as JSON; those that a claim of the paper rests on are printed. Figures 2, 3, 5 and 6
look into the networks that `search.py --keep_nets` keeps: on the first batch of the half for
alpha (figure 2: on all of it; figure 5, which is about w: of the half for w), not augmented,
normalized by the batch's own statistics, as Eq. 3 has it. For nasbench201 a RUN is a folder of
experiments.nasbench201, or a file like experiments/nasbench201.jsonl, with a run on each line.
"""
import argparse
import copy
import io
import itertools
import json
import os
import textwrap
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

import search
from data import make_batches, make_seed, progress
from experiments import nasbench201, tables
from genotypes import SPACES, Genotype, load_genotype
from model import OPS, ReLUFirst, mixing_weights, place
from run import (Parser, find_device, load_checkpoint, natural, number, positive_int, read_json,
                 reason, start, write)

COLORS = {name: f"C{k}" for k, name in enumerate(OPS)}
METHODS = {short: name for name, short in nasbench201.METHODS.items()}


# ---------------------------------------------------------------- runs and their super-networks

def read_search(folder, options):
    """(title, the flags of a search, its folder and its log, which may be that of a part)."""
    flags, log = read_json(Path(folder) / "config.json"), [{}]
    if flags.get("space") in SPACES:
        log = read_lines(Path(folder) / "log.jsonl")
    if "alphas" not in log[-1]:
        raise SystemExit(f"{folder} is a run of {flags.get('program')}, not of search.py")
    run = argparse.Namespace(**{**flags, "folder": folder, "out": folder, "log": log})
    run.device, run.data = options.device or run.device, options.data or run.data
    for edge in options.edge:
        edge_row(SPACES[run.space], edge)
    if options.figure in "2356":
        load_net(run, options.epoch or 0)                   # is it there?
    part = f", {len(log)} of {run.epochs} epochs" * (len(log) < run.epochs)
    return f"{tables.method(flags)}{part}: {folder}", run


def read_lines(path):
    """The objects in a log, or in another file that has one on each line."""
    try:
        return [dict(json.loads(line)) for line in path.read_text().splitlines()]
    except (OSError, ValueError, TypeError) as error:
        hint = ": no epoch is finished" if isinstance(error, FileNotFoundError) else ""
        raise SystemExit(f"{path} cannot be read ({reason(error)}{hint})") from None


def load_net(run, epoch):
    """The super-network after so many epochs of the search; 0: as its seed made it, untrained."""
    path = Path(run.folder) / f"net-{max(epoch, 1)}.pt"
    if not path.exists():
        raise SystemExit(f"{path} is missing: --keep_nets keeps a search's networks")
    state = load_checkpoint(path)
    torch.manual_seed(run.seed)
    net = search.make_supernet(run, len(state["classifier.bias"]))
    if epoch > 0:
        net.load_state_dict(state)
    return place(net, find_device(run.device))


def over_epochs(run, look, half=1):
    """What look(net, images, labels, epoch) returns, a dict, after 0, 1, ... epochs: of lists.

    half: 0 for that of w, 1 for that of alpha.
    """
    split = search.read_halves(run, find_device(run.device))[half]
    images, labels = next(make_batches(split, run.batch_size, train=False).epoch(0))
    epochs, seen = range(len(run.log) + 1), []
    for epoch in progress(epochs, f"super-networks of {run.folder}", len(epochs)):
        torch.manual_seed(0)                                # S4's noise: the same in each
        seen.append(look(load_net(run, epoch).train(), images, labels, epoch))
    return transpose(seen)


def transpose(values):
    """A list of dicts as a dict of lists, however deep the dicts are."""
    if not isinstance(values[0], dict):
        return values
    return {key: transpose([value[key] for value in values]) for key in values[0]}


def capture(net, images, modules):
    """[(input, output) of each module] in one forward pass, of which nothing else changes."""
    seen = {}

    def keep(module, inputs, output):
        seen[module] = inputs[0], output
    hooks = [module.register_forward_hook(keep) for module in modules]
    net(images)
    for hook in hooks:
        hook.remove()
    return [seen[module] for module in modules]


def middle(net, cell_type):
    """The layer of the middle one of the normal cells, or of the reduction cells."""
    layers = [layer for layer, found in enumerate(net.cell_types) if found == cell_type]
    return layers[len(layers) // 2]


def edge_row(space, edge):
    """(cell type, row of its alphas, primitives) of an edge such as "normal:0-2"."""
    for cell_type, edges in space.items():
        for row, ((i, j), primitives) in enumerate(edges.items()):
            if edge == f"{cell_type}:{i}-{j}":
                return cell_type, row, primitives
    raise SystemExit(f"--edge {edge}: there is none; the first is normal:0-2, the last "
                     "reduce:4-5")


def covariance(x, y):
    """Cov(x, y) over a batch and its pixels, mean over the channels. x, y: (B, C, H, W)."""
    x, y = (z.double() - z.double().mean((0, 2, 3), keepdim=True) for z in (x, y))
    return (x * y).mean().item()


# ---------------------------------------------------------------- figure 1: a cell as a graph

def read_cell(name, options):
    """(title, genotype): published, a file's, or a search's: if it goes on, that of now."""
    file = Path(name) / "genotype.json"
    if Path(name).is_dir() and not file.exists():
        title, run = read_search(name, options)
        return title, Genotype(**run.log[-1]["genotype"])
    try:
        return name, load_genotype(str(file) if file.exists() else name)
    except ValueError as error:
        raise SystemExit(str(error)) from None


def draw1(column, genotype):
    for ax, cell_type in zip(column, ("normal", "reduce")):
        draw_cell(ax, genotype[cell_type], genotype[f"{cell_type}_concat"])
        ax.set_title(cell_type, loc="left")
        ax.set_axis_off()


def draw_cell(ax, nodes, concat):
    """Nodes on a line, an arc for every edge, as high as it is long: none is hidden."""
    last, drawn, t = len(nodes) + 2, [], np.linspace(0, np.pi, 60)
    edges = [(i, j, name) for j, node in enumerate(nodes, start=2) for name, i in node]
    middle = {"ha": "center", "va": "center"}
    box = {"fc": "white", "ec": "none", "pad": 0.5}
    for i, j, name in [*edges, *((i, last, "") for i in concat)]:
        height = 0.62 * (j - i) + 0.3 * drawn.count((i, j)) if name else 0.18 * (i - j)
        drawn.append((i, j))
        color = COLORS.get(name, "0.75")
        ax.plot((i + j) / 2 - (j - i) / 2 * np.cos(t), height * np.sin(t), color=color)
        ax.text((i + j) / 2, height, name, color=color, bbox=box, **middle)
    names = ["cell before\nthe last", "last\ncell", *range(2, last), "output"]
    for node, name in enumerate(names):
        ax.text(node, 0, name, bbox={"fc": "white", "boxstyle": "round"}, **middle)


# ---------------------------------------------------------------- figure 2: beta and accuracy

def kendall_tau(x, y):
    """(concordant pairs - discordant pairs) / pairs; a tie is neither."""
    pairs = itertools.combinations(zip(x, y), 2)
    return float(np.mean([np.sign((a - c) * (b - d)) for (a, b), (c, d) in pairs]))


@torch.no_grad()
def answers(net, half, images):
    """Which of the half's first images are classified right, bool (images,).

    Normalized by batch, as in ruocwang/darts-pt 4ec3149: running statistics would be those of
    another mixture.
    """
    net.train()
    torch.manual_seed(0)                                    # S4's noise: the same in each
    batches = make_batches(half.take(slice(images)), 512, train=False).epoch(0)
    return torch.cat([net(batch).argmax(1) == labels for batch, labels in batches]).cpu()


def tune(net, run, w_half, epochs):
    """Trains the weights on, on their half, by the search's optimizer.

    Its cosine goes down by steps, not by epochs.
    """
    batches = make_batches(w_half, run.batch_size, make_seed(run.seed, "tune"))
    flags = {**vars(run), "epochs": epochs * batches.steps}
    optimizer, _, scheduler = search.make_optimizers(net, argparse.Namespace(**flags))
    net.train()
    for epoch in range(epochs):
        for images, labels in batches.epoch(epoch):
            search.weight_step(net, optimizer, images, labels, run.grad_clip)
            scheduler.step()


@torch.no_grad()
def alone(net, cell_type, row, operation):
    """Section 2.3: leaves one operation on an edge, at beta = 1; all else stays as it is."""
    net.alphas[cell_type][row] = float("-inf")
    net.alphas[cell_type][row, operation] = 0


def compare(beta, right):
    """What beta says of the operations beside what they do. right: the answers() of each alone.

    accuracy: of each, in percent. tau: between them and beta. ceiling: between the accuracies on
    two halves of the images; no beta can follow what does not repeat itself.
    """
    right = 100 * torch.stack(right).double()               # (operations, images)
    parts = right, right[:, ::2], right[:, 1::2]
    every, even, odd = (part.mean(1).tolist() for part in parts)
    return {"accuracy": every, "tau": kendall_tau(beta, every),
            "ceiling": kendall_tau(even, odd)}


def measure2(run, options):
    """Of every edge, beta and accuracy of each operation but `none`, at once and tuned."""
    epoch = len(run.log) if options.epoch is None else options.epoch
    net, edges = load_net(run, epoch), {}
    w_half, alpha_half = search.read_halves(run, find_device(run.device))
    alphas = copy.deepcopy(net.alphas.state_dict())
    names = [f"{cell_type}:{i}-{j}"
             for cell_type, found in net.space.items() for i, j in found]
    for name in progress(names, f"edges of {run.folder}", len(names)):
        cell_type, row, primitives = edge_row(net.space, name)
        operations = {name: o for o, name in enumerate(primitives) if name != "none"}
        beta = net.betas()[cell_type][row, [*operations.values()]].tolist()
        edges[name] = {"operations": [*operations], "beta": beta}
        tuned = options.tune and name in options.edge
        for when in ("at once", "tuned") if tuned else ("at once",):
            right = []
            for operation in operations.values():
                alone(net, cell_type, row, operation)
                discrete = net
                if when == "tuned":
                    discrete = copy.deepcopy(net)
                    tune(discrete, run, w_half, options.tune)
                right.append(answers(discrete, alpha_half, options.images))
            edges[name][when] = compare(beta, right)
        net.alphas.load_state_dict(alphas)
    means = {}
    for when, key in itertools.product(("at once", "tuned"), ("tau", "ceiling")):
        found = [edge[when][key] for edge in edges.values() if when in edge]
        if found:
            means[f"mean {key}, {when}"] = float(np.mean(found))
    return {"means": means, "chosen": options.edge, "edges": edges}


def draw2(column, numbers):
    for name, above, below in zip(numbers["chosen"], column[::2], column[1::2]):
        draw_edge(above, below, name, numbers["edges"][name])
    found = transpose([edge["at once"] for edge in numbers["edges"].values()])
    column[-1].hist([found["tau"], found["ceiling"]], np.linspace(-1, 1, 15),
                    label=("tau, at once", "ceiling, at once"))
    means = "\n".join(f"{key}: {value:.2f}" for key, value in numbers["means"].items())
    column[-1].set(ylabel="edges", xlabel=means)


def claim2(numbers):
    return numbers["means"]


def draw_edge(above, below, name, edge):
    """Accuracies above beta, smallest first: they rise to the right if beta follows them."""
    order, text = np.argsort(edge["beta"]), name
    for key in list(edge)[2:]:                              # at once, tuned
        above.plot(np.take(edge[key]["accuracy"], order), "o-", label=key)
        text += f"\n{key}: tau {edge[key]['tau']:.2f}, ceiling {edge[key]['ceiling']:.2f}"
    below.bar(range(len(order)), np.take(edge["beta"], order), color="0.6")
    operations = np.take(edge["operations"], order)
    below.set_xticks(range(len(order)), operations, rotation=35, ha="right")
    below.set(ylabel="beta", xlabel=text)
    above.sharex(below)
    above.tick_params(labelbottom=False)
    above.set_ylabel("accuracy, %")


# ---------------------------------------------------------------- figures 3 and 4: by node

@torch.no_grad()
def node_variances(net, layer, images):
    """Section 3: {"node 2": the variance of its output, mean over its channels, ...}."""
    seen = enumerate(capture(net, images, net.cells[layer].normalize), start=2)
    return {f"node {j}": covariance(x_j, x_j) for j, (_, x_j) in seen}


def measure3(run, options):
    def look(net, images, labels, epoch):
        return {"variance": node_variances(net, middle(net, "normal"), images)}
    return over_epochs(run, look)


def claim3(numbers):
    last = [variances[-1] for variances in numbers["variance"].values()]
    return {"largest over smallest variance at the end": max(last) / min(last)}


def measure4(run, options):
    """Section 4.1. none: {"N2": beta of `none` at the end, mean over the edges into it, ...}.

    mean_by_epoch: over all edges, after 1, 2, ... epochs.
    """
    space, into = SPACES[run.space], {}
    operations = space["normal"][0, 2]
    if "none" not in operations:
        raise SystemExit(f"{run.folder}: there is no `none` in space {run.space}")
    for cell_type, alpha in run.log[-1]["alphas"].items():
        betas = mixing_weights(torch.tensor(alpha)).tolist()
        for (_, j), beta in zip(space[cell_type], betas):
            node = into.setdefault(f"{cell_type[0].upper()}{j}", [])
            node.append(beta[operations.index("none")])
    return {"none": {node: float(np.mean(found)) for node, found in into.items()},
            "uniform": 1 / len(operations),
            "mean_by_epoch": [record["beta_none"] for record in run.log]}


def claim4(numbers):
    return {"beta of none at the end, mean over all edges": numbers["mean_by_epoch"][-1]}


def draw4(column, numbers):
    (ax,), nodes = column, numbers["none"]
    ax.bar(nodes.keys(), nodes.values(), color=4 * ["C0"] + 4 * ["C1"])
    ax.axhline(numbers["uniform"], color="0.5", linestyle=":", label="uniform")
    ax.set(xlabel="node of the normal (N) or reduction (R) cell", ylabel="mean beta of none")


# ---------------------------------------------------------------- figure 5: gradients

def sep_conv_gradients(net, layer, images, labels, args):
    """Section 4.2, of the weights w of 3x3 separable convolutions on edges into the last node.

    {edge: (|g|, |g| / |w|, |step| / |w|)}, g being the gradient. The step is the search's, with
    its clip of g, but without momentum. args: flags, with the epoch's rate and weight decay.
    """
    moved, values = copy.deepcopy(net), {}
    optimizer, _, _ = search.make_optimizers(moved, args)
    torch.manual_seed(0)                                    # S4's noise: the same in both
    F.cross_entropy(net(images), labels).backward(inputs=net.weights)
    torch.manual_seed(0)
    search.weight_step(moved, optimizer, images, labels, args.grad_clip)
    last = len(net.cells[layer].normalize) + 1
    for edge, mixed in net.cells[layer].edges.items():
        if edge.endswith(f"-{last}") and "sep_conv_3x3" in mixed.ops:
            before = [*mixed.ops["sep_conv_3x3"].parameters()]
            after = moved.cells[layer].edges[edge].ops["sep_conv_3x3"].parameters()
            w, g = norm(before), norm([w.grad for w in before])
            values[edge] = g, g / w, norm([a - b for a, b in zip(after, before)]) / w
    return values


def norm(tensors):
    return torch.cat([tensor.flatten() for tensor in tensors]).norm().item()


def measure5(run, options):
    def look(net, images, labels, epoch):
        record = [*run.log, run.log[-1]][epoch]             # the last has none of its own
        decay = record.get("weight_decay", run.weight_decay)            # ADA changes it
        args = {**vars(run), "learning_rate": record["lr"], "weight_decay": decay}
        edges = sep_conv_gradients(net, middle(net, "normal"), images, labels,
                                   argparse.Namespace(**args))
        if not edges:
            raise SystemExit(f"{run.folder}: no sep_conv_3x3 into the last node")
        sizes = zip(("|g|", "|g| / |w|", "|step| / |w|"), zip(*edges.values()))
        return {size: dict(zip(edges, values)) for size, values in sizes}
    return over_epochs(run, look, half=0)


def claim5(numbers):
    """The paper's is about "early epochs"; here from 0, the untrained network, to 5."""
    claims = {}
    for size in ("|g| / |w|", "|step| / |w|"):
        logs = np.log([line[:6] for line in numbers[size].values()])    # (edges, epochs)
        spread = float(np.exp(np.ptp(logs, 0).mean()))
        claims[f"largest over smallest {size}, epochs 0 to 5"] = spread
    return claims


# ---------------------------------------------------------------- figure 6: Eq. 4

RATIOS = ("variance ratio", "sigma ratio")                  # 6a: the caption's, the text's


@torch.no_grad()
def mixed_variance(net, cell_type, row, images):
    """Section 4.3, of an edge in the middle cell of its type; w_o is beta_o, or its root.

    variance ratio  of the mixed operation to its input: 6a, by its caption
    sigma ratio     its root, of deviations: 6a, by the text
    covariances     Cov(o_i, o_j) of all operations but `none`; for i = j the variance (6b)
    squares         the first sum of Eq. 4, of w_o^2 Cov(o, o)
    C               the second sum, of w_i w_j Cov(o_i, o_j) over i != j
    squares_without_none, C_without_none
                    the same, with the other betas scaled to a sum of 1. In Eq. 6 the first sum
                    is 1; but `none`, whose variance is 0, adds no beta to it
    """
    mixed = list(net.cells[middle(net, cell_type)].edges.values())[row]
    bodies = [op.body if isinstance(op, ReLUFirst) else op for op in mixed.ops.values()]
    *seen, (x, output) = capture(net, images, [*bodies, mixed])
    covariances = np.array([[covariance(a, b) for _, b in seen] for _, a in seen])
    beta = zip(mixed.primitives, net.betas()[cell_type][row].tolist())
    beta = np.array([b for name, b in beta if name != "none"])
    variance = covariance(output, output)
    ratio = variance / covariance(x, x)
    rows = [dict(zip(mixed.ops, row)) for row in covariances.tolist()]
    values = {"variance": variance, "variance ratio": ratio, "sigma ratio": ratio ** 0.5,
              "covariances": dict(zip(mixed.ops, rows))}
    for suffix, b in (("", beta), ("_without_none", beta / beta.sum())):
        w = np.sqrt(b) if net.sqrt_beta else b
        values[f"squares{suffix}"] = float(w ** 2 @ covariances.diagonal())
        values[f"C{suffix}"] = float(w @ covariances @ w) - values[f"squares{suffix}"]
    return values


def measure6(run, options):
    def look(net, images, labels, epoch):
        return {edge: mixed_variance(net, *edge_row(net.space, edge)[:2], images)
                for edge in options.edge}
    return over_epochs(run, look)


def draw6(column, edges):
    ratios = {f"{key}, {name}": edge[key]
              for name, edge in edges.items() for key in RATIOS}
    draw_panels(column, {"output / input": ratios})
    for (name, edge), pairs, sums in zip(edges.items(), column[1::2], column[2::2]):
        draw_pairs(pairs, name, edge["covariances"])
        styles = {"variance": "k-", "squares": "b-", "squares_without_none": "b:", "C": "r-",
                  "C_without_none": "r:"}
        for key, style in styles.items():
            sums.plot(edge[key], style, label=key.replace("_", " "))
        sums.set(xlabel="epoch", ylabel=f"Eq. 4, {name}")


def pairs_by_weights(name, covariances):
    """[(how many of two have no weights, their covariances)]. A skip of stride 2 has some."""
    weightless = {"max_pool_3x3", "avg_pool_3x3", "noise", "skip_connect"}
    if name.startswith(("reduce:0-", "reduce:1-")):
        weightless.remove("skip_connect")
    return [((a in weightless) + (b in weightless), covariances[a][b])
            for a, b in itertools.combinations(covariances, 2)]


def draw_pairs(ax, name, covariances):
    groups = (("0.6", "both with weights"), ("C0", "one with weights"),
              ("C3", "no weights"))
    for group, values in pairs_by_weights(name, covariances):
        color, text = groups[group]
        ax.plot(values, color=color, linewidth=0.8, label=text)
    ax.set(xlabel="epoch", ylabel=f"covariances, {name}")


def claim6(edges):
    """6a: "after the early stages", here the first fifth. 6b, Eq. 6: at the end."""
    claims = {}
    for name, edge in edges.items():
        for key in RATIOS:
            ratio = np.array(edge[key][len(edge[key]) // 5:])
            spread = float(np.ptp(ratio) / ratio.mean())
            claims[f"{name}: (largest - smallest {key}) / mean"] = spread
        claims[f"{name}: C / squares"] = edge["C"][-1] / edge["squares"][-1]
        pairs = pairs_by_weights(name, edge["covariances"])
        for text, groups in {"covariance without weights": [2],
                             "other covariance": [0, 1]}.items():
            last = [covariance[-1] for group, covariance in pairs if group in groups]
            if last:
                claims[f"{name}: {text}"] = float(np.mean(last))
    return claims


# ---------------------------------------------------------------- NAS-Bench-201

def read_methods(options):
    """[(method, its runs)], in the order of METHODS. A run that is given twice counts once."""
    runs, settings, free = {}, set(), tables.FREE | tables.COMPARED
    for run in itertools.chain(*map(read_runs201, options.runs)):
        key, flags = (run["method"], run["seed"]), run["flags"]
        runs[key] = max(run, runs.get(key, run), key=lambda run: len(run["accuracy"]))
        own = {flag: flags[flag] for flag in sorted(flags.keys() - free)}
        settings.add(json.dumps(own))
    if len(settings) > 1:
        listed = ", ".join(sorted(settings))
        raise SystemExit(f"the settings of the runs differ: {listed}")
    found = {}
    for run in runs.values():
        found.setdefault(run["method"], []).append(run)
    names = METHODS | {method: method for method in found.keys() - METHODS.keys()}
    wanted = [(name, found[method]) for method, name in names.items()
              if method in found and name in (options.method or [name])]
    if not wanted:
        raise SystemExit("these runs are of other methods")
    return wanted


def read_runs201(name):
    """Runs as nasbench201.summary has them: those in a file, or the one in a folder."""
    if Path(name).is_file():
        runs = read_lines(Path(name))
        if all({"method", "seed", "flags", "accuracy", "betas"} <= run.keys() for run in runs):
            return runs
    elif (flags := read_json(Path(name) / "config.json")).get("space") == "nasbench201":
        log = read_lines(Path(name) / "log.jsonl")
        return [nasbench201.summary(argparse.Namespace(**flags), log)]
    raise SystemExit(f"{name} has no run of experiments.nasbench201")


def measure201(runs, options):
    """accuracies: percent, by seed and epoch. median: by epoch, as far as all seeds are.

    unfinished: how many of the runs. beta: by operation, mean over edges and seeds at the end.
    """
    whole = nasbench201.make_parser().get_default("epochs")
    accuracies = [run["accuracy"] for run in runs]
    betas = np.mean([run["betas"] for run in runs], (0, 1)).tolist()
    return {"seeds": [run["seed"] for run in runs], "accuracies": accuracies,
            "median": np.median([*zip(*accuracies)], 1).tolist(),
            "unfinished": sum(len(run["accuracy"]) < run["flags"].get("epochs", whole)
                              for run in runs),
            "beta": dict(zip(nasbench201.PRIMITIVES, betas))}


def draw201(column, numbers):
    table, (ax,) = nasbench201.accuracies()[..., 0] / 100, column
    for line in numbers["accuracies"]:
        ax.plot(range(1, len(line) + 1), line, "C0", linewidth=0.6, label="a seed")
    median = numbers["median"]
    ax.plot(range(1, len(median) + 1), median, "C3", linewidth=2, label="median")
    marks = (("best cell", table.max(), ":"), ("mean of all cells", table.mean(), "-."),
             ("all skip connections", table[(1,) * 6], "--"))
    for name, value, style in marks:
        ax.axhline(value, color="0.3", linewidth=0.8, linestyle=style,
                   label=f"{name}, {value:.2f}")
    ax.set(xlabel="epoch", ylabel="CIFAR-10 accuracy, %", xlim=(0, None), ylim=(50, 96))


def print_table201(numbers):
    """Markdown, of the last epoch's cells.

    p: of the rank-sum test against DARTS-L2, if both are finished; paired: of the signed-rank
    test, over the seeds that both have.
    """
    tables.print_row("method", "seeds", "median", "mean ± deviation", "least", "most",
                     "below 90 %", "p", "paired", "beta of skip_connect", "beta of none")
    tables.print_row(*["---"] * 11)
    base = numbers.get("DARTS-L2", {"unfinished": 1})
    for name, run in numbers.items():
        last, p, paired = [line[-1] for line in run["accuracies"]], "-", "-"
        if name != "DARTS-L2" and not run["unfinished"] + base["unfinished"]:
            of_base = {seed: line[-1] for seed, line in zip(base["seeds"], base["accuracies"])}
            gaps = [value - of_base[k] for k, value in zip(run["seeds"], last) if k in of_base]
            p = f"{nasbench201.rank_sum_p(last, [*of_base.values()]):.4f}"
            paired = f"{nasbench201.signed_rank_p(gaps):.4f}"
        part = f" ({run['unfinished']} unfinished)" if run["unfinished"] else ""
        deviation = f" ± {np.std(last, ddof=1):.2f}" if len(last) > 1 else ""
        tables.print_row(name, f"{len(last)}{part}", f"{np.median(last):.2f}",
                         f"{np.mean(last):.2f}{deviation}", f"{min(last):.2f}", f"{max(last):.2f}",
                         str(sum(value < 90 for value in last)), p, paired,
                         *(f"{run['beta'][name]:.3f}" for name in ("skip_connect", "none")))


# ---------------------------------------------------------------- overview, drawing, the command

def measure_overview(run, options):
    """Losses, accuracies, betas and chosen operations, from the log; not of epoch 0."""
    panels = {"loss": ("train_loss", "valid_loss"), "accuracy, %": ("train_acc", "valid_acc"),
              "mean beta": ("beta_none", "beta_skip")}      # None: not there
    for text, keys in panels.items():
        panels[text] = {key: [None, *(record[key] for record in run.log)] for key in keys}
    cells = [json.dumps(record.get("genotype")) for record in run.log]  # not in our runs/
    counts = {name: [None, *(cell.count(f'"{name}"') for cell in cells)] for name in OPS}
    chosen = {name: line for name, line in counts.items() if any(line)}
    return {**panels, "chosen operations": chosen}


def draw_panels(column, panels):
    """panels: {text: {label: a value after 0, 1, ... epochs}}. Norms have a log scale."""
    for ax, (text, lines) in zip(column, panels.items()):
        for name, values in lines.items():
            ax.plot(values, ".-", color=COLORS.get(name), label=name)
        ax.set(xlabel="epoch", ylabel=text, xlim=(0, None))
        ax.set_yscale("log" if "|" in text else "linear")


def picture(title, draw, rows, panel, numbers):
    """A PNG, a column for each run, on one scale; legends where they hide no data."""
    os.environ["MPLBACKEND"] = "agg"                        # a notebook's may not be installed
    import matplotlib.figure
    content = io.BytesIO()
    with matplotlib.rc_context({"font.size": 7, "lines.markersize": 3}):
        size = (panel[0] * len(numbers) + 1.6, panel[1] * rows + 0.5)
        page = matplotlib.figure.Figure(size, layout="constrained", dpi=110)
        axes = page.subplots(rows, len(numbers), squeeze=False, sharey="row")
        for column, (name, run) in zip(axes.T, numbers.items()):
            draw(column, run)
            column[0].set_title(textwrap.fill(name, int(14 * panel[0])))
        for row in axes:
            found = [zip(*ax.get_legend_handles_labels()) for ax in row]
            lines = {text: line for line, text in itertools.chain(*found)}
            if lines:
                row[-1].legend(lines.values(), lines, loc="upper left",
                               bbox_to_anchor=(1.02, 1))
        for axis in (axis for ax in page.axes for axis in (ax.xaxis, ax.yaxis)):
            if axis.get_label_text() in ("epoch", "edges", "chosen operations"):
                axis.get_major_locator().set_params(integer=True)
        page.suptitle(title, fontsize=10)
        page.savefig(content, format="png")
    return content.getvalue()


# title, measure(run, options), draw(axes of one column, numbers), rows (0: one, and two for each
# --edge), numbers to print (numbers)
FIGURES = {
    "1": ("Figure 1: a cell as a graph", lambda genotype, _: genotype._asdict(), draw1, 2,
          None),
    "2": ("Figure 2: beta and discretization accuracy", measure2, draw2, 0, claim2),
    "3": ("Figure 3: variance of each node's output, middle cell", measure3, draw_panels, 1,
          claim3),
    "4": ("Figure 4: beta of none, by node", measure4, draw4, 1, claim4),
    "5": ("Figure 5: sep_conv_3x3 on the edges into the last node, middle cell", measure5,
          draw_panels, 3, claim5),
    "6": ("Figure 6: variances and covariances of operations", measure6, draw6, 0, claim6),
    "overview": ("The search", measure_overview, draw_panels, 4, None),
    "nasbench201": ("NAS-Bench-201: true accuracy of each epoch's cell", measure201, draw201, 1,
                    None)}
OWN_FLAGS = {"2": {"edge", "epoch", "tune", "images"}, "6": {"edge"}, "nasbench201": {"method"}}


def parse(arguments):
    parser = Parser("experiments.figures", description=__doc__)
    add = parser.add_argument
    add("figure", choices=FIGURES, help="which figure")
    add("runs", nargs="+", metavar="RUN", help="folders of runs; figure 1: cells")
    add("--edge", action="append", help="figures 2 and 6 (default: normal:1-3 and reduce:1-3)")
    add("--epoch", type=natural, help="figure 2: after so many epochs (default: all)")
    add("--tune", type=positive_int, help="figure 2: epochs of training, to convergence")
    add("--images", type=number(int, 2), help="figure 2: first images of the half for alpha")
    add("--method", action="append", choices=nasbench201.METHODS,
        help="nasbench201: draw this method only; may be repeated")
    add("--data", help="folder of the data sets (default: the run's)")
    add("--device", help="torch device (default: the run's)")
    add("--out", default="runs/figures", help="folder of the pictures; older ones are replaced")
    options = parser.parse_args(arguments)
    for flag in set().union(*OWN_FLAGS.values()) - OWN_FLAGS.get(options.figure, set()):
        if getattr(options, flag) is not None:
            parser.error(f"--{flag} is not for figure {options.figure}")
    options.edge = list(dict.fromkeys(options.edge or ["normal:1-3", "reduce:1-3"]))
    out = Path(options.out).absolute()
    there = next(path for path in (out, *out.parents) if path.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise SystemExit(f"{out} cannot be written")
    return options


def main(arguments):
    options = parse(arguments)
    title, measure, draw, rows, claim = FIGURES[options.figure]
    if find_spec("matplotlib") is None:
        raise SystemExit("drawing needs matplotlib: pip install matplotlib")
    panel = {"1": (9, 3), "nasbench201": (2.4, 2.6)}.get(options.figure, (3.2, 2.2))
    if options.figure == "nasbench201":
        runs = read_methods(options)
    else:
        read = read_cell if options.figure == "1" else read_search
        runs = [read(name, options) for name in options.runs]
    numbers = {name: measure(run, options) for name, run in runs}
    content = picture(title, draw, rows or 1 + 2 * len(options.edge), panel, numbers)
    name = f"figure{options.figure}" if options.figure.isdecimal() else options.figure
    path = Path(options.out) / f"{name}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    write(path, content)
    write(path.with_suffix(".json"), json.dumps(numbers, indent=1))
    print(f"{path} and {path.with_suffix('.json')}")
    if options.figure == "nasbench201":
        print_table201(numbers)
    for name, run in numbers.items() if claim else ():
        print(name)
        for text, value in claim(run).items():
            print(f"  {text}: {value:.3f}")


if __name__ == "__main__":
    start(main)
