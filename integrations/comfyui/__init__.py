"""RALU in ComfyUI: two nodes on `ralu.stages` and `ralu_kernels`, without diffusers."""

from comfy_api.latest import ComfyExtension, io

from .nodes import RALUSampler, RALUSchedule


class RALUExtension(ComfyExtension):
    """The pack, as ComfyUI asks for it."""

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        """List the nodes."""
        return [RALUSampler, RALUSchedule]


async def comfy_entrypoint() -> RALUExtension:
    """Return the pack; ComfyUI calls this by its name."""
    return RALUExtension()
