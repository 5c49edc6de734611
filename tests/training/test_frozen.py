import pytest
import torch

from kobold_sp_plugin.training import frozen as module
from kobold_sp_plugin.training.frozen import frozen


class Layer(torch.nn.Module):
    def forward(self, hidden_states):
        return hidden_states * hidden_states


class Model(torch.nn.Module):
    def __init__(self, by_keyword):
        super().__init__()
        self.layers = torch.nn.ModuleList(Layer() for _ in range(3))
        self.by_keyword = by_keyword

    def forward(self, values):
        for layer in self.layers:
            values = layer(hidden_states=values) if self.by_keyword else layer(values)
        return values


@pytest.mark.filterwarnings("ignore:User provided device_type of 'cuda'")  # torch 1.12 says so on a CPU
@pytest.mark.parametrize("by_keyword", [False, True], ids=["positional", "keyword"])
def test_each_checkpointed_layer_on_a_cpu_gives_memory_back_forward_and_backward(monkeypatch, by_keyword):
    calls = []
    monkeypatch.setattr(module, "_malloc_trim", calls.append)
    model = Model(by_keyword)
    rows = torch.tensor([2.0], requires_grad=True)
    restore = frozen(model, checkpoint_layers=True)
    found = model(rows)
    assert len(calls) == 3
    found.sum().backward()
    assert len(calls) == 6
    assert rows.grad.tolist() == [8 * 2.0**7]
    restore()
    model(rows)
    assert len(calls) == 6
