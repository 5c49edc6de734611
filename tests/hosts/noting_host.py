"""Our server with the demonstration model, which notes what a real front end asks of it."""

from contextlib import contextmanager

from flask import request

from kobold_sp_plugin.cli.common import load_engine
from kobold_sp_plugin.server.app import Server
from kobold_sp_plugin.session import Session

GENERATING = ("/api/v1/generate", "/api/extra/generate/stream", "/v1/completions")


class Host:
    """Our server with the demonstration model; it notes what it is asked for."""

    def __init__(self, folder, origin):
        engine, self.model = load_engine(None)
        self.session = Session(folder, engine)
        self.server = Server(self.session, port=0, origins=[origin] if origin else ())
        self.requests = []
        self.server.app.before_request(self._note)
        self.url = self.server.url.rstrip("/")

    def _note(self):
        self.requests.append((request.method, request.path, request.get_json(silent=True, force=True), request.headers))

    @property
    def n_texts(self):
        """How many texts were asked for."""
        return sum(path in GENERATING for _, path, _, _ in self.requests)

    def asked(self, path):
        """The last request for a path: (its fields, its headers), or None."""
        return next(((fields, headers) for _, at, fields, headers in reversed(self.requests) if at == path), None)


@contextmanager
def hosting(folder, origin):
    host = Host(folder, origin)
    with host.server:
        yield host
    host.session.close()
