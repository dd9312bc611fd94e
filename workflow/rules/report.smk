# The page about the data, made before any training, also when nothing was accepted.
#
# REQUIRED INPUTS: everything up to the index
# OUTPUTS: one self-contained HTML page; beside it a page for each registered pair that it has no
# room for


rule report:
    input:
        of_units("results/describe/{unit}.parquet"),
        of_units("results/register/{unit}.parquet", needs_registration),
        of_units("results/register/{unit}.displacement.npz", needs_registration),
        of_units("results/register/{unit}.quality.parquet", needs_registration),
        of_units("results/tile/{unit}.pairs.parquet"),
        of_units("results/tile/{unit}.tar"),
        of_units("results/mask/{unit}.tar"),
        ["results/landmarks/cohort.errors.parquet"] if landmark_tables() else [],
        "results/filter/tiles.parquet",
        funnel="results/filter/funnel.parquet",
        index="results/index/index.parquet",
    output:
        page="results/report/report.html",
        pairs=directory("results/report/pairs"),
    log:
        "logs/report/report.log",
    benchmark:
        "logs/report/report.tsv"
    conda:
        "../../envs/hemera.yaml"
    threads: 1
    resources:
        mem_mb=megabytes(4000),
        # A second per registered pair, of which there may be a thousand on a slow disk.
        runtime=120,
    params:
        sheet=sheet_file,
        block_count=block_count,
        preset=CONFIG.cohort.preset,
        rows=digest(SHEET.pairs, "report"),
        options=CONFIG.flags("report"),
        version=CONFIG.stages["report"].version,
    shell:
        "hemera report --sheet {params.sheet:q} --block-count {params.block_count}"
        " --preset {params.preset:q} --results results --logs logs --page {output.page:q}"
        " --pairs {output.pairs:q} {params.options}"
        " > {log:q} 2>&1"
