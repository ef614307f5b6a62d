"""Translation data: numbers, files, vocabularies, loaders, resume, download."""

import gzip
import hashlib
import io
import os
import re
import threading
import time
from datetime import date
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from itertools import chain, islice
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from babel.dates import format_date
from num2words import num2words

from lightning_rectify._lightning import LightningModule, ModelCheckpoint
from lightning_rectify.data import aligned_texts, number_words
from lightning_rectify.data.aligned_texts import decode_lines, read_pairs
from lightning_rectify.data.number_words import Value, english, german, number_pairs, words
from lightning_rectify.data.translation import TranslationData
from lightning_rectify.text import BOS, EOS, PAD, Vocabulary
from tests.helpers.pool import POOL
from tests.helpers.training import trainer

# -- numbers -----------------------------------------------------------------------------------------------------------


def test_parts_share_no_value_and_no_sentence():
    parts = {"train": number_pairs("train", 6000, seed=3), "val": number_pairs("val", 500, seed=3)}
    parts["test"] = number_pairs("test", 1000)
    for language in ("de", "en"):
        sentences = {name: {pair[language] for pair in part} for name, part in parts.items()}
        assert [len(part) for part in sentences.values()] == [6000, 500, 1000]  # no value twice
        assert len(set.union(*sentences.values())) == 7500


def test_a_value_is_in_the_same_part_in_every_form_and_for_every_seed():
    """Else "am dritten März" would teach "der dritte März", and a second seed's training would hold the test."""
    keys = {}
    for part, seeds in (("train", range(4)), ("val", range(4)), ("test", [0])):
        for seed in seeds:
            for kind in range(3):
                drawn = islice(number_words._distinct(kind, part, seed), 2000)
                keys.setdefault(part, set()).update((value.kind, value.value) for value in drawn)
    assert not keys["train"] & keys["val"]
    assert not keys["train"] & keys["test"]
    assert not keys["val"] & keys["test"]


def test_seed_moves_training_and_validation_but_never_the_test():
    assert number_pairs("train", 50, 0) != number_pairs("train", 50, 1)
    assert number_pairs("val", 50, 0) != number_pairs("val", 50, 1)
    assert number_pairs("test", 50, 0) == number_pairs("test", 50, 1)
    assert number_pairs("train", 50, 1) == number_pairs("train", 80, 1)[:50]


def test_twenty_thousand_pairs_take_less_than_three_seconds():
    start = time.process_time()
    pairs = number_pairs("train", 20_000, seed=11)
    assert time.process_time() - start < 3
    words_of = {"dates": (" of ",), "amounts": ("euro", "pound", "dollar", "franc", "cent", "penny", "pence")}
    counts = {kind: sum(any(word in pair["en"] for word in some) for pair in pairs) for kind, some in words_of.items()}
    assert counts == {"dates": 6667, "amounts": 6666}  # a third each
    known = {pair["de"] for pair in pairs}
    assert sum(german(number) in known for number in range(100)) > 80  # of which 90 % may be drawn


def test_numbers_are_num2words_but_for_its_german_mistake():
    """It says "einhunderteinstausend"; inside a number it is "ein"."""
    for number in [*range(120), *range(0, 1_000_000, 3331), 101_000, 201_001, 999_999]:
        assert english(number) == num2words(number, lang="en")
        theirs = num2words(number, lang="de")
        assert german(number) == theirs.replace("einstausend", "eintausend")
    assert german(101_001) == "einhunderteintausendeins"


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ((0, 0, 0), ("null", "zero")),
        ((0, 322, 0), ("dreihundertzweiundzwanzig", "three hundred and twenty-two")),
        ((0, 1001, 0), ("eintausendeins", "one thousand and one")),
        ((2, 1705, 0), ("siebzehn Euro und fünf Cent", "seventeen euros and five cents")),
        ((2, 101, 0), ("ein Euro und ein Cent", "one euro and one cent")),
        ((2, 10100, 1), ("einhundertein Dollar", "one hundred and one dollars")),
        ((2, 1, 2), ("ein Penny", "one penny")),
        ((2, 2101, 2), ("einundzwanzig Pfund und ein Penny", "twenty-one pounds and one penny")),
        ((2, 299, 3), ("zwei Franken und neunundneunzig Rappen", "two francs and ninety-nine centimes")),
    ],
)
def test_words_of_numbers_and_amounts(value, expected):
    assert tuple(words(Value(*value)).values()) == expected


@pytest.mark.parametrize(
    ("day", "form", "expected"),
    [
        ((1980, 3, 3), 1, ("am dritten März neunzehnhundertachtzig", "on the third of March nineteen eighty")),
        ((2000, 1, 1), 0, ("der erste Januar zweitausend", "the first of January two thousand")),
        ((1905, 7, 30), 0, ("der dreißigste Juli neunzehnhundertfünf", "the thirtieth of July nineteen oh-five")),
        (
            (2024, 2, 29), 2,
            (
                "am Donnerstag, dem neunundzwanzigsten Februar zweitausendvierundzwanzig",
                "on Thursday, the twenty-ninth of February twenty twenty-four",
            ),
        ),
    ],
)  # fmt: skip
def test_words_of_dates(day, form, expected):
    assert tuple(words(Value(1, date(*day).toordinal(), form)).values()) == expected


def test_names_of_months_and_days_are_babels_own_for_the_date():
    for day in (date(1987, month, 2 * month) for month in range(1, 13)):
        said = words(Value(1, day.toordinal(), 2))
        for language, pattern in (("de", r"am (\w+), dem \w+ (\w+) \w+"), ("en", r"on (\w+), the [\w-]+ of (\w+) .*")):
            weekday, month = re.fullmatch(pattern, said[language]).groups()
            assert f"{weekday} {month}" == format_date(day, "EEEE MMMM", locale=language)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("dev", 1), "`part` to be 'train', 'val' or 'test' but got 'dev'"),
        (("val", 20_001), "`size`.*20000 for val.*got 20001"),
        (("train", -1), "`size`.*got -1"),
        (("train", 1, -1), "`seed`.*got -1"),
    ],
)
def test_wrong_arguments_of_numbers(arguments, message):
    with pytest.raises(ValueError, match=message):
        number_pairs(*arguments)


# -- files -------------------------------------------------------------------------------------------------------------

DE = ["Ein Hund läuft.", "Zwei Hunde laufen im Schnee.", "Eine Frau liest ein Buch.", "Der Mann schläft."]
EN = ["A dog runs.", "Two dogs are running in the snow.", "A woman reads a book.", "The man sleeps."]


def write(path, lines, end="\n", bom=b"", zipped=False):
    data = bom + "".join(line + end for line in lines).encode()
    Path(path).write_bytes(gzip.compress(data) if zipped else data)


@pytest.fixture
def corpus(tmp_path):
    """Twelve pairs for training, four each for validation and test, in a folder of its own."""
    root = tmp_path / "corpus"
    root.mkdir()
    for part, times in (("train", 3), ("val", 1), ("test", 1)):
        write(root / f"{part}.de", DE * times)
        write(root / f"{part}.en", EN * times)
    return root


def files(root, **options):
    names = {"train": "train", "val": "val", "test": "test"}
    return TranslationData("files", root=str(root), **{**names, "vocab_size": 60, **options})


def test_plain_and_zipped_files_with_any_line_ends_and_mark(tmp_path):
    write("a.de", DE)
    write("a.en", EN)
    write("b.de.gz", DE, zipped=True)
    write("b.en", EN, end="\r\n", bom=b"\xef\xbb\xbf")
    Path("c.de").write_bytes("\n".join(DE).encode())  # no end of the last line
    write("c.en.gz", EN, bom=b"\xef\xbb\xbf", zipped=True)
    rows = [f"{de}\t{en}" for de, en in zip(DE, EN, strict=True)]
    write("d.tsv", rows, end="\r\n")
    write("e.tsv.gz", rows, zipped=True)
    for name in ("a", "b", "c", "d.tsv", "e.tsv.gz", tmp_path / "a"):
        assert read_pairs(name, "de", "en") == (DE, EN)
    assert read_pairs("a", "en", "de") == (EN, DE)


def test_lines_end_at_line_feeds_only():
    odd = ["a\u2028b", "c\x0bd\x0ce", "f\x85g", "h\ri", "\x1cj"]
    assert decode_lines("\n".join(odd).encode(), "x") == odd
    assert len("\n".join(odd).splitlines()) > len(odd)  # what would misalign two files
    assert decode_lines(b"", "x") == []
    assert decode_lines(b"\n\n", "x") == ["", ""]


def refused(message, error=ValueError, name="x"):
    with pytest.raises(error, match=message):
        read_pairs(name, "de", "en")


def test_misaligned_files_are_refused_with_both_counts():
    write("x.de", DE)
    write("x.en", EN[:3])
    refused(r"x\.de and x\.en.*same number of lines but got 4 and 3")


@pytest.mark.parametrize("empty", ["", "  ", "\t", "\u3000"])
def test_empty_lines_are_refused_with_file_line_and_side(empty):
    write("x.de", DE)
    write("x.en", [*EN[:2], empty, EN[3]])
    refused(r"empty one on the target \(en\) side at x\.en:3\.")
    write("x.de", [empty, *DE[1:]])
    refused(r"empty one on the source \(de\) side at x\.de:1\.")
    write("x.tsv", [f"{DE[0]}\t{EN[0]}", f"\t{EN[1]}"])
    refused(r"source \(de\) side at x\.tsv:2\.", name="x.tsv")


def test_wrong_encodings_are_refused_with_file_line_and_byte():
    write("x.en", EN)
    for bom in (b"", b"\xef\xbb\xbf"):
        Path("x.de").write_bytes(bom + "Guten Tag.\nEin schöner Tag.\n".encode("latin-1"))
        refused(r"x\.de.*UTF-8.*0xf6.*x\.de:2:8\.")
    Path("x.de").write_bytes("\ufeff".encode() + b"ab\xff\n")
    refused(r"0xff.*x\.de:1:6\.")  # a place in the file, the mark's three bytes included
    Path("x.de").write_bytes("Tag\n".encode("utf-16"))
    refused(r"0xff.*x\.de:1:1\.")


def test_wrong_columns_broken_archives_empty_and_missing_files():
    write("x.tsv", ["a\tb", "a b", "c\td"])
    refused(r"two columns.*got 1 at x\.tsv:2\.", name="x.tsv")
    write("x.tsv", ["a\tb", "a\tb\tc"])
    refused(r"two columns.*got 3 at x\.tsv:2\.", name="x.tsv")
    write("x.en", EN)
    refused(r"x\.de or x\.de\.gz.*neither", FileNotFoundError)
    data = gzip.compress("".join(DE).encode())
    for broken in (b"plain text", data[:-5], data[:12] + b"\0\0\0\0" + data[16:]):
        Path("x.de.gz").write_bytes(broken)
        refused(r"x\.de\.gz.*gzip")
    write("y.de", [])
    write("y.en", [])
    refused(r"y\.de.*at least one line", name="y")


# -- parts and batches -------------------------------------------------------------------------------------------------


def numbers(**options):
    """Small enough to be quick: 600 training pairs, 50 for validation, 40 for the test."""
    sizes = {"train_size": 600, "val_size": 50, "test_size": 40, "vocab_size": 150}
    return TranslationData(**{**sizes, **options})


def stages(data):
    data.prepare_data()
    data.setup("fit")
    data.setup("test")
    return data


def texts(vocabulary, ids):
    return [vocabulary.decode(row) for row in ids]


@pytest.mark.parametrize(("source", "target"), [("de", "en"), ("en", "de")])
def test_batches_hold_the_pairs(source, target):
    data = stages(numbers(source=source, target=target, eval_batch_size=16))
    sources, targets = data.vocabularies
    assert sources is targets
    assert len(sources) == data.vocab_size == 150
    for part, loader in (("train", data.train_dataloader()), ("val", data.val_dataloader())):
        pairs = number_pairs(part, data.sizes[part])
        seen = []
        for batch in loader:
            expected = [pairs[i] for i in batch.index.tolist()]
            assert texts(sources, batch.source) == [pair[source] for pair in expected]
            assert texts(targets, batch.target) == [pair[target] for pair in expected]
            if part == "train":
                assert batch.references is None
                assert max(batch.source.numel(), batch.target[:, 1:].numel()) <= 2000
            else:
                assert batch.references == [pair[target] for pair in expected]
            assert (batch.source == EOS).sum(dim=1).eq(1).all()
            assert batch.target[:, 0].eq(BOS).all()
            for ids in (batch.source, batch.target):  # EOS, then nothing but padding
                assert torch.equal((ids == PAD), ((ids == EOS).cumsum(1) - (ids == EOS).long()).bool())
            seen += batch.index.tolist()
        assert sorted(seen) == list(range(len(pairs)))
    assert [len(batch.index) for batch in data.test_dataloader()] == [16, 16, 8]


def test_default_sizes():
    data = TranslationData()
    assert (data.batch_tokens, data.batch_size) == (2000, None)
    assert TranslationData(batch_size=8).batch_tokens is None
    data.setup("test")
    batch = next(iter(data.test_dataloader()))
    assert len(data._texts["test"].sources) == 1000
    assert len(data.vocabularies[0]) == 400
    assert len(batch.index) == 64
    data.setup("fit")
    assert [len(data._texts[part].sources) for part in ("train", "val")] == [20_000, 500]


def test_evaluation_is_sorted_by_length():
    data = stages(numbers(eval_batch_size=7))
    lengths = [(row != PAD).sum().item() for batch in data.val_dataloader() for row in batch.source]
    assert lengths == sorted(lengths)
    assert len(lengths) == 50


def test_batches_of_sentences():
    data = stages(numbers(batch_size=64))
    sizes = [len(batch.index) for batch in data.train_dataloader()]
    assert sizes == [64] * 9  # 24 are left over


def test_separate_vocabularies(corpus):
    data = stages(files(corpus, vocab_size=50, target_vocab_size=45))
    sources, targets = data.vocabularies
    assert (len(sources), len(targets)) == (50, 45)
    assert sources == Vocabulary.train(DE * 3, 50)
    assert targets == Vocabulary.train(EN * 3, 45)
    batch = next(iter(data.val_dataloader()))
    assert sorted(texts(sources, batch.source)) == sorted(DE)
    assert texts(targets, batch.target) == batch.references
    joint = stages(files(corpus)).vocabularies[0]
    assert joint == Vocabulary.train([*DE * 3, *EN * 3], 60)


def test_filters_are_for_training_only_and_say_what_they_dropped(corpus, caplog):
    long = "Hund " * 40
    write(corpus / "train.de", [*DE, long, "Ja."])
    write(corpus / "train.en", [*EN, long, "A dog runs in the snow."])
    write(corpus / "val.de", [long])
    write(corpus / "val.en", EN[:1])
    data = files(corpus, max_length=35, max_ratio=3)
    data.setup("fit")
    with caplog.at_level("INFO"):
        kept = [i for batch in data.train_dataloader() for i in batch.index.tolist()]
        data.train_dataloader()
    assert sorted(kept) == [0, 1, 2, 3]
    said = [record.getMessage() for record in caplog.records if "leaves out" in record.getMessage()]
    assert said == [
        "TranslationData leaves out 2 of 6 training pairs: 1 longer than 35 subwords, "
        "1 with a ratio of lengths above 3."
    ]
    assert next(iter(data.val_dataloader())).source.shape[1] > 36
    data = files(corpus, max_length=1)
    data.setup("fit")
    with pytest.raises(ValueError, match=r"`max_length` and `max_ratio`.*6 training pairs.*got 1 and None"):
        data.train_dataloader()


def test_sizes_take_the_first_lines_and_no_validation_is_no_loader(corpus):
    data = files(corpus, train_size=5, val_size=2, test_size=3, vocab_size=55)
    stages(data)
    assert [len(data._texts[part].sources) for part in ("train", "val", "test")] == [5, 2, 3]
    assert data._texts["train"].sources == [*DE, DE[0]]
    for options in ({"val": None}, {"val_size": 0}):
        data = files(corpus, **options)
        data.setup("fit")
        assert data.val_dataloader() == []
    for part, lines in (("train", 12), ("val", 4), ("test", 4)):
        with pytest.raises(ValueError, match=rf"`{part}_size`.*at most {lines}.*got 99"):
            stages(files(corpus, **{f"{part}_size": 99}))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dataset": "number"}, "`dataset`.*got 'number'. Did you mean 'numbers'"),
        ({"source": "fr"}, "`source` to be 'de' or 'en' but got 'fr'"),
        ({"source": "en"}, "`target`.*another language.*'en'"),
        ({"dataset": "multi30k"}, "`root`.*got None"),
        (
            {"dataset": "multi30k", "root": ".", "download": True, "target": "fr"},
            "`target` to be 'de' or 'en' but got 'fr'",
        ),
        ({"dataset": "files", "download": True}, "`download`.*False for files"),
        ({"train": "x"}, "`train`.*None for numbers.*'x'"),
        ({"vocabulary_kind": "word"}, "`vocabulary_kind`.*'word'"),
        ({"vocabulary_file": "x.txt"}, r"`vocabulary_file`.*\.model.*'x.txt'"),
        ({"batch_tokens": 9, "batch_size": 3}, "`batch_size`.*`batch_tokens` is 9.*got 3"),
        ({"vocab_size": 4}, "`vocab_size`.*at least 5.*got 4"),
        ({"target_vocab_size": 4}, "`target_vocab_size`.*at least 5.*got 4"),
        ({"batch_tokens": 0}, "`batch_tokens`.*got 0"),
        ({"batch_size": 0}, "`batch_size`.*got 0"),
        ({"eval_batch_size": 0}, "`eval_batch_size`.*got 0"),
        ({"max_length": 0}, "`max_length`.*got 0"),
        ({"max_ratio": 0.5}, "`max_ratio`.*at least 1.*got 0.5"),
        ({"train_size": 0}, "`train_size`.*got 0"),
        ({"val_size": -1}, "`val_size`.*got -1"),
        ({"test_size": 0}, "`test_size`.*got 0"),
        ({"num_workers": -1}, "`num_workers`.*got -1"),
        ({"seed": -1}, "`seed`.*got -1"),
    ],
)
def test_wrong_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        TranslationData(**arguments)


def test_missing_parts_and_files_say_what_was_looked_for(corpus):
    with pytest.raises(ValueError, match=r"`test`.*name the files.*got None"):
        files(corpus, test=None).setup("test")
    with pytest.raises(FileNotFoundError, match=r"nothing\.de or nothing\.de\.gz .*corpus"):
        files(corpus, train="nothing").setup("fit")
    with pytest.raises(FileNotFoundError, match=r"train\.de.*TranslationData\(download=True\)"):
        TranslationData("multi30k", root="empty").setup("fit")


# -- vocabularies ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"vocab_size": 5000}, r"`vocab_size`.*at most \d+.*got 5000"),
        ({"vocab_size": 10}, r"`vocab_size`.*at least \d+.*got 10"),
        ({"target_vocab_size": 5000}, r"`target_vocab_size`.*at most \d+.*got 5000"),
    ],
)
def test_sizes_that_the_text_does_not_allow(corpus, options, message):
    with pytest.raises(ValueError, match=message):
        _ = files(corpus, **options).vocabularies


def test_a_vocabulary_file_is_made_once_and_then_read(corpus, tmp_path):
    path = tmp_path / "kept" / "joint.model"
    data = files(corpus, vocabulary_file=str(path))
    data.prepare_data()
    assert not data._texts  # nothing is set where only one process is
    assert data._vocabularies is None
    data.setup("fit")
    assert data.vocabularies == files(corpus).vocabularies
    assert Vocabulary.load(path) == data.vocabularies[0]
    before = path.stat().st_mtime_ns
    write(corpus / "train.de", DE[::-1])
    again = files(corpus, vocabulary_file=str(path))
    again.prepare_data()
    assert again.vocabularies == data.vocabularies
    assert path.stat().st_mtime_ns == before
    with pytest.raises(ValueError, match=r"`vocab_size`.*60.*joint\.model.*got 61"):
        _ = files(corpus, vocabulary_file=str(path), vocab_size=61).vocabularies


def test_two_vocabulary_files(corpus, tmp_path):
    options = {"vocabulary_file": str(tmp_path / "v.model"), "vocab_size": 50, "target_vocab_size": 45}
    files(corpus, **options).prepare_data()
    assert sorted(path.name for path in tmp_path.glob("*.model")) == ["v.de.model", "v.en.model"]
    sources, targets = files(corpus, train="gone", **options).vocabularies  # without the text
    assert (len(sources), len(targets)) == (50, 45)


def test_a_file_of_characters_may_have_fewer_units(corpus, tmp_path):
    options = {"vocabulary_file": str(tmp_path / "v.model"), "vocabulary_kind": "char", "vocab_size": 500}
    files(corpus, **options).prepare_data()
    assert len(files(corpus, **options).vocabularies[0]) == 4 + len({*"".join(DE + EN)})


# -- with a trainer ----------------------------------------------------------------------------------------------------


class Bag(LightningModule):
    """Regresses the length of the target on a bag of source subwords; keeps the vocabularies as Translator does."""

    def __init__(self, units=150):
        super().__init__()
        self.weights = torch.nn.Embedding(units, 1, padding_idx=PAD)
        torch.nn.init.zeros_(self.weights.weight)
        self.vocabularies, self.seen = None, []

    def setup(self, stage):
        if stage == "fit":
            self.vocabularies = self.trainer.datamodule.vocabularies

    def on_save_checkpoint(self, checkpoint):
        checkpoint["words"] = [vocabulary.model for vocabulary in self.vocabularies]

    def on_load_checkpoint(self, checkpoint):
        self.vocabularies = tuple(map(Vocabulary, checkpoint["words"]))

    def training_step(self, batch, batch_idx):
        self.seen.append((self.current_epoch, batch_idx, batch.index.tolist(), batch.source.sum().item()))
        length = (batch.target != PAD).sum(dim=1).float()
        return (self.weights(batch.source).sum(dim=(1, 2)) - length).square().mean()

    def validation_step(self, batch, batch_idx):
        self.seen.append((batch.index.tolist(), texts(self.vocabularies[1], batch.target), batch.references))

    test_step = validation_step

    def predict_step(self, batch, batch_idx):
        assert batch.target is batch.references is None
        return list(zip(batch.index.tolist(), texts(self.vocabularies[0], batch.source), strict=True))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01, momentum=0.9)


def fit(path, ckpt_path=None, data=None, **options):
    """Six batches an epoch, three epochs, a checkpoint after every step."""
    save = ModelCheckpoint(path, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    data = data or numbers(batch_tokens=1500, seed=1)
    model, options = Bag(data.vocab_size), {"max_epochs": 3, "limit_val_batches": 0, **options}
    trainer(callbacks=save, enable_checkpointing=True, **options).fit(model, datamodule=data, ckpt_path=ckpt_path)
    return model


@pytest.mark.filterwarnings("error:You're resuming from a checkpoint that ended before")
@pytest.mark.parametrize("options", [{"batch_tokens": 1500}, {"batch_size": 100}])
def test_resume_in_the_middle_of_an_epoch_is_the_same_stream(tmp_path, options):
    whole = fit(tmp_path, data=numbers(seed=1, **options))
    epoch = len(whole.seen) // 3
    assert epoch >= 4
    assert [step[:2] for step in whole.seen] == [(e, b) for e in range(3) for b in range(epoch)]
    orders = {tuple(tuple(step[2]) for step in whole.seen[e * epoch :][:epoch]) for e in range(3)}
    assert len(orders) == 3  # each epoch has its own
    for step in (1, epoch - 1, epoch, epoch + 2):
        resumed = fit(tmp_path / "again", tmp_path / f"step={step}.ckpt", data=numbers(seed=1, **options))
        assert resumed.seen == whole.seen[step:], step
        assert torch.equal(resumed.weights.weight, whole.weights.weight)


def test_workers_change_nothing(tmp_path):
    assert fit(tmp_path, max_epochs=1).seen == fit(tmp_path, max_epochs=1, data=numbers(
        batch_tokens=1500, seed=1, num_workers=2
    )).seen  # fmt: skip


def test_overfitting_single_batches_runs(tmp_path):
    """Lightning then replaces the sampler by one that knows no batches."""
    seen = fit(tmp_path, overfit_batches=2, max_epochs=2).seen
    assert [step[2] for step in seen if len(step) == 4] == [[0], [1]] * 2


def test_evaluation_through_a_trainer(corpus):
    data = files(corpus, eval_batch_size=3)
    model = Bag(60)
    trainer(max_epochs=1, num_sanity_val_steps=0).fit(model, datamodule=data)
    seen = [entry for entry in model.seen if len(entry) == 3]
    assert sorted(i for index, _, _ in seen for i in index) == [0, 1, 2, 3]
    for index, said, references in seen:
        assert said == references == [EN[i] for i in index]


def stream_of_a_rank():
    """What one of two processes sees in training, validation and prediction."""
    data, model = numbers(batch_tokens=750, seed=1, eval_batch_size=8, test_size=41), Bag()
    options = {"accelerator": "cpu", "devices": 2, "strategy": "ddp"}
    trainer(max_epochs=2, num_sanity_val_steps=0, **options).fit(model, datamodule=data)
    predicted = trainer(**options).predict(model, datamodule=data)
    return {
        "train": [step[2] for step in model.seen if len(step) == 4],
        "val": [entry[0] for entry in model.seen if len(entry) == 3],
        "predict": [[place for place, _ in batch] for batch in predicted],
    }


@pytest.mark.ddp
def test_two_processes_see_together_what_one_sees(tmp_path):
    left, right = POOL.run(f"{__name__}.stream_of_a_rank")
    for one, two in ((left["val"], right["val"]), (left["predict"], right["predict"])):
        assert len(one) == len(two)
    assert sorted(chain(*left["predict"], *right["predict"])) == list(range(41))  # an odd number: none twice
    assert sorted(chain(*left["val"], *right["val"])) == sorted([*range(50)] * 2)  # in each of two epochs
    whole = fit(tmp_path, data=numbers(batch_tokens=1500, seed=1), max_epochs=2).seen
    together = zip(left["train"], right["train"], whole, strict=True)
    assert all(sorted(a + b) == sorted(batch[2]) for a, b, batch in together)


@pytest.fixture
def checkpoint(corpus, tmp_path):
    """A fit's checkpoint, behind which the training text is gone."""
    fit(tmp_path / "fit", data=files(corpus), max_epochs=1)
    for path in corpus.glob("train.*"):
        path.unlink()
    return next((tmp_path / "fit").glob("*.ckpt"))


@pytest.mark.parametrize("vocabulary_file", [None, "never.model"])
def test_test_and_prediction_need_nothing_but_the_checkpoint(corpus, checkpoint, vocabulary_file):
    options = {"vocabulary_file": vocabulary_file, "vocab_size": 70}  # the checkpoint's has 60
    model = Bag(60)
    trainer().test(model, datamodule=files(corpus, **options), ckpt_path=checkpoint, verbose=False)
    ((_, said, references),) = model.seen
    assert sorted(said) == sorted(references) == sorted(EN)
    predicted = trainer().predict(Bag(60), datamodule=files(corpus, **options), ckpt_path=checkpoint)
    assert sorted(row for batch in predicted for row in batch) == list(enumerate(DE))
    assert not Path("never.model").exists()


def test_prediction_of_a_file_and_of_standard_input(corpus, checkpoint, monkeypatch):
    lines = [DE[1], "", DE[0], "", DE[3]]  # empty lines may stand here
    write("new.txt", lines)
    write("zipped.de.gz", lines, zipped=True)
    stdin = io.TextIOWrapper(io.BytesIO("".join(f"{line}\n" for line in lines).encode()), encoding="latin-1")
    monkeypatch.setattr("sys.stdin", stdin)
    for name in ("new.txt", "zipped.de.gz", "-"):
        data = TranslationData("files", predict=name, eval_batch_size=2)
        predicted = trainer().predict(Bag(60), datamodule=data, ckpt_path=checkpoint)
        assert [len(batch) for batch in predicted] == [2, 2, 1]
        assert sorted(row for batch in predicted for row in batch) == list(enumerate(lines))
    data = TranslationData(predict="new.txt", vocab_size=150, train_size=600)
    data.setup("predict")
    assert next(iter(data.predict_dataloader())).source[0].tolist() == [EOS] + [PAD] * (
        next(iter(data.predict_dataloader())).source.shape[1] - 1
    )
    with pytest.raises(FileNotFoundError, match=r"missing\.txt"):
        TranslationData(predict="missing.txt").setup("predict")
    with pytest.raises(RuntimeError, match=r"setup\('predict'\)"):
        TranslationData(predict="new.txt").predict_dataloader()


def test_standard_input_without_bytes_is_read_too(monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("zwei\nacht\n"))
    data = numbers(predict="-")
    data.setup("predict")
    data.setup("predict")  # what is read is read
    assert sorted(texts(data.vocabularies[0], next(iter(data.predict_dataloader())).source)) == ["acht", "zwei"]


# -- Multi30k ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A web server on this machine that has small files in Multi30k's place, with checksums to match."""
    folder = tmp_path / "web"
    folder.mkdir()
    sums = {}
    for part in ("train", "val", "test_2016_flickr"):
        for language, lines in (("de", DE), ("en", EN)):
            name = f"{part}.{language}"
            write(folder / f"{name}.gz", lines, zipped=True)
            sums[name] = hashlib.sha256("".join(f"{line}\n" for line in lines).encode()).hexdigest()
    monkeypatch.setattr(aligned_texts, "_MULTI30K_SHA256", sums)

    class Quiet(SimpleHTTPRequestHandler):
        asked: ClassVar[list] = []

        def log_message(self, *_):
            self.asked.append(self.path)

    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(folder))) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        monkeypatch.setattr(aligned_texts, "MULTI30K_URL", f"http://127.0.0.1:{running.server_port}")
        yield folder, Quiet.asked
        running.shutdown()


def multi30k(root, **options):
    return TranslationData("multi30k", root=str(root), vocab_size=60, **options)


def test_download_is_checked_and_done_once(server, tmp_path):
    _, asked = server
    root = tmp_path / "data" / "multi30k"
    data = stages(multi30k(root, download=True))
    assert len(asked) == 6
    assert [data._texts[part].targets for part in ("train", "val", "test")] == [EN] * 3
    names = sorted(path.name for path in root.iterdir())
    assert names == sorted(f"{p}.{s}.gz" for p in ("train", "val", "test_2016_flickr") for s in ("de", "en"))
    (root / "val.de.gz").unlink()
    write(root / "val.de", DE)  # plain files are taken as they are
    stages(multi30k(root, download=True))
    assert len(asked) == 6
    asked.clear()
    stages(multi30k(root))
    assert not asked


def test_a_broken_download_is_an_error_and_leaves_no_file(server, tmp_path):
    folder, _ = server
    root = tmp_path / "data"
    good = hashlib.sha256("".join(f"{line}\n" for line in EN).encode()).hexdigest()
    write(folder / "train.en.gz", [*EN[:3], "x"], zipped=True)
    bad = hashlib.sha256("".join(f"{line}\n" for line in [*EN[:3], "x"]).encode()).hexdigest()
    with pytest.raises(ValueError, match=rf"train\.en\.gz.*{good}.*got {bad}"):
        multi30k(root, download=True).prepare_data()
    assert [path.name for path in root.iterdir()] == ["train.de.gz"]
    (folder / "train.en.gz").write_bytes(b"<html>")
    with pytest.raises(ValueError, match=r"train\.en\.gz.*gzip"):
        multi30k(root, download=True).prepare_data()
    (folder / "train.en.gz").unlink()
    with pytest.raises(OSError, match=r"download http://127.*train\.en\.gz.*404"):
        multi30k(root, download=True).prepare_data()
    assert [path.name for path in root.iterdir()] == ["train.de.gz"]


@pytest.fixture(scope="module")
def real_multi30k():
    folder = Path(os.environ.get("LIGHTNING_RECTIFY_DATA", "")) / "multi30k"
    if "LIGHTNING_RECTIFY_DATA" not in os.environ or not folder.is_dir():
        pytest.skip("there is no folder multi30k in LIGHTNING_RECTIFY_DATA")
    return folder


def test_multi30k_itself(real_multi30k):
    for name, expected in aligned_texts._MULTI30K_SHA256.items():
        path = aligned_texts.find(real_multi30k / name)
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        assert hashlib.sha256(data).hexdigest() == expected
    data = stages(TranslationData("multi30k", root=str(real_multi30k), vocab_size=8000, batch_tokens=2000))
    assert [len(data._texts[part].sources) for part in ("train", "val", "test")] == [29_000, 1_014, 1_000]
    loader = data.train_dataloader()
    # What an independent prototype counted, with the same vocabulary, budget and order of lengths; with EOS.
    assert loader.dataset.lengths.sum(axis=0).tolist() == [457_331, 443_037]
    assert loader.dataset.lengths.max(axis=0).tolist() == [53, 49]
    assert len(loader) == 252
