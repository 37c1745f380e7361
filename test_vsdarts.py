"""Tests: values and gradients against oracles written the slow, obvious way; no download, no GPU, nothing timed.

    python -m pytest -q
"""
import gzip
import itertools
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torchvision.transforms import v2
from torchvision.utils import save_image

import data
import genotypes
import retrain
import run
import search
from genotypes import EDGES, PUBLISHED, SPACES, Genotype
from larc import LARC
from model import (OPS, AfterReLU, AuxiliaryHead, Cell, FactorizedReduce, MixedOp, Network, SearchCell, SuperNet,
                   count_macs, count_parameters, drop_path, mixing_weights)

HERE = Path(__file__).parent
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}
SMALL = ["--dataset", "digits", "--layers", "3", "--init_channels", "2", "--batch_size", "256"]
torch.set_num_threads(1)


@pytest.fixture
def float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def no_autocast():
    return torch.autocast("cpu", enabled=False)


# ---------------------------------------------------------------- the super-network against a slow DARTS

def slow_norm(x):
    mean = x.mean((0, 2, 3), keepdim=True)
    variance = ((x - mean) ** 2).mean((0, 2, 3), keepdim=True)
    return (x - mean) / torch.sqrt(variance + 1e-5)


def slow_pool(name, x, stride):
    patches = F.unfold(F.pad(x, (1, 1, 1, 1), value=float("nan")), 3, stride=stride)
    patches = patches.unflatten(1, (x.shape[1], 9))                                      # (B, C, 9, places)
    inside = ~patches.isnan()
    if name == "max_pool_3x3":
        pooled = patches.masked_fill(~inside, float("-inf")).max(2).values
    else:
        pooled = patches.masked_fill(~inside, 0).sum(2) / inside.sum(2)
    side = (x.shape[2] + stride - 1) // stride
    return pooled.unflatten(2, (side, side))


def slow_reduce(p, prefix, x):
    x = F.relu(x)
    halves = [F.conv2d(x, p[f"{prefix}.body.0.conv1.weight"], stride=2),
              F.conv2d(x[:, :, 1:, 1:], p[f"{prefix}.body.0.conv2.weight"], stride=2)]
    return slow_norm(torch.cat(halves, 1))


def slow_op(name, p, prefix, x, stride):
    C, kernel = x.shape[1], int(name[-1])if name[-1].isdigit() else None
    if name == "skip_connect":
        return x if stride == 1 else slow_reduce(p, prefix, x)
    if "pool" in name:
        return slow_norm(slow_pool(name, x, stride))
    if "dil" in name:
        x = F.conv2d(F.relu(x), p[f"{prefix}.body.0.weight"], stride=stride, padding=kernel - 1, dilation=2, groups=C)
        return slow_norm(F.conv2d(x, p[f"{prefix}.body.1.weight"]))
    for first, step in ((0, stride), (4, 1)):                                            # sep_conv: twice
        x = F.conv2d(F.relu(x), p[f"{prefix}.body.{first}.weight"], stride=step, padding=kernel // 2, groups=C)
        x = slow_norm(F.conv2d(x, p[f"{prefix}.body.{first + 1}.weight"]))
    return x


def slow_supernet(p, space, layers, node_norm, sqrt_beta, x):
    """DARTS's super-network from its parameters: every edge on its own, edges counted by offsets as DARTS does."""
    x = F.conv2d(x, p["stem.0.weight"], padding=1)
    s0 = s1 = slow_norm(x) * p["stem.1.weight"][:, None, None] + p["stem.1.bias"][:, None, None]
    reduced_before = False
    for layer in range(layers):
        reduction = layer in (layers // 3, 2 * layers // 3)
        kind, cell = ("reduce" if reduction else "normal"), f"cells.{layer}"
        beta = torch.exp(p[f"alpha_{kind}"]) / torch.exp(p[f"alpha_{kind}"]).sum(1, keepdim=True)
        states = [slow_reduce(p, f"{cell}.preprocess0", s0) if reduced_before else
                  slow_norm(F.conv2d(F.relu(s0), p[f"{cell}.preprocess0.body.0.weight"])),
                  slow_norm(F.conv2d(F.relu(s1), p[f"{cell}.preprocess1.body.0.weight"]))]
        offset = 0
        for j in range(2, 6):
            total = 0
            for i in range(j):
                stride = 2 if reduction and i < 2 else 1
                for o, name in enumerate(space[kind][i, j]):
                    if name != "none":
                        weight = beta[offset + i, o].sqrt() if sqrt_beta else beta[offset + i, o]
                        total = total + weight * slow_op(name, p, f"{cell}.edges.{i}->{j}.ops.{name}", states[i], stride)
            offset += j
            if node_norm:                                                                # Eq. 3, channel by channel
                total = torch.stack([(c - c.mean()) / torch.sqrt(c.var(unbiased=False) + 1e-5)
                                     for c in total.unbind(1)], 1)
            states.append(total)
        s0, s1, reduced_before = s1, torch.cat(states[2:], 1), reduction
    return s1.mean((2, 3)) @ p["classifier.weight"].T + p["classifier.bias"]


@pytest.mark.parametrize("node_norm, sqrt_beta, space", [
    (False, False, "darts"), (True, False, "darts"), (False, True, "darts"), (True, True, "darts"), (True, True, "s1")])
def test_supernet_equals_slow_darts(float64, node_norm, sqrt_beta, space):
    torch.manual_seed(0)
    net = SuperNet(SPACES[space], 2, 4, 10, node_norm, sqrt_beta)
    for alpha in net.alphas():
        alpha.data.normal_()
    images, labels = torch.randn(4, 3, 8, 8), torch.tensor([0, 1, 2, 3])
    leaves = {name: p.detach().clone().requires_grad_() for name, p in net.named_parameters()}
    logits = net(images)
    expected = slow_supernet(leaves, SPACES[space], 4, node_norm, sqrt_beta, images)
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-10)
    F.cross_entropy(logits, labels).backward()
    F.cross_entropy(expected, labels).backward()
    for name, p in net.named_parameters():
        torch.testing.assert_close(p.grad, leaves[name].grad, rtol=0, atol=1e-10, msg=name)


@pytest.mark.parametrize("stride", [1, 2])
def test_sharing_per_node_equals_every_edge_alone(float64, stride):
    torch.manual_seed(0)
    edges = {(0, 2): genotypes.DARTS_PRIMITIVES, (0, 3): genotypes.DARTS_PRIMITIVES}
    cell = SearchCell(edges, 4, 4, 4, stride == 2, False, node_norm=False)
    x, weights = torch.randn(2, 4, 8, 8), {edge: torch.rand(8, requires_grad=True) for edge in edges}
    got = cell(x, x, weights)
    nodes = []
    for (i, j), primitives in edges.items():
        alone = MixedOp(4, stride, primitives)
        alone.load_state_dict(cell.edges[f"{i}->{j}"].state_dict(), strict=False)       # all but the shared pools' statistics
        nodes.append(alone(cell.preprocess0(x), weights[i, j]))
    expected = torch.cat(nodes, 1)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)
    inputs = [*weights.values(), cell.preprocess0.body[0].weight]
    for a, b in zip(torch.autograd.grad(got.square().sum(), inputs), torch.autograd.grad(expected.square().sum(), inputs)):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10)


def test_supernet_parameter_counts():
    counts = {name: sum(p.numel() for p in SuperNet(space).weights()) for name, space in SPACES.items()}
    assert counts == {"darts": 1930618, "s1": 405146, "s2": 665466, "s3": 665466, "s4": 624506}
    assert sum(p.numel() for p in SuperNet(SPACES["darts"], stem_multiplier=1).weights()) == 1928154
    assert sum(p.numel() for p in SuperNet(SPACES["s3"], num_classes=100).weights()) == 665466 + 23130


def test_alphas_and_weights_share_out_all_parameters():
    net = SuperNet(SPACES["s1"], 2, 3)
    alphas, weights = {id(p) for p in net.alphas()}, {id(p) for p in net.weights()}
    assert not alphas & weights and alphas | weights == {id(p) for p in net.parameters()}
    assert {"alpha_normal", "alpha_reduce"} <= net.state_dict().keys() and net.alpha_normal.shape == (14, 2)
    other = SuperNet(SPACES["s1"], 2, 3)
    other.load_state_dict(net.state_dict())
    assert search.derive(other.space, other.betas()) == search.derive(net.space, net.betas())
    many = torch.cat([SuperNet(SPACES["darts"], 1, 3).alpha_normal.detach() for _ in range(20)])
    assert abs(many.std().item() / 1e-3 - 1) < 0.1 and abs(many.mean().item()) < 1e-4    # 1e-3 x N(0, 1)


@pytest.mark.parametrize("size", [8, 9, 15, 28])
def test_supernet_takes_odd_and_small_images(size):
    assert SuperNet(SPACES["darts"], 2, 4)(torch.randn(2, 3, size, size)).shape == (2, 10)


def node_variances(**switches):
    """Variances of nodes 2 to 5 of a fresh cell on unit-variance input, averaged over five initialisations."""
    rows = []
    for seed in range(5):
        torch.manual_seed(seed)
        edges, x_j = SPACES["darts"]["normal"], {}
        cell = SearchCell(edges, 16, 16, 16, False, False, switches["node_norm"])
        for j in range(2, 6):
            cell.normalize[str(j)].register_forward_hook(lambda *args, j=j: x_j.update({j: args[2]}))
        weights = dict(zip(edges, mixing_weights(torch.zeros(14, 8), switches["sqrt_beta"])))
        with torch.no_grad():
            cell(torch.randn(16, 16, 16, 16), torch.randn(16, 16, 16, 16), weights)
        rows.append([x_j[j].var(unbiased=False).item() for j in range(2, 6)])
    return np.mean(rows, axis=0)


def test_node_normalization_makes_node_variances_one():
    np.testing.assert_allclose(node_variances(node_norm=False, sqrt_beta=False), [0.29, 0.62, 1.16, 1.94], rtol=0.15)
    np.testing.assert_allclose(node_variances(node_norm=True, sqrt_beta=False), [1, 1, 1, 1], rtol=1e-3)
    np.testing.assert_allclose(node_variances(node_norm=True, sqrt_beta=True), [1, 1, 1, 1], rtol=1e-3)


def test_sqrt_beta_without_node_norm_explodes():
    np.testing.assert_allclose(node_variances(node_norm=False, sqrt_beta=True), [2.3, 6, 15, 32], rtol=0.2)


def test_node_norm_uses_running_statistics_in_eval_mode(float64):
    torch.manual_seed(0)
    cell = SearchCell({(0, 2): ("skip_connect",)}, 2, 2, 2, False, False, node_norm=True)
    weights = {(0, 2): torch.ones(1)}
    cell(torch.randn(8, 2, 4, 4), torch.randn(8, 2, 4, 4), weights)
    cell.eval()
    norm, x = cell.normalize["2"], torch.randn(1, 2, 4, 4)
    x_j = cell.preprocess0(x)
    expected = (x_j - norm.running_mean[:, None, None]) / torch.sqrt(norm.running_var[:, None, None] + 1e-5)
    torch.testing.assert_close(cell(x, x, weights), expected)


# ---------------------------------------------------------------- mixing weights, Eq. 1, 4 and 6

def test_mixing_weights_equal_softmax_and_its_root(float64):
    alpha = torch.randn(14, 8, requires_grad=True)
    for sqrt_beta in (False, True):
        expected = torch.exp(alpha) / torch.exp(alpha).sum(1, keepdim=True)
        expected = expected.sqrt() if sqrt_beta else expected
        got, ramp = mixing_weights(alpha, sqrt_beta), torch.arange(8.0)
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)
        torch.testing.assert_close(*(torch.autograd.grad((w * ramp).sum(), alpha)[0] for w in (got, expected)),
                                   rtol=0, atol=1e-12)


@pytest.mark.parametrize("first", [200.0, float("-inf")])
def test_root_of_beta_has_finite_gradients(first):
    alpha = torch.tensor([[first, 0, 0, 1]], requires_grad=True)
    (mixing_weights(alpha, sqrt_beta=True) * torch.tensor([1.0, 2, 3, 4])).sum().backward()
    assert alpha.grad.isfinite().all()
    naive = torch.softmax(alpha, -1).sqrt()
    torch.testing.assert_close(mixing_weights(alpha, sqrt_beta=True), naive)             # the values are the naive ones


def operation_outputs(mixed, x, names):
    return torch.stack([mixed(x, torch.eye(len(names))[k]).flatten() for k in range(len(names))])


def test_equation_4_is_an_identity(float64):
    torch.manual_seed(0)
    names = genotypes.DARTS_PRIMITIVES[1:]
    mixed, x = MixedOp(4, 1, names), slow_norm(torch.randn(8, 4, 8, 8))
    outputs, beta = operation_outputs(mixed, x, names), torch.softmax(torch.randn(7), 0)
    covariance = torch.cov(outputs, correction=0)
    right = sum(beta[o] ** 2 * covariance[o, o] for o in range(7)) + sum(
        beta[i] * beta[j] * covariance[i, j] for i in range(7) for j in range(7) if j != i)
    torch.testing.assert_close(mixed(x, beta).var(unbiased=False), right, rtol=0, atol=1e-12)


def test_equation_6_keeps_the_variance_whatever_beta(float64):
    torch.manual_seed(0)
    names = genotypes.DARTS_PRIMITIVES[4:]                                               # uncorrelated: C is about 0
    mixed, x = MixedOp(16, 1, names), slow_norm(torch.randn(16, 16, 8, 8))
    with torch.no_grad():
        for scale in (0, 1, 2, 4):
            alpha = scale * torch.randn(4)
            beta = mixing_weights(alpha)
            covariance = torch.cov(operation_outputs(mixed, x, names), correction=0)
            C = (beta.sqrt()[:, None] * covariance * beta.sqrt()).sum() - (beta * covariance.diag()).sum()
            variance = mixed(x, mixing_weights(alpha, sqrt_beta=True)).var(unbiased=False)
            torch.testing.assert_close(variance, 1 + C, rtol=0.01, atol=0)
            assert abs(variance - 1) < 0.15
            torch.testing.assert_close(mixed(x, beta).var(unbiased=False), beta.square().sum(), rtol=0.3, atol=0)  # Eq. 5


def test_mixed_operation_skips_none_but_its_beta_counts(float64):
    mixed, x = MixedOp(2, 1, ("none", "skip_connect")), torch.randn(1, 2, 4, 4)
    torch.testing.assert_close(mixed(x, mixing_weights(torch.zeros(2))), x / 2)


# ---------------------------------------------------------------- operations

@pytest.mark.parametrize("size", [7, 8, 9, 15])
def test_factorized_reduce_on_any_size(float64, size):
    torch.manual_seed(0)
    op, x = FactorizedReduce(3, 6, affine=False), torch.randn(2, 3, size, size)
    got = op(x)
    assert got.shape == (2, 6, (size + 1) // 2, (size + 1) // 2)
    convs, relu = op.body[0], F.relu(x)
    rows = torch.arange(0, size, 2)
    for half, conv, start in ((got[:, :3], convs.conv1, 0), (got[:, 3:], convs.conv2, 1)):
        picked = torch.zeros(2, 3, len(rows), len(rows))
        for a, b in itertools.product(range(len(rows)), repeat=2):
            if rows[a] + start < size and rows[b] + start < size:
                picked[:, :, a, b] = relu[:, :, rows[a] + start, rows[b] + start]
        torch.testing.assert_close(half, slow_norm(torch.einsum("oi,bihw->bohw", conv.weight[:, :, 0, 0], picked)))


@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize("stride, size", [(1, 8), (1, 7), (2, 8), (2, 7)])
def test_every_operation_keeps_or_halves_the_size_and_its_input(name, stride, size):
    op, x = OPS[name](4, stride, True), torch.randn(2, 4, size, size)
    before = x.clone()
    assert op(x).shape == (2, 4, -(-size // stride), -(-size // stride))
    assert torch.equal(x, before)


def test_noise_is_standard_normal_fresh_and_without_gradient():
    op, x = OPS["noise"](4, 2, False), torch.randn(8, 4, 16, 16, requires_grad=True)
    op.eval()
    first, second = op(x), op(x)
    assert not torch.equal(first, second) and not first.requires_grad and first.shape == (8, 4, 8, 8)
    assert abs(first.mean()) < 0.1 and abs(first.var() - 1) < 0.1 and not list(op.parameters())


# ---------------------------------------------------------------- LARC

def slow_larc(w, g, m, lr, momentum, decay, trust, clip):
    """One tensor at a time, the formulas of larc.py's docstring."""
    w_norm, g_norm = math.sqrt((w * w).sum().item()), math.sqrt((g * g).sum().item())
    factor = 1.0
    if w_norm > 0 and g_norm > 0:
        factor = trust * w_norm / (g_norm + decay * w_norm + 1e-8)
        if clip:
            factor = 1.0 if lr == 0 else min(factor / lr, 1.0)
    m = momentum * m + factor * (g + decay * w)
    return w - lr * m, m


@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("decay", [0.0, 5e-3])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("trust", [1.0, 0.02])
def test_larc_equals_a_loop_over_tensors(float64, clip, decay, momentum, trust):
    torch.manual_seed(0)
    params = [torch.randn(5, 3), torch.zeros(4), torch.randn(7), torch.randn(2), 100 * torch.randn(3)]
    params = [p.requires_grad_() for p in params]
    expected = [(p.detach().clone(), torch.zeros_like(p)) for p in params]
    optimizer = LARC(params, lr=0.1, momentum=momentum, weight_decay=decay, trust_coefficient=trust, clip=clip)
    for lr in (0.1, 0.025, 0.0, 0.05):
        optimizer.param_groups[0]["lr"] = lr
        for k, p in enumerate(params):
            p.grad = torch.zeros_like(p) if k == 2 else torch.randn_like(p) * 10.0 ** (k - 2)
        params[3].grad = None                                                            # left alone
        optimizer.step()
        expected = [(w, m) if p.grad is None else slow_larc(w, p.grad, m, lr, momentum, decay, trust, clip)
                    for p, (w, m) in zip(params, expected)]
        for p, (w, _) in zip(params, expected):
            torch.testing.assert_close(p.detach(), w, rtol=1e-12, atol=1e-12)
            assert p.isfinite().all()


def test_larc_step_has_the_papers_length(float64):
    w = torch.randn(6, requires_grad=True)
    w.grad, before = torch.randn(6), w.detach().clone()
    LARC([w], lr=0.025, momentum=0).step()
    assert (w - before).norm().item() == pytest.approx(0.025 * before.norm().item(), rel=1e-6)  # lr |w|, whatever |g|


def test_larc_is_an_optimizer_that_schedulers_and_state_dicts_know():
    def make():
        torch.manual_seed(0)
        net = torch.nn.Linear(3, 2)
        optimizer = LARC(net.parameters(), lr=0.1, weight_decay=1e-2)
        return net, optimizer, torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10)

    def steps(net, optimizer, scheduler, numbers):
        for k in numbers:
            torch.manual_seed(k)
            optimizer.zero_grad()
            net(torch.randn(4, 3)).square().sum().backward()
            optimizer.step()
            scheduler.step()
    net, optimizer, scheduler = make()
    steps(net, optimizer, scheduler, range(6))
    half = make()
    steps(*half, range(3))
    fresh = make()
    for part, saved in zip(fresh, half):
        part.load_state_dict(saved.state_dict())
    steps(*fresh, range(3, 6))
    assert isinstance(optimizer, torch.optim.Optimizer)
    assert torch.equal(fresh[0].weight, net.weight)
    assert fresh[1].param_groups[0]["lr"] == optimizer.param_groups[0]["lr"] != 0.1
    with pytest.raises(ValueError, match="trust_coefficient"):
        LARC(net.parameters(), lr=0.1, trust_coefficient=0)


# ---------------------------------------------------------------- derivation

def brute_derive(space, betas):
    """All operations of a node in one list, strongest first; taken from the top until two edges have one."""
    cells = {}
    for kind in ("normal", "reduce"):
        rows = dict(zip(space[kind], betas[kind].tolist()))
        nodes = []
        for j in (2, 3, 4, 5):
            all_ops = [(-rows[i, j][o], i, o, name) for i in range(j) for o, name in enumerate(space[kind][i, j])
                       if name != "none"]
            node = []
            for _, i, _, name in sorted(all_ops):
                if len(node) < 2 and i not in [source for _, source in node]:
                    node.append((name, i))
            nodes.append(tuple(node))
        cells[kind] = tuple(nodes)
    return Genotype(cells["normal"], (2, 3, 4, 5), cells["reduce"], (2, 3, 4, 5))


@pytest.mark.parametrize("space", SPACES)
def test_derivation_equals_brute_force(space):
    torch.manual_seed(0)
    for trial in range(100):
        betas = {kind: torch.rand(14, len(edges[0, 2])) for kind, edges in SPACES[space].items()}
        if trial % 2:                                                                    # ties, among edges and operations
            betas = {kind: (beta * 3).round() for kind, beta in betas.items()}
        assert search.derive(SPACES[space], betas) == brute_derive(SPACES[space], betas)


def test_derivation_ignores_none_however_large():
    betas = {kind: torch.full((14, 3), 0.1) for kind in ("normal", "reduce")}
    for beta in betas.values():
        beta[:, 0] = 0.9
    genotype = search.derive(SPACES["s3"], betas)
    assert genotype.normal == ((("skip_connect", 0), ("skip_connect", 1)),) * 4


def test_spaces_have_the_published_lists():
    assert SPACES["s1"]["normal"][0, 4] == ("max_pool_3x3", "skip_connect")
    assert SPACES["s1"]["reduce"][1, 4] == ("max_pool_3x3", "sep_conv_3x3")
    assert SPACES["s1"]["normal"][4, 5] == ("dil_conv_3x3", "dil_conv_5x5")
    assert all(list(edges) == EDGES and len(edges) == 14 for space in SPACES.values() for edges in space.values())
    assert SPACES["s4"]["normal"][0, 2] == ("noise", "sep_conv_3x3")


# ---------------------------------------------------------------- the two steps

def steps_of(net, images, labels):
    weights = torch.optim.SGD(net.weights(), 0.1, momentum=0.9, weight_decay=5e-3)
    alphas = torch.optim.Adam(net.alphas(), 3e-4, betas=(0.5, 0.999), weight_decay=1e-3)
    return (lambda: search.alpha_step(net, alphas, images, labels, no_autocast),
            lambda clip=5: search.weight_step(net, weights, images, labels, no_autocast, clip))


def copies(parameters):
    return [p.detach().clone() for p in parameters]


def test_each_step_moves_its_own_parameters_only():
    torch.manual_seed(0)
    net, images, labels = SuperNet(SPACES["darts"], 2, 3), torch.randn(4, 3, 8, 8), torch.arange(4)
    alpha_step, weight_step = steps_of(net, images, labels)
    weights, alphas = copies(net.weights()), copies(net.alphas())
    alpha_step()
    assert all(map(torch.equal, weights, net.weights())) and not any(map(torch.equal, alphas, net.alphas()))
    assert all(p.grad is None for p in net.weights())
    alphas = copies(net.alphas())
    weight_step()
    assert all(map(torch.equal, alphas, net.alphas())) and not torch.equal(weights[0], net.weights()[0])


def test_weight_step_is_the_same_without_the_alpha_backward():
    torch.manual_seed(0)
    net, images, labels = SuperNet(SPACES["darts"], 2, 3), torch.randn(4, 3, 8, 8), torch.arange(4)
    other = SuperNet(SPACES["darts"], 2, 3)
    alpha_step, weight_step = steps_of(net, images, labels)
    alpha_step()
    other.load_state_dict(net.state_dict())
    weight_step()
    plain = torch.optim.SGD(other.weights(), 0.1, momentum=0.9, weight_decay=5e-3)
    F.cross_entropy(other(images), labels).backward()
    total = torch.sqrt(sum((p.grad ** 2).sum() for p in other.weights()))
    for p in other.weights():                                                            # clip 5, without the alphas
        p.grad *= min(1, 5 / (total + 1e-6))
    plain.step()
    for a, b in zip(net.weights(), other.weights()):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


def test_absent_operations_of_an_edge_stay_frozen():
    torch.manual_seed(0)
    ragged = {kind: {**edges, (0, 2): ("skip_connect",), (1, 2): ("none", "max_pool_3x3")}
              for kind, edges in SPACES["darts"].items()}
    net = SuperNet(ragged, 2, 3)
    alpha_step, _ = steps_of(net, torch.randn(4, 3, 8, 8), torch.arange(4))
    net.alpha_normal.data[2:] = 0.5                                                      # rows that Adam and decay do move
    for _ in range(3):
        alpha_step()
    assert torch.equal(net.alpha_normal[0, 1:], torch.zeros(7)) and torch.equal(net.alpha_normal[1, 2:], torch.zeros(6))
    assert (net.alpha_normal[2:] != 0.5).all()
    assert net.betas()["normal"][0].tolist() == [1] + [0] * 7
    assert search.derive(ragged, net.betas()).normal[0] in [(("skip_connect", 0), ("max_pool_3x3", 1))]


# ---------------------------------------------------------------- data

def counted_split(spec, size=8):
    pixels = torch.arange(size * size, dtype=torch.uint8).view(1, size, size, 1).expand(1, size, size, 3)
    return pixels, spec._replace(mean=(0.0,) * 3, std=(1 / 255,) * 3)                    # normalize() then changes nothing


def test_crop_and_flip_have_torchvisions_distribution():
    image, spec = counted_split(data.DATASETS["cifar10"])
    count = 162 * 100
    generator = torch.Generator().manual_seed(0)
    ours = data.augment(image.expand(count, -1, -1, -1), torch.rand(count, 5, generator=generator), spec)
    transform = v2.Compose([v2.RandomCrop(8, padding=4), v2.RandomHorizontalFlip()])
    torch.manual_seed(0)
    theirs = torch.stack([transform(image[0].permute(2, 0, 1)) for _ in range(count)])
    histograms = []
    for batch in (ours, theirs):
        seen = {}
        for key in batch.round().to(torch.uint8).flatten(1).numpy():
            seen[key.tobytes()] = seen.get(key.tobytes(), 0) + 1
        histograms.append(seen)
        assert len(seen) == 162                                                          # 9 x 9 places, flipped or not
        assert sum((n - 100) ** 2 / 100 for n in seen.values()) < 240                    # chi-square, 161 degrees: p > 1e-4
    assert histograms[0].keys() == histograms[1].keys()


def test_cutout_hides_darts_square_and_normalization_is_torchvisions():
    spec = data.DATASETS["cifar10"]
    images = torch.randint(0, 256, (500, 32, 32, 3), dtype=torch.uint8)
    uniform = torch.rand(500, 5)
    uniform[:, :2] = 0.5                                                                 # the middle crop
    uniform[:, 2] = 0.9                                                                  # no flip
    got = data.augment(images, uniform, spec, cutout=16)
    plain = v2.Normalize(spec.mean, spec.std)(images.permute(0, 3, 1, 2) / 255)
    for image, expected, (y, x) in zip(got, plain, (uniform[:, 3:] * 32).long().tolist()):
        expected = expected.clone()
        expected[:, max(0, y - 8):y + 8, max(0, x - 8):x + 8] = 0
        torch.testing.assert_close(image, expected, rtol=1e-5, atol=1e-6)


def test_batches_are_a_function_of_seed_and_epoch():
    split = data.load("digits", "unused", train=True)
    def images(seed, epoch):
        return torch.cat([images for images, _ in data.Batches(split, 100, seed).epoch(epoch)])
    assert torch.equal(images(1, 0), images(1, 0))
    assert not torch.equal(images(1, 0), images(1, 1)) and not torch.equal(images(1, 0), images(2, 0))
    assert len(images(1, 0)) == 1437
    order = torch.cat(data.batch_indices(1437, 100, 1, 0))
    assert sorted(order.tolist()) == list(range(1437))
    batches = data.Batches(split, 100, 1)                                                # one stream over epochs
    across = [images for images, _ in batches.range(14, 16)]
    assert torch.equal(across[1], next(batches.epoch(1))[0])


def test_every_image_and_epoch_has_its_own_augmentation():
    image, spec = counted_split(data.DATASETS["cifar10"], size=16)
    split = data.Split(image.expand(64, -1, -1, -1).contiguous(), torch.zeros(64, dtype=torch.long), 10, spec)
    batches = data.Batches(split, 32, seed=0, cutout=4)
    seen = {image.numpy().tobytes() for epoch in range(4) for images, _ in batches.epoch(epoch) for image in images}
    assert len(seen) > 240                                                               # of 256; 162 x 256 are possible


def test_processes_share_every_batch_as_one_process_would_see_it():
    split = data.load("digits", "unused", train=True)
    split = split.part(0, 101)                                                           # the last batch has 21: one is left out
    one = list(data.Batches(split, 40, 3).epoch(2))
    two = [list(data.Batches(split, 40, 3, rank=rank, world=2).epoch(2)) for rank in (0, 1)]
    for k, (images, labels) in enumerate(one[:2]):
        assert torch.equal(torch.cat([two[0][k][0], two[1][k][0]]), images)
        assert torch.equal(torch.cat([two[0][k][1], two[1][k][1]]), labels)
    shares = [torch.cat(data.batch_indices(101, 40, 3, 2, rank, 2)).tolist() for rank in (0, 1)]
    assert len(shares[0]) == len(shares[1]) == 50 and not set(shares[0]) & set(shares[1])
    tested = [torch.cat([labels for _, labels in data.test_batches(split, 7, rank, 3)]) for rank in range(3)]
    assert sorted(torch.cat(tested).tolist()) == sorted(split.labels.tolist())           # every one once
    assert [len(batch) for batch in data.batch_indices(41, 40, 0, 0)] == [40]            # never a single image


def test_digits_are_whole_and_test_writers_are_apart():
    train, test = (data.load("digits", "unused", train=train) for train in (True, False))
    assert train.images.shape == (1437, 8, 8, 3) and test.images.shape == (360, 8, 8, 3)
    assert train.images.max() == 255 and train.images.dtype == torch.uint8 and train.labels.bincount().min() > 100
    pixels = train.images / 255
    assert abs(pixels.mean() - train.spec.mean[0]) < 1e-3 and abs(pixels.std() - train.spec.std[0]) < 1e-3


def write_idx(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    header = bytes([0, 0, 8, array.ndim]) + b"".join(n.to_bytes(4, "big") for n in array.shape)
    path.write_bytes(gzip.compress(header + array.astype(np.uint8).tobytes()))


def make_fashion_mnist(root):
    pixels = np.random.default_rng(0)
    for part, count in (("train", 40), ("t10k", 20)):
        write_idx(root / f"FashionMNIST/raw/{part}-images-idx3-ubyte.gz", pixels.integers(0, 256, (count, 28, 28)))
        write_idx(root / f"FashionMNIST/raw/{part}-labels-idx1-ubyte.gz", np.arange(count) % 10)


def test_fashion_mnist_is_read_from_its_archives(tmp_path):
    make_fashion_mnist(tmp_path)
    split = data.load("fashion_mnist", tmp_path, train=True)
    assert split.images.shape == (40, 28, 28, 3) and split.labels[:11].tolist() == [*range(10), 0]
    assert torch.equal(split.images[..., 0], split.images[..., 2])
    expected = np.random.default_rng(0).integers(0, 256, (40, 28, 28))
    assert np.array_equal(split.images[..., 0].numpy(), expected)


def make_folder(root, size=40, count=6):
    generator = torch.Generator().manual_seed(0)
    for part, (name, shade) in itertools.product(("train", "val"), (("dark", 0.2), ("light", 0.8))):
        (root / part / name).mkdir(parents=True)
        for k in range(count):
            image = shade + 0.1 * torch.rand(3, size, size, generator=generator)
            save_image(image, root / part / name / f"{k}.png")


def test_folder_is_resized_and_not_sorted_by_class(tmp_path):
    make_folder(tmp_path)
    split = data.load("folder", tmp_path, train=True, image_size=16)
    assert split.images.shape == (12, 16, 16, 3) and split.classes == 2
    assert 0 < split.labels[:6].sum() < 6                                                # both halves have both classes
    bright = split.images.float().mean((1, 2, 3)) > 128
    assert torch.equal(bright.long(), split.labels)


# ---------------------------------------------------------------- genotypes

COUNTED = {  # CIFAR-10: parameters, multiply-adds; ImageNet: parameters, multiply-adds
    "NASNet_A": (3830950, 603452448, 5564320, 604031616), "AmoebaNet_B": (2714590, 409609440, 3972352, 438471360),
    "AmoebaNet_A": (3145078, 488931552, 4627360, 526746624), "ENAS": (3859894, 605719584, 5625952, 608152320),
    "DARTS_V1": (3169414, 500987520, 4510432, 505864704), "DARTS_V2": (3349342, 528359040, 4718752, 529911552),
    "SNAS_moderate": (2847358, 440687232, 4312576, 465607872), "SNAS_mild": (2661382, 422218368, 3939328, 438042432),
    "GDAS": (3368782, 519428736, 5345075, 581009000), "P_DARTS": (3433798, 532174464, 4944352, 542819328),
    "PC_DARTS": (3634678, 556670592, 5270560, 571137408), "PC_DARTS_imagenet": (3721510, 570466944, 5342464, 581627328),
    "FairDARTS_B": (3407878, 536487552, 4865248, 541201152), "PR_DARTS": (3444814, 529769088, 4981312, 543374400),
    "DARTS_PT_0": (2851246, 449119872, 4228576, 465805440), "DARTS_PT_1": (3053206, 471680640, 4510816, 490962432),
    "DARTS_PT_2": (2658142, 413149824, 4035712, 438098880), "DARTS_PT_3": (3328174, 517714560, 4779712, 527456064),
    "VS_DARTS": (3716326, 575360640, 5245600, 579416448), "VS_DARTS_2nd": (3382822, 537814656, 4798048, 538642176),
    "VS_DARTS_3rd": (2964862, 462529152, 4358464, 478910784),
    "VS_DARTS_without_LARC": (3193390, 493660800, 4710784, 511895232),
    "ENAS_repository": (4394710, 693197856, 6267424, 683943168),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_cells_have_the_reference_counts(name):
    cell = PUBLISHED[name]
    cifar, imagenet = genotypes.network(cell.genotype), genotypes.network(cell.genotype, True, cell.C_imagenet)
    assert (count_parameters(cifar), count_macs(cifar, 32), count_parameters(imagenet),
            count_macs(imagenet, 224)) == COUNTED[name]


def test_genotypes_survive_json_and_bad_ones_are_refused(tmp_path):
    assert PUBLISHED.keys() == COUNTED.keys()
    for cell in PUBLISHED.values():
        assert genotypes.from_json(genotypes.to_json(cell.genotype)) == cell.genotype
    good = json.loads(genotypes.to_json(PUBLISHED["VS_DARTS"].genotype))
    for change in ({"normal": []}, {"normal": [[["sep_conv_3x3", 2]]]}, {"normal": [[["exit", 0]]]}, {"normal_concat": [9]},
                   {"reduce": [[["sep_conv_3x3", True]]]}, {"reduce": "__import__('os')"}, {"extra": 1},
                   {"normal": [[[["sep_conv_3x3"], 0]]]}):
        with pytest.raises(ValueError):
            genotypes.from_json(json.dumps({**good, **change}))
    (tmp_path / "code.json").write_text("Genotype(normal=[('sep_conv_3x3', 1)])")
    with pytest.raises(ValueError, match="is no genotype: it is not JSON"):
        genotypes.load(str(tmp_path / "code.json"))
    assert not any(re.search(r"(?<!\.)\beval\(", path.read_text()) for path in HERE.glob("*.py") if path != Path(__file__))


def test_genotypes_command(capsys, tmp_path):
    assert genotypes.main(["VS_DARTS"]) == 0
    shown = capsys.readouterr().out
    assert "node 2 = sep_conv_3x3(1) + skip_connect(0)" in shown and "3,716,326 parameters" in shown
    assert "python retrain.py --genotype VS_DARTS" in shown
    (tmp_path / "genotype.json").write_text(genotypes.to_json(PUBLISHED["GDAS"].genotype))
    assert genotypes.main([str(tmp_path / "genotype.json")]) == 0
    assert "519,428,736 multiply-adds" in capsys.readouterr().out
    assert genotypes.main(["nothing"]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_genotypes_table(capsys, monkeypatch):
    monkeypatch.setattr(genotypes, "PUBLISHED", {name: PUBLISHED[name] for name in ("VS_DARTS", "VS_DARTS_2nd")})
    assert genotypes.main([]) == 0
    shown = capsys.readouterr().out
    assert re.search(r"VS_DARTS +3,716,326 +3\.38 +2\.43 .* 5,245,600 +5\.3 +579\.4 +589 +thop", shown)
    assert "three\nconventions" in shown and "which is VS_DARTS_2nd" in shown
