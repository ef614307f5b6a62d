"""What translations are measured by: likelihood, BLEU, chrF, exact match."""

from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torchmetrics import MeanMetric, Metric
from torchmetrics.text import SacreBLEUScore

#: How ``bleu`` and ``chrf`` are computed, in sacreBLEU's words; ``smooth:none`` differs from its default, and in the
#: number only where a whole corpus has no match of some order.
BLEU_SIGNATURE = "nrefs:1|case:mixed|tok:13a|smooth:none"
CHRF_SIGNATURE = "nrefs:1|case:mixed|nc:6|nw:0|space:no"

_ORDERS = range(1, 7)
_BETA = 2  # recall counts twice as much as precision


class CorpusChrF(Metric):
    """chrF of a corpus (Popović 2015, W15-3049), as sacreBLEU computes it, from 0 to 1.

    N-grams of 1 to 6 characters without white space are counted over all sentences. Precision and recall are averaged
    over the orders that both sides have, and then combined. (torchmetrics averages the F-score of each order, and drops
    sentences that share nothing with their reference.)
    """

    full_state_update = False
    counts: Tensor  # for each order, n-grams of translations, of references, and in both

    def __init__(self) -> None:
        super().__init__()
        self.add_state("counts", torch.zeros(len(_ORDERS), 3, dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, translations: Sequence[str], references: Sequence[str]) -> None:
        """Add sentences, one reference for each."""
        counts = [[0, 0, 0] for _ in _ORDERS]
        for translation, reference in zip(translations, references, strict=True):
            for order, row in zip(_ORDERS, counts, strict=True):
                found, wanted = _ngrams(translation, order), _ngrams(reference, order)
                if wanted:  # a reference shorter than the n-gram says nothing about it
                    row[0] += found.total()
                    row[1] += wanted.total()
                    row[2] += (found & wanted).total()
        self.counts += torch.tensor(counts, device=self.counts.device)

    def compute(self) -> Tensor:
        """The F-score, float32, 0-d."""
        rows = [row for row in self.counts.tolist() if row[0] and row[1]]
        precision = sum(both / found for found, _, both in rows) / max(1, len(rows))
        recall = sum(both / wanted for _, wanted, both in rows) / max(1, len(rows))
        score = (1 + _BETA**2) * precision * recall / (_BETA**2 * precision + recall) if precision + recall else 0.0
        return torch.tensor(score, dtype=torch.float32, device=self.counts.device)


def _ngrams(text: str, order: int) -> Counter[str]:
    characters = "".join(text.split())
    return Counter(characters[i : i + order] for i in range(len(characters) - order + 1))


class TranslationMetrics(nn.Module):
    """Metrics over an evaluation, on all ranks together.

    Args:
        texts: whether translations are compared with references, or the likelihood alone is measured.
    """

    def __init__(self, texts: bool = True) -> None:
        super().__init__()
        self.texts = texts
        self.nll = MeanMetric()
        self.bleu = SacreBLEUScore(tokenize="13a")
        self.chrf = CorpusChrF()
        self.exact_match = MeanMetric()
        self._compared = False

    def update(
        self, nll: Tensor, tokens: Tensor, translations: Sequence[str] | None, references: Sequence[str] | None
    ) -> None:
        """Add a batch.

        Args:
            nll: sum of the negative log-likelihood over the target's tokens.
            tokens: their number.
            translations: detokenised; None to measure the likelihood alone.
            references: raw lines, one a translation.
        """
        self.nll.update(nll / tokens, weight=tokens)
        if translations is None or references is None:
            return
        self._compared = True
        self.bleu.update(translations, [[line] for line in references])
        self.chrf.update(translations, references)
        equal = [float(a.strip() == b.strip()) for a, b in zip(translations, references, strict=True)]
        self.exact_match.update(torch.tensor(equal, device=tokens.device))

    def compute(self) -> dict[str, Tensor]:
        """``nll``, nats a token; ``bleu``, ``chrf`` and ``exact_match``, 0 to 100, if there were translations."""
        values = {"nll": self.nll.compute()}
        if self._compared:
            compared = {"bleu": self.bleu, "chrf": self.chrf, "exact_match": self.exact_match}
            values |= {name: 100 * metric.compute() for name, metric in compared.items()}
        return values

    @torch.inference_mode(False)  # after `Trainer.validate` a fit goes on with these tensors
    def reset(self) -> None:
        """Forget all batches."""
        self._compared = False
        for metric in (self.nll, self.bleu, self.chrf, self.exact_match):
            metric.reset()
