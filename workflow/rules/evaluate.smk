# Metrics of all generators and of SegmentationNet on test tiles, next to trivial baselines and
# published results.
#
# REQUIRED INPUTS: index, and the shards it points to; the networks with metadata and history
# OUTPUTS: metrics per tile, metrics per group, the page


rule evaluate:
    input:
        all_of(layout.TILE_SHARD, has_her2),
        all_of(layout.MASK_SHARD, has_her2),
        of_generators(layout.GENERATOR),
        of_generators(layout.GENERATOR_METADATA),
        of_generators(layout.GENERATION_HISTORY),
        layout.SEGMENTER,
        layout.SEGMENTER_METADATA,
        layout.SEGMENTATION_HISTORY,
        index=layout.INDEX,
        requirements=requirements("evaluate"),
    output:
        tiles=layout.EVALUATED_TILES,
        metrics=layout.METRICS,
        page=layout.EVALUATION,
    log:
        "logs/evaluate/evaluate.log",
    benchmark:
        "logs/evaluate/evaluate.tsv"
    conda:
        "../../envs/hemera.yaml"
    threads: CONFIG.stages["evaluate"].torch_threads
    resources:
        mem_mb=megabytes(8000),
        runtime=minutes(120),
        gpu=gpus("evaluate"),
    params:
        preset=CONFIG.cohort.preset,
        options=CONFIG.flags("evaluate"),
        version=CONFIG.stages["evaluate"].version,
    shell:
        "hemera evaluate --index {input.index:q} --preset {params.preset:q} --tiles {output.tiles:q}"
        " --metrics {output.metrics:q} --page {output.page:q} {params.options} > {log:q} 2>&1"
