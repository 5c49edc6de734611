"""The softprompts folder through HTTP: put files in, take them out, rename, delete, bring back, look inside.

Everything below ``/api/extra/softprompts``. Errors are the API's: ``{"detail": {"msg", "type"}}``.
"""

import errno
import io
import os
import socket
import threading
from typing import Any, Dict, Optional, Tuple

from flask import Blueprint, Flask, Response, abort, jsonify, request, send_file
from werkzeug.http import HTTP_STATUS_CODES

from .. import formats
from ..engines import Engine
from ..errors import (
    FormatError,
    NameTaken,
    NoEmbedding,
    NoModel,
    SoftPromptError,
    TooLarge,
    UnknownSoftPrompt,
    UnsafeName,
)
from ..inspection import inspect
from ..session import Session
from ..softprompt import own_metadata
from .characters import Characters
from .fields import InvalidRequest, read_object
from .folder import Folder, stem_of

_FULL = (errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC))
_LONGEST_NAME = 500


def add_files(app: Flask, session: Session, characters: Characters) -> None:
    """Add the routes; each change of the folder is told to every client before it is answered."""
    folder = Folder(session.catalogue.folder)
    looking = threading.Lock()
    """One file is looked into at a time: that reads the model's whole embedding matrix."""
    files = Blueprint("files", __name__, url_prefix="/api/extra/softprompts")

    @files.post("/files")
    def add() -> Tuple[Dict[str, Any], int]:
        size = request.content_length
        if size is None:
            abort(411, description="Expected a Content-Length, and the file as the body.")
        added = folder.add(request.environ["wsgi.input"].read, size, request.args.get("filename", ""))
        conversion = added.conversion
        answer = {"filename": added.filename, "entry": entry(added.filename), "converted_from": "", "lost": []}
        if conversion is not None:
            kind = formats.format_named(conversion.format)
            answer.update(converted_from=kind.sentence, lost=conversion.lost, notes=conversion.notes)
        return answer, 201

    @files.get("/files/<filename>")
    def take(filename: str) -> Any:
        header = readable(filename)
        path = os.path.join(folder.path, filename)
        stem, ending = stem_of(filename) or "softprompt", formats.format_named(header.format).extensions
        if not os.path.isdir(path):
            given = os.path.splitext(filename)[1]
            name = stem + (given if given.lower() in formats.EXTENSIONS else ending[0])
            return send_file(os.path.abspath(path), "application/octet-stream", as_attachment=True, download_name=name)
        sibling = folder.sibling()  # a browser saves files: a folder becomes the zip that holds the same
        try:
            formats.save(session.catalogue.load(filename), sibling)
            with open(sibling, "rb") as file:
                content = io.BytesIO(file.read())
        finally:
            if os.path.lexists(sibling):
                os.unlink(sibling)
        return send_file(content, "application/zip", as_attachment=True, download_name=f"{stem}.zip")

    @files.patch("/files/<filename>")
    def rename(filename: str) -> Dict[str, Any]:
        listed(filename)
        fields = read_object(request.get_data())
        to, name = (_text(fields, key) for key in ("filename", "name"))
        selected = session.selection
        now = folder.rename(filename, to, name)
        if now != filename and filename in selected:
            session.select([now if each == filename else each for each in selected])
        for character, filenames in characters.all().items():
            if now != filename and filename in filenames:
                characters.keep(character, [now if each == filename else each for each in filenames])
        return {"filename": now, "entry": entry(now)}

    @files.delete("/files/<filename>")
    def delete(filename: str) -> Dict[str, Any]:
        listed(filename)
        deletion = folder.delete(filename)
        session.refresh()
        return {"filename": filename, "deletion": deletion}

    @files.get("/trash")
    def trash() -> Dict[str, Any]:
        return {"values": folder.deleted()}

    @files.post("/trash/<deletion>")
    def restore(deletion: str) -> Dict[str, Any]:
        filename = folder.restore(deletion)
        return {"filename": filename, "entry": entry(filename)}

    @files.get("/files/<filename>/details")
    def details(filename: str) -> Dict[str, Any]:
        readable(filename)
        engine = loaded()
        with looking:
            path = os.path.join(folder.path, filename)
            found = inspect(path, engine, _matrix(engine), getattr(engine, "token_text", str), measured=False)
        own = own_metadata(found.softprompt.metadata)
        return {**found.as_json(), "training": own.get("training"), "made_of": own.get("made_of")}

    @files.get("/files/<filename>/effect")
    def effect(filename: str) -> Dict[str, Any]:
        """Apart from the details, since measuring waits until the model is free."""
        measured = loaded().effect([session.softprompt(filename)])
        return {"effect": measured, "remark": getattr(measured, "remark", "")}

    def listed(filename: str) -> Any:
        return session.catalogue.entry(filename)

    def readable(filename: str) -> formats.Header:
        """The header of a listed file. What cannot be read is not given out: a link may lead anywhere."""
        header = listed(filename).header
        if header is None:
            abort(422, description=f"{filename} cannot be read: {listed(filename).reason}")
        return header

    def loaded() -> Engine:
        engine: Optional[Engine] = session.engine
        if engine is None:
            raise NoModel("No model is loaded.")
        return engine

    def entry(filename: str) -> Any:
        """What the menu shows of a file, after it has been told."""
        session.refresh()
        return next((each for each in session.status()["entries"] if each["filename"] == filename), None)

    @files.errorhandler(SoftPromptError)
    def refused(error: SoftPromptError) -> Any:
        if isinstance(error, InvalidRequest):
            return jsonify(detail=error.detail), 422
        status = {TooLarge: 413, UnknownSoftPrompt: 404, UnsafeName: 404, NameTaken: 409, NoModel: 503}.get(
            type(error), 422
        )
        return _answer(status, error.sentence if isinstance(error, FormatError) else str(error))

    @files.errorhandler(OSError)
    def failed(error: OSError) -> Any:
        if isinstance(error, (ConnectionError, socket.timeout)):
            return _answer(400, f"The file did not come in full: {error}.")
        status = 507 if error.errno in _FULL else 403
        return _answer(status, f"The softprompts folder cannot be changed: {error.strerror or type(error).__name__}.")

    app.register_blueprint(files)


def _text(fields: Dict[str, Any], key: str) -> Optional[str]:
    """A text that may be missing. Raises :class:`InvalidRequest`."""
    value = fields.get(key)
    if value is not None and (not isinstance(value, str) or not 0 < len(value.strip()) <= _LONGEST_NAME):
        raise InvalidRequest({key: [f"Expected a text of 1 to {_LONGEST_NAME} characters."]})
    return value


def _matrix(engine: Engine) -> Any:
    """The embedding matrix of an engine that has one to look at."""
    try:
        return engine.matrix() if hasattr(engine, "matrix") else None
    except NoEmbedding:
        return None


def _answer(status: int, message: str) -> Response:
    kind = HTTP_STATUS_CODES[status].lower().replace(" ", "_")
    response = jsonify(detail={"msg": message, "type": kind})
    response.status_code = status
    return response
