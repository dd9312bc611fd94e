# The page about the data, made before any training, also when nothing was accepted.
#
# REQUIRED INPUTS: everything up to the index
# OUTPUTS: one self-contained HTML page; beside it a page for each registered pair beyond those on
# it; a table of the staining of each case


rule report:
    input:
        all_of(layout.IMAGES_TABLE, has_her2),
        all_of(layout.CERTIFICATE, needs_registration),
        all_of(layout.DISPLACEMENT, needs_registration),
        all_of(layout.QUALITY, needs_registration),
        [layout.LANDMARK_COHORT] if landmark_tables() else [],
        all_of(layout.TILE_SHARD, has_her2),
        all_of(layout.PAIRS, has_her2),
        all_of(layout.MASK_SHARD, has_her2),
        all_of(layout.CELLS, has_her2),
        layout.INDEX,
    output:
        page=layout.REPORT,
        pairs=directory(layout.PAIR_PAGES),
        cases=layout.CASES,
    log:
        "logs/report/report.log",
    benchmark:
        "logs/report/report.tsv"
    conda:
        "../../envs/hemera.yaml"
    threads: 1
    resources:
        mem_mb=megabytes(4000),
        # A second per registered pair, of which there may be a thousand on a slow disk.
        runtime=minutes(120),
    params:
        sheet=sheet_file,
        block_count=block_count,
        preset=CONFIG.cohort.preset,
        rows=rows_of_all("report"),
        options=CONFIG.flags("report"),
        version=CONFIG.stages["report"].version,
    shell:
        "hemera report --sheet {params.sheet:q} --block-count {params.block_count}"
        " --preset {params.preset:q} --page {output.page:q} --pairs {output.pairs:q}"
        " --cases {output.cases:q} {params.options} > {log:q} 2>&1"
