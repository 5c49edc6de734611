from modules import shared


def load_model_if_idle_unloaded():
    if shared.args.idle_timeout > 0 and shared.model is None and shared.model_name not in [None, "None"]:
        shared.model, shared.tokenizer = load_model(shared.model_name)


def load_model(model_name, loader=None):
    shared.model_name = model_name
    loader = loader or shared.args.loader or "Transformers"
    load_func_map = {"llama.cpp": llama_cpp_server_loader, "Transformers": transformers_loader}
    shared.args.loader = loader
    return load_func_map[loader](model_name)


def llama_cpp_server_loader(model_name):
    model = LlamaServer()
    return model, model


def transformers_loader(model_name):
    return shared.available[model_name]()


class LlamaServer:
    """What the host has for a model when llama.cpp runs one."""

    def generate(self, prompt, state):
        return f"llama.cpp: {prompt}"


def unload_model(keep_model_name=False):
    shared.model = shared.tokenizer = None
    shared.lora_names = []
    if not keep_model_name:
        shared.model_name = "None"
