"""The storage origin trusts signatures and nothing else, and keeps to its rates."""

from __future__ import annotations

import http.client
import time
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import urlsplit

import pytest

from tests.hub.devhub.helpers import CLIENT_WARNS, Site, noise, raw

pytestmark = CLIENT_WARNS

SLOWEST, FASTEST = 0.93e6, 1.06e6
"""Bounds for a limit of 1 MB/s; a quiet machine measures it within 1 %, a busy one adds pauses."""


def test_a_token_is_refused_as_s3_does(site: Site) -> None:
    site.put("w.bin", noise(1000))
    answer = raw("GET", site.link("w.bin"), Authorization=site.bearer)
    assert (answer.status, b"InvalidArgument" in answer.body) == (400, True)
    assert raw("GET", site.link("w.bin")).body == noise(1000)


def test_uploads_with_a_token_hear_the_refusal_too(lfs_site: Site) -> None:
    data = noise(5_000_000)
    assert raw("PUT", lfs_site.upload_link(data), data, Authorization=lfs_site.bearer).status == 400


@pytest.mark.parametrize("change", ["path", "expires", "signature", "missing", "method"])
def test_a_changed_url_is_refused(lfs_site: Site, change: str) -> None:
    lfs_site.put("w.bin", noise(1000, 30))
    link = lfs_site.link("w.bin")
    parts = urlsplit(link)
    query = dict(pair.split("=") for pair in parts.query.split("&"))
    path, method = parts.path, "GET"
    if change == "path":
        path = path.replace("w.bin", "v.bin")
    elif change == "expires":
        query["expires"] = str(int(query["expires"]) + 10**12)
    elif change == "signature":
        query["signature"] = "0" * 64
    elif change == "missing":
        del query["signature"]
    else:
        method, path = "PUT", path.replace("/files/", "/objects/")
    changed = f"{lfs_site.hub.storage}{path}?{'&'.join(f'{key}={value}' for key, value in query.items())}"
    assert raw(method, changed).status == 403
    assert raw("GET", link).status == 200


def test_urls_expire(lfs_site: Site) -> None:
    lfs_site.put("w.bin", noise(1000, 31))
    lfs_site.hub.set(url_lifetime=0.2)
    link = lfs_site.link("w.bin")
    assert raw("GET", link).status == 200
    time.sleep(0.25)
    assert raw("GET", link).status == 403


def test_the_hub_origin_serves_no_objects_and_the_storage_no_api(lfs_site: Site) -> None:
    lfs_site.put("w.bin", noise(1000, 32))
    link = lfs_site.link("w.bin")
    assert raw("GET", link.replace(lfs_site.hub.storage, lfs_site.hub.endpoint)).status == 404
    assert raw("GET", f"{lfs_site.hub.storage}/api/models/{lfs_site.repo}").status == 404
    assert raw("GET", f"{lfs_site.hub.storage}/_devhub/log").status == 404


def download(link: str, piece: int) -> tuple[int, float]:
    """(bytes, seconds from the first request on) of a download that is read in small pieces."""
    parts = urlsplit(link)
    connection = http.client.HTTPConnection(parts.netloc, timeout=20)
    begin, nbytes = time.monotonic(), 0
    connection.request("GET", f"{parts.path}?{parts.query}")
    with connection.getresponse() as response:
        while data := response.read(piece):
            nbytes += len(data)
    connection.close()
    return nbytes, time.monotonic() - begin


@pytest.mark.parametrize("connections", [1, 4])
def test_downloads_keep_to_the_rate_however_many_there_are(lfs_site: Site, connections: int) -> None:
    nbytes = 1_500_000 // connections
    lfs_site.put("w.bin", noise(nbytes, 33))
    lfs_site.hub.set(bandwidth_down=1e6)
    link = lfs_site.link("w.bin")
    begin = time.monotonic()
    with ThreadPoolExecutor(connections) as pool:
        done = list(pool.map(lambda _: download(link, 1000), range(connections)))
    rate = sum(count for count, _ in done) / (time.monotonic() - begin)
    assert SLOWEST < rate < FASTEST


def test_uploads_keep_to_the_rate(lfs_site: Site) -> None:
    data = noise(1_500_000, 34)
    link = lfs_site.upload_link(data)
    lfs_site.hub.set(bandwidth_up=1e6)
    begin = time.monotonic()
    assert raw("PUT", link, data).status == 200
    assert SLOWEST < 1.5e6 / (time.monotonic() - begin) < FASTEST


def test_without_a_rate_nothing_waits(lfs_site: Site) -> None:
    """A loose bound for slow machines; loopback makes gigabytes per second."""
    data = noise(20_000_000, 35)
    begin = time.monotonic()
    assert raw("PUT", lfs_site.upload_link(data), data).status == 200
    assert time.monotonic() - begin < 2
