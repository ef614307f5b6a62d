"""``Translator``: a Transformer that translates sentences, from text to text."""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lightning_rectify._lightning import rank_zero_warn
from lightning_rectify.arguments import check_fraction, check_least, check_types
from lightning_rectify.modules.base import RectifiedModule
from lightning_rectify.modules.translation.interface import TextInterface
from lightning_rectify.modules.translation.loss import linear_cross_entropy
from lightning_rectify.modules.translation.metrics import TranslationMetrics
from lightning_rectify.modules.translation.transformer import Transformer
from lightning_rectify.optim.rectified_adam import RectifiedAdam
from lightning_rectify.text import BOS, EOS, PAD, TranslationBatch, Vocabulary

if TYPE_CHECKING:
    from torch.optim.optimizer import Optimizer

_VOCABULARIES = "lightning_rectify_vocabularies"


class Translator(TextInterface, RectifiedModule):
    """Translation by an encoder-decoder Transformer (arXiv:1908.03265, section 5.3; arXiv:1706.03762).

    A batch is a :class:`~lightning_rectify.text.TranslationBatch`. The loss of an optimizer step is the mean over all
    target tokens that the step sees, on all ranks and in all accumulated batches, whatever their number in each.

    Checkpoints hold the vocabularies, so that one file translates::

        Translator.load_from_checkpoint("last.ckpt").translate(["Ein Hund läuft im Schnee."])

    Logged: ``train/loss`` (with smoothed labels) and ``train/nll`` at each step; ``val/nll``, nats a token, and
    ``val/bleu``, ``val/chrf``, ``val/exact_match``, in percent, of translations against the raw reference lines; the
    same for ``test/``. Validation translates greedily, test and prediction with a beam.

    Args:
        vocab_size: subwords of the source, and of the target where ``target_vocab_size`` is None, as the data have
            them.
        target_vocab_size: subwords of the target; None for one joint vocabulary.
        width: features D of a token.
        heads: attention heads; they share the width.
        feedforward: features inside a feed-forward layer.
        encoder_layers: at least 1.
        decoder_layers: at least 1.
        dropout: on embeddings and on each layer's outputs, in [0, 1).
        norm: "post" (the paper's; it is what fails without warmup) or "pre".
        network_args: further arguments of
            :class:`~lightning_rectify.modules.translation.transformer.Transformer`: ``attention_dropout``,
            ``activation_dropout``, ``positions``, ``max_length``, ``tied``.
        label_smoothing: probability taken from the true token and spread over all, in [0, 1); in ``train/loss`` only.
        beam_size: of test and prediction, at least 1; 1 is greedy.
        length_penalty: of the beam, the exponent of the length by which log-probabilities are divided.
        max_length_ratio: longest translation, as a multiple of the source's length, above 0; ten tokens are added.
        val_translations: whether to translate in validation: BLEU, chrF and exact match cost a decoding.
        **kwargs: of :class:`RectifiedModule`: ``optimizer``, ``lr_scheduler``, ``lr_scheduler_interval``, ``compile``.

    Attributes:
        vocabularies: source's and target's; None until data or checkpoint give them.

    Raises:
        ValueError: for an argument outside its range; in ``setup``, if the datamodule's vocabularies have other sizes.
    """

    def __init__(
        self,
        vocab_size: int = 400,
        target_vocab_size: int | None = None,
        width: int = 256,
        heads: int = 4,
        feedforward: int = 1024,
        encoder_layers: int = 3,
        decoder_layers: int = 3,
        dropout: float = 0.1,
        norm: str = "post",
        network_args: dict[str, Any] | None = None,
        label_smoothing: float = 0.1,
        beam_size: int = 5,
        length_penalty: float = 1.0,
        max_length_ratio: float = 2.0,
        val_translations: bool = True,
        **kwargs: Any,
    ) -> None:
        check_types(Translator, locals())
        super().__init__(**kwargs)
        check_fraction(label_smoothing=label_smoothing)
        if not -float("inf") < length_penalty < float("inf"):
            raise ValueError(f"Expected argument `length_penalty` to be a finite number but got {length_penalty}.")
        check_least(1, beam_size=beam_size)
        if not 0 < max_length_ratio < float("inf"):
            raise ValueError(f"Expected argument `max_length_ratio` to be above 0 but got {max_length_ratio}.")
        try:
            self.network = Transformer(
                vocab_size, target_vocab_size, width=width, heads=heads, feedforward=feedforward,
                encoder_layers=encoder_layers, decoder_layers=decoder_layers, dropout=dropout,
                norm=norm,  # type: ignore[arg-type]
                **(network_args or {}),
            )  # fmt: skip
        except TypeError as error:
            raise ValueError(
                f"Expected argument `network_args` to hold arguments of Transformer but got {network_args}: {error}."
            ) from error
        self.norm = norm
        self.vocab_size, self.target_vocab_size = vocab_size, target_vocab_size
        self.label_smoothing, self.val_translations = label_smoothing, val_translations
        self.beam_size, self.length_penalty, self.max_length_ratio = beam_size, length_penalty, max_length_ratio
        self.vocabularies = None
        self.val_metrics = TranslationMetrics(val_translations)
        self.test_metrics = TranslationMetrics()
        self._window: tuple[Tensor, Tensor] | None = None  # tokens of the step's first batch, and of all so far
        self.example_input_array = (torch.tensor([[4, 5, EOS], [4, EOS, PAD]]), torch.tensor([[BOS, 4], [BOS, 5]]))

    # -- hooks ---------------------------------------------------------------------------------------------------------

    def parameter_groups(self) -> list[dict[str, Any]]:
        """The embeddings apart: their gradients, unlike the others, do not vanish where training fails.

        "model" in the dashboard is thus what tells whether the network learns.
        """
        embeddings = {id(p) for part in self.modules() if isinstance(part, nn.Embedding) for p in part.parameters()}
        groups: dict[str, list[nn.Parameter]] = {"model": [], "embedding": []}
        for parameter in self.parameters():
            if parameter.requires_grad:
                groups["embedding" if id(parameter) in embeddings else "model"].append(parameter)
        return [{"name": name, "params": parameters} for name, parameters in groups.items() if parameters]

    def configure_optimizers(self) -> Any:
        """As in :class:`RectifiedModule`; warns of a ``beta2`` under which rectification protects too briefly."""
        configured = super().configure_optimizers()
        optimizer = configured["optimizer"] if isinstance(configured, dict) else configured
        beta2 = optimizer.param_groups[0].get("betas", (0.0, 1.0))[1]
        if isinstance(optimizer, RectifiedAdam) and self.lr_scheduler is None and beta2 < 0.99 and self.norm == "post":
            rank_zero_warn(
                f"RectifiedAdam with beta2 = {beta2:g} holds the learning rate back for about {2 / (1 - beta2):.0f} "
                "steps only, which may be too short for a deep Transformer with post-norm: use a larger beta2 (0.999), "
                "or a warmup."
            )
        return configured

    def networks(self) -> list[nn.Module]:
        """What ``compile`` compiles: the two stacks, for training; decoding runs token by token and as it is."""
        return [self.network.encoder, self.network.decoder]

    def sharded_layers(self) -> list[nn.Module]:
        """The layers of both stacks."""
        return [*self.network.encoder.stack(), *self.network.decoder.stack()]

    def setup(self, stage: str) -> None:
        """Take the datamodule's vocabularies for training; those of a checkpoint come after and replace them."""
        if stage == "fit":
            self._adopt_vocabularies()

    def on_validation_start(self) -> None:
        """Without a checkpoint, the datamodule's vocabularies."""
        self._adopt_vocabularies()

    def on_test_start(self) -> None:
        """Without a checkpoint, the datamodule's vocabularies."""
        self._adopt_vocabularies()

    def on_predict_start(self) -> None:
        """Without a checkpoint, the datamodule's vocabularies."""
        self._adopt_vocabularies()

    def _adopt_vocabularies(self) -> None:
        datamodule = getattr(self.trainer, "datamodule", None)
        if self.vocabularies is not None or (found := getattr(datamodule, "vocabularies", None)) is None:
            return
        expected = {"vocab_size": self.vocab_size, "target_vocab_size": self.target_vocab_size}
        theirs = {
            "vocab_size": len(found[0]),
            "target_vocab_size": None if found[0] == found[1] else len(found[1]),
        }
        for name, value in expected.items():
            if theirs[name] != value:
                raise ValueError(
                    f"Expected argument `{name}` of {type(self).__name__} to be {theirs[name]}, as the vocabularies of "
                    f"the datamodule {type(datamodule).__name__} are, but got {value}."
                )
        self.vocabularies = found

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the vocabularies."""
        super().on_save_checkpoint(checkpoint)
        if self.vocabularies is not None:
            checkpoint[_VOCABULARIES] = [vocabulary.model for vocabulary in self.vocabularies]

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take the vocabularies that the weights belong to."""
        super().on_load_checkpoint(checkpoint)
        if models := checkpoint.get(_VOCABULARIES):
            source = Vocabulary(models[0])
            self.vocabularies = source, source if models[0] == models[1] else Vocabulary(models[1])

    # -- training ------------------------------------------------------------------------------------------------------

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        """Logits (B, T, V) of the token after each of ``target`` (B, T), given ``source`` (B, S)."""
        return self.network(source, target)

    def on_train_start(self) -> None:
        """No batch has been seen of the next step."""
        super().on_train_start()
        self._window = None

    def training_step(self, batch: TranslationBatch, batch_idx: int) -> Tensor:
        """The share of this batch in the step's loss; logs ``train/loss`` and ``train/nll``, a token."""
        loss, nll, count = self._losses(batch, self.label_smoothing)
        tokens = int(count)
        self.log("train/loss", loss.detach() / tokens, prog_bar=True, batch_size=tokens)
        self.log("train/nll", nll / tokens, batch_size=tokens)
        return loss * self.trainer.world_size / self._tokens_of_first_batch(count)

    def _losses(self, batch: TranslationBatch, label_smoothing: float = 0.0) -> tuple[Tensor, Tensor, Tensor]:
        """Sums over the target's tokens of the loss and of the negative log-likelihood, and their number."""
        assert batch.target is not None
        inputs, labels = batch.target[:, :-1], batch.target[:, 1:]
        real = labels != PAD
        hidden = self.network.features(batch.source, inputs)[real]
        loss, nll = linear_cross_entropy(hidden, self.network.output_weight, labels[real], label_smoothing)
        return loss, nll, real.sum()

    def _tokens_of_first_batch(self, count: Tensor) -> Tensor:
        """What a sum over tokens is divided by, so that the step's gradient is the mean over all of them.

        Ranks and accumulated batches are averaged by Lightning as if each had as many tokens. All batches of a step are
        therefore divided by one number, the first one's tokens on all ranks, and the gradient is put right at the end.
        """
        if self.trainer.world_size > 1:
            count = self.trainer.strategy.reduce(count.clone(), reduce_op="sum")  # int64, and in place
        first, all_ = self._window if self._window is not None else (count, torch.zeros_like(count))
        self._window = first, all_ + count
        return first

    def on_before_optimizer_step(self, optimizer: "Optimizer") -> None:
        """From tokens of the first batch to tokens of all accumulated ones."""
        assert self._window is not None
        (first, all_), self._window = self._window, None
        batches = self.trainer.accumulate_grad_batches
        if batches > 1:
            gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
            torch._foreach_mul_(gradients, batches * int(first) / int(all_))

    # -- evaluation ----------------------------------------------------------------------------------------------------

    def validation_step(self, batch: TranslationBatch, batch_idx: int) -> None:
        """Feed the metrics; translates greedily."""
        self._evaluate(batch, self.val_metrics, beam_size=1)

    def test_step(self, batch: TranslationBatch, batch_idx: int) -> None:
        """Feed the metrics; translates with ``beam_size``."""
        self._evaluate(batch, self.test_metrics, beam_size=self.beam_size)

    def on_validation_epoch_end(self) -> None:
        """Log ``val/...``."""
        self._log_metrics("val", self.val_metrics)

    def on_test_epoch_end(self) -> None:
        """Log ``test/...``."""
        self._log_metrics("test", self.test_metrics)

    def predict_step(self, batch: TranslationBatch, batch_idx: int, dataloader_idx: int = 0) -> list[str]:
        """A translation of each sentence of the batch; an empty one has an empty translation."""
        empty = (batch.source[:, 0] == EOS).tolist()
        results = zip(empty, self._search(batch.source), strict=True)
        return ["" if nothing else self._text(found[0]) for nothing, found in results]

    def _evaluate(self, batch: TranslationBatch, metrics: TranslationMetrics, beam_size: int) -> None:
        _, nll, count = self._losses(batch)
        translations = None
        if metrics.texts and batch.references is not None and self.vocabularies is not None:
            translations = [self._text(found[0]) for found in self._search(batch.source, beam_size)]
        metrics.update(nll, count, translations, batch.references)

    def _log_metrics(self, stage: str, metrics: TranslationMetrics) -> None:
        if not self.trainer.sanity_checking:
            values = metrics.compute()
            self.log_dict({f"{stage}/{name}": value for name, value in values.items()}, rank_zero_only=False)
            if (shown := values.get("bleu")) is not None:
                self.log(f"{stage}_bleu", shown, prog_bar=True, logger=False)
        metrics.reset()
