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
import types
import zipfile

import numpy as np
import torch
from eventlet import tpool
from flask import Flask, request
from flask_session import Session
from flask_socketio import SocketIO
from flask_socketio import emit as _emit
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
    aibusy = False
    genseqs = ()


class ValidationError(ValueError):
    pass


@app.errorhandler(ValidationError)
def invalid(error):
    return {"detail": error.args[0]}, 422


def emit(*args, **kwargs):
    try:
        return _emit(*args, **kwargs)
    except AttributeError:
        return socketio.emit(*args, **kwargs)


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


def getspfiles(model_dimension):
    rows = [(filename, *read(filename)) for filename in sorted(os.listdir("softprompts"))]
    return [dict(meta, filename=filename, n_tokens=len(tensor)) for filename, tensor, meta in rows
            if tensor.shape[1] == model_dimension]  # fmt: skip


def checksp(filename, model_dimension):
    try:
        file = zipfile.ZipFile("softprompts/" + filename)
    except OSError:
        return 1, None, None, None, None
    return file, (1, 0), (0, model_dimension), False, np.dtype("f4")


fileops = types.ModuleType("fileops")
fileops.getspfiles, fileops.checksp = getspfiles, checksp


def getsplist():
    emit("from_server", {"cmd": "buildsp", "data": fileops.getspfiles(vars.modeldim)})


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


def calcsubmit(txt):
    """The continuation of as much of the text's end as there is room for."""
    ids = tokenizer(txt)["input_ids"]
    room = vars.max_length - vars.sp_length - vars.genamt
    return tpool.execute(_generate, ids[-room:])


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
        emit("from_server", {"cmd": "updatescreen", "data": calcsubmit(data)})


def soft_prompt_validator(soft_prompt):
    if soft_prompt.strip():
        if not vars.allowsp:
            raise ValidationError("no soft prompts with this backend")
        file, *_ = fileops.checksp(soft_prompt.strip(), vars.modeldim)
        if isinstance(file, int):
            raise ValidationError("no such soft prompt")
        file.close()


def _generate_text(body):
    if vars.aibusy:
        return {"detail": "busy"}, 503
    vars.aibusy = True
    try:
        if body.soft_prompt is not None:
            before = vars.spfilename
            spRequest(body.soft_prompt)
        return {"results": [{"text": calcsubmit(body.prompt)}]}
    finally:
        if body.soft_prompt is not None:
            spRequest(before)
        vars.aibusy = False


@app.route("/api/v1/generate", methods=["POST"])
def generate():
    body = types.SimpleNamespace(**{"soft_prompt": None, **request.get_json()})
    soft_prompt_validator(body.soft_prompt or "")
    return _generate_text(body)


@app.route("/api/v1/config/soft_prompt", methods=["PUT"])
def put_soft_prompt():
    value = request.get_json()["value"]
    soft_prompt_validator(value)
    spRequest(value)
    return {}


@app.route("/api/v1/config/soft_prompts_list")
def soft_prompts_list():
    return {"values": [{"value": each["filename"]} for each in fileops.getspfiles(vars.modeldim)]}


@app.route("/")
def index():
    return "<html><body>the page</body></html>"


if __name__ == "__main__":
    globals().pop(os.environ.get("STANDIN_LACKS"), None)  # another release of the host
    Session(app)
    load_model(sys.argv[2])
    socketio.run(app, host="127.0.0.1", port=int(sys.argv[1]))
