# Registration of HER2 onto H&E, with a certificate. A failed pair is a verdict, not a failed job.
#
# REQUIRED INPUTS: both slides of a pair, its descriptions; the user's displacement where given
# OUTPUTS: displacement on the H&E grid in um; certificate with verdict and reason;
#   the local quality of the map


rule register:
    input:
        images,
        own_maps,
        images_table=layout.IMAGES_TABLE,
    output:
        displacement=layout.DISPLACEMENT,
        certificate=layout.CERTIFICATE,
        quality=layout.QUALITY,
    log:
        "logs/register/{unit}.log",
    benchmark:
        "logs/register/{unit}.tsv"
    conda:
        "../../envs/hemera.yaml"
    threads: CONFIG.stages["register"].torch_threads
    resources:
        mem_mb=registration_mb,
        # Two hours for each attempt.
        runtime=minutes((1 + CONFIG.stages["register"].retries) * 120 + 30),
        gpu=gpus("register"),
    params:
        sheet=sheet_file,
        rows=rows("register"),
        options=CONFIG.flags("register"),
        version=CONFIG.stages["register"].version,
    shell:
        "hemera register --sheet {params.sheet:q} --unit {wildcards.unit:q}"
        " --images-table {input.images_table:q} --displacement {output.displacement:q}"
        " --certificate {output.certificate:q} --quality {output.quality:q} {params.options} > {log:q} 2>&1"
