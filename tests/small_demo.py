"""Tiles of the tissue of the demo cohort, drawn without its files."""

import numpy as np

from hemera.demo.render import Appearance, Renderer, rasterise
from hemera.demo.tissue import grow

SIDE, MPP = 256, 0.92
SCORES = ("3+", "0", "2+", "3+", "1+")


def draw_tissue(seed: int):
    """Draw a tile (256, 256) in both stains with its true mask; on two of five HER2 is on gray."""
    rng = np.random.default_rng((7, seed))
    tissue = grow(rng, (SIDE * MPP, SIDE * MPP), SCORES[seed % 5], whole=False)
    renderer = Renderer(tissue, rasterise(tissue, MPP, (SIDE, SIDE)), rng)
    he_look = Appearance((228, 216, 222))
    gray = seed % 5 in (1, 3)
    look = Appearance((180, 178, 175) if gray else (254, 251, 249), 0.9, 0.9)
    he, her2 = renderer.draw("he", he_look), renderer.draw("her2", look)
    facts = {"he_background": list(he_look.background), "her2_background": list(look.background)}
    return he, her2, renderer.labels(), facts
