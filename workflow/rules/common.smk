# Common to all rules: the validated configuration, the units of the sheet, and the paths of each.

from pathlib import Path

from snakemake_interface_executor_plugins.registry import ExecutorPluginRegistry

from hemera.errors import HemeraError
from hemera.config import (
    CELLS,
    DEMO_SHEETS,
    DEMO_VERSION,
    HER2_CNN,
    NETWORKS,
    OYELADE,
    OYELADE_NETWORKS,
    SEGMENTER,
    STAIN,
    STATISTICS,
    TUMOUR,
    VIRTUAL,
    check_datasets,
    check_sheet_given,
    load,
    read_yaml,
)
from hemera.files import layout
from hemera.files.digests import is_cut_off
from hemera.sheet import digest, missing_files, read_sheet, units

# Only `hemera plan` and `hemera progress` set it: they list missing weights themselves.
ONLY_PLANNED = config.pop("only_planned", False)


def ended(message):
    """The exception that ends the run with a message alone: to that of a WorkflowError, Snakemake adds
    lines of this file, and to others a traceback."""
    return SystemExit(f"\n{message}")


try:
    # Snakemake itself lets the last of two equal keys win.
    for path in workflow.configfiles:
        read_yaml(Path(path))
    CONFIG = load(config)
    check_sheet_given(CONFIG, config)
    SHEET = read_sheet(Path(CONFIG.cohort.sheet))
    check_datasets(CONFIG, CONFIG.cohort.sheet, {pair.dataset for pair in SHEET.pairs})
    UNITS = units(SHEET, CONFIG.cohort.block_count)
except HemeraError as error:
    raise ended(str(error))

ENGINES = list(CONFIG.stages["mask"].engines)


def shown(faults, remedy):
    """A message about several files with their faults, the first twenty by name."""
    lines = [f"{path}: {fault}" for path, fault in list(faults.items())[:20]]
    lines += [f"... and {len(faults) - 20} more"] if len(faults) > 20 else []
    return "\n".join([*lines, remedy])


def check_inputs():
    """End the run with all files of the sheet that are missing; Snakemake itself names those of one
    job. The demo makes its own."""
    if CONFIG.cohort.sheet in DEMO_SHEETS:
        return
    missing = missing_files(SHEET, images=not CONFIG.stages["describe"].allow_missing)
    if missing:
        remedy = (
            f"{len(missing)} files of {CONFIG.cohort.sheet} do not exist or cannot be reached; "
            "correct their paths or permissions, or set describe: {allow_missing: true} to leave out "
            "pairs whose images do not exist"
        )
        raise ended(shown(missing, remedy))


def check_outputs():
    """End the run with all results that were cut off, by a full disk or a copy: Snakemake itself
    sees only whether a file exists."""
    made = dict.fromkeys((*data_files(), *training_files(), *status_files()))
    try:
        cut = [path for path in made if is_cut_off(Path(path))]
    except OSError as error:
        raise ended(f"{error.filename}: {error.strerror}; the results must be readable")
    if cut:
        remedy = f"{len(cut)} results are damaged; delete them, and run again to make them again"
        raise ended(shown(dict.fromkeys(cut, "cut off"), remedy))


def unfinished():
    """What a failed run has not made, by stage, and how to continue."""
    only_status = set(workflow.dag_settings.targets) == {"status"}
    wanted = [status_files()] if only_status else [data_files(), training_files()]
    missing = [[path for path in paths if not Path(path).exists()] for paths in wanted]
    paths = next(filter(None, missing), [])
    by_stage = {}
    for path in paths:
        by_stage.setdefault(path.split("/")[1], []).append(path)
    lines = [
        f"{stage}: {len(own)} files missing, the first {own[0]}; see logs/{stage}/"
        for stage, own in by_stage.items()
    ]
    return "\n".join([*lines, "To continue, run the same command again; what is finished is kept."])


wildcard_constraints:
    # A dot is only before a block's number, so that no unit matches a second suffix.
    unit=r"[A-Za-z0-9_-]+(\.[0-9]+)?",


def requirements(stage):
    """A function for the inputs of a rule: it returns no file, and ends the run where the stage
    needs weights that are missing. Inputs are evaluated before the first job, and only for the rules
    of the requested targets."""

    def check(wildcards):
        missing = [] if ONLY_PLANNED else CONFIG.stages[stage].requirements()
        if missing:
            raise ended("\n".join(missing))
        return []

    return check


def needs_registration(unit):
    """Whether a unit is a whole-slide pair that is not registered."""
    return has_her2(unit) and not any(pair.registered for pair in UNITS[unit])


def has_her2(unit):
    """Whether a unit is of pairs; the others are of H&E alone."""
    return all(pair.her2 for pair in UNITS[unit])


def has_landmarks(unit):
    """Whether a unit is a whole-slide pair with landmarks."""
    return any(pair.has_landmarks for pair in UNITS[unit])


def known(wildcards):
    """The pairs of a unit, or an error when the sheet has no such unit."""
    if wildcards.unit not in UNITS:
        raise ended(
            f"{CONFIG.cohort.sheet}: no unit {wildcards.unit}; units are "
            f"{', '.join(list(UNITS)[:5])}{', ...' if len(UNITS) > 5 else ''}"
        )
    return UNITS[wildcards.unit]


def images(wildcards):
    """The image files of a unit; without those that may be missing."""
    paths = [path for pair in known(wildcards) for path in pair.images]
    may_be_missing = CONFIG.stages["describe"].allow_missing
    return [str(path) for path in paths if not may_be_missing or path.exists()]


def artefact_files(wildcards):
    """The files of a unit with the artefacts of its images, where the sheet names them."""
    return [str(path) for pair in known(wildcards) for path in pair.artefacts if path]


def landmark_files(wildcards):
    """The landmark files of a unit."""
    return [str(path) for pair in known(wildcards) for path in pair.landmarks]


def sheet_file(wildcards, input):
    """The path of the sheet. The argument `input` is not used, but Snakemake does not compare params
    that are derived from input, so another path reruns nothing; `rows` has the digest of what is
    read."""
    return CONFIG.cohort.sheet


def block_count(wildcards, input):
    """The number of blocks, likewise: another number changes rows and names of blocks."""
    return CONFIG.cohort.block_count


def rows(stage):
    """A function that gives a digest of what a stage reads of a unit's rows."""
    return lambda wildcards: digest(known(wildcards), stage)


def rows_of_all(stage):
    """The same for a stage of the cohort; only `cases` reads the rows of H&E alone."""
    read = SHEET if stage == "cases" else SHEET.with_her2
    return lambda wildcards: digest(read.pairs, stage)


def of_units(pattern, which=lambda unit: True):
    """One path per unit."""
    return [pattern.format(unit=unit) for unit in UNITS if which(unit)]


def all_of(pattern, which=lambda unit: True):
    """A function for the inputs of a rule: one path per unit. Lists themselves would be processed in
    every job, which reads all rules: 2 s for 10,000 pairs."""
    return lambda wildcards: of_units(pattern, which)


def landmark_tables():
    """The tables of landmark errors."""
    return of_units(layout.LANDMARK_ERRORS, has_landmarks)


def index_files():
    """Every file of the stages up to the index. All of them are targets, because Snakemake deletes
    the outputs of a failed job, and does not make a missing file again while what follows exists.
    """
    of_unit = (layout.IMAGES_TABLE, layout.TILE_SHARD, layout.TILES, layout.PAIRS)
    of_mask = (layout.MASK_SHARD, layout.MASKS, layout.CELLS)
    of_map = (layout.DISPLACEMENT, layout.CERTIFICATE, layout.QUALITY)
    found = [path for pattern in (*of_unit, *of_mask) for path in of_units(pattern, has_her2)]
    found += [path for pattern in of_map for path in of_units(pattern, needs_registration)]
    return [*found, layout.FILTERED, layout.INDEX, layout.CARD]


def data_files():
    """Every file of the stages up to the report, as `index_files`."""
    found = index_files()
    if landmark_tables():
        of_landmarks = (layout.LANDMARK_ERRORS, layout.LANDMARK_PREDICTIONS)
        found += [path for pattern in of_landmarks for path in of_units(pattern, has_landmarks)]
        found += [layout.LANDMARK_COHORT, layout.LANDMARK_COHORT_PREDICTIONS]
    return [*found, layout.REPORT, layout.PAIR_PAGES, layout.CASES]


def training_files():
    """Every file of both trainings and of the evaluation."""
    of_generator = (layout.GENERATOR, layout.GENERATOR_METADATA, layout.GENERATION_HISTORY)
    found = [path for pattern in of_generator for path in of_generators(pattern)]
    found += [layout.SEGMENTER, layout.SEGMENTER_METADATA, layout.SEGMENTATION_HISTORY]
    return [*found, layout.EVALUATED_TILES, layout.METRICS, layout.EVALUATION]


def status_files():
    """Every file of the stages of the status, and of those before them that it needs."""
    of_unit = (layout.IMAGES_TABLE, layout.TILE_SHARD, layout.TILES, layout.PAIRS)
    found = [path for pattern in of_unit for path in of_units(pattern)]
    found += [layout.STATUS_CASES, layout.STATUS_TILES]
    found += [path for encoder in CONFIG.encoders for path in encoder_features(encoder)]
    of_encoder = (layout.ENCODER, layout.ENCODER_METADATA, layout.ENCODER_HISTORY)
    own = [encoder for encoder in CONFIG.encoders if encoder in NETWORKS]
    found += [path.format(network=encoder) for path in of_encoder for encoder in own]
    of_method = (layout.AGGREGATOR, layout.AGGREGATOR_METADATA, layout.AGGREGATOR_HISTORY)
    of_method += (layout.STATUS_PREDICTIONS, layout.CONTRIBUTIONS)
    found += [path for pattern in of_method for path in of_methods(pattern)]
    made = {method.encoder for method in CONFIG.methods.values()}
    found += index_files() if made & {CELLS, SEGMENTER, VIRTUAL} else []
    if VIRTUAL in made:
        patterns = (layout.VIRTUAL_SHARD, layout.VIRTUAL_MASK_SHARD, *VIRTUAL_FILES)
        found += [path for pattern in patterns for path in of_units(pattern)]
    if made & {SEGMENTER, VIRTUAL}:
        of_generator = (layout.GENERATOR, layout.GENERATOR_METADATA, layout.GENERATION_HISTORY)
        found += [path.format(generator=CONFIG.generators[0]) for path in of_generator]
    if SEGMENTER in made:
        found += [layout.SEGMENTER, layout.SEGMENTER_METADATA, layout.SEGMENTATION_HISTORY]
    own = [name for name in own if network_inputs(name) is MASKED]
    found += [path for pattern in MASKED for path in of_units(pattern, has_her2) if own]
    return [*dict.fromkeys(found), layout.STATUS_METRICS, layout.STATUS_PAGE]


MASKED = (layout.CELLS, layout.MASKS, layout.MASK_SHARD)
"""What train_encoder reads of stage mask."""


def network_inputs(network):
    """What a network of train_encoder is trained with beside tiles and cases: the annotations of the
    sheet, or patterns of stage mask."""
    if network == TUMOUR:
        return [str(pair.annotations) for pair in SHEET.pairs if pair.annotations]
    from_slide = network == STAIN and CONFIG.stages["train_encoder"].labels == "slide"
    return [] if network == HER2_CNN or from_slide else MASKED


def labels_of(wildcards):
    """The files with the labels of a network's training, and the weights that it starts from."""
    options = CONFIG.stages["train_encoder"]
    missing = options.missing(wildcards.network)
    if missing and not ONLY_PLANNED:
        raise ended("\n".join(missing))
    inputs = network_inputs(wildcards.network)
    if inputs is MASKED:
        inputs = [path for pattern in MASKED for path in of_units(pattern, has_her2)]
    path = options.path(wildcards.network)
    return inputs if path is None or path.is_dir() or missing else [*inputs, str(path)]


def network_flags(wildcards):
    """The options of a network's training."""
    return CONFIG.network_flags(wildcards.network)


def annotations_of_all(wildcards):
    """A digest of what tumour reads of the sheet; of the other networks nothing."""
    return digest(SHEET.pairs, "train_encoder") if wildcards.network == TUMOUR else ""


def label_flags(wildcards, input):
    """The flags for labels: the sheet with annotations, or the mask engine."""
    if wildcards.network == TUMOUR:
        return ["--sheet", CONFIG.cohort.sheet]
    engine = ["--engine", CONFIG.stages["index"].target]
    return engine if network_inputs(wildcards.network) is MASKED else []


VIRTUAL_FILES = (layout.VIRTUAL_TILES, layout.VIRTUAL_MASKS, layout.VIRTUAL_CELLS)
"""What method virtual reads of a unit."""


def masked_tiles(wildcards):
    """Table and shard of the tiles of which masks are made: real HER2, or generated."""
    patterns = (layout.TILES, layout.TILE_SHARD)
    if wildcards.prefix:
        patterns = (layout.VIRTUAL_TILES, layout.VIRTUAL_SHARD)
    paths = (pattern.format(unit=wildcards.unit) for pattern in patterns)
    return dict(zip(("tiles", "tile_shard"), paths))


def encoder_features(encoder):
    """The features of all units by an encoder; of those of oyelade, of the units with HER2."""
    which = has_her2 if encoder in OYELADE_NETWORKS else lambda unit: True
    return of_units(layout.FEATURES.replace("{encoder}", encoder), which)


def of_methods(pattern):
    """One path per method that determines the status; floor is the first."""
    return [pattern.format(method=name) for name in CONFIG.methods]


def method(wildcards):
    """The options of a method, or an error when it is not among the routes."""
    if wildcards.method not in CONFIG.methods:
        raise ended(
            f"no method {wildcards.method}; evaluate_status.routes has {', '.join(CONFIG.methods)}"
        )
    return CONFIG.methods[wildcards.method]


def method_flags(wildcards):
    """The options of the training of a method."""
    method(wildcards)
    return CONFIG.method_flags(wildcards.method)


def engine_flags(wildcards):
    """The flag for the mask engine whose cells method virtual reads."""
    virtual = method(wildcards).encoder == VIRTUAL
    return f"--engine {CONFIG.stages['index'].target}" if virtual else ""


def method_features(wildcards):
    """What a method combines: features; of cells, the index and the tables of cells; of oyelade, also
    the tables of tiles."""
    options = method(wildcards)
    if options.encoder == CELLS:
        return [layout.INDEX, *of_units(layout.CELLS, has_her2)]
    if options.encoder == VIRTUAL:
        return [path for pattern in VIRTUAL_FILES for path in of_units(pattern)]
    found = [path for name in options.encoders for path in encoder_features(name)]
    return [*found, *of_units(layout.TILES)] if options.encoder == OYELADE else found


def encoder_requirements(wildcards):
    """No file; ends the run where the weights of an encoder are missing, as `requirements`."""
    missing = [] if ONLY_PLANNED else CONFIG.stages["embed"].missing(wildcards.encoder)
    if missing:
        raise ended("\n".join(missing))
    return []


def trained_encoder(wildcards):
    """The weights of an encoder that train_encoder makes, or of SegmentationNet with the index, which
    has the cases that it was trained on; none of the others."""
    if wildcards.encoder == SEGMENTER:
        return {
            "encoder_weights": layout.SEGMENTER,
            "encoder_metadata": layout.SEGMENTER_METADATA,
            "index": layout.INDEX,
        }
    if wildcards.encoder not in NETWORKS:
        return {}
    patterns = {"encoder_weights": layout.ENCODER, "encoder_metadata": layout.ENCODER_METADATA}
    return {name: path.format(network=wildcards.encoder) for name, path in patterns.items()}


def trained_encoder_flags(wildcards):
    """The flags for them."""
    return [
        word
        for name, path in trained_encoder(wildcards).items()
        for word in (f"--{name.replace('_', '-')}", path)
    ]


def encoder_gpus(wildcards):
    """GPUs of a job of embed: none for the encoder without a network."""
    return 0 if wildcards.encoder == STATISTICS else gpus("embed")


def megabytes(base, factor=1.0):
    """Memory that grows with each attempt, for `retries` or `--retries`."""
    return lambda wildcards, attempt: int(base * (1 + factor * (attempt - 1)))


def minutes(base):
    """Run time that grows with each attempt."""
    return lambda wildcards, attempt: base * attempt


def registration_mb(wildcards, input, attempt):
    """Memory of a registration, from the sizes that describe found; grows with each attempt."""
    # Here, because it takes half a second, and jobs on a cluster read this file each.
    import pyarrow.parquet as pq

    columns = ["width_px", "height_px", "mpp"]
    # A FileNotFoundError, as long as describe has not run, makes Snakemake evaluate it again later;
    # it must name the file, which pyarrow's own does not.
    Path(input.images_table).stat()
    # read_table imports pandas, 1.5 s. Given an open file, its threads aborted one process in five
    # at its exit (apache/arrow#34314); those that buffer ahead are not needed.
    with pq.ParquetFile(input.images_table, pre_buffer=False) as file:
        rows = file.read(columns, use_threads=False).to_pylist()
    known_sizes = [row for row in rows if all(row[name] for name in columns)]
    sizes_um = [
        (row["width_px"] * row["mpp"], row["height_px"] * row["mpp"]) for row in known_sizes
    ]
    mpps = [row["mpp"] for row in known_sizes]
    # Slides that cannot be read are refused without an engine.
    base = CONFIG.stages["register"].memory_mb(sizes_um, mpps) if mpps else 1000
    return megabytes(base)(wildcards, attempt)


def gpus(stage):
    """GPUs that a stage requests from a cluster: none when its device is the processor."""
    options = CONFIG.stages[stage]
    return 0 if options.device == "cpu" else getattr(options, "gpus", 1)


def training_threads(stage):
    """Threads of a training: each of its processes computes, and has others that read tiles."""
    options = CONFIG.stages[stage]
    return (options.torch_threads + options.workers) * options.gpus


def training_mb(stage, base):
    """Memory of a training: more for each process beside the first, and for each that reads."""
    options = CONFIG.stages[stage]
    return megabytes(base * (1 + options.gpus) // 2 + 1000 * options.workers * options.gpus)


def launcher(stage):
    """The command before the stage's name: torchrun's with several processes."""
    count = CONFIG.stages[stage].gpus
    if count == 1:
        return "hemera"
    return f"torchrun --standalone --nproc-per-node {count} --no-python hemera"


def map_files(wildcards):
    """The registration of a unit; empty where it comes registered."""
    known(wildcards)
    if needs_registration(wildcards.unit):
        return {"displacement": layout.DISPLACEMENT.format(unit=wildcards.unit)}
    return {}


def own_maps(wildcards):
    """Displacements that users provide: they are assessed like the engine's."""
    return [str(pair.displacement) for pair in known(wildcards) if pair.displacement]


def tile_extras(wildcards):
    """Inputs that only some units have: a map with certificate and quality, a region of interest."""
    found = map_files(wildcards)
    if needs_registration(wildcards.unit):
        found["certificate"] = layout.CERTIFICATE.format(unit=wildcards.unit)
        found["registration_quality"] = layout.QUALITY.format(unit=wildcards.unit)
    rois = [str(pair.roi) for pair in known(wildcards) if pair.roi]
    return {**found, "rois": rois} if rois else found


def map_flags(wildcards, input):
    """The flags for inputs that only some units have."""
    return [
        word
        for name in ("displacement", "certificate", "registration_quality")
        if name in input.keys()
        for word in (f"--{name.replace('_', '-')}", str(input[name]))
    ]


def local_flags(wildcards, resources):
    """The flag for a folder on the node, of the resource `local_folder` of a profile. The shell of the
    job replaces variables in it. What depends on resources reruns nothing."""
    folder = resources.get("local_folder")
    return f'--local-folder "{folder}"' if folder else ""


def demo_folder(wildcards):
    """The folder of the demo cohort: that of its sheet."""
    return str(SHEET.path.parent)


def of_generators(pattern):
    """One path per generator that is evaluated; the configured one is the first."""
    return [pattern.format(generator=name) for name in CONFIG.generators]


def generator_flags(wildcards):
    """The options of a generator's training."""
    try:
        return CONFIG.generator_flags(wildcards.generator)
    except HemeraError as error:
        raise ended(str(error))


def check_storage():
    """End a run with a storage plugin as default."""
    if workflow.storage_settings.default_storage_provider:
        raise ended(
            "default-storage-provider: stages find images through the sheet, and a storage plugin "
            "puts its copies elsewhere; mount the images on all nodes, see docs/how-to/cluster.md"
        )


def adjust_executors():
    """Correct what the plugins for clusters assume, where they are installed."""
    plugins = ExecutorPluginRegistry().plugins
    if "slurm" in plugins:
        from hemera.graph.slurm import Executor

        plugins["slurm"].executor = Executor
    if "kubernetes" in plugins:
        from hemera.graph.kubernetes import share_volumes

        share_volumes(plugins["kubernetes"])


if workflow.is_main_process:
    # Jobs read this file too, and their number is that of the pairs.
    check_storage()
    check_inputs()
    check_outputs()
    adjust_executors()
