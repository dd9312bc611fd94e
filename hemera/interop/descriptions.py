"""An index described for other software: Croissant, Workflow Run RO-Crate, Hugging Face card.

All figures are those of the dataset card of stage index; nothing is counted again.
"""

import datetime
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from hemera import __version__
from hemera.dataset.index import TileIndex
from hemera.errors import TableError
from hemera.interop.anonymous import Names

TILES, OPTIONS = "tiles.parquet", "options.json"
PARQUET = "application/x-parquet"

_TERMS = "https://w3id.org/"
_PROFILES = {
    f"{_TERMS}ro/wfrun/process/0.5": "Process Run Crate",
    f"{_TERMS}ro/wfrun/workflow/0.5": "Workflow Run Crate",
    f"{_TERMS}workflowhub/workflow-ro-crate/1.0": "Workflow RO-Crate",
}
_LOCAL = ("shard", "artefacts", "offset", "length", "sha256")
_TYPES = {
    pa.string(): "sc:Text", pa.bool_(): "sc:Boolean", pa.float64(): "sc:Float",
    pa.int64(): "sc:Integer", pa.int32(): "sc:Integer", pa.uint8(): "sc:Integer",
}  # fmt: skip
# The context that the specification prescribes.
_CONTEXT = {
    "@language": "en", "@vocab": "https://schema.org/", "citeAs": "cr:citeAs",
    "column": "cr:column", "conformsTo": "dct:conformsTo", "cr": "http://mlcommons.org/croissant/",
    "rai": "http://mlcommons.org/croissant/RAI/", "data": {"@id": "cr:data", "@type": "@json"},
    "dataType": {"@id": "cr:dataType", "@type": "@vocab"}, "dct": "http://purl.org/dc/terms/",
    "equivalentProperty": "cr:equivalentProperty",
    "examples": {"@id": "cr:examples", "@type": "@json"}, "extract": "cr:extract",
    "field": "cr:field", "fileProperty": "cr:fileProperty", "fileObject": "cr:fileObject",
    "fileSet": "cr:fileSet", "format": "cr:format", "includes": "cr:includes",
    "isLiveDataset": "cr:isLiveDataset", "jsonPath": "cr:jsonPath", "key": "cr:key",
    "md5": "cr:md5", "parentField": "cr:parentField", "path": "cr:path",
    "recordSet": "cr:recordSet", "references": "cr:references", "regex": "cr:regex",
    "repeated": "cr:repeated", "replace": "cr:replace", "samplingRate": "cr:samplingRate",
    "sc": "https://schema.org/", "separator": "cr:separator", "source": "cr:source",
    "subField": "cr:subField", "transform": "cr:transform",
}  # fmt: skip


def write_descriptions(folder: Path, index: Path, *, workflow: Path, anonymous: bool) -> None:
    """Fill a folder with an index without locations, its card and its descriptions.

    The date of all is that of the file `index`, so that a repetition gives the same bytes.

    Args:
        workflow: the Snakefile, which is copied.
        anonymous: with names by `hemera.interop.anonymous` and its key beside the results.

    Raises:
        TableError: when the dataset card is not beside the index.
    """
    opened = TileIndex(index)
    card_path = opened.path.with_name("card.md")
    if not card_path.is_file():
        raise TableError(f"{card_path}: no such file; run stage index again")
    before, heading, options = card_path.read_text().partition("\n## Options\n")
    card, mark = before + heading + _without_folders(options), opened.fingerprint
    columns = [name for name in opened.columns if name.rsplit("_", 1)[-1] not in _LOCAL]
    rows = opened.select(columns, refused=True)
    if anonymous:
        names = Names(opened.path.parents[2])
        rows = names.replaced(rows)
        mark = names.of("fingerprint", mark)
        card = card.replace(opened.fingerprint, mark)
    written = datetime.datetime.fromtimestamp(int(opened.path.stat().st_mtime), datetime.UTC)
    pq.write_table(rows.replace_schema_metadata(None), folder / TILES, compression="zstd")
    made = {
        key.removeprefix("options_"): json.loads(_without_folders(value))
        for key, value in opened.metadata.items()
        if key.startswith("options_")
    }
    _write_json(folder / OPTIONS, made)
    (folder / "Snakefile").write_bytes(workflow.read_bytes())
    terms = json.loads(opened.metadata.get("licences", "[]"))
    about = {
        "name": f"HEMERA tiles of H&E and HER2 {mark[:12]}",
        "description": "Tiles of registered H&E and HER2 images with position, quality, decision "
        "and split. The pixels are in the shards of the study.",
        "license": terms or ["The index states none: check the terms of the images."],
    }
    _write_json(folder / "croissant.json", _croissant(about, card, folder / TILES, rows, written))
    _write_json(folder / "ro-crate-metadata.json", _crate(about, written))
    header = {
        "license": "other",
        "task_categories": ["image-to-image", "image-segmentation"],
        "tags": ["histopathology", "croissant"],
        "configs": [{"config_name": "default", "data_files": TILES}],
    }
    head = yaml.safe_dump(header, sort_keys=False)
    (folder / "README.md").write_text(f"---\n{head}---\n\n{card}")


def _without_folders(options: str) -> str:
    """Return options, JSON, in which files have no folder: their paths are of one machine."""
    return re.sub(r'"(?:[^"\\]|\\.)*/((?:[^"\\/]|\\.)*)"', r'"\1"', options)


def sections(card: str) -> dict[str, str]:
    """Return the sections of a dataset card by heading; "" is what precedes the first."""
    parts = re.split(r"^## (.*)\n", "## \n" + card, flags=re.MULTILINE)[1:]
    return {name: text.strip() for name, text in zip(parts[::2], parts[1::2], strict=True)}


def table_rows(section: str) -> list[dict[str, str]]:
    """Return the rows of the table of a section of the card; none where it has no table."""
    lines = [line for line in section.splitlines() if line.startswith("| ")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return [dict(zip(cells[0], row, strict=True)) for row in cells[1:]]


def _croissant(
    about: Mapping[str, Any], card: str, tiles: Path, rows: pa.Table, written: datetime.datetime
) -> dict[str, Any]:
    """Return the description by Croissant 1.0, with the selection in fields of RAI."""
    found = sections(card)
    accepted = [
        "Accepted: {tiles} tiles of {cases} cases, data set {data set}, score {score}, split "
        "{split}.".format(**row)
        for row in table_rows(found["Accepted tiles"])
    ]
    refused = [
        "Refused: {tiles} tiles of {cases} cases, data set {data set}, score {score}, because "
        "{reason}.".format(**row)
        for row in table_rows(found["Why tiles were refused"])
    ]
    fields = [
        {
            "@type": "cr:Field",
            "@id": f"tiles/{field.name}",
            "name": f"tiles/{field.name}",
            "dataType": _TYPES[field.type.value_type if _is_list(field) else field.type],
            **({"repeated": True} if _is_list(field) else {}),
            "source": {"fileObject": {"@id": TILES}, "extract": {"column": field.name}},
        }
        for field in rows.schema
    ]
    return {
        "@context": _CONTEXT,
        "@type": "sc:Dataset",
        **about,
        "conformsTo": [
            "http://mlcommons.org/croissant/1.0",
            "http://mlcommons.org/croissant/RAI/1.0",
        ],
        "version": __version__,
        "datePublished": written.date().isoformat(),
        "citeAs": "The data sets that the terms of use name.",
        "rai:dataBiases": ["Tiles are selected by criteria of quality.", *accepted, *refused],
        "rai:dataLimitations": [found["Leakage"], found["Excluded regions"]],
        "rai:dataPreprocessingProtocol": [f"Options: see {OPTIONS}."],
        "rai:machineAnnotationTools": [
            line for line in found[""].splitlines() if line.startswith("Masks by ")
        ],
        "distribution": [
            {
                "@type": "cr:FileObject",
                "@id": TILES,
                "name": TILES,
                "contentUrl": TILES,
                "contentSize": f"{tiles.stat().st_size} B",
                "encodingFormat": PARQUET,
                "sha256": hashlib.sha256(tiles.read_bytes()).hexdigest(),
            }
        ],
        "recordSet": [
            {
                "@type": "cr:RecordSet",
                "@id": "tiles",
                "name": "tiles",
                "key": {"@id": "tiles/tile"},
                "field": fields,
            }
        ],
    }


def _is_list(field: pa.Field) -> bool:
    return bool(pa.types.is_list(field.type))


def _crate(about: Mapping[str, Any], written: datetime.datetime) -> dict[str, Any]:
    """Return the metadata of a Workflow Run Crate: the run that wrote the index."""
    files = {
        TILES: (["File"], PARQUET, "All tiles of the index"),
        "README.md": (["File"], "text/markdown", "Dataset card"),
        "croissant.json": (["File"], "application/ld+json", "Description by Croissant"),
        OPTIONS: (["File"], "application/json", "Options of the stages"),
    }
    results = (TILES, "README.md", "croissant.json")
    return {
        "@context": f"{_TERMS}ro/crate/1.1/context",
        "@graph": [
            {
                "@id": "ro-crate-metadata.json", "@type": "CreativeWork", "about": {"@id": "./"},
                "conformsTo": _refs([f"{_TERMS}ro/crate/1.1", list(_PROFILES)[-1]]),
            },
            {
                "@id": "./", "@type": "Dataset", **about, "license": "; ".join(about["license"]),
                "datePublished": written.date().isoformat(), "conformsTo": _refs(list(_PROFILES)),
                "hasPart": _refs(["Snakefile", *files]), "mainEntity": {"@id": "Snakefile"},
                "mentions": {"@id": "#run"},
            },
            *(
                {
                    "@id": name, "@type": "CreativeWork", "name": words,
                    "version": name.split("/")[-1],
                }
                for name, words in _PROFILES.items()
            ),
            {
                "@id": "Snakefile",
                "@type": ["File", "SoftwareSourceCode", "ComputationalWorkflow"],
                "name": f"HEMERA {__version__}", "programmingLanguage": {"@id": "#snakemake"},
                "version": __version__, "license": "MIT",
            },
            {
                "@id": "#snakemake", "@type": "ComputerLanguage", "name": "Snakemake",
                "identifier": {"@id": "https://doi.org/10.1093/bioinformatics/bts480"},
                "url": {"@id": "https://snakemake.readthedocs.io"},
            },
            {
                "@id": "#run", "@type": "CreateAction", "name": "Stages describe to index",
                "instrument": {"@id": "Snakefile"}, "object": _refs([OPTIONS]),
                "result": _refs(results), "endTime": written.isoformat(),
            },
            *(
                {"@id": name, "@type": kind, "encodingFormat": format_, "name": words}
                for name, (kind, format_, words) in files.items()
            ),
        ],
    }  # fmt: skip


def _refs(names: Sequence[str]) -> list[dict[str, str]]:
    return [{"@id": name} for name in names]


def _write_json(path: Path, document: Any) -> None:
    path.write_text(json.dumps(document, indent=2, ensure_ascii=False) + "\n")
