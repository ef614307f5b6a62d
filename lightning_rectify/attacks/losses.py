"""What attacks climb: a loss of each sample, from logits (N, K) and labels (N,) to (N,); larger is worse."""

from collections.abc import Callable
from typing import Literal

from torch import Tensor
from torch.nn import functional as F

LossFunction = Callable[[Tensor, Tensor], Tensor]
#: a loss by name, or a function of logits (N, K) and labels (N,) that returns (N,)
Loss = Literal["ce", "margin", "dlr"] | LossFunction

_TINY = 1e-12  # keeps DLR finite where its top logits are equal; the released AutoAttack has the same


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of each sample.

    Args:
        logits: shape (N, K).
        labels: right classes, shape (N,).

    Returns:
        Shape (N,).
    """
    return F.cross_entropy(logits, labels, reduction="none")


def margin(logits: Tensor, labels: Tensor) -> Tensor:
    r"""Largest wrong logit minus the right one, :math:`\max_{k \ne y} z_k - z_y`; above 0 where misclassified.

    Carlini and Wagner's loss (arXiv:1608.04644, section 5), without their confidence term. Unlike cross-entropy it
    does not saturate.

    Args:
        logits: shape (N, K), K at least 2.
        labels: right classes, shape (N,).

    Returns:
        Shape (N,).
    """
    _check_classes(logits, 2, "margin")
    return _without(logits, labels).amax(1) - _of(logits, labels)


def difference_of_logits_ratio(logits: Tensor, labels: Tensor) -> Tensor:
    r"""DLR loss, :math:`-(z_y - \max_{k \ne y} z_k) / (z_{\pi_1} - z_{\pi_3})`, with :math:`\pi` sorting descending.

    Croce and Hein (arXiv:2003.01690, equation 6). No shift or scale of the logits changes it.

    Args:
        logits: shape (N, K), K at least 3.
        labels: right classes, shape (N,).

    Returns:
        Shape (N,); above 0 where misclassified.
    """
    _check_classes(logits, 3, "dlr")
    top = logits.topk(3, dim=1).values
    return margin(logits, labels) / (top[:, 0] - top[:, 2] + _TINY)


def targeted_difference_of_logits_ratio(logits: Tensor, labels: Tensor, targets: Tensor) -> Tensor:
    r"""Targeted DLR, :math:`-(z_y - z_t) / (z_{\pi_1} - (z_{\pi_3} + z_{\pi_4})/2)`: large where the target wins.

    Croce and Hein (arXiv:2003.01690, equation 7).

    Args:
        logits: shape (N, K), K at least 4.
        labels: right classes, shape (N,).
        targets: wrong classes to reach, shape (N,).

    Returns:
        Shape (N,).
    """
    _check_classes(logits, 4, "dlr_targeted")
    top = logits.topk(4, dim=1).values
    scale = top[:, 0] - (top[:, 2] + top[:, 3]) / 2 + _TINY
    return (_of(logits, targets) - _of(logits, labels)) / scale


_BY_NAME: dict[str, LossFunction] = {"ce": cross_entropy, "margin": margin, "dlr": difference_of_logits_ratio}


class CheckedLoss:
    """A loss that checks what it is given at its first call and what it returns at every call.

    Args:
        function: of logits (N, K) and labels (N,) to (N,).
        check_labels: check at the first call that labels are in [0, K); a GPU would answer them with an assertion that
            ends the process. Costs a synchronization with the device.

    Raises:
        ValueError: at a call, if labels are out of their range or the answer is not of shape (N,).
    """

    def __init__(self, function: LossFunction, check_labels: bool = False) -> None:
        self.function, self.unchecked = function, check_labels

    def __call__(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Losses (N,) of logits (N, K) and labels (N,)."""
        if self.unchecked:
            check_labels(labels, logits.shape[1])
            self.unchecked = False
        values = self.function(logits, labels)
        if values.shape != labels.shape:
            raise ValueError(
                f"Expected argument `loss` to return one value a sample, shape {tuple(labels.shape)}, but got "
                f"{tuple(values.shape)}."
            )
        return values


def loss_function(loss: Loss, check_labels: bool = False) -> CheckedLoss:
    """The function of a loss given by name or as a function.

    Args:
        loss: "ce", "margin", "dlr" or a function; a :class:`CheckedLoss` is returned as it is.
        check_labels: as in :class:`CheckedLoss`.

    Raises:
        ValueError: if the name is unknown.
    """
    if isinstance(loss, CheckedLoss):
        return loss
    if isinstance(loss, str) and loss in _BY_NAME:
        return CheckedLoss(_BY_NAME[loss], check_labels)
    if not callable(loss):
        names = ", ".join(map(repr, _BY_NAME))
        raise ValueError(f"Expected argument `loss` to be one of {names} or a function but got {loss!r}.")
    return CheckedLoss(loss, check_labels)


def check_labels(labels: Tensor, classes: int) -> None:
    """Refuse labels, shape (N,), outside [0, K)."""
    if not len(labels):
        return
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= classes:
        came = low if low < 0 else high
        raise ValueError(f"Expected argument `labels` to be in [0, {classes}) but got {came}.")


def ranked_others(logits: Tensor, labels: Tensor) -> Tensor:
    """The wrong classes from the likeliest to the least likely, shape (N, K - 1), for logits (N, K)."""
    return _without(logits, labels).argsort(1, descending=True)[:, :-1]


def _of(logits: Tensor, classes: Tensor) -> Tensor:
    return logits.gather(1, classes[:, None])[:, 0]


def _without(logits: Tensor, labels: Tensor) -> Tensor:
    return logits.scatter(1, labels[:, None], float("-inf"))


def _check_classes(logits: Tensor, least: int, name: str) -> None:
    if logits.shape[1] < least:
        raise ValueError(
            f"Expected argument `loss` to be one for {logits.shape[1]} classes but got {name!r}, which needs {least}."
        )
