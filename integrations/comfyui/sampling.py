"""A schedule's run as a sampler of ComfyUI's, and the positions of mixed sequences in its FLUX and SD3 models.

A mixed sequence of L tokens travels as a strip (B, C, 2, 2L), a token for each 2x2 patch: the models treat it as an
image of L tokens, and only the positions that they would give it are replaced.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import comfy.model_management
import comfy.samplers
import torch
from torch import Tensor

from ralu.stages import Layout, Run


class Positions:
    """The positions of the tokens that a model sees now, which the model asks for.

    layout: of the call that is going on; whole images have the model's own positions.
    """

    def __init__(self) -> None:
        self.layout: Layout | None = None
        self.asked = False
        self.rows = 0

    def put_into(self, model: Any, family: str) -> Any:
        """Clone a model, a `ModelPatcher`, so that it asks here. Raises ValueError for an SD3 without positions."""
        model = model.clone()
        if family == "flux":
            model.set_model_patch(self.flux, "post_input")
            return model
        place, module = "diffusion_model.cropped_pos_embed", model.get_model_object("diffusion_model")
        if module.pos_embed is None:
            raise ValueError("model has no stored position embedding, which every published SD3 has")
        model.add_object_patch(place, partial(self.sd3, model.get_model_object(place), module))
        return model

    def begin(self, module: torch.nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        """Note how many samples a call has: guidance makes it several times the batch. A forward pre-hook."""
        self.rows = len(arguments[0] if arguments else named["x"])

    def flux(self, given: dict[str, Any]) -> dict[str, Any]:
        """Replace the ids (B, L, 3) of a strip, which are index, row and column."""
        positions, ids = self._of_strip(), given["img_ids"]
        return given if positions is None else {**given, "img_ids": torch.cat([ids[..., :1], positions], dim=-1)}

    def sd3(self, stock: Callable, module: Any, size: Any, device: Any = None) -> Tensor:
        """Return the embedding (B, L, D) of a strip's positions, or the model's own, of a size in latent pixels.

        The model stores that of whole positions, (1, side², D): sine and cosine of the column, then of the row, each of
        D/4 frequencies. The angle half-way between two places is the mean of theirs, so that its sine and cosine are
        the sum of theirs at their length.
        """
        positions = self._of_strip()
        if positions is None or self.layout is None or self.layout.plan is None:
            return stock(size, device=device)
        stored = module.pos_embed
        positions, side = positions.to(stored.device), round(stored.shape[1] ** 0.5)
        table = stored.view(side, side, 2, 2, -1)
        middle = [(side - cells) // 2 for cells in self.layout.plan.grid]
        corners = []
        for place in torch.cartesian_prod(*torch.tensor([[0, 0.5]] * 2)):
            row, column = (positions + place.to(positions)).long().unbind(-1)
            corners.append(table[row + middle[0], column + middle[1]].float())
        total = sum(corners)
        length = sum(corner.norm(dim=-2, keepdim=True) for corner in corners) / len(corners)
        return (total * (length / total.norm(dim=-2, keepdim=True).clamp(min=1e-12))).flatten(-3).to(stored.dtype)

    def _of_strip(self) -> Tensor | None:
        self.asked = True
        if self.layout is None or self.layout.plan is None:
            return None
        positions = self.layout.positions
        return positions.repeat(self.rows // len(positions), 1, 1)


class Sampler(comfy.samplers.Sampler):
    """A run as a sampler for ComfyUI's guiders, which load the model, encode the conditioning and guide.

    run: latents (B, C, H, W) in and out, see `ralu.stages.Run`. positions: what the guider's model asks.
    """

    def __init__(self, run: Run, positions: Positions):
        self.run, self.positions = run, positions

    @torch.no_grad()
    def sample(
        self,
        model_wrap: Callable,
        sigmas: Tensor,
        extra_args: dict[str, Any],
        callback: Callable | None,
        noise: Tensor,
        latent_image: Tensor | None = None,
        denoise_mask: Tensor | None = None,
        disable_pbar: bool = False,
    ) -> Tensor:
        """Run all stages from noise (B, C, H, W); ComfyUI's signature.

        callback: `(step, clean estimate, sample, steps)` after every call of the model. The estimate is at full
        resolution in every stage. Raises RuntimeError for a model that does not ask for a strip's positions.
        """
        run, positions, x = self.run, self.positions, noise
        run.start(noise, (noise.shape[2] // 2, noise.shape[3] // 2))
        handle = model_wrap.inner_model.diffusion_model.register_forward_pre_hook(positions.begin, with_kwargs=True)
        try:
            for step, (_, sigma, _) in enumerate(run.steps):
                comfy.model_management.throw_exception_if_processing_interrupted()
                positions.layout, positions.asked = run.layout, False
                seen = run.first(x)
                denoised = model_wrap(seen, seen.new_full((len(seen),), sigma), **extra_args)
                if run.layout.plan is not None and not positions.asked:
                    raise RuntimeError(
                        "the model does not ask for the positions of its tokens as ComfyUI's own FLUX and SD3 do, so "
                        "that it cannot run a mixed-resolution stage: load it with ComfyUI's own loader"
                    )
                if callback is not None:
                    callback(step, run.full_resolution(denoised), x, len(run.steps))
                x, _ = run.step(x, (seen - denoised) / sigma)
        finally:
            handle.remove()
        return x
