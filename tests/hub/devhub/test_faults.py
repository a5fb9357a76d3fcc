"""Each kind of fault, as a client feels it."""

from __future__ import annotations

import http.client
import socket
import time
from urllib.parse import urlsplit

import pytest
from huggingface_hub import CommitOperationAdd, constants
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.utils import get_session, httpx
from huggingface_hub.utils._xet import refresh_xet_connection_info

from mso_hub.errors import RecipeError
from tests.hub.devhub.helpers import CLIENT_WARNS, Site, noise, raw, small

pytestmark = CLIENT_WARNS


def statuses(site: Site, part: str) -> list[int | None]:
    return [request.status for request in site.requests(part=part)]


def test_a_status_comes_so_many_times_then_no_more(lfs_site: Site) -> None:
    lfs_site.hub.fail(f"GET /api/models/{lfs_site.repo}$", status=503, times=2, after=1)
    url = f"{lfs_site.hub.endpoint}/api/models/{lfs_site.repo}"
    assert [raw("GET", url).status for _ in range(4)] == [200, 503, 503, 200]
    lfs_site.hub.fail("GET /api", status=500, times=-1)
    assert [raw("GET", url).status for _ in range(3)] == [500] * 3
    lfs_site.hub.clear_faults()
    assert raw("GET", url).status == 200


def test_the_first_fault_that_matches_comes_first(lfs_site: Site) -> None:
    lfs_site.hub.fail("PUT", status=599)
    lfs_site.hub.fail("/api/models", status=502)
    lfs_site.hub.fail("/api/", status=504, times=2)
    url = f"{lfs_site.hub.endpoint}/api/models/{lfs_site.repo}"
    assert [raw("GET", url).status for _ in range(4)] == [502, 504, 504, 200]


def test_a_fault_of_one_origin_spares_the_other(lfs_site: Site) -> None:
    lfs_site.put("w.bin", noise(1000))
    lfs_site.hub.fail(".", origin="storage", status=503, times=-1)
    assert raw("GET", lfs_site.link("w.bin")).status == 503


def test_the_client_waits_as_long_as_a_rate_limit_says(lfs_site: Site) -> None:
    lfs_site.hub.fail("POST .*/preupload/", status=429, headers={"RateLimit": '"api";r=0;t=1'})
    begin = time.monotonic()
    lfs_site.put("a.txt", b"x")
    assert time.monotonic() - begin >= 1
    assert statuses(lfs_site, "/preupload/") == [429, 200]


def test_a_commit_that_fails_is_not_repeated_and_has_not_landed(lfs_site: Site) -> None:
    head = lfs_site.api.model_info(lfs_site.repo).sha
    lfs_site.hub.fail("POST .*/commit/", status=503)
    with pytest.raises(HfHubHTTPError):
        lfs_site.put("a.txt", b"x")
    assert lfs_site.api.model_info(lfs_site.repo).sha == head


@pytest.mark.parametrize("effect", [{"status": 504}, {"cut": 0}])
def test_a_commit_can_land_and_its_answer_be_lost(lfs_site: Site, effect: dict[str, int]) -> None:
    lfs_site.hub.fail("POST .*/commit/", land=True, **effect)
    with pytest.raises((HfHubHTTPError, httpx.TransportError)):
        lfs_site.put("a.txt", b"x")
    assert lfs_site.get("a.txt") == b"x"
    assert statuses(lfs_site, "/commit/") == [effect.get("status")]


def test_a_commit_cut_on_its_way_has_not_landed(lfs_site: Site) -> None:
    lfs_site.hub.fail("POST .*/commit/", cut=10)
    with pytest.raises(httpx.TransportError):
        lfs_site.put("a.txt", b"x")
    assert lfs_site.api.list_repo_files(lfs_site.repo) == [".gitattributes"]
    assert statuses(lfs_site, "/commit/") == [None]


def test_a_download_is_cut_after_so_many_bytes(site: Site) -> None:
    data = noise(500_000, 40)
    site.put("w.bin", data)
    link = site.link("w.bin")
    site.hub.fail("GET /files/", cut=123_456)
    with pytest.raises(http.client.IncompleteRead) as error:
        raw("GET", link)
    assert error.value.partial == data[:123_456]
    assert site.requests("GET", "/files/")[0].bytes_out == 123_456
    assert raw("GET", link).body == data


def test_an_upload_is_cut_and_the_client_sends_it_again(lfs_site: Site) -> None:
    data = noise(3_000_000, 41)
    lfs_site.hub.fail("PUT /objects/", cut=1_000_000)
    lfs_site.put("w.bin", data)
    first, second = lfs_site.requests("PUT", "/objects/")
    assert (first.status, second.status) == (None, 200)
    assert 1_000_000 <= first.bytes_in < 3_000_000
    assert lfs_site.get("w.bin") == data


def test_a_download_can_stall(lfs_site: Site) -> None:
    lfs_site.put("w.bin", noise(500_000, 42))
    parts = urlsplit(lfs_site.link("w.bin"))
    lfs_site.hub.fail("GET /files/", stall=1000)
    connection = http.client.HTTPConnection(parts.netloc, timeout=0.3)
    connection.request("GET", f"{parts.path}?{parts.query}")
    response = connection.getresponse()
    assert response.read(1000) == noise(500_000, 42)[:1000]
    with pytest.raises(socket.timeout):
        response.read(1)
    connection.close()


@pytest.mark.parametrize("method", ["HEAD", "POST"])
def test_answers_without_a_body_and_uploads_can_stall_too(lfs_site: Site, method: str) -> None:
    lfs_site.hub.fail(f"{method} ", stall=0)
    url = f"{lfs_site.hub.endpoint}/api/repos/create" if method == "POST" else lfs_site.hub.endpoint
    with pytest.raises(httpx.ReadTimeout):
        get_session().request(method, url, content=b"{}" if method == "POST" else None, timeout=0.3)


def test_delay(lfs_site: Site) -> None:
    lfs_site.hub.fail("whoami", delay=0.3)
    begin = time.monotonic()
    lfs_site.api.whoami()
    assert time.monotonic() - begin >= 0.3


def test_urls_that_were_issued_expire_at_once(lfs_site: Site) -> None:
    lfs_site.put("w.bin", noise(1000, 43))
    old = lfs_site.link("w.bin")
    assert raw("GET", old).status == 200
    lfs_site.hub.fail("GET /files/", expire=True)
    assert [raw("GET", old).status for _ in range(2)] == [403, 403]
    assert raw("GET", lfs_site.link("w.bin")).status == 200


def test_a_byte_of_a_download_can_flip(site: Site) -> None:
    data = noise(10_000, 44)
    site.put("w.bin", data)
    site.hub.fail("GET /files/", corrupt=1234)
    got = raw("GET", site.link("w.bin")).body
    assert [at for at in range(10_000) if got[at] != data[at]] == [1234]


def test_a_byte_of_an_upload_can_flip_and_is_found(lfs_site: Site) -> None:
    data = noise(2_000_000, 45)
    lfs_site.hub.fail("PUT /objects/", corrupt=1_500_000)
    with pytest.raises(RuntimeError, match="Error while uploading") as error:
        lfs_site.put("w.bin", data)
    assert "BadDigest" in str(error.value.__cause__) or "400" in str(error.value.__cause__)
    assert statuses(lfs_site, "/objects/dev/") == [400]


def test_xet_tokens_can_be_short(site: Site) -> None:
    url = f"{site.hub.endpoint}/api/models/{site.repo}/xet-write-token/main"
    answer = raw("GET", url, Authorization=site.bearer)
    if not site.hub.xet:
        assert answer.status == 404
        return
    assert answer.json()["exp"] > time.time() + 1000
    site.hub.fail("xet-.*-token", token_expiry=-5, times=2)
    assert raw("GET", url, Authorization=site.bearer).json()["exp"] < time.time()
    site.put("w.bin", noise(1000, 46))
    metadata = site.api.get_hf_file_metadata(url=f"{site.hub.endpoint}/{site.repo}/resolve/main/w.bin")
    assert metadata.xet_file_data is not None
    headers = {"Authorization": site.bearer}
    site.hub.fail("xet-read-token", token_expiry=10)
    short = refresh_xet_connection_info(file_data=metadata.xet_file_data, headers=headers)
    assert short.expiration_unix_epoch < time.time() + 11
    assert short.endpoint.startswith("local://")


@pytest.mark.parametrize(
    "fault", [{"match": "("}, {"match": "x", "cut": -1}, {"match": "x", "what": 1}, {"match": "x", "origin": "cdn"}]
)
def test_faults_that_make_no_sense_are_refused(lfs_site: Site, fault: dict[str, object]) -> None:
    with pytest.raises(RecipeError):
        lfs_site.hub.fail(**fault)  # type: ignore[arg-type]


def test_limits_that_make_no_sense_are_refused(lfs_site: Site) -> None:
    for changes in ({"page_size": 0}, {"page_size": 1.5}, {"bandwidth_up": -1}, {"speed": 1}):
        with pytest.raises(RecipeError, match=next(iter(changes))):
            lfs_site.hub.set(**changes)


def test_a_client_that_left_leaves_the_server_idle(lfs_site: Site) -> None:
    """Sending to nobody would read a file of any size to its end."""
    lfs_site.put("w.bin", noise(3_000_000, 47))
    parts = urlsplit(lfs_site.link("w.bin"))
    lfs_site.hub.set(bandwidth_down=2e6)
    connection = http.client.HTTPConnection(parts.netloc, timeout=5)
    connection.request("GET", f"{parts.path}?{parts.query}")
    connection.getresponse().read(1000)
    connection.close()
    time.sleep(0.3)
    sent = lfs_site.requests("GET", "/files/")[0].bytes_out
    time.sleep(0.3)
    assert lfs_site.requests("GET", "/files/")[0].bytes_out == sent < 3_000_000


def test_control_requests_are_neither_logged_nor_hit(lfs_site: Site) -> None:
    lfs_site.hub.fail(".", status=500, times=-1)
    lfs_site.hub.log()
    assert lfs_site.hub.log() == []
    lfs_site.hub.clear_faults()
    assert lfs_site.commit(small("a.txt", b"x")).status == 200
    assert CommitOperationAdd("a.txt", b"x").path_in_repo == "a.txt"
    assert constants.HF_HUB_DISABLE_XET
