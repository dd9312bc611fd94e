# Metrics of all methods that determine the status, with controls; the page.
#
# REQUIRED INPUTS: cases; predictions and metadata of all methods
# OUTPUTS: metrics per method, part and group of cases, the page


rule evaluate_status:
    input:
        of_methods(layout.STATUS_PREDICTIONS),
        of_methods(layout.AGGREGATOR_METADATA),
        cases=layout.STATUS_CASES,
    output:
        metrics=layout.STATUS_METRICS,
        page=layout.STATUS_PAGE,
    log:
        "logs/evaluate_status/evaluate_status.log",
    benchmark:
        "logs/evaluate_status/evaluate_status.tsv"
    conda:
        "../../envs/hemera.yaml"
    threads: 1
    resources:
        mem_mb=megabytes(4000),
        runtime=minutes(60),
    params:
        preset=CONFIG.cohort.preset,
        options=CONFIG.flags("evaluate_status"),
        version=CONFIG.stages["evaluate_status"].version,
    shell:
        "hemera evaluate_status --cases {input.cases:q} --preset {params.preset:q}"
        " --metrics {output.metrics:q} --page {output.page:q} {params.options} > {log:q} 2>&1"
