"""LARC: SGD with momentum and one learning rate per tensor. Section 4.2. Needs torch alone.

    optimizer = LARC(net.parameters(), lr=0.025, momentum=0.9, weight_decay=5e-3)

For each tensor w with gradient g, global rate lr, weight decay b and trust coefficient t:

    ratio     a = t |w| / (|g| + b |w| + 1e-8)    2-norms over the whole tensor
    gradient  d = g + b w                         the decay is scaled together with the gradient
    scale     f = a               by default      local rate lr a: the paper's if t = 1, b = 0
              f = min(a / lr, 1)  with clip=True  local rate min(a, lr): as NVIDIA's apex has it
              f = 1               if |w| or |g| is 0: no ratio exists; the decay still applies
    step      m <- momentum m + f d,  w <- w - lr m

source                     local rate                       decay in    t
the paper, section 4.2     lr |w| / |g|                     not said    none
LARS (arXiv 1708.03888)    lr t |w| / (|g| + b |w|)         d, ratio    0.001
NVIDIA OpenSeq2Seq, LARC   min(lr, t |w| / |g|)             not ratio   < 1
apex 2ec84eb, clip=False   lr t |w| / (|g| + b |w| + eps)   d, ratio    0.02
apex's LARC(); the         lr, if the line above is         d, ratio    0.02
authors' release           not less

Unlike apex's wrapper this is an Optimizer itself: schedulers, state_dict and zero_grad see what
they expect. Where apex leaves tensors of zero norm without weight decay, they have it here.
"""
import torch

EPS = 1e-8                                                  # apex's


class LARC(torch.optim.Optimizer):
    """params: tensors or groups, all on one device. trust_coefficient: t above. clip: see above."""

    def __init__(self, params, lr, momentum=0.9, weight_decay=0.0, trust_coefficient=1.0,
                 clip=False):
        if lr < 0 or momentum < 0 or weight_decay < 0 or trust_coefficient <= 0:
            raise ValueError(f"LARC needs lr, momentum and weight_decay >= 0 and trust_coefficient "
                             f"> 0, not {lr}, {momentum}, {weight_decay} and {trust_coefficient}")
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay,
                                  "trust_coefficient": trust_coefficient, "clip": clip})

    @torch.no_grad()
    def step(self, closure=None):
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if params:
                self.step_group(group, params)
        return loss

    def step_group(self, group, params):
        """One step for all tensors of a group at once; the CPU never waits for the GPU."""
        grads = [p.grad for p in params]
        factors = local_factors(params, grads, group["lr"], group["weight_decay"],
                                group["trust_coefficient"], group["clip"])
        steps = torch._foreach_add(grads, params, alpha=group["weight_decay"])  # d
        for p in params:
            if "momentum_buffer" not in self.state[p]:
                self.state[p]["momentum_buffer"] = torch.zeros_like(p)
        buffers = [self.state[p]["momentum_buffer"] for p in params]
        torch._foreach_mul_(buffers, group["momentum"])
        torch._foreach_addcmul_(buffers, steps, factors)                # m <- momentum m + f d
        torch._foreach_add_(params, buffers, alpha=-group["lr"])        # w <- w - lr m


def local_factors(params, grads, lr, weight_decay, trust_coefficient, clip):
    """The factor f of each tensor, as a list of scalars on the device."""
    w_norm = torch.stack(torch._foreach_norm(params))       # (tensors,)
    g_norm = torch.stack(torch._foreach_norm(grads))
    ratio = trust_coefficient * w_norm / (g_norm + weight_decay * w_norm + EPS)
    if clip:
        ratio = (ratio / lr).clamp(max=1)                   # lr = 0: inf, clamped to 1
    return list(torch.where((w_norm > 0) & (g_norm > 0), ratio, 1).unbind())
