"""Clause 9: wrong arguments say what is wrong; a loss that is not finite stops training and spoils nothing."""

from operator import attrgetter

import pytest
import torch

from lightning_rectify._lightning import Callback, ModelCheckpoint
from lightning_rectify.modules.base import NonFiniteLossError
from tests.contract.rows import ROWS
from tests.helpers.training import trainer, weights

BAD = [
    pytest.param(row, arguments, words, id=f"{row.stem}-{'-'.join(arguments)}-{i}")
    for row in ROWS
    for i, (arguments, words) in enumerate(row.bad_arguments)
]


@pytest.mark.parametrize(("each", "arguments", "words"), BAD)
def test_wrong_argument_is_named_with_what_was_expected_and_what_came(each, arguments, words):
    with pytest.raises(ValueError, match=f"(?s)Expected argument {words}"):
        each.module(**arguments)


class Poison(Callback):
    """Makes every number of one batch NaN, or infinite; of a batch of tokens, what the last network makes of it."""

    def __init__(self, row, at, value):
        self.row, self.at, self.value, self.hook = row, at, value, None

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step != self.at:
            return
        numbers = [part for part in batch if isinstance(part, torch.Tensor) and part.is_floating_point()]
        for part in numbers:
            part.fill_(self.value)
        if not numbers:
            network = attrgetter(self.row.networks[-1])(pl_module)
            self.hook = network.register_forward_hook(lambda _, __, output: output * self.value)

    def on_exception(self, trainer, pl_module, exception):
        if self.hook is not None:
            self.hook.remove()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_loss_that_is_not_finite_stops_and_leaves_the_last_checkpoint_good(row, value, tmp_path):
    keep = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    fit = trainer(max_epochs=2, callbacks=[Poison(row, 8, value), keep], enable_checkpointing=True)
    module = row.make_module()
    with pytest.raises(NonFiniteLossError, match=rf"player '{row.players_loss}' is (nan|-?inf) at step 8\b"):
        fit.fit(module, row.make_data())
    assert all(torch.isfinite(value).all() for value in weights(module).values())
    last = max(tmp_path.glob("*.ckpt"), key=lambda path: int(path.stem.partition("=")[2]))
    assert last.name == "step=8.ckpt"
    loaded = row.module.load_from_checkpoint(last)
    assert all(torch.isfinite(value).all() for value in weights(loaded).values())

    again = trainer(max_epochs=2)  # without the poison it goes on from there
    again.fit(row.make_module(), row.make_data(), ckpt_path=last)
    assert again.global_step == 2 * row.batches
