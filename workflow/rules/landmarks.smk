# The error of a registration at an expert's landmarks, of each pair and of the cohort. Both are
# planned where the sheet gives landmarks.
#
# REQUIRED INPUTS: landmark files of a pair, its displacement and descriptions
# OUTPUTS: one row per landmark: target registration error, the HER2 side predicted on H&E; the rows
# of an ACROBAT file with the predictions in them; both once more for the cohort: figures per pair
# and over pairs, and the predictions in the challenge's submission form


rule landmarks:
    input:
        landmark_files,
        unpack(map_files),
        images_table=layout.IMAGES_TABLE,
    output:
        errors=layout.LANDMARK_ERRORS,
        predictions=layout.LANDMARK_PREDICTIONS,
    log:
        "logs/landmarks/{unit}.log",
    benchmark:
        "logs/landmarks/{unit}.tsv"
    conda:
        "../../envs/hemera.yaml"
    threads: 1
    resources:
        mem_mb=megabytes(2000),
        runtime=minutes(15),
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


rule landmarks_cohort:
    input:
        all_of(layout.LANDMARK_ERRORS, has_landmarks),
        all_of(layout.LANDMARK_PREDICTIONS, has_landmarks),
    output:
        errors=layout.LANDMARK_COHORT,
        predictions=layout.LANDMARK_COHORT_PREDICTIONS,
    log:
        "logs/landmarks_cohort/landmarks_cohort.log",
    benchmark:
        "logs/landmarks_cohort/landmarks_cohort.tsv"
    conda:
        "../../envs/hemera.yaml"
    threads: 1
    resources:
        mem_mb=megabytes(2000),
        runtime=minutes(15),
    params:
        sheet=sheet_file,
        rows=lambda wildcards: digest(
            (pair for pair in SHEET.pairs if pair.has_landmarks), "landmarks_cohort"
        ),
        options=CONFIG.flags("landmarks"),
        version=CONFIG.stages["landmarks"].version,
    shell:
        "hemera landmarks --sheet {params.sheet:q} --errors {output.errors:q}"
        " --predictions {output.predictions:q} {params.options} > {log:q} 2>&1"
