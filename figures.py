"""The paper's figures and tables, drawn from runs of your own. Sections 2.3, 3, 4 and 5.

    python figures.py 1 VS_DARTS                    a cell as a graph: a published one, a genotype.json, or a search
    python figures.py 3 RUN [RUN ...]               searches side by side; so are 2, 4, 5, 6 and overview
    python figures.py 2 RUN --edge normal:1-3 --tune 2
    python figures.py table4 RUN [RUN ...]          Markdown, from runs of retrain.py; so are table1 and table3

A figure is a PNG with its numbers beside it as JSON. Figures 2, 3, 5 and 6 look at the super-networks that
`search.py --keep_nets` keeps: on the first batch of the half for alpha, not augmented (figure 2: on that whole half), and
always with the batch's own statistics, as Eq. 3 has them.
"""
import argparse
import json
import os
import shlex
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

import retrain
import search
from data import Batches, test_batches
from genotypes import PUBLISHED, SPACES, load as load_genotype
from larc import local_factors
from model import OPS, ReLUFirst, mixing_weights
from run import Exit, Parser, find_device, keep_settings, load_checkpoint, make_seed, means, metrics, number, precision, \
    reason, save, save_text, start

METHODS = {"second_order": "DARTS, second order", "es": "DARTS-ES", "ada": "DARTS-ADA", "r_darts": "R-DARTS(L2)",
           "perturbation": "DARTS+PT"}                      # of baselines.py, as the paper calls them
COLORS = dict(zip(["none", *OPS], ["0.6", "tab:olive", "gold", "tab:green", "tab:blue", "tab:cyan", "tab:purple", "tab:pink",
                                   "tab:red", "navy", "tab:brown", "tan", "black", "tab:orange"]))


# ---------------------------------------------------------------- runs

def with_flags(args, **flags):
    return argparse.Namespace(**{**vars(args), **flags})


class SearchRun(NamedTuple):
    """A finished search: its folder as it was typed, its flags (method: that of baselines.py, or None), its log's records."""
    folder: str
    args: argparse.Namespace
    log: list


def read_search(folder, options):
    """Raises Exit for what is no finished search. options: figures.py's own --data and --device, which win."""
    config = read_config(folder)
    if not (Path(folder) / "genotype.json").exists():
        command = shlex.join(["python", config["program"], *filter(None, [config.get("method")]), "--resume", folder])
        raise Exit(f"{folder} is an unfinished search: finish it with `{command}`")
    log = [] if config.get("method") == "r_darts" else read_log(Path(folder) / "log.jsonl")
    own = {flag: getattr(options, flag) for flag in ("data", "device") if getattr(options, flag) is not None}
    if config.get("method") == "perturbation":              # the flags are those of the search it is about
        searched = read_search(config["search"], options)
        own = {"method": "perturbation", "tune_epochs": config.get("tune_epochs"), "tuning_rate": config.get("learning_rate")}
        return SearchRun(folder, with_flags(searched.args, **own), log)
    if config.get("method"):
        return SearchRun(folder, argparse.Namespace(**{**config, **own}), log)
    args = keep_settings(search.make_parser(), Path(folder), [f"--{flag}={value}" for flag, value in own.items()])
    return SearchRun(folder, with_flags(args, method=None), log)


def read_log(path):
    try:
        return [json.loads(line) for line in path.read_text().splitlines()]
    except (OSError, ValueError) as error:
        raise Exit(f"{path} cannot be read ({reason(error)})") from None


def read_config(folder):
    """The config.json of a run of search.py or baselines.py."""
    try:
        config = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise Exit(f"{folder}/config.json cannot be read ({reason(error)})") from None
    if not isinstance(config, dict) or config.get("program") not in ("search.py", "baselines.py"):
        raise Exit(f"{folder} is not a run of search.py or baselines.py")
    return config


def read_searches(options, nets):
    """All of options.runs, of one space; nets: only those with kept super-networks."""
    runs = [read_search(folder, options) for folder in options.runs]
    for run in runs:
        if run.args.method in ("perturbation", "r_darts"):
            raise Exit(f"{run.folder} is no single search ({run.args.method}): draw those that it is made of")
        if nets and not run.args.keep_nets:
            raise Exit(f"{run.folder} kept no super-networks: search again with --keep_nets (and another --out)")
        if run.args.space != runs[0].args.space:
            raise Exit(f"{run.folder} has space {run.args.space} and {runs[0].folder} {runs[0].args.space}: one space a figure")
    return runs


def method(args):
    """What the paper calls a search with these flags; a trust coefficient is named where it is not the default."""
    switches = [name for flag, name in (("node_norm", "node norm"), ("larc", "LARC"), ("sqrt_beta", "sqrt(beta)"))
                if getattr(args, flag)]
    if len(switches) == 3 and not args.method:
        details, decay = ["VS-DARTS"], 5e-3
    else:
        base = METHODS.get(args.method) or ("DARTS" if args.weight_decay == 3e-4 else "DARTS-L2")
        details, decay = [" + ".join([base, *switches])], 5e-3 if base == "DARTS-L2" else 3e-4
    if args.weight_decay != decay:
        details.append(f"weight decay {args.weight_decay:g}")
    if args.larc and args.larc_trust != search.make_parser().get_default("larc_trust"):
        details.append(f"trust {args.larc_trust:g}")
    if args.larc and args.larc_clip:
        details.append("clip")
    return ", ".join(details)


def load_net(run, epoch):
    """The super-network after `epoch` epochs of the search; 0: untrained."""
    return load_net_file(run, f"net-{epoch}.pt")


def load_net_file(run, name):
    """The super-network in a file of the run's folder: checkpoint.pt, or one that --keep_nets kept."""
    state = load_checkpoint(Path(run.folder) / name)
    try:
        state = state.get("net", state)                     # a checkpoint.pt has more than the network
        net = search.make_net(run.args, len(state["classifier.bias"]))
        net.load_state_dict(state)
    except (AttributeError, KeyError, RuntimeError, TypeError) as error:
        raise Exit(f"{run.folder}/{name} holds no super-network of this run ({type(error).__name__})") from None
    device = find_device(run.args.device)
    return net.to(device, memory_format=precision(False, device)[1])


def read_halves(run):
    device = find_device(run.args.device)
    return search.read_halves(run.args, device, precision(False, device)[1])


def over_epochs(run, measure):
    """[measure(epoch, net, images, labels) after 0, 1, ... epochs], with the batch norms in training mode."""
    images, labels = next(test_batches(read_halves(run)[1], run.args.batch_size))
    values = []
    for epoch in range(len(run.log) + 1):
        net = load_net(run, epoch).train()
        torch.manual_seed(0)                                # for S4's noise
        values.append(measure(epoch, net, images, labels))
    return values


# ---------------------------------------------------------------- looking into a super-network

def capture(modules, forward):
    """{name: (input, output)} of the modules {name: module} in one forward(). The hooks change nothing, and are removed."""
    seen, hooks = {}, []
    for name, module in modules.items():
        def keep(module, inputs, output, name=name):
            seen[name] = inputs[0], output
        hooks.append(module.register_forward_hook(keep))
    forward()
    for hook in hooks:
        hook.remove()
    return seen


def middle(net, kind):
    """The number of the middle cell of a kind, "normal" or "reduce"."""
    layers = [layer for layer, cell_type in enumerate(net.cell_types) if cell_type == kind]
    return layers[len(layers) // 2]


def chosen_cell(net, options):
    """--cell, by default the middle normal cell."""
    if options.cell is not None and options.cell >= len(net.cells):
        raise Exit(f"--cell {options.cell}: these super-networks have cells 0 to {len(net.cells) - 1}")
    return middle(net, "normal") if options.cell is None else options.cell


def edge_row(space, edge):
    """("normal" or "reduce", row of the alphas, primitives) of an edge such as "normal:0-2"."""
    for kind, edges in space.items():
        for row, ((i, j), primitives) in enumerate(edges.items()):
            if edge == f"{kind}:{i}-{j}":
                return kind, row, primitives
    raise Exit(f"--edge {edge}: there is no such edge; one is normal:0-2, and the last reduce:4-5")


def all_edges(space):
    return [f"{kind}:{i}-{j}" for kind in space for i, j in space[kind]]


def alpha_of(net, kind):
    return net.alpha_normal if kind == "normal" else net.alpha_reduce


def covariance(x, y):
    """Cov(x, y) over a batch and its pixels, (B, C, H, W) both, as the mean over the channels."""
    x, y = (z.double() - z.double().mean((0, 2, 3), keepdim=True) for z in (x, y))
    return (x * y).mean().item()


def variance(x):
    return covariance(x, x)


# ---------------------------------------------------------------- figure 1: a cell as a graph

def figure1(options):
    """Figure 1: a cell of a genotype, or of a super-network with every edge's strongest operation.

    Its edges are (source, target, operation, beta); beta is 1 in a genotype.
    """
    if len(options.runs) != 1:
        raise Exit("figure 1 draws one cell: give one name, genotype.json or run")
    name = options.runs[0]
    if Path(name).is_dir():
        run = read_search(name, options)
        alphas, epoch = alphas_at(run, options)
        return {"title": f"{name}: {method(run.args)}, epoch {epoch}; each edge's strongest operation, wider for a larger beta",
                "cells": strongest_operations(SPACES[run.args.space], alphas)}
    if options.epoch is not None:
        raise Exit("--epoch is for a search: a genotype has none")
    try:
        return {"title": name, "cells": chosen_operations(load_genotype(name))}
    except ValueError as error:
        raise Exit(str(error)) from None


def chosen_operations(genotype):
    return {kind: {"edges": [(i, j, operation, 1.0) for j, node in enumerate(getattr(genotype, kind), start=2)
                             for operation, i in node], "concat": getattr(genotype, f"{kind}_concat")}
            for kind in ("normal", "reduce")}


def strongest_operations(space, alphas):
    cells = {}
    for kind, edges in space.items():
        cells[kind] = {"edges": [], "concat": (2, 3, 4, 5)}
        for ((i, j), primitives), beta in zip(edges.items(), mixing_weights(torch.tensor(alphas[kind])).tolist()):
            cells[kind]["edges"].append((i, j, primitives[np.argmax(beta)], max(beta)))
    return cells


def alphas_at(run, options):
    """({"normal": alphas, "reduce": alphas}, epoch) after --epoch epochs, by default all; from the log, so from 1 on."""
    epoch = len(run.log) if options.epoch is None else options.epoch
    if not 1 <= epoch <= len(run.log):
        raise Exit(f"--epoch {epoch}: {run.folder} has epochs 1 to {len(run.log)}")
    return {kind: run.log[epoch - 1][f"alpha_{kind}"] for kind in ("normal", "reduce")}, epoch


def draw1(numbers):
    """Nodes on a line, an arc for every edge; arcs of one span have one height, so none lies on another."""
    figure, axes = new_figure(2, 1, 11, 4.6)
    for ax, (kind, cell) in zip(axes[:, 0], numbers["cells"].items()):
        last = max(j for _, j, _, _ in cell["edges"]) + 1
        widest = max(beta for *_, beta in cell["edges"])
        drawn, t = [], np.linspace(0, np.pi, 60)
        for i, j, operation, beta in cell["edges"]:
            height = (j - i) * 0.62 + 0.3 * drawn.count((i, j))              # a second operation between the same nodes: above
            drawn.append((i, j))
            ax.plot((i + j) / 2 - (j - i) / 2 * np.cos(t), height * np.sin(t), color=COLORS[operation],
                    linewidth=0.6 + 3 * (beta / widest) ** 2, zorder=1)
            text = operation if widest == 1 else f"{operation}\n{beta:.3f}"
            ax.text((i + j) / 2, height, text, ha="center", va="center", fontsize=7, color=COLORS[operation],
                    bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.5}, zorder=2)
        for i in cell["concat"]:
            ax.plot((i + last) / 2 - (last - i) / 2 * np.cos(t), -0.18 * (last - i) * np.sin(t), color="0.75", linewidth=1)
        for node in range(last + 1):
            name = {0: "cell before\nthe last", 1: "last\ncell", last: "output"}.get(node, str(node))
            ax.text(node, 0, name, ha="center", va="center", fontsize=8, bbox={"boxstyle": "round", "facecolor": "white"})
        ax.set_title(f"{numbers['title']}: {'normal' if kind == 'normal' else 'reduction'} cell", fontsize=9)
        ax.set_axis_off()
    return figure


# ---------------------------------------------------------------- figure 2: beta and discretization accuracy

def kendall_tau(x, y):
    """(concordant pairs - discordant pairs) / pairs; a tie is neither."""
    first, second = np.triu_indices(len(x), k=1)
    x, y = np.asarray(x), np.asarray(y)
    return float(np.mean(np.sign(x[first] - x[second]) * np.sign(y[first] - y[second])))


@torch.no_grad()
def leave_one(net, kind, row, operation):
    """Sets beta of an edge to 1 for one operation and 0 for all others. Returns the alphas that were there."""
    alpha = alpha_of(net, kind)
    before = alpha[row].clone()
    alpha[row] = float("-inf")
    alpha[row, operation] = 0
    return before


@torch.no_grad()
def accuracy(net, half, images):
    """Accuracy in percent on the half for alpha, or its first images: not augmented, normalized by batch, as in Eq. 3.

    ruocwang/darts-pt 4ec3149 measures its accuracies so too. Running statistics would be those of another mixture.
    """
    net.train()
    torch.manual_seed(0)                                    # for S4's noise
    totals = 0
    for batch, labels in test_batches(half.part(0, images), 512):
        logits = net(batch)
        totals = totals + metrics(F.cross_entropy(logits, labels), logits, labels)
    return means(totals)[1]


def discretization_accuracies(net, kind, row, operations, measure):
    """Section 2.3: measure(net) with one operation alone on an edge, everything else as it is; of each operation."""
    accuracies = []
    for operation in operations:
        before = leave_one(net, kind, row, operation)
        accuracies.append(measure(net))
        with torch.no_grad():
            alpha_of(net, kind)[row] = before
    return accuracies


def tune(net, run, w_half, epochs):
    """Trains the weights on, on their half, by the search's optimizer; its cosine goes down by steps, as epochs are few."""
    batches = Batches(w_half, run.args.batch_size, make_seed(run.args.seed, "tune"))
    optimizer, _, scheduler = search.make_optimizers(net, with_flags(run.args, epochs=epochs * batches.steps))
    autocast, _ = precision(False, w_half.labels.device)
    net.train()
    for epoch in range(epochs):
        for images, labels in batches.epoch(epoch):
            search.weight_step(net, optimizer, images, labels, autocast, run.args.grad_clip)
            scheduler.step()


def tuned_accuracy(run, epoch, kind, row, operation, halves, options):
    """The same "at convergence": after --tune epochs of training the weights with that operation alone on its edge."""
    net = load_net(run, epoch)
    leave_one(net, kind, row, operation)
    tune(net, run, halves[0], options.tune)
    return accuracy(net, halves[1], options.images)


def figure2(options):
    """Figure 2: beta against discretization accuracy, operation by operation (without `none`, which is never chosen)."""
    runs, numbers = read_searches(options, nets=True), {}
    chosen = options.edge or ["normal:1-3", "reduce:1-3"]
    for edge in chosen:
        edge_row(SPACES[runs[0].args.space], edge)
    for run in runs:
        epoch = len(run.log) if options.epoch is None else options.epoch
        if epoch > len(run.log):
            raise Exit(f"--epoch {epoch}: {run.folder} has epochs 0 to {len(run.log)}")
        numbers[run.folder] = {"method": method(run.args), "epoch": epoch, **beta_and_accuracy(run, epoch, chosen, options)}
    return {"chosen": chosen, "runs": numbers}


def beta_and_accuracy(run, epoch, chosen, options):
    net, halves = load_net(run, epoch), read_halves(run)
    betas, edges = net.betas(), {}
    for edge in all_edges(net.space):
        kind, row, primitives = edge_row(net.space, edge)
        operations = [o for o, name in enumerate(primitives) if name != "none"]
        beta = [betas[kind][row, o].item() for o in operations]
        at_once = discretization_accuracies(net, kind, row, operations, lambda net: accuracy(net, halves[1], options.images))
        edges[edge] = {"operations": [primitives[o] for o in operations], "beta": beta, "accuracy": at_once,
                       "tau": kendall_tau(beta, at_once)}
        if options.tune and edge in chosen:
            tuned = [tuned_accuracy(run, epoch, kind, row, o, halves, options) for o in operations]
            edges[edge] |= {"tuned": tuned, "tau_tuned": kendall_tau(beta, tuned)}
    taus = [edge["tau"] for edge in edges.values()]
    mean, half_width = float(np.mean(taus)), float(1.96 * np.std(taus, ddof=1) / len(taus) ** 0.5)
    summary = f"mean tau {mean:.3f} +- {half_width:.3f} over {len(taus)} edges" + "".join(
        f"; {name} tau {edge['tau']:.2f}, tuned {edge['tau_tuned']:.2f}" for name, edge in edges.items() if "tuned" in edge)
    return {"edges": edges, "mean_tau": mean, "interval": [mean - half_width, mean + half_width], "summary": summary}


def draw2(numbers):
    chosen, runs = numbers["chosen"], numbers["runs"]
    figure, axes = new_figure(len(chosen) + 1, len(runs), 3.6, 2.6)
    shown = [run["edges"][edge] for run in runs.values() for edge in chosen]
    highest = 1.1 * max(beta for edge in shown for beta in edge["beta"])
    accuracies = [a for edge in shown for a in edge["accuracy"] + edge.get("tuned", [])]
    for column, (folder, run) in zip(axes.T, runs.items()):
        column[0].set_title(f"{run['method']}\n{folder}", fontsize=8)
        for ax, name in zip(column, chosen):
            draw_edge(ax, name, run["edges"][name], highest, (min(accuracies) - 2, max(accuracies) + 2))
        column[-1].hist([edge["tau"] for edge in run["edges"].values()], np.linspace(-1, 1, 15), color="tab:gray")
        column[-1].axvspan(*run["interval"], color="tab:red", alpha=0.3)
        column[-1].set_xlabel(f"Kendall's tau of {len(run['edges'])} edges, mean {run['mean_tau']:.2f}", fontsize=7)
        column[-1].sharey(axes[-1, 0])
    return figure


def draw_edge(ax, name, edge, highest_beta, limits):
    """Beta as bars, smallest first, and the accuracies above them: they should rise to the right."""
    order = np.argsort(edge["beta"])
    ax.bar(range(len(order)), np.take(edge["beta"], order), color="tab:gray", alpha=0.6)
    ax.set_ylim(0, highest_beta)
    ax.set_xticks(range(len(order)), np.take(edge["operations"], order), rotation=35, ha="right", fontsize=6)
    ax.set_ylabel(f"beta, {name}", fontsize=7)
    right = ax.twinx()
    for key, tau, color, text in (("accuracy", "tau", "tab:red", "at once"), ("tuned", "tau_tuned", "tab:blue", "tuned")):
        if key in edge:
            right.plot(range(len(order)), np.take(edge[key], order), "o-", color=color, markersize=3, linewidth=0.8,
                       label=f"{text}, tau {edge[tau]:.2f}")
    right.set_ylim(*limits)
    right.set_ylabel("discretization accuracy, %", fontsize=7)
    right.legend(fontsize=6, loc="lower right")


# ---------------------------------------------------------------- figure 3: variances of the nodes

@torch.no_grad()
def node_variances(net, layer, images):
    """Section 3: the variance of the output of each node, as the mean over its channels; a list, from node 2 on."""
    seen = capture(dict(enumerate(net.cells[layer].normalize, start=2)), lambda: net(images))
    return [variance(seen[j][1]) for j in sorted(seen)]


def figure3(options):
    """Figure 3: the variances of the nodes of a cell over the epochs."""
    numbers = {}
    for run in read_searches(options, nets=True):
        layer = chosen_cell(load_net(run, 0), options)
        values = over_epochs(run, lambda epoch, net, images, labels: node_variances(net, layer, images))
        first, last = (" ".join(f"{v:.2f}" for v in values[k]) for k in (0, -1))
        numbers[run.folder] = {"method": method(run.args), "cell": layer, "variances": values,
                               "summary": f"variances of the nodes of cell {layer}: {first} untrained, {last} at the end"}
    return {"runs": numbers}


def draw3(numbers):
    figure, axes = new_figure(1, len(numbers["runs"]), 3.2, 2.8, sharey=True)
    for ax, (folder, run) in zip(axes[0], numbers["runs"].items()):
        for j, line in enumerate(zip(*run["variances"]), start=2):
            ax.plot(line, label=f"node {j}")
        label(ax, run, folder, "epoch", f"variance, cell {run['cell']}")
    axes[0, 0].legend(fontsize=7)
    return figure


# ---------------------------------------------------------------- figure 4: beta of none

def none_per_node(space, alphas):
    """Section 4.1: {"normal": {node: beta of `none`, mean over the edges into it}, "reduce": ...}."""
    means = {}
    for kind, edges in space.items():
        beta = mixing_weights(torch.tensor(alphas[kind]))
        into = {}
        for (_, j), primitives, row in zip(edges, edges.values(), beta.tolist()):
            into.setdefault(j, []).append(row[primitives.index("none")])
        means[kind] = {str(j): sum(values) / len(values) for j, values in into.items()}
    return means


def figure4(options):
    """Figure 4: the mean beta of `none` over the edges into each node, at the end (or after --epoch epochs)."""
    numbers = {}
    for run in read_searches(options, nets=False):
        if "none" not in SPACES[run.args.space]["normal"][0, 2]:
            raise Exit(f"{run.folder}: space {run.args.space} has no operation `none`")
        alphas, epoch = alphas_at(run, options)
        means = none_per_node(SPACES[run.args.space], alphas)
        summary = "beta of none after epoch {}: {}".format(epoch, ", ".join(
            f"{name} " + " ".join(f"{value:.3f}" for value in means[kind].values())
            for kind, name in (("normal", "normal"), ("reduce", "reduction"))))
        numbers[run.folder] = {"method": method(run.args), "epoch": epoch, "none": means, "summary": summary,
                               "uniform": 1 / len(SPACES[run.args.space]["normal"][0, 2])}
    return {"runs": numbers}


def draw4(numbers):
    figure, axes = new_figure(1, len(numbers["runs"]), 3.2, 2.8, sharey=True)
    for ax, (folder, run) in zip(axes[0], numbers["runs"].items()):
        for kind, color in (("normal", "tab:blue"), ("reduce", "tab:orange")):
            ax.bar([f"{kind[0].upper()}{j}" for j in run["none"][kind]], run["none"][kind].values(), color=color)
        ax.axhline(run["uniform"], color="0.5", linewidth=0.8, linestyle=":")
        label(ax, run, folder, "node of the normal (N) and the reduction (R) cell", "mean beta of none")
    return figure


# ---------------------------------------------------------------- figure 5: gradients of the edges into the last node

def sep_conv_gradients(net, layer, images, labels, args, lr):
    """Section 4.2, of the 3x3 separable convolution w on each edge into the last node, with its gradient g:

    {edge: (|g|, |g| / |w|, relative step)}. The last is |lr f (g + b w)| / |w|: the search's next step without momentum,
    with its gradient clip; f is LARC's factor of each tensor, or 1.
    """
    edges, last = net.cells[layer].edges, len(net.cells[layer].normalize) + 1
    operations = {edge: list(mixed.ops["sep_conv_3x3"].parameters()) for edge, mixed in edges.items()
                  if edge.endswith(f"->{last}") and "sep_conv_3x3" in mixed.ops}
    F.cross_entropy(net(images), labels).backward(inputs=net.weights)
    values = {edge: [norm([w.grad for w in weights])] for edge, weights in operations.items()}
    torch.nn.utils.clip_grad_norm_(net.weights, args.grad_clip)
    for edge, weights in operations.items():
        w, g = norm(weights), [weight.grad for weight in weights]
        factors = [1] * len(g)
        if args.larc:
            factors = local_factors(weights, g, lr, args.weight_decay, args.larc_trust, args.larc_clip)
        step = [lr * f * (grad + args.weight_decay * weight) for f, grad, weight in zip(factors, g, weights)]
        values[edge] += [values[edge][0] / w, norm(step) / w]
    return values


@torch.no_grad()
def norm(tensors):
    return torch.cat([tensor.flatten() for tensor in tensors]).norm().item()


def next_step(run, epoch):
    """(flags, learning rate) of the search's step after so many epochs; ADA changes the weight decay on its way."""
    lowest = run.args.learning_rate_min
    lr = lowest + (run.args.learning_rate - lowest) * (1 + np.cos(np.pi * epoch / run.args.epochs)) / 2
    record = run.log[min(epoch, len(run.log) - 1)]
    decay = record.get("weight_decay", run.args.weight_decay)
    return with_flags(run.args, weight_decay=decay), float(lr)


def figure5(options):
    """Figure 5: the gradients of the edges into the last node over the epochs, and what the optimizer makes of them."""
    numbers = {}
    for run in read_searches(options, nets=True):
        layer = chosen_cell(load_net(run, 0), options)

        def measure(epoch, net, images, labels):
            return sep_conv_gradients(net, layer, images, labels, *next_step(run, epoch))
        values = over_epochs(run, measure)
        if not values[0]:
            raise Exit(f"{run.folder}: space {run.args.space} has no sep_conv_3x3 on an edge into the last node")
        kinds = {name: {edge: [epoch[edge][k] for epoch in values] for edge in values[0]}
                 for k, name in enumerate(("gradient", "gradient_over_weight", "relative_step"))}
        spread = {name: [max(epoch) / min(epoch) if min(epoch) else None for epoch in zip(*lines.values())]
                  for name, lines in kinds.items()}
        summary = "largest over smallest edge, untrained, middle, end: " + "; ".join(
            f"{name.replace('_', ' ')} " + " ".join("-" if ratios[k] is None else f"{ratios[k]:.1f}"
                                                    for k in (0, len(ratios) // 2, -1))
            for name, ratios in spread.items())
        numbers[run.folder] = {"method": method(run.args), "cell": layer, **kinds, "largest_over_smallest": spread,
                               "summary": summary}
    return {"runs": numbers}


def draw5(numbers):
    rows = (("gradient", "|g|"), ("gradient_over_weight", "|g| / |w|"), ("relative_step", "relative step"))
    figure, axes = new_figure(3, len(numbers["runs"]), 3.2, 2.4, sharey="row")
    for column, (folder, run) in zip(axes.T, numbers["runs"].items()):
        for ax, (name, text) in zip(column, rows):
            for edge, line in run[name].items():
                ax.plot(line, label=edge)
            ax.set_yscale("log")
            label(ax, run, folder if name == "gradient" else None, "epoch", f"{text}, cell {run['cell']}")
    axes[0, 0].legend(fontsize=6, title="sep_conv_3x3", title_fontsize=6)
    return figure


# ---------------------------------------------------------------- figure 6: variance ratio and covariances

@torch.no_grad()
def mixed_variance(net, kind, row, images):
    """Section 4.3, of an edge in the middle cell of its kind. With w_o = beta_o, or its root, over the operations o:

    ratio        variance of the mixed operation over that of its input (Figure 6a)
    covariances  Cov(o_i, o_j) of every pair of operations but `none`; on the diagonal the variances (Figure 6b)
    squares, C   the two sums of Eq. 4: over o of w_o^2 Cov(o, o), and over i != j of w_i w_j Cov(o_i, o_j), C of Eq. 5
    squares_without_none, C_without_none: the same, the betas of the other operations scaled to a sum of 1. The first sum
                 is the 1 of Eq. 6 only so: the variance of `none` is 0, and its beta is missing
    """
    mixed = list(net.cells[middle(net, kind)].edges.values())[row]
    modules = {name: op.body if isinstance(op, ReLUFirst) else op for name, op in mixed.ops.items()}
    seen = capture({**modules, "mixed": mixed}, lambda: net(images))
    x, output = seen.pop("mixed")
    outputs = [seen[name][1] for name in mixed.ops]
    covariances = np.array([[covariance(a, b) for b in outputs] for a in outputs])
    beta = dict(zip(mixed.primitives, mixing_weights(alpha_of(net, kind)[row]).tolist()))
    beta.pop("none", None)
    values = {"ratio": variance(output) / variance(x), "variance": variance(output), "covariances": covariances.tolist()}
    for suffix, scale in (("", 1), ("_without_none", 1 / sum(beta.values()))):
        w = np.array([scale * b for b in beta.values()]) ** (0.5 if net.sqrt_beta else 1)
        values[f"squares{suffix}"] = float(w ** 2 @ covariances.diagonal())
        values[f"C{suffix}"] = float(w @ covariances @ w - w ** 2 @ covariances.diagonal())
    return values


def figure6(options):
    """Figure 6: the ratio of variances, and the covariances, of two edges, by default of stride 1 and of stride 2."""
    numbers, chosen = {}, options.edge or ["normal:1-3", "reduce:1-3"]
    for run in read_searches(options, nets=True):
        rows, edges = {edge: edge_row(SPACES[run.args.space], edge) for edge in chosen}, {}

        def measure(epoch, net, images, labels):
            return {edge: mixed_variance(net, kind, row, images) for edge, (kind, row, _) in rows.items()}
        epochs = over_epochs(run, measure)
        for edge, (_, _, primitives) in rows.items():
            values = [epoch[edge] for epoch in epochs]
            stride = 2 if edge.startswith(("reduce:0-", "reduce:1-")) else 1
            edges[edge] = {"operations": [name for name in primitives if name != "none"], "stride": stride,
                           **{key: [value[key] for value in values] for key in values[0]}}
        summary = "; ".join(f"{edge} " + ", ".join(f"{text} {values[key][0]:.2f} untrained, {values[key][-1]:.2f} at the end"
                                                   for key, text in (("ratio", "ratio"), ("C", "C")))
                            for edge, values in edges.items())
        numbers[run.folder] = {"method": method(run.args), "edges": edges, "summary": summary}
    return {"chosen": chosen, "runs": numbers}


def draw6(numbers):
    chosen, runs = numbers["chosen"], numbers["runs"]
    figure, axes = new_figure(1 + 2 * len(chosen), len(runs), 3.4, 2.3, sharey="row")
    for column, (folder, run) in zip(axes.T, runs.items()):
        for edge in chosen:
            column[0].plot(run["edges"][edge]["ratio"], label=edge)
        column[0].legend(fontsize=6)
        label(column[0], run, folder, "epoch", "variance of output / input")
        for edge, pairs, sums in zip(chosen, column[1::2], column[2::2]):
            draw_pairs(pairs, run["edges"][edge])
            label(pairs, run, None, "epoch", f"covariances, {edge}")
            for key, style, text in (("variance", "k-", "variance of the mixed operation"), ("squares", "b-", "first sum"),
                                     ("C", "r-", "C"), ("squares_without_none", "b:", "first sum, none left out"),
                                     ("C_without_none", "r:", "C, none left out")):
                sums.plot(run["edges"][edge][key], style, label=text)
            label(sums, run, None, "epoch", f"Eq. 4, {edge}")
    for row in (1, 2):
        axes[row, 0].legend(fontsize=6)
    return figure


def draw_pairs(ax, edge):
    """Every pair's covariance over the epochs, by how many of its two operations have weights (at stride 2 the skip has)."""
    weightless = {"max_pool_3x3", "avg_pool_3x3", "noise"} | (set() if edge["stride"] == 2 else {"skip_connect"})
    names, lines, labelled = edge["operations"], np.array(edge["covariances"]), set()
    for a in range(len(names)):
        for b in range(a):
            group = 2 - len({names[a], names[b]} & weightless)
            text = ("no weights", "one of them with weights", "both with weights")[group]
            ax.plot(lines[:, a, b], color=("tab:red", "tab:blue", "0.6")[group], linewidth=0.8,
                    label=None if group in labelled else text)
            labelled.add(group)


# ---------------------------------------------------------------- overview

def overview(options):
    """Losses, accuracies, betas and chosen operations over the epochs, from the logs."""
    numbers = {}
    for run in read_searches(options, nets=False):
        chosen = [[name for kind in ("normal", "reduce") for node in record["genotype"][kind] for name, _ in node]
                  for record in run.log]
        names = [name for name in COLORS if any(name in cell for cell in chosen)]
        keys = ("train_loss", "valid_loss", "train_acc", "valid_acc", "beta_none", "beta_skip")
        counts = {name: [cell.count(name) for cell in chosen] for name in names}
        numbers[run.folder] = {"method": method(run.args), **{key: [record[key] for record in run.log] for key in keys},
                               "chosen": counts, "summary": "chosen at the end: " + ", ".join(
                                   f"{values[-1]} {name}" for name, values in counts.items() if values[-1])}
    return {"runs": numbers}


def draw_overview(numbers):
    figure, axes = new_figure(4, len(numbers["runs"]), 3.2, 2.2, sharey="row")
    rows = ((("train_loss", "valid_loss"), "loss"), (("train_acc", "valid_acc"), "accuracy, %"),
            (("beta_none", "beta_skip"), "mean beta"))
    for column, (folder, run) in zip(axes.T, numbers["runs"].items()):
        for ax, (keys, text) in zip(column, rows):
            for key in keys:
                if run[key][0] is not None:
                    ax.plot(range(1, len(run[key]) + 1), run[key], label=key.replace("_", " "))
            if ax.lines:                                    # S1, S2 and S4 have no `none`, S4 no skip either
                ax.legend(fontsize=6)
            label(ax, run, folder if text == "loss" else None, "epoch", text)
        for name, values in run["chosen"].items():
            column[3].plot(range(1, len(values) + 1), values, color=COLORS[name], label=name)
        column[3].legend(fontsize=5)
        label(column[3], run, None, "epoch", "chosen operations")
    return figure


# ---------------------------------------------------------------- drawing

def new_figure(rows, columns, width, height, **options):
    """A figure of rows x columns panels, each width x height inches, and its axes, an array."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise Exit("drawing needs matplotlib: pip install matplotlib") from None
    figure = Figure((width * columns, height * rows), layout="constrained", dpi=110)
    return figure, figure.subplots(rows, columns, squeeze=False, **options)


def label(ax, run, folder, x, y):
    if folder is not None:
        ax.set_title(f"{run['method']}\n{folder}", fontsize=8)
    ax.set_xlabel(x, fontsize=7)
    ax.set_ylabel(y, fontsize=7)
    ax.tick_params(labelsize=6)


# ---------------------------------------------------------------- tables

class Retrained(NamedTuple):
    """A finished run of retrain.py, and the search that its cell is from, or None."""
    args: argparse.Namespace
    result: dict
    search: SearchRun


def read_retrained(options):
    """The finished runs of retrain.py among options.runs. Runs of search.py are passed over; unfinished ones are named."""
    runs = []
    for folder in map(Path, options.runs):
        try:
            program = json.loads((folder / "config.json").read_text()).get("program")
        except (OSError, ValueError, AttributeError):
            raise Exit(f"{folder} is no run of retrain.py: it has no config.json that can be read") from None
        if program != "retrain.py":
            continue
        args = keep_settings(retrain.make_parser(), folder, [])
        if not (folder / "result.json").exists():
            print(f"figures.py: {folder} is left out: it is not finished", file=sys.stderr)
            continue
        searched = read_search(str(Path(args.genotype).parent), options) if is_of_search(args.genotype) else None
        runs.append(Retrained(args, json.loads((folder / "result.json").read_text()), searched))
    if not runs:
        raise Exit("there is no finished run of retrain.py among these folders: a table needs one")
    return runs


def is_of_search(genotype):
    """Whether a file is the result of a search: whether it has a search's config.json beside it."""
    config = Path(genotype).with_name("config.json")
    return Path(genotype).name == "genotype.json" and config.exists() and '"program": "retrain.py"' not in config.read_text()


def same_protocol(runs):
    """Raises Exit unless all runs were retrained under one protocol, and all searches had the same one, but for what the
    table compares: seeds, methods, switches, weight decays."""
    own = {"genotype", "seed", "data", "device", "out", "resume", "evaluate", "workers"}
    same_flags([(run.args.out, run.args) for run in runs], set(vars(retrain.parse(["--genotype", ""]))) - own)
    same_flags([(run.search.folder, run.search.args) for run in runs if run.search],
               {"space", "dataset", "image_size", "limit", "batch_size", "epochs", "init_channels", "layers", "stem_multiplier",
                "train_portion", "learning_rate", "arch_learning_rate", "arch_weight_decay"})
    for group in by_row([run for run in runs if run.search], name=lambda run: run.search.args.method).values():
        same_flags([(run.search.folder, run.search.args) for run in group], {
            "window", "ratio", "first", "max_decay", "train_epochs", "train_layers", "train_channels", "tune_epochs", "tuning_rate"})


def same_flags(runs, flags):
    for folder, args in runs:
        for flag in sorted(flags):
            value, first = getattr(args, flag, None), getattr(runs[0][1], flag, None)
            if value != first:
                raise Exit(f"{folder} has --{flag} {value} and {runs[0][0]} {first}: one protocol a table")


def row_name(run):
    """The method of a searched cell, the name of a published one, or a file's name without the number at its end."""
    if run.search or run.args.genotype in PUBLISHED:
        return method(run.search.args) if run.search else run.args.genotype
    path = Path(run.args.genotype)
    return (path.parent.name if path.name == "genotype.json" else path.stem).rstrip("0123456789-_")


def by_row(runs, name=row_name):
    rows = {}
    for run in runs:
        rows.setdefault(name(run), []).append(run)
    return rows


def error(runs):
    """Test error of the last epoch: mean +- standard deviation (every run)."""
    errors = [run.result["test_error"] for run in runs]
    if not errors:
        return "-"
    deviation = f" ± {np.std(errors, ddof=1):.2f}" if len(errors) > 1 else ""
    return f"{np.mean(errors):.2f}{deviation} ({' '.join(f'{e:.2f}' for e in errors)})"


def parameters(runs):
    return f"{np.mean([run.result['parameters'] for run in runs]) / 1e6:.3f}" if runs else "-"


def cost(runs):
    """Search hours, the mean over the searches, and the device."""
    searches = [every_record(folder) for folder in sorted({run.search.folder for run in runs if run.search})]
    if not searches:
        return "-"
    hours = np.mean([sum(record["seconds"] for record in records) / 3600 for records in searches])
    return f"{hours:.2f} h, " + ", ".join(sorted({record["device"] for records in searches for record in records
                                              if "device" in record}))


def every_record(folder):
    """All records of a search, for its cost: of what it undid too, of all parts, and of the search that it goes on from."""
    config, records = read_config(folder), []
    for path in sorted(Path(folder).glob("**/log.jsonl" if config.get("method") == "r_darts" else "log*.jsonl")):
        records += read_log(path)
    return records + (every_record(config["search"]) if config.get("method") == "perturbation" else [])


def markdown(header, rows):
    return "\n".join("| " + " | ".join(map(str, row)) + " |" for row in [header, ["---"] * len(header), *rows])


TABLE1 = (  # the paper's rows: name, parameters (M), error (%), cost (GPU days); then ours: methods and published cells
    ("NASNet-A", "3.3", "2.65", "2000", ["NASNet_A"]), ("ENAS", "4.6", "2.89", "0.5", ["ENAS"]),
    ("AmoebaNet-B", "2.8", "2.55", "3150", ["AmoebaNet_B"]),
    ("DARTS, first order", "3.3", "3.00", "1.5", ["DARTS"]),
    ("DARTS, second order", "3.3", "2.76", "4.0", ["DARTS, second order"]),
    ("SNAS", "2.8", "2.85 ± 0.30", "1.5", ["SNAS_moderate"]),
    ("GDAS", "3.4", "2.93", "0.2", ["GDAS"]), ("P-DARTS", "3.4", "2.50", "0.2", ["P_DARTS"]),
    ("PC-DARTS", "3.6", "2.57", "0.1", ["PC_DARTS"]), ("R-DARTS", "-", "2.95 ± 0.21", "1.6", ["R-DARTS(L2)"]),
    ("FairDARTS", "3.3 ± 0.5", "2.54 ± 0.05", "0.4", ["FairDARTS_B"]), ("DARTS-", "-", "2.59 ± 0.08", "0.4", []),
    ("PR-DARTS", "3.4", "2.32", "0.17", ["PR_DARTS"]),
    ("DARTS+PT", "3.0", "2.61 ± 0.08", "0.8", ["DARTS+PT"]),
    ("VS-DARTS (avg)", "3.4 ± 0.3", "2.50 ± 0.05", "0.4", ["VS-DARTS"]))
TABLE3_METHODS = ("DARTS", "R-DARTS(L2)", "DARTS-ES", "DARTS-ADA", "PR-DARTS", "DARTS+PT", "VS-DARTS")
TABLE3 = {  # the paper's errors of these methods, by data set and space
    ("cifar10", "s1"): (3.84, 2.78, 3.01, 3.10, 3.26, 3.50, 2.58),
    ("cifar10", "s2"): (4.85, 3.31, 3.26, 3.35, 3.63, 2.79, 2.57),
    ("cifar10", "s3"): (3.34, 2.51, 2.74, 2.59, 3.99, 2.49, 2.52),
    ("cifar10", "s4"): (7.20, 3.56, 3.71, 4.84, 2.59, 2.64, 2.49),
    ("cifar100", "s1"): (29.46, 24.25, 28.37, 24.03, 32.74, 24.48, 23.87),
    ("cifar100", "s2"): (26.05, 22.24, 23.25, 23.52, 32.52, 23.16, 21.49),
    ("cifar100", "s3"): (28.90, 23.99, 23.73, 23.37, 26.96, 22.03, 22.03),
    ("cifar100", "s4"): (28.85, 21.94, 21.26, 23.20, 20.80, 20.80, 20.69),
    ("svhn", "s1"): (4.58, 4.79, 2.72, 2.53, 3.33, 2.62, 2.37),
    ("svhn", "s2"): (3.53, 2.51, 2.60, 2.54, 4.48, 2.53, 2.37),
    ("svhn", "s3"): (3.41, 2.48, 2.50, 2.50, 2.75, 2.42, 2.37),
    ("svhn", "s4"): (3.05, 2.50, 2.51, 2.46, 2.95, 2.42, 2.32)}
TABLE4 = {"DARTS-L2": 97.09, "DARTS-L2 + node norm": 97.29, "DARTS-L2 + node norm + LARC": 97.40, "VS-DARTS": 97.57}


def table1(options):
    """Table 1, on the data set of the runs. A row is of cells that we searched; where there is no search here, of the
    published cell; other published cells come below."""
    runs = read_retrained(options)
    same_protocol(runs)
    rows, lines = by_row(runs), []
    for name, *published, ours in TABLE1:
        found = [run for key in ours for run in rows.pop(key, [])]
        lines.append([name, *published, error(found), parameters(found), cost(found)])
    best = sorted(found, key=lambda run: run.result["test_error"])[:1]           # of the last row: VS-DARTS
    lines.append(["VS-DARTS (best)", "3.38", "2.43", "0.4", error(best), parameters(best), cost(best)])
    lines += [[name, "-", "-", "-", error(found), parameters(found), cost(found)] for name, found in rows.items()]
    return markdown(["method", "published: params (M)", "error (%)", "cost (GPU days)",
                     "here: error (%), last epoch", "params (M)", "search"], lines)


def table3(options):
    """Table 3: data sets and spaces. Runs on other data sets or spaces than the paper's come below."""
    runs = [run for run in read_retrained(options) if run.search]
    if not runs:
        raise Exit("there is no retrained cell of a search among these folders: table3 needs one")
    for group in by_row(runs, name=lambda run: (run.args.dataset, run.search.args.space)).values():
        same_protocol(group)
    rows, lines = by_row(runs, name=lambda run: (run.args.dataset, run.search.args.space, row_name(run))), []
    for (dataset, space), published in TABLE3.items():
        for name, err in zip(TABLE3_METHODS, published):
            lines.append([dataset, space, name, f"{err:.2f}", rows.pop((dataset, space, name), [])])
    lines += [[*key, "-", found] for key, found in rows.items()]
    return markdown(["data set", "space", "method", "published: error (%)", "here: error (%), last epoch", "params (M)",
                     "search"], [[*key, error(found), parameters(found), cost(found)] for *key, found in lines])


def table4(options):
    """Table 4: the ablation, as errors. Other settings, and cells of no search, come below."""
    runs = read_retrained(options)
    same_protocol(runs)
    rows = by_row(runs)
    lines = [[name, f"{100 - TABLE4[name]:.2f}", rows.pop(name, [])] for name in TABLE4]
    lines += [[name, "-", found] for name, found in rows.items()]
    return markdown(["method", "published: error (%)", "here: error (%), last epoch", "params (M)", "search"],
                    [[name, published, error(found), parameters(found), cost(found)] for name, published, found in lines])


# ---------------------------------------------------------------- the command

FIGURES = {  # what measures, what draws, and the title
    "1": (figure1, draw1, "Figure 1: a cell as a graph"),
    "2": (figure2, draw2, "Figure 2: beta and discretization accuracy"),
    "3": (figure3, draw3, "Figure 3: variance of each node's output during the search"),
    "4": (figure4, draw4, "Figure 4: beta of none on the edges into each node"),
    "5": (figure5, draw5, "Figure 5: gradients of the 3x3 separable convolution on the edges into the last node"),
    "6": (figure6, draw6, "Figure 6: variance of the mixed operation over its input's, and covariances of operations"),
    "overview": (overview, draw_overview, "Overview")}
TABLES = {"table1": table1, "table3": table3, "table4": table4}


def make_parser():
    parser = Parser("figures.py", description=__doc__)
    add = parser.add_argument
    add("figure", choices=[*FIGURES, *TABLES], metavar="FIGURE", help=", ".join([*FIGURES, *TABLES]))
    add("runs", nargs="+", metavar="RUN", help="run folders; for figure 1 also a published cell or a genotype.json")
    add("--cell", type=number(int, 0), help="figures 3 and 5: number of the cell (default: the middle normal cell)")
    add("--edge", action="append", help="figures 2 and 6: an edge such as normal:1-3, from node 1 to node 3; may be repeated "
        "(default: normal:1-3 and reduce:1-3)")
    add("--epoch", type=number(int, 0), help="figures 1, 2 and 4: after so many epochs (default: all)")
    add("--tune", type=number(int, 1), metavar="N", help="figure 2: also after N epochs of training the weights, on --edge")
    add("--images", type=number(int, 1), help="figure 2: the first IMAGES of the half for alpha only (default: all)")
    add("--data", help="folder of the data sets (default: the run's)")
    add("--device", help="torch device (default: the run's)")
    add("--out", default="figures", help="folder of the pictures, where they replace those of the same figure (default "
        "%(default)s)")
    return parser


def main(arguments):
    options = make_parser().parse_args(arguments)
    for flag, figures in {"cell": "35", "edge": "26", "epoch": "124", "tune": "2", "images": "2"}.items():
        if getattr(options, flag) is not None and options.figure not in figures:
            raise Exit(f"--{flag} does not belong to {options.figure}, only to figures {', '.join(figures)}")
    if options.figure in TABLES:
        print(TABLES[options.figure](options))
        return
    parent = next(path for path in [Path(options.out), *Path(options.out).absolute().parents] if path.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise Exit(f"cannot write to {options.out}: choose another --out")
    new_figure(1, 1, 1, 1)                                  # before anything is computed: is there a matplotlib?
    measure, draw, title = FIGURES[options.figure]
    numbers = measure(options)
    name = options.figure if options.figure == "overview" else f"figure{options.figure}"
    figure = draw(numbers)
    figure.suptitle(title, fontsize=10, wrap=True)
    picture = Path(options.out) / f"{name}.png"
    save(picture, lambda file: figure.savefig(file, format="png"))
    save_text(picture.with_suffix(".json"), json.dumps(numbers, indent=1))
    for folder, run in numbers.get("runs", {}).items():
        print(f"{folder} ({run['method']}): {run['summary']}")
    print(picture)


if __name__ == "__main__":
    start("figures.py", main)
