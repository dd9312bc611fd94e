"""The directory of a DeepLIIF model: what it must contain, and its digest.

Serialized networks (`G1.pt` ...) are TorchScript, which can run arbitrary code: name a directory
you trust. Raw networks (`latest_net_G1.pth` ...) are read as weights only.
"""

import hashlib
import zipfile
from pathlib import Path

from hemera.errors import EngineError

RECORD = "Zenodo record 4751737 (DeepLIIF_Latest_Model.zip)"
REMEDY = f"unpack {RECORD} there"
WITHOUT = "run without it: preset no_weights, with the engine stain"
PACKAGE_REMEDY = f"install requirements.lock, or {WITHOUT}"

OPTION_FILES = ("test_opt.txt", "train_opt.txt")
"""The first that exists counts."""
MODALITIES = 4


def check_model(model: str | None) -> tuple[Path, bool]:
    """Return a model directory, and whether its networks are raw rather than serialized.

    EngineError names what is missing or truncated; nothing is loaded.
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
    suffixes = {Path(name).suffix for name in present}
    raw = ".pth" in suffixes and ".pt" not in suffixes
    stem = "latest_net_{}.pth" if raw else "{}.pt"
    # Newer models call the segmentation S and count from the input, 0; the published one 5 and 1.
    letter = "S" if any("GS" in name for name in present) else "5"
    start = 0 if stem.format(f"G{letter}0") in present else 1
    networks = [stem.format(f"G{k}") for k in range(1, MODALITIES + 1)]
    networks += [stem.format(f"G{letter}{k}") for k in range(start, start + MODALITIES + 1)]
    missing = [name for name in networks if name not in present]
    if not present & set(OPTION_FILES):
        missing.append("train_opt.txt")
    if missing:
        raise EngineError(f"{folder}: the DeepLIIF model lacks {', '.join(missing)}; {REMEDY}")
    for name in networks:
        # Raw networks of old versions of PyTorch are pickles; loading them is safe and checks them.
        if not raw and not zipfile.is_zipfile(folder / name):
            raise EngineError(f"{folder}: {name} is not a network, or truncated; {REMEDY}")
    return folder, raw


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
