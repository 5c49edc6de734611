"""As much of TensorRT-LLM as the host calls, without an accelerator: it writes the prompt's text again."""
