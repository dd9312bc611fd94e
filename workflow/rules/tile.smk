# Tile pairs, measured while they are read: the only stage that reads full-resolution pixels.
#
# REQUIRED INPUTS: the images of a unit, their descriptions; for whole slides displacement and
#   certificate, or the user's own displacement; the region of interest where there is one
# OUTPUTS: shard of tile pairs, one row per tile, one row per pair


rule tile:
    input:
        unpack(tile_extras),
        images=images,
        images_table=layout.IMAGES_TABLE,
    output:
        shard=layout.TILE_SHARD,
        tiles=layout.TILES,
        pairs=layout.PAIRS,
    log:
        "logs/tile/{unit}.log",
    benchmark:
        "logs/tile/{unit}.tsv"
    conda:
        "../../envs/hemera.yaml"
    threads: 2
    resources:
        mem_mb=megabytes(3000),
        runtime=minutes(240),
    params:
        sheet=sheet_file,
        block_count=block_count,
        rows=rows("tile"),
        map=map_flags,
        local=local_flags,
        options=CONFIG.flags("tile"),
        version=CONFIG.stages["tile"].version,
    shell:
        "hemera tile --sheet {params.sheet:q} --unit {wildcards.unit:q}"
        " --block-count {params.block_count} --images-table {input.images_table:q} {params.map:q}"
        " --shard {output.shard:q} --tiles {output.tiles:q} --pairs {output.pairs:q}"
        " --workers {threads} {params.local} {params.options} > {log:q} 2>&1"
