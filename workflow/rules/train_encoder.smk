# An encoder of tiles for the HER2 status: her2_cnn, tumour, stain or stain_map.
#
# REQUIRED INPUTS: cases; tables and shards of tile of all units; for tumour the annotations of the
# sheet, for stain and stain_map cells and masks of all units with HER2
# OUTPUTS: weights, metadata with the cases that the network has seen, history


rule train_encoder:
    input:
        all_of(layout.TILES),
        all_of(layout.TILE_SHARD),
        labels_of,
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
        labels=label_flags,
        annotations=annotations_of_all,
        options=network_flags,
        version=CONFIG.stages["train_encoder"].version,
    shell:
        "hemera train_encoder --network {wildcards.network} --cases {input.cases:q}"
        " --case-tiles {input.case_tiles:q} --weights {output.weights:q}"
        " --metadata {output.metadata:q} --history {output.history:q}"
        " {params.labels:q} {params.options} > {log:q} 2>&1"
