"""Cross-entropy over a frozen output head, a chunk of positions at a time: the logits of a whole batch never exist.

Of a batch of 4 × 256 positions and a vocabulary of 50,257 the logits alone are 200 MB in float32, and autograd keeps
several such. Here the gradient towards the hidden states is made while the logits of one chunk are at hand, in the
forward pass; nothing of the vocabulary's size outlives its chunk. The head gets no gradient: it is frozen.
"""

from typing import Any, Callable, NamedTuple, Optional, Tuple

import torch

CHUNK_VALUES = 2**23
"""Logits of one chunk, at least: 32 MB in float32. Of a piece of that size or more the C library never keeps the place
for itself when it is given back; smaller ones leave holes that the next step's activations fall into."""


class Head(NamedTuple):
    """How a model's hidden states become logits: a linear map, and what follows it."""

    weight: torch.Tensor
    """``[vocabulary, width]``, frozen."""
    bias: Optional[torch.Tensor]
    scale: float
    """What the logits are multiplied by (Cohere, Granite)."""
    softcap: Optional[float]
    """``softcap * tanh(logits / softcap)`` (Gemma 2)."""

    def logits(self, hidden: torch.Tensor, place: Optional[torch.Tensor] = None) -> torch.Tensor:
        """float32 ``[positions, vocabulary]`` of ``hidden [positions, width]``; in ``place``, if that is given."""
        if place is None:
            logits = torch.nn.functional.linear(hidden, self.weight, self.bias).float()
        else:
            logits = place[: len(hidden)]
            if self.weight.dtype is logits.dtype:
                torch.mm(hidden, self.weight.t(), out=logits)
            else:
                logits.copy_(hidden @ self.weight.t())
            if self.bias is not None:
                logits.add_(self.bias)
        if self.scale != 1.0:
            logits = logits.mul_(self.scale)
        if self.softcap is not None:
            logits = logits.div_(self.softcap).tanh_().mul_(self.softcap)
        return logits


def head_of(model: Any, ids: torch.Tensor) -> Optional[Tuple[Callable[..., Any], Head]]:
    """The part of ``model`` below its head, and the head; None where the two do not make the model's logits.

    Tried, not believed: both are run on ``ids`` (``[1, length]``) and have to agree with the model's own logits.
    """
    output = model.get_output_embeddings()
    body = getattr(model, getattr(model, "base_model_prefix", "") or "model", None)
    weight = getattr(output, "weight", None)
    if body is None or body is model or weight is None or weight.dim() != 2 or not weight.is_floating_point():
        return None
    config = model.config
    scales = [1.0, float(getattr(config, "logit_scale", None) or 1.0)]
    scales.append(1.0 / float(getattr(config, "logits_scaling", None) or 1.0))
    softcaps = [None, getattr(config, "final_logit_softcapping", None)]
    with torch.no_grad():
        wanted = model(input_ids=ids, use_cache=False).logits[0].float()
        hidden = body(input_ids=ids, use_cache=False)[0][0]
        if hidden.shape[-1] != weight.shape[1]:
            return None
        for scale in dict.fromkeys(scales):
            for softcap in dict.fromkeys(softcaps):
                head = Head(weight.detach(), getattr(output, "bias", None), scale, softcap)
                found = head.logits(hidden)
                # Of all logits together: in half precision single ones are off by more.
                if found.shape == wanted.shape and (found - wanted).norm() <= 0.02 * wanted.norm():
                    return body, head
    return None


def cross_entropy(head: Head, hidden: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """The sum over positions, in nats, float32: ``hidden [positions, width]``, ``wanted [positions]`` token ids."""
    loss: torch.Tensor = _CrossEntropy.apply(hidden, wanted, head)
    return loss


def _slope(logits: torch.Tensor, softcap: float) -> torch.Tensor:
    """The derivative of the soft cap where it gave ``logits``; one tensor of their size."""
    return logits.div(softcap).square_().neg_().add_(1)


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, wanted: torch.Tensor, head: Head) -> torch.Tensor:
        vocabulary = head.weight.shape[0]
        per_chunk = min(hidden.shape[0], -(-CHUNK_VALUES // vocabulary))
        place = torch.empty(per_chunk, vocabulary, dtype=torch.float32, device=hidden.device)
        gradient = torch.zeros_like(hidden) if ctx.needs_input_grad[0] else None
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        for start in range(0, hidden.shape[0], max(1, per_chunk)):
            chunk = slice(start, start + per_chunk)
            targets = wanted[chunk].unsqueeze(1)
            logits = head.logits(hidden[chunk], place)
            slope = None if head.softcap is None or gradient is None else _slope(logits, head.softcap)
            # By hand, in place: torch's own logsumexp and softmax each make another tensor of this size.
            most = logits.amax(dim=1, keepdim=True)
            total += (most - logits.gather(1, targets)).sum()
            exponentials = logits.sub_(most).exp_()
            sums = exponentials.sum(dim=1, keepdim=True)
            total += sums.log().sum()
            if gradient is None:
                continue
            error = exponentials.div_(sums)  # the probabilities; less one where the right token is
            error.scatter_add_(1, targets, torch.full_like(targets, -1, dtype=error.dtype))
            if slope is not None:
                error.mul_(slope)
            if head.scale != 1.0:
                error.mul_(head.scale)
            torch.mm(error.to(head.weight.dtype), head.weight, out=gradient[chunk])
        if gradient is not None:
            ctx.save_for_backward(gradient)
        return total

    @staticmethod
    def backward(ctx: Any, outer: torch.Tensor) -> Tuple[torch.Tensor, None, None]:  # type: ignore[override]
        (gradient,) = ctx.saved_tensors
        return gradient * outer.to(gradient.dtype), None, None
