"""The LanguageModel: carried states, perplexity, checkpoints, scores and text."""

import math
from collections import Counter
from functools import partial

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from torch.optim import SGD

from lightning_rectify._lightning import Callback, seed_everything
from lightning_rectify.data import grammar
from lightning_rectify.data.tokens import TokenData
from lightning_rectify.modules.base import NonFiniteLossError
from lightning_rectify.modules.language_model.module import LanguageModel
from lightning_rectify.modules.language_model.states import CarriedStates, of_all_ranks
from lightning_rectify.optim import RectifiedAdam
from lightning_rectify.words import END, UNKNOWN, TextBatch, WordVocabulary
from tests.helpers.training import largest_difference, trainer, weights

SMALL = {"vocab_size": 60, "embedding_size": 16, "hidden_size": 32, "dropout": 0.0, "cutoffs": [20, 40]}
DATA = {"train_size": 192, "val_size": 60, "test_size": 60, "vocab_size": 60, "batch_size": 32, "bptt": 6}


def make(seed=0, **options):
    seed_everything(seed, verbose=False)
    return LanguageModel(**{**SMALL, **options})


def known(**options):
    """A module with the vocabulary of the data."""
    module = make(**options).eval()
    module.vocabulary = TokenData(**DATA).vocabulary
    return module


# -- training ----------------------------------------------------------------------------------------------------------


def plain_training(module, loader, epochs, lr, carry=True):
    """The loop as one would write it: detach, carry, reset at the beginning of an epoch."""
    recurrent, softmax = module.network.recurrent, module.network.softmax
    for epoch in range(epochs):
        loader.sampler.set_epoch(epoch)
        state = None
        for batch in loader:
            features, last = recurrent(batch.tokens, state)
            logs = softmax.log_prob(features)
            loss = F.nll_loss(logs.flatten(0, 1), batch.targets.flatten())
            loss.backward()
            with torch.no_grad():
                for parameter in module.parameters():
                    parameter -= lr * parameter.grad
                    parameter.grad = None
            state = last.detach() if carry else None
    return weights(module)


def test_training_carries_the_state_from_window_to_window():
    fitted = make(optimizer=partial(SGD, lr=0.5))
    trainer(max_epochs=2, limit_val_batches=0, precision="64-true").fit(fitted, TokenData(**DATA))
    plain = partial(plain_training, epochs=2, lr=0.5)
    expected = plain(make().double(), TokenData(**DATA).train_dataloader())
    # 1e-9: float64, twelve steps
    assert largest_difference(weights(fitted), expected) < 1e-9
    forgetful = plain(make().double(), TokenData(**DATA).train_dataloader(), carry=False)
    assert largest_difference(weights(fitted), forgetful) > 1e-5  # the comparison sees a state that is lost


class Watch(Callback):
    def __init__(self):
        self.losses, self.perplexities = [], []

    def on_train_batch_end(self, trainer, *args):
        self.losses.append(trainer.callback_metrics["train/loss"].item())
        self.perplexities.append(trainer.callback_metrics["train/perplexity"].item())


def test_training_ends_between_what_counts_of_words_reach_and_the_entropy():
    """Perplexity of unigrams by their counts in the test text itself, and of the grammar: the best that there is."""
    watch, size = Watch(), {"train_size": 2000, "test_size": 2000}
    module = LanguageModel(optimizer=partial(RectifiedAdam, lr=0.02), hidden_size=64)
    data = TokenData(**size, batch_size=20, bptt=12)
    fit = trainer(max_epochs=5, limit_val_batches=0, callbacks=[watch], gradient_clip_val=5.0)
    fit.fit(module, data)
    measured = fit.test(module, data, verbose=False)[0]
    counts = Counter(w for sentence in grammar.sentences("test", 2000) for w in [*sentence.split(), "</s>"])
    total = sum(counts.values())
    unigrams = math.exp(-sum(n / total * math.log(n / total) for n in counts.values()))
    # 0.98: 2000 sentences have the grammar's perplexity to about a hundredth
    assert grammar.best_perplexity() * 0.98 < measured["test/perplexity"] < 0.5 * unigrams
    assert measured["test/perplexity"] == pytest.approx(math.exp(measured["test/loss"]), rel=1e-5)  # float32
    assert watch.losses[0] == pytest.approx(math.log(154), rel=0.1)  # it begins by guessing
    assert watch.perplexities == pytest.approx([math.exp(loss) for loss in watch.losses], rel=1e-5)


def test_a_step_that_fails_leaves_the_state_it_began_with():
    module = make(optimizer=partial(SGD, lr=0.1))

    class Poison(Callback):
        def on_train_batch_start(self, fit, pl_module, batch, batch_idx):
            self.before = pl_module._states.local()
            if batch_idx == 2:
                pl_module.network.softmax.register_forward_hook(lambda _, __, output: output * float("nan"))

    poison = Poison()
    with pytest.raises(NonFiniteLossError):
        trainer(max_epochs=1, limit_val_batches=0, callbacks=[poison]).fit(module, TokenData(**DATA))
    assert torch.equal(module._states.local(), poison.before)
    assert poison.before.abs().max() > 0


# -- carried states ----------------------------------------------------------------------------------------------------


def window(group=0, groups=1, start=False, rows=2):
    empty = torch.zeros(rows, 1, dtype=torch.int64)
    return TextBatch(empty, empty, torch.arange(rows), group, groups, start)


def test_each_group_has_its_own_state_and_a_beginning_has_none():
    states = CarriedStates()
    assert states.local() is None
    for group, value in ((0, 1.0), (1, 2.0)):
        assert states.before(window(group, 2, start=True)) is None
        states.after(window(group, 2), torch.full((2, 1, 2, 3), value, requires_grad=True))
        states.commit()
        # a group that was not read yet stands for zeros
        assert states.local()[:, :, 2:].unique().tolist() == [value if group else 0.0]
    assert states.before(window(1, 2)).unique().tolist() == [2.0]
    assert states.before(window(0, 2)).unique().tolist() == [1.0]
    assert not states.before(window(0, 2)).requires_grad
    assert states.before(window(0, 2, start=True)) is None
    states.after(window(0, 2), torch.full((2, 1, 2, 3), 9.0))  # not committed
    assert states.before(window(0, 2)).unique().tolist() == [1.0]


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("before", [1, 2, 4])
def test_states_go_on_with_their_streams_on_another_number_of_ranks(before, ranks):
    """Streams 0 to 7; rank r of R has every R-th, in groups of one stream a rank."""
    all_streams = torch.arange(8.0).expand(2, 3, 8).unsqueeze(-1).clone()
    gathered = torch.stack([all_streams[:, :, rank::before] for rank in range(before)])
    saved = of_all_ranks(gathered)
    assert torch.equal(saved, all_streams)
    for rank in range(ranks):
        states = CarriedStates(rank, ranks)
        states.restore(saved)
        groups = 8 // ranks
        seen = [states.before(window(group, groups, rows=1)).unique().item() for group in range(groups)]
        assert seen == list(range(rank, 8, ranks))
        assert torch.equal(states.local(), all_streams[:, :, rank::ranks])


def test_states_of_other_streams_are_refused_in_the_middle_of_an_epoch():
    states = CarriedStates()
    states.restore(torch.zeros(2, 1, 6, 3))
    with pytest.raises(ValueError, match=r"`streams`.*to be 6.*got 4"):
        states.before(window(0, 2))
    states = CarriedStates()
    states.restore(torch.zeros(2, 1, 6, 3))
    assert states.before(window(0, 2, start=True)) is None  # an epoch begins anyway


def test_half_batches_in_turns_resume_between_the_turns(tmp_path):
    """Step 13 of an epoch of 12 begins the second epoch: one group has begun, the other has the state of the first."""

    def run(steps, ckpt_path=None):
        module = make(optimizer=partial(RectifiedAdam, lr=0.01), seed=3 if ckpt_path else 0)
        fit = trainer(max_steps=steps, max_epochs=-1, limit_val_batches=0)
        fit.fit(module, TokenData(**{**DATA, "batch_size": 16}, streams=32), ckpt_path=ckpt_path)
        return fit

    whole = run(20)
    for stop in (1, 5, 13):
        run(stop).save_checkpoint(tmp_path / f"{stop}.ckpt")
        resumed = run(20, tmp_path / f"{stop}.ckpt")
        assert largest_difference(weights(whole.model), weights(resumed.model)) == 0


# -- evaluation --------------------------------------------------------------------------------------------------------


def test_perplexity_is_that_of_the_whole_text_read_at_once():
    module = known()
    text = [i for s in grammar.sentences("val", 60) for i in [*module.vocabulary.encode(s), END]]
    with torch.no_grad():
        logs = module(torch.tensor([[END, *text[:-1]]]))[0].double()
    expected = -logs[torch.arange(len(text)), text].mean().item()
    measured = trainer().validate(module, TokenData(**DATA, eval_streams=1), verbose=False)[0]
    # 1e-5: float32, windows of six words instead of all at once
    assert measured["val/loss"] == pytest.approx(expected, rel=1e-5)
    assert measured["val/perplexity"] == pytest.approx(math.exp(expected), rel=1e-4)
    two = trainer().validate(module, TokenData(**DATA, eval_streams=2), verbose=False)[0]
    assert two["val/loss"] != measured["val/loss"]  # the second stream begins without a past
    assert two["val/loss"] == pytest.approx(expected, rel=1e-3)


def test_evaluation_does_not_touch_the_training_state():
    def run(**options):
        module = make(optimizer=partial(SGD, lr=0.5))
        trainer(max_epochs=1, **options).fit(module, TokenData(**DATA))
        return weights(module)

    assert largest_difference(run(val_check_interval=2), run(limit_val_batches=0)) == 0


# -- text --------------------------------------------------------------------------------------------------------------


def test_score_is_the_sum_of_the_words_log_probabilities():
    module = known()
    texts = ["the dog sees a cat", "", "unheard the", "every cat that sees the dogs runs"]
    scores = module.score(texts, batch_size=2)
    for text, score in zip(texts, scores, strict=True):
        ids = module.vocabulary.encode(text)
        logs = module(torch.tensor([[END, *ids]]))[0]
        expected = sum(logs[i, word].item() for i, word in enumerate([*ids, END]))
        assert score.item() == pytest.approx(expected, rel=1e-5)  # float32
    assert scores.dtype == torch.float64
    assert module.score([]).shape == (0,)


def test_prediction_scores_each_line_of_a_file(tmp_path):
    module = known()
    lines = ["the dog sees a cat", "", "the dogs run", "a"]
    (tmp_path / "lines.txt").write_text("".join(f"{line}\n" for line in lines))
    data = TokenData(**DATA, predict=str(tmp_path / "lines.txt"), eval_batch_size=3)
    answers = torch.cat(trainer().predict(module, data))
    places = torch.cat([batch.index for batch in data.predict_dataloader()])
    assert answers[places.argsort()] == pytest.approx(module.score(lines).numpy(), rel=1e-6)  # float32 in other batches


def test_greedy_text_is_the_most_probable_word_each_time():
    module = known()
    written = module.generate("the dog", length=8, temperature=0)
    ids = module.vocabulary.encode("the dog")
    for _ in range(8):
        logs = module(torch.tensor([[END, *ids]]))[0, -1].detach().clone()
        logs[UNKNOWN] = -math.inf
        ids.append(int(logs.argmax()))
    assert written == module.vocabulary.decode(ids)
    assert module.generate("the dog", length=0) == "the dog"


def test_words_are_drawn_as_often_as_they_are_probable():
    module = known()
    module.network.softmax.inner.head[0].weight.data *= 20  # else all words are about as probable
    with torch.no_grad():
        logs = module(torch.tensor([[END, 2]]))[0, -1].double()
    prompt = module.vocabulary.words[2]
    for temperature, allow_unknown in ((1.0, True), (0.5, False)):
        p = (logs / temperature).softmax(0).numpy()
        if not allow_unknown:
            p[UNKNOWN] = 0
            p /= p.sum()
        draws = [module.generate(prompt, 1, temperature, seed=seed, allow_unknown=allow_unknown) for seed in range(600)]
        words = [*module.vocabulary.words]
        words[END] = ""
        count = Counter(draw[len(prompt) :].strip() for draw in draws)
        found = np.array([count[word] for word in words])
        assert found.sum() == 600
        # Pearson's statistic over words expected five times or more: mean k, deviation sqrt(2 k); five of them above
        often = p * 600 >= 5
        statistic = ((found - 600 * p)[often] ** 2 / (600 * p[often])).sum()
        assert statistic < often.sum() + 5 * (2 * often.sum()) ** 0.5
        assert found[p < 1e-6].sum() == 0
    assert module.generate(length=30, seed=1) == module.generate(length=30, seed=1) != module.generate(length=30)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda m: m.generate(length=-1), "`length`.*at least 0.*got -1"),
        (lambda m: m.generate(temperature=-0.5), "`temperature`.*at least 0.*got -0.5"),
        (lambda m: m.generate(temperature=math.inf), "`temperature`.*finite.*got inf"),
        (lambda m: m.score(["a"], batch_size=0), "`batch_size`.*at least 1.*got 0"),
    ],
)
def test_wrong_arguments(call, words):
    with pytest.raises(ValueError, match=words):
        call(known())


def test_text_needs_a_vocabulary():
    for call in (lambda m: m.score(["a"]), lambda m: m.generate()):
        with pytest.raises(RuntimeError, match=r"`vocabulary`.*None"):
            call(make())


# -- vocabularies and checkpoints --------------------------------------------------------------------------------------


def test_checkpoint_brings_the_vocabulary_and_no_training_text_is_read(tmp_path, monkeypatch):
    fit = trainer(max_steps=2, max_epochs=-1, limit_val_batches=0)
    fit.fit(make(), TokenData(**DATA, seed=5))
    fit.save_checkpoint(tmp_path / "two.ckpt")
    loaded = LanguageModel.load_from_checkpoint(tmp_path / "two.ckpt")
    assert loaded.vocabulary == TokenData(**DATA, seed=5).vocabulary
    assert torch.equal(loaded.score(["the dog runs"]), fit.model.score(["the dog runs"]))
    read = grammar.sentences

    def only_test(part, *arguments):
        assert part == "test"
        return read(part, *arguments)

    monkeypatch.setattr("lightning_rectify.data.tokens.grammar.sentences", only_test)
    tested = trainer().test(loaded, TokenData(**DATA, seed=5), verbose=False)[0]
    assert 1 < tested["test/perplexity"] < 100


def test_vocabulary_of_another_size_is_refused():
    with pytest.raises(ValueError, match=r"`vocab_size` of LanguageModel to be 50.*TokenData.*got 60"):
        trainer(max_epochs=1).fit(make(), TokenData(**{**DATA, "vocab_size": 50}))


def test_parameters_are_in_three_groups_and_each_in_one():
    module = make()
    groups = module.parameter_groups()
    assert [group["name"] for group in groups] == ["model", "embedding", "softmax"]
    assert {id(p) for group in groups for p in group["params"]} == {id(p) for p in module.parameters()}
    assert sum(len(group["params"]) for group in groups) == len(list(module.parameters()))


def test_vocabulary_by_hand_is_kept():
    module = make(vocab_size=5, cutoffs=[2])
    module.vocabulary = WordVocabulary.build(["a b c"])
    assert module.score(["a b"]).item() < 0
