"""The networks, bottom-up: operations, mixed operation, cells, super-network, derived network.

Mirrors the paper's sections 2.2 (Eq. 1), 4.1 (Eq. 3) and 4.3 (Eq. 6). Whatever the paper leaves to DARTS follows
quark0/darts, cnn/{operations,model_search,model}.py at commit f276dd3.
Needs torch alone. To see parameters and multiply-adds without any data: `python genotypes.py`.
"""
import functools

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode


# ---------------------------------------------------------------- operations

class ReLUFirst(nn.Module):
    """ReLU, then `body`. A mixed operation computes the ReLU of its edge once and hands it to every such body."""

    def __init__(self, *layers):
        super().__init__()
        self.body = nn.Sequential(*layers)

    def forward(self, x):                                   # (B, C_in, H, W) -> (B, C, H/stride, W/stride)
        return self.body(F.relu(x))


class Subsample(nn.Module):
    """Every `stride`-th pixel. A 1x1 convolution follows it instead of having the stride itself: the same numbers, and
    the CPU's backward pass of strided 1x1 convolutions overruns its memory (torch 2.14, channels_last, 56x56)."""

    def __init__(self, stride):
        super().__init__()
        self.stride = stride

    def forward(self, x):
        return x[:, :, ::self.stride, ::self.stride]


class ShiftedConvs(nn.Module):
    """Two 1x1 convolutions of stride 2, the second on the input shifted by one pixel: no row or column is lost."""

    def __init__(self, C_in, C):
        super().__init__()
        self.subsample = Subsample(2)
        self.conv1 = nn.Conv2d(C_in, C // 2, 1, bias=False)
        self.conv2 = nn.Conv2d(C_in, C - C // 2, 1, bias=False)

    def forward(self, x):
        shifted = F.pad(x, (-1, 1, -1, 1))                  # same size, so odd sizes fit too
        return torch.cat([self.conv1(self.subsample(x)), self.conv2(self.subsample(shifted))], dim=1)


class Noise(Subsample):
    """S4's operation: N(0, 1), fresh at every call, also in eval mode; only the shape comes from x."""

    def forward(self, x):
        return torch.randn_like(super().forward(x))


def FactorizedReduce(C_in, C, affine):
    return ReLUFirst(ShiftedConvs(C_in, C), nn.BatchNorm2d(C, affine=affine))


def conv_bn(C_in, C, kernel, stride, affine):
    return ReLUFirst(nn.Conv2d(C_in, C, kernel, stride, padding=kernel // 2, bias=False),
                     nn.BatchNorm2d(C, affine=affine))


def separable(C, kernel, stride, affine, dilation=1):
    """Depthwise convolution, pointwise convolution, batch norm: three layers."""
    return (nn.Conv2d(C, C, kernel, stride, padding=dilation * (kernel // 2), dilation=dilation, groups=C, bias=False),
            nn.Conv2d(C, C, 1, bias=False),
            nn.BatchNorm2d(C, affine=affine))


def sep_conv(C, kernel, stride, affine):                    # applied twice; the second time with stride 1
    return ReLUFirst(*separable(C, kernel, stride, affine), nn.ReLU(inplace=True), *separable(C, kernel, 1, affine))


def dil_conv(C, kernel, stride, affine):
    return ReLUFirst(*separable(C, kernel, stride, affine, dilation=2))


def conv_7x1_1x7(C, stride, affine):
    return ReLUFirst(nn.Conv2d(C, C, (1, 7), (1, stride), padding=(0, 3), bias=False),
                     nn.Conv2d(C, C, (7, 1), (stride, 1), padding=(3, 0), bias=False),
                     nn.BatchNorm2d(C, affine=affine))


def max_pool_2x2(stride):                                   # padded below and at the right: keeps the size at stride 1
    return nn.Sequential(nn.ConstantPad2d((0, 1, 0, 1), float("-inf")), nn.MaxPool2d(2, stride))


# name: make(C, stride, affine), C channels in and out. `none` is not here: it adds nothing, so it is never computed.
OPS = {
    "max_pool_3x3": lambda C, stride, affine: nn.MaxPool2d(3, stride, padding=1),
    "avg_pool_3x3": lambda C, stride, affine: nn.AvgPool2d(3, stride, padding=1, count_include_pad=False),
    "skip_connect": lambda C, stride, affine: nn.Identity() if stride == 1 else FactorizedReduce(C, C, affine),
    "sep_conv_3x3": lambda C, stride, affine: sep_conv(C, 3, stride, affine),
    "sep_conv_5x5": lambda C, stride, affine: sep_conv(C, 5, stride, affine),
    "dil_conv_3x3": lambda C, stride, affine: dil_conv(C, 3, stride, affine),
    "dil_conv_5x5": lambda C, stride, affine: dil_conv(C, 5, stride, affine),
    "noise": lambda C, stride, affine: Noise(stride),                              # RobustDARTS, space S4
    "sep_conv_7x7": lambda C, stride, affine: sep_conv(C, 7, stride, affine),      # from here on: published cells only
    "conv_7x1_1x7": conv_7x1_1x7,
    "nor_conv_1x1": lambda C, stride, affine: nn.Sequential(Subsample(stride), conv_bn(C, C, 1, 1, affine)),
    "nor_conv_3x3": lambda C, stride, affine: conv_bn(C, C, 3, stride, affine),
    "max_pool_2x2": lambda C, stride, affine: max_pool_2x2(stride),
}


# ---------------------------------------------------------------- mixed operation (sections 2.2 and 4.3)

def mixing_weights(alpha, sqrt_beta=False):
    """beta = softmax(alpha) (Eq. 1) or, with `sqrt_beta`, its square root (Eq. 6), over the last dimension.

    The root is taken in the logarithm: sqrt(softmax(alpha)) itself has a NaN gradient once a beta underflows.
    """
    if sqrt_beta:
        return torch.exp(0.5 * F.log_softmax(alpha, dim=-1))  # Eq. 6
    return F.softmax(alpha, dim=-1)                           # Eq. 1


def candidate(name, C, stride):
    """An operation of the super-network: batch norm without affine, and one after each pool (a DARTS detail)."""
    op = OPS[name](C, stride, affine=False)
    return nn.Sequential(op, nn.BatchNorm2d(C, affine=False)) if "pool" in name else op


class MixedOp(nn.Module):
    """The mixed operation of an edge, Eq. 1: the sum over o of beta_o * o(x).

    `MixedOp(C, stride, primitives)(x, mixing_weights(alpha))` with x (B, C, H, W) and alpha (operations,), in the order
    of `primitives`. Returns (B, C, H/stride, W/stride). Raises ValueError if there is not one beta for each operation.
    """

    def __init__(self, C, stride, primitives):
        super().__init__()
        self.primitives, self.stride = primitives, stride
        self.ops = nn.ModuleDict({name: candidate(name, C, stride) for name in primitives if name != "none"})

    def forward(self, x, beta):
        x_relu = F.relu(x)                                  # most operations begin with it: once per edge
        mixed = None
        for name, beta_o in zip(self.primitives, beta, strict=True):
            if name == "none":                              # zeros: it has its beta, but adds nothing
                continue
            op = self.ops[name]
            output = beta_o * (op.body(x_relu) if isinstance(op, ReLUFirst) else op(x))
            mixed = output if mixed is None else mixed.add_(output)  # Eq. 1
        if mixed is None:                                   # `none` alone
            return torch.zeros_like(x[:, :, ::self.stride, ::self.stride])
        return mixed


# ---------------------------------------------------------------- super-network (sections 2.2 and 4.1)

def preprocess(C_in, C, halve, affine):
    """Brings a cell's input to C channels, and to half the size where the cell before was a reduction."""
    return FactorizedReduce(C_in, C, affine) if halve else conv_bn(C_in, C, 1, 1, affine)


def reductions(layers):
    """The cells that halve the size and double the channels: those at one and two thirds of the depth."""
    return layers // 3, 2 * layers // 3


class SearchCell(nn.Module):
    """A cell of the super-network. Nodes 0 and 1 are its inputs; node j sums the mixed operations from all nodes before.

    edges: {(i, j): primitives} for every i < j, as in `genotypes.SPACES`. Returns the intermediate nodes, concatenated.
    """

    def __init__(self, edges, C_prev_prev, C_prev, C, reduction, reduction_prev, node_norm):
        super().__init__()
        self.preprocess0 = preprocess(C_prev_prev, C, reduction_prev, affine=False)
        self.preprocess1 = preprocess(C_prev, C, False, affine=False)
        self.edges = nn.ModuleDict()
        for (i, j), primitives in edges.items():
            self.edges[f"{i}->{j}"] = MixedOp(C, 2 if reduction and i < 2 else 1, primitives)
        nodes = {j for _, j in edges}
        self.normalize = nn.ModuleList(nn.BatchNorm2d(C, affine=False) if node_norm else nn.Identity() for _ in nodes)

    def forward(self, s0, s1, beta):
        """s0, s1: outputs of the two cells before; beta: (edges, operations), edges in the order they were given in."""
        beta = dict(zip(self.edges, beta, strict=True))
        states = [self.preprocess0(s0), self.preprocess1(s1)]
        for j, normalize in enumerate(self.normalize, start=2):
            x_j = functools.reduce(torch.add, (self.edges[f"{i}->{j}"](states[i], beta[f"{i}->{j}"]) for i in range(j)))
            states.append(normalize(x_j))                   # Eq. 3: (x_j - mu) / sigma, per channel
        return torch.cat(states[2:], dim=1)


class SuperNet(nn.Module):
    """The super-network, (B, 3, H, W) -> logits (B, num_classes); H and W from 8 upwards, odd ones too.

    space: {"normal": edges, "reduce": edges}, edges as for SearchCell; within a cell type all edges have equally many
    operations. node_norm: Eq. 3. sqrt_beta: Eq. 6. `weights` are all parameters but the `alphas`.
    """

    def __init__(self, space, C=16, layers=8, num_classes=10, node_norm=False, sqrt_beta=False, stem_multiplier=3):
        super().__init__()
        self.space, self.sqrt_beta = space, sqrt_beta
        C_prev_prev = C_prev = stem_multiplier * C
        self.stem = nn.Sequential(nn.Conv2d(3, C_prev, 3, padding=1, bias=False), nn.BatchNorm2d(C_prev))
        self.cells, self.cell_types, reduction_prev = nn.ModuleList(), [], False
        for layer in range(layers):
            reduction = layer in reductions(layers)
            C = 2 * C if reduction else C
            cell_type = "reduce" if reduction else "normal"
            cell = SearchCell(space[cell_type], C_prev_prev, C_prev, C, reduction, reduction_prev, node_norm)
            C_prev_prev, C_prev, reduction_prev = C_prev, C * len(cell.normalize), reduction
            self.cells.append(cell)
            self.cell_types.append(cell_type)
        self.classifier = nn.Linear(C_prev, num_classes)
        self.weights = list(self.parameters())              # w of Eq. 2, listed once: a walk over thousands of modules

        normal, reduce = space["normal"], space["reduce"]   # (edges, operations), (14, 8) in DARTS's space; 1e-3: DARTS
        self.alpha_normal = nn.Parameter(1e-3 * torch.randn(len(normal), len(normal[0, 2])))
        self.alpha_reduce = nn.Parameter(1e-3 * torch.randn(len(reduce), len(reduce[0, 2])))
        self.alphas = [self.alpha_normal, self.alpha_reduce]

    @torch.no_grad()
    def betas(self):
        """{"normal" or "reduce": softmax(alpha), (edges, operations)}: what the derivation reads, root or no root."""
        return {"normal": mixing_weights(self.alpha_normal), "reduce": mixing_weights(self.alpha_reduce)}

    def forward(self, x):
        beta = {"normal": mixing_weights(self.alpha_normal, self.sqrt_beta),
                "reduce": mixing_weights(self.alpha_reduce, self.sqrt_beta)}
        s0 = s1 = self.stem(x)
        for cell_type, cell in zip(self.cell_types, self.cells):
            s0, s1 = s1, cell(s0, s1, beta[cell_type])
        return self.classifier(s1.mean((2, 3)))


# ---------------------------------------------------------------- derived network (section 5.1)

def drop_path(x, probability):
    """Zeroes whole samples of x (B, C, H, W) with `probability` and scales the others to the same mean."""
    keep = 1 - probability
    return x * torch.empty_like(x[:, :1, :1, :1]).bernoulli_(keep) / keep


class Cell(nn.Module):
    """A cell of the derived network. nodes: for each node its inputs as (operation, source); concat: its outputs."""

    def __init__(self, nodes, concat, C_prev_prev, C_prev, C, reduction, reduction_prev):
        super().__init__()
        self.preprocess0 = preprocess(C_prev_prev, C, reduction_prev, affine=True)
        self.preprocess1 = preprocess(C_prev, C, False, affine=True)
        self.nodes, self.concat = nodes, concat
        self.ops = nn.ModuleList(nn.ModuleList(OPS[name](C, 2 if reduction and i < 2 else 1, affine=True)
                                               for name, i in node) for node in nodes)

    def forward(self, s0, s1, drop_path_prob):
        states = [self.preprocess0(s0), self.preprocess1(s1)]
        for node, ops in zip(self.nodes, self.ops):
            inputs = []
            for (_, i), op in zip(node, ops):
                x = op(states[i])
                if self.training and drop_path_prob > 0 and not isinstance(op, nn.Identity):
                    x = drop_path(x, drop_path_prob)
                inputs.append(x)
            states.append(functools.reduce(torch.add, inputs))
        return torch.cat([states[i] for i in self.concat], dim=1)


class AuxiliaryHead(nn.Module):
    """A second classifier in mid-network, used in training only: ReLU, average pool to 2x2, two convolutions, linear.

    CIFAR form: 8x8 feature maps (32x32 images). ImageNet form: 7x7 (224x224 images), and no last batch norm.
    """

    def __init__(self, C, num_classes, imagenet):
        super().__init__()
        self.size, self.image = (7, 224) if imagenet else (8, 32)
        self.features = nn.Sequential(
            nn.ReLU(), nn.AvgPool2d(5, stride=2 if imagenet else 3, count_include_pad=False),
            nn.Conv2d(C, 128, 1, bias=False), nn.BatchNorm2d(128), nn.ReLU(inplace=True),
            nn.Conv2d(128, 768, 2, bias=False), nn.Identity() if imagenet else nn.BatchNorm2d(768),
            nn.ReLU(inplace=True))
        self.classifier = nn.Linear(768, num_classes)

    def forward(self, x):
        if x.shape[2:] != (self.size, self.size):
            raise ValueError(f"the auxiliary head fits {self.size}x{self.size} feature maps ({self.image}x{self.image} "
                             f"images), not {x.shape[2]}x{x.shape[3]}: train without it")
        return self.classifier(self.features(x).flatten(1))


class Network(nn.Module):
    """The network of a genotype, (B, 3, H, W) -> (logits, auxiliary logits or None); the latter in training only.

    CIFAR form: one 3x3 convolution as stem. ImageNet form (`imagenet`): two stems that divide the size by 8.
    Set `drop_path_prob` before each epoch. Source: NetworkCIFAR and NetworkImageNet of cnn/model.py.
    """

    def __init__(self, genotype, C=36, layers=20, num_classes=10, auxiliary=False, imagenet=False):
        super().__init__()
        self.drop_path_prob = 0.0
        if imagenet:
            self.stem0 = nn.Sequential(
                nn.Conv2d(3, C // 2, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(C // 2), nn.ReLU(inplace=True),
                nn.Conv2d(C // 2, C, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(C))
            self.stem1 = nn.Sequential(nn.ReLU(), nn.Conv2d(C, C, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(C))
            C_prev_prev = C_prev = C
        else:
            C_prev_prev = C_prev = 3 * C
            self.stem0 = nn.Sequential(nn.Conv2d(3, C_prev, 3, padding=1, bias=False), nn.BatchNorm2d(C_prev))
            self.stem1 = nn.Identity()
        self.cells, reduction_prev = nn.ModuleList(), imagenet
        self.auxiliary_layer, self.auxiliary_head = 2 * layers // 3, None
        for layer in range(layers):
            reduction = layer in reductions(layers)
            C = 2 * C if reduction else C
            nodes, concat = ((genotype.reduce, genotype.reduce_concat) if reduction else
                             (genotype.normal, genotype.normal_concat))
            self.cells.append(Cell(nodes, concat, C_prev_prev, C_prev, C, reduction, reduction_prev))
            C_prev_prev, C_prev, reduction_prev = C_prev, C * len(concat), reduction
            if auxiliary and layer == self.auxiliary_layer:
                self.auxiliary_head = AuxiliaryHead(C_prev, num_classes, imagenet)
        self.classifier = nn.Linear(C_prev, num_classes)

    def forward(self, x):
        s0 = self.stem0(x)
        s1, logits_aux = self.stem1(s0), None
        for layer, cell in enumerate(self.cells):
            s0, s1 = s1, cell(s0, s1, self.drop_path_prob)
            if self.training and self.auxiliary_head is not None and layer == self.auxiliary_layer:
                logits_aux = self.auxiliary_head(s1)
        return self.classifier(s1.mean((2, 3))), logits_aux


def count_parameters(net):
    """Number of parameters without the auxiliary head, as DARTS counts them."""
    return sum(p.numel() for name, p in net.named_parameters() if not name.startswith("auxiliary_head"))


def count_macs(net, size):
    """Multiply-adds of the convolutions and the classifier for one size x size image, auxiliary head excluded.

    Counted on shapes alone if `net` was made under `torch.device("meta")`.
    """
    image, training = torch.zeros(1, 3, size, size, device=next(net.parameters()).device), net.training
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        net.eval()(image)
    net.train(training)
    return counter.get_total_flops() // 2                   # one multiply-add is two FLOPs
