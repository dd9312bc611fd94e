# Accepted or rejected, and why, for every tile of the cohort. Reads no pixel.
#
# REQUIRED INPUTS: the tables of tile and mask of all units
# OUTPUTS: all tiles with `accepted` and `reason`


rule filter:
    input:
        all_of(layout.TILES, has_her2),
        all_of(layout.PAIRS, has_her2),
        all_of(layout.MASKS, has_her2),
    output:
        tiles=layout.FILTERED,
    log:
        "logs/filter/filter.log",
    benchmark:
        "logs/filter/filter.tsv"
    conda:
        "../../envs/hemera.yaml"
    threads: 1
    resources:
        mem_mb=megabytes(4000),
        runtime=minutes(30),
    params:
        sheet=sheet_file,
        block_count=block_count,
        rows=rows_of_all("filter"),
        engines=ENGINES,
        options=CONFIG.flags("filter"),
        version=CONFIG.stages["filter"].version,
    shell:
        "hemera filter --sheet {params.sheet:q} --block-count {params.block_count}"
        " --engines {params.engines:q}"
        " --tiles {output.tiles:q} {params.options} > {log:q} 2>&1"
