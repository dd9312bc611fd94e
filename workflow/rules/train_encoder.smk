# An encoder of tiles for the HER2 status, trained on HER2 tiles with the score of their case.
#
# REQUIRED INPUTS: cases; tables and shards of tile of all units
# OUTPUTS: weights, metadata with the cases that the network has seen, history


rule train_encoder:
    input:
        all_of(layout.TILES),
        all_of(layout.TILE_SHARD),
        cases=layout.STATUS_CASES,
        case_tiles=layout.STATUS_TILES,
    output:
        weights=layout.ENCODER,
        metadata=layout.ENCODER_METADATA,
        history=layout.ENCODER_HISTORY,
    log:
        "logs/train_encoder/{network}.log",
    benchmark:
        "logs/train_encoder/{network}.tsv"
    wildcard_constraints:
        network="|".join(NETWORKS),
    conda:
        "../../envs/hemera.yaml"
    threads: CONFIG.stages["train_encoder"].torch_threads
    resources:
        mem_mb=megabytes(12000),
        runtime=minutes(1440),
        gpu=gpus("train_encoder"),
    params:
        options=CONFIG.flags("train_encoder"),
        version=CONFIG.stages["train_encoder"].version,
    shell:
        "hemera train_encoder --network {wildcards.network} --cases {input.cases:q}"
        " --case-tiles {input.case_tiles:q} --weights {output.weights:q}"
        " --metadata {output.metadata:q} --history {output.history:q}"
        " {params.options} > {log:q} 2>&1"
