"""Attacks written plainly from the papers, one image at a time, in float64: the oracle for ``attacks``."""

import math
from fractions import Fraction

import torch
from torch.nn import functional as F


def project(point, image, epsilon, norm, bounds=(0.0, 1.0)):
    """Into the ball, then into the bounds."""
    offset = point - image
    if norm == "linf":
        offset = torch.clamp(offset, -epsilon, epsilon)
    elif offset.norm() > epsilon:
        offset = offset / offset.norm() * epsilon
    return torch.clamp(image + offset, *bounds)


def direction(gradient, norm):
    return torch.sign(gradient) if norm == "linf" else gradient / max(gradient.norm().item(), 1e-300)


def gradient_of(model, image, label, loss):
    image = image.clone().requires_grad_()
    logits = model(image[None])
    if loss == "ce":
        value = F.cross_entropy(logits, label[None])
    else:
        wrong = torch.cat([logits[0, :label], logits[0, label + 1 :]])
        value = wrong.max() - logits[0, label]
    (gradient,) = torch.autograd.grad(value, image)
    return gradient, value.item(), logits.argmax().item()


def pgd(model, image, label, epsilon, steps, step_size, norm="linf", loss="ce", start=None):
    """Madry et al. (arXiv:1706.06083): ascend, project, repeat."""
    point = image if start is None else start
    for _ in range(steps):
        gradient, _, _ = gradient_of(model, point, label, loss)
        point = project(point + step_size * direction(gradient, norm), image, epsilon, norm)
    return point


def checkpoints(steps):
    """Croce and Hein (arXiv:2003.01690, section 3.1), in exact fractions."""
    places = [Fraction(0), Fraction(22, 100)]
    while places[-1] <= 1:
        places.append(places[-1] + max(places[-1] - places[-2] - Fraction(3, 100), Fraction(6, 100)))
    return {math.ceil(place * steps) for place in places[1:] if place <= 1}


def apgd(model, image, label, epsilon, steps, norm, loss, start):
    """Algorithm 1 of arXiv:2003.01690; the answer is the misclassified point of largest loss, else that of largest."""
    values, step_size, marks, mark = [], 2 * epsilon, checkpoints(steps), 0
    points = [start]
    gradient, value, guess = gradient_of(model, start, label, loss)
    values.append(value)
    visited = [(guess != label.item(), value, start)]
    best, best_value, mark_value, mark_size = start, value, value, step_size
    rises = []
    for k in range(1, steps + 1):
        now = points[-1]
        z = project(now + step_size * direction(gradient, norm), image, epsilon, norm)
        if k > 1:
            z = project(now + 0.75 * (z - now) + 0.25 * (now - points[-2]), image, epsilon, norm)
        points.append(z)
        gradient, value, guess = gradient_of(model, z, label, loss)
        rises.append(value > values[-1])
        values.append(value)
        visited.append((guess != label.item(), value, z))
        if value > best_value:
            best, best_value = z, value
        if k in marks:
            one = sum(rises[mark:k]) < 0.75 * (k - mark)
            two = step_size == mark_size and best_value == mark_value
            mark_size, mark_value, mark = step_size, best_value, k
            if one or two:
                step_size /= 2
                points[-1] = best
                gradient, values[-1], _ = gradient_of(model, best, label, loss)
    return max(visited, key=lambda triple: triple[:2])[2]


def pyramid(height, width):
    """Equation 3 of the Square Attack (arXiv:1912.00049), with its indices from 1."""
    n = height // 2
    eta = torch.zeros(height, width, dtype=torch.float64)
    for r in range(1, height + 1):
        for s in range(1, width + 1):
            layers = n - max(abs(r - height // 2 - 1), abs(s - width // 2 - 1))
            eta[r - 1, s - 1] = sum(1 / (n + 1 - k) ** 2 for k in range(layers + 1))
    return eta
