"""The embedded models: small pipelines of the real architectures, trained on emoji, that run anywhere in seconds."""

from pathlib import Path

PROMPTS = ["fox", "penguin", "strawberry", "hamburger", "sunflower", "tropical fish"]  # captions that the models know
# Names for the command line, and which model each means.
NAMES = {"mini": "flux", "mini-flux": "flux", "mini-schnell": "schnell", "mini-sd3": "sd3"}
# By family how to call the pipelines. Their captions are short; padding them to hundreds of tokens only costs time.
CALL_ARGUMENTS: dict[str, dict] = {
    "flux": {"max_sequence_length": 32},
    "sd3": {"max_sequence_length": 32, "guidance_scale": 2.0},
}


def mini_path(architecture: str = "flux") -> Path:
    """Return the pipeline folder of an embedded model, "flux", "schnell" or "sd3", for diffusers' `from_pretrained`.

    Raises ValueError for another name.
    """
    folder = Path(__file__).parent / architecture
    if not folder.is_dir():
        known = ", ".join(sorted(path.parent.name for path in Path(__file__).parent.glob("*/model_index.json")))
        raise ValueError(f"there is no embedded model {architecture!r}; there is {known}")
    return folder
