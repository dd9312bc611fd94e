# The one index of all tiles: splits, subsets of both networks, leakage audit, fingerprint.
#
# REQUIRED INPUTS: filter's table
# OUTPUTS: index, dataset card


rule index:
    input:
        tiles=layout.FILTERED,
    output:
        index=layout.INDEX,
        card=layout.CARD,
    log:
        "logs/index/index.log",
    benchmark:
        "logs/index/index.tsv"
    conda:
        "../../envs/hemera.yaml"
    threads: 1
    resources:
        mem_mb=megabytes(4000),
        runtime=minutes(30),
    params:
        sheet=sheet_file,
        rows=rows_of_all("index"),
        engines=ENGINES,
        options=CONFIG.flags("index"),
        version=CONFIG.stages["index"].version,
    shell:
        "hemera index --sheet {params.sheet:q} --tiles {input.tiles:q} --engines {params.engines:q}"
        " --index {output.index:q} --card {output.card:q} {params.options} > {log:q} 2>&1"
