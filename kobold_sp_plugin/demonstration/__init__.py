"""The demonstration model: a small causal model of stories in five genres, and what made it.

The sample soft prompts in ``softprompts/`` are for this model. ``python -m
kobold_sp_plugin.demonstration.build`` makes both again; ``... .report`` measures them.
"""

from pathlib import Path

MODEL = Path(__file__).resolve().parent / "model"
"""The folder of the shipped model; ``from_pretrained`` takes it."""

OPENING = "The door opened and"
"""An opening that leaves the genre open."""
