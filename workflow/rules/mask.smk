# Label images from the HER2 tiles. Depends only on tile, so no threshold of filter reruns it. With the
# prefix restain_, of the HER2 that stage restain generates.
#
# REQUIRED INPUTS: table and shard of tiles, of stage tile or restain
# OUTPUTS: shard of label images, one row per tile and engine, one row per cell
#
# The cells of a unit stay in memory until they are written: 0.1 GB per million of them, 5,000 tiles of 300
# cells 0.2 GB.


MASK = CONFIG.stages["mask"]
MASK_RESOURCES = MASK.resources()


rule mask:
    input:
        unpack(masked_tiles),
        requirements=requirements("mask"),
        # Another content of the same name is another input.
        nuclei=[path for path in MASK.files() if Path(path).is_file()],
    output:
        shard=layout.MASK_SHARD.replace("mask/", "{prefix}mask/"),
        masks=layout.MASKS.replace("mask/", "{prefix}mask/"),
        cells=layout.CELLS.replace("mask/", "{prefix}mask/"),
    log:
        "logs/{prefix}mask/{unit}.log",
    benchmark:
        "logs/{prefix}mask/{unit}.tsv"
    wildcard_constraints:
        prefix="|restain_",
    conda:
        "../../envs/hemera.yaml"
    threads: MASK_RESOURCES["threads"]
    resources:
        mem_mb=megabytes(MASK_RESOURCES["memory_mb"]),
        runtime=minutes(480),
        gpu=MASK_RESOURCES["gpu"],
    params:
        options=CONFIG.flags("mask"),
        version=CONFIG.stages["mask"].version,
        engine_versions=[options.version for options in MASK.engines.values()],
    shell:
        "hemera mask --tiles {input.tiles:q} --tile-shard {input.tile_shard:q}"
        " --shard {output.shard:q} --masks {output.masks:q} --cells {output.cells:q}"
        " {params.options} > {log:q} 2>&1"
