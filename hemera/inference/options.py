"""Options of a prediction: flags of the command and argument of the library."""

import dataclasses
from typing import Annotated, Literal

from cyclopts import Parameter
from cyclopts.validators import Number

from hemera.sheet import MPP_BOUNDS

_Mpp = Annotated[float, Parameter(validator=Number(gte=MPP_BOUNDS[0], lte=MPP_BOUNDS[1]))]
_Count = Annotated[int, Parameter(validator=Number(gte=1, lte=256))]


@Parameter(name="*")
@dataclasses.dataclass(frozen=True, kw_only=True)
class PredictOptions:
    """How a slide is read, predicted and written.

    Args:
        mpp: resolution of the slide, um per pixel, where its file does not state it.
        any_stain: predict also on a slide whose colours are not those of H&E.
        upsample: enlarge a slide that is coarser than the model's tiles instead of refusing it.
        threshold: probability from which a pixel is positive.
        min_area_um2: smaller regions are left out of the GeoJSON, not of mask and areas; the
            default is half a nucleus.
        probability: also write NAME.probability.tif, the probability from 0 to 255.
        device: where the network runs; auto is the GPU where there is one.
        precision: of the numbers in the network; on a processor, float32.
        batch_size: tiles that the network takes at once.
        workers: threads that read.
    """

    mpp: _Mpp | None = None
    any_stain: bool = False
    upsample: bool = False
    threshold: Annotated[float, Parameter(validator=Number(gt=0, lt=1))] = 0.5
    min_area_um2: Annotated[float, Parameter(validator=Number(gte=0))] = 25.0
    probability: bool = False
    device: Literal["auto", "cpu", "cuda"] = "auto"
    precision: Literal["float32", "tf32", "bf16", "fp16"] = "float32"
    batch_size: _Count = 8
    workers: _Count = 2


DEFAULTS = PredictOptions()
