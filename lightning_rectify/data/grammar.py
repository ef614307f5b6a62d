"""A small English of known entropy: text that needs no file and no licence, and says how well it can be predicted.

Sentences are drawn from a probabilistic context-free grammar written for this package. A verb agrees in number with a
noun that may be a whole relative clause away, which no count of neighbouring words sees. Each sentence has one
derivation, so that its probability is the product of its rules' and the entropy of the sentences that of the
derivations; both are closed forms.
"""

import math
from collections.abc import Iterator
from functools import cache
from typing import NamedTuple

import numpy as np

from lightning_rectify.arguments import check_choice, check_least

PARTS = ("train", "val", "test")

_TEST_SEED = 20190808  # the test part is the same whatever the seed, so that perplexities can be compared
_BLOCK = 4096  # random numbers drawn at once

_SINGULAR, _PLURAL = "singular", "plural"
_NOUNS = (
    "dog cat horse bird farmer teacher doctor painter sailor baker child king queen lawyer singer tailor monk pilot "
    "guest clerk nurse cook miller hunter shepherd poet judge soldier neighbour stranger robot wizard gardener "
    "captain student driver writer dancer player swimmer"
)
_TRANSITIVE = "see hear follow know find admire help visit remember trust draw call"
_INTRANSITIVE = "sing sleep run laugh wait dream smile work walk listen"
_ADJECTIVES = "old young tall quiet clever brave gentle hungry lucky tired strange proud"
_ADVERBS = "often slowly quietly today again outside happily loudly"
_DETERMINERS = {_SINGULAR: "the a this every", _PLURAL: "the some these many"}
_IRREGULAR = {"child": "children"}


class Rule(NamedTuple):
    """One way to replace a symbol.

    Attributes:
        probability: of this way, in (0, 1]; those of a symbol sum to 1.
        symbols: what comes in its place, from left to right: symbols of the grammar, and else words.
    """

    probability: float
    symbols: tuple[str, ...]


@cache
def grammar() -> dict[str, tuple[Rule, ...]]:
    """Symbols and their rules; "sentence" is what all others come from."""
    rules = {"sentence": _weighted({"clause singular": 0.6, "clause plural": 0.4})}
    for number in (_SINGULAR, _PLURAL):
        rules[f"clause {number}"] = (Rule(1.0, (f"phrase {number}", f"predicate {number}")),)
        head = (f"determiner {number}", f"noun {number}")
        rules[f"phrase {number}"] = (
            Rule(0.5, head),
            Rule(0.25, (head[0], "adjective", head[1])),
            Rule(0.25, (*head, "that", f"predicate {number}")),
        )
        # Adverbs behind intransitive verbs only: behind an object with a clause, they would belong to either verb.
        rules[f"predicate {number}"] = (
            Rule(0.35, (f"intransitive {number}",)),
            Rule(0.15, (f"intransitive {number}", "adverb")),
            Rule(0.3, (f"transitive {number}", "phrase singular")),
            Rule(0.2, (f"transitive {number}", "phrase plural")),
        )
        rules[f"determiner {number}"] = _by_rank(_DETERMINERS[number].split())
        rules[f"noun {number}"] = _by_rank([_noun(word, number) for word in _NOUNS.split()])
        for kind, verbs in (("transitive", _TRANSITIVE), ("intransitive", _INTRANSITIVE)):
            rules[f"{kind} {number}"] = _by_rank([word + "s" * (number == _SINGULAR) for word in verbs.split()])
    rules["adjective"], rules["adverb"] = _by_rank(_ADJECTIVES.split()), _by_rank(_ADVERBS.split())
    return rules


def words() -> list[str]:
    """All words of the grammar, none twice, in the order of the alphabet."""
    rules = grammar()
    found = {symbol for ways in rules.values() for rule in ways for symbol in rule.symbols if symbol not in rules}
    return sorted(found)


def sentences(part: str, size: int, seed: int = 0) -> list[str]:
    """Draw the sentences of a part, independently of each other.

    A shorter part is the beginning of a longer one.

    Args:
        part: "train", "val" or "test".
        size: number N of sentences, at least 0.
        seed: of the draw, at least 0; the test part is the same for each.

    Returns:
        N sentences, words with blanks between them.

    Raises:
        ValueError: for an argument outside its range.
    """
    check_choice(PARTS, part=part)
    check_least(0, size=size, seed=seed)
    numbers = _uniform([_TEST_SEED if part == "test" else seed, PARTS.index(part)])
    return [" ".join(_derive(numbers)) for _ in range(size)]


def entropy() -> float:
    r"""Entropy of a sentence, in nats.

    With :math:`h_A` the entropy of the choice among the rules of symbol A, and :math:`M_{AB}` how often B stands in
    them on average, the entropies of what the symbols become are :math:`H = (I - M)^{-1} h` (Grenander 1967; Chi 1999,
    "Statistical properties of probabilistic context-free grammars").
    """
    return _solve({name: -sum(p * math.log(p) for p, _ in ways) for name, ways in grammar().items()})


def mean_length() -> float:
    """Expected number of words of a sentence, its end not among them; by the same equations as :func:`entropy`."""
    rules = grammar()
    return _solve({
        name: sum(p * sum(symbol not in rules for symbol in symbols) for p, symbols in ways)
        for name, ways in rules.items()
    })  # fmt: skip


def best_perplexity() -> float:
    """Perplexity of the grammar itself, sentence ends counted as words: in expectation, no model's is lower.

    A sentence with its end is told by its derivation and tells it, so that both have one entropy.
    """
    return math.exp(entropy() / (mean_length() + 1))


def _solve(local: dict[str, float]) -> float:
    """Expected sum over a derivation of what each symbol in it contributes."""
    rules = grammar()
    place = {name: i for i, name in enumerate(rules)}
    means = np.zeros((len(rules), len(rules)))
    for name, ways in rules.items():
        for probability, symbols in ways:
            for symbol in symbols:
                if symbol in place:
                    means[place[name], place[symbol]] += probability
    total = np.linalg.solve(np.eye(len(rules)) - means, np.array([local[name] for name in rules]))
    return float(total[place["sentence"]])


def _derive(numbers: Iterator[float]) -> Iterator[str]:
    """Words of one sentence."""
    rules, open_symbols = grammar(), ["sentence"]
    while open_symbols:
        symbol = open_symbols.pop()
        if symbol in rules:
            open_symbols += reversed(_choose(rules[symbol], next(numbers)))
        else:
            yield symbol


def _choose(ways: tuple[Rule, ...], number: float) -> tuple[str, ...]:
    for probability, symbols in ways:
        number -= probability
        if number < 0:
            return symbols
    return ways[-1].symbols  # probabilities that sum to a rounding below 1


def _uniform(seed: list[int]) -> Iterator[float]:
    rng = np.random.default_rng(seed)
    while True:
        yield from rng.random(_BLOCK).tolist()


def _weighted(weights: dict[str, float]) -> tuple[Rule, ...]:
    total = sum(weights.values())
    return tuple(Rule(weight / total, (word,)) for word, weight in weights.items())


def _by_rank(found: list[str]) -> tuple[Rule, ...]:
    """Zipf's law: the k-th word as often as 1 / k."""
    return _weighted({word: 1 / rank for rank, word in enumerate(found, start=1)})


def _noun(word: str, number: str) -> str:
    return word if number == _SINGULAR else _IRREGULAR.get(word, f"{word}s")
