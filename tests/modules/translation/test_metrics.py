"""Metrics of translations against sacreBLEU and plain sums."""

import random

import pytest
import sacrebleu
import torch

from lightning_rectify.modules.translation.metrics import TranslationMetrics

WORDS = ["the", "The", "dog", "Hund", "läuft", "runs", "3.5", "1,000", "can't", "end.", "well-known", "(so)", "ß", "?!"]


def corpus(seed, lengths):
    """Random lines of these numbers of words, and versions of them with words swapped, lost and doubled."""
    rng = random.Random(seed)
    references = [" ".join(rng.choices(WORDS, k=length)) for length in lengths]
    hypotheses = []
    for line in references:
        words = [rng.choice(WORDS) if rng.random() < 0.2 else word for word in line.split()]
        words = [word for word in words for _ in range(rng.choice([0, 1, 1, 1, 1, 1, 1, 2]))]
        hypotheses.append(line if rng.random() < 0.2 else " ".join(words))
    return hypotheses, references


def measured(hypotheses, references, cuts=()):
    """Through batches that end at ``cuts``, with one token of likelihood each."""
    metrics = TranslationMetrics()
    for start, end in zip((0, *cuts), (*cuts, len(references)), strict=True):
        metrics.update(torch.tensor(1.0), torch.tensor(1), hypotheses[start:end], references[start:end])
    return metrics.compute()


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("lengths", [range(1, 40), [2, 30, 9, 5, 4, 17], [1, 2, 1, 3, 2]], ids=["any", "few", "short"])
def test_bleu_and_chrf_are_sacrebleus_in_unequal_batches(seed, lengths):
    hypotheses, references = corpus(seed, lengths)
    found = measured(hypotheses, references, cuts=(1, 4))
    bleu = sacrebleu.corpus_bleu(hypotheses, [references], smooth_method="none").score  # cased, tokenised by 13a
    chrf = sacrebleu.corpus_chrf(hypotheses, [references]).score
    # 1e-4 of 100: torchmetrics computes in float32.
    assert found["bleu"].item() == pytest.approx(bleu, abs=1e-4)
    assert found["chrf"].item() == pytest.approx(chrf, abs=1e-4)


def test_sentences_that_share_nothing_with_their_reference_count():
    hypotheses, references = ["the dog runs", "", "xyzxyz"], ["the dog runs", "a cat sleeps", "a cat"]
    chrf = sacrebleu.corpus_chrf(hypotheses, [references]).score
    assert measured(hypotheses, references, cuts=(2,))["chrf"].item() == pytest.approx(chrf, abs=1e-4)
    assert chrf < 60
    assert measured(["xyz", ""], ["abc", "abc"])["chrf"].item() == 0


def test_case_counts_and_a_perfect_corpus_has_100():
    _, references = corpus(0, range(5, 15))
    perfect = measured(references, references)
    assert {name: round(value.item(), 4) for name, value in perfect.items() if name != "nll"} == {
        "bleu": 100.0,
        "chrf": 100.0,
        "exact_match": 100.0,
    }
    lowered = [line.lower() for line in references]
    assert lowered != references
    found = measured(lowered, references)
    assert found["bleu"].item() == pytest.approx(
        sacrebleu.corpus_bleu(lowered, [references], smooth_method="none").score, abs=1e-4
    )
    assert found["bleu"] < 99


def test_exact_match_is_the_share_of_equal_lines():
    hypotheses = ["a b", "a  b", " a b ", "A b", "", "c"]
    references = ["a b", "a b", "a b", "a b", "x", "c\n"]  # white space around a line does not count, inside it does
    assert measured(hypotheses, references, cuts=(1, 2))["exact_match"].item() == pytest.approx(100 * 3 / 6)


def test_nll_is_weighted_by_tokens():
    rng = random.Random(0)
    tokens = [1, 500, 3, 40, 2000]
    sums = [rng.uniform(0.1, 9.0) * count for count in tokens]
    metrics = TranslationMetrics()
    for total, count in zip(sums, tokens, strict=True):
        metrics.update(torch.tensor(total), torch.tensor(count), None, None)
    # 1e-6: float32.
    assert metrics.compute()["nll"].item() == pytest.approx(sum(sums) / sum(tokens), rel=1e-6)
    means = [total / count for total, count in zip(sums, tokens, strict=True)]
    assert abs(sum(means) / len(means) - sum(sums) / sum(tokens)) > 0.01  # the test sees the weights


def test_without_translations_there_is_only_the_likelihood_and_reset_forgets():
    metrics = TranslationMetrics()
    metrics.update(torch.tensor(6.0), torch.tensor(3), ["a b c d e"], None)
    metrics.update(torch.tensor(6.0), torch.tensor(3), None, ["a b c d e"])
    assert set(metrics.compute()) == {"nll"}
    metrics.update(torch.tensor(6.0), torch.tensor(3), ["a b c d e"], ["a b c d e"])
    assert set(metrics.compute()) == {"nll", "bleu", "chrf", "exact_match"}
    metrics.reset()
    metrics.update(torch.tensor(8.0), torch.tensor(2), None, None)
    assert {name: value.item() for name, value in metrics.compute().items()} == {"nll": 4.0}
    metrics.update(torch.tensor(8.0), torch.tensor(2), ["a b c d x"], ["x b c d e"])
    bleu = sacrebleu.corpus_bleu(["a b c d x"], [["x b c d e"]], smooth_method="none").score
    assert metrics.compute()["bleu"].item() == pytest.approx(bleu, abs=1e-4)


def test_tensors_of_inference_mode_do_not_outlive_a_reset():
    """After ``Trainer.validate`` a fit goes on with the metrics."""
    metrics = TranslationMetrics()
    with torch.inference_mode():
        metrics.update(torch.tensor(6.0), torch.tensor(3), ["a b"], ["a b"])
        metrics.compute()
        metrics.reset()
    parts = (metrics.nll, metrics.bleu, metrics.chrf, metrics.exact_match)
    states = [value for part in parts for value in part.metric_state.values() if isinstance(value, torch.Tensor)]
    assert len(states) >= 5
    assert not any(state.is_inference() for state in states)
    metrics.update(torch.tensor(6.0), torch.tensor(2), ["a b"], ["a c"])
    assert metrics.compute()["nll"].item() == 3.0
