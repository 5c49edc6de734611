"""What a step of Muon does to rows."""

import pytest
import torch

from kobold_sp_plugin.training.muon import Muon, orthogonal


@pytest.mark.parametrize("shape", [(20, 160), (160, 20), (7, 7), (3, 20, 64), (1, 64)])
def test_singular_values_become_about_one_and_singular_vectors_stay(shape):
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 1e-4
    found = orthogonal(matrix)
    values = torch.linalg.svdvals(found)
    assert values.numpy() == pytest.approx(1, abs=0.05)
    left, _, right = torch.linalg.svd(matrix, full_matrices=False)
    core = left.transpose(-2, -1) @ found @ right.transpose(-2, -1)
    off_diagonal = core - torch.diag_embed(torch.diagonal(core, dim1=-2, dim2=-1))
    assert float(off_diagonal.abs().max()) < 1e-3


@pytest.mark.parametrize("shape", [(20, 160), (2, 20, 160), (4,)])
def test_a_step_is_downhill_and_about_as_large_as_the_rate(shape):
    parameter = torch.nn.Parameter(torch.zeros(shape))
    slope = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 1e3
    parameter.grad = slope.clone()
    Muon([parameter], lr=0.1).step()
    assert 0.06 < float(parameter.detach().pow(2).mean().sqrt()) < 0.13
    assert float((parameter.detach() * slope).sum()) < 0


def test_directions_with_a_small_gradient_move_as_far_as_those_with_a_large_one():
    parameter = torch.nn.Parameter(torch.zeros(2, 8))
    parameter.grad = torch.zeros(2, 8)
    parameter.grad[0, 0], parameter.grad[1, 1] = 1.0, 0.1
    Muon([parameter], lr=0.1).step()
    large, small = parameter.detach()[0, 0], parameter.detach()[1, 1]
    assert 0.5 < float(small / large) < 2


def test_without_a_gradient_nothing_moves():
    still, flat = (torch.nn.Parameter(torch.ones(3, 8)) for _ in range(2))
    flat.grad = torch.zeros(3, 8)
    Muon([still, flat], lr=0.1).step()
    assert torch.equal(still, torch.ones(3, 8)) and torch.equal(flat, torch.ones(3, 8))


def test_weight_decay_shrinks_by_rate_times_decay():
    parameter = torch.nn.Parameter(torch.ones(3, 8))
    parameter.grad = torch.zeros(3, 8)
    Muon([parameter], lr=0.1, weight_decay=0.5).step()
    assert parameter.detach().numpy() == pytest.approx(0.95)
