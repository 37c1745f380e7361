"""Tests of the figures, tables and baselines, against the same computed the slow, obvious way.

    python -m pytest -q experiments
"""
import copy
import itertools
import json
import math
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from pytest import approx
from torch.func import functional_call
from torch.testing import assert_close

import data
import retrain
import search
from experiments import baselines, figures, nasbench201, tables
from genotypes import DARTS_PRIMITIVES, EDGES, PUBLISHED, SPACES, to_json
from model import SuperNet
from data import make_seed
from run import read_json, write
from test_vsdarts import (SMALL, a_folder_of_its_own, checkpoints, open_split, read_log, refusal,
                          stop_after, tensors_equal)

VS_DARTS = ["--node_norm", "--larc", "--sqrt_beta"]


def small(*flags):
    """Flags of a search of two steps an epoch."""
    return [*SMALL, "--limit=128", "--batch_size=32", "--space=five", *flags]


@pytest.fixture(scope="module", autouse=True)
def five():
    """A space of five edges, into nodes 2 and 3, for what does not depend on the space."""
    edges = {edge: ("none", "noise", "sep_conv_3x3") for edge in EDGES[:5]}
    SPACES["five"] = {"normal": edges, "reduce": edges}
    yield
    del SPACES["five"]


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    """Finished searches, two in S3 with their super-networks, and one after its first epoch."""
    root = tmp_path_factory.mktemp("kept")
    s3 = small("--space=s3", "--epochs=2", "--keep_nets")
    search.main([*s3, f"--out={root / 'darts'}"])
    search.main([*s3, *VS_DARTS, f"--out={root / 'vs'}"])
    search.main(small("--epochs=1", "--node_norm", f"--out={root / 'five'}"))
    shutil.copytree(root / "vs", root / "unfinished")
    (root / "unfinished/genotype.json").unlink()
    first, _ = (root / "vs/log.jsonl").read_text().splitlines()
    (root / "unfinished/log.jsonl").write_text(first)
    retrained(root / "r", None)
    return root


def read(folder):
    return figures.read_search(str(folder), figures.parse(["3", str(folder)]))[1]


def stop_and_resume(main, method, flags, epochs):
    """A run `whole`, and one in `parts`, which is stopped once it has saved so many epochs."""
    main([*method, *flags, "--out=whole"])
    stop_after(epochs, main, [*method, *flags, "--out=parts"])
    main([*method, "--resume=parts"])


def slow_walk(net, images, weights=None):
    """Edge by edge: logits; of each cell its nodes, and of each edge (input, outputs, mixed)."""
    weights = weights or net.mixing_weights()               # {cell type: (edges, operations)}
    s0 = s1 = net.stem0(images)
    cells = []
    for cell_type, cell in zip(net.cell_types, net.cells):
        nodes, edges = [cell.preprocess0(s0), cell.preprocess1(s1)], {}
        for (i, j), row in zip(EDGES, weights[cell_type]):
            weight = dict(zip(net.space[cell_type][i, j], row))
            outputs = {name: op(nodes[i]) for name, op in cell.edges[f"{i}-{j}"].ops.items()}
            mixed = sum(weight[name] * output for name, output in outputs.items())
            edges[i, j] = nodes[i], outputs, mixed
            if i == j - 1:                                  # the last edge into node j
                x_j = sum(edges[source, j][2] for source in range(j))
                nodes.append(cell.normalize[j - 2](x_j))
        cells.append((nodes, edges))
        s0, s1 = s1, torch.cat(nodes[2:], 1)
    return net.classifier(s1.mean((2, 3))), cells


def slow_covariance(x, y):
    """One channel after the other, in numpy."""
    x, y = (z.detach().transpose(0, 1).flatten(1).numpy() for z in (x, y))
    return np.mean([np.cov(a, b, bias=True)[0, 1] for a, b in zip(x, y)])


def norm(tensors):
    return torch.cat([tensor.flatten() for tensor in tensors]).norm().item()


def tiny_net(space="s3", node_norm=True, sqrt_beta=True, layers=3):
    """A super-network with alphas far from uniform, and a batch; float64."""
    torch.manual_seed(0)
    net = SuperNet(SPACES[space], 2, layers, 10, node_norm, sqrt_beta, stem_multiplier=1)
    for alpha in net.alphas.values():
        alpha.data.normal_()
    return net.double().train(), torch.randn(16, 3, 8, 8).double(), torch.randint(10, (16,))


def slow_step(args, w, g):
    """Of SGD or LARC at a rate of 0.1, without momentum, over that rate."""
    factor = 1
    if args.larc:                                           # the factor is taken as a constant
        factor = (args.larc_trust * w.norm() / (g.norm() + 5e-3 * w.norm() + 1e-8)).detach()
        factor = min(factor / 0.1, 1) if args.larc_clip else factor
    return factor * (g + 5e-3 * w)


# ---------------------------------------------------------------- figures

@pytest.mark.parametrize("name", ["darts", "vs"])
def test_figure_3_equals_brute_force_after_every_epoch(kept, name):
    """On the first batch of the half for alpha; epoch 0 is the network that the seed makes."""
    searched, split = read(kept / name), open_split("digits")
    values = figures.measure3(searched, None)["variance"]
    images = data.normalize(split.images[64:96], split.spec)
    torch.manual_seed(2)
    net = search.make_supernet(searched, 10).train()
    for epoch in range(3):
        if epoch > 0:
            net.load_state_dict(torch.load(kept / f"{name}/net-{epoch}.pt"))
        nodes = slow_walk(net, images)[1][0][0]
        expected = [slow_covariance(x_j, x_j) for x_j in nodes[2:]]
        assert [line[epoch] for line in values.values()] == approx(expected, rel=1e-3)


def test_figure_4_is_the_mean_beta_of_none_by_node():
    alphas = {"normal": torch.randn(14, 8), "reduce": torch.randn(14, 8)}
    lists = {cell_type: alpha.tolist() for cell_type, alpha in alphas.items()}
    log = [{"beta_none": 0.125}, {"beta_none": 0.2, "alphas": lists}]
    numbers = figures.measure4(SimpleNamespace(space="darts", log=log), None)
    for cell_type, alpha in alphas.items():
        betas = alpha[:, 0].exp() / alpha.exp().sum(1)
        for j, into in zip("2345", betas.split([2, 3, 4, 5])):
            assert numbers["none"][cell_type[0].upper() + j] == approx(into.mean().item())
    assert (numbers["uniform"], numbers["mean_by_epoch"]) == (1 / 8, [0.125, 0.2])


@pytest.mark.parametrize("switches", [
    "--grad_clip 0.01", "--larc", "--larc --larc_clip --larc_trust 0.02"])
def test_figure_5_equals_a_step_of_the_optimizer(switches):
    net, images, labels = tiny_net()
    args = search.parse(["--learning_rate", "0.1", *switches.split()])
    loss = F.cross_entropy(net(images), labels)
    grads = dict(zip(net.weights, torch.autograd.grad(loss, net.weights)))
    clip = min(1, args.grad_clip / norm(grads.values()))
    measured = figures.sep_conv_gradients(net, 0, images, labels, args)
    for i in range(5):
        weights = [*net.cells[0].edges[f"{i}-5"].ops["sep_conv_3x3"].parameters()]
        w, g = norm(weights), norm([grads[w] for w in weights])
        step = 0.1 * norm([slow_step(args, w, clip * grads[w]) for w in weights])
        assert measured[f"{i}-5"] == approx([g, g / w, step / w])


def test_figure_5_takes_the_half_for_w_and_the_rates_of_the_epoch(kept, monkeypatch):
    searched, split, seen = read(kept / "darts"), open_split("digits"), []
    searched.log[1]["weight_decay"] = 0.03                  # as ADA logs it

    def gradients(net, layer, images, labels, args):
        assert_close(images, data.normalize(split.images[:32], split.spec))
        seen.append((args.learning_rate, args.weight_decay))
        return {"0-5": (1, 2, 3)}
    monkeypatch.setattr(figures, "sep_conv_gradients", gradients)
    sizes = figures.measure5(searched, None)
    assert [line["0-5"] for line in sizes.values()] == [[1] * 3, [2] * 3, [3] * 3]
    assert sum(seen, ()) == approx((0.025, 5e-3, 0.013, 0.03, 0.013, 0.03))


@pytest.mark.parametrize("cell_type, layer, i, j, sqrt_beta", [
    ("normal", 2, 2, 4, False), ("reduce", 3, 1, 3, True)])
def test_figure_6_equals_brute_force(cell_type, layer, i, j, sqrt_beta):
    net, images, _ = tiny_net("darts", sqrt_beta=sqrt_beta, layers=5)       # cells N R N R N
    row = EDGES.index((i, j))
    values = figures.mixed_variance(net, cell_type, row, images)
    x, outputs, mixed = slow_walk(net, images)[1][layer][1][i, j]
    variance = slow_covariance(mixed, mixed)
    ratio = variance / slow_covariance(x, x)
    assert (values["variance"], values["variance ratio"]) == approx((variance, ratio))
    assert values["sigma ratio"] == approx(math.sqrt(ratio))
    beta = dict(zip(DARTS_PRIMITIVES, torch.softmax(net.alphas[cell_type][row], 0).tolist()))
    for suffix, total in (("", 1), ("_without_none", 1 - beta["none"])):
        squares = C = 0
        for a, b in itertools.product(outputs, outputs):
            covariance = slow_covariance(outputs[a], outputs[b])
            assert values["covariances"][a][b] == approx(covariance, abs=1e-12)
            weights = beta[a] * beta[b] / total ** 2
            term = covariance * (math.sqrt(weights) if sqrt_beta else weights)
            if a == b:
                squares += term
            else:
                C += term
        assert (values[f"squares{suffix}"], values[f"C{suffix}"]) == approx((squares, C))


def test_tau_counts_pairs_and_its_ceiling_is_that_of_two_halves_of_the_images():
    right = torch.tensor([[1, 1, 1, 0, 1, 0], [1, 1, 0, 0, 0, 0], [0, 1, 0, 1, 0, 1]])
    numbers = figures.compare([0.2, 0.3, 0.5], [*right.bool()])     # even: 3 1 0; odd: 1 1 3
    assert numbers["accuracy"] == approx([100 * 4 / 6, 100 * 2 / 6, 100 * 3 / 6])
    assert numbers["tau"] == approx((-1 - 1 + 1) / 3)
    assert numbers["ceiling"] == approx((0 - 1 - 1) / 3)             # a tie counts for neither


def test_figure_2_on_a_rigged_super_network(monkeypatch):
    """The larger an operation's beta, the more images it gets right; when tuned, the fewer."""
    net, images = tiny_net("darts")[0], torch.linspace(-10, 10, 20_000)
    strengths = {key: alpha.argsort(1).argsort(1) - 3.5 for key, alpha in net.alphas.items()}
    net.sign, before = 1, copy.deepcopy(net.betas())

    def answers(net, half, limit):
        betas = net.betas()
        return images < net.sign * sum((betas[key] * strengths[key]).sum() for key in betas) / 28
    monkeypatch.setattr(figures, "answers", answers)
    monkeypatch.setattr(figures, "tune", lambda net, *_: setattr(net, "sign", -1))
    monkeypatch.setattr(figures, "load_net", lambda run, epoch: net)
    monkeypatch.setattr(search, "read_halves", lambda run, device: (None, None))
    options = SimpleNamespace(epoch=None, edge=["normal:0-2"], tune=3, images=None)
    numbers = figures.measure2(SimpleNamespace(log=[], device="cpu", folder="rigged"), options)
    edges = numbers["edges"].values()
    assert [edge["operations"] for edge in edges] == 28 * [[*DARTS_PRIMITIVES[1:]]]
    assert [edge["at once"]["tau"] for edge in edges] == 28 * [1]
    assert numbers["means"]["mean tau, at once"] == 1
    assert numbers["means"]["mean tau, tuned"] == -1
    assert tensors_equal(net.betas(), before)


def test_answers_are_those_of_images_normalized_by_batch():
    net, half = tiny_net("s2")[0].float(), open_split("digits")
    images = data.normalize(half.images[:700], half.spec)
    logits = torch.cat([slow_walk(net, part)[0] for part in images.split(512)])
    right = figures.answers(net.eval(), half, 700)
    assert (right == (logits.argmax(1) == half.labels[:700])).float().mean() > 0.995


def test_tuning_equals_a_plain_loop(kept):
    """On the half for w, by the search's SGD over a whole cosine, step by step."""
    searched = read(kept / "darts")
    searched.batch_size = 16                                # 4 steps an epoch
    w_half, _ = search.read_halves(searched, torch.device("cpu"))
    net, plain = figures.load_net(searched, 2), figures.load_net(searched, 2)
    figures.tune(net, searched, w_half, 2)
    batches = data.make_batches(w_half, 16, make_seed(2, "tune"))
    optimizer = torch.optim.SGD(plain.weights, 0.025, 0.9, weight_decay=5e-3)
    for step, (images, labels) in enumerate([*batches.epoch(0), *batches.epoch(1)]):
        optimizer.param_groups[0]["lr"] = 0.001 + 0.024 * (1 + math.cos(math.pi * step / 8)) / 2
        optimizer.zero_grad()
        F.cross_entropy(plain(images), labels).backward()
        torch.nn.utils.clip_grad_norm_(plain.weights, 5)
        optimizer.step()
    for a, b in zip(net.weights, plain.weights):
        assert_close(a, b)


@pytest.mark.parametrize("figure", [
    "1", "2 --images=20 --tune=1 --edge=normal:0-2", "3", "4", "5", "6", "overview"])
def test_every_figure_of_a_finished_and_an_unfinished_search_is_drawn(
        kept, monkeypatch, tmp_path, capsys, figure):
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(kept)
    figures.main([*figure.split(), "darts", "unfinished", f"--out={tmp_path}"])
    said = capsys.readouterr().out
    picture, numbers = map(Path, said.splitlines()[0].split(" and "))
    assert picture.read_bytes()[:4] == b"\x89PNG"
    _, unfinished = read_json(numbers)
    assert unfinished == "VS-DARTS, 1 of 2 epochs: unfinished"
    assert ("\n  " in said) == (figure[0] in "23456")       # what a claim of the paper rests on


def test_the_numbers_printed_for_the_claims():
    """Values plain to see; "early" and "after the early stages" leave out what they say."""
    variances = {"node 2": [9, 0.5], "node 3": [1, 2.0]}
    assert [*figures.claim3({"variance": variances}).values()] == [4]
    assert [*figures.claim4({"mean_by_epoch": [0.2, 0.3]}).values()] == [0.3]
    edges = {"0-5": [3] * 9, "1-5": [6, 24] * 3 + [300] * 3}
    sizes = {"|g| / |w|": edges, "|step| / |w|": {"0-5": [1] * 9}}
    assert [*figures.claim5(sizes).values()] == approx([4, 1])              # 2 and 8 times: 4
    pairs = {"avg_pool_3x3": {"skip_connect": [0, 0.8], "sep_conv_3x3": [0, 0.1]},
             "skip_connect": {"sep_conv_3x3": [0, 0.3]}, "sep_conv_3x3": {}}
    edge = {"variance ratio": [9, 1, 2, 3, 2], "sigma ratio": [9, 3, 2, 4, 3],
            "C": [5, 0.2], "squares": [1, 0.8], "covariances": pairs}
    assert [*figures.claim6({"normal:1-3": edge}).values()] == approx([1, 2 / 3, 0.25, 0.8, 0.2])
    *_, other = figures.claim6({"reduce:1-3": edge}).values()   # its skip connection has weights
    assert other == approx(0.4)


# ---------------------------------------------------------------- tables

def searched(*flags, **others):
    """The search.json of a search of 36 seconds."""
    return {**vars(search.parse([*flags])), "seconds": 36, "device": "Tesla", **others}


def retrained(folder, source, error=3.0, *flags, genotype="runs/1/genotype.json"):
    """A folder as retrain.py leaves it. source: the search.json that its cell is from, or None."""
    Path(folder).mkdir()
    args = retrain.parse([f"--genotype={genotype}", f"--out={folder}", *flags])
    result = {"test_error": error, "parameters": 1_000_000 + 100_000 * error}
    write(Path(folder, "config.json"), json.dumps({**vars(args), "search": source}))
    write(Path(folder, "result.json"), json.dumps(result))


def printed(capsys, *arguments):
    """The rows of a table, by their first column."""
    tables.main(arguments)
    lines = capsys.readouterr().out.splitlines()
    return {line.split(" | ")[0][2:]: line for line in lines if line.startswith("|")}


def test_a_row_has_the_mean_over_the_searches_of_a_method(capsys):
    for seed, error in enumerate((3.0, 4.0, 5.0)):
        retrained(f"vs{seed}", searched(*VS_DARTS, seconds=1800 * (seed + 2)), error)
    retrained("published", None, 2.0, genotype="P_DARTS")
    folders = ["vs0", "vs1", "vs2", "published"]
    ours = "4.00 ± 1.00 (3.00 4.00 5.00) | 1.400 | 1.50 h, Tesla |"
    assert printed(capsys, "4", *folders)["VS-DARTS"] == f"| VS-DARTS | 2.43 | {ours}"
    rows = printed(capsys, "1", *folders)
    assert rows["VS-DARTS (avg)"] == f"| VS-DARTS (avg) | 3.4 ± 0.3 | 2.50 ± 0.05 | 0.4 | {ours}"
    assert rows["VS-DARTS (best)"].endswith("| 0.4 | 3.00 (3.00) | 1.300 | 1.00 h, Tesla |")
    assert rows["P-DARTS"] == "| P-DARTS | 3.4 | 2.50 | 0.2 | 2.00 (2.00) | 1.200 | - |"


METHODS = """\
DARTS, first order |  | --weight_decay=3e-4
VS-DARTS, trust 0.5 |  | --node_norm --larc --sqrt_beta --larc_trust=0.5
DARTS-L2 + LARC, weight decay 0.1, clip |  | --larc --larc_clip --weight_decay=0.1
DARTS-ES | es | --weight_decay=3e-4
DARTS, second order | second_order | --weight_decay=3e-4
R-DARTS | r_darts | --weight_decay=3e-4
DARTS+PT | perturbation | --weight_decay=3e-4
"""                                                         # a row of Table 1 | program | flags


@pytest.mark.parametrize("line", METHODS.splitlines())
def test_a_row_is_of_a_method_and_says_what_differs_from_it(capsys, line):
    name, own, flags = line.split(" | ")
    retrained("run", searched(*flags.split(), method=own.strip()))
    assert " 3.00 (3.00) " in printed(capsys, "1", "run")[name]


def test_runs_of_two_protocols_share_no_table():
    retrained("es5", searched(method="es", window=5))
    retrained("ada", searched(method="ada", window=7))      # that of another method may differ
    retrained("longer", searched(), 3.0, "--epochs=7")
    retrained("s2", searched("--space=s2"))
    retrained("es7", searched(method="es", window=7))
    tables.main(["1", "es5", "ada"])
    for folder, said in {"longer": "--epochs 7 in longer, 600 in es5",
                         "s2": "search's --space s2 in s2, darts in es5",
                         "es7": "es's --window 7 in es7, 5 in es5"}.items():
        assert refusal(tables.main, ["1", "es5", folder]) == f"protocols differ: {said}"


@pytest.mark.parametrize("case", [
    "4 darts --dataset=cifar100", "4 darts --limit=100", "4 darts --image_size=16", "4 s2",
    "3 s2 --layers=8", "3 darts"])
def test_published_numbers_beside_their_like_only(capsys, case):
    number, space, *flags = case.split()
    retrained("run", searched(*VS_DARTS, f"--space={space}"), 3.0, *flags)
    _, _, row = printed(capsys, number, "run").values()
    assert row == "| VS-DARTS | - | 3.00 (3.00) | 1.300 | 0.01 h, Tesla |"


def test_table_3_is_one_for_each_data_set_and_space(capsys):
    retrained("s2", searched(*VS_DARTS, "--space=s2"), 9.0)
    retrained("s4", searched(*VS_DARTS, "--space=s4"), 20.0, "--dataset=cifar100")
    tables.main(["3", "s2", "s4"])
    lines = capsys.readouterr().out.splitlines()
    assert "| DARTS | 4.85 | - | - | - |" in lines and "| DARTS-ADA | 23.20 | - | - | - |" in lines
    assert "| VS-DARTS | 2.57 | 9.00 (9.00) | 1.900 | 0.01 h, Tesla |" in lines
    assert "| VS-DARTS | 20.69 | 20.00 (20.00) | 3.000 | 0.01 h, Tesla |" in lines


def test_table_2_counts_the_published_cells(monkeypatch, capsys):
    monkeypatch.setattr(tables, "PUBLISHED", {"DARTS_V2": PUBLISHED["DARTS_V2"]})
    numbers = "3,349,342 (3.3) | 2.76 | 4,718,752 (4.7) | 529,911,552 (574) | 26.7"
    assert numbers in printed(capsys, "2")["DARTS_V2"]


# ---------------------------------------------------------------- baselines

@pytest.mark.parametrize("flags", ["", "--larc", "--larc --larc_clip --larc_trust=0.02"])
def test_second_order_equals_double_backward(monkeypatch, flags):
    """But for an error of epsilon squared, which the kinks of ReLU would hide."""
    monkeypatch.setattr(F, "relu", lambda x, inplace=False: F.softplus(x))
    net, images, labels = tiny_net("s2")
    args = search.parse(["--learning_rate=0.1", *flags.split()])
    optimizer, _, _ = search.make_optimizers(net, args)
    search.weight_step(net, optimizer, images, labels, 5.0)     # so that there is momentum
    loss = F.cross_entropy(net(images), labels)
    grads, moved = torch.autograd.grad(loss, net.weights, create_graph=True), {}
    names = [name for name, _ in net.named_parameters() if "alphas" not in name]
    for name, w, g in zip(names, net.weights, grads):
        momentum = 0.9 * optimizer.state[w]["momentum_buffer"]
        moved[name] = w - 0.1 * (momentum + slow_step(args, w, g))
    valid = torch.randn_like(images)
    loss = F.cross_entropy(functional_call(net, moved, valid), labels)
    exact = torch.autograd.grad(loss, [*net.alphas.values()])
    batches = (valid, labels), (images, labels)
    found = baselines.second_order_gradient(net, optimizer, *batches, epsilon=1e-4)
    for a, b in zip(found, exact):
        assert_close(a, b, rtol=0, atol=1e-8)


def test_the_second_order_step_moves_alphas_only_and_draws_one_noise_for_each_batch(monkeypatch):
    net, *batch = tiny_net("s4")
    w_optimizer, alpha_optimizer, _ = search.make_optimizers(net, search.parse([]))
    search.weight_step(net, w_optimizer, *batch, 5.0)
    before, seeds = copy.deepcopy([net.state_dict(), w_optimizer.state_dict()]), []
    monkeypatch.setattr(torch, "manual_seed", seeds.append)
    parts = SimpleNamespace(net=net, w_optimizer=w_optimizer, alpha_optimizer=alpha_optimizer)
    baselines.second_order_step(parts, batch, batch)
    w, moved, plus, minus = seeds
    assert w == plus == minus != moved
    state = net.state_dict()
    changed = [name for name in state if not torch.equal(state[name], before[0][name])]
    assert changed == ["alphas.normal", "alphas.reduce"]
    assert tensors_equal(w_optimizer.state_dict(), before[1])


def test_second_order_gets_both_batches_of_its_step(monkeypatch):
    def gradient(net, w_optimizer, *batches):
        given.append(batches)
        return [torch.zeros_like(alpha) for alpha in net.alphas.values()]
    given = []
    monkeypatch.setattr(baselines, "second_order_gradient", gradient)
    baselines.main(["second_order", *small("--epochs=1", "--out=run")])
    halves = search.read_halves(search.parse(small()), torch.device("cpu"))
    w, alpha = (data.make_batches(half, 32, make_seed(2, purpose)).epoch(0)
                for half, purpose in zip(halves, ("w", "alpha")))
    assert tensors_equal(given, [*zip(alpha, w)])


def test_eigenvalue_equals_that_of_the_full_hessian():
    net, *batch = tiny_net("five")
    record, validation = {"epoch": 0, "seconds": 1}, SimpleNamespace(epoch=lambda _: iter([batch]))
    baselines.look_at_hessian(SimpleNamespace(net=net, validation=validation), record)

    def loss(alphas):
        normal, reduce = alphas.view(2, 5, 3)
        values = {"alphas.normal": normal, "alphas.reduce": reduce}
        return F.cross_entropy(functional_call(net, values, batch[0]), batch[1])
    alphas = torch.cat([alpha.detach().flatten() for alpha in net.alphas.values()])
    largest = torch.linalg.eigvalsh(torch.autograd.functional.hessian(loss, alphas))[-1]
    assert record["eigenvalue"] == approx(largest.item(), rel=1e-9)


def test_a_look_at_the_hessian_changes_nothing_of_the_search():
    """In S4, where every forward pass draws noise."""
    flags = small("--epochs=1", "--space=s4", "--weight_decay=3e-4")
    search.main([*flags, "--out=plain"])
    baselines.main(["es", *flags, "--out=es"])
    [plain], [es] = checkpoints("plain"), checkpoints("es")
    assert math.isfinite(es["log"][0].pop("eigenvalue"))
    assert tensors_equal(plain, es)


def test_an_infinite_loss_ends_es_in_one_line():
    flags = small("--learning_rate=2e9", "--grad_clip=2e9", "--out=run")
    assert "not finite after epoch 0" in refusal(baselines.main, ["es", *flags])


def test_alarm_on_made_up_eigenvalues():
    def alarms(values, window, first):
        """After 0, 1, ... epochs."""
        args = SimpleNamespace(window=window, ratio=0.75, first=first)
        log = [{"eigenvalue": value} for value in values]
        return [baselines.alarm(SimpleNamespace(args=args, log=log[:epochs]))
                for epochs in range(len(log) + 1)]
    values = [1, 1, 1, 1, 1.5, 4, 8]                        # averages of two: ..., 1, 1.25, 2.75, 6
    assert alarms(values, 2, first=3) == [None] * 6 + [4, 5]
    assert alarms(values, 2, first=7) == [None] * 7 + [5]
    assert alarms([1, 100, 100], 2, first=1) == [None] * 3 + [1]        # there is no epoch 0


@pytest.fixture
def rising(monkeypatch):
    """Eigenvalues that grow from epoch to epoch: there is an alarm as soon as there may be one."""
    monkeypatch.setattr(baselines, "look_at_hessian",
                        lambda parts, record: record.update(eigenvalue=10.0 ** record["epoch"]))


@pytest.mark.parametrize("first, kept", [(3, 0), (4, 2)])
def test_es_returns_to_the_epoch_before_an_alarm_or_keeps_the_last(rising, first, kept):
    flags = small("--epochs=3", "--window=2", f"--first={first}", "--arch_learning_rate=0.5")
    baselines.main(["es", *flags, "--out=run"])
    cells = [record["genotype"] for record in read_log("run/log.jsonl")]
    assert cells[0] != cells[1] != cells[2] != cells[0]
    assert read_json("run/genotype.json") == cells[kept]


def test_ada_goes_back_and_raises_the_weight_decay(rising, monkeypatch):
    """Both alarms go back to epoch 1: the end is that of a search which there turns to 0.03."""
    flags = small("--epochs=3", "--weight_decay=3e-4")
    baselines.main(["ada", *flags, "--window=1", "--first=2", "--out=ada"])
    names = ("log-before-0.003", "log-before-0.03", "log")
    log = sum((read_log(f"ada/{name}.jsonl") for name in names), [])
    assert [record["weight_decay"] for record in log] == [3e-4, 0.003, 3e-4, 0.03, 0.03]
    spent = sum(record["seconds"] for record in log)
    assert read_json("ada/search.json")["seconds"] == approx(spent)

    def train_epoch(parts, epoch, real=search.train_epoch):
        parts.w_optimizer.param_groups[0]["weight_decay"] = 0.03 if epoch > 0 else 3e-4
        return real(parts, epoch)
    monkeypatch.setattr(search, "train_epoch", train_epoch)
    search.main([*flags, "--out=plain"])
    [plain], [ada] = checkpoints("plain"), checkpoints("ada")       # the others are gone
    for name in ("net", "w_optimizer", "alpha_optimizer", "scheduler"):
        assert tensors_equal(plain[name], ada[name])


def test_r_darts_keeps_the_cell_of_the_lowest_validation_error(monkeypatch):
    """Of two that are as good, that of less weight decay."""
    errors, seen = {3e-4: 30, 9e-4: 20, 27e-4: 20, 81e-4: 25}, []
    monkeypatch.setattr(search, "search", lambda args, run: seen.append(args.weight_decay))
    monkeypatch.setattr(baselines, "train_briefly", lambda *given: errors[seen[-1]])
    monkeypatch.setattr(baselines, "load_genotype", str)
    monkeypatch.setattr(baselines, "finish", lambda run, cell: seen.append(cell))
    baselines.main(["r_darts", *small("--out=run")])
    assert seen == [*errors, "run/weight_decay-0.0009/genotype.json"]


def test_brief_training_sees_the_training_split_only(monkeypatch):
    """It trains on the half for w and is tested, not augmented, on that for alpha."""
    def train(genotype, flags, run, batches):
        train, test = batches(flags, None)
        assert (train.split, train.train, train.cutout) == (halves[0], True, 4)
        assert (test.split, test.train) == (halves[1], False)
        assert (flags.epochs, flags.layers, flags.init_channels, flags.amp) == (100, 8, 16, True)
        run.begin({}, {})
        write(run.result, '{"test_error": 12}')
    args = baselines.parse(small("--image_size=16", "--amp"), "r_darts")
    halves = search.read_halves(args, torch.device("cpu"))
    write("genotype.json", to_json(PUBLISHED["VS_DARTS"]))
    monkeypatch.setattr(retrain, "train", train)
    assert baselines.train_briefly(args, Path(), *halves) == 12


@pytest.mark.parametrize("removed", [("normal", 5, 2), ("reduce", 5, slice(None))])
def test_decisions_take_the_place_of_beta(removed):
    net, images, _ = tiny_net("darts")
    decisions, betas = baselines.Decisions(net), net.mixing_weights()
    for weights in (decisions.normal, betas["normal"].detach_()):
        weights[3], weights[4] = torch.eye(8)[4], 0
    betas[removed[0]].detach_()[removed[1:]] = 0
    logits, _ = slow_walk(net, images, betas)
    batches = [(images, logits.argmax(1)), (images, logits.argmin(1))]
    parts = SimpleNamespace(net=net.eval(), validation=SimpleNamespace(epoch=lambda turn: batches))
    assert baselines.accuracy_without(parts, decisions, 0, removed) == 50
    assert decisions.removed is None
    decisions.removed = removed
    assert_close(net(images), logits)


def test_an_edge_keeps_the_operation_without_which_accuracy_is_lowest():
    def kept(space, accuracies):
        decisions = baselines.Decisions(tiny_net(space)[0])
        record = decisions.decide_operation(
            "reduce", (1, 4), lambda removed: accuracies[removed[2]])
        return record["kept"], decisions.reduce[EDGES.index((1, 4))].tolist()
    assert kept("s3", [3, 2, 2]) == ("skip_connect", [0, 1, 0])
    assert kept("s3", [1, 2, 2]) == ("none", [1, 0, 0])
    assert kept("darts", [*range(8)])[0] == "max_pool_3x3"  # where DARTS+PT has no `none`


def test_a_node_loses_the_edge_without_which_accuracy_is_highest():
    decisions = baselines.Decisions(tiny_net("s3")[0])
    without = {0: 50, 1: 70, 2: 70, 3: 60, 4: 40}           # 2 goes, then 1, then 3
    record = decisions.decide_inputs("normal", 5, lambda removed: without[removed[1] - 9])
    assert record["kept"] == [0, 4]
    assert [[*tried] for tried in record["accuracies"]] == [[*range(5)], [0, 1, 3, 4], [0, 3, 4]]
    assert (decisions.normal[9:] == 0).all(1).tolist() == [False, True, True, True, False]


def test_edges_are_decided_at_random_in_each_cell_in_turn_and_then_nodes():
    turns = baselines.Decisions(tiny_net("darts")[0]).order(2)
    types, _, things = zip(*turns)
    normal, reduce = [*things[:28:2]], [*things[1:28:2]]
    assert types == ("normal", "reduce") * 17 and sorted(things[28::2]) == [3, 4, 5]
    assert sorted(normal) == sorted(reduce) == sorted(EDGES)
    assert [*EDGES] != normal != reduce != [*EDGES]


def test_where_none_was_kept_the_next_operation_takes_its_edge():
    decisions = baselines.Decisions(tiny_net("s3")[0])
    decisions.normal[:], decisions.reduce[:] = torch.eye(3)[2], torch.eye(3)[0]     # 0: `none`
    for fixed in decisions.buffers():                       # each node keeps its last two edges
        fixed[[i < j - 2 for i, j in EDGES]] = 0
    cell = decisions.genotype()
    for name, nodes in {"sep_conv_3x3": cell.normal, "skip_connect": cell.reduce}.items():
        assert [*nodes] == [((name, j - 2), (name, j - 1)) for j in (2, 3, 4, 5)]


def test_perturbation_tunes_the_searchs_network_between_pairs_of_decisions(kept, monkeypatch):
    """At a tenth of its rate; not after the last pair. Its seconds count too."""
    def train_epoch(parts, epoch):                          # trains nothing
        epochs.append(epoch)
        return {"train_loss": 1.0}
    epochs = []
    monkeypatch.setattr(search, "train_epoch", train_epoch)
    baselines.main(["perturbation", str(kept / "five"), "--tune_epochs=2", "--out=run"])
    before, after = torch.load(kept / "five/checkpoint.pt"), torch.load("run/checkpoint.pt")
    tuned = ["train_loss" in record for record in after["log"]]
    assert tuned == 5 * [False, True] + [False, False] and epochs == [*range(10)]
    assert after["w_optimizer"]["param_groups"][0]["lr"] == 0.0025
    assert torch.equal(before["net"]["classifier.weight"], after["net"]["classifier.weight"])
    spent = sum(record["seconds"] for record in before["log"] + after["log"])
    found = read_json("run/search.json")
    assert found["seconds"] == approx(spent) and found["method"] == "perturbation"


def test_perturbation_decides_on_the_images_of_its_search_only(kept, monkeypatch):
    images, labels, classes = data.load_digits(True)
    monkeypatch.setattr(data, "load_digits", lambda train: (255 - images, labels, classes))
    said = refusal(baselines.main, ["perturbation", str(kept / "five"), "--out=run"])
    assert "five/checkpoint.pt: the train_split was 128 images" in said


@pytest.mark.parametrize("method, flags, epochs", [
    ("second_order", "--epochs=2", 1),
    ("es", "--window=1 --first=2 --ratio=1000", 2),         # an alarm is due
    ("ada", "--epochs=3 --window=1 --first=2 --ratio=1000", 3),     # the second one is due
    ("r_darts", "--epochs=1 --train_epochs=2 --train_channels=2 --train_layers=3", 2),
    ("perturbation", "--tune_epochs=1", 3)])                # in the second pair of decisions
def test_a_stopped_run_goes_on_to_the_same_end(kept, method, flags, epochs):
    given = [str(kept / "five")] if method == "perturbation" else small()
    stop_and_resume(baselines.main, [method], [*given, *flags.split()], epochs)
    assert tensors_equal(checkpoints("whole"), checkpoints("parts"))
    assert read_json("whole/genotype.json") == read_json("parts/genotype.json")


# ---------------------------------------------------------------- the script of our runs

def listed(which):
    """The commands of runs.sh for DATA and runs, started here, in words."""
    script = Path(baselines.__file__).with_name("runs.sh")
    command = ["bash", script, which, "DATA", "runs", "--dry_run"]
    return [line.split() for line in subprocess.check_output(command, text=True).splitlines()]


@pytest.mark.parametrize("which, count", [("small", 38), ("nasbench201", 90)])
def test_each_run_of_the_script_has_the_flags_of_its_name(which, count):
    """And alpha's rate times its steps is the paper's."""
    commands = listed(which)
    names = nasbench201.METHODS | {"DARTS-ES": "es"}
    for words in commands:
        parser = baselines.make_parser("es") if "es" in words else None     # has another default
        args = search.parse(words[words.index("--dataset"):], parser)
        _, row, seed = Path(args.out).name.split("-")
        name = names[tables.method(vars(args))]
        assert name in (row.replace("trust_", ""), f"{row}_1")
        assert (args.data, args.seed) == ("DATA", int(seed))
        steps = args.epochs * math.ceil(args.limit / 2 / args.batch_size)
        assert steps * args.arch_learning_rate == approx(391 * 50 * 3e-4, 0.01)
    assert len({words[-1] for words in commands}) == count


def test_the_script_leaves_out_what_is_finished_and_resumes_what_has_begun():
    before = listed("nasbench201")
    for file in ("1/genotype.json", "2/result.json", "3/config.json"):
        Path("runs", f"nb201-darts_l2-{file}").parent.mkdir(parents=True)
        Path("runs", f"nb201-darts_l2-{file}").touch()
    Path("experiments").mkdir()
    write("experiments/nasbench201.jsonl", '{"method": "darts_l2", "seed": 0, "x": 1}')
    resumed = [*before[3][:3], "--resume", "runs/nb201-darts_l2-3"]
    assert listed("nasbench201") == [resumed, *before[4:]]


# ---------------------------------------------------------------- bad input

@pytest.mark.parametrize("command, said", [
    ("figures 3 five", "five/net-1.pt is missing: --keep_nets"),
    ("figures 6 darts --edge normal:3-2", "--edge normal:3-2: there is none"),
    ("figures 5 darts --edge normal:0-2", "--edge is not for figure 5"),
    ("figures 1 nothing", "nothing is no published cell"),
    ("figures 3 r", "r is a run of retrain.py, not of search.py"),
    ("tables 2 darts", "table 2 takes none"),
    ("tables 4 darts", "table 4 needs finished retrainings"),
    ("tables 3 r", "table 3 those of searched cells"),
    ("baselines nothing", "no method nothing: choose one of second_order, es, ada, r_darts, "),
    ("baselines es --max_decay=1", "unrecognized arguments: --max_decay=1"),
    ("baselines ada --weight_decay=0.1", "must be above 0 and below --max_decay 0.03"),
    ("baselines r_darts --weight_decay=1e-3", "r_darts takes no --weight_decay"),
    ("baselines perturbation unfinished", "a finished run of search.py, and unfinished is none")])
def test_bad_input_ends_in_a_line_that_says_why(kept, monkeypatch, capsys, command, said):
    monkeypatch.chdir(kept)
    program, *arguments = command.split()
    with pytest.raises(SystemExit) as error:
        {"figures": figures, "tables": tables, "baselines": baselines}[program].main(arguments)
    assert said in f"{error.value}{capsys.readouterr().err}"


def test_every_method_has_a_help_and_none_runs_under_torchrun(monkeypatch):
    for method in baselines.METHODS:
        with pytest.raises(SystemExit, match="0"):
            baselines.main([method, "--help"])
    monkeypatch.setattr(baselines, "WORLD", 2)
    assert "without torchrun" in refusal(baselines.main, ["es", "--resume=nothing"])
