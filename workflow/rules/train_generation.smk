# GenerationNet: H&E to virtual HER2. The generator with the name of the preset is the configured one;
# others, listed in evaluate.generators, have the method of their preset and the same budget.
#
# REQUIRED INPUTS: index, and the shards it points to
# OUTPUTS: weights, metadata, history; checkpoints are beside them, so that a killed run resumes


rule train_generation:
    input:
        all_of(layout.TILE_SHARD, has_her2),
        all_of(layout.MASK_SHARD, has_her2),
        index=layout.INDEX,
    output:
        generator=layout.GENERATOR,
        metadata=layout.GENERATOR_METADATA,
        history=layout.GENERATION_HISTORY,
    log:
        "logs/train_generation/{generator}.log",
    benchmark:
        "logs/train_generation/{generator}.tsv"
    wildcard_constraints:
        generator="[a-z0-9_]+",
    conda:
        "../../envs/hemera.yaml"
    threads: training_threads("train_generation")
    resources:
        mem_mb=training_mb("train_generation", 16000),
        runtime=4320,
        gpu=gpus("train_generation"),
    params:
        launcher=launcher("train_generation"),
        options=generator_flags,
        version=CONFIG.stages["train_generation"].version,
    shell:
        "{params.launcher} train_generation --index {input.index:q}"
        " --checkpoints results/train_generation/checkpoints/{wildcards.generator} --generator {output.generator:q}"
        " --metadata {output.metadata:q} --history {output.history:q} {params.options}"
        # A cluster signals all processes of a job: the log must take the last message of the training.
        " 2>&1 | (trap '' TERM; exec tee {log:q})"
