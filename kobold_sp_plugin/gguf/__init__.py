"""GGUF, the model files of llama.cpp: read without loading them, and written.

Source: ``docs/gguf.md`` of ggml, version 3 of the format. Quantised rows are unpacked by the ``gguf`` library; its
reader maps whole files and trusts their counts, so that the header is read here, within bounds.
"""
