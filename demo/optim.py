"""Muon for a network's matrices and AdamW for the rest, with an exponential mean of the weights.

Muon: Jordan et al., 2024, https://kellerjordan.github.io/posts/muon; the scale by the larger side
is that of Liu et al., 2025, https://arxiv.org/abs/2502.16982.
"""

import torch

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)


def orthogonalise(matrix, steps=5):
    """Nearly U V^T of a matrix [m, n] = U S V^T: all singular values move to about 1.

    The polynomial is evaluated on the small Gram matrix [k, k], k = min(m, n), because each step
    only multiplies from one side: X_k = P_k X_0.
    """
    a, b, c = NEWTON_SCHULZ
    turned = matrix.shape[0] > matrix.shape[1]
    x = matrix.T if turned else matrix
    x = x / (x.norm() + 1e-7)
    gram = x @ x.T
    product = torch.eye(len(gram), device=x.device, dtype=x.dtype)
    for _ in range(steps):
        factor = torch.addmm(gram, gram, gram, beta=b, alpha=c)
        factor.diagonal().add_(a)
        product = factor @ product
        gram = factor @ gram @ factor
    x = product @ x
    return x.T if turned else x


class Muon:
    """Orthogonalised Nesterov momentum; kernels [out, in, h, w] count as [out, in h w]."""

    def __init__(self, parameters, lr, momentum=0.95):
        self.parameters, self.lr, self.momentum = list(parameters), lr, momentum
        self.means = [torch.zeros_like(p) for p in self.parameters]

    @torch.no_grad()
    def step(self, factor):
        for parameter, mean in zip(self.parameters, self.means):
            mean.lerp_(parameter.grad, 1 - self.momentum)
            update = parameter.grad.lerp(mean, self.momentum).flatten(1)
            scale = 0.2 * max(update.shape) ** 0.5
            update = orthogonalise(update).view_as(parameter)
            parameter.add_(update, alpha=-self.lr * factor * scale)


class Optimiser:
    """Muon on ``matrices``, AdamW on ``rest``, their exponential mean (EMA)."""

    def __init__(self, matrices, rest, muon_lr, adam_lr, ema=0.999, clip=1.0):
        self.muon = Muon(matrices, muon_lr)
        self.adam_lr, self.ema, self.clip = adam_lr, ema, clip
        self.adam = torch.optim.AdamW(list(rest), lr=adam_lr, betas=(0.9, 0.99), weight_decay=0.0)
        self.parameters = [*self.muon.parameters, *self.adam.param_groups[0]["params"]]
        self.means = [p.detach().clone() for p in self.parameters]

    def step(self, factor, count):
        """One step at ``factor`` times the learning rates; ``count`` steps were made before."""
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, self.clip)
        self.muon.step(factor)
        self.adam.param_groups[0]["lr"] = self.adam_lr * factor
        self.adam.step()
        for parameter in self.parameters:
            parameter.grad = None
        # Young means forget faster, so that the start does not weigh on a short run.
        keep = min(self.ema, (1 + count) / (10 + count))
        with torch.no_grad():
            torch._foreach_lerp_(self.means, [p.detach() for p in self.parameters], 1 - keep)
        return float(norm)

    def averaged(self):
        """Put the mean into the parameters; returns what was in them."""
        return self.put(self.means)

    @torch.no_grad()
    def put(self, values):
        old = [p.detach().clone() for p in self.parameters]
        for parameter, value in zip(self.parameters, values):
            parameter.copy_(value)
        return old

    def state_dict(self):
        return {
            "parameters": [p.detach() for p in self.parameters],
            "momentum": self.muon.means,
            "adam": self.adam.state_dict(),
            "ema": self.means,
        }

    @torch.no_grad()
    def load_state_dict(self, state):
        self.put(state["parameters"])
        for own, saved in ((self.muon.means, "momentum"), (self.means, "ema")):
            for value, other in zip(own, state[saved]):
                value.copy_(other)
        self.adam.load_state_dict(state["adam"])
