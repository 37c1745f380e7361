"""The paper's figures, drawn from searches of your own. Sections 2.3, 3 and 4.

    python -m experiments.figures 1 VS_DARTS         a cell: published, of a file, or of a search
    python -m experiments.figures 3 RUN [RUN ...]    searches side by side; so are 2, 4, 5, 6, overview
    python -m experiments.figures 2 RUN --edge normal:1-3 --tune 2

A figure is a PNG, with its numbers beside it as JSON; of each search it prints those that a claim of the
paper rests on. Figures 2, 3, 5 and 6 look into the networks that `search.py --keep_nets` keeps: on the first
batch of the half for alpha, not augmented (figure 2: on all of it), normalized by the batch's own statistics,
as Eq. 3 has it.
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

import search
from data import Batches
from experiments.tables import method
from genotypes import SPACES, load_genotype
from larc import local_factors
from model import OPS, ReLUFirst, mixing_weights
from run import (Parser, find_device, load_checkpoint, make_seed, number, place, progress, read_json,
                 start, write)

COLORS = {name: f"C{k}" for k, name in enumerate(OPS)}


# ---------------------------------------------------------------- runs and their super-networks

def read_run(folder, options):
    """(title, run): the flags of a finished search, with its folder and its log."""
    path, log = Path(folder), Path(folder) / "log.jsonl"
    run = argparse.Namespace(**read_json(path / "config.json"), folder=folder)
    lines = log.read_text().splitlines() if log.exists() else ["{}"]
    run.log = [json.loads(line) for line in lines]
    if "alphas" not in run.log[0] or not (path / "genotype.json").exists():
        raise SystemExit(f"{folder} is not the folder of one finished search")
    run.device, run.data = options.device or run.device, options.data or run.data
    run.out = folder                                        # it may have been moved
    for edge in options.edge:
        edge_row(SPACES[run.space], edge)
    if options.figure in "2356":
        load_net(run, options.epoch or 0)                   # is it there?
    return f"{method(vars(run))}: {folder}", run


def load_net(run, epoch):
    """The super-network after so many epochs of the search; 0: untrained."""
    path = Path(run.folder) / f"net-{epoch}.pt"
    if not path.exists():
        raise SystemExit(f"{path} is missing: --keep_nets keeps a search's networks")
    state = load_checkpoint(path)
    net = search.make_supernet(run, len(state["classifier.bias"]))
    net.load_state_dict(state)
    return place(net, find_device(run.device))


def over_epochs(run, look):
    """The dict that look(net, images, labels, epoch) returns after 0, 1, ... epochs, but of lists."""
    _, half = search.read_halves(run, find_device(run.device))
    images, labels = next(Batches(half, run.batch_size, train=False).epoch(0))
    count, seen = len(run.log) + 1, []
    for epoch in progress(range(count), f"super-networks of {run.folder}", count):
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


def middle(net, kind):
    """The number of the middle cell of a kind, "normal" or "reduce"."""
    layers = [layer for layer, cell_type in enumerate(net.cell_types) if cell_type == kind]
    return layers[len(layers) // 2]


def edge_row(space, edge):
    """("normal" or "reduce", row of the alphas, primitives) of an edge such as "normal:0-2"."""
    for kind, edges in space.items():
        for row, ((i, j), primitives) in enumerate(edges.items()):
            if edge == f"{kind}:{i}-{j}":
                return kind, row, primitives
    raise SystemExit(f"--edge {edge}: there is none; the first is normal:0-2, the last reduce:4-5")


def covariance(x, y):
    """Cov(x, y) over a batch and its pixels, (B, C, H, W) both, as the mean over the channels."""
    x, y = (z.double() - z.double().mean((0, 2, 3), keepdim=True) for z in (x, y))
    return (x * y).mean().item()


# ---------------------------------------------------------------- figure 1: a cell as a graph

def read_cell(name, options):
    """(title, genotype) of a published cell, of a file, or of a search's folder."""
    file = str(Path(name) / "genotype.json") if Path(name).is_dir() else name
    try:
        return name, load_genotype(file)
    except ValueError as error:
        raise SystemExit(str(error)) from None


def draw1(column, cells):
    for ax, kind in zip(column, ("normal", "reduce")):
        draw_cell(ax, cells[kind], cells[f"{kind}_concat"])
        ax.set_title(kind, loc="left")
        ax.set_axis_off()


def draw_cell(ax, nodes, concat):
    """Nodes on a line, an arc for every edge. Arcs of one span have one height, so none hides another."""
    last, drawn, t = len(nodes) + 2, [], np.linspace(0, np.pi, 60)
    edges = [(i, j, name) for j, node in enumerate(nodes, start=2) for name, i in node]
    for i, j, name in [*edges, *((i, last, "") for i in concat)]:
        height = 0.62 * (j - i) + 0.3 * drawn.count((i, j)) if name else 0.18 * (i - j)
        drawn.append((i, j))
        color, box = COLORS.get(name, "0.75"), {"fc": "white", "ec": "none", "pad": 0.5}
        ax.plot((i + j) / 2 - (j - i) / 2 * np.cos(t), height * np.sin(t), color=color)
        ax.text((i + j) / 2, height, name, color=color, ha="center", va="center", bbox=box)
    for node, name in enumerate(["cell before\nthe last", "last\ncell", *range(2, last), "output"]):
        ax.text(node, 0, name, ha="center", va="center", bbox={"fc": "white", "boxstyle": "round"})


# ---------------------------------------------------------------- figure 2: beta and accuracy

def kendall_tau(x, y):
    """(concordant pairs - discordant pairs) / pairs; a tie is neither."""
    pairs = itertools.combinations(zip(x, y), 2)
    return float(np.mean([np.sign((a - c) * (b - d)) for (a, b), (c, d) in pairs]))


@torch.no_grad()
def answers(net, half, images):
    """Which of the half's first images are classified right, bool (images,); normalized by batch, as in
    ruocwang/darts-pt 4ec3149: running statistics would be those of another mixture."""
    net.train()
    torch.manual_seed(0)                                    # S4's noise: the same in each
    batches = Batches(half.part(0, images), 512, train=False).epoch(0)
    return torch.cat([net(batch).argmax(1) == labels for batch, labels in batches]).cpu()


def tune(net, run, w_half, epochs):
    """Trains the weights on, on their half, by the search's optimizer; its cosine goes by steps."""
    batches = Batches(w_half, run.batch_size, make_seed(run.seed, "tune"))
    flags = {**vars(run), "epochs": epochs * batches.steps}
    optimizer, _, scheduler = search.make_optimizers(net, argparse.Namespace(**flags))
    net.train()
    for images, labels in itertools.islice(batches.stream(0), epochs * batches.steps):
        search.weight_step(net, optimizer, images, labels, run.grad_clip)
        scheduler.step()


@torch.no_grad()
def alone(net, kind, row, operation):
    """Section 2.3: leaves one operation on an edge, at beta = 1; all else stays as it is."""
    net.alphas[kind][row] = float("-inf")
    net.alphas[kind][row, operation] = 0


def compare(beta, right):
    """Accuracies in percent of operations with these answers(), tau between them and beta, and its ceiling:
    tau between the accuracies on two halves of the images. No beta can follow what does not repeat."""
    right = 100 * torch.stack(right).double()               # (operations, images)
    every, even, odd = (part.mean(1).tolist() for part in (right, right[:, ::2], right[:, 1::2]))
    return {"accuracy": every, "tau": kendall_tau(beta, every), "ceiling": kendall_tau(even, odd)}


def measure2(run, options):
    """Of every edge, beta and accuracy of each operation but `none`, at once and "at convergence"."""
    net, edges = load_net(run, len(run.log) if options.epoch is None else options.epoch), {}
    w_half, alpha_half = search.read_halves(run, find_device(run.device))
    alphas = copy.deepcopy(net.alphas.state_dict())
    names = [f"{kind}:{i}-{j}" for kind in net.space for i, j in net.space[kind]]
    for edge in progress(names, f"edges of {run.folder}", len(names)):
        kind, row, primitives = edge_row(net.space, edge)
        operations = {name: o for o, name in enumerate(primitives) if name != "none"}
        beta = net.betas()[kind][row, [*operations.values()]].tolist()
        edges[edge] = {"operations": [*operations], "beta": beta}
        for when in ("at once", "tuned") if options.tune and edge in options.edge else ("at once",):
            right = []
            for operation in operations.values():
                alone(net, kind, row, operation)
                discrete = net
                if when == "tuned":
                    discrete = copy.deepcopy(net)
                    tune(discrete, run, w_half, options.tune)
                right.append(answers(discrete, alpha_half, options.images))
            edges[edge][when] = compare(beta, right)
        net.alphas.load_state_dict(alphas)
    means = {}
    for when in ("at once", "tuned"):
        found = [edge[when] for edge in edges.values() if when in edge]
        for key in ("tau", "ceiling") if found else ():
            means[f"mean {key}, {when}"] = float(np.mean([edge[key] for edge in found]))
    return {"means": means, "chosen": options.edge, "edges": edges}


def draw2(column, numbers):
    for name, above, below in zip(numbers["chosen"], column[::2], column[1::2]):
        draw_edge(above, below, name, numbers["edges"][name])
    found = transpose([edge["at once"] for edge in numbers["edges"].values()])
    names = ("tau, at once", "ceiling, at once")
    column[-1].hist([found["tau"], found["ceiling"]], np.linspace(-1, 1, 15), label=names)
    means = "\n".join(f"{key}: {value:.2f}" for key, value in numbers["means"].items())
    column[-1].set(ylabel="edges", xlabel=means)


def claim2(numbers):
    return numbers["means"]


def draw_edge(above, below, name, edge):
    """Accuracies above beta, smallest first: if beta follows them, they rise to the right."""
    order, text = np.argsort(edge["beta"]), name
    for key in list(edge)[2:]:                              # at once, tuned
        above.plot(np.take(edge[key]["accuracy"], order), "o-", label=key)
        text += f"\n{key}: tau {edge[key]['tau']:.2f}, ceiling {edge[key]['ceiling']:.2f}"
    below.bar(range(len(order)), np.take(edge["beta"], order), color="0.6")
    below.set_xticks(range(len(order)), np.take(edge["operations"], order), rotation=35, ha="right")
    below.set(ylabel="beta", xlabel=text)
    above.sharex(below)
    above.tick_params(labelbottom=False)
    above.set_ylabel("accuracy, %")


# ---------------------------------------------------------------- figures 3 and 4: nodes, beta of none

@torch.no_grad()
def node_variances(net, layer, images):
    """Section 3: the variance of each node's output in a cell, as the mean over its channels."""
    seen = enumerate(capture(net, images, net.cells[layer].normalize), start=2)
    return {f"node {j}": covariance(x_j, x_j) for j, (_, x_j) in seen}


def measure3(run, options):
    def look(net, images, labels, epoch):
        return {"variance": node_variances(net, middle(net, "normal"), images)}
    return over_epochs(run, look)


def claim3(numbers):
    last = [variances[-1] for variances in numbers["variance"].values()]
    return {"largest over smallest variance at the end": max(last) / min(last)}


def none_per_node(space, alphas):
    """Section 4.1: {"N2": beta of `none`, mean over the edges into the normal cell's node 2, ..., "R5"}."""
    into = {}
    for kind, edges in space.items():
        betas = mixing_weights(torch.tensor(alphas[kind])).tolist()
        for (_, j), primitives, beta in zip(edges, edges.values(), betas):
            into.setdefault(f"{kind[0].upper()}{j}", []).append(beta[primitives.index("none")])
    return {node: sum(values) / len(values) for node, values in into.items()}


def measure4(run, options):
    """At the end, by node; mean_by_epoch: over all edges, after 1, 2, ... epochs."""
    operations = SPACES[run.space]["normal"][0, 2]
    if "none" not in operations:
        raise SystemExit(f"{run.folder}: there is no `none` in space {run.space}")
    return {"none": none_per_node(SPACES[run.space], run.log[-1]["alphas"]), "uniform": 1 / len(operations),
            "mean_by_epoch": [record["beta_none"] for record in run.log]}


def claim4(numbers):
    return {"beta of none at the end, mean over all edges": numbers["mean_by_epoch"][-1]}


def draw4(column, numbers):
    (ax,), nodes = column, numbers["none"]
    ax.bar(nodes.keys(), nodes.values(), color=4 * ["C0"] + 4 * ["C1"])
    ax.axhline(numbers["uniform"], color="0.5", linestyle=":", label="uniform")
    ax.set(xlabel="node of the normal (N) or reduction (R) cell", ylabel="mean beta of none")


# ---------------------------------------------------------------- figure 5: gradients into the last node

def sep_conv_gradients(net, layer, images, labels, args, lr, decay):
    """Section 4.2, of the weights w of the 3x3 separable convolution on each edge into the last node:

    {edge: (|g|, |g| / |w|, |step| / |w|)}, g being the gradient. The step is lr f (g + decay w), the search's
    next one without momentum, with its clip of g; f is LARC's factor of each tensor, or 1.
    """
    loss, _ = search.loss_of(net, images, labels)
    loss.backward(inputs=net.weights)
    clip = min(1, args.grad_clip / (norm([w.grad for w in net.weights]) + 1e-6))  # as torch does
    cell, values = net.cells[layer], {}
    for edge, mixed in cell.edges.items():
        if not edge.endswith(f"-{len(cell.normalize) + 1}") or "sep_conv_3x3" not in mixed.ops:
            continue
        weights, factors = list(mixed.ops["sep_conv_3x3"].parameters()), itertools.repeat(1)
        grads = [clip * w.grad for w in weights]
        if args.larc:
            factors = local_factors(weights, grads, lr, decay, args.larc_trust, args.larc_clip)
        step = [lr * f * (g + decay * w) for f, g, w in zip(factors, grads, weights)]
        g, w = norm([w.grad for w in weights]), norm(weights)
        values[edge] = g, g / w, norm(step) / w
    return values


def norm(tensors):
    return torch.cat([tensor.flatten() for tensor in tensors]).norm().item()


def measure5(run, options):
    def look(net, images, labels, epoch):
        cosine = (1 + np.cos(np.pi * epoch / run.epochs)) / 2
        lr = run.learning_rate_min + (run.learning_rate - run.learning_rate_min) * cosine
        decay = [*run.log, run.log[-1]][epoch].get("weight_decay", run.weight_decay)  # ADA changes it
        edges = sep_conv_gradients(net, middle(net, "normal"), images, labels, run, lr, decay)
        if not edges:
            raise SystemExit(f"{run.folder}: no sep_conv_3x3 into the last node")
        kinds = dict(zip(("|g|", "|g| / |w|", "|step| / |w|"), zip(*edges.values())))
        ratios = {kind: max(line) / min(line) if min(line) else None for kind, line in kinds.items()}
        return {**{kind: dict(zip(edges, kinds[kind])) for kind in kinds}, "largest over smallest": ratios}
    return over_epochs(run, look)


def claim5(numbers):
    """The paper's claim is about "early epochs"; here from 0, the untrained network, to 5."""
    ratios = {kind: np.array(numbers["largest over smallest"][kind][:6], float)         # None: nan
              for kind in ("|g| / |w|", "|step| / |w|")}
    return {f"largest over smallest {kind}, epochs 0 to 5": float(np.exp(np.log(ratio).mean()))
            for kind, ratio in ratios.items()}


# ---------------------------------------------------------------- figure 6: variances and covariances

@torch.no_grad()
def mixed_variance(net, kind, row, images):
    """Section 4.3, of an edge in the middle cell of its kind. With w_o = beta_o, or its root:

    ratio        variance of the mixed operation over that of its input (6a)
    covariances  Cov(o_i, o_j) of every two operations but `none`; on the diagonal the variances (6b)
    squares, C   the two sums of Eq. 4: w_o^2 Cov(o, o) over o, and w_i w_j Cov(o_i, o_j) over i != j
    squares_without_none, C_without_none: the same, with the other betas scaled to a sum of 1: in Eq. 6
                 the first sum is 1, but the beta of `none` is missing in it: its variance is 0
    """
    mixed = list(net.cells[middle(net, kind)].edges.values())[row]
    bodies = [op.body if isinstance(op, ReLUFirst) else op for op in mixed.ops.values()]
    *seen, (x, output) = capture(net, images, [*bodies, mixed])
    covariances = np.array([[covariance(a, b) for _, b in seen] for _, a in seen])
    beta = dict(zip(mixed.primitives, mixing_weights(net.alphas[kind][row]).tolist()))
    beta = np.array([beta[name] for name in mixed.ops])
    values = {"variance": covariance(output, output)}
    values["ratio"] = values["variance"] / covariance(x, x)
    rows = [dict(zip(mixed.ops, row)) for row in covariances.tolist()]
    values["covariances"] = dict(zip(mixed.ops, rows))
    for suffix, b in (("", beta), ("_without_none", beta / beta.sum())):
        w = np.sqrt(b) if net.sqrt_beta else b
        values[f"squares{suffix}"] = float(w ** 2 @ covariances.diagonal())
        values[f"C{suffix}"] = float(w @ covariances @ w) - values[f"squares{suffix}"]
    return values


def measure6(run, options):
    def look(net, images, labels, epoch):
        return {edge: mixed_variance(net, *edge_row(net.space, edge)[:2], images) for edge in options.edge}
    return over_epochs(run, look)


def draw6(column, edges):
    ratios = {name: edge["ratio"] for name, edge in edges.items()}
    draw_panels(column, {"variance of output / input": ratios})
    for (name, edge), pairs, sums in zip(edges.items(), column[1::2], column[2::2]):
        draw_pairs(pairs, name, edge["covariances"])
        for key, style in (("variance", "k-"), ("squares", "b-"), ("squares_without_none", "b:"),
                           ("C", "r-"), ("C_without_none", "r:")):
            sums.plot(edge[key], style, label=key.replace("_", " "))
        sums.set(xlabel="epoch", ylabel=f"Eq. 4, {name}")


def pairs_by_weights(name, covariances):
    """[(how many of the two have no weights, their covariance by epoch)]. At stride 2 the skip has some."""
    weightless = {"max_pool_3x3", "avg_pool_3x3", "noise", "skip_connect"}
    if name.startswith(("reduce:0-", "reduce:1-")):
        weightless.remove("skip_connect")
    return [((a in weightless) + (b in weightless), covariances[a][b])
            for a, b in itertools.combinations(covariances, 2)]


def draw_pairs(ax, name, covariances):
    groups = (("0.6", "both with weights"), ("C0", "one with weights"), ("C3", "no weights"))
    for group, values in pairs_by_weights(name, covariances):
        color, text = groups[group]
        ax.plot(values, color=color, linewidth=0.8, label=text)
    ax.set(xlabel="epoch", ylabel=f"covariances, {name}")


def claim6(edges):
    """6a: "after the early stages", here the first fifth. 6b, Eq. 6: at the end."""
    values = {}
    for name, edge in edges.items():
        ratio = np.array(edge["ratio"][len(edge["ratio"]) // 5:])
        values[f"{name}: (largest - smallest ratio) / mean"] = float(np.ptp(ratio) / ratio.mean())
        values[f"{name}: C / squares"] = edge["C"][-1] / edge["squares"][-1]
        pairs = pairs_by_weights(name, edge["covariances"])
        for text, kinds in (("covariance without weights", [2]), ("other covariance", [0, 1])):
            last = [covariance[-1] for kind, covariance in pairs if kind in kinds]
            if last:
                values[f"{name}: {text}"] = float(np.mean(last))
    return values


# ---------------------------------------------------------------- overview, drawing, the command

def measure_overview(run, options):
    """Losses, accuracies, betas and chosen operations, from the log; not of epoch 0."""
    panels = {"loss": ("train_loss", "valid_loss"), "accuracy, %": ("train_acc", "valid_acc"),
              "mean beta": ("beta_none", "beta_skip")}      # None: not there
    log = transpose(run.log)
    for text, keys in panels.items():
        panels[text] = {key: [None, *log[key]] for key in keys if log[key][0] is not None}
    cells = [json.dumps(record["genotype"]) for record in run.log]
    counts = {name: [None, *(cell.count(f'"{name}"') for cell in cells)] for name in OPS}
    return {**panels, "chosen operations": {name: counts[name] for name in OPS if any(counts[name])}}


def draw_panels(column, panels):
    """{text: {label: a value after 0, 1, ... epochs}}, panel by panel; norms on a log scale."""
    for ax, (text, lines) in zip(column, panels.items()):
        for name, values in lines.items():
            ax.plot(values, ".-", color=COLORS.get(name), label=name)
        ax.set(xlabel="epoch", ylabel=text, yscale="log" if "|" in text else "linear")


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
            column[0].set_title(textwrap.fill(name, 46))
        for row in axes:
            found = [zip(*ax.get_legend_handles_labels()) for ax in row]
            lines = {text: line for line, text in itertools.chain(*found)}
            if lines:
                row[-1].legend(lines.values(), lines, loc="upper left", bbox_to_anchor=(1.02, 1))
        for axis in (axis for ax in page.axes for axis in (ax.xaxis, ax.yaxis)):
            if axis.get_label_text() in ("epoch", "edges", "chosen operations"):
                axis.get_major_locator().set_params(integer=True)
        page.suptitle(title, fontsize=10)
        page.savefig(content, format="png")
    return content.getvalue()


# title, measure(run, options), draw(axes of one column, numbers), rows (0: one, and two for each --edge),
# numbers to print (numbers)
FIGURES = {
    "1": ("Figure 1: a cell as a graph", lambda genotype, options: genotype._asdict(), draw1, 2, None),
    "2": ("Figure 2: beta and discretization accuracy", measure2, draw2, 0, claim2),
    "3": ("Figure 3: variance of each node's output, middle cell", measure3, draw_panels, 1, claim3),
    "4": ("Figure 4: beta of none, by node", measure4, draw4, 1, claim4),
    "5": ("Figure 5: sep_conv_3x3 on the edges into the last node, middle cell", measure5, draw_panels, 3,
          claim5),
    "6": ("Figure 6: variances and covariances of operations", measure6, draw6, 0, claim6),
    "overview": ("The search", measure_overview, draw_panels, 4, None)}


def parse(arguments):
    parser = Parser("experiments.figures", description=__doc__)
    add = parser.add_argument
    add("figure", choices=FIGURES, help="which figure")
    add("runs", nargs="+", metavar="RUN", help="folders of searches; figure 1: cells")
    add("--edge", action="append", help="figures 2 and 6: one or more (default: normal:1-3, reduce:1-3)")
    add("--epoch", type=number(int, 0), help="figure 2: after so many epochs (default: all)")
    add("--tune", type=number(int, 1), help="figure 2: epochs of training, for accuracies at convergence")
    add("--images", type=number(int, 2), help="figure 2: first images of the half for alpha (default: all)")
    add("--data", help="folder of the data sets (default: the run's)")
    add("--device", help="torch device (default: the run's)")
    add("--out", default="runs/figures", help="folder of the pictures; older ones are replaced")
    options = parser.parse_args(arguments)
    for flag, figures in {"edge": "26", "epoch": "2", "tune": "2", "images": "2"}.items():
        if getattr(options, flag) is not None and options.figure not in figures:
            parser.error(f"--{flag} belongs to figure {' and '.join(figures)}, not to {options.figure}")
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
    read, panel = (read_cell, (9, 3)) if options.figure == "1" else (read_run, (3.2, 2.2))
    runs = [read(name, options) for name in options.runs]
    numbers = {name: measure(run, options) for name, run in runs}
    content = picture(title, draw, rows or 1 + 2 * len(options.edge), panel, numbers)
    name = f"figure{options.figure}" if options.figure.isdecimal() else options.figure
    path = Path(options.out) / f"{name}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    write(path, content)
    write(path.with_suffix(".json"), json.dumps(numbers, indent=1))
    print(f"{path} and {path.with_suffix('.json')}")
    for run, values in numbers.items() if claim else ():
        print(run, *(f"  {text}: {value:.3f}" for text, value in claim(values).items()), sep="\n")


if __name__ == "__main__":
    start(main)
