import threading
from pathlib import Path
from types import SimpleNamespace

user_data_dir = Path("user_data")
model = None
tokenizer = None
model_name = "None"
is_seq2seq = False
lora_names = []
stop_everything = False
generation_lock = threading.Lock()
gradio = {}
settings = {"truncation_length": 100}
args = SimpleNamespace(extensions=[], loader=None, idle_timeout=0, multi_user=False)

available = {}
"""The stand-in's own: name of a model → a function that makes it and its tokenizer."""
contexts = []
"""The stand-in's own: tokens of each prompt that was generated from."""
