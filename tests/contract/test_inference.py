"""Clause 8: prediction, the example input, export."""

from operator import attrgetter

import torch

from tests.helpers.training import differences, trainer


def test_predict_gives_one_answer_an_example(row):
    module, data = row.make_module(), row.make_data()
    answers = trainer().predict(module, data)
    loader = data.predict_dataloader()
    assert len(answers) == len(loader)
    for i, (answer, batch) in enumerate(zip(answers, loader, strict=True)):
        with torch.no_grad():
            assert differences(answer, module.eval().predict_step(batch, i)) == []
        assert len(answer) == len(batch if isinstance(batch, torch.Tensor) else batch[0])


def examples(module):
    """The module's example input, always as a tuple."""
    example = module.example_input_array
    return example if isinstance(example, tuple) else (example,)


def test_example_input_runs_through_forward(row):
    module = row.make_module().eval()
    example = examples(module)
    with torch.no_grad():
        output = module(*example)
    assert len(output) == len(example[0])
    assert torch.isfinite(output).all()


def test_exported_network_takes_any_batch_and_equals_eager(row):
    module = row.make_module().eval()
    network = attrgetter(row.exported or row.networks[0])(module)
    example = examples(module)
    batch = torch.export.Dim("batch", min=1, max=1024)  # torch 2.6 wants an end
    program = torch.export.export(network, example, dynamic_shapes=tuple({0: batch} for _ in example))
    for size in (1, 3, 17):
        inputs = tuple(other(part, size) for part in example)
        # 1e-5: float32, kernels may differ with the batch.
        assert torch.allclose(program.module()(*inputs), network(*inputs), atol=1e-5)


def other(example, size):
    """A batch of another size: random numbers, or tokens of the example in random rows."""
    if example.is_floating_point():
        return torch.randn(size, *example.shape[1:])
    return example[torch.randint(len(example), (size,))]
