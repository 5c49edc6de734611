"""The tokens nearest to a soft prompt's rows, and what the rows tell where no fingerprint does."""

import re

import numpy as np
import pytest
import torch
from embeddings import Model

from kobold_sp_plugin import SoftPrompt
from kobold_sp_plugin.compatibility import matrix as matrix_module
from kobold_sp_plugin.compatibility.matrix import Matrix, evidence, matrix_of, nearest, rows_as_in_matrix
from kobold_sp_plugin.errors import NoEmbedding


def of(rows, scale=1.0):
    return Matrix(len(rows), rows.shape[1], lambda ids: rows[ids], scale)


def random_rows(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


class TestNearest:
    @pytest.mark.parametrize("chunk", [2**22, 64])
    def test_they_are_those_with_the_largest_cosine_however_large_the_pieces(self, chunk, monkeypatch):
        monkeypatch.setattr(matrix_module, "_CHUNK_VALUES", chunk)
        tokens, rows = random_rows(300, 16) + 3, random_rows(4, 16, seed=1) + 3
        mean = tokens.mean(0)  # all of 300 are sampled
        units = [(each - mean) / np.linalg.norm(each - mean, axis=1, keepdims=True) for each in (tokens, rows)]
        cosines = units[1] @ units[0].T
        for found, expected in zip(nearest(rows, of(tokens), 5), cosines):
            order = np.argsort(-expected)[:5]
            assert [token for token, _ in found] == list(order)
            assert [cosine for _, cosine in found] == pytest.approx(list(expected[order]), abs=1e-5)

    def test_a_row_of_the_matrix_is_nearest_to_itself(self):
        tokens = random_rows(300, 16)
        assert [found[0][0] for found in nearest(tokens[[7, 299]] * 5, of(tokens))] == [7, 299]

    def test_no_more_than_there_are(self):
        assert [len(found) for found in nearest(random_rows(2, 4), of(random_rows(2, 4, seed=1)), 3)] == [2, 2]

    def test_a_large_matrix_is_read_in_pieces_of_16_megabytes(self):
        sizes = []

        def rows(ids):
            sizes.append(len(ids))
            return np.ones((len(ids), 4096), dtype=np.float32)

        nearest(random_rows(1, 4096), Matrix(3000, 4096, rows))
        assert max(sizes) * 4096 * 4 <= 2**24


class TestEvidence:
    def test_rows_that_began_as_tokens_speak_for_their_model_and_for_no_other(self):
        own, other = random_rows(2000, 64), random_rows(2000, 64, seed=1)
        softprompt = SoftPrompt(own[100:120] + 0.5 * random_rows(20, 64, seed=2))
        assert "a hint for it, no proof" in evidence(softprompt, of(own)).sentence
        assert "no hint" in evidence(softprompt, of(other)).sentence

    def test_rows_of_another_size_speak_against(self):
        own = random_rows(2000, 64)
        for factor, said in ((100, r"\d\d times longer"), (0.01, r"1\d\d times shorter"), (0, "all zeros")):
            assert re.search(said, evidence(SoftPrompt(own[:5] * np.float32(factor)), of(own)).sentence)

    def test_noise_is_no_hint_also_where_all_tokens_lie_in_one_direction(self):
        own = random_rows(2000, 64) + 5 * random_rows(64, seed=3)
        assert "no hint" in evidence(SoftPrompt(random_rows(20, 64, seed=4)), of(own)).sentence


class TestScale:
    def test_rows_are_brought_to_the_matrixs_scale(self):
        rows = random_rows(3, 4)
        inside = SoftPrompt(rows, scale="module")
        assert (rows_as_in_matrix(SoftPrompt(rows), of(rows, 8.0)) == rows).all()
        assert rows_as_in_matrix(inside, of(rows, 8.0)) == pytest.approx(rows / 8)
        assert rows_as_in_matrix(inside, of(rows, None)) is None
        assert evidence(inside, of(rows, None)) is None

    @pytest.mark.parametrize("device", ["cpu", "meta"])
    def test_a_module_that_scales_gives_its_rows_as_they_are_stored(self, device):
        class Scaled(torch.nn.Embedding):
            embed_scale = 8.0

            def forward(self, ids):
                return kept[ids] * 8

        model = Model(100, 8)
        kept = model.embedding.weight.detach().clone()
        model.embedding = Scaled(100, 8, device=device)
        if device == "cpu":
            model.embedding.weight.data.copy_(kept)
        matrix = matrix_of(model)
        assert matrix.scale == 8.0
        assert matrix.rows(np.array([5, 6])) == pytest.approx(kept[[5, 6]].numpy())

    def test_a_model_without_one(self):
        with pytest.raises(NoEmbedding):
            matrix_of(torch.nn.Linear(2, 2))
