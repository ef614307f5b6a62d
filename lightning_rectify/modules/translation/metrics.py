"""What translations are measured by: likelihood, BLEU, chrF, exact match."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torchmetrics import MeanMetric
from torchmetrics.text import CHRFScore, SacreBLEUScore

#: How ``bleu`` and ``chrf`` are computed, in sacreBLEU's words; ``smooth:none`` differs from its default, and in the
#: number only where a whole corpus has no match of some order.
BLEU_SIGNATURE = "nrefs:1|case:mixed|tok:13a|smooth:none"
CHRF_SIGNATURE = "nrefs:1|case:mixed|nc:6|nw:0|space:no"


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
        self.chrf = CHRFScore(n_word_order=0)
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
        targets = [[line] for line in references]
        self.bleu.update(translations, targets)
        self.chrf.update(translations, targets)
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
