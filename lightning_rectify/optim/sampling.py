"""A fixed random sample of the coordinates of many tensors, read at a bounded cost, sharded or not."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset


class CoordinateSample:
    """``size`` coordinates drawn without replacement from all coordinates of the tensors together.

    The draw depends on shapes and seed alone: for tensors sharded over processes it is the same on every process, each
    reads the coordinates it holds and leaves zeros for the rest, so that the sum over processes is what one process
    with the whole tensors would have read.

    Args:
        tensors: what the sample is for; later tensors read must have their shapes and sharding.
        size: how many coordinates at most; None for all.
        seed: of the draw.
    """

    def __init__(self, tensors: Sequence[Tensor], size: int | None, seed: int) -> None:
        counts = np.array([tensor.numel() for tensor in tensors], dtype=np.int64)
        ends = np.cumsum(counts)
        total = int(ends[-1]) if len(ends) else 0
        whole = size is None or size >= total
        chosen = (
            np.arange(total)
            if whole
            else np.sort(np.random.default_rng(seed).choice(total, size, replace=False, shuffle=False))
        )
        owners = np.searchsorted(ends, chosen, side="right")
        #: index of the tensor that each sampled coordinate belongs to, shape (n,)
        self.owners: np.ndarray = owners
        self.sharded = any(isinstance(tensor, DTensor) for tensor in tensors)
        held_here = []
        self._parts: list[tuple[int, Tensor | None, Tensor | None, int]] = []
        for owner in np.unique(owners):
            tensor = tensors[owner]
            inside = torch.from_numpy(chosen[owners == owner] - (ends[owner] - counts[owner]))
            local, held = _local_indices(tensor, inside) if isinstance(tensor, DTensor) else (inside, None)
            index = None if whole and held is None else local.to(tensor.device)
            self._parts.append((int(owner), index, held, len(inside)))
            held_here.append(torch.ones(len(inside), dtype=torch.bool) if held is None else held)
        #: which of the coordinates this process holds, shape (n,); all but those of other processes' shards
        self.held = torch.cat(held_here) if held_here else torch.zeros(0, dtype=torch.bool)

    def __len__(self) -> int:
        return len(self.owners)

    def read(self, tensors: Sequence[Tensor | None], out: Tensor) -> None:
        """Copy the sampled coordinates; NaN for a tensor that is None.

        Args:
            tensors: shaped like those of the constructor.
            out: shape (n,), on their device.
        """
        values = []
        for owner, index, held, count in self._parts:
            tensor = tensors[owner]
            if tensor is None:
                values.append(out.new_full((count,), torch.nan))
                continue
            if isinstance(tensor, DTensor):
                tensor = tensor.to_local()
            part = tensor.reshape(-1) if index is None else torch.take(tensor, index)
            if held is not None:
                part = out.new_zeros(count).masked_scatter_(held.to(out.device), part.to(out.dtype))
            values.append(part)
        torch.cat(values, out=out) if all(v.dtype == out.dtype for v in values) else out.copy_(torch.cat(values))


def _local_indices(tensor: DTensor, flat: Tensor) -> tuple[Tensor, Tensor]:
    """Local flat indices of the global flat indices held here, and the mask of which those are."""
    shape, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    coordinates = torch.unravel_index(flat, tensor.shape)
    local = [c - o for c, o in zip(coordinates, offset, strict=True)]
    held = torch.ones_like(flat, dtype=torch.bool)
    for c, length in zip(local, shape, strict=True):
        held &= (c >= 0) & (c < length)
    index = torch.zeros_like(flat)
    for c, length in zip(local, shape, strict=True):
        index = index * length + c
    return index[held], held
