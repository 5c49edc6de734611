"""Checkpoints in few bits, and what models of any precision write with rows in their embedding matrix.

For the host's own Python, since it is its libraries that quantise and round; with nothing of ours in it. Reads
a JSON object from its input: ``quantise``, a list of ``{checkpoint, folder, options}`` (``BitsAndBytesConfig``'s),
and ``continue``, a list of ``{checkpoint, dtype, lora, halved, rows, prompts, n_tokens}``. Writes the ids that
follow each prompt, greedily, as a list of lists of lists.
"""

import json
import sys

import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig


def quantise(checkpoint, folder, options):
    """Write ``checkpoint`` with its matrices in 8 or 4 bits, but for embedding and head, into ``folder``."""
    config = BitsAndBytesConfig(**options)
    AutoModelForCausalLM.from_pretrained(checkpoint, quantization_config=config, device_map="cpu").save_pretrained(
        folder
    )


def continuations(checkpoint, dtype, lora, halved, rows, prompts, n_tokens):
    """The ids that follow each of ``prompts`` (lists of ids), with ``rows`` (a list of lists) read in front of it."""
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=getattr(torch, dtype)).eval()
    if lora:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, lora)
    if halved:
        model.half()
    embedding = model.get_input_embeddings()
    vocabulary = embedding.num_embeddings
    if rows:
        matrix = torch.cat([embedding.weight.detach(), torch.tensor(rows).to(embedding.weight.dtype)])
        embedding.weight = torch.nn.Parameter(matrix, requires_grad=False)
        embedding.num_embeddings = len(matrix)
    written = []
    for prompt in prompts:
        ids = torch.tensor([[*range(vocabulary, vocabulary + len(rows)), *prompt]])
        mask = torch.ones_like(ids)
        output = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=n_tokens, do_sample=False)
        written.append(output[0, ids.shape[1] :].tolist())
    return written


if __name__ == "__main__":
    jobs = json.load(sys.stdin)
    for each in jobs["quantise"]:
        quantise(**each)
    json.dump([continuations(**each) for each in jobs["continue"]], sys.stdout)
