"""The directory of a DeepLIIF model: what it must contain, its digest, its options.

Serialized networks (`G1.pt` ...) are TorchScript, which can run arbitrary code: name a directory
you trust. Raw networks (`latest_net_G1.pth` ...) are read as weights only.
"""

from __future__ import annotations

import ast
import hashlib
import re
import zipfile
from pathlib import Path
from typing import Any

from hemera.errors import EngineError

RECORD = "Zenodo record 4751737 (DeepLIIF_Latest_Model.zip)"
REMEDY = f"unpack {RECORD} there"
WITHOUT = "run without it: mask.engines {stain: {}} and index.target stain"
PACKAGE_REMEDY = f"install requirements.lock, or {WITHOUT}"

OPTION_FILES = ("test_opt.txt", "train_opt.txt")
"""The first that exists counts."""
MODALITIES = 4
# Longest value of an option that is parsed, characters.
_VALUE_LENGTH = 4096


def check_model(model: str | None) -> tuple[Path, bool]:
    """Check a model directory without loading it.

    Returns:
        The directory, and whether its networks are raw rather than serialized.

    Raises:
        EngineError: naming what is missing, truncated or of another model.
    """
    if model is None:
        raise EngineError(
            f"mask.engines.deepliif.model: not given; download {RECORD} and name its directory, or "
            f"{WITHOUT}"
        )
    folder = Path(model)
    if not folder.is_dir():
        raise EngineError(f"mask.engines.deepliif.model: {folder} is not a directory; {REMEDY}")
    present = {path.name for path in folder.iterdir()}
    raw = not any(re.fullmatch(r"G\w+\.pt", name) for name in present) and any(
        re.fullmatch(r"\w+_net_G\w+\.pth", name) for name in present
    )
    pattern = r"\w+_net_(G\w+)\.pth" if raw else r"(G\w+)\.pt"
    networks = {match[1]: name for name in present if (match := re.fullmatch(pattern, name))}
    # Newer models call the segmentation S and count from the input, 0; the published one 5 and 1.
    letter = "S" if any(name.startswith("GS") for name in networks) else "5"
    start = 0 if f"G{letter}0" in networks else 1
    wanted = [f"G{k}" for k in range(1, MODALITIES + 1)]
    wanted += [f"G{letter}{k}" for k in range(start, start + MODALITIES + 1)]
    stem = "latest_net_{}.pth" if raw else "{}.pt"
    missing = [stem.format(name) for name in wanted if name not in networks]
    if not present & set(OPTION_FILES):
        missing.append("train_opt.txt")
    if missing:
        raise EngineError(f"{folder}: the DeepLIIF model lacks {', '.join(missing)}; {REMEDY}")
    _check_options(folder)
    for name in sorted(networks.values()):
        if not _is_network(folder / name, raw):
            raise unloadable(folder, f"{name} is not a network, or truncated")
    return folder, raw


def unloadable(folder: Path, reason: str) -> EngineError:
    """Return the error for a directory with something else than a DeepLIIF model."""
    return EngineError(f"{folder}: not a DeepLIIF model that can be loaded ({reason}); {REMEDY}")


def _is_network(path: Path, raw: bool) -> bool:
    """Return whether a file ends as PyTorch writes networks, without reading its content."""
    if not path.is_file():
        return False
    # Old versions of PyTorch wrote a pickle.
    return zipfile.is_zipfile(path) or (raw and path.read_bytes()[:1] == b"\x80")


def _check_options(folder: Path) -> None:
    """Raise EngineError for options of another model than DeepLIIF's with four modalities."""
    options = read_options(folder)
    # Old models have no modalities_no, and targets_no counts the segmentation too.
    targets = options.get("targets_no")
    count = options.get("modalities_no", targets - 1 if isinstance(targets, int) else None)
    names = options.get("modalities_names", [])
    listed = isinstance(names, list | tuple) and all(isinstance(name, str) for name in names)
    for fits, reason in (
        (options.get("model") in ("DeepLIIF", "DeepLIIFKD"), f"its kind is {options.get('model')}"),
        (options.get("seg_gen", True), "it has no segmentation"),
        (
            type(count) is int and count == MODALITIES,
            f"it has {count} modalities; the published model has {MODALITIES}",
        ),
        (options.get("input_no", 1) == 1, "it takes more than one input image"),
        (listed, "modalities_names is not a list of names"),
        (
            not listed or "Marker" not in names or list(names).index("Marker") == MODALITIES,
            "its modality Marker is not the last",
        ),
        # It becomes part of the names of files.
        (
            re.fullmatch(r"\w+", str(options.get("epoch", "latest"))),
            "epoch is not valid in a file name",
        ),
    ):
        if not fits:
            raise unloadable(folder, reason)


def digest(folder: Path) -> str:
    """Return the SHA-256 over a model: of each file, its SHA-256 and its name, as sha256sum does.

    The files are the networks by name, then the options files, which define their architecture.
    """
    state = hashlib.sha256()
    networks = sorted(path for path in folder.iterdir() if path.suffix in (".pt", ".pth"))
    for path in [*networks, *(folder / name for name in OPTION_FILES)]:
        if path.is_file():
            with path.open("rb") as file:
                own = hashlib.file_digest(file, "sha256").hexdigest()
            state.update(f"{own}  {path.name}\n".encode())
    return state.hexdigest()


def check_digest(folder: Path, expected: str | None) -> str:
    """Return the digest of a model.

    Raises:
        EngineError: naming both, when it is not the expected one.
    """
    found = digest(folder)
    if expected is not None and found != expected.lower():
        raise EngineError(
            f"{folder}: its files have the SHA-256 {found}, but mask.engines.deepliif.sha256 is "
            f"{expected}; {REMEDY}, or correct the digest"
        )
    return found


def read_options(folder: Path) -> dict[str, Any]:
    """Read a model's options as plain values: numbers, texts, booleans, None, lists of these.

    Lines and defaults are split as DeepLIIF does. DeepLIIF evaluates every value as Python; here a
    value that is not a literal is text.

    Raises:
        EngineError: when the file is not text.
    """
    path = next(folder / name for name in OPTION_FILES if (folder / name).exists())
    try:
        # Not `splitlines`, which also splits at characters at which Python's files do not.
        lines = path.read_text().split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise EngineError(f"{path}: not a text file ({error}); {REMEDY}") from error
    found = {}
    for line in lines:
        key, colon, value = line.partition(":")
        for part in re.findall(r"\[.+?\]", value):
            if part.startswith("[default"):
                value = value.replace(part, "")
        key = key.strip()
        if colon and key.isidentifier() and not key.startswith("_"):
            found[key] = _literal(value.strip())
    return found


def _literal(text: str) -> Any:
    try:
        # Short, because the parser of Python is recursive.
        return ast.literal_eval(text) if len(text) <= _VALUE_LENGTH else text
    except (SyntaxError, TypeError, ValueError, MemoryError, RecursionError):
        return text
