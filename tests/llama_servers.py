"""An unmodified llama-server, whose program's path is in the environment variable ``KOBOLD_SP_LLAMA_SERVER``."""

import os
import socket
import subprocess
import time

import gguf_files
import numpy as np

from kobold_sp_plugin import SoftPrompt
from kobold_sp_plugin.engines.llama_server import LlamaServerEngine
from kobold_sp_plugin.errors import EngineUnreachable

PROGRAM = os.environ.get("KOBOLD_SP_LLAMA_SERVER")
EXACT = ("-ctk", "f32", "-ctv", "f32", "-fa", "off", "--swa-full", "--cache-ram", "0")


def softprompt(seed=1, n_tokens=37, **options):
    rows = np.random.default_rng(seed).normal(size=(n_tokens, gguf_files.WIDTH)).astype(np.float32) * 0.3
    return SoftPrompt(rows, {"name": "noir"}, **options)


class Server:
    """A llama-server with one model, on a free port unless one is given."""

    def __init__(self, model, folder, *options, port=None):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = port = port or free.getsockname()[1]
        self.url, self.model, self.folder = f"http://127.0.0.1:{port}", str(model), folder
        command = [PROGRAM, "-m", self.model, "--port", str(port), "--slot-save-path", f"{folder}/", "-c", "512"]
        command += ["-t", "1", "-tb", "1", "--no-warmup", *options]
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        for _ in range(200):
            try:
                return self.engine() and None
            except EngineUnreachable:
                time.sleep(0.1)
        raise AssertionError("the server did not start")

    def engine(self, **options):
        return LlamaServerEngine(self.url, self.model, self.folder, **{"cache_type": "f32", **options})

    def close(self):
        self.process.terminate()
        self.process.wait()
