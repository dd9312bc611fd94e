# GenerationNet by the method of one preset, for `snakemake compare`: trained as train_generation
# does, on the same index and split, with the budget that section compare gives.
#
# REQUIRED INPUTS: index, and the shards it points to
# OUTPUTS: weights, metadata, history; checkpoints lie beside them, so that a killed run resumes


rule compare_generation:
    input:
        of_units(layout.TILE_SHARD),
        of_units(layout.MASK_SHARD),
        index=layout.INDEX,
    output:
        generator="results/compare/{preset}/generator.safetensors",
        metadata="results/compare/{preset}/metadata.json",
        history="results/compare/{preset}/history.parquet",
    log:
        "logs/compare/{preset}.training.log",
    benchmark:
        "logs/compare/{preset}.training.tsv"
    wildcard_constraints:
        preset="[a-z0-9_]+",
    conda:
        "../../envs/hemera.yaml"
    threads: training_threads("train_generation")
    resources:
        mem_mb=training_mb("train_generation", 16000),
        runtime=4320,
        gpu=gpus("train_generation"),
    params:
        launcher=launcher("train_generation"),
        options=compared_flags,
        version=CONFIG.stages["train_generation"].version,
    shell:
        "{params.launcher} train_generation --index {input.index:q}"
        " --checkpoints results/compare/checkpoints/{wildcards.preset} --generator {output.generator:q}"
        " --metadata {output.metadata:q} --history {output.history:q} {params.options}"
        " 2>&1 | tee {log:q}"
