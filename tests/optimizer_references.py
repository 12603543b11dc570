"""Slow, obvious float64 transcriptions of the published update rules: one matrix, one step after the other.

Each takes the start W [m, n], the gradients of all steps and the options by their published names, and
returns the weights after the last step. Nothing is shared with the package, and little between them, on
purpose.
"""

from __future__ import annotations

import math

import torch


def adamw(w, grads, *, lr, betas, eps, weight_decay, uncorrected_eps=False):
    w, m, v = w.double().clone(), 0.0, 0.0
    for t, g in enumerate(grads, start=1):
        g = g.double()
        m = betas[0] * m + (1 - betas[0]) * g
        v = betas[1] * v + (1 - betas[1]) * g**2
        w = w - lr * weight_decay * w
        c1, c2 = 1 - betas[0] ** t, 1 - betas[1] ** t
        if uncorrected_eps:
            w = w - lr * math.sqrt(c2) / c1 * m / (v.sqrt() + eps)
        else:
            w = w - lr * (m / c1) / ((v / c2).sqrt() + eps)
    return w


def apollo(w, grads, projections, *, lr, betas, eps, weight_decay, scale, per_channel, scale_front, gamma):
    """projections: P [k, r] of each step; arXiv:2412.05270, algorithm 1, with its released details."""
    w = w.double().clone()
    m = v = previous = None
    for t, (g, p) in enumerate(zip(grads, projections, strict=True), start=1):
        g, p = g.double(), p.double()
        right = g.shape[0] >= g.shape[1]
        r = g @ p if right else p.T @ g
        m = (1 - betas[0]) * r if m is None else betas[0] * m + (1 - betas[0]) * r
        v = (1 - betas[1]) * r**2 if v is None else betas[1] * v + (1 - betas[1]) * r**2
        n = m / (v.sqrt() + eps)
        if per_channel:
            axis = 1 if right else 0
            s = n.norm(dim=axis, keepdim=True) / (r.norm(dim=axis, keepdim=True) + 1e-8)
        else:
            s = n.norm() / (r.norm() + 1e-8)
        u = g * s
        if scale_front:
            u = u * math.sqrt(scale)
        if gamma is not None:
            norm = u.norm()
            if previous is None:
                previous = norm
            else:
                limiter = max(norm / (previous + 1e-8), gamma) / gamma
                u, previous = u / limiter, norm / limiter
        if not scale_front:
            u = u * math.sqrt(scale)
        w = w - lr * math.sqrt(1 - betas[1] ** t) / (1 - betas[0] ** t) * u
        w = w - lr * weight_decay * w
    return w


def galore(w, grads, *, lr, rank, betas, eps, weight_decay, scale, update_proj_gap, preconditioner=None):
    """arXiv:2403.03507, algorithm 2: exact SVD, moments carried over. preconditioner: of the projected g."""
    w = w.double().clone()
    m = v = p = None
    for t, g in enumerate(grads, start=1):
        g = g.double()
        right = g.shape[0] >= g.shape[1]
        if (t - 1) % update_proj_gap == 0:
            u, _, vt = torch.linalg.svd(g, full_matrices=False)
            p = vt[:rank].T if right else u[:, :rank]
        r = g @ p if right else p.T @ g
        if preconditioner is not None:
            # the flattened order is of no matter to the rule: dot products of whole gradients
            r = preconditioner(r.flatten(), (t - 1) % update_proj_gap == 0).view(r.shape)
        m = (1 - betas[0]) * r if m is None else betas[0] * m + (1 - betas[0]) * r
        v = (1 - betas[1]) * r**2 if v is None else betas[1] * v + (1 - betas[1]) * r**2
        n = m / (v.sqrt() + eps)
        full = n @ p.T if right else p @ n
        w = w - lr * scale * math.sqrt(1 - betas[1] ** t) / (1 - betas[0] ** t) * full
        w = w - lr * weight_decay * w
    return w


class WoodburyHistory:
    """λ (λ I + 𝒢 𝒢ᵀ)⁻¹ g with the matrix of all d x d entries really inverted."""

    def __init__(self, history, damping):
        self.history, self.damping, self.past = history, damping, []

    def __call__(self, g, refreshed):
        if refreshed:
            self.past = []
        self.past = [*self.past, g][-self.history :]
        fisher = self.damping * torch.eye(len(g), dtype=torch.float64)
        for past in self.past:
            fisher = fisher + torch.outer(past, past)
        return self.damping * torch.linalg.inv(fisher) @ g


def frugal(
    w,
    grads,
    masks,
    *,
    lr,
    betas,
    eps,
    weight_decay,
    state_free,
    state_free_scale,
    update_proj_gap,
    reset=True,
):
    """masks: which entries [m, n] have state in each step; moments are kept for all and used where active."""
    w = w.double().clone()
    m, v, t = torch.zeros_like(w), torch.zeros_like(w), 0
    for step, (g, mask) in enumerate(zip(grads, masks, strict=True)):
        g = g.double()
        if reset and step % update_proj_gap == 0:
            m, v, t = torch.zeros_like(w), torch.zeros_like(w), 0
        t += 1
        w = w - lr * weight_decay * w
        m = betas[0] * m + (1 - betas[0]) * g
        v = betas[1] * v + (1 - betas[1]) * g**2
        adam = (m / (1 - betas[0] ** t)) / ((v / (1 - betas[1] ** t)).sqrt() + eps)
        rest = {"sign_sgd": g.sign(), "sgd": g, "none": torch.zeros_like(g)}[state_free]
        w = w - lr * torch.where(mask, adam, state_free_scale * rest)
    return w


def frugal_subspace(
    w, grads, bases, *, lr, betas, eps, weight_decay, state_free, state_free_scale, update_proj_gap
):
    """bases: orthonormal P [k, r] of each step."""
    w = w.double().clone()
    m = v = None
    t = 0
    for step, (g, p) in enumerate(zip(grads, bases, strict=True)):
        g, p = g.double(), p.double()
        right = g.shape[0] >= g.shape[1]
        if step % update_proj_gap == 0:
            m = v = None
            t = 0
        t += 1
        r = g @ p if right else p.T @ g
        m = (1 - betas[0]) * r if m is None else betas[0] * m + (1 - betas[0]) * r
        v = (1 - betas[1]) * r**2 if v is None else betas[1] * v + (1 - betas[1]) * r**2
        adam = (m / (1 - betas[0] ** t)) / ((v / (1 - betas[1] ** t)).sqrt() + eps)
        inside = r @ p.T if right else p @ r
        rest = {"sign_sgd": (g - inside).sign(), "sgd": g - inside}[state_free]
        w = w - lr * weight_decay * w
        w = w - lr * (adam @ p.T if right else p @ adam) - lr * state_free_scale * rest
    return w


def newton_schulz(x, steps=5):
    tall = x.shape[0] > x.shape[1]
    x = x.T if tall else x
    x = x / (x.norm() + 1e-7)
    for _ in range(steps):
        a = x @ x.T
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return x.T if tall else x


def muon(w, grads, *, lr, momentum, nesterov, ns_steps, weight_decay, adjust_lr):
    w = w.double().clone()
    buffer = torch.zeros_like(w)
    for g in grads:
        g = g.double()
        buffer = momentum * buffer + (1 - momentum) * g
        ahead = (1 - momentum) * g + momentum * buffer if nesterov else buffer
        rows, columns = g.shape
        scale = (
            0.2 * math.sqrt(max(rows, columns))
            if adjust_lr == "match_rms_adamw"
            else math.sqrt(max(1, rows / columns))
        )
        w = w - lr * weight_decay * w
        w = w - lr * scale * newton_schulz(ahead, ns_steps)
    return w


def soap(w, grads, *, lr, betas, eps, weight_decay, precondition_frequency, max_precond_dim):
    """arXiv:2409.11321, algorithm 3, and the released code's first step without an update."""
    w = w.double().clone()
    rows, columns = w.shape
    b1, b2 = betas
    left, right = torch.zeros(rows, rows).double(), torch.zeros(columns, columns).double()
    with_left, with_right = rows <= max_precond_dim, columns <= max_precond_dim
    m, v = torch.zeros_like(w), torch.zeros_like(w)  # both in the eigenbasis
    q_left, q_right = torch.eye(rows).double(), torch.eye(columns).double()
    for t, g in enumerate(grads, start=1):
        g = g.double()
        if t == 1:
            left, right = (1 - b2) * g @ g.T, (1 - b2) * g.T @ g
            if with_left:
                q_left = torch.linalg.eigh(left)[1].flip(-1)
            if with_right:
                q_right = torch.linalg.eigh(right)[1].flip(-1)
            continue
        turned = q_left.T @ g @ q_right
        m = b1 * m + (1 - b1) * turned
        v = b2 * v + (1 - b2) * turned**2
        step = q_left @ (m / (v.sqrt() + eps)) @ q_right.T
        count = t - 1
        w = w - lr * math.sqrt(1 - b2**count) / (1 - b1**count) * step
        w = w - lr * weight_decay * w
        left = b2 * left + (1 - b2) * g @ g.T
        right = b2 * right + (1 - b2) * g.T @ g
        if (t - 1) % precondition_frequency == 0:
            original = q_left @ m @ q_right.T
            if with_left:
                order = torch.diag(q_left.T @ left @ q_left).argsort(descending=True)
                q_left, v = torch.linalg.qr(left @ q_left[:, order])[0], v[order]
            if with_right:
                order = torch.diag(q_right.T @ right @ q_right).argsort(descending=True)
                q_right, v = torch.linalg.qr(right @ q_right[:, order])[0], v[:, order]
            m = q_left.T @ original @ q_right
    return w


def cosmos(w, grads, start, *, lr, rank, gamma, lr_ratio, betas, eps, weight_decay, nesterov):
    """arXiv:2502.17410; start: the basis [n, r] that the first three iterations begin from."""
    w = w.double().clone()
    rows, columns = w.shape
    b1, b2 = betas
    m = torch.zeros_like(w)
    v = torch.zeros(rows, rank).double()
    u, s = start.double(), torch.zeros(rank, rank).double()
    for t, g in enumerate(grads, start=1):
        g = g.double()
        m = b1 * m + g
        if t == 1:
            for _ in range(3):
                u = torch.linalg.qr(g.T @ g @ u)[0]
            s = (1 - b2) * (g @ u).T @ (g @ u)
        else:
            new = torch.linalg.qr(b2 * u @ s + (1 - b2) * g.T @ g @ u)[0]
            turned = u.T @ new
            s = b2 * turned.T @ s @ turned + (1 - b2) * (g @ new).T @ (g @ new)
            u = new
        v = b2 * v + (1 - b2) * (g @ u) ** 2
        bias1, bias2 = (1 - b1**t) / (1 - b1), 1 - b2**t
        ahead = (g + b1 * m) / (1 + b1 * bias1) if nesterov else m / bias1
        a = (ahead @ u) / (v.sqrt() / math.sqrt(bias2) + eps) @ u.T
        b = newton_schulz(ahead - ahead @ u @ u.T)
        b = math.sqrt(rows * columns) * b / (b.norm() + eps)
        direction = a + gamma * b
        w = w - lr * weight_decay * w
        w = w - lr * lr_ratio * math.sqrt(rows * columns) * direction / (direction.norm() + eps)
    return w
