"""What the paper compares VS-DARTS with (Tables 1 and 3): each method's own loop over search.py.

    python -m experiments.baselines second_order [search.py's flags]    DARTS of second order
    python -m experiments.baselines es [search.py's flags]              DARTS-ES: stops early
    python -m experiments.baselines ada [search.py's flags]             DARTS-ADA: more weight decay
    python -m experiments.baselines r_darts [search.py's flags]         R-DARTS(L2): four of them
    python -m experiments.baselines perturbation RUN                    DARTS+PT, on a finished one

Each has its own --help. Sources: quark0/darts f276dd3, cnn/architect.py; automl/RobustDARTS 3dec3fe
and its paper (Zela et al., ICLR 2020), whose scripts take the second order where es, ada and
r_darts take the first; ruocwang/darts-pt 4ec3149, sota/cnn/projection.py (Wang et al., ICLR 2021).
"""
import argparse
import functools
import inspect
import json
import random
import shutil
import time
from pathlib import Path
from statistics import fmean

import torch
import torch.nn.functional as F
from torch.func import functional_call

import retrain
import search
from data import make_batches, make_seed
from genotypes import SPACES, Genotype, load_genotype
from larc import LARC, local_factors
from model import means, metrics
from run import (WORLD, Parser, Run, check_facts, device_name, find_device, load_checkpoint,
                 natural, non_negative, number, parse_flags, positive, positive_int, read_json,
                 say, start, write)


# ---------------------------------------------------------------- second order (Eq. 2)

def second_order(args, run):
    """DARTS of second order: alpha's gradient goes through a step of the weights.

    With --larc the step is LARC's.
    """
    parts = begin(args, run)
    for epoch in range(run.epoch, args.epochs):
        record = search.train_epoch(parts, epoch, second_order_step)
        search.end_epoch(parts, run, record)
    finish(run, search.derive(parts.net.space, parts.net.betas()))


def second_order_step(parts, alpha_batch, w_batch):
    """Moves the alphas only: not weights, running statistics or the weights' optimizer."""
    gradient = second_order_gradient(parts.net, parts.w_optimizer, alpha_batch, w_batch)
    for alpha, grad in zip(parts.net.alphas.values(), gradient):
        alpha.grad = grad
    parts.alpha_optimizer.step()


def second_order_gradient(net, w_optimizer, alpha_batch, w_batch, epsilon=0.01):
    """The gradient of L_val(w', alpha) in the alphas, where w' is w after an optimizer's step:

        w' = w - xi (m + f (g + b w))

    xi: learning rate; m: momentum times its buffer; g: gradient of L_train; b: weight decay;
    f: 1, or LARC's factor of each tensor, taken as a constant. With v the gradient of L_val in the
    weights at w', and w+- = w +- epsilon f v / |f v|, it is, by finite differences,

        grad_alpha L_val(w')
            - xi |f v| (grad_alpha L_train(w+) - grad_alpha L_train(w-)) / 2 epsilon
    """
    weights, alphas = net.weights, list(net.alphas.values())
    xi, seed = w_optimizer.param_groups[0]["lr"], torch.randint(2**62, ()).item()

    def loss(weights, batch, noise):
        torch.manual_seed(noise)                            # S4's noise: one over w_batch
        return loss_at(net, weights, *batch)

    def alpha_gradient(sign):
        shifted = [w.detach() + sign * epsilon / length * d for w, d in zip(weights, fv)]
        return torch.autograd.grad(loss(shifted, w_batch, seed), alphas)

    g = torch.autograd.grad(loss(weights, w_batch, seed), weights)
    moved, factors = virtual_step(w_optimizer, weights, g)
    gradients = torch.autograd.grad(loss(moved, alpha_batch, seed + 1), [*moved, *alphas])
    fv = [f * v for f, v in zip(factors, gradients)]
    direct = gradients[len(moved):]
    length = torch.stack(torch._foreach_norm(fv)).norm()
    plus, minus = alpha_gradient(+1), alpha_gradient(-1)
    return [d - xi * length * (p - m) / (2 * epsilon) for d, p, m in zip(direct, plus, minus)]


def loss_at(net, weights, images, labels):
    """The loss at other weights, in the order of net.weights. Leaves running statistics alone."""
    names = [name for name, _ in net.named_parameters() if not name.startswith("alphas.")]
    buffers = {name: buffer.clone() for name, buffer in net.named_buffers()}
    logits = functional_call(net, dict(zip(names, weights)) | buffers, (images,))
    return F.cross_entropy(logits, labels)


@torch.no_grad()
def virtual_step(w_optimizer, weights, grads):
    """(w', f): a list of tensors each. The optimizer does not notice."""
    group, factors, moved = w_optimizer.param_groups[0], [1.0] * len(grads), []
    if isinstance(w_optimizer, LARC):
        factors = local_factors(weights, list(grads), group["lr"], group["weight_decay"],
                                group["trust_coefficient"], group["clip"])
    for w, g, f in zip(weights, grads, factors):
        buffer = w_optimizer.state.get(w, {}).get("momentum_buffer", 0)     # none at first
        step = group["momentum"] * buffer + f * (g + group["weight_decay"] * w)
        moved.append((w - group["lr"] * step).requires_grad_())
    return moved, factors


# ---------------------------------------------------------------- early stopping

def es(args, run):
    """DARTS-ES: stops once the largest eigenvalue of alpha's Hessian has grown.

    It then keeps the cell of an earlier epoch.
    """
    parts = begin(args, run)
    while run.epoch < args.epochs and not alarm(run):
        record = search.train_epoch(parts, run.epoch)
        look_at_hessian(parts, record)
        search.end_epoch(parts, run, record)
    kept = alarm(run) or run.epoch
    said = "no alarm" if kept == run.epoch else "alarm"
    say(f"{said} after {run.epoch} epochs: the cell is that after {kept}")
    finish(run, Genotype(**run.log[kept - 1]["genotype"]))


def look_at_hessian(parts, record, steps=15):
    """Logs the largest eigenvalue of the loss's Hessian H in all alphas, on a batch of their half.

    Lanczos: that of H in the span of v, Hv, HHv, ... The search goes on as if nobody had looked.
    """
    def flat_gradient(of, **options):
        grads = torch.autograd.grad(of, list(parts.net.alphas.values()), **options)
        return torch.cat([grad.flatten() for grad in grads])

    started, batch = time.monotonic(), next(parts.validation.epoch(record["epoch"]))
    with torch.random.fork_rng(range(torch.cuda.device_count())):   # S4 draws noise
        loss = loss_at(parts.net, parts.net.weights, *batch)
    gradient = flat_gradient(loss, create_graph=True)
    v = torch.randn(len(gradient), generator=torch.Generator().manual_seed(0)).to(gradient)
    basis, products = [], []
    for _ in range(min(steps, len(v))):                     # 15 give four digits in S1 to S4
        for u in 2 * basis:                                 # twice, for rounding
            v = v - (u @ v) * u
        basis.append(v / v.norm())
        v = flat_gradient(gradient @ basis[-1], retain_graph=True)
        products.append(v)
    H = torch.stack(basis) @ torch.stack(products).T
    finite = H.isfinite().all()
    largest = torch.linalg.eigvalsh((H + H.T) / 2)[-1].item() if finite else float("nan")
    record |= {"eigenvalue": largest, "seconds": record["seconds"] + time.monotonic() - started}


def alarm(run):
    """The number of epochs to go back to, or None.

    An alarm: the eigenvalue's moving average of --window epochs ago is less than --ratio of
    today's (Zela et al.).
    """
    def average(epochs):
        return fmean(record["eigenvalue"] for record in run.log[max(0, epochs - window):epochs])

    today, window = len(run.log), run.args.window
    if today < max(run.args.first, window + 1):
        return None
    return today - window if average(today - window) < run.args.ratio * average(today) else None


# ---------------------------------------------------------------- adaptive regularization

def ada(args, run):
    """DARTS-ADA: where ES would stop, the search goes back as far, with ten times the weight decay.

    It keeps every checkpoint until the end, as alarms may go back to ever earlier ones.
    """
    parts = begin(args, run)
    while True:
        if run.epoch > 0:
            shutil.copy(run.checkpoint, run.folder / f"checkpoint-{run.epoch}.pt")
        decay = parts.w_optimizer.param_groups[0]["weight_decay"]
        back = decay < args.max_decay and alarm(run)
        if back:
            go_back(run, back, decay)
            continue
        if run.epoch == args.epochs:
            break
        record = search.train_epoch(parts, run.epoch)
        look_at_hessian(parts, record)
        search.end_epoch(parts, run, {**record, "weight_decay": decay})
    finish(run, search.derive(parts.net.space, parts.net.betas()))
    for path in run.folder.glob("checkpoint-*.pt"):
        path.unlink()


def go_back(run, epochs, decay):
    """Loads an earlier checkpoint, with more weight decay. Undone epochs get a log of their own."""
    decay = min(float(f"{10 * decay:g}"), run.args.max_decay)       # 0.03, not 0.02999...
    say(f"alarm after {run.epoch} epochs: back to {epochs}, with weight decay {decay:g}")
    undone = "\n".join(map(json.dumps, run.log[epochs:]))
    write(run.folder / f"log-before-{decay:g}.jsonl", undone)
    state = load_checkpoint(run.folder / f"checkpoint-{epochs}.pt")
    state["w_optimizer"]["param_groups"][0]["weight_decay"] = decay
    write(run.checkpoint, state)                            # a killed run now resumes there
    run.load()


# ---------------------------------------------------------------- R-DARTS(L2)

def r_darts(args, run):
    """R-DARTS(L2): four searches, with weight decay 3, 9, 27 and 81e-4.

    Each cell is trained briefly on the half for w; the best on the half for alpha is kept.
    """
    device, errors = find_device(args.device), {}
    halves = search.read_halves(args, device)
    run.begin({}, {"train_split": halves[0].name})
    for decay in (3e-4, 9e-4, 27e-4, 81e-4):                # the first of RobustDARTS's grid
        folder = run.folder / f"weight_decay-{decay:g}"
        if (folder / "genotype.json").exists():
            check_facts(folder, read_json(folder / "search.json"), run.facts)
        else:
            flags = part(folder, args, program="search.py", method=None, weight_decay=decay)
            search.search(flags, Run(flags, "genotype.json"))
        errors[folder] = train_briefly(args, folder, *halves)
        say(f"weight decay {decay:g}: validation error {errors[folder]:.2f}%")
    run.log.append({"device": device_name(device)})
    best = min(errors, key=errors.get)                      # ties: the smaller decay
    finish(run, load_genotype(best / "genotype.json"))


def train_briefly(args, folder, w_half, alpha_half):
    """The error in percent on the half for alpha of the folder's cell, trained on that for w."""
    def batches(flags, device):
        seed = make_seed(args.seed, "brief")
        train = make_batches(w_half, flags.batch_size, seed, flags.cutout_length)
        return train, make_batches(alpha_half, flags.batch_size, train=False)

    trained, genotype = folder / "trained", str(folder / "genotype.json")
    if not (trained / "result.json").exists():
        size = [] if args.image_size is None else [f"--image_size={args.image_size}"]
        flags = retrain.parse(["--genotype", genotype, "--dataset", args.dataset, *size])
        flags = part(trained, flags, epochs=args.train_epochs, layers=args.train_layers,
                     auxiliary_weight=0.0, init_channels=args.train_channels, seed=args.seed,
                     limit=args.limit, amp=args.amp, data=args.data, device=args.device)
        retrain.train(load_genotype(genotype), flags, Run(flags, "result.json"), batches)
    return read_json(trained / "result.json")["test_error"]


def part(folder, args, **flags):
    """The flags of a run within R-DARTS's own, which may have been started before."""
    resume = str(folder) if (folder / "checkpoint.pt").exists() else None
    return argparse.Namespace(**{**vars(args), **flags, "out": str(folder), "resume": resume})


# ---------------------------------------------------------------- DARTS+PT

def perturbation(args, run):
    """DARTS+PT: decides a finished search's edges one by one, then the two edges of each node.

    An edge keeps the operation without which accuracy falls most (in the full space never `none`).
    The network is tuned in between.
    """
    rate = args.learning_rate / 10                          # constant, as in darts-pt
    parts = search.make_parts(argparse.Namespace(
        **{**vars(args), "learning_rate": rate, "learning_rate_min": rate}))
    decisions, split = Decisions(parts.net), parts.w_batches.split
    states = {"net": parts.net, "w_optimizer": parts.w_optimizer,
              "alpha_optimizer": parts.alpha_optimizer, "decisions": decisions}
    run.begin(states, {"classes": split.classes, "train_split": split.name})
    if run.epoch == 0:                                      # nothing is decided
        path = Path(args.search, "checkpoint.pt")
        searched = load_checkpoint(path)
        check_facts(path, searched["facts"], run.facts)
        parts.net.load_state_dict(searched["net"])
    order = decisions.order(args.seed)
    for turn in range(run.epoch, len(order)):
        started = time.monotonic()
        cell_type, decide, what = order[turn]
        torch.manual_seed(make_seed(args.seed, "decision", turn))       # S4 draws noise
        accuracy = functools.partial(accuracy_without, parts, decisions, turn)
        record = {"decision": turn, "cell": cell_type, **decide(cell_type, what, accuracy)}
        say(f"decision {turn + 1} of {len(order)}: {cell_type} cell, {what} keeps {record['kept']}")
        if cell_type == "reduce" and turn + 1 < len(order):     # after both cells, but for the last
            first = turn // 2 * args.tune_epochs
            for epoch in range(first, first + args.tune_epochs):
                record["train_loss"] = search.train_epoch(parts, epoch)["train_loss"]
        record["device"] = device_name(find_device(args.device))
        run.end_epoch({**record, "seconds": time.monotonic() - started})
    finish(run, decisions.genotype(), args.search_seconds)


@torch.no_grad()
def accuracy_without(parts, decisions, turn, removed):
    """Accuracy in percent on alpha's half with `removed` at 0.

    In training mode: normalized by batch, as in darts-pt.
    """
    parts.net.train()
    decisions.removed, totals = removed, 0
    for images, labels in parts.validation.epoch(turn):
        logits = parts.net(images)
        totals += metrics(F.cross_entropy(logits, labels), logits, labels)
    decisions.removed = None
    return means(totals)[1]


class Decisions(torch.nn.Module):
    """What is decided of each edge, by cell type: (edges, operations).

    NaN: nothing yet. Else weights that take the place of beta, all 0 for an edge taken out.
    removed: what is tried at 0, as (cell type, row of its edge, operation).
    """

    def __init__(self, net):
        super().__init__()
        self.space, self.removed = net.space, None
        for cell_type, alpha in net.alphas.items():
            self.register_buffer(cell_type, torch.full_like(alpha.detach(), float("nan")))
        for cell_type, cell in zip(net.cell_types, net.cells):
            cell.register_forward_pre_hook(functools.partial(self.replace_beta, cell_type))

    def replace_beta(self, cell_type, cell, inputs):
        s0, s1, beta = inputs
        fixed = self.get_buffer(cell_type)
        beta = torch.where(fixed.isnan(), beta, fixed)
        if self.removed is not None and self.removed[0] == cell_type:
            beta[self.removed[1:]] = 0
        return s0, s1, beta

    def order(self, seed):
        """[(cell type, method, edge or node)]: cells in turn; all edges, then all nodes.

        The order of edges and of nodes is random.
        """
        turns = {cell_type: [] for cell_type in self.space}
        for cell_type, edges in self.space.items():
            nodes = sorted({j for _, j in edges if j > 2})  # those of more than two inputs
            for decide, what in (self.decide_operation, [*edges]), (self.decide_inputs, nodes):
                random.Random(make_seed(seed, "decisions", cell_type)).shuffle(what)
                turns[cell_type] += [(cell_type, decide, thing) for thing in what]
        return [turn for pair in zip(*turns.values()) for turn in pair]

    def decide_operation(self, cell_type, edge, accuracy):
        """Fixes an edge's operation: that without which accuracy is lowest; ties: the first."""
        row, primitives = list(self.space[cell_type]).index(edge), self.space[cell_type][edge]
        full = self.space is SPACES["darts"]
        tried = [name for name in primitives if name != "none" or not full]
        accuracies = {name: accuracy((cell_type, row, primitives.index(name))) for name in tried}
        kept = min(accuracies, key=accuracies.get)
        self.get_buffer(cell_type)[row] = torch.eye(len(primitives))[primitives.index(kept)]
        return {"edge": edge, "kept": kept, "accuracies": accuracies}

    def decide_inputs(self, cell_type, node, accuracy):
        """Takes edges out until a node has two, each time that without which accuracy is highest.

        Ties: the last.
        """
        rows = {i: row for row, (i, j) in enumerate(self.space[cell_type]) if j == node}
        tried = []
        while len(rows) > 2:
            tried.append({i: accuracy((cell_type, row, slice(None))) for i, row in rows.items()})
            gone = max(reversed(rows), key=tried[-1].get)
            self.get_buffer(cell_type)[rows.pop(gone)] = 0
        return {"node": node, "kept": list(rows), "accuracies": tried}

    def genotype(self):
        """The cell, when all is decided. Where `none` was kept, the next operation stays."""
        betas = {cell_type: fixed + fixed.sum(1, keepdim=True) / 2
                 for cell_type, fixed in self.named_buffers()}
        return search.derive(self.space, betas)


# ---------------------------------------------------------------- the commands

def begin(args, run):
    """The parts of a method that is a search of its own."""
    parts = search.make_parts(args)
    search.begin(parts, run)
    return parts


def finish(run, genotype, seconds=0):
    """Ends a run. It cost `seconds`, and all logged epochs: undone ones, and of runs within it."""
    for log in run.folder.rglob("log*.jsonl"):
        seconds += sum(json.loads(line)["seconds"] for line in log.open())
    search.finish(run, genotype, seconds)


def make_parser(method):
    """search.py's flags, with DARTS's weight decay by default, and the method's own."""
    parser = search.make_parser(f"experiments.baselines {method}", inspect.getdoc(METHODS[method]))
    parser.set_defaults(weight_decay=3e-4, method=method)
    add = parser.add_argument_group(method).add_argument
    if method in ("es", "ada"):
        add("--window", type=positive_int, default=5,
            help="epochs of the moving average (Zela et al.)")
        add("--ratio", type=positive, default=0.75,
            help="of averages (Zela et al.)")
        add("--first", type=positive_int, default=10,
            help="first epoch for an alarm (RobustDARTS)")
    if method == "ada":
        add("--max_decay", type=non_negative, default=0.03,
            help="largest weight decay (RobustDARTS)")
    if method == "r_darts":
        add("--train_epochs", type=positive_int, default=100,
            help="epochs of the brief training (DARTS)")
        add("--train_layers", type=number(int, 3), default=8, help="cells (RobustDARTS)")
        add("--train_channels", type=number(int, 2), default=16,
            help="its channels (RobustDARTS)")
    return parser


def parse(arguments, method):
    args = search.parse(arguments, make_parser(method))
    if method == "ada" and not 0 < args.weight_decay < args.max_decay:
        raise SystemExit(f"--weight_decay must be above 0 and below --max_decay "
                         f"{args.max_decay:g}, to grow")
    if method == "r_darts" and args.weight_decay != 3e-4:
        raise SystemExit("r_darts takes no --weight_decay: it tries 3e-4, 9e-4, 27e-4 and 81e-4")
    return args


def parse_perturbation(arguments, method):
    """The flags, and those of the search; what is not given is the search's, too."""
    parser = Parser(f"experiments.baselines {method}", description=inspect.getdoc(perturbation),
                    argument_default=argparse.SUPPRESS)
    parser.set_defaults(method=method, out=None, resume=None)
    add = parser.add_argument
    add("search", metavar="RUN", nargs="?", help="folder of a finished run of search.py")
    add("--tune_epochs", type=natural, default=5,
        help="after each pair of decisions (darts-pt)")
    add("--data", help="default: the search's")
    add("--device", help="default: the search's")
    add("--out", help="run folder (default: a new one in runs/)")
    add("--resume", metavar="FOLDER", help="continue an interrupted run, with its flags")
    args = parse_flags(parser, arguments, lambda args: {})
    if args.resume is not None:
        return args
    folder = Path(vars(args).get("search", "RUN"))
    if not (folder / "genotype.json").exists():
        raise SystemExit(f"perturbation needs a finished run of search.py, and {folder} is none")
    searched = vars(search.parse(["--resume", args.search]))
    args = argparse.Namespace(**{**searched, **vars(args)})
    args.search_seconds = read_json(folder / "search.json")["seconds"]
    return args


METHODS = {method.__name__: method for method in (second_order, es, ada, r_darts, perturbation)}


def main(arguments):
    if arguments[:1] in ([], ["-h"], ["--help"]):
        return print(__doc__)
    method, *flags = arguments
    if method not in METHODS:
        raise SystemExit(f"there is no method {method}: choose one of {', '.join(METHODS)}")
    if WORLD > 1:
        raise SystemExit("baselines run in one process: start them without torchrun")
    args = (parse_perturbation if method == "perturbation" else parse)(flags, method)
    METHODS[method](args, Run(args, "genotype.json"))


if __name__ == "__main__":
    start(main)
