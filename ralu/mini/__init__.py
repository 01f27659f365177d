"""The embedded models: small pipelines of the real architectures, trained on emoji, that run anywhere in seconds."""

from pathlib import Path


def mini_path(architecture: str = "flux") -> Path:
    """The pipeline folder of an embedded model, "flux" or "sd3", for diffusers' `from_pretrained`."""
    folder = Path(__file__).parent / architecture
    if not folder.is_dir():
        known = ", ".join(sorted(path.parent.name for path in Path(__file__).parent.glob("*/model_index.json")))
        raise ValueError(f"there is no embedded model {architecture!r}; there is {known}")
    return folder
