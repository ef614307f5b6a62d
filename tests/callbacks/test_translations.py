"""Translations as files in the order of the input, and samples of them as training goes on."""

import csv
import os
from pathlib import Path

import pytest
import torch
from matplotlib.figure import Figure
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from torch.utils.data import DataLoader, Dataset

from lightning_rectify._lightning import LightningModule, TensorBoardLogger
from lightning_rectify.callbacks.translations import TranslationSamples, TranslationWriter
from lightning_rectify.text import BOS, EOS, TranslationBatch, Vocabulary, pad
from tests.helpers.pool import POOL
from tests.helpers.training import CSVLogger, differences, snapshot, trainer

WORDS = ["one", "two", "three", "four", "five", "six", "seven"]
SENTENCES = [f"{WORDS[i % 7]} {WORDS[i // 3]} {WORDS[i % 5]}" for i in range(11)]


def reverse(text):
    return " ".join(reversed(text.split()))


class Sentences(Dataset):
    """Pairs of a sentence and its words in reverse; a batch may hold them in any order."""

    def __init__(self, sentences=SENTENCES):
        self.sentences = sentences
        self.vocabulary = Vocabulary.train(SENTENCES * 2, size=60, kind="char")

    def __len__(self):
        return len(self.sentences)

    def __getitem__(self, place):
        return place

    def batch(self, places, target=True, references=True):
        encode = self.vocabulary.encode
        lines = [self.sentences[place] for place in places]
        answers = [reverse(line) for line in lines]
        return TranslationBatch(
            pad([[*encode(line), EOS] for line in lines]),
            pad([[BOS, *encode(line), EOS] for line in answers]) if target else None,
            torch.tensor(places),
            answers if references else None,
        )

    def predicting(self, places):
        return self.batch(places, target=False, references=False)


def loader(order=(4, 0, 9, 2, 7, 1, 10, 3, 8, 6, 5), size=3, collate="batch", sentences=SENTENCES):
    data = Sentences(sentences)
    return DataLoader(data, batch_size=size, sampler=list(order), collate_fn=getattr(data, collate))


class Reverser(LightningModule):
    """It translates by turning the words around; it trains a little network with dropout on the side."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 1))
        self.vocabularies = (Sentences().vocabulary,) * 2
        self.asked, self.kept = [], None

    def translate(self, texts, beam_size=5):
        torch.rand(3)  # against the protocol
        self.kept = torch.ones(1) if self.kept is None else self.kept  # made when first needed, as positions are
        self.asked.append((list(texts), beam_size, self.training, torch.is_grad_enabled(), self.trainer.global_step))
        return [reverse(text) for text in texts]

    def plot_attention(self, source, target=None):
        self.plotted = (source, target)
        figure = Figure(figsize=(2, 1))
        figure.add_subplot().imshow(torch.rand(len(target.split()), len(source.split())).numpy())
        return figure

    def predict_step(self, batch, batch_idx):
        self.row = batch.index
        return [reverse(self.vocabularies[0].decode(row)) for row in batch.source.tolist()]

    def training_step(self, batch, batch_idx):
        y = self.net(batch.source[:, :3].float())
        return (y * (1 if self.kept is None else self.kept) - 1).pow(2).mean()

    def validation_step(self, batch, batch_idx):
        pass

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=0.01)


def lines(path):
    return Path(path).read_text(encoding="utf-8").split("\n")


# -- whole files -------------------------------------------------------------------------------------------------------


def predict(*writers, module=None, loaders=None, **options):
    module = Reverser() if module is None else module
    loaders = loader(collate="predicting") if loaders is None else loaders
    return trainer(callbacks=list(writers), **options).predict(module, loaders, return_predictions=False)


def test_lines_are_in_the_order_of_the_input():
    writer = TranslationWriter("out/test.hyp")
    predict(writer)
    expected = [reverse(sentence) for sentence in SENTENCES]
    assert lines("out/test.hyp") == [*expected, ""]
    assert len(set(expected)) == len(expected)
    again = loader(order=range(3), collate="predicting", sentences=SENTENCES[:3])
    predict(writer, loaders=again)  # a second call begins anew, and writes over the first
    assert lines("out/test.hyp") == [*expected[:3], ""]
    assert os.listdir("out") == ["test.hyp"]


def test_standard_output(capfd):
    predict(TranslationWriter())
    assert capfd.readouterr().out == "".join(f"{reverse(sentence)}\n" for sentence in SENTENCES)


def test_line_ends_inside_a_translation_become_spaces():
    class Broken(Reverser):
        def predict_step(self, batch, batch_idx):
            return ["a\nb", "c\r\nd", "e\u2028f\x85g\vh é"][: len(batch.index)]

    predict(TranslationWriter("out"), module=Broken(), loaders=loader(range(3), sentences=SENTENCES[:3]))
    assert Path("out").read_bytes() == "a b\nc d\ne f g h é\n".encode()


@pytest.mark.parametrize(
    ("order", "message"),
    [
        ((4, 0, 9, 2, 7, 1, 10, 3, 8), r"each of the 11 sentences .* got 2 missing \(5, 6\)"),
        ((0, 1, 2, 3, 4, 5, 6, 7), r"3 missing \(8, 9, 10\)"),  # the data set says how many there are
        ((*range(11), 3, 3, 0), r"got 2 repeated \(0, 3\)"),
        ((0, 0, *range(2, 11)), r"1 missing \(1\) and 1 repeated \(0\)"),
    ],
)
def test_each_line_exactly_once(order, message):
    Path("out").write_text("before")
    with pytest.raises(ValueError, match=message):
        predict(TranslationWriter("out"), loaders=loader(order, collate="predicting"))
    assert lines("out") == ["before"]


def test_many_missing_lines_are_counted():
    sentences = SENTENCES * 4
    with pytest.raises(ValueError, match=r"43 missing \(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, \.\.\.\)"):
        predict(TranslationWriter("out"), loaders=loader([43], collate="predicting", sentences=sentences))


def test_a_dry_run_writes_nothing(capfd):
    predict(TranslationWriter("out"), TranslationWriter(), fast_dev_run=1)
    assert not Path("out").exists()
    assert SENTENCES[4].split()[0] not in capfd.readouterr().out


def test_predictions_that_are_no_texts_are_refused():
    class Ids(Reverser):
        def predict_step(self, batch, batch_idx):
            return batch.source

    class Short(Reverser):
        def predict_step(self, batch, batch_idx):
            return super().predict_step(batch, batch_idx)[1:]

    with pytest.raises(ValueError, match="one for each of the 3 sentences of the batch, but got Tensor"):
        predict(TranslationWriter("out"), module=Ids())
    with pytest.raises(ValueError, match="but got 2 texts"):
        predict(TranslationWriter("out"), module=Short())

    class Two(Reverser):
        def predict_step(self, batch, batch_idx, dataloader_idx=0):
            return super().predict_step(batch, batch_idx)

    with pytest.raises(ValueError, match="to have one dataloader but got 2"):
        predict(TranslationWriter("out"), module=Two(), loaders=[loader(collate="predicting")] * 2)
    with pytest.raises(ValueError, match="`output` to be a path or '-'"):
        TranslationWriter("")


def predict_on_rank(orders):
    """Each rank its own sentences; what came of it."""
    torch.manual_seed(0)
    options = {"devices": 2, "strategy": "ddp", "use_distributed_sampler": False}
    order = orders[torch.distributed.get_rank()]
    try:
        predict(TranslationWriter("both"), loaders=loader(order, size=2, collate="predicting"), **options)
    except (ValueError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    return "" if Path("both").exists() else "no file when prediction was over"


@pytest.mark.ddp
def test_two_processes():
    name = f"{__name__}.predict_on_rank"
    assert POOL.run(name, orders=[[8, 0, 3, 10, 5, 6], [4, 2, 9, 1, 7]]) == ["", ""]
    assert lines("both") == [*map(reverse, SENTENCES), ""]
    first, second = POOL.run(name, orders=[[8, 0, 3, 10, 5, 6], [4, 2, 9, 1, 0]])
    assert first.startswith("ValueError: Expected each of the 11 sentences")
    assert "1 missing (7) and 1 repeated (0)" in first
    assert second.startswith("RuntimeError: The first process could not write the translations: Expected each")


# -- samples as training goes on ---------------------------------------------------------------------------------------


def fit(*callbacks, module=None, epochs=2, logger=None, validation=None, ckpt_path=None, **options):
    torch.manual_seed(7)  # dropout draws from it
    module = Reverser() if module is None else module
    logger = TensorBoardLogger("logs", version=0, default_hp_metric=False) if logger is None else logger
    run = trainer(callbacks=list(callbacks), logger=logger, max_epochs=epochs, **options)
    validation = loader(size=4) if validation is None else validation
    run.fit(module, loader(size=4), validation, ckpt_path=ckpt_path)
    return run


def events(run):
    return EventAccumulator(run.loggers[0].log_dir, size_guidance={"tensors": 0, "images": 0}).Reload()


def table(folder):
    with Path(folder, "translations.csv").open(newline="", encoding="utf-8") as file:
        return list(csv.reader(file))


def rows(step, count):
    return [[str(step), line, reverse(line), reverse(line)] for line in SENTENCES[:count]]


def test_the_first_sentences_at_the_end_of_each_validation():
    module = Reverser()
    run = fit(TranslationSamples(count=3), module=module)
    folder = Path(run.loggers[0].log_dir)
    assert table(folder) == [["step", "source", "translation", "reference"], *rows(3, 3), *rows(6, 3)]
    assert module.asked == [(SENTENCES[:3], 1, False, False, step) for step in (3, 6)]
    found = events(run)
    texts = found.Tensors("translations/text_summary")
    assert [event.step for event in texts] == [3, 6]
    (written,) = texts[1].tensor_proto.string_val
    assert written.decode().splitlines() == [
        "| source | translation | reference |",
        "| --- | --- | --- |",
        *(f"| {line} | {reverse(line)} | {reverse(line)} |" for line in SENTENCES[:3]),
    ]
    images = found.Images("attention")
    assert [(event.step, event.width, event.height) for event in images] == [(3, 200, 100), (6, 200, 100)]
    assert module.plotted == (SENTENCES[0], reverse(SENTENCES[0]))


def test_options():
    module = Reverser()
    run = fit(TranslationSamples(count=20, every_n_epochs=2, beam_size=4), module=module, epochs=5)
    assert [(len(texts), beam, step) for texts, beam, *_, step in module.asked] == [(11, 4, 6), (11, 4, 12)]
    assert table(run.loggers[0].log_dir)[1:] == [*rows(6, 11), *rows(12, 11)]


def test_the_first_of_what_there_is():
    """By place, whatever the order in which batches come."""
    module = Reverser()
    fit(TranslationSamples(count=3), module=module, epochs=1, validation=loader([9, 8, 3, 7, 4], size=2))
    assert module.asked[0][0] == [SENTENCES[place] for place in (3, 4, 7)]


def test_several_validations_in_an_epoch_and_validate_alone():
    module = Reverser()
    fit(TranslationSamples(count=2), module=module, epochs=1, val_check_interval=1, logger=CSVLogger("logs", version=0))
    assert [step for *_, step in module.asked] == [1, 2, 3]
    assert table("logs/lightning_logs/version_0")[1:] == [*rows(1, 2), *rows(2, 2), *rows(3, 2)]
    run = trainer(callbacks=[TranslationSamples(count=2, every_n_epochs=9)])
    run.validate(module, loader(), verbose=False)
    assert table(".")[1:] == rows(0, 2)


def test_training_is_bit_equal_with_and_without():
    """Weights, moments, batch normalization's averages, random state; also where the module keeps what it made."""
    a = snapshot(fit(TranslationSamples()))
    state = torch.get_rng_state()
    b = snapshot(fit())
    assert differences(a, b) == []
    assert torch.equal(torch.get_rng_state(), state)


def test_what_a_module_keeps_can_train_afterwards():
    """Also after Trainer.validate, which makes tensors that autograd refuses."""
    module = Reverser()
    trainer(callbacks=[TranslationSamples()]).validate(module, loader(), verbose=False)
    assert module.kept is not None
    assert fit(module=module).global_step == 6


def test_evaluation_mode_where_validation_is_not():
    """As in an estimate of uncertainty by dropout."""

    class Noisy(Reverser):
        def on_validation_model_eval(self):
            self.train()

        def on_validation_end(self):  # after the callbacks' own
            self.modes = [part.training for part in self.modules()]

    module = Noisy()
    fit(TranslationSamples(), module=module)
    assert [(training, grad) for *_, training, grad, _ in module.asked] == [(False, False)] * 2
    assert all(module.modes)


def test_each_submodule_keeps_its_mode():
    class Frozen(Reverser):
        def on_train_epoch_start(self):
            self.net[1].eval()

        def on_train_epoch_end(self):
            self.modes = {name: part.training for name, part in self.named_modules()}

    module = Frozen()
    fit(TranslationSamples(), module=module)
    assert [name for name, training in module.modes.items() if not training] == ["net.1"]


def test_no_samples_of_the_sanity_check_or_a_dry_run():
    module = Reverser()
    run = fit(TranslationSamples(count=2), module=module, num_sanity_val_steps=1, limit_val_batches=2, epochs=1)
    # The sanity check saw sentences 4, 0, 9 and 2; the validation 7, 1, 10 and 3 as well.
    assert table(run.loggers[0].log_dir)[1:] == rows(3, 2)
    module = Reverser()
    fit(TranslationSamples(count=2), module=module, logger=False, fast_dev_run=1)
    assert len(module.asked) == 1
    assert not Path("translations.csv").exists()


def test_without_raw_references_targets_are_decoded():
    data = Sentences()
    validation = DataLoader(data, batch_size=4, collate_fn=lambda places: data.batch(places, references=False))
    run = fit(TranslationSamples(count=2), epochs=1, validation=validation)
    assert table(run.loggers[0].log_dir)[1:] == rows(3, 2)


def test_a_resumed_run_drops_what_was_behind_its_checkpoint(tmp_path):
    run = fit(TranslationSamples(count=2), epochs=2)
    run.save_checkpoint(tmp_path / "two.ckpt")
    fit(TranslationSamples(count=2), epochs=4, ckpt_path=tmp_path / "two.ckpt")
    expected = [*rows(3, 2), *rows(6, 2), *rows(9, 2), *rows(12, 2)]
    assert table(run.loggers[0].log_dir)[1:] == expected
    fit(TranslationSamples(count=2), epochs=3, ckpt_path=tmp_path / "two.ckpt")
    assert table(run.loggers[0].log_dir)[1:] == expected[:6]


def test_signs_of_markdown_are_shown_as_they_are():
    class Signs(Reverser):
        def translate(self, texts, beam_size=5):
            return ["a | b", "<b>*c*\n_d_"]

    run = fit(TranslationSamples(count=2), module=Signs(), epochs=1)
    (written,) = events(run).Tensors("translations/text_summary")[0].tensor_proto.string_val
    cells = [line.split(" | ")[1] for line in written.decode().splitlines()[2:]]
    assert cells == [r"a \| b", r"&lt;b&gt;\*c\* \_d\_"]
    assert [row[2] for row in table(run.loggers[0].log_dir)[1:]] == ["a | b", "<b>*c*\n_d_"]


def test_nothing_translated_yet_has_no_attention():
    class Silent(Reverser):
        def translate(self, texts, beam_size=5):
            return [""] * len(texts)

    run = fit(TranslationSamples(count=2), module=Silent(), epochs=1)
    assert "attention" not in events(run).Tags()["images"]
    assert [row[2] for row in table(run.loggers[0].log_dir)[1:]] == ["", ""]


@pytest.mark.parametrize("name", ["count", "every_n_epochs", "beam_size"])
def test_wrong_arguments(name):
    with pytest.raises(ValueError, match=f"`{name}` to be at least 1 but got 0"):
        TranslationSamples(**{name: 0})


def test_modules_and_batches_that_do_not_fit():
    class Plain(LightningModule):
        training_step = validation_step = Reverser.training_step
        configure_optimizers = Reverser.configure_optimizers

    with pytest.raises(ValueError, match="got Plain without vocabularies and translate"):
        fit(TranslationSamples(), module=Plain())
    with pytest.raises(ValueError, match="to be `TranslationBatch` but got Tensor"):
        fit(TranslationSamples(), validation=DataLoader(torch.ones(4, 3)))
