"""The table of networks: a name, the function that builds the network, its title, and the settings that it reads.

To add a network, write one file in this folder with a function

    build(image_shape, num_classes, *, SETTING, ...) -> nn.Module        image_shape: (H, W, C) of the network's input

that raises a ValueError for images that are too small, and add one row here. The command line, the config, reports and tags
read the row. The function is also called under `torch.device("meta")`, to count a network's cost without allocating it.

The rows are text, so that the config can validate `model.network` without importing torch. For the same reason this file
imports only the standard library, and `tests/test_layering.py` allows any file to import it.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Network:
    """One row of the table.

    Attributes:
        build: `module:function`, imported when the network is built.
        title: its name in reports, with settings of `model` in braces.
        reads: the keyword arguments of `build`: settings of `model`, and settings that change only how the network is
            computed (`convolution`, `recompute`).
        shares_steps: whether its time steps share all their weights, so that one training can serve any number of them
            (`train.any_t`).
    """

    build: str
    title: str
    reads: tuple[str, ...] = ()
    shares_steps: bool = False

    @property
    def module(self) -> str:
        """The module that defines this network."""
        return self.build.partition(":")[0]


_LRN = ("lrn_alpha", "lrn_beta", "convolution")
_RECURRENT = ("k", "t", "dropout", *_LRN, "recompute")
NETWORKS: dict[str, Network] = {
    "rcnn": Network("rcnn.model.rcnn:build", "RCNN-{k}, T = {t}", _RECURRENT, shares_steps=True),
    "recursive": Network("rcnn.model.recursive:build", "rCNN-{k}, T = {t}", _RECURRENT, shares_steps=True),
    "wide": Network("rcnn.model.wide:build", "WCNN-{k}", ("k", "dropout", *_LRN)),
    "rcnn_bn": Network("rcnn.model.rcnn_bn:build", "RCNN-{k} with batch norm, T = {t}", ("k", "t", "dropout")),
    "nin": Network("rcnn.model.nin:build", "NIN", ("width",)),
    "nin_svhn": Network("rcnn.model.nin:build_svhn", "NIN (SVHN layout)", ("width",)),
    "maxout": Network("rcnn.model.maxout:build", "Maxout", ("width",)),
}


def title_of(name: str, settings: Mapping[str, Any]) -> str:
    """The network's name in reports, plots and tags, e.g. `RCNN-96, T = 3`; its width where that is not as published."""
    width = settings.get("width", 1)
    return NETWORKS[name].title.format(**settings) + ("" if width == 1 else f", width {width:g}")


def unread_settings(name: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that only other networks read: `name` would ignore them."""
    anybodys = {setting for network in NETWORKS.values() for setting in network.reads}
    return {key: settings[key] for key in settings if key in anybodys and key not in NETWORKS[name].reads}
