"""Who may use the server: this machine, the sites that are named, and who has the key."""

import hashlib
import hmac
import ipaddress
import json
import socket
import threading
from http.cookies import CookieError, SimpleCookie
from typing import Any, Callable, Dict, Iterable, Iterator, List, Optional, Sequence, Tuple
from urllib.parse import SplitResult, parse_qs, urlencode, urlsplit

from flask import Response

_COOKIE = "kobold_sp_key"
_OPEN = ("/api/extra/version", "/api/v1/info/version", "/api/latest/info/version")
"""What is told without the key: that there is one, and which API this is."""


class Guard:
    """Keeps other web sites' pages away from the server, which they can reach from a browser on this machine.

    A page elsewhere is told by its ``Origin``; one whose own name was made to point here, by its ``Host``.
    ``origins`` are those that may use the server all the same, such as ``https://lite.koboldai.net``; ``*`` is any.
    With a ``key``, everything but the page's own files asks for it: as ``Authorization: Bearer``, as
    ``X-Api-Key``, or once in the page's address (``/?key=``), which leaves a cookie.
    """

    def __init__(
        self,
        app: Callable[..., Iterable[bytes]],
        loopback_only: bool,
        origins: Sequence[str] = (),
        key: Optional[str] = None,
    ):
        self._app = app
        self._loopback_only = loopback_only
        self._origins = {_normal(each) for each in origins}
        self._hosts = {split(each).hostname or "" for each in origins if each != "*"}
        self._key = key
        self._changed = threading.Condition()
        self._under_way = 0

    def __call__(self, environ: Dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        headers = self._cors(environ)

        def start(status: str, given: List[Tuple[str, str]], *more: Any) -> Any:
            return start_response(status, [*given, *headers], *more)

        answer = self._answer(environ)
        if answer is not None:
            return answer(environ, start)
        if environ.get("PATH_INFO", "").startswith("/socket.io"):  # which may stay for days
            return self._app(environ, start)
        with self._changed:
            self._under_way += 1
        try:
            return _Counted(self._app(environ, start), self._done)
        except BaseException:
            self._done()
            raise

    def wait(self, seconds: float) -> None:
        """Wait until every request that is being answered has been, or so long."""
        with self._changed:
            self._changed.wait_for(lambda: not self._under_way, seconds)

    def _done(self) -> None:
        with self._changed:
            self._under_way -= 1
            self._changed.notify_all()

    def _answer(self, environ: Dict[str, Any]) -> Optional[Response]:
        """What is answered in the application's place, if anything."""
        reason = self._reason(environ)
        if reason is not None:
            return _refused(403, reason, "forbidden")
        is_preflight = environ["REQUEST_METHOD"] == "OPTIONS" and "HTTP_ACCESS_CONTROL_REQUEST_METHOD" in environ
        if is_preflight:
            return Response(status=204)
        return self._without_key(environ) if self._key is not None else None

    def _reason(self, environ: Dict[str, Any]) -> Optional[str]:
        host = split(f"//{environ.get('HTTP_HOST', '')}")
        if not self._is_our_name(host.hostname or ""):
            return (
                "This server does not answer to that name. Use localhost or its address, or start it with "
                "--cors and the address in the browser's address bar."
            )
        is_socket = environ.get("PATH_INFO", "").startswith("/socket.io")
        reads = environ["REQUEST_METHOD"] in ("GET", "HEAD", "OPTIONS") and not is_socket
        origin = environ.get("HTTP_ORIGIN")
        if origin is None or reads or split(origin).netloc == host.netloc or self._is_allowed(origin):
            return None
        return f"Requests from the pages of other sites are refused; --cors {_printable(origin)} would allow them."

    def _is_our_name(self, name: str) -> bool:
        if is_loopback(name) or name in self._hosts:
            return True
        if self._loopback_only:
            return False
        return _is_address(name) or name in _names_of_this_machine()

    def _is_allowed(self, origin: str) -> bool:
        return "*" in self._origins or _normal(origin) in self._origins

    def _cors(self, environ: Dict[str, Any]) -> List[Tuple[str, str]]:
        origin = environ.get("HTTP_ORIGIN")
        if origin is None or not self._is_allowed(origin) or _printable(origin) != origin:
            return []
        headers = [("Access-Control-Allow-Origin", origin), ("Vary", "Origin")]
        if environ["REQUEST_METHOD"] == "OPTIONS":
            asked = environ.get("HTTP_ACCESS_CONTROL_REQUEST_HEADERS", "")
            headers += [
                ("Access-Control-Allow-Methods", "GET, POST, PUT, PATCH, DELETE, OPTIONS"),
                ("Access-Control-Allow-Headers", _printable(asked) or "Content-Type, Authorization"),
                ("Access-Control-Allow-Private-Network", "true"),  # a browser asks before a site may reach this machine
                ("Access-Control-Max-Age", "600"),
            ]
        return headers

    def _without_key(self, environ: Dict[str, Any]) -> Optional[Response]:
        path = environ.get("PATH_INFO", "")
        if path == "/":
            return self._page(environ)
        if path.startswith("/static/") or path in _OPEN or self._has_key(environ):
            return None
        return _refused(401, "This server asks for a key: Authorization: Bearer, and the key.", "unauthorized")

    def _has_key(self, environ: Dict[str, Any]) -> bool:
        scheme, _, bearer = environ.get("HTTP_AUTHORIZATION", "").partition(" ")
        given = [bearer.strip() if scheme.lower() == "bearer" else "", environ.get("HTTP_X_API_KEY", "")]
        return any(self._is_key(each) for each in given) or self._has_cookie(environ)

    def _has_cookie(self, environ: Dict[str, Any]) -> bool:
        try:
            cookie = SimpleCookie(environ.get("HTTP_COOKIE", "")).get(_COOKIE)
        except CookieError:
            return False
        return cookie is not None and hmac.compare_digest(cookie.value.encode("utf-8", "replace"), self._digest())

    def _is_key(self, given: str) -> bool:
        return hmac.compare_digest(given.encode("utf-8", "replace"), (self._key or "").encode("utf-8", "replace"))

    def _digest(self) -> bytes:
        """What the cookie holds in place of the key."""
        return hashlib.sha256(b"kobold_sp " + (self._key or "").encode("utf-8", "replace")).hexdigest().encode()

    def _page(self, environ: Dict[str, Any]) -> Optional[Response]:
        query = parse_qs(environ.get("QUERY_STRING", ""))
        if any(self._is_key(each) for each in query.pop("key", [])):
            rest = urlencode(query, doseq=True)
            response = Response(status=303, headers={"Location": f"/?{rest}" if rest else "/"})
            response.set_cookie(_COOKIE, self._digest().decode(), httponly=True, samesite="Strict")
            return response
        if self._has_key(environ):
            return None
        return Response("This server asks for its key: open it as /?key= and the key.\n", 401, mimetype="text/plain")


class _Counted:
    """A response's body that tells when it has been sent, or given up."""

    def __init__(self, body: Iterable[bytes], done: Callable[[], None]):
        self._body = body
        self._done = done

    def __iter__(self) -> Iterator[bytes]:
        return iter(self._body)

    def close(self) -> None:
        """End it."""
        try:
            close = getattr(self._body, "close", None)
            if close is not None:
                close()
        finally:
            self._done()


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach ``host``."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def split(url: str) -> SplitResult:
    """The parts of an address; none for one that is no address."""
    try:
        parts = urlsplit(url)
        parts.port  # noqa: B018 - raises where it is no number
        return parts
    except ValueError:
        return urlsplit("")


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def _names_of_this_machine() -> Tuple[str, ...]:
    name = socket.gethostname().lower()
    return (name, f"{name}.local")


def _normal(origin: str) -> str:
    return origin.strip().rstrip("/").lower()


def _printable(text: str) -> str:
    """``text`` without what cannot stand in a header."""
    return "".join(character for character in text if " " <= character < "\x7f")


def _refused(status: int, reason: str, kind: str) -> Response:
    body = json.dumps({"detail": {"msg": reason, "type": kind}})
    return Response(body, status, mimetype="application/json")
