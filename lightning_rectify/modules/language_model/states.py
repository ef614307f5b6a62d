"""What a recurrent network remembers of its streams from batch to batch, and across a checkpoint."""

import torch
from torch import Tensor

from lightning_rectify.words import TextBatch


class CarriedStates:
    """The state of each group of streams; a state is a tensor of shape (2, K, B, H), one for each of B streams.

    A state counts only when it is committed: a step that fails leaves the one it began with, which belongs to the batch
    that is read again after a resume.

    Args:
        rank: this rank.
        ranks: number of ranks R; of the streams in a checkpoint, rank r has every R-th from r.
    """

    def __init__(self, rank: int = 0, ranks: int = 1) -> None:
        self.rank, self.ranks = rank, ranks
        self._states: list[Tensor | None] = []
        self._next: tuple[int, Tensor] | None = None
        self._saved: Tensor | None = None  # from a checkpoint, of all streams, until the first batch comes

    def before(self, batch: TextBatch) -> Tensor | None:
        """The state in which the batch is read; None where its streams begin.

        Raises:
            ValueError: if a checkpoint from the middle of an epoch is of other streams.
        """
        if self._saved is not None:
            self._hand_out(batch, self._saved)
        if len(self._states) != batch.groups:
            self._states = [None] * batch.groups
        return None if batch.start else self._states[batch.group]

    def after(self, batch: TextBatch, state: Tensor) -> None:
        """Keep the state after a batch, to be committed."""
        self._next = batch.group, state.detach()

    def commit(self) -> None:
        """Take what ``after`` kept."""
        if self._next is not None:
            group, self._states[group] = self._next
            self._next = None

    def local(self) -> Tensor | None:
        """The states of this rank's streams, group by group, shape (2, K, S, H); None if there are none yet."""
        known = next((state for state in self._states if state is not None), None)
        if known is None:
            return None
        # A group that was not read yet begins with its first batch, whatever stands here.
        return torch.cat([torch.zeros_like(known) if state is None else state for state in self._states], dim=2)

    @property
    def pending(self) -> Tensor | None:
        """What a checkpoint brought, as long as no batch was read."""
        return self._saved

    def restore(self, states: Tensor) -> None:
        """Go on with the states of all streams, shape (2, K, R S, H), once it is known how they are grouped."""
        self._saved = states

    def _hand_out(self, batch: TextBatch, saved: Tensor) -> None:
        self._saved = None
        streams = batch.groups * len(batch.tokens)
        if saved.shape[2] == streams * self.ranks:
            mine = saved[:, :, self.rank :: self.ranks].to(batch.tokens.device)
            self._states = [part.clone() for part in mine.chunk(batch.groups, dim=2)]
        elif not batch.start:
            raise ValueError(
                f"Expected argument `streams` of the data to be {saved.shape[2]}, as it was where the checkpoint was "
                f"made, to go on in the middle of an epoch but got {streams * self.ranks}."
            )


def of_all_ranks(gathered: Tensor) -> Tensor:
    """States of R ranks, shape (R, 2, K, S, H), in the order of their streams, shape (2, K, R S, H)."""
    return gathered.movedim(0, 3).flatten(2, 3)
