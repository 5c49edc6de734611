import pytest
import torch
from models import FAMILIES, tiny_model

from kobold_sp_plugin.training.loss import Head, cross_entropy, head_of


def made(softcap=None, scale=1.0, bias=False, dtype=torch.float64):
    torch.manual_seed(0)
    weight = torch.randn(50, 8, dtype=dtype)
    return Head(weight, torch.randn(50, dtype=dtype) if bias else None, scale, softcap)


@pytest.mark.parametrize(
    "options", [{}, {"softcap": 3.0}, {"scale": 0.25}, {"bias": True, "softcap": 2.0, "scale": 2.0}]
)
@pytest.mark.parametrize("per_chunk", [1, 7, 1000])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_loss_and_gradient_are_those_of_the_whole_at_once(monkeypatch, options, per_chunk, dtype):
    monkeypatch.setattr("kobold_sp_plugin.training.loss.CHUNK_VALUES", 50 * per_chunk)
    head = made(**options, dtype=dtype)
    hidden = torch.randn(20, 8, dtype=dtype, requires_grad=True)
    wanted = torch.randint(0, 50, (20,))

    whole = torch.nn.functional.cross_entropy(head.logits(hidden.detach().requires_grad_()), wanted, reduction="sum")
    reference = hidden.detach().clone().requires_grad_()
    logits = torch.nn.functional.linear(reference, head.weight, head.bias).float() * head.scale
    if head.softcap is not None:
        logits = head.softcap * torch.tanh(logits / head.softcap)
    expected = torch.nn.functional.cross_entropy(logits, wanted, reduction="sum")
    expected.backward()

    loss = cross_entropy(head, hidden, wanted)
    loss.backward()
    assert torch.allclose(loss, expected.float(), rtol=1e-5)
    assert torch.allclose(whole, expected, rtol=1e-5)
    assert hidden.grad.dtype is dtype
    assert torch.allclose(hidden.grad, reference.grad, rtol=1e-4, atol=1e-5)


def test_in_half_precision_the_gradient_is_that_of_float32():
    torch.manual_seed(0)
    weight, wanted = 0.02 * torch.randn(100_000, 8), torch.arange(5)
    hidden = torch.randn(5, 8)
    gradients = []
    for dtype in (torch.float32, torch.bfloat16):
        state = hidden.detach().clone().to(dtype).requires_grad_()
        cross_entropy(Head(weight.to(dtype), None, 1.0, None), state, wanted).backward()
        gradients.append(state.grad.float().flatten())
    assert torch.cosine_similarity(*gradients, dim=0) > 0.99


def test_a_batch_in_which_nothing_is_learned_has_no_loss():
    hidden = torch.zeros(0, 8, dtype=torch.float64, requires_grad=True)
    loss = cross_entropy(made(), hidden, torch.zeros(0, dtype=torch.long))
    loss.backward()
    assert loss.item() == 0.0 and hidden.grad.shape == (0, 8)


def test_the_gradient_from_above_counts():
    head, hidden = made(), torch.randn(5, 8, dtype=torch.float64, requires_grad=True)
    (cross_entropy(head, hidden, torch.arange(5)) * 3).backward()
    tripled = hidden.grad.clone()
    hidden.grad = None
    cross_entropy(head, hidden, torch.arange(5)).backward()
    assert torch.allclose(tripled, 3 * hidden.grad)


def test_nothing_of_the_vocabularys_size_is_kept_for_the_backward_pass():
    head, hidden = made(), torch.randn(20, 8, dtype=torch.float64, requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        cross_entropy(head, hidden, torch.zeros(20, dtype=torch.long))
    assert all(tensor.numel() <= hidden.numel() for tensor in kept)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_has_its_head_found(family):
    assert head_of(tiny_model(family), torch.arange(3, 20)[None]) is not None


def test_a_model_whose_logits_are_made_otherwise_keeps_its_own(monkeypatch):
    model = tiny_model(FAMILIES[0])
    forward = model.forward

    def odd(*args, **kwargs):
        output = forward(*args, **kwargs)
        output.logits = output.logits * 2 + 1
        return output

    monkeypatch.setattr(model, "forward", odd)
    assert head_of(model, torch.arange(3, 20)[None]) is None
