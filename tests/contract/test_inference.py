"""Clause 8: prediction, the example input, export."""

import torch

from tests.helpers.training import trainer


def test_predict_gives_one_answer_an_example(row):
    module, data = row.make_module(), row.make_data()
    answers = trainer().predict(module, data)
    loader = data.predict_dataloader()
    assert len(answers) == len(loader)
    for i, (answer, batch) in enumerate(zip(answers, loader, strict=True)):
        with torch.no_grad():
            assert torch.equal(answer, module.eval().predict_step(batch, i))
        assert len(answer) == len(batch if isinstance(batch, torch.Tensor) else batch[0])


def test_example_input_runs_through_forward(row):
    module = row.make_module().eval()
    example = module.example_input_array
    example = example if isinstance(example, tuple) else (example,)
    with torch.no_grad():
        output = module(*example)
    assert len(output) == len(example[0])
    assert torch.isfinite(output).all()


def test_exported_network_takes_any_batch_and_equals_eager(row):
    module = row.make_module().eval()
    network = getattr(module, row.networks[0])
    example = torch.randn_like(module.example_input_array)
    program = torch.export.export(network, (example,), dynamic_shapes=({0: torch.export.Dim("batch", min=1)},))
    for size in (1, 3, 17):
        batch = torch.randn(size, *example.shape[1:])
        # 1e-5: float32, kernels may differ with the batch.
        assert torch.allclose(program.module()(batch), network(batch), atol=1e-5)
