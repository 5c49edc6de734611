"""Every way to an engine against transformers with the same weights in float32: a table of route, engine and family.

    KOBOLD_SP_LLAMA_SERVER=/path/to/llama-server KOBOLD_SP_VLLM_PYTHON=/path/to/python python benchmarks/engines.py

Needs llama-cpp-python. What a variable does not name is left out, which is said. Random weights of two layers; keys
and values in float32, too. A cell has the largest difference of the next token's logits with a soft prompt of 37 rows,
before and behind the beginning-of-sequence token, and in brackets that of the bare model; and whether the greedy texts
are equal. What answers by HTTP tells no logits, but logarithms of probabilities: of all tokens (llama-server), or of
the 20 likeliest (vLLM).
"""

import argparse
import ctypes
import os
import sys
import tempfile
import threading
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:1] = [str(ROOT), str(ROOT / "tests")]  # in place of this folder

import gguf_files  # noqa: E402

from kobold_sp_plugin import SoftPrompt, attach  # noqa: E402
from kobold_sp_plugin.engines import GenerationSettings  # noqa: E402
from kobold_sp_plugin.engines.llama_bindings import Decoder, library  # noqa: E402
from kobold_sp_plugin.engines.llama_cpp import LlamaCppEngine  # noqa: E402
from kobold_sp_plugin.engines.remote import Remote  # noqa: E402
from kobold_sp_plugin.errors import TiedEmbedding  # noqa: E402
from kobold_sp_plugin.export import lora, model_copy, slot  # noqa: E402
from kobold_sp_plugin.softprompt import Order  # noqa: E402

FAMILIES = {"llama": "Llama", "qwen3": "Qwen 3", "gemma2": "Gemma 2", "gemma3": "Gemma 3"}
PROMPT, LENGTH = "The door opened and", 20
COUNT = len(gguf_files.TOKENS)


def softprompts():
    rows = np.random.default_rng(1).normal(size=(37, gguf_files.WIDTH)).astype(np.float32) * 0.3
    return [SoftPrompt(rows, {"name": "noir"}, order=order) for order in (Order.BEFORE_BOS, Order.AFTER_BOS)]


class Reference:
    """The model in transformers, and its file."""

    def __init__(self, family, folder):
        self.model = gguf_files.tiny(family)
        self.path = str(gguf_files.write(self.model, Path(folder) / f"{family}.gguf"))
        self.folder = Path(folder)
        decoder = Decoder(self.path, 512)
        self.ids = decoder.ids_of(PROMPT)
        decoder.close()

    def logits(self, stack):
        handle = attach(self.model)
        with handle.override(stack), torch.no_grad():
            return self.model(**handle.prepend(torch.tensor([self.ids]))).logits[0, -1].numpy()

    def new_ids(self, stack):
        ids = torch.tensor([self.ids])
        with attach(self.model).override(stack), torch.no_grad():
            made = self.model.generate(ids, attention_mask=ids > 0, max_new_tokens=LENGTH, do_sample=False)
        return made[0, len(self.ids) :].tolist()

    def with_tokens(self, softprompt, tokens):
        """The prompt with the ids of soft tokens in their place; the first of its own is the beginning token."""
        if softprompt.order is Order.AFTER_BOS:
            return [self.ids[0], *tokens, *self.ids[1:]]
        return [*tokens, *self.ids]


def log_softmax(logits):
    return logits - np.logaddexp.reduce(logits)


def cell(reference, bare, having, as_logits=lambda logits: logits):
    """``bare`` and ``having`` (one for each of the soft prompts): (logits, ids of the greedy text)."""
    worst, equal = [], True
    for stack, (found, new) in [((), bare), *zip([(each,) for each in softprompts()], having)]:
        worst.append(np.abs(as_logits(found) - as_logits(reference.logits(stack))).max())
        equal &= new == reference.new_ids(stack)
    return f"{max(worst[1:]):.1e} ({worst[0]:.1e}), {'equal' if equal else '**texts differ**'}"


def greedy(decoder, ids):
    """Logits after ``ids``, of the file's own tokens, and what follows; what the decoder has read stands before."""
    decoder.read_ids(ids[0], ids[1])
    first, new, at = decoder.logits()[:COUNT], [], ids[1] + len(ids[0])
    logits = first
    while True:
        new.append(int(logits[:COUNT].argmax()))
        if len(new) == LENGTH:
            return first, new
        decoder.read_ids(new[-1:], at)
        logits, at = decoder.logits(), at + 1


def rows(reference):
    """Rows through ``batch.embd``, by our engine."""
    engine = LlamaCppEngine(reference.path, cache_type="f32")

    def found(stack):
        logits, new = engine.logits(reference.ids, stack), []
        for _ in range(LENGTH):
            new.append(int(engine.logits([*reference.ids, *new], stack).argmax()))
        return logits, new

    try:
        return cell(reference, found(()), [found((each,)) for each in softprompts()])
    finally:
        engine.close()


def alone(path, ids):
    decoder = Decoder(path, 512, cache_type="f32")
    try:
        return greedy(decoder, (ids, 0))
    finally:
        decoder.close()


def adapter(reference):
    """``--to lora``, loaded by llama.cpp."""

    def found(softprompt):
        made = lora.export(softprompt, reference.path, reference.folder / "lora.gguf")
        llama, decoder = library(), Decoder(reference.path, 512, cache_type="f32")
        try:
            loaded = llama.llama_adapter_lora_init(decoder.model, made.path.encode())
            scales = (ctypes.c_float * 1)(1.0)
            llama.llama_set_adapters_lora(decoder.context, (llama.llama_adapter_lora_p_ctypes * 1)(loaded), 1, scales)
            return greedy(decoder, (reference.with_tokens(softprompt, made.tokens), 0))
        finally:
            decoder.close()

    return cell(reference, alone(reference.path, reference.ids), [found(each) for each in softprompts()])


def copy(reference):
    """``--to gguf``, opened by llama.cpp."""
    having = []
    for each in softprompts():
        made = model_copy.export(each, reference.path, reference.folder / "copy.gguf")
        having.append(alone(made.path, reference.with_tokens(each, made.tokens)))
    return cell(reference, alone(str(reference.folder / "copy.gguf"), reference.ids), having)


def state(reference):
    """``--to slot``, loaded by llama.cpp."""

    def found(softprompt):
        path = reference.folder / "noir.slot"
        slot.export(softprompt, reference.path, path, "f32")
        llama, decoder = library(), Decoder(reference.path, 512, cache_type="f32")
        try:
            ids, count = (ctypes.c_int32 * 512)(), ctypes.c_size_t()
            assert llama.llama_state_seq_load_file(
                decoder.context, str(path).encode(), 0, ids, 512, ctypes.byref(count)
            )
            text = reference.ids[softprompt.order is Order.AFTER_BOS :]
            return greedy(decoder, (text, count.value))
        finally:
            decoder.close()

    return cell(reference, alone(reference.path, reference.ids), [found(each) for each in softprompts()])


class Asked:
    """A llama-server, and what it says of a prompt of ids."""

    def __init__(self, stack, path, folder, *options):
        from llama_servers import EXACT, Server

        self.server = Server(path, folder, "-np", "1", *EXACT, *options)
        stack.callback(self.server.close)
        self.remote = Remote(self.server.url)

    def __call__(self, ids, **more):
        # Of the last token's own id, which is a whole character: of no other are probabilities told.
        body = {"prompt": ids, "cache_prompt": True, "id_slot": 0, "top_k": 1, "samplers": ["top_k"], **more}
        told = {**body, "n_predict": 1, "n_probs": 2 * COUNT, "logit_bias": [[ids[-1], 1e4]]}
        likeliest = self.remote.ask("/completion", told)["completion_probabilities"][0]["top_logprobs"]
        found = np.full(COUNT, np.nan, np.float32)
        for each in likeliest:
            if each["id"] < COUNT:
                found[each["id"]] = each["logprob"]
        return found, self.remote.ask("/completion", {**body, "n_predict": LENGTH, "return_tokens": True})["tokens"]


def server_adapter(reference):
    """``--to lora``, loaded by llama-server; the bare model is it with a scale of 0."""
    having = []
    for each in softprompts():
        made = lora.export(each, reference.path, reference.folder / "lora.gguf")
        with ExitStack() as stack:
            ask = Asked(stack, reference.path, reference.folder, "--lora", made.path)
            having.append(ask(reference.with_tokens(each, made.tokens)))
            bare = ask(reference.ids, lora=[{"id": 0, "scale": 0.0}])
    return cell(reference, bare, having, log_softmax)


def server_copy(reference):
    """``--to gguf``, opened by llama-server."""
    having = []
    for each in softprompts():
        made = model_copy.export(each, reference.path, reference.folder / "copy.gguf")
        with ExitStack() as stack:
            ask = Asked(stack, made.path, reference.folder)
            having.append(ask(reference.with_tokens(each, made.tokens)))
            bare = ask(reference.ids)
    return cell(reference, bare, having, log_softmax)


def server_state(reference):
    """A slot that llama-server restores, by our engine."""
    with ExitStack() as stack:
        ask = Asked(stack, reference.path, reference.folder)
        engine = ask.server.engine()
        decoder = stack.enter_context(closing_decoder(reference.path))

        def found(softprompts):
            request = {"n_predict": 1, "n_probs": COUNT, "temperature": 0.0, "samplers": ["top_k"], "stream": True}
            request.update(timings_per_token=True, logit_bias=[[reference.ids[-1], 1e4]])
            answers = list(engine._stream(request, softprompts, reference.ids, threading.Event()))
            (said,) = [each for answer in answers for each in answer.get("completion_probabilities") or ()]
            logits = np.full(COUNT, np.nan, np.float32)
            for each in said["top_logprobs"]:
                logits[each["id"]] = each["logprob"]
            settings = GenerationSettings(PROMPT, max_length=LENGTH, temperature=0.0)
            text = "".join(engine.generate(settings, softprompts))
            wanted = reference.new_ids(softprompts)
            before = len(decoder.text_of(reference.ids))
            return logits, wanted if text == decoder.text_of([*reference.ids, *wanted])[before:] else text

        return cell(reference, found(()), [found((each,)) for each in softprompts()], log_softmax)


class closing_decoder:
    """A decoder for a ``with`` statement."""

    def __init__(self, path):
        self._path = path

    def __enter__(self):
        self._decoder = Decoder(self._path, 512)
        return self._decoder

    def __exit__(self, *_):
        self._decoder.close()


LLAMA_CPP = {
    ("llama.cpp in process", "rows as embeddings"): rows,
    ("llama.cpp in process", "export --to lora"): adapter,
    ("llama.cpp in process", "export --to gguf"): copy,
    ("llama.cpp in process", "export --to slot"): state,
}
LLAMA_SERVER = {
    ("llama-server", "serve --engine llama-server"): server_state,
    ("llama-server", "export --to lora"): server_adapter,
    ("llama-server", "export --to gguf"): server_copy,
}


def of_vllm(family, folder):
    """(route, cell) of each of vLLM's routes, with models whose heads it takes on a CPU."""
    from tests.engines import test_vllm as cases

    own = Path(folder) / f"vllm-{family}"
    model, tokenizer = cases.tiny(family), cases.tiny_tokenizer()
    model.save_pretrained(own)
    tokenizer.save_pretrained(own)
    engine = cases.TransformersEngine(model, tokenizer, family)
    engine.model, engine._context = model, 250
    settings = cases.SETTINGS["greedy"]
    texts = {soft: "".join(engine.generate(settings, stack)) for soft, stack in cases.SOFT.items()}

    def cell(next_tokens, written):
        told = {soft: type("Told", (), {"_next_tokens": lambda *_, s=soft: next_tokens(s)}) for soft in cases.SOFT}
        worst = {soft: cases.largest_difference(engine, told[soft](), cases.SOFT[soft]) for soft in cases.SOFT}
        bare, equal = worst.pop("none"), all(written(soft) == texts[soft] for soft in texts)
        return f"{max(worst.values()):.1e} ({bare:.1e}), {'equal' if equal else '**texts differ**'}"

    for route, flags in (("chat", ["--trust-request-chat-template"]), ("completions", [])):
        with cases.server(own, Path(folder) / f"log-{route}", "--enable-prompt-embeds", *flags) as (url, _):
            vllm = cases.VllmServer(url, str(own))
            yield (
                ("vLLM server", f"serve --engine vllm, by {route}"),
                cell(
                    lambda soft: vllm._next_tokens(settings.prompt, cases.SOFT[soft]),  # noqa: B023  called at once
                    lambda soft: "".join(vllm.generate(settings, cases.SOFT[soft])),  # noqa: B023
                ),
            )
    for ranks in (1, 2):
        written, tokens, _, counted = cases.in_process(own, Path(folder), cases.IN_PROCESS, str(ranks))
        more = "" if ranks == 1 else f", tensor parallel {ranks}"
        texts_of = {soft: written[f"{soft} greedy"] for soft in texts}
        yield ("vLLM in process", f"LLM.generate{more}"), cell(tokens.__getitem__, texts_of.__getitem__)
        found = [int(after - before) for before, after in zip(counted, counted[1:])]
        yield ("vLLM in process", f"tokens from the prefix cache{more}"), str(found)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--family", action="append", choices=FAMILIES, help="[default: all]")
    families = parser.parse_args().family or list(FAMILIES)
    routes = dict(LLAMA_CPP)
    if os.environ.get("KOBOLD_SP_LLAMA_SERVER"):
        routes.update(LLAMA_SERVER)
    else:
        print("KOBOLD_SP_LLAMA_SERVER names no llama-server: it is left out.", file=sys.stderr)
    with_vllm = bool(os.environ.get("KOBOLD_SP_VLLM_PYTHON"))
    if not with_vllm:
        print("KOBOLD_SP_VLLM_PYTHON names no interpreter with vLLM: it is left out.", file=sys.stderr)
    table = {}

    def tell(route, family, said):
        table[route, family] = said
        print(FAMILIES[family], *route, said, sep=" | ", file=sys.stderr, flush=True)

    for family in families:
        with tempfile.TemporaryDirectory() as folder:
            reference = Reference(family, folder)
            for route, made in routes.items():
                try:
                    tell(route, family, made(reference))
                except TiedEmbedding:
                    tell(route, family, "refused: tied")
            with gguf_files.as_llama_cpp_computes(reference.model):
                tell(("llama.cpp in process", "rows; transformers with llama.cpp's GELU"), family, rows(reference))
            for route, said in of_vllm(family, folder) if with_vllm else ():
                tell(route, family, said)
    print("| engine | route | " + " | ".join(FAMILIES[family] for family in families) + " |")
    print("|---" * (2 + len(families)) + "|")
    for route in dict.fromkeys(route for route, _ in table):
        print(f"| {' | '.join(route)} | " + " | ".join(table[route, family] for family in families) + " |")


if __name__ == "__main__":
    main()
