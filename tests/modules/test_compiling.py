"""What ``torch.compile`` can be trusted with."""

import pytest
import torch

from lightning_rectify.modules.compiling import notices_frozen_weights


def test_the_answer_is_that_of_a_game_of_two_layers():
    class Layers(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Tanh())

        def forward(self, x):
            return self.layers(x)

    network = Layers()
    network.compile(backend="aot_eager")
    right = []
    for needed in (False, True, False):
        network.requires_grad_(needed)
        right.append(network(torch.randn(5, 3)).requires_grad is needed)
    assert notices_frozen_weights() is all(right)


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_looking_leaves_no_trace_and_needs_no_gradients_around_it(context):
    state = torch.get_rng_state()
    with context():
        inside = notices_frozen_weights.__wrapped__()
    assert inside is notices_frozen_weights.__wrapped__()
    assert torch.equal(torch.get_rng_state(), state)
