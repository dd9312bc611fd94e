"""The server on a pair of slides whose map is known, and on what it must refuse."""

import dataclasses
import hashlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
import yaml
from starlette.testclient import TestClient

from hemera import tables
from hemera.config import RegisterOptions
from hemera.imaging.codecs import decode
from hemera.registration.registered_pair import load_pair
from hemera.registration.transfer import write_warped_slide
from hemera.registration.warping import read_displaced
from hemera.sheet import read_sheet
from hemera.view import server
from hemera.view.pixels import OpenPair, Pixels
from hemera.view.server import application
from tests.small_units import HE_MPP, field_at, truth, whole_slides

TOKEN = "a-token-of-the-tests"
HOST = "127.0.0.1:8000"


@pytest.fixture
def study(slides: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A study of a pair of slides, registered; the working directory."""
    unit = whole_slides(slides)
    register = slides / "results" / "register"
    register.mkdir()
    (slides / "d.npz").rename(register / "case1.displacement.npz")
    row = dict.fromkeys(tables.CERTIFICATE.names)
    row |= {"pair": "case1", "verdict": "review", "reason": "tile_ok 0.4", "engine": "own"}
    row |= {"tile_ok": 0.4, "scale": float("inf")}
    metadata = tables.provenance(RegisterOptions())
    tables.write(register / "case1.parquet", [row], tables.CERTIFICATE, metadata)
    config = {"preset": "no_weights", "sheet": unit.sheet.name, "block_count": 1}
    config |= {"mask": {"engines": {"stain": {}}}}
    (slides / "config.yaml").write_text(yaml.safe_dump(config))
    (slides / "secret.txt").write_text("not for others")
    monkeypatch.chdir(slides)
    return slides


@pytest.fixture
def client(study: Path) -> Iterator[TestClient]:
    app = application(Path("config.yaml"), TOKEN, (HOST,))
    with TestClient(app, base_url=f"http://{HOST}/{TOKEN}") as found:
        yield found


def tile(client: TestClient, *place: object) -> Any:
    answer = client.get("/".join(map(str, ("tile/case1", *place))))
    assert answer.status_code == 200, answer.text
    return decode(answer.content).astype(int)


def test_her2_is_where_the_displacement_leads(study: Path) -> None:
    """Every pixel of every tile, against the analytic picture at the analytic place."""
    with Pixels().pair(read_sheet(study / "pairs.tsv").pair("case1")) as opened:
        assert opened.level_max == 1 and not opened.note
        for column, width in ((0, 512), (1, 188)):
            pixels = opened.tile("her2", 1, column, 0)
            assert pixels.shape == (500, width, 3)
            x, y = np.meshgrid(np.arange(width) + 512 * column + 0.5, np.arange(500) + 0.5)
            at = field_at(np.stack([x, y], axis=-1) * HE_MPP)
            inside = (at > 2).all(axis=-1) & (at < np.array([880, 640]) * 0.44 - 2).all(axis=-1)
            assert inside.mean() > 0.5
            assert np.abs(pixels - truth(at[..., 0], at[..., 1]))[inside].max() < 4
        assert opened.tile("her2", 0, 0, 0).shape == (250, 350, 3)


def test_a_map_onto_one_line_is_not_drawn_as_streaks(study: Path) -> None:
    """The lower half of the displacement leads to one row of HER2."""
    with Pixels().pair(read_sheet(study / "pairs.tsv").pair("case1")) as opened:
        field = opened.registered.displacement
        half = len(field.vectors_um) // 2
        vectors = field.vectors_um.copy()
        below_um = np.arange(len(vectors) - half) * field.mpp
        vectors[half:, :, 1] = vectors[half, :, 1] - below_um[:, None]
        flat = dataclasses.replace(field, vectors_um=vectors)
        registered = dataclasses.replace(opened.registered, displacement=flat)
        found = OpenPair(registered, opened.he, opened.her2, "").tile("her2", 1, 0, 0)
        streaks, *_ = read_displaced(opened.her2, flat, 0, 0, size_px=512, mpp=HE_MPP)
        streaks = streaks[: len(found)]
        row = int((half + 0.5) * field.mpp / HE_MPP)
        margin = 2 * int(field.mpp / HE_MPP) + 1
        assert margin < row / 4
        assert (found[row + margin :] == opened.her2.background).all()
        assert (streaks[row + margin :] != opened.her2.background).any(axis=-1).mean() > 0.9
        assert np.array_equal(found[: row - margin], streaks[: row - margin])


def test_tiles_are_those_of_the_warped_slide(client: TestClient, study: Path) -> None:
    pair = load_pair(read_sheet(study / "pairs.tsv").pair("case1"), study / "results")
    write_warped_slide(study / "w.ome.tif", pair, quality=100)
    warped = tifffile.imread(study / "w.ome.tif", level=0).astype(int)
    he = tifffile.imread(study / "he.tif").astype(int)
    for column, width in ((0, 512), (1, 188)):
        part = np.s_[:, 512 * column : 512 * column + width]
        for stain, whole in (("her2", warped), ("he", he)):
            found = tile(client, stain, 1, column, 0)
            # Of JPEG.
            assert np.abs(found - whole[part]).mean() < 2.5


def test_facts_of_a_pair(client: TestClient) -> None:
    (listed,) = client.get("api/pairs").json()
    assert (listed["pair"], listed["registration"], listed["tile_ok"]) == ("case1", "review", 0.4)
    facts = client.get("api/pair/case1").json()
    assert (facts["width"], facts["height"], facts["level_max"]) == (700, 500, 1)
    assert facts["why"] == "tile_ok 0.4" and facts["note"] == "" and facts["tiles"] == []
    grades = {signal["name"]: signal["grade"] for signal in facts["signals"]}
    assert grades == {"tile_ok": "review", "log_scale": "fail"}


def test_a_pair_without_map_is_shown_from_the_corners(client: TestClient, study: Path) -> None:
    (study / "results/register/case1.displacement.npz").unlink()
    assert "not registered yet" in client.get("api/pair/case1").json()["note"]
    her2 = tifffile.imread(study / "her2.tif").astype(int)
    found = tile(client, "her2", 1, 0, 0)
    # Equal positions in um: pixel 100 of H&E at 0.5 is pixel 114 of HER2 at 0.44.
    assert np.abs(found[100, 100] - her2[114, 114]).max() < 12


def test_a_decision_is_in_the_sheet_at_once(client: TestClient, study: Path) -> None:
    before = (study / "pairs.tsv").read_text()
    given = {"pair": "case1", "verdict": "refuse", "reason": "other section"}
    answer = client.post("api/decide", json=given)
    assert answer.status_code == 200
    pair = read_sheet(study / "pairs.tsv").pair("case1")
    assert (pair.verdict, pair.verdict_reason) == ("refuse", "other section")
    assert (study / answer.json()["backup"]).read_text() == before
    (listed,) = client.get("api/pairs").json()
    assert (listed["verdict"], listed["verdict_reason"]) == ("refuse", "other section")


@pytest.mark.parametrize("given", [{"verdict": "perhaps"}, {"pair": "x"}])
def test_a_faulty_decision_is_an_error_in_words(
    client: TestClient, study: Path, given: dict[str, str]
) -> None:
    before = (study / "pairs.tsv").read_text()
    answer = client.post("api/decide", json={"pair": "case1", "verdict": "", "reason": ""} | given)
    assert answer.status_code == 400 and answer.json()["error"]
    assert (study / "pairs.tsv").read_text() == before


def test_faults_of_files_are_errors_in_words(client: TestClient, study: Path) -> None:
    """A missing slide, no tables yet, a faulty sheet: not outside the study, and no traceback."""
    assert "run the stage that writes it" in client.get("picture/t/he").json()["error"]
    (study / "her2.tif").rename(study / "moved.tif")
    answer = client.get("api/pair/case1")
    assert answer.status_code == 400 and "her2.tif: no such file" in answer.json()["error"]
    sheet = study / "pairs.tsv"
    sheet.write_text(sheet.read_text() + "a row without cells\n")
    for path in ("api/pairs", "api/pair/case1"):
        answer = client.get(path)
        assert answer.status_code == 400 and "row 3" in answer.json()["error"]


OUTSIDE = (
    "tile/other/he/0/0/0", "tile/case1/virtual/0/0/0", "api/pair/..%2f..%2fsecret.txt",
    "../secret.txt", "..%2fsecret.txt", "%2e%2e/%2e%2e/secret.txt",
    "vendor/..%2f..%2f..%2fserver.py", "//etc/passwd", "api/none",
)  # fmt: skip


@pytest.mark.parametrize("path", OUTSIDE)
def test_what_is_outside_the_study_is_403(client: TestClient, path: str) -> None:
    answer = client.get(f"http://{HOST}/{TOKEN}/{path}")
    assert answer.status_code == 403 and "not for others" not in answer.text


@pytest.mark.parametrize(
    ("address", "headers"),
    [
        (f"/{TOKEN}/", {"Host": "evil.example"}),
        (f"/{TOKEN}/", {"Host": "127.0.0.1:8001"}),
        (f"/{TOKEN}/", {"Origin": "http://evil.example"}),
        (f"/{TOKEN}/", {"Origin": "null"}),
        (f"/{TOKEN}/", {"Sec-Fetch-Site": "cross-site"}),
        (f"/{TOKEN}/", {"Sec-Fetch-Site": "same-site"}),
        ("/", {}),
        (f"/{TOKEN}x/", {}),
        (f"/{TOKEN[:-1]}/", {}),
        ("/api/pairs", {}),
        (f"/static/{TOKEN}/", {}),
    ],
)
def test_strangers_are_403(client: TestClient, address: str, headers: dict[str, str]) -> None:
    assert client.get(f"http://{HOST}/{TOKEN}/").status_code == 200
    for method in ("GET", "POST"):
        answer = client.request(method, f"http://{HOST}{address}", headers=headers)
        assert answer.status_code == 403 and answer.text == "forbidden\n"


def test_only_a_page_can_post(client: TestClient, study: Path) -> None:
    """A form of another page sends no JSON; too long and other bodies are refused as well."""
    before = (study / "pairs.tsv").read_text()
    given = {"pair": "case1", "verdict": "refuse", "reason": ""}
    address = "api/decide"
    text = {"Content-Type": "text/plain"}
    kind = {"Content-Type": "application/json"}
    for answer in (
        client.post(address, data=given),
        client.post(address, content=json.dumps(given), headers=text),
        client.post(address, json={**given, "more": 1}),
        client.post(address, json={**given, "pair": 1}),
        client.post(address, json=[given]),
        client.post(address, content="{", headers=kind),
        client.post(address, content=json.dumps(given) + " " * server.BODY_MAX, headers=kind),
        client.get(address),
    ):
        assert answer.status_code == 403
    assert (study / "pairs.tsv").read_text() == before


def test_nothing_is_loaded_from_elsewhere(client: TestClient) -> None:
    for page in sorted(server.STATIC.glob("*.html")):
        answer = client.get(page.name)
        policy = answer.headers["Content-Security-Policy"]
        assert "default-src 'none'" in policy and "unsafe-eval" not in policy
        assert "script-src 'self';" in policy and answer.headers["Referrer-Policy"] == "no-referrer"
        sources = re.findall(r'(?:src|href)="([^"]+)"', answer.text)
        assert sources and not any("//" in source for source in sources)
        for source in sources:
            if source != "data:,":
                assert client.get(source).status_code == 200
        assert not re.search(r"<script(?![^>]*src=)|\son\w+=", answer.text)


def test_libraries_are_those_of_npm() -> None:
    """The digests in the table of the folder, of all files but licences."""
    folder = server.STATIC / "vendor"
    text = (folder / "README.md").read_text()
    listed = re.findall(r"\| (\S+) \| \S+ \| `([0-9a-f]{64})` \|", text)
    files = [path for path in folder.iterdir() if path.suffix in (".js", ".css")]
    assert dict(listed) == {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files
    }


def test_the_first_pair_is_read_while_the_page_loads(study: Path) -> None:
    """Both stains as a whole are in memory before any request; lost slides are no error."""
    made = server._Server(server.Study(Path("config.yaml")), ())
    made.open_first()
    keys = {key[2:] for key in made.pixels._tiles}
    assert keys == {("he", 0, 0, 0), ("her2", 0, 0, 0)}
    (study / "her2.tif").unlink()
    server._Server(server.Study(Path("config.yaml")), ()).open_first()
