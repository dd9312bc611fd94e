# GenerationNet: H&E to virtual HER2.
#
# REQUIRED INPUTS: index, and the shards it points to
# OUTPUTS: weights, metadata, history; checkpoints lie beside them, so that a killed run resumes


rule train_generation:
    input:
        of_units(layout.TILE_SHARD),
        of_units(layout.MASK_SHARD),
        index=layout.INDEX,
    output:
        generator="results/train_generation/generator.safetensors",
        metadata="results/train_generation/metadata.json",
        history="results/train_generation/history.parquet",
    log:
        "logs/train_generation/train_generation.log",
    benchmark:
        "logs/train_generation/train_generation.tsv"
    conda:
        "../../envs/hemera.yaml"
    threads: training_threads("train_generation")
    resources:
        mem_mb=training_mb("train_generation", 16000),
        runtime=4320,
        gpu=gpus("train_generation"),
    params:
        launcher=launcher("train_generation"),
        options=CONFIG.flags("train_generation"),
        version=CONFIG.stages["train_generation"].version,
    shell:
        "{params.launcher} train_generation --index {input.index:q}"
        " --checkpoints results/train_generation/checkpoints --generator {output.generator:q}"
        " --metadata {output.metadata:q} --history {output.history:q} {params.options}"
        " 2>&1 | tee {log:q}"
