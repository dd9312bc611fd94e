# The generators of several presets on the same test tiles, beside trivial baselines and the papers'
# figures: one table, and a page. Made by `snakemake compare` alone.
#
# REQUIRED INPUTS: index, and the shards it points to; the generators with their metadata
# OUTPUTS: the table as Parquet and as text, the page


rule compare:
    input:
        of_units(layout.TILE_SHARD),
        index=layout.INDEX,
        report=ancient(layout.REPORT),
        generators=of_presets("results/compare/{preset}/generator.safetensors"),
        generator_metadata=of_presets("results/compare/{preset}/metadata.json"),
        benchmarks=of_presets("logs/compare/{preset}.training.tsv"),
    output:
        table="results/compare/compare.parquet",
        tsv="results/compare/compare.tsv",
        page="results/compare/compare.html",
    log:
        "logs/compare/compare.log",
    benchmark:
        "logs/compare/compare.tsv"
    conda:
        "../../envs/hemera.yaml"
    threads: CONFIG.stages["compare"].torch_threads
    resources:
        mem_mb=megabytes(8000),
        runtime=240,
        gpu=gpus("compare"),
    params:
        preset=CONFIG.cohort.preset,
        options=CONFIG.flags("compare"),
        version=CONFIG.stages["compare"].version,
    shell:
        "hemera compare --index {input.index:q} --generators {input.generators:q}"
        " --generator-metadata {input.generator_metadata:q} --benchmarks {input.benchmarks:q}"
        " --report {input.report:q} --preset {params.preset:q} --table {output.table:q}"
        " --tsv {output.tsv:q} --page {output.page:q} {params.options} > {log:q} 2>&1"
