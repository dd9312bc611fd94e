# The demo cohort's images, made from a seed. Exists only while the sheet is the demo's own.
#
# REQUIRED INPUTS: none
# OUTPUTS: the images, landmark files and annotations that the sheet names

if CONFIG.cohort.sheet in DEMO_SHEETS:

    rule demo:
        output:
            list(
                dict.fromkeys(
                    str(path)
                    for pair in SHEET.pairs
                    for path in (*pair.images, *pair.landmarks, pair.annotations)
                    if path
                )
            ),
        log:
            "logs/demo/demo.log",
        benchmark:
            "logs/demo/demo.tsv"
        conda:
            "../../envs/hemera.yaml"
        threads: 2
        resources:
            mem_mb=megabytes(3000),
            runtime=minutes(15),
        params:
            folder=demo_folder,
            size=DEMO_SHEETS[CONFIG.cohort.sheet],
            version=DEMO_VERSION,
        shell:
            "hemera demo --folder {params.folder:q} --size {params.size} --workers {threads} > {log:q} 2>&1"
