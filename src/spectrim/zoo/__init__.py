"""Small reference models and data readers for recipes and benchmarks; nothing else imports them."""

from spectrim.zoo.data import Batches, CropFlip, Normalize, Splits, data_folder
from spectrim.zoo.images import cifar10, digits, fashion_mnist, mnist
from spectrim.zoo.lenet import caffe_lenet5, lenet5
from spectrim.zoo.llama import Stories260K, stories260k
from spectrim.zoo.losses import language_model_loss
from spectrim.zoo.lstm import LSTMLanguageModel
from spectrim.zoo.resnet import bottleneck56, bottleneck110, resnet20, resnet32, resnet44, resnet56, resnet110
from spectrim.zoo.resnet8 import mlperftiny_resnet8
from spectrim.zoo.text import characters, ptb, stories, story_tokens, vocabulary, words
from spectrim.zoo.vgg import vgg_small

__all__ = [
    "Batches",
    "CropFlip",
    "LSTMLanguageModel",
    "Normalize",
    "Splits",
    "Stories260K",
    "bottleneck56",
    "bottleneck110",
    "caffe_lenet5",
    "characters",
    "cifar10",
    "data_folder",
    "digits",
    "fashion_mnist",
    "language_model_loss",
    "lenet5",
    "mlperftiny_resnet8",
    "mnist",
    "ptb",
    "resnet20",
    "resnet32",
    "resnet44",
    "resnet56",
    "resnet110",
    "stories",
    "stories260k",
    "story_tokens",
    "vgg_small",
    "vocabulary",
    "words",
]
