"""Inference networks outside of Lightning: torch.export and ONNX against eager, for batches of any size."""

import io

import pytest
import torch

from lightning_rectify.nn.spectral import bake
from tests.export.cases import CASES, gan

SIZES = (1, 3, 17)
# Others ask the same of each module's network (tests/contract) and of the network of the proof.
LONG = ("chart_net", "conditional_generator")


def cases(*slow):
    return [pytest.param(name, marks=pytest.mark.slow) if name in slow else name for name in CASES]


def eager(case, inputs):
    with torch.no_grad():
        return as_tuple(case.network(*inputs))


def as_tuple(answer):
    return answer if isinstance(answer, tuple) else (answer,)


@pytest.mark.parametrize("name", cases(*LONG))
def test_exported_program_equals_eager_for_any_batch_after_saving(name):
    case = CASES[name]()
    program = torch.export.export(case.network, case.draw(4), dynamic_shapes=case.shapes)
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    answers = []
    for size in SIZES:
        inputs = case.draw(size)
        answers.append(eager(case, inputs))
        assert len(answers[-1][0]) == size
        torch.testing.assert_close(as_tuple(loaded(*inputs)), answers[-1], rtol=0, atol=case.tolerance)
    assert answers[-1][0].std() > 100 * case.tolerance  # equal answers that say something


# Two seconds each, after ten for the imports.
@pytest.mark.parametrize("name", cases(*(CASES.keys() - {"robust_classifier"})))
def test_onnx_runtime_equals_eager_for_any_batch(name, tmp_path):
    for module in ("onnx", "onnxscript"):
        pytest.importorskip(module)
    runtime = pytest.importorskip("onnxruntime")
    case = CASES[name]()
    program = torch.onnx.export(case.network, case.draw(4), dynamic_shapes=case.shapes, dynamo=True, verbose=False)
    program.save(tmp_path / "network.onnx")
    session = runtime.InferenceSession(tmp_path / "network.onnx")
    for size in SIZES:
        inputs = case.draw(size)
        feed = {given.name: part.numpy() for given, part in zip(session.get_inputs(), inputs, strict=True)}
        answer = tuple(map(torch.from_numpy, session.run(None, feed)))
        torch.testing.assert_close(answer, eager(case, inputs), rtol=0, atol=case.tolerance)


def test_what_is_exported_of_a_game_is_the_average():
    module = gan()
    latents = torch.rand(3, module.latent_size)
    program = torch.export.export(module, (latents,)).module()
    with torch.no_grad():
        average, last = module.averaged("generator")(latents), module.generator(latents)
    torch.testing.assert_close(program(latents), average, rtol=0, atol=1e-5)
    assert (average - last).abs().max() > 0.01


def test_baked_discriminator_is_as_the_controlled_one_and_holds_plain_weights_only():
    module = gan()
    images = torch.rand(5, 1, 32, 32) * 2 - 1
    plain = bake(module.discriminator)
    program = torch.export.export(plain, (images,))
    with torch.no_grad():
        # 1e-5: W = U diag(e) V^T is multiplied out once instead of in each pass.
        torch.testing.assert_close(program.module()(images), module.discriminator(images), rtol=0, atol=1e-5)
    assert all(key.rpartition(".")[2] in ("weight", "bias") for key in program.state_dict)
