"""Descriptions of an index: their figures are those of its card, their files exist."""

import collections
import hashlib
import json
import os

import pyarrow.parquet as pq
import pytest
import yaml

from hemera.__main__ import main
from hemera.interop import descriptions
from tests.interop.test_exports import content
from tests.small_results import Made, make


@pytest.fixture(scope="module")
def index(tmp_path_factory):
    pairs = [
        Made(f"Qdoe{n}", score=f"{n % 3}+".replace("0+", "0"), case=f"Qjane{n}") for n in range(6)
    ]
    pairs[4] = Made("Qdoe4", score="1+", case="Qjane4", sharpness=1.0)
    folder = tmp_path_factory.mktemp("study")
    make(folder, pairs)
    path = folder / "results" / "index" / "index.parquet"
    # 22 November 2026, 0:00 UTC.
    os.utime(path, (1795305600, 1795305600))
    return path


def write(index, out, *words):
    assert main(["export", "card", str(out), "--index", str(index), *words]) == 0
    return out


def test_croissant_describes_the_table_and_its_selection(index, tmp_path):
    out = write(index, tmp_path / "out")
    document = json.loads((out / "croissant.json").read_text())
    (file,) = document["distribution"]
    data = (out / file["contentUrl"]).read_bytes()
    assert file["sha256"] == hashlib.sha256(data).hexdigest()
    assert file["contentSize"] == f"{len(data)} B"
    (records,) = document["recordSet"]
    table = pq.read_table(out / file["@id"])
    fields = {field["source"]["extract"]["column"]: field for field in records["field"]}
    assert list(fields) == table.column_names
    assert not [name for name in fields if name.endswith(("shard", "offset", "sha256"))]
    assert fields["he_background"]["repeated"]
    assert fields["x_px"]["dataType"] == "sc:Integer"
    # Counted here, from the rows.
    rows = table.to_pylist()
    assert {row["accepted"] for row in rows} == {True, False}
    biases = document["rai:dataBiases"]
    for text, kept in (("Accepted", True), ("Refused", False)):
        counts = [int(line.split()[1]) for line in biases if line.startswith(f"{text}:")]
        assert sum(counts) == sum(row["accepted"] == kept for row in rows)
    tiles, cases = collections.Counter(), collections.defaultdict(set)
    for row in rows:
        if not row["accepted"]:
            tiles[row["score"], row["reason"]] += 1
            cases[row["score"], row["reason"]].add(row["case"])
    assert len(tiles) > 1
    assert [line for line in biases if line.startswith("Refused")] == [
        f"Refused: {count} tiles of {len(cases[score, reason])} cases, data set bci, score "
        f"{score}, because {reason}."
        for (score, reason), count in sorted(tiles.items())
    ]
    assert document["datePublished"] == "2026-11-22"
    assert document["rai:machineAnnotationTools"] == [
        "Masks by stain; the networks are trained with those of stain."
    ]


def test_the_crate_names_files_that_exist_and_nothing_undefined(index, tmp_path):
    out = write(index, tmp_path / "out")
    graph = json.loads((out / "ro-crate-metadata.json").read_text())["@graph"]
    entities = {entity["@id"]: entity for entity in graph}
    assert len(entities) == len(graph)
    root = entities["./"]
    parts = {part["@id"] for part in root["hasPart"]}
    assert parts == {path.name for path in out.iterdir()} - {"ro-crate-metadata.json"}
    assert "ComputationalWorkflow" in entities[root["mainEntity"]["@id"]]["@type"]
    run = entities[root["mentions"]["@id"]]
    assert run["@type"] == "CreateAction"
    assert {part["@id"] for key in ("object", "result") for part in run[key]} <= parts
    assert run["instrument"] == root["mainEntity"]
    assert run["endTime"] == "2026-11-22T00:00:00+00:00"
    assert {ref["@id"] for ref in root["conformsTo"]} <= set(entities)
    made = json.loads((out / "options.json").read_text())
    assert {"filter", "index"} <= set(made)


def test_the_hugging_face_card_is_the_dataset_card(index, tmp_path):
    out = write(index, tmp_path / "out")
    _, header, body = (out / "README.md").read_text().split("---\n", 2)
    assert yaml.safe_load(header)["configs"] == [
        {"config_name": "default", "data_files": "tiles.parquet"}
    ]
    assert body.strip() == index.with_name("card.md").read_text().strip()


def test_options_do_not_name_local_folders(index, tmp_path):
    table, weights = pq.read_table(index), '/data/jane/my "weights"/nuclei.safetensors'
    options = json.loads(table.schema.metadata[b"options_mask"])
    options["engines"]["stain"] = {**options["engines"]["stain"], "weights": weights}
    given = {b"options_mask": json.dumps(options).encode()}
    changed = tmp_path / "study" / "results" / "index" / "index.parquet"
    changed.parent.mkdir(parents=True)
    pq.write_table(table.replace_schema_metadata(table.schema.metadata | given), changed)
    card = index.with_name("card.md").read_text()
    card += f"\n- other: `{given[b'options_mask'].decode()}`\n"
    changed.with_name("card.md").write_text(card)
    out = write(changed, tmp_path / "out")
    options["engines"]["stain"]["weights"] = "nuclei.safetensors"
    assert json.loads((out / "options.json").read_text())["mask"] == options
    for name in ("README.md", "options.json", "croissant.json", "ro-crate-metadata.json"):
        assert (
            "my \\" not in (out / name).read_text() and "/data/jane" not in (out / name).read_text()
        )
    assert '"weights": "nuclei.safetensors"' in (out / "README.md").read_text()


def test_repetition_gives_the_same_bytes(index, tmp_path):
    assert content(write(index, tmp_path / "one")) == content(write(index, tmp_path / "two"))


def test_anonymous_descriptions_have_no_names(index, tmp_path):
    out = write(index, tmp_path / "out", "--anonymous")
    table = pq.read_table(out / "tiles.parquet").to_pylist()
    text = json.dumps(table) + "".join(
        path.read_text() for path in out.iterdir() if path.suffix != ".parquet"
    )
    fingerprint = pq.read_schema(index).metadata[b"fingerprint"].decode()
    assert not [name for name in ("Qdoe", "Qjane", fingerprint[:12]) if name in text]
    assert len(table) == len(pq.read_table(index))


def test_an_index_without_card_is_an_error(index, tmp_path, caplog):
    alone = tmp_path / "index.parquet"
    alone.write_bytes(index.read_bytes())
    assert main(["export", "card", str(tmp_path / "out"), "--index", str(alone)]) == 1
    assert "card.md: no such file; run stage index again" in caplog.text
    assert not (tmp_path / "out").exists()


def test_sections_and_tables_of_a_card():
    card = (
        "# Card\n\nMasks by stain.\n\n## A\n\n| x | y |\n|---|---|\n| 1 | 2+ |\n\n## B\n\nNone.\n"
    )
    found = descriptions.sections(card)
    assert found == {"": "# Card\n\nMasks by stain.", "A": found["A"], "B": "None."}
    assert descriptions.table_rows(found["A"]) == [{"x": "1", "y": "2+"}]
    assert descriptions.table_rows(found["B"]) == []
