# The models of one method in cross-validation, and their predictions.
#
# REQUIRED INPUTS: cases; features of all units by the encoder of the method, or, for method cells,
# the index and the cells of all units with HER2
# OUTPUTS: weights, metadata with the cases that each model has seen, history, predictions,
# contributions of the views


rule aggregate:
    input:
        method_features,
        cases=layout.STATUS_CASES,
        case_tiles=layout.STATUS_TILES,
    output:
        weights=layout.AGGREGATOR,
        metadata=layout.AGGREGATOR_METADATA,
        history=layout.AGGREGATOR_HISTORY,
        predictions=layout.STATUS_PREDICTIONS,
        contributions=layout.CONTRIBUTIONS,
    log:
        "logs/aggregate/{method}.log",
    benchmark:
        "logs/aggregate/{method}.tsv"
    wildcard_constraints:
        method="[a-z0-9_]+",
    conda:
        "../../envs/hemera.yaml"
    threads: CONFIG.stages["aggregate"].torch_threads
    resources:
        mem_mb=megabytes(4000 + CONFIG.stages["aggregate"].memory_mb),
        runtime=minutes(720),
        gpu=gpus("aggregate"),
    params:
        engine=engine_flags,
        options=method_flags,
        version=CONFIG.stages["aggregate"].version,
    shell:
        "hemera aggregate --method {wildcards.method} --cases {input.cases:q}"
        " --case-tiles {input.case_tiles:q} --weights {output.weights:q}"
        " --metadata {output.metadata:q} --history {output.history:q}"
        " --predictions {output.predictions:q} --contributions {output.contributions:q}"
        " {params.engine} {params.options} > {log:q} 2>&1"
