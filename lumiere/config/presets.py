"""The configs that ship with Lumiere. Loads neither pydantic nor yaml, because shell completion lists their names."""

from pathlib import Path

SUFFIXES = (".yaml", ".yml", ".toml")


def shipped_configs() -> dict[str, Path]:
    """Return the paths of the shipped configs by bare name."""
    packaged = Path(__file__).parents[1] / "configs"
    # A wheel carries them inside the package; a checkout keeps them beside it.
    folder = packaged if packaged.is_dir() else packaged.parent.parent / "configs"
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}
