# Features of the H&E tiles of a unit by an encoder.
#
# REQUIRED INPUTS: tiles of the unit; the weights that embed.weights names, or of train_encoder
# OUTPUTS: features in HDF5, in TRIDENT's layout


rule embed:
    input:
        unpack(trained_encoder),
        tiles=layout.TILES,
        tile_shard=layout.TILE_SHARD,
        images_table=layout.IMAGES_TABLE,
        requirements=encoder_requirements,
    output:
        features=layout.FEATURES,
    log:
        "logs/embed/{encoder}/{unit}.log",
    benchmark:
        "logs/embed/{encoder}/{unit}.tsv"
    wildcard_constraints:
        encoder="[a-z0-9_]+",
    conda:
        "../../envs/hemera.yaml"
    threads: CONFIG.stages["embed"].torch_threads
    resources:
        mem_mb=megabytes(8000),
        runtime=minutes(60),
        gpu=encoder_gpus,
    params:
        trained=trained_encoder_flags,
        options=CONFIG.flags("embed"),
        version=CONFIG.stages["embed"].version,
    shell:
        "hemera embed --tiles {input.tiles:q} --tile-shard {input.tile_shard:q}"
        " --images-table {input.images_table:q} --encoder {wildcards.encoder}"
        " {params.trained:q} --features {output.features:q} {params.options} > {log:q} 2>&1"
