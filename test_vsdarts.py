"""Tests of the core: values and gradients against oracles written the slow, obvious way.

    python -m pytest -q

No download and no GPU is needed, and nothing is timed. Most programs run in this process, by their
own flags.
"""
import argparse
import hashlib
import importlib
import json
import math
import os
import pickle
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import unicodedata
from collections import Counter
from copy import deepcopy
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torchvision.transforms import v2

import data
import genotypes
import model
import proxy
import retrain
import run
import search
from data import make_seed
from genotypes import (DARTS_PRIMITIVES, PUBLISHED, SPACES, Genotype, from_text, load_genotype,
                       to_json)
from larc import LARC, local_factors
from model import (OPS, AuxiliaryHead, Cell, MixedOp, Network, SearchCell, SuperNet, count_macs,
                   count_parameters, mixing_weights, place)

HERE = Path(__file__).parent
README = (HERE / "README.md").read_text()
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
PYTHON = (sys.executable,)
TORCHRUN = (*PYTHON, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")
SMALL = "--dataset digits --device cpu --layers 3 --init_channels 2 --batch_size 256".split()
TINY = [*SMALL, "--epochs=1", "--seed=5"]
LR, MOMENTUM, DECAY, CLIP = 0.05, 0.7, 0.02, 0.3            # none is a default
SGD = [f"--learning_rate={LR}", f"--momentum={MOMENTUM}", f"--weight_decay={DECAY}",
       f"--grad_clip={CLIP}"]
CPU = torch.device("cpu")
CELL = PUBLISHED["DARTS_V2"]
torch.set_num_threads(1)
cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


@pytest.fixture(autouse=True)
def a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def make_float64(*_):
    """Everything in float64, images too: float32's rounding grows from step to step."""
    torch.set_default_dtype(torch.float64)


@pytest.fixture
def float64():
    make_float64()
    yield
    torch.set_default_dtype(torch.float32)


def assert_near(a, b, within=1e-10):
    torch.testing.assert_close(a, b, rtol=0, atol=within)


def refusal(work, *given):
    """The one line with which work(*given) is refused."""
    with pytest.raises(SystemExit) as error:
        work(*given)
    assert isinstance(error.value.code, str) and "\n" not in error.value.code
    return error.value.code


# ---------------------------------------------------------------- networks

def slow_norm(x, weight=None, bias=None):
    """Batch norm in training, by its definition."""
    mean = x.mean((0, 2, 3), keepdim=True)
    variance = ((x - mean) ** 2).mean((0, 2, 3), keepdim=True)
    x = (x - mean) / torch.sqrt(variance + 1e-5)
    return x if weight is None else x * weight[:, None, None] + bias[:, None, None]


def norm_at(p, name, x):
    return slow_norm(x, p.get(f"{name}.weight"), p.get(f"{name}.bias"))


def slow_preprocess(p, prefix, x, halve):
    """ReLU, 1x1 convolution, batch norm. halve: half the channels are of the pixels in between."""
    x, name = F.relu(x), f"{prefix}.body.0"
    if halve:
        between = F.pad(x, (0, 1, 0, 1))[:, :, 1:, 1:]
        x = torch.cat([F.conv2d(x, p[f"{name}.conv1.weight"], stride=2),
                       F.conv2d(between, p[f"{name}.conv2.weight"], stride=2)], 1)
    else:
        x = F.conv2d(x, p[f"{name}.weight"])
    return norm_at(p, f"{prefix}.body.1", x)


def slow_op(name, p, prefix, x, stride):
    """An operation from its parameters, with the affine part of its batch norms if it has one."""
    if name == "skip_connect":
        return x if stride == 1 else slow_preprocess(p, prefix, x, halve=True)
    if name == "max_pool_3x3":
        return F.max_pool2d(x, 3, stride, padding=1)
    if name == "avg_pool_3x3":                              # over the pixels inside: 4 in a corner
        return F.avg_pool2d(x, 3, stride, 1) / F.avg_pool2d(torch.ones_like(x), 3, stride, 1)
    C, kernel, dilation = x.shape[1], int(name[-1]), 2 if "dil" in name else 1
    padding = dilation * (kernel // 2)
    for k in (1,) if "dil" in name else (0, 4):             # sep_conv: twice
        depthwise, pointwise = p[f"{prefix}.body.{k}.weight"], p[f"{prefix}.body.{k + 1}.weight"]
        x = F.conv2d(F.relu(x), depthwise, None, stride if k < 4 else 1, padding, dilation, C)
        x = norm_at(p, f"{prefix}.body.{k + 2}", F.conv2d(x, pointwise))
    return x


def slow_cells(p, layers, s0, s1, reduced_before, nodes_of):
    """The output of every cell. nodes_of(cell, reduction, states): its concatenation."""
    outputs = []
    for layer in range(layers):
        reduction, cell = layer in (layers // 3, 2 * layers // 3), f"cells.{layer}"
        states = [slow_preprocess(p, f"{cell}.preprocess0", s0, reduced_before),
                  slow_preprocess(p, f"{cell}.preprocess1", s1, False)]
        s0, s1, reduced_before = s1, nodes_of(cell, reduction, states), reduction
        outputs.append(s1)
    return outputs


def slow_supernet(p, space, layers, node_norm, sqrt_beta, x):
    """DARTS's super-network from its parameters: edge by edge, counted by offsets as DARTS does."""
    def nodes_of(cell, reduction, states):
        cell_type, offset = "reduce" if reduction else "normal", 0
        beta = torch.exp(p[f"alphas.{cell_type}"])
        beta = beta / beta.sum(1, keepdim=True)             # Eq. 1
        beta = beta.sqrt() if sqrt_beta else beta           # Eq. 6
        for j in range(2, 6):
            x_j = 0
            for i, o in product(range(j), range(beta.shape[1])):
                name, stride = space[cell_type][i, j][o], 2 if reduction and i < 2 else 1
                if name != "none":
                    y = slow_op(name, p, f"{cell}.edges.{i}-{j}.ops.{name}", states[i], stride)
                    y = slow_norm(y) if "pool" in name else y
                    x_j = x_j + beta[offset + i, o] * y
            offset += j
            states.append(slow_norm(x_j) if node_norm else x_j)     # Eq. 3
        return torch.cat(states[2:], 1)

    s = norm_at(p, "stem0.1", F.conv2d(x, p["stem0.0.weight"], padding=1))
    last = slow_cells(p, layers, s, s, False, nodes_of)[-1]
    return F.linear(last.mean((2, 3)), p["classifier.weight"], p["classifier.bias"])


def slow_network(p, genotype, layers, imagenet, x):
    """NetworkCIFAR or NetworkImageNet from its parameters: logits, auxiliary logits."""
    def conv_norm(conv, norm, x, stride=2):
        return norm_at(p, norm, F.conv2d(x, p[f"{conv}.weight"], stride=stride, padding=1))

    def nodes_of(cell, reduction, states):
        for j, node in enumerate(genotype.reduce if reduction else genotype.normal):
            strides = [2 if reduction and i < 2 else 1 for _, i in node]
            states.append(sum(slow_op(name, p, f"{cell}.ops.{j}.{k}", states[i], strides[k])
                              for k, (name, i) in enumerate(node)))
        concat = genotype.reduce_concat if reduction else genotype.normal_concat
        return torch.cat([states[i] for i in concat], 1)

    s0 = s1 = conv_norm("stem0.0", "stem0.1", x, 2 if imagenet else 1)
    if imagenet:
        s0 = conv_norm("stem0.3", "stem0.4", F.relu(s0))
        s1 = conv_norm("stem1.1", "stem1.2", F.relu(s0))
    outputs = slow_cells(p, layers, s0, s1, imagenet, nodes_of)
    a, head = F.relu(outputs[2 * layers // 3]), "auxiliary_head.features"
    a = F.conv2d(F.avg_pool2d(a, 5, 2 if imagenet else 3), p[f"{head}.2.weight"])
    a = F.conv2d(F.relu(norm_at(p, f"{head}.3", a)), p[f"{head}.5.weight"])
    a = F.relu(a if imagenet else norm_at(p, f"{head}.6", a)).flatten(1)
    inputs = {"classifier": outputs[-1].mean((2, 3)), "auxiliary_head.classifier": a}
    return [F.linear(x, p[f"{name}.weight"], p[f"{name}.bias"]) for name, x in inputs.items()]


def assert_equals_oracle(net, oracle, *given):
    """The values of both, and all gradients. The oracle is computed on the CPU."""
    leaves = {name: p.detach().cpu().clone().requires_grad_() for name, p in net.named_parameters()}
    results, device = [], net.classifier.weight.device
    for logits in (net(given[-1].to(device)), oracle(leaves, *given)):
        logits = list(logits) if isinstance(logits, (list, tuple)) else [logits]
        results.append([part.cpu() for part in logits])
        sum(F.cross_entropy(part, torch.arange(len(part))) for part in results[-1]).backward()
    assert_near(*results, 1e-12)
    for name, p in net.named_parameters():
        torch.testing.assert_close(p.grad.cpu(), leaves[name].grad, rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=cuda)])
@pytest.mark.parametrize("node_norm, sqrt_beta, space, size", [
    (False, False, "darts", (8, 12)), (True, False, "darts", (9, 8)),
    (False, True, "darts", (15, 10)), (True, True, "darts", (8, 8)), (True, True, "s1", (14, 8))])
def test_supernet_equals_slow_darts(float64, node_norm, sqrt_beta, space, size, device):
    torch.manual_seed(0)
    net = place(SuperNet(SPACES[space], 2, 4, 10, node_norm, sqrt_beta), torch.device(device))
    for alpha in net.alphas.values():
        alpha.data.normal_()
    images = torch.randn(4, 3, *size)
    assert_equals_oracle(net, slow_supernet, SPACES[space], 4, node_norm, sqrt_beta, images)


@pytest.mark.parametrize("imagenet, size, layers", [(False, 32, 4), (True, 224, 3)])
def test_derived_network_equals_slow_darts(float64, imagenet, size, layers):
    torch.manual_seed(0)
    genotype = PUBLISHED["VS_DARTS_2nd"]           # skips, pools, both convolutions
    net = place(Network(genotype, 4, layers, 5, auxiliary=True, imagenet=imagenet), CPU)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):              # fresh ones are 1 and 0
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias)
    images = torch.randn(2, 3, size, size)
    assert_equals_oracle(net, slow_network, genotype, layers, imagenet, images)
    without_head = Network(genotype, 4, layers, 5, imagenet=imagenet)
    assert count_parameters(net) == count_parameters(without_head)
    assert net.eval()(images)[1] is None                    # the head is for training only


def test_supernet_parameter_counts():
    with torch.device("meta"):
        nets = [*map(SuperNet, SPACES.values()), SuperNet(SPACES["darts"], stem_multiplier=1),
                SuperNet(SPACES["s3"], num_classes=100),
                SuperNet(SPACES["darts"], num_classes=1000, imagenet=True)]
        heads = [AuxiliaryHead(576, 10, imagenet) for imagenet in (False, True)]
    counts = [sum(w.numel() for w in net.weights) for net in nets]
    assert counts == [1930618, 405146, 665466, 665466, 624506, 1928154, 665466 + 23130, 2215648]
    assert [sum(p.numel() for p in head.parameters()) for head in heads] == [476426, 474890]


def test_weights_are_what_the_network_holds_when_asked():
    net = SuperNet(SPACES["s2"], 2, 3)
    net.classifier = nn.Linear(net.classifier.in_features, 4)
    net.load_state_dict(deepcopy(net.state_dict()), assign=True)
    assert {*net.weights} == {*net.parameters()} - {*net.alphas.values()}


@torch.no_grad()
@pytest.mark.parametrize("node_norm, sqrt_beta, expected, within", [
    (False, False, [0.29, 0.62, 1.16, 1.94], 0.15), (False, True, [2.3, 6, 15, 32], 0.2),
    (True, False, 1, 1e-3), (True, True, 1, 1e-3)])
def test_node_normalization_makes_node_variances_one(node_norm, sqrt_beta, expected, within):
    """Of nodes 2 to 5 of a fresh cell on unit-variance input, means of five initialisations."""
    variances, beta = [], mixing_weights(torch.zeros(14, 8), sqrt_beta)
    for seed in range(5):
        torch.manual_seed(seed)
        cell = SearchCell(SPACES["darts"]["normal"], 8, 8, 8, False, False, node_norm)
        nodes = cell(*torch.randn(2, 32, 8, 16, 16), beta).chunk(4, 1)
        variances.append([node.var(unbiased=False).item() for node in nodes])
    np.testing.assert_allclose(np.mean(variances, axis=0), expected, within)


@pytest.mark.parametrize("first", [200.0, -math.inf])
def test_root_of_beta_has_finite_gradients(first):
    alpha = torch.tensor([[first, 0, 0, 1]], requires_grad=True)
    weights = mixing_weights(alpha, sqrt_beta=True)
    (weights * torch.arange(4)).sum().backward()
    assert alpha.grad.isfinite().all()
    torch.testing.assert_close(weights, torch.softmax(alpha, -1).sqrt())    # the naive values


@torch.no_grad()
@pytest.mark.parametrize("sqrt_beta", [False, True])
def test_variance_of_the_mixture_is_that_of_equations_4_to_6(float64, sqrt_beta):
    torch.manual_seed(0)
    mixed, x = MixedOp(16, 1, DARTS_PRIMITIVES[4:]), slow_norm(torch.randn(16, 16, 8, 8))
    outputs = torch.stack([mixed(x, beta).flatten() for beta in torch.eye(4)])
    covariance = torch.cov(outputs, correction=0)
    beta = mixing_weights(torch.randn(4), sqrt_beta)
    variance = mixed(x, beta).var(unbiased=False)
    assert_near(variance, beta @ covariance @ beta)         # Eq. 4
    alone = beta.square() @ covariance.diag()               # without its C
    expected = 1 if sqrt_beta else beta.square().sum().item()       # Eq. 6; Eq. 5
    assert alone.item() == pytest.approx(expected, rel=1e-3) and abs(variance - alone) < 0.15
    with pytest.raises(ValueError):
        mixed(x, mixing_weights(torch.zeros(5)))            # a beta too many


@pytest.mark.parametrize("name", OPS)
def test_every_operation_trains_in_channels_last_on_any_size(name):
    """A strided 1x1 convolution, in place of Subsample, would overrun its memory here."""
    for stride, size in product((1, 2), (7, 56)):
        op = OPS[name](4, stride, True).to(memory_format=torch.channels_last)
        x = torch.randn(4, 4, size, size).contiguous(memory_format=torch.channels_last)
        y = op(x.requires_grad_())
        assert y.shape == x[:, :, ::stride, ::stride].shape
        if name == "noise":                                 # N(0, 1), fresh, also in eval mode
            assert abs(y.mean()) < 0.3 and abs(y.var() - 1) < 0.5
            assert not torch.equal(op.eval()(x), y)
        else:
            y.square().sum().backward()
            assert x.grad.isfinite().all()


def test_drop_path_takes_samples_of_all_inputs_but_identities():
    s0, s1 = torch.rand(2, 200, 2, 4, 4) + 1

    def drop(node, probability, reduction=False):
        cell = Cell([node], (2,), 2, 2, 2, reduction, False)
        cell.preprocess0 = cell.preprocess1 = nn.Identity()
        return cell(s0, s1, probability)
    node = ("skip_connect", 0), ("avg_pool_3x3", 1)
    pooled, rest = drop(node, 0.0) - s0, drop(node, 0.2) - s0       # the identity stays
    kept = rest.flatten(1).abs().sum(1) > 1e-3
    assert 130 < kept.sum() < 190
    assert_near(rest[kept], pooled[kept] / 0.8, 1e-5)
    strided = drop(node[:1], 0.2, reduction=True)           # a skip that is no identity
    assert 130 < strided.flatten(1).any(1).sum() < 190


def test_under_amp_near_betas_differ_and_logits_are_float32():
    """In bfloat16 0.1253 would be 0.125, as all others are."""
    near = torch.tensor([[0.1253, *7 * [0.8747 / 7]], 8 * [0.125]]).log()
    net, images = place(SuperNet(SPACES["darts"], 2, 3), CPU, amp=True), torch.randn(8, 3, 16, 16)
    derived, logits = place(Network(CELL, 2, 3), CPU, amp=True), []
    for row in near:
        for alpha in net.alphas.values():
            alpha.data.copy_(row)
        logits.append(net(images))
    assert not torch.equal(*logits)
    for found in (*logits, derived(images)[0]):             # not rounded before
        assert found.dtype == torch.float32 and not torch.equal(found, found.bfloat16())


def test_mixtures_are_summed_in_float32_under_amp():
    """Autocast leaves pools as they are."""
    mixed, x, beta = MixedOp(4, 2, DARTS_PRIMITIVES[:3]), torch.randn(8, 4, 8, 8), torch.rand(3)
    expected = mixed(x, beta)
    with torch.autocast("cpu", torch.bfloat16):
        assert_near(mixed(x, beta), expected, 1e-6)


def slow_larc(w, g, m, lr, momentum, decay, trust, clip):
    """One tensor at a time, the formulas of larc.py's docstring."""
    w_norm, g_norm = (tensor.square().sum().sqrt().item() for tensor in (w, g))
    factor = 1
    if w_norm > 0 and g_norm > 0:
        factor = trust * w_norm / (g_norm + decay * w_norm + 1e-8)
        if clip:
            factor = min(factor / lr, 1) if lr > 0 else 1
    m = momentum * m + factor * (g + decay * w)
    return w - lr * m, m


@pytest.mark.parametrize("settings", [*product((0, 0.9), (0, 5e-3), (1, 0.02), (False, True))])
def test_larc_equals_a_loop_over_tensors(float64, settings):
    torch.manual_seed(0)
    values = [torch.randn(5, 3), torch.zeros(4), torch.randn(7), 100 * torch.randn(3)]
    params, momenta = [value.clone().requires_grad_() for value in values], [0] * 4
    left_alone = torch.ones(2, requires_grad=True)          # it has no gradient
    optimizer = LARC([*params, left_alone], 0.1, *settings)
    for lr in (0.1, 0.025, 0.0, 0.05):
        optimizer.param_groups[0]["lr"] = lr
        for k, p in enumerate(params):
            p.grad = torch.randn_like(p) * (1, 10, 0, 0.1)[k]
            values[k], momenta[k] = slow_larc(values[k], p.grad, momenta[k], lr, *settings)
        optimizer.step()
        for p, value in zip(params, values):
            torch.testing.assert_close(p.detach(), value, rtol=1e-12, atol=1e-12)
    assert left_alone.tolist() == [1, 1]


def brute_derive(space, betas):
    """All operations of a node in one list, from the top until two edges have one."""
    found = {"normal_concat": (2, 3, 4, 5), "reduce_concat": (2, 3, 4, 5)}
    for cell_type, edges in space.items():
        nodes = []
        for j in (2, 3, 4, 5):
            rows = [(*edge, beta) for edge, beta in zip(edges.items(), betas[cell_type].tolist())]
            choices = [(-beta, i, o, name) for (i, target), names, row in rows if target == j
                       for o, (name, beta) in enumerate(zip(names, row)) if name != "none"]
            node = {}
            for _, i, _, name in sorted(choices):
                if len(node) < 2:
                    node.setdefault(i, name)
            nodes.append(tuple((name, i) for i, name in node.items()))
        found[cell_type] = tuple(nodes)
    return Genotype(**found)


@pytest.mark.parametrize("space", SPACES)
def test_derivation_equals_brute_force(space):
    torch.manual_seed(0)
    count = len(SPACES[space]["normal"][0, 2])
    for ties in 50 * [False, True]:                         # among edges and operations
        betas = {cell_type: torch.rand(14, count) for cell_type in ("normal", "reduce")}
        if ties:
            betas = {cell_type: (3 * beta).round() for cell_type, beta in betas.items()}
        assert search.derive(SPACES[space], betas) == brute_derive(SPACES[space], betas)


# ---------------------------------------------------------------- genotypes

COUNTED = """
NASNet_A 3830950 603452448 5564320 604031616         AmoebaNet_B 2714590 409609440 3972352 438471360
ENAS 3859894 605719584 5625952 608152320             DARTS_V1 3169414 500987520 4510432 505864704
DARTS_V2 3349342 528359040 4718752 529911552         SNAS_mild 2661382 422218368 3939328 438042432
SNAS_moderate 2847358 440687232 4312576 465607872    GDAS 3368782 519428736 5345075 581009000
P_DARTS 3433798 532174464 4944352 542819328          PC_DARTS 3634678 556670592 5270560 571137408
FairDARTS_B 3407878 536487552 4865248 541201152      PR_DARTS 3444814 529769088 4981312 543374400
DARTS_PT_0 2851246 449119872 4228576 465805440       DARTS_PT_1 3053206 471680640 4510816 490962432
DARTS_PT_2 2658142 413149824 4035712 438098880       DARTS_PT_3 3328174 517714560 4779712 527456064
VS_DARTS 3716326 575360640 5245600 579416448        VS_DARTS_2nd 3382822 537814656 4798048 538642176
VS_DARTS_3rd 2964862 462529152 4358464 478910784
VS_DARTS_without_LARC 3193390 493660800 4710784 511895232
"""                                                         # CIFAR-10, ImageNet: parameters, MACs


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_cells_have_the_reference_counts(name):
    cell, C = PUBLISHED[name], 50 if name == "GDAS" else 48
    small, large = genotypes.network(cell), genotypes.network(cell, C, imagenet=True)
    counts = f"{name} {count_parameters(small)} {count_macs(small, 32)} {count_parameters(large)}"
    assert f"{counts} {count_macs(large, 224)}" in re.sub(" +", " ", COUNTED)


def test_spaces_and_published_cells_are_those_of_their_sources():
    """A digest of what was compared with the sources by hand, pair by pair."""
    spaces = {name: [[*edges.items()] for edges in space.values()]
              for name, space in SPACES.items()}
    cells = [*PUBLISHED.items()]
    digest = hashlib.sha256(json.dumps([spaces, cells]).encode()).hexdigest()
    assert digest.startswith("bec1fe94bab5e1fcc2024a06")


DARTS = """Genotype(normal=[('sep_conv_3x3', 0), ('sep_conv_3x3', 1), ('sep_conv_3x3', 0), \
('sep_conv_3x3', 1), ('sep_conv_3x3', 1), ('skip_connect', 0), ('skip_connect', 0), \
('dil_conv_3x3', 2)], normal_concat=range(2, 6), reduce=[('max_pool_3x3', 0), ('max_pool_3x3', 1), \
('skip_connect', 2), ('max_pool_3x3', 1), ('max_pool_3x3', 0), ('skip_connect', 2), \
('skip_connect', 2), ('max_pool_3x3', 1)], reduce_concat=range(2, 6))"""
PT_DARTS = re.sub(r"(\('\w+', \d\), \('\w+', \d\))", r"[\1]", DARTS)      # a list for every node
FLAT = CELL._replace(normal=sum(CELL.normal, ()), reduce=sum(CELL.reduce, ()))
FORK = f"Genotype = namedtuple('Genotype', 'normal ...')\n\nclass Genotype(Base):\n\nA = {DARTS}\n"
LOGGED = '{"beta_none": null, "genotype": %s, "larc": true}' % json.dumps(CELL._asdict())


@pytest.mark.parametrize("text", [
    to_json(CELL), json.dumps(FLAT), str(CELL), FORK, PT_DARTS,
    f"07/12 01:23:45 PM | genotype = {PT_DARTS}",
    f"{PT_DARTS}\n{DARTS}\nB = {FLAT}",                     # one cell in three spellings
    f"cut off: {DARTS[:90]}\n{DARTS}", f"# B = Genotype(normal=[\n#  ('x', 0)])\nA = {DARTS}",
    DARTS.replace("'", '\\"'), re.sub(r"\w+=", "", DARTS),
    DARTS.replace("=", " = ").replace(", ", ",\n    ").replace("1),", "1),  # next (of 8"),
    PT_DARTS.replace("6))", "6),\n  connectN=None, connects=None)"),        # AutoDL-Projects
    f"{LOGGED}\n{LOGGED}"])
def test_cells_are_read_in_everybodys_notation(text):
    assert from_text(text) == load_genotype(text) == CELL
    for encoding in ("utf-8-sig", "utf-16", "utf-16-le"):
        Path("cell").write_text(text, encoding=encoding)
        assert load_genotype("cell") == CELL


def test_one_of_several_cells_is_called_by_its_name_or_number():
    other = DARTS.replace("dil_conv_3x3", "conv_7x1_1x7")   # which no network here has
    Path("fork").write_text(f"{FORK}B = {other}\nC = {DARTS.replace('dil', 'sep')}\n")
    Path("log").write_text(f"{LOGGED.replace('dil', 'sep')}\n{LOGGED}\n")
    assert load_genotype("fork:A") == load_genotype("log:2") == CELL != load_genotype("fork:C")
    for name, said in (("fork", "(A, B, C) one is wanted: FILE:NAME"), ("fork:D", "(A, B, C)"),
                       ("fork:B", "('conv_7x1_1x7', 2) is not (operation")):
        assert said in refusal(genotypes.main, [name])


def test_an_input_of_none_is_left_out():
    cell = from_text(DARTS.replace("dil_conv_3x3", "none"))
    assert cell == CELL._replace(normal=(*CELL.normal[:3], (("skip_connect", 0),)))


FAIRDARTS_B = """Genotype(normal=[('sep_conv_3x3', 2, 0), ('sep_conv_3x3', 2, 1), \
('sep_conv_3x3', 3, 1), ('dil_conv_3x3', 4, 0), ('sep_conv_5x5', 4, 1), ('dil_conv_5x5', 5, 1)], \
normal_concat=range(2, 6), reduce=[('skip_connect', 2, 0), ('dil_conv_3x3', 2, 1), \
('skip_connect', 3, 0), ('dil_conv_3x3', 3, 1), ('max_pool_3x3', 4, 0), ('sep_conv_3x3', 4, 1), \
('skip_connect', 5, 2), ('max_pool_3x3', 5, 0)], reduce_concat=range(2, 6))"""


def test_cells_of_fairdarts_name_the_node_of_each_input():
    assert from_text(FAIRDARTS_B) == PUBLISHED["FairDARTS_B"]
    with pytest.raises(ValueError, match="normal, node 3 has no input"):
        from_text(FAIRDARTS_B.replace("('sep_conv_3x3', 3, 1),", ""))


def test_a_flat_cell_of_darts_makes_the_same_network():
    plain, flat = Network(CELL, 2, 3), Network(FLAT, 2, 3)
    flat.load_state_dict(plain.state_dict())
    images = torch.randn(2, 3, 8, 8)
    assert torch.equal(plain(images)[0], flat(images)[0])


REFUSED = """\
range(2, 6) | __import__('os').abort() | neither JSON nor
range(2, 6) | range(2, 10**12) | neither JSON nor
 | | neither JSON nor
 | __import__('os').abort() | neither JSON nor
 | {} | four fields
 | [[], [], [], [], 1] | four fields
 | Genotype() | four fields
 | [1, 2, 3, 4] | normal must be a list of nodes
 | Genotype([('noise', 0, 0.5), ('noise', 1, 0.5)], [2], [], [2]) | node 2: ('noise', 0, 0.5) is not
reduce= | other= | four fields
, ('dil_conv_3x3', 2) | | normal is a flat list of 7 inputs
('dil_conv_3x3', 2) | ('exit', 2) | normal, node 5: ('exit', 2) is not (operation of model.py, node
('dil_conv_3x3', 2) | ('dil_conv_3x3', 2, 0.25) | node 5: ('dil_conv_3x3', 2, 0.25) is not
('dil_conv_3x3', 2) | ('dil_conv_3x3', 5) | normal, node 5: ('dil_conv_3x3', 5) is not
('dil_conv_3x3', 2) | ('dil_conv_3x3', True) | normal, node 5: ('dil_conv_3x3', True) is not
('skip_connect', 0), ('dil_conv_3x3', 2) | ('none', 0), ('none', 2) | normal, node 5 has no input
range(2, 6) | range(2, 7) | normal_concat must list nodes of the cell from 2 to 5
range(2, 6) | [2, 2] | normal_concat must list nodes of the cell from 2 to 5
range(2, 6) | [] | normal_concat must list nodes of the cell from 2 to 5
"""                                         # a part of DARTS (all) | what it becomes | what is said


@pytest.mark.parametrize("row", REFUSED.splitlines())
def test_what_is_no_cell_is_refused_by_what_is_odd_and_with_an_example(row):
    part, by, said = map(str.strip, row.split("|"))
    Path("cell").write_text(DARTS.replace(part or DARTS, by))
    line = refusal(genotypes.main, ["cell"])
    assert said in line and "Genotype(normal=[(" in line


@pytest.mark.parametrize("text", [
    "[" * 200000, "-" * 100000 + "1", "Genotype(" * 100000, DARTS.replace("6))", "6)\0)")])
def test_texts_that_break_parsers_are_refused(text):
    Path("cell").write_text(text)
    assert "neither JSON nor" in refusal(genotypes.main, ["cell"])


def shown_by(capsys, *arguments):
    genotypes.main([*arguments])
    return capsys.readouterr().out


def test_genotypes_command_shows_a_cell_in_the_notations_that_can_be_read_again(capsys):
    *lines, last = shown_by(capsys).splitlines()
    assert [line.split()[0] for line in lines] == list(PUBLISHED) and "genotypes.py NAME" in last
    shown = shown_by(capsys, "DARTS_V2", "--pt_darts")
    assert "node 5 = skip_connect(0) + dil_conv_3x3(2)" in shown
    assert "output = concat(2, 3, 4, 5)" in shown and "528,359,040 multiply-adds" in shown
    assert {DARTS, PT_DARTS} <= {*shown.splitlines()} and from_text(shown) == CELL
    assert "cannot be written in DARTS's notation" in shown_by(capsys, "FairDARTS_B")


@pytest.mark.parametrize("name", PUBLISHED)
def test_what_is_written_can_be_read(name):
    cell = PUBLISHED[name]
    assert from_text(genotypes.pt_darts_notation(cell)) == cell
    if name != "FairDARTS_B":                               # it has nodes with one input
        assert from_text(genotypes.darts_notation(cell)) == cell


def test_random_cells_are_uniform_and_repeatable(capsys):
    cells = [genotypes.random_genotype(seed) for seed in range(500)]
    assert from_text(shown_by(capsys, "--random", "3")) == cells[3] != cells[4]
    inputs = Counter(pair for cell in cells for pair in cell.reduce[2])
    assert len(inputs) == 7 * 4 and all(abs(count - 1000 / 28) < 20 for count in inputs.values())


# ---------------------------------------------------------------- epochs against plain loops, steps

def open_split(dataset, train=True, device=CPU, augmented=True, **flags):
    flags = {"data": "images", "image_size": None, "limit": None, "workers": 0, **flags}
    args = SimpleNamespace(dataset=dataset, **flags)
    return data.open_split(args, train, device, augmented=augmented)


def batches(split, size, purpose, epoch=0, **options):
    return list(data.make_batches(split, size, make_seed(5, purpose), **options).epoch(epoch))


def as_process(monkeypatch, rank, world):
    monkeypatch.setattr(data, "RANK", rank)
    monkeypatch.setattr(data, "WORLD", world)


def slow_sgd(gradients, weights, momenta, lr):
    norm = sum((g ** 2).sum() for g in gradients).sqrt()    # of the whole gradient
    with torch.no_grad():
        for w, m, g in zip(weights, momenta, gradients):
            m.copy_(MOMENTUM * m + g * min(1, CLIP / (norm + 1e-6)) + DECAY * w)
            w.sub_(lr * m)


def assert_run_ended_with(net, **record):
    """The run has left the state of `net`, and these values in its last record."""
    left = torch.load("run/checkpoint.pt")
    assert_near(left["net"], dict(net.state_dict()), 1e-5)
    assert {key: left["log"][-1][key] for key in record} == pytest.approx(record)


def percent(right):
    return 100 * right.double().mean().item()


def test_epochs_of_the_search_equal_a_plain_loop(float64):
    """Alpha's half is the smaller one, so it is seen again."""
    search.main([*TINY, *SGD, "--epochs=2", "--space=s3", "--node_norm", "--batch_size=64",
                 "--limit=600", "--train_portion=0.6", "--arch_learning_rate=0.1",
                 "--arch_weight_decay=0.2", "--out=run"])
    split = open_split("digits")
    w_half, alpha_half = split.take(slice(360)), split.take(slice(360, 600))
    torch.manual_seed(5)
    net = SuperNet(SPACES["s3"], 2, 3, 10, node_norm=True)
    adam = torch.optim.Adam(net.alphas.values(), 0.1, betas=(0.5, 0.999), weight_decay=0.2)
    momenta = [torch.zeros_like(w) for w in net.weights]
    for epoch, lr in enumerate((LR, (LR + 0.001) / 2)):     # of a cosine
        stream = iter([*batches(alpha_half, 64, "alpha", epoch),
                       *batches(alpha_half, 64, "alpha", (epoch, "again"))])
        for w_batch in batches(w_half, 64, "w", epoch):
            images, labels = next(stream)
            F.cross_entropy(net(images), labels).backward()
            adam.step()
            net.zero_grad()
            images, labels = w_batch
            loss = F.cross_entropy(net(images), labels)
            slow_sgd(torch.autograd.grad(loss, net.weights), net.weights, momenta, lr)
        assert len([*stream]) == 2                          # 6 of 8 were seen
    images, labels = map(torch.cat, zip(*batches(alpha_half, 64, "validation", 1)))
    logits, betas = net.eval()(images), torch.cat([*net.betas().values()])
    assert_run_ended_with(net, lr=lr, valid_loss=F.cross_entropy(logits, labels).item(),
                          valid_acc=percent(logits.argmax(1) == labels),
                          beta_none=betas[:, 0].mean().item())


@pytest.mark.parametrize("world", [1, 2])
def test_epochs_of_retraining_equal_a_plain_loop(tmp_path, monkeypatch, float64, world):
    """Two processes share every batch, the last of nine images; each has drop-paths of its own.

    Nothing uses the last node of a normal cell.
    """
    genotype = PUBLISHED["VS_DARTS"]._replace(normal_concat=(2, 4))
    Path("cell.json").write_text(to_json(genotype))
    flags = [*TINY, *SGD, f"--genotype={tmp_path / 'cell.json'}", "--epochs=2", "--image_size=32",
             "--limit=41", "--batch_size=8", "--label_smooth=0.2", "--auxiliary_weight=0.3",
             "--cutout_length=9", "--drop_path_prob=0.6", f"--out={tmp_path / 'run'}"]
    if world == 1:
        retrain.main(flags)
    else:
        assert program(__file__, *flags, launcher=TORCHRUN)[2] == 0     # see the last lines
    torch.manual_seed(5)
    net, split = Network(genotype, 2, 3, 10, auxiliary=True), open_split("digits", image_size=32)
    def used(net):
        return [p for name, p in net.named_parameters() if not name.startswith("cells.0.ops.3.")]
    momenta = [torch.zeros_like(w) for w in used(net)]
    for epoch, lr in enumerate((LR, LR / 2)):               # of a cosine
        seeds = [make_seed(5, "drop path", epoch, rank) for rank in range(world)]
        states, shares = [torch.manual_seed(seed).get_state() for seed in seeds], []
        for rank in range(world):
            as_process(monkeypatch, rank, world)
            shares.append(batches(split.take(slice(41)), 8, "data", epoch, cutout=9))
        net.drop_path_prob = 0.3 * epoch
        for parts in zip(*shares, strict=True):
            gradients = []
            for k, copy in enumerate([net, deepcopy(net)][:world]):     # rank 0 keeps its own
                torch.set_rng_state(states[k])
                images, labels = parts[k]
                loss, loss_aux = [F.cross_entropy(logits, labels, label_smoothing=0.2)
                                  for logits in copy(images)]
                gradients.append(torch.autograd.grad(loss + 0.3 * loss_aux, used(copy)))
                states[k] = torch.get_rng_state()
            slow_sgd([sum(g) / world for g in zip(*gradients)], used(net), momenta, lr)
    as_process(monkeypatch, 0, 1)
    images, labels, *_ = open_split("digits", False, image_size=32)
    logits, _ = net.eval()(((images / 255 - 0.3054) / 0.3753).permute(0, 3, 1, 2))
    in_top5 = (logits.topk(5).indices == labels[:, None]).any(1)
    assert_run_ended_with(net, test_loss=F.cross_entropy(logits, labels).item(),
                          test_error=100 - percent(logits.argmax(1) == labels),
                          test_error_top5=100 - percent(in_top5))


@pytest.mark.parametrize("node_norm, larc, sqrt_beta", [*product((False, True), repeat=3)])
def test_each_switch_reaches_its_own_place(capsys, node_norm, larc, sqrt_beta):
    switches = ["--node_norm"] * node_norm + ["--sqrt_beta"] * sqrt_beta
    switches += ["--larc", "--larc_trust=0.1", "--larc_clip"] * larc
    parts = search.make_parts(search.parse([*TINY, *switches, "--space=s1"]))
    net, defaults = parts.net, parts.w_optimizer.defaults
    normalize = nn.BatchNorm2d if node_norm else nn.Identity
    assert {type(module) for cell in net.cells for module in cell.normalize} == {normalize}
    assert net.sqrt_beta is sqrt_beta and net.space == SPACES["s1"]
    assert (defaults.get("trust_coefficient"), defaults.get("clip")) == (
        (0.1, True) if larc else (None, None))
    assert ("--sqrt_beta without" in capsys.readouterr().err) == (sqrt_beta and not node_norm)


class Crossings(TorchDispatchMode):
    """Counts the operations between devices: on a GPU each waits for it."""
    count = 0

    def __torch_dispatch__(self, operation, types, given=(), options=None):
        result = operation(*given, **(options or {}))
        leaves = tree_leaves([given, options, result])
        devices = {leaf.device for leaf in leaves if isinstance(leaf, torch.Tensor)}
        self.count += len(devices) > 1
        return result


def test_an_epoch_waits_for_nothing(monkeypatch):
    """On the meta device, where reading a value is an error. Two copies for each half: the images'
    order, and the numbers that augment them."""
    split = open_split("digits", device=torch.device("meta"), limit=8)
    placed = split.spec, split.images.device
    assert data.constants(*placed) is data.constants(*placed)       # copied once in a program
    with torch.device("meta"):
        net = SuperNet(SPACES["s2"], 2, 3)
    w_batches, alpha_batches = data.Batches(split, 4, 0, cutout=2), data.Batches(split, 4, 1)
    args = search.parse([*TINY, "--larc"])
    optimizers = search.make_optimizers(net, args)
    parts = search.Parts(args, net, *optimizers, w_batches, alpha_batches, alpha_batches)
    monkeypatch.setattr(search, "means", lambda totals: (0, 0, 0, 0))   # reads values, at the end
    with Crossings() as crossings:
        search.train_epoch(parts, 1)
    assert crossings.count == 4


# ---------------------------------------------------------------- data, schedules

@pytest.mark.parametrize("name, cutout", [("cifar10", 16), ("cifar10", 0), ("digits", 3)])
def test_augmentation_equals_a_loop_over_images(name, cutout):
    """A crop of the padded image, a flip, and a square around a pixel, by five random numbers."""
    spec = data.DATASETS[name]
    images = torch.randint(1, 256, (200, spec.size, spec.size, 3), dtype=torch.uint8)
    uniform, expected = torch.rand(200, 5), []
    side, pad = spec.size, {32: 4, 8: 1}[spec.size]
    for image, (u0, u1, u2, u3, u4) in zip(images.permute(0, 3, 1, 2), uniform.tolist()):
        y, x = int(u0 * (2 * pad + 1)), int(u1 * (2 * pad + 1))
        image = v2.functional.crop(v2.functional.pad(image, pad), y, x, side, side)
        image = v2.functional.hflip(image) if spec.flip and u2 < 0.5 else image
        image = v2.functional.normalize(image / 255, spec.mean, spec.std)
        top, left = int(u3 * side) - cutout // 2, int(u4 * side) - cutout // 2
        image[:, max(0, top):max(0, top + cutout), max(0, left):max(0, left + cutout)] = 0
        expected.append(image)
    assert_near(data.augment(images, uniform, spec, cutout), torch.stack(expected), 1e-5)


@pytest.fixture(params=["folder", "imagenet"])
def numbered(request):
    """13 copies of a picture, in memory or on disk, each a class: the label is its number."""
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 20, 3), np.uint8))
    for k in range(13):
        Path(f"images/train/{k:02}").mkdir(parents=True)
        picture.save(f"images/train/{k:02}/0.png")
    return open_split(request.param, image_size=16)


def epoch_of(monkeypatch, split, size=13, seed=1, epoch=0, world=1, train=True):
    """For each process the numbers in its batches; and all images by their number."""
    numbers, seen = [[] for _ in range(world)], {}
    for rank in range(world):
        as_process(monkeypatch, rank, world)
        for images, labels in data.make_batches(split, size, seed, 3, train).epoch(epoch):
            numbers[rank].append(labels.tolist())
            seen |= dict(zip(labels.tolist(), images))
    return numbers, torch.stack([seen[k] for k in sorted(seen)])


def test_order_and_augmentation_depend_on_seed_epoch_and_image_alone(monkeypatch, numbered):
    order, expected = epoch_of(monkeypatch, numbered)
    for same in ({"size": 4}, {"size": 6, "world": 3}):
        assert torch.equal(epoch_of(monkeypatch, numbered, **same)[1], expected)
    for other in ({"seed": 2}, {"epoch": 1}):
        other_order, images = epoch_of(monkeypatch, numbered, **other)
        assert other_order != order and (images != expected).flatten(1).any(1).all()
    assert len(expected.unique(dim=0)) == 13                # each copy is augmented by itself


@pytest.mark.parametrize("world, sizes", [
    (1, [[9, 4]]), (2, [[5, 2], [4, 2]]), (3, [[5], [4], [4]])])
def test_every_image_trains_and_is_tested_once(monkeypatch, numbered, world, sizes):
    """Four are too few for batch norm in three processes: they join the batch before."""
    shares, _ = epoch_of(monkeypatch, numbered, 9, world=world)
    tested, _ = epoch_of(monkeypatch, numbered, 9, world=world, train=False)
    assert [[len(batch) for batch in share] for share in shares] == sizes
    for found in (shares, tested):
        assert sorted(sum(sum(found, []), [])) == [*range(13)]


def test_a_process_without_a_test_image_adds_nothing(monkeypatch, numbered):
    net, few = Network(PUBLISHED["VS_DARTS"], 2, 3, 13), numbered.take(torch.arange(2))
    as_process(monkeypatch, 2, 3)
    monkeypatch.setattr(model, "means", torch.Tensor.tolist)
    assert model.evaluate(net, data.make_batches(few, 8, train=False).epoch(0)) == [0, 0, 0, 0]


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("dataset", ["digits", "imagenet"])
def test_the_weights_alone_decide_the_layout(dataset, last):
    make_folder("images")
    split, contiguous = open_split(dataset, image_size=32), set()
    def look(module, given, y):
        contiguous.add(y.is_contiguous())
    for net in SuperNet(SPACES["s1"], 4, 3), Network(PUBLISHED["VS_DARTS_2nd"], 4, 3):
        net = place(net, CPU) if last else net
        for module in net.modules():
            if isinstance(module, nn.Conv2d):
                module.register_forward_hook(look)
        for train in (True, False):
            net(next(data.make_batches(split, 8, 0, train=train).epoch(0))[0])
    assert contiguous == {not last}
    net = place(net, torch.device("meta"))                  # no CPU, like a GPU
    assert all(p.is_contiguous() for p in net.parameters())


@pytest.mark.parametrize("name, theirs, shape", [
    ("cifar10", "CIFAR10", (1, 32, 32, 3)), ("cifar100", "CIFAR100", (1, 32, 32, 3)),
    ("svhn", "SVHN", (1, 3, 32, 32)), ("fashion_mnist", "FashionMNIST", (1, 28, 28))])
def test_a_bright_corner_stays_at_the_upper_right(monkeypatch, name, theirs, shape):
    pixels = np.zeros(shape, np.uint8)
    pixels[(0, ..., 0, -1) if name == "svhn" else (0, 0, -1)] = 255

    def read(root, part, **options):                        # in place of torchvision's class
        labels = np.array([part in (True, "train")])
        return SimpleNamespace(data=pixels, targets=labels, labels=labels, classes=["cat", "dog"])
    monkeypatch.setattr(torchvision.datasets, theirs, read)
    for train in (True, False):
        split = open_split(name, train)
        assert split.images.shape == (1, shape[2], shape[2], 3) and split.images.sum() == 3 * 255
        assert (split.images[0, 0, -1] == 255).all() and split.labels.tolist() == [train]


def test_digits_are_whole_split_once_and_resized():
    train, test = open_split("digits"), open_split("digits", False, limit=10)   # all are tested
    with np.load(HERE / "digits.npz") as file:
        images = torch.cat([train.images, test.images])[..., 1]
        assert np.array_equal(images, np.round(file["images"] * (255 / 16)))
        assert np.array_equal(torch.cat([train.labels, test.labels]), file["labels"])
    doubled = train.images.repeat_interleave(2, 1).repeat_interleave(2, 2)
    assert torch.equal(open_split("digits", image_size=16).images, doubled)


def make_folder(root, shape=(40, 40), count=6):
    """Dark and light pictures in root/{train,val}/{dark,light}."""
    pixels = np.random.default_rng(0)
    for part, (name, low) in product(("train", "val"), (("dark", 0), ("light", 200))):
        Path(root, part, name).mkdir(parents=True)
        for k in range(count):
            picture = pixels.integers(low, low + 50, (*shape, 3), np.uint8)
            Image.fromarray(picture).save(Path(root, part, name, f"{k}.png"))


def test_a_folder_is_read_in_mixed_order_as_far_as_needed(monkeypatch, capsys):
    opened, read_image = [], data.read_image
    monkeypatch.setattr(data, "read_image", lambda path: opened.append(path) or read_image(path))
    make_folder("images")
    light = Path("images/train/light").rename("elsewhere")
    Path("images/train/light").symlink_to(light.resolve())
    Path("images/train/.cache").mkdir()                     # no class
    (light / "0.jfif").touch()
    split = open_split("folder", image_size=20)
    assert "2 classes, 12 images, 1 other files left out" in capsys.readouterr().out
    for path, image, label in zip(opened, split.images, split.labels, strict=True):
        pixels = np.array(Image.open(path)).reshape(20, 2, 20, 2, 3)
        assert np.array_equal(image, pixels.mean((1, 3)).round())
        assert split.classes[label] == Path(path).parent.name
    assert 0 < split.labels[:6].sum() < 6
    few = open_split("folder", image_size=20, limit=5)
    assert torch.equal(few.images, split.images[:5]) and len(opened) == 12 + 5
    shutil.rmtree("images/train")                           # only val is needed to test
    assert len(open_split("folder", False, limit=5).labels) == 12


def test_names_of_classes_have_one_form_and_one_order():
    """macOS takes an accent as a letter of its own, before all others."""
    for part, form in (("train", "NFC"), ("val", "NFD")):
        for brightness, name in enumerate(("kz", "käfer")):
            folder = Path("images", part, unicodedata.normalize(form, name))
            folder.mkdir(parents=True)
            Image.new("L", (8, 8), brightness).save(folder / "0.png")
        split = open_split("folder", part == "train", image_size=8)
        assert split.classes == ["kz", "käfer"]
        assert torch.equal(split.images[:, 0, 0, 0], split.labels)


@pytest.mark.parametrize("train, augmented", [(True, True), (True, False), (False, True)])
def test_imagenet_goes_through_the_transforms_of_darts(train, augmented):
    make_folder("images", (300, 260), count=1)
    jitter = v2.ColorJitter(brightness=0.4, contrast=0.4, saturation=0.4, hue=0.2)
    steps = [v2.RandomResizedCrop(224), v2.RandomHorizontalFlip(), jitter]
    plain = [v2.Resize(256), v2.CenterCrop(224)]            # for tests, and to choose proxy data
    transform = v2.Compose(steps if train and augmented else plain)
    mean, std = np.array([(0.485, 0.456, 0.406), (0.229, 0.224, 0.225)])
    split = open_split("imagenet", train, augmented=augmented)
    (images, labels), = data.make_batches(split, 8, seed=0, train=False).epoch(3)
    for k, (image, label) in enumerate(zip(images, labels, strict=True)):
        folder = Path("images", "train" if train else "val", split.classes[label])
        torch.manual_seed(make_seed(0, "image", 3, k))      # each has its own random numbers
        expected = (np.array(transform(Image.open(folder / "0.png"))) / 255 - mean) / std
        assert np.allclose(image.permute(1, 2, 0), expected, atol=1e-5)


def values(args, flags):
    return [getattr(args, flag) for flag in flags.split()]


def test_protocols():
    def some(*given):
        return values(retrain.parse(["--genotype=VS_DARTS", *given]), (
            "epochs batch_size layers init_channels learning_rate weight_decay label_smooth "
            "drop_path_prob cutout_length auxiliary_weight momentum grad_clip"))
    cifar10 = [600, 96, 20, 36, 0.025, 3e-4, 0, 0.2, 16, 0.4, 0.9, 5]
    imagenet = [250, 128, 14, 48, 0.1, 3e-5, 0.1, 0, 0, 0.4, 0.9, 5]
    linear = ["--dataset=imagenet", "--lr_scheduler=linear"]
    assert some() == some("--dataset=folder") == cifar10 and some(linear[0]) == imagenet
    robust_darts = [600, 96, 8, 16, *cifar10[4:]]
    assert some("--dataset=svhn") == some("--dataset=cifar100") == robust_darts
    assert some(*linear) == [250, 1024, 14, 48, 0.5, *imagenet[5:]]
    assert some(*linear, "--batch_size=32")[1] == 32        # flags given win
    assert some("--image_size=16", "--drop_path_prob=0.1")[7:10] == [0.1, 8, 0]


def test_defaults_of_the_search_are_darts_but_for_digits():
    def some(*given):
        return values(search.parse(given), (
            "epochs layers init_channels arch_learning_rate batch_size learning_rate momentum "
            "weight_decay grad_clip arch_weight_decay"))
    darts = [50, 8, 16, 3e-4, 64, 0.025, 0.9, 5e-3, 5, 1e-3]
    assert some() == some("--dataset=imagenet") == some("--dataset=folder") == darts
    assert some("--dataset=digits") == [6, 3, 8, 0.03, 128, *darts[5:]]
    given = "--dataset=digits", "--layers=8", "--epochs=7"  # 8: DARTS's default, by hand
    assert some(*given) == [7, 8, 8, 0.03, 128, *darts[5:]]


def rates(*flags):
    args, rates = retrain.parse(["--genotype=VS_DARTS", *flags]), []
    optimizer = torch.optim.SGD([torch.zeros(1)], args.learning_rate)
    scheduler = retrain.make_scheduler(args, optimizer)
    for _ in range(args.epochs):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return rates


def test_schedules_equal_their_formulas():
    cosine = [0.025 * (1 + math.cos(math.pi * epoch / 600)) / 2 for epoch in range(600)]
    assert rates() == pytest.approx(cosine)
    assert rates("--dataset=imagenet") == pytest.approx([0.1 * 0.97 ** e for e in range(250)])
    linear = ["--dataset=imagenet", "--lr_scheduler=linear"]
    pc_darts, small = rates(*linear), rates(*linear, "--batch_size=256")
    literal = {0: 0.1, 1: 0.2, 4: 0.5, 5: 0.4897959184, 122: 0.2510204082, 244: 0.0020408163,
               245: 0.0020408163, 246: 0.0016326531, 249: 0.0004081633}     # of PC-DARTS's code
    assert {epoch: pc_darts[epoch] for epoch in literal} == pytest.approx(literal, abs=1e-9)
    assert small[:2] == pytest.approx([0.5, 0.4979591837])  # no warmup up to 256


def test_all_seeds_of_a_run_differ(monkeypatch):
    seeds = {}
    for module in (data, search, retrain):
        monkeypatch.setattr(
            module, "make_seed", lambda *parts: seeds.setdefault(parts, make_seed(*parts)))
    for module, flag in ((search, "--space=s2"), (retrain, "--genotype=GDAS")):
        module.main([*TINY, flag, "--epochs=3", "--limit=40", f"--out={flag}"])
    assert len(seeds) == (3 + 3 + 3 * 3) + (1 + 3 + 3)      # data; noise, drop path; epochs
    assert len({*seeds.values(), make_seed(5), make_seed(5, 0)}) == len(seeds) + 2


# ---------------------------------------------------------------- stopped runs

def read_log(path):
    return [*map(json.loads, Path(path).read_text().splitlines())]


def without_clock(value):
    """The same without what the clock measured, at any depth."""
    if isinstance(value, dict):
        return {key: without_clock(part) for key, part in value.items()
                if key not in ("seconds", "images_per_second")}
    return [*map(without_clock, value)] if isinstance(value, (list, tuple)) else value


def checkpoints(folder):
    """What the checkpoints of a run, and of runs within it, hold, without the clock."""
    return [without_clock(torch.load(path)) for path in sorted(Path(folder).rglob("*.pt"))]


def tensors_equal(a, b):
    """Whether nested dicts and lists of tensors are equal, bit for bit; NaN equals NaN."""
    texts = [json.dumps(value, default=torch.Tensor.tolist, sort_keys=True) for value in (a, b)]
    return texts[0] == texts[1]


def assert_same_runs(a, b):
    """The same checkpoints, log and result."""
    assert tensors_equal(checkpoints(a), checkpoints(b))
    logs = [without_clock(read_log(f"{folder}/log.jsonl")) for folder in (a, b)]
    assert logs[0] == logs[1]
    for file in ("genotype.json", "result.json"):
        if Path(a, file).exists():
            assert Path(a, file).read_text() == Path(b, file).read_text()


def begun(*arguments, launcher=PYTHON):
    """A program in a process group of its own, which Ctrl-C reaches even after a shell's `&`."""
    return subprocess.Popen(
        [*launcher, *map(str, arguments)], cwd=HERE, env=ENVIRONMENT, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))


def end_of(process):
    """(what it printed, what it said on stderr, its status), once its last worker has ended."""
    try:
        return *process.communicate(timeout=200), process.returncode
    finally:
        kill(process, signal.SIGKILL)                       # nothing that hangs is left behind


def program(*arguments, launcher=PYTHON):
    return end_of(begun(*arguments, launcher=launcher))


def kill(process, number):
    """Sends a signal to a program and its workers."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    for child in children.read_text().split() if children.exists() else []:
        os.kill(int(child), number)                         # torchrun's are in no group of ours
    if process.poll() is None:
        os.killpg(process.pid, number)


def stop_after(epochs, main, flags):
    """Stops a program, in this process, once it has saved so many epochs; after 0 in its first."""
    ended = []

    def end_epoch(self, *given, real=run.Run.end_epoch):
        if epochs > 0:
            real(self, *given)
        ended.append(self.epoch)
        if len(ended) >= epochs:
            raise KeyboardInterrupt
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(run.Run, "end_epoch", end_epoch)
        main(flags)


THREE = [*TINY, "--epochs=3", "--limit=600"]
S4 = [*THREE, "--space=s4", "--node_norm", "--larc", "--sqrt_beta"]      # S4 draws noise
VS_DARTS = [*THREE, "--genotype=VS_DARTS"]
IMAGENET = "--dataset=imagenet --image_size=32 --batch_size=8".split()
RUNS = {  # program, launcher, flags
    "search": (search, PYTHON, [*S4, "--batch_size=64", "--train_portion=0.4", "--keep_nets"]),
    "search by two": (search, TORCHRUN, [*S4, "--batch_size=128"]),
    "search of imagenet": (search, PYTHON, [*S4, *IMAGENET, "--workers=2"]),
    "retraining": (retrain, PYTHON, [*VS_DARTS, "--batch_size=96"]),
    "imagenet": (retrain, PYTHON, [*VS_DARTS, *IMAGENET, "--workers=1", "--drop_path_prob=0.2"])}


def finish(name, *flags):
    module, launcher, _ = RUNS[name]
    if launcher is PYTHON:
        module.main([*flags])
    else:
        assert program(module.__file__, *flags, launcher=launcher)[2] == 0


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Folders of runs that nothing stopped, each made when first asked for; and of images."""
    root = tmp_path_factory.mktemp("whole")
    make_folder(root / "images", (64, 64), count=20)

    def get(name):
        if not (root / name).exists():
            finish(name, *RUNS[name][2], f"--data={root / 'images'}", f"--out={root / name}")
        return root / name
    return get


@pytest.mark.parametrize("name, number", [
    ("search", signal.SIGKILL), ("search by two", signal.SIGKILL), ("imagenet", signal.SIGINT)])
def test_a_stopped_run_goes_on_to_the_same_end(tmp_path, whole, name, number):
    module, launcher, flags = RUNS[name]
    flags = [*flags, f"--data={whole('images')}", f"--out={tmp_path / 'run'}"]
    process = begun(module.__file__, *flags, launcher=launcher)
    while not Path("run/checkpoint.pt").exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    kill(process, number)
    printed, errors, status = end_of(process)
    assert status == -number and printed.count("epoch 0 lr") == 1
    if number == signal.SIGINT:
        assert errors.count("\n") == 1 and "--resume FOLDER" in errors
    assert "is in use" in refusal(module.main, flags)
    if launcher is TORCHRUN:
        assert "processes 2, not 1" in refusal(module.main, ["--resume=run"])
    else:
        assert "layers 3, not 5" in refusal(module.main, ["--resume=run", "--layers=5"])
    finish(name, f"--resume={tmp_path / 'run'}")
    assert_same_runs("run", whole(name))
    if launcher is PYTHON:
        assert "holds a finished run" in refusal(module.main, ["--resume=run/checkpoint.pt"])


def test_a_run_without_a_checkpoint_starts_again():
    Path("cell").write_text(to_json(CELL))
    flags = [*TINY, "--genotype=cell"]
    retrain.main([*flags, "--out=whole"])
    stop_after(0, retrain.main, [*flags, "--out=run"])
    shutil.copytree("run", "corrected")
    Path("cell").unlink()                                   # a run keeps its cell
    retrain.main(["--resume=run"])
    assert_same_runs("run", "whole")
    for folder in ("fresh", "corrected"):
        retrain.main([*TINY, "--genotype=GDAS", f"--out={folder}"])
    assert_same_runs("fresh", "corrected")


def test_a_lost_log_is_in_the_checkpoint(whole):
    stop_after(2, retrain.main, [*RUNS["retraining"][2], "--out=run"])
    Path("run/log.jsonl").unlink()
    retrain.main(["--resume=run"])
    assert_same_runs("run", whole("retraining"))


def test_a_folder_has_one_program_at_a_time():
    started = search.parse([*TINY, "--out=run"])
    first = run.Run(started, "genotype.json")
    first.begin({}, {})
    for args in (started, search.parse(["--resume=run"])):
        second = run.Run(args, "genotype.json")
        assert "in use by a running program" in refusal(second.begin, {}, {})
    assert json.loads(Path("run/config.json").read_text()) == vars(started)
    del first                                               # as if its program had died
    run.Run(started, "genotype.json").begin({}, {})


def test_a_start_that_fails_leaves_no_folder():
    assert "too few" in refusal(search.main, [*TINY, "--train_portion=0.001", "--out=run"])
    assert not Path("run").exists()


def test_files_are_never_half_written(monkeypatch):
    net, first = nn.Linear(1, 1), run.Run(search.parse([*TINY, "--out=run"]), "genotype.json")
    first.begin({"net": net}, {})
    first.end_epoch({"loss": 0.5})
    before = {path: path.read_bytes() for path in Path("run").iterdir()}
    assert {path.name for path in before} == {"config.json", "log.jsonl", "checkpoint.pt"}
    assert torch.serialization.get_unsafe_globals_in_checkpoint("run/checkpoint.pt") == []
    assert "not finite after epoch 1" in refusal(first.end_epoch, {"loss": math.nan})
    monkeypatch.setattr(os, "fsync", lambda descriptor: os.close(-1))       # fails, as a full disk
    assert "checkpoint.pt cannot be written" in refusal(run.write, first.checkpoint, "more")
    monkeypatch.setattr(run, "RANK", 1)                     # only the first process writes
    run.write(first.checkpoint, "more")
    assert before == {path: path.read_bytes() for path in Path("run").iterdir()}


def test_a_search_leaves_what_it_found(whole):
    folder, space = whole("search"), SPACES["s4"]
    net = SuperNet(space, 2, 3, 10, True, True)
    net.load_state_dict(torch.load(folder / "net-1.pt"))
    first = net.alphas["normal"].clone()
    net.load_state_dict(torch.load(folder / "net-3.pt"))
    record, genotype = read_log(folder / "log.jsonl")[-1], load_genotype(folder / "genotype.json")
    assert not torch.equal(net.alphas["normal"], first)
    assert record["alphas"] == {name: alpha.tolist() for name, alpha in net.alphas.items()}
    assert genotype == brute_derive(space, net.betas())     # of the last alphas
    assert record["genotype"] == json.loads(to_json(genotype))


def test_a_retraining_keeps_the_search_that_its_cell_is_from(whole):
    shutil.copytree(whole("search"), "found")
    source = json.loads(Path("found/search.json").read_text())
    assert source["space"] == "s4" and source["seconds"] > 0
    assert "checksum" in source["train_split"]

    def noted(name):
        args = retrain.parse([*TINY, f"--genotype={name}"])
        return retrain.source_of(args, load_genotype(name))
    assert noted("found/genotype.json") == source and noted("VS_DARTS") is None
    Path("found/genotype.json").write_text(to_json(CELL))   # another one than search.json's
    assert noted("found/genotype.json") is None


def test_a_retraining_reports_the_last_epoch(whole):
    folder = whole("retraining")
    errors = [record["test_error"] for record in read_log(folder / "log.jsonl")]
    result = json.loads((folder / "result.json").read_text())
    assert (result["test_error"], result["epoch"]) == (errors[-1], len(errors) - 1)
    assert result["best_test_error"] == min(errors)
    net = Network(PUBLISHED["VS_DARTS"], 2, 3)
    net.load_state_dict(torch.load(folder / "weights.pt")["net"])
    assert (result["parameters"], result["macs"]) == (count_parameters(net), count_macs(net, 8))


@pytest.mark.parametrize("file", ["", "weights.pt", "checkpoint.pt"])
def test_a_network_is_tested_alone_as_after_its_last_epoch(whole, capsys, file):
    for name, flags in (("retraining", []), ("imagenet", ["--dataset=imagenet"])):
        retrain.main([f"--evaluate={whole(name) / file}", *flags])
        error = read_log(whole(name) / "log.jsonl")[-1]["test_error"]
        assert f"test error {error:.2f}%" in capsys.readouterr().out


@pytest.mark.parametrize("terminal, said", [(False, "2468"), (True, "2345678")])
def test_progress_says_what_is_left_and_not_too_often(monkeypatch, capsys, terminal, said):
    clock = [0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    for item in data.progress(range(9), "epoch 3", 9, images=80):
        clock[0] += 40 if item else 500                     # the first takes longer
    lines = [f"epoch 3: {k} of 9, {40 * (9 - int(k))} s left, 2 images/s" for k in said]
    assert capsys.readouterr().err.splitlines() == lines


def test_what_a_cluster_sets_makes_no_search_of_several_processes(tmp_path):
    launcher = ["env", "RANK=1", "LOCAL_RANK=1", "WORLD_SIZE=2", *PYTHON]
    flags = [*TINY, "--limit=8", f"--out={tmp_path}/run"]
    printed, errors, status = program("search.py", *flags, launcher=launcher)
    assert (status, errors) == (0, "") and "epoch 0 lr" in printed
    assert Path("run/genotype.json").exists()


def test_a_search_whose_reader_leaves_says_so_by_its_status(tmp_path):
    command = shlex.join([*PYTHON, "search.py", *TINY, "--epochs=9", "--limit=64",
                          f"--out={tmp_path}/run"])
    _, errors, status = program("-c", f"{command} | head -2; exit ${{PIPESTATUS[0]}}",
                                launcher=["bash"])
    assert (errors, status) == ("", 1)


def sigint_is_blocked():
    return signal.SIGINT in signal.pthread_sigmask(signal.SIG_BLOCK, [])


def test_sigint_is_blocked_in_workers_alone(monkeypatch):
    loader = data.DataLoader([0], num_workers=1, collate_fn=lambda images: sigint_is_blocked())
    assert [*data.read(loader)] == [True] and not sigint_is_blocked()
    monkeypatch.setattr(data.DataLoader, "__iter__", lambda loader: 1 / 0)  # no worker starts
    with pytest.raises(ZeroDivisionError):
        next(data.read(loader))
    assert not sigint_is_blocked()


def test_by_default_every_run_has_a_folder_of_its_own(monkeypatch):
    monkeypatch.setattr(time, "strftime", lambda form: "now")
    first = search.parse(["--larc", "--node_norm"]).out
    assert first == f"runs/search-node_norm-larc-now-{os.getpid()}"
    monkeypatch.setattr(os, "getpid", lambda: 0)            # another process in the same second
    assert search.parse(["--larc", "--node_norm"]).out == "runs/search-node_norm-larc-now-0"


# ---------------------------------------------------------------- what is refused

def line_of(command, capsys):
    """The one line with which a command is refused, argparse's too."""
    program, *arguments = shlex.split(command)
    with pytest.raises((SystemExit, OSError)) as error:     # run.start prints an OSError, too
        importlib.import_module(program).main(arguments)
    code = getattr(error.value, "code", str(error.value))
    line = code if isinstance(code, str) else capsys.readouterr().err.removesuffix("\n")
    assert code and line and "\n" not in line
    return line


def rows(table):
    """Of a table of commands: each, and words of the line that refuses it."""
    return [re.split(" +-> ", row) for row in table.strip("\n").splitlines()]


@pytest.mark.parametrize("command, said", rows("""
search --dataset mnist                            -> invalid choice: 'mnist'
search --epochs 0                                 -> --epochs: it must be from 1
search --learning_rate nan                        -> from 0
search --epoch 3                                  -> unrecognized arguments: --epoch
search --larc_trust 0.1                           -> they need --larc
search --learning_rate 0.0001                     -> is below --learning_rate_min 0.001
search --proxy p --limit 9                        -> leave out --limit
search --proxy nowhere --dataset digits           -> nowhere cannot be read
search --resume nowhere                           -> nowhere/config.json cannot be read
search --dataset cifar10 --device cpu             -> cifar10 cannot be read under data
search --dataset fashion_mnist --device cpu       -> fashion_mnist cannot be read under data
search --dataset svhn --device cpu                -> svhn cannot be read under data
search --dataset digits --device warp             -> --device warp: Expected one of cpu
search --dataset digits --device meta             -> --device meta:
search --dataset digits --train_portion 0.0001    -> too few
search --dataset digits --out /proc/nowhere/run   -> /proc/nowhere/run cannot be written
retrain                                           -> --genotype is needed
retrain --genotype VS_DART                        -> VS_DART is no published cell
retrain --genotype GDAS --dataset digits --auxiliary_weight 0.4        -> 32x32, not 8x8
retrain --genotype GDAS --dataset imagenet --lr_scheduler linear --epochs 5    -> --epochs 6
retrain --evaluate ''                             -> config.json cannot be read
proxy --dataset digits                            -> --classifier is needed
proxy --scheme random --out /proc/nowhere         -> --out /proc/nowhere: No such file
genotypes nothing                                 -> genotypes.py: nothing is no published cell
genotypes --random -1                             -> --random: it must be from 0
"""))
def test_what_cannot_be_is_refused_before_an_epoch(monkeypatch, capsys, command, said):
    monkeypatch.setattr("urllib.request.urlopen", lambda *given, **options: 1 / 0)      # no network
    for module in (search, retrain):
        monkeypatch.setattr(module, "train_epoch", lambda *given: 1 / 0)
    assert said in line_of(command, capsys)


@pytest.mark.parametrize("command", ["search --space s2", "retrain --genotype GDAS"])
def test_a_diverging_run_is_refused(capsys, command):
    huge = "--learning_rate 1e9 --weight_decay 1e9 --grad_clip 1e9 --limit 40"
    said = line_of(" ".join([command, *TINY, huge]), capsys)
    assert "not finite after epoch 0: try a smaller --learning_rate" in said


@pytest.mark.parametrize("content", [pickle.dumps(Path("x")), {"epoch": 1}, {"facts": 3}], ids=str)
@pytest.mark.parametrize("command, name, result", [
    ("search --resume run", "search", "genotype.json"),
    ("retrain --evaluate run/checkpoint.pt", "retraining", "result.json")])
def test_a_file_that_is_no_checkpoint_is_refused(whole, capsys, content, command, name, result):
    shutil.copytree(whole(name), "run")
    Path("run", result).unlink()
    torch.save(content, "run/checkpoint.pt")
    assert "run/checkpoint.pt" in line_of(command, capsys)


@pytest.mark.parametrize("flag, said", [
    ("--resume=run", "run is a run with layers unknown, not None"),
    ("--evaluate=run", "run/weights.pt holds no network of this run")])
def test_a_run_of_another_version_is_refused(whole, flag, said):
    shutil.copytree(whole("retraining"), "run")
    config = json.loads(Path("run/config.json").read_text())
    del config["layers"]
    Path("run/config.json").write_text(json.dumps(config))
    assert said in refusal(retrain.main, [flag])


@pytest.mark.parametrize("file, content, said", [
    ("run/notes.txt", "mine", "is in use"), ("run/config.json", '{"lr": 1}', "is in use"),
    ("run", "no folder", "cannot be written (File exists)")])
def test_what_a_user_has_in_a_folder_is_left_as_it_is(file, content, said):
    Path(file).parent.mkdir(exist_ok=True)
    Path(file).write_text(content)
    before = {*Path().rglob("*")}
    assert refusal(search.main, [*TINY, "--out=run"]).startswith(f"run {said}")
    assert {*Path().rglob("*")} == before and Path(file).read_text() == content


def test_runs_may_be_a_link_to_what_is_not_there_yet():
    Path("runs").symlink_to("disk/runs")
    search.main([*TINY, "--limit=8", "--out=runs/one"])
    assert Path("disk/runs/one/genotype.json").exists()


RETRAIN = f"retrain {' '.join(TINY)} --genotype GDAS --data images --workers 0 --epochs 2 --out run"
both_kinds = pytest.mark.parametrize("dataset", ["folder", "imagenet"])


@both_kinds
@pytest.mark.parametrize("change, said", rows("""
rm -r images/val                                    -> images/val/CLASS/IMAGE is needed
cd images/val; mv dark/* .; rm -r dark light        -> images/val/CLASS/IMAGE is needed
cd images/val; rm -r dark; mv light .light          -> images/val/CLASS/IMAGE is needed
rm -r images/val/dark                               -> the classes differ (dark)
mv images/val/dark images/val/night                 -> the classes differ (dark, night)
echo no picture > images/val/dark/1.png             -> val/dark/1.png cannot be read
"""))
def test_a_tree_of_images_that_cannot_be_read_is_refused(capsys, dataset, change, said):
    make_folder("images", (8, 8))
    subprocess.run(change, shell=True, check=True)
    assert said in line_of(f"{RETRAIN} --dataset {dataset} --image_size 8", capsys)


@both_kinds
@pytest.mark.parametrize("change, said", rows("""
rm others/train/dark/1.png                          -> the train_split was
mv others/val/dark/1.png others/val/light/9.png     -> the test_split was
cp others/val/dark/1.png others/val/dark/2.png      -> the test_split was
cp -r others/train/dark others/train/night; cp -r others/val/dark others/val/night -> (night)
"""))
def test_a_run_does_not_go_on_with_other_images(dataset, change, said):
    make_folder("images", (8, 8))
    stop_after(1, retrain.main, shlex.split(f"{RETRAIN} --image_size 8 --dataset {dataset}")[1:])
    shutil.copytree("images", "others")
    subprocess.run(change, shell=True, check=True)
    if dataset == "folder" or not change.startswith("cp others"):   # on disk: by its name alone
        assert said in refusal(retrain.main, ["--resume=run", "--data=others"])


def long_text(path):
    info = PngInfo()
    info.add_text("words", "x" * 2**21, zip=True)           # which PIL refuses by a ValueError
    Image.new("RGB", (64, 64)).save(path, "png", pnginfo=info)


@pytest.mark.parametrize("draw, said", [
    (long_text, "."),
    *[(Image.new(mode, (8, 8)).save, f"mode {mode}") for mode in ("I;16", "I", "F")]])
def test_pictures_that_are_not_one_of_eight_bits_are_refused(draw, said):
    draw("1.tif")
    with pytest.raises(data.ImageError, match=f"1.tif cannot be read .*{said}"):
        data.read_image("1.tif")


def test_an_image_that_a_worker_cannot_read_ends_the_program(tmp_path):
    make_folder("images")
    long_text("images/train/dark/0.png")
    flags = [*RUNS["imagenet"][2], f"--data={tmp_path}/images", f"--out={tmp_path}/run"]
    _, errors, status = program("retrain.py", *flags)
    assert status == 1 and errors.count("\n") == 1
    assert "images/train/dark/0.png cannot be read" in errors


# ---------------------------------------------------------------- proxy data, several processes

PUBLISHED_COUNTS = """1 0 0 0 0 0 1 3 3 4 6 15 11 27 40 62 131 168 288 373 495 602 874 1057 1332
    1674 1940 2260 2468 2655 2831 3088 2989 3276 3408 3439 3442 3239 2892 2329 1600 949 28"""


def test_entropy_is_that_of_the_softmax():
    logits = torch.tensor([[0.0, 0, 0], [1, 2, 3], [0, 60, 0], [2000, 0, 0]])
    batches = SimpleNamespace(shown=lambda *given: zip(logits.split(3), "ab"))
    expected = torch.distributions.Categorical(logits=logits.double()).entropy()
    np.testing.assert_allclose(proxy.entropies(torch.clone, batches), expected, rtol=1e-9)


def test_histogram_takes_zeros_and_edges():
    edges, bins = proxy.histogram(np.array([0, 1e-2, 0.02, 0.1, 0.5, 1]), 0.5)
    assert edges.tolist() == [-2, -1.5, -1, -0.5, 0] and bins.tolist() == [0, 0, 0, 2, 3, 3]
    assert [part.tolist() for part in proxy.histogram(np.ones(3), 0.5)] == [[0, 0.5], [0, 0, 0]]


def test_the_published_histogram_and_the_weights_of_its_bins():
    counts = np.array(PUBLISHED_COUNTS.split(), int)        # CIFAR-10's; 38 bins have images
    entropy = 10 ** np.repeat(-20.75 + 0.5 * np.arange(43), counts)
    edges, bins = proxy.histogram(entropy, 0.5)
    assert edges == pytest.approx(-21 + 0.5 * np.arange(44))
    assert (np.bincount(bins) == counts).all()
    n = counts[counts > 0]
    for scheme, weights in {"p1": (3443 - n) / (38 * 3443 - 50000), "p2": 0 * n + 1 / 38,
                            "p3": 1 / n / (1 / n).sum(), "random": n / 50000}.items():
        found = proxy.bin_weights(counts, scheme)
        assert found[counts > 0] == pytest.approx(weights) and found[counts == 0].sum() == 0


def test_images_are_drawn_without_replacement_as_often_as_their_bins_say():
    bins, odds = np.array([0, 1, 1, 3, 3, 3, 3]), np.array([16, 6, 6, 1, 1, 1, 1])
    assert sorted(proxy.draw(bins, "p1", 7, seed=0)) == [*range(7)]
    drawn = [proxy.draw(bins, "p1", 1, seed).item() for seed in range(3000)]
    assert np.bincount(drawn) / 3000 == pytest.approx(odds / odds.sum(), abs=0.03)
    halves = [proxy.draw(bins, "p1", 6, seed)[:3] for seed in range(1000)]      # are alike
    assert abs(np.mean([0 in half for half in halves]) - 0.5) < 0.1


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with a trained classifier, and the proxy file that it made."""
    folder = tmp_path_factory.mktemp("proxy")
    retrain.main([*TINY, "--genotype=GDAS", "--batch_size=16", f"--out={folder}/classifier"])
    proxy.main([*chosen_by(folder), "--fraction=0.25", f"--out={folder}/proxy.json"])
    return folder


def chosen_by(folder):
    return ["--dataset=digits", f"--classifier={folder}/classifier/weights.pt"]


@torch.no_grad()
def slow_entropies(weights, split):
    """By a network of digits.npz, in double precision."""
    net, _ = retrain.load_network(weights, CPU)
    p = net.eval()(data.normalize(split.images, split.spec))[0].double().softmax(1)
    return -(p * p.log()).sum(1).numpy()


def test_the_file_says_what_was_drawn_and_from_what(made, capsys):
    weights, held = made / "classifier/weights.pt", json.loads((made / "proxy.json").read_text())
    drawn, split = held["w"] + held["alpha"], open_split("digits")
    assert (len(held["w"]), len(held["alpha"]), len(set(drawn))) == (179, 180, 359)
    assert held["split"] == split.name and "1437 images" in split.name
    entropy = slow_entropies(weights, split)
    assert [held["mean"], held["max"]] == pytest.approx([entropy.mean(), entropy.max()], rel=1e-5)
    proxy.main([f"--show={made}/proxy.json"])
    rows = [row.split() for row in capsys.readouterr().out.splitlines()[3:]]
    for column, part in ((3, entropy), (5, entropy[drawn])):
        counts = np.histogram(np.log10(part), held["bins"])[0].tolist()
        assert [int(row[column]) for row in rows] == counts


def test_a_network_tests_and_ranks_images_as_it_was_trained_on_them(made, capsys):
    """Digits again, as pictures in a folder: another data set by its name, size and deviation."""
    weights, split = made / "classifier/weights.pt", open_split("digits", False)
    for k, (image, label) in enumerate(zip(split.images, split.labels)):
        folder = Path("images/val", str(label.item()))
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image.numpy()).save(folder / f"{k}.png")
    for flags in ([], ["--dataset=folder", "--data=images"]):
        retrain.main([f"--evaluate={weights}", *flags])
    *_, first, _, again = capsys.readouterr().out.splitlines()
    assert first.partition(":")[2] == again.partition(":")[2]
    Path("images/train").symlink_to("val")
    proxy.main([f"--classifier={weights}", "--dataset=folder", "--data=images", "--out=p"])
    held = json.loads(Path("p").read_text())
    assert held["mean"] == pytest.approx(slow_entropies(weights, split).mean(), rel=1e-5)


def test_of_two_proxies_one_is_refused_and_a_failed_one_leaves_no_file(made, monkeypatch):
    flags = [*chosen_by(made), "--out=p"]

    def second(args):
        assert "File exists; choose another name" in refusal(proxy.main, flags)
        raise KeyboardInterrupt
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(proxy, "make_proxy", second)
        proxy.main(flags)
    assert not Path("p").exists()


def test_a_random_draw_needs_no_classifier_and_no_torchrun(monkeypatch, capsys):
    make_folder("images")
    flags = ["--data=images", "--scheme=random", "--fraction=0.5", "--out=p"]
    with monkeypatch.context() as patch:
        patch.setattr(proxy, "WORLD", 2)
        assert "start it without torchrun" in refusal(proxy.main, flags)
    monkeypatch.setattr(proxy, "resnet50", lambda **given: 1 / 0)
    proxy.main(flags)
    search.main([*TINY, *IMAGENET, "--data=images", "--workers=0", "--proxy=p", "--out=run"])
    assert capsys.readouterr().out.count("3 images for w, 3 for alpha") == 2


def test_a_search_sees_the_two_halves_of_the_same_images(made):
    shutil.copy(made / "proxy.json", "p")
    held, split = json.loads(Path("p").read_text()), open_split("digits")
    flags = [*TINY, "--proxy=p"]
    *_, w, alpha, validation = search.make_parts(search.parse(flags))
    assert torch.equal(w.split.images, split.images[held["w"]])
    assert torch.equal(alpha.split.images, split.images[held["alpha"]])
    stop_after(1, search.main, [*flags, "--epochs=2", "--out=run"])
    Path("p").rename("q")
    search.main(["--resume=run", "--proxy=q"])
    Path("run/genotype.json").unlink()
    Path("q").write_text(json.dumps({**held, "w": held["alpha"], "alpha": held["w"]}))
    assert "the train_split was" in refusal(search.main, ["--resume=run", "--proxy=q"])
    Path("p").write_text(json.dumps({**held, "split": "1437 images of other classes"}))
    assert "chooses from 1437 images of other classes" in refusal(search.main, flags)


def test_an_imagenet_search_is_the_same_with_any_number_of_workers(whole):
    flags = [*RUNS["search of imagenet"][2], f"--data={whole('images')}", "--workers=0"]
    search.main([*flags, "--out=run"])
    assert_same_runs("run", whole("search of imagenet"))
    parts = search.make_parts(search.parse(flags))
    assert len(parts.net.stem1) == 3 and parts.w_batches.steps == 3     # 40 images in halves


@pytest.mark.parametrize("said, kind", [
    ("DataLoader worker (pid 7) is killed by signal", SystemExit),
    ("CUDA error: illegal memory access\nFor debugging consider ...", RuntimeError)])
def test_a_killed_worker_ends_in_a_line_and_an_error_of_the_device_keeps_all(
        monkeypatch, said, kind):
    def fail(loader):
        raise RuntimeError(said)
    monkeypatch.setattr(data.DataLoader, "__iter__", fail)
    with pytest.raises(kind, match=re.escape(said)):
        next(data.read(data.DataLoader([0])))


def gradients():
    """After a step of alpha's and one of w's, clipped; in eval mode: no batch is normalized."""
    torch.manual_seed(0)
    net = SuperNet(SPACES["s2"], 4, 3, 10, node_norm=True, sqrt_beta=True).eval()
    search.average_gradients(net)
    batch = next(data.make_batches(open_split("digits"), 24, 0).epoch(0))
    search.alpha_step(net, torch.optim.SGD(net.alphas.values(), 0.0), *batch)
    alphas = [alpha.grad.clone() for alpha in net.alphas.values()]
    search.weight_step(net, torch.optim.SGD(net.weights, 0.0), *batch, grad_clip=0.1)
    return alphas + [w.grad for w in net.weights]


def one_of_two(arguments):
    """What each of two processes does: those two steps, then a search. It saves what it has."""
    folder, found = arguments[1], gradients()
    args = search.parse([*RUNS["search by two"][2], f"--out={folder}/run"])
    ended = run.Run(args, "genotype.json")
    search.search(args, ended)
    states = {name: part.state_dict() for name, part in ended.parts.items()}
    saved = {"gradients": found, "states": states, "noise": torch.initial_seed()}
    torch.save(saved, f"{folder}/{run.RANK}.pt")


def test_two_processes_take_the_steps_of_one_and_stay_equal(tmp_path):
    printed, errors, status = program(__file__, "one_of_two", tmp_path, launcher=TORCHRUN)
    assert status == 0 and printed.count("| valid") == 3, errors        # one of them speaks
    first, second = (torch.load(f"{rank}.pt") for rank in (0, 1))
    torch.testing.assert_close(first["gradients"], gradients(), rtol=1e-4, atol=1e-8)
    assert first.pop("noise") != second.pop("noise") and tensors_equal(first, second)


# ---------------------------------------------------------------- the README

def taken(monkeypatch, text):
    """Our programs that are called in a text, once they have read their flags."""
    def parse_args(parser, arguments=None, namespace=None, real=argparse.ArgumentParser.parse_args):
        real(parser, arguments, namespace)
        raise InterruptedError
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_args)
    programs = set()
    call = r"^(?:python|torchrun \S+) (?:-m )?([\w.]+)(.*)"
    for name, arguments in re.findall(call, text, re.M):
        name = name.removesuffix(".py")
        if (HERE / f"{name.replace('.', '/')}.py").exists():
            with pytest.raises(InterruptedError):
                importlib.import_module(name).main(shlex.split(arguments, comments=True))
            programs.add(name)
    return programs


def test_readme_commands_are_ones_the_programs_take(monkeypatch):
    pages = [README, *(path.read_text() for path in HERE.glob("experiments/*.md"))]
    blocks = re.findall(r"```bash\n(.*?)```|`(python [^`\n]+)`",
                        "".join(pages).replace("\\\n", "").replace(" && ", "\n"), re.S)
    commands = "\n".join(map("".join, blocks))
    assert taken(monkeypatch, commands) >= {"search", "retrain", "genotypes"}


def test_readme_python_blocks_run(whole):
    folder = re.search(r'folder = "(.*?)"', README)[1]
    shutil.copytree(whole("retraining"), folder)
    names = {}
    for block in re.findall(r"(?<!<!-- recipe -->\n)```python\n(.*?)```", README, re.S):
        exec(block.replace("C=16, layers=8", "C=2, layers=3"), names)
    assert names["x_j"].shape == (8, 16, 32, 32) and names["logits"].shape == (5, 10)


def test_readme_try_it_runs_but_for_fewer_epochs(capsys, monkeypatch):
    """The search, and what its last lines say: how to retrain its cell, and to draw it."""
    block = re.search(r"<!-- try -->\n```bash\n(.*?)```", README, re.S)[1]
    install, searching, *_ = block.replace(" && ", "\n").splitlines()
    assert "requirements.txt" in install
    assert "python -m pytest" in README.partition("<!-- tests -->")[2]
    _, script, *flags = shlex.split(searching)
    assert script == "search.py"
    search.main([*flags, "--epochs=1", "--limit=100"])
    *_, retraining, drawing = capsys.readouterr().out.splitlines()
    _, script, *flags = shlex.split(retraining)
    assert script == "retrain.py"
    retrain.main([*flags, "--epochs=1", "--limit=100"])
    assert "test error" in capsys.readouterr().out.splitlines()[-1]
    assert taken(monkeypatch, drawing) == {"experiments.figures"}


def test_readme_map_is_true_and_networks_need_torch_alone():
    files = [Path(__file__), *HERE.glob("experiments/test_*.py")]
    tests = "".join(path.read_text() for path in files)
    table = re.search(r"\| paper \| code \| test \|\n.*?\n\n", README, re.S)[0]
    rows = table.strip().splitlines()[2:]
    assert len(rows) > 8
    for _, code, test in [row[1:-1].split("|") for row in rows]:
        assert all(f"\ndef {name}(" in tests for name in re.findall(r"`(test_\w+)`", test)), test
        for quoted in re.findall(r"`([^`]+)`", code):
            file, _, name = quoted.rpartition(": ")
            path = HERE / (file or path)                    # of the name before
            assert re.search(rf"^(def |class )?{name}\b", path.read_text(), re.M), quoted
    for file in ("model.py", "larc.py"):
        imports = re.findall(r"^(?:import|from) (\w+)", (HERE / file).read_text(), re.M)
        assert {*imports} <= {"torch", "contextlib", "functools"}


DARTS_FORK = """
class Cell(nn.Module):                                      # DARTS's: operations counted by offset
    def __init__(self, C, steps):
        super().__init__()
        self.ops = nn.ModuleList(nn.Conv2d(C, C, 1, bias=False) for _ in range(2 + 3))
        CONSTRUCTOR

    def forward(self, s0, s1, weights):
        states, offset = [s0, s1], 0
        for i in range(2):
            s = sum(w[0] * h + w[1] * torch.tanh(self.ops[offset + j](h))
                    for j, (h, w) in enumerate(zip(states, weights[offset:])))
            offset += len(states)
            NODE
            states.append(s)
        return torch.cat(states[2:], 1)


class Net(nn.Module):
    def __init__(self, C=3, steps=2):
        super().__init__()
        self.cell, self.linear = Cell(C, steps), nn.Linear(2 * C, 4)
        self.alpha = torch.randn(5, 2, requires_grad=True)  # as in DARTS, no parameter

    def forward(self, x):
        alpha = self.alpha
        SOFTMAX
        self.seen = weights
        return self.linear(self.cell(x, x, weights).mean((2, 3)))


def make_optimizer(weights_only, learning_rate, momentum, weight_decay):
    OPTIMIZER
    return optimizer


def second_order_gradient(net, train, valid, buffers, lr, momentum, weight_decay):
    ws = list(net.parameters())
    grads = torch.autograd.grad(F.cross_entropy(net(train[0]), train[1]), ws)
    VIRTUAL
    before = [w.detach().clone() for w in ws]
    with torch.no_grad():
        for w, m, step in zip(ws, buffers, steps):
            w -= lr * (momentum * m + step)
    loss = F.cross_entropy(net(valid[0]), valid[1])
    *vector, direct = torch.autograd.grad(loss, [*ws, net.alpha])
    HESSIAN
    epsilon, length = 1e-3, torch.cat([v.flatten() for v in vector]).norm()
    sides = []
    for sign in (1, -1):
        with torch.no_grad():
            for w, old, v in zip(ws, before, vector):
                w.copy_(old + sign * epsilon / length * v)
        loss = F.cross_entropy(net(train[0]), train[1])
        sides.append(torch.autograd.grad(loss, net.alpha)[0])
    with torch.no_grad():
        for w, old in zip(ws, before):
            w.copy_(old)
    return direct - lr * length * (sides[0] - sides[1]) / (2 * epsilon)
"""


@pytest.fixture
def fork(float64):
    """A fork of DARTS with the recipe's parts in their places, as the names that it defines."""
    page = (HERE / "experiments/forks.md").read_text()
    block = re.search(r"<!-- recipe -->\n```python\n(.*?)```", page, re.S)[1]
    parts = [part.strip() for part in re.split(r"^#.*\n", block, flags=re.M)[1:]]
    places, source = "CONSTRUCTOR NODE SOFTMAX OPTIMIZER VIRTUAL HESSIAN".split(), DARTS_FORK
    for mark, part in zip(places, parts, strict=True):
        indent = re.search(rf"^( *){mark}$", source, re.M)[1]
        source = source.replace(mark, part.replace("\n", f"\n{indent}"))
    names = {"torch": torch, "nn": nn, "F": F, "LARC": LARC, "mixing_weights": mixing_weights,
             "local_factors": local_factors}
    exec(source, names)
    torch.manual_seed(0)
    return names


def fork_batch():
    return torch.randn(8, 3, 4, 4), torch.randint(4, (8,))


def test_the_recipe_turns_a_fork_into_vs_darts(fork):
    net, nodes, (images, labels) = fork["Net"](), [], fork_batch()
    net.cell.register_forward_hook(lambda *given: nodes.append(given[2]))
    loss = F.cross_entropy(net(images), labels)
    assert_near(nodes[0].var((0, 2, 3), unbiased=False), torch.ones(6), 1e-3)           # Eq. 3
    assert_near(net.seen, torch.softmax(net.alpha, 1).sqrt())                           # Eq. 6
    optimizer = fork["make_optimizer"](net.parameters(), 0.025, 0.9, 0.0)
    before = [w.detach().clone() for w in net.parameters()]
    loss.backward()
    optimizer.step()
    for w, old in zip(net.parameters(), before):            # section 4.2: lr |w|, whatever |g|
        assert (w - old).norm().item() == pytest.approx(0.025 * old.norm().item(), rel=1e-5)


def test_the_recipe_has_larcs_second_order(fork):
    """Against the exact derivative through LARC's step, whose factors are constants."""
    net, train, (images, labels) = fork["Net"](), fork_batch(), fork_batch()
    ws, lr, momentum, decay = list(net.parameters()), 0.1, 0.9, 5e-3
    buffers, moved = [torch.randn_like(w) for w in ws], {}
    given = net, train, (images, labels), buffers, lr, momentum, decay
    found = fork["second_order_gradient"](*given)
    loss = F.cross_entropy(net(train[0]), train[1])
    grads = torch.autograd.grad(loss, ws, create_graph=True)
    for (name, w), g, m in zip(net.named_parameters(), grads, buffers):
        factor = (w.norm() / (g.norm() + decay * w.norm() + 1e-8)).detach()
        moved[name] = w - lr * (momentum * m + factor * (g + decay * w))
    logits = torch.func.functional_call(net, moved, (images,))
    exact = torch.autograd.grad(F.cross_entropy(logits, labels), net.alpha)[0]
    torch.testing.assert_close(found, exact, rtol=1e-3, atol=1e-6)
    first_order = torch.autograd.grad(F.cross_entropy(net(images), labels), net.alpha)[0]
    assert (first_order - exact).abs().max() > 1e-2 * exact.abs().max()


if __name__ == "__main__":                                  # what each process under torchrun runs
    if sys.argv[1] == "one_of_two":
        run.start(one_of_two)
    else:
        make_float64(pytest.MonkeyPatch())
        run.start(retrain.main)
