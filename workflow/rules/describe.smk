# The cheap pass that finds a bad image before anything expensive starts.
#
# REQUIRED INPUTS: the images of a unit; the files with their artefacts where the sheet names them
# OUTPUTS: one row per image: size, resolution and its source, tissue outline, verdict


rule describe:
    input:
        images,
        artefact_files,
    output:
        images_table=layout.IMAGES_TABLE,
    log:
        "logs/describe/{unit}.log",
    benchmark:
        "logs/describe/{unit}.tsv"
    conda:
        "../../envs/hemera.yaml"
    threads: 1
    resources:
        mem_mb=megabytes(2000),
        runtime=minutes(30),
    params:
        sheet=sheet_file,
        block_count=block_count,
        rows=rows("describe"),
        options=CONFIG.flags("describe"),
        version=CONFIG.stages["describe"].version,
    shell:
        "hemera describe --sheet {params.sheet:q} --unit {wildcards.unit:q}"
        " --block-count {params.block_count} --images-table {output.images_table:q}"
        " {params.options} > {log:q} 2>&1"
