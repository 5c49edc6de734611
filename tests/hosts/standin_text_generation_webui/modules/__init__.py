"""A stand-in for text-generation-webui's package of this name: our own, with the signatures that the extension meets.

The tests put this folder's parent on the path, as the host's own folder is when it runs. Models are real; a
"name" of a model is looked up in ``shared.available``. There is no Gradio here: the real host is where that is seen.
"""
