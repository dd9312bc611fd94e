"""A small DeepLIIF model of random weights, raw and serialized, made by the package itself."""

import argparse
import contextlib
import io
from pathlib import Path

import pytest
import torch

from hemera.masks.deepliif.engine import import_deepliif

WIDTH = 4
NETWORKS = ["G1", "G2", "G3", "G4", "G51", "G52", "G53", "G54", "G55"]


@pytest.fixture(scope="session")
def raw_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a training directory of DeepLIIF: what its `save_options` and `define_G` make.

    The last layer of a segmentation is shifted to where cells are (little green, some red or
    blue), so that random weights give cells of both signs.
    """
    import_deepliif()
    from deepliif.models import networks
    from deepliif.options import save_options

    folder = tmp_path_factory.mktemp("models") / "raw"
    folder.mkdir()
    values = argparse.Namespace(
        checkpoints_dir=str(folder.parent),
        name=folder.name,
        phase="train",
        model="DeepLIIF",
        modalities_no=4,
        seg_gen=True,
        seg_no=1,
        input_no=1,
        input_nc=3,
        output_nc=3,
        ngf=WIDTH,
        netG="resnet_6blocks",
        net_gs="unet_64",
        norm="batch",
        no_dropout=True,
        init_type="normal",
        init_gain=0.02,
        padding="zero",
        upsample="convtranspose",
        gpu_ids=(),
        epoch="latest",
        load_iter=0,
        verbose=False,
        preprocess="none",
        remote_transfer_cmd=None,
        scale_size=512,
        continue_train=False,
    )
    torch.manual_seed(11)
    with contextlib.redirect_stdout(io.StringIO()):
        save_options(values)
        for name in NETWORKS:
            segments = len(name) == 3
            network = networks.define_G(
                3,
                3,
                WIDTH,
                values.net_gs if segments else values.netG,
                "batch",
                False,
                padding_type="reflect" if segments else "zero",
            )
            last = [m for m in network.modules() if isinstance(m, torch.nn.modules.conv._ConvNd)]
            outer = [m for m in last if m.out_channels == 3][-1]
            with torch.no_grad():
                outer.weight *= 60.0
                outer.bias.copy_(torch.tensor([-0.6, -1.5, -0.6] if segments else [0.0] * 3))
            torch.save(network.state_dict(), folder / f"latest_net_{name}.pth")
    return folder


@pytest.fixture(scope="session")
def model(raw_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the same model as DeepLIIF's own `serialize` writes it."""
    import_deepliif()
    import cli

    folder = tmp_path_factory.mktemp("serialized") / "model"
    original = cli.Options

    def small(*given: object, **named: object) -> object:
        # the package sets 64 whatever was trained
        made = original(*given, **named)
        made.ngf = WIDTH
        return made

    cli.Options = small
    try:
        with contextlib.redirect_stdout(io.StringIO()), torch.no_grad():
            cli.serialize.callback(
                model_dir=str(raw_model),
                output_dir=str(folder),
                device="cpu",
                epoch="latest",
                verbose=0,
            )
    finally:
        cli.Options = original
    return folder
