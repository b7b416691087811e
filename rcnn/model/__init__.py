"""The network, in torch alone: nothing here knows of configs, files or clusters."""

from rcnn.model.classifier import Classifier, MeanRemoval
from rcnn.model.layers import RecurrentConvLayer
from rcnn.model.lrn import LocalResponseNorm
from rcnn.model.rcnn import RCNN, count_parameters

__all__ = ["RCNN", "Classifier", "LocalResponseNorm", "MeanRemoval", "RecurrentConvLayer", "count_parameters"]
