"""A host in small, in our own words: shaped like KoboldAI United wherever the plugin touches it.

Run as a script in a folder with ``softprompts/``, under eventlet; the arguments are a port, a backend and the folder
of a model. Executed under another name it serves nothing, for tests that call it.
"""

if __name__ == "__main__":
    import eventlet

    eventlet.monkey_patch(all=True, thread=False, os=False)
import gc
import json
import os
import sys
import types
import zipfile
from queue import Empty, SimpleQueue

import numpy as np
import torch
from flask import Flask, has_request_context, request
from flask_socketio import SocketIO, join_room
from flask_socketio import emit as _emit
from torch.nn import Embedding
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, StoppingCriteria, StoppingCriteriaList

torch.set_num_threads(1)
app = Flask(__name__)
app.config["SESSION_TYPE"] = "filesystem"
socketio = SocketIO(app, async_mode="eventlet" if __name__ == "__main__" else "threading")
queue = SimpleQueue()
"""What is to be sent and was not said by a request; the relay sends it."""

# Run inside a test's process, the host would empty the tensors of all other tests as well.
NOT_THE_HOSTS = {id(each): each for each in gc.get_objects() if issubclass(type(each), torch.Tensor)}


class ValidationError(ValueError):
    """As marshmallow's."""


@app.errorhandler(ValidationError)
def invalid(error):
    return {"detail": error.args[0]}, 422


# The settings, whose variables emit when they are set


class settings:
    no_save_variables = ()

    def __setattr__(self, name, value):
        before = getattr(self, name, None)
        is_new = name not in self.__dict__
        super().__setattr__(name, value)
        if not is_new and name != "sp" and value != before:
            payload = {"classname": type(self).__name__[:-9], "name": name, "old_value": before, "value": value}
            if has_request_context():
                socketio.emit("var_changed", payload, room="UI_2")
            else:
                queue.put(("var_changed", payload, "UI_2"))

    def to_json(self):
        return json.dumps({name: value for name, value in vars(self).items() if name not in self.no_save_variables})


class system_settings(settings):
    no_save_variables = ("sp", "sp_length", "aibusy", "inference_config")

    def __init__(self):
        self.spfilename, self.spmeta, self.spname, self.splist = "", None, "Not in Use", []
        self.sp, self.sp_length, self.allowsp, self.spselect = None, 0, False, ""
        self.aibusy, self.inference_config = False, types.SimpleNamespace(do_core=True)


class model_settings(settings):
    def __init__(self):
        self.model, self.modeldim, self.max_length, self.genamt = "", -1, 128, 12


class story_settings(settings):
    def __init__(self):
        self.prompt, self.context, self.genseqs = "", [], []


class Variables:
    """Each name lives in one of the settings."""

    def __init__(self):
        self._system_settings, self._model_settings = system_settings(), model_settings()
        self._story_settings = story_settings()
        self.tokenizer = None

    def __setattr__(self, name, value):
        for each in list(self.__dict__.values()):
            if name in getattr(each, "__dict__", ()) and isinstance(each, settings):
                return setattr(each, name, value)
        super().__setattr__(name, value)

    def __getattr__(self, name):
        for each in list(self.__dict__.values()):
            if isinstance(each, settings) and hasattr(each, name):
                return getattr(each, name)
        raise AttributeError(name)

    def calc_ai_text(self, submitted_text=""):
        """As much of the text's end as there is room for; and what the context bar shows."""
        if self.tokenizer is None:
            return []
        ids = self.tokenizer(self.prompt + submitted_text)["input_ids"]
        ids = ids[-(self.max_length - self.sp_length - self.genamt) :]
        soft = [{"type": "soft_prompt", "tokens": [[-1, ""]] * self.sp_length}] if self.sp_length else []
        self.context = [*soft, {"type": "prompt", "tokens": [[each, ""] for each in ids]}]
        return ids


koboldai_vars = Variables()
koboldai_settings = types.ModuleType("koboldai_settings")
koboldai_settings.system_settings, koboldai_settings.multi_story = system_settings, False


def settingschanged():
    os.makedirs("settings", exist_ok=True)
    with open("settings/system_settings.v2_settings", "w") as file:
        file.write(koboldai_vars._system_settings.to_json())


# The backends


class InferenceModel:
    def __init__(self, **capabilities):
        self.capabilties = types.SimpleNamespace(**{"embedding_manipulation": False, "uses_tpu": False, **capabilities})
        self.model, self.tokenizer, self.path, self.seen = None, None, "", []

    def load(self):
        self._load()

    def _load(self):
        pass

    def unload(self):
        pass

    def core_generate(self, text):
        ids = torch.tensor(text)
        if koboldai_vars.sp is not None:
            assert self.capabilties.embedding_manipulation
            first = self.model.config.vocab_size
            ids = torch.cat((torch.arange(first, first + len(koboldai_vars.sp)), ids))
        assert len(ids) + koboldai_vars.genamt <= koboldai_vars.max_length
        return self.raw_generate(ids, max_new=koboldai_vars.genamt, is_core=True)

    def raw_generate(self, prompt, max_new, is_core=False, forever=False):
        koboldai_vars.inference_config.do_core = is_core
        ids = prompt if torch.is_tensor(prompt) else torch.tensor(self.tokenizer(prompt)["input_ids"])
        return self._raw_generate(prompt_tokens=ids, max_new=10**7 if forever else max_new)

    def _raw_generate(self, prompt_tokens, max_new):
        return []


class Sees(StoppingCriteria):
    def __init__(self, seen):
        self.seen = seen

    def __call__(self, input_ids, scores, **kwargs):
        self.seen.append(input_ids.tolist())
        return False


class Transformers(InferenceModel):
    def _load(self):
        self.model = AutoModelForCausalLM.from_pretrained(self.path)
        self.tokenizer = PreTrainedTokenizerFast.from_pretrained(self.path)
        koboldai_vars.modeldim = self.model.get_input_embeddings().embedding_dim

    def unload(self):
        self.model = self.tokenizer = None
        with torch.no_grad():
            for each in gc.get_objects():
                # By type: some of torch's objects warn when they are looked at.
                if issubclass(type(each), torch.Tensor) and id(each) not in NOT_THE_HOSTS:
                    each.set_()
        gc.collect()

    def _raw_generate(self, prompt_tokens, max_new):
        with torch.no_grad():
            rows = self.model.generate(
                prompt_tokens[None],
                do_sample=False,
                max_length=min(len(prompt_tokens) + max_new, koboldai_vars.max_length),
                stopping_criteria=StoppingCriteriaList([Sees(self.seen)]),
                pad_token_id=0,
            )
        return rows[0, len(prompt_tokens) :].tolist()


class HFTorch(Transformers):
    def __init__(self):
        super().__init__(embedding_manipulation=True)

    def _load(self):
        koboldai_vars.allowsp = True
        super()._load()
        self.patch_embedding()

    def patch_embedding(self):
        """Let every embedding of the process read ids past the vocabulary from the soft prompt, for good."""
        own_call, backend = Embedding.__call__, self

        def call(self, ids):
            if backend.model is None or self is not backend.model.get_input_embeddings():
                return own_call(self, ids)
            beyond = ids - backend.model.config.vocab_size
            embedded = own_call(self, ids.clamp_(max=backend.model.config.vocab_size - 1))
            if koboldai_vars.sp is None:
                return embedded
            return torch.where((beyond >= 0)[..., None], koboldai_vars.sp[beyond.clamp(min=0)], embedded)

        Embedding.__call__ = call


class BasicTransformers(Transformers):
    def _load(self):
        koboldai_vars.allowsp = False
        super()._load()


class Native(InferenceModel):
    """A TPU's: the host hands it the soft prompt by itself."""

    def _load(self):
        koboldai_vars.allowsp = True


model_backends = {
    "Huggingface": HFTorch(),
    "A plugin's": HFTorch(),
    "Basic Huggingface": BasicTransformers(),
    "Read Only": InferenceModel(),
    "KoboldCPP": InferenceModel(),
    "Huggingface MTJ": Native(uses_tpu=True),
}
model = model_backends["Read Only"]


def load_model(model_backend, initial_load=False):
    global model
    koboldai_vars.aibusy = True
    model = model_backends[model_backend]
    model.load()
    koboldai_vars.model = os.path.basename(model.path) or model_backend
    koboldai_vars.tokenizer = model.tokenizer
    koboldai_vars.spfilename = ""  # it looks for a name that it never writes
    refresh()
    koboldai_vars.aibusy = False


# Soft prompts


def read(filename):
    with zipfile.ZipFile(os.path.join("softprompts", filename)) as file, file.open("tensor.npy") as tensor:
        return np.lib.format.read_array(tensor), json.loads(file.read("meta.json"))


def spRequest(filename):
    if not koboldai_vars.allowsp:
        raise RuntimeError("no soft prompts with this backend")
    koboldai_vars.spfilename = ""
    if not filename:
        koboldai_vars.sp, koboldai_vars.sp_length = None, 0
        return
    rows, koboldai_vars.spmeta = read(filename)
    koboldai_vars.spname = koboldai_vars.spmeta["name"]
    koboldai_vars.sp, koboldai_vars.sp_length = torch.from_numpy(rows.astype("f4")), len(rows)
    koboldai_vars.spfilename = filename
    settingschanged()


def getspfiles(model_dimension):
    rows = [(filename, *read(filename)) for filename in sorted(os.listdir("softprompts"))]
    return [dict(meta, filename=filename, n_tokens=len(tensor)) for filename, tensor, meta in rows
            if tensor.shape[1] == model_dimension]  # fmt: skip


def checksp(filename, model_dimension):
    try:
        file = zipfile.ZipFile(filename)
    except OSError:
        return 1, None, None, None, None
    return file, (1, 0), (0, model_dimension), False, np.dtype("f4")


fileops = types.ModuleType("fileops")
fileops.getspfiles, fileops.checksp = getspfiles, checksp


def valid_softprompt(file):
    return not isinstance(fileops.checksp(file, koboldai_vars.modeldim)[0], int)


def get_softprompt_desc(item_full_path, item, valid_selection):
    meta = read(os.path.basename(item_full_path))[1]
    return [meta["name"], meta["description"]]


def refresh():
    files = [os.path.join("./softprompts", name) for name in sorted(os.listdir("softprompts"))]
    koboldai_vars.splist = [
        [os.path.basename(file), get_softprompt_desc(file, None, True)] for file in files if valid_softprompt(file)
    ]


# Generations


def calcsubmit(txt, gen_mode="standard"):
    ids = koboldai_vars.calc_ai_text(txt)
    meanwhile()
    if __name__ == "__main__":
        from eventlet import tpool

        new = tpool.execute(model.core_generate, ids)
    else:
        new = model.core_generate(ids)
    return model.tokenizer.decode(new)


def meanwhile():
    """What a test has happen between the count of a budget and the generation."""


def _generate_text(body):
    if koboldai_vars.aibusy:
        return {"detail": "busy"}, 503
    koboldai_vars.aibusy = True
    try:
        if koboldai_vars.allowsp and body.soft_prompt is not None:
            before = koboldai_vars.spfilename
            spRequest(body.soft_prompt)
        return {"results": [{"text": calcsubmit(body.prompt)}]}
    finally:
        if koboldai_vars.allowsp and body.soft_prompt is not None:
            spRequest(before)
        koboldai_vars.aibusy = False


def loadJSON(json_text_or_dict, from_file=None):
    koboldai_vars.prompt = json_text_or_dict["prompt"]


# Sockets and HTTP


def emit(*args, **kwargs):
    if has_request_context():
        return _emit(*args, **kwargs)
    return queue.put((args[0], args[1], kwargs.get("room")))


@socketio.on("connect")
def do_connect(auth=None):
    join_room("UI_" + request.args.get("ui", ""))
    if request.args.get("ui") == "2":
        for each in (koboldai_vars._system_settings, koboldai_vars._model_settings, koboldai_vars._story_settings):
            for name, value in vars(each).items():
                if name not in ("sp", "inference_config"):
                    payload = {"classname": type(each).__name__[:-9], "name": name, "old_value": None, "value": value}
                    emit("var_changed", payload)
        return
    if koboldai_vars.allowsp:
        emit("from_server", {"cmd": "allowsp", "data": True}, room="UI_1")
    shown = {koboldai_vars.spfilename: koboldai_vars.spmeta} if koboldai_vars.spfilename else {}
    emit("from_server", {"cmd": "spstatitems", "data": shown}, room="UI_1")


@socketio.on("message")
def get_message(message):
    command, data = message["cmd"], message["data"]
    if command == "splistrequest" and koboldai_vars.allowsp:
        emit("from_server", {"cmd": "buildsp", "data": fileops.getspfiles(koboldai_vars.modeldim)})
    elif command == "spselect":
        koboldai_vars.spselect = data
    elif command == "sprequest":
        spRequest(koboldai_vars.spselect)
    elif command == "submit":
        emit("from_server", {"cmd": "updatescreen", "data": calcsubmit(data)})


@socketio.on("load_softprompt")
def load_softprompt(data):
    spRequest(data)


@socketio.on("sp_list_refresh")
def sp_list_refresh(data):
    refresh()


@socketio.on("load_softprompt_list")
def load_softprompt_list(data):
    assert koboldai_vars.allowsp


@socketio.on("load_model")
def switch_model(data):
    model.unload()
    model_backends[data["plugin"]].path = data.get("path", "")
    load_model(data["plugin"])
    emit("loaded", data["plugin"])


@socketio.on("load_story")
def load_story(data):
    loadJSON(data)


def soft_prompt_validator(soft_prompt):
    if soft_prompt.strip():
        if not koboldai_vars.allowsp:
            raise ValidationError("no soft prompts with this backend")
        file, *_ = fileops.checksp("./softprompts/" + soft_prompt.strip(), koboldai_vars.modeldim)
        if isinstance(file, int):
            raise ValidationError("no such soft prompt")
        file.close()


@app.route("/api/v1/generate", methods=["POST"])
def generate():
    body = types.SimpleNamespace(**{"soft_prompt": None, **request.get_json()})
    soft_prompt_validator(body.soft_prompt or "")
    return _generate_text(body)


@app.route("/api/v1/config/soft_prompt", methods=["GET", "PUT"])
def config_soft_prompt():
    if request.method == "PUT":
        value = request.get_json()["value"]
        soft_prompt_validator(value)
        if koboldai_vars.allowsp:
            spRequest(value)
    return {"value": koboldai_vars.spfilename}


@app.route("/api/v1/config/soft_prompts_list")
def soft_prompts_list():
    return {"values": [{"value": each["filename"]} for each in fileops.getspfiles(koboldai_vars.modeldim)]}


@app.route("/classic")
def index():
    return "<html><body>the old page</body></html>"


@app.route("/")
def new_ui_index():
    return "<html><body>the new page</body></html>"


@socketio.on("create_new_softprompt")
def create_new_softprompt(data):
    raise ModuleNotFoundError("breakmodel")


def relay():
    while True:
        try:
            event, payload, room = queue.get_nowait()
            socketio.emit(event, payload, room=room)
        except Empty:
            socketio.sleep(0.05)


if __name__ == "__main__":
    from flask_session import Session

    if os.path.exists("settings/system_settings.v2_settings"):
        with open("settings/system_settings.v2_settings") as file:
            for name, value in json.load(file).items():
                setattr(koboldai_vars, name, value)
    globals().pop(os.environ.get("STANDIN_LACKS"), None)  # another release of the host
    Session(app)
    socketio.start_background_task(relay)
    model_backends[sys.argv[2]].path = sys.argv[3]
    load_model(sys.argv[2], initial_load=True)
    socketio.run(app, host="127.0.0.1", port=int(sys.argv[1]))
