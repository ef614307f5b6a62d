"""The Translator: its loss over batches, ranks and windows, text to text, checkpoints, evaluation."""

import copy
import io
import json
import math
import subprocess
import sys
import warnings
from functools import partial
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F
from torch.optim import SGD
from torch.optim.lr_scheduler import LambdaLR, LinearLR
from torch.utils.data import DataLoader

from lightning_rectify._lightning import Callback, seed_everything
from lightning_rectify.cli import main
from lightning_rectify.data.number_words import english, german
from lightning_rectify.data.translation import TranslationData
from lightning_rectify.modules.translation.decoding import beam_search
from lightning_rectify.modules.translation.module import Translator
from lightning_rectify.nn.modes import evaluating
from lightning_rectify.optim import RectifiedAdam
from lightning_rectify.text import BOS, EOS, PAD, TranslationBatch, Vocabulary, pad
from tests.helpers.pool import POOL
from tests.helpers.training import differences, largest_difference, trainer, weights

SMALL = {
    "vocab_size": 100,
    "width": 32,
    "heads": 2,
    "feedforward": 64,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "dropout": 0.0,
    "beam_size": 3,
}
NUMBERS = [(german(n), english(n)) for n in range(1, 100)]
GERMAN = [pair[0] for pair in NUMBERS]


def make(cls=Translator, seed=0, **options):
    seed_everything(seed, verbose=False)
    return cls(**{**SMALL, **options})


def numbers(**options):
    return TranslationData(**{"train_size": 60, "val_size": 41, "test_size": 20, "vocab_size": 100, **options})


def unequal_batches(sizes=((1, 2), (9, 14), (3, 5), (12, 1), (2, 20), (1, 1), (6, 9))):
    """Random pairs: (number of sentences, longest sentence) of each batch."""
    rng = torch.Generator().manual_seed(0)

    def sentence(longest):
        return torch.randint(4, 100, (int(torch.randint(1, longest + 1, (), generator=rng)),), generator=rng).tolist()

    return [
        TranslationBatch(
            pad([[*sentence(longest), EOS] for _ in range(count)]),
            pad([[BOS, *sentence(longest), EOS] for _ in range(count)]),
            torch.arange(count),
            None,
        )
        for count, longest in sizes
    ]


def loader(batches):
    return DataLoader(batches, batch_size=None, collate_fn=lambda batch: batch)


def token_sum(module, batch, smoothing=0.0):
    """The plain loss: torch's own over all logits, padding ignored."""
    logits = module(batch.source, batch.target[:, :-1]).flatten(0, 1)
    labels = batch.target[:, 1:].flatten()
    return F.cross_entropy(logits, labels, ignore_index=PAD, label_smoothing=smoothing, reduction="sum")


def tokens(*batches):
    return sum(int((batch.target[:, 1:] != PAD).sum()) for batch in batches)


class AveragesBatches(Translator):
    """As Lightning does it: the mean of each batch, however many tokens it has."""

    def training_step(self, batch, batch_idx):
        return token_sum(self, batch, self.label_smoothing) / tokens(batch)

    def on_before_optimizer_step(self, optimizer):
        pass


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A translator that was shown 200 pairs of numbers, its data, and the checkpoint of its fit."""
    folder = tmp_path_factory.mktemp("trained")
    text = "".join(f"{source}\t{target}\n" for source, target in (NUMBERS * 3)[:200])
    (folder / "numbers.tsv").write_text(text, encoding="utf-8")
    names = dict.fromkeys(("train", "val", "test"), str(folder / "numbers.tsv"))
    data = TranslationData("files", **names, vocab_size=100, batch_size=20)
    steps = 500
    module = make(
        optimizer=partial(RectifiedAdam, lr=1e-2),
        lr_scheduler=partial(LinearLR, start_factor=1.0, end_factor=0.02, total_iters=steps),
        lr_scheduler_interval="step",
    )
    fit = trainer(max_steps=steps, max_epochs=-1, limit_val_batches=0)
    fit.fit(module, data)
    fit.save_checkpoint(folder / "numbers.ckpt")
    return module, data, folder / "numbers.ckpt"


# -- the loss ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_logged_loss_and_nll_are_torchs_means_over_tokens(smoothing):
    (batch,) = unequal_batches([(9, 14)])
    assert (batch.target == PAD).any()
    module = make(label_smoothing=smoothing)
    before = copy.deepcopy(module).double()
    fit = trainer(max_steps=1, log_every_n_steps=1)
    fit.fit(module, loader([batch]))
    for name, expected in (("train/loss", smoothing), ("train/nll", 0.0)):
        mean = (token_sum(before, batch, expected) / tokens(batch)).item()
        # 1e-6: float32 network against float64.
        assert fit.callback_metrics[name].item() == pytest.approx(mean, rel=1e-6)


@pytest.mark.parametrize("clip", [None, 0.3])
def test_an_accumulated_step_is_the_mean_over_all_its_tokens(clip):
    """Seven batches in windows of 3, 3 and 1, in float64."""
    batches = unequal_batches()
    counts = [tokens(batch) for batch in batches]
    assert max(counts) > 30 * min(counts)
    options = {"accumulate_grad_batches": 3, "gradient_clip_val": clip, "precision": "64-true", "max_epochs": 2}
    optimizer = partial(SGD, lr=0.5)
    module, naive = make(optimizer=optimizer), make(AveragesBatches, optimizer=optimizer)
    plain = copy.deepcopy(module).double()
    steps, norms = optimizer(plain.parameters()), []
    for window in [batches[:3], batches[3:6], batches[6:]] * 2:
        steps.zero_grad()
        (sum(token_sum(plain, batch, 0.1) for batch in window) / tokens(*window)).backward()
        norms.append(torch.nn.utils.clip_grad_norm_(plain.parameters(), clip or math.inf))
        steps.step()
    assert min(norms) > 0.3  # clipping has something to do
    for each in (module, naive):
        fit = trainer(**options)
        fit.fit(each, loader(batches))
        assert fit.global_step == 6
    assert largest_difference(weights(module), weights(plain)) < 1e-10  # float64; sums in another order
    assert largest_difference(weights(naive), weights(plain)) > 1e-4


class Counts(Callback):
    """Tokens of each training batch."""

    def __init__(self):
        self.tokens = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.tokens.append(tokens(batch))


def run_on_ranks(naive=False, accumulate=1, ranks=2):
    """Train for two epochs on batches of 400 tokens in all, then validate 41 sentences."""
    module = make(AveragesBatches if naive else Translator, optimizer=partial(RectifiedAdam, lr=0.01))
    counts, options = Counts(), {"devices": ranks, "strategy": "ddp" if ranks > 1 else "auto"}
    data = numbers(batch_tokens=400 // ranks, eval_batch_size=8)
    fit = trainer(max_epochs=2, accumulate_grad_batches=accumulate, limit_val_batches=0, callbacks=[counts], **options)
    fit.fit(module, data)
    values = trainer(**options).validate(module, data, verbose=False)[0]
    return {"weights": weights(module), "tokens": counts.tokens, "steps": fit.global_step, "val": values}


@pytest.mark.ddp
def test_two_processes_with_unequal_tokens_are_one_with_whole_batches():
    for accumulate in (1, 2):
        alone = run_on_ranks(accumulate=accumulate, ranks=1)
        left, right = POOL.run(f"{__name__}.run_on_ranks", accumulate=accumulate)
        assert left["steps"] == right["steps"] == alone["steps"] > 5
        assert [a + b for a, b in zip(left["tokens"], right["tokens"], strict=True)] == alone["tokens"]
        assert sum(a != b for a, b in zip(left["tokens"], right["tokens"], strict=True)) > len(left["tokens"]) / 2
        assert differences(left["weights"], right["weights"]) == []
        # 1e-5: float32 sums in another order, through steps with a division by sqrt(v).
        assert largest_difference(left["weights"], alone["weights"]) < 1e-5
        assert left["val"] == right["val"]  # over both ranks' sentences
        assert left["val"] == pytest.approx(alone["val"], abs=1e-4)  # the same for weights that differ by 1e-5
    naive, _ = POOL.run(f"{__name__}.run_on_ranks", naive=True, accumulate=2)
    assert largest_difference(naive["weights"], alone["weights"]) > 1e-4


# -- translating -------------------------------------------------------------------------------------------------------


def test_it_learns(trained):
    """200 pairs in 500 steps, two or three times each number; four seeds reached 100 % (validation is greedy)."""
    module, data, _ = trained
    values = trainer().validate(module, data, verbose=False)[0]
    assert values["val/exact_match"] >= 95
    right = [text == target for text, (_, target) in zip(module.translate(GERMAN), NUMBERS, strict=True)]
    assert sum(right) >= 95


def test_translations_are_in_order_whatever_the_batch(trained):
    module, _, _ = trained
    texts = [GERMAN[40], "", GERMAN[3], "  ", GERMAN[76], GERMAN[3]]
    together = module.translate(texts)
    assert together == [english(41), "", english(4), "", english(77), english(4)]
    for size in (1, 2, 5):
        assert module.translate(texts, batch_size=size) == together
    assert [module.translate([text])[0] for text in texts] == together
    assert module.translate([]) == module.sample([]) == []
    assert module.score([], []).shape == (0,)


def test_a_beam_of_one_is_greedy(trained):
    untrained, (module, _, _) = make(), trained
    untrained.vocabularies = module.vocabularies
    for each in (module, untrained):
        greedy = each.translate(GERMAN[::9], beam_size=1)
        by_beam = each.translate_n_best(GERMAN[::9], n_best=1, beam_size=1, length_penalty=0.5)
        assert [found[0][0] for found in by_beam] == greedy
    # The score has the penalty that was asked for, as a wider beam's.
    for text, ((translation, score),) in zip(GERMAN[::9], module.translate_n_best(GERMAN[::9], 1, 1, 0.5), strict=True):
        length = len(module.vocabularies[1].encode(translation)) + 1
        assert score * length**0.5 == pytest.approx(module.score([text], [translation]).item(), abs=1e-5)


def forced(module, source, tokens):
    """Log-probability of tokens and the EOS behind them: one forward pass, in float64, and a sum."""
    read = torch.tensor([[BOS, *tokens]])
    with torch.no_grad():
        logs = copy.deepcopy(module).double().eval()(source[None], read)[0].log_softmax(dim=1)
    return sum(logs[i, token].item() for i, token in enumerate((*tokens, EOS)))


@pytest.mark.parametrize("penalty", [0.0, 0.7, 1.0])
def test_n_best_scores_fall_and_are_forced_decodings(trained, penalty):
    """Search goes token by token with a cache, ``score`` reads the whole sentence at once."""
    module, _, _ = trained
    encode, texts, canonical = module.vocabularies[1].encode, GERMAN[10:30], 0
    found = module.translate_n_best(texts, 4, beam_size=4, length_penalty=penalty)
    source = pad([[*module.vocabularies[0].encode(text), EOS] for text in texts])
    limits = 2 * (source != PAD).sum(dim=1) + 10  # as `max_length_ratio` says
    with evaluating(module):
        searched = beam_search(module.network, source, limits, 4, penalty, 4)
    for text, row, results, hypotheses in zip(texts, source, found, searched, strict=True):
        scores = [score for _, score in results]
        assert len(scores) == 4
        assert scores == sorted(scores, reverse=True)
        for (translation, score), hypothesis in zip(results, hypotheses, strict=True):
            assert module.vocabularies[1].decode(hypothesis.tokens) == translation
            length = len(hypothesis.tokens) + 1
            # 1e-5, 1e-4 in all: float32 sums of up to thirty logarithms, and kernels that differ with the batch.
            assert score * length**penalty == pytest.approx(forced(module, row, hypothesis.tokens), rel=1e-5, abs=1e-4)
            # The searches may find a text in pieces that are not its own: `score` knows the vocabulary's only.
            if encode(translation) == hypothesis.tokens:
                canonical += 1
                likelihood = module.score([text], [translation]).item()
                assert score == pytest.approx(likelihood / length**penalty, rel=1e-5, abs=1e-4)
    assert canonical >= 30


def test_scores_are_plain_sums_and_do_not_depend_on_the_batch(trained):
    module, _, _ = trained
    texts, translations = GERMAN[:12], [english(n) for n in (1, 2, 3, 40, 55, 6, 7, 8, 90, 10, 11, 12)]
    scores = module.score(texts, translations, batch_size=5)
    assert scores.dtype == torch.float64
    source, target = module.vocabularies
    for text, translation, score in zip(texts, translations, scores.tolist(), strict=True):
        row = torch.tensor([*source.encode(text), EOS])
        # 1e-5: float32 against float64.
        assert score == pytest.approx(forced(module, row, target.encode(translation)), rel=1e-5, abs=1e-5)
    with pytest.raises(ValueError, match=r"`translations`.*each of 2 texts but got 1"):
        module.score(texts[:2], translations[:1])
    for call in (module.score, lambda a, b, batch_size: module.translate(a, batch_size=batch_size)):
        with pytest.raises(ValueError, match=r"`batch_size`.*at least 1 but got -1"):
            call(texts, translations, batch_size=-1)


def test_samples_are_a_function_of_the_seed(trained):
    module, _, _ = trained
    texts = GERMAN[:30]
    torch.manual_seed(0)
    first = module.sample(texts, temperature=2.0, seed=3)
    torch.manual_seed(1)
    torch.rand(5)
    assert module.sample(texts, temperature=2.0, seed=3) == first
    assert module.sample(texts, temperature=2.0, seed=4) != first
    assert all(score < 0 for _, score in first)
    # Of the most probable tokens alone it is the greedy translation, with its likelihood.
    drawn = module.sample(texts, top_k=1)
    greedy = module.translate_n_best(texts, 1, beam_size=1, length_penalty=0.0)
    assert [text for text, _ in drawn] == [found[0][0] for found in greedy]
    # 1e-5: float32, batches in another order.
    assert [score for _, score in drawn] == pytest.approx([found[0][1] for found in greedy], rel=1e-5, abs=1e-5)


def test_attention_has_a_row_a_target_piece_and_a_column_a_source_piece(trained):
    module, _, _ = trained
    text, translation = german(76), english(76)
    for figure in (module.plot_attention(text, translation), module.plot_attention(text)):
        (axes,) = figure.axes
        shown = torch.as_tensor(axes.images[0].get_array())
        source, target = module.vocabularies
        columns, rows = (
            [label.get_text() for label in labels] for labels in (axes.get_xticklabels(), axes.get_yticklabels())
        )
        assert columns == source.pieces([*source.encode(text), EOS])
        assert rows == target.pieces([*target.encode(translation), EOS])
        assert shown.shape == (len(rows), len(columns))
        assert (shown >= 0).all()
        # 1e-5: float32 softmax, averaged over heads.
        assert torch.allclose(shown.sum(dim=1), torch.ones(len(rows), dtype=shown.dtype), atol=1e-5)


def test_files_are_translated_line_for_line(trained, capsys):
    module, _, _ = trained
    lines = ["eins", "", "zwei\r", "drei\u2028vier", "fünf\rsechs", "\x0b", "sieben\x85acht", "neun"]
    expected = module.translate([line.rstrip("\r") for line in lines])
    assert expected[0], expected[2] == ("one", "two")
    for end in ("", "\n"):
        Path("in.txt").write_bytes(("\n".join(lines) + end).encode())
        module.translate_file("in.txt", "out.txt")
        written = Path("out.txt").read_bytes().decode()
        assert written.split("\n") == [*expected, ""]
        assert written.splitlines() == expected  # nor has a translation any other end of a line inside
    module.translate_file("in.txt")
    assert capsys.readouterr().out == written
    Path("in.txt").write_bytes(b"")
    module.translate_file("in.txt", "out.txt")
    assert Path("out.txt").read_bytes() == b""


def test_learned_positions_bound_translations_that_do_not_end(trained):
    module = make(network_args={"positions": "learned", "max_length": 16})
    module.vocabularies = trained[0].vocabularies
    tokens = module.network.decoder.embedding.tokens.weight.data
    tokens[EOS] = -10 * tokens[4:].mean(dim=0)  # tied: an end is less probable than any other token's mean
    text = german(77)
    source = pad([[*module.vocabularies[0].encode(text), EOS]])
    assert 2 * source.shape[1] + 10 > 16 >= source.shape[1]
    for beam_size in (1, 2):
        (found,) = module.translate_n_best([text], 1, beam_size)
        assert len(found) == 1
    batch = TranslationBatch(source, None, torch.tensor([0]), None)
    with evaluating(module):
        assert module.predict_step(batch, 0) == module.translate([text])


def test_without_vocabularies_text_is_refused_in_words():
    module = make()
    batch = TranslationBatch(torch.tensor([[4, EOS]]), None, torch.tensor([0]), None)
    calls = (
        lambda: module.translate(["eins"]),
        lambda: module.score(["eins"], ["one"]),
        lambda: module.sample(["eins"]),
        lambda: module.plot_attention("eins", "one"),
        lambda: trainer().predict(module, loader([batch])),
    )
    for call in calls:
        with pytest.raises(RuntimeError, match=r"`vocabularies` to be known, from a checkpoint.*got None"):
            call()


# -- checkpoints -------------------------------------------------------------------------------------------------------

ALONE = """
import json, sys
from lightning_rectify.modules import Translator
module = Translator.load_from_checkpoint(sys.argv[1])
result = [module.translate(json.loads(sys.argv[2])), [one.model.hex() for one in module.vocabularies]]
print("RESULT" + json.dumps(result))
"""


def test_a_checkpoint_alone_translates_in_a_new_process(trained, tmp_path):
    module, _, path = trained
    texts = [GERMAN[20], "", GERMAN[7]]
    done = subprocess.run(
        [sys.executable, "-c", ALONE, str(path), json.dumps(texts)],
        capture_output=True, text=True, cwd=tmp_path, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("RESULT")]
    translations, models = json.loads(line.removeprefix("RESULT"))
    assert translations == module.translate(texts)
    assert models == [vocabulary.model.hex() for vocabulary in module.vocabularies]


def test_separate_vocabularies_in_a_checkpoint():
    module, data = make(target_vocab_size=80), numbers(target_vocab_size=80)
    fit = trainer(max_steps=2, limit_val_batches=0)
    fit.fit(module, data)
    fit.save_checkpoint("two.ckpt")
    loaded = Translator.load_from_checkpoint("two.ckpt")
    assert loaded.vocabularies == module.vocabularies == data.vocabularies
    assert [len(vocabulary) for vocabulary in loaded.vocabularies] == [100, 80]
    assert loaded.translate(GERMAN[:5]) == module.translate(GERMAN[:5])
    assert torch.equal(loaded.score(["eins"], ["one"]), module.score(["eins"], ["one"]))


def test_the_command_line_translates_a_file_in_its_order(trained, monkeypatch):
    """A checkpoint of ``fit``, then ``predict`` from a file and from standard input."""
    files, common = trained[1].files, [
        "--model=lightning_rectify.Translator",
        *(f"--model.init_args.{key}={value}" for key, value in SMALL.items()),
        "--data=lightning_rectify.TranslationData",
        *("--trainer.accelerator=cpu", "--trainer.logger=false", "--trainer.enable_progress_bar=false"),
    ]  # fmt: skip
    main(
        [
            "fit",
            *common,
            "--model.init_args.optimizer=lightning_rectify.RectifiedAdam",
            "--model.init_args.optimizer.lr=0.01",
            "--data.init_args.dataset=files",
            f"--data.init_args.train={files['train']}",
            "--data.init_args.vocab_size=100",
            "--data.init_args.batch_size=20",
            "--trainer.max_steps=150",
            "--trainer.callbacks=ModelCheckpoint",
            "--trainer.callbacks.dirpath=saved",
            "--trainer.callbacks.filename=last",
        ]
    )
    module = Translator.load_from_checkpoint("saved/last.ckpt")
    lines = [GERMAN[70], GERMAN[1], "", GERMAN[33], GERMAN[1], GERMAN[98]]
    expected = module.translate(lines)
    assert expected[2] == ""
    assert len(set(expected)) > 3  # or their order could not be seen
    text = "".join(f"{line}\n" for line in lines).encode()
    Path("new.de").write_bytes(text)
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(text), encoding="latin-1"))
    for name in ("new.de", "-"):
        main(
            [
                "predict",
                *common,
                "--ckpt_path=saved/last.ckpt",
                f"--trainer.default_root_dir=of_{len(name)}",  # the configuration is kept there, once
                f"--data.init_args.predict={name}",
                "--data.init_args.eval_batch_size=4",
                "--trainer.callbacks=lightning_rectify.callbacks.TranslationWriter",
                "--trainer.callbacks.init_args.output=out/new.en",
            ]
        )
        assert Path("out/new.en").read_text(encoding="utf-8").split("\n") == [*expected, ""]
        Path("out/new.en").unlink()


# -- set up ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("of_module", "of_data", "message"),
    [
        ({"vocab_size": 90}, {}, "`vocab_size` of Translator to be 100.*TranslationData.*got 90"),
        ({}, {"target_vocab_size": 80}, "`target_vocab_size` of Translator to be 80.*TranslationData.*got None"),
        ({"target_vocab_size": 80}, {}, "`target_vocab_size` of Translator to be None.*TranslationData.*got 80"),
    ],
)
def test_vocabularies_of_other_sizes_are_refused_with_both_numbers(of_module, of_data, message):
    with pytest.raises(ValueError, match=message):
        trainer(max_steps=1).fit(make(**of_module), numbers(**of_data))


def test_a_short_beta2_without_warmup_is_warned_of_where_it_fails():
    def configure(norm="post", lr_scheduler=None, optimizer=RectifiedAdam, beta2=0.98):
        make(
            norm=norm, lr_scheduler=lr_scheduler, optimizer=partial(optimizer, betas=(0.9, beta2))
        ).configure_optimizers()

    with pytest.warns(UserWarning, match=r"beta2 = 0\.98.*about 100 steps.*post-norm"):
        configure()
    warmup = partial(LambdaLR, lr_lambda=lambda step: min(1.0, step / 100))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for options in ({"beta2": 0.999}, {"norm": "pre"}, {"lr_scheduler": warmup}, {"optimizer": torch.optim.Adam}):
            configure(**options)


@pytest.mark.parametrize(
    ("options", "matrices"),
    [
        ({}, ["encoder.embedding.tokens"]),  # tied: one for source, target and softmax
        ({"target_vocab_size": 80}, ["encoder.embedding.tokens", "decoder.embedding.tokens"]),
        ({"network_args": {"tied": False}}, ["encoder.embedding.tokens", "decoder.embedding.tokens"]),
        (
            {"network_args": {"positions": "learned", "max_length": 50}},
            ["encoder.embedding.tokens", "encoder.embedding.places", "decoder.embedding.places"],
        ),
    ],
)
def test_the_embeddings_are_a_group_of_their_own(options, matrices):
    module = make(**options)
    groups = {group["name"]: [id(p) for p in group["params"]] for group in module.configure_optimizers().param_groups}
    names = {id(parameter): name for name, parameter in module.network.named_parameters()}  # shared ones once
    assert groups.keys() == {"model", "embedding"}
    assert sorted(names[one] for one in groups["embedding"]) == sorted(f"{matrix}.weight" for matrix in matrices)
    assert sorted(names[one] for group in groups.values() for one in group) == sorted(names.values())


# -- evaluation --------------------------------------------------------------------------------------------------------


def test_validation_does_not_depend_on_the_batch_size(trained):
    module, data, _ = trained
    files = {part: data.files[part] for part in ("train", "val", "test")}
    values, answers = [], []
    for size in (200, 64, 7):
        part = TranslationData("files", **files, val_size=99, test_size=60, vocab_size=100, eval_batch_size=size)
        values.append(trainer().validate(module, part, verbose=False)[0])
        predicted = trainer().predict(module, part)
        index = [int(i) for batch in part.predict_dataloader() for i in batch.index]
        texts = dict(zip(index, (text for batch in predicted for text in batch), strict=True))
        answers.append([texts[i] for i in range(60)])
    assert answers[0] == answers[1] == answers[2] == module.translate(GERMAN[:60])
    for other in values[1:]:
        # Texts are equal; 1e-6 of the likelihood: float32, and kernels may differ with the batch.
        assert other == pytest.approx(values[0], rel=1e-6, abs=1e-6)
    batches = TranslationData("files", **files, val_size=99, vocab_size=100, eval_batch_size=40)
    batches.setup("validate")
    batches._vocabularies = module.vocabularies
    plain = copy.deepcopy(module).double().eval()
    with torch.no_grad():
        sums = [(token_sum(plain, batch).item(), tokens(batch)) for batch in batches.val_dataloader()]
    expected = sum(total for total, _ in sums) / sum(count for _, count in sums)
    assert values[0]["val/nll"] == pytest.approx(expected, rel=1e-5)  # float32 against float64


def test_validate_then_fit_then_validate():
    """Metrics that were used in inference mode go on."""
    module, data = make(optimizer=partial(RectifiedAdam, lr=0.01)), numbers()
    names = {f"val/{name}" for name in ("nll", "bleu", "chrf", "exact_match")}
    before = trainer().validate(module, data, verbose=False)[0]
    assert names <= before.keys()
    assert before["val/nll"] > math.log(100) - 0.5  # knows nothing
    fit = trainer(max_epochs=2)
    fit.fit(module, data)
    after = trainer().validate(module, data, verbose=False)[0]
    assert {name: fit.callback_metrics[name].item() for name in names} == {name: after[name] for name in names}
    assert after["val/nll"] < before["val/nll"]


def test_without_references_there_is_only_the_likelihood():
    batches = unequal_batches()
    module = make()
    module.vocabularies = (Vocabulary.train(GERMAN, 60),) * 2
    expected = sum(token_sum(module, batch).item() for batch in batches) / tokens(*batches)
    for test in (False, True):
        run = trainer().test if test else trainer().validate
        values = run(module, loader(batches), verbose=False)[0]
        assert values == {f"{'test' if test else 'val'}/nll": pytest.approx(expected, rel=1e-5)}  # float32 sums
    silent = make(val_translations=False)
    assert trainer().validate(silent, numbers(), verbose=False)[0].keys() == {"val/nll"}
    assert trainer().test(silent, numbers(), verbose=False)[0].keys() >= {"test/nll", "test/bleu"}
