"""The networks of the language model against torch's stacked LSTM and a plain hierarchical softmax."""

import numpy as np
import pytest
import torch
from torch import nn

from lightning_rectify.modules.language_model.networks import AdaptiveSoftmax, LSTMNetwork, StackedLSTM


def tokens(batch=3, length=7, vocab_size=30, seed=0):
    return torch.randint(vocab_size, (batch, length), generator=torch.Generator().manual_seed(seed))


def test_layers_are_torchs_stacked_lstm():
    stack = StackedLSTM(30, 5, 8, layers=3, dropout=0.0).double()
    peer = nn.LSTM(5, 8, num_layers=3, batch_first=True).double()
    for i, layer in enumerate(stack.layers):
        for name, value in layer.named_parameters():
            getattr(peer, name.replace("l0", f"l{i}")).data.copy_(value)
    state = torch.randn(2, 3, 3, 8, dtype=torch.float64)
    for begin in (None, state):
        features, (hidden, cell) = peer(stack.embedding(tokens()), None if begin is None else tuple(begin))
        mine, last = stack(tokens(), begin)
        # 1e-12: float64, the same operations
        torch.testing.assert_close(mine, features, rtol=0, atol=1e-12)
        torch.testing.assert_close(last, torch.stack([hidden, cell]), rtol=0, atol=1e-12)


def test_windows_with_a_carried_state_are_the_whole():
    stack, state, parts = StackedLSTM(30, 5, 8, layers=2, dropout=0.0).double(), None, []
    for window in tokens(length=9).split(3, dim=1):
        features, state = stack(window, state)
        parts.append(features)
    whole, last = stack(tokens(length=9))
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, rtol=0, atol=1e-12)  # float64
    torch.testing.assert_close(state, last, rtol=0, atol=1e-12)


def test_dropout_is_between_layers_and_not_within_them():
    stack, seen = StackedLSTM(30, 40, 50, layers=2, dropout=0.5), []
    stack.dropout.register_forward_hook(lambda _, __, output: seen.append((output == 0).float().mean().item()))
    _, state = stack(tokens(batch=20))
    assert len(seen) == 3  # embedding and each layer's outputs
    # 5600 and more draws of 0.5: the standard error is below 0.007
    assert seen == pytest.approx([0.5] * 3, abs=0.05)
    assert (state == 0).sum() == 0


def plain_log_prob(softmax, features):
    """Grave et al. 2017, section 4.1, in numpy: p(w) = p(cluster) p(w | cluster)."""

    def log_softmax(x):
        x = x - x.max(axis=1, keepdims=True)
        return x - np.log(np.exp(x).sum(axis=1, keepdims=True))

    def weight(layer):
        return layer.weight.detach().numpy().T

    inner = softmax.inner
    head = log_softmax(features @ weight(inner.head[0]))
    first = inner.cutoffs[0]
    parts = [head[:, :first]]
    for i, tail in enumerate(inner.tail):
        parts.append(head[:, first + i, None] + log_softmax(features @ weight(tail[0]) @ weight(tail[1])))
    return np.concatenate(parts, axis=1)


def test_softmax_is_the_plain_one_in_numpy():
    softmax = AdaptiveSoftmax(16, 30, [5, 12, 20], div_value=2.0).double()
    features = torch.randn(4, 6, 16, dtype=torch.float64)
    expected = torch.from_numpy(plain_log_prob(softmax, features.flatten(0, 1).numpy()))
    # 1e-12: float64
    torch.testing.assert_close(softmax.log_prob(features).flatten(0, 1), expected, rtol=0, atol=1e-12)
    targets = torch.arange(24) % 30
    chosen = -expected.gather(1, targets[:, None]).squeeze(1)
    torch.testing.assert_close(softmax(features.flatten(0, 1), targets), chosen, rtol=0, atol=1e-12)
    torch.testing.assert_close(softmax.log_prob(features).exp().sum(-1), torch.ones(4, 6, dtype=torch.float64))


@pytest.mark.parametrize("count", [1, 2, 9])
def test_clusters_without_a_word_have_a_gradient_of_zeros(count):
    softmax = AdaptiveSoftmax(16, 30, [5, 20])
    losses = softmax(torch.randn(count, 16), torch.full((count,), 7))
    assert losses.shape == (count,)
    losses.sum().backward()
    assert all(parameter.grad is not None for parameter in softmax.parameters())
    assert all(parameter.grad.abs().sum() == 0 for parameter in softmax.inner.tail[1].parameters())
    assert all(parameter.grad.abs().sum() > 0 for parameter in softmax.inner.tail[0].parameters())


def test_bfloat16_autocast_keeps_losses_and_states_in_float32():
    network = LSTMNetwork(30, 16, 32, 2, 0.0, [5, 20], 4.0)
    targets = tokens(seed=1).flatten()
    exact = network.softmax(network.recurrent(tokens())[0].flatten(0, 1), targets)
    with torch.autocast("cpu", torch.bfloat16):
        _, state = network.recurrent(tokens())
        features, state = network.recurrent(tokens(), torch.zeros_like(state))
        losses = network.softmax(features.flatten(0, 1), targets)
        logs = network(tokens())
    assert losses.dtype == state.dtype == logs.dtype == torch.float32
    # logits of size below 1 with 8 bits; a loss in bfloat16 would be a multiple of 2 ** -6
    torch.testing.assert_close(losses, exact, rtol=0, atol=0.02)
    assert (losses * 64 != (losses * 64).round()).any()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"cutoffs": []}, "`cutoffs`.*one or more.*got \\[\\]"),
        ({"cutoffs": [20, 5]}, "`cutoffs`.*rising.*got \\[20, 5\\]"),
        ({"cutoffs": [5, 5]}, "`cutoffs`.*rising"),
        ({"cutoffs": [0, 5]}, "`cutoffs`.*1 to 29"),
        ({"cutoffs": [5, 30]}, "`cutoffs`.*1 to 29.*`vocab_size` 30"),
        ({"cutoffs": [5.5]}, "`cutoffs`.*integers"),
        ({"div_value": 0.9}, "`div_value`.*at least 1.*got 0.9"),
        ({"div_value": 5.0}, "`div_value`.*16 features.*2 clusters.*got 5.0"),
    ],
)
def test_wrong_arguments(arguments, words):
    with pytest.raises(ValueError, match=words):
        AdaptiveSoftmax(**{"width": 16, "vocab_size": 30, "cutoffs": [5, 20], **arguments})
