"""ParScale in NumPy, dense and slow, from the paper's formulas: the whole model, all replicas in one softmax.

Independent of heddle: every replica's every token stands in one (P·S) by (n + P·S) matrix of scores. Works in float64,
and in complex128, so that derivatives come exact: ``f(x + ih).imag / h`` with h tiny (Squire and Trapp, 1998).
"""

from __future__ import annotations

import numpy as np


def softmax(scores, visible):
    """Over the last axis, of what is visible; rows that see nothing give 0."""
    highest = np.where(visible, scores.real, -1e300).max(-1, keepdims=True)
    weights = np.where(visible, np.exp(np.where(visible, scores - highest, 0)), 0)
    total = weights.sum(-1, keepdims=True)
    return weights / np.where(total == 0, 1, total)


def turn(x, position, theta):
    """RoPE, half-split: ``x (..., d)`` by the angles ``position[..., None] * theta^(-2i/d)``."""
    half = x.shape[-1] // 2
    angle = np.asarray(position)[..., None] * theta ** (-np.arange(half) / half)
    cos, sin = np.cos(angle), np.sin(angle)
    a, b = x[..., :half], x[..., half:]
    return np.concatenate([a * cos - b * sin, b * cos + a * sin], -1)


def attention(
    q, k, v, sees, *, prefix=None, scope="own", cross=False, bias=None, theta=None, valid=None
):  # fmt: skip
    """All replicas' attention for one sequence, by one dense matrix.

    q ``(P, S, heads, d)``; k, v ``(P, S, kv_heads, d)``; sees ``(P, S, S)``: whether query i sees its replica's key j.
    prefix: keys and values ``(P, kv_heads, n, d)``. Returns out and, with ``cross``, attention over other replicas.
    """
    replicas, length, heads, size = q.shape
    group, total = heads // k.shape[2], replicas * length
    valid = np.ones((replicas, length), bool) if valid is None else valid
    replica, place = np.divmod(np.arange(total), length)
    own = np.zeros((total, total), bool)
    for p in range(replicas):
        own[p * length : (p + 1) * length, p * length : (p + 1) * length] = sees[p]
    other = (replica[:, None] != replica) & (place[:, None] == place) & valid.reshape(-1)[None]
    out, apart = np.zeros((2, *q.shape), q.dtype)
    for h in range(heads):
        q_h, k_h, v_h = q[:, :, h], k[:, :, h // group], v[:, :, h // group]
        scores = q_h.reshape(total, size) @ k_h.reshape(total, size).T / np.sqrt(size)
        between = scores
        if theta is not None:
            index = np.arange(replicas)[:, None] + np.zeros((1, length))
            q_r, k_r = (turn(x, index, theta).reshape(total, size) for x in (q_h, k_h))
            between = q_r @ k_r.T / np.sqrt(size)
        values, seen = v_h.reshape(total, size), own
        if cross:
            apart[:, :, h] = (softmax(between, other) @ values).reshape(replicas, length, size)
            seen = own | other
            scores = np.where(other, between + (0 if bias is None else bias[h]), scores)
        if prefix is not None:
            keys, prefix_values = (x[:, h // group] for x in prefix)  # (P, n, d)
            n = keys.shape[1]
            of_prefix = q_h.reshape(total, size) @ keys.reshape(-1, size).T / np.sqrt(size)
            owner = np.repeat(np.arange(replicas), n)
            scores = np.concatenate([of_prefix, scores], 1)
            seen = np.concatenate([(owner == replica[:, None]) | (scope == "all"), seen], 1)
            values = np.concatenate([prefix_values.reshape(-1, size), values])
        out[:, :, h] = (softmax(scores, seen) @ values).reshape(replicas, length, size)
    return out, apart


def aggregate(hidden, first, first_bias, second, second_bias, smoothing):
    """hidden ``(P, S, H)``, weights as torch's Linear has them."""
    replicas, length, size = hidden.shape
    features = np.zeros((length, size * replicas), hidden.dtype)
    for h in range(size):
        for p in range(replicas):
            features[:, h * replicas + p] = hidden[p, :, h]
    x = features @ first.T + first_bias
    logits = (x / (1 + np.exp(-x))) @ second.T + second_bias
    weights = softmax(logits, np.ones(logits.shape, bool)) * (1 - smoothing) + smoothing / replicas
    return sum(weights[:, p, None] * hidden[p] for p in range(replicas))


def model(config, state, ids, valid=None, positions=None, documents=None):
    """Logits ``(S, vocab)`` of one sequence. ids ``(S,)``, or ``(P, S)``, one a replica; valid ``(P, S)``: not
    padding; documents ``(S,)``: which one each token is of."""
    replicas, eps = config.parscale_n, config.rms_norm_eps
    ids = np.broadcast_to(ids, (replicas, np.shape(ids)[-1]))
    length, size, theta = ids.shape[1], config.head_dim, config.rope_parameters["rope_theta"]
    valid = np.ones(ids.shape, bool) if valid is None else np.broadcast_to(valid, ids.shape)
    positions = np.arange(length) if positions is None else positions
    documents = np.zeros(length) if documents is None else documents
    index = np.arange(length)
    sees = (index[:, None] >= index) & (documents[:, None] == documents) & valid[:, None, :]
    replica_theta = theta if config.enable_replica_rope else None

    def norm(x, name):
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * state[name + ".weight"]

    def project(x, name):
        y = x @ state[name + ".weight"].T
        return y + state[name + ".bias"] if name + ".bias" in state else y

    x = state["model.embed_tokens.weight"][ids]
    for i in range(config.num_hidden_layers):
        layer = f"model.layers.{i}."
        mode = config.parscale_cross_attn_mode if f"{layer}self_attn.cross_attn_proj.weight" in state else None
        if f"{layer}cross_attn.q_proj.weight" in state:
            y, name = norm(x, layer + "cross_attn_layernorm"), layer + "cross_attn."
            q, k, v = (project(y, f"{name}{n}_proj").reshape(replicas, length, -1, size) for n in "qkv")
            # All replicas at a position, oneself too: as if each replica were a token of a sequence of P.
            q, k, v = (a.transpose(1, 0, 2, 3) for a in (q, k, v))
            if replica_theta is not None:
                q, k = (turn(a, np.arange(replicas)[None, :, None] + 0 * a[..., 0].real, theta) for a in (q, k))
            seen = np.broadcast_to(valid.T[:, None], (length, replicas, replicas))
            o, _ = zip(*(attention(q[[j]], k[[j]], v[[j]], seen[[j]]) for j in range(length)))
            x = x + project(np.concatenate(o).transpose(1, 0, 2, 3).reshape(replicas, length, -1), name + "o_proj")
        y, name = norm(x, layer + "input_layernorm"), layer + "self_attn."
        q, k, v = (project(y, f"{name}{n}_proj").reshape(replicas, length, -1, size) for n in "qkv")
        q, k = (turn(a, positions[None, :, None] + np.zeros(a.shape[:3]), theta) for a in (q, k))
        prefix = (state[name + "prefix_k"], state[name + "prefix_v"]) if name + "prefix_k" in state else None
        o, apart = attention(
            q, k, v, sees, prefix=prefix, scope=config.parscale_prefix_scope, cross=mode == "joint",
            bias=state.get(name + "cross_attn_bias"), theta=replica_theta, valid=valid,
        )  # fmt: skip
        x = x + project(o.reshape(replicas, length, -1), name + "o_proj")
        if mode == "joint":
            x = x + project(apart.reshape(replicas, length, -1), name + "cross_attn_proj")
        y, name = norm(x, layer + "post_attention_layernorm"), layer + "mlp."
        gate = project(y, name + "gate_proj")
        x = x + project(gate / (1 + np.exp(-gate)) * project(y, name + "up_proj"), name + "down_proj")
    x = norm(x, "model.norm")
    if replicas > 1:
        weights = (state[f"model.aggregate_layer.{n}.{kind}"] for n in (0, 2) for kind in ("weight", "bias"))
        x = aggregate(x, *weights, config.parscale_attn_smooth)
    else:
        x = x[0]
    return x @ state["lm_head.weight" if "lm_head.weight" in state else "model.embed_tokens.weight"].T


def slope(function, arrays, directions, step=1e-30):
    """d/dt function(arrays + t directions) at t = 0, exact to rounding: by a complex step."""
    moved = {name: array + 1j * step * directions[name] for name, array in arrays.items()}
    return function(moved).imag / step
