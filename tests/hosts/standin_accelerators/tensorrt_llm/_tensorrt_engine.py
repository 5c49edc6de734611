from types import SimpleNamespace

import transformers


class LLM:
    def __init__(self, model, skip_tokenizer_init):
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(model)

    def generate_async(self, prompt, sampling_params, streaming):
        for word in prompt.split()[: sampling_params.max_tokens]:
            yield SimpleNamespace(outputs=[SimpleNamespace(text_diff=f" {word}")])

    def shutdown(self):
        pass
