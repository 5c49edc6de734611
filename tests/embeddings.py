"""Embedding matrices as small as a verdict needs them: alone in a model, changed, or in a checkpoint on disk."""

import json
import struct

import torch


class Model(torch.nn.Module):
    """A model as far as its embedding."""

    def __init__(self, vocabulary=2000, width=64, seed=0, common=0.0):
        super().__init__()
        torch.manual_seed(seed)
        self.embedding = torch.nn.Embedding(vocabulary, width)
        with torch.no_grad():
            self.embedding.weight.mul_(0.02).add_(common * torch.randn(width))

    def get_input_embeddings(self):
        return self.embedding

    def changed(self, change):
        with torch.no_grad():
            self.embedding.weight.copy_(change(self.embedding.weight))
        return self


def quantised(bits, block=32):
    def change(weight):
        blocks = weight.reshape(-1, block)
        step = blocks.abs().amax(1, keepdim=True) / (2 ** (bits - 1) - 1)
        return ((blocks / step).round() * step).reshape(weight.shape)

    return change


def moved(by):
    """A fine-tune: every row moved by noise of ``by`` times its own size."""
    return lambda weight: weight + by * weight.std() * torch.randn_like(weight)


_NAMES = {torch.float16: "F16", torch.bfloat16: "BF16", torch.float32: "F32", torch.float64: "F64"}


def write_safetensors(path, tensors, header=None):
    """A safetensors file of ``{name: tensor}``; ``header``: changes to entries, to make one that lies."""
    entries, data = {}, b""
    for name, tensor in tensors.items():
        raw = tensor.contiguous().view(torch.uint8).numpy().tobytes() if tensor.numel() else b""
        offsets = [len(data), len(data) + len(raw)]
        entries[name] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": offsets}
        data += raw
    for name, change in (header or {}).items():
        entries[name] = {**entries[name], **change} if isinstance(change, dict) else change
    text = json.dumps(entries).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
