"""Copies of input files on a disk of the node."""

import contextlib
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path


@contextlib.contextmanager
def local_copies(paths: Mapping[str, Path], folder: Path | None) -> Iterator[dict[str, Path]]:
    """Yield copies of files in a new folder below `folder`, removed at the end.

    The copies have the names of the files. A MIRAX slide is copied with the folder of its data.

    Args:
        paths: the files, by any names that differ.
        folder: on the node; None: nothing is copied, and the files themselves are yielded.
    """
    if folder is None:
        yield dict(paths)
        return
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="hemera_", dir=folder) as own:
        copies = {name: Path(own) / name / path.name for name, path in paths.items()}
        for name, path in paths.items():
            copies[name].parent.mkdir()
            shutil.copyfile(path, copies[name])
            data = path.with_suffix("")
            if path.suffix.lower() == ".mrxs" and data.is_dir():
                shutil.copytree(data, copies[name].with_suffix(""))
        yield copies
