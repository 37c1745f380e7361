"""What the paper compares VS-DARTS with, on search.py's own loop, steps and run folders. Tables 1 and 3.

    python baselines.py second_order [search.py's flags]    DARTS, second order (Table 1)
    python baselines.py es [search.py's flags]              DARTS-ES: stops early by the Hessian of alpha (Table 3)
    python baselines.py ada [search.py's flags]             DARTS-ADA: regularizes more instead (Table 3)
    python baselines.py perturbation RUN                    DARTS+PT: on a finished search (Tables 1 and 3)
    python baselines.py r_darts [search.py's flags]         R-DARTS(L2): four weight decays (Tables 1 and 3)

Each has its own --help. Sources: quark0/darts f276dd3, cnn/architect.py; automl/RobustDARTS 3dec3fe and its paper (Zela et
al., ICLR 2020); ruocwang/darts-pt 4ec3149, sota/cnn/projection.py, and its paper (Wang et al., ICLR 2021).
"""
import argparse
import functools
import inspect
import json
import shlex
import time
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.func import functional_call

import retrain
import search
from data import Batches, test_batches
from figures import METHODS as NAMES, TABLE1, TABLE3, TABLE3_METHODS, load_net_file, read_search, with_flags
from genotypes import SPACES, Genotype, from_json, load as load_genotype
from larc import LARC, local_factors
from run import Exit, Parser, Run, device_name, find_device, keep_settings, load_checkpoint, make_seed, means, metrics, \
    number, precision, save, save_text, start


# ---------------------------------------------------------------- second order

def loss_at(net, values, images, labels, autocast):
    """The loss with other values of some parameters, {name: tensor}. Running statistics stay as they are."""
    buffers = {name: buffer.clone() for name, buffer in net.named_buffers()}
    with autocast():
        return F.cross_entropy(functional_call(net, {**values, **buffers}, (images,)), labels)


def second_order_gradient(net, w_optimizer, valid_batch, train_batch, autocast, epsilon=0.01):
    """The gradient of L_val(w', alpha) in the alphas, w' = w - xi (m + f (g + b w)): the weights after one step of SGD.

    With v the gradient at w' in the weights, and w+- = w +- epsilon f v / |f v|, it is, by finite differences,

        grad_alpha L_val(w', alpha) - xi |f v| (grad_alpha L_train(w+, alpha) - grad_alpha L_train(w-, alpha)) / (2 epsilon)

    xi: the learning rate; m: momentum times its buffer; b: weight decay; f: 1, or with LARC its factor of each tensor, taken
    as a constant. Source: cnn/architect.py, which has no gradient clip here either.
    """
    names = [name for name, _ in net.named_parameters() if not name.startswith("alpha_")]                 # as net.weights
    group, seed = w_optimizer.param_groups[0], torch.randint(2**62, ()).item()
    torch.manual_seed(seed)                                 # S4's noise: the same in all three passes over the training batch
    grads = torch.autograd.grad(loss_at(net, {}, *train_batch, autocast), net.weights)
    factors = [1.0] * len(names)
    with torch.no_grad():
        if isinstance(w_optimizer, LARC):
            factors = local_factors(net.weights, list(grads), group["lr"], group["weight_decay"], group["trust_coefficient"],
                                    group["clip"])
        moved = []
        for w, g, f in zip(net.weights, grads, factors):
            buffer = w_optimizer.state.get(w, {}).get("momentum_buffer")
            momentum = 0 if buffer is None else group["momentum"] * buffer
            moved.append(w - group["lr"] * (momentum + f * (g + group["weight_decay"] * w)))
    moved = [w.requires_grad_() for w in moved]
    torch.manual_seed(seed + 1)                             # and other noise for the validation batch
    loss = loss_at(net, dict(zip(names, moved)), *valid_batch, autocast)
    *v, direct_normal, direct_reduce = torch.autograd.grad(loss, [*moved, *net.alphas])
    with torch.no_grad():
        fv = [f * g for f, g in zip(factors, v)]
        length = torch.stack(torch._foreach_norm(fv)).norm()
        sides = [{name: w + sign * epsilon / length * d for name, w, d in zip(names, net.weights, fv)} for sign in (1, -1)]
    found = []
    for side in sides:
        torch.manual_seed(seed)
        found.append(torch.autograd.grad(loss_at(net, side, *train_batch, autocast), net.alphas))
    return [direct - group["lr"] * length * (p - m) / (2 * epsilon)
            for direct, p, m in zip((direct_normal, direct_reduce), *found)]


def second_order_step(net, alpha_optimizer, valid_batch, train_batch, w_optimizer, autocast):
    """The alpha step of second order, for search(): weights, running statistics and w_optimizer stay as they are."""
    gradient = second_order_gradient(net, w_optimizer, valid_batch, train_batch, autocast)
    for alpha, grad in zip(net.alphas, gradient):
        alpha.grad = grad
    alpha_optimizer.step()


def second_order(arguments):
    """DARTS of second order: alpha's gradient goes through one virtual step of the weights (with --larc, LARC's own)."""
    args = search.parse(arguments, searching("second_order"), "second_order")
    run = Run("baselines.py", args, "genotype.json", resume_command(args))
    net = search.search(args, run, other_alpha_step=second_order_step)
    search.finish(args, run, search.derive(net.space, net.betas()))


# ---------------------------------------------------------------- early stopping and adaptive regularization

def largest_eigenvalue(net, images, labels, autocast, steps=30):
    """The largest eigenvalue of the Hessian of the loss in all alphas together, from products with it.

    Lanczos: the largest eigenvalue of H restricted to the span of v, Hv, HHv, ... (`steps` vectors, v random). It is more
    accurate than power iteration, which keeps the last vector only, and a large negative eigenvalue does not mislead it.
    NaN where the network has diverged.
    """
    grads = torch.autograd.grad(loss_at(net, {}, images, labels, autocast), list(net.alphas), create_graph=True)
    flat = torch.cat([grad.flatten() for grad in grads])
    vectors, products = [], []
    v = torch.randn(flat.shape, generator=torch.Generator().manual_seed(0), dtype=flat.dtype).to(flat.device)
    for _ in range(min(steps, len(v))):
        before = v.norm()
        for u in 2 * vectors:                               # twice, for rounding
            v = v - (u @ v) * u
        if v.norm() <= 1e-5 * before:                       # the space is complete
            break
        vectors.append(v / v.norm())
        product = torch.autograd.grad(flat @ vectors[-1], list(net.alphas), retain_graph=True)
        v = torch.cat([part.flatten() for part in product])
        products.append(v)
    H = torch.stack(vectors) @ torch.stack(products).T      # the Hessian in that space
    if not H.isfinite().all():
        return float("nan")
    return torch.linalg.eigvalsh((H + H.T) / 2)[-1].item()


def alarm(eigenvalues, window, ratio, first):
    """The number of epochs to return to, or None. eigenvalues: one after each epoch.

    Zela et al.: stop once the moving average `window` epochs ago is less than `ratio` of today's, and return to that epoch.
    first: the first epoch, from 1 on, at which that may happen.
    """
    def average(epochs):
        last = eigenvalues[max(0, epochs - window):epochs]
        return sum(last) / len(last)
    today = len(eigenvalues)
    if today < max(first, window + 1) or average(today - window) >= ratio * average(today):
        return None
    return today - window


def epochs_to_return_to(run):
    """alarm() of a run's log, with its flags."""
    eigenvalues = [json.loads(line)["eigenvalue"] for line in run.log]
    return alarm(eigenvalues, run.args.window, run.args.ratio, run.args.first)


def look_at_hessian(args):
    def look(net, w_optimizer, valid_batch):
        autocast, _ = precision(args.amp, valid_batch[1].device)
        return {"eigenvalue": largest_eigenvalue(net.train(), *valid_batch, autocast),
                "weight_decay": w_optimizer.param_groups[0]["weight_decay"]}
    return look


def es(arguments):
    """Early stopping: the search ends when the largest eigenvalue of alpha's Hessian has grown; an earlier cell is kept.

    In first order, where RobustDARTS's scripts take the second.
    """
    args = search.parse(arguments, searching("es"), "es")
    run = Run("baselines.py", args, "genotype.json", resume_command(args))
    search.search(args, run, look=look_at_hessian(args), stop=lambda: epochs_to_return_to(run))
    epochs = epochs_to_return_to(run) or args.epochs
    run.say(f"stopped after {run.epoch} epochs; the cell is that after {epochs}")
    search.finish(args, run, from_json(json.dumps(json.loads(run.log[epochs - 1])["genotype"])))


def ada(arguments):
    """Adaptive regularization: at the alarm that would stop ES, the search goes back as far, with ten times the decay.

    In first order, where RobustDARTS's scripts take the second. The checkpoints of all epochs are kept until the end, as
    alarms may return to ever earlier ones.
    """
    args = search.parse(arguments, searching("ada"), "ada")
    if not 0 < args.weight_decay < args.max_decay:
        raise Exit(f"--weight_decay {args.weight_decay:g} cannot grow: give one between 0 and --max_decay {args.max_decay:g}")
    while True:
        run = Run("baselines.py", args, "genotype.json", resume_command(args))

        def stop():
            keep_checkpoint(run)
            decay = json.loads(run.log[-1])["weight_decay"] if run.log else args.weight_decay
            return decay < args.max_decay and epochs_to_return_to(run)
        net = search.search(args, run, look=look_at_hessian(args), stop=stop)
        back = stop()
        if not back:
            break
        go_back(run, back, args.max_decay)
        args.resume = args.out
    search.finish(args, run, search.derive(net.space, net.betas()))
    for path in run.folder.glob("checkpoint-*.pt"):
        path.unlink()


def keep_checkpoint(run):
    """Keeps checkpoint.pt as checkpoint-EPOCHS.pt."""
    if run.epoch:
        save(run.folder / f"checkpoint-{run.epoch}.pt", lambda file: file.write(run.checkpoint.read_bytes()))


def go_back(run, epochs, max_decay):
    """Makes checkpoint.pt that of fewer epochs, with more weight decay. The epochs undone keep a log of their own."""
    state = load_checkpoint(run.folder / f"checkpoint-{epochs}.pt")
    decay = min(float(f"{10 * json.loads(run.log[-1])['weight_decay']:g}"), max_decay)        # 0.03, not 0.029999999999999995
    for group in state["w_optimizer"]["param_groups"]:
        group["weight_decay"] = decay
    save_text(run.folder / f"log-before-{decay:g}.jsonl", "\n".join(run.log[epochs:]))
    save(run.checkpoint, lambda file: torch.save(state, file))
    run.say(f"alarm after {run.epoch} epochs: back to {epochs}, with weight decay {decay:g}")


# ---------------------------------------------------------------- R-DARTS(L2)

DECAYS = (3e-4, 9e-4, 27e-4, 81e-4)                         # the first four of RobustDARTS's grid
FOLDERS = {decay: f"weight_decay-{decay:g}" for decay in DECAYS}


def r_darts(arguments):
    """Four searches, with weight decay 3, 9, 27 and 81e-4 (from RobustDARTS's grid; --weight_decay is not taken). Each cell is
    trained briefly on the half for w, and the best on the half for alpha is kept. In first order, as ES and ADA."""
    args = search.parse(arguments, searching("r_darts"), "r_darts")
    out, errors = Path(args.out), {}
    if args.weight_decay != 3e-4:
        raise Exit(f"--weight_decay does not belong to r_darts: it tries {', '.join(f'{decay:g}' for decay in DECAYS)}")
    started, finished = any((out / name).exists() for name in FOLDERS.values()), (out / "genotype.json").exists()
    if started and not finished and args.resume is None:
        raise Exit(f"{out} holds an unfinished run: resume with {resume_command(args)}, or choose another --out")
    if finished or not started:                             # Run raises what there is to object to
        Run("baselines.py", args, "genotype.json", resume_command(args))
    flags = {flag: value for flag, value in vars(args).items() if flag != "resume"}
    search.read_halves(args, *device_and_layout(args))      # what can be wrong about the data is known before there is a folder
    save_text(out / "config.json", json.dumps({"program": "baselines.py", **flags}, indent=1))
    print("the brief trainings test on the half for alpha: their \"test error\" is a validation error", flush=True)
    for decay in DECAYS:
        folder = out / FOLDERS[decay]
        if not (folder / "genotype.json").exists():         # each is a run of search.py
            own = {flag: getattr(args, flag) for flag in vars(search.make_parser().parse_args([]))}
            own = argparse.Namespace(**{**own, "weight_decay": decay, **continued(folder)})
            run = Run("search.py", own, "genotype.json", resume_command(args), part=True)
            net = search.search(own, run)
            search.finish(own, run, search.derive(net.space, net.betas()))
        errors[decay] = train_briefly(load_genotype(folder / "genotype.json"), args, folder / "trained")
        print(f"weight decay {decay:g}: validation error {errors[decay]:.2f}%", flush=True)
    best = min(errors, key=errors.get)                      # ties: the smaller decay
    save_text(out / "validation.json", json.dumps({f"{decay:g}": error for decay, error in errors.items()}, indent=1))
    save_text(out / "genotype.json", (out / FOLDERS[best] / "genotype.json").read_text().strip())
    print(f"the cell is that of weight decay {best:g}\n{search.retrain_command(args, out / 'genotype.json')}")


def continued(folder):
    """The flags of a run in `folder`, new or to be resumed."""
    return {"out": str(folder), "resume": str(folder) if (folder / "checkpoint.pt").exists() else None}


def train_briefly(genotype, args, folder):
    """The error in percent on the half for alpha, of the cell's network trained on the half for w: retrain.py's protocol."""
    def read_halves(options, train, device, layout, rank, world):
        w_half, alpha_half = search.read_halves(args, device, layout)
        if train:
            batches = Batches(w_half, options.batch_size, make_seed(args.seed, "brief"), options.cutout_length)
        else:
            batches = functools.partial(test_batches, alpha_half, options.batch_size)
        return batches, w_half.classes, w_half.images.shape[1]
    if not (folder / "result.json").exists():
        size = [] if args.image_size is None else ["--image_size", str(args.image_size)]
        options = retrain.parse(["--genotype", "VS_DARTS", "--dataset", args.dataset, *size])  # the data set's protocol
        options = with_flags(options, genotype=f"{folder.parent}/genotype.json", epochs=args.train_epochs,
                             init_channels=args.train_channels, layers=args.train_layers, auxiliary_weight=0.0,
                             seed=args.seed, device=args.device, data=args.data, limit=args.limit, amp=args.amp, **continued(folder))
        run = Run("baselines.py", options, "result.json", resume_command(args), part=True)
        retrain.train(genotype, options, run, 0, 1, read_halves)
    return json.loads((folder / "result.json").read_text())["test_error"]


# ---------------------------------------------------------------- perturbation

class Decisions(nn.Module):
    """What perturbation has decided of each edge: NaN (nothing yet), or its fixed weights; all 0 for an edge taken out.

    In every cell of `net` the fixed weights take the place of beta. `zeroed`: (cell type, edge, operation) tried at 0, the
    others being as they are; with operation None, a whole edge.
    """

    def __init__(self, net):
        super().__init__()
        self.register_buffer("normal", torch.full_like(net.alpha_normal.detach(), float("nan")))
        self.register_buffer("reduce", torch.full_like(net.alpha_reduce.detach(), float("nan")))
        self.zeroed = None
        for kind, cell in zip(net.cell_types, net.cells):
            cell.register_forward_pre_hook(lambda cell, inputs, kind=kind: (*inputs[:2], self.weights(kind, inputs[2])))

    def weights(self, kind, beta):
        fixed = getattr(self, kind)
        beta = torch.where(fixed.isnan(), beta, fixed)
        if self.zeroed is not None and self.zeroed[0] == kind:
            _, row, operation = self.zeroed
            keep = torch.ones_like(beta)
            keep[row, slice(None) if operation is None else operation] = 0
            beta = beta * keep
        return beta


@torch.no_grad()
def accuracy_without(net, decisions, zeroed, batches, autocast, look):
    """Accuracy in percent over the batches with `zeroed` taken out; normalized by batch, as darts-pt has it."""
    net.train()
    decisions.zeroed, totals = zeroed, 0
    for images, labels in batches:
        totals = totals + metrics(*search.loss_of(net, images, labels, autocast), labels)
        look()
    decisions.zeroed = None
    return means(totals)[1]


def decide_operation(space, kind, row, decisions, accuracy):
    """Fixes the operation of an edge: the one without which accuracy is lowest; ties: the first. Returns what to log.

    In the full space `none` is no candidate: DARTS+PT has none there. In S3 it is one.
    """
    edge, primitives = list(space[kind].items())[row]
    accuracies = {name: accuracy((kind, row, o)) for o, name in enumerate(primitives)
                  if name != "none" or space is not SPACES["darts"]}
    kept = min(accuracies, key=accuracies.get)
    getattr(decisions, kind)[row] = torch.eye(len(primitives))[primitives.index(kept)]
    return {"edge": edge, "accuracies": accuracies, "kept": kept}


def decide_inputs(space, kind, node, decisions, accuracy):
    """Takes edges out until a node has two: the edge without which accuracy is highest; ties: the last. Returns what to log."""
    edges, tried = list(space[kind]), []
    left = [i for i, j in edges if j == node]
    while len(left) > 2:
        accuracies = {i: accuracy((kind, edges.index((i, node)), None)) for i in left}
        gone = max(reversed(left), key=accuracies.get)
        getattr(decisions, kind)[edges.index((gone, node))] = 0
        left.remove(gone)
        tried.append(accuracies)
    return {"node": node, "accuracies": tried, "kept": left}


def decided_genotype(space, decisions):
    """The cell, when all is decided. As DARTS's derivation leaves `none` out, the next operation stands for it."""
    cells = {}
    for kind, edges in space.items():
        nodes = {j: [] for _, j in edges}
        for ((i, j), primitives), weights in zip(edges.items(), getattr(decisions, kind).tolist()):
            if 1 in weights:
                name = primitives[weights.index(1)]
                nodes[j].append((primitives[1] if name == "none" else name, i))
        cells[kind] = tuple(tuple(node) for node in nodes.values())
        cells[f"{kind}_concat"] = tuple(nodes)
    return Genotype(**cells)


def same_choices(a, b):
    """How many (cell, node, operation, input) two genotypes share."""
    first, second = ({(kind, j, *pair) for kind in ("normal", "reduce") for j, node in enumerate(getattr(genotype, kind))
                      for pair in node} for genotype in (a, b))
    return len(first & second)


def orders(space, seed):
    """In what order edges, and then nodes of more than two inputs, are decided: {cell type: (rows, nodes)}; random."""
    result = {}
    for kind, edges in space.items():
        generator = torch.Generator().manual_seed(make_seed(seed, "decisions", kind))
        nodes = sorted({j for _, j in edges if j > 2})
        result[kind] = (torch.randperm(len(edges), generator=generator).tolist(),
                        [nodes[k] for k in torch.randperm(len(nodes), generator=generator)])
    return result


def perturb(net, searched, args, run):
    """All decisions, one a line of the log: one of the normal cell, one of the reduction cell, tuning epochs, and so on.

    Tuning goes on with search.py's two steps, with LARC where the search had it. No tuning follows the last decision.
    """
    device, layout = device_and_layout(searched)
    autocast, _ = precision(searched.amp, device)
    w_half, alpha_half = search.read_halves(searched, device, layout)
    train = Batches(w_half, searched.batch_size, make_seed(args.seed, "w"))
    valid = Batches(alpha_half, searched.batch_size, make_seed(args.seed, "alpha"))
    held_out = Batches(alpha_half, searched.batch_size, make_seed(args.seed, "validation"))
    w_optimizer, alpha_optimizer, _ = search.make_optimizers(net, with_flags(searched, learning_rate=args.learning_rate))
    decisions = Decisions(net).to(device)
    run.begin({"net": net, "decisions": decisions, "w_optimizer": w_optimizer, "alpha_optimizer": alpha_optimizer})
    order = orders(net.space, args.seed)
    total = 2 * sum(map(len, order["normal"]))
    for turn in range(run.epoch, total):
        started, kind = time.time(), ("normal", "reduce")[turn % 2]
        rows, nodes = order[kind]

        def accuracy(zeroed):
            return accuracy_without(net, decisions, zeroed, held_out.epoch(turn), autocast, run.look)
        torch.manual_seed(make_seed(args.seed, "noise", turn))
        if turn // 2 < len(rows):
            record = decide_operation(net.space, kind, rows[turn // 2], decisions, accuracy)
        else:
            record = decide_inputs(net.space, kind, nodes[turn // 2 - len(rows)], decisions, accuracy)
        if kind == "reduce" and turn + 1 < total:
            for epoch in range(turn // 2 * args.tune_epochs, (turn // 2 + 1) * args.tune_epochs):
                record["train_loss"] = tune(net, searched, run, w_optimizer, alpha_optimizer, train, valid, epoch, autocast)
        record = {"decision": turn, "cell": kind, **record, "seconds": time.time() - started, "device": device_name(device)}
        run.end_epoch(record)
        run.say(f"decision {turn + 1}/{total}, {kind} cell: " + json.dumps({key: record[key] for key in record if key in
                ("edge", "node", "kept", "accuracies")}))
    return decisions


def tune(net, searched, run, w_optimizer, alpha_optimizer, train, valid, epoch, autocast):
    """One epoch of the search's two steps, at a constant rate. Returns the mean training loss."""
    net.train()
    totals = torch.zeros(4, device=train.split.labels.device)
    valid_batches = valid.range(epoch * train.steps, (epoch + 1) * train.steps)
    for step, (train_batch, valid_batch) in enumerate(zip(train.epoch(epoch), valid_batches)):
        search.alpha_step(net, alpha_optimizer, *valid_batch, autocast)
        loss, logits = search.weight_step(net, w_optimizer, *train_batch, autocast, searched.grad_clip)
        totals += metrics(loss, logits, train_batch[1])
        run.step(step, train.steps, totals)
        run.look()
    return means(totals)[0]


def finished_search(args):
    """(SearchRun of --search, its super-network at the end)."""
    run = read_search(args.search, args)
    if run.args.method:
        raise Exit(f"{args.search} is a run of baselines.py: perturbation needs one of search.py")
    return run, load_net_file(run, "checkpoint.pt")


def perturbation(arguments):
    """DARTS+PT: decides a finished search's edges one by one, each for the operation without which accuracy falls most,
    with tuning epochs between; then two inputs a node."""
    args = perturbing().parse_args(arguments)
    if args.resume is not None:
        args = keep_settings(perturbing(), Path(args.resume), arguments)
    run_folder = vars(args).pop("RUN")
    if args.resume is None:
        args.search = run_folder
    elif run_folder and Path(run_folder) != Path(args.search):
        raise Exit(f"{args.out} is a perturbation of {args.search}, not of {run_folder}: leave RUN out")
    if args.search is None:
        raise Exit("perturbation needs the folder of a finished search: python baselines.py perturbation RUN")
    args.out = args.out or f"{Path(args.search)}-perturbation"
    run = Run("baselines.py", args, "genotype.json", resume_command(args), unit="decision")
    searched, net = finished_search(args)
    by_beta = search.derive(net.space, net.betas())
    genotype = decided_genotype(net.space, perturb(net, searched.args, args, run))
    run.say(f"{same_choices(genotype, by_beta)} of the 16 choices are also those of beta")
    search.finish(searched.args, run, genotype)


# ---------------------------------------------------------------- the commands

def device_and_layout(args):
    device = find_device(args.device)
    return device, precision(False, device)[1]


def resume_command(args):
    return f"`python baselines.py {args.method} --resume {shlex.quote(args.out)}`"


def describe(method):
    """What a method does, and the paper's rows of it, for --help."""
    name = NAMES[method]
    lines = [inspect.getdoc(METHODS[method]), ""]
    lines += [f"Table 1, {row}: parameters (M) {parameters}, test error (%) {error}, GPU days {days}"
             for row, parameters, error, days, ours in TABLE1 if name in ours]
    for dataset in ("cifar10", "cifar100", "svhn") if name in TABLE3_METHODS else ():
        errors = [f"{TABLE3[dataset, space][TABLE3_METHODS.index(name)]:.2f}" for space in ("s1", "s2", "s3", "s4")]
        lines.append(f"Table 3, {name}, {dataset}: test error (%) in S1 to S4 {', '.join(errors)}")
    return "\n".join(lines)


def searching(method):
    """search.py's flags, with DARTS's weight decay by default, and the method's own."""
    parser = search.make_parser("baselines.py", describe(method))
    parser.usage = f"python baselines.py {method} [flags]"
    add = parser.add_argument
    add("--method", choices=[method], default=method, help=argparse.SUPPRESS)                # for config.json
    parser.set_defaults(weight_decay=3e-4)
    if method in ("es", "ada"):
        add("--window", type=number(int, 1), default=5,
            help="epochs of the eigenvalue's moving average, and how far back to return (default %(default)s: Zela et al.)")
        add("--ratio", type=number(float, 0, above=True), default=0.75, help="alarm once the average --window epochs ago is "
            "less than this part of today's (default %(default)s: Zela et al.; their code: 1 / 1.3)")
        add("--first", type=number(int, 1), default=10,
            help="first epoch, counted from 1, for an alarm (default %(default)s: RobustDARTS's code)")
    if method == "ada":
        add("--max_decay", type=number(float, 0), default=0.03,
            help="largest weight decay; an alarm makes it ten times larger (default %(default)s: RobustDARTS's code)")
    if method == "r_darts":
        add("--train_epochs", type=number(int, 1), default=100,
            help="epochs of the brief training (default %(default)s: DARTS, section 3.2)")
        add("--train_layers", type=number(int, 3, 1000), default=8, help="its cells (default %(default)s: RobustDARTS)")
        add("--train_channels", type=number(int, 2, 4096), default=16, help="its channels (default %(default)s: RobustDARTS)")
    return parser


def perturbing():
    parser = Parser("baselines.py", description=describe("perturbation"), usage="python baselines.py perturbation RUN [flags]")
    add = parser.add_argument
    add("--method", choices=["perturbation"], default="perturbation", help=argparse.SUPPRESS)   # for config.json
    add("RUN", nargs="?", help="folder of a finished run of search.py")
    add("--search", help=argparse.SUPPRESS)                                                  # RUN, for config.json
    add("--tune_epochs", type=number(int, 0), default=5,
        help="epochs after each pair of decisions (default %(default)s: darts-pt)")
    add("--learning_rate", type=number(float, 0), default=0.0025,
        help="constant rate of the tuning epochs (default %(default)s: darts-pt)")
    add("--seed", type=number(int, 0), default=2, help="default %(default)s: darts-pt")
    add("--data", help="folder of the data sets (default: the search's)")
    add("--device", help="torch device (default: the search's)")
    add("--out", help="run folder (default RUN-perturbation)")
    add("--resume", metavar="FOLDER", help="continue an interrupted run, with its settings")
    return parser


METHODS = {"second_order": second_order, "es": es, "ada": ada, "perturbation": perturbation, "r_darts": r_darts}


def main(arguments):
    if arguments[:1] in ([], ["-h"], ["--help"]):
        print(__doc__)
    elif arguments[0] not in METHODS:
        raise Exit(f"there is no method {arguments[0]}: choose one of {', '.join(METHODS)} (see --help)")
    else:
        METHODS[arguments[0]](arguments[1:])


if __name__ == "__main__":
    start("baselines.py", main)
