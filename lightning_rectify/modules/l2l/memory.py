"""Where the last attack on each training image ended: the next one goes on from there."""

from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

_STEPS = 120  # of an offset from 0 to epsilon, in a signed byte: halves, thirds, quarters, ... are whole numbers
_MOST = 10**9  # images: no index is larger


class AttackMemory:
    """Offsets of all training images, in a byte a pixel: what adversarial training with transferable attacks keeps.

    Zheng et al. (ATTA, arXiv:1912.11969): what fools the network of this epoch fools that of the next one, so that
    single steps add up over the epochs. An offset belongs to a pixel of the image, wherever crop and mirror have put
    it, and is rounded to a multiple of epsilon / 120.

    Each rank remembers what it has seen; :meth:`meet` shares it. There is room for images up to the largest index seen.

    Args:
        epsilon: radius of the attack, in pixel units.
    """

    def __init__(self, epsilon: float) -> None:
        self.epsilon = epsilon
        self.offsets = torch.zeros(0, 0, 0, 0, dtype=torch.int8)  # (N, C, H, W), in epsilon / 120
        self._new = torch.zeros(0, dtype=torch.bool)  # (N,): seen on this rank since ranks last met

    def start(self, images: Tensor, places: Tensor | None) -> Tensor:
        """The images moved by what is remembered; 0 for a pixel that no attack has seen.

        Args:
            images: shape (B, C, H, W).
            places: indices (B,), or (B, 4) as of ``ImageData``: index, row, column, mirror.

        Returns:
            Shape (B, C, H, W); hardly ever outside the ball, but it may be.
        """
        places = self._prepare(images, places)
        offsets = self.offsets[places if places.ndim == 1 else places[:, 0]]
        if places.ndim == 2:
            offsets = _augmented(offsets, places)
        return images + offsets.to(images.dtype) * (self.epsilon / _STEPS)

    def keep(self, points: Tensor, images: Tensor, places: Tensor) -> None:
        """Remember where attacks ended that :meth:`start` began.

        Args:
            points: adversarial images, shape (B, C, H, W).
            images: what they were made of.
            places: as in :meth:`start`.
        """
        offsets = ((points.detach() - images) * (_STEPS / self.epsilon)).round().clamp(-_STEPS, _STEPS).to(torch.int8)
        index = places if places.ndim == 1 else places[:, 0]
        if places.ndim == 2:
            offsets = _whole(offsets, self.offsets[index], places)
        self.offsets[index] = offsets
        self._new[index] = True

    def meet(self, device: torch.device) -> None:
        """Share what each rank has seen since the last time; of an image that two have seen, the later rank's.

        Collective: all ranks call it. With one process nothing happens.

        Args:
            device: where the ranks' process group works.
        """
        if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
            return
        self._move(device)
        rank, count = dist.get_rank(), torch.tensor(len(self.offsets), device=device)
        dist.all_reduce(count, dist.ReduceOp.MAX)
        self._grow(int(count))
        owner = torch.where(self._new, rank, -1).int()
        dist.all_reduce(owner, dist.ReduceOp.MAX)
        shared = self.offsets * (owner == rank).view(-1, 1, 1, 1)
        dist.all_reduce(shared)  # one rank's offset and zeros: a byte does for the sum
        self.offsets = torch.where((owner >= 0).view(-1, 1, 1, 1), shared, self.offsets)
        self._new.zero_()

    def load(self, offsets: Tensor) -> None:
        """Take a checkpoint's offsets, (N, C, H, W), int8."""
        self.offsets, self._new = offsets.clone(), torch.zeros(len(offsets), dtype=torch.bool)

    def _prepare(self, images: Tensor, places: Any) -> Tensor:
        """Checked places of a batch, for whose images there is room then."""
        size = len(images)
        if not isinstance(places, Tensor) or places.dtype != torch.int64 or places.shape not in ((size,), (size, 4)):
            came = f"{tuple(places.shape)} of {places.dtype}" if isinstance(places, Tensor) else type(places).__name__
            raise ValueError(
                f"Expected a training batch's third part to be the images' indices, int64, shape ({size},) or "
                f"({size}, 4), but got {came}."
            )
        low, high = torch.stack(torch.aminmax(places if places.ndim == 1 else places[:, 0])).tolist()
        if not 0 <= low <= high < _MOST:
            raise ValueError(
                f"Expected the indices of N training images, a training batch's third part, to be 0 to N - 1, but got "
                f"{low} to {high}."
            )
        if not len(self.offsets):
            self.offsets = self.offsets.new_zeros(0, *images.shape[1:])
        if self.offsets.shape[1:] != images.shape[1:]:
            raise ValueError(
                f"Expected all training images to be of shape {tuple(self.offsets.shape[1:])}, as those are whose "
                f"attacks are remembered, but got {tuple(images.shape[1:])}."
            )
        self._move(images.device)
        self._grow(high + 1)
        return places

    def _move(self, device: torch.device) -> None:
        self.offsets, self._new = self.offsets.to(device), self._new.to(device)

    def _grow(self, count: int) -> None:
        if (more := count - len(self.offsets)) > 0:
            self.offsets = torch.cat([self.offsets, self.offsets.new_zeros(more, *self.offsets.shape[1:])])
            self._new = torch.cat([self._new, self._new.new_zeros(more)])


def _augmented(whole: Tensor, places: Tensor) -> Tensor:
    """What augmentation makes of whole images (B, C, H, W), with 0 for what is in none."""
    (height, width), (top, left, mirror) = whole.shape[-2:], places[:, 1:].unsqueeze(-1).unbind(1)  # each (B, 1)
    across = torch.arange(width, device=whole.device)
    rows = top + torch.arange(height, device=whole.device)
    columns = left + torch.where(mirror > 0, width - 1 - across, across)
    values, inside = _read(whole, rows, columns)
    return values * inside


def _whole(seen: Tensor, before: Tensor, places: Tensor) -> Tensor:
    """Whole images (B, C, H, W) again: of the augmented ones' pixels what they show, of the others what was before."""
    (height, width), (top, left, mirror) = seen.shape[-2:], places[:, 1:].unsqueeze(-1).unbind(1)
    rows = torch.arange(height, device=seen.device) - top
    columns = torch.arange(width, device=seen.device) - left
    values, inside = _read(seen, rows, torch.where(mirror > 0, width - 1 - columns, columns))
    return torch.where(inside, values, before)


def _read(images: Tensor, rows: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
    """Pixels at rows (B, H) and columns (B, W), and which of them the images have, (B, 1, H, W)."""
    count, channels, height, width = images.shape
    values = images[
        torch.arange(count, device=images.device)[:, None, None, None],
        torch.arange(channels, device=images.device)[None, :, None, None],
        rows.clamp(0, height - 1)[:, None, :, None],
        columns.clamp(0, width - 1)[:, None, None, :],
    ]
    inside = ((rows >= 0) & (rows < height))[:, None, :, None] & ((columns >= 0) & (columns < width))[:, None, None, :]
    return values, inside
