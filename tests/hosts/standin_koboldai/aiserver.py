"""A host in small, in our own words: shaped like KoboldAI's Client wherever the plugin touches it.

Run as a script in a folder with ``softprompts/``; the arguments are a port and the folder of a model.
"""

# ruff: noqa: E402
import eventlet

eventlet.monkey_patch(all=True, thread=False, os=False)
import gc
import json
import os
import sys
import zipfile

import numpy as np
import torch
from eventlet import tpool
from flask import Flask, request
from flask_session import Session
from flask_socketio import SocketIO, emit
from torch.nn import Embedding
from transformers import AutoConfig, AutoModelForCausalLM, GPT2LMHeadModel, PreTrainedTokenizerFast

torch.set_num_threads(1)
model = generator = tokenizer = None
app = Flask(__name__)
app.config["SESSION_TYPE"] = "filesystem"
socketio = SocketIO(app, async_mode="eventlet")


class vars:  # the host's own name for it
    model = ""
    modeldim = -1
    allowsp = False
    sp = None
    sp_length = 0
    spfilename = ""
    spmeta = None
    spselect = ""
    max_length = 128
    genamt = 12


def getmodelname():
    return os.path.basename(vars.model)


def settingschanged():
    with open("settings.json", "w") as file:
        json.dump({"softprompt": vars.spfilename}, file)


def patch_causallm(model):
    """Let every embedding of the process read ids past the first model's vocabulary from the soft prompt."""
    own_call = Embedding.__call__

    def call(self, input_ids):
        if self is not model.get_input_embeddings():
            return own_call(self, input_ids)
        beyond = input_ids - model.config.vocab_size
        embedded = own_call(self, input_ids.clamp_(max=model.config.vocab_size - 1))
        if vars.sp is None:
            return embedded
        return torch.where((beyond >= 0)[..., None], vars.sp[beyond.clamp(min=0)], embedded)

    Embedding.__call__ = call
    return model


def read(filename):
    with zipfile.ZipFile(os.path.join("softprompts", filename)) as file, file.open("tensor.npy") as tensor:
        return np.lib.format.read_array(tensor), json.loads(file.read("meta.json"))


def spRequest(filename):
    if not vars.allowsp:
        raise RuntimeError("no soft prompts with this model")
    vars.sp, vars.sp_length, vars.spfilename = None, 0, ""
    if filename:
        rows, vars.spmeta = read(filename)
        vars.sp, vars.sp_length, vars.spfilename = torch.from_numpy(rows.astype("f4")), len(rows), filename
        vars.spmeta["n_tokens"] = vars.sp_length
    settingschanged()


def getsplist():
    rows = [(filename, *read(filename)) for filename in sorted(os.listdir("softprompts"))]
    fitting = [dict(meta, filename=filename, n_tokens=len(tensor)) for filename, tensor, meta in rows
               if tensor.shape[1] == vars.modeldim]  # fmt: skip
    emit("from_server", {"cmd": "buildsp", "data": fitting})


def load_model(path):
    global model, generator, tokenizer
    model = generator = None
    with torch.no_grad():
        for each in gc.get_objects():
            if isinstance(each, torch.Tensor):
                each.set_()
    gc.collect()
    vars.model, vars.modeldim = path, -1
    if path == "ReadOnly":
        return
    vars.allowsp = True
    tokenizer = PreTrainedTokenizerFast.from_pretrained(path)
    if AutoConfig.from_pretrained(path).model_type == "gpt2":
        model = GPT2LMHeadModel.from_pretrained(path)
        generator = model.generate
        patch_causallm(model)
    else:
        model = AutoModelForCausalLM.from_pretrained(path)
        patch_causallm(model)
        model.to("cpu").float()
        generator = model.generate
    vars.modeldim = model.get_input_embeddings().embedding_dim
    if os.path.exists("settings.json"):
        with open("settings.json") as file:
            spRequest(json.load(file)["softprompt"])


def _generate(ids):
    ids = torch.tensor([ids])
    if vars.sp is not None:
        soft = torch.arange(model.config.vocab_size, model.config.vocab_size + vars.sp_length)
        ids = torch.cat((soft[None], ids), dim=-1)
    with torch.no_grad():
        rows = generator(ids, do_sample=False, max_new_tokens=vars.genamt, pad_token_id=0)
    return tokenizer.decode(rows[0, ids.shape[1] :])


def submit(text):
    """The continuation of as much of the text's end as there is room for."""
    ids = tokenizer(text)["input_ids"]
    return tpool.execute(_generate, ids[-(vars.max_length - vars.sp_length - vars.genamt) :])


@socketio.on("connect")
def do_connect():
    emit("from_server", {"cmd": "connected", "modelname": getmodelname()})
    emit("from_server", {"cmd": "allowsp", "data": vars.allowsp})
    shown = {vars.spfilename: vars.spmeta} if vars.spfilename else {}
    emit("from_server", {"cmd": "spstatitems", "data": shown})


@socketio.on("message")
def get_message(message):
    command, data = message["cmd"], message["data"]
    if command == "splistrequest":
        getsplist()
    elif command == "spselect":
        vars.spselect = data
    elif command == "sprequest":
        spRequest(vars.spselect)
    elif command == "load_model":
        load_model(data)
        emit("from_server", {"cmd": "show_model_name", "data": getmodelname()})
    elif command == "submit":
        emit("from_server", {"cmd": "updatescreen", "data": submit(data)})


@app.route("/api/v1/generate", methods=["POST"])
def generate():
    body, before = request.get_json(), vars.spfilename
    spRequest(body["soft_prompt"])
    try:
        return {"results": [{"text": submit(body["prompt"])}]}
    finally:
        spRequest(before)


if __name__ == "__main__":
    globals().pop(os.environ.get("STANDIN_LACKS"), None)  # another release of the host
    Session(app)
    load_model(sys.argv[2])
    socketio.run(app, host="127.0.0.1", port=int(sys.argv[1]))
