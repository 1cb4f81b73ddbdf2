"""Shapes of a model folder's tensors, read from the headers of its safetensors files and nothing else of them."""

from pathlib import Path

from alignment.errors import ModelError


def tensor_shapes(folder: Path) -> list[list[int]]:
    """Shapes of all tensors in a folder's safetensors files. Raises ModelError."""
    from safetensors import SafetensorError, safe_open

    shapes: list[list[int]] = []
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(path, "numpy") as file:
                shapes += [list(file.get_slice(name).get_shape()) for name in file.keys()]  # noqa: SIM118 no dict
        except (OSError, SafetensorError) as error:
            raise ModelError(f"{path} cannot be read as safetensors: {error}; put it back from a copy") from error
    return shapes
