"""A server over a tiny model and a folder of four files, two of which fit."""

import pytest
from models import FAMILY, softprompt, tiny_model, tiny_tokenizer
from serving import asking

from kobold_sp_plugin.engines.transformers import TransformersEngine
from kobold_sp_plugin.server.app import Server
from kobold_sp_plugin.session import Session


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


@pytest.fixture(scope="module")
def model():
    context = {"max_position_embeddings": 512} if FAMILY == "llama" else {"n_positions": 512}
    return tiny_model(FAMILY, eos_token_id=None, **context)  # a text that ends early would be no use here


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "softprompts"
    folder.mkdir()
    softprompt(1, name="Noir", author="A").save(folder / "noir.zip")
    softprompt(2, n_tokens=6, name="Space").save(folder / "space.zip")
    softprompt(3, width=64).save(folder / "wide.zip")
    (folder / "broken.zip").write_bytes(b"not a zip")
    return folder


@pytest.fixture
def engine(model, tokenizer):
    engine = TransformersEngine(model, tokenizer, "tiny")
    yield engine
    engine.select([])


@pytest.fixture
def session(folder, engine):
    session = Session(folder, engine)
    yield session
    session.close()


@pytest.fixture
def server(session):
    with Server(session, port=0) as server:
        yield server


@pytest.fixture
def ask(server):
    return asking(server)
