"""A model family in one file, as `ralu.families` wants it: FLUX with the colours of its names changed."""

from typing import ClassVar

import diffusers
from diffusers import FluxPipeline, FluxTransformer2DModel
from diffusers import ModelMixin as ModelMixin  # diffusers looks for it beside the class, to load a saved one

from ralu import families
from ralu.families.flux import Flux


class ToyTransformer(FluxTransformer2DModel):
    """It is another class, and that is all."""


class ToyPipeline(FluxPipeline):
    """It is another class, and that is all."""


class Toy(Flux):
    name = "toy"
    transformer = ToyTransformer
    published: ClassVar = {"toy-1": {"num_layers": 1, "num_single_layers": 1}}


FAMILY = Toy()
diffusers.ToyPipeline = ToyPipeline  # where diffusers looks for a saved pipeline's class
ENTRY = families.Entry(__name__, ("ToyPipeline",), "ToyTransformer", ("flux-7x",), 20, ("toy-1",), sample_size=128)
families.register("toy", ENTRY)
