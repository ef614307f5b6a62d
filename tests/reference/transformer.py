"""The Transformer forward pass in plain float64 numpy, one position and one head at a time (arXiv:1706.03762).

It reads the weights by their names in the network's state dict. What the torch code is tested against.
"""

import math

import numpy as np


def softmax(x):
    e = np.exp(x - x.max())
    return e / e.sum()


def layer_norm(x, weights, name):
    """Of one vector, with the variance of n, not n - 1."""
    scaled = (x - x.mean()) / math.sqrt(((x - x.mean()) ** 2).mean() + 1e-5)
    return scaled * weights[f"{name}.weight"] + weights[f"{name}.bias"]


def linear(x, weights, name):
    return weights[f"{name}.weight"] @ x + weights[f"{name}.bias"]


def place(p, width):
    rates = [10000.0 ** (-2 * i / width) for i in range(width // 2)]
    return np.array([math.sin(p * r) for r in rates] + [math.cos(p * r) for r in rates])


def embedded(tokens, weights, name):
    table = weights[f"{name}.tokens.weight"]
    width = table.shape[1]
    learned = weights.get(f"{name}.places.weight")
    return [
        table[token] * math.sqrt(width) + (place(p, width) if learned is None else learned[p])
        for p, token in enumerate(tokens)
    ]


def attended(queries, keys, values, heads, may_look):
    """Mixed values of each query, and the weights (heads, queries, keys)."""
    size = len(queries[0]) // heads
    out, all_weights = [], np.zeros((heads, len(queries), len(keys)))
    for t, query in enumerate(queries):
        mixed = []
        for h in range(heads):
            part = slice(h * size, (h + 1) * size)
            seen = [s for s in range(len(keys)) if may_look(t, s)]
            weights = softmax(np.array([query[part] @ keys[s][part] / math.sqrt(size) for s in seen]))
            all_weights[h, t, seen] = weights
            mixed.append(sum(w * values[s][part] for w, s in zip(weights, seen, strict=True)))
        out.append(np.concatenate(mixed))
    return out, all_weights


def self_attention(xs, weights, name, heads, may_look):
    packed = [np.split(linear(x, weights, f"{name}.projection"), 3) for x in xs]
    mixed, _ = attended(*zip(*packed, strict=True), heads, may_look)
    return [linear(x, weights, f"{name}.output") for x in mixed]


def cross_attention(xs, memory, weights, name, heads):
    queries = [linear(x, weights, f"{name}.query") for x in xs]
    packed = [np.split(linear(x, weights, f"{name}.memory"), 2) for x in memory]
    mixed, looks = attended(queries, *zip(*packed, strict=True), heads, lambda t, s: True)
    return [linear(x, weights, f"{name}.output") for x in mixed], looks


def feedforward(xs, weights, name):
    return [linear(np.maximum(linear(x, weights, f"{name}.inner"), 0.0), weights, f"{name}.outer") for x in xs]


def residual(xs, branch, weights, name, norm):
    if norm == "pre":
        return [x + y for x, y in zip(xs, branch([layer_norm(x, weights, name) for x in xs]), strict=True)]
    return [layer_norm(x + y, weights, name) for x, y in zip(xs, branch(xs), strict=True)]


def last_norm(xs, weights, name, norm):
    return [layer_norm(x, weights, name) for x in xs] if norm == "pre" else xs


def transformer(weights, source, target, layers, heads, norm):
    """Logits (T, V) and attention (layers, heads, T, S) of ONE pair without padding."""
    memory = embedded(source, weights, "encoder.embedding")
    for i in range(layers[0]):
        at = f"encoder.layers.{i}"
        look = lambda xs, at=at: self_attention(xs, weights, f"{at}.self_attention", heads, lambda t, s: True)  # noqa: E731
        memory = residual(memory, look, weights, f"{at}.self_residual.norm", norm)
        feed = lambda xs, at=at: feedforward(xs, weights, f"{at}.feedforward")  # noqa: E731
        memory = residual(memory, feed, weights, f"{at}.feed_residual.norm", norm)
    memory = last_norm(memory, weights, "encoder.norm", norm)

    xs, looks = embedded(target, weights, "decoder.embedding"), []
    for i in range(layers[1]):
        at = f"decoder.layers.{i}"
        recall = lambda xs, at=at: self_attention(xs, weights, f"{at}.self_attention", heads, lambda t, s: s <= t)  # noqa: E731
        xs = residual(xs, recall, weights, f"{at}.self_residual.norm", norm)

        def look(xs, at=at):
            ys, weight = cross_attention(xs, memory, weights, f"{at}.cross_attention", heads)
            looks.append(weight)
            return ys

        xs = residual(xs, look, weights, f"{at}.cross_residual.norm", norm)
        feed = lambda xs, at=at: feedforward(xs, weights, f"{at}.feedforward")  # noqa: E731
        xs = residual(xs, feed, weights, f"{at}.feed_residual.norm", norm)
    xs = last_norm(xs, weights, "decoder.norm", norm)
    out = weights.get("output", weights["decoder.embedding.tokens.weight"])
    return np.array([out @ x for x in xs]), np.array(looks)
