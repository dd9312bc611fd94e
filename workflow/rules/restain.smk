# HER2 that the configured generator makes of the H&E tiles of a unit, of cases that it has not seen.
#
# REQUIRED INPUTS: table and shard of tiles; tiles of cases; index; generator
# OUTPUTS: shard of tiles with generated HER2, one row per tile


rule restain:
    input:
        tiles=layout.TILES,
        tile_shard=layout.TILE_SHARD,
        case_tiles=layout.STATUS_TILES,
        index=layout.INDEX,
        generator=layout.GENERATOR.format(generator=CONFIG.generators[0]),
        generator_metadata=layout.GENERATOR_METADATA.format(generator=CONFIG.generators[0]),
    output:
        shard=layout.VIRTUAL_SHARD,
        virtual_tiles=layout.VIRTUAL_TILES,
    log:
        "logs/restain/{unit}.log",
    benchmark:
        "logs/restain/{unit}.tsv"
    conda:
        "../../envs/hemera.yaml"
    threads: CONFIG.stages["restain"].torch_threads
    resources:
        mem_mb=megabytes(8000),
        runtime=minutes(120),
        gpu=gpus("restain"),
    params:
        options=CONFIG.flags("restain"),
        version=CONFIG.stages["restain"].version,
    shell:
        "hemera restain --tiles {input.tiles:q} --tile-shard {input.tile_shard:q}"
        " --case-tiles {input.case_tiles:q} --index {input.index:q}"
        " --generator {input.generator:q} --generator-metadata {input.generator_metadata:q}"
        " --shard {output.shard:q} --virtual-tiles {output.virtual_tiles:q}"
        " {params.options} > {log:q} 2>&1"
