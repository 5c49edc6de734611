"""Soft tokens: the embedding hook and the generation adapter that give a model its soft prompts.

A soft token is an id past the end of the embedding matrix. The hook on the model's input embedding
gives such ids their rows; the adapter puts the selected soft tokens in front of the text between the
decoding loop and the model (``prepare_inputs_for_generation``). The loop itself keeps text ids only, so
samplers, stopping rules, streamers, length limits and returned sequences never meet a soft token. Where
soft prompts stand in the text itself, tokenizers made by ``with_softprompts`` give them ids, and the adapter
takes these out before the loop begins.
"""

from .concatenation import concatenated, outside_positions
from .handle import SoftTokens, attach, attached
from .text import ModelWithSoftPrompts, TokenizerWithSoftPrompts, with_softprompts

__all__ = [
    "ModelWithSoftPrompts",
    "SoftTokens",
    "TokenizerWithSoftPrompts",
    "attach",
    "attached",
    "concatenated",
    "outside_positions",
    "with_softprompts",
]
