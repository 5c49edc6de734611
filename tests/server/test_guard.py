"""Who may use a server that was told so: named sites, other names, and the key."""

import socket

import pytest
import simple_websocket
import socketio
from serving import GREEDY, asking, connected, hears

from kobold_sp_plugin.server.app import Server
from kobold_sp_plugin.server.guard import Guard

LITE = "https://lite.koboldai.net"


def hosts(guard, *names):
    """Which of these names it answers to."""

    def status_of(name):
        said = []
        body = guard(
            {"REQUEST_METHOD": "GET", "PATH_INFO": "/", "HTTP_HOST": name}, lambda status, _: said.append(status)
        )
        list(body)
        getattr(body, "close", lambda: None)()
        return said[0]

    return [name for name in names if status_of(name).startswith("200")]


def app(environ, start_response):
    start_response("200 OK", [])
    return [b""]


NAMES = (
    "localhost:5000",
    "127.0.0.1:5000",
    "[::1]",
    "10.0.0.7:5000",
    "[fe80::1]:5000",
    "evil.example",
    "a.example",
    "[",
)


class TestNames:
    def test_loopback_only(self):
        assert hosts(Guard(app, True), *NAMES) == list(NAMES[:3])

    def test_open_to_the_network_it_answers_to_addresses_and_its_own_name(self):
        own = socket.gethostname()
        assert hosts(Guard(app, False), *NAMES, own, f"{own}.local:5000") == [*NAMES[:5], own, f"{own}.local:5000"]

    def test_an_origin_that_is_allowed_is_a_name_too(self):
        assert hosts(Guard(app, True, ["https://a.example:8443"]), *NAMES) == [*NAMES[:3], "a.example"]
        assert hosts(Guard(app, True, ["*"]), *NAMES) == list(NAMES[:3])


class TestOrigins:
    @pytest.fixture
    def server(self, session):
        with Server(session, port=0, origins=[LITE + "/"]) as server:
            yield server

    def test_only_the_one_that_was_named(self, ask):
        assert ask("POST", "/api/v1/generate", GREEDY, {"Origin": LITE}).status == 200
        for other in ("https://evil.example", "http://lite.koboldai.net", "https://lite.koboldai.net.evil.example"):
            answer = ask("POST", "/api/v1/generate", GREEDY, {"Origin": other})
            assert answer.status == 403 and "--cors " + other in answer.json["detail"]["msg"]
            assert "Access-Control-Allow-Origin" not in answer.headers
            preflight = ask(
                "OPTIONS", "/api/v1/generate", headers={"Origin": other, "Access-Control-Request-Method": "POST"}
            )
            assert "Access-Control-Allow-Origin" not in preflight.headers

    def test_its_web_sockets_too(self, ask, server):
        for origin, status in ((LITE, 200), ("http://evil.example", 403)):
            answer = ask("GET", "/socket.io/?EIO=4&transport=polling", headers={"Origin": origin})
            assert answer.status == status
        address = f"ws://127.0.0.1:{server.port}/socket.io/?EIO=4&transport=websocket"
        client = simple_websocket.Client(address, headers={"Origin": LITE})
        assert client.receive(timeout=10).startswith("0{")
        client.close()

    def test_any_where_all_are(self, session):
        with Server(session, port=0, origins=["*"]) as server:
            answer = asking(server)(
                "PUT", "/api/v1/config/soft_prompt", {"value": ""}, {"Origin": "http://any.example"}
            )
            assert answer.status == 200 and answer.headers["Access-Control-Allow-Origin"] == "http://any.example"


class TestKey:
    @pytest.fixture
    def server(self, session):
        with Server(session, port=0, key="s3cret") as server:
            yield server

    @pytest.mark.parametrize(
        ("method", "path"),
        [
            ("GET", "/api/v1/model"),
            ("POST", "/api/v1/generate"),
            ("PUT", "/api/v1/config/soft_prompt"),
            ("GET", "/api/extra/softprompts"),
            ("POST", "/v1/completions"),
            ("GET", "/socket.io/?EIO=4&transport=polling"),
            ("GET", "/"),
            ("GET", "/api/v1/openapi.json"),
        ],
    )
    def test_without_it_nothing_is_told(self, ask, method, path):
        for headers in (
            {},
            {"Authorization": "Bearer wrong"},
            {"Authorization": "s3cret"},
            {"Cookie": "kobold_sp_key=x"},
        ):
            assert ask(method, path, b"{}", headers).status == 401

    def test_with_it_all_is_as_ever(self, ask):
        for headers in ({"Authorization": "Bearer s3cret"}, {"X-Api-Key": "s3cret"}):
            assert ask("GET", "/api/v1/model", headers=headers).json == {"result": "tiny"}
            assert ask("POST", "/v1/completions", {"prompt": "The", "max_tokens": 2}, headers).status == 200

    def test_that_there_is_one_is_told(self, ask):
        assert ask("GET", "/api/extra/version").json["protected"] is True

    def test_the_page_takes_it_once(self, ask, server):
        opened = ask("GET", "/?key=s3cret&ui=1")
        assert opened.status == 303 and opened.headers["Location"] == "/?ui=1"
        cookie = opened.headers["Set-Cookie"]
        assert "s3cret" not in cookie and "HttpOnly" in cookie and "SameSite=Strict" in cookie
        headers = {"Cookie": cookie.split(";")[0]}
        assert ask("GET", "/", headers=headers).status == 200
        client = socketio.Client(reconnection=False)
        client.connect(server.url, headers=headers, transports=["websocket"])
        client.disconnect()
        assert ask("GET", "/?key=wrong").status == 401


def test_the_page_speaks_through_the_guard(server):
    with connected(server) as client:
        hears(client, "softprompts")
