"""Soft tokens: the embedding hook and the generation adapter that give a model its soft prompts.

A soft token is an id past the end of the embedding matrix. The hook on the model's input embedding
gives such ids their rows; the adapter puts the selected soft tokens in front of the text between the
decoding loop and the model (``prepare_inputs_for_generation``). The loop itself keeps text ids only, so
samplers, stopping rules, streamers, length limits and returned sequences never meet a soft token.
"""

from .handle import SoftTokens, attach, attached

__all__ = ["SoftTokens", "attach", "attached"]
