# SegmentationNet: H&E to HER2-positive regions, with the frozen configured generator in its encoder.
#
# REQUIRED INPUTS: index, and the shards it points to; GenerationNet
# OUTPUTS: weights, metadata, history; checkpoints are beside them, so that a killed run resumes


rule train_segmentation:
    input:
        all_of(layout.TILE_SHARD, has_her2),
        all_of(layout.MASK_SHARD, has_her2),
        index=layout.INDEX,
        generator=layout.GENERATOR.format(generator=CONFIG.cohort.preset),
        generator_metadata=layout.GENERATOR_METADATA.format(generator=CONFIG.cohort.preset),
        requirements=requirements("train_segmentation"),
    output:
        segmenter=layout.SEGMENTER,
        metadata=layout.SEGMENTER_METADATA,
        history=layout.SEGMENTATION_HISTORY,
    log:
        "logs/train_segmentation/train_segmentation.log",
    benchmark:
        "logs/train_segmentation/train_segmentation.tsv"
    conda:
        "../../envs/hemera.yaml"
    threads: training_threads("train_segmentation")
    resources:
        mem_mb=training_mb("train_segmentation", 24000),
        runtime=4320,
        gpu=gpus("train_segmentation"),
    params:
        launcher=launcher("train_segmentation"),
        options=CONFIG.flags("train_segmentation"),
        version=CONFIG.stages["train_segmentation"].version,
    shell:
        "{params.launcher} train_segmentation --index {input.index:q} --generator {input.generator:q}"
        " --generator-metadata {input.generator_metadata:q}"
        " --checkpoints results/train_segmentation/checkpoints --segmenter {output.segmenter:q}"
        " --metadata {output.metadata:q} --history {output.history:q} {params.options}"
        # A cluster signals all processes of a job: the log must take the last message of the training.
        " 2>&1 | (trap '' TERM; exec tee {log:q})"
