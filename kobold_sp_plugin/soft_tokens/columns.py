"""Room for soft tokens in tensors of one column per position; the tensors given are never changed."""

import torch

from ..errors import UnsupportedCall


def start_of_text(mask: torch.Tensor) -> torch.Tensor:
    """``[batch]``: how many padding positions each row of a mask ``[batch, length]`` begins with."""
    return (mask.cumsum(-1) == 0).sum(-1)


def grow_mask(mask: torch.Tensor, n_tokens: int) -> torch.Tensor:
    """``mask`` with ``n_tokens`` more ones behind each row's leading padding."""
    if mask.dim() != 2:
        raise UnsupportedCall(f"an attention mask of {mask.dim()} dimensions; with a soft prompt it has two")
    return insert_columns(mask, mask.new_ones(n_tokens), start_of_text(mask))


def insert_columns(rows: torch.Tensor, columns: torch.Tensor, start: torch.Tensor) -> torch.Tensor:
    """``rows [batch, length]`` with ``columns [n]`` inserted at ``start [batch]``; nothing waits for the device."""
    batch, length = rows.shape
    n = columns.shape[0]
    if n == 0:
        return rows
    if length == 0:
        return columns.to(rows.dtype).expand(batch, -1)
    position = torch.arange(length + n, device=rows.device).unsqueeze(0)
    inside = position - start.unsqueeze(1)
    old = torch.where(inside < n, position, position - n).clamp(max=length - 1).expand(batch, -1)
    new = columns.to(rows.dtype)[inside.clamp(0, n - 1)]
    return torch.where((inside >= 0) & (inside < n), new, rows.gather(1, old))
