"""``LanguageModel``: a recurrent network that predicts the next word, trained with a carried state."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics import MeanMetric

from lightning_rectify.arguments import check_least, check_types
from lightning_rectify.modules.base import RectifiedModule
from lightning_rectify.modules.language_model.networks import LSTMNetwork
from lightning_rectify.modules.language_model.states import CarriedStates, of_all_ranks
from lightning_rectify.nn.modes import evaluating
from lightning_rectify.words import END, IGNORED, UNKNOWN, TextBatch, WordVocabulary, sentence_batch

_VOCABULARY = "lightning_rectify_words"
_STATES = "lightning_rectify_carried_states"


class LanguageModel(RectifiedModule):
    """Next words by stacked LSTMs with an adaptive softmax (arXiv:1908.03265, section 5.1, Figure 4).

    A batch is a :class:`~lightning_rectify.words.TextBatch`. Gradients go back to the beginning of a batch's window;
    the state of the network goes on to the next window of the same streams, and is zero where streams begin: it is not
    reset within an epoch. States are part of the checkpoint, stream by stream, so that a run resumes in the middle of
    an epoch bit for bit, on another number of ranks with the same streams too. Evaluation carries a state of its own.

    Checkpoints hold the vocabulary, so that one file scores and writes::

        LanguageModel.load_from_checkpoint("last.ckpt").score(["the dogs that see a cat run"])

    Logged: ``train/loss``, nats a word, and ``train/perplexity`` at each step; ``val/loss`` and ``val/perplexity``, its
    exponential, over all words of the part on all ranks, sentence ends among them; the same for ``test/``.

    Prediction gives the log-probability of each sentence, as :meth:`score` does.

    Args:
        vocab_size: number of words, as the data's vocabulary has them, at least 3.
        embedding_size: features of a word's embedding.
        hidden_size: features of each LSTM layer.
        layers: number of LSTM layers.
        dropout: on embeddings and on each layer's outputs, in [0, 1).
        cutoffs: where the clusters of the adaptive softmax begin, in words by frequency; at least one, each in 1 to
            ``vocab_size - 1``, rising.
        div_value: by how much the features of each cluster are narrower than the one's before.
        **kwargs: of :class:`RectifiedModule`: ``optimizer``, ``lr_scheduler``, ``lr_scheduler_interval``, ``compile``.

    Attributes:
        vocabulary: None until data or checkpoint give it.

    Raises:
        ValueError: for an argument outside its range; when a run starts, if the datamodule's vocabulary has another
            size.
    """

    vocabulary: WordVocabulary | None

    def __init__(
        self,
        vocab_size: int = 154,
        embedding_size: int = 64,
        hidden_size: int = 128,
        layers: int = 2,
        dropout: float = 0.1,
        cutoffs: Sequence[int] = (40, 90),
        div_value: float = 4.0,
        **kwargs: Any,
    ) -> None:
        check_types(LanguageModel, locals())
        super().__init__(**kwargs)
        self.network = LSTMNetwork(vocab_size, embedding_size, hidden_size, layers, dropout, cutoffs, div_value)
        self.vocab_size = vocab_size
        self.vocabulary = None
        self.val_nll, self.test_nll = MeanMetric(), MeanMetric()
        self._states, self._evaluated = CarriedStates(), CarriedStates()
        self._saved: Tensor | None = None  # states of all streams, loaded before training starts
        self.example_input_array = torch.tensor([[END, 2, UNKNOWN, 2], [2, END, 2, UNKNOWN]])

    # -- hooks ---------------------------------------------------------------------------------------------------------

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Embeddings, LSTMs and softmax apart: the gradients of rare words are few, and none of the LSTMs'."""
        parts = {
            "model": self.network.recurrent.layers,
            "embedding": self.network.recurrent.embedding,
            "softmax": self.network.softmax,
        }
        groups = {name: [p for p in part.parameters() if p.requires_grad] for name, part in parts.items()}
        return [{"name": name, "params": parameters} for name, parameters in groups.items() if parameters]

    def networks(self) -> list[nn.Module]:
        """What ``compile`` compiles: the LSTMs and the softmax, for training."""
        return [self.network.recurrent, self.network.softmax]

    def setup(self, stage: str) -> None:
        """Take the datamodule's vocabulary for training; that of a checkpoint comes after and replaces it."""
        if stage == "fit":
            self._adopt_vocabulary()

    def on_validation_start(self) -> None:
        """Without a checkpoint, the datamodule's vocabulary."""
        self._adopt_vocabulary()

    def on_test_start(self) -> None:
        """Without a checkpoint, the datamodule's vocabulary."""
        self._adopt_vocabulary()

    def on_predict_start(self) -> None:
        """Without a checkpoint, the datamodule's vocabulary."""
        self._adopt_vocabulary()

    def _adopt_vocabulary(self) -> None:
        datamodule = getattr(self.trainer, "datamodule", None)
        if self.vocabulary is not None or (found := getattr(datamodule, "vocabulary", None)) is None:
            return
        if len(found) != self.vocab_size:
            raise ValueError(
                f"Expected argument `vocab_size` of {type(self).__name__} to be {len(found)}, as the vocabulary of the "
                f"datamodule {type(datamodule).__name__} is, but got {self.vocab_size}."
            )
        self.vocabulary = found

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the vocabulary, and the states of all streams."""
        super().on_save_checkpoint(checkpoint)
        if self.vocabulary is not None:
            checkpoint[_VOCABULARY] = list(self.vocabulary.words)
        states = self._states.pending if self._saved is None else self._saved  # loaded, and no step taken since
        if states is None and (local := self._states.local()) is not None:
            ranks = self.trainer.world_size
            states = of_all_ranks(torch.as_tensor(self.all_gather(local))) if ranks > 1 else local
        if states is not None:
            checkpoint[_STATES] = states.cpu()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take the vocabulary that the weights belong to; keep the states until training goes on."""
        super().on_load_checkpoint(checkpoint)
        if words := checkpoint.get(_VOCABULARY):
            self.vocabulary = WordVocabulary(words)
        self._saved = checkpoint.get(_STATES)

    # -- training ------------------------------------------------------------------------------------------------------

    def forward(self, tokens: Tensor) -> Tensor:
        """Log-probabilities (B, T, V) of the word after each of ``tokens`` (B, T), which begin a text."""
        return self.network(tokens)

    def on_train_start(self) -> None:
        """Begin with no state, or with those of the checkpoint."""
        super().on_train_start()
        self._states = CarriedStates(self.global_rank, self.trainer.world_size)
        saved, self._saved = self._saved, None
        if saved is not None:
            self._states.restore(saved)

    def training_step(self, batch: TextBatch, batch_idx: int) -> Tensor:
        """Mean loss of the batch's words; logs ``train/loss`` and ``train/perplexity``."""
        losses = self._losses(batch, self._states)
        loss = losses.mean()
        self.log("train/loss", loss.detach(), prog_bar=True, batch_size=len(losses))
        self.log("train/perplexity", loss.detach().exp(), batch_size=len(losses))
        return loss

    def on_after_backward(self) -> None:
        """The batch's loss was good: its state is the next one's."""
        self._states.commit()

    def _losses(self, batch: TextBatch, states: CarriedStates) -> Tensor:
        """Negative log-likelihood of the batch's M words, shape (M,); ``states`` keep what comes after."""
        features, state = self.network.recurrent(batch.tokens, states.before(batch))
        states.after(batch, state)
        real = batch.targets != IGNORED
        return self.network.softmax(features[real], batch.targets[real])

    # -- evaluation ----------------------------------------------------------------------------------------------------

    def validation_step(self, batch: TextBatch, batch_idx: int) -> None:
        """Feed the mean over words."""
        self._evaluate(batch, self.val_nll)

    def test_step(self, batch: TextBatch, batch_idx: int) -> None:
        """Feed the mean over words."""
        self._evaluate(batch, self.test_nll)

    def on_validation_epoch_end(self) -> None:
        """Log ``val/...``."""
        self._log_mean("val", self.val_nll)

    def on_test_epoch_end(self) -> None:
        """Log ``test/...``."""
        self._log_mean("test", self.test_nll)

    def predict_step(self, batch: TextBatch, batch_idx: int, dataloader_idx: int = 0) -> Tensor:
        """Log-probability (natural logarithm) of each sentence of the batch, float64, shape (B,)."""
        return self._sentence_scores(batch)

    def _evaluate(self, batch: TextBatch, mean: MeanMetric) -> None:
        losses = self._losses(batch, self._evaluated)
        self._evaluated.commit()
        mean.update(losses)

    def _log_mean(self, stage: str, mean: MeanMetric) -> None:
        if not self.trainer.sanity_checking:
            loss = mean.compute()
            self.log(f"{stage}/loss", loss)
            self.log(f"{stage}/perplexity", loss.exp(), prog_bar=True)
        with torch.inference_mode(False):  # after `Trainer.validate` a fit goes on with these tensors
            mean.reset()

    # -- text ----------------------------------------------------------------------------------------------------------

    def score(self, texts: Sequence[str], batch_size: int = 64) -> Tensor:
        """Log-probability (natural logarithm) of each text as a whole sentence, its end included.

        The perplexity of texts is the exponential of minus the sum of their scores over their words and ends. A word
        that is not in the vocabulary counts as the unknown word.

        Args:
            texts: sentences, words with white space between them; an empty one is a sentence without words.
            batch_size: sentences scored at a time, at least 1.

        Returns:
            Float64, shape (N,).

        Raises:
            RuntimeError: if the module has no vocabulary yet.
            ValueError: for a ``batch_size`` below 1.
        """
        check_least(1, batch_size=batch_size)
        encoded = [self._words().encode(text) for text in texts]
        order = sorted(range(len(encoded)), key=lambda i: -len(encoded[i]))  # like lengths together
        scores = torch.zeros(len(encoded), dtype=torch.float64)
        for start in range(0, len(order), batch_size):
            part = order[start : start + batch_size]
            batch = sentence_batch([encoded[i] for i in part])
            batch = batch._replace(tokens=batch.tokens.to(self.device), targets=batch.targets.to(self.device))
            with evaluating(self):
                scores[part] = self._sentence_scores(batch)
        return scores

    def generate(
        self,
        prompt: str = "",
        length: int = 50,
        temperature: float = 1.0,
        seed: int = 0,
        allow_unknown: bool = False,
    ) -> str:
        """Write on behind a prompt, which begins a sentence.

        Args:
            prompt: words with white space between them, perhaps none.
            length: number of words to write, sentence ends among them, at least 0.
            temperature: by which log-probabilities are divided before a word is drawn, at least 0; 0 takes the most
                probable word.
            seed: of the draw.
            allow_unknown: whether the unknown word may be written.

        Returns:
            The prompt and what comes after it, a line a sentence.

        Raises:
            RuntimeError: if the module has no vocabulary yet.
            ValueError: for an argument outside its range.
        """
        check_least(0, length=length)
        if not (temperature >= 0 and math.isfinite(temperature)):
            raise ValueError(f"Expected argument `temperature` to be at least 0 and finite but got {temperature!r}.")
        vocabulary = self._words()
        written = vocabulary.encode(prompt)
        # On the CPU: a seed then writes the same text on every device, but for rounding.
        generator = torch.Generator().manual_seed(seed)
        tokens, state = torch.tensor([[END, *written]], device=self.device), None
        with evaluating(self):
            for _ in range(length):
                features, state = self.network.recurrent(tokens, state)
                logs = self.network.softmax.log_prob(features[0, -1:])[0].double().cpu()
                if not allow_unknown:
                    logs[UNKNOWN] = -math.inf
                if temperature == 0:
                    chosen = int(logs.argmax())
                else:
                    chosen = int((logs / temperature).softmax(0).multinomial(1, generator=generator))
                written.append(chosen)
                tokens = torch.tensor([[chosen]], device=self.device)
        return vocabulary.decode(written)

    def _sentence_scores(self, batch: TextBatch) -> Tensor:
        features, _ = self.network.recurrent(batch.tokens)
        real = batch.targets != IGNORED
        scores = torch.zeros(batch.targets.shape, dtype=torch.float64)  # not all devices have float64
        scores[real.cpu()] = -self.network.softmax(features[real], batch.targets[real]).cpu().double()
        return scores.sum(dim=1)

    def _words(self) -> WordVocabulary:
        if self.vocabulary is None:
            raise RuntimeError(
                "Expected `vocabulary` to be known, from a checkpoint, a fit or by hand, before text is read or "
                "written but got None."
            )
        return self.vocabulary
