"""Which embedding matrices a fingerprint tells apart, and which it takes for one."""

import hashlib
import json

import numpy as np
import pytest
import torch
from embeddings import Model, moved, quantised
from hypothesis import given, settings
from hypothesis import strategies as st

from kobold_sp_plugin.compatibility import facts, fingerprint
from kobold_sp_plugin.compatibility.fingerprints import CLOSE, RELATED, SAME, sampled_ids, similarity
from kobold_sp_plugin.compatibility.matrix import Matrix
from kobold_sp_plugin.errors import NoEmbedding

GOLDEN = "22520e88024e5b76ce1f7a2aed5b34dba8841f14edc733d927a08129ab8acb3e"


def alike(first, second):
    return similarity(fingerprint(first), fingerprint(second))


@pytest.mark.parametrize(
    "change",
    [lambda weight: weight.half(), lambda weight: weight.bfloat16(), quantised(8), lambda weight: weight * 22.6],
    ids=["float16", "bfloat16", "8 bits", "scaled"],
)
def test_a_copy_in_another_precision_is_the_same(change):
    assert alike(Model(), Model().changed(change)) >= SAME


@pytest.mark.parametrize("change", [quantised(4), moved(0.1), moved(0.2), moved(0.4)])
def test_a_fine_tune_and_a_copy_in_4_bits_are_close(change):
    assert CLOSE <= alike(Model(), Model().changed(change)) < SAME


def test_a_matrix_that_moved_far_is_still_related():
    assert RELATED <= alike(Model(), Model().changed(moved(1.0))) < CLOSE


@pytest.mark.parametrize("width", [4, 32, 768])
@pytest.mark.parametrize("common", [0.0, 0.2])
def test_unrelated_matrices_are_told_apart(width, common):
    """Also where every row of a matrix has one large part in common, as real ones have."""
    models = [Model(width=width, seed=seed, common=common) for seed in range(6)]
    prints = [fingerprint(model) for model in models]
    found = [similarity(a, b) for index, a in enumerate(prints) for b in prints[:index]]
    assert max(map(abs, found)) < RELATED


def test_columns_that_outweigh_all_others_do_not_make_kin_of_strangers():
    """The worst case: the same column in both models, which tells how frequent a token is."""
    torch.manual_seed(7)
    frequency = torch.randn(2000)

    def heavy(weight):
        weight[:, 3] = 2 * frequency
        return weight

    models = [Model(seed=seed).changed(heavy) for seed in range(2)]
    rows = [model.embedding.weight.detach().numpy() for model in models]
    cosine = (rows[0] * rows[1]).sum() / np.linalg.norm(rows[0]) / np.linalg.norm(rows[1])
    assert cosine > 0.9
    assert alike(*models) < RELATED


def test_tokens_that_are_added_to_a_large_vocabulary_change_nothing():
    assert np.array_equal(sampled_ids(32_000), sampled_ids(49_953))
    assert len(sampled_ids(32_000)) == 512 and sampled_ids(32_000).max() < 4096


@pytest.mark.parametrize("vocabulary", [2064, 1990])
def test_added_and_removed_tokens_of_a_small_vocabulary_change_little(vocabulary):
    model, other = Model(2000), Model(vocabulary, seed=1)
    shared = min(vocabulary, 2000)
    with torch.no_grad():
        other.embedding.weight[:shared] = model.embedding.weight[:shared]
    assert alike(model, other) >= CLOSE


@pytest.mark.parametrize("vocabulary", [64, 100, 511, 513])
def test_small_vocabularies(vocabulary):
    assert alike(Model(vocabulary), Model(vocabulary)) == 1


@pytest.mark.parametrize("vocabulary", [1, 5, 63])
def test_too_few_tokens_prove_nothing(vocabulary):
    assert alike(Model(vocabulary), Model(vocabulary)) is None


@settings(max_examples=25, deadline=None)
@given(st.integers(64, 700), st.integers(1, 90), st.integers(0, 2**32 - 1))
def test_it_compares_with_itself_alone_and_either_way_round(vocabulary, width, seed):
    rng = np.random.default_rng(seed)
    matrices = [rng.normal(size=(vocabulary, width)).astype(np.float32) for _ in range(2)]
    marks = [fingerprint(Matrix(vocabulary, width, lambda ids, rows=rows: rows[ids])) for rows in matrices]
    assert similarity(marks[0], marks[0]) == 1
    assert similarity(*marks) == similarity(*reversed(marks))
    assert len(json.dumps(marks[0])) < 1000
    assert similarity(marks[0], {**marks[1], "width": width + 1}) is None


def test_it_is_small_json_and_never_changes():
    """Golden: files carry it. Whoever changes it gives it another version."""
    model = Model(600, 8)
    with torch.no_grad():
        model.embedding.weight.copy_(torch.from_numpy(np.random.RandomState(0).randint(-99, 99, (600, 8))))
    mark = fingerprint(model)
    assert json.loads(json.dumps(mark)) == mark
    assert {key: mark[key] for key in ("version", "vocabulary", "width")} == {
        "version": 2, "vocabulary": 600, "width": 8,
    }  # fmt: skip
    assert hashlib.sha256(mark["signs"].encode()).hexdigest() == GOLDEN


def test_a_large_matrix_is_not_read_whole():
    taken = []

    def rows(ids):
        taken.extend(ids)
        return np.random.RandomState(0).normal(size=(len(ids), 16)).astype(np.float32)

    fingerprint(Matrix(256_000, 16, rows))
    assert len(taken) == 512


def test_offloaded_rows_are_asked_of_the_module():
    class Offloaded(torch.nn.Embedding):
        def forward(self, ids):
            return kept[ids]

    model = Model()
    kept = model.embedding.weight.detach().clone()
    mark = fingerprint(model)
    model.embedding = Offloaded(2000, 64, device="meta")
    assert fingerprint(model) == mark


def test_a_model_without_an_embedding():
    with pytest.raises(NoEmbedding):
        fingerprint(torch.nn.Linear(2, 2))
    assert facts(torch.nn.Linear(2, 2)).width is None


@pytest.mark.parametrize(
    "change",
    [torch.zeros_like, lambda weight: weight[:1].expand_as(weight), lambda weight: weight.fill_(float("nan"))],
    ids=["zeros", "one row", "not a number"],
)
def test_a_matrix_that_nothing_was_loaded_into_has_no_fingerprint(change):
    model = Model().changed(change)
    with pytest.raises(NoEmbedding):
        fingerprint(model)
    assert facts(model).fingerprint is None


def test_a_table_that_was_emptied_has_no_fingerprint():
    """KoboldAI empties every tensor when it changes models."""
    model = Model()
    with torch.no_grad():
        model.embedding.weight.set_()
    assert facts(model).fingerprint is None
    assert facts(model).width == 64
