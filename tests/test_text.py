"""Vocabularies, by sentencepiece itself as the outside oracle, and padding, by torch's own."""

import copy
import io
import pickle

import numpy as np
import pytest
import torch
from sentencepiece import SentencePieceProcessor, SentencePieceTrainer
from torch.nn.utils.rnn import pad_sequence

from lightning_rectify.text import BOS, EOS, PAD, UNK, TranslationBatch, Vocabulary, pad

LINES = [
    "Ein Hund läuft über die grüne Wiese.",
    "Zwei Hunde laufen im Schnee.",
    "A dog runs across the green meadow.",
    "Two dogs are running in the snow.",
] * 3


@pytest.fixture(scope="module")
def vocabulary():
    return Vocabulary.train(LINES, 60)


@pytest.mark.parametrize("kind", ["bpe", "unigram", "char"])
def test_text_goes_there_and_back(kind):
    vocabulary = Vocabulary.train(LINES, 45, kind)
    for line in LINES:
        ids = vocabulary.encode(line)
        assert min(ids) > EOS  # neither BOS nor EOS, and nothing unknown
        assert max(ids) < len(vocabulary)
        assert vocabulary.decode(ids) == line
        assert "".join(vocabulary.pieces(ids)).replace("▁", " ").strip() == line
    if kind == "char":  # an upper bound
        assert len(vocabulary) == 4 + len({*"".join(LINES)})
    else:
        assert len(vocabulary) == 45


def test_special_ids_have_their_places_and_are_never_text(vocabulary):
    assert (PAD, UNK, BOS, EOS) == (0, 1, 2, 3)
    assert vocabulary.pieces(range(4)) == ["<pad>", "<unk>", "<s>", "</s>"]
    ids = vocabulary.encode("dog <s> </s> <pad>")
    assert not {PAD, BOS, EOS} & set(ids)
    assert UNK in vocabulary.encode("dog ☃")
    assert vocabulary.encode("") == []


def test_decode_leaves_special_ids_out(vocabulary):
    ids = vocabulary.encode(LINES[0])
    padded = [BOS, *ids[:3], UNK, *ids[3:], EOS, PAD, PAD]
    for given in (padded, torch.tensor(padded), np.array(padded), iter(padded)):
        assert vocabulary.decode(given) == LINES[0]
    assert vocabulary.decode([BOS, EOS]) == vocabulary.decode([]) == ""


def test_training_twice_gives_the_same_bytes(vocabulary):
    for kind in ("bpe", "unigram", "char"):
        assert Vocabulary.train(iter(LINES), 45, kind).model == Vocabulary.train(LINES, 45, kind).model
    assert Vocabulary.train(LINES, 60) == vocabulary
    assert Vocabulary.train(LINES, 61) != vocabulary
    assert vocabulary != vocabulary.model


def test_a_vocabulary_is_its_bytes(vocabulary, tmp_path):
    path = tmp_path / "deep" / "joint.model"
    vocabulary.save(path)
    copies = [
        Vocabulary(vocabulary.model),
        Vocabulary.load(path),
        pickle.loads(pickle.dumps(vocabulary)),
        copy.deepcopy(vocabulary),
    ]
    for other in copies:
        assert other == vocabulary
        assert other.encode(LINES[1]) == vocabulary.encode(LINES[1])
    assert len({vocabulary, *copies}) == 1
    assert [file.name for file in path.parent.iterdir()] == ["joint.model"]  # no part is left behind
    peer = SentencePieceProcessor(model_file=str(path))
    assert peer.encode(LINES[2]) == vocabulary.encode(LINES[2])
    assert (peer.pad_id(), peer.unk_id(), peer.bos_id(), peer.eos_id()) == (0, 1, 2, 3)


def test_a_long_line_is_learnt_from():
    line = "wort " * 2000 + "ÿ"  # 10,000 bytes: above sentencepiece's own limit, which would leave the ÿ unknown
    assert UNK not in Vocabulary.train([*LINES, line], 60).encode("ÿ")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"size": 4}, "`size`.*at least 5.*got 4"),
        ({"size": 20}, r"`size`.*at least \d+, the characters.*got 20"),
        ({"size": 5000}, r"`size`.*at most \d+, the units.*got 5000"),
        ({"size": 5000, "kind": "unigram"}, r"`size`.*at most \d+.*got 5000"),
        ({"size": 60, "kind": "word"}, "`kind` to be 'bpe', 'unigram' or 'char' but got 'word'"),
        ({"size": 60, "character_coverage": 0.0}, "`character_coverage`.*got 0.0"),
        ({"size": 60, "character_coverage": 1.1}, "`character_coverage`.*got 1.1"),
        ({"sentences": [], "size": 60}, "`sentences`.*got none"),
        ({"sentences": ["", " "], "size": 60}, "`sentences`.*got none"),
    ],
)
def test_wrong_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        Vocabulary.train(**{"sentences": LINES, **arguments})


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
@pytest.mark.parametrize(("wrong", "word"), [(20, "least"), (5000, "most")])
def test_the_size_that_the_error_names_works(kind, wrong, word):
    with pytest.raises(ValueError, match="`size`") as caught:
        Vocabulary.train(LINES, wrong, kind)
    size = int(str(caught.value).split(f"at {word} ")[1].split(",")[0])
    assert len(Vocabulary.train(LINES, size, kind)) == size


def test_errors_of_the_sentences_themselves_keep_their_type():
    def broken():
        yield LINES[0]
        raise KeyError("gone")

    with pytest.raises(KeyError, match="gone"):
        Vocabulary.train(broken(), 60)


def test_other_bytes_are_refused(tmp_path):
    for junk in (b"", b"not a model"):
        with pytest.raises(ValueError, match=rf"`model`.*got {len(junk)} bytes"):
            Vocabulary(junk)
    buffer = io.BytesIO()  # with sentencepiece's own special ids
    SentencePieceTrainer.train(sentence_iterator=iter(LINES), model_writer=buffer, vocab_size=45, minloglevel=2)
    with pytest.raises(ValueError, match=r"`model`.*\(0, 1, 2, 3\).*got \(-1, 0, 1, 2\)"):
        Vocabulary(buffer.getvalue())
    (tmp_path / "x.model").write_bytes(b"junk")
    with pytest.raises(ValueError, match=r"x\.model: .*`model`"):
        Vocabulary.load(tmp_path / "x.model")
    with pytest.raises(FileNotFoundError):
        Vocabulary.load(tmp_path / "y.model")


def test_padding_is_torchs():
    rng = np.random.default_rng(0)
    sequences = [rng.integers(4, 99, size=size).tolist() for size in (3, 0, 7, 1)]
    expected = pad_sequence([torch.tensor(row, dtype=torch.int64) for row in sequences], batch_first=True)
    assert torch.equal(pad(sequences), expected)
    assert pad(sequences).dtype == pad([[]]).dtype == torch.int64
    assert (pad([]).shape, pad([[]]).shape) == ((0, 0), (1, 0))


def test_a_batch_is_a_named_tuple():
    batch = TranslationBatch(pad([[5, EOS]]), None, torch.tensor([7]), ["x"])
    source, target, index, references = batch
    assert (source.tolist(), target, index.tolist(), references) == ([[5, EOS]], None, [7], ["x"])
    assert torch.equal(batch.index, index)  # not a tuple's method
