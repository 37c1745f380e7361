"""Tests of the figures, tables and baselines, against the same computed the slow, obvious way.

    python -m pytest -q experiments
"""
import copy
import functools
import itertools
import json
import math
import re
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.func import functional_call

import data
import model
import retrain
import search
from experiments import baselines, figures, tables
from genotypes import DARTS_PRIMITIVES, EDGES, PUBLISHED, SPACES, load_genotype, to_json
from model import SuperNet, mixing_weights
from run import Run, make_seed, write
from test_vsdarts import SMALL, program, slow_norm, tensors_equal

VS_DARTS = ["--node_norm", "--larc", "--sqrt_beta"]
CELL_TYPES = ("normal", "reduce")
torch.set_num_threads(1)


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


@pytest.fixture(autouse=True)
def a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    """Finished searches, those in S3 with their super-networks, and folders that the programs refuse."""
    root = tmp_path_factory.mktemp("kept")
    for name, flags in {"darts": ["--space=s3", "--keep_nets"], "s2": ["--space=s2"],
                        "vs": ["--space=s3", "--keep_nets", *VS_DARTS],
                        "five": ["--epochs=1", "--node_norm"]}.items():
        search.main(small("--epochs=2", *flags, f"--out={root / name}"))
    for name, program in {"unfinished": "search.py", "pt": "experiments.baselines perturbation",
                          "es": "experiments.baselines es"}.items():
        shutil.copytree(root / "vs", root / name)
        config = root / name / "config.json"
        config.write_text(config.read_text().replace("search.py", program))
    for name in ("genotype.json", "net-2.pt"):              # it goes on after its first epoch
        (root / "unfinished" / name).unlink()
    log = (root / "vs/log.jsonl").read_text().splitlines()
    (root / "unfinished/log.jsonl").write_text(log[0])
    (root / "pt/log.jsonl").write_text('{"decision": 0}\n')
    (root / "nb").mkdir()
    (root / "nb/config.json").write_text('{"program": "experiments.nasbench201", "space": "nasbench201"}')
    s2 = "--space=s2"
    for name, source, *flags in (
            ("r", None), ("longer", None, "--epochs=7"), ("r2", searched(1, s2)),
            ("r3", searched(1, "--space=s3")), ("batch", searched(1, s2), "--batch_size=8"),
            ("es5", searched(1, s2, method="es", window=5)), ("es7", searched(1, s2, method="es", window=7))):
        retrained(root / name, source, 1.0, *flags)
    return root


def read(folder):
    return figures.read_search(str(folder), figures.parse(["3", str(folder)]))[1]


def read_log(path, without=()):
    records = map(json.loads, Path(path).read_text().splitlines())
    return [{key: value for key, value in record.items() if key not in without} for record in records]


def contents(folder):
    """{name: content} of all logs, but for what the clock measured, checkpoints and cells in a folder."""
    log = functools.partial(read_log, without=("seconds", "images/s"))
    found = {}
    for pattern, read in (("log*.jsonl", log), ("*.pt", torch.load), ("genotype.json", Path.read_text)):
        found |= {str(path.relative_to(folder)): read(path) for path in Path(folder).rglob(pattern)}
    return found


def slow_walk(net, images, weights=None):
    """Edge by edge: logits; of each cell its nodes, and of each edge (input, outputs, mixed)."""
    if weights is None:                                     # {cell type: (edges, operations)}
        weights = {cell_type: mixing_weights(alpha, net.sqrt_beta) for cell_type, alpha in net.alphas.items()}
    s0 = s1 = net.stem(images)
    cells = []
    for cell_type, cell in zip(net.cell_types, net.cells):
        nodes, edges = [cell.preprocess0(s0), cell.preprocess1(s1)], {}
        for j in range(2, 6):
            for i in range(j):
                primitives, ops = net.space[cell_type][i, j], cell.edges[f"{i}-{j}"].ops
                outputs = {name: ops[name](nodes[i]) for name in primitives if name != "none"}
                row = dict(zip(primitives, weights[cell_type][EDGES.index((i, j))]))
                edges[i, j] = nodes[i], outputs, sum(row[name] * y for name, y in outputs.items())
            x_j = sum(edges[i, j][2] for i in range(j))
            nodes.append(x_j if isinstance(cell.normalize[j - 2], torch.nn.Identity) else slow_norm(x_j))
        cells.append((nodes, edges))
        s0, s1 = s1, torch.cat(nodes[2:], 1)
    return net.classifier(s1.mean((2, 3))), cells


def slow_covariance(x, y):
    """One channel after the other, in numpy."""
    channels = zip(x.detach().transpose(0, 1).numpy(), y.detach().transpose(0, 1).numpy())
    return np.mean([np.cov(a.flatten(), b.flatten(), bias=True)[0, 1] for a, b in channels])


def tiny_net(space="s3", node_norm=True, sqrt_beta=True, layers=3):
    """A super-network with alphas far from uniform, and a batch; float64."""
    torch.manual_seed(0)
    net = SuperNet(SPACES[space], 2, layers, 10, node_norm, sqrt_beta, stem_multiplier=1)
    for alpha in net.alphas.values():
        alpha.data.normal_()
    return net.double().train(), torch.randn(16, 3, 8, 8).double(), torch.randint(10, (16,))


# ---------------------------------------------------------------- figures

@pytest.mark.parametrize("node_norm", [False, True])
def test_figure_3_equals_brute_force(node_norm):
    net, images, _ = tiny_net(node_norm=node_norm, layers=4)
    logits, cells = slow_walk(net, images)
    torch.testing.assert_close(logits, net(images))
    for layer, (nodes, _) in enumerate(cells):
        expected = {f"node {j}": slow_covariance(nodes[j], nodes[j]) for j in range(2, 6)}
        assert figures.node_variances(net, layer, images) == pytest.approx(expected)
        assert not node_norm or [*expected.values()] == pytest.approx([1] * 4, abs=1e-3)
    assert not any(module._forward_hooks for module in net.modules())


def test_figure_4_equals_a_loop_over_edges():
    alphas = {cell_type: torch.randn(14, 8).tolist() for cell_type in CELL_TYPES}
    log = [{"beta_none": 0.125}, {"alphas": alphas, "beta_none": 0.2}]
    numbers, expected = figures.measure4(SimpleNamespace(space="darts", log=log), None), {}
    for cell_type, j in itertools.product(CELL_TYPES, range(2, 6)):
        rows = [alphas[cell_type][EDGES.index((i, j))] for i in range(j)]
        betas = [math.exp(row[0]) / sum(map(math.exp, row)) for row in rows]
        expected[f"{cell_type[0].upper()}{j}"] = sum(betas) / j
    assert numbers["none"] == pytest.approx(expected) and numbers["uniform"] == 1 / 8
    assert numbers["mean_by_epoch"] == [0.125, 0.2]


@pytest.mark.parametrize("switches", ["--grad_clip 0.01", "--larc", "--larc --larc_clip --larc_trust 0.02"])
def test_figure_5_equals_a_step_by_its_formula(switches):
    net, images, labels = tiny_net()
    args = search.parse(["--learning_rate", "0.1", *switches.split()])
    loss = F.cross_entropy(net(images), labels)
    grads = dict(zip(net.weights, torch.autograd.grad(loss, net.weights)))
    clip = min(1, args.grad_clip / torch.cat([g.flatten() for g in grads.values()]).norm())
    measured = figures.sep_conv_gradients(net, 0, images, labels, args)
    assert list(measured) == [f"{i}-5" for i in range(5)]
    for edge, sizes in measured.items():
        squares = np.zeros(3)                               # of w, g and the step
        for w in net.cells[0].edges[edge].ops["sep_conv_3x3"].parameters():
            g = clip * grads[w]
            f = args.larc_trust * w.norm() / (g.norm() + 5e-3 * w.norm() + 1e-8) if args.larc else 1
            step = 0.1 * (min(f / 0.1, 1) if args.larc_clip else f) * (g + 5e-3 * w)
            squares += [(part ** 2).sum().item() for part in (w, grads[w], step)]
        w, g, step = np.sqrt(squares)
        assert sizes == pytest.approx([g, g / w, step / w])


@pytest.mark.parametrize("cell_type, layer, i, j", [("normal", 2, 2, 4), ("reduce", 3, 1, 3)])
@pytest.mark.parametrize("sqrt_beta", [False, True])
def test_figure_6_equals_brute_force(cell_type, layer, i, j, sqrt_beta):
    net, images, _ = tiny_net("darts", sqrt_beta=sqrt_beta, layers=5)       # cells N R N R N
    _, cells = slow_walk(net, images)
    x, outputs, mixed = cells[layer][1][i, j]
    row = EDGES.index((i, j))
    values = figures.mixed_variance(net, cell_type, row, images)
    cov = {a: {b: slow_covariance(y, z) for b, z in outputs.items()} for a, y in outputs.items()}
    assert values["variance"] == pytest.approx(slow_covariance(mixed, mixed))
    ratio = slow_covariance(mixed, mixed) / slow_covariance(x, x)
    assert [values[key] for key in figures.RATIOS] == pytest.approx([ratio, math.sqrt(ratio)])
    for name, line in values["covariances"].items():
        assert line == pytest.approx(cov[name], abs=1e-12)
    beta = torch.softmax(net.alphas[cell_type][row], 0).tolist()
    for suffix, total in (("", 1), ("_without_none", 1 - beta[0])):
        w = {name: (b / total) ** (0.5 if sqrt_beta else 1) for name, b in zip(DARTS_PRIMITIVES, beta)}
        own = sum(w[a] ** 2 * cov[a][a] for a in cov)
        C = sum(w[a] * w[b] * cov[a][b] for a, b in itertools.permutations(cov, 2))
        assert (values[f"squares{suffix}"], values[f"C{suffix}"]) == pytest.approx((own, C))
    if sqrt_beta and cell_type == "normal":                      # Eq. 6: 1, over all operations but none
        assert values["squares_without_none"] == pytest.approx(1, abs=1e-2) and values["squares"] < 0.99


def test_tau_counts_pairs_and_its_ceiling_is_that_of_two_halves_of_the_images():
    right = torch.tensor([[1, 1, 1, 0, 1, 0], [1, 1, 0, 0, 0, 0], [0, 1, 0, 1, 0, 1]])
    numbers = figures.compare([0.2, 0.3, 0.5], [*right.bool()])             # even: 3 1 0; odd: 1 1 3
    assert numbers["accuracy"] == pytest.approx([100 * 4 / 6, 100 * 2 / 6, 100 * 3 / 6])
    assert numbers["tau"] == pytest.approx((-1 - 1 + 1) / 3)
    assert numbers["ceiling"] == pytest.approx((0 - 1 - 1) / 3)             # a tie counts for neither


@pytest.mark.parametrize("shuffled", [False, True])
def test_figure_2_on_a_rigged_super_network(monkeypatch, shuffled):
    """Right for images below the strength of the mixture: an operation's accuracy grows with its strength."""
    net, images = tiny_net("darts")[0], torch.linspace(-10, 10, 20_000)
    net.strengths = {cell_type: torch.stack([torch.randperm(8) - 3.5 for _ in EDGES]) for cell_type in CELL_TYPES}
    for cell_type, alpha in net.alphas.items():
        alpha.data = net.strengths[cell_type][:, torch.randperm(8) if shuffled else slice(None)].double()

    def answers(net, half, limit):
        return images < sum((beta * net.strengths[cell_type]).sum() for cell_type, beta in net.betas().items()) / 28
    monkeypatch.setattr(figures, "load_net", lambda run, epoch: net)
    monkeypatch.setattr(search, "read_halves", lambda run, device: (None, None))
    monkeypatch.setattr(figures, "answers", answers)
    monkeypatch.setattr(figures, "tune", lambda net, *a: net.strengths["normal"].neg_())    # upside down
    run = SimpleNamespace(log=[], device="cpu", folder="rigged")
    options = SimpleNamespace(epoch=None, edge=["normal:0-2"], tune=3, images=None)
    before = net.betas()
    numbers = figures.measure2(run, options)
    assert tensors_equal(net.betas(), before)
    edges = numbers["edges"].values()
    assert len(edges) == 28 and all(edge["operations"] == [*DARTS_PRIMITIVES[1:]] for edge in edges)
    assert shuffled or [edge["tuned"]["tau"] for edge in edges if "tuned" in edge] == [-1]
    means, taus = numbers["means"], [edge["at once"]["tau"] for edge in edges]
    assert means["mean tau, at once"] == np.mean(taus) and means["mean ceiling, at once"] > 0.99
    assert abs(np.mean(taus)) < 0.25 if shuffled else (np.mean(taus), means["mean tau, tuned"]) == (1, -1)


@pytest.mark.parametrize("space, edge, sqrt_beta", [("s3", "normal:1-3", False), ("s1", "reduce:2-5", True)])
def test_one_operation_alone_equals_brute_force(space, edge, sqrt_beta):
    """Against weights of 1 for that operation, and 0 for the others."""
    net, images, _ = tiny_net(space, sqrt_beta=sqrt_beta)
    cell_type, row, primitives = figures.edge_row(SPACES[space], edge)
    weights = {cell_type: mixing_weights(alpha, sqrt_beta).detach() for cell_type, alpha in net.alphas.items()}
    measured = []
    for operation in range(len(primitives)):
        figures.alone(net, cell_type, row, operation)
        measured.append(net(images))
        weights[cell_type][row] = torch.eye(len(primitives))[operation]
        torch.testing.assert_close(measured[-1], slow_walk(net, images, weights)[0])
    assert (measured[0] - measured[1]).abs().max() > 1e-3


def test_answers_are_those_of_images_normalized_by_batch():
    net, half = tiny_net("s2")[0].float(), data.load("digits", "unused", True)
    images = data.normalize(half.images[:700], half.spec)
    logits = torch.cat([slow_walk(net, part)[0] for part in images.split(512)])
    expected, right = logits.argmax(1) == half.labels[:700], figures.answers(net.eval(), half, 700)
    assert right.shape == (700,) and (right == expected).float().mean() > 0.995 and expected.any()


def test_tuning_equals_a_plain_loop(kept):
    """Of weights only, on their half, by the search's SGD over a whole cosine, step by step."""
    searched = read(kept / "darts")
    searched.batch_size = 16                                # 4 steps an epoch
    w_half, _ = search.read_halves(searched, torch.device("cpu"))
    net, start, plain = (figures.load_net(searched, 2).train() for _ in range(3))
    figures.alone(net, "normal", 4, 2)
    figures.tune(net, searched, w_half, 2)
    plain.alphas["normal"].data[4] = torch.tensor([-1e9, -1e9, 1e9])
    batches = data.Batches(data.load("digits", "unused", True).part(0, 64), 16, make_seed(2, "tune"))
    optimizer = torch.optim.SGD(plain.weights, 0.025, 0.9, weight_decay=5e-3)
    for step, (images, labels) in enumerate([*batches.epoch(0), *batches.epoch(1)]):
        optimizer.param_groups[0]["lr"] = 0.001 + 0.024 * (1 + math.cos(math.pi * step / 8)) / 2
        optimizer.zero_grad()
        F.cross_entropy(plain(images), labels).backward()
        torch.nn.utils.clip_grad_norm_(plain.weights, 5)
        optimizer.step()
    for a, b, before in zip(net.weights, plain.weights, start.weights):
        torch.testing.assert_close(a, b)
        assert not torch.equal(a, before)
    assert torch.equal(net.alphas["reduce"], start.alphas["reduce"])


@pytest.mark.parametrize("name", ["vs", "darts"])
def test_figure_3_follows_a_run_over_its_epochs(kept, name):
    """The numbers of an epoch are those of its kept network on the first batch of the half for alpha."""
    values = figures.measure3(read(kept / name), None)["variance"]
    assert len(values["node 2"]) == 3
    split = data.load("digits", "unused", True)
    images = data.normalize(split.images[64:96], split.spec)
    net = SuperNet(SPACES["s3"], 2, 3, node_norm=name == "vs", sqrt_beta=name == "vs").train()
    for epoch in range(3):
        net.load_state_dict(torch.load(kept / name / f"net-{epoch}.pt"))
        nodes = slow_walk(net, images)[1][0][0]
        expected = [slow_covariance(x_j, x_j) for x_j in nodes[2:]]
        assert [line[epoch] for line in values.values()] == pytest.approx(expected, rel=1e-3)


def test_figure_5_takes_the_half_for_w_and_the_rates_of_the_epoch(kept, monkeypatch):
    searched, seen = read(kept / "darts"), []
    searched.log[1]["weight_decay"] = 0.03                  # as ADA logs it

    def gradients(net, layer, images, labels, args):
        seen.append((args.learning_rate, args.weight_decay))
        torch.testing.assert_close(images, data.normalize(split.images[:32], split.spec))
        return {"0-5": (1, 2, 3)}
    split = data.load("digits", "unused", True)
    monkeypatch.setattr(figures, "sep_conv_gradients", gradients)
    sizes = {"|g|": 1, "|g| / |w|": 2, "|step| / |w|": 3}
    assert figures.measure5(searched, None) == {key: {"0-5": [n] * 3} for key, n in sizes.items()}
    assert sum(seen, ()) == pytest.approx((0.025, 5e-3, 0.013, 0.03, 0.013, 0.03))


def test_an_unfinished_search_is_drawn_as_far_as_it_is(kept):
    options = figures.parse(["3", str(kept / "unfinished")])
    title, run = figures.read_search(str(kept / "unfinished"), options)
    assert title == f"VS-DARTS, 1 of 2 epochs: {kept / 'unfinished'}"
    whole, part = (figures.measure3(r, None)["variance"] for r in (read(kept / "vs"), run))
    assert part == {node: values[:2] for node, values in whole.items()}
    _, cell = figures.read_cell(str(kept / "unfinished"), options)
    assert cell.normal == read(kept / "vs").log[0]["genotype"]["normal"]
    assert figures.measure4(run, None)["mean_by_epoch"] == [read(kept / "vs").log[0]["beta_none"]]


@pytest.mark.parametrize("arguments", [
    "1 NASNet_A vs vs/genotype.json", "1 unfinished", "2 unfinished --images 20 --tune 1 --edge normal:0-2",
    "3 darts vs", "4 darts unfinished", "5 darts unfinished", "6 darts unfinished", "overview s2 unfinished"])
def test_every_figure_is_drawn_with_its_numbers(kept, tmp_path, capsys, monkeypatch, arguments):
    Figure = pytest.importorskip("matplotlib.figure").Figure
    pages, savefig = [], Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda page, *a, **b: pages.append(page) or savefig(page, *a, **b))
    monkeypatch.chdir(kept)
    figures.main([*arguments.split(), f"--out={tmp_path / 'out'}"])
    first, *claims = capsys.readouterr().out.strip().splitlines()
    picture, numbers = map(Path, first.split(" and "))
    assert bool(claims) == (arguments[0] in "23456")
    assert picture.read_bytes()[:4] == b"\x89PNG" and {*tmp_path.glob("out/*")} == {picture, numbers}
    runs = [word for word in arguments.split()[1:] if Path(word).exists() or word in PUBLISHED]
    assert [title.split(": ")[-1] for title in json.loads(numbers.read_text())] == runs
    for ax in pages[0].axes:                                # legends hide no data, epochs are whole
        if ax.get_legend():
            assert not ax.get_legend().get_window_extent().overlaps(ax.get_window_extent())
        if ax.get_xlabel() == "epoch":
            assert all(tick == round(tick) for tick in ax.get_xticks())


def test_the_numbers_printed_for_the_claims():
    """Against values that are plain to see; "early" and "after the early stages" leave out what they say."""
    assert list(figures.claim3({"variance": {"node 2": [9, 0.5], "node 3": [1, 2.0]}}).values()) == [4]
    assert list(figures.claim4({"mean_by_epoch": [0.2, 0.3]}).values()) == [0.3]
    edges = {"0-5": [3] * 9, "1-5": [6, 24] * 3 + [300] * 3, "2-5": [4] * 9}            # 2 and 8 times
    sizes = {"|g| / |w|": edges, "|step| / |w|": {"0-5": [1] * 9, "1-5": [1] * 9}}
    assert [*figures.claim5(sizes).values()] == pytest.approx([4, 1])                   # the root of 2 x 8
    pairs = {"avg_pool_3x3": {"skip_connect": [0, 0.8], "sep_conv_3x3": [0, 0.1]},
             "skip_connect": {"sep_conv_3x3": [0, 0.3]}, "sep_conv_3x3": {}}
    edge = {"variance ratio": [9, 9, 1, 2, 3, *[2] * 6], "sigma ratio": [9, 9, 3, 2, 4, *[3] * 6],
            "C": [5, 0.2], "squares": [1, 0.8], "covariances": pairs}
    assert [*figures.claim6({"normal:1-3": edge}).values()] == pytest.approx([1, 2 / 3, 0.25, 0.8, 0.2])
    claims = figures.claim6({"reduce:1-3": edge})           # there the skip connection has weights
    assert [*claims.values()] == pytest.approx([1, 2 / 3, 0.25, 0.4])


def test_drawing_needs_matplotlib_but_no_backend(kept, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    python = ("env", "MPLBACKEND=not_installed", sys.executable)
    _, errors, status = program("-m", "experiments.figures", 1, "GDAS", f"--out={tmp_path}", launcher=python)
    assert status == 0 and Path("figure1.png").exists(), errors
    monkeypatch.setattr(figures, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match="^drawing needs matplotlib: pip install matplotlib$"):
        figures.main(["3", str(kept / "vs"), "--out=new"])
    assert not Path("new").exists()


# ---------------------------------------------------------------- tables

def searched(seconds, *flags, **others):
    """The search.json of a search."""
    found = {"seconds": seconds, "device": "Tesla", "genotype": {}}
    return {**vars(search.parse([*flags])), **found, **others}


def retrained(folder, source, error, *flags, genotype="runs/1/genotype.json", cell=None, **read):
    """A folder as retrain.py leaves it. error: None if it is not finished."""
    folder = Path(folder)
    folder.mkdir()
    args = retrain.parse([f"--genotype={genotype}", f"--out={folder}", *flags])
    write(folder / "config.json", json.dumps({**vars(args), "processes": 1, "search": source}))
    write(folder / "genotype.json", json.dumps({"normal": cell}))
    if error is not None:
        result = {"test_error": error, "parameters": 1_000_000 + round(100_000 * error), **read}
        write(folder / "result.json", json.dumps(result))


def printed(capsys, *arguments):
    """{name: row} of a table, the line above it, and stderr."""
    tables.main(arguments)
    out, errors = capsys.readouterr()
    rows = {line.split(" | ")[0][2:]: line for line in out.splitlines() if line.startswith("|")}
    return rows, out.strip().splitlines()[0], errors


def test_a_row_has_the_mean_over_the_searches_of_a_method(capsys):
    for seed, error in enumerate((3.0, 4.0, 5.0)):
        retrained(f"vs{seed}", searched(1800 * (seed + 2), *VS_DARTS), error, cell=seed)
    retrained("norm", searched(36, "--node_norm"), 9.0)
    retrained("published", None, 2.0, genotype="P_DARTS")
    retrained("unfinished", None, None)
    Path("figures").mkdir()
    folders = sorted(map(str, Path().iterdir()))
    rows, above, errors = printed(capsys, "4", *folders)
    assert errors == "unfinished is left out: it is not finished\n"
    assert above == ("Retrained on cifar10, all images, 600 epochs, 20 cells, 36 channels; searched on "
                     "cifar10, all images, space darts, 50 epochs, 8 cells, 16 channels")
    assert list(rows)[2:] == ["DARTS-L2", "DARTS-L2 + node norm", "DARTS-L2 + node norm + LARC",
                              "VS-DARTS", "P_DARTS"]
    assert rows["DARTS-L2"] == "| DARTS-L2 | 2.91 | - | - | - |"
    assert rows["DARTS-L2 + node norm"].endswith("2.71 | 9.00 (9.00) | 1.900 | 0.01 h, Tesla |")
    ours = "4.00 ± 1.00 (3.00 4.00 5.00) | 1.400 | 1.50 h, Tesla |"
    assert rows["VS-DARTS"] == f"| VS-DARTS | 2.43 | {ours}"
    rows, _, _ = printed(capsys, "1", *folders)
    assert rows["VS-DARTS (avg)"].endswith(ours)
    assert rows["VS-DARTS (best)"].endswith("| 0.4 | 3.00 (3.00) | 1.300 | 1.00 h, Tesla |")
    assert rows["P-DARTS"] == "| P-DARTS | 3.4 | 2.50 | 0.2 | 2.00 (2.00) | 1.200 | - |"
    assert rows["GDAS"] == "| GDAS | 3.4 | 2.93 | 0.2 | - | - | - |"


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
    retrained("run", searched(36, *flags.split(), method=own.strip(), window=5), 3.0)
    retrained("ada", searched(36, method="ada", window=7), 4.0)             # a method's own flag
    assert " 3.00 (3.00) " in printed(capsys, "1", "run", "ada")[0][name]


def test_cells_that_differ_share_no_row(capsys):
    for name, file, cell in zip("abcd", ("cri1", "cri2", "cri1", "cri1"), (1, 2, 1, 3)):
        retrained(name, None, cell, genotype=file, cell=cell)
    rows, _, _ = printed(capsys, "4", *"abcd")
    assert [row for row in rows.values() if "no search" in row] == [
        "| cri1 (no search) | - | 1.00 ± 0.00 (1.00 1.00) | 1.100 | - |",
        "| cri1 (no search) * | - | 3.00 (3.00) | 1.300 | - |",
        "| cri2 (no search) | - | 2.00 (2.00) | 1.200 | - |"]


def test_a_run_counts_once(capsys):
    retrained("run", searched(36, *VS_DARTS), 3.0)
    Path("link").symlink_to("run")
    shutil.copytree("run", "copy")
    rows, _, errors = printed(capsys, "4", "run", "run/", "link", "copy")
    assert " 3.00 (3.00) " in rows["VS-DARTS"]
    assert errors.splitlines() == [f"{name} is left out: it is the same run as run"
                                   for name in ("run", "link", "copy")]


def test_runs_on_different_images_share_no_table():
    retrained("old", searched(36), 3.0)                     # it does not say
    retrained("few", searched(36, train_split="9 images"), 3.0, test_split="8 images")
    retrained("many", searched(36, train_split="10 images"), 3.0)
    retrained("test", searched(36), 3.0, test_split="7 images")
    tables.main(["1", "old", "few"])
    with pytest.raises(SystemExit, match="search's train_split 10 images in many, 9 images in few"):
        tables.main(["1", "old", "few", "many"])
    with pytest.raises(SystemExit, match="differ: test_split 7 images in test, 8 images in few"):
        tables.main(["1", "old", "few", "test"])


@pytest.mark.parametrize("case", [
    "14 darts --dataset=digits", "14 darts --dataset=cifar100", "14 darts --limit=100",
    "14 darts --image_size=16", "14 s2", "134 s2 --layers=8", "3 s2 --dataset=digits", "3 darts"])
def test_published_numbers_beside_their_like_only(capsys, case):
    numbers, space, *flags = case.split()
    retrained("run", searched(36, *VS_DARTS, f"--space={space}"), 3.0, *flags)
    for number in numbers:
        rows, _, _ = printed(capsys, number, "run")
        dashes = "- | - | -" if number == "1" else "-"
        ours = "3.00 (3.00) | 1.300 | 0.01 h, Tesla"
        assert rows.pop("VS-DARTS") == f"| VS-DARTS | {dashes} | {ours} |"
        assert rows.keys() - {"method", "---"} <= {"VS-DARTS (best)"}


def test_table_3(capsys):
    retrained("s2", searched(36, *VS_DARTS, "--space=s2"), 9.0)
    retrained("s4", searched(36, *VS_DARTS, "--space=s4"), 20.0, "--dataset=cifar100")
    tables.main(["3", "s2", "s4"])
    lines = capsys.readouterr().out.splitlines()
    assert "| DARTS | 4.85 | - | - | - |" in lines and "| DARTS-ADA | 23.20 | - | - | - |" in lines
    assert "| VS-DARTS | 2.57 | 9.00 (9.00) | 1.900 | 0.01 h, Tesla |" in lines
    assert "| VS-DARTS | 20.69 | 20.00 (20.00) | 3.000 | 0.01 h, Tesla |" in lines
    assert sum(line.startswith("Retrained") for line in lines) == 2
    assert len(lines) == 2 * (3 + 2 + 7)


def test_table_2(monkeypatch, capsys):
    two = {name: PUBLISHED[name] for name in ("DARTS_V2", "DARTS_PT_3")}
    monkeypatch.setattr(tables, "PUBLISHED", two)
    rows, _, _ = printed(capsys, "2")
    numbers = "3,349,342 (3.3) | 2.76 | 4,718,752 (4.7) | 529,911,552 (574) | 26.7"
    assert numbers in rows["DARTS_V2"]
    assert " (3.33) | - | " in rows["DARTS_PT_3"] and len(rows) == 4


# ---------------------------------------------------------------- baselines

@pytest.mark.parametrize("flags", [[], ["--larc"], ["--larc", "--larc_clip", "--larc_trust=0.02"]])
def test_second_order_equals_double_backward(monkeypatch, flags):
    """Against the derivative through the step. Kinks would hide that the error falls as epsilon squared."""
    monkeypatch.setattr(F, "relu", lambda x, inplace=False: F.softplus(x))
    net, images, labels = tiny_net("s2")
    args = search.parse(["--learning_rate=0.1", *flags])
    optimizer, _, _ = search.make_optimizers(net, args)
    search.weight_step(net, optimizer, images, labels, 5.0)                 # so that there is momentum
    valid = torch.randn_like(images), torch.randint(10, labels.shape)
    names = {id(parameter): name for name, parameter in net.named_parameters()}
    alphas, moved = list(net.alphas.values()), {}
    loss = F.cross_entropy(net(images), labels)
    for w, g in zip(net.weights, torch.autograd.grad(loss, net.weights, create_graph=True)):
        ratio = (args.larc_trust * w.norm() / (g.norm() + 5e-3 * w.norm() + 1e-8)).detach()
        factor = 1 if not args.larc else min(ratio / 0.1, 1) if args.larc_clip else ratio
        momentum = 0.9 * optimizer.state[w]["momentum_buffer"]
        moved[names[id(w)]] = w - 0.1 * (momentum + factor * (g + 5e-3 * w))
    exact = torch.autograd.grad(F.cross_entropy(functional_call(net, moved, valid[:1]), valid[1]), alphas)

    def error(found):
        return max((a - b).abs().max() for a, b in zip(found, exact))
    gradient = functools.partial(baselines.second_order_gradient, net, optimizer, valid, (images, labels))
    coarse, fine = error(gradient(epsilon=1e-2)), error(gradient(epsilon=1e-3))
    assert fine < 1e-3 * max(a.abs().max() for a in exact) and 90 < coarse / fine < 110
    first_order = torch.autograd.grad(F.cross_entropy(net(valid[0]), valid[1]), alphas)
    assert error(first_order) > 100 * fine


def test_the_second_order_step_moves_alphas_only(monkeypatch):
    """In S4: all passes over the training batch see one noise, and the validation batch another."""
    net, *w_batch = tiny_net("s4")
    drawn, forward = [], model.Noise.forward
    monkeypatch.setattr(model.Noise, "forward", lambda self, x: drawn.append(forward(self, x)) or drawn[-1])
    parts = SimpleNamespace(net=net)
    parts.w_optimizer, parts.alpha_optimizer, _ = search.make_optimizers(net, search.parse([]))
    search.weight_step(net, parts.w_optimizer, *w_batch, 5.0)
    before = copy.deepcopy([net.state_dict(), parts.w_optimizer.state_dict()])
    drawn.clear()
    baselines.second_order_step(parts, w_batch, w_batch)
    net.eval()(w_batch[0])                                  # as the pass that follows
    w, moved, plus, minus, then = (drawn[k:k + 42] for k in range(0, 5 * 42, 42))
    assert len(drawn) == 5 * 42 and tensors_equal(w, plus) and tensors_equal(plus, minus)
    assert not any(torch.equal(a[0], b[0]) for a, b in itertools.combinations((w, moved, then), 2))
    after = [net.state_dict(), parts.w_optimizer.state_dict()]
    for cell_type in CELL_TYPES:
        assert not torch.equal(*(state[0].pop(f"alphas.{cell_type}") for state in (before, after)))
    assert tensors_equal(before, after)


def test_second_order_gets_both_batches_of_its_step(monkeypatch):
    given = []
    monkeypatch.setattr(baselines, "second_order_gradient", lambda net, w_optimizer, *batches:
                        given.append(batches) or [0 * alpha.detach() for alpha in net.alphas.values()])
    baselines.main(["second_order", *small("--epochs=1", "--out=run")])
    halves = search.read_halves(search.parse(small()), torch.device("cpu"))
    w, alpha = (data.Batches(half, 32, make_seed(2, name)) for half, name in zip(halves, ("w", "alpha")))
    assert tensors_equal(given, list(zip(alpha.epoch(0), w.epoch(0))))


@pytest.fixture
def rising(monkeypatch):
    """Eigenvalues that grow as the learning rate falls: they depend on the epoch alone."""
    monkeypatch.setattr(baselines, "look_at_hessian",
                        lambda parts, record: record.update(eigenvalue=record["lr"] ** -2))


def test_eigenvalue_equals_that_of_the_full_hessian():
    net, images, labels = tiny_net("five")
    state, record = copy.deepcopy(net.state_dict()), {"epoch": 0, "seconds": 1.0}
    validation = SimpleNamespace(epoch=lambda epoch: iter([(images, labels)]))
    baselines.look_at_hessian(SimpleNamespace(net=net, validation=validation), record)
    assert tensors_equal(state, net.state_dict()) and record["seconds"] > 1

    def loss(alphas):
        values = {"alphas.normal": alphas[:15].view(5, 3), "alphas.reduce": alphas[15:].view(5, 3)}
        return F.cross_entropy(functional_call(net, values, (images,)), labels)
    alphas = torch.cat([alpha.detach().flatten() for alpha in net.alphas.values()])
    largest = torch.linalg.eigvalsh(torch.autograd.functional.hessian(loss, alphas))[-1]
    assert record["eigenvalue"] == pytest.approx(largest.item(), rel=1e-9)


def test_a_look_at_the_hessian_changes_nothing_of_the_search():
    """In S4, where every forward pass draws noise."""
    flags = small("--epochs=2", "--space=s4", "--weight_decay=3e-4")
    search.main([*flags, "--out=plain"])
    baselines.main(["es", *flags, "--out=es"])
    plain, es = contents("plain"), contents("es")
    assert all(math.isfinite(record.pop("eigenvalue")) for record in es["log.jsonl"])
    assert tensors_equal(plain, es)


def alarms(values, window, ratio, first):
    """alarm() after 0, 1, ... epochs."""
    args, log = SimpleNamespace(window=window, ratio=ratio, first=first), [{"eigenvalue": v} for v in values]
    return [baselines.alarm(SimpleNamespace(args=args, log=log[:epochs])) for epochs in range(len(log) + 1)]


def test_alarm_on_made_up_eigenvalues():
    values = [1, 1, 1, 1, 2, 4, 8]                          # averages of two: 1, 1, 1, 1, 1.5, 3, 6
    assert alarms(values, 2, 0.75, first=3) == [None, None, None, None, None, 3, 4, 5]
    assert alarms(values, 2, 0.75, first=7) == [None, None, None, None, None, None, None, 5]
    assert alarms([1, 100, 100], 2, 0.75, first=1) == [None, None, None, 1]     # there is no epoch 0
    assert alarms(20 * [1], 5, 0.75, first=10) == 21 * [None]


@pytest.mark.parametrize("ratio, said", [(0.6, "\nalarm after "), (1e-9, "\nno alarm after 8 epochs: ")])
def test_es_stops_and_returns_to_the_epoch_before(rising, capsys, ratio, said):
    flags = ["--epochs=8", "--window=2", "--first=3", f"--ratio={ratio}"]
    baselines.main(["es", *small(*flags, "--out=run")])
    records = read_log("run/log.jsonl")
    *before, kept = alarms([record["eigenvalue"] for record in records], 2, ratio, first=3)
    assert said in capsys.readouterr().out and not any(before) and (kept is None) == (len(records) == 8)
    written = json.loads(json.dumps(load_genotype("run/genotype.json")._asdict()))
    assert written == records[(kept or 8) - 1]["genotype"]


def test_ada_goes_back_and_raises_the_weight_decay(rising, monkeypatch):
    """Both alarms go back to one epoch: the end is that of a search which there turns to 0.03."""
    flags = small("--epochs=6", "--weight_decay=3e-4")
    baselines.main(["ada", *flags, "--window=1", "--first=2", "--out=ada"])
    records = {path.name: read_log(path) for path in Path("ada").glob("log*.jsonl")}
    decays = {name: [record["weight_decay"] for record in log] for name, log in records.items()}
    back = records["log-before-0.003.jsonl"][0]["epoch"]
    assert decays == {"log.jsonl": back * [3e-4] + (6 - back) * [0.03], "log-before-0.003.jsonl": [3e-4],
                      "log-before-0.03.jsonl": [0.003]}
    spent = sum(record["seconds"] for record in itertools.chain(*records.values()))
    assert json.loads(Path("ada/search.json").read_text())["seconds"] == pytest.approx(spent)
    def train_epoch(parts, epoch, real=search.train_epoch):
        parts.w_optimizer.param_groups[0]["weight_decay"] = 3e-4 if epoch < back else 0.03
        return real(parts, epoch)
    monkeypatch.setattr(search, "train_epoch", train_epoch)
    search.main([*flags, "--out=plain"])
    assert tensors_equal(torch.load("ada/checkpoint.pt"), torch.load("plain/checkpoint.pt"))


def test_ada_goes_back_to_ever_earlier_epochs(monkeypatch, capsys):
    def look(parts, record):
        first = parts.w_optimizer.param_groups[0]["weight_decay"] == 3e-4
        record["eigenvalue"] = record["lr"] ** (-1 if first else -4)
    monkeypatch.setattr(baselines, "look_at_hessian", look)
    baselines.main(["ada", *small("--epochs=9", "--window=3", "--first=4", "--out=run")])
    first, second = map(int, re.findall(r"back to (\d+),", capsys.readouterr().out))
    assert second < first and len(read_log("run/log.jsonl")) == 9
    assert not list(Path("run").glob("checkpoint-*.pt"))


def test_r_darts_keeps_the_cell_of_the_lowest_validation_error(monkeypatch):
    errors, kept = {"0.0003": 30.0, "0.0009": 20.0, "0.0027": 20.0, "0.0081": 25.0}, []
    cells = [PUBLISHED[name].genotype for name in ("DARTS_V1", "DARTS_V2", "VS_DARTS", "PC_DARTS")]
    found = iter(cells)                                     # those of short searches may be the same
    monkeypatch.setattr(baselines, "train_briefly", lambda args, folder: errors[folder.name[13:]])
    monkeypatch.setattr(search, "finish", lambda run, *rest: write(run.result, to_json(next(found))))
    monkeypatch.setattr(baselines, "finish", lambda run, genotype: kept.append(genotype))
    baselines.main(["r_darts", *small("--epochs=1", "--out=run")])
    assert kept == [cells[1]]                               # of two that are as good, that of less decay
    for decay in errors:
        config = json.loads(Path(f"run/weight_decay-{decay}/config.json").read_text())
        assert (config["weight_decay"], config["program"]) == (float(decay), "search.py")


def test_brief_training_sees_the_training_split_only(monkeypatch):
    """It trains on the half for w and is tested, not augmented, on the half for alpha."""
    seen, opened = [], []
    monkeypatch.setattr(retrain, "train", lambda *given: seen.append(given))
    monkeypatch.setattr(search, "load", lambda *given: opened.append(given[2]) or data.load(*given))
    write("genotype.json", to_json(PUBLISHED["VS_DARTS"].genotype))
    for flags in (small(), ["--dataset=fashion_mnist", "--image_size=8", "--amp"]):
        args = search.parse(flags, baselines.make_parser("r_darts"), "r_darts")
        with pytest.raises(SystemExit, match="result.json"):                # nothing was trained here
            baselines.train_briefly(args, Path())
    (_, first, _, rank, world, read), (_, second, *_) = seen
    assert (first.epochs, first.layers, first.init_channels, first.weight_decay) == (100, 8, 16, 3e-4)
    assert (first.cutout_length, first.amp, second.cutout_length, second.amp) == (2, False, 4, True)
    train, test = read(first, torch.device("cpu"), rank, world)
    split = data.load("digits", "unused", True)
    tested = torch.cat([images for images, _ in test.epoch(0)])
    assert opened == [True] and (train.train, train.cutout) == (True, 2)
    assert torch.equal(train.split.images, split.images[:64])
    assert torch.equal(tested, data.normalize(split.images[64:128], split.spec))


@pytest.mark.parametrize("removed", [("normal", 5, 2), ("reduce", 5, slice(None)), None])
def test_decisions_take_the_place_of_beta(removed):
    net, images, labels = tiny_net("darts")
    plain, decisions, seen = copy.deepcopy(net), baselines.Decisions(net), []
    betas = {cell_type: mixing_weights(alpha, True).detach() for cell_type, alpha in plain.alphas.items()}
    for weights in (dict(decisions.named_buffers()), betas):
        weights["normal"][3], weights["reduce"][7] = torch.eye(8)[4], torch.zeros(8)
    if removed:
        betas[removed[0]][removed[1:]] = 0
    logits, _ = slow_walk(plain, images, betas)
    net.eval().register_forward_hook(lambda net, inputs, output: seen.append(output))
    parts = SimpleNamespace(net=net, validation=SimpleNamespace(epoch=lambda turn: [(images, labels)]))
    accuracy = baselines.accuracy_without(parts, decisions, 0, removed)
    torch.testing.assert_close(seen[0], logits)
    assert decisions.removed is None
    assert accuracy == pytest.approx(100 * (logits.argmax(1) == labels).double().mean().item())
    F.cross_entropy(net(images), labels).backward()
    gradient = net.alphas["normal"].grad
    assert gradient[3].abs().sum() == 0 < gradient[4].abs().sum()


def test_operations_and_inputs_are_decided_by_accuracy():
    decisions, without = baselines.Decisions(tiny_net("s3")[0]), {0: 50, 1: 70, 2: 70, 3: 60, 4: 40}
    record = decisions.decide_inputs("normal", 5, lambda removed: without[EDGES[removed[1]][0]])
    assert record["kept"] == [0, 4] and record["accuracies"][0] == without  # 2 goes, then 1, then 3
    assert [list(tried) for tried in record["accuracies"]] == [[0, 1, 2, 3, 4], [0, 1, 3, 4], [0, 3, 4]]
    assert decisions.normal[-5:].sum(1).isnan().tolist() == [True, False, False, False, True]
    full = baselines.Decisions(tiny_net("darts")[0])        # where DARTS+PT has no `none`
    for some, accuracies, kept in [(decisions, [3, 2, 2], "skip_connect"), (decisions, [1, 2, 2], "none"),
                                   (full, list(range(8)), "max_pool_3x3")]:
        record = some.decide_operation("reduce", (1, 4), lambda removed: accuracies[removed[2]])
        assert record["kept"] == kept and list(record["accuracies"].values()) == accuracies[-7:]
    edges = [edge for _, _, edge in full.order(2)[:28]]
    assert set(edges) == set(EDGES) and list(EDGES) != edges[::2] != edges[1::2] != list(EDGES)
    decisions.normal[:], decisions.reduce[:] = torch.eye(3)[2], torch.eye(3)[0]
    for row, (i, j) in enumerate(EDGES):                    # each node keeps two edges
        decisions.normal[row] *= i in (0, j - 1)
        decisions.reduce[row] *= i >= j - 2                 # `none` is: the next takes its place
    cell = decisions.genotype()
    assert cell.normal == tuple((("sep_conv_3x3", 0), ("sep_conv_3x3", j - 1)) for j in (2, 3, 4, 5))
    assert cell.reduce == tuple((("skip_connect", j - 2), ("skip_connect", j - 1)) for j in (2, 3, 4, 5))


def test_perturbation_tunes_between_pairs_of_decisions(monkeypatch, kept):
    """At a tenth of the search's rate; not after the last pair."""
    seen, classifiers, source = [], [], kept / "five"
    for owner, name in ((baselines.Decisions, "decide_operation"), (baselines.Decisions, "decide_inputs"),
                        (search, "train_epoch"), (search, "weight_step")):
        def spied(*given, name=name, real=getattr(owner, name)):
            seen.append((name, given[1].param_groups[0]["lr"] if name == "weight_step" else given[1]))
            if name == "weight_step":
                classifiers.append(given[0].classifier.weight.clone())
            return real(*given)
        monkeypatch.setattr(owner, name, spied)
    baselines.main(["perturbation", str(source), "--tune_epochs=2", "--out=run"])
    expected = []
    for pair in range(5):
        expected += [("decide_operation", "normal"), ("decide_operation", "reduce")]
        for epoch in (2 * pair, 2 * pair + 1):
            expected += [("train_epoch", epoch), *2 * [("weight_step", 0.0025)]]
    assert seen == [*expected, ("decide_inputs", "normal"), ("decide_inputs", "reduce")]
    assert torch.equal(classifiers[0], torch.load(source / "checkpoint.pt")["net"]["classifier.weight"])
    before, found = (json.loads(Path(folder, "search.json").read_text()) for folder in (source, "run"))
    spent = sum(record["seconds"] for record in read_log("run/log.jsonl"))
    assert found["seconds"] == pytest.approx(before["seconds"] + spent)
    assert (found["method"], found["space"], found["node_norm"]) == ("perturbation", "five", True)


ALARM = ["--window=1", "--first=3", "--ratio=1000"]         # after three epochs, whatever the eigenvalues
FLAGS = {"second_order": ["--epochs=3"], "es": ["--epochs=6", *ALARM], "ada": ["--epochs=3", *ALARM],
         "r_darts": ["--epochs=2", "--train_epochs=2", "--train_channels=2", "--train_layers=3"],
         "perturbation": ["--tune_epochs=1"]}


@pytest.fixture(scope="module")
def whole_runs(tmp_path_factory, kept):
    """A function: the folder and the arguments of a method's run that nothing has stopped."""
    @functools.cache
    def run(method):
        folder = tmp_path_factory.mktemp("whole") / method
        flags = [str(kept / "five")] if method == "perturbation" else small()
        arguments = [method, *flags, *FLAGS[method]]
        baselines.main([*arguments, f"--out={folder}"])
        return folder, arguments
    return run


@pytest.mark.parametrize("method, call, owner, name", [
    ("second_order", 2, Run, "end_epoch"), ("es", 1, Run, "end_epoch"),
    ("es", 3, Run, "end_epoch"),                            # the alarm is due
    ("ada", 2, Run, "end_epoch"), ("ada", 3, Run, "end_epoch"),                 # the first alarm is due
    ("ada", 1, baselines, "save"),                          # the checkpoint has gone back, the log has not
    ("ada", 2, Run, "load"),                                # after the second alarm
    ("r_darts", 1, search, "train_epoch"),                  # nothing but its own folder is there
    ("r_darts", 1, Run, "end_epoch"), ("r_darts", 2, baselines, "train_briefly"),
    ("r_darts", 3, Run, "end_epoch"),                       # in the first brief training
    ("perturbation", 3, Run, "end_epoch"), ("perturbation", 3, search, "train_epoch")])
def test_a_stopped_run_goes_on_to_the_same_end(monkeypatch, whole_runs, method, call, owner, name):
    whole, start = whole_runs(method)
    real, calls = getattr(owner, name), itertools.count(1)

    def interrupted(*given):
        result = real(*given)
        if next(calls) == call:
            raise KeyboardInterrupt
        return result
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt, match="--resume parts goes on"):
        patch.setattr(owner, name, interrupted)
        baselines.main([*start, "--out=parts"])
    with pytest.raises(SystemExit, match="--resume parts"):
        baselines.main([*start, "--out=parts"])
    baselines.main([method, "--resume=parts"])
    assert tensors_equal(contents(whole), contents("parts"))
    for again in ([*start, "--out=parts"], [method, "--resume=parts"]):
        with pytest.raises(SystemExit, match="holds a finished run"):
            baselines.main(again)


# ---------------------------------------------------------------- bad input

def test_the_script_of_our_runs():
    """It lists each search once, all with the paper's product of alpha's rate and steps; and carries on."""
    def listed():
        arguments = "experiments/runs.sh", "small", "DATA", Path("out").absolute(), "--dry_run"
        out, errors, status = program(*arguments, launcher=("env", "PYTHON=python", "bash"))
        assert (errors, status) == ("", 0)
        return [line.split() for line in out.splitlines()]
    commands = listed()
    for python, *words in commands:
        parser = baselines.make_parser("es") if words[0] == "-m" else None
        args = search.parse(words[3:] if parser else words[1:], parser)
        steps = args.epochs * math.ceil(args.limit / 2 / args.batch_size)
        assert args.keep_nets and args.data == "DATA"
        _, row, seed = Path(args.out).name.split("-")
        switches = {"norm": [1, 0, 0], "norm_larc": [1, 1, 0], "norm_sqrt": [1, 0, 1],
                    "vs_darts": [1, 1, 1], "vs_darts_trust_0.1": [1, 1, 1]}.get(row, [0, 0, 0])
        assert [args.node_norm, args.larc, args.sqrt_beta] == switches and args.seed == int(seed)
        assert args.larc_trust == (0.1 if row.endswith("0.1") else 1)
        assert args.weight_decay == (3e-4 if row in ("darts", "es") else 5e-3)
        assert steps * args.arch_learning_rate == pytest.approx(391 * 50 * 3e-4, 0.01)
    names = [Path(words[-1]).name for words in commands]
    assert len({*names}) == len(names) == 38 and names[:2] == ["s3-darts_l2-0", "s3-vs_darts-0"]
    for file in ("s3-darts_l2-0/genotype.json", "s3-vs_darts-0/config.json", "s4-es-2/config.json"):
        Path("out", file).parent.mkdir(parents=True)
        Path("out", file).write_text("{}")
    after, resume = listed(), ["--resume", str(Path("out").absolute() / "s3-vs_darts-0")]
    assert after[0] == ["python", "search.py", *resume] and after[1:-1] == commands[2:-1]
    assert after[-1][:5] == ["python", "-m", "experiments.baselines", "es", "--resume"]


BAD = [  # a command, and words of the line that refuses it
    ("figures 3 s2", "s2/net-0.pt is missing: --keep_nets"),
    ("figures 4 s2", "s2: there is no `none` in space s2"),
    ("figures 6 darts --edge normal:3-2", "--edge normal:3-2: there is none"),
    ("figures 5 darts --edge normal:0-2", "--edge is not for figure 5"),
    ("figures 2 darts vs --epoch 3", "darts/net-3.pt is missing"),
    ("figures 2 darts --images 1", "--images"),
    ("figures 1 nothing", "nothing is no published cell"),
    ("figures 3 nothing", "nothing/config.json cannot be read"),
    ("figures 3 vs r", "r is a run of retrain.py, not of search.py"),
    ("figures 1 nb", "nb is a run of experiments.nasbench201, not of search.py"),
    ("figures overview pt", "pt is a run of experiments.baselines perturbation, not of search.py"),
    ("figures overview darts --out darts/config.json/deeper", "darts/config.json/deeper cannot be written"),
    ("tables 4", "take folders"),
    ("tables 2 darts", "table 2 takes none"),
    ("tables 4 darts", "table 4 needs finished retrainings"),
    ("tables 3 r", "table 3 those of searched cells"),
    ("tables 1 nothing", "nothing/config.json cannot be read"),
    ("tables 4 r longer", "protocols differ: --epochs 7 in longer, 600 in r"),
    ("tables 1 r2 r3", "protocols differ: search's --space s3 in r3, s2 in r2"),
    ("tables 3 r2 batch", "protocols differ: --batch_size 8 in batch, 96 in r2"),
    ("tables 1 es5 r2 es7", "protocols differ: es's --window 7 in es7, 5 in es5"),
    ("baselines nothing", "no method nothing: choose one of second_order, es, ada, r_darts, perturbation"),
    ("baselines es --max_decay=1", "unrecognized arguments: --max_decay=1"),
    ("baselines ada --weight_decay=0", "must be above 0 and below --max_decay 0.03"),
    ("baselines ada --weight_decay=0.1", "must be above 0 and below --max_decay 0.03"),
    ("baselines r_darts --weight_decay=1e-3", "r_darts takes no --weight_decay"),
    ("baselines r_darts --dataset=folder --data=nothing --out=new", "nothing/train"),
    ("baselines ada --resume=es", "es is not a run of experiments.baselines ada"),
    (f"baselines es --learning_rate=2e9 --grad_clip=2e9 {' '.join(small('--out=new'))}", "not finite"),
    ("baselines perturbation", "perturbation needs a finished run of search.py, and RUN is none"),
    ("baselines perturbation unfinished", "needs a finished run of search.py, and unfinished is none"),
    ("baselines perturbation es", "es is not a run of search.py"),
    ("baselines perturbation vs --learning_rate=1", "unrecognized arguments: --learning_rate=1"),
]


@pytest.mark.parametrize("command, said", BAD)
def test_bad_input_ends_in_one_line_and_changes_nothing(kept, monkeypatch, capsys, command, said):
    def files():
        return {path: path.is_file() and path.read_bytes() for path in kept.rglob("*")}
    monkeypatch.chdir(kept)
    monkeypatch.setattr(figures, "find_spec", lambda name: True)
    before = files()
    name, *arguments = command.split()
    with pytest.raises(SystemExit) as error:
        {"figures": figures, "tables": tables, "baselines": baselines}[name].main(arguments)
    text = capsys.readouterr().err if error.value.code == 2 else f"{error.value}\n"
    assert said in text and text.count("\n") == 1
    assert files() == before


def test_help_and_torchrun(monkeypatch):
    out, errors, status = program("-m", "experiments.baselines", "es", "--help")
    assert "--window" in out and (errors, status) == ("", 0)
    for method in baselines.METHODS:
        with pytest.raises(SystemExit, match="0"):
            baselines.main([method, "--help"])
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SystemExit, match="without torchrun"):
        baselines.main(["es", "--resume=nothing"])
