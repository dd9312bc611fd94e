"""Units of stage tile: a pair that comes registered, a pair of slides with a displacement."""

import hashlib

import cv2
import numpy as np
from PIL import Image

from hemera import tables
from hemera.config import TileOptions
from hemera.dataset.shards import read_member
from hemera.imaging.codecs import decode
from hemera.registration.displacement_files import write_displacement
from hemera.stages import tile
from tests.small_displacements import field_of
from tests.small_sheets import describe_unit, write_certificate, write_sheet
from tests.small_slides import write_pyramid

HER2_COLOURS = ((225, 215, 205), (120, 70, 40))
HE_MPP, HER2_MPP = 0.5, 0.44
HER2_SIZE = 880, 640
"""Of the pair of slides; the images of the registered pair have 0.5 um/px."""


def tissue(rng, height, width, colours=((235, 190, 215), (95, 60, 140))):
    # In whole numbers, which no processor rounds its own way.
    noise = rng.integers(0, 256, (height, width), dtype=np.uint8)
    share = cv2.blur(cv2.blur(noise, (5, 5)), (5, 5)).astype(float)
    share = (share - share.min()) / np.ptp(share)
    pale, dark = np.array(colours, float)
    return np.rint(pale + share[..., None] * (dark - pale)).astype(np.uint8)


class Unit:
    """One unit in a folder: its sheet, what describe says, and what tile makes of it."""

    def __init__(self, folder, rows, unit="bci.000"):
        self.folder, self.unit = folder, unit
        self.results = folder / "results"
        self.sheet = write_sheet(folder, rows, case="c", dataset="bci", he_mpp=0.5, her2_mpp=0.5)
        self.images_table = self.results / "describe" / f"{unit}.parquet"
        self.shard = self.results / "tile" / f"{unit}.tar"
        describe_unit(folder, unit, self.images_table)

    def tile(self, *, workers=1, registration_quality=None, local_folder=None, **options):
        """Run tile, with the displacement and certificate in the folder, if there are any."""
        displacement, certificate = (self.folder / name for name in ("d.npz", "c.parquet"))
        tiles, pairs = (self.shard.with_suffix(s) for s in (".parquet", ".pairs.parquet"))
        tile.run(
            sheet=self.sheet,
            unit=self.unit,
            block_count=1,
            images_table=self.images_table,
            displacement=displacement if displacement.exists() else None,
            certificate=certificate if certificate.exists() else None,
            registration_quality=registration_quality,
            shard=self.shard,
            tiles=tiles,
            pairs=pairs,
            workers=workers,
            local_folder=local_folder,
            options=TileOptions(**{"size_px": 128, "codec": "png", **options}),
        )
        self.rows = tables.read(tiles, tables.TILE).to_pylist()
        [*states] = tables.read(pairs, tables.PAIRS).to_pylist()
        self.states = {state["pair"]: state for state in states}
        return self.rows

    def pixels(self, row, stain):
        data = read_member(
            self.shard.parent.parent / row["shard"], row[f"{stain}_offset"], row[f"{stain}_length"]
        )
        assert hashlib.sha256(data).hexdigest() == row[f"{stain}_sha256"]
        return decode(data)

    @property
    def state(self):
        [state] = self.states.values()
        return state


def registered(name, **changes):
    return {
        "pair": name, "he": f"{name}.he.png", "her2": f"{name}.her2.png", "registered": "true",
        **changes,
    }  # fmt: skip


def write_pair(folder, rng):
    """Write a registered pair of 300 x 420 px, `p1`; return its images."""
    he, her2 = tissue(rng, 300, 420), tissue(rng, 300, 420, HER2_COLOURS)
    Image.fromarray(he).save(folder / "p1.he.png")
    Image.fromarray(her2).save(folder / "p1.her2.png")
    return he, her2


def truth(x_um, y_um):
    """The HER2 picture as a function of the place: no symmetry, 3 to 6 levels per pixel."""
    red = 150 + 60 * np.sin(x_um / 13 + 0.5) * np.cos(y_um / 17)
    green = 130 + 50 * np.cos(x_um / 11 - y_um / 23)
    blue = 110 + 50 * np.sin(y_um / 9 + 1)
    return np.stack([red, green, blue], axis=-1)


def field_at(points):
    """The place on HER2 of a point (x, y) of H&E, um: turned, shifted and bent."""
    x, y = points[..., 0], points[..., 1]
    angle = np.radians(7)
    return np.stack(
        [
            np.cos(angle) * x - np.sin(angle) * y + 45 + 4 * np.sin(y / 40),
            np.sin(angle) * x + np.cos(angle) * y - 12 + 3 * np.cos(x / 55),
        ],
        axis=-1,
    )


def write_slides(folder, rng):
    """Write a pair of slides, with its displacement and certificate."""
    he = tissue(rng, 500, 700)
    x, y = np.meshgrid(*(np.arange(side) + 0.5 for side in HER2_SIZE))
    her2 = np.rint(truth(x * HER2_MPP, y * HER2_MPP)).astype(np.uint8)
    for name, rgb, mpp in (("he", he, HE_MPP), ("her2", her2, HER2_MPP)):
        write_pyramid(folder / f"{name}.tif", [rgb], (mpp, mpp))
    write_displacement(folder / "d.npz", field_of(field_at, 88, 63))
    write_certificate(folder / "c.parquet", "case1", "pass")


def whole_slides(folder, **changes):
    row = {"pair": "case1", "dataset": "acrobat", "he": "he.tif", "her2": "her2.tif"}
    return Unit(folder, [{**row, "he_mpp": "", "her2_mpp": "", **changes}], unit="case1")
