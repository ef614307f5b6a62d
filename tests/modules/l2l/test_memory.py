"""Attacks that go on where the last one ended: against plain loops, over restarts and ranks, with augmentation."""

import copy
from functools import partial
from itertools import count, pairwise
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F
from torch.utils.data import DataLoader, IterableDataset

from lightning_rectify._lightning import seed_everything
from lightning_rectify.attacks.gradient import fgsm, pgd
from lightning_rectify.cli import RectifyCLI
from lightning_rectify.data.images import ImageData
from lightning_rectify.modules import ImageClassifier
from lightning_rectify.modules.l2l import L2LDefense
from lightning_rectify.modules.l2l.memory import AttackMemory
from tests.helpers.training import differences, largest_difference, snapshot, trainer, weights

CONFIG = Path(__file__).parents[3] / "configs" / "l2l.yaml"
EPSILON = 0.1
SGD = partial(torch.optim.SGD, lr=0.1, momentum=0.9)
JOB = "tests.modules.l2l.test_memory.job"
LEARNED, SIGNS = {"attack": "l2l"}, {"attack": "fgsm"}


def make(seed=0, **kwargs):
    seed_everything(seed, verbose=False)
    small = {"classifier_args": {"width": 4, "norm": "group"}, "epsilon": EPSILON, "val_attack_steps": 0}
    if kwargs.get("attack") == "l2l":
        small |= {"attacker_args": {"width": 4, "norm": "group"}, "attacker_optimizer": SGD}
    return L2LDefense(**{**small, "memory": True, "classifier_optimizer": SGD, **kwargs})


def digits(**kwargs):
    return ImageData(**{"normalization": "unit", "train_size": 96, "batch_size": 16, "with_index": True, **kwargs})


def fit(module, data=None, epochs=3, ckpt_path=None, **options):
    training = trainer(**{"max_epochs": epochs, "limit_val_batches": 0, **options})
    training.fit(module, digits() if data is None else data, ckpt_path=ckpt_path)
    return training


def epochs_of(data, epochs):
    """The batches of some epochs, as training sees them."""
    data.setup("fit")
    loader = data.train_dataloader()
    for epoch in range(epochs):
        loader.sampler.set_epoch(epoch)
        yield from loader


# -- training ----------------------------------------------------------------------------------------------------------


def test_training_is_the_plain_loop():
    """FGSM steps of half of epsilon that add up over three epochs; offsets are whole numbers of epsilon / 120."""
    module = make(**SIGNS)
    twin = copy.deepcopy(module).double().classifier
    optimizer, past = SGD(twin.parameters()), torch.zeros(96, 1, 8, 8, dtype=torch.float64)
    for x, y, index in epochs_of(digits(), 3):
        x = x.double()
        leaf = (x + past[index] * EPSILON / 120).clamp(0, 1).requires_grad_()
        (gradient,) = torch.autograd.grad(F.cross_entropy(twin.eval()(leaf), y), leaf)
        moved = leaf.detach() + EPSILON / 2 * gradient.sign()
        attacked = torch.minimum(torch.maximum(moved, x - EPSILON), x + EPSILON).clamp(0, 1)
        past[index] = ((attacked - x) / EPSILON * 120).round()
        optimizer.zero_grad()
        F.cross_entropy(twin.train()(attacked), y).backward()
        optimizer.step()
    fit(module, precision="64-true")
    # 1e-9: float64 in another order; epsilon is rounded towards the image.
    assert largest_difference(weights(module.classifier), weights(twin)) < 1e-9
    assert torch.equal(module.attack_memory.offsets, past.to(torch.int8))
    assert past.abs().max() == 120
    assert (past.abs() > 60).any()  # more than one step


@pytest.mark.parametrize("attack", [LEARNED, {**LEARNED, "order": "alternate"}, {"attack": "pgd", "train_steps": 2}])
def test_each_attack_goes_on_where_the_last_one_ended(attack):
    module = make(**attack)
    images, labels, index = next(epochs_of(digits(), 1))
    batch = images, labels, index
    lose = module.joint_loss if module.joint else module.classifier_loss
    lose(batch)
    first = module.attack_memory.offsets[index].clone()
    lose(batch)
    second = module.attack_memory.offsets[index]
    assert first.abs().max() > 0
    assert not torch.equal(first, second)
    start = images + first * (EPSILON / 120)
    if module.learned:
        expected = module.training_attack.learned(
            module.attacker.eval(), module.classifier, images, labels, None, start=start
        ).images
        module.attacker.train()
        module.attacker_loss(batch)  # neither keeps nor logs
    else:
        options = {"steps": 2, "step_size": EPSILON / 2, "start": start}
        expected = pgd(module.classifier, images, labels, EPSILON, **options)
    # Half a step of rounding, and float32's.
    assert ((expected - images) * (120 / EPSILON) - second).abs().max() < 0.501
    assert torch.equal(module.attack_memory.offsets[index], second)
    others = [i for i in range(len(module.attack_memory.offsets)) if i not in index.tolist()]
    assert not module.attack_memory.offsets[others].any()
    assert len(others) > 0


def test_steps_that_add_up_attack_better():
    """Steps of a quarter of epsilon against weights that stay: the loss rises until the ball ends, then not much."""
    module = make(**SIGNS, step_size=EPSILON / 4)
    batch = next(epochs_of(digits(), 1))
    losses = [module.classifier_loss(batch).item() for _ in range(6)]
    rises = [after - before for before, after in pairwise(losses)]
    assert min(rises[:3]) > 0.5 * rises[0] > 0
    assert max(map(abs, rises[3:])) < 0.5 * rises[0]


def test_measuring_knows_no_memory():
    module = make(**SIGNS, step_size=0.03)
    fit(module)
    data = digits()
    data.setup("fit")
    images, labels = next(iter(data.val_dataloader()))
    assert torch.equal(module.attack(images, labels), fgsm(module.classifier, images, labels, EPSILON))
    before = module.attack_memory.offsets.clone()
    trainer().validate(module, data, verbose=False)
    assert torch.equal(module.attack_memory.offsets, before)


# -- nothing is lost ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("attack", [LEARNED, SIGNS], ids=["l2l", "fgsm"])
def test_a_resumed_run_is_bit_equal(attack, tmp_path):
    whole = snapshot(fit(make(**attack)))
    stopped = fit(make(**attack), epochs=-1, max_steps=9)  # in the middle of the second epoch
    stopped.save_checkpoint(tmp_path / "stopped.ckpt")
    resumed = snapshot(fit(make(seed=5, **attack), epochs=-1, max_steps=18, ckpt_path=tmp_path / "stopped.ckpt"))
    assert whole["attack_memory"].any()
    whole.pop("epoch"), resumed.pop("epoch")  # an epoch more for a run that max_steps ended
    assert differences(whole, resumed) == []
    loaded = L2LDefense.load_from_checkpoint(tmp_path / "stopped.ckpt")
    assert loaded.attack_memory.offsets.shape == (96, 1, 8, 8)


def test_a_checkpoint_of_weights_alone_is_small(tmp_path):
    training = fit(make(**SIGNS))
    training.save_checkpoint(tmp_path / "weights.ckpt", weights_only=True)
    assert "attack_memory" not in torch.load(tmp_path / "weights.ckpt", weights_only=True)
    assert not L2LDefense.load_from_checkpoint(tmp_path / "weights.ckpt").attack_memory.offsets.any()


def test_a_second_fit_goes_on():
    module = make(**SIGNS, step_size=EPSILON / 120)  # never more than a step a fit
    for fits in (1, 2, 3):
        fit(module, epochs=1)
        assert module.attack_memory.offsets.abs().max() == fits


def job(attack, ranks, stop=None, save_as=None, ckpt_path=None):
    """Train on each process with its share of a batch."""
    module = make(**attack)
    length = {"epochs": 3} if stop is None else {"epochs": -1, "max_steps": stop}
    options = {"devices": ranks, "strategy": "ddp" if ranks > 1 else "auto"}
    training = fit(module, digits(batch_size=16 // ranks), **length, **options, ckpt_path=ckpt_path)
    if save_as is not None:
        training.save_checkpoint(save_as)
    return {"weights": weights(module), "memory": module.attack_memory.offsets.clone()}


@pytest.mark.ddp
@pytest.mark.parametrize("attack", [LEARNED, SIGNS], ids=["l2l", "fgsm"])
def test_two_processes_remember_what_one_does(pool, attack, tmp_path):
    """Images change ranks from epoch to epoch; also a checkpoint in the middle of one knows both ranks' attacks."""
    one, two = job(attack, ranks=1), pool.run(JOB, attack=attack, ranks=2)
    assert differences(two[0], two[1]) == []
    # Sums in another order, and a pixel whose gradient is almost 0 may go the other way.
    assert largest_difference(two[0]["weights"], one["weights"]) < 1e-3
    assert (two[0]["memory"] != one["memory"]).double().mean() < 0.01
    path = str(tmp_path / "stopped.ckpt")
    pool.run(JOB, attack=attack, ranks=2, stop=9, save_as=path)
    assert (torch.load(path, weights_only=True)["attack_memory"].flatten(1) != 0).any(1).all()
    resumed = pool.run(JOB, attack=attack, ranks=2, stop=18, ckpt_path=path)
    assert differences(resumed[0], two[0]) == []


# -- augmentation ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pad", [1, 2])
def test_an_offset_belongs_to_a_pixel_of_the_image(pad):
    """A loop over pixels, for crops out of a frame and mirror images."""
    generator = torch.Generator().manual_seed(3)
    images = torch.rand(12, 2, 5, 4, generator=generator)
    offsets = torch.randint(-120, 121, (20, 2, 5, 4), generator=generator).to(torch.int8)
    places = torch.stack(
        [
            torch.randperm(20, generator=generator)[:12],
            *torch.randint(-pad, pad + 1, (2, 12), generator=generator),
            torch.randint(0, 2, (12,), generator=generator),
        ],
        dim=1,
    )
    memory = AttackMemory(0.12)
    memory.load(offsets)
    start, points = memory.start(images, places), images + 0.1 * torch.rand(images.shape, generator=generator)
    memory.keep(points, images, places)
    expected, seen = offsets.clone(), torch.zeros(20, 5, 4, dtype=torch.bool)
    for b, (index, top, left, mirror) in enumerate(places.tolist()):
        for row in range(5):
            for column in range(4):
                y, x = row + top, (3 - column if mirror else column) + left
                inside = 0 <= y < 5 and 0 <= x < 4
                was = offsets[index, :, y, x] * 0.001 if inside else torch.zeros(2)
                # float32
                assert (start[b, :, row, column] - images[b, :, row, column] - was).abs().max() < 1e-6
                if inside:
                    moved = points[b, :, row, column] - images[b, :, row, column]
                    expected[index, :, y, x], seen[index, y, x] = (moved * 1000).round().to(torch.int8), True
    assert (memory.offsets.int() - expected.int()).abs().max() <= 1  # a half may be rounded either way
    hidden = ~seen.unsqueeze(1).expand(offsets.shape)
    assert torch.equal(memory.offsets[hidden], offsets[hidden])
    assert seen.any()
    assert not seen[places[:, 0]].all()


@pytest.mark.parametrize("flip", [False, True])
def test_places_say_where_augmentation_put_the_image(flip):
    """Cut by them out of the whole images, with a frame around, the batches come out again."""
    data = digits(augment=True)
    data.source = copy.copy(data.source)
    object.__setattr__(data.source, "flip", flip)
    batches = list(epochs_of(data, 2))
    whole = F.pad(data.training_images()[0], [1] * 4)
    for images, _, places in batches:
        assert places.shape == (16, 4)
        for image, (index, top, left, mirror) in zip(images, places.tolist(), strict=True):
            cut = whole[index, :, top + 1 : top + 9, left + 1 : left + 9]
            assert torch.equal(image, cut.flip(-1) if mirror else cut)
    drawn = torch.cat([places for *_, places in batches])
    assert drawn[:, 1:3].unique().tolist() == [-1, 0, 1]
    assert drawn[:, 3].unique().tolist() == ([0, 1] if flip else [0])


def test_augmented_training_remembers():
    module = make(**SIGNS)
    fit(module, digits(augment=True))
    assert (module.attack_memory.offsets != 0).double().mean() > 0.5


def test_yaml_reaches_it(tmp_path):
    options = [
        f"--config={CONFIG}", "--model.init_args.attack=fgsm", "--model.init_args.memory=true",
        "--model.init_args.classifier_args.width=4", "--data.init_args.with_index=true",
        "--data.init_args.train_size=96", "--trainer.max_epochs=2", "--trainer.accelerator=cpu",
        f"--trainer.logger.init_args.save_dir={tmp_path}", "--test_after_fit=false",
    ]  # fmt: skip
    cli = RectifyCLI(["fit", *options])
    assert cli.model.attack_memory.offsets.shape == (96, 1, 8, 8)
    assert cli.model.attack_memory.offsets.any()
    (last,) = tmp_path.rglob("last_epoch.ckpt")
    assert torch.equal(torch.load(last, weights_only=True)["attack_memory"], cli.model.attack_memory.offsets)


# -- what is refused ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"attack": "trades"}, r"`memory` to be False for `attack` 'trades'.*'l2l', 'fgsm', 'pgd'"),
        ({"attack": "none"}, r"`memory` to be False for `attack` 'none'"),
        ({"attack": "fgsm", "random_start": 0.5}, r"`random_start` to be None or 0 with `memory`.*0.5"),
        ({"attack": "fgsm", "memory": 1}, r"`memory`"),
    ],
)
def test_arguments_that_do_not_go_with_a_memory(arguments, words):
    with pytest.raises(ValueError, match=words):
        make(**arguments)


def test_data_that_do_not_go_with_a_memory():
    with pytest.raises(ValueError, match=r"`with_index` of the datamodule ImageData to be True with `memory`"):
        fit(make(**SIGNS), digits(with_index=False))
    image = torch.zeros(1, 8, 8)
    bad = {
        r"third part.*shape \(2,\) or \(2, 4\), but got NoneType": [(image, 0)] * 2,
        r"third part.*but got \(2,\) of torch.float64": [(image, 0, 0.5)] * 2,
        r"0 to N - 1, but got -1 to 3": [(image, 0, -1), (image, 0, 3)],
        r"0 to N - 1, but got 3 to 8000000000000": [(image, 0, 3), (image, 0, 8 * 10**12)],
    }
    for words, samples in bad.items():
        with pytest.raises(ValueError, match=words):
            fit(make(**SIGNS), DataLoader(samples, batch_size=2))
    module = make(**SIGNS)
    fit(module)
    with pytest.raises(ValueError, match=r"shape \(1, 8, 8\).*but got \(1, 9, 9\)"):
        fit(module, DataLoader([(torch.zeros(1, 9, 9), 0, 0)] * 2, batch_size=2))


def test_data_need_no_length():
    module = make(**SIGNS)
    fit(module, DataLoader(Endless(), batch_size=4), epochs=-1, max_steps=3)
    assert module.attack_memory.offsets.flatten(1).any(1).tolist() == [False, False, True, True, True, True, True]


class Endless(IterableDataset):
    """Images 2 to 5, then always 3 to 6."""

    def __iter__(self):
        for i in count(0):
            step, place = divmod(i, 4)
            yield torch.full((1, 8, 8), 0.5), i % 10, (2, 3, 4, 5)[place] + (step > 0)


def test_indices_do_no_harm_to_who_needs_none():
    for module in (make(attack="fgsm", memory=False), ImageClassifier(network="small_cnn")):
        assert fit(module, epochs=1).global_step == 6


def test_files_that_are_augmented_have_no_places():
    with pytest.raises(ValueError, match=r"`augment` to be False with `with_index` for image_folder"):
        ImageData("image_folder", root="somewhere", augment=True, with_index=True)
