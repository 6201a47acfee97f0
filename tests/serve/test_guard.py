"""Who may ask: pages of other sites, foreign names and wrong keys are refused before a body is read."""

import hashlib
import select
import time

import httpx
import pytest

from hsa_ultralong.serve.guard import require_host
from hsa_ultralong.serve.page import PAGE
from hsa_ultralong.testing.processes import HANG_SECONDS
from tests.serve.conftest import LANTERN, connected, rest_of, serving

KEYS = {hashlib.sha256(b"right").hexdigest(): "anna"}
RIGHT = {"Authorization": "Bearer right"}
ASKED = {"model": "nano", "prompt": "The old road", "max_tokens": 1}


@pytest.fixture(scope="module")
def keyed(nano, tmp_path_factory):
    """A server with keys and a small bound of bodies, which is called memories.example.org too."""
    folder = tmp_path_factory.mktemp("keyed")
    with (
        serving(
            nano, folder, keys=KEYS, hosts=["memories.example.org"], body_bytes=2**18, body_seconds=HANG_SECONDS
        ) as (address, _),
        httpx.Client(base_url=address, timeout=HANG_SECONDS) as client,
    ):
        yield client


@pytest.mark.parametrize(
    "host",
    ["evil.example", "evil.example:8000", "127.0.0.1.evil.example", "localhost.evil.example", "0.0.0.0", "", "a b",
     "localhost:x", "[::2]:80", "localhost@evil.example"],
)  # fmt: skip
def test_a_foreign_name_that_leads_here_reads_nothing(client, host):
    for path in ("/", "/health", "/metrics", "/v1/memories"):
        found = client.get(path, headers={"Host": host})
        assert found.status_code == 403 and found.json()["error"]["code"] == "host_not_allowed", (path, found.text)
        assert "--allow-host" in found.json()["error"]["message"] and "\n" not in found.json()["error"]["message"]


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:9", "127.0.0.1:8000", "127.9.9.9", "[::1]", "[::1]:8000"])
def test_names_of_this_machine_are_its_own(client, host):
    assert client.get("/v1/memories", headers={"Host": host}).status_code == 200


@pytest.mark.parametrize(
    "headers",
    [
        {"Host": "evil.example", "Origin": "http://evil.example"},
        {"Origin": "https://evil.example", "Sec-Fetch-Site": "cross-site"}, {"Origin": "null"}, {"Origin": ""},
        {"Origin": "http://localhost:3000", "Sec-Fetch-Site": "same-site"}, {"Sec-Fetch-Site": "cross-site"},
    ],
)  # fmt: skip
def test_a_page_of_another_site_changes_and_costs_nothing(client, server, headers):
    memories = server[1].memories
    assert client.post("/v1/memories", json={"id": "mine", "text": LANTERN}).status_code == 201
    before = memories.info("default", "mine"), memories.ids("default")
    files = [("files", ("a.txt", b"planted"))]
    for method, path, body in (
        ("POST", "/v1/memories/mine/files", {"files": files}), ("POST", "/v1/memories/planted/files", {"files": files}),
        ("POST", "/v1/completions", {"json": ASKED}), ("PUT", "/v1/memories/mine/documents/1", {"json": {"text": "x"}}),
        ("DELETE", "/v1/memories/mine", {}), ("PATCH", "/v1/memories/mine", {}),
    ):  # fmt: skip
        found = client.request(method, path, headers=headers, **body)
        assert found.status_code == 403 and "--allow-host" in found.json()["error"]["message"], (path, found.text)
    assert (memories.info("default", "mine"), memories.ids("default")) == before


def test_a_page_of_the_server_itself_and_a_link_to_it_work(client, server):
    own = {"Origin": server[0], "Sec-Fetch-Site": "same-origin"}
    assert client.post("/v1/completions", json=ASKED, headers=own).status_code == 200
    assert client.get("/", headers={"Sec-Fetch-Site": "cross-site"}).status_code == 200


def test_a_browser_asks_first_and_no_other_site_is_let_in(client):
    asked = {"Origin": "https://evil.example", "Access-Control-Request-Method": "DELETE"}
    found = client.options("/v1/memories/mine", headers=asked)
    assert found.status_code == 405 and not [name for name in found.headers if name.startswith("access-control")]


def test_a_key_does_not_let_other_sites_in_but_an_allowed_name_does(keyed):
    for headers, status in (
        ({"Origin": "https://evil.example"}, 403), ({"Origin": "https://memories.example.org"}, 200),
        ({"Origin": "https://memories.example.org:8443", "Host": "inside:8000"}, 200), ({"Host": "any.example"}, 200),
        ({"Origin": "https://memories.example.org", "Sec-Fetch-Site": "cross-site"}, 403),
    ):  # fmt: skip
        assert keyed.post("/v1/completions", json=ASKED, headers={**RIGHT, **headers}).status_code == status, headers


@pytest.mark.parametrize("host", ["", "https://a.org", "a.org/", "*", "a.org:", "a.org:123456", "user@a.org", "a b"])
def test_a_host_that_is_none_is_refused(host):
    with pytest.raises(ValueError, match="name or an address"):
        require_host(host)


def test_the_page_runs_its_own_script_alone_and_in_no_frame(client):
    headers = client.get("/").headers
    policy = dict(part.split(" ", 1) for part in headers["content-security-policy"].split("; "))
    assert policy["default-src"] == policy["frame-ancestors"] == "'none'" and policy["connect-src"] == "'self'"
    assert policy["script-src"].startswith("'sha256-") and "unsafe" not in headers["content-security-policy"]
    # attributes would need 'unsafe-inline'
    assert PAGE.count("<script") == PAGE.count("<style") == 1 and " style=" not in PAGE and " onclick=" not in PAGE
    assert client.get("/v1/models").headers["x-content-type-options"] == "nosniff"
    assert client.get("/", headers={"Host": "evil.example"}).headers["x-content-type-options"] == "nosniff"


def test_a_wrong_key_is_refused_before_the_body_is_read(keyed):
    head = "POST /v1/memories HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer wrong\r\nContent-Length: 1000000\r\n\r\n"
    with connected(keyed.base_url) as one:
        one.sendall(head.encode())  # and nothing of the body
        answer = rest_of(one)
    assert answer.startswith(b"HTTP/1.1 401 ") and b"invalid_api_key" in answer and b"connection: close" in answer
    assert keyed.post("/v1/memories", content=bytes(10**6), headers={"Authorization": "Bearer no"}).status_code == 401


def test_paths_without_a_key_take_no_bodies(keyed):
    with connected(keyed.base_url) as one:
        one.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000\r\n\r\n")
        assert one.recv(65_536).startswith(b"HTTP/1.1 200 ")


def test_bodies_together_are_bounded_and_small_ones_always_have_room(keyed):
    head = b"POST /v1/memories HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer right\r\nContent-Length: %d\r\n\r\n"
    held = [connected(keyed.base_url) for _ in range(5)]
    try:
        for one in held:
            one.sendall(head % 2**18 + bytes(2**18 - 1))  # one byte is never sent
        # four fill the bound, and one is one too many
        (refused, *_), _, _ = select.select(held, [], [], HANG_SECONDS)
        answer = rest_of(refused)
        assert answer.startswith(b"HTTP/1.1 503 ") and b"bodies_full" in answer and b"retry-after: 2" in answer
        assert keyed.post("/v1/completions", json=ASKED, headers=RIGHT).status_code == 200
    finally:
        for one in held:
            one.close()
    # clients that left give their room back
    large, end = {**ASKED, "prompt": "word " * 2**15}, time.monotonic() + HANG_SECONDS
    while (found := keyed.post("/v1/completions", json=large, headers=RIGHT)).status_code == 503:
        assert time.monotonic() < end
    assert found.json()["error"]["code"] == "context_length_exceeded"
