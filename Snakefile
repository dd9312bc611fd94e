# From pairs of H&E and HER2 images to two trained networks.
#
#   snakemake --cores all          on this machine
#   snakemake --profile slurm      on a cluster
#
# Each rule calls one stage of the command line, `hemera STAGE`. config.yaml says what is done.

from snakemake.utils import min_version

min_version("9.27")


configfile: "config.yaml"


include: "workflow/rules/common.smk"
include: "workflow/rules/demo.smk"


for stage in CONFIG.stages:

    include: f"workflow/rules/{stage}.smk"


localrules:
    all,
    data,
    status,


onerror:
    print(unfinished())


# The default: the report about the data and the evaluation of both networks.
rule all:
    default_target: True
    input:
        lambda wildcards: [*data_files(), *training_files()],


# The training set alone: registration, tiles, masks, filters, index, report.
rule data:
    input:
        lambda wildcards: data_files(),


# The HER2 status and score of each case from H&E, by all methods of evaluate_status.routes.
rule status:
    input:
        lambda wildcards: status_files(),
