# Labels, folds and H&E tiles of the cases whose status is determined.
#
# REQUIRED INPUTS: tables of describe and tile of all units
# OUTPUTS: one row per case, one row per tile


rule cases:
    input:
        all_of(layout.IMAGES_TABLE),
        all_of(layout.TILES),
    output:
        cases=layout.STATUS_CASES,
        case_tiles=layout.STATUS_TILES,
    log:
        "logs/cases/cases.log",
    benchmark:
        "logs/cases/cases.tsv"
    conda:
        "../../envs/hemera.yaml"
    threads: 1
    resources:
        mem_mb=megabytes(4000),
        runtime=minutes(30),
    params:
        sheet=sheet_file,
        block_count=block_count,
        rows=rows_of_all("cases"),
        options=CONFIG.flags("cases"),
        version=CONFIG.stages["cases"].version,
    shell:
        "hemera cases --sheet {params.sheet:q} --block-count {params.block_count}"
        " --cases {output.cases:q} --case-tiles {output.case_tiles:q} {params.options} > {log:q} 2>&1"
