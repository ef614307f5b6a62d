"""Text as streams of words: the grammar and its entropy, vocabularies, streams on ranks, files, loaders."""

import gzip
import math
import pickle
from collections import Counter
from functools import cache

import numpy as np
import pytest
import torch

from lightning_rectify.data import grammar
from lightning_rectify.data.token_streams import EncodedSentences, EvaluationStreams, Share, TrainingStreams
from lightning_rectify.data.tokens import TokenData
from lightning_rectify.words import END, IGNORED, SPECIAL, UNKNOWN, WordVocabulary, sentence_batch

# -- the grammar -------------------------------------------------------------------------------------------------------


def probability(sentence):
    """Of a sentence under the grammar, summed over all derivations: every way to cut it is tried."""
    rules, found = grammar.grammar(), tuple(sentence.split())

    @cache
    def symbol(name, begin, end):
        if name not in rules:
            return float(found[begin:end] == (name,))
        return sum(p * sequence(symbols, begin, end) for p, symbols in rules[name])

    @cache
    def sequence(symbols, begin, end):
        if len(symbols) == 1:
            return symbol(symbols[0], begin, end)
        cuts = range(begin + 1, end - len(symbols) + 2)
        return sum(symbol(symbols[0], begin, cut) * sequence(symbols[1:], cut, end) for cut in cuts)

    return symbol("sentence", 0, len(found))


def test_entropy_and_length_are_those_of_the_sentences_drawn():
    drawn = grammar.sentences("val", 600)
    nats = np.array([-math.log(probability(sentence)) for sentence in drawn])
    lengths = np.array([len(sentence.split()) for sentence in grammar.sentences("val", 20_000)])
    # Four standard errors. A second derivation of a sentence would make it more probable, and the mean too small.
    assert abs(nats.mean() - grammar.entropy()) < 4 * nats.std() / len(nats) ** 0.5
    assert abs(lengths.mean() - grammar.mean_length()) < 4 * lengths.std() / len(lengths) ** 0.5
    assert grammar.best_perplexity() == pytest.approx(math.exp(grammar.entropy() / (1 + grammar.mean_length())))


def test_probability_of_a_sentence_by_hand():
    h40, h12, h10 = (sum(1 / k for k in range(1, n + 1)) for n in (40, 12, 10))
    determiners = 1 + 1 / 2 + 1 / 3 + 1 / 4
    # singular clause; "the dog" without more; a transitive verb, the first, with a plural object "the cats"
    the_dog = 0.5 / determiners / h40
    the_cats = 0.5 / determiners / 2 / h40
    assert probability("the dog sees the cats") == pytest.approx(0.6 * the_dog * 0.2 / h12 * the_cats)
    assert probability("the dog sings") == pytest.approx(0.6 * the_dog * 0.35 / h10)
    assert probability("the dog sing") == probability("the dogs sings") == 0.0


def test_probabilities_of_each_symbol_sum_to_one_and_all_words_are_drawn():
    for ways in grammar.grammar().values():
        assert sum(p for p, _ in ways) == pytest.approx(1, abs=1e-12)  # sums of up to 40 float64
    drawn = {word for sentence in grammar.sentences("train", 20_000) for word in sentence.split()}
    assert sorted(drawn) == grammar.words()
    assert len(grammar.words()) == 152


def test_a_shorter_part_begins_a_longer_one_and_the_test_part_knows_no_seed():
    assert grammar.sentences("train", 30, seed=2) == grammar.sentences("train", 90, seed=2)[:30]
    assert grammar.sentences("train", 30, seed=2) != grammar.sentences("train", 30, seed=3)
    assert grammar.sentences("train", 30) != grammar.sentences("val", 30)
    assert grammar.sentences("test", 30, seed=2) == grammar.sentences("test", 30, seed=3)
    for arguments, words in ((("all", 1), "`part`"), (("val", -1), "`size`"), (("val", 1, -1), "`seed`")):
        with pytest.raises(ValueError, match=words):
            grammar.sentences(*arguments)


# -- vocabularies ------------------------------------------------------------------------------------------------------


def test_vocabulary_is_the_words_by_frequency():
    text = grammar.sentences("train", 300)
    counts = Counter(word for sentence in text for word in sentence.split())
    vocabulary = WordVocabulary.build(text, min_count=3)
    assert set(vocabulary.words) == {*SPECIAL, *(word for word, count in counts.items() if count >= 3)}
    frequencies = [counts[word] for word in vocabulary.words[2:]]
    assert frequencies == sorted(frequencies, reverse=True)
    assert WordVocabulary.build(text, min_count=3, size=20).words == vocabulary.words[:20]
    assert WordVocabulary(vocabulary.words) == vocabulary == pickle.loads(pickle.dumps(vocabulary))
    assert len({vocabulary, WordVocabulary(vocabulary.words)}) == 1
    assert vocabulary != WordVocabulary.build(text)


def test_text_becomes_ids_and_text_again():
    vocabulary = WordVocabulary.build(["b a c", "a  b\tb <unk> </s> </s> </s> </s>"])
    assert vocabulary.words == [*SPECIAL, "b", "a", "c"]
    assert vocabulary.encode("a c </s> d <unk>") == [3, 4, UNKNOWN, UNKNOWN, UNKNOWN]  # text ends no sentence
    assert vocabulary.decode([3, 4, END, UNKNOWN, 2]) == "a c\n<unk> b"
    assert vocabulary.encode("") == []


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: WordVocabulary.build(["a"], min_count=0), "`min_count`.*at least 1.*got 0"),
        (lambda: WordVocabulary.build(["a"], size=2), "`size`.*at least 3.*got 2"),
        (lambda: WordVocabulary.build(["a b a"], min_count=3), "`sentences`.*at least 3 times.*2 times"),
        (lambda: WordVocabulary.build([]), "`sentences`.*0 times"),
        (lambda: WordVocabulary(["a"]), "`words`.*begin with"),
        (lambda: WordVocabulary([*SPECIAL, "a", "a"]), "`words`.*no word twice.*'a'"),
        (lambda: WordVocabulary([*SPECIAL, "a b"]), "`words`.*white space.*'a b'"),
        (lambda: WordVocabulary([*SPECIAL, ""]), "`words`.*got ''"),
    ],
)
def test_vocabulary_refuses(call, words):
    with pytest.raises(ValueError, match=words):
        call()


def test_sentence_batch_reads_from_an_end_to_an_end():
    batch = sentence_batch([[4, 5], [], [7]])
    assert batch.tokens.tolist() == [[END, 4, 5], [END, END, END], [END, 7, END]]
    assert batch.targets.tolist() == [[4, 5, END], [END, IGNORED, IGNORED], [7, END, IGNORED]]
    assert batch.start


# -- streams -----------------------------------------------------------------------------------------------------------


def encoded(count=90, seed=0):
    """Sentences of 1 to 8 words whose ids tell them apart, each with its end."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(2, 10, count)
    ids = np.arange(2, 2 + lengths.sum(), dtype=np.int32)
    ends = np.cumsum(lengths)
    ids[ends - 1] = END
    return EncodedSentences(ids, ends)


def batches(streams, epoch=0):
    return [streams[epoch, i] for i in range(len(streams))]


def test_windows_of_streams_are_the_text_in_rows():
    """The plain way: the text as a matrix of S rows, cut across."""
    text = encoded()
    streams = TrainingStreams(text, streams=6, batch_size=6, bptt=7)
    length = len(text.ids) // 6
    tokens = np.concatenate([[END], text.ids])[: 6 * length].reshape(6, length)
    targets = text.ids[: 6 * length].reshape(6, length)
    assert len(streams) == length // 7
    for window, batch in enumerate(batches(streams)):
        columns = slice(7 * window, 7 * window + 7)
        assert torch.equal(batch.tokens, torch.from_numpy(tokens[:, columns].astype(np.int64)))
        assert torch.equal(batch.targets, torch.from_numpy(targets[:, columns].astype(np.int64)))
        assert (batch.group, batch.groups, batch.start) == (0, 1, window == 0)
        assert batch.index.tolist() == list(range(6))


@pytest.mark.parametrize(("ranks", "batch_size"), [(1, 3), (2, 3), (1, 12), (3, 2), (2, 6)])
@pytest.mark.parametrize("shuffle", [False, True])
def test_streams_do_not_depend_on_ranks_and_batches(ranks, batch_size, shuffle):
    options = {"streams": 12, "bptt": 5, "shuffle": shuffle, "seed": 4}
    whole = batches(TrainingStreams(encoded(), batch_size=12, **options), epoch=3)
    parts = [
        batches(TrainingStreams(encoded(), batch_size=batch_size, share=Share(rank, ranks), **options), epoch=3)
        for rank in range(ranks)
    ]
    groups = 12 // ranks // batch_size
    for window, expected in enumerate(whole):
        together = [part[window * groups + group] for group in range(groups) for part in parts]
        index = torch.cat([batch.index for batch in together])
        assert sorted(index.tolist()) == list(range(12))
        for name in ("tokens", "targets"):
            rows = torch.cat([getattr(batch, name) for batch in together])
            assert torch.equal(rows[index.argsort()], getattr(expected, name))
        assert {batch.start for batch in together} == {window == 0}
        for rank, part in enumerate(parts):  # what a checkpoint relies on: local order is every R-th stream
            mine = torch.cat([part[window * groups + group].index for group in range(groups)])
            assert mine.tolist() == list(range(rank, 12, ranks))


def test_epochs_have_whole_sentences_in_orders_of_their_own():
    text = encoded()
    sentences = {tuple(text.sentence(i)) for i in range(len(text))}
    streams = TrainingStreams(text, streams=2, batch_size=2, bptt=3, shuffle=True, seed=1)
    orders = []
    for epoch in (0, 1, 0):
        words = streams._words(epoch)
        cut = [tuple(part[:-1]) for part in np.split(words[1:], np.flatnonzero(words[1:] == END) + 1)[:-1]]
        assert words[0] == END
        assert len(cut) == len(text)
        assert set(cut) == sentences
        orders.append(cut)
    assert orders[0] == orders[2] != orders[1]
    plain = TrainingStreams(text, streams=2, batch_size=2, bptt=3)
    assert torch.equal(plain[0, 1].tokens, plain[5, 1].tokens)
    assert torch.equal(plain[0, 1].tokens, plain[1].tokens)  # a place alone is of epoch 0


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("streams", [3, 4, 7])
def test_evaluation_counts_each_word_once(ranks, streams):
    text = encoded(20)
    parts = [EvaluationStreams(text, streams, bptt=4, share=Share(rank, ranks)) for rank in range(ranks)]
    assert len({len(part) for part in parts}) == 1
    rows = {}
    for part in parts:
        windows = [part[i] for i in range(len(part))]
        assert [batch.start for batch in windows] == [True] + [False] * (len(part) - 1)
        tokens, targets = (torch.cat([getattr(b, name) for b in windows], dim=1) for name in ("tokens", "targets"))
        for stream, read, wanted in zip(windows[0].index.tolist(), tokens, targets, strict=True):
            rows[stream] = read[wanted != IGNORED], wanted[wanted != IGNORED]
    read, wanted = (torch.cat([rows[stream][side] for stream in range(streams)]) for side in (0, 1))
    assert wanted.tolist() == text.ids.tolist()
    assert read.tolist() == [END, *text.ids[:-1].tolist()]
    lengths = [len(row[0]) for row in rows.values()]
    assert max(lengths) - min(lengths) <= 1


def test_sentences_are_permuted_in_parts(monkeypatch):
    text = encoded()
    order = np.random.default_rng(0).permutation(len(text))
    expected = np.concatenate([np.append(text.sentence(i), END) for i in order])
    for size in (1, 7, 1000):
        monkeypatch.setattr("lightning_rectify.data.token_streams._GATHERED", size)
        assert text.permuted(order).tolist() == expected.tolist()


# -- the datamodule ----------------------------------------------------------------------------------------------------


def test_embedded_text_needs_nothing():
    data = TokenData(train_size=500, val_size=50, batch_size=4, bptt=10)
    data.prepare_data()
    data.setup("fit")
    batch = next(iter(data.train_dataloader()))
    assert batch.tokens.shape == batch.targets.shape == (4, 10)
    assert torch.equal(batch.tokens[:, 1:], batch.targets[:, :-1])
    words = sum(len(sentence.split()) + 1 for sentence in grammar.sentences("val", 50))
    assert sum(int((batch.targets != IGNORED).sum()) for batch in data.val_dataloader()) == words
    assert TokenData(val_size=0).val_dataloader() == []


def test_default_vocabulary_is_the_whole_grammar():
    assert sorted(TokenData().vocabulary.words[2:]) == grammar.words()


def test_training_goes_on_in_the_middle_of_an_epoch():
    def loader():
        return TokenData(train_size=300, batch_size=2, streams=4, bptt=10).train_dataloader()

    def read(loader, epoch):
        loader.sampler.set_epoch(epoch)
        return list(loader)

    first = loader()
    expected = read(first, 0) + read(first, 1)
    stopped = loader()
    iterator = iter(stopped)
    seen = [next(iterator) for _ in range(7)]
    again = loader()
    again.load_state_dict(stopped.state_dict())
    seen += read(again, 0) + read(again, 1)
    assert len(seen) == len(expected)
    for a, b in zip(seen, expected, strict=True):
        assert torch.equal(a.tokens, b.tokens)
        assert (a.group, a.start) == (b.group, b.start)


def write_shards(root, train=("a b c\nb b\n", "c d\n"), held_out=("a b\n", "b d e\n", "never\n")):
    """The layout of the One Billion Word benchmark."""
    for folder, pattern, first, shards in (
        ("training-monolingual.tokenized.shuffled", "news.en-{:05}-of-{:05}", 1, train),
        ("heldout-monolingual.tokenized.shuffled", "news.en.heldout-{:05}-of-{:05}", 0, held_out),
    ):
        (root / folder).mkdir()
        for i, text in enumerate(shards, start=first):
            (root / folder / pattern.format(i, len(shards))).write_text(text)


def words_of(data, loader):
    """The text of a loader's targets, in the order of the streams."""
    rows = {}
    for batch in loader:
        for stream, row in zip(batch.index.tolist(), batch.targets.tolist(), strict=True):
            rows.setdefault(stream, []).extend(i for i in row if i != IGNORED)
    return data.vocabulary.decode([i for stream in sorted(rows) for i in rows[stream]])


def test_one_billion_words_layout(tmp_path):
    write_shards(tmp_path)
    data = TokenData("one_billion_words", root=str(tmp_path), batch_size=1, bptt=1, shuffle=False)
    data.setup("fit")
    assert data.vocabulary.words == [*SPECIAL, "b", "c", "a", "d"]
    assert words_of(data, data.train_dataloader()) == "a b c\nb b\nc d\n"
    assert words_of(data, data.test_dataloader()) == "a b\n"
    assert words_of(data, data.val_dataloader()) == "b d <unk>\n"
    data = TokenData("one_billion_words", root=str(tmp_path), min_count=2, vocab_size=3)
    assert data.vocabulary.words == [*SPECIAL, "b"]
    for size, count in ((1, 1), (2, 2), (3, 3)):
        data = TokenData("one_billion_words", root=str(tmp_path), train_size=size)
        assert len(data._encode_part("train")) == count
    with pytest.raises(ValueError, match=r"`train_size`.*at most 3 but got 4"):
        TokenData("one_billion_words", root=str(tmp_path), train_size=4)._encode_part("train")


def test_files_plain_and_compressed(tmp_path):
    (tmp_path / "train.txt").write_text("a b\nc\n", encoding="utf-8")
    (tmp_path / "test.txt.gz").write_bytes(gzip.compress(b"a\nz\n"))
    (tmp_path / "lines.txt").write_text("a b a\n\nz\n")
    data = TokenData(
        "files", root=str(tmp_path), train="train.txt", test="test.txt", predict=str(tmp_path / "lines.txt"),
        batch_size=1, bptt=2, shuffle=False, eval_batch_size=2,
    )  # fmt: skip
    for stage in ("fit", "test", "predict"):
        data.setup(stage)
    assert data.val_dataloader() == []
    assert words_of(data, data.test_dataloader()) == "a\n<unk>\n"
    known = data.vocabulary
    found = {}
    for batch in data.predict_dataloader():
        for place, row in zip(batch.index.tolist(), batch.targets.tolist(), strict=True):
            found[place] = [i for i in row if i != IGNORED]
    assert found == {0: [*known.encode("a b a"), END], 1: [END], 2: [UNKNOWN, END]}


def test_missing_files_are_said_in_setup(tmp_path):
    write_shards(tmp_path, held_out=("a\n",))
    data = TokenData("one_billion_words", root=str(tmp_path))
    data.setup("test")
    with pytest.raises(FileNotFoundError, match=r"two shards news.en.heldout.*val part"):
        data.setup("fit")
    with pytest.raises(FileNotFoundError, match=r"training-monolingual.*shards"):
        TokenData("one_billion_words", root=str(tmp_path / "none")).setup("fit")
    with pytest.raises(FileNotFoundError, match=r"nothing\.txt"):
        TokenData("files", train="nothing.txt").setup("fit")
    with pytest.raises(ValueError, match=r"`train`.*got None"):
        TokenData("files").setup("fit")
    with pytest.raises(FileNotFoundError, match=r"none\.txt"):
        TokenData(predict="none.txt").setup("predict")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"dataset": "grammer"}, r"`dataset` to be 'grammar'.*'grammer'. Did you mean 'grammar'"),
        ({"dataset": "one_billion_words"}, "`root`.*got None"),
        ({"train": "x.txt"}, "`train`.*None for grammar.*'x.txt'"),
        ({"min_count": 0}, "`min_count`.*at least 1.*got 0"),
        ({"vocab_size": 2}, "`vocab_size`.*at least 3.*got 2"),
        ({"batch_size": 0}, "`batch_size`.*at least 1.*got 0"),
        ({"streams": 0}, "`streams`.*at least 1.*got 0"),
        ({"bptt": 0}, "`bptt`.*at least 1.*got 0"),
        ({"eval_streams": 0}, "`eval_streams`.*at least 1.*got 0"),
        ({"seed": -1}, "`seed`.*at least 0.*got -1"),
    ],
)
def test_wrong_arguments(arguments, words):
    with pytest.raises(ValueError, match=words):
        TokenData(**arguments)


def test_streams_that_do_not_fit_the_text_are_refused():
    with pytest.raises(ValueError, match=r"`streams`.*multiple of 20.*got 30"):
        TokenData(streams=30).train_dataloader()
    with pytest.raises(ValueError, match=r"`streams`.*at least `bptt`, 35.*got 20"):
        TokenData(train_size=20).train_dataloader()
    with pytest.raises(ValueError, match=r"`eval_streams`.*2 ranks.*got 1"):
        EvaluationStreams(encoded(5), streams=1, bptt=3, share=Share(0, 2))
