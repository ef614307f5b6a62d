"""SpectralGAN: the spectra it promises, what each player learns from, what it samples and measures."""

import warnings
from functools import partial
from pathlib import Path

import pytest
import torch
import yaml
from torch import nn

import lightning_rectify
from lightning_rectify import ImageData, RectifiedAdam, SpectralGAN
from lightning_rectify._lightning import Callback
from lightning_rectify.cli import RectifyCLI, main
from lightning_rectify.modules.spectral_gan import ClassifierFeatures, RandomFeatures
from lightning_rectify.modules.spectral_gan.losses import LOSSES
from lightning_rectify.modules.spectral_gan.sampling import draw_latents
from lightning_rectify.nn._factors import SpectralFactors
from lightning_rectify.nn.singular_values import singular_values, weight_matrix
from lightning_rectify.nn.spectral import bake, controlled_layers, project, spectrum
from tests.helpers.training import differences, trainer, weights

CONFIGS = Path(lightning_rectify.__file__).parents[1] / "configs"
SMALL = {"in_channels": 1, "generator_width": 8, "discriminator_width": 16, "latent_size": 8}


def gan(lr=1e-3, seed=1, **options):
    torch.manual_seed(seed)
    optimizer = partial(RectifiedAdam, lr=lr, betas=(0.5, 0.999))
    return SpectralGAN(**{**SMALL, "generator_optimizer": optimizer, "discriminator_optimizer": optimizer, **options})


def data(**options):
    sizes = {"train_size": 64, "val_size": 64, "batch_size": 16, "eval_batch_size": 32}
    return ImageData(**{"dataset": "digits", "image_size": 32, "normalization": "symmetric", **sizes, **options})


def fit(module, steps, datamodule=None, **options):
    training = trainer(**{"max_steps": steps, "max_epochs": -1, "limit_val_batches": 0, **options})
    training.fit(module, datamodule or data())
    return training


def images_of(count, size=32, seed=3):
    images = torch.rand(count, 1, size, size, generator=torch.Generator().manual_seed(seed)) * 2 - 1
    return [images, torch.arange(count) % 10]


def lively(module):
    """A generator's first images are grey to 1e-8: with larger weights they differ from latent to latent."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.generator.parameters():
            parameter.mul_(25.0) if parameter.ndim > 1 else None
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    assert module.sample(8).std(dim=0).mean() > 0.05
    return module


def copies(module):
    return {name: value.clone() for name, value in module.state_dict().items()}


# -- the spectra -------------------------------------------------------------------------------------------------------


class Spectra(Callback):
    """After every step: the largest |e|, the largest singular value, the largest distance between the two spectra."""

    def __init__(self):
        self.controlled, self.true, self.apart = [], [], []

    def on_train_batch_end(self, trainer, pl_module, *args):
        layers = controlled_layers(pl_module.discriminator).values()
        said = [spectrum(layer).double() for layer in layers]
        true = [singular_values(weight_matrix(layer)) for layer in layers]
        self.controlled.append(max(e.max().item() for e in said))
        self.true.append(max(s.max().item() for s in true))
        self.apart.append(max((s - e).abs().max().item() for s, e in zip(true, said, strict=True)))


@pytest.mark.parametrize("orthogonality", [10.0, 0.0])
def test_the_penalty_makes_e_the_singular_values(orthogonality):
    """Without it e means nothing any more."""
    spectra = Spectra()
    # lr 4e-3 for 80 steps moves U and V about as far as the paper's 2e-4 in 1,600.
    fit(gan(lr=4e-3, orthogonality=orthogonality), 80, data(train_size=256), callbacks=[spectra])
    if orthogonality:
        assert max(spectra.apart) < 0.02
    else:
        assert spectra.apart[-1] > 0.5


@pytest.mark.parametrize("control", ["normalization", "constraint"])
def test_bounded_spectra_stay_bounded_after_every_step(control):
    spectra = Spectra()
    fit(gan(lr=3e-3, control=control), 40, callbacks=[spectra])
    assert len(spectra.controlled) == 40
    assert max(spectra.controlled) <= 1.0  # a quotient of a number by itself, or a clip: exact
    assert max(spectra.true) <= 1.02  # U and V are orthonormal up to what the soft penalty leaves


def test_retraction_keeps_factors_orthonormal_without_a_penalty():
    spectra = Spectra()
    fit(gan(lr=3e-3, retraction=1), 10, callbacks=[spectra])
    assert max(spectra.apart) < 1e-5  # QR in float32, 128 numbers a column


def test_baked_discriminator_is_the_discriminator():
    module = gan()
    fit(module, 4)
    plain = bake(module.discriminator)
    assert not controlled_layers(plain)
    assert {type(layer).__name__ for layer in plain.modules()} <= {
        "CNNDiscriminator", "Sequential", "Conv2d", "LeakyReLU", "Linear"
    }  # fmt: skip
    images, _ = images_of(4)
    with torch.no_grad():
        # The same float32 weights; only the rebuilding's order of operations may differ.
        torch.testing.assert_close(plain(images), module.discriminator(images), rtol=1e-5, atol=1e-6)


# -- each player learns ------------------------------------------------------------------------------------------------

GAMES = [
    *({"loss": loss} for loss in LOSSES),
    *({"control": control} for control in (1, 2, 3, 5, 8)),
    {"control": "divergence", "spectrum_start": "spread"},
    *({"control": control} for control in ("plain", "spectral_norm", "orthogonal")),
    {"spectrum_start": "weight"},
    {"loss": "wasserstein", "control": "plain", "gradient_penalty": 10.0},
    {"r1": 1.0},
    {"num_classes": 10, "gradient_penalty": 1.0, "r1": 1.0, "loss": "hinge"},
    {"network": "resnet", "loss": "hinge", "n_dis": 2, "generator_norm": "group"},
    {"retraction": 2},
    {"ema_decay": None},
    {"accumulate": 2},
]


@pytest.mark.parametrize("options", GAMES, ids=lambda options: ", ".join(f"{k}={v}" for k, v in options.items()))
def test_every_game_trains_both_players(options):
    module = gan(**options)
    before = {name: value.detach().clone() for name, value in module.named_parameters() if value.requires_grad}
    # The first five steps of RectifiedAdam are those of gradient descent, which moves a scale of 1 by less than 1e-7.
    training = fit(module, 7)
    for player in ("discriminator", "generator"):
        assert torch.isfinite(training.callback_metrics[f"train/loss_{player}"])
    after = dict(module.named_parameters())
    # Single numbers may stay: the one singular value of the last layer is kept at 1, its U of one number at 1 or -1,
    # and its bias has no gradient where the scores' slopes cancel (wasserstein; hinge while no margin is reached).
    still = [name for name, value in before.items() if torch.equal(value, after[name]) and value.numel() > 1]
    assert still == []
    assert all(torch.isfinite(value).all() for value in after.values())


def test_losses_are_those_of_their_formulas():
    """The discriminator's loss by hand: softplus terms, and 10 times the distances of the Gram matrices."""
    module = gan(control="normalization")
    with torch.no_grad():
        for parameter in module.discriminator.parameters():
            parameter.add_(0.01 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
    project(module.discriminator)
    batch = images_of(6)
    state = module.noise_generator.get_state()
    with torch.no_grad():
        loss = module.discriminator_loss(batch)
        again = torch.Generator()
        again.set_state(state)
        fake = module.generator(draw_latents(6, 8, "uniform", again))
        expected = torch.nn.functional.softplus(-module.discriminator(batch[0])).mean()
        expected = expected + torch.nn.functional.softplus(module.discriminator(fake)).mean()
        for layer in controlled_layers(module.discriminator).values():
            held = layer.parametrizations.weight
            for factor in (held.original0, held.original2):
                expected += 10 * (factor.T @ factor - torch.eye(factor.shape[1])).square().sum()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)  # float32 sums in another order


class Watched(SpectralGAN):
    """Keeps what each network and each loss was called with."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.seen = {"real": [], "generator": [], "discriminator": [], "generated": 0}
        self.generator.register_forward_pre_hook(lambda _, inputs: self.seen["generator"].append(inputs[1]))
        self.discriminator.register_forward_pre_hook(lambda _, inputs: self.seen["discriminator"].append(inputs[1]))

    def discriminator_loss(self, batch):
        self.seen["real"].append(batch)
        return super().discriminator_loss(batch)

    def generator_loss(self, batch):
        self.seen["generated"] += len(batch[0])
        return super().generator_loss(batch)


def test_n_dis_cuts_the_batch_and_shows_each_part_once():
    module = Watched(**SMALL, n_dis=4)
    given = []

    class Keep(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            given.append(batch)

    training = fit(module, 2, callbacks=[Keep()])
    assert training.global_step == 2  # rounds
    assert [len(images) for images, _ in module.seen["real"]] == [4] * 8
    assert torch.equal(torch.cat([b[0] for b in module.seen["real"]]), torch.cat([b[0] for b in given]))
    assert torch.equal(torch.cat([b[1] for b in module.seen["real"]]), torch.cat([b[1] for b in given]))
    assert module.seen["generated"] == 2 * 4
    with pytest.raises(ValueError, match=r"`n_dis` = 4 .* but got 3"):
        module.turn_batch(images_of(3), "discriminator", 0)


def test_labels_reach_both_networks():
    module = Watched(**SMALL, num_classes=10)
    training = fit(module, 1)
    (batch,) = module.seen["real"]
    labels = batch[1]
    assert [seen.tolist() for seen in module.seen["generator"]] == [labels.tolist()] * 2
    assert [s.tolist() for s in module.seen["discriminator"]] == [labels.repeat(2).tolist(), labels.tolist()]
    assert training.global_step == 1
    module = gan(num_classes=10, generator_width=32)
    lively(module)
    module.eval()
    with torch.no_grad():  # the class alone changes the image and the score
        images = module(torch.zeros(10, 8), torch.arange(10))
        assert len(torch.unique(images.flatten(1), dim=0)) == 10
        assert len(torch.unique(module.discriminator(images[:1].expand(10, -1, -1, -1), torch.arange(10)))) == 10


@pytest.mark.parametrize("options", [{}, {"gradient_penalty": 1.0, "r1": 1.0}])
def test_weights_are_rebuilt_once_a_loss(options, monkeypatch):
    calls = []
    rebuild = SpectralFactors._rebuild
    monkeypatch.setattr(SpectralFactors, "_rebuild", lambda self, *f: (calls.append(self), rebuild(self, *f))[1])
    module = gan(**options)
    calls.clear()
    fit(module, 1)
    assert len(controlled_layers(module.discriminator)) == 8
    assert len(calls) == 2 * 8  # in the loss of each player


# -- sampling ----------------------------------------------------------------------------------------------------------


def test_samples_come_from_the_average():
    """EMA of the generator's parameters after each step, the first of which it starts from; buffers are the latest."""
    module = gan(ema_decay=0.5)
    kept = []

    class Keep(Callback):
        def on_train_batch_end(self, trainer, pl_module, *args):
            kept.append(copies(pl_module.generator))

    fit(module, 3, callbacks=[Keep()])
    average = module.averaged("generator")
    assert average is not module.generator
    parameters = dict(module.generator.named_parameters())
    for name, value in average.state_dict().items():
        if name in parameters:
            expected = 0.5 * (0.5 * kept[0][name] + 0.5 * kept[1][name]) + 0.5 * kept[2][name]
            torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-7)  # lerp rounds otherwise
        else:
            assert torch.equal(value, kept[2][name])
    latents = draw_latents(5, 8, "uniform", torch.Generator().manual_seed(4))
    with torch.no_grad():
        expected = average.eval()(latents)
    assert torch.equal(module.sample(5, seed=4), expected)
    assert not torch.equal(module.generator.eval()(latents), expected)


def test_without_an_average_samples_come_from_the_generator():
    module = gan(ema_decay=None)
    fit(module, 2)
    assert module.averaged("generator") is module.generator
    assert not [name for name in module.state_dict() if name.startswith("averages")]
    latents = draw_latents(3, 8, "uniform", torch.Generator().manual_seed(0))
    images = module.sample(3)
    with torch.no_grad():
        assert torch.equal(images, module.generator.eval()(latents))


@pytest.mark.parametrize("ema_decay", [0.9, None])
def test_sampling_is_a_function_of_its_seed_and_leaves_no_trace(ema_decay):
    module = gan(ema_decay=ema_decay)
    fit(module, 1)
    module.train()
    module.generator.norms[1].eval()  # a mode that a user set
    modes = {name: part.training for name, part in module.named_modules()}
    before, state, noise = copies(module), torch.get_rng_state(), module.noise_generator.get_state()
    images = module.sample(6, seed=5)
    between = module.interpolate(2, 3, seed=5)
    assert torch.equal(module.sample(6, seed=5), images)
    assert torch.equal(module.interpolate(2, 3, seed=5), between)
    assert not torch.equal(module.sample(6, seed=6), images)
    assert images.shape == (6, 1, 32, 32)
    assert not images.requires_grad
    assert images.abs().max() <= 1
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(module.noise_generator.get_state(), noise)
    assert {name: part.training for name, part in module.named_modules()} == modes
    assert differences(copies(module), before) == []


def test_many_samples_are_generated_in_parts():
    module = lively(gan())
    latents = draw_latents(260, 8, "uniform", torch.Generator().manual_seed(0))
    with torch.no_grad():
        whole = module.averaged("generator").eval()(latents)
    torch.testing.assert_close(module.sample(260), whole, rtol=1e-5, atol=1e-6)  # convolutions of another batch size


def test_truncation_draws_near_the_middle():
    module = lively(gan(latent_distribution="normal"))
    with torch.no_grad():
        middle = module.averaged("generator").eval()(torch.zeros(3, 8))
    # Latents of at most 1e-6, and an image whose slope is far below 1e2.
    torch.testing.assert_close(module.sample(3, truncation=1e-6), middle, rtol=0, atol=1e-4)
    assert (module.sample(3, truncation=2.0) - middle).abs().max() > 0.05


@pytest.mark.parametrize("distribution", ["uniform", "normal"])
def test_interpolations_end_in_samples(distribution):
    module = lively(gan(latent_distribution=distribution))
    images = module.interpolate(3, 5, seed=7).unflatten(0, (3, 5))
    ends = module.sample(6, seed=7)
    # Ends of lerp and slerp are exact up to float32's rounding; so is a convolution in another batch.
    torch.testing.assert_close(images[:, 0], ends[:3], rtol=0, atol=1e-5)
    torch.testing.assert_close(images[:, -1], ends[3:], rtol=0, atol=1e-5)
    start, end = draw_latents(6, 8, distribution, torch.Generator().manual_seed(7)).chunk(2)
    middle = (start + end) / 2
    if distribution == "normal":  # on the arc: half the angle to each, in slerp's formula for t = 1/2
        cosine = torch.nn.functional.cosine_similarity(start, end)
        middle = (start + end) / (2 * torch.cos(torch.arccos(cosine) / 2))[:, None]
    with torch.no_grad():
        expected = module.averaged("generator").eval()(middle)
    torch.testing.assert_close(images[:, 2], expected, rtol=0, atol=1e-5)


def test_conditional_samples_take_turns_or_have_the_labels_given():
    module = lively(gan(num_classes=3))
    turns = torch.arange(5) % 3
    assert torch.equal(module.sample(5), module.sample(5, labels=turns))
    assert not torch.equal(module.sample(5), module.sample(5, labels=turns.flip(0)))
    assert len(module.interpolate(4, 2)) == 8
    for labels in (torch.tensor([0, 1]), torch.tensor([0, 1, 3]), torch.tensor([-1, 1, 1])):
        with pytest.raises(ValueError, match=r"`labels` to be classes from 0 to 2, shape \(3,\)"):
            module.sample(3, labels=labels)
    with pytest.raises(ValueError, match="`labels` to be None"):
        gan().sample(2, labels=torch.tensor([0, 1]))


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda m: m.sample(0), "`count` to be at least 1 but got 0"),
        (lambda m: m.interpolate(0, 3), "`pairs` to be at least 1 but got 0"),
        (lambda m: m.interpolate(3, 0), "`steps` to be at least 1 but got 0"),
    ],
)
def test_nothing_to_draw_is_an_error(call, said):
    with pytest.raises(ValueError, match=said):
        call(gan())


def test_predictions_differ_between_batches_and_are_the_same_again():
    module = lively(gan())
    runs = [trainer().predict(module, data(eval_batch_size=100)) for _ in range(2)]
    assert [len(images) for images in runs[0]] == [100, 100, 100, 59]
    assert differences(*runs) == []
    everything = torch.cat(runs[0]).flatten(1)
    assert len(torch.unique(everything, dim=0)) == 359
    other = trainer().predict(lively(gan(eval_seed=1)), data(eval_batch_size=100))
    assert not torch.equal(other[0], runs[0][0])


def test_predictions_of_images_without_labels():
    """A conditional model then lets the classes take turns: the second image is not taken for labels."""
    module = lively(gan(num_classes=10))
    images, _ = images_of(12)
    assert module.predict_step(images, 0).shape == images.shape
    given = [images, torch.zeros(12, dtype=torch.int64)]
    assert torch.equal(module.predict_step(images, 0), module.predict_step([images, torch.arange(12) % 10], 0))
    assert not torch.equal(module.predict_step(given, 0), module.predict_step(images, 0))


# -- metrics -----------------------------------------------------------------------------------------------------------


def values(results):
    (found,) = results
    return found


def test_metrics_are_the_same_on_two_validations():
    module = gan(features=RandomFeatures(8))
    fit(module, 2)
    state = torch.get_rng_state()
    first = values(trainer().validate(module, data(), verbose=False))
    second = values(trainer().validate(module, data(), verbose=False))
    assert first == second
    assert {"val/fd_random_n64", "val/kid_random_n64", "val/precision_random_n64"} <= first.keys()
    assert torch.equal(torch.get_rng_state(), state)
    other = gan(features=RandomFeatures(8), eval_seed=1)
    other.configure_model()  # makes the average
    other.load_state_dict(module.state_dict())
    third = values(trainer().validate(other, data(), verbose=False))
    assert third["val/fd_random_n64"] != first["val/fd_random_n64"]
    assert "test/fd_random_n359" in values(trainer().test(module, data(), verbose=False))


def test_metrics_are_logged_during_training_but_not_by_the_sanity_check():
    seen = []

    class Keep(Callback):
        def on_validation_end(self, trainer, pl_module):
            seen.append((trainer.sanity_checking, {k for k in trainer.callback_metrics if k.startswith("val/")}))

    fit(gan(features=RandomFeatures(8)), 4, limit_val_batches=2, num_sanity_val_steps=1, callbacks=[Keep()])
    assert seen[0] == (True, set())
    assert not seen[1][0]
    assert "val/fd_random_n64" in seen[1][1]


class Counted(ClassifierFeatures):
    """Counts trainings; one epoch of a tiny network."""

    def __init__(self):
        super().__init__(in_channels=1, epochs=1, network_args={"width": 4, "norm": "group"}, batch_size=16)
        self.trainings = 0

    def _fit(self, images, *args):
        self.trainings += 1
        self.trained_on = len(images)
        super()._fit(images, *args)


@pytest.mark.parametrize("stage", ["fit", "validate", "test"])
def test_extractor_is_trained_once_whatever_comes_first(stage):
    module, features = gan(features=Counted()), None
    features = module.metrics.extractor
    datamodule = data()
    if stage == "fit":
        fit(module, 2, datamodule, limit_val_batches=1)
    getattr(trainer(), "validate" if stage == "validate" else "test")(module, datamodule, verbose=False)
    trainer().test(module, datamodule, verbose=False)
    assert features.trainings == 1
    assert features.trained_on == 64  # the training part alone


def test_checkpoints_hold_no_extractor_and_load(tmp_path):
    module = gan(features=RandomFeatures(8), n_dis=2)
    training = fit(module, 2, limit_val_batches=1)
    path = tmp_path / "gan.ckpt"
    training.save_checkpoint(path)
    saved = torch.load(path, weights_only=True)
    assert {name.split(".")[0] for name in saved["state_dict"]} == {"generator", "discriminator", "averages"}
    assert saved["hyper_parameters"]["n_dis"] == 2
    assert "features" not in saved["hyper_parameters"]
    loaded = SpectralGAN.load_from_checkpoint(path)
    assert differences(weights(loaded), weights(module)) == []
    assert torch.equal(loaded.sample(3), module.sample(3))
    assert loaded.turns == {"discriminator": 2, "generator": 1}


def test_checkpoint_without_an_average_loads_and_may_get_one(tmp_path):
    """The parent's own default of an argument that SpectralGAN gives it is in the file, and must not come twice."""
    module = gan(ema_decay=None)
    fit(module, 1).save_checkpoint(tmp_path / "gan.ckpt")
    loaded = SpectralGAN.load_from_checkpoint(tmp_path / "gan.ckpt")
    assert torch.equal(loaded.sample(3), module.sample(3))
    averaged = SpectralGAN.load_from_checkpoint(tmp_path / "gan.ckpt", ema_decay=0.9, strict=False)
    assert averaged.averaged("generator") is not averaged.generator


# -- configs -----------------------------------------------------------------------------------------------------------


def printed(capsys, *arguments):
    with pytest.raises(SystemExit) as stop:
        main(["fit", *arguments, "--print_config"])
    assert not stop.value.code
    return capsys.readouterr().out


def test_defaults_survive_as_a_config(capsys, tmp_path):
    text = printed(capsys, "--model=lightning_rectify.SpectralGAN", "--data=lightning_rectify.ImageData")
    arguments = yaml.safe_load(text)["model"]["init_args"]
    assert arguments["generator_optimizer"].endswith("module.adam_of_games")
    # What the parents take is there, but what SpectralGAN gives them itself.
    assert {"compile", "clip_norm", "accumulate"} <= arguments.keys()
    assert not {"turns", "averages", "joint"} & arguments.keys()
    (tmp_path / "printed.yaml").write_text(text)
    assert printed(capsys, f"--config={tmp_path / 'printed.yaml'}") == text


@pytest.mark.parametrize("stem", ["spectral_gan", "spectral_gan_cifar10", "spectral_gan_stl10"])
def test_configs_build_what_fits_together(stem):
    cli = RectifyCLI([f"--config={CONFIGS / stem}.yaml", "--trainer.accelerator=cpu"], run=False)
    for name in ("image_size", "in_channels"):
        assert getattr(cli.model, name) == getattr(cli.datamodule, name)
    assert cli.datamodule.normalization == "symmetric"
    for player in ("generator", "discriminator"):
        (group,) = getattr(cli.model, f"{player}_optimizer")(getattr(cli.model, player).parameters()).param_groups
        assert group["betas"] == (0.5, 0.999)
        assert group["lr"] == (1e-3 if stem == "spectral_gan" else 2e-4)
    if stem != "spectral_gan":  # the paper's generator and discriminator, with 128 latent numbers
        assert cli.model.latent_size == 128
        assert cli.model.generator.stem.out_features == 512 * (4 if "cifar" in stem else 6) ** 2
        assert cli.model.discriminator.head.in_features == 512 * (4 if "cifar" in stem else 6) ** 2
        assert cli.datamodule.batch_size == 64
        assert cli.trainer.max_steps == (100_000 if "cifar" in stem else 200_000)


@pytest.mark.parametrize("command", ["fit", "validate", "test", "predict"])
def test_one_flag_makes_the_config_conditional(command):
    options = ["--model.init_args.num_classes=10", "--model.init_args.features=null", "--trainer.fast_dev_run=true"]
    options += ["--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false"]
    cli = RectifyCLI([command, f"--config={CONFIGS / 'spectral_gan'}.yaml", *options])
    assert cli.trainer.state.finished
    assert cli.model.discriminator.classes.num_embeddings == 10
    if command == "predict":
        (images,) = cli.trainer.predict_loop.predictions
        assert images.shape == (359, 1, 32, 32)


# -- what it refuses ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "its", "said"),
    [
        ({"in_channels": 3}, {}, r"`in_channels` of the datamodule ImageData to be 3, .* but got 1"),
        ({"image_size": 48}, {}, r"`image_size` of the datamodule ImageData to be 48, .* but got 32"),
        ({}, {"normalization": "dataset"}, r"`normalization` .* to be 'symmetric', .* but got 'dataset'"),
        ({"num_classes": 7}, {}, r"`num_classes` .* to be 7, .* but got 10"),
    ],
)
@pytest.mark.parametrize("stage", ["fit", "test"])
def test_data_that_do_not_fit_are_named(options, its, said, stage):
    with pytest.raises(ValueError, match=said):
        getattr(trainer(max_steps=1), stage)(gan(**options), data(**its))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"n_dis": 0}, "`n_dis` to be at least 1 but got 0"),
        ({"ema_decay": 1.0}, r"`ema_decay` to be in \[0, 1\) but got 1.0"),
        ({"gradient_penalty": -1.0}, "`gradient_penalty` to be at least 0 but got -1.0"),
        ({"r1": -1.0}, "`r1` to be at least 0 but got -1.0"),
        ({"eval_seed": -1}, "`eval_seed` to be at least 0 but got -1"),
        ({"latent_distribution": "cauchy"}, "`latent_distribution` .* but got 'cauchy'"),
        ({"loss": "hing"}, "`loss` .* but got 'hing'"),
        ({"network": "vit"}, "`network` .* but got 'vit'"),
        ({"image_size": 40}, "`image_size` .* but got 40"),
        ({"control": "sn"}, "`control` .* but got 'sn'"),
        ({"generator_norm": "layer"}, "'layer'"),
    ],
)
def test_arguments_outside_their_range_are_named(options, said):
    with pytest.raises(ValueError, match=said):
        gan(**options)


# -- other ways to run -------------------------------------------------------------------------------------------------


def test_bf16_mixed_keeps_the_factors_and_the_weight_in_float32():
    module, dtypes = gan(r1=0.1, lr=3e-3), set()

    class Look(Callback):
        def on_train_batch_end(self, trainer, pl_module, *args):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                dtypes.update(layer.weight.dtype for layer in controlled_layers(pl_module.discriminator).values())

    spectra = Spectra()
    fit(module, 10, precision="bf16-mixed", callbacks=[Look(), spectra])
    assert dtypes == {torch.float32}
    assert {parameter.dtype for parameter in module.parameters()} == {torch.float32}
    assert max(spectra.apart) < 0.02  # as in float32; a rebuild in bfloat16 alone would cost 3e-3 a value
    assert module.sample(2).dtype == torch.float32


@pytest.mark.parametrize("options", [{}, {"gradient_penalty": 1.0, "r1": 1.0}], ids=["plain", "penalties"])
def test_compiled_training_is_the_same(options, monkeypatch):
    # No code generator, which takes minutes: aot_eager traces and differentiates the same graphs.
    real = nn.Module.compile
    compiled = []

    def aot_eager(self):
        compiled.append(type(self).__name__)
        real(self, backend="aot_eager")

    monkeypatch.setattr(nn.Module, "compile", aot_eager)
    eager, traced = gan(**options), gan(compile=True, **options)
    fit(eager, 2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own, about its tracing
        fit(traced, 2)
    torch._dynamo.reset()
    # Compiled code has no second derivatives.
    assert compiled == (["CNNGenerator"] if options else ["CNNDiscriminator", "CNNGenerator"])
    ours, theirs = weights(eager), weights(traced)
    assert ours.keys() == theirs.keys()
    for name in ours:
        # The same float32 sums in another order; Adam-like steps of 1e-3 may turn where a gradient is rounding alone.
        torch.testing.assert_close(ours[name].float(), theirs[name].float(), rtol=1e-3, atol=2.5e-3)
