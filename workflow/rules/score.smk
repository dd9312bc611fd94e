# The errors at all landmarks as the ACROBAT challenge scores them. Planned where there are some.
#
# REQUIRED INPUTS: the tables and predictions of landmarks of all pairs that have landmarks
# OUTPUTS: figures per pair and of the cohort; predictions in the challenge's submission form


rule score:
    input:
        landmark_tables(),
        of_units("results/landmarks/{unit}.csv", has_landmarks),
    output:
        score="results/score/score.parquet",
        predictions="results/score/predictions.csv",
    log:
        "logs/score/score.log",
    benchmark:
        "logs/score/score.tsv"
    conda:
        "../../envs/hemera.yaml"
    threads: 1
    resources:
        mem_mb=megabytes(2000),
        runtime=15,
    params:
        sheet=sheet_file,
        rows=digest((pair for pair in SHEET.pairs if pair.landmarks), "score"),
        options=CONFIG.flags("score"),
        version=CONFIG.stages["score"].version,
    shell:
        "hemera score --sheet {params.sheet:q} --landmarks-folder results/landmarks"
        " --score {output.score:q} --predictions {output.predictions:q} {params.options}"
        " > {log:q} 2>&1"
