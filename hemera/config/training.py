"""Options of both trainings."""

import os
from pathlib import Path
from typing import Annotated, ClassVar, Literal, Self, get_args

from pydantic import Field, model_validator

from hemera.config.base import (
    Count,
    Device,
    Fraction,
    NonNegative,
    Options,
    Positive,
    Seed,
    Threads,
    paper,
)

Select = Literal["last", "best"]
Network = Literal[
    "unet_512",
    "unet_256",
    "unet_128",
    "unet_32",
    "resnet_9blocks",
    "resnet_6blocks",
    "attention_unet_32",
]
GENERATORS: dict[str, int] = dict(
    zip(get_args(Network), (512, 256, 128, 32, 4, 4, 32), strict=True)
)
"""The divisor of the side of each generator's input."""

CONTRASTIVE = ("resnet_9blocks", "resnet_6blocks")
"""The generators whose features contrastive losses compare."""
LPIPS_CROP_PX = 128
"""Smallest crop of which LPIPS can be computed at a quarter of its side."""

BRANCHES: dict[str, tuple[str, ...]] = {
    "skip16": ("unet_512", "unet_256", "unet_128"),
    "attention_unet_32_bottleneck": ("attention_unet_32",),
    "virtual_rgb_encoder": tuple(GENERATORS),
    "virtual_rgb_input": tuple(GENERATORS),
    "decoder_maps": tuple(GENERATORS),
}
"""The generators on which each branch of SegmentationNet works."""


class TrainingOptions(Options):
    """Options of both trainings; the first four have their defaults in each."""

    epochs: Count
    batch_size: Count
    learning_rate: Positive
    select: Select
    crop_px: Annotated[int | None, Field(ge=32, le=2048), paper("512, whole")] = None
    """Side of the random crop of a tile that is trained on, px; null: the full tile."""
    normalise_background: Annotated[bool, paper("not stated")] = True
    """Divide the images of both stains by their backgrounds, as measured, which become white.
    Slides differ in the gray of the background, and otherwise networks learn it."""
    seed: Seed = 20251
    """Seed of initial weights, order of tiles and augmentation."""
    device: Device = "auto"
    """Device of the training; auto: a GPU if there is one."""
    torch_threads: Threads = 2
    """CPU threads of PyTorch; another number changes the output bytes."""
    deterministic: bool = True
    """Use deterministic algorithms, so that a repetition on the same machine gives the same bytes;
    slower on a GPU."""
    precision: Annotated[Literal["float32", "tf32", "bf16", "fp16"], paper("not stated")] = "tf32"
    """Numeric precision of the networks: float32; tf32: float32 with TF32 convolutions on a GPU,
    the default of PyTorch; bf16 or fp16: mixed precision with half the memory; losses and weights
    stay float32."""
    compile: bool = False
    """Compile the networks and the losses with torch.compile: minutes at the start, faster
    steps."""
    cuda_graph: bool = False
    """Repeat the whole training step as one CUDA graph, for networks so small that their kernels
    take longer to start than to run; without effect on a processor. Not with several GPUs, fp16 or
    contrastive losses."""
    gpus: Annotated[int, Field(ge=1, le=64)] = 1
    """Number of GPUs (with device cpu: processes) among which each batch is divided. Batch
    normalisation, Dice and variance are computed per GPU. Above 1, an incomplete last batch is
    dropped."""
    accumulate: Annotated[int, Field(ge=1, le=1024)] = 1
    """Number of parts into which each batch is divided to save memory; their gradients are
    accumulated. Batch normalisation, Dice and variance are computed per part, and the generator is
    trained before the discriminator is updated. Above 1, an incomplete last batch is dropped."""
    ema: Annotated[float, Field(ge=0, lt=1), paper("not used")] = 0.0
    """Decay per step of an exponential moving average of the weights, which is then what is
    validated and written; lower in the first steps: (1 + n) / (10 + n) after n; 0: not used."""
    clip_norm: Annotated[NonNegative, paper("not used")] = 0.0
    """Longest gradient of each network that is trained, to which longer ones are scaled; 0: any."""
    workers: Annotated[int, Field(ge=0, le=64)] = 2
    """Processes per GPU that read and decode tiles."""
    checkpoint_minutes: Positive = 10.0
    """Longest time between two checkpoints, minutes."""

    @property
    def whole_batches(self) -> str:
        """The option that needs several tiles, so that an incomplete last batch is dropped."""
        return ""

    @model_validator(mode="after")
    def _batch_can_be_divided(self) -> Self:
        parts = self.gpus * self.accumulate
        if self.batch_size % parts:
            raise ValueError(
                f"batch_size: {self.batch_size} is not a multiple of gpus {self.gpus} times "
                f"accumulate {self.accumulate}; give a multiple of {parts}"
            )
        if self.cuda_graph and (self.gpus > 1 or self.precision == "fp16"):
            found = f"gpus: {self.gpus}" if self.gpus > 1 else "precision: fp16"
            raise ValueError(
                f"cuda_graph: true, and {found}, with which a step is not repeatable; give gpus: 1 "
                "and another precision, or set cuda_graph: false"
            )
        if self.whole_batches and self.batch_size == parts:
            raise ValueError(
                f"batch_size: {self.batch_size} leaves one tile per GPU and accumulation step, and "
                f"{self.whole_batches} needs two; give a larger batch_size"
            )
        return self


class TrainGenerationOptions(TrainingOptions):
    """GenerationNet (sections 3.1 and 4.1 of the HEMERA paper)."""

    section: ClassVar[str] = "train_generation"
    version: ClassVar[int] = 4

    network: Annotated[Network, paper("U-Net, depth not stated")] = "unet_512"
    """Architecture of the generator."""
    base_width: Annotated[int, Field(ge=4, le=256), paper("32")] = 32
    """Filters of the first layer of the generator."""
    norm: Annotated[Literal["batch", "instance"], paper("batch")] = "batch"
    """Normalisation layers of generator and discriminator."""
    dropout: Annotated[bool, paper("none")] = False
    """Dropout with rate 0.5 in the generator during training."""
    discriminator_width: Annotated[int, Field(ge=4, le=256)] = 64
    """Filters of the first layer of the PatchGAN discriminator."""
    discriminator_layers: Annotated[int, Field(ge=1, le=5), paper("not stated; 3 in pix2pix")] = 3
    """Convolutions of the discriminator that halve the side."""
    discriminator_input: Annotated[Literal["pair", "her2"], paper("pair")] = "pair"
    """Input of the discriminator: pair: HER2 beside H&E; her2: HER2 alone, so that pairs which
    do not match cost nothing."""
    spectral_norm: bool = False
    """Spectral normalisation of the convolutions of the discriminator."""
    epochs: Annotated[Count, paper("100")] = 100
    """Training epochs of GenerationNet."""
    decay_from_epoch: Annotated[int, Field(ge=0), paper("50")] = 50
    """Epoch after which the learning rate decays linearly to 0."""
    lr_step: Literal["end", "start"] = "end"
    """Whether the learning rate decays at the end or at the start of an epoch; start: the last
    epoch has rate 0, as in the public code of pix2pix."""
    batch_size: Annotated[Count, paper("2")] = 2
    """Tiles per optimiser step of GenerationNet."""
    learning_rate: Annotated[Positive, paper("2e-4")] = 2e-4
    """Learning rate of Adam for generator and discriminator."""
    l1_weights: Annotated[tuple[NonNegative, ...], paper("1, 25, 25, 25")] = (1.0, 25.0, 25.0, 25.0)
    """Weights of the L1 loss at the levels of the image pyramid, one to six, finest first."""
    weight_map: Annotated[
        Literal["inside", "literal", "positive", "none"],
        paper("printed as literal, described as inside"),
    ] = "inside"
    """Weights of the L1 and Dice losses (equation 1): inside: grow towards the centre of nuclei, as
    the text describes; literal: the printed equation; positive: HER2-positive pixels have twice the
    weight of others; none: not used."""
    mask_source: Annotated[Literal["nuclei", "her2_positive"], paper("nuclei")] = "nuclei"
    """Mask from which the distance weights of inside and literal are computed."""
    shift_px: Annotated[int, Field(ge=0, le=16), paper("not used")] = 0
    """Longest shift of HER2 along each axis, px, in blocks of 128 px, to where it is most like the
    generated image, before losses compare them: for pairs that are a few pixels off; 0: none."""
    gan_loss: Annotated[Literal["vanilla", "lsgan", "hinge"], paper("not stated")] = "vanilla"
    """Adversarial loss: vanilla: cross-entropy; lsgan: least squares; hinge."""
    weight_adversarial: bool = False
    """Apply the distance weights to the adversarial loss as well."""
    renormalise_mean: bool = False
    """Divide the distance weights by their mean."""
    dice_source: Annotated[
        Literal["dab", "intensity", "none"], paper("balanced Dice, undefined")
    ] = "dab"
    """What the balanced Dice loss compares: dab: soft DAB masks; intensity: image intensities;
    none: no such loss."""
    dice_weight: NonNegative = 1.0
    """Weight of the balanced Dice loss of GenerationNet."""
    dice_slope: Positive = 60.0
    """Slope of the sigmoid of the soft DAB mask, per unit of optical density. With 20, an image of
    one colour has a low loss, and GenerationNet generates gray instead of brown."""
    dice_threshold: Annotated[float, Field(gt=0, le=3)] = 0.15
    """DAB optical density above the background at the centre of the soft DAB mask, by fixed colour
    deconvolution; about that of moderate staining."""
    variance_weight: Annotated[NonNegative, paper("not used; its own paper does not state it")] = (
        0.0
    )
    """Weight of the variance loss of Rehmat et al., which compares the variance of each pixel over
    a batch with that of the real images; 0: not used."""
    variance_estimator: Literal["unbiased", "biased"] = "unbiased"
    """Divisor of the variance loss: unbiased: n - 1; biased: n."""
    coarse_l1_weight: NonNegative = 0.0
    """Weight of the L1 loss of means of blocks of 8 px, for pairs that do not match exactly."""
    dab_percentile_weight: NonNegative = 0.0
    """Weight of the loss of the strongest staining: mean DAB density from the 90th percentile of
    an image on, wherever it is."""
    stain_color_weight: NonNegative = 0.0
    """Weight of the loss of the colour of the strongest staining: mean optical density of red,
    green and blue of the tenth of an image with the highest DAB density, wherever it is."""
    lpips_quarter_weight: NonNegative = 0.0
    """Weight of LPIPS at a quarter of the resolution; without lpips_weights it is left out."""
    lpips_half_weight: NonNegative = 0.0
    """Weight of LPIPS at half the resolution; without lpips_weights it is left out."""
    lpips_weights: str | None = None
    """File of torchvision's ImageNet weights of AlexNet for LPIPS; never downloaded."""
    feature_matching_weight: NonNegative = 0.0
    """Weight of the difference of the discriminator's maps of generated and of real HER2."""
    r1_weight: NonNegative = 0.0
    """Weight of the R1 penalty, the mean squared gradient of the discriminator at real images, on
    every 16th step."""
    nce_weight: NonNegative = 0.0
    """Weight of the contrastive loss between places of H&E and generated HER2 (PatchNCE), in the
    features of the generator's encoder; with a residual network and instance norm."""
    supervised_nce_weight: NonNegative = 0.0
    """Weight of the contrastive loss between places of real and generated HER2 (ASP)."""
    adaptive_nce: bool = True
    """Give places whose real and generated features differ less weight in the loss of
    supervised_nce_weight, increasingly so after decay_from_epoch."""
    flip: bool = True
    """Augment by random horizontal flips of tile pairs."""
    select: Annotated[Select, paper("not stated; pix2pix keeps the last")] = "last"
    """Epoch whose generator is kept; best: highest sum of SSIM and the concordance of brown on
    validation tiles."""

    @property
    def divisor(self) -> int:
        """What the side of an input must be a multiple of."""
        return GENERATORS[self.network]

    @property
    def whole_batches(self) -> str:
        """A variance needs more than one tile."""
        return "variance_weight" if self.variance_weight else ""

    @property
    def contrastive(self) -> bool:
        """Whether features of the generator's encoder are compared."""
        return self.nce_weight > 0 or self.supervised_nce_weight > 0

    @property
    def perceptual(self) -> bool:
        """Whether LPIPS is a loss."""
        return self.lpips_half_weight > 0 or self.lpips_quarter_weight > 0

    def requirements(self) -> list[str]:
        """Return the weights of LPIPS if they are named and missing."""
        path = self.lpips_weights
        if path is None or not self.perceptual or Path(path).is_file():
            return []
        return [
            f"train_generation.lpips_weights: {path} does not exist; give a file of torchvision's "
            "ImageNet weights of AlexNet, or null to train without LPIPS"
        ]

    @model_validator(mode="after")
    def _losses_fit_the_networks(self) -> Self:
        if self.contrastive and (self.network not in CONTRASTIVE or self.norm != "instance"):
            name = "nce_weight" if self.nce_weight > 0 else "supervised_nce_weight"
            raise ValueError(
                f"{name}: contrastive losses need norm: instance and one of the networks "
                f"{', '.join(CONTRASTIVE)}, not {self.norm} and {self.network}; change these, or "
                f"set {name}: 0"
            )
        if self.contrastive and self.cuda_graph:
            raise ValueError(
                "cuda_graph: true, and contrastive losses, which draw their places on the "
                "processor; set cuda_graph: false, or nce_weight: 0 and supervised_nce_weight: 0"
            )
        if self.crop_px is None:
            return self
        if self.crop_px >> self.discriminator_layers < 3:
            raise ValueError(
                f"discriminator_layers: {self.discriminator_layers} leave no patch of a crop of "
                f"{self.crop_px} px; give fewer, or crop_px of at least "
                f"{3 << self.discriminator_layers}"
            )
        if self.perceptual and self.crop_px < LPIPS_CROP_PX:
            raise ValueError(
                f"crop_px: {self.crop_px} is too small for LPIPS at a quarter of it; give at least "
                f"{LPIPS_CROP_PX}, or set lpips_half_weight: 0 and lpips_quarter_weight: 0"
            )
        return self

    @model_validator(mode="after")
    def _schedule_and_weights_fit(self) -> Self:
        if not 1 <= len(self.l1_weights) <= 6:
            raise ValueError(
                f"l1_weights: {len(self.l1_weights)} weights; give one to six, finest level first"
            )
        if self.decay_from_epoch > self.epochs:
            raise ValueError(
                f"decay_from_epoch: {self.decay_from_epoch} is after the last epoch {self.epochs}; "
                f"give at most {self.epochs}"
            )
        return self


class TrainSegmentationOptions(TrainingOptions):
    """SegmentationNet (sections 3.2 and 4.1 of the HEMERA paper)."""

    section: ClassVar[str] = "train_segmentation"
    version: ClassVar[int] = 5

    generation_branch: Annotated[
        Literal[
            "skip16",
            "attention_unet_32_bottleneck",
            "virtual_rgb_encoder",
            "virtual_rgb_input",
            "decoder_maps",
            "none",
        ],
        paper("512 x 16 x 16, which layer not stated"),
    ] = "skip16"
    """Features of the frozen GenerationNet that SegmentationNet uses: skip16: the encoder map of 16
    x 16; attention_unet_32_bottleneck: the bottleneck of that network; virtual_rgb_encoder: an
    encoder of the generated image; virtual_rgb_input: the generated image beside H&E, as input of
    six channels; decoder_maps: the decoder maps at 1/2, 1/4 and 1/8 of the side; none. The first
    three are fused at 1/32 of the side, where the network can do without them."""
    generation_skips: bool = False
    """Also concatenate the encoder maps of GenerationNet in the decoder (skip16 only)."""
    base_width: Annotated[int, Field(ge=4, le=256), paper("ResNet34")] = 64
    """Filters of the first stage of the encoder, after a stem of 64; the decoder follows; 64:
    ResNet34."""
    decoder: Annotated[Literal["unet", "unetplusplus", "deeplabv3plus"], paper("unet")] = "unet"
    """Architecture of the decoder."""
    encoder: Annotated[str, paper("ResNet34")] = "resnet34"
    """Encoder of H&E: resnet34; or timm:NAME, a network of the library timm, such as a foundation
    model of pathology, whose weights are a local file (encoder_weights)."""
    encoder_weights: Annotated[str | None, paper("ImageNet")] = "imagenet"
    """Initial weights of the encoder: imagenet: those of ResNet34 of torchvision in the cache of
    torch.hub; else a file of weights of the encoder, and for timm:NAME config.json beside it, if
    there is one; null: random."""
    encoder_frozen: bool = False
    """Do not train the encoder timm:NAME, only what follows it."""
    epochs: Annotated[Count, paper("300")] = 300
    """Training epochs of SegmentationNet."""
    batch_size: Annotated[Count, paper("16")] = 16
    """Tiles per optimiser step of SegmentationNet."""
    learning_rate: Annotated[Positive, paper("2e-4")] = 2e-4
    """Learning rate of AdamW."""
    weight_decay: Annotated[NonNegative, paper("not stated")] = 0.01
    """Weight decay of AdamW."""
    loss_lambda: Annotated[Fraction, paper("not stated; section 4.1: cross-entropy alone")] = 0.5
    """Weight of cross-entropy; Dice has 1 - loss_lambda."""
    flip: bool = True
    """Augment by random horizontal and vertical flips."""
    select: Annotated[Select, paper("not stated")] = "best"
    """Epoch whose weights are kept; best: highest pooled F1 on validation tiles, threshold 0.5."""

    @property
    def whole_batches(self) -> str:
        """Globally pooled features are normalised over the batch."""
        return "decoder deeplabv3plus" if self.decoder == "deeplabv3plus" else ""

    @model_validator(mode="after")
    def _skips_and_weights_fit(self) -> Self:
        if self.generation_skips and self.generation_branch != "skip16":
            raise ValueError(
                f"generation_skips: true with generation_branch {self.generation_branch}; set "
                "generation_branch: skip16 or generation_skips: false"
            )
        if self.encoder != "resnet34":
            self._check_timm()
        elif self.encoder_frozen:
            raise ValueError(
                "encoder_frozen: true with encoder resnet34; set encoder_frozen: false, or give an "
                "encoder timm:NAME"
            )
        elif self.encoder_weights is not None and self.base_width != 64:
            raise ValueError(
                f"encoder_weights: weights of ResNet34 have base_width 64, not {self.base_width}; "
                "set base_width: 64 or encoder_weights: null"
            )
        return self

    def _check_timm(self) -> None:
        if not self.encoder.removeprefix("timm:") or not self.encoder.startswith("timm:"):
            raise ValueError(
                f"encoder: {self.encoder!r} is neither resnet34 nor timm:NAME; give one of these, "
                "such as timm:vit_giant_patch14_reg4_dinov2"
            )
        if self.encoder_weights == "imagenet":
            raise ValueError(
                f"encoder_weights: imagenet are weights of ResNet34, and encoder is {self.encoder};"
                " give the file of its weights, or null for random ones"
            )
        if self.encoder_frozen and self.encoder_weights is None:
            raise ValueError(
                "encoder_frozen: true with encoder_weights null, so that the encoder stays random; "
                "give the file of its weights, or set encoder_frozen: false"
            )
        if self.generation_branch == "virtual_rgb_input":
            raise ValueError(
                f"generation_branch: virtual_rgb_input has six channels, and {self.encoder} takes "
                "three; give another generation_branch, or encoder: resnet34"
            )

    def requirements(self) -> list[str]:
        """Return the initial weights of the encoder if they are missing."""
        if self.encoder_weights is None or self.encoder_file.is_file():
            return []
        if self.encoder != "resnet34":
            return [
                f"train_segmentation.encoder_weights: {self.encoder_file} does not exist; give the "
                f"file of the weights of {self.encoder}"
            ]
        return [
            f"train_segmentation.encoder_weights: {self.encoder_file} does not exist; download it "
            'with `python -c "from torchvision.models import resnet34; '
            "resnet34(weights='IMAGENET1K_V1')\"`, give a file of these weights, or set null for "
            "random weights"
        ]

    @property
    def encoder_file(self) -> Path:
        """File of the encoder's weights; imagenet: that in the cache of torch.hub."""
        if self.encoder_weights not in (None, "imagenet"):
            return Path(str(self.encoder_weights))
        cache = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache"), "torch")
        folder = Path(os.environ.get("TORCH_HOME", cache)).expanduser()
        return folder / "hub" / "checkpoints" / "resnet34-b627a593.pth"
