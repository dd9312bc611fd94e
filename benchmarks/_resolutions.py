"""Resolution of the real images that benchmarks are given, um/px, the same in all of them.

Stated by the source for the kidney pair, `os` and `cmu`; that of BCI is its scanner's. No file
states the others: they are estimates from the size of nuclei, or of the core for `tma`. Of
qc_artifact, slide overviews and `normal` differ.
"""

MPP = {
    "bci": 0.46, "mist": 0.6, "normal": 0.5, "qc": 0.5, "focus": 0.25, "fields": 0.22, "tma": 0.25,
    "membrane": 0.39, "bcdata": 0.25, "shidc": 0.20, "glioma": 0.11, "deepliif": 0.25, "misc": 0.5,
    "kidney": 4.6, "os": 0.227, "cmu": 0.499, "overview": 8.0,
}  # fmt: skip
FOLDERS = {
    "bci_pairs_1024": "bci", "bci_ihc_only_1024": "bci", "panels_397": "mist", "panels_512": "mist",
    "qc_tiles": "qc", "qc_focus": "focus", "qc_artifact": "overview", "her2_fields": "fields",
    "her2_membrane_128": "membrane", "her2_tma": "tma", "ki67_bcdata": "bcdata",
    "ki67_shidc": "shidc", "ki67_glioma": "glioma", "ki67_os2": "os", "he_os1": "os",
    "deepliif": "deepliif", "ihc_misc": "misc", "registration": "kidney", "wsi_derived": "kidney",
}  # fmt: skip
"""The source of the images of each folder."""
