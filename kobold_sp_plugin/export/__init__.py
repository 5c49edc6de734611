"""Soft prompts as files that unmodified engines read: an adapter, a copy of the model, a saved state."""
