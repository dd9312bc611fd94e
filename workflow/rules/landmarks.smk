# The error of a registration at an expert's landmarks.
#
# REQUIRED INPUTS: landmark files of a pair, its displacement and descriptions
# OUTPUTS: one row per landmark: target registration error, the HER2 side predicted on H&E; the rows
# of an ACROBAT file with the predictions in them


rule landmarks:
    input:
        landmark_files,
        unpack(map_files),
        images_table="results/describe/{unit}.parquet",
    output:
        errors="results/landmarks/{unit}.parquet",
        predictions="results/landmarks/{unit}.csv",
    log:
        "logs/landmarks/{unit}.log",
    benchmark:
        "logs/landmarks/{unit}.tsv"
    conda:
        "../../envs/hemera.yaml"
    threads: 1
    resources:
        mem_mb=megabytes(2000),
        runtime=15,
    params:
        sheet=sheet_file,
        rows=rows("landmarks"),
        map=map_flags,
        options=CONFIG.flags("landmarks"),
        version=CONFIG.stages["landmarks"].version,
    shell:
        "hemera landmarks --sheet {params.sheet:q} --unit {wildcards.unit:q}"
        " --images-table {input.images_table:q} {params.map:q}"
        " --errors {output.errors:q} --predictions {output.predictions:q} {params.options}"
        " > {log:q} 2>&1"
