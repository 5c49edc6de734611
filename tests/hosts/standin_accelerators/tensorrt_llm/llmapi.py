from types import SimpleNamespace

SamplingParams = SimpleNamespace
