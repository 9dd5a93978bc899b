"""The update rules, one stage each: the only Python source of the mathematics.

Names are the papers': ``p`` the parameter, ``g`` the gradient, ``m`` and ``v`` the moments. Every coefficient is
computed in float64 on the host and rounded once. The forms, and not only the formulas, are part of the contract:
they give torch.optim's for-loop bit for bit (docs/numbers.md). Allowed here: ``+ - *`` and ``tl.fma``, ``tl.div_rn``,
``tl.sqrt_rn``, ``tl.maximum``, ``tl.abs``, ``tl.where``; a test reads the syntax tree and forbids the rest. The C++
twins, under the same names, are in csrc/stages/.
"""

# The bodies are read by backends that give `tl` its meaning (see chain.py), so they carry no annotations.
# mypy: disable-error-code="no-untyped-def,no-untyped-call"

from fastopt.chain import stage, tl


def lerp2(a, b, w):
    """``a + w * (b - a)`` as torch.lerp computes it, signs of zeros included: from the nearer end, so w = 1 gives b."""
    return tl.where((w > -0.5) & (w < 0.5), tl.fma(w, b - a, a), tl.fma(b - a, w - 1, b))


@stage()
def scale(p, g, factor):
    """One factor on the gradient: -1 to maximize; exact, as is 1."""
    g = g * factor
    return p, g


@stage()
def l2(p, g, weight_decay):
    """Coupled weight decay, before the moments."""
    g = tl.fma(weight_decay, p, g)
    return p, g


@stage()
def shrink(p, g, factor):
    """Decoupled weight decay (Loshchilov and Hutter 2019): factor = 1 - lr * weight_decay."""
    p = p * factor
    return p, g


@stage()
def sgd(p, g, minus_lr):
    p = tl.fma(minus_lr, g, p)
    return p, g


@stage("buf")
def momentum(p, g, buf, first, mu, undamped):
    """The first gradient enters undamped. (Polyak 1964)"""
    buf = tl.where(first > 0.5, g, tl.fma(undamped, g, buf * mu))
    g = buf
    return p, g, buf


@stage("buf")
def nesterov(p, g, buf, first, mu, undamped):
    """Momentum looked up one step ahead. (Sutskever et al. 2013)"""
    buf = tl.where(first > 0.5, g, tl.fma(undamped, g, buf * mu))
    g = tl.fma(mu, buf, g)
    return p, g, buf


@stage("v")
def rmsprop(p, g, v, alpha, w, eps, minus_lr):
    v = tl.fma(w * g, g, v * alpha)
    p = p + tl.div_rn(minus_lr * g, tl.sqrt_rn(v) + eps)
    return p, g, v


@stage("v buf")
def rmsprop_momentum(p, g, v, buf, alpha, w, eps, minus_lr, mu):
    v = tl.fma(w * g, g, v * alpha)
    buf = buf * mu + tl.div_rn(g, tl.sqrt_rn(v) + eps)
    p = tl.fma(minus_lr, buf, p)
    return p, g, v, buf


@stage("v ga")
def rmsprop_centered(p, g, v, ga, alpha, w, eps, minus_lr):
    """Variance instead of the second moment. (Graves 2013)"""
    v = tl.fma(w * g, g, v * alpha)
    ga = lerp2(ga, g, w)
    p = p + tl.div_rn(minus_lr * g, tl.sqrt_rn(tl.fma(-ga, ga, v)) + eps)
    return p, g, v, ga


@stage("v ga buf")
def rmsprop_centered_momentum(p, g, v, ga, buf, alpha, w, eps, minus_lr, mu):
    v = tl.fma(w * g, g, v * alpha)
    ga = lerp2(ga, g, w)
    buf = buf * mu + tl.div_rn(g, tl.sqrt_rn(tl.fma(-ga, ga, v)) + eps)
    p = tl.fma(minus_lr, buf, p)
    return p, g, v, ga, buf


@stage("s")
def adagrad(p, g, s, eps, clr):
    """Duchi, Hazan and Singer 2011."""
    s = tl.fma(g, g, s)
    p = p - tl.div_rn(clr * g, tl.sqrt_rn(s) + eps)
    return p, g, s


@stage("m v")
def moments(p, g, m, v, w1, beta2, w2):
    """The moments alone: what a rule does that waits before it moves the parameter."""
    m = lerp2(m, g, w1)
    v = tl.fma(w2 * g, g, v * beta2)
    return p, g, m, v


@stage("m v")
def adam(p, g, m, v, w1, beta2, w2, eps, sqrt_bc2, step_size):
    """Kingma and Ba 2015; step_size = lr / (1 - beta1^t)."""
    m = lerp2(m, g, w1)
    v = tl.fma(w2 * g, g, v * beta2)
    d = tl.div_rn(tl.sqrt_rn(v), sqrt_bc2) + eps
    p = p - tl.div_rn(step_size * m, d)
    return p, g, m, v


@stage("m v vmax")
def amsgrad(p, g, m, v, vmax, w1, beta2, w2, eps, sqrt_bc2, step_size):
    """Adam whose denominator never shrinks. (Reddi, Kale and Kumar 2018)"""
    m = lerp2(m, g, w1)
    v = tl.fma(w2 * g, g, v * beta2)
    vmax = tl.maximum(vmax, v, tl.PropagateNan.ALL)
    d = tl.div_rn(tl.sqrt_rn(vmax), sqrt_bc2) + eps
    p = p - tl.div_rn(step_size * m, d)
    return p, g, m, v, vmax


@stage("m u")
def adamax(p, g, m, u, w1, beta2, eps, step_size):
    """Adam with the infinity norm; eps enters inside the maximum, as in torch. (Kingma and Ba 2015, section 7.1)"""
    m = lerp2(m, g, w1)
    u = tl.maximum(u * beta2, tl.abs(g) + eps, tl.PropagateNan.ALL)
    p = p - tl.div_rn(step_size * m, u)
    return p, g, m, u


@stage("m v")
def nadam(p, g, m, v, w1, beta2, w2, eps, bc2, c_g, c_m):
    """Adam with Nesterov momentum: c_g and c_m weigh the gradient and the momentum. (Dozat 2016)"""
    m = lerp2(m, g, w1)
    v = tl.fma(w2 * g, g, v * beta2)
    d = tl.sqrt_rn(tl.div_rn(v, bc2)) + eps
    p = p + tl.div_rn(c_g * g, d)
    p = p + tl.div_rn(c_m * m, d)
    return p, g, m, v


@stage("m v")
def radam(p, g, m, v, w1, beta2, w2, eps, bc1, lr, sqrt_bc2, rectified, rect):
    """Adam whose step waits for the variance of the denominator to be finite. (Liu et al. 2020)"""
    m = lerp2(m, g, w1)
    v = tl.fma(w2 * g, g, v * beta2)
    u = tl.div_rn(m, bc1) * lr
    q = tl.div_rn(1.0, tl.sqrt_rn(v) + eps) * sqrt_bc2
    p = p - tl.where(rectified > 0.5, u * q * rect, u)
    return p, g, m, v


@stage("slow")
def lookahead(p, g, slow, alpha):
    """Slow weights take a step of alpha towards the fast ones, which restart there. (Zhang et al. 2019)"""
    slow = lerp2(slow, p, alpha)
    p = slow
    return p, g, slow
